"""The demonstration, in chapters: a character-level language model trained with these kernels and with the eager
reference; a Llama that serves several requests at once; the same adapted to other registers; diffusion models that
paint digits and fill holes of photographs.

Runs the programs of python_models/ of a checkout.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TAKES_MORE = True
# name -> the module and what it is started with
CHAPTERS = {
    "training": ["python_models.char_lm", "demo"],
    "serving": ["python_models.serving_demo"],
    "adapters": ["python_models.lora_demo"],
    "painting": ["python_models.diffusion_demo"],
}
_ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chapter", choices=CHAPTERS, help="only this one")
    modules = " and ".join(f"`python -m {' '.join(program)} --help`" for program in CHAPTERS.values())
    parser.epilog = f"more options, with --chapter: those of {modules}"


def find_checkout() -> Path | None:
    """The folder with python_models/: around the package in a checkout, or the one that the command was started in."""
    for folder in (_ROOT, Path.cwd()):
        if (folder / "python_models" / "char_lm.py").is_file() and (folder / "genai_kernels").is_dir():
            return folder
    return None


def run(arguments: argparse.Namespace) -> int:
    folder = find_checkout()
    if folder is None:
        print(
            "genai_kernels demo: expected a checkout of the repository (python_models/char_lm.py), found only the "
            "installed package: clone the repository and run `make demo` there",
            file=sys.stderr,
        )
        return 1
    if arguments.rest and not arguments.chapter:
        print(
            f"genai_kernels demo: expected --chapter ({', '.join(CHAPTERS)}) with {' '.join(arguments.rest)}: each has "
            "options of its own",
            file=sys.stderr,
        )
        return 2
    worst = 0
    for name in [arguments.chapter] if arguments.chapter else CHAPTERS:
        command = [sys.executable, "-m", *CHAPTERS[name], *arguments.rest]
        worst = max(worst, subprocess.run(command, cwd=folder, check=False).returncode)
    return worst
