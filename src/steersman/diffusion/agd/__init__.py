"""Adapter guidance distillation (AGD): guided sampling in one pass.

data = collect_cfg_trajectories(pipe, prompts)      # the pipeline's own guided trajectories
agd = train_agd(pipe, data)                          # adapters, about 2% of the weights
agd.save_pretrained("my-agd")
AGD.from_pretrained("my-agd", guidance_scale=4.0).install(pipe)
"""

from steersman.diffusion.agd.adapters import Conditions, ScalarEncoder
from steersman.diffusion.agd.applying import apply
from steersman.diffusion.agd.diagnosis import missed_guidance
from steersman.diffusion.agd.injection import AGDAdapters, AGDConfig, inject_agd
from steersman.diffusion.agd.installing import AGD, AGDGuidance
from steersman.diffusion.agd.training import AGDTrainingConfig, train_agd
from steersman.diffusion.agd.trajectories import (
    Trajectories,
    collect_cfg_trajectories,
    noised_pairs,
    read_parts,
    stream_cfg_trajectories,
)

__all__ = [
    "AGD",
    "AGDAdapters",
    "AGDConfig",
    "AGDGuidance",
    "AGDTrainingConfig",
    "Conditions",
    "ScalarEncoder",
    "Trajectories",
    "apply",
    "collect_cfg_trajectories",
    "inject_agd",
    "missed_guidance",
    "noised_pairs",
    "read_parts",
    "stream_cfg_trajectories",
    "train_agd",
]
