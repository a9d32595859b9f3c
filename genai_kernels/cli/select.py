"""The options that several commands share: which ops and which dtypes."""

from __future__ import annotations

import argparse

import torch

from ..registry import FLOATS, OPS, Op

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def name_of(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def op(name: str) -> Op:
    """A registered op by its name, for argparse."""
    if name not in OPS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(sorted(OPS))}, got {name!r}")
    return OPS[name]


def dtype(name: str) -> torch.dtype:
    """A dtype by its name or short name, for argparse."""
    full = _SHORT.get(name, name)
    if full not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[full]


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Adds --op and --dtype, each may be given several times; nothing given means all."""
    parser.add_argument("--op", type=op, action="append", metavar="NAME", help="only this op (repeatable)")
    parser.add_argument("--dtype", type=dtype, action="append", metavar="DTYPE", help="only this dtype (repeatable)")


def selected_ops(arguments: argparse.Namespace) -> list[Op]:
    return arguments.op or [OPS[name] for name in sorted(OPS)]
