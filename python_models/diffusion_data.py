"""Pictures that every machine has: scikit-learn's digits, and photographs that scikit-learn and scikit-image ship.

Digits are `[1, 8, 8]`, from -1 (paper) to 1 (ink). Crops of photographs are `[3, 16, 16]`: brightness and two colour
differences, which an orthonormal matrix makes of red, green and blue; so that noise, masks and mean squared errors are
those of RGB, and colourisation is the filling of two channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHOTOGRAPHS = ("china", "flower", "astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")
CROP = 16
HELD_OUT = 0.2  # of the digits, the last ones; of each photograph, its right end
# rows: brightness; red against blue; green against both
_COLOURS = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
_COLOURS = _COLOURS / _COLOURS.norm(dim=1, keepdim=True)


def from_rgb(rgb: torch.Tensor) -> torch.Tensor:
    """`[..., 3, H, W]` in 0 to 1 to brightness and colour differences, 0 for grey of half strength."""
    return torch.einsum("ij,...jhw->...ihw", _COLOURS.to(rgb), 2 * rgb - 1)


def to_rgb(picture: torch.Tensor) -> torch.Tensor:
    """The inverse of `from_rgb`, cut off at 0 and 1."""
    return (torch.einsum("ji,...jhw->...ihw", _COLOURS.to(picture), picture) / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Pictures:
    """What a model learns from, and what it never saw.

    Attributes:
        train: digits `[N, 1, 8, 8]`; of photographs, their parts to cut from, `[3, H, W]` each.
        held_out: `[N, C, H, W]`.
        largest: no value is larger in size.
        labels, held_out_labels: of the digits, int64 `[N]`; or captions as tokens `[N, T]`.
        masked: to be completed too, and not only painted whole.
    """

    name: str
    train: torch.Tensor | list[torch.Tensor]
    held_out: torch.Tensor
    largest: float
    labels: torch.Tensor | None = None
    held_out_labels: torch.Tensor | None = None
    masked: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.held_out.shape[1:]
        return channels, height, width

    @property
    def about(self) -> str:
        if self.labels is not None:
            count = len(self.train)
            return f"scikit-learn's digits, 8x8: the first {count} to train, the last {len(self.held_out)} held out"
        area, count = sum(p.shape[1] * p.shape[2] for p in self.train) / CROP**2, len(self.train)
        return (
            f"{count} photographs of scikit-learn and scikit-image at half their size: {CROP}x{CROP} crops of their "
            f"left four fifths ({area:.0f} times that area) to train, {len(self.held_out)} of the rest held out"
        )


def digits() -> Pictures:
    """The 1797 digits; the last fifth is held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target).long()
    end = round(len(pictures) * (1 - HELD_OUT))
    return Pictures("digits", pictures[:end], pictures[end:], 1.0, labels[:end], labels[end:])


def photograph(name: str) -> torch.Tensor:
    """A photograph at half its size, `[3, H, W]`, H and W multiples of CROP."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        import skimage.data
        import skimage.io

        folder = Path(skimage.data.__file__).parent  # what it ships; its functions may ask for another package
        ending = "jpg" if name == "rocket" else "png"
        pixels = skimage.io.imread(folder / f"{name}.{ending}")
    rgb = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[:3].float() / 255
    rgb = torch.nn.functional.avg_pool2d(rgb, 2)
    return from_rgb(rgb[:, : rgb.shape[1] // CROP * CROP, : rgb.shape[2] // CROP * CROP])


def _boundary(picture: torch.Tensor) -> int:
    """The first column that is held out."""
    return round(picture.shape[2] * (1 - HELD_OUT) / CROP) * CROP


def held_out_part(name: str) -> torch.Tensor:
    """The right end of a photograph."""
    picture = photograph(name)
    return picture[:, :, _boundary(picture) :]


def tiles(picture: torch.Tensor) -> torch.Tensor:
    """The crops that a picture consists of, row by row, `[N, 3, CROP, CROP]`."""
    return picture.unfold(1, CROP, CROP).unfold(2, CROP, CROP).flatten(1, 2).transpose(0, 1).contiguous()


def untiled(crops: torch.Tensor, columns: int) -> torch.Tensor:
    """The picture that `tiles` was made of."""
    rows = crops.unflatten(0, (-1, columns))  # [rows, columns, 3, CROP, CROP]
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def photographs() -> Pictures:
    """Parts of photographs to cut crops from; the right fifth of each is held out."""
    pictures = [photograph(name) for name in PHOTOGRAPHS]
    train = [p[:, :, : _boundary(p)].contiguous() for p in pictures]
    held_out = torch.cat([tiles(p[:, :, _boundary(p) :]) for p in pictures])
    return Pictures("photographs", train, held_out, 3**0.5)


SETS: dict[str, Callable[[], Pictures]] = {"digits": digits, "photographs": photographs}


class Batches:
    """Random pictures to learn from, `(pictures [batch, C, H, W], labels [batch] or None)`, from a generator."""

    def __init__(self, pictures: Pictures, batch: int, seed: int) -> None:
        self.pictures, self.batch = pictures, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        return self

    def _below(self, limit: int, count: int) -> torch.Tensor:
        return torch.randint(limit, (count,), generator=self.generator)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        train, labels = self.pictures.train, self.pictures.labels
        if isinstance(train, torch.Tensor):
            chosen = self._below(len(train), self.batch)
            return train[chosen], None if labels is None else labels[chosen]
        areas = torch.tensor([float(p.shape[1] * p.shape[2]) for p in train])
        crops = []
        for i in torch.multinomial(areas, self.batch, replacement=True, generator=self.generator).tolist():
            top, left = (int(self._below(n - CROP + 1, 1)) for n in train[i].shape[1:])
            crop = train[i][:, top : top + CROP, left : left + CROP]
            crops.append(crop.flip(2) if int(self._below(2, 1)) else crop)
        return torch.stack(crops), None
