"""Rectification: next tokens are capped by one minus the risk that the finished text is undesired.

:mod:`.projection` is the nearest law below caps, :mod:`.processor` the processor for ``generate``, :mod:`.q_model` the
value model, :mod:`.training` its offline SARSA, :mod:`.trajectories` and :mod:`.applying` make it for a language model.
"""

from steersman.language.rectification.applying import apply, calibration
from steersman.language.rectification.processor import Rectification, RectificationRecord
from steersman.language.rectification.projection import Projection, exact_projection, official_projection
from steersman.language.rectification.q_model import QModel, QModelConfig
from steersman.language.rectification.training import DeadEndTrainer, sarsa_loss, sarsa_targets

__all__ = [
    "DeadEndTrainer",
    "Projection",
    "QModel",
    "QModelConfig",
    "Rectification",
    "RectificationRecord",
    "apply",
    "calibration",
    "exact_projection",
    "official_projection",
    "sarsa_loss",
    "sarsa_targets",
]
