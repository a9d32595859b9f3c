"""The floors of the house: imports go downward only, never sideways, and nothing central lists the ops.

0  csrc/core, csrc/cpu, csrc/cuda           the compiler, intrinsics, CUDA headers
0  csrc/runtime                             the standard library; pybind11 in its binding; a library of its own
1  csrc/ops/<op>/<op>_cpu.cpp, <op>.cu      floor 0 and the room's own headers; nothing of std or torch in an ISA region
2  csrc/ops/<op>/<op>.cpp, csrc/host        torch's stable ABI, nothing else of torch
3  genai_kernels/ops/<op>                   registry, torch_ops, backends, accuracy, quantized; not another room
4  genai_kernels/{nn,optim,diffusion,kv_cache,integrations,cli}   ops through their public functions
5  python_models                            the public API only
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    if (ROOT / name).is_file()
) or sorted(p for p in ROOT.rglob("*") if p.is_file() and not {".venv", "build", "dist", ".git"} & set(p.parts))

SOURCES = [p for p in FILES if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}]
CPP = [p for p in SOURCES if p.suffix != ".py" and p.is_relative_to(ROOT / "csrc")]
ROOMS = sorted(p.name for p in (ROOT / "genai_kernels/ops").iterdir() if (p / "__init__.py").exists())


def public_names(room):
    """__all__ of a room, read without importing it."""
    for node in ast.parse((ROOT / "genai_kernels/ops" / room / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"genai_kernels/ops/{room}: expected __all__")


# but for the one that is also what the registry calls a declared call of any op
OPS = {*ROOMS, *(n for room in ROOMS for n in public_names(room))} - {"sample"}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
# The C functions that the stable ABI itself consists of: torch/csrc/stable includes this header everywhere.
STABLE = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/shim.h")


def name(path):
    return str(path.relative_to(ROOT))


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name)


def without_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def includes(path):
    return [m[2] for m in INCLUDE.finditer(path.read_text())]


def room(path):
    """The op a file belongs to, or None."""
    parts = path.relative_to(ROOT).parts
    return parts[2] if parts[:2] in {("csrc", "ops"), ("genai_kernels", "ops")} and len(parts) > 3 else None


def is_kernel(path):
    """Floors 0 and 1: what knows no torch."""
    below = path.relative_to(ROOT / "csrc").parts
    return below[0] in {"core", "cpu", "cuda"} or path.stem.endswith("_cpu") or path.suffix in {".cu", ".cuh"}


def imported(path):
    """Every dotted name that a Python file imports, relative ones resolved: `from .a import b` gives `package.a.b`."""
    package = list(path.relative_to(ROOT).parts[:-1])
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names += [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]
    return names


# ---- C++ ----


@each(CPP)
def test_includes_go_downward(path):
    below = path.relative_to(ROOT / "csrc").parts[0]
    floor_0 = {"core": ("core/",), "cpu": ("core/", "cpu/"), "cuda": ("core/", "cuda/"), "runtime": ("runtime/",)}
    allowed = floor_0.get(below, ("core/", "cpu/", "cuda/", "host/", f"ops/{room(path)}/"))
    ours = [i for i in includes(path) if (ROOT / "csrc" / i).exists()]
    assert [i for i in ours if not i.startswith(allowed)] == []
    foreign = [i for i in includes(path) if i not in ours and re.match(r"torch|ATen|c10|pybind11|Python\.h", i)]
    if below == "runtime":
        may = ("pybind11/",) if path.stem in {"binding", "python_values"} else ()
        assert [i for i in foreign if not i.startswith(may)] == [], "plain C++, so that any program can hold it"
    elif is_kernel(path):
        assert [i for i in ours if i.startswith("host/")] == []
        assert foreign == [], "kernels know no torch"
    elif name(path) != "csrc/module.cpp":
        may = (*STABLE, "Python.h") if path.stem == "direct_call" else STABLE  # that one looks into Python's tensors
        assert [i for i in foreign if not i.startswith(may)] == [], "only the stable ABI of torch"


REGION_FILES = [p for p in CPP if '#include "cpu/foreach_isa.h"' in without_comments(p.read_text())]


def region(path):
    """The text that is compiled once per instruction set, and the headers it includes with their texts."""
    text = without_comments(path.read_text())
    inside = re.search(r"#ifdef GENAI_KERNELS_ISA_NAME\n(.*?)\n#else", text, re.DOTALL)
    assert inside, "expected #ifdef GENAI_KERNELS_ISA_NAME ... #else ... #endif"
    todo, seen = [(name(path), inside[1])], {}
    while todo:
        where, text = todo.pop()
        if where in seen:
            continue
        seen[where] = text
        for bracket, header in INCLUDE.findall(text):
            assert bracket == '"', f"{where}: includes <{header}> inside the instruction-set region"
            todo.append((f"csrc/{header}", without_comments((ROOT / "csrc" / header).read_text())))
    return seen


@each(REGION_FILES)
def test_isa_regions_use_nothing_of_std(path):
    for where, text in region(path).items():
        assert re.findall(r"\b(?:std|torch|at|c10)::\w+", text) == [], where
        assert "#pragma once" not in text, (
            f"{where}: with an include guard, only the first instruction set would see it"
        )


def test_there_are_regions():
    assert "csrc/ops/rms_norm/rms_norm_cpu.cpp" in map(name, REGION_FILES)


# ---- Python ----

PYTHON = [p for p in SOURCES if p.suffix == ".py"]


def within(folder):
    return [p for p in PYTHON if p.is_relative_to(ROOT / folder)]


@each(within("genai_kernels"))
def test_package_does_not_import_what_stands_on_it(path):
    above = ("tests", "benchmarks", "python_models")
    assert [n for n in imported(path) if n.split(".")[0] in above] == []
    floor_4 = tuple(f"genai_kernels.{f}" for f in ("nn", "optim", "diffusion", "kv_cache", "integrations", "cli"))
    if not name(path).startswith(tuple(f.replace(".", "/") for f in floor_4)) and path.name != "__main__.py":
        assert [n for n in imported(path) if n.startswith(floor_4)] == []


@each([p for p in within("genai_kernels/ops") if room(p)])
def test_rooms_do_not_import_each_other(path):
    ours = [n for n in imported(path) if n.startswith("genai_kernels.")]
    may = (
        "registry",
        "torch_ops",
        "backends",
        "accuracy",
        "philox",
        "quantized",
        "rows",
        "triton_lib",
        f"ops.{room(path)}",
    )
    allowed = tuple(f"genai_kernels.{m}" for m in may)
    assert [n for n in ours if not n.startswith(allowed)] == []


@each(
    [p for f in ("nn", "optim", "diffusion", "kv_cache", "integrations", "cli") for p in within(f"genai_kernels/{f}")]
)
def test_upper_floors_use_public_functions(path):
    private = [n for n in imported(path) if re.match(r"genai_kernels\.ops\..*\._", n)]
    assert private == []


@each(within("python_models"))
def test_models_use_the_public_api_only(path):
    ours = [n for n in imported(path) if n.split(".")[0] == "genai_kernels"]
    banned = r"genai_kernels\.(_|registry|torch_ops|backends|accuracy|version)|.*\._"
    assert [n for n in ours if re.match(banned, n)] == []
    text = path.read_text()
    assert re.findall(r"\b(?:gk|genai_kernels)\.(?:_\w+|registry|torch_ops|backends|accuracy)\b", text) == []
    assert "import_module" not in text
    assert "ops.genai_kernels" not in text


CENTRAL = [
    *within("genai_kernels/cli"),
    *(ROOT / "genai_kernels").glob("*.py"),
    *(p for p in within("benchmarks") if p.name == "run.py"),
    *(ROOT / f for f in ("setup.py", "build_backend/backend.py", "tests/test_conformance.py", "tests/conftest.py")),
]


def words_of_code(path):
    """Identifiers, attributes and the words of strings; not docstrings and not comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value)


@each(CENTRAL)
def test_nothing_central_names_an_op(path):
    assert sorted(set(words_of_code(path)) & OPS) == []


@each([p for p in CPP if not room(p)])
def test_nothing_central_names_an_op_in_cpp(path):
    assert sorted(set(re.findall(r"\w+", without_comments(path.read_text()))) & OPS) == []


# ---- every file ----


@each(SOURCES)
def test_files_are_comfortable(path):
    lines = path.read_text().count("\n")
    assert lines <= 500, "over 500 lines: would you live in this room?"


def lines_with(pattern, paths):
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{name(path)}:{number}: {line.strip()}")
    return found


TEXTS = [
    p for p in FILES if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".sh", ".yaml", ""}
]


def test_no_native_flags():
    built = [p for p in TEXTS if p.name in {"setup.py", "Makefile", "pyproject.toml", "backend.py"} or p in CPP]
    assert lines_with(r"-m(arch|tune)=" + "native", built) == []


def test_no_paths_of_one_machine():
    assert lines_with(r"(^|[^\w./-])/(work|farm|tmp|opt|root|home)/[A-Za-z]", TEXTS) == []


def test_nothing_unfinished():
    product = [p for p in SOURCES if name(p).startswith(("csrc", "genai_kernels", "python_models", "benchmarks"))]
    assert lines_with(r"\b(TODO|FIXME|XXX|raise NotImplemented)\b", product) == []


@each(within("tests"))
def test_a_skip_says_why(path):
    """pytest.skip, mark.skip, mark.skipif and mark.xfail carry a text of at least three words."""
    tree = ast.parse(path.read_text())
    with_reason = [
        ast.dump(call.func)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and any(
            isinstance(n, ast.Constant | ast.JoinedStr) and len(ast.unparse(n).split()) >= 3 for n in ast.walk(call)
        )
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"skip", "skipif", "xfail"}:
            assert ast.dump(node) in with_reason, f"line {node.lineno}: {node.attr} without a reason"
