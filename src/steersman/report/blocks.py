"""What a bench can put into a report: small, validated pieces that every renderer knows.

``bench.exhibits(comparison)`` returns a list of these blocks. Wherever a block holds something per
contender, its keys are the contenders' labels (``comparison.contenders``); a contender then has the same
colour and marker in every block. Blocks of one type with one ``title`` that follow each other and differ
in ``setting`` are shown behind one row of tabs, a tab per setting.

All text is plain text: renderers escape it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from steersman.errors import InputError

SPAN_KINDS = ("loop", "steered", "good", "bad")
ACTIVITIES = ("compute", "communicate", "wait", "other")


@dataclass(frozen=True)
class ImageGrid:
    """Contender x images, made from the same noise: one row a contender, one column a noise.

    Args:
        title: heading.
        images: label -> images ``[N, H, W]`` (grey) or ``[N, H, W, C]`` with C = 1, 3 or 4; floats in
            [0, 1] or uint8. Rows may differ in N. Values that are not finite are drawn as a marked pixel.
        columns: a caption for each column, or nothing.
        caption: one or two sentences under the heading.
        setting: the setting the images belong to (``{"calls": 10}``), shown with the title.
    """

    title: str
    images: Mapping[str, np.ndarray]
    columns: Sequence[str] = ()
    caption: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _filled("images", self.images)
        for label, images in self.images.items():
            array = np.asarray(images)
            good = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3, 4))
            if not good or 0 in array.shape:
                raise InputError(
                    f"images[{label!r}]", f"array of shape {array.shape}", "of shape [N, H, W] or [N, H, W, 1|3|4]"
                )
            if array.dtype != np.uint8:
                if not np.issubdtype(array.dtype, np.floating):
                    raise InputError(f"images[{label!r}]", f"array of {array.dtype}", "floats or uint8")
                finite = array[np.isfinite(array)]
                if finite.size and (finite.min() < -1e-3 or finite.max() > 1 + 1e-3):
                    raise InputError(
                        f"images[{label!r}]",
                        f"values from {finite.min():.3g} to {finite.max():.3g}",
                        "floats from 0 to 1",
                    )


@dataclass(frozen=True)
class Span:
    """A highlighted piece of a text: characters ``start`` up to ``end``.

    Args:
        start, end: ``0 <= start < end``; clipped to the text.
        kind: "loop" (said before), "steered" (changed by the method), "good" or "bad".
        note: shown on hover and to screen readers.
    """

    start: int
    end: int
    kind: Literal["loop", "steered", "good", "bad"] = "loop"
    note: str = ""

    def __post_init__(self) -> None:
        if self.start < 0 or self.end <= self.start:
            raise InputError("span", (self.start, self.end), "start, end with 0 <= start < end")
        _member("kind", self.kind, SPAN_KINDS)


@dataclass(frozen=True)
class Text:
    """One contender's answer, with highlighted spans and a line of facts ("rep-4 0.31")."""

    text: str
    spans: Sequence[Span] = ()
    facts: str = ""


@dataclass(frozen=True)
class Answers:
    """One prompt and what each contender (label -> :class:`Text`) made of it."""

    prompt: str
    texts: Mapping[str, Text]

    def __post_init__(self) -> None:
        _filled("texts", self.texts)


@dataclass(frozen=True)
class SideBySide:
    """Texts of the contenders beside each other, prompt by prompt."""

    title: str
    items: Sequence[Answers]
    caption: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _filled("items", self.items)


@dataclass(frozen=True)
class LoadMap:
    """Heat maps of a leaf-spine fabric: how loaded each link is under each contender.

    Args:
        up: label -> load of the links leaf -> spine, ``[leaves, spines]``, not negative. NaN = no such
            link (failed).
        down: label -> load of the links spine -> leaf, ``[leaves, spines]``; empty if there is nothing to
            show beside ``up``.
        unit: unit of the loads ("× ideal", "GB").
        ideal: the load under ideal balancing, marked on the colour scale.
    """

    title: str
    up: Mapping[str, np.ndarray]
    down: Mapping[str, np.ndarray] = field(default_factory=dict)
    unit: str = "× ideal"
    ideal: float | None = None
    caption: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _filled("up", self.up)
        if self.down and set(self.down) != set(self.up):
            raise InputError("down", sorted(self.down), f"for the contenders of up: {', '.join(self.up)}")
        shape = np.asarray(next(iter(self.up.values()))).shape
        for name, maps in (("up", self.up), ("down", self.down)):
            for label, loads in maps.items():
                array = np.asarray(loads, dtype=float)
                if array.ndim != 2 or array.shape != shape or 0 in array.shape:
                    raise InputError(
                        f"{name}[{label!r}]", f"array of shape {array.shape}", "[leaves, spines], alike for all"
                    )
                if np.any(array < 0) or np.any(np.isinf(array)):
                    raise InputError(
                        f"{name}[{label!r}]",
                        f"values from {np.nanmin(array):g} to {np.nanmax(array):g}",
                        "finite and >= 0",
                    )


@dataclass(frozen=True)
class Scatter:
    """Samples in the plane, a panel per contender, over the target.

    Args:
        points: label -> ``[N, 2]``. Points that are not finite are counted, not drawn.
        target: ``[M, 2]`` samples of the target, drawn behind every panel.
    """

    title: str
    points: Mapping[str, np.ndarray]
    target: np.ndarray | None = None
    caption: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _filled("points", self.points)
        target = {} if self.target is None else {"target": self.target}
        for name, points in {**self.points, **target}.items():
            shape = np.asarray(points).shape
            if len(shape) != 2 or shape[1] != 2:
                raise InputError(f"points[{name!r}]", f"array of shape {shape}", "of shape [N, 2]")


@dataclass(frozen=True)
class Activity:
    """What a worker did from ``start`` to ``end`` (seconds)."""

    start: float
    end: float
    kind: Literal["compute", "communicate", "wait", "other"] = "compute"
    note: str = ""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.start) and np.isfinite(self.end) and self.end >= self.start):
            raise InputError("activity", (self.start, self.end), "finite start, end with start <= end")
        _member("kind", self.kind, ACTIVITIES)


@dataclass(frozen=True)
class Timeline:
    """Who computed and who communicated when: label -> worker ("rank 0") -> activities."""

    title: str
    lanes: Mapping[str, Mapping[str, Sequence[Activity]]]
    caption: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _filled("lanes", self.lanes)
        for label, workers in self.lanes.items():
            _filled(f"lanes[{label!r}]", workers)


@dataclass(frozen=True)
class Line:
    """A curve, with a band where ``low`` and ``high`` are given; all of one length. NaN leaves a gap."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise InputError("low", self.low, "given together with high")
        for name in ("y", "low", "high"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.x):
                raise InputError(name, f"{len(values)} values", f"as many as x has ({len(self.x)})")


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis (loss against tokens), label -> :class:`Line`.

    Args:
        x_label, y_label: names with units.
        log_x, log_y: logarithmic axes.
        band: what the bands are ("95% interval", "range over seeds").
    """

    title: str
    lines: Mapping[str, Line]
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    band: str = ""
    caption: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _filled("lines", self.lines)


@dataclass(frozen=True)
class Note:
    """A remark that a reader must not miss ("warning") or may like to know ("info")."""

    text: str
    level: Literal["info", "warning"] = "info"
    title: str = ""

    def __post_init__(self) -> None:
        _member("level", self.level, ("info", "warning"))


@dataclass(frozen=True)
class TableBlock:
    """A plain table. Cells are text or numbers; numbers are set right and shortened to 4 digits.

    A cell of the column named "contender" gets the contender's mark.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _filled("columns", self.columns)
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError("rows", list(row), f"rows of {len(self.columns)} cells")


Block = ImageGrid | SideBySide | LoadMap | Scatter | Timeline | Curves | Note | TableBlock


def loops(text: str, words: int = 4) -> list[Span]:
    """Where ``text`` repeats itself: every run of ``words`` words that it has said before.

    Overlapping repeats join into one span, so a loop of any length is one highlight.

    Args:
        text: the continuation alone (without its prompt).
        words: length of a repeat, at least 1.
    """
    if words < 1:
        raise InputError("words", words, "a whole number of at least 1")
    pieces = [(m.start(), m.end(), m.group().lower()) for m in re.finditer(r"\w+|[^\w\s]", text)]
    first_said: dict[tuple[str, ...], int] = {}
    spans: list[list[int]] = []
    for i in range(len(pieces) - words + 1):
        key = tuple(word for _, _, word in pieces[i : i + words])
        if key not in first_said:
            first_said[key] = i
            continue
        start, end = pieces[i][0], pieces[i + words - 1][1]
        if spans and start <= spans[-1][1]:
            spans[-1][1] = end
        else:
            spans.append([start, end])
    return [Span(start, end, "loop", "said before") for start, end in spans]


def _filled(name: str, value: Any) -> None:
    if len(value) == 0:
        raise InputError(name, value, "not empty")


def _member(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(name, value, "one of " + ", ".join(allowed))
