"""The frozen part of a layer with adapters: a weight as it was, or in few bits; and norms that are computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ops.lora_linear import dora_norm
from ..ops.quantized_linear import quantize_int4, quantize_int8, quantize_nf4
from ..quantized import QuantizedWeight

QUANTIZE: dict[str, Callable[[torch.Tensor], QuantizedWeight]] = {
    "int8": quantize_int8, "int4": quantize_int4, "nf4": quantize_nf4,
}  # fmt: skip
_PARTS = ("data", "scale", "zero", "code_scale")


class FrozenLinear(torch.nn.Linear):
    """A linear layer whose weight and bias get no gradient. With `quantize` its weight is a QuantizedWeight, in buffers
    `weight_data`, `weight_scale`, ..., which no `.to(dtype)` changes.
    """

    quantized_group_size: int | None = None

    def freeze(self, quantize: str | None) -> None:
        """Ends the making of a layer."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        if quantize is None:
            return
        if quantize not in QUANTIZE:
            raise ValueError(f"{type(self).__name__}: quantize: expected one of {sorted(QUANTIZE)}, got {quantize!r}")
        few = QUANTIZE[quantize](self.weight.detach().float())
        self.weight = None  # type: ignore[assignment]
        for part in _PARTS:
            self.register_buffer(f"weight_{part}", getattr(few, part))
        self.quantized_group_size = few.group_size

    def take(self, linear: torch.nn.Linear, quantize: str | None) -> None:
        """The weight and the bias of another layer: shared, unless quantized."""
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.freeze(quantize)

    @property
    def base(self) -> torch.Tensor | QuantizedWeight:
        """What the layer multiplies by."""
        if self.quantized_group_size is None:
            return self.weight
        parts: dict[str, Any] = {part: getattr(self, f"weight_{part}") for part in _PARTS}
        return QuantizedWeight(
            shape=(self.out_features, self.in_features), group_size=self.quantized_group_size, **parts
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FrozenLinear:
        before = {part: getattr(self, f"weight_{part}", None) for part in _PARTS}
        super()._apply(fn, recurse)
        for part, tensor in before.items():
            if tensor is not None:  # where it went, but as it was
                setattr(self, f"weight_{part}", tensor.to(getattr(self, f"weight_{part}").device))
        return self

    def extra_repr(self) -> str:
        base = self.base
        few = f", quantize={base.kind}" if isinstance(base, QuantizedWeight) else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{few}"


class DoraNorm:
    """`dora_norm` of a layer in evaluation, computed again only after one of its tensors has changed.

    The adapter's are compared with copies of them: a change through `.data`, as averages are swapped in, counts
    for nothing in a tensor's version. The frozen weight is taken by its version.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._adapter: tuple[torch.Tensor, ...] = ()
        self._norm = torch.empty(0)

    def __call__(
        self, base: torch.Tensor | QuantizedWeight, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        weight = base.data if isinstance(base, QuantizedWeight) else base
        # inference tensors have no version; a compiled graph is not to keep what it was traced with
        if torch.compiler.is_compiling() or weight.is_inference():
            return dora_norm(base, lora_a, lora_b, scaling)
        key, adapter = (scaling, weight.data_ptr(), weight._version, weight.dtype), (lora_a.detach(), lora_b.detach())
        if key != self._key or not all(
            a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(adapter, self._adapter, strict=True)
        ):
            with torch.inference_mode(False):
                self._adapter = tuple(t.clone() for t in adapter)
                self._norm, self._key = dora_norm(base, lora_a, lora_b, scaling), key
        return self._norm

    def __deepcopy__(self, memo: dict[int, Any]) -> DoraNorm:
        return DoraNorm()

    def __reduce__(self) -> tuple[type[DoraNorm], tuple[()]]:
        return DoraNorm, ()
