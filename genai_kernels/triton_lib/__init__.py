"""The Triton half of the rooms: loaded when it is asked for, so that importing genai_kernels never imports Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch


def interprets() -> bool:
    """True if Triton kernels run in its interpreter, on the CPU: set before they are defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str:
    """Why Triton kernels cannot run here, and what mends it; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not torch.cuda.is_available() and not interprets():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
    return ""


@functools.cache
def load() -> None:
    """Imports the triton.py of every room that has one.

    Raises:
        ImportError: Triton cannot run here; the text says why.
    """
    if reason := why_not():
        raise ImportError(f"genai_kernels.use_backend: triton: expected to find it, got none: {reason}")
    from .. import ops

    for room in pkgutil.iter_modules(ops.__path__):
        name = f"{ops.__name__}.{room.name}.triton"
        if importlib.util.find_spec(name):
            importlib.import_module(name)


def check(op: str, condition: bool, text: Callable[[], str]) -> None:
    """A ValueError in the library's form unless `condition`."""
    if not condition:
        raise ValueError(f"genai_kernels.{op}: {text()}")


def check_like(op: str, name: str, t: torch.Tensor | None, like_name: str, like: torch.Tensor) -> None:
    """The shape and dtype of `like`, where `t` is given."""
    if t is None:
        return
    shapes = list(like.shape), list(t.shape)
    check(op, t.shape == like.shape, lambda: f"{name}: expected the shape of {like_name}, {shapes[0]}, got {shapes[1]}")
    if t.dtype != like.dtype:
        raise TypeError(f"genai_kernels.{op}: {name}: expected the dtype of {like_name}, {like.dtype}, got {t.dtype}")


def check_place(op: str, args: tuple[Any, ...]) -> None:
    """Floating tensors of 16 or 32 bits, where Triton can reach them."""
    for t in args:
        if not isinstance(t, torch.Tensor):
            continue
        if t.device.type != "cuda" and not (t.device.type == "cpu" and interprets()):
            raise ValueError(
                f"genai_kernels.{op}: device: expected cuda, where Triton runs, got {t.device}; "
                "move the tensors with .to('cuda')"
            )
        if t.dtype == torch.float64:
            raise TypeError(f"genai_kernels.{op}: dtype: expected float32, bfloat16 or float16 in Triton, got float64")
