"""Modules that own parameters, each a thin layer over an op."""

from .norms import RMSNorm

__all__ = ["RMSNorm"]
