"""diffusers' GEGLU by linear_geglu, with the adapters that PEFT has put into its layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...ops.lora_linear import LoRAAdapter, linear_geglu
from ..peft import forward as of_peft
from .calls import NAMES, Left, Served, altered, autocast, why_not_now, why_not_parameters, why_not_plain


def _is_lora(proj: Any) -> bool:
    kind = type(proj)
    return kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer" and hasattr(proj, "lora_variant")


def _names(proj: Any) -> list[str]:
    """The adapters that a call adds."""
    return [] if proj.disable_adapters or proj.merged else of_peft.adapters_of(proj, proj.active_adapters)


def why_not_geglu(layer: Any) -> str | None:
    proj = layer.proj
    if not _is_lora(proj):
        return why_not_plain("proj", proj, nn.Linear) or why_not_parameters("proj", proj.weight, proj.bias)
    if altered(proj):
        return "a hook on proj"
    if proj.merged and proj.disable_adapters:
        return "adapters that PEFT is to unmerge"
    names, base = _names(proj), proj.base_layer
    reasons = [of_peft.why_not_base(base), why_not_parameters("proj", base.weight, base.bias)]
    for name in names:
        reasons += [of_peft.why_not_adapter(proj, name), "DoRA" if name in proj.lora_variant else None]
    return next((reason for reason in reasons if reason is not None), None)


def geglu(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Served | Left:
    if args or kwargs:
        return Left("arguments that diffusers has deprecated")
    reason = why_not_geglu(layer)
    if reason is not None:
        return Left(reason)
    proj, names = layer.proj, _names(layer.proj) if _is_lora(layer.proj) else []
    base = proj.base_layer if _is_lora(proj) else proj
    weight, bias = base.weight, base.bias
    cast = autocast(x)
    if cast is not None:
        if torch.float64 in (x.dtype, weight.dtype):
            return Left("autocast of float64")
        x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    reason = why_not_now("linear_geglu", x, weight, bias)
    if reason is None and weight.dtype != x.dtype:
        reason = f"a weight of {weight.dtype} for {x.dtype}"
    adapters = [] if reason is not None else [of_peft._adapter(proj, name, x, cast) for name in names]
    found: list[LoRAAdapter] = []
    for a in adapters:
        if isinstance(a, str):
            reason = reason or a
        elif a.bias is not None or a.dropout_p > 0:
            reason = reason or "an adapter with a bias, or with dropout"
        else:
            found.append(LoRAAdapter(a.lora_a, a.lora_b, a.scaling))
    if len({a.lora_a.dtype for a in found}) > 1:
        reason = reason or "adapters of different dtypes in one call"
    if reason is not None:
        return Left(reason)
    how = f"{NAMES[x.dtype]}, GEGLU"
    if not found:
        return linear_geglu(x, weight, bias), how
    return linear_geglu(x, weight, bias, found), f"{how}, {len(found)} adapter{'s' if len(found) > 1 else ''}"
