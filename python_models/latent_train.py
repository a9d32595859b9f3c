"""Training a VAE of digits, and what paints latents to captions; what they are good for, in figures."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from genai_kernels.optim import AdamW
from python_models.char_lm_train import Recipe
from python_models.diffusion import Sampler, Schedule
from python_models.diffusion_data import Pictures, digits
from python_models.diffusion_tasks import Say, spread, start_of
from python_models.diffusion_train import CHECKPOINTS, Run
from python_models.diffusion_twins import Drift, twin_drifts
from python_models.digit_judge import Judge, fd_digits, nearest
from python_models.dit import text_dit
from python_models.latent_diffusion import LATENT, STYLES, VAE, InkOf, TextToLatent, caption, ink, text_unet, tokens

MODELS: dict[str, Callable[[], TextToLatent]] = {"unet": text_unet, "dit": text_dit}
RECIPES = {
    "vae": Recipe(steps=1200, batch=64, peak_rate=3e-3, warmup=50),
    "unet": Recipe(steps=2000, batch=64, peak_rate=2e-3, warmup=100),
    "dit": Recipe(steps=2000, batch=64, peak_rate=2e-3, warmup=100),
}
KL_WEIGHT = 1e-3
LARGEST = 5.0  # of latents of unit variance


def checkpoint_of(name: str) -> Path:
    """The file of the committed "vae", "unet" or "dit"."""
    return CHECKPOINTS / f"latent_{name}" / "model.safetensors"


class VAERun:
    """The training of a VAE, step by step."""

    def __init__(self, recipe: Recipe, pictures: Pictures) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.vae = VAE()
        self.recipe, self.pictures = recipe, pictures
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.optimizer = AdamW(self.vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, max_norm=1.0)
        self.losses: list[float] = []

    def step(self) -> float:
        """Takes one step and returns its loss."""
        train = self.pictures.train
        chosen = torch.randint(len(train), (self.recipe.batch,), generator=self.generator)
        noise = torch.randn(self.recipe.batch, *LATENT, generator=self.generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(len(self.losses))
        loss = self.vae.loss(train[chosen], noise, KL_WEIGHT)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        return self.losses[-1]

    def finished(self) -> VAE:
        """The VAE, its latents scaled to unit variance on the training pictures."""
        with torch.no_grad():
            self.vae.scale.copy_(self.vae.moments(self.pictures.train)[0].std())
        return self.vae.eval().requires_grad_(False)


def latents(vae: VAE, pictures: Pictures) -> Pictures:
    """Latents of digits with their captions as tokens: three quarters of these say how bold the digit is, if it is."""
    much = InkOf.measured(pictures.train, pictures.labels)

    def captions(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return tokens([caption(d, style) for d, style in zip(labels.tolist(), much.style(x, labels), strict=True)])

    train, held_out = (vae.encode(x).contiguous() for x in (pictures.train, pictures.held_out))
    texts = captions(pictures.train, pictures.labels), captions(pictures.held_out, pictures.held_out_labels)
    return Pictures("latents", train, held_out, LARGEST, *texts, masked=False)


def new_run(name: str, recipe: Recipe, pictures: Pictures, **options: Any) -> Run:
    """A run from the weights that the recipe's seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Run(MODELS[name](), Schedule(), recipe, pictures, **options)


def save(path: Path, model: torch.nn.Module, about: dict[str, object]) -> None:
    """Weights, rounded to float16, and beside them what is known about their training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().half().contiguous() for name, t in model.state_dict().items()}, path)
    (path.parent / "training.json").write_text(json.dumps(about, indent=2) + "\n")


def load(path: Path, model: torch.nn.Module) -> Any:
    """The model with the weights of a file, in float32, ready to sample."""
    with safe_open(path, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return model.eval().requires_grad_(False)


def orders(count: int) -> Iterator[tuple[int, str]]:
    """Digits and styles in turn."""
    for i in range(count):
        yield i % 10, STYLES[i // 10 % 3]


def paint(
    model: TextToLatent, vae: VAE, captions: list[str], seed: int, *, count: int = 50, guidance: float = 2.0
) -> torch.Tensor:
    """A digit for each caption, `[N, 1, 8, 8]`."""
    sampler = Sampler(Schedule(), count, largest=LARGEST, guidance=guidance)
    found = sampler.paint(model, *start_of(len(captions), LATENT, seed), label=tokens(captions))
    return vae.decode(found).clamp(-1, 1)


def measure(
    models: dict[str, TextToLatent], vae: VAE, judge: Judge, *, count: int = 180, seeds: int = 3, say: Say = str
) -> dict[str, Any]:
    """Does the judge see the digit of the caption, is it as bold as that says, how far is their distribution."""
    pictures = digits()
    much = InkOf.measured(pictures.train, pictures.labels)
    wanted = list(orders(count))
    label, captions = torch.tensor([d for d, _ in wanted]), [caption(*order) for order in wanted]
    again = vae.decode(vae.encode(pictures.held_out))
    found: dict[str, Any] = {
        "count": count, "seeds": seeds,
        "vae": {"mse": float((again - pictures.held_out).square().mean()),
                "judge_accuracy": judge.accuracy(again, pictures.held_out_labels),
                "fd_digits": fd_digits(judge, again, pictures.train)},
    }  # fmt: skip
    for name, model in models.items():
        for guidance in (1.0, 2.0):
            scores = []
            for seed in range(seeds):
                say(f"{name}, guidance {guidance}, seed {seed}")
                painted = paint(model, vae, captions, seed, guidance=guidance)
                styles = [style for _, style in wanted]
                dark = {s: ink(painted)[[i for i, t in enumerate(styles) if t == s]] for s in STYLES}
                right = [a == b for a, b in zip(much.style(painted, label), styles, strict=True) if b]
                scores.append({
                    "judge_accuracy": judge.accuracy(painted, label), "style_accuracy": statistics.fmean(right),
                    "fd_digits": fd_digits(judge, painted, pictures.train),
                    "nearest": float(nearest(painted, pictures.train).median()),
                    "ink_light": float(dark["light"].mean()), "ink_bold": float(dark["bold"].mean()),
                })  # fmt: skip
            found[f"{name}, guidance {guidance:g}"] = {key: spread([s[key] for s in scores]) for key in scores[0]}
    return found


def text_drifts(model: TextToLatent, count: int, seed: int = 0) -> dict[str, Drift]:
    """Trajectories of latents, to captions."""
    captions = [caption(*order) for order in orders(count)]
    sampler = Sampler(Schedule(), 50, largest=LARGEST, guidance=2.0)
    return twin_drifts(model, sampler, *start_of(count, LATENT, seed), label=tokens(captions))


def about_run(run: Run, command: str) -> dict[str, object]:
    """What stands beside a model's weights."""
    return {
        "command": command, "parameters": run.model.parameter_count, "recipe": dataclasses.asdict(run.recipe),
        "training_loss_last_100": round(statistics.fmean(run.losses[-100:]), 5),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
