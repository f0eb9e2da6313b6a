"""The verdict rules: intervals against scipy and published numbers, coverage and error rates by simulation."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from steersman.engine.claims import (
    ALPHA,
    Claim,
    Effects,
    bootstrap_interval,
    equivalence,
    interval,
    judge,
    t_interval,
    tango_interval,
    tango_statistic,
    wilson_interval,
)
from steersman.errors import InputError, TrialError


def claim(id: str = "a", margin: float = 0.0, **kwargs: Any) -> Claim:
    """A claim whose comparison is the effects themselves."""
    return Claim(id, "it works", "Table 1", id, lambda effects: effects, margin=margin, **kwargs)


def verdict(effects: Effects, margin: float = 0.0, unit: str = "seed") -> Any:
    return judge([claim(margin=margin, unit=unit)], {"a": effects}, "quick")[0]


# --- intervals against other implementations ----------------------------------------------------------------


def test_t_is_scipys():
    x = np.random.default_rng(0).normal(0.3, 1, 12)
    effect, low, high = interval(Effects(x), 0.9)
    expected = stats.t.interval(0.9, 11, x.mean(), stats.sem(x))
    np.testing.assert_allclose((effect, low, high), (x.mean(), *expected), rtol=1e-12)


def test_studentised_ends_are_those_of_a_plain_loop():
    x = np.random.default_rng(1).exponential(size=20)
    rng = np.random.default_rng(0)
    se = x.std(ddof=1) / math.sqrt(20)
    t = []
    for index in rng.integers(20, size=(1999, 20)):
        y = x[index]
        t.append((y.mean() - x.mean()) / (y.std(ddof=1) / math.sqrt(20)))
    t = sorted(t)
    low_t, high_t = t_interval(x, 0.95)
    low, high = bootstrap_interval(x, 0.95, resamples=1999)
    assert low == pytest.approx(min(low_t, x.mean() - t[1949] * se), rel=1e-9)
    assert high == pytest.approx(max(high_t, x.mean() - t[49] * se), rel=1e-9)


def test_bootstrap_agrees_with_scipys_bca_on_many_units():
    x = np.random.default_rng(2).gamma(2.0, size=2000)
    ours = np.array(bootstrap_interval(x, 0.95, resamples=3999))
    bca = stats.bootstrap((x,), np.mean, n_resamples=3999, vectorized=True, rng=np.random.default_rng(0), batch=200)
    width = np.diff(ours)[0]
    np.testing.assert_allclose(ours, bca.confidence_interval, atol=0.05 * width)


@pytest.mark.parametrize(("b", "c", "n", "level", "expected"), [(28, 25, 618, 0.90, (-0.0148, 0.0247))])
def test_tango_matches_propcis(b, c, n, level, expected):
    # scoreci.mp(25, 28, 618, 0.90) of the R package PropCIs.
    np.testing.assert_allclose(tango_interval(b, c, n, level), expected, atol=5e-5)


def test_tango_matches_a_published_example():
    # 1, 1, 7, 12 pairs, difference -6/21: score interval (-0.517, -0.026).
    np.testing.assert_allclose(tango_interval(1, 7, 21, 0.95), (-0.517, -0.026), atol=5e-4)


@pytest.mark.parametrize(("b", "c", "n"), [(7, 1, 21), (0, 0, 10), (5, 0, 10), (12, 9, 40), (10, 0, 10)])
def test_tango_statistic_uses_the_constrained_maximum_likelihood(b, c, n):
    for delta in (-0.7, -0.2, 0.0, 0.1, 0.6):

        def minus_log_likelihood(q, delta=delta):
            cells = np.maximum([q + delta, q, 1 - 2 * q - delta], 1e-300)
            return -float(np.dot([b, c, n - b - c], np.log(cells)))

        lowest, highest = max(0.0, -delta), (1 - delta) / 2
        q = optimize.minimize_scalar(
            minus_log_likelihood, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-10}
        ).x
        variance = n * (2 * q + delta - delta**2)
        if variance < 1e-5:
            continue
        assert tango_statistic(b, c, n, delta) == pytest.approx((b - c - n * delta) / math.sqrt(variance), rel=2e-3)


def test_tango_at_zero_is_mcnemar():
    for b, c in [(3, 9), (10, 2), (5, 5)]:
        z = tango_statistic(b, c, 50, 0.0)
        assert z**2 == pytest.approx((b - c) ** 2 / (b + c))
        excluded = not tango_interval(b, c, 50, 0.95)[0] <= 0 <= tango_interval(b, c, 50, 0.95)[1]
        assert excluded == (stats.chi2.sf(z**2, 1) < 0.05)


@given(n=st.integers(5, 60), data=st.data(), level=st.sampled_from([0.8, 0.95, 0.999]))
@settings(max_examples=60, deadline=None)
def test_tango_interval_is_the_inverted_test(n, data, level):
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    low, high = tango_interval(b, c, n, level)
    z = stats.norm.ppf((1 + level) / 2)
    assert -1 <= low <= (b - c) / n <= high <= 1
    for end in (low, high):
        if abs(end) < 1:
            assert abs(tango_statistic(b, c, n, end)) == pytest.approx(z, rel=1e-5)
    swapped = tango_interval(c, b, n, level)
    np.testing.assert_allclose(swapped, (-high, -low), atol=1e-9)


# --- coverage -----------------------------------------------------------------------------------------------

DRAWS = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "uniform": (lambda rng, size: rng.uniform(size=size), 0.5),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
    "log-normal": (lambda rng, size: rng.lognormal(size=size), math.exp(0.5)),
    "Student t, 3 df": (lambda rng, size: rng.standard_t(3, size=size), 0.0),
}


def coverage(ends: tuple[np.ndarray, np.ndarray], truth: float) -> float:
    return float(np.mean((ends[0] <= truth) & (truth <= ends[1])))


@pytest.mark.parametrize("n", [5, 19])
@pytest.mark.parametrize("level", [0.95, 1 - ALPHA / 5])
def test_t_covers_on_normal_effects(n, level):
    x = np.random.default_rng(n).normal(0.7, 2.0, size=(20_000, n))
    assert coverage(t_interval(x, level), 0.7) == pytest.approx(level, abs=0.006)


@pytest.mark.parametrize(("n", "samples"), [(20, 2000), (50, 1500)])
@pytest.mark.parametrize("name", DRAWS)
def test_bootstrap_covers(name, n, samples):
    draw, truth = DRAWS[name]
    x = draw(np.random.default_rng(n), (samples, n))
    ends = bootstrap_interval(x, 0.95, resamples=999)
    # Nominal within three standard errors, from above without limit up to 0.985 (it may not be useless);
    # the log-normal's tail can't be seen in 20 units: the docstring reports 92.7%.
    lowest = {"log-normal": 0.91}.get(name, 0.935)
    assert lowest <= coverage(ends, truth) <= 0.985
    # The percentile bootstrap of the same samples covers less, which is why it isn't used.
    if name == "exponential" and n == 20:
        rng = np.random.default_rng(0)
        means = np.stack([x[:, rng.integers(n, size=n)].mean(1) for _ in range(999)], axis=1)
        percentile = np.quantile(means, [0.025, 0.975], axis=1)
        assert coverage((percentile[0], percentile[1]), truth) < coverage(ends, truth) - 0.02


def test_percentile_bootstrap_of_few_seeds_would_not_cover():
    # The reason for the five-unit rule and for t below twenty units.
    rng = np.random.default_rng(3)
    for n, most in [(3, 0.80), (5, 0.88)]:
        x = rng.normal(size=(4000, n))
        means = np.stack([x[:, rng.integers(n, size=n)].mean(1) for _ in range(400)], axis=1)
        low, high = np.quantile(means, [0.025, 0.975], axis=1)
        assert coverage((low, high), 0.0) < most


@pytest.mark.parametrize("clusters", [8, 30])
def test_clusters_cover_where_items_would_not(clusters):
    # Items of one fit share the fit's luck; clusters of different size.
    rng = np.random.default_rng(clusters)
    sizes = rng.integers(5, 40, size=clusters)
    labels = np.repeat(np.arange(clusters), sizes)
    hits = naive = 0
    trials = 250
    for _ in range(trials):
        luck = rng.normal(0.5, 1.0, size=clusters)
        x = luck[labels] + rng.normal(0, 1.0, size=labels.size)
        _, low, high = interval(Effects(x, clusters=labels))
        hits += low <= 0.5 <= high
        low, high = t_interval(x, 0.95)
        naive += low <= 0.5 <= high
    assert 0.915 <= hits / trials <= 0.99
    assert naive / trials < 0.7


def test_wilson_covers_exactly_computed():
    # No simulation: the coverage at each rate is a finite sum.
    for n in (5, 20, 60):
        ends = np.array([wilson_interval(k, n, 0.95) for k in range(n + 1)])
        rates = np.linspace(0.01, 0.99, 99)
        inside = (ends[:, :1] <= rates) & (rates <= ends[:, 1:])
        covered = (inside * stats.binom.pmf(np.arange(n + 1)[:, None], n, rates)).sum(0)
        assert covered.mean() >= 0.95
        assert covered.min() >= 0.83


def test_tango_covers_exactly_computed():
    n = 20
    tables = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    ends = np.array([tango_interval(b, c, n, 0.95) for b, c in tables])
    counts = np.array([(b, c, n - b - c) for b, c in tables])
    covered = []
    for p, q in itertools.product((0.05, 0.1, 0.2, 0.3, 0.45), repeat=2):
        weight = stats.multinomial.pmf(counts, n, [p, q, 1 - p - q])
        inside = (ends[:, 0] <= p - q + 1e-12) & (p - q - 1e-12 <= ends[:, 1])
        covered.append(float(weight[inside].sum()))
    assert np.mean(covered) >= 0.945
    assert min(covered) >= 0.92


# --- the family -------------------------------------------------------------------------------------------


def family(samples: list[Effects], margins: list[float]) -> list[Any]:
    claims = [claim(str(i), margin=margin) for i, margin in enumerate(margins)]
    return judge(claims, {str(i): effects for i, effects in enumerate(samples)}, "quick")


def test_no_effect_gives_few_false_verdicts_in_the_family():
    rng = np.random.default_rng(11)
    trials, m = 700, 5
    wrong = single = 0
    for _ in range(trials):
        samples = [Effects(rng.normal(0.2, 1, 8)) for _ in range(m)]
        wrong += any(v.verdict != "not shown" for v in family(samples, [0.2] * m))
        single += any(stats.ttest_1samp(s.values, 0.2).pvalue < 0.05 for s in samples)
    assert wrong / trials <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / trials)
    assert single / trials > 0.15  # what it would be without Holm


def test_some_effects_don_t_loosen_the_others():
    rng = np.random.default_rng(12)
    trials = 500
    wrong = found = 0
    for _ in range(trials):
        samples = [Effects(rng.normal(mean, 1, 12)) for mean in (3.0, 3.0, 0.0, 0.0)]
        verdicts = [v.verdict for v in family(samples, [0.0] * 4)]
        found += verdicts[:2] == ["holds", "holds"]
        wrong += verdicts[2] != "not shown" or verdicts[3] != "not shown"
    assert found == trials
    assert wrong / trials <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / trials)


@pytest.mark.parametrize("kind", ["rate", "paired-rate"])
def test_no_effect_gives_few_false_verdicts_on_rates(kind):
    rng = np.random.default_rng(13)
    trials, wrong = 600, 0
    for _ in range(trials):
        values = rng.random(60) < 0.3
        reference = rng.random(60) < 0.3 if kind == "paired-rate" else None
        effects = Effects(values, kind=kind, reference=reference)
        wrong += verdict(effects, 0.3 if kind == "rate" else 0.0).verdict != "not shown"
    assert wrong / trials <= ALPHA + 3.5 * math.sqrt(ALPHA * (1 - ALPHA) / trials)


def test_verdicts_are_those_of_holms_rule_on_t_tests():
    rng = np.random.default_rng(14)
    for _ in range(40):
        samples = [Effects(rng.normal(mean, 1, 10)) for mean in rng.choice([0.0, 0.5, 1.0, -1.0], 6)]
        p = np.array([stats.ttest_1samp(s.values, 0.0).pvalue for s in samples])
        order, rejected = np.argsort(p), np.zeros(6, bool)
        for k, i in enumerate(order):
            if p[i] > ALPHA / (6 - k):
                break
            rejected[i] = True
        verdicts = family(samples, [0.0] * 6)
        assert [v.verdict != "not shown" for v in verdicts] == rejected.tolist()
        assert [v.verdict == "holds" for v in verdicts] == [
            bool(r and s.values.mean() > 0) for r, s in zip(rejected, samples, strict=True)
        ]
        for rank, i in enumerate(order):
            step = min(rank, int(rejected.sum()))
            assert verdicts[i].level == pytest.approx(1 - ALPHA / (6 - step))
            np.testing.assert_allclose(verdicts[i].interval, t_interval(samples[i].values, verdicts[i].level))


def test_a_claim_without_rows_still_counts_for_the_family():
    x = np.random.default_rng(15).normal(1.0, 1, 8)
    both = judge([claim("a"), claim("b")], {"a": Effects(x)}, "quick")
    assert both[0].level == pytest.approx(0.975)
    assert both[1].verdict == "not shown" and "rows are missing: b" in both[1].reason
    other = judge([claim("a"), claim("b", scales=("gpu",))], {"a": Effects(x)}, "quick")
    assert other[0].level == pytest.approx(0.95)
    assert other[1].verdict == "not shown" and "scale gpu" in other[1].reason
    exact = judge([claim("a"), claim("b", unit="exact")], {"a": Effects(x), "b": Effects([1.0])}, "quick")
    assert exact[0].level == pytest.approx(0.95)


# --- margins ----------------------------------------------------------------------------------------------


@given(
    n=st.sampled_from([5, 12, 19, 20, 35]),
    seed=st.integers(0, 1000),
    margin=st.floats(-2, 2),
    kind=st.sampled_from(["difference", "rate", "paired-rate"]),
)
@settings(max_examples=60, deadline=None)
def test_verdict_is_where_the_interval_lies(n, seed, margin, kind):
    rng = np.random.default_rng(seed)
    if kind == "difference":
        effects = Effects(rng.normal(0.5, 1, n))
    else:
        effects = Effects(rng.random(n) < 0.7, kind=kind, reference=rng.random(n) < 0.4)
        margin = abs(margin) / 2 if kind == "rate" else margin
    found = verdict(effects, margin)
    low, high = found.interval
    expected = "holds" if low > margin else "fails" if high < margin else "not shown"
    assert found.verdict == expected
    assert low <= found.effect <= high
    assert found.n == n and found.margin == margin and found.level == pytest.approx(0.95)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["verdict"] == expected


def test_a_real_effect_below_the_margin_is_not_called_one():
    x = np.random.default_rng(16).normal(0.5, 0.05, 10)
    assert verdict(Effects(x), 0.0).verdict == "holds"
    assert verdict(Effects(x), 1.0).verdict == "fails"
    assert verdict(Effects(x), float(x.mean())).verdict == "not shown"


def test_equivalence_is_two_one_sided_claims():
    rng = np.random.default_rng(17)
    close, apart = Effects(rng.normal(0.0, 0.05, 10)), Effects(rng.normal(0.5, 0.05, 10))
    pair = equivalence("same", "they agree", "Table 2", "s", lambda c: c, margin=0.2)
    assert [c.id for c in pair] == ["same-not-worse", "same-not-better"]
    assert [v.verdict for v in judge(pair, {"s": close}, "full")] == ["holds", "holds"]
    assert [v.verdict for v in judge(pair, {"s": apart}, "full")] == ["holds", "fails"]
    outcomes = Effects(rng.random(400) < 0.5, kind="paired-rate", reference=rng.random(400) < 0.5)
    assert [v.verdict for v in judge(pair, {"s": outcomes}, "full")] == ["holds", "holds"]
    assert (-outcomes).reference is outcomes.values
    with pytest.raises(InputError, match="margin"):
        equivalence("same", "", "", "s", lambda c: c, margin=0.0)
    with pytest.raises(InputError, match="kind"):
        -Effects(np.ones(5), kind="rate")


def test_exact_claims_count_the_worst_instance():
    assert verdict(Effects([0.3, 0.1, 2.0]), 0.05, "exact").verdict == "holds"
    found = verdict(Effects([0.3, 0.1, 2.0], kind="exact"), 0.2, "exact")
    assert (found.verdict, found.effect, found.interval, found.level) == ("fails", 0.1, [0.1, 0.1], None)
    assert verdict(Effects([0.2]), 0.2, "exact").verdict == "not shown"
    assert verdict(Effects([0.2, math.nan]), 0.0, "exact").verdict == "not shown"


# --- nothing passes by default, nothing crashes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("effects", "reason"),
    [
        (Effects(np.array([1.0])), "only 1 seed, and fewer than 5"),
        (Effects(np.array([1.0, 2.0, 3.0, 4.0])), "only 4 seeds"),
        (Effects(np.ones(40), clusters=np.arange(40) % 4), "only 4 seeds"),
        (Effects(np.full(8, 0.1)), "effects of all 8 seeds are equal"),
        (Effects(np.full(8, 0.1) * (1 + 1e-16 * np.arange(8))), "are equal"),
        (Effects(np.zeros(30)), "are equal"),
        (Effects(np.array([])), "there are no effects"),
        (Effects(np.array([1.0, np.nan, 2.0, 3.0, np.inf])), "2 of 5 effects are NaN or infinite"),
        (Effects(np.ones((5, 2))), "shape (5, 2)"),
        (Effects(np.array(["a"] * 6)), "not all numbers"),
        (Effects(np.arange(6.0), clusters=np.arange(5)), "6 effects came with 5 cluster labels"),
        (Effects(np.arange(6.0), kind="rate"), "must be 0 or 1"),
        (Effects(np.ones(6), kind="paired-rate"), "without the reference"),
        (Effects(np.ones(6), kind="paired-rate", reference=np.ones(5)), "5 reference outcomes"),
        (Effects(np.ones(6), kind="paired-rate", reference=np.full(6, 0.5)), "reference outcomes of a rate must"),
        (Effects(np.arange(6.0), kind="exact"), "unit 'exact'"),
        (Effects(np.ones(3), kind="rate"), "only 3 seeds"),
        (Effects(np.r_[np.zeros(29), 1.0]), "too few of the 30 seeds differ"),
    ],
)
def test_effects_that_decide_nothing_say_why(effects, reason):
    found = verdict(effects, -10.0 if effects.kind == "difference" else 0.0)
    assert found.verdict == "not shown"
    assert reason in found.reason
    json.dumps(found.to_json(), allow_nan=False)


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=25),
    kind=st.sampled_from(["difference", "rate", "paired-rate", "exact"]),
    unit=st.sampled_from(["exact", "fit", "seed", "item"]),
    margin=st.floats(-1e6, 1e6),
)
@settings(max_examples=150, deadline=None)
def test_any_numbers_give_a_verdict(values, kind, unit, margin):
    found = verdict(Effects(np.array(values), kind=kind), margin, unit)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.reason
    if found.verdict != "not shown":
        assert unit == "exact" or found.n >= 5


def test_a_rate_against_an_impossible_margin_is_not_shown():
    found = verdict(Effects(np.ones(50), kind="rate"), -0.5)
    assert found.verdict == "not shown" and "not from 0 to 1" in found.reason
    assert verdict(Effects(np.ones(50), kind="rate"), 0.5).verdict == "holds"
    assert verdict(Effects(np.zeros(50), kind="rate"), 0.5).verdict == "fails"


def test_claims_on_items_say_so():
    found = verdict(Effects(np.random.default_rng(18).normal(1, 1, 50)), unit="item")
    assert found.verdict == "holds" and "items of one fit" in found.reason


def test_missing_rows_give_the_reason():
    def no_rows(_):
        raise TrialError("ddim failed at 5 calls")

    found = judge([Claim("a", "s", "t", "study", no_rows)], {"study": None}, "quick")[0]
    assert (found.verdict, found.effect, found.interval) == ("not shown", None, None)
    assert found.reason == "rows are missing: ddim failed at 5 calls"
    with pytest.raises(TrialError, match="fewer than 5"):
        interval(Effects(np.ones(2)))


def test_declarations_are_checked():
    with pytest.raises(InputError, match="unit"):
        claim(unit="day")
    with pytest.raises(InputError, match="margin"):
        claim(margin=math.nan)
    with pytest.raises(InputError, match="scales"):
        claim(scales="quick")
    with pytest.raises(InputError, match="all differ"):
        judge([claim("a"), claim("a")], {}, "quick")
