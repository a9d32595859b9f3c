"""Philox4x32-10 in PyTorch: the random words of dropout, for the references; csrc/core/philox.h has the same in C++."""

from __future__ import annotations

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
