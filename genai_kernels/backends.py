"""Which implementation serves a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# What `use_backend` forces, process-wide, or None. Read on every call, hence a plain module variable.
forced: str | None = None

NAMES = ("auto", "cpu", "reference")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one implementation of every op inside the block, for the whole process.

    Args:
        name: `"reference"`, the plain PyTorch composition that stands beside each op: the eager twin of any model;
            `"cpu"`, the C++ kernels; `"auto"`, what is chosen without this.

    Raises:
        ValueError: an unknown name.

    >>> import torch, genai_kernels as gk
    >>> with gk.use_backend("reference"):
    ...     gk.rms_norm(torch.ones(1, 4)).shape
    torch.Size([1, 4])
    """
    global forced
    if name not in NAMES:
        raise ValueError(f"genai_kernels.use_backend: name: expected one of {', '.join(NAMES)}, got {name!r}")
    before, forced = forced, None if name == "auto" else name
    try:
        yield
    finally:
        forced = before
