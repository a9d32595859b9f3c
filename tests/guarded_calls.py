"""Every op under tests/kernels/guard_malloc.c: tails 1 to 130, every tensor against a guard page, forward and backward.

Run by test_memory_safety.py in a process of its own: `python guarded_calls.py LIBRARY GROUP MODE STEP`, with LIBRARY
preloaded. MODE 1: memory ends at the guard page; 2: it begins there. STEP: every how many-th tail. Prints each call
before it is made, so that the last line names the one that died, and at the end how many there were.
"""

import ctypes
import dataclasses
import faulthandler
import sys

import torch
from calls import bits, run

import genai_kernels as gk
from genai_kernels.quantized import QuantizedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TAILS = range(1, 131)


class Guards:
    """The preloaded library."""

    def __init__(self, path, mode):
        self.library, self.mode = ctypes.CDLL(path), mode
        self.library.guard_allocate.restype = ctypes.c_void_p
        self.library.guard_allocate.argtypes = [ctypes.c_size_t, ctypes.c_int]
        self.library.free.argtypes = [ctypes.c_void_p]
        self.copies = []
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
        self.copies.append(address)
        memory = (ctypes.c_char * (elements * t.element_size())).from_address(address)
        flat = torch.frombuffer(memory, dtype=t.dtype)
        view = flat.as_strided(t.shape, [s * stride for s in t.contiguous().stride()])
        return view.copy_(t.detach()).requires_grad_(t.requires_grad)

    def free_copies(self):
        """No copy may be in use any more."""
        while self.copies:
            self.library.free(self.copies.pop())


def rows(n, dtype, stride):
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
    image = make(1, 6, n)
    yield "group", gk.group_norm_silu, (image, 2, make(6), make(6)), {"residual": make(1, 6, n), "activation": "gelu"}
    if stride == 1:  # other strides are read from a copy, in the other memory format

        def last(pixels, *args, **kwargs):
            return gk.group_norm_silu(pixels.transpose(1, 2), *args, **kwargs)

        yield "group last", last, (make(2, 2, n), 1, w, b), {"scale": make(2, n), "shift": make(2, n)}
    for function in (gk.silu_and_mul, gk.gelu_and_mul, gk.gelu_tanh_and_mul):
        yield function.__name__, function, (wide,), {}
    tokens, seeds = torch.randint(n, (5, 4)), torch.arange(5)
    yield "sample", gk.sample, (x.detach(),), {"top_p": 0.8, "seed": seeds, "return_logprobs": True}
    options = {"top_k": n // 2, "previous_tokens": tokens, "repetition_penalty": torch.rand(5) + 0.5, "seed": seeds}
    yield "sample top_k", gk.sample, (x.detach(),), options
    o = make(1, 3, 2, n), make(1, 3, 2, n)
    lse = torch.randn(1, 2, 3, requires_grad=True), torch.randn(1, 2, 3, requires_grad=True)
    yield "merge", gk.merge_attention_states, (o[0], lse[0], o[1], lse[1]), {}


def attention(n, dtype, stride):
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


def products(n, dtype, stride):
    """The linear layers, on 7 rows of n elements: adapters of all ranks, weights of few bits, gates."""
    rows, out, rank = 7, 5 * n % 29 + 1, 3 * n % 37 + 1

    def make(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    x, weight, bias, a, b = make(rows, n), make(2 * out, n), make(2 * out), make(rank, n), make(2 * out, rank)
    base = torch.randn(2 * out, n)
    few = (gk.quantize_int8(base, (None, 32)[n % 2]), gk.quantize_int4(base, 32), gk.quantize_nf4(base, 32))
    names = ("int8", "int4", "nf4")
    magnitude, norm = torch.rand(2 * out).requires_grad_(), torch.rand(2 * out) + 0.5
    other = gk.LoRAAdapter(make(n % 19, n), make(out, n % 19), 0.5, (out, 2 * out))
    adapters = [gk.LoRAAdapter(a, b, 2.0), other]
    ids = torch.randint(-1, 2, (rows,), dtype=torch.int32)
    dropout = {"dropout_p": 0.3, "seed": n} if n % 3 == 0 else {}
    yield "linear", gk.linear, (x, weight, bias), {}
    yield "lora", gk.lora_linear, (x, weight, a, b, 1.5, bias), dropout
    yield "lora on few bits", gk.lora_linear, (x, few[n % 3], a, b), dropout
    yield "multi", gk.lora_linear_multi, (x, weight, adapters, ids), dropout
    yield "dora", gk.dora_linear, (x, weight, a, b, magnitude, 1.5, bias), {"norm": norm}
    yield "norm", gk.dora_norm, (weight, a, b), {}
    yield "norm of few bits", gk.dora_norm, (few[(n + 1) % 3], a.float(), b.float()), {}
    yield "swiglu", gk.linear_swiglu, (x, weight, bias), {}
    yield "geglu", gk.linear_geglu, (x, weight, None, adapters, ids), {}
    for kind in names:  # an odd number of rows: backward takes them in pairs
        w = getattr(gk, f"quantize_{kind}")(base[1:])
        yield kind, getattr(gk, f"{kind}_linear"), (x, w, bias.detach()[1:]), {}
    yield "w8a8", gk.w8a8_linear, (x.detach(), gk.quantize_int8(base)), {}
    yield "loss", gk.fused_linear_cross_entropy, (x, weight, torch.randint(2 * out, (rows,)), bias), {}


def steps(n, dtype, stride):
    """A diffusion sampler's step and its neighbours, on samples of 3 channels of n pixels."""

    def make(*shape):
        return torch.randn(shape).to(dtype)

    seeds = torch.randint(2**62, (2,))
    x, cond, uncond, known = (make(2, 3, n) for _ in range(4))
    step = gk.StepCoefficients(1.3, -0.8, 1.0, x=0.9, x0=0.1, previous_x0=-0.1, noise=0.2, known_noise=0.5)
    guided = {"uncond": uncond, "guidance_scale": 3.0, "guidance_rescale": 0.5, "previous_x0": x + 1, "seed": seeds}
    yield "guided", gk.cfg_step, (x, cond, step), {**guided, "return_x0": True}
    in_fill = {"known": known, "mask": make(1, 3, n) > 0, "known_noise": known + 1, "noise": x + 2}
    yield "in-fill", gk.cfg_step, (x, cond, step), {**guided, **in_fill}
    yield "soft", gk.cfg_step, (x, cond, step), {**guided, **in_fill, "mask": make(2, 1, n).sigmoid()}
    mean, logvar = (make(2, n).requires_grad_() for _ in range(2))
    yield "latents", gk.gaussian_sample_kl, (mean, logvar), {"seed": seeds}
    yield "given", gk.gaussian_sample_kl, (mean, logvar), {"noise": make(2, n).requires_grad_()}
    times = torch.rand(3, requires_grad=True)
    yield "times", gk.timestep_embedding, (times, n), {"downscale_freq_shift": 0.0, "flip_sin_to_cos": n % 2 == 0}
    yield "normal", gk.seeded_normal, (seeds, (n,)), {"dtype": dtype}


def convolutions(n, dtype, stride):
    """Rows of n pixels; channels that run through 1 to 40 and 1 to 70 as n does."""
    c, out, height = 7 * n % 40 + 1, 11 * n % 70 + 1, n % 3 + 1

    def make(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    def block(x, skip, residual, weight, bias, w, b, scale, embedding):
        x, skip, residual = (t.permute(0, 3, 1, 2) for t in (x, skip, residual))
        norm = gk.GroupNormPrologue(1, w, b, activation="gelu", scale=scale)
        return gk.conv2d(
            x, weight, bias, padding=1, skip=skip, norm=norm, channel_bias=embedding, residual=residual
        )  # fmt: skip

    image, bias = make(2, c, height, n), make(out)
    weight, kwargs = make(out, c, 3, 3), {"padding": 1}
    yield "direct", gk.conv2d, (image, weight, bias), {**kwargs, "algorithm": "direct"}
    yield "winograd", gk.conv2d, (image, weight, bias), {**kwargs, "algorithm": "winograd"}
    if dtype == torch.float32:
        yield "winograd_f4", gk.conv2d, (image, weight, bias), {**kwargs, "algorithm": "winograd_f4"}
    yield "stats", gk.conv2d_stats, (image, 1), {}
    yield "stride", gk.conv2d, (image, make(out, c, 1, 2)), {"stride": 2, "padding": (1, 0, 0, 2)}
    yield "up", gk.up_conv2d, (image[:1, :, :, : n % 40 + 1].detach().requires_grad_(), weight, bias), {}
    if stride == 1:  # other strides are read from a copy, in the other memory format
        images = make(1, height, n, c), make(1, height, n, 5), make(1, height, n, out)
        parameters = make(out, c + 5, 3, 3), bias, make(c + 5), make(c + 5), make(1, c + 5), make(1, out)
        yield "block", block, (*images, *parameters), {}


def guarded(guards, stride, value):
    """A value of a call with all its tensors between guards."""
    if isinstance(value, torch.Tensor):
        return guards.copy(value, stride if value.is_floating_point() and value.dim() > 1 else 1)
    if isinstance(value, QuantizedWeight):
        return dataclasses.replace(value, **{name: guards.copy(t) for name, t in value.tensors().items()})
    if isinstance(value, gk.LoRAAdapter):
        return value._replace(
            lora_a=guarded(guards, stride, value.lora_a), lora_b=guarded(guards, stride, value.lora_b)
        )
    return [guarded(guards, stride, v) for v in value] if isinstance(value, list) else value


GROUPS = {"rows": rows, "attention": attention, "products": products, "steps": steps, "convolutions": convolutions}


def main():
    library, group, mode, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    faulthandler.enable()
    torch.set_num_threads(1)
    guards = Guards(library, mode)
    calls = 0
    for n in TAILS[::step]:
        for dtype in FLOATS:
            # of the larger groups one dtype each: with 130 tails all of them meet all the options
            if group != "rows" and dtype != FLOATS[n // 8 % 3]:
                continue
            stride = 3 if n % 5 == 0 else 1
            for name, function, args, kwargs in GROUPS[group](n, dtype, stride):
                print(f"{group} n={n} {dtype} stride={stride}: {name}", flush=True)
                expected = run(function, (args, kwargs))
                call = (
                    [guarded(guards, stride, value) for value in args],
                    {name: guarded(guards, stride, value) for name, value in kwargs.items()},
                )
                with guards:
                    found = run(function, call)
                for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                    assert a.shape == b.shape, f"result {i}: {a.shape}, expected {b.shape}"
                    assert torch.equal(bits(a), bits(b)), f"result {i} differs"
                calls += 1
                del call, found, a
                guards.free_copies()
    print(f"done: {calls} calls")


if __name__ == "__main__":
    main()
