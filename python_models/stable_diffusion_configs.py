"""The sizes of Stable Diffusion's models: `UNet`, `Decoder`, those of SD 1.5 and SDXL, and diffusers' config.json.

| config | parameters | |
|---|---|---|
| `SD15` | 859,520,964 | Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022 |
| `SDXL` | 2,567,463,684 | Podell et al., "SDXL: improving latent diffusion models", 2023 |
| `KL_F8` | 49,490,199 | the decoder of both, an eighth of the image's sides; 49,490,179 without post_quant_conv |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UNet:
    """A UNet with text: at each level `layers` ResNet blocks down, `layers + 1` up, transformers where it has them.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    channels: tuple[int, ...]  # of each level, from the largest map to the smallest
    transformers: tuple[int, ...]  # transformer blocks after each ResNet block of a level; 0 for none
    heads: tuple[int, ...]  # of each level; head_dim is channels / heads
    context: int  # width of the text's tokens
    layers: int = 2
    middle_transformers: int = 1
    linear_projection: bool = False  # into and out of a transformer: a linear layer, or a 1x1 convolution
    pooled: int = 0  # width of SDXL's pooled text; 0 for a UNet that sees neither that nor sizes
    size_width: int = 256  # of the embedding of each of SDXL's six numbers: sizes and crop
    image: int = 4  # channels of the latents
    groups: int = 32
    eps: float = 1e-5

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if not levels or len(self.transformers) != levels or len(self.heads) != levels:
            raise ValueError(
                f"stable_diffusion.UNet: transformers, heads: expected one for each of the {levels} levels of "
                f"channels, got {self.transformers}, {self.heads}"
            )
        for c, heads in zip(self.channels, self.heads, strict=True):
            if c % self.groups or c % heads:
                raise ValueError(
                    f"stable_diffusion.UNet: channels: expected multiples of {self.groups} groups and of their heads, "
                    f"got {c} and {heads} heads"
                )

    @property
    def time_width(self) -> int:
        """Of the embedding of the time that the ResNet blocks get."""
        return 4 * self.channels[0]


@dataclass(frozen=True)
class Decoder:
    """The decoder of an AutoencoderKL: a middle with one head of attention, then `layers + 1` ResNet blocks a level.

    Raises:
        ValueError: channels that do not fit the groups.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)  # from the largest map to the smallest
    layers: int = 2
    latent: int = 4
    image: int = 3
    groups: int = 32
    scaling: float = 0.18215  # latents of a UNet are those of the autoencoder times this
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.channels or any(c % self.groups for c in self.channels):
            raise ValueError(
                f"stable_diffusion.Decoder: channels: expected multiples of {self.groups} groups, got {self.channels}"
            )


SD15 = UNet((320, 640, 1280, 1280), (1, 1, 1, 0), heads=(8, 8, 8, 8), context=768)
SDXL = UNet((320, 640, 1280), (0, 2, 10), heads=(5, 10, 20), context=2048, middle_transformers=10,
            linear_projection=True, pooled=1280)  # fmt: skip
KL_F8 = Decoder()
KL_F8_XL = Decoder(scaling=0.13025)


# ---- diffusers' config.json ----

# What these models have one value of. A file may leave it out, or say this. upcast_attention is not among them: the
# softmax is float32 here.
_FIXED: dict[str, Any] = {
    "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "conv_in_kernel": 3, "conv_out_kernel": 3, "resnet_time_scale_shift": "default",
    "mid_block_type": "UNetMidBlock2DCrossAttn", "time_embedding_type": "positional", "attention_type": "default",
    "resnet_out_scale_factor": 1.0, "dropout": 0.0, "class_embeddings_concat": False, "only_cross_attention": False,
    "dual_cross_attention": False, "resnet_skip_time_act": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None, "num_attention_heads": None,
    "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "class_embed_type": None, "num_class_embeds": None, "timestep_post_act": None, "time_cond_proj_dim": None,
    "time_embedding_dim": None, "time_embedding_act_fn": None, "addition_embed_type_num_heads": 64,
}  # fmt: skip
_FIXED_DECODER: dict[str, Any] = {
    "act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None, "mid_block_add_attention": True,
    "use_post_quant_conv": True,
}  # fmt: skip


def _check(what: str, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"stable_diffusion: config of a {what}: {name}: expected {value!r}, got {given[name]!r}")


def _each(value: Any, levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def unet_from_diffusers(given: Mapping[str, Any]) -> UNet:
    """The config of a `UNet2DConditionModel`.

    Raises:
        ValueError: an option that these UNets do not have, by its name.
    """
    _check("UNet", given, _FIXED)
    channels = tuple(given["block_out_channels"])
    levels = len(channels)
    layers = _each(given.get("layers_per_block", 2), levels)
    transformers = _each(given.get("transformer_layers_per_block", 1), levels)
    kinds = list(given["down_block_types"])
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    mirrored = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    if not set(kinds) <= known.keys() or list(given["up_block_types"]) != mirrored or len(set(layers)) > 1:
        raise ValueError(
            f"stable_diffusion: config of a UNet: down_block_types, up_block_types, layers_per_block: expected "
            f"{' and '.join(known)}, the same upwards, and one number of layers; got {kinds}, "
            f"{list(given['up_block_types'])}, {layers}"
        )
    kind, pooled = given.get("addition_embed_type"), 0
    size_width = given.get("addition_time_embed_dim") or 256
    if kind not in (None, "text_time"):
        raise ValueError(
            f"stable_diffusion: config of a UNet: addition_embed_type: expected None or 'text_time', got {kind!r}"
        )
    if kind is not None:
        pooled = given["projection_class_embeddings_input_dim"] - 6 * size_width
    return UNet(
        channels=channels,
        transformers=tuple(n if known[k] else 0 for k, n in zip(kinds, transformers, strict=True)),
        heads=_each(given.get("attention_head_dim", 8), levels),
        context=given["cross_attention_dim"],
        layers=layers[0],
        middle_transformers=transformers[-1],
        linear_projection=given.get("use_linear_projection", False),
        pooled=pooled,
        size_width=size_width,
        image=given.get("in_channels", 4),
        groups=given.get("norm_num_groups", 32),
        eps=given.get("norm_eps", 1e-5),
    )


def unet_to_diffusers(config: UNet) -> dict[str, Any]:
    """The arguments of `UNet2DConditionModel`."""
    down = ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in config.transformers]
    # of a level without transformers diffusers reads the last number only, for the middle
    each = [n or config.middle_transformers for n in config.transformers]
    found: dict[str, Any] = {
        "in_channels": config.image, "out_channels": config.image, "block_out_channels": config.channels,
        "down_block_types": down, "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "layers_per_block": config.layers, "transformer_layers_per_block": [*each[:-1], config.middle_transformers],
        "attention_head_dim": config.heads, "cross_attention_dim": config.context, "norm_num_groups": config.groups,
        "norm_eps": config.eps, "use_linear_projection": config.linear_projection,
    }  # fmt: skip
    if config.pooled:
        found |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": config.size_width,
            "projection_class_embeddings_input_dim": config.pooled + 6 * config.size_width,
        }  # fmt: skip
    return found


def decoder_from_diffusers(given: Mapping[str, Any]) -> Decoder:
    """The decoder in the config of an `AutoencoderKL`.

    Raises:
        ValueError: an option that this decoder does not have, by its name.
    """
    _check("decoder", given, _FIXED_DECODER)
    kinds = set(given["up_block_types"])
    if kinds != {"UpDecoderBlock2D"}:
        raise ValueError(
            f"stable_diffusion: config of a decoder: up_block_types: expected UpDecoderBlock2D, got {sorted(kinds)}"
        )
    return Decoder(
        channels=tuple(given["block_out_channels"]),
        layers=given.get("layers_per_block", 1),
        latent=given.get("latent_channels", 4),
        image=given.get("out_channels", 3),
        groups=given.get("norm_num_groups", 32),
        scaling=given.get("scaling_factor", 0.18215),
    )


def decoder_to_diffusers(config: Decoder) -> dict[str, Any]:
    """The arguments of `AutoencoderKL`."""
    levels = len(config.channels)
    return {
        "in_channels": config.image, "out_channels": config.image, "latent_channels": config.latent,
        "block_out_channels": config.channels, "layers_per_block": config.layers, "norm_num_groups": config.groups,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": config.scaling,
    }  # fmt: skip
