"""Fused kernels for generative AI: one semantics on every backend, forward and backward, first-class on a CPU."""

import importlib as _importlib
import itertools as _itertools
import pathlib as _pathlib
import pkgutil as _pkgutil
import sys as _sys

from .version import __version__

_HERE = _pathlib.Path(__file__).resolve().parent


def _is_own_command() -> bool:
    """True in `python -m genai_kernels ...` and in `genai-kernels ...`, which report a broken library."""
    after_m = [b for a, b in _itertools.pairwise(_sys.orig_argv) if a == "-m"][:1]
    return after_m == [__name__] or _pathlib.Path(_sys.argv[0]).name == "genai-kernels"


def _load_library() -> None:
    import torch  # noqa: F401  before _C: loads libtorch, which _C is linked against

    if not list(_HERE.glob("_C*.so")):
        raise ImportError(
            f"genai_kernels was imported from {_HERE}, a source folder without its compiled library: "
            "run `pip install -e .` in the folder above it, or start Python in another folder to use the installed one"
        )
    _importlib.import_module("._C", __name__)  # loading it registers torch.ops.genai_kernels


__all__ = ["__version__"]

# Why the kernels are not there. Seen only by the commands of genai_kernels.cli: everywhere else it is raised.
load_error: ImportError | None = None
try:
    _load_library()
except ImportError as _error:
    if not _is_own_command():
        raise
    load_error = _error

if load_error is None:
    from . import ops as _ops
    from .backends import fallbacks, use_backend
    from .call_path import explain

    __all__ += ["explain", "fallbacks", "use_backend"]

    # Every room of genai_kernels/ops exports its public functions by __all__; nothing here names them.
    for _room in _pkgutil.iter_modules(_ops.__path__):
        _module = _importlib.import_module(f"{__name__}.ops.{_room.name}")
        for _name in _module.__all__:
            globals()[_name] = getattr(_module, _name)
            __all__ += [_name]
    __all__.sort()
