"""From benchmarks/results/*.json: README's table, a page of Markdown, pictures and one HTML report for each machine.

    python -m benchmarks.report             writes everything
    python -m benchmarks.report --check     only says whether README and the pages agree with the results

README's part lies between <!-- bench:begin --> and <!-- bench:end -->; nobody edits it by hand.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genai_kernels.cli import report
from genai_kernels.cli.bench import load
from genai_kernels.cli.measure import COMPILED, EAGER, OURS
from genai_kernels.cli.plots import Line, line_plot

from .device import report as gpu

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def results() -> dict[str, Json]:
    """Every committed result by the name of its machine."""
    return {path.stem: load(path) for path in sorted(RESULTS.glob("*.json"))}


def kind(sample: str) -> str:
    """What a sample is beside its sizes: "window" for n4096_d64_window256, "" for 512x4096."""
    words = []
    for part in sample.split("_"):
        if not re.fullmatch(r"[a-z]?\d+(x\d+)*", part):
            words.append(re.sub(r"\d+$", "", part))
    return " ".join(words)


def _range(values: Sequence[float | None], form: str) -> str:
    present = sorted(v for v in values if v is not None)
    if not present:
        return "-"
    low, high = form.format(present[0]), form.format(present[-1])
    return low if low == high else f"{low} - {high}"


def _fastest_peer(case: Json) -> tuple[float, str] | None:
    ratios = [(r, n) for n in case["timings"] if n not in (OURS, EAGER, COMPILED) and (r := report.ratio(case, n))]
    return min(ratios, default=None)


def summary_table(cases: Sequence[Json]) -> report.Table:
    """One row for each op, kind of case, dtype and pass, with the range over the sizes; the most threads only."""
    columns = ("op", "dtype", "pass", "cases", "eager / ours", "compiled eager / ours", "fastest other peer / ours",
               "share of limit", "error / eager's error")  # fmt: skip
    threads = max((case["threads"] for case in cases), default=0)
    groups: dict[tuple[str, str, str], list[Json]] = {}
    for case in cases:
        if case["threads"] == threads and OURS in case["timings"]:
            name = f"{case['op']} {kind(case['sample'])}".strip()
            groups.setdefault((name, case["dtype"], case["pass"]), []).append(case)
    rows = []
    for (name, dtype, which), group in groups.items():
        peers = [found for case in group if (found := _fastest_peer(case))]
        names = ", ".join(sorted({n for _, n in peers}))
        checks = [case["checks"][OURS] for case in group]
        errors = [c["error"] / c["eager_error"] for c in checks if c["eager_error"]]
        rows.append(
            (
                name,
                dtype,
                which,
                str(len(group)),
                _range([report.ratio(case, EAGER) for case in group], "{:.2f}x"),
                _range([report.ratio(case, COMPILED) for case in group], "{:.2f}x"),
                f"{_range([r for r, _ in peers], '{:.2f}x')} ({names})" if peers else "-",
                _range([100 * case["share"] for case in group if "share" in case], "{:.0f} %"),
                _range(errors, "{:.2f}"),
            )
        )
    return columns, rows


def op_table(cases: Sequence[Json]) -> report.Table:
    """One row for each op: the fastest of what else was measured over ours, the median of its cases."""
    passes = [(dtype, which) for dtype in ("float32", "bfloat16") for which in ("forward", "backward")]
    columns = ("op", "cases", *(f"{dtype} {which}" for dtype, which in passes), "error / eager's error")
    threads = max((case["threads"] for case in cases), default=0)
    ops: dict[str, list[Json]] = {}
    for case in cases:
        if case["threads"] == threads and OURS in case["timings"]:
            ops.setdefault(case["op"], []).append(case)
    rows = []
    for op, group in ops.items():
        cells = []
        for wanted in passes:
            ratios = [
                min(others)
                for case in group
                if (case["dtype"], case["pass"]) == wanted
                and (others := [r for n in case["timings"] if n != OURS and (r := report.ratio(case, n))])
            ]
            cells.append(f"{statistics.median(ratios):.2f}x" if ratios else "-")
        checks = [case["checks"][OURS] for case in group]
        errors = [c["error"] / c["eager_error"] for c in checks if c["eager_error"]]
        rows.append((op, str(len(group)), *cells, f"{statistics.median(errors):.2f}" if errors else "-"))
    return columns, rows


def _noise(found: Json) -> str:
    noisy, n = sum(bool(case.get("noisy")) for case in found["cases"]), len(found["cases"])
    return f"{noisy} of {n} cases had quartiles more than 10 % apart" if noisy else "no case was noisy"


def readme_block(found: dict[str, Json]) -> str:
    """What stands between README's markers."""
    if not found:
        return "Not measured yet: `make bench`.\n"
    parts = []
    for name, one in found.items():
        threads = max((case["threads"] for case in one["cases"]), default=1)
        columns, rows = summary_table(one["cases"])
        parts.append(
            f"{report.machine_line(one['machine'])}. {threads} threads. Every result was checked against float64 "
            f"before it was timed; {_noise(one)}. All cases: "
            f"[benchmarks/results/{name}.md](benchmarks/results/{name}.md).\n\n"
            "How much longer the fastest alternative takes that was measured beside ours (PyTorch's composition, the "
            "same compiled, another library), the median over an op's cases; above 1x ours is faster:\n\n"
            f"{report.markdown_table(*op_table(one['cases']), right=range(1, 7))}\n\n"
            "<details>\n<summary>By kind of case and by alternative; each range is over the sizes</summary>\n\n"
            f"{report.markdown_table(columns, rows, right=(3, 4, 5, 7, 8))}\n\n</details>\n"
        )
    return "\n".join(parts)


def page(name: str, found: Json) -> str:
    """The Markdown page of one machine: every case."""
    columns, rows = report.case_table(found["cases"])
    parts = [
        f"# {name}\n\n{report.machine_line(found['machine'])}\n\n{report.limits_line(found['limits'])}\n\n"
        f"Medians; spread is the distance of the quartiles. {_noise(found).capitalize()} (~).\n\n"
        f"{report.markdown_table(columns, rows, right=range(4, len(columns) - 1))}\n"
    ]
    failed = report.failures(found["cases"])
    if failed:
        parts.append("\nNo time:\n\n" + "\n".join(f"- {line}" for line in failed) + "\n")
    for title, (columns, rows) in {**curve_tables(found), "A tiny call": overhead_table(found)}.items():
        if rows:
            parts.append(f"\n## {title}\n\n{report.markdown_table(columns, rows)}\n")
    return "".join(parts)


def overhead_table(found: Json) -> report.Table:
    """What a call costs before any work, in microseconds, beside torch.add."""
    columns = ("op", "mode", "ours us", "torch.add us", "ours / add", "eager us")
    return columns, [
        (r["op"], r["mode"], f"{1e6 * r['ours']:.2f}", f"{1e6 * r['add']:.2f}", f"{r['ratio']:.1f}x",
         f"{1e6 * r['eager']:.2f}")
        for r in found.get("overhead", [])
    ]  # fmt: skip


def curve_tables(found: Json) -> dict[str, report.Table]:
    """By title: milliseconds and peak memory of everyone at each size."""
    tables = {}
    for curve in found.get("curves", []):
        names = list(dict.fromkeys(n for p in curve["points"] for n in p["timings"]))
        columns = (curve["x"], *(f"{n} ms" for n in names), *(f"{n} MB" for n in names if n != EAGER))
        rows = []
        for p in curve["points"]:
            memory = [p.get("peak_bytes", {}).get(n) for n in names if n != EAGER]
            megabytes = ["-" if m is None else f"{m / 1e6:.0f}" for m in memory]
            rows.append((str(p["x"]), *(report.milliseconds(p, n) for n in names), *megabytes))
        tables[curve["title"]] = (columns, rows)
    return tables


def draw(name: str, found: Json, folder: Path) -> list[Path]:
    """Draws the pictures of one machine into a folder; gives those that were drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for op in sorted({case["op"] for case in found["cases"]}):
        threads = max(case["threads"] for case in found["cases"])
        cases = [c for c in found["cases"] if c["op"] == op and c["threads"] == threads]
        path = folder / f"{op}.png"
        if any(OURS in c["timings"] for c in cases) and report.speedup_plot(cases, path, f"{op}, {threads} threads"):
            drawn.append(path)
    for pass_name in ("forward", "backward"):
        # one colour for each contestant, on every curve; what is quadratic is dashed
        curves = [curve for curve in found.get("curves", []) if pass_name in curve["title"]]
        names = list(dict.fromkeys(n for c in curves for p in c["points"] for n in p["timings"] if n != COMPILED))
        lines = []
        for curve in curves:
            what = curve["title"].split(", ")[-1]
            for color, name in enumerate(names):
                points = [p for p in curve["points"] if name in p["timings"]]
                xs, ys = [p["x"] for p in points], [1e3 * p["timings"][name]["median"] for p in points]
                if points:
                    lines.append(Line(f"{name}, {what}", xs, ys, dashed="window" not in what, color=color))
        path = folder / f"attention_{pass_name}_length.png"
        if lines and line_plot(
            path, lines, title=f"Attention {pass_name}, float32: time against length", xlabel="tokens",
            ylabel="milliseconds", log_x=True, log_y=True,
        ):  # fmt: skip
            drawn.append(path)
    return drawn


def sections(found: Json, images: Sequence[Path]) -> list[report.Section]:
    """The HTML report of one machine."""
    return [
        report.Section(
            "Machine",
            f"{report.machine_line(found['machine'])}\n\n{report.limits_line(found['limits'])}\n\n{_noise(found)}",
        ),
        report.Section("Summary", "Above 1x ours is faster.", [summary_table(found["cases"])], images),
        report.Section("Growth", tables=list(curve_tables(found).values())),
        report.Section("A tiny call", tables=[overhead_table(found)]),
        report.Section("Every case", "\n\n".join(report.failures(found["cases"])), [report.case_table(found["cases"])]),
    ]


def with_block(readme: str, block: str, begin_mark: str = BEGIN, end_mark: str = END) -> str:
    """README with its part replaced.

    Raises:
        ValueError: README has not the two markers.
    """
    before, begin, rest = readme.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"README.md: expected the markers {begin_mark} and {end_mark}")
    return f"{before}{begin_mark}\n{block}{end_mark}{after}"


def expected_files(found: dict[str, Json]) -> dict[Path, str]:
    """The text files that follow from the results."""
    readme = ROOT / "README.md"
    text = with_block(readme.read_text(), readme_block(found))
    files = {readme: with_block(text, gpu.readme_block(gpu.results()), gpu.BEGIN, gpu.END)}
    return {**files, **{RESULTS / f"{name}.md": page(name, one) for name, one in found.items()}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is out of date")
    parser.add_argument("--html", type=Path, default=ROOT / "build" / "benchmarks", help="folder of the HTML reports")
    arguments = parser.parse_args(argv)
    found = results()
    stale = [path for path, text in expected_files(found).items() if not path.is_file() or path.read_text() != text]
    if arguments.check:
        for path in stale:
            print(f"out of date: {path.relative_to(ROOT)}; run `python -m benchmarks.report`")
        return int(bool(stale))
    for path, text in expected_files(found).items():
        path.write_text(text)
    for name, one in found.items():
        images = draw(name, one, arguments.html / name)
        report.html_report(arguments.html / f"{name}.html", f"genai_kernels on {name}", sections(one, images))
        print(f"written: {arguments.html / name}.html and {len(images)} pictures")
    print(f"README and pages: {len(stale)} brought up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
