"""An evidence record (claims with their verdicts) as Markdown, as a plot, and as a piece of HTML.

A record is what ``steersman evidence`` writes: method, scale, seed, and claims with id, statement, source,
verdict, effect, interval, unit, n, margin and reason.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from steersman.report.plots import forest, inline_svg, standalone_svg
from steersman.report.summary import number

VERDICT_MARKS = {"holds": "✔ holds", "fails": "✘ fails", "not shown": "? not shown"}


def evidence_markdown(evidence: Mapping[str, Any], plot: str | None = None) -> str:
    """The claims as a Markdown table, with their reasons below.

    Args:
        evidence: the record.
        plot: path of the plot that :func:`evidence_svg` drew, as the page links to it.
    """
    claims = evidence.get("claims", [])
    counts = {v: sum(c["verdict"] == v for c in claims) for v in VERDICT_MARKS}
    tally = ", ".join(f"{n} {v}" for v, n in counts.items() if n) or "no claims"
    lines = [f"{_words(evidence, 'scale')} scale, first seed {evidence.get('seed', 0)}: {tally}.", ""]
    if plot:
        alt = f"Effects of {len(claims)} claims with their intervals against their margins"
        lines += [f"![{alt}]({plot})", ""]
    if claims:
        lines += ["| Claim | Verdict | Effect | Interval | Margin | n |", "|---|---|---:|---:|---:|---:|"]
    for claim in claims:
        source = f" ({_cell(claim['source'])})" if claim.get("source") else ""
        lines.append(
            f"| {_cell(claim['statement'])}{source} | {VERDICT_MARKS.get(claim['verdict'], claim['verdict'])} "
            f"| {effect_text(claim)} | {interval_text(claim)} | {number(claim['margin'], 3)} | {units_text(claim)} |"
        )
    reasons = [f"- `{claim['id']}`: {_cell(claim['reason'])}." for claim in claims if claim.get("reason")]
    if reasons:
        lines += ["", "<details><summary>Why</summary>", "", *reasons, "", "</details>"]
    return "\n".join(lines).rstrip() + "\n"


def evidence_svg(evidence: Mapping[str, Any]) -> str:
    """The forest plot of the claims, a file that follows the reader's light or dark preference."""
    return standalone_svg(forest(evidence.get("claims", [])))


def evidence_html(evidence: Mapping[str, Any], name: str = "evidence") -> str:
    """The forest plot and the claims as HTML, for a page that defines the theme's CSS variables."""
    claims = evidence.get("claims", [])
    method = str(evidence.get("method", ""))
    plot = inline_svg(forest(claims), name, f"Effects of the claims of {method} against their margins")
    rows = "".join(
        "<tr>"
        f'<th scope="row">{_escape(claim["statement"])}<br><small>{_escape(claim.get("reason", ""))}</small></th>'
        f"<td>{_escape(VERDICT_MARKS.get(claim['verdict'], claim['verdict']))}</td>"
        f"<td>{_escape(effect_text(claim))}</td><td>{_escape(interval_text(claim))}</td>"
        f"<td>{_escape(number(claim['margin'], 3))}</td><td>{_escape(units_text(claim))}</td></tr>"
        for claim in claims
    )
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("Claim", "Verdict", "Effect", "Interval", "Margin", "n"))
    return f"<figure>{plot}</figure><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def effect_text(claim: Mapping[str, Any]) -> str:
    """The effect, or a dash where there is none."""
    return "–" if claim.get("effect") is None else number(float(claim["effect"]), 3)


def interval_text(claim: Mapping[str, Any]) -> str:
    """ "0.22 to 0.4", or a dash."""
    ends = claim.get("interval")
    if ends is None or claim.get("unit") == "exact":
        return "–"
    return f"{number(float(ends[0]), 3)} to {number(float(ends[1]), 3)}"


def units_text(claim: Mapping[str, Any]) -> str:
    """ "8 seeds", "1 fit", "9 instances"."""
    n = int(claim["n"])
    unit = "instance" if claim["unit"] == "exact" else str(claim["unit"])
    return f"{n} {unit}{'' if n == 1 else 's'}"


def _words(evidence: Mapping[str, Any], name: str) -> str:
    return _cell(str(evidence.get(name, ""))).capitalize()


def _cell(text: Any) -> str:
    """Text that stays inside a Markdown table's cell and is no HTML."""
    flat = " ".join(str(text).split())
    for char in "\\`*_[]|":
        flat = flat.replace(char, f"\\{char}")
    return html.escape(flat, quote=False)


def _escape(text: Any) -> str:
    return html.escape(str(text))
