"""Which implementation serves a call, why, and what was served by another than its kernel.

CPU tensors go to the C++ kernels. CUDA tensors go to the first of CUDA C++, Triton and PyTorch that is there, has code
for the card and the dtype, and has been proven on such a card: genai_kernels/proven.json lists what a run of
benchmarks/device_run.py has proven. PyTorch, the reference that stands beside each op, is then a fallback: counted,
reported once when the process ends, and an error under `use_backend(..., strict=True)`.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

# What `use_backend` forces, process-wide, or None. Read on every call, hence plain module variables.
forced: str | None = None
strict = False

NAMES = ("auto", "cpu", "cuda", "triton", "reference")
# Compute capabilities that the CUDA C++ kernels have code for: machine code of sm_80 and sm_90a (setup.py).
CUDA_FROM, CUDA_TO = (8, 0), (9, 0)
TRITON_FROM = (8, 0)  # before it Triton has no bfloat16 products


@contextlib.contextmanager
def use_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Forces one implementation of every op inside the block, for the whole process.

    Args:
        name: `"reference"`, the plain PyTorch composition that stands beside each op: the eager twin of any model;
            `"cpu"`, the C++ kernels; `"cuda"`, the CUDA C++ kernels, proven on a card like this one or not;
            `"triton"`, the Triton kernels, on CUDA tensors, or on the CPU in Triton's interpreter where
            TRITON_INTERPRET=1 was set before; `"auto"`, what is chosen without this.
        strict: with `"auto"`, a call that would fall back to PyTorch is a NotImplementedError that says why. Forced
            backends never fall back.

    Raises:
        ValueError: an unknown name.
        ImportError: the backend cannot run here; the text says what is missing.

    >>> import torch, genai_kernels as gk
    >>> with gk.use_backend("reference"):
    ...     gk.rms_norm(torch.ones(1, 4)).shape
    torch.Size([1, 4])
    """
    global forced
    if name not in NAMES:
        raise ValueError(f"genai_kernels.use_backend: name: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "cuda" and not built_with_cuda():
        raise ImportError(
            "genai_kernels.use_backend: cuda: expected a library with CUDA kernels, got one built without; "
            "install a CUDA toolkit >= 12.4 and build it again with GENAI_KERNELS_CUDA=1"
        )
    if name == "triton":
        from . import triton_lib

        triton_lib.load()
    module = sys.modules[__name__]
    before = forced, module.strict  # type: ignore[attr-defined]
    forced, module.strict = None if name == "auto" else name, strict  # type: ignore[attr-defined]
    try:
        yield
    finally:
        forced, module.strict = before  # type: ignore[attr-defined]


@functools.cache
def built_with_cuda() -> bool:
    """True if the library carries CUDA C++ kernels."""
    return "\ncuda=0" not in torch.ops.genai_kernels.build_info()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# ---- what has been proven ----

PROVEN = Path(__file__).with_name("proven.json")


@functools.cache
def proven() -> dict[str, dict[str, list[str]]]:
    """backend -> op -> compute capabilities on which every sample of the op has kept the accuracy rule."""
    found: dict[str, dict[str, list[str]]] = json.loads(PROVEN.read_text())["proven"]
    return found


def is_proven(backend: str, op: str, capability: tuple[int, int]) -> bool:
    return f"{capability[0]}.{capability[1]}" in proven().get(backend, {}).get(op, [])


# ---- the choice ----


@dataclass(frozen=True)
class Choice:
    """What serves a call."""

    backend: str  # "cpu", "cuda", "triton", "reference", or "none" where nothing does
    why: str
    rejected: dict[str, str] = field(default_factory=dict)  # backend -> why it is not this one

    @property
    def falls_back(self) -> bool:
        """True if PyTorch serves what a kernel should."""
        return self.backend == "reference" and bool(self.rejected)


def _is_written(backend: str, op: str) -> bool:
    """True if the op declares a kernel for this backend."""
    from .registry import OPS

    return op not in OPS or backend in OPS[op].gpu


def _dtypes(op: str) -> tuple[torch.dtype, ...]:
    """Of an op's first tensor, that its kernels on the GPU take."""
    from .registry import FLOATS, OPS

    return OPS[op].gpu_dtypes if op in OPS else FLOATS


def _why_no_kernel(backend: str, op: str, capability: tuple[int, int], dtype: torch.dtype) -> str:
    """Why a kernel on the GPU cannot serve; empty if it can. Whether it is proven is another question."""
    card = f"{capability[0]}.{capability[1]}"
    if not _is_written(backend, op):
        return f"it has no kernel in {'CUDA C++' if backend == 'cuda' else 'Triton'}"
    if dtype not in (taken := _dtypes(op)):
        names = [str(t).removeprefix("torch.") for t in (*taken, dtype)]
        return f"its kernels take {', '.join(names[:-2])} and {names[-2]}, not {names[-1]}"
    if backend == "cuda":
        if not built_with_cuda():
            return "this library was built without CUDA kernels"
        if not CUDA_FROM <= capability <= CUDA_TO:
            return f"its machine code is for compute capabilities 8.0 to 9.0, this card has {card}"
        return ""
    if not has_triton():
        return "triton is not installed; pip install triton"
    if capability < TRITON_FROM:
        return f"it needs compute capability 8.0, this card has {card}"
    return ""


@functools.cache
def on_cuda(op: str, capability: tuple[int, int], dtype: torch.dtype, by: str | None) -> Choice:
    """The choice for CUDA tensors; `by`: what `use_backend` forces."""
    kernels = ("cuda", "triton")
    if by == "reference":
        return Choice("reference", 'forced by use_backend("reference"): the plain PyTorch composition')
    if by == "cpu":
        return Choice("none", 'use_backend("cpu") forces the CPU kernels, and the arguments are on cuda')
    reasons = {name: _why_no_kernel(name, op, capability, dtype) for name in kernels}
    if by in kernels:
        if reasons[by]:
            return Choice("none", f'forced by use_backend("{by}"), but {reasons[by]}')
        return Choice(by, f'forced by use_backend("{by}")')
    for name in kernels:
        if reasons[name]:
            continue
        if is_proven(name, op, capability):
            return Choice(name, "proven on a card of this compute capability", {k: r for k, r in reasons.items() if r})
        reasons[name] = (
            f"unproven: it has not run on a card of compute capability {capability[0]}.{capability[1]} yet; "
            f'use_backend("{name}") takes it all the same'
        )
    return Choice("reference", "no kernel serves: the plain PyTorch composition, a fallback", reasons)


@functools.cache
def _kernel_on_cuda(op: str, capability: tuple[int, int], dtype: torch.dtype, by: str | None) -> str:
    able = [name for name in ("cuda", "triton") if not _why_no_kernel(name, op, capability, dtype)]
    if not able:
        raise NotImplementedError(
            f"genai_kernels.{op}: expected a kernel for {dtype} on compute capability {capability}, got none: "
            f"{_why_no_kernel('cuda', op, capability, dtype)}; {_why_no_kernel('triton', op, capability, dtype)}; "
            'use_backend("reference") runs wherever PyTorch does'
        )
    return min(able, key=lambda name: (name != by, not is_proven(name, op, capability)))


def kernel_on_cuda(op: str, capability: tuple[int, int], dtype: torch.dtype) -> str:
    """The kernel for a call that has been let through to one, as backward's calls are, which nobody chooses anew."""
    return _kernel_on_cuda(op, capability, dtype, forced)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def choose(op: str, tensor: torch.Tensor) -> Choice:
    """What serves a call of the public function `op` with a tensor like this one."""
    device = tensor.device
    if device.type == "cuda":
        return on_cuda(op, capability_of(device), tensor.dtype, forced)
    if forced == "reference":
        return on_cuda(op, (0, 0), tensor.dtype, forced)
    if device.type == "cpu":
        if forced == "triton":
            return Choice("triton", 'forced by use_backend("triton"), in its interpreter')
        if forced == "cuda":
            return Choice("none", 'use_backend("cuda") forces the CUDA kernels, and the arguments are on the CPU')
        return Choice("cpu", "C++ kernels" + (', forced by use_backend("cpu")' if forced == "cpu" else ""))
    return Choice(
        "none", f"the arguments are on {device.type}; there are kernels for cpu and cuda, and nothing is copied"
    )


def kernels_on(device: str) -> list[str]:
    """The backends with kernels that can run here on tensors of a device, proven or not."""
    from . import triton_lib

    if device == "cpu":
        return ["cpu"] + ["triton"] * (triton_lib.interprets() and not triton_lib.why_not())
    return ["cuda"] * built_with_cuda() + ["triton"] * (not triton_lib.why_not())


# ---- fallbacks ----

_fallbacks: collections.Counter[str] = collections.Counter()


def fallbacks() -> dict[str, int]:
    """How many calls PyTorch has served in a kernel's place: text that says which and why -> count.

    >>> import genai_kernels as gk
    >>> gk.fallbacks()
    {}
    """
    return dict(_fallbacks)


def note_fallback(op: str, choice: Choice) -> None:
    """Counts a fallback, or refuses it in strict mode."""
    text = f"{op}: {'; '.join(f'not {name}: {reason}' for name, reason in choice.rejected.items())}"
    if strict:
        raise NotImplementedError(f"genai_kernels.{op}: strict: expected a kernel, got a fallback to PyTorch: {text}")
    _fallbacks[text] += 1


# What torch.compiler.assume_constant_result does, without the import of all of torch._dynamo: a call that is traced is
# counted, and refused, while it is.
note_fallback._dynamo_marked_constant = True  # type: ignore[attr-defined]


@atexit.register
def _report() -> None:
    if _fallbacks:
        ops = collections.Counter(text.split(":")[0] for text in _fallbacks.elements())
        print(
            f"genai_kernels: PyTorch served {_fallbacks.total()} calls in a kernel's place: "
            f"{', '.join(f'{name} {n}' for name, n in sorted(ops.items()))}; genai_kernels.fallbacks() says why",
            file=sys.stderr,
        )
