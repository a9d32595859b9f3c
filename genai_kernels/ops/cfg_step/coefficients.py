"""The numbers of one step of a sampler."""

from __future__ import annotations

import math
from typing import NamedTuple


class StepCoefficients(NamedTuple):
    """The numbers of one step of a sampler, as `cfg_step` applies them; `genai_kernels.diffusion` computes them.

    With the (guided) model output m, noise z and noise z' of its own for the known part:

        x0   = clamp(x0_from_x * x + x0_from_model * m, -clip, clip)
        next = x * x + model * m + x0 * x0 + previous_x0 * p + noise * z
        where known:  next = known * k + known_noise * z'

    A term whose number is 0 is left out, so that what it would multiply may be anything. They are Python's floats: no
    step waits for a device.

    >>> import genai_kernels as gk
    >>> ddim_to_the_end = gk.StepCoefficients(x0_from_x=2.0, x0_from_model=-1.5, clip=1.0, x0=1.0)
    >>> ddim_to_the_end.noise
    0.0
    """

    x0_from_x: float = 0.0
    x0_from_model: float = 0.0
    clip: float = math.inf
    x: float = 0.0
    model: float = 0.0
    x0: float = 0.0
    previous_x0: float = 0.0
    noise: float = 0.0
    known: float = 1.0
    known_noise: float = 0.0
