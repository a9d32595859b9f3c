"""conv2d_stats: the statistics that a norm before a convolution takes of its input."""

from __future__ import annotations

import torch

from ...registry import Accuracy, op
from ...torch_ops import fake, kernel
from .layout import readable
from .reference import Stats, conv2d_stats_reference, stats_c, stats_magnitude
from .samples import STATS

_conv2d_stats = kernel("conv2d_stats")


@op(
    reference=conv2d_stats_reference,
    samples=STATS,
    magnitude=stats_magnitude,
    accuracy=Accuracy(c_fp32=stats_c),
    differentiable=False,
    gpu=("triton",),
    overloads=("conv2d_stats",),
)
def conv2d_stats(x: torch.Tensor, num_groups: int, eps: float = 1e-5, *, skip: torch.Tensor | None = None) -> Stats:
    """Mean and `1 / sqrt(var + eps)` of each group of channels of [x, skip], as `conv2d` takes them for its norm.

    For a map that is convolved in bands: with `GroupNormPrologue(..., stats=conv2d_stats(whole, ...))` a band's pixels
    have the bits that they have in a call with the whole map. No gradient.

    Args:
        x: `[N, C, H, W]`, float32, bfloat16, float16 or float64, in the memory formats of `conv2d`.
        num_groups: a divisor of the channels of x and skip together.
        eps: added to the variance, >= 0.
        skip: `[N, C2, H, W]`: more channels.

    Returns:
        `(mean, rstd)`, each `[N, num_groups]`, float64: a mean that is far larger than the deviation needs the digits.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that does not fit.

    Source: Wu and He, "Group Normalization", 2018; Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
    for Computing Sample Variances", 1979. Peer: `torch.native_group_norm`.

    >>> import torch, genai_kernels as gk
    >>> mean, rstd = gk.conv2d_stats(torch.tensor([[[[1.0, 3.0]], [[10.0, 30.0]]]]), 2, eps=0.0)
    >>> mean.tolist(), rstd.tolist()
    ([[2.0, 20.0]], [[1.0, 0.1]])
    """
    with torch.no_grad():
        return unpacked_stats(_conv2d_stats(readable(x), None if skip is None else readable(skip), num_groups, eps))


@fake("conv2d_stats")
def _(x, skip, num_groups, eps):
    return new_stats(x, num_groups)


def new_stats(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Of no samples where there are no groups."""
    return x.new_empty((x.shape[0] if groups else 0, groups, 2), dtype=torch.float64)


def unpacked_stats(stats: torch.Tensor) -> Stats:
    mean, rstd = stats.unbind(-1)
    return mean, rstd


def packed_stats(stats: Stats, batch: int, groups: int) -> torch.Tensor:
    """As the kernels read them: `[batch, groups, 2]`, float64."""
    for name, t in zip(("mean", "rstd"), stats, strict=True):
        if t.shape != (batch, groups):
            raise ValueError(
                f"genai_kernels.conv2d: norm.stats.{name}: expected shape [{batch}, {groups}], got {list(t.shape)}"
            )
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"genai_kernels.conv2d: norm.stats.{name}: expected float32 or float64, "
                f"got {str(t.dtype).removeprefix('torch.')}"
            )
    return torch.stack([t.double() for t in stats], -1)
