"""What the verbs share: one way to end, one way to print for programs."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from typer.models import OptionInfo

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


def with_settings(command: Callable[..., Any], verb: str, arguments: list[str]) -> Callable[..., Any]:
    """For ``VERB METHOD --help``: the command with the method's own settings among its options."""
    named = _first_argument(command, arguments[1:])
    if arguments[:1] != [verb] or named in (None, "subject") or not {"-h", "--help"} & {*arguments}:
        return command
    from steersman import catalog
    from steersman.engine.artefacts import RESERVED, function_of

    try:
        card = catalog.card(str(named))
        function = function_of(card, verb)
    except (InputError, MissingExtra) as error:
        typer.echo(f"steersman: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    hints, told = typing.get_type_hints(function), arguments_in(inspect.getdoc(function) or "")
    own = typing.get_type_hints(command, include_extras=True)
    parameters = [p.replace(annotation=own[p.name]) for p in inspect.signature(command).parameters.values()]
    taken = {p.name for p in parameters}
    for p in inspect.signature(function).parameters.values():
        if p.kind is not p.KEYWORD_ONLY or p.name in RESERVED or p.name in taken:
            continue
        default = (
            ""
            if p.default in (None, p.empty)
            else f" [dim](default: {getattr(p.default, '__name__', p.default)})[/dim]"
        )
        option = typer.Option(
            f"--{p.name.replace('_', '-')}",
            help=f"{told.get(p.name, '')}{default}",
            metavar=_kind(hints.get(p.name, str)),
            rich_help_panel=f"Settings of {card.id}",
        )
        annotation = Annotated[str | None, option]
        parameters.append(inspect.Parameter(p.name, p.KEYWORD_ONLY, default=None, annotation=annotation))

    def shown(**options: Any) -> None:
        raise AssertionError("only its help is shown")  # pragma: no cover

    shown.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
    shown.__annotations__ = {p.name: p.annotation for p in parameters}
    shown.__doc__ = f"{command.__doc__}\n\n{card.title}: {card.summary}"
    return shown


def _first_argument(command: Callable[..., Any], words: list[str]) -> str | None:
    """The first word that is neither an option nor its value. Options take a value unless they are the command's own
    switches; settings always do."""
    switches = {"-h", "--help"}
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        kind, *rest = typing.get_args(hint) or (hint,)
        if kind is bool:
            # Inside of Annotated, typer takes the first name that is declared as its default.
            options = [option for option in rest if isinstance(option, OptionInfo)]
            declared = [text for o in options for text in (o.default, *(o.param_decls or ())) if isinstance(text, str)]
            switches.update(declared or [f"--{name.replace('_', '-')}"])
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("-"):
            return word
        attached = "=" in word or (not word.startswith("--") and len(word) > 2)
        if word not in switches and not attached:
            next(remaining, None)
    return None


def arguments_in(docstring: str) -> dict[str, str]:
    """What the ``Args`` of a docstring say of each argument, on one line."""
    _, _, text = docstring.partition("Args:\n")
    text = re.split(r"\n\s*\n|\n\S", text)[0]
    told: dict[str, str] = {}
    for names, what in re.findall(r"^ {4}(\w[\w, ]*): ((?:.|\n {5,})*)", text, flags=re.MULTILINE):
        for name in names.split(", "):
            told[name] = " ".join(what.split()).replace("[", r"\[")
    return told


def _kind(hint: Any) -> str:
    options = [o for o in typing.get_args(hint) or (hint,) if o is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if len(options) == 1 and typing.get_origin(options[0]) is typing.Literal:
        return "|".join(map(str, typing.get_args(options[0])))
    named = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    return "|".join(
        dict.fromkeys(named.get(option, "FILE") if isinstance(option, type) else "FILE.py:NAME" for option in options)
    )
