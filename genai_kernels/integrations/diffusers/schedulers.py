"""The step of diffusers' schedulers by cfg_step: the scheduler's own tables, their arithmetic in float64, one pass.

Guidance is the pipeline's and stays there; noise is drawn as diffusers draws it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...ops.cfg_step import StepCoefficients, cfg_step
from .calls import NAMES, PLAIN, Left, Served, why_not_now
from .norms import original

_LOW = (torch.bfloat16, torch.float16)


class _Way(NamedTuple):
    """x0 as a number times x and a number times the model's output."""

    x: float
    model: float


def why_not_scheduler(scheduler: Any) -> str | None:
    config = scheduler.config
    if getattr(config, "thresholding", False):
        return "thresholding"
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        return f"prediction_type {config.prediction_type}"
    kind = getattr(config, "variance_type", "fixed_small")
    return None if kind in ("fixed_small", "fixed_small_log", "fixed_large") else f"variance_type {kind}"


def why_not_multistep(scheduler: Any) -> str | None:
    config = scheduler.config
    if config.thresholding:
        return "thresholding"
    if config.algorithm_type != "dpmsolver++":
        return f"algorithm_type {config.algorithm_type}"
    if config.solver_order > 2:
        return f"solver_order {config.solver_order}"
    return None if config.variance_type is None else f"variance_type {config.variance_type}"


def _why_not_step(
    scheduler: Any, m: Any, x: Any, why_not: Callable[[Any], str | None] = why_not_scheduler
) -> str | None:
    """Why cfg_step cannot make a step of x with the model's output m."""
    if torch.compiler.is_compiling():
        return "torch.compile"
    if type(m) not in PLAIN or type(x) not in PLAIN or m.shape != x.shape:
        return "a model's output unlike the sample"
    if torch.is_grad_enabled() and (m.requires_grad or x.requires_grad):
        return "a gradient of the sampler's step"
    if m.dtype != x.dtype and not (x.dtype == torch.float32 and m.dtype in _LOW):
        return f"a sample of {x.dtype} beside a model's output of {m.dtype}"
    return why_not(scheduler) or why_not_now("cfg_step", x, m)


def _x0(scheduler: Any, signal: float, deviation: float) -> _Way | None:
    """x0 where `x = signal x0 + deviation noise`; None where nothing of it is left in x."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return _Way(signal, -deviation)
    if kind == "sample":
        return _Way(0.0, 1.0)
    return _Way(1 / signal, -deviation / signal) if signal > 0 else None


def _clip(scheduler: Any) -> float:
    return scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf


def _draw(m: torch.Tensor, generator: Any) -> torch.Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype)


def _made(
    scheduler: Any, m: torch.Tensor, x: torch.Tensor, numbers: StepCoefficients, noise: torch.Tensor | None,
    return_dict: bool, dtype: torch.dtype,
) -> Any:  # fmt: skip
    noise = None if noise is None else noise.to(x.dtype)
    before, x0 = cfg_step(x, m, numbers, noise=noise, return_x0=True)
    before = before.to(dtype)
    if scheduler.config.prediction_type == "sample" and numbers.clip == math.inf:
        x0 = m
    if not return_dict:
        return before, x0
    kind = original(scheduler)
    return getattr(sys.modules[kind.__module__], f"{kind.__name__}Output")(prev_sample=before, pred_original_sample=x0)


def ddim(
    scheduler: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Any = None,
    variance_noise: torch.Tensor | None = None,
    return_dict: bool = True,
) -> Served | Left:
    reason = _why_not_step(scheduler, model_output, sample)
    if scheduler.num_inference_steps is None:
        reason = "set_timesteps has not been called"
    if eta > 0 and variance_noise is not None and generator is not None:
        reason = "both generator and variance_noise"
    if reason is not None:
        return Left(reason)
    t = int(timestep)
    before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    left = float(scheduler.alphas_cumprod[t])
    next_left = float(scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod)
    signal, deviation = math.sqrt(left), math.sqrt(1 - left)
    way = _x0(scheduler, signal, deviation)
    if way is None or deviation == 0:
        return Left("a sample that is noise alone, or without noise")
    std = eta * math.sqrt(max(0.0, (1 - next_left) / (1 - left) * (1 - left / next_left)))
    along = math.sqrt(max(0.0, 1 - next_left - std * std))
    x, model, x0 = 0.0, along, math.sqrt(next_left)
    if use_clipped_model_output:
        x, model, x0 = along / deviation, 0.0, x0 - along * signal / deviation
    elif scheduler.config.prediction_type == "v_prediction":
        x, model = along * deviation, along * signal
    elif scheduler.config.prediction_type == "sample":
        x, model = along / deviation, -along * signal / deviation
    noise = variance_noise
    if eta > 0 and noise is None:
        noise = _draw(model_output, generator)
    numbers = StepCoefficients(*way, clip=_clip(scheduler), x=x, model=model, x0=x0, noise=std)
    result = _made(scheduler, model_output, sample, numbers, noise, return_dict, sample.dtype)
    return result, f"{NAMES[sample.dtype]}, DDIM step"


def ddpm(
    scheduler: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    generator: Any = None,
    return_dict: bool = True,
) -> Served | Left:
    reason = _why_not_step(scheduler, model_output, sample)
    if reason is not None:
        return Left(reason)
    t, before = int(timestep), int(scheduler.previous_timestep(timestep))
    left = float(scheduler.alphas_cumprod[t])
    next_left = float(scheduler.alphas_cumprod[before]) if before >= 0 else 1.0
    way = _x0(scheduler, math.sqrt(left), math.sqrt(1 - left))
    if way is None:
        return Left("a sample that is noise alone, or without noise")
    beta = 1 - left / next_left
    std, noise = 0.0, None
    if t > 0:
        noise = _draw(model_output, generator)
        std = float(scheduler._get_variance(timestep))
        std = std if scheduler.variance_type == "fixed_small_log" else math.sqrt(std)
    numbers = StepCoefficients(
        *way, clip=_clip(scheduler), x=math.sqrt(left / next_left) * (1 - next_left) / (1 - left),
        x0=math.sqrt(next_left) * beta / (1 - left), noise=std,
    )  # fmt: skip
    result = _made(scheduler, model_output, sample, numbers, noise, return_dict, sample.dtype)
    return result, f"{NAMES[sample.dtype]}, DDPM step"


def _euler(
    scheduler: Any, m: torch.Tensor, timestep: Any, sample: torch.Tensor, generator: Any, return_dict: bool,
    ancestral: bool,
) -> Served | Left:  # fmt: skip
    x = sample.to(torch.float32)
    reason = _why_not_step(scheduler, m, x)
    if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
        reason = "an integer for a timestep"
    elif not scheduler.is_scale_input_called:
        reason = "scale_model_input has not been called"
    if reason is not None:
        return Left(reason)
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    sigma, after = (float(s) for s in scheduler.sigmas[scheduler.step_index : scheduler.step_index + 2])
    up = math.sqrt(max(0.0, after**2 * (sigma**2 - after**2) / sigma**2)) if ancestral else 0.0
    down = math.sqrt(max(0.0, after**2 - up**2))
    scale = 1 / (sigma**2 + 1)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":  # without the way over x0
        numbers = StepCoefficients(1.0, -sigma, x=1.0, model=down - sigma, noise=up)
    else:
        way = (scale, -sigma * math.sqrt(scale)) if kind == "v_prediction" else (0.0, 1.0)
        numbers = StepCoefficients(*way, x=down / sigma, x0=1 - down / sigma, noise=up)
    noise = _draw(m, generator) if ancestral else None
    result = _made(scheduler, m, x, numbers, noise, return_dict, m.dtype)
    scheduler._step_index += 1
    return result, f"{NAMES[sample.dtype]}, Euler step{', ancestral' if ancestral else ''}"


def euler(
    scheduler: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator: Any = None,
    return_dict: bool = True,
) -> Served | Left:
    if s_churn > 0:
        return Left("s_churn")
    return _euler(scheduler, model_output, timestep, sample, generator, return_dict, ancestral=False)


def euler_ancestral(
    scheduler: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    generator: Any = None,
    return_dict: bool = True,
) -> Served | Left:
    if scheduler.config.prediction_type == "sample":
        return Left("prediction_type sample")
    return _euler(scheduler, model_output, timestep, sample, generator, return_dict, ancestral=True)


# ---- DPM-Solver++ ----


class _Level(NamedTuple):
    """x = signal x0 + deviation noise."""

    signal: float
    deviation: float

    def since(self, other: _Level) -> tuple[float, float]:
        """h and exp(-h), h what the logarithm of signal / deviation has grown by."""
        less = self.deviation * other.signal / (self.signal * other.deviation)
        return -math.log(less) if less > 0 else math.inf, less


def _level(scheduler: Any, index: int) -> _Level:
    sigma = float(scheduler.sigmas[index])
    if scheduler.config.use_flow_sigmas:
        return _Level(1 - sigma, sigma)
    signal = 1 / math.sqrt(sigma * sigma + 1)
    return _Level(signal, sigma * signal)


def _is_first_order(scheduler: Any) -> bool:
    """Whether diffusers makes this step from the last prediction alone."""
    config, count = scheduler.config, len(scheduler.timesteps)
    ends = config.euler_at_final or (config.lower_order_final and count < 15) or config.final_sigmas_type == "zero"
    last = scheduler.step_index == count - 1 and ends
    return config.solver_order == 1 or scheduler.lower_order_nums < 1 or last


def dpm_multistep(
    scheduler: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    generator: Any = None,
    variance_noise: torch.Tensor | None = None,
    return_dict: bool = True,
) -> Served | Left:
    reason = _why_not_step(scheduler, model_output, sample, why_not_multistep)
    if scheduler.num_inference_steps is None:
        reason = "set_timesteps has not been called"
    if reason is not None:
        return Left(reason)
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    index, history = scheduler.step_index, scheduler.model_outputs
    now, after = _level(scheduler, index), _level(scheduler, index + 1)
    if scheduler.config.prediction_type == "flow_prediction":
        way: _Way | None = _Way(1.0, -float(scheduler.sigmas[index]))
    else:
        way = _x0(scheduler, *now)
    previous = None if _is_first_order(scheduler) else history[-1]
    ends = previous is not None and (now.signal <= 0 or after.deviation <= 0)
    if way is None or now.deviation <= 0 or after.signal <= 0 or ends:
        return Left("a sample that is noise alone, or without noise")
    if previous is not None and (type(previous) not in PLAIN or previous.requires_grad or
                                 (previous.shape, previous.dtype, previous.device) !=
                                 (sample.shape, sample.dtype, sample.device)):  # fmt: skip
        return Left("a prediction of the step before unlike the sample")
    h, less = after.since(now)
    x0, of_previous = after.signal * (1 - less), 0.0
    if previous is not None:
        h_before, _ = now.since(_level(scheduler, index - 1))
        slope = 0.5 * x0 if scheduler.config.solver_type == "midpoint" else after.signal * ((less - 1) / h + 1)
        of_previous = -slope * h / h_before
        x0 -= of_previous
    numbers = StepCoefficients(*way, x=after.deviation / now.deviation, x0=x0, previous_x0=of_previous)
    result, predicted = cfg_step(sample, model_output, numbers, previous_x0=previous, return_x0=True)
    if scheduler.config.prediction_type == "sample" and model_output.dtype == sample.dtype:
        predicted = model_output
    # what diffusers' own step keeps and counts
    scheduler.model_outputs = [*history[1:], predicted]
    scheduler.lower_order_nums = min(scheduler.lower_order_nums + 1, scheduler.config.solver_order)
    scheduler._step_index += 1
    how = f"{NAMES[sample.dtype]}, DPM-Solver++ step"
    if not return_dict:
        return (result,), how
    kind = original(scheduler)
    return sys.modules[kind.__module__].SchedulerOutput(prev_sample=result), how
