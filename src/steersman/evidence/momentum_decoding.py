"""Evidence for momentum decoding: fewer loops than greedy search, at less cost than contrastive search.

The language models are the shipped ``docs`` ones, of which there is one fit for each size: prompts are what is
repeated, and verdicts speak of these models. Decoding is deterministic, so a prompt is one unit. What the
paper claims for GPT2-XL (MAUVE, human judgement) is not shown here.

Contrastive search is steersman's own: its candidates run as a tree over one key-value cache, which makes it a
harder rival in speed than the version that the paper timed.
"""

from __future__ import annotations

from collections.abc import Callable

from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.evidence.study import Study

OURS, GREEDY, BLOCKING, CONTRASTIVE = "momentum-decoding", "greedy", "no-repeat-ngram", "contrastive"

BASELINES = (GREEDY, "beam", BLOCKING, "repetition-penalty", CONTRASTIVE, "nucleus")
ABLATION = (
    f"{OURS}:resistance=constant",
    f"{OURS}:resistance=log",
    f"{OURS}:resistance=exp",
    f"{OURS}:resistance=ngram:top_k=2000",
    f"{OURS}:alpha=0.1",
    f"{OURS}:alpha=0.4",
)


def studies(scale: str, seed: int) -> dict[str, Study]:
    """30 prompts of 32 tokens and 64 new ones (quick), 100 and 128 (full), 100 and 256 (gpu)."""
    count, new, turns = {"quick": (30, 64, 6), "full": (100, 128, 10), "gpu": (100, 256, 10)}[scale]
    grid = {"prompt_tokens": 32, "new_tokens": new}
    together = {**grid, "count": count, "batch": min(count, 50), "judge": "docs/base"}
    return {
        # 1M parameters, judged by the model of 8M.
        "texts": Study("decoding", (*BASELINES, OURS, *ABLATION), "docs/small", together, seeds=1),
        # 8M parameters, its own judge: for what needs no judge.
        "larger": Study("decoding", (GREEDY, BLOCKING, CONTRASTIVE, OURS), "docs/base", together, seeds=1),
        "speed": Study(
            "decoding",
            (GREEDY, BLOCKING, f"{CONTRASTIVE}:top_k=1", CONTRASTIVE, OURS),
            "docs/base",
            {**grid, "count": 1, "batch": 1, "judge": "docs/base"},
            seeds=turns,
        ),
    }


def more(figure: str, rival: str, factor: float = 1.0) -> Callable[[Comparison], Effects]:
    """By prompt: the figure of momentum decoding minus ``factor`` times that of the rival."""

    def effects(comparison: Comparison) -> Effects:
        ours, theirs, _ = comparison.paired_items(figure, OURS, rival)
        return Effects(ours - factor * theirs)

    return effects


def speed_ratio(comparison: Comparison) -> Effects:
    """By run: contrastive search's time for a token as a multiple of momentum decoding's."""
    ours, theirs = comparison.paired("ms_per_token", OURS, CONTRASTIVE)
    return Effects(theirs / ours)


CLAIMS = [
    Claim(
        "loops-1m",
        "With 1M parameters its texts are more diverse than those of greedy search by more than 0.2.",
        "abstract (degeneration)",
        "texts",
        more("diversity", GREEDY),
        margin=0.2,
        unit="item",
    ),
    Claim(
        "loops-8m",
        "With 8M parameters its texts are more diverse than those of greedy search by more than 0.2.",
        "abstract (degeneration)",
        "larger",
        more("diversity", GREEDY),
        margin=0.2,
        unit="item",
    ),
    Claim(
        "contrastive-diversity-1m",
        "With 1M parameters its texts have at least 0.9 times the diversity of contrastive search.",
        "abstract (comparable to contrastive search)",
        "texts",
        more("diversity", CONTRASTIVE, 0.9),
        unit="item",
    ),
    Claim(
        "contrastive-diversity-8m",
        "With 8M parameters its texts have at least 0.9 times the diversity of contrastive search.",
        "abstract (comparable to contrastive search)",
        "larger",
        more("diversity", CONTRASTIVE, 0.9),
        unit="item",
    ),
    Claim(
        "contrastive-coherence",
        "Its texts are as coherent as those of contrastive search, or less by under 0.1 nats a token.",
        "abstract (comparable to contrastive search)",
        "texts",
        more("coherence", CONTRASTIVE),
        margin=-0.1,
        unit="item",
    ),
    Claim(
        "contrastive-speed",
        "A token takes contrastive search at least 1.3 times as long (8M parameters, one text at a time).",
        "abstract (speed)",
        "speed",
        speed_ratio,
        margin=1.3,
        unit="seed",
    ),
    Claim(
        "blocking-diversity",
        "Its texts are more diverse than those of 4-gram blocking, which costs the same and is one argument.",
        "not in the paper",
        "texts",
        more("diversity", BLOCKING),
        unit="item",
    ),
    Claim(
        "blocking-coherence",
        "Its texts are as coherent as those of 4-gram blocking, or less by under 0.1 nats a token.",
        "not in the paper",
        "texts",
        more("coherence", BLOCKING),
        margin=-0.1,
        unit="item",
    ),
]
