"""Captions to digits: the captions, the VAE, a UNet and a transformer that look at the text, their eager twins."""

from __future__ import annotations

import copy

import pytest
import torch

import genai_kernels as gk
from python_models import latent_main, latent_train
from python_models.char_lm_train import Recipe, agreement
from python_models.diffusion_data import digits
from python_models.diffusion_masks import masked_mse
from python_models.diffusion_train import twin
from python_models.digit_judge import load_judge
from python_models.latent_diffusion import CHARACTERS, LATENT, LONGEST, VAE, InkOf, TextEncoder, caption, ink, tokens
from python_models.latent_train import MODELS, VAERun, latents, new_run, orders, paint


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return latent_main.load_vae()


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return latent_main.load_model(request.param)


# ---- captions ----


def test_captions():
    assert caption(3, "bold") == "a three, bold"
    assert caption(8) == "an eight"
    every = {caption(*order) for order in orders(30)}
    assert len(every) == 30
    assert max(map(len, every)) <= LONGEST
    found = tokens(["an eight", ""])
    assert "".join(CHARACTERS[i - 1] for i in found[0].tolist() if i) == "an eight"
    assert not found[1].any()
    with pytest.raises(ValueError, match="tokens: captions: expected at most 16 of the characters"):
        tokens(["a Three"])


def test_ink():
    """A third of the digits of each kind is light, a third bold."""
    data = digits()
    styles = InkOf.measured(data.train, data.labels).style(data.train, data.labels)
    for style in ("light", "bold"):
        assert styles.count(style) / len(styles) == pytest.approx(1 / 3, abs=0.02)
    light = ink(data.train)[[s == "light" for s in styles]]
    assert light.mean() < ink(data.train)[[s == "bold" for s in styles]].mean()


def test_padding_has_no_say():
    """What a caption is followed by changes no bit of its tokens."""
    encoder = TextEncoder()
    context, mask = encoder(tokens(["a two", ""]))
    assert mask.sum(1).tolist() == [5, 1]
    alone, _ = encoder(tokens(["a two"]))
    assert torch.equal(context[:1, :5], alone[:, :5])


# ---- the VAE ----


def test_vae_beside_eager():
    run = VAERun(Recipe(steps=5, batch=8, warmup=2), digits())
    x, noise, exact = run.pictures.train[:8], draw(8, *LATENT), copy.deepcopy(run.vae).double()
    loss = run.vae.loss(x, noise, 1e-3)
    with gk.use_backend("reference"):
        eager = run.vae.loss(x, noise, 1e-3)
        true = exact.loss(x.double(), noise.double(), 1e-3)
    assert agreement([loss.item()], [eager.item()], [true.item()]).ok
    losses = [run.step() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_committed_vae(vae):
    """Latents of about unit variance, half as many numbers as pixels; what comes back is the digit it was."""
    data, judge = digits(), load_judge()
    z = vae.encode(data.held_out)
    assert z.shape[1:] == LATENT
    assert float(z.std()) == pytest.approx(1, abs=0.1)
    again = vae.decode(z)
    everything = torch.zeros(1, 1, 8, 8)
    assert float(masked_mse(again, data.held_out, everything).mean()) < 0.1 * float(data.held_out.var())
    assert judge.accuracy(again, data.held_out_labels) > 0.93


# ---- what paints ----


@pytest.mark.parametrize("name", MODELS)
def test_losses_agree_with_the_twins(name, vae):
    run = new_run(name, Recipe(steps=10, batch=8, peak_rate=2e-3, warmup=4), latents(vae, digits()))
    eager, exact = twin(run), twin(run, exact=True)
    for _ in range(6):
        for one in (run, eager, exact):
            one.step()
    rule = agreement(run.losses, eager.losses, exact.losses)
    assert rule.ok, rule


def test_text_is_looked_at(model):
    """Another caption, another result; the keys of all steps are computed once, and have the bits of those alone."""
    x, t = draw(3, 2 * LATENT[0], *LATENT[1:]), torch.tensor([900, 500, 100])
    captions = tokens(["a two", "a nine, bold", ""])
    together = model(x, t, model.conditions(captions))
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], model.conditions(captions[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    other = model(x, t, model.conditions(captions.flip(0)))
    assert (together - other).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3


def test_trajectories_beside_the_twins(model):
    for drift in latent_train.text_drifts(model, 4).values():
        assert drift.ok, drift.line


def test_the_judge_sees_the_caption(model, vae):
    wanted, judge = list(orders(60)), load_judge()
    painted = paint(model, vae, [caption(*order) for order in wanted], 0, count=20)
    assert judge.accuracy(painted, torch.tensor([d for d, _ in wanted])) > 0.85
    much = {style: ink(painted)[[s == style for _, s in wanted]].mean() for style in ("light", "bold")}
    assert much["light"] < much["bold"]


def test_sizes():
    for name in MODELS:
        file = latent_train.checkpoint_of(name)
        assert file.stat().st_size < 1.5e6
    assert {name: build().parameter_count for name, build in MODELS.items()} == {"unet": 676_050, "dit": 656_754}


def test_paint_command(tmp_path, capsys):
    to = tmp_path / "three.png"
    assert latent_main.main(["paint", "a three, bold", "--to", str(to), "--count", "3"]) == 0
    assert to.stat().st_size > 1000
    assert "the judge sees 3" in capsys.readouterr().out
