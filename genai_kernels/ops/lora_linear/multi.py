"""lora_linear_multi on its torch op: arguments made plain, and gradients of lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...torch_ops import fake, kernel
from .adapters import LoRAAdapter

_NAME = "genai_kernels.lora_linear_multi"
_linear_dw = kernel("linear_dw")
_multi = torch.ops.genai_kernels.lora_linear_multi.default
_multi_bwd = torch.ops.genai_kernels.lora_linear_multi_bwd.default


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`[rows, n]` with its elements side by side: a view wherever x allows it."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def rng_state(dropout_p: float, seed: int | None) -> torch.Tensor | None:
    if not dropout_p > 0:
        return None
    return torch.randint(2**62, (1,)) if seed is None else torch.tensor([seed])


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sum_rows(dy: torch.Tensor) -> torch.Tensor:
    """The sum over rows, a product with ones: in the order of the other gradients, whatever the threads."""
    return _linear_dw(dy, dy.new_ones(1, 1).expand(len(dy), 1)).view(-1)


def split_gradients(
    found: torch.Tensor, lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """dA `[rank, in]` and dB `[out, rank]` of each adapter, from where backward laid them: dA, then dB transposed."""
    das, dbs, at = [], [], 0
    for a, b in zip(lora_a, lora_b, strict=True):
        das.append(found[at : at + a.numel()].view(a.shape))
        at += a.numel()
        dbs.append(found[at : at + b.numel()].view(b.shape[1], b.shape[0]).t())
        at += b.numel()
    return das, dbs


def ids_by_row(adapter_ids: torch.Tensor, shape: torch.Size, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """int32 `[rows, slots]` of ids given by row or by segment."""
    rows = math.prod(shape)
    if adapter_ids.dtype != torch.int32:
        raise TypeError(f"{_NAME}: adapter_ids: expected int32, got {adapter_ids.dtype}")
    if adapter_ids.device.type not in ("cpu", "meta"):
        raise ValueError(f"{_NAME}: adapter_ids: expected them on the CPU, got {adapter_ids.device}")
    if cu_seqlens is None:
        if adapter_ids.shape not in (shape, (*shape, *adapter_ids.shape[-1:])):
            raise ValueError(
                f"{_NAME}: adapter_ids: expected {list(shape)}, one for each row of x, or several in a last "
                f"dimension, got shape {list(adapter_ids.shape)}"
            )
        slots = 1 if adapter_ids.shape == shape else adapter_ids.shape[-1]
        return adapter_ids.reshape(rows, slots).contiguous()
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{_NAME}: cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if adapter_ids.dim() not in (1, 2) or cu_seqlens.shape != (adapter_ids.shape[0] + 1,):
        raise ValueError(
            f"{_NAME}: cu_seqlens: expected [n + 1] for adapter_ids [n] or [n, slots], got shapes "
            f"{list(cu_seqlens.shape)} and {list(adapter_ids.shape)}"
        )
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != rows or bool((lengths < 0).any()):
        raise ValueError(f"{_NAME}: cu_seqlens: expected to rise from 0 to {rows}, the rows of x, got {cu_seqlens}")
    ids = adapter_ids if adapter_ids.dim() == 2 else adapter_ids.unsqueeze(1)
    return ids.repeat_interleave(lengths.long(), dim=0).contiguous()


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[LoRAAdapter],
    adapter_ids: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    dropout_p: float,
    seed: int | None,
) -> torch.Tensor:
    if x.dim() == 0:
        raise ValueError(f"{_NAME}: x: expected [..., in], got shape []")
    ids = ids_by_row(adapter_ids, x.shape[:-1], cu_seqlens)
    columns = [(0, weight.shape[0]) if a.columns is None else a.columns for a in adapters]
    y, _ = _multi(
        as_rows(x), weight, [a.lora_a for a in adapters], [a.lora_b for a in adapters],
        torch.tensor([float(a.scaling) for a in adapters], dtype=torch.float64),
        torch.tensor(columns, dtype=torch.int64).view(-1, 2), ids, bias, rng_state(dropout_p, seed), dropout_p,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


@fake("lora_linear_multi")
def _(x, weight, lora_a, lora_b, scalings, columns, adapter_ids, bias, rng_state, dropout_p):
    size = torch.library.get_ctx().new_dynamic_size()  # how many rows have which adapter is in the ids
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(size, dtype=compute_dtype(x))


@fake("lora_linear_multi_bwd")
def _(dy, x, weight, lora_a, lora_b, scalings, columns, adapter_ids, s, rng_state, dropout_p, for_x, for_adapters):
    size = sum(a.numel() + b.numel() for a, b in zip(lora_a, lora_b, strict=True)) if for_adapters else 0
    found = lora_a[0].new_empty(size) if lora_a else x.new_empty(0)
    return x.new_empty(x.shape[0] if for_x else 0, weight.shape[1]), found


def _save(ctx, inputs, output):
    x, weight, lora_a, lora_b, *others, _, state, ctx.dropout_p = inputs
    ctx.count = len(lora_a)
    ctx.save_for_backward(x, weight, state, output[1], *others, *lora_a, *lora_b)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    x, weight, state, s, scalings, columns, ids, *lists = ctx.saved_tensors
    lora_a, lora_b = lists[: ctx.count], lists[ctx.count :]
    for_x, for_weight, for_a, for_b, *_, for_bias, _, _ = ctx.needs_input_grad
    dy, for_adapters = as_rows(dy), any(for_a) or any(for_b)
    dx = None
    das: list[torch.Tensor | None] = [None] * ctx.count
    dbs: list[torch.Tensor | None] = [None] * ctx.count
    if for_x or for_adapters:
        dx, found = _multi_bwd(
            dy, x, weight, lora_a, lora_b, scalings, columns, ids, s, state, ctx.dropout_p, for_x, for_adapters
        )
        if for_adapters:
            all_a, all_b = split_gradients(found, lora_a, lora_b)
            das = [g if wanted else None for g, wanted in zip(all_a, for_a, strict=True)]
            dbs = [g if wanted else None for g, wanted in zip(all_b, for_b, strict=True)]
    return (
        dx if for_x else None, _linear_dw(dy, x) if for_weight else None, das, dbs, None, None, None,
        sum_rows(dy) if for_bias else None, None, None,
    )  # fmt: skip


def _refuse(ctx, *grads):
    raise NotImplementedError(
        f"{_NAME}: double backward is not implemented; "
        f'use genai_kernels.use_backend("reference") for higher-order gradients'
    )


torch.library.register_autograd("genai_kernels::lora_linear_multi", _backward, setup_context=_save)
torch.library.register_autograd("genai_kernels::lora_linear_multi_bwd", _refuse)
