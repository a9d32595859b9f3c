"""Adapters in the serving engine: every token of a pass goes through the adapter of its own request.

    adapters = Adapters(model)
    adapters.add("headers", "python_models/checkpoints/lora_headers")
    engine = Engine(model, adapters=adapters)
    engine.add(prompt, adapter="headers")

The model stays the model: its linear layers are replaced by ones that ask, in each pass, whose tokens they have before
them. A token without an adapter has the bits of the model without adapters, one with an adapter those it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

import genai_kernels as gk
from genai_kernels.nn import MultiLoRALinear, load_adapter
from python_models.llama import Llama

BASE = "__base__"  # PEFT's name for no adapter


class Routed(MultiLoRALinear):
    """A linear layer that takes the adapters of its rows from the pass under way."""

    routing: Adapters

    def prepare(self) -> None:
        """Once its adapters have changed."""
        self.ready = dict(zip(self.names, self.adapters(), strict=True))

    def forward(self, input: torch.Tensor, adapters: torch.Tensor | Sequence[str] | None = None) -> torch.Tensor:
        """As the base layer if the pass has no adapter; `adapters` is not used."""
        used = self.routing.used
        mine = [self.ready[name] for name in used if name in self.ready]
        if not mine:
            return gk.linear(input, self.weight, self.bias)
        ids = self.routing.ids
        if len(mine) < len(used):  # some adapters have no part in this layer
            place = iter(range(len(mine)))
            places = [next(place) if name in self.ready else -1 for name in used]
            ids = torch.tensor([*places, -1], dtype=torch.int32)[ids.long()]  # -1 is the last one
        return self.routing.product(input, self.weight, mine, ids, self.bias)


class Adapters:
    """The adapters of a model, and which of them the pass under way uses.

    Args:
        model: its layers' linear layers become `Routed`; they share their weights.
        product: of a layer with the adapters of its rows; another one, to compare with.
    """

    def __init__(self, model: Llama, product: Callable[..., torch.Tensor] = gk.lora_linear_multi) -> None:
        self.product = product
        self.layers: dict[str, Routed] = {}
        # of the pass: the names of its adapters, and for each token a place among them, int32, -1 for none
        self.used: list[str] = []
        self.ids = torch.empty(0, dtype=torch.int32)
        self.model = model
        self.numbers = {BASE: 0}  # what keys and values are kept apart by
        for name, linear in list(model.layers.named_modules(prefix="layers")):
            if isinstance(linear, torch.nn.Linear):
                layer = self.layers[name] = Routed.from_linear(linear)
                layer.routing = self
                layer.prepare()
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layer)

    @property
    def names(self) -> list[str]:
        """Of all adapters, without the base."""
        return list(self.numbers)[1:]

    def add(self, name: str, folder: str | Path) -> None:
        """Reads an adapter in PEFT's layout, as `nn.save_adapter` or PEFT writes it, under a name.

        Raises:
            ValueError: a name that is taken; an adapter for another part of the model than its layers' linear layers.
            FileNotFoundError, NotImplementedError: see `nn.load_adapter`.
        """
        if name in self.numbers:
            raise ValueError(f"Adapters.add: name: expected a new one, got {name!r}")
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
            parts = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
        if strange := sorted(parts - set(self.layers)):
            raise ValueError(f"Adapters.add: {name}: expected adapters of the model's layers, got one of {strange[0]}")
        for layer in load_adapter(self.model, folder, name):
            routed = self.layers[layer]
            # one dtype for all, so that any of them may meet in a batch; float32 goes with every base
            routed.lora_A[name], routed.lora_B[name] = (
                torch.nn.Parameter(matrix.float(), requires_grad=False)
                for matrix in (routed.lora_A[name], routed.lora_B[name])
            )
            routed.prepare()
        self.numbers[name] = len(self.numbers)

    def check(self, name: str) -> None:
        """ValueError for an adapter that is not there."""
        if name not in self.numbers:
            raise ValueError(f"Engine.add: adapter: expected one of {', '.join(self.numbers)}, got {name!r}")

    @contextmanager
    def routed(self, names: Sequence[str], counts: Sequence[int]) -> Iterator[None]:
        """Within it, the model's tokens have these adapters: the first `counts[0]` of them `names[0]`, and so on."""
        self.used = sorted(set(names) - {BASE})
        places = {BASE: -1} | {name: i for i, name in enumerate(self.used)}
        ids = torch.tensor([places[name] for name in names], dtype=torch.int32)
        self.ids = ids.repeat_interleave(torch.tensor(counts))
        try:
            yield
        finally:
            self.used = []
