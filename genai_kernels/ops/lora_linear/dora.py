"""dora_linear and dora_norm: an adapter that learns the lengths of the weight's rows apart from their directions."""

from __future__ import annotations

import torch

from ...quantized import QuantizedWeight, weight_arguments
from ...registry import Accuracy, op
from ...torch_ops import fake, kernel
from . import single
from .dora_samples import DORA_NORM_SAMPLES, DORA_SAMPLES, dora_linear_magnitude, dora_norm_magnitude, dora_peft
from .reference import dora_linear_reference, dora_norm_reference
from .samples import c_fp32

_dora_norm = kernel("dora_norm")


@op(
    reference=dora_norm_reference,
    samples=DORA_NORM_SAMPLES,
    accuracy=Accuracy(),
    magnitude=dora_norm_magnitude,
    differentiable=False,
    overloads=("dora_norm",),
    gpu=("triton",),
)
def dora_norm(
    weight: torch.Tensor | QuantizedWeight, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """The lengths of the rows of `W + scaling B A`, without that matrix; without a gradient.

    From `|W|^2 + 2 scaling (W A') . B + scaling^2 (B A A') . B`, row by row: one thin product that reads W. A row of
    which B A cancels nearly all is built after all, so that none loses more than 6 bits.

    Args:
        weight: `[out, in]`, float32, bfloat16, float16 or float64; or a quantized one.
        lora_a: `[rank, in]`, float32 or the dtype of weight.
        lora_b: `[out, rank]`, dtype of lora_a.
        scaling: of the adapter.

    Returns:
        `[out]`, float32 (float64 for that).

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that does not fit.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, section 4.3: the norm takes no gradient.

    >>> import torch, genai_kernels as gk
    >>> gk.dora_norm(torch.eye(2), torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0], [1.0]]))
    tensor([1., 4.])
    """
    data, *quantized = weight_arguments(weight)
    if isinstance(weight, QuantizedWeight) and lora_a.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"genai_kernels.dora_norm: lora_a: expected [rank, {weight.shape[1]}], got shape {list(lora_a.shape)}"
        )
    return _dora_norm(data.detach(), lora_a.detach(), lora_b.detach(), scaling, *quantized)


@op(
    reference=dora_linear_reference,
    samples=DORA_SAMPLES,
    accuracy=Accuracy(backward=(1.25, 1.05), c_fp32=c_fp32),
    magnitude=dora_linear_magnitude,
    peers={"peft": dora_peft},
    overloads=("lora_linear", "lora_linear_bwd", "scale_columns_bwd", "dora_norm"),
    gpu=("triton",),
)
def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    *,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a DoRA adapter: `magnitude / norm * (x W' + scaling * dropout(x) A' B') + bias`.

    `lora_linear` with a factor for each column of its sums, before they are rounded. Backward keeps, besides what
    `lora_linear` keeps, what the factor multiplies. Without dropout it is what PEFT computes; with it PEFT drops
    elements of x for `(magnitude / norm - 1) x W'` too.

    Args:
        x, weight, lora_a, lora_b, scaling, bias, dropout_p, seed: as in `lora_linear`.
        magnitude: `[out]`, any floating dtype; at first the lengths of the rows of weight.
        norm: `[out]`, of `dora_norm`, as it was before: where the adapter does not change it need not be computed
            again. None: compute it. It takes no gradient.

    Returns:
        `[..., out]`, dtype of x.

    Raises:
        ValueError: a shape that does not fit; `dropout_p` out of range; a scaling that is not finite.
        TypeError: a dtype that does not fit.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024. Peer: PEFT with `use_dora=True`.

    >>> import torch, genai_kernels as gk
    >>> x, a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0], [1.0]])
    >>> gk.dora_linear(x, torch.eye(2), a, b, magnitude=torch.tensor([1.0, 2.0]))
    tensor([[1., 4.]])
    """
    if norm is None:
        norm = dora_norm(weight, lora_a, lora_b, scaling)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if magnitude.shape != norm.shape:
        raise ValueError(
            f"genai_kernels.dora_linear: magnitude: expected {list(norm.shape)} as norm, got {list(magnitude.shape)}"
        )
    factor = magnitude.to(dtype) / norm.detach().to(dtype)
    return single.run("dora_linear", x, weight, lora_a, lora_b, scaling, bias, dropout_p, seed, factor)


@fake("dora_norm")
def _(weight, lora_a, lora_b, scaling, *quantized):
    return lora_a.new_empty(weight.shape[0], dtype=single.compute_dtype(lora_a))
