"""Token-level DPO: a policy tuned on preferences is a soft Q-function, and says what each token was worth.

rewards = token_rewards(policy, reference, prompts, completions, beta=0.1, tokenizer=tokenizer)   # credit
LikelihoodSearch(policy, num_beams=5).generate(**inputs)                                          # value-guided search
trainer.add_callback(RewardDriftCallback(trainer))                                                # monitoring of DPO
"""

from steersman.language.q_star.crediting import Span, page, pieces, probe, spans, terminal
from steersman.language.q_star.monitoring import Drift, RewardDriftCallback
from steersman.language.q_star.preferences import Pair, beginnings, read_pairs, sampled_pairs
from steersman.language.q_star.rewards import (
    ImplicitReward,
    TokenRewards,
    joint_logratio,
    log_probabilities,
    token_rewards,
)
from steersman.language.q_star.search import ImplicitRewardSearch, LikelihoodSearch
from steersman.language.q_star.training import apply, fingerprint, preference_training, supervised_training

__all__ = [
    "Drift",
    "ImplicitReward",
    "ImplicitRewardSearch",
    "LikelihoodSearch",
    "Pair",
    "RewardDriftCallback",
    "Span",
    "TokenRewards",
    "apply",
    "beginnings",
    "fingerprint",
    "joint_logratio",
    "log_probabilities",
    "page",
    "pieces",
    "preference_training",
    "probe",
    "read_pairs",
    "sampled_pairs",
    "spans",
    "supervised_training",
    "terminal",
    "token_rewards",
]
