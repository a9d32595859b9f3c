"""How much noise a diffusion model's timesteps have, and which of them a sampler visits. Python's floats throughout."""

from __future__ import annotations

import math

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "linspace", "trailing")


def linspace(start: float, stop: float, count: int) -> list[float]:
    """NumPy's: `start + i * step`, the last one exactly `stop`."""
    if count == 1:
        return [start]
    step = (stop - start) / (count - 1)
    return [start + i * step for i in range(count - 1)] + [stop]


def betas(schedule: str, count: int, start: float, end: float) -> list[float]:
    """The variance that each timestep adds."""
    if schedule == "linear":
        return linspace(start, end, count)
    if schedule == "scaled_linear":
        return [b * b for b in linspace(math.sqrt(start), math.sqrt(end), count)]

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - signal((i + 1) / count) / signal(i / count), 0.999) for i in range(count)]


def cumulative_alphas(each: list[float], zero_terminal_snr: bool) -> list[float]:
    """The share of the signal's variance that is left at each timestep."""
    product, left = 1.0, []
    for beta in each:
        product *= 1 - beta
        left.append(product)
    if zero_terminal_snr:  # Lin et al., 2023, algorithm 1
        first, last = math.sqrt(left[0]), math.sqrt(left[-1])
        left = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in left]
    return left


def visited(spacing: str, train: int, count: int, offset: int) -> list[float]:
    """The timesteps of a sampler, the largest first; fractions where a spacing has them."""
    if spacing == "linspace":
        return linspace(0.0, train - 1.0, count)[::-1]
    if spacing == "leading":
        return [float(i * (train // count) + offset) for i in range(count)][::-1]
    # as NumPy's arange counts down, whose step is the difference of its first two numbers: it decides some ties
    step = (train - train / count) - train
    return [float(round(train + i * step) - 1) for i in range(count)]


def interpolated(table: list[float], at: float) -> float:
    """The table's value at a fractional index."""
    low = min(int(at), len(table) - 2)
    return table[low] + (table[low + 1] - table[low]) * (at - low)
