"""silu_and_mul, gelu_and_mul and gelu_tanh_and_mul in Triton: one element of the result a lane."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from ...triton_lib.activations import GELU, GELU_TANH, SILU, value_and_slope

_TILE = 1024  # elements of a program: eight for each thread of four warps


@triton.jit
def tile_of(rows, n, R: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of the output: where its elements lie there, those of the gate in x, and which exist."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row * n + col, row * 2 * n + col, (row < rows) & (col < n)


@triton.jit
def gated_fwd_kernel(x, y, rows, n, GATE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    at, at_gate, inside = tile_of(rows, n, R, BLOCK)
    gate = tl.load(x + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at_gate + n, mask=inside, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, GATE)
    tl.store(y + at, (value * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_bwd_kernel(dy, x, dx, rows, n, GATE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    at, at_gate, inside = tile_of(rows, n, R, BLOCK)
    gate = tl.load(x + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at_gate + n, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = value_and_slope(gate, GATE)
    tl.store(dx + at_gate, (g * up * slope).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + at_gate + n, (g * value).to(dx.dtype.element_ty), mask=inside)


def _half(op, x):
    check(
        op,
        x.dim() >= 1 and x.shape[-1] % 2 == 0,
        lambda: f"x: expected a last dimension of even size, the gate and then the factor, got shape {list(x.shape)}",
    )
    return x.shape[-1] // 2


def _launch(kernel, tensors, rows, n, gate):
    block = min(triton.next_power_of_2(n), _TILE)
    r = _TILE // block
    kernel[(triton.cdiv(rows, r), triton.cdiv(n, block))](*tensors, rows, n, GATE=gate, R=r, BLOCK=block)


def _define(op, gate):
    @in_triton(op)
    def forward(x):
        n, x = _half(op, x), x.contiguous()
        y = x.new_empty((*x.shape[:-1], n))
        if y.numel():
            _launch(gated_fwd_kernel, (x, y), y.numel() // n, n, gate)
        return y

    @in_triton(f"{op}_bwd")
    def backward(dy, x):
        n, x, dy = _half(op, x), x.contiguous(), dy.contiguous()
        check_like(op, "dy", dy, "half of x", x[..., :n])
        dx = torch.empty_like(x)
        if dy.numel():
            _launch(gated_bwd_kernel, (dy, x, dx), dy.numel() // n, n, gate)
        return dx


_define("silu_and_mul", SILU)
_define("gelu_and_mul", GELU)
_define("gelu_tanh_and_mul", GELU_TANH)
