r"""Search on a policy that was tuned on preferences: likelihood is value.

For partial answers of one length from one prompt

.. math:: \sum_{t \le K} [r(s_t, a_t) + \beta \log \pi_\mathrm{ref}(a_t|s_t)] + V^*(s_{K+1})
          = V^*(s_0) + \beta \sum_{t \le K} \log \pi^*(a_t|s_t),

so to rank them by reward so far and value (value-guided search) is to rank them by their likelihood under the policy:
beam search needs no value network. The identity is about the **sum** of log-probabilities. transformers divides a
beam's score by its length unless ``length_penalty`` is 0, and may stop before longer beams are done.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from steersman.errors import InputError
from steersman.language.loading import load_language_model
from steersman.language.prefix import PrefixModel
from steersman.language.vocabularies import fitted, only_padding, same_vocabulary


class LikelihoodSearch:
    r"""Beam search on a tuned policy (Rafailov et al., 2024, section 5.2).

        argmax over beams of  sum_t log pi(a_t | s_t)

    ::

        LikelihoodSearch(policy, num_beams=5).generate(**inputs, max_new_tokens=64)

    which is ``policy.generate`` with ``num_beams=5, do_sample=False, length_penalty=0.0, early_stopping=False``.
    About 5 beams are what the paper gains with; wider ones give longer and worse answers. Memory for keys and values is
    that of ``num_beams`` rows.

    Args:
        model: the policy, a causal language model of transformers.
        num_beams: width; 1 is greedy search.

    Raises:
        InputError: a width out of range. On ``generate``: an option that contradicts the search.
    """

    def __init__(self, model: Any, num_beams: int = 5) -> None:
        self.model = self.writer = model  # what writes, wherever this is mounted
        self.num_beams = _width(num_beams)
        self.generate_options: Mapping[str, Any] = _options(self.num_beams)

    @classmethod
    def from_pretrained(cls, folder: str | Path, num_beams: int = 5, *, tokenizer: Any = None) -> LikelihoodSearch:
        """The search on the policy in a folder (or hub id), as :func:`apply` makes it.

        Raises:
            InputError: no policy there, or its vocabulary isn't that of ``tokenizer``.
        """
        _width(num_beams)
        model, own = load_language_model(folder, "folder")
        if tokenizer is not None:
            same_vocabulary(tokenizer, own, "folder", str(folder))
        return cls(model, num_beams)

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """``model.generate`` with the search's options and yours."""
        for name, value in self.generate_options.items():
            if name in options and options[name] != value:
                raise InputError(name, options[name], f"{value!r}: likelihood search is beam search on the sum")
        return self.model.generate(inputs, **{**options, **self.generate_options})


class ImplicitRewardSearch(LogitsProcessor):
    r"""Beam search by the implicit reward alone: another objective than the policy's likelihood.

        beam score = sum_t log pi(a_t | s_t) - log pi_ref(a_t | s_t)

    That is :math:`\sum_t \hat r_t / \beta`: likelihood search without :math:`\beta \log \pi_\mathrm{ref}`, the term
    that keeps answers fluent. Nothing here does: a token that the reference finds impossible may look like a large
    reward. Beam search sums what processors make of log-probabilities and does not normalise it, so this processor
    subtracts the reference's log-probabilities, asked for by prefix (swapped beams are right), at the cost of a second
    model.
    The search stops when all finished beams are above all others, though rewards may still rise.

    ::

        search = ImplicitRewardSearch(reference, num_beams=5)
        policy.generate(**inputs, logits_processor=[search], **search.generate_options)

    Args:
        reference: a causal language model of transformers with the policy's vocabulary.
        num_beams: width.
        pad_token_id: the id that pads prompts on the left.
        prompt_length: columns of the padded prompt.

    Raises:
        InputError: a width out of range. On call: another vocabulary.
    """

    def __init__(
        self,
        reference: Any,
        num_beams: int = 5,
        *,
        pad_token_id: int | None = None,
        prompt_length: int | None = None,
    ) -> None:
        self.num_beams = _width(num_beams)
        self.generate_options: Mapping[str, Any] = _options(self.num_beams)
        self.reference = PrefixModel(reference, pad_token_id=pad_token_id, prompt_length=prompt_length)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) less the reference's log-probabilities; what is forbidden (-inf) stays so."""
        theirs = self.reference(input_ids).logits.to(scores.device)
        if not only_padding(scores.shape[-1], theirs.shape[-1]):
            found = f"a model with {theirs.shape[-1]} tokens"
            raise InputError("reference", found, f"one with the policy's vocabulary ({scores.shape[-1]} tokens)")
        theirs = fitted(theirs, scores.shape[-1]).log_softmax(-1)
        impossible = (scores == -float("inf")) | (theirs == -float("inf"))
        return (scores - theirs).masked_fill(impossible, -float("inf"))


def _width(num_beams: Any) -> int:
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or not 1 <= num_beams <= 1000:
        raise InputError("num_beams", num_beams, "a whole number from 1 to 1000")
    return num_beams


def _options(num_beams: int) -> Mapping[str, Any]:
    """The sum of log-probabilities decides, and no beam is left before it is done."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": num_beams}
    if num_beams > 1:
        options |= {"length_penalty": 0.0, "early_stopping": False}
    return MappingProxyType(options)
