"""Images with captions: in memory, and in files; and what embeds captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.diffusion.images import pixels, read_images
from steersman.errors import InputError

Embedding = Callable[[Sequence[str]], Tensor]


def read_captioned(source: Path | None) -> tuple[Tensor, list[str]]:
    """Images in [-1, 1], (n, 3, H, W), and their captions.

    Args:
        source: a folder of images with one ``.jsonl`` of lines {"file": name, "text": caption} (or "file_name", as
            datasets' image folders have), or an .npz with ``images`` (n, H, W, 3) and ``captions``.

    Raises:
        InputError: nothing there, a line that can't be read, a file that is missing, an empty caption.
    """
    if source is None:
        raise InputError("input", None, "images with captions: a folder with a .jsonl of {file, text}, or an .npz")
    if source.is_dir():
        return _read_folder(source)
    if source.suffix.lower() != ".npz":
        raise InputError("input", str(source), "a folder with a .jsonl of {file, text}, or an .npz with captions")
    images, _ = read_images(source, 3, False)
    with np.load(source, allow_pickle=False) as loaded:
        if "captions" not in loaded:
            raise InputError("input", str(source), "an .npz with 'images' and 'captions'")
        captions = [str(text) for text in loaded["captions"]]
    return 2 * images - 1, checked_captions(captions, len(images))


def _read_folder(source: Path) -> tuple[Tensor, list[str]]:
    from PIL import Image, UnidentifiedImageError

    lists = sorted(source.glob("*.jsonl"))
    if len(lists) != 1:
        raise InputError("input", str(source), f"a folder with one .jsonl of {{file, text}} (it has {len(lists)})")
    pictures, captions = [], []
    for number, line in enumerate(lists[0].read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{lists[0].name}, line {number}"
        try:
            entry = json.loads(line)
            name, text = entry.get("file", entry.get("file_name")), entry["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError("file and text must be strings")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError("input", where, f'{{"file": ..., "text": ...}} ({error})') from None
        try:
            with Image.open(source / name) as image:
                pictures.append(2 * pixels(name, image, 3) - 1)
        except (UnidentifiedImageError, OSError) as error:
            raise InputError("input", f"{where}: {name}", f"an image file that can be read ({error})") from None
        if pictures[-1].shape != pictures[0].shape:
            (h, w, _), (h0, w0, _) = pictures[-1].shape, pictures[0].shape
            raise InputError("input", f"{name} of {w}x{h}", f"of one size with the others ({w0}x{h0})")
        captions.append(text)
    if not pictures:
        raise InputError("input", str(lists[0]), "at least one line")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), checked_captions(
        captions, len(pictures)
    )


def checked_captions(captions: Any, count: int | None = None) -> list[str]:
    """A list of captions that all say something.

    Raises:
        InputError: one is empty, or there are not as many as images.
    """
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise InputError("captions", type(captions).__name__, "a list of texts")
    found = list(captions)
    for i, text in enumerate(found):
        if not isinstance(text, str) or not text.strip():
            raise InputError("captions", text, f"texts that are not empty (number {i} is)")
    if not found or (count is not None and len(found) != count):
        raise InputError("captions", f"{len(found)} texts", f"one for each of the {count or 'some'} images")
    return found


class PooledText:
    """Embeddings of texts by a pipeline's own text encoder: its pooled output, as unit vectors (B, d).

    Args:
        pipe: a pipeline with ``tokenizer`` and ``text_encoder`` (of the CLIP kind).

    Raises:
        InputError: it has none.
    """

    def __init__(self, pipe: Any) -> None:
        self.tokenizer: Any = getattr(pipe, "tokenizer", None)
        self.encoder: Any = getattr(pipe, "text_encoder", None)
        if self.tokenizer is None or self.encoder is None:
            raise InputError("pipe", type(pipe).__name__, "a pipeline with a text encoder (or give embeddings)")

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        out = self.encoder(self._tokens(texts).to(self.encoder.device))
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            raise InputError("pipe", type(self.encoder).__name__, "a text encoder with a pooled output")
        return F.normalize(pooled.float(), dim=1).cpu()

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """What the U-Net reads, (B, tokens, d)."""
        return self.encoder(self._tokens(texts).to(self.encoder.device))[0]

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        length = self.tokenizer.model_max_length
        return self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids


def embed_all(embedding: Embedding, texts: Sequence[str], batch: int = 256) -> Tensor:
    """Embeddings (n, d), float32 on the CPU; equal texts are embedded once.

    Raises:
        InputError: what comes back is not a matrix of finite numbers, a row for each text.
    """
    unique = list(dict.fromkeys(texts))
    parts = []
    for start in range(0, len(unique), batch):
        part = unique[start : start + batch]
        z = torch.as_tensor(embedding(part)).detach().float().cpu()
        if z.ndim != 2 or len(z) != len(part) or not bool(z.isfinite().all()):
            raise InputError("embeddings", tuple(z.shape), f"finite, of shape ({len(part)}, d) for {len(part)} texts")
        parts.append(z)
    z = torch.cat(parts)
    place = {text: i for i, text in enumerate(unique)}
    return z[[place[text] for text in texts]]
