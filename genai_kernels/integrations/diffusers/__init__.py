"""The UNets, autoencoders and schedulers of diffusers on these kernels, by one call that can be undone.

    from genai_kernels.integrations import diffusers

    report = diffusers.accelerate(pipe)    # a pipeline, a UNet, an AutoencoderKL, or any module with such layers in it
    ...                                    # sample, train, load adapters, fuse projections, set other processors
    print(report)
    diffusers.restore(pipe)

Needs diffusers (0.42 or newer; tested with 0.42.1), which is imported by the first call.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import importlib
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from . import attention, convolutions, geglu, norms, prompts, resnet, schedulers
from .calls import Kind, Left
from .norms import MARK

__all__ = ["Report", "accelerate", "restore"]

_lock = threading.Lock()
_reports: dict[int, weakref.ref[Report]] = {}
_numbers = itertools.count()
_ORIGINAL = "_genai_kernels_original"  # of an accelerated class: the class that it stands for


class _Mark(NamedTuple):
    """The one attribute that a module gets, `_genai_kernels`."""

    report: int
    name: str
    partner: nn.Module | None = None  # of a head's norm its activation, and the reverse


class Report:
    """What became of each module and of each call, returned by `accelerate`; as a context it restores at its end.

    Attributes:
        served: calls on these kernels, by what they were.
        passed_on: calls that diffusers' own forward served, by the reason; `where` has the modules of each reason.

    What torch.compile traces is counted when it is traced.
    """

    def __init__(self, roots: dict[str, Any]) -> None:
        self._roots = {name: weakref.ref(module) for name, module in roots.items()}
        self._number = next(_numbers)
        self._taken: weakref.WeakSet[Any] = weakref.WeakSet()
        self.served: Counter[str] = Counter()
        self.passed_on: Counter[str] = Counter()
        self.where: dict[str, Counter[str]] = {}
        with _lock:
            _reports[self._number] = weakref.ref(self, functools.partial(_forget, self._number))

    @property
    def modules(self) -> dict[str, str]:
        """Of each module of these kinds, as the model is now: what serves it, or why diffusers' own forward does.

        What only a call shows, its dtype or its device, is in `passed_on`.
        """
        roots = {name: root for name, reference in self._roots.items() if (root := reference()) is not None}
        return {name: state for name, module in _walk(roots) if (state := _state(module)) is not None}

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        for module in self._taken:
            _give_back(module)

    def _prepack(self) -> None:
        """Of the modules taken over, those whose forward calls convolve."""
        blocks = [m for m in self._taken if _kind(m) in [_OWN[name] for name in _CONVOLVING]]
        for conv in [m for block in blocks for m in block.modules() if type(m) is nn.Conv2d]:
            convolutions.prepack(conv)
            self._taken.add(conv)

    def __str__(self) -> str:
        modules = self.modules
        ours = Counter(state for state in modules.values() if state in _NAMES)
        left = {name: state for name, state in modules.items() if state not in _NAMES}
        lines = [f"modules on genai_kernels: {sum(ours.values())}"]
        lines += [f"{count:8}  {kind}" for kind, count in ours.most_common()]
        lines += [f"modules left to diffusers: {len(left)}"]
        lines += [f"          {name}: {why}" for name, why in left.items()]
        for title, calls in (("served by genai_kernels", self.served), ("passed on to diffusers", self.passed_on)):
            lines += [f"calls {title}: {sum(calls.values())}"]
            lines += [f"{count:8}  {what}{self._places(what)}" for what, count in calls.most_common()]
        return "\n".join(lines)

    def _places(self, why: str) -> str:
        names = list(self.where.get(why, ()))
        return f" ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})" if names else ""


def _forget(number: int, _: object) -> None:
    _reports.pop(number, None)


def _note(number: int, name: str, which: str, what: str) -> None:
    reference = _reports.get(number)
    report = None if reference is None else reference()
    if report is not None:
        with _lock:
            getattr(report, which)[what] += 1
            if which == "passed_on":
                report.where.setdefault(what, Counter())[name] += 1


# What is traced is counted while it is (backends.note_fallback says more).
_note._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- which classes, and what they become ----


_NORM = Kind("group norm", norms.group_norm, norms.why_not_group_norm)
_ACTIVATION = Kind("activation, computed with its norm", norms.head_activation, norms.why_not_head_activation)
_LAYER_NORM = Kind("layer norm", norms.layer_norm_of, norms.why_not_layer_norm)
_OWN = (
    {
        "models.attention_processor.Attention": Kind("attention", attention.attention, attention.why_not_attention),
        "models.resnet.ResnetBlock2D": Kind("ResNet block", resnet.resnet, resnet.why_not_resnet),
        "models.upsampling.Upsample2D": Kind(
            "upsampler", convolutions.upsample, convolutions.why_not_upsample, concerns=lambda layer: layer.use_conv
        ),
        "models.downsampling.Downsample2D": Kind(
            "downsampler",
            convolutions.downsample,
            convolutions.why_not_downsample,
            concerns=lambda layer: layer.use_conv,
        ),
        "models.activations.GEGLU": Kind("GEGLU", geglu.geglu, geglu.why_not_geglu),
        "models.normalization.AdaGroupNorm": Kind("group norm", norms.ada_group_norm, norms.why_not_ada_group_norm),
    }
    | {
        f"schedulers.scheduling_{name}": Kind("scheduler", step, schedulers.why_not_scheduler, "step")
        for name, step in (
            ("ddim.DDIMScheduler", schedulers.ddim),
            ("ddpm.DDPMScheduler", schedulers.ddpm),
            ("euler_discrete.EulerDiscreteScheduler", schedulers.euler),
            ("euler_ancestral_discrete.EulerAncestralDiscreteScheduler", schedulers.euler_ancestral),
        )
    }
    | {
        "schedulers.scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler": Kind(
            "scheduler", schedulers.dpm_multistep, schedulers.why_not_multistep, "step"
        )
    }
)
_NAMES = {kind.name for kind in (_NORM, _ACTIVATION, _LAYER_NORM, *_OWN.values())}
_ATTENTION = "models.attention_processor.Attention"
_CONVOLVING = ("models.resnet.ResnetBlock2D", "models.upsampling.Upsample2D", "models.downsampling.Downsample2D")
# Modules whose forward calls conv_norm_out and then conv_act, with nothing between them.
_HEADS = ("models.unets.unet_2d.UNet2DModel", "models.unets.unet_2d_condition.UNet2DConditionModel",
          "models.autoencoders.vae.Encoder", "models.autoencoders.vae.Decoder")  # fmt: skip
# Relatives of what is served, so that the report says that they are not.
_OTHERS = ("models.attention.AttentionModuleMixin", "models.resnet.ResnetBlockCondNorm2D",
           "models.normalization.RMSNorm", "models.normalization.FP32LayerNorm",
           "schedulers.scheduling_utils.SchedulerMixin")  # fmt: skip


def _classes(names: tuple[str, ...]) -> tuple[type, ...]:
    found = []
    for name in names:
        path, _, last = name.rpartition(".")
        kind = getattr(importlib.import_module(f"diffusers.{path}"), last, None)
        found += [] if kind is None else [kind]  # another version may lack it
    return tuple(found)


@functools.cache
def _kinds() -> dict[type, Kind]:
    kinds = {original: kind for name, kind in _OWN.items() for original in _classes((name,))}
    return kinds | {nn.GroupNorm: _NORM, nn.LayerNorm: _LAYER_NORM}


def _kind(module: Any) -> Kind | None:
    """How a module is served, or None; an activation only where it is a head's."""
    original = norms.original(module)
    if original in _kinds():
        return _kinds()[original] if _kinds()[original].concerns(module) else None
    return _ACTIVATION if MARK in module.__dict__ else None


@functools.cache
def _accelerated(original: Any, kind: Kind) -> Any:
    """A class with another forward. A module is taken over by being given it, and given back by the original."""
    their_own = getattr(original, kind.method)

    @functools.wraps(their_own)  # pipelines read the signatures of schedulers
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        mark = self.__dict__.get(MARK)
        if mark is None:  # restored, while someone had kept this method
            return their_own(self, *args, **kwargs)
        result = kind.serve(self, *args, **kwargs)
        if isinstance(result, Left):
            _note(mark[0], mark[1], "passed_on", result.why)
            return their_own(self, *args, **kwargs)
        _note(mark[0], mark[1], "served", result[1])
        return result[0]

    class Accelerated(original):
        def __deepcopy__(self, memo: dict) -> Any:
            """A copy is taken over as well, and counted in the same report."""
            new = memo[id(self)] = object.__new__(type(self))
            state = copy.deepcopy(self.__dict__, memo)
            new.__setstate__(state) if isinstance(new, nn.Module) else new.__dict__.update(state)
            return new

        def __reduce_ex__(self, protocol: Any) -> Any:
            """A pickle holds the original, which whoever reads it can be without this library."""
            state = {key: value for key, value in self.__dict__.items() if key != MARK}
            return copyreg._reconstructor, (original, object, None), state  # type: ignore[attr-defined]

    setattr(Accelerated, kind.method, call)
    setattr(Accelerated, _ORIGINAL, original)
    Accelerated.__name__, Accelerated.__qualname__ = original.__name__, original.__qualname__
    return Accelerated


def _walk(roots: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every module of the roots; a scheduler is its own."""
    for name, root in roots.items():
        for path, module in root.named_modules() if isinstance(root, nn.Module) else [("", root)]:
            yield ".".join(part for part in (name, path) if part), module


def _take(module: Any, mark: _Mark, kind: Kind) -> None:
    original = norms.original(module)
    module.__class__ = _accelerated(original, kind)
    module.__dict__[MARK] = mark


def _is_held(module: Any) -> bool:
    """Whether a report that someone has counts its calls."""
    mark = module.__dict__.get(MARK)
    reference = None if mark is None else _reports.get(mark.report)
    return reference is not None and reference() is not None


def _give_back(module: Any) -> None:
    if MARK in module.__dict__:
        module.__class__ = norms.original(module)
        del module.__dict__[MARK]
    if isinstance(module, nn.Conv2d):
        convolutions.forget(module)
    if isinstance(module, nn.Module):
        prompts.forget(module)


def _state(module: Any) -> str | None:
    """Its kind, why diffusers serves it, or None for a module that is none of this one's business."""
    kind = _kind(module)
    if kind is None:
        return f"{type(module).__name__}: no kernel stands for it" if isinstance(module, _classes(_OTHERS)) else None
    if kind.method in module.__dict__:
        return f"it has a {kind.method} of its own" + (", which may call this one" if MARK in module.__dict__ else "")
    if MARK not in module.__dict__:
        return "not taken over: call accelerate again"
    return kind.why_not(module) or kind.name


def _roots(model: Any) -> dict[str, Any]:
    """The model, or what diffusers has in a pipeline, models and schedulers, with their names in it."""
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

    if isinstance(model, (nn.Module, SchedulerMixin)):
        return {"": model}
    if not isinstance(model, DiffusionPipeline):
        return {}
    components: dict[str, Any] = model.components  # type: ignore[attr-defined]
    kinds = (ModelMixin, SchedulerMixin)
    return {name: part for name, part in components.items() if isinstance(getattr(part, "_orig_mod", part), kinds)}


def accelerate(model: Any, *, prepack: bool = False, keep_prompt: bool = False) -> Report:
    """Has the UNets, autoencoders and schedulers of diffusers computed by these kernels, until `restore`.

    Every module of a known class is taken over, by giving that one object a subclass with another forward; nothing else
    of it, of diffusers or of PyTorch changes. Parameters, state_dict, save_pretrained, hooks on the module and
    isinstance are as before; a deep copy is taken over too; a pickle holds the original classes. Taken over are:

    - `Attention`, self, cross and with added keys, by `flash_attention`: as the processor that it has would compute it;
      options of the layer (group_norm, spatial_norm, norm_cross, norm_q, residual_connection, rescale_output_factor,
      upcast_attention, masks, fused projections, slices) are honoured;
    - `ResnetBlock2D`: each norm with its activation, the scale and shift of the time, the convolution after it, the
      time and the residual added to that, by `conv2d`; or by `group_norm_silu` alone, where PyTorch's convolution is
      the faster engine (below 1024 pixels without `prepack`; bfloat16 on processors with products for it) or the
      convolution has to be called as a module. `Upsample2D` by `up_conv2d`, `Downsample2D` (from 16384 pixels, or with
      `prepack`) by `conv2d`, with the same exceptions;
    - conv_norm_out with conv_act, `GroupNorm` and `AdaGroupNorm` by `group_norm_silu`;
    - `LayerNorm` by `layer_norm`; `GEGLU` by `linear_geglu`, with the LoRA adapters that PEFT has put into its layer;
    - the step of the DDIM, DDPM, Euler, Euler-ancestral and DPM-Solver++ (multistep, first and second order)
      schedulers by `cfg_step`, with diffusers' noise.

    Each call is decided by what the module is at that moment: adapters may be loaded, projections fused, processors
    set, without calling this again. Linear layers and other convolutions are called as modules, PEFT's
    too (`integrations.peft.accelerate` has those computed here as well). Training, dropout, gradient checkpointing,
    autocast and torch.compile work.

    diffusers' own forward still serves, and the report says so: other processors (IP adapters, PAG, xformers);
    `cross_attention_kwargs`; a hook on a norm, an activation or a linear layer that would not be called otherwise; a
    GEGLU whose layer is quantised, or has DoRA, dropout or a bias in its adapters; norms with conditions in them;
    thresholding and learnt variances in schedulers; forward-mode derivatives; a device without kernels. Double backward
    is refused, with a sentence.

    Args:
        model: a `DiffusionPipeline`, whose models and scheduler of diffusers are taken over; any `torch.nn.Module`; or
            a scheduler.
        prepack: keep a copy of the weights of the convolutions of ResNet blocks, upsamplers and downsamplers in the
            order in which the kernels read them. They are used where no gradient is wanted, and made again when a
            weight has changed (but not through `.data`).
        keep_prompt: keep the keys and values that each cross-attention makes of a text, and use them again while it
            gets that same tensor: at every step of a sampler but the first. Not where a gradient is wanted of them, in
            inference mode, or of layers with adapters or hooks; made again when the text or a weight has changed (but
            not through `.data`, as PEFT merges adapters: call `restore` before).

    Returns:
        The `Report`, which is also a context: `with accelerate(model) as report:` restores at the end what this call
        has taken over.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: nothing in the model is of a known class.

    >>> import torch
    >>> from genai_kernels.integrations import diffusers
    >>> from diffusers.models.resnet import ResnetBlock2D
    >>> block = ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=16).eval()
    >>> x, temb = torch.randn(1, 32, 4, 4), torch.randn(1, 16)
    >>> expected = block(x, temb)
    >>> with diffusers.accelerate(block) as report:
    ...     torch.testing.assert_close(block(x, temb), expected)
    ...     print(report)
    modules on genai_kernels: 3
           2  group norm
           1  ResNet block
    modules left to diffusers: 0
    calls served by genai_kernels: 1
           1  float32, ResNet block
    calls passed on to diffusers: 0
    """
    roots = _roots(model)
    kinds = _kinds()
    modules = [(name, m) for name, m in _walk(roots) if _kind(m) is not None]
    if not modules:
        raise ValueError(
            "genai_kernels.integrations.diffusers.accelerate: model: expected a pipeline or a module with layers of "
            f"diffusers in it, got {type(model).__name__} without any"
        )
    report = Report(roots)
    for name, module in modules:
        kind = kinds.get(norms.original(module))  # None for an activation that is a head's already
        if kind is not None and kind.method not in module.__dict__ and not _is_held(module):
            _take(module, _Mark(report._number, name), kind)
            report._taken.add(module)
    if prepack:
        report._prepack()
    for attn in [m for m in report._taken if keep_prompt and _kind(m) is _OWN[_ATTENTION]]:
        prompts.keep(attn)
    for name, parent in _walk(roots):
        if type(parent) in _classes(_HEADS):
            _take_head(report, name, parent)
    return report


def _take_head(report: Report, name: str, parent: Any) -> None:
    norm, activation = parent.conv_norm_out, parent.conv_act
    if norm is None or norms.original(norm) is not nn.GroupNorm or MARK not in norm.__dict__ or _is_held(activation):
        return
    if "forward" in activation.__dict__ or norms.activation_of(activation) is None:
        return
    prefix = f"{name}." if name else ""
    norm.__dict__[MARK] = _Mark(report._number, f"{prefix}conv_norm_out", activation)
    _take(activation, _Mark(report._number, f"{prefix}conv_act", norm), _ACTIVATION)
    report._taken.add(activation)


def restore(model: Any) -> None:
    """Gives every module of the model that `accelerate` has taken over back to diffusers, as it was before."""
    for _, module in _walk(_roots(model)):
        _give_back(module)
