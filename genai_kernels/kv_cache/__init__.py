"""Paged key/value caches: the blocks of a pool, and whose they are."""

from .allocator import (
    BlockAllocator,
    BlockError,
    DoubleFreeError,
    OutOfBlocksError,
    Request,
    SwappedOutError,
    UnknownSequenceError,
)
from .paged import PagedBatch, PagedKVCache

__all__ = [
    "BlockAllocator",
    "BlockError",
    "DoubleFreeError",
    "OutOfBlocksError",
    "PagedBatch",
    "PagedKVCache",
    "Request",
    "SwappedOutError",
    "UnknownSequenceError",
]
