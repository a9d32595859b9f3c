"""What a trained model is good for, in figures: holes filled, halves and surroundings completed, colours given, digits
painted to order; beside what needs no model, and with the spread over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

import genai_kernels as gk
from python_models.diffusion import Sampler, Schedule
from python_models.diffusion_data import Pictures
from python_models.diffusion_masks import TASKS, biharmonic_fill, masked_mse, mean_fill, task_mask
from python_models.digit_judge import Judge, fd_digits, nearest
from python_models.unet import UNet

Say = Callable[[str], Any]


def spread(values: list[float]) -> dict[str, float]:
    """Mean, and half the range."""
    return {"mean": statistics.fmean(values), "half_range": (max(values) - min(values)) / 2}


def start_of(count: int, shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise that so many pictures begin with, and the seeds of their noise on the way."""
    seeds = torch.arange(count) + 1_000_000 * seed
    return gk.seeded_normal(seeds, shape), seeds


def tasks_of(pictures: Pictures) -> tuple[str, ...]:
    return TASKS if pictures.shape[0] > 1 else TASKS[:-1]


def channel_means(pictures: Pictures) -> torch.Tensor:
    """Of the training pictures, `[C]`: for channels of which nothing is known."""
    train = pictures.train
    if isinstance(train, torch.Tensor):
        return train.mean((0, 2, 3))
    return torch.cat([p.flatten(1) for p in train], 1).mean(1)


def _scores(painted: torch.Tensor, truth: torch.Tensor, known: torch.Tensor, judged: Any) -> dict[str, float]:
    found = {"masked_mse": float(masked_mse(painted, truth, known).mean())}
    if judged is not None:
        judge, labels = judged
        found["judge_accuracy"] = judge.accuracy(painted, labels)
    return found


def measure_task(
    model: UNet, schedule: Schedule, pictures: Pictures, task: str, *, every: int = 1, seeds: int = 4, count: int = 50,
    judge: Judge | None = None, say: Say = str,
) -> dict[str, Any]:  # fmt: skip
    """Masked MSE, and of digits the judge's accuracy, on every so-many-th held-out picture.

    "told": one sample of the model that knows what is known; "expected": what it expects before its first step, the
    mean of all that it could paint, which a squared error favours over any one sample; "mean of samples": of those of
    all seeds; "replaced": the known parts only put in their place at every step.
    """
    truth = pictures.held_out[::every]
    judged = None
    if judge is not None and pictures.held_out_labels is not None:
        judged = judge, pictures.held_out_labels[::every]
    known = task_mask(task, pictures.shape)[None]
    means = channel_means(pictures)
    found: dict[str, Any] = {"pictures": len(truth), "steps": count, "seeds": seeds}
    if judged is not None:
        found["truth"] = {"judge_accuracy": judged[0].accuracy(truth, judged[1])}
    found["mean fill"] = _scores(mean_fill(truth, known, means), truth, known, judged)
    if task != "colour":  # nothing of a colour is known
        found["biharmonic"] = _scores(biharmonic_fill(truth, known, means), truth, known, judged)
    for name, steps, telling in (("told", count, True), ("expected", 1, True), ("replaced", count, False)):
        sampler = Sampler(schedule, steps, largest=pictures.largest, telling=telling)
        scores, total = [], torch.zeros_like(truth)
        for seed in range(seeds):
            say(f"{task}, {name}, seed {seed}")
            painted = sampler.paint(model, *start_of(len(truth), pictures.shape, seed), x0=truth, known=known)
            assert torch.equal(torch.where(known > 0, painted, truth), truth)  # what is known stays
            scores.append(_scores(painted, truth, known, judged))
            total += painted
        found[name] = {key: spread([s[key] for s in scores]) for key in scores[0]}
        if name == "told":
            found["mean of samples"] = _scores(total / seeds, truth, known, judged)
    return found


def gaussian_digits(train: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Digits of a Gaussian with the mean and the covariance of the training pictures' pixels."""
    flat = train.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    start, _ = start_of(count, (1, 8, 8), seed)
    drawn = flat.mean(0) + start.flatten(1).double() * values.clamp(min=0).sqrt() @ vectors.T
    return drawn.float().clamp(-1, 1).view(-1, 1, 8, 8)


SAMPLERS = {
    "ddim 10": {"count": 10},
    "ddim 50": {"count": 50},
    "ddpm 50": {"count": 50, "eta": 1.0},
    "ddim 50, guidance 2": {"count": 50, "guidance": 2.0},
}


def measure_samples(
    model: UNet, schedule: Schedule, pictures: Pictures, judge: Judge, *, seeds: int = 3, say: Say = str
) -> dict[str, Any]:
    """Digits painted to order, as many of each as are held out: does the judge see the digit that was asked for, how
    far is their distribution from that of the training digits (FD-digits), and how near is the nearest of those.
    """
    assert isinstance(pictures.train, torch.Tensor)
    assert pictures.held_out_labels is not None
    train, labels = pictures.train, pictures.held_out_labels

    def score(painted: torch.Tensor) -> dict[str, float]:
        return {
            "judge_accuracy": judge.accuracy(painted, labels), "fd_digits": fd_digits(judge, painted, train),
            "nearest": float(nearest(painted, train).median()), "copies": float((nearest(painted, train) < 0.5).sum()),
        }  # fmt: skip

    found: dict[str, Any] = {
        "count": len(labels), "seeds": seeds,
        "held-out digits": {key: spread([value]) for key, value in score(pictures.held_out).items()},
    }  # fmt: skip
    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "Gaussian of the pixels": lambda seed: gaussian_digits(train, len(labels), seed)
    }
    for name, options in SAMPLERS.items():
        sampler = Sampler(schedule, **options)
        ways[name] = lambda seed, sampler=sampler: sampler.paint(
            model, *start_of(len(labels), pictures.shape, seed), label=labels
        )
    for name, paint in ways.items():
        scores = []
        for seed in range(seeds):
            say(f"{name}, seed {seed}")
            scores.append(score(paint(seed)))
        found[name] = {key: spread([s[key] for s in scores]) for key in scores[0]}
    if not all(math.isfinite(one["fd_digits"]["mean"]) for one in found.values() if isinstance(one, dict)):
        raise RuntimeError("measure_samples: a Frechet distance is not finite")
    return found
