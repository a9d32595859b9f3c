"""flash_attention: softmax(scale q k^T) v without the score matrix, dense and packed."""

from __future__ import annotations

import torch
from torch.compiler import is_dynamo_compiling

from ... import backends
from ...registry import op
from ...torch_ops import autograd, direct, fake, kernel, no_double_backward
from . import samples
from .reference import flash_attention_reference, flash_attention_varlen_reference

__all__ = ["flash_attention", "flash_attention_varlen"]

_flash_attention_bwd = kernel("flash_attention_bwd")
_attention = kernel("flash_attention")
# For calls that no backward follows: index 1 with lse. What only backward needs is not computed.
_without_state = (direct("flash_attention_output"), direct("flash_attention_lse"))
_any_autocast = torch._C._is_any_autocast_enabled


def _autocast(*tensors):
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def _attend(
    q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size, softmax_scale, softcap, alibi_slopes, attn_bias,
    attn_mask, sink, dropout_p, seed, offset, return_lse,
):  # fmt: skip
    plain = backends.forced is None and not is_dynamo_compiling() and not _any_autocast()
    if not plain:
        q, k, v = _autocast(q, k, v)
    left, right = window_size
    if causal:
        right = 0
    rng_state = None
    if dropout_p > 0:
        drawn = torch.randint(2**62, (1,)) if seed is None else torch.tensor([seed])
        rng_state = torch.cat([drawn, torch.tensor([offset])])
    if alibi_slopes is not None:
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "genai_kernels.flash_attention: alibi_slopes: expected a tensor that requires no gradient; "
                "pass the bias as attn_bias to train it"
            )
        alibi_slopes = alibi_slopes.to(torch.promote_types(q.dtype, torch.float32))
    if sink is not None:
        sink = sink.to(torch.promote_types(q.dtype, torch.float32))
    given = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, attn_bias, attn_mask, sink, rng_state, left, right,
        softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    if plain:
        result = _without_state[return_lse](*given)
        if result is not NotImplemented:
            return result
    out, lse, _ = _attention(*given)
    return (out, lse) if return_lse else out


@op(reference=flash_attention_reference, samples=samples.DENSE, **samples.DECLARED)
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with softmax over the visible keys, in memory linear in the number of tokens, forward and backward.

    The score of query i and key j is `s = softmax_scale * q_i . k_j`, then `softcap * tanh(s / softcap)` if a softcap
    is given, then `- slope * |i + keys - queries - j|`, then `+ attn_bias`. A row that sees no key gives 0, with lse
    -inf and zero gradients. The same bits whatever the batch, the padding, the chunking of the queries and the threads.

    Args:
        q: `[batch, queries, heads, head_dim]`, float32, bfloat16, float16 or float64, any strides.
        k: `[batch, keys, kv_heads, head_dim]`, same dtype; `heads` is a multiple of `kv_heads` (GQA, MQA): query head h
            attends to key head `h // (heads // kv_heads)`.
        v: `[batch, keys, kv_heads, value_dim]`, same dtype.
        causal: key j is visible to query i if `j <= i + keys - queries` (aligned at the bottom right).
        window_size: `(left, right)`, inclusive, -1 for no limit: key j is visible if
            `i + keys - queries - left <= j <= i + keys - queries + right`. `causal` sets right to 0.
        softmax_scale: default `head_dim ** -0.5`.
        softcap: 0 for none.
        alibi_slopes: `[heads]` or `[batch, heads]`; not differentiable.
        attn_bias: added to the scores; broadcasts to `[batch, heads, queries, keys]`; dtype of q or float32. Its
            gradient has its own (broadcast) shape.
        attn_mask: bool, True where the key is visible; broadcasts to `[batch, heads, queries, keys]`.
        sink: `[heads]`, the logit of a key without a value that every query sees; differentiable.
        dropout_p: probability of dropping a probability, in [0, 1).
        seed: of the dropout; None draws one from torch's generator.
        offset: second word of the dropout's counter, in [0, 2^32), to tell calls with one seed apart.
        return_lse: also return the logarithm of the sum of exponentials.

    Returns:
        `[batch, queries, heads, value_dim]`, contiguous, dtype of q; with `return_lse` also
        `[batch, heads, queries]`, float32 (float64 for float64), natural logarithm, sink included; differentiable.

    Raises:
        ValueError: shapes, windows or probabilities that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: a gradient of `alibi_slopes`; double backward.

    Source: Dao, "FlashAttention-2", 2023; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    >>> import torch, genai_kernels as gk
    >>> q = k = v = torch.eye(3).view(1, 3, 1, 3)
    >>> gk.flash_attention(q, k, v, causal=True, softmax_scale=0.0)[0, :, 0]
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """
    return _attend(
        q, k, v, None, None, causal, window_size, softmax_scale, softcap, alibi_slopes, attn_bias, attn_mask, sink,
        dropout_p, seed, offset, return_lse,
    )  # fmt: skip


@op(reference=flash_attention_varlen_reference, samples=samples.VARLEN, **samples.DECLARED_VARLEN)
def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attention` over sequences of different lengths packed one after the other.

    Sequence b has the queries `cu_seqlens_q[b] : cu_seqlens_q[b + 1]` and the keys `cu_seqlens_k[b] : cu_seqlens_k[b +
    1]`; either may be empty. Rows past the last sequence give 0. The result of a sequence has the bits of a dense call
    with it alone.

    Args:
        q: `[total_queries, heads, head_dim]`; k: `[total_keys, kv_heads, head_dim]`;
        v: `[total_keys, kv_heads, value_dim]`.
        cu_seqlens_q: int32 `[batch + 1]`, starting at 0, never decreasing, at most total_queries.
        cu_seqlens_k: the same for the keys.
        attn_bias: broadcasts to `[batch, heads, longest queries, longest keys]`, indexed within a sequence; so does
            attn_mask. The other arguments are those of `flash_attention`.

    Returns:
        `[total_queries, heads, value_dim]`; with `return_lse` also `[heads, total_queries]`.

    Raises:
        ValueError: also cumulative lengths that break a rule.

    >>> import torch, genai_kernels as gk
    >>> q = k = v = torch.ones(5, 2, 4)
    >>> lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> gk.flash_attention_varlen(q, k, v, lengths, lengths, causal=True).shape
    torch.Size([5, 2, 4])
    """
    return _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size, softmax_scale, softcap, alibi_slopes, attn_bias,
        attn_mask, sink, dropout_p, seed, offset, return_lse,
    )  # fmt: skip


def _lse_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@fake("flash_attention")
def _(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng_state, left, right, scale, softcap, dropout_p):
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    tokens_heads = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return out, *(q.new_empty(shape, dtype=_lse_dtype(q)) for shape in (tokens_heads, (*tokens_heads, 2)))


@fake("flash_attention_bwd")
def _(
    dout, dlse, q, k, v, out, lse, softmax_state, cu_q, cu_k, slopes, bias, mask, sink, rng_state, left, right, scale,
    softcap, dropout_p, bias_grad,
):  # fmt: skip
    gradients = [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)]
    dbias = bias.new_empty(bias.shape) if bias_grad else q.new_empty(0)
    return *gradients, dbias, q.new_empty(0) if sink is None else sink.new_empty(sink.shape)


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng_state, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, slopes, bias, mask, sink, rng_state)


def _backward(ctx, dout, dlse, _):
    q, k, v, out, lse, softmax_state, *options = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 15
        dout = torch.zeros_like(out)
    bias_grad = ctx.needs_input_grad[6]
    dq, dk, dv, dbias, dsink = _flash_attention_bwd(
        dout, dlse, q, k, v, out, lse, softmax_state, *options, *ctx.numbers, bias_grad
    )
    dbias, dsink = dbias if bias_grad else None, None if options[-2] is None else dsink
    return dq, dk, dv, None, None, None, dbias, None, dsink, *[None] * 6


autograd("flash_attention", _save, _backward)
no_double_backward("flash_attention_bwd", "flash_attention")
