"""Paged key/value caches: which blocks of a pool belong to which sequence."""

from .allocator import (
    BlockAllocator,
    BlockError,
    DoubleFreeError,
    OutOfBlocksError,
    Request,
    SwappedOutError,
    UnknownSequenceError,
)

__all__ = [
    "BlockAllocator",
    "BlockError",
    "DoubleFreeError",
    "OutOfBlocksError",
    "Request",
    "SwappedOutError",
    "UnknownSequenceError",
]
