"""Token-level DPO's claims: credit for single tokens from preferences between whole answers, and search by likelihood.

``credit``: a policy is tuned on pairs of the reference's own answers of which the grammar prefers one as a whole. Then
tokens of other texts are ranked, in each of which one token was made wrong, beside tokens that are as rare under the
reference. Baselines train on the same pairs; the log-ratio of two supervised models costs as many passes as the policy.

``search``: reviews that go on from open beginnings, by beams of growing width on the policy and on its reference. At
one width both make the same number of forward passes; best-of-n makes as many with n samples. What is wanted is neutral
reviews, which are rare: of positive ones the policy writes nothing else by greedy search already.

``drift`` (full scale): the same training on answers that the reference was tuned on first, and on answers that it
wasn't: these are drawn at half the temperature, so that they aren't its own law.

A unit is a fit: pairs, faults, prompts and batches are new with each seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from steersman.engine import contenders
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.evidence.study import Study


def named(text: str) -> str:
    """A contender's label, as rows have it."""
    return contenders.parse(text).label


TUNING = "learning_rate=0.001:epochs=2"
"""Best of four settings on two other seeds; of the same four the supervised ratio's best are its defaults."""
OURS = named(f"q-star:{TUNING}")
SUPERVISED = "sft-ratio"
RIVALS = (
    "surprise",
    "unigram",
    "random",
    named(f"gradient:{TUNING}"),
    named(f"gradient:form=product:{TUNING}"),
    SUPERVISED,
)
TUNED_FIRST = named(f"q-star:{TUNING}:sft_epochs=1")


def searched(beams: int, scale: str) -> str:
    """The policy under a beam; those of one seed are one fit."""
    pairs = 96 if scale == "quick" else 1000
    return named(f"q-star:{TUNING}:pairs={pairs}:held_out=0:num_beams={beams}")


def beam(width: int) -> str:
    return named(f"beam:num_beams={width}")


def studies(scale: str, seed: int) -> dict[str, Study]:
    """160 pairs (96 for search) and 16 faults a fit, widths 1 and 5 (quick); 1000 pairs, 64 faults, widths to 20 and
    drift (full)."""
    quick = scale == "quick"
    credit = {"preferences": [160], "count": 16, "held_out": 16} if quick else {"preferences": [1000], "count": 64}
    widths = (1, 5) if quick else (1, 2, 5, 10, 20)
    compared = [searched(k, scale) for k in widths] + [beam(k) for k in widths]
    if not quick:
        compared += ["sample"]
        compared += [named(f"best-of-n:n={k}:by=likelihood") for k in widths[1:]]
        compared += [named(f"best-of-n:n={k}:by=scorer") for k in widths[1:]]
    search = {"attribute": ["sentiment=neutral"], "new_tokens": [64], "samples": 1, "marked": 0}
    search |= {"count": 12 if quick else 64, "batch": 16}
    found = {
        "credit": Study("credit", (OURS, *RIVALS), "reviews", credit),
        "search": Study("control", tuple(compared), "reviews", search),
    }
    if not quick:
        drift = {"preferences": [500], "temperature": [0.5], "count": 16, "unseen": 0.0}
        found["drift"] = Study("credit", (OURS, TUNED_FIRST), "reviews", drift)
    return found


# -------------------------------------------------------------------- claims


def above(figure: str, label: str) -> Callable[[Comparison], Effects]:
    """The figure by fit."""

    def effects(c: Comparison) -> Effects:
        values = c.values(figure, label)
        return Effects(np.array([values[seed] for seed in sorted(values)]))

    return effects


def ahead(figure: str, label: str, *rivals: str) -> Callable[[Comparison], Effects]:
    """By fit: the figure less that of the best rival of the fit."""

    def effects(c: Comparison) -> Effects:
        pairs = [c.paired(figure, label, rival) for rival in rivals]
        return Effects(pairs[0][0] - np.max([theirs for _, theirs in pairs], axis=0))

    return effects


def gains(figure: str, narrow: int, wide: int) -> Callable[[Comparison], Effects]:
    """By fit: what the policy gains from a wider beam, less what its reference gains."""

    def effects(c: Comparison) -> Effects:
        scale = "quick" if searched(wide, "quick") in c.contenders else "full"
        policy = c.paired(figure, searched(wide, scale), searched(narrow, scale))
        reference = c.paired(figure, beam(wide), beam(narrow))
        return Effects((policy[0] - policy[1]) - (reference[0] - reference[1]))

    return effects


def widened(figure: str, narrow: int, wide: int, sign: float = 1.0) -> Callable[[Comparison], Effects]:
    """By fit: what a wider beam adds to a figure of the policy."""

    def effects(c: Comparison) -> Effects:
        scale = "quick" if searched(wide, "quick") in c.contenders else "full"
        a, b = c.paired(figure, searched(wide, scale), searched(narrow, scale))
        return Effects(sign * (a - b))

    return effects


SECTION_CREDIT = "section 5.1: credit assignment, shown there on examples"
SECTION_SEARCH = "section 5.2: likelihood search, 10 to 15 points of win-rate with 5 beams"
SECTION_DRIFT = "section 5.3: chosen rewards fall where the reference was tuned on chosen answers"
ASKED = "asked here, not by the paper"

CLAIMS = [
    Claim(
        "credit",
        "It blames a wrong token more than tokens that are as rare with probability above 0.8.",
        SECTION_CREDIT,
        "credit",
        above("auroc", OURS),
        0.8,
        "fit",
    ),
    Claim(
        "credit-rivals",
        "That is above the best of surprise, log-odds of words, gradients, supervised ratio and chance by over 0.05.",
        ASKED,
        "credit",
        ahead("auroc", OURS, *RIVALS),
        0.05,
        "fit",
    ),
    Claim(
        "credit-words",
        "That is above log-odds of words, which know no context, by more than 0.05.",
        ASKED,
        "credit",
        ahead("auroc", OURS, "unigram"),
        0.05,
        "fit",
    ),
    Claim(
        "credit-unseen",
        "It blames wrong words that no pair contains more than tokens that are as rare with probability above 0.7.",
        ASKED,
        "credit",
        above("auroc_unseen", OURS),
        0.7,
        "fit",
    ),
    Claim(
        "beams",
        "With 5 beams the policy's texts have the attribute more often than with greedy search.",
        SECTION_SEARCH,
        "search",
        widened("success", 1, 5),
        0.0,
        "fit",
    ),
    Claim(
        "beams-more",
        "The policy gains more of the attribute from 5 beams than its reference does.",
        SECTION_SEARCH,
        "search",
        gains("success", 1, 5),
        0.0,
        "fit",
    ),
    Claim(
        "beams-longer",
        "With 20 beams the policy's texts are longer than with 5.",
        "section 5.2: wide beams give longer answers",
        "search",
        widened("length", 5, 20),
        0.0,
        "fit",
        scales=("full",),
    ),
    Claim(
        "beams-worse",
        "With 20 beams the policy's texts have the attribute less often than with 5.",
        "section 5.2: wide beams give worse answers",
        "search",
        widened("success", 5, 20, -1.0),
        0.0,
        "fit",
        scales=("full",),
    ),
    Claim(
        "drift",
        "Chosen answers end with less implicit reward where the reference was tuned on chosen answers first.",
        SECTION_DRIFT,
        "drift",
        ahead("chosen", OURS, TUNED_FIRST),
        0.0,
        "fit",
        scales=("full",),
    ),
    Claim(
        "drift-sign",
        "Where the reference was tuned on chosen answers first, their implicit reward ends below 0.",
        SECTION_DRIFT,
        "drift",
        lambda c: Effects(-above("chosen", TUNED_FIRST)(c).values),
        0.0,
        "fit",
        scales=("full",),
    ),
]
