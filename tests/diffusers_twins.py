"""diffusers' schedulers beside this library's, with the same configuration, and their trajectories from one noise."""

import sys
import warnings

import torch

import genai_kernels as gk
from genai_kernels import diffusion

CASES = {
    "ddpm": ("DDPM", "DDPMScheduler", {}),
    "ddpm large": ("DDPM", "DDPMScheduler", {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"}),
    "ddpm v trailing": (
        "DDPM", "DDPMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "ddpm sample": ("DDPM", "DDPMScheduler", {"prediction_type": "sample", "timestep_spacing": "linspace"}),
    "ddim": ("DDIM", "DDIMScheduler", {}),
    "ddim stable diffusion": (
        "DDIM", "DDIMScheduler",
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
         "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim v zero snr": (
        "DDIM", "DDIMScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    "ddim sample": ("DDIM", "DDIMScheduler", {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}),
    "ddim eta": ("DDIM", "DDIMScheduler", {"eta": 1.0, "clip_sample_range": 2.0}),
    "euler": ("Euler", "EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
    "euler leading": (
        "Euler", "EulerDiscreteScheduler",
        {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}),
    "euler v trailing": (
        "Euler", "EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "euler sample": ("Euler", "EulerDiscreteScheduler", {"prediction_type": "sample"}),
    "ancestral": ("EulerAncestral", "EulerAncestralDiscreteScheduler", {}),
    "ancestral v": ("EulerAncestral", "EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "dpm": ("DPMSolverPlusPlus2M", "DPMSolverMultistepScheduler", {}),
    "dpm stable diffusion": (
        "DPMSolverPlusPlus2M", "DPMSolverMultistepScheduler",
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading",
         "steps_offset": 1}),
    "dpm v cosine": (
        "DPMSolverPlusPlus2M", "DPMSolverMultistepScheduler",
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
    "dpm sample trailing": (
        "DPMSolverPlusPlus2M", "DPMSolverMultistepScheduler",
        {"prediction_type": "sample", "timestep_spacing": "trailing"}),
}  # fmt: skip


def ours(name):
    kind, _, options = CASES[name]
    return getattr(diffusion, kind)(**options)


def theirs(name):
    """The scheduler, and what its step takes beside the usual."""
    import diffusers

    _, kind, options = CASES[name]
    options = dict(options)
    step = {"eta": options.pop("eta")} if "eta" in options else {}
    return getattr(diffusers, kind)(**options), step


def model(weights, x, time):
    """A model: smooth, of both arguments, of a size that a trained one has."""
    return torch.tanh(weights * x + 0.001 * time) + 0.3 * x.roll(1, dims=-1)


def our_trajectory(name, count, start, noises, weights, backend=None):
    """x after each step."""
    steps = ours(name).steps(count)
    x, x0, states = start * steps.initial_scale, None, []
    for i, step in enumerate(steps):
        output = model(weights, x * step.input_scale, step.timestep)
        call = gk.cfg_step if backend is None else backend
        x, x0 = call(x, output, step.coefficients, previous_x0=x0, noise=noises[i], return_x0=True)
        states.append(x)
    return states


def their_trajectory(name, count, start, noises, weights, monkeypatch):
    """The same by diffusers, whose draws of noise are answered with the given."""
    scheduler, options = theirs(name)
    scheduler.set_timesteps(count)
    draws = iter(())
    for name_of, module in list(sys.modules.items()):
        if name_of.startswith("diffusers.schedulers.scheduling_") and hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws))
    x, states = start * scheduler.init_noise_sigma, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, t in enumerate(scheduler.timesteps):
            draws = iter([noises[i]])
            output = model(weights, scheduler.scale_model_input(x, t), float(t))
            x = scheduler.step(output, t, x, **options).prev_sample
            states.append(x)
    return states
