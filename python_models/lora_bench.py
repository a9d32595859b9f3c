"""What LoRA costs beside PEFT: a training step of the whole small Llama, and decoding with many adapters in one batch.

`python -m python_models.lora bench`. Nothing is timed whose result has not just been checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import genai_kernels as gk
from genai_kernels.cli.timing import summary
from python_models import llama_files, lora_memory
from python_models.char_lm_train import agreement
from python_models.llama_train import CHECKPOINT
from python_models.lora_compare import recipe_of
from python_models.lora_peft import WITHOUT_DROPOUT, PeftRun
from python_models.lora_serving import BASE, Adapters
from python_models.lora_train import new_run, twin
from python_models.serving import Engine, Sampling

OURS, PEFT, PEFT_HF = "ours", "PEFT, this model in plain PyTorch", "PEFT, transformers' Llama"


def training_steps(text: torch.Tensor, steps: int) -> dict[str, dict[str, Any]]:
    """Steps of ours and of PEFT in turn, from the same weights on the same passages.

    Raises:
        RuntimeError: the losses of ours and of PEFT on this model disagree, by the rule for loss curves.
    """
    recipe = recipe_of("lora", steps, 0)
    ours = new_run("lora", recipe, text, sizes=WITHOUT_DROPOUT)
    runs = {OURS: ours, PEFT: PeftRun("this model", recipe, text), PEFT_HF: PeftRun("transformers", recipe, text)}
    exact = twin(ours, exact=True)
    for _ in range(steps):
        for run in runs.values():
            run.step()
    for _ in range(min(10, steps)):
        exact.step()
    n = len(exact.losses)
    rule = agreement(ours.losses[:n], runs[PEFT].losses[:n], exact.losses)
    if not rule.ok:
        raise RuntimeError(f"lora_bench: expected the losses of PEFT, got others from step {rule.first_excess} on")
    if not abs(runs[PEFT_HF].losses[0] - exact.losses[0]) <= rule.limit[0]:  # then it goes its own way
        raise RuntimeError("lora_bench: expected the first loss of transformers' Llama, got another")
    return {
        name: {
            "parameters": ours.adapted.parameters if run is ours else run.parameters,
            "seconds": summary(run.seconds[2:]).as_dict(),
            "losses": run.losses[:n],
        }
        for name, run in runs.items()
    }


def peaks() -> dict[str, int]:
    """Bytes of two such steps, each in a fresh process."""
    how = {OURS: ("lora", "auto"), PEFT: ("peft", "this model"), PEFT_HF: ("peft", "transformers")}
    return {name: lora_memory.peak(*args) for name, args in how.items()}


# ---- many adapters in one batch ----


def one_by_one(x, weight, adapters, ids, bias=None):
    """As PEFT has a mixed batch: the rows of each adapter taken out, and its part added to them."""
    y = F.linear(x, weight, bias)
    for i, adapter in enumerate(adapters):
        rows = (ids == i).nonzero().flatten()
        y[rows] += F.linear(F.linear(x[rows], adapter.lora_a), adapter.lora_b) * adapter.scaling
    return y


def gathered(x, weight, adapters, ids, bias=None):
    """As vLLM has one without a kernel of its own: the matrices of every row side by side, and two batched products."""
    ids, scaling = ids.long(), torch.tensor([a.scaling for a in adapters], dtype=x.dtype)
    a, b = torch.stack([a.lora_a for a in adapters])[ids], torch.stack([a.lora_b for a in adapters])[ids]
    s = torch.einsum("ni,nri->nr", x, a) * scaling[ids, None]
    return F.linear(x, weight, bias) + torch.einsum("nr,nor->no", s, b) * (ids >= 0)[:, None]


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "lora_linear_multi": gk.lora_linear_multi, "one adapter after the other": one_by_one, "gathered": gathered,
}  # fmt: skip


def engine_with(count: int, requests: int, product: Callable[..., torch.Tensor], rank: int = 8) -> Engine:
    """An engine with so many random adapters, and requests that have them in turn."""
    model = llama_files.load(CHECKPOINT, dtype=torch.float32)
    pool = Adapters(model, product)
    draw = torch.Generator().manual_seed(0)
    for i in range(count):
        for layer in pool.layers.values():
            a = torch.randn(rank, layer.in_features, generator=draw) * layer.in_features**-0.5
            b = torch.randn(layer.out_features, rank, generator=draw) * 0.02
            layer.add_adapter(str(i), a, b, lora_alpha=2.0 * rank)
            layer.prepare()
        pool.numbers[str(i)] = i + 1
    engine = Engine(model, num_blocks=requests * 6, adapters=pool)
    for i in range(requests):
        prompt = [(7 * i + j) % 2000 for j in range(16)]
        engine.add(prompt, Sampling(60, ignore_end=True), adapter=str(i % count) if count else BASE)
    return engine


def decoding(counts: list[int], requests: int = 64, steps: int = 12) -> dict[str, dict[int, float]]:
    """Seconds of a decoding step by the number of adapters in its batch, of each way in turn; 0 is the base alone.

    Raises:
        RuntimeError: a way whose tokens are too often not those of `lora_linear_multi`.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in WAYS}
    for count in counts:
        engines = {name: engine_with(count, requests, product) for name, product in WAYS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for engine in engines.values():
            while any(not r.output for r in engine.running) or engine.waiting:  # prompts, 512 tokens a step
                engine.step()
            engine.step()
        for _ in range(steps):
            for name, engine in engines.items():
                seconds[name].append(_timed(engine.step))
        texts = {name: [r.output for r in engine.running] for name, engine in engines.items()}
        for name in list(WAYS)[1:]:
            # sums of another order may turn a token of equal weight, and all after it
            same = sum(a == b for a, b in zip(texts[next(iter(WAYS))], texts[name], strict=True))
            if same < 0.9 * requests:
                raise RuntimeError(f"lora_bench: {name}: expected the same texts, got {same} of {requests}")
        for name in WAYS:
            found[name][count] = summary(seconds[name]).median
    return found


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
