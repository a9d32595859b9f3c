"""Reads and writes a Llama in the Hugging Face layout: config.json, and safetensors in one file or in shards.

    model = llama_files.load("folder")        # the dtype of the files, or dtype=torch.float32
    llama_files.save(model, "another")        # transformers' from_pretrained opens it

No pickle is read or written. Loading maps the files and copies each tensor once, to where it stays: q, k and v into one
matrix, gate and up into another. So the memory of a load is that of the model, however large the files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from python_models.llama import Llama
from python_models.llama_configs import Config, from_hf, to_hf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
Part = tuple[str, tuple[int, ...]]  # a tensor of the files: its name and shape


def layout(config: Config) -> dict[str, list[Part]]:
    """Our parameters' names -> the tensors of the files that each is made of, stacked along dimension 0."""
    d, width, hidden = config.head_dim, config.width, config.hidden
    q, kv = config.heads * d, config.kv_heads * d
    found: dict[str, list[Part]] = {"embedding.weight": [("model.embed_tokens.weight", (config.vocabulary, width))]}

    def product(ours: str, theirs: list[tuple[str, int]], into: int, bias: bool) -> None:
        found[f"{ours}.weight"] = [(f"{name}.weight", (out, into)) for name, out in theirs]
        if bias:
            found[f"{ours}.bias"] = [(f"{name}.bias", (out,)) for name, out in theirs]

    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        found[f"{ours}.attention_norm.weight"] = [(f"{theirs}.input_layernorm.weight", (width,))]
        parts = [(f"{attention}.{name}_proj", size) for name, size in (("q", q), ("k", kv), ("v", kv))]
        product(f"{ours}.attention.qkv", parts, width, config.qkv_bias)
        product(f"{ours}.attention.out", [(f"{attention}.o_proj", width)], q, config.out_bias)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                found[f"{ours}.attention.{name}.weight"] = [(f"{attention}.{name}.weight", (d,))]
        found[f"{ours}.mlp_norm.weight"] = [(f"{theirs}.post_attention_layernorm.weight", (width,))]
        parts = [(f"{mlp}.gate_proj", hidden), (f"{mlp}.up_proj", hidden)]
        product(f"{ours}.mlp.gate_up", parts, width, config.mlp_bias)
        product(f"{ours}.mlp.down", [(f"{mlp}.down_proj", width)], hidden, config.mlp_bias)
    found["norm.weight"] = [("model.norm.weight", (width,))]
    if not config.tied:
        found["head.weight"] = [("lm_head.weight", (config.vocabulary, width))]
    return found


# ---- reading ----


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"llama_files: expected {path.name} in {path.parent}, found none") from None
    except ValueError as error:
        raise ValueError(f"llama_files: {path}: expected JSON, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"llama_files: {path}: expected an object, got {type(found).__name__}")
    return found


def read_config(folder: str | Path) -> Config:
    """config.json of a folder; see `llama_configs.from_hf` for what is refused."""
    return from_hf(_read_json(Path(folder) / "config.json"))


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if (folder / INDEX).exists():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"llama_files: {folder / INDEX}: expected an object weight_map of file names")
        outside = sorted(n for n in set(names.values()) if Path(n).name != n)
        if outside:
            raise ValueError(f"llama_files: {folder / INDEX}: expected files of this folder, got {outside[0]!r}")
        return [folder / n for n in sorted(set(names.values()))]
    if not (folder / SINGLE).exists():
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        hint = (
            f"; {pickled[0]} is a pickle, which can run any code and is not read: convert it first" if pickled else ""
        )
        raise FileNotFoundError(f"llama_files: expected {SINGLE} or {INDEX} in {folder}, found neither{hint}")
    return [folder / SINGLE]


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except FileNotFoundError:
        raise FileNotFoundError(f"llama_files: {path}: expected a file, as {INDEX} says, found none") from None
    except SafetensorError as error:
        raise ValueError(f"llama_files: {path}: expected a whole safetensors file, got {error}") from None


def _some(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _check(config: Config, tensors: dict[str, Any]) -> None:
    """Names, shapes and dtypes, before anything is read. `tensors`: name -> the open file that has it."""
    expected = dict(part for parts in layout(config).values() for part in parts)
    found = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}  # of old files; computed here
    if config.tied and "lm_head.weight" in found:
        found.remove("lm_head.weight")  # a copy of the embedding, or the config is wrong
        head, embedding = (tensors[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(head, embedding):
            raise ValueError(
                "llama_files: lm_head.weight: expected the embedding, as tie_word_embeddings says, got another; "
                "set tie_word_embeddings to false in config.json"
            )
    missing, unknown = set(expected) - found, found - set(expected)
    if missing or unknown:
        raise ValueError(
            "llama_files: expected the tensors that config.json asks for, got "
            + "; ".join([f"none named {_some(missing)}"] * bool(missing) + [f"also {_some(unknown)}"] * bool(unknown))
        )
    for name, shape in expected.items():
        piece = tensors[name].get_slice(name)
        if tuple(piece.get_shape()) != shape:
            raise ValueError(
                f"llama_files: {name}: expected shape {list(shape)} by config.json, got {list(piece.get_shape())}"
            )
        if piece.get_dtype() not in _DTYPES:
            raise ValueError(
                f"llama_files: {name}: expected one of {', '.join(_DTYPES)}, got {piece.get_dtype()}; "
                "a quantised checkpoint has to be expanded first"
            )


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """A model from a folder of the Hugging Face layout.

    Args:
        folder: has config.json, and model.safetensors or model.safetensors.index.json with its shards.
        dtype: of the weights; None keeps that of each tensor.
        device: where the weights go.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: another architecture, tensors missing or too many, wrong shapes, a broken file.
    """
    folder = Path(folder)
    config = read_config(folder)
    with ExitStack() as stack:
        tensors = {name: file for path in _files(folder) for file in [_open(path, stack)] for name in file.keys()}  # noqa: SIM118
        _check(config, tensors)
        with torch.device("meta"):
            model = Llama(config)
        for name, parts in layout(config).items():
            pieces = [tensors[part].get_tensor(part) for part, _ in parts]  # views of the mapped file
            if len({piece.dtype for piece in pieces}) > 1 and dtype is None:
                raise ValueError(
                    f"llama_files: {parts[0][0]}: expected one dtype with those packed beside it; set dtype"
                )
            rows = sum(len(piece) for piece in pieces)
            whole = torch.empty((rows, *pieces[0].shape[1:]), dtype=dtype or pieces[0].dtype, device=device)
            for into, piece in zip(whole.split([len(piece) for piece in pieces]), pieces, strict=True):
                into.copy_(piece)
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, nn.Parameter(whole))
    if config.tied:
        model.head.weight = model.embedding.weight
    return model


# ---- writing ----


def tensors_of(model: Llama) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the files, as views of the model's parameters."""
    for name, parts in layout(model.config).items():
        whole = model.get_parameter(name).detach()
        yield from zip((p for p, _ in parts), whole.split([shape[0] for _, shape in parts]), strict=True)


def save(model: Llama, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json and the weights: one file, or shards with an index if they are larger than `max_shard_bytes`.

    Each file is written whole under another name first, so that a folder is never left with half a file.

    Raises:
        ValueError: a config that the layout has no words for.
    """
    folder = Path(folder)
    config = dataclasses.replace(model.config, dtype=str(model.embedding.weight.dtype).removeprefix("torch."))
    written = json.dumps(to_hf(config), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, total = 0, 0
    for name, tensor in tensors_of(model):
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / f"{name}.part", metadata={"format": "pt"})
        os.replace(folder / f"{name}.part", folder / name)
    if count > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    (folder / "config.json").write_text(written)
    for old in folder.glob("model*.safetensors"):  # of an earlier save
        if old.name not in names:
            old.unlink()
