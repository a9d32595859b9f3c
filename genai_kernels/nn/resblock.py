"""The residual block of diffusion UNets and their decoders."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import backends
from ..ops.conv2d import GroupNormPrologue
from .conv import Conv2d
from .linear import Linear
from .norms import GroupNormSiLU

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "none": lambda z: z,
}
_LARGE_MAP = 16 << 20  # bytes; more than most caches hold


class ResBlock(torch.nn.Module):
    """Norm, activation, convolution, time embedding; norm, activation, dropout, convolution; and the input added to it.

    What ResnetBlock2D of diffusers computes, with its parameters' names. Two calls of `genai_kernels.conv2d`, or three
    where the channels change: no map is normalised, activated, concatenated or added in a pass of its own.

    Args:
        in_channels: of the input; with `skip` of both together.
        out_channels: of the result; in_channels unless given.
        temb_channels: of the time embedding, or None for a block without one.
        groups: of both norms.
        eps: of both norms.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "none"; of the time embedding too.
        dropout: probability, in training.
        time_embedding_norm: "default", the embedding is added between the convolutions; "scale_shift", it scales and
            shifts the second norm.
        output_scale_factor: the sum is divided by it.
        device, dtype: of the parameters.

    `block(x, temb, skip)` with x `[N, C, H, W]`, temb `[N, temb_channels]` or None, and more channels of the input in
    skip `[N, C2, H, W]`, as `torch.cat([x, skip], 1)` would join them; errors are those of the op.

    >>> import torch
    >>> from genai_kernels.nn import ResBlock
    >>> block, x = ResBlock(8, 16, temb_channels=12, groups=4), torch.randn(2, 8, 6, 6)
    >>> block(x, torch.randn(2, 12)).shape
    torch.Size([2, 16, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        temb_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        activation: str = "silu",
        dropout: float = 0.0,
        time_embedding_norm: str = "default",
        output_scale_factor: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("activation", activation, tuple(_ACTIVATIONS)),
            ("time_embedding_norm", time_embedding_norm, ("default", "scale_shift")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"genai_kernels.nn.ResBlock: {name}: expected one of {', '.join(allowed)}, got {value!r}"
                )
        out = out_channels or in_channels
        self.activation, self.dropout, self.output_scale_factor = activation, dropout, output_scale_factor
        self.scale_shift = time_embedding_norm == "scale_shift"
        self.norm1 = GroupNormSiLU(groups, in_channels, eps, True, activation, device, dtype)
        self.conv1 = Conv2d(in_channels, out, 3, 1, 1, True, device, dtype)
        self.time_emb_proj: Linear | None = None
        if temb_channels is not None:
            self.time_emb_proj = Linear(temb_channels, 2 * out if self.scale_shift else out, device=device, dtype=dtype)
        self.norm2 = GroupNormSiLU(groups, out, eps, True, activation, device, dtype)
        self.conv2 = Conv2d(out, out, 3, 1, 1, True, device, dtype)
        self.conv_shortcut = Conv2d(in_channels, out, 1, 1, 0, True, device, dtype) if out != in_channels else None

    def _takes_stats(self, x: torch.Tensor) -> bool:
        """Whether the first convolution takes the second norm's statistics, which changes no bit. It pays where a pass
        over the map would read memory; and statistics that are given have no gradient.
        """
        written = x.shape[:1].numel() * self.conv1.out_channels * x.shape[2:].numel() * x.element_size()
        return (
            written >= _LARGE_MAP
            and x.device.type == "cpu"
            and backends.forced is None
            and not (torch.is_grad_enabled() or (self.dropout > 0 and self.training))
        )

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor | None = None, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        embedding = scale = shift = None
        if temb is not None and self.time_emb_proj is not None:
            embedding = self.time_emb_proj(_ACTIVATIONS[self.activation](temb))
            if self.scale_shift:
                scale, shift = embedding.chunk(2, dim=1)
                embedding = None
        norm: GroupNormPrologue | None = _prologue(self.norm2)
        if self._takes_stats(x):
            h, stats = self.conv1(x, skip=skip, norm=_prologue(self.norm1), channel_bias=embedding, return_stats=norm)
        else:
            h, stats = self.conv1(x, skip=skip, norm=_prologue(self.norm1), channel_bias=embedding), None
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(x, skip=skip)
        else:
            residual = x if skip is None else torch.cat([x, skip], 1)
        norm = _prologue(self.norm2)._replace(scale=scale, shift=shift, stats=stats)
        if self.dropout > 0 and self.training:  # of what has been activated
            activated = self.norm2(h, scale, shift)
            assert isinstance(activated, torch.Tensor)
            h, norm = F.dropout(activated, self.dropout), None
        return self.conv2(h, norm=norm, residual=residual, output_scale=1.0 / self.output_scale_factor)


def _prologue(norm: GroupNormSiLU) -> GroupNormPrologue:
    return GroupNormPrologue(norm.num_groups, norm.weight, norm.bias, norm.eps, norm.activation)
