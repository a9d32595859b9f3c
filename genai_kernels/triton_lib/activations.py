"""Activations in Triton and their slopes, in float32.

The gates are x S(x) with a sigmoid S. With a = |x| and the tail T(a) = S(-a): value = max(x, 0) - a T(a), slope =
S(x) + x S'(a); so large |x| overflows nowhere, and a tiny value keeps its relative accuracy.
"""

from __future__ import annotations

import triton
import triton.language as tl

# in the order of GroupActivation in csrc
NONE, SILU, GELU, GELU_TANH, RELU = (tl.constexpr(code) for code in range(5))


@triton.jit
def logistic_tail(u):
    e = tl.exp(-u)
    tail = e / (1 + e)
    return tail, tail - tail * tail


@triton.jit
def tail_and_density(a, GATE: tl.constexpr):
    """T(a) and S'(a), 0 <= a."""
    if GATE == SILU:
        tail, density = logistic_tail(a)
    elif GATE == GELU_TANH:
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
def value_and_slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == NONE:
        value, slope = x, tl.full(x.shape, 1.0, tl.float32)
    elif ACTIVATION == RELU:
        value = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        a = tl.abs(x)
        tail, density = tail_and_density(a, ACTIVATION)
        clamped = tl.minimum(a, 110.0)
        value = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - clamped * tail
        value = tl.where(x == float("-inf"), float("nan"), value)
        slope = tl.where(x < 0, -clamped, clamped) * density + tl.where(x < 0, tail, 1 - tail)
    return value, slope
