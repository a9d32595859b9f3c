"""Which implementation a call takes, and why not another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from . import backends
from .accuracy import map_tensors
from .registry import OPS, Op


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` of it is the text for people."""

    op: str
    arguments: str
    backend: str  # "cpu", "cuda", "triton", "reference", or "none" where the call cannot be served
    isa: str  # instruction set of the C++ kernels; empty for other backends
    why: str
    path: str  # the op's own words on the code path within the kernel; may be empty
    not_taken: dict[str, str]  # backend or instruction set -> why it is not this one

    def __str__(self) -> str:
        lines = [f"{self.op}({self.arguments})", f"  runs on {self.backend}: {self.why}"]
        if self.isa:
            lines.append(f"  instruction set {self.isa}: {torch.ops.genai_kernels.isa_reason()}")
        if self.path:
            lines.append(f"  path: {self.path}")
        lines += [f"  not {name}: {reason}" for name, reason in self.not_taken.items()]
        return "\n".join(lines)


def _text_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        strided = "" if value.is_contiguous() else f" strides {list(value.stride())}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strided}"
    return repr(value)


def _find(function: Callable[..., Any] | str) -> Op:
    for op in OPS.values():
        if function is op.function or function == op.name:
            return op
    raise ValueError(
        f"genai_kernels.explain: fn: expected an op of genai_kernels ({', '.join(sorted(OPS))}), got {function!r}"
    )


def explain(fn: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend, instruction set and code path `fn(*args, **kwargs)` takes, without running it.

    Args:
        fn: an op of genai_kernels, or its name.
        args, kwargs: what it would be called with.

    Returns:
        an `Explanation`; print it, or read its fields.

    Raises:
        ValueError: `fn` is not an op of genai_kernels.

    >>> import torch, genai_kernels as gk
    >>> gk.explain(gk.rms_norm, torch.ones(2, 8)).backend
    'cpu'
    """
    op = _find(fn)
    devices: set[str] = set()
    map_tensors(lambda t: devices.add(t.device.type) or t, (args, kwargs))  # type: ignore[func-returns-value]
    parts = [_text_of(a) for a in args] + [f"{name}={_text_of(a)}" for name, a in kwargs.items()]
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), torch.empty(0))
    if len(devices) > 1:
        where = " and ".join(sorted(devices))
        choice = backends.Choice(
            "none", f"the arguments are on {where}; all must be on one device, and nothing is copied"
        )
    else:
        choice = backends.choose(op.name, first)
    backend, why, not_taken = choice.backend, choice.why, dict(choice.rejected)
    if backend == "none":
        not_taken["reference"] = 'only use_backend("reference") selects it; it runs wherever PyTorch does'
    if backend == "cpu":
        not_taken["reference"] = 'only use_backend("reference") selects it'
        not_taken |= dict.fromkeys(("cuda", "triton"), "the arguments are on the CPU")
    if backends.forced == "reference":
        not_taken["cpu"] = why
    isa = torch.ops.genai_kernels.isa() if backend == "cpu" else ""
    if isa:
        table = dict(line.split("=") for line in torch.ops.genai_kernels.isa_table().split())
        reason, names = torch.ops.genai_kernels.isa_reason(), list(table)  # from the narrowest to the widest
        for i, (name, supported) in enumerate(table.items()):
            if supported != "yes":
                not_taken[name] = "this CPU has not got it"
            elif name != isa:
                narrower = i < names.index(isa) and not reason.startswith("forced")
                not_taken[name] = f"narrower than {isa}" if narrower else reason
    path = op.path(*args, **kwargs) if op.path is not None and backend in ("cpu", "cuda") else ""
    return Explanation(op.name, ", ".join(parts), backend, isa, why, path, not_taken)
