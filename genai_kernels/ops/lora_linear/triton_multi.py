"""lora_linear_multi in Triton: who has which adapter, found on the CPU and sent to the card as one tensor of integers.

Nothing is stacked, sorted or gathered: a program takes its rows of x as they stand, and of each adapter that one of
them has adds a product, to those rows alone. So the bits of a row are those of `lora_linear`, and without an adapter
those of `linear`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...torch_ops import in_triton
from ...triton_lib import check
from ...triton_lib.few_bits import matrix_of
from ...triton_lib.linear_layer import (
    NO_DROPOUT,
    Adapters,
    check_layer,
    dropout_of,
    padded,
    product_over_rows,
    rows_of_tiles,
    rows_times,
    shrink_many,
)
from .triton import check_adapter
from .triton_gated import named_gate

_OP = "lora_linear_multi"


class _Shares(NamedTuple):
    """Which rows have which adapter, in order of the adapters, then of the rows."""

    adapter: torch.Tensor
    row: torch.Tensor
    counts: list[int]  # of rows, by adapter
    begin: list[int]  # of an adapter's rows among all
    s_begin: list[int]  # of its part of S
    s_size: int


def _shares(op, ids, ranks):
    count, (rows, slots) = len(ranks), ids.shape
    wrong = (ids < -1) | (ids >= count)
    if wrong.any():
        r, slot = wrong.nonzero()[0].tolist()
        found = int(ids[r, slot])
        raise IndexError(f"genai_kernels.{op}: adapter_ids[{r}, {slot}]: expected -1 <= id < {count}, got {found}")
    row = torch.arange(rows)[:, None].expand(rows, slots)[ids >= 0]
    key = (ids[ids >= 0].long() * rows + row).sort().values
    twice = (key[1:] == key[:-1]).nonzero()
    if len(twice):
        i, r = divmod(int(key[twice[0]]), rows)
        raise ValueError(f"genai_kernels.{op}: adapter_ids[{r}]: expected an adapter once for each row, got {i} again")
    adapter = key // max(rows, 1)
    counts = torch.bincount(adapter, minlength=count)[:count].tolist()
    begin, s_begin, at, size = [], [], 0, 0
    for rank, n in zip(ranks, counts, strict=True):
        begin.append(at)
        s_begin.append(size)
        at, size = at + n, size + n * padded(rank)
    return _Shares(adapter, key - adapter * rows, counts, begin, s_begin, size)


def _sent(shares, tables, tiles_of, rows, device):
    """On the device: the tables, and (tiles, entries, positions, blocks, tokens) of Adapters."""
    m, m_shrink = tiles_of
    count = len(shares.counts)
    position = torch.arange(len(shares.row)) - torch.tensor(shares.begin, dtype=torch.int64)[shares.adapter]
    key, entry = (shares.row // m * max(count, 1) + shares.adapter).unique(return_inverse=True)
    positions = torch.full((len(key), m), -1)
    positions[entry, shares.row % m] = position
    tiles = torch.searchsorted(key // max(count, 1), torch.arange(-(-rows // m) + 1))
    blocks = torch.tensor(
        [(i, first) for i in range(count) for first in range(0, shares.counts[i], m_shrink)], dtype=torch.int64
    )
    parts = [*tables, tiles, key % max(count, 1), positions, blocks.view(-1, 2), shares.row]
    whole = torch.cat([p.flatten() for p in parts]).to(device)
    sent = [p.view(like.shape) for p, like in zip(whole.split([p.numel() for p in parts]), parts, strict=True)]
    return sent[: len(tables)], dict(
        zip(("tiles", "entries", "positions", "blocks", "tokens"), sent[len(tables) :], strict=True)
    )


def _table(matrices, ranks, shares, columns, scalings):
    """What products.py says of FIELDS."""
    fields = [
        [t.data_ptr(), rank, s_begin, *span, begin, n, 0]
        for t, rank, s_begin, span, begin, n in zip(
            matrices, ranks, shares.s_begin, columns, shares.begin, shares.counts, strict=True
        )
    ]
    table = torch.tensor(fields, dtype=torch.int64).view(-1, 8)
    table[:, 7] = scalings.view(torch.int64)
    return table


class _Call(NamedTuple):
    matrix: object
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    ranks: list[int]
    columns: list[list[int]]
    shares: _Shares


def _checked(op, x, weight, lora_a, lora_b, scalings, columns, ids, bias, dropout_p, quantized):
    scale, zero, code_scale, group_size = quantized
    matrix = matrix_of(op, weight, scale, zero, code_scale, x.shape[-1], group_size)
    check_layer(op, x, matrix, bias)
    check(op, 0 <= dropout_p < 1, lambda: f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    spans = columns.tolist()
    for i, (a, b, (begin, end)) in enumerate(zip(lora_a, lora_b, spans, strict=True)):
        if not 0 <= begin <= end <= matrix.shape[0]:
            raise ValueError(
                f"genai_kernels.{op}: adapters[{i}].columns: expected 0 <= begin <= end <= {matrix.shape[0]}, "
                f"got {begin} and {end}"
            )
        check_adapter(op, x, a, b, float(scalings[i]), f"[{i}]", end - begin)
        if a.dtype != lora_a[0].dtype:
            raise TypeError(f"genai_kernels.{op}: lora_a[{i}]: expected the dtype of lora_a[0], got {a.dtype}")
    ranks = [len(a) for a in lora_a]
    return _Call(
        matrix,
        [a.contiguous() for a in lora_a],
        [b.contiguous() for b in lora_b],
        ranks,
        spans,
        _shares(op, ids, ranks),
    )


@in_triton("lora_linear_multi")
def lora_linear_multi(
    x, weight, lora_a, lora_b, scalings, columns, adapter_ids, bias, rng_state, dropout_p, gate, gate_last, keep_inner,
    *quantized,
):  # fmt: skip
    op, gate = named_gate(gate, gate_last, len(weight))
    c = _checked(op, x, weight, lora_a, lora_b, scalings, columns, adapter_ids, bias, dropout_p, quantized)
    s = x.new_empty(c.shares.s_size, dtype=torch.float32)
    inner = x.new_empty(len(x) if keep_inner else 0, c.matrix.shape[0])
    epilogue = {"inner": inner if keep_inner else None, "gate": gate}
    if not c.shares.s_size:
        return rows_times(x, c.matrix, bias, **epilogue), s, inner
    dropout = dropout_of(rng_state, dropout_p, x.device)
    first = _table(c.lora_a, c.ranks, c.shares, [[0, x.shape[1]]] * len(lora_a), scalings * dropout.factor)
    second = _table(c.lora_b, c.ranks, c.shares, c.columns, scalings)
    tiles = rows_of_tiles(x, lora_a[0])
    (first, second), lists = _sent(c.shares, [first, second], tiles, len(x), x.device)
    shrinks = Adapters(s, c.lora_a[0], max(c.ranks), first, False, dropout=dropout, **lists)
    shrink_many(x, shrinks)
    adds = shrinks._replace(table=second, rank_inside=True, dropout=NO_DROPOUT)
    return rows_times(x, c.matrix, bias, adds, **epilogue), s, inner


@in_triton("lora_linear_multi_bwd")
def lora_linear_multi_bwd(
    dy, x, weight, lora_a, lora_b, scalings, columns, adapter_ids, s, rng_state, dropout_p, for_x, for_adapters,
    *quantized,
):  # fmt: skip
    c = _checked(_OP, x, weight, lora_a, lora_b, scalings, columns, adapter_ids, None, dropout_p, quantized)
    n, k = c.matrix.shape
    check(_OP, dy.shape == (len(x), n), lambda: f"dy: expected [{len(x)}, {n}], got shape {list(dy.shape)}")
    check(_OP, s.numel() == c.shares.s_size, lambda: f"s: expected what forward returned, got {list(s.shape)}")
    sizes = [(a.numel(), b.numel()) for a, b in zip(lora_a, lora_b, strict=True)]
    like = lora_a[0] if lora_a else x
    found = like.new_zeros(sum(map(sum, sizes)) if for_adapters else 0)
    if not c.shares.s_size:
        return rows_times(dy, c.matrix.t()) if for_x else x.new_empty(0, k), found
    dropout = dropout_of(rng_state, dropout_p, x.device)
    first = _table(c.lora_b, c.ranks, c.shares, c.columns, scalings)
    second = _table(c.lora_a, c.ranks, c.shares, [[0, k]] * len(lora_a), scalings)
    tiles = rows_of_tiles(x, lora_a[0])
    (first, second), lists = _sent(c.shares, [first, second], tiles, len(x), x.device)
    ds = Adapters(torch.empty_like(s), c.lora_b[0], max(c.ranks), first, True, **lists)
    shrink_many(dy, ds)
    dx = x.new_empty(0, k)
    if for_x:
        dx = rows_times(dy, c.matrix.t(), None, ds._replace(table=second, rank_inside=False, dropout=dropout))
    at = 0
    for i, (size_a, size_b) in enumerate(sizes if for_adapters else []):
        rank, rows, (begin, end) = c.ranks[i], c.shares.counts[i], c.columns[i]
        tokens = ds.tokens[c.shares.begin[i] :][:rows]
        part = slice(c.shares.s_begin[i], c.shares.s_begin[i] + rows * padded(rank))
        of_s, of_ds = (t[part].view(rows, padded(rank))[:, :rank] for t in (s, ds.s))
        product_over_rows(of_ds, x, found[at : at + size_a].view(rank, k), dropout, tokens)
        at += size_a
        product_over_rows(of_s, dy[:, begin:end], found[at : at + size_b].view(rank, end - begin), tokens=tokens)
        at += size_b
    return dx, found
