"""The quantised layers in Triton. int8_linear, int4_linear and nf4_linear: the product of `linear`, whose tiles of W
are unpacked in it. w8a8_linear: rows as steps of int8, then exact sums of integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check
from ...triton_lib.few_bits import matrix_of
from ...triton_lib.linear_layer import check_layer, rows_times

_OP = "quantized_linear"
_MOST_DEPTH = 1 << 17  # sums of more products of 7 bits by 7 could leave 32 bits


@in_triton("quantized_linear")
def quantized_linear(x, data, scale, zero, code_scale, inputs, group_size, bias):
    weight = matrix_of(_OP, data, scale, zero, code_scale, inputs, group_size)
    check_layer(_OP, x, weight, bias)
    return rows_times(x, weight, bias)


@in_triton("quantized_linear_dx")
def quantized_linear_dx(dy, data, scale, zero, code_scale, inputs, group_size):
    weight = matrix_of(_OP, data, scale, zero, code_scale, inputs, group_size)
    out, shape = weight.shape[0], list(dy.shape)
    check(_OP, dy.dim() == 2 and dy.shape[1] == out, lambda: f"dy: expected [rows, {out}], got shape {shape}")
    return rows_times(dy, weight.t())


@triton.jit
def quantize_rows_kernel(x, steps, scales, rows, n, x_m, x_k, R: tl.constexpr, BLOCK: tl.constexpr):
    """Rows as the nearest multiples, ties to even, of max|x| / 127; a row that is not finite gets the scale NaN."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    most = tl.zeros((R, BLOCK), tl.float32)
    strange = tl.zeros((R, BLOCK), tl.int32)
    for begin in range(0, n, BLOCK):
        j = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (row < rows)[:, None] & (j < n)[None, :]
        v = tl.load(x + row[:, None] * x_m + j[None, :] * x_k, mask=inside, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(v))
        strange |= ((v - v) != 0).to(tl.int32)
    largest = tl.max(most, 1)
    largest = tl.where(tl.max(strange, 1) > 0, float("nan"), largest)
    factor = tl.div_rn(tl.full((R,), 127.0, tl.float32), tl.maximum(largest, 7.888609052210118e-31))
    tl.store(scales + row, tl.div_rn(largest, tl.full((R,), 127.0, tl.float32)), mask=row < rows)
    for begin in range(0, n, BLOCK):
        j = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (row < rows)[:, None] & (j < n)[None, :]
        v = tl.load(x + row[:, None] * x_m + j[None, :] * x_k, mask=inside, other=0.0).to(tl.float32)
        # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
        q = (v * factor[:, None] + 12582912.0) - 12582912.0
        q = tl.where(q == q, q, 0.0).to(tl.int8)
        tl.store(steps + row[:, None] * n + j[None, :], q, mask=inside)


@triton.jit
def w8a8_kernel(
    steps, w, scales, w_scales, bias, y, rows, n, k, bias_n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    tiles_n = tl.cdiv(n, N)
    row = (tl.program_id(0) // tiles_n).to(tl.int64) * M + tl.arange(0, M)
    column = (tl.program_id(0) % tiles_n).to(tl.int64) * N + tl.arange(0, N)
    inside, there = row < rows, column < n
    total = tl.zeros((M, N), tl.int32)
    for begin in range(0, k, K):
        c = (begin + tl.arange(0, K)).to(tl.int64)
        a = tl.load(steps + row[:, None] * k + c[None, :], mask=inside[:, None] & (c < k)[None, :], other=0)
        b = tl.load(w + column[None, :] * k + c[:, None], mask=(c < k)[:, None] & there[None, :], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    result = total.to(tl.float32) * tl.load(scales + row, mask=inside, other=0.0)[:, None]
    result *= tl.load(w_scales + column, mask=there, other=0.0)[None, :]
    if bias is not None:
        result += tl.load(bias + column * bias_n, mask=there, other=0.0).to(tl.float32)[None, :]
    at = y + row[:, None] * n + column[None, :]
    tl.store(at, result.to(y.dtype.element_ty), mask=inside[:, None] & there[None, :])


@in_triton("w8a8_linear")
def w8a8_linear(x, data, scale, inputs, bias):
    op = "w8a8_linear"
    weight = matrix_of(op, data, scale, None, None, inputs, 0)
    check_layer(op, x, weight, bias)
    if inputs > _MOST_DEPTH:
        raise NotImplementedError(
            f"genai_kernels.{op}: weight: expected at most {_MOST_DEPTH} inputs, whose products fit 32 bits, "
            f"got {inputs}"
        )
    rows, n = len(x), len(data)
    y = x.new_empty(rows, n)
    if not y.numel():
        return y
    steps, scales = x.new_empty(rows, inputs, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    block = min(triton.next_power_of_2(max(inputs, 1)), 2048)
    r = min(4096 // block, 64)
    quantize_rows_kernel[(triton.cdiv(rows, r),)](
        x, steps, scales, rows, inputs, *x.stride(), R=r, BLOCK=block, num_warps=8, enable_fp_fusion=False
    )
    tile = {"M": 128, "N": 64, "K": 128, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
    w8a8_kernel[(triton.cdiv(rows, tile["M"]) * triton.cdiv(n, tile["N"]),)](
        steps, data, scales, scale, bias, y, rows, n, inputs, 0 if bias is None else bias.stride(0), **tile
    )
    return y
