"""A model's trajectories from noise to pictures beside those of its eager twins: ours, eager, and eager in float64,
from the same weights and the same noise, in float32 and in bfloat16, compared after every step.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

import genai_kernels as gk
from python_models.diffusion import Sampler
from python_models.unet import UNet

FLOAT32_LIMIT = 1e-4  # of the largest value of a picture, between ours and eager in float32
PSNR_LIMITS = {"float32": 60.0, "bfloat16": 35.0}  # dB, of the painted pictures, from those of float64


@dataclass(frozen=True)
class Drift:
    """How far trajectories of one dtype are from float64's, relative to its size, after each step.

    Attributes:
        apart: the largest difference between ours and eager, by the largest value of the picture.
        ours, eager: the root mean square of the difference from float64, by that of the pictures.
        nearness: of the median picture, ours and eager: the same, the mean of all steps. Where a rounding decides which
            way a picture takes, as now and then in bfloat16, that one picture is most of the root mean square of all.
        psnr, eager_psnr: of the last pictures, in dB.
    """

    dtype: str
    apart: list[float]
    ours: list[float]
    eager: list[float]
    nearness: tuple[float, float]
    psnr: float
    eager_psnr: float

    @property
    def ok(self) -> bool:
        """float32: the same within `FLOAT32_LIMIT`; bfloat16: the median picture no further from float64."""
        near = max(self.apart) <= FLOAT32_LIMIT if self.dtype == "float32" else self.nearness[0] <= self.nearness[1]
        return near and self.psnr >= PSNR_LIMITS[self.dtype]

    @property
    def line(self) -> str:
        return (
            f"{self.dtype}, {len(self.apart)} steps: ours and eager at most {max(self.apart):.1e} apart; from float64 "
            f"{self.nearness[0]:.1e} ours, {self.nearness[1]:.1e} eager (the median picture); the pictures' PSNR "
            f"{self.psnr:.1f} dB ours, {self.eager_psnr:.1f} dB eager{'' if self.ok else ': DISAGREES'}"
        )


def psnr(pictures: torch.Tensor, exact: torch.Tensor, largest: float) -> float:
    """Peak signal to noise of all pictures together, the peak being the range of values."""
    error = float((pictures.double() - exact).square().mean())
    return 10 * math.log10((2 * largest) ** 2 / error) if error else math.inf


def _rms(x: torch.Tensor, begin: int = 0) -> torch.Tensor:
    """Root mean square over the dimensions from `begin` on."""
    return x.double().flatten(begin).square().mean(-1).sqrt()


def _of_the_median(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The distance of the median picture, the mean of all steps."""
    return statistics.fmean(
        float((_rms(a - x, 1) / _rms(x, 1)).quantile(0.5)) for a, x in zip(found, exact, strict=True)
    )


def twin_drifts(
    model: UNet, sampler: Sampler, start: torch.Tensor, seeds: torch.Tensor, **known: Any
) -> dict[str, Drift]:
    """Trajectories of ours and eager in float32 and bfloat16 from `start`, beside float64's.

    Args:
        model: in float32.
        sampler: of all of them.
        start: noise `[N, C, H, W]`.
        seeds: of the noise of the steps.
        known: as of `Sampler.trajectory`.
    """

    def run(which: UNet, begin: torch.Tensor, backend: str) -> list[torch.Tensor]:
        with gk.use_backend(backend):
            return list(sampler.trajectory(which, begin, seeds, **known))

    found = {}
    for name in PSNR_LIMITS:
        low = copy.deepcopy(model).to(getattr(torch, name))
        ours, eager = run(low, start, "auto"), run(low, start, "reference")
        exact = run(low.double(), start.double(), "reference")  # with weights as rounded as theirs
        found[name] = Drift(
            name,
            [float((a - b).abs().max() / x.abs().max()) for a, b, x in zip(ours, eager, exact, strict=True)],
            [float(_rms(a - x) / _rms(x)) for a, x in zip(ours, exact, strict=True)],
            [float(_rms(b - x) / _rms(x)) for b, x in zip(eager, exact, strict=True)],
            (_of_the_median(ours, exact), _of_the_median(eager, exact)),
            psnr(ours[-1], exact[-1], sampler.largest),
            psnr(eager[-1], exact[-1], sampler.largest),
        )
    return found


def step_times(model: UNet, pictures: torch.Tensor, label: torch.Tensor | None, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of the model, ours and eager in turn, for a batch `[N, in_channels, H, W]`."""
    seconds: dict[str, list[float]] = {"ours": [], "eager": []}
    times = torch.full((len(pictures),), 500)
    with torch.inference_mode():
        for i in range(rounds + 1):
            for who, backend in (("ours", "auto"), ("eager", "reference")):
                with gk.use_backend(backend):
                    begin = time.perf_counter()
                    model(pictures, times, label)
                    if i:  # the first is slower
                        seconds[who].append(time.perf_counter() - begin)
    return seconds
