"""Contrastive search against a brute-force loop without a cache, and in every corner of ``generate``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM
from transformers.generation.streamers import BaseStreamer

from steersman.errors import InputError
from steersman.language.contrastive_search import ContrastiveSearch

from .conftest import EOS, PAD, VOCABULARY, generate, left_padded, tiny


def brute_force(model: Any, prompt: torch.Tensor, steps: int, k: int, alpha: float) -> list[int]:
    """The rule by its definition: one whole forward for the text and one for each candidate."""
    text = prompt.tolist()
    with torch.no_grad():
        for _ in range(steps):
            output = model(torch.tensor([text]), output_hidden_states=True)
            p = output.logits[0, -1].softmax(-1)
            context = output.hidden_states[-1][0]
            values = {}
            for v in p.topk(k).indices.tolist():
                ahead = model(torch.tensor([[*text, v]]), output_hidden_states=True).hidden_states[-1][0, -1]
                likeness = torch.cosine_similarity(context, ahead[None]).max()
                values[v] = float((1 - alpha) * p[v] - alpha * likeness)
            text.append(max(values, key=values.__getitem__))
            if text[-1] == EOS:
                break
    return text


class Counter:
    """Counts the tokens that pass through a model, padding included."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[int] = []
        self.hook = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        self.calls.append(ids.numel())


@pytest.mark.parametrize(("k", "alpha"), [(2, 0.3), (5, 0.6), (4, 1.0)])
def test_it_is_the_rule(model: Any, prompts: torch.Tensor, k: int, alpha: float) -> None:
    for prompt in prompts:
        found = generate(model, prompt[None], 25, custom_generate=ContrastiveSearch(k, alpha))
        assert found[0].tolist() == brute_force(model, prompt, 25, k, alpha)


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.6), (5, 0.0)])
def test_greedy_cases(model: Any, prompts: torch.Tensor, k: int, alpha: float) -> None:
    assert torch.equal(generate(model, prompts), generate(model, prompts, custom_generate=ContrastiveSearch(k, alpha)))


def test_left_padding_is_single_runs(model: Any, prompts: torch.Tensor) -> None:
    rows = [prompts[0], prompts[1, :4], prompts[2, :1]]
    ids, mask = left_padded(rows)
    options = {"custom_generate": ContrastiveSearch(), "eos_token_id": None}
    together = generate(model, ids, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = generate(model, row[None], **options)
        assert together[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


def test_tree_and_rows_agree(model: Any, prompts: torch.Tensor) -> None:
    ids, mask = left_padded([prompts[0], prompts[1, :4]])
    tree, rows = ContrastiveSearch(), ContrastiveSearch()
    rows._takes_tree = {model: False}
    one = generate(model, ids, attention_mask=mask, custom_generate=tree)
    two = generate(model, ids, attention_mask=mask, custom_generate=rows)
    assert torch.equal(one, two) and tree._takes_tree[model] is True


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_both_attentions(kind: str, attention: str, prompts: torch.Tensor) -> None:
    model = tiny(kind, attn_implementation=attention)
    found = generate(model, prompts, custom_generate=ContrastiveSearch())
    assert ContrastiveSearch._takes_tree[model] is True
    assert torch.equal(found, generate(tiny(kind), prompts, custom_generate=ContrastiveSearch()))


def test_models_that_take_no_tree_run_in_rows(prompts: torch.Tensor) -> None:
    """ALiBi reads distances off the mask, and a sliding window off the cache."""
    torch.manual_seed(0)
    special = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, initializer_range=0.25, **special))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    mistral = MistralForCausalLM(
        MistralConfig(**sizes, num_key_value_heads=2, sliding_window=6, initializer_range=0.25, **special)
    )
    for model in (bloom.eval(), mistral.eval()):
        search = ContrastiveSearch()
        found = generate(model, prompts[:1], 20, custom_generate=search)
        assert search._takes_tree.get(model) is not True
        assert found[0].tolist() == brute_force(model, prompts[0], 20, 5, 0.6)


def test_it_forwards_k_tokens_a_token(model: Any, prompts: torch.Tensor) -> None:
    search = ContrastiveSearch(5, 0.6)
    generate(model, prompts, 3, custom_generate=search)  # the comparison of tree and rows is made once
    counter = Counter(model)
    generate(model, prompts, 12, custom_generate=search, eos_token_id=None)
    counter.hook.remove()
    assert counter.calls == [prompts.numel()] + 12 * [5 * len(prompts)]


def test_processors_and_forbidden_tokens(model: Any, prompts: torch.Tensor) -> None:
    options = {"prefix_allowed_tokens_fn": lambda batch, ids: [7, 9], "custom_generate": ContrastiveSearch()}
    assert set(generate(model, prompts, 20, **options)[:, 9:].flatten().tolist()) <= {7, 9}
    long = generate(model, prompts, 30, custom_generate=ContrastiveSearch(), min_new_tokens=30)
    assert EOS not in long[:, 9:39].flatten().tolist()


def test_end_of_sequence_pads_the_rest(model: Any, prompts: torch.Tensor) -> None:
    free = generate(model, prompts, 30, custom_generate=ContrastiveSearch(), eos_token_id=None)[:, 9:].tolist()
    end = free[0][3]
    found = generate(model, prompts, 30, custom_generate=ContrastiveSearch(), eos_token_id=end)[:, 9:].tolist()
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    width = max(map(len, expected))
    assert found == [row + [PAD] * (width - len(row)) for row in expected] and len(expected[0]) < width


def test_output_object_has_the_cache(model: Any, prompts: torch.Tensor) -> None:
    search = ContrastiveSearch()
    for _ in range(2):
        output = generate(model, prompts, 15, custom_generate=search, return_dict_in_generate=True, eos_token_id=None)
        assert output.past_key_values.get_seq_length() == 24 and len(output.past_key_values.layers[0].keys) == 3
        search._takes_tree = {model: False}
    plain = generate(model, prompts, 15, custom_generate=search, eos_token_id=None)
    assert torch.equal(plain, output.sequences)


def test_streaming(model: Any, prompts: torch.Tensor) -> None:
    class Collect(BaseStreamer):
        tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens = self.tokens + value.flatten().tolist()

        def end(self) -> None:
            self.tokens = [*self.tokens, -1]

    streamer = Collect()
    row = generate(model, prompts[:1], custom_generate=ContrastiveSearch(streamer=streamer))
    assert streamer.tokens == [*row[0].tolist(), -1]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"alpha": 1.1}, "alpha=1.1"),
        ({"alpha": -1}, "alpha=-1"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        ContrastiveSearch(**options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"do_sample": True}, "do_sample=True"),
        ({"use_cache": False}, "past_key_values='no cache'"),
    ],
)
def test_bad_use_is_named(model: Any, prompts: torch.Tensor, options: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        generate(model, prompts, custom_generate=ContrastiveSearch(), **options)


def test_a_cache_with_tokens_is_refused(model: Any, prompts: torch.Tensor) -> None:
    output = generate(model, prompts, 5, return_dict_in_generate=True, eos_token_id=None)
    with pytest.raises(InputError, match="empty for contrastive search"):
        generate(
            model,
            output.sequences,
            custom_generate=ContrastiveSearch(),
            past_key_values=output.past_key_values,
        )


def test_nan_is_refused(prompts: torch.Tensor) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(InputError, match="NaN at token 0"):
        generate(model, prompts, custom_generate=ContrastiveSearch())
