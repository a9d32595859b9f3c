"""cfg_step: one step of a diffusion sampler in one pass; see README.md for what it reads and how noise is numbered."""

from __future__ import annotations

import torch

from ...registry import op
from ...torch_ops import fake, kernel
from .coefficients import StepCoefficients
from .reference import cfg_step_reference
from .reference import magnitude as _magnitude
from .samples import SAMPLES

__all__ = ["StepCoefficients", "cfg_step"]

_cfg_step = kernel("cfg_step")


def _dense(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """t broadcast over the batch, each of its samples contiguous."""
    if t is None or (t.is_contiguous() and t.shape == like.shape):
        return t
    if t.dim() == like.dim() and t.dim() > 0 and t.shape[0] == 1:
        t = t.expand(like.shape[0], *t.shape[1:])
    step = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return t.contiguous()
        step *= size
    return t


def _dense_mask(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """`[1 or batch, 1 or channels, ...]`, contiguous over the pixels."""
    if mask is None or mask.dim() > x.dim():
        return mask
    mask = mask.reshape(*(1,) * (x.dim() - mask.dim()), *mask.shape)
    if mask.shape[2:] != x.shape[2:]:
        mask = mask.expand(*mask.shape[:2], *x.shape[2:])
    return mask.contiguous()


@op(
    reference=cfg_step_reference,
    samples=SAMPLES,
    magnitude=_magnitude,
    differentiable=False,
    gpu=("triton",),
    overloads=("cfg_step",),
)
def cfg_step(
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
    """One step of a diffusion sampler: guidance, the scheduler's update, clipping, noise, in-filling, in one pass.

    The model's output m is guided, `uncond + guidance_scale * (model_output - uncond)`, and with a guidance_rescale r
    multiplied by `r std(model_output) / std(m) + 1 - r`, with the deviations of each sample: they cost a second read of
    the two outputs, in cache for latents. Then what `StepCoefficients` says: every scheduler of
    `genai_kernels.diffusion` is such numbers. Computed in float32 (float64 for float64), rounded once.

    Noise is given, or comes from a seed for each sample: a sample's numbers follow from its seed, `offset` and their
    place in the sample, never from its batch. In-filling replaces the known part of the result by what it would be at
    that level of noise, with noise of its own.

    Args:
        x: `[batch, ...]`, float32, bfloat16, float16 or float64. Samples that are not contiguous are copied first, here
            and in the other tensors.
        model_output: shape of x; dtype of x, or bfloat16 or float16 beside an x in float32.
        coefficients: of the step.
        uncond: the model's output without the condition; shape and dtype of model_output.
        guidance_scale: of classifier-free guidance; others than 1 need `uncond`.
        guidance_rescale: 0 to 1; others than 0 need `uncond`.
        previous_x0: x0 of the step before, where the scheduler needs it (DPM-Solver++ 2M); like x.
        noise: like x; None draws it from the seed, where the step has noise.
        seed: int64 `[batch]`, or an int for a batch of one; None draws seeds from PyTorch's generator if it must.
        offset: of this step's draw from the seeds, in [0, 2^32), such as the index of the step. Two steps need two.
        known: like x, without noise: what the picture is where it is known.
        mask: bool or dtype of x, broadcast to x: 1 where the sampler paints, 0 where `known` is kept, between them a
            blend. Where it is 1 or 0, the part that is not wanted may hold anything.
        known_noise: like x; None draws it from the seed, where the step's known part has noise.
        return_x0: also return the (clipped) prediction of x0.

    Returns:
        The next x; with return_x0 `(next, x0)`. Like x, contiguous. No gradient: `use_backend("reference")` has one.

    Raises:
        ValueError: a shape that does not fit; something missing that this step needs.
        TypeError: a dtype that does not fit.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022; Lin et al., "Common Diffusion Noise Schedules
    and Sample Steps are Flawed", 2023 (rescale); Lugmayr et al., "RePaint", 2022 (in-filling).
    Peer: the `step` of diffusers' schedulers after its pipelines' guidance.

    >>> import torch, genai_kernels as gk
    >>> step = gk.StepCoefficients(x0_from_x=2.0, x0_from_model=-1.0, clip=1.0, x0=0.5, model=0.5)
    >>> x, cond, uncond = torch.tensor([[1.0, 0.2]]), torch.tensor([[0.4, 0.1]]), torch.tensor([[0.2, 0.1]])
    >>> gk.cfg_step(x, cond, step, uncond=uncond, guidance_scale=3.0)
    tensor([[0.9000, 0.2000]])
    >>> gk.cfg_step(x, cond, step, known=torch.zeros(1, 2), mask=torch.tensor([[True, False]]))
    tensor([[0.7000, 0.0000]])
    """
    seeds = seed
    c = coefficients
    if seed is None and ((c.noise and noise is None) or (known is not None and c.known_noise and known_noise is None)):
        seeds = torch.randint(2**63 - 1, x.shape[:1], device=x.device)  # drawn there: nothing waits for the device
    elif seed is not None and not isinstance(seed, torch.Tensor):
        if x.dim() > 0 and x.shape[0] != 1:
            raise ValueError(
                f"genai_kernels.cfg_step: seed: expected int64 [{x.shape[0]}], one for each sample: with one for all, "
                f"every sample would have the same noise, got {seed}"
            )
        seeds = torch.tensor([seed], dtype=torch.int64, device=x.device)
    x = _dense(x, x)  # type: ignore[assignment]
    result, x0 = _cfg_step(
        x, _dense(model_output, x), _dense(uncond, x), _dense(previous_x0, x), _dense(noise, x), seeds,
        _dense(known, x), _dense_mask(mask, x), _dense(known_noise, x), offset, float(guidance_scale),
        float(guidance_rescale), *(float(number) for number in c), return_x0,
    )  # fmt: skip
    return (result, x0) if return_x0 else result


@fake("cfg_step")
def _(x, model_output, uncond, previous_x0, noise, seed, known, mask, known_noise, *numbers):
    return x.new_empty(x.shape), x.new_empty(x.shape if numbers[-1] else 0)
