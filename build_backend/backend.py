"""Build backend: setuptools, compiled against the torch of the environment that will run the result.

A build front end isolates the build from the installed packages. Asking for torch as a build requirement there would
download the newest one, gigabytes, and compile against a torch that is not the one in use. So this asks the
interpreters of the environments that may have launched the build where their torch is, and puts that folder at the end
of sys.path. Only where none of them has one does the build ask for torch.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  every hook that is not overridden below

OLDEST_TORCH = (2, 10)
# Prints the version of torch, then the folders of installed packages: what a normal start of that interpreter sees.
QUESTION = """
import importlib.metadata, sys
if sys.version_info[:2] == ({}, {}):
    print(importlib.metadata.version("torch"), *(p for p in sys.path if p.endswith("-packages")), sep="\\n")
""".format(*sys.version_info[:2])


def launching_interpreters() -> list[str]:
    """Interpreters that may belong to the environment the build is for, the likeliest first."""
    found = [sys.executable]  # pip isolates with the target's own interpreter
    config = Path(sys.prefix, "pyvenv.cfg")  # `python -m build` makes a venv, which says what made it (Python >= 3.11)
    if config.is_file():
        for line in config.read_text().splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "command":
                found.append(value.split(" -m ")[0].strip())
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            found.append(os.path.join(os.environ[variable], "bin", "python"))
    return list(dict.fromkeys(found))


def torch_of(interpreter: str) -> tuple[str, list[str]] | None:
    """Version and folders of the torch that an interpreter has, of this Python version, or None."""
    # -E: without the variables by which pip hides the installed packages.
    command = [interpreter, "-E", "-c", QUESTION]
    try:
        answer = subprocess.run(command, cwd=os.path.dirname(interpreter), capture_output=True, text=True, check=False)
    except OSError:
        return None
    version, *folders = answer.stdout.splitlines() or [""]
    return (version, folders) if version else None


def find_torch() -> bool:
    """Makes torch importable if a launching environment has one that is new enough; says what was found."""
    for interpreter in launching_interpreters():
        found = torch_of(interpreter)
        if found is None:
            continue
        version, folders = found
        enough = tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TORCH
        say(f"torch {version} of {interpreter}: {'building against it' if enough else 'too old'}")
        if enough:
            sys.path += [f for f in folders if f not in sys.path]  # at the end: the isolated environment has precedence
            return True
    say(
        "no torch in the environment that this build is for: asking for torch>=2.10, a large download. "
        "If it has torch, use `pip install --no-build-isolation .` or `python -m build --no-isolation` instead."
    )
    return False


def say(text: str) -> None:
    print(f"genai_kernels: {text}", file=sys.stderr, flush=True)


REQUIREMENTS = [] if find_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return REQUIREMENTS


def get_requires_for_build_editable(config_settings=None):
    return REQUIREMENTS


def get_requires_for_build_sdist(config_settings=None):
    return []


def build_sdist(sdist_directory, config_settings=None):
    os.environ["GENAI_KERNELS_SDIST"] = "1"  # setup.py leaves the extension out, so that torch is not needed
    try:
        return build_meta.build_sdist(sdist_directory, config_settings)
    finally:
        del os.environ["GENAI_KERNELS_SDIST"]
