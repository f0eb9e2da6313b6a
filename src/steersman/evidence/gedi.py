"""GeDi's claims, on ``reviews``: the guide that ``apply`` makes by default, fitted anew for each seed.

A unit is a fit: its own batches, prompts and samples. Prompts leave the attribute open (each value keeps half its prior
probability at least), and the grammar itself reads the finished texts. What a contender's weight should be is chosen
for each fit on the *other* fits, which have other prompts: among the weights whose validity there is at most 0.05 below
that of the base, the one of the highest success; where none is, the one that harms validity least.
Rivals that have a weight are swept as finely and chosen alike.

``gen_weight=1`` is a guide trained as a plain class-conditional model, ``mode=conditional`` lets the guide write by
itself, and ``mode=best-of-4`` lets it choose among four texts of the base, which costs four texts. ``prompting+cfg`` is
transformers' classifier-free guidance, with the law behind a positive sentence against that behind a negative one; away
from the negative sentence alone (``cfg``) texts become neutral.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from steersman.engine import contenders
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.evidence.study import Study

LOSS = 0.05  # of validity that a weight may cost
OMEGAS = {"quick": (3, 10, 30), "full": (1, 3, 5, 10, 30, 60)}
BIASES = {"quick": (1, 2, 4), "full": (0.5, 1, 2, 3, 4, 6)}
SCALES = {"quick": (1.25, 1.5, 2.0), "full": (1.1, 1.25, 1.5, 2.0, 2.5, 3.0)}
HYBRID, PLAIN = "gedi:gen_weight=0.6", "gedi:gen_weight=1"
UNFILTERED, HELD_OUT = ":rho=1", ":held_out=phone"
CFG, PROMPTED = "cfg", "prompting+cfg"


def named(text: str) -> str:
    """A contender's label, as rows have it."""
    return contenders.parse(text).label


def guided(omega: float, of: str = HYBRID) -> str:
    """GeDi at a weight; contenders that differ in knobs of the processor alone share one fit."""
    return named(f"{of}:omega={omega:g}")


def alone(mode: str) -> str:
    """What the same guide does without guiding."""
    return named(f"{HYBRID}:mode={mode}")


def words(bias: float) -> str:
    return named(f"word-bias:bias={bias:g}")


def cfg(scale: float, of: str = PROMPTED) -> str:
    return named(f"{of}:scale={scale:g}")


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Five fits of a guide for sentiment; at full scale other lambdas, more prompts and weights, rudeness, and topics
    with one held out."""
    size = "quick" if scale == "quick" else "full"
    omegas, scales, n = OMEGAS[size], SCALES[size], {"quick": 16, "full": 50}[size]
    biased = [words(bias) for bias in BIASES[size]]
    grid = {"new_tokens": 24, "count": n, "batch": n, "samples": 4, "marked": 3}

    def swept(of: str) -> list[str]:
        return [guided(omega, of) for omega in omegas]

    compared = ["sample", *biased, "prompting", *map(cfg, scales), *swept(HYBRID)]
    compared += [guided(30, HYBRID + UNFILTERED), alone("conditional"), alone("best-of-4")]
    sentiment = grid | {"attribute": "sentiment=positive"}
    if size == "quick":
        return {"sentiment": Study("control", tuple(compared), "reviews", sentiment)}
    compared += [*[cfg(s, CFG) for s in scales], *swept(PLAIN), *swept("gedi:gen_weight=0.8"), "conditional"]
    compared += [label for label in swept(HYBRID + UNFILTERED) if label not in compared]
    polite = grid | {"attribute": "rudeness=polite", "risk_low": 0.1, "risk_high": 0.95}
    topics = ("sample", *swept(HYBRID), *swept(HYBRID + HELD_OUT))
    return {
        "sentiment": Study("control", tuple(compared), "reviews", sentiment),
        "rudeness": Study("control", ("sample", *biased, *swept(HYBRID), *swept(PLAIN)), "reviews", polite),
        "topic": Study("control", topics, "reviews", grid | {"attribute": "topic=phone"}),
    }


# -------------------------------------------------------------------- claims


def own_best(c: Comparison, like: str, figure: str = "success") -> np.ndarray:
    """The figure of each fit at the weight that is best on the other fits, (fits,).

    Args:
        like: a contender; those that differ from it in weights only are chosen from.
    """
    labels = [label for label in c.contenders if unweighted(label) == unweighted(like)]
    success, validity, wanted = (
        np.array([by_seed(c, name, x) for x in labels]) for name in ("success", "validity", figure)
    )
    base = by_seed(c, "validity", "sample")
    found = []
    for i in range(len(base)):
        others = np.arange(len(base)) != i
        harm = base[others].mean() - validity[:, others].mean(1)
        # Where no weight is allowed, the one that harms least.
        value = np.where(harm <= max(LOSS, harm.min()), success[:, others].mean(1), -1)
        found.append(wanted[value.argmax(), i])
    return np.array(found)


def unweighted(label: str) -> str:
    """A contender without its weights."""
    parts = contenders.parse(label).parts
    kept = [{k: v for k, v in part.knobs.items() if k not in ("omega", "scale", "bias")} for part in parts]
    return "+".join(str(contenders.Part(part.id, knobs)) for part, knobs in zip(parts, kept, strict=True))


def by_seed(c: Comparison, figure: str, label: str) -> np.ndarray:
    values = c.values(figure, label)
    return np.array([values[seed] for seed in sorted(values)])


def above(limit: float) -> Callable[[Comparison], Effects]:
    """Success at the best weight, less a limit; or what is left of the allowed loss of validity, if that is less."""

    def effects(c: Comparison) -> Effects:
        harm = by_seed(c, "validity", "sample") - own_best(c, guided(30), "validity")
        return Effects(np.minimum(own_best(c, guided(30)) - limit, LOSS - harm))

    return effects


def more(figure: str, theirs: str, ours: str = guided(30)) -> Callable[[Comparison], Effects]:
    """Our figure at our best weight, less theirs at theirs."""
    return lambda c: Effects(own_best(c, ours, figure) - own_best(c, theirs, figure))


def filtered(c: Comparison) -> Effects:
    """Success with the filter less without, at the published weight."""
    return Effects(by_seed(c, "success", guided(30)) - by_seed(c, "success", guided(30, HYBRID + UNFILTERED)))


ABSTRACT = "abstract: stronger controllability"
ASKED = "asked here, not by the paper"
FULL = ("full", "gpu")
CLAIMS = [
    Claim(
        "success",
        "More than 0.9 of its texts are positive, and their validity is at most 0.05 below the base's.",
        ABSTRACT,
        "sentiment",
        above(0.9),
        0.0,
        "fit",
    ),
    Claim(
        "hybrid",
        "Each at its best weight, a guide of the hybrid loss (lambda 0.6) steers more texts than a plain "
        "class-conditional one (lambda 1).",
        "section 4: GeDi training",
        "sentiment",
        more("success", guided(30, PLAIN)),
        0.0,
        "fit",
        scales=FULL,
    ),
    Claim(
        "filter",
        "At the published weight the filter leads to fewer failures than weighting alone.",
        "section 3.1: filtering",
        "sentiment",
        filtered,
        0.0,
        "fit",
    ),
    Claim(
        "cfg",
        "Each at its best weight, it steers more texts than classifier-free guidance from a negative prompt to a "
        "positive one.",
        ASKED,
        "sentiment",
        more("success", cfg(2)),
        0.0,
        "fit",
    ),
    Claim(
        "words",
        "Each at its best weight, it steers more texts than a bias on the words that tell most.",
        ASKED,
        "sentiment",
        more("success", words(2)),
        0.0,
        "fit",
    ),
    Claim(
        "best-of-4",
        "It steers more texts than the guide's choice among four texts, which costs four texts.",
        ASKED,
        "sentiment",
        more("success", alone("best-of-4")),
        0.0,
        "fit",
    ),
    Claim(
        "fluency",
        "Its texts are more fluent under a judge than those that the guide writes by itself.",
        "section 1: a small model's control at a large model's quality",
        "sentiment",
        more("fluency", alone("conditional")),
        0.0,
        "fit",
    ),
    Claim(
        "topic",
        "A topic has a share of texts that is more than 0.2 above the base's.",
        ABSTRACT,
        "topic",
        more("success", "sample"),
        0.2,
        "fit",
        scales=FULL,
    ),
    Claim(
        "held-out-topic",
        "A topic that the guide was never trained on has a larger share of texts than under the base.",
        "abstract: zero-shot topics from a keyword",
        "topic",
        more("success", "sample", guided(30, HYBRID + HELD_OUT)),
        0.0,
        "fit",
        scales=FULL,
    ),
    Claim(
        "polite",
        "Behind beginnings that go on rudely in 0.1 to 0.95 of all cases it has more polite texts than the base.",
        "section 5.2: detoxification",
        "rudeness",
        more("success", "sample"),
        0.0,
        "fit",
        scales=FULL,
    ),
]
