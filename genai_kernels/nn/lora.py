"""Linear layers with low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..ops.linear import linear as plain_linear
from ..ops.lora_linear import (
    LoRAAdapter,
    LoRAMerge,
    dora_linear,
    lora_linear,
    lora_linear_multi,
    merge_lora_,
    unmerge_lora_,
)
from ..quantized import QuantizedWeight
from .frozen import DoraNorm, FrozenLinear

BASE = "__base__"  # PEFT's name for no adapter


def _scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class LoRALinear(FrozenLinear):
    """A frozen linear layer and one adapter that learns: `genai_kernels.lora_linear`, or `dora_linear`.

    Args:
        in_features, out_features, bias, device, dtype: as of `torch.nn.Linear`; its weight and bias get no gradient.
        r, lora_alpha, use_rslora: as in PEFT's LoraConfig: `scaling` is lora_alpha / r, or lora_alpha / sqrt(r).
        lora_dropout: in training, the probability of dropping an element on its way to the adapter.
        use_dora: DoRA: lora_magnitude_vector `[out]` learns too, the lengths of the weight's rows at first.
        quantize: "int8", "int4" or "nf4": QLoRA, the weight in few bits, as `base`; `weight` is None then.
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
        use_dora: bool = False,
        quantize: str | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._merge: LoRAMerge | torch.Tensor | None = None  # while merged: what unmerge needs
        self._norm = DoraNorm()
        if r < 1:
            raise ValueError(f"LoRALinear: r: expected at least 1, got {r}")
        self.lora_A = torch.nn.Parameter(torch.empty(r, in_features, device=device, dtype=adapter_dtype))
        self.lora_B = torch.nn.Parameter(torch.zeros(out_features, r, device=device, dtype=adapter_dtype))
        self.lora_alpha, self.lora_dropout, self.use_rslora = lora_alpha, lora_dropout, use_rslora
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude_vector: torch.nn.Parameter | None = None
        self.freeze(quantize)
        if use_dora:
            self._begin_dora()

    def _begin_dora(self) -> None:
        if self.lora_A.is_meta:
            lengths = torch.empty(self.out_features, device="meta")
        else:
            lengths = self._norm(self.base, self.lora_A, self.lora_B, self.scaling)
        self.lora_magnitude_vector = torch.nn.Parameter(lengths.detach().clone().to(self.lora_A.dtype))

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, *, use_dora: bool = False, quantize: str | None = None, **options: Any
    ) -> LoRALinear:
        """With the weight and the bias of another layer, which it shares unless quantized; options as above."""
        device = linear.weight.device
        layer = cls(linear.in_features, linear.out_features, False, device="meta", dtype=linear.weight.dtype, **options)
        for name in ("lora_A", "lora_B"):
            empty = torch.zeros_like(getattr(layer, name), device=device)
            setattr(layer, name, torch.nn.Parameter(empty))
        torch.nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        layer.take(linear, quantize)
        if use_dora:
            layer._begin_dora()
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

    @property
    def use_dora(self) -> bool:
        return self.lora_magnitude_vector is not None

    @property
    def merged(self) -> bool:
        return self._merge is not None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return plain_linear(input, self.weight, self.bias)
        dropout, base = self.lora_dropout if self.training else 0.0, self.base
        if self.lora_magnitude_vector is None:
            return lora_linear(input, base, self.lora_A, self.lora_B, self.scaling, self.bias, dropout)
        norm = None if self.training else self._norm(base, self.lora_A, self.lora_B, self.scaling)
        return dora_linear(
            input, base, self.lora_A, self.lora_B, self.lora_magnitude_vector, self.scaling, self.bias, dropout,
            norm=norm,
        )  # fmt: skip

    @torch.no_grad()
    def merge(self) -> torch.Tensor:
        """Puts the adapter into the weight, in place, as long as it is not to learn: forward is a plain product then.

        Returns:
            float32 `[out]`: an output differs from the unmerged layer's by at most this times the length of the input,
            before it is rounded (`LoRAMerge.error_bound`).

        Raises:
            RuntimeError: a layer that is merged already.
            NotImplementedError: a quantized weight, whose steps are larger than what adapters add.
        """
        if self.merged:
            raise RuntimeError("LoRALinear.merge: expected a layer that is not merged; call unmerge() first")
        if isinstance(self.base, QuantizedWeight):
            raise NotImplementedError(
                f"LoRALinear.merge: expected a weight of floating point, got {self.base.kind}; leave it unmerged"
            )
        if self.lora_magnitude_vector is None:
            self._merge = merge_lora_(self.weight, self.lora_A, self.lora_B, self.scaling)
            return self._merge.error_bound
        factor = self.lora_magnitude_vector.float() / self._norm(self.base, self.lora_A, self.lora_B, self.scaling)
        self._merge = self.weight.detach().clone()  # a factor cannot be taken out again, to the bit
        wide = self.weight.float() if self.weight.dtype != torch.float64 else self.weight.clone()
        bound = merge_lora_(wide, self.lora_A.to(wide.dtype), self.lora_B.to(wide.dtype), self.scaling).error_bound
        self.weight.copy_(wide * factor[:, None])
        roundoff = 2 * torch.finfo(self.weight.dtype).eps
        return bound * factor.abs().float() + roundoff * torch.linalg.vector_norm(self.weight, dim=1).float()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the weight the bits that it had before `merge`.

        Raises:
            RuntimeError: a layer that is not merged.
        """
        if self._merge is None:
            raise RuntimeError("LoRALinear.unmerge: expected a layer that is merged; call merge() first")
        if isinstance(self._merge, LoRAMerge):
            unmerge_lora_(self.weight, self.lora_A, self.lora_B, self.scaling, self._merge)
        else:
            self.weight.copy_(self._merge)
        self._merge = None

    def extra_repr(self) -> str:
        of_adapter = f"r={self.r}, lora_alpha={self.lora_alpha:g}, lora_dropout={self.lora_dropout:g}"
        return f"{super().extra_repr()}, {of_adapter}{', use_dora=True' if self.use_dora else ''}"


class MultiLoRALinear(FrozenLinear):
    """A frozen linear layer and many adapters, of which every row may have another: `genai_kernels.lora_linear_multi`.

    Args: those of `torch.nn.Linear`, and `quantize` as of `LoRALinear`.

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
        *,
        quantize: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.lora_A, self.lora_B = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        self.scalings: dict[str, float] = {}
        self.freeze(quantize)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, *, quantize: str | None = None) -> MultiLoRALinear:
        """With the weight and the bias of another layer, which it shares unless quantized."""
        layer = cls(linear.in_features, linear.out_features, False, device="meta", dtype=linear.weight.dtype)
        layer.take(linear, quantize)
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
        return lora_linear_multi(input, self.base, self.adapters(), adapters, self.bias)
