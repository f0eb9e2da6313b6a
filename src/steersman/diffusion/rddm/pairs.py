"""Pairs of aligned images: in memory, and in the folders and lists that users have.

A source of pairs is

- a folder with the folders ``input`` and ``target`` (and ``mask``), whose files have the same names;
- a folder with ``input.flist`` and ``target.flist`` (and ``mask.flist``), text files that list one path a line, in
  the same order; paths are relative to the list;
- an ``.npz`` with the arrays ``input`` and ``target`` (and ``mask``), (n, H, W, C) in [0, 1] or uint8.

Without ``input`` (for generation) any images will do, as in :func:`~steersman.diffusion.images.read_images`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from steersman.diffusion.images import SUFFIXES, pixels, read_images
from steersman.errors import InputError

ROLES = ("target", "input", "mask")


@dataclass(frozen=True)
class Pairs:
    """Images in [0, 1], each (C, H, W): what is wanted, what it became, and where.

    Args:
        target: I_0.
        input: I_in, one for each target and of its size; None for generation.
        mask: of 1 or C channels, alike; None where there is none.
    """

    target: Sequence[Tensor]
    input: Sequence[Tensor] | None = None
    mask: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.target)

    @classmethod
    def of(cls, target: Any, input: Any = None, mask: Any = None) -> Pairs:
        """Checked pairs of tensors (n, C, H, W), or of lists of (C, H, W).

        Raises:
            InputError: images that are not such tensors, not in [0, 1], or whose numbers or sizes differ.
        """
        if mask is not None and input is None:
            raise InputError("mask", "images", "left out without an input")
        found = {
            name: list(images) for name, images in zip(ROLES, (target, input, mask), strict=True) if images is not None
        }
        first = found["target"]
        if not first:
            raise InputError("target", "no images", "at least one image")
        for name, images in found.items():
            if len(images) != len(first):
                raise InputError(name, f"{len(images)} images", f"{len(first)}, one for each target")
            for i, (image, other) in enumerate(zip(images, first, strict=True)):
                _check(f"{name}[{i}]", image, other, None if name == "mask" else first[0].shape[0])
            if name == "mask" and len({m.shape[0] for m in images} | {1, first[0].shape[0]}) > 2:
                raise InputError("mask", f"{images[0].shape[0]} channels", f"of 1 or {first[0].shape[0]} channels")
        return cls(**found)

    @property
    def channels(self) -> int:
        """C."""
        return int(self.target[0].shape[0])

    def seen(self, see_input: bool = True) -> int:
        """Channels that a network of these pairs sees: the state, the input and the mask."""
        mask = 0 if self.mask is None else int(self.mask[0].shape[0])
        return self.channels * (2 if self.input is not None and see_input else 1) + (mask if see_input else 0)

    def check_crop(self, crop: int | None) -> None:
        """Whether batches can be made.

        Raises:
            InputError: images smaller than the crop, or of several sizes without one.
        """
        sizes = {tuple(image.shape[-2:]) for image in self.target}
        if crop is None and len(sizes) > 1:
            (h, w), (h2, w2) = sorted(sizes)[:2]
            raise InputError("crop", None, f"given, as the images differ in size ({w}x{h} and {w2}x{h2})")
        least = min(min(size) for size in sizes)
        if crop is not None and crop > least:
            raise InputError("crop", crop, f"at most the shortest side of the images, {least}")

    def batch(
        self, size: int, crop: int | None, flip: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """I_0 and I_in in [-1, 1] and the mask in [0, 1] of pairs that are drawn, with the same cuts."""
        index = torch.randint(len(self), (size,), generator=generator).tolist()
        place = torch.rand(size, 3, generator=generator).tolist()
        parts: dict[str, list[Tensor]] = {}
        for name in ROLES:
            images = getattr(self, name)
            if images is None:
                continue
            for i, (down, right, mirror) in zip(index, place, strict=True):
                image = images[i]
                if crop is not None:
                    y, x = (int(u * (n - crop + 1)) for u, n in zip((down, right), image.shape[-2:], strict=True))
                    image = image[:, y : y + crop, x : x + crop]
                parts.setdefault(name, []).append(image.flip(-1) if flip and mirror < 0.5 else image)
        target, x_in, mask = (torch.stack(parts[name]).float() if name in parts else None for name in ROLES)
        assert target is not None
        return 2 * target - 1, None if x_in is None else 2 * x_in - 1, mask


def _check(name: str, image: Any, other: Tensor, channels: int | None) -> None:
    if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InputError(name, shape, "a floating-point tensor (channels, height, width)")
    if image.shape[-2:] != other.shape[-2:]:
        (h, w), (h0, w0) = image.shape[-2:], other.shape[-2:]
        raise InputError(name, f"{w}x{h}", f"of its target's size, {w0}x{h0}")
    if channels is not None and image.shape[0] != channels:
        raise InputError(name, f"{image.shape[0]} channels", f"of {channels} channels, as the first target")
    low, high = float(image.min()), float(image.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InputError(name, f"values from {low:.3g} to {high:.3g}", "in [0, 1]")


def is_pairs(source: str | Path) -> bool:
    """Whether there are pairs in ``source``, not only images."""
    root = Path(source)
    if root.suffix.lower() == ".npz" and root.is_file():
        with np.load(root, allow_pickle=False) as arrays:
            return "target" in arrays
    return root.is_dir() and any((root / name).exists() for name in ("target", "target.flist"))


def read_pairs(source: str | Path) -> Pairs:
    """Pairs in one of the module's forms, or images alone.

    Raises:
        InputError: nothing there, an unreadable file, names that have no partner, or sizes that differ.
    """
    root = Path(source)
    if not root.exists():
        raise InputError("input", str(source), "a folder or .npz of pairs that exists")
    try:
        paired = is_pairs(root)
    except (OSError, ValueError) as error:
        raise InputError("input", str(source), f"an .npz that can be read ({error})") from None
    if not paired:
        images, _ = read_images(root, channels=None)
        return Pairs.of(images)
    if root.is_file():
        with np.load(root, allow_pickle=False) as arrays:
            held = {name: _tensors(name, arrays[name]) for name in ROLES if name in arrays}
        return Pairs.of(held["target"], held.get("input"), held.get("mask"))
    lists = {
        name: _listed(root, name) for name in ROLES if (root / name).is_dir() or (root / f"{name}.flist").is_file()
    }
    if "input" not in lists:
        raise InputError("input", str(source), "a folder with input as well as target")
    _check_partners(lists)
    read = {name: [_read(lists[name][key], name == "mask") for key in lists["target"]] for name in lists}
    for name, members in read.items():
        for key, image, other in zip(lists["target"], members, read["target"], strict=True):
            if image.shape[-2:] != other.shape[-2:]:
                (h, w), (h0, w0) = image.shape[-2:], other.shape[-2:]
                allowed = f"of its target's size, {w0}x{h0} (it has {w}x{h})"
                raise InputError("input", str(lists[name][key]), allowed)
    return Pairs.of(*(read.get(name) for name in ROLES))


def _listed(root: Path, name: str) -> dict[str, Path]:
    """The files of one role: by their names in a folder, by their places in a list."""
    folder = root / name
    if folder.is_dir():
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        return {str(p.relative_to(folder).with_suffix("")): p for p in files}
    listing = root / f"{name}.flist"
    try:
        lines = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("input", str(listing), f"a text file with one path a line ({error})") from None
    return {str(i): listing.parent / line for i, line in enumerate(lines)}


def _check_partners(lists: Mapping[str, Mapping[str, Path]]) -> None:
    wanted = lists["target"]
    if not wanted:
        raise InputError("input", "no target images", f"a folder with image files ({', '.join(SUFFIXES)})")
    for name, files in lists.items():
        lonely = sorted(set(wanted) ^ set(files))
        if lonely:
            path = wanted.get(lonely[0]) or files[lonely[0]]
            missing = name if lonely[0] in wanted else "target"
            raise InputError(
                "input", str(path), f"one of a pair (there is no {missing} for it; {len(lonely)} lack one)"
            )


def _read(path: Path, grey: bool) -> Tensor:
    try:
        with Image.open(path) as image:
            array = pixels(str(path), image, 1 if grey else None)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError("input", str(path), f"an image file that can be read ({error})") from None
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def _tensors(name: str, array: np.ndarray) -> list[Tensor]:
    pixels = array[..., None] if array.ndim == 3 else array
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3, 4):
        raise InputError(name, tuple(array.shape), "of shape (n, H, W) or (n, H, W, channels)")
    pixels = pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1)
    return list(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))
