"""What an adapter is."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LoRAAdapter(NamedTuple):
    """A low-rank adapter of a linear layer, in PEFT's layout.

    Args:
        lora_a: `[rank, in]`.
        lora_b: `[out, rank]`, or as many rows as there are `columns`.
        scaling: PEFT's `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.
        columns: `(begin, end)`: the columns of y that it adds to; None: all of them.

    >>> import torch, genai_kernels as gk
    >>> gk.LoRAAdapter(torch.zeros(8, 64), torch.zeros(32, 8), scaling=2.0).rank
    8
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float = 1.0
    columns: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]
