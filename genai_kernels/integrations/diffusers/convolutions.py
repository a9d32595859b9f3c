"""diffusers' convolutions by conv2d and up_conv2d, where these are the faster engine; else the module is called."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ... import backends
from ...ops.conv2d import GroupNormPrologue, conv2d, conv2d_pack, up_conv2d, up_conv2d_pack
from .calls import NAMES, Left, Served, autocast, why_altered, why_not_now, why_not_parameters

# Weights in the order in which the kernels read them, of convolutions in models accelerated with prepack=True: the
# state that they were packed in, and the packed weight.
_packed: weakref.WeakKeyDictionary[nn.Module, tuple[Any, torch.Tensor] | None] = weakref.WeakKeyDictionary()
# Pixels below which bringing the weights into order, in every call, costs more than it saves.
_FEWEST_PIXELS = 1024


def _low_precision_is_fast() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32, as PyTorch's convolutions do and ours do not."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.ops.genai_kernels.isa() == "avx512_bf16" or bool(has_amx())


_low_precision_is_fast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_conv(conv: Any) -> str | None:
    """Why conv2d cannot stand for a convolution, or None."""
    if type(conv) is not nn.Conv2d:
        return f"a convolution that is {type(conv).__name__}"
    stride, padding = conv.stride, conv.padding
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or stride[0] != stride[1]:
        return "a convolution with groups, dilation or another padding"
    if isinstance(padding, str) or padding[0] != padding[1]:
        return "a convolution with groups, dilation or another padding"
    return why_altered("a convolution", conv) or why_not_parameters("a convolution", conv.weight, conv.bias)


def why_not_ours(x: torch.Tensor, conv: Any) -> str | None:
    """Why a call of a convolution does not go to conv2d, or None."""
    reason = why_not_conv(conv)
    if reason is not None:
        return reason
    if autocast(x) is not None:
        return "a convolution under autocast"
    if conv.weight.dtype != x.dtype or not (x.is_cpu and conv.weight.is_cpu) or x.dim() != 4:
        return f"a convolution of {conv.weight.dtype} on {conv.weight.device.type} for {x.dtype} on {x.device.type}"
    if backends.forced is not None or (not torch.compiler.is_compiling() and conv in _packed):
        return None
    low = x.dtype in (torch.bfloat16, torch.float16) and _low_precision_is_fast()
    # with a stride of 2 the same weights make a quarter of the pixels, and not by Winograd's algorithm
    fewest = _FEWEST_PIXELS if conv.stride[0] == 1 else 16 * _FEWEST_PIXELS
    if low or x.shape[0] * x.shape[2] * x.shape[3] < fewest:
        return "a convolution that PyTorch's engine is faster at"
    return None


def prepack(conv: nn.Module) -> None:
    """Has the weight of a convolution kept in the kernels' order from its next call on."""
    _packed[conv] = None


def forget(conv: nn.Module) -> None:
    _packed.pop(conv, None)


def _ready(conv: Any, pack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """The packed weight, packed again if the weight has changed since; None where a gradient may be wanted."""
    weight = conv.weight
    if torch.compiler.is_compiling() or conv not in _packed or weight.is_inference() or backends.forced is not None:
        return None
    if torch.is_grad_enabled() and weight.requires_grad:
        return None
    state = weight.data_ptr(), weight._version, weight.dtype
    kept = _packed[conv]
    if kept is None or kept[0] != state:
        with torch.inference_mode(False):
            kept = _packed[conv] = state, pack(weight)
    return kept[1]


def convolve(
    x: torch.Tensor,
    conv: Any,
    norm: GroupNormPrologue | None = None,
    channel_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    output_scale: float = 1.0,
    padding: int | tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """conv2d with the parameters of a module that nothing keeps from it; `padding`: in place of the module's."""
    stride, padding = conv.stride[0], conv.padding[0] if padding is None else padding
    packed = _ready(conv, functools.partial(conv2d_pack, stride=stride))
    return conv2d(
        x, conv.weight, conv.bias, stride=stride, padding=padding, norm=norm, channel_bias=channel_bias,
        residual=residual, output_scale=output_scale, packed=packed,
    )  # fmt: skip


# ---- Upsample2D: nearest neighbour, then 3x3 ----


def _convolution_of(layer: Any) -> Any:
    return layer.conv if layer.name == "conv" else layer.Conv2d_0


def why_not_upsample(layer: Any) -> str | None:
    if layer.use_conv_transpose or not layer.interpolate or layer.norm is not None:
        return "an upsampler of another kind"
    conv = _convolution_of(layer)
    reason = why_not_conv(conv)
    if reason is None and (conv.kernel_size, conv.stride, conv.padding) != ((3, 3), (1, 1), (1, 1)):
        reason = f"a convolution of {conv.kernel_size} pixels"
    return reason


def upsample(layer: Any, x: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Served | Left:
    if args or kwargs:
        return Left("arguments that diffusers has deprecated")
    reason = why_not_upsample(layer)
    if reason is None and output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
        reason = "a map of other than twice the size"
    conv: Any = None if reason is not None else _convolution_of(layer)
    reason = reason or why_not_now("up_conv2d", x, conv.weight, conv.bias)
    reason = reason or why_not_ours(x, conv)
    if reason is not None:
        return Left(reason)
    return up_conv2d(x, conv.weight, conv.bias, packed=_ready(conv, up_conv2d_pack)), f"{NAMES[x.dtype]}, upsampler"


# ---- Downsample2D: every other pixel of 3x3, around which the zeros are on two sides only where padding is 0 ----


def why_not_downsample(layer: Any) -> str | None:
    if layer.norm is not None:
        return "a downsampler of another kind"
    return why_not_conv(layer.conv)


def downsample(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Served | Left:
    if args or kwargs:
        return Left("arguments that diffusers has deprecated")
    reason = why_not_downsample(layer) or why_not_now("conv2d", x, layer.conv.weight, layer.conv.bias)
    reason = reason or why_not_ours(x, layer.conv)
    if reason is None and x.shape[1] != layer.channels:
        reason = f"{x.shape[1]} channels where {layer.channels} are expected"
    if reason is not None:
        return Left(reason)
    padding = (0, 1, 0, 1) if layer.padding == 0 else None
    return convolve(x, layer.conv, padding=padding), f"{NAMES[x.dtype]}, downsampler"
