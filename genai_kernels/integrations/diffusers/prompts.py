"""The keys and values of a prompt, computed at the first step of a sampler and kept for the others.

Kept for one text of each layer, and used again only if the text and the weights are the very tensors they were made of,
with the same version counters: PyTorch raises these at each change in place, but for one through `.data`, which nothing
shows. So it has to be asked for.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from .calls import PLAIN, autocast, why_not_plain


class _Kept(NamedTuple):
    sources: list[tuple[Any, int, int]]  # of each tensor: a weak reference, its version, its address
    cast: torch.dtype | None  # of autocast
    k: torch.Tensor
    v: torch.Tensor


# The layers that keep them, and what they have.
_kept: weakref.WeakKeyDictionary[nn.Module, _Kept | None] = weakref.WeakKeyDictionary()


def keep(attn: nn.Module) -> None:
    """Has the keys and values of a layer's text kept from its next call on."""
    _kept[attn] = None


def forget(attn: nn.Module) -> None:
    _kept.pop(attn, None)


def _sources(attn: Any, text: torch.Tensor) -> list[torch.Tensor] | None:
    """All that the keys and values follow from; None where something else may have a part in them."""
    layers = (attn.to_k, attn.to_v)
    if any(why_not_plain("a layer", layer, nn.Linear) for layer in layers):
        return None
    tensors = [text, *(t for layer in layers for t in (layer.weight, layer.bias) if t is not None)]
    if any(type(t) not in PLAIN or t.is_inference() for t in tensors):  # an inference tensor has no version
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    return tensors


def keys_and_values(attn: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """What to_k and to_v make of the text, and whether it had been kept."""
    if torch.compiler.is_compiling() or attn not in _kept:
        return attn.to_k(text), attn.to_v(text), False
    tensors, cast, kept = _sources(attn, text), autocast(text), _kept[attn]
    if tensors is None:
        _kept[attn] = None
        return attn.to_k(text), attn.to_v(text), False
    if kept is not None and kept.cast == cast and len(kept.sources) == len(tensors):
        pairs = zip(kept.sources, tensors, strict=True)
        if all(r() is t and (version, at) == (t._version, t.data_ptr()) for (r, version, at), t in pairs):
            return kept.k, kept.v, True
    k, v = attn.to_k(text), attn.to_v(text)
    if k.is_inference():  # made in inference mode, where it may not be used outside of it
        _kept[attn] = None
        return k, v, False
    layer = weakref.ref(attn)

    def end(_: object) -> None:
        """The text is gone: so are its keys and values."""
        if (still := layer()) is not None and still in _kept:
            _kept[still] = None

    references = [weakref.ref(tensors[0], end), *(weakref.ref(t) for t in tensors[1:])]
    sources = [(r, t._version, t.data_ptr()) for r, t in zip(references, tensors, strict=True)]
    _kept[attn] = _Kept(sources, cast, k, v)
    return k, v, False
