"""The demonstration's chapter on adapters: the small Llama learns to write C headers, and so does its eager twin; then
it answers as itself, with an adapter for headers and with one for the manual, all in one batch.

Exit code 1 if the losses disagree with the eager twin's, or if a text of the batch is not the one of its request alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genai_kernels.cli import report
from genai_kernels.cli.console import print_table, say
from genai_kernels.cli.machine import fingerprint
from genai_kernels.cli.plots import Line, line_plot
from genai_kernels.cli.report import Section
from genai_kernels.nn import load_adapter
from python_models import llama_files, lora_bench, lora_compare, lora_report
from python_models.llama_train import CHECKPOINT, bits_per_byte
from python_models.lora_data import SOURCES, Register
from python_models.lora_serving import BASE, Adapters
from python_models.lora_train import Run, new_run
from python_models.serving import Engine, Sampling

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "lora" / "llama_stdlib.json"
METHODS = ("lora", "bitfit", "full")  # that are trained here and now
PROMPTS = {"headers": "#ifndef Py_", "manual": "The "}


def adapter_of(register: str) -> Path:
    """The folder of the adapter that was trained on it."""
    return CHECKPOINT.with_name(f"lora_{register}")


def training(text: torch.Tensor, twin_steps: int, steps: int, limit: float) -> tuple[dict[str, Run], dict[str, Any]]:
    """Ours, eager and float64 in turn; then ours alone, to `steps` or until `limit` seconds are over."""
    found = lora_compare.twins(METHODS, text, twin_steps, steps)
    runs = {name: new_run(name, lora_compare.recipe_of(name, steps, 0), text) for name in METHODS}
    end = time.perf_counter() + limit
    for step in range(steps):
        if step >= 5 and time.perf_counter() > end:
            say(f"stopped at step {step}, for time", "yellow")
            break
        for run in runs.values():
            run.step()
    return runs, found


def serve(prompts: list[tuple[str, str]], tokens: int) -> tuple[list[str], list[str], Engine]:
    """What prompts with their adapters are answered in one batch, and each by an engine of its own."""
    words = lora_compare.tokenizer()

    def answers(some: list[tuple[str, str]]) -> tuple[list[str], Engine]:
        model = llama_files.load(CHECKPOINT, dtype=torch.float32)
        adapters = Adapters(model)
        for register in SOURCES:
            adapters.add(register, adapter_of(register))
        engine = Engine(model, adapters=adapters)
        options = Sampling(tokens, temperature=0.7, top_p=0.95, seed=1, ignore_end=True)
        running = [engine.add([0, *words.encode(text).ids], options, adapter=name) for text, name in some]
        engine.run()
        return [words.decode(r.output) for r in running], engine

    together, engine = answers(prompts)
    return together, [answers([one])[0][0] for one in prompts], engine


def scores(registers: dict[str, Register], tokens: int) -> list[tuple[object, ...]]:
    """Bits per character of the beginning of each held-out text: of the model, and with its committed adapter."""
    words, rows = lora_compare.tokenizer(), []
    for name, register in registers.items():
        part = register.beginning(tokens, words)
        model = llama_files.load(CHECKPOINT, dtype=torch.float32).eval()
        bits = []
        for adapter in (None, adapter_of(name)):
            if adapter:
                load_adapter(model, adapter)
            bits.append(bits_per_byte(model.eval(), part.held_out, part.characters))
        rows.append((name, *(f"{b:.3f}" for b in bits)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m python_models.lora_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the plots and the report")
    parser.add_argument("--steps", type=int, default=60, help="of training, of each method")
    parser.add_argument("--train", type=float, default=30.0, metavar="S", help="seconds for them, at most")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64], help="in the batches that are timed")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    begin, machine, words = time.perf_counter(), fingerprint(), lora_compare.tokenizer()

    say(f"{CHECKPOINT.name} adapted to other registers", "bold")
    registers = {name: Register.load(name, words) for name in SOURCES}
    about = "\n\n".join(register.about for register in registers.values())
    say(about)
    runs, found = training(registers["headers"].train, 8, given.steps, given.train)
    agreed = all(one["agreement"].ok for one in found.values())
    line = lora_compare.agreement_line(found)
    say(line, None if agreed else "bold red")
    columns = ("method, on headers", "learns", "ms a step", "eager / ours", "bits/token, first 5 steps", "last 5")
    rows: list[tuple[object, ...]] = []
    for name, run in runs.items():
        ours, eager = (found[name]["seconds"][who]["median"] for who in ("ours", "eager"))
        bits = [sum(part) / len(part) / math.log(2) for part in (run.losses[:5], run.losses[-5:])]
        times = (f"{1e3 * ours:.0f}", f"{eager / ours:.2f}x") if agreed else ("disagrees", "-")
        rows.append((name, f"{found[name]['parameters']:,}", *times, *(f"{b:.2f}" for b in bits)))
    print_table("trained here, with these kernels", columns, rows, right=range(1, 6))
    curves = [Line(name, list(range(len(r.losses))), lora_report.smooth(r.losses)) for name, r in runs.items()]
    pictures = {"loss": given.out / "lora_loss.png", "batch": given.out / "lora_batch.png"}
    drawn = {"loss": line_plot(pictures["loss"], curves, title="Adapting to C headers, mean of 8 steps", xlabel="step",
                               ylabel="bits per token")}  # fmt: skip

    score_columns = ("register", "bits/char of the model", "with its adapter")
    score_rows = scores(registers, 3000)
    print_table("the committed adapters, on the beginning of the held-out text", score_columns, score_rows,
                right=(1, 2))  # fmt: skip
    asked = [(text, name) for text in PROMPTS.values() for name in (BASE, *SOURCES)]
    together, alone, engine = serve(asked, 40)
    same = together == alone
    for (prompt, name), text in zip(asked, together, strict=True):
        say(f"[{name}] {prompt}{text}", "cyan")
    verdict = (
        f"{len(asked)} requests, base and two adapters, in one batch of {engine.steps} steps: "
        + ("each text is the one that its request gets alone." if same else "A TEXT DIFFERS from that of its request "
           "alone.")
    )  # fmt: skip
    say(verdict, None if same else "bold red")

    batch = lora_bench.decoding(given.adapters, steps=6)
    batch_columns, batch_rows = lora_report.batch_table(batch)
    print_table("decoding, 64 requests at once; in turn", batch_columns, batch_rows, right=range(1, len(batch_columns)))
    drawn["batch"] = lora_report.batch_plot(batch, pictures["batch"], 64)
    tables = [(columns, rows)]
    if RESULTS.is_file():
        recorded = json.loads(RESULTS.read_text())
        tables.append(lora_report.method_table(recorded))
        print_table(f"all methods, {recorded['steps']} steps and {recorded['seeds']} seeds: measured once with "
                    "`python -m python_models.lora`", *tables[1], right=range(1, len(tables[1][0])))  # fmt: skip
    image = lambda name: [pictures[name]] if drawn[name] else []  # noqa: E731
    report.html_report(
        given.out / "lora.html",
        "genai_kernels: a Llama adapted",
        [
            Section("Machine", f"{report.machine_line(machine)}; {torch.get_num_threads()} threads"),
            Section("Text", about),
            Section("Training", line, tables, image("loss")),
            Section("Adapters", tables=[(score_columns, score_rows)]),
            Section("One batch", "\n\n".join([verdict, *(f"[{n}] {p}{t}" for (p, n), t in
                                                         zip(asked, together, strict=True))])),
            Section("Adapters in a batch", tables=[(batch_columns, batch_rows)], images=image("batch")),
        ],
    )  # fmt: skip
    say(f"report: {given.out / 'lora.html'}, after {time.perf_counter() - begin:.0f} s")
    return 0 if agreed and same else 1


if __name__ == "__main__":
    sys.exit(main())
