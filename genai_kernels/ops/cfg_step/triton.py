"""cfg_step in Triton: one element a lane; noise is made where it is used, as on the CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from ...triton_lib.normal import normal_numbers
from ...triton_lib.samples import check_samples, check_seeds, stride

_OP = "cfg_step"
_TILE = 1024  # elements of a program: eight for each thread of four warps
_STEP, _KNOWN = tl.constexpr(0x73746570), tl.constexpr(0x6B6E6F77)  # NoiseStream of csrc/core/noise.h


@triton.jit
def of_sample(tensor, n, stride, at, inside):
    return tl.load(tensor + n * stride + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def add_term(y, number, term, IS_THERE: tl.constexpr):
    if IS_THERE:
        y = tl.fma(number, term, y)
    return y


@triton.jit
def origin_of(a, b, scale, scale_low, ratio, lost, HAS_RATIO: tl.constexpr):
    """x0 = scale (a + ratio b), whose sum is exact to its own last bit: csrc/ops/cfg_step/cfg_step_cpu.cpp."""
    if HAS_RATIO:
        total = tl.fma(ratio, b, a)
        return tl.fma(scale, total, tl.fma(scale_low, total, lost * b))
    return tl.fma(scale, a, scale_low * a)


@triton.jit
def step_kernel(
    x, model, uncond, previous, noise, seeds, known, mask, known_noise, factors, result, x0_out,
    x_n, model_n, uncond_n, previous_n, noise_n, seed_n, known_n, known_noise_n, mask_n, mask_c,
    elements, pixels, offset, guidance,
    clip, scale, scale_low, ratio, lost, of_x, x_low, of_model, model_low, of_x0, x0_low, of_previous, previous_low,
    of_noise, noise_low, of_known, known_low, of_known_noise, known_noise_low,
    GUIDED: tl.constexpr, SCALED: tl.constexpr, X_LEADS: tl.constexpr, HAS_RATIO: tl.constexpr, CLIPPED: tl.constexpr,
    HAS_X: tl.constexpr, HAS_MODEL: tl.constexpr, HAS_X0: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
    HAS_NOISE: tl.constexpr, DRAWN: tl.constexpr, HAS_KNOWN: tl.constexpr, OF_KNOWN: tl.constexpr,
    HAS_KNOWN_NOISE: tl.constexpr, KNOWN_DRAWN: tl.constexpr, RETURN_X0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < elements
    x_i = of_sample(x, n, x_n, at, inside)
    m = of_sample(model, n, model_n, at, inside)
    if GUIDED:
        u = of_sample(uncond, n, uncond_n, at, inside)
        m = u + guidance * (m - u)
    if SCALED:
        m = m * tl.load(factors + n)
    x0, z, previous_i = x_i, x_i, x_i  # what is not there is not used
    if HAS_X0 or RETURN_X0:
        x0 = origin_of(x_i if X_LEADS else m, m if X_LEADS else x_i, scale, scale_low, ratio, lost, HAS_RATIO)
        if CLIPPED:
            x0 = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))  # a NaN stays
        if RETURN_X0:
            tl.store(x0_out + n * elements + at, x0.to(x0_out.dtype.element_ty), mask=inside)
    if HAS_PREVIOUS:
        previous_i = of_sample(previous, n, previous_n, at, inside)
    if HAS_NOISE:
        if DRAWN:
            z = normal_numbers(tl.load(seeds + n * seed_n), offset, _STEP, first, BLOCK)
        else:
            z = of_sample(noise, n, noise_n, at, inside)
    # the low parts first, and x last: where a step is short it is most of the result
    y = tl.zeros((BLOCK,), tl.float32)
    y = add_term(y, previous_low, previous_i, HAS_PREVIOUS)
    y = add_term(y, noise_low, z, HAS_NOISE)
    y = add_term(y, x0_low, x0, HAS_X0)
    y = add_term(y, model_low, m, HAS_MODEL)
    y = add_term(y, x_low, x_i, HAS_X)
    y = add_term(y, of_previous, previous_i, HAS_PREVIOUS)
    y = add_term(y, of_noise, z, HAS_NOISE)
    y = add_term(y, of_x0, x0, HAS_X0)
    y = add_term(y, of_model, m, HAS_MODEL)
    y = add_term(y, of_x, x_i, HAS_X)
    if HAS_KNOWN:
        known_i = of_sample(known, n, known_n, at, inside)
        z = known_i
        if HAS_KNOWN_NOISE:
            if KNOWN_DRAWN:
                z = normal_numbers(tl.load(seeds + n * seed_n), offset, _KNOWN, first, BLOCK)
            else:
                z = of_sample(known_noise, n, known_noise_n, at, inside)
        k = tl.zeros((BLOCK,), tl.float32)
        k = add_term(k, known_low, known_i, OF_KNOWN)
        k = add_term(k, known_noise_low, z, HAS_KNOWN_NOISE)
        k = add_term(k, of_known, known_i, OF_KNOWN)
        k = add_term(k, of_known_noise, z, HAS_KNOWN_NOISE)
        share = tl.load(mask + n * mask_n + at // pixels * mask_c + at % pixels, mask=inside, other=0).to(tl.float32)
        # selected, so that nothing of the part that is not wanted comes through
        y = tl.where(share == 0, k, tl.where(share == 1, y, k + share * (y - k)))
    tl.store(result + n * elements + at, y.to(result.dtype.element_ty), mask=inside)


def _halves(number: float) -> tuple[float, float]:
    """A number as two of float32: both have its sign and neither is 0, so that an infinity times the two is one."""
    if number == 0 or not math.isfinite(number):
        return number, number
    mantissa, exponent = math.frexp(number)
    high = math.ldexp(math.trunc(math.ldexp(mantissa, 24)), exponent - 24)
    return high, (number - high) or number * 2.0**-60


def _origin(x0_from_x: float, x0_from_model: float) -> tuple[bool, bool, list[float]]:
    """Whether x leads, whether there is another term, and the numbers of origin_of."""
    x_leads = x0_from_x == 1 or abs(x0_from_x) >= abs(x0_from_model)
    scale, other = (x0_from_x, x0_from_model) if x_leads else (x0_from_model, x0_from_x)
    halves, (ratio, ratio_low) = _halves(scale), _halves(other / scale if scale else 0.0)
    return x_leads, ratio != 0, [*halves, ratio, halves[0] * ratio_low]


def _factors(model, uncond, guidance, rescale):
    """Of the guided output of each sample, on its device."""
    c, u = model.float().flatten(1), uncond.float().flatten(1)
    return (rescale * (c.std(dim=1) / (u + guidance * (c - u)).std(dim=1)) + (1 - rescale)).float()


def _mask_strides(mask: torch.Tensor, x: torch.Tensor) -> tuple[int, int]:
    fits = mask.dim() == x.dim() and all(
        m == s or (d < 2 and m == 1) for d, (m, s) in enumerate(zip(mask.shape, x.shape, strict=True))
    )
    check(_OP, fits, lambda: (
        f"mask: expected the shape of x, {list(x.shape)}, or 1 in place of the batch and the channels, "
        f"contiguous over the pixels, got {list(mask.shape)}"))  # fmt: skip
    if mask.dtype not in (torch.bool, x.dtype):
        raise TypeError(f"genai_kernels.{_OP}: mask: expected bool or the dtype of x, {x.dtype}, got {mask.dtype}")
    of_channel = mask.stride(1) if mask.dim() > 1 and mask.shape[1] > 1 else 0
    return (mask.stride(0) if mask.shape[0] > 1 else 0), of_channel


@in_triton("cfg_step")
def _cfg_step(
    x, model, uncond, previous, noise, seeds, known, mask, known_noise, offset, guidance, rescale, x0_from_x,
    x0_from_model, clip, of_x, of_model, of_x0, of_previous, of_noise, of_known, of_known_noise, return_x0,
):  # fmt: skip
    if model.dtype != x.dtype and x.dtype != torch.float32:
        raise TypeError(
            f"genai_kernels.{_OP}: model_output: expected the dtype of x, {x.dtype}, or a narrower one beside float32, "
            f"got {model.dtype}"
        )
    of_x_shape = {"x": x, "model_output": model, "uncond": uncond, "previous_x0": previous, "noise": noise}
    check_samples(_OP, "x", x, {**of_x_shape, "known": known, "known_noise": known_noise})
    check_like(_OP, "uncond", uncond, "model_output", model)
    for name, t in (("previous_x0", previous), ("noise", noise), ("known", known), ("known_noise", known_noise)):
        check_like(_OP, name, t, "x", x)
    guided = uncond is not None
    unguided = guidance == 1 and rescale == 0
    check(_OP, guided or unguided, lambda: (
        "uncond: expected the output without the condition beside a guidance_scale or guidance_rescale, "
        "got None"))  # fmt: skip
    check(_OP, previous is not None or of_previous == 0, lambda: (
        "previous_x0: expected x0 of the step before, which this step needs, got None"))  # fmt: skip
    check(_OP, (known is None) == (mask is None), lambda: "mask: expected it together with known")
    check(_OP, known is not None or known_noise is None, lambda: "known_noise: expected known beside it, got None")
    drawn = of_noise != 0 and noise is None
    known_drawn = known is not None and of_known_noise != 0 and known_noise is None
    check(_OP, seeds is not None or not (drawn or known_drawn), lambda: (
        "seed: expected one for each sample, or noise, for this step, got None"))  # fmt: skip
    check_seeds(_OP, seeds, x.shape[0], offset)
    mask_n, mask_c = (0, 0) if mask is None else _mask_strides(mask, x)

    result = x.new_empty(x.shape)
    x0 = x.new_empty(x.shape if return_x0 else 0)
    if x.numel() == 0:
        return result, x0
    factors = _factors(model, uncond, guidance, rescale) if rescale else None

    def given(t: Any) -> Any:
        return x if t is None else t  # a place that nothing is read from

    elements = x[0].numel()
    x_leads, has_ratio, origin = _origin(x0_from_x, x0_from_model)
    numbers = (of_x, of_model, of_x0, of_previous, of_noise, of_known, of_known_noise)
    step_kernel[(triton.cdiv(elements, _TILE), x.shape[0])](
        x, model, given(uncond), given(previous), given(noise), given(seeds), given(known), given(mask),
        given(known_noise), given(factors), result, x0,
        *(stride(t) for t in (x, model, uncond, previous, noise, seeds, known, known_noise)), mask_n, mask_c,
        elements, math.prod(x.shape[2:]), offset, guidance, clip, *origin,
        *(half for number in numbers for half in _halves(number)),
        GUIDED=guided, SCALED=factors is not None, X_LEADS=x_leads, HAS_RATIO=has_ratio, CLIPPED=clip < math.inf,
        HAS_X=of_x != 0, HAS_MODEL=of_model != 0, HAS_X0=of_x0 != 0, HAS_PREVIOUS=of_previous != 0,
        HAS_NOISE=of_noise != 0, DRAWN=drawn, HAS_KNOWN=known is not None, OF_KNOWN=of_known != 0,
        HAS_KNOWN_NOISE=of_known_noise != 0, KNOWN_DRAWN=known_drawn, RETURN_X0=bool(return_x0), BLOCK=_TILE,
    )  # fmt: skip
    return result, x0
