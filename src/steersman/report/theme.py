"""Colours and marks: one identity per contender, in every plot, table and exhibit.

The eight colours were searched so that the nearest two stay apart (at least 0.07 in OKLab) for viewers with
normal vision, protanopia and deuteranopia alike, with a contrast of at least 3:1 against the page, in a
light and in a dark set. Every contender also has a marker shape, so that nothing hangs on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LIGHT: Mapping[str, str] = {
    "page": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1b1e26",
    "muted": "#5a6170",
    "line": "#d9dce3",
    "accent": "#2440c0",
    "c0": "#2440c0",
    "c1": "#e06500",
    "c2": "#35a08a",
    "c3": "#7a1452",
    "c4": "#9a6cf0",
    "c5": "#6b4a00",
    "c6": "#2b7da6",
    "c7": "#c2334a",
    "good": "#1d6f5c",
    "bad": "#b3261e",
    "warn": "#8a5300",
}
DARK: Mapping[str, str] = {
    "page": "#14161c",
    "panel": "#1d2029",
    "ink": "#eceef3",
    "muted": "#a3abbb",
    "line": "#363b48",
    "accent": "#93adff",
    "c0": "#5f86f8",
    "c1": "#fb8a1c",
    "c2": "#52b598",
    "c3": "#b95c9b",
    "c4": "#c9adff",
    "c5": "#f5d97a",
    "c6": "#a5e3fb",
    "c7": "#dd4a35",
    "good": "#6fd3b8",
    "bad": "#ff8f82",
    "warn": "#f2b45c",
}
SYMBOLIC: Mapping[str, str] = {role: f"#01{i:02x}99" for i, role in enumerate(LIGHT)}
"""Stand-ins for the roles while matplotlib draws; the SVG then gets CSS variables in their place."""

COLOURS = 8
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
"""matplotlib's names of the marker shapes."""

SHAPES = (
    "M8 2.5a5.5 5.5 0 1 0 .01 0z",
    "M3 3h10v10H3z",
    "M8 2l6.5 11.5h-13z",
    "M8 1.2L14.8 8 8 14.8 1.2 8z",
    "M8 14L1.5 2.5h13z",
    "M5.8 1.8h4.4v4h4v4.4h-4v4H5.8v-4h-4V5.8h4z",
    "M4.2 1.4L8 5.2l3.8-3.8 2.8 2.8L10.8 8l3.8 3.8-2.8 2.8L8 10.8l-3.8 3.8-2.8-2.8L5.2 8 1.4 4.2z",
    "M8 1.5l6.7 4.9-2.6 7.8H3.9L1.3 6.4z",
)
"""The same shapes as SVG paths in a box of 16 x 16."""


@dataclass(frozen=True)
class Mark:
    """A contender's colour ("c0" to "c7"), marker (an index of ``MARKERS``) and line style."""

    colour: str
    marker: int
    dashes: str


def marks(labels: Iterable[str]) -> dict[str, Mark]:
    """A mark for every label, by position; after eight, the shapes shift and lines are dashed."""
    styles = ("-", "--", ":", "-.")
    return {
        label: Mark(f"c{i % COLOURS}", (i + i // COLOURS) % len(MARKERS), styles[(i // COLOURS) % len(styles)])
        for i, label in enumerate(dict.fromkeys(labels))
    }
