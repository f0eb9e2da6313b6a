"""Comparisons and verdicts in the terminal: progress while they run, tables when they are done.

Progress goes to standard error, results to standard output, so that a pipe gets results only. Where standard
error is no terminal, progress is a plain line now and then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text as RichText

from steersman.engine.bench import Row
from steersman.engine.comparison import Comparison
from steersman.engine.rows import CONFIG
from steersman.report.evidence import effect_text, interval_text, units_text
from steersman.report.summary import (
    Pick,
    cell,
    listed,
    missing,
    number,
    pick,
    picks,
    setting_name,
    span,
    troubles,
    varying,
)

QUIET_S = 5.0
"""Seconds between two plain lines of progress where there is no terminal."""

BADGES = {
    "clear": "clear",
    "close": "too close to call",
    "tied": "tied",
    "unknown": "too few seeds to tell",
    "alone": "alone",
}
STYLES = {"holds": "green", "fails": "red", "not shown": "yellow"}


def plain_text(text: str = "", **style: Any) -> RichText:
    """Text without control characters: what a model or an error says must not steer the terminal."""
    shown = "".join(
        c if c.isprintable() or c == "\n" else " " if c in "\t\r" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return RichText(shown, **style)


class LiveProgress:
    """Rows done of all rows, the time left, the contender at work and its last figures.

    Args:
        console: where to; standard error when not given.
        clock: seconds, for tests.
    """

    def __init__(self, console: Console | None = None, clock: Any = time.monotonic) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.clock = clock
        self.total = self.done = self.failed = self.run = 0
        self.began = self.said = self.paused = 0.0
        self.now, self.step, self.last = "", "", ""
        self.knobs: list[str] | None = None
        self.share = 0.0
        self.live: Live | None = None

    def start(self, total: int, done: int, out: Path) -> None:
        """A run of ``total`` rows begins, of which ``done`` were there already."""
        self.total, self.done, self.run, self.failed, self.share = total, done, 0, 0, 0.0
        self.now = self.step = self.last = ""
        self.knobs = _varying_knobs(out)
        self.began = self.said = self.clock()
        kept = f", {done} of them kept from before" if done else ""
        self.console.print(plain_text(f"{total} rows to {out}{kept}", style="dim"))
        if self.console.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=28), TextColumn("{task.description}"), console=self.console, auto_refresh=False
            )
            self.task = self.bar.add_task("", total=max(total, 1), completed=done)
            self.live = Live(self._view(), console=self.console, refresh_per_second=8, transient=True)
            self.live.start()

    def row(self, contender: str, setting: Mapping[str, Any], seed: int) -> None:
        """A row begins."""
        self.now = f"{contender}{self._place(setting)} · seed {seed}"
        self.step, self.share = "", 0.0
        self._refresh()

    def trial(self, done: float, total: float, text: str) -> None:
        """The row in progress is at ``done`` of ``total``."""
        self.share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
        self.step = text or (f"{number(done, 3)} of {number(total, 3)}" if total > 0 else "")
        self._refresh()

    def finished(self, row: Row) -> None:
        """A row is on disk."""
        self.done, self.run, self.share = self.done + 1, self.run + 1, 0.0
        self.failed += row.status == "failed"
        if row.status == "ok":
            shown = ", ".join(f"{name.replace('_', ' ')} {number(x, 3)}" for name, x in list(row.figures.items())[:3])
        else:
            shown = f"{row.status}: {row.error}"
        self.last = f"{row.contender}{self._place(row.setting)} · seed {row.seed}: {shown}"
        if self.live is None:
            late = self.clock() - self.said >= QUIET_S
            if late or row.status == "failed" or self.done == self.total:
                self.said = self.clock()
                self.console.print(
                    plain_text(f"[{self.done}/{self.total}] {self.last} · {self._left()}"), soft_wrap=True
                )
        elif row.status == "failed":
            self.live.console.print(plain_text(self.last, style="red"))
        self._refresh()

    def stop(self) -> None:
        """The run is over, well or not."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _place(self, setting: Mapping[str, Any]) -> str:
        shown = {k: v for k, v in setting.items() if v is not None and (self.knobs is None or k in self.knobs)}
        return f" · {setting_name(shown)}" if shown else ""

    def _left(self) -> str:
        spent = self.clock() - self.began
        if self.done >= self.total:
            return f"{duration(spent)} in all"
        work = self.run + self.share
        if self.run == 0 and self.share < 0.2:
            return "time left not known yet"
        return f"about {duration(spent / work * (self.total - self.done - self.share))} left"

    def _refresh(self) -> None:
        if self.live is not None:
            self.live.update(self._view())

    def _view(self) -> Group:
        bad = f" · {self.failed} failed" if self.failed else ""
        self.bar.update(
            self.task,
            completed=self.done + self.share,
            description=f"{self.done} of {self.total} rows{bad} · {self._left()}",
        )
        lines = [self.bar.get_renderable()]
        if self.now:
            step = f" · {self.step}" if self.step else ""
            lines.append(plain_text(f"  now   {self.now}{step}", overflow="ellipsis", no_wrap=True))
        if self.last:
            lines.append(plain_text(f"  last  {self.last}", style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*lines)


def print_summary(comparison: Comparison, console: Console | None = None) -> None:
    """Quality at each budget, what it cost, which contender to pick, and what went wrong."""
    console = console or Console(highlight=False)
    quality, cost = comparison.bench.headline
    console.print()
    figures = comparison.bench.figures
    others = [n for n in _present(comparison) if n != quality and (n == cost or figures[n].role != "info")]
    for name in [quality, *others[:2]]:
        console.print(plain_text(figure_name(comparison, name)), soft_wrap=True)
        console.print(figure_table(comparison, name))
    for line in verdict_lines(comparison):
        console.print(line, soft_wrap=True)
    wrong = troubles(comparison)
    if wrong:
        console.print()
    for trouble in wrong[:12]:
        where = setting_name(trouble.setting)
        text = f"{trouble.status}: {trouble.contender}{' at ' + where if where else ''}, {_seeds(trouble.seeds)}: "
        console.print(
            plain_text(text + trouble.reason, style="red" if trouble.status == "failed" else "yellow"), soft_wrap=True
        )
    if len(wrong) > 12:
        console.print(f"and {len(wrong) - 12} more of that kind; the report lists all", style="yellow")
    if lacking := missing(comparison):
        text = f"{lacking} rows have not run; --resume --out {comparison.out} goes on"
        console.print(plain_text(text, style="yellow"), soft_wrap=True)


def figure_table(comparison: Comparison, figure: str) -> Table:
    """Contenders x settings for one figure; the best at each setting is bold and starred."""
    knobs = varying(comparison)
    settings = comparison.settings or [{}]
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    for setting in settings:
        table.add_column(plain_text(setting_name(setting, knobs) or "all rows"), justify="right")
    found = [pick(comparison, setting, figure) for setting in settings]
    for contender in comparison.contenders:
        row: list[RichText] = [plain_text(contender)]
        for setting, best in zip(settings, found, strict=True):
            estimate = cell(comparison, figure, contender, setting)
            text = estimate.text
            if estimate.kind == "none" and not estimate.lost:
                states = {r.status for r in comparison.select(contender, status=None, **setting)}
                text = next((s for s in ("failed", "inapplicable") if s in states), "–")
            first = best is not None and len(comparison.contenders) > 1 and _wins(best, contender)
            row.append(plain_text(f"{text} *" if first else text, style="bold" if first else ""))
        table.add_row(*row)
    return table


def figure_name(comparison: Comparison, figure: str) -> str:
    """ "seconds (s, lower is better)"."""
    about = comparison.bench.figures[figure]
    words = figure.replace("_", " ")
    notes = [] if about.unit in ("", words) else [about.unit]
    notes += [] if about.better == "neither" else [f"{about.better} is better"]
    return f"{words} ({', '.join(notes)})" if notes else words


def verdict_lines(comparison: Comparison) -> list[RichText]:
    """One line a setting: which contender to pick, and how sure that is."""
    lines = []
    for found in picks(comparison):
        where = setting_name(found.setting, varying(comparison))
        text = plain_text(f"{where}: " if where else "")
        text.append_text(plain_text(found.best, style="bold"))
        text.append_text(plain_text(f"  {BADGES[found.verdict]}: {sure(found)}", style="dim"))
        lines.append(text)
    return (
        [
            plain_text(
                f"* best of its column. Which to pick, by {comparison.bench.headline[0].replace('_', ' ')}:",
                style="dim",
            ),
            *lines,
        ]
        if lines
        else []
    )


def sure(found: Pick) -> str:
    """How sure a pick is, in words."""
    if found.verdict == "alone":
        return "nothing to compare it with here"
    if found.verdict == "tied":
        return f"the same as {listed(found.tied)} at every seed"
    runner = found.rivals[0]
    gap = f"{number(runner.mean, 3)} better than {runner.b}" if runner.mean else f"as good as {runner.b}"
    if found.verdict == "unknown":
        return f"{gap}; no interval with fewer than 5 seeds"
    low, high = runner.interval or (runner.mean, runner.mean)
    gap += f" (95%: {span(low, high)})" if low != high else " at every seed"
    if found.verdict == "clear":
        return gap
    cheap = f"; {found.cheaper} costs less" if found.cheaper else ""
    return f"{gap}; {listed(found.close, 'or')} may be as good{cheap}"


def print_verdicts(evidence: Mapping[str, Any], console: Console | None = None) -> None:
    """The claims of an evidence record with their verdicts, effects and intervals."""
    console = console or Console(highlight=False)
    console.print(verdict_table(evidence["claims"], title=f"{evidence['method']}, {evidence['scale']} evidence"))


def verdict_table(claims: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """A table of claims, each with its verdict, effect, interval, margin and reason."""
    table = Table(title=plain_text(title) if title else None, box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.add_column("claim", ratio=3)
    table.add_column("verdict", no_wrap=True)
    table.add_column("effect", justify="right")
    table.add_column("interval", justify="right")
    table.add_column("margin", justify="right")
    table.add_column("n", justify="right")
    for claim in claims:
        statement = plain_text(str(claim["statement"]))
        statement.append_text(plain_text(f"\n{claim['reason']}", style="dim"))
        table.add_row(
            statement,
            plain_text(claim["verdict"], style=STYLES.get(claim["verdict"], "")),
            effect_text(claim),
            interval_text(claim),
            number(claim["margin"], 3),
            units_text(claim),
        )
    return table


def duration(seconds: float) -> str:
    """ "8 s", "2 min 5 s", "1 h 20 min"."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _wins(best: Pick, contender: str) -> bool:
    return contender == best.best or contender in best.tied


def _present(comparison: Comparison) -> list[str]:
    names = {name for row in comparison.rows for name in row.figures}
    return [name for name in comparison.bench.figures if name in names]


def _varying_knobs(out: Path) -> list[str] | None:
    """The knobs that take several values in the run in ``out``; None if that isn't known."""
    try:
        grid = json.loads((out / CONFIG).read_text())["grid"]
        return [knob for knob, values in grid.items() if len(values) > 1]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
