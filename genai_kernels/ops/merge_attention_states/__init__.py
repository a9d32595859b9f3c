"""merge_attention_states: attention over two sets of keys from the attentions over each."""

from __future__ import annotations

import torch

from ...registry import Accuracy, Make, Sample, op
from ...torch_ops import autograd, fake, kernel, no_double_backward

__all__ = ["merge_attention_states"]

_merge = kernel("merge_attention_states")
_merge_attention_states_bwd = kernel("merge_attention_states_bwd")
_INFINITY = float("inf")


def _beside_o(values: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, tokens]` as `[batch, tokens, heads, 1]`, to be multiplied with o."""
    return values.transpose(-1, -2).unsqueeze(-1)


def merge_attention_states_reference(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, in the dtype of lse."""
    empty_a, empty_b = lse_a == -_INFINITY, lse_b == -_INFINITY
    o_a = o_a.masked_fill(_beside_o(empty_a), 0)
    o_b = o_b.masked_fill(_beside_o(empty_b), 0)
    difference = (lse_a - lse_b).masked_fill((lse_a == lse_b) & lse_a.isinf(), 0)
    weight_a, weight_b = torch.sigmoid(difference), torch.sigmoid(-difference)
    o = _beside_o(weight_a) * o_a + _beside_o(weight_b) * o_b
    lse = torch.maximum(lse_a, lse_b) + torch.nn.functional.softplus(-difference.abs())
    return o.to(o_a.dtype), lse.masked_fill(empty_a & empty_b, -_INFINITY)


def _magnitude(o_a, lse_a, o_b, lse_b):
    o, _ = merge_attention_states_reference(o_a.abs(), lse_a, o_b.abs(), lse_b)
    return o, torch.maximum(lse_a, lse_b).abs() + 1


def _states(m: Make, *shape: int, scale: float = 2.0, shift: float = 0.0) -> tuple[torch.Tensor, ...]:
    """Two states with o of this shape; `scale` and `shift` of the difference of their lse."""
    *batch, tokens, heads, _ = shape
    lse_a = m.float32(*batch, heads, tokens, scale=3.0)
    return m(*shape), lse_a, m(*shape), lse_a + shift + m.float32(*batch, heads, tokens, scale=scale)


def _with(m: Make, value_a: float, value_b: float) -> tuple[torch.Tensor, ...]:
    """Two states whose lse have these values in some rows: in a, in b, and in both."""
    o_a, lse_a, o_b, lse_b = _states(m, 2, 6, 3, 8)
    lse_a[:, :, 1] = value_a
    lse_b[:, 1:, 2] = value_b
    lse_a[:, :, 4], lse_b[:, :, 4] = value_a, value_b
    return o_a, lse_a, o_b, lse_b


def _unseen_nan(m: Make) -> tuple[torch.Tensor, ...]:
    o_a, lse_a, o_b, lse_b = _with(m, -_INFINITY, -_INFINITY)
    o_a[:, 1], o_a[:, 4], o_b[:, 4] = float("nan"), _INFINITY, float("nan")
    return o_a, lse_a, o_b, lse_b


def _strided(m: Make) -> tuple[torch.Tensor, ...]:
    o_a, lse_a, _, lse_b = _states(m, 2, 5, 3, 20)
    return (
        o_a.transpose(1, 2).contiguous().transpose(1, 2),
        lse_a.mT.contiguous().mT,
        m(2, 5, 3, 60)[..., ::3],
        lse_b[:1].expand(2, 3, 5),
    )


SAMPLES = [
    Sample("plain", lambda m: (_states(m, 2, 7, 3, 16), {})),
    Sample("packed", lambda m: (_states(m, 11, 2, 64), {})),
    Sample("many_rows", lambda m: (_states(m, 3, 150, 4, 24), {})),
    Sample("odd", lambda m: (_states(m, 2, 5, 3, 37), {})),
    Sample("head_dim_1", lambda m: (_states(m, 1, 9, 2, 1), {})),
    Sample("head_dim_300", lambda m: (_states(m, 1, 4, 1, 300), {})),
    Sample("equal_lse", lambda m: (_states(m, 2, 4, 3, 8, scale=0.0), {})),
    Sample("far_apart", lambda m: (_states(m, 2, 8, 3, 8, scale=60.0), {})),
    Sample("large_lse", lambda m: (tuple(t * 1000 if t.dim() == 3 else t for t in _states(m, 2, 4, 3, 8)), {})),
    Sample("empty_rows", lambda m: (_with(m, -_INFINITY, -_INFINITY), {})),
    Sample("infinite_rows", lambda m: (_with(m, _INFINITY, _INFINITY), {})),
    Sample("infinite_and_empty", lambda m: (_with(m, _INFINITY, -_INFINITY), {})),
    Sample("unseen_nan", lambda m: (_unseen_nan(m), {})),
    Sample("strided", lambda m: (_strided(m), {})),
    Sample("no_tokens", lambda m: (_states(m, 2, 0, 3, 8), {})),
    Sample("no_batch", lambda m: (_states(m, 0, 4, 3, 8), {})),
    Sample("4096x16x128", lambda m: (_states(m, 1, 4096, 16, 128), {}), bench=True, elements=3 * 4096 * 16 * 128,
           backward_elements=5 * 4096 * 16 * 128),
]  # fmt: skip


@op(
    reference=merge_attention_states_reference,
    samples=SAMPLES,
    accuracy=Accuracy(),
    magnitude=_magnitude,
    overloads=("merge_attention_states", "merge_attention_states_bwd"),
)
def merge_attention_states(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from `(o, lse)` over each: `o = (e^lse_a o_a + e^lse_b o_b) / e^lse`.

    It joins what `flash_attention(..., return_lse=True)` gives for parts of the keys: a shared prefix and each
    request's own tokens, blocks that live on different machines, a cache too long for one call. A row of lse -inf saw
    no key: the other side passes with its bits unchanged, whatever the empty one holds (NaN too); where both are empty,
    o is 0 and lse -inf. A lse of +inf takes all the weight; two of them share it evenly. A library that marks empty
    rows with +inf needs `lse.masked_fill(lse == inf, -inf)` first.

    Args:
        o_a: `[batch, tokens, heads, dim]` or packed `[tokens, heads, dim]`, float32, bfloat16, float16 or float64, any
            strides.
        lse_a: `[batch, heads, tokens]` or `[heads, tokens]`, natural logarithm, float32 (float64 for float64).
        o_b: shape and dtype of o_a.
        lse_b: shape and dtype of lse_a.

    Returns:
        `(o, lse)`, with the shapes and dtypes of o_a and lse_a; both differentiable with respect to all four.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that does not fit.
        NotImplementedError: double backward.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018. Peer: FlashInfer's `merge_state`,
    which takes logarithms to base 2.

    >>> import math, torch, genai_kernels as gk
    >>> o_a, lse_a = torch.zeros(1, 1, 2), torch.tensor([[math.log(3.0)]])  # one token, one head: three keys, say,
    >>> o_b, lse_b = torch.ones(1, 1, 2), torch.tensor([[0.0]])  # and one more, all with the score 0
    >>> gk.merge_attention_states(o_a, lse_a, o_b, lse_b)
    (tensor([[[0.2500, 0.2500]]]), tensor([[1.3863]]))
    """
    return _merge(o_a, lse_a, o_b, lse_b)


@fake("merge_attention_states")
def _(o_a, lse_a, o_b, lse_b):
    return o_a.new_empty(o_a.shape), lse_a.new_empty(lse_a.shape)


@fake("merge_attention_states_bwd")
def _(d_o, dlse, o_a, lse_a, o_b, lse_b):
    return tuple(t.new_empty(t.shape) for t in (o_a, lse_a, o_b, lse_b))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_o, dlse):
    if d_o is None and dlse is None:
        return (None,) * 4
    states = ctx.saved_tensors
    if d_o is None:
        d_o = states[0].new_zeros(()).expand(states[0].shape)
    return _merge_attention_states_bwd(d_o, dlse, *states)


autograd("merge_attention_states", _save, _backward)
no_double_backward("merge_attention_states_bwd", "merge_attention_states")
