"""What every replaced forward asks first: may this call go to a kernel, and may a submodule be left uncalled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

from ... import backends

PLAIN = (torch.Tensor, nn.Parameter)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


class Left(NamedTuple):
    """A call that diffusers' own forward has to serve."""

    why: str


Served = tuple[Any, str]  # the result, and what the call was, for the report


class Kind(NamedTuple):
    """How the modules of a class are served."""

    name: str
    serve: Callable[..., Served | Left]  # (module, *args, **kwargs of its method)
    why_not: Callable[[Any], str | None]  # why the module as it is now cannot be served, whatever comes in
    method: str = "forward"
    concerns: Callable[[Any], bool] = lambda module: True  # whether there is anything to serve at all


def altered(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward, which would be missing if it were not called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_altered(what: str, module: nn.Module) -> str | None:
    """Why a submodule has to be called, or None."""
    if "forward" in module.__dict__:
        return f"{what} has a forward of its own"
    return f"a hook on {what}" if altered(module) else None


def why_not_plain(what: str, module: Any, kind: Any) -> str | None:
    """Why a kernel cannot stand for `kind.forward(module, ...)`, or None."""
    if module is None or type(module).forward is not kind.forward:
        owner = type(module).__module__.partition(".")[0]
        return f"{what} is {type(module).__name__}{f' of {owner}' if owner == 'peft' else ''}"
    return why_altered(what, module)


def why_not_parameters(what: str, *tensors: torch.Tensor | None) -> str | None:
    for t in tensors:
        if t is not None and type(t) not in PLAIN:
            return f"{what} has a {type(t).__name__}"
    return None


def why_not_now(op: str, x: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """What about a call, its tensors or the state of PyTorch, keeps it from the kernel `op`."""
    if type(x) not in PLAIN or x.layout is not torch.strided:
        return f"an input of type {type(x).__name__}, {x.layout}"
    if x.dtype not in NAMES:
        return f"no kernel for {x.dtype}"
    if not (x.is_cpu or x.is_cuda):
        return f"no kernel for tensors on {x.device.type}"
    for t in others:
        if t is None:
            continue
        if t.dtype not in NAMES or t.device != x.device:
            return f"a parameter of {t.dtype} on {t.device.type} for {x.dtype} on {x.device.type}"
    if not x.is_cpu:
        if torch.is_autocast_enabled(x.device.type):  # which has norms in float32 there, but not on the CPU
            return f"autocast on {x.device.type}"
        if backends.choose(op, x).falls_back:
            return f"no kernel of {op} for tensors on {x.device.type}"
    if torch.compiler.is_compiling():
        return None
    if module_globals._has_any_global_hook():
        return "a hook on all modules"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "a transform of torch.func, or forward-mode derivatives"
    return None


def autocast(x: torch.Tensor) -> torch.dtype | None:
    """What autocast has the products of this device computed in."""
    device = "cpu" if x.is_cpu else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
