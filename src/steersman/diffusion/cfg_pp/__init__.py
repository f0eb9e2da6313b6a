"""CFG++: guidance whose estimate is guided and whose noise is not, with lambda in [0, 1] in place of a scale.

with CFGPlusPlus(scale=0.6).install(pipe):
    images = pipe("a small red circle", guidance_scale=2.0).images    # any guidance_scale above 1
"""

from steersman.diffusion.cfg_pp.applying import apply
from steersman.diffusion.cfg_pp.guidance import CFGPlusPlus, mean_equivalent_scale, moves, twin
from steersman.diffusion.cfg_pp.inverse_problems import AveragePool, Blur, Branches, LinearOperator, Mask, restore
from steersman.diffusion.cfg_pp.inversion import edit, invert, sample
from steersman.diffusion.cfg_pp.solvers import (
    CFGPP,
    CFGPPScheduler,
    DDIMCFGPPInverseScheduler,
    DDIMCFGPPScheduler,
    DDIMInversion,
    DPMSolver2SAncestral,
    DPMSolver2SAncestralCFGPPScheduler,
    DPMSolverPPCFGPPScheduler,
    EulerAncestralCFGPPScheduler,
    EulerCFGPPScheduler,
    equivalent_scales,
    guided,
)

__all__ = [
    "CFGPP",
    "AveragePool",
    "Blur",
    "Branches",
    "CFGPPScheduler",
    "CFGPlusPlus",
    "DDIMCFGPPInverseScheduler",
    "DDIMCFGPPScheduler",
    "DDIMInversion",
    "DPMSolver2SAncestral",
    "DPMSolver2SAncestralCFGPPScheduler",
    "DPMSolverPPCFGPPScheduler",
    "EulerAncestralCFGPPScheduler",
    "EulerCFGPPScheduler",
    "LinearOperator",
    "Mask",
    "apply",
    "edit",
    "equivalent_scales",
    "guided",
    "invert",
    "mean_equivalent_scale",
    "moves",
    "restore",
    "sample",
    "twin",
]
