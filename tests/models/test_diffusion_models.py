"""Diffusion models: schedules and steps against closed forms, training and sampling beside the eager twins."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import genai_kernels as gk
from genai_kernels.diffusion import Step
from python_models.char_lm_train import Recipe, agreement
from python_models.diffusion import Sampler, Schedule, loss, told
from python_models.diffusion_data import Batches, Pictures, digits
from python_models.diffusion_masks import random_masks, smooth_fill, task_mask
from python_models.diffusion_tasks import start_of
from python_models.diffusion_train import CONFIGS, Run, checkpoint_of, load_model, new_model, save_model, twin
from python_models.diffusion_twins import Drift, psnr, twin_drifts
from python_models.unet import Attention, Config, UNet

TINY = Config(2, 1, widths=(16, 32), groups=4, head_dim=16, classes=10)
RECIPE = Recipe(steps=12, batch=8, peak_rate=2e-3, warmup=4)


@pytest.fixture(scope="module")
def data() -> Pictures:
    return digits()


def lively(config: Config = TINY, seed: int = 0) -> UNet:
    """A model whose every layer has a say: those that begin at zero are drawn too."""
    model = new_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel()))
    return model


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- schedules and steps ----


def left_of(schedule: Schedule) -> torch.Tensor:
    return torch.tensor(schedule.training.alphas_cumprod, dtype=torch.float64)


def without_noise(x: torch.Tensor, found: torch.Tensor, step: Step) -> torch.Tensor:
    """One step back, but for the noise that is added."""
    return gk.cfg_step(x, found, step.coefficients._replace(noise=0.0))


def test_cosine_schedule():
    """What is left is a squared cosine of the time."""
    left = left_of(Schedule("cosine", 1000))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    exact = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(left[:-1], exact[:-1], rtol=1e-9, atol=0)
    assert 0 < left[-1] < 1e-5  # the last rate is held below 1


def test_linear_schedule():
    """The rates of Ho et al.: 1e-4 to 0.02 in 1000 steps, 4e-5 of the picture's variance left."""
    left = left_of(Schedule("linear", 1000))
    rates = 1 - left / torch.cat([torch.ones(1, dtype=torch.float64), left[:-1]])
    torch.testing.assert_close(rates, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert float(left[-1]) == pytest.approx(4.036e-5, rel=1e-3)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="Schedule: name: expected one of cosine, linear, got 'square'"):
        Schedule("square")
    with pytest.raises(ValueError, match="Schedule: target: expected one of noise, v, got 'x0'"):
        Schedule(target="x0")


@pytest.mark.parametrize("target", ["noise", "v"])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_one_picture_is_found_exactly(name, target):
    """Where all data is one picture, the noise is known exactly: DDIM finds the picture in any number of steps."""
    x0, schedule = draw(1, 1, 4, 4).clamp(-1, 1).double(), Schedule(name, target=target)
    left = left_of(schedule)
    for count in (1, 4, 50):
        x = draw(1, 1, 4, 4, seed=1).double()
        for step in schedule.sampler().steps(count):
            a = float(left[int(step.timestep)])
            noise = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
            found = noise if target == "noise" else math.sqrt(a) * noise - math.sqrt(1 - a) * x0
            x = without_noise(x, found, step)
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_gaussian_keeps_its_variance(eta):
    """The exact v of data N(0, s^2) is linear in x, so that the variance after each step has a closed form."""
    variance, s2, schedule = 1.0, 0.25, Schedule()
    left, one = left_of(schedule), torch.ones(1, dtype=torch.float64)
    for step in schedule.sampler(eta, math.inf).steps(500):
        a = float(left[int(step.timestep)])
        share = math.sqrt(a * (1 - a)) * (1 - s2) / (a * s2 + 1 - a)  # E[v | x] = share x
        variance = float(without_noise(one, share * one, step)) ** 2 * variance + step.coefficients.noise**2
    assert variance == pytest.approx(s2, rel=0.02)


@pytest.mark.parametrize("target", ["noise", "v"])
def test_loss_of_one_who_knows(target):
    """A model that finds the target has no loss; one that finds nothing, the target's mean square where unknown."""
    x0, noise, t = draw(2, 1, 4, 4).clamp(-1, 1), draw(2, 1, 4, 4, seed=1), torch.tensor([100, 800])
    known, schedule = task_mask("half", (1, 4, 4)).expand(2, 1, 4, 4), Schedule(target=target)
    a = left_of(schedule)[t].float().view(2, 1, 1, 1)
    wanted = noise if target == "noise" else a.sqrt() * noise - (1 - a).sqrt() * x0
    given = []
    assert float(loss(lambda x, t, label: given.append(x) or wanted, schedule, x0, noise, t, known)) < 1e-12
    torch.testing.assert_close(given[0][:, :1, 2:], (a.sqrt() * x0 + (1 - a).sqrt() * noise)[:, :, 2:])
    assert torch.equal(given[0][:, :1, :2], x0[:, :, :2])
    nothing = float(loss(lambda x, t, label: torch.zeros_like(x0), schedule, x0, noise, t, known))
    assert nothing == pytest.approx(float(wanted[:, :, 2:].square().mean()), rel=1e-5)


def test_relative_pictures_have_no_level():
    """What a model paints comes on top of a smooth continuation, which it sees: a model that finds no noise and no
    picture, v = 0, paints just that."""
    x0, known = 0.2 * draw(2, 1, 8, 8) + 0.5, task_mask("hole", (1, 8, 8))[None].expand(2, 1, 8, 8)
    smooth, seen = smooth_fill(x0, known), []

    class Nothing(torch.nn.Linear):
        def conditions(self, label, guided):
            return None

        def forward(self, x, t, condition):
            seen.append(x)
            return torch.zeros_like(x0)

    sampler = Sampler(Schedule(relative=True), 1, largest=2.0)
    painted = sampler.paint(Nothing(1, 1), *start_of(2, (1, 8, 8), 0), x0=x0, known=known)
    torch.testing.assert_close(painted, smooth, rtol=0, atol=1e-3)
    assert torch.equal(seen[0][:, 2:], smooth)
    assert not seen[0][:, :1][known > 0].any()


# ---- the model ----


def test_parameter_counts():
    """By hand: 9 a b + b for a convolution, a b + b for a linear layer, 2 a for a norm."""
    with torch.device("meta"):
        counts = {name: UNet(config).parameter_count for name, config in CONFIGS.items()}
        model = UNet(TINY)
    assert counts == {"digits": 652_737, "photographs": 674_019}

    def conv(a, b, size=3):
        return size * size * a * b + b

    def block(a, b, time=64):
        return 2 * a + conv(a, b) + time * b + b + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    attention = 2 * 32 + 32 * 96 + 96 + 32 * 32 + 32
    time = 16 * 64 + 64 + 64 * 64 + 64 + 11 * 64
    down = block(16, 16) + conv(16, 16) + block(16, 32)
    middle = block(32, 32) + attention + block(32, 32)
    up = block(64, 32) + block(48, 32) + conv(32, 32) + block(48, 16) + block(32, 16)
    assert model.parameter_count == time + conv(2, 16) + down + middle + up + 2 * 16 + conv(16, 1)


def test_attention_at_a_level():
    config = Config(2, 1, widths=(16, 32), groups=4, head_dim=16, attention=(1,))
    model = lively(config)
    assert sum(isinstance(layer, Attention) for layer in model.modules()) == 4
    assert model(draw(2, 2, 8, 8), torch.tensor([3, 500])).shape == (2, 1, 8, 8)


def test_gradients_beside_eager():
    """Every weight's gradient, ours and eager's, from float64."""
    model, known = lively(), random_masks(4, (1, 8, 8), torch.Generator().manual_seed(0))
    x0, noise, t, label = draw(4, 1, 8, 8).clamp(-1, 1), draw(4, 1, 8, 8, seed=1), torch.tensor([0, 9, 500, 999]), None

    def gradients(dtype, backend):
        twin = copy.deepcopy(model).to(dtype)
        with gk.use_backend(backend):
            loss(twin, Schedule(), x0.to(dtype), noise.to(dtype), t, known.to(dtype), label).backward()
        return {name: p.grad for name, p in twin.named_parameters()}

    ours, eager, exact = (gradients(*a) for a in ((torch.float32, "auto"), (torch.float32, "reference"),
                                                  (torch.float64, "reference")))  # fmt: skip
    assert all(g is not None and g.any() for name, g in exact.items())
    rms = lambda x: float(x.double().square().mean().sqrt())  # noqa: E731
    error = {name: rms(ours[name] - g) / rms(g) for name, g in exact.items()}
    eager_error = {name: rms(eager[name] - g) / rms(g) for name, g in exact.items()}
    assert max(error.values()) <= 1.5 * max(eager_error.values())
    assert sum(error.values()) <= 1.5 * sum(eager_error.values())


def test_what_is_not_told_has_no_say(data):
    """Below the mask, the input is x alone; the class "not told" is that of no label."""
    model, x0, known = lively(), data.held_out[:4], task_mask("hole", (1, 8, 8))
    x, t = draw(4, 1, 8, 8), torch.full((4,), 100)
    other = torch.where(known > 0, x0, 7.0)
    assert torch.equal(told(x, x0, known), told(x, other, known))
    assert torch.equal(model(told(x, x0, known), t), model(told(x, x0, known), t, torch.full((4,), 10)))
    assert not torch.equal(model(told(x, x0, known), t), model(told(x, x0, known), t, torch.zeros(4).long()))


# ---- training ----


def test_losses_agree_with_the_twins(data):
    run = Run(new_model(TINY, 0), Schedule(), RECIPE, data)
    eager, exact = twin(run), twin(run, exact=True)
    for _ in range(RECIPE.steps):
        for one in (run, eager, exact):
            one.step()
    rule = agreement(run.losses, eager.losses, exact.losses)
    assert rule.ok, rule
    assert not agreement([x * (1 + 1e-4) for x in run.losses], eager.losses, exact.losses).ok
    assert not any(torch.equal(p, q) for p, q in zip(run.named.values(), twin(run).named.values(), strict=True)
                   if p is q)  # fmt: skip


def test_resumed_to_the_same_bits(data, tmp_path):
    whole = Run(new_model(TINY, 0), Schedule(), RECIPE, data)
    for i in range(8):
        if i == 5:
            whole.save(tmp_path / "run.safetensors")
        whole.step()
    again = Run(new_model(TINY, 9), Schedule(), RECIPE, data)  # its weights come from the file
    again.resume(tmp_path / "run.safetensors")
    assert again.losses == whole.losses[:5]
    for _ in range(3):
        again.step()
    assert again.losses == whole.losses
    for one, other in ((whole.model, again.model), (whole.averaged(), again.averaged())):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


def test_resumes_no_other_run(data, tmp_path):
    run = Run(new_model(TINY, 0), Schedule(), RECIPE, data)
    run.save(tmp_path / "run.safetensors")
    other = Run(new_model(TINY, 0), Schedule("linear"), RECIPE, data)
    with pytest.raises(ValueError, match="schedule"):
        other.resume(tmp_path / "run.safetensors")


def test_averages(data):
    """The running average of the weights after each step, from the definition."""
    run = Run(new_model(TINY, 0), Schedule(), RECIPE, data, ema_decay=0.9)
    name = "conv_in.weight"
    average = run.named[name].detach().double().clone()
    for _ in range(4):
        run.step()
        average = 0.9 * average + 0.1 * run.named[name].detach().double()
    found = run.averaged()
    torch.testing.assert_close(found.conv_in.weight.double(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found.conv_in.weight, run.model.conv_in.weight)


def test_models_are_kept(tmp_path):
    model = lively()
    save_model(tmp_path / "some" / "model.safetensors", model, Schedule("linear", 300))
    found, schedule = load_model(tmp_path / "some" / "model.safetensors")
    assert schedule == Schedule("linear", 300)
    assert found.config == TINY
    for name, p in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], p.half().float()), name


def test_batches_come_from_the_training_pictures(data):
    pictures, labels = next(Batches(data, 16, 3))
    for picture, label in zip(pictures, labels, strict=True):
        assert any(torch.equal(picture, p) for p in data.train[data.labels == label])


# ---- sampling ----


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_trajectory_beside_the_twins(eta):
    """Fifty steps from the same noise, each of them compared, in float32 and bfloat16."""
    model, schedule = load_model(checkpoint_of("digits"))
    sampler, label = Sampler(schedule, 50, eta), torch.arange(8)
    drifts = twin_drifts(model, sampler, *start_of(8, (1, 8, 8), 0), label=label)
    for drift in drifts.values():
        assert len(drift.apart) == 50
        assert drift.ok, drift.line


def test_a_trajectory_can_disagree():
    near = {"apart": [1e-6], "ours": [1e-7], "eager": [1e-7], "nearness": (1e-7, 1e-7),
            "psnr": 90.0, "eager_psnr": 90.0}  # fmt: skip
    assert Drift("float32", **near).ok
    assert not Drift("float32", **near | {"apart": [2e-4]}).ok
    assert not Drift("float32", **near | {"psnr": 59.0}).ok
    assert Drift("bfloat16", **near | {"ours": [2e-7]}).ok  # one picture that took another way
    assert not Drift("bfloat16", **near | {"nearness": (2e-7, 1e-7)}).ok
    assert psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2).double(), 1.0) == pytest.approx(20.0)


@pytest.mark.parametrize("telling", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_is_known_stays(data, telling, eta):
    model, x0 = lively(), data.held_out[:3]
    known = random_masks(3, (1, 8, 8), torch.Generator().manual_seed(2))
    known[0] = task_mask("half", (1, 8, 8))
    sampler = Sampler(Schedule(), 4, eta, telling=telling)
    painted = sampler.paint(model, *start_of(3, (1, 8, 8), 0), x0=x0, known=known)
    assert torch.equal(torch.where(known > 0, painted, x0), x0)
    assert not torch.equal(painted[0], x0[0])
    assert painted.abs().max() <= 1


def test_no_guidance_is_the_model(data):
    """Guidance 1 with both calls is the model with the class alone; guidance 0 the one without."""
    model, label, noise = lively(), torch.tensor([1, 2]), start_of(2, (1, 8, 8), 0)
    paint = lambda guidance, label: Sampler(Schedule(), 3, guidance=guidance).paint(model, *noise, label=label)  # noqa: E731
    torch.testing.assert_close(paint(1 + 1e-6, label), paint(1.0, label), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(paint(0.0, label), paint(1.0, None), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(paint(2.0, label), paint(1.0, label), atol=1e-2)


def test_a_picture_has_the_bits_that_it_has_alone(data):
    """Whatever else is painted with it: its noise is counted from its own seed, and no op looks at the others."""
    model, label = lively(), torch.tensor([4, 7, 1])
    start, seeds = start_of(3, (1, 8, 8), 5)
    known = task_mask("half", (1, 8, 8))[None]
    sampler = Sampler(Schedule(), 5, eta=1.0, guidance=2.0)
    together = sampler.paint(model, start, seeds, x0=data.held_out[:3], known=known, label=label)
    for i in range(3):
        one = slice(i, i + 1)
        alone = sampler.paint(model, start[one], seeds[one], x0=data.held_out[one], known=known, label=label[one])
        assert torch.equal(alone, together[one])
