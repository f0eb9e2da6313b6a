"""Plots, drawn once and coloured where they are shown.

Figures are drawn in stand-in colours (:data:`steersman.report.theme.SYMBOLIC`). :func:`inline_svg` puts CSS
variables in their place, so that a plot in a page follows the page's light and dark colours;
:func:`standalone_svg` also brings the variables along; :func:`png` draws in fixed colours.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import image as mpl_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from steersman.engine.comparison import Comparison
from steersman.report.blocks import Curves, ImageGrid, Timeline
from steersman.report.summary import Estimate, cell, difference, number, setting_name, varying
from steersman.report.theme import DARK, LIGHT, MARKERS, SYMBOLIC, Mark, marks

Theme = Mapping[str, str]
WIDE, NARROW = (9.4, 4.3), (4.4, 3.7)
"""Sizes in inches; the narrow one is for phones and small multiples."""

MOST_SPANS = 1500
"""Spans that a timeline draws for one contender; the shortest ones beyond are left out."""


def quality_plot(
    comparison: Comparison,
    figure: str,
    panel: Mapping[str, Any] | None = None,
    size: tuple[float, float] = WIDE,
    theme: Theme = SYMBOLIC,
) -> Figure:
    """``figure`` against the bench's cost, with intervals; only the settings that match ``panel``.

    The cost is the headline's: a knob of the grid (its values are the axis) or a figure (each setting is a
    point with its own mean cost).
    """
    cost = comparison.bench.headline[1]
    settings = [s for s in comparison.settings if all(s.get(k) == v for k, v in (panel or {}).items())]
    with _style(theme):
        canvas = Figure(figsize=size, layout="constrained")
        axes = _axes(canvas, theme)
        by_knob = cost in comparison.bench.knobs and cost not in comparison.bench.figures
        names = list(dict.fromkeys(str(s.get(cost)) for s in settings))
        # A single value is no axis: contenders then stand beside each other.
        numeric = by_knob and len(names) > 1 and all(_is_number(s.get(cost)) for s in settings)
        labels = comparison.contenders
        all_x, all_y = [], []
        drawn: list[tuple[Mark, list[tuple[Any, Estimate]]]] = []
        for place, (label, mark) in enumerate(marks(labels).items()):
            points: list[tuple[Any, Estimate]] = []
            for setting in settings:
                y = cell(comparison, figure, label, setting)
                if y.kind == "none":
                    continue
                if numeric:
                    x: Estimate | float = float(setting[cost])
                elif by_knob:
                    # Names side by side, contenders beside each other within a name.
                    x = names.index(str(setting.get(cost))) + 0.5 * (place / max(len(labels) - 1, 1) - 0.5)
                else:
                    x = cell(comparison, cost, label, setting)
                    if x.kind == "none":
                        continue
                points.append((x, y))
            points.sort(key=lambda p: _middle(p[0]))
            drawn.append((mark, points))
            all_x += [_middle(p[0]) for p in points]
            all_y += [p[1].mean for p in points]
        for i, (mark, points) in enumerate(drawn):
            # What later contenders cover is drawn larger, so that it shows around them.
            later = [(_middle(x), y.mean) for _, others in drawn[i + 1 :] for x, y in others]
            sizes = [7.5 + 3.5 * sum(_close(p, (_middle(x), y.mean)) for p in later) for x, y in points]
            _points(axes, points, mark, theme, joined=numeric or not by_knob, sizes=sizes)
        if numeric or not by_knob:
            _scale(axes, "x", all_x, ticks=sorted({float(s[cost]) for s in settings}) if numeric else None)
        else:
            axes.set_xticks(range(len(names)), [textwrap.shorten(n, 18, placeholder="…") for n in names])
            axes.set_xlim(-0.6, len(names) - 0.4)
        _scale(axes, "y", all_y)
        axes.set_xlabel(_axis_name(comparison, cost))
        axes.set_ylabel(_axis_name(comparison, figure))
        return canvas


def difference_plot(
    comparison: Comparison,
    figure: str,
    reference: str,
    panel: Mapping[str, Any] | None = None,
    size: tuple[float, float] = WIDE,
    theme: Theme = SYMBOLIC,
) -> Figure:
    """How much better each contender is than ``reference`` at each setting, paired by seed (95% each)."""
    settings = [s for s in comparison.settings if all(s.get(k) == v for k, v in (panel or {}).items())]
    shown = [k for k in varying(comparison) if k not in (panel or {})]
    with _style(theme):
        canvas = Figure(figsize=size, layout="constrained")
        axes = _axes(canvas, theme)
        axes.axhline(0, color=theme["muted"], linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        table = marks(comparison.contenders)
        others = [c for c in comparison.contenders if c != reference]
        for place, label in enumerate(others):
            shift = 0.0 if len(others) == 1 else 0.6 * (place / (len(others) - 1) - 0.5)
            for i, setting in enumerate(settings):
                gap = difference(comparison, figure, label, reference, setting)
                if gap is None:
                    continue
                colour = theme[table[label].colour]
                if gap.interval is not None:
                    axes.plot([i + shift] * 2, gap.interval, color=colour, linewidth=2.4, solid_capstyle="butt")
                hollow = gap.clear is not True
                axes.plot(
                    [i + shift],
                    [gap.mean],
                    MARKERS[table[label].marker],
                    color=colour,
                    markersize=7.5,
                    markerfacecolor=theme["page"] if hollow else colour,
                    markeredgewidth=1.6,
                )
        names = [setting_name(s, shown) or "all rows" for s in settings]
        axes.set_xticks(range(len(names)), [textwrap.fill(n, 14) for n in names])
        axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
        unit = comparison.bench.figures[figure].unit
        axes.set_ylabel(f"better than {_short(reference, 24)} by{f' ({unit})' if unit else ''}")
        return canvas


def curves_plot(
    block: Curves, table: Mapping[str, Mark], size: tuple[float, float] = WIDE, theme: Theme = SYMBOLIC
) -> Figure:
    """The lines of a :class:`~steersman.report.blocks.Curves` block."""
    with _style(theme):
        canvas = Figure(figsize=size, layout="constrained")
        axes = _axes(canvas, theme)
        for label, line in block.lines.items():
            x, y = _thinned(line.x, line.y)
            mark = table[label]
            few = len(x) <= 24
            axes.plot(
                x,
                y,
                color=theme[mark.colour],
                linestyle=mark.dashes,
                marker=MARKERS[mark.marker] if few else None,
                markersize=5.5,
                zorder=3,
            )
            if line.low is not None and line.high is not None:
                _, low = _thinned(line.x, line.low)
                _, high = _thinned(line.x, line.high)
                axes.fill_between(x, low, high, color=theme[mark.colour], alpha=0.16, linewidth=0)
        finite = [np.asarray(v, float)[np.isfinite(np.asarray(v, float))] for v in _all_values(block)]
        if block.log_x and all((v > 0).all() for v in finite[0::2]):
            axes.set_xscale("log")
        if block.log_y and all((v > 0).all() for v in finite[1::2]):
            axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_tick))
        axes.set_xlabel(block.x_label)
        axes.set_ylabel(block.y_label)
        return canvas


ACTIVITY_COLOURS = {"compute": "c0", "communicate": "c1", "wait": "line", "other": "muted"}


def timeline_plot(block: Timeline, label: str, end: float, size_x: float = 9.4, theme: Theme = SYMBOLIC) -> Figure:
    """One contender's lanes of a :class:`~steersman.report.blocks.Timeline`, on an axis up to ``end``."""
    workers = block.lanes[label]
    with _style(theme):
        canvas = Figure(figsize=(size_x, 0.75 + 0.3 * len(workers)), layout="constrained")
        axes = _axes(canvas, theme)
        for lane, spans in enumerate(workers.values()):
            longest = sorted(spans, key=lambda s: s.start - s.end)[:MOST_SPANS]
            for kind, colour in ACTIVITY_COLOURS.items():
                pieces = [(s.start, s.end - s.start) for s in longest if s.kind == kind]
                if pieces:
                    # Communication is drawn lower, so that the two differ without colour too.
                    height = 0.34 if kind == "communicate" else 0.72
                    axes.broken_barh(pieces, (lane - height / 2, height), facecolors=theme[colour], linewidth=0)
        axes.set_yticks(range(len(workers)), [_short(str(w), 16) for w in workers])
        axes.set_ylim(len(workers) - 0.5, -0.5)
        axes.set_xlim(0, end or 1)
        axes.grid(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("seconds")
        return canvas


# ------------------------------------------------------------------ evidence

VERDICTS = {"holds": ("good", "o", True), "fails": ("bad", "X", True), "not shown": ("warn", "D", False)}
"""Colour, marker, and whether it is filled."""


def forest(verdicts: Sequence[Any], theme: Theme = SYMBOLIC, width: float = 8.6) -> Figure:
    """Claims with their effects and intervals against their margins.

    Each claim has its own scale, with its margin in the middle: an interval to the right of the middle
    line holds, one to the left fails, one across it is not shown. A small tick marks no effect at all.

    Args:
        verdicts: :class:`~steersman.engine.claims.Verdict` or mappings with their fields.
    """
    claims: list[Mapping[str, Any]] = [
        asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for v in verdicts
    ]
    rows = max(len(claims), 1)
    with _style(theme):
        canvas = Figure(figsize=(width, 0.95 + 0.52 * rows), layout=None)
        top, bottom = 1 - 0.5 / (0.95 + 0.52 * rows), 0.4 / (0.95 + 0.52 * rows)
        axes = canvas.add_axes((0.35, bottom, 0.36, top - bottom))
        axes.set_xlim(-1.15, 1.15)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.axvspan(0, 1.15, color=theme["good"], alpha=0.09, linewidth=0)
        axes.axvspan(-1.15, 0, color=theme["bad"], alpha=0.07, linewidth=0)
        axes.axvline(0, color=theme["ink"], linewidth=1.2)
        for i, claim in enumerate(claims):
            colour, marker, filled = VERDICTS.get(claim["verdict"], VERDICTS["not shown"])
            effect, margin = claim.get("effect"), float(claim.get("margin") or 0.0)
            ends = [v for v in (claim.get("interval") or []) if v is not None and math.isfinite(v)]
            known = [*ends, *([effect] if effect is not None and math.isfinite(effect) else [])]
            reach = max([abs(v - margin) for v in known] + [abs(margin)], default=0.0) or 1.0
            if margin and known:
                axes.plot([-margin / reach] * 2, [i - 0.16, i + 0.16], color=theme["muted"], linewidth=1.2)
            if len(ends) == 2:
                x = [(v - margin) / reach for v in ends]
                axes.plot(x, [i, i], color=theme[colour], linewidth=3, solid_capstyle="butt", zorder=3)
            if known:
                axes.plot(
                    [((effect if effect is not None else known[0]) - margin) / reach],
                    [i],
                    marker,
                    color=theme[colour],
                    markersize=9,
                    markerfacecolor=theme[colour] if filled else theme["page"],
                    markeredgecolor=theme["page"] if filled else theme[colour],
                    markeredgewidth=0.8 if filled else 1.6,
                    zorder=4,
                )
            axes.text(
                -1.22, i, textwrap.fill(str(claim["id"]), 30), ha="right", va="center", color=theme["ink"], fontsize=9.5
            )
            said = "no effect known" if effect is None else number(float(effect), 3)
            if len(ends) == 2:
                said += f"  [{number(ends[0], 3)}, {number(ends[1], 3)}]"
            axes.text(
                1.22,
                i - 0.17,
                f"{claim['verdict']} (margin {number(margin, 3)})",
                va="center",
                color=theme[colour],
                fontsize=9.5,
                weight="bold",
            )
            axes.text(1.22, i + 0.21, said, va="center", color=theme["muted"], fontsize=8.5)
        axes.text(-1.1, -0.62, "fails", va="bottom", color=theme["bad"], fontsize=9)
        axes.text(0, -0.62, "margin", ha="center", va="bottom", color=theme["muted"], fontsize=9)
        axes.text(1.1, -0.62, "holds", ha="right", va="bottom", color=theme["good"], fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)
        return canvas


# ------------------------------------------------------------------ a picture of a comparison


def overview(comparison: Comparison, exhibits: Sequence[Any] = (), theme: Theme = LIGHT) -> Figure:
    """Quality against cost beside the first image grid: one picture of a comparison (README, slides)."""
    grid = next((b for b in exhibits if isinstance(b, ImageGrid)), None)
    quality, cost = comparison.bench.headline
    table = marks(comparison.contenders)
    with _style(theme):
        canvas = Figure(figsize=(11, 4.4) if grid else (7.6, 4.4), layout="constrained")
        if grid is None:
            axes = _axes(canvas, theme)
        else:
            left, right = np.ravel(canvas.subfigures(1, 2, width_ratios=[1.25, 1], wspace=0.03))  # type: ignore[arg-type]
            axes = _axes(left, theme)
            rows = [label for label in comparison.contenders if label in grid.images]
            # As many columns as make the grid about as high as the plot beside it.
            columns = min(max(4, len(rows) + 1), *(len(grid.images[label]) for label in rows)) if rows else 1
            cells = right.subplots(
                max(len(rows), 1), columns, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04}
            )
            for line, label in zip(cells, rows, strict=False):
                for place, image in zip(line, as_rgb(grid.images[label]), strict=False):
                    place.imshow(image, interpolation="nearest")
                for place in line:
                    place.set_axis_off()
                line[0].text(
                    -0.15,
                    0.5,
                    _short(label, 22),
                    transform=line[0].transAxes,
                    ha="right",
                    va="center",
                    color=theme["ink"],
                    fontsize=9.5,
                )
            where = setting_name(grid.setting)
            right.suptitle(f"same noise, {where}" if where else "same noise", color=theme["muted"], fontsize=10)
        numeric = cost in comparison.bench.knobs and all(_is_number(s.get(cost)) for s in comparison.settings)
        all_x, all_y = [], []
        for label, mark in table.items():
            points: list[tuple[Any, Estimate]] = []
            for setting in comparison.settings:
                y = cell(comparison, quality, label, setting)
                x = float(setting[cost]) if numeric else cell(comparison, cost, label, setting)
                if y.kind != "none" and (isinstance(x, float) or x.kind != "none"):
                    points.append((x, y))
            _points(axes, points, mark, theme, joined=True, name=_short(label, 26))
            all_x += [_middle(p[0]) for p in points]
            all_y += [p[1].mean for p in points]
        _scale(axes, "x", all_x, ticks=sorted({float(s[cost]) for s in comparison.settings}) if numeric else None)
        _scale(axes, "y", all_y)
        axes.set_xlabel(_axis_name(comparison, cost))
        axes.set_ylabel(_axis_name(comparison, quality))
        axes.legend(frameon=False, labelcolor=theme["ink"], fontsize=9.5)
        return canvas


# ------------------------------------------------------------------ output


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """``figure`` as an SVG element for a page that defines the theme's CSS variables.

    Args:
        name: unique in the page; prefixes the ids inside.
        label: read out in place of the picture.
    """
    text = _svg(figure)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    # matplotlib's own style element speaks of every element ("*"): in a page that means all of it.
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]+\")[^>]*>",
        rf'<svg class="plot" \1 role="img" aria-label="{_literal(escaped)}">',
        text,
        count=1,
    )


def standalone_svg(figure: Figure) -> str:
    """``figure`` as a whole SVG file that follows the reader's light or dark preference."""
    light = ";".join(f"--{role}:{colour}" for role, colour in LIGHT.items())
    dark = ";".join(f"--{role}:{colour}" for role, colour in DARK.items())
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    text = re.sub(r"(<svg [^>]*>)", rf"\1{style}", _svg(figure), count=1)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text


def png(figure: Figure, dpi: int = 160) -> bytes:
    """``figure`` as PNG; draw it with ``theme=LIGHT`` or ``DARK``."""
    buffer = io.BytesIO()
    with _quiet():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save(draw: Callable[[Theme], Figure], path: Path) -> Path:
    """Draw to ``path``, a .svg (follows light and dark) or a .png (light)."""
    if path.suffix == ".svg":
        path.write_text(standalone_svg(draw(SYMBOLIC)), encoding="utf-8")
    else:
        path.write_bytes(png(draw(LIGHT)))
    return path


def png_of(image: np.ndarray) -> bytes:
    """An image ``[H, W, 3|4]`` (uint8) as PNG."""
    buffer = io.BytesIO()
    mpl_image.imsave(buffer, image, format="png")
    return buffer.getvalue()


def as_rgb(images: np.ndarray) -> np.ndarray:
    """Images ``[N, H, W]`` or ``[N, H, W, C]``, floats in [0, 1] or uint8, as uint8 ``[N, H, W, 3|4]``.

    Pixels that are not finite come out in a colour that no reader takes for a picture (magenta).
    """
    array = np.asarray(images)
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8:
        lost = ~np.isfinite(array).all(axis=-1)
        array = np.rint(np.clip(np.nan_to_num(array), 0, 1) * 255).astype(np.uint8)
    else:
        lost = np.zeros(array.shape[:-1], dtype=bool)
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    if lost.any():
        array[lost, :3] = (255, 0, 255)
    return array


# ------------------------------------------------------------------ inside


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "font.size": 10,
        "font.family": "sans-serif",
        "axes.facecolor": "none",
        "figure.facecolor": "none" if theme is SYMBOLIC else theme["page"],
        "savefig.facecolor": "none" if theme is SYMBOLIC else theme["page"],
        "axes.edgecolor": theme["muted"],
        "axes.labelcolor": theme["ink"],
        "text.color": theme["ink"],
        "xtick.color": theme["muted"],
        "ytick.color": theme["muted"],
        "xtick.labelcolor": theme["ink"],
        "ytick.labelcolor": theme["ink"],
        "axes.grid": True,
        "grid.color": theme["line"],
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.9,
    }
    with matplotlib.rc_context(settings), _quiet():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    # The reader's own fonts draw the text; matplotlib's lacking a glyph is no matter.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        yield


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # The settings must still hold: texts are laid out when the figure is written.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "steersman"}), _quiet():
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None},  # type: ignore[dict-item]
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    for role, stand_in in SYMBOLIC.items():
        text = text.replace(stand_in, f"var(--{role}, {LIGHT[role]})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", text)
    text = "".join(c for c in text if c.isprintable() or c == "\n")
    return re.sub(r"\n\s*", "\n", text)


def _axes(canvas: Any, theme: Theme) -> Axes:
    axes: Axes = canvas.add_subplot()
    # Ticks are made when the figure is written, when the style no longer holds: give them colours here.
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.tick_params(which="both", color=theme["muted"], labelcolor=theme["ink"], grid_color=theme["line"])
    return axes


def _points(
    axes: Axes,
    points: Sequence[tuple[Any, Estimate]],
    mark: Mark,
    theme: Theme,
    joined: bool,
    name: str = "",
    sizes: Sequence[float] = (),
) -> None:
    """Means with their intervals, joined by a line."""
    xs = [_middle(p[0]) for p in points]
    ys = [p[1].mean for p in points]
    colour = theme[mark.colour]
    axes.plot(
        xs,
        ys,
        linestyle=mark.dashes if joined and len(points) > 1 else "none",
        marker=MARKERS[mark.marker],
        markersize=7.5,
        color=colour,
        markeredgecolor=theme["page"],
        markeredgewidth=0.9,
        zorder=4,
        label=name or None,
    )
    for at, mean, size in zip(xs, ys, sizes, strict=False):
        if size > 7.5:
            axes.plot([at], [mean], MARKERS[mark.marker], color=colour, markersize=size, zorder=3.5)
    for x, y in points:
        if y.low is not None and y.high is not None:
            at = _middle(x)
            dotted = (0, (1, 1)) if y.kind == "range" else "-"
            axes.plot([at, at], [y.low, y.high], color=colour, linewidth=2.2, linestyle=dotted, alpha=0.75, zorder=3)
        if isinstance(x, Estimate) and x.low is not None and x.high is not None:
            axes.plot([x.low, x.high], [y.mean, y.mean], color=colour, linewidth=1.4, alpha=0.75, zorder=3)


def _middle(x: Any) -> float:
    return x.mean if isinstance(x, Estimate) else float(x)


def _close(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return all(math.isclose(p, q, rel_tol=0.01) for p, q in zip(a, b, strict=True))


def _scale(axes: Axes, which: str, values: Sequence[float], ticks: Sequence[float] | None = None) -> None:
    """Logarithmic where the values span more than a factor of 8 (x) or 30 (y); ticks at the grid's values."""
    finite = [v for v in values if math.isfinite(v)]
    axis = axes.xaxis if which == "x" else axes.yaxis
    far = bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= (8 if which == "x" else 30)
    if far:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    if ticks and len(ticks) <= 9:
        axis.set_major_locator(FixedLocator(list(ticks)))
        axis.set_minor_locator(NullLocator())
    elif far and max(finite) / min(finite) < 100:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float, _: Any) -> str:
    return number(float(f"{value:.6g}"))


def _axis_name(comparison: Comparison, name: str) -> str:
    about = comparison.bench.figures.get(name)
    words = name.replace("_", " ")
    if about is None:
        return words
    goal = {"lower": " (lower is better)", "higher": " (higher is better)", "neither": ""}[about.better]
    return f"{words}{', ' + about.unit if about.unit not in ('', words) else ''}{goal}"


def _thinned(x: Sequence[float], y: Sequence[float], most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points of a line, evenly taken, the last included."""
    index = np.unique(np.linspace(0, max(len(x) - 1, 0), min(len(x), most)).round().astype(int))
    a, b = (
        np.asarray(x, float)[index] if len(x) else np.array([]),
        np.asarray(y, float)[index] if len(x) else np.array([]),
    )
    return a, np.where(np.isfinite(b), b, np.nan)


def _all_values(block: Curves) -> list[Sequence[float]]:
    return [v for line in block.lines.values() for v in (line.x, line.y)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _literal(text: str) -> str:
    """For the replacement side of a regular expression."""
    return text.replace("\\", r"\\")
