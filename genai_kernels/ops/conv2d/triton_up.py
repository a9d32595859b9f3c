"""up_conv2d in Triton: its four convolutions in one launch; the gradients as those of one convolution of dy."""

from __future__ import annotations

import torch

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from .layout import new_image
from .triton_launch import Weight, check_packed, convolve, pack, packed_size, unpacked, weight_grad, weight_of

_OP = "up_conv2d"


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    """The words of csrc/ops/conv2d/up_conv2d.cpp."""
    shapes = list(x.shape), list(weight.shape)
    check(_OP, x.dim() == 4, lambda: f"x: expected [batch, channels, height, width], got shape {shapes[0]}")
    if weight.dtype != x.dtype:
        raise TypeError(f"genai_kernels.{_OP}: weight: expected the dtype of x, {x.dtype}, got {weight.dtype}")
    check(
        _OP, weight.dim() == 4 and shapes[1][1:] == [shapes[0][1], 3, 3],
        lambda: f"weight: expected [out, {shapes[0][1]}, 3, 3] for the channels of x, got shape {shapes[1]}",
    )  # fmt: skip


def _sums(weight: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[4, 4, in, out] in float32, of both dimensions the sums {w0, w1 + w2, w0 + w1, w2} of taps in this order: the two
    of even pixels, and the two of odd ones.
    """
    sums = weight.float().permute(2, 3, 1, 0)
    for dim in (0, 1):
        a, b, c = sums.unbind(dim)
        four = a, b + c, a + b, c
        sums = torch.stack([four[i] for i in order], dim)
    return sums


def _in_two(sums: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 as numbers of 16 bits and what these have lost: 16 bits of a sum show in the result."""
    if dtype == torch.float32:
        return sums, None
    high = sums.to(dtype)
    return high, torch.where(high.isfinite(), sums - high, 0.0).to(dtype)


@in_triton("up_conv2d_pack")
def up_conv2d_pack(weight):
    shape = list(weight.shape)
    check(
        _OP, weight.dim() == 4 and shape[2:] == [3, 3],
        lambda: f"weight: expected [out, in, 3, 3], got shape {shape}",
    )  # fmt: skip
    high, low = _in_two(_sums(weight, (0, 1, 2, 3)), weight.dtype)
    if low is None:
        return pack(high)
    # each half in 16 of the 32 bits of an element
    return torch.cat([pack(high), pack(low)]).view(torch.float32)


def _weight_of(weight: torch.Tensor, packed: torch.Tensor | None) -> Weight:
    out, inner = weight.shape[:2]
    if packed is None:
        high, low = _in_two(_sums(weight, (0, 1, 2, 3)).contiguous(), weight.dtype)
    else:
        size = packed_size(out, inner, 16)
        check_packed(_OP, packed, size, torch.float32, "")
        halves = packed.view(weight.dtype).view(-1, size)
        high, low = unpacked(halves[0], out, 4, 4, inner), None
        if len(halves) == 2:
            low = unpacked(halves[1], out, 4, 4, inner)
    return weight_of(high, low)._replace(kernel=(2, 2))


@in_triton("up_conv2d", float64_parameters=True)
def up_conv2d(x, weight, packed, bias, channels_last):
    _check(x, weight)
    n, _, height, width = x.shape
    out, found = len(weight), None if bias is None else list(bias.shape)
    check(_OP, found in (None, [out]), lambda: f"bias: expected shape [{out}], got {found}")
    matrix = _weight_of(weight, packed)
    y = new_image(x, (n, out, 2 * height, 2 * width), channels_last)
    convolve(x, matrix, y, bias=bias, phases=True)
    return y


@in_triton("up_conv2d_bwd")
def up_conv2d_bwd(dy, x, weight, x_grad, weight_grad_, bias_grad, channels_last):
    _check(x, weight)
    n, channels, height, width = x.shape
    out = len(weight)
    check_like(_OP, "dy", dy, "the result", x.new_empty((n, out, 2 * height, 2 * width), device="meta"))
    dx = dw = x.new_empty(0)
    if x_grad:
        # a convolution of dy of 4 x 4 taps, {w2, w1 + w2, w0 + w1, w0} in each dimension, and stride 2
        sums = _sums(weight, (3, 1, 2, 0)).transpose(2, 3).contiguous()
        dx = new_image(x, tuple(x.shape), channels_last)
        convolve(dy, weight_of(*_in_two(sums, x.dtype)), dx, stride=2, pad_top=1, pad_left=1)
    dw = x.new_empty((channels if weight_grad_ else 0, out, 4, 4), dtype=torch.float32)
    weight_grad(x, [dy], dw, stride=2, pad_top=1, pad_left=1)
    db = dy.sum((0, 2, 3), dtype=torch.float64) if bias_grad else dy.new_empty(0, dtype=torch.float64)
    return dx, dw, db
