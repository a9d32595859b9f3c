"""Modules that own parameters, each a thin layer over an op."""

from .conv import Conv2d, UpConv2d, prepack
from .linear import FusedLinearCrossEntropy, Linear
from .lora import LoRALinear, MultiLoRALinear
from .lora_files import add_lora, load_adapter, save_adapter
from .norms import GroupNormSiLU, RMSNorm
from .resblock import ResBlock

__all__ = [
    "Conv2d",
    "FusedLinearCrossEntropy",
    "GroupNormSiLU",
    "Linear",
    "LoRALinear",
    "MultiLoRALinear",
    "RMSNorm",
    "ResBlock",
    "UpConv2d",
    "add_lora",
    "load_adapter",
    "prepack",
    "save_adapter",
]  # fmt: skip
