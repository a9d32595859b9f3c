"""append_kv_cache: keys and values of new tokens to their slots of a paged cache."""

from __future__ import annotations

from typing import Any

import torch

from ...registry import OPS, Accuracy, Make, Sample, op
from ...torch_ops import fake, kernel, written

__all__ = ["append_kv_cache"]

_append = kernel("append_kv_cache")
_append_int8 = kernel("append_kv_cache_int8")


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values `[..., dim]` and float32 scales `[...]`: scale = largest / 127, to nearest even. A head with a NaN or
    an infinity has the scale NaN and ones.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    finite = x.isfinite().all(dim=-1)
    largest = x.abs().amax(dim=-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = largest / 127
    normal = scale >= torch.finfo(torch.float32).smallest_normal
    # a tensor divided by a tensor is rounded once; PyTorch's number divided by a tensor is a reciprocal and a product
    inverse = torch.where(normal, torch.full_like(largest, 127) / torch.where(normal, largest, 1), 0)
    values = (torch.where(finite.unsqueeze(-1), x, 0) * torch.where(finite, inverse, 0).unsqueeze(-1)).round()
    values = torch.where(finite.unsqueeze(-1), values, 1)
    return values.to(torch.int8), torch.where(finite, scale, float("nan"))


def append_kv_cache_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    kv_layout: str = "NHD",
) -> tuple[torch.Tensor, ...]:
    """See `genai_kernels.append_kv_cache`: one indexed assignment for each tensor."""
    if cos is not None:
        k = OPS["rotary_embedding"].reference(k, cos, sin, positions, interleaved=interleaved)
    taken = slot_mapping >= 0
    slots = slot_mapping[taken].long()
    for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if kv_layout == "HND":
            cache, scale = cache.transpose(1, 2), None if scale is None else scale.transpose(1, 2)
        at = slots // cache.shape[1], slots % cache.shape[1]
        if scale is None:
            cache[at] = new[taken].to(cache.dtype)
        else:
            cache[at], found = quantize_heads(new[taken])
            scale[at] = found.to(scale.dtype)
    scales = [scale for scale in (k_scale, v_scale) if scale is not None]
    return (k_cache, v_cache, *scales)


def appended(
    m: Make,
    tokens: int,
    *,
    kv_heads: int = 2,
    dim: int = 32,
    value_dim: int | None = None,
    block_size: int = 16,
    blocks: int = 6,
    int8: bool = False,
    rotary: int = 0,
    positions: bool = True,
    skip: bool = True,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of append_kv_cache: new tokens to slots anywhere in the cache, some of them skipped."""
    inner = (kv_heads, block_size) if options.get("kv_layout") == "HND" else (block_size, kv_heads)
    shapes = [(blocks, *inner, d) for d in (dim, value_dim or dim)]
    caches = [m.ints(-127, 128, s, torch.int8) if int8 else m(*s) for s in shapes]
    if int8:
        options["k_scale"], options["v_scale"] = (m.float32(blocks, *inner).abs() for _ in range(2))
    slots = torch.randperm(blocks * block_size, generator=m.generator)[:tokens].int()
    if skip:
        slots[::5] = -1
    if rotary:
        angle = m.float32(50 if positions else tokens, rotary // 2, scale=3.0)
        options["cos"], options["sin"] = angle.cos(), angle.sin()
        if positions:
            options["positions"] = m.ints(0, 50, (tokens,))
    return (m(tokens, kv_heads, dim), m(tokens, kv_heads, value_dim or dim), *caches, slots), options


def _strided(m: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """k and v as parts of one product, the caches as halves of one tensor."""
    (*_, slots), options = appended(m, 20)
    qkv, both = m(20, 6, 32), m(6, 2, 16, 2, 32)
    return (qkv[:, 2:4], qkv[:, 4:], both[:, 0], both[:, 1], slots.long()), options


SAMPLES = [
    Sample("plain", lambda m: appended(m, 30)),
    Sample("one_token", lambda m: appended(m, 1, skip=False)),
    Sample("no_token", lambda m: appended(m, 0)),
    Sample("block_1", lambda m: appended(m, 9, block_size=1, blocks=20, kv_heads=1, dim=1)),
    Sample("value_dim", lambda m: appended(m, 30, dim=40, value_dim=7)),
    Sample("heads_first", lambda m: appended(m, 30, kv_layout="HND")),
    Sample("strided", _strided),
    Sample("rotary", lambda m: appended(m, 30, rotary=32)),
    Sample("rotary_per_token", lambda m: appended(m, 30, rotary=32, positions=False)),
    Sample("rotary_partial", lambda m: appended(m, 30, dim=33, rotary=10, kv_layout="HND")),
    Sample("rotary_interleaved", lambda m: appended(m, 30, dim=34, rotary=34, interleaved=True)),
    Sample("int8", lambda m: appended(m, 30, int8=True)),
    Sample("int8_heads_first", lambda m: appended(m, 30, int8=True, kv_layout="HND", value_dim=19)),
    Sample("b64_h8_d128", lambda m: appended(m, 64, kv_heads=8, dim=128, blocks=512, skip=False), bench=True,
           elements=4.0 * 64 * 8 * 128),
    Sample("n2048_h8_d128", lambda m: appended(m, 2048, kv_heads=8, dim=128, blocks=512, skip=False), bench=True,
           elements=4.0 * 2048 * 8 * 128),
]  # fmt: skip


@op(
    reference=append_kv_cache_reference,
    samples=SAMPLES,
    accuracy=Accuracy(),
    differentiable=False,
    gpu=("triton",),
    mutates=True,
    overloads=("append_kv_cache", "append_kv_cache_int8"),
)
def append_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    kv_layout: str = "NHD",
) -> tuple[torch.Tensor, ...]:
    """Writes keys and values of new tokens into their slots of a paged cache, in place.

    With `cos` and `sin` the keys are rotated on their way, with the bits of `rotary_embedding`. Into an int8 cache a
    head goes as `round(x / scale)` with `scale = max|x| / 127`; one that holds a NaN or an infinity reads back as NaN.
    Everything is checked before anything is written.

    Args:
        k: `[tokens, kv_heads, head_dim]`, float32, bfloat16 or float16, any strides.
        v: `[tokens, kv_heads, value_dim]`, the same dtype.
        k_cache, v_cache: `[num_blocks, block_size, kv_heads, dim]`, dtype of k or int8, any strides but the last, which
            is 1. They must share no memory; two halves of one tensor `[num_blocks, 2, ...]` do not.
        slot_mapping: int32 or int64 `[tokens]`: token t goes to place `slot % block_size` of block
            `slot // block_size`; -1 skips it.
        cos, sin: tables `[positions, rotary_dim / 2]` of any floating dtype; without `positions` a row for each token.
        positions: int32 or int64 `[tokens]`.
        interleaved: the pairing, as in `rotary_embedding`.
        k_scale, v_scale: float32, for int8 caches: their shape without the last dimension; written too.
        kv_layout: "NHD" as above, or "HND": `[num_blocks, kv_heads, block_size, dim]`.

    Returns:
        The tensors that were written: `(k_cache, v_cache)`, or `(k_cache, v_cache, k_scale, v_scale)`.

    Raises:
        ValueError: shapes that do not fit; a slot that two tokens share; tensors that overlap.
        IndexError: a slot outside of the cache, a position outside of the tables.
        TypeError: dtypes that do not fit.
        On a GPU nothing waits for what slots and positions hold: a slot outside of the cache is skipped, a position
        outside of the tables gives NaN, and of two tokens with one slot either may stay. Tensors that overlap are not
        looked for there.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.

    >>> import torch, genai_kernels as gk
    >>> k_cache, v_cache = torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 1, 2)  # 2 blocks of 4 tokens
    >>> _ = gk.append_kv_cache(torch.ones(2, 1, 2), torch.ones(2, 1, 2), k_cache, v_cache, torch.tensor([6, -1]))
    >>> k_cache[1, :, 0, 0]
    tensor([0., 0., 1., 0.])
    """
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f'genai_kernels.append_kv_cache: kv_layout: expected "NHD" or "HND", got {kv_layout!r}')
    heads_first = kv_layout == "HND"
    if k_scale is None or v_scale is None:
        if k_scale is not v_scale or k_cache.dtype == torch.int8:
            raise ValueError(
                "genai_kernels.append_kv_cache: k_scale: expected it together with v_scale, and both for int8 caches"
            )
        _append(k, v, k_cache, v_cache, slot_mapping, cos, sin, positions, interleaved, heads_first)
        written(k_cache, v_cache)
        return k_cache, v_cache
    _append_int8(k, v, k_cache, v_cache, k_scale, v_scale, slot_mapping, cos, sin, positions, interleaved, heads_first)
    written(k_cache, v_cache, k_scale, v_scale)
    return k_cache, v_cache, k_scale, v_scale


@fake("append_kv_cache")
def _(*_):
    return None


@fake("append_kv_cache_int8")
def _(*_):
    return None
