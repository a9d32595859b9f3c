"""Holds every op against float64 on this machine: `E_ours <= k E_eager + u max|ref|`, the RMS error, and a bound for
each element (the rule is in genai_kernels/accuracy.py). Exit code 0 only if every sample keeps it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys

import torch

from .. import backends
from ..accuracy import Verdict, verify_sample
from ..registry import FLOATS, Op, Sample
from .console import print_table, progress, say
from .select import add_selection, name_of, selected_ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default 0)")
    parser.add_argument("--forward-only", action="store_true", help="leave the gradients out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the tensors are (default cpu)")
    parser.add_argument(
        "--backend", action="append", choices=("cpu", "cuda", "triton"), help="only this one; may be repeated"
    )
    parser.add_argument("--isa", help="an instruction set to force, or `all`: one after another")


@dataclasses.dataclass
class Line:
    """The samples of one op in one dtype on one backend."""

    op: Op
    dtype: torch.dtype
    backend: str
    samples: int = 0
    worst: Verdict | None = None  # the one closest to its limit, or the first that broke the rule
    worst_sample: str = ""
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, sample: str, verdicts: list[Verdict]) -> None:
        self.samples += 1
        for verdict in verdicts:
            if not verdict.ok:
                self.failures.append(f"{sample}, {verdict.what}: {verdict.complaint}")
            if self.worst is None or _closeness(verdict) > _closeness(self.worst):
                self.worst, self.worst_sample = verdict, sample


def _closeness(verdict: Verdict) -> float:
    """The largest error as a share of what the rule allows; a broken rule comes first."""
    if not verdict.ok:
        return float("inf")
    return verdict.error / verdict.limit if verdict.limit else 0.0


def _samples(op: Op, backend: str) -> list[Sample]:
    return [s for s in op.samples if not s.bench and (backend == "cpu" or not s.cpu_only)]


def _verify(
    ops: list[Op], dtypes: list[torch.dtype], seed: int, backward: bool, device: str, kernels: list[str]
) -> list[Line]:
    total = len(dtypes) * sum(len(_samples(op, backend)) for op in ops for backend in kernels)
    lines = []
    with progress(total) as step:
        for backend in kernels:
            for op in ops:
                for dtype in dtypes:
                    line = Line(op, dtype, backend)
                    lines.append(line)
                    for sample in _samples(op, backend):
                        step(f"{op.name} {name_of(dtype)} {sample.name}")
                        try:
                            with backends.use_backend(backend):
                                line.add(sample.name, verify_sample(op, sample, dtype, backward, seed, device=device))
                        except Exception as error:  # whatever an op raises is its failure, not the end of the run
                            line.samples += 1
                            line.failures.append(f"{sample.name}: {type(error).__name__}: {error}")
    return lines


def _print(lines: list[Line]) -> None:
    rows, styles = [], []
    for line in lines:
        worst = line.worst or Verdict("-")
        exact = line.op.exact
        rows.append(
            (
                line.op.name,
                name_of(line.dtype),
                line.backend,
                f"{line.samples - len({f.split(':')[0].split(',')[0] for f in line.failures})}/{line.samples}",
                "bits" if exact else f"{worst.error:.2e}",
                "bits" if exact else f"{worst.eager_error:.2e}",
                "-" if exact or not worst.limit or not worst.ok else f"{100 * worst.error / worst.limit:.0f} %",
                f"{line.worst_sample} {worst.what}",
                "ok" if not line.failures else "FAILED",
            )
        )
        styles.append("red" if line.failures else None)
    columns = ("op", "dtype", "backend", "samples", "worst error", "eager there", "of limit", "where", "")
    title = f"error against float64, instruction set {torch.ops.genai_kernels.isa()}"
    print_table(title, columns, rows, right=(3, 4, 5, 6), styles=styles)
    for line in lines:
        for failure in line.failures:
            say(f"{line.op.name} {name_of(line.dtype)} {line.backend}: {failure}", "red")


def _each_isa(names: list[str], argv: list[str]) -> int:
    """Runs this command again in one process for each instruction set: it is chosen once a process."""
    worst = 0
    for name in names:
        environment = {**os.environ, "GENAI_KERNELS_ISA": name}
        command = [sys.executable, "-m", "genai_kernels", "verify", *argv]
        worst = max(worst, subprocess.run(command, env=environment, check=False).returncode)
    return worst


def run(arguments: argparse.Namespace) -> int:
    if arguments.isa:
        table = dict(line.split("=") for line in torch.ops.genai_kernels.isa_table().split())
        supported = [name for name, answer in table.items() if answer == "yes"]
        if arguments.isa != "all" and arguments.isa not in supported:
            print(
                f"genai_kernels verify: --isa: expected all or one of {', '.join(supported)}, got {arguments.isa!r}",
                file=sys.stderr,
            )
            return 2
        argv = ["--seed", str(arguments.seed)] + ["--forward-only"] * arguments.forward_only
        argv += [part for name in arguments.backend or [] for part in ("--backend", name)]
        argv += [part for op in arguments.op or [] for part in ("--op", op.name)]
        argv += [part for dtype in arguments.dtype or [] for part in ("--dtype", name_of(dtype))]
        return _each_isa(supported if arguments.isa == "all" else [arguments.isa], argv)
    backward = not arguments.forward_only
    kernels = arguments.backend or backends.kernels_on(arguments.device)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("genai_kernels verify: --device: expected a CUDA device for cuda, got none", file=sys.stderr)
        return 2
    lines = _verify(
        selected_ops(arguments), arguments.dtype or list(FLOATS), arguments.seed, backward, arguments.device, kernels
    )
    _print(lines)
    failed, total = sum(bool(line.failures) for line in lines), sum(line.samples for line in lines)
    if failed:
        say(f"verify: FAILED: {failed} of {len(lines)} lines break the accuracy rule", "bold red")
        return 1
    if not total:
        say("verify: FAILED: nothing was verified, no op declares a sample", "bold red")
        return 1
    say(f"verify: ok: {total} samples keep the accuracy rule, forward{' and backward' if backward else ''}")
    return 0
