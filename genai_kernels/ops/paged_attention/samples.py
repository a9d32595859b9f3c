"""Samples, benchmark cases, peers and the accuracy rule of paged_attention."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...registry import Accuracy, Make, Sample
from .reference import paged_attention_reference, pages_of


def paged(
    m: Make,
    lengths: list[int],
    queries: list[int] | int = 1,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    value_dim: int | None = None,
    block_size: int = 16,
    shared: int = 0,  # blocks that all sequences begin with
    int8: bool = False,
    csr: bool = False,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of paged_attention: sequences of these lengths in blocks that lie anywhere, `queries` new tokens each (one
    number: `[batch, tokens, ...]`, or without tokens if it is 1).
    """
    counts = [-(-n // block_size) for n in lengths]
    blocks = sum(counts) + 3
    order = torch.randperm(blocks, generator=m.generator).int()
    lists, used = [], shared
    for n in counts:
        lists.append(torch.cat([order[:shared], order[used : used + max(n - shared, 0)]])[:n])
        used += max(n - shared, 0)
    hnd = options.get("kv_layout") == "HND"
    inner = (kv_heads, block_size) if hnd else (block_size, kv_heads)
    if int8:
        shapes = [(blocks, *inner, d) for d in (dim, value_dim or dim)]
        caches = [m.ints(-127, 128, shape, torch.int8) for shape in shapes]
        options["k_scale"], options["v_scale"] = (m.float32(blocks, *inner, scale=0.01).abs() + 1e-3 for _ in range(2))
    else:
        caches = [m(blocks, *inner, d) for d in (dim, value_dim or dim)]
    if isinstance(queries, int):
        q = m(len(lengths), queries, heads, dim) if queries != 1 else m(len(lengths), heads, dim)
    else:
        q = m(sum(queries), heads, dim)
        options["cu_seqlens_q"] = torch.tensor([0, *queries]).cumsum(0).int()
    if csr:
        options["indptr"] = torch.tensor([0, *counts]).cumsum(0).int()
        options["indices"] = torch.cat(lists)
        options["last_page_len"] = torch.tensor([(n - 1) % block_size + 1 if n else 0 for n in lengths]).int()
        return (q, *caches), options
    table = torch.full((len(lengths), max(counts, default=0)), -1, dtype=torch.int32)
    for row, pages in zip(table, lists, strict=True):
        row[: len(pages)] = pages
    return (q, *caches, table, torch.tensor(lengths).int()), options


def tree(m: Make, *shape: int) -> torch.Tensor:
    """A token sees itself and some of those before it."""
    tokens, columns = shape
    return m.mask(tokens, columns, keep=0.6) | (torch.arange(tokens)[:, None] % columns == torch.arange(columns))


def _strided(m: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (q, *rest), options = paged(m, [40, 90], heads=8)
    return (q[:, ::2], *rest), options


def _slopes(heads: int) -> torch.Tensor:
    return torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)])


SAMPLES = [
    Sample("decode", lambda m: paged(m, [40, 1, 130], return_lse=True)),
    Sample("one_key", lambda m: paged(m, [1], heads=1, kv_heads=1, dim=1, block_size=1)),
    Sample("mha", lambda m: paged(m, [77, 50], heads=3, kv_heads=3, dim=24)),
    Sample("mqa", lambda m: paged(m, [300, 20], heads=7, kv_heads=1, dim=64)),
    Sample("wide_group", lambda m: paged(m, [70, 90], heads=24, kv_heads=2)),
    Sample("long", lambda m: paged(m, [1400, 513, 700, 512], heads=4, kv_heads=1, return_lse=True)),
    Sample("dense_chunk", lambda m: paged(m, [60, 45], 17, return_lse=True)),
    Sample("whole_prefill", lambda m: paged(m, [70, 33], [70, 33])),
    Sample("mixed", lambda m: paged(m, [1, 200, 90, 640, 30], [1, 130, 1, 2, 0], return_lse=True)),
    Sample("long_prefill", lambda m: paged(m, [1200, 3], [700, 3], heads=2, kv_heads=1, dim=16)),
    Sample("empty_sequence", lambda m: paged(m, [0, 35], [0, 4], return_lse=True)),
    Sample("no_sequence", lambda m: paged(m, [], [])),
    Sample("shared_prefix", lambda m: paged(m, [1100, 1300, 1100, 520], heads=4, kv_heads=2, shared=66, dim=16)),
    Sample("shared_small_blocks", lambda m: paged(m, [600, 601, 700], [2, 1, 5], shared=550, block_size=1, dim=16)),
    Sample("block_1", lambda m: paged(m, [37, 150], block_size=1)),
    Sample("block_7", lambda m: paged(m, [37, 150], [5, 1], block_size=7)),
    Sample("block_256", lambda m: paged(m, [37, 600], block_size=256)),
    Sample("heads_first", lambda m: paged(m, [37, 150], [5, 1], kv_layout="HND")),
    Sample("lists", lambda m: paged(m, [37, 150, 0, 16], [5, 1, 0, 1], csr=True, return_lse=True)),
    Sample("value_dim", lambda m: paged(m, [90, 33], dim=40, value_dim=72)),
    Sample("odd_dims", lambda m: paged(m, [90, 33], [3, 2], dim=33, value_dim=19)),
    Sample("head_dim_256", lambda m: paged(m, [140], heads=2, kv_heads=1, dim=256)),
    Sample("window", lambda m: paged(m, [300, 1000, 40], [3, 1, 40], window_size=(40, 0), return_lse=True)),
    Sample("window_one_key", lambda m: paged(m, [65, 30], window_size=(0, 0))),
    Sample("not_causal", lambda m: paged(m, [65, 30], [9, 4], causal=False)),
    Sample("window_right", lambda m: paged(m, [65, 30], [9, 14], causal=False, window_size=(20, 3))),
    Sample("scale", lambda m: paged(m, [65, 300], softmax_scale=0.7, return_lse=True)),
    Sample("scale_negative", lambda m: paged(m, [65, 300], [4, 1], softmax_scale=-0.2)),
    Sample("softcap", lambda m: paged(m, [65, 700], [4, 1], softcap=3.0, softmax_scale=1.0, return_lse=True)),
    Sample("alibi", lambda m: paged(m, [65, 700], [9, 1], alibi_slopes=_slopes(4))),
    Sample("alibi_per_sequence", lambda m: paged(m, [65, 70], alibi_slopes=m.float32(2, 4).abs())),
    Sample("sink", lambda m: paged(m, [65, 700], [9, 1], sink=m.float32(4), return_lse=True)),
    Sample("tree", lambda m: paged(m, [65, 700, 9], [8, 5, 9], tree_mask=tree(m, 22, 9), return_lse=True)),
    Sample("tree_window", lambda m: paged(m, [65, 700], [8, 5], tree_mask=tree(m, 13, 8), window_size=(90, 0))),
    Sample("int8", lambda m: paged(m, [40, 1, 700], [1, 1, 3], int8=True, return_lse=True)),
    Sample("int8_heads_first", lambda m: paged(m, [40, 130], 5, int8=True, kv_layout="HND", dim=40, softcap=5.0)),
    Sample("strided_q", _strided),
]  # fmt: skip


def _score_size(q, k_cache, k_scale=None, softmax_scale=None, **_):
    k = k_cache if k_scale is None else k_cache * k_scale.unsqueeze(-1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else abs(softmax_scale)
    return float(q.norm(dim=-1).amax() * k.norm(dim=-1).amax() * scale) if q.numel() and k.numel() else 0.0


def magnitude(q, k_cache, v_cache, *args, **options):
    """As flash_attention's: sum_j p_j |v_j|, in proportion to scores above 8; lse: |lse| + |score|."""
    size = _score_size(q, k_cache, options.get("k_scale"), options.get("softmax_scale"))
    given = {**options, "return_lse": True, "absolute_values": True}
    out, lse = paged_attention_reference(q, k_cache, v_cache, *args, **given)
    out = out * max(1.0, size / 8)
    return (out, lse.abs().clamp_max(1e30) + size) if options.get("return_lse") else (out,)


def _c_fp32(q, k_cache, v_cache, block_table=None, seq_lens=None, **options):
    lists = (options.get(name) for name in ("indptr", "indices", "last_page_len"))
    lengths = [n for _, n in pages_of(k_cache.shape[1], block_table, seq_lens, *lists)]
    return 8 + math.sqrt(max(lengths, default=0)) / 4


ACCURACY = Accuracy(c_fp32=_c_fp32)


# ---- benchmarks ----


def _decode(batch: int, context: int, *, heads: int = 32, kv_heads: int = 8, dim: int = 128, **options: Any) -> Sample:
    name = (
        f"b{batch}_n{context}"
        + ("_mha" if heads == kv_heads else "")
        + "".join(f"_{key}{value}" for key, value in options.items())
    )
    return Sample(
        name,
        lambda m: paged(m, [context] * batch, heads=heads, kv_heads=kv_heads, dim=dim, **options),
        bench=True,
        elements=2.0 * batch * context * kv_heads * dim,
        stream="read",
    )


SAMPLES += [_decode(batch, n) for batch, n in ((1, 512), (1, 4096), (1, 32768), (8, 2048), (16, 4096), (64, 512))]
SAMPLES += [_decode(4, 4096), _decode(4, 4096, heads=8)]
SAMPLES += [_decode(8, 2048, block_size=size) for size in (1, 64, 256)]


def _dense(cache, table, tokens):
    return cache[table.long()].flatten(1, 2)[:, :tokens]


def gather_sdpa(q, k_cache, v_cache, block_table, seq_lens):
    """What a user without a paged kernel does: the pages gathered, then PyTorch's attention."""
    k, v = (_dense(c, block_table, int(seq_lens[0])).transpose(1, 2) for c in (k_cache, v_cache))
    out = torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)
    return out.squeeze(2)


_contiguous: dict[Any, Any] = {}


def contiguous_sdpa(q, k_cache, v_cache, block_table, seq_lens):
    """PyTorch's attention over a cache that was never paged: the gathering is not in its time."""
    key = (k_cache.data_ptr(), block_table.data_ptr())
    if key not in _contiguous:
        _contiguous.clear()
        _contiguous[key] = [_dense(c, block_table, int(seq_lens[0])).transpose(1, 2) for c in (k_cache, v_cache)]
    k, v = _contiguous[key]
    out = torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)
    return out.squeeze(2)


PEERS = {"gather + sdpa": gather_sdpa, "contiguous sdpa": contiguous_sdpa}
