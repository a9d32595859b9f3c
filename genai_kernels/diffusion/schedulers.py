"""Schedulers as tables of numbers: what `genai_kernels.cfg_step` does at each step, computed in float64 beforehand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeVar, overload

import torch

from ..ops.cfg_step import StepCoefficients
from . import schedules

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
S = TypeVar("S", bound="Scheduler")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: the model is called with `x * input_scale` and `timestep`, then `cfg_step` with `coefficients`.

    `undo` goes from the result back to the noise of this step: what RePaint repeats a step with.
    """

    timestep: float
    coefficients: StepCoefficients
    input_scale: float = 1.0
    undo: StepCoefficients = dataclasses.field(default_factory=StepCoefficients)


@dataclasses.dataclass(frozen=True)
class Steps(Sequence[Step]):
    """The steps of a sampler in order; x begins as normal noise times `initial_scale`."""

    steps: tuple[Step, ...]
    initial_scale: float = 1.0

    @property
    def timesteps(self) -> list[float]:
        return [step.timestep for step in self.steps]

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Step, ...]: ...
    def __getitem__(self, index):
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What the schedulers share: the noise that a model was trained with, and which timesteps a sampler visits.

    The arguments are those of diffusers' schedulers, the results theirs too, in float64 instead of float32.

    Args:
        num_train_timesteps: timesteps of the training.
        beta_start, beta_end: of the schedules "linear" and "scaled_linear".
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2" (cosine).
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample".
        timestep_spacing: "leading", "linspace" or "trailing".
        steps_offset: added to the timesteps of "leading".
        clip_sample, clip_sample_range: whether, and to which size, the prediction of x0 is clipped.
        rescale_betas_zero_snr: no signal at the last timestep.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False

    # of diffusers' configurations: what is not supported, at the only values that mean it is not wanted
    _IGNORED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "trained_betas": (None,), "thresholding": (False,), "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None), "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None), "use_dynamic_shifting": (False,), "interpolation_type": ("linear",),
        "timestep_type": ("discrete",), "final_sigmas_type": ("zero",), "euler_at_final": (False,),
        "algorithm_type": ("dpmsolver++",), "solver_order": (2,), "solver_type": ("midpoint",),
        "lambda_min_clipped": (-math.inf,), "variance_type": (None,), "skip_prk_steps": (True, False),
    }  # fmt: skip
    # these say something only together with one of the above
    _UNUSED: ClassVar[tuple[str, ...]] = (
        "dynamic_thresholding_ratio", "sample_max_value", "sigma_min", "sigma_max", "flow_shift", "time_shift_type",
        "lower_order_final",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, allowed in (
            ("beta_schedule", schedules.BETA_SCHEDULES),
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", schedules.SPACINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"genai_kernels.diffusion.{type(self).__name__}: {name}: expected one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )

    @classmethod
    def from_config(cls: type[S], config: Mapping[str, Any]) -> S:
        """The scheduler of a configuration in diffusers' form; NotImplementedError for what it has not.

        >>> from genai_kernels import diffusion
        >>> diffusion.DDIM.from_config({"beta_schedule": "scaled_linear", "thresholding": False}).beta_schedule
        'scaled_linear'
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        used = {}
        for name, value in config.items():
            if name in fields:
                used[name] = value
            elif not name.startswith("_") and name not in cls._UNUSED and value not in cls._IGNORED.get(name, ()):
                raise NotImplementedError(
                    f"genai_kernels.diffusion.{cls.__name__}: {name}: expected "
                    f"{' or '.join(map(repr, cls._IGNORED.get(name, ('nothing',))))}, got {value!r}"
                )
        return cls(**used)

    # ---- what training needs ----

    @cached_property
    def alphas_cumprod(self) -> tuple[float, ...]:
        """The share of the signal's variance at each timestep."""
        each = schedules.betas(self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end)
        return tuple(schedules.cumulative_alphas(each, self.rescale_betas_zero_snr))

    def _sizes(self, like: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left = torch.tensor(self.alphas_cumprod, dtype=torch.float64)[timesteps.cpu()]
        left = left.view(-1, *(1,) * (like.dim() - 1))
        return left.sqrt().to(like.device, like.dtype), (1 - left).sqrt().to(like.device, like.dtype)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`sqrt(a) x0 + sqrt(1 - a) noise`, `timesteps` int64 `[batch]`: what a model is trained on."""
        signal, deviation = self._sizes(x0, timesteps)
        return signal * x0 + deviation * noise

    def velocity(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`sqrt(a) noise - sqrt(1 - a) x0`: the target of a model with prediction type "v_prediction"."""
        signal, deviation = self._sizes(x0, timesteps)
        return signal * noise - deviation * x0

    # ---- what sampling needs ----

    @property
    def _clip(self) -> float:
        return self.clip_sample_range if self.clip_sample else math.inf

    def _x0_of(self, signal: float, deviation: float) -> tuple[float, float]:
        """x0 = first * x + second * model, where x = signal * x0 + deviation * noise and signal^2 + deviation^2 = 1."""
        if self.prediction_type == "epsilon":
            return 1 / signal, -deviation / signal
        return (signal, -deviation) if self.prediction_type == "v_prediction" else (0.0, 1.0)

    def _visited(self, count: int) -> list[float]:
        spaced = schedules.visited(self.timestep_spacing, self.num_train_timesteps, count, self.steps_offset)
        return [float(round(t)) for t in spaced]

    def _timesteps(self, count: int) -> list[float]:
        """The timesteps visited, checked."""
        most = self.num_train_timesteps
        if not 1 <= count <= most:
            raise ValueError(
                f"genai_kernels.diffusion.{type(self).__name__}: num_steps: expected 1 to {most}, got {count}"
            )
        found = self._visited(count)
        if found[0] > most - 1 or any(a <= b for a, b in itertools.pairwise(found)):
            raise ValueError(
                f"genai_kernels.diffusion.{type(self).__name__}: num_steps: expected so few that no timestep repeats "
                f"or is above {most - 1}, got {count}"
            )
        return found

    def _at(self, count: int, start: int) -> Steps:
        raise NotImplementedError

    def steps(self, num_steps: int, start: int = 0) -> Steps:
        """The steps of a sampler, but for the first `start`: an image with their noise may take the place of noise."""
        steps = self._at(num_steps, start)
        if not 0 <= start < len(steps):
            raise ValueError(
                f"genai_kernels.diffusion.{type(self).__name__}: start: expected 0 to {len(steps) - 1}, got {start}"
            )
        return dataclasses.replace(steps, steps=steps.steps[start:])


def _undo(signal: float, next_signal: float) -> StepCoefficients:
    """From a signal of a larger size to a smaller one, the variance staying 1."""
    kept = signal / next_signal
    return StepCoefficients(x=kept, noise=math.sqrt(max(0.0, 1 - kept * kept)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(Scheduler):
    """Ho et al., "Denoising Diffusion Probabilistic Models", 2020: diffusers' DDPMScheduler.

    Args:
        variance_type: "fixed_small" or "fixed_large", of the noise of a step.

    >>> from genai_kernels import diffusion
    >>> steps = diffusion.DDPM(beta_schedule="squaredcos_cap_v2").steps(4)
    >>> steps.timesteps, round(steps[1].coefficients.noise, 4)
    ([750.0, 500.0, 250.0, 0.0], 0.3562)
    """

    clip_sample: bool = True
    variance_type: str = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance_type not in ("fixed_small", "fixed_large"):
            raise ValueError(
                "genai_kernels.diffusion.DDPM: variance_type: expected one of fixed_small, fixed_large, "
                f"got {self.variance_type!r}"
            )

    def _at(self, count: int, start: int) -> Steps:
        timesteps = self._timesteps(count)
        lefts = [self.alphas_cumprod[int(t)] for t in timesteps] + [1.0]
        steps = []
        for t, left, next_left in zip(timesteps, lefts, lefts[1:], strict=False):
            beta = 1 - left / next_left
            variance = beta * ((1 - next_left) / (1 - left) if self.variance_type == "fixed_small" else 1)
            to_x0 = self._x0_of(math.sqrt(left), math.sqrt(1 - left))
            numbers = StepCoefficients(
                *to_x0, clip=self._clip, x=math.sqrt(left / next_left) * (1 - next_left) / (1 - left),
                x0=math.sqrt(next_left) * beta / (1 - left), noise=math.sqrt(variance) if t > 0 else 0.0,
                known=math.sqrt(next_left), known_noise=math.sqrt(1 - next_left),
            )  # fmt: skip
            steps.append(Step(t, numbers, undo=_undo(math.sqrt(left), math.sqrt(next_left))))
        return Steps(tuple(steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Scheduler):
    """Song et al., "Denoising Diffusion Implicit Models", 2020: diffusers' DDIMScheduler.

    Args:
        eta: of the noise of a step: 0 for none, 1 for DDPM's.
        set_alpha_to_one: the last step ends without noise; else at that of timestep 0.
        use_clipped_model_output: the noise is that which leads to the clipped x0.

    >>> from genai_kernels import diffusion
    >>> diffusion.DDIM(timestep_spacing="trailing").steps(4)[3].coefficients.x0
    1.0
    """

    clip_sample: bool = True
    eta: float = 0.0
    set_alpha_to_one: bool = True
    use_clipped_model_output: bool = False

    def _at(self, count: int, start: int) -> Steps:
        steps = []
        for t in self._timesteps(count):
            before = int(t) - self.num_train_timesteps // count
            left = self.alphas_cumprod[int(t)]
            final = 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0]
            next_left = self.alphas_cumprod[before] if before >= 0 else final
            signal, deviation = math.sqrt(left), math.sqrt(1 - left)
            variance = (1 - next_left) / (1 - left) * (1 - left / next_left)
            noise = self.eta * math.sqrt(max(0.0, variance))
            along = math.sqrt(max(0.0, 1 - next_left - noise * noise))
            x, model, x0 = 0.0, along, math.sqrt(next_left)
            if self.use_clipped_model_output:
                x, model, x0 = along / deviation, 0.0, x0 - along * signal / deviation
            elif self.prediction_type == "v_prediction":
                x, model = along * deviation, along * signal
            elif self.prediction_type == "sample":
                x, model = along / deviation, -along * signal / deviation
            numbers = StepCoefficients(
                *self._x0_of(signal, deviation), clip=self._clip, x=x, model=model, x0=x0, noise=noise,
                known=math.sqrt(next_left), known_noise=math.sqrt(1 - next_left),
            )  # fmt: skip
            steps.append(Step(t, numbers, undo=_undo(signal, math.sqrt(next_left))))
        return Steps(tuple(steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InSigmas(Scheduler):
    """Schedulers that count noise by sigma, its deviation beside a signal of size 1."""

    beta_schedule: str = "linear"
    timestep_spacing: str = "linspace"

    @cached_property
    def _sigmas(self) -> list[float]:
        left = list(self.alphas_cumprod)
        if self.rescale_betas_zero_snr:
            left[-1] = 2.0**-24  # so that the largest sigma is finite
        return [math.sqrt((1 - a) / a) for a in left]

    def _sigmas_at(self, timesteps: list[float]) -> list[float]:
        return [schedules.interpolated(self._sigmas, t) for t in timesteps] + [0.0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(_InSigmas):
    """Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022: EulerDiscreteScheduler.

    >>> from genai_kernels import diffusion
    >>> steps = diffusion.Euler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).steps(3)
    >>> round(steps.initial_scale, 4), round(steps[0].input_scale, 4)
    (14.6146, 0.0683)
    """

    _ancestral: ClassVar[bool] = False

    def _visited(self, count: int) -> list[float]:
        return schedules.visited(self.timestep_spacing, self.num_train_timesteps, count, self.steps_offset)

    def _at(self, count: int, start: int) -> Steps:
        timesteps = self._timesteps(count)
        sigmas = self._sigmas_at(timesteps)
        steps = []
        for t, sigma, after in zip(timesteps, sigmas, sigmas[1:], strict=False):
            up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2) if self._ancestral else 0.0
            down = math.sqrt(after**2 - up**2)
            scale = 1 / math.sqrt(sigma**2 + 1)
            first, second = {
                "epsilon": (1.0, -sigma), "v_prediction": (scale * scale, -sigma * scale), "sample": (0.0, 1.0)
            }[self.prediction_type]  # fmt: skip
            x, model, x0 = down / sigma, 0.0, 1 - down / sigma
            if self.prediction_type == "epsilon" and not self.clip_sample:
                x, model, x0 = 1.0, down - sigma, 0.0  # the same, without a way over x0
            numbers = StepCoefficients(
                first, second, clip=self._clip, x=x, model=model, x0=x0, noise=up, known_noise=after
            )
            undo = StepCoefficients(x=1.0, noise=math.sqrt(max(0.0, sigma**2 - after**2)))
            steps.append(Step(t, numbers, scale, undo))
        largest = max(sigmas)
        leading = self.timestep_spacing == "leading"
        return Steps(tuple(steps), math.sqrt(largest**2 + 1) if leading else largest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerAncestral(Euler):
    """The same with a part of each step's noise drawn anew: diffusers' EulerAncestralDiscreteScheduler.

    >>> from genai_kernels import diffusion
    >>> [round(step.coefficients.noise, 3) for step in diffusion.EulerAncestral().steps(3)]
    [3.433, 0.01, 0.0]
    """

    _ancestral: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPlusPlus2M(_InSigmas):
    """Lu et al., "DPM-Solver++", 2022, second order, multistep, midpoint: diffusers' DPMSolverMultistepScheduler.

    A step beyond the first needs x0 of the step before: `cfg_step(..., previous_x0=x0, return_x0=True)`.

    >>> from genai_kernels import diffusion
    >>> [round(step.coefficients.previous_x0, 4) for step in diffusion.DPMSolverPlusPlus2M().steps(4)]
    [0.0, -0.0813, -0.2069, 0.0]
    """

    def _visited(self, count: int) -> list[float]:
        train, spacing = self.num_train_timesteps, self.timestep_spacing
        if spacing == "trailing":
            return schedules.visited(spacing, train, count, 0)
        if spacing == "leading":
            ratio = train // (count + 1)
            return [float(i * ratio + self.steps_offset) for i in range(1, count + 1)][::-1]
        return [float(round(t)) for t in schedules.linspace(0.0, train - 1.0, count + 1)[:0:-1]]

    def _at(self, count: int, start: int) -> Steps:
        timesteps = self._timesteps(count)
        sigmas = self._sigmas_at(timesteps)
        steps = []
        for i, (t, sigma, after) in enumerate(zip(timesteps, sigmas, sigmas[1:], strict=False)):
            signal, next_signal = 1 / math.sqrt(sigma**2 + 1), 1 / math.sqrt(after**2 + 1)
            deviation, next_deviation = sigma * signal, after * next_signal
            gain, extrapolated = next_signal * (1 - after / sigma), 0.0
            if i > start and after > 0:  # second order, but for the first step and the last
                extrapolated = 0.5 * math.log(sigma / after) / math.log(sigmas[i - 1] / sigma)
            numbers = StepCoefficients(
                *self._x0_of(signal, deviation), clip=self._clip, x=next_deviation / deviation,
                x0=gain * (1 + extrapolated), previous_x0=0.0 - gain * extrapolated,
                known=next_signal, known_noise=next_deviation,
            )  # fmt: skip
            steps.append(Step(t, numbers, undo=_undo(signal, next_signal)))
        return Steps(tuple(steps))
