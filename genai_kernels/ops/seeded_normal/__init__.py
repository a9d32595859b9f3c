"""seeded_normal: normal numbers of a seed for each sample, whatever the others in its batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...philox import normal
from ...registry import Make, Sample, op
from ...torch_ops import fake, kernel

__all__ = ["seeded_normal"]

_seeded_normal = kernel("seeded_normal")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/core/dtype.h


def _seeds(seed: int | torch.Tensor) -> torch.Tensor:
    return seed if isinstance(seed, torch.Tensor) else torch.tensor([seed], dtype=torch.int64)


def seeded_normal_reference(
    seed: int | torch.Tensor, shape: Sequence[int], *, offset: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The same in plain PyTorch."""
    seeds = _seeds(seed)
    return normal(seeds, math.prod(shape), offset, "plain", dtype).view(seeds.shape[0], *shape)


def _magnitude(seed, shape, *, offset=0, dtype=torch.float32):
    return seeded_normal_reference(seed, shape, offset=offset, dtype=torch.float64).abs()


def _call(m: Make, batch: int, *shape: int, offset: int = 0):
    return (m.ints(-(2**62), 2**62, (batch,), torch.int64), shape), {"offset": offset, "dtype": m.dtype}


SAMPLES = [
    Sample("plain", lambda m: _call(m, 3, 4, 9, 7)),
    Sample("largest_offset", lambda m: _call(m, 2, 130, offset=2**32 - 1)),
    Sample("several_pieces", lambda m: _call(m, 2, 9001)),
    Sample("one_element", lambda m: _call(m, 5, 1, offset=3)),
    Sample("strided", lambda m: ((m.ints(0, 99, (3, 2), torch.int64)[:, 1], (70,)), {"dtype": m.dtype})),
    Sample("no_sample", lambda m: _call(m, 0, 4)),
    Sample("no_element", lambda m: _call(m, 2, 0)),
    Sample("4x4x128x128", lambda m: _call(m, 4, 4, 128, 128), bench=True, elements=4.0 * 4 * 128 * 128),
]


@op(
    reference=seeded_normal_reference,
    samples=SAMPLES,
    magnitude=_magnitude,
    differentiable=False,
    gpu=("triton",),
    gpu_dtypes=(torch.int64,),
    overloads=("seeded_normal",),
)
def seeded_normal(
    seed: int | torch.Tensor,
    shape: Sequence[int],
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Normal numbers, a sample from each seed: the noise that a diffusion model starts from.

    A sample follows from its seed, its offset and its shape alone; the numbers of `cfg_step` and `gaussian_sample_kl`
    with the same seed and offset are others. Philox's words become normal numbers by Box and Muller's transform, in
    float32 (float64 for float64), and are rounded once; the largest possible one is 5.77.

    Args:
        seed: int64 `[batch]`, or an int for a batch of one.
        shape: of one sample.
        offset: of this draw from the seeds, in [0, 2^32).
        dtype: float32, float64, bfloat16 or float16.

    Returns:
        `[batch, *shape]`, on the device of the seeds. No gradient.

    Raises:
        ValueError: a shape or an offset that does not fit.
        TypeError: a dtype that does not fit.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011; Box and Muller, "A Note on the
    Generation of Random Normal Deviates", 1958. Peer: `torch.randn` with a generator for each sample.

    >>> import torch, genai_kernels as gk
    >>> a = gk.seeded_normal(torch.tensor([7, 8]), (4, 8, 8))
    >>> torch.equal(a[1:], gk.seeded_normal(8, (4, 8, 8)))
    True
    """
    seeds = _seeds(seed)
    if dtype not in _DTYPES:
        raise TypeError(
            f"genai_kernels.seeded_normal: dtype: expected float32, float64, bfloat16 or float16, got {dtype}"
        )
    if dtype == torch.float64 and seeds.is_cuda:  # for which there is no kernel
        return seeded_normal_reference(seeds, shape, offset=offset, dtype=dtype)
    out = _seeded_normal(seeds, math.prod(shape), offset, _DTYPES.index(dtype))
    return out.view(seeds.shape[0], *shape)


@fake("seeded_normal")
def _(seed, count, offset, dtype):
    return seed.new_empty((seed.shape[0], count), dtype=_DTYPES[dtype])
