"""Times every op against eager and its peers in one run, beside this machine's own limits.

A speed is printed only for a result that was checked against float64 in this run, on this input. Exit code 1 if a
result of ours was wrong.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from . import measure, report
from .console import print_table, progress, say
from .machine import fingerprint
from .overhead import measure_overhead
from .select import add_selection, selected_ops

SCHEMA = 1


def thread_counts(text: str) -> tuple[int, ...]:
    """(1, 2) from "1,2", for argparse."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 with commas between them, got {text!r}")
    return counts


def default_threads() -> tuple[int, ...]:
    """One thread, and two where there are two cores."""
    return tuple(sorted({1, min(2, len(os.sched_getaffinity(0)))}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--threads", type=thread_counts, default=default_threads(), metavar="1,2")
    parser.add_argument("--quick", action="store_true", help="the smallest case of each op, timed shortly")
    parser.add_argument("--seconds", type=float, help="about how long each contestant of a case is timed (default 0.5)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, and the peers that compile: slow")
    parser.add_argument("--overhead", action="store_true", help="instead: the cost of a tiny call, beside torch.add")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the results as a table")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the speed-ups (needs matplotlib)")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print the ratio to an earlier --json")


def document(cases: list[dict[str, Any]], threads: tuple[int, ...], load_before: float) -> dict[str, Any]:
    """The JSON document of a run: cases, machine, limits."""
    return {
        "schema": SCHEMA,
        "machine": {**fingerprint(), "load": load_before},
        "limits": measure.measure_memory(threads),
        "cases": cases,
    }


def load(path: Path) -> dict[str, Any]:
    """Reads a document that --json wrote.

    Raises:
        ValueError: it is not one.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a document of `bench --json` with schema {SCHEMA}")
    return found


def _print_overhead(rows: list[dict[str, Any]]) -> None:
    print_table(
        "a tiny call, 1 thread, microseconds",
        ("op", "sample", "mode", "ours", "torch.add", "ours / add", "eager", "spread"),
        [
            (r["op"], r["sample"], r["mode"], *(f"{1e6 * r[name]:.2f}" for name in ("ours", "add")),
             f"{r['ratio']:.1f}x", f"{1e6 * r['eager']:.2f}", f"{100 * r['spread']:.0f} %")
            for r in rows
        ],
        right=(3, 4, 5, 6, 7),
    )  # fmt: skip


def _print_comparison(new: dict[str, Any], old: dict[str, Any]) -> None:
    columns, rows = report.comparison(new, old)
    print_table("now against before", columns, rows, right=(5, 6, 7, 8))
    if new["machine"]["id"] != old["machine"]["id"]:
        keys = set(new["machine"]) | set(old["machine"])
        differing = [
            f"{key}: {old['machine'].get(key)} -> {new['machine'].get(key)}"
            for key in sorted(keys - {"id", "load"})
            if new["machine"].get(key) != old["machine"].get(key)
        ]
        say(
            f"note: not the same machine or software ({'; '.join(differing)}): compare the shares, not the times",
            "yellow",
        )


def warn_if_noisy(cases: list[dict[str, Any]], load: float) -> None:
    """Says so if other work disturbed the timings."""
    noisy = sum(bool(case.get("noisy")) for case in cases)
    cores = len(os.sched_getaffinity(0))
    if noisy:
        text = f"note: {noisy} of {len(cases)} cases are noisy (marked ~): their quartiles lie more than 10 % apart"
        say(f"{text}; load {load:.1f} on {cores} cores when this began: do not quote them", "yellow")
    elif load > 0.5 * cores:
        say(f"note: load {load:.1f} on {cores} cores when this began: something else runs on this machine", "yellow")


def run(arguments: argparse.Namespace) -> int:
    ops = selected_ops(arguments)
    if arguments.overhead:
        costs = measure_overhead(ops)
        _print_overhead(costs)
        if arguments.json:
            overhead = {"schema": SCHEMA, "machine": fingerprint(), "overhead": costs}
            arguments.json.write_text(json.dumps(overhead, indent=1) + "\n")
        return 0
    try:
        old = load(arguments.compare) if arguments.compare else None
    except ValueError as error:
        print(f"genai_kernels bench: --compare: {error}", file=sys.stderr)
        return 2
    load_before = os.getloadavg()[0]
    dtypes = arguments.dtype or [torch.float32, torch.bfloat16]
    seconds = arguments.seconds or (0.1 if arguments.quick else 0.5)
    settings = measure.Settings(arguments.threads, seconds, arguments.compile)
    with progress(measure.count(ops, dtypes, arguments.quick, arguments.case)) as step:
        cases = measure.run(ops, dtypes, settings, arguments.quick, step, arguments.case)
    if not cases:
        say("bench: nothing to time: no selected op declares a benchmark sample", "bold red")
        return 1
    found = document(cases, arguments.threads, load_before)

    columns, rows = report.case_table(cases)
    styles = ["red" if case["refused"] else "yellow" if case.get("noisy") else None for case in cases]
    print_table(report.machine_line(found["machine"]), columns, rows, right=range(4, len(columns) - 1), styles=styles)
    for line in report.failures(cases):
        say(line, "red" if "REFUSED" in line else "yellow")
    say(report.limits_line(found["limits"]))
    warn_if_noisy(cases, load_before)
    if old is not None:
        _print_comparison(found, old)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    if arguments.png and not report.speedup_plot(cases, arguments.png):
        say('no plot: matplotlib is not installed; pip install "genai_kernels[cli]"', "yellow")
    refused = sum(bool(case["refused"]) for case in cases)
    if refused:
        say(
            f"bench: {refused} of {len(cases)} cases have no valid result, and so no speed",
            "bold red",
        )
    return int(refused > 0)
