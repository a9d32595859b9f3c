"""What conv2d and up_conv2d launch in Triton: products of pixels and weights, and the numbers of a norm before them.

A program has a tile of pixels by output channels and goes through taps and blocks of input channels, in this order; the
tile follows from the shapes of one image and of the weight. So the bits of an image do not depend on the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.activations import value_and_slope
from ...triton_lib.products import add_product, zeros_of


@triton.jit
def input_tile(
    x, affine, n, i, j, c, inside, channels, first_channel, all_channels, height, width, x_n, x_c, x_h, x_w,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Pixels (i, j) of images n by channels c, of one image where there is a norm; zeros around it."""
    seen = inside & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    at = tl.max_contiguous(n * x_n + i.to(tl.int64) * x_h + j.to(tl.int64) * x_w, RUN)
    there = seen[:, None] & (c < channels)[None, :]
    tile = tl.load(x + at[:, None] + c.to(tl.int64)[None, :] * x_c, mask=there, other=0.0)
    if NORM:
        of_channel = affine + n * 3 * all_channels + first_channel + c
        mean = tl.load(of_channel, mask=c < channels, other=0.0)[None, :]
        factor = tl.load(of_channel + all_channels, mask=c < channels, other=0.0)[None, :]
        offset = tl.load(of_channel + 2 * all_channels, mask=c < channels, other=0.0)[None, :]
        value, _ = value_and_slope((tile.to(tl.float32) - mean) * factor + offset, ACTIVATION)
        tile = tl.where(there, value, 0.0).to(tile.dtype)
    return tile


@triton.jit
def add_taps(
    total, x, w, w_low, affine, n, row, column, inside, o, channels, first_channel, all_channels, height, width, out,
    kernel_height, kernel_width, x_n, x_c, x_h, x_w, w_row, w_column, w_in, w_out,
    K: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The products of one input's channels: the first tap of a pixel sees (row, column)."""
    blocks = tl.cdiv(channels, K)
    for step in range(kernel_height * kernel_width * blocks):
        tap_row, tap_column = step // blocks // kernel_width, step // blocks % kernel_width
        c = step % blocks * K + tl.arange(0, K)
        a = input_tile(
            x, affine, n, row + tap_row, column + tap_column, c, inside, channels, first_channel, all_channels, height,
            width, x_n, x_c, x_h, x_w, NORM, ACTIVATION, RUN,
        )  # fmt: skip
        at = tap_row.to(tl.int64) * w_row + tap_column.to(tl.int64) * w_column
        at = at + (first_channel + c).to(tl.int64)[:, None] * w_in + o.to(tl.int64)[None, :] * w_out
        there = (c < channels)[:, None] & (o < out)[None, :]
        total = add_product(total, a, tl.load(w + at, mask=there, other=0.0), KIND)
        if w_low is not None:
            total = add_product(total, a, tl.load(w_low + at, mask=there, other=0.0), KIND)
    return total


@triton.jit
def conv_kernel(
    x, skip, w, w_low, affine, bias, channel_bias, residual, y, batch, x_channels, all_channels, height, width, out,
    out_height, out_width, kernel_height, kernel_width, stride, pad_top, pad_left, scale,
    x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w, w_row, w_column, w_in, w_out, bias_c, cb_n, cb_c, r_n, r_c, r_h, r_w,
    y_n, y_c, y_h, y_w,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, RUN: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """(conv + bias + channel_bias + residual) * scale, a channel's columns side by side so that they share their input.

    `w_low` is what the 16 bits of w have lost. With PHASES program_id(1) is one of four convolutions whose results lie
    two pixels apart: its taps begin 2 and its pixels 1 further for the odd rows and columns.
    """
    columns = tl.cdiv(out, N)
    tile, o = tl.program_id(0) // columns, tl.program_id(0) % columns * N + tl.arange(0, N)
    pixels = out_height * out_width
    if NORM:
        tiles = tl.cdiv(pixels, M)
        n, pixel = (tile // tiles).to(tl.int64), tile % tiles * M + tl.arange(0, M)
        inside = pixel < pixels
    else:
        position = tile.to(tl.int64) * M + tl.arange(0, M)
        n, pixel = position // pixels, (position % pixels).to(tl.int32)
        inside = n < batch
    i, j = pixel // out_width, pixel % out_width
    if PHASES:
        odd_row, odd_column = tl.program_id(1) // 2, tl.program_id(1) % 2
        pad_top, pad_left = 1 - odd_row, 1 - odd_column
        further = 2 * odd_row.to(tl.int64) * w_row + 2 * odd_column.to(tl.int64) * w_column
        w += further
        if w_low is not None:
            w_low += further
        y += odd_row.to(tl.int64) * y_h + odd_column.to(tl.int64) * y_w
        y_h, y_w = 2 * y_h, 2 * y_w
    row, column = i * stride - pad_top, j * stride - pad_left
    total = add_taps(
        zeros_of(M, N, KIND), x, w, w_low, affine, n, row, column, inside, o, x_channels, 0, all_channels, height,
        width, out, kernel_height, kernel_width, x_n, x_c, x_h, x_w, w_row, w_column, w_in, w_out, K, KIND, NORM,
        ACTIVATION, RUN,
    )  # fmt: skip
    if skip is not None:
        total = add_taps(
            total, skip, w, w_low, affine, n, row, column, inside, o, all_channels - x_channels, x_channels,
            all_channels, height, width, out, kernel_height, kernel_width, s_n, s_c, s_h, s_w, w_row, w_column, w_in,
            w_out, K, KIND, NORM, ACTIVATION, 1,
        )  # fmt: skip
    there, channel = inside[:, None] & (o < out)[None, :], o.to(tl.int64)[None, :]
    i, j = i.to(tl.int64), j.to(tl.int64)
    if bias is not None:
        total += tl.load(bias + o.to(tl.int64) * bias_c, mask=o < out, other=0.0).to(total.dtype)[None, :]
    if channel_bias is not None:
        at = (n * cb_n + tl.zeros_like(i))[:, None] + channel * cb_c
        total += tl.load(channel_bias + at, mask=there, other=0.0).to(total.dtype)
    if residual is not None:
        at = (n * r_n + i * r_h + j * r_w)[:, None] + channel * r_c
        total += tl.load(residual + at, mask=there, other=0.0).to(total.dtype)
    at = (n * y_n + i * y_h + j * y_w)[:, None] + channel * y_c
    tl.store(y + at, (total * scale).to(y.dtype.element_ty), mask=there)


@triton.jit
def conv_weight_grad_kernel(
    dy, x, affine, dw, batch, channels, first_channel, all_channels, height, width, out, out_height, out_width,
    kernel_width, stride, pad_top, pad_left, scale, each, dy_n, dy_c, dy_h, dy_w, x_n, x_c, x_h, x_w,
    dw_part, dw_o, dw_c, dw_h, dw_w,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Of one tap, M output channels by N of one input's: dy' x over `each` steps of K pixels, a step of one image."""
    columns, rows = tl.cdiv(channels, N), tl.cdiv(out, M)
    c = tl.program_id(0) % columns * N + tl.arange(0, N)
    o = tl.program_id(0) // columns % rows * M + tl.arange(0, M)
    tap = tl.program_id(0) // columns // rows
    tap_row, tap_column = tap // kernel_width, tap % kernel_width
    pixels = out_height * out_width
    steps = tl.cdiv(pixels, K)
    first = tl.program_id(1) * each
    total = zeros_of(M, N, KIND)
    for step in range(first, tl.minimum(first + each, batch * steps)):
        n, pixel = (step // steps).to(tl.int64), step % steps * K + tl.arange(0, K)
        i, j, inside = pixel // out_width, pixel % out_width, pixel < pixels
        at = tl.max_contiguous(n * dy_n + i.to(tl.int64) * dy_h + j.to(tl.int64) * dy_w, RUN)
        there = (o < out)[:, None] & inside[None, :]
        g = tl.load(dy + o.to(tl.int64)[:, None] * dy_c + at[None, :], mask=there, other=0.0)
        a = input_tile(
            x, affine, n, i * stride - pad_top + tap_row, j * stride - pad_left + tap_column, c, inside, channels,
            first_channel, all_channels, height, width, x_n, x_c, x_h, x_w, NORM, ACTIVATION, RUN,
        )  # fmt: skip
        total = add_product(total, g, a, KIND)
    at = tl.program_id(1).to(tl.int64) * dw_part + tap_row.to(tl.int64) * dw_h + tap_column.to(tl.int64) * dw_w
    at = at + o.to(tl.int64)[:, None] * dw_o + (first_channel + c).to(tl.int64)[None, :] * dw_c
    tl.store(dw + at, (total * scale).to(dw.dtype.element_ty), mask=(o < out)[:, None] & (c < channels)[None, :])


# ---- the norm ----


@triton.jit
def channel_moments_kernel(
    x, moments, channels, first_channel, all_channels, width, pixels, chunks, x_n, x_c, x_h, x_w,
    TILES: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Mean and summed squares around it of each channel in a chunk of pixels: moments[n][chunk][channel][2].

    In float64 around the channel's first pixel.
    """
    n, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0) % chunks
    c = tl.program_id(0) // chunks * C + tl.arange(0, C)
    of_channel = x + n * x_n + c.to(tl.int64) * x_c
    center = tl.load(of_channel, mask=c < channels, other=0.0).to(tl.float64)
    total, squares = tl.zeros((R, C), tl.float64), tl.zeros((R, C), tl.float64)
    begin = chunk * (TILES * R)
    for tile in range(TILES):
        pixel = begin + tile * R + tl.arange(0, R)
        at = (pixel // width).to(tl.int64) * x_h + (pixel % width).to(tl.int64) * x_w
        inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
        v = tl.load(of_channel[None, :] + at[:, None], mask=inside, other=0.0)
        d = tl.where(inside, v.to(tl.float32).to(tl.float64) - center[None, :], 0.0)
        total += d
        squares += d * d
    count = tl.minimum(pixels - begin, TILES * R).to(tl.float64)
    off = tl.sum(total, 0)
    to = moments + ((n * chunks + chunk) * all_channels + first_channel + c) * 2
    around = tl.maximum(tl.sum(squares, 0) - off * off / count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(to, center + off / count, mask=c < channels)
    tl.store(to + 1, around, mask=c < channels)


@triton.jit
def merged_stats_kernel(
    moments, stats, channels, width, pixels, chunk_pixels, chunks, eps_bits, J: tl.constexpr, W: tl.constexpr
):
    """Mean and 1 / sqrt(variance + eps) of a group, from the moments of its channels, J chunks at a time.

    `eps_bits` are those of its float64, which a number that is passed to a kernel loses.
    """
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    n, group, groups = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, W)
    of_group = moments + (n * chunks * channels + group * width + column[None, :]) * 2
    total = tl.zeros((J, W), tl.float64)
    for first in range(0, chunks, J):
        chunk = first + tl.arange(0, J)
        count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float64)[:, None]
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        total += count * tl.load(of_group + chunk.to(tl.int64)[:, None] * channels * 2, mask=inside, other=0.0)
    elements = pixels.to(tl.float64) * width
    mean = tl.sum(tl.sum(total, 0), 0) / elements
    squares = tl.zeros((J, W), tl.float64)
    for first in range(0, chunks, J):
        chunk = first + tl.arange(0, J)
        count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float64)[:, None]
        inside = (chunk < chunks)[:, None] & (column < width)[None, :]
        at = of_group + chunk.to(tl.int64)[:, None] * channels * 2
        d = tl.load(at, mask=inside, other=0.0) - mean
        squares += tl.where(inside, tl.load(at + 1, mask=inside, other=0.0) + count * d * d, 0.0)
    to = stats + (n * groups + group) * 2
    tl.store(to, mean)
    tl.store(to + 1, 1 / tl.sqrt(tl.sum(tl.sum(squares, 0), 0) / elements + eps))


@triton.jit
def affine_kernel(
    stats, weight, bias, scale, shift, affine, channels, width, groups, weight_c, bias_c, scale_n, scale_c, shift_n,
    shift_c, C: tl.constexpr,
):  # fmt: skip
    """affine[n][3][channel], float32: z = (x - mean) factor + offset, which has what the mean's rounding loses."""
    n, c = tl.program_id(1).to(tl.int64), tl.program_id(0) * C + tl.arange(0, C)
    there, at = c < channels, c.to(tl.int64)
    of_group = stats + (n * groups + c // width) * 2
    mean = tl.load(of_group, mask=there, other=0.0)
    factor, offset = tl.full((C,), 1.0, tl.float64), tl.zeros((C,), tl.float64)
    if weight is not None:
        factor = tl.load(weight + at * weight_c, mask=there, other=0.0).to(tl.float64)
    if bias is not None:
        offset = tl.load(bias + at * bias_c, mask=there, other=0.0).to(tl.float64)
    if scale is not None:
        more = 1 + tl.load(scale + n * scale_n + at * scale_c, mask=there, other=0.0).to(tl.float64)
        factor, offset = factor * more, offset * more
    if shift is not None:
        offset += tl.load(shift + n * shift_n + at * shift_c, mask=there, other=0.0).to(tl.float64)
    factor *= tl.load(of_group + 1, mask=there, other=0.0)
    rounded = mean.to(tl.float32)
    to = affine + n * 3 * channels + c
    tl.store(to, rounded, mask=there)
    tl.store(to + channels, factor.to(tl.float32), mask=there)
    tl.store(to + 2 * channels, (offset - (mean - rounded.to(tl.float64)) * factor).to(tl.float32), mask=there)
