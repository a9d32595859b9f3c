"""Samples of conv2d and up_conv2d."""

from __future__ import annotations

import dataclasses

import torch

from ...registry import Make, Sample
from .reference import GroupNormPrologue

Call = tuple[tuple[object, ...], dict[str, object]]


def _last(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, channels last."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _weight(m: Make, out: int, channels: int, kernel: int | tuple[int, int] = 3) -> torch.Tensor:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    return m(out, channels, height, width, scale=(channels * height * width) ** -0.5)


def _norm(m: Make, batch: int, channels: int, groups: int, **more: object) -> GroupNormPrologue:
    return GroupNormPrologue(groups, m(channels, shift=1.0), m(channels), **more)  # type: ignore[arg-type]


def _conv(m: Make, n: int, c: int, size: tuple[int, int], out: int, kernel=3, last: bool = True, **more) -> Call:
    x = m(n, c, *size)
    return (_last(x) if last else x, _weight(m, out, c, kernel), m(out)), {"padding": kernel // 2, **more}


def _block(m: Make, n: int, c: int, skip: int, size: tuple[int, int], out: int, groups: int, last=True, **more) -> Call:
    """A convolution of a ResNet block with everything before and after it."""
    place = _last if last else lambda t: t
    norm = _norm(m, n, c + skip, groups, **{k: more.pop(k) for k in ("activation", "eps") if k in more})
    kwargs = {"padding": 1, "norm": norm, "channel_bias": m(n, out), "residual": place(m(n, out, *size)), **more}
    if skip:
        kwargs["skip"] = place(m(n, skip, *size))
    return (place(m(n, c, *size)), _weight(m, out, c + skip), m(out)), kwargs


def _modulated(m: Make) -> Call:
    scale, shift = m(2, 24).chunk(2, dim=1)
    norm = _norm(m, 2, 12, 3)._replace(scale=scale, shift=shift, activation="gelu")
    return (_last(m(2, 12, 8, 9)), _weight(m, 8, 12)), {"padding": 1, "norm": norm}


def _bench(n: int, c: int, size: int, out: int = 0, kernel: int = 3, last: bool = True) -> Sample:
    out = out or c
    name = f"{n}x{c}x{size}x{size}" + (f"_to_{out}" if out != c else "") + ("_1x1" if kernel == 1 else "")
    return Sample(
        name + ("" if last else "_first"),
        lambda m: _conv(m, n, c, (size, size), out, kernel, last),
        bench=True,
        flops=2.0 * n * c * out * size * size * kernel**2,
        backward_flops=4.0 * n * c * out * size * size * kernel**2,
    )


def _bench_block(n: int, c: int, size: int, groups: int = 32) -> Sample:
    return Sample(
        f"block_{n}x{c}x{size}x{size}",
        lambda m: _block(m, n, c, 0, (size, size), c, groups),
        bench=True,
        flops=18.0 * n * c * c * size * size,
        backward_flops=36.0 * n * c * c * size * size,
    )


def _winograd_of(m: Make) -> str:
    return "direct" if m.dtype == torch.float64 else "winograd"  # which is not for float64


def _winograd(n: int, c: int, size: tuple[int, int], out: int) -> Sample:
    height, width = size
    return Sample(
        f"winograd_{n}x{c}x{height}x{width}_to_{out}",
        lambda m: _conv(m, n, c, size, out, algorithm=_winograd_of(m)),
        cpu_only=True,
    )


# Between them everything that the kernels in Triton do; of these two draws are enough, or they have few programs.
_INTERPRETED = {
    "odd_first", "stride_2_odd_first", "wide_kernel", "one_by_one_first", "one_by_one_deep", "norm_modulated",
    "block_skip", "empty_batch", "wide", "cells_first", "mean_100", "empty_map",
}  # fmt: skip


def _few_interpreted(samples: list[Sample]) -> list[Sample]:
    return [dataclasses.replace(s, interpreted=s.name in _INTERPRETED) for s in samples]


SAMPLES = _few_interpreted([
    Sample("plain", lambda m: _conv(m, 2, 16, (8, 8), 24)),
    Sample("channels_first", lambda m: _conv(m, 2, 16, (8, 8), 24, last=False)),
    Sample("no_bias", lambda m: ((_last(m(2, 8, 5, 6)), _weight(m, 4, 8)), {"padding": 1})),
    Sample("one_by_one", lambda m: _conv(m, 3, 20, (5, 7), 33, 1)),
    Sample("one_by_one_first", lambda m: _conv(m, 3, 20, (5, 7), 33, 1, last=False)),
    Sample("one_by_one_deep", lambda m: _conv(m, 2, 80, (9, 8), 150, 1)),
    Sample("image", lambda m: _conv(m, 2, 3, (9, 10), 16, last=False)),
    Sample("grey_image", lambda m: _conv(m, 2, 1, (8, 8), 32)),
    Sample("to_few_channels", lambda m: _conv(m, 2, 40, (6, 6), 4)),
    Sample("odd", lambda m: _conv(m, 3, 19, (7, 5), 53)),
    Sample("odd_first", lambda m: _conv(m, 3, 19, (7, 5), 53, last=False)),
    Sample("stride_2", lambda m: _conv(m, 2, 12, (8, 8), 16, stride=2)),
    Sample("stride_2_odd_first", lambda m: _conv(m, 2, 12, (7, 9), 16, last=False, stride=2)),
    Sample("stride_2_one_side", lambda m: _conv(m, 2, 12, (8, 6), 16, stride=2, padding=(0, 1, 0, 1))),
    Sample("stride_2_one_by_one", lambda m: _conv(m, 2, 12, (7, 6), 16, 1, stride=2)),
    Sample("four_paddings", lambda m: _conv(m, 2, 6, (5, 4), 8, padding=(3, 0, 1, 2))),
    Sample("no_padding", lambda m: _conv(m, 2, 6, (5, 4), 8, padding=0)),
    Sample("patches", lambda m: ((m(2, 3, 8, 8), _weight(m, 20, 3, 2), m(20)), {"stride": 2})),
    Sample("wide_kernel", lambda m: ((_last(m(2, 4, 6, 9)), _weight(m, 6, 4, (1, 5))), {"padding": (2, 2, 0, 0)})),
    Sample("one_pixel", lambda m: _conv(m, 4, 24, (1, 1), 20)),
    Sample("deep", lambda m: _conv(m, 1, 272, (4, 5), 20)),
    Sample("many_pixels", lambda m: _conv(m, 1, 5, (30, 41), 7)),
    Sample("scaled", lambda m: _conv(m, 2, 8, (4, 4), 8, output_scale=0.5**0.5)),
    Sample("skip", lambda m: ((_last(m(2, 12, 5, 6)), _weight(m, 8, 19)),
                              {"padding": 1, "skip": _last(m(2, 7, 5, 6))})),
    Sample("skip_mixed", lambda m: ((_last(m(2, 12, 5, 6)), _weight(m, 8, 19)), {"padding": 1, "skip": m(2, 7, 5, 6)})),
    Sample("channel_bias", lambda m: _conv(m, 3, 8, (4, 4), 10, channel_bias=m(3, 10))),
    Sample("residual", lambda m: _conv(m, 2, 8, (4, 5), 10, residual=_last(m(2, 10, 4, 5)), output_scale=0.5)),
    Sample("residual_mixed", lambda m: _conv(m, 2, 8, (4, 5), 10, last=False, residual=_last(m(2, 10, 4, 5)))),
    Sample("norm", lambda m: ((_last(m(2, 12, 5, 6)), _weight(m, 8, 12)), {"padding": 1, "norm": _norm(m, 2, 12, 3)})),
    Sample("norm_first", lambda m: ((m(2, 12, 5, 6), _weight(m, 8, 12)), {"padding": 1, "norm": _norm(m, 2, 12, 3)})),
    Sample("norm_alone", lambda m: ((_last(m(2, 12, 4, 4)), _weight(m, 8, 12, 1)),
                                    {"norm": GroupNormPrologue(4, eps=1e-6, activation="none")})),
    Sample("norm_gelu", lambda m: ((_last(m(2, 12, 4, 4)), _weight(m, 8, 12)),
                                   {"padding": 1, "norm": _norm(m, 2, 12, 4, activation="gelu_tanh")})),
    Sample("norm_relu", lambda m: ((m(2, 12, 4, 4), _weight(m, 8, 12)),
                                   {"padding": 1, "norm": _norm(m, 2, 12, 4, activation="relu")})),
    Sample("norm_modulated", _modulated),
    Sample("norm_of_mean_100", lambda m: ((_last(m(2, 12, 6, 6, shift=100.0)), _weight(m, 8, 12)),
                                          {"padding": 1, "norm": _norm(m, 2, 12, 3)})),
    Sample("norm_float32", lambda m: ((_last(m(2, 8, 4, 4)), _weight(m, 8, 8)),
                                      {"norm": GroupNormPrologue(2, m.float32(8), m.float32(8))})),
    _winograd(2, 12, (7, 6), 20),
    _winograd(3, 32, (8, 8), 40),
    _winograd(1, 80, (5, 9), 33),
    _winograd(2, 4, (1, 1), 4),
    _winograd(8, 9, (3, 4), 7),  # several images to a tile
    Sample("winograd_first", lambda m: _conv(m, 1, 33, (6, 35), 34, last=False)),
    Sample("winograd_of_large_maps", lambda m: _conv(m, 1, 32, (18, 35), 36)),
    Sample("winograd_backward", lambda m: _conv(m, 1, 64, (5, 8), 80, last=False)),
    Sample("winograd_paddings", lambda m: _conv(m, 1, 33, (6, 7), 8, padding=(0, 3, 2, 1), algorithm=_winograd_of(m)),
           cpu_only=True),
    Sample("direct", lambda m: _conv(m, 2, 32, (4, 4), 32, algorithm="direct")),
    Sample("block", lambda m: _block(m, 2, 32, 0, (8, 8), 48, 8)),
    Sample("block_skip", lambda m: _block(m, 2, 32, 16, (8, 8), 32, 3, output_scale=0.5)),  # a group of both
    Sample("block_skip_first", lambda m: _block(m, 2, 20, 13, (5, 7), 17, 3, last=False)),
    Sample("part_of_channels", lambda m: ((_last(m(2, 20, 4, 5))[:, 4:16], _weight(m, 8, 12)), {"padding": 1})),
    Sample("cropped", lambda m: ((m(2, 12, 8, 9)[:, :, 1:6, 2:7], _weight(m, 8, 12)), {"padding": 1})),
    Sample("expanded", lambda m: ((m(1, 12, 5, 6).expand(3, 12, 5, 6), _weight(m, 8, 12)), {"padding": 1})),
    Sample("weight_last", lambda m: ((m(2, 12, 5, 6), _last(_weight(m, 8, 12))), {"padding": 1})),
    Sample("empty_batch", lambda m: _conv(m, 0, 6, (4, 4), 8)),
    *(_bench(2, c, size) for c, size in ((320, 64), (640, 32), (1280, 16))),
    _bench(2, 320, 64, last=False),
    _bench(2, 640, 32, 320),
    _bench(2, 640, 32, kernel=1),
    *(_bench(64, c, size) for c, size in ((32, 16), (64, 8), (128, 8))),
    *(_bench_block(2, c, size) for c, size in ((320, 64), (640, 32), (1280, 16))),
    _bench_block(64, 64, 16, 8),
])  # fmt: skip


def _up(m: Make, n: int, c: int, size: tuple[int, int], out: int, last: bool = True) -> Call:
    x = m(n, c, *size)
    return (_last(x) if last else x, _weight(m, out, c), m(out)), {}


def _bench_up(n: int, c: int, size: int) -> Sample:
    """The operations are those of the four convolutions."""
    return Sample(
        f"{n}x{c}x{size}x{size}",
        lambda m: _up(m, n, c, (size, size), c),
        bench=True,
        flops=32.0 * n * c * c * size * size,
        backward_flops=64.0 * n * c * c * size * size,
    )


UP_SAMPLES = _few_interpreted([
    Sample("plain", lambda m: _up(m, 2, 12, (4, 5), 10)),
    Sample("channels_first", lambda m: _up(m, 2, 12, (4, 5), 10, last=False)),
    Sample("no_bias", lambda m: ((_last(m(2, 7, 3, 3)), _weight(m, 5, 7)), {})),
    Sample("odd", lambda m: _up(m, 3, 19, (7, 3), 53)),
    Sample("one_pixel", lambda m: _up(m, 2, 8, (1, 1), 8)),
    Sample("wide", lambda m: _up(m, 1, 3, (2, 41), 4, last=False)),
    Sample("deep", lambda m: _up(m, 1, 144, (3, 4), 20)),
    Sample("weight_last", lambda m: ((m(2, 12, 5, 6), _last(_weight(m, 8, 12))), {})),
    Sample("cropped", lambda m: ((m(2, 12, 8, 9)[:, :, 1:6, 2:7], _weight(m, 8, 12)), {})),
    Sample("empty_batch", lambda m: _up(m, 0, 6, (4, 4), 8)),
    *(_bench_up(2, c, size) for c, size in ((1280, 8), (1280, 16), (640, 32))),
    _bench_up(64, 64, 8),
])  # fmt: skip


def _stats(m: Make, n: int, c: int, skip: int, size: tuple[int, int], groups: int, last=True, shift=0.0) -> Call:
    place = _last if last else lambda t: t
    x = place(m(n, c, *size, shift=shift))
    return (x, groups), {"skip": place(m(n, skip, *size))} if skip else {}


STATS = _few_interpreted([
    Sample("plain", lambda m: _stats(m, 2, 16, 0, (8, 8), 4)),
    Sample("channels_first", lambda m: _stats(m, 2, 16, 0, (8, 8), 4, last=False)),
    Sample("skip", lambda m: _stats(m, 2, 12, 7, (5, 6), 1)),
    Sample("cells", lambda m: _stats(m, 1, 20, 0, (19, 37), 5)),  # several, of different sizes
    Sample("cells_first", lambda m: _stats(m, 1, 20, 4, (19, 37), 3, last=False)),
    Sample("mean_100", lambda m: _stats(m, 2, 12, 0, (20, 33), 3, shift=100.0)),
    Sample("mean_100_first", lambda m: _stats(m, 2, 12, 0, (20, 33), 3, last=False, shift=100.0)),
    Sample("one_pixel", lambda m: _stats(m, 2, 8, 0, (1, 1), 8)),
    Sample("empty_batch", lambda m: _stats(m, 0, 8, 0, (2, 2), 4)),
    Sample("empty_map", lambda m: _stats(m, 2, 8, 0, (0, 3), 4)),
    Sample("part_of_channels", lambda m: ((_last(m(2, 20, 4, 5))[:, 4:16], 3), {})),
    Sample(
        "2x320x64x64",
        lambda m: _stats(m, 2, 320, 0, (64, 64), 32),
        bench=True,
        elements=2 * 320 * 64 * 64,
        stream="read",
    ),
])  # fmt: skip
