"""Measures one case: ours, eager and the peers, checked, then timed in turn with the machine's limit."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..accuracy import Verdict
from ..registry import Op, Sample
from .check import Case, Results, same_bits
from .machine import Limits
from .select import name_of
from .timing import NOISY, interleaved

OURS, EAGER, COMPILED = "ours", "eager", "compiled eager"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a benchmark is run."""

    threads: tuple[int, ...]
    seconds: float = 0.5  # about how long each contestant of a case is timed
    compile: bool = False  # also torch.compile of the reference, and the peers that compile
    seed: int = 0


def cases_of(op: Op, quick: bool = False, containing: str = "") -> list[Sample]:
    """The samples to benchmark whose name contains a text; quick: of them the one with the least work."""
    samples = [s for s in op.samples if s.bench and containing in s.name]
    if quick and samples:
        return [min(samples, key=lambda s: s.flops or s.elements)]
    return samples


@contextlib.contextmanager
def set_threads(n: int) -> Iterator[None]:
    """Runs a block with n of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare_compiler(threads: int) -> None:
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()  # or the eighth shape is no longer compiled
    torch._inductor.config.cpp.threads = threads  # compiled into the kernel
    torch._functorch.config.donated_buffer = False  # the backward is run more than once


def _contestants(case: Case, settings: Settings, threads: int) -> dict[str, Callable[..., Any]]:
    """Ours first, then eager and the peers that the sample wants. A peer with a true `compiles` attribute is slow to
    start and waits for --compile."""
    op, sample = case.op, case.sample
    found = {OURS: op.function}
    others = dict(op.peers)
    if case.whole:  # what is too large to be checked whole is too large for eager
        others = {EAGER: op.reference, **others}
    if settings.compile:
        _prepare_compiler(threads)
        if case.whole:
            others[COMPILED] = torch.compile(op.reference, dynamic=False)
    for name, function in others.items():
        wanted = sample.peers is None or name in sample.peers or (name == COMPILED and EAGER in sample.peers)
        if wanted and (settings.compile or not getattr(function, "compiles", False)):
            found[name] = function
    return found


def _refusal(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _checked(case: Case, function: Callable[..., Any], peer: bool) -> tuple[Callable[[], Results], Results, Verdict]:
    """Runs a contestant once and holds the result against float64."""
    run = case.runner(function)
    results = run()
    return run, results, case.check(results, peer)


def _work(case: Case) -> tuple[float, float]:
    """FLOPs and bytes of a case; 0 where the sample does not say."""
    sample, size = case.sample, case.dtype.itemsize
    if case.backward:
        return sample.backward_flops, sample.backward_elements * size
    return sample.flops, sample.elements * size


def measure(case: Case, settings: Settings, threads: int, limits: Limits) -> dict[str, Any]:
    """One case with one number of threads, as a JSON object.

    `timings` holds only what was checked in this call on this input: `refused` (ours) and `failed` (peers) say why the
    others have no time.
    """
    result: dict[str, Any] = {
        "op": case.op.name,
        "sample": case.sample.name,
        "dtype": name_of(case.dtype),
        "pass": "backward" if case.backward else "forward",
        "threads": threads,
        "refused": "",
        "checks": {},
        "timings": {},
        "failed": {},
    }
    with set_threads(threads):
        calls, first = {}, []
        for name, function in _contestants(case, settings, threads).items():
            try:
                run, results, verdict = _checked(case, function, peer=name != OURS)
            except Exception as error:  # a peer that cannot do this is a finding, not the end of the run
                result["failed"][name] = _refusal(error)
                continue
            result["checks"][name] = {"error": verdict.error, "eager_error": verdict.eager_error, "ok": verdict.ok}
            if not verdict.ok:
                result["failed"][name] = f"wrong result: {verdict.what}: {verdict.complaint}"
                continue
            calls[name] = run
            if name == OURS:
                first = results
        if OURS not in calls:
            result["refused"] = result["failed"].pop(OURS)
            return result

        flops, nbytes = _work(case)
        kind = limits.name_for(case.dtype) if flops else case.sample.stream
        limit = (lambda: limits.peak(kind)) if flops else (lambda: limits.stream(kind, int(nbytes)))
        timings, rates = interleaved(calls, settings.seconds, limit if flops or nbytes else None)
        if not same_bits(calls[OURS](), first):
            result["refused"] = "the timed calls give other bits than the call that was checked"
            return result
    result["timings"] = {name: timing.as_dict() for name, timing in timings.items()}
    result["noisy"] = timings[OURS].spread > NOISY or (rates is not None and rates.spread > NOISY)
    if rates is not None:
        rate = (flops or nbytes) / timings[OURS].median
        result["limit"] = {"what": kind, "rate": rates.median, "spread": rates.spread}
        result.update(flops=flops, bytes=nbytes, rate=rate, share=rate / rates.median)
        # faster than the machine can compute: something else ran while the limit was measured
        result["noisy"] = result["noisy"] or bool(flops and result["share"] > 1 + NOISY)
    return result


def run(
    ops: list[Op],
    dtypes: list[torch.dtype],
    settings: Settings,
    quick: bool = False,
    step: Callable[[str], None] = lambda name: None,
    containing: str = "",
) -> list[dict[str, Any]]:
    """Every case of these ops whose name contains a text. `step` is called with the name of each case as it begins."""
    results = []
    limits: dict[int, Limits] = {}
    for threads in settings.threads:
        with set_threads(threads):
            limits[threads] = Limits()
    for op, sample, dtype, backward in _cases(ops, dtypes, quick, containing):
        label = f"{op.name} {sample.name} {name_of(dtype)} {'backward' if backward else 'forward'}"
        step(label)
        try:
            case = Case(op, sample, dtype, backward, settings.seed)
            case.prepare()
        except Exception as error:  # without a reference result nothing can be checked, so nothing is timed
            results += [_unprepared(op, sample, dtype, backward, n, error) for n in settings.threads]
            continue
        for threads in settings.threads:
            results.append(measure(case, settings, threads, limits[threads]))
        del case
        gc.collect()
    return results


def _cases(
    ops: list[Op], dtypes: list[torch.dtype], quick: bool, containing: str
) -> list[tuple[Op, Sample, torch.dtype, bool]]:
    return [
        (op, sample, dtype, backward)
        for op in ops
        for sample in cases_of(op, quick, containing)
        for dtype in dtypes
        for backward in ((False, True) if op.differentiable else (False,))
    ]


def count(ops: list[Op], dtypes: list[torch.dtype], quick: bool = False, containing: str = "") -> int:
    """How many times `run` calls `step`."""
    return len(_cases(ops, dtypes, quick, containing))


def _unprepared(
    op: Op, sample: Sample, dtype: torch.dtype, backward: bool, threads: int, error: Exception
) -> dict[str, Any]:
    return {
        "op": op.name,
        "sample": sample.name,
        "dtype": name_of(dtype),
        "pass": "backward" if backward else "forward",
        "threads": threads,
        "refused": f"no reference result: {_refusal(error)}",
        "checks": {},
        "timings": {},
        "failed": {},
    }


def measure_memory(threads: tuple[int, ...]) -> dict[str, Any]:
    """Streaming rates from memory and arithmetic peaks for each number of threads."""
    found = {}
    for n in threads:
        with set_threads(n):
            limits = Limits()
            peaks = {
                what: sorted(limits.peak(what) for _ in range(5))[2] for what in ("fma_f32", "fma_f64", "dot_bf16")
            }
            found[str(n)] = {"memory": limits.memory(), "peaks": peaks}
    return found
