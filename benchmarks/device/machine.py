"""Stages `fingerprint` and `ceilings`: what the machine is, and the most it can do."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

import genai_kernels

from .log import Log


def _output(*command: str) -> str:
    """What a program prints, or "" where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def fingerprint(log: Log, device: str) -> None:
    found: dict[str, object] = {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "packages": {p: _version(p) for p in ("torch", "triton", "liger-kernel", "flashinfer-python") if _version(p)},
        "nvcc": _output("nvcc", "--version").splitlines()[-1:],
        "commit": _output("git", "rev-parse", "HEAD"),
        "library": dict(
            line.split("=", 1) for line in torch.ops.genai_kernels.build_info().splitlines() if "=" in line
        ),
        "version": genai_kernels.__version__,
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": p.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
            "driver": _output(
                "nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"
            ),
        }  # fmt: skip
    else:
        found |= {"name": "dry run on the CPU", "capability": "0.0"}
    log.add("fingerprint", **found)


def median_ms(run: Callable[[], object], device: str, repeats: int = 12) -> float:
    """Median time of one call, the first three left out."""
    times = []
    for i in range(repeats + 3):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end)
        else:
            import time

            before = time.perf_counter()
            run()
            taken = 1e3 * (time.perf_counter() - before)
        if i >= 3:
            times.append(taken)
    return statistics.median(times)


def _copy_ms(elements: int, device: str) -> float:
    source = torch.empty(elements, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source), device)


def ceilings(log: Log, device: str) -> None:
    """A copy that no cache holds, and a bf16 product on random numbers: zeros would draw less power and run faster."""
    dry = device == "cpu"
    elements = 2**22 if dry else 2**31
    copy_ms = _copy_ms(elements, device)
    n = 256 if dry else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = median_ms(lambda: a @ b, device)
    log.add(
        "ceilings",
        copy_tb_s=2 * elements * 2 / copy_ms / 1e9,  # read and written
        bf16_tflop_s=2 * n**3 / product_ms / 1e9,
        copy_gib=elements * 2 / 2**30,
        product=n,
    )
