"""lora_linear in Triton: the kernels of triton_lib, in which `linear` has the same sums.

S is summed beside x W', from the same tiles of x, where the dtypes and the rank allow it; otherwise a launch of its own
comes before. Backward: dS = scaling dy B, dx = dy W + drop(dS A) in one product, dA = dS' drop(x), dB = dy' S.
"""

from __future__ import annotations

import math

import torch

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from ...triton_lib.few_bits import matrix_of
from ...triton_lib.linear_layer import (
    Adapter,
    can_shrink_beside,
    check_layer,
    dropout_of,
    padded,
    product_over_rows,
    rows_times,
    shrink,
)

_OP = "lora_linear"


def _checked(op, x, matrix, bias, lora_a, lora_b, scaling, dropout_p):
    check_layer(op, x, matrix, bias)
    check(op, 0 <= dropout_p < 1, lambda: f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    check_adapter(op, x, lora_a, lora_b, scaling, "", matrix.shape[0])


def check_adapter(op, x, lora_a, lora_b, scaling, at, n):
    """Of n columns. `at`: what follows the names in messages."""
    for name, t in ((f"lora_a{at}", lora_a), (f"lora_b{at}", lora_b)):
        if t.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"genai_kernels.{op}: {name}: expected the dtype of x, {x.dtype}, or float32, got {t.dtype}"
            )
    check_matrices(op, lora_a, lora_b, scaling, at, x.shape[1], n)


def check_matrices(op, lora_a, lora_b, scaling, at, k, n):
    """Of an adapter of a weight [n, k]."""
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(
            f"genai_kernels.{op}: lora_b{at}: expected the dtype of lora_a, {lora_a.dtype}, got {lora_b.dtype}"
        )
    shapes = list(lora_a.shape), list(lora_b.shape)
    check(
        op, lora_a.dim() == 2 and lora_a.shape[1] == k,
        lambda: f"lora_a{at}: expected [rank, {k}], got shape {shapes[0]}",
    )  # fmt: skip
    check(
        op, lora_b.shape == (n, len(lora_a)),
        lambda: f"lora_b{at}: expected [{n}, {len(lora_a)}], out and the rank of lora_a, got shape {shapes[1]}",
    )  # fmt: skip
    check(op, math.isfinite(scaling), lambda: f"scaling{at}: expected a finite number, got {scaling}")


@in_triton("lora_linear")
def lora_linear(
    x, weight, lora_a, lora_b, bias, rng_state, scaling, dropout_p, column_scale, keep_inner, weight_scale, weight_zero,
    weight_code_scale, group_size,
):  # fmt: skip
    op = _OP if column_scale is None else "dora_linear"
    matrix = matrix_of(op, weight, weight_scale, weight_zero, weight_code_scale, x.shape[-1], group_size)
    _checked(op, x, matrix, bias, lora_a, lora_b, scaling, dropout_p)
    dropout = dropout_of(rng_state, dropout_p, x.device)
    rows, n = len(x), matrix.shape[0]
    if column_scale is not None:
        check_like(op, "magnitude", column_scale, "a row of y in float32", x.new_empty(n, dtype=torch.float32))
        column_scale = column_scale.contiguous()
    inner = (x if column_scale is None else lora_a).new_empty(rows if keep_inner else 0, n)
    if can_shrink_beside(x, lora_a, dropout) and n:
        s = x.new_empty(rows, padded(len(lora_a)), dtype=torch.float32)
        adapter = Adapter(s, lora_b, lora_a, scaling)
    else:
        s = shrink(x, lora_a, scaling, dropout)
        adapter = Adapter(s, lora_b)
    y = rows_times(x, matrix, bias, adapter, column_scale, inner if keep_inner else None)
    return y, s.view(-1), inner


@in_triton("lora_linear_bwd")
def lora_linear_bwd(
    dy, dy_base, x, weight, lora_a, lora_b, s, rng_state, scaling, dropout_p, for_x, for_adapters, weight_scale,
    weight_zero, weight_code_scale, group_size,
):  # fmt: skip
    matrix = matrix_of(_OP, weight, weight_scale, weight_zero, weight_code_scale, x.shape[-1], group_size)
    _checked(_OP, x, matrix, None, lora_a, lora_b, scaling, dropout_p)
    (n, k), rank, rows = matrix.shape, len(lora_a), len(x)
    check(_OP, dy.shape == (rows, n), lambda: f"dy: expected [{rows}, {n}], got shape {list(dy.shape)}")
    check(
        _OP, s.numel() == rows * padded(rank),
        lambda: f"s: expected what forward returned, {rows * padded(rank)} elements, got shape {list(s.shape)}",
    )  # fmt: skip
    dropout = dropout_of(rng_state, dropout_p, x.device)
    ds = shrink(dy, lora_b.t(), scaling)
    dx = x.new_empty(0, k)
    if for_x:
        dx = rows_times(dy if dy_base is None else dy_base, matrix.t(), None, Adapter(ds, lora_a.t(), dropout=dropout))
    found = lora_a.new_empty(rank * (k + n) if for_adapters else 0)
    if for_adapters:
        product_over_rows(ds[:, :rank], x, found[: rank * k].view(rank, k), dropout)
        product_over_rows(s.view(rows, padded(rank))[:, :rank], dy, found[rank * k :].view(rank, n))
    return dx, found


from . import triton_dora, triton_gated, triton_multi  # noqa: E402, F401  register the others, with the checks above
