"""The Triton kernels in Triton's interpreter, over the samples of every op that has one. Runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETS:
    import torch
    import triton_interpreter

    import genai_kernels as gk
    from genai_kernels.accuracy import verify_sample
    from genai_kernels.registry import FLOATS, OPS

    triton_interpreter.mend()
    with gk.use_backend("triton"):
        pass  # loads the kernels
    from genai_kernels.torch_ops import _triton

    CASES = [(op, s) for op in OPS.values() if op.overloads[0] in _triton for s in op.samples if not s.bench]

    @pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
    @pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op.name}-{s.name}" for op, s in CASES])
    def test_accuracy(op, sample, dtype):
        with gk.use_backend("triton"):
            verdicts = verify_sample(op, sample, dtype, draws=4)
        assert [f"{v.what}: {v.complaint}" for v in verdicts if not v.ok] == []

else:
    triton = pytest.importorskip("triton", reason="triton is not installed here")

    def test_every_sample_in_the_interpreter():
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:]
