"""Momentum decoding against brute force, closed forms, greedy search and transformers' n-gram blocking."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import statistics
import time
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from steersman.errors import InputError
from steersman.language.momentum_decoding import (
    RESISTANCES,
    MomentumDecoding,
    repetition_length,
    resistance_table,
)

from .conftest import EOS, PAD, VOCABULARY, generate, left_padded, tiny


def brute_force_length(context: list[int], token: int, longest: int) -> int:
    """l(v) by its definition: all i-grams of the context, longest first."""
    if token not in context:
        return 0
    for i in range(min(longest, len(context)), 0, -1):
        gram = [*context[len(context) - i + 1 :], token] if i > 1 else [token]
        if any(context[j : j + i] == gram for j in range(len(context) - i + 1)):
            return i
    raise AssertionError("a token that occurred repeats at least itself")


def brute_force_choice(context: list[int], logits: torch.Tensor, alpha: float, k: int, table: list[float]) -> int:
    """The rule of the paper in plain Python, ties to the more probable and then to the lower id."""
    p = logits.float().softmax(-1)
    order = sorted(range(len(p)), key=lambda v: (-float(logits[v]), v))[:k]
    lengths = {v: brute_force_length(context, v, len(table) - 1) for v in order}
    resistance = {v: torch.tensor(alpha * table[lengths[v]] if alpha else 0.0) for v in order}
    value = {v: float(p[v] - resistance[v]) for v in order}
    if max(value.values()) == -math.inf:
        return min(order, key=lambda v: (lengths[v], -float(logits[v]), v))
    return min(order, key=lambda v: (-value[v], -float(logits[v]), v))


def decode(processor: Any, logits_of: Any, context: list[int], steps: int) -> list[int]:
    """Greedy decoding of a language model given as a function from the context to logits."""
    context = list(context)
    for _ in range(steps):
        scores = processor(torch.tensor([context]), logits_of(context)[None])
        context.append(int(scores.argmax()))
    return context


def bigram(strong: float, way_out: float) -> Any:
    """Tokens a=0 and b=1 call each other with probability ``strong``; c=2 has ``way_out``."""

    def logits_of(context: list[int]) -> torch.Tensor:
        p = torch.full((6,), 0.0)
        p[2] = way_out
        p[1 if context[-1] == 0 else 0] = strong
        rest = (1 - p.sum()) / int((p == 0).sum())
        return torch.where(p == 0, rest, p).log()

    return logits_of


# ------------------------------------------------------------------ exact checks


@pytest.mark.parametrize("name", RESISTANCES)
def test_alpha_zero_is_greedy(model: Any, prompts: torch.Tensor, name: str) -> None:
    plain = generate(model, prompts)
    steered = generate(model, prompts, logits_processor=[MomentumDecoding(0.0, 5, name)])
    assert torch.equal(plain, steered)


def test_one_candidate_is_greedy(model: Any, prompts: torch.Tensor) -> None:
    plain = generate(model, prompts)
    assert torch.equal(plain, generate(model, prompts, logits_processor=[MomentumDecoding(0.2, 1)]))
    assert not torch.equal(plain, generate(model, prompts, logits_processor=[MomentumDecoding(0.2, 5)]))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_repetition_length_is_brute_force(data: st.DataObject) -> None:
    size = data.draw(st.integers(3, 5))
    longest = data.draw(st.integers(1, 7))
    rows = data.draw(st.integers(1, 3))
    width = data.draw(st.integers(1, 200))
    seed = data.draw(st.integers(0, 2**31))
    ids = torch.randint(0, size, (rows, width), generator=torch.Generator().manual_seed(seed))
    fast = repetition_length(ids, size, longest)
    slow = [[brute_force_length(row, v, longest) for v in range(size)] for row in ids.tolist()]
    assert fast.tolist() == slow


@pytest.mark.parametrize(
    ("context", "expected"),
    [("aaaa", {"a": 4, "b": 0}), ("abab", {"a": 3, "b": 1}), ("abcab", {"c": 3, "a": 1, "b": 1}), ("a", {"a": 1})],
)
def test_overlapping_repeats(context: str, expected: dict[str, int]) -> None:
    ids = torch.tensor([[ord(c) - ord("a") for c in context]])
    found = repetition_length(ids, 3, 5)[0]
    assert {v: int(found[ord(v) - ord("a")]) for v in expected} == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_choice_is_brute_force(data: st.DataObject) -> None:
    """The whole rule, on logits with many exact ties, for every table."""
    size = data.draw(st.integers(2, 7))
    context = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40))
    k, longest = data.draw(st.integers(1, size)), data.draw(st.integers(1, 6))
    alpha = data.draw(st.sampled_from([0.0, 0.1, 0.2, 0.7]))
    resistance = data.draw(st.sampled_from([*RESISTANCES, [0, 1], [0, 0.5, math.inf]]))
    logits = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))).float()
    processor = MomentumDecoding(alpha, k, resistance, longest)
    chosen = int(processor(torch.tensor([context]), logits[None]).argmax())
    assert chosen == brute_force_choice(context, logits, alpha, k, resistance_table(resistance, longest))


def test_ngram_is_no_repeat_ngram(prompts: torch.Tensor) -> None:
    """With all tokens as candidates and alpha f(4) = 1, the ablation is hard 4-gram blocking."""
    for kind, seed in itertools.product(("gpt2", "llama"), range(3)):
        model = tiny(kind, seed)
        ours = MomentumDecoding(0.2, VOCABULARY, "ngram", 4)
        steered = generate(model, prompts, 100, logits_processor=[ours])
        assert torch.equal(steered, generate(model, prompts, 100, no_repeat_ngram_size=4))
        for row in steered.tolist():
            text = row[: row.index(EOS)] if EOS in row else row
            grams = list(zip(*(text[i:] for i in range(4)), strict=False))
            assert len(grams) == len(set(grams))


def test_constant_is_greedy_with_a_toll_on_seen_tokens(model: Any, prompts: torch.Tensor) -> None:
    def toll(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(scores).scatter_(1, ids, 1.0)
        return scores.softmax(-1) - 0.1 * 2 * seen

    ours = MomentumDecoding(0.1, VOCABULARY, "constant")
    steered = generate(model, prompts, logits_processor=[ours])
    assert torch.equal(steered, generate(model, prompts, logits_processor=[toll]))


def test_never_returns_when_resistance_exceeds_one(model: Any, prompts: torch.Tensor) -> None:
    steered = generate(
        model, prompts, 20, logits_processor=[MomentumDecoding(1.1, VOCABULARY, "ours")], eos_token_id=None
    )
    for row in steered.tolist():
        assert len(set(row[9:])) == 20 and not set(row[9:]) & set(row[:9])


def test_left_padding_is_single_runs(model: Any, prompts: torch.Tensor) -> None:
    rows = [prompts[0], prompts[1, :5], prompts[2, :2], torch.tensor([4, 4, PAD, 9, PAD, 9])]
    ids, mask = left_padded(rows)
    ours = MomentumDecoding(0.3, pad_token_id=PAD)
    options = {"eos_token_id": None, "logits_processor": [ours]}
    together = generate(model, ids, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = generate(model, row[None], logits_processor=[MomentumDecoding(0.3)], eos_token_id=None)
        assert together[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


def test_padding_would_count_without_its_id() -> None:
    ids = torch.tensor([[PAD, PAD, PAD, 5, 6]])
    logits = torch.tensor([[2.0, 1.9] + [0.0] * 5])
    assert int(MomentumDecoding(0.2, 2, pad_token_id=PAD)(ids, logits).argmax()) == PAD
    assert int(MomentumDecoding(0.2, 2)(ids, logits).argmax()) == 1


def test_toy_loop() -> None:
    """Scores of the looping token: 0.9, 0.7, 0.5, 0.3, 0.1, -0.1; the sixth token leaves at 0.06."""
    assert decode(MomentumDecoding(), bigram(0.9, 0.06), [0], 6)[1:] == [1, 0, 1, 0, 1, 2]
    assert decode(MomentumDecoding(), bigram(0.76, 0.2), [0], 4)[1:] == [1, 0, 1, 2]
    context, scores = [0], []
    for _ in range(6):
        looping = 1 if context[-1] == 0 else 0
        scores.append(float(MomentumDecoding()(torch.tensor([context]), bigram(0.9, 0.06)(context)[None])[0, looping]))
        context.append(looping)
    assert scores == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, -0.1], abs=1e-6)


@pytest.mark.parametrize("length", [128, 1024])
def test_cost_is_under_a_twentieth_of_a_step(length: int) -> None:
    """Median of 50 against the cached step of a model of 10M parameters, one thread, interleaved."""
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=4096, n_embd=288, n_layer=9, n_head=9, n_positions=2048)
    model = GPT2LMHeadModel(config).eval()
    assert 9e6 < sum(p.numel() for p in model.parameters()) < 12e6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ids = torch.randint(0, 4096, (1, length + 60), generator=torch.Generator().manual_seed(0))
        cache, processor = DynamicCache(), MomentumDecoding()
        step, ours = [], []
        with torch.no_grad():
            model(ids[:, :length], past_key_values=cache)
            for t in range(length, length + 60):
                start = time.perf_counter()
                logits = model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1]
                middle = time.perf_counter()
                processor(ids[:, : t + 1], logits)
                step.append(middle - start)
                ours.append(time.perf_counter() - middle)
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(ours[10:]) < 0.05 * statistics.median(step[10:])


# ------------------------------------------------------------------ the rule's corners


def test_ties_go_to_the_more_probable() -> None:
    """0.5 - 0.25 = 0.25 - 0, exact in binary: argmax alone would take the lower id."""
    exact = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    scores = MomentumDecoding(0.25, 2, "ours")(torch.tensor([[1]]), exact.log())
    assert int(scores.argmax()) == 1 and scores[0, 0] == -math.inf


def test_all_infinite_takes_the_least_repetition() -> None:
    context = [0, 1, 2, 0, 1]  # after "0 1": token 2 repeats 3, tokens 0 and 1 repeat 1
    logits = torch.tensor([[1.0, 0.5, 3.0, -9.0]])
    wall = [0.0, math.inf]
    assert int(MomentumDecoding(0.2, 3, wall)(torch.tensor([context]), logits).argmax()) == 0
    assert int(MomentumDecoding(0.2, 1, wall)(torch.tensor([context]), logits).argmax()) == 2
    assert int(MomentumDecoding(0.2, 4, wall)(torch.tensor([context]), logits).argmax()) == 3
    sampled = MomentumDecoding(0.2, 3, wall, sample=True)(torch.tensor([context]), logits)
    assert sampled.isfinite().tolist() == [[True, True, False, False]]


def test_half_precision_ties() -> None:
    """bfloat16 logits tie often; equal ones go to the lower id, as in greedy search."""
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16().round()
    ids = torch.zeros(50, 1, dtype=torch.long)
    for k in (1, 2, 5, 300):
        chosen = MomentumDecoding(0.0, k)(ids, logits).argmax(1)
        assert torch.equal(chosen, logits.float().argmax(1))
    kept = MomentumDecoding(0.2, 5)(ids, logits).isfinite().sum(1)
    assert int(kept.max()) == 5 and int(kept.min()) >= 1


@pytest.mark.parametrize("longest", [2, 5])
def test_window_prompt_and_padding_cut_the_context(longest: int) -> None:
    ids = torch.randint(0, 6, (4, 60), generator=torch.Generator().manual_seed(3))
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    plain = {"alpha": 0.05, "top_k": 4, "max_length": longest}
    for options, start in (
        ({"window": 17}, 43),
        ({"prompt_length": 31, "include_prompt": False}, 31),
        ({"prompt_length": 31, "include_prompt": False, "window": 40}, 31),
        ({"prompt_length": 31, "include_prompt": False, "window": 7}, 53),
    ):
        cut = MomentumDecoding(**plain, **options)(ids, logits)
        assert torch.equal(cut, MomentumDecoding(**plain)(ids[:, start:], logits))
    padded = torch.cat([torch.full((4, 9), 5), ids[:, :20].clamp(max=4)], 1)
    cut = MomentumDecoding(**plain, pad_token_id=5)(padded, logits)
    assert torch.equal(cut, MomentumDecoding(**plain)(ids[:, :20].clamp(max=4), logits))
    limited = MomentumDecoding(**plain, pad_token_id=5, prompt_length=4)(padded, logits)
    assert torch.equal(limited, MomentumDecoding(**plain)(padded[:, 4:], logits))
    assert repetition_length(padded, 6, longest, start=torch.full((4,), 9)).tolist() == (
        repetition_length(padded[:, 9:], 6, longest).tolist()
    )


def test_exempt_tokens_are_free() -> None:
    ids, logits = torch.tensor([[1, 2, 1]]), torch.tensor([[1.0, 0.0, 1.1, 0.9]])
    assert int(MomentumDecoding(0.2, 4)(ids, logits).argmax()) == 0
    assert int(MomentumDecoding(0.2, 4, exempt_ids=[2])(ids, logits).argmax()) == 2


def test_more_candidates_than_tokens_warns() -> None:
    with pytest.warns(UserWarning, match="top_k=9 is more than the vocabulary of 4"):
        MomentumDecoding(top_k=9)(torch.tensor([[0]]), torch.randn(1, 4))


def test_an_empty_context_is_greedy() -> None:
    """With ``inputs_embeds`` the first ``input_ids`` have no column."""
    logits = torch.randn(2, 7)
    processor = MomentumDecoding()
    for _ in range(2):
        assert torch.equal(processor(torch.empty(2, 0, dtype=torch.long), logits).argmax(1), logits.argmax(1))


def test_user_table_is_the_named_one() -> None:
    ids = torch.randint(0, 5, (8, 30), generator=torch.Generator().manual_seed(1))
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(2))
    named = MomentumDecoding(0.2, 5, "ours")(ids, logits)
    for table in ([0, 1, 2, 3, 4, 5], {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5}):
        assert torch.equal(named, MomentumDecoding(0.2, 5, table)(ids, logits))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_carried_graph_is_the_stateless_one(data: st.DataObject) -> None:
    """One processor, called on prefixes in any order, gives what a fresh one gives."""
    longest = data.draw(st.integers(1, 6))
    used = MomentumDecoding(0.05, 4, "ours", longest)
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    ids = torch.randint(0, 4, (2, 1), generator=seed)
    buffer = torch.zeros(2, 64, dtype=torch.long)
    moves = st.sampled_from(["grow", "grow", "grow", "swap", "cut", "other", "same", "edit", "buffer"])
    for move in data.draw(st.lists(moves, min_size=5, max_size=25)):
        if move in ("grow", "buffer"):
            ids = torch.cat([ids, torch.randint(0, 4, (len(ids), 1), generator=seed)], 1)
        elif move == "swap":
            ids = torch.cat([ids.flip(0), torch.randint(0, 4, (len(ids), 1), generator=seed)], 1)
        elif move == "cut":
            ids = ids[:, : max(1, ids.shape[1] // 2)]
        elif move == "other":
            ids = torch.randint(0, 4, (data.draw(st.integers(1, 3)), ids.shape[1] + 1), generator=seed)
        elif move == "edit":
            ids = ids.clone()
            ids[:, 0] = (ids[:, 0] + 1) % 4
        given_ids = ids
        if move == "buffer" and len(ids) == 2:  # the caller's own memory, written again at every step
            buffer[:, : ids.shape[1]] = ids
            given_ids = buffer[:, : ids.shape[1]]
        logits = torch.randn(len(ids), 5, generator=seed)
        assert torch.equal(used(given_ids, logits), MomentumDecoding(0.05, 4, "ours", longest)(ids, logits))


@settings(max_examples=40, deadline=None)
@given(
    alpha=st.floats(0, 10),
    top_k=st.integers(1, 12),
    resistance=st.sampled_from([*RESISTANCES, (0, 1, 2), {0: 0, 1: 3.5}]),
    longest=st.integers(1, 9),
    pad=st.sampled_from([None, 0, 3]),
    prompt=st.sampled_from([None, 0, 4, 99]),
    sample=st.booleans(),
    window=st.sampled_from([None, 9, 11]),
)
def test_every_valid_configuration_works(alpha, top_k, resistance, longest, pad, prompt, sample, window) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = MomentumDecoding(
            alpha,
            top_k,
            resistance,
            longest,
            pad_token_id=pad,
            prompt_length=prompt,
            include_prompt=prompt is None,
            window=window,
            sample=sample,
        )
        ids = torch.randint(0, 8, (3, 20))
        scores = processor(ids, torch.randn(3, 8))
    assert scores.shape == (3, 8) and scores.dtype == torch.float32 and not scores.isnan().any()
    kept = scores.isfinite().sum(1)
    assert int(kept.min()) >= 1 and int(kept.max()) <= min(top_k, 8)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"alpha": "much"}, "alpha='much'"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": True}, "top_k=True"),
        ({"max_length": 0}, "max_length=0"),
        ({"resistance": "our"}, "did you mean 'ours'"),
        ({"resistance": [1, 2]}, r"f\(0\) = 0"),
        ({"resistance": {1: 1.0}}, r"f\(0\) = 0"),
        ({"resistance": []}, r"f\(0\) = 0"),
        ({"resistance": [0, math.nan]}, r"f\(1\) is nan"),
        ({"resistance": [0, "x"]}, r"f\(1\) is 'x'"),
        ({"resistance": {0: 0, -1: 2}}, "whole numbers of at least 0"),
        ({"resistance": 3}, "a table"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
        ({"prompt_length": -1}, "prompt_length=-1"),
        ({"include_prompt": False}, "together with prompt_length"),
        ({"exempt_ids": [-5]}, "exempt_ids=-5"),
        ({"window": 4}, "at least max_length=5"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        MomentumDecoding(**options)


def test_a_falling_table_warns() -> None:
    with pytest.warns(UserWarning, match="falls somewhere"):
        MomentumDecoding(resistance=[0, 2, 1], max_length=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_broken_scores_are_refused(value: float, top_k: int) -> None:
    scores = torch.randn(3, 4)
    scores[1, 2] = value
    with pytest.raises(InputError, match=r"rows \[1\].*free of NaN and \+inf"):
        MomentumDecoding(top_k=top_k)(torch.zeros(3, 2, dtype=torch.long), scores)


def test_a_row_without_a_token_is_refused() -> None:
    with pytest.raises(InputError, match="a finite value in every row"):
        MomentumDecoding()(torch.zeros(1, 2, dtype=torch.long), torch.full((1, 9), -math.inf))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((torch.zeros(3, dtype=torch.long), 4), "ids="),
        ((torch.zeros(1, 3), 4), "ids="),
        ((torch.zeros(1, 3, dtype=torch.long), 0), "vocab_size=0"),
        ((torch.zeros(1, 3, dtype=torch.long), 4, 0), "max_length=0"),
    ],
)
def test_repetition_length_refuses(arguments: tuple[Any, ...], names: str) -> None:
    with pytest.raises(InputError, match=names):
        repetition_length(*arguments)


# ------------------------------------------------------------------ in generate


class Fresh(MomentumDecoding):
    """Carries nothing from step to step."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._carried = None
        return super().__call__(input_ids, scores)


def test_beams_that_swap_rows(model: Any, prompts: torch.Tensor) -> None:
    options = {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True}
    carried = generate(model, prompts, logits_processor=[MomentumDecoding()], **options)
    assert torch.equal(carried, generate(model, prompts, logits_processor=[Fresh()], **options))


def test_return_sequences_with_the_sampling_variant(model: Any, prompts: torch.Tensor) -> None:
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_return_sequences": 3}
    torch.manual_seed(0)
    one = generate(model, prompts, logits_processor=[MomentumDecoding(sample=True)], **options)
    torch.manual_seed(0)
    two = generate(model, prompts, logits_processor=[Fresh(sample=True)], **options)
    assert torch.equal(one, two) and len(one) == 9 and len({tuple(row) for row in one.tolist()}) > 3


def test_sampling_law_is_proportional_to_p_exp_minus_resistance() -> None:
    ids = torch.randint(0, 6, (5, 25), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    law = MomentumDecoding(0.3, 6, "ours", sample=True)(ids, logits).softmax(-1)
    weight = logits.softmax(-1) * torch.exp(-0.3 * repetition_length(ids, 6, 5))
    torch.testing.assert_close(law, weight / weight.sum(1, keepdim=True))


def test_streaming(model: Any, prompts: torch.Tensor) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Collect()
    row = generate(model, prompts[:1], logits_processor=[MomentumDecoding()], streamer=streamer)
    assert streamer.tokens == [*row[0].tolist(), -1]


def test_without_a_cache_of_keys_and_from_embeddings(model: Any, prompts: torch.Tensor) -> None:
    plain = generate(model, prompts, 20, logits_processor=[MomentumDecoding()])
    assert torch.equal(plain, generate(model, prompts, 20, logits_processor=[MomentumDecoding()], use_cache=False))
    embeddings = model.get_input_embeddings()(prompts)
    free = {"prompt_length": 9, "include_prompt": False}
    expected = generate(model, prompts, 20, logits_processor=[MomentumDecoding(**free)])[:, 9:]
    mask = torch.ones_like(prompts)
    found = model.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        logits_processor=[MomentumDecoding()],
    )
    assert torch.equal(found, expected)


def test_copies_and_pickles(model: Any, prompts: torch.Tensor) -> None:
    processor = MomentumDecoding(exempt_ids=[3])
    expected = generate(model, prompts, logits_processor=[processor])
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert torch.equal(generate(model, prompts, logits_processor=[other]), expected)
        assert repr(other) == repr(processor)


# ------------------------------------------------------------------ composition


def test_minimum_length_still_holds(model: Any, prompts: torch.Tensor) -> None:
    ends = {"eos_token_id": list(range(1, 12))}
    short = generate(model, prompts, 30, logits_processor=[MomentumDecoding()], **ends)
    options = {"min_new_tokens": 25, "logits_processor": [MomentumDecoding()], **ends}
    long = generate(model, prompts, 30, **options)
    assert any(set(row[9:34]) & set(range(1, 12)) for row in short.tolist())
    assert not any(set(row[9:34]) & set(range(1, 12)) for row in long.tolist())


def test_forbidden_tokens_stay_forbidden() -> None:
    """A seen token with p = 1 scores 1 - 1 = 0, as much as a token that an earlier processor forbade."""
    ids = torch.tensor([[3] * 12])
    logits = torch.full((1, 8), -math.inf)
    logits[0, 3] = 0.0
    assert int(MomentumDecoding(0.3, 5)(ids, logits).argmax()) == 3
    logits[0, 4] = -120.0  # underflows to p = 0
    assert int(MomentumDecoding(0.3, 5)(ids, logits).argmax()) == 4
    steered = LogitsProcessorList([MinLengthLogitsProcessor(20, eos_token_id=5), MomentumDecoding(0.3, 8)])
    assert steered(ids, torch.zeros(1, 8))[0, 5] == -math.inf


def test_a_constrained_vocabulary(model: Any, prompts: torch.Tensor) -> None:
    allowed = [7, 8, 9]
    options = {"prefix_allowed_tokens_fn": lambda batch, ids: allowed, "logits_processor": [MomentumDecoding(0.9, 20)]}
    steered = generate(model, prompts, 30, **options)
    assert set(steered[:, 9:].flatten().tolist()) <= set(allowed)


def test_resistance_is_softer_than_blocking() -> None:
    """A phrase that the model insists on may repeat a 4-gram; n-gram blocking always forbids it."""
    resisted = decode(MomentumDecoding(0.2), bigram(0.95, 0.02), [0], 5)
    blocked = decode(NoRepeatNGramLogitsProcessor(4), bigram(0.95, 0.02), [0], 5)
    assert resisted == [0, 1, 0, 1, 0, 1] and blocked == [0, 1, 0, 1, 0, 2]
    free = decode(MomentumDecoding(0.05), bigram(0.95, 0.02), [0], 30)
    assert free == [0, 1] * 15 + [0]


def test_with_ngram_blocking_in_front(model: Any, prompts: torch.Tensor) -> None:
    steered = generate(model, prompts, no_repeat_ngram_size=2, logits_processor=[MomentumDecoding(0.1)])
    for row in steered.tolist():
        text = row[: row.index(EOS)] if EOS in row else row
        grams = list(itertools.pairwise(text))
        assert len(grams) == len(set(grams))


def test_stopping_criteria_see_the_text(model: Any, prompts: torch.Tensor) -> None:
    class Stop:
        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 15)

    criteria = StoppingCriteriaList([Stop()])
    ids = generate(model, prompts, logits_processor=[MomentumDecoding()], stopping_criteria=criteria)
    assert ids.shape[1] == 15


# ------------------------------------------------------------------ errata of the published code


def test_errata_infinite_resistance_without_alpha_is_no_nan() -> None:
    """The published code computes alpha * inf past the end of its table, which is NaN at alpha = 0."""
    assert math.isnan(0.0 * math.inf)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])  # token 4 would repeat a 5-gram: f is infinite
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 5.0]])
    assert int(repetition_length(ids, 5, 5)[0, 4]) == 5 and RESISTANCES["ngram"](5) == math.inf
    scores = MomentumDecoding(0.0, 5, "ngram")(ids, logits)
    assert not scores.isnan().any() and int(scores.argmax()) == 4


def test_errata_the_committed_table_is_the_ablation() -> None:
    """What the published code runs under the name ``ours`` blocks 4-grams and resists nothing shorter."""
    committed = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 5.0}
    assert resistance_table("ngram", 5) == resistance_table(committed, 5) != resistance_table("ours", 5)
    # Two candidates of 0.55 and 0.4: the resistance leaves after one repeat, the committed table after three.
    chain = bigram(0.55, 0.4)
    assert decode(MomentumDecoding(0.2), chain, [0], 3) == [0, 1, 2, 0]
    assert decode(MomentumDecoding(0.2, resistance=committed), chain, [0], 5) == [0, 1, 0, 1, 0, 2]
