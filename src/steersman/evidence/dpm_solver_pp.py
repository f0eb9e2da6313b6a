"""DPM-Solver++'s claims: few calls, stable under guidance, and which third order is worth having when.

On ``gaussians`` the network is exact, with classifier-free guidance too, so the distance between a sample and
the end of its own trajectory is the solver's doing. The paper argues with pictures, whose values are bounded:
that data prediction beats noise prediction under guidance rests on it, so that claim is put to the trained
network of ``digits`` as well as to points, which nothing bounds.

*The grid of lambda* is ``grid=logsnr``; DDIM on it is ``order=1``. Noise prediction can't end at sigma = 0, so
wherever it takes part all contenders, and the trajectory that they are compared with, end at the noise level of
timestep 0 (:class:`ToTheFirstLevel`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from steersman.benches._pipelines import Subject
from steersman.benches.sampling import Sampling
from steersman.engine import contenders
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.evidence.study import Study
from steersman.reference import gaussians, gaussians_model


def named(text: str) -> str:
    """A contender's label, as rows have it."""
    return contenders.parse(text).label


LAMBDA = ":grid=logsnr"
DDIM, TWO = named("dpm-solver-pp:order=1" + LAMBDA), named("dpm-solver-pp" + LAMBDA)
THREE = named("dpm-solver-pp:order=3" + LAMBDA)
THREE_WHOLE = named("dpm-solver-pp:order=3:compat=false" + LAMBDA)
NOISE_TWO = named("dpm-solver-pp:algorithm_type=dpmsolver" + LAMBDA)
NOISE_THREE = named("dpm-solver-pp:order=3:algorithm_type=dpmsolver" + LAMBDA)
NOISE_THREE_S = named("dpm-solver-pp:order=3:method=singlestep:algorithm_type=dpmsolver" + LAMBDA)
OTHERS = (named("UniPCMultistepScheduler:use_exponential_sigmas=true"),)
STEPPED = (
    "ddim",
    "pndm",
    "dpm-solver-pp",
    "dpm-solver-pp:order=3",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
DIGITS_END = named("dpm-solver-pp:set_alpha_to_one=false")
DIGITS_NOISE = named("dpm-solver-pp:algorithm_type=dpmsolver:set_alpha_to_one=false")
THRESHOLDED = named("dpm-solver-pp:thresholding=true")
RINGS = {"ring": "gaussians:ring", "sharp": "gaussians:ring-sharp"}
LONG = (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100)


class ToTheFirstLevel(Sampling):
    """The sampling bench on mixtures whose pipeline ends at the noise level of timestep 0."""

    def subject(self, spec: str) -> Subject:
        pipe = gaussians_model.pipeline(spec)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, set_alpha_to_one=False)
        pipe.set_progress_bar_config(disable=True)
        return Subject(spec, pipe, "points", gaussians.mixture(spec))


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Error against calls at three guidance scales, on two grids; a trained network; at full scale ``scenes``."""
    full = scale != "quick"
    calls = [5, 8, 10, 15, 20, 50, 100]
    points = {"calls": calls, "samples": 500 if full else 200}
    found: dict[str, Study] = {}
    for ring, subject in RINGS.items():
        for w in (1.0, 3.0, 8.0):
            grid = points | {"guidance": w}
            found[f"{ring}-w{w:g}"] = Study("sampling", (DDIM, TWO, THREE, THREE_WHOLE, *OTHERS), subject, grid)
    end = ":set_alpha_to_one=false"
    few = points | {"calls": calls if full else [10, 20], "guidance": 8.0}
    duel = tuple(named(c + end) for c in (DDIM, TWO, THREE, NOISE_TWO, NOISE_THREE, NOISE_THREE_S))
    for ring, subject in RINGS.items():
        found[f"{ring}-noise"] = Study(ToTheFirstLevel(), duel, subject, few)
    for ring, subject in RINGS.items() if full else [("ring", RINGS["ring"])]:
        found[f"{ring}-timesteps"] = Study(
            "sampling", STEPPED, subject, points | {"calls": calls if full else [10, 20]}
        )
    digits = {"samples": 512 if full else 128}
    trained = ("ddim", "dpm-solver-pp", THRESHOLDED)
    more = ("pndm", "dpm-solver-pp:order=3", "UniPCMultistepScheduler") if full else ()
    found["digits-w3"] = Study(
        "sampling", (*trained, *more), "digits", digits | {"calls": [5, 10, 20, 50] if full else [10], "guidance": 3.0}
    )
    found["digits-w8"] = Study(
        "sampling",
        (*trained, DIGITS_END, DIGITS_NOISE, *more),
        "digits",
        digits | {"calls": [5, 10, 20, 50] if full else [10, 20], "guidance": 8.0},
    )
    found["digits-calls"] = Study(
        "sampling", ("ddim", "dpm-solver-pp"), "digits", digits | {"calls": list(LONG) if full else [5, 10, 20, 50]}
    )
    if full:
        for w in (1.0, 4.0, 8.0):
            found[f"scenes-w{w:g}"] = Study(
                "sampling",
                ("ddim", "pndm", "dpm-solver-pp", "dpm-solver-pp:order=3", "UniPCMultistepScheduler", "real"),
                "scenes",
                {"samples": 240, "calls": [5, 10, 20, 50], "guidance": w},
            )
    return found


def log_ratio(worse: str, better: str, calls: int, figure: str = "trajectory_error") -> Callable[[Comparison], Effects]:
    """log of the first contender's figure over the second's at equal calls, seed by seed."""

    def effects(c: Comparison) -> Effects:
        a, b = c.paired(figure, worse, better, calls=calls)
        return Effects(np.log(a / b))

    return effects


def less(figure: str, a: str, b: str, calls: int) -> Callable[[Comparison], Effects]:
    """``a``'s figure less ``b``'s at equal calls."""

    def effects(c: Comparison) -> Effects:
        one, two = c.paired(figure, a, b, calls=calls)
        return Effects(one - two)

    return effects


def fewer_for_more(few: int, many: int) -> Callable[[Comparison], Effects]:
    """log of DDIM's Frechet distance with ``many`` calls over DPM-Solver++'s with ``few``."""

    def effects(c: Comparison) -> Effects:
        long, short = c.values("frechet", "ddim", calls=many), c.values("frechet", "dpm-solver-pp", calls=few)
        seeds = sorted(long.keys() & short.keys())
        return Effects(np.log([long[s] / short[s] for s in seeds]))

    return effects


def nearly_converged(distances: Mapping[int, float]) -> float:
    """The distance at the most calls, plus a tenth of what lies between that and the distance at the fewest."""
    first, last = distances[min(distances)], distances[max(distances)]
    return last + 0.1 * (first - last)


def calls_needed(distances: Mapping[int, float], goal: float) -> int | None:
    """The fewest calls from which on all larger budgets stay at or under ``goal``; None if the largest doesn't."""
    found = None
    for calls in sorted(distances, reverse=True):
        if distances[calls] > goal:
            break
        found = calls
    return found


def calls_saved(budgets: Sequence[int]) -> Callable[[Comparison], Effects]:
    """log of DDIM's calls over DPM-Solver++'s to reach what DDIM has nearly converged to."""

    def effects(c: Comparison) -> Effects:
        table = {name: {k: c.values("frechet", name, calls=k) for k in budgets} for name in ("ddim", "dpm-solver-pp")}
        saved = []
        for seed in sorted(table["ddim"][budgets[0]]):
            ddim, ours = ({k: row[seed] for k, row in of.items()} for of in table.values())
            goal = nearly_converged(ddim)
            a, b = calls_needed(ddim, goal), calls_needed(ours, goal)
            if a is None or b is None:
                raise LookupError(f"a contender does not reach the goal with seed {seed}")
            saved.append(np.log(a / b))
        return Effects(np.array(saved))

    return effects


HALF, THREEFOLD, FIVEFOLD = float(np.log(2)), float(np.log(3)), float(np.log(5))
TWO_END, NOISE_TWO_END, NOISE_THREE_S_END = (
    named(c + ":set_alpha_to_one=false") for c in (TWO, NOISE_TWO, NOISE_THREE_S)
)
LARGE = ("full", "gpu")
CLAIMS = [
    Claim(
        "ring-half",
        "Unguided, with 20 calls on the grid of lambda, order 2 has less than half of DDIM's error (modes overlap).",
        "section 6 (few calls)",
        "ring-w1",
        log_ratio(DDIM, TWO, 20),
        HALF,
    ),
    Claim(
        "sharp-half",
        "Unguided, with 20 calls on the grid of lambda, order 2 has less than half of DDIM's error (sharp modes).",
        "section 6 (few calls)",
        "sharp-w1",
        log_ratio(DDIM, TWO, 20),
        HALF,
    ),
    Claim(
        "timesteps",
        "Unguided, with 20 calls on the pipeline's own timesteps, order 2 has less error than DDIM.",
        "section 6 (few calls)",
        "ring-timesteps",
        log_ratio("ddim", "dpm-solver-pp", 20),
    ),
    Claim(
        "guided-ddim",
        "At guidance 8 with 20 calls, order 2 has less error than DDIM.",
        "section 6 (guided sampling)",
        "ring-w8",
        log_ratio(DDIM, TWO, 20),
    ),
    Claim(
        "order-2-guided",
        "At guidance 8 with 10 calls, order 2 has less error than order 3.",
        "section 5 (order 2 for guided sampling)",
        "ring-w8",
        log_ratio(THREE, TWO, 10),
    ),
    Claim(
        "order-3-unguided",
        "Unguided, with 20 calls, order 3 has less error than order 2.",
        "section 5 (order 3 for unconditional sampling)",
        "ring-w1",
        log_ratio(TWO, THREE, 20),
    ),
    Claim(
        "whole-third-order-many",
        "Unguided, with 100 calls, the whole third order has less than half of the published third order's error.",
        "convergence order of the multistep formula",
        "ring-w1",
        log_ratio(THREE, THREE_WHOLE, 100),
        HALF,
    ),
    Claim(
        "published-third-order-few",
        "At guidance 8 with 15 calls, the published third order has less error than the whole third order.",
        "convergence order of the multistep formula",
        "ring-w8",
        log_ratio(THREE_WHOLE, THREE, 15),
    ),
    Claim(
        "noise-3s-guided",
        "At guidance 8 with 10 calls, DPM-Solver-3 (noise prediction) has over 3 times the error of order 2 here.",
        "section 3 (previous high-order solvers are unstable)",
        "ring-noise",
        log_ratio(NOISE_THREE_S_END, TWO_END, 10),
        THREEFOLD,
    ),
    Claim(
        "data-beats-noise-guided",
        "At guidance 8 with 20 calls, order 2 with data prediction has less error than with noise prediction (points).",
        "section 3 (data prediction)",
        "ring-noise",
        log_ratio(NOISE_TWO_END, TWO_END, 20),
    ),
    Claim(
        "digits-data-beats-noise",
        "At guidance 8 with 10 calls, data prediction has a lower Frechet distance than noise prediction (digits).",
        "section 3 (data prediction)",
        "digits-w8",
        less("frechet", DIGITS_NOISE, DIGITS_END, 10),
    ),
    Claim(
        "digits-guided-ddim",
        "At guidance 3 with 10 calls, order 2 has a lower Frechet distance than DDIM (digits).",
        "abstract",
        "digits-w3",
        less("frechet", "ddim", "dpm-solver-pp", 10),
    ),
    Claim(
        "digits-thresholding",
        "At guidance 8 with 20 calls, dynamic thresholding lowers order 2's Frechet distance (digits).",
        "section 4.2 (thresholding)",
        "digits-w8",
        less("frechet", "dpm-solver-pp", THRESHOLDED, 20),
    ),
    Claim(
        "digits-ten-for-fifty",
        "Ten calls of order 2 match fifty of DDIM (Frechet distance within 5%, digits).",
        "abstract (10 to 20 calls)",
        "digits-calls",
        fewer_for_more(10, 50),
        -0.05,
    ),
    Claim(
        "digits-fifth-of-calls",
        "To what DDIM converges to, order 2 takes a fifth of DDIM's calls (digits).",
        "abstract (15 to 20 calls for 100 to 250)",
        "digits-calls",
        calls_saved(LONG),
        FIVEFOLD - 1e-9,
        scales=LARGE,
    ),
    Claim(
        "scenes-guided-ddim",
        "At guidance 8 with 10 calls, order 2 has a lower Frechet distance than DDIM (scenes).",
        "abstract",
        "scenes-w8",
        less("frechet", "ddim", "dpm-solver-pp", 10),
        scales=LARGE,
    ),
    Claim(
        "scenes-attributes",
        "At guidance 4 with 10 calls, order 2's samples show more of the attributes asked for than DDIM's (scenes).",
        "abstract",
        "scenes-w4",
        less("attribute_accuracy", "dpm-solver-pp", "ddim", 10),
        scales=LARGE,
    ),
]
