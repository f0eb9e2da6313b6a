"""Beginnings of held-out reviews."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steersman.errors import InputError
from steersman.reference.reviews.law import Review, checked, draws, trace
from steersman.reference.reviews.lexicon import VALUES, words
from steersman.reference.reviews.models import tokenizer as reference_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHORTEST = 3  # tokens of a prompt that is cut at random


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out review, and how it really went on.

    Args:
        text, ids: the prompt, as text and as tokens without special ones.
        continuation, continuation_ids: what follows in the review.
        review: the whole, with its attributes.
        risk: exact probability that a review which begins so is rude in the end.
    """

    text: str
    ids: tuple[int, ...]
    continuation: str
    continuation_ids: tuple[int, ...]
    review: Review
    risk: float


def prompts(
    n: int,
    tokens: int | None = 8,
    seed: int = 0,
    *,
    continuation: int = 1,
    undecided: Sequence[str] = (),
    kept: float = 0.5,
    risks: tuple[float, float] = (0.0, 1.0),
    tokenizer: PreTrainedTokenizerBase | None = None,
    **given: str,
) -> list[Prompt]:
    """``n`` beginnings of held-out reviews, all different. Fewer prompts are the first ones of more.

    Args:
        n: number of prompts.
        tokens: tokens a prompt; None cuts each review at a random one of the places that will do.
        seed: of the draw.
        continuation: tokens that must follow a prompt in its review.
        undecided: attributes that a prompt leaves open: each value keeps at least ``kept`` times its prior probability.
        kept: from 0 to 1.
        risks: the lowest and highest exact risk of a prompt.
        tokenizer: a transformers tokenizer; by default the reference models' own, a token a word.
        given: attributes of the reviews that prompts are cut from, as ``rudeness="rude"``.

    Raises:
        InputError: a number out of range, an unknown attribute, or too few beginnings of this kind.
    """
    checked("n", n, 1)
    if tokens is not None:
        checked("tokens", tokens, 1)
    checked("continuation", continuation, 0)
    checked("seed", seed, 0)
    for name in (undecided,) if isinstance(undecided, str) else undecided:
        if name not in VALUES:
            raise InputError("undecided", name, f"a list of {', '.join(VALUES)}")
    if isinstance(kept, bool) or not isinstance(kept, (int, float)) or not 0 <= kept <= 1:
        raise InputError("kept", kept, "a number from 0 to 1")
    if not 0 <= risks[0] <= risks[1] <= 1:
        raise InputError("risks", risks, "two numbers from 0 to 1, the lower first")
    if tokenizer is None:
        tokenizer = reference_tokenizer()
    prior, rng = trace(""), random.Random(f"prompts {seed}")
    found: dict[str, Prompt] = {}
    for review in itertools.islice(draws("heldout", seed, **given), 50 * n + 500):
        ids = tokenizer(review.text, add_special_tokens=False, verbose=False)["input_ids"]
        last = len(ids) - continuation
        cuts = range(SHORTEST, last + 1) if tokens is None else range(tokens, tokens + 1) if tokens <= last else ()
        # Half a word is read as a word that the grammar lacks: cut only between words.
        beginnings = {cut: str(tokenizer.decode(ids[:cut])) for cut in cuts}
        whole = words(review.text)
        beginnings = {c: t for c, t in beginnings.items() if t not in found and words(t) == whole[: len(words(t))]}
        if not beginnings:
            continue
        known = trace(review.text)
        fit = [
            cut
            for cut, text in beginnings.items()
            if risks[0] <= known["rudeness"][len(words(text)), 1] <= risks[1]
            and all((known[a][len(words(text))] >= kept * prior[a][0]).all() for a in undecided)
        ]
        if not fit:
            continue
        cut = fit[int(rng.random() * len(fit))]
        text, follows = beginnings[cut], str(tokenizer.decode(ids[cut:]))
        p = float(known["rudeness"][len(words(text)), 1])
        found[text] = Prompt(text, tuple(ids[:cut]), follows, tuple(ids[cut:]), review, p)
        if len(found) == n:
            return list(found.values())
    raise InputError("n", n, f"at most {len(found)} (different beginnings of this kind in {50 * n + 500} reviews)")
