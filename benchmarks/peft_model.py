"""What `genai_kernels.integrations.peft.accelerate` gains: a PEFT model, the same model accelerated, and its bare base.

`python -m benchmarks.peft_model --dtype float32` times two Llama layers (transformers, hidden size 768, random weights)
with adapters of rank 16 on all of their products: a forward pass, a batch that mixes adapters, a training step.
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
from genai_kernels.integrations import peft as integration

RESULTS = Path(__file__).resolve().parent / "results" / "peft"
PEFT, OURS, BASE = "PEFT", "accelerated", "base alone"
HIDDEN, ADAPTERS = 768, 8
# How far two eager computations of a whole model may be apart: the widest of any op's, attention's backward.
FACTORS = {"k": 1.5, "k_rms": 1.1}


def build(dtype: torch.dtype, adapters: int = 1, **options: Any) -> dict[str, torch.nn.Module]:
    """The same model three times over: PEFT's, PEFT's accelerated, and without adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=HIDDEN, intermediate_size=8 * HIDDEN // 3, num_hidden_layers=2, num_attention_heads=12
    )
    base = LlamaModel(config).to(dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **options)
    theirs = get_peft_model(copy.deepcopy(base), config, "0")
    for i in range(1, adapters):
        theirs.add_adapter(str(i), config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    ours = copy.deepcopy(theirs)
    integration.accelerate(ours)
    return {PEFT: theirs, OURS: ours, BASE: base.requires_grad_(False)}


def forward(model: torch.nn.Module, x: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
    kwargs = {} if names is None else {"adapter_names": names}
    return model(inputs_embeds=x, use_cache=False, **kwargs).last_hidden_state


def step(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Forward and backward to what learns; to x, as below more layers, where nothing else does."""
    learns = [p for p in model.parameters() if p.requires_grad]
    x = x.detach().requires_grad_(not learns)
    return list(torch.autograd.grad(forward(model, x).sum(), learns or [x]))


def flat(result: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in result]) if isinstance(result, list) else result.flatten()


def case(models: dict[str, torch.nn.Module], what: str, shape: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Checks one kind of call, and times it."""
    models = {name: m.train("step" in what) for name, m in models.items()}
    x = torch.randn(*shape, HIDDEN).to(next(models[BASE].parameters()).dtype)
    calls: dict[str, Callable[[], Any]] = {}
    if "step" in what:
        calls = {name: lambda m=m: step(m, x) for name, m in models.items()}
        exact = lambda m: step(m, x.double())  # noqa: E731
    else:
        names = [str(i % ADAPTERS) for i in range(shape[0])] if "mixed" in what else None
        calls = {
            name: lambda m=m: forward(m, x, names if m is not models[BASE] else None) for name, m in models.items()
        }
        exact = lambda m: forward(m, x.double(), names)  # noqa: E731
    from peft.helpers import DoraCaching

    found: dict[str, Any] = {"what": what, "batch": shape[0], "tokens": shape[1]}
    with torch.set_grad_enabled("step" in what), DoraCaching("kept" in what):
        if "dropout" not in what:  # other random bits
            ways = [flat(calls[name]()) for name in (OURS, PEFT)]
            verdict = compare(what, *ways, flat(exact(copy.deepcopy(models[PEFT]).double())), **FACTORS)
            if not verdict.ok:
                raise SystemExit(f"{what}, {shape}: {verdict.complaint}: no speed is shown for a wrong result")
            found["error"] = verdict.error / verdict.eager_error
        for call in calls.values():
            call()
        timings, _ = interleaved(calls, seconds)
    return {**found, "timings": {name: timing.as_dict() for name, timing in timings.items()}}


def ratio(found: dict[str, Any], a: str, b: str) -> str:
    times = {name: Timing(*(found["timings"][name][k] for k in ("median", "low", "high", "rounds"))) for name in (a, b)}
    noisy = " (noisy)" if max(t.spread for t in times.values()) > 0.1 else ""
    return f"{times[a].median / times[b].median:.2f}x{noisy}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.peft_model", description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long each call is timed")
    parser.add_argument("--out", type=Path, help="the file of results; default: benchmarks/results/peft")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    machine, dtype, cases = fingerprint(), getattr(torch, given.dtype), []
    say(machine_line(machine))
    for options, calls in (
        ({"adapters": ADAPTERS}, {"forward": ((1, 1), (1, 16), (1, 256)), "mixed forward": ((16, 1), (16, 16)),
                                  "training step": ((1, 16), (1, 256))}),
        ({"lora_dropout": 0.05}, {"training step, dropout 0.05": ((1, 256),)}),
        ({"use_dora": True}, {"DoRA forward": ((1, 16),), "DoRA forward, norms kept": ((1, 16),),
                              "DoRA training step": ((1, 256),)}),
        ({"use_dora": True, "lora_dropout": 0.05}, {"DoRA training step, dropout 0.05": ((1, 256),)}),
    ):  # fmt: skip
        models = build(dtype, **options)
        cases += [case(models, what, shape, given.seconds) for what, shapes in calls.items() for shape in shapes]
    heads = (
        "call",
        "batch x tokens",
        f"{PEFT}, ms",
        f"{PEFT} / {OURS}",
        f"{OURS} / {BASE}",
        f"{PEFT} / {BASE}",
        "error / PEFT's",
    )
    rows = []
    for c in cases:
        ratios = (ratio(c, *pair) for pair in ((PEFT, OURS), (OURS, BASE), (PEFT, BASE)))
        error = f"{c['error']:.2f}" if "error" in c else "-"
        median = c["timings"][PEFT]["median"]
        rows.append((c["what"], f"{c['batch']} x {c['tokens']}", f"{1e3 * median:.2f}", *ratios, error))
    print_table(f"two Llama layers in {given.dtype}, {given.threads} threads", heads, rows, right=range(2, 7))
    path = given.out or RESULTS / f"llama_{given.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "threads": given.threads, "dtype": given.dtype, "cases": cases}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
