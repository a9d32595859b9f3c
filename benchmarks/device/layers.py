"""Linear layers that are timed on a GPU: plain, with adapters, gated, of few bits, and under a loss."""

from __future__ import annotations

from typing import Any

import torch

import genai_kernels as gk

from .case import Case, Function, Tensors


def linear_layer(count: int, inputs: int, outputs: int, rank: int = 0, backward: bool = False) -> Case:
    """A layer, and an adapter of this rank: with one, its backward is that of training it, W frozen."""
    from genai_kernels.registry import OPS

    op = "lora_linear" if rank else "linear"

    def make(device: str, dtype: torch.dtype) -> Tensors:
        shapes = [(count, inputs), (outputs, inputs), *([(rank, inputs), (outputs, rank)] if rank else [])]
        return tuple(torch.randn(shape, device=device, dtype=dtype) / shape[1] ** 0.5 for shape in shapes)

    def frozen(function: Function) -> Function:
        return lambda x, weight, *adapter: function(x, weight.detach() if rank else weight, *adapter)

    reference = frozen(OPS[op].reference)
    peers = {"eager": reference, "compiled": torch.compile(reference, dynamic=False)}
    base, adapter = 2.0 * count * inputs * outputs, 2.0 * count * rank * (inputs + outputs)
    flops = base + adapter
    if backward:
        flops = (base if rank else 2 * base) + 2 * adapter
    name = f"{count}x{inputs}x{outputs}" + (f" r{rank}" if rank else "")
    return Case(op, name, make, frozen(getattr(gk, op)), peers, reference, backward, flops=flops)


def dora_layer(count: int, inputs: int, outputs: int, rank: int = 16, backward: bool = False) -> Case:
    """A step of training a DoRA adapter, the norm of W + B A in forward; its backward, W frozen."""
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        shapes = [(count, inputs), (outputs, inputs), (rank, inputs), (outputs, rank)]
        layer = [torch.randn(shape, device=device, dtype=dtype) / shape[1] ** 0.5 for shape in shapes]
        return *layer, torch.rand(outputs, device=device, dtype=dtype) + 0.5

    def frozen(function: Function) -> Function:
        return lambda x, weight, *adapter: function(x, weight.detach(), *adapter)

    reference = frozen(OPS["dora_linear"].reference)
    peers = {"eager": reference, "compiled": torch.compile(reference, dynamic=False)}
    flops = 2.0 * count * inputs * outputs + (4.0 if backward else 2.0) * count * rank * (inputs + outputs)
    name = f"{count}x{inputs}x{outputs} r{rank}"
    return Case("dora_linear", name, make, frozen(gk.dora_linear), peers, reference, backward, flops=flops)


def gated_layer(count: int, inputs: int, n: int, backward: bool = False) -> Case:
    """The first layer of a gated network and its gate; backward too gives the gradient of the weight."""
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        x, weight = (torch.randn(m, inputs, device=device, dtype=dtype) for m in (count, 2 * n))
        return x, weight / inputs**0.5

    op = "linear_swiglu"
    reference = OPS[op].reference
    peers = {"eager": reference, "compiled": torch.compile(reference, dynamic=False)}
    flops = (8.0 if backward else 4.0) * count * inputs * n
    return Case(op, f"{count}x{inputs}x{n}", make, gk.linear_swiglu, peers, reference, backward, flops=flops)


def adapters_by_row(count: int, inputs: int, outputs: int, adapters: int, rank: int = 16) -> Case:
    """Rows of a batch, each with one of many adapters, in turn."""
    from genai_kernels.registry import OPS

    ids = torch.arange(count, dtype=torch.int32) % adapters

    def make(device: str, dtype: torch.dtype) -> Tensors:
        shapes = [(count, inputs), (outputs, inputs), (adapters, rank, inputs), (adapters, outputs, rank)]
        return tuple(torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes)

    def with_ids(function: Function) -> Function:
        def run(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = function(x, weight, list(map(gk.LoRAAdapter, a, b)), ids)
            return result

        return run

    reference = with_ids(OPS["lora_linear_multi"].reference)
    name = f"{count}x{inputs}x{outputs} {adapters} of r{rank}"
    flops = 2.0 * count * (inputs * outputs + rank * (inputs + outputs))
    return Case(
        "lora_linear_multi", name, make, with_ids(gk.lora_linear_multi), {"eager": reference}, reference, flops=flops
    )


def few_bits(kind: str, count: int, inputs: int, outputs: int) -> Case:
    """A layer whose weight has 8 or 4 bits, quantised once, outside of the time; eager has unpacked it."""
    from genai_kernels.registry import OPS

    weights: dict[Any, Any] = {}

    def quantized(w: torch.Tensor) -> Any:
        key = w.data_ptr(), w.dtype
        if key not in weights:
            q = getattr(gk, f"quantize_{kind}")(w.float())
            weights[key] = q, q.dense(w.dtype)
        return weights[key]

    def make(device: str, dtype: torch.dtype) -> Tensors:
        return (
            torch.randn(count, inputs, device=device, dtype=dtype),
            torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5,
        )

    op = f"{kind}_linear"
    return Case(
        op, f"{count}x{inputs}x{outputs}", make, lambda x, w: getattr(gk, op)(x, quantized(w)[0]),
        {"dense": lambda x, w: torch.nn.functional.linear(x, quantized(w)[1])},
        lambda x, w: OPS[op].reference(x, quantized(w)[0]),
        flops=2.0 * count * inputs * outputs,
    )  # fmt: skip


def language_loss(count: int, width: int, vocabulary: int) -> Case:
    """The loss and its gradients, which forward computes."""
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        x, weight = (torch.randn(n, width, device=device, dtype=dtype) for n in (count, vocabulary))
        return x, weight / width**0.5, torch.randint(0, vocabulary, (count,), device=device)

    def both(function: Function) -> Function:
        def run(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Tensors:
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            loss = function(*leaves, target)
            return loss, *torch.autograd.grad(loss, leaves)

        return run

    op = "fused_linear_cross_entropy"
    reference = both(OPS[op].reference)
    return Case(
        op, f"{count}x{width}x{vocabulary}", make, both(getattr(gk, op)), {"eager": reference}, reference,
        flops=6.0 * count * width * vocabulary,
    )  # fmt: skip
