"""Two registers that the standard library's source is not, on every machine that this library was built on.

`headers`: the C headers of Python itself, which building an extension needs. `manual`: the reference manual of the
language that `help("for")` prints, reStructuredText as Sphinx writes it in plain text, one topic a file. As for the
source (char_data.py): files in the order of their names, split by a hash of the name, without duplicates, and without
held-out files of which training has a part. No file of either is in what the checkpoint was trained on.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from python_models import char_data
from python_models.llama_data import END, encode


def header_files(root: Path | None = None) -> list[tuple[str, str]]:
    """`(name, text)` of the `.h` files below Python's include folder, or below `root`.

    Raises:
        FileNotFoundError: there are none (a Python without its development files).
    """
    root = Path(sysconfig.get_path("include")) if root is None else root
    paths = sorted(root.rglob("*.h"), key=lambda p: p.relative_to(root).as_posix())
    if not paths:
        raise FileNotFoundError(
            f"lora_data: expected C headers below {root}, found none: install Python's development files"
        )
    return [(p.relative_to(root).as_posix(), _plain(p.read_bytes().decode("utf-8", errors="replace"))) for p in paths]


def manual_topics() -> list[tuple[str, str]]:
    """`(name, text)` of each topic of the manual that pydoc carries.

    Raises:
        FileNotFoundError: a Python without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "lora_data: expected the manual that help() prints (pydoc_data.topics), found none: install the whole "
            "standard library"
        ) from None
    return [(name, _plain(text)) for name, text in sorted(topics.items())]


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace(char_data.SEPARATOR, char_data.UNKNOWN)


# name -> its files, and the share of them that is held out: headers are many and short, topics few
SOURCES: dict[str, tuple[Callable[[], list[tuple[str, str]]], int]] = {
    "headers": (header_files, 8),
    "manual": (manual_topics, 20),
}


@dataclass(frozen=True)
class Register:
    """Text of one kind, in tokens of the checkpoint."""

    name: str
    train: torch.Tensor  # int64 [tokens], END before each file
    held_out: torch.Tensor
    characters: int  # of the held-out text, one for each END too
    about: str

    @staticmethod
    def load(name: str, tokenizer: Tokenizer) -> Register:
        """ValueError for an unknown name; FileNotFoundError where this Python lacks the files."""
        if name not in SOURCES:
            raise ValueError(f"lora_data: register: expected one of {', '.join(SOURCES)}, got {name!r}")
        source, percent = SOURCES[name]
        return Register.of(name, source(), tokenizer, percent)

    def beginning(self, tokens: int, tokenizer: Tokenizer) -> Register:
        """With the first so many tokens of the held-out text."""
        part = self.held_out[:tokens]
        text = tokenizer.decode(part.tolist(), skip_special_tokens=False)
        return dataclasses.replace(self, held_out=part, characters=len(text.replace(END, char_data.SEPARATOR)) - 1)

    @staticmethod
    def of(name: str, files: list[tuple[str, str]], tokenizer: Tokenizer, percent: int) -> Register:
        corpus, texts = char_data.build(files, percent=percent), dict(files)
        train, held_out = ([texts[n] for n in names] for names in (corpus.train_files, corpus.validation_files))
        about = (
            f"{name} of Python {sysconfig.get_python_version()}: {len(train)} files and {len(corpus.train):,} "
            f"characters to train, {len(held_out)} and {len(corpus.validation):,} held out, fingerprint "
            f"{corpus.fingerprint}"
        )
        characters = sum(len(text) + 1 for text in held_out)
        return Register(name, encode(tokenizer, train), encode(tokenizer, held_out), characters, about)
