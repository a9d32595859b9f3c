"""Says which backend, instruction set and code path one call takes, and why not the others.

    python -m genai_kernels explain flash_attention --shape 1x2048x8x64 --dtype bfloat16 --causal
    python -m genai_kernels explain flash_attention --shape 1x2048x8x64 --k-shape 1x2048x2x64 --v-shape 1x2048x2x64
    python -m genai_kernels explain rms_norm --sample strided_rows

--shape is the shape of every tensor that the op requires, --<name>-shape that of one. --<name> VALUE is any other
argument of the op (a Python literal; True where no value follows). Without shapes, the op's first sample is explained.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import typing
from typing import Any

import torch

from ..call_path import explain
from ..registry import Make, Op
from . import select
from .console import say

TAKES_MORE = True
_RUN_UP_TO = 2**23  # elements of the tensors up to which the call is also made, to see whether it is refused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", type=select.op, help="the op")
    parser.add_argument("--shape", type=shape, help="shape of the required tensors, such as 1x2048x8x64")
    parser.add_argument("--dtype", type=select.dtype, default=torch.float32, help="dtype (default float32)")
    parser.add_argument("--sample", help="explain this sample of the op instead of a call put together from options")


def shape(text: str) -> tuple[int, ...]:
    """(1, 2048, 8, 64) from 1x2048x8x64."""
    try:
        return tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with x between them, got {text!r}") from None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _options(rest: list[str]) -> dict[str, Any]:
    """{"causal": True, "window_size": (128, 0)} from --causal --window-size 128,0 (or --window-size=128,0)."""
    found: dict[str, Any] = {}
    queue = [part for text in rest for part in (text.split("=", 1) if text.startswith("--") else [text])]
    while queue:
        name = queue.pop(0)
        if not name.startswith("--"):
            raise ValueError(f"expected an option that begins with --, got {name!r}")
        value: Any = True
        if queue and not queue[0].startswith("--"):
            value = queue.pop(0)
        found[name[2:].replace("-", "_")] = value
    return found


def build_call(op: Op, dtype: torch.dtype, default_shape: tuple[int, ...] | None, rest: list[str]) -> dict[str, Any]:
    """The arguments of the call by name.

    Raises:
        ValueError: an option that the op has not, or a required argument that nothing gives.
    """
    parameters = inspect.signature(op.function).parameters
    hints = typing.get_type_hints(op.function)
    call: dict[str, Any] = {}
    make = Make(dtype)
    for name, value in _options(rest).items():
        of = name.removesuffix("_shape")
        if name != of and of in parameters:
            call[of] = make(*shape(str(value)))
        elif name in parameters:
            call[name] = _literal(value) if isinstance(value, str) else value
        else:
            raise ValueError(f"{op.name} has no argument {name}; it has {', '.join(parameters)}")
    for name, parameter in parameters.items():
        if name in call or parameter.default is not inspect.Parameter.empty:
            continue
        if hints.get(name) is torch.Tensor and default_shape is not None:
            call[name] = make(*default_shape)
        else:
            raise ValueError(f"{op.name} requires {name}: give --{name.replace('_', '-')}-shape, --shape or --sample")
    return {name: call[name] for name in parameters if name in call}


def run(arguments: argparse.Namespace) -> int:
    op: Op = arguments.op
    args: tuple[Any, ...] = ()
    try:
        if arguments.sample or (arguments.shape is None and not arguments.rest):
            samples = {sample.name: sample for sample in op.samples}
            name = arguments.sample or op.samples[0].name
            if name not in samples:
                raise ValueError(f"--sample: expected one of {', '.join(samples)}, got {name!r}")
            args, kwargs = samples[name].build(Make(arguments.dtype))
        else:
            kwargs = build_call(op, arguments.dtype, arguments.shape, arguments.rest)
    except (ValueError, argparse.ArgumentTypeError) as error:
        print(f"genai_kernels explain: {error}", file=sys.stderr)
        return 2
    say(str(explain(op.function, *args, **kwargs)))
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    if sum(t.numel() for t in tensors) > _RUN_UP_TO:
        return 0
    try:
        op.function(*args, **kwargs)
    except (ValueError, TypeError, IndexError, NotImplementedError, RuntimeError) as error:
        say(f"  but the call is refused: {type(error).__name__}: {str(error).splitlines()[0]}", "red")
        return 1
    return 0
