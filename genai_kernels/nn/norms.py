"""Normalisation layers."""

from __future__ import annotations

import torch

from ..ops.group_norm_silu import group_norm_silu
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


class GroupNormSiLU(torch.nn.Module):
    """`genai_kernels.group_norm_silu` with a learned weight, 1 at first, and bias, 0 at first.

    Takes the arguments and the state dict of `torch.nn.GroupNorm`, and is it and the activation after it.

    Args:
        num_groups: a divisor of num_channels.
        num_channels: channels of the input.
        eps: added to the variance.
        affine: with weight and bias.
        activation: "silu", "gelu" (exact), "gelu_tanh", "relu" or "none".
        device, dtype: of weight and bias.

    Takes `[N, num_channels, ...]`, and scale, shift and residual as the op does; same results and errors.

    >>> import torch
    >>> from genai_kernels.nn import GroupNormSiLU
    >>> GroupNormSiLU(1, 2, eps=0.0)(torch.tensor([[[1.0], [3.0]]]))
    tensor([[[-0.2689],
             [ 0.7311]]], grad_fn=<...>)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_channels % num_groups != 0:
            raise ValueError(
                f"genai_kernels.nn.GroupNormSiLU: num_groups: expected a divisor of the {num_channels} channels, "
                f"got {num_groups}"
            )
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self.activation = activation
        self.weight: torch.nn.Parameter | None
        self.bias: torch.nn.Parameter | None
        if affine:
            self.weight = torch.nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
            self.bias = torch.nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            scale=scale,
            shift=shift,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"activation={self.activation!r}"
        )
