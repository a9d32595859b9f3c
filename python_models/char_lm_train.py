"""Training and evaluation of the character LM, and the comparison of a training run with its eager twins.

A twin is the same model, from the same weights, on the same batches, computed by the plain PyTorch composition: in the
same dtype (`eager`) and in float64 (`exact`). The rule that the loss curves are held against is `Agreement`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import genai_kernels as gk
from python_models import char_data
from python_models.char_lm import CharLM, Config


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    steps: int
    batch: int = 2
    peak_rate: float = 2e-3
    warmup: int = 20
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: up in a line, then down along a cosine to a tenth."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


@dataclass
class Run:
    """One training run that is taken step by step."""

    model: CharLM
    recipe: Recipe
    text: torch.Tensor
    backend: str = "auto"
    losses: list[float] = field(default_factory=list)  # nats per character
    seconds: list[float] = field(default_factory=list)  # each step's

    def __post_init__(self) -> None:
        decayed = [w for w in self.model.parameters() if w.dim() >= 2]
        others = [w for w in self.model.parameters() if w.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        self.batches = char_data.batches(self.text, self.recipe.batch, self.model.config.context, self.recipe.seed)

    def step(self) -> float:
        """Takes one step and returns its loss."""
        characters, following = next(self.batches)
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(len(self.losses))
        with gk.use_backend(self.backend):
            loss = self.model.loss(characters, following)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)
        return self.losses[-1]

    @property
    def tokens_per_second(self) -> float:
        """From the median step."""
        return self.recipe.batch * self.model.config.context / float(torch.tensor(self.seconds).median())


def new_model(config: Config, seed: int) -> CharLM:
    torch.manual_seed(seed)
    return CharLM(config)


def new_run(config: Config, recipe: Recipe, text: torch.Tensor, **options: str) -> Run:
    """A run from the weights that the recipe's seed gives."""
    return Run(new_model(config, recipe.seed), recipe, text, **options)


def eager_twin(run: Run) -> Run:
    """A run that begins where `run` stands before its first step, in plain PyTorch."""
    return Run(copy.deepcopy(run.model), run.recipe, run.text, backend="reference")


def exact_twin(run: Run) -> Run:
    """The same in float64: from the same weights, rounded to float32 as they are."""
    return Run(copy.deepcopy(run.model).double(), run.recipe, run.text, backend="reference")


@dataclass(frozen=True)
class Agreement:
    """Ours beside eager, both measured from float64, at each step t of the curves:

        `|ours - exact|(t) <= K max_{s <= max(t, 9)} |eager - exact|(s) + u exact(t)`, u = 2^-24.

    It is the rule that every op is held against, with another K, over ten steps at least: one error may be 0 by chance.
    A rounding error grows from step to step, in eager just as in ours, so a whole curve is one draw from a distribution
    of errors. K is the least with which eager runs that differ only in the order of the rows of each batch agree with
    each other, rounded up: `python -m python_models.char_lm calibrate --seeds 8` found 6.21 in 448 pairs of curves (120
    steps of a small model).
    """

    error: list[float]  # |ours - exact|, nats
    eager_error: list[float]  # |eager - exact|
    limit: list[float]

    K = 7.0

    @property
    def ok(self) -> bool:
        return all(e <= limit for e, limit in zip(self.error, self.limit, strict=True))  # false for NaN

    @property
    def first_excess(self) -> int | None:
        """The first step that breaks the rule."""
        for i, (e, limit) in enumerate(zip(self.error, self.limit, strict=True)):
            if not e <= limit:
                return i
        return None


def _largest_so_far(errors: torch.Tensor, least: int = 10) -> torch.Tensor:
    """At each step, the largest error up to there, and up to step `least` in any case."""
    return errors.cummax(dim=0).values.clamp(min=float(errors[:least].max()))


def agreement(ours: list[float], eager: list[float], exact: list[float]) -> Agreement:
    """Holds three loss curves of equal length against the rule. A curve that is not finite never agrees."""
    a, b, ref = (torch.tensor(c, dtype=torch.float64) for c in (ours, eager, exact))
    error, eager_error = (a - ref).abs(), (b - ref).abs()
    limit = Agreement.K * _largest_so_far(eager_error) + 2.0**-24 * ref.abs()
    return Agreement(error.tolist(), eager_error.tolist(), limit.tolist())


def scored_pieces(text: torch.Tensor, context: int, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Where evaluation reads: starts of pieces of `context + 1` characters that overlap by a quarter, which is read but
    not scored, so that each scored character has that much before it. At most `most` pieces, evenly spread.

    Returns:
        starts `[pieces]` and the places of the scored characters in the text, `[pieces, scored]`.
    """
    unscored = context // 4
    starts = torch.arange(0, len(text) - context, context - unscored)
    if most is not None and len(starts) > most:
        starts = starts[torch.linspace(0, len(starts) - 1, most).long()]
    return starts, starts[:, None] + torch.arange(unscored + 1, context + 1)


@torch.inference_mode()
def bits(model: CharLM, text: torch.Tensor, context: int, most: int | None = None, batch: int = 4) -> torch.Tensor:
    """Bits of each scored character (see `scored_pieces`), `[pieces, scored]`."""
    starts, _ = scored_pieces(text, context, most)
    unscored, found = context // 4, []
    for some in starts.split(batch):
        piece = text[some[:, None] + torch.arange(context + 1)]
        logits = model(piece[:, :-1])[:, unscored:]
        nats = F.cross_entropy(logits.flatten(0, 1), piece[:, unscored + 1 :].flatten(), reduction="none")
        found.append(nats.view(len(some), -1) / math.log(2))
    return torch.cat(found)


def calibrate(config: Config, recipe: Recipe, text: torch.Tensor, runs: int = 8) -> float:
    """The least K of `Agreement` with which eager runs with differently ordered batch rows agree with each other."""

    def shuffled(batches: Iterator, generator: torch.Generator) -> Iterator:
        for characters, following in batches:
            order = torch.randperm(len(characters), generator=generator)
            yield characters[order], following[order]

    first = new_run(config, recipe, text)
    exact = exact_twin(first)
    twins = [eager_twin(first) for _ in range(runs)]
    for i, twin in enumerate(twins):
        twin.batches = shuffled(twin.batches, torch.Generator().manual_seed(i))
    for _ in range(recipe.steps):
        for run in (exact, *twins):
            run.step()
    ref = torch.tensor(exact.losses, dtype=torch.float64)
    errors = (torch.tensor([t.losses for t in twins], dtype=torch.float64) - ref).abs()
    floor, least = 2.0**-24 * ref.abs(), 0.0
    for i in range(runs):
        ratio = (errors - floor) / _largest_so_far(errors[i])
        least = max(least, float(ratio[torch.arange(runs) != i].max()))
    return least
