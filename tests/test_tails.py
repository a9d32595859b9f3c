"""Every number of keys and queries from 1 to 130, and with them every head dim: results against float64."""

import pytest
import torch
from calls import run

from genai_kernels.accuracy import compare, map_tensors
from genai_kernels.registry import OPS

OP = OPS["flash_attention"]
WAYS = (OP.function, OP.reference, OP.reference)
OPTIONS = [
    {"causal": True},
    {},
    {"window_size": (9, 4)},
    {"window_size": (20, 0), "softcap": 5.0},
    {"causal": True, "softmax_scale": -0.3},
]


def call(n, dtype):
    d, dv, queries = 7 * n % 130 + 1, 11 * n % 130 + 1, 13 * n % 130 + 1
    generator = torch.Generator().manual_seed(n)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    q, k, v = make(1, queries, 2, d), make(1, n, 1, d), make(1, n, 1, dv)
    return (q, k, v), {**OPTIONS[n % len(OPTIONS)], "return_lse": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tail(dtype):
    """All of them are judged as one, so that the factors compare the computations and not the dice."""
    results = [[], [], []]
    for n in range(1, 131):
        given = call(n, dtype)
        exact = map_tensors(lambda t: t.detach().double().requires_grad_(), given)
        for found, function, to in zip(
            results, (OP.function, OP.reference, OP.reference), (given, given, exact), strict=True
        ):
            found.append(run(function, to))
    names = ["out", "lse", "dq", "dk", "dv"]
    for i, name in enumerate(names):
        ours, eager, ref = (torch.cat([r[i].flatten() for r in found]) for found in results)
        k, k_rms = OP.accuracy.forward if i < 2 else OP.accuracy.backward
        verdict = compare(name, ours, eager, ref, k, k_rms)
        assert verdict.ok, f"{name}: {verdict.complaint}"
