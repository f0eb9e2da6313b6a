"""What users bring: a pipeline's folder, and real images in a folder or an array file.

Images come back in [0, 1] as (n, channels, H, W). Whatever can't be read, or doesn't fit together, is
refused in one sentence; nothing is resized or cropped behind the user's back.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from steersman import quiet
from steersman.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names of images, by their channels."""


def load_pipeline(subject: str | Path) -> Any:
    """The diffusers pipeline in a folder (or of a hub id).

    Raises:
        InputError: it can't be read; the sentence has diffusers' reason.
    """
    index = Path(subject) / "model_index.json"
    kind: Any = DiffusionPipeline
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a small model's bar only breaks into other output
    try:
        if Path(subject).is_dir():
            # diffusers looks only into its own module for a pipeline's class.
            from steersman import diffusion

            kind = getattr(diffusion, str(json.loads(index.read_text()).get("_class_name")), kind)
        with quiet.loading():
            return kind.from_pretrained(str(subject))
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError("subject", str(subject), f"a diffusers pipeline that can be read ({reason})") from error
    finally:
        if shown:
            logging.enable_progress_bar()


def read_images(
    source: Path | None, channels: int | None = 3, labelled: bool | None = False
) -> tuple[Tensor, Tensor | None]:
    """Images in [0, 1], (n, channels, H, W), and labels if ``labelled``, from a folder, .zip, .npz or .npy.

    The labels of a folder or zip are those of its ``dataset.json``, {"labels": [[file, label], ...]}, as EDM's and
    StyleGAN's tools write it; where there is none, one folder of images is one class.

    Args:
        source: where they are.
        channels: that they are to have; None is as they come (grey or colour).
        labelled: whether labels are needed; None is where there are any.

    Raises:
        InputError: nothing there, an unreadable file, images of different sizes, or labels missing.
    """
    if source is None:
        raise InputError("input", None, "real images: a folder, .zip, .npz or .npy")
    if source.is_dir():
        files = {str(p.relative_to(source)): p for p in sorted(source.rglob("*")) if p.is_file()}
        pixels, labels = _read_files(source, files, channels, labelled)
    elif source.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(source) as archive:
                entries = {i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()}
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise InputError("input", str(source), f"a zip file that can be read ({error})") from None
        pixels, labels = _read_files(source, dict(sorted(entries.items())), channels, labelled)
    else:
        pixels, labels = _read_array(source, labelled)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3, 4):
        raise InputError("input", tuple(pixels.shape), "images of shape (n, H, W) or (n, H, W, channels)")
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / 255
    if not np.issubdtype(pixels.dtype, np.floating) or not np.isfinite(pixels).all():
        raise InputError("input", str(pixels.dtype), "images as uint8, or as finite numbers in [0, 1]")
    if pixels.min() < 0 or pixels.max() > 1:
        raise InputError("input", f"values from {pixels.min():.3g} to {pixels.max():.3g}", "images in [0, 1], or uint8")
    if channels is not None and pixels.shape[-1] != channels:
        if pixels.shape[-1] != 1:
            raise InputError("input", f"{pixels.shape[-1]} channels", f"images of {channels} channels, as the network")
        pixels = np.repeat(pixels, channels, axis=-1)
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32))
    return tensor, None if labels is None else torch.from_numpy(labels)


def pixels(name: str, image: Image.Image, channels: int | None = None) -> np.ndarray:
    """An image's values in [0, 1], (H, W) of a grey one, else (H, W, channels); of 8 or 16 bits.

    Args:
        name: for the error's sentence.
        image: it.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA); None is as it comes, grey or RGB.

    Raises:
        InputError: values of more bits, whose range nobody knows.
    """
    if image.mode.startswith("I;16"):  # Pillow's own conversion would cut all of it off at 255
        grey = np.asarray(image, dtype=np.float32) / 65535
        if channels in (None, 1):
            return grey
        colour = np.repeat(grey[..., None], 3, axis=-1)
        return colour if channels == 3 else np.concatenate([colour, np.ones_like(grey)[..., None]], axis=-1)
    if image.mode in ("I", "F"):
        raise InputError("image", f"{name} of mode {image.mode}", "of 8 or 16 bits a channel")
    mode = MODES[channels or (1 if image.mode in ("1", "L") else 3)]
    return np.asarray(image.convert(mode), dtype=np.float32) / 255


def _read_files(
    source: Path, files: Mapping[str, Path | bytes], channels: int | None, labelled: bool | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images among ``files``, by their names in the folder or zip ``source``, and their labels."""
    names = [name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES]
    if not names:
        raise InputError("input", str(source), f"a folder or zip that holds image files ({', '.join(SUFFIXES)})")
    if channels is not None and channels not in MODES:
        raise InputError("input", str(source), f".npy or .npz for a network of {channels} channels")
    arrays: list[np.ndarray] = []
    for name in names:
        content, where = files[name], f"{source}/{name}"
        try:
            with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
                arrays.append(pixels(where, image, channels))
        except (UnidentifiedImageError, OSError) as error:
            raise InputError("input", where, f"an image file that can be read ({error})") from None
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            (h, w), (h0, w0) = arrays[-1].shape[:2], arrays[0].shape[:2]
            first = PurePosixPath(names[0]).name
            allowed = f"of one size with the others ({first} has {w0}x{h0}, this one {w}x{h})"
            raise InputError("input", where, allowed)
        if arrays[-1].ndim != arrays[0].ndim:
            raise InputError("input", where, f"grey or colour as the others ({names[0]} is not)")
    stacked = np.stack(arrays)
    if labelled is False:
        return stacked, None
    if "dataset.json" in files:
        return stacked, _read_labels(files["dataset.json"], names, source, bool(labelled))
    folders = [PurePosixPath(name).parent.name for name in names]
    classes = sorted(set(folders))
    # Folders of shards, as EDM's 00000, 00001, ..., come with a dataset.json or without classes.
    if "" in classes or (labelled is None and len(classes) < 2):
        if labelled:
            raise InputError("input", str(source), "one folder of images a class, as the network is class-conditional")
        return stacked, None
    return stacked, np.array([classes.index(folder) for folder in folders])


def _read_labels(content: Path | bytes, names: Sequence[str], source: Path, needed: bool) -> np.ndarray | None:
    """The labels of a dataset.json, in the order of ``names``; None where it has none and none are needed."""
    try:
        listed = json.loads(content.read_bytes() if isinstance(content, Path) else content)["labels"]
        found = None if listed is None else {str(name).replace("\\", "/"): label for name, label in listed}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError("input", f"{source}/dataset.json", f'{{"labels": [[file, label], ...]}} ({error})') from None
    if found is None:
        if needed:
            raise InputError("input", f"{source}/dataset.json", "labels, as the network is class-conditional")
        return None
    for name in names:
        label = found.get(name)
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise InputError("input", f"label {label!r} of {name}", "a whole number from 0, for each image")
    return np.array([found[name] for name in names])


def _read_array(source: Path, labelled: bool | None) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        loaded = np.load(source, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            pixels, labels = loaded, None
        else:
            with loaded:
                pixels = loaded["images"]
                labels = loaded["labels"] if labelled is not False and "labels" in loaded else None
    except KeyError:
        raise InputError("input", str(source), "an .npz that holds 'images'") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError("input", str(source), f"a folder of images, .npz or .npy that can be read ({error})") from None
    if labelled and labels is None:
        raise InputError(
            "input", str(source), "an .npz with 'images' and 'labels', as the network is class-conditional"
        )
    if labels is not None:
        if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise InputError("input", f"labels {labels.shape}", f"one whole number for each of {len(pixels)} images")
        labels = labels.astype(np.int64)
    return pixels, labels


def as_dataset(name: str, images: Any) -> Any:
    if isinstance(images, Tensor):
        images = (images,)
    if isinstance(images, (tuple, list)) and images and all(isinstance(x, Tensor) for x in images):
        if len(images) > 2:
            raise InputError(name, f"{len(images)} tensors", "a tensor of images or a pair of tensors (images, labels)")
        if images[0].ndim != 4 or len(images[0]) < 4:
            raise InputError(
                name, tuple(images[0].shape), "of shape (n, channels, height, width) with at least 4 images"
            )
        if len(images) == 2 and images[1].shape != images[0].shape[:1]:
            raise InputError("labels", tuple(images[1].shape), f"of shape ({len(images[0])},), one for each image")
        return TensorDataset(*images)
    if isinstance(images, (DataLoader, Dataset)) or (
        not isinstance(images, str) and hasattr(images, "__getitem__") and hasattr(images, "__len__")
    ):
        return images
    raise InputError(name, type(images).__name__, "a tensor, a pair (images, labels), a Dataset or a DataLoader")


def read_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images in [0, 1] and labels of a batch or an item."""
    labels = None
    if isinstance(batch, Mapping):
        labels = next((batch[k] for k in ("labels", "label") if k in batch), None)
        images = next((batch[k] for k in ("images", "pixel_values", "image") if k in batch), None)
    elif isinstance(batch, (tuple, list)):
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
    else:
        images = batch
    if not isinstance(images, Tensor) or images.ndim not in (3, 4):
        kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError("images", kind, "tensors of shape (n, channels, height, width)")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    low, high = float(images.min()), float(images.max())
    if low < -1e-3 or high > 1 + 1e-3 or low != low:
        raise InputError("images", f"values from {low:.3g} to {high:.3g}", "in [0, 1] (or uint8)")
    return images, None if labels is None else torch.as_tensor(labels)


def gather(source: Any, limit: int) -> tuple[Tensor, Tensor | None]:
    """The first ``limit`` images of a dataset or loader, and their labels."""
    # A generator of its own: a loader's iterator would draw from the global one.
    own = torch.Generator()
    loader = source if isinstance(source, DataLoader) else DataLoader(source, batch_size=256, generator=own)
    images, labels, count = [], [], 0
    for batch in loader:
        x, y = read_batch(batch)
        images.append(x)
        labels.append(y)
        count += len(x)
        if count >= limit:
            break
    if count < 2:
        raise InputError("images", f"{count} images", "at least 2 images")
    known = [y for y in labels if y is not None]
    return torch.cat(images)[:limit], torch.cat(known)[:limit] if len(known) == len(labels) else None
