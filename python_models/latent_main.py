"""The commands of `python -m python_models.latent_diffusion`, each with --help:

train --out folder                       the VAE, then the UNet and the transformer on its latents
paint "a three, bold" --to three.png     a caption, some times
measure                                  what they are good for, as JSON
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from genai_kernels.cli.console import print_table, progress, say
from python_models import latent_train
from python_models.diffusion_data import digits
from python_models.diffusion_report import grid, panels, text_table, visible
from python_models.digit_judge import load_judge
from python_models.latent_diffusion import VAE, TextToLatent
from python_models.latent_train import MODELS, RECIPES, VAERun, about_run, checkpoint_of, latents, new_run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m python_models.latent_diffusion", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="the VAE and what paints its latents")
    train.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    train.add_argument("--steps", type=int, help="of each, instead of its recipe's")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", type=Path, required=True, help="folder: latent_vae, latent_unet, latent_dit in it")
    paint = commands.add_parser("paint", help="a caption, some times")
    paint.add_argument("caption")
    paint.add_argument("--model", choices=MODELS, default="unet")
    paint.add_argument("--to", type=Path, required=True, help="PNG file")
    paint.add_argument("--count", type=int, default=10)
    paint.add_argument("--guidance", type=float, default=2.0)
    paint.add_argument("--seed", type=int, default=0)
    measure = commands.add_parser("measure", help="what they are good for")
    measure.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    measure.add_argument("--seeds", type=int, default=3)
    measure.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser


def load_vae() -> VAE:
    return latent_train.load(checkpoint_of("vae"), VAE())


def load_model(name: str) -> TextToLatent:
    return latent_train.load(checkpoint_of(name), MODELS[name]())


def train(given: argparse.Namespace) -> int:
    pictures, out = digits(), given.out

    def recipe(name: str):
        r = RECIPES[name]
        return type(r)(given.steps or r.steps, r.batch, r.peak_rate, r.warmup, given.seed)

    run = VAERun(recipe("vae"), pictures)
    with progress(run.recipe.steps) as bar:
        while len(run.losses) < run.recipe.steps:
            bar(f"vae: loss {statistics.fmean(run.losses[-50:]):.4f}" if run.losses else "vae")
            run.step()
    vae = run.finished()
    error = float((vae.decode(vae.encode(pictures.held_out)) - pictures.held_out).square().mean())
    say(f"vae: {sum(p.numel() for p in vae.parameters()):,} parameters, held-out mean squared error {error:.4f}")
    command = f"python -m python_models.latent_diffusion train --seed {given.seed} --out checkpoints"
    command += f" --steps {given.steps}" if given.steps else ""
    latent_train.save(out / "latent_vae" / "model.safetensors", vae, {
        "command": command, "held_out_mse": round(error, 5), "steps": run.recipe.steps, "kl_weight":
        latent_train.KL_WEIGHT, "threads": torch.get_num_threads(), "torch": torch.__version__,
    })  # fmt: skip
    data = latents(vae, pictures)
    for name in given.models:
        run = new_run(name, recipe(name), data)
        with progress(run.recipe.steps) as bar:
            while len(run.losses) < run.recipe.steps:
                bar(f"{name}: loss {statistics.fmean(run.losses[-50:]):.4f}" if run.losses else name)
                run.step()
        say(f"{name}: {run.model.parameter_count:,} parameters, loss {statistics.fmean(run.losses[-100:]):.4f}, "
            f"{1e3 * statistics.median(run.seconds):.0f} ms a step")  # fmt: skip
        latent_train.save(out / f"latent_{name}" / "model.safetensors", run.averaged(), about_run(run, command))
    return 0


def paint(given: argparse.Namespace) -> int:
    model, vae = load_model(given.model), load_vae()
    painted = latent_train.paint(model, vae, [given.caption] * given.count, given.seed, guidance=given.guidance)
    if not panels(given.to, [(given.caption, grid(visible(painted), 10))], 1, "", 6):
        say("matplotlib is missing: nothing was drawn", "yellow")
        return 1
    say(f"wrote {given.to}; the judge sees {', '.join(map(str, load_judge().digit(painted).tolist()))}")
    return 0


def measure(given: argparse.Namespace) -> int:
    models, vae = {name: load_model(name) for name in given.models}, load_vae()
    found: dict[str, object] = {"twins": {}}
    drifts = {name: latent_train.text_drifts(model, 16) for name, model in models.items()}
    for name, both in drifts.items():
        for drift in both.values():
            say(f"{name}, {drift.line}", None if drift.ok else "bold red")
    found["twins"] = {name: {d: vars(drift) | {"ok": drift.ok} for d, drift in both.items()}
                      for name, both in drifts.items()}  # fmt: skip
    with progress(2 * given.seeds * len(models)) as bar:
        found |= latent_train.measure(models, vae, load_judge(), seeds=given.seeds, say=bar)
    columns, rows = text_table(found)
    print_table("digits painted from captions, 50 steps of DDIM", columns, rows, right=range(1, len(columns)))
    if given.output:
        found = {"command": f"python -m python_models.latent_diffusion measure --seeds {given.seeds}",
                 "threads": torch.get_num_threads(), "torch": torch.__version__, **found}  # fmt: skip
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=1) + "\n")
        say(f"wrote {given.output}")
    return 0 if all(drift.ok for both in drifts.values() for drift in both.values()) else 1


def main(argv: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    return {"train": train, "paint": paint, "measure": measure}[given.command](given)
