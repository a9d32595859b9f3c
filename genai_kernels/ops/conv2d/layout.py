"""Memory formats, and the size of a packed weight."""

from __future__ import annotations

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Also where both formats are the same."""
    return x.dim() == 4 and (x.stride(1) == 1 or x.shape[1] == 1 or x.shape[2:] == (1, 1))


def readable(t: torch.Tensor) -> torch.Tensor:
    """t itself where csrc/ops/conv2d reads its strides, otherwise a copy."""
    if t.dim() != 4 or t.numel() == 0 or t.stride(1) == 1:
        return t
    (_, _, height, width), (_, _, row, pixel) = t.shape, t.stride()
    return t if (width == 1 or pixel == 1) and (height == 1 or row == width) else t.contiguous()


def new_image(like: torch.Tensor, shape: tuple[int, ...], channels_last: bool) -> torch.Tensor:
    """Empty, in one of the two memory formats."""
    if not channels_last:
        return like.new_empty(shape)
    n, c, height, width = shape
    return like.new_empty((n, height, width, c)).movedim(-1, 1)


def packed_columns(out: int) -> int:
    """conv_panel of csrc/ops/conv2d/conv2d.h: output channels, with those of the last panel that are not there."""
    panel = 48 if out % 48 == 0 or out % 48 > 32 else 32
    return (out + panel - 1) // panel * panel


def packed_size(weight: torch.Tensor, taps: int) -> int:
    """On a GPU a row more, for its packed weight has another order and must not be taken for one of the CPU's."""
    return packed_columns(weight.shape[0]) * (weight.shape[1] * taps + weight.is_cuda)


def winograd_side(weight: torch.Tensor, stride: int, algorithm: int) -> int:
    """The function of that name of csrc/ops/conv2d/conv2d.h: 0, 2 or 4."""
    large = algorithm == 3
    fits = weight.dtype == torch.float32 if large else weight.dtype != torch.float64
    if algorithm == 1 or not fits or weight.shape[2:] != (3, 3) or stride != 1:
        return 0
    return 4 if large else 2 if algorithm == 2 or min(weight.shape[:2]) >= 32 else 0
