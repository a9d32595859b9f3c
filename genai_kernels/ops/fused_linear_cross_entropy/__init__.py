"""fused_linear_cross_entropy: the loss of a language model from its last hidden states, without the logits."""

from __future__ import annotations

import math
from functools import partial

import torch

from ...registry import Accuracy, op
from ...torch_ops import autograd, fake, kernel, no_double_backward
from .reference import fused_linear_cross_entropy_reference, magnitude
from .samples import SAMPLES

__all__ = ["fused_linear_cross_entropy"]

_fused_linear_cross_entropy = kernel("fused_linear_cross_entropy")
_fused_linear_cross_entropy_bwd = kernel("fused_linear_cross_entropy_bwd")

_REDUCTIONS = ("none", "sum", "mean")


@op(
    reference=fused_linear_cross_entropy_reference,
    samples=SAMPLES,
    accuracy=Accuracy(backward=(1.25, 1.1), c_fp32=lambda x, *_, **__: math.sqrt(max(64, x.shape[-1]))),
    magnitude=magnitude,
    overloads=("fused_linear_cross_entropy", "fused_linear_cross_entropy_bwd"),
    gpu=("triton",),
)
def fused_linear_cross_entropy(
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
    """Cross entropy of the logits `x W' + b` and the classes `target`; the logits are never held whole.

    Rows go through in chunks of 32 MiB of logits (128 rows at least, 1024 at most). Where gradients are wanted, the
    same pass over a chunk computes them, and backward only scales: three products in all, as without fusion. Until
    backward they are held in float32, as large as x, weight and bias. Ignored rows are left out: they cost nothing,
    and NaN in them is not seen. Logits are float32 (float64 for float64), and so are all sums; results are rounded
    once. The loss of a row and its gradient have bits that depend on that row alone (but for the mean's divisor), and
    no bit depends on the number of threads.

    With `reduction="none"` the gradients of weight need each row's factor, which backward alone knows; so all of it is
    computed there, at the price of the logits once more: four products. So it is where backward is called twice on
    one graph, or with `create_graph=True`.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64. Rows whose elements do not lie side by side are copied.
        weight: `[vocabulary, in]`, dtype of x, any strides; fastest where `in` lies side by side, as in `nn.Linear`.
        target: `[...]`, the class of each row, int32 or int64.
        bias: `[vocabulary]`, dtype of x, or None.
        ignore_index: rows with this target have loss 0 and no gradient, and do not count in the mean.
        label_smoothing: the share of the wanted distribution that is uniform over the vocabulary, 0 to 1.
        softcap: logits become `softcap * tanh(logits / softcap)`; 0: they do not.
        z_loss: `z_loss * log(sum(exp(logits))) ** 2` is added to the loss of each row.
        reduction: "mean" over the rows that are not ignored (NaN if all are, as in PyTorch), "sum", or "none".
        return_z_loss: return the part of the loss that is z-loss too, without a gradient.

    Returns:
        The loss, a number or `[...]` for "none", float32 (float64 for float64); with `return_z_loss` that and the
        z-loss, reduced alike.

    Raises:
        ValueError: a shape or a number that does not fit.
        TypeError: a dtype that does not fit.
        IndexError: a target that is neither a class nor `ignore_index`, before anything is computed.

    Source: Hsu et al., "Liger Kernel", 2024 (gradients in forward); Chowdhery et al., "PaLM", 2022 (z-loss).
    Peers: `liger_kernel`'s function of this name, `torch.nn.functional.linear_cross_entropy`.

    >>> import torch, genai_kernels as gk
    >>> x, weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> gk.fused_linear_cross_entropy(x, weight, torch.tensor([2, -100]))
    tensor(0.4076)
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f'genai_kernels.fused_linear_cross_entropy: reduction: expected "mean", "sum" or "none", got {reduction!r}'
        )
    if x.dim() == 0 or x.shape[:-1] != target.shape:
        raise ValueError(
            "genai_kernels.fused_linear_cross_entropy: target: expected the shape of x without its last dimension, "
            f"{list(x.shape[:-1])}, got {list(target.shape)}"
        )
    rows = x if x.dim() == 2 else x.reshape(target.numel(), x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    wanted = [torch.is_grad_enabled() and reduction != "none" and t is not None and t.requires_grad
              for t in (x, weight, bias)]  # fmt: skip
    loss, z, *_ = _fused_linear_cross_entropy(
        rows, weight, target.reshape(-1), bias, ignore_index, label_smoothing, softcap, z_loss,
        _REDUCTIONS.index(reduction), *wanted,
    )  # fmt: skip
    if reduction == "none":
        loss, z = loss.view(target.shape), z.view(target.shape)
    return (loss, z) if return_z_loss else loss


def _sums(x, weight, for_x, for_weight, for_bias):
    """The shapes of the gradients, in the type that they are summed in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shapes = (x.shape if for_x else (0,), weight.shape if for_weight else (0,), weight.shape[:1] if for_bias else (0,))
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


@fake("fused_linear_cross_entropy")
def _(x, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss, reduction, *wanted):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    losses = [x.new_empty(target.shape if _REDUCTIONS[reduction] == "none" else (), dtype=dtype) for _ in range(2)]
    return *losses, *_sums(x, weight, *wanted)


@fake("fused_linear_cross_entropy_bwd")
def _(dloss, x, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss, *wanted):
    return _sums(x, weight, *wanted)


def _save(ctx, inputs, output):
    x, weight, target, bias, *ctx.numbers, ctx.reduction, for_x, for_weight, for_bias = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, target, bias)
    ctx.sums = [s if made else None for s, made in zip(output[2:], (for_x, for_weight, for_bias), strict=True)]


def _backward(ctx, dloss, *_, consume=False):
    if dloss is None:
        return (None,) * 12
    x, weight, target, bias = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    by_row = _REDUCTIONS[ctx.reduction] == "none"
    # divided by at the end: a rounded 1 / count would shift all elements alike
    count = (target != ctx.numbers[0]).sum().clamp_min(1) if _REDUCTIONS[ctx.reduction] == "mean" else 1
    if torch.is_grad_enabled() or any(w and s is None for w, s in zip(wanted, ctx.sums, strict=True)):
        factors = dloss if by_row else dloss.new_ones(1).expand(len(x))
        sums = _fused_linear_cross_entropy_bwd(factors, x, weight, target, bias, *ctx.numbers, *wanted)
        if not by_row:
            sums = [s * dloss / count for s in sums]
    elif consume:  # each is given away once
        sums = [s.mul_(dloss).div_(count) if w else s for w, s in zip(wanted, ctx.sums, strict=True)]
        ctx.sums = [None if w else s for w, s in zip(wanted, sums, strict=True)]
    else:
        sums = [s if s is None else s * dloss / count for s in ctx.sums]
    dx, dweight, dbias = (s.to(x.dtype) if w else None for w, s in zip(wanted, sums, strict=True))
    return dx, dweight, None, dbias, *[None] * 8


autograd("fused_linear_cross_entropy", _save, _backward, consuming=partial(_backward, consume=True))
no_double_backward("fused_linear_cross_entropy_bwd", "fused_linear_cross_entropy")
