"""Training an adapted Llama step by step, and its float64 and eager twins; interrupted and resumed, the same bits.

A checkpoint of a run is one safetensors file: what learns, AdamW's moments, the state of both random generators
(dropout's and the one that draws passages), the losses so far, and the recipe, which a run that resumes must have too.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import genai_kernels as gk
from genai_kernels.optim import AdamW
from python_models import llama_files
from python_models.char_lm_train import Recipe
from python_models.llama_train import CHECKPOINT, bits_per_byte
from python_models.lora_data import Register
from python_models.lora_methods import Adapted, Sizes, adapt

MOMENTS = ("exp_avg", "exp_avg_sq")
# The highest learning rate of each method: of 3e-4, 1e-3, 3e-3, 1e-2 ... the one with the least mean training loss in
# 60 steps on the headers, seed 100; LoRA's kin have LoRA's. The held-out text has no part in it.
RATES = {
    "lora": 1e-2, "dora": 1e-2, "qlora": 1e-2, "bottleneck": 1e-2, "bitfit": 3e-2, "prompt": 3e-2, "full": 1e-3,
}  # fmt: skip


class Passages:
    """Random passages of a text: `(tokens, those that follow)`, `[batch, length]` each."""

    def __init__(self, text: torch.Tensor, batch: int, length: int, seed: int) -> None:
        if len(text) <= length:
            raise ValueError(f"Passages: text: expected more than {length} tokens, got {len(text)}")
        self.text, self.batch, self.offsets = text, batch, torch.arange(length + 1)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(self.text) - len(self.offsets) + 1, (self.batch, 1), generator=self.generator)
        passage = self.text[starts + self.offsets]
        return passage[:, :-1], passage[:, 1:]


class Run:
    """One training run that is taken step by step.

    Args:
        adapted: what learns; in float64 the optimizer is PyTorch's.
        recipe: `seed` is that of the passages and of dropout.
        text: int64 `[tokens]`.
        length: tokens of a passage.
        backend: of every op, that of the optimizer too.
    """

    def __init__(
        self, adapted: Adapted, recipe: Recipe, text: torch.Tensor, *, length: int = 256, backend: str = "auto"
    ) -> None:
        self.adapted, self.recipe, self.length, self.backend = adapted, recipe, length, backend
        self.batches = Passages(text, recipe.batch, length, recipe.seed)
        self.losses: list[float] = []  # nats per token
        self.seconds: list[float] = []  # each step's
        self.named = adapted.trainable()
        parameters = list(self.named.values())
        exact = parameters[0].dtype == torch.float64
        kind = torch.optim.AdamW if exact else AdamW
        self.optimizer = kind(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.random = torch.Generator().manual_seed(recipe.seed).get_state()

    def step(self) -> float:
        """Takes one step and returns its loss. torch's own generator is left as it was found."""
        tokens, following = next(self.batches)
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(len(self.losses))
        with torch.random.fork_rng(devices=[]), gk.use_backend(self.backend):
            torch.set_rng_state(self.random)
            loss = self.adapted.loss(tokens, following)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
            self.optimizer.step()
            self.random = torch.get_rng_state()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)
        return self.losses[-1]

    def train(self) -> None:
        """All steps that are left of the recipe."""
        while len(self.losses) < self.recipe.steps:
            self.step()

    # ---- interrupted, and resumed ----

    def _about(self) -> dict[str, object]:
        """What a run must have in common with the one whose checkpoint it takes up."""
        return {
            "method": self.adapted.method, "sizes": dataclasses.asdict(self.adapted.sizes),
            "recipe": dataclasses.asdict(self.recipe), "length": self.length, "tokens": len(self.batches.text),
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint: whole, or not at all."""
        path = Path(path)
        tensors = {"random": self.random, "passages": self.batches.generator.get_state()}
        for name, p in self.named.items():
            tensors[f"weight.{name}"] = p.detach().clone()
            for moment in MOMENTS if self.losses else ():
                tensors[f"{moment}.{name}"] = self.optimizer.state[p][moment]
        about = {"about": json.dumps(self._about()), "losses": json.dumps(self.losses)}
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata=about)
        os.replace(part, path)

    def resume(self, path: str | Path) -> None:
        """Goes on where the run that wrote `path` stood; the bits of all that follows are those it would have had.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the checkpoint of another run: method, sizes, recipe, or length of the text differ.
        """
        with safe_open(path, framework="pt") as file:
            saved, mine = json.loads(file.metadata()["about"]), json.loads(json.dumps(self._about()))
            for key, value in mine.items():
                if saved.get(key) != value:
                    raise ValueError(f"Run.resume: {key}: expected {value}, got {saved.get(key)}")
            self.losses = json.loads(file.metadata()["losses"])
            self.random = file.get_tensor("random")
            self.batches.generator.set_state(file.get_tensor("passages"))
            for name, p in self.named.items():
                with torch.no_grad():
                    p.copy_(file.get_tensor(f"weight.{name}"))
                if self.losses:
                    state = {moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS}
                    self.optimizer.state[p] = {"step": torch.tensor(float(len(self.losses))), **state}
        self.seconds = [float("nan")] * len(self.losses)  # they were another machine's


def new_run(method: str, recipe: Recipe, text: torch.Tensor, *, sizes: Sizes | None = None, **options) -> Run:
    """The committed checkpoint in float32, adapted from the recipe's seed."""
    model = llama_files.load(CHECKPOINT, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Run(adapt(model, method, sizes), recipe, text, **options)


def twin(run: Run, *, exact: bool = False) -> Run:
    """A run that begins where `run` stands before its first step, in plain PyTorch; `exact`: in float64."""
    adapted = copy.deepcopy(run.adapted)
    if exact:
        adapted.model.double()
    return Run(adapted, run.recipe, run.batches.text, length=run.length, backend="reference")


def held_out_bits(adapted: Adapted, register: Register) -> float:
    """Bits per character of a register's held-out text: each token is scored once, after half a context at least."""
    training, _ = adapted.model.training, adapted.model.eval()
    try:
        return bits_per_byte(adapted, register.held_out, register.characters)
    finally:
        adapted.model.train(training)
