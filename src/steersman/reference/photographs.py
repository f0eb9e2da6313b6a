"""``photographs``: the two photographs that come with scikit-learn, and what can befall them.

``china.jpg`` and ``flower.jpg`` (640x427, colour), halved in size. Columns 128 to 231 of each are held out, those
before 120 and after 239 are for training, so that nothing that is judged was seen, nor its neighbourhood. Half of the
area is sky and blur, which anything restores: crops whose pixels have a standard deviation below 0.05 are left out.
Images are float32 in [0, 1], (C, H, W).

Pairs are crops I_0 and what became of them, I_in, with fresh noise for each:

    denoising    I_0 + 0.2 n
    deblurring   (Gaussian of deviation 1.5 pixels) * I_0 + 0.01 n
    inpainting   the middle, half as wide and high, is grey; there is a mask
    low-light    0.25 I_0^1.5 + 0.02 n
    rain         I_0 + 0.6 (drops drawn out to streaks of one direction)

with n ~ N(0, I), cut to [0, 1].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import InputError, MissingExtra, nearest

TASKS = ("denoising", "deblurring", "inpainting", "low-light", "rain")
TRAIN_COLUMNS, HELD_OUT_COLUMNS = (slice(0, 120), slice(240, 320)), (slice(128, 232),)
LEAST_DEVIATION = 0.05
BLUR = 1.5
NOISE = {"denoising": 0.2, "deblurring": 0.01, "low-light": 0.02}


@cache
def photographs() -> tuple[Tensor, ...]:
    """Both photographs (3, 213, 320).

    Raises:
        MissingExtra: scikit-learn (or Pillow, with which it reads) is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images

        bunch = load_sample_images()
    except ModuleNotFoundError as error:
        raise MissingExtra("the photographs (scikit-learn)", "reference") from error
    found = []
    for image in bunch.images:
        x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255
        found.append(F.avg_pool2d(x, 2))
    return tuple(found)


def region(split: str) -> list[Tensor]:
    """The parts of the photographs that are for ``train`` or ``held-out``."""
    if split not in ("train", "held-out"):
        raise InputError("split", split, "train or held-out")
    columns = TRAIN_COLUMNS if split == "train" else HELD_OUT_COLUMNS
    return [x[..., part] for x in photographs() for part in columns]


def fingerprint() -> str:
    """Changes when the photographs do."""
    digest = hashlib.sha256(b"photographs")
    for x in photographs():
        digest.update((x * 1020).round().short().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------ crops


def random_places(
    images: Sequence[Tensor], size: int, count: int, generator: torch.Generator, least: float = 0.0
) -> list[tuple[int, int, int]]:
    """(image, row, column) of ``count`` crops, uniform over all whose pixels deviate by at least ``least``.

    Raises:
        InputError: images smaller than the crops, or so smooth that there are none.
    """
    allowed = [_deviations(x, size) >= least for x in images]
    places = torch.cat([F.pad(a.nonzero(), (1, 0), value=i) for i, a in enumerate(allowed)])
    if not len(places):
        raise InputError("images", f"{len(images)} images", f"crops of {size} pixels that deviate by {least:g}")
    chosen = places[torch.randint(len(places), (count,), generator=generator)]
    return [(i, y, x) for i, y, x in chosen.tolist()]


def tiled_places(images: Sequence[Tensor], size: int, least: float = 0.0) -> list[tuple[int, int, int]]:
    """(image, row, column) of crops that don't overlap, all whose pixels deviate by at least ``least``."""
    found = []
    for i, image in enumerate(images):
        tiles = (_deviations(image, size)[::size, ::size] >= least).nonzero()
        found += [(i, size * y, size * x) for y, x in tiles.tolist()]
    return found


def _deviations(image: Tensor, size: int) -> Tensor:
    """Of the crop at each place: the root mean square, over channels, of its pixels' standard deviations."""
    if min(image.shape[-2:]) < size:
        raise InputError("crop", size, f"at most the shortest side of the images, {min(image.shape[-2:])}")
    x = image[None].double()
    variance = F.avg_pool2d(x**2, size, 1) - F.avg_pool2d(x, size, 1) ** 2
    return variance.clamp_min(0).mean((0, 1)).sqrt()


def cut(images: Sequence[Tensor], places: Sequence[tuple[int, int, int]], size: int) -> Tensor:
    """The crops (n, C, size, size) at ``places``."""
    return torch.stack([images[i][:, y : y + size, x : x + size] for i, y, x in places])


def degraded(
    task: str, images: Sequence[Tensor], places: Sequence[tuple[int, int, int]], size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """I_0 and I_in (n, C, size, size) at ``places``, and the mask (n, 1, size, size) of inpainting.

    Raises:
        InputError: another task.
    """
    if task not in TASKS:
        raise InputError("task", task, nearest(str(task), TASKS))
    target, mask = cut(images, places, size), None
    x = target
    if task == "deblurring":
        x = cut([blurred(image) for image in images], places, size)
    elif task == "inpainting":
        mask = torch.zeros(len(target), 1, size, size)
        middle = slice(size // 4, size // 4 + size // 2)
        mask[..., middle, middle] = 1
        x = torch.where(mask.bool(), 0.5, target)
    elif task == "low-light":
        x = 0.25 * target**1.5
    elif task == "rain":
        x = target + 0.6 * _streaks(len(target), size, generator)
    if task in NOISE:
        x = x + NOISE[task] * torch.randn(x.shape, generator=generator)
    return target, x.clamp(0, 1), mask


def blur_kernel(deviation: float = BLUR) -> Tensor:
    """A Gaussian of ``deviation`` pixels, (k, k), that sums to 1."""
    reach = math.ceil(3 * deviation)
    line = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * deviation**2))
    line = line / line.sum()
    return line[:, None] * line[None, :]


def blurred(image: Tensor) -> Tensor:
    """``image`` (C, H, W) under the task's Gaussian, continued by reflection."""
    kernel = blur_kernel()
    reach = len(kernel) // 2
    padded = F.pad(image[:, None], (reach,) * 4, mode="reflect" if min(image.shape[-2:]) > reach else "replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def _streaks(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Rain (n, 1, size, size) in [0, 1]: one drop in 60 pixels, drawn out over 9 pixels, within 20° of vertical."""
    length = 9
    drops = (torch.rand(count, 1, size + length, size + length, generator=generator) < 1 / 60).float()
    slope = torch.tan((2 * torch.rand(count, generator=generator) - 1) * math.radians(20))
    shift = (slope[:, None] * (torch.arange(length) - length // 2)).round().long().clamp(-4, 4) + length // 2
    parts = []
    for drop, columns in zip(drops, shift, strict=True):
        moved = [drop[:, i : i + size, c : c + size] for i, c in enumerate(columns.tolist())]
        parts.append(torch.stack(moved).amax(0))
    return torch.stack(parts)


# ------------------------------------------------------------------ files


def write_pairs(spec: str, folder: Path) -> Path:
    """2000 training pairs of 48 pixels of ``photographs:TASK`` (denoising by default), as ``pairs.npz``."""
    task = spec.partition(":")[2] or TASKS[0]
    generator = torch.Generator().manual_seed(0)
    images = region("train")
    target, x, mask = degraded(task, images, random_places(images, 48, 2000, generator, LEAST_DEVIATION), 48, generator)
    arrays = {"target": target, "input": x} | ({} if mask is None else {"mask": mask})
    file = folder / "pairs.npz"
    pixels: dict[str, Any] = {name: (255 * v).round().byte().permute(0, 2, 3, 1).numpy() for name, v in arrays.items()}
    np.savez(file, **pixels)
    return file
