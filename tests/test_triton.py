"""The Triton kernels in Triton's interpreter: the accuracy of every sample, what nobody sees, and the same bits.

In processes of their own, one for each of two cores: TRITON_INTERPRET decides when the kernels are defined.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed here")

TESTS = Path(__file__).resolve().parent
SHARDS = 2
WHAT = ("test_conformance.py::test_accuracy", "test_unseen.py", "triton_bits.py")


def test_in_the_interpreter():
    paths = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore::RuntimeWarning",  # of numpy, for NaN and infinity
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }
    command = [sys.executable, "-m", "pytest", "-p", "triton_interpreter", *(str(TESTS / what) for what in WHAT)]
    how = {"cwd": TESTS.parent, "env": environment, "stdout": subprocess.PIPE, "text": True}
    shards = [subprocess.Popen([*command, f"--shard={i + 1}/{SHARDS}"], **how) for i in range(SHARDS)]
    reports = [shard.communicate()[0] for shard in shards]
    assert [s.returncode for s in shards] == [0] * SHARDS, "\n".join(report[-4000:] for report in reports)
