"""Trains the small Llama of checkpoints/llama_stdlib on the standard library's source: `make llama`.

Everything that the checkpoint needs is written beside its weights, in the Hugging Face layout: config.json,
model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json; and training.json, what it was trained
on and how well it did.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from genai_kernels.cli.console import print_table, say
from python_models import char_data, llama_files
from python_models.char_lm_train import Recipe
from python_models.kneser_ney import KneserNey
from python_models.llama import Llama
from python_models.llama_configs import Config
from python_models.llama_data import END, Texts, encode, train_tokenizer

CHECKPOINT = Path(__file__).with_name("checkpoints") / "llama_stdlib"
# Two million weights, 4 MB in bfloat16. Three query heads share one of k and v.
SMALL = Config(
    vocabulary=2048, layers=4, width=192, heads=6, kv_heads=2, hidden=512, context=512, eps=1e-5, tied=True, bos=0,
    eos=0, dtype="bfloat16",
)  # fmt: skip


def train(config: Config, recipe: Recipe, text: torch.Tensor, every: int = 200) -> tuple[Llama, list[float]]:
    """A model in float32 and the loss of each step in nats per token; says how it goes every so many steps."""
    torch.manual_seed(recipe.seed)
    model = Llama(config)
    matrices = [w for w in model.parameters() if w.dim() >= 2]
    others = [w for w in model.parameters() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    batches = char_data.batches(text, recipe.batch, config.context, recipe.seed)
    losses: list[float] = []
    begin = time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = model.loss(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0:
            rate = (step + 1) * recipe.batch * config.context / (time.perf_counter() - begin)
            say(f"step {step + 1}: {statistics.fmean(losses[-every:]):.3f} nats per token, {rate:,.0f} tokens/s")
    return model, losses


@torch.inference_mode()
def bits_per_byte(model: Llama, text: torch.Tensor, total_bytes: int) -> float:
    """Of a text in tokens, all of it: each token is scored once, with at least half the context before it."""
    context = model.config.context
    stride, nats = context // 2, 0.0
    for start in range(0, len(text) - 1, stride):
        piece = text[start : start + context + 1]
        scored = slice(0 if start == 0 else context - stride, None)
        if len(piece) - 1 <= (scored.start or 0):
            break
        logits = model(piece[None, :-1])[0, scored].float()
        nats += float(F.cross_entropy(logits, piece[1:][scored], reduction="sum"))
    return nats / math.log(2) / total_bytes


def kneser_ney_bits_per_byte(texts: Texts, order: int) -> float:
    """The baseline: n-grams of bytes, from all of the training text, on the same held-out bytes."""
    train_bytes, held_out = (
        np.frombuffer("".join("\0" + text for text in part).encode(), dtype=np.uint8).astype(np.int64)
        for part in (texts.train, texts.validation)
    )
    return KneserNey(train_bytes, 256, order).bits_per_character(held_out)


def write_checkpoint(folder: Path, model: Llama, tokenizer, about: dict[str, object]) -> None:
    """Everything beside the weights too, so that the field's tools open the folder."""
    llama_files.save(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
            "model_max_length": model.config.context, "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {"bos_token_id": model.config.bos, "eos_token_id": model.config.eos},
        "training.json": about,
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_models.llama_train", description=__doc__)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    texts = Texts.load()
    say(texts.about)
    tokenizer = train_tokenizer(texts.train, SMALL.vocabulary)
    text, held_out = encode(tokenizer, texts.train), encode(tokenizer, texts.validation)
    held_out_bytes = sum(len(t.encode()) + 1 for t in texts.validation)  # 1 for the END after each
    recipe = Recipe(arguments.steps, arguments.batch, arguments.rate, warmup=100, seed=arguments.seed)
    begin = time.perf_counter()
    model, losses = train(SMALL, recipe, text)
    seconds = time.perf_counter() - begin
    scores = {"float32": bits_per_byte(model, held_out, held_out_bytes)}
    model = model.to(torch.bfloat16)
    scores["bfloat16, as saved"] = bits_per_byte(model, held_out, held_out_bytes)
    for order in (5, 7):
        scores[f"{order}-gram Kneser-Ney of bytes"] = kneser_ney_bits_per_byte(texts, order)
    print_table(
        "held-out bits per byte", ("model", "bits per byte"), [(n, f"{s:.4f}") for n, s in scores.items()], right=(1,)
    )
    about = {
        "trained_on": f"standard library source, {texts.about}",
        "tokens_read": recipe.steps * recipe.batch * SMALL.context,
        "tokens_in_text": len(text),
        "minutes": round(seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "recipe": {"steps": recipe.steps, "batch": recipe.batch, "rate": recipe.peak_rate, "seed": recipe.seed},
        "last_losses": round(statistics.fmean(losses[-100:]), 4),
        "held_out_bits_per_byte": {name: round(score, 4) for name, score in scores.items()},
    }
    write_checkpoint(arguments.out, model, tokenizer, about)
    say(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
