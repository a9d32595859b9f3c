"""lora_linear and dora_linear on their torch op: arguments made plain, and gradients."""

from __future__ import annotations

import torch

from ...quantized import QuantizedWeight, check_inputs, weight_arguments
from ...rows import sum_rows
from ...torch_ops import autograd, fake, kernel, no_double_backward
from .multi import as_rows, compute_dtype, rng_state, split_gradients

_lora_linear = kernel("lora_linear")
_lora_linear_bwd = kernel("lora_linear_bwd")
_scale_columns_bwd = kernel("scale_columns_bwd")
_linear_dw = kernel("linear_dw")


def run(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: int | None,
    column_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`column_scale * (x W' + scaling dropout(x) A' B') + bias`; column_scale of the type that is computed in."""
    if x.dim() == 0:
        raise ValueError(f"genai_kernels.{name}: x: expected [..., in], got shape []")
    check_inputs(name, x, weight)
    data, *quantized = weight_arguments(weight)
    given = (x, data, lora_a, lora_b, column_scale)
    keep_inner = column_scale is not None and torch.is_grad_enabled() and any(t.requires_grad for t in given)  # type: ignore[union-attr]
    y, _, _ = _lora_linear(
        as_rows(x), data, lora_a, lora_b, bias, rng_state(dropout_p, seed), scaling, dropout_p, column_scale,
        keep_inner, *quantized,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


@fake("lora_linear")
def _(x, weight, lora_a, lora_b, bias, rng_state, scaling, dropout_p, column_scale, keep_inner, *quantized):
    s = x.new_empty(x.shape[0] * -(-lora_a.shape[0] // 16) * 16, dtype=compute_dtype(x))
    like = x if column_scale is None else lora_a
    return x.new_empty(x.shape[0], weight.shape[0]), s, like.new_empty(x.shape[0] if keep_inner else 0, weight.shape[0])


@fake("lora_linear_bwd")
def _(dy, dy_base, x, weight, lora_a, lora_b, s, rng_state, scaling, dropout_p, for_x, for_adapters, *quantized):
    found = lora_a.new_empty(lora_a.shape[0] * (x.shape[1] + weight.shape[0]) if for_adapters else 0)
    return x.new_empty(x.shape[0] if for_x else 0, x.shape[1]), found


@fake("scale_columns_bwd")
def _(dy, column_scale, inner):
    return dy.new_empty(dy.shape), column_scale.new_empty(column_scale.shape)


def _save(ctx, inputs, output):
    x, weight, lora_a, lora_b, _, rng_state, ctx.scaling, ctx.dropout_p, column_scale, _, *quantized = inputs
    if quantized[0] is not None and any(ctx.needs_input_grad[i] for i in (1, 10, 11, 12)):
        raise NotImplementedError("genai_kernels.lora_linear: weight: a quantized weight takes no gradient")
    ctx.group_size = quantized.pop()
    inner = None if column_scale is None else output[2]
    ctx.save_for_backward(x, weight, lora_a, lora_b, rng_state, output[1], column_scale, inner, *quantized)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dy, *_):
    x, weight, lora_a, lora_b, rng_state, s, column_scale, inner, *quantized = ctx.saved_tensors
    for_x, for_weight, for_a, for_b, for_bias, *_ = ctx.needs_input_grad
    for_scale = ctx.needs_input_grad[8]
    dy, dtype = as_rows(dy), lora_a.dtype
    dbias = sum_rows(dy) if for_bias else None
    dy_base = dscale = None
    if column_scale is not None:
        dy_base, dscale = _scale_columns_bwd(dy, column_scale, inner)
        # dy * scale, where it meets the adapter: in B, and rounded with the gradients
        lora_a, lora_b = lora_a.to(s.dtype), lora_b * column_scale[:, None]
    dx = da = db = None
    if for_x or for_a or for_b:
        dx, found = _lora_linear_bwd(
            dy, dy_base, x, weight, lora_a, lora_b, s, rng_state, ctx.scaling, ctx.dropout_p, for_x, for_a or for_b,
            *quantized, ctx.group_size,
        )  # fmt: skip
        if for_a or for_b:
            ((da,), (db,)) = split_gradients(found, [lora_a], [lora_b])
            if column_scale is not None:
                da, db = da.to(dtype), (db * column_scale[:, None]).to(dtype)
    for_w = dy if dy_base is None else dy_base
    return (
        dx if for_x else None, _linear_dw(for_w, x) if for_weight else None, da if for_a else None,
        db if for_b else None, dbias, None, None, None, dscale if for_scale else None, None, None, None, None, None,
    )  # fmt: skip


autograd("lora_linear", _save, _backward)
no_double_backward("lora_linear_bwd", "lora_linear")
no_double_backward("scale_columns_bwd", "dora_linear")
