"""merge_attention_states in Triton: a program merges one row, or several short ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like

_OP = "merge_attention_states"
_TILE = 1024  # elements that a program holds at least: eight for each thread of four warps


@triton.jit
def weights_of(lse_a, lse_b):
    """Of rows: the shares of the two sides, where each is empty, and the merged lse. In float64 until they are rounded:
    a few numbers a row.
    """
    empty_a, empty_b = lse_a == float("-inf"), lse_b == float("-inf")
    a, b = lse_a.to(tl.float64), lse_b.to(tl.float64)
    alike = (lse_a == lse_b) & (tl.abs(lse_a) == float("inf"))  # two infinities share evenly
    difference = tl.where(alike, 0.0, a - b)
    ratio = tl.exp(-tl.abs(difference))
    larger, smaller = 1 / (1 + ratio), ratio / (1 + ratio)
    lse = (tl.where(a > b, a, b) + tl.log(1 + ratio)).to(tl.float32)  # NaN through the ratio
    share_a = tl.where(difference >= 0, larger, smaller).to(tl.float32)
    share_b = tl.where(difference >= 0, smaller, larger).to(tl.float32)
    return share_a, share_b, empty_a, empty_b, tl.where(empty_a & empty_b, float("-inf"), lse)


@triton.jit
def rows_of(rows, tokens, heads, dim, R: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of o: which of its rows (batch, token, head) exist, where their lse (batch, head, token) lies, where its
    elements do, and which of these exist.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    at_lse = (row // (tokens * heads) * heads + row % heads) * tokens + row // heads % tokens
    d = tl.arange(0, BLOCK)[None, :]
    return row < rows, at_lse, row * dim + d, (row < rows) & (d < dim)


@triton.jit
def merge_fwd_kernel(
    o_a, lse_a, o_b, lse_b, o, lse, rows, tokens, heads, dim, R: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    exists, at_lse, at, inside = rows_of(rows, tokens, heads, dim, R, BLOCK)
    a, b, empty_a, empty_b, merged = weights_of(
        tl.load(lse_a + at_lse, mask=exists, other=0.0), tl.load(lse_b + at_lse, mask=exists, other=0.0)
    )
    tl.store(lse + at_lse, merged, mask=exists)
    x = tl.load(o_a + at, mask=inside & (empty_a == 0), other=0.0).to(tl.float32)
    y = tl.load(o_b + at, mask=inside & (empty_b == 0), other=0.0).to(tl.float32)
    mixed = tl.where(empty_a, y, tl.where(empty_b, x, a * x + b * y))
    tl.store(o + at, mixed.to(o.dtype.element_ty), mask=inside)


@triton.jit
def merge_bwd_kernel(
    d_o, dlse, o_a, lse_a, o_b, lse_b, d_o_a, dlse_a, d_o_b, dlse_b, rows, tokens, heads, dim,
    HAS_DLSE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    exists, at_lse, at, inside = rows_of(rows, tokens, heads, dim, R, BLOCK)
    a, b, empty_a, empty_b, merged = weights_of(
        tl.load(lse_a + at_lse, mask=exists, other=0.0), tl.load(lse_b + at_lse, mask=exists, other=0.0)
    )
    x = tl.load(o_a + at, mask=inside & (empty_a == 0), other=0.0).to(tl.float32)
    y = tl.load(o_b + at, mask=inside & (empty_b == 0), other=0.0).to(tl.float32)
    g = tl.load(d_o + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_o_a + at, tl.where(empty_a, 0.0, a * g).to(d_o_a.dtype.element_ty), mask=inside)
    tl.store(d_o_b + at, tl.where(empty_b, 0.0, b * g).to(d_o_b.dtype.element_ty), mask=inside)
    # where a side is empty or the lse infinite, the shares do not change with it
    fixed = empty_a | empty_b | (merged == float("inf"))
    dot = tl.where(fixed, 0.0, tl.sum(g * (x - y), 1, keep_dims=True))
    from_a, from_b = a * b * dot, -(a * b * dot)
    if HAS_DLSE:
        g_lse = tl.load(dlse + at_lse, mask=exists, other=0.0)
        from_a, from_b = a * (g_lse + b * dot), b * (g_lse - a * dot)
    tl.store(dlse_a + at_lse, tl.where(empty_a, 0.0, from_a), mask=exists)
    tl.store(dlse_b + at_lse, tl.where(empty_b, 0.0, from_b), mask=exists)


def _checked(o_a, lse_a, o_b, lse_b):
    check(
        _OP, o_a.dim() in (3, 4),
        lambda: f"o_a: expected [batch, tokens, heads, dim] or [tokens, heads, dim], got shape {list(o_a.shape)}",
    )  # fmt: skip
    check_like(_OP, "o_b", o_b, "o_a", o_a)
    tokens, heads, dim = o_a.shape[-3:]
    like = torch.empty((*o_a.shape[:-3], heads, tokens), dtype=torch.float32, device="meta")
    check_like(_OP, "lse_a", lse_a, "one number a row of o_a", like)
    check_like(_OP, "lse_b", lse_b, "one number a row of o_a", like)
    rows, block = lse_a.numel(), triton.next_power_of_2(max(dim, 1))
    r = max(_TILE // block, 1)
    sizes = {"rows": rows, "tokens": tokens, "heads": heads, "dim": dim, "R": r, "BLOCK": block}
    return [t.contiguous() for t in (o_a, lse_a, o_b, lse_b)], (triton.cdiv(rows, r),), sizes


@in_triton("merge_attention_states")
def merge_attention_states(o_a, lse_a, o_b, lse_b):
    states, grid, sizes = _checked(o_a, lse_a, o_b, lse_b)
    o, lse = torch.empty_like(states[0]), torch.empty_like(states[1])
    if lse.numel():
        merge_fwd_kernel[grid](*states, o, lse, **sizes)
    return o, lse


@in_triton("merge_attention_states_bwd")
def merge_attention_states_bwd(d_o, dlse, o_a, lse_a, o_b, lse_b):
    states, grid, sizes = _checked(o_a, lse_a, o_b, lse_b)
    check_like(_OP, "d_o", d_o, "o_a", o_a)
    gradients = [torch.empty_like(t) for t in states]
    if states[1].numel():
        dlse = None if dlse is None else dlse.contiguous()
        merge_bwd_kernel[grid](d_o.contiguous(), dlse, *states, *gradients, HAS_DLSE=dlse is not None, **sizes)
    return tuple(gradients)
