"""The LoRA layers of a PEFT model on these kernels, by one call that can be undone.

    from genai_kernels.integrations import peft

    report = peft.accelerate(model)     # a PeftModel, or any module with PEFT's layers in it
    ...                                 # train, add and switch adapters, mix them in a batch
    print(report)
    peft.restore(model)

Needs PEFT (0.18 or newer; tested with 0.21), which is imported by the first call.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import itertools
import threading
import weakref
from collections import Counter
from typing import Any

import torch

from .forward import KEPT_NORM, Left, adapters_of, serve, why_not_adapter, why_not_base

__all__ = ["Report", "accelerate", "restore"]

_MARK = "_genai_kernels"  # the one attribute that a layer gets: (number of its report, name of the layer)
_lock = threading.Lock()
_reports: dict[int, weakref.ref[Report]] = {}
_numbers = itertools.count()


class Report:
    """What became of each layer and of each call, returned by `accelerate`; as a context it restores at its end.

    Attributes:
        served: calls on these kernels, by what they were.
        passed_on: calls that PEFT's own forward served, by the reason; `where` has the layers of each reason.
        base_alone: calls without any adapter to add, which are the base layer's: disabled or merged, for instance.

    What torch.compile traces is counted when it is traced.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._number = next(_numbers)
        self._taken: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self.served: Counter[str] = Counter()
        self.passed_on: Counter[str] = Counter()
        self.base_alone: Counter[str] = Counter()
        self.where: dict[str, Counter[str]] = {}
        with _lock:
            _reports[self._number] = weakref.ref(self, functools.partial(_forget, self._number))

    @property
    def layers(self) -> dict[str, str]:
        """Of each of PEFT's layers in the model as it is now: "fused", or why PEFT's own forward serves it.

        What only a call shows, its dtype or its device, is in `passed_on`.
        """
        model = self._model()
        return {} if model is None else {name: _state(layer) for name, layer in _layers_of(model)}

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        for layer in self._taken:
            _give_back(layer)

    def __str__(self) -> str:
        layers = self.layers
        left = {name: state for name, state in layers.items() if state != "fused"}
        lines = [f"layers on genai_kernels: {len(layers) - len(left)}", f"layers left to PEFT: {len(left)}"]
        lines += [f"          {name}: {why}" for name, why in left.items()]
        for title, calls in (
            ("served by genai_kernels", self.served),
            ("passed on to PEFT", self.passed_on),
            ("of the base layer alone", self.base_alone),
        ):
            lines += [f"calls {title}: {sum(calls.values())}"]
            lines += [f"{count:8}  {what}{self._places(what)}" for what, count in calls.most_common()]
        return "\n".join(lines)

    def _places(self, why: str) -> str:
        names = list(self.where.get(why, ()))
        return f" ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})" if names else ""


def _forget(number: int, _: object) -> None:
    _reports.pop(number, None)


def _note(mark: tuple[int, str], which: str, what: str) -> None:
    reference = _reports.get(mark[0])
    report = None if reference is None else reference()
    if report is not None:
        with _lock:
            getattr(report, which)[what] += 1
            if which == "passed_on":
                report.where.setdefault(what, Counter())[mark[1]] += 1


# What is traced is counted while it is (backends.note_fallback says more).
_note._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _accelerated_class() -> Any:
    """`peft.tuners.lora.Linear` with another forward. A layer is taken over by being given this class."""
    from peft.tuners.lora import Linear as PeftLinear

    class Linear(PeftLinear):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            mark = self.__dict__.get(_MARK)  # none: restored, while someone had kept this forward
            if mark is None:
                return PeftLinear.forward(self, x, *args, **kwargs)
            result = serve(self, x, args, kwargs)
            if isinstance(result, Left):
                _note(mark, result.to, result.why)
                return PeftLinear.forward(self, x, *args, **kwargs)
            y, how = result
            _note(mark, "served", how)
            return y

        def __deepcopy__(self, memo: dict) -> torch.nn.Module:
            """A copy is taken over as well, and counted in the same report."""
            new = memo[id(self)] = object.__new__(type(self))
            new.__setstate__(copy.deepcopy(self.__dict__, memo))
            return new

        def __reduce_ex__(self, protocol: Any) -> Any:
            """A pickle holds PEFT's own layer, which whoever reads it can be without this library."""
            state = {key: value for key, value in self.__dict__.items() if key != _MARK}
            return copyreg._reconstructor, (PeftLinear, object, None), state  # type: ignore[attr-defined]

    Linear.__qualname__, Linear.__module__ = PeftLinear.__qualname__, PeftLinear.__module__
    return Linear


def _layers_of(model: torch.nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _why_never(layer: torch.nn.Module) -> str | None:
    """Why a layer is not taken over at all."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}: not a lora.Linear"
    if not hasattr(layer, "lora_variant"):
        return "an old PEFT, which keeps variants elsewhere"
    return "it has a forward of its own" if "forward" in layer.__dict__ else None


def _state(layer: Any) -> str:
    if not isinstance(layer, _accelerated_class()):
        return _why_never(layer) or "not taken over: call accelerate again"
    if "forward" in layer.__dict__:
        return "it has a forward of its own, which may call this one"
    reasons = [why_not_adapter(layer, name) for name in adapters_of(layer, layer.active_adapters)]
    return next((r for r in (why_not_base(layer.base_layer), *reasons) if r is not None), "fused")


def _give_back(layer: Any) -> None:
    from peft.tuners.lora import Linear

    if type(layer) is _accelerated_class():
        layer.__class__ = Linear
        del layer.__dict__[_MARK]
        for name, magnitudes in layer.lora_magnitude_vector.items():
            getattr(magnitudes, "_dora_cache", {}).pop(f"{KEPT_NORM}{name}", None)


def accelerate(model: torch.nn.Module) -> Report:
    """Has the LoRA layers of a PEFT model computed by `lora_linear` and its kin, until `restore`.

    Every `lora.Linear` in the model is taken over, by giving that one object a subclass with another forward; nothing
    else of it, of PEFT or of PyTorch changes. Parameters, state_dict, save_pretrained, hooks on the layer and
    isinstance are as before; a deep copy is taken over too; a pickle holds PEFT's own classes.

    Each call is decided by what the layer is at that moment: adapters may be added, loaded, switched, disabled, merged,
    deleted, several active at once, or mixed in a batch by `adapter_names`, as in PEFT, without calling this again.
    Training, dropout, rsLoRA, DoRA, `lora_bias`, float32 adapters on a bfloat16 base, Conv1D, autocast, gradient
    checkpointing and torch.compile work. Dropout draws from torch's generator as PEFT does, other bits with the same
    odds. The norms of DoRA are computed in each call, or kept in eval mode under PEFT's `DoraCaching`.

    PEFT's own forward still serves, and the report says so: other layers than `lora.Linear` on a `torch.nn.Linear` or
    Conv1D; other variants (aLoRA, ...); DoRA beside other adapters; a hook on `lora_A`, `lora_B`, `lora_dropout` or the
    base layer, which would not be called otherwise; dropout for several active adapters at once, or of different
    probabilities in one call; adapters of a lower precision than the input; forward-mode derivatives; a device without
    kernels. Layers that a new adapter creates are listed as not taken over, until this is called again. Double backward
    is refused, with a sentence.

    Returns:
        The `Report`, which is also a context: `with accelerate(model) as report:` restores at the end what this call
        has taken over.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: no layer of PEFT in the model.

    >>> import torch
    >>> from genai_kernels.integrations import peft
    >>> from peft import LoraConfig, get_peft_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(4, 8))
    >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    >>> report = peft.accelerate(model)
    >>> y = model.base_model.model[0](torch.ones(3, 8))
    >>> print(report)
    layers on genai_kernels: 1
    layers left to PEFT: 1
              base_model.model.1: lora.layer.Embedding: not a lora.Linear
    calls served by genai_kernels: 1
           1  float32, one adapter
    calls passed on to PEFT: 0
    calls of the base layer alone: 0
    >>> peft.restore(model)
    """
    layers = _layers_of(model)
    if not layers:
        raise ValueError(
            "genai_kernels.integrations.peft.accelerate: model: expected PEFT's layers in it, got "
            f"{type(model).__name__} without any; add an adapter first"
        )
    report = Report(model)
    for name, layer in layers:
        if _why_never(layer) is None:
            layer.__class__ = _accelerated_class()
            layer.__dict__[_MARK] = report._number, name
            report._taken.add(layer)
    return report


def restore(model: torch.nn.Module) -> None:
    """Gives every layer of the model that `accelerate` has taken over back to PEFT, as it was before."""
    for _, layer in _layers_of(model):
        _give_back(layer)
