"""The demonstration's chapter on painting: digits to order and from captions, a photograph's holes; eager twins beside.

Exit code 1 if a trajectory or a training loss disagrees with the eager twin's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genai_kernels.cli import report
from genai_kernels.cli.console import print_table, progress, say
from genai_kernels.cli.machine import fingerprint
from genai_kernels.cli.report import Section
from python_models import diffusion_report as pictures
from python_models.char_lm_train import agreement
from python_models.diffusion import Sampler, Schedule
from python_models.diffusion_data import CROP, SETS, Pictures, held_out_part, tiles, untiled
from python_models.diffusion_masks import biharmonic_fill, masked_mse, mean_fill, task_mask
from python_models.diffusion_tasks import channel_means, start_of
from python_models.diffusion_train import CONFIGS, RECIPES, Run, checkpoint_of, load_model, new_model, twin
from python_models.diffusion_twins import step_times, twin_drifts
from python_models.digit_judge import load_judge
from python_models.latent_diffusion import STYLES, caption
from python_models.latent_main import load_model as load_text_model
from python_models.latent_main import load_vae
from python_models.latent_train import MODELS, paint, text_drifts
from python_models.unet import UNet

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "diffusion"
Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


def training(steps: int) -> tuple[bool, str]:
    """A new digit model, its eager twin and float64's, in turn."""
    run = Run(new_model(CONFIGS["digits"], 0), Schedule(), RECIPES["digits"], SETS["digits"]())
    eager, exact = twin(run), twin(run, exact=True)
    with progress(3 * steps) as bar:
        for i in range(steps):
            for one in (run, eager, exact):
                bar(f"training, step {i}: loss {run.losses[-1]:.3f}" if run.losses else "training")
                one.step()
    rule = agreement(run.losses, eager.losses, exact.losses)
    ours, theirs = (statistics.median(one.seconds[1:]) for one in (run, eager))
    return rule.ok, (
        f"{steps} training steps of a new model, {run.model.parameter_count:,} parameters: the losses "
        f"{'agree with' if rule.ok else 'DISAGREE WITH'} the eager twin's; {1e3 * ours:.0f} ms a step, eager "
        f"{theirs / ours:.2f}x as long"
    )


def trajectories(name: str, model: UNet, schedule: Schedule, data: Pictures, count: int) -> tuple[bool, list[str]]:
    """Fifty steps of DDIM and of DDPM beside the eager twins; and the time of a call."""
    start, seeds = start_of(count, data.shape, 0)
    label = None if data.held_out_labels is None else torch.arange(count) % 10
    ok, lines = True, []
    for way, eta in (("DDIM", 0.0), ("DDPM", 1.0)):
        sampler = Sampler(schedule, 50, eta=eta, largest=data.largest)
        for drift in twin_drifts(model, sampler, start, seeds, label=label).values():
            ok &= drift.ok
            lines.append(f"{name}, {way}, {drift.line}")
    batch = torch.cat([start] * (64 // count))
    labels = None if label is None else label.repeat(64 // count)
    seconds = step_times(model, torch.cat([batch] * (model.config.in_channels // data.shape[0]), 1), labels, rounds=9)
    ours, eager = (statistics.median(seconds[who]) for who in ("ours", "eager"))
    lines.append(f"{name}: a step of 64 pictures takes {1e3 * ours:.1f} ms, eager {eager / ours:.2f}x as long")
    return ok, lines


def paint_digits(model: UNet, schedule: Schedule, each: int, folder: Path) -> tuple[str, dict[Path, bool]]:
    """Every digit so many times, to order; and the way of the first ones."""
    label = torch.arange(10).repeat(each)
    start, _ = start_of(len(label), (1, 8, 8), 1)
    way = [start, *Sampler(schedule, 50, guidance=2.0).trajectory(model, start, label=label)]
    right = load_judge().accuracy(way[-1], label)
    sheet = pictures.grid(pictures.visible(way[-1]), 10, gap=2)
    paths = [folder / "diffusion_digits.png", folder / "diffusion_frames.png"]
    drawn = {
        paths[0]: pictures.panels(paths[0], [("", sheet)], 1, "Digits painted to order, 0 to 9", 6),
        paths[1]: pictures.frames(paths[1], [x[:10] for x in way], "From noise to digits, 50 steps of DDIM"),
    }
    line = f"{len(label)} digits painted to order, 50 steps: the judge sees the one asked for in {100 * right:.1f} %"
    return line, drawn


def paint_captions(each: int, folder: Path) -> tuple[bool, list[str], dict[Path, bool]]:
    """Digits from captions: every digit light, as it comes, and bold, by a UNet and by a transformer."""
    vae, judge, wanted = load_vae(), load_judge(), [(d, style) for style in STYLES for d in range(10)] * each
    label, captions = torch.tensor([d for d, _ in wanted]), [caption(*order) for order in wanted]
    ok, lines, sheets = True, [], []
    for name in MODELS:
        model = load_text_model(name)
        for drift in text_drifts(model, 8).values():
            ok &= drift.ok
            lines.append(f"captions, {name}, {drift.line}")
        painted = paint(model, vae, captions, 0)
        right = judge.accuracy(painted, label)
        lines.append(
            f"captions, {name}: the judge sees the digit that is asked for in {100 * right:.1f} % of {len(wanted)}"
        )
        sheets.append((f"{name}: {', '.join(style or 'as it comes' for style in STYLES)}",
                       pictures.grid(pictures.visible(painted[:30]), 10, gap=2)))  # fmt: skip
    path = folder / "diffusion_captions.png"
    title = f'Captions to digits: "{captions[3]}", "{captions[13]}", "{captions[23]}" ...'
    return ok, lines, {path: pictures.panels(path, sheets, 2, title, 11)}


def paint_photograph(
    model: UNet, schedule: Schedule, data: Pictures, name: str, rows: int, folder: Path, seeds: int
) -> tuple[Table, dict[Path, bool]]:
    """The top of a photograph's held-out end: a hole in every crop of it filled, its colours given."""
    part = held_out_part(name)[:, : rows * CROP]
    columns, truth, means = part.shape[2] // CROP, tiles(part), channel_means(data)
    whole = lambda crops: pictures.visible(untiled(crops, columns))  # noqa: E731
    sampler, found, images = Sampler(schedule, 50, largest=data.largest), [], []
    for task in ("hole", "colour"):
        known = task_mask(task, data.shape)[None]
        mean = mean_fill(truth, known, means)
        smooth = biharmonic_fill(truth, known, means) if task == "hole" else None
        painted = []
        for seed in range(seeds):
            painted.append(sampler.paint(model, *start_of(len(truth), data.shape, seed), x0=truth, known=known))
        score = lambda x, known=known: float(masked_mse(x, truth, known).mean())  # noqa: E731
        each, average = [score(x) for x in painted], score(sum(painted) / seeds)
        found.append((f"{name}, {task}", f"{score(mean):.4f}", "-" if smooth is None else f"{score(smooth):.4f}",
                     f"{statistics.fmean(each):.4f}", f"{average:.4f}"))  # fmt: skip
        given = pictures.shown(truth, known)
        images += [
            (f"{task}: what is known", untiled(given, columns)),
            ("mean fill", whole(mean)) if smooth is None else ("biharmonic", whole(smooth)),
            ("a sample", whole(painted[0])), (f"mean of {seeds} samples", whole(sum(painted) / seeds)),
            ("the photograph", whole(truth)),
        ]  # fmt: skip
    path = folder / "diffusion_photograph.png"
    title = f"The end of '{name}' that was held out, every {CROP}x{CROP} crop painted by itself"
    drawn = {path: pictures.panels(path, images, 5, title, 11)}
    return (("masked MSE", "mean fill", "biharmonic", "a sample", f"mean of {seeds}"), found), drawn


def recorded() -> list[tuple[str, Table]]:
    """What `python -m python_models.diffusion measure` has found once."""
    found: list[tuple[str, Table]] = []
    for name in SETS:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            one: dict[str, Any] = json.loads(path.read_text())
            about = f"{name}, {one['tasks_seeds']} seeds, measured once"
            found.append((about, pictures.task_table(one["tasks"])))
            if "samples" in one:
                found.append((f"{about}: painted to order", pictures.sample_table(one["samples"])))
    path = RESULTS / "captions.json"
    if path.is_file():
        one = json.loads(path.read_text())
        found.append((f"captions, {one['seeds']} seeds, measured once", pictures.text_table(one)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m python_models.diffusion_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the pictures and the report")
    parser.add_argument("--steps", type=int, default=20, help="of training, beside the twins")
    parser.add_argument("--each", type=int, default=6, help="pictures of each digit")
    parser.add_argument("--photograph", default="motorcycle_left", help="whose held-out end is painted")
    parser.add_argument("--rows", type=int, default=8, help="of its crops")
    parser.add_argument("--seeds", type=int, default=4, help="samples of it")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    begin, machine = time.perf_counter(), fingerprint()

    say("Diffusion models that paint", "bold")
    agreed, line = training(given.steps)
    say(line, None if agreed else "bold red")
    lines, drawn, tables = [line], {}, []
    models = {name: load_model(checkpoint_of(name)) for name in SETS}
    data = {name: load() for name, load in SETS.items()}
    for name, (model, schedule) in models.items():
        say(f"{data[name].about}; {model.parameter_count:,} parameters")
        ok, more = trajectories(name, model, schedule, data[name], 16 if name == "digits" else 4)
        agreed &= ok
        lines += more
        for one in more:
            say(one, None if "DISAGREES" not in one else "bold red")
    line, pngs = paint_digits(*models["digits"], given.each, given.out)
    drawn.update(pngs)
    say(line, "cyan")
    model, schedule = models["photographs"]
    ok, more, pngs = paint_captions(2, given.out)
    agreed &= ok
    lines += more
    drawn.update(pngs)
    for one in more:
        say(one, None if "DISAGREES" not in one else "bold red")
    table, pngs = paint_photograph(
        model, schedule, data["photographs"], given.photograph, given.rows, given.out, given.seeds
    )
    drawn.update(pngs)
    print_table("painted here and now", *table, right=range(1, 5))
    tables = recorded()
    for title, (columns, rows) in tables:
        print_table(title, columns, rows, right=range(1, len(columns)))
    report.html_report(
        given.out / "diffusion.html",
        "genai_kernels: models that paint",
        [
            Section("Machine", f"{report.machine_line(machine)}; {torch.get_num_threads()} threads"),
            Section("Pictures", "\n\n".join(one.about for one in data.values())),
            Section("Beside the eager twins", "\n\n".join(lines)),
            Section("Painted", line, [table], images=[path for path, done in drawn.items() if done]),
            *(Section(title, tables=[one]) for title, one in tables),
        ],
    )
    say(f"report: {given.out / 'diffusion.html'}, after {time.perf_counter() - begin:.0f} s")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
