r"""Figures for sampled images: in features, by class, and against the model's own fine trajectory.

All distances between sets of images are taken in features: a classifier's (``digits``), or the principal
components of real images where a user has no network (:class:`PixelPCA`). Both are standardised, so a
feature's unit is its standard deviation over real images. Frechet distance and kernel distance (unbiased
cubic MMD²) fall with better samples, improved precision and recall rise. None means much alone: the same
figures of one real set against another, :func:`floor`, go beside them, from equally many images.

Without data, a sampler can still be judged by the distance of its output from where the same start goes
on a fine grid, :func:`trajectory` and :func:`endpoint_error`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steersman.errors import InputError
from steersman.math.divergences import frechet, mmd2, precision_recall

Features = Callable[[Tensor], Tensor]
"""Maps images (N, C, H, W) in [-1, 1] to features (N, F)."""


class PixelPCA:
    """Standardised principal components of real images, as features.

        f(x) = V^T (x - mean) / s       (V: leading eigenvectors of the pixels' covariance, s: their roots)

    Args:
        images: real images (N, C, H, W), N >= 2.
        components: how many, from 1 to what the images span.
    """

    def __init__(self, images: Tensor, components: int = 32) -> None:
        if images.ndim != 4 or len(images) < 2:
            raise InputError("images", tuple(images.shape), "of shape (N, C, H, W) with N from 2")
        x = images.flatten(1).double()
        self.shape = images.shape[1:]
        self.mean = x.mean(0)
        _, roots, vectors = torch.linalg.svd(x - self.mean, full_matrices=False)
        roots = roots / (len(x) - 1) ** 0.5
        rank = int((roots > 1e-6 * roots[0]).sum()) if roots[0] > 0 else 0
        if isinstance(components, bool) or not isinstance(components, int) or not 1 <= components <= rank:
            raise InputError("components", components, f"a whole number from 1 to {rank}, what the images span")
        self.projection = (vectors[:components] / roots[:components, None]).T

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, components), float64, differentiable in ``images``."""
        if images.shape[1:] != self.shape:
            raise InputError("images", tuple(images.shape), f"of shape (N, {', '.join(map(str, self.shape))})")
        x = images.flatten(1).double()
        return (x - self.mean.to(x.device)) @ self.projection.to(x.device)


@torch.no_grad()
def features(extractor: Features, images: Tensor, batch: int = 500) -> Tensor:
    """The features of many images, in batches, float64 (N, F).

    Raises:
        InputError: images that are not finite.
    """
    if images.ndim != 4 or not bool(images.isfinite().all()):
        raise InputError("images", tuple(images.shape), "finite numbers of shape (N, C, H, W)")
    return torch.cat([extractor(part).double() for part in images.split(batch)])


def feature_metrics(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, float]:
    """Distances of two sets of features, (n, F) real and (m, F) sampled.

    Returns:
        ``frechet``, ``kernel`` (unbiased cubic MMD²), ``precision`` and ``recall`` with ``k`` neighbours.
    """
    real, fake = real.double(), fake.double()
    precision, recall = precision_recall(real, fake, k)
    return {
        "frechet": frechet(real.cpu().numpy(), fake.cpu().numpy()),
        "kernel": mmd2(fake, real).item(),
        "precision": precision,
        "recall": recall,
    }


def floor(real: Tensor, count: int, repeats: int = 5, generator: torch.Generator | None = None) -> dict[str, float]:
    """:func:`feature_metrics` of two disjoint real sets of ``count``, meant over random splits.

    Args:
        real: features of real images (N, F), N >= 2 count.
        count: images in each of the two.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= len(real) // 2:
        raise InputError("count", count, f"a whole number from 2 to {len(real) // 2}, half of the real images")
    rows = []
    for _ in range(repeats):
        order = torch.randperm(len(real), generator=generator)
        rows.append(feature_metrics(real[order[:count]], real[order[count : 2 * count]]))
    return {name: sum(row[name] for row in rows) / repeats for name in rows[0]}


@torch.no_grad()
def class_accuracy(classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of the images (N, C, H, W) that ``classifier`` (logits) takes for their label."""
    if len(images) != len(labels):
        raise InputError("labels", tuple(labels.shape), f"one for each of the {len(images)} images")
    return (classifier(images).argmax(1) == labels.to(images.device)).double().mean().item()


@torch.no_grad()
def mixture_ratio(classifier: Callable[[Tensor], Tensor], images: Tensor, threshold: float = 0.2) -> float:
    """Share of images that are mixtures: two or more classes have a probability of at least ``threshold``.

    Args:
        classifier: images (N, C, H, W) -> logits.
        threshold: above 0, at most 1/2.
    """
    if not 0 < threshold <= 0.5:
        raise InputError("threshold", threshold, "a number above 0, at most 0.5")
    likely = classifier(images).softmax(1) >= threshold
    return (likely.sum(1) >= 2).double().mean().item()


def novelty(samples: Tensor, bank: Tensor) -> dict[str, float]:
    """How far samples (n, ...) are from the items (M, ...) that a sampler holds, and from each other.

    Returns:
        ``nearest``: mean distance to the nearest item, over the mean distance of an item to its nearest other;
        ``near_copies``: share of samples nearer to an item than half that item's distance to its nearest other;
        ``repeats``: share of samples that have another sample within a tenth of the items' mean distance.
    """
    x, y = samples.flatten(1).double(), bank.flatten(1).double()
    if x.shape[1] != y.shape[1] or len(x) < 2 or len(y) < 2:
        raise InputError("samples", tuple(samples.shape), f"at least two, of the bank's shape {tuple(bank.shape[1:])}")
    apart = torch.cdist(y, y).fill_diagonal_(float("inf")).min(1).values
    near, item = torch.cdist(x, y).min(1)
    own = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(float("inf")).min(1).values
    return {
        "nearest": (near.mean() / apart.mean()).item(),
        "near_copies": (near < 0.5 * apart[item]).double().mean().item(),
        "repeats": (own < 0.1 * apart.mean()).double().mean().item(),
    }


def trajectory(pipe: Any, latents: Tensor, *, start: int | None = None, stride: int = 1, **arguments: Any) -> Tensor:
    """Where ``latents`` go along the model's own probability flow: DDIM at (by default) every training time.

    Samplers that begin below the last training time (``leading`` spacing) solve another problem than those
    that begin there: give ``start``, their first timestep, to compare with the same start.

    Args:
        pipe: a pipeline that takes ``latents``, ``timesteps`` and ``output_type="latent"``; its own
            scheduler is left as it was.
        latents: standard normal, (B, C, H, W).
        start: the first timestep; None for the last training time.
        stride: from each timestep to the next.
        arguments: further ones of the pipeline (labels, guidance_scale, ...).
    """
    from steersman.diffusion import DDIMScheduler

    own = pipe.scheduler
    last = own.config.num_train_timesteps - 1
    start = last if start is None else start
    for name, value, low, high in (("start", start, 0, last), ("stride", stride, 1, last + 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(name, value, f"a whole number from {low} to {high}")
    try:
        pipe.scheduler = DDIMScheduler.from_config(own.config)
        times = list(range(start, -1, -stride))
        return pipe(latents=latents, timesteps=times, output_type="latent", **arguments).images
    finally:
        pipe.scheduler = own


def endpoint_error(x: Tensor, reference: Tensor) -> float:
    """Root mean square difference from the trajectory's endpoints, per pixel."""
    if x.shape != reference.shape:
        raise InputError("x", tuple(x.shape), f"of the shape of its reference, {tuple(reference.shape)}")
    return (x.double() - reference.double()).square().mean().sqrt().item()
