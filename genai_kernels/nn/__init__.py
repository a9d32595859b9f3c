"""Modules that own parameters, each a thin layer over an op."""

from .linear import FusedLinearCrossEntropy, Linear
from .lora import LoRALinear, MultiLoRALinear
from .lora_files import add_lora, load_adapter, save_adapter
from .norms import RMSNorm

__all__ = [
    "FusedLinearCrossEntropy",
    "Linear",
    "LoRALinear",
    "MultiLoRALinear",
    "RMSNorm",
    "add_lora",
    "load_adapter",
    "save_adapter",
]  # fmt: skip
