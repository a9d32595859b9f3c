"""The key of a cached block: SHA-256 over typed fields with their lengths, and what happens where it is not enough."""

import hashlib
import itertools
import random
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given

from genai_kernels import _runtime
from genai_kernels.kv_cache import BlockAllocator, Request


@pytest.mark.parametrize("size", [*range(131), 1000, 4095, 4096, 100_000])
def test_sha256_at_every_length(size):
    data = random.Random(size).randbytes(size)
    assert _runtime.sha256(data) == hashlib.sha256(data).digest()


@given(st.binary(max_size=400), st.integers(1, 130))
def test_sha256_in_pieces(data, step):
    assert _runtime.sha256(data, step) == hashlib.sha256(data).digest()


def key(parent, tokens, adapter_id, salt):
    """The same in Python: each field is one byte of type, eight of length, and its bytes."""
    fields = [b"kv-block-1", parent, struct.pack(f"<{len(tokens)}i", *tokens), struct.pack("<q", adapter_id), salt]
    return hashlib.sha256(b"".join(struct.pack("<BQ", i, len(f)) + f for i, f in enumerate(fields))).digest()


TOKEN = st.integers(0, 2**31 - 1)


@given(st.binary(min_size=32, max_size=32), st.lists(TOKEN), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=200))
def test_fields(parent, tokens, adapter_id, salt):
    assert _runtime.block_digest(parent, tokens, adapter_id, salt) == key(parent, tokens, adapter_id, salt)


def test_no_field_can_be_taken_for_another():
    """Bytes that wander from one field to its neighbour make another key."""
    zero = bytes(32)
    eight = struct.pack("<q", 5)
    variants = [
        (zero, [1, 2], 0, b""), (zero, [1], 0, struct.pack("<i", 2)), (zero, [1], 2, b""), (zero, [1, 2, 0], 0, b""),
        (zero, [], 5, b""), (zero, [], 0, eight), (zero, [5, 0], 0, b""), (zero, [], 0, b""), (zero, [], 0, b"\0"),
        (eight * 4, [], 0, b""), (zero, [], 0, eight * 4), (zero, [5, 0] * 4, 0, b""),
    ]  # fmt: skip
    digests = [_runtime.block_digest(*v) for v in variants]
    assert len(set(digests)) == len(variants)


PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def published(hash_bits, adapter_id=0, salt=b""):
    blocks = BlockAllocator(16, 4, _hash_bits=hash_bits)
    seq = blocks.allocate(PROMPT, adapter_id=adapter_id, salt=salt)
    blocks.commit(seq)
    return blocks


@pytest.mark.parametrize("hash_bits", [0, 1, 4, 256])
def test_equal_digests_do_not_make_a_hit(hash_bits):
    """With 0 bits all digests are equal: tokens, adapter and salt are compared all the same, and the blocks before."""
    blocks = published(hash_bits, adapter_id=3, salt=b"tenant")
    for tokens, adapter_id, salt, cached in [
        (PROMPT, 3, b"tenant", 8), ([1, 2, 3, 4, 5, 6, 7, 0, 9], 3, b"tenant", 4), ([0, *PROMPT[1:]], 3, b"tenant", 0),
        (PROMPT, 4, b"tenant", 0), (PROMPT, 3, b"tenanu", 0), (PROMPT, 3, b"", 0), (PROMPT, 0, b"tenant", 0),
        (PROMPT[4:], 3, b"tenant", 0),  # its first block holds the tokens of the published second one
    ]:  # fmt: skip
        seq = blocks.allocate(tokens, adapter_id=adapter_id, salt=salt)
        assert blocks.num_cached_tokens(seq) == cached
        blocks.free(seq)
    if hash_bits in (0, 256):
        assert (blocks.stats()["hash_collisions"] > 0) == (hash_bits == 0)


def test_the_block_before_is_compared_by_content():
    """A block whose predecessor has the same digest but other tokens is not found, though its own key is equal."""
    blocks = BlockAllocator(16, 2, _hash_bits=0)
    first, second = blocks.allocate([1, 1, 5, 5, 0]), blocks.allocate([2, 2, 6, 6, 0])
    blocks.commit(first), blocks.commit(second)
    seq = blocks.allocate([2, 2, 5, 5, 0])
    assert blocks.num_cached_tokens(seq) == 2


def test_many_equal_digests_at_random():
    """All prompts over two tokens under a digest of 3 bits: what is found is what a dictionary of prompts says."""
    draw = random.Random(0)
    blocks, known = BlockAllocator(4096, 2, _hash_bits=3), set()
    prompts = [list(p) for n in range(1, 8) for p in itertools.product([0, 1], repeat=n)]
    for prompt in draw.sample(prompts, 120):
        seq = blocks.allocate(prompt)
        expected = 0
        while expected + 2 < len(prompt) and tuple(prompt[: expected + 2]) in known:
            expected += 2
        assert blocks.num_cached_tokens(seq) == expected
        blocks.commit(seq)
        known |= {tuple(prompt[:n]) for n in range(2, len(prompt) + 1, 2)}
    assert blocks.stats()["hash_collisions"] > 100


def test_only_what_is_computed_is_found():
    blocks = BlockAllocator(16, 4)
    first = blocks.allocate(PROMPT)
    for computed, found in [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (9, 8)]:
        blocks.commit(first, computed)
        second = blocks.allocate(PROMPT)
        assert blocks.num_cached_tokens(second) == found
        blocks.free(second)


def test_one_token_is_left_to_compute():
    blocks = BlockAllocator(16, 4)
    blocks.commit(blocks.allocate(PROMPT[:8]))
    assert blocks.num_cached_tokens(blocks.allocate(PROMPT[:8])) == 4
    assert blocks.num_cached_tokens(blocks.allocate(PROMPT[:4])) == 0
    assert blocks.num_cached_tokens(blocks.allocate(PROMPT[:5])) == 4


def test_nothing_is_found_within_a_batch():
    """Neither of two equal prompts is computed yet; after both are, they share."""
    blocks = BlockAllocator(16, 4)
    a, b = blocks.allocate_batch([Request(PROMPT), Request(PROMPT)])
    assert blocks.num_cached_tokens(a) == blocks.num_cached_tokens(b) == 0
    assert blocks.stats()["used"] == 6
    blocks.commit(a), blocks.commit(b)
    assert blocks.block_table(a).tolist()[:2] == blocks.block_table(b).tolist()[:2]
    assert blocks.stats()["used"] == 4
    assert blocks.stats()["merged"] == 2


def test_a_block_that_two_of_a_batch_find_is_counted_once():
    """Three blocks: one cached and found by both, one new for each."""
    blocks = BlockAllocator(3, 2)
    seq = blocks.allocate([1, 1])
    blocks.commit(seq)
    blocks.free(seq)
    batch = [Request([1, 1, 2]), Request([1, 1, 3])]
    assert blocks.can_allocate_batch(batch)
    assert [blocks.num_cached_tokens(s) for s in blocks.allocate_batch(batch)] == [2, 2]
    assert blocks.stats()["shared"] == 1


def test_least_recently_used_goes_first():
    blocks = BlockAllocator(3, 2)
    for prompt in ([1, 1], [2, 2], [3, 3]):
        seq = blocks.allocate(prompt)
        blocks.commit(seq)
        blocks.free(seq)
    touched = blocks.allocate([1, 1, 0])  # holds the oldest one, evicts the next
    assert blocks.num_cached_tokens(touched) == 2
    blocks.free(touched)
    assert blocks.stats()["evictions"] == 1
    assert blocks.num_cached_tokens(blocks.allocate([3, 3, 0])) == 2
    assert blocks.stats()["evictions"] == 1
