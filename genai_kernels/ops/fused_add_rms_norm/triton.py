"""fused_add_rms_norm in Triton."""

from __future__ import annotations

from ...torch_ops import in_triton
from ...triton_lib.norm_rows import norm_backward, norm_forward

_OP = "fused_add_rms_norm"


@in_triton("fused_add_rms_norm")
def fused_add_rms_norm(x, residual, weight, eps):
    return norm_forward(_OP, x, residual, weight, None, eps, centered=False)


@in_triton("fused_add_rms_norm_bwd")
def fused_add_rms_norm_bwd(dy, dsum, s, weight, eps, weight_grad):
    return norm_backward(_OP, dy, dsum, s, weight, None, eps, weight_grad, False, centered=False)[:2]
