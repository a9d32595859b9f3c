"""The Triton kernels in Triton's interpreter: the accuracy of every sample, what nobody sees, and the same bits.

In processes of their own: TRITON_INTERPRET decides when the kernels are defined.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed here")

TESTS = Path(__file__).resolve().parent
SHARDS = 8  # not a multiple of 3, or each would have one dtype of every test, and float32 takes longest
# Elements of each output, of two draws of a sample at least. Eight, as elsewhere, are for rounding errors near the
# limit in outputs of a few hundred elements; what the programs get wrong, the same in every draw, shows in the first.
ENOUGH = 2000
PAGED = "ops/test_paged_attention.py::"
WHAT = (
    "test_conformance.py::test_accuracy",
    "test_unseen.py",
    "triton_bits.py",
    PAGED + "test_what_no_token_sees_is_not_read",
    PAGED + "test_a_seen_nan_stays_in_its_rows",
    PAGED + "test_a_draft_tree_hides_other_branches",
)


@pytest.mark.parametrize("shard", range(1, SHARDS + 1))
def test_in_the_interpreter(shard):
    paths = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore::RuntimeWarning",  # of numpy, for NaN and infinity
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }
    command = [sys.executable, "-m", "pytest", "-p", "triton_interpreter", f"--enough={ENOUGH}"]
    command += [f"--shard={shard}/{SHARDS}", *(str(TESTS / what) for what in WHAT)]
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
