"""What the Triton kernels of flash_attention share: scores, dropout, which tokens, and sums that hide what is not seen.

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

from ...triton_lib.exp import exp_nonpositive

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


@triton.jit
def score_gradients(
    s, dp, i, j, key, row, most, inverse, delta, queries, keys, left, right, scale, softcap, slope, bias, mask, bias_q,
    bias_k, mask_q, mask_k, seed, offset, threshold, kept, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, FINE: tl.constexpr, N: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """From s = q k and dp = dout v: P after dropout, which multiplied V; the gradient of the score and of scale q k;
    what is seen. `most`, `inverse` and `delta` stand as i does, and the first of the keys is `key`.
    """
    s, slope_of_cap, seen = scores_of(
        s, i, j, queries, keys, left, right, scale, softcap, slope, bias, mask, bias_q, bias_k, mask_q, mask_k,
        HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_CAP, FINE,
    )  # fmt: skip
    base = tl.where(most == float("-inf"), 0.0, most)
    if not FINE:
        base = base * LOG2E
    p = tl.where(seen, exponential(s - base, FINE) * inverse, 0.0)
    dropped = p
    if HAS_DROPOUT:
        factor = dropout_factor(i, key, row, seed, offset, threshold, kept, N, KEYS_FIRST, FINE)
        dp = dp * factor
        dropped = p * factor
    ds = tl.where(seen, p * (dp - delta), 0.0)
    return dropped, ds, tl.where(seen, ds * slope_of_cap, 0.0), seen


@triton.jit
def dropout_factor(
    i, key, row, seed, offset, threshold, kept, N: tl.constexpr, KEYS_FIRST: tl.constexpr, FINE: tl.constexpr
):
    """0, or 1 / (1 - p), of queries i and the keys from `key` on, a multiple of 4: word j % 4 of Philox(counter = (j /
    4, i, row, offset), key = seed), as everywhere. [keys, queries] if KEYS_FIRST, otherwise [queries, keys].
    """
    # four keys take one call; but Triton 3.7 believes a factor that depends on a join to be packed to half its width,
    # and cannot multiply float64 as if it were
    each: tl.constexpr = 1 if FINE else 4
    column = tl.arange(0, N // each)
    quads = key // 4 + (column // 4 if FINE else column)
    quads = quads[:, None] if KEYS_FIRST else quads[None, :]
    zero = tl.zeros_like(i + quads)
    w0, w1, w2, w3 = tl.philox(
        seed, (zero + quads).to(tl.uint32), (zero + i).to(tl.uint32), (zero + row).to(tl.uint32),
        (zero + offset).to(tl.uint32),
    )  # fmt: skip
    if FINE:
        which = zero + (column % 4)[:, None] if KEYS_FIRST else zero + (column % 4)[None, :]
        words = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., .., 2, 2]
        if KEYS_FIRST:
            words = tl.permute(words, (0, 2, 3, 1))
        words = tl.reshape(words, (N, zero.shape[1]) if KEYS_FIRST else (zero.shape[0], N))
    return tl.where(words >= threshold, kept, 0.0)


@triton.jit
def sequence_of(cu, b, longest, VARLEN: tl.constexpr):
    """The first token of a sequence in the packed tensor, and its length."""
    if VARLEN:
        begin = tl.load(cu + b)
        return begin, tl.load(cu + b + 1) - begin
    return 0, longest


@triton.jit
def keys_of(begin, past, queries, keys, left, right, N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The first key that queries from `begin` to before `past` see, in whole steps, and where those end."""
    shift = keys - queries
    first, end = 0, keys
    if HAS_LEFT:
        first = tl.maximum(begin + shift - left, 0) // N * N
    if HAS_RIGHT:
        end = tl.minimum(keys, tl.maximum(tl.minimum(past, queries) + shift + right, 0))
    return first, end
