"""Every Triton kernel compiles to machine code for sm_80 and sm_90, without a GPU: what a call launches is compiled."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import genai_kernels as gk
from genai_kernels import torch_ops, triton_lib
from genai_kernels.accuracy import map_tensors
from genai_kernels.registry import OPS, Make, Sample

triton = pytest.importorskip("triton", reason="triton is not installed here")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program can have, by card
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8",
    torch.bool: "*i1",
}  # fmt: skip


def type_of(value):
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "u32" if 0 <= value < 2**32 else "i64"


def is_aligned(value):
    """As a launch does: what is a multiple of 16 is compiled as such."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


class Kernel(NamedTuple):
    """One compiled kernel: its code, and what the assembler says of it."""

    name: str
    constants: dict[str, object]
    capability: int
    ptx: str
    shared: int
    registers: int
    stack: int


def compiled(name, constants, capability, binary, path):
    path.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return Kernel(name, constants, capability, binary.asm["ptx"], binary.metadata.shared, registers, stack)


def compile_instead(kernels, folder, cards):
    """A stand-in for JITFunction.run: compiles for these cards and launches nothing."""
    seen = set()

    def run(self, *args, grid, warmup, num_warps=4, num_stages=3, enable_fp_fusion=True, **kwargs):
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        fixed = {p.name for p in self.params if p.is_constexpr}
        fixed |= {n for n, v in given.items() if v is None or (type(v) is int and v == 1)}
        signature = {n: "constexpr" if n in fixed else type_of(given[n]) for n in self.arg_names}
        constants = {(self.arg_names.index(n),): given[n] for n in fixed}
        attributes = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(self.arg_names)
            if n not in fixed and is_aligned(given[n])
        }
        key = (self.__name__, tuple(signature.values()), str(sorted(constants.items())), str(attributes))
        if key in seen:
            return
        seen.add(key)

        def one(capability):
            binary = triton.compile(
                ASTSource(self, signature, constants, attributes),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion},
            )
            named = {n: given[n] for n in fixed}
            return compiled(self.__name__, named, capability, binary, folder / f"kernel_{capability}.cubin")

        with ThreadPoolExecutor() as pool:  # the assembler is a process of its own
            kernels.extend(pool.map(one, cards))

    return run


@pytest.fixture(autouse=True)
def _without_a_device(monkeypatch):
    monkeypatch.setattr(triton_lib, "why_not", lambda: "")
    yield
    triton_lib.load.cache_clear()  # others expect to be told what is missing


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Backward of many layers is the same kernels: compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def kernels(monkeypatch, tmp_path, cache, request):
    """float32 for the smaller card alone: what the larger has more, wgmma, multiplies 16 bits."""
    found = []
    dtype = request.node.callspec.params["dtype"] if hasattr(request.node, "callspec") else torch.bfloat16
    cards = (80,) if dtype == torch.float32 else (80, 90)
    monkeypatch.setattr(triton_lib, "check_place", lambda op, args: None)
    monkeypatch.setattr(JITFunction, "run", compile_instead(found, tmp_path, cards))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    return found


def call(op, sample, dtype):
    """Forward and backward of a sample."""

    def leaf(t):
        return t.requires_grad_(op.differentiable) if t.is_floating_point() else t

    args, kwargs = map_tensors(leaf, sample.build(Make(dtype)))
    for name in sample.frozen:
        kwargs[name].requires_grad_(False)
    with gk.use_backend("triton"):
        results = op.function(*args, **kwargs)
        results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.ones_like(r) for r in results])


def samples_of(op):
    """The plainest of an op's samples, and the one with the most options."""
    samples = [s for s in op.samples if not s.bench and not s.cpu_only]
    sizes = {s.name: len(s.build(Make(torch.bfloat16))[1]) for s in samples}
    return samples[0], max(samples, key=lambda s: sizes[s.name])


def test_the_kernels_are_there():
    with gk.use_backend("triton"):
        assert [op.name for op in OPS.values() if "triton" in op.gpu and op.overloads[0] not in torch_ops._triton] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("op", [op for op in OPS.values() if "triton" in op.gpu], ids=lambda op: op.name)
def test_compiles(op, dtype, kernels):
    plain, largest = samples_of(op)
    call(op, largest, dtype)
    if dtype == torch.bfloat16 and plain is not largest:  # what most calls run
        call(op, plain, dtype)
    assert {k.capability for k in kernels} == ({80} if dtype == torch.float32 else {80, 90})
    assert [k[:3] for k in kernels if k.shared > SHARED_MEMORY[k.capability]] == []


def test_attention_uses_the_matrix_units_and_no_stack(kernels):
    """Of a causal call in bfloat16 at head_dim 128, what most calls run: products of the warp group on sm_90, of the
    warp on sm_80, and every number in a register.
    """
    op = OPS["flash_attention"]
    call(op, next(s for s in op.samples if s.name == "head_dim_128"), torch.bfloat16)
    hot = [k for k in kernels if not k.constants.get("CAREFUL")]
    assert {k.name for k in hot} == {"fwd_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"}
    assert [(k.name, k.capability, k.stack) for k in hot if k.stack] == []
    for k in hot:
        assert re.search(r"wgmma\.mma_async.*bf16" if k.capability == 90 else r"mma\.sync.*bf16", k.ptx), k.name


def test_paged_decoding_uses_the_matrix_units_and_no_stack(kernels):
    """Of one new token in bfloat16 at head_dim 128, eight query heads to a key head."""
    from genai_kernels.ops.paged_attention.samples import paged

    sample = Sample("decode", lambda m: paged(m, [1000, 700], heads=16, kv_heads=2, dim=128))
    call(OPS["paged_attention"], sample, torch.bfloat16)
    assert {k.name for k in kernels} == {"attend_kernel", "fold_kernel"}
    assert [(k.name, k.capability, k.stack) for k in kernels if k.stack] == []
    for k in kernels:
        if k.name == "attend_kernel":
            assert re.search(r"wgmma\.mma_async.*bf16" if k.capability == 90 else r"mma\.sync.*bf16", k.ptx)


def test_lora_linear_uses_the_matrix_units_and_no_stack(kernels):
    """Of a layer and an adapter in bfloat16, forward and backward: one product reads x, beside which S is summed."""
    from genai_kernels.ops.lora_linear.samples import call as layer
    from genai_kernels.triton_lib.products import PLAIN

    call(OPS["lora_linear"], Sample("training", lambda m: layer(m, (128,), 256, 192, 16)), torch.bfloat16)
    assert {k.name for k in kernels} == {"linear_kernel", "shrink_kernel", "rows_product_kernel"}
    assert [k.constants["SHRINKS"] for k in kernels if k.name == "linear_kernel"].count(True) == 2  # of two cards
    assert [(k.name, k.capability, k.stack) for k in kernels if k.stack] == []
    for k in kernels:
        if k.constants["KIND"] == PLAIN:
            assert re.search(r"wgmma\.mma_async.*bf16" if k.capability == 90 else r"mma\.sync.*bf16", k.ptx), k.name
        else:  # dA and dB, of which one factor is float32
            assert re.search(r"mma\.sync.*tf32", k.ptx), k.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("what", ["gate", "gate and adapters", "dora"])
def test_epilogues_of_linear_layers_use_no_stack(what, dtype, kernels):
    """Of a gated layer as wide as a language model's, where a program has the most columns, and of DoRA's training."""
    from genai_kernels.ops.lora_linear.dora_samples import _dora
    from genai_kernels.ops.lora_linear.gated_samples import _gated

    ranks = (16, 16) if what == "gate and adapters" else ()
    gated = Sample("wide", lambda m: _gated(m, (128,), 64, 5632, bias=True, ranks=ranks))
    if what == "dora":
        call(OPS["dora_linear"], Sample("training", lambda m: _dora(m, (128,), 256, 192, 16, bias=True)), dtype)
    else:
        call(OPS["linear_swiglu"], gated, dtype)
    own = {"dora_norm_kernel", "scale_columns_bwd_kernel"} if what == "dora" else {"gated_bwd_kernel"}
    assert {"linear_kernel", *own} <= {k.name for k in kernels}
    assert [(k.name, k.capability, k.stack) for k in kernels if k.stack] == []
    for k in kernels:
        if k.name == "linear_kernel" and dtype == torch.bfloat16:
            assert re.search(r"wgmma\.mma_async.*bf16" if k.capability == 90 else r"mma\.sync.*bf16", k.ptx)


def test_the_weights_of_sample_have_no_fused_multiply_add(kernels):
    """Or they would be other integers than the CPU's."""
    op = OPS["sample"]
    call(op, next(s for s in op.samples if s.name == "mixed"), torch.bfloat16)
    assert {k.name for k in kernels} == {"weigh_kernel", "penalise_kernel", "choose_kernel"}
    for k in kernels:
        assert "fma.rn" not in k.ptx, k.name
        if k.name == "weigh_kernel":
            assert len(re.findall(r"mul\.rn\.f64|mul\.f64", k.ptx)) >= 11
