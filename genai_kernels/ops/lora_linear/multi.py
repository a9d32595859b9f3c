"""lora_linear_multi and the gated layers on their torch op: arguments made plain, and gradients of lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...quantized import QuantizedWeight, check_inputs, weight_arguments
from ...rows import as_rows as any_rows
from ...rows import sum_rows
from ...torch_ops import fake, kernel, kernel_of_lists
from .adapters import LoRAAdapter

# The gates of a gated layer, in the order of csrc/core/gate.h, and what has their backward.
GATES = ("silu", "gelu", "gelu_tanh")
_gate_bwd = [kernel(f"{gate}_and_mul_bwd") for gate in GATES]
_linear_dw = kernel("linear_dw")
_multi = kernel_of_lists("lora_linear_multi")
_multi_bwd = kernel_of_lists("lora_linear_multi_bwd")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`[rows, n]` with its elements side by side: a view wherever x allows it."""
    x = any_rows(x)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def rng_state(dropout_p: float, seed: int | None) -> torch.Tensor | None:
    if not dropout_p > 0:
        return None
    return torch.randint(2**62, (1,)) if seed is None else torch.tensor([seed])


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


def gate_backward(gate: int, gate_last: bool, dy: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The gradient of what goes into a gate. `inner`: what forward kept, the gate first wherever weight has it."""
    dh = _gate_bwd[gate](dy, inner)
    return torch.cat(dh.chunk(2, dim=1)[::-1], dim=1) if gate_last else dh


def ids_by_row(
    name: str, adapter_ids: torch.Tensor | None, shape: torch.Size, cu_seqlens: torch.Tensor | None, count: int
) -> torch.Tensor:
    """int32 `[rows, slots]` of ids given by row or by segment; of None all `count` for every row."""
    rows, name = math.prod(shape), f"genai_kernels.{name}"
    if adapter_ids is None:
        if cu_seqlens is not None:
            raise ValueError(f"{name}: cu_seqlens: expected adapter_ids beside it, an id for each segment, got None")
        return torch.arange(count, dtype=torch.int32).repeat(rows, 1)
    if adapter_ids.dtype != torch.int32:
        raise TypeError(f"{name}: adapter_ids: expected int32, got {adapter_ids.dtype}")
    if adapter_ids.device.type not in ("cpu", "meta"):
        raise ValueError(f"{name}: adapter_ids: expected them on the CPU, got {adapter_ids.device}")
    if cu_seqlens is None:
        if adapter_ids.shape not in (shape, (*shape, *adapter_ids.shape[-1:])):
            raise ValueError(
                f"{name}: adapter_ids: expected {list(shape)}, one for each row of x, or several in a last "
                f"dimension, got shape {list(adapter_ids.shape)}"
            )
        slots = 1 if adapter_ids.shape == shape else adapter_ids.shape[-1]
        return adapter_ids.reshape(rows, slots).contiguous()
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if adapter_ids.dim() not in (1, 2) or cu_seqlens.shape != (adapter_ids.shape[0] + 1,):
        raise ValueError(
            f"{name}: cu_seqlens: expected [n + 1] for adapter_ids [n] or [n, slots], got shapes "
            f"{list(cu_seqlens.shape)} and {list(adapter_ids.shape)}"
        )
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != rows or bool((lengths < 0).any()):
        raise ValueError(f"{name}: cu_seqlens: expected to rise from 0 to {rows}, the rows of x, got {cu_seqlens}")
    ids = adapter_ids if adapter_ids.dim() == 2 else adapter_ids.unsqueeze(1)
    return ids.repeat_interleave(lengths.long(), dim=0).contiguous()


def run(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    adapters: Sequence[LoRAAdapter],
    adapter_ids: torch.Tensor | None,
    bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    dropout_p: float,
    seed: int | None,
    gate: int = -1,
    gate_last: bool = False,
) -> torch.Tensor:
    """`gate`: an index into GATES, of a weight of the gate and what it multiplies; with `gate_last` the other way."""
    if x.dim() == 0:
        raise ValueError(f"genai_kernels.{name}: x: expected [..., in], got shape []")
    check_inputs(name, x, weight)
    ids = ids_by_row(name, adapter_ids, x.shape[:-1], cu_seqlens, len(adapters))
    data, *quantized = weight_arguments(weight)
    columns = [(0, data.shape[0]) if a.columns is None else a.columns for a in adapters]
    lora_a, lora_b = [a.lora_a for a in adapters], [a.lora_b for a in adapters]
    keep_inner = (
        gate >= 0
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in (x, data, *lora_a, *lora_b, bias) if t is not None)
    )
    y, _, _ = _multi(
        as_rows(x), data, lora_a, lora_b, torch.tensor([float(a.scaling) for a in adapters], dtype=torch.float64),
        torch.tensor(columns, dtype=torch.int64).view(-1, 2), ids, bias, rng_state(dropout_p, seed), dropout_p, gate,
        gate_last, keep_inner, *quantized,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


@fake("lora_linear_multi")
def _(x, weight, lora_a, lora_b, scalings, columns, adapter_ids, bias, rng_state, dropout_p, gate, gate_last,
      keep_inner, *quantized):  # fmt: skip
    size = torch.library.get_ctx().new_dynamic_size()  # how many rows have which adapter is in the ids
    rows, out = x.shape[0], weight.shape[0]
    inner = x.new_empty(rows if keep_inner else 0, out)
    return x.new_empty(rows, out // 2 if gate >= 0 else out), x.new_empty(size, dtype=compute_dtype(x)), inner


@fake("lora_linear_multi_bwd")
def _(dy, x, weight, lora_a, lora_b, scalings, columns, adapter_ids, s, rng_state, dropout_p, for_x, for_adapters,
      *quantized):  # fmt: skip
    size = sum(a.numel() + b.numel() for a, b in zip(lora_a, lora_b, strict=True)) if for_adapters else 0
    found = lora_a[0].new_empty(size) if lora_a else x.new_empty(0)
    return x.new_empty(x.shape[0] if for_x else 0, x.shape[1]), found


def _save(ctx, inputs, output):
    x, weight, lora_a, lora_b, scalings, columns, ids, _, state, ctx.dropout_p, gate, gate_last, _, *quantized = inputs
    if quantized[0] is not None and any(ctx.needs_input_grad[i] for i in (1, 13, 14, 15)):
        raise NotImplementedError("genai_kernels.lora_linear_multi: weight: a quantized weight takes no gradient")
    ctx.count, ctx.gate, ctx.gate_last, ctx.group_size = len(lora_a), gate, gate_last, quantized.pop()
    inner = output[2] if gate >= 0 else None
    ctx.save_for_backward(
        x, weight, state, output[1], inner, scalings, columns, ids, *quantized, *lora_a, *lora_b
    )  # fmt: skip
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dy, *_):
    x, weight, state, s, inner, scalings, columns, ids, *others = ctx.saved_tensors
    quantized, lists = (*others[:3], ctx.group_size), others[3:]
    lora_a, lora_b = lists[: ctx.count], lists[ctx.count :]
    for_x, for_weight, for_a, for_b, _, _, _, for_bias, *_ = ctx.needs_input_grad
    dy, for_adapters = as_rows(dy), any(for_a) or any(for_b)
    if ctx.gate >= 0:
        dy = gate_backward(ctx.gate, ctx.gate_last, dy, inner)
    dx = None
    das: list[torch.Tensor | None] = [None] * ctx.count
    dbs: list[torch.Tensor | None] = [None] * ctx.count
    if for_x or for_adapters:
        dx, found = _multi_bwd(
            dy, x, weight, lora_a, lora_b, scalings, columns, ids, s, state, ctx.dropout_p, for_x, for_adapters,
            *quantized,
        )  # fmt: skip
        if for_adapters:
            all_a, all_b = split_gradients(found, lora_a, lora_b)
            das = [g if wanted else None for g, wanted in zip(all_a, for_a, strict=True)]
            dbs = [g if wanted else None for g, wanted in zip(all_b, for_b, strict=True)]
    return (
        dx if for_x else None, _linear_dw(dy, x) if for_weight else None, das, dbs, None, None, None,
        sum_rows(dy) if for_bias else None, None, None, None, None, None, None, None, None, None,
    )  # fmt: skip


def _refuse(ctx, *grads):
    raise NotImplementedError(
        "genai_kernels.lora_linear_multi: double backward is not implemented; "
        'use genai_kernels.use_backend("reference") for higher-order gradients'
    )


torch.library.register_autograd("genai_kernels::lora_linear_multi", _backward, setup_context=_save)
torch.library.register_autograd("genai_kernels::lora_linear_multi_bwd", _refuse)
