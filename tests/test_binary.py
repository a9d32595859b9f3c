"""What the compiled libraries may contain: the stable ABI only, and no wide instruction outside its own namespace."""

import platform
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from abi3info import DATAS, FUNCTIONS
from abi3info.models import PyVersion, Symbol

import genai_kernels
import genai_kernels._runtime

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(genai_kernels._C.__file__)
RUNTIME = Path(genai_kernels._runtime.__file__)
SOURCES = sorted((ROOT / "csrc").rglob("*.cpp"))
KERNELS = [p for p in SOURCES if '\n#include "cpu/foreach_isa.h"' in p.read_text()]
ALLOWED = re.compile(
    r"mem(cpy|move|set|cmp)|(exp2?|log(1p)?|pow|erfc?|tanh|sin|cos|sincos|sqrt|fma|l?round|rint|ldexp|floor)f?|__\w+|_GLOBAL\w+"
)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def name(path):
    return str(path.relative_to(ROOT))


def object_of(source):
    """The newest object file made from a source by an in-place build."""
    found = sorted(
        (ROOT / "build").glob(f"temp.*/{source.relative_to(ROOT).with_suffix('.o')}"), key=lambda p: p.stat().st_mtime
    )
    assert found, f"no object of {name(source)} under build/: run `make dev` first"
    return str(found[-1])


def test_name_and_exports():
    assert LIBRARY.name == "_C.abi3.so"
    exported = re.findall(r" T (.*)", run("nm", "-D", "--defined-only", str(LIBRARY)))
    assert exported == ["PyInit__C"]


def test_the_runtime_knows_no_torch():
    """The block allocator: a module for one version of Python, of the C++ library and Python alone."""
    assert RUNTIME.name == f"_runtime{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert re.findall(r" T (.*)", run("nm", "-D", "--defined-only", str(RUNTIME))) == ["PyInit__runtime"]
    needed = re.findall(r"\(NEEDED\).*\[(\w+)", run("readelf", "-d", str(RUNTIME)))
    assert set(needed) <= {"libstdc", "libm", "libgcc_s", "libc", "libpthread", "ld"}
    assert re.findall(r".*\b(?:at|c10|torch)::.*", run("nm", "-DC", str(RUNTIME))) == []


def test_only_stable_symbols_of_torch():
    undefined = run("nm", "-DC", "--undefined-only", str(LIBRARY))
    assert re.findall(r".*\b(?:at|c10|torch)::.*", undefined) == []
    assert "aoti_torch_" in undefined  # that is: the list is not empty for another reason


def test_python_symbols_are_of_the_limited_api():
    undefined = set(re.findall(r"\b_?Py\w+", run("nm", "-D", "--undefined-only", str(LIBRARY))))
    assert "PyModule_Create2" in undefined
    limited = {**FUNCTIONS, **DATAS}
    since = {name: limited[Symbol(name)].added if Symbol(name) in limited else None for name in undefined}
    assert {name: version for name, version in since.items() if version is None or version > PyVersion(3, 10)} == {}


def test_no_path_of_the_build_machine():
    for library in (LIBRARY, RUNTIME):
        binary = library.read_bytes()
        for folder in (ROOT, Path(torch.__file__).parent):
            assert str(folder).encode() not in binary


@pytest.mark.parametrize("source", KERNELS, ids=name)
def test_kernels_define_no_weak_symbol(source):
    """Weak means: an inline function of a header, compiled inside a region; the linker may keep that copy for all."""
    symbols = run("nm", "-C", "--defined-only", object_of(source)).splitlines()
    assert [s for s in symbols if re.search(r" [WVuvw] ", s)] == []


@pytest.mark.parametrize("source", KERNELS, ids=name)
def test_kernels_need_only_the_c_library(source):
    undefined = re.findall(r" U (.*)", run("nm", "-C", "--undefined-only", object_of(source)))
    assert [u for u in undefined if not u.startswith("genai_kernels::") and not ALLOWED.fullmatch(u)] == []


FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks at x86-64 instructions")
@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_wide_instructions_stay_in_their_namespace(source):
    """zmm registers only under ::avx512*, AVX encodings only under ::avx*, plain code everywhere else."""
    function, bad, wide = "", set(), 0
    for line in run("objdump", "-d", "-C", "--no-show-raw-insn", object_of(source)).splitlines():
        if match := FUNCTION.match(line):
            function = match[1]
            continue
        _, _, instruction = line.partition("\t")
        if instruction.startswith(("v", "{")) or "%ymm" in instruction or "%zmm" in instruction:
            wide += 1
            allowed = "::avx512" in function if "%zmm" in instruction else "::avx" in function
            if not allowed and not instruction.startswith(("verr", "verw")):
                bad.add(function)
    assert sorted(bad) == []
    if source in KERNELS:
        assert wide > 0
