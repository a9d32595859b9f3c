"""Faults planted in the allocator one by one, and what the tests of this folder say to each.

Usage: python tests/runtime/planted_faults.py [TEXT]     only those whose name contains the text

As tests/mutants.py does it for the kernels: a text that occurs once in a source is replaced, the module is built with
it in a folder of its own, and loaded in the place of genai_kernels._runtime.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNTIME = ROOT / "csrc/runtime"
sys.path.insert(0, str(HERE.parent))
from mutant_catalogue import Mutant  # noqa: E402
from mutants import plant  # noqa: E402

ALLOCATOR, POOL, SWAP, TABLES, KEY, SHA = (
    f"{name}.cpp" for name in ("block_allocator", "block_pool", "swap", "tables", "block_key", "sha256")
)

FAULTS = [
    # references
    (ALLOCATOR, "a fork holds nothing", "i < int64_t(s.table.size()); ++i) pool_.hold(s.table[i]);",
     "i < 0; ++i) pool_.hold(s.table[i]);"),
    (ALLOCATOR, "a copied block is still held", "pool_.release(last);\n", ""),
    (ALLOCATOR, "the first block is never given back", "i >= s.first; --i) (s.swapped", "i > s.first; --i) (s.swapped"),
    (ALLOCATOR, "hits are not held", "pool_.hold(s.table[i]);\n      } else {", "} else {"),
    (ALLOCATOR, "a merged block is lost", "pool_.release(own);", ""),
    (ALLOCATOR, "truncation keeps a block", "int64_t(s.table.size()) > keep;", "int64_t(s.table.size()) > keep + 1;"),
    (POOL, "a shared block is freed by its first holder", "if (holders > 0) return;", "if (holders > 1) return;"),
    (POOL, "the shared blocks are miscounted", "if (holders == 1) --shared_;", "if (holders == 0) --shared_;"),
    # copy on write
    (ALLOCATOR, "a shared block is written", "if (pool_[last].refs > 1) {", "if (pool_[last].refs > 2) {"),
    (ALLOCATOR, "a published block is written", "pool_.unpublish(last);", ""),
    (ALLOCATOR, "a fork of what is not computed", "checked.num_computed < checked.num_tokens", "false"),
    (ALLOCATOR, "copies in the other direction", "copies.emplace_back(last, own)", "copies.emplace_back(own, last)"),
    # all or nothing
    (ALLOCATOR, "hits in the cache counted as free too", "pool_.available() - all.revived", "pool_.available()"),
    (ALLOCATOR, "a hit of two requests counted twice", "pool_[b].refs > 0 || pool_[b].mark == mark_",
     "pool_[b].refs > 0"),
    (ALLOCATOR, "the copy of a shared block is not counted", "++last.marked, more + 1 : more",
     "++last.marked, more : more"),
    (ALLOCATOR, "a copy that is not needed any more is counted", "last.refs - last.marked > 1", "last.refs > 1"),
    (SWAP, "a block that is found counted as new", "--match.fresh;", ""),
    (SWAP, "swapping out counts the window", "expect_blocks(blocks - s.first,", "expect_blocks(blocks,"),
    # the cache
    (ALLOCATOR, "published before it is computed", "i < num_computed / size_; ++i) publish",
     "i < s.num_tokens / size_; ++i) publish"),
    (ALLOCATOR, "published while one token is missing", "i < num_computed / size_; ++i) publish",
     "i < (num_computed + 1) / size_ && i < s.num_tokens / size_; ++i) publish"),
    (ALLOCATOR, "nothing left to compute", "(count - 1) / size_ : 0", "count / size_ : 0"),
    (POOL, "tokens not compared", "std::ranges::equal(this->tokens(b), tokens) && *block.scope == scope",
     "*block.scope == scope"),
    (POOL, "scope not compared", "tokens) && *block.scope == scope", "tokens)"),
    (POOL, "the block before not compared", "if (block.parent == parent) return b;", "return b;"),
    (POOL, "an evicted block stays in the index", "unpublish(b);\n    ++evictions_;", "++evictions_;"),
    (POOL, "the newest evicted first", "b = oldest_;\n    remove_from_cached(b);\n    unpublish(b);\n    ++evictions_;",
     "b = newest_; remove_from_cached(b); unpublish(b); ++evictions_;"),
    (POOL, "evicts while others are free", "if (!free_.empty()) {", "if (!free_.empty() && cached_ == 0) {"),
    (ALLOCATOR, "the beginning is evicted first",
     "for (int64_t i = int64_t(s.table.size()) - 1; i >= s.first; --i) (s",
     "for (int64_t i = s.first; i < int64_t(s.table.size()); ++i) (s"),
    (KEY, "adapter not in the key", "add_little_endian(hash, uint64_t(scope.adapter_id));",
     "add_little_endian(hash, uint64_t(0));"),
    (KEY, "salt without its length", "add_bytes(hash, Field::kSalt, scope.salt.data(), scope.salt.size());",
     "hash.update(scope.salt.data(), scope.salt.size());"),
    (KEY, "the block before not in the key", "parent.data(), parent.size());", "parent.data(), 0);"),
    (SHA, "padding one byte short", "1 + (119 - size_ % 64) % 64", "1 + (118 - size_ % 64) % 64"),
    (SHA, "a wrong constant", "0xc67178f2", "0xc67178f3"),
    # window, second pool, tables
    (ALLOCATOR, "a window one token short", "computed - options_.window)", "computed + 1 - options_.window)"),
    (ALLOCATOR, "a window never given back", "release_outside_window(s);\n}", "}"),
    (ALLOCATOR, "what the window lost is not missed", "if (first_needed(computed) < s.first) {", "if (false) {"),
    (ALLOCATOR, "the link before the window forgotten", "if (options_.prefix_cache) s.base = link(s, first - 1);", ""),
    (SWAP, "a swapped block keeps its place",
     "for (int64_t i = blocks - 1; i >= s.first; --i) pool_.release(copies[i - s.first].first);", ""),
    (SWAP, "found blocks are not held", "if (b != kNone) pool_.hold(b);", ""),
    (SWAP, "blocks of the second pool are lost", "swap_.release(from);", ""),
    (TABLES, "a slot off by one", "b * size_ + at % size_", "b * size_ + at % size_ + (at % size_ == 1)"),
    (TABLES, "last page counted as full", "tokens - std::max<int64_t>(0, blocks - 1) * size_", "tokens ? size_ : 0"),
    (TABLES, "waste of a shared block counted twice", "if (last.marked == last.refs) empty", "empty"),
    (ALLOCATOR, "a freed id still works", "places_[place].live && places_[place].generation == generation",
     "places_[place].live"),
    (ALLOCATOR, "ids of all allocators are one", "id >= 0 && tag == tag_ &&", "id >= 0 && (void(tag), true) &&"),
]  # fmt: skip


MUTANTS = [Mutant("kv_cache", name, f"csrc/runtime/{file}", old, new, ()) for file, name, old, new in FAULTS]


class Workshop:
    def __init__(self, folder: Path) -> None:
        import pybind11

        self.folder = folder
        self.flags = ["-std=c++20", "-O0", "-fPIC", "-w", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]
        self.flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        self.objects = {p.name: self.compile(p) for p in sorted(RUNTIME.glob("*.cpp"))}

    def compile(self, source: Path) -> Path:
        to = self.folder / f"{source.stem}.o"
        subprocess.run(["g++", *self.flags, "-c", source, "-o", to], check=True)
        return to

    def said(self, fault: Mutant | None = None) -> str:
        """What the tests say to a library with the fault, or nothing."""
        objects = dict(self.objects)
        if fault:
            original = ROOT / fault.file
            source = self.folder / f"faulty_{original.name}"
            source.write_text(plant(fault, original.read_text()))
            objects[original.name] = self.compile(source)
        library = self.folder / "_runtime.so"
        subprocess.run(["g++", "-shared", *objects.values(), "-o", library], check=True)
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--judge", library], capture_output=True, text=True, timeout=300, cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            return "no end after 300 s"
        lines = [line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED"))]
        return "" if done.returncode == 0 else (lines or [f"exit status {done.returncode}"])[-1]


def judge(library: str) -> int:
    """The tests of this folder, but for those in other processes, on a library."""
    import pytest

    spec = importlib.util.spec_from_file_location("genai_kernels._runtime", library)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:0] = [str(ROOT), str(HERE)]
    sys.modules["genai_kernels._runtime"] = module
    unwanted = "not TestStateMachine and not growth and not fails and not alone and not every_path and not planted"
    options = ["-x", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "--tb=short", "-k", unwanted]
    return pytest.main([*options, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(HERE)])


def main() -> int:
    if sys.argv[1:2] == ["--judge"]:
        return judge(sys.argv[2])
    chosen = [m for m in MUTANTS if " ".join(sys.argv[1:]) in m.name]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        if complaint := workshop.said():
            raise SystemExit(f"the sources as they are fail: {complaint}")
        for mutant in chosen:
            by = workshop.said(mutant)
            survived += not by
            print(f"| {mutant.name} | {by[:90] if by else '**survived**'} |", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} planted faults caught")
    return 1 if survived else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
