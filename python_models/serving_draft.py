"""Guesses of how a text goes on, for speculative decoding. A wrong guess costs time and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from python_models.llama import Llama
from python_models.llama_cache import ContiguousCache


class Drafter(Protocol):
    def propose(self, request: Any, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow `tokens`, the text of a `serving.Request` so far."""
        ...


class NgramDrafter:
    """What followed the last time the text's last few tokens occurred in it."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.sizes = range(longest, shortest - 1, -1)

    def propose(self, request: Any, tokens: Sequence[int], count: int) -> list[int]:
        for size in self.sizes:
            tail = list(tokens[-size:])
            for at in range(len(tokens) - size - 1, -1, -1):
                if tokens[at] == tail[0] and list(tokens[at : at + size]) == tail:
                    return list(tokens[at + size : at + size + count])
        return []


class ModelDrafter:
    """The likeliest tokens of a smaller model, which keeps a cache of its own for each request."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.caches: dict[int, tuple[ContiguousCache, list[int]]] = {}

    @torch.inference_mode()
    def propose(self, request: Any, tokens: Sequence[int], count: int) -> list[int]:
        room = len(request.prompt) + request.sampling.max_tokens + count + 1
        cache, seen = self.caches.pop(id(request), None) or (ContiguousCache(self.model, 1, room), [])
        same = next(
            (i for i, (a, b) in enumerate(zip(seen, tokens, strict=False)) if a != b), min(len(seen), len(tokens))
        )
        cache.length = min(same, len(tokens) - 1)
        text = list(tokens)
        for _ in range(count):
            new = torch.tensor(text[cache.length :])
            logits = self.model(new, cache.positions(len(new)), cache, logits_of=torch.tensor([len(new) - 1]))
            text.append(int(logits.argmax()))
        self.caches[id(request)] = cache, text[: cache.length]
        while len(self.caches) > 256:  # of requests that are long done
            self.caches.pop(next(iter(self.caches)))
        return text[len(tokens) :]
