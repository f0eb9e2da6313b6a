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


FOUNDATIONS = {
    "diffusion": {
        "steersman.diffusion.solver": [
            "Process",
            "Prediction",
            "Step",
            "Solver",
            "AdaptiveSolver",
            "integrate",
            "denoiser",
            "take",
            "DiscreteVP",
            "LinearVP",
            "VE",
        ],
        "steersman.diffusion.scheduler": ["SolverScheduler", "SlotScheduler"],
        "steersman.diffusion.classical": [
            "DDIMScheduler",
            "EulerScheduler",
            "HeunScheduler",
            "RK4Scheduler",
            "DDIM",
            "Euler",
            "Heun",
            "RK4",
        ],
        "steersman.diffusion.pipelines": ["ClassConditionalPipeline"],
        "steersman.diffusion.guidance": ["Guidance", "StockGuidance", "Moment"],
        "steersman.diffusion.installing": ["Installable", "installed", "save_steered", "load_steered"],
    },
    "language": {
        "steersman.language.contrastive_search": ["ContrastiveSearch"],
        "steersman.language.prefix": ["PrefixModel", "Step"],
        "steersman.language.speculation": ["Law", "SpeculationRecord", "Chain"],
        "steersman.language.vocabularies": ["same_vocabulary", "same_size"],
        "steersman.language.endpoint": ["EndpointSampler"],
    },
}
"""What a room offers beside its methods."""


def methods_table(link: str, room: str | None = None) -> str:
    """The table of methods (of one room); ``link`` is a pattern with ``{id}``."""
    lines = ["| method | what it does | works with | paper |", "|---|---|---|---|"]
    for card in catalog.cards().values():
        if room not in (None, card.room):
            continue
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
            card.text.replace("<!-- evidence -->", evidence).replace("(../../../docs/", "(../"),
            "## Cite",
            "",
            f"```bibtex\n{card.bibtex.strip()}\n```",
            "",
        ]
    )


def index_page() -> str:
    """The page that lists all methods, room by room."""
    parts = [
        "# Methods",
        "Every method has the same page: when to use it, what it costs, its knobs, what its claims came to.",
    ]
    for room in rooms():
        parts += [f"## {room.capitalize()}", methods_table("{id}.md", room)]
    return "\n\n".join(parts) + "\n"


def rooms() -> list[str]:
    """The rooms that have methods."""
    return sorted({card.room for card in catalog.cards().values()})


def api_page(room: str) -> str:
    """A room's interface: what its methods export, and what they stand on."""
    objects: dict[str, list[str]] = {}
    for card in catalog.cards().values():
        if card.room == room:
            for path in (card.object, *card.exports):
                module, _, name = path.partition(":")
                objects.setdefault(module, []).append(name)
    parts = [f"# steersman.{room}"]
    for module, names in objects.items():
        parts.append(f"## {module.rpartition('.')[2]}")
        parts += [f"::: {module}.{name}\n    options:\n      heading_level: 3" for name in names]
    for module, names in FOUNDATIONS.get(room, {}).items():
        parts.append(f"## {module.rpartition('.')[2]}")
        parts += [f"::: {module}.{name}\n    options:\n      heading_level: 3" for name in names]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------ mkdocs


def on_config(config: Any) -> Any:
    """Put the methods' pages into the navigation."""
    for entry in config.nav:
        if "Methods" in entry:
            pages = [{card.id: f"methods/{card.id}.md"} for card in catalog.cards().values()]
            entry["Methods"] = ["methods/index.md", *pages]
        if "API" in entry:
            entry["API"] = [*entry["API"], *({f"steersman.{room}": f"api/{room}.md"} for room in rooms())]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and the plots."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "methods/index.md", content=index_page()))
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=api_page(room)))
    for card in catalog.cards().values():
        files.append(File.generated(config, f"methods/{card.id}.md", content=method_page(card)))
        record = record_of(card)
        if record is not None:
            files.append(File.generated(config, f"methods/{card.id}.svg", content=evidence_svg(record)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings (:class:`~a.b.C`) as the name alone."""
    return re.sub(r":(?:class|func|meth|attr|mod|data):<code>~?(?:[\w]+\.)*([\w]+)</code>", r"<code>\1</code>", html)


# ------------------------------------------------------------------ README


def readme(text: str) -> str:
    """The README with its table of methods made anew."""
    table = methods_table("src/steersman/cards/{id}.md")
    return re.sub(f"{START}.*?{END}", f"{START}\n{table}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text()))
