"""The eager twins of group_norm_silu and group_norm_stats, and the condition magnitudes of their results."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "none": lambda z: z,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}
Pair = tuple[torch.Tensor, torch.Tensor]


def _over_pixels(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[C]` or `[N, C]`, to be multiplied with x."""
    return t.reshape(*t.shape[:2], *(1,) * (x.dim() - 2)) if t.dim() > 1 else t.reshape(-1, *(1,) * (x.dim() - 2))


def _affine(
    s: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    """What the activation is applied to."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch's backward does not take the one without the other
    w, b = (t if t is None or t.dtype == torch.float32 else t.to(s.dtype) for t in (weight, bias))
    z = torch.group_norm(s.contiguous(), num_groups, w, b, eps).to(s.dtype)  # PyTorch's NHWC is less exact
    z = z if scale is None else z * (1 + _over_pixels(scale, s)).to(s.dtype)
    return z if shift is None else z + _over_pixels(shift, s).to(s.dtype)


def group_norm_silu_reference(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | Pair:
    """The same in plain PyTorch, in the dtype of x, channels first."""
    s = x if residual is None else x + residual
    y = ACTIVATIONS[activation](_affine(s, num_groups, weight, bias, eps, scale, shift))
    return y if residual is None else (y, s)


def magnitude(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, activation="silu", scale=None, shift=None, residual=None
):
    """|y|, and the terms of z as far as the activation lets their errors through."""
    s = x if residual is None else x + residual
    factor = torch.ones((), dtype=s.dtype) if weight is None else _over_pixels(weight, s).abs()
    terms = torch.group_norm(s.contiguous(), num_groups, None, None, eps).abs() * factor
    if residual is not None:  # the rounding of the sum, and in the mean that of the others
        _, rstd = group_norm_stats_reference(s, num_groups, eps)
        mean_size, _ = group_norm_stats_reference(s.abs(), num_groups)
        per_channel = [_over_pixels(t.repeat_interleave(s.shape[1] // num_groups, dim=1), s) for t in (rstd, mean_size)]
        terms = terms + (s.abs() + per_channel[1]) * per_channel[0] * factor
    if bias is not None:
        terms = terms + _over_pixels(bias, s).abs()
    if scale is not None:
        terms = terms * (1 + _over_pixels(scale, s).abs())
    if shift is not None:
        terms = terms + _over_pixels(shift, s).abs()
    with torch.enable_grad():
        z = _affine(s, num_groups, weight, bias, eps, scale, shift).detach().requires_grad_()
        y = ACTIVATIONS[activation](z)
        (slope,) = torch.autograd.grad(y.sum(), z) if y.numel() else (torch.zeros_like(z),)
    # where a kink is nearer than an error is large, the slope of the other side counts
    slope = torch.where(z.detach().abs() <= 1e-2 * terms, 1.0, slope.abs())
    # in float64 too, 1 + erf and 1 + tanh cancel to nothing in the tail
    size = (y.detach().abs() + slope * terms).maximum(z.detach().abs() * 2.0**-26)
    return size if residual is None else (size, s.abs())


def _groups(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    return x.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)


def group_norm_stats_reference(x: torch.Tensor, num_groups: int, eps: float = 1e-5) -> Pair:
    """The same in plain PyTorch, in float32 or, for float64, in that."""
    rows = _groups(x, num_groups).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[:2]), rows.new_full(rows.shape[:2], 1).mul(eps).rsqrt()
    return rows.mean(-1), torch.rsqrt(rows.var(-1, correction=0) + eps)


def stats_magnitude(x, num_groups, eps=1e-5):
    """The terms of the mean; rstd itself."""
    rows = _groups(x, num_groups).double()
    return rows.abs().mean(-1), group_norm_stats_reference(x.double(), num_groups, eps)[1]
