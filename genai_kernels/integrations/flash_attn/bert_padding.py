"""flash-attn's helpers between padded batches and packed sequences, with its names and results."""

from __future__ import annotations

import torch

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The rows `indices` of a tensor `[rows, ...]`; differentiable, an index may stand more than once."""
    return input.index_select(0, indices.long())


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """Zeros `[first_axis_dim, ...]` with `values` in the rows `indices`, which are distinct; differentiable."""
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """A padded batch as packed sequences.

    Args:
        hidden_states: `[batch, tokens, ...]`.
        attention_mask: `[batch, tokens]`, bool or int, 1 where there is a token.
        unused_mask: the same, 1 where there is room that is packed too but not counted as used.

    Returns:
        The packed tokens `[total, ...]`; their indices `[total]` in the flattened batch; cu_seqlens, int32
        `[batch + 1]`; the longest length; the used length of each sequence, int32 `[batch]`.

    >>> import torch
    >>> from genai_kernels.integrations.flash_attn.bert_padding import pad_input, unpad_input
    >>> x, mask = torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 1, 0], [1, 0, 0]])
    >>> packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    >>> packed.flatten(), indices, cu_seqlens, longest
    (tensor([0., 1., 3.]), tensor([0, 1, 3]), tensor([0, 2, 3], dtype=torch.int32), 2)
    >>> pad_input(packed, indices, batch=2, seqlen=3).flatten()
    tensor([0., 1., 0., 3., 0., 0.])
    """
    present = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = present.sum(-1, dtype=torch.int32)
    indices = present.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    used = attention_mask.sum(-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """The inverse of `unpad_input`: `[total, ...]` to `[batch, seqlen, ...]`, zeros where no token is."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
