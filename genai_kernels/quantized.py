"""A weight of few bits: what the rooms that make one and those that multiply by one share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

__all__ = ["NF4", "QuantizedWeight", "check_inputs", "dense", "weight_arguments"]

# The quantiles of a normal distribution that QLoRA (arXiv 2305.14314, appendix E) codes 4 bits with.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Scales of one `code_scale`, columns of one step of the packing.
SCALE_BLOCK, STEP = 256, 32


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix `[out, in]` in 8 or 4 bits an element, in groups of `group_size` elements along a row.

    The last group of a row is as long as what is left of it. With `g` the group of column `i`, element `[o, i]` is

    - int8: `q * scale[o, g]`, `q` of -127 to 127;
    - int4: `(q - zero[o, g]) * scale[o, g]`, `q` and `zero` of 0 to 15;
    - nf4: `NF4[q] * scale[o, g]`, `q` of 0 to 15,

    with the products rounded to float32. With double quantisation a scale is `scale[o, g] * code_scale[n // 256]`,
    rounded to float32, with `n = o * groups + g`.

    Args:
        data: int8 `[out, in]`; or uint8 `[out, ceil(in / 32) * 16]`, two elements a byte: byte `16 b + j` of a row has
            column `32 b + j` in its low half and column `32 b + 16 + j` in its high half. Past `in`: ignored.
        scale: `[out, groups]`, float32; uint8 with double quantisation.
        shape: `(out, in)`.
        group_size: a power of two of at least 32; 0: a row is one group.
        zero: of int4, uint8 `[out, groups]`.
        code_scale: of double quantisation, float32 `[ceil(out * groups / 256)]`.

    The tensors are contiguous, and take no gradient. `state_dict()` and `from_state_dict()` are for checkpoints.
    """

    data: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]
    group_size: int
    zero: torch.Tensor | None = None
    code_scale: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """ "int8", "int4" or "nf4"."""
        return "int8" if self.data.dtype == torch.int8 else "nf4" if self.zero is None else "int4"

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that it has, by name."""
        named = {"data": self.data, "scale": self.scale, "zero": self.zero, "code_scale": self.code_scale}
        return {name: t for name, t in named.items() if t is not None}

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """All of it as tensors: those it has, and `size`, int64 `[out, in, group_size]`."""
        return {
            prefix + k: t for k, t in {**self.tensors(), "size": torch.tensor([*self.shape, self.group_size])}.items()
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], prefix: str = "") -> QuantizedWeight:
        """What `state_dict` gave."""
        rows, columns, group_size = state[prefix + "size"].tolist()
        names = ("data", "scale", "zero", "code_scale")
        return cls(shape=(rows, columns), group_size=group_size, **{n: state.get(prefix + n) for n in names})  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """On another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def arguments(self) -> tuple[Any, ...]:
        """What a torch op takes of it: data, scale, zero, code_scale, in, group_size."""
        return self.data, self.scale, self.zero, self.code_scale, self.shape[1], self.group_size

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`[out, in]`, computed in float32 (float64 for that), then rounded to dtype."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        columns = self.shape[1]
        scale = self.scale.to(wide)
        if self.code_scale is not None:
            scale = scale * self.code_scale.to(wide).repeat_interleave(SCALE_BLOCK)[: scale.numel()].view_as(scale)
        if self.kind == "int8":
            q = self.data.to(wide)
        else:
            codes = unpack(self.data, columns)
            q = codes.to(wide) if self.zero is not None else torch.tensor(NF4, dtype=wide, device=codes.device)[codes]
        if self.zero is not None:
            q = q - spread(self.zero.to(wide), self.group_size, columns)
        return (q * spread(scale, self.group_size, columns)).to(dtype)


def weight_arguments(
    weight: torch.Tensor | QuantizedWeight,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int]:
    """What a torch op takes of a weight that may be quantized: its data, and scale, zero, code_scale, group_size."""
    if isinstance(weight, QuantizedWeight):
        return weight.data, weight.scale, weight.zero, weight.code_scale, weight.group_size
    return weight, None, None, None, 0


def check_inputs(name: str, x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> None:
    """Raises where what a quantized weight says of its shape fits neither x nor its data."""
    if not isinstance(weight, QuantizedWeight):
        return
    rows, columns = weight.shape
    if x.shape[-1:] != (columns,):
        raise ValueError(
            f"genai_kernels.{name}: x: expected a last dimension of {columns} as weight has, got shape {list(x.shape)}"
        )
    if weight.data.shape[:1] != (rows,):
        raise ValueError(
            f"genai_kernels.{name}: weight.data: expected {rows} rows as its shape says, got {list(weight.data.shape)}"
        )


def dense(weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A weight as a matrix: itself or, quantized, what it stands for."""
    return weight.dense(dtype) if isinstance(weight, QuantizedWeight) else weight


def spread(per_group: torch.Tensor, group_size: int, columns: int) -> torch.Tensor:
    """`[out, groups]` as `[out, columns]`."""
    if group_size == 0:
        return per_group.expand(len(per_group), columns)
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """`[out, columns]` integers of 0 to 15 as bytes, as `QuantizedWeight` describes."""
    rows, columns = codes.shape
    steps = -(-columns // STEP)
    padded = codes.new_zeros((rows, steps * STEP), dtype=torch.uint8)
    padded[:, :columns] = codes.to(torch.uint8)
    low, high = padded.view(rows, steps, 2, STEP // 2).unbind(2)
    return (low | high << 4).reshape(rows, steps * STEP // 2)


def unpack(data: torch.Tensor, columns: int) -> torch.Tensor:
    """The integers of `pack`, as int64."""
    rows = len(data)
    pairs = data.view(rows, data.shape[1] * 2 // STEP, STEP // 2)
    return torch.stack((pairs & 15, pairs >> 4), dim=2).view(rows, data.shape[1] * 2)[:, :columns].long()
