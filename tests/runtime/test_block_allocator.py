"""What the state machine cannot say: arguments, buffers, errors and their texts, waste, memory, threads, processes."""

import array
import gc
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_kernels.kv_cache import (
    BlockAllocator,
    BlockError,
    DoubleFreeError,
    OutOfBlocksError,
    Request,
    SwappedOutError,
    UnknownSequenceError,
)

ROOT = Path(__file__).resolve().parents[2]
CORE = [p for p in sorted((ROOT / "csrc/runtime").glob("*.cpp")) if p.stem != "binding"]

# ---- arguments ----


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda t: array.array("i", t),
        lambda t: array.array("q", t),
        lambda t: np.array(t, np.int32),
        lambda t: np.array(t, np.int64),
        lambda t: memoryview(np.array(t, np.int64)),
        lambda t: torch.tensor(t).numpy(),
        torch.tensor,
        range,
    ],
)
def test_tokens_of_any_kind(make):
    tokens = [0, 1, 2, 2**31 - 1] if make is not range else range(4)
    blocks = BlockAllocator(8, 2)
    seq = blocks.allocate(tokens if make is range else make(tokens))
    blocks.commit(seq)
    again = blocks.allocate([*tokens, 5])
    assert blocks.num_cached_tokens(again) == 4


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        ([1, -1], ValueError, r"allocate: tokens\[1\]: expected 0 <= value <= 2147483647, got -1"),
        ([2**31], ValueError, r"tokens\[0\]: expected .* got 2147483648"),
        ([2**100], ValueError, r"tokens\[0\]: expected .* beyond 64 bits"),
        ([], ValueError, r"tokens: expected 1 to \d+ tokens, got 0"),
        ([1.0], TypeError, r"tokens\[0\]: expected an integer, got float"),
        (["1"], TypeError, r"tokens\[0\]: expected an integer, got str"),
        ("123", TypeError, "tokens: expected integers, got str"),
        (b"123", TypeError, "tokens: expected integers, got bytes"),
        (5, TypeError, "tokens: expected a sequence of integers, got int"),
        (None, TypeError, "tokens: expected a sequence of integers, got NoneType"),
        (np.zeros(3, np.float32), TypeError, "tokens: expected a list or a 1-d buffer of int32 or int64, got 1-d of"),
        (np.zeros((2, 2), np.int32), TypeError, "tokens: .* got 2-d"),
        (np.zeros(3, np.uint8), TypeError, "tokens: expected a list or a 1-d buffer"),
    ],
)
def test_tokens_that_are_none(tokens, error, says):
    blocks = BlockAllocator(8, 2)
    with pytest.raises(error, match=r"^genai_kernels\.BlockAllocator\.\w+: .*" + says.removeprefix("allocate: ")):
        blocks.allocate(tokens)
    assert blocks.stats()["used"] == 0


def test_a_list_that_changes_while_it_is_read():
    class Shrinks:
        def __index__(self):
            tokens.clear()
            gc.collect()
            return 1

    tokens = [1, Shrinks(), 2, 3]
    blocks = BlockAllocator(8, 2)
    assert blocks.num_tokens(blocks.allocate(tokens)) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_blocks": 0, "block_size": 1}, "num_blocks: expected 1 <="),
        ({"num_blocks": -1, "block_size": 1}, "num_blocks: expected 1 <="),
        ({"num_blocks": 1, "block_size": 0}, "block_size: expected 1 <="),
        ({"num_blocks": 2**20, "block_size": 2**12}, "block_size: expected 1 <= block_size <= 2047, got 4096"),
        ({"num_blocks": 2**62, "block_size": 4}, "num_blocks: expected"),
        ({"num_blocks": 1, "block_size": 1, "num_swap_blocks": -1}, "num_swap_blocks: expected 0 <="),
        ({"num_blocks": 1, "block_size": 1, "window": -1}, "window: expected None or window >= 0, got -1"),
    ],
)
def test_shapes_that_cannot_be(arguments, says):
    with pytest.raises(ValueError, match=r"genai_kernels\.BlockAllocator.*: " + re.escape(says)[:-1]):
        BlockAllocator(**arguments)


# ---- errors ----


def test_every_error_has_a_class_and_says_what_to_do():
    blocks, stranger = BlockAllocator(4, 2, num_swap_blocks=1), BlockAllocator(4, 2)
    seq, other = blocks.allocate([1, 2]), stranger.allocate([1])
    gone = blocks.allocate([3])
    blocks.free(gone)
    cases = [
        (
            OutOfBlocksError,
            lambda: blocks.allocate([1] * 8),
            "at most 3 .* of the first pool, got a need of 4",
        ),
        (OutOfBlocksError, lambda: blocks.append(seq, [1] * 8), "append: blocks: expected at most 3"),
        (
            DoubleFreeError,
            lambda: blocks.free(gone),
            f"free: seq: expected a live .*, got {gone}, which is freed",
        ),
        (UnknownSequenceError, lambda: blocks.commit(gone), f"seq: expected a live sequence, got {gone}, which is"),
        (UnknownSequenceError, lambda: blocks.free(other), f"free: seq: expected an id of this allocator, got {other}"),
        (
            UnknownSequenceError,
            lambda: blocks.free(0),
            "an id of this allocator, got 0; pass what its allocate",
        ),
        (UnknownSequenceError, lambda: blocks.num_tokens(-5), "num_tokens: seq: .* got -5"),
        (
            ValueError,
            lambda: blocks.fork(seq),
            "seq: expected all of its 2 tokens to be .* got 0.* commit first",
        ),
        (ValueError, lambda: blocks.fork(seq, 0), "fork: n: expected n >= 1, got 0"),
        (ValueError, lambda: blocks.commit(seq, 3), r"commit: num_computed: expected 0 .* <= 2 \(tokens\), got 3"),
        (ValueError, lambda: blocks.truncate(seq, 3), "truncate: num_tokens: expected 0 <= n <= 2, got 3"),
        (ValueError, lambda: blocks.slot_mapping(seq, 1, 3), "slot_mapping: start, end: .* <= 2, got 1, 3"),
        (ValueError, lambda: blocks.block_tables([seq], [3]), r"lengths\[0\]: expected 0 <= length <= 2, got 3"),
        (ValueError, lambda: blocks.block_tables([seq], []), "lengths: expected one for each of 1 seqs, got 0"),
        (ValueError, lambda: blocks.append_batch([seq], []), "append_batch: tokens: expected one for each of 1 seqs"),
        (
            ValueError,
            lambda: blocks.append_batch([seq, seq], [[1], [1]]),
            f"each sequence once, got {seq} twice",
        ),
        (
            TypeError,
            lambda: blocks.allocate_batch([Request([1], 0, "a")]),
            r"requests\[0\]\.salt: expected bytes, got str",
        ),
        (
            TypeError,
            lambda: blocks.allocate_batch([Request([1], None)]),
            r"requests\[0\]\.adapter_id\[0\]: expected an int",
        ),
        (TypeError, lambda: blocks.allocate_batch([[1, 2]]), r"requests\[0\]: expected a Request, got list"),
        (
            ValueError,
            lambda: blocks.allocate_batch([Request([1]), Request([-1])]),
            r"requests\[1\]\.tokens\[0\]: exp",
        ),
        (ValueError, lambda: blocks.swap_in(seq), f"swap_in: seq: expected a swapped out sequence, got {seq}"),
    ]
    for error, call, says in cases:
        before = blocks._snapshot()
        with pytest.raises(error, match=r"^genai_kernels\.BlockAllocator\..*" + says) as caught:
            call()
        assert caught.type is error
        assert blocks._snapshot() == before
    blocks.swap_out(seq)
    with pytest.raises(SwappedOutError, match=r"append: seq: .* swapped out; call swap_in first"):
        blocks.append(seq, [1])
    with pytest.raises(
        OutOfBlocksError, match=r"swap_out: blocks: expected at most 0 .* of the second pool, got a need of 1"
    ):
        blocks.swap_out(blocks.allocate([1]))
    assert issubclass(BlockError, RuntimeError)
    for error in (OutOfBlocksError, DoubleFreeError, UnknownSequenceError, SwappedOutError):
        assert issubclass(error, BlockError)
        assert error.__module__ == "genai_kernels.kv_cache"


def test_no_id_is_given_out_twice():
    """A place whose generations are not used up is used again, under another id; ids of two allocators are disjoint."""
    a, b = BlockAllocator(4, 2), BlockAllocator(4, 2)
    ids = []
    for _ in range(10_000):
        for blocks in (a, b):
            ids.append(blocks.allocate([1]))
            blocks.free(ids[-1])
    assert len(set(ids)) == len(ids)
    assert min(ids) > 2**31  # never the number of a block


# ---- what kernels take ----


def test_buffers_are_taken_without_a_copy():
    blocks = BlockAllocator(8, 4)
    seqs = [blocks.allocate([1] * n) for n in (9, 1)]
    for buffer, dtype, expected in [
        (blocks.slot_mapping(seqs[0], 2, 6), torch.int64, [2, 3, 4, 5]),
        (blocks.block_table(seqs[0]), torch.int32, [0, 1, 2]),
        (blocks.block_tables(seqs)[0], torch.int32, [0, 1, 2, 3, -1, -1]),
        (blocks.block_tables(seqs, width=4)[0], torch.int32, [0, 1, 2, -1, 3, -1, -1, -1]),
        (blocks.block_tables(seqs, [4, 1])[0], torch.int32, [0, 3]),
        (blocks.block_tables(seqs)[1], torch.int32, [9, 1]),
        (blocks.csr(seqs)[0], torch.int32, [0, 3, 4]),
        (blocks.csr(seqs, [8, 0])[2], torch.int32, [4, 0]),
    ]:
        tensor = torch.frombuffer(buffer, dtype=dtype)
        assert tensor.tolist() == expected
        assert not buffer.readonly
        assert np.asarray(buffer).__array_interface__["data"][0] == tensor.data_ptr()
    assert blocks.block_tables(seqs)[0].shape == (2, 3)
    assert blocks.block_tables([])[1].tolist() == []


def test_window_entries():
    """With `left` = 3 the query at position 8 sees keys 5 to 8: blocks of 2 before key 4 are given back."""
    blocks = BlockAllocator(8, 2, window=3)
    seq = blocks.allocate(range(8))
    blocks.commit(seq, 5)
    assert blocks.block_table(seq).tolist() == [-1, 1, 2, 3]
    blocks.commit(seq)
    assert blocks.block_table(seq).tolist() == [-1, -1, 2, 3]
    assert blocks.slot_mapping(seq).tolist() == [-1, -1, -1, -1, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="the first 4 tokens are given back; commit only tokens that will stay"):
        blocks.truncate(seq, 6)
    blocks.truncate(seq, 7)
    again = blocks.allocate([*range(8), 0])  # finds all of it, and holds only what it will see
    assert blocks.num_cached_tokens(again) == 8
    assert blocks.block_table(again).tolist() == [-1, -1, 2, 3, 4]


def test_swap_keeps_the_sharing_that_is_published():
    blocks = BlockAllocator(8, 2, num_swap_blocks=8)
    seq = blocks.allocate([1, 2, 3, 4, 5])
    blocks.commit(seq)
    [beam] = blocks.fork(seq)
    out = [blocks.swap_out(s) for s in (seq, beam)]
    assert [len(copies) for copies in out] == [3, 3]
    assert blocks.stats()["swapped"] == 6
    assert blocks.stats()["cached"] == 2
    assert blocks.swap_in(seq) == [(2, 2)]  # the full blocks are still there
    blocks.drop_cached()
    assert len(blocks.swap_in(beam)) == 1
    assert blocks.block_table(seq).tolist()[:2] == blocks.block_table(beam).tolist()[:2]
    assert blocks.num_computed_tokens(beam) == 5


# ---- waste, memory ----


def test_waste_is_below_four_percent():
    """PagedAttention's figure, on a trace of 64 requests like its: prompts of 16 to 1024 tokens, decoded in turn."""
    draw = random.Random(0)
    blocks = BlockAllocator(8192, 16)
    lengths = [min(1024, max(16, int(draw.lognormvariate(5.5, 0.8)))) for _ in range(64)]
    seqs = blocks.allocate_batch([Request([draw.randrange(1000) for _ in range(n)]) for n in lengths])
    waste = []
    for _ in range(200):
        blocks.append_batch(seqs, [[draw.randrange(1000)] for _ in seqs])
        waste.append(blocks.stats()["waste"])
    assert 0 < sum(waste) / len(waste) < 0.04


GROWTH = """
import resource, sys
sys.path.insert(0, {root!r})
import genai_kernels
from genai_kernels.kv_cache import BlockAllocator, OutOfBlocksError
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
def pairs(n):
    for i in range(n):
        blocks.free(blocks.allocate((1, 2, 3)))
def lives(n):
    for i in range(n):
        seq = blocks.allocate([i % 50, 2, 3, 4, 5, 6, 7, 8, i], adapter_id=i % 3, salt=b"tenant %d" % (i % 1000))
        blocks.append(seq, [1])
        blocks.commit(seq)
        a, b = blocks.fork(seq, 2)
        blocks.append_batch([a, b, seq], [[1], [2], [3]])
        blocks.swap_out(a), blocks.block_tables([b, seq]), blocks.swap_in(a)
        try:
            blocks.allocate([1] * 1000)
        except OutOfBlocksError:
            pass
        for s in (a, b, seq):
            blocks.free(s)
blocks = BlockAllocator(64, 4, num_swap_blocks=64)
pairs(10_000), lives(10_000)
before = resident()
pairs(1_000_000), lives(50_000)
print(resident() - before)
"""


def test_no_growth():
    """A million pairs of allocate and free, and 50,000 lives with everything in them, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(root=str(ROOT))], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1 << 20


def test_memory_that_fails(tmp_path):
    """The host's memory fails at the k-th request of each call, for every k; csrc/runtime alone, under sanitizers."""
    program = tmp_path / "failing_memory"
    flags = ["-std=c++20", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    together = tmp_path / "together.cpp"  # the standard headers are read once
    together.write_text("".join(f'#include "{p}"\n' for p in [*CORE, Path(__file__).with_name("failing_memory.cpp")]))
    subprocess.run(
        ["g++", *flags, "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", together, "-o", program], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    failures, calls = map(int, re.match(r"(\d+) failures of memory in (\d+) calls", done.stdout).groups())
    assert failures > 300
    assert calls > 200


# ---- threads, processes ----


def test_many_threads():
    """Eight threads, each with sequences of its own in one pool: no block is ever in two hands, none is lost."""
    blocks = BlockAllocator(256, 4, num_swap_blocks=64)
    owner, wrong = [None] * 256, []

    def work(me):
        draw = random.Random(me)
        try:
            for step in range(3000):
                # Long enough that the GIL is let go while it is hashed, now and then.
                length = 600 if step % 50 == 0 and me == 0 else draw.randint(1, 40)
                try:
                    seq = blocks.allocate([me] * length, salt=b"%d" % me)
                except OutOfBlocksError:
                    continue
                own = set(blocks.block_table(seq).tolist()[blocks.num_cached_tokens(seq) // 4 :])
                wrong.extend(b for b in own if owner[b] is not None)
                for b in own:
                    owner[b] = me
                for b in own:
                    owner[b] = None
                if draw.random() < 0.5:
                    blocks.commit(seq)
                blocks.free(seq)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(t.is_alive() for t in threads)
    assert wrong == []
    blocks._check_invariants()
    assert blocks.stats()["used"] == 0


def test_a_child_process_has_a_copy():
    blocks = BlockAllocator(4, 4)
    seq = blocks.allocate([1, 2, 3])
    child = os.fork()
    if child == 0:
        blocks.free(seq)
        os._exit(0 if blocks.stats()["used"] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert blocks.stats()["used"] == 1


def test_importing_it_alone_needs_no_torch():
    """The compiled module is plain C++: a scheduler in a process of its own can do without the rest."""
    program = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_runtime", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
blocks = module.BlockAllocator(4, 4)
print(blocks.slot_mapping(blocks.allocate([1, 2])).tolist(), "torch" in sys.modules)
"""
    library = sys.modules["genai_kernels._runtime"].__file__
    done = subprocess.run([sys.executable, "-c", program, library], capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 1] False\n"
