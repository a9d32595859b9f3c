"""cross_attention: attention of an image to a prompt, whose keys and values are computed once for all steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...registry import OPS, python_errors

__all__ = ["CrossAttentionKV", "cross_attention", "cross_attention_kv"]


class CrossAttentionKV(NamedTuple):
    """The keys and values of a prompt in one layer: `[prompts, tokens, heads, head_dim]` each, and which tokens count.

    Made by `cross_attention_kv`. A sampler computes them before its first step; the weights that they come from, 13 %
    of SDXL's UNet, are not read again.

    >>> import torch, genai_kernels as gk
    >>> kv = gk.CrossAttentionKV(torch.zeros(1, 77, 8, 40), torch.zeros(1, 77, 8, 40))
    >>> kv.k.shape, kv.mask
    (torch.Size([1, 77, 8, 40]), None)
    """

    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None


def _call(name: str, *args: Any, **kwargs: Any) -> Any:
    """An op of another room, through its public function."""
    return OPS[name].function(*args, **kwargs)


@python_errors
def cross_attention_kv(
    context: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    num_heads: int,
    *,
    k_bias: torch.Tensor | None = None,
    v_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> CrossAttentionKV:
    """Keys and values of prompts, by two products of `genai_kernels.linear`; differentiable.

    Args:
        context: `[prompts, tokens, features]`: the text encoder's output.
        k_weight, v_weight: `[heads * head_dim, features]`, as in `nn.Linear`; `k_bias`, `v_bias`: `[heads * head_dim]`.
        num_heads: a divisor of their rows.
        mask: bool `[prompts, tokens]`, False for padding; kept beside them.

    Returns:
        A `CrossAttentionKV`.

    Raises:
        ValueError: a shape that does not fit.

    >>> import torch, genai_kernels as gk
    >>> weight = torch.randn(320, 768)
    >>> gk.cross_attention_kv(torch.randn(2, 77, 768), weight, weight, 8).k.shape
    torch.Size([2, 77, 8, 40])
    """
    for name, weight in (("k_weight", k_weight), ("v_weight", v_weight)):
        if weight.dim() != 2 or num_heads < 1 or weight.shape[0] % num_heads:
            raise ValueError(
                f"genai_kernels.cross_attention_kv: {name}: expected [heads * head_dim, features] with "
                f"{num_heads} heads, got shape {list(weight.shape)}"
            )
    if context.dim() != 3:
        raise ValueError(
            "genai_kernels.cross_attention_kv: context: expected [prompts, tokens, features], "
            f"got shape {list(context.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != context.shape[:2]):
        raise ValueError(
            f"genai_kernels.cross_attention_kv: mask: expected bool {list(context.shape[:2])}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    k, v = (
        _call("linear", context, weight, bias).unflatten(-1, (num_heads, -1))
        for weight, bias in ((k_weight, k_bias), (v_weight, v_bias))
    )
    return CrossAttentionKV(k, v, mask)


@python_errors
def cross_attention(q: torch.Tensor, kv: CrossAttentionKV, *, softmax_scale: float | None = None) -> torch.Tensor:
    """`flash_attention` of the queries to the keys and values of their prompt.

    Prompts may be fewer than images: the images of one prompt follow each other, as in a batch for classifier-free
    guidance, and are read as one sequence of queries, so that nothing is repeated. The bits are those of attention over
    the projected context, image by image.

    Args:
        q: `[batch, queries, heads, head_dim]`, batch a multiple of the prompts: image i has prompt
            `i // (batch // prompts)`.
        kv: of the prompts; its heads may be fewer, as in `flash_attention`.
        softmax_scale: default `head_dim ** -0.5`.

    Returns:
        `[batch, queries, heads, head_dim]`; differentiable in q, kv.k and kv.v.

    Raises:
        ValueError: a shape that does not fit.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2021.

    >>> import torch, genai_kernels as gk
    >>> weight, context, q = torch.randn(80, 24), torch.randn(2, 7, 24), torch.randn(6, 64, 2, 40)
    >>> kv = gk.cross_attention_kv(context, weight, weight, 2)
    >>> alone = gk.flash_attention(q[4:5], kv.k[1:], kv.v[1:])
    >>> torch.equal(gk.cross_attention(q, kv)[4:5], alone)
    True
    """
    prompts = kv.k.shape[0] if kv.k.dim() == 4 else 0
    if q.dim() != 4 or prompts == 0 or q.shape[0] % prompts:
        raise ValueError(
            "genai_kernels.cross_attention: q: expected [batch, queries, heads, head_dim] with a batch that is a "
            f"multiple of the {prompts} prompts of kv, got shape {list(q.shape)}"
        )
    mask = None if kv.mask is None else kv.mask[:, None, None, :]
    joined = q.reshape(prompts, q.shape[0] // prompts * q.shape[1], *q.shape[2:])
    out = _call("flash_attention", joined, kv.k, kv.v, softmax_scale=softmax_scale, attn_mask=mask)
    return out.reshape(*q.shape[:-1], kv.v.shape[-1])
