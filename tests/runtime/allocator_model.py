"""The block allocator once more, in plain Python: dictionaries, lists, no hash, no count made in advance.

An operation that finds no block raises halfway; all or nothing is had by working on a copy of the whole state.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace


class Full(Exception):
    """A pool has no block left."""


@dataclass
class Sequence:
    tokens: list[int]
    scope: tuple[int, bytes]
    computed: int = 0
    cached: int = 0
    swapped: bool = False
    first: int = 0  # blocks before it fell out of the window
    base: int = 0  # content of block first - 1
    table: list[int] = field(default_factory=list)

    def copy(self) -> Sequence:
        return replace(self, tokens=list(self.tokens), table=list(self.table))


class Model:
    def __init__(self, num_blocks, block_size, num_swap_blocks=0, window=None, prefix_cache=True):
        self.size, self.window, self.prefix_cache = block_size, window, prefix_cache
        self.free = list(range(num_blocks))[::-1]
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.refs = [0] * num_blocks
        self.published: dict[int, tuple] = {}  # block -> (key, content)
        self.index: dict[tuple, int] = {}  # (scope, content before, tokens) -> block
        self.swap_free = list(range(num_swap_blocks))[::-1]
        self.swap_published: dict[int, tuple] = {}
        self.sequences: dict[int, Sequence] = {}
        self.handles = self.contents = self.queries = self.hits = self.evictions = self.merged = 0

    def copy(self) -> Model:
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__)
        for name in ("free", "cached", "refs", "published", "index", "swap_free", "swap_published"):
            setattr(other, name, getattr(self, name).copy())
        other.sequences = {h: s.copy() for h, s in self.sequences.items()}
        return other

    # ---- blocks ----

    def take(self) -> int:
        if self.free:
            block = self.free.pop()
        elif self.cached:
            block = self.cached.popitem(last=False)[0]
            self.unpublish(block)
            self.evictions += 1
        else:
            raise Full
        self.refs[block] = 1
        return block

    def hold(self, block) -> None:
        self.cached.pop(block, None)
        self.refs[block] += 1

    def release(self, block) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if block in self.published:
                self.cached[block] = None
            else:
                self.free.append(block)

    def publish(self, block, key, content) -> None:
        self.published[block] = key, content
        self.index[key] = block

    def unpublish(self, block) -> None:
        if block in self.published:
            del self.index[self.published.pop(block)[0]]

    # ---- sequences ----

    def content(self, s, i) -> int:
        """What block i of a sequence stands for, 0 before the first."""
        if i < 0:
            return 0
        if i == s.first - 1:
            return s.base
        return (self.swap_published if s.swapped else self.published)[s.table[i]][1]

    def key(self, s, i) -> tuple:
        return s.scope, self.content(s, i - 1), tuple(s.tokens[i * self.size : (i + 1) * self.size])

    def needed(self, computed) -> int:
        return 0 if self.window is None else max(0, computed - self.window) // self.size

    def extend(self, s) -> None:
        while len(s.table) * self.size < len(s.tokens):
            s.table.append(self.take())

    def allocate(self, requests) -> list[int]:
        new = []
        for tokens, adapter_id, salt in requests:  # all look before one takes: nothing is computed yet
            s = Sequence(list(tokens), (adapter_id, salt))
            content = 0
            for i in range((len(tokens) - 1) // self.size if self.prefix_cache else 0):
                self.queries += 1
                block = self.index.get((s.scope, content, tuple(tokens[i * self.size : (i + 1) * self.size])))
                if block is None:
                    break
                self.hits += 1
                s.table.append(block)
                content = self.published[block][1]
            s.computed = s.cached = len(s.table) * self.size
            new.append(s)
        for s in new:
            first = self.needed(s.computed)
            s.base = self.content(s, first - 1)
            for i in reversed(range(len(s.table))):
                if i >= first:
                    self.hold(s.table[i])
                else:
                    if s.table[i] in self.cached:
                        self.cached.move_to_end(s.table[i])
                    s.table[i] = -1
            s.first = first
        for s in new:
            self.extend(s)
            self.sequences[self.handles] = s
            self.handles += 1
        return list(range(self.handles - len(new), self.handles))

    def append(self, growths) -> list[tuple[int, int]]:
        copies = []
        for handle, tokens in growths:
            s = self.sequences[handle]
            if not tokens:
                continue
            if len(s.tokens) % self.size:
                last = s.table[-1]
                if self.refs[last] > 1:
                    s.table[-1] = self.take()
                    self.release(last)
                    copies.append((last, s.table[-1]))
                else:
                    self.unpublish(last)
            s.tokens += tokens
            self.extend(s)
        return copies

    def commit(self, handle, computed) -> None:
        s = self.sequences[handle]
        before, s.computed = s.computed, computed
        if self.prefix_cache:
            for i in range(before // self.size, computed // self.size):
                key = self.key(s, i)
                if key in self.index:
                    own, s.table[i] = s.table[i], self.index[key]
                    self.hold(s.table[i])
                    self.release(own)
                    self.merged += 1
                else:
                    self.contents += 1
                    self.publish(s.table[i], key, self.contents)
        first = self.needed(computed)
        if first > s.first:
            base = self.content(s, first - 1) if self.prefix_cache else 0
            for i in reversed(range(s.first, first)):
                self.release(s.table[i])
                s.table[i] = -1
            s.first, s.base = first, base

    def can_truncate(self, handle, length) -> bool:
        s = self.sequences[handle]
        return self.needed(min(s.computed, length)) >= s.first

    def truncate(self, handle, length) -> None:
        s = self.sequences[handle]
        del s.tokens[length:]
        while (len(s.table) - 1) * self.size >= length:
            self.release(s.table.pop())
        s.computed, s.cached = min(s.computed, length), min(s.cached, length)

    def fork(self, handle, n) -> list[int]:
        s = self.sequences[handle]
        for _ in range(n):
            child = s.copy()
            child.cached = len(s.tokens)
            for block in child.table[child.first :]:
                self.hold(block)
            self.sequences[self.handles] = child
            self.handles += 1
        return list(range(self.handles - n, self.handles))

    def free_sequence(self, handle) -> None:
        s = self.sequences.pop(handle)
        for block in reversed(s.table[s.first :]):
            if s.swapped:
                self.swap_free.append(block)
                self.swap_published.pop(block, None)
            else:
                self.release(block)

    # ---- second pool ----

    def swap_out(self, handle) -> list[tuple[int, int]]:
        s = self.sequences[handle]
        copies = []
        for block in s.table[s.first :]:
            if not self.swap_free:
                raise Full
            copies.append((block, self.swap_free.pop()))
            if block in self.published:
                self.swap_published[copies[-1][1]] = self.published[block]
        for block, _ in reversed(copies):
            self.release(block)
        s.table[s.first :] = [to for _, to in copies]
        s.swapped = True
        return copies

    def swap_in(self, handle) -> list[tuple[int, int]]:
        s = self.sequences[handle]
        found, parent = {}, s.base if s.first else 0
        for i in range(s.first, len(s.table)):
            if s.table[i] not in self.swap_published:
                break
            key, content = self.swap_published[s.table[i]]
            block = self.index.get((key[0], parent, key[2]))
            if block is not None:
                found[i] = block
                content = self.published[block][1]
            parent = content
        for block in found.values():
            self.hold(block)
        copies, parent = [], s.base if s.first else 0
        for i in range(s.first, len(s.table)):
            old = s.table[i]
            key, content = self.swap_published.pop(old, (None, 0))
            if i in found:
                s.table[i], content = found[i], self.published[found[i]][1]
            else:
                s.table[i] = self.take()
                copies.append((old, s.table[i]))
                if key is not None:
                    self.publish(s.table[i], (key[0], parent, key[2]), content)
            parent = content
            self.swap_free.append(old)
        s.swapped = False
        return copies

    def drop_cached(self) -> int:
        dropped = list(self.cached)
        for block in dropped:
            del self.cached[block]
            self.unpublish(block)
            self.free.append(block)
        return len(dropped)
