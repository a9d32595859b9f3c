"""group_norm_silu and group_norm_stats in Triton.

Statistics are taken in chunks whose size follows from that of the group, then put together in order, then applied:
where a sample fits in the L2, it comes from memory once. Sums are float64, which data-center cards add as fast as
float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from ...triton_lib.activations import value_and_slope
from . import _is_channels_last, _new_image, _new_stats

_TILE = 2048  # elements of a tile: sixteen for each thread of four warps
_TILES = 8  # of a program that sums
_MERGED = 128  # chunks that are read together when they are put together


@triton.jit
def group_moments_kernel(
    x, residual, s, moments, sample, groups, width, rows, row_step, group_step, chunks,
    TILES: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Mean and summed squares around it of a chunk of rows, of G groups of `width` columns."""
    n, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) // chunks * G
    chunk = tl.program_id(0) % chunks
    at_column = tl.arange(0, G * W)[None, :]
    group, channel = first + at_column // W, at_column % W
    column = n * sample + group * group_step + channel
    has_column = (group < groups) & (channel < width)
    center = tl.zeros((1, G, 1), tl.float64)
    total, squares = tl.zeros((R, G, W), tl.float64), tl.zeros((R, G, W), tl.float64)
    begin = chunk.to(tl.int64) * (TILES * R)
    count = tl.minimum(rows - begin, TILES * R)
    for tile in range(TILES):
        row = begin + tile * R + tl.arange(0, R)[:, None]
        inside = (row < rows) & has_column
        at = row * row_step + column
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            v = (v + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(s.dtype.element_ty)
            tl.store(s + at, v, mask=inside)
        v = tl.reshape(v.to(tl.float64), (R, G, W))
        if tile == 0:  # the mean of some: around it squares lose nothing
            found = tl.minimum(count, R) * width
            center = tl.sum(tl.sum(v, 0, keep_dims=True), 2, keep_dims=True) / found
        d = tl.where(tl.reshape(inside, (R, G, W)), v - center, 0.0)
        total += d
        squares += d * d
    elements = (count * width).to(tl.float64)
    off = tl.reshape(tl.sum(tl.sum(total, 0), 1), (G,))
    around = tl.reshape(tl.sum(tl.sum(squares, 0), 1), (G,)) - off * off / elements
    group = first + tl.arange(0, G)
    to = moments + ((n * groups + group) * chunks + chunk) * 2
    tl.store(to, tl.reshape(center, (G,)) + off / elements, mask=group < groups)
    tl.store(to + 1, tl.maximum(around, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=group < groups)


@triton.jit
def group_stats_kernel(moments, stats, rows, width, chunk_rows, chunks, eps, MERGED: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of a group, from those of its chunks."""
    group = tl.program_id(0).to(tl.int64)
    total = tl.zeros((MERGED,), tl.float64)
    for first in range(0, chunks, MERGED):
        chunk = first + tl.arange(0, MERGED)
        count = tl.maximum(tl.minimum(rows - chunk.to(tl.int64) * chunk_rows, chunk_rows), 0).to(tl.float64)
        mean = tl.load(moments + (group * chunks + chunk) * 2, mask=chunk < chunks, other=0.0)
        total += count * mean
    mean_of_all = tl.sum(total, 0) / rows
    squares = tl.zeros((MERGED,), tl.float64)
    for first in range(0, chunks, MERGED):
        chunk = first + tl.arange(0, MERGED)
        count = tl.maximum(tl.minimum(rows - chunk.to(tl.int64) * chunk_rows, chunk_rows), 0).to(tl.float64)
        at = moments + (group * chunks + chunk) * 2
        d = tl.load(at, mask=chunk < chunks, other=0.0) - mean_of_all
        around = tl.load(at + 1, mask=chunk < chunks, other=0.0)
        squares += tl.where(chunk < chunks, around + count * width * d * d, 0.0)
    variance = tl.sum(squares, 0) / (rows.to(tl.float64) * width)
    tl.store(stats + group * 2, mean_of_all)
    tl.store(stats + group * 2 + 1, 1 / tl.sqrt(variance + eps))


@triton.jit
def number_of(p, at, inside, like):
    """A parameter's elements in float32."""
    return tl.load(p + at, mask=inside, other=0.0).to(tl.float32) + tl.zeros_like(like)


@triton.jit
def normalised(
    x, stats, weight, bias, scale, shift, n, channel, group, channels, groups, inside, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """x^, what the activation is applied to, d of it / d of x^, and 1 / std."""
    mean = tl.load(stats + (n * groups + group) * 2, mask=inside, other=0.0)
    rstd = tl.load(stats + (n * groups + group) * 2 + 1, mask=inside, other=0.0)
    v = ((x.to(tl.float64) - mean) * rstd).to(tl.float32)
    factor, offset = tl.full(v.shape, 1.0, tl.float32), tl.zeros(v.shape, tl.float32)
    if HAS_WEIGHT:
        factor = number_of(weight, channel, inside, v)
    if HAS_BIAS:
        offset = number_of(bias, channel, inside, v)
    if HAS_SCALE:
        more = 1 + number_of(scale, n * channels + channel, inside, v)
        factor, offset = factor * more, offset * more
    if HAS_SHIFT:
        offset = offset + number_of(shift, n * channels + channel, inside, v)
    return v, tl.fma(v, factor, offset), factor, rstd.to(tl.float32)


@triton.jit
def group_apply_kernel(
    x, y, stats, weight, bias, scale, shift, channels, width, groups, pixels, LAST: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    n, element = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    size = channels.to(tl.int64) * pixels
    inside = element < size
    channel = element % channels if LAST else element // pixels
    v = tl.load(x + n * size + element, mask=inside, other=0.0).to(tl.float32)
    _, z, _, _ = normalised(
        v, stats, weight, bias, scale, shift, n, channel, channel // width, channels, groups, inside, HAS_WEIGHT,
        HAS_BIAS, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    value, _ = value_and_slope(z, ACTIVATION)
    tl.store(y + n * size + element, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def group_sums_kernel(
    dy, x, stats, weight, bias, scale, shift, partial, channels, width, groups, pixels, chunks, LAST: tl.constexpr,
    TILES: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ACTIVATION: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz x^ over a chunk of pixels, of C channels: partial[n][chunk][2][channel]."""
    n, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0) % chunks
    channel = (tl.program_id(0) // chunks * C).to(tl.int64) + tl.arange(0, C)[None, :]
    size = channels.to(tl.int64) * pixels
    s1, s2 = tl.zeros((R, C), tl.float64), tl.zeros((R, C), tl.float64)
    for tile in range(TILES):
        pixel = chunk.to(tl.int64) * (TILES * R) + tile * R + tl.arange(0, R)[:, None]
        inside = (pixel < pixels) & (channel < channels)
        at = n * size + (pixel * channels + channel if LAST else channel * pixels + pixel)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        v, z, _, _ = normalised(
            v, stats, weight, bias, scale, shift, n, channel, channel // width, channels, groups, inside, HAS_WEIGHT,
            HAS_BIAS, HAS_SCALE, HAS_SHIFT,
        )  # fmt: skip
        _, slope = value_and_slope(z, ACTIVATION)
        dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope
        s1 += tl.where(inside, dz, 0.0)
        s2 += tl.where(inside, dz.to(tl.float64) * v, 0.0)
    channel = tl.program_id(0) // chunks * C + tl.arange(0, C)
    to = partial + (n * chunks + chunk) * 2 * channels + channel
    tl.store(to, tl.sum(s1, 0), mask=channel < channels)
    tl.store(to + channels, tl.sum(s2, 0), mask=channel < channels)


@triton.jit
def group_pulls_kernel(
    partial, sums, pulls, weight, scale, channels, width, pixels, chunks, W: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """The sums of the chunks in order: sums[n][2][channel]; the means of g and of g x^ over the group."""
    n, group, groups = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    channel = group * width + tl.arange(0, W)
    inside = tl.arange(0, W) < width
    s1, s2 = tl.zeros((W,), tl.float64), tl.zeros((W,), tl.float64)
    for chunk in range(chunks):
        at = partial + (n * chunks + chunk) * 2 * channels + channel
        s1 += tl.load(at, mask=inside, other=0.0)
        s2 += tl.load(at + channels, mask=inside, other=0.0)
    tl.store(sums + n * 2 * channels + channel, s1, mask=inside)
    tl.store(sums + (n * 2 + 1) * channels + channel, s2, mask=inside)
    factor = tl.full((W,), 1.0, tl.float64)
    if HAS_WEIGHT:
        factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float64)
    if HAS_SCALE:
        factor *= 1 + tl.load(scale + n * channels + channel, mask=inside, other=0.0).to(tl.float64)
    elements = width.to(tl.float64) * pixels
    tl.store(pulls + (n * groups + group) * 2, (tl.sum(s1 * factor, 0) / elements).to(tl.float32))
    tl.store(pulls + (n * groups + group) * 2 + 1, (tl.sum(s2 * factor, 0) / elements).to(tl.float32))


@triton.jit
def group_dx_kernel(
    dy, dsum, x, dx, stats, pulls, weight, bias, scale, shift, channels, width, groups, pixels, LAST: tl.constexpr,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    n, element = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    size = channels.to(tl.int64) * pixels
    inside = element < size
    channel = element % channels if LAST else element // pixels
    group = channel // width
    at = n * size + element
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v, z, factor, rstd = normalised(
        v, stats, weight, bias, scale, shift, n, channel, group, channels, groups, inside, HAS_WEIGHT, HAS_BIAS,
        HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    _, slope = value_and_slope(z, ACTIVATION)
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope * factor
    mean_g = tl.load(pulls + (n * groups + group) * 2, mask=inside, other=0.0)
    mean_gx = tl.load(pulls + (n * groups + group) * 2 + 1, mask=inside, other=0.0)
    d = (g - mean_g - v * mean_gx) * rstd
    if HAS_DSUM:
        d = d + tl.load(dsum + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)


class _Shape:
    """The numbers of a call, checked."""

    def __init__(self, op, x, groups, eps):
        check(op, x.dim() >= 2, lambda: f"x: expected [N, C, ...], got shape {list(x.shape)}")
        self.batch, self.channels, self.pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        check(
            op,
            groups >= 1 and self.channels % groups == 0,
            lambda: f"num_groups: expected a divisor of the {self.channels} channels of x, got {groups}",
        )
        check(op, eps >= 0, lambda: f"eps: expected >= 0, got {eps}")
        self.groups, self.width, self.eps = groups, self.channels // groups, eps
        self.last = bool(_is_channels_last(x)) or self.pixels == 1

    def dense(self, t):
        """t in the memory format of x, without gaps."""
        if t is None or not self.last:
            return t if t is None else t.contiguous()
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    def per_tile(self):
        return (triton.cdiv(self.channels * self.pixels, _TILE), self.batch)


def _parameters(op, shape, weight, bias, scale, shift):
    """Contiguous, and which there are."""
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != (shape.channels,):
            found = list(p.shape)
            raise ValueError(
                f"genai_kernels.{op}: {name}: expected shape [{shape.channels}], the channels of x, got {found}"
            )
    for name, p in (("scale", scale), ("shift", shift)):
        if p is not None and p.shape != (shape.batch, shape.channels):
            expected, found = [shape.batch, shape.channels], list(p.shape)
            raise ValueError(
                f"genai_kernels.{op}: {name}: expected shape {expected}, the samples and channels of x, got {found}"
            )
    all_of_them = [None if p is None else p.contiguous() for p in (weight, bias, scale, shift)]
    names = ("HAS_WEIGHT", "HAS_BIAS", "HAS_SCALE", "HAS_SHIFT")
    return all_of_them, {name: p is not None for name, p in zip(names, all_of_them, strict=True)}


def _rows_and_tiles(rows, columns):
    """Of a program that sums: the rows of a tile, and the tiles."""
    r = min(max(_TILE // columns, 1), triton.next_power_of_2(rows))
    return r, min(_TILES, triton.cdiv(rows, r))


def _take_stats(shape, x, residual, s, stats):
    if shape.last:
        rows, row_step, group_step, width = shape.pixels, shape.channels, shape.width, shape.width
    else:
        rows, row_step, group_step, width = shape.width * shape.pixels, 1, shape.width * shape.pixels, 1
    w = triton.next_power_of_2(width)
    g = min(max(128 // w, 1), triton.next_power_of_2(shape.groups)) if shape.last else 1
    r, tiles = _rows_and_tiles(rows, g * w)
    chunks = triton.cdiv(rows, r * tiles)
    moments = x.new_empty((shape.batch, shape.groups, chunks, 2), dtype=torch.float64)
    group_moments_kernel[(triton.cdiv(shape.groups, g) * chunks, shape.batch)](
        x, residual, s, moments, shape.channels * shape.pixels, shape.groups, width, rows, row_step, group_step, chunks,
        TILES=tiles, R=r, G=g, W=w, HAS_RESIDUAL=residual is not None,
    )  # fmt: skip
    group_stats_kernel[(shape.batch * shape.groups,)](
        moments, stats, rows, width, r * tiles, chunks, shape.eps, MERGED=min(_MERGED, triton.next_power_of_2(chunks))
    )


def _forward(x, residual, weight, bias, scale, shift, groups, eps, activation):
    op = "group_norm_silu"
    shape = _Shape(op, x, groups, eps)
    check(op, 0 <= activation <= 4, lambda: f"activation: expected 0 to 4, got {activation}")
    check_like(op, "residual", residual, "x", x)
    parameters, has = _parameters(op, shape, weight, bias, scale, shift)
    y, stats = _new_image(x), _new_stats(x, groups)
    s = None if residual is None else _new_image(x)
    if x.numel():
        x = shape.dense(x)
        _take_stats(shape, x, shape.dense(residual), s, stats)
        group_apply_kernel[shape.per_tile()](
            x if s is None else s, y, stats, *parameters, shape.channels, shape.width, groups, shape.pixels,
            LAST=shape.last, TILE=_TILE, ACTIVATION=activation, **has,
        )  # fmt: skip
    return y, s, stats


@in_triton("group_norm_silu", float64_parameters=True)
def group_norm_silu(x, weight, bias, scale, shift, num_groups, eps, activation):
    y, _, stats = _forward(x, None, weight, bias, scale, shift, num_groups, eps, activation)
    return y, stats


@in_triton("add_group_norm_silu", float64_parameters=True)
def add_group_norm_silu(x, residual, weight, bias, scale, shift, num_groups, eps, activation):
    return _forward(x, residual, weight, bias, scale, shift, num_groups, eps, activation)


@in_triton("group_norm_stats")
def group_norm_stats(x, num_groups, eps):
    shape = _Shape("group_norm_stats", x, num_groups, eps)
    stats = _new_stats(x, num_groups)
    if x.numel():
        _take_stats(shape, shape.dense(x), None, None, stats)
    else:
        stats[..., 0], stats[..., 1] = 0, 1 / math.sqrt(eps) if eps else math.inf
    mean, rstd = stats.float().unbind(-1)
    return mean.contiguous(), rstd.contiguous()


@in_triton("group_norm_silu_bwd", float64_parameters=True)
def group_norm_silu_bwd(
    dy, dsum, x, weight, bias, scale, shift, stats, num_groups, eps, activation, weight_grad, bias_grad, scale_grad,
    shift_grad,
):  # fmt: skip
    op = "group_norm_silu"
    shape = _Shape(op, x, num_groups, eps)
    check_like(op, "dy", dy, "x", x)
    check_like(op, "dsum", dsum, "x", x)
    parameters, has = _parameters(op, shape, weight, bias, scale, shift)
    n, c = shape.batch, shape.channels
    dx, sums = _new_image(x), x.new_zeros((n, 2, c), dtype=torch.float64)
    if x.numel():
        x, dy, dsum, stats = shape.dense(x), shape.dense(dy), shape.dense(dsum), stats.contiguous()
        columns = min(triton.next_power_of_2(c), 64) if shape.last else 1
        rows, tiles = _rows_and_tiles(shape.pixels, columns)
        chunks = triton.cdiv(shape.pixels, rows * tiles)
        partial = x.new_empty((n, chunks, 2, c), dtype=torch.float64)
        pulls = x.new_empty((n, num_groups, 2), dtype=torch.float32)
        sizes = c, shape.width, num_groups, shape.pixels
        group_sums_kernel[(triton.cdiv(c, columns) * chunks, n)](
            dy, x, stats, *parameters, partial, *sizes, chunks, LAST=shape.last, TILES=tiles, R=rows, C=columns,
            ACTIVATION=activation, **has,
        )  # fmt: skip
        group_pulls_kernel[(num_groups, n)](
            partial, sums, pulls, parameters[0], parameters[2], c, shape.width, shape.pixels, chunks,
            W=triton.next_power_of_2(shape.width), HAS_WEIGHT=has["HAS_WEIGHT"], HAS_SCALE=has["HAS_SCALE"],
        )  # fmt: skip
        group_dx_kernel[shape.per_tile()](
            dy, dsum, x, dx, stats, pulls, *parameters, *sizes, LAST=shape.last, TILE=_TILE, ACTIVATION=activation,
            HAS_DSUM=dsum is not None, **has,
        )  # fmt: skip
    s1, s2 = sums.unbind(1)
    more = 1.0 if scale is None else 1 + scale.double()
    w, b = (absent if p is None else p.double() for p, absent in ((weight, 1.0), (bias, 0.0)))
    gradients = (s2 * more).sum(0), (s1 * more).sum(0), s2 * w + s1 * b, s1
    wanted = zip(gradients, (weight, bias, scale, shift), (weight_grad, bias_grad, scale_grad, shift_grad), strict=True)
    return dx, *(x.new_empty(0) if p is None or not grad else g.to(p.dtype) for g, p, grad in wanted)
