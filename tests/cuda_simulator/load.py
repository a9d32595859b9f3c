"""Importing this before genai_kernels puts the simulator's library in the place of genai_kernels._C: every op then runs
its CUDA kernels, on CPU tensors.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch  # noqa: F401  before the library, which is linked against it

DEFAULT = Path(__file__).resolve().parents[2] / "build/cuda_simulator/_C.abi3.so"

os.environ["GENAI_KERNELS_ISA"] = "baseline"  # all that is compiled of the CPU's, and never called
spec = importlib.util.spec_from_file_location("genai_kernels._C", os.environ.get("CUDA_SIMULATOR_LIBRARY", DEFAULT))
assert spec is not None
assert spec.loader is not None
sys.modules["genai_kernels._C"] = importlib.util.module_from_spec(spec)
