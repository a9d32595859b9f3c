"""Attention's CUDA kernels in the host simulator: one warp at a time (float32), mma.sync (bfloat16, float16)."""

import shutil

import pytest
from test_cuda_simulator import (  # noqa: F401  fixtures
    GUARDED,
    SIMULATOR,
    TESTS,
    build,
    expect_none,
    guards,
    of_simulator,
    python,
)

FAULTS = of_simulator("attention_faults")
DTYPES = ["float32", "bfloat16", "float16"]


def check(*arguments, **options):
    return python(SIMULATOR / "attention_checks.py", *arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conformance(build, dtype):  # noqa: F811
    expect_none(check("conformance", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_from_run_to_run(build, dtype):  # noqa: F811
    expect_none(check("repeat", dtype))


def test_what_is_not_seen_changes_no_bit(build):  # noqa: F811
    """The tests of the CPU's kernels."""
    only = "not norm and not row_op and (keys or queries or query or sequence or value)"
    result = python("-m", "pytest", "-p", "load", "-k", only, TESTS / "test_unseen.py")
    expect_none(result)
    assert int(result.stdout.strip().splitlines()[-1].split(" passed")[0].split()[-1]) >= 60


def test_a_row_has_its_bits_in_any_company(build):  # noqa: F811
    only = "(attention and alone) or padding or chunks or layout or expanded or (packed and alone)"
    only = f"({only}) and not norm and not rotary and not merged"
    result = python("-m", "pytest", "-p", "load", "-k", only, TESTS / "test_determinism.py")
    expect_none(result)


@pytest.mark.parametrize("mode", [1, 2], ids=["ends_at_guard", "begins_at_guard"])
def test_tails_between_guard_pages(build, guards, mode):  # noqa: F811
    arguments = (TESTS / "guarded_calls.py", guards, "attention", mode, 3)
    result = python("-c", GUARDED, *arguments, LD_PRELOAD=guards)
    last = result.stdout.strip().rpartition("\n")[2]
    assert result.returncode == 0, f"{last}\nexit status {result.returncode}\n{result.stderr[-2000:]}"
    assert int(last.split()[1]) >= 80


@pytest.mark.parametrize("fault", FAULTS.FAULTS, ids=lambda f: f[0])
def test_a_fault_applies(fault):
    _, file, old, new, unit, _ = fault
    assert (TESTS.parent / file).read_text().count(old) == 1
    assert old != new
    assert (TESTS.parent / unit).suffix == ".cu"


def named(faults):
    return [pytest.param(f, id=f[0], marks=() if f[0] in FAULTS.DAILY else pytest.mark.slow) for f in faults]


@pytest.mark.parametrize("fault", named(FAULTS.FAULTS))
def test_a_fault_is_caught(build, tmp_path, fault):  # noqa: F811
    _, file, old, new, unit, arguments = fault
    library = build.build_with_fault(tmp_path, file, old, new, unit)
    result = check(*arguments, library=library)
    shutil.rmtree(tmp_path)
    assert result.returncode != 0, "not caught"
    imported = "ModuleNotFoundError" not in result.stderr and "ImportError" not in result.stderr
    assert imported, result.stderr[-2000:]
    print((result.stdout.strip() or result.stderr.strip().rpartition("\n")[2])[-300:])
