"""One command for a GPU machine: is it right, how fast is it, and why not faster.

    python -m benchmarks.device_run [--minutes 9] [--out FOLDER]    on a machine with torch, Triton and nvcc; no network
    python -m benchmarks.device_run --dry-run                       the same on the CPU, with tiny shapes
    python -m benchmarks.device_run --finish FOLDER                 enter what a run has brought back

The library with its CUDA kernels and the smoke program are built beforehand, elsewhere, and come along
(`make device-artefacts`). Every stage is a process of its own with a limit of its own, and appends to FOLDER/log.jsonl,
so that a run that is cut keeps what it has:

    fingerprint, ceilings   the card; a copy and a bf16 product
    correct                 every op, backend and sample against float64; what fails here is not timed
    sanitize                compute-sanitizer's four tools on the smoke program, which has no torch in it
    time                    ours, SDPA's backends, FlexAttention, torch.compile, Liger: CUDA graphs over rotating inputs
    profile                 Nsight Compute's counters of the main kernels
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .device.log import Log, Record

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "build/smoke"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
DRY_OPS = {"flash_attention", "linear", "rms_norm"}  # what a dry run takes through its stages
# Shares of the time: what a stage leaves over goes to the next.
SHARES = {"machine": 0.06, "correct": 0.30, "sanitize": 0.12, "time": 0.40, "profile": 0.12}


class Run:
    """The stages in order, against one clock."""

    def __init__(self, folder: Path, device: str, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device, self.log = folder, device, Log(folder / "log.jsonl")
        self.begin, self.seconds = time.monotonic(), 60 * minutes

    def left_for(self, stage: str) -> float:
        """Seconds until this stage should end."""
        names = list(SHARES)
        share = sum(SHARES[n] for n in names[: names.index(stage) + 1])
        return self.begin + share * self.seconds - time.monotonic()

    def child(self, stage: str, *arguments: str, limit: float) -> bool:
        """Runs a stage in a process of its own; False, and a record of why, if it did not end well."""
        command = [sys.executable, "-m", "benchmarks.device.stage", stage, str(self.log.path), self.device, *arguments]
        try:
            result = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=max(limit, 1), check=False
            )
        except subprocess.TimeoutExpired:
            self.log.add("failed", what=stage, arguments=arguments, why=f"took longer than {limit:.0f} s")
            return False
        if result.returncode:
            self.log.add("failed", what=stage, arguments=arguments, why=(result.stdout + result.stderr)[-600:])
        return result.returncode == 0

    def machine(self) -> None:
        self.child("fingerprint", limit=60)
        self.child("ceilings", limit=60)

    def correct(self) -> None:
        """A process for each op and backend, some at a time: they wait for Python more than for the card."""
        from genai_kernels.registry import OPS

        wanted = set(OPS) if self.device == "cuda" else DRY_OPS
        costly = sorted(wanted, key=lambda name: "attention" not in name)
        on_cpu = self.device != "cuda"
        work = [(op, b) for op in costly for b in self.backends() if on_cpu or b in OPS[op].gpu]
        with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
            list(pool.map(lambda w: self.child("correct", *w, limit=self.left_for("correct")), work))

    def backends(self) -> list[str]:
        from genai_kernels import backends

        return backends.kernels_on(self.device)

    def passed(self) -> dict[str, list[str]]:
        """backend -> the ops all of whose samples have kept the rule, in every dtype."""
        by: dict[tuple[str, str], list[Record]] = {}
        for r in self.log.read("correct"):
            by.setdefault((r["backend"], r["op"]), []).append(r)
        good: dict[str, list[str]] = {}
        for (backend, op), records in by.items():
            if len({r["dtype"] for r in records}) == 3 and not any(r["failures"] for r in records):
                good.setdefault(backend, []).append(op)
        return good

    def sanitize(self) -> None:
        tool = shutil.which("compute-sanitizer")
        if tool is None or not SMOKE.exists() or self.device != "cuda":
            why = "no compute-sanitizer" if tool is None else "no smoke program" if not SMOKE.exists() else "a dry run"
            self.log.add("sanitize", skipped=why)
            return
        for i, name in enumerate(TOOLS):
            limit = self.left_for("sanitize") / (len(TOOLS) - i)
            command = [tool, f"--tool={name}", "--error-exitcode=9", str(SMOKE)]
            try:
                result = subprocess.run(command, capture_output=True, text=True, timeout=max(limit, 5), check=False)
            except subprocess.TimeoutExpired:
                self.log.add("sanitize", tool=name, skipped=f"took longer than {limit:.0f} s")
                continue
            tail = "\n".join((result.stdout + result.stderr).splitlines()[-12:])
            self.log.add("sanitize", tool=name, ok=result.returncode == 0, tail=tail)

    def time(self) -> None:
        from .device.cases import cases

        good = self.passed()
        for i, case in enumerate(cases(self.device == "cpu")):
            if self.device == "cpu" and case.op not in DRY_OPS:
                continue
            if self.left_for("time") < 8:
                self.log.add("failed", what="time", why=f"time was up before case {i}, {case.op} {case.name}")
                return
            ours = [backend for backend in self.backends() if case.op in good.get(backend, [])]
            self.child("time", str(i), ",".join(ours), limit=min(60, self.left_for("time")))

    def profile(self) -> None:
        from .device.cases import cases
        from .device.profile import profile

        if self.device != "cuda":
            self.log.add("profile", skipped="a dry run")
            return
        good = self.passed()
        for i, case in list(enumerate(cases()))[:7]:
            for backend in self.backends():
                if case.op in good.get(backend, []) and self.left_for("profile") > 10:
                    profile(self.log, i, backend, self.left_for("profile"))


def table(log: Log) -> list[str]:
    """A few lines for people: a run's last words."""
    lines = []
    for r in log.read("fingerprint"):
        lines.append(f"{r['name']}, compute capability {r['capability']}, library {r['library'].get('cuda')}")
    for r in log.read("ceilings"):
        lines.append(f"copy {r['copy_tb_s']:.3g} TB/s, bf16 product {r['bf16_tflop_s']:.4g} TFLOP/s")
    for r in log.read("correct"):
        verdict = f"FAILED {len(r['failures'])}: {r['failures'][0][:150]}" if r["failures"] else "ok"
        lines.append(f"correct {r['backend']:7} {r['op']:24} {r['dtype']:9} {r['samples']:3} samples: {verdict}")
    for r in log.read("sanitize"):
        lines.append(
            f"sanitize {r.get('tool', '')}: {r.get('skipped') or ('ok' if r['ok'] else 'FAILED ' + r['tail'][-300:])}"
        )
    for r in log.read("time"):
        rate = (lambda ms, r=r: r["flops"] / ms / 1e9) if r["flops"] else (lambda ms, r=r: r["bytes"] / ms / 1e6)
        parts = [f"{n} {t['ms']:.4g} ms ({rate(t['ms']):.4g})" for n, t in r["timings"].items()]
        what = f"{r['op']} {r['name']} {'backward' if r['backward'] else 'forward'}"
        lines.append(f"{what}: {', '.join(parts)}" + "".join(f"; {n}: {w}" for n, w in r["failed"].items()))
    for r in log.read("profile"):
        for kernel, values in r.get("kernels", {}).items():
            lines.append(f"{kernel[:60]}: {', '.join(f'{k} {v:.4g}' for k, v in values.items())}")
    lines += [f"{r['what']} {r.get('arguments', '')}: {r['why'][-300:]}" for r in log.read("failed")]
    return lines


def finish(folder: Path) -> Path:
    """Writes benchmarks/results/gpu/<card>.json from a run's log, and enters what it has proven."""
    from . import proven

    log = Log(folder / "log.jsonl")
    (machine,) = log.read("fingerprint")[-1:]
    run = Run(folder, "cuda", 1)
    proven.accept(machine["capability"], run.passed())
    name = "".join(c if c.isalnum() else "-" for c in machine["name"].lower())
    target = ROOT / "benchmarks/results/gpu" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"records": log.read()}, indent=1) + "\n")
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--stages", default=",".join(SHARES), help=f"of {', '.join(SHARES)}")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--finish", type=Path, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    if arguments.finish:
        print(finish(arguments.finish))
        return 0
    stages = arguments.stages.split(",")
    if unknown := set(stages) - set(SHARES):
        parser.error(f"--stages: expected some of {', '.join(SHARES)}, got {', '.join(sorted(unknown))}")
    folder = arguments.out or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="device_run_"))
    run = Run(folder, "cpu" if arguments.dry_run else "cuda", arguments.minutes)
    for stage in stages:
        try:
            getattr(run, stage)()
        except Exception as error:  # the next stage may still run
            run.log.add("failed", what=stage, why=f"{type(error).__name__}: {error}")
    lines = table(run.log)
    (folder / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {run.log.path}")
    wrong = [r for r in run.log.read("correct") if r["failures"]]
    return int(bool(wrong or run.log.read("failed")))


if __name__ == "__main__":
    sys.exit(main())
