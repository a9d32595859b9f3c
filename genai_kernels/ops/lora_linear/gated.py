"""linear_swiglu, linear_geglu, linear_geglu_tanh: the first layer of a gated network and its gate in one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...quantized import QuantizedWeight, check_inputs, weight_arguments
from ...registry import Accuracy, op
from ...rows import sum_rows
from ...torch_ops import autograd, fake, kernel
from . import multi
from .adapters import LoRAAdapter
from .gated_samples import GATED_SAMPLES, gated_magnitude
from .reference import gated_reference
from .samples import c_fp32

_gated_linear = kernel("gated_linear")
_linear_dx = kernel("linear_dx")
_linear_dw = kernel("linear_dw")
_quantized_linear_dx = kernel("quantized_linear_dx")


def _declared(gate: Callable[[torch.Tensor], torch.Tensor], gate_last: bool) -> dict[str, Any]:
    return {
        "reference": gated_reference(gate, gate_last),
        "samples": GATED_SAMPLES,
        "accuracy": Accuracy(backward=(1.25, 1.1), c_fp32=c_fp32),
        "magnitude": gated_magnitude(gate, gate_last),
        "overloads": ("gated_linear", "lora_linear_multi", "lora_linear_multi_bwd"),
        "gpu": ("triton",),
    }


@op(**_declared(F.silu, False))
def linear_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None = None,
    adapters: Sequence[LoRAAdapter] = (),
    adapter_ids: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """The gate and the factor of SwiGLU from one product: `silu(x Wg') * (x Wu')` with `weight = [Wg; Wu]`.

    The gate is applied to the sums, in float32 (float64 for that), before anything is rounded; what it is applied to is
    written only where backward will want it. Adapters as in `lora_linear_multi`: those of the gate have `columns`
    `(0, n)`, those of the factor `(n, 2 n)`. The bits of a row depend on that row and its adapters alone.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64, any strides.
        weight: `[2 n, in]`, dtype of x, the gate first; or a quantized one, as in `lora_linear`.
        bias: `[2 n]`, dtype of x, or None.
        adapters, adapter_ids, cu_seqlens, dropout_p, seed: as in `lora_linear_multi`. adapter_ids None: every row has
            all adapters.

    Returns:
        `[..., n]`, dtype of x.

    Raises:
        IndexError: an id that is no adapter.
        ValueError: a shape that does not fit.
        TypeError: a dtype that does not fit.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020. Peer: `silu_and_mul(F.linear(x, weight, bias))`.

    >>> import torch, genai_kernels as gk
    >>> gk.linear_swiglu(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([[1.4621]])
    """
    if not adapters and adapter_ids is None:
        return _run("linear_swiglu", x, weight, bias, 0)
    return multi.run("linear_swiglu", x, weight, adapters, adapter_ids, bias, cu_seqlens, dropout_p, seed, 0)


@op(**_declared(F.gelu, True))
def linear_geglu(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None = None,
    adapters: Sequence[LoRAAdapter] = (),
    adapter_ids: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """GEGLU in one product: `(x W1') * gelu(x Wg')` with `weight = [W1; Wg]`, the gate last, as in Stable Diffusion.

    `gelu(g) = g (1 + erf(g / sqrt 2)) / 2`. All else is as in `linear_swiglu`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020. Peer: diffusers' `GEGLU`.

    >>> import torch, genai_kernels as gk
    >>> gk.linear_geglu(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([[1.6827]])
    """
    if not adapters and adapter_ids is None:
        return _run("linear_geglu", x, weight, bias, 1, True)
    return multi.run("linear_geglu", x, weight, adapters, adapter_ids, bias, cu_seqlens, dropout_p, seed, 1, True)


@op(**_declared(lambda g: F.gelu(g, approximate="tanh"), True))
def linear_geglu_tanh(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None = None,
    adapters: Sequence[LoRAAdapter] = (),
    adapter_ids: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """`linear_geglu` with the tanh form of gelu: `g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2`.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.

    >>> import torch, genai_kernels as gk
    >>> gk.linear_geglu_tanh(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([[1.6824]])
    """
    if not adapters and adapter_ids is None:
        return _run("linear_geglu_tanh", x, weight, bias, 2, True)
    return multi.run("linear_geglu_tanh", x, weight, adapters, adapter_ids, bias, cu_seqlens, dropout_p, seed, 2, True)


def _run(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    gate: int,
    gate_last: bool = False,
) -> torch.Tensor:
    """Without adapters."""
    if x.dim() == 0:
        raise ValueError(f"genai_kernels.{name}: x: expected [..., in], got shape []")
    check_inputs(name, x, weight)
    data, *quantized = weight_arguments(weight)
    keep_inner = torch.is_grad_enabled() and (
        x.requires_grad or data.requires_grad or (bias is not None and bias.requires_grad)
    )
    y, _ = _gated_linear(multi.as_rows(x), data, bias, gate, gate_last, keep_inner, *quantized)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


@fake("gated_linear")
def _(x, weight, bias, gate, gate_last, keep_inner, *quantized):
    rows, out = x.shape[0], weight.shape[0]
    return x.new_empty(rows, out // 2), x.new_empty(rows if keep_inner else 0, out)


def _save(ctx, inputs, output):
    x, weight, _, ctx.gate, ctx.gate_last, _, *quantized = inputs
    if quantized[0] is not None and any(ctx.needs_input_grad[i] for i in (1, 6, 7, 8)):
        raise NotImplementedError("genai_kernels.linear_swiglu: weight: a quantized weight takes no gradient")
    ctx.group_size = quantized.pop()
    ctx.save_for_backward(x, weight, output[1], *quantized)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    x, weight, inner, *quantized = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    dh = multi.gate_backward(ctx.gate, ctx.gate_last, multi.as_rows(dy), inner)
    dx = None
    if for_x and quantized[0] is not None:
        dx = _quantized_linear_dx(dh, weight, *quantized, x.shape[1], ctx.group_size)
    elif for_x:
        dx = _linear_dx(dh, weight)
    return (
        dx, _linear_dw(dh, x) if for_weight else None, sum_rows(dh) if for_bias else None,
        None, None, None, None, None, None, None,
    )  # fmt: skip


autograd("gated_linear", _save, _backward)
