"""Every op under tests/kernels/guard_malloc.c: tails 1 to 130, every tensor against a guard page, forward and backward.

Run by test_memory_safety.py in a process of its own: `python guarded_calls.py LIBRARY GROUP MODE STEP`, with LIBRARY
preloaded. MODE 1: memory ends at the guard page; 2: it begins there. STEP: every how many-th tail. Prints each call
before it is made, so that the last line names the one that died, and at the end how many there were.
"""

import ctypes
import faulthandler
import sys

import torch
from calls import bits, run

import genai_kernels as gk

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TAILS = range(1, 131)


class Guards:
    """The preloaded library."""

    def __init__(self, path, mode):
        self.library, self.mode = ctypes.CDLL(path), mode
        self.library.guard_allocate.restype = ctypes.c_void_p
        self.library.guard_allocate.argtypes = [ctypes.c_size_t, ctypes.c_int]
        self.library.guard_set_mode(mode)
        self.library.guard_set_mode(0)

    def __enter__(self):
        self.library.guard_set_mode(self.mode)

    def __exit__(self, *_):
        self.library.guard_set_mode(0)

    def copy(self, t, stride=1):
        """A copy of t in guarded memory of exactly its size; elements `stride` apart, NaN between them."""
        if t.numel() == 0:
            return t
        elements = (t.numel() - 1) * stride + 1
        address = self.library.guard_allocate(elements * t.element_size(), self.mode == 1)
        memory = (ctypes.c_char * (elements * t.element_size())).from_address(address)
        flat = torch.frombuffer(memory, dtype=t.dtype)
        view = flat.as_strided(t.shape, [s * stride for s in t.contiguous().stride()])
        return view.copy_(t.detach()).requires_grad_(t.requires_grad)


def rows(n, dtype, stride, guards):
    """The ops that work row by row, on 5 rows of n elements."""

    def make(*shape, grad=True):
        return torch.randn(shape).to(dtype).requires_grad_(grad)

    x, r, w, b = make(5, n), make(5, n), make(n), make(n)
    wide, heads = make(5, 2 * n), make(5, 2, 2 * n)
    cos, sin = torch.randn(5, n), torch.randn(5, n)
    at = torch.tensor([3, 0, 4, 4, 1])
    for interleaved in (False, True):
        yield f"rotary interleaved={interleaved}", gk.rotary_embedding, (heads, cos, sin), {"interleaved": interleaved}
    yield "rotary positions", gk.rotary_embedding, (heads, cos, sin, at), {}
    yield "rms", gk.rms_norm, (x, w), {}
    yield "fused", gk.fused_add_rms_norm, (x, r, w), {}
    yield "layer", gk.layer_norm, (x, w, b), {}
    yield "layer residual", gk.layer_norm, (x, w, b), {"residual": r}
    for function in (gk.silu_and_mul, gk.gelu_and_mul, gk.gelu_tanh_and_mul):
        yield function.__name__, function, (wide,), {}
    tokens, seeds = torch.randint(n, (5, 4)), torch.arange(5)
    yield "sample", gk.sample, (x.detach(),), {"top_p": 0.8, "seed": seeds, "return_logprobs": True}
    options = {"top_k": n // 2, "previous_tokens": tokens, "repetition_penalty": torch.rand(5) + 0.5, "seed": seeds}
    yield "sample top_k", gk.sample, (x.detach(),), options
    o = make(1, 3, 2, n), make(1, 3, 2, n)
    lse = torch.randn(1, 2, 3, requires_grad=True), torch.randn(1, 2, 3, requires_grad=True)
    yield "merge", gk.merge_attention_states, (o[0], lse[0], o[1], lse[1]), {}


def attention(n, dtype, stride, guards):
    """n tokens, and a head dim that runs through 1 to 130 as n does; one option after another."""
    d, dv, keys = 7 * n % 130 + 1, 11 * n % 130 + 1, 13 * n % 130 + 1

    def make(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    q, k, v = make(1, n, 2, d), make(1, keys, 1, d), make(1, keys, 1, dv)
    options = [
        {"causal": True},
        {"window_size": (n // 3, 5)},
        {"attn_mask": torch.rand(1, 2, n, keys) < 0.7},
        {"attn_bias": make(1, 2, n, keys)},
        {"attn_bias": make(1, 1, n, 1), "causal": True},
        {"softcap": 3.0, "sink": torch.randn(2, requires_grad=True)},
        {"alibi_slopes": torch.rand(2), "attn_mask": torch.rand(1, 1, 1, keys) < 0.7},
        {"dropout_p": 0.3, "seed": n},
    ][n % 8]
    yield f"dense {list(options)}", gk.flash_attention, (q, k, v), {**options, "return_lse": True}
    cu_q = torch.tensor([0, n // 3, n // 3, n - n // 8], dtype=torch.int32)
    cu_k = torch.tensor([0, keys // 2, keys - keys // 9, keys - keys // 9], dtype=torch.int32)
    args = (*(t.detach()[0].requires_grad_() for t in (q, k, v)), cu_q, cu_k)
    yield "packed", gk.flash_attention_varlen, args, {"causal": n % 2 == 0, "return_lse": True}


def main():
    library, group, mode, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    faulthandler.enable()
    torch.set_num_threads(1)
    guards = Guards(library, mode)
    calls = 0
    for n in TAILS[::step]:
        for dtype in FLOATS:
            # of attention one dtype each: with 130 tails all of them meet all the options
            if group == "attention" and dtype != FLOATS[n // 8 % 3]:
                continue
            stride = 3 if n % 5 == 0 else 1
            for name, function, args, kwargs in {"rows": rows, "attention": attention}[group](n, dtype, stride, guards):
                print(f"{group} n={n} {dtype} stride={stride}: {name}", flush=True)
                expected = run(function, (args, kwargs))
                guarded = [
                    guards.copy(t, stride if t.is_floating_point() and t.dim() > 1 else 1)
                    if isinstance(t, torch.Tensor)
                    else t
                    for t in (*args, *kwargs.values())
                ]
                call = guarded[: len(args)], dict(zip(kwargs, guarded[len(args) :], strict=True))
                with guards:
                    found = run(function, call)
                for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                    assert a.shape == b.shape, f"result {i}: {a.shape}, expected {b.shape}"
                    assert torch.equal(bits(a), bits(b)), f"result {i} differs"
                calls += 1
    print(f"done: {calls} calls")


if __name__ == "__main__":
    main()
