"""MMD-DDM's claims: a short fine-tuning makes samples of few calls better, for every judge.

The loss and the choice of the checkpoint see the features of one classifier and the training images. The
figures are taken in the features of another classifier, and in principal components of the pixels, against
held-out images. ``none`` is the given network under DDIM at equal calls; ``continue`` trains it on with its own
loss for as many network passes as the fine-tuning took. A unit is a fit: noise, batches and the held-out split
are new in each. The learning rate was chosen on two fits of a
seed that is not used here, with the judge's figures in view; ``continue`` had no such search.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.evidence.study import Study

FIT = "batch_size=64:learning_rate=5e-05"
QUICK = f"mmd-ddm:calls=5:steps=40:{FIT}:holdout=0.25:validate_every=20:checkpointing=false"
FULL = f"mmd-ddm:calls=5:steps=200:{FIT}:holdout=0.25:validate_every=20:checkpointing=false"
ON = "continue:steps=40:calls=5:batch_size=64"
SOLVER = "none+DPMSolverMultistepScheduler"


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Five fits for 5 calls, sampled at 5 and at 20; at scale full also longer fits, and fits for 10 and 20."""
    found = {
        "five": Study(
            "finetuning", (QUICK, "none", ON, SOLVER, "real"), grid={"calls": [5, 20], "samples": 300}, seeds=5
        )
    }
    if scale != "quick":
        tuned = (FULL, FULL.replace("calls=5", "calls=10"), FULL.replace("calls=5", "calls=20"))
        found["longer"] = Study("finetuning", (*tuned, "none", "real"), grid={"calls": [5, 10, 20, 50]}, seeds=5)
    return found


def drop(figure: str, fit: str, other: str, calls: int = 5, other_calls: int | None = None) -> Callable[..., Effects]:
    """The share by which a fit's figure is below another contender's, fit by fit."""

    def effects(c: Comparison) -> Effects:
        ours = c.values(figure, fit, calls=calls)
        theirs = c.values(figure, other, calls=other_calls or calls)
        seeds = sorted(ours.keys() & theirs.keys())
        return Effects(np.array([1 - ours[s] / theirs[s] for s in seeds]))

    return effects


def gain(figure: str, fit: str, other: str, calls: int = 5) -> Callable[[Comparison], Effects]:
    """The difference of a figure, fit by fit."""

    def effects(c: Comparison) -> Effects:
        a, b = c.paired(figure, fit, other, calls=calls)
        return Effects(a - b)

    return effects


CLAIMS = [
    Claim(
        "frechet",
        "At 5 calls, fine-tuning lowers the Frechet distance by more than 30% against DDIM, in another classifier's "
        "features.",
        "abstract: fidelity at few steps",
        "five",
        drop("frechet", QUICK, "none"),
        0.3,
        "fit",
    ),
    Claim(
        "pixels",
        "At 5 calls, fine-tuning lowers the Frechet distance by more than 30% against DDIM, in principal components "
        "of the pixels.",
        "abstract: fidelity at few steps",
        "five",
        drop("frechet_pixels", QUICK, "none"),
        0.3,
        "fit",
    ),
    Claim(
        "continue",
        "At 5 calls, its Frechet distance is more than 20% below that of training on with the usual loss for as many "
        "network passes.",
        "asked here, not by the paper",
        "five",
        drop("frechet", QUICK, ON),
        0.2,
        "fit",
    ),
    Claim(
        "solver",
        "At 5 calls, its Frechet distance is below that of DPM-Solver++(2M) on the given network.",
        "abstract: against accelerated samplers",
        "five",
        drop("frechet", QUICK, SOLVER),
        0.0,
        "fit",
    ),
    Claim(
        "twenty",
        "At 5 calls, its Frechet distance is below that of DDIM with 20 calls.",
        "asked here, not by the paper",
        "five",
        drop("frechet", QUICK, "none", 5, 20),
        0.0,
        "fit",
    ),
    Claim(
        "recall",
        "At 5 calls, recall does not fall by more than 0.05 against DDIM.",
        "asked here, not by the paper",
        "five",
        gain("recall", QUICK, "none"),
        -0.05,
        "fit",
    ),
]
