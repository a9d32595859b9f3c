"""The torch-free program that compute-sanitizer runs on a card (benchmarks/device/smoke.cpp), in the simulator."""

import subprocess
from pathlib import Path

import pytest
from test_cuda_simulator import build  # noqa: F401  the fixture

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def smoke(build, tmp_path_factory):  # noqa: F811
    """The program, linked with the simulator's objects of the kernels."""
    program = tmp_path_factory.mktemp("smoke") / "smoke"
    kernels = [s for s in build.sources() if s.suffix == ".cu" or s.parent == build.HERE]
    objects = [build.FOLDER / f"{source.name}.o" for source in kernels]
    source = ROOT / "benchmarks/device/smoke.cpp"
    subprocess.run(["g++", *build.compile_flags(), source, *objects, "-o", program], check=True)
    return program


def test_every_launcher_gives_finite_results(smoke):
    result = subprocess.run([smoke], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert lines[-1] == "smoke: ok"
    kernels = {line.split()[0] for line in lines[:-1]}
    assert {"rms_norm", "layer_norm", "gated_activations", "rotary_embedding", "simt", "sm80", "sm90"} <= kernels


def test_it_names_every_launcher_of_the_library():
    text = (ROOT / "benchmarks/device/smoke.cpp").read_text()
    for header in (ROOT / "csrc").rglob("*.h"):
        for line in header.read_text().splitlines():
            if line.startswith("cudaError_t launch_"):
                name = line.split()[1].split("(")[0]
                assert name in text, f"{name} of {header.name} is not in the smoke program"
