"""Evidence for PEARL: it loses nothing, its schedule yields what the formula says, and where that saves time.

Two cores with small models are not two devices, so the schedule is shown where forwards take a given time (simulated:
sleeping overlaps perfectly), once with laws that accept independently and once with the shipped ``docs`` models, and
the real times of two processes with a thread each are reported beside plain speculative decoding with one thread (half
of what the two processes have) and with both. Speculative decoding runs one model at a time in the calling thread.
Texts are greedy, so a prompt is one unit, and the models are one fit: verdicts speak of these models.

Every variant, speculative decoding too, may choose among the same block lengths: a prompt is judged at the length that
was fastest on the other prompts. (Assisted generation chooses between two schedules of transformers in the same way.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from steersman.benches._schedule import Schedule
from steersman.benches.speculation import SpeculationBench
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.errors import TrialError
from steersman.evidence.study import Study

LENGTHS = (2, 4)
AUTO, ALONE = "pearl", "autoregressive"
FULL = tuple(f"pearl:gamma={g}" for g in LENGTHS)
LONGER = "pearl:gamma=6"
NO_PRE = tuple(f"pearl:gamma={g}:variant=no-pre" for g in LENGTHS)
NO_POST = tuple(f"pearl:gamma={g}:variant=no-post" for g in LENGTHS)
SD = tuple(f"pearl:gamma={g}:variant=sd" for g in LENGTHS)
SD_HERE = tuple(f"pearl:gamma={g}:variant=sd" for g in (1, 2, 4))
ASSISTED = ("assisted", "assisted:schedule=heuristic")
RANKS = "pearl:engine=distributed"
JUDGED: Mapping[str, Any] = {"latency": "5:20", "draft": "docs/tiny", "temperature": 0.0}
HERE: Mapping[str, Any] = {"draft": "docs/tiny", "temperature": 0.0}
SIMULATED, REAL = "simulated_ms_per_token", "ms_per_token"


def studies(scale: str, seed: int) -> dict[str, Study]:
    """The comparisons behind the claims."""
    quick = scale == "quick"
    prompts = {"prompt_tokens": 32, "contexts": 0, "temperature": 0.0, "draft": "docs/tiny"}
    devices = {**prompts, "latency": "5:20", "threads": 2, "count": 12, "new_tokens": 28}
    here = {**prompts, "count": 8, "new_tokens": 40}
    if not quick:
        more = {"draft": ["docs/tiny", "docs/small"], "temperature": [0.0, 1.0]}
        devices |= {**more, "latency": ["5:20", "5:40"], "count": 20, "new_tokens": 64}
        here |= {**more, "count": 100, "new_tokens": 128}
    grid: dict[str, Any] = {"ratio": 4.0, "new_tokens": 120, "t_draft": 15.0}
    if not quick:
        grid = {"ratio": [2.0, 4.0, 8.0], "acceptance": [0.5, 0.8, 0.9], "new_tokens": 400, "t_draft": 15.0}
    lengths = (2, 4) if quick else (2, 4, 8)
    processes = (RANKS,) if quick else (RANKS, *(f"{RANKS}:gamma={g}" for g in (1, 2, 4)))
    return {
        "schedule": Study(Schedule(), tuple(f"pearl:gamma={g}" for g in lengths), grid=grid),
        "devices": Study(
            "speculation",
            (ALONE, *ASSISTED, *SD, *NO_PRE, *NO_POST, *FULL, LONGER, AUTO),
            "docs/base",
            devices,
            seeds=1,
        ),
        "both threads": Study(
            "speculation", (ALONE, *SD_HERE, *processes), "docs/base", {**here, "threads": 2}, seeds=1
        ),
        "a thread each": Study(
            SpeculationBench(thread_each=True), (*SD_HERE, RANKS), "docs/base", {**here, "threads": 1}, seeds=1
        ),
    }


def own_best(comparison: Comparison, figure: str, labels: Sequence[str], **setting: Any) -> np.ndarray:
    """By prompt, the figure of the contender that is best on the mean of the other prompts."""
    columns = np.array([comparison.paired_items(figure, label, labels[0], **setting)[0] for label in labels])
    others = (columns.sum(1, keepdims=True) - columns) / (columns.shape[1] - 1)
    return columns[others.argmin(0), np.arange(columns.shape[1])]


def times_faster(
    ours: Sequence[str], rivals: Sequence[str], setting: Mapping[str, Any] = JUDGED, figure: str = SIMULATED
) -> Callable[[Comparison], Effects]:
    """By prompt: the rivals' time for a token as a multiple of ours, each at its own best."""

    def effects(comparison: Comparison) -> Effects:
        return Effects(own_best(comparison, figure, rivals, **setting) / own_best(comparison, figure, ours, **setting))

    return effects


def equal_texts(comparison: Comparison) -> Effects:
    """Of every contender that drafts: minus the share of greedy texts that aren't plain generation's."""
    rows = [row for row in comparison.rows if row.contender != ALONE and row.setting["temperature"] == 0]
    lacking = [row.contender for row in rows if "equal_text" not in row.figures]
    if lacking or not rows:
        raise TrialError(f"no texts of {', '.join(lacking) or 'any contender'}")
    return Effects(np.array([row.figures["equal_text"] - 1 for row in rows]), kind="exact")


def yield_ratio(comparison: Comparison) -> Effects:
    """By seed: the mean over settings and block lengths."""
    seeds = sorted({row.seed for row in comparison.rows})
    rows = [[row for row in comparison.rows if row.seed == seed] for seed in seeds]
    failed = [row.error for row in comparison.rows if row.status != "ok"]
    if failed:
        raise TrialError(f"a run failed: {failed[0]}")
    return Effects(np.array([np.mean([row.figures["yield_ratio"] for row in found]) for found in rows]))


CLAIMS = [
    Claim(
        "lossless",
        "Greedy texts of PEARL (blocks of 2, 4, 6 and as measured), of its variants no-pre, no-post and sd (2 and 4) "
        "and of assisted generation are those of the target alone, token for token (simulated devices).",
        "section 3 (lossless)",
        "devices",
        equal_texts,
        margin=-1e-9,
        unit="exact",
    ),
    Claim(
        "lossless-ranks",
        "Greedy texts of two processes, and of speculative decoding (blocks of 1, 2 and 4) in one, are those of the "
        "target alone, token for token.",
        "section 3 (lossless)",
        "both threads",
        equal_texts,
        margin=-1e-9,
        unit="exact",
    ),
    Claim(
        "yield-at-least",
        "With independent acceptance, simulated: at least 0.95 of R(a, gamma) / max(gamma t_draft, t_target) tokens "
        "by second.",
        "own formula (section 4 has the schedule)",
        "schedule",
        yield_ratio,
        margin=0.95,
    ),
    Claim(
        "yield-at-most",
        "With independent acceptance, simulated: at most 1.05 of it.",
        "own formula (section 4 has the schedule)",
        "schedule",
        lambda comparison: -yield_ratio(comparison),
        margin=-1.05,
    ),
    Claim(
        "speculative-decoding",
        "Simulated devices, c = 4: a token takes speculative decoding longer, each at its own best block length.",
        "abstract (1.50 times vanilla speculative decoding)",
        "devices",
        times_faster(FULL, SD),
        margin=1.0,
        unit="item",
    ),
    Claim(
        "autoregressive",
        "Simulated devices, c = 4: a token takes the target alone longer.",
        "abstract (up to 4.43 times)",
        "devices",
        times_faster(FULL, (ALONE,)),
        margin=1.0,
        unit="item",
    ),
    Claim(
        "assisted",
        "Simulated devices, c = 4: a token takes transformers' assisted generation 1.333 times as long or longer, on "
        "the mean of prompts.",
        "not in the paper",
        "devices",
        times_faster(FULL, ASSISTED),
        margin=1 / 0.75,
        unit="item",
    ),
    Claim(
        "pre-verify",
        "Simulated devices, c = 4: without pre-verify (done losslessly) a token takes longer.",
        "section 5 (ablation)",
        "devices",
        times_faster(FULL, NO_PRE),
        margin=1.0,
        unit="item",
    ),
    Claim(
        "post-verify",
        "Simulated devices, c = 4: without post-verify a token takes longer.",
        "section 5 (ablation)",
        "devices",
        times_faster(FULL, NO_POST),
        margin=1.0,
        unit="item",
    ),
    Claim(
        "length",
        "Simulated devices, c = 4: a token takes the better of blocks of 2 and 6 at least 0.95 times as long as blocks "
        "of c, on the mean of prompts.",
        "section 4 (gamma = c)",
        "devices",
        times_faster((FULL[1],), (FULL[0], LONGER)),
        margin=0.95,
        unit="item",
    ),
    Claim(
        "auto",
        "Simulated devices, c = 4: a token takes the better of blocks of 2 and 4 at least 0.9 times as long as the "
        "measured block length, on the mean of prompts.",
        "not in the paper",
        "devices",
        times_faster((AUTO,), FULL),
        margin=0.9,
        unit="item",
    ),
    Claim(
        "cpu-both-threads",
        "Two processes with a thread each, real times: a token takes speculative decoding with both threads longer.",
        "not in the paper",
        "both threads",
        times_faster((RANKS,), SD_HERE, HERE, REAL),
        margin=1.0,
        unit="item",
    ),
    Claim(
        "cpu-a-thread-each",
        "Two processes with a thread each, real times: a token takes speculative decoding with one thread longer.",
        "not in the paper",
        "a thread each",
        times_faster((RANKS,), SD_HERE, HERE, REAL),
        margin=1.0,
        unit="item",
    ),
    Claim(
        "cpu-autoregressive",
        "Two processes with a thread each, real times: a token takes the target alone with both threads longer.",
        "not in the paper",
        "both threads",
        times_faster((RANKS,), (ALONE,), HERE, REAL),
        margin=1.0,
        unit="item",
    ),
]
