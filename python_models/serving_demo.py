"""The demonstration's chapter on serving: several streaming requests at once, over HTTP, and what that is worth."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn

from genai_kernels.cli import report
from genai_kernels.cli.console import print_table, say
from genai_kernels.cli.machine import fingerprint
from genai_kernels.cli.plots import Line, line_plot
from genai_kernels.cli.report import Section
from python_models import llama_files
from python_models.llama import Llama
from python_models.llama_cache import generate
from python_models.llama_train import CHECKPOINT
from python_models.serving import Engine, Sampling
from python_models.serving_http import Server, load

PROMPTS = [
    "import os\nimport sys\n\ndef main(argv=None):\n    ",
    "class Stack:\n    def push(self, item):\n        ",
    'def read(path):\n    """Return the',
    "for name in sorted(names):\n    if ",
]


def stream(port: int, prompt: str, seed: int, tokens: int, said: list[tuple[float, str]]) -> None:
    """Asks for a completion, and notes each piece of it with the time at which it came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.7, "top_p": 0.95, "seed": seed, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            said.append((time.perf_counter(), json.loads(line[6:])["choices"][0]["text"]))


def ask_all(port: int, tokens: int) -> list[list[tuple[float, str]]]:
    """All prompts at once, each from a client of its own."""
    said: list[list[tuple[float, str]]] = [[] for _ in PROMPTS]
    clients = [
        threading.Thread(target=stream, args=(port, prompt, i, tokens, said[i])) for i, prompt in enumerate(PROMPTS)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return said


def rates(model: Llama, sizes: Sequence[int], tokens: int) -> tuple[dict[int, float], float]:
    """Tokens a second with so many requests at once, and of one after the other in plain PyTorch."""
    import genai_kernels as gk

    prompt = [(7 * i) % model.config.vocabulary for i in range(48)]
    found = {}
    for n in sizes:
        engine = Engine(model, num_blocks=n * (-(-(len(prompt) + tokens) // 16) + 1), prefix_cache=False)
        begin = time.perf_counter()
        for i in range(n):
            engine.add([i, *prompt], Sampling(tokens, ignore_end=True))
        engine.run()
        found[n] = n * tokens / (time.perf_counter() - begin)
    with gk.use_backend("reference"):
        begin = time.perf_counter()
        count = sum(generate(model, torch.tensor([[i, *prompt]]), tokens).shape[1] for i in range(2))
        eager = count / (time.perf_counter() - begin)
    return found, eager


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m python_models.serving_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the plot and the report")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    machine = fingerprint()

    say(f"A Llama of {CHECKPOINT.name}, served; {len(PROMPTS)} clients at once", "bold")
    engine, tokenizer = load(CHECKPOINT, torch.float32, num_blocks=256)
    config = uvicorn.Config(Server(engine, tokenizer, CHECKPOINT.name).app, host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    begin = time.perf_counter()
    said = ask_all(server.servers[0].sockets[0].getsockname()[1], given.tokens)
    elapsed = time.perf_counter() - begin
    stats = engine.blocks.stats()
    server.should_exit = True
    thread.join()
    texts = [prompt + "".join(piece for _, piece in pieces) for prompt, pieces in zip(PROMPTS, said, strict=True)]
    for text in texts:
        say(text, "cyan")
        say("")
    firsts = [1e3 * (pieces[0][0] - begin) for pieces in said]
    summary = (
        f"{len(PROMPTS)} answers in {elapsed:.2f} s, in {engine.steps} steps of the engine; the first piece of each "
        f"after {min(firsts):.0f} to {max(firsts):.0f} ms; {stats['used']} of {engine.blocks.num_blocks} blocks still "
        "in use."
    )
    say(summary)

    by_batch, eager = rates(llama_files.load(CHECKPOINT, dtype=torch.float32), (1, 2, 4, 8, 16, 32), 48)
    rows = [(n, f"{rate:,.0f}", f"{rate / eager:.2f}x") for n, rate in by_batch.items()]
    columns = ("requests at once", "tokens/s", "against one by one in plain PyTorch")
    print_table("", columns, rows, right=(0, 1, 2))
    curves = [
        Line("engine", list(by_batch), list(by_batch.values())),
        Line("one by one, plain PyTorch", list(by_batch), [eager] * len(by_batch), dashed=True),
    ]
    plotted = line_plot(given.out / "serving.png", curves, title="Serving the small Llama", xlabel="requests at once",
                        ylabel="tokens/s", log_x=True)  # fmt: skip
    report.html_report(
        given.out / "serving.html",
        "genai_kernels: a Llama served",
        [
            Section("Machine", f"{report.machine_line(machine)}; {torch.get_num_threads()} threads"),
            Section("Answers", "\n\n".join([summary, *("\n\n".join(t.splitlines()) for t in texts)])),
            Section("Throughput", tables=[(columns, rows)], images=[given.out / "serving.png"] if plotted else []),
        ],
    )
    say(f"report: {given.out / 'serving.html'}")
    return 0 if all(pieces for pieces in said) and stats["used"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
