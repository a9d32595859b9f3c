"""seeded_normal in Triton: a program makes 1024 numbers of a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check
from ...triton_lib.normal import normal_numbers
from ...triton_lib.samples import check_seeds, stride

_OP = "seeded_normal"
_TILE = 1024  # eight for each thread of four warps
_PLAIN = tl.constexpr(0x6E6F726D)  # NoiseStream of csrc/core/noise.h
_DTYPES = {0: torch.float32, 2: torch.bfloat16, 3: torch.float16}


@triton.jit
def numbers_kernel(seeds, out, seed_n, count, pieces, offset, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    n, first = item // pieces, item % pieces * BLOCK
    at = first + tl.arange(0, BLOCK)
    z = normal_numbers(tl.load(seeds + n * seed_n), offset, _PLAIN, first, BLOCK)
    tl.store(out + n * count + at, z.to(out.dtype.element_ty), mask=at < count)


@in_triton("seeded_normal")
def _seeded_normal(seed, count, offset, dtype):
    check(_OP, seed.dim() == 1, lambda: f"seed: expected [samples], got shape {list(seed.shape)}")
    check(_OP, count >= 0, lambda: f"shape: expected sizes of at least 0, got {count} elements")
    check_seeds(_OP, seed, seed.shape[0], offset)
    if dtype not in _DTYPES:
        raise TypeError(f"genai_kernels.{_OP}: dtype: expected float32, bfloat16 or float16 in Triton, got float64")
    out = seed.new_empty((seed.shape[0], count), dtype=_DTYPES[dtype])
    if out.numel() > 0:
        pieces = triton.cdiv(count, _TILE)
        numbers_kernel[(seed.shape[0] * pieces,)](seed, out, stride(seed), count, pieces, offset, BLOCK=_TILE)
    return out
