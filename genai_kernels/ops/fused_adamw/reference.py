"""fused_adamw_ and global_norm in plain PyTorch, and the numbers of a step that both share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensors = Sequence[torch.Tensor]


class Step(NamedTuple):
    """What a step multiplies by, in double precision; rounded to float32 once."""

    keep: float  # 1 - lr weight_decay
    root_scale: float  # 1 / sqrt(1 - beta2^step)
    rate: float  # lr / (1 - beta1^step)


def step_of(step: int, lr: float, betas: tuple[float, float], weight_decay: float) -> Step:
    return Step(1 - lr * weight_decay, 1 / math.sqrt(1 - betas[1] ** step), lr / (1 - betas[0] ** step))


def global_norm_reference(tensors: Tensors) -> torch.Tensor:
    """See `genai_kernels.global_norm`."""
    total = sum((t.double().square().sum() for t in tensors), torch.zeros((), dtype=torch.float64))
    return total.sqrt().float()


def fused_adamw_reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    max_norm: float | None = None,
    grad_norm: torch.Tensor | None = None,
    masters: Tensors | None = None,
    emas: Tensors | None = None,
    ema_decay: float = 0.999,
) -> tuple[torch.Tensor, ...]:
    """See `genai_kernels.fused_adamw_`."""
    keep, root_scale, rate = step_of(step, lr, betas, weight_decay)
    clip = 1.0
    if max_norm is not None:
        grad_norm = global_norm_reference(grads) if grad_norm is None else grad_norm
        share = max_norm / (float(grad_norm) + 1e-6)
        clip = 1.0 if share > 1 else share
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = g.to(m.dtype) * (-clip if maximize else clip)
        x = (p if masters is None else masters[i]).to(m.dtype) * keep
        m.copy_(m + (g - m) * (1 - betas[0]))
        v.copy_(v * betas[1] + g * g * (1 - betas[1]))
        root = v.double().sqrt().to(v.dtype)  # of float32 alone, PyTorch's is not always the nearest number
        x = x - m / (root * root_scale + eps) * rate
        p.copy_(x)
        if masters is not None:
            masters[i].copy_(x)
        if emas is not None:
            emas[i].copy_(emas[i] + (x - emas[i]) * (1 - ema_decay))
    norms = () if max_norm is None else (grad_norm,)
    return (*params, *exp_avgs, *exp_avg_sqs, *(masters or ()), *(emas or ()), *norms)  # type: ignore[return-value]
