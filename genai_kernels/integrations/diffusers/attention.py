"""diffusers' Attention by flash_attention: what its processor would compute, decided at each call.

The processor stays where it is and as it is: fuse_qkv_projections, set_attn_processor, attention slicing and IP
adapters work as ever, and a processor that is not in `_PROCESSORS` serves itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...ops.flash_attention import flash_attention
from .calls import NAMES, Left, Served, why_not_now
from .prompts import keys_and_values


class _Way(NamedTuple):
    """What a processor of diffusers does."""

    added: bool = False  # keys and values of the text beside the image's, by add_k_proj and add_v_proj
    fused: bool = False  # one product for q, k and v
    own_scale: bool = False  # attn.scale; otherwise PyTorch's, head_dim ** -0.5
    norms: bool = False  # norm_q and norm_k
    spatial: bool = True  # spatial_norm


_PROCESSORS = {
    "AttnProcessor": _Way(own_scale=True),
    "AttnProcessor2_0": _Way(norms=True),
    "FusedAttnProcessor2_0": _Way(fused=True, norms=True),
    "SlicedAttnProcessor": _Way(own_scale=True, spatial=False),  # slices save memory that is not needed here
    "AttnAddedKVProcessor": _Way(added=True, own_scale=True, spatial=False),
    "AttnAddedKVProcessor2_0": _Way(added=True, spatial=False),
    "SlicedAttnAddedKVProcessor": _Way(added=True, own_scale=True),
}


def _way(attn: Any) -> _Way | None:
    kind = type(attn.processor)
    return _PROCESSORS.get(kind.__name__) if kind.__module__ == "diffusers.models.attention_processor" else None


def why_not_attention(attn: Any) -> str | None:
    way = _way(attn)
    if way is None:
        return f"its processor is {type(attn.processor).__name__}"
    return "to_out is missing" if attn.to_out is None else None


def _bias(attn: Any, mask: torch.Tensor | None, added: bool, tokens: int, batch: int) -> torch.Tensor | None:
    """What diffusers adds to the scores, `[batch, heads or 1, queries or 1, keys]`."""
    if mask is None:
        return None
    if mask.dim() == 3 and len(mask) == batch and mask.shape[-1] == tokens:
        return mask[:, None]  # diffusers repeats it for each head
    mask = attn.prepare_attention_mask(mask, tokens, batch, out_dim=4 if added else 3)
    return mask if added else mask.view(batch, attn.heads, -1, mask.shape[-1])


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """`[batch, tokens, heads, dim]`; the norm gets what diffusers gives it, heads before tokens."""
    return x if norm is None else norm(x.transpose(1, 2)).transpose(1, 2)


def attention(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    temb: torch.Tensor | None = None,
    **kwargs: Any,
) -> Served | Left:
    if kwargs:
        return Left(f"cross_attention_kwargs: {', '.join(sorted(kwargs))}")
    reason = why_not_attention(attn) or why_not_now("flash_attention", hidden_states)
    if reason is not None:
        return Left(reason)
    way = _way(attn)
    assert way is not None
    x, text, shape = hidden_states, encoder_hidden_states, hidden_states.shape
    if way.spatial and attn.spatial_norm is not None:
        x = attn.spatial_norm(x, temb)
    if way.added or x.dim() == 4:
        x = x.view(*x.shape[:2], -1).transpose(1, 2)
    batch, tokens, _ = x.shape if text is None or way.added else text.shape
    bias = _bias(attn, attention_mask, way.added, tokens, batch)
    image = x
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    crosses = text is not None
    if text is None:
        text = image if way.added else x
    elif attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)

    kept = False
    if way.fused and not crosses:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    elif way.fused:
        q, (k, v) = attn.to_q(x), attn.to_kv(text).chunk(2, dim=-1)
    elif way.added:
        q, k, v = attn.to_q(x), attn.add_k_proj(text), attn.add_v_proj(text)
        if not attn.only_cross_attention:
            k, v = torch.cat([k, attn.to_k(x)], dim=1), torch.cat([v, attn.to_v(x)], dim=1)
    elif crosses and not attn.norm_cross:
        q, (k, v, kept) = attn.to_q(x), keys_and_values(attn, text)
    else:
        q, k, v = attn.to_q(x), attn.to_k(text), attn.to_v(text)
    q, k, v = (t.view(*t.shape[:2], attn.heads, -1) for t in (q, k, v))
    if way.norms:
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
    y = _attend(q, k, v, bias, attn.scale if way.own_scale else None).flatten(2)

    for layer in attn.to_out[:2]:  # the product, and dropout
        y = layer(y)
    if way.added:
        y = y.transpose(1, 2).reshape(shape) + hidden_states
    else:
        if len(shape) == 4:
            y = y.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            y = y + hidden_states
        y = y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor
    kind = "added keys" if way.added else "cross-attention" if crosses else "self-attention"
    kind += " with keys and values of an earlier call" if kept else ""
    return y, f"{NAMES[q.dtype]}, {kind}, head_dim {q.shape[-1]}"


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """In float32 inside, whatever upcast_attention and upcast_softmax say: a bias of another dtype is cast to q's."""
    if bias is None:
        return flash_attention(q, k, v, softmax_scale=scale)  # type: ignore[return-value]
    if bias.dtype == torch.bool:
        return flash_attention(q, k, v, softmax_scale=scale, attn_mask=bias)  # type: ignore[return-value]
    bias = bias if bias.dtype in (q.dtype, torch.float32) else bias.to(q.dtype)
    return flash_attention(q, k, v, softmax_scale=scale, attn_bias=bias)  # type: ignore[return-value]
