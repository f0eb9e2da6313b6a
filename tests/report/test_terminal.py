"""Tables and progress: what is printed, and that nothing printed steers the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from steersman.engine.bench import Row
from steersman.engine.comparison import Comparison
from steersman.report.terminal import LiveProgress, duration, print_summary, print_verdicts
from tests.report.toy import comparison_of, fabric_of, rows_of

ESCAPE = "\x1b]0;owned\x07\x1b[31m"


def shown(what, *, terminal: bool = False) -> str:
    buffer = io.StringIO()
    what(Console(file=buffer, width=120, force_terminal=terminal, highlight=False, color_system=None))
    return buffer.getvalue()


def test_the_summary_has_quality_at_each_budget_and_the_pick(comparison: Comparison):
    text = shown(lambda c: print_summary(comparison, c))
    line = next(x for x in text.splitlines() if x.strip().startswith("plms"))
    assert line.count("*") == 3 and "±" in line
    assert "calls 5" in text and "calls 20" in text
    assert "calls 10: plms  clear: 0.7" in text
    assert "failed: euler at calls 20, seed 3: the network returned NaN at step 7" in text
    assert "inapplicable: heun:churn=0.5 at calls 5, 8 seeds" in text


def test_an_unfinished_run_says_how_to_go_on(comparison: Comparison):
    comparison.rows = comparison.rows[:-5]
    text = shown(lambda c: print_summary(comparison, c))
    assert "5 rows have not run" in text and f"--resume --out {comparison.out}" in text


def test_a_bench_whose_cost_is_a_figure(tmp_path: Path):
    text = shown(lambda c: print_summary(fabric_of(tmp_path), c))
    assert "plan  tied: the same as spray at every seed" in text


def test_a_run_where_all_failed(tmp_path: Path):
    rows = rows_of(["ddim"], seeds=2)
    for row in rows:
        row.status, row.figures, row.error = "failed", {}, "broken"
    text = shown(lambda c: print_summary(comparison_of(rows, ["ddim"], tmp_path), c))
    assert text.count("broken") == 3


def test_no_rows_at_all(tmp_path: Path):
    text = shown(lambda c: print_summary(comparison_of([], ["ddim"], tmp_path, seeds=[0, 1]), c))
    assert "ddim" in text


def test_hostile_text_cannot_steer_the_terminal(tmp_path: Path):
    label = "dd[red]im"
    rows = rows_of([label], seeds=2)
    rows[0].status, rows[0].error = "failed", f"{ESCAPE}[bold]broken[/bold]"
    text = shown(lambda c: print_summary(comparison_of(rows, [label], tmp_path), c))
    assert "\x1b" not in text and "\x07" not in text
    assert "dd[red]im" in text and "[bold]broken[/bold]" in text  # shown as they are, not as markup


def row(seed: int, status: str = "ok") -> Row:
    figures = {"frechet": 1.25, "accuracy": 90.0} if status == "ok" else {}
    error = None if status == "ok" else f"no luck {ESCAPE}"
    return Row("k", "sampling", "ddim", [], {"calls": 5}, seed, status, figures, {}, error=error)


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal_is_a_line_now_and_then():
    clock = Clock()

    def run(console: Console) -> None:
        progress = LiveProgress(console, clock)
        progress.start(40, 0, Path("runs/a"))
        for seed in range(40):
            clock.now += 1.0
            progress.row("ddim", {"calls": 5}, seed)
            progress.trial(1, 2, "")
            progress.finished(row(seed, "failed" if seed == 7 else "ok"))
        progress.stop()

    text = shown(run)
    lines = text.splitlines()
    assert lines[0] == "40 rows to runs/a"
    assert len(lines) == 10  # the first, every fifth second, the failure, which counts as one of them
    assert "[5/40] ddim · calls 5 · seed 4: frechet 1.25, accuracy 90 · about 35 s left" in lines
    assert any("failed: no luck" in line for line in lines)
    assert lines[-1].endswith("40 s in all")
    assert "\x1b" not in text


def test_progress_in_a_terminal_shows_the_contender_and_the_time_left():
    clock = Clock()

    def run(console: Console) -> None:
        progress = LiveProgress(console, clock)
        progress.start(4, 1, Path("runs/a"))
        progress.row("plms", {"calls": 20}, 3)
        clock.now += 6.0
        progress.finished(row(0))
        progress.trial(1, 2, "step 10 of 20")
        console.print(progress._view())
        progress.stop()

    text = shown(run, terminal=True)
    assert "1 of them kept from before" in text
    assert "2 of 4 rows" in text and "left" in text
    assert "plms · calls 20 · seed 3" in text and "step 10 of 20" in text
    assert "frechet 1.25" in text


def test_progress_names_only_the_knobs_that_vary(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"grid": {"calls": [5, 10], "width": [3]}}')

    def run(console: Console) -> None:
        progress = LiveProgress(console)
        progress.start(1, 0, tmp_path)
        done = row(0)
        done.setting["width"] = 3
        progress.finished(done)

    assert "ddim · calls 5 · seed 0" in shown(run)


def test_progress_stops_twice_and_without_a_start():
    progress = LiveProgress(Console(file=io.StringIO()))
    progress.stop()
    progress.stop()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (4800, "1 h 20 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_verdicts():
    claim = {
        "id": "a",
        "statement": f"Better {ESCAPE}",
        "verdict": "not shown",
        "effect": None,
        "interval": None,
        "unit": "seed",
        "n": 3,
        "margin": 0.0,
        "reason": "there are only 3 seeds",
    }
    text = shown(lambda c: print_verdicts({"method": "pndm", "scale": "quick", "claims": [claim]}, c))
    assert "not shown" in text and "there are only 3 seeds" in text and "3 seeds" in text
    assert "\x1b" not in text
