"""Samples, benchmark cases and peers of fused_adamw_ and global_norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from ...registry import Make, Sample

Call = tuple[tuple[Any, ...], dict[str, Any]]
SHAPES = ((33, 7), (5,), (), (1,), (0,), (20000,), (3, 2, 5))


def step(
    m: Make,
    shapes: Sequence[Sequence[int]] = SHAPES,
    *,
    narrow: bool = True,  # parameters of the sample's dtype; otherwise float32
    grads: Callable[..., torch.Tensor] | None = None,
    first: bool = False,
    master: bool = False,
    ema: bool = False,
    **options: Any,
) -> Call:
    """A call of fused_adamw_ in the middle of a training run, or at its beginning."""
    params = [m(*s) if narrow else m.float32(*s) for s in shapes]
    gradients = [(grads or (m if narrow else m.float32))(*s) for s in shapes]
    moments = [m.float32(*s, scale=0.1) for s in shapes], [m.float32(*s).square() for s in shapes]
    if first:
        for t in (*moments[0], *moments[1]):
            t.zero_()
    if master:
        options["masters"] = [
            p.to(t.dtype) + 1e-4 * m.float32(*p.shape) for p, t in zip(params, moments[0], strict=True)
        ]
    if ema:
        options["emas"] = [m.float32(*s) for s in shapes]
    return (params, gradients, *moments), {"step": 1 if first else 7, **options}


def _transposed(m: Make) -> Call:
    """Channels last, and a transposed matrix: any order of the dimensions, the same for all."""
    (lists, options) = step(m, [(4, 3, 5, 5), (9, 40)])
    for tensors in lists:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        tensors[1] = tensors[1].T
    return lists, options


def _mixed(m: Make) -> Call:
    """Parameters of two dtypes in one call."""
    lists, options = step(m, [(40, 3), (17,)], max_norm=0.5)
    lists[0][1], lists[1][1] = m.float32(17), m.float32(17)
    return lists, options


def _with_norm(m: Make, value: float) -> Call:
    call = step(m, max_norm=1.0)
    return call[0], {**call[1], "grad_norm": torch.tensor(value)}


SAMPLES = [
    Sample("plain", lambda m: step(m)),
    Sample("first_step", lambda m: step(m, first=True)),
    Sample("no_decay", lambda m: step(m, weight_decay=0.0, lr=0.1, eps=1e-3)),
    Sample("other_betas", lambda m: step(m, betas=(0.0, 0.95), lr=3e-4, weight_decay=0.5)),
    Sample("maximize", lambda m: step(m, maximize=True)),
    Sample("clipped", lambda m: step(m, max_norm=1.0)),
    Sample("below_the_limit", lambda m: step(m, max_norm=1e4)),
    Sample("norm_given", lambda m: _with_norm(m, 30.0)),
    Sample("norm_infinite", lambda m: _with_norm(m, float("inf"))),
    Sample("grads_float32", lambda m: step(m, grads=m.float32, max_norm=1.0)),
    Sample("master", lambda m: step(m, master=True)),
    Sample("ema", lambda m: step(m, ema=True, ema_decay=0.9)),
    Sample("everything", lambda m: step(
        m, master=True, ema=True, max_norm=1.0, maximize=True, betas=(0.8, 0.99), ema_decay=0.5, eps=1e-6)),
    Sample("large_gradients", lambda m: step(m, grads=lambda *s: m(*s, scale=5e3), max_norm=1.0)),
    Sample("transposed", _transposed),
    Sample("mixed", _mixed),
    Sample("none", lambda m: step(m, [], max_norm=1.0)),
]  # fmt: skip

_MILLION = 1 << 20


def _bench(
    name: str, shapes: Sequence[Sequence[int]], elements: float, peers: tuple[str, ...], **options: Any
) -> Sample:
    count = sum(torch.Size(s).numel() for s in shapes)
    return Sample(name, lambda m: step(m, shapes, **options), bench=True, elements=elements * count, peers=peers)


# Read: parameter, gradient and two moments; written: all but the gradient. A norm reads the gradient once more.
_LAYERS = [(2048, 2048)] * 4
_SMALL = [(256, 256), (256,)] * 60
SAMPLES += [
    _bench("f32_16M", _LAYERS, 7.0, ("fused", "foreach"), narrow=False),
    _bench("f32_16M_clipped", _LAYERS, 8.0, ("eager",), narrow=False, max_norm=1.0),
    _bench("f32_120_small", _SMALL, 7.0, ("fused", "foreach"), narrow=False),
    _bench("16M", _LAYERS, 7.0, ("eager",)),
]


def _norms(m: Make, *shapes: Sequence[int], scale: float = 1.0) -> Call:
    return ([m(*s, scale=scale) for s in shapes],), {}


NORM_SAMPLES = [
    Sample("plain", lambda m: _norms(m, *SHAPES)),
    Sample("one", lambda m: _norms(m, (1,))),
    Sample("many_pieces", lambda m: _norms(m, (40000,), (16384,), (16385,))),
    Sample("large", lambda m: _norms(m, (70, 30), scale=5e3)),
    Sample("transposed", lambda m: (([m(9, 40).T],), {})),
    Sample("16M", lambda m: _norms(m, *_LAYERS), bench=True, elements=16.0 * _MILLION),
]


def torch_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm(tensors)


def _torch_adamw(**how: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """torch.optim.AdamW's own function, on float32."""

    def run(params, grads, exp_avgs, exp_avg_sqs, *, step):
        steps = [torch.tensor(float(step - 1)) for _ in params]
        adamw(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, **how, amsgrad=False, beta1=0.9, beta2=0.999, lr=1e-3,
            weight_decay=1e-2, eps=1e-8, maximize=False,
        )  # fmt: skip
        return (*params, *exp_avgs, *exp_avg_sqs)

    return run


PEERS = {"fused": _torch_adamw(fused=True), "foreach": _torch_adamw(foreach=True)}
NORM_PEERS = {"get_total_norm": torch_norm}
