"""How a room calls its torch ops: past the dispatcher where it adds nothing, with their gradients and shapes.

The torch ops `genai_kernels::<name>` are defined in csrc/ops, with the CPU's kernels. `kernel(name)` calls one, and
gives it its implementation for CUDA tensors: what backends.py chooses of `genai_kernels_cuda::<name>`, the same in CUDA
C++, and the function that `in_triton(name)` declares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import TorchDispatchMode

from . import backends

F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def _public_name(name: str) -> str:
    """The public function that a torch op stands behind."""
    from .registry import OPS

    plain = name.removesuffix("_out").removesuffix("_bwd")
    behind = (op.name for op in OPS.values() if plain in op.overloads or name in op.overloads)
    return plain if plain in OPS else next(behind, plain)


def _written(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What a call of a torch op writes into."""
    arguments = getattr(torch.ops.genai_kernels, name).default._schema.arguments
    return [value for a, value in zip(arguments, args, strict=True) if a.alias_info is not None]


@functools.cache
def _argument_names(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.genai_kernels, name).default._schema.arguments]


# Arguments that are read on the CPU, wherever the others are.
_ON_CPU = ("rng_state", "adapter_ids", "scalings", "columns")


def _placed(name: str, args: tuple[Any, ...]) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a call, in lists too, that must be where the first is, and their names."""
    return [
        (argument, t)
        for argument, value in zip(_argument_names(name), args, strict=False)
        for t in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(t, torch.Tensor) and argument not in _ON_CPU
    ]


def _check_one_device(name: str, args: tuple[Any, ...]) -> None:
    first = None
    for argument, value in _placed(name, args):
        if first is None:
            first = argument, value.device
        elif value.device != first[1]:
            raise ValueError(
                f"genai_kernels.{_public_name(name)}: {argument}: expected device {first[1]} as {first[0]}, "
                f"got {value.device}"
            )


def direct(name: str) -> Callable[..., Any]:
    """The function of `_C` that runs a kernel without the dispatcher: it returns NotImplemented, having done nothing,
    where the dispatcher is needed (csrc/host/direct_call.h), as it always is with a torch that cannot do without.
    """
    from . import _C  # type: ignore[attr-defined]  # not there where only `doctor` runs

    return getattr(_C, name, lambda *args: NotImplemented)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Function(NamedTuple):
    """A torch op with a gradient as functions of the autograd engine: run and recorded by `apply`."""

    plain: type[torch.autograd.Function]
    transformed: type[torch.autograd.Function]  # what torch.func can differentiate; slower


_functions: dict[str, _Function] = {}


def _is_plain(args: tuple[Any, ...]) -> bool:
    """True if nothing but the autograd engine has to know of a call."""
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    return (
        all(type(t) in _PLAIN and t.device.type in ("cpu", "cuda") for t in tensors)
        and direct("thread_is_plain")() is True
    )


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """An error, where the dispatcher would drop the tangents of forward-mode differentiation without a word."""
    for t in args:
        if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"genai_kernels.{name}: forward-mode differentiation is not implemented; "
                f'use genai_kernels.use_backend("reference") for it'
            )


_triton: dict[str, Callable[..., Any]] = {}  # the same ops in Triton, once triton_lib.load() has run
_with_float64: dict[str, int] = {}  # of these, which tensors may be float64: those from this one on


def in_triton(name: str, float64_parameters: bool = False, float64: bool = False) -> Callable[[F], F]:
    """Declares a function as the torch op `name` in Triton: the same arguments and results.

    With `float64_parameters` other tensors than the first may be float64, with `float64` all.
    """

    def decorate(function: F) -> F:
        _triton[name] = function
        if float64_parameters or float64:
            _with_float64[name] = 0 if float64 else 1
        return function

    return decorate


def _run_in_triton(name: str, args: tuple[Any, ...]) -> Any:
    """A torch op in Triton, without its gradient."""
    from . import triton_lib

    triton_lib.load()
    public = _public_name(name)
    result_of = name.removesuffix("_out")
    if result_of not in _triton:
        raise NotImplementedError(
            f'genai_kernels.{public}: it has no Triton kernel; use another backend than use_backend("triton")'
        )
    placed = [t for _, t in _placed(name, args)]
    first = _with_float64.get(name, len(placed))
    triton_lib.check_place(public, (*placed[:first], *(t for t in placed[first:] if t.dtype != torch.float64)))
    if result_of == name:
        return _triton[name](*args)
    outs = _written(name, args)
    results = _triton[result_of](*args[: len(args) - len(outs)])
    for out, result in zip(outs, results if isinstance(results, tuple) else (results,), strict=True):
        triton_lib.check_like(public, "out", out, "the result", result)
        out.copy_(result)
    return None


def _run_on_cuda(name: str, *args: Any) -> Any:
    """A torch op on CUDA tensors, without its gradient."""
    _check_one_device(name, args)
    first, public = args[0], _public_name(name)
    # the first is bytes where it is of a quantized weight
    dtype = next((t.dtype for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()), first.dtype)
    backend = backends.kernel_on_cuda(public, backends.capability_of(first.device), dtype)
    with torch.cuda.device(first.device):
        if backend == "triton":
            return _run_in_triton(name, args)
        return getattr(torch.ops.genai_kernels_cuda, name).default(*args)


_library = torch.library.Library("genai_kernels", "IMPL")  # lives as long as its registrations should


@functools.cache
def _implement_on_cuda(name: str) -> None:
    _library.impl(name, functools.partial(_run_on_cuda, name), "CUDA")


def kernel(name: str) -> Callable[..., Any]:
    """The torch op `name`, called without the dispatcher wherever that makes no difference but in time."""
    dispatched = getattr(torch.ops.genai_kernels, name).default  # without the search for an overload
    straight = direct(name)
    _implement_on_cuda(name)

    def call(*args: Any) -> Any:
        if is_dynamo_compiling():
            return dispatched(*args)
        if backends.forced == "triton" and args[0].device.type == "cpu":  # in its interpreter
            if name in _functions and _needs_gradient(args):
                return _functions[name].plain.apply(*args)
            return _run_in_triton(name, args)
        result = straight(*args)
        if result is not NotImplemented:
            return result
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if name in _functions and torch._C._are_functorch_transforms_active():
            return _functions[name].transformed.apply(*args)
        if _is_plain(args):
            if not _needs_gradient(args):
                return _run_on_cuda(name, *args) if args[0].is_cuda else dispatched(*args)
            if name in _functions:
                return _functions[name].plain.apply(*args)
            raise NotImplementedError(
                f"genai_kernels.{_public_name(name)}: it has no gradient; call it under torch.no_grad()"
            )
        return dispatched(*args)

    return call


class _InInterpreter(TorchDispatchMode):
    """Answers for the torch ops in Triton's interpreter, below what records their gradients."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "genai_kernels":
            return _run_in_triton(func.name().removeprefix("genai_kernels::"), args)
        return func(*args, **(kwargs or {}))


def kernel_of_lists(name: str) -> Callable[..., Any]:
    """The torch op `name` that takes lists of tensors, whose gradients only the dispatcher records."""
    dispatched = getattr(torch.ops.genai_kernels, name).default
    _implement_on_cuda(name)

    def call(*args: Any) -> Any:
        if not is_dynamo_compiling() and backends.forced == "triton" and args[0].device.type == "cpu":
            with _InInterpreter():
                return dispatched(*args)
        return dispatched(*args)

    return call


def written(*tensors: torch.Tensor | None) -> None:
    """Tells autograd that these were changed in place, as the dispatcher does and a direct call does not."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None and not t.is_inference()])


def autograd(
    name: str,
    save: Callable[..., None],
    backward: Callable[..., Any],
    consuming: Callable[..., Any] | None = None,
) -> None:
    """Gives a torch op its gradient: `save(ctx, inputs, output)` after forward, `backward(ctx, *gradients)`.

    With the dispatcher, and as a function of the autograd engine's own for `kernel`, at a quarter of the cost. The
    latter may be `consuming`, if a room keeps some of the outputs to itself: it may write into them.
    """
    torch.library.register_autograd(f"genai_kernels::{name}", backward, setup_context=save)
    run = kernel(name)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        save(ctx, inputs, output)
        return output

    def function(**members: Callable[..., Any]) -> Any:
        return type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in members.items()})

    _functions[name] = _Function(
        function(forward=forward, backward=consuming or backward),
        function(forward=run, setup_context=save, backward=backward),
    )


def fake(name: str) -> Callable[[F], F]:
    """Registers the shape function of a torch op, which meta tensors and `torch.compile` call instead of a kernel.

    It also answers where any tensor of a call is a meta tensor, so it refuses a mix of devices: the others would get
    memory that nothing was written to.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any) -> Any:
            _check_one_device(name, args)
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

    autograd(name, lambda ctx, inputs, output: None, backward)
