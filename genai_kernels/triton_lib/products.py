"""The products of linear layers in Triton, and what stands inside of them: kinds of products, dropout, adapters.

A program has a tile of the result and takes the contraction in steps at fixed positions; the tile follows from the
weight alone. So the bits of a row do not depend on the other rows, and nothing is added by two programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import NONE, value_and_slope
from .few_bits import DENSE, few_bits_tile

# Kinds of products. PLAIN: factors of one type of 16 bits, summed in float32. SPLIT: float32 in three products of its
# halves in tf32, more than a result of 16 bits shows. EXACT: float32, for results of float32 from factors of which one
# has 16 bits. WIDE: float64, for factors of float32: the matrix units of data-center GPUs multiply it at the rate of
# float32, but Triton 3.7 cannot multiply as float64 what it has loaded as 16 bits.
PLAIN, SPLIT, EXACT, WIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

DROPOUT_STREAM = tl.constexpr(0x6C6F7261)  # csrc/cpu/matmul.h


@triton.jit
def zeros_of(ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float64 if KIND == WIDE else tl.float32)


@triton.jit
def add_product(total, a, b, KIND: tl.constexpr):
    if KIND == WIDE:
        total = tl.dot(a.to(tl.float64), b.to(tl.float64), total, out_dtype=tl.float64)
    elif KIND == SPLIT:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="tf32x3")
    elif KIND == EXACT:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def is_kept(row, begin, rng, threshold, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    """Which elements of these rows dropout keeps, in COLUMNS columns from `begin` on, a multiple of COLUMNS: their word
    is at least the threshold, as csrc/cpu/matmul.h says, word column % 64 / 16 of Philox(counter = (row, column /
    64 * 16 + column % 16, row >> 32, stream), key = seed).
    """
    # four columns take one call; but Triton 3.7 believes a factor that depends on a join to be packed to half its
    # width, and cannot multiply float64 as if it were
    each: tl.constexpr = 1 if KIND == WIDE or COLUMNS < 64 else 4
    i = tl.arange(0, COLUMNS // each)
    if each == 1:
        of_column = (begin + i) // 64 * 16 + i % 16
    else:
        of_column = begin // 4 + i
    zero = tl.zeros_like(row[:, None] + i[None, :])
    none = zero.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(rng), (zero + row[:, None]).to(tl.uint32), (zero + of_column[None, :]).to(tl.uint32),
        ((zero + row[:, None]) >> 32).to(tl.uint32), none + DROPOUT_STREAM,
    )  # fmt: skip
    if each == 1:
        which = zero + ((begin + i) % 64 // 16)[None, :]
        words = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        words = tl.reshape(words, (row.shape[0], COLUMNS // 64, 16, 4))
        words = tl.reshape(tl.permute(words, (0, 1, 3, 2)), (row.shape[0], COLUMNS))
    return words >= threshold


@triton.jit
def adapter_product(
    s, at, has, matrix, columns_stride, rank_stride, rank, column, there,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """S times an adapter's second matrix, for a tile: row i of S begins at `at[i]`."""
    total = zeros_of(M, N, KIND)
    for first in range(0, rank, R):
        r = first + tl.arange(0, R)
        s_tile = tl.load(s + at[:, None] + r[None, :], mask=has[:, None] & (r < rank)[None, :], other=0.0)
        at_b = matrix + column.to(tl.int64)[None, :] * columns_stride + r.to(tl.int64)[:, None] * rank_stride
        b_tile = tl.load(at_b, mask=(r < rank)[:, None] & there[None, :], other=0.0)
        total = add_product(total, s_tile, b_tile, KIND)
    return total


# Of each of many adapters, int64: the address of its matrix, its rank, where its part of S begins, the columns [begin,
# end) that its matrix has beside the rank, where its tokens begin and how many they are, the bits of its scaling.
FIELDS = tl.constexpr(8)


@triton.jit
def add_adapters(
    total, s, like, table, tiles, entries, positions, tile, column, first_column, row, rng, threshold, kept,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, RANK_INSIDE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """What the adapters of a tile of rows add, one after the other; a row that has not one keeps its bits. Entry e is
    an adapter, and where each row of the tile lies in its part of S, -1 for none.
    """
    for e in range(tl.load(tiles + tile), tl.load(tiles + tile + 1)):
        fields = table + tl.load(entries + e) * FIELDS
        matrix = tl.load(fields).to(tl.pointer_type(like.dtype.element_ty))
        rank, begin, end = tl.load(fields + 1).to(tl.int32), tl.load(fields + 3), tl.load(fields + 4)
        position = tl.load(positions + e * M + tl.arange(0, M))
        has, mine = position >= 0, (column >= begin) & (column < end)
        at = tl.load(fields + 2) + position * ((rank + 15) // 16 * 16)
        if RANK_INSIDE:
            added = adapter_product(s, at, has, matrix, rank, 1, rank, column - begin, mine, M, N, R, KIND)
        else:
            added = adapter_product(s, at, has, matrix, 1, end - begin, rank, column - begin, mine, M, N, R, KIND)
        if HAS_DROPOUT:
            added = tl.where(is_kept(row, first_column, rng, threshold, N, KIND), added * kept, 0.0)
        total = tl.where(has[:, None] & mine[None, :], total + added.to(total.dtype), total)
    return total


@triton.jit
def linear_kernel(
    x, w, w_scale, w_zero, w_code_scale, levels, bias, column_scale, lora_a, lora_b, s, rng, inner, y,
    table, tiles, entries, positions,
    rows, n, k, groups, group_size, rank, s_row, scaling, threshold, kept,
    x_m, x_k, w_n, w_k, bias_n, a_r, a_k, b_n, b_r,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, ADAPTER: tl.constexpr,
    BITS: tl.constexpr, TRANSPOSED: tl.constexpr, SHRINKS: tl.constexpr, HAS_ADAPTER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, RANK_INSIDE: tl.constexpr, GATE: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """y = column_scale (x W' + S B') + bias; `inner` is what column_scale multiplies. SHRINKS: S = scaling x A' is
    summed beside x W', from the same x, and written once; otherwise it is read. HAS_DROPOUT drops elements of S B'.
    With a table there are adapters by row. GATE: the n columns are two halves, GATE(one) * other is y, and `inner` is
    what goes into the gate, the gate's half first; GATE_LAST: in W it is the second.
    """
    # programs of 8 tiles of rows stand together, so that what they read of W is in the cache
    tiles_m, tiles_n = tl.cdiv(rows, M), tl.cdiv(n, N)
    group = tl.program_id(0) // (8 * tiles_n) * 8
    in_group = tl.program_id(0) % (8 * tiles_n)
    height = tl.minimum(tiles_m - group, 8)
    tile = group + in_group % height
    row = tile.to(tl.int64) * M + tl.arange(0, M)
    first_column = in_group // height * N
    column = first_column + tl.arange(0, N)
    inside, there, r = row < rows, column < n, tl.arange(0, R)
    inner_column = column
    if GATE != NONE:  # one of the gate, one of what it multiplies: side by side in a thread's registers
        inner_column = column % 2 * (n // 2) + column // 2
        column = (column % 2 ^ GATE_LAST) * (n // 2) + column // 2
    total, sums = zeros_of(M, N, KIND), zeros_of(M, R, KIND)
    for begin in range(0, k, K):
        c = (begin + tl.arange(0, K)).to(tl.int64)
        at_x = x + row[:, None] * x_m + c[None, :] * x_k
        x_tile = tl.load(at_x, mask=inside[:, None] & (c < k)[None, :], other=0.0)
        o, in_w = column.to(tl.int64)[None, :], (c < k)[:, None] & there[None, :]
        if BITS == DENSE:
            w_tile = tl.load(w + o * w_n + c[:, None] * w_k, mask=in_w, other=0.0)
        elif TRANSPOSED:
            w_tile = few_bits_tile(
                w,
                w_scale,
                w_zero,
                w_code_scale,
                levels,
                c[:, None],
                o,
                in_w,
                w_n,
                groups,
                group_size,
                BITS,
                KIND == WIDE,
            ).to(x_tile.dtype)
        else:
            w_tile = few_bits_tile(
                w,
                w_scale,
                w_zero,
                w_code_scale,
                levels,
                o,
                c[:, None],
                in_w,
                w_n,
                groups,
                group_size,
                BITS,
                KIND == WIDE,
            ).to(x_tile.dtype)
        total = add_product(total, x_tile, w_tile, KIND)
        if SHRINKS:
            at_a = lora_a + r.to(tl.int64)[None, :] * a_r + c[:, None] * a_k
            a_tile = tl.load(at_a, mask=(c < k)[:, None] & (r < rank)[None, :], other=0.0)
            sums = add_product(sums, x_tile, a_tile, KIND)
    if SHRINKS:
        s_tile = (sums * scaling).to(tl.float32)
        if first_column == 0:
            tl.store(s + row[:, None] * s_row + r[None, :], s_tile, mask=inside[:, None] & (r < s_row)[None, :])
        at_b = lora_b + column.to(tl.int64)[None, :] * b_n + r.to(tl.int64)[:, None] * b_r
        b_tile = tl.load(at_b, mask=(r < rank)[:, None] & there[None, :], other=0.0)
        total += add_product(zeros_of(M, N, ADAPTER), s_tile, b_tile, ADAPTER).to(total.dtype)
    elif table is not None:
        total = add_adapters(
            total, s, lora_b, table, tiles, entries, positions, tile, column, first_column, row, rng, threshold, kept,
            M, N, R, ADAPTER, RANK_INSIDE, HAS_DROPOUT,
        )  # fmt: skip
    elif HAS_ADAPTER:
        added = adapter_product(s, row * s_row, inside, lora_b, b_n, b_r, rank, column, there, M, N, R, ADAPTER)
        if HAS_DROPOUT:
            added = tl.where(is_kept(row, first_column, rng, threshold, N, ADAPTER), added * kept, 0.0)
        total += added.to(total.dtype)
    at_y = row[:, None] * n + inner_column[None, :]
    in_y = inside[:, None] & there[None, :]
    if column_scale is not None:
        if inner is not None:
            tl.store(inner + at_y, total.to(inner.dtype.element_ty), mask=in_y)
        total *= tl.load(column_scale + column, mask=there, other=0.0).to(total.dtype)[None, :]
    if bias is not None:
        total += tl.load(bias + column * bias_n, mask=there, other=0.0).to(total.dtype)[None, :]
    if GATE == NONE:
        tl.store(y + at_y, total.to(y.dtype.element_ty), mask=in_y)
    else:
        if inner is not None:
            tl.store(inner + at_y, total.to(inner.dtype.element_ty), mask=in_y)
        gate, factor = tl.split(tl.reshape(total.to(tl.float32), (M, N // 2, 2)))
        value, _ = value_and_slope(gate, GATE)
        j = first_column // 2 + tl.arange(0, N // 2)
        at_y = row[:, None] * (n // 2) + j[None, :]
        tl.store(y + at_y, (value * factor).to(y.dtype.element_ty), mask=inside[:, None] & (j < n // 2)[None, :])


@triton.jit
def shrink_kernel(
    x, a, s, rng, table, blocks, tokens, rows, rank, k, s_row, scaling, threshold, x_m, x_k, a_r, a_k,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, RANK_INSIDE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """S = scaling drop(x) A', the factor of dropout in `scaling`; zeros behind the rank. With a table, of one adapter's
    tokens from blocks[1] on, for adapter blocks[0].
    """
    position = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    row = position
    if table is not None:
        fields = table + tl.load(blocks + 2 * tl.program_id(0)) * FIELDS
        position = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, M)
        a = tl.load(fields).to(tl.pointer_type(a.dtype.element_ty))
        rank, begin, end = tl.load(fields + 1).to(tl.int32), tl.load(fields + 3), tl.load(fields + 4)
        s_row, k, x, s = (rank + 15) // 16 * 16, (end - begin).to(tl.int32), x + begin * x_k, s + tl.load(fields + 2)
        rows = tl.load(fields + 6).to(tl.int32)
        row = tl.load(tokens + tl.load(fields + 5) + position, mask=position < rows, other=0)
        scaling = tl.load(fields + 7).to(tl.float64, bitcast=True).to(tl.float32)
    r = tl.program_id(1) * R + tl.arange(0, R)
    inside = position < rows
    sums = zeros_of(M, R, KIND)
    for begin in range(0, k, K):
        c = (begin + tl.arange(0, K)).to(tl.int64)
        at_x = x + row[:, None] * x_m + c[None, :] * x_k
        x_tile = tl.load(at_x, mask=inside[:, None] & (c < k)[None, :], other=0.0)
        if HAS_DROPOUT:
            x_tile = tl.where(is_kept(row, begin, rng, threshold, K, KIND), x_tile, 0.0)
        if table is None:
            at_a = a + r.to(tl.int64)[None, :] * a_r + c[:, None] * a_k
        elif RANK_INSIDE:
            at_a = a + r.to(tl.int64)[None, :] + c[:, None] * rank
        else:
            at_a = a + r.to(tl.int64)[None, :] * k + c[:, None]
        a_tile = tl.load(at_a, mask=(c < k)[:, None] & (r < rank)[None, :], other=0.0)
        sums = add_product(sums, x_tile, a_tile, KIND)
    at_s = s + position[:, None] * s_row + r[None, :]
    tl.store(at_s, (sums * scaling).to(tl.float32), mask=inside[:, None] & (r < s_row)[None, :])


@triton.jit
def rows_product_kernel(
    a, b, tokens, rng, c, rows, n, m, threshold, kept, each, a_t, a_i, b_t, b_j,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """A' drop(B), [m, n]: summed over the rows of both, `each` for a part; `tokens` names those of B."""
    tiles_n = tl.cdiv(n, N)
    i = tl.program_id(0) // tiles_n * M + tl.arange(0, M)
    first_column = tl.program_id(0) % tiles_n * N
    j = first_column + tl.arange(0, N)
    first = tl.program_id(1) * each
    total = zeros_of(M, N, KIND)
    for begin in range(first, tl.minimum(first + each, rows), K):
        t = (begin + tl.arange(0, K)).to(tl.int64)
        at_a = a + t[None, :] * a_t + i.to(tl.int64)[:, None] * a_i
        a_tile = tl.load(at_a, mask=(t < rows)[None, :] & (i < m)[:, None], other=0.0)
        of_b = t
        if tokens is not None:
            of_b = tl.load(tokens + t, mask=t < rows, other=0)
        at_b = b + of_b[:, None] * b_t + j.to(tl.int64)[None, :] * b_j
        b_tile = tl.load(at_b, mask=(t < rows)[:, None] & (j < n)[None, :], other=0.0)
        if HAS_DROPOUT:
            b_tile = tl.where(is_kept(of_b, first_column, rng, threshold, N, KIND), b_tile, 0.0)
        total = add_product(total, a_tile, b_tile, KIND)
    at_c = c + (tl.program_id(1).to(tl.int64) * m + i[:, None]) * n + j[None, :]
    in_c = (i < m)[:, None] & (j < n)[None, :]
    total *= kept
    if ACCUMULATE:
        total += tl.load(at_c, mask=in_c, other=0.0).to(total.dtype)
    tl.store(at_c, total.to(c.dtype.element_ty), mask=in_c)
