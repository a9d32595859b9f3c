"""A character-level Transformer language model with sliding-window attention.

RMSNorm before each part, grouped-query attention over the last `window` characters, SwiGLU, tied embeddings, and any of
the position embeddings of position_embeddings.py. Every heavy step is a function of `genai_kernels`; the same model in
plain PyTorch, its eager twin, is this model inside `with gk.use_backend("reference"):`.

`python -m python_models.char_lm --help` lists what it does as a program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import RMSNorm
from python_models.position_embeddings import PositionEmbedding


@dataclass(frozen=True)
class Config:
    vocabulary: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2  # each serves heads / kv_heads query heads
    hidden: int = 352  # of the gated MLP: 8/3 of the width, in whole cache lines
    window: int | None = 128  # a character sees itself and the window - 1 before it; None: all of them
    context: int = 1024  # characters of a training passage
    positions: str = "rope"

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class RingCache:
    """Keys and values of the last `window` characters, for generation: memory and time do not grow with the text.

    Position p lies in slot `p % window` and again `window` slots further, so that the last `window` positions are
    always one contiguous piece in their order: attention needs no index, and distances stay distances.
    """

    def __init__(self, config: Config, batch: int, like: torch.Tensor) -> None:
        if config.window is None:
            raise ValueError("RingCache: expected a model with a window, got window=None")
        self.window, self.length = config.window, 0  # length: characters seen so far
        shape = (batch, 2 * config.window, config.kv_heads, config.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def keys(self, tokens: int) -> int:
        """How many keys `append` will return for so many new characters."""
        return tokens if self.length == 0 else min(self.length + tokens, self.window)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the keys and values of a prompt or of one more character; returns those that attention reads."""
        tokens, window = k.shape[1], self.window
        if self.length and tokens != 1:
            raise ValueError(f"RingCache.append: expected one character after the prompt, got {tokens}")
        kept = min(tokens, window)
        slots = torch.arange(self.length + tokens - kept, self.length + tokens, device=k.device) % window
        for ring, new in ((self.k, k), (self.v, v)):
            ring[:, slots] = new[:, -kept:]
            ring[:, slots + window] = new[:, -kept:]
        prompt, self.length = self.length == 0, self.length + tokens
        if prompt:
            return k, v
        start = max(self.length - window, 0) % window
        seen = slice(start, start + min(self.length, window))
        return self.k[:, seen], self.v[:, seen]


class Attention(nn.Module):
    attend = staticmethod(gk.flash_attention)  # a benchmark may put another function of its signature here

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.sizes = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x, positions, start, options, cache=None):
        """x `[batch, tokens, width]`, its first token at position `start`; options: of the position embedding."""
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in self.qkv(x).split(self.sizes, dim=-1))
        q, k = positions.rotated(q, start), positions.rotated(k, start)
        if cache is not None:
            k, v = cache.append(k, v)
        left = -1 if self.config.window is None else self.config.window - 1
        return self.out(self.attend(q, k, v, causal=True, window_size=(left, 0), **options).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x):
        return self.down(gk.silu_and_mul(self.gate_and_up(x)))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.attention, self.mlp = Attention(config), GatedMLP(config)

    def forward(self, x, *where):
        x = x + self.attention(self.attention_norm(x), *where)
        return x + self.mlp(self.mlp_norm(x))


class CharLM(nn.Module):
    """`CharLM(Config(vocabulary=98))`: characters `[batch, tokens]` to logits `[batch, tokens, vocabulary]`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = PositionEmbedding(
            config.positions, config.width, config.heads, config.head_dim, config.context,
            distances=config.window or config.context,
        )  # fmt: skip
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in self.layers:
            for linear in (layer.attention.qkv, layer.mlp.gate_and_up):
                nn.init.normal_(linear.weight, std=config.width**-0.5)
            for linear in (layer.attention.out, layer.mlp.down):
                nn.init.zeros_(linear.weight)  # every layer begins as the identity: learns faster by a tenth of a bit

    def forward(self, characters: torch.Tensor, caches: list[RingCache] | None = None) -> torch.Tensor:
        """With `caches` (one a layer, from `new_caches`), characters continue the text that the caches have seen."""
        tokens = characters.shape[1]
        start, keys = (0, tokens) if caches is None else (caches[0].length, caches[0].keys(tokens))
        x = self.embedding(characters)
        added = self.positions.added(start, tokens)
        if added is not None:
            x = x + added
        options = self.positions.for_attention(tokens, keys)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.positions, start, options, None if caches is None else caches[i])
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, characters: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the characters that follow, in nats."""
        return F.cross_entropy(self(characters).flatten(0, 1), following.flatten())

    def new_caches(self, batch: int) -> list[RingCache]:
        return [RingCache(self.config, batch, self.embedding.weight) for _ in self.layers]

    @torch.inference_mode()
    def generate(
        self, prompt: torch.Tensor, count: int, *, temperature: float = 0.8, seed: int = 0, cached: bool = True
    ) -> Iterator[torch.Tensor]:
        """Yields `count` characters, `[batch]` each, that continue the prompt `[batch, tokens]`.

        Args:
            temperature: 0 takes the likeliest character.
            cached: keep the window's keys and values; False computes the whole text again for each character.
        """
        generator = torch.Generator().manual_seed(seed)
        caches = self.new_caches(len(prompt)) if cached else None
        text = new = prompt
        for _ in range(count):
            logits = self(new if cached else text, caches)[:, -1].double()
            if temperature > 0:
                cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(dim=-1)
                drawn = torch.rand(len(prompt), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
                new = torch.searchsorted(cumulative, drawn).clamp(max=logits.shape[-1] - 1)
            else:
                new = logits.argmax(dim=-1, keepdim=True)
            if not cached:
                text = torch.cat([text, new], dim=1)
            yield new[:, 0]


if __name__ == "__main__":
    from python_models.char_lm_main import main

    sys.exit(main())
