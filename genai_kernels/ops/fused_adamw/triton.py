"""fused_adamw_ and global_norm in Triton: a launch for each tensor, and the norm's number stays on the device.

Each operation is rounded by itself, as on the CPU: the launch forbids fused multiply-add. The sums of the norm are of
other pieces, in float64; of a result that is rounded to float32, hardly ever a last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like

_BLOCK = 1024  # elements of a program: eight for each thread of four warps
_PIECE = 1 << 14  # elements of a partial sum


@triton.jit
def squares_kernel(x, sums, count, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * PIECE
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, PIECE, BLOCK):
        i = first + begin + tl.arange(0, BLOCK)
        wide = tl.load(x + i, mask=i < count, other=0.0).to(tl.float64)
        total += wide * wide
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def step_kernel(
    p, g, m, v, master, ema, clip, count, sign, keep, new_share, keep_sq, new_share_sq, root_scale, eps, rate,
    ema_share, CLIPS: tl.constexpr, HAS_MASTER: tl.constexpr, HAS_EMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    gradient = tl.load(g + i, mask=inside, other=0.0).to(tl.float32) * (tl.load(clip) if CLIPS else sign)
    if HAS_MASTER:
        x = tl.load(master + i, mask=inside, other=0.0)
    else:
        x = tl.load(p + i, mask=inside, other=0.0).to(tl.float32)
    x = x * keep
    new_m = tl.load(m + i, mask=inside, other=0.0)
    new_m = new_m + (gradient - new_m) * new_share
    new_v = tl.load(v + i, mask=inside, other=0.0) * keep_sq + gradient * gradient * new_share_sq
    denominator = tl.sqrt_rn(new_v) * root_scale + eps
    x = x - tl.div_rn(new_m, denominator) * rate
    tl.store(m + i, new_m, mask=inside)
    tl.store(v + i, new_v, mask=inside)
    tl.store(p + i, x.to(p.dtype.element_ty), mask=inside)
    if HAS_MASTER:
        tl.store(master + i, x, mask=inside)
    if HAS_EMA:
        old = tl.load(ema + i, mask=inside, other=0.0)
        tl.store(ema + i, old + (x - old) * ema_share, mask=inside)


def _check_stored(op: str, name: str, t: torch.Tensor) -> None:
    if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"genai_kernels.{op}: {name}: expected float32, bfloat16 or float16, got {t.dtype}")
    order = sorted(range(t.dim()), key=t.stride)
    dense = t.numel() <= 1 or t.permute(order[::-1]).is_contiguous()
    check(
        op, dense,
        lambda: f"{name}: expected a tensor whose elements fill its memory, got shape {list(t.shape)} with others "
        "between them; pass a copy (.clone())",
    )  # fmt: skip


@in_triton("global_norm")
def global_norm(like: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    for i, t in enumerate(tensors):
        _check_stored("global_norm", f"tensors[{i}]", t)
    pieces = [triton.cdiv(t.numel(), _PIECE) for t in tensors]
    sums = torch.empty(sum(pieces), dtype=torch.float64, device=like.device)
    first = 0
    for t, n in zip(tensors, pieces, strict=True):
        if n:
            squares_kernel[(n,)](t, sums[first:], t.numel(), PIECE=_PIECE, BLOCK=_BLOCK)
        first += n
    return sums.sum().sqrt().float()


def _check_list(name: str, tensors: list[torch.Tensor], params: list[torch.Tensor], float32: bool) -> None:
    check(
        "fused_adamw_", len(tensors) == len(params),
        lambda: f"{name}: expected {len(params)} tensors, one for each of params, got {len(tensors)}",
    )  # fmt: skip
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        dtype = torch.float32 if float32 or t.dtype == torch.float32 else p.dtype
        like = torch.empty(p.shape, dtype=dtype, device="meta")
        check_like("fused_adamw_", f"{name}[{i}]", t, f"params[{i}]" if dtype == p.dtype else "a step", like)
        same = all(n <= 1 or a == b for n, a, b in zip(p.shape, t.stride(), p.stride(), strict=True))
        text = f"{name}[{i}]: expected the strides of params[{i}], {list(p.stride())}, got {list(t.stride())}"
        check("fused_adamw_", same, text.format)


@in_triton("fused_adamw_")
def fused_adamw_(
    norm, params, grads, exp_avgs, exp_avg_sqs, masters, emas, max_norm, maximize, keep, beta1, beta2, root_scale, eps,
    rate, ema_decay,
):  # fmt: skip
    _check_list("grads", grads, params, False)
    _check_list("exp_avgs", exp_avgs, params, True)
    _check_list("exp_avg_sqs", exp_avg_sqs, params, True)
    for name, optional in (("masters", masters), ("emas", emas)):
        if optional:
            _check_list(name, optional, params, True)
    for i, p in enumerate(params):
        _check_stored("fused_adamw_", f"params[{i}]", p)
    numbers: dict[str, Any] = {
        "sign": -1.0 if maximize else 1.0, "keep": keep, "new_share": 1 - beta1, "keep_sq": beta2,
        "new_share_sq": 1 - beta2, "root_scale": root_scale, "eps": eps, "rate": rate, "ema_share": 1 - ema_decay,
        "CLIPS": max_norm >= 0, "HAS_MASTER": bool(masters), "HAS_EMA": bool(emas), "BLOCK": _BLOCK,
    }  # fmt: skip
    clip = None
    if max_norm >= 0:
        share = max_norm / (norm.double() + 1e-6)
        clip = torch.where(share > 1, 1.0, share).float() * numbers["sign"]
    none = [None] * len(params)
    for p, g, m, v, master, ema in zip(
        params, grads, exp_avgs, exp_avg_sqs, masters or none, emas or none, strict=True
    ):
        if p.numel():
            step_kernel[(triton.cdiv(p.numel(), _BLOCK),)](
                p, g, m, v, master, ema, clip, p.numel(), **numbers, enable_fp_fusion=False
            )
