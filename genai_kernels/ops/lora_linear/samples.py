"""What lora_linear and lora_linear_multi are tested and measured with, and what users have today."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ...quantized import QuantizedWeight, dense
from ...registry import Make, Sample
from .adapters import LoRAAdapter
from .reference import lora_linear_multi_reference, lora_linear_reference


def c_fp32(x, *_, **__):
    return math.sqrt(max(64, x.shape[-1]))


def lora_linear_magnitude(x, weight, lora_a, lora_b, scaling=1.0, bias=None, dropout_p=0.0, seed=None):
    bias = None if bias is None else bias.abs()
    return lora_linear_reference(
        x.abs(), dense(weight, x.dtype).abs(), lora_a.abs(), lora_b.abs(), abs(scaling), bias, dropout_p, seed
    )


def lora_linear_multi_magnitude(x, weight, adapters, adapter_ids, bias=None, **options):
    sizes = [LoRAAdapter(a.lora_a.abs(), a.lora_b.abs(), abs(a.scaling), a.columns) for a in adapters]
    bias = None if bias is None else bias.abs()
    return lora_linear_multi_reference(x.abs(), dense(weight, x.dtype).abs(), sizes, adapter_ids, bias, **options)


def pair(m: Make, inputs: int, outputs: int, rank: int, fp32: bool = False):
    draw = m.float32 if fp32 else m
    return draw(rank, inputs, scale=max(1, inputs) ** -0.5), draw(outputs, rank, scale=max(1, rank) ** -0.5)


def call(m: Make, rows: tuple[int, ...], inputs: int, outputs: int, rank: int, *, bias=False, fp32=False, **options):
    weight = m(outputs, inputs, scale=max(1, inputs) ** -0.5)
    args = (m(*rows, inputs), weight, *pair(m, inputs, outputs, rank, fp32))
    return args, {"scaling": 1.5, **({"bias": m(outputs)} if bias else {}), **options}


def _bench(rows: int, width: int, rank: int) -> Sample:
    flops = 2.0 * rows * (width * width + 2 * rank * width)
    return Sample(
        f"{rows}x{width}x{width}_r{rank}",
        lambda m: call(m, (rows,), width, width, rank),
        bench=True,
        flops=flops,
        backward_flops=2 * flops,
    )


def _few_bits(m: Make, kind: str, outputs: int, inputs: int, group: int) -> QuantizedWeight:
    """A weight of random codes."""
    groups, size = -(-inputs // group), inputs**-0.5
    scale = (m.float32(outputs, groups, scale=0.2).abs() + 0.5).float()
    if kind == "int8":
        return QuantizedWeight(
            m.ints(-127, 128, (outputs, inputs), torch.int8), scale * size / 70, (outputs, inputs), group
        )
    data = m.ints(0, 256, (outputs, -(-inputs // 32) * 16), torch.uint8)
    if kind == "int4":
        zero = m.ints(4, 12, (outputs, groups), torch.uint8)
        return QuantizedWeight(data, scale * size / 4, (outputs, inputs), group, zero=zero)
    codes = m.ints(100, 256, (outputs, groups), torch.uint8)
    blocks = torch.full((-(-outputs * groups // 256),), size / 100)
    return QuantizedWeight(data, codes, (outputs, inputs), group, code_scale=blocks.to(data.device))


def _on_few_bits(m: Make, kind: str, rows: int, inputs: int, outputs: int, rank: int, group: int, **options: Any):
    (x, _, *adapter), others = call(m, (rows,), inputs, outputs, rank, fp32=True, **options)
    return (x, _few_bits(m, kind, outputs, inputs, group), *adapter), others


SAMPLES = [
    Sample("plain", lambda m: call(m, (5, 7), 64, 48, 8)),
    Sample("bias", lambda m: call(m, (9,), 96, 40, 16, bias=True)),
    Sample("odd", lambda m: call(m, (13,), 77, 31, 5, bias=True)),
    Sample("fp32_adapter", lambda m: call(m, (12,), 80, 50, 12, fp32=True)),
    Sample("one_row", lambda m: call(m, (1,), 200, 130, 64)),
    Sample("rank_one", lambda m: call(m, (6,), 40, 30, 1)),
    Sample("rank_none", lambda m: call(m, (6,), 40, 30, 0)),
    Sample("rank_over_128", lambda m: call(m, (11,), 150, 60, 140)),
    Sample("many_rows", lambda m: call(m, (300,), 33, 50, 8)),
    Sample("deep", lambda m: call(m, (21,), 2100, 26, 8)),
    Sample("vector", lambda m: call(m, (), 65, 20, 4)),
    Sample("dropout", lambda m: call(m, (40,), 130, 50, 8, dropout_p=0.3, seed=5)),
    Sample("dropout_fp32_adapter", lambda m: call(m, (2, 20), 65, 30, 24, fp32=True, bias=True, dropout_p=0.1,
                                                   seed=2**40 + 3)),
    Sample("strided", lambda m: ((m(40, 30).t()[:, ::2], m(20, 24).t(), m(20, 6).t(), m(6, 24).t()), {})),
    Sample("no_rows", lambda m: call(m, (0,), 8, 5, 4)),
    Sample("int8_base", lambda m: _on_few_bits(m, "int8", 20, 100, 40, 8, 32, bias=True)),
    Sample("int4_base", lambda m: _on_few_bits(m, "int4", 9, 77, 31, 5, 32)),
    Sample("nf4_base", lambda m: _on_few_bits(m, "nf4", 30, 130, 50, 16, 64, dropout_p=0.2, seed=3)),
    *[_bench(rows, width, 16) for width in (768, 2048, 4096) for rows in (1, 16, 512)],
    *[_bench(512, 2048, rank) for rank in (8, 64)],
]  # fmt: skip


def multi(m: Make, rows: tuple[int, ...], inputs: int, outputs: int, ranks: list[int], slots: int = 0, *, bias=False,
          fp32=False, parts: bool = False, runs: int = 0, **options: Any):  # fmt: skip
    """A call: adapters of these ranks, ids drawn for each row (in `slots`), or for runs of rows."""
    weight = m(outputs, inputs, scale=max(1, inputs) ** -0.5)
    x, count = m(*rows, inputs), len(ranks)
    cut = [0, outputs // 3, outputs // 2, outputs]
    adapters = []
    for i, rank in enumerate(ranks):
        columns = (cut[i % 3], cut[i % 3 + 1]) if parts else None
        a, b = pair(m, inputs, columns[1] - columns[0] if columns else outputs, rank, fp32)
        adapters.append(LoRAAdapter(a, b, 0.5 + i, columns))
    if runs:
        options["cu_seqlens"] = torch.linspace(0, rows[0], runs + 1).to(torch.int32)
        ids = m.ints(-1, count, (runs,))
    elif slots:
        order = torch.rand((*rows, count + 1), generator=m.generator).argsort(dim=-1)[..., :slots]
        ids = (order - 1).to(torch.int32)
    else:
        ids = m.ints(-1, count, rows)
    ids = ids.cpu()
    return (x, weight, adapters, ids), {**({"bias": m(outputs)} if bias else {}), **options}


def _multi_on_few_bits(m: Make):
    (x, _, *others), options = multi(m, (30,), 77, 31, [4, 16], fp32=True)
    return (x, _few_bits(m, "nf4", 31, 77, 64), *others), options


def _bench_multi(rows: int, width: int, count: int) -> Sample:
    flops = 2.0 * rows * (width * width + 2 * 16 * width)
    return Sample(
        f"{rows}x{width}x{width}_{count}_adapters",
        lambda m: multi(m, (rows,), width, width, [16] * count),
        bench=True,
        flops=flops,
        backward_flops=2 * flops,
    )


MULTI_SAMPLES = [
    Sample("plain", lambda m: multi(m, (5, 7), 64, 48, [8, 16])),
    Sample("ranks", lambda m: multi(m, (30,), 77, 31, [1, 5, 16, 33], bias=True)),
    Sample("one_row", lambda m: multi(m, (1,), 200, 130, [40, 24])),
    Sample("slots", lambda m: multi(m, (25,), 60, 50, [3, 8, 20], slots=2)),
    Sample("columns", lambda m: multi(m, (24,), 50, 60, [4, 8, 16], slots=3, parts=True, bias=True)),
    Sample("segments", lambda m: multi(m, (90,), 40, 30, [8, 6, 4], runs=7)),
    Sample("fp32_adapters", lambda m: multi(m, (20,), 64, 40, [8, 8], fp32=True)),
    Sample("dropout", lambda m: multi(m, (30,), 70, 40, [8, 3], dropout_p=0.25, seed=11)),
    Sample("many_rows", lambda m: multi(m, (300,), 33, 50, [8, 2, 4])),
    Sample("no_adapter", lambda m: multi(m, (6,), 40, 30, [])),
    Sample("no_rows", lambda m: multi(m, (0,), 8, 5, [4])),
    Sample("nf4_base", _multi_on_few_bits),
    *[_bench_multi(rows, 2048, count) for rows, count in ((1, 1), (16, 16), (64, 64), (512, 8), (2048, 64))],
]  # fmt: skip


def peft_eager(x, weight, lora_a, lora_b, scaling=1.0, bias=None, dropout_p=0.0, seed=None):
    """What PEFT's lora.Linear runs: the adapter in its own dtype, and every step a pass of its own."""
    result = F.linear(x, weight, bias)
    return (result + F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b) * scaling).to(x.dtype)


def multi_loop(x, weight, adapters, adapter_ids, bias=None):
    """A mixed batch as PEFT does it: one adapter after the other, its rows taken out and put back."""
    y = F.linear(x, weight, bias)
    for i, adapter in enumerate(adapters):
        which = (adapter_ids == i).nonzero().flatten()
        if len(which):
            y[which] += F.linear(F.linear(x[which], adapter.lora_a), adapter.lora_b) * adapter.scaling
    return y


def multi_gather(x, weight, adapters, adapter_ids, bias=None):
    """A mixed batch as vLLM does it on a CPU: the matrices of every row copied, then einsum."""
    scaling = torch.tensor([a.scaling for a in adapters] + [0.0], dtype=x.dtype)
    a = torch.stack([a.lora_a for a in adapters] + [torch.zeros_like(adapters[0].lora_a)])[adapter_ids.long()]
    b = torch.stack([a.lora_b for a in adapters] + [torch.zeros_like(adapters[0].lora_b)])[adapter_ids.long()]
    s = torch.einsum("ni,nri->nr", x, a) * scaling[adapter_ids.long()].unsqueeze(1)
    return F.linear(x, weight, bias) + torch.einsum("nr,nor->no", s, b)
