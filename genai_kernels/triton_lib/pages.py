"""Paged caches as the launchers see them: shapes, dtypes and strides, in the words of csrc/host/pages.h."""

from __future__ import annotations

import torch

from . import check


def check_dtype(op: str, name: str, t: torch.Tensor, *dtypes: torch.dtype) -> None:
    if t.dtype not in dtypes:
        words = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"genai_kernels.{op}: {name}: expected {words}, got {str(t.dtype).removeprefix('torch.')}")


def _tokens_first(op: str, name: str, t: torch.Tensor, heads_first: bool) -> torch.Tensor:
    inner = "kv_heads, block_size" if heads_first else "block_size, kv_heads"
    shape = list(t.shape)
    check(op, t.dim() == 4, lambda: f"{name}: expected [num_blocks, {inner}, head_dim], got shape {shape}")
    check(
        op, t.shape[3] <= 1 or t.stride(3) == 1,
        lambda: f"{name}: expected stride 1 in the last dimension, got {t.stride(3)}",
    )  # fmt: skip
    t = t.transpose(1, 2) if heads_first else t
    check(op, t.shape[1] > 0, lambda: f"{name}: expected a block_size of at least 1, got shape {shape}")
    return t


def _scale(op: str, name: str, t: torch.Tensor | None, cache: torch.Tensor, heads_first: bool) -> torch.Tensor | None:
    if cache.dtype != torch.int8:
        check(op, t is None, lambda: f"{name}: expected None for a cache that is not int8")
        return None
    if t is None:
        raise ValueError(f"genai_kernels.{op}: {name}: expected the scales of an int8 cache, got None")
    check_dtype(op, name, t, torch.float32)
    shape = list(t.shape)
    check(
        op, t.shape == cache.shape[:3],
        lambda: f"{name}: expected the shape of its cache without the last dimension, got {shape}",
    )  # fmt: skip
    return t.transpose(1, 2) if heads_first else t


def checked_caches(
    op: str,
    like_name: str,
    like: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    heads_first: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The caches as [blocks, block_size, heads, dim], and their scales as [blocks, block_size, heads]; in the dtype of
    `like`, or int8.
    """
    k, v = (_tokens_first(op, n, t, heads_first) for n, t in zip(("k_cache", "v_cache"), caches, strict=True))
    if k.dtype not in (like.dtype, torch.int8):
        expected, got = (str(t.dtype).removeprefix("torch.") for t in (like, k))
        raise TypeError(
            f"genai_kernels.{op}: k_cache: expected the dtype of {like_name}, {expected}, or int8, got {got}"
        )
    if v.dtype != k.dtype:
        raise TypeError(f"genai_kernels.{op}: v_cache: expected the dtype of k_cache, {k.dtype}, got {v.dtype}")
    check(
        op, v.shape[:3] == k.shape[:3],
        lambda: f"v_cache: expected the shape of k_cache, {list(caches[0].shape)}, but for head_dim, "
        f"got {list(caches[1].shape)}",
    )  # fmt: skip
    given = zip(("k_scale", "v_scale"), scales, caches, strict=True)
    return [k, v], [_scale(op, name, t, cache, heads_first) for name, t, cache in given]


def page_strides(name: str, t: torch.Tensor | None) -> dict[str, int]:
    """Of [blocks, block_size, heads, ...]: a kernel's arguments `name`_p, _t and _h."""
    strides = (0, 0, 0) if t is None else t.stride()[:3]
    return dict(zip((f"{name}_p", f"{name}_t", f"{name}_h"), strides, strict=True))
