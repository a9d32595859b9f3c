"""Samples and benchmark cases of cfg_step."""

from __future__ import annotations

from typing import Any

import torch

from ...registry import Make, Sample
from .coefficients import StepCoefficients

DDPM = StepCoefficients(x0_from_x=1.31, x0_from_model=-0.85, clip=1.0, x=0.93, x0=0.054, noise=0.21, known=0.8,
                        known_noise=0.6)  # fmt: skip
DDIM = StepCoefficients(x0_from_x=1.31, x0_from_model=-0.85, model=0.41, x0=0.91, known=0.91, known_noise=0.41)
EULER = StepCoefficients(x0_from_x=1.0, x0_from_model=-7.3, x=1.0, model=-1.9, known_noise=5.4)
SECOND_ORDER = StepCoefficients(x0_from_x=0.77, x0_from_model=-0.64, x=0.71, x0=0.62, previous_x0=-0.17)


def call(m: Make, shape: tuple[int, ...], step: StepCoefficients, **options: Any):
    """A step of random samples."""
    return (m(*shape), m(*shape), step), options


def seeds(m: Make, batch: int) -> torch.Tensor:
    return m.ints(-(2**62), 2**62, (batch,), torch.int64)


def guided(m: Make, shape: tuple[int, ...], step: StepCoefficients, scale: float, rescale: float = 0.0, **options: Any):
    """The same with both halves of a batch that the model saw at once."""
    both = m(2 * shape[0], *shape[1:])
    both = both * 0.3 + both[shape[0] :].repeat(2, *(1,) * (len(shape) - 1))
    options |= {"uncond": both[: shape[0]], "guidance_scale": scale, "guidance_rescale": rescale}
    return (m(*shape), both[shape[0] :], step), options


def masked(m: Make, shape: tuple[int, ...], kind: str) -> dict[str, Any]:
    """Known pixels, and which they are."""
    batch, channels = (shape[0] if "batch" in kind else 1), (shape[1] if "channel" in kind else 1)
    mask = m.mask(batch, channels, *shape[2:], keep=0.6)
    if "soft" in kind:
        soft = (m(batch, channels, *shape[2:]) * 0.4 + 0.5).clamp(0, 1)
        mask = torch.where(mask, soft, soft.round())
    elif "bool" not in kind:
        mask = mask.to(m.dtype)
    return {"known": m(*shape), "mask": mask}


def _wide(m: Make, shape: tuple[int, ...], step: StepCoefficients, **options: Any):
    """x in float32 beside a model in m's dtype."""
    (_, model, _), options = guided(m, shape, step, 3.0, 0.7, **options)
    return (m.float32(*shape), model, step), options


SHAPE = (3, 4, 9, 7)
SAMPLES = [
    Sample("ddpm", lambda m: call(m, SHAPE, DDPM, seed=seeds(m, 3), offset=17)),
    Sample("ddpm_given_noise", lambda m: call(m, SHAPE, DDPM, noise=m(*SHAPE), return_x0=True)),
    Sample("ddim", lambda m: call(m, SHAPE, DDIM, return_x0=True)),
    Sample("euler", lambda m: call(m, SHAPE, EULER)),
    Sample("ancestral", lambda m: call(m, SHAPE, EULER._replace(noise=3.1), seed=seeds(m, 3))),
    Sample("second_order", lambda m: call(m, SHAPE, SECOND_ORDER, previous_x0=m(*SHAPE), return_x0=True)),
    Sample("sample_prediction", lambda m: call(m, SHAPE, StepCoefficients(x0_from_model=1.0, x=0.3, x0=0.7))),
    Sample("guided", lambda m: guided(m, SHAPE, DDIM, 7.5)),
    Sample("guided_rescaled", lambda m: guided(m, SHAPE, DDPM, 7.5, 0.7, seed=seeds(m, 3), return_x0=True)),
    Sample("rescaled_long", lambda m: guided(m, (2, 3, 61, 59), EULER, 5.0, 1.0)),
    Sample("rescaled_around_5", lambda m: (lambda args, options: (
        (args[0], args[1] + 5, args[2]), {**options, "uncond": options["uncond"] + 5}))(
            *guided(m, (2, 5000), DDIM, 2.0, 0.5))),
    Sample("in_fill", lambda m: call(m, SHAPE, DDPM, seed=seeds(m, 3), offset=2**32 - 1, **masked(m, SHAPE, "batch"))),
    Sample("in_fill_bool", lambda m: call(m, SHAPE, DDIM, seed=seeds(m, 3), **masked(m, SHAPE, "bool"))),
    Sample("in_fill_channels", lambda m: call(m, SHAPE, EULER, known_noise=m(*SHAPE),
                                              **masked(m, SHAPE, "batch channel"))),
    Sample("in_fill_soft", lambda m: guided(m, SHAPE, DDIM, 3.0, 0.3, known_noise=m(*SHAPE),
                                            **masked(m, SHAPE, "channel soft"))),
    Sample("several_pieces", lambda m: call(m, (2, 9001), DDPM, seed=seeds(m, 2))),
    Sample("float32_x", lambda m: _wide(m, SHAPE, DDPM, seed=seeds(m, 3))),
    Sample("one_element", lambda m: call(m, (4, 1), DDPM, seed=seeds(m, 4))),
    Sample("no_pixels", lambda m: call(m, (5,), DDPM, noise=m(5))),
    Sample("int_seed", lambda m: call(m, (1, 130), DDPM, seed=-5)),
    Sample("channels_last", lambda m: (lambda args, options: (
        (args[0], args[1].contiguous(memory_format=torch.channels_last), args[2]), options))(
            *call(m, SHAPE, DDPM, noise=m(3, 9, 7, 4).movedim(-1, 1)))),
    Sample("expanded", lambda m: ((m(1, 70).expand(3, 70), m(3, 2, 70)[:, 1], DDPM), {"seed": seeds(m, 3)})),
    Sample("no_sample", lambda m: call(m, (0, 4, 5), DDPM, seed=seeds(m, 0))),
    Sample("no_element", lambda m: call(m, (2, 0), DDIM)),
]  # fmt: skip


def _bench(name: str, tensors: int, build: Any) -> Sample:
    shape = (4, 4, 128, 128)  # SDXL's latents of four images
    return Sample(name, lambda m: build(m, shape), bench=True, elements=float(tensors * 4 * 4 * 128 * 128))


SAMPLES += [
    _bench("ddim_guided", 4, lambda m, s: guided(m, s, DDIM, 7.5)),
    _bench("ddim_rescaled", 4, lambda m, s: guided(m, s, DDIM, 7.5, 0.7)),
    _bench("ddpm", 4, lambda m, s: call(m, s, DDPM, noise=m(*s))),
    _bench("second_order_guided", 6, lambda m, s: guided(m, s, SECOND_ORDER, 7.5, previous_x0=m(*s), return_x0=True)),
    _bench("in_fill", 5, lambda m, s: call(m, s, DDIM, known_noise=m(*s), **masked(m, s, "batch"))),
]
