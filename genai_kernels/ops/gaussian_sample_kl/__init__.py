"""gaussian_sample_kl: a VAE's latents from their distribution, and its divergence from the normal one, in one pass."""

from __future__ import annotations

from typing import Any

import torch

from ...registry import Make, Sample, op
from ...torch_ops import autograd, fake, kernel, no_double_backward
from .reference import Pair, gaussian_sample_kl_reference
from .reference import magnitude as _magnitude

__all__ = ["gaussian_sample_kl"]

_gaussian_sample_kl = kernel("gaussian_sample_kl")
_gaussian_sample_kl_bwd = kernel("gaussian_sample_kl_bwd")


def _call(m: Make, shape: tuple[int, ...], scale: float = 1.5, seeds: bool = True, **options: Any):
    if seeds:
        options["seed"] = m.ints(-(2**62), 2**62, shape[:1], torch.int64)
    else:
        options["noise"] = m(*shape)
    return (m(*shape), m(*shape, scale=scale)), options


def _moments(m: Make, batch: int, channels: int, *pixels: int):
    """Both halves of one tensor, as an encoder makes them."""
    mean, logvar = m(batch, 2 * channels, *pixels).chunk(2, dim=1)
    return (mean, logvar), {"seed": m.ints(0, 2**62, (batch,), torch.int64)}


SAMPLES = [
    Sample("plain", lambda m: _call(m, (3, 4, 6, 5), offset=9)),
    Sample("given_noise", lambda m: _call(m, (3, 4, 6, 5), seeds=False)),
    Sample("moments", lambda m: _moments(m, 2, 4, 7, 9)),
    Sample("clamped", lambda m: _call(m, (2, 300), scale=5.0, logvar_range=(-4.0, 3.0))),
    Sample("clamped_above_0", lambda m: _call(m, (2, 37), logvar_range=(0.5, 3.0))),
    Sample("several_pieces", lambda m: _call(m, (2, 3, 41, 37))),
    Sample("near_normal", lambda m: _call(m, (4, 200), scale=1e-2)),
    Sample("one_element", lambda m: _call(m, (5, 1))),
    Sample("no_pixels", lambda m: _call(m, (6,))),
    Sample("channels_last", lambda m: (lambda args, options: (
        tuple(t.contiguous(memory_format=torch.channels_last) for t in args), options))(*_call(m, (2, 5, 6, 7)))),
    Sample("expanded", lambda m: ((m(1, 90).expand(3, 90), m(3, 2, 90)[:, 1]),
                                  {"seed": m.ints(0, 99, (3,), torch.int64)})),
    Sample("no_sample", lambda m: _call(m, (0, 4, 5))),
    Sample("no_element", lambda m: _call(m, (2, 0))),
    Sample("8x4x64x64", lambda m: _call(m, (8, 4, 64, 64), seeds=False), bench=True, elements=4.0 * 8 * 4 * 64 * 64,
           backward_elements=7.0 * 8 * 4 * 64 * 64),
]  # fmt: skip


def _dense(t: torch.Tensor) -> torch.Tensor:
    """t with each of its samples contiguous."""
    step = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return t.contiguous()
        step *= size
    return t


@op(
    reference=gaussian_sample_kl_reference,
    samples=SAMPLES,
    magnitude=_magnitude,
    gpu=("triton",),
    overloads=("gaussian_sample_kl", "gaussian_sample_kl_bwd"),
)
def gaussian_sample_kl(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    logvar_range: tuple[float, float] = (-30.0, 20.0),
) -> Pair:
    """A VAE's latents and their divergence: `z = mean + exp(logvar / 2) * noise`, `KL(N(mean, var) || N(0, 1))`.

    The divergence of a sample is the sum of `(mean^2 + var - 1 - logvar) / 2` over its elements, added in float64 in a
    fixed order. Computed in float32 (float64 for float64), z rounded once. Noise from a seed is made again in the
    backward instead of being kept.

    Args:
        mean, logvar: `[batch, ...]`, float32, bfloat16, float16 or float64; both halves of an encoder's output are read
            where they are. Samples that are not contiguous are copied first.
        noise: like mean, differentiable; None draws it from the seeds.
        seed: int64 `[batch]`, or an int for a batch of one; None draws them from PyTorch's generator. A sample's noise
            does not depend on its batch.
        offset: of this draw from the seeds, in [0, 2^32).
        logvar_range: what logvar is clamped to; diffusers' is the default. No gradient beyond.

    Returns:
        `(z, kl)`: like mean; `[batch]`, float32, or float64 for float64.

    Raises:
        ValueError: a shape or a number that does not fit; both a seed and noise.
        TypeError: a dtype that does not fit.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013.
    Peer: diffusers' `DiagonalGaussianDistribution.sample` and `.kl`.

    >>> import torch, genai_kernels as gk
    >>> z, kl = gk.gaussian_sample_kl(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), noise=torch.tensor([[0.5, -1.0]]))
    >>> z, kl
    (tensor([[ 1.5000, -1.0000]]), tensor([0.5000]))
    """
    if noise is None and not isinstance(seed, torch.Tensor):
        if seed is None:
            seed = torch.randint(2**63 - 1, mean.shape[:1], device=mean.device)  # nothing waits for the device
        elif mean.dim() > 0 and mean.shape[0] != 1:
            raise ValueError(
                f"genai_kernels.gaussian_sample_kl: seed: expected int64 [{mean.shape[0]}], one for each sample: "
                f"with one for all, every sample would have the same noise, got {seed}"
            )
        else:
            seed = torch.tensor([seed], dtype=torch.int64, device=mean.device)
    elif noise is not None and isinstance(seed, int):
        seed = torch.tensor([seed], dtype=torch.int64, device=mean.device)  # refused beside noise
    least, most = logvar_range
    return _gaussian_sample_kl(
        _dense(mean), _dense(logvar), None if noise is None else _dense(noise), seed, offset, float(least), float(most)
    )


@fake("gaussian_sample_kl")
def _(mean, logvar, noise, seed, offset, least, most):
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape[:1], dtype=dtype)


@fake("gaussian_sample_kl_bwd")
def _(mean, logvar, dz, dkl, noise, seed, offset, least, most, noise_grad):
    dnoise = mean.new_empty(mean.shape if noise is not None and noise_grad else 0)
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape), dnoise


def _save(ctx, inputs, output):
    mean, logvar, noise, seed, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mean, logvar, noise, seed)


def _backward(ctx, dz, dkl):
    if dz is None and dkl is None:
        return (None,) * 7
    noise_grad = ctx.needs_input_grad[2]
    mean, logvar, noise, seed = ctx.saved_tensors
    dz = None if dz is None else _dense(dz)
    dmean, dlogvar, dnoise = _gaussian_sample_kl_bwd(mean, logvar, dz, dkl, noise, seed, *ctx.numbers, noise_grad)
    return dmean, dlogvar, dnoise if noise_grad else None, None, None, None, None


autograd("gaussian_sample_kl", _save, _backward)
no_double_backward("gaussian_sample_kl_bwd", "gaussian_sample_kl")
