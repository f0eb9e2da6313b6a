"""Figures of points in the plane, against closed forms of the mixtures."""

from __future__ import annotations

import math

import pytest
import torch

from steersman.errors import InputError
from steersman.reference import point_metrics as pm
from steersman.reference.gaussians import Mixture, mixture


def draw(law: Mixture, n: int, seed: int) -> torch.Tensor:
    return law.sample(n, torch.Generator().manual_seed(seed), torch.float64)[0]


@pytest.mark.parametrize("name", ["ring", "ring-sharp", "ring-unequal", "nested"])
def test_mode_weights_of_exact_samples_are_unbiased(name):
    """Also where modes overlap and counting the nearest mode would be wrong."""
    law = mixture(name)
    estimates = torch.stack([pm.mode_weights(law, draw(law, 500, seed)) for seed in range(40)])
    error = (estimates.mean(0) - law.weights).abs()
    assert (error < 5 * estimates.std(0) / math.sqrt(40) + 1e-12).all()
    assert (estimates.sum(1) - 1).abs().max() < 1e-12


def test_counting_the_nearest_mode_would_be_biased_where_modes_overlap():
    law = mixture("nested")
    x = draw(law, 20_000, 0)
    nearest = torch.cdist(x, law.means).argmin(1).bincount(minlength=5) / len(x)
    assert (nearest - law.weights).abs().max() > 0.05
    assert (pm.mode_weights(law, x) - law.weights).abs().max() < 0.02


def test_dropped_modes_are_seen():
    law = mixture("ring-sharp")
    x = draw(law, 4000, 1)
    half = x[x[:, 0] > 0.1]  # the three modes on the right
    assert pm.mode_weight_error(law, half) == pytest.approx(5 / 8, abs=0.03)
    assert pm.mode_coverage(law, half) == 3 / 8
    assert pm.mode_coverage(law, x) == 1.0
    assert pm.mode_weight_error(law, law.means[:1].expand(10, 2)) == pytest.approx(7 / 8, abs=1e-9)


def test_share_on_the_manifold_of_one_gaussian():
    law = Mixture([[0.0, 0.0]], 0.3)
    share = pm.on_manifold(law, draw(law, 40_000, 2), radius=2.0)
    assert share == pytest.approx(1 - math.exp(-2), abs=5 * 0.34 / 200)
    assert pm.on_manifold(law, torch.full((3, 2), 5.0)) == 0.0


def test_cross_entropy_of_exact_samples_is_the_entropy():
    law = Mixture([[1.0, -2.0]], 0.7)
    exact = math.log(2 * math.pi * math.e * 0.7**2)
    assert pm.cross_entropy(law, draw(law, 40_000, 3)) == pytest.approx(exact, abs=5 / 200)


def test_distances_of_a_shift_are_its_length():
    law = mixture("ring")
    x = draw(law, 300, 4)
    figures = pm.point_metrics(law, x + torch.tensor([0.3, 0.4]), x)
    assert figures["wasserstein"] == pytest.approx(0.5, rel=1e-6)
    assert figures["sliced_wasserstein"] == pytest.approx(0.5 / math.sqrt(2), rel=1e-6)


def test_floor_falls_with_the_number_of_points_and_is_below_a_wrong_law():
    law = mixture("ring")
    rng = torch.Generator().manual_seed(5)
    few, many = pm.floor(law, 100, rng), pm.floor(law, 1500, rng)
    assert many["wasserstein"] < few["wasserstein"] and many["sliced_wasserstein"] < few["sliced_wasserstein"]
    wide = pm.point_metrics(law, draw(law, 1500, 6) * 1.2, draw(law, 1500, 7))
    assert wide["sliced_wasserstein"] > 2 * many["sliced_wasserstein"]
    assert set(wide) == set(many)


def test_refuses():
    law = mixture("ring")
    with pytest.raises(InputError, match=r"^x="):
        pm.point_metrics(law, torch.full((4, 2), math.nan), torch.zeros(4, 2))
    with pytest.raises(InputError, match=r"^x="):
        pm.mode_weights(law, torch.zeros(4, 3))
    with pytest.raises(InputError, match=r"^radius="):
        pm.on_manifold(law, torch.zeros(4, 2), radius=0)
