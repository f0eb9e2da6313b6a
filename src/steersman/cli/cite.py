"""``steersman cite``: BibTeX for what you used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from steersman import catalog
from steersman.cli.info import names
from steersman.cli.verbs import one_sentence, print_json
from steersman.errors import InputError


def add_to(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("cite", epilog="steersman cite pndm momentum-decoding · steersman cite runs/a > refs.bib")(
        one_sentence(cite)
    )


def cite(
    what: Annotated[
        list[str],
        typer.Argument(help="Methods, run folders or artefact folders.", metavar="WHAT...", autocompletion=names),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Print BibTeX for methods, or for all methods that a run or an artefact used."""
    found: dict[str, catalog.Card] = {}
    for name in what:
        for method in _used(Path(name)) if Path(name).is_dir() else [name]:
            card = catalog.card(method)
            found[card.id] = card
    if as_json:
        print_json([{"id": c.id, "paper": dict(c.paper), "bibtex": c.bibtex} for c in found.values()])
    else:
        typer.echo("\n\n".join(card.bibtex.strip() for card in found.values()))


def _used(folder: Path) -> list[str]:
    known = catalog.cards()
    for name in ("config.json", "artefact.json", "probe.json"):
        if (folder / name).is_file():
            record = json.loads((folder / name).read_text())
            parts = [part["id"] for stack in record.get("parts", {}).values() for part in stack]
            return [m for m in [*parts, record.get("method", "")] if m in known]
    raise InputError("what", str(folder), "a method, or a folder with config.json, artefact.json or probe.json")
