"""A classifier of the 8x8 digits, trained here: it judges the digits that a model paints, and measures FD-digits.

FD-digits is the Frechet distance between two sets of pictures, taken as Gaussians, in the 32 features before the
classifier's last layer (Heusel et al., 2017, have the formula). It is no FID: that is defined by another network.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import Linear
from genai_kernels.optim import AdamW
from python_models.diffusion_data import Pictures, digits
from python_models.unet import Conv

CHECKPOINT = Path(__file__).parent / "checkpoints" / "digit_judge" / "model.safetensors"
FEATURES = 32


class Judge(nn.Module):
    """Two convolutions with norms, a layer of features, and the ten digits: `[N, 1, 8, 8]` to `[N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = Conv(1, 16), nn.GroupNorm(4, 16)
        self.conv2, self.norm2 = Conv(16, 32, stride=2), nn.GroupNorm(8, 32)
        self.hidden, self.out = Linear(32 * 16, FEATURES), Linear(FEATURES, 10)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """`[N, 32]`."""
        h = self.conv2(self.conv1(pictures), self.norm1)
        n = self.norm2
        h = gk.group_norm_silu(h, n.num_groups, n.weight, n.bias, n.eps)
        return F.relu(self.hidden(h.contiguous().flatten(1)))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.out(self.features(pictures))

    @torch.inference_mode()
    def digit(self, pictures: torch.Tensor) -> torch.Tensor:
        """Which digit each picture is taken for, `[N]`."""
        return self(pictures).argmax(1)

    def accuracy(self, pictures: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of pictures that are taken for what their label says."""
        return float((self.digit(pictures) == labels).double().mean())


def shifted(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture moved by at most one pixel, on paper."""
    padded = F.pad(pictures, (1, 1, 1, 1), value=-1.0)
    rows, columns = (torch.randint(3, (len(pictures), 1), generator=generator) + torch.arange(8) for _ in range(2))
    every = torch.arange(len(pictures))[:, None, None]
    return padded[every, 0, rows[:, :, None], columns[:, None, :]][:, None]


def train_judge(pictures: Pictures, *, epochs: int = 60, seed: int = 0, batch: int = 64) -> Judge:
    """A judge that has seen the training digits, moved a little and with dropout of features."""
    assert isinstance(pictures.train, torch.Tensor)
    assert pictures.labels is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
        optimizer = AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
        steps = epochs * (len(pictures.train) // batch)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / steps)
            chosen = torch.randint(len(pictures.train), (batch,), generator=generator)
            hidden = F.dropout(judge.features(shifted(pictures.train[chosen], generator)), 0.2)
            F.cross_entropy(judge.out(hidden), pictures.labels[chosen], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
    return judge.eval().requires_grad_(False)


def load_judge(path: Path = CHECKPOINT) -> Judge:
    """The committed judge, or another."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval().requires_grad_(False)


def save_judge(judge: Judge, folder: Path, about: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in judge.state_dict().items()}, folder / "model.safetensors")
    (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n")


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean(0), torch.cov(x.T, correction=1)


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Between two sets of features `[N, D]`, as Gaussians, in float64: `|m - n|^2 + tr(A + B - 2 (A B)^(1/2))`.

    The trace of the root is that of `(A^(1/2) B A^(1/2))^(1/2)`, which is symmetric: two eigenvalue problems.
    """
    (m, a), (n, b) = _moments(x.double()), _moments(y.double())
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return float((m - n).square().sum() + a.trace() + b.trace() - 2 * cross)


@torch.inference_mode()
def fd_digits(judge: Judge, painted: torch.Tensor, real: torch.Tensor) -> float:
    """The Frechet distance between painted and real digits in the judge's features."""
    return frechet_distance(judge.features(painted), judge.features(real))


def nearest(pictures: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The Euclidean distance of each picture to the nearest of others, `[N]`: 0 is a copy."""
    return torch.cdist(pictures.flatten(1).double(), among.flatten(1).double()).min(1).values


def judge_main(folder: Path | None, seed: int) -> dict[str, object]:
    """Trains a judge, and writes it if there is a folder; returns what is known about it."""
    pictures = digits()
    assert isinstance(pictures.train, torch.Tensor)
    assert pictures.labels is not None
    assert pictures.held_out_labels is not None
    judge = train_judge(pictures, seed=seed)
    about: dict[str, object] = {
        "command": f"python -m python_models.diffusion judge --seed {seed} --out digit_judge",
        "pictures": pictures.about, "parameters": sum(p.numel() for p in judge.parameters()), "seed": seed,
        "accuracy": {"train": round(judge.accuracy(pictures.train, pictures.labels), 4),
                     "held_out": round(judge.accuracy(pictures.held_out, pictures.held_out_labels), 4)},
        "fd_digits_held_out": round(fd_digits(judge, pictures.held_out, pictures.train), 4),
    }  # fmt: skip
    if folder:
        save_judge(judge, folder, about)
    return about
