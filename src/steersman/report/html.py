"""A comparison as one HTML file that needs nothing else: no network, no fonts, no second file.

The page's policy (a CSP meta element) forbids every request and every script but its own; all text is
escaped by the templates; pictures are data URIs and inline SVG. Contenders keep one colour and one marker
throughout. It reads on a phone, in the dark, on paper and without scripts.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from steersman import __version__
from steersman.engine.claims import FEWEST_UNITS
from steersman.engine.comparison import Comparison
from steersman.engine.rows import writing
from steersman.errors import InputError
from steersman.report import plots
from steersman.report.blocks import (
    ACTIVITIES,
    Block,
    Curves,
    ImageGrid,
    LoadMap,
    Note,
    Scatter,
    SideBySide,
    Span,
    TableBlock,
    Text,
    Timeline,
)
from steersman.report.summary import (
    Pick,
    cell,
    listed,
    missing,
    number,
    pick,
    picks,
    recipe,
    setting_name,
    shown_figures,
    span,
    troubles,
    value_name,
    varying,
    with_unit,
)
from steersman.report.terminal import BADGES, duration, sure
from steersman.report.theme import DARK, LIGHT, SHAPES, Mark, marks

MOST_COLUMNS = 16
"""Images of one contender that a grid shows."""
MOST_SIDE = 160
"""Longest side of an image in the page, in pixels."""
MOST_PIXELS = 1_500_000
"""Pixels of all images of a page together."""
MOST_PROMPTS, MOST_CHARACTERS = 12, 3000
MOST_POINTS = 1200
MOST_CARDS = 9
"""Settings that get a card each; more become a table."""
MOST_PANELS = 8
MOST_RIVALS = 5
MOST_JSON = 3_000_000
"""Characters of embedded rows; beyond it, the values behind the figures stay in the run folder."""


def write_report(comparison: Comparison, path: str | Path, exhibits: Sequence[Block] = ()) -> Path:
    """Write the report of ``comparison`` to ``path``.

    Args:
        comparison: rows of a run; it may be unfinished, empty or failed.
        path: the .html file; replaced whole.
        exhibits: the bench's blocks.

    Returns:
        Path: ``path``.

    Raises:
        InputError: an exhibit is not a block.
        OutputError: the disk can't be written.
    """
    path = Path(path)
    page = render(comparison, exhibits)
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    return path


def render(comparison: Comparison, exhibits: Sequence[Block] = ()) -> str:
    """The report as HTML text."""
    for block in exhibits:
        if not isinstance(block, Block):
            raise InputError("exhibits", type(block).__name__, "blocks of steersman.report.blocks")
    table = marks([*comparison.contenders, *_labels(exhibits)])
    names = _Names()
    found = picks(comparison)
    quality = comparison.bench.headline[0]
    script = _template("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=_title(comparison),
            headline=_headline(comparison, found),
            summary=_summary(comparison),
            marks=table,
            shapes=SHAPES,
            contenders=comparison.contenders,
            picks=[_card(comparison, p) for p in found],
            as_table=len(found) > MOST_CARDS,
            one_recipe=len({p.best for p in found}) == 1 and len(found) > 1,
            quality=quality.replace("_", " "),
            recipes={c: recipe(comparison, c) for c in comparison.contenders},
            plots=_plots(comparison, names),
            figures=_figure_table(comparison),
            glossary=_glossary(comparison),
            exhibits=_exhibits(comparison, exhibits, table, names),
            troubles=troubles(comparison),
            missing=missing(comparison),
            facts=_facts(comparison),
            command=comparison.config.get("command") or "",
            python=_python(comparison),
            downloads=_downloads(comparison),
            out=str(comparison.out),
            version=__version__,
            light=Markup(_variables(LIGHT)),
            dark=Markup(_variables(DARK)),
            style=Markup(_template("report.css")),
            script=Markup(script),
            digest=digest,
            setting_name=setting_name,
            breakable=_breakable,
            listed=listed,
            knobs=varying(comparison),
            few=_few(comparison),
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("steersman.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _variables(theme: Mapping[str, str]) -> str:
    return "".join(f"--{role}:{colour};" for role, colour in theme.items())


class _Names:
    """Names for the plots of one page, all different."""

    def __init__(self) -> None:
        self.count = 0

    def next(self) -> str:
        self.count += 1
        return f"p{self.count}"


# ------------------------------------------------------------------ the top


def _title(comparison: Comparison) -> str:
    return f"{comparison.bench.id}: {listed(comparison.contenders)} on {comparison.config.get('subject', '')}"


def _headline(comparison: Comparison, found: Sequence[Pick]) -> str:
    """The finding, as far as it is one."""
    if not comparison.contenders:
        return f"An empty {comparison.bench.id} comparison"
    if not found:
        return f"{listed([_brief(c) for c in comparison.contenders[:4]])} side by side"
    sureness = {p.verdict for p in found}
    unbeaten = [c for c in comparison.contenders if all(c == p.best or c in p.tied for p in found)]
    cost = comparison.bench.headline[1]
    place = "budget" if varying(comparison) == [cost] else "setting"
    everywhere = f" at every {place}" if len(found) > 1 else ""
    gaps = [d for p in found for d in p.rivals]
    if gaps and all(d.mean == 0 and d.interval in (None, (0.0, 0.0)) for d in gaps):
        return f"Nothing differs in {found[0].figure.replace('_', ' ')}{everywhere}"
    if sureness == {"alone"}:
        return f"{_brief(found[0].best)} on {comparison.config.get('subject', 'the subject')}"
    if not unbeaten:
        # Who leads may change by chance alone: that is no finding.
        if "unknown" in sureness:
            return "The seeds are too few to say which one is best"
        close = [c for c in comparison.contenders if all(c == p.best or c in p.close for p in found)]
        if close:
            return f"{_brief(max(close, key=lambda c: sum(p.best == c for p in found)))} is never clearly beaten"
        return f"Which one is best depends on the {place}"
    name = _brief(max(unbeaten, key=lambda c: sum(p.best == c for p in found)))
    if sureness == {"clear"}:
        return f"{name} is best{everywhere}"
    if "unknown" in sureness and any(d.mean == 0 for d in gaps):  # a tie is no lead
        return f"Nothing is better than {name}{everywhere}; the seeds are too few to be sure"
    if "unknown" in sureness:
        return f"{name} leads{everywhere}; the seeds are too few to be sure"
    if sureness <= {"tied", "clear"}:
        return f"Nothing is better than {name}{' at any ' + place if len(found) > 1 else ''}"
    return f"{name} leads{everywhere}, but not {'always ' if 'clear' in sureness else ''}clearly"


def _summary(comparison: Comparison) -> str:
    seeds = comparison.config.get("seeds", [])
    good = sum(r.status == "ok" for r in comparison.rows)
    # What varies, or else what the budget was; the rest stands at the end of the page.
    told = varying(comparison) or [comparison.bench.headline[1]]
    grid = {k: vs for k, vs in _grid(comparison).items() if k in told}
    knobs = [f"{k.replace('_', ' ')} {listed([value_name(v) for v in vs])}" for k, vs in grid.items()]
    at = f" at {'; '.join(knobs)}" if knobs else ""
    runs = f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''} each" if seeds else "no seeds"
    every = "all" if good == len(comparison.rows) else f"{good} of {len(comparison.rows)}"
    far = " so far" if missing(comparison) else ""
    state = f"{every} rows{far} went well" if comparison.rows else "no row has run yet"
    who = listed(comparison.contenders) or "no contender"
    return (
        f"The {comparison.bench.id} bench put {who} side by side on "
        f"{comparison.config.get('subject', 'its subject')}{at}, with the same random streams, {runs}; {state}."
    )


def _grid(comparison: Comparison) -> dict[str, list[Any]]:
    grid = {k: [x for x in v if x is not None] for k, v in comparison.config.get("grid", {}).items()}
    return {k: v for k, v in grid.items() if v}


def _brief(label: str) -> str:
    return label if len(label) <= 48 else label[:47] + "…"


def _breakable(label: str) -> Markup:
    """A contender's label that a line may break after its colons, plus and equals signs, and inside CamelCase."""
    return Markup(re.sub("(?<=[:+=,])|(?<=[a-z])(?=[A-Z])", "<wbr>", str(escape(label))))


def _few(comparison: Comparison) -> bool:
    """Whether no contender has rows of enough seeds for an interval."""
    counts: dict[tuple[str, str], set[int]] = {}
    for row in comparison.select():
        counts.setdefault((row.contender, json.dumps(row.setting, default=str)), set()).add(row.seed)
    return max(map(len, counts.values()), default=0) < FEWEST_UNITS


# ------------------------------------------------------------------ picks


def _card(comparison: Comparison, found: Pick) -> dict[str, Any]:
    about = comparison.bench.figures
    cost = comparison.bench.headline[1]
    shown = found.rivals[:MOST_RIVALS]
    ends = [v for d in shown for v in (d.interval or (d.mean,))]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    width = (high - low) or 1.0
    low, width = low - 0.04 * width, 1.08 * width

    def at(value: float) -> float:
        return round(100 * (value - low) / width, 2)

    strips = []
    for gap in shown:
        first, last = gap.interval or (gap.mean, gap.mean)
        strips.append(
            {
                "label": gap.b,
                "from": at(first),
                "width": round(at(last) - at(first), 2),
                "at": at(gap.mean),
                "clear": gap.clear is True,
                "text": number(gap.mean, 3),
                "interval": span(first, last) if first != last else "",
            }
        )
    return {
        "place": _place(comparison, found.setting),
        "best": found.best,
        "value": found.estimate.text,
        "unit": about[found.figure].unit,
        "cost": with_unit(f"{cost.replace('_', ' ')} {found.cost.text}", cost, about[cost].unit) if found.cost else "",
        "verdict": found.verdict,
        "badge": BADGES[found.verdict],
        "sure": sure(found),
        "zero": at(0.0),
        "strips": strips,
        "more": len(found.rivals) - len(shown),
        "left_out": found.left_out,
    }


def _place(comparison: Comparison, setting: Mapping[str, Any]) -> str:
    """ "10 calls" where the knob is the budget, "collective ring, 10 calls" otherwise."""
    cost = comparison.bench.headline[1]
    words = []
    for knob in varying(comparison):
        value = setting.get(knob)
        budget = knob == cost and isinstance(value, (int, float)) and not isinstance(value, bool)
        name = knob.replace("_", " ")
        words.append(f"{value_name(value)} {name}" if budget else f"{name} {value_name(value)}")
    return ", ".join(words) or "In this run"


# ------------------------------------------------------------------ plots


def _plots(comparison: Comparison, names: _Names) -> list[dict[str, Any]]:
    """A tab per quality; for the headline also the paired differences from the first contender."""
    shown = shown_figures(comparison)
    qualities = [n for n in shown if comparison.bench.figures[n].role == "quality"][:6]
    quality, cost = comparison.bench.headline
    if cost in comparison.bench.figures and cost not in shown:
        return []
    panels = _panels(comparison)
    tabs = []
    for figure in qualities:
        words = figure.replace("_", " ")
        label = f"{words} against {cost.replace('_', ' ')}"
        tabs.append({"title": words, "caption": "", "panels": _drawn(comparison, figure, None, panels, label, names)})
        if (
            figure == quality
            and len(comparison.contenders) > 1
            and comparison.bench.figures[figure].better != "neither"
        ):
            reference = comparison.contenders[0]
            if any(cell(comparison, figure, reference, s).n for s in comparison.settings):
                label = f"{words}: how much better than {reference}, paired by seed"
                tabs.append(
                    {
                        "title": f"{words} against {_brief(reference)}",
                        "caption": (
                            f"How much better than {reference} at the same seeds, with 95% intervals; hollow marks "
                            "are not clearly different from it."
                        ),
                        "panels": _drawn(comparison, figure, reference, panels, label, names),
                    }
                )
    return tabs


def _panels(comparison: Comparison) -> list[dict[str, Any]]:
    """Settings of the knobs that are on no axis: a small plot each."""
    cost = comparison.bench.headline[1]
    rest = [k for k in varying(comparison) if k != cost]
    if cost in comparison.bench.figures:
        # Points along one numeric knob may share a plot, joined by a line.
        numeric = [k for k in rest if all(isinstance(s.get(k), (int, float)) for s in comparison.settings)]
        rest = [k for k in rest if k not in numeric[:1]]
    seen: dict[str, dict[str, Any]] = {}
    for setting in comparison.settings:
        short = {k: setting.get(k) for k in rest}
        seen.setdefault(json.dumps(short, default=str), short)
    return list(seen.values()) or [{}]


def _drawn(
    comparison: Comparison,
    figure: str,
    reference: str | None,
    panels: Sequence[Mapping[str, Any]],
    label: str,
    names: _Names,
) -> list[dict[str, Any]]:
    drawn = []
    for panel in panels[:MOST_PANELS]:
        where = setting_name(panel)
        versions = {}
        for name, size in (("wide", plots.WIDE), ("narrow", plots.NARROW)):
            if name == "wide" and len(panels) > 1:
                continue
            if reference is None:
                canvas = plots.quality_plot(comparison, figure, panel, size)
            else:
                canvas = plots.difference_plot(comparison, figure, reference, panel, size)
            text = plots.inline_svg(canvas, names.next(), f"{label}{', ' + where if where else ''}")
            versions[name] = Markup(text)
        drawn.append({"title": where, **versions})
    return drawn


# ------------------------------------------------------------------ the table of figures


def _figure_table(comparison: Comparison) -> dict[str, Any]:
    figures = comparison.bench.figures
    columns = shown_figures(comparison)
    arrows = {"lower": "lower is better", "higher": "higher is better", "neither": ""}
    groups = []
    for setting in comparison.settings:
        best = {n: pick(comparison, setting, n) if figures[n].role != "info" else None for n in columns}
        rows = []
        for contender in comparison.contenders:
            here = comparison.select(contender, status=None, **setting)
            good = sum(r.status == "ok" for r in here)
            cells = []
            for name in columns:
                found = best[name]
                estimate = cell(comparison, name, contender, setting)
                mark = ""
                if found is not None and found.rivals:
                    if contender == found.best or contender in found.tied:
                        mark = "best"
                    elif contender in found.close:
                        mark = "close"
                note = f"{estimate.lost} of {estimate.n + estimate.lost} not a number" if estimate.lost else ""
                cells.append({"text": estimate.text, "mark": mark, "note": note if estimate.n else ""})
            states = sorted({r.status for r in here if r.status != "ok"})
            rows.append({"label": contender, "good": good, "all": len(here), "states": states, "cells": cells})
        groups.append({"title": _place(comparison, setting), "rows": rows})
    return {
        "columns": [
            {
                "name": n.replace("_", " "),
                "unit": with_unit("", n, figures[n].unit).strip(),
                "goal": arrows[figures[n].better],
            }
            for n in columns
        ],
        "groups": groups if columns else [],
        "titled": len(groups) > 1,
    }


def _glossary(comparison: Comparison) -> list[dict[str, str]]:
    goals = {"lower": "Lower is better.", "higher": "Higher is better.", "neither": ""}
    return [
        {
            "name": n.replace("_", " "),
            "text": f"{comparison.bench.figures[n].help} {goals[comparison.bench.figures[n].better]}".strip(),
        }
        for n in shown_figures(comparison)
    ]


# ------------------------------------------------------------------ exhibits


def _labels(exhibits: Sequence[Block]) -> list[str]:
    """Labels that exhibits speak of, in their order."""
    found: list[str] = []
    for block in exhibits:
        match block:
            case ImageGrid(images=things) | Scatter(points=things) | Timeline(lanes=things):
                found += things
            case LoadMap(up=things):
                found += things
            case Curves(lines=things):
                found += things
            case SideBySide(items=items):
                found += [label for item in items for label in item.texts]
    return found


def _exhibits(
    comparison: Comparison, exhibits: Sequence[Block], table: Mapping[str, Mark], names: _Names
) -> list[dict[str, Any]]:
    """The blocks, ready for the template; blocks that differ in their setting only share tabs."""
    constant = {*comparison.config.get("grid", {}), *comparison.config.get("fixed", {})} - set(varying(comparison))
    grids = [b for b in exhibits if isinstance(b, ImageGrid)]
    budget = MOST_PIXELS // max(len(grids), 1)
    groups: list[dict[str, Any]] = []
    for block in exhibits:
        ready = _ready(block, table, names, budget)
        title = getattr(block, "title", "")
        key = (type(block).__name__, title)
        where = setting_name({k: v for k, v in getattr(block, "setting", {}).items() if k not in constant})
        if groups and groups[-1]["key"] == key and where and title:
            groups[-1]["tabs"].append({"title": where, "block": ready})
        else:
            groups.append({"key": key, "title": title, "kind": key[0], "tabs": [{"title": where, "block": ready}]})
    return groups


def _ready(block: Block, table: Mapping[str, Mark], names: _Names, budget: int) -> dict[str, Any]:
    kind = type(block).__name__
    common = {"kind": kind, "caption": getattr(block, "caption", "")}
    match block:
        case ImageGrid():
            return common | _image_grid(block, budget)
        case SideBySide():
            return common | _side_by_side(block)
        case LoadMap():
            return common | _load_map(block)
        case Scatter():
            return common | _scatter(block, table)
        case Timeline():
            return common | _timeline(block, names)
        case Curves():
            label = f"{block.title}: {block.y_label} against {block.x_label}"
            versions = {
                name: Markup(plots.inline_svg(plots.curves_plot(block, table, size), names.next(), label))
                for name, size in (("wide", plots.WIDE), ("narrow", plots.NARROW))
            }
            return common | versions | {"labels": list(block.lines), "band": block.band}
        case Note():
            return common | {"text": block.text, "level": block.level}
        case TableBlock():
            return common | _plain_table(block)


def _image_grid(block: ImageGrid, budget: int) -> dict[str, Any]:
    rows, widest, side = [], 0, 0
    per_row = budget // len(block.images)
    for label, images in block.images.items():
        array = np.asarray(images)
        shrink = max(math.ceil(max(array.shape[1:3]) / MOST_SIDE), 1)
        height, width = (max(n // shrink, 1) for n in array.shape[1:3])
        columns = min(len(array), MOST_COLUMNS, max(per_row // (height * width), 1))
        small = _shrunk(plots.as_rgb(array[:columns]), shrink)
        rows.append(
            {
                "label": label,
                "images": [_data_uri("image/png", plots.png_of(image)) for image in small],
                "left_out": len(array) - columns,
            }
        )
        widest, side = max(widest, columns), max(side, small.shape[2])
    shown = max(min(side * max(round(64 / side), 1), MOST_SIDE), 48)
    return {
        "rows": rows,
        "columns": [str(c) for c in block.columns[:widest]],
        "left_out": max(row["left_out"] for row in rows),
        "side": shown,
        "pixelated": shown > side,
    }


def _shrunk(images: np.ndarray, by: int) -> np.ndarray:
    """Images ``[N, H, W, C]`` made smaller by a whole factor, each pixel the mean of its block."""
    if by == 1:
        return images
    n, h, w, c = images.shape
    cut = images[:, : h // by * by, : w // by * by].astype(np.float64)
    return np.rint(cut.reshape(n, h // by, by, w // by, by, c).mean(axis=(2, 4))).astype(np.uint8)


def _side_by_side(block: SideBySide) -> dict[str, Any]:
    items = [
        {
            "prompt": item.prompt[:MOST_CHARACTERS],
            "texts": [
                {"label": label, "pieces": _pieces(t), "facts": t.facts, "long": len(t.text) > 600}
                for label, t in item.texts.items()
            ],
        }
        for item in block.items[:MOST_PROMPTS]
    ]
    kinds = {s.kind for item in block.items for t in item.texts.values() for s in t.spans}
    names = {"loop": "said before", "steered": "steered", "good": "good", "bad": "bad"}
    return {
        "items": items,
        "left_out": len(block.items) - len(items),
        "legend": [(kind, name) for kind, name in names.items() if kind in kinds],
    }


def _pieces(text: Text) -> list[dict[str, str]]:
    """The text cut at its spans; where spans overlap, the one that starts first goes on."""
    shown = text.text[:MOST_CHARACTERS]
    pieces, at = [], 0
    for marked in sorted(text.spans, key=_start):
        start, end = max(marked.start, at), min(marked.end, len(shown))
        if start >= end:
            continue
        if start > at:
            pieces.append({"kind": "", "note": "", "text": shown[at:start]})
        pieces.append({"kind": marked.kind, "note": marked.note, "text": shown[start:end]})
        at = end
    pieces.append({"kind": "", "note": "", "text": shown[at:]})
    if len(text.text) > MOST_CHARACTERS:
        more = f" … ({len(text.text) - MOST_CHARACTERS} more characters)"
        pieces.append({"kind": "cut", "note": "", "text": more})
    return pieces


def _start(span: Span) -> int:
    return span.start


HEAT = ("#2166ac", "#92c5de", "#d8d6d0", "#f4a582", "#b2182b")
"""Idle, below ideal, ideal, above, overloaded."""
COOL = ("#fff3b8", "#f6b65b", "#d8653b", "#8f2a52", "#35155a")
"""From nothing to the most, where there is no ideal."""


def _load_map(block: LoadMap) -> dict[str, Any]:
    every = np.concatenate([np.ravel(np.asarray(m, float)) for m in [*block.up.values(), *block.down.values()]])
    known = every[np.isfinite(every)]
    most = float(known.max()) if known.size else 0.0
    ideal = block.ideal if block.ideal and block.ideal > 0 else None
    top = max(most, ideal or 0.0) or 1.0
    maps = []
    for label, up in block.up.items():
        sides = [("up", up), ("down", block.down[label])] if block.down else [("up", up)]
        drawn = []
        for side, loads in sides:
            array = np.asarray(loads, dtype=float)
            there = array[np.isfinite(array)]
            peak = float(there.max()) if there.size else math.nan
            leaves, spines = array.shape
            drawn.append(
                {
                    "side": {"up": "leaf to spine", "down": "spine to leaf"}[side] if block.down else "",
                    "image": _data_uri("image/png", plots.png_of(_heat(array, ideal, top))),
                    "alt": f"{label}: loads of {leaves} leaves (rows) by {spines} spines (columns), "
                    f"at most {number(peak, 3)} {block.unit}",
                    "ratio": f"{spines} / {leaves}",
                    "most": max(min(spines * 16, 320), 96),
                }
            )
        all_here = np.concatenate([np.ravel(np.asarray(loads, float)) for _, loads in sides])
        peak = float(np.nanmax(all_here)) if np.isfinite(all_here).any() else math.nan
        maps.append({"label": label, "sides": drawn, "peak": f"{number(peak, 3)} {block.unit}"})
    stops = _stops(ideal, top)
    marked = [("0", 0.0), *([(f"ideal {number(ideal, 3)}", ideal)] if ideal else []), (number(top, 3), top)]
    ticks = [(text, round(100 * value / top, 1)) for text, value in marked]
    if ideal and ideal < 0.18 * top:
        del ticks[0]  # no room for the zero
    if ideal and ideal > 0.82 * top:
        ticks = [ticks[0], (f"ideal {number(ideal, 3)}, most {number(top, 3)}" if top > ideal else ticks[1][0], 100.0)]
    gradient = ", ".join(f"{colour} {100 * at / top:.1f}%" for at, colour in stops)
    return {"maps": maps, "unit": block.unit, "gradient": gradient, "ticks": ticks, "gone": bool(np.isnan(every).any())}


def _stops(ideal: float | None, top: float) -> list[tuple[float, str]]:
    if ideal is None:
        return [(top * i / (len(COOL) - 1), colour) for i, colour in enumerate(COOL)]
    # Above the ideal the colours always mean the same: twice the ideal is dark red.
    over = max(top, 2 * ideal)
    return [
        (0.0, HEAT[0]),
        (0.5 * ideal, HEAT[1]),
        (ideal, HEAT[2]),
        ((ideal + over) / 2, HEAT[3]),
        (over, HEAT[4]),
    ]


def _heat(loads: np.ndarray, ideal: float | None, top: float) -> np.ndarray:
    """Loads as an image, a square a link with a gap between; links that don't exist stay empty."""
    stops = _stops(ideal, top)
    at = np.array([s[0] for s in stops])
    colours = np.array([[int(s[1][i : i + 2], 16) for i in (1, 3, 5)] for s in stops], dtype=float)
    filled = np.nan_to_num(loads)
    rgb = np.stack([np.interp(filled, at, colours[:, k]) for k in range(3)], axis=-1)
    image = np.concatenate([rgb, np.where(np.isnan(loads), 0, 255)[..., None]], axis=-1).round().astype(np.uint8)
    if max(loads.shape) > 48:
        return image
    image = image.repeat(10, axis=0).repeat(10, axis=1)
    image[9::10, :, 3] = 0
    image[:, 9::10, 3] = 0
    return image[:-1, :-1]


def _scatter(block: Scatter, table: Mapping[str, Mark]) -> dict[str, Any]:
    clouds = [np.asarray(p, float) for p in block.points.values()]
    frame = np.asarray(block.target, float) if block.target is not None else np.concatenate(clouds)
    frame = frame[np.isfinite(frame).all(axis=1)]
    if not len(frame):
        frame = np.zeros((1, 2))
    low, high = np.quantile(frame, 0.002, axis=0), np.quantile(frame, 0.998, axis=0)
    half = max(float((high - low).max()) * 0.66, 1e-9)
    middle = (low + high) / 2

    def path(points: np.ndarray) -> tuple[str, int]:
        good = points[np.isfinite(points).all(axis=1)]
        index = np.unique(np.linspace(0, len(good) - 1, min(len(good), MOST_POINTS)).round().astype(int))
        place = (good[index] - middle) / half * np.array([1.0, -1.0]) * 120 + 120
        inside = ((place >= 0) & (place <= 240)).all(axis=1)
        return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in place[inside]), len(good)

    target = path(np.asarray(block.target, float))[0] if block.target is not None else ""
    panels = []
    for label, points in block.points.items():
        array = np.asarray(points, float)
        dots, finite = path(array)
        offset = np.abs(array[np.isfinite(array).all(axis=1)] - middle).max(axis=1) > half
        notes = []
        if offset.any():
            notes.append(f"{int(offset.sum())} of {len(array)} outside the frame")
        if finite < len(array):
            notes.append(f"{len(array) - finite} of {len(array)} not a number")
        panels.append({"label": label, "path": dots, "notes": "; ".join(notes), "colour": table[label].colour})
    return {"panels": panels, "target": target}


def _timeline(block: Timeline, names: _Names) -> dict[str, Any]:
    spans = [s for workers in block.lanes.values() for lane in workers.values() for s in lane]
    end = max((s.end for s in spans), default=1.0)
    lanes = []
    for label in block.lanes:
        busy: dict[str, float] = {}
        for lane in block.lanes[label].values():
            for piece in lane:
                busy[piece.kind] = busy.get(piece.kind, 0.0) + piece.end - piece.start
        total = sum(busy.values()) or 1.0
        shares = ", ".join(f"{kind} {100 * busy[kind] / total:.0f}%" for kind in ACTIVITIES if kind in busy)
        versions = {
            name: Markup(
                plots.inline_svg(
                    plots.timeline_plot(block, label, end, size), names.next(), f"{block.title}, {label}: {shares}"
                )
            )
            for name, size in (("wide", 9.4), ("narrow", 4.4))
        }
        lanes.append({"label": label, "shares": shares, **versions})
    kinds = [(k, plots.ACTIVITY_COLOURS[k]) for k in ACTIVITIES if any(s.kind == k for s in spans)]
    return {"lanes": lanes, "kinds": kinds}


def _plain_table(block: TableBlock) -> dict[str, Any]:
    rows = []
    for row in block.rows:
        cells = []
        for name, value in zip(block.columns, row, strict=True):
            numeric = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            text = number(float(value)) if numeric else "–" if value is None else str(value)
            cells.append({"text": text, "numeric": numeric, "who": name == "contender"})
        rows.append(cells)
    columns = [
        (str(name), bool(rows) and all(row[i]["numeric"] or row[i]["text"] == "–" for row in rows))
        for i, name in enumerate(block.columns)
    ]
    return {"columns": columns, "rows": rows}


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ------------------------------------------------------------------ the end


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    config = comparison.config
    machine = dict(config.get("machine", {}))
    words = [str(machine.get("system", ""))]
    if "cores" in machine:
        words.append(f"{machine['cores']} cores, torch on {machine.get('threads', '?')} threads")
    if "gpu" in machine:
        words.append(str(machine["gpu"]))
    grid = [f"{k} {', '.join(value_name(v) for v in vs)}" for k, vs in _grid(comparison).items()]
    fixed = [f"{k} {value_name(v)}" for k, v in config.get("fixed", {}).items() if v is not None]
    wall = sum(r.timing.get("wall_s", 0.0) for r in comparison.rows)
    seeds = [str(s) for s in config.get("seeds", [])]
    run = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 6 else ", ".join(seeds)
    facts = [
        ("Bench", comparison.bench.id),
        ("Subject", str(config.get("subject", ""))),
        ("Fingerprint", str(config.get("fingerprint") or "")),
        ("Contenders", ", ".join(comparison.contenders)),
        ("Grid", "; ".join(grid)),
        ("Fixed", "; ".join(fixed)),
        ("Seeds", f"{run} ({len(seeds)})" if seeds else ""),
        ("Started", _date(str(config.get("started") or ""))),
        ("Time of all trials", duration(wall) if wall else ""),
        ("Machine", "; ".join(w for w in words if w)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in dict(config.get("versions", {})).items())),
        ("Run folder", str(comparison.out)),
    ]
    return [(name, text) for name, text in facts if text]


def _date(text: str) -> str:
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return text


def _python(comparison: Comparison) -> str:
    config = comparison.config
    grid = {**_grid(comparison), **{k: v for k, v in config.get("fixed", {}).items() if v is not None}}
    return (
        "from steersman.engine.compare import compare\n\n"
        f"compare({comparison.bench.id!r}, {config.get('subject')!r},\n"
        f"        {comparison.contenders!r},\n"
        f"        grid={grid!r},\n"
        f"        seeds={list(config.get('seeds', []))!r}, out='runs/again')"
    )


def _downloads(comparison: Comparison) -> dict[str, Any]:
    record = comparison.to_json()
    text = json.dumps(record, default=str)
    whole = len(text) <= MOST_JSON
    if not whole:
        for row in record["rows"]:
            row["per_item"] = {}
        text = json.dumps(record, default=str)
    return {
        "json": _data_uri("application/json", text.encode()),
        "csv": _data_uri("text/csv;charset=utf-8", _csv(comparison).encode("utf-8", "replace")),
        "whole": whole,
        "rows": len(comparison.rows),
    }


def _csv(comparison: Comparison) -> str:
    knobs = list(dict.fromkeys(k for r in comparison.rows for k in r.setting))
    figures = list(dict.fromkeys(k for r in comparison.rows for k in r.figures))
    timing = list(dict.fromkeys(k for r in comparison.rows for k in r.timing))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["contender", *knobs, "seed", "status", *figures, *timing, "error"])
    for row in comparison.rows:
        cells = [
            row.contender,
            *(row.setting.get(k, "") for k in knobs),
            row.seed,
            row.status,
            *(row.figures.get(k, "") for k in figures),
            *(row.timing.get(k, "") for k in timing),
            row.error or "",
        ]
        # A spreadsheet must not take a text for a formula.
        writer.writerow([f"'{c}" if isinstance(c, str) and c[:1] in tuple("=+-@\t\r") and c else c for c in cells])
    return buffer.getvalue()
