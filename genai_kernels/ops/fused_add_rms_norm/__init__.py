"""fused_add_rms_norm: residual addition and RMS norm in one pass."""

from __future__ import annotations

import torch

from ...registry import Sample, op
from ...torch_ops import autograd, fake, kernel, no_double_backward

__all__ = ["fused_add_rms_norm"]

_fused_add_rms_norm = kernel("fused_add_rms_norm")
_fused_add_rms_norm_out = kernel("fused_add_rms_norm_out")
_fused_add_rms_norm_bwd = kernel("fused_add_rms_norm_bwd")
Pair = tuple[torch.Tensor, torch.Tensor]


def fused_add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: Pair | None = None,
) -> Pair:
    """The same in plain PyTorch, in the dtype of x."""
    s = x + residual
    y = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else (y * weight).to(x.dtype)
    return (y, s) if out is None else (out[0].copy_(y), out[1].copy_(s))


def _magnitude(x, residual, weight=None, eps=1e-6):
    y, s = fused_add_rms_norm_reference(x, residual, weight, eps)
    return y.abs(), s.abs()


def _huge(dtype: torch.dtype) -> float:
    # finite differences of float64 need numbers that they change
    return {torch.float16: 1e4, torch.float64: 1.0}.get(dtype, 1e30)


SAMPLES = [
    Sample("plain", lambda m: ((m(4, 7, 64), m(4, 7, 64), m(64)), {})),
    Sample("no_weight", lambda m: ((m(5, 48), m(5, 48)), {"eps": 1e-5})),
    Sample("odd", lambda m: ((m(3, 37), m(3, 37), m(37)), {})),
    Sample("many_rows", lambda m: ((m(200, 33), m(200, 33), m(33)), {})),
    Sample("one_element", lambda m: ((m(6, 1), m(6, 1)), {})),
    Sample("huge", lambda m: ((m(5, 96, scale=_huge(m.dtype)), m(5, 96), m(96)), {})),
    Sample("float32_weight", lambda m: ((m(6, 96), m(6, 96), m.float32(96)), {})),
    Sample("strided", lambda m: ((m(6, 80)[:, 8:72], m(64, 6).t(), m(128)[::2]), {})),
    Sample("expanded", lambda m: ((m(1, 40).expand(5, 40), m(5, 40), m(40)), {})),
    Sample("empty", lambda m: ((m(0, 16), m(0, 16), m(16)), {})),
    Sample("512x4096", lambda m: ((m(512, 4096), m(512, 4096), m(4096)), {}), bench=True, elements=4 * 512 * 4096,
           backward_elements=4 * 512 * 4096),
]  # fmt: skip


@op(
    reference=fused_add_rms_norm_reference,
    samples=SAMPLES,
    magnitude=_magnitude,
    overloads=("fused_add_rms_norm", "fused_add_rms_norm_out", "fused_add_rms_norm_bwd"),
)
def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: Pair | None = None,
) -> Pair:
    """`s = x + residual` and `s / sqrt(mean(s^2) + eps) * weight` over the last dimension, in one pass.

    Computed in float32 (float64 for float64), sums in a fixed order: the same bits whatever the other rows and threads.
    The norm is that of the sum before it is rounded to the dtype.

    Args:
        x: `[..., n]`, float32, bfloat16, float16 or float64, any strides.
        residual: shape and dtype of x.
        weight: `[n]`, any of these dtypes, or None.
        eps: added to the mean square, >= 0.
        out: `(y, new_residual)`, written and returned instead of new tensors; each may be x or residual itself. Not
            differentiable.

    Returns:
        `(y, new_residual)`, both with shape and dtype of x; `new_residual` is s.

    Raises:
        ValueError: a shape that does not fit; an `out` that overlaps an input partly.
        TypeError: a dtype that does not fit.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; fused with the addition as in vLLM.

    >>> import torch, genai_kernels as gk
    >>> y, residual = gk.fused_add_rms_norm(torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 0.0]]), eps=0.0)
    >>> y, residual
    (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    if out is None:
        return _fused_add_rms_norm(x, residual, weight, eps)
    _fused_add_rms_norm_out(x, residual, weight, eps, *out)
    return out


@fake("fused_add_rms_norm")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@fake("fused_add_rms_norm_out")
def _(x, residual, weight, eps, out, out_residual):
    return None


@fake("fused_add_rms_norm_bwd")
def _(dy, dsum, s, weight, eps, weight_grad):
    if weight is None or not weight_grad:
        return s.new_empty(s.shape), s.new_empty(0)
    return s.new_empty(s.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _backward(ctx, dy, dsum):
    s, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2]
    dx, dweight = _fused_add_rms_norm_bwd(dy, dsum, s, weight, ctx.eps, wanted)
    return dx, dx, dweight if wanted else None, None


autograd("fused_add_rms_norm", _save, _backward)
no_double_backward("fused_add_rms_norm_bwd", "fused_add_rms_norm")
