"""The packages as a stranger makes and installs them, each in an environment of its own.

No index is reachable here, only a folder with the build requirements: a build that wants torch, or anything else,
fails. The environments see the torch of the running one through links, as if it were installed in them.
"""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "genai_kernels/version.py").read_text())[1]
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
# For the Python it was built with, as _runtime is; _C.abi3.so in it would do for any.
WHEEL = f"genai_kernels-{VERSION}-{PYTHON}-{PYTHON}-linux_x86_64.whl"
RUNTIME = f"_runtime{sysconfig.get_config_var('EXT_SUFFIX')}"
TRY = """
import importlib.metadata, pathlib, torch, genai_kernels as gk
assert gk.__version__ == importlib.metadata.version("genai_kernels"), gk.__version__
assert f"version={gk.__version__}" in torch.ops.genai_kernels.build_info().splitlines()
x = torch.randn(8, 64, requires_grad=True)
gk.rms_norm(x).sum().backward()
assert torch.isfinite(x.grad).all()
from genai_kernels.kv_cache import BlockAllocator
blocks = BlockAllocator(num_blocks=2, block_size=4)
assert blocks.slot_mapping(blocks.allocate([1, 2, 3])).tolist() == [0, 1, 2]
print(pathlib.Path(gk.__file__).parent)
"""
pytestmark = pytest.mark.slow


class Environment:
    """A venv in which the packages of the running interpreter are linked, torch among them, but no build tool."""

    HIDDEN = ("setuptools", "pkg_resources", "_distutils_hack", "distutils", "ninja", "pybind11", "genai_kernels", "__")

    def __init__(self, folder, wheelhouse, torch=True):
        self.folder = folder
        subprocess.run(
            [sys._base_executable, "-m", "venv", "--without-pip", folder], check=True
        )  # pyvenv.cfg says what made it
        self.python = folder / "bin/python"
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(self.HIDDEN) and not (entry.name.startswith("torch") and not torch):
                (self.packages / entry.name).symlink_to(entry)
        # No index, no settings of this machine.
        self.variables = {
            "PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheelhouse),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            "GENAI_KERNELS_CUDA": "0",  # tests/test_cuda_library.py builds with CUDA, once
        }

    def run(self, *arguments, cwd=None, fails=False):
        """Runs this environment's Python; returns what it printed, both streams."""
        command = [str(self.python), *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stdout[-6000:]
        return done.stdout


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory):
    """The build requirements of pyproject.toml, at the pinned versions: all that a build may download."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    wanted = ["setuptools", "ninja", "pybind11", "-c", ROOT / "requirements/constraints.txt"]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *wanted], check=True)
    return folder


@pytest.fixture
def environment(tmp_path, wheelhouse):
    return Environment(tmp_path / "env", wheelhouse)


def copy_of_sources(folder):
    """The files that a fresh clone has."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def library_hash(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


# One instruction set of four, in a third of the time. `make` builds all of them from the same setup.py.
ONE_SET = "-DGENAI_KERNELS_BASELINE_ONLY"
WITH_ONE_SET = {"CPPFLAGS": ONE_SET, "GENAI_KERNELS_ISA": "baseline"}
HASHES = {}  # of _C.abi3.so and _runtime, by how they were built
FLAGS = {}  # of every source file, by the same


def flags_of(log):
    """{source file: the flags it was compiled with, but for those that name a folder}."""
    commands = [shlex.split(line) for line in re.findall(r"\[\d+/\d+\] (c\+\+ .*)", log)]
    sources = [next(word for word in words if word.endswith(".cpp")).partition("csrc/")[2] for words in commands]
    flags = [[word for word in words if word.startswith("-") and "/" not in word] for words in commands]
    return dict(zip(sources, flags, strict=True))


def expect_same_build(how, log, package):
    """Every way to build compiles the same files with the same flags; equal ones give the same bits, wherever the
    sources lie.
    """
    flags = flags_of(log)
    assert {"ops/rms_norm/rms_norm_cpu.cpp", "runtime/binding.cpp"} <= set(flags)
    assert all(ONE_SET in words for words in flags.values())
    FLAGS[how] = flags
    assert all(other == flags for other in FLAGS.values()), FLAGS
    HASHES[how] = library_hash(package / "_C.abi3.so"), library_hash(package / RUNTIME)
    assert len(set(HASHES.values())) == 1, HASHES


def test_pip_install_editable(environment, tmp_path):
    source = copy_of_sources(tmp_path / "source")
    environment.variables |= WITH_ONE_SET
    log = environment.run("-m", "pip", "install", "-v", "-e", source)
    assert "building against it" in log
    assert Path(environment.run("-c", TRY).split()[-1]) == source / "genai_kernels"
    assert Path(environment.run("-c", TRY, cwd=source).split()[-1]) == source / "genai_kernels"
    expect_same_build("pip install -e .", log, source / "genai_kernels")


def test_pip_install(environment, tmp_path):
    """`pip install .` in its two steps, the wheel and its installation; and the sdist, which has all that it needs."""
    source = copy_of_sources(tmp_path / "source")
    environment.variables |= WITH_ONE_SET
    environment.run("-m", "build", "--sdist", "--outdir", tmp_path / "dist", source)
    log = environment.run("-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", tmp_path / "dist", source)
    assert re.search(r"genai_kernels: torch \S+ of \S+/env/bin/python: building against it", log)
    assert "asking for torch" not in log
    sdist, wheel = sorted(tmp_path.glob("dist/*"), key=lambda p: p.suffix)
    assert [sdist.name, wheel.name] == [f"genai_kernels-{VERSION}.tar.gz", WHEEL]

    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    built_from = [
        p
        for p in source.rglob("*")
        if p.is_file() and p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".typed", ".pyi"}
    ]
    needed = {str(p.relative_to(source)) for p in built_from}
    needed = {n for n in needed if n.startswith(("csrc/", "build_backend/", "genai_kernels/", "setup.py"))}
    assert needed | {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= packed

    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
        archive.extract("genai_kernels/_C.abi3.so", tmp_path)
        archive.extract(f"genai_kernels/{RUNTIME}", tmp_path)
    assert {n for n in needed if n.startswith("genai_kernels/")} <= installed
    assert {n.partition("/")[0] for n in installed} == {"genai_kernels", f"genai_kernels-{VERSION}.dist-info"}
    library = tmp_path / "genai_kernels/_C.abi3.so"
    expect_same_build("pip install .", log, library.parent)
    undefined = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_" in undefined
    assert re.findall(r".*\b(?:at|c10)::.*", undefined) == []

    environment.run("-m", "pip", "install", wheel)
    assert Path(environment.run("-c", TRY).split()[-1]) == environment.packages / "genai_kernels"
    # Python started in the repository's root finds the source folder first, which has no library.
    said = environment.run("-c", "import genai_kernels", cwd=source, fails=True)
    assert "ImportError: genai_kernels was imported from" in said
    assert "run `pip install -e .`" in said


def test_without_torch(wheelhouse, tmp_path):
    """An isolated build asks for torch, one without isolation says so in a sentence, an sdist needs none."""
    source = copy_of_sources(tmp_path / "source")
    bare = Environment(tmp_path / "bare", wheelhouse, torch=False)
    bare.run("-m", "pip", "install", "setuptools", "ninja", "pybind11")
    ask = "import sys; sys.path.insert(0, 'build_backend'); import backend; print(backend.get_requires_for_build_{}())"
    assert "['torch>=2.10']" in bare.run("-c", ask.format("wheel"), cwd=source)
    assert bare.run("-c", ask.format("sdist"), cwd=source).splitlines()[-1] == "[]"
    said = bare.run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", source, fails=True)
    assert "the build needs torch>=2.10 in the environment: run `pip install torch`" in said
    assert "Successfully built" in bare.run("-m", "build", "--sdist", "--outdir", tmp_path / "dist", source)


def test_version_comes_from_one_place():
    texts = [p for p in ROOT.glob("*") if p.suffix in {".toml", ".py", ".in"}]
    assert [p.name for p in texts if re.search(rf'version\s*=\s*"{re.escape(VERSION)}"', p.read_text())] == []
