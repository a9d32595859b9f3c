"""merge_lora_ and unmerge_lora_: an adapter into its weight and out again, to the original bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...registry import python_errors
from ...torch_ops import fake, kernel, written

_merge = kernel("merge_lora_")

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class LoRAMerge(NamedTuple):
    """What `merge_lora_` rounded away, a byte an element, and how much that can be.

    Args:
        correction: int8 `[out, in]`: how far, in units of the last place, subtracting the adapter misses an element.
        elsewhere: int64 `[n]`: the elements, flattened, that it misses by more.
        originals: `[n]`, dtype of the weight: what these were.
        error_bound: float32 `[out]`: for each row the length of the largest possible difference between the merged
            weight and `W + scaling B A`: an output of the merged layer differs from the unmerged by at most
            `error_bound * |x|`, before it is itself rounded.

    >>> import torch, genai_kernels as gk
    >>> weight = torch.ones(1, 4, dtype=torch.bfloat16)
    >>> merge = gk.merge_lora_(weight, torch.ones(1, 4), torch.full((1, 1), 0.01))
    >>> weight[0, 0].item(), round(merge.error_bound.item(), 4)  # 1.01 lies between two bfloat16
    (1.0078125, 0.0079)
    """

    correction: torch.Tensor
    elsewhere: torch.Tensor
    originals: torch.Tensor
    error_bound: torch.Tensor


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(_INTEGERS[weight.element_size()])


@python_errors
def merge_lora_(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float = 1.0) -> LoRAMerge:
    """`weight += scaling B A` in place, summed in float32 (float64 for that) and rounded once.

    Args:
        weight: `[out, in]`, float32, bfloat16, float16 or float64, rows that lie along.
        lora_a: `[rank, in]`, float32 or the dtype of weight.
        lora_b: `[out, rank]`, dtype of lora_a.
        scaling: of the adapter.

    Returns:
        What `unmerge_lora_` needs beside the same adapter, and a bound of the rounding.

    Raises:
        ValueError: a shape that does not fit; a weight that requires a gradient outside of `torch.no_grad()`.
        TypeError: a dtype that does not fit.

    Peer: PEFT's `merge_adapter`, whose unmerge leaves the rounding of both in the weight.

    >>> import torch, genai_kernels as gk
    >>> weight, a, b = torch.full((1, 2), 0.1), torch.tensor([[1.0, 1e5]]), torch.tensor([[0.3]])
    >>> merge = gk.merge_lora_(weight, a, b)
    >>> weight
    tensor([[4.0000e-01, 3.0000e+04]])
    >>> gk.unmerge_lora_(weight, a, b, 1.0, merge)
    >>> weight
    tensor([[0.1000, 0.1000]])
    """
    _refuse_gradient("merge_lora_", weight)
    weight, a, b = weight.detach(), lora_a.detach(), lora_b.detach()
    before = weight.clone()
    _merge(weight, a, b, scaling)
    missed = weight.clone()
    _merge(missed, a, b, -scaling)
    difference = _bits(before).long() - _bits(missed).long()
    far = (difference > 127) | (difference < -127)  # no abs: the smallest integer has none
    correction = difference.masked_fill_(far, 0).to(torch.int8)
    elsewhere = far.flatten().nonzero().flatten()
    written(weight)
    return LoRAMerge(correction, elsewhere, before.flatten()[elsewhere], _error_bound(weight, a, b, scaling))


@python_errors
def unmerge_lora_(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, merge: LoRAMerge
) -> None:
    """The bits that weight had before `merge_lora_(weight, lora_a, lora_b, scaling)`, if nothing changed since.

    Args:
        weight, lora_a, lora_b, scaling: as in the call that merged.
        merge: what it returned.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that does not fit.

    >>> import torch, genai_kernels as gk
    >>> weight, a, b = torch.randn(4, 8).bfloat16(), torch.randn(2, 8), torch.randn(4, 2)
    >>> original = weight.clone()
    >>> gk.unmerge_lora_(weight, a, b, 0.5, gk.merge_lora_(weight, a, b, 0.5))
    >>> torch.equal(weight, original)
    True
    """
    _refuse_gradient("unmerge_lora_", weight)
    if merge.correction.shape != weight.shape or merge.originals.dtype != weight.dtype:
        raise ValueError(
            f"genai_kernels.unmerge_lora_: merge: expected that of a weight {list(weight.shape)} of {weight.dtype}, "
            f"got {list(merge.correction.shape)} of {merge.originals.dtype}"
        )
    weight = weight.detach()
    _merge(weight, lora_a.detach(), lora_b.detach(), -scaling)
    _bits(weight).add_(merge.correction)
    if len(merge.elsewhere):
        columns = weight.shape[1]
        weight[merge.elsewhere // columns, merge.elsewhere % columns] = merge.originals
    written(weight)


def _refuse_gradient(name: str, weight: torch.Tensor) -> None:
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"genai_kernels.{name}: weight: expected a call under torch.no_grad(), got one that records")


def _error_bound(merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """By row: half a unit in the last place of the result, and the rounding of `rank + 2` additions before it."""
    wide = torch.float64 if merged.dtype == torch.float64 else torch.float32
    u, sums = _ROUNDOFF[merged.dtype], (a.shape[0] + 2) * _ROUNDOFF[wide]
    of_rounding = torch.linalg.vector_norm(merged, dim=1, dtype=torch.float64) * (u / (1 - u))
    lengths = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    of_sums = (b.double().abs() @ lengths) * abs(scaling) * sums
    return ((of_rounding + of_sums) * (1 + 2.0**-20)).float()


@fake("merge_lora_")
def _(weight, lora_a, lora_b, scaling):
    return None
