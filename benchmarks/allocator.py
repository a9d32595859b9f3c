"""What the block allocator's calls cost from Python: `python -m benchmarks.allocator`.

Each figure is the best of some rounds, since the machine may be doing other things as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from genai_kernels.kv_cache import BlockAllocator

ROUNDS = 100


def best(run: Callable[[], object], calls: int) -> float:
    """Microseconds a call."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times) / calls * 1e6


def pairs() -> float:
    blocks = BlockAllocator(1024, 16)
    allocate, free, prompt = blocks.allocate, blocks.free, [1, 2, 3]

    def run() -> None:
        for _ in range(5_000):
            free(allocate(prompt))

    return best(run, 5_000)


def decode(sequences: int) -> float:
    """One step: a token more for each, and the tables of all."""
    blocks = BlockAllocator(64 * sequences, 16)
    seqs = [blocks.allocate([i] * 500) for i in range(sequences)]
    token = [[1]] * sequences

    def run() -> None:
        blocks.append_batch(seqs, token)
        blocks.block_tables(seqs)

    return best(run, 1)


def prompt(tokens: int, again: bool) -> float:
    """A prompt that is new (allocated, committed) or cached (allocated)."""
    blocks = BlockAllocator(2 * tokens, 16)
    numbers = iter(range(1, 10**6))

    def run() -> None:
        seq = blocks.allocate([0 if again else next(numbers), *range(tokens - 1)])
        if not again or blocks.num_cached_tokens(seq) == 0:
            blocks.commit(seq)
        blocks.free(seq)

    run()
    return best(run, 1)


def main() -> None:
    pair = pairs()
    print(f"a million pairs of allocate and free: {pair:.2f} s ({pair * 1000:.0f} ns each)")
    for sequences in (1, 16, 64):
        print(f"a step of {sequences} sequences of 500 tokens, append and tables: {decode(sequences):.1f} us")
    for tokens in (512, 4096):
        print(f"a prompt of {tokens} tokens: new {prompt(tokens, False):.0f} us, cached {prompt(tokens, True):.0f} us")


if __name__ == "__main__":
    main()
