"""Stable Diffusion's UNet: noise predicted from noisy latents, the time and a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import Conv2d, GroupNormSiLU, Linear, ResBlock
from python_models import stable_diffusion_configs as configs
from python_models.stable_diffusion_layers import Down, Prompt, SpatialTransformer, Up, before


def sinusoids(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """`[N]` to `[N, width]` in float32: cosines, then sines, of waves from 2 pi to 20000 pi long."""
    return gk.timestep_embedding(numbers.float(), width, flip_sin_to_cos=True, downscale_freq_shift=0.0)


class Embedding(nn.Module):
    """Two linear layers."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(into, out), Linear(out, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Level(nn.Module):
    """The ResNet blocks of one size of the map, a transformer after each if the level has them, a change of size."""

    def __init__(self, config: configs.UNet, level: int, into: list[int], resample: nn.Module | None) -> None:
        super().__init__()
        out, blocks = config.channels[level], config.transformers[level]
        self.resnets = nn.ModuleList([_resnet(config, c, out) for c in into])
        if blocks:
            self.attentions = nn.ModuleList([_transformer(config, level, blocks) for _ in into])
        self.has_text = bool(blocks)
        if resample is not None:
            name = "downsamplers" if isinstance(resample, Down) else "upsamplers"
            setattr(self, name, nn.ModuleList([resample]))

    def layer(
        self, i: int, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor, prompt: Prompt | None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        x = self.resnets[i](x, time, skip)
        return self.attentions[i](x, text, prompt) if self.has_text else x


def _resnet(config: configs.UNet, into: int, out: int) -> ResBlock:
    return ResBlock(into, out, temb_channels=config.time_width, groups=config.groups, eps=config.eps)


def _transformer(config: configs.UNet, level: int, blocks: int) -> SpatialTransformer:
    width, heads = config.channels[level], config.heads[level]
    return SpatialTransformer(width, heads, config.context, blocks, config.groups, config.linear_projection)


class Middle(nn.Module):
    def __init__(self, config: configs.UNet) -> None:
        super().__init__()
        c = config.channels[-1]
        self.resnets = nn.ModuleList([_resnet(config, c, c) for _ in range(2)])
        self.attentions = nn.ModuleList([_transformer(config, -1, config.middle_transformers)])

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor, prompt: Prompt | None) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), text, prompt), time)


class UNet(nn.Module):
    """The UNet of `configs.UNet`, with the state dict of diffusers' `UNet2DConditionModel`.

    `forward(latents, time, text)` gives the noise, or whatever it was trained to predict. For the steps of one image
    pass the same `Prompt()` each time: the keys and values of the text are then computed once. And
    `genai_kernels.nn.prepack(unet)` beforehand: the convolutions' weights are then brought into order once.
    """

    def __init__(self, config: configs.UNet) -> None:
        super().__init__()
        self.config, channels, layers = config, config.channels, config.layers
        last = len(channels) - 1
        self.conv_in = Conv2d(config.image, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], config.time_width)
        if config.pooled:
            self.add_embedding = Embedding(config.pooled + 6 * config.size_width, config.time_width)

        self.down_blocks = nn.ModuleList()
        skips, width = [channels[0]], channels[0]  # what goes by the middle, and what goes on
        for level, c in enumerate(channels):
            down = Down(c) if level < last else None
            self.down_blocks.append(Level(config, level, [width] + [c] * (layers - 1), down))
            skips += [c] * (layers + (down is not None))
            width = c
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList()
        for level, c in reversed(list(enumerate(channels))):
            into = [w + skips.pop() for w in [width] + [c] * layers]
            self.up_blocks.append(Level(config, level, into, Up(c) if level else None))
            width = c
        self.conv_norm_out = GroupNormSiLU(config.groups, channels[0], config.eps)
        self.conv_out = Conv2d(channels[0], config.image, 3, padding=1)

    def embed_time(
        self, time: torch.Tensor, pooled: torch.Tensor | None = None, sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What every ResNet block gets, `[N, time_width]`; it depends on no image, so that a schedule's is a table."""
        dtype = self.conv_in.weight.dtype
        found = self.time_embedding(sinusoids(time, self.config.channels[0]).to(dtype))
        if self.config.pooled:
            if pooled is None or sizes is None:
                raise ValueError(
                    "stable_diffusion.UNet: pooled, sizes: expected the pooled text and six numbers for each image, "
                    "got None"
                )
            waves = sinusoids(sizes.flatten(), self.config.size_width).view(len(sizes), -1)
            found = found + self.add_embedding(torch.cat([pooled.to(dtype), waves.to(dtype)], dim=-1))
        return found

    def forward(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        text: torch.Tensor,
        *,
        pooled: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
        prompt: Prompt | None = None,
    ) -> torch.Tensor:
        """
        Args:
            latents: `[N, 4, H, W]`, dtype of the weights; H and W divisible by two for each level but the last.
            time: `[N]`, the step of each image in the noise's schedule.
            text: `[N, tokens, context]`, dtype of the weights.
            pooled: `[N, pooled]`; sizes: `[N, 6]`, height and width before cropping, the crop's top and left, height
                and width wanted. SDXL's only.
            prompt: see above; it must have seen no other text.

        Returns:
            `[N, 4, H, W]`.
        """
        halvings = len(self.config.channels) - 1
        if latents.shape[-1] % 2**halvings or latents.shape[-2] % 2**halvings:
            raise ValueError(
                f"stable_diffusion.UNet: latents: expected sides divisible by {2**halvings}, got {list(latents.shape)}"
            )
        embedded = self.embed_time(time, pooled, sizes)
        x = self.conv_in(latents.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, embedded, text, prompt)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, embedded, text, prompt)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, embedded, text, prompt, skips.pop())
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        return self.conv_out(x, norm=before(self.conv_norm_out)).contiguous()
