"""The gated layers in Triton: the product of `linear`, whose programs have columns of both halves and end in a gate."""

from __future__ import annotations

from ...torch_ops import in_triton
from ...triton_lib import check
from ...triton_lib.activations import GELU, GELU_TANH, SILU
from ...triton_lib.few_bits import matrix_of
from ...triton_lib.linear_layer import NO_GATE, Gate, check_layer, rows_times

_GATES = (("linear_swiglu", SILU), ("linear_geglu", GELU), ("linear_geglu_tanh", GELU_TANH))  # as csrc/core/gate.h


def named_gate(gate, last, rows):
    """The public name and the gate of a torch op's `gate`, for a weight of so many rows; of -1: no gate."""
    if gate < 0:
        return "lora_linear_multi", NO_GATE
    check("linear_swiglu", gate < len(_GATES), lambda: f"gate: expected 0 to 2, got {gate}")
    name, activation = _GATES[gate]
    check(name, rows % 2 == 0, lambda: f"weight: expected [2 n, in], a gate and what it multiplies, got {rows} rows")
    return name, Gate(activation, last)


@in_triton("gated_linear")
def gated_linear(
    x, weight, bias, gate, gate_last, keep_inner, weight_scale, weight_zero, weight_code_scale, group_size
):  # fmt: skip
    op, gate = named_gate(gate, gate_last, len(weight))
    matrix = matrix_of(op, weight, weight_scale, weight_zero, weight_code_scale, x.shape[-1], group_size)
    check_layer(op, x, matrix, bias)
    inner = x.new_empty(len(x) if keep_inner else 0, matrix.shape[0])
    return rows_times(x, matrix, bias, inner=inner if keep_inner else None, gate=gate), inner
