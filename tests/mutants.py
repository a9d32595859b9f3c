"""Applies the planted faults of mutant_catalogue.py one by one and reports the share that the tests catch.

Usage: python -m tests.mutants [--op OP] [--only TEXT] [--jobs N] [--report FILE]

Each fault is planted in a copy of csrc; only the files it concerns are compiled again, for the baseline instruction set
alone, and linked with the objects of the last in-place build. What decides are the accuracy rule over the op's samples
and, if they pass, the tests that name the op's kernels. A fault that does not compile is an error, not a catch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))
from mutant_catalogue import MUTANTS, Mutant  # noqa: E402

FLAGS = [
    "-O1", "-fPIC", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w",
    "-DGENAI_KERNELS_BASELINE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000",
    '-DGENAI_KERNELS_VERSION="mutant"',
]  # fmt: skip

# The accuracy rule over one op's samples; ends at the first complaint. First one draw of each, where only gross errors
# count (most faults are gross, and the rule is for draws judged together), then as in test_conformance.py.
SAMPLES = """
import sys, torch, genai_kernels as gk
from genai_kernels.accuracy import verify_sample
from genai_kernels.registry import OPS
torch.set_num_threads(1)
calls = [(op, s) for name, op in OPS.items() if name.startswith(sys.argv[1]) for s in op.samples if not s.bench]
for draws in (1, 8):
    for dtype in (torch.float32, torch.bfloat16):
        for op, sample in calls:
            for v in verify_sample(op, sample, dtype, draws=draws):
                gross = v.error > 4 * v.limit or v.error == 0
                if not v.ok and (gross or draws > 1):
                    print(f"{op.name} {sample.name} {dtype}, {v.what}: {v.complaint}")
                    sys.exit(1)
"""
# The tests of one op, or of all ops, that are quick; the others start processes of their own.
RELATED = [
    "test_determinism.py",
    "test_unseen.py",
    "test_tails.py",
    "ops/test_row_ops.py",
    "ops/test_row_op_arguments.py",
]


def pattern(text: str) -> re.Pattern[str]:
    """The text, with any space or line break where it has one, or none beside punctuation."""
    return re.compile(r"\s+".join(re.escape(word) for word in text.split()))


def plant(mutant: Mutant, text: str) -> str:
    """The file's text with the fault in it."""
    found = pattern(mutant.old).findall(text)
    if len(found) != 1:
        raise ValueError(f"{mutant.file}: {mutant.name}: expected its text once, got {len(found)} times: {mutant.old}")
    return pattern(mutant.old).sub(lambda _: mutant.new, text)


class Workshop:
    """A copy of the package, and of the sources, that faults are built into."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        self.folder = folder
        shutil.copytree(ROOT / "genai_kernels", folder / "genai_kernels", ignore=shutil.ignore_patterns("*.so"))
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        import sysconfig

        self.includes = [f"-I{p}" for p in [*include_paths(), sysconfig.get_paths()["include"]]]
        self.libraries = [a for p in library_paths() for a in (f"-L{p}", f"-Wl,-rpath,{p}")]
        self.objects = {}
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            relative = source.relative_to(ROOT)
            if relative.is_relative_to("csrc/runtime"):  # not in this library; tests/runtime has faults of its own
                continue
            built = sorted((ROOT / "build").glob(f"temp.*/{relative.with_suffix('.o')}"), key=os.path.getmtime)
            if not built:
                raise SystemExit(f"no object of {relative} under build/: run `make dev` first")
            self.objects[str(relative)] = built[-1]

    def build(self, units: tuple[str, ...]) -> None:
        objects = dict(self.objects)
        for unit in units:
            objects[unit] = self.folder / (Path(unit).stem + ".o")
            command = ["g++", *FLAGS, f"-I{self.folder}/csrc", *self.includes, "-c", str(self.folder / unit)]
            subprocess.run([*command, "-o", str(objects[unit])], check=True)
        output = self.folder / "genai_kernels/_C.abi3.so"
        output.unlink(missing_ok=True)
        libraries = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
        link = ["g++", "-shared", *map(str, objects.values()), *self.libraries, *libraries]
        subprocess.run([*link, "-o", str(output)], check=True)

    def run(self, *arguments: str) -> str:
        """Empty if a program accepts the library; otherwise what it said, or the signal that ended it."""
        env = {
            **os.environ,
            "GENAI_KERNELS_ISA": "baseline",
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
        }
        try:
            result = subprocess.run(
                [sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=self.folder, timeout=600
            )
        except subprocess.TimeoutExpired:
            return "no end after 600 s"
        if result.returncode == 0:
            return ""
        said = [line for line in result.stdout.splitlines() if line.strip() and not line.startswith(("!", "="))]
        return said[-1] if said else f"exit status {result.returncode}"

    def caught(self, mutant: Mutant) -> str:
        """What caught a mutant, or nothing."""
        source = self.folder / mutant.file
        text = source.read_text()
        source.write_text(plant(mutant, text))
        try:
            self.build(mutant.units)
        finally:
            source.write_text(text)
        return self.judge(mutant.op)

    def judge(self, op: str) -> str:
        tests = [str(TESTS / name) for name in RELATED if (TESTS / name).exists()]
        tests += [str(p) for p in (TESTS / "ops").glob(f"test_{op}*.py")]
        words = {"flash_attention": "not row and not rotary and not norm"}.get(op, op.split("_")[0])
        options = ["-x", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "--rootdir", str(ROOT)]
        pytest = ["-m", "pytest", *options, "-c", str(ROOT / "pyproject.toml"), "-k", words]
        return self.run("-c", SAMPLES, op) or self.run(*pytest, *tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="faults at a time")
    parser.add_argument("--report", help="also write the table to this file")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.op in (None, m.op) and arguments.only in m.name]
    rows, survived = [], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        idle: SimpleQueue[Workshop] = SimpleQueue()
        for i in range(arguments.jobs):
            idle.put(Workshop(Path(folder) / str(i)))
        first = idle.get()
        first.build(tuple(sorted({u for m in chosen for u in m.units})))
        for op in sorted({m.op for m in chosen}):
            if complaint := first.judge(op):
                raise SystemExit(f"the sources as they are fail: {op}: {complaint}")
        idle.put(first)

        def judged(mutant: Mutant) -> tuple[str, float]:
            workshop, began = idle.get(), time.monotonic()
            try:
                return workshop.caught(mutant), time.monotonic() - began
            finally:
                idle.put(workshop)

        for mutant, (by, seconds) in zip(chosen, pool.map(judged, chosen), strict=True):
            survived += not by
            row = f"| {mutant.op} | {mutant.name} | {by[:90].replace('|', '/') if by else '**survived**'} |"
            rows.append(row)
            print(f"{row} {seconds:.0f} s", flush=True)
    caught = len(chosen) - survived
    verdict = f"{caught} of {len(chosen)} planted faults caught: {100 * caught / max(1, len(chosen)):.1f} %"
    print(verdict)
    if arguments.report:
        head = [
            "# Planted faults",
            "",
            "Made by `make mutants`.",
            "",
            verdict,
            "",
            "| op | fault | caught by |",
            "|---|---|---|",
        ]
        Path(arguments.report).write_text("\n".join([*head, *rows]) + "\n")
    return 0 if caught >= 0.95 * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
