"""Samples of group_norm_silu and group_norm_stats."""

from __future__ import annotations

import torch

from ...registry import Make, Sample


def _last(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, channels last."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _huge(dtype: torch.dtype) -> float:
    # finite differences of float64 need numbers that they change
    return {torch.float16: 1e4, torch.float64: 1.0}.get(dtype, 1e25)


def _affine(m: Make, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return m(channels, shift=1.0), m(channels)


def _block(m: Make, shape: tuple[int, ...], groups: int, last: bool = False, **more: object):
    x = m(*shape)
    return (_last(x) if last else x, groups, *_affine(m, shape[1])), more


def _modulated(m: Make, shape: tuple[int, ...], groups: int, last: bool = False, **more: object):
    """Scale and shift as diffusers makes them: the halves of one projection."""
    call, _ = _block(m, shape, groups, last)
    scale, shift = m(shape[0], 2 * shape[1]).chunk(2, dim=1)
    return call, {"scale": scale, "shift": shift, **more}


def _residual(m: Make, shape: tuple[int, ...], groups: int, last: bool = False, **more: object):
    call, _ = _block(m, shape, groups, last)
    residual = m(*shape, shift=2.0)
    return call, {"residual": _last(residual) if last else residual, **more}


def _bench(batch: int, channels: int, size: int, last: bool) -> Sample:
    """A level of Stable Diffusion's UNet, or of a small one."""
    shape = (batch, channels, size, size)
    return Sample(
        f"{batch}x{channels}x{size}x{size}{'_last' if last else ''}",
        lambda m: _block(m, shape, 32, last),
        bench=True,
        elements=2 * batch * channels * size * size,
        backward_elements=3 * batch * channels * size * size,
    )


SAMPLES = [
    Sample("plain", lambda m: _block(m, (2, 12, 5, 6), 3)),
    Sample("channels_last", lambda m: _block(m, (2, 12, 5, 6), 3, last=True)),
    Sample("no_parameters", lambda m: ((m(2, 8, 4, 4), 2), {})),
    Sample("no_bias", lambda m: ((m(2, 8, 4, 4), 2, m(8)), {"eps": 1e-6})),
    Sample("bias_only", lambda m: ((_last(m(2, 8, 4, 4)), 2, None, m(8)), {})),
    Sample("none", lambda m: _block(m, (2, 10, 3, 7), 5, activation="none")),
    Sample("none_last", lambda m: _block(m, (2, 10, 3, 7), 5, last=True, activation="none")),
    Sample("gelu", lambda m: _block(m, (2, 10, 3, 7), 2, activation="gelu")),
    Sample("gelu_last", lambda m: _block(m, (2, 10, 3, 7), 2, last=True, activation="gelu")),
    Sample("gelu_tanh", lambda m: _block(m, (2, 10, 3, 7), 2, activation="gelu_tanh")),
    Sample("relu", lambda m: _block(m, (2, 10, 3, 7), 2, activation="relu")),
    Sample("relu_last", lambda m: _block(m, (2, 10, 3, 7), 2, last=True, activation="relu")),
    Sample("one_group", lambda m: _block(m, (3, 7, 5, 5), 1)),
    Sample("one_group_last", lambda m: _block(m, (3, 7, 5, 5), 1, last=True)),
    Sample("a_group_each", lambda m: _block(m, (2, 9, 5, 7), 9)),
    Sample("a_group_each_last", lambda m: _block(m, (2, 19, 5, 7), 19, last=True)),
    Sample("odd", lambda m: _block(m, (2, 33, 3, 11), 11)),
    Sample("odd_last", lambda m: _block(m, (2, 51, 3, 11), 17, last=True)),
    Sample("vectors", lambda m: _block(m, (6, 36), 4)),
    Sample("one_dimension", lambda m: _block(m, (2, 6, 37), 2)),
    Sample("one_dimension_last", lambda m: _block(m, (2, 6, 37), 2, last=True)),
    Sample("three_dimensions", lambda m: _block(m, (2, 6, 3, 4, 5), 3)),
    Sample("three_dimensions_last", lambda m: _block(m, (2, 6, 3, 4, 5), 3, last=True)),
    Sample("one_element_groups", lambda m: _block(m, (3, 5), 5)),
    Sample("constant_groups", lambda m: ((m(2, 3, 1, 1).repeat_interleave(4, 1).repeat(1, 1, 6, 6), 3, m(12), m(12)),
                                         {"eps": 1e-3})),
    Sample("mean_over_std_100", lambda m: ((m(2, 12, 8, 9, shift=100.0), 3, m(12), m(12)), {})),
    Sample("mean_over_std_100_last", lambda m: ((_last(m(2, 12, 8, 9, shift=100.0)), 3, m(12), m(12)), {})),
    Sample("huge", lambda m: ((m(2, 8, 5, 7, scale=_huge(m.dtype)), 2, m(8), m(8)), {})),
    Sample("huge_last", lambda m: ((_last(m(2, 8, 5, 7, scale=_huge(m.dtype))), 2, m(8), m(8)), {})),
    Sample("wide", lambda m: ((m(2, 8, 6, 6), 2, m(8, scale=8.0), m(8)), {})),
    Sample("float32_parameters", lambda m: ((m(2, 8, 5, 5), 2, m.float32(8), m.float32(8)), {})),
    Sample("scale_shift", lambda m: _modulated(m, (3, 12, 4, 5), 3)),
    Sample("scale_shift_last", lambda m: _modulated(m, (3, 12, 4, 5), 3, last=True)),
    Sample("scale_alone", lambda m: ((m(2, 6, 4, 4), 2), {"scale": m(2, 6)})),
    Sample("shift_alone", lambda m: ((m(2, 6, 4, 4), 2, m(6)), {"shift": m(2, 6), "activation": "gelu"})),
    Sample("residual", lambda m: _residual(m, (2, 12, 5, 6), 3)),
    Sample("residual_last", lambda m: _residual(m, (2, 12, 5, 6), 3, last=True)),
    Sample("residual_mixed", lambda m: ((m(2, 12, 5, 6), 3), {"residual": _last(m(2, 12, 5, 6))})),
    Sample("everything", lambda m: _modulated(m, (2, 12, 5, 6), 3, residual=m(2, 12, 5, 6), activation="gelu_tanh")),
    Sample("part_of_channels", lambda m: ((m(2, 20, 4, 5)[:, 4:16], 3, *_affine(m, 12)), {})),
    Sample("part_of_channels_last", lambda m: ((_last(m(2, 20, 4, 5))[:, 4:16], 3, *_affine(m, 12)), {})),
    Sample("cropped", lambda m: ((m(2, 12, 8, 9)[:, :, 1:6, 2:7], 3, *_affine(m, 12)), {})),
    Sample("expanded", lambda m: ((m(1, 12, 5, 6).expand(3, 12, 5, 6), 3, *_affine(m, 12)), {})),
    Sample("large_groups", lambda m: _block(m, (2, 6, 48, 65), 2)),
    Sample("large_groups_last", lambda m: _block(m, (2, 6, 48, 65), 2, last=True)),
    Sample("empty_batch", lambda m: _block(m, (0, 12, 5, 6), 3)),
    *(_bench(2, c, size, last) for c, size in ((320, 64), (640, 32), (1280, 16)) for last in (False, True)),
    *(_bench(64, 64, 16, last) for last in (False, True)),
]  # fmt: skip

STATS = [
    Sample("plain", lambda m: ((m(2, 12, 5, 6), 3), {})),
    Sample("channels_last", lambda m: ((_last(m(2, 12, 5, 6)), 3), {})),
    Sample("odd_last", lambda m: ((_last(m(3, 51, 3, 11)), 17), {"eps": 1e-6})),
    Sample("vectors", lambda m: ((m(6, 36), 4), {})),
    Sample("mean_over_std_100", lambda m: ((m(2, 12, 16, 18, shift=100.0), 3), {})),
    Sample("mean_over_std_100_last", lambda m: ((_last(m(2, 12, 16, 18, shift=100.0)), 3), {})),
    Sample("constant", lambda m: ((m(2, 1, 1, 1).expand(2, 6, 4, 4), 3), {})),
    Sample("cropped", lambda m: ((m(2, 12, 8, 9)[:, :, 1:6, 2:7], 3), {})),
    Sample("large_groups", lambda m: ((m(2, 6, 48, 65), 2), {})),
    Sample("empty_batch", lambda m: ((m(0, 12, 5, 6), 3), {})),
    Sample("320x64x64", lambda m: ((m(2, 320, 64, 64), 32), {}), bench=True, elements=2 * 320 * 4096, stream="read"),
    Sample("320x64x64_last", lambda m: ((_last(m(2, 320, 64, 64)), 32), {}), bench=True, elements=2 * 320 * 4096,
           stream="read"),
]  # fmt: skip
