"""The CUDA half of the build: csrc/**/*.cu to objects, by nvcc alone. No torch header is among them.

GENAI_KERNELS_CUDA=auto (the default): with nvcc if there is one; 0: without; 1: a missing nvcc is an error.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OLDEST = (12, 4)
# Machine code for both, and PTX for what is newer than either. A file named *_sm90.cu has nothing for sm_80.
PLAIN = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"]
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]


def find_nvcc() -> str | None:
    """Path of an nvcc that is new enough; says in one line what was found."""
    wanted = os.environ.get("GENAI_KERNELS_CUDA", "auto")
    if wanted not in {"auto", "0", "1"}:
        raise SystemExit(f"genai_kernels: GENAI_KERNELS_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return say(None, "CUDA: left out, as GENAI_KERNELS_CUDA=0 says: CPU kernels only")
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)] + ["/usr/local/cuda"]
    candidates = [
        *(os.path.join(home, "bin", "nvcc") for home in homes[:-1]),
        "nvcc",
        os.path.join(homes[-1], "bin/nvcc"),
    ]
    problem = "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    for nvcc in filter(None, map(shutil.which, candidates)):
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        version = tuple(map(int, re.findall(r"release (\d+)\.(\d+)", text)[0])) if "release" in text else (0, 0)
        if version >= OLDEST:
            return say(nvcc, f"CUDA: nvcc {version[0]}.{version[1]} at {nvcc}: sm_80, sm_90a and PTX")
        problem = f"nvcc {version[0]}.{version[1]} at {nvcc} is older than {OLDEST[0]}.{OLDEST[1]}"
    if wanted == "1":
        raise SystemExit(f"genai_kernels: GENAI_KERNELS_CUDA=1, but there is {problem}; install a CUDA toolkit >= 12.4")
    return say(None, f"CUDA: {problem}: CPU kernels only")


def say(nvcc: str | None, text: str) -> str | None:
    print(f"genai_kernels: {text}", file=sys.stderr, flush=True)
    return nvcc


def flags(source: Path, root: Path) -> list[str]:
    return [
        "-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DGENAI_KERNELS_CUDA", "--expt-relaxed-constexpr",
        "--extended-lambda", "-diag-suppress=177", "-Xptxas=-v", f"-I{root / 'csrc'}",
        *(HOPPER if source.stem.endswith("_sm90") else PLAIN),
    ]  # fmt: skip


def compile_one(nvcc: str, source: Path, root: Path, folder: Path) -> Path:
    """Compiles one file unless its object is newer than all it was made from. What ptxas said is kept beside it."""
    target = folder / source.relative_to(root).with_suffix(".cu.o")
    target.parent.mkdir(parents=True, exist_ok=True)
    depfile, report = target.with_suffix(".d"), target.with_suffix(".ptxas")
    if target.exists() and depfile.exists():
        parts = depfile.read_text().replace("\\\n", " ").partition(":")[2].split()
        if all(os.path.exists(p) and os.path.getmtime(p) <= target.stat().st_mtime for p in parts):
            return target
    command = [nvcc, *flags(source, root), "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    report.write_text(result.stdout + result.stderr)
    return target


def compile_all(nvcc: str, root: Path, folder: Path) -> dict[Path, Path]:
    """.cu file -> its object. One process at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _compile_all(nvcc, root, folder)


def _compile_all(nvcc: str, root: Path, folder: Path) -> dict[Path, Path]:
    # the longest first, so that no compiler runs alone at the end: most templates are in the matrix kernels
    sources = sorted((root / "csrc").rglob("*.cu"), key=lambda p: (not re.search(r"_sm\d\d", p.stem), p))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = pool.map(lambda s: compile_one(nvcc, s, root, folder), sources)
        return dict(zip(sources, objects, strict=True))


def library_folders(nvcc: str) -> list[str]:
    """Where this nvcc keeps libcudart_static: it may be a script beside which nothing else lies."""
    dryrun = subprocess.run([nvcc, "--dryrun", "x.o"], capture_output=True, text=True, check=False).stderr
    return [f for f in dict.fromkeys(re.findall(r'"-L([^"]+)"', dryrun)) if not f.endswith("stubs")]


def include_folders(nvcc: str) -> list[str]:
    dryrun = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    return list(dict.fromkeys(re.findall(r'"-I([^"]+)"', dryrun)))


def add_to(extension, root: Path, folder: Path) -> None:
    """The CUDA kernels as objects of an extension, if there is a compiler for them."""
    nvcc = find_nvcc()
    if nvcc is None:
        return
    extension.extra_objects += map(str, compile_all(nvcc, root, folder).values())
    extension.include_dirs += include_folders(nvcc)
    extension.library_dirs += library_folders(nvcc)
    extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
    extension.extra_compile_args.append("-DGENAI_KERNELS_CUDA")
    extension.extra_link_args.append("-Wl,--exclude-libs,ALL")  # the runtime stays private to this library


if __name__ == "__main__":  # python build_backend/cuda_build.py: compile only
    here = Path(__file__).resolve().parents[1]
    found = find_nvcc()
    if found is not None:
        for name in compile_all(found, here, here / "build/cuda"):
            print(name)
