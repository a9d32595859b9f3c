"""The UNet of a diffusion model: what noise was added to a picture, at which strength, of which class.

Ho et al., "Denoising Diffusion Probabilistic Models", 2020, with the blocks of Dhariwal and Nichol, 2021: each is norm,
SiLU, convolution, the time's embedding, norm, SiLU, convolution, and its input again. Norm and SiLU are the prologue of
a convolution, the embedding and the input its epilogue; what comes over from the way down is a second input to it and
is never concatenated. Names of the weights are those of diffusers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import Conv2d, Linear, UpConv2d


@dataclass(frozen=True)
class Config:
    """Sizes of a UNet.

    Attributes:
        in_channels, out_channels: of the pictures it takes and of the noise it returns.
        widths: channels of each level; each is half as large as the one before.
        blocks: of each level on the way down; one more on the way up.
        attention: the levels with attention, as the middle always has it.
        groups, head_dim: of the norms, of attention.
        classes: how many there are; 0 for none. Class `classes` means "not told".
        context: width of the tokens of a text that every attention also looks at; 0 for none.
    """

    in_channels: int
    out_channels: int
    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    groups: int = 8
    head_dim: int = 32
    classes: int = 0
    context: int = 0

    @property
    def time_width(self) -> int:
        return 4 * self.widths[0]


class Conv(Conv2d):
    """A convolution that keeps the size, or halves it; with a norm before it and sums behind it."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, size, stride, padding=size // 2)

    def forward(self, x: torch.Tensor, norm: nn.GroupNorm | None = None, **around) -> torch.Tensor:
        before = None
        if norm is not None:
            before = gk.GroupNormPrologue(norm.num_groups, norm.weight, norm.bias, norm.eps)
        return super().forward(x, norm=before, **around)


class UpConv(UpConv2d):
    """A 3x3 convolution of the picture at twice its size, which is never made."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)


class ResBlock(nn.Module):
    """Two convolutions around the embedding of the time, if its width is not 0, and the input again."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = Conv(in_channels, out_channels)
        self.time_emb_proj = Linear(time_width, out_channels) if time_width else None
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = Conv(out_channels, out_channels)
        self.conv_shortcut = Conv(in_channels, out_channels, size=1) if in_channels != out_channels else None
        nn.init.zeros_(self.conv2.weight)  # at first a block is its shortcut

    def forward(
        self, x: torch.Tensor, time: torch.Tensor | None = None, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        bias = None if self.time_emb_proj is None else self.time_emb_proj(time)
        h = self.conv1(x, self.norm1, skip=skip, channel_bias=bias)
        again = x if self.conv_shortcut is None else self.conv_shortcut(x, skip=skip)
        return self.conv2(h, self.norm2, residual=again)


def pixels(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """A picture, normalised, as tokens `[N, H W, C]`: as the pixels of a channels-last one lie."""
    h = gk.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="none")
    return h.flatten(2).transpose(1, 2)


def picture(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: `[N, C, H, W]`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


class Attention(nn.Module):
    """Every pixel looks at all others of its picture; then, where there is a text, at its tokens."""

    def __init__(self, channels: int, head_dim: int, groups: int, context: int = 0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.group_norm = nn.GroupNorm(groups, channels)
        self.to_qkv = Linear(channels, 3 * channels)
        self.to_out = Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        if context:
            self.cross_norm = nn.GroupNorm(groups, channels)
            self.cross_q = Linear(channels, channels)
            self.cross_k, self.cross_v = Linear(context, channels), Linear(context, channels)
            self.cross_out = Linear(channels, channels)
            nn.init.zeros_(self.cross_out.weight)

    def keys(self, context: torch.Tensor, mask: torch.Tensor) -> gk.CrossAttentionKV:
        """Of texts `[texts, tokens, context]`: computed once for all steps."""
        k, v = self.cross_k, self.cross_v
        heads = k.out_features // self.head_dim
        return gk.cross_attention_kv(context, k.weight, v.weight, heads, k_bias=k.bias, v_bias=v.bias, mask=mask)

    def forward(self, x: torch.Tensor, keys: gk.CrossAttentionKV | None = None) -> torch.Tensor:
        qkv = self.to_qkv(pixels(x, self.group_norm))
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        x = x + picture(self.to_out(gk.flash_attention(q, k, v).flatten(2)), x)
        if keys is None:
            return x
        q = self.cross_q(pixels(x, self.cross_norm)).unflatten(-1, (-1, self.head_dim))
        return x + picture(self.cross_out(gk.cross_attention(q, keys).flatten(2)), x)


class UNet(nn.Module):
    """`forward(x, t, condition)`: the noise in x, or what else it has learnt to find.

    Args:
        config: its sizes.

    `x` is `[N, in_channels, H, W]` in the dtype of the weights, H and W multiples of 2^(levels - 1); `t` `[N]`, the
    steps at which the noise was added; the condition is what `conditions` returns: of a model with classes, labels
    int64 `[N]`, or None if not told; of one with a text, what `keys` returns. Returns `[N, out_channels, H, W]`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        first, time, groups = config.widths[0], config.time_width, config.groups
        self.linear_1 = Linear(first, time)
        self.linear_2 = Linear(time, time)
        self.class_embedding = nn.Embedding(config.classes + 1, time) if config.classes else None
        self.conv_in = Conv(config.in_channels, first)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [first], first
        for level, out in enumerate(config.widths):
            for _ in range(config.blocks):
                self.down.append(ResBlock(width, out, time, groups))
                width = out
                if level in config.attention:
                    self.down.append(Attention(width, config.head_dim, groups, config.context))
                skips.append(width)
            if level + 1 < len(config.widths):
                self.down.append(Conv(width, width, stride=2))
                skips.append(width)
        self.mid = nn.ModuleList(
            [ResBlock(width, width, time, groups), Attention(width, config.head_dim, groups, config.context),
             ResBlock(width, width, time, groups)]
        )  # fmt: skip
        for level, out in reversed(list(enumerate(config.widths))):
            for _ in range(config.blocks + 1):
                self.up.append(ResBlock(width + skips.pop(), out, time, groups))
                width = out
                if level in config.attention:
                    self.up.append(Attention(width, config.head_dim, groups, config.context))
            if level:
                self.up.append(UpConv(width))
        self.conv_norm_out = nn.GroupNorm(groups, width)
        self.conv_out = Conv(width, config.out_channels)
        nn.init.zeros_(self.conv_out.weight)

    def time(self, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        """What every block is told: the time and the class, `[N, time_width]`."""
        dtype = self.linear_1.weight.dtype
        waves = gk.timestep_embedding(t, self.linear_1.in_features, flip_sin_to_cos=True, downscale_freq_shift=0.0)
        time = self.linear_2(F.silu(self.linear_1(waves.to(dtype))))
        if self.class_embedding is not None:
            untold = torch.full_like(t, self.config.classes, dtype=torch.int64)
            time = time + self.class_embedding(untold if label is None else label)
        return F.silu(time)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | Sequence[gk.CrossAttentionKV] | None = None
    ) -> torch.Tensor:
        text = self.config.context > 0
        time = self.time(t, None if text else condition)
        keys = iter(condition if text else itertools.repeat(None))
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layer in self.down:
            if isinstance(layer, Attention):  # it belongs to the block before it
                h = skips[-1] = layer(h, next(keys))
                continue
            h = layer(h, time) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, time) if isinstance(layer, ResBlock) else layer(h, next(keys))
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(h, time, skips.pop())
            else:
                h = layer(h, next(keys)) if isinstance(layer, Attention) else layer(h)
        return self.conv_out(h, self.conv_norm_out)

    def keys(self, context: torch.Tensor, mask: torch.Tensor) -> list[gk.CrossAttentionKV]:
        """What every attention looks at of texts: `[texts, tokens, context]`, bool `[texts, tokens]`."""
        layers = (*self.down, *self.mid, *self.up)
        return [layer.keys(context, mask) for layer in layers if isinstance(layer, Attention)]

    def forget(self, label: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """Labels, of which some are not told: bool `[N]`."""
        return label.masked_fill(which, self.config.classes)

    def conditions(self, label: torch.Tensor | None, guided: bool = False) -> torch.Tensor | None:
        """What `forward` takes for labels; `guided`: for a batch twice as large, the second half of which has none."""
        if label is None or not guided:
            return label
        return torch.cat([label, self.forget(label, torch.ones_like(label, dtype=torch.bool))])

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())
