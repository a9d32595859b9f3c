"""sample in Triton: the same integers as on the CPU (README.md), searched in another way.

A program has one row. The boundary of top-k, and of top-p, is the rank of a logit: a number of 32 bits that is larger
the larger the logit is, found two bits at a time, from the counts or the sums of weights of what lies above three
candidates. Integers have no order, so no tile and no card changes a sum. Weights are float64 without fused
multiply-add, which the launch forbids. Beside the logits a call holds a weight of 64 bits for each.

What parameters and previous tokens hold is known to the device alone, and nothing waits for it: see the docstring.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check

_OP = "sample"
_MOST = 1 << 22  # tokens: as many weights of 2^40 stay below 2^63
_BITS = tl.constexpr(40)
_PURPOSE = tl.constexpr(0x73616D70)
_SHIFTER = tl.constexpr(1.5 * 2.0**52)
_NO_RANK = tl.constexpr(-(2**40))
_LOG2E = float.fromhex("0x1.71547652b82fep0")
_TILE = 4096  # elements: sixteen for each thread of eight warps
_WARPS = 8
# Bits of a rank that a logit of a narrower dtype does not have; two at a time are searched.
_LOW_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 12}


@triton.jit
def weight_of(t):
    """2^(t + 40), rounded, as a float64; -64 <= t <= 0. The polynomial of csrc/ops/sample/sample_cpu.cpp."""
    shifted = t + _SHIFTER
    r = t - (shifted - _SHIFTER)
    p = r * 7.070977866508138e-09 + 1.0205905413765595e-07
    p = p * r + 1.3215451633221434e-06
    p = p * r + 1.5252672924850737e-05
    p = p * r + 0.00015403530424776529
    p = p * r + 0.0013333558200794592
    p = p * r + 0.009618129107618665
    p = p * r + 0.05550410866465167
    p = p * r + 0.24022650695910075
    p = p * r + 0.6931471805599462
    p = p * r + 1.0
    power = (shifted.to(tl.int64, bitcast=True) << 52) + (tl.cast(_BITS, tl.int64) << 52)
    return ((p.to(tl.int64, bitcast=True) + power).to(tl.float64, bitcast=True) + _SHIFTER) - _SHIFTER


@triton.jit
def weigh_kernel(y, largest, rate, weights, vocab, y_b, y_v, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < vocab
    most = tl.load(largest + row).to(tl.float64)
    ordinary = (most - most) == 0  # otherwise there is a NaN or +inf in the row, or nothing but -inf
    x = tl.load(y + row * y_b + i.to(tl.int64) * y_v, mask=inside, other=0.0).to(tl.float64)
    t = tl.maximum((x - most) * tl.load(rate + row), -64.0)
    w = tl.where(ordinary, weight_of(t), 0.0).to(tl.int64)
    tl.store(weights + row * vocab + i, w, mask=inside)


@triton.jit
def penalise_kernel(
    x, own, previous, lens, penalty, vocab, columns, x_b, x_v, p_b, p_t, HAS_LENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Into a copy of the logits, from the logits: a token that occurs twice is penalised once."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counts = i < columns
    if HAS_LENS:
        counts = counts & (i < tl.load(lens + row))
    token = tl.load(previous + row * p_b + i.to(tl.int64) * p_t, mask=counts, other=-1).to(tl.int64)
    counts = counts & (token >= 0) & (token < vocab)
    y = tl.load(x + row * x_b + token * x_v, mask=counts, other=0.0).to(tl.float32)
    by, wide = tl.load(penalty + row), y.to(tl.float64)
    tl.store(own + row * vocab + token, tl.where(y > 0, wide / by, wide * by).to(tl.float32), mask=counts)


@triton.jit
def tile_of(y, weights, begin, vocab, y_v, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """Of some logits of a row: their places, ranks and weights."""
    i = begin + tl.arange(0, BLOCK)
    inside = i < vocab
    x = tl.load(y + i.to(tl.int64) * y_v, mask=inside, other=0.0).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    rank = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> LOW).to(tl.int64)
    return i, tl.where(inside, rank, _NO_RANK), tl.load(weights + i, mask=inside, other=0)


@triton.jit
def is_kept(i, rank, low, equals_end):
    return (rank > low) | ((rank == low) & (i < equals_end))


@triton.jit
def boundary(
    y, weights, wanted, low, equals_end, vocab, y_v, WEIGHED: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The highest rank at which, with all above it, there are `wanted` logits, or as much weight of those kept; and how
    much of that the logits of this rank must make up.
    """
    zero = wanted - wanted
    at, above = zero - (1 << (31 - LOW)), zero
    for step in range((32 - LOW) // 2):
        one = (zero + 1) << (30 - LOW - 2 * step)
        from_1, from_2, from_3 = zero, zero, zero
        for begin in range(0, vocab, BLOCK):
            i, rank, w = tile_of(y, weights, begin, vocab, y_v, LOW, BLOCK)
            amount = tl.where(is_kept(i, rank, low, equals_end), w, 0) if WEIGHED else (rank > _NO_RANK).to(tl.int64)
            from_1 += tl.sum(tl.where(rank >= at + one, amount, 0), 0)
            from_2 += tl.sum(tl.where(rank >= at + 2 * one, amount, 0), 0)
            from_3 += tl.sum(tl.where(rank >= at + 3 * one, amount, 0), 0)
        if from_3 >= wanted:
            at += 3 * one
        elif from_2 >= wanted:
            at += 2 * one
            above = from_3
        elif from_1 >= wanted:
            at += one
            above = from_2
        else:
            above = from_1
    return at, wanted - above


@triton.jit
def end_of_equals(y, weights, at, count, vocab, y_v, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """The place behind the count-th logit of a rank."""
    end, found = tl.full((), 0, tl.int32), count - count
    for begin in range(0, vocab, BLOCK):
        i, rank, _ = tile_of(y, weights, begin, vocab, y_v, LOW, BLOCK)
        equal = (rank == at).to(tl.int64)
        is_last = (rank == at) & (tl.cumsum(equal, 0) + found == count)
        end = tl.maximum(end, tl.max(tl.where(is_last, i + 1, 0), 0))
        found += tl.sum(equal, 0)
    return end


@triton.jit
def share_of(mantissa, shift, total):
    """The least integer that is at least mantissa 2^-shift total, at least 1: the product has up to 116 bits."""
    m, w = mantissa.to(tl.uint64), total.to(tl.uint64)
    high, low = tl.umulhi(m, w), m * w
    one, shift = m - m + 1, shift.to(tl.uint64)
    if shift < 64:
        whole = (high << (64 - shift)) | (low >> shift)
        rest = low & ((one << shift) - 1)
    elif shift < 127:
        whole = high >> (shift - 64)
        rest = low | (high & ((one << (shift - 64)) - 1))
    else:
        whole = one - 1
        rest = one
    return tl.maximum((whole + (rest != 0).to(tl.uint64)).to(tl.int64), 1)


@triton.jit
def choose_kernel(
    y, weights, largest, temperature, top_k, mantissa, shift, least, seed, offset, tokens, chosen, totals, vocab, y_b,
    y_v, HAS_K: tl.constexpr, HAS_P: tl.constexpr, HAS_LEAST: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y += row * y_b
    weights += row * vocab
    token = tl.full((), 0, tl.int32) + vocab
    if tl.load(temperature + row) == 0:
        most = tl.load(largest + row)
        for begin in range(0, vocab, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            x = tl.load(y + i.to(tl.int64) * y_v, mask=i < vocab, other=float("-inf")).to(tl.float32)
            token = tl.minimum(token, tl.min(tl.where((x == most) & (i < vocab), i, vocab), 0))
        tl.store(chosen + row, 1)
        tl.store(totals + row, 1)
    else:
        low, equals_end = tl.full((), -(2**39), tl.int64), tl.full((), 0, tl.int32) + vocab
        if HAS_K:
            k = tl.load(top_k + row)
            if (k > 0) & (k < vocab):
                low, count = boundary(y, weights, k, low, equals_end, vocab, y_v, False, LOW, BLOCK)
                equals_end = end_of_equals(y, weights, low, count, vocab, y_v, LOW, BLOCK)
        if HAS_P:
            total, part = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
            for begin in range(0, vocab, BLOCK):
                i, rank, w = tile_of(y, weights, begin, vocab, y_v, LOW, BLOCK)
                total += tl.sum(tl.where(is_kept(i, rank, low, equals_end), w, 0), 0)
            wanted = share_of(tl.load(mantissa + row), tl.load(shift + row), total)
            low, part = boundary(y, weights, wanted, low, equals_end, vocab, y_v, True, LOW, BLOCK)
            each = tl.full((), 1, tl.int64)  # weight of a logit at the boundary
            for begin in range(0, vocab, BLOCK):
                i, rank, w = tile_of(y, weights, begin, vocab, y_v, LOW, BLOCK)
                each = tl.maximum(each, tl.max(tl.where(rank == low, w, 0), 0))
            equals_end = end_of_equals(y, weights, low, (part + each - 1) // each, vocab, y_v, LOW, BLOCK)
        floor = tl.load(least + row) if HAS_LEAST else tl.full((), 0, tl.int64)
        total = tl.full((), 0, tl.int64)
        for begin in range(0, vocab, BLOCK):
            i, rank, w = tile_of(y, weights, begin, vocab, y_v, LOW, BLOCK)
            total += tl.sum(tl.where(is_kept(i, rank, low, equals_end) & (w >= floor), w, 0), 0)
        at = tl.load(offset + row)
        none = (at - at).to(tl.uint32)
        word_0, word_1, _, _ = tl.philox(
            tl.load(seed + row), (at & 0xFFFFFFFF).to(tl.uint32), ((at >> 32) & 0xFFFFFFFF).to(tl.uint32), none,
            none + _PURPOSE,
        )  # fmt: skip
        drawn = (word_1.to(tl.uint64) << 32) | word_0.to(tl.uint64)
        left = tl.umulhi(drawn, total.to(tl.uint64)).to(tl.int64)
        before = tl.full((), 0, tl.int64)
        for begin in range(0, vocab, BLOCK):
            i, rank, w = tile_of(y, weights, begin, vocab, y_v, LOW, BLOCK)
            w = tl.where(is_kept(i, rank, low, equals_end) & (w >= floor), w, 0)
            token = tl.minimum(token, tl.min(tl.where(tl.cumsum(w, 0) + before > left, i, vocab), 0))
            before += tl.sum(w, 0)
        tl.store(chosen + row, tl.load(weights + token, mask=token < vocab, other=1))
        tl.store(totals + row, total)
    tl.store(tokens + row, tl.where(token < vocab, token, -1).to(tl.int64))


def _vector(name: str, t: torch.Tensor, batch: int, narrow: torch.dtype, wide: torch.dtype) -> torch.Tensor:
    """A parameter's tensor in the wider of its two dtypes."""
    if t.dtype not in (narrow, wide):
        names = " or ".join(str(d).removeprefix("torch.") for d in (narrow, wide))
        raise TypeError(f"genai_kernels.{_OP}: {name}: expected a number, {names}, got {t.dtype}")
    check(
        _OP, t.shape == (batch,),
        lambda: f"{name}: expected a number or a tensor [{batch}], one for each row of logits, got shape "
        f"{list(t.shape)}",
    )  # fmt: skip
    return t.to(wide)


def _numbers(
    name: str, t: torch.Tensor | None, number: float, expected: str, fits: bool, like: torch.Tensor, whole: bool = False
) -> torch.Tensor:
    """A parameter for each row; only a number is known here, and looked at."""
    dtypes = (torch.int32, torch.int64) if whole else (torch.float32, torch.float64)
    if t is not None:
        return _vector(name, t, len(like), *dtypes)
    check(_OP, fits, lambda: f"{name}: expected {expected}, got {number}")
    return torch.full((len(like),), number, dtype=dtypes[1], device=like.device)


def _previous(tokens: torch.Tensor, lens: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    if tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"genai_kernels.{_OP}: previous_tokens: expected int32 or int64, got {tokens.dtype}")
    check(
        _OP, tokens.dim() == 2 and tokens.shape[0] == batch,
        lambda: f"previous_tokens: expected [{batch}, tokens], got shape {list(tokens.shape)}",
    )  # fmt: skip
    return None if lens is None else _vector("previous_lens", lens, batch, torch.int32, torch.int64)


def _weights(y: torch.Tensor, largest: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    weights = torch.empty(y.shape, dtype=torch.int64, device=y.device)
    block = min(triton.next_power_of_2(y.shape[1]), _TILE)
    grid = (y.shape[0], triton.cdiv(y.shape[1], block))
    weigh_kernel[grid](y, largest, rate, weights, y.shape[1], *y.stride(), BLOCK=block, enable_fp_fusion=False)
    return weights


@in_triton("sample_logprobs", float64_parameters=True)
def sample_logprobs(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, logprobs = _sample(*args)
    return tokens, *logprobs()


@in_triton("sample", float64_parameters=True)
def sample(*args: Any) -> torch.Tensor:
    return _sample(*args)[0]


def _sample(
    x, previous, lens, temperatures, temperature, top_ks, top_k, top_ps, top_p, min_ps, min_p, penalties, penalty,
    seeds, seed, offsets, offset,
):  # fmt: skip
    """The tokens, and a function that gives their two log-probabilities."""
    if x.dtype not in _LOW_BITS:
        raise TypeError(f"genai_kernels.{_OP}: logits: expected float32, bfloat16 or float16, got {x.dtype}")
    check(
        _OP, x.dim() == 2 and 1 <= x.shape[1] <= _MOST,
        lambda: f"logits: expected [batch, vocabulary] with 1 to {_MOST} tokens, got shape {list(x.shape)}",
    )  # fmt: skip
    batch, vocab = x.shape
    greedy = temperatures is None and temperature == 0
    check(
        _OP, batch <= 1 or greedy or seeds is not None or offsets is not None,
        lambda: f"seed: expected a tensor [{batch}], or offset to be one: with one of each for all, every request "
        f"would draw the same number, got {seed}",
    )  # fmt: skip
    temperatures = _numbers(
        "temperature", temperatures, temperature, "a finite number >= 0 (0: the largest logit)",
        math.isfinite(temperature) and temperature >= 0, x,
    )  # fmt: skip
    has_k, has_p, has_least = top_ks is not None or top_k > 0, top_ps is not None or top_p < 1, min_ps is not None
    has_least = has_least or min_p > 0
    top_ks = _numbers("top_k", top_ks, top_k, "at least 1, or 0 or -1 for no limit", top_k >= -1, x, whole=True)
    top_ps = _numbers("top_p", top_ps, top_p, "0 <= p <= 1", 0 <= top_p <= 1, x)
    min_ps = _numbers("min_p", min_ps, min_p, "0 <= p <= 1", 0 <= min_p <= 1, x)
    seeds, offsets = (_numbers(n, t, v, "", True, x, whole=True) for n, t, v in
                      (("seed", seeds, seed), ("offset", offsets, offset)))  # fmt: skip
    check(
        _OP, previous is not None or (penalties is None and penalty == 1),
        lambda: f"repetition_penalty: expected 1 without previous_tokens, got {penalty}",
    )  # fmt: skip
    check(_OP, previous is not None or lens is None, lambda: "previous_lens: expected None without previous_tokens")
    y = x
    if previous is not None:
        penalties = _numbers(
            "repetition_penalty", penalties, penalty, "a finite number > 0 (1: none)",
            math.isfinite(penalty) and penalty > 0, x,
        )  # fmt: skip
        lens = _previous(previous, lens, batch)
        y = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if previous.numel():
            block = min(triton.next_power_of_2(previous.shape[1]), 1024)
            penalise_kernel[(batch, triton.cdiv(previous.shape[1], block))](
                x, y, previous, lens, penalties, vocab, previous.shape[1], *x.stride(), *previous.stride(),
                HAS_LENS=lens is not None, BLOCK=block,
            )  # fmt: skip
    tokens, chosen, totals = (torch.empty(batch, dtype=torch.int64, device=x.device) for _ in range(3))
    given_largest = x.amax(1).float()
    largest = given_largest if y is x else y.amax(1)
    if batch:
        # the rate of a temperature close to 0 must not be infinite: 0 times it would be NaN
        rate = (_LOG2E / torch.where(temperatures == 0, 1.0, temperatures)).clamp_max(2.0**1000)
        weights = tokens if greedy else _weights(y, largest, rate)
        mantissa, exponent = torch.frexp(top_ps)
        choose_kernel[(batch,)](
            y, weights, largest, temperatures, top_ks, (mantissa * 2.0**53).long(), 53 - exponent,
            (min_ps * 2.0**_BITS.value).ceil().long(), seeds, offsets, tokens, chosen, totals, vocab, *y.stride(),
            HAS_K=has_k, HAS_P=has_p, HAS_LEAST=has_least, LOW=_LOW_BITS[y.dtype],
            BLOCK=min(triton.next_power_of_2(vocab), _TILE), num_warps=_WARPS,
        )  # fmt: skip

    def logprobs() -> tuple[torch.Tensor, torch.Tensor]:
        if not batch:
            return given_largest, given_largest.clone()
        everything = _weights(x, given_largest, torch.full_like(temperatures, _LOG2E)).sum(1)
        above = x.gather(1, tokens.clamp(0, vocab - 1).unsqueeze(1))[:, 0].double() - given_largest.double()
        given = (above - (everything.double() / 2.0**_BITS.value).log()).float()
        final = (chosen.double() / totals.double()).log().float()
        given, final = (torch.where(tokens < 0, float("nan"), v) for v in (given, final))
        return given, final

    return tokens, logprobs
