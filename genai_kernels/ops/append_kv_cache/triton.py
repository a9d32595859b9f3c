"""append_kv_cache in Triton: a program writes some heads of one token, its key and its value.

Slots and positions are known to the device alone, and are not checked: a slot outside of the cache is skipped, a
position outside of the tables gives NaN, and of two tokens with one slot either may stay.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from ...triton_lib.pages import check_dtype, checked_caches, page_strides

_OP = "append_kv_cache"
_TILE = 1024  # elements that a program holds at most: eight for each thread of four warps


@triton.jit
def largest_of(x):
    """Of each row, the largest size, and how many NaN and infinities."""
    return tl.max(tl.abs(x), 1), tl.sum(((x - x) != 0).to(tl.int32), 1)


@triton.jit
def scales_of(largest, strange):
    """Of rows: what they are multiplied by, and the scale that undoes it; NaN where no scale could keep the rest."""
    scale = tl.div_rn(largest, 127.0)
    # a largest number so small that its scale is not one that can be divided by is stored as zeros
    normal = scale >= 1.1754943508222875e-38
    inverse = tl.where(normal, tl.div_rn(127.0, tl.where(normal, largest, 1.0)), 0.0)
    return inverse, tl.where(strange > 0, float("nan"), scale)


@triton.jit
def quantized(x, inverse, strange):
    """To the nearest integer, to even; ones in a row with NaN or infinities."""
    size = tl.abs(x * inverse[:, None])
    size = (size + 8388608.0) - 8388608.0  # 2^23, where the spacing is 1
    return tl.where((strange > 0)[:, None], 1.0, tl.where(x < 0, -size, size)).to(tl.int8)


@triton.jit
def append_plain(
    x, cache, scale, head, inside_heads, token, page, at, dim, x_t, x_h, x_d, c_p, c_t, c_h, s_p, s_t, s_h,
    DIM: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Heads of a token as they are, or as int8."""
    d = tl.arange(0, DIM)[None, :].to(tl.int64)
    inside = inside_heads[:, None] & (d < dim)
    tile = tl.load(x + token * x_t + head[:, None] * x_h + d * x_d, mask=inside, other=0.0)
    to = cache + page * c_p + at * c_t + head[:, None] * c_h + d
    if INT8:
        wide = tile.to(tl.float32)
        largest, strange = largest_of(wide)
        inverse, found = scales_of(largest, strange)
        tl.store(scale + page * s_p + at * s_t + head * s_h, found, mask=inside_heads)
        tl.store(to, quantized(wide, inverse, strange), mask=inside)
    else:
        tl.store(to, tile, mask=inside)


@triton.jit
def append_rotated(
    x, cache, scale, cos, sin, positions, head, inside_heads, token, page, at, dim, half, rows, x_t, x_h, x_d, c_p, c_t,
    c_h, s_p, s_t, s_h, cos_r, cos_d, sin_r, sin_d, position_t, HALF: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Heads of a token, rotated as rotary_embedding's kernel does, to the last bit."""
    row = token
    if HAS_POSITIONS:
        row = tl.load(positions + token * position_t).to(tl.int64)
    pair = tl.arange(0, HALF).to(tl.int64)
    known = (pair < half) & (row >= 0) & (row < rows)
    c = tl.load(cos + row * cos_r + pair * cos_d, mask=known, other=float("nan")).to(tl.float32)[None, :]
    s = tl.load(sin + row * sin_r + pair * sin_d, mask=known, other=float("nan")).to(tl.float32)[None, :]
    inside = inside_heads[:, None] & (pair[None, :] < half)
    first = 2 * pair[None, :] if INTERLEAVED else pair[None, :]
    second = first + (1 if INTERLEAVED else half)
    x_at = x + token * x_t + head[:, None] * x_h
    to = cache + page * c_p + at * c_t + head[:, None] * c_h
    a = tl.load(x_at + first * x_d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_at + second * x_d, mask=inside, other=0.0).to(tl.float32)
    turned, beside = a * c - b * s, b * c + a * s
    if REST > 0:
        d = 2 * half + tl.arange(0, REST)[None, :].to(tl.int64)
        kept = inside_heads[:, None] & (d < dim)
        rest = tl.load(x_at + d * x_d, mask=kept, other=0.0)
    if INT8:
        turned, beside = tl.where(inside, turned, 0.0), tl.where(inside, beside, 0.0)
        largest, strange = largest_of(turned)
        other, other_strange = largest_of(beside)
        largest, strange = tl.maximum(largest, other), strange + other_strange
        if REST > 0:
            other, other_strange = largest_of(rest.to(tl.float32))
            largest, strange = tl.maximum(largest, other), strange + other_strange
        inverse, found = scales_of(largest, strange)
        tl.store(scale + page * s_p + at * s_t + head * s_h, found, mask=inside_heads)
        tl.store(to + first, quantized(turned, inverse, strange), mask=inside)
        tl.store(to + second, quantized(beside, inverse, strange), mask=inside)
        if REST > 0:
            tl.store(to + d, quantized(rest.to(tl.float32), inverse, strange), mask=kept)
    else:
        tl.store(to + first, turned.to(cache.dtype.element_ty), mask=inside)
        tl.store(to + second, beside.to(cache.dtype.element_ty), mask=inside)
        if REST > 0:
            tl.store(to + d, rest, mask=kept)


@triton.jit
def append_kernel(
    k, v, k_cache, v_cache, k_scale, v_scale, slots, cos, sin, positions,
    heads, dim, value_dim, half, rows, places, slot_t, position_t, cos_r, cos_d, sin_r, sin_d, kx_t, kx_h, kx_d, vx_t,
    vx_h, vx_d, k_p, k_t, k_h, v_p, v_t, v_h, ks_p, ks_t, ks_h, vs_p, vs_t, vs_h,
    HEADS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slot_t).to(tl.int64)
    if (slot < 0) | (slot >= places):
        return
    page, at = slot // BLOCK, slot % BLOCK
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    inside = head < heads
    if ROTARY:
        append_rotated(
            k, k_cache, k_scale, cos, sin, positions, head, inside, token, page, at, dim, half, rows, kx_t, kx_h, kx_d,
            k_p, k_t, k_h, ks_p, ks_t, ks_h, cos_r, cos_d, sin_r, sin_d, position_t, HALF, REST, INTERLEAVED,
            HAS_POSITIONS, INT8,
        )  # fmt: skip
    else:
        append_plain(
            k, k_cache, k_scale, head, inside, token, page, at, dim, kx_t, kx_h, kx_d, k_p, k_t, k_h, ks_p, ks_t, ks_h,
            DIM, INT8,
        )  # fmt: skip
    append_plain(
        v, v_cache, v_scale, head, inside, token, page, at, value_dim, vx_t, vx_h, vx_d, v_p, v_t, v_h, vs_p, vs_t,
        vs_h, VALUE, INT8,
    )  # fmt: skip


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def _vector(name: str, t: torch.Tensor, tokens: int) -> torch.Tensor:
    check_dtype(_OP, name, t, torch.int32, torch.int64)
    check(
        _OP, t.shape == (tokens,),
        lambda: f"{name}: expected [{tokens}], one for each token of k, got shape {list(t.shape)}",
    )  # fmt: skip
    return t


def _check_new(name: str, t: torch.Tensor, tokens: int, cache: torch.Tensor) -> None:
    shape = [tokens, cache.shape[2], cache.shape[3]]
    check(
        _OP, list(t.shape) == shape,
        lambda: f"{name}: expected {shape}, tokens and the heads of {name}_cache, got shape {list(t.shape)}",
    )  # fmt: skip


def _rotation(cos, sin, positions, tokens: int, dim: int) -> dict[str, Any]:
    """The tables as a kernel takes them."""
    check(_OP, (cos is None) == (sin is None), lambda: "sin: expected it together with cos")
    if cos is None:
        check(_OP, positions is None, lambda: "positions: expected it together with cos and sin")
        none = dict.fromkeys(("half", "rows", "position_t", "cos_r", "cos_d", "sin_r", "sin_d", "HALF"), 0)
        return {"cos": None, "sin": None, "positions": None, "REST": 0, **none}
    check_like(_OP, "sin", sin, "cos", cos)
    half = cos.shape[-1] if cos.dim() == 2 else 0
    check(
        _OP, half >= 1 and 2 * half <= dim,
        lambda: f"cos: expected [positions, rotary_dim / 2] with a rotary_dim of at most {dim}, "
        f"got shape {list(cos.shape)}",
    )  # fmt: skip
    check(
        _OP, positions is not None or len(cos) == tokens,
        lambda: f"cos: expected a row for each of the {tokens} tokens, as there are no positions, "
        f"got shape {list(cos.shape)}",
    )  # fmt: skip
    if positions is not None:
        positions = _vector("positions", positions, tokens)
    rest = dim - 2 * half
    return {
        "cos": cos, "sin": sin, "positions": positions, "half": half, "rows": len(cos),
        "position_t": 0 if positions is None else positions.stride(0), "cos_r": cos.stride(0), "cos_d": cos.stride(1),
        "sin_r": sin.stride(0), "sin_d": sin.stride(1), "HALF": _power(half), "REST": _power(rest) if rest else 0,
    }  # fmt: skip


@in_triton("append_kv_cache_int8")
def append_kv_cache_int8(
    k, v, k_cache, v_cache, k_scale, v_scale, slots, cos, sin, positions, interleaved, heads_first
):  # fmt: skip
    caches, scales = checked_caches(_OP, "k", k, (k_cache, v_cache), (k_scale, v_scale), heads_first)
    tokens, heads = k.shape[0] if k.dim() == 3 else 0, caches[0].shape[2]
    if v.dtype != k.dtype:
        raise TypeError(f"genai_kernels.{_OP}: v: expected the dtype of k, {k.dtype}, got {v.dtype}")
    _check_new("k", k, tokens, caches[0])
    _check_new("v", v, tokens, caches[1])
    slots = _vector("slot_mapping", slots, tokens)
    dim, value_dim = (c.shape[3] for c in caches)
    rotation = _rotation(cos, sin, positions, tokens, dim)
    if not tokens * heads:
        return
    widest = _power(max(dim, value_dim))
    per_program = max(1, min(_power(heads), _TILE // widest))
    strides: dict[str, int] = {}
    for name, t in (("k", caches[0]), ("v", caches[1]), ("ks", scales[0]), ("vs", scales[1])):
        strides |= page_strides(name, t)
    for name, t in (("kx", k), ("vx", v)):
        strides |= dict(zip((f"{name}_t", f"{name}_h", f"{name}_d"), t.stride(), strict=True))
    append_kernel[(tokens, triton.cdiv(heads, per_program))](
        k, v, *caches, *scales, slots, heads=heads, dim=dim, value_dim=value_dim,
        places=caches[0].shape[0] * caches[0].shape[1], slot_t=slots.stride(0), HEADS=per_program, DIM=_power(dim),
        VALUE=_power(value_dim), BLOCK=caches[0].shape[1], ROTARY=cos is not None, INTERLEAVED=interleaved,
        HAS_POSITIONS=positions is not None, INT8=caches[0].dtype == torch.int8, **rotation, **strides,
    )  # fmt: skip


@in_triton("append_kv_cache")
def append_kv_cache(k, v, k_cache, v_cache, slots, cos, sin, positions, interleaved, heads_first):
    append_kv_cache_int8(k, v, k_cache, v_cache, None, None, slots, cos, sin, positions, interleaved, heads_first)
