"""genai_kernels/proven.json: which kernels have kept the accuracy rule on a card, and from which sources."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

from genai_kernels import backends
from genai_kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[1]


def sources_of(backend: str, op: str) -> list[Path]:
    """The files that an op's kernel is compiled from, in order."""
    room = Path(inspect.getfile(inspect.unwrap(OPS[op].function))).parent.name
    if backend == "triton":
        folders, kinds = [ROOT / "genai_kernels/triton_lib", ROOT / "genai_kernels/ops" / room], ("triton.py",)
        return sorted(p for f in folders for p in f.glob("*.py") if f.name == "triton_lib" or p.name in kinds)
    folders = [ROOT / "csrc/core", ROOT / "csrc/cuda", ROOT / "csrc/ops" / room]
    return sorted(p for f in folders for p in f.iterdir() if p.suffix in {".h", ".cu", ".cuh"})


def digest(backend: str, op: str) -> str:
    """Of the sources as they are now."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources_of(backend, op))).hexdigest()


def accept(capability: str, passed: dict[str, list[str]]) -> None:
    """Enters the ops (by backend) whose every sample has kept the rule on a card of this compute capability."""
    record = json.loads(backends.PROVEN.read_text())
    for backend, ops in passed.items():
        for op in ops:
            now = digest(backend, op)
            table = record["proven"].setdefault(backend, {})
            if record["sources"].get(f"{backend}/{op}") != now:  # what other cards have proven was another kernel
                table[op] = []
            record["sources"][f"{backend}/{op}"] = now
            table[op] = sorted({*table[op], capability})
    backends.PROVEN.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
