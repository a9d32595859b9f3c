"""What dora_linear and dora_norm are tested and measured with, and what users have today."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...quantized import dense
from ...registry import Make, Sample
from .reference import dora_norm_reference
from .samples import call, lora_linear_magnitude


def dora_linear_magnitude(x, weight, lora_a, lora_b, magnitude, scaling=1.0, bias=None, dropout_p=0.0, seed=None,
                          *, norm=None):  # fmt: skip
    norm = dora_norm_reference(weight, lora_a, lora_b, scaling) if norm is None else norm
    size = lora_linear_magnitude(x, weight, lora_a, lora_b, scaling, None, dropout_p, seed)
    return size * (magnitude / norm).abs() + (0 if bias is None else bias.abs())


def dora_norm_magnitude(weight, lora_a, lora_b, scaling=1.0):
    """The same of the absolute values: how far rounding the elements moves the length of a row."""
    return dora_norm_reference(dense(weight, lora_a.dtype).abs(), lora_a.abs(), lora_b.abs(), abs(scaling))


def _dora(m: Make, rows: tuple[int, ...], inputs: int, outputs: int, rank: int, *, norm=False, **options):
    args, options = call(m, rows, inputs, outputs, rank, **options)
    _, weight, lora_a, lora_b = args
    length = dora_norm_reference(weight.double(), lora_a.double(), lora_b.double(), options["scaling"])
    magnitude = (length * (1 + 0.1 * m.float32(outputs))).to(lora_a.dtype)
    return (*args, magnitude), {**options, **({"norm": length.to(magnitude.dtype)} if norm else {})}


def _bench_dora(rows: int, width: int, norm: bool) -> Sample:
    flops = 2.0 * rows * (width * width + 2 * 16 * width)
    return Sample(
        f"{rows}x{width}x{width}_r16{'_eval' if norm else ''}",
        lambda m: _dora(m, (rows,), width, width, 16, norm=norm),
        bench=True,
        flops=flops,
        backward_flops=2 * flops,
        frozen=("norm",) if norm else (),
    )


# Finite differences see the norm change, which by definition has no gradient: small calls have it given.
DORA_SAMPLES = [
    Sample("norm_given", lambda m: _dora(m, (5,), 24, 20, 4, norm=True), frozen=("norm",)),
    Sample("norm_given_bias", lambda m: _dora(m, (3, 2), 17, 9, 3, norm=True, bias=True), frozen=("norm",)),
    Sample("plain", lambda m: _dora(m, (5, 7), 64, 48, 8)),
    Sample("bias", lambda m: _dora(m, (9,), 96, 40, 16, bias=True)),
    Sample("fp32_adapter", lambda m: _dora(m, (12,), 80, 50, 12, fp32=True, bias=True)),
    Sample("many_rows", lambda m: _dora(m, (300,), 33, 50, 8)),
    Sample("wide", lambda m: _dora(m, (3,), 40, 600, 4)),
    Sample("dropout", lambda m: _dora(m, (40,), 130, 50, 8, dropout_p=0.3, seed=5)),
    *[_bench_dora(rows, width, norm) for width in (768, 2048) for rows in (1, 16, 512) for norm in (False, True)],
]


def dora_peft(x, weight, lora_a, lora_b, magnitude, scaling=1.0, bias=None, dropout_p=0.0, seed=None, *, norm=None):
    """What PEFT runs: the adapter multiplied out by an identity for the norm, each time, then both branches."""
    base = F.linear(x, weight, bias)
    built = F.linear(F.linear(torch.eye(x.shape[-1], dtype=x.dtype), lora_a), lora_b).T
    factor = (magnitude / torch.linalg.norm(weight + scaling * built, dim=1).detach()).view(1, -1)
    added = F.linear(F.linear(x, lora_a), lora_b)
    plain = base if bias is None else base - bias
    return base + (factor - 1) * plain + factor * added * scaling


def _norm(m: Make, inputs: int, outputs: int, rank: int, fp32: bool = False, cancels: bool = False):
    (_, weight, lora_a, lora_b), _ = call(m, (1,), inputs, outputs, rank, fp32=fp32)
    if cancels:  # the first rows of W + B A are nearly nothing
        weight = weight.clone()
        rows = outputs // 2
        weight[:rows] = (-1.5 * (lora_b[:rows].double() @ lora_a.double()) * (1 + 2.0**-7)).to(weight.dtype)
    return (weight, lora_a, lora_b), {"scaling": 1.5}


def _bench_norm(width: int) -> Sample:
    flops = 2.0 * 16 * width * width
    return Sample(f"{width}x{width}_r16", lambda m: _norm(m, width, width, 16), bench=True, flops=flops)


DORA_NORM_SAMPLES = [
    Sample("plain", lambda m: _norm(m, 64, 48, 8)),
    Sample("odd", lambda m: _norm(m, 77, 31, 5)),
    Sample("deep", lambda m: _norm(m, 2100, 26, 16)),
    Sample("fp32_adapter", lambda m: _norm(m, 80, 50, 12, fp32=True)),
    Sample("cancelled", lambda m: _norm(m, 200, 40, 3, cancels=True)),
    Sample("rank_none", lambda m: _norm(m, 40, 30, 0)),
    Sample("no_rows", lambda m: _norm(m, 40, 0, 4)),
    _bench_norm(768), _bench_norm(2048),
]  # fmt: skip
