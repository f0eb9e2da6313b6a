"""``steersman apply``: make an artefact with a method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from steersman import catalog
from steersman.cli.verbs import one_sentence, print_json, settings, with_settings

Out = Annotated[Path, typer.Option("--out", "-o", help="A new folder for what is made.")]
Subject = Annotated[str, typer.Option("--subject", "-s", help="A reference name, a folder, a hub id, ...")]
Input = Annotated[
    Path | None, typer.Option("--input", "--data", "-i", help="A file or folder that the method works with.")
]
Pairs = Annotated[list[str] | None, typer.Option("--set", help="A setting of the method: name=value.")]


def add_to(app: typer.Typer, arguments: list[str]) -> None:
    """Add the verb; ``arguments`` tell whose settings the help lists."""
    app.command(
        "apply",
        epilog="steersman apply mmd-ddm --subject ./my-pipeline --data ./images --calls 5 --out ./my-pipeline-5 · "
        "steersman apply packet-spraying --subject fabric.yaml --input job.yaml --out plan",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(with_settings(one_sentence(apply), "apply", arguments))


def apply(
    context: typer.Context,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method with apply.")],
    subject: Subject,
    out: Out,
    input: Input = None,
    pairs: Pairs = None,
    seed: Annotated[int, typer.Option(help="For everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Make an artefact with a method: a fine-tuned model, a map, a plan; settings as --name value."""
    run("apply", method, subject, out, input, settings(pairs, context.args), seed, as_json)


def run(
    verb: Literal["apply", "probe"],
    method: str,
    subject: str,
    out: Path,
    input: Path | None,
    chosen: dict[str, str],
    seed: int,
    as_json: bool,
    resume: bool = False,
) -> None:
    """Run a verb that makes a folder, and show its record."""
    from steersman.engine.artefacts import run_verb

    def log(line: str) -> None:
        typer.echo(line, err=True)

    record = run_verb(verb, method, subject, out, input, chosen, seed, log, resume)
    if as_json:
        print_json(record)
        return
    for name, value in _flat(record["metrics"]):
        typer.echo(f"{name}: {value}")
    typer.echo(f"{'made' if verb == 'apply' else 'measured'} by {catalog.card(method).id}: {out}")


def _flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            pairs.append((prefix + name, f"{value:.6g}"))
        elif not isinstance(value, list):
            pairs.append((prefix + name, value))
    return pairs
