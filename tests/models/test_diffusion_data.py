"""What diffusion models learn from and are measured with: pictures, masks, painting without a model, the judge."""

from __future__ import annotations

import json
import math

import pytest
import torch

from python_models import diffusion_data, diffusion_demo, diffusion_main, diffusion_report, digit_judge
from python_models.diffusion import Sampler
from python_models.diffusion_data import CROP, Batches, digits, from_rgb, photographs, tiles, to_rgb, untiled
from python_models.diffusion_masks import (
    TASKS,
    biharmonic_fill,
    masked_mse,
    mean_fill,
    random_masks,
    smooth_fill,
    task_mask,
)
from python_models.diffusion_tasks import gaussian_digits, measure_task, spread, start_of
from python_models.diffusion_train import CONFIGS, checkpoint_of, held_out_loss, load_model
from python_models.diffusion_twins import twin_drifts
from python_models.digit_judge import fd_digits, frechet_distance, load_judge, nearest, train_judge


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- pictures ----


def test_digits_are_parted():
    data = digits()
    assert (len(data.train), len(data.held_out), data.shape) == (1438, 359, (1, 8, 8))
    assert data.train.min() == -1
    assert data.train.max() == 1
    assert len(data.labels) == 1438
    assert nearest(data.held_out, data.train).min() > 0.5  # no digit is in both


def test_photographs_are_parted():
    """What is held out lies to the right of all that crops are cut from."""
    data = photographs()
    assert data.shape == (3, CROP, CROP)
    for name, train in zip(diffusion_data.PHOTOGRAPHS, data.train, strict=True):
        whole, part = diffusion_data.photograph(name), diffusion_data.held_out_part(name)
        assert torch.equal(torch.cat([train, part], 2), whole)
    parts = [diffusion_data.held_out_part(name) for name in diffusion_data.PHOTOGRAPHS]
    assert torch.equal(torch.cat([tiles(p) for p in parts]), data.held_out)
    assert data.held_out.abs().max() <= data.largest + 1e-6
    crops, labels = next(Batches(data, 5, 0))
    assert labels is None
    for crop in crops:  # as it is, or its mirror image: its first pixel is one of a photograph's
        corners = crop[:, 0, 0], crop[:, 0, -1]
        assert any((t == corner[:, None, None]).all(0).any() for t in data.train for corner in corners)


def test_colours_are_rotated():
    """An orthonormal change of axes: lengths, and so mean squared errors, stay; grey has brightness alone."""
    rgb = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    picture = from_rgb(rgb)
    torch.testing.assert_close(picture.norm(dim=1), (2 * rgb - 1).norm(dim=1))
    torch.testing.assert_close(to_rgb(picture), rgb)
    grey = from_rgb(rgb[:, :1].expand_as(rgb))
    torch.testing.assert_close(grey[:, 1:], torch.zeros(2, 2, 4, 5), atol=1e-6, rtol=0)


def test_tiles():
    picture = draw(3, 2 * CROP, 3 * CROP)
    assert torch.equal(tiles(picture)[4], picture[:, CROP:, CROP : 2 * CROP])
    assert torch.equal(untiled(tiles(picture), 3), picture)


# ---- masks ----


def test_masks_of_tasks():
    shares = {task: float(task_mask(task, (3, 8, 8)).mean()) for task in TASKS}
    assert shares == pytest.approx({"hole": 0.75, "half": 0.5, "uncrop": 0.25, "colour": 1 / 3})
    with pytest.raises(ValueError, match="task_mask: task: expected one of"):
        task_mask("colour", (1, 8, 8))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_random_masks(shape):
    known = random_masks(600, shape, torch.Generator().manual_seed(0))
    assert set(known.unique().tolist()) == {0.0, 1.0}
    share = known.flatten(1).mean(1)
    assert float((share == 0).double().mean()) == pytest.approx(0.3, abs=0.06)
    assert (share == 1).double().mean() < 0.01  # there is hardly ever nothing to learn
    assert torch.equal(known, random_masks(600, shape, torch.Generator().manual_seed(0)))


def test_fills_without_a_model():
    truth = draw(2, 1, 8, 8)
    known = task_mask("hole", (1, 8, 8))[None]
    filled = mean_fill(truth, known, torch.zeros(1))
    outside = truth[0][known[0] > 0]
    torch.testing.assert_close(filled[0, 0, 3, 3], outside.mean())
    unknown = truth[0, 0, 2:6, 2:6]
    torch.testing.assert_close(masked_mse(filled, truth, known)[0], ((unknown - outside.mean()) ** 2).mean())
    assert mean_fill(truth, torch.zeros(1, 1, 8, 8), torch.tensor([7.0])).unique().tolist() == [7.0]
    plane = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    torch.testing.assert_close(biharmonic_fill(plane, known, torch.zeros(1)), plane, atol=1e-5, rtol=0)


def test_smooth_fill():
    """Known pixels stay; between them lies a membrane, each pixel the mean of its neighbours."""
    truth = draw(2, 3, 16, 16)
    known = task_mask("hole", (3, 16, 16))[None].expand_as(truth).clone()
    known[0, 2] = 0  # nothing of this channel
    filled = smooth_fill(truth, known, 400)
    assert torch.equal(filled[known > 0], truth[known > 0])
    assert not filled[0, 2].any()
    around = (filled[1, 0, 5, 6] + filled[1, 0, 7, 6] + filled[1, 0, 6, 5] + filled[1, 0, 6, 7]) / 4
    torch.testing.assert_close(filled[1, 0, 6, 6], around, rtol=0, atol=1e-4)
    level = torch.full((1, 3, 16, 16), 0.7)
    torch.testing.assert_close(smooth_fill(level, task_mask("uncrop", (3, 16, 16))[None]), level)


# ---- the judge ----


def test_frechet_distance():
    """A shift adds its square; a stretch by s, (1 - s)^2 times the trace of the covariance."""
    x = draw(400, 5).double()
    shift = torch.tensor([1.0, 0, 0, 2.0, 0])
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(5.0, rel=1e-6)
    centred = x - x.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(torch.cov(x.T).trace()), rel=1e-6)
    many = draw(100_000, 2, seed=1) * torch.tensor([1.0, 2.0])
    assert frechet_distance(many, draw(100_000, 2, seed=2)) == pytest.approx(1.0, abs=0.05)


def test_judge():
    """The committed one knows held-out digits as its file says; one trained here for seconds is nearly as good."""
    data, judge = digits(), load_judge()
    accuracy = judge.accuracy(data.held_out, data.held_out_labels)
    about = json.loads((digit_judge.CHECKPOINT.parent / "training.json").read_text())
    assert accuracy == pytest.approx(about["accuracy"]["held_out"], abs=0.003)
    assert accuracy > 0.95
    assert train_judge(data, epochs=6).accuracy(data.held_out, data.held_out_labels) > 0.85
    noise = draw(359, 1, 8, 8).clamp(-1, 1)
    assert fd_digits(judge, data.held_out, data.train) < 2 < 10 < fd_digits(judge, noise, data.train)


# ---- the committed models ----


@pytest.mark.parametrize("name", CONFIGS)
def test_committed_models(name):
    """What their file says of the held-out pictures, and the sizes of today's recipe."""
    model, schedule = load_model(checkpoint_of(name))
    assert model.config == CONFIGS[name]
    assert checkpoint_of(name).stat().st_size < 1.5e6
    about = json.loads((checkpoint_of(name).parent / "training.json").read_text())
    data = diffusion_data.SETS[name]()
    found = held_out_loss(model, schedule, data)
    assert found == pytest.approx(about["held_out_loss"]["averaged"], rel=0.01)


def test_photographs_beside_the_twins():
    model, schedule = load_model(checkpoint_of("photographs"))
    sampler = Sampler(schedule, 50, largest=math.sqrt(3))
    for drift in twin_drifts(model, sampler, *start_of(2, (3, CROP, CROP), 0)).values():
        assert drift.ok, drift.line


def test_digits_to_order_and_a_half():
    model, schedule = load_model(checkpoint_of("digits"))
    data, judge, label = digits(), load_judge(), torch.arange(40) % 10
    painted = Sampler(schedule, 10, guidance=2.0).paint(model, *start_of(40, (1, 8, 8), 0), label=label)
    assert judge.accuracy(painted, label) >= 0.9
    assert judge.accuracy(gaussian_digits(data.train, 40, 0), label) < 0.4
    found = measure_task(model, schedule, data, "half", every=9, seeds=2, count=10, judge=judge)
    assert found["told"]["masked_mse"]["mean"] < found["mean fill"]["masked_mse"]
    assert found["mean of samples"]["masked_mse"] < found["told"]["masked_mse"]["mean"]
    assert found["told"]["judge_accuracy"]["mean"] > found["mean fill"]["judge_accuracy"]


def test_spread():
    assert spread([1.0, 3.0, 2.0]) == {"mean": 2.0, "half_range": 1.0}


# ---- pictures of pictures, and the commands ----


def test_grid():
    sheet = diffusion_report.grid(torch.zeros(5, 3, 4, 4), 3)
    assert sheet.shape == (3, 9, 14)
    assert sheet[0, 4].unique().tolist() == [1.0]  # white between them
    assert diffusion_report.visible(torch.ones(1, 1, 2, 2)).unique().tolist() == [0.0]  # ink is black


def test_commands(tmp_path, capsys):
    options = ["train", "digits", "--steps", "3", "--out", str(tmp_path / "model"), "--checkpoint"]
    assert diffusion_main.main([*options, str(tmp_path / "run.safetensors"), "--every", "2"]) == 0
    assert diffusion_main.main([*options, str(tmp_path / "run.safetensors")]) == 0
    assert "taken up at step 3" in capsys.readouterr().out
    about = json.loads((tmp_path / "model" / "training.json").read_text())
    assert about["steps"] == 3
    to = tmp_path / "some.png"
    command = ["sample", "digits", "--model", str(tmp_path / "model"), "--to", str(to), "--count", "4", "--steps", "2"]
    assert diffusion_main.main(command) == 0
    assert to.stat().st_size > 1000


def test_recorded_tables():
    """Every table that the demonstration prints of the committed figures; the twins in these have agreed."""
    tables = diffusion_demo.recorded()
    assert len(tables) == 4
    for _, (columns, rows) in tables:
        assert rows
        assert all(len(row) == len(columns) for row in rows)
    for path in diffusion_demo.RESULTS.glob("*.json"):
        twins = json.loads(path.read_text()).get("twins", {})
        assert all(drift["ok"] for both in twins.values() for drift in both.values())
