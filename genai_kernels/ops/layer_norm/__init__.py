"""layer_norm: layer normalisation, with the residual addition before it where there is one."""

from __future__ import annotations

from typing import overload

import torch

from ...registry import Sample, op
from ...torch_ops import autograd, fake, kernel, no_double_backward

__all__ = ["layer_norm"]

_layer_norm = kernel("layer_norm")
_add_layer_norm = kernel("add_layer_norm")
_layer_norm_out = kernel("layer_norm_out")
_add_layer_norm_out = kernel("add_layer_norm_out")
_layer_norm_bwd = kernel("layer_norm_bwd")
Pair = tuple[torch.Tensor, torch.Tensor]


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """The same in plain PyTorch, in the dtype of x."""
    s = x if residual is None else x + residual
    centered = s - s.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias).to(x.dtype)
    if residual is None:
        return y if out is None else out.copy_(y)  # type: ignore[union-attr]
    return (y, s) if out is None else (out[0].copy_(y), out[1].copy_(s))


def _magnitude(x, weight=None, bias=None, eps=1e-5, residual=None):
    s = x if residual is None else x + residual
    y = layer_norm_reference(s, weight, None, eps).abs()  # type: ignore[union-attr]
    if residual is not None:  # the rounding of the sum, magnified where the mean cancels it
        y = y + s.abs() * torch.rsqrt(s.var(-1, keepdim=True, correction=0) + eps) * (
            1 if weight is None else weight.abs()
        )
    y = y if bias is None else y + bias.abs()
    return y if residual is None else (y, s.abs())


def _torch(x, weight=None, bias=None, eps=1e-5, residual=None):
    s = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(s, s.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, s)


def _huge(dtype: torch.dtype) -> float:
    # finite differences of float64 need numbers that they change
    return {torch.float16: 1e4, torch.float64: 1.0}.get(dtype, 1e30)


SAMPLES = [
    Sample("plain", lambda m: ((m(4, 7, 64), m(64), m(64)), {})),
    Sample("no_parameters", lambda m: ((m(5, 48),), {"eps": 1e-6})),
    Sample("no_bias", lambda m: ((m(5, 48), m(48)), {})),
    Sample("bias_only", lambda m: ((m(5, 48), None, m(48)), {})),
    Sample("odd", lambda m: ((m(3, 37), m(37), m(37)), {})),
    Sample("many_rows", lambda m: ((m(200, 33), m(33), m(33)), {})),
    Sample("one_element", lambda m: ((m(6, 1), m(1), m(1)), {})),
    Sample("constant_rows", lambda m: ((m(6, 1).expand(6, 40).contiguous(), m(40), m(40)), {"eps": 1e-3})),
    Sample("mean_over_std_100", lambda m: ((m(9, 256, shift=100.0), m(256), m(256)), {})),
    Sample("huge", lambda m: ((m(5, 96, scale=_huge(m.dtype)), m(96), m(96)), {})),
    Sample("float32_parameters", lambda m: ((m(6, 96), m.float32(96), m.float32(96)), {})),
    Sample("strided", lambda m: ((m(64, 6).t(), m(128)[::2], m(64)), {})),
    Sample("expanded", lambda m: ((m(1, 40).expand(5, 40), m(40), m(40)), {})),
    Sample("empty", lambda m: ((m(0, 16), m(16), m(16)), {})),
    Sample("residual", lambda m: ((m(4, 7, 64), m(64), m(64)), {"residual": m(4, 7, 64)})),
    Sample("residual_odd", lambda m: ((m(90, 37), m(37), m(37)), {"residual": m(90, 37, shift=10.0)})),
    Sample("residual_strided", lambda m: ((m(6, 80)[:, 8:72], m(64)), {"residual": m(64, 6).t()})),
    Sample("512x4096", lambda m: ((m(512, 4096), m(4096), m(4096)), {}), bench=True, elements=2 * 512 * 4096,
           backward_elements=3 * 512 * 4096),
    Sample("residual_512x4096", lambda m: ((m(512, 4096), m(4096), m(4096)), {"residual": m(512, 4096)}), bench=True,
           elements=4 * 512 * 4096, backward_elements=4 * 512 * 4096),
]  # fmt: skip


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    *,
    out: Pair | None = None,
) -> Pair: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor,
    out: Pair | None = None,
) -> Pair: ...


@op(
    reference=layer_norm_reference,
    samples=SAMPLES,
    magnitude=_magnitude,
    peers={"torch": _torch},
    overloads=("layer_norm", "layer_norm_out", "add_layer_norm", "add_layer_norm_out", "layer_norm_bwd"),
)
def layer_norm(x, weight=None, bias=None, eps=1e-5, residual=None, *, out=None):
    """Layer normalisation, `(s - mean(s)) / sqrt(var(s) + eps) * weight + bias` over the last dimension.

    s is x, or `x + residual`, then returned too. Computed in float32 (float64 for float64), sums in a fixed order: the
    same bits whatever the other rows and threads. The mean keeps what its rounding to float32 would lose, so that a
    mean far larger than the deviation costs no digits. The norm is that of the sum before it is rounded to the dtype.

    Args:
        x: `[..., n]`, float32, bfloat16, float16 or float64, any strides.
        weight, bias: `[n]`, any of these dtypes, or None.
        eps: added to the variance, >= 0.
        residual: shape and dtype of x, or None.
        out: written and returned instead of a new tensor, or with a residual `(y, new_residual)`; may be x or the
            residual itself. Not differentiable.

    Returns:
        `[..., n]`, dtype of x; with a residual `(y, new_residual)`, where `new_residual` is s.

    Raises:
        ValueError: a shape that does not fit; an `out` that overlaps an input partly.
        TypeError: a dtype that does not fit.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016. Peer: `torch.nn.functional.layer_norm`.

    >>> import torch, genai_kernels as gk
    >>> gk.layer_norm(torch.tensor([[1.0, 3.0]]), bias=torch.tensor([0.0, 10.0]), eps=0.0)
    tensor([[-1., 11.]])
    >>> gk.layer_norm(torch.tensor([[1.0, 3.0]]), eps=0.0, residual=torch.tensor([[0.0, 8.0]]))
    (tensor([[-1.,  1.]]), tensor([[ 1., 11.]]))
    """
    if residual is None:
        if out is None:
            return _layer_norm(x, weight, bias, eps)
        _layer_norm_out(x, weight, bias, eps, out)
        return out
    if out is None:
        return _add_layer_norm(x, residual, weight, bias, eps)
    _add_layer_norm_out(x, residual, weight, bias, eps, *out)
    return out


@fake("layer_norm")
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


@fake("layer_norm_out")
def _(x, weight, bias, eps, out):
    return None


@fake("add_layer_norm")
def _(x, residual, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@fake("add_layer_norm_out")
def _(x, residual, weight, bias, eps, out, out_residual):
    return None


@fake("layer_norm_bwd")
def _(dy, dsum, x, weight, bias, eps, weight_grad, bias_grad):
    def gradient(parameter, wanted):
        return x.new_empty(0) if parameter is None or not wanted else parameter.new_empty(parameter.shape)

    return x.new_empty(x.shape), gradient(weight, weight_grad), gradient(bias, bias_grad)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    _, weight_grad, bias_grad, _ = ctx.needs_input_grad
    dx, dweight, dbias = _layer_norm_bwd(dy, None, x, weight, bias, ctx.eps, weight_grad, bias_grad)
    return dx, dweight if weight_grad else None, dbias if bias_grad else None, None


def _save_sum(ctx, inputs, output):
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, bias)


def _backward_sum(ctx, dy, dsum):
    s, weight, bias = ctx.saved_tensors
    _, _, weight_grad, bias_grad, _ = ctx.needs_input_grad
    dx, dweight, dbias = _layer_norm_bwd(dy, dsum, s, weight, bias, ctx.eps, weight_grad, bias_grad)
    return dx, dx, dweight if weight_grad else None, dbias if bias_grad else None, None


autograd("layer_norm", _save, _backward)
autograd("add_layer_norm", _save_sum, _backward_sum)
no_double_backward("layer_norm_bwd", "layer_norm")
