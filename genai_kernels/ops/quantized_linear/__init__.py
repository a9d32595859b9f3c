"""int8_linear, int4_linear, nf4_linear: linear layers whose frozen weight has few bits; and what makes such weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...quantized import QuantizedWeight
from ...registry import Accuracy, Make, Sample, op
from ...rows import as_rows, sum_rows
from ...torch_ops import autograd, fake, kernel, no_double_backward
from .quantize import dequantize, quantize_int4, quantize_int8, quantize_nf4

__all__ = [
    "dequantize",
    "int4_linear",
    "int8_linear",
    "nf4_linear",
    "quantize_int4",
    "quantize_int8",
    "quantize_nf4",
    "w8a8_linear",
]

_quantized_linear = kernel("quantized_linear")
_quantized_linear_dx = kernel("quantized_linear_dx")
_w8a8_linear = kernel("w8a8_linear")


def quantized_linear_reference(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in plain PyTorch: the whole matrix in the dtype of x, then a product."""
    return F.linear(x, weight.dense(x.dtype), bias)


def _magnitude(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x.abs(), weight.dense(x.dtype).abs(), None if bias is None else bias.abs())


def _samples(quantize: Callable[..., QuantizedWeight], groups: Sequence[int | None]) -> list[Sample]:
    """Calls with these group sizes, each of them at least once."""

    def call(
        m: Make, rows: tuple[int, ...], inputs: int, outputs: int, group: int = 0, bias: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        weight = m.float32(outputs, inputs, scale=max(1, inputs) ** -0.5)
        q = quantize(weight, groups[group % len(groups)])
        return (m(*rows, inputs), q, *([m(outputs)] if bias else [])), {}

    def extreme(m: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Outlier channels in x, rows of zeros and of one size in the weight."""
        weight = m.float32(40, 160, scale=0.1)
        weight[3] = 0
        weight[7] = -0.25
        weight[:, 70:] *= 30
        x = m(30, 160) * (1 + 99 * (torch.arange(160) % 37 == 0)).to(m.device)
        return (x.to(m.dtype), quantize(weight, groups[0])), {}

    def bench(rows: int, width: int) -> Sample:
        return Sample(
            f"{rows}x{width}x{width}",
            lambda m: call(m, (rows,), width, width, -1),
            bench=True,
            flops=2.0 * rows * width * width,
            backward_flops=2.0 * rows * width * width,
        )

    return [
        Sample("plain", lambda m: call(m, (5, 7), 64, 48)),
        Sample("bias", lambda m: call(m, (9,), 96, 40, 1, bias=True)),
        Sample("odd", lambda m: call(m, (13,), 77, 31, 0, bias=True)),
        Sample("odd_groups", lambda m: call(m, (11,), 301, 29, 1, bias=True)),
        Sample("one_row", lambda m: call(m, (1,), 200, 130, 2, bias=True)),
        Sample("vector", lambda m: call(m, (), 65, 20, 1)),
        Sample("few_rows", lambda m: call(m, (6,), 1500, 23, 2)),
        Sample("many_rows", lambda m: call(m, (300,), 33, 50)),
        Sample("deep", lambda m: call(m, (21,), 2600, 26, 1)),
        Sample("wide", lambda m: call(m, (3,), 40, 900, 0, bias=True)),
        Sample("one_element", lambda m: call(m, (4,), 1, 1, 0, bias=True)),
        Sample("strided", lambda m: ((m(40, 30).t()[:, ::2], call(m, (), 20, 24, 0)[0][1], m(48)[::2]), {})),
        Sample("expanded", lambda m: ((m(1, 50).expand(6, 50), call(m, (), 50, 9, 0)[0][1]), {})),
        Sample("extreme", extreme),
        Sample("no_input", lambda m: call(m, (3,), 0, 5, 0, bias=True)),
        Sample("no_rows", lambda m: call(m, (0,), 8, 5)),
        *[bench(rows, width) for width in (2048, 4096) for rows in (1, 16, 512)],
    ]


def _declared(quantize: Callable[..., QuantizedWeight], *groups: int | None) -> dict[str, Any]:
    return {
        "reference": quantized_linear_reference,
        "samples": _samples(quantize, groups),
        "accuracy": Accuracy(backward=(1.25, 1.05), c_fp32=lambda x, *_: math.sqrt(max(64, x.shape[-1]))),
        "magnitude": _magnitude,
        "overloads": ("quantized_linear", "quantized_linear_dx"),
        "gpu": ("triton",),
    }


def _run(
    name: str, run: Callable[..., torch.Tensor], x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """A checked call of `run(rows, weight, bias)`, with x as rows."""
    kind = "int8" if name == "w8a8_linear" else name.removesuffix("_linear")
    name = f"genai_kernels.{name}"
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{name}: weight: expected a QuantizedWeight, got {type(weight).__name__}")
    if weight.kind != kind:
        raise TypeError(f"{name}: weight: expected one of quantize_{kind}, got one of quantize_{weight.kind}")
    if weight.data.shape[:1] != weight.shape[:1]:
        raise ValueError(
            f"{name}: weight.data: expected {weight.shape[0]} rows as its shape says, got {list(weight.data.shape)}"
        )
    if x.dim() == 2:
        return run(x, weight, bias)
    if x.dim() == 0:
        raise ValueError(f"{name}: x: expected [..., in], got shape []")
    return run(as_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _unpacked(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return _quantized_linear(x, *weight.arguments(), bias)


@op(**_declared(quantize_int8, None, 32, 128))
def int8_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W' + b` for a weight of int8, unpacked inside the product: no second matrix, no copy of the first.

    The weight is frozen: backward gives the gradients of x and bias. An element of W is rounded to float32, and to
    bfloat16 where the instruction set multiplies bfloat16 (README); in float32 the bits are those of
    `linear(x, dequantize(weight), bias)`. The bits of a row depend on that row alone.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64, any strides.
        weight: of `quantize_int8`, `[out, in]`.
        bias: `[out]`, dtype of x, or None.

    Returns:
        `[..., out]`, dtype of x.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype or a kind of weight that does not fit.

    Peer: torchao's `Int8WeightOnlyConfig`.

    >>> import torch, genai_kernels as gk
    >>> weight = gk.quantize_int8(torch.tensor([[127.0, 4.2], [0.0, 254.0]]))
    >>> gk.int8_linear(torch.tensor([[1.0, 2.0]]), weight, torch.tensor([0.5, 0.0]))
    tensor([[135.5000, 508.0000]])
    """
    return _run("int8_linear", _unpacked, x, weight, bias)


@op(**_declared(quantize_int4, 32, 64, 128))
def int4_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W' + b` for a weight of `quantize_int4`. All else is as in `int8_linear`.

    Peer: torchao's `Int4WeightOnlyConfig`.

    >>> import torch, genai_kernels as gk
    >>> weight = gk.quantize_int4(torch.tensor([[-5.0, 10.0, 0.0, 3.2]]))
    >>> gk.int4_linear(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), weight)
    tensor([[8.]])
    """
    return _run("int4_linear", _unpacked, x, weight, bias)


@op(**_declared(quantize_nf4, 64, 32, 128))
def nf4_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W' + b` for a weight of `quantize_nf4`, QLoRA's frozen base. All else is as in `int8_linear`.

    Peer: bitsandbytes' `matmul_4bit`.

    >>> import torch, genai_kernels as gk
    >>> weight = gk.quantize_nf4(torch.tensor([[-2.0, 0.0, 2.0]]), double_quant=False)
    >>> gk.nf4_linear(torch.tensor([[3.0, 1.0, 4.0]]), weight)
    tensor([[2.]])
    """
    return _run("nf4_linear", _unpacked, x, weight, bias)


def w8a8_linear_reference(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain PyTorch. Rows of x are quantised in float32 whatever their dtype."""
    rows = _quantized_rows(x)
    return F.linear(rows, weight.dense(x.dtype), bias)


def _quantized_rows(x: torch.Tensor) -> torch.Tensor:
    """What stands for x, in its dtype."""
    largest = x.float().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1)).float()
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    most = largest.new_tensor(127.0)  # a number over a tensor would be a product with the reciprocal: rounded twice
    steps = (x.float() * (most / largest.clamp_min(2.0**-100))).round()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (steps.to(wide) * (largest / 127).to(wide)).to(x.dtype)


def _w8a8_magnitude(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _magnitude(_quantized_rows(x), weight, bias)


@op(
    reference=w8a8_linear_reference,
    samples=_samples(quantize_int8, (None,)),
    accuracy=Accuracy(c_fp32=lambda x, *_: math.sqrt(max(64, x.shape[-1]))),
    magnitude=_w8a8_magnitude,
    differentiable=False,
    overloads=("w8a8_linear",),
    gpu=("triton",),
)
def w8a8_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W' + b` in products of int8: rows of x are quantised as they come, sums are exact integers.

    A row has the scale `max|x| / 127` and the nearest multiples of it, ties to even. The result is the sum of the
    integers times both scales, in float32. It has the same bits on every instruction set, and those of a row depend on
    that row alone. A row that is not finite gives NaN. Without a gradient.

    Args:
        x: `[..., in]`, float32, bfloat16 or float16, any strides; `in` of at most 131072.
        weight: of `quantize_int8` with a scale for each row, `[out, in]`.
        bias: `[out]`, dtype of x, or None.

    Returns:
        `[..., out]`, dtype of x.

    Raises:
        ValueError: a shape that does not fit; a weight with groups.
        TypeError: a dtype or a kind of weight that does not fit.
        NotImplementedError: more than 131072 inputs; a gradient is wanted.

    Peer: torchao's `Int8DynamicActivationInt8WeightConfig`.

    >>> import torch, genai_kernels as gk
    >>> weight = gk.quantize_int8(torch.tensor([[127.0, 4.2], [0.0, 254.0]]))
    >>> gk.w8a8_linear(torch.tensor([[1.0, 127.0]]), weight)
    tensor([[  635., 32258.]])
    """
    if isinstance(weight, QuantizedWeight) and weight.group_size:
        raise ValueError(
            "genai_kernels.w8a8_linear: weight: expected a scale for each row, got groups of "
            f"{weight.group_size}; use int8_linear"
        )
    return _run("w8a8_linear", _w8a8, x, weight, bias)


def _w8a8(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return _w8a8_linear(x, weight.data, weight.scale, weight.shape[1], bias)


@fake("w8a8_linear")
def _(x, data, scale, inputs, bias):
    return x.new_empty(x.shape[0], data.shape[0])


@fake("quantized_linear")
def _(x, data, scale, zero, code_scale, inputs, group_size, bias):
    return x.new_empty(x.shape[0], data.shape[0])


@fake("quantized_linear_dx")
def _(dy, data, scale, zero, code_scale, inputs, group_size):
    return dy.new_empty(dy.shape[0], inputs)


def _save(ctx, inputs, output):
    _, data, scale, zero, code_scale, columns, group_size, _ = inputs
    if any(ctx.needs_input_grad[1:5]):
        raise NotImplementedError("genai_kernels.quantized_linear: weight: a quantized weight takes no gradient")
    ctx.save_for_backward(data, scale, zero, code_scale)
    ctx.sizes = columns, group_size


def _backward(ctx, dy):
    for_x, for_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    dx = _quantized_linear_dx(dy, *ctx.saved_tensors, *ctx.sizes) if for_x else None
    return dx, None, None, None, None, None, None, sum_rows(dy) if for_bias else None


autograd("quantized_linear", _save, _backward)
no_double_backward("quantized_linear_dx", "int8_linear")
