"""Row norms in Triton: a program has one row forward, or several short ones, and a block of rows backward.

A row of up to 65536 elements lies in registers. Squares beyond float32 do not overflow: a row is divided by the power
of two below its largest element first, which is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import check, check_like

MOST = 65536  # elements of a row
TILE = 1024  # elements that a program holds at least: eight for each thread of four warps
ROWS = 64  # of one program backward: the partial sums of weight gradients do not depend on the device


@triton.jit
def power_of_two_below(x):
    """2^floor(log2 x) for x >= 2^-40, and 2^-40 below."""
    bits = tl.maximum(x, 9.094947017729282e-13).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def normalise(v, inside, n, eps, CENTERED: tl.constexpr, FINE: tl.constexpr):
    """(x - mean) / std or x / rms of each row of a tile, and the factor that took x there, [rows, 1]."""
    scale = 1 / power_of_two_below(tl.max(tl.abs(v), 1, keep_dims=True))
    v = v * scale
    if CENTERED:
        if FINE:
            # an element near the mean of its row has as few right digits as the mean has beyond its own
            wide = v.to(tl.float64)
            v = tl.where(inside, wide - tl.sum(wide, 1, keep_dims=True) / n, 0.0).to(tl.float32)
        else:
            v = tl.where(inside, v - tl.sum(v, 1, keep_dims=True) / n, 0.0)
            v = tl.where(inside, v - tl.sum(v, 1, keep_dims=True) / n, 0.0)  # what the rounding of the mean left
    std = tl.sqrt_rn(tl.sum(v * v, 1, keep_dims=True) / n + eps * scale * scale)
    return tl.div_rn(v, std + tl.zeros_like(v)), scale / std


@triton.jit
def add_compensated(total, lost, x):
    """total + x, and what its rounding lost (Kahan): a sum of rows as exact as its result."""
    x = x - lost
    new = total + x
    return new, (new - total) - x


@triton.jit
def norm_fwd_kernel(
    x, residual, weight, bias, y, s, rows, n, eps,
    R: tl.constexpr, BLOCK: tl.constexpr, CENTERED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < n)
    at = row * n + col
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v = v + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(s + at, v.to(s.dtype.element_ty), mask=inside)
    v, _ = normalise(v, inside, n, eps, CENTERED, x.dtype.element_ty == tl.float32)
    if HAS_WEIGHT:
        v = v * tl.load(weight + col, mask=col < n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v = v + tl.load(bias + col, mask=col < n, other=0.0).to(tl.float32)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_bwd_kernel(
    dy, dsum, x, weight, dx, dw, db, rows, n, eps,
    ROWS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, CENTERED: tl.constexpr, HAS_DSUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, WANT_WEIGHT: tl.constexpr, WANT_BIAS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    col = tl.arange(0, BLOCK)[None, :]
    dw_sum, dw_lost = tl.zeros((R, BLOCK), tl.float32), tl.zeros((R, BLOCK), tl.float32)
    db_sum, db_lost = tl.zeros((R, BLOCK), tl.float32), tl.zeros((R, BLOCK), tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + col, mask=col < n, other=0.0).to(tl.float32)
    for begin in range(first, tl.minimum(first + ROWS, rows), R):
        row = begin + tl.arange(0, R)[:, None]
        inside = (row < rows) & (col < n)
        at = row * n + col
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        xhat, factor = normalise(v, inside, n, eps, CENTERED, x.dtype.element_ty == tl.float32)
        if WANT_WEIGHT:
            dw_sum, dw_lost = add_compensated(dw_sum, dw_lost, g * xhat)
        if WANT_BIAS:
            db_sum, db_lost = add_compensated(db_sum, db_lost, g)
        if HAS_WEIGHT:
            g = g * w
        d = g - xhat * (tl.sum(g * xhat, 1, keep_dims=True) / n)
        if CENTERED:
            d = d - tl.sum(g, 1, keep_dims=True) / n
        d = d * factor
        if HAS_DSUM:
            d = d + tl.load(dsum + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * n + tl.arange(0, BLOCK)
    if WANT_WEIGHT:
        tl.store(dw + at, tl.sum(dw_sum.to(tl.float64), 0).to(tl.float32), mask=tl.arange(0, BLOCK) < n)
    if WANT_BIAS:
        tl.store(db + at, tl.sum(db_sum.to(tl.float64), 0).to(tl.float32), mask=tl.arange(0, BLOCK) < n)


def _settings(op, x, parameters):
    check(op, x.dim() >= 1, lambda: "x: expected at least one dimension, got a scalar")
    n = x.shape[-1]
    check(op, n <= MOST, lambda: f"x: expected at most {MOST} elements in a row in Triton, got {n}")
    for name, p in parameters.items():
        if p is not None and p.shape != (n,):
            found = list(p.shape)
            raise ValueError(f"genai_kernels.{op}: {name}: expected shape [{n}], the last dimension of x, got {found}")
    block = triton.next_power_of_2(max(n, 1))
    r = min(max(TILE // block, 1), ROWS)
    return n, {"R": r, "BLOCK": block, "num_warps": min(max(block // 512, 4), 16)}


def norm_forward(op, x, residual, weight, bias, eps, *, centered):
    """y, and the sum of x and the residual, which is x where there is none."""
    n, settings = _settings(op, x, {"weight": weight, "bias": bias})
    check(op, eps >= 0, lambda: f"eps: expected >= 0, got {eps}")
    check_like(op, "residual", residual, "x", x)
    x = x.contiguous()
    y = torch.empty_like(x)
    s = x if residual is None else torch.empty_like(x)
    if x.numel():
        residual, weight, bias = (None if t is None else t.contiguous() for t in (residual, weight, bias))
        rows = x.numel() // n
        norm_fwd_kernel[(triton.cdiv(rows, settings["R"]),)](
            x, residual, weight, bias, y, s, rows, n, eps, CENTERED=centered, HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **settings,
        )  # fmt: skip
    return y, s


def norm_backward(op, dy, dsum, x, weight, bias, eps, weight_grad, bias_grad, *, centered):
    """dx, and the gradients of weight and bias, empty where they are not wanted."""
    n, settings = _settings(op, x, {"weight": weight, "bias": bias})
    check_like(op, "dy", dy, "x", x)
    x, dy, dsum = (None if t is None else t.contiguous() for t in (x, dy, dsum))
    wanted = {"dw": weight if weight_grad else None, "db": bias if bias_grad else None}
    rows = x.numel() // n if n else 0
    programs = triton.cdiv(rows, ROWS)
    dx = torch.empty_like(x)
    partial = {k: None if p is None else x.new_zeros(programs, n, dtype=torch.float32) for k, p in wanted.items()}
    if x.numel():
        norm_bwd_kernel[(programs,)](
            dy, dsum, x, None if weight is None else weight.contiguous(), dx, partial["dw"], partial["db"], rows, n,
            eps,
            ROWS=ROWS, CENTERED=centered, HAS_DSUM=dsum is not None, HAS_WEIGHT=weight is not None,
            WANT_WEIGHT=partial["dw"] is not None, WANT_BIAS=partial["db"] is not None, **settings,
        )  # fmt: skip
    sums = (
        x.new_empty(0) if p is None else partial[k].double().sum(0).to(p.dtype)  # type: ignore[union-attr]
        for k, p in wanted.items()
    )
    return dx, *sums
