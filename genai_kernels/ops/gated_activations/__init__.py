"""silu_and_mul, gelu_and_mul, gelu_tanh_and_mul: the gated activations of SwiGLU and GEGLU feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...registry import Accuracy, Sample, op
from ...torch_ops import autograd, fake, kernel, no_double_backward

__all__ = ["gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]

_silu = kernel("silu_and_mul")
_gelu = kernel("gelu_and_mul")
_gelu_tanh = kernel("gelu_tanh_and_mul")
_silu_and_mul_out = kernel("silu_and_mul_out")
_gelu_and_mul_out = kernel("gelu_and_mul_out")
_gelu_tanh_and_mul_out = kernel("gelu_tanh_and_mul_out")


def _reference(activation: Callable[..., torch.Tensor], **kwargs: str) -> Callable[..., torch.Tensor]:
    def reference(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The same in plain PyTorch, in the dtype of x."""
        gate, up = x.chunk(2, dim=-1)
        y = activation(gate, **kwargs) * up
        return y if out is None else out.copy_(y)

    return reference


silu_and_mul_reference = _reference(F.silu)
gelu_and_mul_reference = _reference(F.gelu)
gelu_tanh_and_mul_reference = _reference(F.gelu, approximate="tanh")


def _magnitude(reference: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """|y|, or how far a relative error of x moves it where that is more: |gate act'(gate) up|.

    The last term is for the reference: in float64 too, 1 + erf and 1 + tanh cancel to nothing in the tail.
    """

    def magnitude(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.detach().chunk(2, dim=-1)
        with torch.enable_grad():
            gate = gate.clone().requires_grad_()
            value = reference(torch.cat([gate, torch.ones_like(gate)], dim=-1))
            (slope,) = torch.autograd.grad(value.sum(), gate)
        size = torch.maximum(value.detach().abs(), (gate * slope).abs()).maximum(gate.abs() * 2.0**-26)
        return (size * up.abs()).detach()

    return magnitude


def _huge(dtype: torch.dtype) -> float:
    # finite differences of float64 need numbers that they change
    return {torch.float16: 200.0, torch.float64: 1.0}.get(dtype, 1e18)


SAMPLES = [
    Sample("plain", lambda m: ((m(4, 7, 64),), {})),
    Sample("odd", lambda m: ((m(3, 74),), {})),
    Sample("one_element", lambda m: ((m(40, 2),), {})),
    Sample("one_dimension", lambda m: ((m(34),), {})),
    Sample("wide", lambda m: ((m(5, 96, scale=6.0),), {})),
    Sample("huge", lambda m: ((m(5, 96, scale=_huge(m.dtype)),), {})),
    Sample("zero", lambda m: ((m(3, 32) * 0,), {})),
    Sample("strided_rows", lambda m: ((m(6, 80)[:, 8:72],), {})),
    Sample("strided_inner", lambda m: ((m(64, 6).t(),), {})),
    Sample("expanded", lambda m: ((m(1, 40).expand(5, 40),), {})),
    Sample("empty", lambda m: ((m(0, 16),), {})),
    Sample("512x11008", lambda m: ((m(512, 2 * 11008),), {}), bench=True, elements=3 * 512 * 11008,
           backward_elements=5 * 512 * 11008),
]  # fmt: skip


def _declare(name: str, reference: Callable[..., torch.Tensor]) -> Callable[..., Callable[..., torch.Tensor]]:
    return op(
        reference=reference,
        samples=SAMPLES,
        accuracy=Accuracy(backward=(1.25, 1.1)),
        magnitude=_magnitude(reference),
        overloads=(name, f"{name}_out", f"{name}_bwd"),
    )


@_declare("silu_and_mul", silu_and_mul_reference)
def silu_and_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """SwiGLU's gate: `silu(x[..., :n]) * x[..., n:]` with `silu(g) = g / (1 + e^-g)`.

    Computed in float32 (float64 for float64) and rounded once.

    Args:
        x: `[..., 2 n]`, the gate and then the factor; float32, bfloat16, float16 or float64, any strides.
        out: `[..., n]`, written and returned instead of a new tensor; shares no memory with x. Not differentiable.

    Returns:
        `[..., n]`, dtype of x.

    Raises:
        ValueError: a last dimension of odd size; an `out` that does not fit.
        TypeError: a dtype that does not fit.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020. Peer: `torch.nn.functional.silu(gate) * up`.

    >>> import torch, genai_kernels as gk
    >>> gk.silu_and_mul(torch.tensor([1.0, -2.0, 3.0, 10.0]))
    tensor([ 2.1932, -2.3841])
    """
    if out is None:
        return _silu(x)
    _silu_and_mul_out(x, out)
    return out


@_declare("gelu_and_mul", gelu_and_mul_reference)
def gelu_and_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """GEGLU's gate: `gelu(x[..., :n]) * x[..., n:]` with `gelu(g) = g (1 + erf(g / sqrt 2)) / 2`.

    Computed in float32 (float64 for float64) and rounded once; gelu keeps its relative accuracy where it is tiny.

    Args:
        x: `[..., 2 n]`, the gate and then the factor; float32, bfloat16, float16 or float64, any strides.
        out: `[..., n]`, written and returned instead of a new tensor; shares no memory with x. Not differentiable.

    Returns:
        `[..., n]`, dtype of x.

    Raises:
        ValueError: a last dimension of odd size; an `out` that does not fit.
        TypeError: a dtype that does not fit.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020. Peer: `torch.nn.functional.gelu(gate) * up`.

    >>> import torch, genai_kernels as gk
    >>> gk.gelu_and_mul(torch.tensor([1.0, -2.0, 3.0, 10.0]))
    tensor([ 2.5240, -0.4550])
    """
    if out is None:
        return _gelu(x)
    _gelu_and_mul_out(x, out)
    return out


@_declare("gelu_tanh_and_mul", gelu_tanh_and_mul_reference)
def gelu_tanh_and_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """GEGLU's gate with the tanh form: `gelu(g) = g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2`.

    Computed in float32 (float64 for float64) and rounded once.

    Args:
        x: `[..., 2 n]`, the gate and then the factor; float32, bfloat16, float16 or float64, any strides.
        out: `[..., n]`, written and returned instead of a new tensor; shares no memory with x. Not differentiable.

    Returns:
        `[..., n]`, dtype of x.

    Raises:
        ValueError: a last dimension of odd size; an `out` that does not fit.
        TypeError: a dtype that does not fit.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    Peer: `torch.nn.functional.gelu(gate, approximate="tanh") * up`.

    >>> import torch, genai_kernels as gk
    >>> gk.gelu_tanh_and_mul(torch.tensor([1.0, -2.0, 3.0, 10.0]))
    tensor([ 2.5236, -0.4540])
    """
    if out is None:
        return _gelu_tanh(x)
    _gelu_tanh_and_mul_out(x, out)
    return out


def _register(name: str) -> None:
    run_backward = kernel(f"{name}_bwd")

    @fake(name)
    def _(x):
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

    @fake(f"{name}_out")
    def _(x, out):
        return None

    @fake(f"{name}_bwd")
    def _(dy, x):
        return x.new_empty(x.shape)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, dy):
        return run_backward(dy, *ctx.saved_tensors)

    autograd(name, save, backward)
    no_double_backward(f"{name}_bwd", name)


for _name in __all__:
    _register(_name)
