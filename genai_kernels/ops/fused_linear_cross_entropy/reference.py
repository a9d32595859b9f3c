"""fused_linear_cross_entropy in plain PyTorch, and how large the terms of its results are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def fused_linear_cross_entropy_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    return_z_loss: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `genai_kernels.fused_linear_cross_entropy`. Logits of a 16-bit type are converted, as models of it do."""
    logits = _float(F.linear(x, weight, bias)).reshape(target.numel(), len(weight))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    classes = target.reshape(-1).long()
    kept = classes != ignore_index
    loss = F.cross_entropy(
        logits, classes, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    z = loss.new_zeros(loss.shape)
    if z_loss:
        z = torch.where(kept, z_loss * logits.logsumexp(-1).square(), z)
        loss = loss + z
    loss, z = (_reduced(t, target, kept, reduction) for t in (loss, z.detach()))
    return (loss, z) if return_z_loss else loss


def _float(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _reduced(t: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return t.view(target.shape)
    return t.sum() / kept.sum() if reduction == "mean" else t.sum()


def magnitude(x, weight, target, bias=None, *, ignore_index=-100, z_loss=0.0, reduction="mean", **options):
    """A loss moves by no more than its logits do, and these are sums of |x| |w| and |b|."""
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs()).reshape(target.numel(), len(weight))
    size = (size.amax(-1) if size.numel() else size.sum(-1)) + math.log(max(2, weight.shape[0]))
    kept = target.reshape(-1) != ignore_index
    size = torch.where(kept, size, 0)
    z = z_loss * size.square()
    loss, z = (_reduced(t, target, kept, reduction) for t in (size + 3 * z, 3 * z))
    return (loss, z) if options.get("return_z_loss") else loss
