"""merge_attention_states in Triton: a program merges one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like


@triton.jit
def weights_of(lse_a, lse_b):
    """The shares of the two sides, their empty marks, and the merged lse."""
    empty_a, empty_b = lse_a == float("-inf"), lse_b == float("-inf")
    difference = tl.where((lse_a == lse_b) & (tl.abs(lse_a) == float("inf")), 0.0, lse_a - lse_b)
    small = tl.exp(-tl.abs(difference))
    larger, smaller = 1 / (1 + small), small / (1 + small)
    a = tl.where(difference >= 0, larger, smaller)
    b = tl.where(difference >= 0, smaller, larger)
    a, b = tl.where(difference != difference, difference, a), tl.where(difference != difference, difference, b)
    # log(1 + small), accurate where it is tiny
    total = 1 + small
    log1p = tl.where(total == 1, small, tl.log(total) * (small / tl.where(total == 1, 1.0, total - 1)))
    lse = tl.maximum(lse_a, lse_b, propagate_nan=tl.PropagateNan.ALL) + log1p
    lse = tl.where(empty_a & empty_b, float("-inf"), lse)
    return a, b, empty_a, empty_b, lse


@triton.jit
def merge_fwd_kernel(o_a, lse_a, o_b, lse_b, o, lse, tokens, heads, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # of o: (batch, token, head)
    at_lse = (row // (tokens * heads) * heads + row % heads) * tokens + row // heads % tokens
    a, b, empty_a, empty_b, merged = weights_of(tl.load(lse_a + at_lse), tl.load(lse_b + at_lse))
    tl.store(lse + at_lse, merged)
    d = tl.arange(0, BLOCK)
    inside = d < dim
    x = tl.load(o_a + row * dim + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(o_b + row * dim + d, mask=inside, other=0.0).to(tl.float32)
    x, y = tl.where(empty_a, 0.0, x), tl.where(empty_b, 0.0, y)
    tl.store(o + row * dim + d, (a * x + b * y).to(o.dtype.element_ty), mask=inside)


@triton.jit
def merge_bwd_kernel(
    d_o, dlse, o_a, lse_a, o_b, lse_b, d_o_a, dlse_a, d_o_b, dlse_b, tokens, heads, dim,
    HAS_DLSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at_lse = (row // (tokens * heads) * heads + row % heads) * tokens + row // heads % tokens
    a, b, empty_a, empty_b, _ = weights_of(tl.load(lse_a + at_lse), tl.load(lse_b + at_lse))
    d = tl.arange(0, BLOCK)
    inside = d < dim
    x = tl.load(o_a + row * dim + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(o_b + row * dim + d, mask=inside, other=0.0).to(tl.float32)
    x, y = tl.where(empty_a, 0.0, x), tl.where(empty_b, 0.0, y)
    g = tl.load(d_o + row * dim + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_o_a + row * dim + d, tl.where(empty_a, 0.0, a * g).to(d_o_a.dtype.element_ty), mask=inside)
    tl.store(d_o_b + row * dim + d, tl.where(empty_b, 0.0, b * g).to(d_o_b.dtype.element_ty), mask=inside)
    moved = a * b * tl.sum(g * (x - y), 0)
    from_a, from_b = moved, -moved
    if HAS_DLSE:
        g_lse = tl.load(dlse + at_lse)
        from_a, from_b = from_a + a * g_lse, from_b + b * g_lse
    tl.store(dlse_a + at_lse, tl.where(empty_a, 0.0, from_a))
    tl.store(dlse_b + at_lse, tl.where(empty_b, 0.0, from_b))


def _checked(o_a, lse_a, o_b, lse_b):
    op = "merge_attention_states"
    check(
        op, o_a.dim() in (3, 4),
        lambda: f"o_a: expected [batch, tokens, heads, dim] or [tokens, heads, dim], got shape {list(o_a.shape)}",
    )  # fmt: skip
    check_like(op, "o_b", o_b, "o_a", o_a)
    tokens, heads, dim = o_a.shape[-3:]
    like = torch.empty((*o_a.shape[:-3], heads, tokens), dtype=torch.float32, device="meta")
    check_like(op, "lse_a", lse_a, "one number a row of o_a", like)
    check_like(op, "lse_b", lse_b, "one number a row of o_a", like)
    return [t.contiguous() for t in (o_a, lse_a, o_b, lse_b)], (tokens, heads, dim)


@in_triton("merge_attention_states")
def merge_attention_states(o_a, lse_a, o_b, lse_b):
    states, sizes = _checked(o_a, lse_a, o_b, lse_b)
    o, lse = torch.empty_like(states[0]), torch.empty_like(states[1])
    if lse.numel():
        merge_fwd_kernel[(lse.numel(),)](*states, o, lse, *sizes, BLOCK=triton.next_power_of_2(max(sizes[2], 1)))
    return o, lse


@in_triton("merge_attention_states_bwd")
def merge_attention_states_bwd(d_o, dlse, o_a, lse_a, o_b, lse_b):
    states, sizes = _checked(o_a, lse_a, o_b, lse_b)
    check_like("merge_attention_states", "d_o", d_o, "o_a", o_a)
    gradients = [torch.empty_like(t) for t in states]
    if states[1].numel():
        merge_bwd_kernel[(states[1].numel(),)](
            d_o.contiguous(), None if dlse is None else dlse.contiguous(), *states, *gradients, *sizes,
            HAS_DLSE=dlse is not None, BLOCK=triton.next_power_of_2(max(sizes[2], 1)),
        )  # fmt: skip
    return tuple(gradients)
