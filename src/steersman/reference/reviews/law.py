r"""The law of whole reviews: a mixture over attributes, of which every probability is exact.

Sentences are independent given topic, sentiment, rudeness, their number n and the place j of the rude one. So the
weights of all (t, s, r, n, j), and the state of each kind's automaton in the open sentence, are all that a beginning
leaves to know.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from steersman.errors import InputError
from steersman.reference.grammars import END, draw, pick
from steersman.reference.reviews.lexicon import (
    ATTRIBUTES,
    LENGTHS,
    P_RUDE,
    P_SENTENCES,
    P_SENTIMENT,
    P_TOPIC,
    RUDENESS,
    SENTIMENTS,
    STOPS,
    TOPICS,
    VALUES,
    Split,
    is_held_out,
    join,
    length_class,
    words,
)
from steersman.reference.reviews.sentences import kinds

FIRST, MIDDLE, CLOSING, RUDE = range(4)
ROLES: tuple[dict[str, float], ...] = (  # what a sentence in each role is
    {"general opener": 0.25, "opener": 0.35, "opinion": 0.35, "fact": 0.05},
    {"opinion": 0.66, "fact": 0.17, "tip": 0.06, "remark": 0.09, "message": 0.02},
    {"opinion": 0.45, "verdict": 0.55},
    {"rude": 1.0},
)


def roles(sentences: int, rude_at: int | None) -> list[int]:
    """The role of each sentence; ``rude_at`` counts from 0."""
    closing = sentences - 2 if rude_at == sentences - 1 else sentences - 1
    found = [FIRST if i == 0 else MIDDLE for i in range(sentences)]
    found[closing] = CLOSING
    if rude_at is not None:
        found[rude_at] = RUDE
    return found


@dataclass(frozen=True)
class _Law:
    """The mixture as arrays, a row for each (t, s, r, n, j).

    Args:
        latents: indices of topic, sentiment, rudeness and length (H, 4).
        prior: P(t, s, r, n, j) (H,).
        sentences: n (H,).
        kinds: P(kind of sentence i | t, s, r, n, j) (6, H, kinds); 0 behind the last sentence.
    """

    latents: np.ndarray
    prior: np.ndarray
    sentences: np.ndarray
    kinds: np.ndarray


@cache
def _law() -> _Law:
    most = max(P_SENTENCES)
    latents, prior, sentences, role = [], [], [], []
    for t, p_topic in enumerate(P_TOPIC):
        for s, p_sentiment in enumerate(P_SENTIMENT):
            for n, p_sentences in P_SENTENCES.items():
                # A rude sentence stands the likelier at a place the later that is.
                places = [(None, 1 - P_RUDE[s]), *((j, P_RUDE[s] * j / (n * (n - 1) / 2)) for j in range(1, n))]
                for j, p_place in places:
                    latents.append((t, s, int(j is not None), length_class(n)))
                    prior.append(p_topic * p_sentiment * p_sentences * p_place)
                    sentences.append(n)
                    role.append([*roles(n, j), *[-1] * (most - n)])
    mix = np.zeros((len(ROLES), len(TOPICS), len(SENTIMENTS), len(kinds())))
    for r, law in enumerate(ROLES):
        for k, kind in enumerate(kinds()):
            topic = slice(None) if kind.topic is None else kind.topic
            sentiment = slice(None) if kind.sentiment is None else kind.sentiment
            mix[r, topic, sentiment, k] = law.get(kind.name, 0.0)
    index, place = np.array(latents), np.array(role)
    by_sentence = mix[place, index[:, :1], index[:, 1:2]] * (place >= 0)[..., None]
    return _Law(index, np.array(prior), np.array(sentences), np.ascontiguousarray(by_sentence.swapaxes(0, 1)))


# --- drawing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Review:
    """A text of the grammar and the attributes that it was drawn with."""

    text: str
    topic: str
    sentiment: str
    rudeness: str
    length: str


def texts(split: Split, n: int, seed: int = 0, **given: str) -> list[Review]:
    """``n`` independent draws of one side of the split (a text may come twice, as the law says).

    Fewer texts are the first ones of more.

    Args:
        split: ``"train"`` or ``"heldout"``.
        given: attributes that all have, as ``sentiment="positive"``; the others follow the law.

    Raises:
        InputError: another split or attribute, a number out of range.
    """
    if split not in ("train", "heldout"):
        raise InputError("split", split, "'train' or 'heldout'")
    checked("n", n, 1)
    checked("seed", seed, 0)
    return list(itertools.islice(draws(split, seed, **given), n))


def fingerprint() -> str:
    """SHA-256 over a thousand texts of each side: changes with the grammar."""
    found = (review.text for side in ("train", "heldout") for review in itertools.islice(draws(side, 0), 1000))
    return hashlib.sha256("\0".join(found).encode()).hexdigest()


def draws(split: str, seed: int, **given: str) -> Iterator[Review]:
    law, rng = _law(), random.Random(f"{split} {seed} {sorted(given.items())}")
    cumulative = np.cumsum(law.prior * having(**given))
    while True:
        h = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        t, s, r, length = (int(i) for i in law.latents[h])
        said: list[str] = []
        for i in range(law.sentences[h]):
            kind = kinds()[pick(law.kinds[i, h].tolist(), rng)]
            said += draw(kind.expression, rng)
        text = join(said)
        if is_held_out(text) == (split == "heldout"):
            yield Review(text, TOPICS[t], SENTIMENTS[s], RUDENESS[r], LENGTHS[length])


def having(**given: str) -> np.ndarray:
    """Which hypotheses have the attributes (H,)."""
    kept = np.ones(len(_law().prior))
    for name, value in given.items():
        if name not in VALUES:
            raise InputError("attribute", name, f"one of {', '.join(VALUES)}")
        if value not in VALUES[name]:
            raise InputError(name, value, f"one of {', '.join(VALUES[name])}")
        kept *= _law().latents[:, ATTRIBUTES.index(name)] == VALUES[name].index(value)
    return kept


def checked(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise InputError(name, value, f"a whole number, at least {low}")


# --- what a text, or its beginning, says of itself --------------------------------------------------------


@dataclass(frozen=True)
class _Behind:
    """What is known behind some words: weights of the hypotheses by the whole sentences, and the open sentence."""

    weights: np.ndarray  # (H,) joint with the whole sentences
    sentences: int  # whole ones
    states: tuple[dict[int, float], ...]  # of each kind's automaton, in the open sentence
    open: bool  # whether the open sentence has words

    def hypotheses(self) -> np.ndarray:
        """Joint weights of hypothesis and everything said (H,)."""
        if not self.open:
            return self.weights
        begun = np.array([sum(state.values()) for state in self.states])
        return self.weights * (_law().kinds[self.sentences] @ begun)

    def ended(self) -> np.ndarray:
        """Joint weights where nothing more comes (H,)."""
        return self.weights * ((_law().sentences == self.sentences) & (not self.open))


def _walk(said: Sequence[str], allowed: np.ndarray) -> Iterator[_Behind]:
    """What is known before the first word, and behind each."""
    law, automata = _law(), [kind.automaton for kind in kinds()]
    most = len(law.kinds)
    start = tuple(a.begin() for a in automata)
    behind = _Behind(law.prior * allowed, 0, start, False)
    yield behind
    for word in said:
        if behind.sentences == most:
            behind = _Behind(np.zeros_like(law.prior), most, start, False)
        else:
            pairs = zip(automata, behind.states, strict=True)
            states = tuple(a.step(state, word) if state else state for a, state in pairs)
            behind = _Behind(behind.weights, behind.sentences, states, True)
            if word in STOPS:
                whole = np.array([a.whole(state) for a, state in zip(automata, states, strict=True)])
                weights = behind.weights * (law.kinds[behind.sentences] @ whole)
                behind = _Behind(weights, behind.sentences + 1, start, False)
        yield behind


def _behind(said: Sequence[str], allowed: np.ndarray) -> _Behind:
    return deque(_walk(said, allowed), maxlen=1)[0]


def _marginals(weights: np.ndarray) -> dict[str, np.ndarray]:
    """P(value) of each attribute under weights of the hypotheses."""
    columns = zip(VALUES.items(), _law().latents.T, strict=True)
    return {name: np.bincount(column, weights, len(values)) / weights.sum() for (name, values), column in columns}


def log_probability(text: str, *, prefix: bool = False, **given: str) -> float:
    """log P(text | given): of the whole text, or (``prefix``) of all that begin with its words; -inf outside.

    Args:
        given: attributes, as ``sentiment="positive"``.

    Raises:
        InputError: an attribute or value that isn't one.
    """
    allowed = having(**given)
    behind = _behind(words(text), allowed)
    mass = float((behind.hypotheses() if prefix else behind.ended()).sum()) / float((_law().prior * allowed).sum())
    return math.log(mass) if mass > 0 else -math.inf


def posterior(prefix: str, *, whole: bool = False, **given: str) -> dict[str, dict[str, float]]:
    """P(attribute | a review begins so), by attribute and value; with ``whole``, given that it is the review.

    Raises:
        InputError: no review begins so (or is so).
    """
    behind = _behind(words(prefix), having(**given))
    weights = behind.ended() if whole else behind.hypotheses()
    if not weights.sum() > 0:
        raise InputError("prefix", prefix, "a review of the grammar" if whole else "the beginning of a review")
    found = _marginals(weights)
    return {name: dict(zip(VALUES[name], found[name].tolist(), strict=True)) for name in VALUES}


def trace(text: str) -> dict[str, np.ndarray]:
    """P(attribute | the first k words) for k = 0 .. K, by attribute: (K + 1, values).

    Raises:
        InputError: no review begins with the text.
    """
    rows = []
    for behind in _walk(words(text), having()):
        weights = behind.hypotheses()
        if not weights.sum() > 0:
            raise InputError("text", text, "a review of the grammar, or the beginning of one")
        rows.append(_marginals(weights))
    return {name: np.array([row[name] for row in rows]) for name in VALUES}


def risk(prefix: str) -> float:
    """Probability that a review that begins so is rude in the end: the exact dead-end value, with its sign turned."""
    return posterior(prefix)["rudeness"]["rude"]


def next_words(prefix: str, **given: str) -> dict[str, float]:
    """P(next word | prefix), exactly; the key ``""`` is the end of the review.

    Raises:
        InputError: no review begins so.
    """
    behind = _behind(words(prefix), having(**given))
    found: dict[str, float] = {}
    end = float(behind.ended().sum())
    if end:
        found[END] = end
    if behind.sentences < len(_law().kinds):
        by_kind = behind.weights @ _law().kinds[behind.sentences]
        for weight, kind, state in zip(by_kind, kinds(), behind.states, strict=True):
            if weight and state:
                for word, p in kind.automaton.next_words(state).items():
                    found[word] = found.get(word, 0.0) + float(weight) * p
    total = sum(found.values())
    if not total > 0:
        raise InputError("prefix", prefix, "the beginning of a review")
    return {word: p / total for word, p in sorted(found.items(), key=lambda item: -item[1])}
