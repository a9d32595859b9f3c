"""The kernels of paged_attention in Triton.

A tile's rows are (query, query head) of one sequence and key head, the heads of the group side by side, so that a key
is loaded once for all of them. The keys of a sequence are cut into ranges at fixed positions, each with a softmax of
its own, and the ranges of a row are folded in their order: by the one program that goes over them all, where a sequence
has many new tokens, and by fold_kernel where each range was a program of its own. The tile is the same in both, so
neither shows in the bits; nor do pages, tables and the rest of the batch.
"""

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

RANGE = tl.constexpr(512)  # keys, as on the CPU; a multiple of every tile's
# What differs from call to call; a compilation for each of its divisors would serve nothing.
SIZES = ("batch", "queries", "tokens", "width", "ranges", "few", "tiles", "table_b", "slopes_b", "left", "right")


@triton.jit
def place_of(starts, b, times, per):
    """Where the pieces of sequence b begin, if each has whole ones of `per`: room for all, though lengths are known to
    the device alone.
    """
    return (tl.load(starts + b).to(tl.int64) * times // per).to(tl.int32) + b


@triton.jit
def owner_of(piece, starts, times, per, batch):
    """The sequence that a piece is of, and its number in it."""
    low = piece * 0
    high = low + batch
    while high - low > 1:
        middle = (low + high) // 2
        below = place_of(starts, middle, times, per) <= piece
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low, piece - place_of(starts, low, times, per)


@triton.jit
def queries_of(cu_q, b, queries, VARLEN: tl.constexpr):
    """The first query of a sequence, and how many it has."""
    if VARLEN:
        begin = tl.load(cu_q + b)
        return begin, tl.load(cu_q + b + 1) - begin
    return b * queries, queries


@triton.jit
def keys_of(lengths, last, b, width, BLOCK: tl.constexpr, LISTS: tl.constexpr):
    """The keys of a sequence; never more than its table has room for."""
    if LISTS:
        count = tl.load(lengths + b + 1) - tl.load(lengths + b)
        return tl.where(count > 0, (count - 1) * BLOCK + tl.load(last + b), 0)
    return tl.minimum(tl.load(lengths + b), width * BLOCK)


@triton.jit
def span_of(i, past, keys, queries, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Of the queries from i to before `past`: the first key that one sees, the end of those, and the ranges they lie
    in.
    """
    shift = keys - queries
    first, end = keys * 0, keys
    if HAS_LEFT:
        first = tl.maximum(i + shift - left, 0)
    if HAS_RIGHT:
        end = tl.minimum(keys, tl.maximum(past + shift + right, 0))
    lowest = first // RANGE
    return first, end, lowest, tl.maximum(tl.maximum(end - 1, 0) // RANGE, lowest)


@triton.jit
def to_ten_bits(x):
    """float32 rounded to the mantissa of tf32 and float16, to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + (4095 + ((bits >> 13) & 1))) & -8192).to(tl.float32, bitcast=True)
    return tl.where((x - x) == 0, rounded, x)


@triton.jit
def folded(most, total, o, next_most, next_total, next_o, FINE: tl.constexpr):
    """The softmax over two sets of keys, the earlier first. A set that a row sees nothing of changes no bit, whatever
    stands in its o.
    """
    higher = tl.maximum(most, next_most)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    before, now = exponential(most - base, FINE).to(total.dtype), exponential(next_most - base, FINE).to(total.dtype)
    none, first = next_total == 0, total == 0
    both = tl.fma(total, before, next_total * now)
    both_o = tl.fma(o, tl.zeros_like(o) + before[:, None], next_o * now[:, None])
    o = tl.where(none[:, None], o, tl.where(first[:, None], next_o, both_o))
    return tl.where(none, most, higher), tl.where(none, total, tl.where(first, next_total, both)), o


@triton.jit
def store_rows(
    out, lse, sink, most, total, o, token, h, there, tokens, heads, value_dim, HAS_SINK: tl.constexpr,
    FINE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The results of rows, of query `token` and head h each."""
    beside = tl.full(most.shape, 1.0, tl.float32)
    top = most
    if HAS_SINK:
        logit = tl.load(sink + h, mask=there, other=0.0).to(tl.float32)
        if not FINE:
            logit = logit * LOG2E
        top = tl.maximum(most, logit)
        base = tl.where(top == float("-inf"), 0.0, top)
        beside = exponential(most - base, FINE)
        total = total * beside + exponential(logit - base, FINE)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    inverse = tl.where(empty, 0.0, beside / total)
    # of a row that sees nothing, o may hold 0 times the NaN of others' values
    o = tl.where((most == float("-inf"))[:, None] & (inverse == inverse)[:, None], 0.0, o * inverse[:, None])
    if not FINE:
        top = top * LN2
    row_lse = tl.where(empty, float("-inf"), top + tl.log(total)).to(tl.float32)
    e = tl.arange(0, V)[None, :]
    at = (token.to(tl.int64) * heads + h)[:, None] * value_dim + e
    tl.store(out + at, o.to(out.dtype.element_ty), mask=there[:, None] & (e < value_dim))
    tl.store(lse + h.to(tl.int64) * tokens + token, row_lse, mask=there)


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    q, k, v, table, lengths, last, cu_q, k_scale, v_scale, slopes, tree, sink, strange, part_o, part_s, out, lse,
    batch, queries, tokens, width, ranges, few, tiles, table_b, slopes_b, left, right, heads, group, dim, value_dim,
    scale, softcap, q_t, q_h, k_p, k_t, k_h, v_p, v_t, v_h, ks_p, ks_t, ks_h, vs_p, vs_t, vs_h, tree_q, tree_k,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, LISTS: tl.constexpr,
    VARLEN: tl.constexpr, INT8: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TREE: tl.constexpr, HAS_SINK: tl.constexpr,
    FINE: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, HIDES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """SPLIT: sequences of at most `few` new tokens, a program for each range, into part_o and part_s. Otherwise the
    others, and all that a tile's rows see.
    """
    pid = tl.program_id(0)
    if HIDES:
        strange += pid
    if CAREFUL:
        clean = tl.load(strange) == 0
        if clean:
            return
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    kv_heads = heads // group
    kv_head, piece = pid % kv_heads, pid // kv_heads
    only = 0
    if SPLIT:
        slot, tile = piece // tiles, piece % tiles
        if LISTS:
            b, only = owner_of(slot, lengths, BLOCK, RANGE, batch)
        else:
            b, only = slot // ranges, slot % ranges
    elif VARLEN:
        b, tile = owner_of(piece, cu_q, group, M, batch)
    else:
        b, tile = piece // tiles, piece % tiles
    q_begin, nq = queries_of(cu_q, b, queries, VARLEN)
    nk = keys_of(lengths, last, b, width, BLOCK, LISTS)
    begin = tile * M
    past = tl.minimum((begin + M - 1) // group + 1, nq)
    first, end, lowest, highest = span_of(begin // group, past, nk, nq, left, right, HAS_LEFT, HAS_RIGHT)
    idle = begin >= nq * group
    if SPLIT:
        idle = idle | (nq > few) | (only < lowest) | (only > highest)
        lowest, highest = only, only
    else:
        idle = idle | (nq <= few)
    if idle:
        if HIDES:
            tl.store(strange, 0)
        return

    r = begin + tl.arange(0, M)
    i, h = r // group, kv_head * group + r % group
    there = i < nq
    token = q_begin + i
    d, e, n = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :], tl.arange(0, N)
    q_at = token.to(tl.int64) * q_t + h.to(tl.int64) * q_h
    q_tile = tl.load(q + q_at[:, None] + d, mask=there[:, None] & (d < dim), other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + b * slopes_b + h, mask=there, other=0.0)[:, None]
    pages = table + (tl.load(lengths + b) if LISTS else b.to(tl.int64) * table_b)
    tree_at = tree + q_begin.to(tl.int64) * tree_q if HAS_TREE else tree
    head = kv_head.to(tl.int64)
    top = tl.full((M,), float("-inf"), tl.float32)
    sum_all, o_all = tl.zeros((M,), wide), tl.zeros((M, V), wide)
    for part in range(lowest, highest + 1):
        most = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), wide)
        o = tl.zeros((M, V), wide)
        for key in range(tl.maximum(first, part * RANGE) // N * N, tl.minimum(end, (part + 1) * RANGE), N):
            j = key + n
            known = (j >= first) & (j < end)
            page = tl.load(pages + j // BLOCK, mask=known, other=0).to(tl.int64)
            at = (j % BLOCK).to(tl.int64)
            k_at = page * k_p + at * k_t + head * k_h
            k_tile = tl.load(k + k_at[:, None] + d, mask=known[:, None] & (d < dim), other=0)
            if INT8:
                k_tile = k_tile.to(tl.float32).to(q_tile.dtype)
            s = product(q_tile, tl.trans(k_tile), WIDE)
            if INT8:
                s = s * tl.load(k_scale + page * ks_p + at * ks_t + head * ks_h, mask=known, other=0.0)[None, :]
            s, _, seen = scores_of(
                s, i[:, None], j[None, :], nq, nk, left, right, scale, softcap, slope, None, None, 0, 0, 0, 0,
                HAS_LEFT, HAS_RIGHT, False, False, HAS_ALIBI, HAS_CAP, FINE,
            )  # fmt: skip
            if HAS_TREE:
                new = j[None, :] - (nk - nq)
                marked = tl.load(tree_at + i[:, None] * tree_q + new * tree_k, mask=seen & (new >= 0), other=1)
                seen = seen & (marked != 0)
                s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(most, tl.max(s, 1).to(tl.float32))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = exponential(s - base[:, None], FINE)
            alpha = exponential(most - base, FINE)
            total = total * alpha + tl.sum(p.to(wide), 1)
            o = o * alpha[:, None]
            v_at = page * v_p + at * v_t + head * v_h
            v_tile = tl.load(v + v_at[:, None] + e, mask=known[:, None] & (e < value_dim), other=0)
            if INT8:
                by = tl.load(v_scale + page * vs_p + at * vs_t + head * vs_h, mask=known, other=0.0)[None, :]
                p = tl.where(seen, p * by, 0.0)
                if q_tile.dtype == tl.float16:  # which has no room for small probabilities times small scales
                    o = tl.dot(to_ten_bits(p), v_tile.to(tl.float32), o, input_precision="tf32")
                else:
                    o = add_product(o, p, v_tile.to(tl.float32).to(q_tile.dtype), WIDE)
            elif CAREFUL:
                o = add_product_of_seen(o, p, v_tile, seen, WIDE)
            else:
                o = add_product(o, p, v_tile, WIDE)
            most = higher
        if SPLIT:
            top, sum_all, o_all = most, total, o
        else:
            top, sum_all, o_all = folded(top, sum_all, o_all, most, total, o, FINE)
    if HIDES and not CAREFUL:
        tl.store(strange, any_strange(o_all))
    if SPLIT:
        row = (slot.to(tl.int64) * few + i) * heads + h
        tl.store(part_o + row[:, None] * value_dim + e, o_all, mask=there[:, None] & (e < value_dim))
        tl.store(part_s + 2 * row, top.to(wide), mask=there)
        tl.store(part_s + 2 * row + 1, sum_all, mask=there)
    else:
        store_rows(out, lse, sink, top, sum_all, o_all, token, h, there, tokens, heads, value_dim, HAS_SINK, FINE, V)


@triton.jit(do_not_specialize=SIZES)
def fold_kernel(
    lengths, last, cu_q, sink, part_o, part_s, out, lse, queries, tokens, width, ranges, few, left, right, heads,
    value_dim, R: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, LISTS: tl.constexpr, VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SINK: tl.constexpr, FINE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The ranges of R heads of one query, in their order."""
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    b, i = tl.program_id(0) // few, tl.program_id(0) % few
    q_begin, nq = queries_of(cu_q, b, queries, VARLEN)
    if (i >= nq) | (nq > few):
        return
    nk = keys_of(lengths, last, b, width, BLOCK, LISTS)
    _, _, lowest, highest = span_of(i, i + 1, nk, nq, left, right, HAS_LEFT, HAS_RIGHT)
    slot = place_of(lengths, b, BLOCK, RANGE) if LISTS else b * ranges
    h = tl.program_id(1) * R + tl.arange(0, R)
    there, e = h < heads, tl.arange(0, V)[None, :]
    top = tl.full((R,), float("-inf"), tl.float32)
    total, o = tl.zeros((R,), wide), tl.zeros((R, V), wide)
    # a chain of dependent sums whose numbers are not: several are on their way at once
    for part in tl.range(lowest, highest + 1, num_stages=4):
        row = ((slot + part).to(tl.int64) * few + i) * heads + h
        next_o = tl.load(part_o + row[:, None] * value_dim + e, mask=there[:, None] & (e < value_dim), other=0.0)
        next_top = tl.load(part_s + 2 * row, mask=there, other=0.0).to(tl.float32)
        next_total = tl.load(part_s + 2 * row + 1, mask=there, other=0.0)
        top, total, o = folded(top, total, o, next_top, next_total, next_o, FINE)
    token = q_begin + i + tl.zeros_like(h)
    store_rows(out, lse, sink, top, total, o, token, h, there, tokens, heads, value_dim, HAS_SINK, FINE, V)
