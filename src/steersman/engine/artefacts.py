"""Artefacts: what ``apply`` makes, always with ``artefact.json`` that says how.

The record holds the method and its settings, fingerprints of the subject and the input, versions, the
seed, the seconds that it took and the metrics that the method reported.

What is made lies in ``<out>.partial`` until it is whole. A function with a parameter ``resume`` keeps finished pieces
there: an interrupt or a kill leaves them, and the same request with ``resume`` goes on from them. All the while the run
holds ``<out>.partial.lock``, so that no other touches either folder.
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
import tempfile
import time
import types
import typing
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steersman import catalog
from steersman.catalog import Card
from steersman.engine import subjects
from steersman.engine.compare import versions
from steersman.engine.locks import alone
from steersman.engine.rows import plain, writing
from steersman.errors import InputError, nearest

RECORD = "artefact.json"
RESERVED = ("subject", "input", "out", "seed", "log", "resume")
REQUEST = ".request.json"


def run_verb(
    verb: typing.Literal["apply", "probe"],
    method: str,
    subject: str,
    out: str | Path,
    input: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    resume: bool = False,
) -> dict[str, Any]:
    """Make an artefact with a method (``apply``) or measure a property of the subject (``probe``).

    Args:
        verb: apply or probe.
        method: id or alias.
        subject: see :mod:`steersman.engine.subjects`.
        out: a new or empty folder; it gets its content whole or not at all.
        input: a file or folder that the method works with; a reference subject of images brings its own.
        settings: keyword arguments of the method's function, as text or typed.
        seed: for everything random.
        log: gets one line at a time about the progress.
        resume: go on with what an interrupted run of the same request has finished (a whole one is returned as it is).

    Returns:
        dict: the record that was written to ``artefact.json`` (``probe.json`` for a probe).

    Raises:
        InputError: a bad argument, or a method without this verb.
        OutputError: ``out`` can't be written.
    """
    card = catalog.card(method)
    function = function_of(card, verb)
    checked = check_settings(card, function, settings or {})
    resumable = "resume" in inspect.signature(function).parameters
    if resume and not resumable:
        raise InputError("resume", True, f"left out: {verb} {card.id} keeps nothing unfinished")
    folder = Path(out)
    found = subjects.resolve(subject)
    source = Path(input).expanduser() if input is not None else None
    if source is not None and not source.exists():
        raise InputError("input", str(input), "a file or folder that exists")
    request = {
        "verb": verb,
        "method": card.id,
        "settings": _as_written(checked, settings or {}),
        "files": _fingerprints(checked, settings or {}),
        "subject": {"spec": subject, "fingerprint": found.fingerprint},
        "input": None if source is None else {"path": str(input), "fingerprint": subjects.tree_hash(source)},
        "seed": seed,
    }
    name = RECORD if verb == "apply" else "probe.json"
    if resume and (folder / name).is_file():
        whole = json.loads((folder / name).read_text())
        _same_request(plain(request), whole, folder)
        return typing.cast(dict[str, Any], whole)
    if folder.name in ("", ".."):
        raise InputError("out", str(out), "a new folder, by its name")
    with writing(folder), alone(folder):
        return _make(function, found, source, folder, name, request, checked, log, resume)


def _make(
    function: Callable[..., Any],
    found: subjects.Subject,
    source: Path | None,
    folder: Path,
    name: str,
    request: Mapping[str, Any],
    checked: Mapping[str, Any],
    log: Callable[[str], None],
    resume: bool,
) -> dict[str, Any]:
    """Run a verb's function in ``<folder>.partial`` and rename that when it is whole; nobody else uses the folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("out", str(folder), "a new or empty folder")
    resumable = "resume" in inspect.signature(function).parameters
    partial = folder.with_name(f"{folder.name}.partial")
    asked = partial / REQUEST
    going_on = asked.is_file()
    if going_on and not resume:
        way = "add --resume, or remove it" if resumable else "remove it"
        raise InputError("out", str(folder), f"another folder (an interrupted run is kept in {partial}: {way})")
    if going_on:
        _same_request(plain(request), json.loads(asked.read_text()), partial)
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    start = time.perf_counter()
    try:
        if resumable and not going_on:
            asked.with_suffix(".partial").write_text(json.dumps(plain(request)) + "\n")
            asked.with_suffix(".partial").replace(asked)
        # A reference subject with a variant (gaussians:ring) stays text; a folder becomes a path.
        target: str | Path = found.path if found.path and found.kind in ("reference", "path") else found.spec
        with tempfile.TemporaryDirectory(prefix="steersman-input-") as temporary:
            # A reference subject brings its own images or texts, and judges texts itself.
            attribute = attribute_of(function, checked)
            split: typing.Literal["train", "heldout"] = "train" if request["verb"] == "apply" else "heldout"
            given = source or subjects.write_input(found, Path(temporary), attribute, split)
            judged = "scorer" in inspect.signature(function).parameters and checked.get("scorer") is None
            extra: dict[str, Any] = {"scorer": subjects.scorer(found, attribute)} if judged else {}
            if resumable:
                extra["resume"] = resume
            metrics = function(target, given, partial, seed=request["seed"], log=log, **checked, **extra)
        record = {
            **request,
            "versions": versions(),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": time.perf_counter() - start,
            "metrics": dict(metrics),
        }
        (partial / name).write_text(json.dumps(plain(record), indent=1) + "\n")
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
        (folder / REQUEST).unlink(missing_ok=True)
        return typing.cast(dict[str, Any], plain(record))
    except BaseException as error:
        # Bad input leaves nothing behind, unless finished work lay there before.
        if not resumable or (isinstance(error, InputError) and not going_on):
            shutil.rmtree(partial, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            kept = f"interrupted: what was finished is kept in {partial}; the same command with --resume goes on."
            raise KeyboardInterrupt(kept) from None
        raise


def _same_request(request: Mapping[str, Any], old: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with what was asked for differently.

    Raises:
        InputError: the sentence says what differs.
    """
    for name, value in request.items():
        before, now = old.get(name), value
        if name in ("subject", "input") and before and now:
            before, now = before["fingerprint"], now["fingerprint"]  # a path may be written differently
        elif name == "settings" and before:
            files, kept = request["files"], old.get("files", {})
            same = {setting: files[setting] for setting in files.keys() & kept.keys()}
            before, now = {**before, **{setting: kept[setting] for setting in same}}, {**now, **same}
        elif name == "files":  # compared with the settings
            continue
        if before != now:
            raise InputError("resume", value, f"the {name} of the run in {folder} ({old.get(name)!r})")


def attribute_of(function: Callable[..., Any], settings: Mapping[str, Any]) -> str | None:
    """The attribute (``column=value``) that a function works on, of its settings or by default; None if it has none."""
    parameter = inspect.signature(function).parameters.get("attribute")
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return typing.cast(str | None, settings.get("attribute", default))


def function_of(card: Card, verb: str) -> Callable[..., Any]:
    """The function behind a verb of a method.

    Raises:
        InputError: the method doesn't have it; the sentence lists those that do.
    """
    path = getattr(card, verb)
    if not path:
        able = [c.id for c in catalog.cards().values() if getattr(c, verb)]
        raise InputError("method", card.id, f"a method with {verb}: {', '.join(able) or 'none yet'}")
    return typing.cast(Callable[..., Any], catalog.load_object(path, feature=f"{verb} {card.id}", extra=card.extra))


def check_settings(card: Card, function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` by name and type, against the keyword-only parameters of ``function``.

    Raises:
        InputError: an unknown setting or a value of another type.
    """
    known = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in RESERVED
    }
    hints = typing.get_type_hints(function)
    checked = {}
    for name, value in settings.items():
        key = name.replace("-", "_")
        if key not in known:
            raise InputError(f"setting of {card.id}", name, nearest(key, known) if known else "left out: it has none")
        checked[key] = _typed(key, value, hints.get(key, str))
    return checked


def _as_written(checked: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Checked settings for the record: a loaded callable by the text that named it."""
    given = {name.replace("-", "_"): value for name, value in settings.items()}
    texts = {name: given[name] if isinstance(given[name], str) else repr(given[name]) for name in checked}
    return {name: texts[name] if callable(value) else value for name, value in checked.items()}


def _fingerprints(checked: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, str]:
    """Of the settings that name a file or folder that exists, or an object in a file (``file.py:name``)."""
    given = {name.replace("-", "_"): value for name, value in settings.items()}
    found = {}
    for name, value in checked.items():
        code = subjects.CODE.match(given[name]) if callable(value) and isinstance(given[name], str) else None
        path = Path(code["file"]) if code else value
        if isinstance(path, Path) and path.exists():
            found[name] = subjects.tree_hash(path)
    return found


def _typed(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None or value in ("none", "null"):
                return None
        elif typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif option is bool:
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "1", "0"):
                return value.lower() in ("true", "yes", "1")
        elif option in (int, float):
            try:
                return option(value) if not isinstance(value, bool) else _refuse()
            except (TypeError, ValueError):
                continue
        elif option is Path and isinstance(value, str):
            return subjects.path_of(value)
        elif option is str or typing.get_origin(option) is not None or callable(option):
            # file.py:name for anything that the method takes as a callable or an object
            if isinstance(value, str) and option is not str and subjects.CODE.match(value):
                return subjects.load_callable(value, name)
            return value
    names = ", ".join(_hint_name(option) for option in options)
    raise InputError(name, value, f"of type {names}" if "one of" not in names else names)


def _refuse() -> Any:
    raise ValueError


def _hint_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def describe(subject: str) -> dict[str, Any]:
    """What a subject is: kind, fingerprint and, for a model folder, its classes, parameters and size.

    Raises:
        InputError: it names nothing that exists.
    """
    found = subjects.resolve(subject)
    record: dict[str, Any] = {"subject": subject, "kind": found.kind, "fingerprint": found.fingerprint}
    if found.path is None or found.kind == "factory":
        return record
    record["path"] = str(found.path)
    files = [found.path] if found.path.is_file() else sorted(p for p in found.path.rglob("*") if p.is_file())
    record["megabytes"] = round(sum(p.stat().st_size for p in files) / 1e6, 3)
    classes = {}
    for path in files:
        if path.name in ("model_index.json", "config.json", "scheduler_config.json"):
            config = json.loads(path.read_text())
            name = config.get("_class_name") or ", ".join(config.get("architectures") or [])
            if name:
                classes[str(path.relative_to(found.path))] = name
    if classes:
        record["classes"] = classes
    weights = [p for p in files if p.suffix == ".safetensors"]
    if weights:
        record["parameters"] = sum(map(_parameters, weights))
    return record


def _parameters(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
