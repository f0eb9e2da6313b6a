"""``steersman info``: a method's card."""

from __future__ import annotations

from typing import Annotated

import typer

from steersman import catalog
from steersman.cli.verbs import one_sentence, print_json


def add_to(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("info", epilog="steersman info pndm · steersman info plms · steersman info mmd-ddm --json")(
        one_sentence(info)
    )


def names(incomplete: str) -> list[str]:
    """Methods' ids, for shell completion."""
    return [name for name in catalog.cards() if name.startswith(incomplete)]


Method = Annotated[str, typer.Argument(help="A method's id or alias.", metavar="METHOD", autocompletion=names)]


def info(
    method: Method,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show when to use a method, its cost, knobs, evidence, limits and errata."""
    card = catalog.card(method)
    text = card.text.replace("<!-- evidence -->", f"Run `steersman evidence {card.id}`.")
    if as_json:
        print_json({**card.to_json(), "text": card.text, "bibtex": card.bibtex})
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(highlight=False)
    paper = card.paper
    authors = paper.get("authors", [])
    by = f"{authors[0]} et al." if len(authors) > 2 else " and ".join(authors)
    console.print(f"[bold]{card.title}[/bold]  [dim]{card.id}[/dim]")
    console.print(f"{paper.get('title', '')} ({by}, {card.where})", markup=False)
    console.print(paper.get("url", ""), style="dim")
    console.print(f"\n{card.summary}\n", markup=False)
    console.print(Markdown(text))
