"""Stable Diffusion's decoder, from latents to an image: whole, as an exact stream of bands of rows, and in tiles.

The norms of a decoder see the whole map, and so a tile decoded alone has another norm: the usual tiling is approximate,
and its seams have to be blended. A stream is exact: the statistics of a map are computed first, then every convolution
goes over bands of rows, upsampling only the band that it reads. In memory are the map and one more; not its upsampled
copy. The bits are those of the decoder as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import Conv2d, GroupNormSiLU, ResBlock
from python_models import stable_diffusion_configs as configs
from python_models.stable_diffusion_layers import Attention, Up, before


class MapAttention(Attention):
    """Attention of one head, as wide as the map is deep, to all of its pixels, added to it."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = GroupNormSiLU(groups, channels, eps, activation="none")

    def forward(self, x: torch.Tensor, kv: None = None) -> torch.Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)
        return x + super().forward(pixels).transpose(1, 2).view(x.shape)


class Middle(nn.Module):
    def __init__(self, c: int, groups: int, eps: float) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, c, groups=groups, eps=eps) for _ in range(2)])
        self.attentions = nn.ModuleList([MapAttention(c, groups, eps)])


class Level(nn.Module):
    def __init__(self, into: int, out: int, config: configs.Decoder, last: bool) -> None:
        super().__init__()
        widths = [into] + [out] * config.layers
        self.resnets = nn.ModuleList([ResBlock(c, out, groups=config.groups, eps=config.eps) for c in widths])
        if not last:
            self.upsamplers = nn.ModuleList([Up(out)])


class _Inside(nn.Module):
    """What diffusers calls the decoder of an AutoencoderKL."""

    def __init__(self, config: configs.Decoder) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.conv_in = Conv2d(config.latent, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], config.groups, config.eps)
        self.up_blocks = nn.ModuleList(
            [
                Level(into, out, config, last=i == len(widths) - 1)
                for i, (into, out) in enumerate(zip((widths[0], *widths), widths, strict=False))
            ]
        )
        self.conv_norm_out = GroupNormSiLU(config.groups, widths[-1], config.eps)
        self.conv_out = Conv2d(widths[-1], config.image, 3, padding=1)

    def steps(self) -> Iterator[nn.Module]:
        """What the map goes through between conv_in and conv_norm_out."""
        first, second = self.mid_block.resnets
        yield from (first, self.mid_block.attentions[0], second)
        for level in self.up_blocks:
            yield from level.resnets
            yield from getattr(level, "upsamplers", ())


class Decoder(nn.Module):
    """The decoder of `configs.Decoder`; its state dict is the part of diffusers' `AutoencoderKL` that decodes."""

    def __init__(self, config: configs.Decoder) -> None:
        super().__init__()
        self.config = config
        self.post_quant_conv = Conv2d(config.latent, config.latent, 1)
        self.decoder = _Inside(config)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """`[N, latent, h, w]`, those of a UNet divided by `config.scaling`, to `[N, 3, H, W]` in about -1 to 1."""
        inside = self.decoder
        x = self._begin(latents)
        for step in inside.steps():
            x = step(x)
        return inside.conv_out(x, norm=before(inside.conv_norm_out)).contiguous()

    def _begin(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder.conv_in(self.post_quant_conv(latents.contiguous(memory_format=torch.channels_last)))

    @torch.no_grad()
    def stream(self, latents: torch.Tensor, rows: int = 32) -> torch.Tensor:
        """The same by bands of `rows` rows of each map: the bits of `forward`, for any number of rows.

        Args:
            latents: as above.
            rows: of the map that a convolution writes, 1 or more; an odd number counts as the next even one. Fewer
                take less memory, and the two rows that border on a band are normalised twice.
        """
        if rows < 1:
            raise ValueError(f"stable_diffusion.Decoder.stream: rows: expected 1 or more, got {rows}")
        inside = self.decoder
        x = self._begin(latents)
        for step in inside.steps():
            if isinstance(step, ResBlock):
                x = _stream_block(step, x, rows)
            elif isinstance(step, Up):
                x = _stream_up(step, x, rows)
            else:  # attention, on the smallest map
                x = step(x)
        image = x.new_empty(x.shape[0], self.config.image, *x.shape[2:])
        _convolve(x, inside.conv_out, inside.conv_norm_out, image, rows)
        return image

    @torch.no_grad()
    def tiles(self, latents: torch.Tensor, tile: int = 64, overlap: float = 0.25) -> torch.Tensor:
        """An approximation of the same from tiles with norms of their own, blended: diffusers' `tiled_decode`.

        Memory does not grow with the image, but for the image. Shown for comparison: a tile does not know of the
        brightness and contrast of others, and `stream` is exact.

        Args:
            latents: as above.
            tile: side of a tile of latents.
            overlap: the part of a tile's side over which it is blended into its neighbours.
        """
        scale = 2 ** (len(self.config.channels) - 1)
        step, blend = int(tile * (1 - overlap)), int(tile * scale * overlap)
        keep = tile * scale - blend
        image = latents.new_empty(len(latents), self.config.image, *(scale * n for n in latents.shape[2:]))
        above: list[torch.Tensor] = []
        for i, top in enumerate(range(0, latents.shape[2], step)):
            row: list[torch.Tensor] = []
            for j, left in enumerate(range(0, latents.shape[3], step)):
                piece = self(latents[:, :, top : top + tile, left : left + tile])
                if i:
                    _blend(above[j], piece, blend, 2)
                if j:
                    _blend(row[-1], piece, blend, 3)
                row.append(piece)
                y, x = i * keep, j * keep
                kept = piece[:, :, :keep, :keep]
                image[:, :, y : y + kept.shape[2], x : x + kept.shape[3]] = kept
            above = row
        return image


def _blend(before: torch.Tensor, after: torch.Tensor, width: int, dim: int) -> None:
    """Lets the beginning of `after` go over from the end of `before`, linearly."""
    width = min(width, before.shape[dim], after.shape[dim])
    if not width:
        return
    weight = torch.arange(width, device=after.device, dtype=torch.float32) / width
    weight = weight.view(-1, 1) if dim == 2 else weight
    start = after.narrow(dim, 0, width)
    start.copy_(before.narrow(dim, before.shape[dim] - width, width) * (1 - weight) + start * weight)


# ---- bands of rows ----


def _bands(x: torch.Tensor, rows: int) -> Iterator[tuple[slice, slice]]:
    """Each band with the rows that border on it, and without: what a 3x3 convolution reads, and what it then knows.

    Bands begin at even rows, as the tiles of Winograd's algorithm do: a pixel is in the same tile as in the whole map.
    """
    height, rows = x.shape[2], rows + rows % 2
    for first in range(0, height, rows):
        last = min(first + rows, height)
        yield slice(max(first - 1, 0), min(last + 1, height)), slice(first, last)


def _convolve(
    x: torch.Tensor,
    conv: Conv2d,
    norm: GroupNormSiLU,
    to: torch.Tensor,
    rows: int,
    shortcut: tuple[torch.Tensor, nn.Module | None] | None = None,
) -> None:
    """`to` becomes the 3x3 convolution of the normalised x and, added to it, a map or its 1x1 convolution."""
    prologue = before(norm)._replace(stats=gk.conv2d_stats(x, norm.num_groups, norm.eps))
    packed = gk.conv2d_pack(conv.weight)
    for band, inner in _bands(x, rows):
        residual = None
        if shortcut is not None:
            of, through = shortcut
            residual = of[:, :, inner] if through is None else through(of[:, :, inner])
        sides = (1, 1, int(band.start == inner.start), int(band.stop == inner.stop))
        to[:, :, inner] = gk.conv2d(
            x[:, :, band], conv.weight, conv.bias, padding=sides, norm=prologue, residual=residual, packed=packed
        )


def _new_map(like: torch.Tensor, channels: int, scale: int = 1) -> torch.Tensor:
    n, _, height, width = like.shape
    return torch.empty(n, scale * height, scale * width, channels, dtype=like.dtype).permute(0, 3, 1, 2)


def _stream_block(block: ResBlock, x: torch.Tensor, rows: int) -> torch.Tensor:
    """A ResNet block without a time. Its result takes the place of x, whose rows are no longer needed one by one."""
    out = block.conv1.out_channels
    h = _new_map(x, out)
    _convolve(x, block.conv1, block.norm1, h, rows)
    y = x[:, :out] if out <= x.shape[1] else _new_map(x, out)
    _convolve(h, block.conv2, block.norm2, y, rows, shortcut=(x, block.conv_shortcut))
    return y


def _stream_up(up: Up, x: torch.Tensor, rows: int) -> torch.Tensor:
    """A map with twice the rows and columns."""
    y, packed = _new_map(x, up.conv.out_channels, scale=2), gk.up_conv2d_pack(up.conv.weight)
    for band, inner in _bands(x, rows):
        large = gk.up_conv2d(x[:, :, band], up.conv.weight, up.conv.bias, packed=packed)
        above = 2 * (inner.start - band.start)  # rows that lack a neighbour
        y[:, :, 2 * inner.start : 2 * inner.stop] = large[:, :, above : above + 2 * (inner.stop - inner.start)]
    return y
