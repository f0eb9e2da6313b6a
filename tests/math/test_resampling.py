"""Resamplers: unbiased counts, the identity for equal weights, ranges of the counts, weights of any size, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from steersman.errors import InputError
from steersman.math.resampling import RESAMPLERS, effective_sample_size, resample

METHODS = list(RESAMPLERS)


def counts(index: torch.Tensor) -> torch.Tensor:
    k = index.shape[-1]
    return (index[..., None] == torch.arange(k)).sum(-2)


def weights(groups: int, k: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(groups, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_unbiased(method):
    k, runs = 6, 40_000
    logs = weights(1, k, 1).expand(runs, -1)
    found = counts(resample(logs, method, torch.Generator().manual_seed(2))).double()
    error = (found.mean(0) - k * torch.softmax(logs[0], 0)).abs()
    assert bool((error <= 4.5 * found.std(0) / math.sqrt(runs) + 1e-9).all())
    assert bool((found.sum(1) == k).all())


@pytest.mark.parametrize("method", METHODS)
def test_each_group_is_resampled_by_its_own_weights(method):
    """A group's indices are those that it gets alone, up to the noise: the favourite is another in each."""
    logs = torch.full((5, 5), -50.0, dtype=torch.float64)
    logs.fill_diagonal_(0.0)
    index = resample(logs, method, torch.Generator().manual_seed(0))
    assert bool((index == torch.arange(5)[:, None]).all())


def test_systematic_counts_are_the_expectation_rounded():
    logs = weights(2000, 9)
    expected = 9 * torch.softmax(logs, 1)
    for method, low, high in (("systematic", -1, 1), ("residual", -1, math.inf), ("stratified", -2, 2)):
        gap = counts(resample(logs, method, torch.Generator().manual_seed(1))) - expected
        assert bool((gap > low).all()) and bool((gap < high).all()), method


def test_residual_keeps_the_whole_copies():
    logs = torch.tensor([0.55, 0.3, 0.1, 0.05]).log().expand(100, 4)
    found = counts(resample(logs, "residual", torch.Generator().manual_seed(0)))
    assert bool((found >= torch.tensor([2, 1, 0, 0])).all())
    assert bool((found[:, 2:].sum(1) == 1).any()) and bool((found[:, 0] == 3).any())


@pytest.mark.parametrize("method", ["systematic", "stratified", "residual"])
@pytest.mark.parametrize("k", [2, 3, 7, 49, 1000])
def test_equal_weights_change_nothing(method, k):
    for level in (0.0, -1234.5, 700.1):
        logs = torch.full((300, k), level, dtype=torch.float64)
        index = resample(logs, method, torch.Generator().manual_seed(k))
        assert torch.equal(index, torch.arange(k).expand(300, -1))


@pytest.mark.parametrize("method", METHODS)
def test_only_differences_of_logarithms_count(method):
    logs = weights(50, 8)

    def drawn(x: torch.Tensor) -> torch.Tensor:
        return resample(x, method, torch.Generator().manual_seed(3))

    assert torch.equal(drawn(logs), drawn(logs + 4096.0))
    assert torch.equal(drawn(logs), drawn(logs - 4096.0))


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_is_never_chosen(method):
    logs = weights(3000, 5)
    logs[:, [0, 3, 4]] = -torch.inf
    index = resample(logs, method, torch.Generator().manual_seed(0))
    assert set(index.unique().tolist()) == {1, 2}


def test_the_law_does_not_depend_on_the_order_of_particles():
    logs, order = weights(1, 5, 4), torch.tensor([3, 0, 4, 1, 2])
    for method in METHODS:
        one = counts(resample(logs.expand(20_000, -1), method, torch.Generator().manual_seed(0))).double()
        other = counts(resample(logs[:, order].expand(20_000, -1), method, torch.Generator().manual_seed(1))).double()
        error = (one.mean(0)[order] - other.mean(0)).abs()
        spread = ((one.var(0)[order] + other.var(0)) / 20_000).sqrt()
        assert bool((error <= 4.5 * spread + 1e-9).all()), method


def test_effective_sample_size():
    logs = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -torch.inf, -torch.inf, -torch.inf], [-torch.inf] * 4])
    assert effective_sample_size(logs).tolist() == [4.0, 1.0, 0.0]
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = effective_sample_size(w.log() - 900.0)
    assert float(found) == pytest.approx(1 / float(w.square().sum()), rel=1e-9)


def test_bad_input():
    with pytest.raises(InputError, match="did you mean 'systematic'"):
        resample(torch.zeros(1, 2), "sistematic")
    for bad in (torch.tensor([[0.0, math.nan]]), torch.tensor([[0.0, math.inf]])):
        with pytest.raises(InputError, match=r"NaN or \+inf"):
            resample(bad)
    with pytest.raises(InputError, match="a group of -inf"):
        resample(torch.tensor([[0.0, 0.0], [-math.inf, -math.inf]]))
    with pytest.raises(InputError, match="floating-point"):
        resample(torch.zeros(1, 2, dtype=torch.long))
