"""The Hopper kernels of flash_attention in the host simulator, with its models of TMA, mbarriers and wgmma."""

import shutil

import pytest
from test_cuda_simulator import SIMULATOR, TESTS, build, expect_none, of_simulator, python  # noqa: F401  build: a fixture

CHECKS = SIMULATOR / "hopper_checks.py"
FAULTS = of_simulator("hopper_faults").FAULTS


@pytest.mark.parametrize("check", ["samples", "forward", "backward", "nonfinite"])
def test_hopper(build, check):  # noqa: F811
    expect_none(python(CHECKS, check, capability=90))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_applies(fault):
    assert (TESTS.parent / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new


def named(faults):
    return [pytest.param(f, id=f.name, marks=() if f.daily else pytest.mark.slow) for f in faults]


@pytest.mark.parametrize("fault", named(FAULTS))
def test_a_fault_is_caught(build, tmp_path, fault):  # noqa: F811
    library = build.build_with_fault(tmp_path, fault.file, fault.old, fault.new, fault.unit)
    result = python(CHECKS, "first", fault.check, library=library, capability=90)
    shutil.rmtree(tmp_path)
    assert result.returncode != 0, "not caught"
    assert "ImportError" not in result.stderr, result.stderr[-2000:]
    assert "ModuleNotFoundError" not in result.stderr, result.stderr[-2000:]
