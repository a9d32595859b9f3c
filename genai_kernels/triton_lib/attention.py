"""What attention kernels share: scores, exponentials, products, and sums that hide what is not seen.

Where q is float32 the kernels are FINE: exponentials to the last bits; and unless head_dim is too large for it also
WIDE: products, sums and scores in float64, which the matrix units of data-center GPUs multiply at the rate of float32.
Otherwise scores are in units of ln 2, whose exponential is one instruction.

What is hidden has the probability 0, and 0 times NaN is NaN. No pass looks for NaN beforehand: a program that finds one
in its result says so in `strange`, and a second launch, CAREFUL, does what these programs did again, with each NaN and
infinity hidden from the rows that do not see it. As a branch of the first, it would take half of its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exp import exp_nonpositive

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x, FINE: tl.constexpr):
    """Of a difference of scores in their unit, in float32."""
    return exp_nonpositive(x.to(tl.float32)) if FINE else tl.exp2(x)


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    if WIDE:
        result = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    else:
        result = tl.dot(a, b, input_precision="ieee")
    return result


@triton.jit
def add_product(total, a, x, WIDE: tl.constexpr):
    """total + a x, a rounded to the dtype of x."""
    if WIDE:
        total = tl.dot(a.to(tl.float64), x.to(tl.float64), total, out_dtype=tl.float64)
    else:
        total = tl.dot(a.to(x.dtype), x, total, input_precision="ieee")
    return total


@triton.jit
def finite(x):
    """Zeros where x is NaN or infinite."""
    wide = x.to(tl.float32)
    return tl.where((wide - wide) != 0, 0.0, wide).to(x.dtype)


@triton.jit
def add_product_of_seen(total, a, x, seen, WIDE: tl.constexpr):
    """The same, where a NaN or infinity of x counts for the rows that see it, and for no other: there a is 0."""
    wide = x.to(tl.float32)
    # counts of up to 255 infinities, minus infinities and NaN side by side, exact in float32: one product, not three
    mark = tl.where(wide == float("inf"), 1.0, 0.0) + tl.where(wide == float("-inf"), 256.0, 0.0)
    mark += tl.where(wide != wide, 65536.0, 0.0)
    narrow: tl.constexpr = tl.float32 if x.dtype == tl.float32 else tl.bfloat16
    counts = product(seen.to(tl.float32).to(narrow), mark.to(narrow), WIDE).to(tl.int32)
    total = add_product(total, a, finite(x), WIDE)
    total += tl.where((counts & 255) > 0, float("inf"), 0.0) + tl.where((counts & 65280) > 0, float("-inf"), 0.0)
    return total + tl.where(counts >= 65536, float("nan"), 0.0)


@triton.jit
def any_strange(x):
    """1 if any element of a tile is NaN or infinite."""
    return tl.max(tl.max(((x - x) != 0).to(tl.int32), 1), 0)


@triton.jit
def scores_of(
    s, i, j, queries, keys, left, right, scale, softcap, slope, bias, mask, bias_q, bias_k, mask_q, mask_k,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_CAP: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """From s = q k of queries i and keys j, one a column and one a row: the scores, -inf where hidden; d score / d
    (scale q k); what is seen.
    """
    unit: tl.constexpr = 1.0 if FINE else LOG2E
    slope_of_cap = 1.0
    if HAS_CAP:
        # tanh; its argument's sign apart, so that nothing overflows
        s = s * scale
        e = tl.exp(-2 * tl.abs(s) / softcap)
        t = (1 - e) / (1 + e)
        t = tl.where(s < 0, -t, t)
        slope_of_cap = 1 - t * t
        s = t * (softcap * unit)
    else:
        s = s * (scale * unit)
    diagonal = i + (keys - queries)
    if HAS_ALIBI:
        s = s - (slope * unit) * tl.abs(diagonal - j).to(tl.float32)
    seen = (i < queries) & (j < keys)
    if HAS_BIAS:
        added = tl.load(bias + i.to(tl.int64) * bias_q + j.to(tl.int64) * bias_k, mask=seen, other=0.0).to(tl.float32)
        s = s + added * unit
        hidden_by_bias = added == float("-inf")
    if HAS_LEFT:
        seen = seen & (j >= diagonal - left)
    if HAS_RIGHT:
        seen = seen & (j <= diagonal + right)
    if HAS_MASK:
        seen = seen & (tl.load(mask + i.to(tl.int64) * mask_q + j.to(tl.int64) * mask_k, mask=seen, other=0) != 0)
    if HAS_BIAS:
        seen = seen & (hidden_by_bias == 0)
    return tl.where(seen, s, float("-inf")), slope_of_cap, seen
