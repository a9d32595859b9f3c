"""gaussian_sample_kl against diffusers' distribution, torch.distributions, and itself in other batches."""

import pytest
import torch
from calls import same_bits

import genai_kernels as gk

SEEDS = torch.tensor([4, 5, -6])


def moments(dtype=torch.float32, shape=(3, 8, 9, 7)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def test_it_is_that_of_diffusers():
    vae = pytest.importorskip("diffusers.models.autoencoders.vae", reason="what it is compared with")
    parameters = moments(torch.float64) * 12  # some logarithms beyond the clamp
    parameters[0, 4:] -= 25
    peer = vae.DiagonalGaussianDistribution(parameters)
    noise = moments(torch.float64)[:, :4]
    z, kl = gk.gaussian_sample_kl(*parameters.chunk(2, dim=1), noise=noise)
    torch.testing.assert_close(z, peer.mean + peer.std * noise)  # float64, at PyTorch's own tolerance for it
    torch.testing.assert_close(kl, peer.kl())


def test_the_divergence_is_that_of_the_distributions():
    mean, logvar = moments(torch.float64).chunk(2, dim=1)
    _, kl = gk.gaussian_sample_kl(mean, logvar, seed=SEEDS)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(posterior, prior).flatten(1).sum(1))


def test_a_sample_does_not_know_its_batch():
    mean, logvar = moments().chunk(2, dim=1)
    whole = gk.gaussian_sample_kl(mean, logvar, seed=SEEDS, offset=7)
    for i in range(3):
        alone = gk.gaussian_sample_kl(mean[i : i + 1], logvar[i : i + 1], seed=int(SEEDS[i]), offset=7)
        assert same_bits([t[i : i + 1] for t in whole], list(alone))


def test_threads_change_no_bit():
    mean, logvar = moments(shape=(3, 8, 61, 63)).requires_grad_().chunk(2, dim=1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            z, kl = gk.gaussian_sample_kl(mean, logvar, seed=SEEDS)
            gradients = torch.autograd.grad((z * z).sum() + kl.sum(), [mean, logvar])
            results.append([z.detach(), kl.detach(), *gradients])
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("wanted", ["z", "kl", "both"])
def test_gradients_of_either_result(wanted):
    leaves = [t.contiguous().requires_grad_() for t in moments(torch.float64).chunk(2, dim=1)]
    noise = moments(torch.float64)[:, 4:].clone().requires_grad_()
    z, kl = gk.gaussian_sample_kl(*leaves, noise=noise, logvar_range=(-1.0, 1.0))
    mean, logvar = leaves
    clamped = logvar.clamp(-1, 1)
    peer = (
        mean + (clamped / 2).exp() * noise,
        (mean**2 + clamped.exp() - 1 - clamped).flatten(1).sum(1) / 2,
    )
    pick = {"z": slice(0, 1), "kl": slice(1, 2), "both": slice(0, 2)}[wanted]
    found, expected = (
        torch.autograd.grad(sum((t**2).sum() for t in results[pick]), [*leaves, noise], allow_unused=True)
        for results in ((z, kl), peer)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(noise) if a is None else a, torch.zeros_like(noise) if b is None else b
        )


def test_a_nan_stays_one_and_in_its_sample():
    """Clamping too must not make a number of it."""
    for which in (0, 1):
        pair = [t.clone() for t in moments().chunk(2, dim=1)]
        pair[which][1, 2, 3, 4] = float("nan")
        z, kl = gk.gaussian_sample_kl(*pair, seed=SEEDS)
        assert torch.isnan(z).sum() == 1
        assert torch.isnan(z[1, 2, 3, 4])
        assert torch.isnan(kl).tolist() == [False, True, False]


def test_errors_name_what_is_wrong():
    mean, logvar = moments().chunk(2, dim=1)
    with pytest.raises(ValueError, match=r"genai_kernels\.gaussian_sample_kl: logvar: expected the shape of mean"):
        gk.gaussian_sample_kl(mean, logvar[:, :2], seed=SEEDS)
    with pytest.raises(ValueError, match="seed: expected either it or noise, got both"):
        gk.gaussian_sample_kl(mean, logvar, seed=SEEDS, noise=mean)
    with pytest.raises(ValueError, match=r"seed: expected int64 \[3\], one for each sample: with one for all"):
        gk.gaussian_sample_kl(mean, logvar, seed=1)
    with pytest.raises(ValueError, match=r"logvar_range: expected the smaller number first, got \(2, 1\)"):
        gk.gaussian_sample_kl(mean, logvar, seed=SEEDS, logvar_range=(2, 1))
    with pytest.raises(TypeError, match="logvar: expected the dtype of mean, float32, got float64"):
        gk.gaussian_sample_kl(mean, logvar.double(), seed=SEEDS)
