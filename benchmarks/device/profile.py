"""Stage `profile`: hardware counters of the main kernels, read by Nsight Compute."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from genai_kernels import backends

from .cases import cases
from .log import Log
from .timing import _call, _with_gradients

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "launch__registers_per_thread": "registers",
}


def run_for_profiler(device: str, index: int, backend: str) -> None:
    """One case of ours, twice: the profiler looks at the second."""
    case = list(cases(device == "cpu"))[index]
    with backends.use_backend(backend):
        inputs = _with_gradients(case, case.make(device, case.dtype))
        result = case.ours(*inputs)
        result = result if isinstance(result, tuple) else (result,)
        call = _call(case, case.ours, inputs, [torch.randn_like(r) for r in result])
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile(log: Log, index: int, backend: str, seconds: float) -> None:
    """Counters of every kernel of a case, into the log."""
    case = list(cases())[index]
    label = {"op": case.op, "name": case.name, "backward": case.backward, "backend": backend}
    if shutil.which("ncu") is None:
        log.add("profile", **label, skipped="ncu is not here")
        return
    command = [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base",
        "--metrics", ",".join(METRICS), sys.executable, "-m", "benchmarks.device.stage", "profile", str(log.path),
        "cuda", str(index), backend,
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        log.add("profile", **label, skipped=f"took longer than {seconds:.0f} s")
        return
    lines = result.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        log.add("profile", **label, skipped=(result.stdout + result.stderr)[-300:])
        return
    kernels: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = METRICS.get(row["Metric Name"])
        if name:
            value = float(row["Metric Value"].replace(",", "") or "nan")
            kernels.setdefault(f"{row['ID']}: {row['Kernel Name'][:120]}", {})[name] = value
    log.add("profile", **label, kernels=kernels)
