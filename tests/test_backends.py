"""Which backend serves a call, that nothing falls back in silence, and that what is not proven is nobody's default."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genai_kernels as gk
from benchmarks import proven
from genai_kernels import backends, torch_ops, triton_lib
from genai_kernels.quantized import QuantizedWeight
from genai_kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
HOPPER, BLACKWELL, TURING = (9, 0), (10, 0), (7, 5)
BF16 = torch.bfloat16


@pytest.fixture
def world(monkeypatch):
    """world(cuda=..., triton=..., proven=...): a machine with these parts, for what backends.py asks."""

    def make(cuda=True, triton=True, proven=()):
        table = {}
        for backend, op, capability in proven:
            table.setdefault(backend, {}).setdefault(op, []).append(capability)
        monkeypatch.setattr(backends, "built_with_cuda", lambda: cuda)
        monkeypatch.setattr(backends, "proven", lambda: table)
        monkeypatch.setattr(backends, "has_triton", lambda: triton)
        monkeypatch.setattr(backends, "capability_of", lambda device: HOPPER)
        backends.on_cuda.cache_clear()
        backends._kernel_on_cuda.cache_clear()

    yield make
    backends.on_cuda.cache_clear()
    backends._kernel_on_cuda.cache_clear()
    backends._fallbacks.clear()


CUDA, TRITON = ("cuda", "rms_norm", "9.0"), ("triton", "rms_norm", "9.0")
CHOICES = {
    "nothing is proven": ({}, HOPPER, BF16, "reference"),
    "CUDA C++ is proven": ({"proven": [CUDA]}, HOPPER, BF16, "cuda"),
    "both are proven": ({"proven": [CUDA, TRITON]}, HOPPER, BF16, "cuda"),
    "only Triton is proven": ({"proven": [TRITON]}, HOPPER, BF16, "triton"),
    "proven, but not built": ({"cuda": False, "proven": [CUDA, TRITON]}, HOPPER, BF16, "triton"),
    "proven on another card": ({"proven": [CUDA, TRITON]}, (8, 0), BF16, "reference"),
    "a newer card": ({"proven": [CUDA, ("triton", "rms_norm", "10.0")]}, BLACKWELL, BF16, "triton"),
    "an older card": ({"proven": [("triton", "rms_norm", "7.5")]}, TURING, BF16, "reference"),
    "float64": ({"proven": [CUDA, TRITON]}, HOPPER, torch.float64, "reference"),
    "no triton": ({"triton": False, "proven": [TRITON]}, HOPPER, BF16, "reference"),
    "another op": ({"proven": [("cuda", "layer_norm", "9.0")]}, HOPPER, BF16, "reference"),
}


@pytest.mark.parametrize(("parts", "capability", "dtype", "expected"), CHOICES.values(), ids=CHOICES)
def test_the_choice(world, parts, capability, dtype, expected):
    world(**parts)
    choice = backends.on_cuda("rms_norm", capability, dtype, None)
    assert choice.backend == expected
    assert choice.falls_back == (expected == "reference")
    if choice.falls_back:
        assert set(choice.rejected) == {"cuda", "triton"}
        assert all(choice.rejected.values())


@pytest.mark.parametrize("name", ["cuda", "triton", "reference"])
def test_forced_is_taken_unproven_or_not_at_all(world, name):
    world()
    assert backends.on_cuda("rms_norm", HOPPER, BF16, name).backend == name
    world(cuda=False, triton=False)
    found = backends.on_cuda("rms_norm", HOPPER, BF16, name)
    assert found.backend == ("reference" if name == "reference" else "none")
    assert not found.falls_back


def test_backward_takes_a_kernel_whatever_is_forced_by_then(world):
    world()
    assert backends.kernel_on_cuda("rms_norm", HOPPER, BF16) == "cuda"
    world(proven=[TRITON])
    assert backends.kernel_on_cuda("rms_norm", HOPPER, BF16) == "triton"
    with pytest.raises(NotImplementedError, match="not float64"):
        backends.kernel_on_cuda("rms_norm", HOPPER, torch.float64)


def test_a_fallback_is_counted_and_refused_in_strict_mode(world):
    world()
    with FakeTensorMode():
        x = torch.empty(3, 8, device="cuda", dtype=BF16)
        assert gk.rms_norm(x).shape == x.shape
        assert gk.rms_norm(x).shape == x.shape
        (text, count), *more = gk.fallbacks().items()
        assert count == 2
        assert not more
        assert text.startswith("rms_norm: not cuda: unproven")
        assert "not triton: unproven" in text
        with gk.use_backend("auto", strict=True), pytest.raises(NotImplementedError, match=r"strict.*unproven"):
            gk.rms_norm(x)
        with gk.use_backend("reference", strict=True):  # asked for: no fallback
            gk.rms_norm(x)
    assert sum(gk.fallbacks().values()) == 2


def test_an_op_whose_first_argument_is_a_quantized_weight_is_chosen_for_too(world, monkeypatch):
    """By the dtype of what stands beside it; and its kernel is that of the op that the torch op belongs to."""
    world(cuda=False)
    with FakeTensorMode():
        data, scale = torch.empty(6, 8, device="cuda", dtype=torch.int8), torch.empty(6, 1, device="cuda")
        weight = QuantizedWeight(data, scale, shape=(6, 8), group_size=0)
        a, b = torch.empty(2, 8, device="cuda", dtype=BF16), torch.empty(6, 2, device="cuda", dtype=BF16)
        gk.dora_norm(weight, a, b)
        ((text, count),) = gk.fallbacks().items()
        assert text.startswith("dora_norm: not cuda: it has no kernel in CUDA C++; not triton: unproven")
        assert count == 1
        monkeypatch.setattr(torch_ops, "_run_in_triton", lambda name, args: f"{name} ran")
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        call = weight.data, a, b, 1.0, weight.scale, None, None, 0
        assert torch_ops._run_on_cuda("dora_norm", *call) == "dora_norm ran"
        dy, factor = torch.empty(3, 6, device="cuda"), torch.empty(6, device="cuda")
        assert torch_ops._run_on_cuda("scale_columns_bwd", dy, factor, dy) == "scale_columns_bwd ran"
    assert torch_ops._public_name("scale_columns_bwd") == "dora_linear"


def test_the_summary_at_the_end_is_one_line():
    program = (
        "import genai_kernels as gk; from genai_kernels import backends\n"
        "choice = backends.Choice('reference', '', {'cuda': 'unproven', 'triton': 'unproven'})\n"
        "for op in ('rms_norm', 'rms_norm', 'layer_norm'): backends.note_fallback(op, choice)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("genai_kernels:")]
    assert "PyTorch served 3 calls" in line
    assert "layer_norm 1, rms_norm 2" in line


def test_a_cpu_call_is_never_a_fallback():
    gk.rms_norm(torch.ones(2, 8))
    assert gk.fallbacks() == {}


def test_tensors_elsewhere_than_forced():
    if backends.built_with_cuda():
        with gk.use_backend("cuda"), pytest.raises(NotImplementedError, match="on the CPU"):
            gk.rms_norm(torch.ones(2, 8))
    else:
        with pytest.raises(ImportError, match="GENAI_KERNELS_CUDA=1"), gk.use_backend("cuda"):
            pass


def test_explain_tells_why(world):
    world()
    with FakeTensorMode():
        found = gk.explain(gk.rms_norm, torch.empty(3, 8, device="cuda", dtype=BF16))
    assert found.backend == "reference"
    assert "fallback" in found.why
    assert "unproven" in found.not_taken["cuda"]
    assert "unproven" in found.not_taken["triton"]


def test_what_is_called_proven_ran_from_these_sources():
    """An entry of proven.json is void once a file that its kernels are made of has changed."""
    record = json.loads(backends.PROVEN.read_text())
    for backend, ops in record["proven"].items():
        assert backend in ("cuda", "triton")
        for op, capabilities in ops.items():
            assert op in OPS
            assert capabilities
            assert f"{backend}/{op}" in record["sources"], "which sources ran?"
    for name, ran in record["sources"].items():
        now = proven.digest(*name.split("/"))
        assert now == ran, f"{name} has changed since it was proven: run benchmarks/device_run.py, or drop the entry"


def test_an_entry_is_void_once_its_sources_change(monkeypatch, tmp_path):
    table = tmp_path / "proven.json"
    table.write_text('{"about": "", "sources": {}, "proven": {}}')
    monkeypatch.setattr(backends, "PROVEN", table)
    proven.accept("9.0", {"triton": ["rms_norm"], "cuda": ["layer_norm"]})
    proven.accept("8.0", {"triton": ["rms_norm"]})
    assert json.loads(table.read_text())["proven"] == {
        "triton": {"rms_norm": ["8.0", "9.0"]},
        "cuda": {"layer_norm": ["9.0"]},
    }
    test_what_is_called_proven_ran_from_these_sources()
    monkeypatch.setattr(proven, "digest", lambda backend, op: "another")
    with pytest.raises(AssertionError, match="has changed"):
        test_what_is_called_proven_ran_from_these_sources()
    proven.accept("12.0", {"triton": ["rms_norm"]})
    assert json.loads(table.read_text())["proven"]["triton"]["rms_norm"] == ["12.0"]


def test_a_traced_fallback_is_counted():
    choice = backends.Choice("reference", "", {"cuda": "unproven"})

    @torch.compile(backend="eager", fullgraph=True)
    def traced(x):
        backends.note_fallback("rms_norm", choice)
        return x + 1

    before = sum(gk.fallbacks().values())
    traced(torch.ones(2))
    assert sum(gk.fallbacks().values()) > before
    backends._fallbacks.clear()


def test_triton_takes_what_is_read_on_the_cpu(monkeypatch):
    """Seeds and adapter ids, beside tensors of a card, which are pretended here; all else must be on the card."""
    monkeypatch.setattr(triton_lib, "interprets", lambda: False)
    monkeypatch.setattr(triton_lib, "load", lambda: None)
    monkeypatch.setitem(torch_ops._triton, "lora_linear_multi", lambda *args: "ran")
    with FakeTensorMode():
        x, w, a, b = (torch.empty(n, device="cuda") for n in ((3, 4), (5, 4), (2, 4), (5, 2)))
        host = torch.empty(1, dtype=torch.float64), torch.empty(1, 2).long(), torch.empty(3, 1).int()
        others = None, torch.empty(1).long(), 0.1, -1, False, False, None, None, None, 0
        args = x, w, [a], [b], *host, *others
        torch_ops._check_one_device("lora_linear_multi", args)
        assert torch_ops._run_in_triton("lora_linear_multi", args) == "ran"
        with pytest.raises(ValueError, match="lora_b: expected device cuda:0 as x, got cpu"):
            torch_ops._check_one_device("lora_linear_multi", (x, w, [a], [torch.empty(5, 2)], *host, *others))
        with pytest.raises(ValueError, match="expected cuda, where Triton runs, got cpu"):
            torch_ops._run_in_triton("lora_linear_multi", (x, w, [a], [torch.empty(5, 2)], *host, *others))
