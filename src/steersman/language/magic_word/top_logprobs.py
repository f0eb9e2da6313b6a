r"""Greedy back generation through top log-probabilities alone, as a closed endpoint returns them.

    u <- argmax_v log P(y | v + u + x0) in front of u

An endpoint gives the n most probable next tokens with their log-probabilities. Where y is among them, log P(y) is
known; where it is not, P(y) is at most the least of them, and at most what they leave of the whole mass. Candidates
are ranked by what is known first, then by this upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steersman.errors import InputError
from steersman.language.magic_word.system import whole

TopLogprobs = Callable[[list[str]], Sequence[Mapping[str, float]]]
"""Texts -> for each, the most probable next tokens (as text) with their log-probabilities."""


@dataclass(frozen=True)
class ScoredPrompt:
    """What the search ends with: an adversarial string, found by search.

    Args:
        prompt: text in front of x0.
        pieces: the candidates that it is made of.
        reached: whether y is the most probable next token behind it.
        log_p: log P(y), or an upper bound of it where y was not returned.
        known: whether y was among what was returned.
        requests: texts that were scored.
    """

    prompt: str
    pieces: tuple[str, ...]
    reached: bool
    log_p: float
    known: bool
    requests: int


def score_only_search(
    top_logprobs: TopLogprobs,
    candidates: Sequence[str],
    x0: str,
    y: str,
    longest: int = 3,
    *,
    batch: int = 301,
    budget: int | None = None,
) -> ScoredPrompt:
    """Greedy back generation where only the returned top log-probabilities of an endpoint are known.

    ::

        def top_logprobs(texts):
            made = client.completions.create(model="my-model", prompt=texts, max_tokens=1, logprobs=20)
            return [choice.logprobs.top_logprobs[0] for choice in made.choices]

        score_only_search(top_logprobs, [" a", " the", ...], "The list is", " sorted")

    Args:
        top_logprobs: asks the endpoint; see :data:`TopLogprobs`.
        candidates: pieces of text that the prompt may be made of, in the endpoint's own words.
        x0: imposed text, not empty.
        y: wanted next token as the endpoint writes it (often with its leading space).
        longest: pieces of the prompt at most.
        batch: texts of one request.
        budget: texts to score at most, a whole scan at a time.

    Raises:
        InputError: no candidate, an empty x0 or y, a number out of range, or an answer of another length.
    """
    for name, value in (("x0", x0), ("y", y)):
        if not isinstance(value, str) or not value:
            raise InputError(name, value, "text that is not empty")
    if not candidates or isinstance(candidates, str):
        raise InputError("candidates", candidates, "a list of at least one text")
    whole("longest", longest, 1, 1000)
    whole("batch", batch, 1)
    requests = 0

    def ask(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        nonlocal requests
        rows: list[tuple[float, bool, bool]] = []
        for at in range(0, len(texts), batch):
            part = texts[at : at + batch]
            answers = top_logprobs(part)
            if len(answers) != len(part):
                raise InputError("top_logprobs", f"{len(answers)} answers", f"one for each of {len(part)} texts")
            rows += [_read(answer, y) for answer in answers]
        requests += len(texts)
        log_p, known, top = zip(*rows, strict=True)
        return np.array(log_p), np.array(known), np.array(top)

    log_p, known, top = ask([x0])
    best = ScoredPrompt("", (), bool(top[0]), float(log_p[0]), bool(known[0]), requests)
    while not best.reached and len(best.pieces) < longest:
        if budget is not None and requests + len(candidates) > budget:
            break
        log_p, known, top = ask([piece + best.prompt + x0 for piece in candidates])
        order = np.lexsort((np.arange(len(candidates)), -log_p, ~known, ~top))
        at = int(order[0])
        pieces = (candidates[at], *best.pieces)
        best = ScoredPrompt("".join(pieces), pieces, bool(top[at]), float(log_p[at]), bool(known[at]), requests)
    return best


def _read(answer: Mapping[str, float], y: str) -> tuple[float, bool, bool]:
    """(log P(y) or its upper bound, whether it is known, whether y is the top choice)."""
    if not answer:
        raise InputError("top_logprobs", {}, "at least one token with its log-probability for each text")
    if y in answer:
        return answer[y], True, answer[y] >= max(answer.values())
    rest = 1 - sum(math.exp(value) for value in answer.values())
    return min(min(answer.values()), math.log(max(rest, 1e-45))), False, False
