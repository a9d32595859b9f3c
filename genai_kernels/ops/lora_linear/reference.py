"""lora_linear and its kin in plain PyTorch, as PEFT computes them: the layer, then each adapter, added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...philox import MASK32, philox
from ...quantized import QuantizedWeight, dense
from .adapters import LoRAAdapter
from .multi import ids_by_row

STREAM = 0x6C6F7261


def dropout_keep(rows: int, columns: int, p: float, seed: int) -> torch.Tensor:
    """Which elements of x dropout keeps: bool `[rows, columns]`; csrc/cpu/matmul.h says how they are drawn."""
    column, row = torch.arange(columns), torch.arange(rows)[:, None]
    words = torch.stack(philox(row & MASK32, column // 64 * 16 + column % 16, row >> 32, STREAM, seed))
    chosen = words.gather(0, (column % 64 // 16).expand(1, rows, columns))[0]
    return chosen >= min(int(p * 2**32), MASK32)


def _dropped(x: torch.Tensor, p: float, seed: int | None) -> torch.Tensor:
    if not p > 0:
        return x
    seed = int(torch.randint(2**62, (1,))) if seed is None else seed
    rows = x.reshape(-1, x.shape[-1])
    keep = dropout_keep(len(rows), rows.shape[1], p, seed).to(x.device)
    return (torch.where(keep, rows, 0) / (1 - p)).view(x.shape)


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch."""
    base = F.linear(x, dense(weight, x.dtype), bias)
    added = F.linear(F.linear(_dropped(x, dropout_p, seed).to(lora_a.dtype), lora_a), lora_b) * scaling
    return (base + added).to(x.dtype)


def lora_linear_multi_reference(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    adapters: Sequence[LoRAAdapter],
    adapter_ids: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch: a loop over the adapters."""
    ids = ids_by_row("lora_linear_multi", adapter_ids, x.shape[:-1], cu_seqlens, len(adapters))
    base = F.linear(x, dense(weight, x.dtype), bias)
    y = base.reshape(len(ids), base.shape[-1])
    dtype = torch.promote_types(x.dtype, adapters[0].lora_a.dtype) if adapters else x.dtype
    y, rows = y.to(dtype), _dropped(x, dropout_p, seed).reshape(len(ids), x.shape[-1])
    for i, adapter in enumerate(adapters):
        which = (ids == i).any(dim=1).nonzero().flatten().to(x.device)
        begin, end = adapter.columns or (0, y.shape[1])
        part = rows[which].to(adapter.lora_a.dtype)
        added = F.linear(F.linear(part, adapter.lora_a), adapter.lora_b) * adapter.scaling
        y = y.index_put((which[:, None], torch.arange(begin, end, device=x.device)), added.to(dtype), accumulate=True)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def dora_norm_reference(
    weight: torch.Tensor | QuantizedWeight, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """The same in plain PyTorch: the whole matrix, then the norms of its rows."""
    built = dense(weight, lora_a.dtype).to(lora_a.dtype) + scaling * (lora_b @ lora_a)
    return torch.linalg.vector_norm(built, dim=1).detach().to(torch.promote_types(torch.float32, lora_a.dtype))


def dora_linear_reference(
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
    """The same in plain PyTorch."""
    norm = dora_norm_reference(weight, lora_a, lora_b, scaling) if norm is None else norm
    added = F.linear(F.linear(_dropped(x, dropout_p, seed).to(lora_a.dtype), lora_a), lora_b) * scaling
    y = magnitude / norm * (F.linear(x, dense(weight, x.dtype)) + added)
    return (y if bias is None else y + bias).to(x.dtype)


def gated_reference(gate: Callable[[torch.Tensor], torch.Tensor], gate_last: bool) -> Callable[..., torch.Tensor]:
    def reference(
        x: torch.Tensor,
        weight: torch.Tensor | QuantizedWeight,
        bias: torch.Tensor | None = None,
        adapters: Sequence[LoRAAdapter] = (),
        adapter_ids: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The same in plain PyTorch: the layer, then the gate."""
        first, second = lora_linear_multi_reference(x, weight, adapters, adapter_ids, bias, **options).chunk(2, dim=-1)
        return first * gate(second) if gate_last else gate(first) * second

    return reference
