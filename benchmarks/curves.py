"""How time and memory grow: attention over the number of tokens, full and with a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from genai_kernels.cli.check import Case
from genai_kernels.cli.machine import Limits
from genai_kernels.cli.measure import OURS, Settings, measure, set_threads
from genai_kernels.cli.timing import peak_memory
from genai_kernels.registry import OPS, Make, Op, Sample

HEADS, HEAD_DIM, WINDOW = 4, 64, 512


@dataclasses.dataclass(frozen=True)
class Curve:
    """One op at several sizes: `sample(x)` is the call at size x."""

    title: str
    op: str
    sizes: tuple[int, ...]
    sample: Callable[[int], Sample]
    backward: bool


def _attention(causal: bool, window: int | None) -> Callable[[int], Sample]:
    def sample(tokens: int) -> Sample:
        def build(make: Make) -> Any:
            q, k, v = (make(1, HEADS, tokens, HEAD_DIM).transpose(1, 2) for _ in range(3))
            return (q, k, v), {"causal": causal} if window is None else {"window_size": (window - 1, 0)}

        w = min(window or tokens, tokens)
        pairs = w * tokens - w * (w - 1) / 2
        flops = 4.0 * HEADS * HEAD_DIM * pairs
        return Sample(f"{tokens} tokens", build, bench=True, flops=flops, backward_flops=2.5 * flops)

    return sample


_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
CURVES = [
    curve
    for backward, name in ((False, "forward"), (True, "backward"))
    for curve in (
        # up to 8192: beyond, the float64 check of a full score matrix does not fit into 16 GB
        Curve(f"attention {name}, causal", "flash_attention", _SIZES[:-1], _attention(True, None), backward),
        Curve(f"attention {name}, window {WINDOW}", "flash_attention", _SIZES, _attention(False, WINDOW), backward),
    )
]


def _point(op: Op, curve: Curve, size: int, settings: Settings, threads: int, limits: Limits) -> dict[str, Any]:
    case = Case(op, curve.sample(size), torch.float32, curve.backward, settings.seed)
    case.prepare()
    result = measure(case, settings, threads, limits)
    if result["refused"]:
        return result
    functions = {OURS: op.function, **op.peers}
    result["peak_bytes"] = {}
    for name in result["timings"]:
        if name in functions:
            with set_threads(threads):
                result["peak_bytes"][name] = peak_memory(lambda f=functions[name]: case.runner(f)())
    return result


def measure_curves(
    settings: Settings, quick: bool = False, step: Callable[[str], None] = lambda name: None
) -> list[dict[str, Any]]:
    """Every curve whose op is there: its title and a case for each x, in float32."""
    threads = max(settings.threads)
    with set_threads(threads):
        limits = Limits()
    found = []
    for curve in CURVES:
        if curve.op not in OPS:
            continue
        sizes = curve.sizes[:2] if quick else curve.sizes
        points = []
        for size in sizes:
            step(f"{curve.title} {size}")
            points.append({"x": size, **_point(OPS[curve.op], curve, size, settings, threads, limits)})
        found.append({"title": curve.title, "x": "tokens", "points": points})
    return found


def count(quick: bool = False) -> int:
    """How many times `measure_curves` calls `step`."""
    return sum(len(curve.sizes[:2] if quick else curve.sizes) for curve in CURVES if curve.op in OPS)
