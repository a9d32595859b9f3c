"""Whether a row of a matrix product has the same bits in any batch and on any number of threads, and what that costs.

`python -m benchmarks.batch_invariance` prints, for this machine, the tables of genai_kernels/ops/linear/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import genai_kernels as gk
from genai_kernels.cli.console import print_table, say
from genai_kernels.cli.machine import fingerprint
from genai_kernels.cli.report import machine_line

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((192, 1024), (2048, 2048))
ROWS = (1, 2, 4, 16, 32, 64, 512)
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WAYS: dict[str, Product] = {"F.linear": F.linear, "genai_kernels.linear": gk.linear}


def differs(product: Product, shape: tuple[int, int], dtype: torch.dtype, threads: Sequence[int]) -> list[str]:
    """The numbers of rows, and of threads, with which some row is not what it is among 512 on one thread."""
    x, w = torch.randn(512, shape[0]).to(dtype), torch.randn(shape[1], shape[0]).to(dtype)
    torch.set_num_threads(1)
    among_all, found = product(x, w), []
    for count in threads:
        torch.set_num_threads(count)
        wrong = [n for n in ROWS if not torch.equal(product(x[100 : 100 + n], w), among_all[100 : 100 + n][:n])]
        found += [f"{n} rows, {count} threads" for n in wrong]
    return found


def seconds(product: Product, x: torch.Tensor, w: torch.Tensor, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        product(x, w)
    return (time.perf_counter() - begin) / calls


def cost(shape: tuple[int, int], dtype: torch.dtype, rows: int) -> tuple[float, float]:
    """F.linear's time in seconds, and how many times longer the other takes: medians of turns."""
    x, w = torch.randn(rows, shape[0]).to(dtype), torch.randn(shape[1], shape[0]).to(dtype)
    calls = max(3, int(0.01 / seconds(F.linear, x, w, 5)))
    turns = [tuple(seconds(product, x, w, calls) for product in WAYS.values()) for _ in range(7)]
    return statistics.median(a for a, _ in turns), statistics.median(b / a for a, b in turns)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.batch_invariance", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="the most threads that bits are compared with")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    say(machine_line(fingerprint()))
    rows = []
    for name, product in WAYS.items():
        for dtype in DTYPES:
            wrong = [w for shape in SHAPES for w in differs(product, shape, dtype, range(1, given.threads + 1))]
            rows.append((name, str(dtype).removeprefix("torch."), "; ".join(dict.fromkeys(wrong)) or "-"))
    print_table("a row is not what it is among 512 rows on one thread", ("product", "dtype", "with"), rows)
    torch.set_num_threads(1)
    table = []
    for n in ROWS:
        cells = [cost(shape, dtype, n) for shape in SHAPES for dtype in DTYPES[:2]]
        table.append((n, *(f"{ratio:.2f}x of {1e6 * base:,.0f} us" for base, ratio in cells)))
    heads = [f"{shape[0]} x {shape[1]}, {str(d).removeprefix('torch.')}" for shape in SHAPES for d in DTYPES[:2]]
    print_table("genai_kernels.linear / F.linear, one thread", ("rows", *heads), table, right=range(5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
