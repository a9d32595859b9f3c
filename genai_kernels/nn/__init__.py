"""Modules that own parameters, each a thin layer over an op."""

from .linear import FusedLinearCrossEntropy, Linear
from .norms import RMSNorm

__all__ = ["FusedLinearCrossEntropy", "Linear", "RMSNorm"]
