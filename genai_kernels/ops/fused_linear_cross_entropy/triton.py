"""fused_linear_cross_entropy in Triton: chunks of rows, and of each the products of `linear` around a kernel of rows.

A call waits for the device once, to learn which rows are ignored and whether every target is a class: the rows that are
ignored are left out, as on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check
from ...triton_lib.exp import exp_nonpositive
from ...triton_lib.few_bits import Matrix, matrix_of
from ...triton_lib.linear_layer import check_layer, product_over_rows, rows_times

_OP = "fused_linear_cross_entropy"
_NONE, _MEAN = 0, 2  # of the reductions none, sum and mean
# Each chunk reads and writes the sums for W's gradient: as many rows as memory allows. 512 MiB are 1024 rows of a
# vocabulary of 128000.
_CHUNK_BYTES, _FEWEST_ROWS, _MOST_ROWS = 512 << 20, 128, 1024
_TILE, _WIDEST, _ROWS = 4096, 2048, 64  # elements of a tile, columns and rows of one at most: eight warps


@triton.jit
def capped(l, softcap, HAS_CAP: tl.constexpr):
    """softcap tanh(l / softcap); the argument's sign apart, so that nothing overflows."""
    if HAS_CAP:
        e = tl.exp(-2 * tl.abs(l.to(tl.float64)) / softcap)
        t = softcap * ((1 - e) / (1 + e))
        l = tl.where(l < 0, -t, t).to(tl.float32)
    return l


@triton.jit
def cross_entropy_kernel(
    logits, targets, weights, losses, z_losses, gradients, rows, vocabulary, smoothing, softcap, z_loss,
    R: tl.constexpr, BLOCK: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_CAP: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """Losses of R rows and, where `gradients` are wanted, d loss / d logit; they may take the logits' place."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    at = row[:, None] * vocabulary
    target = tl.load(targets + row, mask=there, other=0)
    most_of = tl.full((R, BLOCK), float("-inf"), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        l = tl.load(logits + at + j[None, :], mask=there[:, None] & (j < vocabulary)[None, :], other=float("-inf"))
        most_of = tl.maximum(most_of, capped(l, softcap, HAS_CAP))
    most = tl.max(most_of, 1)
    # in float64, or the other classes would vanish beside one that is nearly sure
    totals, sums = tl.zeros((R, BLOCK), tl.float64), tl.zeros((R, BLOCK), tl.float64)
    for begin in range(0, vocabulary, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        inside = there[:, None] & (j < vocabulary)[None, :]
        l = capped(tl.load(logits + at + j[None, :], mask=inside, other=0.0), softcap, HAS_CAP)
        totals += tl.where(inside, exp_nonpositive(l - most[:, None]), 0.0).to(tl.float64)
        if HAS_SMOOTHING:
            sums += tl.where(inside, l, 0.0).to(tl.float64)
    total = tl.sum(totals, 1)
    wanted = capped(tl.load(logits + row * vocabulary + target, mask=there, other=0.0), softcap, HAS_CAP)
    lse = most.to(tl.float64) + tl.log(total)
    loss = (most.to(tl.float64) - wanted.to(tl.float64)) + tl.log(total)
    if HAS_SMOOTHING:
        loss = (1 - smoothing) * loss + smoothing * (lse - tl.sum(sums, 1) / vocabulary)
    if HAS_Z:
        z = z_loss * lse * lse
        loss += z
        tl.store(z_losses + row, z, mask=there)
    tl.store(losses + row, loss, mask=there)
    if gradients is not None:
        # p - 1 of the wanted class is what the other classes have
        others = ((exp_nonpositive(wanted - most).to(tl.float64) - total) / total).to(tl.float32)
        inverse = (1 / total).to(tl.float32)
        factor = tl.full((R,), 1.0, tl.float32)
        if weights is not None:
            factor = tl.load(weights + row, mask=there, other=0.0).to(tl.float32)
        for begin in range(0, vocabulary, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            inside = there[:, None] & (j < vocabulary)[None, :]
            l = capped(tl.load(logits + at + j[None, :], mask=inside, other=0.0), softcap, HAS_CAP)
            p = exp_nonpositive(l - most[:, None]) * inverse[:, None]
            is_wanted = j[None, :] == target[:, None]
            d = tl.where(is_wanted, others[:, None], p)
            if HAS_SMOOTHING:
                d += smoothing * (tl.where(is_wanted, 1.0, 0.0) - 1.0 / vocabulary)
            if HAS_Z:
                d += p * (2 * z_loss * lse).to(tl.float32)[:, None]
            if HAS_CAP:
                d *= 1 - (l / softcap) * (l / softcap)
            d = (d * factor[:, None]).to(gradients.dtype.element_ty)
            tl.store(gradients + at + j[None, :], d, mask=inside)


def _kept(x, target, ignore_index, vocabulary):
    """The rows that are not ignored, or None for all of them; and their targets."""
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"genai_kernels.{_OP}: target: expected int32 or int64, got {target.dtype}")
    check(
        _OP, target.shape == (len(x),),
        lambda: f"target: expected {len(x)} classes, one for each row of x, got shape {list(target.shape)}",
    )  # fmt: skip
    keep = target != ignore_index
    wrong = keep & ((target < 0) | (target >= vocabulary))
    kept, is_wrong = torch.stack([keep.sum(), wrong.sum()]).tolist()
    if is_wrong:
        r = int(wrong.nonzero()[0])
        raise IndexError(
            f"genai_kernels.{_OP}: target: row {r}: expected 0 <= class < {vocabulary} or ignore_index {ignore_index}, "
            f"got {int(target[r])}"
        )
    if kept == len(x):
        return None, target.long().contiguous()
    rows = keep.nonzero().flatten()
    return rows, target[rows].long()


def _run(x, weight, bias, kept, numbers, row_weights, wanted):
    """Losses and z-losses of the rows that are kept, float64; and the sums of the gradients that are wanted."""
    rows, targets = kept
    smoothing, softcap, z_loss = numbers
    count, vocabulary = len(targets), len(weight)
    matrix = Matrix(weight)
    losses, z_losses = x.new_zeros(2, count, dtype=torch.float64).unbind(0)
    shapes = [s if w else (0,) for s, w in zip((x.shape, weight.shape, (vocabulary,)), wanted, strict=True)]
    dx, dw, db = (x.new_zeros(s, dtype=torch.float32) for s in shapes)
    chunk = max(_FEWEST_ROWS, min(_CHUNK_BYTES // (4 * vocabulary) // 128 * 128, _MOST_ROWS)) if vocabulary else 1
    block = min(triton.next_power_of_2(max(vocabulary, 1)), _WIDEST)
    r = min(_TILE // block, _ROWS)
    for begin in range(0, count, chunk):
        part = slice(begin, min(begin + chunk, count))
        own = x[part] if rows is None else x[rows[part]]
        logits = rows_times(own, matrix, bias, out=x.new_empty(len(own), vocabulary, dtype=torch.float32))
        dl = None
        if any(wanted):  # float16 could not hold small probabilities
            dl = torch.empty_like(logits, dtype=torch.bfloat16) if x.dtype == torch.bfloat16 else logits
        cross_entropy_kernel[(triton.cdiv(len(own), r),)](
            logits, targets[part], None if row_weights is None else row_weights[part], losses[part], z_losses[part],
            dl, len(own), vocabulary, smoothing, softcap, z_loss, R=r, BLOCK=block, HAS_SMOOTHING=smoothing > 0,
            HAS_CAP=softcap > 0, HAS_Z=z_loss > 0, num_warps=8,
        )  # fmt: skip
        if dl is None:
            continue
        if wanted[0]:
            of_rows = rows_times(
                dl, matrix.t(), out=dx[part] if rows is None else torch.empty_like(own, dtype=dx.dtype)
            )
            if rows is not None:
                dx[rows[part]] = of_rows
        if wanted[1]:
            product_over_rows(dl, own, dw, accumulate=True)
        if wanted[2]:
            product_over_rows(dl, dl.new_ones(1, 1).expand(len(own), 1), db.view(-1, 1), accumulate=True)
    return losses, z_losses, (dx, dw, db)


def _checked(x, weight, target, bias, ignore_index, smoothing, softcap, z_loss):
    check_layer(_OP, x, matrix_of(_OP, weight, None, None, None, x.shape[-1], 0), bias)
    check(_OP, 0 <= smoothing <= 1, lambda: f"label_smoothing: expected 0 <= label_smoothing <= 1, got {smoothing}")
    for name, value in (("softcap", softcap), ("z_loss", z_loss)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"genai_kernels.{_OP}: {name}: expected a finite number >= 0 (0: none), got {value}")
    return _kept(x, target, ignore_index, len(weight))


@in_triton("fused_linear_cross_entropy")
def fused_linear_cross_entropy(
    x, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss, reduction, for_x, for_weight, for_bias
):  # fmt: skip
    kept = _checked(x, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss)
    numbers, wanted = (label_smoothing, softcap, z_loss), (for_x, for_weight, for_bias)
    losses, z_losses, sums = _run(x, weight, bias, kept, numbers, None, wanted)
    results = []
    for t in (losses, z_losses):
        if reduction == _NONE:
            whole = t.new_zeros(len(x))
            whole[slice(None) if kept[0] is None else kept[0]] = t
            results.append(whole.float())
        else:
            divisor = torch.tensor(len(t) if reduction == _MEAN else 1, dtype=t.dtype)  # the mean of none is NaN
            results.append((t.sum() / divisor).float())
    return *results, *sums


@in_triton("fused_linear_cross_entropy_bwd")
def fused_linear_cross_entropy_bwd(
    dloss, x, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss, for_x, for_weight, for_bias
):  # fmt: skip
    kept = _checked(x, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss)
    check(_OP, dloss.shape == (len(x),), lambda: f"dloss: expected [{len(x)}], got shape {list(dloss.shape)}")
    factors = dloss.contiguous() if kept[0] is None else dloss[kept[0]]
    numbers, wanted = (label_smoothing, softcap, z_loss), (for_x, for_weight, for_bias)
    return _run(x, weight, bias, kept, numbers, factors, wanted)[2]
