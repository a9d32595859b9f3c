"""conv2d: a convolution with the norm before it and the additions after it; up_conv2d: one after an upsampling."""

from __future__ import annotations

from typing import overload

import torch

from ...registry import Accuracy, op
from ...torch_ops import autograd, fake, kernel, no_double_backward
from .layout import is_channels_last, new_image, packed_size, readable, winograd_side
from .reference import ACTIVATIONS, GroupNormPrologue, Stats, conv2d_reference, conv_c, four_sides
from .reference import magnitude as _magnitude
from .samples import SAMPLES
from .stats import conv2d_stats, new_stats, packed_stats, unpacked_stats
from .up import up_conv2d, up_conv2d_pack

__all__ = ["GroupNormPrologue", "conv2d", "conv2d_pack", "conv2d_stats", "up_conv2d", "up_conv2d_pack"]

_conv2d = kernel("conv2d")
_conv2d_bwd = kernel("conv2d_bwd")
_conv2d_pack = kernel("conv2d_pack")
_group_norm_bwd = kernel("group_norm_silu_bwd")
# in the order of GroupActivation in csrc
_CODES = {name: code for code, name in enumerate(("none", "silu", "gelu", "gelu_tanh", "relu"))}
_ALGORITHMS = {name: code for code, name in enumerate(("auto", "direct", "winograd", "winograd_f4"))}
assert _CODES.keys() == ACTIVATIONS.keys()


def _algorithm(name: str) -> int:
    if name not in _ALGORITHMS:
        raise ValueError(f"genai_kernels.conv2d: algorithm: expected one of {', '.join(_ALGORITHMS)}, got {name!r}")
    return _ALGORITHMS[name]


def _weight_last(weight: torch.Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


@overload
def conv2d(
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
    return_stats: None = None,
) -> torch.Tensor: ...


@overload
def conv2d(
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
    return_stats: GroupNormPrologue,
) -> tuple[torch.Tensor, Stats]: ...


@overload
def conv2d(
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
) -> torch.Tensor | tuple[torch.Tensor, Stats]: ...


@op(
    reference=conv2d_reference,
    samples=SAMPLES,
    magnitude=_magnitude,
    accuracy=Accuracy(c_fp32=conv_c),
    gpu=("triton",),
    overloads=("conv2d", "conv2d_bwd", "conv2d_pack"),
)
def conv2d(
    x,
    weight,
    bias=None,
    *,
    stride=1,
    padding=0,
    skip=None,
    norm=None,
    channel_bias=None,
    residual=None,
    output_scale=1.0,
    algorithm="auto",
    packed=None,
    return_stats=None,
):
    """A convolution, the group norm and activation before it, the additions after it: half a ResNet block in one op.

    `(conv(act(norm([x, skip]))) + bias + channel_bias + residual) * output_scale`. Norm and activation are applied
    while the input is packed for the product: no normalised or joined copy of it is made. Computed in float32 (float64
    for float64) and rounded once. Sums have an order that the weight's shape sets: the bits of an image depend on no
    other image and no number of threads.

    Args:
        x: `[N, C, H, W]`, float32, bfloat16, float16 or float64. Channels last is what the kernels are made for;
            channels first, with each channel contiguous, is transposed on the way in and out; other strides are copied.
        weight: `[Cout, C, kh, kw]` in the dtype of x, any kernel size.
        bias: `[Cout]`, any of these dtypes, or None.
        stride: of both dimensions, >= 1.
        padding: zeros on every side, or (left, right, top, bottom) as in `F.pad`. They are added after the norm.
        skip: `[N, C2, H, W]`: more channels of the input, as `torch.cat([x, skip], 1)` would have them; C counts both.
        norm: applied to [x, skip] first.
        channel_bias: `[N, Cout]`: a time embedding.
        residual: added, in the shape of the result.
        output_scale: of the result.
        algorithm: "auto"; "direct", the sum as it stands, so that a pixel's bits depend on nothing but the input that
            it sees; "winograd", 3 x 3 kernels of stride 1 with 4/9 of the multiplications, in tiles of 2 x 2 pixels,
            not in float64; "winograd_f4", float32 alone, with 1/4 of the multiplications, in tiles of 4 x 4 pixels and
            with some seven times the error. "auto" is winograd where it can be and the weight has 32 channels or more
            on both sides. Gradients are direct sums, as is everything on a GPU, where both by name are refused.
        packed: `conv2d_pack(weight, stride, algorithm)`, for a weight that is used many times; to be packed again when
            that changes.
        return_stats: the norm that the result goes through next: its statistics are taken of each part of the result
            that has just been written, without a pass over the map.

    Returns:
        `[N, Cout, H', W']` in the dtype of x, channels last if x is; if x is in both formats (C = 1, one pixel) too.
        With return_stats `(y, stats)`, for `return_stats._replace(stats=stats)`: the bits of `conv2d_stats`, and as
        those without a gradient.

    Raises:
        ValueError: a shape that does not fit; an unknown activation or algorithm.
        TypeError: a dtype that does not fit.
        NotImplementedError: a gradient of x or skip is wanted, whose statistics were given; Winograd by name on a GPU.

    Source: the ResnetBlock2D of diffusers; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
    Peer: `F.conv2d` after `F.silu(F.group_norm(...))`.

    >>> import torch, genai_kernels as gk
    >>> x, weight = torch.arange(4.0).reshape(1, 1, 2, 2), torch.ones(1, 1, 3, 3)
    >>> gk.conv2d(x, weight, padding=1)
    tensor([[[[6., 6.],
              [6., 6.]]]])
    >>> norm = gk.GroupNormPrologue(1, eps=0.0, activation="relu")
    >>> gk.conv2d(torch.tensor([[[[-1.0, 1.0]]]]), weight, padding=1, norm=norm)
    tensor([[[[1., 1.]]]])
    """
    groups, eps, activation = 0, 0.0, 0
    norm_weight = norm_bias = scale = shift = stats = None
    if norm is not None:
        if norm.activation not in _CODES:
            raise ValueError(
                f"genai_kernels.conv2d: norm.activation: expected one of {', '.join(_CODES)}, got {norm.activation!r}"
            )
        if norm.num_groups < 1:
            raise ValueError(f"genai_kernels.conv2d: norm.num_groups: expected >= 1, got {norm.num_groups}")
        groups, eps, activation = norm.num_groups, norm.eps, _CODES[norm.activation]
        norm_weight, norm_bias, scale, shift = norm.weight, norm.bias, norm.scale, norm.shift
        stats = None if norm.stats is None else packed_stats(norm.stats, x.shape[0], groups)
    if return_stats is not None and return_stats.num_groups < 1:
        raise ValueError(f"genai_kernels.conv2d: return_stats: expected num_groups >= 1, got {return_stats.num_groups}")
    y, _, next_stats = _conv2d(
        readable(x),
        None if skip is None else readable(skip),
        weight,
        packed,
        bias,
        norm_weight,
        norm_bias,
        scale,
        shift,
        channel_bias,
        residual,
        groups,
        eps,
        activation,
        stride,
        *four_sides(padding),
        output_scale,
        _algorithm(algorithm),
        is_channels_last(x),
        stats,
        0 if return_stats is None else return_stats.num_groups,
        0.0 if return_stats is None else return_stats.eps,
    )
    return y if return_stats is None else (y, unpacked_stats(next_stats))


def conv2d_pack(weight: torch.Tensor, stride: int = 1, algorithm: str = "auto") -> torch.Tensor:
    """A weight in the order in which `conv2d` reads it: what a call does without `packed` each time.

    Args:
        weight: `[Cout, C, kh, kw]`, float32, bfloat16, float16 or float64.
        stride, algorithm: those of the calls that will use it.

    Returns:
        One dimension, the same dtype, or float32 for Winograd's algorithm: for `conv2d(..., packed=...)` in this
        process, on the device of the weight; its order is no format.

    >>> import torch, genai_kernels as gk
    >>> x, weight = torch.randn(1, 8, 4, 4), torch.randn(16, 8, 3, 3)
    >>> torch.equal(gk.conv2d(x, weight, packed=gk.conv2d_pack(weight)), gk.conv2d(x, weight))
    True
    """
    return _conv2d_pack(weight.detach(), stride, _algorithm(algorithm))


@fake("conv2d_pack")
def _(weight, stride, algorithm):
    if (side := winograd_side(weight, stride, algorithm)) and not weight.is_cuda:
        return weight.new_empty(packed_size(weight, (side + 2) ** 2), dtype=torch.float32)
    return weight.new_empty(packed_size(weight, weight.shape[2:].numel()))


@fake("conv2d")
def _(
    x, skip, weight, packed, bias, norm_weight, norm_bias, scale, shift, channel_bias, residual,
    groups, eps, activation, stride, left, right, top, bottom, output_scale, algorithm, channels_last, given_stats,
    next_groups, next_eps,
):  # fmt: skip
    height = (x.shape[2] + top + bottom - weight.shape[2]) // stride + 1
    width = (x.shape[3] + left + right - weight.shape[3]) // stride + 1
    y = new_image(x, (x.shape[0], weight.shape[0], height, width), channels_last)
    return y, new_stats(x, groups), new_stats(x, next_groups)


@fake("conv2d_bwd")
def _(
    dy, x, skip, weight, norm_weight, norm_bias, scale, shift, stats, groups, activation, stride, left, right, top,
    bottom, output_scale, input_grad, weight_grad, bias_grad, channels_last, weight_last,
):  # fmt: skip
    n, channels, height, width = x.shape
    channels = channels + (0 if skip is None else skip.shape[1])
    out = weight.shape[0]
    return (
        new_image(x, (n, channels, height, width), channels_last) if input_grad else x.new_empty(0),
        new_image(x, weight.shape, weight_last) if weight_grad else x.new_empty(0),
        x.new_empty((n if bias_grad else 0, out), dtype=torch.float64),
        x.new_empty(out if bias_grad else 0, dtype=torch.float64),
    )


_X, _SKIP, _WEIGHT, _PACKED, _BIAS, _NORM, _CHANNEL_BIAS, _RESIDUAL = 0, 1, 2, 3, 4, slice(5, 9), 9, 10
_STATS = 22


def _save(ctx, inputs, output):
    tensors, numbers = inputs[:11], inputs[11:_STATS]
    if inputs[_STATS] is not None and any(ctx.needs_input_grad[i] for i in (_X, _SKIP, _STATS)):
        raise NotImplementedError(
            "genai_kernels.conv2d: norm.stats: expected None where a gradient of x, skip or the statistics is wanted, "
            "got statistics: how they depend on x is not known"
        )
    ctx.groups, ctx.eps, ctx.activation, *ctx.geometry, _, ctx.channels_last = numbers
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in tensors]
    ctx.save_for_backward(*tensors[:3], *tensors[_NORM], output[1])


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 25
    x, skip, weight, norm_weight, norm_bias, scale, shift, stats = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    norm = norm_weight, norm_bias, scale, shift
    input_grad = wanted[_X] or wanted[_SKIP] or any(wanted[_NORM])
    weight_grad, bias_grad = wanted[_WEIGHT], wanted[_BIAS] or wanted[_CHANNEL_BIAS]
    da, dw, sums, total = _conv2d_bwd(
        readable(dy), x, skip, weight, *norm, stats, ctx.groups, ctx.activation, *ctx.geometry,
        input_grad, weight_grad, bias_grad, ctx.channels_last, _weight_last(weight),
    )  # fmt: skip
    dnorm: list[torch.Tensor | None] = [None] * 4
    if input_grad and ctx.groups:
        joined = x if skip is None else torch.cat([x, skip], 1)
        if not (
            joined.is_contiguous(memory_format=torch.channels_last) if ctx.channels_last else joined.is_contiguous()
        ):
            joined = joined.contiguous(
                memory_format=torch.channels_last if ctx.channels_last else torch.contiguous_format
            )
        da, *dnorm = _group_norm_bwd(
            da, None, joined, *norm, stats, ctx.groups, ctx.eps, ctx.activation, *wanted[_NORM]
        )
        dnorm = [g if grad else None for g, grad in zip(dnorm, wanted[_NORM], strict=True)]
    channels = x.shape[1]
    *_, output_scale = ctx.geometry
    return (
        (da if skip is None else da[:, :channels]) if wanted[_X] else None,
        da[:, channels:] if wanted[_SKIP] else None,
        dw if weight_grad else None,
        None,
        total.to(ctx.dtypes[_BIAS]) if wanted[_BIAS] else None,
        *dnorm,
        sums.to(ctx.dtypes[_CHANNEL_BIAS]) if wanted[_CHANNEL_BIAS] else None,
        (dy if output_scale == 1.0 else dy * output_scale) if wanted[_RESIDUAL] else None,
        *(None,) * 14,
    )


autograd("conv2d", _save, _backward)
no_double_backward("conv2d_bwd", "conv2d")
