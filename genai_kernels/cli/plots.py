"""Plots as PNG files, in one style. Needs matplotlib: without it every function returns False and draws nothing.

For `bench`, `benchmarks/report.py`, and for model demos alike:

    from genai_kernels.cli.plots import Line, bar_plot, line_plot

    line_plot("loss.png", [Line("ours", steps, losses), Line("eager", steps, others, dashed=True)],
              title="Training loss", xlabel="step", ylabel="bits per character")
    bar_plot("speed.png", ["rms_norm", "attention"], {"eager": [3.1, 5.2], "torch": [1.4, 1.3]},
             title="Speed-up of ours", xlabel="times faster than ...", reference=1.0)
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Distinguishable with the usual colour-vision deficiencies (Okabe and Ito); the first is always ours.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: `y` over `x`, with a band from `low` to `high` where they are given."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    color: int | None = None  # number in COLORS; None: the next one


def available() -> bool:
    """True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no display and no state of the user's is touched
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _number(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def line_plot(
    path: str | Path,
    lines: Sequence[Line],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
) -> bool:
    """Draws curves into a PNG file; with `log_x` the ticks are the points' own x. Returns False without matplotlib."""
    if not available():
        return False
    figure, axes = _axes(7.5 if len(lines) <= 4 else 9.5, 4.5)
    for i, line in enumerate(lines):
        color = COLORS[(i if line.color is None else line.color) % len(COLORS)]
        few = len(line.x) <= 20
        axes.plot(
            line.x, line.y, label=line.name, color=color, linewidth=1.8, linestyle="--" if line.dashed else "-",
            marker="o" if few else None, markersize=4,
        )  # fmt: skip
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, linewidth=0)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x for line in lines for x in line.x}))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(_number)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_number)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if len(lines) > 4:  # beside the curves, where it hides none
        axes.legend(frameon=False, fontsize=9, handlelength=3, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif len(lines) > 1:
        axes.legend(frameon=False, fontsize=9, handlelength=3)
    figure.savefig(path)
    return True


def bar_plot(
    path: str | Path,
    labels: Sequence[str],
    groups: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    xlabel: str,
    reference: float | None = None,
) -> bool:
    """Draws horizontal bars into a PNG file, one group of bars a label.

    Args:
        path: the file.
        labels: one for each group, from top to bottom.
        groups: name in the legend -> a value for each label; None leaves the bar out.
        title, xlabel: texts.
        reference: a value at which a line is drawn, such as 1.0 for ratios.

    Returns:
        False without matplotlib.
    """
    if not available():
        return False
    n = max(1, len(groups))
    figure, axes = _axes(8.5, 1.2 + len(labels) * (0.12 + 0.2 * n))
    for g, (name, values) in enumerate(groups.items()):
        places = [i + (g - (n - 1) / 2) * 0.8 / n for i, v in enumerate(values) if v is not None]
        present = [v for v in values if v is not None]
        bars = axes.barh(places, present, 0.8 / n, label=name, color=COLORS[g % len(COLORS)])
        axes.bar_label(bars, [f"{v:.2g}" if v < 10 else f"{v:.0f}" for v in present], padding=3, fontsize=7)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    if reference is not None:
        axes.axvline(reference, color="black", linewidth=0.9)
    axes.set(title=title, xlabel=xlabel)
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path)
    return True
