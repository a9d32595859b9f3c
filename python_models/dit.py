"""A diffusion transformer: latents as tokens, the time in the norms, the text by cross-attention.

Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022: a block's norms have no weights of their own; what
they are multiplied with and shifted by, and how much of a branch is added, a layer makes of the time (adaLN-Zero: at
first nothing is added). The text comes in as it does in PixArt (Chen et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import Linear
from python_models.latent_diffusion import LATENT, TextEncoder, TextToLatent


@dataclass(frozen=True)
class Config:
    """Sizes: of latents `[in_channels, size, size]`, every pixel of which is a token."""

    in_channels: int = 2 * LATENT[0]
    out_channels: int = LATENT[0]
    size: int = LATENT[1]
    width: int = 80
    layers: int = 4
    head_dim: int = 16
    context: int = 64


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The norm of tokens `[N, L, D]`, multiplied and shifted by `[N, D]` of their picture."""
    return gk.layer_norm(x, eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention to the tokens, to the text, and a network; each added as far as the time says."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.modulation = Linear(width, 6 * width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.cross_q, self.cross_out = Linear(width, width), Linear(width, width)
        self.cross_k, self.cross_v = Linear(config.context, width), Linear(config.context, width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)
        for layer in (self.modulation, self.cross_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def keys(self, context: torch.Tensor, mask: torch.Tensor) -> gk.CrossAttentionKV:
        k, v = self.cross_k, self.cross_v
        heads = k.out_features // self.head_dim
        return gk.cross_attention_kv(context, k.weight, v.weight, heads, k_bias=k.bias, v_bias=v.bias, mask=mask)

    def forward(self, x: torch.Tensor, time: torch.Tensor, keys: gk.CrossAttentionKV) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time).chunk(6, dim=1)
        q, k, v = self.qkv(modulated(x, shift1, scale1)).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        x = x + gate1[:, None] * self.out(gk.flash_attention(q, k, v).flatten(2))
        q = self.cross_q(x).unflatten(-1, (-1, self.head_dim))
        x = x + self.cross_out(gk.cross_attention(q, keys).flatten(2))
        h = F.gelu(self.up(modulated(x, shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.down(h)


class DiT(nn.Module):
    """`forward(x, t, keys)` as of a UNet with a text: `[N, in_channels, H, W]` to `[N, out_channels, H, W]`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.patch = Linear(config.in_channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(config.size**2, width))
        self.linear_1, self.linear_2 = Linear(width, width), Linear(width, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.modulation, self.out = Linear(width, 2 * width), Linear(width, config.out_channels)
        nn.init.zeros_(self.out.weight)

    def keys(self, context: torch.Tensor, mask: torch.Tensor) -> list[gk.CrossAttentionKV]:
        """What every block looks at of texts: `[texts, tokens, context]`, bool `[texts, tokens]`."""
        return [block.keys(context, mask) for block in self.blocks]

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Sequence[gk.CrossAttentionKV]) -> torch.Tensor:
        waves = gk.timestep_embedding(t, self.config.width, flip_sin_to_cos=True, downscale_freq_shift=0.0)
        time = F.silu(self.linear_2(F.silu(self.linear_1(waves.to(x.dtype)))))
        h = self.patch(x.flatten(2).transpose(1, 2)) + self.position
        for block, keys in zip(self.blocks, condition, strict=True):
            h = block(h, time, keys)
        h = self.out(modulated(h, *self.modulation(time).chunk(2, dim=1)))
        return h.transpose(1, 2).unflatten(2, x.shape[2:])


def text_dit() -> TextToLatent:
    """As large as `text_unet`, about."""
    return TextToLatent(DiT(Config()), TextEncoder())
