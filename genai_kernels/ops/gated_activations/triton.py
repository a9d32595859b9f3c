"""silu_and_mul, gelu_and_mul and gelu_tanh_and_mul in Triton: one element of the result a lane.

The three gates are x S(x) with a sigmoid S. With a = |x| and the tail T(a) = S(-a): value = max(x, 0) - a T(a), slope =
S(x) + x S'(a); so large |x| overflows nowhere, and a tiny value keeps its relative accuracy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like

_TILE = 1024  # elements of a program: eight for each thread of four warps
_SILU, _GELU, _GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def logistic_tail(u):
    e = tl.exp(-u)
    tail = e / (1 + e)
    return tail, tail - tail * tail


@triton.jit
def tail_and_density(a, GATE: tl.constexpr):
    """T(a) and S'(a), 0 <= a."""
    if GATE == _SILU:
        tail, density = logistic_tail(a)
    elif GATE == _GELU_TANH:
        a = tl.minimum(a, 11.0)  # the tail is 0 from here on
        square = a * a
        tail, density = logistic_tail(a * (1.5957691216057308 + 0.07135481282732282 * square))
        density = density * (1.5957691216057308 + 0.21406443848196846 * square)
    else:
        # erfc(a / sqrt 2) / 2 = e^(-a^2 / 2) t h(t), t = 1 / (1 + 0.35 a); below 1.25 1/2 - a q(a^2) rounds less often
        a = tl.minimum(a, 14.6)
        square = a * a
        e = tl.exp(-0.5 * square)
        e = e * (1 - 0.5 * tl.fma(a, a, -square))  # what the rounding of a^2 lost
        t = 1 / (1 + 0.35 * a)
        h = -0.029158029705286026
        h = h * t + 0.1440316140651703
        h = h * t - 0.25584039092063904
        h = h * t + 0.15932124853134155
        h = h * t - 0.023213393986225128
        h = h * t + 0.10555292665958405
        h = h * t + 0.11982118338346481
        h = h * t + 0.1398635357618332
        h = h * t + 0.139621302485466
        q = -6.5185695348191075e-06
        q = q * square + 0.0001097634230973199
        q = q * square - 0.0011817829217761755
        q = q * square + 0.009970822371542454
        q = q * square - 0.06648977845907211
        q = q * square + 0.398942232131958
        tail = tl.where(a < 1.25, 0.5 - a * q, e * (h * t))
        density = e * 0.3989422804014327
    return tail, density


@triton.jit
def value_and_slope(x, GATE: tl.constexpr):
    a = tl.abs(x)
    tail, density = tail_and_density(a, GATE)
    clamped = tl.minimum(a, 110.0)
    value = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - clamped * tail
    slope = tl.where(x < 0, -clamped, clamped) * density + tl.where(x < 0, tail, 1 - tail)
    return tl.where(x == float("-inf"), float("nan"), value), slope


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


_define("silu_and_mul", _SILU)
_define("gelu_and_mul", _GELU)
_define("gelu_tanh_and_mul", _GELU_TANH)
