"""Whether two language models speak of the same tokens.

A method that multiplies, compares or verifies the laws of two models reads token ids of the one as ids of the other.
With other vocabularies that is wrong without any error, so it is refused first, naming the first difference.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from steersman.errors import InputError


def same_vocabulary(one: Any, other: Any, parameter: str, spec: object = None) -> None:
    """Refuse ``other`` unless both tokenizers have the same token for every id.

    Args:
        one: the tokenizer that counts.
        other: the tokenizer of what ``parameter`` names.
        parameter, spec: what the sentence names, and its value.

    Raises:
        InputError: the vocabularies differ; the sentence says at which id first.
    """
    mine, theirs = one.get_vocab(), other.get_vocab()
    if mine == theirs:
        return
    by_id = ({i: token for token, i in vocabulary.items()} for vocabulary in (mine, theirs))
    left, right = by_id
    at = next(i for i in sorted(left.keys() | right.keys()) if left.get(i) != right.get(i))
    named = type(other).__name__ if spec is None else spec
    difference = f"at id {at} it has {_shown(right, at)}, and {_shown(left, at)} is wanted"
    raise InputError(parameter, named, f"a model with the same vocabulary ({difference})")


def _shown(tokens: dict[int, str], at: int) -> str:
    return repr(tokens[at]) if at in tokens else "nothing"


def same_size(target: Any, other: Any, parameter: str, used: int | None = None) -> None:
    """Refuse ``other`` if it can't have the vocabulary of ``target``, where there are no tokenizers to compare.

    Embeddings may have rows behind the vocabulary that no token uses, so sizes may differ by padding: by less than
    128 rows, or 1 % of the vocabulary and at most 1024, and to a multiple of 8. Rows that
    ``used`` says are tokens must be in both.

    Args:
        target, other: causal language models of transformers.
        parameter: what the sentence names.
        used: number of tokens in use, if that is known.

    Raises:
        InputError: the sizes differ by more than padding.
    """
    mine, theirs = target.config.get_text_config().vocab_size, other.config.get_text_config().vocab_size
    if mine == theirs:
        return
    if not only_padding(mine, theirs) or (used is not None and min(mine, theirs) < used):
        value = f"{type(other).__name__} with {theirs} tokens"
        raise InputError(parameter, value, f"a model with the same vocabulary ({mine} tokens)")


def only_padding(one: int, other: int) -> bool:
    """Whether two vocabulary sizes differ by no more than an embedding's rows of padding."""
    larger, smaller = max(one, other), min(one, other)
    most = max(127, min(1024, smaller // 100))  # models of one family pad 151,665 tokens to 151,936 and to 152,064
    return larger == smaller or (larger - smaller <= most and larger % 8 == 0)


def fitted(logits: Tensor, size: int) -> Tensor:
    """Logits (..., V') as (..., size): rows of padding are left out, and lacking ones can't be drawn."""
    lacking = size - logits.shape[-1]
    if lacking <= 0:
        return logits[..., :size]
    return nn.functional.pad(logits, (0, lacking), value=float("-inf"))
