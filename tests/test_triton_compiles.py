"""Every Triton kernel compiles to machine code for sm_80 and sm_90, without a GPU: what a call would launch is compiled."""

import pytest
import torch

import genai_kernels as gk
from genai_kernels import torch_ops, triton_lib
from genai_kernels.accuracy import map_tensors
from genai_kernels.registry import OPS, Make

triton = pytest.importorskip("triton", reason="triton is not installed here")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


def type_of(value):
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "u32" if 0 <= value < 2**32 else "i64"


def compile_instead(compiled):
    """A stand-in for JITFunction.run: compiles for both targets and launches nothing."""

    def run(self, *args, grid, warmup, num_warps=4, **kwargs):
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        fixed = {p.name for p in self.params if p.is_constexpr} | {n for n, v in given.items() if v is None}
        signature = {n: "constexpr" if n in fixed else type_of(given[n]) for n in self.arg_names}
        constants = {(self.arg_names.index(n),): given[n] for n in fixed}
        key = (self.__name__, tuple(signature.values()), tuple((n, str(v)) for n, v in sorted(constants.items())))
        if key in compiled:
            return
        for capability in (80, 90):
            source = ASTSource(self, signature, constants)
            target = GPUTarget("cuda", capability, 32)
            binary = triton.compile(source, target=target, options={"num_warps": num_warps})
            assert binary.asm["cubin"]
        compiled.add(key)

    return run


def samples_of(op):
    """The plainest of an op's samples, and the one with the most options."""
    samples = [s for s in op.samples if not s.bench]
    sizes = {s.name: len(s.build(Make(torch.bfloat16))[1]) for s in samples}
    return {samples[0].name: samples[0], **{s.name: s for s in [max(samples, key=lambda s: sizes[s.name])]}}.values()


@pytest.fixture
def compiled(monkeypatch):
    found = set()
    monkeypatch.setattr(triton_lib, "why_not", lambda: "")
    monkeypatch.setattr(triton_lib, "check_place", lambda op, args: None)
    monkeypatch.setattr(JITFunction, "run", compile_instead(found))
    return found


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_compiles(op, compiled):
    with gk.use_backend("triton"):
        if op.overloads[0] not in torch_ops._triton:
            pytest.skip("this op has no Triton kernel yet")
        for sample in samples_of(op):
            def leaf(t):
                return t.requires_grad_() if t.is_floating_point() else t

            args, kwargs = map_tensors(leaf, sample.build(Make(torch.bfloat16)))
            for name in sample.frozen:
                kwargs[name].requires_grad_(False)
            results = op.function(*args, **kwargs)
            results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
            torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    assert compiled
