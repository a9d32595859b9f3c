"""The standard library as tokens: a byte-level BPE learned from its training files, and texts encoded with it.

The files and their split are those of char_data: by a hash of the name, without test code, and without validation files
of which training has a part.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from python_models import char_data

END = "<|endoftext|>"  # before and after every file: number 0


@dataclass
class Texts:
    """Files as they are, in the order of their names."""

    train: list[str]
    validation: list[str]
    about: str  # one line: how many, and which Python's

    @staticmethod
    def load(root: Path | None = None) -> Texts:
        root = Path(sysconfig.get_path("stdlib")) if root is None else root
        files = dict(char_data.stdlib_files(root))
        corpus = char_data.build(list(files.items()))
        train, validation = ([files[n] for n in names] for names in (corpus.train_files, corpus.validation_files))
        about = (
            f"Python {sysconfig.get_python_version()}, {len(train)} files to train, {len(validation)} held out, "
            f"fingerprint {corpus.fingerprint}"
        )
        return Texts(train, validation, about)


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE: any text has an encoding, and decoding gives it back. The same texts give the same tokenizer.

    Source: Sennrich et al., "Neural machine translation of rare words with subword units", 2016; bytes as in GPT-2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """int64 `[tokens]`: all texts, END before each and after the last."""
    numbers = [tokenizer.token_to_id(END)]
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        numbers += [*encoding.ids, numbers[0]]
    return torch.tensor(numbers)
