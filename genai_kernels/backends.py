"""Which implementation serves a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# What `use_backend` forces, process-wide, or None. Read on every call, hence a plain module variable.
forced: str | None = None

NAMES = ("auto", "cpu", "triton", "reference")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one implementation of every op inside the block, for the whole process.

    Args:
        name: `"reference"`, the plain PyTorch composition that stands beside each op: the eager twin of any model;
            `"cpu"`, the C++ kernels; `"triton"`, the Triton kernels, on CUDA tensors, or on the CPU in Triton's
            interpreter where TRITON_INTERPRET=1 was set before; `"auto"`, what is chosen without this.

    Raises:
        ValueError: an unknown name.
        ImportError: Triton cannot run here; the text says what is missing.

    >>> import torch, genai_kernels as gk
    >>> with gk.use_backend("reference"):
    ...     gk.rms_norm(torch.ones(1, 4)).shape
    torch.Size([1, 4])
    """
    global forced
    if name not in NAMES:
        raise ValueError(f"genai_kernels.use_backend: name: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "triton":
        from . import triton_lib

        triton_lib.load()
    before, forced = forced, None if name == "auto" else name
    try:
        yield
    finally:
        forced = before
