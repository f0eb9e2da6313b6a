"""The trained models, as transformers loads them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from steersman import quiet
from steersman.errors import InputError
from steersman.reference import loading
from steersman.reference.reviews.law import having
from steersman.reference.reviews.lexicon import ATTRIBUTES, VALUES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer that all models share: a token a word or mark, ``<s>`` before a text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder("base"), local_files_only=True)


def _folder(name: str) -> str:
    return str(loading.path(f"reviews/{name}"))


def language_model(name: str = "base") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        name: ``"base"``; ``"conditional"``, whose texts begin with :func:`codes`, then ``<s>``; or ``"judge"``, larger
            than ``"base"`` and trained longer on other texts, which says how likely what others wrote is.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name not in ("base", "conditional", "judge"):
        raise InputError("name", name, "base, conditional or judge")
    folder = _folder(name)
    with quiet.loading():
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def value_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier of four sigmoids (negative, neutral, positive, rude) and its tokenizer.

    Trained on every prefix with what the review is in the end, so on a beginning it is a value function.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = _folder("value")
    with quiet.loading():
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


CODES = {(name, value): f"<{value}>" for name, values in VALUES.items() for value in values}
"""The control code, one token, of each attribute's value."""


def codes(**given: str) -> list[int]:
    """Token ids of control codes, as ``codes(topic="film", sentiment="positive")``: they stand before ``<s>``."""
    having(**given)
    known = tokenizer().get_vocab()
    return [known[CODES[name, given[name]]] for name in ATTRIBUTES if name in given]
