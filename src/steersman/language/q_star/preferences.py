r"""Pairs of answers of which one is preferred: a user's, or two answers of a model that a scorer tells apart.

With scores s of n answers to one prompt, sorted, the best is paired with the worst, the second with the second last,
and so on, as long as the scores differ. Each answer is in one pair at most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from steersman.errors import InputError
from steersman.language.q_star.monitoring import sampled
from steersman.language.texts import opening_of, read_rows

Scorer = Callable[[list[str]], Any]
BATCH = 256  # answers that are written together


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, as texts that go on from it."""

    prompt: str
    chosen: str
    rejected: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from a file with ``prompt``, ``chosen`` and ``rejected``.

    Raises:
        InputError: a row without them, or none at all.
    """
    return as_pairs(read_rows(path), path)


def as_pairs(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Pair]:
    """Rows as pairs; those with like answers, which prefer nothing, are left out."""
    found = []
    for number, row in enumerate(rows, 1):
        values = [row.get(name) for name in ("prompt", "chosen", "rejected")]
        if not all(isinstance(value, str) and value for value in values):
            raise InputError(
                "input", str(path), f"rows with texts prompt, chosen and rejected (row {number} isn't one)"
            )
        prompt, chosen, rejected = map(str, values)
        if chosen != rejected:
            found.append(Pair(prompt, chosen, rejected))
    if not found:
        raise InputError("input", str(path), "a file with at least one pair of different answers")
    return found


def beginnings(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, tokens: int, seed: int, path: Path | str = "input"
) -> Iterator[list[int]]:
    """Prompts without end, rows in random order: each one's ``prompt``, or its ``text`` cut behind 1 to ``tokens``
    tokens.

    Raises:
        InputError: no row has a prompt or a text.
    """
    texts = [(str(row["prompt"]), True) if row.get("prompt") else (str(row["text"]), False) for row in rows
             if row.get("prompt") or row.get("text")]  # fmt: skip
    if not texts:
        raise InputError("input", str(path), "rows with prompt, chosen and rejected, or with text, or prompt")
    rng = random.Random(seed)
    opening = len(opening_of(tokenizer))
    while True:
        rng.shuffle(texts)
        there = False
        for text, whole in texts:
            ids = list(tokenizer(text, verbose=False)["input_ids"])
            if not whole:
                most = min(opening + tokens, len(ids) - 1)
                if most <= opening:
                    continue
                ids = ids[: rng.randint(opening + 1, most)]
                # A cut within a word is read as other tokens.
                if list(tokenizer(tokenizer.decode(ids, skip_special_tokens=True), verbose=False)["input_ids"]) != ids:
                    continue
            there = True
            yield ids
        if not there:
            raise InputError("input", str(path), "texts of at least two tokens")


def sampled_pairs(
    model: Any,
    tokenizer: Any,
    prompts: Iterator[list[int]],
    scorer: Scorer,
    count: int,
    *,
    samples: int = 4,
    new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    keep: Callable[[Pair], bool] = lambda pair: True,
    log: Callable[[str], None] = lambda line: None,
) -> list[Pair]:
    """``count`` pairs of a model's own answers, of which the scorer prefers one.

    Answers that don't end within ``new_tokens`` are left out, as are those that read as other tokens than were written.

    Args:
        prompts: token ids.
        scorer: whole texts to numbers; the larger is the better.
        count: how many.
        samples: answers to a prompt.
        new_tokens: length of the longest answer.
        temperature: of the answers.
        seed: of the answers.
        keep: which pairs may be used.
        log: gets a line now and then.

    Raises:
        InputError: fewer than one pair in a hundred answers.
    """
    found: list[Pair] = []
    written, batch = 0, max(1, min(BATCH // samples, count))
    said = count // 4
    while len(found) < count:
        asked = [next(prompts) for _ in range(batch)]
        rows = [row for row in asked for _ in range(samples)]
        answers = sampled(model, rows, new_tokens, tokenizer, seed + written, BATCH, temperature)
        texts = [answer_text(tokenizer, row, answer) for row, answer in zip(rows, answers, strict=True)]
        known = [i for i, text in enumerate(texts) if text is not None]
        whole = [text[0] + text[1] for text in texts if text is not None]
        scores = dict(zip(known, torch.as_tensor(scorer(whole)).tolist(), strict=True)) if whole else {}
        for p in range(batch):
            members = sorted((i for i in range(p * samples, (p + 1) * samples) if i in scores), key=scores.__getitem__)
            for low, high in zip(members[: len(members) // 2], members[::-1], strict=False):
                worse, better = texts[low], texts[high]
                assert worse is not None and better is not None
                if scores[low] < scores[high] and keep(pair := Pair(better[0], better[1], worse[1])):
                    found.append(pair)
        written += len(rows)
        if written >= 2000 and 100 * len(found) < written:
            allowed = f"an attribute in which answers to one prompt differ ({len(found)} pairs in {written} answers)"
            raise InputError("scorer", getattr(scorer, "__name__", "scorer"), allowed)
        if len(found) >= said:
            log(f"{min(len(found), count)} of {count} pairs")
            said += count // 4 + 1
    return found[:count]


def answer_text(tokenizer: Any, prompt: list[int], answer: list[int]) -> tuple[str, str] | None:
    """Prompt and answer as texts; None if the answer has no end, nothing before it, or reads as other tokens."""
    if answer[-1:] != [tokenizer.eos_token_id] or len(answer) < 2:
        return None
    first = str(tokenizer.decode(prompt, skip_special_tokens=True))
    whole = str(tokenizer.decode([*prompt, *answer[:-1]], skip_special_tokens=True))
    if not whole.startswith(first) or list(tokenizer(whole, verbose=False)["input_ids"]) != [*prompt, *answer[:-1]]:
        return None
    return first, whole[len(first) :]
