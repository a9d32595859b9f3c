"""The plainest cache a Llama can attend over, and greedy generation with it: what other caches are compared with."""

from __future__ import annotations

import torch

import genai_kernels as gk
from python_models.llama import Llama


class ContiguousCache:
    """Keys and values of `batch` sequences of equal length, in memory for `capacity` tokens each.

    Satisfies `llama.Cache`: the tokens of one forward pass are `batch * T`, those of a sequence one after the other.

    Args:
        model: whose sizes, dtype and device it has.
        batch: sequences.
        capacity: tokens of each, prompt included.
    """

    def __init__(self, model: Llama, batch: int, capacity: int) -> None:
        config, like = model.config, model.embedding.weight
        shape = (config.layers, batch, capacity, config.kv_heads, config.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.batch, self.capacity, self.length = batch, capacity, 0  # length: tokens that every layer has

    def positions(self, tokens: int) -> torch.Tensor:
        """`[batch * tokens]`: of the next so many tokens of each sequence."""
        return torch.arange(self.length, self.length + tokens, device=self.k.device).repeat(self.batch)

    def attend(self, layer_index, q, k, v, *, softmax_scale, window_size):
        """See `llama.Cache.attend`."""
        tokens, odd = divmod(len(q), self.batch)
        end = self.length + tokens
        if odd:
            raise ValueError(f"ContiguousCache: expected a multiple of {self.batch} tokens, got {len(q)}")
        if end > self.capacity:
            raise ValueError(f"ContiguousCache: expected at most {self.capacity} tokens a sequence, got {end}")
        for stored, new in ((self.k, k), (self.v, v)):
            stored[layer_index, :, self.length : end] = new.unflatten(0, (self.batch, tokens))
        seen = (part[layer_index, :, :end] for part in (self.k, self.v))
        y = gk.flash_attention(
            q.unflatten(0, (self.batch, tokens)), *seen, causal=True, softmax_scale=softmax_scale,
            window_size=window_size,
        )  # fmt: skip
        if layer_index == len(self.k) - 1:
            self.length = end
        return y.flatten(0, 1)


@torch.inference_mode()
def generate(model: Llama, prompt: torch.Tensor, max_new_tokens: int, *, cached: bool = True) -> torch.Tensor:
    """The likeliest token, again and again.

    Args:
        prompt: int64 `[batch, T]`, sequences of one length.
        max_new_tokens: at most so many; fewer if every sequence has come to one of `Config.ends`.
        cached: False computes the whole text again for each token.

    Returns:
        int64 `[batch, new]`, without the prompt. After its end a sequence repeats the token that ended it.

    Raises:
        ValueError: an empty prompt.
    """
    batch, length = prompt.shape
    if not length:
        raise ValueError("generate: prompt: expected at least one token")
    ends = torch.tensor(sorted(model.config.ends), dtype=torch.int64, device=prompt.device)
    cache = ContiguousCache(model, batch, length + max_new_tokens) if cached else None
    text, new = prompt, prompt
    while text.shape[1] < length + max_new_tokens:
        tokens = text.shape[1] if cache is None else new.shape[1]
        last = torch.arange(1, batch + 1, device=prompt.device) * tokens - 1
        if cache is None:
            logits = model(text, logits_of=last)
        else:
            logits = model(new.flatten(), cache.positions(tokens), cache, logits_of=last)
        new = logits.argmax(dim=-1, keepdim=True)
        over = torch.isin(text[:, -1:], ends) & (text.shape[1] > length)
        new = torch.where(over, text[:, -1:], new)
        text = torch.cat([text, new], dim=1)
        if bool(torch.isin(new, ends).all()):
            break
    return text[:, length:]
