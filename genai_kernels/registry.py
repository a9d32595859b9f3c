"""What an op declares about itself, and the one wrapper that every public function goes through.

An op's room (`genai_kernels/ops/<op>/__init__.py`) decorates its public function with `@op(...)`. Everything that lists
ops (tests, `verify`, `bench`, the documentation) reads `OPS`; nothing else names them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from . import backends
from .quantized import QuantizedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Tensors = tuple[torch.Tensor, ...]
F = TypeVar("F", bound=Callable[..., Any])


class Make:
    """Random tensors for samples: signed, of one dtype, reproducible from a seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        """Normal, rounded to the dtype: `shift + scale * N(0, 1)`."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (x * scale + shift).to(self.device, self.dtype)

    def float32(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal, float32 whatever the dtype (float64 under float64): for slopes, sinks, parameters."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (x * scale).to(self.device, dtype)

    def ints(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Uniform integers in [low, high)."""
        return torch.randint(low, high, tuple(shape), generator=self.generator, dtype=dtype).to(self.device)

    def mask(self, *shape: int, keep: float = 0.7) -> torch.Tensor:
        """Boolean, True with probability `keep`."""
        return (torch.rand(shape, generator=self.generator) < keep).to(self.device)


@dataclass(frozen=True)
class Sample:
    """One call of an op: its name, how to build its arguments, and what it costs.

    `build(make)` returns `(args, kwargs)`. Tests run the samples without `bench`; benchmarks run those with it.
    """

    name: str
    build: Callable[[Make], tuple[tuple[Any, ...], dict[str, Any]]]
    bench: bool = False
    flops: float = 0.0  # of the forward, counting only what the result depends on
    elements: float = 0.0  # read and written by the forward, for memory-bound ops
    stream: str = "copy"  # what such an op is held against; "read" where it writes next to nothing
    backward_flops: float = 0.0
    backward_elements: float = 0.0
    peers: tuple[str, ...] | None = None  # names of Op.peers, and "eager"; None: all
    frozen: tuple[str, ...] = ()  # keyword arguments that take no gradient
    cpu_only: bool = False  # with an option that no kernel on a GPU has
    interpreted: bool = True  # False: not where time is scarce, in Triton's interpreter, as others have what it has


Index = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """A smaller call of an op whose results are some of a larger call's: how a result that is too large for a float64
    reference is checked all the same.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Sequence[Index]  # of each output of the larger call: the part that the smaller call computes
    # of the gradient of each floating argument that both calls have, in order: which of the larger call's is which of
    # the smaller's, given that the smaller call's cotangents are the larger's at `outputs`
    gradients: Sequence[tuple[Index, Index]]


@dataclass(frozen=True)
class Accuracy:
    """TRUTH: the factors by which errors may exceed eager's (largest, RMS), and c of the bound per element."""

    forward: tuple[float, float] = (1.0, 1.0)
    backward: tuple[float, float] = (1.5, 1.1)
    c_low: float = 2.0  # bf16, fp16
    c_fp32: float | Callable[..., float] = 8.0  # a number, or a function of the call's arguments


@dataclass(frozen=True)
class Op:
    """A public function and what is known of it."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Sequence[Sample]
    accuracy: Accuracy
    # magnitude(*args, **kwargs) -> per output, the condition magnitude A of the bound per element, on float64 inputs
    magnitude: Callable[..., Any] | None = None
    differentiable: bool = True
    exact: bool = False  # results are compared bit for bit
    gpu: tuple[str, ...] = ("cuda", "triton")  # in what it has kernels for the GPU; else PyTorch serves, a fallback
    gpu_dtypes: tuple[torch.dtype, ...] = FLOATS  # of its first tensor, that these kernels take
    on_cpu: tuple[str, ...] = ()  # arguments that stay there, wherever the others are
    mutates: bool = False  # it writes into some of its arguments, and returns those
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)  # same arguments as the op
    overloads: tuple[str, ...] = ()  # names of the torch ops behind it, for opcheck and explain
    # parts(*args, **kwargs): what to check of a call that is too large to be checked as a whole; empty: check it whole
    parts: Callable[..., Sequence[Part]] | None = None
    path: Callable[..., str] | None = None  # path(*args, **kwargs): which code path a call takes, for explain


OPS: dict[str, Op] = {}

_KINDS = {"[TypeError] ": TypeError, "[NotImplementedError] ": NotImplementedError}


def _translated(error: RuntimeError) -> Exception:
    """The exception that a kernel's check names in front of its text (csrc/host/check.h)."""
    text = str(error)
    for prefix, kind in _KINDS.items():
        if text.startswith(prefix):
            return kind(text[len(prefix) :].splitlines()[0])
    return error


def python_errors(function: F) -> F:
    """For a public function that is no op: it raises the exceptions that the kernels' checks name."""

    @functools.wraps(function)
    def public(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            raise _translated(error) from None

    return public  # type: ignore[return-value]


def _chosen(name: str, first: Any) -> str | None:
    """The backend of a call with this first argument. A fallback is noted; a call that nothing serves is an error."""
    if not isinstance(first, torch.Tensor):
        return backends.forced
    choice = backends.choose(name, first)
    if choice.backend == "none" and first.device.type in ("cpu", "cuda"):
        raise NotImplementedError(f"genai_kernels.{name}: expected a call that a kernel serves, got none: {choice.why}")
    if choice.falls_back:
        backends.note_fallback(name, choice)
    return choice.backend


def _into_out(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with `out=`: refused where it would drop gradients, and seen by autograd as a change of `out`."""
    out = kwargs["out"] if isinstance(kwargs["out"], (tuple, list)) else (kwargs["out"],)
    given = (*args, *kwargs.values(), *out)
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in given):
        raise RuntimeError(
            f"genai_kernels.{name}: out: expected no tensor that requires a gradient beside it, got one; "
            "leave out= away, or call it under torch.no_grad()"
        )
    result = function(*args, **kwargs)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in out if not t.is_inference()])
    return result


def op(
    *,
    reference: Callable[..., Any],
    samples: Sequence[Sample],
    accuracy: Accuracy | None = None,
    **declared: Any,
) -> Callable[[F], F]:
    """Registers a public function as an op and gives it backend selection and Python's exceptions."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def public(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(first, (list, tuple)) and first:
                first = first[0]
            elif isinstance(first, QuantizedWeight):  # what is computed with it has the dtype
                first = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
            by_choice = backends.forced is not None or getattr(first, "is_cuda", False)
            if by_choice and _chosen(name, first) == "reference":
                return reference(*args, **kwargs)
            try:
                if not kwargs:
                    return function(*args)
                if kwargs.get("out") is not None:
                    return _into_out(name, function, args, kwargs)
                return function(*args, **kwargs)
            except RuntimeError as error:
                raise _translated(error) from None

        name = function.__name__
        if name in OPS:
            raise ValueError(f"genai_kernels: an op named {name} is registered already")
        OPS[name] = Op(name, public, reference, samples, accuracy or Accuracy(), **declared)
        return public  # type: ignore[return-value]

    return decorate
