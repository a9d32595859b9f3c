"""The rule by which a result is called correct: ours, eager and float64 decide, never a hand-set tolerance.

With `u` the unit roundoff of the output's dtype, `E` the largest and `R` the RMS error against `ref` (the same
computation in float64 from the same low-precision inputs):

1. `E_ours <= k E_eager + u max|ref|` and `R_ours <= kR R_eager + 0.3 u rms(ref)`;
2. per element `|ours - ref| <= c u A`, with `A` the op's condition magnitude;
3. NaN and infinity in the same places, compared first.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from .registry import Make, Op, Sample

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


@dataclasses.dataclass
class Verdict:
    """One compared output: what it is, its errors, and the complaint if it breaks the rule."""

    what: str
    error: float = 0.0  # largest |ours - ref|
    eager_error: float = 0.0
    limit: float = 0.0  # what the rule allows for `error`
    complaint: str = ""

    @property
    def ok(self) -> bool:
        return not self.complaint


def compare(
    what: str,
    ours: torch.Tensor,
    eager: torch.Tensor,
    ref: torch.Tensor,
    k: float,
    k_rms: float,
    c: float | None = None,
    magnitude: torch.Tensor | None = None,
    draws: int = 1,
) -> Verdict:
    """Holds one output against the rule.

    With `draws` > 1 the tensors are flattened draws of one call's output, one after the other, and `E` is the mean of
    the draws' largest errors: one unlucky rounding in one draw does not decide, a fault in one draw still does.
    """
    verdict = Verdict(what)
    if ours.shape != ref.shape:
        verdict.complaint = f"shape {tuple(ours.shape)}, expected {tuple(ref.shape)}"
        return verdict
    if ours.dtype != eager.dtype:
        verdict.complaint = f"dtype {ours.dtype}, expected {eager.dtype}"
        return verdict
    if ref.numel() == 0:
        return verdict
    u, smallest_normal = UNIT_ROUNDOFF[ours.dtype], torch.finfo(ours.dtype).smallest_normal
    ours, eager, ref = ours.double(), eager.double(), ref.double()
    for name, special in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        # a finite float64 value may round to infinity in a narrow dtype: then eager shows it too
        expected = special(ref) | (special(eager) & torch.isfinite(ref) & special(ours))
        if not torch.equal(special(ours), expected):
            verdict.complaint = f"{name} in {int(special(ours).sum())} places, expected {int(expected.sum())}"
            return verdict
    finite = torch.isfinite(ours) & torch.isfinite(ref)
    if not finite.any():
        return verdict
    difference = (ours - ref).abs().masked_fill(~finite, 0)
    eager_difference = (eager - ref).abs().nan_to_num(posinf=0.0).masked_fill(~finite, 0)
    size = ref.abs().masked_fill(~finite, 0)

    def largest(x: torch.Tensor) -> float:
        return x.reshape(draws, -1).amax(dim=1).mean().item()

    def rms(x: torch.Tensor) -> float:
        return (x.square().sum() / finite.sum()).sqrt().item()

    verdict.error, verdict.eager_error = largest(difference), largest(eager_difference)
    verdict.limit = limit = k * verdict.eager_error + u * largest(size)
    if verdict.error > limit:
        verdict.complaint = f"largest error {verdict.error:.3e} > {limit:.3e} (eager {verdict.eager_error:.3e})"
        return verdict
    limit = k_rms * rms(eager_difference) + 0.3 * u * rms(size)
    if rms(difference) > limit:
        verdict.complaint = f"RMS error {rms(difference):.3e} > {limit:.3e} (eager {rms(eager_difference):.3e})"
        return verdict
    if c is not None and magnitude is not None:
        # A is at least the smallest normal number: the spacing of numbers does not shrink below it
        bound = c * u * magnitude.double().broadcast_to(ref.shape).clamp_min(smallest_normal)
        excess = (difference - bound).flatten()
        if bool((excess > 0).any()):
            worst = int(excess.argmax())
            verdict.complaint = (
                f"element error {difference.flatten()[worst]:.3e} > {bound.flatten()[worst]:.3e} = c u A with c = {c:g}"
            )
    return verdict


def _tensors(result: Any) -> list[torch.Tensor]:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [r for r in results if isinstance(r, torch.Tensor)]


def map_tensors(f: Callable[[torch.Tensor], torch.Tensor], args: Any) -> Any:
    """f applied to every tensor of nested tuples, lists and dicts."""
    if isinstance(args, torch.Tensor):
        return f(args)
    if isinstance(args, (tuple, list)):
        mapped = [map_tensors(f, a) for a in args]
        return type(args)(*mapped) if hasattr(args, "_fields") else type(args)(mapped)
    if isinstance(args, dict):
        return {key: map_tensors(f, a) for key, a in args.items()}
    return args


def moved(op: Op, call: Any, device: str) -> Any:
    """(args, kwargs) of a call on a device, but for what the op wants on the CPU."""
    args, kwargs = call
    names = list(inspect.signature(op.function).parameters) if op.on_cpu else []

    def one(name: str, value: Any) -> Any:
        return value if name in op.on_cpu else map_tensors(lambda t: t.to(device), value)

    return (
        tuple(one(names[i] if names else "", a) for i, a in enumerate(args)),
        {name: one(name, a) for name, a in kwargs.items()},
    )


def _leaves(args: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(lambda t: found.append(t) or t, args)  # type: ignore[func-returns-value]
    return [t for t in found if t.is_floating_point() and t.requires_grad]


def _run(
    function: Callable[..., Any], call: Any, differentiate: bool, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The outputs and, for a fixed random cotangent, the gradient of every floating input."""
    args, kwargs = call
    if not differentiate:
        with torch.no_grad():
            return _tensors(function(*args, **kwargs)), []
    outputs = _tensors(function(*args, **kwargs))
    leaves, connected = _leaves(call), [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = []
    for o in connected:
        g = torch.randn(o.shape, generator=generator, dtype=torch.float64)
        cotangents.append(g.to(torch.bfloat16).to(o.device, o.dtype))  # the same numbers in every dtype
    gradients = torch.autograd.grad(connected, leaves, cotangents, allow_unused=True)
    zeros_for_none = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return [o.detach() for o in outputs], zeros_for_none


def _three_ways(
    op: Op, sample: Sample, dtype: torch.dtype, differentiate: bool, seed: int, device: str
) -> tuple[Any, Any, Any]:
    """Ours, eager and float64 of one draw of a sample, each as (outputs, gradients); and its arguments."""
    args, kwargs = moved(op, sample.build(Make(dtype, device, seed)), device)

    def prepared(to: torch.dtype | None) -> Any:
        def one(t: torch.Tensor) -> torch.Tensor:
            if op.mutates:
                t = t.clone()
            if not t.is_floating_point():
                return t
            t = t.detach() if to is None else t.detach().to(to)
            return t.requires_grad_(differentiate)

        prepared_args, prepared_kwargs = map_tensors(one, (args, kwargs))
        if to is not None:  # of results, too
            is_float = {k: isinstance(v, torch.dtype) and v.is_floating_point for k, v in prepared_kwargs.items()}
            prepared_kwargs = {k: to if is_float[k] else v for k, v in prepared_kwargs.items()}
        for name in sample.frozen:
            prepared_kwargs[name].requires_grad_(False)
        return prepared_args, prepared_kwargs

    runs = ((op.function, None), (op.reference, None), (op.reference, torch.float64))
    results = [_run(function, prepared(to), differentiate, seed) for function, to in runs]
    magnitudes: list[Any] = []
    if op.magnitude is not None:
        with torch.no_grad():
            exact = map_tensors(lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
            found = op.magnitude(*exact[0], **exact[1])
            magnitudes = list(found) if isinstance(found, tuple) else [found]
    return results, magnitudes, (args, kwargs)


def _pooled(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])


def _fewest_elements(runs: list[Any]) -> int:
    """Of an output, in all runs together."""
    return min((len(runs) * o.numel() for o in runs[0][0][0][0]), default=0)


def verify_sample(
    op: Op,
    sample: Sample,
    dtype: torch.dtype,
    backward: bool = True,
    seed: int = 0,
    draws: int = 8,
    device: str = "cpu",
    enough: float = math.inf,
) -> list[Verdict]:
    """Runs one sample three ways and returns a verdict for each output and gradient.

    The largest error of a few hundred numbers is mostly luck. Several draws of the sample's random inputs are judged
    together, so that the rule's factor 1.0 compares the computations and not the dice. Where a draw is expensive, two
    do if they have `enough` elements of each output, or if its bits are compared.
    """
    differentiate = backward and op.differentiable
    runs: list[Any] = []
    if op.exact and enough < math.inf:
        draws = min(draws, 2)
    while len(runs) < min(draws, 2) or (len(runs) < draws and _fewest_elements(runs) < enough):
        runs.append(_three_ways(op, sample, dtype, differentiate, seed + len(runs), device))
    draws = len(runs)
    accuracy = op.accuracy
    args, kwargs = runs[0][2]
    c32 = accuracy.c_fp32(*args, **kwargs) if callable(accuracy.c_fp32) else accuracy.c_fp32

    verdicts = []
    for part, name in enumerate(("output", "gradient")):
        k, k_rms = (accuracy.forward, accuracy.backward)[part]
        for i in range(len(runs[0][0][0][part])):
            what = f"{name} {i}"
            draws_of = [[run[0][way][part][i] for run in runs] for way in range(3)]
            shapes = [(a.shape, r.shape) for a, r in zip(draws_of[0], draws_of[2], strict=True)]
            wrong = [pair for pair in shapes if pair[0] != pair[1]]
            if wrong:
                verdicts.append(Verdict(what, complaint=f"shape {tuple(wrong[0][0])}, expected {tuple(wrong[0][1])}"))
                continue
            ours, eager, ref = (_pooled(tensors) for tensors in draws_of)
            if op.exact or not ours.is_floating_point():
                complaint = "" if torch.equal(ours, eager) else "bits differ from the reference"
                verdicts.append(Verdict(what, complaint=complaint))
                continue
            magnitude = None
            if part == 0 and i < len(runs[0][1]):
                sized = zip(draws_of[2], (run[1][i] for run in runs), strict=True)
                magnitude = _pooled([m.double().broadcast_to(r.shape) for r, m in sized])
            c = c32 if ours.dtype in (torch.float32, torch.float64) else accuracy.c_low
            verdicts.append(compare(what, ours, eager, ref, k, k_rms, c, magnitude, draws))
    return verdicts
