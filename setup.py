"""Two extensions. `_C`, the kernels, is on PyTorch's stable ABI and on Python's limited API: every torch >= 2.10 and
every Python >= 3.10 can load it. `_runtime`, the block allocator, is pybind11 without torch, for one version of Python,
and so the wheel is for that one too.

Everything but the compilation is in pyproject.toml. Build-time environment:
  GENAI_KERNELS_CUDA=0|1  leave the CUDA kernels out; make a missing nvcc an error; the default is auto
  GENAI_KERNELS_DEBUG=1   -O1 -g, assertions
  MAX_JOBS=n              compile n files at a time; the default is the number of cores, one for each 2 GB of memory
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
RUNTIME = "csrc/runtime/"
TARGET_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10: the oldest torch the binary may meet at run time


def read_version() -> str:
    scope: dict = {}
    exec((ROOT / "genai_kernels/version.py").read_text(), scope)
    return scope["__version__"]


def available_jobs() -> int:
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int((memory_gb - 1) / 2)))


def extension_arguments() -> dict:
    if os.environ.get("GENAI_KERNELS_SDIST") or "sdist" in sys.argv or "egg_info" in sys.argv[:2]:
        return {}
    try:
        import pybind11
    except ImportError as error:
        raise SystemExit(
            "genai_kernels: the build needs pybind11>=3: run `pip install pybind11`, then again"
        ) from error
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError as error:
        raise SystemExit(
            "genai_kernels: the build needs torch>=2.10 in the environment: run `pip install torch`, then again"
        ) from error
    os.environ.setdefault("MAX_JOBS", str(available_jobs()))
    optimise = ["-O1", "-g", "-UNDEBUG"] if os.environ.get("GENAI_KERNELS_DEBUG") == "1" else ["-O3", "-g0"]
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))  # without these as `depends`
    # setuptools takes a library older than a changed header for up to date.
    extension = CppExtension(
        "genai_kernels._C",
        [s for s in sources if not s.startswith(RUNTIME)],
        depends=[h for h in headers if not h.startswith(RUNTIME)],
        include_dirs=[str(ROOT / "csrc")],
        py_limited_api=True,  # defines Py_LIMITED_API and does not link libtorch_python
        extra_compile_args=[
            *optimise,
            "-std=c++20",
            "-fvisibility=hidden",
            "-ffp-contract=off",  # a fused multiply-add is written as one, so that equal texts give equal bits
            "-fno-math-errno",
            "-Wno-psabi",  # vectors are passed inside one object file only
            "-Wno-uninitialized",  # GCC 12 reports its own AVX-512 intrinsics
            "-Wno-maybe-uninitialized",
            "-Wno-unknown-warning-option",  # Clang has not all of the above
            f"-ffile-prefix-map={ROOT}/=",  # no path of the build machine in the binary: same bits wherever it is built
            f"-ffile-prefix-map={include_paths()[0]}/=",
            f'-DGENAI_KERNELS_VERSION="{read_version()}"',
            TARGET_TORCH,
        ],
        # libtorch.so must stay a dependency although no symbol of it is used: in a CUDA build of torch it leads to
        # libtorch_cuda.so. These come after torch's own -ltorch, hence its repetition.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-s"],
    )

    runtime = Extension(
        "genai_kernels._runtime",
        [s for s in sources if s.startswith(RUNTIME)],
        depends=[h for h in headers if h.startswith(RUNTIME)],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args=[
            *("-O2" if flag == "-O3" else flag for flag in optimise),  # -O3 makes the binding longer, not faster
            "-std=c++20",
            "-fvisibility=hidden",
            f"-ffile-prefix-map={ROOT}/=",
            f"-ffile-prefix-map={pybind11.get_include()}/=",
        ],
        extra_link_args=["-s"],
    )

    class Build(BuildExtension.with_options(use_ninja=True)):
        def build_extensions(self):
            import cuda_build

            cuda_build.add_to(extension, ROOT, ROOT / "build/cuda")
            super().build_extensions()

    return {"ext_modules": [extension, runtime], "cmdclass": {"build_ext": Build}}


setup(**extension_arguments())
