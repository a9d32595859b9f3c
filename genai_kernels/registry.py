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
from torch.compiler import is_dynamo_compiling

from . import backends

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Tensors = tuple[torch.Tensor, ...]
F = TypeVar("F", bound=Callable[..., Any])


class Make:
    """Random tensors for samples: signed, of one dtype, reproducible from a seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        """Normal, rounded to the dtype: `shift + scale * N(0, 1)`."""
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float64)
        return (x * scale + shift).to(self.dtype)

    def float32(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal, float32 whatever the dtype (float64 under float64): for slopes, sinks, parameters."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float64)
        return (x * scale).to(dtype)

    def ints(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Uniform integers in [low, high)."""
        return torch.randint(low, high, tuple(shape), generator=self.generator, device=self.device, dtype=dtype)

    def mask(self, *shape: int, keep: float = 0.7) -> torch.Tensor:
        """Boolean, True with probability `keep`."""
        return torch.rand(shape, generator=self.generator, device=self.device) < keep


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
    backward_flops: float = 0.0
    backward_elements: float = 0.0
    peers: tuple[str, ...] | None = None  # names of Op.peers, and "eager"; None: all
    frozen: tuple[str, ...] = ()  # keyword arguments that take no gradient


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
            if backends.forced == "reference":
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


def direct(name: str) -> Callable[..., Any]:
    """The function of `_C` that runs a kernel without the dispatcher: it returns NotImplemented, having done nothing,
    where the dispatcher is needed (csrc/host/direct_call.h), as it always is with a torch that cannot do without.
    """
    from . import _C  # type: ignore[attr-defined]  # not there where only `doctor` runs

    return getattr(_C, name, lambda *args: NotImplemented)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_applies: dict[str, Callable[..., Any]] = {}  # of torch ops with a gradient: what runs them and records it


def _records_plainly(args: tuple[Any, ...]) -> bool:
    """True if nothing but the autograd engine has to know of a call."""
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
        and all(type(t) in _PLAIN and t.device.type == "cpu" for t in tensors)
        and direct("thread_is_plain")() is True
    )


def kernel(name: str) -> Callable[..., Any]:
    """The torch op `name`, called without the dispatcher wherever that makes no difference but in time."""
    dispatched = getattr(torch.ops.genai_kernels, name).default  # without the search for an overload
    straight = direct(name)

    def call(*args: Any) -> Any:
        if is_dynamo_compiling():
            return dispatched(*args)
        result = straight(*args)
        if result is not NotImplemented:
            return result
        if name in _applies and _records_plainly(args):
            return _applies[name](*args)
        return dispatched(*args)

    return call


def autograd(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives a torch op its gradient: `save(ctx, inputs, output)` after forward, `backward(ctx, *gradients)`.

    With the dispatcher, and as a function of the autograd engine's own for `kernel`, at a quarter of the cost.
    """
    torch.library.register_autograd(f"genai_kernels::{name}", backward, setup_context=save)
    run = kernel(name)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        save(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _applies[name] = type(name, (torch.autograd.Function,), members).apply


def fake(name: str) -> Callable[[F], F]:
    """Registers the shape function of a torch op, which meta tensors and `torch.compile` call instead of a kernel.

    It also answers where any tensor of a call is a meta tensor, so it refuses a mix of devices: the others would get
    memory that nothing was written to.
    """
    overload = getattr(torch.ops.genai_kernels, name).default
    names = [argument.name for argument in overload._schema.arguments]
    public = name.removesuffix("_out").removesuffix("_bwd")

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any) -> Any:
            first = None
            for argument, value in zip(names, args, strict=False):
                if not isinstance(value, torch.Tensor) or argument == "rng_state":  # which lies on the CPU always
                    continue
                if first is None:
                    first = argument, value.device
                elif value.device != first[1]:
                    raise ValueError(
                        f"genai_kernels.{public}: {argument}: expected device {first[1]} as {first[0]}, "
                        f"got {value.device}"
                    )
            return function(*args)

        torch.library.register_fake(f"genai_kernels::{name}")(checked)
        return function

    return decorate


def no_double_backward(name: str, public: str) -> None:
    """Gives the backward op `name` a gradient that is a sentence, instead of a silently wrong or missing one."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"genai_kernels.{public}: double backward is not implemented; "
            f'use genai_kernels.use_backend("reference") for higher-order gradients'
        )

    torch.library.register_autograd(f"genai_kernels::{name}", backward)
