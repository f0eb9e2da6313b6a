"""Semi-discrete transport: closed forms, the energy's gradient, balance, and an exact solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment

from steersman.errors import InputError
from steersman.math.semidiscrete import (
    SemiDiscreteMap,
    cell_masses,
    draw,
    duplicates,
    energy,
    facet_angles,
    fit,
    leaders,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, d, generator=generator(seed), dtype=torch.float64)


LINE = torch.tensor([[-2.0], [-0.5], [0.1], [0.3], [1.0], [1.7], [2.2], [3.0]], dtype=torch.float64)


def on_the_line(y: torch.Tensor, source: str) -> torch.Tensor:
    """h_{i+1} = h_i - q_i (y_{i+1} - y_i), with q_i the i/M quantile of the source: where cells meet."""
    q = np.arange(1, len(y)) / len(y)
    q = torch.from_numpy(q if source == "uniform" else stats.norm.ppf(q))
    h = torch.cat([torch.zeros(1, dtype=torch.float64), -(q * y[:, 0].diff()).cumsum(0)])
    return h - h.mean()


# ------------------------------------------------------------------ exact checks


@pytest.mark.parametrize("source", ["gaussian", "uniform"])
@pytest.mark.parametrize(("method", "batch"), [("newton", 4096), ("adam", 200_000)])
def test_the_closed_form_on_the_line(source, method, batch):
    exact = on_the_line(LINE, source)
    w = cell_masses(draw(source, (200_000, 1), generator()), LINE, exact)
    assert ((w - 1 / 8).abs() < 3.5 * (7 / 64 / 200_000) ** 0.5).all()
    found = fit(LINE, source=source, method=method, tolerance=0.005, batch_size=batch, generator=generator(1))
    assert (found.h - exact).abs().max() < 1e-2


@pytest.mark.parametrize("d", [1, 3, 40])
def test_two_points_have_equal_heights_under_an_isotropic_law(d):
    y = points(2, d)
    found = fit(y, tolerance=0.002, generator=generator())
    assert (found.h[0] - found.h[1]).abs() < 0.01 * (y[0] - y[1]).norm()
    x = points(500, d, 1)
    half_space = x @ (y[1] - y[0]) > found.h[0] - found.h[1]
    assert torch.equal(found.transport(x), half_space.long())


def test_the_energys_gradient_is_the_excess_mass():
    y, x, h = points(12, 3), points(4000, 3, 1), 0.3 * points(12, 1, 2)[:, 0]
    ν = torch.full((12,), 1 / 12, dtype=torch.float64)
    g = cell_masses(x, y, h) - ν
    for i in range(12):
        step = torch.zeros(12, dtype=torch.float64)
        step[i] = 1e-7
        difference = (energy(x, y, h + step, ν) - energy(x, y, h - step, ν)) / 2e-7
        assert difference.item() == pytest.approx(g[i].item(), abs=1e-6)


def test_any_heights_make_a_monotone_map():
    y, h, x = points(30, 4), 2 * points(30, 1, 2)[:, 0], points(400, 4, 1)
    image = y[leaders(x, y, h)[1][:, 0]]
    gaps = x[:, None] - x[None]
    assert (gaps * (image[:, None] - image[None])).sum(2).min() >= -1e-12


def test_equivariance():
    y, x, h, c = points(20, 3), points(5000, 3, 1), points(20, 1, 2)[:, 0], torch.tensor([1.0, -2.0, 0.5]).double()
    w = cell_masses(x, y, h)
    assert torch.equal(cell_masses(x, y, h + 5.0), w)
    assert torch.equal(cell_masses(x + c, y, h - y @ c), w)
    one, twice, shifted = (fit(bank, generator=generator()) for bank in (y, 4 * y, y + c))
    torch.testing.assert_close(twice.h, 4 * one.h, rtol=1e-5, atol=1e-5)
    assert torch.equal(one.transport(x), twice.transport(x))
    assert (one.transport(x) == shifted.transport(x)).double().mean() > 0.999


def test_against_an_exact_discrete_solver():
    y, x = points(20, 3), points(2000, 3, 1)
    cost = 0.5 * torch.cdist(x, y).square()
    rows, columns = linear_sum_assignment(cost.repeat_interleave(100, 1).numpy())
    best = cost[rows, columns // 100].mean()
    found = fit(
        y, source=x, method="adam", learning_rate=0.01, tolerance=1e-9, max_iterations=3000, generator=generator()
    )
    index = found.transport(x)
    assert (torch.bincount(index, minlength=20) - 100).abs().max() <= 3
    assert cost[torch.arange(2000), index].mean() == pytest.approx(best.item(), rel=0.01)
    newton = fit(y, source=x, tolerance=0.01, max_iterations=300, generator=generator())
    assert (torch.bincount(newton.transport(x), minlength=20) - 100).abs().max() <= 3


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 131, 1000])
def test_chunks_change_nothing(k, chunk):
    y, h, x = points(131, 5), points(131, 1, 2)[:, 0], points(700, 5, 1)
    whole, parts = leaders(x, y, h, k), leaders(x, y, h, k, chunk)
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(whole[1], (x @ y.T + h).argsort(1, descending=True)[:, :k])
    # With whole numbers every sum is exact, so there are true ties; the lowest index wins.
    y, h, x = y.round(), h.round(), x.round()
    assert torch.equal(leaders(x, y, h, 1, chunk)[1], (x @ y.T + h).max(1, keepdim=True)[1])


@pytest.mark.parametrize(("count", "d", "source"), [(64, 2, "gaussian"), (100, 64, "gaussian"), (50, 8, "uniform")])
def test_cells_are_balanced_after_a_fit(count, d, source):
    found = fit(points(count, d), source=source, tolerance=0.05, generator=generator())
    assert found.converged and found.empty == 0 and found.residual < 0.0625
    x = draw(source, (20 * count, d), generator(7))
    hits = np.bincount(found.transport(x), minlength=count)
    assert hits.min() > 0
    assert stats.chisquare(hits).pvalue > 0.01


def test_unequal_weights_and_a_bank_of_one():
    ν = torch.tensor([1.0, 2.0, 3.0, 10.0])
    found = fit(points(4, 3), ν, tolerance=0.01, generator=generator())
    torch.testing.assert_close(found.masses, (ν / 16).double(), atol=0.005, rtol=0)
    one = fit(points(1, 3), generator=generator())
    assert one.h.tolist() == [0.0] and one.transport(points(5, 3)).tolist() == [0] * 5


def test_newton_balances_what_the_published_solver_cannot_in_as_many_draws():
    y = points(256, 2)
    newton = fit(y, generator=generator())
    adam = fit(y, method="adam", max_iterations=newton.draws // 4096, batch_size=4096, generator=generator())
    assert newton.converged and adam.draws >= newton.draws
    assert adam.residual > 5 * newton.residual


def test_same_generator_same_heights_and_progress():
    seen = []
    y = points(16, 3)
    a = fit(y, generator=generator(3), progress=lambda *facts: seen.append(facts))
    assert torch.equal(a.h, fit(y, generator=generator(3)).h)
    assert [i for i, _, _ in seen] == list(range(1, a.iterations + 1)) and 0 < seen[-1][2] <= a.draws
    assert len(a.history) == a.iterations


# ------------------------------------------------------------------ the singular set


def clusters() -> SemiDiscreteMap:
    """Two far groups of near points: T jumps only where the groups meet."""
    y = torch.cat([points(20, 2) * 0.1 + torch.tensor([3.0, 0.0]), points(20, 2, 1) * 0.1 - torch.tensor([3.0, 0.0])])
    return fit(y, tolerance=0.1, topk=4, generator=generator())


def test_facet_angles_are_those_of_the_normals():
    y = points(6, 4)
    n = torch.cat([y, -torch.ones(6, 1)], 1)
    n = n / n.norm(dim=1, keepdim=True)
    index = torch.tensor([[0, 3, 5], [2, 1, 4]])
    expected = torch.stack([(n[i] @ n[j]).arccos() for row in index for i, j in ((row[0], row[1]), (row[0], row[2]))])
    torch.testing.assert_close(facet_angles(y, index), expected.reshape(2, 2))


def test_draws_near_the_fold_are_singular_and_redrawn():
    found = clusters()
    fold = torch.cat([torch.linspace(-0.01, 0.01, 9)[:, None], torch.zeros(9, 1)], 1).double()
    far = torch.tensor([[2.0, 0.3], [-1.5, -0.2]]).double()
    between = found.singular(torch.cat([fold, far]), 2, 0.7)
    assert bool(between.any()) and not bool(between[-2:].any())
    x = torch.cat([fold, far, points(200, 2, 5)])
    kept, index = found.sample(x, generator(1), topk=2, threshold=0.7)
    assert len(kept) == len(x) and not bool(found.singular(kept, 2, 0.7).any())
    fine = ~found.singular(x, 2, 0.7)
    assert torch.equal(kept[fine], x[fine]) and torch.equal(index[fine], found.transport(x[fine]))
    for row in (0, 10, 100):  # what is singular does not depend on the batch
        assert found.singular(x[row : row + 1], 2, 0.7).item() == found.singular(x, 2, 0.7)[row].item()
    with pytest.raises(InputError, match=r"threshold.*100 redraws"):
        found.sample(points(50, 2), generator(), topk=4, threshold=0.0)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("bank", "keywords", "named"),
    [
        (torch.zeros(0, 3), {}, "bank"),
        (torch.zeros(5), {}, "bank"),
        (torch.ones(4, 3), {}, "3 duplicates among 4 points"),
        (torch.tensor([[1.0, float("nan")]]), {}, "finite"),
        (torch.tensor([[1, 2]]), {}, "floating-point"),
        (torch.eye(3), {"weights": torch.tensor([1.0, 0.0, 1.0])}, "weights"),
        (torch.eye(3), {"source": "cauchy"}, "source='cauchy'"),
        (torch.eye(3), {"source": torch.zeros(5, 2)}, "source"),
        (torch.eye(3), {"method": "sgd"}, "method='sgd'"),
        (torch.eye(3), {"tolerance": 0.0}, "tolerance=0.0"),
        (torch.eye(3), {"max_iterations": 0}, "max_iterations=0"),
        (torch.eye(3), {"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_refusals(bank, keywords, named):
    with pytest.raises(InputError, match=named):
        fit(bank, generator=generator(), **keywords)


def test_refusals_of_a_fitted_map():
    found = clusters()
    for call, named in (
        (lambda: found.transport(torch.zeros(4, 3)), "x="),
        (lambda: found.transport(torch.full((4, 2), float("inf"))), "finite"),
        (lambda: found.singular(torch.zeros(4, 2), 9, 0.5), "topk=9.*from 1 to 4"),
        (lambda: found.singular(torch.zeros(4, 2), 2, 1.5), "threshold=1.5"),
        (lambda: draw("cauchy", (2, 2)), "gaussian, uniform"),
    ):
        with pytest.raises(InputError, match=named):
            call()
    assert duplicates(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]])) == 1
