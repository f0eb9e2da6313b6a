"""Subjects (what is worked on) and callables (rewards, judges, scorers), one syntax everywhere.

A subject is a reference name (``digits``, ``docs/small``, ``gaussians:ring-sharp``), a local folder or
file, ``file.py:factory``, ``openai:model``, or a hub id (``owner/name``). A reference name wins over a
folder of that name, which is ``./digits``. A callable is ``file.py:name``.
Naming a file is the only way that a user's code gets loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steersman.callables import CODE, file_hash, load_callable
from steersman.errors import InputError, nearest

__all__ = [
    "CODE",
    "Subject",
    "file_hash",
    "load_callable",
    "resolve",
    "scorer",
    "tree_hash",
    "write_images",
    "write_input",
]

Kind = Literal["reference", "path", "factory", "endpoint", "hub"]
HUB = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


@dataclass(frozen=True)
class Subject:
    """A subject, told apart by kind but not loaded.

    Args:
        spec: the text that the user wrote.
        kind: reference, path, factory (``file.py:name``), endpoint (``openai:model``) or hub.
        path: the folder or file, where there is one.
        fingerprint: changes when the content does; part of every row's key.
    """

    spec: str
    kind: Kind
    path: Path | None
    fingerprint: str


def resolve(spec: str) -> Subject:
    """What ``spec`` names.

    Raises:
        InputError: it names nothing that exists; the sentence lists what can be named.
    """
    from steersman.reference import loading

    if not isinstance(spec, str) or not spec.strip():
        raise InputError("subject", spec, "a reference name, a path, a hub id, file.py:factory or openai:model")
    name = spec.partition(":")[0]
    if name.partition("/")[0] in loading.names():
        try:
            path: Path | None = loading.path(name)
        except InputError as error:
            raise InputError("subject", spec, error.allowed) from None
        return Subject(spec, "reference", path, loading.fingerprint(name if path else spec))
    code = CODE.match(spec)
    if code:
        path = Path(code["file"])
        if not path.is_file():
            raise InputError("subject", spec, f"file.py:factory with a file that exists (no file {path})")
        return Subject(spec, "factory", path, file_hash(path))
    path = Path(spec).expanduser()
    if path.exists():
        return Subject(spec, "path", path, tree_hash(path))
    if spec.startswith("openai:") and len(spec) > len("openai:"):
        return Subject(spec, "endpoint", None, spec)
    if HUB.match(spec) and not spec.startswith(("./", "../")):
        return Subject(spec, "hub", None, spec)
    raise InputError(
        "subject",
        spec,
        f"a path that exists, a hub id (owner/name), file.py:factory, openai:model or a reference name, "
        f"{nearest(name, loading.names())}",
    )


def write_images(subject: Subject, folder: Path) -> Path | None:
    """The training images of a reference subject that has any, as ``images.npz`` in ``folder``: images (n, H, W, C)
    in [0, 1], and their labels or captions."""
    from steersman.reference import loading

    name = subject.spec.partition(":")[0].partition("/")[0]
    if subject.kind == "reference" and name == "photographs":
        from steersman.reference import photographs

        return photographs.write_pairs(subject.spec, folder)
    if subject.kind != "reference" or name in loading.ANALYTIC:
        return None
    module = importlib.import_module(f"steersman.reference.{name}")
    images = getattr(module, "images", None)
    if images is None:
        return None
    import numpy as np

    found = images("train")
    pixels, labels = found if isinstance(found, tuple) else (found, None)
    arrays = {"images": ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    if hasattr(module, "captions"):
        arrays["captions"] = np.array(module.captions("train"))
    file = folder / "images.npz"
    np.savez(file, **arrays)
    return file


TEXTS = 4000  # labelled texts that a reference subject brings


def write_input(
    subject: Subject, folder: Path, attribute: str | None = None, split: Literal["train", "heldout"] = "train"
) -> Path | None:
    """What a reference subject brings for methods to work with: its images, or texts as ``texts.jsonl`` (a line has
    ``text`` and, for ``reviews``, its topic, sentiment, rudeness and length).

    With an attribute (``column=value``), each value of that column has as many texts: some are rare. What is probed
    gets the held-out texts: those that its models were not trained on.
    """
    name = subject.spec.partition(":")[0].partition("/")[0]
    if subject.kind != "reference" or name not in ("docs", "reviews"):
        return write_images(subject, folder)
    if name == "docs":
        from steersman.reference import docs

        records = [{"text": document.text} for document in docs.documents(split)]
    else:
        from steersman.reference import reviews

        column = (attribute or "").partition("=")[0]
        values = reviews.VALUES.get(column, ())
        each = [reviews.texts(split, TEXTS // len(values), 0, **{column: value}) for value in values]
        found = [review for row in zip(*each, strict=True) for review in row] or reviews.texts(split, TEXTS)
        records = [vars(review) for review in found]
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def scorer(subject: Subject, attribute: str | None) -> Callable[[Sequence[str]], list[float]] | None:
    """How a reference subject judges finished texts: 1 for those with the attribute (``column=value``), else 0.

    None where it can't: another subject, or no attribute.

    Raises:
        InputError: an attribute that the subject's texts don't have.
    """
    if subject.kind != "reference" or subject.spec.partition("/")[0] != "reviews" or attribute is None:
        return None
    from steersman.reference import reviews

    name, _, value = attribute.partition("=")
    if name not in reviews.VALUES:
        raise InputError("attribute", attribute, f"column=value, the column {nearest(name, reviews.VALUES)}")
    if value not in reviews.VALUES[name]:
        raise InputError("attribute", attribute, f"{name}= {nearest(value, reviews.VALUES[name])}")

    def score(texts: Sequence[str]) -> list[float]:
        return [float(getattr(reviews.attributes(text), name) == value) for text in texts]

    return score


def path_of(text: str) -> Path:
    """A path that a setting names: ``text`` itself where that exists, else the folder of the reference model of that
    name, as a second model of a method."""
    from steersman.reference import loading

    path = Path(text).expanduser()
    folder = None
    if not path.exists() and text.partition("/")[0] in loading.names() and ":" not in text:
        folder = loading.path(text)
    return path if folder is None else folder


def tree_hash(path: Path) -> str:
    """A fingerprint of a file or folder: names and contents, large files by size and both ends.

    A model folder may hold many gigabytes; its weights are told apart by their length and by the first
    and last megabyte, everything else by its whole content.
    """
    if path.is_file():
        return file_hash(path)
    end = 1 << 20
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= 8 * end:
                digest.update(stream.read())
            else:
                digest.update(stream.read(end))
                stream.seek(-end, 2)
                digest.update(stream.read(end))
    return digest.hexdigest()
