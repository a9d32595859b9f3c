"""What `genai_kernels.integrations.diffusers.accelerate` gains: diffusers' models, and the same models accelerated.

`python -m benchmarks.diffusers_model --dtype float32` times two levels of Stable Diffusion 1.5's UNet at its own widths
(320 and 640 channels, 8 heads, random weights) and a decoder with the widths of the KL-f8 autoencoder: a forward pass
of each in both memory formats, and a training step.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from genai_kernels.accuracy import compare
from genai_kernels.cli.console import print_table, say
from genai_kernels.cli.machine import fingerprint
from genai_kernels.cli.report import machine_line
from genai_kernels.cli.timing import Timing, interleaved
from genai_kernels.integrations import diffusers as integration

RESULTS = Path(__file__).resolve().parent / "results" / "diffusion"
THEIRS, THEIRS_LAST, OURS, PACKED = "diffusers", "diffusers, channels last", "accelerated", "prepacked"
# How far two eager computations of a whole model may be apart: the widest of any op's, attention's backward.
FACTORS = {"k": 1.5, "k_rms": 1.1}


def unet() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(320, 640), layers_per_block=1, cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip


def decoder() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).decoder  # fmt: skip


def call(model: torch.nn.Module, args: list[torch.Tensor]) -> torch.Tensor:
    found = model(*args)
    return getattr(found, "sample", found)


def step(model: torch.nn.Module, args: list[torch.Tensor]) -> torch.Tensor:
    """The gradients of every parameter."""
    y = call(model, args)
    return torch.cat([g.flatten() for g in torch.autograd.grad(y, list(model.parameters()), torch.ones_like(y))])


def moved(args: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return [a if a.dtype == torch.int64 else a.to(dtype) for a in args]


def case(
    what: str, make: Callable[[], torch.nn.Module], args: list[torch.Tensor], dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Checks one kind of call, and times it."""
    torch.manual_seed(0)
    run, training = (step, True) if "step" in what else (call, False)
    theirs = make().to(dtype).train(training)
    models = {THEIRS: theirs, OURS: copy.deepcopy(theirs)}
    reports = [integration.accelerate(models[OURS])]
    if not training:
        models[PACKED] = copy.deepcopy(theirs)
        reports.append(integration.accelerate(models[PACKED], prepack=True))
        models[THEIRS_LAST] = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    last = moved(args, dtype)
    last[0] = last[0].contiguous(memory_format=torch.channels_last)
    first = moved(args, dtype)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        name: (lambda m=m, given=last if name == THEIRS_LAST else first: run(m, given)) for name, m in models.items()
    }
    with torch.set_grad_enabled(training):
        exact = run(copy.deepcopy(theirs).double(), moved(moved(args, dtype), torch.float64))
        results = {name: way() for name, way in ways.items()}
        for name in (OURS, PACKED):
            if name in results:
                verdict = compare(what, results[name], results[THEIRS], exact, **FACTORS)
                if not verdict.ok:
                    raise SystemExit(f"{what}, {name}: {verdict.complaint}: no speed is shown for a wrong result")
        error = verdict.error / verdict.eager_error
        timings, _ = interleaved(ways, seconds)
    return {
        "what": what,
        "shape": list(args[0].shape),
        "error": error,
        "served": dict(reports[0].served),
        "timings": {name: timing.as_dict() for name, timing in timings.items()},
    }


def ratio(found: dict[str, Any], a: str, b: str) -> str:
    if a not in found["timings"] or b not in found["timings"]:
        return "-"
    times = {name: Timing(*(found["timings"][name][k] for k in ("median", "low", "high", "rounds"))) for name in (a, b)}
    noisy = " (noisy)" if max(t.spread for t in times.values()) > 0.1 else ""
    return f"{times[a].median / times[b].median:.2f}x{noisy}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.diffusers_model", description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long each call is timed")
    parser.add_argument("--only", default="", help="a part of the name of what is to be timed")
    parser.add_argument("--out", type=Path, help="the file of results; default: benchmarks/results/diffusion")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    machine, dtype = fingerprint(), getattr(torch, given.dtype)
    say(machine_line(machine))
    torch.manual_seed(1)
    latents, text, z = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 768), torch.randn(1, 4, 32, 32)
    when = torch.tensor([500, 500])
    cases = [
        case(what, make, args, dtype, given.seconds)
        for what, make, args in (
            ("UNet forward", unet, [latents, when, text]),
            ("UNet training step", unet, [latents[:1, :, :16, :16], when[:1], text[:1]]),
            ("decoder forward", decoder, [z]),
        )
        if given.only in what
    ]
    heads = ("call", "shape", f"{THEIRS}, ms", f"{THEIRS} / {OURS}", f"{THEIRS} / {PACKED}",
             f"{THEIRS_LAST} / {PACKED}", "error / diffusers'")  # fmt: skip
    rows = []
    for c in cases:
        ratios = (ratio(c, *pair) for pair in ((THEIRS, OURS), (THEIRS, PACKED), (THEIRS_LAST, PACKED)))
        median = c["timings"][THEIRS]["median"]
        rows.append((c["what"], "x".join(map(str, c["shape"])), f"{1e3 * median:.0f}", *ratios, f"{c['error']:.2f}"))
    print_table(f"diffusers' models in {given.dtype}, {given.threads} threads", heads, rows, right=range(2, 7))
    path = given.out or RESULTS / f"diffusers_{given.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if given.only and path.exists():  # the others as they were measured
        cases = [c for c in json.loads(path.read_text())["cases"] if given.only not in c["what"]] + cases
    found = {"machine": machine, "threads": given.threads, "dtype": given.dtype, "cases": cases}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
