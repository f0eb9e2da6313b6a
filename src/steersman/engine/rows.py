"""The run folder: rows appended one by one, each flushed and synced before the next trial starts.

    config.json      what was asked for
    results.jsonl    one row a line; the last row of a key counts
    items/<key>/     what a trial saved (images, texts, arrays)
    errors/<key>.txt the traceback behind a failed row
    fits/            trained things that rows share

A kill at any moment loses at most the row in progress: a torn last line is dropped when the folder is
opened again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from steersman.engine.bench import Row
from steersman.engine.fits import Fits
from steersman.engine.locks import take
from steersman.errors import InputError, OutputError

RESULTS, CONFIG, LOCK = "results.jsonl", "config.json", ".lock"


class RunFolder:
    """A run folder opened for writing; only one process holds it at a time.

    Args:
        out: the folder; made when it doesn't exist.
        config: what was asked for; written to ``config.json``.
        resume: go on with a folder that holds rows already.

    Raises:
        InputError: ``out`` is in use, not empty without ``resume``, or holds another run.
        OutputError: it can't be written.
    """

    def __init__(self, out: Path, config: Mapping[str, Any], resume: bool) -> None:
        self.out = Path(out)
        with writing(self.out):
            if self.out.exists() and not self.out.is_dir():
                raise InputError("out", str(out), "a folder (this is a file)")
            used = self.out.is_dir() and any(p.name not in (LOCK, f"{CONFIG}.partial") for p in self.out.iterdir())
            if used and not resume:
                raise InputError("out", str(out), "a new or empty folder (to go on with this one, add --resume)")
            if used and not (self.out / CONFIG).is_file():
                raise InputError("out", str(out), "a run folder (this one holds no config.json)")
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock: IO[str] = (self.out / LOCK).open("w")
            if not take(self.lock):
                raise InputError("out", str(out), "a folder that no other run is using")
            if used:
                self._same_run(config)
            self._write(CONFIG, config)
            for name in ("items", "errors", "fits"):
                (self.out / name).mkdir(exist_ok=True)
            for torn in [*(self.out / "items").glob("*.partial"), *(self.out / "fits").glob("*.partial")]:
                shutil.rmtree(torn, ignore_errors=True)
            self.rows = {row.key: row for row in read_rows(self.out)}
            self._drop_torn_line()
            self.file: IO[bytes] = (self.out / RESULTS).open("ab")
        self.fits = Fits(self.out / "fits", f"{config['bench']}\x1f{config['fingerprint']}")

    def append(self, row: Row) -> None:
        """Write ``row`` so that it survives a crash of the machine.

        Raises:
            OutputError: the disk is full or can't be written; the rows before are whole.
        """
        line = (json.dumps(plain(asdict(row)), sort_keys=True) + "\n").encode()
        size = os.fstat(self.file.fileno()).st_size
        with writing(self.out):
            try:
                self.file.write(line)
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError:
                os.ftruncate(self.file.fileno(), size)
                raise
        self.rows[row.key] = row

    def log(self, key: str, report: Any) -> Log:
        """The log of one trial; its items appear whole or not at all."""
        return Log(self, key, report)

    def close(self) -> None:
        """Let go of the folder."""
        self.file.close()
        self.lock.close()

    def _same_run(self, config: Mapping[str, Any]) -> None:
        old = json.loads((self.out / CONFIG).read_text())
        for name in ("bench", "subject", "fingerprint"):
            if old.get(name) != config[name]:
                raise InputError("resume", config[name], f"the {name} of the run in {self.out} ({old.get(name)!r})")

    def _drop_torn_line(self) -> None:
        path = self.out / RESULTS
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole != len(content):
                os.truncate(path, whole)

    def _write(self, name: str, value: Any) -> None:
        partial = self.out / f"{name}.partial"
        partial.write_text(json.dumps(plain(value), indent=1, sort_keys=True) + "\n")
        partial.replace(self.out / name)


class Log:
    """What one trial tells the engine beside its figures (see ``TrialLog``)."""

    def __init__(self, folder: RunFolder, key: str, report: Any) -> None:
        self.folder, self.key, self.report = folder, key, report
        self.fits = folder.fits
        self.values: dict[str, list[float]] = {}
        self.partial = folder.out / "items" / f"{key}.partial"

    def progress(self, done: float, total: float, text: str = "") -> None:
        """How far the trial is."""
        self.report.trial(done, total, text)

    def per_item(self, figure: str, values: Sequence[float]) -> None:
        """One value per item (prompt, image, ...) behind a figure; kept in the row."""
        self.values[figure] = [float(v) for v in values]

    def images(self, name: str, images: np.ndarray) -> None:
        """Images in [0, 1], shape (n, height, width) or (n, height, width, channels); kept as 8 bit."""
        array = np.asarray(images, dtype=np.float64)
        if array.ndim not in (3, 4):
            raise ValueError(f"images {name!r} need shape (n, h, w) or (n, h, w, c), not {array.shape}")
        self.arrays(name, images=np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8))

    def arrays(self, name: str, **arrays: np.ndarray) -> None:
        """Arrays kept as ``<name>.npz``."""
        with writing(self.folder.out):
            self.partial.mkdir(exist_ok=True)
            np.savez_compressed(self.partial / f"{name}.npz", **arrays)  # type: ignore[arg-type]

    def texts(self, name: str, texts: Sequence[Mapping[str, Any]]) -> None:
        """Records kept as ``<name>.json``."""
        with writing(self.folder.out):
            self.partial.mkdir(exist_ok=True)
            (self.partial / f"{name}.json").write_text(json.dumps(plain(list(texts))))

    def finish(self, keep: bool) -> str | None:
        """Give the items their name (or throw them away); the path relative to the run folder."""
        if not self.partial.is_dir():
            return None
        final = self.folder.out / "items" / self.key
        shutil.rmtree(final if keep else self.partial, ignore_errors=True)
        if not keep:
            return None
        with writing(self.folder.out):
            self.partial.rename(final)
        return f"items/{self.key}"


def read_rows(out: Path) -> list[Row]:
    """The rows in a run folder, the last of each key, in the order in which keys first appeared.

    Raises:
        InputError: a line other than a torn last one is not a row.
    """
    path = Path(out) / RESULTS
    rows: dict[str, Row] = {}
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            row = Row(**_unplain(record))
        except (ValueError, TypeError) as error:
            raise InputError("results.jsonl", str(path), f"rows only (line {number}: {error})") from None
        rows[row.key] = row
    return list(rows.values())


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one sentence.

    Raises:
        OutputError: no space, no permission, a read-only or broken disk.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(str(error.filename or out), error.strerror or str(error)) from error


def plain(value: Any) -> Any:
    """JSON without NaN or infinities (they become text, so that strict readers can read them)."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.floating, float)):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Path):
        return str(value)
    return value


def _unplain(record: dict[str, Any]) -> dict[str, Any]:
    record["figures"] = {k: float(v) for k, v in record["figures"].items()}
    record["per_item"] = {k: [float(v) for v in vs] for k, vs in record["per_item"].items()}
    return record
