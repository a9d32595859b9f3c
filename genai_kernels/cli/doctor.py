"""What is installed, which instruction set runs and why, what is missing and the command that mends it.

Exit code 0 if the kernels run here, 1 if not. Works with a missing or broken library, and without rich.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from .. import load_error
from ..version import __version__
from .console import HAS_RICH, print_table, say

OK, NOTE, BROKEN = "ok", "note", "BROKEN"
PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report: BROKEN means that the kernels cannot run, NOTE that something could be better."""

    name: str
    status: str
    text: str
    mend: str = ""  # the exact command, where there is one


@dataclasses.dataclass(frozen=True)
class Variable:
    """An environment variable that changes what happens here."""

    name: str
    effective: str
    origin: str
    meaning: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _install_command() -> str:
    root = PACKAGE.parent
    if (root / "setup.py").is_file():  # a checkout
        return f"{shlex.quote(sys.executable)} -m pip install -e {shlex.quote(str(root))}"
    source = "genai_kernels"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        # where pip installed it from, if that was a folder, a file or a repository
        direct = importlib.metadata.distribution("genai_kernels").read_text("direct_url.json")
        source = json.loads(direct)["url"] if direct else source
    return f"{shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps --no-cache-dir {source}"


def _pip(requirement: str) -> str:
    return f'{shlex.quote(sys.executable)} -m pip install "{requirement}"'


def check_torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", BROKEN, f"cannot be imported: {error}", _pip("torch>=2.10"))
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if release < (2, 10):
        return Finding("torch", BROKEN, f"{torch.__version__}, expected 2.10 or newer", _pip("torch>=2.10"))
    return Finding("torch", OK, f"{torch.__version__} in {Path(torch.__file__).parent}")


def check_library() -> Finding:
    if load_error is not None:
        return Finding("library", BROKEN, str(load_error), _install_command())
    import torch

    info = dict(line.split("=", 1) for line in torch.ops.genai_kernels.build_info().split("\n") if line)
    text = ", ".join(f"{key} {value}" for key, value in info.items())
    if info.get("version") != __version__:
        text = f"built from version {info.get('version')}, but the Python files are {__version__}"
        return Finding("library", BROKEN, text, _install_command())
    return Finding("library", OK, text)


def check_isa() -> list[Finding]:
    import torch

    kernels = torch.ops.genai_kernels
    table = ", ".join(line.replace("=", " ") for line in kernels.isa_table().split())
    try:
        return [
            Finding("instruction set", OK, f"{kernels.isa()}: {kernels.isa_reason()}"),
            Finding("this CPU has", OK, table),
        ]
    except (ValueError, RuntimeError) as error:
        return [
            Finding("instruction set", BROKEN, str(error).splitlines()[0], "unset GENAI_KERNELS_ISA"),
            Finding("this CPU has", OK, table),
        ]


def check_ops() -> Finding:
    """Every op on its first sample, against float64: the library does not only load, it computes."""
    import torch

    from ..accuracy import verify_sample
    from ..registry import OPS

    wrong = []
    for op in OPS.values():
        try:
            verdicts = verify_sample(op, op.samples[0], torch.float32)
            wrong += [f"{op.name}: {v.complaint}" for v in verdicts if not v.ok][:1]
        except Exception as error:  # a report must not end at the first thing it reports
            wrong.append(f"{op.name}: {type(error).__name__}: {error}".splitlines()[0])
    if wrong:
        return Finding("ops", BROKEN, "; ".join(wrong), f"{shlex.quote(sys.executable)} -m genai_kernels verify")
    return Finding("ops", OK, f"{len(OPS)} agree with float64 on a sample: {', '.join(sorted(OPS))}")


def check_gpu() -> list[Finding]:
    """What the library carries for GPUs, whether one is here, and which of its kernels have been proven on a card."""
    import torch

    from .. import backends, triton_lib
    from ..registry import OPS

    info = dict(line.split("=", 1) for line in torch.ops.genai_kernels.build_info().split("\n") if line)
    if backends.built_with_cuda():
        findings = [Finding("CUDA kernels", OK, f"built for {info['cuda']}")]
    else:
        findings = [Finding("CUDA kernels", OK, "none in this build: GENAI_KERNELS_CUDA=1 and nvcc >= 12.4 build them")]
    cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if cards:
        names = [f"{torch.cuda.get_device_name(i)} ({c[0]}.{c[1]})" for i, c in enumerate(cards)]
        findings.append(Finding("CUDA devices", OK, ", ".join(names)))
    else:
        findings.append(Finding("CUDA devices", OK, "none: the CPU kernels serve"))
    reason = triton_lib.why_not()
    if reason and cards:
        findings.append(Finding("Triton kernels", NOTE, reason, _pip("triton")))
    else:
        findings.append(Finding("Triton kernels", OK, reason or f"triton {importlib.metadata.version('triton')}"))
    for backend in ("cuda", "triton"):
        known = {op: backends.proven().get(backend, {}).get(op, []) for op in sorted(OPS)}
        parts = [f"{op} {'on ' + ' and '.join(on) if on else 'unproven'}" for op, on in known.items()]
        text = ", ".join(parts) if any(known.values()) else f"unproven, all {len(known)}: none has run on a card yet"
        served = [backends.on_cuda(op, cards[0], torch.bfloat16, None).backend for op in known] if cards else []
        status = NOTE if "reference" in served else OK
        findings.append(Finding(f"{backend} on a card", status, text))
    return findings


def check_threads() -> Finding:
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    text = f"{threads} used, {cores} cores for this process"
    if threads > cores:
        return Finding("threads", NOTE, f"{text}: they wait for each other", f"export OMP_NUM_THREADS={cores}")
    if threads < cores:
        return Finding("threads", NOTE, f"{text}: the others idle", f"export OMP_NUM_THREADS={cores}")
    return Finding("threads", OK, text)


def openmp_libraries(process_map: str) -> list[str]:
    """The OpenMP runtimes in the text of /proc/<pid>/maps."""
    paths = {line.split(maxsplit=5)[-1] for line in process_map.splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(p for p in paths if re.match(r"lib(g|i|)omp\d*[-.]", Path(p).name))


def check_openmp() -> Finding:
    try:
        found = openmp_libraries(Path("/proc/self/maps").read_text())
    except OSError as error:
        return Finding("OpenMP", NOTE, f"the process map cannot be read: {error}")
    if len(found) > 1:
        mend = "unset LD_PRELOAD" if "omp" in os.environ.get("LD_PRELOAD", "") else _install_command()
        return Finding("OpenMP", NOTE, f"{len(found)} runtimes, two pools of threads: {', '.join(found)}", mend)
    return Finding("OpenMP", OK, f"one runtime: {found[0]}" if found else "none in this process")


def check_packages() -> list[Finding]:
    findings = []
    for name, use in (("rich", "tables and progress bars"), ("matplotlib", "plots and the HTML report")):
        try:
            importlib.import_module(name)
            findings.append(Finding(name, OK, f"{importlib.metadata.version(name)}, {use}"))
        except ImportError:
            findings.append(Finding(name, NOTE, f"not installed: {use}", _pip("genai_kernels[cli]")))
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
    use = "builds this library and serves torch.compile"
    if compiler:
        findings.append(Finding("C++ compiler", OK, f"{compiler}, {use}"))
    else:
        findings.append(Finding("C++ compiler", NOTE, f"not found: it {use}", "sudo apt-get install g++"))
    return findings


def variables() -> list[Variable]:
    """The environment variables that matter here, with the value in effect and where it comes from."""
    try:
        import torch

        threads = str(torch.get_num_threads())
        isa = torch.ops.genai_kernels.isa()
    except (ImportError, AttributeError):
        threads, isa = locals().get("threads", "-"), "-"
    except (ValueError, RuntimeError):
        isa = "refused"
    jobs = f"{len(os.sched_getaffinity(0))} or fewer"
    known: list[tuple[str, Callable[[str | None], str], str]] = [
        ("GENAI_KERNELS_ISA", lambda _: isa, "forces an instruction set of the CPU kernels"),
        ("OMP_NUM_THREADS", lambda _: threads, "threads of torch, and so of these kernels"),
        ("MKL_NUM_THREADS", lambda v: v or threads, "threads of torch's matrix products"),
        ("LD_PRELOAD", lambda v: v or "-", "loaded before everything else"),
        ("GENAI_KERNELS_CUDA", lambda v: v or "auto", "build: 0 leaves the CUDA kernels out, 1 insists on them"),
        ("TRITON_INTERPRET", lambda v: v or "0", "1 runs Triton kernels on the CPU, slowly"),
        ("GENAI_KERNELS_DEBUG", lambda v: v or "0", "build: 1 compiles with assertions"),
        ("MAX_JOBS", lambda v: v or jobs, "build: files compiled at a time"),
    ]
    found = []
    for name, effective, meaning in known:
        value = os.environ.get(name)
        found.append(Variable(name, effective(value), "default" if value is None else f"set to {value!r}", meaning))
    names = {v.name for v in found}
    for name in sorted(os.environ):
        if name.startswith("GENAI_KERNELS_") and name not in names:
            found.append(Variable(name, "-", f"set to {os.environ[name]!r}", "read by nothing: a misspelling?"))
    return found


def examine() -> list[Finding]:
    """Everything the doctor looks at, in order."""
    findings = [
        Finding("genai_kernels", OK, f"{__version__} in {PACKAGE}"),
        Finding("python", OK, f"{sys.version.split()[0]}, {sys.executable}"),
        check_torch(),
    ]
    if all(f.status != BROKEN for f in findings):
        findings.append(check_library())
    if all(f.status != BROKEN for f in findings):
        isa = check_isa()
        findings += isa
        if all(f.status != BROKEN for f in isa):
            findings.append(check_ops())
        findings += [check_threads(), check_openmp(), *check_gpu()]
    return findings + check_packages()


def verdict(findings: list[Finding]) -> str:
    """The one line at the end."""
    broken = [f for f in findings if f.status == BROKEN]
    if broken:
        return f"verdict: BROKEN: {broken[0].name}: {broken[0].text}" + (
            f"; run: {broken[0].mend}" if broken[0].mend else ""
        )
    notes = sum(f.status == NOTE for f in findings)
    isa = next(f.text.split(":")[0] for f in findings if f.name == "instruction set")
    return f"verdict: ready, {isa}" + (f"; {notes} thing{'s' * (notes > 1)} could be better, see above" * (notes > 0))


def run(arguments: argparse.Namespace) -> int:
    findings, environment = examine(), variables()
    broken = any(f.status == BROKEN for f in findings)
    if arguments.json:
        report = {
            "ready": not broken,
            "verdict": verdict(findings),
            "findings": [dataclasses.asdict(f) for f in findings],
            "environment": [dataclasses.asdict(v) for v in environment],
        }
        print(json.dumps(report, indent=1))
        return int(broken)
    print_table(
        "doctor",
        ("", "status", "found"),
        [(f.name, f.status, f.text) for f in findings],
        styles=[{NOTE: "yellow", BROKEN: "bold red"}.get(f.status) for f in findings],
    )
    print_table("environment", ("variable", "in effect", "origin", "what it does"), [
        (v.name, v.effective, v.origin, v.meaning) for v in environment
    ])  # fmt: skip
    for finding in findings:
        if finding.status != OK and finding.mend:
            say(f"{finding.name}: {finding.mend}", "yellow")
    if not HAS_RICH:
        say(f"(plain text: rich is not installed; {_pip('genai_kernels[cli]')})")
    say(verdict(findings), "bold red" if broken else "bold green")
    return int(broken)
