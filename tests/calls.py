"""Calls of every op, for the tests that hold for all of them: a sample's arguments, its results and their bits."""

from __future__ import annotations

from typing import Any

import torch

from genai_kernels.accuracy import map_tensors
from genai_kernels.registry import OPS, Make, Op, Sample

SAMPLES = [(op, sample) for op in OPS.values() for sample in op.samples if not sample.bench]
SAMPLE_IDS = [f"{op.name}-{sample.name}" for op, sample in SAMPLES]


def leaves_of(call: Any) -> list[torch.Tensor]:
    """The tensors of a call that take a gradient, in order."""
    found: list[torch.Tensor] = []
    map_tensors(lambda t: found.append(t) or t, call)
    return [t for t in found if t.is_floating_point() and t.requires_grad]


def build(op: Op, sample: Sample, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """(args, kwargs) of a sample, with gradients wanted where the sample takes them."""
    args, kwargs = sample.build(Make(dtype, seed=seed))
    args, kwargs = map_tensors(
        lambda t: t.requires_grad_(op.differentiable) if t.is_floating_point() else t, (args, kwargs)
    )
    for name in sample.frozen:
        kwargs[name].requires_grad_(False)
    return args, kwargs


def run(function: Any, call: Any, seed: int = 1) -> list[torch.Tensor]:
    """The outputs, and the gradient of every leaf for fixed random cotangents."""
    args, kwargs = call
    results = function(*args, **kwargs)
    outputs = [
        r for r in (results if isinstance(results, (tuple, list)) else (results,)) if isinstance(r, torch.Tensor)
    ]
    connected = [o for o in outputs if o.requires_grad]
    gradients: tuple[torch.Tensor | None, ...] = ()
    if connected:
        generator = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float32).to(o.dtype) for o in connected]
        gradients = torch.autograd.grad(connected, leaves_of(call), cotangents, allow_unused=True)
    return [o.detach() for o in outputs] + [g for g in gradients if g is not None]


def bits(t: torch.Tensor) -> torch.Tensor:
    """A tensor as integers: NaN equals NaN, and 0 is not -0."""
    t = t.detach().contiguous()
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a: Any, b: Any) -> bool:
    """Two tensors, or two lists of tensors, are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
