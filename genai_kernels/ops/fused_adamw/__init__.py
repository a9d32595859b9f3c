"""fused_adamw_: a step of AdamW over lists of tensors in one pass; global_norm: the norm it clips by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...registry import op
from ...torch_ops import fake, kernel, written
from . import samples
from .reference import fused_adamw_reference, global_norm_reference, step_of

__all__ = ["fused_adamw_", "global_norm"]

_adamw = kernel("fused_adamw_")
_norm = kernel("global_norm")


def _listed(op_name: str, name: str, tensors: Any) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"genai_kernels.{op_name}: {name}: expected a list of tensors, got {type(tensors).__name__}")
    for i, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"genai_kernels.{op_name}: {name}[{i}]: expected a tensor, got {type(t).__name__}")
    return list(tensors)


def _check_range(name: str, value: Any, expected: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"genai_kernels.fused_adamw_: {name}: expected {expected}, got {value}")


@op(
    reference=global_norm_reference,
    samples=samples.NORM_SAMPLES,
    exact=True,
    differentiable=False,
    gpu=("triton",),
    overloads=("global_norm",),
    peers=samples.NORM_PEERS,
)
def global_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The square root of the sum of the squares of all elements of all tensors.

    Summed in float64, in pieces at fixed places: the same bits with any number of threads, and the same for a tensor
    that is cut at multiples of 16384 elements. Squares do not overflow. A NaN gives NaN, an infinity infinity.

    Args:
        tensors: float32, bfloat16 or float16, each dense: its elements fill its memory, in any order of the dimensions.

    Returns:
        float32, without dimensions, on the device of the first tensor; 0 of no tensor.

    Raises:
        ValueError: a tensor that is not dense.
        TypeError: dtypes that do not fit.

    Source: `torch.nn.utils.get_total_norm`.

    >>> import torch, genai_kernels as gk
    >>> gk.global_norm([torch.tensor([3.0]), torch.tensor([0.0, 4.0])])
    tensor(5.)
    """
    tensors = _listed("global_norm", "tensors", tensors)
    return _norm(tensors[0], tensors) if tensors else torch.zeros(())


@op(
    reference=fused_adamw_reference,
    samples=samples.SAMPLES,
    exact=True,
    differentiable=False,
    mutates=True,
    gpu=("triton",),
    overloads=("fused_adamw_",),
    peers=samples.PEERS,
)
def fused_adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    max_norm: float | None = None,
    grad_norm: torch.Tensor | None = None,
    masters: Sequence[torch.Tensor] | None = None,
    emas: Sequence[torch.Tensor] | None = None,
    ema_decay: float = 0.999,
) -> tuple[torch.Tensor, ...]:
    """A step of AdamW, in place: clipping, both moments, weight decay, the update and an average in one pass.

    For each parameter p with gradient g, in float32:

        g = g * min(1, max_norm / (grad_norm + 1e-6))          -g if maximize
        p = p * (1 - lr * weight_decay)
        m = m + (g - m) * (1 - beta1)                           exp_avgs
        v = v * beta2 + g^2 * (1 - beta2)                       exp_avg_sqs
        p = p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
        ema = ema + (p - ema) * (1 - ema_decay)

    The result does not depend on threads, on the instruction set, or on what else is in the lists, but for the norm.
    Everything is checked before anything is written.

    Args:
        params: float32, bfloat16 or float16, also mixed; each dense: its elements fill its memory, in any order of the
            dimensions. Like it, in shape and strides, all of the following:
        grads: the parameter's dtype or float32. They are not changed: clipping happens on the way.
        exp_avgs, exp_avg_sqs: float32.
        step: the number of this step, from 1 on.
        lr, eps, weight_decay: 0 or more.
        betas: each at least 0 and less than 1.
        max_norm: gradients are clipped to this norm, over all of them together; None for no clipping. As with
            `torch.nn.utils.clip_grad_norm_`, an infinite norm makes finite gradients 0 and infinite ones NaN, and one
            that is NaN makes all NaN: look at the norm that is returned.
        grad_norm: float32, one element: the norm, where it is of more tensors than these; default `global_norm(grads)`.
        masters: float32 copies of the parameters. A step begins from these and rounds to the parameters, whose own
            values are not read: many small steps add up, where bfloat16 would round each away.
        emas: float32, the running average of the parameters.
        ema_decay: 0 to 1.

    Returns:
        The tensors that were written, `(*params, *exp_avgs, *exp_avg_sqs, *masters, *emas)`, and the norm behind them
        if `max_norm` is given.

    Raises:
        ValueError: lists or shapes that do not fit, numbers out of range, tensors that overlap.
        TypeError: dtypes that do not fit.
        On a GPU, overlaps are not looked for.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; `torch.optim.AdamW`, whose update this
    is. `genai_kernels.optim.AdamW` is the optimizer around it.

    >>> import torch, genai_kernels as gk
    >>> p, g, m, v = torch.ones(3), torch.tensor([1.0, -1.0, 0.0]), torch.zeros(3), torch.zeros(3)
    >>> _ = gk.fused_adamw_([p], [g], [m], [v], step=1, lr=0.1, weight_decay=0.0)
    >>> p
    tensor([0.9000, 1.1000, 1.0000])
    """
    lists = [_listed("fused_adamw_", n, t) for n, t in (
        ("params", params), ("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs),
        ("masters", [] if masters is None else masters), ("emas", [] if emas is None else emas),
    )]  # fmt: skip
    if torch.is_grad_enabled() and any(t.requires_grad for tensors in lists for t in tensors):
        raise NotImplementedError("genai_kernels.fused_adamw_: it has no gradient; call it under torch.no_grad()")
    _check_range("step", step, "an integer from 1 on", isinstance(step, int) and step >= 1)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        _check_range(name, value, "a finite number >= 0", math.isfinite(value) and value >= 0)
    _check_range("betas", betas, "two numbers >= 0 and < 1", len(betas) == 2 and all(0 <= b < 1 for b in betas))
    _check_range("ema_decay", ema_decay, "0 <= decay <= 1", 0 <= ema_decay <= 1)
    _check_range("max_norm", max_norm, "a number >= 0, or None", max_norm is None or max_norm >= 0)
    if max_norm is None:
        _check_range("grad_norm", "a tensor", "None without max_norm", grad_norm is None)
    elif grad_norm is None:
        grad_norm = global_norm(lists[1])
    if lists[0] or any(lists[1:]):
        numbers = step_of(step, lr, betas, weight_decay)
        like = next(t for tensors in lists for t in tensors) if grad_norm is None else grad_norm
        _adamw(
            like, *lists, -1.0 if max_norm is None else max_norm, maximize, numbers.keep, *betas, numbers.root_scale,
            eps, numbers.rate, ema_decay,
        )  # fmt: skip
    changed = [t for tensors in (lists[0], *lists[2:]) for t in tensors]
    written(*changed)
    return (*changed, *([] if grad_norm is None else [grad_norm]))


@fake("global_norm")
def _(like, tensors):
    return like.new_empty((), dtype=torch.float32)


@fake("fused_adamw_")
def _(*_):
    return None
