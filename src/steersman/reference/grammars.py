r"""Weighted languages of finitely many sentences, with exact probabilities of sentences, beginnings and next words.

An *expression* is a word, a sequence or a weighted choice, without recursion: every expression stands for a law over
finitely many sentences. :func:`parse` reads one from a template,

    the {aspect} was [very|really] (good|fine) .

where ``(a|b)`` takes one of the two, ``[a|b]`` one of them or nothing (nothing with probability 1/2), each alternative
as likely as the next, and ``{name}`` is another expression.

:class:`Automaton` is the position automaton of an expression (Glushkov 1961) with weights: its states are the places
where a word stands in the expression. With the weights :math:`f_e(q)` of the first words of an expression, its weight
:math:`\varepsilon_e` of saying nothing and the weights :math:`l_e(p)` of stopping behind p,

    sequence ab:  f = f_a + ε_a f_b     ε = ε_a ε_b       l = l_b + ε_b l_a    T(p, q) += l_a(p) f_b(q)
    choice:       f = Σ_i w_i f_i       ε = Σ_i w_i ε_i   l = ∪_i l_i

so that from every state the weights of what follows, stopping included, add up to one. The sum of the state weights
behind a prefix is then the probability that a sentence begins so, and the sum weighted by l that it is the whole.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steersman.errors import InputError

END = ""
"""What comes next when nothing does."""

_TOKEN = re.compile(r"\{\w+\}|[\[\]()|]|[^\s\[\](){}|]+")


@dataclass(frozen=True)
class Choice:
    """One of ``options``, with probabilities in proportion to ``weights``."""

    options: tuple[Expression, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.options or len(self.options) != len(self.weights) or min(self.weights) <= 0:
            raise InputError("weights", self.weights, "a number above 0 for each option")


Expression = str | tuple["Expression", ...] | Choice  # a word, a sequence, a choice


def choice(*options: Expression) -> Expression:
    """One of the options, all as likely."""
    return options[0] if len(options) == 1 else Choice(options, (1.0,) * len(options))


def weighted(*options: tuple[float, Expression]) -> Choice:
    """One of the options, by weight."""
    return Choice(tuple(o for _, o in options), tuple(w for w, _ in options))


def parse(template: str, **names: Expression) -> Expression:
    """The expression that ``template`` writes.

    Args:
        names: what ``{name}`` stands for.

    Raises:
        InputError: a bracket that isn't closed, a name that isn't given.
    """
    tokens, at = _TOKEN.findall(template), 0

    def alternatives(closing: str) -> list[Expression]:
        nonlocal at
        found: list[Expression] = []
        parts: list[Expression] = []
        while True:
            token = tokens[at] if at < len(tokens) else ""
            at += 1
            if token in ("|", closing):
                found.append(parts[0] if len(parts) == 1 else tuple(parts))
                parts = []
                if token == closing:
                    return found
            elif token == "(":
                parts.append(choice(*alternatives(")")))
            elif token == "[":
                inner = choice(*alternatives("]"))
                parts.append(choice((), inner))
            elif token.startswith("{") and token[1:-1] in names:
                parts.append(names[token[1:-1]])
            elif not token or token in ("]", ")") or token.startswith("{"):
                raise InputError("template", template, f"closed brackets and the names {', '.join(sorted(names))}")
            else:
                parts.append(token)

    return choice(*alternatives(""))


def draw(expression: Expression, rng: random.Random) -> list[str]:
    """The words of one sentence of the expression's law. Uses ``rng.random()`` alone, which no version changes."""
    if isinstance(expression, str):
        return [expression]
    if isinstance(expression, tuple):
        return [word for part in expression for word in draw(part, rng)]
    return draw(expression.options[pick(expression.weights, rng)], rng)


def pick(weights: Sequence[float], rng: random.Random) -> int:
    """An index, with probability in proportion to its weight."""
    left = rng.random() * sum(weights)
    for i, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return i
    return max(i for i, weight in enumerate(weights) if weight > 0)  # by rounding


class Automaton:
    """The weighted position automaton of an expression.

    ``begin`` gives the state before the first word, ``step`` the one behind another word, as weights by position;
    an empty state says that no sentence begins so.
    """

    def __init__(self, expression: Expression) -> None:
        self.words: list[str] = [""]  # position 0 is before the first word
        self._follows: list[dict[int, float]] = [{}]
        self._ends: list[float] = [0.0]
        first, self._ends[0], last = self._add(expression)
        self._follows[0] = first
        for p, weight in last.items():
            self._ends[p] = weight
        self._by_word: list[dict[str, list[tuple[int, float]]]] = []
        for follows in self._follows:
            by_word: dict[str, list[tuple[int, float]]] = {}
            for q, weight in follows.items():
                by_word.setdefault(self.words[q], []).append((q, weight))
            self._by_word.append(by_word)

    def _add(self, e: Expression) -> tuple[dict[int, float], float, dict[int, float]]:
        """First words, weight of nothing, weights of stopping: f, ε and l of an expression."""
        if isinstance(e, str):
            self.words.append(e)
            self._follows.append({})
            self._ends.append(0.0)
            return {len(self.words) - 1: 1.0}, 0.0, {len(self.words) - 1: 1.0}
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        if isinstance(e, Choice):
            nothing, total = 0.0, sum(e.weights)
            for option, weight in zip(e.options, e.weights, strict=True):
                f, epsilon, stops = self._add(option)
                first |= {q: weight / total * w for q, w in f.items()}
                nothing += weight / total * epsilon
                last |= stops
            return first, nothing, last
        nothing = 1.0
        for part in e:
            f, epsilon, stops = self._add(part)
            for p, leave in last.items():
                for q, w in f.items():
                    self._follows[p][q] = self._follows[p].get(q, 0.0) + leave * w
            first |= {q: nothing * w for q, w in f.items()}
            last = {p: epsilon * w for p, w in last.items() if epsilon} | stops
            nothing *= epsilon
        return {q: w for q, w in first.items() if w}, nothing, last

    def begin(self) -> dict[int, float]:
        return {0: 1.0}

    def step(self, state: Mapping[int, float], word: str) -> dict[int, float]:
        """The state behind one more word."""
        behind: dict[int, float] = {}
        for p, mass in state.items():
            for q, weight in self._by_word[p].get(word, ()):
                behind[q] = behind.get(q, 0.0) + mass * weight
        return behind

    def whole(self, state: Mapping[int, float]) -> float:
        """Probability of the sentence that led to ``state``, as a whole one."""
        return sum(mass * self._ends[p] for p, mass in state.items())

    def next_words(self, state: Mapping[int, float]) -> dict[str, float]:
        """Joint probability of the words so far and each next one; ``END`` is the end of the sentence."""
        found: dict[str, float] = {}
        for p, mass in state.items():
            for word, targets in self._by_word[p].items():
                found[word] = found.get(word, 0.0) + mass * sum(w for _, w in targets)
            if self._ends[p]:
                found[END] = found.get(END, 0.0) + mass * self._ends[p]
        return found

    def probability(self, words: Sequence[str]) -> float:
        """Probability of a sentence; 0 where it isn't one."""
        state = self.begin()
        for word in words:
            state = self.step(state, word)
        return self.whole(state)

    def common(self, other: Automaton) -> list[str] | None:
        """A sentence that both have, or None; decided over all sentences, by the product of the two."""
        reached: dict[tuple[int, int], list[str]] = {(0, 0): []}
        waiting = [(0, 0)]
        while waiting:
            p, q = waiting.pop()
            said = reached[p, q]
            if self._ends[p] and other._ends[q]:
                return said
            for word, targets in self._by_word[p].items():
                for there in ((a, b) for a, _ in targets for b, _ in other._by_word[q].get(word, ())):
                    if there not in reached:
                        reached[there] = [*said, word]
                        waiting.append(there)
        return None
