"""Schedulers: equal to diffusers' step by step, and what they converge to against closed forms."""

import itertools
import math

import pytest
import torch
from diffusers_twins import CASES, our_trajectory, ours, their_trajectory, theirs

import genai_kernels as gk
from genai_kernels import diffusion
from genai_kernels.ops.cfg_step.reference import cfg_step_reference

COUNT, SHAPE = 50, (2, 3, 8, 8)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(COUNT + 1, *SHAPE, generator=generator, dtype=torch.float64)
    return draws[0], list(draws[1:]), torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64)


def needs_diffusers():
    return pytest.importorskip("diffusers", reason="its schedulers are what these are compared with")


@pytest.mark.parametrize("name", CASES)
def test_the_timesteps_are_those_of_diffusers(name):
    needs_diffusers()
    scheduler, _ = theirs(name)
    for count in (1, 2, 3, 7, 20, 24, 48, 50, 96, 100, 250, 999, 1000):
        scheduler.set_timesteps(count)
        visited = scheduler.timesteps
        if visited.max() > 999 or visited.unique().numel() < count:
            with pytest.raises(ValueError, match="num_steps: expected so few that no timestep repeats or is above 999"):
                ours(name).steps(count)
            continue
        found = torch.tensor(ours(name).steps(count).timesteps)
        assert torch.equal(found, visited.float()), count


def relative(a, b):
    return ((a.double() - b.double()).abs().amax() / b.double().abs().amax()).item()


@pytest.mark.parametrize("name", CASES)
def test_every_step_of_a_trajectory_is_that_of_diffusers(name, inputs, monkeypatch):
    """Within 1e-4 of the largest element in float32, the library's bound for trajectories; within it of float64 too."""
    needs_diffusers()
    start, noises, weights = inputs
    exact = our_trajectory(name, COUNT, start, noises, weights, cfg_step_reference)
    single = [t.float() for t in (start, weights)], [n.float() for n in noises]
    mine = our_trajectory(name, COUNT, single[0][0], single[1], single[0][1])
    peer = their_trajectory(name, COUNT, single[0][0], single[1], single[0][1], monkeypatch)
    for a, b, e in zip(mine, peer, exact, strict=True):
        assert relative(a, b) <= 1e-4
        assert relative(a, e) <= 1e-4


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("ddpm", "ddim"))])
def test_the_formulas_are_those_of_diffusers_in_float64(name, inputs, monkeypatch):
    """With its table in float64 too, nothing is left but roundings."""
    needs_diffusers()
    start, noises, weights = inputs
    import diffusers_twins

    scheduler, options = theirs(name)
    scheduler.alphas_cumprod = torch.tensor(ours(name).alphas_cumprod, dtype=torch.float64)
    scheduler.final_alpha_cumprod = (
        torch.tensor(1.0) if CASES[name][2].get("set_alpha_to_one", True) else scheduler.alphas_cumprod[0]
    )
    monkeypatch.setattr(diffusers_twins, "theirs", lambda _: (scheduler, options))
    mine = our_trajectory(name, COUNT, start, noises, weights, cfg_step_reference)
    peer = their_trajectory(name, COUNT, start, noises, weights, monkeypatch)
    # a trajectory passes errors on, and 1 / sqrt(alphas_cumprod) enlarges them; a float32 anywhere would show as 1e-7
    assert max(relative(a, b) for a, b in zip(mine, peer, strict=True)) < 1e-8


# ---- closed forms: data of deviation d around 0, whose perfect model is linear ----


def perfect_epsilon(x, signal, deviation, of_data):
    """The expected noise in x = signal * data + deviation * noise."""
    return x * deviation / (signal**2 * of_data**2 + deviation**2)


def test_ddim_with_the_exact_noise_of_one_image_recovers_it():
    """Its update holds exactly where the model knows the noise, however few the steps; 10 divide 1000."""
    x0 = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    noise = torch.randn_like(x0)
    scheduler = diffusion.DDIM(clip_sample=False, timestep_spacing="trailing")
    steps = scheduler.steps(10)
    left = scheduler.alphas_cumprod[int(steps[0].timestep)]
    x = math.sqrt(left) * x0 + math.sqrt(1 - left) * noise
    for step in steps:
        x = gk.cfg_step(x, noise, step.coefficients)
    assert relative(x, x0) < 1e-12


@pytest.mark.parametrize(
    ("kind", "order"), [("DDIM", 1), ("Euler", 1), ("DPMSolverPlusPlus2M", 2)], ids=["ddim", "euler", "dpm"]
)
def test_the_order_of_a_sampler(kind, order):
    """Halving the steps divides the distance from the exact flow by 2 to the order.

    On steps uniform in the logarithm of the signal-to-noise ratio, where the theory holds; up to some noise, since the
    last step to none at all is of first order in every one of them.
    """
    errors = []
    for count in (20, 40, 80, 160):
        errors.append(abs(flow_error(kind, count)))
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(rate - order) < 0.15 for rate in rates), (errors, rates)


def flow_error(kind, count, of_data=0.6):
    """The relative error of a Gaussian's flow from lambda -2 to 2 (half the log of signal to noise) in equal steps."""
    lambdas = [-2 + 4 * i / count for i in range(count + 1)]
    lefts = [1 / (1 + math.exp(-2 * x)) for x in lambdas]  # the largest noise first
    # a scheduler whose training steps are these, visited one by one: the last step, to no noise, is left away
    scheduler = getattr(diffusion, kind)(num_train_timesteps=count + 1, clip_sample=False)
    scheduler.__dict__["alphas_cumprod"] = tuple(reversed(lefts))
    scheduler.__dict__["_visited"] = lambda _: [float(i) for i in range(count, -1, -1)]
    steps = scheduler.steps(count + 1)[:-1]
    in_sigmas = kind == "Euler"

    def size(left):
        return math.sqrt(left * of_data**2 + 1 - left) / (math.sqrt(left) if in_sigmas else 1)

    x, x0 = torch.full((1, 1), size(lefts[0]), dtype=torch.float64), None
    for step, left in zip(steps, lefts, strict=False):
        output = perfect_epsilon(x * step.input_scale, math.sqrt(left), math.sqrt(1 - left), of_data)
        x, x0 = gk.cfg_step(x, output, step.coefficients, previous_x0=x0, return_x0=True)
    return x.item() / size(lefts[-1]) - 1


@pytest.mark.parametrize("kind", ["DDPM", "EulerAncestral"])
def test_a_sampler_with_noise_ends_at_the_data(kind):
    """The variance of Gaussian data, exactly: each step is linear, so the variance can be followed instead of drawn."""
    scheduler, of_data = getattr(diffusion, kind)(clip_sample=False, timestep_spacing="trailing"), 0.6
    steps = scheduler.steps(1000)
    variance = steps.initial_scale**2
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for step in steps:
        left = scheduler.alphas_cumprod[int(step.timestep)]
        output = perfect_epsilon(one * step.input_scale, math.sqrt(left), math.sqrt(1 - left), of_data)
        gain = gk.cfg_step(one, output, step.coefficients, noise=none).item()
        variance = gain**2 * variance + step.coefficients.noise**2
    assert abs(math.sqrt(variance) / of_data - 1) < 0.02


# ---- what else a schedule offers ----


def test_undo_goes_back_to_the_noise_of_the_step():
    for scheduler in (diffusion.DDPM(), diffusion.DDIM(), diffusion.DPMSolverPlusPlus2M()):
        for step in scheduler.steps(10):
            c = step.coefficients
            signal = step.undo.x * c.known
            left = scheduler.alphas_cumprod[int(step.timestep)]
            assert math.isclose(signal**2, left, rel_tol=1e-9)
            assert math.isclose((step.undo.x * c.known_noise) ** 2 + step.undo.noise**2, 1 - left, rel_tol=1e-9)
    for step, before in zip(diffusion.Euler().steps(10)[1:], diffusion.Euler().steps(10), strict=False):
        sigma = math.sqrt(1 / step.input_scale**2 - 1)
        assert math.isclose(before.coefficients.known_noise, sigma, rel_tol=1e-9)


def test_steps_may_start_later():
    scheduler = diffusion.DPMSolverPlusPlus2M()
    assert scheduler.steps(10)[4].coefficients.previous_x0 != 0
    later = scheduler.steps(10, start=4)
    assert len(later) == 6
    assert later[0].coefficients.previous_x0 == 0, "there is no x0 before"
    assert later[1] == scheduler.steps(10)[5]


def test_training_pairs():
    scheduler = diffusion.DDPM(beta_schedule="squaredcos_cap_v2")
    x0, noise = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 999])
    x, v = scheduler.add_noise(x0, noise, t), scheduler.velocity(x0, noise, t)
    for i, at in enumerate(t.tolist()):
        left = scheduler.alphas_cumprod[at]
        assert relative(math.sqrt(left) * x[i] - math.sqrt(1 - left) * v[i], x0[i]) < 1e-12


def test_what_a_scheduler_has_not():
    with pytest.raises(ValueError, match=r"genai_kernels.diffusion.DDIM: beta_schedule: expected one of linear"):
        diffusion.DDIM(beta_schedule="sigmoid")
    with pytest.raises(ValueError, match="variance_type: expected one of fixed_small, fixed_large, got 'learned'"):
        diffusion.DDPM(variance_type="learned")
    with pytest.raises(ValueError, match="num_steps: expected 1 to 1000, got 1001"):
        diffusion.Euler().steps(1001)
    with pytest.raises(ValueError, match="start: expected 0 to 9, got 10"):
        diffusion.Euler().steps(10, start=10)
    with pytest.raises(NotImplementedError, match="thresholding: expected False, got True"):
        diffusion.DDPM.from_config({"thresholding": True})
    with pytest.raises(NotImplementedError, match="algorithm_type: expected 'dpmsolver\\+\\+', got 'dpmsolver'"):
        diffusion.DPMSolverPlusPlus2M.from_config({"algorithm_type": "dpmsolver"})


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_of_diffusers_is_read(name):
    needs_diffusers()
    scheduler, options = theirs(name)
    assert type(ours(name)).from_config({**scheduler.config, **options}) == ours(name)
