"""copy_blocks, swap_blocks, gather_kv_cache: whole blocks of a paged cache."""

from __future__ import annotations

from typing import Any

import torch

from ...registry import Make, Sample, op
from ...torch_ops import fake, kernel, written

__all__ = ["copy_blocks", "gather_kv_cache", "swap_blocks"]

_copy_blocks = kernel("copy_blocks")
_swap_blocks = kernel("swap_blocks")
_gather_kv_cache = kernel("gather_kv_cache")


def _mapping(m: Make, sources: int, destinations: int, pairs: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Sources from the lower blocks, each destination once, from the upper ones."""
    to = torch.randperm(destinations, generator=m.generator)[:pairs]
    return torch.stack([m.ints(0, sources, (pairs,), torch.int64), to], dim=1).to(dtype)


def copy_blocks_reference(cache: torch.Tensor, block_mapping: torch.Tensor) -> torch.Tensor:
    """See `genai_kernels.copy_blocks`."""
    cache[block_mapping[:, 1].long()] = cache[block_mapping[:, 0].long()]
    return cache


def _copied(m: Make, *shape: int, pairs: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    half = shape[0] // 2
    mapping = _mapping(m, half, shape[0] - half, pairs)
    return (m(*shape), mapping + torch.tensor([0, half])), {}


def _half(m: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (m(8, 2, 4, 3)[:, 1], _copied(m, 8, 4, pairs=3)[0][1]), {}


@op(
    reference=copy_blocks_reference,
    samples=[
        Sample("plain", lambda m: _copied(m, 9, 16, 2, 8, pairs=4)),
        Sample("none", lambda m: _copied(m, 9, 4, pairs=0)),
        Sample("scales", lambda m: _copied(m, 9, 16, 2, pairs=3)),
        Sample("half_of_a_tensor", _half),
        Sample("b256_64KiB", lambda m: _copied(m, 1024, 16, 8, 128, pairs=256), bench=True,
               elements=2.0 * 256 * 16 * 8 * 128),
    ],
    differentiable=False,
    gpu=(),  # what PyTorch's own indexing does well
    exact=True,
    mutates=True,
    overloads=("copy_blocks",),
)  # fmt: skip
def copy_blocks(cache: torch.Tensor, block_mapping: torch.Tensor) -> torch.Tensor:
    """Copies blocks within a cache, in place: what a fork asks for before a shared block is written.

    Args:
        cache: `[num_blocks, ...]`, any dtype; each block contiguous memory.
        block_mapping: int32 or int64 `[pairs, 2]`: source and destination. Each destination once, and none of them a
            source: the order of the copies does not matter.

    Returns:
        cache.

    Raises:
        ValueError: a block that is written twice, or read and written; blocks that are not contiguous.
        IndexError: a block outside of the cache.

    >>> import torch, genai_kernels as gk
    >>> gk.copy_blocks(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2, 0]])).flatten()
    tensor([3., 2., 3.])
    """
    _copy_blocks(cache, block_mapping)
    written(cache)
    return cache


def swap_blocks_reference(source: torch.Tensor, destination: torch.Tensor, block_mapping: torch.Tensor) -> torch.Tensor:
    """See `genai_kernels.swap_blocks`."""
    destination[block_mapping[:, 1].long().to(destination.device)] = source[
        block_mapping[:, 0].long().to(source.device)
    ].to(destination.device)
    return destination


@op(
    reference=swap_blocks_reference,
    samples=[
        Sample("plain", lambda m: ((m(9, 16, 2, 8), m(5, 16, 2, 8), _mapping(m, 9, 5, 4)), {})),
        Sample("int32", lambda m: ((m(9, 16), m(5, 16), _mapping(m, 9, 5, 5, torch.int32)), {})),
    ],
    differentiable=False,
    gpu=(),  # what PyTorch's own indexing does well
    exact=True,
    mutates=True,
    overloads=("swap_blocks",),
)
def swap_blocks(source: torch.Tensor, destination: torch.Tensor, block_mapping: torch.Tensor) -> torch.Tensor:
    """Copies blocks from one pool to another: out of the way when memory is short, and back.

    Args:
        source: `[num_blocks, ...]`, any dtype; each block contiguous memory.
        destination: `[other_num_blocks, ...]`, blocks of the same shape and dtype, in other memory.
        block_mapping: int32 or int64 `[pairs, 2]`: block of source, block of destination, each of these once.

    Returns:
        destination.

    Raises:
        ValueError: blocks of different shapes, a destination named twice, pools that overlap.
        IndexError: a block outside of its pool.

    >>> import torch, genai_kernels as gk
    >>> gk.swap_blocks(torch.tensor([[1.0], [2.0]]), torch.zeros(3, 1), torch.tensor([[1, 0]])).flatten()
    tensor([2., 0., 0.])
    """
    _swap_blocks(source, destination, block_mapping)
    written(destination)
    return destination


def gather_kv_cache_reference(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    *,
    indptr: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    last_page_len: torch.Tensor | None = None,
    kv_layout: str = "NHD",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `genai_kernels.gather_kv_cache`."""
    if kv_layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    size = k_cache.shape[1]
    if block_table is not None and seq_lens is not None:
        lists = [(row, n) for row, n in zip(block_table, seq_lens.tolist(), strict=True)]
    else:
        assert indptr is not None
        assert indices is not None
        assert last_page_len is not None
        bounds = indptr.tolist()
        lists = [
            (indices[begin:end], max(end - begin - 1, 0) * size + n)
            for begin, end, n in zip(bounds, bounds[1:], last_page_len.tolist(), strict=False)
        ]
    found = []
    for cache in (k_cache, v_cache):
        parts = [cache[pages[: -(-n // size)].long()].flatten(0, 1)[:n] for pages, n in lists]
        found.append(torch.cat([cache[0, :0], *parts]))
    return found[0], found[1]


def _gathered(m: Make, lengths: list[int], size: int = 4, csr: bool = False, **options: Any):
    counts = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(counts) + 2, generator=m.generator).int()
    inner = (3, size) if options.get("kv_layout") == "HND" else (size, 3)
    caches = m(len(order), *inner, 5), m(len(order), *inner, 7)
    if csr:
        options["indptr"] = torch.tensor([0, *counts]).cumsum(0).int()
        options["indices"] = order[: sum(counts)]
        options["last_page_len"] = torch.tensor([(n - 1) % size + 1 if n else 0 for n in lengths]).int()
        return caches, options
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    for row, pages in zip(table, order.split([*counts, 2]), strict=False):
        row[: len(pages)] = pages
    return (*caches, table, torch.tensor(lengths).int()), options


@op(
    reference=gather_kv_cache_reference,
    samples=[
        Sample("plain", lambda m: _gathered(m, [9, 0, 4, 17])),
        Sample("heads_first", lambda m: _gathered(m, [9, 4], kv_layout="HND")),
        Sample("lists", lambda m: _gathered(m, [9, 0, 4], csr=True)),
        Sample("block_1", lambda m: _gathered(m, [9, 4], size=1)),
    ],
    differentiable=False,
    gpu=(),  # what PyTorch's own indexing does well
    exact=True,
    overloads=("gather_kv_cache",),
)
def gather_kv_cache(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    *,
    indptr: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    last_page_len: torch.Tensor | None = None,
    kv_layout: str = "NHD",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of sequences out of their blocks, one behind the other: for what knows no pages.

    Args:
        k_cache, v_cache, block_table, seq_lens, indptr, indices, last_page_len, kv_layout: as in `paged_attention`;
            every entry of a table up to its sequence's length is read.

    Returns:
        `[tokens of all sequences, kv_heads, dim]` of k and of v, contiguous, dtype of the cache.

    Raises:
        ValueError, IndexError, TypeError: as `paged_attention`.

    >>> import torch, genai_kernels as gk
    >>> cache = torch.arange(8.0).view(4, 2, 1, 1)  # 4 blocks of 2 tokens
    >>> table, lengths = torch.tensor([[3, 0]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    >>> gk.gather_kv_cache(cache, cache, table, lengths)[0].flatten()
    tensor([6., 7., 0.])
    """
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f'genai_kernels.gather_kv_cache: kv_layout: expected "NHD" or "HND", got {kv_layout!r}')
    heads_first = kv_layout == "HND"
    return _gather_kv_cache(k_cache, v_cache, block_table, seq_lens, indptr, indices, last_page_len, heads_first)


@fake("copy_blocks")
def _(cache, block_mapping):
    return None


@fake("swap_blocks")
def _(source, destination, block_mapping):
    return None


@fake("gather_kv_cache")
def _(k_cache, v_cache, block_table, seq_lens, indptr, indices, last_page_len, heads_first):
    if seq_lens is None and indptr is None:
        raise ValueError("genai_kernels.gather_kv_cache: block_table: expected block_table and seq_lens, or indptr")
    tokens = torch.library.get_ctx().new_dynamic_size()  # known to the lengths alone
    heads = k_cache.shape[1 if heads_first else 2]
    return tuple(c.new_empty(tokens, heads, c.shape[-1]) for c in (k_cache, v_cache))
