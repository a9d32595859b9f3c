"""The demonstration: trains the character-level language model with these kernels and with the eager reference.

Runs python_models/char_lm.py of a checkout; whatever follows is handed to it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TAKES_MORE = True
_ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "options: those of `python -m python_models.char_lm demo --help`"


def find_model() -> Path | None:
    """The model's file: beside the package in a checkout, or in the folder that the command was started in."""
    for folder in (_ROOT, Path.cwd()):
        model = folder / "python_models" / "char_lm.py"
        if model.is_file() and (folder / "genai_kernels").is_dir():
            return model
    return None


def run(arguments: argparse.Namespace) -> int:
    model = find_model()
    if model is None:
        print(
            "genai_kernels demo: expected a checkout of the repository (python_models/char_lm.py), found only the "
            "installed package: clone the repository and run `make demo` there",
            file=sys.stderr,
        )
        return 1
    command = [sys.executable, "-m", "python_models.char_lm", "demo", *arguments.rest]
    return subprocess.run(command, cwd=model.parents[1], check=False).returncode
