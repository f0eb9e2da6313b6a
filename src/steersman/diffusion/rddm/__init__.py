r"""RDDM: diffusion from a clean image to a degraded one: a residual and noise, each with a schedule of its own.

    I_t = I_0 + ᾱ_t (I_in - I_0) + β̄_t ε,    ᾱ: 0 -> 1,    β̄²: 0 -> s

J. Liu, Q. Wang, H. Fan, Y. Wang, Y. Tang, L. Qu, "Residual Denoising Diffusion Models", CVPR 2024, arXiv:2308.13712.

``levels``: the schedules and the paths through them; ``predictions``: what networks give; ``scheduler``: the reverse
process; ``pipeline``: image in, image out; ``pairs``: images in memory and in files; ``training``: from pairs.
"""

from steersman.diffusion.rddm.artefact import apply
from steersman.diffusion.rddm.levels import Levels, increments
from steersman.diffusion.rddm.pairs import Pairs, read_pairs
from steersman.diffusion.rddm.pipeline import RDDMRestorationPipeline
from steersman.diffusion.rddm.scheduler import RDDMScheduler
from steersman.diffusion.rddm.training import RDDMTraining, choose_objective, train_rddm

__all__ = [
    "Levels",
    "Pairs",
    "RDDMRestorationPipeline",
    "RDDMScheduler",
    "RDDMTraining",
    "apply",
    "choose_objective",
    "increments",
    "read_pairs",
    "train_rddm",
]
