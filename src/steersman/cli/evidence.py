"""``steersman evidence``: a method's claims, judged here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steersman.cli.info import Method
from steersman.cli.verbs import one_sentence, print_json


def add_to(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("evidence", epilog="steersman evidence pndm · steersman evidence pndm --scale full --out runs/e")(
        one_sentence(evidence)
    )


def evidence(
    method: Method,
    scale: Annotated[str, typer.Option(help="quick (two minutes on two cores), full or gpu.")] = "quick",
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the runs and their reports here.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the evidence in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Re-run a paper's claims beside baselines, and say which hold, with intervals."""
    from steersman.evidence.study import run_evidence
    from steersman.report.html import write_report
    from steersman.report.terminal import LiveProgress, print_verdicts

    record, comparisons = run_evidence(method, scale, seed, out, resume, LiveProgress())
    if out is not None:
        for name, comparison in comparisons.items():
            write_report(comparison, Path(out) / name / "report.html", comparison.bench.exhibits(comparison))
    if as_json:
        print_json(record)
    else:
        print_verdicts(record)
