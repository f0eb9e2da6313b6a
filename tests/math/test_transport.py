"""Wasserstein distances, against closed forms, SciPy and POT."""

from __future__ import annotations

import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from steersman.errors import InputError, MissingExtra
from steersman.math.transport import directions, sliced_wasserstein, wasserstein, wasserstein_1d


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return shift + torch.randn(n, d, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 35), (7, 64), (1, 9)])
def test_one_dimension_agrees_with_scipy_and_pot(n, m):
    u, v = normal(n, 1, 0)[:, 0], normal(m, 1, 1, 0.4)[:, 0]
    assert wasserstein_1d(u, v, 1).item() == pytest.approx(wasserstein_distance(u, v), rel=1e-12)
    for p in (1, 2, 3):
        assert wasserstein_1d(u, v, p).item() == pytest.approx(ot.wasserstein_1d(u, v, p=p).item(), rel=1e-10)


def test_quantile_integral_of_uniform_laws():
    """W_2² between uniform grids on [0, 1] and on [a, a+b] tends to its integral, ∫ (a + (b-1)q)² dq."""
    q = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    r = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    a, b = 0.3, 2.0
    exact = a * a + a * (b - 1) + (b - 1) ** 2 / 3
    assert wasserstein_1d(q, a + b * r).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 30)])
def test_sliced_agrees_with_pot_on_the_same_directions(n, m):
    u, v = normal(n, 2, 2), normal(m, 2, 3, 0.5)
    theta = directions(64, 2).numpy()
    peer = ot.sliced_wasserstein_distance(u.numpy(), v.numpy(), p=2, projections=theta)
    assert sliced_wasserstein(u, v, count=64).item() == pytest.approx(peer, rel=1e-10)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_sliced_distance_of_a_translation(d):
    """SW_2(u, u + c)² = |c|² / d, exactly in the plane, where the directions are a quadrature."""
    u, c = normal(30, d, 4), torch.arange(1.0, d + 1, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    got = sliced_wasserstein(u, u + c, count=4000 if d > 2 else 8, generator=rng).item()
    assert got == pytest.approx(c.norm().item() / math.sqrt(d), rel=0.03 if d > 2 else 1e-12)


def test_exact_distance_is_the_best_permutation():
    u, v = normal(6, 2, 5), normal(6, 2, 6)
    cost = torch.cdist(u, v).square()
    best = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
    assert wasserstein(u, v) == pytest.approx(math.sqrt(best.item() / 6), rel=1e-12)


def test_exact_distance_agrees_with_pot_and_splits_mass():
    u, v = normal(60, 3, 7), normal(60, 3, 8, 0.7)
    cost = ot.dist(u.numpy(), v.numpy(), "sqeuclidean")
    assert wasserstein(u, v) == pytest.approx(math.sqrt(ot.emd2([], [], cost)), rel=1e-10)
    # Doubling every point changes no law: 120 against 60 points go through the other algorithm.
    assert wasserstein(torch.cat([u, u]), v) == pytest.approx(wasserstein(u, v), rel=1e-9)
    assert wasserstein(u, u + 2.0) == pytest.approx(2 * math.sqrt(3), rel=1e-12)


def test_sliced_distance_has_the_right_gradient():
    u, v = normal(6, 2, 9).requires_grad_(), normal(4, 2, 10)
    assert torch.autograd.gradcheck(lambda x: sliced_wasserstein(x, v, count=5), (u,))


def test_unequal_sizes_without_pot_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    with pytest.raises(MissingExtra, match=r"steersman\[reference\]"):
        wasserstein(normal(5, 2, 0), normal(4, 2, 1))
    assert wasserstein(normal(5, 2, 0), normal(5, 2, 1)) > 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: wasserstein(x, x[:, :1]), "v"),
        (lambda x: wasserstein(x[:, 0], x), "u"),
        (lambda x: sliced_wasserstein(x.long(), x), "u"),
        (lambda x: sliced_wasserstein(x, x, count=0), "count"),
        (lambda x: sliced_wasserstein(x, x, 0.5), "p"),
        (lambda x: wasserstein(x, x, math.nan), "p"),
        (lambda x: wasserstein_1d(x, x[:, :1]), "v"),
    ],
)
def test_refuses(call, named):
    with pytest.raises(InputError, match=f"^{named}="):
        call(normal(5, 2, 0))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 15), m=st.integers(1, 15), p=st.sampled_from([1.0, 2.0, 3.0]), seed=st.integers(0, 999))
def test_one_slice_bounds_and_equals_in_one_dimension(n, m, p, seed):
    """In one dimension sliced and exact distance are the same; in more, slices can't be longer."""
    u, v = normal(n, 1, seed), normal(m, 1, seed + 1, 0.5)
    exact = wasserstein(u, v, p)
    assert sliced_wasserstein(u, v, p, count=3).item() == pytest.approx(exact, rel=1e-8, abs=1e-9)
    u, v = normal(n, 2, seed), normal(m, 2, seed + 1, 0.5)
    assert sliced_wasserstein(u, v, p, count=16).item() <= wasserstein(u, v, p) + 1e-9
    assert np.isfinite(exact)
