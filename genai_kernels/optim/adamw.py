"""AdamW around its fused step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..ops.fused_adamw import fused_adamw_, global_norm

_FLOAT32 = ("exp_avg", "exp_avg_sq", "master", "ema")  # of a parameter's state, whatever the parameter's dtype


class AdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` with one kernel for each step of a group, and clipping and an average in the same pass.

    Drop-in: the same arguments, groups, and keys of the state, so that a state dict of either loads into the other.
    Moments are float32 whatever the parameters are. A run that is interrupted, saved and resumed has the same bits.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        max_norm: clip the gradients of all groups together to this norm, as `torch.nn.utils.clip_grad_norm_` before the
            step would, without writing them; `grad_norm` is the norm of the last step.
        master_weights: keep float32 copies of parameters of 16 bits, as `state[p]["master"]`.
        ema_decay: keep a running average of each parameter, in float32, as `state[p]["ema"]`.

    Raises:
        ValueError: numbers out of range.
        NotImplementedError: `amsgrad`, `capturable` and `differentiable`, which only PyTorch's has; sparse gradients.

    >>> import torch, genai_kernels as gk
    >>> from genai_kernels.optim import AdamW
    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = AdamW([p], lr=0.1, max_norm=1.0)
    >>> (3 * p[0] + 4 * p[1]).backward()
    >>> optimizer.step()
    >>> optimizer.grad_norm
    tensor(5.)
    """

    grad_norm: torch.Tensor | None = None  # of all gradients of the last step, before clipping, if max_norm is set

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        master_weights: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if isinstance(value, torch.Tensor) or not (math.isfinite(value) and value >= 0):
                raise ValueError(f"genai_kernels.optim.AdamW: {name}: expected a finite number >= 0, got {value}")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"genai_kernels.optim.AdamW: betas: expected two numbers >= 0 and < 1, got {betas}")
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"genai_kernels.optim.AdamW: max_norm: expected a number >= 0, or None, got {max_norm}")
        if ema_decay is not None and not 0 <= ema_decay <= 1:
            raise ValueError(f"genai_kernels.optim.AdamW: ema_decay: expected 0 to 1, or None, got {ema_decay}")
        self.max_norm, self.master_weights, self.ema_decay = max_norm, master_weights, ema_decay
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused, "decoupled_weight_decay": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _refuse(self, group: dict[str, Any]) -> None:
        for name in ("amsgrad", "capturable", "differentiable"):
            if group.get(name):
                raise NotImplementedError(
                    f"genai_kernels.optim.AdamW: {name}: expected False, got True; torch.optim.AdamW has it"
                )
        if not group.get("decoupled_weight_decay", True):
            raise NotImplementedError(
                "genai_kernels.optim.AdamW: decoupled_weight_decay: expected True, got False; torch.optim.Adam has it"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._refuse({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but that what is float32 stays it beside parameters of 16 bits."""
        for group in state_dict["param_groups"]:
            self._refuse(group)
        super().load_state_dict(state_dict)
        names = (name for group in state_dict["param_groups"] for name in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for name, p in zip(names, params, strict=True):
            for key in _FLOAT32:
                saved = state_dict["state"].get(name, {}).get(key)
                if saved is not None:
                    self.state[p][key] = _like(p, saved)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_norm", "master_weights", "ema_decay")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in (("foreach", None), ("capturable", False), ("differentiable", False), ("fused", None),
                                ("maximize", False), ("amsgrad", False), ("decoupled_weight_decay", True)):  # fmt: skip
                group.setdefault(name, value)

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        """Its state, made at its first step."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
        if self.master_weights and p.dtype != torch.float32 and "master" not in state:
            state["master"] = _like(p, p.detach())
        if self.ema_decay is not None and "ema" not in state:
            state["ema"] = _like(p, p.detach())
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of all parameters that have a gradient; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = [call for group in self.param_groups for call in self._calls(group)]
        norm = None
        if self.max_norm is not None and calls:
            norm = global_norm([g for _, grads, *_ in calls for g in grads])
        for group, grads, step, params in calls:
            states = [self.state[p] for p in params]
            masters = [s["master"] for s in states if "master" in s]
            emas = [s["ema"] for s in states] if self.ema_decay is not None else None
            fused_adamw_(
                params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], step=step,
                lr=float(group["lr"]), betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                maximize=group["maximize"], max_norm=self.max_norm, grad_norm=norm, masters=masters or None, emas=emas,
                ema_decay=0.0 if self.ema_decay is None else self.ema_decay,
            )  # fmt: skip
            for s in states:
                s["step"] += 1
        self.grad_norm = norm
        return loss

    def _calls(self, group: dict[str, Any]) -> Iterable[tuple[dict[str, Any], list[torch.Tensor], int, list[Any]]]:
        """(group, gradients, step, parameters): of those that are at the same step, on one device, with a master or
        without: nearly always all of a group.
        """
        together: dict[Any, tuple[list[torch.Tensor], list[Any]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise TypeError(
                    f"genai_kernels.optim.AdamW: params: expected float32, bfloat16 or float16, got {p.dtype}"
                )
            if p.grad.is_sparse:
                raise NotImplementedError("genai_kernels.optim.AdamW: expected dense gradients, got a sparse one")
            state = self._state_of(p)
            grads, params = together.setdefault((int(state["step"]) + 1, p.device, "master" in state), ([], []))
            same = all(n <= 1 or a == b for n, a, b in zip(p.shape, p.stride(), p.grad.stride(), strict=True))
            grads.append(p.grad if same else _laid_out(p))
            params.append(p)
        for (step, *_), (grads, params) in together.items():
            yield group, grads, step, params


def _like(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A float32 copy in the parameter's layout."""
    made = torch.empty_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
    return made.copy_(values)


def _laid_out(p: torch.Tensor) -> torch.Tensor:
    """The gradient in the parameter's layout: autograd keeps to it nearly always."""
    assert p.grad is not None
    return torch.empty_like(p, dtype=p.grad.dtype, memory_format=torch.preserve_format).copy_(p.grad)
