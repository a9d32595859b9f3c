"""layer_norm in Triton."""

from __future__ import annotations

from ...torch_ops import in_triton
from ...triton_lib.norm_rows import norm_backward, norm_forward


@in_triton("layer_norm")
def layer_norm(x, weight, bias, eps):
    return norm_forward("layer_norm", x, None, weight, bias, eps, centered=True)[0]


@in_triton("add_layer_norm")
def add_layer_norm(x, residual, weight, bias, eps):
    return norm_forward("layer_norm", x, residual, weight, bias, eps, centered=True)


@in_triton("layer_norm_bwd")
def layer_norm_bwd(dy, dsum, x, weight, bias, eps, weight_grad, bias_grad):
    return norm_backward("layer_norm", dy, dsum, x, weight, bias, eps, weight_grad, bias_grad, centered=True)
