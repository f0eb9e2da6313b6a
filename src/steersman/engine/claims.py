r"""Claims and their verdicts: pure statistics, no files.

A claim is one sentence of a paper turned into paired effects :math:`d_1, \dots, d_n` (direction of the
claim positive) with a margin :math:`\delta` that is fixed in advance. From a two-sided interval
:math:`[L, U]` of the mean effect,

.. math::
    L > \delta \Rightarrow \text{holds}, \qquad U < \delta \Rightarrow \text{fails}, \qquad
    \text{else} \Rightarrow \text{not shown}.

The claims of one method are one family. Holm's step-down rule (Holm, 1979) keeps the chance of any wrong
``holds`` or ``fails`` among its :math:`m` claims at :math:`\alpha = 0.05`: sorted by their p-values against
their margins, the k-th claim is judged by its interval at level :math:`1 - \alpha / (m - k + 1)`; the first
one that can't be decided stops the procedure. A verdict reports the interval at the level that decided it
(for the undecided: the level where the procedure stopped).

Which interval depends on what the effects are. The unit of repetition is a cluster where clusters are given
(a fit, a seed), whose effect is the mean of its values, and a value otherwise.

====================  =====================  =====================================================
effects               units                  interval
====================  =====================  =====================================================
differences           5 to 19                paired t
differences           from 20                studentised bootstrap of the units, never inside paired t
binary                from 5                 Wilson score (E. B. Wilson, 1927)
paired binary         from 5                 score interval of Tango (1998), at 0 the McNemar test
exact                 any                    the worst instance
====================  =====================  =====================================================

Fewer than five units decide nothing: a percentile bootstrap of 3 to 5 seeds covers about 80%, not 95%.

The bootstrap was chosen by measured coverage in per cent (nominal 95; 2000 to 4000 samples, so that the
last digit is uncertain by 5), with 20 (50) units:

================  =============  =============  =============  =============  ==============
distribution      percentile     BCa            paired t       studentised    used here
================  =============  =============  =============  =============  ==============
normal            92.4 (93.9)    92.1 (94.0)    95.1 (94.8)    94.9 (95.0)    95.3 (95.1)
uniform           94.1 (94.4)    95.2 (94.7)    95.6 (94.9)    97.4 (95.7)    97.1 (95.9)
exponential       89.5 (93.2)    90.7 (94.0)    91.2 (93.9)    94.3 (95.2)    96.3 (95.9)
log-normal        86.8 (88.9)    88.6 (88.9)    87.7 (89.1)    92.3 (92.2)    92.7 (94.5)
Student t, 3 df   92.1 (92.4)    88.9 (89.9)    95.7 (94.1)    92.4 (91.5)    95.7 (95.9)
================  =============  =============  =============  =============  ==============

BCa is under nominal everywhere at 20 units; the studentised bootstrap is best under skew and the t interval
best under heavy tails, so the wider of the two ends is used on each side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import optimize, stats

from steersman.errors import InputError, TrialError

if TYPE_CHECKING:
    from steersman.engine.comparison import Comparison

Unit = Literal["exact", "fit", "seed", "item"]
Outcome = Literal["holds", "fails", "not shown"]

ALPHA = 0.05
FEWEST_UNITS = 5
BOOTSTRAP_FROM = 20
RESAMPLES = 9999


@dataclass(frozen=True)
class Effects:
    """Paired effects of one claim, its direction positive.

    Args:
        values: shape (n,): one effect per unit or per item; 0 or 1 for ``rate`` and ``paired-rate``.
        clusters: shape (n,): the label of the unit (fit, seed) that each value belongs to.
        kind: what the values are. ``difference``: real numbers. ``rate``: binary outcomes, claimed to be
            more frequent than the margin. ``paired-rate``: binary outcomes of one arm, claimed to be more
            frequent by the margin than those of ``reference``. ``exact``: one number per instance.
        reference: shape (n,): the other arm's binary outcomes, for ``paired-rate``.
    """

    values: np.ndarray
    clusters: np.ndarray | None = None
    kind: Literal["difference", "rate", "paired-rate", "exact"] = "difference"
    reference: np.ndarray | None = None

    def __neg__(self) -> Effects:
        """The same effects with the other direction positive."""
        if self.kind == "rate":
            raise InputError("kind", self.kind, "difference, paired-rate or exact to be turned round")
        if self.kind == "paired-rate" and self.reference is not None:
            return dataclasses.replace(self, values=self.reference, reference=self.values)
        return dataclasses.replace(self, values=-np.asarray(self.values))


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    Args:
        id: unique within the method.
        statement: the claim, one sentence.
        source: where the paper makes it ("Table 2", "eq. 13").
        study: name of the study whose comparison it is judged on.
        effects: the comparison's paired effects, direction of the claim positive.
        margin: the effect must be larger than this; fixed before looking.
        unit: what is repeated: ``fit`` (trainings), ``seed`` (whole trials), ``item`` (items of one fit), or
            ``exact`` (no randomness: the worst instance counts).
        scales: scales of the evidence at which it is judged.

    Raises:
        InputError: an unknown unit, a margin that is not finite, no scale.
    """

    id: str
    statement: str
    source: str
    study: str
    effects: Callable[[Comparison], Effects]
    margin: float = 0.0
    unit: Unit = "seed"
    scales: tuple[str, ...] = ("quick", "full", "gpu")

    def __post_init__(self) -> None:
        if self.unit not in ("exact", "fit", "seed", "item"):
            raise InputError(f"unit of claim {self.id}", self.unit, "exact, fit, seed or item")
        if isinstance(self.margin, bool) or not isinstance(self.margin, (int, float)) or not math.isfinite(self.margin):
            raise InputError(f"margin of claim {self.id}", self.margin, "a finite number")
        if isinstance(self.scales, str) or not self.scales:
            raise InputError(f"scales of claim {self.id}", self.scales, "a tuple of at least one scale")


@dataclass(frozen=True)
class Verdict:
    """What the evidence says about one claim; ``effect``, ``interval`` and ``level`` may be unknown.

    Args:
        effect: mean paired effect (exact claims: the worst instance's).
        interval: two-sided, at ``level``; None where there is none.
        n: number of units.
        reason: one sentence that says why.
        level: confidence level that decided, after Holm's adjustment; None for exact claims.
    """

    id: str
    statement: str
    verdict: Outcome
    effect: float | None
    interval: list[float] | None
    unit: Unit
    n: int
    margin: float
    reason: str
    source: str
    level: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without NaN or infinities."""
        return dataclasses.asdict(self)


def equivalence(
    id: str,
    statement: str,
    source: str,
    study: str,
    effects: Callable[[Comparison], Effects],
    margin: float,
    unit: Unit = "seed",
    scales: tuple[str, ...] = ("quick", "full", "gpu"),
) -> tuple[Claim, Claim]:
    """Two one-sided claims that together say |effect| < ``margin``.

    Returns:
        ``<id>-not-worse`` (effect > -margin) and ``<id>-not-better`` (-effect > -margin). The two things are
        equivalent when both hold.

    Raises:
        InputError: ``margin`` is not positive.
    """
    if not margin > 0:
        raise InputError(f"margin of claim {id}", margin, "a positive number")
    common = {"source": source, "study": study, "margin": -margin, "unit": unit, "scales": scales}
    return (
        Claim(f"{id}-not-worse", f"{statement} (not worse by {margin:g})", effects=effects, **common),  # type: ignore[arg-type]
        Claim(f"{id}-not-better", f"{statement} (not better by {margin:g})", effects=lambda c: -effects(c), **common),  # type: ignore[arg-type]
    )


# --- intervals -------------------------------------------------------------------------------------------


def t_interval(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Paired t interval of the mean, ``values`` of shape (..., n)."""
    found = stats.ttest_1samp(values, 0.0, axis=-1).confidence_interval(level)
    return found.low, found.high


def bootstrap_interval(
    values: np.ndarray, level: float, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    r"""Studentised bootstrap interval of the mean, each end at least as far out as the t interval's.

    With :math:`t^* = (\bar d^* - \bar d) / \mathrm{se}^*` over resamples of the n units,
    :math:`[\bar d - t^*_{(1 - a)} \mathrm{se},\; \bar d - t^*_{(a)} \mathrm{se}]` where
    :math:`a = (1 - \mathrm{level}) / 2` (Efron, 1981; DiCiccio and Efron, 1996).

    Args:
        values: shape (..., n), n >= 2; the same resamples serve every leading index.
        level: confidence level.
        resamples: number of bootstrap samples B; :math:`t^*_{(a)}` is order statistic ⌊(B + 1) a⌋.
        seed: of the resampling, fixed so that a verdict can be repeated.

    Returns:
        Lower and upper ends, shape (...); infinite where too many resamples have no spread.
    """
    mean, error = values.mean(-1), _standard_error(values)
    t = np.sort(_studentised(values, resamples, seed), axis=-1)
    k = max(math.floor((resamples + 1) * (1 - level) / 2), 1) - 1
    low, high = t_interval(values, level)
    with np.errstate(invalid="ignore"):
        return (
            np.minimum(low, mean - t[..., resamples - 1 - k] * error),
            np.maximum(high, mean - t[..., k] * error),
        )


def wilson_interval(successes: int, n: int, level: float) -> tuple[float, float]:
    """Score interval of a rate (Wilson, 1927)."""
    found = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def tango_statistic(b: int, c: int, n: int, delta: float) -> float:
    r"""Score statistic of a difference of paired rates (Tango, 1998, eq. 9 to 11).

    .. math::
        z(\delta) = \frac{b - c - n \delta}{\sqrt{n (2 \hat q + \delta (1 - \delta))}}, \qquad
        \hat q = \frac{\sqrt{B^2 - 4 A C} - B}{2 A},

    with :math:`A = 2n`, :math:`B = -b - c + (2n - b + c) \delta`, :math:`C = -c \delta (1 - \delta)`; q̂ is the
    maximum likelihood estimate of the second off-diagonal probability when the difference is δ. At δ = 0 it
    is McNemar's :math:`(b - c) / \sqrt{b + c}`.

    Args:
        b: pairs in which only the first arm succeeds.
        c: pairs in which only the second arm succeeds.
        n: all pairs.
        delta: difference of the rates, from -1 to 1.
    """
    if delta < 0:  # by symmetry; the formula for q̂ loses all its digits there when c = 0
        return -tango_statistic(c, b, n, -delta)
    linear = -b - c + (2 * n - b + c) * delta
    root = math.sqrt(max(linear**2 + 8 * n * c * delta * (1 - delta), 0.0))
    q = (root - linear) / (4 * n)
    variance = n * (2 * q + delta * (1 - delta))
    distance = b - c - n * delta
    if variance <= 1e-12 * n:
        return 0.0 if abs(distance) < 1e-9 * n else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def tango_interval(b: int, c: int, n: int, level: float) -> tuple[float, float]:
    """The differences δ of paired rates with |z(δ)| at most the normal quantile (Tango, 1998)."""
    z, estimate = float(stats.norm.ppf((1 + level) / 2)), (b - c) / n

    def end(sign: int) -> float:
        def excess(delta: float) -> float:
            return min(max(tango_statistic(b, c, n, delta), -1e6), 1e6) + sign * z

        if sign * estimate >= 1 or excess(sign) * sign >= 0:
            return float(sign)
        return float(optimize.brentq(excess, estimate, sign, xtol=1e-12))

    return end(-1), end(1)


# --- verdicts --------------------------------------------------------------------------------------------


class _Undecidable(Exception):
    """Effects from which nothing can be decided; carries what is known."""

    def __init__(self, reason: str, effect: float | None = None, n: int = 0) -> None:
        super().__init__(reason)
        self.effect, self.n = effect, n


@dataclass(frozen=True)
class _Estimate:
    """An effect with the interval that fits its kind."""

    effect: float
    n: int
    method: str
    interval: Callable[[float], tuple[float, float]]
    p: Callable[[float], float]


def interval(effects: Effects, level: float = 0.95) -> tuple[float, float, float]:
    """Effect, lower and upper end, chosen by the rules above, unadjusted (for tables and plots).

    Raises:
        TrialError: these effects allow no interval; the sentence says why.
    """
    try:
        estimate = _estimate(effects, "units")
        return estimate.effect, *estimate.interval(level)
    except _Undecidable as why:
        raise TrialError(str(why)) from None


def judge(claims: Sequence[Claim], comparisons: Mapping[str, Comparison], scale: str) -> list[Verdict]:
    """The verdicts of one method's claims, in their order.

    Every random claim judged at this scale counts for Holm's adjustment, also one whose rows are missing: a
    failed trial can't make it easier for the others.

    Args:
        claims: the method's claims.
        comparisons: comparison of each study, by name.
        scale: the scale that the studies were run at.

    Raises:
        InputError: two claims share an id.
    """
    ids = [claim.id for claim in claims]
    for id in ids:
        if ids.count(id) > 1:
            raise InputError("claims", id, "claims with ids that all differ")
    verdicts: dict[str, Verdict] = {}
    estimates: dict[str, _Estimate] = {}
    for claim in claims:
        if scale not in claim.scales:
            verdicts[claim.id] = _verdict(claim, reason=f"it is judged at scale {' or '.join(claim.scales)} only")
            continue
        try:
            effects = claim.effects(comparisons[claim.study])
            if claim.unit == "exact":
                verdicts[claim.id] = _judge_exact(claim, effects)
            else:
                estimates[claim.id] = _estimate(effects, _plural(claim.unit), claim.margin)
        except (LookupError, TrialError) as missing:
            verdicts[claim.id] = _verdict(claim, reason=f"rows are missing: {_sentence(missing)}")
        except _Undecidable as why:
            verdicts[claim.id] = _verdict(claim, effect=why.effect, n=why.n, reason=str(why))
    family = sum(claim.unit != "exact" and scale in claim.scales for claim in claims)
    open_claims = sorted(
        (claim for claim in claims if claim.id in estimates), key=lambda c: estimates[c.id].p(c.margin)
    )
    step, stopped = 1, False
    for claim in open_claims:
        level = 1 - ALPHA / (family - step + 1)
        verdict = _judge_random(claim, estimates[claim.id], level, f"{step} of {family}", stopped)
        verdicts[claim.id] = verdict
        stopped = stopped or verdict.verdict == "not shown"
        step += not stopped
    return [verdicts[claim.id] for claim in claims]


def _judge_exact(claim: Claim, effects: Effects) -> Verdict:
    values = _numbers(effects.values, "effects")
    worst = float(values.min())
    verdict: Outcome = "holds" if worst > claim.margin else "fails" if worst < claim.margin else "not shown"
    side = {"holds": "above", "fails": "below", "not shown": "exactly at"}[verdict]
    many = f"the worst of {values.size} instances" if values.size > 1 else "the one instance"
    reason = f"{many} has effect {worst:.4g}, {side} the margin {claim.margin:g}"
    return _verdict(claim, verdict, worst, [worst, worst], int(values.size), reason)


def _judge_random(claim: Claim, estimate: _Estimate, level: float, step: str, stopped: bool) -> Verdict:
    low, high = estimate.interval(level)
    known = {"effect": estimate.effect, "n": estimate.n}
    if not (math.isfinite(low) and math.isfinite(high)):
        reason = f"too few of the {estimate.n} {_plural(claim.unit)} differ from the others for an interval"
        return _verdict(claim, reason=reason, **known)  # type: ignore[arg-type]
    verdict: Outcome = "holds" if low > claim.margin else "fails" if high < claim.margin else "not shown"
    side = {"holds": "above", "fails": "below", "not shown": "around"}[verdict]
    reason = (
        f"the {100 * level:.4g}% interval [{low:.4g}, {high:.4g}] of {estimate.n} {_plural(claim.unit)} "
        f"({estimate.method}; Holm step {step}) lies {side} the margin {claim.margin:g}"
    )
    if stopped and verdict != "not shown":
        verdict = "not shown"
        reason += ", but a claim with a smaller p-value is undecided at this level"
    if claim.unit == "item":
        reason += "; it speaks of the items of one fit, not of other fits"
    return _verdict(claim, verdict, interval=[low, high], level=level, reason=reason, **known)  # type: ignore[arg-type]


def _estimate(effects: Effects, units: str, margin: float = 0.0) -> _Estimate:
    """The estimate that fits ``effects``, or :class:`_Undecidable` with the reason."""
    if effects.kind not in ("difference", "rate", "paired-rate"):
        raise _Undecidable(f"effects of kind {effects.kind!r} can only be judged with unit 'exact'")
    values = _numbers(effects.values, "effects")
    if effects.kind != "difference":
        _check_binary(values, "effects")
    if effects.kind == "rate" and not 0 <= margin <= 1:
        raise _Undecidable(f"a rate can't be judged against the margin {margin:g}, which is not from 0 to 1")
    other = None
    if effects.kind == "paired-rate":
        if effects.reference is None:
            raise _Undecidable("paired rates came without the reference arm's outcomes")
        other = _numbers(effects.reference, "reference outcomes")
        _check_binary(other, "reference outcomes")
        if other.shape != values.shape:
            raise _Undecidable(f"{values.size} effects came with {other.size} reference outcomes")
    if effects.clusters is not None:
        labels = np.asarray(effects.clusters).ravel()
        if labels.size != values.size:
            raise _Undecidable(f"{values.size} effects came with {labels.size} cluster labels")
        # Outcomes of one cluster depend on each other, which Wilson and Tango exclude: use cluster means.
        values = values if other is None else values - other
        index = np.unique(labels, return_inverse=True)[1]
        values = np.bincount(index, values) / np.bincount(index)
        return _difference(values, units)
    if other is not None:
        return _paired_rate(values, other, units)
    return _rate(values, units) if effects.kind == "rate" else _difference(values, units)


def _difference(values: np.ndarray, units: str) -> _Estimate:
    n, mean = values.size, float(values.mean())
    _enough(n, units, mean)
    if values.std() <= 1e-12 * np.abs(values).max():
        raise _Undecidable(
            f"the effects of all {n} {units} are equal ({mean:.4g}), so that nothing can be said of their spread",
            mean,
            n,
        )

    def p_t(margin: float) -> float:
        return float(stats.ttest_1samp(values, margin).pvalue)

    if n < BOOTSTRAP_FROM:
        return _Estimate(mean, n, "paired t", lambda level: _floats(t_interval(values, level)), p_t)

    def p_bootstrap(margin: float) -> float:
        observed = (mean - margin) / float(_standard_error(values))
        t = _studentised(values, RESAMPLES, seed=0)
        tail = min(np.sum(t >= observed), np.sum(t <= observed))
        return max(p_t(margin), min(2 * (1 + int(tail)) / (RESAMPLES + 1), 1.0))

    return _Estimate(
        mean, n, "studentised bootstrap", lambda level: _floats(bootstrap_interval(values, level)), p_bootstrap
    )


def _rate(values: np.ndarray, units: str) -> _Estimate:
    n, k = values.size, int(values.sum())
    _enough(n, units, k / n)

    def p(margin: float) -> float:
        if margin in (0.0, 1.0):
            return float(k / n == margin)
        return float(2 * stats.norm.sf(abs(k - n * margin) / math.sqrt(n * margin * (1 - margin))))

    return _Estimate(k / n, n, "Wilson", lambda level: wilson_interval(k, n, level), p)


def _paired_rate(values: np.ndarray, other: np.ndarray, units: str) -> _Estimate:
    n, b, c = values.size, int(np.sum(values > other)), int(np.sum(values < other))
    _enough(n, units, (b - c) / n)

    def p(margin: float) -> float:
        return float(2 * stats.norm.sf(abs(tango_statistic(b, c, n, min(max(margin, -1.0), 1.0)))))

    return _Estimate((b - c) / n, n, "Tango score", lambda level: tango_interval(b, c, n, level), p)


def _studentised(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap t*, shape (..., resamples); ±inf where a resample has no spread."""
    n = values.shape[-1]
    centred = values - values.mean(-1, keepdims=True)
    scale = np.abs(centred).max(-1, keepdims=True)
    centred = centred / np.where(scale > 0, scale, 1.0)
    rng = np.random.default_rng(seed)
    pieces = []
    step = max(1, min(resamples, 4_000_000 // n))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        index = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(index.ravel(), minlength=count * n).reshape(count, n) / n
        mean = centred @ weights.T
        variance = np.maximum(centred**2 @ weights.T - mean**2, 0.0)
        variance[variance < 1e-13] = 0.0  # rounding left over where all that was drawn is equal
        with np.errstate(divide="ignore", invalid="ignore"):
            t = mean / np.sqrt(variance / (n - 1))
        pieces.append(np.where(np.isnan(t), 0.0, t))
    return np.concatenate(pieces, axis=-1)


def _standard_error(values: np.ndarray) -> np.ndarray:
    return values.std(-1, ddof=1) / math.sqrt(values.shape[-1])


def _numbers(values: Any, what: str) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise _Undecidable(f"the {what} are not all numbers") from None
    if numbers.ndim != 1:
        raise _Undecidable(f"the {what} have shape {numbers.shape} instead of one axis")
    if numbers.size == 0:
        raise _Undecidable(f"there are no {what}")
    bad = int(np.sum(~np.isfinite(numbers)))
    if bad:
        raise _Undecidable(f"{bad} of {numbers.size} {what} are NaN or infinite", n=int(numbers.size))
    return numbers


def _check_binary(values: np.ndarray, what: str) -> None:
    if not np.isin(values, (0.0, 1.0)).all():
        raise _Undecidable(f"the {what} of a rate must be 0 or 1", n=int(values.size))


def _enough(n: int, units: str, effect: float) -> None:
    if n < FEWEST_UNITS:
        counted = units[:-1] if n == 1 else units
        raise _Undecidable(f"there are only {n} {counted}, and fewer than {FEWEST_UNITS} decide nothing", effect, n)


def _verdict(
    claim: Claim,
    verdict: Outcome = "not shown",
    effect: float | None = None,
    interval: list[float] | None = None,
    n: int = 0,
    reason: str = "",
    level: float | None = None,
) -> Verdict:
    return Verdict(
        claim.id,
        claim.statement,
        verdict,
        effect,
        interval,
        claim.unit,
        n,
        float(claim.margin),
        reason,
        claim.source,
        level,
    )


def _floats(ends: tuple[Any, Any]) -> tuple[float, float]:
    return float(ends[0]), float(ends[1])


def _plural(unit: Unit) -> str:
    return f"{unit}s"


def _sentence(error: BaseException) -> str:
    """The message of ``error`` (a KeyError would show it quoted)."""
    return str(error.args[0]) if error.args else type(error).__name__
