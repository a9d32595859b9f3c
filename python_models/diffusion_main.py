"""The commands of `python -m python_models.diffusion`, each with --help:

train digits --out folder      a model, with checkpoints on the way that a later run takes up
judge --out folder             the classifier of digits that judges the painted ones
sample digits --to out.png     pictures from noise
measure digits                 how well a model paints, as JSON
bench                          how long its steps take, beside eager and compiled eager
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genai_kernels.cli.console import print_table, progress, say
from python_models import diffusion_speed
from python_models.diffusion import SCHEDULES as NAMES
from python_models.diffusion import TARGETS, Sampler, Schedule
from python_models.diffusion_data import SETS
from python_models.diffusion_report import grid, panels, sample_table, task_table, visible
from python_models.diffusion_tasks import measure_samples, measure_task, start_of, tasks_of
from python_models.diffusion_train import (
    CONFIGS,
    RECIPES,
    SCHEDULES,
    Run,
    checkpoint_of,
    held_out_loss,
    load_model,
    new_model,
    save_model,
)
from python_models.diffusion_twins import twin_drifts
from python_models.digit_judge import judge_main, load_judge
from python_models.unet import UNet


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m python_models.diffusion", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="a model")
    train.add_argument("set", choices=SETS)
    train.add_argument("--schedule", choices=NAMES, default="cosine")
    train.add_argument("--target", choices=TARGETS, default="v", help="what the model is to find")
    train.add_argument("--steps", type=int, help="instead of the recipe's")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", type=Path, help="folder for the model; none is written without")
    train.add_argument("--checkpoint", type=Path, help="written as it goes, and taken up if it is there")
    train.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    judge = commands.add_parser("judge", help="the classifier of digits")
    judge.add_argument("--seed", type=int, default=0)
    judge.add_argument("--out", type=Path, help="folder for it; nothing is written without")
    sample = commands.add_parser("sample", help="pictures from noise")
    bench = commands.add_parser("bench", help="the time of their steps")
    bench.add_argument("--seconds", type=float, default=4.0, help="of each case")
    bench.add_argument("--no-compile", action="store_true", help="without compiled eager")
    bench.add_argument("--output", type=Path, help="JSON file for the figures")
    measure = commands.add_parser("measure", help="every figure of a trained model")
    for command in (sample, measure):
        command.add_argument("set", choices=SETS)
        command.add_argument("--model", type=Path, help="a folder that `train` wrote, instead of the committed one")
    sample.add_argument("--to", type=Path, required=True, help="PNG file")
    sample.add_argument("--count", type=int, default=40)
    sample.add_argument("--steps", type=int, default=50)
    sample.add_argument("--eta", type=float, default=0.0, help="0: DDIM, 1: DDPM")
    sample.add_argument("--guidance", type=float, default=2.0, help="of digits, which are asked for in turn; 1: none")
    sample.add_argument("--seed", type=int, default=0)
    measure.add_argument("--seeds", type=int, default=4, help="samples of each picture to be completed")
    measure.add_argument("--every", type=int, default=1, help="only every so-many-th held-out picture")
    measure.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser


def train(given: argparse.Namespace) -> int:
    pictures = SETS[given.set]()
    say(pictures.about)
    recipe = RECIPES[given.set]
    recipe = type(recipe)(given.steps or recipe.steps, recipe.batch, recipe.peak_rate, recipe.warmup, given.seed)
    schedule = dataclasses.replace(SCHEDULES[given.set], name=given.schedule, target=given.target)
    run = Run(new_model(CONFIGS[given.set], given.seed), schedule, recipe, pictures)
    say(f"{run.model.parameter_count:,} parameters, {recipe.steps} steps of {recipe.batch} pictures")
    if given.checkpoint and given.checkpoint.exists():
        run.resume(given.checkpoint)
        say(f"taken up at step {len(run.losses)}")
    with progress(recipe.steps - len(run.losses)) as bar:
        while len(run.losses) < recipe.steps:
            bar(f"loss {statistics.fmean(run.losses[-50:]):.4f}" if run.losses else "")
            run.step()
            done = len(run.losses)
            if done % given.every == 0 or done == recipe.steps:
                say(f"step {done}: loss {statistics.fmean(run.losses[-given.every :]):.4f}")
                if given.checkpoint:
                    run.save(given.checkpoint)
    model = run.averaged()
    losses = {"weights": held_out_loss(run.model, run.schedule, pictures),
              "averaged": held_out_loss(model, run.schedule, pictures)}  # fmt: skip
    say(f"held-out loss: {losses['weights']:.4f} of the weights, {losses['averaged']:.4f} of their running averages")
    if given.out:
        save_model(given.out / "model.safetensors", model, run.schedule)
        known = [s for s in run.seconds if s == s]
        about = {
            "command": f"python -m python_models.diffusion train {given.set} --schedule {given.schedule} "
            f"--target {given.target} --steps {recipe.steps} --seed {given.seed} --out {given.out.name}",
            "pictures": pictures.about, "parameters": run.model.parameter_count, "steps": recipe.steps,
            "batch": recipe.batch, "seed": given.seed, "ema_decay": run.ema_decay,
            "training_loss_last_100": round(statistics.fmean(run.losses[-100:]), 5),
            "held_out_loss": {name: round(loss, 5) for name, loss in losses.items()},
            "seconds_a_step": round(statistics.median(known), 4) if known else None,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip
        (given.out / "training.json").write_text(json.dumps(about, indent=2) + "\n")
        say(f"wrote {given.out}")
    return 0


def judge(given: argparse.Namespace) -> int:
    about = judge_main(given.out, given.seed)
    say(json.dumps(about, indent=2))
    return 0


def _load(given: argparse.Namespace) -> tuple[UNet, Schedule]:
    return load_model(given.model / "model.safetensors" if given.model else checkpoint_of(given.set))


def sample(given: argparse.Namespace) -> int:
    (model, schedule), data = _load(given), SETS[given.set]()
    label = torch.arange(given.count) % 10 if data.labels is not None else None
    sampler = Sampler(schedule, given.steps, given.eta, data.largest, given.guidance)
    painted = sampler.paint(model, *start_of(given.count, data.shape, given.seed), label=label)
    if not panels(given.to, [("", grid(visible(painted), 10))], 1, f"{given.count} {given.set}", 6):
        say("matplotlib is missing: nothing was drawn", "yellow")
        return 1
    say(f"wrote {given.to}")
    return 0


def measure(given: argparse.Namespace) -> int:
    """Trajectories beside the twins, tasks, and of digits samples."""
    (model, schedule), data = _load(given), SETS[given.set]()
    referee = load_judge() if data.labels is not None else None
    found: dict[str, Any] = {
        "command": f"python -m python_models.diffusion measure {given.set} --seeds {given.seeds} --every {given.every}",
        "pictures": data.about, "parameters": model.parameter_count, "schedule": dataclasses.asdict(schedule),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "tasks_seeds": given.seeds, "twins": {}, "tasks": {},
    }  # fmt: skip
    noise, label = start_of(16, data.shape, 0), None if referee is None else torch.arange(16) % 10
    with progress(2 + 2 * given.seeds * len(tasks_of(data))) as bar:
        for way, eta in (("ddim", 0.0), ("ddpm", 1.0)):
            bar(f"{way} beside the twins")
            drifts = twin_drifts(model, Sampler(schedule, 50, eta, data.largest), *noise, label=label)
            found["twins"][way] = {name: dataclasses.asdict(one) | {"ok": one.ok} for name, one in drifts.items()}
            for one in drifts.values():
                say(f"{way}, {one.line}", None if one.ok else "bold red")
        for task in tasks_of(data):
            found["tasks"][task] = measure_task(model, schedule, data, task, every=given.every, seeds=given.seeds,
                                                judge=referee, say=bar)  # fmt: skip
    tables = [task_table(found["tasks"])]
    if referee is not None:
        found["samples"] = measure_samples(model, schedule, data, referee)
        tables += [task_table(found["tasks"], "judge_accuracy"), sample_table(found["samples"])]
    for columns, rows in tables:
        print_table(data.about, columns, rows, right=range(1, len(columns)))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=1) + "\n")
        say(f"wrote {given.output}")
    return 0 if all(one["ok"] for way in found["twins"].values() for one in way.values()) else 1


def bench(given: argparse.Namespace) -> int:
    found = diffusion_speed.measure(given.seconds, not given.no_compile, say)
    columns, rows = diffusion_speed.table(found)
    print_table("steps in turn", columns, rows, right=range(1, len(columns)))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        command = f"python -m python_models.diffusion bench --seconds {given.seconds:g}"
        about = {"command": command, "threads": torch.get_num_threads(),
                 "torch": torch.__version__, "seconds": found}  # fmt: skip
        given.output.write_text(json.dumps(about, indent=1) + "\n")
        say(f"wrote {given.output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    return {"train": train, "judge": judge, "sample": sample, "bench": bench, "measure": measure}[given.command](given)
