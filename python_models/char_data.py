"""Characters of Python's own standard library: text that every machine with Python has, and nothing to download.

Files are put in order by name and into training or validation by a hash of their name, so that the split is the same on
every machine and for a new file nothing else moves. Test code, installed packages and files that a build generates are
left out, and so is every validation file of which a part stands in training too.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SEPARATOR = "\0"  # before every file; its own character of the vocabulary
UNKNOWN = "\ufffd"  # <unk>: every character that training has fewer than `min_count` times
SHINGLE = 64  # characters: as long as a passage is when it counts as the same text
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip", "pydoc_data"}


def stdlib_files(root: Path) -> Iterator[tuple[str, str]]:
    """`(name, text)` of each source file below `root`, in the order of their names."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata")
        if not generated and _SKIPPED.isdisjoint(name.parts) and not name.parts[0].startswith("config-"):
            text = path.read_bytes().decode("utf-8", errors="replace")
            yield name.as_posix(), text.replace("\r\n", "\n").replace(SEPARATOR, UNKNOWN)


def is_validation(name: str, percent: int = 8) -> bool:
    """The split: by a hash of the file's name, whatever the other files are."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < percent


def shingles(text: str) -> np.ndarray:
    """A 64-bit hash of each passage of SHINGLE characters, one for every place that it can begin at."""
    h = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
    if len(h) < SHINGLE:
        return np.empty(0, dtype=np.uint64)
    length, factor = 1, 0x9E3779B97F4A7C15
    while length < SHINGLE:  # the hash of 2n characters from two hashes of n; arithmetic modulo 2^64
        h = h[:-length] * np.uint64(factor) + (h[length:] ^ (h[length:] >> np.uint64(29)))
        length, factor = 2 * length, factor * factor % 2**64
    return h


def overlap(text: str, known: np.ndarray) -> float:
    """The share of the text's passages that are among the `known` (sorted) hashes."""
    h = shingles(text)
    if not len(h) or not len(known):
        return 0.0
    return float((known[np.searchsorted(known, h).clip(max=len(known) - 1)] == h).mean())


@dataclass
class Corpus:
    """Training and validation text as numbers, `[characters]` int64 each."""

    train: torch.Tensor
    validation: torch.Tensor
    vocabulary: list[str]
    train_files: list[str]
    validation_files: list[str]
    dropped_files: list[str]  # validation files that were left out because training has a part of them
    overlap: float  # the largest share of a validation file's passages that training has

    def decode(self, numbers: torch.Tensor) -> str:
        return "".join(self.vocabulary[int(i)] for i in numbers)

    def encode(self, text: str) -> torch.Tensor:
        return _encode(text, self.vocabulary)

    @property
    def fingerprint(self) -> str:
        """The same where training and validation are the same."""
        digest = hashlib.sha256("".join(self.vocabulary).encode())
        for numbers in (self.train, self.validation):
            digest.update(numbers.numpy().astype(np.uint16).tobytes())
        return digest.hexdigest()[:12]


def _encode(text: str, vocabulary: list[str]) -> torch.Tensor:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    table = np.full(0x110000, vocabulary.index(UNKNOWN), dtype=np.int64)
    table[[ord(c) for c in vocabulary]] = range(len(vocabulary))
    return torch.from_numpy(table[codes])


def build(files: list[tuple[str, str]], max_overlap: float = 0.1, min_count: int = 100, percent: int = 8) -> Corpus:
    """Splits files into training and validation and numbers their characters.

    Args:
        files: `(name, text)` pairs.
        max_overlap: a validation file with a larger share of its 64-character passages in training is left out.
        min_count: a character that training has less often becomes `<unk>`.
        percent: the share of validation, of files that are many.

    Raises:
        ValueError: training or validation would be empty.
    """
    train, seen = [], set()
    for name, text in files:
        if not is_validation(name, percent) and text not in seen and text.strip():
            seen.add(text)
            train.append((name, text))
    train_text = "".join(SEPARATOR + text for _, text in train)
    known = np.sort(shingles(train_text))

    kept, dropped, largest = [], [], 0.0
    for name, text in files:
        if not is_validation(name, percent) or not text.strip():
            continue
        share = overlap(text, known)
        if share > max_overlap or text in train_text or text in seen:
            dropped.append(name)
            continue
        seen.add(text)
        kept.append((name, text))
        largest = max(largest, share)
    if not train or not kept:
        raise ValueError(f"char_data: expected files for both parts, got {len(train)} and {len(kept)}")

    characters, counts = np.unique(np.frombuffer(train_text.encode("utf-32-le"), dtype=np.uint32), return_counts=True)
    frequent = {chr(c) for c, n in zip(characters, counts, strict=True) if n >= min_count}
    vocabulary = [SEPARATOR, UNKNOWN, *sorted(frequent - {SEPARATOR, UNKNOWN})]
    return Corpus(
        train=_encode(train_text, vocabulary),
        validation=_encode("".join(SEPARATOR + text for _, text in kept), vocabulary),
        vocabulary=vocabulary,
        train_files=[name for name, _ in train],
        validation_files=[name for name, _ in kept],
        dropped_files=dropped,
        overlap=largest,
    )


def load(root: Path | None = None) -> Corpus:
    """The standard library of the running Python, or the `.py` files below `root`.

    Raises:
        FileNotFoundError: there are no source files (a Python that carries its library in an archive).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = list(stdlib_files(root))
    if not files:
        raise FileNotFoundError(f"char_data: expected Python source files below {root}, found none")
    return build(files)


def batches(text: torch.Tensor, batch: int, length: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random passages: `(characters, the characters after them)`, `[batch, length]` each; the seed decides which."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        start = torch.randint(len(text) - length, (batch, 1), generator=generator)
        passage = text[start + offsets]
        yield passage[:, :-1], passage[:, 1:]
