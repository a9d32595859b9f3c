"""cfg_step: independence of the batch, in-filling that leaves nothing of what it hides, guidance, errors."""

import math

import pytest
import torch
from calls import same_bits

import genai_kernels as gk
from genai_kernels.ops.cfg_step.samples import DDIM, DDPM, SECOND_ORDER, SHAPE
from genai_kernels.philox import normal

SEEDS = torch.tensor([11, -3, 2**40])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, COND, UNCOND, KNOWN = (make(*SHAPE, seed=i) for i in range(4))
MASK = make(*SHAPE, seed=5) > 0
GUIDED = {"uncond": UNCOND, "guidance_scale": 7.5, "guidance_rescale": 0.7}


def everything(n=slice(None), **options):
    """A step of everything at once, of some of the samples."""
    step = DDPM._replace(previous_x0=-0.1)
    given = {"uncond": UNCOND, "previous_x0": COND, "known": KNOWN, "mask": MASK, "seed": SEEDS}
    given = {name: t[n] for name, t in given.items()}
    call = {"guidance_scale": 7.5, "guidance_rescale": 0.7, "offset": 3, "return_x0": True, **given, **options}
    return list(gk.cfg_step(X[n], COND[n], step, **call))


def test_a_sample_does_not_know_its_batch():
    whole = everything()
    for i in range(3):
        assert same_bits([t[i : i + 1] for t in whole], everything(slice(i, i + 1)))
    order = torch.tensor([2, 0, 1])
    assert same_bits([t[order] for t in whole], everything(order))


def test_threads_change_no_bit():
    x, cond, uncond = (make(2, 3, 90, 91, seed=i) for i in range(3))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            results.append(
                gk.cfg_step(x, cond, DDPM, uncond=uncond, guidance_scale=3.0, guidance_rescale=0.5, seed=SEEDS[:2])
            )
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("name", ["step", "known"])
def test_the_noise_of_a_step_is_that_of_its_seed_and_offset(name):
    zero = torch.zeros(3, 200)
    step = gk.StepCoefficients(noise=1.0) if name == "step" else gk.StepCoefficients(known=0.0, known_noise=1.0)
    in_fill = {} if name == "step" else {"known": zero, "mask": torch.zeros(1, 200)}
    found = gk.cfg_step(zero, zero, step, seed=SEEDS, offset=9, **in_fill)
    exact = normal(SEEDS, 200, 9, name, torch.float64)
    assert (found - exact).abs().max() < 4 * 2.0**-24 * exact.abs().max()


def test_seeds_are_drawn_from_the_generator_of_pytorch():
    torch.manual_seed(1)
    a = gk.cfg_step(X, COND, DDPM)
    torch.manual_seed(1)
    assert same_bits(a, gk.cfg_step(X, COND, DDPM))
    assert not same_bits(a, gk.cfg_step(X, COND, DDPM))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    gk.cfg_step(X, COND, DDIM)
    gk.cfg_step(X, COND, DDPM, noise=KNOWN)
    assert torch.equal(state, torch.get_rng_state()), "a step without a draw leaves it alone"


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_what_a_mask_hides_may_hold_anything(kind):
    mask = MASK if kind == "bool" else MASK.float()
    options = {"mask": mask, "known_noise": COND}
    expected = gk.cfg_step(X, COND, DDIM, known=KNOWN, **options)
    bad = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(X.numel()).view(SHAPE) % 3]
    poisoned = gk.cfg_step(
        torch.where(MASK, X, bad), torch.where(MASK, COND, bad), DDIM, known=torch.where(MASK, bad, KNOWN), **options
    )
    assert same_bits(poisoned, expected)


def test_a_nan_stays_one_and_in_its_place():
    """Clipping too must not make a number of it: DDPM sees the model's output through the clipped x0 alone."""
    for which in (0, 1):
        pair = [X.clone(), COND.clone()]
        pair[which][1, 2, 3, 4] = math.nan
        spread = torch.isnan(gk.cfg_step(*pair, DDPM, noise=KNOWN))
        assert spread.sum() == 1
        assert spread[1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(1, 1, 9, 7), (3, 1, 9, 7), (1, 4, 9, 7), (3, 4, 1, 1), (9, 7), (4, 1, 7), (1,)])
def test_a_mask_is_broadcast_like_any_tensor(shape):
    mask = make(*shape, seed=8) > 0
    call = {"known": KNOWN, "known_noise": COND}
    expected = gk.cfg_step(X, COND, DDIM, mask=mask.expand(SHAPE).contiguous(), **call)
    for given in (mask, mask.float(), mask.expand(SHAPE)):
        assert same_bits(gk.cfg_step(X, COND, DDIM, mask=given, **call), expected)
    half = gk.cfg_step(X, COND, DDIM, mask=torch.full((1, 1, 1, 1), 0.5), **call)
    parts = [gk.cfg_step(X, COND, DDIM, mask=torch.full((1,), float(m)), **call) for m in (0, 1)]
    assert ((parts[0] + parts[1]) / 2 - half).abs().max() < 2.0**-22 * half.abs().max()


def test_one_known_image_for_all_samples():
    options = {"mask": MASK[:1], "known_noise": KNOWN[:1]}
    many = gk.cfg_step(X, COND, DDIM, known=KNOWN[:1], **options)
    assert same_bits(
        many, gk.cfg_step(X, COND, DDIM, known=KNOWN[:1].expand(SHAPE), mask=MASK[:1], known_noise=KNOWN[:1])
    )


@pytest.mark.parametrize("number", [1.0, 0.1, -0.3, 1e30])  # floats and none, whose rest has either sign
def test_an_infinity_stays_one(number):
    """The two parts of a number take it to the same infinity."""
    x, m = torch.tensor([[math.inf, -math.inf, 1.0, 2.0]]), torch.tensor([[0.7, -0.7, math.inf, 1.0]])
    step = gk.StepCoefficients(x0_from_x=1.7, x0_from_model=number / 3, x=number, model=number / 7, x0=0.1)
    found = gk.cfg_step(x, m, step, return_x0=True)
    with gk.use_backend("reference"):
        expected = gk.cfg_step(x, m, step, return_x0=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.isinf(theirs).any()
        assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
        assert torch.equal(ours[torch.isinf(ours)], theirs[torch.isinf(theirs)])


def test_a_term_whose_number_is_0_is_not_looked_at():
    nan = torch.full(SHAPE, math.nan)
    expected = gk.cfg_step(X, COND, gk.StepCoefficients(x=0.5))
    assert same_bits(gk.cfg_step(X, nan, gk.StepCoefficients(x=0.5), previous_x0=nan, noise=nan), expected)
    assert same_bits(expected, X * 0.5)


def test_a_float32_trajectory_beside_a_narrow_model():
    for dtype in (torch.bfloat16, torch.float16):
        cond, uncond = COND.to(dtype), UNCOND.to(dtype)
        guided = {"guidance_scale": 7.5, "guidance_rescale": 0.7, "return_x0": True}
        mixed = gk.cfg_step(X, cond, DDPM, uncond=uncond, seed=SEEDS, **guided)
        wide = gk.cfg_step(X, cond.float(), DDPM, uncond=uncond.float(), seed=SEEDS, **guided)
        assert same_bits(list(mixed), list(wide))


def test_rescaled_output_has_the_deviation_of_the_conditional_one():
    only_model = gk.StepCoefficients(model=1.0)
    m = gk.cfg_step(X, COND, only_model, uncond=UNCOND, guidance_scale=9.0, guidance_rescale=1.0)
    assert ((m.flatten(1).std(1) / COND.flatten(1).std(1)) - 1).abs().max() < 1e-6
    assert same_bits(gk.cfg_step(X, COND, only_model, uncond=UNCOND), UNCOND + (COND - UNCOND))


def test_gradients_are_refused_in_a_sentence():
    x = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"genai_kernels\.cfg_step: it has no gradient"):
        gk.cfg_step(x, COND, DDIM)
    with gk.use_backend("reference"):
        gk.cfg_step(x, COND, DDIM).sum().backward()
    assert x.grad is not None


def test_a_compiled_step_is_the_same():
    step = torch.compile(
        lambda x, c, u: gk.cfg_step(x, c, DDPM, uncond=u, guidance_scale=2.0, seed=SEEDS), fullgraph=True
    )
    with torch.no_grad():
        assert same_bits(
            step(X, COND, UNCOND), gk.cfg_step(X, COND, DDPM, uncond=UNCOND, guidance_scale=2.0, seed=SEEDS)
        )


ERRORS = {
    "model_output: expected the shape of x": (lambda: gk.cfg_step(X, COND[:2], DDIM), ValueError),
    "model_output: expected the dtype of x, float64": (lambda: gk.cfg_step(X.double(), COND, DDIM), TypeError),
    "uncond: expected the dtype of model_output": (lambda: gk.cfg_step(X, COND, DDIM, uncond=UNCOND.half()), TypeError),
    "uncond: expected the output without": (lambda: gk.cfg_step(X, COND, DDIM, guidance_scale=2.0), ValueError),
    "previous_x0: expected x0 of the step before": (lambda: gk.cfg_step(X, COND, SECOND_ORDER), ValueError),
    "noise: expected the dtype of x, float32, got float16": (
        lambda: gk.cfg_step(X, COND, DDPM, noise=COND.half()), TypeError),
    r"seed: expected \[3\], one for each sample, got shape \[2\]": (
        lambda: gk.cfg_step(X, COND, DDPM, seed=SEEDS[:2]), ValueError),
    r"seed: expected int64 \[3\], one for each sample: with one for all": (
        lambda: gk.cfg_step(X, COND, DDPM, seed=1), ValueError),
    "seed: expected int64, got float32": (lambda: gk.cfg_step(X, COND, DDPM, seed=SEEDS.float()), TypeError),
    "offset: expected 0 <= offset < 2\\^32, got 4294967296": (
        lambda: gk.cfg_step(X, COND, DDPM, seed=SEEDS, offset=2**32), ValueError),
    "mask: expected it together with known": (lambda: gk.cfg_step(X, COND, DDIM, known=KNOWN), ValueError),
    "known_noise: expected known beside it": (lambda: gk.cfg_step(X, COND, DDIM, known_noise=KNOWN), ValueError),
    "mask: expected bool or the dtype of x, float32, got float16": (
        lambda: gk.cfg_step(X, COND, DDIM, known=KNOWN, mask=MASK.half()), TypeError),
    r"mask: expected the shape of x, \[3, 4, 9, 7\], or 1": (
        lambda: gk.cfg_step(X, COND, DDIM, known=KNOWN, mask=MASK[:2]), ValueError),
    r"x: expected \[batch, ...\], got shape \[\]": (lambda: gk.cfg_step(X[0, 0, 0, 0], COND, DDIM), ValueError),
}  # fmt: skip


@pytest.mark.parametrize("text", ERRORS)
def test_errors_name_what_is_wrong(text):
    call, kind = ERRORS[text]
    with pytest.raises(kind, match="genai_kernels.cfg_step: " + text):
        call()


def test_the_kernel_itself_takes_dense_samples_only():
    """The public function copies what is not; a call past it may not read between the elements."""
    numbers = (0, 1.0, 0.0, *DDIM, False)
    nothing = (None,) * 7
    for wrong in (X.transpose(2, 3).contiguous().transpose(2, 3), X.repeat_interleave(2, dim=3)[..., ::2]):
        with pytest.raises(Exception, match=r"model_output: expected contiguous samples, got gaps or another order"):
            torch.ops.genai_kernels.cfg_step(X, wrong, *nothing, *numbers)
