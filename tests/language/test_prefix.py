"""A model asked by prefix answers as a fresh forward pass does, whatever was asked before."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from steersman.errors import InputError
from steersman.language import prefix
from steersman.language.prefix import PrefixModel
from tests.language.conftest import PAD, VOCABULARY, left_padded, tiny

MODELS = {kind: tiny(kind) for kind in ("gpt2", "llama")}


def fresh(model, text: list[int], opening: list[int]):
    """Logits behind a text, and the sum of its tokens' log-probabilities, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*opening, *text]])).logits[0].float()
    law, at = logits.log_softmax(-1), len(opening)
    first = 0 if opening else 1
    total = sum(float(law[at + i - 1, text[i]]) for i in range(first, len(text)))
    return logits[-1], total


def agrees(asked: PrefixModel, texts: list[list[int]]) -> None:
    ids, _ = left_padded([torch.tensor(text) for text in texts])
    step = asked(ids)
    assert step.tokens.tolist() == [len(text) for text in texts]
    for k, opening in enumerate(asked.openings):
        for i, text in enumerate(texts):
            logits, total = fresh(asked.model, text, opening)
            torch.testing.assert_close(step.logits[k * len(texts) + i], logits, atol=2e-5, rtol=1e-4)
            if asked.totals:
                assert float(step.totals[k * len(texts) + i]) == pytest.approx(total, abs=2e-4)


texts = st.lists(st.integers(2, 6), min_size=1, max_size=6)
batches = st.lists(texts, min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(batches, min_size=1, max_size=6),
    st.sampled_from(["gpt2", "llama"]),
    st.sampled_from([[], [7], [[7, 9], [8, 9]], [[7], [9, 8]]]),
    st.booleans(),
)
def test_answers_depend_on_the_prefix_alone(calls, kind, opening, totals) -> None:
    asked = PrefixModel(MODELS[kind], pad_token_id=PAD, opening=opening, totals=totals)
    for batch in calls:
        agrees(asked, batch)


@pytest.mark.parametrize("opening", [[], [7], [[7, 9], [8, 9]]])
def test_beams_permutations_and_steps_back(model, opening) -> None:
    asked = PrefixModel(model, pad_token_id=PAD, opening=opening, totals=True)
    batch = [[2, 3, 4], [5], [6, 7]]
    agrees(asked, batch)
    agrees(asked, [[*row, 8 + i] for i, row in enumerate(batch)])
    agrees(asked, [batch[1] + [9, 2], batch[0] + [8, 3], batch[0] + [8, 4]])  # beams: a row goes, another splits
    agrees(asked, [batch[0] + [8, 4], batch[1] + [9, 2]])  # the same again, fewer and permuted
    agrees(asked, [batch[0] + [8]])  # back
    agrees(asked, [batch[0] + [8, 5, 6, 7]])
    agrees(asked, [[3]])


def test_feeds_one_token_where_rows_grow_by_one(model) -> None:
    fed = []
    hook = model.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape))
    try:
        asked = PrefixModel(model, opening=[[7], [8]], totals=True)
        ids = torch.randint(2, VOCABULARY, (3, 5))
        asked(ids)
        asked(torch.cat([ids, ids[:, :1]], 1))
        asked(torch.cat([ids, ids[:, :1], ids[:, :1]], 1)[[2, 0, 1]])
        asked(torch.cat([ids, ids[:, :1], ids[:, :1]], 1)[[0, 1, 2]])  # known already
    finally:
        hook.remove()
    assert [tuple(shape) for shape in fed] == [(6, 6), (6, 1), (6, 1)]


def test_threads_carry_their_own(model) -> None:
    asked = PrefixModel(model, opening=[[7], [8]], totals=True)
    texts = [[[2 + i, 3, 4]] for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            list(pool.map(lambda batch: agrees(asked, batch), texts))
    copied = copy.deepcopy(asked)
    agrees(copied, texts[0])


@pytest.mark.parametrize("opening", [[], [[7, 9], [8, 9]]])
def test_long_prompts_go_in_pieces(model, opening, monkeypatch) -> None:
    asked = PrefixModel(model, pad_token_id=PAD, opening=opening, totals=True)
    monkeypatch.setattr(prefix, "MOST", 3 * 2 * 2 * VOCABULARY)
    fed = []
    hook = model.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    agrees(asked, [[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5]])
    hook.remove()
    assert len(fed) > 4
    agrees(asked, [[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [5, 2]])


@pytest.mark.parametrize("opening", [[], [7]])
def test_a_call_that_failed_is_not_gone_on_from(model, opening) -> None:
    asked = PrefixModel(model, pad_token_id=PAD, opening=opening, totals=True)
    batch = [[2, 3, 4, 5], [6, 7, 8, 9]]
    agrees(asked, batch)
    with pytest.raises(InputError, match="at most 256"):
        asked(torch.full((1, 300), 6))
    agrees(asked, [batch[1], batch[0]])

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        asked(torch.tensor([[6, 7, 2]]))
    hook.remove()
    agrees(asked, batch)
    agrees(asked, [[*batch[1], 3], [*batch[0], 2]])


def test_adapters_know_positions(model) -> None:
    modules = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=modules, init_lora_weights=False)).eval()
    agrees(PrefixModel(adapted, pad_token_id=PAD, totals=True), [[2, 3, 4, 5], [6]])


def test_padding_is_limited_to_the_prompt(model) -> None:
    asked = PrefixModel(model, pad_token_id=PAD, prompt_length=2)
    ids = torch.tensor([[PAD, PAD, PAD, 4]])
    logits, _ = fresh(model, [PAD, 4], [])
    torch.testing.assert_close(asked(ids).logits[0], logits, atol=2e-5, rtol=1e-4)
    assert asked(ids).tokens.tolist() == [2]


def test_refuses_what_it_cannot_ask(model) -> None:
    with pytest.raises(InputError, match="opening"):
        PrefixModel(model, opening=[[3], []])
    with pytest.raises(InputError, match="at most 256"):
        PrefixModel(model, opening=[3])(torch.full((1, 256), 4))
    sliding = tiny("llama")
    sliding.config.layer_types = ["sliding_attention", "full_attention"]
    sliding.config.sliding_window = 4
    with pytest.raises(InputError, match="attends to the whole text"):
        PrefixModel(sliding)
    sliding.config.is_encoder_decoder = True
    with pytest.raises(InputError, match="decoder-only"):
        PrefixModel(sliding)
