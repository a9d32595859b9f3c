"""What attention is timed against, and what is checked of a call whose score matrix no float64 reference could hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...registry import Part
from .reference import visible_mask

_sdpa = torch.nn.functional.scaled_dot_product_attention


@functools.lru_cache(maxsize=2)  # made once and not in every timed call
def _mask(queries: int, keys: int, left: int, right: int) -> torch.Tensor:
    with torch.inference_mode(False):  # a backward must be able to save it
        return visible_mask(queries, keys, left, right, torch.device("cpu"))


def _bounds(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    return window_size[0], 0 if causal else window_size[1]


def _only(other: dict[str, Any], what: str) -> None:
    if other:
        raise NotImplementedError(f"{what} has no option {', '.join(other)}")


def sdpa(q, k, v, *, causal=False, window_size=(-1, -1), softmax_scale=None, **other):  # type: ignore[no-untyped-def]
    """PyTorch's own; a window is a mask."""
    _only(other, "scaled_dot_product_attention")
    left, right = _bounds(window_size, causal)
    plain_causal = causal and left < 0 and q.shape[1] == k.shape[1]
    mask = None if plain_causal or max(left, right) < 0 else _mask(q.shape[1], k.shape[1], left, right)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = _sdpa(q, k, v, attn_mask=mask, is_causal=plain_causal, scale=softmax_scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def sdpa_chunked(q, k, v, *, causal=False, window_size=(-1, -1), softmax_scale=None, **other):  # type: ignore[no-untyped-def]
    """A window as a loop over chunks of queries, each with the keys it sees: what a user writes who knows the trick."""
    _only(other, "scaled_dot_product_attention")
    left, right = _bounds(window_size, causal)
    tokens = q.shape[1]
    if left < 0 or right < 0 or tokens != k.shape[1]:
        raise NotImplementedError("only for windows with two ends, and as many keys as queries")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    chunk = min(512, max(128, left))
    outs = []
    for begin in range(0, tokens, chunk):
        end = min(begin + chunk, tokens)
        first, last = max(0, begin - left), min(end + right, tokens)
        mask = _chunk_mask(end - begin, last - first, begin - first, left, right)
        part = (q[:, :, begin:end], k[:, :, first:last], v[:, :, first:last])
        outs.append(_sdpa(*part, attn_mask=mask, scale=softmax_scale, enable_gqa=gqa))
    return torch.cat(outs, dim=2).transpose(1, 2)


@functools.lru_cache(maxsize=16)
def _chunk_mask(queries: int, keys: int, shift: int, left: int, right: int) -> torch.Tensor:
    with torch.inference_mode(False):
        i, j = torch.arange(queries)[:, None] + shift, torch.arange(keys)
        return (j >= i - left) & (j <= i + right)


@functools.lru_cache(maxsize=2)
def _block_mask(queries: int, keys: int, left: int, right: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    shift = keys - queries

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = j == j
        if left >= 0:
            seen = seen & (j >= i + shift - left)
        if right >= 0:
            seen = seen & (j <= i + shift + right)
        return seen

    with torch.inference_mode(False):
        return create_block_mask(visible, None, None, queries, keys, device="cpu")


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(q, k, v, *, causal=False, window_size=(-1, -1), softmax_scale=None, **other):  # type: ignore[no-untyped-def]
    """Compiled FlexAttention with a BlockMask."""
    _only(other, "this peer")
    left, right = _bounds(window_size, causal)
    mask = None if max(left, right) < 0 else _block_mask(q.shape[1], k.shape[1], left, right)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return _compiled_flex()(q, k, v, block_mask=mask, scale=softmax_scale, enable_gqa=gqa).transpose(1, 2)


flex_attention.compiles = True  # type: ignore[attr-defined]

PEERS = {"sdpa": sdpa, "sdpa_chunked": sdpa_chunked, "flex_attention": flex_attention}

# ---- what is checked of a large call ----

_WHOLE = 2**25  # scores up to which a call is checked whole: 256 MiB for each float64 matrix of them
_ROWS = 256  # queries of a checked stretch, beyond the window


def parts(q, k, v, *, causal=False, window_size=(-1, -1), softmax_scale=None, **other):  # type: ignore[no-untyped-def]
    """One key head in the first and one in the last sequence; of a window, stretches at the start, middle and end.

    Empty, for "check it whole", where the score matrix is small or the call has options that would have to be cut too.
    """
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    if other or batch * heads * queries * keys <= _WHOLE:
        return []
    options = {"causal": causal, "window_size": window_size, "softmax_scale": softmax_scale}
    left, right = _bounds(window_size, causal)

    def part(b: int, head: int, rows: range, seen: range, sure: range) -> Part:
        """Queries `rows` and keys `seen` of one key head; `sure` are the keys that no other query sees."""
        group = heads // kv_heads
        entry, every = slice(b, b + 1), slice(None)
        of_q = (entry, slice(rows.start, rows.stop), slice(head * group, (head + 1) * group), every)
        of_k = (entry, slice(seen.start, seen.stop), slice(head, head + 1), every)
        whole = (entry, slice(sure.start, sure.stop), slice(head, head + 1), every)
        inner = (every, slice(sure.start - seen.start, sure.stop - seen.start), every, every)
        gradients = [(of_q, (every,) * 4), (whole, inner), (whole, inner)]
        return Part((q[of_q].detach(), k[of_k].detach(), v[of_k].detach()), options, [of_q], gradients)

    length = left + _ROWS
    if left >= 0 and right == 0 and queries == keys and 3 * length < queries:
        # The last query and the last key of a stretch are the same token, so it is aligned as the whole is.
        middle = queries // 2
        return [
            part(0, 0, range(length), range(length), range(_ROWS)),
            part(batch // 2, kv_heads // 2, range(middle, middle + length), range(middle - left, middle + length),
                 range(middle, middle + _ROWS)),
            part(batch - 1, kv_heads - 1, range(queries - length, queries), range(queries - length - left, queries),
                 range(queries - length, queries)),
        ]  # fmt: skip
    everything = range(queries), range(keys), range(keys)
    return [part(0, 0, *everything), part(batch - 1, kv_heads - 1, *everything)]
