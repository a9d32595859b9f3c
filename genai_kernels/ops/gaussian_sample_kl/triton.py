"""gaussian_sample_kl in Triton: one element a lane; a program's part of the divergence is summed in float64."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...torch_ops import in_triton
from ...triton_lib import check, check_like
from ...triton_lib.exp import exp
from ...triton_lib.normal import normal_numbers
from ...triton_lib.samples import check_samples, check_seeds, stride

_OP = "gaussian_sample_kl"
_TILE = 1024  # elements of a program: eight for each thread of four warps
_LATENT = tl.constexpr(0x6C61746E)  # NoiseStream of csrc/core/noise.h


@triton.jit
def clamped(logvar, least, most):
    return tl.where(logvar > most, most, tl.where(logvar < least, least, logvar))  # a NaN stays


@triton.jit
def noise_of(noise, seeds, n, noise_n, seed_n, offset, first, at, inside, DRAWN: tl.constexpr, BLOCK: tl.constexpr):
    if DRAWN:
        return normal_numbers(tl.load(seeds + n * seed_n), offset, _LATENT, first, BLOCK)
    return tl.load(noise + n * noise_n + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sample_kernel(
    mean, logvar, noise, seeds, z, parts, mean_n, logvar_n, noise_n, seed_n, elements, pieces, offset, least, most,
    DRAWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    n, first = item // pieces, item % pieces * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < elements
    e = noise_of(noise, seeds, n, noise_n, seed_n, offset, first, at, inside, DRAWN, BLOCK)
    m = tl.load(mean + n * mean_n + at, mask=inside, other=0.0).to(tl.float32)
    v = clamped(tl.load(logvar + n * logvar_n + at, mask=inside, other=0.0).to(tl.float32), least, most)
    tl.store(z + n * elements + at, (m + exp(v * 0.5) * e).to(z.dtype.element_ty), mask=inside)
    term = tl.where(inside, m * m + (exp(v) - 1.0 - v), 0.0)
    tl.store(parts + item, 0.5 * tl.sum(term.to(tl.float64), 0))  # in double: a term may be far from the others


@triton.jit
def sample_bwd_kernel(
    mean, logvar, dz, dkl, noise, seeds, dmean, dlogvar, dnoise, mean_n, logvar_n, dz_n, dkl_n, noise_n, seed_n,
    elements, pieces, offset, least, most, HAS_DZ: tl.constexpr, HAS_DKL: tl.constexpr, DRAWN: tl.constexpr,
    WANT_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    n, first = item // pieces, item % pieces * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < elements
    to = n * elements + at
    m = tl.load(mean + n * mean_n + at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(logvar + n * logvar_n + at, mask=inside, other=0.0).to(tl.float32)
    v = clamped(given, least, most)
    deviation = exp(v * 0.5)
    d, slope = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    along = d
    if HAS_DKL:
        of_sample = tl.load(dkl + n * dkl_n)
        along = of_sample * m
        slope = of_sample * (exp(v) - 1.0)
    if HAS_DZ:
        d = tl.load(dz + n * dz_n + at, mask=inside, other=0.0).to(tl.float32)
        e = noise_of(noise, seeds, n, noise_n, seed_n, offset, first, at, inside, DRAWN, BLOCK)
        slope = d * e * deviation + slope
    tl.store(dmean + to, (along + d).to(dmean.dtype.element_ty), mask=inside)
    slope = tl.where((given < least) | (given > most), 0.0, slope * 0.5)
    tl.store(dlogvar + to, slope.to(dlogvar.dtype.element_ty), mask=inside)
    if WANT_NOISE:
        tl.store(dnoise + to, (d * deviation).to(dnoise.dtype.element_ty), mask=inside)


def _check(mean, logvar, noise, seeds, offset, least, most, **others: Any) -> None:
    check_samples(_OP, "mean", mean, {"mean": mean, "logvar": logvar, "noise": noise, **others})
    for name, t in {"logvar": logvar, "noise": noise, **others}.items():
        check_like(_OP, name, t, "mean", mean)
    found = "neither" if seeds is None else "both"
    check(_OP, (noise is None) != (seeds is None), lambda: f"seed: expected either it or noise, got {found}")
    check_seeds(_OP, seeds, mean.shape[0], offset)
    check(_OP, least <= most, lambda: f"logvar_range: expected the smaller number first, got ({least}, {most})")


@in_triton("gaussian_sample_kl")
def _gaussian_sample_kl(mean, logvar, noise, seeds, offset, least, most):
    _check(mean, logvar, noise, seeds, offset, least, most)
    batch, elements = mean.shape[0], mean.numel() // max(mean.shape[0], 1)
    z, pieces = mean.new_empty(mean.shape), triton.cdiv(elements, _TILE)
    parts = mean.new_empty((batch, pieces), dtype=torch.float64)
    if z.numel() > 0:
        sample_kernel[(batch * pieces,)](
            mean, logvar, mean if noise is None else noise, mean if seeds is None else seeds, z, parts, stride(mean),
            stride(logvar), stride(noise), stride(seeds), elements, pieces, offset, least, most, DRAWN=noise is None,
            BLOCK=_TILE,
        )  # fmt: skip
    return z, parts.sum(1).float()


@in_triton("gaussian_sample_kl_bwd")
def _gaussian_sample_kl_bwd(mean, logvar, dz, dkl, noise, seeds, offset, least, most, noise_grad):
    _check(mean, logvar, noise, seeds, offset, least, most, dz=dz)
    if dkl is not None:
        if dkl.dtype != torch.float32:
            raise TypeError(f"genai_kernels.{_OP}: dkl: expected float32, got {str(dkl.dtype).removeprefix('torch.')}")
        found, batch = list(dkl.shape), mean.shape[0]
        check(_OP, found == [batch], lambda: f"dkl: expected [{batch}], got shape {found}")
    wants_noise = noise is not None and noise_grad
    dmean, dlogvar = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    dnoise = mean.new_empty(mean.shape if wants_noise else 0)
    if dmean.numel() > 0:
        elements = mean.numel() // mean.shape[0]
        pieces = triton.cdiv(elements, _TILE)

        def given(t: Any) -> Any:
            return mean if t is None else t  # a place that nothing is read from

        sample_bwd_kernel[(mean.shape[0] * pieces,)](
            mean, logvar, given(dz), given(dkl), given(noise), given(seeds), dmean, dlogvar, dnoise,
            *(stride(t) for t in (mean, logvar, dz, dkl, noise, seeds)), elements, pieces, offset, least, most,
            HAS_DZ=dz is not None, HAS_DKL=dkl is not None, DRAWN=noise is None, WANT_NOISE=wants_noise, BLOCK=_TILE,
        )  # fmt: skip
    return dmean, dlogvar, dnoise
