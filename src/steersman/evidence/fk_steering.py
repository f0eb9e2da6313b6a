"""FK steering's claims: more of the reward than choosing at the end, nearer to the tilted law, with few particles.

The paper's rewards are human-preference models on large pipelines; none of that is here. What can be shown here is
what those results rest on. On ``gaussians`` the tilted law is known exactly, so distances to it are the sampler's
doing: particles that are resampled on the way against the same number that are chosen from at the end (best-of-n,
importance sampling), at equal network calls. On ``digits`` nothing is asked of the model, one digit in ten is wanted,
the reward is one classifier's log-probability of it and the judge another classifier; at full scale ``scenes`` leaves
position and background of a drawing to the model and wants one of the 25 pairs.

The unit is the run, k particles that share ancestors, on ``digits`` and ``scenes``; a seed's pool of 256 runs, one
particle of each, where distances between laws are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from steersman.engine import contenders
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.evidence.study import Study


def named(text: str) -> str:
    """A contender's label, as rows have it."""
    return contenders.parse(text).label


FK, BEST, IS, BASE = "fk-steering", "best-of-n", "importance", "base"
MULTINOMIAL = named("fk-steering:resampler=multinomial")
ADAPTIVE = named("fk-steering:ess_threshold=0.5")
MAX, SUM, NOW = (named(f"fk-steering:potential={name}") for name in ("max", "sum", "immediate"))
OFFICIAL_MAX = named("fk-steering:potential=max:official_terminal=true")
OFFICIAL_SUM = named("fk-steering:potential=sum:official_terminal=true")
DRIVEN = named("fk-steering:gradient=0.5")
SDE = 'dpm-solver-pp:algorithm_type="sde-dpmsolver++"'
FAST, FAST_DDIM = named("fk-steering+" + SDE), named("fk-steering+ddim:eta=1")


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Distance to the tilt against k, potentials and terminal rules; a wanted digit; at full scale wanted scenes."""
    full = scale != "quick"
    ring = {"runs": 256, "scale": 4.0}
    wanted = {"runs": 64 if full else 32, "calls": [25]}
    found = {
        "tilt": Study(
            "steering",
            (BASE, BEST, IS, FK, MULTINOMIAL, ADAPTIVE, DRIVEN, "real"),
            "gaussians:ring",
            ring | {"calls": [50], "particles": [2, 4, 8, 16, 64]},
        ),
        "rules": Study(
            "steering",
            (FK, MAX, SUM, NOW, OFFICIAL_MAX, OFFICIAL_SUM, "real"),
            "gaussians:ring",
            ring | {"calls": [50], "particles": [8, 64], "scale": 2.0},
        ),
        "samplers": Study(
            "steering",
            (FAST_DDIM, FAST, "real"),
            "gaussians:ring",
            ring | {"calls": [15, 25, 50], "particles": [16]},
        ),
        "digits": Study("steering", (BASE, BEST, IS, FK, MAX), "digits", wanted | {"particles": [2, 4, 8]}),
    }
    if full:
        found["digits-samplers"] = Study(
            "steering", (FAST_DDIM, FAST), "digits", wanted | {"calls": [10, 25, 50], "particles": [4]}
        )
        found["scenes"] = Study(
            "steering",
            (BASE, BEST, IS, FK, MAX),
            "scenes",
            {"runs": 12, "calls": [25], "particles": [2, 4, 8], "scale": 5.0, "guidance": 1.0},
        )
    return found


# -------------------------------------------------------------------- effects


def nearer(a: str, b: str, figure: str = "sliced_wasserstein", **setting: float) -> Callable[[Comparison], Effects]:
    """log of b's distance over a's, seed by seed."""

    def effects(c: Comparison) -> Effects:
        ours, theirs = c.paired(figure, a, b, **setting)
        return Effects(np.log(theirs / ours))

    return effects


def more_particles(contender: str, figure: str, few: int, many: int, logs: bool) -> Callable[[Comparison], Effects]:
    """The figure with many particles less that with few, or the log of the few's distance over the many's."""

    def effects(c: Comparison) -> Effects:
        low, high = c.values(figure, contender, particles=few), c.values(figure, contender, particles=many)
        a, b = (np.array([values[seed] for seed in sorted(low)]) for values in (low, high))
        return Effects(np.log(a / b) if logs else b - a)

    return effects


def within(contender: str, factor: float, particles: int) -> Callable[[Comparison], Effects]:
    """How far the distance is below so many times that of exact samples, in logarithms."""

    def effects(c: Comparison) -> Effects:
        ours, floor = c.paired("sliced_wasserstein", contender, "real", particles=particles)
        return Effects(np.log(factor * floor / ours))

    return effects


def higher(figure: str, a: str, b: str, **setting: float) -> Callable[[Comparison], Effects]:
    """a's figure less b's, run by run."""

    def effects(c: Comparison) -> Effects:
        ours, theirs, _ = c.paired_items(figure, a, b, **setting)
        return Effects(ours - theirs)

    return effects


def more_often(a: str, b: str, **setting: float) -> Callable[[Comparison], Effects]:
    """Runs whose one sample shows what was wanted, under a and under b."""

    def effects(c: Comparison) -> Effects:
        ours, theirs, _ = c.paired_items("best_accuracy", a, b, **setting)
        return Effects(ours, kind="paired-rate", reference=theirs)

    return effects


HEADLINE, POTENTIALS, HERE = "abstract: few particles", "section 3.1: potentials", "asked here, not by the paper"
CLAIMS = [
    Claim(
        "tilt-importance",
        "With 4 particles its samples are more than 10% nearer to the tilted law than importance sampling's.",
        HEADLINE,
        "tilt",
        nearer(FK, IS, particles=4),
        0.1,
        "seed",
    ),
    Claim(
        "tilt-best-of-n",
        "With 4 particles its samples are nearer to the tilted law than best-of-4.",
        HEADLINE,
        "tilt",
        nearer(FK, BEST, particles=4),
        0.0,
        "seed",
    ),
    Claim(
        "tilt-best-of-16",
        "With 16 particles its samples are less than half as far from the tilted law as best-of-16.",
        HEADLINE,
        "tilt",
        nearer(FK, BEST, particles=16),
        math.log(2),
        "seed",
    ),
    Claim(
        "tilt-particles",
        "With 16 particles it is more than 30% nearer to the tilted law than with 2.",
        "section 4: more particles",
        "tilt",
        more_particles(FK, "sliced_wasserstein", 2, 16, True),
        0.3,
        "seed",
    ),
    Claim(
        "tilt-limit",
        "With 64 particles it is less than twice as far from the tilted law as exact samples are.",
        "theorem: consistency",
        "tilt",
        within(FK, 2.0, 64),
        0.0,
        "seed",
    ),
    Claim(
        "systematic",
        "With 4 particles systematic resampling is nearer to the tilted law than the paper's multinomial.",
        HERE,
        "tilt",
        nearer(FK, MULTINOMIAL, particles=4),
        0.0,
        "seed",
    ),
    Claim(
        "gradient",
        "With 4 particles gradient proposals bring it nearer to the tilted law.",
        HERE,
        "tilt",
        nearer(DRIVEN, FK, particles=4),
        0.0,
        "seed",
    ),
    Claim(
        "difference-sum",
        "With 8 particles the difference potential is nearer to the tilted law than the sum.",
        POTENTIALS,
        "rules",
        nearer(FK, SUM, particles=8),
        0.0,
        "seed",
    ),
    Claim(
        "difference-immediate",
        "With 8 particles the difference potential is nearer to the tilted law than the immediate one.",
        POTENTIALS,
        "rules",
        nearer(FK, NOW, particles=8),
        0.0,
        "seed",
    ),
    Claim(
        "terminal-sum",
        "With 64 particles the published last potential of the sum is more than 1.5 times as far from the tilted law.",
        HERE,
        "rules",
        nearer(SUM, OFFICIAL_SUM, particles=64),
        math.log(1.5),
        "seed",
    ),
    Claim(
        "terminal-max",
        "With 64 particles the published last potential of the maximum is farther from the tilted law.",
        HERE,
        "rules",
        nearer(MAX, OFFICIAL_MAX, particles=64),
        0.0,
        "seed",
    ),
    Claim(
        "multistep",
        "In 25 calls it is nearer to the tilted law around SDE-DPM-Solver++(2M) than around DDIM with eta=1.",
        HERE,
        "samplers",
        nearer(FAST, FAST_DDIM, calls=25),
        0.0,
        "seed",
    ),
    Claim(
        "digits-best-of-n",
        "With 4 particles more of its digits are the wanted one than of best-of-4, by more than 0.05.",
        HEADLINE,
        "digits",
        more_often(FK, BEST, particles=4),
        0.05,
        "item",
    ),
    Claim(
        "digits-base",
        "With 4 particles more of its particles show the wanted digit than of the base sampler's, by more than 0.2.",
        HEADLINE,
        "digits",
        higher("accuracy", FK, BASE, particles=4),
        0.2,
        "item",
    ),
    Claim(
        "digits-importance",
        "With 4 particles more of them show the wanted digit than of importance sampling's, by more than 0.05.",
        HEADLINE,
        "digits",
        higher("accuracy", FK, IS, particles=4),
        0.05,
        "item",
    ),
    Claim(
        "digits-particles",
        "With 8 particles more of its digits are the wanted one than with 2, by more than 0.1.",
        "section 4: more particles",
        "digits",
        more_particles(FK, "best_accuracy", 2, 8, False),
        0.1,
        "seed",
    ),
    Claim(
        "digits-max",
        "With 4 particles the max potential, too, gives more wanted digits than best-of-4.",
        POTENTIALS,
        "digits",
        more_often(MAX, BEST, particles=4),
        0.0,
        "item",
    ),
    Claim(
        "scenes-best-of-n",
        "With 8 particles more of its drawings show what was wanted than of best-of-8.",
        HEADLINE,
        "scenes",
        more_often(FK, BEST, particles=8, scale=5.0),
        0.0,
        "item",
        ("full",),
    ),
    Claim(
        "scenes-base",
        "With 8 particles more of its particles show what was wanted than of the base sampler's, by more than 0.1.",
        HEADLINE,
        "scenes",
        higher("accuracy", FK, BASE, particles=8, scale=5.0),
        0.1,
        "item",
        ("full",),
    ),
]
