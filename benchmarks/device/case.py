"""One call that is timed on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, forward or backward, and what it costs."""

    op: str
    name: str
    make: Callable[[str, torch.dtype], Tensors]  # device, dtype -> the arguments that take gradients
    ours: Function
    peers: dict[str, Function]
    reference: Function  # on float32, for the check before a time is believed
    backward: bool = False
    flops: float = 0.0
    elements: float = 0.0  # read and written, where memory is the limit
    dtype: torch.dtype = torch.bfloat16
