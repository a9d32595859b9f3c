"""Normalisation layers."""

from __future__ import annotations

import torch

from ..ops.rms_norm import rms_norm


class RMSNorm(torch.nn.Module):
    """`genai_kernels.rms_norm` over the last dimension with a learned weight, 1 at first.

    Args:
        width: size of the last dimension.
        eps: added to the mean square.

    Takes `[..., width]` in the dtype of the weight; same errors as the op.

    >>> import torch
    >>> from genai_kernels.nn import RMSNorm
    >>> RMSNorm(2, eps=0.0)(torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]], grad_fn=<...>)
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
