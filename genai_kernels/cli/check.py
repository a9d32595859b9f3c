"""Checks a result right before it is timed: the accuracy rule of genai_kernels.accuracy, on this call's own inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..accuracy import Verdict, compare, map_tensors, verify_sample
from ..registry import Index, Make, Op, Part, Sample

# A peer may be less exact than eager, and its errors are reported, but it must not be another function: they may be
# this many times what the rule allows ours (compiled column sums in float32 were seen at 5).
PEER_FACTOR = 16.0

Results = list[torch.Tensor]


def _flat(result: Any) -> Results:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [r.detach() for r in results if isinstance(r, torch.Tensor)]


def _leaves(call: Any) -> Results:
    found: Results = []

    def collect(t: torch.Tensor) -> torch.Tensor:
        if t.requires_grad:
            found.append(t)
        return t

    map_tensors(collect, call)
    return found


def _prepared(call: Any, dtype: torch.dtype | None, backward: bool, frozen: Sequence[str] = ()) -> Any:
    def one(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        return (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_(backward)

    args, kwargs = map_tensors(one, call)
    for name in frozen:
        kwargs[name].requires_grad_(False)
    return args, kwargs


def _at(t: torch.Tensor, index: Index | None) -> torch.Tensor:
    return t if index is None else t[index]


@dataclasses.dataclass
class _Gold:
    """Eager and float64 results of one part, and where they stand in the whole."""

    of_whole: list[Index | None]
    of_part: list[Index | None]
    eager: Results
    ref: Results
    magnitudes: list[torch.Tensor | None]
    c: float


class Case:
    """One sample in one dtype, forward or backward: what is run, and what its result is held against."""

    def __init__(self, op: Op, sample: Sample, dtype: torch.dtype, backward: bool, seed: int = 0) -> None:
        self.op, self.sample, self.dtype, self.backward = op, sample, dtype, backward
        self.call = _prepared(sample.build(Make(dtype, seed=seed)), None, backward, sample.frozen)
        self._seed = seed
        self._gold: list[_Gold] = []
        self.whole = True  # the whole result is checked, not parts of it

    def runner(self, function: Callable[..., Any]) -> Callable[[], Results]:
        """What is timed: the forward under inference_mode, or the backward of a forward that ran once, here."""
        args, kwargs = self._own(self.call)
        if not self.backward:

            def forward() -> Results:
                with torch.inference_mode():
                    return _flat(function(*args, **kwargs))

            return forward
        return self._backward_of(function, self.call, self._cotangents)

    def _own(self, call: Any) -> Any:
        """Arguments for one contestant, where it writes into them: others begin from the same numbers."""
        return map_tensors(torch.clone, call) if self.op.mutates else call

    def _backward_of(
        self, function: Callable[..., Any], call: Any, cotangents: Callable[[Results], Results]
    ) -> Callable[[], Results]:
        result = function(*call[0], **call[1])
        outputs = [r for r in (result if isinstance(result, (tuple, list)) else (result,)) if r.requires_grad]
        leaves, upstream = _leaves(call), cotangents([o.detach() for o in outputs])

        def backward() -> Results:
            gradients = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True, allow_unused=True)
            return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]

        return backward

    def _cotangents(self, outputs: Results) -> Results:
        generator = torch.Generator().manual_seed(self._seed)
        made = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        # rounded to bfloat16: the same numbers in every dtype; in the memory format of the output
        return [torch.empty_like(o).copy_(g.to(torch.bfloat16)) for g, o in zip(made, outputs, strict=True)]

    def prepare(self) -> None:
        """Computes the eager and the float64 results: of the whole call, or of the parts that the op names."""
        args, kwargs = self.call
        parts: Sequence[Part] = self.op.parts(*args, **kwargs) if self.op.parts is not None else ()
        self.whole = not parts
        self._gold = [self._gold_of(part) for part in parts] or [self._gold_of(None)]

    def _gold_of(self, part: Part | None) -> _Gold:
        smaller = self.call if part is None else (part.args, part.kwargs)
        where: Sequence[Index] | None = None if part is None else part.outputs
        op, results = self.op, []
        for dtype in (None, torch.float64):
            call = _prepared(self._own(smaller), dtype, self.backward, self.sample.frozen)
            if self.backward:

                def cotangents(outputs: Results) -> Results:
                    if where is None:
                        return self._cotangents(outputs)
                    whole = self._whole_cotangents()
                    return [whole[i][where[i]].to(o.dtype) for i, o in enumerate(outputs)]

                results.append(self._backward_of(op.reference, call, cotangents)())
            else:
                with torch.no_grad():
                    results.append(_flat(op.reference(*call[0], **call[1])))
        magnitudes: list[torch.Tensor | None] = []
        if op.magnitude is not None and not self.backward:
            with torch.no_grad():
                exact = _prepared(smaller, torch.float64, False)
                found = op.magnitude(*exact[0], **exact[1])
                magnitudes = list(found) if isinstance(found, tuple) else [found]
        n = len(results[0])
        magnitudes += [None] * (n - len(magnitudes))
        accuracy, c = op.accuracy, op.accuracy.c_low
        if self.dtype in (torch.float32, torch.float64):
            c = accuracy.c_fp32(*smaller[0], **smaller[1]) if callable(accuracy.c_fp32) else accuracy.c_fp32
        if part is None:
            return _Gold([None] * n, [None] * n, results[0], results[1], magnitudes, c)
        if self.backward:
            of_whole, of_part = [w for w, _ in part.gradients], [p for _, p in part.gradients]
        else:
            of_whole, of_part = list(part.outputs), [None] * n  # type: ignore[list-item]
        return _Gold(of_whole, of_part, results[0], results[1], magnitudes, c)  # type: ignore[arg-type]

    def _whole_cotangents(self) -> Results:
        """The cotangents of the whole call, from the shapes of its outputs alone."""
        with torch.no_grad():
            outputs = _flat(self.op.function(*self.call[0], **self.call[1]))
        return self._cotangents(outputs)

    def check(self, results: Results, peer: bool = False) -> Verdict:
        """The verdict on a result of `runner`: the first that breaks the rule, or the one closest to its limit.

        The rule is over several draws: where a gradient is of rank one, as that of an adapter which one token has, all
        its elements share a few rounding errors, and one draw is a throw of dice. So a result that breaks the rule is
        judged together with seven other draws, if the whole of it was compared.
        """
        verdict = self._check_draw(results, peer)
        if verdict.ok or peer or not self.whole or self.op.exact:
            return verdict
        part = "gradient" if self.backward else "output"
        verdicts = verify_sample(self.op, self.sample, self.dtype, self.backward, self._seed)
        judged = [v for v in verdicts if v.what.startswith(part)]
        return next((v for v in judged if not v.ok), max(judged, key=lambda v: v.error / (v.limit or 1.0)))

    def _check_draw(self, results: Results, peer: bool) -> Verdict:
        worst = Verdict("nothing", complaint="no output was compared")
        factor = PEER_FACTOR if peer else 1.0
        k, k_rms = self.op.accuracy.backward if self.backward else self.op.accuracy.forward
        for gold in self._gold:
            n = min(len(results), len(gold.ref)) if peer else len(gold.ref)  # a peer may give fewer outputs
            if len(results) < n:
                return Verdict("outputs", complaint=f"{len(results)} results, expected {n}")
            for i in range(n):
                what = f"{'gradient' if self.backward else 'output'} {i}"
                ours = _at(results[i], gold.of_whole[i])
                eager, ref = _at(gold.eager[i], gold.of_part[i]), _at(gold.ref[i], gold.of_part[i])
                if self.op.exact and not (peer and ours.is_floating_point()):  # others may round otherwise
                    verdict = Verdict(what, complaint="" if torch.equal(ours, eager) else "bits differ from eager's")
                else:
                    c, magnitude = factor * gold.c, gold.magnitudes[i]
                    verdict = compare(what, ours, eager, ref, factor * k, factor * k_rms, c, magnitude)
                if not verdict.ok:
                    return verdict
                if worst.complaint or verdict.error * worst.limit > worst.error * verdict.limit:
                    worst = verdict
        return worst


def same_bits(a: Results, b: Results) -> bool:
    """True if both are equal bit for bit (a NaN equals itself)."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return len(a) == len(b) and all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and torch.equal(x.contiguous().view(integer[x.element_size()]), y.contiguous().view(integer[y.element_size()]))
        for x, y in zip(a, b, strict=True)
    )
