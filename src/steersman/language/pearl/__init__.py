"""PEARL: parallel speculative decoding with adaptive draft length (Liu et al., 2025).

``rounds`` is the method as a state machine without models, ``sides`` what each model does in a round, ``threads`` and
``ranks`` the two engines that run the sides at the same time, and ``loop`` the loop for ``model.generate``.
"""

from steersman.language.pearl.loop import PEARL, PearlRecord
from steersman.language.pearl.rounds import VARIANTS, Rounds, accept, expected_tokens

__all__ = ["PEARL", "VARIANTS", "PearlRecord", "Rounds", "accept", "expected_tokens"]
