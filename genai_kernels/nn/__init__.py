"""Modules that own parameters, each a thin layer over an op."""

from .linear import Linear
from .norms import RMSNorm

__all__ = ["Linear", "RMSNorm"]
