"""Fused kernels for generative AI: one semantics on every backend, forward and backward, first-class on a CPU."""

import importlib as _importlib
import pathlib as _pathlib
import pkgutil as _pkgutil

import torch as _torch  # noqa: F401  before _C: loads libtorch, which _C is linked against

from .version import __version__

_HERE = _pathlib.Path(__file__).resolve().parent
if not list(_HERE.glob("_C*.so")):
    raise ImportError(
        f"genai_kernels was imported from {_HERE}, a source folder without its compiled library: "
        "run `pip install -e .` in the folder above it, or start Python in another folder to use the installed package"
    )

_C = _importlib.import_module(f"{__name__}._C")  # loading it registers torch.ops.genai_kernels

from . import ops as _ops  # noqa: E402
from .backends import use_backend  # noqa: E402

__all__ = ["__version__", "use_backend"]

# Every room of genai_kernels/ops exports its public functions by __all__; nothing here names them.
for _room in _pkgutil.iter_modules(_ops.__path__):
    _module = _importlib.import_module(f"{__name__}.ops.{_room.name}")
    for _name in _module.__all__:
        globals()[_name] = getattr(_module, _name)
        __all__ += [_name]
__all__.sort()
