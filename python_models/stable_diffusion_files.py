"""Reads and writes a UNet or a decoder in diffusers' layout: config.json, and safetensors in one file or in shards.

    unet = stable_diffusion_files.load_unet("stable-diffusion-v1-5/unet")           # or dtype=torch.float32
    decoder = stable_diffusion_files.load_decoder("stable-diffusion-v1-5/vae")

The names are diffusers' own, key for key. Files of before 2023 call the attention of an autoencoder query, key, value
and proj_attn, which are read as well. No pickle is read or written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from python_models import stable_diffusion_configs as configs
from python_models.stable_diffusion_unet import UNet
from python_models.stable_diffusion_vae import Decoder

STEM = "diffusion_pytorch_model"
_CLASSES = {UNet: "UNet2DConditionModel", Decoder: "AutoencoderKL"}
_OF_DECODER = ("decoder.", "post_quant_conv.")  # of an AutoencoderKL, which has an encoder too
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
Model = TypeVar("Model", bound=nn.Module)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"stable_diffusion_files: expected {path.name} in {path.parent}, found none") from None
    except ValueError as error:
        raise ValueError(f"stable_diffusion_files: {path}: expected JSON, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"stable_diffusion_files: {path}: expected an object, got {type(found).__name__}")
    return found


def _files(folder: Path, variant: str) -> list[Path]:
    stem = f"{STEM}.safetensors" if not variant else f"{STEM}.{variant}.safetensors"
    index = folder / (f"{STEM}.safetensors.index.json" if not variant else f"{STEM}.safetensors.index.{variant}.json")
    if index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ValueError(f"stable_diffusion_files: {index}: expected a weight_map of files of this folder")
        return [folder / n for n in sorted(set(names.values()))]
    if not (folder / stem).exists():
        raise FileNotFoundError(f"stable_diffusion_files: expected {stem} or {index.name} in {folder}, found neither")
    return [folder / stem]


def _new_name(name: str) -> str:
    """A tensor's name in today's files."""
    *before, layer, kind = name.split(".")
    if "attentions" in before and layer in _OLD_NAMES:
        return ".".join([*before, _OLD_NAMES[layer], kind])
    return name


def _tensors(paths: list[Path], stack: ExitStack) -> Iterator[tuple[str, Any, str]]:
    """Name, file and name in the file of every tensor."""
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise FileNotFoundError(f"stable_diffusion_files: {path}: expected a file, found none") from None
        except SafetensorError as error:
            raise ValueError(
                f"stable_diffusion_files: {path}: expected a whole safetensors file, got {error}"
            ) from None
        for name in file.keys():  # noqa: SIM118  not a dict
            yield _new_name(name), file, name


def _some(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _load(model: Model, paths: list[Path], wanted: Callable[[str], bool], dtype: torch.dtype | None) -> Model:
    """Fills a model that is on the meta device. Names and shapes are checked before anything is read."""
    with ExitStack() as stack:
        found = {name: (file, theirs) for name, file, theirs in _tensors(paths, stack) if wanted(name)}
        expected = model.state_dict()
        missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
        if missing or unknown:
            raise ValueError(
                "stable_diffusion_files: expected the tensors that config.json asks for, got "
                + "; ".join(
                    [f"none named {_some(missing)}"] * bool(missing) + [f"also {_some(unknown)}"] * bool(unknown)
                )
            )
        read = {}
        for name, (file, theirs) in found.items():
            piece, shape = file.get_slice(theirs), expected[name].shape
            got = tuple(piece.get_shape())
            # those of the old attention are 1x1 convolutions in some files
            if got != shape and not (got[2:] == (1, 1) and got[:2] == shape):
                raise ValueError(f"stable_diffusion_files: {theirs}: expected shape {list(shape)}, got {list(got)}")
            if piece.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"stable_diffusion_files: {theirs}: expected one of {', '.join(_DTYPES)}, got {piece.get_dtype()}"
                )
        for name, (file, theirs) in found.items():
            tensor = file.get_tensor(theirs).view(expected[name].shape)
            read[name] = tensor.to(dtype or tensor.dtype, copy=True)  # or it would be a view of the mapped file
    model.load_state_dict(read, assign=True)
    return model.requires_grad_(True).eval()


def load_unet(folder: str | Path, *, dtype: torch.dtype | None = None, variant: str = "") -> UNet:
    """A UNet from the folder `unet` of a model in diffusers' layout.

    Args:
        folder: has config.json and diffusion_pytorch_model.safetensors, or an index of shards.
        dtype: of the weights; None keeps that of the files.
        variant: "fp16" for diffusion_pytorch_model.fp16.safetensors.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: an option that these UNets do not have, tensors missing or too many, a wrong shape, a broken file.
    """
    folder = Path(folder)
    config = configs.unet_from_diffusers(_read_json(folder / "config.json"))
    with torch.device("meta"):
        model = UNet(config)
    return _load(model, _files(folder, variant), lambda name: True, dtype)


def load_decoder(folder: str | Path, *, dtype: torch.dtype | None = None, variant: str = "") -> Decoder:
    """The decoder from the folder `vae` of a model in diffusers' layout; its encoder is left where it is.

    Args and errors are those of `load_unet`.
    """
    folder = Path(folder)
    config = configs.decoder_from_diffusers(_read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Decoder(config)
    return _load(model, _files(folder, variant), lambda name: name.startswith(_OF_DECODER), dtype)


def save_unet(model: UNet, folder: str | Path) -> None:
    """Writes config.json and the weights, which diffusers' `UNet2DConditionModel.from_pretrained` opens.

    The file is written whole under another name first, so that a folder is never left with half a file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": _CLASSES[UNet], **configs.unet_to_diffusers(model.config)}
    part = folder / f"{STEM}.safetensors.part"
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, part, metadata={"format": "pt"})
    os.replace(part, folder / f"{STEM}.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
