"""Ways to adapt a Llama of which little learns: LoRA and its kin, bottleneck adapters, BitFit, prompt tuning; and all.

    adapted = adapt(llama_files.load(folder), "lora")
    adapted.loss(tokens, following).backward()          # gradients of adapted.trainable() alone

Each method changes a model in place and adds nothing to it at first, but for the virtual tokens of a prompt, and the
rounding of QLoRA, which leaves four bits of each weight (NF4). The model's text stays that of llama.py: what a method
adds stands in the place of one of its layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genai_kernels.nn import Linear, add_lora
from python_models.llama import Layer, Llama

TARGETS = ("qkv", "out", "gate_up", "down")  # every product of a layer
IGNORED = -100  # a following token that is not scored


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much each method adds."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05  # on the way to a low-rank adapter
    bottleneck: int = 24
    virtual_tokens: int = 16


class Bottleneck(nn.Module):
    """`x + up(gelu(down(x)))`, which is x at first.

    Source: Houlsby et al., "Parameter-efficient transfer learning for NLP", 2019.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = Linear(width, inner), Linear(inner, width)
        nn.init.normal_(self.down.weight, std=width**-0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(F.gelu(self.down(x)))


class VirtualTokens(nn.Module):
    """An embedding with rows behind those of the vocabulary, which alone learn; they begin as tokens drawn from it.

    Source: Lester et al., "The power of scale for parameter-efficient prompt tuning", 2021.
    """

    def __init__(self, embedding: nn.Embedding, count: int) -> None:
        super().__init__()
        self.words = embedding
        drawn = torch.randint(embedding.num_embeddings, (count,))
        self.prompt = nn.Parameter(embedding.weight.detach()[drawn].clone())

    @property
    def weight(self) -> torch.Tensor:
        """The vocabulary's."""
        return self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, torch.cat([self.words.weight, self.prompt]))


def _lora(**options: Any):
    def put(model: Llama, sizes: Sizes) -> None:
        add_lora(model, TARGETS, r=sizes.rank, lora_alpha=sizes.alpha, lora_dropout=sizes.dropout, **options)

    return put


def _bottleneck(model: Llama, sizes: Sizes) -> None:
    model.requires_grad_(False)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for part, name in ((layer.attention, "out"), (layer.mlp, "down")):
            product = getattr(part, name)
            setattr(part, name, nn.Sequential(product, Bottleneck(product.out_features, sizes.bottleneck)))


def _bitfit(model: Llama, sizes: Sizes) -> None:
    """The biases of all products; those that the model has not begin as 0.

    Source: Ben Zaken et al., "BitFit: simple parameter-efficient fine-tuning", 2022.
    """
    model.requires_grad_(False)
    for part in model.layers.modules():
        if isinstance(part, nn.Linear):
            start = part.weight.new_zeros(part.out_features) if part.bias is None else part.bias.detach()
            part.bias = nn.Parameter(start)


def _prompt(model: Llama, sizes: Sizes) -> None:
    model.requires_grad_(False)
    model.embedding = VirtualTokens(model.embedding, sizes.virtual_tokens)


def _full(model: Llama, sizes: Sizes) -> None:
    model.requires_grad_(True)


METHODS = {
    "lora": _lora(), "dora": _lora(use_dora=True), "qlora": _lora(quantize="nf4"), "bottleneck": _bottleneck,
    "bitfit": _bitfit, "prompt": _prompt, "full": _full,
}  # fmt: skip


class Adapted:
    """A model, the method that adapts it, and what of it learns."""

    def __init__(self, model: Llama, method: str, sizes: Sizes) -> None:
        self.model, self.method, self.sizes = model, method, sizes
        virtual = sizes.virtual_tokens if method == "prompt" else 0
        first = model.config.vocabulary
        self.virtual = torch.arange(first, first + virtual)  # tokens before every text
        self.config = dataclasses.replace(model.config, context=model.config.context - virtual)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> int:
        """How many numbers learn."""
        return sum(p.numel() for p in self.trainable().values())

    def _with_virtual(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.virtual.expand(len(tokens), -1), tokens], dim=1) if len(self.virtual) else tokens

    def loss(self, tokens: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """As `Llama.loss`: mean cross entropy of the following tokens, `[batch, T]` both, in nats."""
        ignored = following.new_full((len(following), len(self.virtual)), IGNORED)
        return self.model.loss(self._with_virtual(tokens), torch.cat([ignored, following], dim=1))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, T, vocabulary]`."""
        return self.model(self._with_virtual(tokens))[:, len(self.virtual) :]


def adapt(model: Llama, method: str, sizes: Sizes | None = None) -> Adapted:
    """Puts a method into a model, which it changes. What it draws is drawn from torch's generator.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"adapt: method: expected one of {', '.join(METHODS)}, got {method!r}")
    sizes = Sizes() if sizes is None else sizes
    METHODS[method](model, sizes)
    return Adapted(model, method, sizes)
