"""Builds the library of the simulator: the host functions of csrc, the CUDA kernels' own source as C++, and the
simulator in CUDA's place. It stands for genai_kernels/_C in a process of its own (tests/cuda_simulator/load.py).

    python tests/cuda_simulator/build.py
"""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build/cuda_simulator"


def compile_flags() -> list[str]:
    includes = [HERE, ROOT / "csrc", sysconfig.get_paths()["include"], *include_paths()]
    return [
        "-O2", "-g1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread",
        "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-psabi", "-Wno-uninitialized",
        "-Wno-maybe-uninitialized", "-DGENAI_KERNELS_CUDA",
        '-DGENAI_KERNELS_VERSION=\\"simulator\\"', "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DPy_LIMITED_API=0x030a0000", *(f"-I{path}" for path in includes),
    ]  # fmt: skip


def sources() -> list[Path]:
    """All but the CPU kernels, which nothing calls here: every call is one for the GPU (host/gpu.h)."""
    csrc = ROOT / "csrc"
    return [
        *(p for p in sorted(csrc.rglob("*.cpp")) if not p.stem.endswith("_cpu")), *sorted(csrc.rglob("*.cu")),
        *sorted(HERE.glob("*.cpp")),
    ]  # fmt: skip


def build(folder: Path = FOLDER) -> Path:
    """Compiles what changed and returns the library."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries = " ".join(f"-L{path} -Wl,-rpath,{path}" for path in library_paths())
    lines = [
        f"flags = {' '.join(compile_flags())}",
        "rule cxx\n  command = g++ $flags -MMD -MF $out.d -x c++ -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ -shared -o $out $in {libraries} -ltorch -ltorch_cpu -lc10 $missing",
    ]
    objects = []
    for source in sources():
        objects.append(folder / f"{source.name}.o")
        lines.append(f"build {objects[-1]}: cxx {source}")
    library = folder / "_C.abi3.so"
    lines.append(f"build {library}: link {' '.join(map(str, objects))}")
    ninja = [Path(sysconfig.get_path("scripts"), "ninja"), "-C", folder, "--quiet"]
    missing = ""
    for _ in range(2):
        (folder / "build.ninja").write_text(f"missing = {missing}\n" + "\n".join(lines) + "\n")
        subprocess.run(ninja, check=True)
        names = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout.split()
        missing += " ".join(f"-Wl,--defsym={n}=0" for n in names if "genai_kernels" in n)
    return library


if __name__ == "__main__":
    print(build())
