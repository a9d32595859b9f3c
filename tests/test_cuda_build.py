"""Every CUDA kernel compiled by nvcc, and what ptxas and the machine code say of it. No GPU is needed.

The objects are kept in build/cuda, which `python build_backend/cuda_build.py` fills too; only what changed is compiled
again.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW_OPS = [
    "rms_norm", "fused_add_rms_norm", "layer_norm", "gated_activations", "rotary_embedding", "merge_attention_states",
]  # fmt: skip
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)


@pytest.fixture(scope="session")
def objects():
    """Of every .cu file."""
    spec = importlib.util.spec_from_file_location("build_backend_cuda", ROOT / "build_backend/cuda_build.py")
    cuda = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GENAI_KERNELS_CUDA", raising=False)  # says what the library in this folder has, not these tests
        nvcc = cuda.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc is found: nothing of the CUDA build is checked")
    return cuda.compile_all(nvcc, ROOT, ROOT / "build/cuda")


@pytest.fixture(scope="session")
def cuobjdump():
    spec = importlib.util.find_spec("triton")
    folders = (
        [] if spec is None else [Path(f) / "backends/nvidia/bin/cuobjdump" for f in spec.submodule_search_locations]
    )
    found = next((str(f) for f in folders if f.exists()), shutil.which("cuobjdump"))
    if found is None:
        pytest.skip("no cuobjdump, which the triton wheel brings: the machine code is not checked")
    return found


def kernels_of(report):
    """(kernel, card, bytes of stack, of spill stores and loads, registers) for everything that ptxas reports."""
    pattern = (
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [(m[1], m[2], *map(int, m.groups()[2:])) for m in re.finditer(pattern, report, re.DOTALL)]


@each_source
def test_no_spills_and_no_serialised_products(objects, source):
    report = objects[source].with_suffix(".ptxas").read_text()
    kernels = kernels_of(report)
    assert kernels
    assert {card for _, card, *_ in kernels} == ({"sm_90a"} if source.stem.endswith("_sm90") else {"sm_80", "sm_90a"})
    # the frame of a call that is hardly ever made (simt.cuh's repair of a row) is allowed; an array that is indexed at
    # run time, which would lie in memory too, is larger
    spilled = [k for k in kernels if k[2] > 64 or any(k[3:5])]
    assert spilled == [], "kernel, card, stack, spill stores, spill loads, registers"
    assert re.findall(r"C75(?:08|1\d)\b.*", report) == []


# What registers and launches kernels; nothing that allocates, copies, waits or asks a stream, which a capture forbids.
CAPTURABLE = {
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cudaFuncSetAttribute", "cudaGetLastError", "cudaPeekAtLastError",
    "cudaGetDevice", "cudaDeviceGetAttribute", "cudaGetDriverEntryPoint", "cudaGetDriverEntryPointByVersion",
    "cudaMemsetAsync", "cudaGetErrorString",
}  # fmt: skip


@each_source
def test_launchers_can_be_captured_in_a_graph(objects, source):
    text = subprocess.run(["nm", "-u", objects[source]], capture_output=True, text=True, check=True).stdout
    called = set(re.findall(r"\b(cuda[A-Z]\w*)", text))
    assert called <= CAPTURABLE
    assert "LaunchKernel" in text


def machine_code(cuobjdump, path):
    """{(card, kernel): instructions}."""
    text = subprocess.run([cuobjdump, "--dump-sass", path], capture_output=True, text=True, check=True).stdout
    found, card = {}, ""
    for part in re.split(r"(?m)^\s*(?=arch = |Function : )", text):
        if part.startswith("arch = "):
            card = part.split()[2]
        elif part.startswith("Function : "):
            found[card, part.split()[2]] = part
    return found


@pytest.mark.parametrize("op", ROW_OPS)
def test_rows_are_read_and_written_16_bytes_at_a_time(objects, cuobjdump, op):
    code = machine_code(cuobjdump, objects[ROOT / f"csrc/ops/{op}/{op}.cu"])
    assert {card for card, _ in code} == {"sm_80", "sm_90a"}
    for (card, kernel), text in code.items():
        for access in (r"\bLDG\.E\.128\b", r"\bSTG\.E\.128\b"):
            assert re.search(access, text), f"{kernel} for {card} has no {access}"


@each_source
def test_tensor_cores_are_used_where_they_are_meant(objects, cuobjdump, source):
    """HGMMA in *_sm90.cu, HMMA in *_sm80*.cu: each file has kernels that do."""
    wanted = "HGMMA" if source.stem.endswith("_sm90") else "HMMA" if "_sm80" in source.stem else None
    if wanted is not None:
        code = machine_code(cuobjdump, objects[source])
        assert any(re.search(rf"\b{wanted}\.", text) for text in code.values())


@pytest.mark.parametrize("source", [s for s in SOURCES if s.stem.endswith("_sm90")], ids=lambda p: p.stem)
def test_hopper_kernels_multiply_by_wgmma_and_load_by_tma(objects, cuobjdump, source):
    """At least one product for each 16 columns of two tiles of 64 columns; a loop over them would be one alone."""
    kernels = machine_code(cuobjdump, objects[source])
    assert kernels
    for kernel, text in kernels.items():
        assert text.count("HGMMA.64x") >= 14, kernel
        assert "UTMALDG.4D" in text, kernel
        assert "STL" not in text, kernel
