"""Adaptive guidance: leave the unconditional branch out where it adds nothing, by a test, a regression or a search.

with AdaptiveGuidance(scale=7.5, threshold=0.991).install(pipe):
    images = pipe("a small red circle", guidance_scale=7.5).images    # any guidance_scale above 1
"""

from steersman.diffusion.adaptive_guidance.guidance import AdaptiveGuidance, GuidancePolicy, similarity
from steersman.diffusion.adaptive_guidance.linear import (
    Coefficients,
    LinearAdaptiveGuidance,
    Regression,
    pattern_modes,
)

__all__ = [
    "AdaptiveGuidance",
    "Coefficients",
    "GuidancePolicy",
    "LinearAdaptiveGuidance",
    "Regression",
    "pattern_modes",
    "similarity",
]
