"""Adapters in files of PEFT's layout: adapter_config.json and adapter_model.safetensors, read and written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .lora import LoRALinear, MultiLoRALinear

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Parts of PEFT's configuration that these layers have no counterpart of, and what says that they are not used.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None), "fan_in_fan_out": (False, None), "bias": ("none", None),
    "modules_to_save": (None, []), "target_parameters": (None, []), "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []), "use_qalora": (False, None), "use_bdlora": (False, None, {}),
    "layer_replication": (None, []),
}  # fmt: skip


def add_lora(model: torch.nn.Module, target_modules: Iterable[str], **options: Any) -> list[str]:
    """Puts a `LoRALinear` in the place of every linear layer whose name is, or ends with a dot and, one of these.

    Args:
        target_modules: as in PEFT's LoraConfig: `["qkv", "out"]`.
        options: of `LoRALinear`. All other parameters of the model are frozen, as the layers' own are.

    Returns:
        The names of the layers, in the model's order.

    Raises:
        ValueError: a target that names no linear layer.

    >>> import torch
    >>> from genai_kernels.nn import add_lora
    >>> add_lora(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), ["2"], r=2)
    ['2']
    """
    found = []
    for target in (targets := list(target_modules)):
        names = [n for n, m in model.named_modules() if _fits(target, n) and isinstance(m, torch.nn.Linear)]
        if not names:
            raise ValueError(f"add_lora: target_modules: expected the name of a linear layer, got {target!r}")
        found += names
    model.requires_grad_(False)
    for name in dict.fromkeys(found):
        _put(model, name, LoRALinear.from_linear(_linear(model, name), **options))
    return [n for n, m in model.named_modules() if isinstance(m, LoRALinear) and any(_fits(t, n) for t in targets)]


def save_adapter(model: torch.nn.Module, folder: str | Path) -> None:
    """Writes the adapters of all `LoRALinear` of a model as PEFT's `save_pretrained` does.

    Raises:
        ValueError: a model without such a layer; layers that differ in dropout, rsLoRA or DoRA, which PEFT has one of;
            a merged layer.
        ImportError: without the package safetensors.
    """
    from safetensors.torch import save_file

    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("save_adapter: model: expected a LoRALinear in it, got none")
    shared = {(m.lora_dropout, m.use_rslora, m.use_dora) for m in layers.values()}
    if len(shared) > 1:
        raise ValueError(
            f"save_adapter: model: expected one lora_dropout, use_rslora and use_dora, got {sorted(shared)}"
        )
    (dropout, rslora, dora), folder = shared.pop(), Path(folder)
    r = Counter(m.r for m in layers.values()).most_common(1)[0][0]
    alpha = Counter(m.lora_alpha for m in layers.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
        "fan_in_fan_out": False, "r": r, "lora_alpha": alpha, "lora_dropout": dropout,
        "use_rslora": rslora, "use_dora": dora,
        "target_modules": sorted(layers),
        "rank_pattern": {name: m.r for name, m in layers.items() if m.r != r},
        "alpha_pattern": {name: m.lora_alpha for name, m in layers.items() if m.lora_alpha != alpha},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {}
    for name, m in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = m.lora_A.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = m.lora_B.detach().contiguous()
        if m.lora_magnitude_vector is not None:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = m.lora_magnitude_vector.detach().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: torch.nn.Module, folder: str | Path, name: str = "default") -> list[str]:
    """Reads an adapter that PEFT or `save_adapter` wrote into a model.

    A `MultiLoRALinear` gets it under `name`, a `LoRALinear` in the place of its own, and a plain linear layer becomes a
    `LoRALinear`.

    Returns:
        The names of the layers that got it.

    Raises:
        FileNotFoundError: a file that is not there.
        NotImplementedError: a variant of LoRA that these layers are not (trained biases, ...), by its name; DoRA for a
            `MultiLoRALinear`.
        ValueError: tensors without a layer, of another shape, or without their pair.
        ImportError: without the package safetensors.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    if config.get("peft_type", "LORA") != "LORA":
        raise NotImplementedError(f"load_adapter: peft_type: expected LORA, got {config['peft_type']}")
    for key, unused in _ABSENT.items():
        if key in config and config[key] not in unused:
            raise NotImplementedError(f"load_adapter: {key}: expected {unused[0]}, got {config[key]}")
    tensors = load_file(folder / WEIGHTS)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + rf"(.*)\.(lora_A|lora_B|{MAGNITUDE})(\.weight)?", key)
        if not match:
            raise ValueError(f"load_adapter: {WEIGHTS}: expected names of lora_A and lora_B, got {key}")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    layers, dora = {layer: _linear(model, layer) for layer in pairs}, bool(config.get("use_dora"))
    for layer, pair in pairs.items():
        linear = layers[layer]
        names = ["lora_A", "lora_B", *([MAGNITUDE] if dora else [])]
        if sorted(pair) != names:
            raise ValueError(f"load_adapter: {layer}: expected {' and '.join(names)}, got {' and '.join(sorted(pair))}")
        r, found = len(pair["lora_A"]), [list(pair[k].shape) for k in names]
        shapes = [[r, linear.in_features], [linear.out_features, r], [linear.out_features]][: len(names)]
        if found != shapes:
            raise ValueError(f"load_adapter: {layer}: expected {names} of shapes {shapes}, r of any size, got {found}")
        if dora and isinstance(linear, MultiLoRALinear):
            raise NotImplementedError(f"load_adapter: use_dora: expected False for {layer}, of many adapters, got True")
    for layer, pair in pairs.items():
        linear, r = layers[layer], len(pair["lora_A"])
        alpha = next((a for p, a in (config.get("alpha_pattern") or {}).items() if _fits(p, layer)), None)
        alpha, rslora = config.get("lora_alpha", 8) if alpha is None else alpha, bool(config.get("use_rslora"))
        if isinstance(linear, MultiLoRALinear):
            linear.add_adapter(name, pair["lora_A"], pair["lora_B"], alpha, rslora)
            continue
        new = LoRALinear.from_linear(
            linear, r=r, lora_alpha=alpha, use_rslora=rslora, adapter_dtype=pair["lora_A"].dtype,
            lora_dropout=config.get("lora_dropout") or 0.0, use_dora=dora,
        )  # fmt: skip
        with torch.no_grad():
            for key, tensor in pair.items():
                getattr(new, key).copy_(tensor)
        _put(model, layer, new)
    return list(pairs)


def _fits(pattern: str, name: str) -> bool:
    """PEFT's rule: the whole name, or its end after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _linear(model: torch.nn.Module, name: str) -> torch.nn.Linear:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, torch.nn.Linear):
        raise ValueError(f"load_adapter: {name}: expected a linear layer of the model, got {type(found).__name__}")
    return found


def _put(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
