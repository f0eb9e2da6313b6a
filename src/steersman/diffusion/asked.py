"""What a pipeline is asked for, in files: prompts, or labels."""

from __future__ import annotations

import csv
import inspect
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steersman.errors import InputError

SUFFIXES = (".txt", ".csv", ".jsonl")
"""Of files that are lists of prompts or labels and nothing else."""


class Asked(NamedTuple):
    """Prompts, labels, or both where lines of a text file are whole numbers."""

    prompts: list[str] | None
    labels: list[int] | None


def read_asked(file: str | Path, parameter: str = "input") -> Asked:
    """What a file asks for.

    Args:
        file: .txt, one a line; .csv or .jsonl, in the column ``prompt`` or ``label``; .npz, in ``captions`` or
            ``labels``.
        parameter: how the user calls the file.

    Raises:
        InputError: it can't be read, or asks for nothing.
    """
    path = Path(file).expanduser()
    kind = path.suffix.lower()
    prompts: list[str] | None = None
    labels: list[int] | None = None
    reason = "it has none"
    try:
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                prompts = [str(text) for text in arrays["captions"]] if "captions" in arrays else None
                labels = [int(label) for label in arrays["labels"]] if "labels" in arrays else None
        elif kind in (".csv", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            rows: list[dict[str, Any]] = (
                list(csv.DictReader(text.splitlines()))
                if kind == ".csv"
                else [json.loads(line) for line in text.splitlines() if line.strip()]
            )
            if rows and all("prompt" in row for row in rows):
                prompts = [str(row["prompt"]) for row in rows]
            elif rows and all("label" in row for row in rows):
                labels = [int(row["label"]) for row in rows]
            else:
                reason = "not in every row"
        else:
            prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            labels = [int(line) for line in prompts] if prompts and all(line.isdecimal() for line in prompts) else None
    except (OSError, ValueError, TypeError, KeyError, csv.Error, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:150]
        prompts = labels = None
    if not prompts and not labels:
        allowed = "a file that can be read, with at least one prompt or label: .txt (one a line), .csv, .jsonl or .npz"
        raise InputError(parameter, str(file), f"{allowed} ({reason})")
    return Asked(prompts or None, labels or None)


def read_prompts(file: str | Path, parameter: str = "prompts") -> list[str]:
    """The prompts of a file, see :func:`read_asked`.

    Raises:
        InputError: it can't be read, or has none.
    """
    found = read_asked(file, parameter).prompts
    if found is None:
        raise InputError(parameter, str(file), "a file with at least one prompt")
    return found


def asked_of(pipe: Any, file: str | Path | None, parameter: str = "input") -> list[str] | list[int]:
    """What a pipeline is asked for: prompts or labels of a file, as it takes them; without a file, each of its classes.

    Raises:
        InputError: a pipeline that takes neither, or whose kind the file doesn't have; no file where one is needed.
    """
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    config: Any = getattr(network, "config", {})
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if takes_prompts(pipe):
        found = None if file is None else read_asked(file, parameter).prompts
        if found is None:
            given = None if file is None else str(file)
            raise InputError(parameter, given, "prompts for this pipeline: a .txt, one a line, .csv, .jsonl or .npz")
        return found
    if not classes:
        raise InputError("subject", type(pipe).__name__, "a pipeline with prompts or labels: others have no guidance")
    count = classes - (getattr(pipe, "config", {}).get("null_label") is not None)
    if file is None:
        return list(range(count))
    labels = read_asked(file, parameter).labels
    if labels is None:
        raise InputError(
            parameter, str(file), "class numbers for this pipeline: a .txt, one a line, .csv, .jsonl or .npz"
        )
    wrong = [label for label in labels if not 0 <= label < count]
    if wrong:
        raise InputError(parameter, f"label {wrong[0]} in {file}", f"labels from 0 to {count - 1}")
    return labels


def takes_prompts(pipe: Any) -> bool:
    """Whether a pipeline is called with prompts."""
    return "prompt" in inspect.signature(type(pipe).__call__).parameters
