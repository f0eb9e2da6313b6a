"""Evidence for multi-draft decoding: what bounds and verifiers are worth on real pairs, and a tree against a chain.

The pairs are the shipped ``docs`` models: the target has 8M parameters, the drafts 0.3M and 1M. There is one fit of
each, so verdicts speak of these models. Acceptance is computed at contexts that the target wrote at the temperature
at hand; a seed has its own prompts and texts. That RRS and K-SEQ stay below the bound with replacement, RRSw below that
without, and that the greedy verifier reaches its own are theorems, and tested, not shown here. Neither are speed-ups
with LLaMA or EAGLE drafts: small models on two cores are bound by computation, and speculation buys time where they are
bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.evidence.study import Study

OURS = "multi-draft"
OTHERS = ("rrs", "k-seq", "rrsw")
TREE = f"{OURS}:n_drafts=3:depth=3"  # 3 + 9 + 27 nodes
CHAIN = f"{OURS}:n_drafts=1:depth=39"  # as many
SHORT = f"{OURS}:n_drafts=1:depth=3"
COLD, WARM = 0.2, 1.0


def studies(scale: str, seed: int) -> dict[str, Study]:
    """48 contexts a pair and temperature, 6 texts of 48 tokens (quick); 256, 8 of 96 (full); 512, 16 of 128 (gpu)."""
    contexts, prompts, count, new = {"quick": (48, 6, 6, 48), "full": (256, 8, 8, 96), "gpu": (512, 16, 16, 128)}[scale]
    laws = {
        "draft": ["docs/tiny", "docs/small"],
        "temperature": [COLD, 0.6, WARM],
        "n_drafts": [2, 3] if scale == "quick" else [2, 3, 4],
        "contexts": contexts,
        "count": prompts,
    }
    texts = {"draft": "docs/tiny", "temperature": WARM, "new_tokens": new, "count": count, "contexts": 0}
    return {
        "acceptance": Study("acceptance", ("single", *OTHERS, "spechub", OURS), "docs/base", laws, seeds=5),
        "texts": Study("speculation", (TREE, CHAIN, SHORT), "docs/base", texts, seeds=5),
    }


def by_seed(values: Callable[[Comparison], np.ndarray]) -> Callable[[Comparison], Effects]:
    def effects(comparison: Comparison) -> Effects:
        return Effects(values(comparison))

    return effects


def mean(comparison: Comparison, figure: str, contender: str, **setting: Any) -> np.ndarray:
    """By seed: a contender's figure with three drafts, averaged over both pairs and all temperatures (or the given)."""
    rows = comparison.select(contender, n_drafts=3, **setting)
    seeds = sorted({row.seed for row in rows})
    return np.array([np.mean([row.figures[figure] for row in rows if row.seed == seed]) for seed in seeds])


def over_others(temperature: float) -> Callable[[Comparison], Effects]:
    """By seed: what greedy verification keeps beyond the best of the other verifiers."""

    def values(comparison: Comparison) -> np.ndarray:
        ours, *theirs = (mean(comparison, "acceptance", c, temperature=temperature) for c in (OURS, *OTHERS))
        return ours - np.max(theirs, axis=0)

    return by_seed(values)


def tree_minus_chain(comparison: Comparison) -> np.ndarray:
    """By seed: tokens for each call of the target, the tree's minus those of a chain of as many nodes."""
    ours, theirs = comparison.paired("tokens_per_target_call", TREE, CHAIN)
    return ours - theirs


CLAIMS = [
    Claim(
        "without-replacement",
        "Of three drafts without replacement more than 0.01 more can be kept than of three with replacement, on the "
        "mean of both drafts and all temperatures.",
        "abstract",
        "acceptance",
        by_seed(lambda c: mean(c, "bound_without", OURS) - mean(c, "bound_with", OURS)),
        margin=0.01,
        unit="seed",
    ),
    Claim(
        "k-seq-gap",
        "K-SEQ keeps less of three drafts than could be, by more than 0.01 on the mean of both drafts and all "
        "temperatures.",
        "abstract (existing verification has a gap)",
        "acceptance",
        by_seed(lambda c: mean(c, "gap", "k-seq")),
        margin=0.01,
        unit="seed",
    ),
    Claim(
        "rrsw-gap",
        "Recursive rejection without replacement keeps less of three drafts than could be, by more than 0.01 on the "
        "mean of both drafts and all temperatures.",
        "abstract (existing verification has a gap)",
        "acceptance",
        by_seed(lambda c: mean(c, "gap", "rrsw")),
        margin=0.01,
        unit="seed",
    ),
    Claim(
        "greedy-cold",
        "At temperature 0.2 greedy drafting and verification keeps more of three drafts than the best of rrs, k-seq "
        "and rrsw, on the mean of both drafts.",
        "abstract (greedy drafts)",
        "acceptance",
        over_others(COLD),
        unit="seed",
    ),
    Claim(
        "greedy-warm",
        "At temperature 1.0 greedy drafting and verification keeps more of three drafts than the best of rrs, k-seq "
        "and rrsw, on the mean of both drafts.",
        "abstract (greedy drafts)",
        "acceptance",
        over_others(WARM),
        unit="seed",
    ),
    Claim(
        "tree",
        "At temperature 1.0 a tree of three drafts gives more tokens for each call of the target than a chain of as "
        "many nodes.",
        "section 1 (more drafts for the same call)",
        "texts",
        by_seed(tree_minus_chain),
        unit="seed",
    ),
]
