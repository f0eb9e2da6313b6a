"""FK steering: particles of a frozen diffusion model, resampled towards any reward.

:mod:`.smc` is the pure core, for any sampling loop; :mod:`.steering` puts it around a diffusers pipeline;
:mod:`.rewards` is where rewards come from.
"""

from steersman.diffusion.fk_steering.rewards import HTTPReward, LearnedReward, Reward
from steersman.diffusion.fk_steering.smc import (
    POTENTIALS,
    FeynmanKac,
    Particles,
    Scored,
    every,
    many_sample,
    scale_for,
    scored_steps,
)
from steersman.diffusion.fk_steering.steering import FKSteering, Report, ScoredStep

__all__ = [
    "POTENTIALS",
    "FKSteering",
    "FeynmanKac",
    "HTTPReward",
    "LearnedReward",
    "Particles",
    "Report",
    "Reward",
    "Scored",
    "ScoredStep",
    "every",
    "many_sample",
    "scale_for",
    "scored_steps",
]
