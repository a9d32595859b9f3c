"""Philox4x32-10 in PyTorch: the random words of dropout, for the references; csrc/core/philox.h has the same in C++."""

from __future__ import annotations

import math

import torch

MASK32 = 0xFFFFFFFF


def philox(c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: int, seed: int) -> list[torch.Tensor]:
    """Philox4x32-10: four words (int64 tensors below 2^32) for each counter."""
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape)
    w = [c.broadcast_to(shape) for c in (c0, c1, c2)] + [torch.full(shape, c3, device=c0.device)]
    key0, key1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves both halves right
        product0, product1 = w[0] * 0xD2511F53, w[2] * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & MASK32, (product1 >> 32) & MASK32
        w = [high1 ^ w[1] ^ key0, product1 & MASK32, high0 ^ w[3] ^ key1, product0 & MASK32]
        key0, key1 = (key0 + 0x9E3779B9) & MASK32, (key1 + 0xBB67AE85) & MASK32
    return w


def normal(seeds: torch.Tensor, count: int, offset: int, stream: str, dtype: torch.dtype) -> torch.Tensor:
    """`[len(seeds), count]` normal numbers, a row from each int64 seed: what csrc/cpu/normal.h makes.

    In float64 if `dtype` is that, otherwise in float32 and then rounded to it.
    """
    streams = {"plain": 0x6E6F726D, "step": 0x73746570, "known": 0x6B6E6F77, "latent": 0x6C61746E}
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    counters = torch.arange((count + 63) // 64 * 16, device=seeds.device)
    c0 = torch.tensor(offset, device=seeds.device)
    rows = []
    for seed in seeds.tolist():
        words = philox(c0, counters & MASK32, counters >> 32, streams[stream], seed)
        parts = []
        for w in (0, 2):
            radius = (-2 * (((words[w] >> 9).to(compute) + 0.5) * 2.0**-23).log()).sqrt()
            angle = (words[w + 1] >> 8).to(compute) * 2.0**-24 * (2 * math.pi)
            parts += [radius * angle.cos(), radius * angle.sin()]
        rows.append(torch.stack([p.view(-1, 16) for p in parts], dim=1).flatten()[:count])
    return torch.stack(rows).to(dtype) if rows else torch.empty(0, count, dtype=dtype, device=seeds.device)
