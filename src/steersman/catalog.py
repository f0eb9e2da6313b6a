"""The catalogue: every method's card, read without importing any method.

A card is a Markdown file that opens with TOML front matter between two ``+++`` lines. Built-in cards are
``steersman/cards/*.md``; an installed package adds its own with an entry point of the group
``steersman.cards`` whose value names a package folder that holds card files, and benches with the group
``steersman.benches`` (name: the bench's id, value: ``module:Class``).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import tomllib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from steersman.errors import InputError, MissingExtra, nearest

PACKAGE = Path(__file__).parent
REQUIRED = (
    "id",
    "title",
    "family",
    "room",
    "host",
    "extra",
    "summary",
    "verbs",
    "benches",
    "object",
    "paper",
)
VERBS = ("compare", "evidence", "apply", "probe")


@dataclass(frozen=True)
class Card:
    """One published method, as its card declares it; ``text`` is what users read."""

    id: str
    title: str
    family: str
    room: str
    host: str
    extra: str
    summary: str
    verbs: tuple[str, ...]
    benches: tuple[str, ...]
    object: str
    paper: Mapping[str, Any]
    text: str
    source: Path
    aliases: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    line: str = ""
    apply: str = ""
    probe: str = ""
    evidence: str = ""
    bibtex: str = ""
    distribution: str = "steersman"

    @property
    def module(self) -> str:
        """The method's name as a Python module: ``dpm-solver-pp`` -> ``dpm_solver_pp``."""
        return self.id.replace("-", "_")

    @property
    def where(self) -> str:
        """Venue and year of the paper, the year once: "ICLR 2022", "arXiv 2023"."""
        venue, year = self.paper.get("venue") or "arXiv", str(self.paper.get("year", ""))
        return venue if year in venue else f"{venue} {year}"

    def to_json(self) -> dict[str, Any]:
        """The card's front matter as plain JSON."""
        names = ("id", "title", "paper", "family", "room", "host", "summary", "verbs", "benches", "aliases")
        record = {name: getattr(self, name) for name in names}
        record |= {"extra": self.extra, "object": self.object, "distribution": self.distribution}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in record.items()}

    def load(self) -> Any:
        """The object that the card names.

        Raises:
            MissingExtra: the host library is not installed.
        """
        return load_object(self.object, feature=self.id, extra=self.extra)


def read_card(path: Path, distribution: str = "steersman") -> Card:
    """The card in the file ``path``.

    Raises:
        InputError: no front matter, a missing or an unknown key, or an id that isn't the file's name.
    """
    text = path.read_text(encoding="utf-8")
    opening, _, rest = text.partition("+++\n")
    front, closing, body = rest.partition("\n+++\n")
    if opening.strip() or not closing:
        raise InputError("card", str(path), "a file that opens with TOML between two +++ lines")
    try:
        values = tomllib.loads(front)
    except tomllib.TOMLDecodeError as error:
        raise InputError("card", str(path), f"valid TOML ({error})") from None
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise InputError("card", str(path), f"a card with the keys {', '.join(missing)}")
    known = set(Card.__dataclass_fields__) - {"text", "source", "distribution"}
    for name in values:
        if name not in known:
            raise InputError("card key", name, nearest(name, known))
    if values["id"] != path.stem:
        raise InputError("card id", values["id"], f"the file's name ({path.stem})")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Card(**values, text=body.strip() + "\n", source=path, distribution=distribution)


@cache
def cards() -> Mapping[str, Card]:
    """All cards by id, sorted: built-in ones, then those of installed packages."""
    found = {path.stem: read_card(path) for path in sorted((PACKAGE / "cards").glob("*.md"))}
    for point in entry_points(group="steersman.cards"):
        distribution = point.dist.name if point.dist else point.name
        try:
            spec = importlib.util.find_spec(point.value)
            if spec is None or not spec.submodule_search_locations:
                raise InputError("entry point steersman.cards", point.value, "a package folder that holds cards")
            for folder in spec.submodule_search_locations:
                for path in sorted(Path(folder).glob("*.md")):
                    card = read_card(path, distribution)
                    if card.id in found:
                        raise InputError("card id", card.id, "a name that no other card has")
                    found[card.id] = card
        except (InputError, ImportError, OSError) as error:
            # A third party's broken card must not take the catalogue down, nor vanish in silence.
            warnings.warn(f"cards of {distribution} were left out: {error}", stacklevel=2)
    return dict(sorted(found.items()))


def card(name: str) -> Card:
    """The card of a method by id or alias.

    Raises:
        InputError: no such method; the sentence suggests the nearest name.
    """
    known = cards()
    key = resolve_alias(name)
    if key not in known:
        raise InputError("method", name, nearest(name, [*known, *_aliases()]))
    return known[key]


@cache
def _aliases() -> Mapping[str, str]:
    return {alias: card.id for card in cards().values() for alias in card.aliases}


def resolve_alias(name: str) -> str:
    """A method's id for its id or alias; any other name as it is."""
    return _aliases().get(name, name)


# ------------------------------------------------------------------ benches


@dataclass(frozen=True)
class BenchEntry:
    """A bench that can be run: its id, one sentence, and where its class is."""

    id: str
    summary: str
    object: str
    distribution: str = "steersman"

    def load(self) -> Any:
        """An instance of the bench."""
        module, _, name = self.object.partition(":")
        if name:
            return load_object(self.object, feature=f"bench {self.id}", extra="all")()
        loaded = import_module(module, feature=f"bench {self.id}", extra="all")
        for value in vars(loaded).values():
            if isinstance(value, type) and value.__module__ == module and getattr(value, "id", None) == self.id:
                return value()
        raise InputError("bench", self.id, f"a module with a class whose id is {self.id!r}")


@cache
def benches() -> Mapping[str, BenchEntry]:
    """All benches by id, found without importing them."""
    found = {}
    for path in sorted((PACKAGE / "benches").glob("[a-z]*.py")):
        name = path.stem.replace("_", "-")
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        found[name] = BenchEntry(name, " ".join(summary.split()), f"steersman.benches.{path.stem}")
    for point in entry_points(group="steersman.benches"):
        distribution = point.dist.name if point.dist else point.name
        if point.name in found:
            warnings.warn(f"bench {point.name} of {distribution} was left out: the name is taken", stacklevel=2)
            continue
        found[point.name] = BenchEntry(point.name, f"from {distribution}", point.value, distribution)
    return found


def bench(name: str) -> Any:
    """An instance of the bench called ``name``.

    Raises:
        InputError: no such bench; the sentence suggests the nearest name.
    """
    known = benches()
    if name not in known:
        raise InputError("bench", name, nearest(name, known))
    return known[name].load()


# ------------------------------------------------------------------ loading


def load_object(path: str, *, feature: str, extra: str) -> Any:
    """The attribute that ``module:attribute`` names.

    Raises:
        MissingExtra: an optional dependency of the module is not installed.
    """
    module, _, attribute = path.partition(":")
    value = import_module(module, feature=feature, extra=extra)
    for name in attribute.split("."):
        value = getattr(value, name)
    return value


def import_module(module: str, *, feature: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == module.partition(".")[0] or not extra:
            raise
        raise MissingExtra(f"{feature} (no module named {missing!r})", extra) from error


def lazy_exports(
    room: str, also: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a room's package (PEP 562), from the cards.

    Args:
        room: the package's ``__name__``.
        also: further names: ``{"DDIMScheduler": "steersman.diffusion.classical:DDIMScheduler"}``.
    """
    table: dict[str, tuple[str, str, str]] = {}
    short = room.rpartition(".")[2]
    for entry in cards().values():
        if entry.room == short and entry.distribution == "steersman":
            for path in (entry.object, *entry.exports):
                table[path.partition(":")[2]] = (path, entry.id, entry.extra)
    for name, path in (also or {}).items():
        table[name] = (path, f"{room}.{name}", short)

    def __getattr__(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        path, feature, extra = table[name]
        return load_object(path, feature=feature, extra=extra)

    names = sorted(table)
    return __getattr__, lambda: names, names
