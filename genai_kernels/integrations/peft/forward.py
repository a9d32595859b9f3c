"""The forward of a `peft.tuners.lora.Linear` on these kernels: decided at each call, from the state of the layer.

result = base(x) + sum over its adapters of scaling * B(A(dropout(x)))      as PEFT computes it, product by product
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

from ... import backends
from ...ops.linear import linear
from ...ops.lora_linear import LoRAAdapter, dora_linear, dora_norm, lora_linear, lora_linear_multi

KEPT_NORM = "genai_kernels-norm-"  # in PEFT's cache of a DoRA adapter, with the adapter's name
_PLAIN = (torch.Tensor, nn.Parameter)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
_OF_PEFT = {"adapter_names", "alora_offsets"}  # arguments of PEFT's forward, not of the base layer's
_MAGNITUDES = "lora_magnitude_vector"  # a submodule of each DoRA adapter
_linear = nn.Linear.forward


class Left(NamedTuple):
    """A call that PEFT's own forward has to serve."""

    why: str
    to: str = "passed_on"  # or "base_alone": no adapter is to be added, so that there is nothing to fuse


class _Adapter(NamedTuple):
    """One adapter in one call, its tensors in the dtypes that the product takes."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    dropout_p: float
    dora: Any  # None, or PEFT's layer of the magnitudes


def _altered(module: nn.Module) -> bool:
    """Whether something else than its class's forward happens where PEFT calls a module, which here is not called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _why_altered(what: str, module: nn.Module) -> str:
    return f"{what} has a forward of its own" if "forward" in module.__dict__ else f"a hook on {what}"


def _parameter(module: nn.Module, name: str) -> Any:
    """A parameter, or what parametrizes it; at a third of the time of nn.Module's own look-up."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def _together(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.is_cpu and b.is_cpu if x.is_cpu else a.device == b.device == x.device


def why_not_base(base: nn.Module) -> str | None:
    """Why a base layer can have no adapter in its product, or None."""
    kind = type(base)
    if kind.forward is not _linear and not (
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    ):
        return f"the base layer is {kind.__name__}"
    return _why_altered("the base layer", base) if _altered(base) else None


def why_not_adapter(layer: Any, name: str) -> str | None:
    """Why an adapter of a `lora.Linear` cannot go into the product of its base layer, or None."""
    parts = layer._modules  # nn.Module's own look-up of a submodule takes ten times as long
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
        if variant != "Dora":
            return variant
        if _altered(parts[_MAGNITUDES]._modules[name]):
            return _why_altered("the magnitudes", parts[_MAGNITUDES]._modules[name])
    for what in ("lora_A", "lora_B", "lora_dropout"):
        module = parts[what]._modules[name]
        kind = type(module)
        if kind.forward is not _linear and not (what == "lora_dropout" and kind in (nn.Identity, nn.Dropout)):
            return f"{what} is {kind.__name__}"
        if _altered(module):
            return _why_altered(what, module)
    return None


def adapters_of(layer: Any, names: Sequence[str]) -> list[str]:
    """Those of the names that the layer has, without repetition, in order."""
    own = layer._modules["lora_A"]._modules
    if len(names) == 1:
        return list(names) if names[0] in own else []
    return [name for name in dict.fromkeys(names) if name in own]


def _why_not_now(layer: Any, x: torch.Tensor) -> str | None:
    """What about a call, but for its dtypes and adapters, keeps it from the kernels."""
    if type(x) not in _PLAIN or x.layout is not torch.strided:
        return f"an input of type {type(x).__name__}, {x.layout}"
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        return "a shape that does not fit"
    if not (x.is_cpu or x.is_cuda):
        return f"no kernel for tensors on {x.device.type}"
    if torch.compiler.is_compiling():
        return None
    if module_globals._has_any_global_hook():
        return "a hook on all modules"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "a transform of torch.func, or forward-mode derivatives"
    return None


def _adapter(layer: Any, name: str, x: torch.Tensor, cast: torch.dtype | None) -> _Adapter | str:
    """An adapter as the product takes it, or why it does not."""
    reason = why_not_adapter(layer, name)
    if reason is not None:
        return reason
    parts = layer._modules
    lora_b, dropout = parts["lora_B"]._modules[name], parts["lora_dropout"]._modules[name]
    a, b = _parameter(parts["lora_A"]._modules[name], "weight"), _parameter(lora_b, "weight")
    bias = _parameter(lora_b, "bias")
    if type(a) not in _PLAIN or type(b) not in _PLAIN:
        return f"an adapter of {type(a).__name__}"
    if cast is not None:
        a, b = a.to(cast), b.to(cast)
    elif a.dtype != x.dtype:
        if a.dtype != torch.float32 or x.dtype == torch.float64:
            return f"an adapter of {a.dtype} for {x.dtype}"
        if not getattr(layer, "cast_input_dtype_enabled", True):
            return "the cast of the input is disabled"
    if b.dtype != a.dtype or not _together(x, a, b):
        return "tensors of different dtypes or devices"
    scaling = layer.scaling[name]
    if isinstance(scaling, torch.Tensor):
        if scaling.requires_grad or scaling.numel() != 1:
            return "a scaling that learns, or that is not one number"
        if torch.compiler.is_compiling():
            return "a scaling that is a tensor, under torch.compile"
        scaling = scaling.item()
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    if p >= 1:
        return "dropout of everything"
    if name not in layer.lora_variant:
        return _Adapter(a, b, bias, scaling, p, None)
    if bias is not None:
        return "Dora with a bias of lora_B"
    return _Adapter(a, b, bias, scaling, p if layer.training else 0.0, parts[_MAGNITUDES]._modules[name])


def _autocast(x: torch.Tensor) -> torch.dtype | None:
    """What autocast has the products of this device computed in."""
    device = "cpu" if x.is_cpu else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _bias_of(adapter: _Adapter) -> torch.Tensor | None:
    """What the bias of lora_B adds; in float32 at least, in which its gradient is then summed."""
    if adapter.bias is None:
        return None
    return adapter.bias.to(torch.promote_types(adapter.bias.dtype, torch.float32)) * adapter.scaling


def _plus(y: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
    return y if more is None else (y + more).to(y.dtype)


def serve(layer: Any, x: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, str] | Left:
    """What `lora.Linear.forward(layer, x, *args, **kwargs)` returns, with what it was, or why it has to be called."""
    if layer.disable_adapters:
        return Left("adapters disabled", "base_alone")
    if args or (kwargs and not kwargs.keys() <= _OF_PEFT):
        return Left("arguments of the base layer")
    if layer.merged:  # with adapter_names an error, which is PEFT's
        return Left("adapters merged", "base_alone")
    of_rows = kwargs.get("adapter_names")
    names = layer.active_adapters if of_rows is None else of_rows
    used = adapters_of(layer, names)
    if not used:
        return Left("no adapter in this layer is active", "base_alone")
    base = layer._modules["base_layer"]
    reason = _why_not_now(layer, x) or why_not_base(base)
    if reason is not None:
        return Left(reason)
    if of_rows is not None and len(of_rows) != len(x):
        return Left("as many adapter_names as there are inputs are needed")
    if of_rows is None and len(names) > len(used) and any(names.count(name) > 1 for name in used):
        return Left("an adapter that is active twice")

    weight, bias = _parameter(base, "weight"), _parameter(base, "bias")
    if type(weight) not in _PLAIN:
        return Left(f"a base layer whose weight is {type(weight).__name__}")
    if type(base).forward is not _linear:  # Conv1D keeps [in, out]
        weight = weight.t()
    cast = _autocast(x)
    if cast is not None:
        if torch.float64 in (x.dtype, weight.dtype):
            return Left("autocast of float64")
        x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    if x.dtype not in _NAMES or weight.dtype != x.dtype or not _together(x, weight, weight):
        return Left(f"a base layer of {weight.dtype} on {weight.device.type} for {x.dtype} on {x.device.type}")
    adapters: list[_Adapter] = []
    for name in used:
        adapter = _adapter(layer, name, x, cast)
        if isinstance(adapter, str):
            return Left(adapter)
        adapters.append(adapter)
    if (of_rows is not None or len(adapters) > 1) and any(a.dora is not None for a in adapters):
        return Left("Dora beside other adapters")
    one = len(adapters) == 1 and of_rows is None
    op = "dora_linear" if adapters[0].dora is not None else "lora_linear" if one else "lora_linear_multi"
    if not x.is_cpu and backends.choose(op, x).falls_back:
        return Left(f"no kernel of {op} for tensors on {x.device.type}")
    p = adapters[0].dropout_p
    how = f"{_NAMES[x.dtype]}, dropout {p:g}" if p else _NAMES[x.dtype]
    if adapters[0].dora is not None:
        norm = None if cast is not None else _kept_norm(used[0], weight, adapters[0])
        return _dora(x, weight, bias, adapters[0], norm), f"{how}, DoRA"
    if one:
        return _one(x, weight, bias, adapters[0]), f"{how}, one adapter"
    if any(a.dropout_p != p for a in adapters):
        return Left("adapters with different dropout in one call")
    if any(a.lora_a.dtype != adapters[0].lora_a.dtype for a in adapters):
        return Left("adapters of different dtypes in one call")
    if of_rows is None:
        if p:  # PEFT draws for each adapter, the kernel for each element of x
            return Left("dropout for several adapters on a row")
        return _all(x, weight, bias, adapters), f"{how}, {len(adapters)} adapters on every row"
    places = {name: i for i, name in enumerate(used)}
    rows = [places.get(name, -1) for name in of_rows]
    return _by_row(x, weight, bias, adapters, rows), f"{how}, adapters by row"


def _one(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapter: _Adapter) -> torch.Tensor:
    a, b, _, scaling, p, _ = adapter
    more = _bias_of(adapter)
    if more is None or more.dtype != x.dtype:
        return _plus(lora_linear(x, weight, a, b, scaling, bias, p), more)
    return lora_linear(x, weight, a, b, scaling, more if bias is None else bias + more, p)


def _dora(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapter: _Adapter, norm: torch.Tensor | None
) -> torch.Tensor:
    """With dropout, which is PyTorch's, PEFT adds DoRA's change for the dropped x to base(x): it is the result for the
    dropped x, and base(x - dropped x). What is kept is not scaled before it is rounded, the magnitudes are."""
    a, b, _, scaling, p, layer = adapter
    magnitude = _parameter(layer, "weight")
    if not p:
        return dora_linear(x, weight, a, b, magnitude, scaling, bias, norm=norm)
    dtype = torch.promote_types(x.dtype, torch.float32)
    dropped = F.dropout(x.new_ones(x.shape, dtype=dtype), p)
    y = dora_linear(x * (dropped > 0), weight, a, b, magnitude.to(dtype) / (1 - p), scaling, bias, norm=norm)
    return y + linear((x * (1 - dropped)).to(x.dtype), weight)


def _kept_norm(name: str, weight: torch.Tensor, adapter: _Adapter) -> torch.Tensor | None:
    """The norm of dora_linear where PEFT keeps it, under its `DoraCaching` in eval mode; None: to be computed.

    PEFT keeps it until the layer trains. Here a change of a tensor is seen as well, unless it was made through `.data`.
    """
    from peft.tuners.lora import dora

    layer = adapter.dora
    if not getattr(dora, "ENABLE_DORA_CACHING", False) or layer.training or torch.compiler.is_compiling():
        return None
    tensors = (weight, adapter.lora_a, adapter.lora_b)
    state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors], adapter.scaling
    kept = layer._cache_get(f"{KEPT_NORM}{name}", None)
    if kept is None or kept[0] != state:
        with torch.inference_mode(False):  # or no later call could differentiate through it
            kept = state, dora_norm(weight, adapter.lora_a, adapter.lora_b, adapter.scaling)
        layer._cache_store(f"{KEPT_NORM}{name}", kept)
    return kept[1]


def _many(adapters: list[_Adapter]) -> list[LoRAAdapter]:
    return [LoRAAdapter(a.lora_a, a.lora_b, a.scaling) for a in adapters]


def _all(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapters: list[_Adapter]) -> torch.Tensor:
    """Every adapter on every row."""
    more = [each for each in map(_bias_of, adapters) if each is not None]
    return _plus(lora_linear_multi(x, weight, _many(adapters), None, bias), torch.stack(more).sum(0) if more else None)


def _by_row(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapters: list[_Adapter], places: list[int]
) -> torch.Tensor:
    """For each element of the first dimension of x the adapter in its place, or none for -1."""
    between = [1] * (x.dim() - 2)
    ids = torch.tensor(places, dtype=torch.int32).view(-1, *between).expand(x.shape[:-1])
    y = lora_linear_multi(x, weight, _many(adapters), ids, bias, dropout_p=adapters[0].dropout_p)
    more = [_bias_of(a) for a in adapters]
    some = next((each for each in more if each is not None), None)
    if some is None:
        return y
    each_one = torch.stack([torch.zeros_like(some) if each is None else each for each in [*more, None]])
    return _plus(y, each_one[places].view(-1, *between, weight.shape[0]))
