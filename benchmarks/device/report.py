"""README's GPU table, from benchmarks/results/gpu/*.json: what device_run has measured, and plainly what it has not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/gpu"
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
MISSING = "not yet measured"
OURS = ("cuda", "triton")
# (words in README, op, name of the case in benchmarks/device/cases.py, backward)
ROWS = [
    ("attention forward, d128, 8192 tokens", "flash_attention", "d128 n8192 full", False),
    ("the same, causal", "flash_attention", "d128 n8192 causal", False),
    ("attention backward, d128, 8192 tokens", "flash_attention", "d128 n8192 full", True),
    ("the same, causal", "flash_attention", "d128 n8192 causal", True),
    ("attention forward, d64, 8192 tokens", "flash_attention", "d64 n8192 full", False),
    ("attention forward, d256, 8192 tokens", "flash_attention", "d256 n8192 full", False),
    ("attention, window 4096 of 16384 tokens", "flash_attention", "d128 n16384 window 4096", False),
    ("rms_norm, 16384 x 4096", "rms_norm", "16384x4096", False),
    ("rms_norm backward", "rms_norm", "16384x4096", True),
    ("fused_add_rms_norm, 16384 x 4096", "fused_add_rms_norm", "16384x4096", False),
    ("layer_norm, 16384 x 4096", "layer_norm", "16384x4096", False),
    ("silu_and_mul, 16384 x 11008", "silu_and_mul", "16384x11008", False),
    ("silu_and_mul backward", "silu_and_mul", "16384x11008", True),
    ("rotary_embedding, 16384 x 32 x 128", "rotary_embedding", "16384x32x128", False),
    ("paged decoding, 32 sequences of 8192 tokens", "paged_attention", "b32 n8192", False),
    ("the same, 16 of 16384", "paged_attention", "b16 n16384", False),
    ("append_kv_cache with rotation, 16384 x 8 x 128", "append_kv_cache", "16384x8x128", False),
    ("sample, 64 x 128000", "sample", "64x128000", False),
    ("linear, 8192 x 4096 x 4096", "linear", "8192x4096x4096", False),
    ("lora_linear, the same with rank 16", "lora_linear", "8192x4096x4096 r16", False),
    ("lora_linear backward, the base frozen", "lora_linear", "8192x4096x4096 r16", True),
    ("lora_linear, 16 rows", "lora_linear", "16x4096x4096 r16", False),
    ("lora_linear_multi, 64 rows, 64 adapters", "lora_linear_multi", "64x4096x4096 64 of r16", False),
    ("nf4_linear, 16 x 4096 x 4096", "nf4_linear", "16x4096x4096", False),
    ("linear and cross entropy, 8192 x 4096 x 128256", "fused_linear_cross_entropy", "8192x4096x128256", False),
    ("group_norm_silu, 16 x 320 x 64 x 64", "group_norm_silu", "16x320x64x64", False),
    ("the same, channels last", "group_norm_silu", "16x320x64x64 last", False),
    ("group_norm_silu backward", "group_norm_silu", "16x320x64x64", True),
    ("conv2d, 16 x 320 x 64 x 64", "conv2d", "16x320x64x64", False),
    ("the same, group norm and SiLU before it", "conv2d", "16x320x64x64 norm", False),
    ("conv2d with both backward", "conv2d", "16x320x64x64 norm", True),
    ("up_conv2d, 16 x 640 x 32 x 32", "up_conv2d", "16x640x32x32", False),
    ("cfg_step, a guided step of 512 latents", "cfg_step", "512x4x128x128", False),
]


def results() -> dict[str, list[dict[str, Any]]]:
    """The records of every committed run, by the card's name."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        records = json.loads(path.read_text())["records"]
        name = next(r["name"] for r in records if r["stage"] == "fingerprint")
        found[name] = records
    return found


def _rate(record: dict[str, Any], ms: float) -> str:
    return f"{record['flops'] / ms / 1e9:.0f} TFLOP/s" if record["flops"] else f"{record['bytes'] / ms / 1e9:.2f} TB/s"


def _cells(records: list[dict[str, Any]], op: str, name: str, backward: bool) -> list[str]:
    """CUDA C++, Triton, the fastest peer, share of the card's ceiling."""
    times = [r for r in records if r["stage"] == "time" and (r["op"], r["name"], r["backward"]) == (op, name, backward)]
    if not times:
        return [MISSING] * 4
    record = times[-1]
    timings = record["timings"]
    cells = [_rate(record, timings[b]["ms"]) if b in timings else record["failed"].get(b, MISSING)[:60] for b in OURS]
    peers = {n: t["ms"] for n, t in timings.items() if n not in OURS}
    best = min(peers, key=lambda n: peers[n], default=None)
    cells.append(MISSING if best is None else f"{_rate(record, peers[best])} ({best})")
    mine = min((timings[b]["ms"] for b in OURS if b in timings), default=None)
    ceilings = [r for r in records if r["stage"] == "ceilings"]
    if mine is None or not ceilings:
        return [*cells, MISSING]
    limit, work = ("bf16_tflop_s", record["flops"]) if record["flops"] else ("copy_tb_s", record["bytes"])
    return [*cells, f"{100 * work / mine / 1e9 / ceilings[-1][limit]:.0f} %"]


def readme_block(found: dict[str, list[dict[str, Any]]]) -> str:
    """One table for each card, or one of empty cells where no card has been measured."""
    lines = []
    for card, records in (found or {"": []}).items():
        title = "No card has been measured yet: the cells say so." if not card else f"{card}, bf16:"
        for r in records:
            if r["stage"] == "ceilings":
                product = f"product of two 8192 x 8192 matrices {r['bf16_tflop_s']:.0f} TFLOP/s"
                title += f" copy {r['copy_tb_s']:.2f} TB/s, {product}."
        head = ["", "CUDA C++", "Triton", "fastest peer", "share of the card's ceiling"]
        rows = [head, ["---"] * 5, *([words, *_cells(records, *what)] for words, *what in ROWS)]
        lines += [title, "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines[:-1]) + "\n"
