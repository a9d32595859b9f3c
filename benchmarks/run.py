"""Measures everything in one run and writes benchmarks/results/<machine>.json.

    python -m benchmarks.run                    everything: ours, eager, peers, torch.compile, both passes
    python -m benchmarks.run --quick            the smallest case of each op, two points of each curve; writes nothing
                                                unless --out says where
    python -m benchmarks.run --op rms_norm      one op, or with --case some cases: they replace their like in a result
                                                that this machine gave before

Every result is checked against float64 before it is timed (genai_kernels/cli/check.py). Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from genai_kernels.cli import measure, report
from genai_kernels.cli.bench import default_threads, document, load, thread_counts, warn_if_noisy
from genai_kernels.cli.console import print_table, progress, say
from genai_kernels.cli.machine import file_name
from genai_kernels.cli.overhead import measure_overhead
from genai_kernels.cli.select import add_selection, selected_ops

from . import curves

RESULTS = Path(__file__).resolve().parent / "results"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_selection(parser)
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--threads", type=thread_counts, default=default_threads(), metavar="1,2")
    parser.add_argument("--quick", action="store_true", help="few cases, timed shortly")
    parser.add_argument("--seconds", type=float, help="about how long each contestant of a case is timed (default 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what has to be compiled first")
    parser.add_argument("--no-curves", action="store_true", help="leave out time against length")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/<machine>.json")
    return parser.parse_args(argv)


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case.get(name) for name in ("op", "sample", "dtype", "pass", "threads", "mode"))


def merged(new: dict[str, Any], path: Path) -> dict[str, Any]:
    """`new` with the other cases of the document at `path`, if that is of the same machine and software."""
    try:
        old = load(path)
    except ValueError:
        return new
    if old["machine"]["id"] != new["machine"]["id"]:
        return new
    for key in ("cases", "overhead"):
        measured = {_key(case) for case in new[key]}
        kept = [case for case in old.get(key, []) if _key(case) not in measured]
        new[key] = sorted(kept + new[key], key=lambda case: case["op"])
    new["curves"] = new["curves"] or old.get("curves", [])
    return new


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    ops, quick = selected_ops(arguments), arguments.quick
    load_before = os.getloadavg()[0]
    seconds = arguments.seconds or (0.05 if quick else 1.0)
    settings = measure.Settings(arguments.threads, seconds, compile=not arguments.no_compile)
    dtypes = arguments.dtype or [torch.float32, torch.bfloat16]
    with_curves = not (arguments.no_curves or arguments.case) and any(
        curve.op in {op.name for op in ops} for curve in curves.CURVES
    )
    with progress(measure.count(ops, dtypes, quick, arguments.case) + with_curves * curves.count(quick)) as step:
        cases = measure.run(ops, dtypes, settings, quick, step, arguments.case)
        lines = curves.measure_curves(settings, quick, step) if with_curves else []
    found = document(cases, arguments.threads, load_before)
    found["curves"], found["overhead"] = lines, measure_overhead(ops)

    columns, rows = report.case_table(cases)
    print_table(report.machine_line(found["machine"]), columns, rows, right=range(4, len(columns) - 1))
    for line in report.failures(cases):
        say(line, "red" if "REFUSED" in line else "yellow")
    say(report.limits_line(found["limits"]))
    warn_if_noisy(cases, load_before)
    out = arguments.out or (None if quick else RESULTS / f"{file_name()}.json")
    if out is not None:
        if arguments.op or arguments.case:
            found = merged(found, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        say(f"written: {out}; now `python -m benchmarks.report` brings README and the pictures up to date")
    points = [point for line in lines for point in line["points"]]
    return int(any(case["refused"] for case in [*cases, *points]))


if __name__ == "__main__":
    sys.exit(main())
