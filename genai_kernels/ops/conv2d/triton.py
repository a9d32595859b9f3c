"""conv2d in Triton: an implicit product of pixels and weights, the norm before it applied while the input is read."""

from __future__ import annotations

import torch

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from . import triton_up  # noqa: F401  the torch ops of up_conv2d
from .layout import new_image
from .stats import new_stats
from .triton_launch import (
    Weight,
    affine_of,
    check_packed,
    convolve,
    pack,
    packed_size,
    take_stats,
    unpacked,
    weight_grad,
    weight_of,
)

_OP = "conv2d"


def _inputs(x, skip):
    """Both, and the channels that they have together."""
    found = list(x.shape)
    check(_OP, x.dim() == 4, lambda: f"x: expected [batch, channels, height, width], got shape {found}")
    if skip is None:
        return [x], found[1]
    _check_dtype("skip", skip, x)
    other = list(skip.shape)
    check(
        _OP, skip.dim() == 4 and other[:1] + other[2:] == found[:1] + found[2:],
        lambda: f"skip: expected the shape of x, {found}, but for the channels, got {other}",
    )  # fmt: skip
    return [x, skip], found[1] + other[1]


class _Call:
    """The numbers of a call, checked in the words of csrc/ops/conv2d/conv2d.cpp."""

    def __init__(self, x, skip, weight, stride, left, right, top, bottom):
        self.inputs, self.channels = _inputs(x, skip)
        self.batch, _, self.height, self.width = x.shape
        _check_dtype("weight", weight, x)
        shape = list(weight.shape)
        check(
            _OP, weight.dim() == 4 and shape[1] == self.channels,
            lambda: f"weight: expected [out, {self.channels}, height, width] for the channels of x and skip, "
            f"got shape {shape}",
        )  # fmt: skip
        self.out, _, self.kernel_height, self.kernel_width = shape
        check(_OP, min(shape[2:]) >= 1, lambda: f"weight: expected a kernel of at least one tap, got {shape}")
        check(_OP, stride >= 1, lambda: f"stride: expected >= 1, got {stride}")
        sides = left, right, top, bottom
        check(_OP, min(sides) >= 0, lambda: f"padding: expected >= 0, got {sides}")
        padded = self.height + top + bottom, self.width + left + right
        check(
            _OP, padded[0] >= shape[2] and padded[1] >= shape[3],
            lambda: f"x: expected with its padding at least the {shape[2]} by {shape[3]} pixels of the kernel, "
            f"got {padded[0]} by {padded[1]}",
        )  # fmt: skip
        self.result = (
            self.batch,
            self.out,
            (padded[0] - shape[2]) // stride + 1,
            (padded[1] - shape[3]) // stride + 1,
        )
        self.place = {"stride": stride, "pad_top": top, "pad_left": left}


def _check_norm(batch, channels, weight, bias, scale, shift, groups, eps, activation):
    if not groups:
        return
    check(
        _OP, groups >= 1 and channels % groups == 0,
        lambda: f"num_groups: expected a divisor of the {channels} channels of x and skip, got {groups}",
    )  # fmt: skip
    check(_OP, eps >= 0, lambda: f"eps: expected >= 0, got {eps}")
    check(_OP, 0 <= activation <= 4, lambda: f"activation: expected 0 to 4, got {activation}")
    _check_shape("norm.weight", weight, channels)
    _check_shape("norm.bias", bias, channels)
    _check_shape("norm.scale", scale, batch, channels)
    _check_shape("norm.shift", shift, batch, channels)


def _check_dtype(name, t, x):
    if t.dtype != x.dtype:
        raise TypeError(f"genai_kernels.{_OP}: {name}: expected the dtype of x, {x.dtype}, got {t.dtype}")


def _check_shape(name, t, *shape):
    if t is not None:
        expected, found = list(shape), list(t.shape)
        check(_OP, found == expected, lambda: f"{name}: expected shape {expected}, got {found}")


def _check_stats(stats, batch, groups):
    expected, found = [batch, groups, 2], list(stats.shape)
    check(
        _OP, stats.dtype == torch.float64 and stats.is_contiguous() and found == expected,
        lambda: f"stats: expected a contiguous float64 {expected}, got {found}",
    )  # fmt: skip


def _check_algorithm(algorithm):
    if algorithm not in (0, 1):  # auto and direct, which are the same here
        raise NotImplementedError(
            f"genai_kernels.{_OP}: algorithm: expected auto or direct, got another, which has no kernel in Triton: in "
            "16 bits its transformed input would lose digits"
        )


@in_triton("conv2d_pack")
def conv2d_pack(weight, stride, algorithm):
    shape = list(weight.shape)
    check(_OP, weight.dim() == 4, lambda: f"weight: expected [out, in, height, width], got shape {shape}")
    _check_algorithm(algorithm)
    return pack(weight.permute(2, 3, 1, 0))


@in_triton("conv2d", float64_parameters=True)
def conv2d(
    x, skip, weight, packed, bias, norm_weight, norm_bias, scale, shift, channel_bias, residual, groups, eps,
    activation, stride, left, right, top, bottom, output_scale, algorithm, channels_last, given_stats,
    next_groups, next_eps,
):  # fmt: skip
    call = _Call(x, skip, weight, stride, left, right, top, bottom)
    _check_norm(call.batch, call.channels, norm_weight, norm_bias, scale, shift, groups, eps, activation)
    _check_shape("bias", bias, call.out)
    _check_shape("channel_bias", channel_bias, call.batch, call.out)
    if residual is not None:
        _check_dtype("residual", residual, x)
        check_like(_OP, "residual", residual, "the result", residual.new_empty(call.result, device="meta"))
    if given_stats is not None:
        _check_stats(given_stats, call.batch, groups)
    check(
        _OP, next_groups >= 0 and (next_groups == 0 or call.out % next_groups == 0),
        lambda: f"return_stats: expected a divisor of the {call.out} channels of the result, got {next_groups}",
    )  # fmt: skip
    check(_OP, next_eps >= 0, lambda: f"return_stats.eps: expected >= 0, got {next_eps}")
    _check_algorithm(algorithm)
    taps = call.kernel_height, call.kernel_width
    if packed is not None:
        size = packed_size(call.out, call.channels, taps[0] * taps[1])
        check_packed(_OP, packed, size, x.dtype, " with this stride and algorithm")
        matrix = weight_of(unpacked(packed, call.out, *taps, call.channels))
    else:
        matrix = weight_of(weight.permute(2, 3, 1, 0))
    y = new_image(x, call.result, channels_last)
    stats, next_stats = new_stats(x, groups), new_stats(x, next_groups)
    affine = None
    if given_stats is not None:
        stats.copy_(given_stats)
    elif groups:
        take_stats(call.inputs, stats, eps)
    if groups:
        affine = affine_of(stats, call.channels, norm_weight, norm_bias, scale, shift)
    convolve(
        x, matrix, y, skip=skip, affine=affine, activation=activation, bias=bias, channel_bias=channel_bias,
        residual=residual, scale=output_scale, **call.place,
    )  # fmt: skip
    if next_groups:
        take_stats([y], next_stats, next_eps)
    return y, stats, next_stats


@in_triton("conv2d_stats")
def conv2d_stats(x, skip, num_groups, eps):
    inputs, channels = _inputs(x, skip)
    check(_OP, num_groups >= 1, lambda: f"num_groups: expected >= 1, got {num_groups}")
    _check_norm(x.shape[0], channels, None, None, None, None, num_groups, eps, 0)
    stats = new_stats(x, num_groups)
    take_stats(inputs, stats, eps)
    return stats


def _phase(phase: int, stride: int, kernel: int, before: int, length: int) -> tuple[int, int, int]:
    """(first tap, taps, padding) of the pixels phase, phase + stride, ... of dx: each stride-th tap reaches them."""
    tap = (phase + before) % stride
    taps = max(-((tap - kernel) // stride), 0)
    return tap, taps, taps - 1 - (phase + before - tap) // stride


def _run_dx(call: _Call, dy: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor, scale: float) -> None:
    """dx as convolutions of dy: the taps in the opposite order, input and output exchanged, one for each phase."""
    stride, top, left = call.place["stride"], call.place["pad_top"], call.place["pad_left"]
    whole = weight_of(weight.permute(2, 3, 0, 1))
    rows, columns = whole.strides[:2]
    for i in range(min(stride, call.height)):
        for j in range(min(stride, call.width)):
            tap_row, kernel_height, pad_top = _phase(i, stride, call.kernel_height, top, call.height)
            tap_column, kernel_width, pad_left = _phase(j, stride, call.kernel_width, left, call.width)
            to, data = dx[:, :, i::stride, j::stride], whole.data
            if not kernel_height * kernel_width:  # no tap reaches these
                to.zero_()
                continue
            last = tap_row + stride * (kernel_height - 1), tap_column + stride * (kernel_width - 1)
            taps = Weight(
                data[last[0] :, last[1] :],
                (-stride * rows, -stride * columns, *whole.strides[2:]),
                (kernel_height, kernel_width),
                whole.out,
            )
            convolve(dy, taps, to, pad_top=pad_top, pad_left=pad_left, scale=scale)


@in_triton("conv2d_bwd", float64_parameters=True)
def conv2d_bwd(
    dy, x, skip, weight, norm_weight, norm_bias, scale, shift, stats, groups, activation, stride, left, right, top,
    bottom, output_scale, input_grad, weight_grad_, bias_grad, channels_last, weight_last,
):  # fmt: skip
    call = _Call(x, skip, weight, stride, left, right, top, bottom)
    _check_norm(call.batch, call.channels, norm_weight, norm_bias, scale, shift, groups, 0.0, activation)
    _check_dtype("dy", dy, x)
    check_like(_OP, "dy", dy, "the result", dy.new_empty(call.result, device="meta"))
    da = dw = x.new_empty(0)
    if input_grad:
        da = new_image(x, (call.batch, call.channels, call.height, call.width), channels_last)
        if da.numel():
            _run_dx(call, dy, weight, da, output_scale)
    if weight_grad_:
        affine = affine_of(stats, call.channels, norm_weight, norm_bias, scale, shift) if groups else None
        dw = new_image(x, tuple(weight.shape), weight_last)
        weight_grad(dy, call.inputs, dw, affine=affine, activation=activation, scale=output_scale, **call.place)
    sums = dy.sum((2, 3), dtype=torch.float64) * output_scale if bias_grad else dy.new_empty(0, call.out).double()
    return da, dw, sums, sums.sum(0) if bias_grad else sums.new_empty(0)
