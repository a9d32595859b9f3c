"""Training a diffusion model step by step, its eager and float64 twins; interrupted and resumed, the same bits.

A checkpoint of a run is one safetensors file: weights, AdamW's moments and running averages, the state of both random
generators, the losses so far, and what a run that resumes must have in common with it. What a run ends with,
`save_model`, is the averaged weights alone.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import genai_kernels as gk
from genai_kernels.optim import AdamW
from python_models.char_lm_train import Recipe
from python_models.diffusion import Schedule
from python_models.diffusion import loss as diffusion_loss
from python_models.diffusion_data import Batches, Pictures
from python_models.diffusion_masks import random_masks
from python_models.unet import Config, UNet

CHECKPOINTS = Path(__file__).parent / "checkpoints"
STATE = ("exp_avg", "exp_avg_sq", "ema")
UNTOLD = 0.3  # share of the pictures whose class the model is not told
SCHEDULES = {"digits": Schedule(), "photographs": Schedule(relative=True)}
CONFIGS = {
    "digits": Config(2, 1, widths=(32, 64), blocks=1, classes=10),
    "photographs": Config(9, 3, widths=(32, 48, 48), blocks=1, head_dim=16),
}
RECIPES = {
    "digits": Recipe(steps=2500, batch=64, peak_rate=2e-3, warmup=100),
    "photographs": Recipe(steps=2400, batch=32, peak_rate=2e-3, warmup=100),
}


def checkpoint_of(name: str) -> Path:
    """The file of the committed model of a set of pictures."""
    return CHECKPOINTS / f"diffusion_{name}" / "model.safetensors"


class Run:
    """One training run that is taken step by step.

    Args:
        model: what learns; in float64 the optimizer is PyTorch's, and there is no average.
        schedule: of the noise.
        recipe: its seed is that of the pictures, their noise and their masks.
        pictures: what it learns from.
        ema_decay: of the running average of the weights.
        backend: of every op, that of the optimizer too.
    """

    def __init__(
        self, model: UNet, schedule: Schedule, recipe: Recipe, pictures: Pictures, *, ema_decay: float = 0.995,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        self.model, self.schedule, self.recipe, self.pictures = model, schedule, recipe, pictures
        self.ema_decay, self.backend = ema_decay, backend
        self.batches = Batches(pictures, recipe.batch, recipe.seed)
        self.generator = torch.Generator().manual_seed(recipe.seed)  # of noise, times and masks
        self.losses: list[float] = []
        self.seconds: list[float] = []  # each step's
        self.named = dict(model.named_parameters())
        parameters = list(self.named.values())
        self.exact = parameters[0].dtype == torch.float64
        options = {"lr": 0.0, "betas": (0.9, 0.99), "weight_decay": 0.0}
        self.optimizer = (
            torch.optim.AdamW(parameters, **options) if self.exact
            else AdamW(parameters, **options, max_norm=1.0, ema_decay=ema_decay)
        )  # fmt: skip

    def _draw(self) -> dict[str, torch.Tensor | None]:
        """The arguments of the loss: the same for every twin, in its dtype."""
        x0, label = next(self.batches)
        noise = torch.randn(x0.shape, generator=self.generator)
        t = torch.randint(self.schedule.steps, (len(x0),), generator=self.generator)
        known = random_masks(len(x0), self.pictures.shape, self.generator) if self.pictures.masked else 0 * x0
        if label is not None:
            label = self.model.forget(label, torch.rand(len(x0), generator=self.generator) < UNTOLD)
        dtype = torch.float64 if self.exact else torch.float32
        return {
            "x0": x0.to(dtype), "noise": noise.to(dtype), "t": t, "known": known.to(dtype), "condition": label,
        }  # fmt: skip

    def step(self) -> float:
        """Takes one step and returns its loss."""
        drawn = self._draw()
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(len(self.losses))
        with gk.use_backend(self.backend):
            drawn["condition"] = self.model.conditions(drawn["condition"])
            loss = diffusion_loss(self.model, self.schedule, **drawn)
            loss.backward()
            if self.exact:
                torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)
        return self.losses[-1]

    def averaged(self) -> UNet:
        """A model with the running averages for weights."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(self.optimizer.state[self.named[name]]["ema"])
        return model

    # ---- interrupted, and resumed ----

    def _about(self) -> dict[str, object]:
        """What a run must have in common with the one whose checkpoint it takes up."""
        about = {
            "config": dataclasses.asdict(self.model.config), "schedule": dataclasses.asdict(self.schedule),
            "recipe": dataclasses.asdict(self.recipe), "pictures": self.pictures.about, "ema_decay": self.ema_decay,
        }  # fmt: skip
        return json.loads(json.dumps(about))

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint: whole, or not at all."""
        path = Path(path)
        tensors = {"noise": self.generator.get_state(), "batches": self.batches.generator.get_state()}
        for name, p in self.named.items():
            tensors[f"weight.{name}"] = p.detach().clone(memory_format=torch.contiguous_format)
            for key in STATE if self.losses else ():
                tensors[f"{key}.{name}"] = self.optimizer.state[p][key].contiguous()
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata={"about": json.dumps(self._about()), "losses": json.dumps(self.losses)})
        os.replace(part, path)

    def resume(self, path: str | Path) -> None:
        """Goes on where the run that wrote `path` stood; the bits of all that follows are those it would have had.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the checkpoint of another run: sizes, schedule, recipe, pictures or average differ.
        """
        with safe_open(path, framework="pt") as file:
            saved = json.loads(file.metadata()["about"])
            for key, value in self._about().items():
                if saved.get(key) != value:
                    raise ValueError(f"Run.resume: {key}: expected {value}, got {saved.get(key)}")
            self.losses = json.loads(file.metadata()["losses"])
            self.generator.set_state(file.get_tensor("noise"))
            self.batches.generator.set_state(file.get_tensor("batches"))
            for name, p in self.named.items():
                with torch.no_grad():
                    p.copy_(file.get_tensor(f"weight.{name}"))
                if self.losses:
                    state = {key: torch.empty_like(p).copy_(file.get_tensor(f"{key}.{name}")) for key in STATE}
                    self.optimizer.state[p] = {"step": torch.tensor(float(len(self.losses))), **state}
        self.seconds = [float("nan")] * len(self.losses)  # they were another machine's


def new_model(config: Config, seed: int) -> UNet:
    """A model with the weights that a seed gives; torch's own generator is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(config)


def twin(run: Run, *, exact: bool = False) -> Run:
    """A run that begins where `run` stands before its first step, in plain PyTorch; `exact`: in float64."""
    model = copy.deepcopy(run.model)
    return Run(
        model.double() if exact else model, run.schedule, run.recipe, run.pictures, ema_decay=run.ema_decay,
        backend="reference",
    )  # fmt: skip


@torch.inference_mode()
def held_out_loss(model: UNet, schedule: Schedule, pictures: Pictures, seed: int = 0, rounds: int = 4) -> float:
    """The loss on the held-out pictures, of which nothing is told, at times spread evenly over the schedule."""
    generator = torch.Generator().manual_seed(seed)
    x0, losses = pictures.held_out, []
    for _ in range(rounds):
        t = torch.linspace(0, schedule.steps - 1, len(x0)).long()[torch.randperm(len(x0), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        losses.append(float(diffusion_loss(model, schedule, x0, noise, t, torch.zeros_like(x0))))
    return sum(losses) / rounds


def save_model(path: str | Path, model: UNet, schedule: Schedule) -> None:
    """Weights, rounded to float16, and in the file's metadata the sizes and the schedule."""
    tensors = {name: t.detach().half().contiguous() for name, t in model.state_dict().items()}
    about = {
        "config": json.dumps(dataclasses.asdict(model.config)),
        "schedule": json.dumps(dataclasses.asdict(schedule)),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=about)


def load_model(path: str | Path) -> tuple[UNet, Schedule]:
    """What `save_model` wrote, in float32, ready to sample.

    Raises:
        FileNotFoundError: no such file.
    """
    with safe_open(path, framework="pt") as file:
        about = {name: json.loads(text) for name, text in file.metadata().items()}
        sizes = {name: tuple(v) if isinstance(v, list) else v for name, v in about["config"].items()}
        model = UNet(Config(**sizes))
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return model.eval().requires_grad_(False), Schedule(**about["schedule"])
