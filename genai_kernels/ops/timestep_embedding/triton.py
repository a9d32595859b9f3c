"""timestep_embedding in Triton: the angle in float64 as on the CPU, its sine and cosine in float32.

The numbers of the frequencies are compiled into the kernel: they are a model's, and Triton passes floats as float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check
from ...triton_lib.normal import of_quarter, sincos_of_quarters

_OP = "timestep_embedding"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/core/dtype.h
_TILE = 128  # frequencies of a program, one a lane: those of most models


@triton.jit
def turns_of(i, STEP: tl.constexpr, FACTOR: tl.constexpr):
    """Of one unit of time, at frequency i."""
    return tl.exp(i.to(tl.float64) * STEP) * FACTOR


@triton.jit
def sincos(time, turns, FINE: tl.constexpr):
    """The rest of a quarter of a turn is rounded (unless FINE), not that of a turn: near the zeros of a sine its
    relative error would be large.
    """
    turn = time * turns
    turn = turn - tl.floor(turn + 0.5)
    quarters = tl.floor(4 * turn + 0.5)
    rest = turn - 0.25 * quarters
    if FINE:
        angle = rest * 6.283185307179586477
        return of_quarter(quarters.to(tl.int32), tl.sin(angle), tl.cos(angle))
    return sincos_of_quarters(quarters.to(tl.int32), rest.to(tl.float32))


@triton.jit
def embed_kernel(
    timesteps, out, timestep_n, dim, half, STEP: tl.constexpr, FACTOR: tl.constexpr, COSINES_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    time = tl.load(timesteps + n * timestep_n)
    sin, cos = sincos(time, turns_of(i, STEP, FACTOR), out.dtype.element_ty == tl.float64)
    row = out + n * dim
    tl.store(row + i, (cos if COSINES_FIRST else sin).to(out.dtype.element_ty), mask=i < half)
    tl.store(row + half + i, (sin if COSINES_FIRST else cos).to(out.dtype.element_ty), mask=i < half)
    tl.store(row + 2 * half + i, tl.zeros((BLOCK,), out.dtype.element_ty), mask=2 * half + i < dim)


@triton.jit
def embed_bwd_kernel(
    dout, timesteps, dtimesteps, timestep_n, dim, half, STEP: tl.constexpr, FACTOR: tl.constexpr,
    COSINES_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d time = sum over frequencies w of w (cos dsin - sin dcos), in float64."""
    n = tl.program_id(0).to(tl.int64)
    time = tl.load(timesteps + n * timestep_n)
    row = dout + n * dim
    FINE: tl.constexpr = dout.dtype.element_ty == tl.float64
    compute: tl.constexpr = tl.float64 if FINE else tl.float32
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, half, BLOCK):
        i = first + tl.arange(0, BLOCK)
        turns = turns_of(i, STEP, FACTOR)
        sin, cos = sincos(time, turns, FINE)
        one = tl.load(row + i, mask=i < half, other=0.0).to(compute)
        other = tl.load(row + half + i, mask=i < half, other=0.0).to(compute)
        slope = cos * (other if COSINES_FIRST else one) - sin * (one if COSINES_FIRST else other)
        total += tl.where(i < half, slope.to(tl.float64) * (turns * 6.283185307179586477), 0.0)
    tl.store(dtimesteps + n, tl.sum(total, 0))


def _numbers(timesteps, dim, cosines_first, shift, scale, max_period):
    """What the kernels are compiled for."""
    if timesteps.dtype != torch.float64:
        raise TypeError(f"genai_kernels.{_OP}: timesteps: expected float64, got {timesteps.dtype}")
    check(_OP, timesteps.dim() == 1, lambda: f"timesteps: expected [batch], got shape {list(timesteps.shape)}")
    check(_OP, dim >= 1, lambda: f"dim: expected at least 1, got {dim}")
    check(_OP, max_period > 0, lambda: f"max_period: expected more than 0, got {max_period}")
    half = dim // 2
    check(_OP, half == 0 or half != shift, lambda: (
        f"downscale_freq_shift: expected another number than {half}, the half of dim, which it is taken from, "
        f"got {shift}"))  # fmt: skip
    step = -math.log(max_period) / (half - shift) if half else 0.0
    return {"STEP": step, "FACTOR": scale / (2 * math.pi), "COSINES_FIRST": bool(cosines_first), "BLOCK": _TILE}


@in_triton("timestep_embedding", float64=True)
def _timestep_embedding(timesteps, dim, cosines_first, shift, scale, max_period, dtype):
    numbers = _numbers(timesteps, dim, cosines_first, shift, scale, max_period)
    batch, half = timesteps.shape[0], dim // 2
    out = timesteps.new_empty((batch, dim), dtype=_DTYPES[dtype])
    if out.numel() > 0:
        grid = (batch, triton.cdiv(max(half, 1), _TILE))
        embed_kernel[grid](timesteps, out, timesteps.stride(0), dim, half, **numbers, num_warps=4)
    return out


@in_triton("timestep_embedding_bwd", float64=True)
def _timestep_embedding_bwd(dout, timesteps, cosines_first, shift, scale, max_period):
    fits = dout.dim() == 2 and timesteps.dim() == 1 and dout.shape[0] == timesteps.shape[0] and dout.is_contiguous()
    check(_OP, fits, lambda: f"dout: expected a contiguous [batch, dim], got shape {list(dout.shape)}")
    numbers = _numbers(timesteps, dout.shape[1], cosines_first, shift, scale, max_period)
    dtimesteps = timesteps.new_empty(timesteps.shape)
    if timesteps.numel() > 0:
        embed_bwd_kernel[(timesteps.shape[0],)](
            dout, timesteps, dtimesteps, timesteps.stride(0), dout.shape[1], dout.shape[1] // 2, **numbers, num_warps=4
        )
    return dtimesteps
