"""The launches of linear layers in Triton: tiles and kinds of products. S is x times an adapter's first matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from . import check
from .activations import NONE
from .few_bits import Matrix
from .products import EXACT, PLAIN, SPLIT, WIDE, linear_kernel, rows_product_kernel, shrink_kernel

RANK_STEP = 16  # S has zeros up to a multiple of this
MOST_RANK = 64  # columns of S that a program has at once: as many registers as its tile of the result
# A sum over rows that has fewer tiles than a large card has places is cut into parts of this many rows.
FEW_TILES, PART = 512, 1024


def check_layer(op: str, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> None:
    """The words of csrc/ops/linear/linear.cpp."""
    dense = weight.data if weight.quantized is None else None
    for name, t in (("weight", dense), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"genai_kernels.{op}: {name}: expected the dtype of x, {x.dtype}, got {t.dtype}")
    n, k = weight.shape
    check(
        op, x.dim() == 2 and x.shape[1] == k,
        lambda: f"x: expected a last dimension of {k} as weight has, got shape {list(x.shape)}",
    )  # fmt: skip
    if bias is not None:
        found = list(bias.shape)
        check(op, found == [n], lambda: f"bias: expected [{n}], got shape {found}")


class Dropout(NamedTuple):
    """What drops elements of x on their way to an adapter; `factor` of those that are kept."""

    rng: torch.Tensor | None
    threshold: int
    factor: float


def dropout_of(rng_state: torch.Tensor | None, dropout_p: float, device: torch.device) -> Dropout:
    if not dropout_p > 0 or rng_state is None:
        return NO_DROPOUT
    return Dropout(rng_state.to(device), min(int(dropout_p * 2**32), 2**32 - 1), 1 / (1 - dropout_p))


NO_DROPOUT = Dropout(None, 0, 1.0)


class Gate(NamedTuple):
    """Of a layer whose weight has two halves: an activation of activations.py, and whether its half is the second."""

    activation: Any
    last: bool


NO_GATE = Gate(NONE, False)


class Adapter(NamedTuple):
    """What follows a row's S: the second matrix [columns, rank], or its transpose's strides; with `first`, S is summed
    beside the layer's product from [rank, in] and `scaling`, otherwise it is there.
    """

    s: torch.Tensor
    second: torch.Tensor
    first: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: Dropout = NO_DROPOUT


class Adapters(NamedTuple):
    """Adapters by row: their table, one matrix of them for its dtype, and which rows have which, as add_adapters and
    shrink_kernel read it.
    """

    s: torch.Tensor
    like: torch.Tensor
    most_rank: int
    table: torch.Tensor
    rank_inside: bool  # the rank lies side by side in their matrices
    tiles: torch.Tensor
    entries: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    tokens: torch.Tensor
    dropout: Dropout = NO_DROPOUT


def padded(rank: int) -> int:
    return triton.cdiv(rank, RANK_STEP) * RANK_STEP


def block_of_rank(rank: int) -> int:
    """Columns of S that a program has at once."""
    return min(max(triton.next_power_of_2(rank), RANK_STEP), MOST_RANK)


def _kind(a: torch.Tensor, b: torch.Tensor, out: torch.dtype) -> Any:
    """Of a product that is rounded to `out`."""
    wide = torch.float32
    if a.dtype == b.dtype:
        return WIDE if a.dtype == wide else PLAIN
    return EXACT if out == wide else SPLIT


def _tile(kind: Any, columns: int) -> dict[str, int]:
    """What fits into 160 KiB of shared memory and the registers. 128 rows, of which decoding has few: their products
    cost less than reading W. Narrow tiles for narrow weights, or too few programs would read it.
    """
    if kind in (WIDE, EXACT):
        return {"M": 64, "N": 64, "K": 32, "num_warps": 8, "num_stages": 2}
    if columns >= 8192:
        return {"M": 128, "N": 128, "K": 64, "num_warps": 8, "num_stages": 3}
    return {"M": 128, "N": 64, "K": 64, "num_warps": 8, "num_stages": 4}


def can_shrink_beside(x: torch.Tensor, first: torch.Tensor, dropout: Dropout) -> bool:
    """True if S may be summed beside the layer's product: for one kind of product, a rank whose sums find registers,
    and without dropout, which every tile of columns would draw again.
    """
    return first.dtype == x.dtype != torch.float32 and first.shape[0] <= MOST_RANK and dropout.rng is None


def shrink(x: torch.Tensor, first: torch.Tensor, scaling: float, dropout: Dropout = NO_DROPOUT) -> torch.Tensor:
    """S = scaling drop(x) A' for A [rank, in]: float32 `[rows, rank rounded up to 16]`."""
    rows, (rank, k) = len(x), first.shape
    s = x.new_empty(rows, padded(rank), dtype=torch.float32)
    if not s.numel():
        return s
    kind, block = _kind(x, first, s.dtype), block_of_rank(rank)
    tile = _tile(kind, 1)
    del tile["N"]
    shrink_kernel[(triton.cdiv(rows, tile["M"]), triton.cdiv(padded(rank), block))](
        x, first, s, dropout.rng, None, None, None, rows, rank, k, padded(rank), scaling * dropout.factor,
        dropout.threshold, *x.stride(), *first.stride(), R=block, KIND=kind, RANK_INSIDE=False,
        HAS_DROPOUT=dropout.rng is not None, **tile,
    )  # fmt: skip
    return s


def rows_of_tiles(x: torch.Tensor, like: torch.Tensor) -> tuple[int, int]:
    """Rows of a program that multiplies x by W, and of one that sums S from it, for adapters like `like`."""
    return _tile(_kind(x, x, x.dtype), 1)["M"], _tile(_kind(x, like, torch.float32), 1)["M"]


def shrink_many(x: torch.Tensor, adapters: Adapters) -> None:
    """Into adapters.s: for each adapter scaling drop(x) A' of its rows, with the matrices of its table."""
    if not adapters.s.numel():
        return
    kind, block = _kind(x, adapters.like, adapters.s.dtype), block_of_rank(adapters.most_rank)
    tile, dropout = _tile(kind, 1), adapters.dropout
    del tile["N"]
    shrink_kernel[(len(adapters.blocks), triton.cdiv(padded(adapters.most_rank), block))](
        x, adapters.like, adapters.s, dropout.rng, adapters.table, adapters.blocks, adapters.tokens, 0, 0, 0, 0, 0.0,
        dropout.threshold, *x.stride(), 0, 0, R=block, KIND=kind, RANK_INSIDE=adapters.rank_inside,
        HAS_DROPOUT=dropout.rng is not None, **tile,
    )  # fmt: skip


def rows_times(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    adapter: Adapter | Adapters | None = None,
    column_scale: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    gate: Gate = NO_GATE,
) -> torch.Tensor:
    """column_scale (x W' + S B') + bias for W [out, in], in the dtype of x or into `out`; into `inner` goes what
    column_scale multiplies. With a gate y is gate(half of the columns) * the others; into `inner` go both, the gate's
    first.
    """
    rows, (n, k) = len(x), weight.shape
    y = x.new_empty(rows, n if gate.activation == NONE else n // 2) if out is None else out
    if not y.numel():
        return y
    # float32 beside 16 bits: a gradient, on its way to 16 bits
    kind = _kind(x, x if weight.quantized else weight.data, torch.bfloat16)
    small = SPLIT if kind == PLAIN else WIDE
    # where each of many adapters lies takes the registers of a wide tile's columns; the steps are those of any tile
    tile = _tile(kind, 1 if isinstance(adapter, Adapters) else n)
    if weight.quantized is not None:
        tile |= {"K": 32, "num_stages": 2}  # what is unpacked goes through registers
    many = ("table", "tiles", "entries", "positions")
    options: dict[str, Any] = dict.fromkeys(("lora_a", "lora_b", "s", "rng", *many))
    options |= dict.fromkeys(("rank", "s_row", "threshold", "a_r", "a_k", "b_n", "b_r"), 0)
    options |= {"scaling": 1.0, "kept": 1.0, "R": RANK_STEP}
    has = isinstance(adapter, Adapter) and adapter.second.shape[1] > 0
    if isinstance(adapter, Adapters):
        options |= {name: getattr(adapter, name) for name in many}
        options |= {
            "lora_b": adapter.like, "s": adapter.s, "rng": adapter.dropout.rng, "threshold": adapter.dropout.threshold,
            "kept": adapter.dropout.factor, "R": block_of_rank(adapter.most_rank),
        }  # fmt: skip
    elif isinstance(adapter, Adapter) and has:
        rank, first, dropout = adapter.second.shape[1], adapter.first, adapter.dropout
        options |= {
            "lora_b": adapter.second, "s": adapter.s, "rng": dropout.rng, "rank": rank, "s_row": padded(rank),
            "threshold": dropout.threshold, "kept": dropout.factor, "R": block_of_rank(rank),
            "b_n": adapter.second.stride(0), "b_r": adapter.second.stride(1),
        }  # fmt: skip
        if first is not None:
            options |= {"lora_a": first, "scaling": adapter.scaling, "a_r": first.stride(0), "a_k": first.stride(1)}
    linear_kernel[(triton.cdiv(rows, tile["M"]) * triton.cdiv(n, tile["N"]),)](
        x, bias=bias, column_scale=column_scale, inner=inner, y=y, rows=rows, n=n, k=k, x_m=x.stride(0),
        x_k=x.stride(1), bias_n=0 if bias is None else bias.stride(0), KIND=kind, ADAPTER=small,
        SHRINKS=options["lora_a"] is not None, HAS_ADAPTER=has, HAS_DROPOUT=options["rng"] is not None,
        RANK_INSIDE=isinstance(adapter, Adapters) and adapter.rank_inside, GATE=gate.activation,
        GATE_LAST=int(gate.last), **weight.arguments(), **options, **tile,
    )  # fmt: skip
    return y


def product_over_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    dropout: Dropout = NO_DROPOUT,
    tokens: torch.Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out [m, n] = a' drop(b), or += with `accumulate`, for a [rows, m] and b [rows, n], or those rows of b that
    `tokens` names; summed over rows in parts that the size of out fixes.
    """
    m, n = out.shape
    if not out.numel():
        return
    kind = _kind(a, b, b.dtype if accumulate else out.dtype)
    tile = {"M": 16 if m <= 16 else 64, "N": 64, "K": 16 if kind == EXACT else 32, "num_warps": 8, "num_stages": 2}
    if kind == PLAIN and m > 64:
        tile = {"M": 128, "N": 64, "K": 64, "num_warps": 8, "num_stages": 3}
    tiles = triton.cdiv(m, tile["M"]) * triton.cdiv(n, tile["N"])
    each = PART if tiles < FEW_TILES else max(len(a), 1)
    parts = max(triton.cdiv(len(a), each), 1)
    sums = out if parts == 1 else out.new_empty(parts, m, n, dtype=torch.float32)
    rows_product_kernel[(tiles, parts)](
        a, b, tokens, dropout.rng, sums, len(a), n, m, dropout.threshold, dropout.factor, each, *a.stride(),
        *b.stride(), ACCUMULATE=accumulate and parts == 1, KIND=kind, HAS_DROPOUT=dropout.rng is not None, **tile,
    )  # fmt: skip
    if parts > 1:
        total = sums.double().sum(0)
        out.copy_(total + out if accumulate else total)
