"""lora_linear and lora_linear_multi: a linear layer and its low-rank adapters in one product."""

from __future__ import annotations

import math

import torch

from ...registry import Accuracy, op
from ...torch_ops import autograd, fake, kernel, no_double_backward
from . import multi
from .adapters import LoRAAdapter
from .reference import lora_linear_multi_reference, lora_linear_reference
from .samples import (
    MULTI_SAMPLES,
    SAMPLES,
    lora_linear_magnitude,
    lora_linear_multi_magnitude,
    multi_gather,
    multi_loop,
    peft_eager,
)

__all__ = ["LoRAAdapter", "lora_linear", "lora_linear_multi"]

_lora_linear = kernel("lora_linear")
_lora_linear_bwd = kernel("lora_linear_bwd")
_linear_dw = kernel("linear_dw")


def _c_fp32(x, weight, *_, **__):
    return math.sqrt(max(64, x.shape[-1]))


@op(
    reference=lora_linear_reference,
    samples=SAMPLES,
    accuracy=Accuracy(backward=(1.25, 1.05), c_fp32=_c_fp32),
    magnitude=lora_linear_magnitude,
    peers={"peft": peft_eager},
    overloads=("lora_linear", "lora_linear_bwd"),
    gpu=(),
)
def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank adapter: `x W' + scaling * dropout(x) A' B' + bias`.

    One product: the `rank` columns of `scaling * dropout(x) A'` go on in the sums of `x W'`, so x is multiplied once
    and y written once. Everything is summed in float32 (float64 for float64) and rounded once, whatever the dtype of
    the adapter: what PEFT computes with float32 adapters, without its rounding in between. The bits of a row depend on
    that row alone, and for `scaling = 0` or a zero `lora_b` they are those of `linear`.

    Backward keeps x, `scaling * dropout(x) A'` and the seed; what was dropped is drawn again.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64, any strides.
        weight: `[out, in]`, dtype of x.
        lora_a: `[rank, in]`, float32 or the dtype of x; any rank.
        lora_b: `[out, rank]`, dtype of lora_a.
        scaling: PEFT's `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.
        bias: `[out]`, dtype of x, or None.
        dropout_p: probability of dropping an element of x on its way to the adapter, in [0, 1).
        seed: of the dropout; None draws one from torch's generator.

    Returns:
        `[..., out]`, dtype of x.

    Raises:
        ValueError: a shape that does not fit; `dropout_p` out of range; a scaling that is not finite.
        TypeError: a dtype that does not fit.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Peer: PEFT's `lora.Linear`.

    >>> import torch, genai_kernels as gk
    >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> gk.lora_linear(x, weight, torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]), scaling=0.5)
    tensor([[2.5000, 2.0000]])
    """
    if x.dim() == 0:
        raise ValueError("genai_kernels.lora_linear: x: expected [..., in], got shape []")
    rows = multi.as_rows(x)
    y, _ = _lora_linear(rows, weight, lora_a, lora_b, bias, multi.rng_state(dropout_p, seed), scaling, dropout_p)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


@op(
    reference=lora_linear_multi_reference,
    samples=MULTI_SAMPLES,
    accuracy=Accuracy(backward=(1.25, 1.05), c_fp32=_c_fp32),
    magnitude=lora_linear_multi_magnitude,
    peers={"loop": multi_loop, "gather": multi_gather},
    overloads=("lora_linear_multi", "lora_linear_multi_bwd"),
    gpu=(),
)
def lora_linear_multi(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: list[LoRAAdapter],
    adapter_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """A linear layer of which every row may have adapters of its own: `x W' + sum of scaling * x A' B' + bias`.

    The adapters stay where they are, each of its own rank: nothing is stacked, padded or gathered. The bits of a row
    depend on that row and its adapters alone: a row without an adapter has those of `linear`, one with an adapter those
    of `lora_linear`.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64, any strides.
        weight: `[out, in]`, dtype of x.
        adapters: any number, with one dtype: float32 or that of x. An adapter with `columns` adds to those of y only,
            as that of q in a product for q, k and v at once.
        adapter_ids: int32, on the CPU. `[...]` as x without its last dimension: the adapter of each row, -1 for none;
            or `[..., slots]`, several for a row, each once. With `cu_seqlens` `[n]` or `[n, slots]`, of each segment.
        bias: `[out]`, dtype of x, or None.
        cu_seqlens: int32 `[n + 1]`: segment i are rows `cu_seqlens[i]` up to `cu_seqlens[i + 1]` of x, flattened.
        dropout_p, seed: as in `lora_linear`; an element of x is dropped for all adapters of its row.

    Returns:
        `[..., out]`, dtype of x.

    Raises:
        IndexError: an id that is no adapter, before anything is computed.
        ValueError: a shape that does not fit; an adapter twice on a row.
        TypeError: a dtype that does not fit.

    Source: Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023. Peer: PEFT's mixed-adapter batches.

    >>> import torch, genai_kernels as gk
    >>> one = gk.LoRAAdapter(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]))
    >>> x, ids = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([-1, 0], dtype=torch.int32)
    >>> gk.lora_linear_multi(x, torch.eye(2), [one], ids)
    tensor([[ 1.,  2.],
            [10.,  4.]])
    """
    return multi.run(x, weight, adapters, adapter_ids, bias, cu_seqlens, dropout_p, seed)


@fake("lora_linear")
def _(x, weight, lora_a, lora_b, bias, rng_state, scaling, dropout_p):
    s = x.new_empty(x.shape[0] * -(-lora_a.shape[0] // 16) * 16, dtype=multi.compute_dtype(x))
    return x.new_empty(x.shape[0], weight.shape[0]), s


@fake("lora_linear_bwd")
def _(dy, x, weight, lora_a, lora_b, s, rng_state, scaling, dropout_p, for_x, for_adapters):
    found = lora_a.new_empty(lora_a.shape[0] * (weight.shape[1] + weight.shape[0]) if for_adapters else 0)
    return x.new_empty(x.shape[0] if for_x else 0, weight.shape[1]), found


def _save(ctx, inputs, output):
    x, weight, lora_a, lora_b, _, rng_state, ctx.scaling, ctx.dropout_p = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, rng_state, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    x, weight, lora_a, lora_b, rng_state, s = ctx.saved_tensors
    for_x, for_weight, for_a, for_b, for_bias = ctx.needs_input_grad[:5]
    dy = multi.as_rows(dy)
    dx = found = None
    if for_x or for_a or for_b:
        dx, found = _lora_linear_bwd(
            dy, x, weight, lora_a, lora_b, s, rng_state, ctx.scaling, ctx.dropout_p, for_x, for_a or for_b
        )
    da = db = None
    if found is not None and (for_a or for_b):
        ((da,), (db,)) = multi.split_gradients(found, [lora_a], [lora_b])
    return (
        dx if for_x else None, _linear_dw(dy, x) if for_weight else None,
        da if for_a else None, db if for_b else None,
        multi.sum_rows(dy) if for_bias else None, None, None, None,
    )  # fmt: skip


autograd("lora_linear", _save, _backward)
no_double_backward("lora_linear_bwd", "lora_linear")
