"""One extension on the LibTorch stable ABI: a cp310-abi3 library that every torch >= 2.10 can load.

Everything but the compilation is in pyproject.toml. Build-time environment:
  GENAI_KERNELS_CUDA=0|1  leave the CUDA kernels out; make a missing nvcc an error; the default is auto
  GENAI_KERNELS_DEBUG=1   -O1 -g, assertions
  MAX_JOBS=n              compile n files at a time; the default is the number of cores, one for each 2 GB of memory
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
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
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError as error:
        raise SystemExit(
            "genai_kernels: the build needs torch>=2.10 in the environment: run `pip install torch`, then again"
        ) from error
    os.environ.setdefault("MAX_JOBS", str(available_jobs()))
    optimise = ["-O1", "-g", "-UNDEBUG"] if os.environ.get("GENAI_KERNELS_DEBUG") == "1" else ["-O3", "-g0"]
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    extension = CppExtension(
        "genai_kernels._C",
        sources,
        depends=headers,  # else setuptools takes a library older than a changed header for up to date
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

    class Build(BuildExtension.with_options(use_ninja=True)):
        def build_extensions(self):
            import cuda_build

            cuda_build.add_to(extension, ROOT, ROOT / "build/cuda")
            super().build_extensions()

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(options={"bdist_wheel": {"py_limited_api": "cp310"}}, **extension_arguments())
