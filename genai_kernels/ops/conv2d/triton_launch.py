"""The launches of conv2d and up_conv2d in Triton: tiles, weights in the order of a product, statistics of a norm."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
import triton

from ...triton_lib import check
from ...triton_lib.products import PLAIN, WIDE
from .layout import packed_columns
from .triton_kernels import (
    affine_kernel,
    channel_moments_kernel,
    conv_kernel,
    conv_weight_grad_kernel,
    merged_stats_kernel,
)

_TILE = 2048  # elements of a tile of a program that sums: sixteen for each thread of four warps
_TILES = 8  # of such a program
# A gradient of a weight of fewer tiles than a large card has places is summed in parts of at least this many pixels.
_FEW_TILES, _PART = 512, 1024


class Weight(NamedTuple):
    """A weight as a product reads it: `[kh, kw, in, out]`, of which in or out lie side by side; any strides."""

    data: torch.Tensor  # its first element
    strides: tuple[int, ...]
    kernel: tuple[int, int]
    out: int
    low: torch.Tensor | None = None  # what its 16 bits have lost of float32


def weight_of(weight: torch.Tensor, low: torch.Tensor | None = None) -> Weight:
    """Of [kh, kw, in, out]; copied where neither of the last two lies side by side, as in PyTorch's own order."""
    kh, kw, inner, out = weight.shape
    if weight.numel() and 1 not in (weight.stride(2), weight.stride(3)) and inner > 1 and out > 1:
        weight, low = weight.contiguous(), None if low is None else low.contiguous()
    return Weight(weight, weight.stride(), (kh, kw), out, low)


def packed_size(out: int, inner: int, taps: int) -> int:
    """A row more than the CPU's, whose packed weight has another order and must not be taken for one of these."""
    return (inner * taps + 1) * packed_columns(out)


def pack(weights: torch.Tensor) -> torch.Tensor:
    """[kh, kw, in, out] as one dimension."""
    *rest, out = weights.shape
    packed = weights.new_zeros(packed_size(out, 1, math.prod(rest)))
    packed[: math.prod(rest) * packed_columns(out)].view(*rest, packed_columns(out))[..., :out] = weights
    return packed


def unpacked(packed: torch.Tensor, out: int, *rest: int) -> torch.Tensor:
    """The view [kh, kw, in, out]."""
    return packed[: math.prod(rest) * packed_columns(out)].view(*rest, packed_columns(out))[..., :out]


def check_packed(op: str, packed: torch.Tensor, size: int, dtype: torch.dtype, of: str) -> None:
    found = list(packed.shape)
    check(
        op, found == [size] and packed.dtype == dtype and packed.is_contiguous(),
        lambda: f"packed: expected what {op}_pack makes of the weight{of} on the GPU, [{size}], got {found}",
    )  # fmt: skip


def _strides(t: torch.Tensor | None, dims: int = 4) -> tuple[int, ...]:
    return (0,) * dims if t is None else t.stride()


def _kind(dtype: torch.dtype) -> Any:
    return WIDE if dtype == torch.float32 else PLAIN


def _power(n: int, least: int, most: int) -> int:
    return min(max(triton.next_power_of_2(n), least), most)


def _run(width: int, *between_pixels: int) -> int:
    """Pixels that lie side by side for certain, from multiples of this on: what makes Triton read along them."""
    return math.gcd(width, 16) if all(step == 1 for step in between_pixels) else 1


def convolve(
    x: torch.Tensor,
    weight: Weight,
    y: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    affine: torch.Tensor | None = None,
    activation: int = 0,
    bias: torch.Tensor | None = None,
    channel_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    pad_top: int = 0,
    pad_left: int = 0,
    scale: float = 1.0,
    phases: bool = False,
) -> None:
    """Into y, which may have any strides; with `phases` four convolutions, to its even and odd rows and columns."""
    if not y.numel():
        return
    batch, channels, height, width = x.shape
    out_height, out_width = (n // 2 if phases else n for n in y.shape[2:])
    pixels, kind = out_height * out_width, _kind(x.dtype)
    # 128 x 128 sums of eight warps; half of it where there are two factors to read, or float64. A normalised input goes
    # through registers, which it shares with the sums, and comes in steps of half the size.
    # Never fewer rows than a product of sm_90 has: so a pixel's bits are those that it has in a larger map.
    m = 128 if kind == PLAIN and (affine is None or pixels > 64) else 64
    n = _power(weight.out, 16, 128 if kind == PLAIN and weight.low is None else 64)
    k = _power(max(channels, 0 if skip is None else skip.shape[1]), 16, 64 if kind == PLAIN and affine is None else 32)
    tiles = batch * triton.cdiv(pixels, m) if affine is not None else triton.cdiv(batch * pixels, m)
    conv_kernel[(tiles * triton.cdiv(weight.out, n), 4 if phases else 1)](
        x, skip, weight.data, weight.low, affine, bias, channel_bias, residual, y, batch, channels,
        channels + (0 if skip is None else skip.shape[1]), height, width, weight.out, out_height, out_width,
        *weight.kernel, stride, pad_top, pad_left, scale, *x.stride(), *_strides(skip), *weight.strides,
        *_strides(bias, 1), *_strides(channel_bias, 2), *_strides(residual), *y.stride(),
        M=m, N=n, K=k, KIND=kind, NORM=affine is not None, ACTIVATION=activation,
        RUN=_run(out_width, stride, x.stride(3)), PHASES=phases,
        num_warps=8 if m * n > 2048 else 4, num_stages=2 if kind == WIDE else 3,
    )  # fmt: skip


def weight_grad(
    dy: torch.Tensor,
    inputs: list[torch.Tensor],
    dw: torch.Tensor,
    *,
    affine: torch.Tensor | None = None,
    activation: int = 0,
    stride: int = 1,
    pad_top: int = 0,
    pad_left: int = 0,
    scale: float = 1.0,
) -> None:
    """dw [out, in, kh, kw] of a convolution of `inputs` side by side; its sums are cut where the shapes say."""
    if not dw.numel():
        return
    (out, all_channels, kh, kw), kind = dw.shape, _kind(dy.dtype)
    batch, _, out_height, out_width = dy.shape
    pixels = out_height * out_width
    side, step = (64, 32) if kind == WIDE else (128, 64 if affine is None else 32)
    m, n, k = _power(out, 16, side), _power(all_channels, 16, side), _power(pixels, 16, step)
    steps = batch * triton.cdiv(pixels, k)
    tiles = [triton.cdiv(t.shape[1], n) * triton.cdiv(out, m) * kh * kw for t in inputs]
    # as many parts as fill a card: their sums take 32 MiB at most, whatever the batch
    most = max(_FEW_TILES // max(sum(tiles), 1), 1) * 4 if sum(tiles) < _FEW_TILES else 1
    each = max(triton.cdiv(steps, most), triton.cdiv(_PART, k))
    parts = max(triton.cdiv(steps, each), 1)
    sums = dw[None] if parts == 1 else dw.new_empty((parts, kh, kw, out, all_channels), dtype=torch.float32)
    strides = (0, *dw.stride()) if parts == 1 else tuple(sums.stride(d) for d in (0, 3, 4, 1, 2))
    first = 0
    for x, count in zip(inputs, tiles, strict=True):
        channels, height, width = x.shape[1:]
        if count:
            conv_weight_grad_kernel[(count, parts)](
                dy, x, affine, sums, batch, channels, first, all_channels, height, width, out, out_height, out_width,
                kw, stride, pad_top, pad_left, scale, each, *dy.stride(), *x.stride(), *strides,
                M=m, N=n, K=k, KIND=kind, NORM=affine is not None, ACTIVATION=activation,
                RUN=_run(out_width, stride, x.stride(3), dy.stride(3)), num_warps=8 if m * n > 2048 else 4,
                num_stages=2,
            )  # fmt: skip
        first += channels
    if parts > 1:
        dw.copy_(sums.sum(0, dtype=torch.float64).permute(2, 3, 0, 1))


def take_stats(inputs: list[torch.Tensor], stats: torch.Tensor, eps: float) -> None:
    """Mean and 1 / sqrt(variance + eps) of each group of the inputs side by side, into stats [batch, groups, 2]."""
    batch, _, height, width = inputs[0].shape
    pixels, channels, groups = height * width, sum(t.shape[1] for t in inputs), stats.shape[1]
    if not batch * pixels * channels:
        stats[..., 0], stats[..., 1] = 0, 1 / math.sqrt(eps) if eps else math.inf
        return
    # chunks that follow from the size of an image alone
    chunk = min(_TILE // 64 * _TILES, triton.next_power_of_2(pixels))
    chunks = triton.cdiv(pixels, chunk)
    moments = stats.new_empty((batch, chunks, channels, 2))
    first = 0
    for t in inputs:
        if t.shape[1]:
            c = _power(t.shape[1], 1, 64) if t.stride(1) == 1 else 1
            r = min(_TILE // c, chunk)
            channel_moments_kernel[(triton.cdiv(t.shape[1], c) * chunks, batch)](
                t, moments, t.shape[1], first, channels, width, pixels, chunks, *t.stride(), TILES=chunk // r, R=r, C=c
            )
        first += t.shape[1]
    w = triton.next_power_of_2(channels // groups)
    merged_stats_kernel[(groups, batch)](
        moments, stats, channels, channels // groups, pixels, chunk, chunks,
        struct.unpack("<q", struct.pack("<d", eps))[0],
        J=_power(chunks, 1, max(_TILE // w, 1)), W=w,
    )  # fmt: skip


def affine_of(
    stats: torch.Tensor,
    channels: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    """What a norm does to each channel of each image: float32 [batch, 3, channels]."""
    batch, groups, _ = stats.shape
    affine = stats.new_empty((batch, 3, channels), dtype=torch.float32)
    if affine.numel():
        block = _power(channels, 1, 256)
        affine_kernel[(triton.cdiv(channels, block), batch)](
            stats, weight, bias, scale, shift, affine, channels, channels // groups, groups, *_strides(weight, 1),
            *_strides(bias, 1), *_strides(scale, 2), *_strides(shift, 2), C=block,
        )  # fmt: skip
    return affine
