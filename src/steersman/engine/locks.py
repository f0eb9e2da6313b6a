"""A file that one process holds at a time, on every system."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from steersman.errors import InputError


def take(file: IO[str]) -> bool:
    """Take an open file until it is closed or the process ends; False where another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``<folder>.partial.lock``, which lies beside the folder, so that ``folder`` and ``<folder>.partial`` may be
    removed, made and renamed.

    Raises:
        InputError: another process holds it.
    """
    path = folder.with_name(f"{folder.name}.partial.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not (take(file) and _is_at(file, path)):
            raise InputError("out", str(folder), "a folder that no other run is using")
        try:
            yield
        finally:
            if sys.platform != "win32":
                path.unlink(missing_ok=True)
    if sys.platform == "win32":  # which removes no file that any process has open
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at ``path``: who held it may have removed it since, and another process may
    hold a new one."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
