"""Tables and plots of the comparison of adapters: from what lora_compare.py and lora_bench.py have measured."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from genai_kernels.cli.plots import Line, bar_plot, line_plot

Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


def spread(values: list[float]) -> str:
    """Mean, and half the range."""
    return f"{statistics.fmean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def method_table(found: dict[str, Any]) -> Table:
    """A row for each method, and one for the model as it is."""
    registers = list(found["registers"])
    columns = ("method", "learns", *(f"bits/char, {r}" for r in registers), "ms a step", "eager / ours", "peak MB",
               "eager's")  # fmt: skip
    rows: list[tuple[object, ...]] = [
        ("none", "0", *(f"{found['base'][r]:.3f}" for r in registers), "-", "-", "-", "-"),
    ]
    for method, one in found["methods"].items():
        memory = [f"{one['peak_bytes'][who] / 1e6:.0f}" for who in ("ours", "eager")]
        times = ("disagrees", "-")
        if one["seconds"]:
            ours, eager = (one["seconds"][who]["median"] for who in ("ours", "eager"))
            times = (f"{1e3 * ours:.0f}", f"{eager / ours:.2f}x")
        rows.append((method, f"{one['parameters']:,}", *(spread(one["bits"][r]) for r in registers), *times, *memory))
    return columns, rows


def smooth(values: list[float], width: int = 8) -> list[float]:
    """The mean of the last `width` values, from nats to bits."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) / math.log(2) for i in range(len(values))]


def method_plots(found: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Loss curves of each register, and memory. Only what could be drawn is returned."""
    drawn = {}
    for register in found["registers"]:
        lines = [
            Line(name, list(range(found["steps"])), smooth(one["losses"][register]), dashed=name == "full")
            for name, one in found["methods"].items()
        ]
        path = folder / f"{stem}_loss_{register}.png"
        drawn[path] = line_plot(path, lines, title=f"Adapting to {register}: training loss, mean of {found['seeds']} "
                                "seeds and 8 steps", xlabel="step", ylabel="bits per token")  # fmt: skip
    memory = {
        who: [one["peak_bytes"][who] / 1e6 for one in found["methods"].values()] for who in ("ours", "eager")
    }  # fmt: skip
    path = folder / f"{stem}_memory.png"
    drawn[path] = bar_plot(path, list(found["methods"]), memory, title="Peak memory of a training step",
                           xlabel="MB, the model's own included")  # fmt: skip
    return [path for path, done in drawn.items() if done]


def step_table(found: dict[str, Any]) -> Table:
    """Training steps beside PEFT's."""
    ours = found["ours"]["seconds"]["median"]
    rows: list[tuple[object, ...]] = []
    for name, one in found.items():
        s = one["seconds"]
        quartiles = f"{1e3 * s['low']:.0f} .. {1e3 * s['high']:.0f}"
        times = (f"{1e3 * s['median']:.0f}", quartiles, f"{s['median'] / ours:.2f}x")
        rows.append((name, f"{one['parameters']:,}", *times, f"{one['peak_bytes'] / 1e6:.0f}"))
    return ("training step", "learns", "ms", "quartiles", "time / ours", "peak MB"), rows


def batch_table(found: dict[str, dict[int, float]]) -> Table:
    """Seconds of a step with so many adapters in its batch."""
    counts = sorted({n for times in found.values() for n in times})
    rows = [(name, *(f"{1e3 * times[n]:.2f}" if n in times else "-" for n in counts)) for name, times in found.items()]
    return ("ms a step; adapters in the batch:", *map(str, counts)), rows


def batch_plot(found: dict[str, dict[int, float]], path: Path, requests: int) -> bool:
    lines = [
        Line(name, list(times), [1e3 * t for t in times.values()], dashed=i > 0)
        for i, (name, times) in enumerate(found.items())
    ]
    return line_plot(path, lines, title=f"A decoding step of {requests} requests", xlabel="adapters in the batch",
                     ylabel="ms", log_x=True, log_y=True)  # fmt: skip
