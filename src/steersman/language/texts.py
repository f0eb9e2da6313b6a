"""Texts that users bring, as rows; and what a tokenizer puts in front of a text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steersman.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".tsv")


def read_rows(path: str | Path, parameter: str = "input") -> list[dict[str, Any]]:
    """Rows of named columns from a file: an object a line (.jsonl), or a table with a header (.csv, .tsv).

    Args:
        path: the file. Empty lines are left out.
        parameter: what the sentence names.

    Raises:
        InputError: a file that can't be read, of another form, or without rows; the sentence names the line.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(parameter, str(path), f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(parameter, str(path), f"a text file that can be read ({error})") from None
    rows: list[dict[str, Any]] = []
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(parameter, str(path), f"a file of JSON lines (line {number}: {error})") from None
            if not isinstance(row, dict):
                raise InputError(parameter, str(path), f"a file of JSON objects (line {number} is none)")
            rows.append(row)
    else:
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        try:
            table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            rows = [{name: value for name, value in row.items() if name is not None} for row in table]
        except csv.Error as error:
            raise InputError(parameter, str(path), f"a table that can be read ({error})") from None
    if not rows:
        raise InputError(parameter, str(path), "a file with at least one row")
    return rows


def texts_of(rows: Sequence[dict[str, Any]], column: str, path: str | Path, parameter: str = "input") -> list[str]:
    """The text of every row in ``column``.

    Raises:
        InputError: a row without it; the sentence names the row.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise InputError(parameter, str(path), f"rows that all have a text {column!r} (row {number} has none)")
    return [row[column] for row in rows]


def opening_of(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text: often a beginning-of-sequence token, or nothing."""
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    text = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    for cut in range(len(whole) - len(text) + 1):
        if whole[cut : cut + len(text)] == text:
            return whole[:cut]
    return []
