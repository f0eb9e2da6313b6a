"""Callables that a user's text names (rewards, judges, scorers): ``file.py:name``.

Naming a file is the only way that a user's code gets loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steersman.errors import InputError, nearest

CODE = re.compile(r"^(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)$")


def load_callable(spec: str, parameter: str = "callable") -> Callable[..., Any]:
    """The function or class that ``file.py:name`` names; its file is run as a module.

    Raises:
        InputError: not of that form, no such file or name, not callable, or the file fails to import.
    """
    code = CODE.match(spec) if isinstance(spec, str) else None
    if not code:
        raise InputError(parameter, spec, "file.py:name")
    path = Path(code["file"]).expanduser()
    if not path.is_file():
        raise InputError(parameter, spec, f"file.py:name with a file that exists (no file {path})")
    unique = f"steersman_user_{path.stem}_{file_hash(path)[:12]}"
    module = sys.modules.get(unique)
    if module is None:
        found = importlib.util.spec_from_file_location(unique, path.resolve())
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[unique] = module
        try:
            found.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[unique]
            if isinstance(error, KeyboardInterrupt):
                raise
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(parameter, spec, f"a file that imports ({line})") from error
    if not hasattr(module, code["name"]):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(parameter, spec, f"a name that {path.name} defines, {nearest(code['name'], names)}")
    value = getattr(module, code["name"])
    if not callable(value):
        raise InputError(parameter, spec, f"callable ({code['name']} is a {type(value).__name__})")
    return value


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
