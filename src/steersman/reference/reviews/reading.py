"""Attributes of any text, read without a learned part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from steersman.reference.reviews.law import log_probability
from steersman.reference.reviews.lexicon import (
    CORES,
    LENGTHS,
    NEUTRAL,
    RUDENESS,
    SENTIMENTS,
    STOPS,
    TOPICS,
    length_class,
    words,
)
from steersman.reference.reviews.sentences import kinds


@dataclass(frozen=True)
class Attributes:
    """What a text says.

    Args:
        topic: the one that most of its sentences are about; None where none or several are.
        sentiment: the sign of its praising less its blaming sentences; None without any sentence that judges.
        rudeness: rude if it has one of the insulting cores, wherever that stands.
        length: by the number of sentences, an unfinished one counted.
        sentences, words: their numbers; marks are words.
        grammatical: whether it is a review of the grammar, whole.
        validity: share of its words in sentences of the grammar, or in an unfinished last one that begins so.
    """

    topic: str | None
    sentiment: str | None
    rudeness: str
    length: str
    sentences: int
    words: int
    grammatical: bool
    validity: float


def attributes(text: str) -> Attributes:
    """Reads a text without any learned part; exact on the grammar's own, and defined on every other.

    A sentence outside the grammar has no say in topic and sentiment. One that breaks off at the end of the text has,
    where all that it could become agree. A rude core counts anywhere, so a broken sentence can't hide an insult.
    """
    said = words(text)
    spans, begun = [], 0
    for i, word in enumerate(said):
        if word in STOPS or i == len(said) - 1:
            spans.append(tuple(said[begun : i + 1]))
            begun = i + 1
    topics: Counter[int] = Counter()
    balance, judged, valid = 0, False, 0
    for span in spans:
        supports = _support(span)
        if not supports:
            continue
        valid += len(span)
        about, feeling = {t for t, _ in supports}, {s for _, s in supports}
        if len(about) == 1 and (topic := about.pop()) is not None:
            topics[topic] += 1
        if len(feeling) == 1 and (sentiment := feeling.pop()) is not None:
            balance, judged = balance + sentiment - NEUTRAL, True
    first = topics.most_common(2)
    clear = len(first) == 1 or (len(first) == 2 and first[0][1] > first[1][1])
    return Attributes(
        TOPICS[first[0][0]] if clear else None,
        SENTIMENTS[NEUTRAL + (balance > 0) - (balance < 0)] if judged else None,
        RUDENESS[has_core(said)],
        LENGTHS[length_class(len(spans))],
        len(spans),
        len(said),
        valid == len(said) and log_probability(text) > -math.inf,  # the law takes much longer to ask
        valid / len(said) if said else 0.0,
    )


@lru_cache(maxsize=10_000)
def _support(span: tuple[str, ...]) -> frozenset[tuple[int | None, int | None]]:
    """(topic, sentiment) of all kinds that have this sentence, or a sentence that begins so if it has no stop."""
    found = set()
    for kind in kinds():
        state = kind.automaton.begin()
        for word in span:
            state = kind.automaton.step(state, word)
            if not state:
                break
        if state and (span[-1] not in STOPS or kind.automaton.whole(state)):
            found.add((kind.topic, kind.sentiment))
    return frozenset(found)


def has_core(said: Sequence[str]) -> bool:
    """Whether an insulting core stands somewhere in these words."""
    starts = {core[0] for core in CORES}
    return any(
        tuple(said[i : i + len(core)]) == core
        for i, word in enumerate(said)
        if word in starts
        for core in CORES
        if core[0] == word
    )
