"""What a call costs before any work is done: the smallest sample of each op against torch.add."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from ..accuracy import map_tensors
from ..registry import Make, Op, Sample
from .timing import Timing, interleaved

MODES = ("inference_mode", "no_grad", "autograd")


def _size(sample: Sample) -> int:
    """Elements of all tensors of a sample's call."""
    total = 0

    def add(t: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += t.numel()
        return t

    map_tensors(add, sample.build(Make(torch.float32)))
    return total


def _smallest(op: Op) -> Sample | None:
    sizes = {s.name: _size(s) for s in op.samples if not s.bench}
    candidates = [s for s in op.samples if sizes.get(s.name)]
    return min(candidates, key=lambda s: sizes[s.name], default=None)


def _caller(function: Callable[..., Any], call: Any, mode: str) -> Callable[[], Any]:
    def leaf(t: torch.Tensor) -> torch.Tensor:
        return t.detach().requires_grad_(mode == "autograd") if t.is_floating_point() else t

    args, kwargs = map_tensors(leaf, call)
    context = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, contextlib.nullcontext)

    def run() -> None:
        with context():
            for _ in range(100):
                function(*args, **kwargs)

    return run


def measure_overhead(ops: list[Op], seconds: float = 0.2) -> list[dict[str, Any]]:
    """Seconds a call on one thread for each op and mode, beside torch.add of two small tensors in the same run."""
    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for op in ops:
            sample = _smallest(op)
            if sample is None:
                continue
            call = sample.build(Make(torch.float32))
            add: Any = ((torch.ones(4, 8), torch.ones(4, 8)), {})
            for mode in MODES:
                if mode == "autograd" and not op.differentiable:
                    continue
                calls = {"ours": _caller(op.function, call, mode), "add": _caller(torch.add, add, mode)}
                calls["eager"] = _caller(op.reference, call, mode)
                for run in calls.values():
                    run()
                timings, _ = interleaved(calls, seconds)
                rows.append({"op": op.name, "sample": sample.name, "mode": mode, **_per_call(timings)})
    finally:
        torch.set_num_threads(before)
    return rows


def _per_call(timings: dict[str, Timing]) -> dict[str, float]:
    found = {name: timing.median / 100 for name, timing in timings.items()}
    return {**found, "ratio": found["ours"] / found["add"], "spread": timings["ours"].spread}
