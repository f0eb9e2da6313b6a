"""Files of prompts: one a line, or, as GenEval's metadata, a .jsonl of ``{"prompt": text, ...}`` lines."""

from __future__ import annotations

import json
from pathlib import Path

from steersman.errors import InputError

SUFFIXES = (".txt", ".jsonl")


def read_prompts(source: str | Path, name: str = "prompts") -> list[str]:
    """The prompts of a file, without empty lines.

    Args:
        source: where.
        name: of the parameter, for the sentence.

    Raises:
        InputError: a file that can't be read, or without prompts.
    """
    path, told = Path(source).expanduser(), str(source)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(name, told, f"a text file that can be read ({error})") from None
    prompts = [line for line in lines if line]
    if path.suffix.lower() == ".jsonl":
        try:
            prompts = [str(json.loads(line)["prompt"]) for line in prompts]
        except (ValueError, KeyError, TypeError):
            raise InputError(name, told, 'a .jsonl file of {"prompt": text} lines') from None
    if not prompts:
        raise InputError(name, told, "a text file with at least one prompt")
    return prompts
