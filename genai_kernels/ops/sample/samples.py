"""Samples, benchmark cases and peers of sample."""

from __future__ import annotations

from typing import Any

import torch

from ...registry import Make, Sample


def drawn(
    m: Make, batch: int, vocab: int, scale: float = 3.0, **options: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of sample: normal logits, a seed for each request."""
    return (m(batch, vocab, scale=scale),), {"seed": m.ints(-(2**62), 2**62, (batch,), torch.int64), **options}


def seen(m: Make, batch: int, vocab: int, tokens: int, dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    """Previous tokens with padding that is not in the vocabulary."""
    lens = m.ints(0, tokens + 1, (batch,))
    previous = m.ints(0, vocab, (batch, tokens), dtype)
    previous[torch.arange(tokens) >= lens[:, None]] = -1
    return {"previous_tokens": previous, "previous_lens": lens}


def with_logits(call: tuple[tuple[Any, ...], dict[str, Any]], change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with other logits."""
    (logits,), options = call
    return (change(logits),), options


def mixed(m: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Every parameter a tensor, and other requests beside each other."""
    return drawn(
        m, 6, 3000,
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.5, 0.1, 2.0]),
        top_k=torch.tensor([5, 0, 40, 1, -1, 9999], dtype=torch.int32),
        top_p=torch.tensor([0.5, 0.9, 0.95, 1.0, 0.3, 0.0], dtype=torch.float64),
        min_p=torch.tensor([0.0, 0.05, 0.0, 0.1, 0.0, 0.2]),
        repetition_penalty=torch.tensor([1.3, 1.0, 1.1, 0.8, 2.0, 1.2]),
        offset=m.ints(0, 10**6, (6,)),
        return_logprobs=True,
        **seen(m, 6, 3000, 50),
    )  # fmt: skip


SAMPLES = [
    Sample("plain", lambda m: drawn(m, 3, 777, return_logprobs=True)),
    Sample("long", lambda m: drawn(m, 2, 5003, return_logprobs=True)),
    Sample("greedy", lambda m: drawn(m, 3, 1500, temperature=0, return_logprobs=True)),
    Sample("one_token", lambda m: drawn(m, 3, 1, top_k=1, top_p=0.5, return_logprobs=True)),
    Sample("no_request", lambda m: drawn(m, 0, 7)),
    Sample("top_k", lambda m: drawn(m, 4, 20000, top_k=50)),
    Sample("top_k_large", lambda m: drawn(m, 3, 5000, top_k=1700, return_logprobs=True)),
    Sample("top_p", lambda m: drawn(m, 4, 5000, top_p=0.9, return_logprobs=True)),
    Sample("top_p_few", lambda m: drawn(m, 4, 300, top_p=0.6, temperature=0.8)),
    Sample("top_p_flat", lambda m: drawn(m, 3, 9000, scale=0.01, top_p=0.5)),
    Sample("min_p", lambda m: drawn(m, 4, 3000, min_p=0.02, temperature=1.3, return_logprobs=True)),
    Sample("top_k_p", lambda m: drawn(m, 4, 33000, top_k=64, top_p=0.8, min_p=0.01, return_logprobs=True)),
    Sample("top_k_p_large", lambda m: drawn(m, 3, 6000, scale=1.0, top_k=3000, top_p=0.7)),
    Sample("penalty", lambda m: drawn(m, 4, 500, repetition_penalty=1.4, return_logprobs=True, **seen(m, 4, 500, 90))),
    Sample("penalty_below_1", lambda m: drawn(m, 2, 5000, repetition_penalty=0.7, top_p=0.9, **seen(m, 2, 5000, 30))),
    Sample("mixed", mixed),
    Sample("equal", lambda m: with_logits(drawn(m, 3, 2500, top_k=1100, top_p=0.9), lambda x: x * 0)),
    Sample("steps", lambda m: with_logits(drawn(m, 4, 4000, top_k=700, top_p=0.8), torch.round)),
    Sample("masked", lambda m: with_logits(drawn(m, 3, 2500, top_p=0.9), lambda x: x.masked_fill(x < 4, -torch.inf))),
    Sample("strided", lambda m: with_logits(drawn(m, 3, 4000, top_k=9), lambda x: x[:, ::2])),
    Sample("columns", lambda m: with_logits(drawn(m, 30, 30, top_p=0.8), torch.t)),
]  # fmt: skip


def _bench(batch: int, vocab: int, name: str, **options: Any) -> Sample:
    return Sample(
        f"{name}_b{batch}_v{vocab // 1000}k",
        lambda m: drawn(m, batch, vocab, **options),
        bench=True,
        elements=float(batch * vocab),
        peers=("eager", "argmax") if options.get("temperature") == 0 else ("eager",),
    )


_FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "top_k_p": {"top_k": 50, "top_p": 0.9, "temperature": 0.8},
    "greedy": {"temperature": 0},
}
SAMPLES += [
    _bench(batch, vocab, name, **options)
    for name, options in _FILTERS.items()
    for batch, vocab in ((1, 128000), (64, 128000))
]
SAMPLES += [_bench(batch, vocab, "top_p", top_p=0.9) for batch in (1, 64) for vocab in (32000, 256000)]


def argmax(logits, **_):
    """PyTorch's own greedy choice."""
    return logits.argmax(1)


# Eager is the sort: another random generator would draw other tokens, and nothing could be checked.
PEERS = {"argmax": argmax}
