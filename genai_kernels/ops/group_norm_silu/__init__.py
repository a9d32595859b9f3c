"""group_norm_silu: group normalisation and the activation after it; group_norm_stats: the statistics alone."""

from __future__ import annotations

import math
from typing import overload

import torch

from ...registry import op
from ...torch_ops import autograd, fake, kernel, no_double_backward
from .reference import ACTIVATIONS, Pair, group_norm_silu_reference, group_norm_stats_reference
from .reference import magnitude as _magnitude
from .reference import stats_magnitude as _stats_magnitude
from .samples import SAMPLES, STATS

__all__ = ["group_norm_silu", "group_norm_stats"]

_group_norm_silu = kernel("group_norm_silu")
_add_group_norm_silu = kernel("add_group_norm_silu")
_group_norm_silu_bwd = kernel("group_norm_silu_bwd")
_group_norm_stats = kernel("group_norm_stats")
# in the order of GroupActivation in csrc
_CODES = {name: code for code, name in enumerate(("none", "silu", "gelu", "gelu_tanh", "relu"))}
assert _CODES.keys() == ACTIVATIONS.keys()


def _spatial_is_dense(t: torch.Tensor, between_pixels: int) -> bool:
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if size != 1:
            if stride != between_pixels:
                return False
            between_pixels *= size
    return True


def _has_order(t: torch.Tensor, channels_last: bool) -> bool:
    """What csrc/ops/group_norm_silu/group_norm_silu.cpp takes: each sample dense, or the pixels at one distance."""
    if not channels_last:
        return (t.shape[1] == 1 or t.stride(1) == math.prod(t.shape[2:])) and _spatial_is_dense(t, 1)
    distances = [stride for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size != 1]
    return (t.shape[1] == 1 or t.stride(1) == 1) and _spatial_is_dense(t, distances[-1] if distances else 1)


def _is_channels_last(x: torch.Tensor) -> bool | None:
    """The order of x, or None for strides that are neither."""
    if x.dim() < 2 or x.is_contiguous() or x.numel() == 0 or _has_order(x, False):
        return False
    return True if _has_order(x, True) else None


def _in_order(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """t itself where it has the order, otherwise a copy."""
    if t.dim() < 2 or t.numel() == 0 or _has_order(t, channels_last):
        return t
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t.contiguous()


def _per_sample(t: torch.Tensor | None) -> torch.Tensor | None:
    """`[N, C, 1, ...]`, as it is broadcast elsewhere, as `[N, C]`."""
    if t is None or t.dim() <= 2 or math.prod(t.shape[2:]) != 1:
        return t
    return t.reshape(t.shape[:2])


@overload
def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: None = None,
) -> torch.Tensor: ...


@overload
def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor,
) -> Pair: ...


@overload
def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | Pair: ...


@op(
    reference=group_norm_silu_reference,
    samples=SAMPLES,
    magnitude=_magnitude,
    gpu=("triton",),
    overloads=("group_norm_silu", "add_group_norm_silu", "group_norm_silu_bwd"),
)
def group_norm_silu(
    x,
    num_groups,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    activation="silu",
    scale=None,
    shift=None,
    residual=None,
):
    """Group normalisation, modulation and activation: `act(norm(s) * (1 + scale) + shift)`.

    `norm(s)` is `(s - mean) / sqrt(var + eps) * weight + bias` with the mean and variance of each group of
    C / num_groups channels of a sample. s is x, or `x + residual` in the dtype of x, then returned too: the end of one
    ResNet block, its shortcut, and the norm at the beginning of the next. Computed in float32 (float64 for float64) and
    rounded once, sums in a fixed order: the same bits whatever the other samples and threads. Statistics are shifted: a
    mean far larger than the deviation costs no digits in either memory format, as it does in PyTorch's channels_last.

    Args:
        x: `[N, C, ...]` with any number of spatial dimensions, float32, bfloat16, float16 or float64. Channels first
            with each sample contiguous, and channels last with pixels at one distance, are read where they are, parts
            of the channels of a channels-last tensor too; other strides are copied first.
        num_groups: a divisor of C.
        weight, bias: `[C]`, any of these dtypes, or None.
        eps: added to the variance, >= 0.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu" or "none".
        scale, shift: `[N, C]` (or `[N, C, 1, ...]`), any of these dtypes, any strides, or None: what diffusers makes of
            a time embedding with `time_embedding_norm="scale_shift"`.
        residual: shape and dtype of x, or None; copied if its memory format is not that of x.

    Returns:
        `[N, C, ...]`, dtype and memory format of x; with a residual `(y, new_residual)`, where `new_residual` is s.

    Raises:
        ValueError: a shape that does not fit; an unknown activation.
        TypeError: a dtype that does not fit.

    Source: Wu and He, "Group Normalization", 2018; the ResnetBlock2D of diffusers.
    Peer: `F.silu(F.group_norm(x, num_groups, weight, bias, eps))`.

    >>> import torch, genai_kernels as gk
    >>> x = torch.tensor([[[1.0, 3.0], [10.0, 30.0]]])
    >>> gk.group_norm_silu(x, 2, eps=0.0)
    tensor([[[-0.2689,  0.7311],
             [-0.2689,  0.7311]]])
    >>> gk.group_norm_silu(x, 2, eps=0.0, activation="none", scale=torch.ones(1, 2), shift=torch.tensor([[0.0, 5.0]]))
    tensor([[[-2.,  2.],
             [ 3.,  7.]]])
    """
    if activation not in _CODES:
        raise ValueError(
            f"genai_kernels.group_norm_silu: activation: expected one of {', '.join(_CODES)}, got {activation!r}"
        )
    last = _is_channels_last(x)
    if last is None:
        x, last = x.contiguous(), False
    numbers = num_groups, eps, _CODES[activation]
    if scale is not None or shift is not None:
        scale, shift = _per_sample(scale), _per_sample(shift)
    if residual is None:
        return _group_norm_silu(x, weight, bias, scale, shift, *numbers)[0]
    return _add_group_norm_silu(x, _in_order(residual, last), weight, bias, scale, shift, *numbers)[:2]


@op(
    reference=group_norm_stats_reference,
    samples=STATS,
    magnitude=_stats_magnitude,
    differentiable=False,
    gpu=("triton",),
    overloads=("group_norm_stats",),
)
def group_norm_stats(x: torch.Tensor, num_groups: int, eps: float = 1e-5) -> Pair:
    """Mean and `1 / sqrt(var + eps)` of each group of channels: what a norm is folded into another op with.

    The statistics of `group_norm_silu`, in its order of sums: `(x - mean) * rstd` of a group is its norm. No gradient.

    Args:
        x: `[N, C, ...]`, float32, bfloat16, float16 or float64, in the memory formats of `group_norm_silu`.
        num_groups: a divisor of C.
        eps: added to the variance, >= 0.

    Returns:
        `(mean, rstd)`, each `[N, num_groups]`, float32, or float64 for float64.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that does not fit.

    Source: Wu and He, "Group Normalization", 2018. Peer: `torch.native_group_norm`.

    >>> import torch, genai_kernels as gk
    >>> gk.group_norm_stats(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]), 2, eps=0.0)
    (tensor([[ 2., 20.]]), tensor([[1.0000, 0.1000]]))
    """
    return _group_norm_stats(x.contiguous() if _is_channels_last(x) is None else x, num_groups, eps)


def _new_image(x: torch.Tensor) -> torch.Tensor:
    if not _is_channels_last(x):
        return x.new_empty(x.shape)
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)


def _new_stats(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float64)


@fake("group_norm_silu")
def _(x, weight, bias, scale, shift, num_groups, eps, activation):
    return _new_image(x), _new_stats(x, num_groups)


@fake("add_group_norm_silu")
def _(x, residual, weight, bias, scale, shift, num_groups, eps, activation):
    return _new_image(x), _new_image(x), _new_stats(x, num_groups)


@fake("group_norm_stats")
def _(x, num_groups, eps):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(x.new_empty((x.shape[0], num_groups), dtype=dtype) for _ in range(2))


@fake("group_norm_silu_bwd")
def _(dy, dsum, x, weight, bias, scale, shift, stats, num_groups, eps, activation, *wanted):
    parameters = zip((weight, bias, scale, shift), wanted, strict=True)
    return (
        _new_image(x),
        *(x.new_empty(0) if t is None or not grad else t.new_empty(t.shape) for t, grad in parameters),
    )


def _save(ctx, inputs, output):
    x, weight, bias, scale, shift, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1])


def _save_sum(ctx, inputs, output):
    _, _, weight, bias, scale, shift, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1], weight, bias, scale, shift, output[2])


def _gradients(ctx, dy, dsum, wanted):
    """dx, and the gradients of weight, bias, scale and shift where they are wanted."""
    x, *parameters, stats = ctx.saved_tensors
    last = bool(_is_channels_last(x))
    dy = torch.zeros_like(x) if dy is None else _in_order(dy, last)
    dsum = None if dsum is None else _in_order(dsum, last)
    dx, *others = _group_norm_silu_bwd(dy, dsum, x, *parameters, stats, *ctx.numbers, *wanted)
    return dx, *(g if grad else None for g, grad in zip(others, wanted, strict=True))


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    return (*_gradients(ctx, dy, None, ctx.needs_input_grad[1:5]), None, None, None)


def _backward_sum(ctx, dy, dsum, _):
    if dy is None and dsum is None:
        return (None,) * 9
    dx, *others = _gradients(ctx, dy, dsum, ctx.needs_input_grad[2:6])
    return (dx, dx, *others, None, None, None)


autograd("group_norm_silu", _save, _backward)
autograd("add_group_norm_silu", _save_sum, _backward_sum)
no_double_backward("group_norm_silu_bwd", "group_norm_silu")
