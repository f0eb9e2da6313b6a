"""``steersman compare``: contenders side by side on your model.

Each bench is a sub-command; its options come from the bench's knobs. Only the bench that the command line
names is imported.
"""

from __future__ import annotations

import inspect
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from steersman import catalog
from steersman.cli.verbs import FAILED_ROWS, one_sentence, print_json
from steersman.engine.bench import Knob

EXAMPLES = (
    "steersman compare sampling · "
    "steersman compare sampling --subject ./my-pipeline --methods ddim,pndm:variant=plms --calls 10,20 --out runs/a · "
    "steersman compare decoding --help"
)


def add_to(app: typer.Typer, arguments: list[str]) -> None:
    """Add the verb; ``arguments`` tell which bench needs its options."""
    group = typer.Typer(
        help="Put contenders side by side on a subject; writes rows, and a report.html to look at and pass on.",
        no_args_is_help=True,
        epilog=EXAMPLES,
    )
    named = next((word for word in arguments[1:] if not word.startswith("-")), None) if arguments else None
    wanted = named if arguments[:1] == ["compare"] else None
    for entry in catalog.benches().values():
        bench = _load(entry.id) if entry.id == wanted else None
        command = _command(bench) if bench is not None else _stub(entry.id)
        group.command(entry.id, help=entry.summary, epilog=_epilog(entry, bench))(command)
    app.add_typer(group, name="compare")


def _epilog(entry: catalog.BenchEntry, bench: Any) -> str:
    methods = [card.id for card in catalog.cards().values() if entry.id in card.benches]
    if bench is not None:
        methods += [name for name in bench.parts() if name not in methods]
    return f"contenders: {', '.join(methods)}" if methods else ""


def _stub(bench: str) -> Any:
    def command() -> None:
        raise AssertionError(f"the options of {bench} were not loaded")  # pragma: no cover

    return command


def methods_of(incomplete: str) -> list[str]:
    """Contenders, for shell completion: what is before the last comma stays."""
    head, comma, last = incomplete.rpartition(",")
    return [f"{head}{comma}{name}" for name in catalog.cards() if name.startswith(last)]


@one_sentence
def _load(bench: str) -> Any:
    return catalog.bench(bench)


def _command(bench: Any) -> Any:
    """The bench's command: the options that all benches share, then its own knobs."""

    def command(**options: Any) -> None:
        shared = {name: options.pop(name) for name in SHARED}
        grid = {name: _values(bench.knobs[name], text) for name, text in options.items() if text is not None}
        run(bench, grid, **shared)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in SHARED.items()
    ]
    for name, knob in bench.knobs.items():
        option = typer.Option(f"--{name.replace('_', '-')}", help=_help(knob), metavar=_metavar(knob))
        annotation = Annotated[str | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = f"Compare contenders in the bench {bench.id}."
    return one_sentence_keeping_signature(command)


def one_sentence_keeping_signature(command: Any) -> Any:
    """``one_sentence`` for a command whose parameters were made at run time."""
    wrapped = one_sentence(command)
    wrapped.__signature__ = command.__signature__  # type: ignore[attr-defined]
    wrapped.__annotations__ = command.__annotations__
    del wrapped.__wrapped__  # type: ignore[attr-defined]
    return wrapped


SHARED: dict[str, tuple[Any, Any]] = {
    "subject": (
        Annotated[
            str | None,
            typer.Option("--subject", "-s", help="A reference name, a folder, a hub id, or file.py:factory."),
        ],
        None,
    ),
    "methods": (
        Annotated[
            str | None,
            typer.Option(
                "--methods", "-m", help="Contenders: a,b:knob=v+c (default: the baselines).", autocompletion=methods_of
            ),
        ],
        None,
    ),
    "seeds": (Annotated[int, typer.Option("--seeds", "-n", help="How many seeds (5 or more give intervals).")], 5),
    "out": (
        Annotated[Path | None, typer.Option("--out", "-o", help="The run folder (default: runs/BENCH-DATE).")],
        None,
    ),
    "resume": (Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")], False),
    "as_json": (Annotated[bool, typer.Option("--json", help="Rows as JSON on standard output.")], False),
}


def run(
    bench: Any,
    grid: dict[str, Any],
    subject: str | None,
    methods: str | None,
    seeds: int,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Run the comparison, show it and write its report."""
    from steersman.engine.compare import compare
    from steersman.report.html import write_report
    from steersman.report.terminal import LiveProgress, print_summary

    folder = out if out is not None else Path("runs") / f"{bench.id}-{datetime.now():%Y%m%d-%H%M%S}"
    command = shlex.join(["steersman", *sys.argv[1:]])
    try:
        comparison = compare(
            bench, subject, methods, grid, seeds, folder, resume, progress=LiveProgress(), command=command
        )
    except KeyboardInterrupt:
        if not (folder / "results.jsonl").exists():
            raise
        kept = (folder / "results.jsonl").read_bytes().count(b"\n")
        again = command if out is not None else f"{command} --out {folder}"
        again = again if "--resume" in again else f"{again} --resume"
        raise KeyboardInterrupt(f"interrupted; {kept} finished rows are kept. Go on with: {again}") from None
    report = write_report(comparison, folder / "report.html", bench.exhibits(comparison))
    if as_json:
        print_json({"report": str(report), **comparison.to_json()})
    else:
        print_summary(comparison)
        # What a bench ends with, as a line of code to take away.
        for line in getattr(bench, "closing", lambda comparison: [])(comparison):
            typer.echo(line)
        typer.echo(f"\nreport: {report}")
    if comparison.failed:
        raise typer.Exit(FAILED_ROWS)


def _values(knob: Knob, text: str) -> Any:
    if not knob.sweep:
        return text
    return [value.strip() for value in text.split(",")]


def _metavar(knob: Knob) -> str:
    if knob.choices is not None and len(knob.choices) <= 6:
        return "|".join(map(str, knob.choices))
    name = {int: "N", float: "X", bool: "true|false", str: "TEXT"}[knob.type]
    return f"{name},..." if knob.sweep else name


def _help(knob: Knob) -> str:
    default = knob.default if isinstance(knob.default, (list, tuple)) else [knob.default]
    shown = ",".join(map(str, default))
    return knob.help if shown in ("None", "") else f"{knob.help} [dim](default: {shown})[/dim]"
