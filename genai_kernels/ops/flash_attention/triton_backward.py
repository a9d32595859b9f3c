"""The backward kernels of flash_attention in Triton. The probabilities are computed again from the forward's state of a
row: (largest score, 1 / sum of exponentials), the sink in the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.attention import add_product, add_product_of_seen, any_strange, finite, product
from .triton_scores import keys_of, score_gradients, sequence_of


@triton.jit
def delta_kernel(
    dout, out, dlse, lse, state, cu_q, delta, heads, queries, tokens, value_dim, o_b, o_t, o_h, out_b, out_t, out_h,
    M: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, HAS_DLSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dout . out - dlse of a block of queries, added up as `dout v` is: where a query sees one key, and out is its v,
    the gradient of the score is exactly 0.
    """
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q_start, nq = sequence_of(cu_q, b, queries, VARLEN)
    begin = tl.program_id(0) * M
    if begin >= nq:
        return
    r, e = begin + tl.arange(0, M), tl.arange(0, V)[None, :]
    rows, inside = (q_start + r[:, None]).to(tl.int64), (r[:, None] < nq) & (e < value_dim)
    g_tile = tl.load(dout + b * o_b + h * o_h + rows * o_t + e, mask=inside, other=0.0)
    o_tile = tl.load(out + b * out_b + h * out_h + rows * out_t + e, mask=inside, other=0.0)
    diagonal = tl.arange(0, M)[:, None] == tl.arange(0, M)[None, :]
    result = tl.sum(tl.where(diagonal, product(g_tile, tl.trans(o_tile), WIDE), 0.0), 1)
    at = (h * tokens if VARLEN else (b * heads + h) * queries) + q_start + r
    # a row without keys: out is 0 whatever dout
    most = tl.load(state + 2 * at, mask=r < nq, other=0.0)
    result = tl.where(most == float("-inf"), 0.0, result)
    if HAS_DLSE:
        result = result - tl.load(dlse + at, mask=r < nq, other=0.0)
    empty = tl.load(lse + at, mask=r < nq, other=0.0) == float("-inf")
    tl.store(delta + at, tl.where(empty, 0.0, result), mask=r < nq)


@triton.jit
def dkdv_kernel(
    q, k, v, dout, cu_q, cu_k, slopes, bias, mask, rng, state, delta, strange, dk, dv,
    heads, group, queries, keys, tokens, dim, value_dim, slopes_b, left, right, scale, softcap, threshold, kept,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, FINE: tl.constexpr, WIDE: tl.constexpr,
    HIDES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    if HIDES:
        strange += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if CAREFUL:
        clean = tl.load(strange) == 0
        if clean:
            return
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    kv_heads = heads // group
    b, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    q_start, nq = sequence_of(cu_q, b, queries, VARLEN)
    k_start, nk = sequence_of(cu_k, b, keys, VARLEN)
    begin = tl.program_id(0) * N
    if begin >= nk:
        if HIDES:
            tl.store(strange, 0)
        return
    first, past = 0, nq
    if HAS_RIGHT:
        first = tl.maximum(begin - (nk - nq) - right, 0) // M * M
    if HAS_LEFT:
        past = tl.minimum(nq, tl.maximum(tl.minimum(begin + N, nk) - (nk - nq) + left, 0))
    seed = tl.load(rng) if HAS_DROPOUT else 0
    offset = tl.load(rng + 1) if HAS_DROPOUT else 0
    d, e = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
    j = begin + tl.arange(0, N)[:, None]
    at = (k_start + j).to(tl.int64)
    k_tile = tl.load(k + b * k_b + kv_head * k_h + at * k_t + d, mask=(j < nk) & (d < dim), other=0.0)
    v_tile = tl.load(v + b * v_b + kv_head * v_h + at * v_t + e, mask=(j < nk) & (e < value_dim), other=0.0)
    q, dout = q + b * q_b, dout + b * o_b
    dk_sum, dv_sum = tl.zeros((N, D), wide), tl.zeros((N, V), wide)
    for h in range(kv_head * group, kv_head * group + group):
        slope = tl.load(slopes + b * slopes_b + h) if HAS_ALIBI else 0.0
        bias_at = bias + b * bias_b + h * bias_h if HAS_BIAS else bias
        mask_at = mask + b * mask_b + h * mask_h if HAS_MASK else mask
        lse_at = (h * tokens if VARLEN else (b * heads + h) * queries) + q_start
        for query in range(first, past, M):
            r = query + tl.arange(0, M)
            rows, there = (q_start + r[:, None]).to(tl.int64), r[:, None] < nq
            q_tile = tl.load(q + h * q_h + rows * q_t + d, mask=there & (d < dim), other=0.0)
            g_tile = tl.load(dout + h * o_h + rows * o_t + e, mask=there & (e < value_dim), other=0.0)
            most = tl.load(state + 2 * (lse_at + r), mask=r < nq, other=float("-inf"))
            inverse = tl.load(state + 2 * (lse_at + r) + 1, mask=r < nq, other=0.0)
            row_delta = tl.load(delta + lse_at + r, mask=r < nq, other=0.0)
            p, _, ds, seen = score_gradients(
                product(k_tile, tl.trans(q_tile), WIDE), product(v_tile, tl.trans(g_tile), WIDE), r[None, :], j, begin,
                b * heads + h, most[None, :], inverse[None, :], row_delta[None, :], nq, nk, left, right, scale, softcap,
                slope, bias_at, mask_at, bias_q, bias_k, mask_q, mask_k, seed, offset, threshold, kept, HAS_LEFT,
                HAS_RIGHT, HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_CAP, HAS_DROPOUT, FINE, N, True,
            )  # fmt: skip
            if CAREFUL:  # a query that is NaN makes ds NaN wherever it is seen
                dv_sum = add_product_of_seen(dv_sum, p, g_tile, seen, WIDE)
                dk_sum = add_product(dk_sum, ds, finite(q_tile), WIDE)
            else:
                dv_sum = add_product(dv_sum, p, g_tile, WIDE)
                dk_sum = add_product(dk_sum, ds, q_tile, WIDE)
    if HIDES and not CAREFUL:
        tl.store(strange, any_strange(dk_sum) + any_strange(dv_sum))
    dk_at = dk + b * dk_b + kv_head * dk_h + at * dk_t + d
    dv_at = dv + b * dv_b + kv_head * dv_h + at * dv_t + e
    tl.store(dk_at, (dk_sum * scale).to(dk.dtype.element_ty), mask=(j < nk) & (d < dim))
    tl.store(dv_at, dv_sum.to(dv.dtype.element_ty), mask=(j < nk) & (e < value_dim))


@triton.jit
def dq_kernel(
    q, k, v, dout, cu_q, cu_k, slopes, bias, mask, rng, state, delta, strange, dq,
    heads, group, queries, keys, tokens, dim, value_dim, slopes_b, left, right, scale, softcap, threshold, kept,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, dq_b, dq_t, dq_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, FINE: tl.constexpr, WIDE: tl.constexpr,
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
    first, past = keys_of(begin, begin + M, nq, nk, left, right, N, HAS_LEFT, HAS_RIGHT)
    seed = tl.load(rng) if HAS_DROPOUT else 0
    offset = tl.load(rng + 1) if HAS_DROPOUT else 0
    slope = tl.load(slopes + b * slopes_b + h) if HAS_ALIBI else 0.0
    d, e = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
    i = begin + tl.arange(0, M)[:, None]
    rows = (q_start + i).to(tl.int64)
    q_tile = tl.load(q + b * q_b + h * q_h + rows * q_t + d, mask=(i < nq) & (d < dim), other=0.0)
    g_tile = tl.load(dout + b * o_b + h * o_h + rows * o_t + e, mask=(i < nq) & (e < value_dim), other=0.0)
    at = (h * tokens if VARLEN else (b * heads + h) * queries) + rows
    most = tl.load(state + 2 * at, mask=i < nq, other=float("-inf"))
    inverse = tl.load(state + 2 * at + 1, mask=i < nq, other=0.0)
    row_delta = tl.load(delta + at, mask=i < nq, other=0.0)
    bias_at = bias + b * bias_b + h * bias_h if HAS_BIAS else bias
    mask_at = mask + b * mask_b + h * mask_h if HAS_MASK else mask
    n = tl.arange(0, N)
    k_at = k + b * k_b + h // group * k_h + (k_start + first + n[:, None]).to(tl.int64) * k_t + d
    v_at = v + b * v_b + h // group * v_h + (k_start + first + n[:, None]).to(tl.int64) * v_t + e
    dq_sum = tl.zeros((M, D), wide)
    for key in range(first, past, N):
        there = key + n[:, None] < nk
        k_tile = tl.load(k_at, mask=there & (d < dim), other=0.0)
        v_tile = tl.load(v_at, mask=there & (e < value_dim), other=0.0)
        _, _, ds, _ = score_gradients(
            product(q_tile, tl.trans(k_tile), WIDE), product(g_tile, tl.trans(v_tile), WIDE), i, key + n[None, :], key,
            b * heads + h, most, inverse, row_delta, nq, nk, left, right, scale, softcap, slope, bias_at, mask_at,
            bias_q, bias_k, mask_q, mask_k, seed, offset, threshold, kept, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_MASK,
            HAS_ALIBI, HAS_CAP, HAS_DROPOUT, FINE, N, False,
        )  # fmt: skip
        dq_sum = add_product(dq_sum, ds, finite(k_tile) if CAREFUL else k_tile, WIDE)
        k_at += N * k_t
        v_at += N * v_t
    if HIDES and not CAREFUL:
        tl.store(strange, any_strange(dq_sum))
    dq_at = dq + b * dq_b + h * dq_h + rows * dq_t + d
    tl.store(dq_at, (dq_sum * scale).to(dq.dtype.element_ty), mask=(i < nq) & (d < dim))


@triton.jit
def dbias_kernel(
    q, k, v, dout, cu_q, cu_k, slopes, bias, mask, rng, state, delta, sums,
    batch, heads, group, queries, keys, tokens, dim, value_dim, slopes_b, left, right, scale, softcap, threshold, kept,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, bias_batch, bias_heads, sums_q, sums_k,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, OVER_QUERIES: tl.constexpr, OVER_KEYS: tl.constexpr, FINE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Of one tile of the scores: its part of the bias's gradient, summed over the batches and heads that share it, and,
    where the bias is broadcast over queries or keys, over those of the tile: sums is [bias_batch, bias_heads, queries
    or their blocks, keys or their blocks].
    """
    steps = tl.cdiv(keys, N)
    query, key = tl.program_id(0) // steps * M, tl.program_id(0) % steps * N
    own_b, own_h = tl.program_id(1) // bias_heads, tl.program_id(1) % bias_heads
    d, e = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
    r, c = query + tl.arange(0, M), key + tl.arange(0, N)
    i, j = r[:, None], c[None, :]
    seed = tl.load(rng) if HAS_DROPOUT else 0
    offset = tl.load(rng + 1) if HAS_DROPOUT else 0
    tile = tl.zeros((M, N), tl.float64 if WIDE else tl.float32)
    for at_b in range(own_b, batch, bias_batch):
        b = tl.zeros((), tl.int64) + at_b
        q_start, nq = sequence_of(cu_q, b, queries, VARLEN)
        k_start, nk = sequence_of(cu_k, b, keys, VARLEN)
        rows, at_key = (q_start + i).to(tl.int64), (k_start + c[:, None]).to(tl.int64)
        there = c[:, None] < nk
        for at_h in range(own_h, heads, bias_heads):
            h = tl.zeros((), tl.int64) + at_h
            slope = tl.load(slopes + b * slopes_b + h) if HAS_ALIBI else 0.0
            q_tile = tl.load(q + b * q_b + h * q_h + rows * q_t + d, mask=(i < nq) & (d < dim), other=0.0)
            g_tile = tl.load(dout + b * o_b + h * o_h + rows * o_t + e, mask=(i < nq) & (e < value_dim), other=0.0)
            k_tile = tl.load(k + b * k_b + h // group * k_h + at_key * k_t + d, mask=there & (d < dim), other=0.0)
            v_tile = tl.load(v + b * v_b + h // group * v_h + at_key * v_t + e, mask=there & (e < value_dim), other=0.0)
            at = (h * tokens if VARLEN else (b * heads + h) * queries) + rows
            most = tl.load(state + 2 * at, mask=i < nq, other=float("-inf"))
            inverse = tl.load(state + 2 * at + 1, mask=i < nq, other=0.0)
            row_delta = tl.load(delta + at, mask=i < nq, other=0.0)
            mask_at = mask + b * mask_b + h * mask_h if HAS_MASK else mask
            _, ds, _, _ = score_gradients(
                product(q_tile, tl.trans(k_tile), WIDE), product(g_tile, tl.trans(v_tile), WIDE), i, j, key,
                b * heads + h, most, inverse, row_delta, nq, nk, left, right, scale, softcap, slope,
                bias + b * bias_b + h * bias_h, mask_at, bias_q, bias_k, mask_q, mask_k, seed, offset, threshold, kept,
                HAS_LEFT, HAS_RIGHT, True, HAS_MASK, HAS_ALIBI, HAS_CAP, HAS_DROPOUT, FINE, N, False,
            )  # fmt: skip
            tile += ds
    to = sums + tl.program_id(1).to(tl.int64) * sums_q * sums_k
    if OVER_QUERIES and OVER_KEYS:
        tl.store(to + query // M * sums_k + key // N, tl.sum(tl.sum(tile, 1), 0))
    elif OVER_QUERIES:
        tl.store(to + (query // M).to(tl.int64) * sums_k + c, tl.sum(tile, 0), mask=c < keys)
    elif OVER_KEYS:
        tl.store(to + r.to(tl.int64) * sums_k + key // N, tl.sum(tile, 1), mask=r < queries)
    else:
        tl.store(to + i.to(tl.int64) * sums_k + j, tile, mask=(i < queries) & (j < keys))
