"""Builds build/smoke from the CUDA objects of the library's own build: `python -m benchmarks.device.smoke_build`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))


def build(folder: Path = ROOT / "build/cuda", target: Path = ROOT / "build/smoke") -> Path:
    """Compiles what is not there yet; returns the program."""
    import cuda_build as cuda  # type: ignore[import-not-found]  # build_backend/cuda_build.py

    nvcc = cuda.find_nvcc()
    if nvcc is None:
        raise SystemExit("benchmarks.device.smoke_build: expected nvcc, got none")
    objects = cuda.compile_all(nvcc, ROOT, folder).values()
    sources = [ROOT / "benchmarks/device/smoke.cpp"]
    includes = [f"-I{p}" for p in (ROOT / "csrc", *cuda.include_folders(nvcc))]
    libraries = [f"-L{p}" for p in cuda.library_folders(nvcc)] + ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    flags = ["-O2", "-std=c++20", "-DGENAI_KERNELS_CUDA"]
    subprocess.run(["g++", *flags, *includes, *sources, *map(str, objects), *libraries, "-o", str(target)], check=True)
    return target


if __name__ == "__main__":
    print(build())
