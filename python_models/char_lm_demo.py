"""The demonstration: trains the character LM with our kernels and, beside it, its eager twins; compares, generates,
measures, and writes plots and one HTML report. Exit code 1 if the loss curves disagree or a result of ours is wrong.

The number of steps follows from the time that a step takes here, so that it ends in minutes on a slow machine too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from genai_kernels.cli import measure, report
from genai_kernels.cli.console import print_table, progress, say
from genai_kernels.cli.machine import fingerprint
from genai_kernels.cli.plots import Line, line_plot
from genai_kernels.cli.report import Section
from genai_kernels.cli.select import op
from python_models import char_data
from python_models.char_lm import Config
from python_models.char_lm_report import announce, corpus_line, in_bits, kneser_ney_bits, sample_text, speed_table
from python_models.char_lm_speed import generation_speed, seconds_by_length, training_speed
from python_models.char_lm_train import Agreement, Recipe, Run, agreement, bits, eager_twin, exact_twin, new_run

# The cases of the table: op, what the name of its case contains, dtypes. The largest for which eager's score matrix and
# its float64 twin take a few seconds.
CASES = (
    ("flash_attention", "n2048_d64_causal", (torch.float32,)),
    ("flash_attention", "n4096_d64_window256", (torch.float32, torch.bfloat16)),
    ("rms_norm", "512x4096", (torch.float32, torch.bfloat16)),
    ("silu_and_mul", "512x11008", (torch.float32,)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the plots and the report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twins", type=float, default=55.0, metavar="S", help="seconds for ours, eager and float64")
    parser.add_argument("--train", type=float, default=35.0, metavar="S", help="seconds for ours to go on alone")
    parser.add_argument("--limit", type=float, default=160.0, metavar="S", help="no measurement is begun after it")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch", type=int, default=Recipe.batch)


@dataclasses.dataclass
class Twins:
    """The three runs and what their comparison gave."""

    ours: Run
    eager: Run
    exact: Run
    steps: int  # that all three took
    agreement: Agreement


def _plan(config: Config, text: torch.Tensor, arguments: argparse.Namespace) -> tuple[int, int]:
    """How many steps all three take, and how many ours takes in all: from the time of one step of each."""
    recipe = Recipe(steps=4, batch=arguments.batch)
    run = new_run(config, recipe, text)
    runs = (run, eager_twin(run), exact_twin(run))
    for one in runs:
        one.step()  # the first is slower
    for one in (run, *runs):
        one.step()
    ours, all_three = min(run.seconds), sum(min(one.seconds) for one in runs)
    together = max(10, min(200, int(arguments.twins / all_three)))
    return together, together + max(50, min(3000, int(arguments.train / ours)))


def train_twins(config: Config, text: torch.Tensor, arguments: argparse.Namespace) -> Twins:
    """Ours, eager and float64 in turn, step by step; then ours alone."""
    together, total = _plan(config, text, arguments)
    ours = new_run(config, Recipe(total, arguments.batch, seed=arguments.seed), text)
    eager, exact = eager_twin(ours), exact_twin(ours)
    say(
        f"{sum(w.numel() for w in ours.model.parameters()):,} parameters, {config.layers} layers, window "
        f"{config.window}, {arguments.batch} x {config.context} characters a step; {together} steps of ours, eager and "
        f"eager in float64, then ours alone up to {total}"
    )
    with progress(total + 2 * together) as step:

        def advance(named: dict[str, Run], steps: int, seconds: float, least: int = 0) -> None:
            """Steps in turn; fewer than planned when the machine has become much slower than it was."""
            end = time.perf_counter() + 1.5 * seconds
            for i in range(steps):
                if i >= least and time.perf_counter() > end:
                    break
                latest = f": {in_bits(ours.losses[-1:])[0]:.3f} bits/char" if ours.losses else ""
                for name, run in named.items():
                    step(f"step {len(ours.losses)} {name}{latest}")
                    run.step()

        advance({"ours": ours, "eager": eager, "float64": exact}, together, arguments.twins, least=10)
        together = len(eager.losses)
        advance({"ours": ours}, total - together, arguments.train)
    found = agreement(ours.losses[:together], eager.losses, exact.losses)
    return Twins(ours, eager, exact, together, found)


def _agreement_text(twins: Twins) -> str:
    found = twins.agreement
    places = [0, twins.steps // 2, twins.steps - 1]
    samples = ", ".join(
        f"step {i}: ours {found.error[i]:.1e}, eager {found.eager_error[i]:.1e}, allowed {found.limit[i]:.1e}"
        for i in places
    )
    if found.ok:
        return f"the loss curves agree in all {twins.steps} steps. Distance from float64, nats: {samples}"
    return f"THE LOSS CURVES DISAGREE from step {found.first_excess} on. Distance from float64, nats: {samples}"


def _train_table(twins: Twins) -> report.Table:
    rows = []
    for name, run in (("ours", twins.ours), ("eager", twins.eager), ("eager, float64", twins.exact)):
        seconds = run.seconds[1 : twins.steps]
        ratio = statistics.median(seconds) / statistics.median(twins.ours.seconds[1 : twins.steps])
        rate = run.recipe.batch * run.model.config.context / statistics.median(seconds)
        loss = in_bits(run.losses[twins.steps - 1 :])[0]
        rows.append((name, f"{1e3 * statistics.median(seconds):.0f}", f"{rate:,.0f}", f"{ratio:.2f}x", f"{loss:.6f}"))
    return ("training step", "ms", "characters/s", "time / our time", f"bits/char at step {twins.steps - 1}"), rows


def _loss_plots(twins: Twins, folder: Path) -> list[Path]:
    n, found = twins.steps, twins.agreement
    steps = list(range(len(twins.ours.losses)))
    clock: dict[str, list[float]] = {}
    for name, run in (("ours", twins.ours), ("eager", twins.eager)):
        clock[name] = [sum(run.seconds[: i + 1]) for i in range(len(run.seconds))]
    ours, eager = in_bits(twins.ours.losses), in_bits(twins.eager.losses)
    pictures = [folder / "loss.png", folder / "loss_by_time.png", folder / "loss_error.png"]
    drawn = [
        line_plot(pictures[0], [Line("ours", steps, ours),
                                Line("eager, same seed and batches", steps[:n], eager, dashed=True)],
                  title="Training loss", xlabel="step", ylabel="bits per character"),
        line_plot(pictures[1], [Line("ours", clock["ours"], ours), Line("eager", clock["eager"], eager)],
                  title="Training loss by time", xlabel="seconds of training", ylabel="bits per character"),
        line_plot(pictures[2], [Line("ours", steps[:n], found.error),
                                Line("eager", steps[:n], found.eager_error, dashed=True),
                                Line("allowed", steps[:n], found.limit, dashed=True, color=6)],
                  title="Distance of the loss from float64", xlabel="step", ylabel="nats", log_y=True),
    ]  # fmt: skip
    return [picture for picture, ok in zip(pictures, drawn, strict=True) if ok]


def _lengths(config: Config, end: float) -> dict[str, dict[int, float]]:
    powers = [512 * 2**i for i in range(5)]
    wanted = {
        "ours, window": powers, "ours, full": powers[:-1], "eager, window": powers[:3], "SDPA, window": powers[:4],
        "SDPA, full": powers[:-1],
    }  # fmt: skip
    with progress(sum(map(len, wanted.values()))) as step:
        return seconds_by_length(config, wanted, rounds=2, step=step, end=end)


def _length_table(lengths: dict[str, dict[int, float]]) -> report.Table:
    every = sorted({n for times in lengths.values() for n in times})
    rows = [(name, *(f"{1e3 * times[n]:.0f}" if n in times else "-" for n in every)) for name, times in lengths.items()]
    return ("forward + backward, ms", *(f"{n}" for n in every)), rows


def _bench(end: float) -> list[dict[str, Any]]:
    settings = measure.Settings(threads=(torch.get_num_threads(),), seconds=0.05)
    cases: list[dict[str, Any]] = []
    with progress(sum(measure.count([op(name)], list(dtypes), True, case) for name, case, dtypes in CASES)) as step:
        for name, case, dtypes in CASES:
            if not cases or time.perf_counter() < end:
                cases += measure.run([op(name)], list(dtypes), settings, True, step, case)
            else:
                say(f"left out, for time: {name} {case}", "yellow")
    return cases


def run(arguments: argparse.Namespace) -> int:
    begin = time.perf_counter()
    threads = min(2, len(os.sched_getaffinity(0)))
    torch.set_num_threads(threads)
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    machine = fingerprint()
    say(f"{report.machine_line(machine)}; {threads} threads")

    announce("1. Text: the source of Python's standard library")
    corpus = char_data.load()
    say(corpus_line(corpus))
    config = Config(len(corpus.vocabulary), layers=3, context=arguments.context, window=arguments.window)

    announce("2. Training: ours, and the same model in plain PyTorch from the same weights on the same batches")
    twins = train_twins(config, corpus.train, arguments)
    pictures = _loss_plots(twins, folder)
    train_table = _train_table(twins)
    print_table("", *train_table, right=range(1, 5))
    say(_agreement_text(twins), None if twins.agreement.ok else "bold red")
    step_speed = training_speed(config, Recipe(8, arguments.batch), corpus.train, rounds=7)
    speed = speed_table(step_speed)
    print_table("whole training steps in turn, beside PyTorch's own attention too", *speed, right=(1, 2, 3))

    announce("3. Validation and generated text")
    most = 40
    model, read = twins.ours.model, len(twins.ours.losses) * arguments.batch * config.context
    score = float(bits(model, corpus.validation, config.context, most).mean())
    baseline = kneser_ney_bits(corpus, config.context, most)
    quality = (
        f"after {read:,} characters: {score:.3f} bits per character in validation; a 5-gram Kneser-Ney model of all "
        f"{len(corpus.train):,} characters: {baseline:.3f}. "
        + ("The model is better." if score < baseline else "So short a training does not beat it yet; "
           "`python -m python_models.char_lm train` trains longer.")
    )  # fmt: skip
    say(quality)
    text = sample_text(model, corpus, 400)
    say(text, "cyan")
    generation = generation_speed(model, corpus.validation[None, : config.context], count=48, rounds=2)
    generation_table = speed_table(generation)
    print_table(f"generation after {config.context} characters, all contestants write the same", *generation_table,
                right=(1, 2, 3))  # fmt: skip

    announce("4. Time by length of the text")
    lengths = _lengths(config, begin + 0.85 * arguments.limit)
    length_table = _length_table(lengths)
    print_table(f"the whole model, one text, window {config.window}", *length_table, right=range(1, 8))
    curves = [Line(n, list(times), list(times.values()), dashed="full" in n) for n, times in lengths.items() if times]
    if line_plot(folder / "time_by_length.png", curves, title=f"Forward and backward, window {config.window} and full",
                 xlabel="characters", ylabel="seconds", log_x=True, log_y=True):  # fmt: skip
        pictures.append(folder / "time_by_length.png")

    announce("5. The ops, each result checked against float64 just before it is timed")
    cases = _bench(begin + arguments.limit)
    columns, rows = report.case_table(cases)
    print_table("", columns, rows, right=range(4, len(columns) - 1))
    for line in report.failures(cases):
        say(line, "red" if "REFUSED" in line else "yellow")
    if report.speedup_plot(cases, folder / "speed_ups.png"):
        pictures.append(folder / "speed_ups.png")

    by_name = {picture.stem: picture for picture in pictures}
    some = lambda *names: [by_name[name] for name in names if name in by_name]  # noqa: E731
    report.html_report(
        folder / "report.html",
        "genai_kernels: a character language model, ours and eager",
        [
            Section("Machine", f"{report.machine_line(machine)}; {threads} threads"),
            Section("Text", corpus_line(corpus)),
            Section("Training", f"{_agreement_text(twins)}\n\nThe rule: {Agreement.__doc__}", [train_table, speed],
                    some("loss", "loss_by_time", "loss_error")),
            Section("Validation", quality),
            Section("Generated text", "\n\n".join(text.splitlines())),
            Section("Generation", tables=[generation_table]),
            Section("Time by length", "A window's time grows with the length, full attention's with its square.",
                    [length_table], some("time_by_length")),
            Section("Ops", "\n\n".join(report.failures(cases)), [(columns, rows)], some("speed_ups")),
        ],
    )  # fmt: skip
    refused = sum(bool(case["refused"]) for case in cases)
    say(f"\nwrote {folder / 'report.html'} and {len(pictures)} plots in {time.perf_counter() - begin:.0f} s", "bold")
    if not twins.agreement.ok or refused:
        say(f"FAILED: loss curves {'agree' if twins.agreement.ok else 'disagree'}, {refused} wrong results", "bold red")
        return 1
    return 0
