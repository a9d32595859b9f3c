"""How a Transformer learns where a token stands: seven ways behind one switch.

Absolute positions are added to the token embeddings (`sinusoidal`, fixed, or `learned`). Relative ones change the
scores by the distance from query to key: as a bias (`relative`: one number per head and distance; `t5`: per head and
bucket of distances; `alibi`: a fixed slope per head), or by turning queries and keys (`rope`). `none` leaves it to the
causal mask alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import genai_kernels as gk

POSITIONS = ("none", "sinusoidal", "learned", "relative", "t5", "alibi", "rope")


def sinusoids(tokens: int, width: int) -> torch.Tensor:
    """`[tokens, width]`: sine and cosine of the position at `width / 2` frequencies. Vaswani et al., 2017."""
    angle = _angles(tokens, width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


def _angles(tokens: int, width: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.arange(tokens, dtype=torch.float64)[:, None] * frequency


def alibi_slopes(heads: int) -> torch.Tensor:
    """`[heads]`: 2^-1 down to 2^-8 in equal ratios. Press et al., "Train short, test long", 2022."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


def t5_buckets(distances: int, buckets: int) -> torch.Tensor:
    """The bucket of each distance below `distances`: the first half exact, then growing. Raffel et al., "T5", 2020."""
    distance, exact = torch.arange(distances), buckets // 2
    if distances <= exact:
        return distance
    growing = torch.log(distance.clamp(min=1) / exact) / math.log(distances / exact) * (buckets - exact)
    return torch.where(distance < exact, distance, (exact + growing.long()).clamp(max=buckets - 1))


def bias_from_distances(by_distance: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """Spreads `[heads, distances]` to the bias `[1, heads, queries, keys]`; distances beyond the last get 0.

    The distance of query i and key j is `i + keys - queries - j`, so all rows are one row, shifted. Written behind each
    other without its last element, rows of length L do shift by one: no gather, and the gradient is a plain sum.
    """
    heads, distances = by_distance.shape
    length = queries + keys
    shift = torch.arange(length)  # j - i modulo `length`
    distance = keys - queries - torch.where(shift < keys, shift, shift - length)
    distance = torch.where((distance >= 0) & (distance < distances), distance, distances)
    row = nn.functional.pad(by_distance, (0, 1)).index_select(1, distance)
    rows = row[:, None].expand(heads, queries, length).reshape(heads, queries * length)
    return rows[:, : queries * (length - 1)].view(1, heads, queries, length - 1)[..., :keys]


class PositionEmbedding(nn.Module):
    """One of POSITIONS for a model of the given sizes.

    Args:
        kind: one of POSITIONS.
        width: of the token embeddings; heads, head_dim: of the queries.
        context: tokens that tables are made for. `learned` ends there; the other tables grow when they must.
        distances: how far a query looks back, its own place included; a bias is learned for so many.

    Raises:
        ValueError: an unknown kind; from `added`, a position that `learned` has no entry for.
    """

    def __init__(self, kind: str, width: int, heads: int, head_dim: int, context: int, distances: int) -> None:
        super().__init__()
        if kind not in POSITIONS:
            raise ValueError(f"PositionEmbedding: kind: expected one of {', '.join(POSITIONS)}, got {kind!r}")
        self.kind, self.width, self.head_dim = kind, width, head_dim
        if kind == "learned":
            self.table = nn.Parameter(torch.randn(context, width) * 0.02)
        elif kind == "relative":
            self.by_distance = nn.Parameter(torch.zeros(heads, distances))
        elif kind == "t5":
            self.register_buffer("bucket", t5_buckets(distances, 32), persistent=False)
            self.by_bucket = nn.Parameter(torch.zeros(heads, 32))
        elif kind == "alibi":
            self.register_buffer("slopes", alibi_slopes(heads), persistent=False)
        self._grow(context)

    def _grow(self, tokens: int) -> None:
        """Tables for at least so many tokens, in float32, then in the dtype that the old ones had."""
        tokens = 1 << (tokens - 1).bit_length()
        if self.kind == "sinusoidal":
            old = getattr(self, "table", None)
            self.register_buffer("table", sinusoids(tokens, self.width).to(old), persistent=False)
        elif self.kind == "rope":
            old = getattr(self, "cos", None)
            angle = _angles(tokens, self.head_dim)
            self.register_buffer("cos", angle.cos().float().to(old), persistent=False)
            self.register_buffer("sin", angle.sin().float().to(old), persistent=False)

    def added(self, start: int, tokens: int) -> torch.Tensor | None:
        """What is added to the embeddings of the tokens from `start` on: `[tokens, width]` or None."""
        if self.kind not in ("sinusoidal", "learned"):
            return None
        if start + tokens > len(self.table):
            if self.kind == "learned":
                last = start + tokens - 1
                raise ValueError(f"PositionEmbedding: learned: expected a position below {len(self.table)}, got {last}")
            self._grow(start + tokens)
        return self.table[start : start + tokens]

    def rotated(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Queries or keys `[batch, tokens, heads, head_dim]`, turned by their positions under `rope`."""
        if self.kind != "rope":
            return x
        end = start + x.shape[1]
        if end > len(self.cos):
            self._grow(end)
        return gk.rotary_embedding(x, self.cos[start:end], self.sin[start:end])

    def for_attention(self, queries: int, keys: int) -> dict[str, Any]:
        """More arguments for `gk.flash_attention`: a bias or slopes."""
        if self.kind == "alibi":
            return {"alibi_slopes": self.slopes}
        if self.kind == "relative":
            return {"attn_bias": bias_from_distances(self.by_distance, queries, keys)}
        if self.kind == "t5":
            return {"attn_bias": bias_from_distances(self.by_bucket.index_select(1, self.bucket), queries, keys)}
        return {}
