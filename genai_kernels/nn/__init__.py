"""Modules that own parameters, each a thin layer over an op."""

from .linear import FusedLinearCrossEntropy, Linear
from .lora import LoRALinear, MultiLoRALinear
from .norms import RMSNorm

__all__ = ["FusedLinearCrossEntropy", "Linear", "LoRALinear", "MultiLoRALinear", "RMSNorm"]
