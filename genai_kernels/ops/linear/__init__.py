"""linear: the product of a linear layer, whose rows do not know of each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ...registry import Accuracy, Make, Sample, op
from ...rows import as_rows, sum_rows
from ...torch_ops import autograd, fake, kernel, no_double_backward

__all__ = ["linear"]

_linear = kernel("linear")
_linear_dx = kernel("linear_dx")
_linear_dw = kernel("linear_dw")


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain PyTorch."""
    return F.linear(x, weight, bias)


def _magnitude(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())


def _call(m: Make, rows: tuple[int, ...], inputs: int, outputs: int, bias: bool = False):
    weight = m(outputs, inputs, scale=max(1, inputs) ** -0.5)
    return (m(*rows, inputs), weight, *([m(outputs)] if bias else [])), {}


def _bench(rows: int, width: int) -> Sample:
    return Sample(
        f"{rows}x{width}x{width}",
        lambda m: _call(m, (rows,), width, width),
        bench=True,
        flops=2.0 * rows * width * width,
        backward_flops=4.0 * rows * width * width,
    )


SAMPLES = [
    Sample("plain", lambda m: _call(m, (5, 7), 64, 48)),
    Sample("bias", lambda m: _call(m, (9,), 96, 40, bias=True)),
    Sample("odd", lambda m: _call(m, (13,), 77, 31, bias=True)),
    Sample("one_row", lambda m: _call(m, (1,), 200, 130, bias=True)),
    Sample("vector", lambda m: _call(m, (), 65, 20)),
    Sample("few_rows", lambda m: _call(m, (6,), 1500, 23)),
    Sample("many_rows", lambda m: _call(m, (300,), 33, 50)),
    Sample("deep", lambda m: _call(m, (21,), 2600, 26)),
    Sample("wide", lambda m: _call(m, (3,), 40, 900, bias=True)),
    Sample("one_element", lambda m: _call(m, (4,), 1, 1, bias=True)),
    Sample("transposed_weight", lambda m: ((m(20, 70), m(70, 36, scale=0.1).t()), {})),
    Sample("strided", lambda m: ((m(40, 30).t()[:, ::2], m(24, 60)[:, ::3], m(48)[::2]), {})),
    Sample("expanded", lambda m: ((m(1, 50).expand(6, 50), m(1, 50).expand(9, 50)), {})),
    Sample("outlier_channels", lambda m: ((m(30, 128) * (1 + 99 * (torch.arange(128) % 37 == 0)).to(m.device, m.dtype),
                                           m(40, 128, scale=0.1)), {})),
    Sample("no_input", lambda m: _call(m, (3,), 0, 5, bias=True)),
    Sample("no_rows", lambda m: _call(m, (0,), 8, 5)),
    *[_bench(rows, width) for width in (768, 2048, 4096) for rows in (1, 16, 512)],
]  # fmt: skip


@op(
    reference=linear_reference,
    samples=SAMPLES,
    accuracy=Accuracy(backward=(1.25, 1.05), c_fp32=lambda x, *_: math.sqrt(max(64, x.shape[-1]))),
    magnitude=_magnitude,
    overloads=("linear", "linear_dx", "linear_dw"),
    gpu=("triton",),
)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W' + b`, with bits of a row that depend on that row alone.

    `F.linear` rounds a row in another way when other rows stand beside it, or with another number of threads. Here the
    sums are float32 (float64 for float64), always in the same order, and rounded once.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64, any strides.
        weight: `[out, in]`, dtype of x, any strides; fastest where `in` lies side by side, as in `nn.Linear`.
        bias: `[out]`, dtype of x, or None.

    Returns:
        `[..., out]`, dtype of x.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that does not fit.

    Peer: `torch.nn.functional.linear`.

    >>> import torch, genai_kernels as gk
    >>> gk.linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0.5, 0.0]))
    tensor([[11.5000, 17.0000]])
    """
    if x.dim() == 2:
        return _linear(x, weight, bias)
    if x.dim() == 0:
        raise ValueError("genai_kernels.linear: x: expected [..., in], got shape []")
    return _linear(as_rows(x), weight, bias).view(*x.shape[:-1], -1 if weight.dim() < 1 else weight.shape[0])


@fake("linear")
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@fake("linear_dx")
def _(dy, weight):
    return dy.new_empty(dy.shape[0], weight.shape[1])


@fake("linear_dw")
def _(dy, x):
    return dy.new_empty(dy.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        _linear_dx(dy, weight) if for_x else None,
        _linear_dw(dy, x) if for_weight else None,
        sum_rows(dy) if for_bias else None,
    )


autograd("linear", _save, _backward)
for _name in ("linear_dx", "linear_dw"):
    no_double_backward(_name, "linear")
