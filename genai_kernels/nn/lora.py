"""Linear layers with low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..ops.lora_linear import LoRAAdapter, lora_linear, lora_linear_multi

BASE = "__base__"  # PEFT's name for no adapter


def _scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def _take_base(layer: torch.nn.Linear, linear: torch.nn.Linear) -> None:
    layer.weight, layer.bias = linear.weight, linear.bias
    layer.train(linear.training)


def _freeze(layer: torch.nn.Linear) -> None:
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            parameter.requires_grad_(False)


class LoRALinear(torch.nn.Linear):
    """A frozen linear layer and one adapter that learns: `genai_kernels.lora_linear`.

    Args:
        in_features, out_features, bias, device, dtype: as of `torch.nn.Linear`; its weight and bias get no gradient.
        r, lora_alpha, use_rslora: as in PEFT's LoraConfig: `scaling` is lora_alpha / r, or lora_alpha / sqrt(r).
        lora_dropout: in training, the probability of dropping an element on its way to the adapter.
        adapter_dtype: of lora_A `[r, in]` and lora_B `[out, r]`. At first the adapter adds nothing: lora_B is 0.

    >>> import torch
    >>> from genai_kernels.nn import LoRALinear
    >>> layer = LoRALinear.from_linear(torch.nn.Linear(8, 4), r=2, lora_alpha=4)
    >>> layer.scaling, [name for name, p in layer.named_parameters() if p.requires_grad]
    (2.0, ['lora_A', 'lora_B'])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if r < 1:
            raise ValueError(f"LoRALinear: r: expected at least 1, got {r}")
        self.lora_A = torch.nn.Parameter(torch.empty(r, in_features, device=device, dtype=adapter_dtype))
        self.lora_B = torch.nn.Parameter(torch.zeros(out_features, r, device=device, dtype=adapter_dtype))
        self.lora_alpha, self.lora_dropout, self.use_rslora = lora_alpha, lora_dropout, use_rslora
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        _freeze(self)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, **options: Any) -> LoRALinear:
        """With the weight and the bias of another layer, which it shares; options as above."""
        device = linear.weight.device
        layer = cls(linear.in_features, linear.out_features, False, device="meta", dtype=linear.weight.dtype, **options)
        for name in ("lora_A", "lora_B"):
            empty = torch.zeros_like(getattr(layer, name), device=device)
            setattr(layer, name, torch.nn.Parameter(empty))
        torch.nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        _take_base(layer, linear)
        _freeze(layer)
        return layer

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        return _scaling(self.r, self.lora_alpha, self.use_rslora)

    def adapter(self) -> LoRAAdapter:
        """The adapter as `lora_linear_multi` takes it."""
        return LoRAAdapter(self.lora_A, self.lora_B, self.scaling)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dropout = self.lora_dropout if self.training else 0.0
        return lora_linear(input, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias, dropout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha:g}, lora_dropout={self.lora_dropout:g}"


class MultiLoRALinear(torch.nn.Linear):
    """A frozen linear layer and many adapters, of which every row may have another: `genai_kernels.lora_linear_multi`.

    Args: those of `torch.nn.Linear`.

    >>> import torch
    >>> from genai_kernels.nn import MultiLoRALinear
    >>> layer = MultiLoRALinear.from_linear(torch.nn.Linear(8, 4))
    >>> layer.add_adapter("poems", torch.randn(2, 8), torch.randn(4, 2), lora_alpha=4)
    >>> layer(torch.randn(3, 8), ["poems", "__base__", "poems"]).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.lora_A, self.lora_B = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        self.scalings: dict[str, float] = {}
        _freeze(self)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear) -> MultiLoRALinear:
        """With the weight and the bias of another layer, which it shares."""
        layer = cls(linear.in_features, linear.out_features, False, device="meta", dtype=linear.weight.dtype)
        _take_base(layer, linear)
        _freeze(layer)
        return layer

    def add_adapter(
        self, name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, lora_alpha: float = 8.0, use_rslora: bool = False
    ) -> None:
        """An adapter under a name. `lora_a` `[r, in]` and `lora_b` `[out, r]` are kept as they are, not copied.

        Raises:
            ValueError: a name that is taken; shapes that do not fit.
        """
        if name in self.scalings or name == BASE:
            raise ValueError(f"MultiLoRALinear: name: expected a new one, got {name!r}")
        shapes = tuple(lora_a.shape[1:]), tuple(lora_b.shape)
        if lora_a.dim() != 2 or shapes != ((self.in_features,), (self.out_features, lora_a.shape[0])):
            raise ValueError(
                f"MultiLoRALinear: {name}: expected lora_a [r, {self.in_features}] and lora_b "
                f"[{self.out_features}, r], got {list(lora_a.shape)} and {list(lora_b.shape)}"
            )
        self.lora_A[name] = torch.nn.Parameter(lora_a, requires_grad=lora_a.requires_grad)
        self.lora_B[name] = torch.nn.Parameter(lora_b, requires_grad=lora_b.requires_grad)
        self.scalings[name] = _scaling(lora_a.shape[0], lora_alpha, use_rslora)

    def remove_adapter(self, name: str) -> None:
        """Raises KeyError for a name that is not there."""
        del self.scalings[name], self.lora_A[name], self.lora_B[name]

    @property
    def names(self) -> list[str]:
        """The adapters' names; an id is a place in this list."""
        return list(self.scalings)

    def adapters(self) -> list[LoRAAdapter]:
        return [LoRAAdapter(self.lora_A[n], self.lora_B[n], s) for n, s in self.scalings.items()]

    def ids(self, names: Sequence[str]) -> torch.Tensor:
        """int32 ids of these names, -1 for "__base__". Raises KeyError for a name that is not there."""
        places = {name: i for i, name in enumerate(self.scalings)} | {BASE: -1}
        return torch.tensor([places[name] for name in names], dtype=torch.int32)

    def forward(self, input: torch.Tensor, adapters: torch.Tensor | Sequence[str] | None = None) -> torch.Tensor:  # type: ignore[override]
        """
        Args:
            input: `[..., in]`.
            adapters: ids, as `lora_linear_multi` takes them; or a name for each element of the first dimension,
                "__base__" for none; None: the base for all.
        """
        if adapters is None:
            adapters = [BASE] * (input.shape[0] if input.dim() > 1 else 1)
        if not isinstance(adapters, torch.Tensor):
            ids = self.ids(adapters)
            if len(ids) != (input.shape[0] if input.dim() > 1 else 1):
                raise ValueError(f"MultiLoRALinear: adapters: expected {len(input)} names, got {len(ids)}")
            rows = input.shape[:-1]
            adapters = ids.view(-1, *[1] * (len(rows) - 1)).expand(rows) if rows else ids[0]
        return lora_linear_multi(input, self.weight, self.adapters(), adapters, self.bias)
