"""Tensors `[batch, ...]` as dense samples at any distance from each other, and the seeds of their noise."""

from __future__ import annotations

import torch

from . import check


def check_samples(op: str, like_name: str, like: torch.Tensor, given: dict[str, torch.Tensor | None]) -> None:
    """The shape of `like`, and no gap inside a sample, for each tensor that is given."""
    check(op, like.dim() >= 1, lambda: f"{like_name}: expected [batch, ...], got shape []")
    for name, t in given.items():
        if t is None:
            continue
        if t.shape != like.shape:
            shapes = list(like.shape), list(t.shape)
            raise ValueError(
                f"genai_kernels.{op}: {name}: expected the shape of {like_name}, {shapes[0]}, got {shapes[1]}"
            )
        if t.numel() > 0 and not t[0].is_contiguous():
            raise ValueError(
                f"genai_kernels.{op}: {name}: expected contiguous samples, got gaps or another order inside them; "
                "pass a copy (.contiguous())"
            )


def check_seeds(op: str, seeds: torch.Tensor | None, batch: int, offset: int) -> None:
    """One int64 for each sample, where seeds are given, and an offset that a word of Philox's counter holds."""
    if seeds is not None:
        if seeds.dtype != torch.int64:
            raise TypeError(f"genai_kernels.{op}: seed: expected int64, got {str(seeds.dtype).removeprefix('torch.')}")
        shape = list(seeds.shape)
        check(op, shape == [batch], lambda: f"seed: expected [{batch}], one for each sample, got shape {shape}")
    check(op, 0 <= offset < 2**32, lambda: f"offset: expected 0 <= offset < 2^32, got {offset}")


def stride(t: torch.Tensor | None) -> int:
    """From one sample to the next; 0 where there is one, or none."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)
