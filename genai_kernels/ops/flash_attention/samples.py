"""Samples, benchmark cases, peers and the accuracy rule of flash_attention."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...registry import Accuracy, Make, Sample
from .path import path
from .peers import PEERS, parts
from .reference import flash_attention_reference, flash_attention_varlen_reference


def qkv(m: Make, b=2, tq=40, tk=None, h=2, hk=None, d=16, dv=None, **options: Any):
    """A call of flash_attention with random inputs of these sizes."""
    tk, hk, dv = tk or tq, hk or h, dv or d
    return (m(b, tq, h, d), m(b, tk, hk, d), m(b, tk, hk, dv)), options


def heads_first(m: Make, **sizes: Any):
    """The same with q, k, v as transposes of [batch, heads, tokens, dim] tensors."""
    (q, k, v), options = qkv(m, **sizes)
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), options


def packed(m: Make, lengths_q: list[int], lengths_k: list[int], h=2, hk=2, d=16, tail=0, **options: Any):
    """A call of flash_attention_varlen."""
    q, k, v = m(sum(lengths_q) + tail, h, d), m(sum(lengths_k), hk, d), m(sum(lengths_k), hk, d)
    cu = [torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
          for lengths in (lengths_q, lengths_k)]  # fmt: skip
    return (q, k, v, *cu), options


def slopes(heads: int) -> torch.Tensor:
    return torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)])


def _no_key_for_some(m: Make) -> torch.Tensor:
    mask = m.mask(2, 1, 40, 40)
    mask[0, :, 5] = False
    mask[:, :, 39] = False
    return mask


DENSE = [
    Sample("plain", lambda m: qkv(m)),
    Sample("causal", lambda m: qkv(m, tq=70, causal=True, return_lse=True)),
    Sample("longer_keys", lambda m: qkv(m, tq=17, tk=150, causal=True, return_lse=True)),
    Sample("longer_queries", lambda m: qkv(m, tq=50, tk=20, causal=True, return_lse=True)),
    Sample("one_query", lambda m: qkv(m, tq=1, tk=300, h=4, d=64, causal=True)),
    Sample("one_by_one", lambda m: qkv(m, b=1, tq=1, tk=1, h=1, d=1)),
    Sample("gqa", lambda m: qkv(m, tq=33, h=6, hk=2, d=32, causal=True, return_lse=True)),
    Sample("mqa", lambda m: qkv(m, tq=45, h=5, hk=1, d=24)),
    Sample("value_dim", lambda m: qkv(m, d=40, dv=72, causal=True)),
    Sample("odd_dims", lambda m: qkv(m, tq=37, d=33, dv=19)),
    Sample("head_dim_1", lambda m: qkv(m, d=1, dv=3)),
    Sample("head_dim_300", lambda m: qkv(m, b=1, tq=30, h=1, d=300)),
    Sample("head_dim_128", lambda m: qkv(m, b=1, tq=200, h=2, d=128, causal=True)),
    Sample("head_dim_40", lambda m: qkv(m, b=1, tq=70, tk=77, h=2, d=40, return_lse=True)),
    Sample("head_dim_80", lambda m: qkv(m, b=1, tq=150, h=2, d=80)),
    Sample("head_dim_160", lambda m: qkv(m, b=1, tq=64, h=2, d=160)),
    Sample("head_dim_512", lambda m: qkv(m, b=1, tq=140, h=1, d=512)),
    Sample("several_tiles", lambda m: qkv(m, b=1, tq=300, tk=517, h=3, hk=1, d=64, return_lse=True)),
    Sample("window", lambda m: qkv(m, b=1, tq=300, d=32, window_size=(40, 0), return_lse=True)),
    Sample("window_two_sided", lambda m: qkv(m, b=1, tq=280, tk=310, h=4, hk=2, window_size=(20, 33))),
    Sample("window_right_only", lambda m: qkv(m, tq=90, window_size=(-1, 7), return_lse=True)),
    Sample("window_empty_rows", lambda m: qkv(m, tq=60, tk=20, window_size=(3, 0), return_lse=True)),
    Sample("window_one_key", lambda m: qkv(m, tq=64, window_size=(0, 0))),
    Sample("scale", lambda m: qkv(m, softmax_scale=0.7)),
    Sample("scale_zero", lambda m: qkv(m, softmax_scale=0.0, causal=True)),
    Sample("scale_negative", lambda m: qkv(m, softmax_scale=-0.3, return_lse=True)),
    Sample("large_scores", lambda m: qkv(m, tq=64, softmax_scale=6.0, causal=True, return_lse=True)),
    Sample("softcap", lambda m: qkv(m, tq=50, softcap=3.0, softmax_scale=1.0, causal=True)),
    Sample("alibi", lambda m: qkv(m, tq=60, tk=75, h=4, alibi_slopes=slopes(4), causal=True),
           frozen=("alibi_slopes",)),
    Sample("alibi_per_batch", lambda m: qkv(m, h=4, alibi_slopes=m.float32(2, 4).abs(), return_lse=True),
           frozen=("alibi_slopes",)),
    Sample("bias", lambda m: qkv(m, tq=50, tk=140, attn_bias=m(2, 2, 50, 140), return_lse=True)),
    Sample("bias_over_batch", lambda m: qkv(m, h=4, hk=2, attn_bias=m(1, 4, 40, 40), causal=True)),
    Sample("bias_over_heads", lambda m: qkv(m, attn_bias=m(2, 1, 40, 40))),
    Sample("bias_per_key", lambda m: qkv(m, attn_bias=m(2, 1, 1, 40))),
    # what is the same for all keys of a row changes its lse alone
    Sample("bias_per_query", lambda m: qkv(m, attn_bias=m(1, 2, 40, 1), softcap=5.0, return_lse=True)),
    Sample("bias_float32", lambda m: qkv(m, attn_bias=m.float32(1, 1, 40, 40))),
    Sample("mask", lambda m: qkv(m, attn_mask=m.mask(2, 2, 40, 40), return_lse=True)),
    Sample("mask_padding", lambda m: qkv(m, attn_mask=m.mask(2, 1, 1, 40), causal=True)),
    Sample("mask_empty_rows", lambda m: qkv(m, attn_mask=_no_key_for_some(m), return_lse=True)),
    Sample("sink", lambda m: qkv(m, h=4, hk=2, sink=m.float32(4), causal=True, return_lse=True)),
    Sample("sink_empty_rows", lambda m: qkv(m, tq=50, tk=20, sink=m.float32(2), causal=True, return_lse=True)),
    Sample("dropout", lambda m: qkv(m, tq=50, tk=67, h=4, hk=2, dropout_p=0.2, seed=1234567890123, offset=5)),
    Sample("dropout_causal", lambda m: qkv(m, tq=140, dropout_p=0.5, seed=7, causal=True, return_lse=True)),
    Sample("everything", lambda m: qkv(
        m, tq=70, tk=150, h=4, hk=2, d=24, dv=40, window_size=(60, 20), softcap=4.0, alibi_slopes=slopes(4),
        attn_bias=m(2, 4, 70, 150), attn_mask=m.mask(1, 1, 70, 150), sink=m.float32(4), dropout_p=0.1, seed=3,
        return_lse=True), frozen=("alibi_slopes",)),
    Sample("heads_first", lambda m: heads_first(m, tq=55, d=32, causal=True)),
    Sample("no_keys", lambda m: ((m(2, 3, 2, 8), m(2, 0, 2, 8), m(2, 0, 2, 8)), {"return_lse": True})),
    Sample("no_queries", lambda m: ((m(2, 0, 2, 8), m(2, 5, 2, 8), m(2, 5, 2, 8)), {})),
    Sample("no_batch", lambda m: ((m(0, 4, 2, 8), m(0, 5, 2, 8), m(0, 5, 2, 8)), {})),
]  # fmt: skip

VARLEN = [
    Sample("plain", lambda m: packed(m, [5, 60, 1, 33], [5, 60, 1, 33], causal=True, return_lse=True)),
    Sample("different", lambda m: packed(m, [3, 50, 20], [40, 7, 130], h=4, causal=True, return_lse=True)),
    Sample("empty_sequences", lambda m: packed(m, [0, 9, 4, 0], [5, 0, 30, 0], return_lse=True)),
    Sample("tail", lambda m: packed(m, [6, 7], [6, 7], tail=3, return_lse=True)),
    Sample("window", lambda m: packed(m, [90, 150], [90, 150], window_size=(30, 0))),
    Sample("options", lambda m: packed(
        m, [20, 31], [25, 31], h=4, softcap=3.0, alibi_slopes=slopes(4), attn_bias=m(1, 4, 31, 31),
        attn_mask=m.mask(2, 1, 1, 31), sink=m.float32(4), dropout_p=0.3, seed=11, return_lse=True),
        frozen=("alibi_slopes",)),
]  # fmt: skip


def _score_size(q, k, softmax_scale=None, softcap=0.0, attn_bias=None, alibi_slopes=None, **other) -> float:
    """An upper bound of |score|: rounding a score of size s perturbs its probability by s unit roundoffs."""
    if q.numel() == 0 or k.numel() == 0:
        return 0.0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else abs(softmax_scale)
    size = scale * (q.norm(dim=-1).amax() * k.norm(dim=-1).amax()).item()
    size = min(size, softcap) if softcap else size
    size += 0 if attn_bias is None else attn_bias.abs().amax().item()
    return size + (0 if alibi_slopes is None else alibi_slopes.abs().amax().item() * max(q.shape[-3], k.shape[-3]))


def _magnitude(q, k, v, **options):
    """out: sum_j p_j |v_j|, for scores up to 8 (what c = 8 allows for), in proportion for larger ones; lse: |score|."""
    size = _score_size(q, k, **options)
    out, lse = flash_attention_reference(q, k, v.abs(), **{**options, "return_lse": True})  # type: ignore[misc]
    out = out * max(1.0, size / 8)
    return (out, lse.abs().clamp_max(1e30) + size) if options.get("return_lse") else (out,)


def _magnitude_varlen(q, k, v, cu_q, cu_k, **options):
    out = flash_attention_varlen_reference(q, k, v.abs(), cu_q, cu_k, **{**options, "return_lse": False})
    assert isinstance(out, torch.Tensor)
    return (out * max(1.0, _score_size(q, k, **options) / 8),)


def _c_fp32(q, k, *args, **options):
    return 8 + math.sqrt(k.shape[-3]) / 4


def _image_bench(queries: int, keys: int, heads: int, d: int) -> Sample:
    """Of Stable Diffusion's layers: an image to itself or to a prompt of 77 tokens."""
    flops = 4.0 * heads * d * queries * keys
    return Sample(f"q{queries}_k{keys}_h{heads}_d{d}", lambda m: qkv(m, b=1, tq=queries, tk=keys, h=heads, d=d),
                  bench=True, flops=flops, backward_flops=2.5 * flops, peers=("eager", "sdpa"))  # fmt: skip


def _bench(n: int, d: int, causal: bool, heads: int = 4, window: int | None = None) -> Sample:
    pairs = n * (n + 1) / 2 if causal else n * n
    name = f"n{n}_d{d}" + ("_causal" if causal else "")
    options: dict[str, Any] = {"causal": causal}
    if window is not None:
        pairs = window * n - window * (window - 1) / 2
        name, options = f"n{n}_d{d}_window{window}", {"window_size": (window - 1, 0)}
    flops = 4.0 * heads * d * pairs
    peers = None if window is not None else ("eager", "sdpa", "flex_attention")
    return Sample(name, lambda m: heads_first(m, b=1, tq=n, h=heads, d=d, **options), bench=True, flops=flops,
                  backward_flops=2.5 * flops, peers=peers)  # fmt: skip


DENSE += [_bench(n, d, causal) for d in (64, 128) for n in (512, 2048, 8192) for causal in (False, True)]
DENSE += [_image_bench(*sizes) for sizes in ((4096, 4096, 8, 40), (1024, 1024, 8, 80), (256, 256, 8, 160),
                                             (4096, 77, 8, 40), (4096, 4096, 1, 512))]  # fmt: skip
DENSE += [_bench(n, 64, False, window=w) for n in (4096, 8192, 16384) for w in (256, 512, 1024)]

_ACCURACY = Accuracy(forward=(1.0, 1.0), backward=(1.5, 1.1), c_low=4.0, c_fp32=_c_fp32)
DECLARED: dict[str, Any] = {
    "accuracy": _ACCURACY,
    "magnitude": _magnitude,
    "peers": PEERS,
    "parts": parts,
    "overloads": ("flash_attention", "flash_attention_bwd"),
    "path": path,
}
DECLARED_VARLEN: dict[str, Any] = {
    "accuracy": _ACCURACY,
    "magnitude": _magnitude_varlen,
    "overloads": ("flash_attention", "flash_attention_bwd"),
    "path": path,
}
