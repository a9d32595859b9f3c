"""What the Triton kernels of flash_attention share beyond triton_lib/attention.py: gradients of scores, dropout, and
which tokens a program has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.attention import LOG2E, exponential, scores_of


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
