"""All ways to adapt the small Llama, side by side: what each is worth on held-out text, and what it costs.

Held-out bits per character are of several seeds, which draw the start, the passages and the dropout. Every method is
held against its eager twin, step by step, by the rule of char_lm_train.Agreement; the steps of all methods and of their
twins are timed in turn, and the peak memory of each is that of a fresh process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tokenizers import Tokenizer

from genai_kernels.cli.console import say as tell
from genai_kernels.cli.timing import summary
from python_models import llama_files, lora_memory
from python_models.char_lm_train import Agreement, Recipe, agreement
from python_models.llama_train import CHECKPOINT
from python_models.lora_data import Register
from python_models.lora_methods import Sizes, adapt
from python_models.lora_train import RATES, Run, held_out_bits, new_run, twin

BACKENDS = {"ours": "auto", "eager": "reference"}
# Not 0: LoRA's run of that seed multiplies every rounding error a hundredfold in its first ten steps, eager's too.
TWIN_SEED = 1


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def recipe_of(method: str, steps: int, seed: int, batch: int = 2) -> Recipe:
    return Recipe(steps, batch=batch, peak_rate=RATES[method], warmup=max(1, steps // 12), seed=seed)


def base_bits(register: Register) -> float:
    """Of the checkpoint as it is."""
    return held_out_bits(adapt(llama_files.load(CHECKPOINT, dtype=torch.float32), "full"), register)


def trained(method: str, register: Register, steps: int, seed: int, say: Callable[[str], Any] = str) -> Run:
    """A run to its end; `say` is told about each step."""
    run = new_run(method, recipe_of(method, steps, seed), register.train)
    while len(run.losses) < steps:
        say(f"{method}, {register.name}, seed {seed}: step {len(run.losses)}, {run.step():.3f} nats per token")
    return run


def twins(methods: Iterable[str], text: torch.Tensor, steps: int, of: int) -> dict[str, dict[str, Any]]:
    """Of each method: how far the losses of ours and of eager are from float64, and the seconds of their steps; in the
    first `steps` steps of a training of `of`.
    """
    runs: dict[str, dict[str, Run]] = {}
    for method in methods:
        run = new_run(method, recipe_of(method, of, TWIN_SEED), text)
        runs[method] = {"ours": run, "eager": twin(run), "float64": twin(run, exact=True)}
    for _ in range(steps):
        for three in runs.values():
            for run in three.values():
                run.step()
    found = {}
    for method, three in runs.items():
        rule = agreement(three["ours"].losses, three["eager"].losses, three["float64"].losses)
        seconds = {name: summary(three[name].seconds[1:]).as_dict() for name in BACKENDS}
        found[method] = {"agreement": rule, "seconds": seconds, "parameters": three["ours"].adapted.parameters}
    return found


def agreement_line(found: dict[str, dict[str, Any]]) -> str:
    """One sentence about all methods."""
    wrong = [method for method, one in found.items() if not one["agreement"].ok]
    steps = len(next(iter(found.values()))["agreement"].error)
    worst = max(max(one["agreement"].error) for one in found.values())
    eager = max(max(one["agreement"].eager_error) for one in found.values())
    if wrong:
        return f"THE LOSSES DISAGREE with the eager twin's: {', '.join(wrong)}"
    return (
        f"the losses of all {len(found)} methods agree with their eager twins' in all {steps} steps, by the rule for "
        f"loss curves: at most {worst:.1e} nats from float64, eager at most {eager:.1e}"
    )


def compare(
    methods: list[str],
    registers: list[str],
    *,
    steps: int,
    seeds: int,
    twin_steps: int,
    held_out: int,
    say: Callable[[str], Any] = str,
) -> dict[str, Any]:
    """Everything, as JSON has it, on the first `held_out` tokens of what is held out. A method whose losses disagree
    with its twin's has no step time.
    """
    words, parts, threads = tokenizer(), {}, torch.get_num_threads()
    for name in registers:
        parts[name] = Register.load(name, words).beginning(held_out, words)
    found = twins(methods, parts[registers[0]].train, twin_steps, steps)
    tell(agreement_line(found))
    rows: dict[str, Any] = {}
    for method, one in found.items():
        rule: Agreement = one["agreement"]
        memory = {name: lora_memory.peak(method, how) for name, how in BACKENDS.items()}
        rows[method] = {
            "parameters": one["parameters"], "rate": RATES[method], "agrees": rule.ok,
            "error": rule.error, "eager_error": rule.eager_error, "allowed": rule.limit,
            "seconds": one["seconds"] if rule.ok else None, "peak_bytes": memory, "bits": {}, "losses": {},
        }  # fmt: skip
    for name, register in parts.items():
        for method in methods:
            runs = [trained(method, register, steps, seed, say) for seed in range(seeds)]
            rows[method]["bits"][name] = [held_out_bits(run.adapted, register) for run in runs]
            rows[method]["losses"][name] = [round(statistics.fmean(at), 4) for at in zip(*(r.losses for r in runs),
                                                                                           strict=True)]  # fmt: skip
    return {
        "model": CHECKPOINT.name, "threads": threads, "torch": torch.__version__, "steps": steps, "seeds": seeds,
        "held_out_tokens": {name: len(register.held_out) for name, register in parts.items()},
        "tokens_per_step": 2 * 256, "sizes": vars(Sizes()),
        "registers": {name: register.about for name, register in parts.items()},
        "base": {name: base_bits(register) for name, register in parts.items()}, "methods": rows,
    }  # fmt: skip
