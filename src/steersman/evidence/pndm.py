"""PNDM's claims: smaller error than DDIM at equal calls, second order, 50 calls for DDIM's 1000 steps.

The paper judges by Frechet inception distance on photographs. Here the error can be measured directly:
on ``gaussians`` the network is exact, and whatever separates a sample from the end of its own trajectory is
the sampler's doing. ``digits`` shows what is left of it in a trained network's samples. Budgets are network
calls, so F-PNDM pays for its Runge-Kutta start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from steersman.benches._pipelines import Subject
from steersman.benches.sampling import Sampling
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.evidence.study import Study
from steersman.reference import gaussians, gaussians_model

S, F, PLMS = "pndm:variant=s-pndm", "pndm:variant=f-pndm", "pndm"
OTHERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
RINGS = {"ring": "gaussians:ring", "sharp": "gaussians:ring-sharp"}


class OtherNoise(Sampling):
    """The sampling bench on mixtures that were noised by another schedule."""

    def __init__(self, beta_schedule: str) -> None:
        self.beta_schedule = beta_schedule

    def subject(self, spec: str) -> Subject:
        pipe = gaussians_model.pipeline(spec, beta_schedule=self.beta_schedule)
        pipe.set_progress_bar_config(disable=True)
        return Subject(spec, pipe, "points", gaussians.mixture(spec))


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Error against calls on both rings, few calls against DDIM's 1000 steps, and a trained network."""
    full = scale != "quick"
    samplers = ("ddim", S, PLMS, F, *OTHERS, *(("rk4",) if full else ()))
    calls = [10, 25, 50, 100, 250] if full else [10, 50, 100]
    found = {
        name: Study("sampling", samplers, subject, {"calls": calls, "samples": 500}) for name, subject in RINGS.items()
    }
    for name, subject in RINGS.items():
        found[f"{name}-thousand"] = Study("sampling", ("ddim", F), subject, {"calls": [50, 1000], "samples": 500})
    found["digits"] = Study(
        "sampling", ("ddim", S, F, "real"), "digits", {"calls": [10, 20, 50], "samples": 512 if full else 128}
    )
    if full:
        for schedule in ("scaled_linear", "squaredcos_cap_v2"):
            found[f"ring-{schedule}"] = Study(
                OtherNoise(schedule), samplers, RINGS["ring"], {"calls": calls, "samples": 500}
            )
    return found


def log_ratio(a: str, b: str, calls: int) -> Callable[[Comparison], Effects]:
    """log of a's trajectory error over b's at equal calls, seed by seed."""

    def effects(c: Comparison) -> Effects:
        worse, better = c.paired("trajectory_error", a, b, calls=calls)
        return Effects(np.log(worse / better))

    return effects


def order(contender: str) -> Callable[[Comparison], Effects]:
    """log2 of the error at 50 calls over the error at 100."""

    def effects(c: Comparison) -> Effects:
        coarse = c.values("trajectory_error", contender, calls=50)
        fine = c.values("trajectory_error", contender, calls=100)
        seeds = sorted(coarse.keys() & fine.keys())
        return Effects(np.log2([coarse[s] / fine[s] for s in seeds]))

    return effects


def as_good_as_a_thousand(c: Comparison) -> Effects:
    """log of the sliced Wasserstein distance of DDIM with 1000 calls over F-PNDM's with 50."""
    long = c.values("sliced_wasserstein", "ddim", calls=1000)
    short = c.values("sliced_wasserstein", F, calls=50)
    seeds = sorted(long.keys() & short.keys())
    return Effects(np.log([long[s] / short[s] for s in seeds]))


def less_frechet(contender: str, calls: int) -> Callable[[Comparison], Effects]:
    """DDIM's Frechet distance less the contender's, at equal calls."""

    def effects(c: Comparison) -> Effects:
        ddim, other = c.paired("frechet", "ddim", contender, calls=calls)
        return Effects(ddim - other)

    return effects


HALF = float(np.log(2))
CLAIMS = [
    Claim(
        "ring-half",
        "At 100 calls F-PNDM's error is less than half of DDIM's, where the data's modes overlap.",
        "section 4 (quality at equal steps)",
        "ring",
        log_ratio("ddim", F, 100),
        HALF,
    ),
    Claim(
        "sharp-half",
        "At 100 calls F-PNDM's error is less than half of DDIM's, where the data's modes are sharp.",
        "section 4 (quality at equal steps)",
        "sharp",
        log_ratio("ddim", F, 100),
        HALF,
    ),
    Claim(
        "s-second-order",
        "S-PNDM converges with second order: from 50 to 100 calls the error falls by more than 2 to the 1.5.",
        "section 3 (convergence order)",
        "ring",
        order(S),
        1.5,
    ),
    Claim(
        "f-second-order",
        "F-PNDM converges with second order: from 50 to 100 calls the error falls by more than 2 to the 1.5.",
        "section 3 (convergence order)",
        "ring",
        order(F),
        1.5,
    ),
    Claim(
        "ring-thousand",
        "F-PNDM with 50 calls matches DDIM with 1000 (sliced Wasserstein within 5%), where modes overlap.",
        "abstract",
        "ring-thousand",
        as_good_as_a_thousand,
        -0.05,
    ),
    Claim(
        "sharp-thousand",
        "F-PNDM with 50 calls matches DDIM with 1000 (sliced Wasserstein within 5%), where modes are sharp.",
        "abstract",
        "sharp-thousand",
        as_good_as_a_thousand,
        -0.05,
    ),
    Claim(
        "digits-s",
        "With 20 calls S-PNDM's samples of a trained network have a lower Frechet distance than DDIM's.",
        "section 4 (quality at equal steps)",
        "digits",
        less_frechet(S, 20),
    ),
    Claim(
        "digits-f",
        "With 50 calls F-PNDM's samples of a trained network have a lower Frechet distance than DDIM's.",
        "section 4 (quality at equal steps)",
        "digits",
        less_frechet(F, 50),
    ),
]
