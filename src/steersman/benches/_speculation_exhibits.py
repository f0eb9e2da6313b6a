"""What a report on speculation shows: bounds and gaps, yield against depth, lengths of rounds, and a recommendation."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from steersman import catalog
from steersman.engine.comparison import Comparison
from steersman.report.blocks import Block, Curves, Line, Note, TableBlock
from steersman.report.summary import Difference, cell, difference, number, pick, recipe, setting_name, span, varying

PLAIN, ASSISTED = "autoregressive", "assisted"
CHOICES = ("n_drafts", "depth", "sampler", "verifier", "gamma", "variant")  # what a recommendation settles


def exhibits(comparison: Comparison) -> list[Block]:
    """All blocks of the report, the recommendation last."""
    blocks: list[Block] = [_how_to_read(comparison)]
    for setting in comparison.settings:
        blocks += _yield(comparison, setting)
    for setting in comparison.settings:
        blocks += _rounds(comparison, setting)
    for setting in comparison.settings:
        blocks += _bounds(comparison, setting)
    table = _recommendations(comparison)
    return [*blocks, *table]


def _how_to_read(comparison: Comparison) -> Note:
    simulated = any("simulated_tokens_per_s" in row.figures for row in comparison.rows)
    text = (
        "All contenders write with the target's law: they differ in cost alone. Calls hold on every machine, times on "
        "this one. All had the same threads in total; PEARL runs both models at once and gives each its share. "
    )
    unequal = sorted({r.contender for r in comparison.rows if r.figures.get("equal_text", 1.0) < 1})
    if unequal:
        text += (
            f"Some greedy texts of {', '.join(unequal)} are not plain generation's: where two tokens are equally "
            "probable to the last digit, a forward of several tokens may round otherwise than one of a single token. "
        )
    if not simulated:
        return Note(text.strip(), title="How to read these figures")
    text += "Times are simulated: every forward takes the given time, whatever it computes, for one token or many."
    late = max((row.figures.get("late", 0.0) for row in comparison.rows), default=0.0)
    if late > 0.05:
        text += f" Up to {100 * late:.0f}% of a contender's forwards took longer than that by themselves."
    return Note(text, level="warning", title="Simulated times")


def choices(comparison: Comparison, contender: str) -> dict[str, Any]:
    """What a contender settles of :data:`CHOICES`: its knobs, or their defaults."""
    found: dict[str, Any] = {}
    for part in comparison.config.get("parts", {}).get(contender, []):
        card = catalog.cards().get(part["id"])
        if card is not None and part["id"] not in comparison.bench.parts():
            parameters = inspect.signature(card.load()).parameters
            found |= {k: p.default for k, p in parameters.items() if k in CHOICES}
        found |= {k: v for k, v in part["knobs"].items() if k in CHOICES}
    return found


def _yield(comparison: Comparison, setting: Mapping[str, Any]) -> list[Block]:
    """Tokens per target call against the depth of the tree or the length of the block, a line for each width."""
    points: dict[str, dict[int, float]] = {}
    for contender in comparison.contenders:
        chosen = choices(comparison, contender)
        value = cell(comparison, "tokens_per_target_call", contender, setting)
        if value.n == 0:
            continue
        if isinstance(chosen.get("depth"), int):
            name = f"n = {chosen['n_drafts']}, {chosen.get('sampler') or chosen.get('verifier') or 'default'}"
            points.setdefault(name, {})[chosen["depth"]] = value.mean
        elif "gamma" in chosen:
            length = chosen["gamma"]
            if not isinstance(length, int):
                length = round(cell(comparison, "gamma", contender, setting).mean)
            points.setdefault(f"PEARL, {chosen.get('variant', 'full')}", {})[length] = value.mean
    lines = {
        name: Line(sorted(found), [found[x] for x in sorted(found)]) for name, found in points.items() if len(found) > 1
    }
    if not lines:
        return []
    return [
        Curves(
            "Yield against depth",
            lines,
            "depth of the tree, or length of the block (tokens)",
            "tokens per target call",
            setting=setting,
        )
    ]


def _rounds(comparison: Comparison, setting: Mapping[str, Any]) -> list[Block]:
    """How often a round added 1, 2, ... tokens."""
    lines = {}
    for contender in comparison.contenders:
        added: list[np.ndarray] = []
        for row in comparison.select(contender, **setting):
            folder = row.items_dir(comparison.out)
            if folder is not None and (folder / "rounds.npz").is_file():
                with np.load(folder / "rounds.npz") as arrays:
                    added.append(arrays["added"])
        sizes = np.concatenate(added) if added else np.zeros(0, dtype=int)
        if contender == PLAIN or sizes.size == 0:
            continue
        shares = np.bincount(sizes) / sizes.size
        lines[contender] = Line(list(range(len(shares))), shares.tolist())
    if not lines:
        return []
    caption = "Share of rounds that added so many tokens: the run of drafts that was kept, and what the target added."
    return [
        Curves("Accepted runs", lines, "tokens added by a round", "share of rounds", caption=caption, setting=setting)
    ]


def _bounds(comparison: Comparison, setting: Mapping[str, Any]) -> list[Block]:
    """Bound, acceptance and gap of every verifier for the numbers of drafts that contenders have."""
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    samplers: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    for row in comparison.select(**setting):
        folder = row.items_dir(comparison.out)
        if folder is None or not (folder / "acceptance.json").is_file():
            continue
        records = json.loads((folder / "acceptance.json").read_text())
        if not records or (row.seed, records[0]["n"]) in seen:
            continue
        seen.add((row.seed, records[0]["n"]))
        for record in records:
            samplers[record["verifier"]] = record["sampler"]
            values = found.setdefault((record["n"], record["verifier"]), {"acceptance": [], "bound": []})
            values["acceptance"].append(record["acceptance"])
            values["bound"].append(record["bound"])
    rows = [
        [
            n,
            samplers[verifier],
            verifier,
            float(np.mean(values["bound"])),
            float(np.mean(values["acceptance"])),
            max(float(np.mean(values["bound"]) - np.mean(values["acceptance"])), 0.0),
        ]
        for (n, verifier), values in sorted(found.items())
    ]
    if not rows:
        return []
    caption = (
        "Chance that the token kept at a place is one of the n drafts, in the mean over places that the target itself "
        "wrote: the most that any verifier reaches with drafts of that sampler, what the verifier reaches, and the gap."
    )
    columns = ("n", "sampler", "verifier", "bound", "acceptance", "gap")
    return [TableBlock("Acceptance, its bound and the gap", columns, rows, caption=caption, setting=setting)]


def _recommendations(comparison: Comparison) -> list[Block]:
    """What to run for this pair on this machine, at each setting, as a line of code."""
    rows, lines = [], []
    figure = comparison.bench.headline[0]
    for setting in comparison.settings:
        best = pick(comparison, setting)
        if best is None:
            continue
        chosen = choices(comparison, best.best)
        where = setting_name(setting, varying(comparison)) or "all"
        rows.append(
            [
                where,
                best.best,
                ", ".join(f"{k} {v}" for k, v in chosen.items()) or "-",
                best.estimate.mean,
                _against(comparison, figure, best.best, PLAIN, setting),
                _against(comparison, figure, best.best, _fastest(comparison, figure, setting), setting),
            ]
        )
        code = "; ".join(recipe(comparison, best.best).lines)
        lines.append(f"{where}: {code}")
    if not rows:
        return []
    simulated = figure.startswith("simulated")
    caption = (
        "The fastest contender of each setting"
        + (", with simulated times" if simulated else " for this pair on this machine")
        + ", and how many times as many tokens per second it writes. "
        + (
            "With fewer than five seeds nothing is said of chance."
            if len(comparison.config.get("seeds", [])) < 5
            else ""
        )
    )
    columns = (
        "setting",
        "contender",
        "choices",
        "tokens/s",
        "against plain generation",
        "against the best of assisted",
    )
    table = TableBlock("Recommendation", columns, rows, caption=caption.strip())
    return [table, *(Note(line, title="Recommendation") for line in lines)]


def _fastest(comparison: Comparison, figure: str, setting: Mapping[str, Any]) -> str | None:
    """The assisted contender with the most tokens per second."""
    means = {
        c: cell(comparison, figure, c, setting).mean
        for c in comparison.contenders
        if c.partition(":")[0] == ASSISTED and cell(comparison, figure, c, setting).n
    }
    return max(means, key=lambda c: means[c]) if means else None


def _against(comparison: Comparison, figure: str, best: str, other: str | None, setting: Mapping[str, Any]) -> str:
    """ "1.62 times" and whether the difference is clear, seed by seed."""
    if other is None or other not in comparison.contenders or other == best:
        return "itself" if other == best else "not run"
    theirs = cell(comparison, figure, other, setting)
    gap = difference(comparison, figure, best, other, setting)
    if theirs.n == 0 or gap is None:
        return "no rows"
    times = f"{number(cell(comparison, figure, best, setting).mean / theirs.mean, 3)} times"
    return f"{times} {other if other != PLAIN else ''}".strip() + _sureness(gap)


def _sureness(gap: Difference) -> str:
    if gap.interval is None:
        return ""
    low, high = gap.interval
    return f" ({'clear' if gap.clear else 'not clear'}: {span(low, high)} tokens/s more)"
