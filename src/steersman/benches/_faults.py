r"""Texts with one wrong token at a known place, and pairs of answers that never show where.

A fault is a token of a text that a scorer approves of, replaced so that the scorer no longer does. It is no rarer under
the reference than the text's own rarest token, and it is compared with tokens of its text that are as rare: with
:math:`\ell_t = \log \pi_\mathrm{ref}(y_t|y_{<t})`, the m tokens whose :math:`\ell` is next above the fault's and the m
whose is next below. To tell a fault from these by how surprising it is has an area under the curve of 1/2.

Pairs are two answers of the reference to one prompt, labelled by the score of the whole. (Pairs that differ in one word
would give its place away: all other tokens cancel.) Half of the faults are words that no pair contains.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.benches._language import Subject
from steersman.errors import InputError
from steersman.language.q_star import Pair, log_probabilities, pieces
from steersman.language.q_star.rewards import tokenized
from steersman.language.texts import read_rows

FIRST = 64  # texts at most from which words of faults are found
COMMON = 0.1  # share of these texts from which on a word is too common to be left out of pairs
TRIES = 96  # replacements that are scored for a text
CHUNK = 16


@dataclass(frozen=True)
class Case:
    """A text with a fault.

    Args:
        prompt, completion: token ids; tokens of the completion are ranked.
        faults: indices in the completion.
        controls: indices of tokens as rare under the reference as the fault.
        unseen: whether no pair has the fault's word.
        was: what stood in the fault's place, where that is known.
    """

    prompt: list[int]
    completion: list[int]
    faults: list[int]
    controls: list[int]
    unseen: bool = False
    was: str = ""

    def auroc(self, blame: np.ndarray, everywhere: bool = False) -> float:
        """Probability that a fault is blamed more than a control (or, ``everywhere``, any other token), ties half."""
        others = [t for t in range(len(blame)) if t not in self.faults] if everywhere else self.controls
        ahead = blame[self.faults][:, None] - blame[others][None]
        return float(((ahead > 0) + 0.5 * (ahead == 0)).mean())

    def rank(self, blame: np.ndarray) -> int:
        """1 if no token is blamed more than the fault."""
        return 1 + int((blame > blame[self.faults].max()).sum())


class Planter:
    """Makes faults.

    Args:
        s: the reference.
        scorer: texts to numbers from 0 to 1.
        readable: whether a text may be used at all, as one of a grammar.
        prompt_tokens: tokens of the longest prompt, behind which a fault stands.
        matched: most controls above, and below.
        rng: draws places, words and prompts.
    """

    def __init__(
        self,
        s: Subject,
        scorer: Callable[[list[str]], Any],
        readable: Callable[[str], bool],
        prompt_tokens: int,
        matched: int,
        rng: np.random.Generator,
    ) -> None:
        self.s, self.scorer, self.readable = s, scorer, readable
        self.prompt_tokens, self.matched, self.rng = prompt_tokens, matched, rng
        self.special = set(s.tokenizer.all_special_ids)

    @torch.no_grad()
    def plant(self, text: str, allowed: Callable[[int], bool] = lambda token: True) -> tuple[Case, int] | None:
        """A case of this text and the token that is its fault; None if no replacement will do."""
        opening = len(self.s.opening)
        ids = self.encoded(text)
        limit = self.s.positions - 1
        if len(ids) < opening + 3 or len(ids) > limit or not self.approved([text])[0]:
            return None
        first = int(self.rng.integers(opening + 1, min(opening + self.prompt_tokens, len(ids) - 2) + 1))
        row = torch.tensor([ids], device=self.s.model.device)
        law = self.s.model(input_ids=row).logits[0, :-1].float().log_softmax(-1).cpu()  # of ids[1:]
        own = law.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        floor = float(own[first - 1 :].min())
        places = [
            (t, v)
            for t in range(first, len(ids))
            for v in (law[t - 1] >= floor).nonzero()[:, 0].tolist()
            if v != ids[t] and v not in self.special and allowed(v)
        ]
        order = self.rng.permutation(len(places))[:TRIES]
        for at in range(0, len(order), CHUNK):
            tried = [places[i] for i in order[at : at + CHUNK]]
            rows = [[*ids[:t], v, *ids[t + 1 :]] for t, v in tried]
            texts = [str(self.s.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
            same = [self.encoded(said) == row for said, row in zip(texts, rows, strict=True)]
            for ok, (t, v), row_, said, good in zip(same, tried, rows, texts, self.approved(texts), strict=True):
                if not ok or good or not self.readable(said):
                    continue
                case = self.case(row_[:first], row_[first:], [t - first], self.s.tokenizer.decode([ids[t]]))
                if case is not None:
                    return case, v
        return None

    def case(self, prompt: list[int], completion: list[int], faults: list[int], was: str = "") -> Case | None:
        """Fault and controls; None where no token is rarer than the fault, or none is less rare."""
        known = log_probabilities(self.s.model, [prompt], [completion])[0].numpy()
        mine = float(known[faults].min())
        others = np.array([t for t in range(len(known)) if t not in faults])
        below = others[known[others] < mine]
        above = others[known[others] > mine]
        m = min(self.matched, len(below), len(above))
        if m == 0:
            return None
        below = below[np.argsort(-known[below], kind="stable")][:m]
        above = above[np.argsort(known[above], kind="stable")][:m]
        return Case(prompt, completion, faults, [int(t) for t in (*below, *above)], was=str(was))

    def approved(self, texts: list[str]) -> list[bool]:
        return [bool(score >= 0.5) for score in np.asarray(self.scorer(texts), dtype=float)]

    def encoded(self, text: str) -> list[int]:
        ids = list(self.s.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return [*self.s.opening, *ids]


def planted(texts: Iterator[str], planter: Planter, count: int, unseen: float) -> tuple[list[Case], set[int]]:
    """``count`` cases, half of them with faults from a set of words that pairs must lack, and that set.

    Args:
        unseen: share of the words that faults were found to be.

    Raises:
        InputError: too few of the texts can be spoilt by one token.
    """
    words: set[int] = set()
    first = list(itertools.islice(texts, min(FIRST, 2 * count)))
    for text in first:
        found = planter.plant(text)
        if found is not None:
            words.add(found[1])
    hidden: set[int] = set()
    # Hardly a pair would be left without the words that many texts have.
    common = Counter(token for text in first for token in {*planter.encoded(text)})
    words = {word for word in words if common[word] <= COMMON * len(first)} or words
    if unseen > 0 and words:
        chosen = planter.rng.permutation(sorted(words))[: max(1, math.ceil(unseen * len(words)))]
        hidden = {int(token) for token in chosen}
    cases: list[Case] = []
    wanted = count // 2 if hidden else 0
    for tried, text in enumerate(itertools.chain(first, texts)):
        if len(cases) == count or tried == 100 * count:
            break
        lacking = sum(case.unseen for case in cases) < wanted
        seen = sum(not case.unseen for case in cases) < count - wanted
        found = planter.plant(text, hidden.__contains__) if lacking else None
        if found is not None:
            cases.append(Case(**{**asdict(found[0]), "unseen": True}))
        elif seen:
            found = planter.plant(text, lambda token: token not in hidden)
            if found is not None:
                cases.append(found[0])
    if len(cases) < count:
        allowed = f"at most {len(cases)} (texts that one token of this attribute spoils)"
        raise InputError("count", count, allowed)
    return cases, hidden


def read_cases(path: str, planter: Planter, tokenizer: Any) -> list[Case]:
    """Cases from a .jsonl file with ``prompt``, ``completion`` and ``fault``: [start, end], its characters there.

    Raises:
        InputError: a line of another form.
    """
    found = []
    for number, row in enumerate(read_rows(path, "faults"), 1):
        allowed = f"rows with prompt, completion and fault: [start, end] (row {number} isn't one)"
        try:
            prompt, completion, (start, end) = row["prompt"], row["completion"], row["fault"]
            inside = 0 <= start < end <= len(completion)
        except (KeyError, TypeError, ValueError):
            raise InputError("faults", path, allowed) from None
        if not inside:
            raise InputError("faults", path, allowed)
        first, rest = (rows[0] for rows in tokenized([prompt], [completion], tokenizer))
        faults, at = [], 0
        for t, piece in enumerate(pieces(tokenizer, first, rest)):
            if at < end and at + len(piece) > start and piece.strip():
                faults.append(t)
            at += len(piece)
        case = planter.case(first, rest, faults) if faults else None
        if case is not None:
            found.append(case)
    if not found:
        allowed = "a file with at least one fault that is neither its text's rarest token nor its most likely one"
        raise InputError("faults", path, allowed)
    return found


def save(cases: Iterable[Case], pairs: Iterable[Pair], held_out: Iterable[Pair], folder: Path) -> None:
    for name, items in (("cases", [asdict(c) for c in cases]), ("pairs", [p.to_json() for p in pairs]),
                        ("held_out", [p.to_json() for p in held_out])):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def load_cases(folder: Path) -> list[Case]:
    return [Case(**json.loads(line)) for line in (folder / "cases.jsonl").read_text().splitlines()]


def load_pairs(folder: Path, name: str = "pairs") -> list[Pair]:
    return [Pair(**json.loads(line)) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def without(tokens: set[int], tokenizer: Any) -> Callable[[Pair], bool]:
    """Whether a pair has none of these tokens."""

    def keep(pair: Pair) -> bool:
        texts: Sequence[str] = (pair.prompt + pair.chosen, pair.prompt + pair.rejected)
        return not any(tokens & set(tokenizer(text, verbose=False)["input_ids"]) for text in texts)

    return keep
