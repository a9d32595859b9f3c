"""Random calls for a few seconds; `make fuzz` makes more of them (tests/fuzz.py)."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from fuzz_calls import GROUPS, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
CASES = int(os.environ.get("GENAI_KERNELS_FUZZ_CASES", "60"))
SANITIZED = [
    "g++", "-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off",
    "-fno-math-errno", "-w", "-Icsrc",
]  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_random_calls(group):
    torch.set_num_threads(1)

    # derandomize: the same cases every time in CI; a long run draws new ones, and prints how to make them again
    @settings(max_examples=CASES, deadline=None, database=None, derandomize=CASES <= 60, print_blob=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=st.data())
    def random_call(case):
        check(case.draw(GROUPS[group]))

    random_call()


def test_kernels_under_sanitizers(tmp_path):
    """Forward attention in a program without torch, baseline instruction set: buffers of exactly their size."""
    program = tmp_path / "fuzz_attention"
    sources = ["tests/kernels/fuzz_attention.cpp", "csrc/cpu/isa.cpp", "-DGENAI_KERNELS_BASELINE_ONLY"]
    subprocess.run([*SANITIZED, *sources, "-o", str(program)], cwd=ROOT, check=True)
    env = {**os.environ, "GENAI_KERNELS_ISA": "baseline"}
    result = subprocess.run([str(program), "1", str(3 * CASES)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
    assert "worst error" in result.stdout
