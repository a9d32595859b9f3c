"""diffusers' ResnetBlock2D: each norm, its modulation and its activation in one pass, or in that of the convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...ops.conv2d import GroupNormPrologue
from .calls import NAMES, Left, Served, altered, why_not_now
from .convolutions import convolve, why_not_ours
from .norms import activation_of, norm_of, why_not_pair


def why_not_resnet(block: Any) -> str | None:
    for name in ("norm1", "norm2"):
        reason = why_not_pair(getattr(block, name), block.nonlinearity)
        if reason is not None:
            return reason.replace("the norm", name)
    if block.time_embedding_norm == "scale_shift" and block.time_emb_proj is None:
        return "a scale and shift without an embedding"
    return None


def resnet(
    block: Any, input_tensor: torch.Tensor, temb: torch.Tensor | None = None, *args: Any, **kwargs: Any
) -> Served | Left:
    if args or kwargs:
        return Left("arguments that diffusers has deprecated")
    if (temb is None) != (block.time_emb_proj is None):
        return Left("an embedding without its projection, or the reverse")
    x, norms = input_tensor, (block.norm1, block.norm2)
    reason = why_not_resnet(block)
    reason = reason or why_not_now("group_norm_silu", x, *(t for norm in norms for t in (norm.weight, norm.bias)))
    if reason is not None:
        return Left(reason)
    activation = activation_of(block.nonlinearity)
    assert activation is not None

    scale = shift = added = None
    if temb is not None:
        temb = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        if block.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
        else:
            added = temb
    resample = block.upsample if block.upsample is not None else block.downsample
    fused = [resample is None and why_not_ours(x, block.conv1) is None, False]
    if fused[0]:
        h = convolve(x, block.conv1, _prologue(block.norm1, activation), added)
    else:
        h = norm_of(block.norm1, x, activation)
        if resample is not None:
            if block.upsample is not None and h.shape[0] >= 64:  # PyTorch's nearest neighbour in NHWC fails then
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)
        h = block.conv1(h)
        h = h if added is None else h + added[:, :, None, None]
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x.contiguous() if block.training else x)  # so that DDP gets the strides it expects
    drops = type(block.dropout) is not nn.Dropout or (block.dropout.p > 0 and block.dropout.training)
    fused[1] = why_not_ours(h, block.conv2) is None and not drops and not altered(block.dropout) and x.dtype == h.dtype
    if fused[1]:
        norm = _prologue(block.norm2, activation)._replace(scale=scale, shift=shift)
        y = convolve(h, block.conv2, norm, residual=x, output_scale=1 / block.output_scale_factor)
    else:
        y = x + block.conv2(block.dropout(norm_of(block.norm2, h, activation, scale, shift)))
        y = y if block.output_scale_factor == 1 else y / block.output_scale_factor
    how = f"{NAMES[input_tensor.dtype]}, ResNet block" + (", scale and shift" if scale is not None else "")
    return y, f"{how}{', with its convolutions' if all(fused) else ''}"


def _prologue(norm: Any, activation: str) -> GroupNormPrologue:
    return GroupNormPrologue(norm.num_groups, norm.weight, norm.bias, norm.eps, activation)
