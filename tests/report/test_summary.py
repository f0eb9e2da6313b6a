"""Estimates, paired differences and picks, against scipy and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steersman.engine.comparison import Comparison
from steersman.report import summary
from tests.report.toy import comparison_of, fabric_of, rows_of


def test_an_estimate_of_five_values_is_the_t_interval():
    values = [3.1, 2.9, 3.4, 3.3, 2.7]
    found = summary.estimate(values)
    half = stats.t.ppf(0.975, 4) * np.std(values, ddof=1) / math.sqrt(5)
    assert found.kind == "interval" and found.n == 5
    assert found.mean == pytest.approx(3.08)
    assert (found.low, found.high) == pytest.approx((3.08 - half, 3.08 + half))


@pytest.mark.parametrize(
    ("values", "kind", "low", "lost"),
    [
        ([], "none", None, 0),
        ([math.nan], "none", None, 1),
        ([2.0], "single", None, 0),
        ([2.0, 4.0, 3.0], "range", 2.0, 0),
        ([2.0, 2.0, 2.0, 2.0, 2.0], "equal", None, 0),
        ([2.0, math.inf, 4.0], "range", 2.0, 1),
    ],
)
def test_fewer_than_five_values_get_no_interval(values, kind, low, lost):
    found = summary.estimate(values)
    assert (found.kind, found.low, found.lost) == (kind, low, lost)


def test_the_ends_of_a_range_differ_where_they_do():
    assert summary.estimate([2.30101, 2.30109]).text == "2.301 (2.3010 to 2.3011)"


def test_a_difference_is_paired_by_seed(comparison: Comparison):
    setting = {"calls": 10}
    found = summary.difference(comparison, "frechet", "plms", "ddim", setting)
    a, b = comparison.paired("frechet", "plms", "ddim", calls=10)
    expected = stats.ttest_1samp(b - a, 0.0).confidence_interval(0.95)
    assert found.mean == pytest.approx((b - a).mean()) and found.mean > 0  # lower is better: plms wins
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.clear is True


def test_higher_is_better_turns_the_sign(comparison: Comparison):
    found = summary.difference(comparison, "accuracy", "plms", "ddim", {"calls": 10})
    assert found.mean > 0


def test_the_intervals_of_a_pick_hold_together(comparison: Comparison):
    """Four contenders make six pairs: each interval is at level 1 - 0.05/6."""
    found = summary.pick(comparison, {"calls": 10})
    assert found.best == "plms" and found.verdict == "clear"
    assert [d.b for d in found.rivals] == ["heun:churn=0.5", "ddim", "euler"]
    a, b = comparison.paired("frechet", "plms", "ddim", calls=10)
    expected = stats.ttest_1samp(b - a, 0.0).confidence_interval(1 - 0.05 / 6)
    assert found.rivals[1].interval == pytest.approx((expected.low, expected.high))


def test_a_contender_without_all_rows_is_not_picked(comparison: Comparison):
    assert summary.pick(comparison, {"calls": 5}).left_out == ("heun:churn=0.5",)
    assert summary.pick(comparison, {"calls": 20}).left_out == ("euler",)


def test_rows_that_have_not_run_yet_disqualify_nobody(comparison: Comparison):
    comparison.rows = [r for r in comparison.rows if r.contender != "plms" or r.seed < 6]
    found = summary.pick(comparison, {"calls": 10})
    assert found.best == "plms" and found.left_out == () and found.estimate.n == 6


def test_equal_contenders_are_close_not_clear(tmp_path: Path):
    """Under no effect, the leader is called clear in at most 5% of runs (and not never picked)."""
    wrong = 0
    for run in range(200):
        rng = np.random.default_rng(run)
        rows = rows_of(["a", "b", "c", "d"], calls=[10], seeds=6)
        for row in rows:
            row.figures = {"frechet": rng.normal()}
        wrong += summary.pick(comparison_of(rows, ["a", "b", "c", "d"], tmp_path), {"calls": 10}).verdict == "clear"
    assert wrong <= 18  # 5% of 200 is 10; P(more than 18 | 5%) is 0.3%


def test_at_a_tie_the_cheaper_one_is_picked(tmp_path: Path):
    comparison = fabric_of(tmp_path)
    found = summary.pick(comparison, {"collective": "all-to-all", "hosts": 64})
    assert found.best == "plan" and found.tied == ("spray",) and found.verdict == "tied"
    assert found.cost.mean == 240


def test_a_cheaper_contender_that_is_not_clearly_worse_is_named(tmp_path: Path):
    comparison = fabric_of(tmp_path)
    for row in comparison.rows:
        if row.contender == "spray":  # better by a hair, not clearly, and dear
            row.figures["congestion"] = 1.0 + (0.01 if row.seed % 2 else -0.02)
    found = summary.pick(comparison, {"collective": "all-to-all", "hosts": 64})
    assert (found.best, found.verdict, found.cheaper) == ("spray", "close", "plan")


def test_few_seeds_decide_nothing(tmp_path: Path):
    comparison = comparison_of(rows_of(["ddim", "plms"], seeds=4), ["ddim", "plms"], tmp_path)
    found = summary.pick(comparison, {"calls": 10})
    assert found.best == "plms" and found.verdict == "unknown" and found.rivals[0].interval is None


def test_no_figure_no_pick(tmp_path: Path):
    rows = rows_of(["ddim", "plms"])
    for row in rows:
        row.status, row.figures, row.error = "failed", {}, "broken"
    comparison = comparison_of(rows, ["ddim", "plms"], tmp_path)
    assert summary.picks(comparison) == []
    assert len(summary.troubles(comparison)) == 6
    assert summary.shown_figures(comparison) == []


def test_a_figure_without_direction_has_no_pick(comparison: Comparison):
    assert summary.pick(comparison, {"calls": 10}, "mode_entropy") is None


def test_troubles_are_grouped_by_reason(comparison: Comparison):
    failed, inapplicable = summary.troubles(comparison)
    assert (failed.contender, failed.seeds, failed.setting) == ("euler", [3], {"calls": 20})
    assert (inapplicable.status, len(inapplicable.seeds)) == ("inapplicable", 8)


def test_missing_rows_are_counted(comparison: Comparison):
    assert summary.missing(comparison) == 0
    comparison.rows = comparison.rows[:-5]
    assert summary.missing(comparison) == 5


def test_a_recipe_has_the_line_with_its_knobs(comparison: Comparison):
    assert summary.recipe(comparison, "heun:churn=0.5").lines == ("pipe.scheduler = HeunScheduler(order=2, churn=0.5)",)


def test_a_method_that_is_gone_from_the_catalogue_still_shows(tmp_path: Path):
    comparison = comparison_of(rows_of(["gone:knob=1"]), ["gone:knob=1"], tmp_path)
    assert summary.recipe(comparison, "gone:knob=1").lines == ()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.0, "3"),
        (0.5, "0.5"),
        (1234567.0, "1,234,567"),
        (-12.3456, "−12.35"),
        (0.000012345, "1.234×10⁻⁵"),
        (1 / 3, "0.3333"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
        (9.99999, "10.00"),
    ],
)
def test_numbers(value, text):
    assert summary.number(value) == text


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (12.3456, 0.0456, "12.346 ± 0.046"),
        (0.5, 12.0, "0 ± 12"),
        (1234.5, 56.7, "1234 ± 57"),
        (3.2e-7, 4.5e-8, "(3.20 ± 0.45)×10⁻⁷"),
        (5.0, 0.0, "5"),
    ],
)
def test_means_have_the_digits_of_their_interval(mean, half, text):
    assert summary.plus_minus(mean, half) == text


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(min_value=0, allow_infinity=True))
def test_every_number_can_be_shown(value, half):
    assert summary.number(value)
    assert math.isinf(value) or math.isnan(value) or summary.plus_minus(value, half)
