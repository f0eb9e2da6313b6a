"""What the probe shows: reached share against prompt length, and one HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steersman.language.magic_word.finding import NOTICE, Controllability
from steersman.language.magic_word.system import System

SHOWN = 60  # prompts in the page


def plot(found: Controllability) -> Any:
    """Reached share against prompt length, a line and 95% Wilson intervals for each class."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, kind in enumerate(found.kinds):
        curve = found.curve(kind)
        shift = 0.06 * (i - (len(found.kinds) - 1) / 2)
        k, share = [s.k + shift for s in curve], [s.share for s in curve]
        error = [[s.share - s.low for s in curve], [s.high - s.share for s in curve]]
        marker, colour = "os^Dv"[i % 5], ("#2440c0", "#e06500", "#35a08a", "#7a1452", "#9a6cf0")[i % 5]
        label = f"{kind or 'all'} ({curve[0].n} pairs)"
        style: dict[str, Any] = {"marker": marker, "color": colour, "capsize": 3, "linewidth": 1.9, "elinewidth": 1.2}
        axes.errorbar(k, share, error, label=label, **style)
    axes.set(xlabel="prompt tokens k", ylabel="pairs reached with at most k tokens", ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    return figure


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: light-dark(#1b1e26, #eceef3); --page: light-dark(#fff, #14161c);
  --line: light-dark(#d9dce3, #363b48); --muted: light-dark(#5a6170, #a3abbb); }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }}
figure {{ margin: 1rem 0; background: #fff; border-radius: 6px; }} svg {{ width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }}
td, th {{ border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
code {{ white-space: pre-wrap; word-break: break-word; }}
.notice {{ border-left: 4px solid #b3261e; padding: .5rem 1rem; }} small {{ color: var(--muted); }}
</style></head><body>
{body}
</body></html>
"""


def page(
    found: Controllability, table: list[dict[str, Any]], figure: Any, system: System, subject: str, cost: int | None
) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    last = found.curve()[-1]
    title = f"How far a prompt can push {'/'.join(Path(subject).parts[-2:])}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{last.reached} of {last.n} pairs ({last.share:.0%}, 95% interval {last.low:.0%} to {last.high:.0%}) were "
        f"reached with a prompt of at most {last.k} tokens. What a search does not reach may still be reachable: one "
        "minus the share is an upper estimate of epsilon.</p>",
        '<p class="notice"><strong>The prompts below are adversarial strings.</strong> '
        f"Each is an {html.escape(NOTICE)}. Do not take them for anything that the model or a person said.</p>",
        f"<figure>{svg}</figure>",
        "<h2>Reached share</h2>",
        _table(
            [
                "targets",
                "pairs",
                *(f"k ≤ {s.k}" for s in found.curve()),
                "log ε slope, k ≤ 3",
                "k ≥ 4",
                "rank correlation",
            ],
            [
                [
                    kind or "all",
                    len(found.of(kind)),
                    *(f"{s.share:.0%} ({s.low:.0%} to {s.high:.0%})" for s in found.curve(kind)),
                    *found.decay(kind).values(),
                    found.rank_correlation(kind),
                ]
                for kind in found.kinds
            ],
        ),
        "<p><small>Intervals: Wilson, 95%. ε falls with k by construction, and the search changes where back "
        "generation ends (k = 3 as published). Rank "
        "correlation: Spearman, of k with the rank of y without a prompt; pairs that were not reached count as longer "
        "than all prompts.</small></p>",
        "<h2>Prompts found</h2>",
        _table(
            ["x0", "wanted", "rank", "k", "adversarial prompt", "ids", "survives as text"],
            [
                [
                    _code(system.decode(w.x0)),
                    _code(system.decode(w.y)),
                    w.rank,
                    w.k,
                    _code(w.text),
                    " ".join(map(str, w.prompt)),
                    "yes" if w.text_roundtrip else "as ids only",
                ]
                for w in sorted((w for w in found.words if w.k), key=lambda w: -(w.rank or 0))[:SHOWN]
            ],
        ),
    ]
    if table:
        names = ["layer", "head", "k", "alpha", "beta", "bound", "attack", "ratio", "vacuous"]
        rows = [[*(r[n] for n in names[:-1]), "vacuous" if r["vacuous"] else ""] for r in table]
        body += [
            "<h2>What a head can put out</h2>",
            "<p>For the last token of the first state: the largest component of a head's output, orthogonal to its "
            "output without a prompt, that any k control tokens can bring about (bound), and the best that gradient "
            "ascent found (attack). It speaks of one head, not of the model. With beta above 0.999 it is vacuous.</p>",
            _table(names, rows),
        ]
    body.append(
        f"<p><small>{found.forwards} forward passes at {found.passes_per_second:.0f} a second; at most {cost} a pair; "
        f"{len(system.allowed)} ids in prompts.</small></p>"
    )
    return PAGE.format(title=html.escape(title), body="\n".join(body))


class _Code(str):
    """HTML that is escaped already."""


def _code(text: str) -> _Code:
    return _Code(f"<code>{html.escape(text)}</code>")


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, _Code):
            return f"<td>{value}</td>"
        if isinstance(value, float):
            return f'<td class="n">{value:.3g}</td>' if math.isfinite(value) else "<td></td>"
        return f'<td class="n">{value}</td>' if isinstance(value, int) else f"<td>{html.escape(str(value or ''))}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
