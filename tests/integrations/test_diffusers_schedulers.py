"""genai_kernels.integrations.diffusers: the steps of schedulers, with diffusers' noise and diffusers' results."""

import copy
import inspect
import pickle

import pytest
import torch
from diffusers_models import BF16, F32, FACTORS, accelerated, diffusers

from genai_kernels.accuracy import UNIT_ROUNDOFF, compare

DDIM, DDPM = diffusers.DDIMScheduler, diffusers.DDPMScheduler
EULER, ANCESTRAL = diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler
MULTISTEP = diffusers.DPMSolverMultistepScheduler
CLIPPED = {"clip_sample": True, "clip_sample_range": 1.5}
CASES = [
    (DDIM, {"clip_sample": False}, {}),
    (DDIM, CLIPPED, {"eta": 0.7}),
    (DDIM, CLIPPED | {"prediction_type": "v_prediction"}, {"eta": 1.0}),
    (DDIM, CLIPPED | {"prediction_type": "sample"}, {"use_clipped_model_output": True}),
    (DDIM, {"prediction_type": "sample", "set_alpha_to_one": False, "beta_schedule": "scaled_linear"}, {}),
    (DDPM, {"clip_sample": False}, {}),
    (DDPM, CLIPPED | {"prediction_type": "v_prediction", "variance_type": "fixed_large"}, {}),
    (DDPM, CLIPPED | {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"}, {}),
    (DDPM, {"prediction_type": "sample"}, {}),
    (EULER, {}, {}),
    (EULER, {"prediction_type": "v_prediction", "use_karras_sigmas": True}, {}),
    (EULER, {"prediction_type": "sample", "timestep_spacing": "trailing"}, {}),
    (ANCESTRAL, {"timestep_spacing": "leading", "steps_offset": 1}, {}),
    (ANCESTRAL, {"prediction_type": "v_prediction"}, {}),
    (MULTISTEP, {}, {}),
    (MULTISTEP, {"solver_type": "heun", "prediction_type": "v_prediction", "use_karras_sigmas": True}, {}),
    (MULTISTEP, {"prediction_type": "sample", "final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}, {}),
    (MULTISTEP, {"solver_order": 1, "rescale_betas_zero_snr": True}, {}),
    (MULTISTEP, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}, {}),
]


STEPS = 40


def trajectory(scheduler, dtype, options):
    """What each step gives for the same samples and outputs of a model: results, predictions of x0, their sizes."""
    torch.manual_seed(0)
    scheduler.set_timesteps(STEPS)
    generator, found = torch.Generator().manual_seed(5), ([], [], [])
    for t in scheduler.timesteps:
        x, m = (torch.randn(2, 4, 16, 16).to(BF16).to(dtype) for _ in range(2))
        x = x * scheduler.init_noise_sigma
        scheduler.scale_model_input(x, t)
        found[2].append(terms_of_x0(scheduler, t, x.double().abs(), m.double().abs()))
        given = options | (
            {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        )
        done = scheduler.step(m, t, x, **given)
        found[0].append(done.prev_sample)
        found[1].append(
            scheduler.model_outputs[-1] if hasattr(scheduler, "model_outputs") else done.pred_original_sample
        )
    return found


def terms_of_x0(scheduler, t, x, m):
    """The size of what x0 is a difference of."""
    kind = scheduler.config.prediction_type
    if hasattr(scheduler, "model_outputs"):
        signal, deviation = levels(scheduler)[0]
        first, second = {
            "epsilon": (1 / signal, deviation / signal),
            "v_prediction": (signal, deviation),
            "flow_prediction": (1, deviation),
        }.get(kind, (0, 1))
    elif hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas[scheduler.step_index].double()
        first, second = {
            "epsilon": (1, sigma),
            "v_prediction": (1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt()),
        }.get(kind, (0, 1))
    else:
        left = scheduler.alphas_cumprod[t].double()
        signal, deviation = left.sqrt(), (1 - left).sqrt()
        first, second = {"epsilon": (1 / signal, deviation / signal), "v_prediction": (signal, deviation)}.get(
            kind, (0, 1)
        )
    return first * x + second * m


def levels(scheduler, first=0):
    """Signal and deviation of this step and the next, in float64 from the scheduler's own sigmas; from `first` on."""
    at = scheduler.step_index or 0
    sigmas = scheduler.sigmas[at + first : at + 2].double()
    if scheduler.config.use_flow_sigmas:
        return [(1 - s, s) for s in sigmas]
    return [(1 / (s * s + 1).sqrt(), s / (s * s + 1).sqrt()) for s in sigmas]


def relative_error(found, exact):
    """RMS over the steps, each in units of its result."""
    each = [(a.double() - r).square().mean() / r.square().mean() for a, r in zip(found, exact, strict=True)]
    return torch.stack(each).mean().sqrt()


@pytest.mark.parametrize(("kind", "config", "options"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_steps(kind, config, options, dtype):
    theirs = kind(**config)
    ours = copy.deepcopy(theirs)
    with accelerated.accelerate(ours) as report:
        found = trajectory(ours, dtype, options)
    expected = trajectory(theirs, dtype, options)
    assert report.served.total() == STEPS
    assert not report.passed_on
    exact = copy.deepcopy(theirs)
    if kind in (DDIM, DDPM):  # the same tables, the arithmetic in float64; Euler's is float32 in any case
        exact.alphas_cumprod = exact.alphas_cumprod.double()
        if kind is DDIM:
            exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
        if kind is DDPM:
            exact.one = exact.one.double()
    exact = trajectory_exact(exact, dtype, options, kind)
    # a coefficient is rounded once for a whole step: one step is one draw. Powers of two round nothing
    sizes = [2.0 ** y.abs().max().log2().round() for y in exact[0]]
    ways = [torch.cat([(y / s).flatten() for y, s in zip(w[0], sizes, strict=True)]) for w in (found, expected, exact)]
    verdict = compare("x", *ways, **FACTORS, draws=STEPS)
    assert verdict.ok, verdict.complaint
    if dtype == F32 and torch.ops.genai_kernels.isa() != "baseline":  # without fused operations it is about the same
        for what in (0, 1):  # both results: no further from float64 than diffusers', over all steps
            errors = [relative_error(way[what], exact[what]) for way in (found, expected)]
            assert errors[0] <= errors[1], ("next", "x0")[what]
    # x0 may be a small difference of large terms: to these its error is held
    c, u = (2, UNIT_ROUNDOFF[BF16]) if dtype == BF16 else (8, UNIT_ROUNDOFF[F32])
    for a, b, ref, size in zip(found[1], expected[1], exact[1], exact[2], strict=True):
        assert a.dtype == b.dtype
        assert ((a - ref).abs() <= c * u * size).all()


def trajectory_exact(scheduler, dtype, options, kind):
    """The same in float64 from the same rounded numbers, noise included: by diffusers where it lets float64 through."""
    drawn = diffusers.utils.torch_utils.randn_tensor

    def rounded(shape, generator=None, device=None, dtype=None, layout=None):
        return drawn(shape, generator=generator, device=device, dtype=DTYPE[0]).double()

    DTYPE[0] = dtype
    module = inspect.getmodule(kind)
    module.randn_tensor = rounded
    try:
        if kind in (DDIM, DDPM):
            return trajectory(_Double(scheduler, dtype), dtype, options)
        if kind is MULTISTEP:
            return trajectory(_Multistep(scheduler, dtype), dtype, options)
        return trajectory(_Euler(scheduler, kind), dtype, options)
    finally:
        module.randn_tensor = drawn


DTYPE = [F32]


class _Double:
    """A scheduler whose step is made in float64."""

    def __init__(self, scheduler, dtype):
        self.scheduler = scheduler

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def step(self, m, t, x, generator=None, **options):
        return self.scheduler.step(m.double(), t, x.double(), generator=generator, **options)


class _Euler(_Double):
    """Euler's step as its paper has it."""

    def step(self, m, t, x, generator=None):
        s = self.scheduler
        if s.step_index is None:
            s._init_step_index(t)
        m, x = m.double(), x.double()
        sigma, after = (v.double() for v in s.sigmas[s.step_index : s.step_index + 2])
        x0 = {
            "epsilon": x - sigma * m,
            "v_prediction": x / (sigma**2 + 1) - m * sigma / (sigma**2 + 1).sqrt(),
            "sample": m,
        }[s.config.prediction_type]
        up = torch.zeros((), dtype=torch.float64)
        if isinstance(s, ANCESTRAL):
            up = (after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
        prev = x + (x - x0) / sigma * ((after**2 - up**2).sqrt() - sigma)
        if isinstance(s, ANCESTRAL):
            prev = prev + up * inspect.getmodule(ANCESTRAL).randn_tensor(m.shape, generator=generator)
        s._step_index += 1
        return type("Output", (), {"prev_sample": prev, "pred_original_sample": x0})


class _Multistep(_Double):
    """DPM-Solver++ as its paper has it: an exponential integrator in the log signal-to-noise ratio."""

    def step(self, m, t, x, generator=None):
        s, m, x = self.scheduler, m.double(), x.double()
        if s.step_index is None:
            s._init_step_index(t)
        (signal, deviation), (next_signal, next_deviation) = levels(s)
        x0 = {
            "epsilon": (x - deviation * m) / signal,
            "v_prediction": signal * x - deviation * m,
            "flow_prediction": x - deviation * m,
            "sample": m,
        }[s.config.prediction_type]
        lambdas = [(a / d).log() for a, d in levels(s, -1 if s.step_index else 0)]
        h = lambdas[-1] - lambdas[-2]
        decayed = (-h).exp()
        y = next_deviation / deviation * x + next_signal * (1 - decayed) * x0
        last = s.step_index == STEPS - 1 and s.config.final_sigmas_type == "zero"
        if s.step_index > 0 and s.config.solver_order == 2 and not last:
            slope = (x0 - s.model_outputs[-1]) / (lambdas[-2] - lambdas[-3])
            weight = 0.5 * h * (1 - decayed) if s.config.solver_type == "midpoint" else decayed - 1 + h
            y = y + next_signal * weight * slope
        s.model_outputs = [*s.model_outputs[1:], x0]
        s._step_index += 1
        return type("Output", (), {"prev_sample": y})


@pytest.mark.parametrize("kind", [DDIM, DDPM, EULER, ANCESTRAL, MULTISTEP])
def test_restored_copied_and_pickled(kind):
    scheduler = kind()
    before, config = (type(scheduler), vars(scheduler).copy()), scheduler.config
    names = list(inspect.signature(scheduler.step).parameters)
    report = accelerated.accelerate(scheduler)
    assert isinstance(scheduler, kind)
    assert type(scheduler).__name__ == kind.__name__
    assert list(inspect.signature(scheduler.step).parameters) == names  # which pipelines read
    assert kind.from_config(scheduler.config).config == config
    twin = copy.deepcopy(scheduler)
    read = pickle.loads(pickle.dumps(scheduler))
    assert type(read) is kind
    trajectory(twin, F32, {})
    assert report.served.total() == STEPS
    assert report.modules == {"": "scheduler"}
    accelerated.restore(scheduler)
    assert (type(scheduler), vars(scheduler)) == before
    expected = trajectory(copy.deepcopy(scheduler), F32, {})
    for found in (trajectory(read, F32, {}), trajectory(scheduler, F32, {})):
        assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


def test_a_multistep_trajectory_can_change_hands():
    """What each step keeps and counts is what diffusers' own goes on with, and the reverse."""
    scheduler, results = MULTISTEP(), []
    draws = [torch.randn(2, 1, 4, 6, 6).unbind() for _ in range(20)]
    for ours in ((), range(20), range(7, 13), [*range(7), *range(13, 20)]):
        scheduler.set_timesteps(20)
        results.append([])
        for i, t in enumerate(scheduler.timesteps):
            if i in ours:
                accelerated.accelerate(scheduler)
            results[-1].append(scheduler.step(draws[i][0], t, draws[i][1], return_dict=False)[0])
            accelerated.restore(scheduler)
    for other in results[1:]:
        for y, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(y, expected)


def test_what_is_left():
    x = torch.randn(1, 4, 4, 4)
    for kind, config, why in ((DDIM, {"thresholding": True}, "thresholding"),
                              (DDPM, {"variance_type": "learned_range"}, "variance_type learned_range")):  # fmt: skip
        scheduler = kind(**config)
        with accelerated.accelerate(scheduler) as report:
            scheduler.set_timesteps(4)
            scheduler.step(torch.cat([x, x], 1) if kind is DDPM else x, 500, x)
        assert report.passed_on.total() == 1
        assert report.modules == {"": "not taken over: call accelerate again"}
        with accelerated.accelerate(scheduler) as report:
            assert report.modules == {"": why}
    scheduler = DDIM()
    with accelerated.accelerate(scheduler) as report:
        with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
            scheduler.step(x, 500, x)
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
            scheduler.step(x, 500, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
        y = scheduler.step(x.clone().requires_grad_(), 500, x).prev_sample
        assert y.requires_grad
        assert isinstance(scheduler.step(x, 500, x, return_dict=False), tuple)
    assert report.passed_on == {
        "set_timesteps has not been called": 1, "both generator and variance_noise": 1,
        "a gradient of the sampler's step": 1,
    }  # fmt: skip
    scheduler = EULER()
    scheduler.set_timesteps(4)
    with accelerated.accelerate(scheduler) as report:
        with pytest.raises(ValueError, match="Passing integer indices"):
            scheduler.step(x, 3, x)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        scheduler.step(x, scheduler.timesteps[0], x, s_churn=1.0)
    assert set(report.passed_on) == {"an integer for a timestep", "s_churn"}
    for config, why in (({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type sde-dpmsolver++"),
                        ({"solver_order": 3}, "solver_order 3"), ({"thresholding": True}, "thresholding")):  # fmt: skip
        scheduler = MULTISTEP(**config)
        with accelerated.accelerate(scheduler) as report:
            assert report.modules == {"": why}
            scheduler.set_timesteps(4)
            scheduler.step(x, scheduler.timesteps[0], x)
        assert report.passed_on == {why: 1}
    other = diffusers.PNDMScheduler()
    with pytest.raises(ValueError, match="got PNDMScheduler without any"):
        accelerated.accelerate(other)
