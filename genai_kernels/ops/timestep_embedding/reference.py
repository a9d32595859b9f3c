"""The eager twin of timestep_embedding, and the condition magnitude of its results."""

from __future__ import annotations

import math

import torch


def _angles(timesteps, dim, downscale_freq_shift, scale, max_period, compute):
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=compute, device=timesteps.device)
    return scale * (timesteps.to(compute)[:, None] * (exponent / (half - downscale_freq_shift)).exp())


def timestep_embedding_reference(
    timesteps: torch.Tensor,
    dim: int,
    *,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1.0,
    scale: float = 1.0,
    max_period: float = 10000,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch, in float32 (float64 for float64)."""
    compute = torch.float64 if torch.float64 in (timesteps.dtype, dtype) else torch.float32
    angles = _angles(timesteps, dim, downscale_freq_shift, scale, max_period, compute)
    parts = [angles.sin(), angles.cos()]
    out = torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=-1)
    return torch.nn.functional.pad(out, (0, dim % 2)).to(compute if dtype is None else dtype)


def magnitude(
    timesteps, dim, *, flip_sin_to_cos=False, downscale_freq_shift=1.0, scale=1.0, max_period=10000, dtype=None
):
    """|y|, and how far the error of an angle in float64 moves it, in units of float32's."""
    y = timestep_embedding_reference(
        timesteps, dim, flip_sin_to_cos=flip_sin_to_cos, downscale_freq_shift=downscale_freq_shift, scale=scale,
        max_period=max_period, dtype=dtype,
    )  # fmt: skip
    angles = _angles(timesteps, dim, downscale_freq_shift, scale, max_period, torch.float64).abs()
    unit = 1.0 if dtype == torch.float64 else 2.0**-29
    return y.abs() + torch.nn.functional.pad(torch.cat([angles, angles], dim=-1), (0, dim % 2)) * unit
