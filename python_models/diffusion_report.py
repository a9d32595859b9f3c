"""Pictures and tables of what diffusion models paint: from what diffusion_tasks.py has measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genai_kernels.cli import plots
from python_models.diffusion_data import to_rgb

Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


def visible(pictures: torch.Tensor) -> torch.Tensor:
    """`[..., C, H, W]` of a model as RGB from 0 to 1: digits in black on white, photographs from their colours."""
    if pictures.shape[-3] == 1:
        return ((1 - pictures.float()) / 2).clamp(0, 1).expand(*pictures.shape[:-3], 3, -1, -1)
    return to_rgb(pictures.float())


def shown(pictures: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """What a model is told, as RGB: the unknown in pale blue, and where only colours are unknown, in grey."""
    known = known.expand_as(pictures)
    rgb = visible(pictures * known)
    nothing = (known.amax(-3, keepdim=True) == 0).expand_as(rgb)
    return torch.where(nothing, torch.tensor([0.75, 0.85, 1.0]).view(3, 1, 1), rgb)


def grid(rgb: torch.Tensor, columns: int, gap: int = 1) -> torch.Tensor:
    """Pictures `[N, 3, H, W]` in rows, `[3, H', W']`, with white between them."""
    n, _, height, width = rgb.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, picture in enumerate(rgb):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = picture
    return sheet


def panels(path: Path, named: Sequence[tuple[str, torch.Tensor]], columns: int, title: str, width: float = 9) -> bool:
    """Draws RGB pictures `[3, H, W]` with their names into a PNG; False without matplotlib."""
    if not plots.available():
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(named) // columns)
    _, h, w = named[0][1].shape
    each = width / columns
    figure = Figure(figsize=(width, rows * (each * h / w + 0.3) + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for one in axes:
        one.axis("off")
    for one, (name, rgb) in zip(axes, named, strict=False):
        one.imshow(rgb.permute(1, 2, 0).numpy(), interpolation="nearest")
        one.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    return True


def frames(path: Path, trajectory: Sequence[torch.Tensor], title: str, count: int = 11) -> bool:
    """A row for each picture, from noise to the end; `trajectory` begins with the noise."""
    chosen = [round(i * (len(trajectory) - 1) / (count - 1)) for i in range(count)]
    columns = [(f"step {i}" if i else "noise", grid(visible(trajectory[i]), 1)) for i in chosen]
    return panels(path, columns, count, title)


def _number(value: Any, digits: int) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['half_range']:.{digits}f}"
    return f"{value:.{digits}f}"


NAMES = {
    "mean fill": "mean fill", "biharmonic": "biharmonic", "replaced": "a sample, known parts replaced",
    "told": "a sample", "mean of samples": "mean of the samples", "expected": "expected, one step",
}  # fmt: skip


def task_table(tasks: dict[str, Any], key: str = "masked_mse") -> Table:
    """A row for each way to paint, a column for each task."""
    rows: list[tuple[object, ...]] = []
    digits = 4 if key == "masked_mse" else 3
    for name, text in NAMES.items():
        cells = [_number(one[name][key], digits) if name in one else "-" for one in tasks.values()]
        rows.append((text, *cells))
    if key == "judge_accuracy":
        rows.append(("the digits themselves", *(_number(one["truth"][key], digits) for one in tasks.values())))
    return (key.replace("_", " ").replace("mse", "MSE"), *tasks), rows


def sample_table(found: dict[str, Any]) -> Table:
    """A row for each sampler."""
    rows: list[tuple[object, ...]] = []
    for name, one in found.items():
        if isinstance(one, dict):
            cells = (_number(one[key], 3) for key in ("judge_accuracy", "fd_digits", "nearest"))
            rows.append((name, *cells, f"{one['copies']['mean']:.0f}"))
    return (
        f"{found['count']} digits",
        "judge sees the digit",
        "FD-digits",
        "nearest, median",
        "copies",
    ), rows


def text_table(found: dict[str, Any]) -> Table:
    """A row for each model and guidance."""
    rows: list[tuple[object, ...]] = []
    for name, one in found.items():
        if isinstance(one, dict) and "style_accuracy" in one:
            cells = (_number(one[key], 3) for key in ("judge_accuracy", "style_accuracy", "fd_digits", "nearest"))
            rows.append((name, *cells))
    columns = (f"{found['count']} captions", "judge sees the digit", "as bold as asked", "FD-digits", "nearest, median")
    return columns, rows
