"""Kernel and Frechet distances, precision and recall, against closed forms and other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import linear_kernel, polynomial_kernel, rbf_kernel
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from steersman.errors import InputError
from steersman.math.divergences import (
    KERNELS,
    frechet,
    frechet_gaussians,
    kernel_matrix,
    median_gamma,
    mmd2,
    moments,
    precision_recall,
)

SKLEARN = {"polynomial": polynomial_kernel, "linear": linear_kernel, "rbf": rbf_kernel}


def normal(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, d, generator=rng, dtype=torch.float64)


# ------------------------------------------------------------------ MMD, against closed forms


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_those_of_scikit_learn(kernel):
    a, b = normal(7, 4, 0, shift=30.0), normal(5, 4, 1, shift=30.0)
    expected = SKLEARN[kernel](a.numpy(), b.numpy()) / (4 if kernel == "linear" else 1)
    np.testing.assert_allclose(kernel_matrix(a, b, kernel).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_is_the_sum_written_out_for_unequal_sizes(kernel):
    u, v = normal(6, 3, 0), normal(9, 3, 1, shift=0.5)
    n, m = len(u), len(v)

    def k(a, b):
        return kernel_matrix(a[None], b[None], kernel).item()

    same_u = sum(k(u[i], u[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same_v = sum(k(v[i], v[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    cross = sum(k(a, b) for a in u for b in v) / (n * m)
    assert mmd2(u, v, kernel).item() == pytest.approx(same_u + same_v - 2 * cross, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_v_statistic_differs_by_the_diagonals(kernel):
    """biased - unbiased = [mean_i k(u_i,u_i) - mean_{i≠j} k(u_i,u_j)]/n + the same for v."""
    u, v = normal(11, 3, 2), normal(8, 3, 3)

    def gap(x):
        gram, n = kernel_matrix(x, x, kernel), len(x)
        off = (gram.sum() - gram.trace()) / (n * (n - 1))
        return (gram.trace() / n - off) / n

    difference = mmd2(u, v, kernel, unbiased=False) - mmd2(u, v, kernel)
    assert difference.item() == pytest.approx((gap(u) + gap(v)).item(), abs=1e-10)


def test_linear_kernel_is_the_distance_of_means_less_its_bias():
    u, v = normal(12, 5, 4), normal(12, 5, 5, shift=0.3)
    m, d = u.shape
    expected = (u.mean(0) - v.mean(0)).square().sum() / d - (torch.cov(u.T).trace() + torch.cov(v.T).trace()) / (m * d)
    assert mmd2(u, v, "linear").item() == pytest.approx(expected.item(), abs=1e-10)


def test_cubic_kernel_is_its_feature_expansion_in_two_dimensions():
    """(<a,b>/2 + 1)³ = <phi(a), phi(b)> with the ten monomials up to degree 3."""

    def phi(x):
        terms = []
        for i in range(4):
            for j in range(4 - i):
                weight = math.factorial(3) / (math.factorial(i) * math.factorial(j) * math.factorial(3 - i - j))
                terms.append(math.sqrt(weight / 2 ** (i + j)) * x[:, 0] ** i * x[:, 1] ** j)
        return torch.stack(terms, 1)

    u, v = normal(9, 2, 6), normal(7, 2, 7, shift=0.4)
    fu, fv = phi(u), phi(v)
    n, m = len(u), len(v)
    expected = (
        (fu.sum(0).square().sum() - fu.square().sum()) / (n * (n - 1))
        + (fv.sum(0).square().sum() - fv.square().sum()) / (m * (m - 1))
        - 2 * fu.mean(0) @ fv.mean(0)
    )
    assert mmd2(u, v).item() == pytest.approx(expected.item(), rel=1e-10)


def test_same_law_gives_zero_on_average_and_negative_half_the_time():
    rng = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            mmd2(
                torch.randn(16, 3, generator=rng, dtype=torch.float64),
                torch.randn(20, 3, generator=rng, dtype=torch.float64),
            )
            for _ in range(2000)
        ]
    )
    assert abs(draws.mean()) < 4 * draws.std() / math.sqrt(len(draws))
    assert 0.3 < (draws < 0).double().mean() < 0.8


def test_rbf_between_gaussians_has_its_closed_form():
    """E k = c^{-d/2} exp(-gamma |Δ|²/c) with c = 1 + 2 gamma (va + vb)."""
    d, s1, s2, shift, gamma = 3, 0.8, 1.4, 0.5, 0.3

    def expected_k(va, vb, delta):
        c = 1 + 2 * gamma * (va + vb)
        return c ** (-d / 2) * math.exp(-gamma * d * delta**2 / c)

    exact = expected_k(s1**2, s1**2, 0) + expected_k(s2**2, s2**2, 0) - 2 * expected_k(s1**2, s2**2, shift)
    draws = torch.stack(
        [
            mmd2(normal(30, d, 2 * i, scale=s1), normal(25, d, 2 * i + 1, shift, s2), "rbf", gamma=gamma)
            for i in range(1000)
        ]
    )
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(1000)


def test_cubic_agrees_with_torchmetrics():
    u, v = normal(40, 8, 8), normal(40, 8, 9, shift=0.2)
    assert mmd2(u, v).item() == pytest.approx(poly_mmd(u, v, degree=3, gamma=None, coef=1.0).item(), rel=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_has_the_right_gradient(kernel):
    u, v = normal(5, 2, 10).requires_grad_(), normal(4, 2, 11).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mmd2(a, b, kernel), (u, v))


def test_half_precision_is_computed_in_single():
    u, v = normal(50, 4, 12, scale=8.0), normal(50, 4, 13, scale=8.0)
    half = mmd2(u.half(), v.half())
    assert half.dtype == torch.float32 and bool(half.isfinite())
    assert half.item() == pytest.approx(mmd2(u.half().double(), v.half().double()).item(), rel=1e-3)


def test_median_gamma_is_the_reciprocal_median_square():
    x = torch.tensor([[0.0], [1.0], [3.0]])  # squares 1, 4, 9
    assert median_gamma(x) == pytest.approx(1 / 4)
    assert median_gamma(x[:2], x[2:]) == pytest.approx(1 / 4)


# ------------------------------------------------------------------ Frechet


def test_frechet_of_commuting_covariances_has_its_closed_form():
    a, b, shift = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0]), np.array([1.0, -2.0, 0.5])
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = frechet_gaussians(np.zeros(3), q * a @ q.T, q @ shift, q * b @ q.T)
    assert got == pytest.approx(expected, rel=1e-12)


def test_frechet_agrees_with_scipy_and_torchmetrics():
    u, v = normal(300, 6, 14), normal(200, 6, 15, 0.3, 1.3) @ normal(6, 6, 16)
    m1, s1 = moments(u.numpy())
    m2, s2 = moments(v.numpy())
    root = sqrtm(s1 @ s2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert frechet(u, v) == pytest.approx(expected, rel=1e-9)
    peer = _compute_fid(*(torch.from_numpy(x) for x in (m1, s1, m2, s2)))
    assert frechet(u, v) == pytest.approx(peer.item(), rel=1e-9)


def test_frechet_of_singular_covariances():
    """Fewer samples than features: the distance is that within the subspace which the samples span."""
    u, v = normal(5, 3, 17), normal(5, 3, 18, shift=1.0)
    wide = torch.zeros(3, 40, dtype=torch.float64)
    wide[range(3), range(3)] = 1.0
    assert frechet(u @ wide, v @ wide) == pytest.approx(frechet(u, v), abs=1e-9)
    assert frechet(u @ wide, u @ wide) == pytest.approx(0.0, abs=1e-12)


# ------------------------------------------------------------------ precision and recall


def test_precision_and_recall_are_their_definition():
    real, fake, k = normal(30, 2, 19), normal(25, 2, 20, shift=0.8), 3

    def inside(points, manifold):
        count = 0
        for p in points.numpy():
            hit = False
            for c in manifold.numpy():
                radius = np.sort(np.linalg.norm(manifold.numpy() - c, axis=1))[k]  # [0] is the point itself
                hit = hit or np.linalg.norm(p - c) <= radius
            count += hit
        return count / len(points)

    assert precision_recall(real, fake, k) == (inside(fake, real), inside(real, fake))


def test_dropped_mode_keeps_precision_and_halves_recall():
    left, right = normal(60, 2, 21, shift=-20.0), normal(60, 2, 22, shift=20.0)
    real = torch.cat([left, right])
    precision, recall = precision_recall(real, left)
    assert precision == 1.0 and recall == 0.5
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, normal(50, 2, 23, shift=200.0)) == (0.0, 0.0)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"u": torch.zeros(1, 3)}, "u"),
        ({"u": torch.zeros(4, 3, dtype=torch.long)}, "u"),
        ({"u": torch.zeros(4)}, "u"),
        ({"v": torch.zeros(4, 2)}, "v"),
        ({"kernel": "cubic"}, "kernel"),
        ({"degree": 0}, "degree"),
        ({"degree": True}, "degree"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"coef0": -1.0}, "coef0"),
    ],
)
def test_mmd_refuses(change, named):
    arguments = {"u": torch.zeros(4, 3), "v": torch.zeros(5, 3)} | change
    with pytest.raises(InputError, match=f"^{named}="):
        mmd2(**arguments)


def test_frechet_and_precision_refuse():
    with pytest.raises(InputError, match=r"^x="):
        frechet(np.zeros((1, 2)), np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"^x="):
        frechet(np.full((3, 2), np.nan), np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"^m2="):
        frechet(np.zeros((3, 2)), np.zeros((3, 3)))
    with pytest.raises(InputError, match=r"^fake="):
        precision_recall(torch.zeros(5, 2), torch.zeros(3, 2), k=3)
    with pytest.raises(InputError, match=r"^k="):
        precision_recall(torch.zeros(5, 2), torch.zeros(5, 2), k=0)
    with pytest.raises(InputError, match=r"^x="):
        median_gamma(torch.zeros(5, 2))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 12),
    m=st.integers(2, 12),
    d=st.integers(1, 5),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 1000),
)
def test_distances_are_symmetric_and_do_not_depend_on_order(n, m, d, kernel, seed):
    u, v = normal(n, d, seed), normal(m, d, seed + 1, shift=0.5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    value = mmd2(u, v, kernel).item()
    assert mmd2(v, u, kernel).item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert mmd2(u[order], v, kernel).item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert mmd2(u, v, kernel, unbiased=False).item() >= -1e-12
    assert frechet(u, v) == pytest.approx(frechet(v, u), rel=1e-7, abs=1e-9)
