"""Text metrics against closed forms, brute force and transformers' own loss."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from steersman.errors import InputError, TrialError
from steersman.reference import text_metrics as tm

rows_of_tokens = st.lists(st.lists(st.integers(0, 4), max_size=30), min_size=1, max_size=6)


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


# --- oracles ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows_of_tokens, st.integers(1, 6))
def test_repetition_equals_brute_force(rows: list[list[int]], n: int) -> None:
    expected = [1 - len(set(g)) / len(g) if (g := grams(r, n)) else 0.0 for r in rows]
    np.testing.assert_allclose(tm.rep_n(rows, n), expected, atol=1e-15)
    if all(len(r) < n for r in rows):
        with pytest.raises(InputError, match="n="):
            tm.distinct_n(rows, n)
    else:
        every = [g for r in rows for g in grams(r, n)]
        assert tm.distinct_n(rows, n) == pytest.approx(len(set(every)) / len(every), abs=1e-15)


def test_repetition_of_a_constant_row_is_known() -> None:
    # T copies of one token: T - n + 1 n-grams, one of them different.
    length = 20
    value = tm.rep_n([[7] * length], 3)
    assert value == pytest.approx([1 - 1 / (length - 2)])
    assert tm.diversity([[7] * length]) == pytest.approx([1 / 19 / 18 / 17])
    assert tm.diversity([list(range(50))]) == pytest.approx([1.0])


def test_large_token_numbers_do_not_collide() -> None:
    rng = np.random.default_rng(0)
    row = (rng.integers(0, 3, 400) * (2**31 - 1)).tolist()
    expected = 1 - len(set(grams(row, 5))) / len(grams(row, 5))
    assert tm.rep_n([row], 5)[0] == pytest.approx(expected, abs=1e-15)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_loops_equal_brute_force(ids: list[int], n: int) -> None:
    loops, at = [], 0
    while at < len(ids):
        best = (0, -1)
        for source in range(at):
            length = 0
            while at + length < len(ids) and ids[source + length] == ids[at + length]:
                length += 1
            best = max(best, (length, source))
        if best[0] >= n:
            loops.append(tm.Loop(at, at + best[0], best[1]))
        at += best[0] if best[0] >= n else 1
    assert tm.find_loops(ids, n) == loops
    for loop in loops:
        for k in range(loop.stop - loop.start):
            assert ids[loop.start + k] == ids[loop.source + k]


def test_a_periodic_text_is_one_loop() -> None:
    assert tm.find_loops([1, 2, 3] * 5, 4) == [tm.Loop(3, 15, 0)]
    assert tm.find_loops(list(range(30)), 2) == []


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihood_equals_one_row_at_a_time(gpt2: GPT2LMHeadModel, batch_size: int) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 37, n).tolist() for n in (5, 1, 12, 3, 7)]
    rests = [rng.integers(0, 37, n).tolist() for n in (8, 20, 1, 14, 2)]
    found = tm.log_likelihood(gpt2, rests, prompts, batch_size)
    for i, (a, b) in enumerate(zip(prompts, rests, strict=True)):
        with torch.no_grad():
            logp = torch.log_softmax(gpt2(torch.tensor([a + b])).logits[0], -1)
        expected = sum(float(logp[len(a) + k - 1, t]) for k, t in enumerate(b))
        assert found.total[i] == pytest.approx(expected, rel=1e-12)
    assert found.tokens.tolist() == [8, 20, 1, 14, 2]
    np.testing.assert_allclose(found.mean, found.total / found.tokens)


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_likelihood_equals_the_loss_of_transformers(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 37, n).tolist() for n in (30, 11, 2)]
    found = tm.log_likelihood(model, rows, batch_size=2)
    for i, row in enumerate(rows):
        x = torch.tensor([row])
        with torch.no_grad():
            loss = float(model(input_ids=x, labels=x).loss)
        assert -found.mean[i] == pytest.approx(loss, rel=1e-5)
        assert found.tokens[i] == len(row) - 1
    prompts, rests = [r[:1] for r in rows], [r[1:] for r in rows]
    again = tm.log_likelihood(model, rests, prompts)
    np.testing.assert_allclose(again.total, found.total, rtol=1e-5)


def test_uniform_model_has_the_vocabulary_as_perplexity(gpt2: GPT2LMHeadModel) -> None:
    blank = GPT2LMHeadModel(gpt2.config)
    torch.nn.init.zeros_(blank.lm_head.weight)
    found = tm.log_likelihood(blank, [[1, 2, 3], [4]], [[0], [5, 6]])
    assert found.perplexity == pytest.approx(37, rel=1e-6)
    assert found.mean == pytest.approx([-math.log(37)] * 2, rel=1e-6)


def test_features_are_the_mean_over_the_continuation(gpt2: GPT2LMHeadModel) -> None:
    prompts, rests = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]]
    found = tm.hidden_features(gpt2, rests, prompts)
    for i in range(2):
        with torch.no_grad():
            out = gpt2(torch.tensor([prompts[i] + rests[i]]), output_hidden_states=True)
        expected = out.hidden_states[-1][0, len(prompts[i]) :].mean(0)
        np.testing.assert_allclose(found[i], expected.numpy(), rtol=1e-10)


def test_ngram_divergence_is_jensen_shannon() -> None:
    assert tm.ngram_divergence([[1, 1, 2]], [[1, 2, 1]]) == pytest.approx(0, abs=1e-15)
    assert tm.ngram_divergence([[1, 2]], [[3, 4]]) == pytest.approx(1)
    left, right = [[1, 2, 2, 3], [1, 3]], [[3, 3, 1]]
    from scipy.spatial.distance import jensenshannon

    for n in (1, 2):
        p = Counter(g for r in left for g in grams(r, n))
        q = Counter(g for r in right for g in grams(r, n))
        keys = sorted({*p, *q})
        expected = jensenshannon([p[k] for k in keys], [q[k] for k in keys], base=2) ** 2
        assert tm.ngram_divergence(left, right, n) == pytest.approx(expected)
        assert tm.ngram_divergence(right, left, n) == pytest.approx(expected)


def test_divergence_area_of_known_histograms() -> None:
    p = np.array([0.2, 0.5, 0.3])
    assert tm.divergence_area(p, p) == pytest.approx(1, abs=1e-12)
    # Disjoint: KL(q || r) = -log(1 - l), KL(p || r) = -log l, area = c B(c, c + 1) = 1 / binom(2c, c).
    for c in (1, 2, 5):
        area = tm.divergence_area(np.array([1.0, 0.0]), np.array([0.0, 1.0]), scale=c)
        assert area == pytest.approx(1 / math.comb(2 * c, c), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=8))
def test_divergence_area_is_symmetric_and_bounded(counts: list[tuple[int, int]]) -> None:
    a, b = (np.array(c, dtype=float) for c in zip(*counts, strict=True))
    if not a.sum() or not b.sum():
        return
    p, q = a / a.sum(), b / b.sum()
    area = tm.divergence_area(p, q, points=200)
    assert area == pytest.approx(tm.divergence_area(q, p, points=200), abs=1e-9)
    assert 1 / 252 - 1e-4 <= area <= 1 + 1e-12


def test_cluster_divergence_orders_near_and_far() -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(200, 16))
    same, shifted = rng.normal(size=(200, 16)), rng.normal(size=(200, 16)) + 0.5
    values = [tm.cluster_divergence(x, reference) for x in (reference, same, shifted)]
    assert values[0] == pytest.approx(1)
    assert values[1] > 0.9 and values[1] > values[2] + 0.1
    far = tm.cluster_divergence(same + 50, reference, clusters=2)
    assert far == pytest.approx(1 / 252, rel=1e-3)
    assert tm.cluster_divergence(same, reference, seed=5) == tm.cluster_divergence(same, reference, seed=5)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_n_must_be_a_positive_whole_number(n: object) -> None:
    for metric in (tm.rep_n, tm.distinct_n, lambda r, n: tm.find_loops(r[0], n)):
        with pytest.raises(InputError, match=r"^n="):
            metric([[1, 2]], n)


@pytest.mark.parametrize("rows", [[], "abc", 3, [1, 2], ["abc"]])
def test_rows_must_be_token_sequences(rows: object) -> None:
    with pytest.raises(InputError, match=r"^rows"):
        tm.rep_n(rows, 2)  # type: ignore[arg-type]


def test_likelihood_refuses_what_it_cannot_score(gpt2: GPT2LMHeadModel) -> None:
    for rests, prompts, name in (
        ([[1]], None, "continuations"),
        ([[]], [[1]], "continuations"),
        ([[1], [2]], [[1]], "prompts"),
        ([[1, 37]], [[1]], "rows"),
        ([[1, -1]], [[1]], "rows"),
        ([[1] * 40], [[1]], "rows"),
        ([], [], "rows"),
    ):
        with pytest.raises(InputError, match=rf"^{name}"):
            tm.log_likelihood(gpt2, rests, prompts)
    with pytest.raises(InputError, match=r"^batch_size"):
        tm.log_likelihood(gpt2, [[1, 2]], batch_size=0)
    with pytest.raises(InputError, match=r"^continuations"):
        tm.hidden_features(gpt2, [[]], [[1]])


def test_a_nan_of_the_model_is_a_failed_trial(llama: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    broken = LlamaForCausalLM(llama.config)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(TrialError, match="NaN"):
        tm.log_likelihood(broken, [[1, 2, 3]])


def test_the_training_mode_is_left_as_it_was(gpt2: GPT2LMHeadModel) -> None:
    gpt2.train()
    noisy = [tm.log_likelihood(gpt2, [[1, 2, 3]]).total[0] for _ in range(2)]
    assert noisy[0] == noisy[1] and gpt2.training
    gpt2.eval()
    assert tm.log_likelihood(gpt2, [[1, 2, 3]]).total[0] == noisy[0] and not gpt2.training


@pytest.mark.parametrize(
    ("p", "q"), [([0.5, 0.6], [0.5, 0.5]), ([1.0], [0.5, 0.5]), ([1.5, -0.5], [0.5, 0.5]), ([[1.0]], [[1.0]])]
)
def test_histograms_must_be_probabilities(p: list, q: list) -> None:
    with pytest.raises(InputError, match=r"^[pq]="):
        tm.divergence_area(np.array(p), np.array(q))


def test_cluster_divergence_refuses_bad_features() -> None:
    good = np.zeros((4, 3))
    for generated, name in (
        (np.zeros((4, 2)), "generated"),
        (np.zeros(4), "generated"),
        (good * math.nan, "generated"),
    ):
        with pytest.raises(InputError, match=rf"^{name}"):
            tm.cluster_divergence(generated, good)
    for clusters in (1, 5, 2.0):
        with pytest.raises(InputError, match=r"^clusters"):
            tm.cluster_divergence(good, good, clusters=clusters)
    with pytest.raises(InputError, match=r"^generated, reference"):
        tm.ngram_divergence([[1]], [[1, 2]], n=2)
