"""The allocator, its model and the memory that both speak about, driven step by step and compared after each.

`World.step_*` are the rules; test_state_machine.py chooses among them with hypothesis and with a seeded generator.
Every number that a rule takes is reduced to what is possible at that moment, so that any numbers make a valid step.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from allocator_model import Full, Model

from genai_kernels import kv_cache
from genai_kernels.kv_cache import BlockAllocator, Request

SCOPES = [(0, b""), (0, b""), (0, b""), (7, b""), (0, b"7"), (7, b"7")]


def values(s):
    """What the slots of a sequence hold once they are computed: keys and values depend on all tokens before."""
    value, found = hash(s.scope), []
    for token in s.tokens:
        value = hash((value, token))
        found.append(value)
    return found


class World:
    def __init__(self, num_blocks, block_size, num_swap_blocks=0, window=None, prefix_cache=True, hash_bits=256):
        arguments = {"num_swap_blocks": num_swap_blocks, "window": window, "prefix_cache": prefix_cache}
        self.real = BlockAllocator(num_blocks, block_size, **arguments, _hash_bits=hash_bits)
        self.model = Model(num_blocks, block_size, **arguments)
        self.memory = [[None] * block_size for _ in range(num_blocks)]
        self.swap_memory = [[None] * block_size for _ in range(num_swap_blocks)]
        self.ids: dict[int, int] = {}  # of the model -> of the allocator
        self.freed: list[int] = []
        self.strange_id = BlockAllocator(4, 4).allocate([1])
        self.hash_bits = hash_bits
        self.failures = 0

    # ---- rules ----

    def step_allocate(self, tokens, scope):
        self.allocate([Request(tokens, *SCOPES[scope % len(SCOPES)])], single=True)

    def step_allocate_batch(self, batch):
        self.allocate([Request(tokens, *SCOPES[scope % len(SCOPES)]) for tokens, scope in batch])

    def step_allocate_again(self, which, tail, scope):
        """A prompt that begins like a sequence that is there."""
        if self.ids:
            s = self.model.sequences[self.choose(which)]
            adapter_id, salt = s.scope if scope % 4 else SCOPES[scope % len(SCOPES)]
            self.allocate([Request(s.tokens + tail, adapter_id, salt)] if s.tokens + tail else [])

    def allocate(self, requests, single=False):
        def real():
            if single:
                r = requests[0]
                return [self.real.allocate(r.tokens, adapter_id=r.adapter_id, salt=r.salt)]
            return self.real.allocate_batch(requests)

        can = self.real.can_allocate_batch(requests)
        if single:
            assert can == self.real.can_allocate(
                requests[0].tokens, adapter_id=requests[0].adapter_id, salt=requests[0].salt
            )
        self.adopt(self.both(real, lambda m: m.allocate(requests), can))

    def step_append(self, which, tokens):
        if self.ids:
            handle = self.choose(which)
            seq = self.ids[handle]
            if self.model.sequences[handle].swapped:
                self.expect_unchanged(kv_cache.SwappedOutError, lambda: self.real.append(seq, tokens))
                return
            can = self.real.can_append(seq, len(tokens))
            copies = self.both(lambda: self.real.append(seq, tokens), lambda m: m.append([(handle, tokens)]), can)
            self.copy(copies, self.memory, self.memory)

    def step_append_batch(self, choices, tokens):
        chosen = list(dict.fromkeys(self.choose(c) for c in choices if self.ids))
        chosen = [h for h in chosen if not self.model.sequences[h].swapped]
        growths = [(h, [t]) for h, t in zip(chosen, tokens, strict=False)]
        seqs = [self.ids[h] for h, _ in growths]
        can = self.real.can_append_batch(seqs, [1] * len(seqs))
        copies = self.both(
            lambda: self.real.append_batch(seqs, [t for _, t in growths]), lambda m: m.append(growths), can
        )
        self.copy(copies, self.memory, self.memory)

    def step_commit(self, which, amount):
        if self.ids:
            handle = self.choose(which)
            s = self.model.sequences[handle]
            if s.swapped:
                self.expect_unchanged(kv_cache.SwappedOutError, lambda: self.real.commit(self.ids[handle]))
                return
            upto = s.computed + amount % (len(s.tokens) - s.computed + 1)
            bits = values(s)
            slots = self.real.slot_mapping(self.ids[handle], s.computed, upto).tolist()
            for position, slot in zip(range(s.computed, upto), slots, strict=True):
                block, offset = divmod(slot, self.model.size)
                assert self.model.refs[block] == 1, "written while others hold it"
                assert block not in self.model.published, "written while others may find it"
                self.memory[block][offset] = bits[position]
            self.both(lambda: self.real.commit(self.ids[handle], upto), lambda m: m.commit(handle, upto))

    def step_truncate(self, which, amount):
        if self.ids:
            handle = self.choose(which)
            s = self.model.sequences[handle]
            length = amount % (len(s.tokens) + 1)
            if s.swapped or not self.model.can_truncate(handle, length):
                error = kv_cache.SwappedOutError if s.swapped else ValueError
                self.expect_unchanged(error, lambda: self.real.truncate(self.ids[handle], length))
                return
            self.both(lambda: self.real.truncate(self.ids[handle], length), lambda m: m.truncate(handle, length))

    def step_fork(self, which, n):
        if self.ids and len(self.ids) < 40:
            handle, n = self.choose(which), 1 + n % 2
            s = self.model.sequences[handle]
            if s.swapped or s.computed < len(s.tokens):
                error = kv_cache.SwappedOutError if s.swapped else ValueError
                self.expect_unchanged(error, lambda: self.real.fork(self.ids[handle], n))
                return
            self.adopt(self.both(lambda: self.real.fork(self.ids[handle], n), lambda m: m.fork(handle, n)))

    def step_free(self, which):
        if self.ids:
            handle = self.choose(which)
            seq = self.ids[handle]
            self.both(lambda: self.real.free(seq), lambda m: m.free_sequence(handle))
            del self.ids[handle]
            self.freed = [*self.freed[-20:], seq]
            self.expect_unchanged(kv_cache.DoubleFreeError, lambda: self.real.free(seq))

    def step_swap(self, which):
        if self.ids:
            handle = self.choose(which)
            seq = self.ids[handle]
            if self.model.sequences[handle].swapped:
                can = self.real.can_swap_in(seq)
                copies = self.both(lambda: self.real.swap_in(seq), lambda m: m.swap_in(handle), can)
                self.copy(copies, self.swap_memory, self.memory)
            else:
                can = self.real.can_swap_out(seq)
                copies = self.both(lambda: self.real.swap_out(seq), lambda m: m.swap_out(handle), can)
                self.copy(copies, self.memory, self.swap_memory)

    def step_drop_cached(self):
        assert self.both(self.real.drop_cached, lambda m: m.drop_cached()) is not None

    def step_nonsense(self, kind, which):
        """Calls that make no sense, each an error that changes nothing."""
        real = self.real
        resident = [h for h in self.ids if not self.model.sequences[h].swapped]
        live = [self.ids[h] for h in resident]
        foreign = [3, -1, 2**62, self.strange_id, *self.freed[-1:]]
        bad = foreign[which % len(foreign)]
        calls = [real.num_tokens, real.commit, real.fork, real.swap_out, real.swap_in, real.block_table]
        calls += [lambda s: real.truncate(s, 0), lambda s: real.append(s, [1]), lambda s: real.block_tables([*live, s])]
        self.expect_unchanged(kv_cache.UnknownSequenceError, lambda: calls[kind % len(calls)](bad))
        error = kv_cache.DoubleFreeError if bad in self.freed else kv_cache.UnknownSequenceError
        self.expect_unchanged(error, lambda: real.free(bad))
        self.expect_unchanged(ValueError, lambda: real.allocate_batch([Request([1]), Request([1, 2, -1])]))
        self.expect_unchanged(ValueError, lambda: real.allocate([]))
        if resident:
            handle = resident[which % len(resident)]
            seq, s = self.ids[handle], self.model.sequences[handle]
            self.expect_unchanged(ValueError, lambda: real.commit(seq, len(s.tokens) + 1))
            self.expect_unchanged(ValueError, lambda: real.commit(seq, s.computed - 1))
            self.expect_unchanged(ValueError, lambda: real.truncate(seq, len(s.tokens) + 1))
            self.expect_unchanged(ValueError, lambda: real.append_batch([seq, seq], [[1], [1]]))
            self.expect_unchanged(ValueError, lambda: real.swap_in(seq))
            self.expect_unchanged(kv_cache.UnknownSequenceError, lambda: real.append_batch([seq, bad], [[1], [1]]))

    # ---- how a rule is carried out ----

    def choose(self, which):
        return list(self.ids)[which % len(self.ids)]

    def both(self, real, model, can=None):
        """The same operation on both; what the model finds impossible must fail and change nothing."""
        trial = self.model.copy()
        try:
            expected = model(trial)
        except Full:
            assert can is False, "can_... promised what the pool has not"
            self.failures += 1
            self.expect_unchanged(kv_cache.OutOfBlocksError, real)
            return []
        assert can is not False, "can_... denied what the pool has"
        result = real()
        self.model = trial
        if isinstance(expected, list) and expected and isinstance(expected[0], int):
            assert len(result) == len(expected)
            return list(zip(expected, result, strict=True))
        assert result == expected
        return result

    def adopt(self, pairs):
        for handle, seq in pairs:
            assert seq not in self.ids.values(), "an id was given out twice"
            assert seq not in self.freed, "an id was given out again"
            self.ids[handle] = seq

    def expect_unchanged(self, error, call):
        before = self.real._snapshot()
        with pytest.raises(error, match=r"^genai_kernels\.BlockAllocator\.\w+: \w+") as caught:
            call()
        assert caught.type is error, caught.type
        assert self.real._snapshot() == before

    def copy(self, copies, source, destination):
        for a, b in copies:
            destination[b] = list(source[a])

    # ---- invariants ----

    def tables(self):
        return {h: s.table for h, s in self.model.sequences.items()}

    def invariant_own_lists(self):
        """Reference counts, free list, list of cached blocks, index: each agrees with the tables."""
        self.real._check_invariants()

    def invariant_tables(self):
        for handle, s in self.model.sequences.items():
            if not s.swapped:
                assert self.real.block_table(self.ids[handle]).tolist() == s.table

    def invariant_lengths(self):
        for handle, s in self.model.sequences.items():
            seq = self.ids[handle]
            assert self.real.num_tokens(seq) == len(s.tokens)
            assert self.real.num_computed_tokens(seq) == s.computed
            assert self.real.num_cached_tokens(seq) == s.cached
            assert self.real.is_swapped_out(seq) == s.swapped

    def invariant_bits(self):
        """Each computed token finds its own keys and values, whoever shares, copied, evicted, swapped or wrote."""
        for handle, s in self.model.sequences.items():
            bits, memory = values(s), self.swap_memory if s.swapped else self.memory
            for position in range(s.first * self.model.size, s.computed):
                block, offset = divmod(position, self.model.size)
                assert memory[s.table[block]][offset] == bits[position], (handle, position)

    def invariant_no_block_is_lost(self):
        stats = self.real.stats()
        assert stats["used"] + stats["cached"] + stats["free"] == self.real.num_blocks
        assert stats["used"] == len({b for s in self.resident() for b in s.table if b >= 0})
        assert stats["free"] == len(self.model.free)
        assert stats["cached"] == len(self.model.cached)
        assert self.real.num_available_blocks == stats["free"] + stats["cached"]

    def resident(self):
        return [s for s in self.model.sequences.values() if not s.swapped]

    def invariant_shared(self):
        holders = [b for s in self.resident() for b in s.table if b >= 0]
        assert self.real.stats()["shared"] == len({b for b in holders if holders.count(b) > 1})

    def invariant_swapped(self):
        swapped = [b for s in self.model.sequences.values() if s.swapped for b in s.table if b >= 0]
        assert len(swapped) == len(set(swapped)) == self.real.stats()["swapped"]

    def invariant_waste(self):
        size, slots = self.model.size, set()
        for s in self.resident():
            slots |= {
                (b, o) for i, b in enumerate(s.table) if b >= 0 for o in range(min(size, len(s.tokens) - i * size))
            }
        stats = self.real.stats()
        assert stats["tokens"] == len(slots)
        reserved = stats["used"] * size
        assert stats["waste"] == ((reserved - len(slots)) / reserved if reserved else 0)

    def invariant_unwritten_is_exclusive(self):
        for s in self.resident():
            for i in range(-(-s.computed // self.model.size), len(s.table)):
                assert self.model.refs[s.table[i]] == 1
                assert s.table[i] not in self.model.published

    def invariant_window(self):
        """Blocks before the window are given back, and none inside it."""
        for s in self.model.sequences.values():
            kept = [b >= 0 for b in s.table]
            assert kept == sorted(kept)
            if self.model.window is None:
                assert all(kept)
            else:
                seen = max(0, s.computed - self.model.window)
                assert kept[seen // self.model.size :].count(False) == 0

    def invariant_one_token_to_compute(self):
        """Found in the cache: full blocks, and never the whole prompt."""
        for s in self.model.sequences.values():
            assert s.computed <= len(s.tokens)

    def invariant_sequences(self):
        assert sorted(self.real.sequences()) == sorted(self.ids.values())
        assert self.real.stats()["sequences"] == len(self.ids)

    def invariant_events(self):
        stats = self.real.stats()
        assert stats["prefix_queries"] == self.model.queries
        assert stats["prefix_hits"] == self.model.hits
        assert stats["evictions"] == self.model.evictions
        assert stats["merged"] == self.model.merged
        assert stats["hash_collisions"] == 0 or self.hash_bits < 256

    def invariant_kernel_tables(self):
        """The three forms in which kernels take tables say the same."""
        resident = [(self.ids[h], s) for h, s in self.model.sequences.items() if not s.swapped]
        seqs, lengths = [q for q, _ in resident], [len(s.tokens) for _, s in resident]
        tables, seq_lens = self.real.block_tables(seqs)
        indptr, indices, last = (part.tolist() for part in self.real.csr(seqs))
        slots = self.real.slot_mapping_batch(seqs, [0] * len(seqs), lengths).tolist()
        assert seq_lens.tolist() == lengths
        rows = tables.tolist() if tables.ndim == 2 else [[] for _ in seqs]
        for row, (_, s) in zip(rows, resident, strict=True):
            assert row == s.table + [-1] * (len(row) - len(s.table))
        assert [indices[a:b] for a, b in pairwise(indptr)] == [s.table for _, s in resident]
        size = self.model.size
        assert last == [n - max(0, -(-n // size) - 1) * size for n in lengths]
        expected = [
            s.table[p // size] * size + p % size if s.table[p // size] >= 0 else -1
            for _, s in resident
            for p in range(len(s.tokens))
        ]
        assert slots == expected

    def check(self):
        for name in INVARIANTS:
            getattr(self, name)()

    def end(self):
        """Everything is freed: no block may be left behind."""
        for seq in self.ids.values():
            self.real.free(seq)
        self.real.drop_cached()
        self.real._check_invariants()
        stats = self.real.stats()
        assert stats["free"] == self.real.num_blocks
        assert stats["used"] == stats["swapped"] == stats["sequences"] == 0


INVARIANTS = [name for name in vars(World) if name.startswith("invariant_")]
RULES = [name for name in vars(World) if name.startswith("step_")]
