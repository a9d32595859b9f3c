"""Optimizers around the fused steps."""

from .adamw import AdamW

__all__ = ["AdamW"]
