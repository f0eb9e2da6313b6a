"""Contenders: one or more parts stacked on a bench's host, as plain JSON.

Written ``a:knob=v:knob=v+b:knob=v``; a value is read as JSON where it is JSON (numbers, true, false,
null, quoted text) and as text otherwise. A contender may also be a folder made by ``steersman apply``.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steersman import catalog
from steersman.errors import InputError, nearest

# A plus before a digit belongs to a number (1e+5); a colon starts a knob only where knob= follows, so that
# values like judge.py:score need no quotes.
COMMA = re.compile(",")
PART = re.compile(r"\+(?!\d)")
KNOB = re.compile(r":(?=\w*=)")
DEFAULTED = re.compile(r"\{(\w+)=([^{}]*)\}")
SPECIAL = re.compile(r"[\"\[\]{}+,\\]|:\w*=")


@dataclass(frozen=True)
class Part:
    """One method or baseline with its knobs.

    Args:
        id: a method's id, a baseline of the bench, or the path of an artefact folder.
        knobs: keyword arguments of the part.
    """

    id: str
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ":".join([self.id, *(f"{k}={_text(v)}" for k, v in self.knobs.items())])

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "knobs": dict(self.knobs)}


@dataclass(frozen=True)
class Contender:
    """Parts stacked in order on one host; its label is its canonical text."""

    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        return "+".join(map(str, self.parts))

    def __str__(self) -> str:
        return self.label

    def to_json(self) -> list[dict[str, Any]]:
        return [part.to_json() for part in self.parts]

    @classmethod
    def from_json(cls, parts: Iterable[Mapping[str, Any]]) -> Contender:
        return cls(tuple(Part(p["id"], dict(p.get("knobs", {}))) for p in parts))


def parse(text: str) -> Contender:
    """A contender from its text, method aliases resolved to ids.

    Raises:
        InputError: empty text, an empty part, or a knob without ``=``.
    """
    parts = []
    for piece in _split(text, PART):
        name, *knobs = _split(piece, KNOB)
        if ":" in name:
            raise InputError("methods", text, f"written with knobs as knob=value (not {name.partition(':')[2]!r})")
        if not name:
            raise InputError("methods", text, "contenders like 'ddim' or 'pndm:variant=plms+other:knob=value'")
        values: dict[str, Any] = {}
        for knob in knobs:
            key, equals, value = knob.partition("=")
            if not equals or not key:
                raise InputError("methods", text, f"written with knobs as knob=value (not {knob!r})")
            if key in values:
                raise InputError("methods", text, f"a contender that gives each knob once ({key!r} is given twice)")
            values[key] = _value(value)
        if not (Path(name) / "artefact.json").is_file():
            name = catalog.resolve_alias(name)
        parts.append(Part(name, values))
    return Contender(tuple(parts))


def parse_list(text: str | Iterable[str]) -> list[Contender]:
    """Contenders from a comma-separated text (commas inside brackets or quotes don't separate)."""
    pieces = _split(text, COMMA) if isinstance(text, str) else list(text)
    contenders = [parse(piece) for piece in pieces if piece.strip()]
    if not contenders:
        raise InputError("methods", text, "at least one contender")
    labels = [c.label for c in contenders]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError("methods", ",".join(labels), f"contenders that all differ ({twice[0]!r} is there twice)")
    return contenders


def checked_knobs(build: Callable[..., Any], part: Part, *, skip: Iterable[str] = ()) -> dict[str, Any]:
    """``part``'s knobs, checked by name against the signature of ``build`` (minus ``skip``).

    Raises:
        InputError: a knob that ``build`` does not have; the sentence lists the knobs and the nearest.
    """
    parameters = inspect.signature(build).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(part.knobs)
    skipped = {"self", *skip}
    known = [
        name
        for name, p in parameters.items()
        if name not in skipped and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    for knob in part.knobs:
        if knob not in known:
            allowed = nearest(knob, known) if known else f"left out: {part.id} has no knobs"
            raise InputError(f"knob of {part.id}", knob, allowed)
    return dict(part.knobs)


def code_line(template: str, knobs: Mapping[str, Any]) -> str:
    """The code line that applies a part.

    ``{knobs}`` becomes ``k=v``, ``{, knobs}`` adds the comma, and ``{k=v}`` is the knob k's value, by default v.
    """
    template = DEFAULTED.sub(lambda m: repr(knobs[m[1]]) if m[1] in knobs else m[2], template)
    text = ", ".join(f"{k}={v!r}" for k, v in knobs.items())
    return template.replace("{, knobs}", f", {text}" if text else "").replace("{knobs}", text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        lowered = {"True": True, "False": False, "None": None, "inf": float("inf")}
        return lowered.get(text, text)


def _text(value: Any) -> str:
    if isinstance(value, str):
        plain = _value(value) == value and not SPECIAL.search(value) and value.strip() == value and value
        return value if plain else json.dumps(value)
    return json.dumps(value).replace("e+", "e")


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at matches of ``separator`` that stand outside of quotes and brackets."""
    pieces, start, depth, quoted, at = [], 0, 0, False, 0
    while at < len(text):
        char = text[at]
        if char == "\\" and quoted:
            at += 1
        elif char == '"':
            quoted = not quoted
        elif not quoted:
            depth += (char in "[{") - (char in "]}")
            if depth == 0 and separator.match(text, at):
                pieces.append(text[start:at].strip())
                start = at + 1
        at += 1
    return [*pieces, text[start:].strip()]
