"""What the verbs share: one way to end, one way to print for programs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer

from steersman.errors import InputError, MissingExtra, OutputError, TrialError

P = ParamSpec("P")
T = TypeVar("T")
BAD_INPUT, FAILED_ROWS, INTERRUPTED = 2, 3, 130


def one_sentence(function: Callable[P, T]) -> Callable[P, T]:
    """End a verb with one sentence and the right exit code for what a user can cause."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (InputError, MissingExtra, OutputError, TrialError) as error:
            typer.echo(f"steersman: {error}", err=True)
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt as interrupt:
            typer.echo(f"\nsteersman: {interrupt.args[0] if interrupt.args else 'interrupted.'}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader (head, less) went away: nothing is wrong, and there is nobody left to tell.
            sys.stderr.close()
            raise typer.Exit(0) from None

    return wrapper


def print_json(value: Any) -> None:
    """One JSON value on standard output, for programs."""
    typer.echo(json.dumps(value, indent=1))


def settings(pairs: list[str] | None, extra: list[str]) -> dict[str, str]:
    """Settings from ``--set k=v`` and from ``--k v`` or ``--k=v``.

    Raises:
        InputError: something that is neither.
    """
    found: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError("set", pair, "written as setting=value")
        found[key.replace("-", "_")] = value
    words = iter(extra)
    for word in words:
        if not word.startswith("--"):
            raise InputError("argument", word, "an option (settings are --name value or --set name=value)")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise InputError(word, "", "followed by a value")
            value = following
        found[key.replace("-", "_")] = value
    return found
