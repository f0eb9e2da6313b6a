"""Two models that speak of other tokens are told apart before anything is computed."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from steersman.errors import InputError
from steersman.language.vocabularies import fitted, only_padding, same_size, same_vocabulary
from tests.language.conftest import tiny


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    model = WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def test_the_first_difference_is_named() -> None:
    same_vocabulary(words("<unk>", "the", "cat"), words("<unk>", "the", "cat"), "draft")
    with pytest.raises(InputError, match=r"small.*at id 2 it has 'dog', and 'cat' is wanted"):
        same_vocabulary(words("<unk>", "the", "cat"), words("<unk>", "the", "dog"), "draft", "./small")
    with pytest.raises(InputError, match="at id 2 it has nothing, and 'cat' is wanted"):
        same_vocabulary(words("<unk>", "the", "cat"), words("<unk>", "the"), "draft")
    with pytest.raises(InputError, match="at id 2 it has 'cat', and nothing is wanted"):
        same_vocabulary(words("<unk>", "the"), words("<unk>", "the", "cat"), "draft")


def test_sizes_may_differ_by_padding() -> None:
    target = tiny("gpt2", vocab_size=41)
    same_size(target, tiny("gpt2", vocab_size=41), "draft_model")
    same_size(target, tiny("gpt2", vocab_size=48), "draft_model")
    for size in (43, 400):
        with pytest.raises(InputError, match=rf"draft_model=.*{size} tokens.*same vocabulary \(41 tokens\)"):
            same_size(target, tiny("gpt2", vocab_size=size), "draft_model")
    with pytest.raises(InputError, match="same vocabulary"):
        same_size(tiny("gpt2", vocab_size=48), target, "draft_model", used=45)


def test_logits_fit_the_other_size() -> None:
    logits = torch.randn(2, 5)
    assert torch.equal(fitted(logits, 3), logits[:, :3])
    longer = fitted(logits, 7)
    assert torch.equal(longer[:, :5], logits) and bool((longer[:, 5:] == -torch.inf).all())


@pytest.mark.parametrize(
    ("one", "other", "padding"),
    [
        (151_936, 152_064, True),  # Qwen2.5 of 0.5B and of 7B
        (151_665, 151_936, True),
        (50_257, 50_304, True),
        (32_000, 32_001, False),
        (32_000, 32_768, False),
        (2000, 2048, True),
        (1600, 2048, False),
        (128_256, 151_936, False),
    ],
)
def test_what_is_padding(one, other, padding) -> None:
    assert only_padding(one, other) is padding is only_padding(other, one)
