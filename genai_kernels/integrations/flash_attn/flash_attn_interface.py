"""The module that flash-attn keeps its functions in; users of the field import it by this name."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from genai_kernels.integrations.flash_attn.kv_cache import flash_attn_with_kvcache, refuse_block_table
from genai_kernels.ops.flash_attention import flash_attention, flash_attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# their results' types depend on return_lse
_dense: Any = flash_attention
_varlen: Any = flash_attention_varlen

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of queries over keys and values.

    Args:
        q: `[batch, queries, heads, head_dim]`; k: `[batch, keys, kv_heads, head_dim]`;
        v: `[batch, keys, kv_heads, value_dim]`; `heads` a multiple of `kv_heads`; any strides.
        dropout_p: probability of dropping a probability.
        softmax_scale: default `head_dim ** -0.5`.
        causal: hides the keys after a query, the last query aligned with the last key.
        window_size: `(left, right)`: query i sees the keys from `i + keys - queries - left` to
            `i + keys - queries + right`, both included; negative for no limit.
        softcap: scores become `softcap * tanh(score / softcap)`; <= 0 for none.
        alibi_slopes: `[heads]` or `[batch, heads]`: the score changes by `-slope * |i + keys - queries - j|`.
        deterministic: accepted; this backward is always deterministic.
        return_attn_probs: also return the lse and the probabilities.

    Returns:
        `[batch, queries, heads, value_dim]`; with `return_attn_probs` also lse `[batch, heads, queries]`, float32,
        natural logarithm, and the probabilities `[batch, heads, queries, keys]`, negative where dropped, which are for
        tests (quadratic memory, no gradient) and None without dropout.

    Raises:
        ValueError, TypeError: as `genai_kernels.flash_attention`.

    >>> import torch
    >>> import genai_kernels.integrations.flash_attn as flash_attn
    >>> q = k = v = torch.eye(3).view(1, 3, 1, 3)
    >>> flash_attn.flash_attn_func(q, k, v, softmax_scale=0.0, causal=True)[0, :, 0]
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if not return_attn_probs:
        return _dense(q, k, v, **options)

    def probabilities(**options: Any) -> torch.Tensor:
        batch, keys, heads, _ = k.shape
        identity = torch.eye(keys, dtype=v.dtype, device=v.device).view(1, keys, 1, keys)
        return _dense(q, k, identity.expand(batch, keys, heads, keys), **options).transpose(1, 2)

    return _with_probabilities(functools.partial(_dense, q, k, v), probabilities, options)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with keys and values in one tensor `[batch, keys, 2, kv_heads, head_dim]`, read in place."""
    k, v = _unpacked("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with all three in one tensor `[batch, tokens, 3, heads, head_dim]`, read in place."""
    q, k, v = _unpacked("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Result:
    """`flash_attn_func` over sequences of different lengths, packed one after the other.

    Args:
        q: `[total_queries, heads, head_dim]`; k, v: `[total_keys, kv_heads, dim]`.
        cu_seqlens_q, cu_seqlens_k: int32 `[batch + 1]`: where each sequence begins; the last is where the last ends.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        block_table: None; paged caches are not implemented.
        The others are those of `flash_attn_func`.

    Returns:
        `[total_queries, heads, value_dim]`; with `return_attn_probs` also lse `[heads, total_queries]` and, with
        dropout, the probabilities `[batch, heads, max_seqlen_q, max_seqlen_k]`, 0 beyond a sequence's lengths.

    Raises:
        ValueError: also a sequence longer than max_seqlen_q or max_seqlen_k.
        NotImplementedError: a block_table.

    >>> import torch
    >>> import genai_kernels.integrations.flash_attn as flash_attn
    >>> q = k = v = torch.ones(5, 2, 4)
    >>> lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> flash_attn.flash_attn_varlen_func(q, k, v, lengths, lengths, 3, 3, causal=True).shape
    torch.Size([5, 2, 4])
    """
    name = "flash_attn_varlen_func"
    refuse_block_table(name, block_table)
    _check_longest(name, "q", cu_seqlens_q, max_seqlen_q)
    _check_longest(name, "k", cu_seqlens_k, max_seqlen_k)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if not return_attn_probs:
        return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)

    def probabilities(**options: Any) -> torch.Tensor:
        bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        identity = v.new_zeros(k.shape[0], k.shape[1], max_seqlen_k)
        for begin, end in itertools.pairwise(bounds_k):
            identity[begin:end, :, : end - begin] = torch.eye(end - begin, dtype=v.dtype).unsqueeze(1)
        rows = _varlen(q, k, identity, cu_seqlens_q, cu_seqlens_k, **options)
        padded = q.new_zeros(len(bounds_q) - 1, max_seqlen_q, q.shape[1], max_seqlen_k)
        for b, (begin, end) in enumerate(itertools.pairwise(bounds_q)):
            padded[b, : end - begin] = rows[begin:end]
        return padded.transpose(1, 2)

    attend = functools.partial(_varlen, q, k, v, cu_seqlens_q, cu_seqlens_k)
    return _with_probabilities(attend, probabilities, options)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with keys and values in one tensor `[total_keys, 2, kv_heads, head_dim]`."""
    k, v = _unpacked("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with all three in one tensor `[total, 3, heads, head_dim]`."""
    q, k, v = _unpacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes) -> dict[str, Any]:
    """The arguments of genai_kernels.flash_attention; any negative window and softcap means none there."""
    left, right = window_size
    return {
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": (max(left, -1), max(right, -1)),
        "softcap": max(softcap, 0.0),
        "alibi_slopes": alibi_slopes,
    }


def _unpacked(function: str, name: str, packed: torch.Tensor, dims: int, count: int) -> tuple[torch.Tensor, ...]:
    """The views of a tensor that holds `count` in its third dimension from the end."""
    if packed.dim() != dims or packed.shape[-3] != count:
        shape = "[batch, tokens, " if dims == 5 else "[tokens, "
        raise ValueError(
            f"genai_kernels.integrations.flash_attn.{function}: {name}: expected {shape}{count}, heads, head_dim], "
            f"got {list(packed.shape)}"
        )
    return packed.unbind(-3)


def _check_longest(function: str, which: str, cu_seqlens: torch.Tensor, longest: int) -> None:
    """flash-attn reads no row beyond the stated maximum; here that would be a silently wrong promise."""
    if torch.compiler.is_compiling() or cu_seqlens.numel() < 2:
        return
    found = int(cu_seqlens.diff().max())
    if found > longest:
        raise ValueError(
            f"genai_kernels.integrations.flash_attn.{function}: max_seqlen_{which}: expected at least the longest "
            f"sequence of cu_seqlens_{which}, {found}, got {longest}"
        )


def _with_probabilities(attend, probabilities, options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """out, lse and S_dmask: the probabilities that attention over the unit vectors shows, negative where dropped."""
    if not options["dropout_p"]:
        out, lse = attend(**options, return_lse=True)
        return out, lse, None
    options["seed"] = int(torch.randint(2**62, (1,)))
    out, lse = attend(**options, return_lse=True)
    with torch.no_grad():
        kept, all_of_them = probabilities(**options), probabilities(**{**options, "dropout_p": 0.0})
    return out, lse, torch.where(kept == 0, -all_of_them, all_of_them)
