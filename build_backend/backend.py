"""Build backend: setuptools, compiled against the torch of the environment that will run the result.

A build front end isolates the build from the installed packages. Asking for torch as a build requirement there would
download the newest one, gigabytes, and compile against a torch that is not the one in use. But the build runs on the
interpreter of the target environment, so `sysconfig` still says where its packages are: if torch is among them, that
folder goes to the end of sys.path. Only where there is no torch at all does the build ask for one.
"""

import importlib.util
import os
import site
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  every hook that is not overridden below


def candidate_folders() -> list[str]:
    """Where the packages of the target environment may be, under an isolation that keeps its interpreter or not."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], site.getusersitepackages()]
    base = os.environ.get("VIRTUAL_ENV")  # `python -m build` makes an environment of its own; this names the active one
    if base:
        folders.append(sysconfig.get_path("purelib", vars={"base": base, "platbase": base}))
    return folders


def find_torch() -> str | None:
    """Makes torch importable if the target environment has it, and says from where."""
    if importlib.util.find_spec("torch"):
        return "importable already"
    for folder in candidate_folders():
        if os.path.isfile(os.path.join(folder, "torch", "__init__.py")):
            sys.path.append(folder)  # at the end: what the isolated environment provides keeps precedence
            return f"found in the target environment: {folder}"
    return None


TORCH = find_torch()
print(f"torch for this build: {TORCH or 'none yet, asking for torch>=2.10'}", file=sys.stderr, flush=True)
REQUIREMENTS = [] if TORCH else ["torch>=2.10"]


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
