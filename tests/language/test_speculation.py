"""What draft-and-check loops share: the law that generate would draw from, one model's cache, and refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from steersman.errors import InputError
from steersman.language.speculation import Chain, Law, SpeculationRecord, check_pair, unpadded
from tests.language.conftest import VOCABULARY, left_padded, tiny
from tests.language.tabular import joint, random_law, tabular


def test_law_is_that_of_generate(model) -> None:
    ids = torch.randint(2, VOCABULARY, (1, 6))
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)]
    )
    rows = ids.expand(20_000, -1)
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    p = Law(processors, True, VOCABULARY)(ids, logits)[0]
    assert int((p > 0).sum()) == 5 and float(p.sum()) == pytest.approx(1)
    options = {"do_sample": True, "repetition_penalty": 1.3, "temperature": 0.7, "top_k": 5, "top_p": 1.0}
    torch.manual_seed(0)
    drawn = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=1, **options)[:, -1]
    share = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    assert float((share - p).abs().sum() / 2) < 0.02
    greedy = Law(LogitsProcessorList(processors[:1]), False, VOCABULARY)(ids, logits)[0]
    assert float(greedy[processors[0](ids, logits).argmax()]) == 1 == float(greedy.sum())


def test_law_refuses_nan_and_fits_sizes() -> None:
    ids, logits = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4)
    with pytest.raises(InputError, match="NaN"):
        Law(None, True, 4)(ids, logits.index_fill(1, torch.tensor([2]), float("nan")))
    with pytest.raises(InputError, match="one token allowed"):
        Law(None, True, 4)(ids, torch.full((2, 4), -torch.inf))
    assert Law(None, True, 3)(ids, logits)[0].tolist() == pytest.approx([1 / 3] * 3)
    assert Law(None, True, 5)(ids, logits)[0].tolist() == pytest.approx([0.25] * 4 + [0])


def test_chain_goes_on_and_back(model) -> None:
    ids = torch.randint(2, VOCABULARY, (12,))
    with torch.no_grad():
        whole = model(ids[None]).logits[0].float()
    chain = Chain(model)
    torch.testing.assert_close(chain.logits(ids[:5]), whole[:5], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(chain.logits(ids[:9]), whole[5:9], atol=2e-5, rtol=1e-4)
    chain.crop(3)
    assert chain.length == 3
    torch.testing.assert_close(chain.logits(ids), whole[3:], atol=2e-5, rtol=1e-4)
    chain.crop(0)
    assert chain.length == 0
    torch.testing.assert_close(chain.logits(ids), whole, atol=2e-5, rtol=1e-4)


def test_unpadded_rows() -> None:
    rows = [torch.tensor([3, 4, 5]), torch.tensor([6])]
    for found, row in zip(unpadded(*left_padded(rows)), rows, strict=True):
        assert torch.equal(found, row)
    assert torch.equal(unpadded(rows[0][None], None)[0], rows[0])


def test_record_counts() -> None:
    record = SpeculationRecord(rounds=2, target_calls=3, draft_calls=8, accepted=[4, 1])
    assert record.tokens == 5 and record.tokens_per_target_call == pytest.approx(5 / 3)


def test_pairs_that_no_loop_can_run() -> None:
    target, draft = tiny("gpt2"), tiny("llama")
    whole, given = GenerationConfig(max_length=20), {"past_key_values": DynamicCache()}
    check_pair("a loop", target, draft, whole, given)
    with pytest.raises(InputError, match=r"num_beams=3 .*1 for a loop"):
        check_pair("a loop", target, draft, GenerationConfig(max_length=20, num_beams=3), given)
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        asked = GenerationConfig(max_length=20, return_dict_in_generate=True, **{name: True})
        with pytest.raises(InputError, match=f"{name}=True .*False for a loop"):
            check_pair("a loop", target, draft, asked, given)
    for name in ("inputs_embeds", "token_type_ids"):
        with pytest.raises(InputError, match=f"inputs='{name}'.*input_ids and their attention mask"):
            check_pair("a loop", target, draft, whole, given | {name: torch.ones(1, 3)})
    with pytest.raises(InputError, match=r"max_new_tokens=.*at most 256"):
        check_pair("a loop", target, draft, GenerationConfig(max_length=300), given)
    with pytest.raises(InputError, match="no cache"):
        check_pair("a loop", target, draft, whole, {})
    with pytest.raises(InputError, match="StaticCache"):
        check_pair("a loop", target, draft, whole, {"past_key_values": StaticCache(target.config, 20)})
    used = DynamicCache()
    Chain(target).model(torch.tensor([[3, 4]]), past_key_values=used)
    with pytest.raises(InputError, match="2 tokens"):
        check_pair("a loop", target, draft, whole, {"past_key_values": used})
    with pytest.raises(InputError, match="same vocabulary"):
        check_pair("a loop", target, tiny("gpt2", vocab_size=300), whole, given)
    draft.config.layer_types, draft.config.sliding_window = ["sliding_attention", "full_attention"], 4
    with pytest.raises(InputError, match=r"draft_model=.*attends to the whole text"):
        check_pair("a loop", target, draft, whole, given)
    target.config.is_encoder_decoder = True
    with pytest.raises(InputError, match="decoder-only"):
        check_pair("a loop", target, draft, whole, given)


@pytest.mark.parametrize("order", [1, 2])
def test_tabular_models_have_their_tables_law(order) -> None:
    table = random_law(3, order, seed=1)
    ids = torch.tensor([[1, 2]]).repeat(30_000, 1)
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": 3}
    out = tabular(table).generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 2:]
    share = torch.bincount(out @ torch.tensor([9, 3, 1]), minlength=27).view(3, 3, 3) / len(out)
    assert float((share - joint(table, [1, 2], 3)).abs().sum() / 2) < 0.02
