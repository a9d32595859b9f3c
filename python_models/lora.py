"""The small Llama adapted to other registers: LoRA and its kin, adapters, BitFit, prompt tuning, and full fine-tuning.

Four commands, each with --help:

    python -m python_models.lora                                   # all methods side by side: some minutes
    python -m python_models.lora train headers --out my_adapter    # one, in PEFT's files
    python -m python_models.lora bench                             # a step beside PEFT's; many adapters in one batch
    python -m python_models.serving --adapter headers=my_adapter   # served, beside the model itself
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from genai_kernels.cli.console import print_table, progress, say
from genai_kernels.nn import save_adapter
from python_models import lora_bench, lora_compare, lora_report
from python_models.lora_data import SOURCES, Register
from python_models.lora_methods import METHODS
from python_models.lora_train import held_out_bits, new_run

IN_FILES = ("lora", "dora", "qlora")  # methods whose result is an adapter in PEFT's layout


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m python_models.lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    compare = commands.add_parser("compare", help="all methods side by side; the default")
    compare.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    compare.add_argument("--registers", nargs="+", choices=SOURCES, default=list(SOURCES))
    compare.add_argument("--steps", type=int, default=60)
    compare.add_argument("--seeds", type=int, default=3)
    compare.add_argument("--held-out", type=int, default=4096, help="tokens of the held-out text that are scored")
    compare.add_argument("--twin-steps", type=int, default=10, help="that ours, eager and float64 take in turn")
    train = commands.add_parser("train", help="one method on one register")
    train.add_argument("register", choices=SOURCES)
    train.add_argument("--method", choices=METHODS, default="lora")
    train.add_argument("--steps", type=int, default=400)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", type=Path, help="folder of the adapter, in PEFT's layout")
    train.add_argument("--checkpoint", type=Path, help="written as it goes, and taken up if it is there")
    train.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    bench = commands.add_parser("bench", help="beside PEFT, and with many adapters in one batch")
    bench.add_argument("--steps", type=int, default=22)
    bench.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    for command in (compare, bench):
        command.add_argument("--output", type=Path, help="JSON file for the figures; its plots go beside it")
    for command in (compare, train, bench):
        _threads(command)
    return parser


def compare(given: argparse.Namespace) -> int:
    total = len(given.methods) * len(given.registers) * given.seeds * given.steps
    with progress(total) as step:
        found = lora_compare.compare(
            given.methods, given.registers, steps=given.steps, seeds=given.seeds, twin_steps=given.twin_steps,
            held_out=given.held_out, say=step,
        )  # fmt: skip
    for about in found["registers"].values():
        say(about)
    columns, rows = lora_report.method_table(found)
    print_table(f"after {given.steps} steps of {found['tokens_per_step']} tokens", columns, rows,
                right=range(1, len(columns)))  # fmt: skip
    wrong = [name for name, one in found["methods"].items() if not one["agrees"]]
    say(f"losses beside the eager twin's, {given.twin_steps} steps each: " + (
        f"DISAGREE: {', '.join(wrong)}" if wrong else "agree, by the rule for loss curves"))  # fmt: skip
    _write(given.output, found)
    if given.output:
        lora_report.method_plots(found, given.output.parent, given.output.stem)
    return 1 if wrong else 0


def train(given: argparse.Namespace) -> int:
    if given.out and given.method not in IN_FILES:
        print(f"lora: --out: expected a method of {', '.join(IN_FILES)}, got {given.method}", file=sys.stderr)
        return 2
    register = Register.load(given.register, lora_compare.tokenizer())
    say(register.about)
    run = new_run(given.method, lora_compare.recipe_of(given.method, given.steps, given.seed), register.train)
    if given.checkpoint and given.checkpoint.exists():
        run.resume(given.checkpoint)
        say(f"taken up at step {len(run.losses)}")
    while len(run.losses) < given.steps:
        run.step()
        done = len(run.losses)
        if done % given.every == 0 or done == given.steps:
            say(f"step {done}: {sum(run.losses[-given.every :]) / len(run.losses[-given.every :]):.3f} nats per token")
            if given.checkpoint:
                run.save(given.checkpoint)
    before, after = lora_compare.base_bits(register), held_out_bits(run.adapted, register)
    say(f"held-out bits per character: {before:.4f} before, {after:.4f} after")
    if given.out:
        save_adapter(run.adapted.model, given.out)
        about = {
            "trained_on": register.about, "method": given.method, "steps": given.steps, "seed": given.seed,
            "held_out_bits_per_character": {"before": round(before, 4), "after": round(after, 4)},
        }  # fmt: skip
        (given.out / "training.json").write_text(json.dumps(about, indent=2) + "\n")
        say(f"wrote {given.out}")
    return 0


def bench(given: argparse.Namespace) -> int:
    register = Register.load("headers", lora_compare.tokenizer())
    steps = lora_bench.training_steps(register.train, given.steps)
    batch = lora_bench.decoding(given.adapters)
    say("timed")
    for name, peak in lora_bench.peaks().items():
        steps[name]["peak_bytes"] = peak
    print_table("a training step of the whole model, 512 tokens, rank 8; in turn", *lora_report.step_table(steps),
                right=range(1, 6))  # fmt: skip
    columns, rows = lora_report.batch_table(batch)
    print_table("decoding, 64 requests at once; in turn", columns, rows, right=range(1, len(columns)))
    _write(given.output, {"threads": torch.get_num_threads(), "torch": torch.__version__, "training_step": steps,
                          "decoding_step": batch})  # fmt: skip
    if given.output:
        lora_report.batch_plot(batch, given.output.with_suffix(".png"), 64)
    return 0


def _write(path: Path | None, found: dict[str, object]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        say(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    given = parser.parse_args(argv if argv and argv[0] in ("compare", "train", "bench", "-h", "--help")
                              else ["compare", *argv])  # fmt: skip
    if given.threads:
        torch.set_num_threads(given.threads)
    return {"compare": compare, "train": train, "bench": bench}[given.command](given)


if __name__ == "__main__":
    sys.exit(main())
