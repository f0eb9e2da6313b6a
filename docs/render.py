"""Pages and tables made from the cards: a hook for mkdocs, and (run as a script) the README's table.

Every method gets a page: its card, with the evidence table and plot that ``evidence/results/<id>.json``
gives. Nothing about a method is written twice.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from steersman import catalog
from steersman.catalog import Card
from steersman.report.evidence import evidence_markdown, evidence_svg

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "evidence" / "results"
START, END = "<!-- methods -->", "<!-- /methods -->"


def methods_table(link: str) -> str:
    """The table of methods; ``link`` is a pattern with ``{id}``."""
    lines = ["| method | what it does | works with | paper |", "|---|---|---|---|"]
    for card in catalog.cards().values():
        paper = card.paper
        lines.append(
            f"| [`{card.id}`]({link.format(id=card.id)}) | {card.summary} | {card.host} "
            f"| [{card.where}]({paper['url']}) |"
        )
    return "\n".join(lines)


def record_of(card: Card) -> dict[str, Any] | None:
    """The newest evidence of a method at the largest scale that was run."""
    for suffix in (".gpu", ".full", ""):
        path = RESULTS / f"{card.id}{suffix}.json"
        if path.is_file():
            return json.loads(path.read_text())
    return None


def method_page(card: Card) -> str:
    """A method's page."""
    paper = card.paper
    record = record_of(card)
    if record is None:
        evidence = f"Not judged yet: `steersman evidence {card.id}`."
    else:
        made = f"Judged on {record['date']} with steersman {record['versions']['steersman']}, torch "
        made += f"{record['versions']['torch']}; anyone can run it again: `steersman evidence {card.id}`."
        evidence = f"{made}\n\n{evidence_markdown(record, f'{card.id}.svg')}"
    source = f"*{paper['title']}*. {', '.join(paper['authors'])}. {card.where}."
    commands = [f"$ steersman compare {bench} --methods {card.id}" for bench in card.benches]
    commands.append(f"$ steersman evidence {card.id}")
    return "\n".join(
        [
            f"# {card.title}\n",
            f"{card.summary}\n",
            f"{source} [{paper['url']}]({paper['url']})\n",
            "\n".join(["```console", *commands, "```", ""]),
            card.text.replace("<!-- evidence -->", evidence),
            "## Cite",
            "",
            f"```bibtex\n{card.bibtex.strip()}\n```",
            "",
        ]
    )


def index_page() -> str:
    """The page that lists all methods."""
    return f"# Methods\n\n{methods_table('{id}.md')}\n"


# ------------------------------------------------------------------ mkdocs


def on_config(config: Any) -> Any:
    """Put the methods' pages into the navigation."""
    for entry in config.nav:
        if "Methods" in entry:
            pages = [{card.id: f"methods/{card.id}.md"} for card in catalog.cards().values()]
            entry["Methods"] = ["methods/index.md", *pages]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and the plots."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "methods/index.md", content=index_page()))
    for card in catalog.cards().values():
        files.append(File.generated(config, f"methods/{card.id}.md", content=method_page(card)))
        record = record_of(card)
        if record is not None:
            files.append(File.generated(config, f"methods/{card.id}.svg", content=evidence_svg(record)))
    return files


# ------------------------------------------------------------------ README


def readme(text: str) -> str:
    """The README with its table of methods made anew."""
    table = methods_table("src/steersman/cards/{id}.md")
    return re.sub(f"{START}.*?{END}", f"{START}\n{table}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text()))
