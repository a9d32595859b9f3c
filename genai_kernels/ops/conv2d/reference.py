"""The eager twins of conv2d and up_conv2d, and the condition magnitudes of their results."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "none": lambda z: z,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}


Stats = tuple[torch.Tensor, torch.Tensor]


class GroupNormPrologue(NamedTuple):
    """A group norm and its activation, applied to the input of a convolution while it is read.

    Args:
        num_groups: a divisor of the channels of x and skip together.
        weight, bias: `[C]`, or None.
        eps: added to the variance, >= 0.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu" or "none".
        scale, shift: `[N, C]`, or None: `norm * (1 + scale) + shift`, before the activation.
        stats: `(mean, rstd)` of the groups, each `[N, num_groups]`, float64 or float32, or None to have them taken of
            the input: of a map that is given in parts, by `conv2d_stats` or `group_norm_stats`, or of the convolution
            before, by its `return_stats`. eps is not used then. They are constants: parameters get their gradients, but
            one of the input, which the statistics depend on in a way that is not known here, is refused.

    >>> import torch, genai_kernels as gk
    >>> gk.conv2d(torch.randn(2, 8, 4, 4), torch.randn(16, 8, 3, 3), padding=1, norm=gk.GroupNormPrologue(4)).shape
    torch.Size([2, 16, 4, 4])
    """

    num_groups: int
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-5
    activation: str = "silu"
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    stats: Stats | None = None


def four_sides(padding: int | tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """(left, right, top, bottom)."""
    return (padding,) * 4 if isinstance(padding, int) else padding


def _over_pixels(t: torch.Tensor) -> torch.Tensor:
    return t[..., None, None]


def _affine(norm: GroupNormPrologue, x: torch.Tensor) -> torch.Tensor:
    """What the activation is applied to."""
    weight = norm.weight
    if weight is None and norm.bias is not None:
        weight = torch.ones_like(norm.bias)  # PyTorch's backward does not take the one without the other
    w, b = (t if t is None or t.dtype == torch.float32 else t.to(x.dtype) for t in (weight, norm.bias))
    if norm.stats is not None:
        return _modulated(norm, _normalised(norm, x, w, b))
    z = torch.group_norm(x.contiguous(), norm.num_groups, w, b, norm.eps).to(x.dtype)  # PyTorch's NHWC is less exact
    return _modulated(norm, z)


def _normalised(norm: GroupNormPrologue, x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None):
    """With given statistics, rounded once."""
    assert norm.stats is not None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    repeats = x.shape[1] // norm.num_groups
    mean, rstd = (_over_pixels(t.to(dtype).repeat_interleave(repeats, dim=1)) for t in norm.stats)
    z = (x.to(dtype) - mean) * rstd
    z = z if w is None else z * _over_pixels(w.to(dtype))
    return (z if b is None else z + _over_pixels(b.to(dtype))).to(x.dtype)


def _modulated(norm: GroupNormPrologue, z: torch.Tensor) -> torch.Tensor:
    z = z if norm.scale is None else z * (1 + _over_pixels(norm.scale)).to(z.dtype)
    return z if norm.shift is None else z + _over_pixels(norm.shift).to(z.dtype)


def _joined(x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    return x if skip is None else torch.cat([x, skip], 1)


def _input(x: torch.Tensor, skip: torch.Tensor | None, norm: GroupNormPrologue | None) -> torch.Tensor:
    x = _joined(x, skip)
    return x if norm is None else ACTIVATIONS[norm.activation](_affine(norm, x))


def conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int, int, int] = 0,
    skip: torch.Tensor | None = None,
    norm: GroupNormPrologue | None = None,
    channel_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    output_scale: float = 1.0,
    algorithm: str = "auto",
    packed: torch.Tensor | None = None,
    return_stats: GroupNormPrologue | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """The same in plain PyTorch, in the dtype of x, op by op as a UNet's block has them."""
    sides = four_sides(padding)
    a = _input(x, skip, norm)
    if len(set(sides)) == 1:
        y = F.conv2d(a, weight, bias, stride, sides[0])
    else:
        y = F.conv2d(F.pad(a, sides), weight, bias, stride)
    if channel_bias is not None:
        y = y + _over_pixels(channel_bias).to(y.dtype)
    if residual is not None:
        y = y + residual
    y = y if output_scale == 1.0 else y * output_scale
    if return_stats is None:
        return y
    return y, conv2d_stats_reference(y, return_stats.num_groups, return_stats.eps)


def conv2d_stats_reference(
    x: torch.Tensor, num_groups: int, eps: float = 1e-5, *, skip: torch.Tensor | None = None
) -> Stats:
    """The same in plain PyTorch, in the dtype that PyTorch's own norm computes them in."""
    joined = _joined(x, skip).detach()
    rows = joined.reshape(x.shape[0], num_groups, joined.shape[1:].numel() // num_groups)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if rows.numel() == 0:
        mean, var = rows.new_zeros(2, *rows.shape[:2])
    else:
        mean, var = rows.mean(-1), rows.var(-1, correction=0)
    return mean.double(), torch.rsqrt(var + eps).double()


def stats_magnitude(x, num_groups, eps=1e-5, *, skip=None):
    """The terms of the mean; those of rstd, whose squares are of differences from one of the elements."""
    joined = _joined(x, skip)
    mean, rstd = conv2d_stats_reference(joined, num_groups, eps)
    rows = joined.reshape(x.shape[0], num_groups, -1) if joined.numel() else mean[..., None]
    farthest = (rows - mean[..., None]).abs().amax(-1)
    return rows.abs().mean(-1), rstd * (1 + (farthest * rstd).square())


def stats_c(
    x: torch.Tensor, num_groups: int, *args: object, skip: torch.Tensor | None = None, **kwargs: object
) -> float:
    """c of the bound per element: the root of the length of a sum."""
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    return max(8.0, (channels // num_groups * x.shape[2:].numel()) ** 0.5)


def magnitude(
    x, weight, bias=None, *, stride=1, padding=0, skip=None, norm=None, channel_bias=None, residual=None,
    output_scale=1.0, algorithm="auto", packed=None, return_stats=None,
):  # fmt: skip
    """The terms of the sum; those of a normalised input as far as its activation lets their errors through."""
    a = _input(x, skip, norm).abs()
    if norm is not None:
        joined = _joined(x, skip)
        with torch.enable_grad():
            z = _affine(norm, joined).detach().requires_grad_()
            (slope,) = torch.autograd.grad(ACTIVATIONS[norm.activation](z).sum(), z)
        plain = torch.group_norm(joined.contiguous(), norm.num_groups, None, None, norm.eps).abs()
        terms = plain if norm.weight is None else plain * _over_pixels(norm.weight).abs()
        terms = terms if norm.bias is None else terms + _over_pixels(norm.bias).abs()
        terms = terms if norm.scale is None else terms * (1 + _over_pixels(norm.scale).abs())
        terms = terms if norm.shift is None else terms + _over_pixels(norm.shift).abs()
        a = a + slope.abs().clamp_min(0.1) * terms
    y = F.conv2d(F.pad(a, four_sides(padding)), weight.abs(), None if bias is None else bias.abs(), stride)
    if channel_bias is not None:
        y = y + _over_pixels(channel_bias).abs()
    if residual is not None:
        y = y + residual.abs()
    return y * abs(output_scale)


def conv_c(x: torch.Tensor, weight: torch.Tensor, *args: object, **kwargs: object) -> float:
    """c of the bound per element in float32: the root of the length of a sum."""
    return max(8.0, weight.shape[1:].numel() ** 0.5)


def up_conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch: the map of four times the size, and its convolution."""
    # repeated by hand: interpolate refuses a batch of none
    return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)


def up_magnitude(x, weight, bias=None, *, packed=None):
    """The terms of the sum."""
    return up_conv2d_reference(x.abs(), weight.abs(), None if bias is None else bias.abs())
