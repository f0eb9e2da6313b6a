"""``digits``: scikit-learn's handwritten digits, a class-conditional U-Net and two classifiers.

The images are the 1797 scans of 8x8 pixels and 17 grey levels that come with scikit-learn (a part of the
UCI "Optical Recognition of Handwritten Digits" set), brought to [-1, 1]: ink is 1, paper -1. A fixed
permutation splits them into 1200 training images and 597 held-out ones; everything that the project
trained saw the training images only.

The U-Net is an ordinary diffusers pipeline folder (``UNet2DModel``, epsilon prediction, linear betas,
T=1000); label 10 is the null class of classifier-free guidance. Classifier ``a`` is convolutional and
classifier ``b`` a residual perceptron of another seed, so that a method which trains on the features of
one can be judged in the features of the other. They were trained to reconstruct the image from their
features too, because a plain classifier's collapse onto ten points and hardly see how an image looks.
Features are standardised: over the training images each has mean 0 and variance 1.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steersman.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from steersman.diffusion.pipelines import ClassConditionalPipeline

CLASSES = 10
NULL_LABEL = 10
TRAIN = 1200
SPLIT_SEED = 0
SPLITS = ("train", "held-out", "all")
CLASSIFIERS = ("a", "b")


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (1797, 8, 8) and labels (1797,), in the order of the fixed permutation."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtra("the digits images (scikit-learn)", "reference") from error

    bunch = load_digits()
    order = np.random.Generator(np.random.PCG64(SPLIT_SEED)).permutation(len(bunch.target))
    return bunch.images[order].astype(np.uint8), bunch.target[order].astype(np.int64)


def images(split: Literal["train", "held-out", "all"] = "train") -> tuple[Tensor, Tensor]:
    """The images of a split (N, 1, 8, 8), float32 in [-1, 1], and their labels (N,), int64.

    Args:
        split: train (1200 images), held-out (597) or all.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise InputError("split", split, f"one of {', '.join(SPLITS)}")
    levels, labels = _scans()
    part = {"train": slice(None, TRAIN), "held-out": slice(TRAIN, None), "all": slice(None)}[split]
    x = torch.from_numpy(levels[part].astype(np.float32) / 8 - 1)[:, None]
    return x, torch.from_numpy(labels[part].copy())


def matched(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Training images (N, 1, 8, 8) that have exactly the ``labels`` (N,), drawn without replacement.

    What class-conditional samples of these labels are to be compared with as a floor: two sets of other
    labels differ by their class shares as well.

    Raises:
        InputError: more of a label than there are training images of it.
    """
    x, y = images("train")
    order = torch.randperm(len(y), generator=generator)
    pools = {k: order[y[order] == k].tolist() for k in range(CLASSES)}
    for k, count in zip(*(v.tolist() for v in labels.unique(return_counts=True)), strict=True):
        if count > len(pools.get(k, ())):
            raise InputError("labels", f"{count} times {k}", f"at most {len(pools.get(k, ()))} times {k}")
    return x[torch.tensor([pools[k].pop() for k in labels.tolist()], dtype=torch.long)]


def data_fingerprint() -> str:
    """SHA-256 of the grey levels and labels in the order of the split."""
    levels, labels = _scans()
    return hashlib.sha256(levels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()


class Classifier(nn.Module):
    """A digit classifier whose last hidden layer serves as features.

        features(x) = standardise(silu(W body(x)))        logits(x) = V features(x) + c

    Args:
        kind: ``convolutional`` (four 3x3 convolutions, one pooling) or ``perceptron`` (two residual blocks
            on the flat pixels).
        width: channels, or hidden units.
        features: number of features.
        dropout: before the feature layer and inside the blocks, in training only.
    """

    def __init__(self, kind: str, width: int, features: int, dropout: float = 0.2) -> None:
        super().__init__()
        if kind not in ("convolutional", "perceptron"):
            raise InputError("kind", kind, "convolutional or perceptron")
        self.settings: dict[str, Any] = {
            "kind": kind,
            "width": width,
            "features": features,
            "dropout": dropout,
        }
        self.body: nn.Module
        if kind == "convolutional":
            self.body = nn.Sequential(
                nn.Conv2d(1, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.AvgPool2d(2),
                nn.Conv2d(width, 2 * width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1),
                nn.SiLU(),
                nn.Flatten(),
                nn.Dropout(dropout),
                nn.Linear(2 * width * 16, features),
                nn.SiLU(),
            )
        else:
            self.body = nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, width),
                _Residual(width, dropout),
                _Residual(width, dropout),
                nn.LayerNorm(width),
                nn.Linear(width, features),
                nn.SiLU(),
            )
        self.standardise = nn.BatchNorm1d(features, affine=False, momentum=None)
        self.head = nn.Linear(features, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Features (N, F) of images (N, 1, 8, 8) in [-1, 1]; differentiable in ``x``."""
        if x.ndim != 4 or x.shape[1:] != (1, 8, 8):
            raise InputError("x", tuple(x.shape), "of shape (N, 1, 8, 8)")
        return self.standardise(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.head(self.features(x))

    def save(self, folder: Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (half precision)."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """The classifier of a folder that :meth:`save` wrote: float32, frozen, in eval mode."""
        from safetensors.torch import load_file

        model = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.float().eval().requires_grad_(False)


class _Residual(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(self.drop(F.gelu(self.up(self.norm(h)))))


def classifier(which: Literal["a", "b"] = "a") -> Classifier:
    """A shipped classifier: ``a`` is convolutional, ``b`` a perceptron; frozen, in eval mode.

    Raises:
        MissingExtra: the package ``steersman-reference`` is not installed.
    """
    if which not in CLASSIFIERS:
        raise InputError("which", which, f"one of {', '.join(CLASSIFIERS)}")
    from steersman.reference import loading

    return Classifier.load(loading.folder("digits") / f"classifier-{which}")


def pipeline() -> ClassConditionalPipeline:
    """The shipped class-conditional pipeline, in float32.

    Raises:
        MissingExtra: diffusers or the package ``steersman-reference`` is not installed.
    """
    from steersman.diffusion.pipelines import ClassConditionalPipeline
    from steersman.reference import loading

    return ClassConditionalPipeline.from_pretrained(loading.folder("digits") / "pipeline")
