"""Peak memory of training steps, each contestant in a fresh process: how far its memory grows above what it has before
the checkpoint is loaded, in two steps.

    python -m python_models.lora_memory lora auto            # bytes; a method and a backend
    python -m python_models.lora_memory peft transformers    # or PEFT, and on which model
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from genai_kernels.cli.timing import peak_memory
from python_models.char_lm_train import Recipe
from python_models.llama import Llama
from python_models.llama_configs import Config
from python_models.lora_methods import METHODS, Sizes, adapt
from python_models.lora_peft import WITHOUT_DROPOUT, PeftRun
from python_models.lora_train import Run, new_run

TINY = Config(vocabulary=64, layers=1, width=16, heads=2, kv_heads=1, hidden=16, context=16, tied=True)


def peak(what: str, how: str, *, batch: int = 2, length: int = 256, threads: int = 2) -> int:
    """Bytes of two training steps in a process of their own; see the arguments above."""
    numbers = [str(n) for n in (batch, length, threads)]
    command = [sys.executable, "-m", "python_models.lora_memory", what, how, *numbers]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        raise RuntimeError(f"lora_memory: {what} {how}: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_models.lora_memory", description=__doc__)
    parser.add_argument("what", choices=[*METHODS, "peft"])
    parser.add_argument("how", choices=["auto", "reference", "this model", "transformers"])
    parser.add_argument("batch", type=int, nargs="?", default=2)
    parser.add_argument("length", type=int, nargs="?", default=256)
    parser.add_argument("threads", type=int, nargs="?", default=2)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    recipe, text = Recipe(2, batch=given.batch, warmup=1), torch.randint(2000, (given.length + 2,))
    # what a first step loads is not the step's
    small = adapt(Llama(TINY), "full", Sizes())
    backend = given.how if given.what != "peft" else "reference"
    Run(small, Recipe(2, batch=1), torch.zeros(12, dtype=torch.int64), length=8, backend=backend).train()
    if given.what == "peft":
        PeftRun("this model", recipe, text[:12], length=8)  # its imports

    def steps() -> None:
        if given.what == "peft":
            run = PeftRun(given.how, recipe, text, length=given.length)
        else:
            run = new_run(given.what, recipe, text, length=given.length, backend=backend, sizes=WITHOUT_DROPOUT)
        for _ in range(recipe.steps):
            run.step()

    before, found = _status("VmRSS"), peak_memory(steps)
    if found is None:  # a system that does not let the highest value be set back; this process is young
        steps()
        found = _status("VmHWM") - before
    print(found)
    return 0


def _status(name: str) -> int:
    """Bytes, of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(lines[name].split()[0])


if __name__ == "__main__":
    sys.exit(main())
