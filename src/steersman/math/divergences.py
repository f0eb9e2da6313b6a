r"""Distances between distributions known by samples or by moments.

Maximum mean discrepancy of a kernel k between laws P and Q:

    MMD²(P, Q) = E k(u, u') + E k(v, v') - 2 E k(u, v),     u, u' ~ P,  v, v' ~ Q independent,

whose unbiased estimate from n and m samples leaves the diagonals out of the two same-set means
(Gretton et al., "A kernel two-sample test", JMLR 2012, eq. 3). With the cubic kernel
(<a, b>/d + 1)³ in a network's features it is the kernel Inception distance (Binkowski et al.,
"Demystifying MMD GANs", ICLR 2018).

Frechet (2-Wasserstein) distance of two Gaussians, squared, as in the Frechet Inception distance
(Dowson & Landau, 1982; Heusel et al., NeurIPS 2017):

    d² = |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1^{1/2} S2 S1^{1/2})^{1/2}.

Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019): the share of one set that falls
within the union of balls around the points of the other, each with the radius of its k-th neighbour.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from steersman.errors import InputError

Kernel = Literal["polynomial", "linear", "rbf"]
KERNELS = ("polynomial", "linear", "rbf")


def kernel_matrix(
    a: Tensor,
    b: Tensor,
    kernel: Kernel = "polynomial",
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> Tensor:
    """k(a_i, b_j) for all pairs.

        polynomial: (gamma <a, b> + coef0)^degree    linear: gamma <a, b>    rbf: exp(-gamma |a - b|²)

    Args:
        a, b: points, (n, d) and (m, d), floating point.
        kernel: polynomial, linear or rbf.
        degree, coef0: of the polynomial kernel; a whole number from 1, a finite number from 0.
        gamma: above 0; None for 1/d.

    Returns:
        (n, m), differentiable in ``a`` and ``b``.
    """
    if kernel not in KERNELS:
        raise InputError("kernel", kernel, f"one of {', '.join(KERNELS)}")
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise InputError("degree", degree, "a whole number from 1")
    if gamma is not None and not 0 < gamma < float("inf"):
        raise InputError("gamma", gamma, "a finite number above 0, or None for 1/d")
    if not 0 <= coef0 < float("inf"):
        raise InputError("coef0", coef0, "a finite number from 0")
    if gamma is None:
        gamma = 1.0 / a.shape[1]
    if kernel == "rbf":
        # |a - b|² by the expanded square loses digits far from the origin: take a common centre out first.
        centre = b.detach().mean(0)
        a, b = a - centre, b - centre
        square = a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * (a @ b.T)
        return torch.exp(-gamma * square.clamp_min(0))
    if kernel == "linear":
        return gamma * (a @ b.T)
    return (gamma * (a @ b.T) + coef0) ** degree


def mmd2(
    u: Tensor,
    v: Tensor,
    kernel: Kernel = "polynomial",
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    unbiased: bool = True,
) -> Tensor:
    """The squared maximum mean discrepancy between the laws that ``u`` and ``v`` were drawn from.

        sum_{i≠j} k(u_i, u_j)/(n(n-1)) + sum_{i≠j} k(v_i, v_j)/(m(m-1)) - 2 sum_{ij} k(u_i, v_j)/(nm)

    and, with ``unbiased=False``, the V-statistic: the same means with the diagonals in. The unbiased
    estimate is negative in about half of the draws when both laws are the same.

    Args:
        u: samples of one law, (n, d), n >= 2.
        v: samples of the other, (m, d), m >= 2; n and m may differ.
        kernel, degree, gamma, coef0: as in :func:`kernel_matrix`; the default is the cubic kernel of KID.
        unbiased: leave the diagonals out of the same-set means.

    Returns:
        a scalar, differentiable in ``u`` and ``v``. Half precision is computed in float32.

    Raises:
        InputError: a shape, dtype, kernel or parameter that is not allowed.
    """
    for name, x in (("u", u), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(name, getattr(x, "dtype", type(x).__name__), "a floating-point tensor")
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
            raise InputError(name, tuple(x.shape), "of shape (samples, features) with at least 2 samples")
    if u.shape[1] != v.shape[1]:
        raise InputError("v", tuple(v.shape), f"of {u.shape[1]} features, as u")
    # The cubic kernel grows as |f|⁶/d³, past what half precision holds.
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), torch.float32)
    u, v = u.to(dtype), v.to(dtype)

    def k(a: Tensor, b: Tensor) -> Tensor:
        return kernel_matrix(a, b, kernel, degree=degree, gamma=gamma, coef0=coef0)

    def within(x: Tensor) -> Tensor:
        gram = k(x, x)
        n = len(x)
        return (gram.sum() - gram.diagonal().sum()) / (n * (n - 1)) if unbiased else gram.mean()

    return within(u) + within(v) - 2 * k(u, v).mean()


def median_gamma(x: Tensor, y: Tensor | None = None) -> float:
    """The rbf kernel's gamma by the median heuristic: 1 / median |z_i - z_j|² over all pairs i < j.

    Args:
        x, y: samples (n, d) and (m, d); z is their union.
    """
    z = x if y is None else torch.cat([x, y])
    if z.ndim != 2 or len(z) < 2:
        raise InputError("x", tuple(z.shape), "of shape (samples, features) with at least 2 samples")
    median = torch.pdist(z.detach().double()).square().median().item()
    if not 0 < median < float("inf"):
        raise InputError("x", "samples", "of more than one point")
    return 1.0 / median


def moments(x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and sample covariance (d, d) of the rows of ``x``, in float64."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise InputError("x", x.shape, "of shape (samples, features) with at least 2 samples")
    if not np.isfinite(x).all():
        raise InputError("x", "samples", "finite")
    return x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def frechet_gaussians(m1: ArrayLike, s1: ArrayLike, m2: ArrayLike, s2: ArrayLike) -> float:
    """The squared Frechet distance of N(m1, S1) and N(m2, S2).

        |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1^{1/2} S2 S1^{1/2})^{1/2}

    The last trace is computed as the sum of the singular values of S1^{1/2} S2^{1/2}, so that singular
    covariances (fewer samples than features) need no offset on the diagonal.

    Args:
        m1, m2: means (d,).
        s1, s2: covariances (d, d), symmetric and positive semidefinite.
    """
    m1, s1, m2, s2 = (np.asarray(x, np.float64) for x in (m1, s1, m2, s2))
    for name, x, shape in (("m2", m2, m1.shape), ("s1", s1, m1.shape * 2), ("s2", s2, m1.shape * 2)):
        if m1.ndim != 1 or x.shape != shape:
            raise InputError(name, x.shape, f"of shape {shape}, to fit m1 of shape {m1.shape}")
        if not np.isfinite(x).all():
            raise InputError(name, "moments", "finite")

    def root(s: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(s)
        # What is below rounding counts as 0: the root would blow an error of 1e-16 up to 1e-8.
        values = np.where(values > len(s) * np.finfo(s.dtype).eps * values[-1], values, 0.0)
        return (vectors * np.sqrt(values)) @ vectors.T

    cross = np.linalg.svd(root(s1) @ root(s2), compute_uv=False).sum()
    return float(max(np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross, 0.0))


def frechet(x: ArrayLike, y: ArrayLike) -> float:
    """The squared Frechet distance of the Gaussians that have the moments of the samples ``x`` and ``y``.

    Biased upwards for few samples: compare only distances from equally many, and print the distance of
    two real splits beside them.

    Args:
        x, y: samples (n, d) and (m, d).
    """
    return frechet_gaussians(*moments(x), *moments(y))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision (share of ``fake`` within the real manifold) and recall (the reverse).

    The manifold of a set is the union of balls around its points, each of the radius of the distance to
    the point's k-th nearest neighbour in the same set, itself not counted.

    Args:
        real, fake: features (n, d) and (m, d), more than k of each.
        k: neighbours; a whole number from 1 (the paper's 3).
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError("k", k, "a whole number from 1")
    for name, x in (("real", real), ("fake", fake)):
        if x.ndim != 2 or len(x) <= k:
            raise InputError(name, tuple(x.shape), f"of shape (samples, features), more than k={k} samples")
    real, fake = real.detach().double(), fake.detach().double()
    exact = "donot_use_mm_for_euclid_dist"  # so that a point's distance to itself is 0, not 1e-8

    def radii(x: Tensor) -> Tensor:
        return torch.cdist(x, x, compute_mode=exact).kthvalue(k + 1, dim=1).values

    between = torch.cdist(real, fake, compute_mode=exact)
    precision = (between <= radii(real)[:, None]).any(0).double().mean().item()
    recall = (between <= radii(fake)[None, :]).any(1).double().mean().item()
    return precision, recall
