"""rotary_embedding: rotary position embedding, both pairings."""

from __future__ import annotations

import torch

from ...registry import Accuracy, Make, Sample, op
from ...torch_ops import autograd, fake, kernel

__all__ = ["rotary_embedding"]

_rotary_embedding = kernel("rotary_embedding")
_rotary_embedding_out = kernel("rotary_embedding_out")


def _split(x: torch.Tensor, rotary_dim: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The two members of every pair, [..., rotary_dim / 2] each."""
    rotated = x[..., :rotary_dim]
    if interleaved:
        return rotated[..., 0::2], rotated[..., 1::2]
    first, second = rotated.tensor_split(2, dim=-1)
    return first, second


def _join(a: torch.Tensor, b: torch.Tensor, rest: torch.Tensor, interleaved: bool) -> torch.Tensor:
    rotated = torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)
    return torch.cat([rotated, rest], dim=-1)


def rotary_embedding_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch, in the dtype of x."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    a, b = _split(x, rotary_dim, interleaved)
    y = _join(a * cos - b * sin, b * cos + a * sin, x[..., rotary_dim:], interleaved)
    return y if out is None else out.copy_(y)


def _magnitude(x, cos, sin, positions=None, *, interleaved=False):
    return (
        rotary_embedding_reference(x.abs(), cos.abs(), -sin.abs(), positions, interleaved=interleaved)
        .abs()
        .maximum(rotary_embedding_reference(x.abs(), cos.abs(), sin.abs(), positions, interleaved=interleaved).abs())
    )


def _angles(m: Make, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = m.float32(*shape, scale=3.0).double()
    return angle.cos().to(m.dtype), angle.sin().to(m.dtype)


def _float32(m: Make, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = m.float32(*shape, scale=3.0)
    return angle.cos(), angle.sin()


_BENCHED = 2 * 2048 * 32 * 128 + 2048 * 128


def _benched(m: Make, **options: bool) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor | bool]]:
    cos, sin = _angles(m, 2048, 64)
    return (m(1, 2048, 32, 128),), {"cos": cos, "sin": sin, **options}


SAMPLES = [
    Sample("per_token", lambda m: ((m(2, 5, 3, 64), *_angles(m, 5, 32)), {})),
    Sample("per_batch_and_token", lambda m: ((m(2, 5, 3, 16), *_angles(m, 2, 5, 8)), {})),
    Sample("positions", lambda m: ((m(2, 5, 3, 64), *_angles(m, 9, 32), m.ints(0, 9, (2, 5))), {})),
    Sample("positions_broadcast", lambda m: ((m(2, 5, 3, 16), *_angles(m, 9, 8), m.ints(0, 9, (5,), torch.int64)), {})),
    Sample("interleaved", lambda m: ((m(2, 5, 3, 64), *_angles(m, 5, 32)), {"interleaved": True})),
    Sample("interleaved_positions", lambda m: ((m(7, 2, 10), *_angles(m, 9, 5), m.ints(0, 9, (7,))),
                                               {"interleaved": True})),
    Sample("partial", lambda m: ((m(6, 3, 40), *_angles(m, 6, 8)), {})),
    Sample("partial_interleaved", lambda m: ((m(6, 3, 37), *_angles(m, 6, 9)), {"interleaved": True})),
    Sample("odd", lambda m: ((m(5, 2, 43), *_angles(m, 5, 21)), {})),
    Sample("two_elements", lambda m: ((m(5, 2, 2), *_angles(m, 5, 1)), {})),
    Sample("float32_tables", lambda m: ((m(6, 3, 32), *_float32(m, 6, 16)), {})),
    Sample("packed_qkv", lambda m: ((m(2, 5, 9, 16)[:, :, 3:6], *_angles(m, 5, 8)), {})),
    Sample("heads_first", lambda m: ((m(2, 3, 5, 16).transpose(1, 2), *_angles(m, 5, 8)), {})),
    Sample("strided_inner", lambda m: ((m(16, 3, 5).permute(2, 1, 0), *_angles(m, 5, 8)), {})),
    Sample("expanded", lambda m: ((m(1, 3, 16).expand(5, 3, 16), *_angles(m, 5, 8)), {})),
    Sample("empty", lambda m: ((m(0, 3, 16), *_angles(m, 0, 8)), {})),
    # tables that take no gradient, as in nearly every model
    Sample("2048x32x128", lambda m: _benched(m), bench=True, frozen=("cos", "sin"), elements=_BENCHED,
           backward_elements=_BENCHED),
    Sample("2048x32x128_interleaved", lambda m: _benched(m, interleaved=True), bench=True, frozen=("cos", "sin"),
           elements=_BENCHED, backward_elements=_BENCHED),
]  # fmt: skip


@op(
    reference=rotary_embedding_reference,
    samples=SAMPLES,
    accuracy=Accuracy(backward=(1.0, 1.0)),
    magnitude=_magnitude,
    overloads=("rotary_embedding", "rotary_embedding_out"),
)
def rotary_embedding(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotary position embedding: every pair (a, b) of a head becomes `(a cos - b sin, b cos + a sin)`.

    The pairs are `(x[i], x[i + rotary_dim / 2])` (NeoX, Llama) or, interleaved, `(x[2 i], x[2 i + 1])` (GPT-J).
    Elements from rotary_dim on are copied. Computed in float32 (float64 for float64) and rounded once.

    Args:
        x: `[..., tokens, heads, head_dim]`, float32, bfloat16, float16 or float64, any strides: queries or keys.
        cos, sin: tables `[positions, rotary_dim / 2]` if `positions` is given, otherwise one row per token,
            broadcast to `[..., tokens, rotary_dim / 2]`; any floating dtype.
        positions: int32 or int64, broadcast to `[..., tokens]`: the row of the table of each token. On the GPU they are
            not looked at before the kernel runs: one outside of the table makes its token NaN.
        interleaved: the pairing.
        out: shape and dtype of x, written and returned instead of a new tensor; x itself rotates in place. Not
            differentiable.

    Returns:
        Shape and dtype of x. The gradient of cos and sin is computed too, by plain PyTorch operations.

    Raises:
        ValueError: a shape that does not fit; an `out` that overlaps x partly.
        IndexError: a position outside of the table, on the CPU.
        TypeError: a dtype that does not fit.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    >>> import torch, genai_kernels as gk
    >>> angle = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.1])  # 8 positions, rotary_dim 4
    >>> q = torch.ones(3, 1, 4)  # 3 tokens, 1 head
    >>> gk.rotary_embedding(q, angle.cos(), angle.sin(), torch.tensor([0, 1, 7]))[1]
    tensor([[-0.3012,  0.8952,  1.3818,  1.0948]])
    """
    if out is None:
        return _rotary_embedding(x, cos, sin, positions, interleaved, False)
    _rotary_embedding_out(x, cos, sin, positions, interleaved, False, out)
    return out


@fake("rotary_embedding")
def _(x, cos, sin, positions, interleaved, inverse):
    return x.new_empty(x.shape)


@fake("rotary_embedding_out")
def _(x, cos, sin, positions, interleaved, inverse, out):
    return None


def _save(ctx, inputs, output):
    x, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.tables_wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if ctx.tables_wanted else None, cos, sin, positions)


def _table_gradients(ctx, dy, x, cos, positions):
    """Of cos and sin: rarely wanted, and sums over heads that plain PyTorch does well."""
    a, b = _split(x.double(), 2 * cos.shape[-1], ctx.interleaved)
    da, db = _split(dy.double(), 2 * cos.shape[-1], ctx.interleaved)
    gradients = []
    for per_head in (da * a + db * b, (db * a - da * b) * (-1 if ctx.inverse else 1)):
        per_token = per_head.sum(-2)
        if positions is None:
            gradient = per_token.sum_to_size(cos.shape)
        else:
            rows = positions.expand(per_token.shape[:-1]).flatten().long()
            gradient = per_token.new_zeros(cos.shape).index_add(0, rows, per_token.flatten(0, -2))
        gradients.append(gradient.to(cos.dtype))
    return gradients


def _backward(ctx, dy):
    x, cos, sin, positions = ctx.saved_tensors
    # the inverse rotation; itself differentiable, and so is its backward
    dx = _rotary_embedding(dy, cos, sin, positions, ctx.interleaved, not ctx.inverse)
    dcos, dsin = _table_gradients(ctx, dy, x, cos, positions) if ctx.tables_wanted else (None, None)
    return dx, dcos, dsin, None, None, None


autograd("rotary_embedding", _save, _backward)
