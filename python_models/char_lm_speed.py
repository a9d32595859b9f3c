"""How fast the character LM trains and generates: ours, the eager reference, PyTorch's own attention, torch.compile.

All contestants compute the same model on the same characters, in turn; what has a speed was checked before.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

import genai_kernels as gk
from python_models.char_data import batches
from python_models.char_lm import CharLM, Config
from python_models.char_lm_train import Agreement, Recipe, Run, new_model

OURS, EAGER, SDPA, COMPILED = "ours", "eager", "eager with SDPA", "torch.compile of eager"


@functools.lru_cache(maxsize=4)
def _window_mask(queries: int, keys: int, left: int) -> torch.Tensor:
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    return (distance >= 0) & (distance <= left if left >= 0 else distance >= 0)


def sdpa(q, k, v, *, causal: bool, window_size: tuple[int, int]) -> torch.Tensor:
    """The model's attention by `F.scaled_dot_product_attention`: a window is a mask there."""
    full = window_size[0] < 0 and q.shape[1] == k.shape[1]
    mask = None if full else _window_mask(q.shape[1], k.shape[1], window_size[0])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=full, enable_gqa=True)
    return out.transpose(1, 2)


def with_sdpa(model: CharLM) -> CharLM:
    for layer in model.layers:
        layer.attention.attend = sdpa
    return model


@dataclasses.dataclass
class Speed:
    """Tokens per second of each contestant: median and quartiles."""

    median: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # why one has no speed


def _speed(seconds: dict[str, list[float]], tokens: int, failed: dict[str, str]) -> Speed:
    found = {}
    for name, times in seconds.items():
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        found[name] = [tokens / t for t in quartiles]
    return Speed(
        {n: q[1] for n, q in found.items()}, {n: q[2] for n, q in found.items()}, {n: q[0] for n, q in found.items()},
        failed,
    )  # fmt: skip


@torch.no_grad()
def _stirred(model: CharLM) -> CharLM:
    """The model with noise on all weights: as it begins, attention adds nothing, and a wrong one would not be seen."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def _check_logits(models: dict[str, tuple[CharLM, str]], exact: CharLM, characters: torch.Tensor) -> None:
    """The RMS error of each one's logits against float64 may be K times eager's: they are many, so K is generous."""
    errors = {}
    with torch.no_grad():
        with gk.use_backend("reference"):
            ref = exact(characters)
        for name, (model, backend) in models.items():
            with gk.use_backend(backend):
                errors[name] = float((model(characters) - ref).square().mean().sqrt())
    for name, error in errors.items():
        if not error <= Agreement.K * errors[EAGER]:
            raise ArithmeticError(
                f"char_lm_speed: {name}: logits off by {error:.2e} (RMS), eager by {errors[EAGER]:.2e}"
            )


def training_speed(
    config: Config, recipe: Recipe, text: torch.Tensor, rounds: int = 5, compiled: bool = False
) -> Speed:
    """Characters per second of whole training steps: forward, backward, clipping and AdamW.

    Raises:
        ArithmeticError: a contestant computes something else.
    """

    def model() -> CharLM:
        return _stirred(new_model(config, recipe.seed))

    runs = {
        OURS: Run(model(), recipe, text),
        EAGER: Run(model(), recipe, text, backend="reference"),
        SDPA: Run(with_sdpa(model()), recipe, text, backend="reference"),
    }
    if compiled:
        runs[COMPILED] = Run(model(), recipe, text, backend="reference")
        runs[COMPILED].model.compile(dynamic=False)
    characters = next(batches(text, 1, config.context, recipe.seed))[0]
    models = {name: (run.model, run.backend) for name, run in runs.items() if name != COMPILED}
    _check_logits(models, model().double(), characters)
    failed: dict[str, str] = {}
    for name, run in runs.items():  # warms up and compiles
        try:
            run.step()
        except Exception as error:  # a peer that cannot do it is a finding
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    runs = {name: run for name, run in runs.items() if name not in failed}
    for _ in range(rounds):
        for run in runs.values():
            run.step()
    return _speed({n: r.seconds[1:] for n, r in runs.items()}, recipe.batch * config.context, failed)


def generation_speed(
    model: CharLM, prompt: torch.Tensor, count: int = 64, rounds: int = 3, compiled: bool = False
) -> Speed:
    """Characters per second of generation with the rolling cache, and of ours without a cache, after the prompt.

    Raises:
        ArithmeticError: two contestants generate different characters.
    """

    def generate(backend: str, cached: bool, model: CharLM = model) -> tuple[list[torch.Tensor], float]:
        with gk.use_backend(backend):
            characters = model.generate(prompt, count + 1, temperature=0, cached=cached)
            found, begin = [next(characters)], time.perf_counter()  # the prompt is another matter
            found += list(characters)
        return found, time.perf_counter() - begin

    contestants: dict[str, Callable[[], tuple[list[torch.Tensor], float]]] = {
        OURS: lambda: generate("auto", True),
        EAGER: lambda: generate("reference", True),
        "ours without a cache": lambda: generate("auto", False),
    }
    if compiled:
        other = copy.deepcopy(model)
        other.compile(dynamic=True)  # positions and keys are numbers that change with each character
        generate("reference", True, other)
        contestants[COMPILED] = lambda: generate("reference", True, other)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    text = None
    for _ in range(rounds):
        for name, contestant in contestants.items():
            characters, took = contestant()
            seconds[name].append(took)
            text = torch.stack(characters) if text is None else text
            if not torch.equal(torch.stack(characters), text):
                raise ArithmeticError(f"generation_speed: {name} generates other characters than ours")
    return _speed(seconds, count, {})


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    try:
        yield
    finally:
        gc.collect()


def seconds_by_length(
    config: Config,
    lengths: dict[str, list[int]],
    rounds: int = 3,
    step: Callable[[str], None] = lambda name: None,
    end: float = math.inf,
) -> dict[str, dict[int, float]]:
    """Seconds of forward and backward on one text of N characters, for each N: the least of some rounds.

    Args:
        lengths: the N of each of "ours, window", "ours, full", "eager, window", "eager, full", "SDPA, window",
            "SDPA, full".
        step: called with the name of each measurement as it begins.
        end: of time.perf_counter(): after it nothing is begun but the shortest text of each.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in lengths}
    for length in sorted({n for some in lengths.values() for n in some}):
        characters = torch.randint(config.vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(0))
        for name, wanted in lengths.items():
            if length not in wanted or (found[name] and time.perf_counter() > end):
                continue
            step(f"{name}, {length} characters")
            backend, _, span = name.partition(", ")
            window = config.window if span == "window" else None
            with _collected():
                model = new_model(dataclasses.replace(config, window=window, context=length), seed=0)
                if backend == "SDPA":
                    with_sdpa(model)
                with gk.use_backend("auto" if backend == "ours" else "reference"):
                    times = []
                    for _ in range(rounds):
                        begin = time.perf_counter()
                        model.loss(characters[:, :-1], characters[:, 1:]).backward()
                        times.append(time.perf_counter() - begin)
                found[name][length] = min(times)
    return found
