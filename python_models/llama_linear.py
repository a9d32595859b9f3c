"""The matrix product of a Llama: nn.Linear, and one whose rows do not know of each other.

A served request's tokens lie in one matrix with those of its neighbours, and F.linear rounds a row in another way when
other rows stand beside it. Measured with torch 2.13 on a CPU with AVX-512 and bf16 instructions, rows 1 to 512, widths
192 to 4864, 1 to 4 threads, a row's bits against those it has among 512 rows on one thread:

| | float32 | bfloat16 | float16 |
|---|---|---|---|
| F.linear (MKL; oneDNN in 16 bits) | differ below 16 rows, and with the threads | same (*) | differ for 1 row |
| F.linear, rows in blocks of 16, 32 or 64 | the same for any batch, differ with the threads | same | same |
| oneDNN's inner product | differ for 1 row | same | same |
| oneDNN's inner product, a lone row twice | same | same | same |

(*) not with AVX-512 without its bf16 instructions, where it differs with the threads.

So the remedy is oneDNN's inner product for every dtype that it has on this CPU, at least two rows at a time. It sums in
one order for all rows, blocks of k one after the other. Its time beside F.linear, on one thread: float32 4.0x for one row
of a small matrix (192 x 1024, 19 us), 2.0x for one or two rows of a large one (2048 x 2048), 0.8x to 1.1x from 4 rows
on and 1.0x to 1.1x for 512; bfloat16 1.2x for one row of a large matrix and 1.0x otherwise. In blocks of 16 rows F.linear
takes 1.1x to 4.2x for large matrices in float32. Its error at k = 2048 is twice that of MKL, which adds up several partial sums.

Where oneDNN has no such product (float64, other devices) rows go in blocks of 16 through F.linear, padded with zeros:
one shape for every product, and so the same bits for any batch, at one number of threads.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 16  # rows: the least for which MKL's float32 product keeps its kernel on one thread


@functools.cache
def _onednn_takes(device: str, dtype: torch.dtype) -> bool:
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def batch_invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, with bits of a row that depend on that row alone; on oneDNN not on the number of threads either.

    Args:
        x: `[..., in]`; weight: `[out, in]`; bias: `[out]` or None; one dtype.

    Raises:
        NotImplementedError: a gradient would have to be recorded.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise NotImplementedError(
            "llama: batch_invariant: expected no gradient to record, got one; "
            "serve inside torch.inference_mode(), train with batch_invariant=False"
        )
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    if _onednn_takes(x.device.type, x.dtype):
        if n < 2:  # a lone row would go to another kernel, a product of matrix and vector
            rows = F.pad(rows, (0, 0, 0, 2 - n))
        y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    else:
        rows = F.pad(rows, (0, 0, 0, -n % BLOCK if n else BLOCK))
        y = torch.cat([F.linear(block, weight, bias) for block in rows.split(BLOCK)])
    return y[:n].view(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """nn.Linear; with `batch_invariant` set, `batch_invariant_linear`."""

    batch_invariant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.batch_invariant:
            return batch_invariant_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
