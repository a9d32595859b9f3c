"""rotary_embedding in Triton: a program rotates the heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like


@triton.jit
def rotary_kernel(
    x, cos, sin, positions, y, heads, dim, half, table_rows,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if HAS_POSITIONS:
        row = tl.load(positions + token).to(tl.int64)
    else:
        row = token % table_rows
    pair = tl.arange(0, HALF)
    known = (pair < half) & (row >= 0) & (row < table_rows)
    # a position outside the table cannot be an error on a device: it gives NaN
    c = tl.load(cos + row * half + pair, mask=known, other=float("nan")).to(tl.float32)[None, :]
    s = tl.load(sin + row * half + pair, mask=known, other=float("nan")).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = (token * heads + head[:, None]) * dim
    inside = (head[:, None] < heads) & (pair[None, :] < half)
    first = 2 * pair[None, :] if INTERLEAVED else pair[None, :]
    second = first + (1 if INTERLEAVED else half)
    a = tl.load(x + at + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at + first, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + second, (b * c + a * s).to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        kept = (head[:, None] < heads) & (rest < dim)
        tl.store(y + at + rest, tl.load(x + at + rest, mask=kept), mask=kept)


def _table(name, t, tokens, x):
    """A table of one row per token, or of fewer that repeat, [rows, half]."""
    dims = t.shape[:-1]
    fits = len(dims) <= len(tokens) and all(a in (1, b) for a, b in zip(reversed(dims), reversed(tokens), strict=False))
    check(
        "rotary_embedding", fits,
        lambda: f"{name}: expected dimensions that broadcast to the tokens of x, {list(x.shape)} without its last two, "
        f"got shape {list(t.shape)}",
    )  # fmt: skip
    if dims != tokens[len(tokens) - len(dims) :]:
        t = t.expand(*tokens, t.shape[-1])
    return t.reshape(-1, t.shape[-1]).contiguous()


@in_triton("rotary_embedding")
def rotary_embedding(x, cos, sin, positions, interleaved, inverse):
    op = "rotary_embedding"
    check(op, x.dim() >= 3, lambda: f"x: expected [..., tokens, heads, head_dim], got shape {list(x.shape)}")
    check(op, cos.dim() >= 1, lambda: "cos: expected at least one dimension, got a scalar")
    check_like(op, "sin", sin, "cos", cos)
    half, dim, heads = cos.shape[-1], x.shape[-1], x.shape[-2]
    check(
        op, 2 * half <= dim,
        lambda: f"cos: expected at most half of head_dim, {dim}, in the last dimension, got shape {list(cos.shape)}",
    )  # fmt: skip
    tokens = x.shape[:-2]
    x = x.contiguous()
    y = torch.empty_like(x)
    if not x.numel():
        return y
    if positions is None:
        cos, sin = _table("cos", cos, tokens, x), _table("sin", sin, tokens, x)
    else:
        check(op, cos.dim() == 2, lambda: f"cos: expected a table [positions, rotary_dim / 2], got {list(cos.shape)}")
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"genai_kernels.{op}: positions: expected int32 or int64, got {positions.dtype}")
        positions = _table("positions", positions[..., None], tokens, x).expand(-1, 1)
        positions = positions.repeat(x.shape[:-2].numel() // positions.shape[0], 1).contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
    rest = dim - 2 * half
    per_program = min(triton.next_power_of_2(heads), 8)
    rotary_kernel[(x.numel() // (heads * dim), triton.cdiv(heads, per_program))](
        x, cos, sin, positions, y, heads, dim, half, cos.shape[0], HEADS=per_program,
        HALF=triton.next_power_of_2(max(half, 1)), REST=triton.next_power_of_2(rest) if rest else 0,
        INTERLEAVED=interleaved, INVERSE=inverse, HAS_POSITIONS=positions is not None,
    )  # fmt: skip
    return y
