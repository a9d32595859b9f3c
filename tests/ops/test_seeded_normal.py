"""Philox's normal numbers: exact to an ULP or two, independent of batch and threads, and normal."""

import math

import pytest
import torch
from calls import same_bits

import genai_kernels as gk
from genai_kernels.philox import normal

SEEDS = torch.tensor([5, -7, 2**62 + 3])
ROUNDOFF = 2.0**-24


def ulps(found, exact):
    spacing = 2.0 ** (exact.abs().clamp_min(2.0**-40).log2().floor() - 23)
    return (found.double() - exact).abs() / spacing


def test_numbers_are_those_of_the_definition():
    """In float32 within a few roundings of float64: those of the radius, the angle's function and their product."""
    found, exact = gk.seeded_normal(SEEDS, (100_003,)), normal(SEEDS, 100_003, 0, "plain", torch.float64)
    error = ulps(found, exact)
    assert error.max() < 4
    assert error.square().mean().sqrt() < 0.75
    in_double = gk.seeded_normal(SEEDS, (1000,), dtype=torch.float64)
    assert (in_double - exact[:, :1000]).abs().max() < 1e-14
    for dtype in (torch.bfloat16, torch.float16):
        assert same_bits(gk.seeded_normal(SEEDS, (517,), dtype=dtype), found[:, :517].to(dtype))


def test_sines_and_cosines():
    """Below 1 ULP with fused multiply-add, 1.5 without, over 2^17 angles of two turns."""
    turns = torch.arange(2**17, dtype=torch.float64) / 2**16
    options = {"downscale_freq_shift": 0.0, "scale": 2 * math.pi}
    exact = gk.timestep_embedding(turns, 2, **options)
    error = ulps(gk.timestep_embedding(turns, 2, dtype=torch.float32, **options), exact)
    assert error[exact.abs() > 1e-9].max() < 1.5


def test_a_sample_does_not_know_its_batch():
    whole = gk.seeded_normal(SEEDS, (3, 67, 5), offset=2**32 - 1)
    for i, seed in enumerate(SEEDS.tolist()):
        assert same_bits(whole[i : i + 1], gk.seeded_normal(seed, (3, 67, 5), offset=2**32 - 1))
    assert same_bits(gk.seeded_normal(SEEDS, (5000,))[:, :70], gk.seeded_normal(SEEDS, (70,)))
    assert same_bits(gk.seeded_normal(SEEDS.repeat_interleave(2)[::2], (70,)), gk.seeded_normal(SEEDS, (70,)))
    threads = torch.get_num_threads()
    try:
        many = [torch.set_num_threads(n) or gk.seeded_normal(SEEDS, (40_000,)) for n in (1, 3, 8)]
    finally:
        torch.set_num_threads(threads)
    assert same_bits(many[0], many[1])
    assert same_bits(many[0], many[2])


def kolmogorov(draws):
    """The distance of an empirical distribution from the normal one, in standard units: above 2 once in 1500 times."""
    sorted_draws = draws.double().flatten().sort().values
    n = sorted_draws.numel()
    below = torch.special.ndtr(sorted_draws)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((below - steps[:-1]).max().item(), (steps[1:] - below).max().item())


@pytest.mark.parametrize("offset", [0, 1, 77])
def test_they_are_normal_and_independent(offset):
    z = gk.seeded_normal(torch.arange(20), (20_000,), offset=offset)
    assert kolmogorov(z) < 2
    assert kolmogorov((z[:, ::2] + z[:, 1::2]) / math.sqrt(2)) < 2
    for other in (z.roll(1, 1), z.roll(16, 1), z.roll(64, 1), z.roll(1, 0)):
        assert abs((z * other).mean().item()) * math.sqrt(z.numel()) < 4
        assert abs(((z**2 - 1) * (other**2 - 1)).mean().item()) / 2 * math.sqrt(z.numel()) < 4


def test_offsets_and_uses_of_a_seed_share_no_numbers():
    shape = (1, 64)
    draws = [gk.seeded_normal(3, shape[1:], offset=offset) for offset in range(4)]
    zero = torch.zeros(shape)
    only_noise = gk.StepCoefficients(noise=1.0, known=0.0, known_noise=1.0)
    draws.append(gk.cfg_step(zero, zero, only_noise, seed=3))
    draws.append(gk.cfg_step(zero, zero, only_noise, seed=3, known=zero, mask=torch.zeros(shape, dtype=torch.bool)))
    draws.append(gk.gaussian_sample_kl(zero, zero, seed=3)[0])
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.isin(a, b).any()


def test_errors_name_what_is_wrong():
    with pytest.raises(TypeError, match=r"genai_kernels\.seeded_normal: dtype: expected float32, float64"):
        gk.seeded_normal(1, (3,), dtype=torch.int32)
    with pytest.raises(TypeError, match="seed: expected int64, got int32"):
        gk.seeded_normal(torch.tensor([1], dtype=torch.int32), (3,))
    with pytest.raises(ValueError, match=r"offset: expected 0 <= offset < 2\^32, got -1"):
        gk.seeded_normal(1, (3,), offset=-1)
    with pytest.raises(ValueError, match=r"seed: expected \[samples\], got shape \[1, 1\]"):
        gk.seeded_normal(torch.tensor([[1]]), (3,))
    with gk.use_backend("reference"):
        assert (gk.seeded_normal(1, (9,)) - normal(torch.tensor([1]), 9, 0, "plain", torch.float32)).abs().max() == 0
