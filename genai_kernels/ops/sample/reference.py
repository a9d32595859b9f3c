"""sample in plain PyTorch: every row sorted, in the integers that README.md defines."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch

BITS = 40  # of the largest logit's weight: 2**40
LOG2E = float.fromhex("0x1.71547652b82fep0")
# 2**r = 1 + r (c9 + r (c8 + ...)) for |r| <= 1/2, from the highest power down
COEFFICIENTS = [
    float.fromhex(c)
    for c in (
        "0x1.e5e9f548e5725p-28", "0x1.b6571de2f2351p-24", "0x1.62bfe46117445p-20", "0x1.ffcb76789860fp-17",
        "0x1.4309130378460p-13", "0x1.5d87fe908f88ap-10", "0x1.3b2ab6fba385fp-7", "0x1.c6b08d7044119p-5",
        "0x1.ebfbdff82c590p-3", "0x1.62e42fefa39f7p-1", "0x1p0",
    )
]  # fmt: skip
PURPOSE = 0x73616D70
WORD = 2**32 - 1


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32 & WORD
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & WORD, p0 >> 32 ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def random_bits(seed: int, offset: int) -> int:
    """64 bits that follow from the seed and the offset of a request."""
    low, high, _, _ = philox((offset & WORD, offset >> 32 & WORD, 0, PURPOSE), seed)
    return high << 32 | low


def weights_of(y: torch.Tensor, largest: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """int64: 2**((y - largest) * rate + BITS), rounded."""
    t = ((y.double() - largest.double()) * rate).clamp_min(-64.0)
    n = t.round()
    r = t - n
    p = torch.full_like(t, COEFFICIENTS[0])
    for c in COEFFICIENTS[1:]:
        p = p * r + c
    return torch.ldexp(p, n + BITS).round().long()


def column(value: Any, batch: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number or a tensor `[batch]` as `[batch, 1]`."""
    return torch.as_tensor(value, dtype=dtype, device=device).expand(batch).unsqueeze(1)


def sample_reference(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    previous_tokens: torch.Tensor | None = None,
    previous_lens: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor = 0,
    return_logprobs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `genai_kernels.sample`."""
    (batch, vocab), device = logits.shape, logits.device
    given = logits.float() + 0.0  # -0 is 0
    double, whole = torch.float64, torch.int64
    temperatures = column(temperature, batch, double, device)
    penalties = column(repetition_penalty, batch, double, device)
    if seed is None:
        seed = torch.randint(2**63 - 1, (batch,))

    y = given
    if previous_tokens is not None:
        lens = column(previous_tokens.shape[1] if previous_lens is None else previous_lens, batch, whole, device)
        valid = torch.arange(previous_tokens.shape[1], device=device) < lens
        seen = torch.zeros(batch, vocab + 1, dtype=torch.bool, device=device)
        seen.scatter_(1, torch.where(valid, previous_tokens.long(), vocab), True)
        penalised = torch.where(y > 0, y.double() / penalties, y.double() * penalties).float()
        y = torch.where(seen[:, :vocab] & (penalties != 1), penalised, y)

    largest = y.amax(1, keepdim=True)
    order = y.sort(dim=1, descending=True, stable=True).indices
    rate = (LOG2E / torch.where(temperatures == 0, 1.0, temperatures)).clamp_max(2.0**1000)
    ranked = weights_of(y, largest, rate).gather(1, order)
    limit = column(top_k, batch, whole, device)
    limit = torch.where(limit <= 0, vocab, limit)
    ranked = torch.where(torch.arange(vocab, device=device) < limit, ranked, 0)
    shares = [
        total if p >= 1 else max(1, math.ceil(Fraction(p) * total))
        for p, total in zip(
            column(top_p, batch, double, device)[:, 0].tolist(), ranked.sum(1).tolist(), strict=True
        )
    ]  # fmt: skip
    before = ranked.cumsum(1) - ranked
    ranked = torch.where(before < torch.tensor(shares, dtype=whole, device=device).unsqueeze(1), ranked, 0)
    least = (column(min_p, batch, double, device) * 2.0**BITS).ceil()
    weights = torch.zeros_like(ranked).scatter_(1, order, torch.where(ranked >= least, ranked, 0))

    sums = weights.cumsum(1)
    totals = sums[:, -1].tolist()
    seeds, offsets = (column(v, batch, whole, device)[:, 0].tolist() for v in (seed, offset))
    drawn = [random_bits(s, o) * w >> 64 for s, o, w in zip(seeds, offsets, totals, strict=True)]
    tokens = torch.searchsorted(sums, torch.tensor(drawn, dtype=whole, device=device).unsqueeze(1), right=True)
    tokens = torch.where(temperatures == 0, order[:, :1], tokens)
    if not return_logprobs:
        return tokens[:, 0]

    def log(values: list[float]) -> torch.Tensor:
        return torch.tensor([math.log(v) for v in values], dtype=double, device=device)

    chosen = weights.gather(1, tokens)[:, 0].tolist()
    final = log([1.0 if t == 0 else w / n for w, n, t in zip(chosen, totals, temperatures[:, 0].tolist(), strict=True)])
    largest = given.amax(1, keepdim=True)
    all_weights = weights_of(given, largest, torch.tensor(LOG2E, dtype=double, device=device)).sum(1).tolist()
    above = (given.gather(1, tokens).double() - largest.double())[:, 0]
    return tokens[:, 0], (above - log([n / 2.0**BITS for n in all_weights])).float(), final.float()
