"""Pairs (x0, y) to search: from a user's file, or cut from text with targets of three classes.

    true-next    the token that truly follows x0 in the text
    top-75       a uniform one of the model's 75 most probable next tokens
    uniform      the token at a uniform rank of the model's next tokens

Special tokens and rows of the embedding without a token are no targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.errors import InputError
from steersman.language.magic_word.finding import Pair
from steersman.language.magic_word.system import State, System, whole
from steersman.language.texts import read_rows

KINDS = ("true-next", "top-75", "uniform")
TOP = 75


def pairs_from_text(
    system: System,
    text: str | Sequence[Sequence[int]],
    states: int = 20,
    shortest: int = 8,
    longest: int = 32,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
) -> list[Pair]:
    """``states`` states of ``shortest`` to ``longest`` tokens, each with one target of every class.

    Args:
        system: the model and its tokenizer.
        text: a corpus, cut at random places that don't overlap; or passages as token ids, each at least one token
            longer than ``longest``, of which the first tokens are taken.
        states: how many.
        shortest, longest: tokens of a state, uniform between them.
        kinds: classes of targets.
        seed: of places, lengths and targets.

    Raises:
        InputError: a number out of range, an unknown class, or too little text.
    """
    whole("states", states, 1)
    whole("shortest", shortest, 1)
    whole("longest", longest, shortest)
    whole("seed", seed, 0)
    for kind in kinds:
        if kind not in KINDS:
            raise InputError("kinds", kind, f"one of {', '.join(KINDS)}")
    draw = np.random.default_rng([seed, 0x6D61676963])
    size = longest + 1
    if isinstance(text, str):
        passages: list[Sequence[int]] = _cut(system, text, states, size, draw)
    else:
        passages = list(text)[:states]
        short = [len(p) for p in passages if len(p) < size]
        if len(passages) < states or short:
            value = f"{len(passages)} passages" + (f", one of {min(short)} tokens" if short else "")
            raise InputError("text", value, f"{states} passages of at least {size} tokens")
    targets = torch.arange(system.rows if system.tokenizer is None else len(system.tokenizer))
    unwanted = torch.tensor(sorted(system.special | system.blacklist), dtype=torch.long)
    targets = targets[~torch.isin(targets, unwanted)]
    found: list[Pair] = []
    for passage in passages:
        x0 = tuple(passage[: int(draw.integers(shortest, longest + 1))])
        by_rank = targets[State(system, x0).next_token().cpu()[targets].argsort(descending=True, stable=True)]
        # Drawn whether wanted or not: the targets of a class don't depend on which others are asked for.
        drawn = {
            "true-next": passage[len(x0)],
            "top-75": int(by_rank[int(draw.integers(min(TOP, len(by_rank))))]),
            "uniform": int(by_rank[int(draw.integers(len(by_rank)))]),
        }
        if drawn["true-next"] in system.special | system.blacklist:
            drawn.pop("true-next")
        found += [Pair(x0, (drawn[kind],), kind) for kind in kinds if kind in drawn]
    return found


def _cut(system: System, text: str, states: int, size: int, draw: np.random.Generator) -> list[Sequence[int]]:
    """``states`` passages of ``size`` tokens that don't overlap."""
    # Of a long corpus, only as much is tokenized as the passages need: a token has seldom more than 16 characters.
    width = 16 * size
    passages: list[Sequence[int]] = []
    for place in draw.permutation(len(text) // width)[:states].tolist():
        # A place may be inside of a word: begin behind it.
        start = text.find(" ", place * width, (place + 1) * width) + 1 or place * width
        passages.append(system.encode(text[start : (place + 1) * width], "input")[:size])
    if len(passages) == states and all(len(passage) == size for passage in passages):
        return passages
    ids = system.encode(text, "input")
    room = len(ids) // size
    if room < states:
        raise InputError("states", states, f"at most {room} (the text has {len(ids)} tokens, {size} a state)")
    return [ids[p * size : (p + 1) * size] for p in draw.permutation(room)[:states].tolist()]


def read_pairs(
    path: str | Path,
    system: System,
    states: int = 20,
    shortest: int = 8,
    longest: int = 32,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    multi_token: bool = False,
) -> list[Pair]:
    """Pairs from a file of a user: ``*.jsonl`` whose lines have ``x0`` and ``y`` (and ``kind``) or, as a corpus,
    ``text``; or a raw corpus.

    Raises:
        InputError: a file that can't be read, or a line of another form; the sentence says which.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() != ".jsonl":
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("input", str(path), f"a text file that can be read ({error})") from None
        return pairs_from_text(system, content, states, shortest, longest, kinds, seed)
    pairs: list[Pair] = []
    texts: list[str] = []
    for number, record in enumerate(read_rows(file), 1):
        fields: list[Any] = [record.get(name) for name in ("x0", "y", "text")]
        filled = [isinstance(value, str) and value != "" for value in fields]
        if filled == [False, False, True]:
            texts.append(fields[2])
            continue
        if filled != [True, True, False]:
            allowed = f"rows with the texts 'x0' and 'y', or with 'text' (row {number} has neither)"
            raise InputError("input", str(path), allowed)
        try:
            x0, y = system.encode(fields[0], "x0"), system.answer(fields[1], multi_token)
        except InputError as error:
            raise InputError(error.parameter, error.value, f"{error.allowed} (row {number} of {path})") from None
        pairs.append(Pair(x0, y, str(record.get("kind", "given"))))
    if texts:
        pairs += pairs_from_text(system, "\n\n".join(texts), states, shortest, longest, kinds, seed)
    return pairs
