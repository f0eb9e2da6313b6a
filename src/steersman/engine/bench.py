"""The contract between the one engine and everything it runs.

A bench says what one trial is. It owns no loop, no files, no progress bar and no seeds: the engine
(:func:`steersman.engine.compare.compare`) has those. The life of a trial is

    host = bench.host(subject, setting, streams)       # fresh for each trial
    for part in contender.parts: bench.mount(host, part)
    figures = bench.trial(host, setting, streams, log)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from steersman.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from steersman.engine.comparison import Comparison
    from steersman.engine.contenders import Part
    from steersman.engine.fits import Fits
    from steersman.engine.streams import Streams

S = TypeVar("S")
H = TypeVar("H")
Setting = Mapping[str, Any]
Figures = Mapping[str, float]
Shape = Literal["Sampler", "Generator", "Recipe", "Ranks", "World", "Problem"]


@dataclass(frozen=True)
class Knob:
    """One setting of a bench's grid; its command line flag and help come from here.

    Args:
        type: int, float, str or bool.
        default: the values of the grid when the user names none (a tuple), or the value (not swept).
        help: what it sets, with its unit.
        low, high: inclusive range for numbers.
        choices: allowed values.
        sweep: whether a comma-separated list spans the grid (True) or one value holds for the run.
    """

    type: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    sweep: bool = True

    def parse(self, name: str, value: Any) -> Any:
        """``value`` (text or already typed) as this knob's type.

        Raises:
            InputError: wrong type, out of range or not among the choices.
        """
        allowed = self.allowed
        try:
            if self.type is bool and isinstance(value, str):
                parsed: Any = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                    value.lower()
                ]
            elif self.type is int and not isinstance(value, bool):
                parsed = int(value) if isinstance(value, str) else value
                if int(parsed) != parsed:
                    raise ValueError
                parsed = int(parsed)
            elif self.type is float and not isinstance(value, bool):
                parsed = float(value)
                if parsed != parsed:
                    raise ValueError
            elif isinstance(value, self.type):
                parsed = value
            else:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError):
            raise InputError(name, value, allowed) from None
        if self.choices is not None and parsed not in self.choices:
            raise InputError(name, parsed, allowed)
        if (self.low is not None and parsed < self.low) or (self.high is not None and parsed > self.high):
            raise InputError(name, parsed, allowed)
        return parsed

    @property
    def allowed(self) -> str:
        """What is allowed, as the end of a sentence."""
        if self.choices is not None:
            return "one of " + ", ".join(map(str, self.choices))
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.type]
        if self.low is not None and self.high is not None:
            return f"{kind} from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"{kind} of at least {self.low:g}"
        if self.high is not None:
            return f"{kind} of at most {self.high:g}"
        return kind


@dataclass(frozen=True)
class Figure:
    """One number that a trial reports.

    Args:
        unit: its unit ("calls", "s", "", "nats").
        better: which direction is better, or neither.
        role: what it stands for in reports: a quality, a cost, or information.
        help: what it measures, one sentence.
    """

    unit: str
    better: Literal["lower", "higher", "neither"]
    role: Literal["quality", "cost", "info"] = "info"
    help: str = ""


class TrialLog(Protocol):
    """What a trial may tell the engine beside its figures; items land in the row's item folder."""

    fits: Fits

    def progress(self, done: float, total: float, text: str = "") -> None: ...
    def per_item(self, figure: str, values: Sequence[float]) -> None: ...
    def images(self, name: str, images: np.ndarray) -> None: ...
    def texts(self, name: str, texts: Sequence[Mapping[str, Any]]) -> None: ...
    def arrays(self, name: str, **arrays: np.ndarray) -> None: ...


@dataclass(frozen=True)
class PartInfo:
    """A part that a bench brings itself (its baselines).

    Args:
        build: called with the part's knobs, returns what the bench mounts.
        summary: one sentence.
        line: the code line that applies it, see :func:`~steersman.engine.contenders.code_line`.
    """

    build: Callable[..., Any]
    summary: str
    line: str = ""


@runtime_checkable
class Bench(Protocol[S, H]):
    """See the module's text.

    A bench may also have ``accepts(name) -> PartInfo | None``, for parts that it takes by other names than its
    own (the sampling bench takes any scheduler class of diffusers), and ``closing(comparison) -> list[str]``, lines
    that the terminal ends with.
    """

    id: str
    shape: Shape
    knobs: Mapping[str, Knob]
    figures: Mapping[str, Figure]
    headline: tuple[str, str]
    """(quality figure, cost figure or knob): the axes of the report's main plot."""
    default_subject: str

    def subject(self, spec: str) -> S: ...
    def baselines(self) -> list[str]: ...
    def parts(self) -> Mapping[str, PartInfo]: ...
    def check(self, s: S, setting: Setting) -> None: ...
    def host(self, s: S, setting: Setting, rng: Streams) -> H: ...
    def mount(self, h: H, part: Part) -> None: ...
    def trial(self, h: H, setting: Setting, rng: Streams, log: TrialLog) -> Figures: ...
    def exhibits(self, comparison: Comparison) -> list[Any]: ...


@dataclass
class Row:
    """One trial's outcome, one line of ``results.jsonl``.

    ``key`` hashes (bench, subject, contender, setting, seed); ``status`` is ok, failed or inapplicable.
    """

    key: str
    bench: str
    contender: str
    parts: list[dict[str, Any]]
    setting: dict[str, Any]
    seed: int
    status: Literal["ok", "failed", "inapplicable"]
    figures: dict[str, float]
    timing: dict[str, float]
    per_item: dict[str, list[float]] = field(default_factory=dict)
    items: str | None = None
    error: str | None = None

    def items_dir(self, out: Path) -> Path | None:
        """The folder of this row's saved items under the run folder ``out``."""
        return out / self.items if self.items else None
