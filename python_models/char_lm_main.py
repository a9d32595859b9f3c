"""The character LM as a program: `python -m python_models.char_lm [demo|train|positions|speed|calibrate]`."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from genai_kernels.cli.console import print_table, progress, say
from genai_kernels.cli.plots import Line, line_plot
from genai_kernels.cli.report import Section, html_report
from python_models import char_data, char_lm_demo, char_lm_speed
from python_models.char_lm import Config
from python_models.char_lm_report import corpus_line, in_bits, kneser_ney_bits, print_speed, sample_text
from python_models.char_lm_train import Recipe, Run, bits, calibrate, new_run
from python_models.position_embeddings import POSITIONS


def _config(arguments: argparse.Namespace, vocabulary: int, **more) -> Config:
    names = ("layers", "width", "heads", "kv_heads", "window", "context", "positions")
    given = {name: getattr(arguments, name) for name in names}
    return Config(vocabulary, hidden=-(-arguments.width * 8 // 3 // 16) * 16, **{**given, **more})


def _recipe(arguments: argparse.Namespace, **more) -> Recipe:
    return Recipe(**{"steps": arguments.steps, "batch": arguments.batch, "peak_rate": arguments.rate, **more})


def train_runs(runs: Sequence[Run]) -> None:
    with progress(sum(run.recipe.steps for run in runs)) as step:
        for run in runs:
            for i in range(run.recipe.steps):
                latest = f", {in_bits(run.losses[-1:])[0]:.2f} bits/char" if run.losses else ""
                step(f"{run.model.config.positions}, seed {run.recipe.seed}, step {i}{latest}")
                run.step()
                if (i + 1) % 200 == 0 and not sys.stderr.isatty():
                    recent = statistics.fmean(in_bits(run.losses[-50:]))
                    say(f"{run.model.config.positions}, seed {run.recipe.seed}, step {i + 1}: {recent:.3f} bits/char")


def train(arguments: argparse.Namespace) -> int:
    """Trains from several seeds; bits per character with the spread, beside the 5-gram baseline."""
    corpus = char_data.load()
    say(corpus_line(corpus))
    config = _config(arguments, len(corpus.vocabulary))
    runs = [new_run(config, _recipe(arguments, seed=seed), corpus.train) for seed in range(arguments.seeds)]
    say(f"{sum(w.numel() for w in runs[0].model.parameters()):,} parameters, {config}")
    train_runs(runs)
    baseline = kneser_ney_bits(corpus, config.context)
    scores = [float(bits(run.model, corpus.validation, config.context).mean()) for run in runs]
    spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
    rows: list[tuple[object, ...]] = [("5-gram Kneser-Ney", f"{baseline:.3f}", "-", f"{len(corpus.train):,}", "-")]
    for run, score in zip(runs, scores, strict=True):
        seen = run.recipe.steps * run.recipe.batch * config.context
        rows.append(
            (f"this model, seed {run.recipe.seed}", f"{score:.3f}", f"{score - baseline:+.3f}", f"{seen:,}",
             f"{run.tokens_per_second:,.0f}")
        )  # fmt: skip
    mean = statistics.fmean(scores)
    rows.append((f"mean of {len(scores)} seeds", f"{mean:.3f} ± {spread:.3f}", f"{mean - baseline:+.3f}", "", ""))
    columns = ("model", "bits per character", "against 5-gram", "characters read", "characters/s")
    print_table(
        "validation, characters with at least a quarter of the context before them", columns, rows, right=range(1, 5)
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = list(range(arguments.steps))
    curves = [Line(f"seed {r.recipe.seed}", steps, in_bits(r.losses)) for r in runs]
    curves.append(Line("5-gram Kneser-Ney, validation", [0, arguments.steps], [baseline] * 2, dashed=True, color=6))
    picture = arguments.out / "training.png"
    drawn = line_plot(picture, curves, title="Training", xlabel="step", ylabel="bits per character")
    sample = sample_text(runs[0].model, corpus, 600)
    say(sample)
    html_report(
        arguments.out / "training.html", "Character LM: training",
        [Section("Data", corpus_line(corpus)), Section("Result", str(config), [(columns, rows)], [picture] * drawn),
         Section("Generated text", sample.replace("\n\n", "\n"))],
    )  # fmt: skip
    say(f"wrote {arguments.out / 'training.html'}")
    return 0


def positions(arguments: argparse.Namespace) -> int:
    """Trains one model for each position embedding; bits per character inside and at twice the training length."""
    corpus = char_data.load()
    kinds = arguments.kinds or POSITIONS
    runs = [
        new_run(_config(arguments, len(corpus.vocabulary), positions=kind), _recipe(arguments, seed=seed), corpus.train)
        for kind in kinds
        for seed in range(arguments.seeds)
    ]
    train_runs(runs)
    rows = []
    for kind in kinds:
        scores: list[list[float]] = [[], []]
        for run in (r for r in runs if r.model.config.positions == kind):
            for i, context in enumerate((arguments.context, 2 * arguments.context)):
                if kind != "learned" or i == 0:  # it has no embedding for a position beyond training
                    scores[i].append(float(bits(run.model, corpus.validation, context, most=64).mean()))
        cells = []
        for some in scores:
            spread = f" ± {statistics.stdev(some):.3f}" if len(some) > 1 else ""
            cells.append(f"{statistics.fmean(some):.3f}{spread}" if some else "-")
        rows.append((kind, *cells))
    context = arguments.context
    print_table(
        f"bits per character, {arguments.steps} steps of {arguments.batch} x {context} characters, "
        f"{arguments.seeds} seeds, window {arguments.window}",
        ("positions", f"length {context}", f"length {2 * context}"), rows, right=(1, 2),
    )  # fmt: skip
    return 0


def speed(arguments: argparse.Namespace) -> int:
    """Characters per second of training and generation, ours beside eager, PyTorch's attention and torch.compile."""
    corpus = char_data.load()
    config = _config(arguments, len(corpus.vocabulary))
    found = char_lm_speed.training_speed(config, _recipe(arguments), corpus.train, compiled=arguments.compile)
    print_speed(f"training, {arguments.batch} x {config.context} characters, window {config.window}", found)
    run = new_run(config, _recipe(arguments), corpus.train)
    prompt = corpus.validation[None, : config.context]
    found = char_lm_speed.generation_speed(run.model, prompt, compiled=arguments.compile)
    print_speed(f"generation after {config.context} characters, window {config.window}", found)
    return 0


def calibration(arguments: argparse.Namespace) -> int:
    """Measures K of the rule that loss curves are held against, on eager alone."""
    corpus = char_data.load()
    config = Config(len(corpus.vocabulary), layers=2, width=32, hidden=96, window=16, context=64)
    for seed in range(arguments.seeds):
        found = calibrate(config, Recipe(arguments.steps, seed=seed), corpus.train)
        say(f"seed {seed}: the least K with which eager agrees with eager is {found:.2f}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m python_models.char_lm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = Config(vocabulary=0)
    for function, steps, seeds in ((train, 6000, 3), (positions, 400, 2), (speed, 1, 1), (calibration, 120, 3)):
        name = {"calibration": "calibrate"}.get(function.__name__, function.__name__)
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--seeds", type=int, default=seeds)
        command.add_argument("--batch", type=int, default=Recipe.batch)
        command.add_argument("--rate", type=float, default=Recipe.peak_rate, help="the highest learning rate")
        for field in dataclasses.fields(Config):
            if field.name in ("layers", "width", "heads", "kv_heads", "window", "context"):
                command.add_argument(
                    f"--{field.name.replace('_', '-')}", type=int, default=getattr(defaults, field.name)
                )
        command.add_argument("--positions", choices=POSITIONS, default=defaults.positions)
        command.add_argument("--out", type=Path, default=Path("demo_report"))
        if function is positions:
            command.add_argument("--kinds", nargs="*", choices=POSITIONS, help="only these")
        if function is speed:
            command.add_argument("--compile", action="store_true", help="torch.compile too: takes minutes to compile")
    char_lm_demo.add_arguments(commands.add_parser("demo", help=char_lm_demo.__doc__.splitlines()[0]))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)
