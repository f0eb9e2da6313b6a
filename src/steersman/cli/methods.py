"""``steersman methods``: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from steersman import catalog
from steersman.cli.verbs import one_sentence, print_json
from steersman.errors import InputError, nearest


def add_to(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("methods", epilog="steersman methods · steersman methods --room diffusion · steersman methods --json")(
        one_sentence(methods)
    )


def methods(
    room: Annotated[str | None, typer.Option(help="Only the methods of this room (language, diffusion, ...).")] = None,
    bench: Annotated[str | None, typer.Option(help="Only the methods that run in this bench.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the methods: one line each."""
    cards = list(catalog.cards().values())
    for parameter, value, known in (
        ("room", room, {c.room for c in cards}),
        ("bench", bench, set(catalog.benches())),
    ):
        if value is not None and value not in known:
            raise InputError(parameter, value, nearest(value, known))
    cards = [c for c in cards if room in (None, c.room) and (bench is None or bench in c.benches)]
    if as_json:
        print_json([card.to_json() for card in cards])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "for", "what it does", "verbs"):
        table.add_column(name, overflow="fold")
    for card in cards:
        table.add_row(card.id, f"{card.room}/{card.family}", card.summary, " ".join(card.verbs))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\nbenches: {', '.join(catalog.benches())}\nmore: steersman info METHOD", style="dim")
