"""What is made of measurements: tables as text, Markdown and HTML, and one self-contained HTML report.

For `bench`, `benchmarks/report.py`, and for model demos alike (with genai_kernels.cli.console.print_table for the
terminal and genai_kernels.cli.plots for the pictures):

    from genai_kernels.cli.report import Section, html_report, markdown_table

    html_report("report.html", "Character LM", [
        Section("Loss", "Both curves are the same.", images=["loss.png"]),
        Section("Speed", tables=[(("op", "ours ms", "ratio"), rows)]),
    ])
"""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import COMPILED, EAGER, OURS
from .plots import bar_plot

Rows = Sequence[Sequence[object]]
Json = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # columns and rows

# ---- tables and pages, of anything ----


def markdown_table(columns: Sequence[str], rows: Rows, right: Sequence[int] = ()) -> str:
    """A table in Markdown; the columns whose numbers are in `right` are aligned to the right."""
    rule = ["---:" if i in right else "---" for i in range(len(columns))]
    lines = [columns, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of an HTML report: a heading, paragraphs (empty lines part them), tables, pictures."""

    heading: str
    text: str = ""
    tables: Sequence[tuple[Sequence[str], Rows]] = ()
    images: Sequence[str | Path] = ()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: left; white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums } th { background: #f5f5f5 }
tr:hover td { background: #fafafa } img { max-width: 100%; height: auto }
"""


def _is_number(cell: object) -> bool:
    text = str(cell).strip().rstrip("x%~ ").replace(",", "")
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True


def html_table(columns: Sequence[str], rows: Rows) -> str:
    """A table in HTML; cells that hold numbers are aligned to the right."""
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' if _is_number(c) else ''}>{html.escape(str(c))}</td>" for c in row)
        + "</tr>\n"
        for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n"


def html_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Writes one HTML file that needs nothing else: the pictures (PNG) are inside it, and it loads nothing."""
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>\n")
        parts += [f"<p>{html.escape(p)}</p>\n" for p in section.text.split("\n\n") if p.strip()]
        for image in section.images:
            data = base64.b64encode(Path(image).read_bytes()).decode()
            parts.append(f'<p><img alt="{html.escape(Path(image).stem)}" src="data:image/png;base64,{data}"></p>\n')
        parts += [html_table(columns, rows) for columns, rows in section.tables]
    Path(path).write_text("".join(parts) + "</body></html>\n")


# ---- tables of `bench` ----


def milliseconds(case: Json, name: str) -> str:
    """The median of one contestant; "-" where there is none."""
    timing = case["timings"].get(name)
    return f"{1e3 * timing['median']:.3g}" if timing else "-"


def ratio(case: Json, name: str) -> float | None:
    """How many times longer this contestant takes than ours; None where one of them has no time."""
    timings = case["timings"]
    return timings[name]["median"] / timings[OURS]["median"] if name in timings and OURS in timings else None


def peers_of(case: Json) -> list[str]:
    """The contestants beside ours and eager that have a time, the fastest first."""
    names = [name for name in case["timings"] if name not in (OURS, EAGER)]
    return sorted(names, key=lambda name: case["timings"][name]["median"])


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def _share(case: Json) -> str:
    if "share" not in case:
        return "-"
    unit = "GFLOP/s" if case["flops"] else "GB/s"
    return f"{100 * case['share']:.0f} % of {case['limit']['rate'] / 1e9:.0f} {unit}"


def _inexact(case: Json, name: str) -> str:
    """A remark on a peer that is clearly less exact than eager."""
    check = case["checks"].get(name, {"error": 0.0, "eager_error": 0.0})
    if check["error"] <= 2 * check["eager_error"]:
        return ""
    times = check["error"] / check["eager_error"] if check["eager_error"] else float("inf")
    return f" (error {times:.1f}x eager's)"


def case_table(cases: Sequence[Json]) -> Table:
    """Columns and rows: one row a case: our time, everyone's ratio to it, the share of the limit, the errors."""
    columns = (
        "op", "case", "dtype", "pass", "threads", "ours ms", "spread", "eager ms", "eager / ours", "share of limit",
        "error", "eager's error", "peers / ours",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for case in cases:
        check, timing = case["checks"].get(OURS, {}), case["timings"].get(OURS)
        rows.append(
            (
                case["op"],
                case["sample"],
                case["dtype"],
                case["pass"],
                str(case["threads"]),
                "REFUSED" if case["refused"] else milliseconds(case, OURS),
                f"{'~' if case['noisy'] else ''}{100 * timing['spread']:.0f} %" if timing else "-",
                milliseconds(case, EAGER),
                _times(ratio(case, EAGER)),
                _share(case),
                f"{check['error']:.1e}" if timing else "-",
                f"{check['eager_error']:.1e}" if timing else "-",
                ", ".join(f"{n} {_times(ratio(case, n))}{_inexact(case, n)}" for n in peers_of(case)) or "-",
            )
        )
    return columns, rows


def failures(cases: Sequence[Json]) -> list[str]:
    """One line for each result of ours that was refused, and for each peer that failed (equal ones together)."""
    lines: dict[str, list[str]] = {}
    for case in cases:
        name = f"{case['op']} {case['sample']} {case['dtype']} {case['pass']}"
        if case["refused"]:
            lines.setdefault(f"REFUSED {name}: {case['refused']}", [])
        for peer, reason in case["failed"].items():
            lines.setdefault(f"{peer} has no time in {case['op']} {case['pass']}: {reason}", []).append(
                f"{case['sample']} {case['dtype']}"
            )
    return [line + (f" ({', '.join(dict.fromkeys(where))})" if where else "") for line, where in lines.items()]


def machine_line(machine: Json) -> str:
    """The machine in one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{', virtual' if machine['virtual'] else ''}, {machine['isa']}, "
        f"torch {machine['torch']}, {machine['compiler']}, load {machine['load']}, fingerprint {machine['id']}"
    )


def limits_line(limits: Json) -> str:
    """The machine's limits, as measured, in one line."""
    parts = []
    for threads, found in limits.items():
        peaks = ", ".join(f"{what} {rate / 1e9:.0f} GFLOP/s" for what, rate in found["peaks"].items() if rate)
        memory = found["memory"]
        streams = f"memory read {memory['read'] / 1e9:.1f} GB/s, copy {memory['copy'] / 1e9:.1f} GB/s"
        parts.append(f"{threads} thread{'s' * (threads != '1')}: {peaks}, {streams}")
    return "limits of this machine: " + "; ".join(parts)


def _key(case: Json) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("op", "sample", "dtype", "pass", "threads"))


def comparison(new: Json, old: Json) -> Table:
    """Columns and rows of the cases that two documents share: times, their ratio, and both shares of the limit."""
    columns = ("op", "case", "dtype", "pass", "threads", "before ms", "now ms", "before / now", "share before", "now")
    before = {_key(case): case for case in old["cases"]}
    rows: list[tuple[str, ...]] = []
    for case in new["cases"]:
        then = before.get(_key(case))
        if then is None:
            continue
        times = then["timings"].get(OURS), case["timings"].get(OURS)
        factor = times[0]["median"] / times[1]["median"] if times[0] and times[1] else None
        shares = [f"{100 * c['share']:.0f} %" if "share" in c else "-" for c in (then, case)]
        cells = (milliseconds(then, OURS), milliseconds(case, OURS), _times(factor), *shares)
        rows.append((*map(str, _key(case)), *cells))
    return columns, rows


def speedup_plot(cases: Sequence[Json], path: str | Path, title: str = "How many times longer the others take") -> bool:
    """Draws the ratios of eager, of the fastest peer and of compiled eager into a PNG; False without matplotlib."""
    timed = [case for case in cases if OURS in case["timings"]]
    many_threads = len({case["threads"] for case in timed}) > 1
    labels = []
    for case in timed:
        threads = f" {case['threads']} thr" if many_threads else ""
        labels.append(f"{case['op']} {case['sample']} {case['dtype']} {case['pass']}{threads}")
    groups: dict[str, list[float | None]] = {
        EAGER: [ratio(case, EAGER) for case in timed],
        COMPILED: [ratio(case, COMPILED) for case in timed],
        "fastest other peer": [
            min((r for n in peers_of(case) if n != COMPILED and (r := ratio(case, n))), default=None) for case in timed
        ],
    }
    present = {name: values for name, values in groups.items() if any(v is not None for v in values)}
    return bar_plot(path, labels, present, title=title, xlabel="time / our time", reference=1.0)
