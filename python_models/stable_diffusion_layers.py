"""The layers of Stable Diffusion's transformers, with the names that diffusers gives their parameters.

ResNet blocks and upsamplers are `genai_kernels.nn`'s: a norm is applied while the convolution after it reads the map,
and what is added to a result is added before it is stored. Maps are channels last: a map is its pixels' tokens.
"""

from __future__ import annotations

import torch
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import Conv2d, GroupNormSiLU, Linear, UpConv2d


class LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gk.layer_norm(x, self.weight, self.bias, self.eps)


def before(norm: GroupNormSiLU) -> gk.GroupNormPrologue:
    """A norm and its activation, for the convolution that reads them."""
    return gk.GroupNormPrologue(norm.num_groups, norm.weight, norm.bias, norm.eps, norm.activation)


class Attention(nn.Module):
    """Multi-head attention from `width` to tokens of `context`, or to its own where that is None."""

    def __init__(self, width: int, heads: int, context: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(context or width, width, bias=bias)
        self.to_v = Linear(context or width, width, bias=bias)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def keys_values(self, tokens: torch.Tensor) -> gk.CrossAttentionKV:
        """Of a text they are the same in every step of its image."""
        return gk.cross_attention_kv(
            tokens, self.to_k.weight, self.to_v.weight, self.heads, k_bias=self.to_k.bias, v_bias=self.to_v.bias
        )

    def forward(self, x: torch.Tensor, kv: gk.CrossAttentionKV | None = None) -> torch.Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        return self.to_out[0](gk.cross_attention(q, self.keys_values(x) if kv is None else kv).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gk.linear_geglu(x, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Attention to the image, attention to the text, and a gated MLP, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(width), Attention(width, heads)
        self.norm2, self.attn2 = LayerNorm(width), Attention(width, heads, context)
        self.norm3, self.ff = LayerNorm(width), FeedForward(width)

    def forward(self, x: torch.Tensor, text: torch.Tensor, prompt: Prompt | None) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        kv = self.attn2.keys_values(text) if prompt is None else prompt.next(self.attn2, text)
        x = x + self.attn2(self.norm2(x), kv)
        return x + self.ff(self.norm3(x))


class Prompt:
    """The keys and values of one text in every layer of one UNet, computed when it is first seen."""

    def __init__(self) -> None:
        self._kept: dict[int, gk.CrossAttentionKV] = {}

    def next(self, attention: Attention, text: torch.Tensor) -> gk.CrossAttentionKV:
        if id(attention) not in self._kept:
            self._kept[id(attention)] = attention.keys_values(text)
        return self._kept[id(attention)]


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a map, added to it."""

    def __init__(self, width: int, heads: int, context: int, blocks: int, groups: int, linear_projection: bool) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = GroupNormSiLU(groups, width, 1e-6, activation="none")  # whatever the eps of the UNet
        self.proj_in = Linear(width, width) if linear_projection else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, context) for _ in range(blocks)])
        self.proj_out = Linear(width, width) if linear_projection else nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor, text: torch.Tensor, prompt: Prompt | None) -> torch.Tensor:
        """x: `[N, C, H, W]`; text: `[N, tokens, context]`."""
        # a 1x1 convolution is a linear layer over the channels of each pixel
        h = self._project(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, text, prompt)
        return x + self._project(self.proj_out, h).transpose(1, 2).view(x.shape)

    def _project(self, layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return gk.linear(tokens, layer.weight.flatten(1), layer.bias)  # type: ignore[operator, arg-type]


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpConv2d(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)
