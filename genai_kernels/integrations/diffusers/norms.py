"""The norms of diffusers on these kernels, alone and with the activation after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...ops.group_norm_silu import group_norm_silu
from ...ops.layer_norm import layer_norm
from .calls import NAMES, Left, Served, why_altered, why_not_now, why_not_parameters

MARK = "_genai_kernels"  # see __init__.py
# The activations of diffusers' get_activation that group_norm_silu computes.
_ACTIVATIONS: dict[Any, str] = {nn.SiLU.forward: "silu", nn.ReLU.forward: "relu", nn.GELU.forward: "gelu"}


def activation_of(module: nn.Module) -> str | None:
    """What group_norm_silu calls an activation, or None."""
    name = _ACTIVATIONS.get(original(module).forward)
    return "gelu_tanh" if name == "gelu" and module.approximate == "tanh" else name  # type: ignore[comparison-overlap]


def original(module: nn.Module) -> Any:
    """The class that a module had before it was taken over."""
    return getattr(type(module), "_genai_kernels_original", type(module))


def why_not_norm(what: str, norm: Any) -> str | None:
    """Why group_norm_silu cannot stand for a GroupNorm, or None."""
    if original(norm) is not nn.GroupNorm:
        return f"{what} is {type(norm).__name__}"
    return why_altered(what, norm) or why_not_parameters(what, norm.weight, norm.bias)


def why_not_pair(norm: Any, activation: Any) -> str | None:
    """Why the two cannot be one, or None: said by the state of the modules alone."""
    reason = why_not_norm("the norm", norm)
    if reason is None and activation_of(activation) is None:
        reason = f"the activation is {type(activation).__name__}"
    return reason or why_altered("the activation", activation)


def norm_of(
    norm: Any, x: torch.Tensor, activation: str, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
) -> torch.Tensor:
    return group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=activation, scale=scale, shift=shift
    )


# ---- GroupNorm, and the heads: conv_norm_out with conv_act ----


def is_head(norm: Any) -> bool:
    """Whether a norm that was taken over computes the activation after it as well, which then passes on what it gets.

    Asked by both of them, so that exactly one applies the activation: the answer is in their state, not in a call's.
    """
    marks = norm.__dict__.get(MARK)
    activation = None if marks is None else marks.partner
    if activation is None or MARK not in activation.__dict__:
        return False
    return why_not_pair(norm, activation) is None


def why_not_group_norm(norm: Any) -> str | None:
    return why_not_parameters("it", norm.weight, norm.bias)


def group_norm(norm: Any, x: torch.Tensor) -> Served | Left:
    reason = why_not_group_norm(norm) or why_not_now("group_norm_silu", x, norm.weight, norm.bias)
    if is_head(norm):
        activation = norm.__dict__[MARK].partner
        if reason is not None:  # the activation is this one's all the same
            y = original(norm).forward(norm, x)
            return original(activation).forward(activation, y), f"by PyTorch, {reason}: group norm and activation"
        name = activation_of(activation)
        assert name is not None
        return norm_of(norm, x, name), f"{NAMES[x.dtype]}, group norm and {name}"
    if reason is not None:
        return Left(reason)
    return norm_of(norm, x, "none"), f"{NAMES[x.dtype]}, group norm"


def why_not_head_activation(activation: Any) -> str | None:
    norm = activation.__dict__[MARK].partner
    if MARK not in norm.__dict__:
        return "the norm before it is not taken over"
    return why_not_pair(norm, activation)


def head_activation(activation: Any, x: torch.Tensor) -> Served | Left:
    reason = why_not_head_activation(activation)
    return (x, "an activation computed with its norm") if reason is None else Left(reason)


# ---- AdaGroupNorm: the scale and shift are a linear layer's ----


def why_not_ada_group_norm(norm: Any) -> str | None:
    return None


def ada_group_norm(norm: Any, x: torch.Tensor, emb: torch.Tensor) -> Served | Left:
    reason = why_not_now("group_norm_silu", x)
    if reason is not None:
        return Left(reason)
    scale, shift = norm.linear(emb if norm.act is None else norm.act(emb)).chunk(2, dim=1)
    y = group_norm_silu(x, norm.num_groups, eps=norm.eps, activation="none", scale=scale, shift=shift)
    return y, f"{NAMES[x.dtype]}, group norm with scale and shift"


# ---- LayerNorm ----


def why_not_layer_norm(norm: Any) -> str | None:
    if len(norm.normalized_shape) != 1:
        return f"a norm over {len(norm.normalized_shape)} dimensions"
    return why_not_parameters("it", norm.weight, norm.bias)


def layer_norm_of(norm: Any, x: torch.Tensor) -> Served | Left:
    reason = why_not_layer_norm(norm) or why_not_now("layer_norm", x, norm.weight, norm.bias)
    if reason is not None:
        return Left(reason)
    return layer_norm(x, norm.weight, norm.bias, norm.eps), f"{NAMES[x.dtype]}, layer norm"
