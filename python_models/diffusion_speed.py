"""The time of a training step and of a sampling step: ours, eager, and eager compiled, in turn."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import genai_kernels as gk
from genai_kernels.nn import prepack
from python_models.diffusion_data import SETS
from python_models.diffusion_tasks import Say
from python_models.diffusion_train import CONFIGS, RECIPES, SCHEDULES, Run, checkpoint_of, load_model, new_model, twin

AGREE = 1e-4  # of the largest value: results that are further apart are not timed


def in_turn(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Median and quartiles of each, called in turn for so many seconds; the first two rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for i in itertools.count():
        if i > 8 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if i > 1:
                found[name].append(time.perf_counter() - begin)
    return {
        name: dict(zip(("low", "median", "high"), statistics.quantiles(values), strict=True))
        for name, values in found.items()
    }


def sampling(name: str, batch: int, dtype: torch.dtype, seconds: float, compiled: bool) -> dict[str, Any]:
    """One call of a committed model for a batch, as a sampler makes it."""
    model, _ = load_model(checkpoint_of(name))
    ours = prepack(copy.deepcopy(model).to(dtype))
    eager = copy.deepcopy(model).to(dtype)
    channels, size = model.config.in_channels, SETS[name]().shape[1:]
    x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.full((batch,), 500)

    def call(which: torch.nn.Module, backend: str) -> torch.Tensor:
        with torch.inference_mode(), gk.use_backend(backend):
            return which(x, t)

    calls = {"ours": lambda: call(ours, "auto"), "eager": lambda: call(eager, "reference")}
    if compiled:
        fast = torch.compile(eager, dynamic=False)
        calls["compiled eager"] = lambda: call(fast, "reference")
    first, second = calls["ours"]().double(), calls["eager"]().double()
    limit = AGREE if dtype == torch.float32 else 0.05
    if float((first - second).abs().max() / second.abs().max()) > limit:
        raise RuntimeError(f"sampling: {name}, {dtype}: ours and eager disagree")
    return in_turn(calls, seconds)


def training(name: str, seconds: float) -> dict[str, Any]:
    """Steps of a new model, beside its eager twin's; their losses are compared."""
    run = Run(new_model(CONFIGS[name], 0), SCHEDULES[name], RECIPES[name], SETS[name]())
    eager = twin(run)
    found = in_turn({"ours": run.step, "eager": eager.step}, seconds)
    if abs(run.losses[1] - eager.losses[1]) > AGREE * eager.losses[1]:
        raise RuntimeError(f"training: {name}: ours and eager disagree")
    return found


def measure(seconds: float = 4.0, compiled: bool = True, say: Say = str) -> dict[str, Any]:
    """All of it: for each set of pictures a training step, and a sampling step of 64 pictures and of one."""
    found: dict[str, Any] = {}
    for name in SETS:
        say(f"{name}, training")
        found[f"{name}, training step of {RECIPES[name].batch}"] = training(name, seconds)
        for batch, dtype in ((64, torch.float32), (64, torch.bfloat16), (1, torch.float32)):
            text = f"{name}, sampling step of {batch}, {str(dtype).removeprefix('torch.')}"
            say(text)
            found[text] = sampling(name, batch, dtype, seconds, compiled)
    return found


def table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """A row for each case."""
    rows: list[tuple[object, ...]] = []
    for name, one in found.items():
        ours = one["ours"]["median"]
        others = (f"{one[w]['median'] / ours:.2f}x" if w in one else "-" for w in ("eager", "compiled eager"))
        spread = (one["ours"]["high"] - one["ours"]["low"]) / ours
        rows.append((name, f"{1e3 * ours:.1f}", f"{100 * spread:.0f} %", *others))
    return ("", "ms", "between quartiles", "eager / ours", "compiled eager / ours"), rows
