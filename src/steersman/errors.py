"""The few kinds of failure a user can meet; each reads as one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """A value given at a public boundary is not allowed.

    Args:
        parameter: name of the parameter, as the user wrote it.
        value: the refused value.
        allowed: what is allowed, as the end of a sentence ("a whole number from 1 to 1000").
    """

    def __init__(self, parameter: str, value: Any, allowed: str) -> None:
        self.parameter, self.value, self.allowed = parameter, value, allowed
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{parameter}={shown} is not allowed: it must be {allowed}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.parameter, self.value, self.allowed)


class MissingExtra(ImportError):
    """A feature needs an optional dependency that is not installed.

    Args:
        feature: what the user asked for.
        extra: the pip extra that brings it.
    """

    def __init__(self, feature: str, extra: str) -> None:
        self.feature, self.extra = feature, extra
        super().__init__(f"{feature} needs an optional dependency: pip install 'steersman[{extra}]'.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.feature, self.extra)


class OutputError(RuntimeError):
    """The operating system refused to write; what was written before is whole.

    Args:
        path: where.
        reason: the operating system's words.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"could not write {path}: {reason}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


class TrialError(RuntimeError):
    """One trial of a comparison went wrong; its row is marked failed and the others go on."""


class Inapplicable(TrialError):
    """A contender can't run at a setting (for example: too few calls); its row says why."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that lists ``names`` and suggests the one nearest to ``name``."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"one of {', '.join(known)}{hint}"
