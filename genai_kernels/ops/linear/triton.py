"""linear in Triton: the launches of triton_lib, where lora_linear has them too, and so a row the same bits."""

from __future__ import annotations

from ...torch_ops import in_triton
from ...triton_lib import check
from ...triton_lib.few_bits import matrix_of
from ...triton_lib.linear_layer import check_layer, product_over_rows, rows_times

_OP = "linear"


@in_triton("linear")
def linear(x, weight, bias):
    matrix = matrix_of(_OP, weight, None, None, None, x.shape[-1], 0)
    check_layer(_OP, x, matrix, bias)
    return rows_times(x, matrix, bias)


@in_triton("linear_dx")
def linear_dx(dy, weight):
    shapes = list(dy.shape), list(weight.shape)
    check(
        _OP, dy.dim() == 2 and dy.shape[1:] == weight.shape[:1],
        lambda: f"dy: expected [rows, out] for a weight [out, in], got shapes {shapes[0]} and {shapes[1]}",
    )  # fmt: skip
    return rows_times(dy, matrix_of(_OP, weight, None, None, None, weight.shape[1], 0).t())


@in_triton("linear_dw")
def linear_dw(dy, x):
    shapes = list(dy.shape), list(x.shape)
    check(
        _OP, dy.dim() == 2 and len(dy) == len(x),
        lambda: f"dy: expected as many rows as x has, got shapes {shapes[0]} and {shapes[1]}",
    )  # fmt: skip
    dw = dy.new_empty(dy.shape[1], x.shape[1])
    product_over_rows(dy, x, dw)
    return dw
