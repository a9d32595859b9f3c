"""paged_attention: attention of new tokens over a paged KV cache; see README.md for how it is computed."""

from __future__ import annotations

import torch

from ...registry import op
from ...torch_ops import fake, kernel
from . import samples
from .reference import paged_attention_reference

__all__ = ["paged_attention"]

_paged_attention = kernel("paged_attention")
_paged_attention_lse = kernel("paged_attention_lse")


@op(
    reference=paged_attention_reference,
    samples=samples.SAMPLES,
    accuracy=samples.ACCURACY,
    magnitude=samples.magnitude,
    differentiable=False,
    gpu=("triton",),
    overloads=("paged_attention", "paged_attention_lse"),
    peers=samples.PEERS,
)
def paged_attention(
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence's newest tokens over its keys and values in the pages of a cache.

    Decode, chunked prefill, the verification of a draft and any mixture of them are one call. The new tokens are in the
    cache already (`append_kv_cache`) and are the last of their sequence. A token's result is the same bits whatever it
    is computed together with: alone or in a prefill, whatever the batch, the block size, the table and the threads.
    On the CPU, sequences whose tables begin with the same blocks have them read once.

    Args:
        q: `[tokens, heads, head_dim]` with `cu_seqlens_q`, or `[batch, heads, head_dim]`, one new token each, or
            `[batch, tokens, heads, head_dim]`; float32, bfloat16 or float16.
        k_cache: `[num_blocks, block_size, kv_heads, head_dim]`, dtype of q or int8; `heads` is a multiple of
            `kv_heads`. Any strides but the last, which is 1; any block_size from 1.
        v_cache: `[num_blocks, block_size, kv_heads, value_dim]`, the same dtype.
        block_table: int32 `[batch, blocks]`: token t of sequence b lies in block `block_table[b, t // block_size]`.
            Entries past the sequence, and those of blocks that no new token sees, are not looked at.
        seq_lens: int32 `[batch]`: tokens of each sequence, the new ones included.
        cu_seqlens_q: int32 `[batch + 1]`: sequence b has the rows `cu_seqlens_q[b] : cu_seqlens_q[b + 1]` of q.
        indptr, indices, last_page_len: the same tables as lists, instead of block_table and seq_lens: int32
            `[batch + 1]`, `[all blocks]`, `[batch]`.
        causal: a new token sees itself and what is before it.
        window_size: `(left, right)`, inclusive, -1 for no limit, as in `flash_attention`. Blocks that fell out of the
            window of all new tokens are not read, and may have been given to another sequence.
        softmax_scale: default `head_dim ** -0.5`.
        softcap: `softcap * tanh(score / softcap)`; 0 for none.
        alibi_slopes: float32 `[heads]` or `[batch, heads]`.
        sink: float32 `[heads]`, the logit of a key without a value that every token sees.
        tree_mask: bool `[tokens, at least the most new tokens]`: row i, column j: new token i sees new token j of its
            sequence. With `causal` and the window, not instead of them: a tree in which a token's ancestors come before
            it keeps `causal`.
        k_scale, v_scale: float32, of an int8 cache: its shape without the last dimension; what a token's head is
            multiplied by.
        kv_layout: "NHD" as above, or "HND": `[num_blocks, kv_heads, block_size, head_dim]`.
        return_lse: also return the logarithm of the sum of exponentials.

    Returns:
        Shape of q with value_dim in the last place, contiguous; with `return_lse` also float32 `[heads, tokens]`.

    Raises:
        ValueError: shapes and lengths that do not fit; fewer tokens in a sequence than it has new ones.
        IndexError: a block that is not in the cache, named by its place in the table.
        TypeError: dtypes that do not fit.
        What lengths, tables and cu_seqlens_q hold is checked on the CPU alone: on a GPU a call does not wait for them,
        and can be captured in a CUDA graph and replayed with others.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023;
    Ye et al., "Cascade Inference", 2024.

    >>> import torch, genai_kernels as gk
    >>> cache = torch.zeros(8, 2, 1, 4)  # 8 blocks of 2 tokens, 1 head
    >>> cache[5, 0], cache[5, 1], cache[3, 0] = 1.0, 2.0, 6.0
    >>> table, lengths = torch.tensor([[5, 3]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    >>> gk.paged_attention(torch.zeros(1, 1, 4), cache, cache, table, lengths)
    tensor([[[3., 3., 3., 3.]]])
    """
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f'genai_kernels.paged_attention: kv_layout: expected "NHD" or "HND", got {kv_layout!r}')
    left, right = window_size
    if causal:
        right = 0
    run = _paged_attention_lse if return_lse else _paged_attention
    return run(
        q, k_cache, v_cache, block_table, seq_lens, indptr, indices, last_page_len, cu_seqlens_q, alibi_slopes, sink,
        tree_mask, k_scale, v_scale, left, right, softmax_scale, softcap, kv_layout == "HND",
    )  # fmt: skip


@fake("paged_attention")
def _(q, k_cache, v_cache, *_):
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1])


@fake("paged_attention_lse")
def _(q, k_cache, v_cache, *_):
    out = q.new_empty(*q.shape[:-1], v_cache.shape[-1])
    return out, q.new_empty((q.shape[-2], out.numel() // (q.shape[-2] * v_cache.shape[-1])), dtype=torch.float32)
