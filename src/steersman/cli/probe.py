"""``steersman probe``: measure a property of a subject."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steersman.cli.apply import Input, Pairs, Subject, run
from steersman.cli.verbs import one_sentence, print_json, settings, with_settings
from steersman.errors import InputError


def add_to(app: typer.Typer, arguments: list[str]) -> None:
    """Add the verb; ``arguments`` tell whose settings the help lists."""
    app.command(
        "probe",
        epilog="steersman probe subject --subject digits --json",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(with_settings(one_sentence(probe), "probe", arguments))


def probe(
    context: typer.Context,
    method: Annotated[str, typer.Argument(metavar="METHOD|subject", help="A method with probe, or 'subject'.")],
    subject: Subject,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A new folder for what is measured.")] = None,
    input: Input = None,
    pairs: Pairs = None,
    seed: Annotated[int, typer.Option(help="For everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Measure a property of a subject with a method; 'subject' tells what the subject is."""
    chosen = settings(pairs, context.args)
    if method != "subject":
        run("probe", method, subject, _needed(out), input, chosen, seed, as_json, resume)
        return
    from steersman.engine.artefacts import describe

    record = describe(subject)
    if as_json:
        print_json(record)
    else:
        for name, value in record.items():
            typer.echo(f"{name}: {value}")


def _needed(out: Path | None) -> Path:
    if out is None:
        raise InputError("out", None, "a new folder for what is measured")
    return out
