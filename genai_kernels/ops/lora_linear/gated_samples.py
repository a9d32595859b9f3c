"""What the gated layers are tested and measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...registry import Make, Sample
from .adapters import LoRAAdapter
from .reference import lora_linear_multi_reference
from .samples import lora_linear_multi_magnitude, pair


def gated_magnitude(gate: Callable[[torch.Tensor], torch.Tensor], gate_last: bool) -> Callable[..., torch.Tensor]:
    def magnitude(x, weight, bias=None, adapters=(), adapter_ids=None, **options):
        """How far rounding the products moves gate(a) * b: |gate'(a) b| A(a) + |gate(a)| A(b), and |y|.

        The last term is for the reference: in float64 too, 1 + erf and 1 + tanh cancel to nothing in the tail.
        """
        args = (x, weight, adapters, adapter_ids, bias)
        parts = lora_linear_multi_reference(*args, **options).detach().chunk(2, dim=-1)
        sizes = lora_linear_multi_magnitude(*args, **options).detach().chunk(2, dim=-1)
        (a, b), (size_a, size_b) = (p[::-1] if gate_last else p for p in (parts, sizes))
        with torch.enable_grad():
            leaf = a.clone().requires_grad_()
            value = gate(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        value = value.detach()
        of_y = (value * b).abs().maximum((a * b).abs() * 2.0**-26)
        return (slope * b).abs() * size_a + value.abs() * size_b + of_y

    return magnitude


def _gated(m: Make, rows: tuple[int, ...], inputs: int, n: int, bias: bool = False, ranks: Sequence[int] = (),
           **options: Any):  # fmt: skip
    weight = m(2 * n, inputs, scale=max(1, inputs) ** -0.5)
    adapters = []
    for i, rank in enumerate(ranks):
        lora_a, lora_b = pair(m, inputs, n, rank)
        adapters.append(LoRAAdapter(lora_a, lora_b, 0.5 + i, (i % 2 * n, (i % 2 + 1) * n)))
    others = {"bias": m(2 * n)} if bias else {}
    return (m(*rows, inputs), weight), {**others, **({"adapters": adapters} if ranks else {}), **options}


def _bench_gated(rows: int, inputs: int, n: int) -> Sample:
    flops = 4.0 * rows * inputs * n
    return Sample(
        f"{rows}x{inputs}x{n}",
        lambda m: _gated(m, (rows,), inputs, n),
        bench=True,
        flops=flops,
        backward_flops=2 * flops,
    )


GATED_SAMPLES = [
    Sample("plain", lambda m: _gated(m, (5, 7), 64, 48)),
    Sample("odd", lambda m: _gated(m, (13,), 77, 31, bias=True)),
    Sample("one_row", lambda m: _gated(m, (1,), 200, 130)),
    Sample("wide", lambda m: _gated(m, (3,), 40, 800, bias=True)),
    Sample("many_rows", lambda m: _gated(m, (300,), 33, 25)),
    Sample("adapters", lambda m: _gated(m, (12,), 50, 37, bias=True, ranks=(4, 7))),
    Sample("no_rows", lambda m: _gated(m, (0,), 8, 5)),
    *[_bench_gated(rows, 768, 2048) for rows in (1, 16, 512)],
    _bench_gated(512, 2048, 5632),
]
