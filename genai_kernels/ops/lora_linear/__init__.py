"""lora_linear and its kin: a linear layer and its low-rank adapters in one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...quantized import QuantizedWeight
from ...registry import Accuracy, op
from . import multi, single
from .adapters import LoRAAdapter
from .dora import dora_linear, dora_norm
from .gated import linear_geglu, linear_geglu_tanh, linear_swiglu
from .merge import LoRAMerge, merge_lora_, unmerge_lora_
from .reference import lora_linear_multi_reference, lora_linear_reference
from .samples import (
    MULTI_SAMPLES,
    SAMPLES,
    c_fp32,
    lora_linear_magnitude,
    lora_linear_multi_magnitude,
    multi_gather,
    multi_loop,
    peft_eager,
)

__all__ = [
    "LoRAAdapter",
    "LoRAMerge",
    "dora_linear",
    "dora_norm",
    "linear_geglu",
    "linear_geglu_tanh",
    "linear_swiglu",
    "lora_linear",
    "lora_linear_multi",
    "merge_lora_",
    "unmerge_lora_",
]


@op(
    reference=lora_linear_reference,
    samples=SAMPLES,
    accuracy=Accuracy(backward=(1.25, 1.05), c_fp32=c_fp32),
    magnitude=lora_linear_magnitude,
    peers={"peft": peft_eager},
    overloads=("lora_linear", "lora_linear_bwd"),
    gpu=("triton",),
)
def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
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
        weight: `[out, in]`, dtype of x; or of `quantize_int8`, `quantize_int4` or `quantize_nf4`, unpacked inside the
            product, forward and backward (QLoRA), and without a gradient.
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
    return single.run("lora_linear", x, weight, lora_a, lora_b, scaling, bias, dropout_p, seed)


@op(
    reference=lora_linear_multi_reference,
    samples=MULTI_SAMPLES,
    accuracy=Accuracy(backward=(1.25, 1.05), c_fp32=c_fp32),
    magnitude=lora_linear_multi_magnitude,
    peers={"loop": multi_loop, "gather": multi_gather},
    overloads=("lora_linear_multi", "lora_linear_multi_bwd"),
    gpu=("triton",),
    on_cpu=("adapter_ids", "cu_seqlens"),
)
def lora_linear_multi(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    adapters: Sequence[LoRAAdapter],
    adapter_ids: torch.Tensor | None,
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
        weight: as in `lora_linear`.
        adapters: any number, with one dtype: float32 or that of x. An adapter with `columns` adds to those of y only,
            as that of q in a product for q, k and v at once.
        adapter_ids: int32, on the CPU. `[...]` as x without its last dimension: the adapter of each row, -1 for none;
            or `[..., slots]`, several for a row, each once. None: every row has them all. With `cu_seqlens` `[n]` or
            `[n, slots]`, of each segment.
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
    return multi.run("lora_linear_multi", x, weight, adapters, adapter_ids, bias, cu_seqlens, dropout_p, seed)
