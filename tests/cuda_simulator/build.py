"""Builds the library of the simulator: the host functions of csrc, the CUDA kernels' own source as C++, and the
simulator in CUDA's place. In a process of its own it stands for genai_kernels/_C (tests/cuda_simulator/load.py).

    python tests/cuda_simulator/build.py
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sysconfig
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build/cuda_simulator"


def beside_python(program: str) -> Path:
    return Path(sysconfig.get_path("scripts"), program)


def compile_flags(csrc: Path = ROOT / "csrc") -> list[str]:
    includes = [HERE, csrc, sysconfig.get_paths()["include"], *include_paths()]
    return [
        "-O2", "-g1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread",
        "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-psabi", "-Wno-uninitialized",
        "-Wno-maybe-uninitialized", "-DGENAI_KERNELS_CUDA", '-DGENAI_KERNELS_VERSION="simulator"',
        "-DGENAI_KERNELS_BASELINE_ONLY",  # of kernels that nothing calls
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000", *(f"-I{path}" for path in includes),
    ]  # fmt: skip


def sources() -> list[Path]:
    """All of `_C` but the CPU kernels that have a twin in CUDA: nothing calls them, as every call is one for the GPU
    here (host/gpu.h).
    """
    csrc = ROOT / "csrc"
    with_cuda = {p.parent for p in csrc.rglob("*.cu")}

    def is_taken(p: Path) -> bool:
        return p.parent.name != "runtime" and not (p.stem.endswith("_cpu") and p.parent in with_cuda)

    return [
        *filter(is_taken, sorted(csrc.rglob("*.cpp"))),
        *sorted(csrc.rglob("*.cu")), *sorted(HERE.glob("*.cpp")),
    ]  # fmt: skip


def link_command(objects: list[Path], library: Path) -> list[str]:
    folders = [f for path in library_paths() for f in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return ["g++", "-shared", "-o", str(library), *map(str, objects), *folders, "-ltorch", "-ltorch_cpu", "-lc10"]


def link(objects: list[Path], library: Path) -> None:
    """A kernel that is declared and not there is an error here, not when it is called."""
    subprocess.run(link_command(objects, library), check=True)
    names = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout.split()
    if missing := [name for name in names if "genai_kernels" in name]:
        library.unlink()
        raise RuntimeError(f"{library.name}: expected every kernel, got none for {', '.join(missing)}")


def build(folder: Path = FOLDER) -> Path:
    """Compiles what changed and returns the library. One process at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder)


def _build(folder: Path) -> Path:
    flags = " ".join(flag.replace('"', '\\"') for flag in compile_flags())
    rule = "  command = g++ $flags -MMD -MF $out.d -x c++ -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    objects = [folder / f"{source.name}.o" for source in sources()]
    lines = [f"flags = {flags}", "rule cxx", rule]
    lines += [f"build {to}: cxx {source}" for to, source in zip(objects, sources(), strict=True)]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = beside_python("ninja")
    subprocess.run([ninja if ninja.exists() else "ninja", "-C", folder, "--quiet"], check=True)
    library = folder / "_C.abi3.so"
    newest = max(path.stat().st_mtime for path in objects)
    if not library.exists() or library.stat().st_mtime < newest:
        link(objects, library)
    return library


def build_with_fault(folder: Path, file: str, old: str, new: str, unit: str) -> Path:
    """The library with one edit of a file of csrc, in a folder of its own; `unit` is the .cu file compiled again."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / file
    text = source.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file}: expected once, got {text.count(old)} times: {old}")
    source.write_text(text.replace(old, new))
    flags = ["-O0", "-g0", "-w", *compile_flags(folder / "csrc")[2:]]
    target = folder / "fault.o"
    subprocess.run(["g++", *flags, "-x", "c++", "-c", folder / unit, "-o", target], check=True)
    others = [FOLDER / f"{source.name}.o" for source in sources() if source.name != Path(unit).name]
    link([target, *others], folder / "_C.abi3.so")  # first: of an inline function the linker keeps the first it meets
    return folder / "_C.abi3.so"


if __name__ == "__main__":
    print(build())
