"""timestep_embedding: sines and cosines of a diffusion model's timesteps; timestep_embedding_table: of all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...registry import Accuracy, Make, Sample, op
from ...torch_ops import autograd, fake, kernel, no_double_backward
from .reference import magnitude as _magnitude
from .reference import timestep_embedding_reference

__all__ = ["TimestepTable", "timestep_embedding", "timestep_embedding_table"]

_timestep_embedding = kernel("timestep_embedding")
_timestep_embedding_bwd = kernel("timestep_embedding_bwd")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/core/dtype.h


def _call(m: Make, batch: int, dim: int, scale_of_time: float = 999.0, **options: Any):
    return (m(batch).abs().clamp_max(1) * scale_of_time, dim), options


SAMPLES = [
    Sample("plain", lambda m: _call(m, 5, 64)),
    Sample("compvis", lambda m: _call(m, 5, 320, flip_sin_to_cos=True, downscale_freq_shift=0.0)),
    Sample("odd", lambda m: _call(m, 4, 37)),
    Sample("odd_flipped", lambda m: _call(m, 4, 131, flip_sin_to_cos=True, downscale_freq_shift=0.5)),
    Sample("one_frequency", lambda m: _call(m, 3, 2, downscale_freq_shift=0.0)),
    Sample("no_frequency", lambda m: _call(m, 3, 1)),
    Sample("scale", lambda m: _call(m, 6, 96, scale_of_time=1.0, scale=1000.0)),
    Sample("period", lambda m: _call(m, 6, 50, scale_of_time=60.0, max_period=300)),
    Sample("negative", lambda m: ((m(7) * 20, 30), {"flip_sin_to_cos": True})),
    Sample("zero", lambda m: ((m(2) * 0, 24), {})),
    Sample("strided", lambda m: ((m(8, 3)[:, 1] * 50, 40), {})),
    Sample("expanded", lambda m: ((m(1).expand(5) * 50, 40), {})),
    Sample("no_timestep", lambda m: _call(m, 0, 16)),
    Sample("256x320", lambda m: _call(m, 256, 320, flip_sin_to_cos=True, downscale_freq_shift=0.0), bench=True,
           elements=256 * 320),
]  # fmt: skip


@op(
    reference=timestep_embedding_reference,
    samples=SAMPLES,
    accuracy=Accuracy(c_low=8.0),  # the results are float32 whatever the timesteps are
    magnitude=_magnitude,
    gpu=("triton",),
    gpu_dtypes=(*_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    overloads=("timestep_embedding", "timestep_embedding_bwd"),
)
def timestep_embedding(
    timesteps: torch.Tensor,
    dim: int,
    *,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1.0,
    scale: float = 1.0,
    max_period: float = 10000,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sines and cosines of timesteps at `dim // 2` frequencies: what a diffusion model knows the time by.

    With `w_i = scale * max_period^(-i / (dim // 2 - downscale_freq_shift))` a row is `sin(w t)`, then `cos(w t)`, or
    the other way round, then a zero where dim is odd. The defaults are DDPM's; `flip_sin_to_cos=True,
    downscale_freq_shift=0` is the convention of guided-diffusion, CompVis and Stable Diffusion.

    Angles are made in float64 and rounded only within one turn: an angle of 1000, rounded to float32 first as
    elsewhere, has an error of 3e-5, and so have the sines of PyTorch's composition.

    Args:
        timesteps: `[batch]`, floating or integer, any strides; differentiable where floating.
        dim: of a row.
        flip_sin_to_cos: cosines first.
        downscale_freq_shift: not `dim // 2`, at which every frequency would be NaN.
        scale: of the angles.
        max_period: of the slowest sine, but for the shift, in units of 2 pi; above 0.
        dtype: of the result; default float32, float64 for float64 timesteps.

    Returns:
        `[batch, dim]`.

    Raises:
        ValueError: a shape or number that does not fit.
        TypeError: a dtype that does not fit.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020; Vaswani et al., "Attention Is All You Need",
    2017.
    Peer: `diffusers.models.embeddings.get_timestep_embedding`.

    >>> import torch, genai_kernels as gk
    >>> gk.timestep_embedding(torch.tensor([0, 10]), 4, max_period=100)
    tensor([[ 0.0000,  0.0000,  1.0000,  1.0000],
            [-0.5440,  0.0998, -0.8391,  0.9950]])
    """
    if dtype is None:
        dtype = torch.float64 if timesteps.dtype == torch.float64 else torch.float32
    if dtype not in _DTYPES or timesteps.is_complex() or timesteps.dtype == torch.bool:
        wrong = "timesteps" if dtype in _DTYPES else "dtype"
        raise TypeError(
            f"genai_kernels.timestep_embedding: {wrong}: expected "
            + ("floating or integer numbers, got " if wrong == "timesteps" else "a floating dtype, got ")
            + str(timesteps.dtype if wrong == "timesteps" else dtype)
        )
    return _timestep_embedding(
        timesteps.to(torch.float64), dim, flip_sin_to_cos, float(downscale_freq_shift), float(scale),
        float(max_period), _DTYPES.index(dtype),
    )  # fmt: skip


class TimestepTable:
    """What a model makes of each timestep of a schedule, computed for all of them at once.

    Made by `timestep_embedding_table`. `table[i]` is row i, `[1, ...]` to be broadcast over a batch; `table[indices]`
    with an int64 tensor `[batch]` is `[batch, ...]`. A model that returns several tensors has a table of tuples.

    >>> import torch, genai_kernels as gk
    >>> table = gk.timestep_embedding_table([900, 500, 100], 6)
    >>> len(table), table[1].shape, table[torch.tensor([2, 2])].shape
    (3, torch.Size([1, 6]), torch.Size([2, 6]))
    """

    def __init__(self, rows: torch.Tensor | tuple[torch.Tensor, ...], count: int) -> None:
        for t in rows if isinstance(rows, tuple) else (rows,):
            if t.shape[:1] != (count,):
                raise ValueError(
                    f"genai_kernels.TimestepTable: rows: expected a row for each of {count} timesteps, "
                    f"got shape {list(t.shape)}"
                )
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | torch.Tensor) -> Any:
        if not isinstance(index, torch.Tensor) and not -self.count <= index < self.count:
            raise IndexError(f"genai_kernels.TimestepTable: index: expected 0 <= index < {self.count}, got {index}")

        def of(t: torch.Tensor) -> torch.Tensor:
            if isinstance(index, torch.Tensor):
                return t.index_select(0, index)
            return t.narrow(0, index % self.count, 1)

        return tuple(of(t) for t in self.rows) if isinstance(self.rows, tuple) else of(self.rows)


def timestep_embedding_table(
    timesteps: torch.Tensor | Sequence[float],
    dim: int,
    mlp: Callable[[torch.Tensor], Any] | None = None,
    *,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1.0,
    scale: float = 1.0,
    max_period: float = 10000,
    dtype: torch.dtype | None = None,
) -> TimestepTable:
    """The time embeddings of a whole schedule, and what a model's layers make of them, in one call of those.

    A sampler's steps are known before it starts. Every layer that sees the time alone (the time MLP, the projection of
    each ResNet block) then multiplies one matrix of all steps, once, instead of reading its weights at each step.
    Where the layers are `genai_kernels.linear`, a row has the bits that the step alone would have.

    Args:
        timesteps: of the steps, in their order.
        dim: of the embedding; with flip_sin_to_cos, downscale_freq_shift, scale, max_period and dtype as in
            `timestep_embedding`.
        mlp: called once with `[steps, dim]`; returns a tensor `[steps, ...]`, or a tuple or list of them. None: the
            embeddings themselves.

    Returns:
        A `TimestepTable`.

    Raises:
        ValueError: a result of `mlp` without a row for each step.

    >>> import torch, genai_kernels as gk
    >>> weight, bias = torch.randn(16, 8), torch.zeros(16)
    >>> table = gk.timestep_embedding_table([999, 499, 0], 8, lambda rows: gk.linear(rows, weight, bias).relu())
    >>> now = gk.linear(gk.timestep_embedding(torch.tensor([499]), 8), weight, bias).relu()
    >>> torch.equal(table[1], now)
    True
    """
    if not isinstance(timesteps, torch.Tensor):
        timesteps = torch.tensor(list(timesteps), dtype=torch.float64)
        dtype = dtype or torch.float32
    rows: Any = timestep_embedding(
        timesteps, dim, flip_sin_to_cos=flip_sin_to_cos, downscale_freq_shift=downscale_freq_shift, scale=scale,
        max_period=max_period, dtype=dtype,
    )  # fmt: skip
    if mlp is not None:
        rows = mlp(rows)
    return TimestepTable(tuple(rows) if isinstance(rows, (tuple, list)) else rows, timesteps.shape[0])


@fake("timestep_embedding")
def _(timesteps, dim, flip, shift, scale, max_period, dtype):
    return timesteps.new_empty((timesteps.shape[0], dim), dtype=_DTYPES[dtype])


@fake("timestep_embedding_bwd")
def _(dout, timesteps, flip, shift, scale, max_period):
    return timesteps.new_empty(timesteps.shape)


def _save(ctx, inputs, output):
    timesteps, _, *ctx.numbers, _ = inputs
    ctx.save_for_backward(timesteps)


def _backward(ctx, dout):
    (timesteps,) = ctx.saved_tensors
    return _timestep_embedding_bwd(dout.contiguous(), timesteps, *ctx.numbers), *(None,) * 6


autograd("timestep_embedding", _save, _backward)
no_double_backward("timestep_embedding_bwd", "timestep_embedding")
