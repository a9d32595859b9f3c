"""Tensors as rows: what the linear layers' rooms share."""

from __future__ import annotations

import math

import torch

from .torch_ops import kernel

__all__ = ["as_rows", "sum_rows"]

_linear_dw = kernel("linear_dw")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`[rows, n]`: a view wherever x allows it."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def sum_rows(dy: torch.Tensor) -> torch.Tensor:
    """The sum over rows, a product with ones: in the order of the other gradients, whatever the threads."""
    return _linear_dw(dy, dy.new_ones(1, 1).expand(len(dy), 1)).view(-1)
