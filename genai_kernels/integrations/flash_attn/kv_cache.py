"""flash_attn_with_kvcache: appends to a contiguous cache, rotates, and attends over it without copying it."""

from __future__ import annotations

import torch

from genai_kernels.ops.flash_attention import flash_attention, flash_attention_varlen
from genai_kernels.ops.rotary_embedding import rotary_embedding

_NAME = "genai_kernels.integrations.flash_attn.flash_attn_with_kvcache"


def refuse_block_table(function: str, block_table: torch.Tensor | None) -> None:
    if block_table is not None:
        raise NotImplementedError(
            f"genai_kernels.integrations.flash_attn.{function}: block_table: expected None, got a tensor: paged caches "
            f"need genai_kernels.paged_attention, which is not part of this version; pass a contiguous cache"
        )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Writes k and v into the caches at `cache_seqlens`, then attends over what they hold. No gradients.

    Args:
        q: `[batch, queries, heads, head_dim]`.
        k_cache: `[cache_batch, capacity, kv_heads, head_dim]`; v_cache alike, with its own last dimension.
        k, v: `[batch, new, kv_heads, dim]`, both or neither; written to the caches in place.
        rotary_cos, rotary_sin: `[positions, rotary_dim / 2]`: rotate the first `rotary_dim` elements of k at the
            positions it is written to, and of q at the same ones if the attention is causal or local, otherwise all of
            q at position `cache_seqlens`. Need k and v.
        cache_seqlens: how many tokens a cache holds before the call (left padding included): one int or int32
            `[batch]`; None for full caches, where no k is given.
        cache_batch_idx: int32 `[batch]`: which cache each sequence uses; default `0, 1, ...`. Distinct where k is
            given.
        cache_leftpad: int32 `[batch]`: tokens at the beginning of a cache that are not attended to.
        block_table: None; paged caches are not implemented.
        rotary_interleaved: rotate elements 0 and 1, 2 and 3, ...; otherwise element i with i + rotary_dim / 2.
        num_splits: accepted; the result does not depend on it.
        return_softmax_lse: also return the lse.
        The others are those of `flash_attn_func`; `keys` of the masks is what a cache holds after the write.

    Returns:
        `[batch, queries, heads, value_dim]`; with `return_softmax_lse` also lse `[batch, heads, queries]`, float32.

    Raises:
        ValueError: shapes and lengths that do not fit, a full cache. IndexError: an entry of cache_batch_idx or a
        position of the rotary tables out of range.
        TypeError: dtypes that do not fit. NotImplementedError: a block_table. The caches are unchanged after any error.

    >>> import torch
    >>> import genai_kernels.integrations.flash_attn as flash_attn
    >>> k_cache, v_cache = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
    >>> q, k, v = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 5.0)
    >>> flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=0)
    tensor([[[[5., 5.]]]])
    >>> v_cache[0, :, 0, 0]
    tensor([5., 0., 0., 0.])
    """
    refuse_block_table("flash_attn_with_kvcache", block_table)
    with torch.no_grad():
        rows, begin, held = _places(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad)
        left, right = (max(w, -1) for w in window_size)
        options = {
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": (left, right),
            "softcap": max(softcap, 0.0),
            "alibi_slopes": alibi_slopes,
        }
        if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
            raise ValueError(f"{_NAME}: rotary_cos: expected rotary_cos, rotary_sin, k and v together, or no rotary_*")
        positions = held[:, None] + torch.arange(0 if k is None else k.shape[1], device=q.device)
        if rotary_cos is not None and rotary_sin is not None and k is not None:
            of_q = held[:, None] + torch.arange(q.shape[1], device=q.device) * int(causal or max(left, right) >= 0)
            k = rotary_embedding(k, rotary_cos, rotary_sin, positions, interleaved=rotary_interleaved)
            q = rotary_embedding(q, rotary_cos, rotary_sin, of_q, interleaved=rotary_interleaved)
        if k is None or v is None:
            out, lse = _attend(q, k_cache, v_cache, rows, begin, held, options)
        else:
            slots = (rows[:, None], positions)
            before = k_cache[slots], v_cache[slots]
            k_cache[slots], v_cache[slots] = k, v
            try:
                out, lse = _attend(q, k_cache, v_cache, rows, begin, held + k.shape[1], options)
            except BaseException:
                k_cache[slots], v_cache[slots] = before
                raise
    return (out, lse) if return_softmax_lse else out


def _check(condition: bool, text: str, kind: type[Exception] = ValueError) -> None:
    if not condition:
        raise kind(f"{_NAME}: {text}")


def _integers(name: str, value: torch.Tensor, batch: int) -> torch.Tensor:
    integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    _check(integer, f"{name}: expected int32, got {value.dtype}", TypeError)
    _check(list(value.shape) == [batch], f"{name}: expected shape [{batch}], got {list(value.shape)}")
    return value.long()


def _places(
    q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per sequence: its cache, where its first key is there, and how many tokens it holds. Checks them all."""
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check(t.dim() == 4, f"{name}: expected 4 dimensions, got shape {list(t.shape)}")
    batch, (caches, capacity) = q.shape[0], k_cache.shape[:2]
    _check(
        v_cache.shape[:3] == k_cache.shape[:3],
        f"v_cache: expected the shape of k_cache, {list(k_cache.shape)}, but for its last dimension, got "
        f"{list(v_cache.shape)}",
    )
    _check((k is None) == (v is None), "k: expected k and v together, got one of them")
    new = 0
    for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if t is None:
            continue
        new = k.shape[1] if k.dim() == 4 else 0
        expected = [batch, new, *cache.shape[2:]]
        _check(list(t.shape) == expected, f"{name}: expected shape {expected}, got {list(t.shape)}")
        _check(t.dtype == cache.dtype, f"{name}: expected the cache's {cache.dtype}, got {t.dtype}", TypeError)

    if cache_seqlens is None:
        _check(k is None, "cache_seqlens: expected an int or a tensor where k is given, got None")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, torch.Tensor):
        held = _integers("cache_seqlens", cache_seqlens, batch)
    else:
        held = torch.full((batch,), cache_seqlens, device=q.device)
    begin = torch.zeros_like(held) if cache_leftpad is None else _integers("cache_leftpad", cache_leftpad, batch)
    if cache_batch_idx is None:
        rows = torch.arange(batch, device=q.device)
        _check(batch <= caches, f"k_cache: expected a cache for each of {batch} sequences, got {caches}")
    else:
        rows = _integers("cache_batch_idx", cache_batch_idx, batch)
    for b, (row, first, length) in enumerate(zip(rows.tolist(), begin.tolist(), held.tolist(), strict=True)):
        _check(0 <= row < caches, f"cache_batch_idx[{b}]: expected 0 <= index < {caches}, got {row}", IndexError)
        _check(
            0 <= length <= capacity - new,
            f"cache_seqlens[{b}]: expected 0 <= length <= {capacity - new}, the cache's capacity without the new "
            f"tokens, got {length}",
        )
        _check(0 <= first <= length + new, f"cache_leftpad[{b}]: expected 0 <= leftpad <= {length + new}, got {first}")
    distinct = k is None or rows.unique().numel() == batch
    _check(distinct, f"cache_batch_idx: expected distinct caches where k is given, got {rows.tolist()}")
    return rows, begin, held


def _attend(q, k_cache, v_cache, rows, begin, end, options) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence b attends over tokens begin[b] : end[b] of cache rows[b]."""
    batch, queries, heads, _ = q.shape
    in_order = torch.equal(rows, torch.arange(batch, device=q.device))
    if in_order and batch and bool((begin == begin[0]).all()) and bool((end == end[0]).all()):
        part = (slice(batch), slice(int(begin[0]), int(end[0])))
        out, lse = flash_attention(q, k_cache[part], v_cache[part], **options, return_lse=True)
        return out, lse
    if rows.unique().numel() < batch:  # two sequences read one cache: each gets a copy
        k_cache, v_cache, rows = k_cache[rows], v_cache[rows], torch.arange(batch, device=q.device)

    # The caches lie one after the other like packed sequences. What lies between the parts that are attended to (unused
    # ends, left padding, unused caches) becomes a sequence without queries, which costs nothing.
    order = rows.argsort()
    first = rows[order] * k_cache.shape[1]
    cu_k = torch.stack([first + begin[order], first + end[order]], 1).flatten()
    cu_q = torch.arange(batch + 1, device=q.device).repeat_interleave(2)[:-1] * queries
    slopes = options["alibi_slopes"]
    if slopes is not None and slopes.dim() == 2:
        options = {**options, "alibi_slopes": slopes[order].repeat_interleave(2, 0)}
    out, lse = flash_attention_varlen(
        q[order].flatten(0, 1),
        k_cache.flatten(0, 1),
        v_cache.flatten(0, 1),
        cu_q.int(),
        torch.nn.functional.pad(cu_k, (1, 0)).int(),
        **options,
        return_lse=True,
    )
    back = order.argsort()
    return out.unflatten(0, (batch, queries))[back], lse.view(heads, batch, queries).transpose(0, 1)[back]
