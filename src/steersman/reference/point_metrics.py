r"""Figures for samples in the plane, against a mixture that is known exactly.

A sample is compared with an *exact* sample of the mixture: sliced and exact Wasserstein distance, both 2,
have a floor, the distance of two exact samples of the same sizes, which is reported beside them
(:func:`floor`). Mode weights and the cross-entropy need no second sample:

    w^_k = mean_i r_k(x_i),   E_p r_k(x) = w_k      |w^ - w| = 1/2 sum_k |w^_k - w_k|  (total variation)
"""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.errors import InputError
from steersman.math.transport import sliced_wasserstein, wasserstein
from steersman.reference.gaussians import Mixture


def mode_weights(law: Mixture, x: Tensor) -> Tensor:
    """w^_k: the mean responsibility of each mode for the points ``x`` (n, 2); unbiased for w_k under the law."""
    return law.responsibilities(x.double()).mean(0)


def mode_weight_error(law: Mixture, x: Tensor) -> float:
    """Total variation distance of :func:`mode_weights` from the mixture's own weights, in [0, 1]."""
    return 0.5 * (mode_weights(law, x) - law.weights).abs().sum().item()


def mode_coverage(law: Mixture, x: Tensor) -> float:
    """Share of the modes that got at least a fifth of the mass they should have."""
    return (mode_weights(law, x) >= 0.2 * law.weights).double().mean().item()


def on_manifold(law: Mixture, x: Tensor, radius: float = 3.0) -> float:
    """Share of the points within ``radius`` standard deviations of some mode.

    In the plane a single Gaussian has 1 - exp(-radius²/2) of its mass there: 98.9% for 3.
    """
    if not radius > 0:
        raise InputError("radius", radius, "a number above 0")
    gaps = torch.cdist(x.double(), law.means) / law.std
    return (gaps.min(1).values <= radius).double().mean().item()


def cross_entropy(law: Mixture, x: Tensor) -> float:
    """-mean log p(x_i) in nats; for exact samples its mean is the mixture's entropy."""
    return -law.log_prob(x.double()).mean().item()


def point_metrics(law: Mixture, x: Tensor, exact: Tensor) -> dict[str, float]:
    """All figures of the points ``x`` (n, 2), beside the exact sample ``exact`` (m, 2).

    Returns:
        ``sliced_wasserstein``, ``wasserstein``, ``mode_weight_error``, ``mode_coverage``,
        ``on_manifold``, ``cross_entropy``.

    Raises:
        InputError: points that are not finite.
    """
    if not bool(x.isfinite().all()):
        raise InputError("x", "points", "finite")
    x, exact = x.double(), exact.double()
    return {
        "sliced_wasserstein": sliced_wasserstein(x, exact).item(),
        "wasserstein": wasserstein(x, exact),
        "mode_weight_error": mode_weight_error(law, x),
        "mode_coverage": mode_coverage(law, x),
        "on_manifold": on_manifold(law, x),
        "cross_entropy": cross_entropy(law, x),
    }


def floor(law: Mixture, count: int, generator: torch.Generator | None = None) -> dict[str, float]:
    """:func:`point_metrics` of one exact sample of ``count`` points beside another: what no sampler beats."""
    x, _ = law.sample(count, generator, torch.float64)
    exact, _ = law.sample(count, generator, torch.float64)
    return point_metrics(law, x, exact)
