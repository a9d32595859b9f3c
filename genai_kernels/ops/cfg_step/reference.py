"""The eager twin of cfg_step, and the condition magnitude of its results."""

from __future__ import annotations

import torch

from ...philox import normal
from .coefficients import StepCoefficients


def per_sample(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`[batch]`, to be multiplied with x."""
    return values.view(-1, *(1,) * (x.dim() - 1))


def _deviation(t: torch.Tensor) -> torch.Tensor:
    return per_sample(t, t.flatten(1).std(dim=1)) if t.dim() > 1 else t * float("nan")


def guided_output(model_output, uncond, guidance_scale, guidance_rescale):
    """Classifier-free guidance, and its output brought back to the deviation of the conditional one."""
    if uncond is None:
        return model_output
    m = uncond + guidance_scale * (model_output - uncond)
    if guidance_rescale == 0:
        return m
    rescaled = m * (_deviation(model_output) / _deviation(m))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * m


def drawn(x: torch.Tensor, seed: int | torch.Tensor | None, offset: int, stream: str) -> torch.Tensor:
    """Noise of the shape and dtype of x from the seeds."""
    if seed is None:
        seed = torch.randint(2**63 - 1, x.shape[:1])
    seeds = seed if isinstance(seed, torch.Tensor) else torch.tensor([seed])
    return normal(seeds.to(x.device), x[:1].numel(), offset, stream, x.dtype).view(x.shape)


def cfg_step_reference(
    x: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: StepCoefficients,
    *,
    uncond: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    previous_x0: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    known_noise: torch.Tensor | None = None,
    return_x0: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, in the dtype of x."""
    c = coefficients
    m = guided_output(model_output, uncond, guidance_scale, guidance_rescale).to(x.dtype)
    x0 = c.x0_from_model * m
    if c.x0_from_x:
        x0 = c.x0_from_x * x + x0
    x0 = x0.clamp(-c.clip, c.clip)
    y = torch.zeros_like(x)
    # in the order of the kernel; a term whose number is 0 is left out
    for number, term in ((c.x, x), (c.model, m), (c.x0, x0), (c.previous_x0, previous_x0)):
        if number:
            assert term is not None
            y = y + number * term
    if c.noise:
        y = y + c.noise * (drawn(x, seed, offset, "step") if noise is None else noise)
    if known is not None:
        assert mask is not None
        k = c.known * known
        if c.known_noise:
            k = k + c.known_noise * (drawn(x, seed, offset, "known") if known_noise is None else known_noise)
        share = mask.to(x.dtype).expand(x.shape)
        y = torch.where(share == 0, k, torch.where(share == 1, y, k + share * (y - k)))
    return (y, x0) if return_x0 else y


def magnitude(
    x, model_output, coefficients, *, uncond=None, guidance_scale=1.0, guidance_rescale=0.0, previous_x0=None,
    noise=None, seed=None, offset=0, known=None, mask=None, known_noise=None, return_x0=False,
):  # fmt: skip
    """The sum of the terms' sizes."""
    c = coefficients
    m = model_output.abs()
    if uncond is not None:
        m = uncond.abs() + abs(guidance_scale) * (m + uncond.abs())
        if guidance_rescale:
            guided = uncond + guidance_scale * (model_output - uncond)
            m = m * (guidance_rescale * _deviation(model_output) / _deviation(guided) + abs(1 - guidance_rescale))
    x0 = abs(c.x0_from_model) * m + abs(c.x0_from_x) * x.abs()
    y = abs(c.x) * x.abs() + abs(c.model) * m + abs(c.x0) * x0
    if c.previous_x0:
        y = y + abs(c.previous_x0) * previous_x0.abs()
    if c.noise:
        z = drawn(x, seed, offset, "step") if noise is None else noise
        # of numbers drawn in float32, each is a product with a cosine, whose own error is below its ULP
        y = y + abs(c.noise) * z.abs()
    if known is not None:
        k = abs(c.known) * known.abs()
        if c.known_noise:
            k = k + abs(c.known_noise) * (drawn(x, seed, offset, "known") if known_noise is None else known_noise).abs()
        y = y + k
    return (y, x0) if return_x0 else y
