"""Diffusion samplers: schedulers as tables of float64 numbers, which `genai_kernels.cfg_step` applies in one pass.

>>> import torch, genai_kernels as gk
>>> from genai_kernels import diffusion
>>> steps = diffusion.DDIM(clip_sample=False).steps(50)
>>> x = gk.seeded_normal(torch.tensor([3, 4]), (1, 8, 8)) * steps.initial_scale
>>> for i, step in enumerate(steps):
...     model_output = x * step.input_scale  # a model of normal data of deviation 1 would be this times a number
...     x = gk.cfg_step(x, model_output, step.coefficients, seed=torch.tensor([3, 4]), offset=i)
>>> x.shape
torch.Size([2, 1, 8, 8])
"""

from .schedulers import DDIM, DDPM, DPMSolverPlusPlus2M, Euler, EulerAncestral, Scheduler, Step, Steps

__all__ = ["DDIM", "DDPM", "DPMSolverPlusPlus2M", "Euler", "EulerAncestral", "Scheduler", "Step", "Steps"]
