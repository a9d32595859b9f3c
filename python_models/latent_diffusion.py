"""From a caption to a digit, in the shape of Stable Diffusion: a VAE's latents, a text encoder that reads characters,
and a model that finds the noise of latents while it looks at the text: a UNet with cross-attention, or a transformer.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2021; Peebles and Xie, "Scalable
Diffusion Models with Transformers", 2022 (`dit.py`). Captions are made here from what is known of a digit: which it is,
and whether it is written with much ink or little. `python -m python_models.latent_diffusion --help` trains and measures
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import Linear
from python_models.diffusion_data import DIGIT_NAMES
from python_models.unet import Config, Conv, ResBlock, UNet, UpConv

CHARACTERS = " ,abcdefghijklmnopqrstuvwxyz"  # character i is token i + 1; token 0 is nothing
LONGEST = 16  # "an eight, light", and one more
STYLES = ("", "light", "bold")
LATENT = (2, 4, 4)


def caption(digit: int, style: str = "") -> str:
    """ "a three", "a three, bold"."""
    name = DIGIT_NAMES[digit]
    return f"{'an' if name == 'eight' else 'a'} {name}{', ' if style else ''}{style}"


def tokens(captions: Sequence[str]) -> torch.Tensor:
    """int64 `[N, LONGEST]`, 0 after the end; the empty caption asks for nothing.

    Raises:
        ValueError: a character that the models have not learnt, or a caption that is too long.
    """
    found = torch.zeros(len(captions), LONGEST, dtype=torch.int64)
    for row, text in zip(found, captions, strict=True):
        unknown = sorted(set(text) - set(CHARACTERS))
        if unknown or len(text) > LONGEST:
            raise ValueError(
                f"tokens: captions: expected at most {LONGEST} of the characters {CHARACTERS!r}, got {text!r}"
            )
        row[: len(text)] = torch.tensor([CHARACTERS.index(c) + 1 for c in text], dtype=torch.int64)
    return found


def ink(pictures: torch.Tensor) -> torch.Tensor:
    """The mean of each picture, `[N]`."""
    return pictures.flatten(1).mean(1)


@dataclass(frozen=True)
class InkOf:
    """How much ink a digit of each kind has: below `light` is the lightest third of them, above `bold` the boldest."""

    light: torch.Tensor  # [10]
    bold: torch.Tensor

    @classmethod
    def measured(cls, pictures: torch.Tensor, labels: torch.Tensor) -> InkOf:
        thirds = [torch.quantile(ink(pictures[labels == d]), torch.tensor([1 / 3, 2 / 3])) for d in range(10)]
        light, bold = torch.stack(thirds).unbind(1)
        return cls(light, bold)

    def style(self, pictures: torch.Tensor, labels: torch.Tensor) -> list[str]:
        """ "light", "bold", or neither."""
        much = ink(pictures)
        codes = (much < self.light[labels]).long() + 2 * (much > self.bold[labels]).long()
        return [STYLES[code] for code in codes.tolist()]


class VAE(nn.Module):
    """Digits `[N, 1, 8, 8]` to latents `[N, 2, 4, 4]` of about unit variance, and back.

    Kingma and Welling, "Auto-Encoding Variational Bayes", 2013.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        latent, groups = LATENT[0], 8
        self.down = nn.ModuleList(
            [Conv(1, width), ResBlock(width, width, 0, groups), Conv(width, width, stride=2),
             ResBlock(width, 2 * width, 0, groups)]
        )  # fmt: skip
        self.norm_mean, self.to_mean = nn.GroupNorm(groups, 2 * width), Conv(2 * width, 2 * latent)
        self.up = nn.ModuleList(
            [Conv(latent, 2 * width), ResBlock(2 * width, 2 * width, 0, groups), UpConv(2 * width),
             ResBlock(2 * width, width, 0, groups)]
        )  # fmt: skip
        self.norm_out, self.conv_out = nn.GroupNorm(groups, width), Conv(width, 1)
        self.register_buffer("scale", torch.ones(()))  # of the latents, to unit variance

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the variance of a picture's latents, before they are scaled."""
        for layer in self.down:
            x = layer(x)
        mean, logvar = self.to_mean(x, self.norm_mean).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        x = latents * self.scale
        for layer in self.up:
            x = layer(x)
        return self.conv_out(x, self.norm_out)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of its latents, scaled."""
        return self.moments(x)[0] / self.scale

    def loss(self, x: torch.Tensor, noise: torch.Tensor, kl_weight: float) -> torch.Tensor:
        """Squared error of what comes back, and the divergence of the latents from a normal distribution.

        noise: `[N, 2, 4, 4]`.
        """
        z, kl = gk.gaussian_sample_kl(*self.moments(x), noise=noise)
        return (self.decode(z / self.scale) - x).square().mean() + kl_weight * kl.mean() / z[0].numel()


class TextEncoder(nn.Module):
    """A small bidirectional transformer over the characters of a caption: `[N, LONGEST]` to `[N, LONGEST, width]`."""

    def __init__(self, width: int = 64, layers: int = 2, head_dim: int = 16) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.embedding = nn.Embedding(len(CHARACTERS) + 1, width)
        self.position = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm1": nn.LayerNorm(width), "qkv": Linear(width, 3 * width), "out": Linear(width, width),
                           "norm2": nn.LayerNorm(width), "up": Linear(width, 2 * width),
                           "down": Linear(2 * width, width)})
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens, and which of them count: the first always, so that an empty caption is something too."""
        mask = text > 0
        mask[:, 0] = True
        x = self.embedding(text) + self.position
        norm = lambda n, x: gk.layer_norm(x, n.weight, n.bias, n.eps)  # noqa: E731
        for layer in self.layers:
            qkv = layer["qkv"](norm(layer["norm1"], x)).unflatten(-1, (3, -1, self.head_dim))
            q, k, v = qkv.unbind(2)
            x = x + layer["out"](gk.flash_attention(q, k, v, attn_mask=mask[:, None, None, :]).flatten(2))
            x = x + layer["down"](F.gelu(layer["up"](norm(layer["norm2"], x))))
        return norm(self.norm, x), mask


class TextToLatent(nn.Module):
    """A text encoder and what finds the noise: `forward(x, t, condition)` as of a UNet, for captions as tokens."""

    def __init__(self, model: nn.Module, encoder: TextEncoder) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder

    def forget(self, text: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """Captions, of which some are empty."""
        return text.masked_fill(which[:, None], 0)

    def conditions(self, text: torch.Tensor | None, guided: bool = False) -> Sequence[gk.CrossAttentionKV]:
        """Keys and values of the captions, for all steps; `guided`: and of as many empty ones after them."""
        assert text is not None
        if guided:
            text = torch.cat([text, torch.zeros_like(text)])
        return self.model.keys(*self.encoder(text))

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Sequence[gk.CrossAttentionKV]) -> torch.Tensor:
        return self.model(x, t, condition)

    @property
    def config(self) -> object:
        return self.model.config

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def text_unet() -> TextToLatent:
    """Half a million weights: one level of 4x4 latents, attention to pixels and text after every block."""
    channels = LATENT[0]
    config = Config(2 * channels, channels, widths=(48,), blocks=2, attention=(0,), head_dim=16, context=64)
    return TextToLatent(UNet(config), TextEncoder())


if __name__ == "__main__":
    import sys

    from python_models.latent_main import main

    sys.exit(main())
