"""Weights in Triton, dense or of few bits, which are unpacked tile by tile inside the product; how they lie says
genai_kernels/quantized.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..quantized import NF4, QuantizedWeight
from . import check

DENSE, INT8, INT4, CODES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_KINDS = {"int8": INT8, "int4": INT4, "nf4": CODES}


class Matrix(NamedTuple):
    """A weight as a product reads it: `[columns of the result, contraction]`."""

    data: torch.Tensor
    quantized: QuantizedWeight | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        out, inputs = self.data.shape if self.quantized is None else self.quantized.shape
        return (inputs, out) if self.transposed else (out, inputs)

    def t(self) -> Matrix:
        return self._replace(transposed=not self.transposed)

    def arguments(self) -> dict[str, object]:
        """What a kernel takes of it."""
        q = self.quantized
        strides = self.data.stride()[::-1] if self.transposed and q is None else self.data.stride()
        found: dict[str, object] = {"w": self.data, "w_n": strides[0], "w_k": strides[1]}
        if q is None:
            return found | {
                "w_scale": None, "w_zero": None, "w_code_scale": None, "levels": None, "groups": 1, "group_size": 1,
                "BITS": DENSE, "TRANSPOSED": False,
            }  # fmt: skip
        kind = _KINDS[q.kind]
        return found | {
            "w_scale": q.scale, "w_zero": q.zero, "w_code_scale": q.code_scale,
            "levels": _levels(q.data.device) if kind == CODES else None, "groups": q.scale.shape[1],
            "group_size": q.group_size or max(q.shape[1], 1), "BITS": kind, "TRANSPOSED": self.transposed,
        }  # fmt: skip


@functools.cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, device=device)


def matrix_of(
    op: str, data: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None,
    code_scale: torch.Tensor | None, inputs: int, group_size: int,
) -> Matrix:  # fmt: skip
    """A weight from what a torch op takes of it; dense without a scale."""
    check(op, data.dim() == 2, lambda: f"weight: expected [out, in], got shape {list(data.shape)}")
    if scale is None:
        return Matrix(data)
    groups = triton.cdiv(inputs, group_size) if group_size else 1
    width = inputs if data.dtype == torch.int8 else triton.cdiv(inputs, 32) * 16
    for name, t, shape in (("data", data, [len(data), width]), ("scale", scale, [len(data), groups])):
        if list(t.shape) != shape or not t.is_contiguous():
            raise ValueError(f"genai_kernels.{op}: weight.{name}: expected {shape}, contiguous, got {list(t.shape)}")
    return Matrix(data, QuantizedWeight(data, scale, (len(data), inputs), group_size, zero, code_scale))


@triton.jit
def few_bits_tile(
    w, w_scale, w_zero, w_code_scale, levels, o, i, there, row_bytes, groups, group_size, BITS: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """Elements (o, i) of a weight of few bits, in float32; o and i stand across each other."""
    if BITS == INT8:
        q = tl.load(w + o * row_bytes + i, mask=there, other=0).to(tl.float32)
    else:
        pair = tl.load(w + o * row_bytes + i // 32 * 16 + i % 16, mask=there, other=0).to(tl.int32)
        code = (pair >> (i % 32 // 16 * 4).to(tl.int32)) & 15
        q = tl.load(levels + code) if BITS == CODES else code.to(tl.float32)
    at = o * groups + i // group_size
    if BITS == INT4:
        q -= tl.load(w_zero + at, mask=there, other=0).to(tl.float32)
    scale = tl.load(w_scale + at, mask=there, other=0).to(tl.float32)
    if w_code_scale is not None:
        scale *= tl.load(w_code_scale + at // 256, mask=there, other=0.0)
    value = q * scale
    if HIDDEN:  # a sum of one: Triton 3.7 takes a factor of float64 that was loaded as 8 bits for packed, and fails
        value = tl.sum(value[:, :, None], 2)
    return value
