"""flash_attention in plain PyTorch: the score matrix is held, K and V are repeated, everything in the dtype of q.

It is what a user would write, and the semantics that every kernel is compared with.
"""

from __future__ import annotations

import torch

from ...philox import MASK32, philox


def dropout_keep(
    batch: int, heads: int, queries: int, keys: int, p: float, seed: int, offset: int, first_batch: int = 0
) -> torch.Tensor:
    """Which probabilities dropout keeps: bool `[batch, heads, queries, keys]`.

    Element (b, h, i, j) is word j % 4 of Philox(counter = (j / 4, i, b * heads + h, offset), key = seed), kept if the
    word is at least p * 2^32.
    """
    key = torch.arange(keys)
    query = torch.arange(queries)[:, None]
    row = (first_batch * heads + torch.arange(batch * heads)).view(batch, heads, 1, 1)
    words = torch.stack(philox(torch.arange((keys + 3) // 4), query, row, offset, seed), dim=-1).flatten(-2)
    return words[..., : len(key)] >= min(int(p * 2**32), MASK32)


def visible_mask(queries: int, keys: int, left: int, right: int, device: torch.device) -> torch.Tensor:
    """Key j is visible to query i if `i + keys - queries - left <= j <= i + keys - queries + right`; -1: no limit."""
    i = torch.arange(queries, device=device)[:, None] + (keys - queries)
    j = torch.arange(keys, device=device)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    return mask


def flash_attention_reference(
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
    first_batch: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `genai_kernels.flash_attention`. `first_batch` is the index of q's first sequence, for dropout."""
    batch, queries, heads, head_dim = q.shape
    keys, group = k.shape[1], heads // max(k.shape[2], 1)
    left, right = window_size[0], 0 if causal else window_size[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    exact = torch.promote_types(q.dtype, torch.float32)

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [batch, heads, tokens, dim]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = (q @ k.mT) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.view(-1, heads, 1, 1)
        i = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
        distance = (i - torch.arange(keys, device=q.device)).abs()
        scores = scores - (slopes * distance).to(scores.dtype)
    if attn_bias is not None:
        scores = scores + attn_bias.to(scores.dtype)
    visible = visible_mask(queries, keys, left, right, q.device).broadcast_to(scores.shape)
    if attn_mask is not None:
        visible = visible & attn_mask
    scores = scores.masked_fill(~visible, float("-inf"))
    v = v.masked_fill(~visible.any(dim=2).unsqueeze(-1), 0)  # what no query sees is not multiplied

    logits = scores
    if sink is not None:
        column = sink.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        logits = torch.cat([scores, column], dim=-1)
    # a row without any key: zeros stand in for the scores, so that neither softmax nor its gradient sees -inf - -inf
    empty = (logits == float("-inf")).all(dim=-1, keepdim=True)
    safe = logits.masked_fill(empty, 0)
    lse = torch.logsumexp(safe.to(exact), dim=-1, keepdim=True) if logits.shape[-1] else safe.to(exact).sum(-1, True)
    lse = lse.masked_fill(empty, float("-inf"))
    probabilities = torch.softmax(safe, dim=-1).masked_fill(empty, 0)[..., :keys]
    if dropout_p > 0:
        seed = int(torch.randint(2**62, (1,))) if seed is None else seed
        keep = dropout_keep(batch, heads, queries, keys, dropout_p, seed, offset, first_batch).to(q.device)
        probabilities = probabilities * keep / (1 - dropout_p)
    out = (probabilities @ v).transpose(1, 2)
    return (out, lse.squeeze(-1)) if return_lse else out


def flash_attention_varlen_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    **options,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `genai_kernels.flash_attention_varlen`: the dense reference, one sequence at a time."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()

    def of_sequence(t: torch.Tensor | None, b: int, queries: int, keys: int) -> torch.Tensor | None:
        if t is None:
            return None
        t = t[None] if t.dim() == 3 else t
        t = t[b : b + 1] if t.shape[0] > 1 else t
        return t[:, :, : queries if t.shape[2] > 1 else 1, : keys if t.shape[3] > 1 else 1]

    outs, lses = [], []
    for b in range(len(bounds_q) - 1):
        rows, columns = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        queries, keys = rows.stop - rows.start, columns.stop - columns.start
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = flash_attention_reference(
            q[None, rows],
            k[None, columns],
            v[None, columns],
            alibi_slopes=slopes,
            attn_bias=of_sequence(attn_bias, b, queries, keys),
            attn_mask=of_sequence(attn_mask, b, queries, keys),
            return_lse=True,
            first_batch=b,
            **options,
        )
        outs.append(out[0])
        lses.append(lse[0])
    tail = q.shape[0] - bounds_q[-1]  # rows of no sequence
    out = torch.cat([*outs, q.new_zeros(tail, q.shape[1], v.shape[-1])])
    if not return_lse:
        return out
    exact = torch.promote_types(q.dtype, torch.float32)
    return out, torch.cat([*lses, torch.full((q.shape[1], tail), float("-inf"), dtype=exact, device=q.device)], dim=-1)
