"""The one loop that runs every comparison.

For each setting of the grid and each seed, every contender gets a fresh host and the same random
streams; contenders are interleaved (and their order rotates with the seed), so that a machine that slows
down slows all of them. Each row is synced to disk before the next trial starts; a trial that goes wrong
makes a failed row and the others go on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from steersman import __version__, catalog
from steersman.engine import contenders as syntax
from steersman.engine import subjects
from steersman.engine.bench import Bench, Knob, Row
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import Contender
from steersman.engine.rows import RunFolder, writing
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError, OutputError, nearest

PACKAGES = ("torch", "numpy", "scipy", "diffusers", "transformers", "peft", "accelerate")


class Progress(Protocol):
    """Who watches a comparison run (the terminal, or nobody)."""

    def start(self, total: int, done: int, out: Path) -> None: ...
    def row(self, contender: str, setting: Mapping[str, Any], seed: int) -> None: ...
    def trial(self, done: float, total: float, text: str) -> None: ...
    def finished(self, row: Row) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Nobody watches."""

    def start(self, total: int, done: int, out: Path) -> None: ...
    def row(self, contender: str, setting: Mapping[str, Any], seed: int) -> None: ...
    def trial(self, done: float, total: float, text: str) -> None: ...
    def finished(self, row: Row) -> None: ...
    def stop(self) -> None: ...


def compare(
    bench: str | Bench[Any, Any],
    subject: str | None = None,
    contenders: str | Iterable[str | Contender] | None = None,
    grid: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 5,
    out: str | Path | None = None,
    resume: bool = False,
    *,
    progress: Progress | None = None,
    command: str | None = None,
) -> Comparison:
    """Put contenders side by side on a subject.

    Args:
        bench: a bench or its id ("sampling").
        subject: what is worked on (see :mod:`steersman.engine.subjects`); None is the reference subject.
        contenders: ``"a,b:knob=v+c"`` or a list; None is the bench's baselines.
        grid: knob -> value or list of values; knobs that are left out take their defaults.
        seeds: how many seeds (0, 1, ...), or the seeds.
        out: the run folder, new or empty unless ``resume``; None makes a temporary one.
        resume: go on with the run in ``out``; rows that failed run again.
        progress: who watches.
        command: how to reproduce it, for the record.

    Returns:
        Comparison: all rows of the run, also those that were there before.

    Raises:
        InputError: a bad argument; nothing has been computed then.
        OutputError: the disk can't be written; rows so far are whole.
        KeyboardInterrupt: interrupted; rows so far are whole and ``resume`` goes on.
    """
    bench = catalog.bench(bench) if isinstance(bench, str) else bench
    spec = subject if subject is not None else bench.default_subject
    found = subjects.resolve(spec)
    stacks = _contenders(bench, contenders)
    settings, varying = expand(bench.knobs, grid or {})
    numbers = _seeds(seeds)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix=f"steersman-{bench.id}-"))
    config = {
        "bench": bench.id,
        "subject": spec,
        "fingerprint": found.fingerprint,
        "contenders": [c.label for c in stacks],
        "parts": {c.label: c.to_json() for c in stacks},
        "grid": varying,
        "fixed": {k: v for k, v in settings[0].items() if k not in varying},
        "seeds": numbers,
        "versions": versions(),
        "machine": machine(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }
    if not resume and folder.is_dir() and any(folder.iterdir()):
        # Said before the subject is loaded, which may take long; the folder itself says it again.
        raise InputError("out", str(folder), "a new or empty folder (to go on with this one, add --resume)")
    loaded = bench.subject(spec)
    for setting in settings:
        bench.check(loaded, setting)
    _mountable(bench, loaded, stacks, settings[0], numbers[0])

    run = RunFolder(folder, config, resume)
    progress = progress or Silent()
    jobs = [
        (setting, seed, stack)
        for setting in settings
        for turn, seed in enumerate(numbers)
        for stack in _rotate(stacks, turn)
    ]
    keys = [row_key(bench.id, found.fingerprint, stack, setting, seed) for setting, seed, stack in jobs]
    kept = {key for key in keys if key in run.rows and run.rows[key].status != "failed"}
    try:
        progress.start(len(jobs), len(kept), folder)
        for key, (setting, seed, stack) in zip(keys, jobs, strict=True):
            if key not in kept:
                progress.row(stack.label, setting, seed)
                row = _trial(run, key, bench, loaded, stack, setting, seed, progress)
                run.append(row)
                progress.finished(row)
        return Comparison(bench, list(run.rows.values()), _union(config, run), folder)
    finally:
        progress.stop()
        run.close()


def _trial(
    run: RunFolder,
    key: str,
    bench: Bench[Any, Any],
    subject: Any,
    stack: Contender,
    setting: Mapping[str, Any],
    seed: int,
    progress: Progress,
) -> Row:
    log = run.log(key, progress)
    row = Row(
        key=key,
        bench=bench.id,
        contender=stack.label,
        parts=stack.to_json(),
        setting=dict(setting),
        seed=seed,
        status="ok",
        figures={},
        timing={},
    )
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        streams = Streams(seed)
        host = bench.host(subject, setting, streams)
        for part in stack.parts:
            bench.mount(host, part)
        figures = bench.trial(host, setting, streams, log)
        unknown = set(figures) - set(bench.figures)
        if unknown:
            raise ValueError(f"bench {bench.id} reported figures that it doesn't declare: {sorted(unknown)}")
        # In the bench's own order: what counts first, what it costs last.
        row.figures = {name: float(figures[name]) for name in bench.figures if name in figures}
    except Inapplicable as reason:
        row.status, row.error = "inapplicable", str(reason)
    except OutputError:
        log.finish(keep=False)
        raise
    except Exception as error:
        row.status = "failed"
        row.error = str(error).strip() if isinstance(error, (InputError,)) else _sentence(error)
        with writing(run.out):
            (run.out / "errors" / f"{key}.txt").write_text(traceback.format_exc())
    except BaseException:
        log.finish(keep=False)
        raise
    row.timing = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    row.per_item = log.values
    row.items = log.finish(keep=row.status == "ok")
    return row


def expand(knobs: Mapping[str, Knob], grid: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """All settings of a grid (every knob has a value in each), and the knobs that sweep with their values.

    Raises:
        InputError: an unknown knob, a bad value, an empty or repeated list.
    """
    for name in grid:
        if name not in knobs:
            raise InputError("knob", name, nearest(name, knobs))
    columns: dict[str, list[Any]] = {}
    for name, knob in knobs.items():
        value = grid.get(name, knob.default)
        many = isinstance(value, (list, tuple))
        if not knob.sweep and many:
            raise InputError(name, value, f"one value, {knob.allowed}")
        items = list(value) if many else [value]
        if not items:
            raise InputError(name, value, f"at least one value, {knob.allowed}")
        # A default of None means "not set"; it has no type to be checked against.
        parsed = [None if v is None and knob.default is None else knob.parse(name, v) for v in items]
        if len(set(map(str, parsed))) != len(parsed):
            raise InputError(name, value, "values that all differ")
        columns[name] = parsed
    settings = [dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())]
    return settings, {name: values for name, values in columns.items() if knobs[name].sweep}


def row_key(bench: str, fingerprint: str, stack: Contender, setting: Mapping[str, Any], seed: int) -> str:
    """The identity of a row: everything that its figures depend on, contents of named files included."""
    record = {
        "bench": bench,
        "subject": fingerprint,
        "parts": stack.to_json(),
        "setting": dict(setting),
        "seed": seed,
    }
    named = [v for v in setting.values()]
    for part in stack.parts:
        named += [part.id, *part.knobs.values()]
    record["files"] = sorted(filter(None, map(_content, named)))
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:20]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"steersman": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine, in words."""
    import os

    import torch

    record: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
    return record


def _contenders(bench: Bench[Any, Any], asked: Any) -> list[Contender]:
    if asked is None:
        asked = list(bench.baselines())
    if isinstance(asked, str):
        stacks = syntax.parse_list(asked)
    else:
        texts = [c.label if isinstance(c, Contender) else c for c in asked]
        stacks = syntax.parse_list(texts)
    known = set(bench.parts()) | {c.id for c in catalog.cards().values() if bench.id in c.benches}
    accepts = getattr(bench, "accepts", lambda name: None)
    for stack in stacks:
        for part in stack.parts:
            if part.id in known or (Path(part.id) / "artefact.json").is_file() or accepts(part.id) is not None:
                continue
            if part.id in catalog.cards():
                homes = ", ".join(catalog.cards()[part.id].benches) or "no bench"
                raise InputError("methods", part.id, f"a method of the bench {bench.id} (it runs in: {homes})")
            raise InputError("methods", part.id, nearest(part.id, known))
    return stacks


def _mountable(
    bench: Bench[Any, Any], subject: Any, stacks: Sequence[Contender], setting: Mapping[str, Any], seed: int
) -> None:
    """Mount every contender once, so that a stack that can't work is refused before anything runs."""
    for stack in stacks:
        host = bench.host(subject, setting, Streams(seed))
        try:
            for part in stack.parts:
                bench.mount(host, part)
        except Inapplicable:
            continue  # not at this setting; the row will say why


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, bool) or (isinstance(seeds, int) and not 1 <= seeds <= 10_000):
        raise InputError("seeds", seeds, "a whole number from 1 to 10000")
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) != len(numbers):
        raise InputError("seeds", seeds, "at least one seed, each once")
    for number in numbers:
        Streams(number)
    return numbers


def _union(config: Mapping[str, Any], run: RunFolder) -> dict[str, Any]:
    """The configuration with the contenders of earlier runs in the same folder behind those asked for now."""
    labels = list(config["contenders"])
    parts = dict(config["parts"])
    for row in run.rows.values():
        if row.contender not in parts:
            labels.append(row.contender)
            parts[row.contender] = row.parts
    return {**config, "contenders": labels, "parts": parts}


def _rotate(stacks: Sequence[Contender], turn: int) -> list[Contender]:
    shift = turn % len(stacks)
    return [*stacks[shift:], *stacks[:shift]]


def _content(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    code = subjects.CODE.match(value)
    path = Path(code["file"] if code else value).expanduser()
    try:
        if path.is_file():
            return subjects.file_hash(path)
        record = path / "artefact.json"
        return subjects.file_hash(record) if record.is_file() else None
    except OSError:
        return None


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
