"""Adaptive guidance: leave the unconditional branch out where it adds nothing, by a test, a regression or a search.

with AdaptiveGuidance(scale=7.5, threshold=0.991).install(pipe):
    images = pipe("a small red circle", guidance_scale=7.5).images    # any guidance_scale above 1
"""

from steersman.diffusion.adaptive_guidance.calibration import (
    Calibration,
    Candidate,
    calibrate,
    candidates,
    cut_steps,
)
from steersman.diffusion.adaptive_guidance.guidance import AdaptiveGuidance, GuidancePolicy, similarity
from steersman.diffusion.adaptive_guidance.linear import (
    Coefficients,
    LinearAdaptiveGuidance,
    Regression,
    pattern_modes,
)
from steersman.diffusion.adaptive_guidance.recipe import apply
from steersman.diffusion.adaptive_guidance.search import (
    Chain,
    SearchedPolicy,
    best_within,
    excess,
    search_policy,
    soft_loss,
)

__all__ = [
    "AdaptiveGuidance",
    "Calibration",
    "Candidate",
    "Chain",
    "Coefficients",
    "GuidancePolicy",
    "LinearAdaptiveGuidance",
    "Regression",
    "SearchedPolicy",
    "apply",
    "best_within",
    "calibrate",
    "candidates",
    "cut_steps",
    "excess",
    "pattern_modes",
    "search_policy",
    "similarity",
    "soft_loss",
]
