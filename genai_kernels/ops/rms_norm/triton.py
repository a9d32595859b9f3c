"""rms_norm in Triton."""

from __future__ import annotations

from ...torch_ops import in_triton
from ...triton_lib.norm_rows import norm_backward, norm_forward


@in_triton("rms_norm")
def rms_norm(x, weight, eps):
    return norm_forward("rms_norm", x, None, weight, None, eps, centered=False)[0]


@in_triton("rms_norm_bwd")
def rms_norm_bwd(dy, x, weight, eps, weight_grad):
    return norm_backward("rms_norm", dy, None, x, weight, None, eps, weight_grad, False, centered=False)[:2]
