"""The forward kernel of flash_attention in Triton: a program keeps a block of queries and goes over their keys."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.attention import (
    LN2,
    LOG2E,
    add_product,
    add_product_of_seen,
    any_strange,
    exponential,
    product,
    scores_of,
)
from .triton_scores import dropout_factor, keys_of, sequence_of


@triton.jit
def fwd_kernel(
    q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, strange, out, lse, state,
    heads, group, queries, keys, tokens, dim, value_dim, slopes_b, left, right, scale, softcap, threshold, kept,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SINK: tl.constexpr, HAS_DROPOUT: tl.constexpr, FINE: tl.constexpr, WIDE: tl.constexpr,
    HIDES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    if HIDES:
        strange += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if CAREFUL:
        clean = tl.load(strange) == 0
        if clean:
            return
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q_start, nq = sequence_of(cu_q, b, queries, VARLEN)
    k_start, nk = sequence_of(cu_k, b, keys, VARLEN)
    begin = tl.program_id(0) * M
    if begin >= nq:
        if HIDES:
            tl.store(strange, 0)
        return
    r = begin + tl.arange(0, M)
    i = r[:, None]
    d, e = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
    rows = (q_start + i).to(tl.int64)
    q_tile = tl.load(q + b * q_b + h * q_h + rows * q_t + d, mask=(i < nq) & (d < dim), other=0.0)
    slope = tl.load(slopes + b * slopes_b + h) if HAS_ALIBI else 0.0
    seed = tl.load(rng) if HAS_DROPOUT else 0
    offset = tl.load(rng + 1) if HAS_DROPOUT else 0
    bias_at = bias + b * bias_b + h * bias_h if HAS_BIAS else bias
    mask_at = mask + b * mask_b + h * mask_h if HAS_MASK else mask
    first, past = keys_of(begin, begin + M, nq, nk, left, right, N, HAS_LEFT, HAS_RIGHT)
    n = tl.arange(0, N)
    k_at = k + b * k_b + h // group * k_h + (k_start + first + n[:, None]).to(tl.int64) * k_t + d
    v_at = v + b * v_b + h // group * v_h + (k_start + first + n[:, None]).to(tl.int64) * v_t + e
    most = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), wide)
    o = tl.zeros((M, V), wide)
    for key in range(first, past, N):
        j = key + n[None, :]
        there = key + n[:, None] < nk
        k_tile = tl.load(k_at, mask=there & (d < dim), other=0.0)
        s, _, seen = scores_of(
            product(q_tile, tl.trans(k_tile), WIDE), i, j, nq, nk, left, right, scale, softcap, slope, bias_at, mask_at,
            bias_q, bias_k, mask_q, mask_k, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_CAP, FINE,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(s, 1).to(tl.float32))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = exponential(s - base[:, None], FINE)
        alpha = exponential(most - base, FINE)
        total = total * alpha + tl.sum(p.to(wide), 1)
        if HAS_DROPOUT:
            p = p * dropout_factor(i, key, b * heads + h, seed, offset, threshold, kept, N, False, FINE)
        o = o * alpha[:, None]
        v_tile = tl.load(v_at, mask=there & (e < value_dim), other=0.0)
        o = add_product_of_seen(o, p, v_tile, seen, WIDE) if CAREFUL else add_product(o, p, v_tile, WIDE)
        most = higher
        k_at += N * k_t
        v_at += N * v_t
    if HIDES and not CAREFUL:
        tl.store(strange, any_strange(o))
    beside = tl.full((M,), 1.0, tl.float32)
    top = most
    if HAS_SINK:
        logit = tl.load(sink + h).to(tl.float32)
        if not FINE:
            logit = logit * LOG2E
        top = tl.maximum(most, logit)
        base = tl.where(top == float("-inf"), 0.0, top)
        beside = exponential(most - base, FINE)
        total = total * beside + exponential(logit - base, FINE)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    inverse = tl.where(empty, 0.0, beside / total)
    o = o * inverse[:, None]
    if not FINE:
        top, most = top * LN2, most * LN2
    row_lse = tl.where(empty, float("-inf"), top + tl.log(total)).to(tl.float32)
    tl.store(out + b * o_b + h * o_h + rows * o_t + e, o.to(out.dtype.element_ty), mask=(i < nq) & (e < value_dim))
    at = (h * tokens if VARLEN else (b * heads + h) * queries) + q_start + r
    tl.store(lse + at, row_lse, mask=r < nq)
    tl.store(state + 2 * at, most, mask=r < nq)
    tl.store(state + 2 * at + 1, inverse.to(tl.float32), mask=r < nq)
