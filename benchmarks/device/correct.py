"""Stage `correct`: every sample of one op on one backend against float64, by the accuracy rule; the same bits when it
runs again; no element of a result left unwritten. A process for each op: an error of the card ends it, and no other.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch

from genai_kernels import backends
from genai_kernels.accuracy import map_tensors, moved, verify_sample
from genai_kernels.registry import FLOATS, OPS, Make, Op, Sample

from .log import Log


def _run(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    def leaf(t: torch.Tensor) -> torch.Tensor:
        return t.requires_grad_(op.differentiable) if t.is_floating_point() else t

    args, kwargs = map_tensors(leaf, moved(op, sample.build(Make(dtype, device)), device))
    for name in sample.frozen:
        kwargs[name].requires_grad_(False)
    results = op.function(*args, **kwargs)
    results = list(results) if isinstance(results, tuple) else [results]
    outs = [r for r in results if r.requires_grad]
    leaves: list[torch.Tensor] = []
    map_tensors(lambda t: leaves.append(t) or t, (args, kwargs))  # type: ignore[func-returns-value]
    leaves = [t for t in leaves if t.requires_grad and t.is_leaf]
    gradients = torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs], allow_unused=True) if outs else ()
    return [r.detach() for r in results] + [g for g in gradients if g is not None]


def _bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [t.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]


def _repeats(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> bool:
    """True if the same call gives the same bits in memory filled with NaN."""
    first = _bits(_run(op, sample, dtype, device))
    torch.use_deterministic_algorithms(True)  # fills what torch allocates with NaN
    try:
        second = _bits(_run(op, sample, dtype, device))
    finally:
        torch.use_deterministic_algorithms(False)
    return first == second


def correct(log: Log, device: str, op_name: str, backend: str, few: bool = False) -> None:
    """`few`: two samples, for a dry run."""
    op = OPS[op_name]
    samples = [s for s in op.samples if not s.bench and not s.cpu_only][: 2 if few else None]
    with backends.use_backend(backend):
        for dtype in FLOATS:
            found: dict[str, Any] = {"samples": 0, "comparisons": 0, "failures": [], "worst_share": 0.0}
            for sample in samples:
                found["samples"] += 1
                try:
                    verdicts = verify_sample(op, sample, dtype, device=device)
                    found["comparisons"] += len(verdicts)
                    found["failures"] += [f"{sample.name}, {v.what}: {v.complaint}" for v in verdicts if not v.ok]
                    shares = [v.error / v.limit for v in verdicts if v.ok and v.limit]
                    found["worst_share"] = max([found["worst_share"], *shares])
                    if not _repeats(op, sample, dtype, device):
                        found["failures"].append(f"{sample.name}: other bits when it ran again in memory full of NaN")
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    found["failures"].append(f"{sample.name}: {text[:300]} ({where.name}:{where.lineno})")
                    if "CUDA" in text:  # the card's error stays with this process
                        log.add("correct", op=op_name, backend=backend, dtype=str(dtype)[6:], ended=True, **found)
                        return
            log.add("correct", op=op_name, backend=backend, dtype=str(dtype)[6:], **found)
