"""flash_attention in Triton: checks, tiles and launches.

Sums are in an order that the shapes of one sequence fix; nothing is added by two programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from .triton_backward import dbias_kernel, delta_kernel, dkdv_kernel, dq_kernel
from .triton_forward import fwd_kernel

_OP = "flash_attention"
_WIDEST = 256  # of head_dim: beyond, tiles of float64 do not fit into shared memory


def _tiles(call, *, backward):
    """Queries and keys of a tile, and how it is run: what fits into 160 KiB of shared memory and the registers. A row's
    bits depend on the number of keys alone.
    """
    block = max(call.kwargs["D"], call.kwargs["V"])
    if call.kwargs["FINE"]:
        tile = 64 if block <= 32 else 32 if block <= 128 else 16
        return {"M": tile, "N": tile, "num_warps": 4 if block == 64 or tile == 16 else 8, "num_stages": 1}
    if block > 128:
        tile = 32 if block <= 256 else 16
        return {"M": tile, "N": tile, "num_warps": 4, "num_stages": 1}
    warps = 4 if block <= 64 else 8
    if backward:
        return {"M": 64, "N": 64, "num_warps": warps, "num_stages": 2}
    return {"M": 128 if call.queries > 64 else 64, "N": 64, "num_warps": warps, "num_stages": 3 if block <= 64 else 2}


class _Call(NamedTuple):
    """A checked call: tensors with a contiguous last dimension, sizes, and what all kernels take."""

    tensors: list[torch.Tensor]  # q, k, v
    batch: int
    queries: int
    keys: int
    kwargs: dict[str, object]


def _strides(t, packed):
    b, *rest = (0, *t.stride()) if packed else t.stride()
    return b, rest[0], rest[1]


def _named(name, t, packed):
    return dict(zip((f"{name}_b", f"{name}_t", f"{name}_h"), _strides(t, packed), strict=True))


def _scores_strides(name, t, sizes):
    if t is None:
        return (0, 0, 0, 0)
    shape = (1,) * (4 - t.dim()) + tuple(t.shape)
    check(
        _OP, t.dim() <= 4 and all(a in (1, b) for a, b in zip(shape, sizes, strict=True)),
        lambda: f"{name}: expected a shape that broadcasts to {list(sizes)}, got {list(t.shape)}",
    )  # fmt: skip
    strides = (0,) * (4 - t.dim()) + t.stride()
    return tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))


def _call(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap, dropout_p):
    packed = cu_q is not None
    dims = 3 if packed else 4
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims:
            raise ValueError(f"genai_kernels.{_OP}: {name}: expected {dims} dimensions, got shape {list(t.shape)}")
        if t.dtype != q.dtype:
            raise TypeError(f"genai_kernels.{_OP}: {name}: expected the dtype of q, {q.dtype}, got {t.dtype}")
    heads, kv_heads, dim = q.shape[-2], k.shape[-2], q.shape[-1]
    check(_OP, k.shape[-1] == dim, lambda: f"k: expected head_dim {dim} as q, got {k.shape[-1]}")
    check(_OP, v.shape[:-1] == k.shape[:-1], lambda: f"v: expected the tokens and heads of k, got {list(v.shape)}")
    check(_OP, packed or k.shape[0] == q.shape[0], lambda: f"k: expected batch {q.shape[0]} as q, got {k.shape[0]}")
    check(
        _OP, heads % kv_heads == 0 if kv_heads else heads == 0,
        lambda: f"k: expected a number of heads that divides {heads}, the heads of q, got {kv_heads}",
    )  # fmt: skip
    if packed:
        batch = len(cu_q) - 1
        queries, keys = (int(c.diff().amax()) if batch else 0 for c in (cu_q, cu_k))
    else:
        batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    tensors = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (q, k, v)]
    sizes = (batch, heads, queries, keys)
    # Triton 3.7 takes the narrowest load that a factor depends on for the factor's own type, and cannot multiply
    # float64 as if it were 8 bits
    fine = q.dtype == torch.float32
    mask = None if mask is None else mask.to(torch.int32) if fine else mask.view(torch.uint8)
    kwargs: dict[str, object] = {}
    for name, t in zip(("q", "k", "v"), tensors, strict=True):
        kwargs |= _named(name, t, packed)
    for name, t in (("bias", bias), ("mask", mask)):
        found = _scores_strides(f"attn_{name}", t, sizes)
        kwargs |= {f"{name}_{n}": s for n, s in zip("bhqk", found, strict=True)}
    kwargs |= {
        "cu_q": cu_q, "cu_k": cu_k, "slopes": slopes, "bias": bias,
        "mask": mask, "rng": None if rng is None else rng.to(q.device),
        "heads": heads, "group": heads // max(kv_heads, 1), "queries": queries, "keys": keys,
        "tokens": q.shape[0], "dim": dim, "value_dim": v.shape[-1],
        "slopes_b": 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0), "left": left, "right": right,
        "scale": dim**-0.5 if scale is None else scale, "softcap": softcap,
        "threshold": min(int(dropout_p * 2**32), 2**32 - 1), "kept": 1 / (1 - dropout_p),
        "D": triton.next_power_of_2(max(dim, 16)), "V": triton.next_power_of_2(max(v.shape[-1], 16)), "VARLEN": packed,
        "HAS_MASK": mask is not None, "HAS_ALIBI": slopes is not None, "HAS_CAP": softcap > 0,
        "HAS_DROPOUT": dropout_p > 0, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
        "FINE": fine, "WIDE": fine and max(dim, v.shape[-1]) <= _WIDEST,
    }  # fmt: skip
    return _Call(tensors, batch, queries, keys, kwargs)


def _owned(t, cu):
    """Zeros for the tokens that no sequence owns."""
    if cu is not None:
        t[int(cu[-1]) :] = 0
    return t


def _launch(kernel, grid, call, *args, **kwargs):
    """The kernel, and then its careful variant, where anything can be hidden."""
    hides = any(call.kwargs[f"HAS_{what}"] for what in ("LEFT", "RIGHT", "MASK")) or kwargs["HAS_BIAS"]
    strange = args[0].new_empty(grid, dtype=torch.int32) if hides else None
    for careful in (False, True) if hides else (False,):
        kernel[grid](*args, strange=strange, HIDES=hides, CAREFUL=careful, **kwargs)


@in_triton("flash_attention")
def flash_attention(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap, dropout_p):
    call = _call(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap, dropout_p)
    packed, heads = cu_q is not None, q.shape[-2]
    out = _owned(q.new_empty(*q.shape[:-1], v.shape[-1]), cu_q)
    shape = (heads, q.shape[0]) if packed else (call.batch, heads, call.queries)
    lse = q.new_full(shape, float("-inf"), dtype=torch.float32)
    state = q.new_empty(*shape, 2, dtype=torch.float32)
    tiles = _tiles(call, backward=False)
    if call.batch * heads * call.queries:
        grid = (triton.cdiv(call.queries, tiles["M"]), call.batch * heads)
        _launch(
            fwd_kernel, grid, call, *call.tensors, sink=sink, out=out, lse=lse, state=state, HAS_BIAS=bias is not None,
            HAS_SINK=sink is not None, **_named("o", out, packed), **call.kwargs, **tiles,
        )  # fmt: skip
    return out, lse, state


def _bias_gradient(call, bias, given):
    """In a pass of its own; partial sums over the tiles of a broadcast dimension are added in order, in float64."""
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    tiles = _tiles(call, backward=True)
    full = (call.batch, call.kwargs["heads"], call.queries, call.keys)
    over = [n == 1 and size > 1 for n, size in zip(shape, full, strict=True)]
    blocks = [triton.cdiv(call.queries, tiles["M"]), triton.cdiv(call.keys, tiles["N"])]
    sums_q, sums_k = (blocks[0] if over[2] else full[2]), (blocks[1] if over[3] else full[3])
    bias_batch, bias_heads = (1 if over[0] else full[0]), (1 if over[1] else full[1])
    sums = bias.new_zeros(bias_batch, bias_heads, sums_q, sums_k, dtype=torch.float32)
    kwargs = {name: value for name, value in call.kwargs.items() if name != "HAS_BIAS"}
    if sums.numel():
        dbias_kernel[(blocks[0] * blocks[1], bias_batch * bias_heads)](
            *call.tensors, sums=sums, batch=call.batch, bias_batch=bias_batch, bias_heads=bias_heads, sums_q=sums_q,
            sums_k=sums_k, OVER_QUERIES=over[2], OVER_KEYS=over[3], **given, **kwargs, **tiles,
        )  # fmt: skip
    total = sums.double()
    for dim in (2, 3):
        total = total.sum(dim, keepdim=True) if over[dim] else total
    return total.to(bias.dtype).reshape(bias.shape)


@in_triton("flash_attention_bwd")
def flash_attention_bwd(
    dout, dlse, q, k, v, out, lse, state, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap,
    dropout_p, bias_grad,
):  # fmt: skip
    call = _call(q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng, left, right, scale, softcap, dropout_p)
    check_like(_OP, "dout", dout, "out", out)
    packed, heads = cu_q is not None, q.shape[-2]
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    tiles, wide = _tiles(call, backward=True), call.kwargs["WIDE"]
    delta = lse.new_zeros(lse.shape, dtype=torch.float64 if wide else torch.float32)
    rows = (triton.cdiv(call.queries, tiles["M"]), call.batch * heads)
    own = ("cu_q", "heads", "queries", "tokens", "value_dim", "V", "VARLEN", "WIDE")
    if call.batch * heads * call.queries:
        delta_kernel[rows](
            dout, out, None if dlse is None else dlse.contiguous(), lse, state, delta=delta,
            HAS_DLSE=dlse is not None, M=tiles["M"], **_named("o", dout, packed), **_named("out", out, packed),
            **{name: call.kwargs[name] for name in own},
        )  # fmt: skip
    given = {"dout": dout, "state": state, "delta": delta, **_named("o", dout, packed)}
    kwargs = {**call.kwargs, **given, "HAS_BIAS": bias is not None, **tiles}
    dq, dk, dv = _owned(torch.empty_like(q.contiguous()), cu_q), *(torch.empty_like(t.contiguous()) for t in (k, v))
    dk, dv = _owned(dk, cu_k), _owned(dv, cu_k)
    if call.batch * k.shape[-2] * call.keys:
        grid = (triton.cdiv(call.keys, kwargs["N"]), call.batch * k.shape[-2])
        _launch(
            dkdv_kernel, grid, call, *call.tensors, dk=dk, dv=dv, **_named("dk", dk, packed),
            **_named("dv", dv, packed), **kwargs,
        )  # fmt: skip
    if call.batch * heads * call.queries:
        _launch(dq_kernel, rows, call, *call.tensors, dq=dq, **_named("dq", dq, packed), **kwargs)
    dbias = _bias_gradient(call, bias, given) if bias_grad else q.new_empty(0)
    dsink = q.new_empty(0)
    if sink is not None:
        share = torch.exp(sink.double()[:, None] - lse.double()).masked_fill(lse == float("-inf"), 0)
        per_head = -(share * delta.double()).sum(-1)
        dsink = (per_head if packed else per_head.sum(0)).to(sink.dtype)
    return dq, dk, dv, dbias, dsink
