"""Convolutions."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ..ops.conv2d import GroupNormPrologue, conv2d, conv2d_pack, up_conv2d, up_conv2d_pack

M = TypeVar("M", bound=torch.nn.Module)


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on `genai_kernels.conv2d`, with the norm before it and the additions after it on call.

    Args, parameters, state dict and initial values are those of `torch.nn.Conv2d`; but padding may be (left, right,
    top, bottom) too, algorithm is that of the op, and there are no dilation, groups or other padding modes than zeros.

    Call it with the keyword arguments of the op: skip, norm, channel_bias, residual, output_scale, return_stats; same
    errors. After `prepack()` calls without a gradient use a packed copy of the weight.

    >>> import torch
    >>> from genai_kernels.nn import Conv2d
    >>> layer, x = Conv2d(8, 4, 3, padding=1), torch.randn(2, 8, 6, 6)
    >>> torch.equal(layer(x)[1:], layer(x[1:]))
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        algorithm: str = "auto",
    ) -> None:
        one = padding if isinstance(padding, int) else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, one, bias=bias, device=device, dtype=dtype)
        self.sides, self.algorithm = padding, algorithm
        self._packed: tuple[Any, torch.Tensor] | None = None

    def prepack(self) -> None:
        """Keeps a copy of the weight in the order in which the kernels read it, as long as the weight is as it is.

        It is used in evaluation where no gradient is wanted. A change in place drops it, as `train()` and moving the
        layer do; one through `.data`, which counts for nothing in a tensor's version, is not seen.
        """
        with torch.inference_mode(False):
            self._packed = self._key(), self._pack(self.weight)

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        return conv2d_pack(weight, self.stride[0], self.algorithm)

    def _key(self) -> Any:
        w = self.weight  # inference tensors have no version: nothing can change them
        return w.data_ptr(), None if w.is_inference() else w._version, w.dtype, w.device

    def _ready(self) -> torch.Tensor | None:
        if self._packed is None or torch.compiler.is_compiling():
            return None
        if self.training or (torch.is_grad_enabled() and self.weight.requires_grad) or self._packed[0] != self._key():
            return None
        return self._packed[1]

    def forward(  # type: ignore[override]
        self,
        input: torch.Tensor,
        *,
        skip: torch.Tensor | None = None,
        norm: GroupNormPrologue | None = None,
        channel_bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        output_scale: float = 1.0,
        return_stats: GroupNormPrologue | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        return conv2d(
            input,
            self.weight,
            self.bias,
            stride=self.stride[0],
            padding=self.sides,
            skip=skip,
            norm=norm,
            channel_bias=channel_bias,
            residual=residual,
            output_scale=output_scale,
            algorithm=self.algorithm,
            packed=self._ready(),
            return_stats=return_stats,
        )

    def train(self, mode: bool = True) -> Conv2d:
        if mode:
            self._packed = None
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Conv2d:
        self._packed = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if isinstance(self.sides, int) else f"{text}, padding={self.sides}"


class UpConv2d(Conv2d):
    """`genai_kernels.up_conv2d`: nearest-neighbour upsampling by 2 and the 3 x 3 convolution after it.

    Args:
        in_channels, out_channels, bias, device, dtype: as of `torch.nn.Conv2d`, whose state dict it has.

    >>> import torch
    >>> from genai_kernels.nn import UpConv2d
    >>> UpConv2d(8, 4)(torch.randn(2, 8, 5, 6)).shape
    torch.Size([2, 4, 10, 12])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, 1, 1, bias, device, dtype)

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        return up_conv2d_pack(weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return up_conv2d(input, self.weight, self.bias, packed=self._ready())


def prepack(model: M) -> M:
    """`prepack()` of every layer in a model that has it; the model.

    >>> import torch
    >>> from genai_kernels.nn import Conv2d, prepack
    >>> model = prepack(torch.nn.Sequential(Conv2d(8, 8, 3), Conv2d(8, 8, 1)).eval())
    """
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.prepack()
    return model
