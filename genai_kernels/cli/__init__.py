"""The commands of `python -m genai_kernels` (and of `genai-kernels`): one file each, imported when asked for.

A command's file has a docstring (its help), `add_arguments(parser)` and `run(arguments) -> exit code`; with
`TAKES_MORE = True` it finds the options that its parser does not know in `arguments.rest`.

Only torch is required; rich makes the output prettier and matplotlib draws the plots, where they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "doctor": "what is installed, what runs and why, what is missing and the command that mends it",
    "verify": "every op against float64 on this machine",
    "bench": "every op against its peers and the machine's own limits",
    "explain": "which backend, instruction set and path one call takes, and why not the others",
    "demo": "train, compare and generate with the character-level language model",
}


def _usage() -> str:
    lines = [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m genai_kernels <command> [options]", "", *lines, "", "<command> --help lists its options"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 all is well, 1 something is not, 2 the command line is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name = arguments.pop(0)
    if name not in COMMANDS:
        print(f"genai_kernels: expected a command, one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    from .. import load_error

    if load_error is not None and name != "doctor":
        print(f"genai_kernels {name}: {load_error}", file=sys.stderr)
        print("`python -m genai_kernels doctor` says what is wrong and what mends it", file=sys.stderr)
        return 1
    command = importlib.import_module(f".{name}", __name__)
    parser = argparse.ArgumentParser(
        prog=f"python -m genai_kernels {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    try:
        known, rest = parser.parse_known_args(arguments)
        if rest and not getattr(command, "TAKES_MORE", False):
            parser.error(f"unknown arguments: {' '.join(rest)}")
        known.rest = rest
        return command.run(known)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        return 1
