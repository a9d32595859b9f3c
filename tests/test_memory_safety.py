"""No byte beyond a tensor is read or written, every element of a result is written, offsets beyond 2^31 elements, and
memory linear in the number of tokens."""

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import SAMPLE_IDS, SAMPLES, build, run, same_bits

import genai_kernels as gk

TESTS = Path(__file__).resolve().parent


# ---- guard pages ----


@pytest.fixture(scope="module")
def guards(tmp_path_factory):
    library = tmp_path_factory.mktemp("guards") / "guard_malloc.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", str(TESTS / "kernels/guard_malloc.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    return str(library)


def python(guards, *arguments, **environment):
    """A Python process with the guards preloaded."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env = {**os.environ, "LD_PRELOAD": guards, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def guarded_calls(guards, group, mode, step, **environment):
    result = python(guards, str(TESTS / "guarded_calls.py"), guards, group, str(mode), str(step), **environment)
    last = result.stdout.strip().rpartition("\n")[2]
    assert result.returncode == 0, f"{last}\nexit status {result.returncode}\n{result.stderr[-2000:]}"
    return int(last.split()[1])


@pytest.mark.parametrize("mode", [1, 2], ids=["ends_at_guard", "begins_at_guard"])
@pytest.mark.parametrize(
    ("group", "least"), [("rows", 5770), ("attention", 250), ("products", 1820), ("steps", 910), ("convolutions", 620)]
)
def test_every_tail_between_guard_pages(guards, group, least, mode):
    assert guarded_calls(guards, group, mode, 1) >= least


FAULTS = {
    "write past the end": "a = guards.copy(torch.ones(5)); ctypes.memset(a.data_ptr() + 19, 0, 2)",
    "read past what torch allocated": "a = new(); ctypes.c_char.from_address(a.data_ptr() + 20).value",
    "read before what torch allocated": "a = new(); ctypes.c_char.from_address(a.data_ptr() - 1).value",
    "use after free": "at = new().data_ptr(); ctypes.c_char.from_address(at).value",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_guards_bite(guards, fault):
    program = """
import ctypes, sys, torch
from guarded_calls import Guards
guards = Guards(sys.argv[1], int(sys.argv[2]))
def new():
    with guards: return torch.empty(5)
assert new().isnan().all()
print("before", flush=True)
"""
    mode = "2" if "before" in fault else "1"
    result = python(guards, "-c", program + FAULTS[fault], guards, mode)
    assert result.stdout == "before\n", result.stderr
    assert result.returncode == -signal.SIGSEGV


# ---- fresh memory ----


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=SAMPLE_IDS)
def test_nothing_is_left_of_fresh_memory(op, sample):
    """torch fills what it allocates with NaN: every element of every result must be written over."""
    call = build(op, sample)
    expected = run(op.function, call)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = run(op.function, call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(found, expected)


def attend(q, k, v, dout, dlse, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = gk.flash_attention(*leaves, return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [dout, dlse])]


# ---- offsets beyond 2^31 elements, without the memory ----

FAR = 2**31 + 12345
NORESERVE = 0x4000  # MAP_NORESERVE of Linux; the module names it from Python 3.13 on


class Sparse:
    """Address space that holds no memory until it is touched."""

    def __init__(self, elements):
        self.memory = mmap.mmap(-1, elements * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        self.flat = torch.frombuffer(self.memory, dtype=torch.float32)

    def like(self, t, strides, offset=0):
        return self.flat.as_strided(t.shape, strides, offset).copy_(t)


@pytest.fixture(scope="module")
def sparse():
    return Sparse(8 * FAR)


@pytest.mark.parametrize("far", ["batch", "token", "head", "dim"])
def test_attention_with_far_strides(sparse, far):
    q, dout, k, v = (torch.randn(2, 3, 2, 3) for _ in range(4))
    expected = attend(q, k, v, dout, torch.ones(2, 2, 3), causal=True)
    near = {"batch": 0, "token": 1, "head": 2, "dim": 3}[far]
    strides = [18, 6, 3, 1]
    strides[near] = FAR
    for moved in range(4):
        tensors = [q, k, v, dout]
        tensors[moved] = sparse.like(tensors[moved], strides, offset=7)
        found = attend(*tensors, torch.ones(2, 2, 3), causal=True)
        assert same_bits(found, expected), ["q", "k", "v", "dout"][moved]


@pytest.mark.parametrize("far", range(4), ids=["batch", "head", "query", "key"])
def test_bias_and_mask_with_far_strides(sparse, far):
    q, k, v, dout = (torch.randn(2, 3, 2, 4) for _ in range(4))
    bias, mask = torch.randn(2, 2, 3, 3), torch.rand(2, 2, 3, 3) < 0.7
    strides = [18, 9, 3, 1]
    strides[far] = FAR
    far_bias = sparse.like(bias, strides)
    far_mask = sparse.flat.view(torch.bool).as_strided(mask.shape, strides, 4 * 5 * FAR).copy_(mask)
    dlse = torch.ones(2, 2, 3)
    near = attend(q, k, v, dout, dlse, attn_bias=bias, attn_mask=mask)
    assert same_bits(attend(q, k, v, dout, dlse, attn_bias=far_bias, attn_mask=far_mask), near)


@pytest.mark.parametrize("strides", [(FAR, 1), (1, FAR)], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["rms_norm", "fused_add_rms_norm", "layer_norm", "silu_and_mul", "gelu_and_mul"])
def test_rows_with_far_strides(sparse, name, strides):
    x, residual, dy = (torch.randn(3, 4) for _ in range(3))
    cotangent = dy[:, :2] if name.endswith("_and_mul") else dy

    def call(x, residual, dy):
        leaf = x.detach().requires_grad_()
        arguments = {"fused_add_rms_norm": (leaf, residual)}.get(name, (leaf,))
        y = getattr(gk, name)(*arguments)
        y = y if isinstance(y, torch.Tensor) else y[0]
        return [y.detach(), *torch.autograd.grad(y, leaf, dy)]

    expected = call(x, residual, cotangent)
    assert same_bits(call(sparse.like(x, strides), residual, cotangent), expected)
    assert same_bits(call(x, sparse.like(residual, strides), cotangent), expected)
    assert same_bits(call(x, residual, sparse.like(cotangent, strides)), expected)
    out = sparse.like(torch.zeros_like(cotangent), strides, offset=3)
    if name != "fused_add_rms_norm":
        getattr(gk, name)(x, out=out)
        assert same_bits(out, expected[0])


def test_rotary_and_merge_with_far_strides(sparse):
    x, angle = torch.randn(3, 2, 4), torch.randn(3, 2)
    cos, sin = angle.cos(), angle.sin()
    expected = gk.rotary_embedding(x, cos, sin)
    for strides in ([FAR, 4, 1], [8, FAR, 1], [8, 1, FAR]):
        assert same_bits(gk.rotary_embedding(sparse.like(x, strides), cos, sin), expected)
        out = sparse.like(torch.zeros(3, 2, 4), strides, offset=9)
        assert same_bits(gk.rotary_embedding(x, cos, sin, out=out), expected)
    assert same_bits(gk.rotary_embedding(x, sparse.like(cos, [FAR, 1]), sparse.like(sin, [FAR, 1], 5)), expected)
    o_a, o_b, lse_a, lse_b = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.randn(2, 3), torch.randn(2, 3)
    merged = gk.merge_attention_states(o_a, lse_a, o_b, lse_b)
    far = sparse.like(o_a, [FAR, 4, 1]), sparse.like(lse_a, [FAR, 1], 99)
    assert same_bits(gk.merge_attention_states(*far, o_b, lse_b), merged)


@pytest.mark.parametrize("strides", [(FAR, 1), (1, FAR)], ids=["rows", "columns"])
def test_sample_with_far_strides(sparse, strides):
    x, previous, seeds = torch.randn(3, 4), torch.tensor([[0, 1], [3, 3], [2, 0]], dtype=torch.int32), torch.arange(3)
    far = sparse.flat.view(torch.int32).as_strided((3, 2), strides, 5 * FAR).copy_(previous)
    options = {"top_k": 3, "top_p": 0.9, "repetition_penalty": 1.5, "seed": seeds, "return_logprobs": True}
    expected = gk.sample(x, previous_tokens=previous, **options)
    assert same_bits(list(gk.sample(sparse.like(x, strides), previous_tokens=far, **options)), list(expected))


# ---- memory ----

LINEAR = """
import resource, sys, torch, genai_kernels as gk
torch.set_num_threads(2)
n, what = int(sys.argv[1]), sys.argv[2]
def step(n):
    q, k, v = (torch.randn(1, n, h, 16).requires_grad_() for h in (2, 1, 1))
    options = {"causal": dict(causal=True), "window": dict(window_size=(128, 128)),
               "bias": dict(causal=True, attn_bias=torch.zeros(n, requires_grad=True))}[what]
    out = gk.flash_attention(q, k, v, **options)
    out.sum().backward()
step(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("what", ["causal", "window", "bias"])
def test_memory_is_linear_in_the_tokens(what):
    """Forward and backward at 16384 tokens, 2 heads: one byte per score would be 512 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", LINEAR, "16384", what], capture_output=True, text=True, check=True, cwd=TESTS.parent
    )
    kib = int(result.stdout)
    # q, k, v, out, their gradients and those of out: 9 x 2 MiB at most; and scratch for each thread
    assert kib < 40 * 1024, f"{kib} KiB"
