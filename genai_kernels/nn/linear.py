"""Linear layers."""

from __future__ import annotations

import torch

from ..ops.linear import linear


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` on `genai_kernels.linear`: a row's bits depend on no other row and no number of threads.

    Args, parameters, state dict and initial values are those of `torch.nn.Linear`; errors are the op's.

    >>> import torch
    >>> from genai_kernels.nn import Linear
    >>> layer, x = Linear(8, 4), torch.randn(5, 8)
    >>> torch.equal(layer(x)[2:3], layer(x[2:3]))
    True
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)
