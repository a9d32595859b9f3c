"""Weights to few bits and back, in plain PyTorch: it is done once for a model."""

from __future__ import annotations

import torch

from ...quantized import NF4, SCALE_BLOCK, QuantizedWeight, pack, spread

__all__ = ["dequantize", "quantize_int4", "quantize_int8", "quantize_nf4"]

_INT8_MAX, _INT4_MAX, _CODE_MAX = 127, 15, 255
# Scales have this many significant bits, and a smaller one than the least is 0: so that the product of one with an
# integer of 8 bits is exact in float32, and a matrix that comes back from few bits goes there as it was.
_SCALE_BITS = 16
_LEAST_SCALE = 2.0**-100
_TOO_LARGE = 2.0**127  # what is smaller comes back finite, rounded up or not


def _checked(name: str, weight: torch.Tensor, group_size: int) -> torch.Tensor:
    where = f"genai_kernels.{name}:"
    if weight.dim() != 2:
        raise ValueError(f"{where} weight: expected [out, in], got shape {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"{where} weight: expected a floating dtype, got {str(weight.dtype).removeprefix('torch.')}")
    if group_size and (group_size < 32 or group_size & (group_size - 1)):
        raise ValueError(f"{where} group_size: expected a power of two of at least 32, got {group_size}")
    values = weight.detach().float()
    wrong = (~(values.abs() < _TOO_LARGE)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"{where} weight[{row}, {column}]: expected less than 2**127, got {values[row, column].item()}"
        )
    return values


def _groups(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """`[out, groups, group_size]`, zeros past the end."""
    rows, columns = values.shape
    size = group_size or max(1, columns)
    groups = max(1, -(-columns // size)) if group_size == 0 else -(-columns // size)
    padded = values.new_zeros(rows, groups * size)
    padded[:, :columns] = values
    return padded.view(rows, groups, size)


def _scale(largest: torch.Tensor, steps: int) -> torch.Tensor:
    """The least scale of few bits that `steps` of reach `largest`; 0 for next to nothing."""
    exact = largest.double() / steps
    mantissa, exponent = torch.frexp(exact)
    scale = torch.ldexp((mantissa * 2**_SCALE_BITS).ceil() * 2.0**-_SCALE_BITS, exponent)
    return torch.where(exact >= _LEAST_SCALE, scale, 0.0).float()


def _in_steps(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest whole number of scales, ties to even; 0 where the scale is 0."""
    return (values.double() / torch.where(scale > 0, scale, 1).double()).round()


def quantize_int8(weight: torch.Tensor, group_size: int | None = None) -> QuantizedWeight:
    """A weight as int8 with a float32 scale for each row, or for each group of a row: symmetric, -127 to 127.

    The scale is the largest magnitude over 127, rounded up to 16 significant bits, so that every product with it is
    exact in float32 and `quantize_int8(dequantize(q))` is `q` again. A row of zeros has scale 0.

    Args:
        weight: `[out, in]`, any floating dtype.
        group_size: elements of a row that share a scale, a power of two of at least 32; None: the whole row.

    Returns:
        `QuantizedWeight`: 1 byte an element, and 4 for each scale.

    Raises:
        ValueError: a shape or group size that does not fit; NaN, infinity, or 2**127 and more.
        TypeError: not a floating dtype.

    Source: LLM.int8() (arXiv 2208.07339), without its outliers.

    >>> import torch, genai_kernels as gk
    >>> q = gk.quantize_int8(torch.tensor([[127.0, -63.4, 0.0], [0.0, 0.0, 0.0]]))
    >>> q.data, q.scale
    (tensor([[127, -63,   0],
            [  0,   0,   0]], dtype=torch.int8), tensor([[1.],
            [0.]]))
    """
    group_size = group_size or 0
    values = _checked("quantize_int8", weight, group_size)
    grouped = _groups(values, group_size)
    scale = _scale(_largest(grouped), _INT8_MAX)
    q = _in_steps(values, spread(scale, group_size, values.shape[1])).clamp_(-_INT8_MAX, _INT8_MAX)
    return QuantizedWeight(q.to(torch.int8), scale, (values.shape[0], values.shape[1]), group_size)


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> QuantizedWeight:
    """A weight in 4 bits, with a float32 scale and a zero of 0 to 15 for each group of a row: asymmetric.

    A group spans from its least element, at most 0, to its largest, at least 0, in 15 steps; 0 stays exactly 0, and the
    ends have the codes 0 and 15. Scales have 16 significant bits, so that every product with one is exact in float32.

    Args:
        weight: `[out, in]`, any floating dtype. The last group of a row may be shorter.
        group_size: elements of a row that share a scale, a power of two of at least 32; 32, 64 and 128 are usual.

    Returns:
        `QuantizedWeight`: 4 bits an element, and 5 bytes a group.

    Raises:
        ValueError: a shape or group size that does not fit; NaN, infinity, or 2**127 and more.
        TypeError: not a floating dtype.

    Peers: the group-wise formats of GPTQ and AWQ.

    >>> import torch, genai_kernels as gk
    >>> q = gk.quantize_int4(torch.tensor([[-5.0, 10.0, 0.0, 3.2]]), group_size=32)
    >>> q.scale, q.zero, gk.dequantize(q)
    (tensor([[1.]]), tensor([[5]], dtype=torch.uint8), tensor([[-5., 10.,  0.,  3.]]))
    """
    if not group_size:
        raise ValueError("genai_kernels.quantize_int4: group_size: expected a power of two of at least 32, got 0")
    values = _checked("quantize_int4", weight, group_size)
    columns = values.shape[1]
    grouped = _groups(values, group_size).double()
    least, largest = grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)
    scale = _scale(largest - least, _INT4_MAX)
    zero = _in_steps(-least, scale).clamp_(0, _INT4_MAX)
    steps = _in_steps(values, spread(scale, group_size, columns)) + spread(zero, group_size, columns)
    at_end = values == spread(torch.where(scale > 0, largest, torch.nan), group_size, columns)
    at_end &= values > 0
    codes = torch.where(at_end, _INT4_MAX, steps).clamp_(0, _INT4_MAX)
    return QuantizedWeight(pack(codes), scale, (values.shape[0], columns), group_size, zero=zero.to(torch.uint8))


def quantize_nf4(weight: torch.Tensor, block_size: int = 64, double_quant: bool = True) -> QuantizedWeight:
    """A weight as QLoRA's 4-bit NormalFloat: the nearest of 16 quantiles of a normal distribution, times a scale.

    The scale of a block is its largest magnitude. With `double_quant` it is a byte: 256 of them, counted through all
    rows, share a float32, the largest of them over 255 in 16 significant bits. Elements are coded against the scale as
    it comes back; the largest of a block, where there is a scale, is always the code -1 or 1.

    Args:
        weight: `[out, in]`, any floating dtype. Blocks do not cross rows; the last one of a row may be shorter.
        block_size: elements of a row that share a scale, a power of two of at least 32.
        double_quant: quantise the scales too: 4.13 bits an element in place of 4.5.

    Returns:
        `QuantizedWeight`.

    Raises:
        ValueError: a shape or block size that does not fit; NaN, infinity, or 2**127 and more.
        TypeError: not a floating dtype.

    Source: QLoRA (arXiv 2305.14314); peer: bitsandbytes, whose blocks cross rows, whose scales have another code around
    their mean, and which has the first of two elements in the high half of a byte.

    >>> import torch, genai_kernels as gk
    >>> q = gk.quantize_nf4(torch.tensor([[-2.0, 0.1, 1.1, 0.7]]), block_size=64, double_quant=False)
    >>> q.scale, gk.dequantize(q)
    (tensor([[2.]]), tensor([[-2.0000,  0.1592,  1.1252,  0.6758]]))
    """
    if not block_size:
        raise ValueError("genai_kernels.quantize_nf4: group_size: expected a power of two of at least 32, got 0")
    values = _checked("quantize_nf4", weight, block_size)
    rows, columns = values.shape
    grouped = _groups(values, block_size)
    largest = _largest(grouped)
    largest = torch.where(largest < _LEAST_SCALE, 0, largest)
    scale, code_scale, used = largest, None, largest
    if double_quant:
        flat = largest.flatten()
        blocks = -(-flat.numel() // SCALE_BLOCK)
        padded = flat.new_zeros(blocks * SCALE_BLOCK)
        padded[: flat.numel()] = flat
        code_scale = _scale(padded.view(blocks, SCALE_BLOCK).amax(1), _CODE_MAX)
        each = code_scale.repeat_interleave(SCALE_BLOCK)[: flat.numel()]
        scale = _in_steps(flat, each).to(torch.uint8).view_as(largest)
        used = (scale.float().flatten() * each).view_as(largest)
    # the nearest code: how many of the middles between two codes lie below
    middles = torch.tensor(NF4, dtype=torch.float64, device=values.device)
    middles = (middles[1:] + middles[:-1]) / 2
    relative = values.double() / torch.where(used > 0, used, 1).double().repeat_interleave(block_size, 1)[:, :columns]
    codes = torch.bucketize(relative.contiguous(), middles)
    at_end = values.abs() == largest.repeat_interleave(block_size, 1)[:, :columns]
    codes = torch.where(at_end, torch.where(values > 0, 15, 0), codes)
    none = used.repeat_interleave(block_size, 1)[:, :columns] == 0
    codes = torch.where(none, NF4.index(0.0), codes)
    return QuantizedWeight(pack(codes), scale, (rows, columns), block_size, code_scale=code_scale)


def _largest(grouped: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each group."""
    return grouped.abs().amax(2) if grouped.shape[2] else grouped.new_zeros(grouped.shape[:2])


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix that a quantised weight stands for, `[out, in]`: computed in float32, rounded once to dtype.

    >>> import torch, genai_kernels as gk
    >>> gk.dequantize(gk.quantize_int8(torch.tensor([[1.0, -0.5]])), torch.bfloat16)
    tensor([[ 1.0000, -0.4961]], dtype=torch.bfloat16)
    """
    return weight.dense(dtype)
