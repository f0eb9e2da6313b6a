"""What a report on speculation shows: bounds and gaps, yield against depth, lengths of rounds, and a recommendation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from steersman import catalog
from steersman.engine.bench import Row
from steersman.engine.claims import FEWEST_UNITS
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import code_line
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
    table = _recommended(comparison)
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


def choices(comparison: Comparison, contender: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What a contender's loop settled of :data:`CHOICES`; of PEARL's gamma, what it measured."""
    for row in comparison.select(contender, **setting):
        records = _of(comparison, row, "choices")
        if not records:
            continue
        found = {name: value for name, value in records[0].items() if value is not None}
        gamma = cell(comparison, "gamma", contender, setting)
        if "gamma" in found and gamma.n:
            found["gamma"] = round(gamma.mean)
        return found
    return {}


def _of(comparison: Comparison, row: Row, name: str) -> list[dict[str, Any]]:
    """The records that a row saved as ``name``; none where it saved none."""
    folder = row.items_dir(comparison.out)
    if folder is None or not (folder / f"{name}.json").is_file():
        return []
    return json.loads((folder / f"{name}.json").read_text())


def _yield(comparison: Comparison, setting: Mapping[str, Any]) -> list[Block]:
    """Tokens per target call against the depth of the tree or the length of the block, a line for each width."""
    points: dict[str, dict[int, float]] = {}
    for contender in comparison.contenders:
        chosen = choices(comparison, contender, setting)
        value = cell(comparison, "tokens_per_target_call", contender, setting).mean
        if "depth" in chosen:
            points.setdefault(f"n = {chosen['n_drafts']}, {chosen['verifier']}", {})[chosen["depth"]] = value
        elif "gamma" in chosen:
            points.setdefault(f"PEARL, {chosen['variant']}", {})[chosen["gamma"]] = value
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
        first = int(shares[0] == 0)  # a round of PEARL's ablations may add nothing
        lines[contender] = Line(list(range(first, len(shares))), shares[first:].tolist())
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
    seen: set[tuple[int, int, str]] = set()
    for row in comparison.select(**setting):
        for record in _of(comparison, row, "acceptance"):
            place = (record["n"], record["verifier"])
            if (row.seed, *place) in seen:  # contenders with one number of drafts share the table
                continue
            seen.add((row.seed, *place))
            samplers[record["verifier"]] = record["sampler"]
            values = found.setdefault(place, {"acceptance": [], "bound": []})
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


def recommendations(comparison: Comparison) -> list[tuple[str, str]]:
    """For each setting (in words) the line of code of its fastest contender, with all that its loop settled."""
    found = []
    for setting in comparison.settings:
        best = pick(comparison, setting)
        if best is not None:
            chosen = choices(comparison, best.best, setting)
            where = setting_name(setting, varying(comparison)) or "at every setting"
            found.append((where, code(comparison, best.best, chosen)))
    return found


def _recommended(comparison: Comparison) -> list[Block]:
    """What to run for this pair on this machine, at each setting, and how sure that is."""
    rows, notes = [], []
    figure = comparison.bench.headline[0]
    kind = "simulated " if figure.startswith("simulated") else ""
    for setting in comparison.settings:
        best = pick(comparison, setting)
        if best is None:
            continue
        chosen = choices(comparison, best.best, setting)
        where = setting_name(setting, varying(comparison)) or "at every setting"
        rows.append(
            [
                where,
                best.best,
                ", ".join(f"{name} {value}" for name, value in chosen.items()) or "-",
                best.estimate.mean,
                _against(comparison, figure, best.best, PLAIN, setting),
                _against(comparison, figure, best.best, _fastest(comparison, figure, setting), setting),
            ]
        )
        text = f"{where}: {code(comparison, best.best, chosen)}"
        plan = _plan(comparison, setting)
        if plan is not None:
            text += (
                " · Estimated also for what was not run, from the pair's acceptance, the times of its forwards and the "
                f"measured overhead of a round: {plan['line']} is fastest, with {number(plan['ms_per_token'], 3)} "
                f"{kind}ms a token. That takes tokens for independent: try it before you believe it."
            )
        notes.append(Note(text, title="Recommendation"))
    if not rows:
        return []
    times = "with simulated times" if kind else "for this pair on this machine"
    caption = f"The fastest contender of each setting, {times}, and how many times as many tokens it writes per second."
    if len(comparison.config.get("seeds", [])) < FEWEST_UNITS:
        caption += f" With fewer than {FEWEST_UNITS} seeds nothing is said of chance."
    columns = (
        "setting",
        "contender",
        "choices",
        f"{kind}tokens/s",
        "against plain generation",
        "against the best of assisted",
    )
    return [TableBlock("Recommendation", columns, rows, caption=caption), *notes]


def code(comparison: Comparison, contender: str, chosen: Mapping[str, Any]) -> str:
    """The line of code, with everything that the loop settled."""
    parts = comparison.config.get("parts", {}).get(contender, [])
    cards = [catalog.cards().get(part["id"]) for part in parts]
    if len(parts) == 1 and cards[0] is not None and chosen:
        return code_line(cards[0].line, {**parts[0]["knobs"], **chosen})
    return "; ".join(recipe(comparison, contender).lines)


def _plan(comparison: Comparison, setting: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan that ought to be fastest, with the overhead that its loop was measured to have in each round.

    A loop of which nothing was run has no plan. PEARL's is planned where times are simulated, and overheads small.
    """
    overheads: dict[str, list[float]] = {}
    found: list[dict[str, Any]] = []
    for row in comparison.select(**setting):
        found = found or _of(comparison, row, "plans")
        if "overhead_ms" in row.figures:
            each = row.figures["overhead_ms"] * row.figures["tokens_per_round"]
            overheads.setdefault(row.parts[0]["id"], []).append(each)
        elif row.parts[0]["id"] == "pearl":
            overheads.setdefault("pearl", []).append(0.0)
    plans = [
        {**plan, "ms_per_token": plan["ms_per_token"] + np.mean(overheads[plan["method"]]) / plan["tokens_per_round"]}
        for plan in found
        if plan["method"] in overheads
    ]
    return min(plans, key=lambda plan: plan["ms_per_token"]) if plans else None


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
    return f"{times} {other if other != PLAIN else ''}".strip() + _sureness(gap, figure)


def _sureness(gap: Difference, figure: str) -> str:
    if gap.interval is None:
        return ""
    low, high = gap.interval
    figure_name = "simulated tokens/s" if figure.startswith("simulated") else "tokens/s"
    return f" ({'clear' if gap.clear else 'not clear'}: {span(low, high)} {figure_name} more)"
