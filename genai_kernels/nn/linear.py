"""Linear layers."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.fused_linear_cross_entropy import fused_linear_cross_entropy
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


class FusedLinearCrossEntropy(torch.nn.Linear):
    """The last linear layer of a language model and its loss in one: `genai_kernels.fused_linear_cross_entropy`.

    Args:
        in_features, out_features, bias, device, dtype: as of `torch.nn.Linear`, whose parameters and initial values it
            has; but no bias unless asked for. `layer.weight = embedding.weight` ties it.
        ignore_index, label_smoothing, softcap, z_loss, reduction: as of the function.

    >>> import torch
    >>> from genai_kernels.nn import FusedLinearCrossEntropy
    >>> layer, x, target = FusedLinearCrossEntropy(8, 100), torch.randn(2, 5, 8), torch.randint(100, (2, 5))
    >>> loss = layer(x, target)
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy((x @ layer.weight.t()).flatten(0, 1), target.flatten()))
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "softcap": softcap,
            "z_loss": z_loss,
            "reduction": reduction,
        }

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        loss = fused_linear_cross_entropy(input, self.weight, target, self.bias, **self.options)
        assert isinstance(loss, torch.Tensor)
        return loss

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.options.items())])
