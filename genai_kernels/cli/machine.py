"""The machine that a measurement was made on: its fingerprint and its limits."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

_BURST_SECONDS = 3e-3  # of one measurement of the arithmetic peak: short enough to stand between two timings


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _caches() -> dict[str, str]:
    """{"L1 Data": "48K", "L2 Unified": "2048K", ...} of the first core."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        found[f"L{_read(index / 'level')} {_read(index / 'type')}"] = _read(index / "size")
    return found


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _cpu_model() -> str:
    text = _read("/proc/cpuinfo")
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = fields.get("model name", platform.processor() or platform.machine())
    number = " ".join(f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields)
    return f"{name} ({number})" if number else name


def fingerprint() -> dict[str, Any]:
    """What a timing depends on. `id` is equal where machine and software are the same; `load` is of the moment."""
    info = dict(line.split("=", 1) for line in torch.ops.genai_kernels.build_info().split("\n") if line)
    stable: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory_gb": round(_memory_bytes() / 2**30),
        "virtual": "hypervisor" in _read("/proc/cpuinfo"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "isa": torch.ops.genai_kernels.isa(),
        "isa_reason": torch.ops.genai_kernels.isa_reason(),
        "isa_table": torch.ops.genai_kernels.isa_table().split(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": info.get("compiler", ""),
        "genai_kernels": __version__,
    }
    digest = hashlib.sha256(repr(sorted(stable.items())).encode()).hexdigest()[:12]
    return {"id": digest, **stable, "load": round(os.getloadavg()[0], 2)}


def file_name() -> str:
    """A name for this machine's results, such as `intel-xeon-processor-family-6-model-207-2-cores-avx512`."""
    model = re.sub(r"\((R|TM)\)|@.*?GHz|stepping \d+|\bcpu\b", "", _cpu_model(), flags=re.IGNORECASE)
    words = re.findall(r"[a-z0-9]+", model.lower())
    return "-".join([*words, str(len(os.sched_getaffinity(0))), "cores", torch.ops.genai_kernels.isa()])


class Limits:
    """The most that this machine can do with the threads set now: arithmetic in registers, and streams of memory."""

    def __init__(self) -> None:
        self._iterations: dict[str, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        first = max(self.peak("fma_f32") for _ in range(3))
        bf16 = max(self.peak("dot_bf16") for _ in range(3))
        self._bf16 = "dot_bf16" if bf16 > first else "fma_f32"

    def peak(self, what: str) -> float:
        """FLOP/s of `fma_f32`, `fma_f64` or `dot_bf16`, all threads together, in a burst of some milliseconds."""
        measure = torch.ops.genai_kernels.measure_peak
        if what not in self._iterations:
            # The best of some short bursts on one thread: a thread that waits for its core must not shorten the burst.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            rate = max(measure(what, 5000) for _ in range(5))
            torch.set_num_threads(threads)
            lanes = {"baseline": 4, "avx2": 8}.get(torch.ops.genai_kernels.isa(), 16)
            flops = 12 * 8 * 2 * lanes  # of an iteration, in single precision: csrc/cpu/machine_limits.cpp
            self._iterations[what] = max(1000, int(rate * _BURST_SECONDS / flops))
        return measure(what, self._iterations[what])

    def name_for(self, dtype: torch.dtype) -> str:
        """Which peak bounds products in `dtype`: for bf16 the dot product, where it is used and faster."""
        return {torch.bfloat16: self._bf16, torch.float64: "fma_f64"}.get(dtype, "fma_f32")

    def stream(self, what: str, nbytes: int) -> float:
        """Bytes/s of a "read" or "copy" of `nbytes` in all, in a buffer that was just used, as a case's own data is."""
        nbytes = max(int(nbytes), 4096)
        if self._buffer.numel() < nbytes:
            self._buffer = torch.zeros(nbytes, dtype=torch.uint8)
        return torch.ops.genai_kernels.measure_stream(what, self._buffer[:nbytes])

    def memory(self) -> dict[str, float]:
        """Bytes/s from and to memory, by a buffer that no cache holds."""
        sizes = [int(s[:-1]) * {"K": 2**10, "M": 2**20}.get(s[-1], 1) for s in _caches().values() if s]
        nbytes = min(max([2**28, *(2 * s for s in sizes)]), _memory_bytes() // 8)
        rates = {what: sorted(self.stream(what, nbytes) for _ in range(5))[2] for what in ("read", "copy")}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        return {**rates, "buffer_bytes": nbytes}
