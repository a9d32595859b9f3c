"""Every instruction set of this CPU, forced in a process of its own: accuracy, and what it says of itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["baseline", "avx2", "avx512", "avx512_bf16"]


def python(*arguments, isa):
    env = {**os.environ, "GENAI_KERNELS_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


SAYS = """
import torch, genai_kernels
print(f"{torch.ops.genai_kernels.isa()}: {torch.ops.genai_kernels.isa_reason()}")
"""

# Every twentieth pair of sample and dtype, other ones for each set: test_conformance.py has all with the best set.
CONFORM = """
import sys, torch, genai_kernels as gk
from genai_kernels.accuracy import verify_sample
from genai_kernels.registry import FLOATS, OPS
first, step = int(sys.argv[1]), int(sys.argv[2])
complaints, samples = [], 0
for op in OPS.values():
    for i, sample in enumerate(s for s in op.samples if not s.bench):
        for j, dtype in enumerate(FLOATS):
            if (i + j + first) % step: continue
            samples += 1
            for v in verify_sample(op, sample, dtype):
                if not v.ok: complaints.append(f"{op.name} {sample.name} {dtype} {v.what}: {v.complaint}")
print(samples)
print("\\n".join(complaints))
"""


def supported():
    result = python("-c", "import genai_kernels, torch; genai_kernels.rms_norm(torch.ones(1, 1))", isa="none")
    return [name for name in NAMES if name in result.stderr.partition("expected one of")[2].partition("(")[0]]


SUPPORTED = supported()


def test_an_unknown_name_is_refused():
    result = python("-c", "import genai_kernels, torch; genai_kernels.rms_norm(torch.ones(1, 1))", isa="avx1024")
    assert result.returncode == 1
    assert "GENAI_KERNELS_ISA: expected one of baseline" in result.stderr
    assert "got 'avx1024'" in result.stderr


def test_baseline_is_everywhere():
    assert "baseline" in SUPPORTED


@pytest.mark.parametrize("isa", SUPPORTED)
def test_it_is_the_forced_one_that_runs(isa):
    result = python("-c", SAYS, isa=isa)
    assert result.stdout == f"{isa}: forced by GENAI_KERNELS_ISA\n"


@pytest.mark.parametrize("isa", SUPPORTED)
def test_conformance(isa):
    result = python("-c", CONFORM, str(5 * NAMES.index(isa)), "20", isa=isa)
    assert result.returncode == 0, result.stderr[-2000:]
    samples, _, complaints = result.stdout.partition("\n")
    assert int(samples) > 12
    assert complaints.strip() == ""
