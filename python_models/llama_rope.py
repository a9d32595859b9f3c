"""Rotary position embedding for a Llama: frequencies, their scalings, and the tables of cosines and sines."""

from __future__ import annotations

import math

import torch

from python_models.llama_configs import Config


def frequencies(config: Config) -> torch.Tensor:
    """`[head_dim / 2]`, float32: radians per position of each pair.

    In float32, as they are wherever such models are trained: at position 100,000 the rounding of a frequency is a
    visible angle, and the weights have learned it.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        wave = 2 * math.pi / frequency
        # 0 where a wave is as long as original_context / low, 1 where it is as short as original_context / high
        kept = (scaling.original_context / wave - scaling.low) / (scaling.high - scaling.low)
        blend = (1 - kept) * frequency / scaling.factor + kept * frequency
        blend = torch.where(wave > scaling.original_context / scaling.low, frequency / scaling.factor, blend)
        return torch.where(wave < scaling.original_context / scaling.high, frequency, blend)
    return frequency


class RotaryTables:
    """cos and sin of every position, float32 `[context, head_dim / 2]` each, made when first asked for.

    No buffers of a module: these stay float32 when the model is cast, and there are none on the meta device. The angle
    is rounded to float32, as in training; its cosine is taken in float64 and rounded once, so that an entry has the
    same bits in tables of every length.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._tables:
            positions = torch.arange(self.config.context, dtype=torch.float32)
            angle = (positions[:, None] * frequencies(self.config)).double()
            self._tables[device] = angle.cos().float().to(device), angle.sin().float().to(device)
        return self._tables[device]
