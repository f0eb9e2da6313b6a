r"""What a comparison says, in numbers: estimates, paired differences, and which contender to pick.

Contenders share seeds, so two of them are compared by their differences seed by seed. At one setting with k
contenders there are k (k - 1) / 2 differences; each gets an interval at level
:math:`1 - 0.05 / \tfrac{k (k - 1)}{2}` (Bonferroni), so that all of them hold together with 95% and picking
the best one afterwards costs nothing. With fewer than five seeds there are no intervals, only ranges.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steersman import catalog
from steersman.engine.bench import Row
from steersman.engine.claims import ALPHA, FEWEST_UNITS, Effects, interval
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import code_line
from steersman.errors import TrialError

Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A figure of one contender at one setting, over the seeds.

    Args:
        mean: of the finite values; NaN without any.
        low, high: 95% interval of the mean ("interval"), or the smallest and largest value ("range").
        n: number of finite values.
        lost: number of values that are NaN or infinite.
        kind: what ``low`` and ``high`` are; "equal" when all seeds gave the same value.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    lost: int
    kind: Literal["interval", "range", "equal", "single", "none"]

    @property
    def text(self) -> str:
        """ "0.123 ± 0.004", "0.123 (0.11 to 0.14)", "0.123", or "not a number"."""
        if self.kind == "none":
            return "not a number" if self.lost else "–"
        if self.low is None or self.high is None:
            return number(self.mean)
        low, high = self.mean - self.low, self.high - self.mean
        if self.kind == "range" or not math.isclose(low, high, rel_tol=0.05):
            return f"{number(self.mean)} ({span(self.low, self.high)})"
        return plus_minus(self.mean, high)


def estimate(values: Sequence[float] | np.ndarray, level: float = 1 - ALPHA) -> Estimate:
    """The estimate from one value a seed."""
    array = np.asarray(values, dtype=float).ravel()
    finite = array[np.isfinite(array)]
    lost = int(array.size - finite.size)
    if finite.size == 0:
        return Estimate(math.nan, None, None, 0, lost, "none")
    mean = float(finite.mean())
    if finite.size == 1:
        return Estimate(mean, None, None, 1, lost, "single")
    if np.ptp(finite) <= 1e-12 * np.abs(finite).max():
        return Estimate(mean, None, None, int(finite.size), lost, "equal")
    if finite.size < FEWEST_UNITS:
        return Estimate(mean, float(finite.min()), float(finite.max()), int(finite.size), lost, "range")
    _, low, high = interval(Effects(finite), level)
    return Estimate(mean, low, high, int(finite.size), lost, "interval")


def values(comparison: Comparison, figure: str, contender: str, setting: Setting) -> dict[int, float]:
    """``figure`` by seed, of the rows that went well; where a run was resumed with other fixed knobs, of
    the rows with the present ones."""
    rows = [r for r in comparison.select(contender, **setting) if figure in r.figures]
    fixed = comparison.config.get("fixed", {})
    present = [r for r in rows if all(r.setting.get(k) == v for k, v in fixed.items())]
    return {r.seed: r.figures[figure] for r in (present or rows)}


def cell(comparison: Comparison, figure: str, contender: str, setting: Setting) -> Estimate:
    """The estimate of ``figure`` of one contender at one setting."""
    return estimate(list(values(comparison, figure, contender, setting).values()))


@dataclass(frozen=True)
class Difference:
    """How much better ``a`` is than ``b`` (positive: better), paired by seed.

    Args:
        interval: simultaneous 95% interval; None where there is none.
        clear: whether the difference is not zero; None if it can't be said.
        n: seeds that both have.
    """

    a: str
    b: str
    mean: float
    interval: tuple[float, float] | None
    clear: bool | None
    n: int


def difference(
    comparison: Comparison, figure: str, a: str, b: str, setting: Setting, level: float = 1 - ALPHA
) -> Difference | None:
    """The paired difference of two contenders; None without a seed that both have."""
    left, right = values(comparison, figure, a, setting), values(comparison, figure, b, setting)
    seeds = [s for s in sorted(left.keys() & right.keys()) if math.isfinite(left[s]) and math.isfinite(right[s])]
    if not seeds:
        return None
    sign = 1.0 if comparison.bench.figures[figure].better == "higher" else -1.0
    gaps = sign * np.array([left[s] - right[s] for s in seeds])
    size = max(max(abs(left[s]), abs(right[s])) for s in seeds)
    gaps[np.abs(gaps) <= 1e-9 * size] = 0.0  # equal but for rounding
    mean = float(gaps.mean())
    if len(seeds) < FEWEST_UNITS:
        return Difference(a, b, mean, None, None, len(seeds))
    try:
        _, low, high = interval(Effects(gaps), level)
    except TrialError:  # all differences are equal
        return Difference(a, b, mean, (mean, mean), mean != 0, len(seeds))
    return Difference(a, b, mean, (low, high), not low <= 0 <= high, len(seeds))


@dataclass(frozen=True)
class Pick:
    """Which contender to take at one setting.

    Args:
        best: the contender with the best mean (at a tie, the cheaper one).
        rivals: how much better ``best`` is than every other contender, the closest first.
        left_out: contenders that lack some of the seeds and therefore can't be picked.
        cheaper: a contender that is not clearly worse and costs less; only where cost is a figure.
    """

    setting: dict[str, Any]
    figure: str
    best: str
    estimate: Estimate
    cost: Estimate | None
    rivals: tuple[Difference, ...]
    left_out: tuple[str, ...]
    cheaper: str | None

    @property
    def close(self) -> tuple[str, ...]:
        """Contenders that are not clearly worse."""
        return tuple(d.b for d in self.rivals if d.clear is False)

    @property
    def tied(self) -> tuple[str, ...]:
        """Contenders that are exactly as good at every seed."""
        return tuple(d.b for d in self.rivals if d.mean == 0 and d.interval == (0.0, 0.0))

    @property
    def verdict(self) -> Literal["clear", "close", "tied", "unknown", "alone"]:
        """How sure the pick is."""
        if not self.rivals:
            return "alone"
        if any(d.clear is None for d in self.rivals):
            return "unknown"
        if self.tied and set(self.close) == set(self.tied):
            return "tied"
        return "close" if self.close else "clear"


def pick(comparison: Comparison, setting: Setting, figure: str | None = None) -> Pick | None:
    """The pick at ``setting`` by ``figure`` (the bench's headline quality); None if nothing can be picked."""
    quality, cost = comparison.bench.headline
    figure = figure or quality
    better = comparison.bench.figures[figure].better
    if better == "neither":
        return None
    numbers = {c: values(comparison, figure, c, setting) for c in comparison.contenders}
    whole = [c for c in comparison.contenders if numbers[c] and _sound(comparison, c, setting, numbers[c])]
    if not whole:  # nobody has all rows: those with the most of them
        counts = {c: sum(map(math.isfinite, numbers[c].values())) for c in comparison.contenders}
        most = max(counts.values(), default=0)
        whole = [c for c, n in counts.items() if n == most > 0]
    if not whole:
        return None
    # In a run that isn't finished, some have more seeds than others: only what all have counts.
    common = set.intersection(*(set(numbers[c]) for c in whole)) or set.union(*(set(numbers[c]) for c in whole))
    found = {c: estimate([v for seed, v in numbers[c].items() if seed in common]) for c in whole}
    cost_figure = comparison.bench.figures.get(cost)
    costs = {c: cell(comparison, cost, c, setting) for c in whole} if cost_figure else {}
    sign = -1.0 if better == "higher" else 1.0
    dear = -1.0 if cost_figure and cost_figure.better == "higher" else 1.0

    def rank(contender: str) -> tuple[float, float]:
        price = costs[contender].mean if contender in costs else 0.0
        return float(f"{sign * found[contender].mean:.9e}"), dear * price if math.isfinite(price) else math.inf

    best, *others = sorted(whole, key=rank)
    pairs = len(whole) * (len(whole) - 1) // 2
    gaps = [difference(comparison, figure, best, o, setting, 1 - ALPHA / max(pairs, 1)) for o in others]
    rivals = tuple(sorted((g for g in gaps if g is not None), key=lambda g: g.mean))
    saves = [
        g.b
        for g in rivals
        if g.clear is False
        and costs
        and dear * costs[g.b].mean < dear * costs[best].mean - 1e-9 * abs(costs[best].mean)
    ]
    cheaper = min(saves, key=lambda c: dear * costs[c].mean) if saves else None
    left_out = tuple(c for c in comparison.contenders if c not in whole)
    return Pick(dict(setting), figure, best, found[best], costs.get(best), rivals, left_out, cheaper)


def _sound(comparison: Comparison, contender: str, setting: Setting, numbers: Mapping[int, float]) -> bool:
    """Whether a contender has no failed row and no value that isn't a number at ``setting``."""
    rows = comparison.select(contender, status=None, **setting)
    return all(row.status == "ok" for row in rows) and all(map(math.isfinite, numbers.values()))


def picks(comparison: Comparison) -> list[Pick]:
    """The pick at every setting where one can be made."""
    found = [pick(comparison, setting) for setting in comparison.settings]
    return [p for p in found if p is not None]


def varying(comparison: Comparison) -> list[str]:
    """The knobs that take more than one value in this run."""
    seen: dict[str, set[str]] = {}
    for setting in comparison.settings:
        for knob, value in setting.items():
            seen.setdefault(knob, set()).add(json.dumps(value, default=str))
    return [knob for knob, found in seen.items() if len(found) > 1]


def setting_name(setting: Setting, knobs: Sequence[str] | None = None) -> str:
    """ "calls 10, scale 0.5"; only ``knobs`` where given."""
    shown = [k for k in setting if knobs is None or k in knobs]
    return ", ".join(f"{k.replace('_', ' ')} {value_name(setting[k])}" for k in shown)


def value_name(value: Any) -> str:
    """A setting's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "not set" if value is None else str(value)


def shown_figures(comparison: Comparison) -> list[str]:
    """The figures that any row has: qualities first (the headline leading), then costs, then the rest."""
    present = {name for row in comparison.rows for name in row.figures}
    order = {"quality": 0, "cost": 1, "info": 2}
    names = [name for name in comparison.bench.figures if name in present]
    quality = comparison.bench.headline[0]
    return sorted(names, key=lambda n: (n != quality, order[comparison.bench.figures[n].role]))


@dataclass(frozen=True)
class Trouble:
    """Rows of one contender at one setting that failed or could not run, for one reason."""

    contender: str
    setting: dict[str, Any]
    status: str
    seeds: list[int]
    reason: str


def troubles(comparison: Comparison) -> list[Trouble]:
    """The rows that have no figures, grouped by reason."""
    groups: dict[tuple[str, str, str, str], Trouble] = {}
    knobs = varying(comparison)
    for row in comparison.rows:
        if row.status == "ok":
            continue
        setting = {k: row.setting[k] for k in knobs if k in row.setting}
        key = (row.contender, json.dumps(setting, default=str), row.status, row.error or "")
        groups.setdefault(key, Trouble(row.contender, setting, row.status, [], row.error or "no reason given"))
        groups[key].seeds.append(row.seed)
    return sorted(groups.values(), key=lambda t: t.status)


def missing(comparison: Comparison) -> int:
    """How many rows of the grid have not run (the run was interrupted)."""
    have = {(r.contender, json.dumps(_short(r, comparison), default=str), r.seed) for r in comparison.rows}
    sizes = [len(v) for v in comparison.config.get("grid", {}).values()]
    seeds = comparison.config.get("seeds", [])
    asked = math.prod(sizes) * len(seeds) * len(comparison.contenders)
    return max(asked - len(have), 0)


def _short(row: Row, comparison: Comparison) -> dict[str, Any]:
    return {k: row.setting.get(k) for k in comparison.config.get("grid", {})}


@dataclass(frozen=True)
class Recipe:
    """How to use a contender: the code lines that apply it, what it is, and its papers (title, address)."""

    lines: tuple[str, ...]
    summary: str
    papers: tuple[tuple[str, str], ...]


def recipe(comparison: Comparison, contender: str) -> Recipe:
    """The recipe of a contender, from its parts' cards and from the bench's own parts."""
    own = comparison.bench.parts()
    lines, summaries, papers = [], [], []
    for part in comparison.config.get("parts", {}).get(contender, []):
        name, knobs = part["id"], part.get("knobs", {})
        if name in own:
            template, summary = own[name].line, own[name].summary
        elif name in catalog.cards():
            card = catalog.cards()[name]
            template, summary = card.line.replace("{folder}", "FOLDER"), card.summary
            papers.append((str(card.paper.get("title", card.title)), str(card.paper.get("url", ""))))
            module, _, attribute = card.object.partition(":")
            if template and attribute and attribute in template:
                home = f"steersman.{card.room}" if card.distribution == "steersman" else module
                lines.append(f"from {home} import {attribute}")
        elif os.path.isfile(os.path.join(name, "artefact.json")):  # of any text: never raises
            template, summary = _artefact_line(name), f"made by steersman apply: {name}"
        else:
            foreign = getattr(comparison.bench, "accepts", lambda name: None)(name)
            template, summary = (foreign.line, foreign.summary) if foreign is not None else ("", "")
        if template:
            lines.append(code_line(template, knobs))
        if summary:
            summaries.append(summary)
    # Imports first, each once.
    ordered = sorted(dict.fromkeys(lines), key=lambda line: not line.startswith("from "))
    return Recipe(tuple(ordered), " + ".join(summaries), tuple(papers))


def _artefact_line(folder: str) -> str:
    """The line that uses an artefact: its method's, where that names the folder; or the one that loads it."""
    with suppress(OSError, ValueError, KeyError):
        card = catalog.cards()[json.loads(Path(folder, "artefact.json").read_text())["method"]]
        if "{folder}" in card.line:
            return card.line.replace("{folder}", folder)
    return f'pipe = DiffusionPipeline.from_pretrained("{folder}")' if Path(folder, "model_index.json").is_file() else ""


# ------------------------------------------------------------------ numbers as text


def number(x: float, digits: int = 4) -> str:
    """``x`` with ``digits`` significant digits, without needless zeros; "×10ⁿ" where that reads better."""
    if isinstance(x, bool) or x is None:
        return str(x)
    if not math.isfinite(x):
        return {math.inf: "∞", -math.inf: "−∞"}.get(x, "not a number")
    if x == 0:
        return "0"
    if float(x).is_integer() and abs(x) < 1e9:
        return f"{int(x):,}".replace("-", "−") if abs(x) >= 10_000 else f"{int(x)}".replace("-", "−")
    if float(f"{x:.{digits}g}") == x and 1e-4 <= abs(x) < 1e6:
        return f"{x:.{digits}g}".replace("-", "−")
    exponent = int(f"{x:.{digits - 1}e}".partition("e")[2])
    if -4 <= exponent < 6:
        return f"{x:.{max(digits - 1 - exponent, 0)}f}".replace("-", "−")
    return _scientific(f"{x:.{digits - 1}e}")


def span(low: float, high: float, digits: int = 3) -> str:
    """ "0.21 to 0.36": as many digits as it takes to tell the ends apart."""
    while digits < 8 and low != high and number(low, digits) == number(high, digits):
        digits += 1
    return f"{number(low, digits)} to {number(high, digits)}"


def plus_minus(mean: float, half: float) -> str:
    """ "0.1234 ± 0.0056": two digits of the half width, and the mean to the same place."""
    if not math.isfinite(half) or half < 1e-300:  # nothing, or too small to be divided by
        return number(mean)
    place = math.floor(math.log10(half)) - 1
    size = math.floor(math.log10(max(abs(mean), half)))
    if not (-4 <= size < 6):
        scale = 10.0**size
        decimals = max(min(size - place, 4), 0)
        power = _scientific(f"1e{size}").removeprefix("1")
        return f"({mean / scale:.{decimals}f} ± {half / scale:.{decimals}f}){power}".replace("-", "−")
    decimals = max(min(-place, 6), 0)
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")


def _scientific(text: str) -> str:
    mantissa, _, power = text.partition("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×10{raised}".replace("-", "−")


def with_unit(text: str, name: str, unit: str) -> str:
    """``text`` followed by its unit, unless the figure's ``name`` says it already."""
    return text if not unit or unit == name.replace("_", " ") else f"{text} {unit}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """ "a, b and c"."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}" if names else ""
