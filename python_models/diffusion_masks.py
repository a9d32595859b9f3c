"""What of a picture is known: 1 where it is, 0 where a model is to paint; and painting without a model."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

TASKS = ("hole", "half", "uncrop", "colour")


def task_mask(task: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """The mask of a task for pictures `[C, H, W]`, float32: "hole", the middle quarter of the area is to be painted;
    "half", the lower half; "uncrop", all but the middle quarter; "colour", all channels but the first.

    Raises:
        ValueError: another task, or colour for pictures of one channel.
    """
    channels, height, width = shape
    known = torch.ones(shape)
    top, left = height // 4, width // 4
    if task == "hole":
        known[:, top : height - top, left : width - left] = 0
    elif task == "half":
        known[:, height // 2 :] = 0
    elif task == "uncrop":
        known.zero_()[:, top : height - top, left : width - left] = 1
    elif task == "colour" and channels > 1:
        known[1:] = 0
    else:
        raise ValueError(f"task_mask: task: expected one of {', '.join(TASKS)} for {channels} channels, got {task!r}")
    return known


def random_masks(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Masks to learn with, `[count, C, H, W]`: three in ten know nothing; the others a rectangle, all but a rectangle,
    or the first channel (of pictures of one channel, some pixels here and there).
    """
    channels, *size = shape
    rows = []
    for n in size:
        length = torch.randint(n // 4, n - n // 8, (count, 1), generator=generator)
        start = (torch.rand(count, 1, generator=generator) * (n - length + 1)).long()
        place = torch.arange(n)
        rows.append((place >= start) & (place < start + length))
    inside = (rows[0][:, :, None] & rows[1][:, None, :])[:, None].float().expand(-1, channels, -1, -1)
    if channels > 1:
        colour = torch.zeros(count, *shape)
        colour[:, 0] = 1
    else:
        share = torch.rand(count, 1, 1, 1, generator=generator)
        colour = (torch.rand(count, *shape, generator=generator) < share).float()
    kind = torch.rand(count, 1, 1, 1, generator=generator)
    known = torch.where(kind < 0.55, 1 - inside, torch.where(kind < 0.8, inside, colour))
    return torch.where(kind < 0.3, 0.0, known)


def masked_mse(painted: torch.Tensor, truth: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Mean squared error over what was painted, of each picture, `[N]`."""
    wanted = (1 - known).expand_as(truth)
    return ((painted - truth) ** 2 * wanted).flatten(1).sum(1) / wanted.flatten(1).sum(1)


def mean_fill(pictures: torch.Tensor, known: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Each channel's mean over what is known of it; where a picture has none of it, `otherwise` `[C]`."""
    known = known.expand_as(pictures)
    count = known.sum((2, 3), keepdim=True)
    mean = (pictures * known).sum((2, 3), keepdim=True) / count.clamp(min=1)
    mean = torch.where(count > 0, mean, otherwise.view(1, -1, 1, 1))
    return torch.where(known > 0, pictures, mean)


def smooth_fill(pictures: torch.Tensor, known: torch.Tensor, rounds: int = 32) -> torch.Tensor:
    """Each channel continued smoothly into what is not known of it: from the means of ever larger squares, and then
    every unknown pixel the mean of its neighbours, so many times at each size. 0 where nothing of a channel is known.
    """
    known = known.expand_as(pictures)
    if pictures.shape[-1] == 1:
        return pictures * known
    share = F.avg_pool2d(known, 2)
    coarse = F.avg_pool2d(pictures * known, 2) / share.clamp(min=0.25)
    coarse = smooth_fill(coarse, (share > 0).to(known.dtype), rounds)
    filled = F.interpolate(coarse, scale_factor=2.0, mode="bilinear")
    for _ in range(rounds):
        padded = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        around = padded[:, :, :-2, 1:-1] + padded[:, :, 2:, 1:-1] + padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]
        filled = torch.where(known > 0, pictures, around / 4)
    return filled


def biharmonic_fill(pictures: torch.Tensor, known: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """scikit-image's `inpaint_biharmonic`, channel by channel; channels of which nothing is known are mean-filled."""
    from skimage.restoration import inpaint_biharmonic

    filled = mean_fill(pictures, known, otherwise)
    low, high = float(pictures.min()), float(pictures.max())
    for picture, one in zip(filled, known.expand_as(pictures), strict=True):
        for channel in range(len(picture)):
            unknown = one[channel].numpy() == 0
            if unknown.any() and not unknown.all():
                painted = inpaint_biharmonic(picture[channel].double().numpy(), unknown)
                picture[channel] = torch.from_numpy(np.clip(painted, low, high)).to(pictures.dtype)
    return filled
