"""The library as setup.py builds it with CUDA kernels: it works in a torch without CUDA, and its parts are there."""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cuda_build import objects  # noqa: F401  the fixture: the .cu files are compiled once for both

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/cuda_library"
LOAD = ROOT / "tests/cuda_simulator/load.py"  # puts any library in the place of genai_kernels._C
# One instruction set of four: the CPU kernels know nothing of CUDA, and the library in genai_kernels/ has them all.
ENVIRONMENT = {**os.environ, "CPPFLAGS": "-DGENAI_KERNELS_BASELINE_ONLY", "GENAI_KERNELS_ISA": "baseline"}


@pytest.fixture(scope="module")
def library(objects):  # noqa: F811
    environment = {**ENVIRONMENT, "GENAI_KERNELS_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", FOLDER / "temp", "--build-lib", FOLDER]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:  # of several processes one compiles, and the others find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"genai_kernels: CUDA: nvcc \d+\.\d+ at .*: sm_80, sm_90a and PTX", done.stderr)
    return FOLDER / "genai_kernels/_C.abi3.so"


def run(library, program):
    environment = {**ENVIRONMENT, "CUDA_SIMULATOR_LIBRARY": str(library), "PYTHONPATH": f"{LOAD.parent}:{ROOT}"}
    command = [sys.executable, "-c", f"import load\n{program}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_works_in_this_torch(library):
    """In one without CUDA, here: every op on a sample, forward and backward."""
    program = """
import torch
from genai_kernels import backends
from genai_kernels.accuracy import verify_sample
from genai_kernels.registry import OPS
assert backends.built_with_cuda()
for op in OPS.values():
    for dtype in (torch.float32, torch.bfloat16):
        assert all(v.ok for v in verify_sample(op, op.samples[0], dtype)), op.name
print(torch.ops.genai_kernels.build_info())
"""
    assert "cuda=sm_80, sm_90a and PTX of CUDA" in run(library, program)


def test_every_op_has_its_twin_for_cuda(library):
    # but for those that measure the machine, and the rooms without CUDA C++
    rooms = [p for p in (ROOT / "csrc/ops").iterdir() if not list(p.glob("*.cu"))]
    text = "".join(p.read_text() for room in rooms for p in room.glob("*.cpp"))
    others = ("measure_", *re.findall(r"GK_CPU_OP\(\s*(\w+),", text))
    program = (
        f"others = {others}"
        + """
import torch
has = torch._C._dispatch_has_kernel_for_dispatch_key
for name in sorted(torch._C._dispatch_get_all_op_names()):
    space, _, op = name.partition("::")
    if space == "genai_kernels" and has(name, "CPU") and not op.startswith(others):
        assert has(f"genai_kernels_cuda::{op}", "CUDA"), op
        one, other = (getattr(getattr(torch.ops, s), op).default._schema for s in (space, space + "_cuda"))
        assert str(one).replace("genai_kernels::", "") == str(other).replace("genai_kernels_cuda::", "")
        print(op)
"""
    )
    assert len(run(library, program).split()) >= 25


def test_which_kernels_attention_takes(library):
    program = """
import torch
from genai_kernels import backends
from genai_kernels.ops.flash_attention import path
for capability in ((8, 0), (9, 0)):
    backends.capability_of = lambda device: capability
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(1, 64, 2, 64, dtype=dtype)
        print(path._cuda_path(q, q, q, None, None, causal=True))
        print(path._cuda_path(q, q, q, None, None, dropout_p=0.5))
"""
    found = run(library, program).splitlines()
    ampere, hopper, simt = "sm_80 (cp.async, mma.sync)", "sm_90a (TMA, wgmma)", "one warp for a row, in float32"
    pairs = [(ampere, ampere)] * 2 + [(simt, simt)] * 2 + [(hopper, hopper), (hopper, ampere)] + [(simt, simt)] * 2
    assert found == [f"forward: {forward}; backward: {backward}" for forward, backward in pairs]


def test_it_needs_no_cuda_library(library):
    """CUDA's runtime is inside and private; torch's current stream is bound where torch has CUDA."""
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*lib(cuda|cudart|nvrtc)", needed)
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    assert re.search(r" w aoti_torch_get_current_cuda_stream$", symbols, re.MULTILINE)
    assert not re.search(r" [TBDW] cuda[A-Z]", symbols)
    assert not re.search(r" U _ZN(K?)(2at|3c10)", symbols)


def test_without_nvcc():
    """Without: one line, or an error where it was insisted on."""
    program = "import sys; sys.path.insert(0, 'build_backend'); import cuda_build; print(cuda_build.find_nvcc())"
    bare = {**os.environ, "PATH": "/nowhere", "CUDA_HOME": "", "CUDA_PATH": ""}
    hide = "import os; join = os.path.join; os.path.join = lambda *p: join(*p).replace('/usr/local/cuda', '/nowhere')"
    for wanted, code, text in (("auto", 0, "CPU kernels only"), ("0", 0, "left out"), ("1", 1, "but there is no nvcc")):
        command = [sys.executable, "-c", f"{hide}\n{program}"]
        variables = {**bare, "GENAI_KERNELS_CUDA": wanted}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code
        (line,) = done.stderr.strip().splitlines()
        assert text in line
