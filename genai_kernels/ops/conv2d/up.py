"""up_conv2d: a convolution of a map of twice the size that is never there."""

from __future__ import annotations

import torch

from ...registry import Accuracy, op
from ...torch_ops import autograd, fake, kernel, no_double_backward
from .layout import is_channels_last, new_image, packed_size, readable
from .reference import conv_c, up_conv2d_reference, up_magnitude
from .samples import UP_SAMPLES

_up_conv2d = kernel("up_conv2d")
_up_conv2d_bwd = kernel("up_conv2d_bwd")
_up_conv2d_pack = kernel("up_conv2d_pack")


@op(
    reference=up_conv2d_reference,
    samples=UP_SAMPLES,
    magnitude=up_magnitude,
    accuracy=Accuracy(c_fp32=conv_c),
    gpu=("triton",),
    overloads=("up_conv2d", "up_conv2d_bwd", "up_conv2d_pack"),
)
def up_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Nearest-neighbour upsampling by 2 and a 3 x 3 convolution with padding 1, without the larger map in between.

    A pixel of x stands four times in the larger map, so that the nine taps of the kernel meet four different pixels:
    the result is four 2 x 2 convolutions of x, one for each phase of its pixels, with weights that are sums of the
    nine. The same numbers in exact arithmetic, 4/9 of the multiplications, and no map of four times the size.

    Args:
        x: `[N, C, H, W]`, float32, bfloat16, float16 or float64; memory formats as of `conv2d`.
        weight: `[Cout, C, 3, 3]` in the dtype of x. Its sums are kept in float32 (float64 for float64).
        bias: `[Cout]`, any of these dtypes, or None.
        packed: `up_conv2d_pack(weight)`, for a weight that is used many times.

    Returns:
        `[N, Cout, 2H, 2W]` in the dtype of x, channels last if x is; if x is in both formats too.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that does not fit.

    Source: Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional
    Neural Network", 2016, for the phases. Peer: `F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)`.

    >>> import torch, genai_kernels as gk
    >>> gk.up_conv2d(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 3, 3))
    tensor([[[[4., 6., 6., 4.],
              [4., 6., 6., 4.]]]])
    """
    return _up_conv2d(readable(x), weight, packed, bias, is_channels_last(x))


def up_conv2d_pack(weight: torch.Tensor) -> torch.Tensor:
    """The sums of a weight's taps in the order in which `up_conv2d` reads them.

    Args:
        weight: `[Cout, C, 3, 3]`, float32, bfloat16, float16 or float64.

    Returns:
        One dimension, float32 (float64 for float64): for `up_conv2d(..., packed=...)` in this process, on the device of
        the weight.

    >>> import torch, genai_kernels as gk
    >>> x, weight = torch.randn(1, 8, 4, 4), torch.randn(16, 8, 3, 3)
    >>> torch.equal(gk.up_conv2d(x, weight, packed=gk.up_conv2d_pack(weight)), gk.up_conv2d(x, weight))
    True
    """
    return _up_conv2d_pack(weight.detach())


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@fake("up_conv2d_pack")
def _(weight):
    return weight.new_empty(packed_size(weight, 16), dtype=_compute(weight.dtype))


@fake("up_conv2d")
def _(x, weight, packed, bias, channels_last):
    n, _, height, width = x.shape
    return new_image(x, (n, weight.shape[0], 2 * height, 2 * width), channels_last)


@fake("up_conv2d_bwd")
def _(dy, x, weight, x_grad, weight_grad, bias_grad, channels_last):
    out, channels = weight.shape[:2]
    return (
        new_image(x, tuple(x.shape), channels_last) if x_grad else x.new_empty(0),
        x.new_empty((channels if weight_grad else 0, out, 4, 4), dtype=_compute(x.dtype)),
        x.new_empty(out if bias_grad else 0, dtype=torch.float64),
    )


def _save(ctx, inputs, output):
    x, weight, _, bias, ctx.channels_last = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _taps(sums: torch.Tensor, dim: int) -> torch.Tensor:
    """The gradients of three taps from those of the four sums {w2, w1 + w2, w0 + w1, w0}."""
    a, b, c, d = sums.unbind(dim)
    return torch.stack([c + d, b + c, a + b], dim)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx, sums, db = _up_conv2d_bwd(readable(dy), x, weight, wanted[0], wanted[1], wanted[3], ctx.channels_last)
    dw = _taps(_taps(sums, 2), 3).transpose(0, 1).to(weight.dtype) if wanted[1] else None
    return dx if wanted[0] else None, dw, None, db.to(ctx.bias_dtype) if wanted[3] else None, None


autograd("up_conv2d", _save, _backward)
no_double_backward("up_conv2d_bwd", "up_conv2d")
