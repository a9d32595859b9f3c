"""Errors of exp, sigmoid, tanh, SiLU and GELU in units in the last place, on every instruction set of this CPU."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exp_check(tmp_path_factory):
    program = tmp_path_factory.mktemp("exp_check") / "exp_check"
    sources = ["tests/kernels/exp_check.cpp", "csrc/cpu/isa.cpp"]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-pthread", "-Icsrc"]
    subprocess.run(["g++", *flags, *sources, "-o", str(program)], cwd=ROOT, check=True)
    return program


def run(program, stride):
    result = subprocess.run([str(program), str(stride)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "worst" in result.stdout


def test_every_bfloat16_and_some_floats(exp_check):
    run(exp_check, 1021)


@pytest.mark.slow
def test_every_non_positive_float(exp_check):
    run(exp_check, 1)
