"""What DoRA has beside lora_linear in Triton: the norms of the rows of W + scaling B A, and backward of a factor for
each column.

The CPU expands the square, since a product for each element would cost it more than reading W. Here that product is the
matrix units', beside a load that takes longer: a program builds its rows piece by piece, and nothing cancels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from ...triton_lib.few_bits import DENSE, few_bits_tile, matrix_of
from ...triton_lib.linear_layer import MOST_RANK, RANK_STEP, block_of_rank
from ...triton_lib.products import PLAIN, WIDE, adapter_product, add_product, zeros_of
from .triton import check_matrices

# Few rows for a program, the least that the matrix units take, so that a weight of 4096 rows fills a card.
_ROWS, _STEP = 16, 128
# A sum over rows is cut at these, then summed in double: many programs, and chains of 8 in float32.
_PART, _TILE_ROWS, _TILE_COLUMNS = 128, 16, 128


@triton.jit
def dora_norm_kernel(
    w, w_scale, w_zero, w_code_scale, levels, lora_a, lora_b, norm, n, k, groups, group_size, rank, scaling, w_n, w_k,
    a_r, a_k, b_n, b_r,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """norm = |rows of W + scaling B A|. WHOLE: R columns of B are all of them."""
    row, r = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, R)
    inside = row < n
    total = tl.zeros((M,), tl.float64)
    at_b = lora_b + row[:, None] * b_n
    if WHOLE:
        b_tile = tl.load(at_b + r[None, :] * b_r, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
    for begin in range(0, k, K):
        c = (begin + tl.arange(0, K)).to(tl.int64)
        in_w = inside[:, None] & (c < k)[None, :]
        if BITS == DENSE:
            w_tile = tl.load(w + row[:, None] * w_n + c[None, :] * w_k, mask=in_w, other=0.0)
        else:
            w_tile = few_bits_tile(
                w, w_scale, w_zero, w_code_scale, levels, row[:, None], c[None, :], in_w, w_n, groups, group_size,
                BITS, False,
            )  # fmt: skip
        built = zeros_of(M, K, KIND)
        if WHOLE:
            at_a = lora_a + r.to(tl.int64)[:, None] * a_r + c[None, :] * a_k
            a_tile = tl.load(at_a, mask=(r < rank)[:, None] & (c < k)[None, :], other=0.0)
            built = add_product(built, b_tile, a_tile, KIND)
        else:
            built += adapter_product(lora_b, row * b_n, inside, lora_a, a_k, a_r, rank, c, c < k, M, K, R, KIND)
        built = built * scaling + w_tile.to(built.dtype)
        total += tl.sum(built * built, 1).to(tl.float64)
    tl.store(norm + row, tl.sqrt(total).to(tl.float32), mask=inside)


@in_triton("dora_norm")
def dora_norm(weight, lora_a, lora_b, scaling, weight_scale, weight_zero, weight_code_scale, group_size):
    op = "dora_norm"
    check(op, lora_a.dim() == 2, lambda: f"lora_a: expected [rank, in], got shape {list(lora_a.shape)}")
    matrix = matrix_of(op, weight, weight_scale, weight_zero, weight_code_scale, lora_a.shape[1], group_size)
    n, k = matrix.shape
    check_matrices(op, lora_a, lora_b, scaling, "", k, n)
    rank, lora_b = len(lora_a), lora_b.contiguous()
    whole = rank <= MOST_RANK
    block = block_of_rank(rank) if whole else RANK_STEP  # more, as float64, want more registers than there are
    norm = lora_a.new_empty(n, dtype=torch.float32)
    if n:
        dora_norm_kernel[(triton.cdiv(n, _ROWS),)](
            lora_a=lora_a, lora_b=lora_b, norm=norm, n=n, k=k, rank=rank, scaling=scaling, a_r=lora_a.stride(0),
            a_k=lora_a.stride(1), b_n=lora_b.stride(0), b_r=lora_b.stride(1), M=_ROWS, K=_STEP, R=block,
            KIND=WIDE if lora_a.dtype == torch.float32 else PLAIN, WHOLE=whole, num_warps=4, num_stages=3,
            **matrix.arguments(),
        )  # fmt: skip
    return norm


@triton.jit
def scale_columns_bwd_kernel(
    dy, column_scale, inner, d_inner, d_scale, rows, n, dy_m, dy_n, EACH: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """d_inner = dy column_scale; d_scale: the sum of dy inner over EACH rows."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    there, first = column < n, tl.program_id(1).to(tl.int64) * EACH
    scale = tl.load(column_scale + column, mask=there, other=0.0)
    dy, inner, d_inner = dy + first * dy_m, inner + first * n, d_inner + first * n
    total = tl.zeros((M, N), tl.float32)
    for begin in range(0, EACH, M):
        row = begin + tl.arange(0, M)
        inside = (first + row < rows)[:, None] & there[None, :]
        at = row[:, None] * n + column[None, :]
        g = tl.load(dy + row[:, None] * dy_m + column[None, :] * dy_n, mask=inside, other=0.0).to(tl.float32)
        total += g * tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_inner + at, (g * scale[None, :]).to(d_inner.dtype.element_ty), mask=inside)
    at_scale = d_scale + tl.program_id(1).to(tl.int64) * n + column
    tl.store(at_scale, tl.sum(total.to(tl.float64), 0), mask=there)


@in_triton("scale_columns_bwd")
def scale_columns_bwd(dy, column_scale, inner):
    op, (rows, n) = "dora_linear", inner.shape
    check(op, dy.shape == inner.shape, lambda: f"dy: expected [{rows}, {n}] as forward kept, got {list(dy.shape)}")
    check_like(op, "column_scale", column_scale, "what forward had", inner.new_empty(n, dtype=torch.float32))
    d_inner = dy.new_empty(rows, n)
    sums = dy.new_zeros(max(triton.cdiv(rows, _PART), 1), n, dtype=torch.float64)
    if d_inner.numel():
        scale_columns_bwd_kernel[(triton.cdiv(n, _TILE_COLUMNS), len(sums))](
            dy, column_scale.contiguous(), inner, d_inner, sums, rows, n, *dy.stride(), EACH=_PART, M=_TILE_ROWS,
            N=_TILE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return d_inner, sums.sum(0).float()
