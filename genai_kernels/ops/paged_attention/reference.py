"""paged_attention in plain PyTorch: each sequence's pages are gathered, and attended to by themselves."""

from __future__ import annotations

import itertools

import torch

from ...registry import OPS


def pages_of(block_size: int, block_table, seq_lens, indptr, indices, last_page_len) -> list[tuple[torch.Tensor, int]]:
    """Of each sequence: its blocks, and how many tokens lie in them."""
    if block_table is not None:
        lengths = seq_lens.tolist()
        return [(block_table[b, : -(-n // block_size)], n) for b, n in enumerate(lengths)]
    bounds = indptr.tolist()
    lists = [indices[begin:end] for begin, end in itertools.pairwise(bounds)]
    return [(p, max(len(p) - 1, 0) * block_size + n) for p, n in zip(lists, last_page_len.tolist(), strict=True)]


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    indptr: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    last_page_len: torch.Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    kv_layout: str = "NHD",
    return_lse: bool = False,
    absolute_values: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `genai_kernels.paged_attention`. `absolute_values`: of V, for a bound of the error."""
    if kv_layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        k_scale, v_scale = (None if s is None else s.transpose(1, 2) for s in (k_scale, v_scale))
    heads, value_dim = q.shape[-2], v_cache.shape[-1]
    rows = q.reshape(-1, *q.shape[-2:])
    sequences = pages_of(k_cache.shape[1], block_table, seq_lens, indptr, indices, last_page_len)
    if cu_seqlens_q is None:
        step = q.shape[1] if q.dim() == 4 else 1
        bounds = list(range(0, step * len(sequences) + 1, step)) if step else [0] * (len(sequences) + 1)
    else:
        bounds = cu_seqlens_q.tolist()

    def gathered(cache, scale, pages, tokens, first):
        """[1, tokens, kv_heads, dim]: zeros before `first`, where the blocks may be another's by now."""
        block_size = cache.shape[1]
        skipped = first // block_size
        index = pages[skipped:].long()
        found = cache[index].flatten(0, 1).to(q.dtype)
        if scale is not None:
            found = found * scale[index].flatten(0, 1).unsqueeze(-1).to(q.dtype)
        before = found.new_zeros(skipped * block_size, *found.shape[1:])
        found = torch.cat([before, found])[:tokens]
        return torch.cat([torch.zeros_like(found[:first]), found[first:]])[None]

    outs, lses = [rows.new_zeros(0, heads, value_dim)], [rows.new_zeros(heads, 0, dtype=torch.float32)]
    for b, (pages, tokens) in enumerate(sequences):
        queries = bounds[b + 1] - bounds[b]
        first = max(0, tokens - queries - window_size[0]) if window_size[0] >= 0 else 0
        k = gathered(k_cache, k_scale, pages, tokens, first)
        v = gathered(v_cache, v_scale, pages, tokens, first)
        mask = None
        if tree_mask is not None:
            new = tree_mask[bounds[b] : bounds[b + 1], :queries]
            mask = torch.cat([new.new_ones(queries, tokens - queries), new], dim=1)[None, None]
        out, lse = OPS["flash_attention"].reference(
            rows[None, bounds[b] : bounds[b + 1]],
            k,
            v.abs() if absolute_values else v,
            causal=causal,
            window_size=window_size,
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes,
            attn_mask=mask,
            sink=sink,
            return_lse=True,
        )
        outs.append(out[0])
        lses.append(lse[0].to(torch.promote_types(lse.dtype, torch.float32)))
    out = torch.cat(outs).view(*q.shape[:-1], value_dim)
    return (out, torch.cat(lses, dim=1)) if return_lse else out
