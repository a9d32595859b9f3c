"""What the character LM's programs say: lines, tables and texts that several of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from genai_kernels.cli.console import print_table, say
from python_models import char_data
from python_models.char_lm import CharLM
from python_models.char_lm_speed import OURS, Speed
from python_models.char_lm_train import scored_pieces
from python_models.kneser_ney import KneserNey

Table = tuple[Sequence[str], list[tuple[object, ...]]]


def in_bits(losses: Sequence[float]) -> list[float]:
    """Nats to bits."""
    return [x / math.log(2) for x in losses]


def corpus_line(corpus: char_data.Corpus) -> str:
    return (
        f"{len(corpus.train):,} characters of {len(corpus.train_files)} files to train, {len(corpus.validation):,} of "
        f"{len(corpus.validation_files)} to validate ({len(corpus.dropped_files)} left out because training has a part "
        f"of them; at most {100 * corpus.overlap:.1f} % of the passages of {char_data.SHINGLE} characters of a file "
        f"are in training too), {len(corpus.vocabulary)} symbols, fingerprint {corpus.fingerprint}"
    )


def kneser_ney_bits(corpus: char_data.Corpus, context: int, most: int | None = None) -> float:
    """The 5-gram baseline, from all the training text, on the very characters that the model is scored on."""
    model = KneserNey(corpus.train.numpy(), len(corpus.vocabulary))
    every = -torch.from_numpy(model.probabilities(corpus.validation.numpy())).log2()
    return float(every[scored_pieces(corpus.validation, context, most)[1]].mean())


def sample_text(model: CharLM, corpus: char_data.Corpus, count: int, beginning: str = "\0def ") -> str:
    """Text that the model writes after a beginning."""
    prompt = corpus.encode(beginning)[None]
    written = torch.stack(list(model.generate(prompt, count, temperature=0.7)))[:, 0]
    return beginning.lstrip("\0") + corpus.decode(written).replace("\0", "\n")


def speed_table(speed: Speed) -> Table:
    """Characters per second of each contestant, and how many times longer it takes than ours."""
    rows: list[tuple[object, ...]] = []
    for name, rate in speed.median.items():
        quartiles = f"{speed.low[name]:,.0f} .. {speed.high[name]:,.0f}"
        rows.append((name, f"{rate:,.0f}", quartiles, f"{speed.median[OURS] / rate:.2f}x"))
    rows += [(name, "-", reason, "-") for name, reason in speed.failed.items()]
    return ("", "characters/s", "quartiles", "time / our time"), rows


def print_speed(title: str, speed: Speed) -> None:
    columns, rows = speed_table(speed)
    print_table(title, columns, rows, right=(1, 2, 3))


def announce(title: str) -> None:
    say(f"\n{title}", "bold")
