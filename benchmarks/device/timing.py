"""Stage `time`: ours and the peers on one case, in turn, by the replay of CUDA graphs over rotating inputs."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from genai_kernels import backends

from .case import Case, Tensors
from .log import Log

L2_BYTES = 128 * 2**20  # inputs rotate over more than twice what a card's second-level cache holds
WRONG = {
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
    torch.float32: 1e-4,
}  # relative, in the 2-norm: no kernel is near it


def _call(case: Case, function: Callable[..., Any], inputs: Tensors, cotangents: Any) -> Any:
    """Forward alone, or backward alone through a graph that is built once."""
    if not case.backward:
        return lambda: function(*inputs)
    result = function(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    leaves = [t for t in inputs if t.requires_grad]

    def backward() -> list[torch.Tensor]:
        found = torch.autograd.grad(
            results, leaves, cotangents[: len(results)], retain_graph=True, allow_unused=True
        )  # unused: what a case freezes
        return [g for g in found if g is not None]

    return backward


def _outputs(result: Any) -> list[torch.Tensor]:
    return [t.detach() for t in (result if isinstance(result, (tuple, list)) else (result,))]


def _distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error in the 2-norm; NaN is infinity."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        d = ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        worst = max(worst, math.inf if math.isnan(d) else d)
    return worst


class Contestant:
    """One implementation of a case, with calls over sets of inputs and, where it can be captured, a graph of them."""

    def __init__(
        self, case: Case, name: str, function: Callable[..., Any], sets: list[Tensors], cotangents: Any
    ) -> None:
        self.name = name
        self.forced = name if name in ("cuda", "triton", "cpu") else "auto"
        with backends.use_backend(self.forced):
            self.calls = [_call(case, function, inputs, cotangents) for inputs in sets]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.not_captured = ""

    def run_all(self) -> None:
        with backends.use_backend(self.forced):
            for call in self.calls:
                call()

    def prepare(self, device: str) -> None:
        if device != "cuda":
            return self.run_all()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run_all()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.run_all()
            self.graph = graph
        except Exception as error:  # what cannot be captured is timed call by call
            self.not_captured = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            torch.cuda.synchronize()

    def replay(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.run_all()

    def sample_ms(self, device: str, replays: int) -> float:
        """Time of one call, the mean over some replays."""
        if device != "cuda":
            before = time.perf_counter()
            for _ in range(replays):
                self.replay()
            return 1e3 * (time.perf_counter() - before) / replays / len(self.calls)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            self.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / replays / len(self.calls)


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def _with_gradients(case: Case, tensors: Tensors) -> Tensors:
    return tuple(t.detach().requires_grad_(case.backward and t.is_floating_point()) for t in tensors)


def time_case(log: Log, device: str, case: Case, ours: list[str], rounds: int = 9) -> None:
    """`ours`: the backends that have passed stage `correct` for this op; the others are not timed."""
    torch.manual_seed(1)
    first = _with_gradients(case, case.make(device, case.dtype))
    bytes_of_set = sum(t.numel() * t.element_size() for t in first)
    count = 1 if device == "cpu" else max(1, min(16, math.ceil(L2_BYTES / bytes_of_set)))
    sets = [first] + [_with_gradients(case, case.make(device, case.dtype)) for _ in range(count - 1)]

    exact = tuple(t.detach().float().requires_grad_(t.requires_grad) for t in first)
    probe = case.reference(*exact)
    shapes = [t.shape for t in (probe if isinstance(probe, tuple) else (probe,))]
    cotangents = [torch.randn(shape, device=device, dtype=case.dtype) for shape in shapes]
    expected = _outputs(_call(case, case.reference, exact, [c.float() for c in cotangents])())
    del probe

    contestants, failed = [], {}
    checks: dict[str, float] = {}
    for name, function in [*((b, case.ours) for b in ours), *case.peers.items()]:
        try:
            c = Contestant(case, name, function, sets, cotangents)
            with backends.use_backend(c.forced):
                checks[name] = _distance(_outputs(c.calls[0]()), expected)
            if checks[name] > WRONG[case.dtype]:
                failed[name] = f"wrong result: relative error {checks[name]:.1e}"
                continue
            c.prepare(device)
            contestants.append(c)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    del expected, exact

    times: dict[str, list[float]] = {c.name: [] for c in contestants}
    replays = {c.name: max(1, min(200, int(8 / max(c.sample_ms(device, 1) * len(c.calls), 1e-3)))) for c in contestants}
    if device == "cpu":
        replays, rounds = dict.fromkeys(replays, 1), 3
    for i in range(rounds):  # A-B-C, then C-B-A
        for c in contestants if i % 2 == 0 else contestants[::-1]:
            times[c.name].append(c.sample_ms(device, replays[c.name]))

    timings = {}
    for c in contestants:
        t = times[c.name]
        median = statistics.median(t)
        forward, reverse = statistics.median(t[0::2]), statistics.median(t[1::2])
        timings[c.name] = {
            "ms": median, "p20": _quantile(t, 0.2), "p80": _quantile(t, 0.8), "reversed": abs(forward / reverse - 1),
            "graph": c.graph is not None, "not_captured": c.not_captured, "error": checks[c.name],
        }  # fmt: skip
    log.add(
        "time", op=case.op, name=case.name, backward=case.backward, dtype=str(case.dtype)[6:], flops=case.flops,
        bytes=case.elements * case.dtype.itemsize, sets=count, timings=timings, failed=failed,
    )  # fmt: skip
    del contestants, sets
    gc.collect()
