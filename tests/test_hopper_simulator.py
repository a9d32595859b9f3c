"""The Hopper kernels of flash_attention in the host simulator, with its models of TMA, mbarriers and wgmma.
Their planted faults are among those of test_cuda_simulator.py.
"""

import pytest
from test_cuda_simulator import SIMULATOR, build, expect_none, python  # noqa: F401  build is a fixture


@pytest.mark.parametrize("check", ["samples", "forward", "backward", "nonfinite"])
def test_hopper(build, check):  # noqa: F811
    expect_none(python(SIMULATOR / "hopper_checks.py", check, capability=90))
