"""flash_attention in Triton: a program keeps a block of queries (or of keys, for their gradients) and goes over the others.

The softmax's state of a row is (largest score, 1 / sum of exponentials), the sink in the sum. Sums are float32, in an
order that the shapes of one sequence fix; nothing is added by two programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like

_OP = "flash_attention"


@triton.jit
def seen_sum(total, a, x, seen):
    """total + a x, where a NaN or infinity of x counts for the rows that see it, and for no other: there a is 0."""
    wide = x.to(tl.float32)
    strange = (wide - wide) != 0
    clean = tl.where(strange, 0.0, wide).to(x.dtype)
    total = tl.dot(a.to(x.dtype), clean, total, input_precision="ieee")
    if tl.max(tl.max(strange.to(tl.int32), 1), 0) > 0:
        s = seen.to(tl.float32)
        nan = tl.dot(s, (wide != wide).to(tl.float32), input_precision="ieee") > 0
        plus = tl.dot(s, (wide == float("inf")).to(tl.float32), input_precision="ieee") > 0
        minus = tl.dot(s, (wide == float("-inf")).to(tl.float32), input_precision="ieee") > 0
        total += tl.where(plus, float("inf"), 0.0) + tl.where(minus, float("-inf"), 0.0)
        total += tl.where(nan, float("nan"), 0.0)
    return total


@triton.jit
def finite(x):
    """Zeros where x is NaN or infinite: its other factor is NaN wherever it is seen."""
    wide = x.to(tl.float32)
    return tl.where((wide - wide) != 0, 0.0, wide).to(x.dtype)


@triton.jit
def scores_of(
    q, k, i, j, queries, keys, left, right, scale, softcap, slope, bias, mask, bias_q, bias_k, mask_q, mask_k,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Scores of queries i [M, 1] and keys j [1, N], -inf where hidden; d score / d (scale q k); what is seen."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    slope_of_cap = 1.0
    if HAS_CAP:
        # tanh; its argument's sign apart, so that nothing overflows
        e = tl.exp(-2 * tl.abs(s) / softcap)
        t = (1 - e) / (1 + e)
        t = tl.where(s < 0, -t, t)
        slope_of_cap = 1 - t * t
        s = softcap * t
    diagonal = i + (keys - queries)
    if HAS_ALIBI:
        s = s - slope * tl.abs(diagonal - j).to(tl.float32)
    seen = (i < queries) & (j < keys)
    if HAS_BIAS:
        added = tl.load(bias + i.to(tl.int64) * bias_q + j.to(tl.int64) * bias_k, mask=seen, other=0.0).to(tl.float32)
        s = s + added
        hidden_by_bias = added == float("-inf")
    if left >= 0:
        seen = seen & (j >= diagonal - left)
    if right >= 0:
        seen = seen & (j <= diagonal + right)
    if HAS_MASK:
        seen = seen & (tl.load(mask + i.to(tl.int64) * mask_q + j.to(tl.int64) * mask_k, mask=seen, other=0) != 0)
    if HAS_BIAS:
        seen = seen & (hidden_by_bias == 0)
    return tl.where(seen, s, float("-inf")), slope_of_cap, seen


@triton.jit
def dropout_factor(i, j, row, seed, offset, threshold, kept):
    """0, or 1 / (1 - p): word j % 4 of Philox(counter = (j / 4, i, row, offset), key = seed), as everywhere."""
    zero = tl.zeros_like(i + j)
    w0, w1, w2, w3 = tl.philox(
        seed, (zero + j // 4).to(tl.uint32), (zero + i).to(tl.uint32), (zero + row).to(tl.uint32),
        (zero + offset).to(tl.uint32),
    )  # fmt: skip
    which = zero + j % 4
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return tl.where(word >= threshold, kept, 0.0)


@triton.jit
def sequence_of(cu, b, longest, VARLEN: tl.constexpr):
    """The first token of a sequence in the packed tensor, and its length."""
    if VARLEN:
        begin = tl.load(cu + b)
        return begin, tl.load(cu + b + 1) - begin
    return 0, longest


@triton.jit
def first_key(begin, shift, left, N: tl.constexpr):
    """Of the keys that queries from `begin` on see, in whole steps."""
    first = 0
    if left >= 0:
        first = tl.maximum(begin + shift - left, 0) // N * N
    return first


@triton.jit
def past_key(last, shift, right, keys):
    past = keys
    if right >= 0:
        past = tl.minimum(keys, tl.maximum(last + shift + right + 1, 0))
    return past


@triton.jit
def fwd_kernel(
    q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, out, lse, state,
    heads, group, queries, keys, total, dim, value_dim, slopes_b, left, right, scale, softcap, threshold, kept,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q_at, nq = sequence_of(cu_q, b, queries, VARLEN)
    k_at, nk = sequence_of(cu_k, b, keys, VARLEN)
    begin = tl.program_id(0) * M
    if begin >= nq:
        return
    i = begin + tl.arange(0, M)[:, None]
    d, e = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
    rows = (q_at + i).to(tl.int64)
    q_tile = tl.load(q + b * q_b + h * q_h + rows * q_t + d, mask=(i < nq) & (d < dim), other=0.0)
    slope = tl.load(slopes + b * slopes_b + h) if HAS_ALIBI else 0.0
    seed = tl.load(rng) if HAS_DROPOUT else 0
    offset = tl.load(rng + 1) if HAS_DROPOUT else 0
    bias_at = bias + b * bias_b + h * bias_h if HAS_BIAS else bias
    mask_at = mask + b * mask_b + h * mask_h if HAS_MASK else mask
    most = tl.full((M,), float("-inf"), tl.float32)
    total_p = tl.zeros((M,), tl.float32)
    o = tl.zeros((M, V), tl.float32)
    for key in range(first_key(begin, nk - nq, left, N), past_key(tl.minimum(begin + M, nq) - 1, nk - nq, right, nk), N):
        j = key + tl.arange(0, N)[None, :]
        tokens = (k_at + key + tl.arange(0, N)[:, None]).to(tl.int64)
        there = key + tl.arange(0, N)[:, None] < nk
        k_tile = tl.load(k + b * k_b + h // group * k_h + tokens * k_t + d, mask=there & (d < dim), other=0.0)
        v_tile = tl.load(v + b * v_b + h // group * v_h + tokens * v_t + e, mask=there & (e < value_dim), other=0.0)
        s, _, seen = scores_of(
            q_tile, k_tile, i, j, nq, nk, left, right, scale, softcap, slope, bias_at, mask_at, bias_q, bias_k,
            mask_q, mask_k, HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_CAP,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(s - base[:, None])
        alpha = tl.exp(most - base)
        total_p = total_p * alpha + tl.sum(p, 1)
        if HAS_DROPOUT:
            p = p * dropout_factor(i, j, b * heads + h, seed, offset, threshold, kept)
        o = seen_sum(o * alpha[:, None], p, v_tile, seen)
        most = higher
    beside = tl.full((M,), 1.0, tl.float32)
    top = most
    if HAS_SINK:
        logit = tl.load(sink + h)
        top = tl.maximum(most, logit)
        beside = tl.where(most == float("-inf"), 0.0, tl.exp(most - top))
        total_p = total_p * beside + tl.exp(logit - top)
    inverse = tl.where(total_p == 0, 0.0, beside / total_p)
    o = o * inverse[:, None]
    row_lse = tl.where(total_p == 0, float("-inf"), top + tl.log(total_p))
    r = begin + tl.arange(0, M)
    inside = r < nq
    tl.store(out + b * o_b + h * o_h + rows * o_t + e, o.to(out.dtype.element_ty), mask=(i < nq) & (e < value_dim))
    at = (h * total if VARLEN else (b * heads + h) * queries) + q_at + r
    tl.store(lse + at, row_lse, mask=inside)
    tl.store(state + 2 * at, most, mask=inside)
    tl.store(state + 2 * at + 1, inverse, mask=inside)


@triton.jit
def score_gradients(s, slope_of_cap, seen, dp, most, inverse, delta, factor):
    """P after dropout, which multiplied V, and the gradient of scale q k."""
    p = tl.where(seen, tl.exp(s - tl.where(most == float("-inf"), 0.0, most)[:, None]) * inverse[:, None], 0.0)
    ds = tl.where(seen, p * (dp * factor - delta[:, None]), 0.0)
    return p * factor, ds, tl.where(seen, ds * slope_of_cap, 0.0)


@triton.jit
def bwd_kernel(
    q, k, v, dout, cu_q, cu_k, slopes, bias, mask, rng, state, delta, dq, dk, dv,
    heads, group, queries, keys, total, dim, value_dim, slopes_b, left, right, scale, softcap, threshold, kept,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    OF_KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """OF_KEYS: dK and dV of one block of keys, over the queries of all heads of a group; otherwise dQ of one of queries."""
    d, e = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
    own = tl.program_id(0)
    kv_heads = heads // group
    if OF_KEYS:
        b, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
        first_head, past_head = kv_head * group, kv_head * group + group
    else:
        b, first_head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
        kv_head, past_head = first_head // group, first_head + 1
    q_at, nq = sequence_of(cu_q, b, queries, VARLEN)
    k_at, nk = sequence_of(cu_k, b, keys, VARLEN)
    shift = nk - nq
    if OF_KEYS:
        if own * N >= nk:
            return
        first, past = 0, nq
        if right >= 0:
            first = tl.maximum(own * N - shift - right, 0) // M * M
        if left >= 0:
            past = tl.minimum(nq, tl.maximum(tl.minimum(own * N + N, nk) - shift + left, 0))
    else:
        if own * M >= nq:
            return
        first = first_key(own * M, shift, left, N)
        past = past_key(tl.minimum(own * M + M, nq) - 1, shift, right, nk)
    dk_sum, dv_sum = tl.zeros((N, D), tl.float32), tl.zeros((N, V), tl.float32)
    dq_sum = tl.zeros((M, D), tl.float32)
    seed = tl.load(rng) if HAS_DROPOUT else 0
    offset = tl.load(rng + 1) if HAS_DROPOUT else 0
    for h in range(first_head, past_head):
        slope = tl.load(slopes + b * slopes_b + h) if HAS_ALIBI else 0.0
        bias_at = bias + b * bias_b + h * bias_h if HAS_BIAS else bias
        mask_at = mask + b * mask_b + h * mask_h if HAS_MASK else mask
        for step in range(first, past, STEP):
            query, key = own * M, step
            if OF_KEYS:
                query, key = step, own * N
            r = query + tl.arange(0, M)
            i, j = r[:, None], key + tl.arange(0, N)[None, :]
            rows, tokens = (q_at + i).to(tl.int64), (k_at + key + tl.arange(0, N)[:, None]).to(tl.int64)
            there = key + tl.arange(0, N)[:, None] < nk
            q_tile = tl.load(q + b * q_b + h * q_h + rows * q_t + d, mask=(i < nq) & (d < dim), other=0.0)
            g_tile = tl.load(dout + b * o_b + h * o_h + rows * o_t + e, mask=(i < nq) & (e < value_dim), other=0.0)
            k_tile = tl.load(k + b * k_b + kv_head * k_h + tokens * k_t + d, mask=there & (d < dim), other=0.0)
            v_tile = tl.load(v + b * v_b + kv_head * v_h + tokens * v_t + e, mask=there & (e < value_dim), other=0.0)
            at = (h * total if VARLEN else (b * heads + h) * queries) + q_at + r
            most = tl.load(state + 2 * at, mask=r < nq, other=float("-inf"))
            inverse = tl.load(state + 2 * at + 1, mask=r < nq, other=0.0)
            row_delta = tl.load(delta + at, mask=r < nq, other=0.0)
            s, slope_of_cap, seen = scores_of(
                q_tile, k_tile, i, j, nq, nk, left, right, scale, softcap, slope, bias_at, mask_at, bias_q, bias_k,
                mask_q, mask_k, HAS_BIAS, HAS_MASK, HAS_ALIBI, HAS_CAP,
            )  # fmt: skip
            dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
            factor = 1.0
            if HAS_DROPOUT:
                factor = dropout_factor(i, j, b * heads + h, seed, offset, threshold, kept)
            p, _, ds = score_gradients(s, slope_of_cap, seen, dp, most, inverse, row_delta, factor)
            if OF_KEYS:
                dv_sum = seen_sum(dv_sum, tl.trans(p), g_tile, tl.trans(seen))
                dk_sum = tl.dot(tl.trans(ds).to(q.dtype.element_ty), finite(q_tile), dk_sum, input_precision="ieee")
            else:
                dq_sum = tl.dot(ds.to(q.dtype.element_ty), finite(k_tile), dq_sum, input_precision="ieee")
    if OF_KEYS:
        n = own * N + tl.arange(0, N)[:, None]
        tokens = (k_at + n).to(tl.int64)
        dk_at = dk + b * dk_b + kv_head * dk_h + tokens * dk_t + d
        dv_at = dv + b * dv_b + kv_head * dv_h + tokens * dv_t + e
        tl.store(dk_at, (dk_sum * scale).to(dk.dtype.element_ty), mask=(n < nk) & (d < dim))
        tl.store(dv_at, dv_sum.to(dv.dtype.element_ty), mask=(n < nk) & (e < value_dim))
    else:
        i = own * M + tl.arange(0, M)[:, None]
        dq_at = dq + b * dq_b + first_head * dq_h + (q_at + i).to(tl.int64) * dq_t + d
        tl.store(dq_at, (dq_sum * scale).to(dq.dtype.element_ty), mask=(i < nq) & (d < dim))


@triton.jit
def dbias_kernel(
    q, k, v, dout, cu_q, cu_k, slopes, bias, mask, rng, state, delta, sums,
    batch, heads, group, queries, keys, total, dim, value_dim, slopes_b, left, right, scale, softcap, threshold, kept,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, bias_batch, bias_heads, sums_q, sums_k,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    OVER_QUERIES: tl.constexpr, OVER_KEYS: tl.constexpr,
):  # fmt: skip
    """Of one tile of the scores: its part of the bias's gradient, summed over the batches and heads that share it, and,
    where the bias is broadcast over queries or keys, over those of the tile: sums is [bias_batch, bias_heads, queries or
    their blocks, keys or their blocks].
    """
    steps = tl.cdiv(keys, N)
    query, key = tl.program_id(0) // steps * M, tl.program_id(0) % steps * N
    own_b, own_h = tl.program_id(1) // bias_heads, tl.program_id(1) % bias_heads
    d, e = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
    r, c = query + tl.arange(0, M), key + tl.arange(0, N)
    i, j = r[:, None], c[None, :]
    seed = tl.load(rng) if HAS_DROPOUT else 0
    offset = tl.load(rng + 1) if HAS_DROPOUT else 0
    tile = tl.zeros((M, N), tl.float32)
    for at_b in range(own_b, batch, bias_batch):
        b = tl.zeros((), tl.int64) + at_b
        q_at, nq = sequence_of(cu_q, b, queries, VARLEN)
        k_at, nk = sequence_of(cu_k, b, keys, VARLEN)
        rows, tokens = (q_at + i).to(tl.int64), (k_at + c[:, None]).to(tl.int64)
        there = c[:, None] < nk
        for at_h in range(own_h, heads, bias_heads):
            h = tl.zeros((), tl.int64) + at_h
            slope = tl.load(slopes + b * slopes_b + h) if HAS_ALIBI else 0.0
            q_tile = tl.load(q + b * q_b + h * q_h + rows * q_t + d, mask=(i < nq) & (d < dim), other=0.0)
            g_tile = tl.load(dout + b * o_b + h * o_h + rows * o_t + e, mask=(i < nq) & (e < value_dim), other=0.0)
            k_tile = tl.load(k + b * k_b + h // group * k_h + tokens * k_t + d, mask=there & (d < dim), other=0.0)
            v_tile = tl.load(v + b * v_b + h // group * v_h + tokens * v_t + e, mask=there & (e < value_dim), other=0.0)
            at = (h * total if VARLEN else (b * heads + h) * queries) + q_at + r
            most = tl.load(state + 2 * at, mask=r < nq, other=float("-inf"))
            inverse = tl.load(state + 2 * at + 1, mask=r < nq, other=0.0)
            row_delta = tl.load(delta + at, mask=r < nq, other=0.0)
            mask_at = mask + b * mask_b + h * mask_h if HAS_MASK else mask
            s, slope_of_cap, seen = scores_of(
                q_tile, k_tile, i, j, nq, nk, left, right, scale, softcap, slope, bias + b * bias_b + h * bias_h,
                mask_at, bias_q, bias_k, mask_q, mask_k, True, HAS_MASK, HAS_ALIBI, HAS_CAP,
            )  # fmt: skip
            dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
            factor = 1.0
            if HAS_DROPOUT:
                factor = dropout_factor(i, j, b * heads + h, seed, offset, threshold, kept)
            _, ds, _ = score_gradients(s, slope_of_cap, seen, dp, most, inverse, row_delta, factor)
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


class _Call(NamedTuple):
    """A checked call: tensors with a contiguous last dimension, sizes, and what all three kernels take."""

    tensors: list[torch.Tensor]  # q, k, v
    batch: int
    queries: int
    keys: int
    kwargs: dict[str, object]


def _strides(t, packed):
    b, *rest = (0, *t.stride()) if packed else t.stride()
    return b, rest[0], rest[1]


def _scores_strides(name, t, sizes):
    if t is None:
        return (0, 0, 0, 0)
    shape = (1,) * (4 - t.dim()) + tuple(t.shape)
    check(
        _OP, t.dim() <= 4 and all(a in (1, b) for a, b in zip(shape, sizes, strict=True)),
        lambda: f"{name}: expected a shape that broadcasts to {list(sizes)}, got {list(t.shape)}",
    )  # fmt: skip
    strides = (0,) * (4 - t.dim()) + t.stride()
    return tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))


def _call(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap, dropout_p):
    packed = cu_q is not None
    dims = 3 if packed else 4
    for name, t in (("q", q), ("k", k), ("v", v)):
        check(_OP, t.dim() == dims, lambda n=name, t=t: f"{n}: expected {dims} dimensions, got shape {list(t.shape)}")
        if t.dtype != q.dtype:
            raise TypeError(f"genai_kernels.{_OP}: {name}: expected the dtype of q, {q.dtype}, got {t.dtype}")
    heads, kv_heads, dim = q.shape[-2], k.shape[-2], q.shape[-1]
    check(_OP, k.shape[-1] == dim, lambda: f"k: expected head_dim {dim} as q, got {k.shape[-1]}")
    check(_OP, v.shape[:-1] == k.shape[:-1], lambda: f"v: expected the tokens and heads of k, got {list(v.shape)}")
    check(_OP, packed or k.shape[0] == q.shape[0], lambda: f"k: expected batch {q.shape[0]} as q, got {k.shape[0]}")
    check(
        _OP, heads % kv_heads == 0 if kv_heads else heads == 0,
        lambda: f"k: expected a number of heads that divides {heads}, the heads of q, got {kv_heads}",
    )  # fmt: skip
    if packed:
        batch = len(cu_q) - 1
        queries, keys = (int(c.diff().amax()) if batch else 0 for c in (cu_q, cu_k))
    else:
        batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    tensors = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (q, k, v)]
    sizes = (batch, heads, queries, keys)
    strides = [s for t in tensors for s in _strides(t, packed)]
    block = triton.next_power_of_2(max(dim, v.shape[-1], 16))
    tile = 64 if block <= 128 else 32 if block <= 256 else 16
    names = ("q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "v_b", "v_t", "v_h")
    score_names = ("b", "h", "q", "k")
    kwargs = dict(zip(names, strides, strict=True))
    for name, t in (("bias", bias), ("mask", mask)):
        found = _scores_strides(f"attn_{name}", t, sizes)
        kwargs |= {f"{name}_{n}": s for n, s in zip(score_names, found, strict=True)}
    kwargs |= {
        "cu_q": cu_q, "cu_k": cu_k, "slopes": slopes, "bias": bias,
        "mask": None if mask is None else mask.view(torch.uint8), "rng": None if rng is None else rng.to(q.device),
        "heads": heads, "group": heads // max(kv_heads, 1), "queries": queries, "keys": keys,
        "total": q.shape[0], "dim": dim, "value_dim": v.shape[-1],
        "slopes_b": 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0), "left": left, "right": right,
        "scale": dim**-0.5 if scale is None else scale, "softcap": softcap,
        "threshold": min(int(dropout_p * 2**32), 2**32 - 1), "kept": 1 / (1 - dropout_p), "M": tile, "N": tile,
        "D": triton.next_power_of_2(max(dim, 16)), "V": triton.next_power_of_2(max(v.shape[-1], 16)), "VARLEN": packed,
        "HAS_MASK": mask is not None, "HAS_ALIBI": slopes is not None, "HAS_CAP": softcap > 0,
        "HAS_DROPOUT": dropout_p > 0,
    }  # fmt: skip
    return _Call(tensors, batch, queries, keys, kwargs)


def _owned(t, cu):
    """Zeros for the tokens that no sequence owns."""
    if cu is not None:
        t[int(cu[-1]) :] = 0
    return t


@in_triton("flash_attention")
def flash_attention(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap, dropout_p):
    call = _call(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap, dropout_p)
    packed, heads = cu_q is not None, q.shape[-2]
    out = _owned(q.new_empty(*q.shape[:-1], v.shape[-1]), cu_q)
    shape = (heads, q.shape[0]) if packed else (call.batch, heads, call.queries)
    lse = q.new_full(shape, float("-inf"), dtype=torch.float32)
    state = q.new_empty(*shape, 2, dtype=torch.float32)
    if call.batch * heads * call.queries:
        fwd_kernel[(triton.cdiv(call.queries, call.kwargs["M"]), call.batch * heads)](
            *call.tensors, sink=sink, out=out, lse=lse, state=state, HAS_BIAS=bias is not None,
            HAS_SINK=sink is not None, **dict(zip(("o_b", "o_t", "o_h"), _strides(out, packed), strict=True)),
            **call.kwargs,
        )  # fmt: skip
    return out, lse, state


def _bias_gradient(call, bias, given):
    """In a pass of its own; partial sums over the tiles of a broadcast dimension are added in order, in float64."""
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    tile = call.kwargs["M"]
    full = (call.batch, call.kwargs["heads"], call.queries, call.keys)
    over = [n == 1 and size > 1 for n, size in zip(shape, full, strict=True)]
    blocks = [triton.cdiv(n, tile) for n in full[2:]]
    sums_q, sums_k = (blocks[0] if over[2] else full[2]), (blocks[1] if over[3] else full[3])
    bias_batch, bias_heads = (1 if over[0] else full[0]), (1 if over[1] else full[1])
    sums = bias.new_zeros(bias_batch, bias_heads, sums_q, sums_k, dtype=torch.float32)
    kwargs = {name: value for name, value in call.kwargs.items() if name != "HAS_BIAS"}
    if sums.numel():
        dbias_kernel[(blocks[0] * blocks[1], bias_batch * bias_heads)](
            *call.tensors, sums=sums, batch=call.batch, bias_batch=bias_batch, bias_heads=bias_heads, sums_q=sums_q,
            sums_k=sums_k, OVER_QUERIES=over[2], OVER_KEYS=over[3], **given, **kwargs,
        )  # fmt: skip
    total = sums.double()
    for dim in (2, 3):
        total = total.sum(dim, keepdim=True) if over[dim] else total
    return total.to(bias.dtype).reshape(bias.shape)


@in_triton("flash_attention_bwd")
def flash_attention_bwd(
    dout, dlse, q, k, v, out, lse, state, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap,
    dropout_p, bias_grad,
):  # fmt: skip
    call = _call(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap, dropout_p)
    check_like(_OP, "dout", dout, "out", out)
    packed, heads = cu_q is not None, q.shape[-2]
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = (dout.double() * out.double()).sum(-1).transpose(-1, -2)  # [..., heads, tokens]
    delta = delta.masked_fill(state[..., 0] == float("-inf"), 0)  # no key: out is 0 whatever dout
    delta = delta if dlse is None else delta - dlse
    delta = delta.masked_fill(lse == float("-inf"), 0).float().contiguous()
    dq, dk, dv = _owned(torch.empty_like(q.contiguous()), cu_q), *(torch.empty_like(t.contiguous()) for t in (k, v))
    dk, dv = _owned(dk, cu_k), _owned(dv, cu_k)
    given = {"dout": dout, "state": state, "delta": delta}
    given |= dict(zip(("o_b", "o_t", "o_h"), _strides(dout, packed), strict=True))
    kwargs = {**call.kwargs, **given, "HAS_BIAS": bias is not None, "dq": dq, "dk": dk, "dv": dv}
    for name, t in (("dq", dq), ("dk", dk), ("dv", dv)):
        kwargs |= {f"{name}_{n}": s for n, s in zip(("b", "t", "h"), _strides(t, packed), strict=True)}
    tile, kv_heads = call.kwargs["M"], k.shape[-2]
    if call.batch * kv_heads * call.keys:
        bwd_kernel[(triton.cdiv(call.keys, tile), call.batch * kv_heads)](*call.tensors, OF_KEYS=True, STEP=tile, **kwargs)
    if call.batch * heads * call.queries:
        bwd_kernel[(triton.cdiv(call.queries, tile), call.batch * heads)](*call.tensors, OF_KEYS=False, STEP=tile, **kwargs)
    dbias = _bias_gradient(call, bias, given) if bias_grad else q.new_empty(0)
    dsink = q.new_empty(0)
    if sink is not None:
        share = torch.exp(sink.double()[:, None] - lse.double()).masked_fill(lse == float("-inf"), 0)
        per_head = -(share * delta.double()).sum(-1)
        dsink = (per_head if packed else per_head.sum(0)).to(sink.dtype)
    return dq, dk, dv, dbias, dsink
