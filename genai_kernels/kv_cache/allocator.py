"""The block allocator of a paged key/value cache: the Python face of csrc/runtime.

It holds no keys and no values and knows no tensor: it says in which slots they belong, and what has to be copied. Its
tables are memoryviews that `torch.frombuffer` takes without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .._runtime import (
    BlockAllocator as _BlockAllocator,
)
from .._runtime import (
    BlockError,
    DoubleFreeError,
    OutOfBlocksError,
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

# Where a user meets them: in a traceback, in a pickle.
for _error in (BlockError, DoubleFreeError, OutOfBlocksError, SwappedOutError, UnknownSequenceError):
    _error.__module__ = "genai_kernels.kv_cache"


class Request(NamedTuple):
    """A sequence to be allocated, for `allocate_batch`; any object with these three attributes will do.

    `tokens`: integers 0 <= t < 2**31, as a list or as a buffer of int32 or int64. Blocks are shared only between
    requests of one `adapter_id`, on which keys and values depend, and of one `salt`, bytes that are a tenant's own:
    without them a tenant could tell by the time of an answer what another has asked.

    >>> from genai_kernels.kv_cache import Request
    >>> Request([1, 2, 3])
    Request(tokens=[1, 2, 3], adapter_id=0, salt=b'')
    """

    tokens: Sequence[int]
    adapter_id: int = 0
    salt: bytes = b""


class BlockAllocator(_BlockAllocator):
    """A pool of `num_blocks` blocks of `block_size` tokens, handed out to sequences.

    `num_swap_blocks`: size of a second pool that sequences can be swapped out to. `window`: how many tokens before its
    own a query sees, the `left` of `window_size`; blocks before that are given back as a sequence is computed. None:
    all. `prefix_cache`: whether computed blocks are kept, and found again by prompts that begin alike.

    A sequence, from prompt to end:

    >>> from genai_kernels.kv_cache import BlockAllocator
    >>> blocks = BlockAllocator(num_blocks=8, block_size=4)
    >>> seq = blocks.allocate([5, 6, 7, 8, 9, 10])  # room for the prompt
    >>> blocks.slot_mapping(seq).tolist()           # where its keys and values belong: block * block_size + offset
    [0, 1, 2, 3, 4, 5]
    >>> blocks.commit(seq)                          # after they were computed: from now on others may find them
    >>> blocks.append(seq, [11])                    # the next token; nothing to copy
    []
    >>> blocks.block_table(seq).tolist(), blocks.num_tokens(seq), blocks.num_computed_tokens(seq)
    ([0, 1], 7, 6)

    A prompt that begins alike shares full blocks, and always has at least one token left to be computed:

    >>> other = blocks.allocate([5, 6, 7, 8, 1])
    >>> blocks.num_cached_tokens(other), blocks.block_table(other).tolist()
    (4, [0, 2])

    A fork shares all blocks until one side writes to the last one; that side gets a block of its own, into which the
    caller copies what is returned, in this order, before the next kernel writes to the cache:

    >>> blocks.commit(seq)
    >>> [beam] = blocks.fork(seq)
    >>> blocks.append(beam, [12])
    [(1, 3)]
    >>> blocks.append(seq, [13])
    []

    Many sequences at once, for a kernel:

    >>> tables, seq_lens = blocks.block_tables([seq, beam, other])
    >>> tables.tolist(), seq_lens.tolist()
    ([[0, 1], [0, 3], [0, 2]], [8, 8, 5])
    >>> import torch
    >>> torch.frombuffer(tables, dtype=torch.int32).view(3, -1).shape
    torch.Size([3, 2])

    The end. What was published stays cached until its block is needed:

    >>> for s in (seq, beam, other):
    ...     blocks.free(s)
    >>> stats = blocks.stats()
    >>> stats["used"], stats["cached"], stats["free"]
    (0, 1, 7)

    **Errors** leave everything as it was. `OutOfBlocksError`: the pool has not enough blocks; `can_allocate`,
    `can_append`, `can_swap_out` and `can_swap_in` tell beforehand. `UnknownSequenceError`: an id that is freed, of
    another allocator, or none at all; ids are never given out twice. `DoubleFreeError`: `free` of a freed id.
    `SwappedOutError`: the sequence is in the second pool. All four are `BlockError`s. ValueError and TypeError:
    arguments that make no sense. MemoryError: the host's own memory.

    >>> blocks.free(seq)
    Traceback (most recent call last):
    genai_kernels.kv_cache.DoubleFreeError: genai_kernels.BlockAllocator.free: seq: expected a live sequence, ...

    **Methods.** `seq` is an id; the batch forms do all or nothing.

    - `allocate(tokens, *, adapter_id=0, salt=b"") -> seq`; `allocate_batch(requests) -> [seq, ...]`.
    - `append(seq, tokens) -> [(source, destination), ...]`; `append_batch(seqs, tokens)`, each sequence once.
    - `commit(seq, num_computed=None)`: the first `num_computed` tokens (all of them) are in the cache. Full blocks are
      published now, never earlier; if an equal one is published already, the sequence goes over to that one and gives
      its own back, so take tables anew after a commit.
    - `fork(seq, n=1) -> [seq, ...]`: all tokens must be committed, else two sequences would write the rest.
    - `truncate(seq, num_tokens)`: for rejected tokens. Commit only accepted ones: a window that was given back cannot
      be had again, which is a ValueError.
    - `free(seq)`, also of a sequence that is swapped out.
    - `swap_out(seq)`, `swap_in(seq)`: the blocks to copy from one pool to the other, `[(source, destination), ...]`.
      What is still cached in the first pool is not copied back. Beams lose the sharing of unpublished blocks.
    - `num_tokens(seq)`, `num_computed_tokens(seq)`, `num_cached_tokens(seq)`, `is_swapped_out(seq)`, `sequences()`.
    - `slot_mapping(seq, start=0, end=None)`, int64; `slot_mapping_batch(seqs, starts, ends)`, one after the other.
    - `block_table(seq)`, int32; `block_tables(seqs, lengths=None, *, width=0)`: int32 `[n, at least width]` and
      `seq_lens`, int32 `[n]`; `csr(seqs, lengths=None)`: `indptr`, `indices`, `last_page_len`, int32. `lengths`: only
      the first so many tokens of each. An entry is -1 behind the end of a row and where a block fell out of the window,
      which no kernel reads.
    - `stats()`: `used`, `shared`, `cached`, `free` and `swapped` blocks, `sequences`, `tokens`, `waste` (the share of
      the slots of used blocks without a token), `prefix_queries` and `prefix_hits` (blocks looked up and found),
      `hash_collisions`, `evictions`, `merged`.
    - `drop_cached()`: forgets what no sequence holds, for instance after the weights have changed.
    - `num_available_blocks`, `num_blocks`, `block_size`, `num_swap_blocks`, `window`, `prefix_cache`.

    **Threads**: any number may call; each call is one step under a mutex. The GIL is released while a long prompt is
    hashed. After `os.fork` the child has a copy of its own, whole if no other thread was inside a call.

    Sources: PagedAttention (Kwon et al., SOSP 2023). csrc/runtime/README.md has design and complexity.
    """

    __slots__ = ()
