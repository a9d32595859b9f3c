"""Diffusion models: noise schedules, the loss, and the ways back from noise to a picture.

A picture x0 becomes `x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise`; a model learns from x_t what the noise is, or, what is
the same where nothing is lost, v (see `Schedule`). Going back, a step takes x_t to a smaller t with what the model
finds: DDPM adds noise again, DDIM does not (Ho et al., 2020; Song et al., 2020). A model of this file is also told what
is known of a picture: its input is x_t, with the known parts as they are, and a mask; with an empty mask it is an
ordinary diffusion model. So one model paints whole pictures, fills holes, and gives colours.
`python -m python_models.diffusion --help` trains, samples and measures them.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

import genai_kernels as gk
from genai_kernels.diffusion import DDIM
from python_models.diffusion_masks import smooth_fill

SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
TARGETS = {"noise": "epsilon", "v": "v_prediction"}


@dataclass(frozen=True)
class Schedule:
    """How much of a picture is left after each of the steps by which noise is added, and what a model makes of that.

    Attributes:
        name: "cosine" (Nichol and Dhariwal, 2021) or "linear" (Ho et al., 2020: rates from 0.1 / steps to 20 / steps).
        steps: how many; after the last, next to nothing is left.
        target: what a model is to find: the "noise", or "v", `sqrt(a) noise - sqrt(1 - a) x0` (Salimans and Ho, 2022):
            where there is hardly anything but noise, that is the picture, which is often known from its surroundings.
        relative: a model paints what a picture has beyond a smooth continuation of what is known (`smooth_fill`), which
            it sees too: so that a photograph's levels, which a network with norms hardly sees, need not be learnt.
    """

    name: str = "cosine"
    steps: int = 1000
    target: str = "v"
    relative: bool = False

    def __post_init__(self) -> None:
        for field, known in (("name", SCHEDULES), ("target", TARGETS)):
            if getattr(self, field) not in known:
                raise ValueError(f"Schedule: {field}: expected one of {', '.join(known)}, got {getattr(self, field)!r}")

    def sampler(self, eta: float = 0.0, largest: float = 1.0) -> DDIM:
        """The way back: eta 0 is DDIM, 1 is DDPM; no picture is larger in size.

        A model that finds v begins where only noise is left. From a noise that is found there, the picture would follow
        by a division by 5e-5, so that one that finds noise begins a step earlier.
        """
        return DDIM(
            num_train_timesteps=self.steps, beta_schedule=SCHEDULES[self.name], beta_start=0.1 / self.steps,
            beta_end=20 / self.steps, prediction_type=TARGETS[self.target], eta=eta, clip_sample_range=largest,
            use_clipped_model_output=True, timestep_spacing="trailing" if self.target == "v" else "leading",
        )  # fmt: skip

    @cached_property
    def training(self) -> DDIM:
        """What adds the noise; `training.alphas_cumprod[t]` is a_t."""
        return self.sampler()


def told(x: torch.Tensor, x0: torch.Tensor, known: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """The input of a model, `[N, 2 C, H, W]`: x, or x0 where it is known; and where it is. A base comes on top."""
    known = known.to(x.dtype).expand_as(x)
    parts = [torch.where(known > 0, x0, x), known]
    return torch.cat(parts if base is None else [*parts, base], 1)


def loss(
    model: nn.Module, schedule: Schedule, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, known: torch.Tensor,
    condition: Any = None,
) -> torch.Tensor:  # fmt: skip
    """The mean squared error of what the model finds, over what is not known.

    Args:
        model: what takes `told`.
        schedule: of the noise.
        x0, noise: `[N, C, H, W]`.
        t: int64 `[N]`.
        known: `[N, C, H, W]`, 0 or 1.
        condition: what the model is told besides.
    """
    noises = schedule.training
    base = smooth_fill(x0, known) if schedule.relative else None
    x0 = x0 if base is None else x0 - base
    found = model(told(noises.add_noise(x0, noise, t), x0, known, base), t, condition)
    wanted = noise if schedule.target == "noise" else noises.velocity(x0, noise, t)
    return (((found - wanted) ** 2) * (1 - known)).sum() / (1 - known).sum()


@dataclass
class Sampler:
    """How pictures are painted.

    Attributes:
        schedule: that of the training.
        count: steps.
        eta: 0 for DDIM, 1 for DDPM.
        largest: size beyond which no picture goes.
        guidance: classifier-free: what the class changes, so many times; 1 asks the model once a step.
        telling: the model is told what is known; False only puts it in its place, with noise of each step's strength,
            in a model that paints whole pictures (as RePaint does, without its repetitions).
    """

    schedule: Schedule
    count: int = 50
    eta: float = 0.0
    largest: float = 1.0
    guidance: float = 1.0
    telling: bool = True

    def found(
        self, model: nn.Module, x: torch.Tensor, t: float, condition: Any, guided: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the model finds in x: under the condition; and, where it is guided, without, in one call."""
        x = x.to(next(model.parameters()).dtype)
        x = torch.cat([x, x]) if guided else x
        both = model(x, torch.full((len(x),), t), condition)
        if not guided:
            return both, None
        with_it, without = both.chunk(2)
        return with_it, without

    @torch.inference_mode()
    def trajectory(
        self,
        model: nn.Module,
        start: torch.Tensor,
        seeds: torch.Tensor | None = None,
        *,
        x0: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        label: Any = None,
    ) -> Iterator[torch.Tensor]:
        """Yields the pictures after each step, the last one painted; known parts are exactly those of x0 at the end.

        Args:
            start: noise `[N, C, H, W]`, float32 or float64: the dtype of the pictures, whatever the model's.
            seeds: int64 `[N]`, of the noise of the steps; needed for eta > 0, and without `telling`.
            x0, known: pictures and what is known of them, `[N or 1, C, H, W]`.
            label: what is asked for, as the model's `conditions` takes it: classes int64 `[N]`.
        """
        known = torch.zeros_like(start) if known is None else known.to(start.dtype).expand_as(start)
        x0 = torch.zeros_like(start) if x0 is None else x0.to(start.dtype).expand_as(start)
        guided = label is not None and self.guidance != 1.0
        condition = model.conditions(label, guided)
        wanted, shown, x = 1 - known, known if self.telling else torch.zeros_like(known), start
        base = smooth_fill(x0, shown) if self.schedule.relative else None
        there, largest = (x0, self.largest) if base is None else (x0 - base, 2 * self.largest)
        steps = self.schedule.sampler(self.eta, largest).steps(self.count)
        for i, step in enumerate(steps):
            with_it, without = self.found(model, told(x, there, shown, base), step.timestep, condition, guided)
            last = i + 1 == len(steps)
            kept = {"known": there, "mask": wanted} if not self.telling or last else {}
            x = gk.cfg_step(
                x, with_it, step.coefficients, uncond=without, guidance_scale=self.guidance, seed=seeds, offset=i,
                **kept,
            )  # fmt: skip
            yield torch.where((known > 0) & last, x0, x if base is None else x + base)

    def paint(self, model: nn.Module, start: torch.Tensor, seeds: torch.Tensor | None = None, **given) -> torch.Tensor:
        """The last picture of a trajectory."""
        return collections.deque(self.trajectory(model, start, seeds, **given), maxlen=1)[0]


if __name__ == "__main__":
    import sys

    from python_models.diffusion_main import main

    sys.exit(main())
