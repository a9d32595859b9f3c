"""What serving costs: a Poisson trace through the engine, and the same requests as users serve them without one.

`python -m python_models.serving --bench`. Peers, in the same run and on the same weights: Hugging Face transformers'
`generate` with a DynamicCache, one request after the other; and with padded batches, each as slow as its longest. All
greedy, so that every answer can be compared before a time is printed.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from genai_kernels.cli.console import print_table, say
from python_models import llama_data, llama_files
from python_models.llama import Llama
from python_models.serving import Engine, Request, Sampling


@dataclass(frozen=True)
class Job:
    """A request of the trace: when it comes, in seconds, what it says, and how many tokens it wants."""

    arrival: float
    prompt: list[int]
    tokens: int


def trace(tokenizer: Tokenizer, count: int, rate: float, seed: int = 0) -> list[Job]:
    """Pieces of held-out source, 16 to 200 tokens, each to go on for 16 to 128; arrivals of a Poisson process."""
    rnd = random.Random(seed)
    text = "".join(llama_data.Texts.load().validation)
    now, jobs = 0.0, []
    for _ in range(count):
        now += rnd.expovariate(rate)
        at = rnd.randrange(len(text) - 2000)
        prompt = tokenizer.encode(text[at : at + 2000]).ids[: rnd.randrange(16, 200)]
        jobs.append(Job(now, prompt, rnd.randrange(16, 128)))
    return jobs


@dataclass
class Outcome:
    """How the requests of a trace fared. Times in seconds since each one's arrival, or for each of its tokens."""

    answers: list[list[int]]
    elapsed: float
    first: list[float]
    per_token: list[float]
    waste: float = 0.0  # the mean share of the slots in used blocks that hold no token
    used: int = 0  # bytes of the blocks that were used at most

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.answers)) / self.elapsed

    def row(self, name: str) -> list[str]:
        def tail(values: list[float]) -> str:
            ordered = sorted(values)
            return f"{1e3 * statistics.median(values):.1f} / {1e3 * ordered[int(0.99 * (len(ordered) - 1))]:.1f}"

        return [name, f"{self.rate:,.0f}", tail(self.first), tail(self.per_token)]


def by_engine(model: Llama, jobs: list[Job], **options: Any) -> Outcome:
    """The trace in real time: a request is there when its time has come, not before."""
    engine = Engine(model, **{"num_blocks": 2048, "block_size": 8, **options})
    times: dict[Request, list[float]] = {}
    running: list[Request] = []
    waste, most = [], 0
    begin = time.perf_counter()
    left = list(reversed(jobs))
    while left or not engine.idle:
        now = time.perf_counter() - begin
        while left and left[-1].arrival <= now:
            job = left.pop()
            request = engine.add(
                job.prompt,
                Sampling(job.tokens, ignore_end=True),
                on_token=lambda r, t: times.setdefault(r, []).append(time.perf_counter() - begin),
            )
            running.append(request)
        if engine.idle:
            time.sleep(max(0.0, left[-1].arrival - now))
        elif engine.step():
            stats = engine.blocks.stats()
            most = max(most, stats["used"])
            if stats["used"]:
                waste.append(stats["waste"])
    elapsed = time.perf_counter() - begin
    arrivals = [job.arrival for job in jobs]
    return Outcome(
        [r.output for r in running],
        elapsed,
        [times[r][0] - at for r, at in zip(running, arrivals, strict=True)],
        [(times[r][-1] - times[r][0]) / max(1, len(times[r]) - 1) for r in running],
        statistics.fmean(waste),
        most * engine.cache.nbytes // engine.blocks.num_blocks,
    )


class Transformers:
    """The same weights in Hugging Face's own model, as it is used without a serving library."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.cache: Callable[[], Any] = transformers.DynamicCache

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """A batch, padded on the left to its longest prompt."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        # some ends are wanted to be ignored: the same number of tokens for everyone
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
            past_key_values=self.cache(), eos_token_id=None,
        )  # fmt: skip
        return out[:, width:].tolist()

    def serve(self, jobs: list[Job], batch: int) -> Outcome:
        """The trace in batches of `batch`, each begun when all of it is there and the one before is done."""
        begin = time.perf_counter()
        answers, first, per_token = [], [], []
        for at in range(0, len(jobs), batch):
            part = jobs[at : at + batch]
            time.sleep(max(0.0, part[-1].arrival - (time.perf_counter() - begin)))
            most = max(job.tokens for job in part)
            start = time.perf_counter()
            texts = self.generate([job.prompt for job in part], most)
            now = time.perf_counter()
            for job, text in zip(part, texts, strict=True):
                answers.append(text[: job.tokens])
                per_token.append((now - start) / most)
                first.append(now - begin - job.arrival)  # nothing is seen before the batch is done
        return Outcome(answers, time.perf_counter() - begin, first, per_token)


def batches(model: Llama, jobs: list[Job], sizes: list[int]) -> dict[int, Outcome]:
    """The engine with so many requests at once."""
    return {n: by_engine(model, [Job(0.0, j.prompt, 64) for j in (jobs * n)[:n]]) for n in sizes}


def contexts(model: Llama, jobs: list[Job], sizes: list[int]) -> dict[int, float]:
    """Tokens a second of 16 requests that have so many tokens behind them."""
    text = [t for job in jobs for t in job.prompt]
    found = {}
    for n in sizes:
        outcome = by_engine(model, [Job(0.0, text[i : i + n], 16) for i in range(16)])
        found[n] = 1 / statistics.median(outcome.per_token) * 16
    return found


def run(folder: Path, dtype: torch.dtype | None, requests: int, output: Path | None) -> int:
    """Measures, checks that all ways say the same, prints, and writes the figures and the plots."""
    dtype = dtype or torch.float32
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = llama_files.load(folder, dtype=dtype)
    peer = Transformers(folder, dtype)
    jobs = trace(tokenizer, requests, rate=16.0)
    at_once = [Job(0.0, job.prompt, job.tokens) for job in jobs[:16]]
    by_engine(model, at_once[:4])  # what is allocated and compiled once
    peer.serve(at_once[:2], 2)

    rounds: dict[str, list[Outcome]] = {}
    for _ in range(3):  # interleaved: what slows the machine down slows all of them
        rounds.setdefault("engine, 16 at once", []).append(by_engine(model, at_once))
        rounds.setdefault("one by one, DynamicCache", []).append(peer.serve(at_once, 1))
        rounds.setdefault("padded batch of 16, DynamicCache", []).append(peer.serve(at_once, 16))
    best = {name: sorted(found, key=lambda o: o.elapsed)[len(found) // 2] for name, found in rounds.items()}
    poisson = by_engine(model, jobs)
    ours = best["engine, 16 at once"]
    same = {name: sum(a == b for a, b in zip(ours.answers, o.answers, strict=True)) for name, o in best.items()}
    by_batch = batches(model, jobs, [1, 2, 4, 8, 16, 32, 64])
    by_context = contexts(model, jobs, [32, 64, 128, 256, 448])

    config = model.config
    token_bytes = 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize
    # a contiguous cache has room for the longest text that a request may become
    memory = {n: {"paged": o.used, "contiguous": n * config.context * token_bytes} for n, o in by_batch.items()}
    say(f"{folder.name}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, {platform.machine()}")
    head = ["", "tokens/s", "first token, p50 / p99 ms", "per token, p50 / p99 ms"]
    print_table("16 requests at once", head, [o.row(name) for name, o in best.items()], right=(1, 2, 3))
    print_table(
        f"{requests} requests, Poisson, 16 a second", head, [poisson.row("engine")], right=(1, 2, 3)
    )  # as they come
    for name in list(best)[1:]:
        spread = sorted(a.rate / b.rate for a, b in zip(rounds["engine, 16 at once"], rounds[name], strict=True))
        say(f"engine / {name}: {spread[1]:.2f}x ({spread[0]:.2f} to {spread[-1]:.2f}); {same[name]} of 16 texts equal")
    most = max(memory)
    say(f"pool waste {100 * poisson.waste:.1f} %, {poisson.used / 1e6:.1f} MB used at most; {most} requests at once: "
        f"{memory[most]['paged'] / 1e6:.1f} MB, contiguous {memory[most]['contiguous'] / 1e6:.1f} MB")  # fmt: skip
    if output:
        figures = {
            "model": folder.name, "dtype": str(dtype), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "tokens_per_second": {name: [o.rate for o in found] for name, found in rounds.items()},
            "equal_texts_of_16": same, "poisson": {"rate": poisson.rate, "first": poisson.first,
                                                   "per_token": poisson.per_token, "waste": poisson.waste},
            "by_batch": {n: o.rate for n, o in by_batch.items()}, "by_context": by_context, "memory": memory,
        }  # fmt: skip
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n")
        plot(figures, output.with_suffix(".png"))
        say(f"written: {output}, {output.with_suffix('.png')}")
    return 0


def plot(figures: dict[str, Any], path: Path) -> None:
    """Tokens a second against the batch and against the context; memory against the requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, name, label in ((axes[0], "by_batch", "requests at once"), (axes[1], "by_context", "tokens of context")):
        points = {int(k): v for k, v in figures[name].items()}
        axis.plot(list(points), list(points.values()), "o-")
        axis.set(xlabel=label, ylabel="tokens/s", xscale="log", ylim=(0, None))
    for kind in ("paged", "contiguous"):
        points = {int(n): sizes[kind] / 1e6 for n, sizes in figures["memory"].items()}
        axes[2].plot(list(points), list(points.values()), "o-", label=kind)
    axes[2].set(xlabel="requests at once", ylabel="MB of keys and values", xscale="log", yscale="log")
    axes[2].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
