"""The keys and values themselves: tensors in blocks, beside the allocator that says whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import append_kv_cache, copy_blocks, paged_attention, swap_blocks  # type: ignore[attr-defined]
from .allocator import BlockAllocator

Copies = Sequence[tuple[int, int]]


def _pool(blocks: int, layers: int, block_size: int, heads: int, dim: int, like: torch.Tensor, int8: bool) -> Any:
    """Keys and values `[blocks, layers, 2, block_size, heads, dim]`, and their scales: a block is one piece of memory,
    so that it is copied or swapped for all layers at once.
    """
    shape = (blocks, layers, 2, block_size, heads)
    if int8:
        return (
            torch.zeros(*shape, dim, dtype=torch.int8, device=like.device),
            torch.zeros(shape, dtype=torch.float32, device=like.device),
        )
    return torch.zeros(*shape, dim, dtype=like.dtype, device=like.device), None


class PagedKVCache:
    """A pool of key and value blocks for all layers of a model, with its `BlockAllocator`.

    Args:
        layers, kv_heads, head_dim: of the model.
        num_blocks, block_size: of the pool; a block holds `block_size` tokens of every layer.
        like: a tensor with the dtype and the device of the cache.
        num_swap_blocks: size of the pool that sequences are swapped out to; on the CPU.
        window: how many tokens before its own a query sees at most, in every layer; None: all.
        prefix_cache: see `BlockAllocator`.
        int8: stored as int8 with a scale for each token and head.

    Attributes:
        blocks: the allocator. What its methods return to be copied, `copy`, `swap_out` and `swap_in` carry out.

    >>> import torch
    >>> from genai_kernels.kv_cache import PagedKVCache
    >>> cache = PagedKVCache(1, 2, 8, num_blocks=4, block_size=4, like=torch.zeros(0))
    >>> seq = cache.blocks.allocate([1, 2, 3, 4, 5])
    >>> batch = cache.batch([seq], [0], [5])  # all five tokens are computed now
    >>> q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    >>> batch.attend(0, q, k, v).shape
    torch.Size([5, 4, 8])
    >>> cache.blocks.commit(seq)
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        num_blocks: int,
        block_size: int = 16,
        like: torch.Tensor,
        num_swap_blocks: int = 0,
        window: int | None = None,
        prefix_cache: bool = True,
        int8: bool = False,
    ) -> None:
        self.blocks = BlockAllocator(
            num_blocks, block_size, num_swap_blocks=num_swap_blocks, window=window, prefix_cache=prefix_cache
        )
        sizes = layers, block_size, kv_heads, head_dim
        self.kv, self.scales = _pool(num_blocks, *sizes, like, int8)
        self.swapped, self.swapped_scales = _pool(num_swap_blocks, *sizes, like.cpu(), int8)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool that attention reads."""
        return self.kv.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def _each(self, copies: Copies, source: Any, destination: Any) -> None:
        if not copies:
            return
        mapping = torch.tensor(copies, dtype=torch.int64)
        for one, other in zip(source, destination, strict=True):
            if one is other and one is not None:
                copy_blocks(one, mapping)
            elif one is not None:
                swap_blocks(one, other, mapping)

    def copy(self, copies: Copies) -> None:
        """What `append` asked for: a shared block is copied before one of its sequences writes to it."""
        # a block may be freed and taken again between two copies: their order matters, and each is its own call then
        written = {to for _, to in copies}
        if len(written) < len(copies) or written & {source for source, _ in copies}:
            for pair in copies:
                self._each([pair], (self.kv, self.scales), (self.kv, self.scales))
            return
        self._each(copies, (self.kv, self.scales), (self.kv, self.scales))

    def swap_out(self, seq: int) -> None:
        """Moves a sequence to the second pool."""
        self._each(self.blocks.swap_out(seq), (self.kv, self.scales), (self.swapped, self.swapped_scales))

    def swap_in(self, seq: int) -> None:
        """Moves a sequence back."""
        self._each(self.blocks.swap_in(seq), (self.swapped, self.swapped_scales), (self.kv, self.scales))

    def batch(self, seqs: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> PagedBatch:
        """Tokens `starts[i] : ends[i]` of each sequence, to be computed in one pass over the layers.

        Everything before `starts[i]` must have been computed. Commit afterwards.
        """
        return PagedBatch(self, seqs, starts, ends)


class PagedBatch:
    """What one pass over a model's layers needs to know: which tokens it computes, and where their sequences lie.

    Attributes:
        positions: int64 `[tokens]`, of each token in its sequence.
        last: int64 `[sequences]`, the row of the last token of each.
    """

    def __init__(self, cache: PagedKVCache, seqs: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> None:
        self.cache = cache
        blocks, device = cache.blocks, cache.kv.device
        tables, seq_lens = blocks.block_tables(seqs, ends)
        counts = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.block_table = torch.frombuffer(tables, dtype=torch.int32).view(len(seqs), -1).to(device)
        self.seq_lens = torch.frombuffer(seq_lens, dtype=torch.int32).to(device)
        self.cu_seqlens_q = bounds.to(torch.int32).to(device)
        self.last = (bounds[1:] - 1).to(device)
        slots = blocks.slot_mapping_batch(seqs, starts, ends)
        self.slot_mapping = torch.frombuffer(slots, dtype=torch.int64).to(device)
        self.positions = torch.cat([torch.arange(s, e) for s, e in zip(starts, ends, strict=True)]).to(device)

    def attend(
        self,
        layer_index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        **options: Any,
    ) -> torch.Tensor:
        """Stores k and v `[tokens, kv_heads, head_dim]` of a layer, and attends with q `[tokens, heads, head_dim]`.

        `options`: more arguments of `paged_attention`.
        """
        k_cache, v_cache = self.cache.kv[:, layer_index, 0], self.cache.kv[:, layer_index, 1]
        scales: dict[str, torch.Tensor] = {}
        if self.cache.scales is not None:
            scales = {name: self.cache.scales[:, layer_index, i] for i, name in enumerate(("k_scale", "v_scale"))}
        append_kv_cache(k, v, k_cache, v_cache, self.slot_mapping, **scales)
        return paged_attention(
            q, k_cache, v_cache, self.block_table, self.seq_lens, cu_seqlens_q=self.cu_seqlens_q,
            softmax_scale=softmax_scale, window_size=window_size, **scales, **options,
        )  # fmt: skip
