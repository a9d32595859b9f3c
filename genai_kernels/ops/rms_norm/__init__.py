"""rms_norm: root-mean-square layer normalisation."""

from __future__ import annotations

import torch

from ...registry import Accuracy, Sample, op
from ...torch_ops import autograd, fake, kernel, no_double_backward

__all__ = ["rms_norm"]

_rms_norm = kernel("rms_norm")
_rms_norm_out = kernel("rms_norm_out")
_rms_norm_bwd = kernel("rms_norm_bwd")


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in plain PyTorch, in the dtype of x."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else (y * weight).to(x.dtype)
    return y if out is None else out.copy_(y)


def _magnitude(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    return rms_norm_reference(x, weight, eps).abs()


def _torch(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def _huge(dtype: torch.dtype) -> float:
    # finite differences of float64 need numbers that they change
    return {torch.float16: 1e4, torch.float64: 1.0}.get(dtype, 1e30)


SAMPLES = [
    Sample("plain", lambda m: ((m(4, 7, 64), m(64)), {})),
    Sample("no_weight", lambda m: ((m(5, 48),), {"eps": 1e-5})),
    Sample("odd", lambda m: ((m(3, 37), m(37)), {})),
    Sample("many_rows", lambda m: ((m(200, 33), m(33)), {})),
    Sample("one_element", lambda m: ((m(6, 1), m(1)), {})),
    Sample("mean_over_std_100", lambda m: ((m(9, 256, shift=100.0), m(256)), {})),
    Sample("strided_rows", lambda m: ((m(6, 80)[:, 8:72], m(64)), {})),
    Sample("strided_inner", lambda m: ((m(64, 6).t(), m(128)[::2]), {})),
    Sample("expanded", lambda m: ((m(1, 40).expand(5, 40), m(40)), {})),
    Sample("huge", lambda m: ((m(5, 96, scale=_huge(m.dtype)), m(96)), {})),
    Sample("float32_weight", lambda m: ((m(6, 96), m.float32(96)), {})),
    Sample("four_dims", lambda m: ((m(2, 3, 4, 24).transpose(1, 2), m(24)), {})),
    Sample("empty", lambda m: ((m(0, 16), m(16)), {})),
    Sample("512x4096", lambda m: ((m(512, 4096), m(4096)), {}), bench=True, elements=2 * 512 * 4096,
           backward_elements=3 * 512 * 4096),
]  # fmt: skip


@op(
    reference=rms_norm_reference,
    samples=SAMPLES,
    accuracy=Accuracy(),
    magnitude=_magnitude,
    peers={"torch": _torch},
    overloads=("rms_norm", "rms_norm_out", "rms_norm_bwd"),
)
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Root-mean-square layer normalisation: `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Computed in float32 (float64 for float64), sums in a fixed order: the same bits whatever the other rows and threads.
    Rows of any finite size: squares beyond the range of float32 do not overflow.

    Args:
        x: `[..., n]`, float32, bfloat16, float16 or float64, any strides.
        weight: `[n]`, any of these dtypes, or None.
        eps: added to the mean square, >= 0.
        out: written and returned instead of a new tensor; may be x itself. Not differentiable.

    Returns:
        `[..., n]`, dtype of x.

    Raises:
        ValueError: a shape that does not fit; an `out` that overlaps x partly.
        TypeError: a dtype that does not fit.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. Peer: `torch.nn.functional.rms_norm`.

    >>> import torch, genai_kernels as gk
    >>> gk.rms_norm(torch.tensor([[3.0, 4.0]]), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    if out is None:
        return _rms_norm(x, weight, eps)
    _rms_norm_out(x, weight, eps, out)
    return out


@fake("rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape)


@fake("rms_norm_out")
def _(x, weight, eps, out):
    return None


@fake("rms_norm_bwd")
def _(dy, x, weight, eps, weight_grad):
    if weight is None or not weight_grad:
        return x.new_empty(x.shape), x.new_empty(0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    dx, dweight = _rms_norm_bwd(dy, x, weight, ctx.eps, wanted)
    return dx, dweight if wanted else None, None


autograd("rms_norm", _save, _backward)
no_double_backward("rms_norm_bwd", "rms_norm")
