r"""Magic words: how far a short prompt in front of a given text can push a language model.

The model is a control system: x0 is imposed, the prompt u, |u| <= k, is the control input, and the next token is what
is read out. Its reachable set and its controllability are

    R^k(x0) = { y : y = argmax P(. | u + x0) for some u, |u| <= k }
    k-eps controllable on a data set D:   Pr_{(x0, y) ~ D} [ y not in R^k(x0) ] <= eps

A search that finds u proves y reachable; one that does not proves nothing, so what is measured is an upper estimate of
eps. What a single attention head can put out is bounded whatever u is.

    system.py            the model, what prompts are made of, rows and gradients in batches
    search.py            greedy back generation, GCG, the back-off search, random prompts
    finding.py           magic words of a pair, shares over many
    data.py              pairs from a user's file or a text
    dataset_gcg.py       one prompt for many pairs
    reachable.py         the reachable set, by brute force or forward exploration
    top_logprobs.py      greedy search where only top log-probabilities are known
    attention_bound.py   the bound on a head, from a model's own weights, and the best attack on it
    probe.py, page.py    the probe verb, and what it shows

The prompts found are adversarial strings, not natural text.

Reference:
    Aman Bhargava, Cameron Witkowski, Manav Shah, Matt Thomson. What's the Magic Word? A Control Theory of LLM
    Prompting. arXiv:2310.04444, 2023.
"""

from steersman.language.magic_word.attention_bound import (
    Head,
    HeadBound,
    attention_bound,
    attention_table,
    best_attack,
    model_layer,
)
from steersman.language.magic_word.data import pairs_from_text, read_pairs
from steersman.language.magic_word.dataset_gcg import SharedPrompt, dataset_gcg
from steersman.language.magic_word.finding import (
    Controllability,
    MagicWord,
    Pair,
    Share,
    find_magic_words,
    k_epsilon,
)
from steersman.language.magic_word.reachable import ReachableSet, reachable_set
from steersman.language.magic_word.search import GCG, BackOff, Found, Greedy, RandomPrompts, Search
from steersman.language.magic_word.system import Objective, State, System
from steersman.language.magic_word.top_logprobs import ScoredPrompt, score_only_search

__all__ = [
    "GCG",
    "BackOff",
    "Controllability",
    "Found",
    "Greedy",
    "Head",
    "HeadBound",
    "MagicWord",
    "Objective",
    "Pair",
    "RandomPrompts",
    "ReachableSet",
    "ScoredPrompt",
    "Search",
    "Share",
    "SharedPrompt",
    "State",
    "System",
    "attention_bound",
    "attention_table",
    "best_attack",
    "dataset_gcg",
    "find_magic_words",
    "k_epsilon",
    "model_layer",
    "pairs_from_text",
    "reachable_set",
    "read_pairs",
    "score_only_search",
]
