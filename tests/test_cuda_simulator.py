"""The CUDA kernels of the row ops, run by the host simulator (tests/cuda_simulator/README.md says what it can see)."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SIMULATOR = TESTS / "cuda_simulator"
NORMS = "rms_norm,fused_add_rms_norm,layer_norm"
OTHERS = "silu_and_mul,gelu_and_mul,gelu_tanh_and_mul,rotary_embedding,merge_attention_states"


def of_simulator(name):
    """A module of the simulator's folder, whose names would clash on sys.path."""
    spec = importlib.util.spec_from_file_location(f"cuda_simulator_{name}", SIMULATOR / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAULTS = of_simulator("faults").FAULTS


@pytest.fixture(scope="session")
def build():
    """The module that builds; the library itself is built once, whoever comes first."""
    module = of_simulator("build")
    if shutil.which("g++") is None or not (module.beside_python("ninja").exists() or shutil.which("ninja")):
        pytest.skip("the CUDA simulator needs g++ and ninja to be built")
    module.build()
    return module


@pytest.fixture(scope="session")
def guards(tmp_path_factory):
    library = tmp_path_factory.mktemp("guards") / "guard_malloc.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", str(TESTS / "kernels/guard_malloc.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    return str(library)


def python(*arguments, library=None, capability=80, **environment):
    """A Python process whose genai_kernels are the simulator's."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, SIMULATOR))),
        "OMP_NUM_THREADS": "1",
        "CUDA_SIMULATOR_CAPABILITY": str(capability),
        **environment,
    }
    if library is not None:
        env["CUDA_SIMULATOR_LIBRARY"] = str(library)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True, cwd=TESTS.parent
    )


def check(*arguments, **options):
    return python(SIMULATOR / "checks.py", *arguments, **options)


def expect_none(result):
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


# ---- right results ----


@pytest.mark.parametrize("ops", [NORMS, OTHERS], ids=["norms", "others"])
def test_conformance(build, ops):
    expect_none(check("conformance", ops, 8))


@pytest.mark.parametrize(
    ("ops", "lengths"),
    [(f"{NORMS},{OTHERS}", "33,257"), (NORMS, "130,520,4100,16400,33000")],
    ids=["short", "every_tile"],
)
def test_lengths(build, ops, lengths):
    expect_none(check("lengths", ops, lengths))


def test_layouts_give_the_same_bits(build):
    expect_none(check("layouts", f"{NORMS},{OTHERS}"))


def test_the_same_bits_from_run_to_run(build):
    expect_none(check("repeat", f"{NORMS},{OTHERS}"))


def test_limits(build):
    expect_none(check("limits"))


# What the CPU's kernels do and these do not: float64, refused positions; and what calls attention.
NOT_HERE = [
    "float64", "double_backward", "positions", "opcheck", "compile", "parts_of_the_keys", "only_one_output", "flash",
    "thread_count", "attention_with", "bias_and_mask", "thousand", "tails", "guard", "memory_is", "queries", "packed",
    "padding", "sequence", "layout_changes", "heads_alone", "expanded_keys", "every_tail",
]  # fmt: skip


def test_the_tests_of_the_row_ops(build):
    """Determinism, batch invariance, far strides, fresh memory, layouts, arguments: the tests of the CPU's kernels."""
    files = ["test_determinism.py", "test_memory_safety.py"]
    files += [f"ops/test_{name}.py" for name in ("row_ops", "row_op_arguments", "merge_attention_states")]
    only = " and ".join(f"not {word}" for word in NOT_HERE)
    result = python("-m", "pytest", "-p", "load", "-k", only, *(TESTS / f for f in files))
    expect_none(result)
    assert int(result.stdout.strip().splitlines()[-1].split(" passed")[0].split()[-1]) >= 300


# ---- no access beyond a tensor ----

GUARDED = "import load, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def guarded(guards, mode, step, **options):
    arguments = (TESTS / "guarded_calls.py", guards, "rows", mode, step)
    return python("-c", GUARDED, *arguments, LD_PRELOAD=guards, **options)


@pytest.mark.parametrize("mode", [1, 2], ids=["ends_at_guard", "begins_at_guard"])
def test_tails_between_guard_pages(build, guards, mode):
    result = guarded(guards, mode, 7)
    last = result.stdout.strip().rpartition("\n")[2]
    assert result.returncode == 0, f"{last}\nexit status {result.returncode}\n{result.stderr[-2000:]}"
    assert int(last.split()[1]) >= 500


# ---- planted faults ----


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_applies(fault):
    root = TESTS.parent
    assert (root / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new
    assert (root / fault.unit).suffix == ".cu"


def named(faults):
    return [pytest.param(f, id=f.name, marks=() if f.daily else pytest.mark.slow) for f in faults]


@pytest.mark.parametrize("fault", named(FAULTS))
def test_a_fault_is_caught(build, guards, tmp_path, fault):
    library = build.build_with_fault(tmp_path, fault.file, fault.old, fault.new, fault.unit)
    options = {"library": library, "capability": fault.capability}
    result = guarded(guards, 1, 5, **options) if fault.guarded else check(*fault.check, **options)
    shutil.rmtree(tmp_path)
    assert result.returncode != 0, "not caught"
    imported = "ModuleNotFoundError" not in result.stderr and "ImportError" not in result.stderr
    assert imported, result.stderr[-2000:]
    print((result.stdout.strip() or result.stderr.strip().rpartition("\n")[2])[-300:])
