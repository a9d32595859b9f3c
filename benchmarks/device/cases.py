"""What is timed on a GPU, the most important first, and against whom.

Shapes of attention are those of the published curves of flash attention: batch * tokens = 16384, heads * head_dim =
2048.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

import genai_kernels as gk

from .case import Case, Function, Tensors
from .diffusion_cases import convolution, group_norm, sampler_step, upsampled
from .layers import adapters_by_row, dora_layer, few_bits, gated_layer, language_loss, linear_layer

# ---- attention ----


def _heads_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2)


def _sdpa(backend: str | None, causal: bool) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = map(_heads_first, (q, k, v))
        attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=causal)
        if backend is None:
            return _heads_first(attend())
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _heads_first(attend())

    return run


def _flex(causal: bool, window: int | None) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[Any, Any] = {}

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = j <= i
        return seen if window is None else seen & (j > i - window)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads_first(t).contiguous() for t in (q, k, v))
        n = q.shape[2]
        if causal and n not in masks:
            masks[n] = create_block_mask(visible, None, None, n, n, device=q.device.type)
        return _heads_first(compiled(q, k, v, block_mask=masks.get(n)))

    return run


def _windowed_reference(window: int) -> Function:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i = torch.arange(q.shape[1], device=q.device)
        mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)
        q, k, v = map(_heads_first, (q, k, v))
        return _heads_first(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    return run


def attention(
    tokens: int, head_dim: int, causal: bool, backward: bool = False, window: int | None = None, scale: int = 1
) -> Case:
    batch, heads = max(16384 // tokens // scale, 1), max(2048 // head_dim // scale, 1)
    pairs = tokens * (tokens + 1) / 2 if causal else tokens**2
    options: dict[str, Any] = {"causal": causal}
    peers: dict[str, Function] = {
        "sdpa cudnn": _sdpa("CUDNN_ATTENTION", causal),
        "sdpa flash": _sdpa("FLASH_ATTENTION", causal),
        "flex": _flex(causal, window),
    }
    reference, name = _sdpa(None, causal), f"d{head_dim} n{tokens} {'causal' if causal else 'full'}"
    if window is not None:
        pairs = window * tokens - window * (window - 1) / 2
        options, name = {"window_size": (window - 1, 0)}, f"d{head_dim} n{tokens} window {window}"
        peers, reference = {"flex": peers["flex"]}, _windowed_reference(window)

    def make(device: str, dtype: torch.dtype) -> Tensors:
        return tuple(torch.randn(batch, tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3))

    flops = 4 * batch * heads * head_dim * pairs
    return Case(
        "flash_attention", name, make, functools.partial(gk.flash_attention, **options), peers, reference, backward,
        flops=flops * (2.5 if backward else 1),
    )  # fmt: skip


# ---- ops that memory limits ----


def _liger(name: str) -> dict[str, Function]:
    """Liger's function of the same meaning, where Liger is installed."""
    if not importlib.util.find_spec("liger_kernel"):
        return {}
    from liger_kernel.ops import layer_norm, rms_norm, swiglu

    def gated(x: torch.Tensor) -> torch.Tensor:
        return swiglu.LigerSiLUMulFunction.apply(*(t.contiguous() for t in x.chunk(2, -1)))

    table: dict[str, Function] = {
        "rms_norm": lambda x, w: rms_norm.LigerRMSNormFunction.apply(x, w, 1e-6),
        "layer_norm": lambda x, w, b: layer_norm.LigerLayerNormFunction.apply(x, w, b, 1e-5),
        "silu_and_mul": gated,
    }
    return {"liger": table[name]} if name in table else {}


def rows(op: str, shape: tuple[int, int], backward: bool = False) -> Case:
    from genai_kernels.registry import OPS

    count, n = shape
    half = op.endswith("_and_mul")
    parameters = {"rms_norm": 1, "layer_norm": 2, "fused_add_rms_norm": 1}.get(op, 0)
    inputs = 2 if op == "fused_add_rms_norm" else 1

    def make(device: str, dtype: torch.dtype) -> Tensors:
        wide = torch.randn(inputs, count, n * (2 if half else 1), device=device, dtype=dtype).unbind(0)
        return (*wide, *(torch.randn(n, device=device, dtype=dtype) for _ in range(parameters)))

    elements = count * n * ((5 if backward else 3) if half else (3 if backward else 2) * inputs)
    if op == "fused_add_rms_norm" and backward:
        elements = 4 * count * n  # dy, the gradient of the sum, the sum; dx
    reference = OPS[op].reference
    peers = {"compiled": torch.compile(reference, dynamic=False), "eager": reference, **_liger(op)}
    name = f"{count}x{n}"
    return Case(op, name, make, getattr(gk, op), peers, reference, backward, elements=elements)


def rotary(tokens: int, heads: int, head_dim: int) -> Case:
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        angle = torch.randn(tokens, head_dim // 2, device=device)
        return (torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype), angle.cos(), angle.sin())

    reference = OPS["rotary_embedding"].reference
    peers = {"compiled": torch.compile(reference, dynamic=False), "eager": reference}
    name = f"{tokens}x{heads}x{head_dim}"
    return Case(
        "rotary_embedding", name, make, gk.rotary_embedding, peers, reference,
        elements=2 * tokens * heads * head_dim,
    )  # fmt: skip


# ---- a paged cache ----

PAGE = 16  # tokens of a block


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lens: torch.Tensor) -> Any:
    """The pages gathered, then PyTorch's attention: what a user without a paged kernel does. All lengths are alike."""
    k, v = (cache[table.long()].flatten(1, 2).transpose(1, 2) for cache in (k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)


def _exact_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lens: torch.Tensor) -> Any:
    """The same in products of whole groups: PyTorch's attention on float32 would copy each key for every query head."""
    k, v = (cache[table.long()].flatten(1, 2).transpose(1, 2) for cache in (k, v))
    rows = q.unflatten(1, (k.shape[1], -1))
    return (((rows @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v).flatten(1, 2)


def _flashinfer() -> dict[str, Function]:
    """FlashInfer's decode over pages, where it is installed. It plans for lengths once, outside of the time."""
    if not importlib.util.find_spec("flashinfer"):
        return {}
    import flashinfer

    plans: dict[Any, Any] = {}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        if table.data_ptr() not in plans:
            batch, width = table.shape
            workspace = torch.empty(2**27, dtype=torch.uint8, device=q.device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * width
            last = (lens - 1) % PAGE + 1
            sizes = (q.shape[1], k.shape[2], q.shape[2], PAGE)
            wrapper.plan(indptr, table.flatten(), last, *sizes, q_data_type=q.dtype, kv_data_type=k.dtype)
            plans[table.data_ptr()] = wrapper
        return plans[table.data_ptr()].run(q, (k, v))

    return {"flashinfer": run}


def paged_decode(batch: int, context: int, kv_heads: int = 8, group: int = 8, head_dim: int = 128) -> Case:
    """One new token for each sequence, whose blocks lie anywhere."""
    width = context // PAGE

    def make(device: str, dtype: torch.dtype) -> Tensors:
        blocks = batch * width
        q = torch.randn(batch, kv_heads * group, head_dim, device=device, dtype=dtype)
        k, v = (torch.randn(blocks, PAGE, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
        table = torch.randperm(blocks, device=device).int().view(batch, width)
        return q, k, v, table, torch.full((batch,), context, dtype=torch.int32, device=device)

    peers: dict[str, Function] = {"gather + sdpa": _gathered, **_flashinfer()}
    elements = 2.0 * batch * context * kv_heads * head_dim
    return Case(
        "paged_attention", f"b{batch} n{context}", make, gk.paged_attention, peers, _exact_decode, elements=elements
    )


def append(tokens: int, kv_heads: int = 8, head_dim: int = 128) -> Case:
    """Rotated keys, and values, of new tokens to slots anywhere."""
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        blocks = 2 * tokens // PAGE + 1
        k, v = torch.randn(2, tokens, kv_heads, head_dim, device=device, dtype=dtype).unbind(0)
        caches = torch.zeros(2, blocks, PAGE, kv_heads, head_dim, device=device, dtype=dtype).unbind(0)
        slots = torch.randperm(blocks * PAGE, device=device)[:tokens]
        angle = torch.randn(tokens, head_dim // 2, device=device)
        return k, v, *caches, slots, angle.cos(), angle.sin()

    def with_tables(function: Function) -> Function:
        return lambda k, v, k_cache, v_cache, slots, cos, sin: function(k, v, k_cache, v_cache, slots, cos=cos, sin=sin)

    def plain(
        k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
        cos: torch.Tensor, sin: torch.Tensor,
    ) -> Tensors:  # fmt: skip
        """Every slot is one of the cache's: nothing waits for the device."""
        slots = slots.long()
        at = slots // PAGE, slots % PAGE
        k_cache[at] = OPS["rotary_embedding"].reference(k, cos, sin)
        v_cache[at] = v
        return k_cache, v_cache

    ours, peers = with_tables(gk.append_kv_cache), {"eager": plain}
    name = f"{tokens}x{kv_heads}x{head_dim}"
    return Case("append_kv_cache", name, make, ours, peers, plain, elements=4.0 * tokens * kv_heads * head_dim)


# ---- the next token ----


def next_token(batch: int, vocab: int) -> Case:
    """Top-k and top-p. Eager is the sort: another random generator would draw other tokens."""
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        return (3 * torch.randn(batch, vocab, device=device, dtype=dtype), torch.arange(batch, device=device))

    def drawing(function: Function) -> Function:
        return lambda x, offset: function(x, temperature=0.8, top_k=50, top_p=0.9, seed=5, offset=offset)

    reference = drawing(OPS["sample"].reference)
    name = f"{batch}x{vocab}"
    return Case(
        "sample", name, make, drawing(gk.sample), {"eager": reference}, reference, elements=float(batch * vocab)
    )


def cases(dry: bool = False) -> Iterator[Case]:
    """In order of importance: a run whose time ends has what matters."""
    if dry:
        yield attention(64, 32, True, scale=64)
        yield attention(64, 32, False, backward=True, scale=64)
        yield rows("rms_norm", (8, 64))
        yield rows("silu_and_mul", (8, 64), backward=True)
        yield paged_decode(2, 64, kv_heads=1, group=2, head_dim=16)
        yield append(9, kv_heads=2, head_dim=16)
        yield next_token(2, 300)
        yield linear_layer(9, 40, 24)
        yield linear_layer(9, 40, 24, rank=4)
        yield linear_layer(9, 40, 24, rank=4, backward=True)
        yield dora_layer(9, 40, 24, rank=4, backward=True)
        yield gated_layer(9, 40, 24)
        yield adapters_by_row(9, 40, 24, 3, rank=4)
        yield few_bits("nf4", 9, 64, 24)
        yield language_loss(9, 40, 64)
        yield group_norm(1, 64, 4, last=True)
        yield group_norm(1, 32, 4, backward=True)
        yield sampler_step(2, 5)
        yield convolution(1, 32, 4, norm=True, backward=True)
        yield upsampled(1, 16, 4)
        return
    for causal in (False, True):
        yield attention(8192, 128, causal)
        yield attention(8192, 128, causal, backward=True)
    yield paged_decode(32, 8192)  # 1 GiB of keys and values
    yield rows("rms_norm", (16384, 4096))
    yield rows("silu_and_mul", (16384, 11008))
    for batch, context in ((64, 4096), (16, 16384), (64, 16384)):
        yield paged_decode(batch, context)
    yield append(16384)
    yield next_token(64, 128000)
    for count in (8192, 16):
        yield linear_layer(count, 4096, 4096)
        yield linear_layer(count, 4096, 4096, rank=16)
    yield linear_layer(8192, 4096, 4096, rank=16, backward=True)
    for backward in (False, True):
        yield dora_layer(8192, 4096, 4096, backward=backward)
        yield gated_layer(8192, 4096, 14336, backward)
    yield gated_layer(16, 4096, 14336)
    yield adapters_by_row(64, 4096, 4096, 64)
    yield language_loss(8192, 4096, 128256)
    for kind in ("nf4", "int8", "int4"):
        yield few_bits(kind, 16, 4096, 4096)
    for last in (False, True):
        yield group_norm(16, 320, 64, last)
        yield group_norm(16, 320, 64, last, backward=True)
    yield sampler_step(512, 128)
    for norm in (False, True):
        yield convolution(16, 320, 64, norm)
    yield convolution(16, 320, 64, norm=True, backward=True)
    yield convolution(16, 1280, 16, norm=True)
    yield convolution(16, 320, 64, last=False)
    yield upsampled(16, 640, 32)
    yield upsampled(16, 640, 32, backward=True)
    for head_dim in (64, 256):
        for causal in (False, True):
            yield attention(8192, head_dim, causal)
    yield rows("rms_norm", (16384, 4096), backward=True)
    yield rows("fused_add_rms_norm", (16384, 4096))
    yield rows("layer_norm", (16384, 4096))
    yield rotary(16384, 32, 128)
    yield attention(16384, 128, True, window=4096)
    for tokens in (512, 1024, 2048, 4096, 16384):
        for causal in (False, True):
            yield attention(tokens, 128, causal)
    for tokens in (1024, 2048, 4096):
        for causal in (False, True):
            yield attention(tokens, 128, causal, backward=True)
    for causal in (False, True):
        yield attention(8192, 64, causal, backward=True)
    yield rows("silu_and_mul", (16384, 11008), backward=True)
    yield rows("fused_add_rms_norm", (16384, 4096), backward=True)
    yield rows("layer_norm", (16384, 4096), backward=True)
    yield rows("gelu_tanh_and_mul", (16384, 11008))
    yield rows("rms_norm", (512, 4096))
