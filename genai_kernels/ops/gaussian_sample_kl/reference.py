"""The eager twin of gaussian_sample_kl, and the condition magnitudes of its results."""

from __future__ import annotations

import torch

from ...philox import normal

Pair = tuple[torch.Tensor, torch.Tensor]


def _noise(mean, noise, seed, offset):
    if noise is not None:
        return noise
    if seed is None:
        seed = torch.randint(2**63 - 1, mean.shape[:1])
    seeds = seed if isinstance(seed, torch.Tensor) else torch.tensor([seed])
    return normal(seeds.to(mean.device), mean[:1].numel(), offset, "latent", mean.dtype).view(mean.shape)


def gaussian_sample_kl_reference(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    logvar_range: tuple[float, float] = (-30.0, 20.0),
) -> Pair:
    """The same in plain PyTorch, in the dtype of mean."""
    logvar = logvar.clamp(*logvar_range)
    z = mean + (0.5 * logvar).exp() * _noise(mean, noise, seed, offset)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1 if mean.dim() > 1 else 0)
    kl = kl.sum(dim=1) if mean.dim() > 1 else kl
    return z, kl.to(torch.float64 if mean.dtype == torch.float64 else torch.float32)


def magnitude(mean, logvar, *, noise=None, seed=None, offset=0, logvar_range=(-30.0, 20.0)):
    """The sums of the terms' sizes; the error of an exponential also grows with what it is of."""
    logvar = logvar.clamp(*logvar_range)
    deviation = (0.5 * logvar).exp() * (1 + 0.5 * logvar.abs() / 8)
    z = mean.abs() + deviation * _noise(mean, noise, seed, offset).abs()
    terms = mean.square() + logvar.exp() * (1 + logvar.abs() / 8) + 1 + logvar.abs()
    return z, 0.5 * (terms.flatten(1).sum(dim=1) if mean.dim() > 1 else terms)
