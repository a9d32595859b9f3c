"""The matrix product of a Llama: nn.Linear, and one whose rows do not know of each other.

A served request's tokens lie in one matrix with those of its neighbours, and F.linear rounds a row in another way when
other rows stand beside it. Whether a row has the bits that it has among 512 rows on one thread, measured with torch
2.13 on a CPU with AVX-512 and its bf16 instructions, 1 to 512 rows, widths 33 to 4864, 1 to 4 threads (float16: 1 to
256 rows, widths to 2048, 1 to 3 threads; "-": not measured):

| | float32 | bfloat16 | float16 |
|---|---|---|---|
| F.linear (MKL; oneDNN for 16 bits) | not below 16 rows, nor with other threads | yes (*) | not a lone row |
| F.linear in blocks of 16, 32 or 64 rows | not with other threads | yes | - |
| oneDNN's inner product | not a lone row | yes | yes |
| oneDNN's inner product, a lone row in two | yes | yes | yes |

(*) not on a CPU with AVX-512 without its bf16 instructions, where threads change the bits.

So the remedy is oneDNN's inner product, for every dtype that it has on this CPU, at least two rows at a time. Its time
beside F.linear's on one thread:

| rows | float32, 192 x 1024 | float32, 2048 x 2048 | bfloat16, 192 x 1024 | bfloat16, 2048 x 2048 |
|---|---|---|---|---|
| 1 | 4.0x (of 19 us) | 2.1x | 1.0x | 1.2x |
| 2 | 4.9x | 2.0x | 1.0x | 1.0x |
| 4 to 16 | 2.7x to 1.5x | 1.0x to 0.8x | 1.0x | 1.0x to 1.1x |
| 32, 64 | 1.5x, 1.2x | 0.9x | 1.0x | 1.0x |
| 512 | 1.2x | 1.1x | 1.0x | 1.0x |

The price of a call is 30 us, beside 5 of MKL: a decode step of the small model of checkpoints/llama_stdlib takes 2.0x
for one request in float32 and 1.4x in bfloat16, 1.3x and 1.2x for 16, 1.0x for 64 and for 512 tokens at once. oneDNN
makes a kernel for each number of rows when it first comes, in half a millisecond. Blocks of 16 rows through F.linear
would take 1.0x to 4.2x at 2048 x 2048 in float32, 2.6x for 512 rows. In float32 the largest error at width 2048 is
twice MKL's, at 192 the same.

Where oneDNN has no such product (float64, another device) rows go in blocks of 16 through F.linear, padded with zeros:
one shape for every product, and so the same bits in any batch, at one number of threads.
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
            rows = torch.cat([rows, rows]) if n else F.pad(rows, (0, 0, 0, 2))
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
