"""Reference subjects: small models that the project trained itself, found in ``steersman_reference``.

Each subject is a folder of that package with a ``provenance.json``:

    {"subject": "digits",
     "default": "pipeline",                 # the folder that the bare name stands for ("" = the subject's own)
     "files": {"pipeline/unet/config.json": "<sha256>", ...},
     ...}                                   # script and data hashes, seeds, versions, training facts

``digits`` names the default, ``digits/classifier-a`` a folder inside. ``gaussians`` and ``leaf-spine`` are
analytic, ``photographs`` come with scikit-learn: they have no folder, and don't need the package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from steersman.errors import InputError, MissingExtra, nearest

ANALYTIC = ("gaussians", "leaf-spine", "photographs")
# What the package brings, so that its absence can be told from a wrong name.
SHIPPED = ("digits", "docs", "reviews", "scenes")


@cache
def _root() -> Path | None:
    spec = importlib.util.find_spec("steersman_reference")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def names() -> list[str]:
    """Names of all reference subjects, installed or not."""
    root = _root()
    found = [p.parent.name for p in root.glob("*/provenance.json")] if root else []
    return sorted({*ANALYTIC, *SHIPPED, *found})


def folder(name: str) -> Path:
    """The folder of a shipped subject, with its ``provenance.json``.

    Raises:
        InputError: no such subject, or one that is analytic.
        MissingExtra: the package ``steersman-reference`` is not installed.
    """
    if name not in names():
        raise InputError("subject", name, nearest(name, names()))
    if name in ANALYTIC:
        raise InputError("subject", name, "a subject that is shipped as files (this one is analytic)")
    root = _root()
    if root is None or not (root / name).is_dir():
        raise MissingExtra(f"the reference subject {name!r}", "reference")
    return root / name


def path(name: str) -> Path | None:
    """The model folder that ``name`` (``digits``, ``docs/small``) stands for; None if it is analytic.

    Raises:
        InputError: no such subject or folder.
        MissingExtra: the package ``steersman-reference`` is not installed.
    """
    subject, _, inside = name.partition("/")
    if subject in ANALYTIC:
        if inside:
            raise InputError("subject", name, subject)
        return None
    root = folder(subject)
    inside = inside or provenance(subject).get("default", "")
    found = root / inside
    choices = sorted(f"{subject}/{p.name}" for p in root.iterdir() if p.is_dir() and p.name != "__pycache__")
    if not found.is_dir() or ".." in Path(inside).parts:
        raise InputError("subject", name, nearest(name, choices))
    return found


def provenance(name: str) -> dict[str, Any]:
    """Where a shipped subject comes from: the content of its ``provenance.json``."""
    return json.loads((folder(name) / "provenance.json").read_text(encoding="utf-8"))


def fingerprint(name: str) -> str:
    """Changes when the subject does: over the recorded hashes of its files, or an analytic one's numbers."""
    if name.partition(":")[0] == "leaf-spine":  # a fabric in numbers, all of them in its text
        return hashlib.sha256(name.encode()).hexdigest()
    if name.partition(":")[0] == "photographs":
        from steersman.reference import photographs

        return photographs.fingerprint()
    if name.partition(":")[0] in ANALYTIC:
        from steersman.reference import gaussians

        return gaussians.fingerprint()
    files = provenance(name.partition("/")[0])["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def verify(name: str) -> None:
    """Compares every file of a shipped subject with its recorded SHA-256.

    Raises:
        InputError: a file is missing, or differs.
    """
    root = folder(name)
    for file, expected in provenance(name)["files"].items():
        if not (root / file).is_file():
            raise InputError("subject", f"{name}/{file}", "a file that is there (install steersman-reference again)")
        with (root / file).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            raise InputError("subject", f"{name}/{file}", f"the file with SHA-256 {expected} (it has {found})")
