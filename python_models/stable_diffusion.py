"""Stable Diffusion 1.5's and SDXL's UNets and their decoder on this library's ops, and the full one beside diffusers'.

    python -m python_models.stable_diffusion                # parameters of each
    python -m python_models.stable_diffusion --full         # SD 1.5's UNet with random weights: 3.4 GB, some minutes

No trained weights are part of this repository; `stable_diffusion_files` reads those that someone has.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn as torch_nn

import genai_kernels as gk
from genai_kernels import nn
from genai_kernels.cli.machine import fingerprint
from python_models import stable_diffusion_configs as configs
from python_models.stable_diffusion_configs import KL_F8, SD15, SDXL
from python_models.stable_diffusion_files import load_decoder, load_unet, save_unet
from python_models.stable_diffusion_layers import Prompt
from python_models.stable_diffusion_unet import UNet
from python_models.stable_diffusion_vae import Decoder

__all__ = ["KL_F8", "SD15", "SDXL", "Decoder", "Prompt", "UNet", "count", "load_decoder", "load_unet", "save_unet"]

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "diffusion"
# How far from float64 ours may be, as a multiple of how far diffusers' own is: its largest error, and its RMS error.
FACTORS = {"k": 1.5, "k_rms": 1.1}


def count(config: configs.UNet | configs.Decoder) -> int:
    """Parameters of a config, of which none is made.

    >>> count(SD15), count(SDXL), count(KL_F8)
    (859520964, 2567463684, 49490199)
    """
    with torch.device("meta"):
        model: torch_nn.Module = UNet(config) if isinstance(config, configs.UNet) else Decoder(config)
    return sum(p.numel() for p in model.parameters())


def diffusers_unet(config: configs.UNet, seed: int = 0) -> torch_nn.Module:
    """diffusers' own UNet with random weights; norms and biases differ from one and zero."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    model = UNet2DConditionModel(**configs.unet_to_diffusers(config))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def same_weights(config: configs.UNet, theirs: torch_nn.Module) -> UNet:
    """Our UNet with the tensors of diffusers' model, not copies of them."""
    with torch.device("meta"):
        ours = UNet(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval()


def in_float64(theirs: torch_nn.Module) -> torch_nn.Module:
    """diffusers' UNet in float64, changed in place: the embedding of the time too, which it leaves in float32."""

    def sinusoids(numbers: torch.Tensor, width: int) -> torch.Tensor:
        half = torch.arange(width // 2, dtype=torch.float64) / (width // 2)
        angles = numbers.double()[:, None] * torch.exp(-math.log(10000.0) * half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    for name in ("time_proj", "add_time_proj"):
        layer = getattr(theirs, name, None)
        if layer is not None:
            layer.forward = functools.partial(sinusoids, width=layer.num_channels)
    return theirs.double()


def _timed(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


@torch.no_grad()
def full(side: int, dtype: torch.dtype) -> dict[str, Any]:
    """SD 1.5's whole UNet: this one, its eager twin and diffusers' own, against diffusers' own in float64.

    Args:
        side: of the latents; an eighth of the image's.
        dtype: of the weights, which float64 gets as they are.
    """
    theirs = diffusers_unet(SD15).to(dtype)
    ours: UNet | None = nn.prepack(same_weights(SD15, theirs))
    latents, text = torch.randn(2, 4, side, side).to(dtype), torch.randn(2, 77, SD15.context).to(dtype)
    when = torch.tensor([500, 500])
    results = {
        "this": _timed(lambda: ours(latents, when, text)),
        "diffusers": _timed(lambda: theirs(latents, when, text).sample),
    }
    with gk.use_backend("reference"):
        results["eager twin"] = _timed(lambda: ours(latents, when, text))
    ours = None  # or the weights of the dtype would stay beside those of float64
    expected = in_float64(theirs)(latents.double(), when, text.double()).sample
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "latents": list(latents.shape)}
    found["largest value"], found["rms value"] = expected.abs().max().item(), _rms(expected)
    rounding = torch.finfo(dtype).eps / 2
    for name in ("diffusers", "this", "eager twin"):
        y, seconds = results[name]
        error = y.double() - expected
        largest, rms = error.abs().max().item(), _rms(error)
        eager = found.get("diffusers", {"largest error": largest, "rms error": rms})
        found[name] = {
            "largest error": largest,
            "rms error": rms,
            "largest difference from diffusers": (y - results["diffusers"][0]).abs().max().item(),
            "within the rule": largest <= FACTORS["k"] * eager["largest error"] + rounding * found["largest value"]
            and rms <= FACTORS["k_rms"] * eager["rms error"] + 0.3 * rounding * found["rms value"],
            "seconds, once": round(seconds, 2),
        }
    return found


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m python_models.stable_diffusion", description=__doc__)
    parser.add_argument("--full", action="store_true", help="SD 1.5's UNet beside diffusers' own")
    parser.add_argument("--side", type=int, default=32, help="of the latents of --full; 64 for an image of 512")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="file of the results of --full")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    for name, config in (("SD 1.5 UNet", SD15), ("SDXL UNet", SDXL), ("KL-f8 decoder", KL_F8)):
        print(f"{name:14} {count(config):>13,} parameters")
    if not given.full:
        return 0
    found = full(given.side, getattr(torch, given.dtype))
    print(json.dumps(found, indent=1))
    path = given.out or RESULTS / f"sd15_unet_{given.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": fingerprint(), "threads": given.threads, **found}, indent=1) + "\n")
    return 0 if found["this"]["within the rule"] else 1


if __name__ == "__main__":
    sys.exit(main())
