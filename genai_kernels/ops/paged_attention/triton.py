"""paged_attention in Triton: checks, tiles and launches.

What lengths and tables hold is known to the device alone, and the host never waits for it: grids are what the shapes
allow at most, and a program without work ends at once. So a call can be captured in a CUDA graph, and replayed with
other lengths. Lengths, block tables and cu_seqlens_q are therefore not checked; see the caches' own checks for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ...torch_ops import in_triton
from ...triton_lib import check
from ...triton_lib.pages import check_dtype, checked_caches, page_strides
from .triton_kernels import RANGE, attend_kernel, fold_kernel

_OP = "paged_attention"
_WIDEST = 256  # of head_dim: beyond, tiles of float64 do not fit into shared memory
_FEW = 64  # rows for a key head up to which a sequence's ranges are programs of their own; more fill the card anyway
_FOLDED = 512  # elements that a program of fold_kernel holds: four for each thread


def _tiles(block: int, fine: bool) -> dict[str, int]:
    """Rows and keys of a tile, and how it is run, by head_dim and dtype alone: a row's bits depend on the keys of a
    tile, and on which instruction multiplies it. 64 rows are the least for the warp group's product on sm_90; where
    fewer exist, as in decoding, the product is far below the time of the loads all the same. 32 keys leave registers
    for the sums of two softmaxes, and for three programs side by side where there is one.
    """
    if fine:
        return {"M": 16, "N": 32 if block <= 128 else 16, "num_warps": 4, "num_stages": 1}
    if block > 128:
        return {"M": 16, "N": 32 if block <= 256 else 16, "num_warps": 4, "num_stages": 2}
    return {"M": 64, "N": 32, "num_warps": 4, "num_stages": 4}


class _Call(NamedTuple):
    """A checked call: sizes, and what the kernels take."""

    heads: int
    kv_heads: int
    batch: int
    tokens: int
    longest: int  # new tokens that a sequence can have at most
    ranges: int  # of a sequence; of lists: of all sequences
    common: dict[str, Any]  # of both kernels
    own: dict[str, Any]  # of attend_kernel


def _int32(name: str, t: torch.Tensor, *shape: int) -> torch.Tensor:
    check_dtype(_OP, name, t, torch.int32)
    fits = t.dim() == len(shape) and all(n in (-1, m) for n, m in zip(shape, t.shape, strict=False))
    words = ", ".join("any" if n < 0 else str(n) for n in shape)
    check(
        _OP, fits and t.is_contiguous(),
        lambda: f"{name}: expected a contiguous [{words}], got shape {list(t.shape)}",
    )  # fmt: skip
    return t


def _pages(block_table, seq_lens, indptr, indices, last_page_len):
    """Pages, where they begin or how many keys they hold, the last ones' lengths; the batch and the table's width."""
    given = [t is not None for t in (block_table, seq_lens, indptr, indices, last_page_len)]
    check(
        _OP, given in ([True, True, False, False, False], [False, False, True, True, True]),
        lambda: "block_table: expected block_table and seq_lens, or indptr, indices and last_page_len, and not a part "
        "of each",
    )  # fmt: skip
    if block_table is not None:
        check_dtype(_OP, "block_table", block_table, torch.int32)
        check(
            _OP, block_table.dim() == 2 and (block_table.shape[1] <= 1 or block_table.stride(1) == 1),
            lambda: f"block_table: expected [batch, blocks] with contiguous rows, got shape {list(block_table.shape)}",
        )  # fmt: skip
        batch, width = block_table.shape
        return block_table, _int32("seq_lens", seq_lens, batch), None, batch, width
    check(_OP, indptr.dim() == 1 and len(indptr) > 0, lambda: f"indptr: expected [batch + 1], got {list(indptr.shape)}")
    batch = len(indptr) - 1
    indptr, indices = _int32("indptr", indptr, batch + 1), _int32("indices", indices, -1)
    return indices, indptr, _int32("last_page_len", last_page_len, batch), batch, len(indices)


def _head_vector(name: str, t: torch.Tensor | None, heads: int, batch: int = -1) -> torch.Tensor | None:
    if t is None:
        return None
    check_dtype(_OP, name, t, torch.float32)
    fits = t.shape == (heads,) or (batch >= 0 and t.shape == (batch, heads))
    words = f"[{heads}]{' or [batch, heads]' if batch >= 0 else ''}"
    check(_OP, fits and t.is_contiguous(), lambda: f"{name}: expected a contiguous {words}, got shape {list(t.shape)}")
    return t


def _checked(
    q, k_cache, v_cache, block_table, seq_lens, indptr, indices, last_page_len, cu_q, slopes, sink, tree, k_scale,
    v_scale, left, right, scale, softcap, heads_first,
):  # fmt: skip
    check(
        _OP, q.dim() == 3 or (q.dim() == 4 and cu_q is None),
        lambda: "q: expected [tokens, heads, head_dim], or [batch, tokens, heads, head_dim] without cu_seqlens_q, "
        f"got shape {list(q.shape)}",
    )  # fmt: skip
    (k, v), (k_scale, v_scale) = checked_caches(_OP, "q", q, (k_cache, v_cache), (k_scale, v_scale), heads_first)
    heads, dim = q.shape[-2:]
    kv_heads, value_dim, block = k.shape[2], v.shape[3], k.shape[1]
    check(_OP, k.shape[3] == dim, lambda: f"k_cache: expected head_dim {dim} as q, got shape {list(k_cache.shape)}")
    check(
        _OP, heads > 0 and dim > 0 and value_dim > 0,
        lambda: f"q: expected heads and a head_dim, got shape {list(q.shape)}",
    )  # fmt: skip
    check(
        _OP, kv_heads > 0 and heads % kv_heads == 0,
        lambda: f"q: expected a multiple of the {kv_heads} heads of k_cache, got {heads}",
    )  # fmt: skip
    check(_OP, softcap >= 0, lambda: f"softcap: expected 0 (none) or more, got {softcap}")
    check(_OP, min(left, right) >= -1, lambda: f"window_size: expected -1 (no limit) or more, got {min(left, right)}")
    table, lengths, last, batch, width = _pages(block_table, seq_lens, indptr, indices, last_page_len)
    check(
        _OP, cu_q is not None or q.shape[0] == batch,
        lambda: f"q: expected {batch} in dimension 0, one for each sequence, got shape {list(q.shape)}; for other "
        "lengths pass cu_seqlens_q",
    )  # fmt: skip
    cu_q = None if cu_q is None else _int32("cu_seqlens_q", cu_q, batch + 1)
    rows = q.reshape(-1, heads, dim)
    rows = rows if dim == 1 or rows.stride(-1) == 1 else rows.contiguous()
    tokens, queries = len(rows), q.shape[1] if q.dim() == 4 else 1
    slopes = _head_vector("alibi_slopes", slopes, heads, batch)
    sink = _head_vector("sink", sink, heads)
    fine = q.dtype == torch.float32
    if tree is not None:
        check_dtype(_OP, "tree_mask", tree, torch.bool)
        least = 0 if cu_q is not None else queries
        check(
            _OP, tree.dim() == 2 and tree.shape[0] == tokens and tree.shape[1] >= least,
            lambda: f"tree_mask: expected [{tokens}, at least {least}]: a row for each query, a column for each new "
            f"token, got shape {list(tree.shape)}",
        )  # fmt: skip
        # Triton 3.7 takes the narrowest load that a factor depends on for the factor's own type, and cannot multiply
        # float64 as if it were 8 bits
        tree = tree.to(torch.int32) if fine else tree.view(torch.uint8)
    int8, widest = k.dtype == torch.int8, max(dim, value_dim)
    common = {
        "lengths": lengths, "last": last, "cu_q": cu_q, "sink": sink, "queries": queries, "tokens": tokens,
        "width": width, "left": left, "right": right, "heads": heads, "value_dim": value_dim,
        "V": triton.next_power_of_2(max(value_dim, 16)), "BLOCK": block, "LISTS": last is not None,
        "VARLEN": cu_q is not None, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, "HAS_SINK": sink is not None,
        "FINE": fine, "WIDE": fine and widest <= _WIDEST and not int8,
    }  # fmt: skip
    own = {
        "q": rows, "k": k, "v": v, "table": table, "k_scale": k_scale, "v_scale": v_scale, "slopes": slopes,
        "tree": tree, "batch": batch, "table_b": 0 if last is not None else table.stride(0),
        "slopes_b": heads if slopes is not None and slopes.dim() == 2 else 0, "group": heads // kv_heads, "dim": dim,
        "scale": dim**-0.5 if scale is None else scale, "softcap": softcap, "q_t": rows.stride(0),
        "q_h": rows.stride(1), "D": triton.next_power_of_2(max(dim, 16)), "INT8": int8,
        "tree_q": 0 if tree is None else tree.stride(0), "tree_k": 0 if tree is None else tree.stride(1),
        "HAS_ALIBI": slopes is not None, "HAS_CAP": softcap > 0, "HAS_TREE": tree is not None,
    }  # fmt: skip
    for name, t in (("k", k), ("v", v), ("ks", k_scale), ("vs", v_scale)):
        own |= page_strides(name, t)
    longest = queries if cu_q is None else tokens
    return _Call(heads, kv_heads, batch, tokens, longest, triton.cdiv(width * block, RANGE.value), common, own)


def _launch(grid: int, call: _Call, hides: bool, **arguments: Any) -> None:
    """attend_kernel, and then its careful variant, where anything can be hidden from a row and not from its tile."""
    strange = call.own["q"].new_empty(grid, dtype=torch.int32) if hides else None
    for careful in (False, True) if hides else (False,):
        attend_kernel[(grid,)](
            strange=strange, ranges=call.ranges, HIDES=hides, CAREFUL=careful, **call.common, **call.own, **arguments
        )


@in_triton("paged_attention_lse")
def paged_attention_lse(*args):
    call = _checked(*args)
    q, value_dim = args[0], call.common["value_dim"]
    owned = call.common["cu_q"] is None  # otherwise there may be tokens that no sequence owns
    out = (torch.empty if owned else torch.zeros)(*q.shape[:-1], value_dim, dtype=q.dtype, device=q.device)
    lse = q.new_empty(call.heads, call.tokens, dtype=torch.float32)
    if not owned:
        lse.fill_(float("-inf"))
    if not (call.tokens and call.batch):
        return out, lse
    lists, group = call.common["LISTS"], call.own["group"]
    tiles = _tiles(max(call.own["D"], call.common["V"]), call.common["FINE"])
    hides = (call.longest > 1 or call.own["HAS_TREE"]) and not call.own["INT8"]
    # Splitting is a matter of time alone. What is not split: sequences of one range, and of too many new tokens: the
    # results of the ranges take `few` rows for each range that the tables have room for.
    few = min(max(1, _FEW // group), triton.cdiv(call.tokens, call.batch)) if call.ranges > 1 else 0
    if not call.common["VARLEN"] and call.longest > few:
        few = 0
    given = {"out": out, "lse": lse, "few": few}
    part_o = part_s = None
    if few:
        slots = call.ranges + call.batch if lists else call.ranges * call.batch
        dtype = torch.float64 if call.common["WIDE"] else torch.float32
        part_o = q.new_empty(slots * few * call.heads, value_dim, dtype=dtype)
        part_s = q.new_empty(slots * few * call.heads, 2, dtype=dtype)
    if call.longest > few:
        count = triton.cdiv(call.longest * group, tiles["M"])
        pieces = call.tokens * group // tiles["M"] + call.batch if call.common["VARLEN"] else count * call.batch
        grid = pieces * call.kv_heads
        _launch(grid, call, hides, part_o=None, part_s=None, SPLIT=False, tiles=count, **given, **tiles)
    if few:
        count = triton.cdiv(few * group, tiles["M"])
        grid = count * slots * call.kv_heads
        parts = {"part_o": part_o, "part_s": part_s}
        hides = hides and (few > 1 or call.own["HAS_TREE"])
        _launch(grid, call, hides, SPLIT=True, tiles=count, **parts, **given, **tiles)
        r = max(1, min(triton.next_power_of_2(call.heads), _FOLDED // call.common["V"]))
        fold_kernel[(call.batch * few, triton.cdiv(call.heads, r))](
            ranges=call.ranges, R=r, **parts, **given, **call.common
        )
    return out, lse


@in_triton("paged_attention")
def paged_attention(*args):
    return paged_attention_lse(*args)[0]
