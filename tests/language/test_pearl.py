"""PEARL: the target's law whatever the variant, the schedule that the paper says, and two engines that agree."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from steersman import catalog
from steersman.cluster.launch import launch
from steersman.errors import InputError, TrialError
from steersman.language import MomentumDecoding
from steersman.language.pearl import PEARL, VARIANTS, Rounds, accept, expected_tokens
from steersman.language.pearl.loop import Gamma
from steersman.language.pearl.rounds import STRATEGIES
from steersman.language.pearl.sides import Target, Work
from steersman.language.pearl.threads import Threads

from .conftest import PAD, VOCABULARY, generate, left_padded, tiny
from .tabular import random_law, tabular

LOSSLESS = ("full", "no-pre", "no-post", "sd", "target")

# --- laws of three tokens, a zero among them, and what they make of four tokens -------------------------------------

P = [[0.8, 0.0, 0.2], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]
Q = [[0.1, 0.2, 0.7], [0.2, 0.1, 0.7], [0.15, 0.15, 0.7]]
TEXTS = list(itertools.product(range(3), repeat=4))
EXACT = np.array([np.prod([P[a][b] for a, b in itertools.pairwise((0, *text))]) for text in TEXTS])
Draws = dict[tuple[int, ...], float]


def chi_square(counts: Sequence[float], probabilities: np.ndarray) -> tuple[float, float]:
    """Statistic and p value; cells that expect fewer than 10 are one, and impossible ones must be empty."""
    observed, expected = np.array(counts, float), probabilities * sum(counts)
    small = expected < 10
    if observed[expected == 0].sum() > 0:
        return np.inf, 0.0
    if expected[small].sum() > 0:
        observed = np.append(observed[~small], observed[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    else:
        observed, expected = observed[~small], expected[~small]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return statistic, float(stats.chi2.sf(statistic, len(expected) - 1))


def branches(text: tuple[int, ...], count: int) -> list[tuple[tuple[int, ...], float]]:
    """All that a draft with the laws Q may write behind a text, and with what probability."""
    found = [((), 1.0)]
    for _ in range(count):
        found = [
            ((*z, v), weight * Q[(*text, *z)[-1]][v]) for z, weight in found for v in range(3) if Q[(*text, *z)[-1]][v]
        ]
    return found


def exact_law(variant: str, gamma: int, believe_first: bool = False) -> np.ndarray:
    """The joint law of the first four verified tokens, by summing over everything that can happen.

    Args:
        believe_first: as published without pre-verify: the first token of a block that was drafted alone is taken for
            verified.
    """
    running: Draws = {((0,), ()): 1.0}  # (y, rest)
    done: Draws = defaultdict(float)
    while running:
        after: Draws = defaultdict(float)
        for (y, rest), weight in running.items():
            if len(y) > 4:
                done[y[1:5]] += weight
                continue
            write, scored = Rounds(variant, list(rest)).plan(gamma)
            for z, chance in branches((*y, *rest), write):
                check = Rounds(variant, list(rest)).check(z, scored)
                whole = [*y, *check]
                first = [whole[len(y) - 1 + i] for i in range(len(check) + 1)]  # what each token stands behind
                outcomes: list[tuple[int, int | None, float]] = []
                passed = weight * chance
                for n, token in enumerate(check):
                    p, q = P[first[n]], Q[first[n]]
                    keep = min(1.0, p[token] / q[token])
                    left = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
                    outcomes += [(n, t, passed * (1 - keep) * mass / sum(left)) for t, mass in enumerate(left) if mass]
                    passed *= keep
                if Rounds(variant, list(rest)).draws(z, len(check), scored):
                    outcomes += [(len(check), t, passed * mass) for t, mass in enumerate(P[first[-1]]) if mass]
                else:
                    outcomes.append((len(check), None, passed))
                for n, drawn, mass in outcomes:
                    rounds = Rounds(variant, list(rest))
                    new = rounds.advance(z, n, drawn, scored)
                    if believe_first and not scored:
                        new, rounds.rest = rounds.rest[:1], rounds.rest[1:]
                    if mass > 0:
                        after[((*y, *new), tuple(rounds.rest))] += mass
        running = after
    return np.array([done[text] for text in TEXTS])


def play(rng: random.Random, gamma: int, reuse: bool = False) -> tuple[int, ...]:
    """Four tokens by the rounds of the full variant; with ``reuse``, a place of the text has one uniform for all."""
    y, rounds = [0], Rounds("full")
    by_place: dict[int, float] = defaultdict(rng.random)
    while len(y) <= 4:
        write, scored = rounds.plan(gamma)
        z: list[int] = []
        for _ in range(write):
            z.append(rng.choices((0, 1, 2), Q[[*y, *rounds.rest, *z][-1]])[0])
        check = rounds.check(z, scored)
        first = [*y, *check][len(y) - 1 :]
        q = [Q[first[i]][token] for i, token in enumerate(check)]
        if reuse:
            # As published: the round's place seeds its first draw, and in post-verify that place is the last verified.
            start = len(y) - (1 if rounds.rest else 0)
            uniforms = [by_place[start + i] for i in range(len(check))]
        else:
            uniforms = [rng.random() for _ in check]
        n = accept(check, q, lambda i, first=first, check=check: P[first[i]][check[i]], uniforms)
        token = None
        if rounds.draws(z, n, scored):
            left = [max(a - b, 0.0) for a, b in zip(P[first[n]], Q[first[n]], strict=True)]
            token = rng.choices((0, 1, 2), left)[0]
        y += rounds.advance(z, n, token, scored)
    return tuple(y[1:5])


def counts(texts: Sequence[tuple[int, ...]]) -> list[int]:
    at = {text: i for i, text in enumerate(TEXTS)}
    return np.bincount([at[text] for text in texts], minlength=len(TEXTS)).tolist()


@pytest.mark.parametrize("variant", LOSSLESS)
def test_every_variant_has_the_target_s_law_exactly(variant: str) -> None:
    for gamma in (1, 2, 3) if variant in ("full", "no-pre") else (1, 2):
        assert np.abs(exact_law(variant, gamma) - EXACT).sum() < 1e-12


@pytest.mark.parametrize("gamma", [2, 3])
def test_errata_reused_uniforms_bias_the_text(gamma: int) -> None:
    """Fresh draws pass the chi-square that draws tied to places in the text fail."""
    rng = random.Random(1)
    assert chi_square(counts([play(rng, gamma) for _ in range(30_000)]), EXACT)[1] > 1e-3
    statistic, p = chi_square(counts([play(rng, gamma, reuse=True) for _ in range(10_000)]), EXACT)
    assert statistic > 500 and p < 1e-12


def test_errata_an_unverified_first_token_is_lossy() -> None:
    """Leaving out pre-verify must not leave out the check of the block's first token."""
    lossy = exact_law("no-pre", 2, believe_first=True)
    assert np.abs(lossy - EXACT).sum() / 2 > 0.05
    drawn = np.random.default_rng(0).multinomial(30_000, lossy / lossy.sum())
    assert chi_square(drawn.tolist(), EXACT)[0] > 1000


def test_a_token_that_the_target_never_says_is_never_accepted() -> None:
    assert accept([2], [0.5], lambda i: 0.0, [0.0]) == 0
    assert accept([2, 1], [0.5, 0.3], lambda i: [0.5, 0.3][i], [0.999, 0.0]) == 2
    assert accept([0, 1], [0.2, 0.3], lambda i: [0.7, 0.1][i], [0.999, 0.34]) == 1


# --- the state machine by hand ---------------------------------------------------------------------------------------


def test_the_rounds_of_a_script() -> None:
    """gamma = 3: an early rejection, a run, a rejection within a block, and one of the last token checked."""
    rounds = Rounds("full")
    assert rounds.plan(3) == (3, True)
    assert rounds.check([1, 2, 3], True) == [1] and rounds.draws([1, 2, 3], 0, True)
    assert rounds.advance([1, 2, 3], 0, 9, True) == [9] and rounds.rest == []
    assert rounds.advance([1, 2, 3], 1, None, True) == [1] and rounds.rest == [2, 3]
    assert rounds.plan(3) == (3, True)
    assert rounds.check([4, 5, 6], True) == [2, 3, 4] and not rounds.draws([4, 5, 6], 3, True)
    assert rounds.advance([4, 5, 6], 3, None, True) == [2, 3, 4] and rounds.rest == [5, 6]
    assert rounds.advance([7, 8, 1], 1, 9, True) == [5, 9] and rounds.rest == []
    assert rounds.advance([1, 2, 3], 1, None, True) == [1]
    assert rounds.advance([4, 5, 6], 2, 9, True) == [2, 3, 9] and rounds.rest == []

    rounds = Rounds("no-pre")
    assert rounds.plan(2) == (2, False) and rounds.check([1, 2], False) == []
    assert rounds.advance([1, 2], 0, None, False) == [] and rounds.rest == [1, 2]
    assert rounds.check([3, 4], True) == [1, 2, 3]
    assert rounds.advance([3, 4], 3, None, True) == [1, 2, 3] and rounds.rest == [4]

    rounds = Rounds("no-post")
    assert rounds.advance([1, 2, 3], 1, None, True) == [1] and rounds.plan(3) == (0, True)
    assert rounds.draws([], 2, True) and rounds.advance([], 2, 9, True) == [2, 3, 9] and rounds.plan(3) == (3, True)

    rounds = Rounds("sd")
    assert rounds.plan(2) == (2, False) and rounds.advance([1, 2], 0, None, False) == []
    assert rounds.plan(2) == (0, True) and rounds.advance([], 1, 9, True) == [1, 9] and rounds.rest == []
    assert Rounds("target").plan(5) == (0, True) and Rounds("draft").plan(5) == (1, False)
    assert Rounds("draft").advance([7], 0, None, False) == [7]


def tokens_a_round(variant: str, a: float, gamma: int, rounds: int) -> float:
    """Tokens that a round adds when each drafted token is accepted with probability a."""
    rng, machine, tokens = random.Random(0), Rounds(variant), 0
    for _ in range(rounds):
        write, scored = machine.plan(gamma)
        z = [1] * write
        check = machine.check(z, scored)
        n = accept(check, [1.0] * len(check), lambda i: a, [rng.random() for _ in check])
        tokens += len(machine.advance(z, n, 0 if machine.draws(z, n, scored) else None, scored))
    return tokens / rounds


@pytest.mark.parametrize(("a", "gamma"), [(0.5, 3), (0.8, 4), (0.9, 5)])
def test_tokens_a_round_are_as_the_formula_says(a: float, gamma: int) -> None:
    assert tokens_a_round("full", a, gamma, 100_000) == pytest.approx(expected_tokens(a, gamma), rel=0.01)


@pytest.mark.parametrize(("a", "gamma", "pre", "post"), [(0.58, 4, 1.25, 1.02), (0.9, 5, 1.03, 1.27)])
def test_what_each_strategy_adds(a: float, gamma: int, pre: float, post: float) -> None:
    """In rounds of equal time (gamma t_draft = t_target): pre-verify for early rejections, post-verify for runs."""
    full = expected_tokens(a, gamma)
    assert full / tokens_a_round("no-pre", a, gamma, 20_000) == pytest.approx(pre, abs=0.03)
    assert full / tokens_a_round("no-post", a, gamma, 20_000) == pytest.approx(post, abs=0.03)


def test_the_formula_at_its_ends() -> None:
    known = {(0.5, 3): 1.273, (0.8, 4): 2.123, (0.9, 5): 3.127, (0.0, 4): 1.0, (1.0, 4): 4.0, (0.3, 1): 1.0}
    for (a, gamma), value in known.items():
        assert expected_tokens(a, gamma) == pytest.approx(value, abs=5e-4)


# --- on models -------------------------------------------------------------------------------------------------------


def test_greedy_equality_over_fifty_pairs() -> None:
    """Token for token in float32: block lengths 1 to 6, prompts of 1 to 50 tokens (shorter than a block, too)."""
    for pair in range(50):
        kind, other = [("gpt2", "gpt2"), ("llama", "llama"), ("llama", "gpt2")][pair % 3]
        target, draft = tiny(kind, pair), tiny(other, pair if pair % 5 == 0 and kind == other else 1000 + pair)
        prompt = torch.randint(2, VOCABULARY, (1, 1 + pair), generator=torch.Generator().manual_seed(pair))
        expected = generate(target, prompt, 8)
        for gamma, variant in ((1 + pair % 6, "full"), (1 + (pair + 3) % 6, ("full", *LOSSLESS)[pair % 6])):
            found = generate(target, prompt, 8, custom_generate=PEARL(draft, gamma, variant))
            assert torch.equal(found, expected), (pair, gamma, variant)


def test_errata_a_sampled_text_of_the_loop_has_the_target_s_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """1200 tokens by the loop's own draws pass the chi-square that the same loop fails with draws tied to places."""
    for variant in ("full", "no-pre"):
        assert _transitions(variant, 600)[1] > 1e-3
    by_place: dict[int, float] = defaultdict(random.Random(0).random)

    def tied(side: Target, count: int) -> list[float]:
        start = side.first - (1 if count > 1 else 0)
        return [by_place[start + i] for i in range(count)]

    monkeypatch.setattr(Target, "uniforms", tied)
    assert _transitions("full", 1000)[1] < 1e-6


def _transitions(variant: str, tokens: int) -> tuple[float, float]:
    """Chi-square of the tokens behind each token of one long text."""
    target, draft = (tabular(torch.tensor(law).log()) for law in (P, Q))
    loop = PEARL(draft, 2, variant, generator=torch.Generator().manual_seed(0))
    options = {"do_sample": True, "top_k": 0, "custom_generate": loop}
    text = generate(target, torch.tensor([[0]]), tokens, **options)[0].tolist()
    seen = np.zeros((3, 3))
    np.add.at(seen, (text[:-1], text[1:]), 1)
    assert seen[0, 1] == 0  # which the target never says
    expected = seen.sum(1, keepdims=True) * np.array(P)
    possible = expected > 0
    statistic = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    return float(statistic), float(stats.chi2.sf(statistic, possible.sum() - 3))


class Watch:
    """Counts forwards, and notes the lengths that each round leaves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Any, draft: Any) -> None:
        self.rounds: list[tuple[int, int, int, int]] = []
        self.calls = {"target": 0, "draft": 0}
        for name, model in (("target", target), ("draft", draft)):
            model.register_forward_pre_hook(lambda *_, name=name: self.count(name))
        plain = Threads.commit

        def commit(engine: Threads, length: int, verified: list[int], rest: list[int]) -> None:
            plain(engine, length, verified, rest)
            engine._committed.result()
            lengths = (engine.target.chain.length, engine.draft.chain.length)
            self.rounds.append((length + len(verified), len(rest), *lengths))

        monkeypatch.setattr(Threads, "commit", commit)

    def count(self, name: str) -> None:
        self.calls[name] += 1


@pytest.mark.parametrize("variant", STRATEGIES)
def test_caches_and_forwards_of_every_round(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that errs now and then: target's cache len(y) - 1, draft's len(y) + len(rest) - 1."""
    target, draft = tiny("gpt2", 3), tiny("gpt2", 3)
    with torch.no_grad():
        draft.lm_head.weight.add_(0.35 * torch.randn(draft.lm_head.weight.shape, generator=torch.manual_seed(2)))
    watch = Watch(monkeypatch, target, draft)
    loop = PEARL(draft, 3, variant)
    prompt = torch.tensor([[5, 9, 2]])
    generate(target, prompt, 40, eos_token_id=None, custom_generate=loop)
    record = loop.record
    assert watch.calls == {"target": record.target_calls, "draft": record.draft_calls}
    assert len(set(record.accepted)) > 1 and record.tokens == 40 and sum(record.accepted) == 40
    if variant == "full":
        assert record.target_calls == len(watch.rounds)
        assert 3 * (len(watch.rounds) - 3) <= record.draft_calls <= 3 * len(watch.rounds)
    for y, rest, at_target, at_draft in watch.rounds[:-1]:
        # Before a bonus token the draft has not seen the last token that it wrote either.
        lag = {y + rest - 1} if variant in ("full", "no-pre") else {y + rest - 1, y + rest - 2}
        assert at_draft in lag
        assert at_target == y - 1 or (at_target < y and rest != 0)


def test_the_same_model_accepts_all_and_a_disjoint_one_nothing() -> None:
    law = random_law(4, seed=2)
    loop = PEARL(tabular(law), 4)
    ids = torch.tensor([[1]])
    generate(tabular(law), ids, 41, do_sample=True, top_k=0, custom_generate=loop)
    assert loop.record.accepted == [1, *[4] * 10] and loop.record.acceptance == 1
    evens, odds = (torch.full((4, 4), -torch.inf) for _ in range(2))
    evens[:, ::2], odds[:, 1::2] = 0.0, 0.0
    loop = PEARL(tabular(odds), 4)
    text = generate(tabular(evens), torch.tensor([[0]]), 20, do_sample=True, top_k=0, custom_generate=loop)
    assert loop.record.accepted == [1] * 20 and loop.record.acceptance == 0 and set(text[0].tolist()) <= {0, 2}


def test_warpers_and_processors_hold_for_both_models() -> None:
    """With the draft under the same warpers a draft that is the target is accepted whole; and the law is theirs."""
    target = tiny("llama", 1)
    options = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.3}
    loop = PEARL(tiny("llama", 1), 3)
    generate(target, torch.tensor([[3, 4]]), 31, eos_token_id=None, custom_generate=loop, **options)
    assert set(loop.record.accepted[1:]) == {3}
    draft = tiny("llama", 7)
    prompt = torch.tensor([[8, 2, 30]])
    for more in ({"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 20}):
        expected = generate(target, prompt, 24, **more)
        assert torch.equal(expected, generate(target, prompt, 24, custom_generate=PEARL(draft, 3), **more))
    only = {"prefix_allowed_tokens_fn": lambda batch, ids: [7, 9], "do_sample": True}
    found = generate(target, prompt, 20, custom_generate=PEARL(draft, 2), **only)
    assert set(found[0, 3:].tolist()) == {7, 9}


def test_a_greedy_rejection_needs_no_law_of_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one law that would travel between ranks stays where it is; sampling asks for it."""
    asked: list[int] = []
    plain = Threads.law
    monkeypatch.setattr(Threads, "law", lambda engine, i: asked.append(i) or plain(engine, i))
    target, prompt = tiny("gpt2", 4), torch.tensor([[5, 9, 2]])
    loop = PEARL(tiny("gpt2", 5), 2)
    generate(target, prompt, 10, eos_token_id=None, custom_generate=loop)
    assert loop.record.rejected > 0 and not asked
    generate(target, prompt, 10, eos_token_id=None, do_sample=True, custom_generate=loop)
    assert len(asked) == loop.record.rejected > 0


def test_momentum_decoding_inside() -> None:
    target, draft = tiny("gpt2", 4), tiny("gpt2", 5)
    prompt = torch.tensor([[5, 9, 2, 5, 9]])
    steer = LogitsProcessorList([MomentumDecoding(alpha=0.4)])
    expected = generate(target, prompt, 30, logits_processor=steer)
    found = generate(target, prompt, 30, logits_processor=steer, custom_generate=PEARL(draft, 3))
    assert torch.equal(found, expected) and not torch.equal(found, generate(target, prompt, 30))


def test_left_padding_is_the_text_without_it() -> None:
    target, draft = tiny("llama", 2), tiny("gpt2", 2)
    ids, mask = left_padded([torch.tensor([5, 9, 2]), torch.tensor([4] * 8)])
    expected = generate(target, ids[:1], 20, attention_mask=mask[:1])
    found = generate(target, ids[:1], 20, attention_mask=mask[:1], custom_generate=PEARL(draft, 3))
    assert torch.equal(found, expected) and found[0, 0] == PAD


def short(seed: int, positions: int) -> Any:
    """A model that takes texts of so many tokens."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": positions, "initializer_range": 0.25}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None)).eval()


class Pieces(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_errata_only_verified_tokens_come_out(variant: str) -> None:
    """No more than asked for, nothing behind the end, and the streamer hears what is returned."""
    target, draft = tiny("gpt2", 3), tiny("gpt2", 9)
    writer = draft if variant == "draft" else target
    prompt = torch.tensor([[5, 9, 2]])
    for new in (1, 2, 7, 20):
        streamer = Pieces()
        found = generate(
            target, prompt, new, eos_token_id=None, custom_generate=PEARL(draft, 5, variant, streamer=streamer)
        )
        assert torch.equal(found, generate(writer, prompt, new, eos_token_id=None))
        assert streamer.pieces[0] == prompt[0].tolist() and streamer.ended == 1
        assert list(itertools.chain(*streamer.pieces)) == found[0].tolist()
    free = generate(writer, prompt, 20, eos_token_id=None)[0, 3:].tolist()
    for end in set(free[2:6]):
        streamer = Pieces()
        loop = PEARL(draft, 5, variant, streamer=streamer)
        found = generate(target, prompt, 20, eos_token_id=end, custom_generate=loop)[0, 3:].tolist()
        assert found == free[: free.index(end) + 1]
        assert list(itertools.chain(*streamer.pieces))[3:] == found


def test_output_object_criteria_and_the_longest_text() -> None:
    target, draft = tiny("gpt2", 3), short(9, 64)
    prompt = torch.tensor([[5, 9, 2]])
    output = generate(target, prompt, 15, return_dict_in_generate=True, custom_generate=PEARL(draft, 4))
    assert torch.equal(output.sequences, generate(target, prompt, 15))
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    stop = [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 9])]
    assert generate(target, prompt, 15, stopping_criteria=stop, custom_generate=PEARL(draft, 4)).shape[1] == 9
    # The draft model has no position behind the last one that the text needs.
    whole = generate(target, prompt, 61, eos_token_id=None, custom_generate=PEARL(draft, 6))
    assert torch.equal(whole, generate(target, prompt, 61, eos_token_id=None))


def test_a_seed_is_a_text() -> None:
    target, draft = tiny("llama", 3), tiny("llama", 9)
    prompt = torch.tensor([[5, 9, 2]])

    def write(**options: Any) -> list[int]:
        return generate(target, prompt, 25, do_sample=True, custom_generate=PEARL(draft, 3, **options))[0].tolist()

    one, two = (write(generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert one == write(generator=torch.Generator().manual_seed(1)) and one != two
    torch.manual_seed(0)
    first = write()
    torch.manual_seed(0)
    assert first == write() and first != write()
    with torch.inference_mode():
        torch.manual_seed(0)
        assert first == write()


def test_gamma_is_the_ratio_of_times() -> None:
    for t_target, expected in ((0.031, 3), (0.004, 1), (5.0, 16)):
        gamma = Gamma("auto")
        assert gamma.now == 4
        gamma.time(Work([1], [0.5], 9.0, 7.0))  # the prompt
        for _ in range(4):
            gamma.time(Work([1], [0.5], 0.01, t_target))
        assert gamma.now == expected
        gamma.begin()
        for _ in range(6):
            gamma.time(Work([1], [0.5], 0.01, 0.01))
        assert gamma.now == expected  # of later texts, too
    short = Gamma("auto")  # texts of three rounds each, the first of which isn't counted
    for text in range(2):
        assert short.now == 4, text
        short.begin()
        for t_draft, t_target in ((9.0, 9.0), (0.01, 0.02), (0.01, 0.02)):
            short.time(Work([1], [0.5], t_draft, t_target))
    assert short.settled and short.now == 2 and short.medians() == (0.01, 0.02)
    target, draft = tiny("gpt2", 3), tiny("gpt2", 3)
    loop = PEARL(draft)
    prompt = torch.tensor([[5, 9, 2]])
    found = generate(target, prompt, 60, eos_token_id=None, custom_generate=loop)
    assert torch.equal(found, generate(target, prompt, 60, eos_token_id=None))
    assert loop.record.gammas[0] == 4 and loop.record.t_draft > 0 and loop.record.t_target > 0
    assert (
        loop.record.gammas[-1] == min(max(round(loop.record.t_target / loop.record.t_draft), 1), 16)
        or len(set(loop.record.gammas)) > 1
    )


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "parameter"),
    [
        ({"gamma": 0}, "gamma"),
        ({"gamma": 17}, "gamma"),
        ({"gamma": True}, "gamma"),
        ({"gamma": 2.0}, "gamma"),
        ({"gamma": "fast"}, "gamma"),
        ({"variant": "rc"}, "variant"),
        ({"engine": "processes"}, "engine"),
        ({"timeout": 0}, "timeout"),
        ({"draft_model": None}, "draft_model"),
    ],
)
def test_arguments_out_of_range(changed: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InputError) as caught:
        PEARL(**({"draft_model": tiny("gpt2")} | changed))
    assert caught.value.parameter == parameter


def _static(model: Any) -> dict[str, Any]:
    return {"past_key_values": StaticCache(model.config, max_cache_len=40)}


@pytest.mark.parametrize(
    ("draft", "options", "parameter"),
    [
        (lambda: tiny("gpt2"), lambda model: {"num_beams": 2}, "num_beams"),
        (lambda: tiny("gpt2"), lambda model: {"use_cache": False}, "past_key_values"),
        (lambda: tiny("gpt2"), _static, "past_key_values"),
        (lambda: tiny("gpt2"), lambda model: {"num_return_sequences": 2, "do_sample": True}, "batch"),
        (lambda: tiny("gpt2"), lambda model: {"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        (lambda: tiny("gpt2", vocab_size=97), lambda model: {}, "draft_model"),
        (lambda: short(0, 12), lambda model: {}, "max_new_tokens"),
        (lambda: tiny("gpt2"), lambda model: {"engine": "distributed"}, "engine"),
    ],
)
def test_what_no_round_can_run(
    draft: Callable[[], Any], options: Callable[[Any], dict[str, Any]], parameter: str
) -> None:
    model = tiny("gpt2", 1)
    given = options(model)
    loop = PEARL(draft(), 2, engine=given.pop("engine", "threads"))
    with pytest.raises(InputError) as caught:
        generate(model, torch.tensor([[5, 9, 2]]), 20, custom_generate=loop, **given)
    assert caught.value.parameter == parameter


def test_batches_and_encoder_decoders_are_refused(prompts: torch.Tensor) -> None:
    model = tiny("gpt2", 1)
    with pytest.raises(InputError, match="MultiDraft"):
        generate(model, prompts, 5, custom_generate=PEARL(tiny("gpt2"), 2))
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    both = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(InputError, match="decoder-only"):
        generate(model, prompts[:1], 5, custom_generate=PEARL(both, 2))


def test_shared_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny("gpt2", 1), torch.tensor([[5, 9, 2]])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    with pytest.warns(UserWarning, match=r"torch\.set_num_threads\(\d+\) gives each its own"):
        generate(model, prompt, 3, custom_generate=PEARL(tiny("gpt2"), 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, prompt, 3, custom_generate=PEARL(tiny("gpt2"), 2))


def test_a_failing_draft_is_heard() -> None:
    model, draft = tiny("gpt2", 1), tiny("gpt2", 2)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    draft.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, torch.tensor([[5, 9, 2]]), 5, custom_generate=PEARL(draft, 2))


@pytest.mark.parametrize(("variant", "threads"), [("full", 2), ("no-pre", 2), ("no-post", 2), ("sd", 1)])
def test_models_that_take_turns_run_in_the_calling_thread(variant: str, threads: int) -> None:
    model, draft, seen = tiny("gpt2", 1), tiny("gpt2", 9), set()
    for each in (model, draft):
        each.register_forward_pre_hook(lambda *_: seen.add(threading.get_ident()))
    loop = PEARL(draft, 2, variant)
    generate(model, torch.tensor([[5, 9, 2]]), 8, custom_generate=loop, eos_token_id=None)
    assert len(seen) == threads == loop.models_at_once and threading.get_ident() in seen


# --- two ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found, one of which was killed at the end."""
    folder = tmp_path_factory.mktemp("ranks")
    function = f"{Path(__file__).parent / 'pearl_ranks.py'}:everything"
    with pytest.raises(TrialError, match="rank 0 of 2 was killed by SIGKILL") as caught:
        launch(function, {"folder": str(folder)}, 2, timeout=200)
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), caught.value.__notes__
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("case", [*VARIANTS, "same model", "large ids", "small vocabulary", "afterwards"])
def test_errata_both_engines_write_the_same_text(ranks: list[dict[str, Any]], case: str) -> None:
    """Also with ids that bfloat16 would round, and with fewer tokens than two blocks have."""
    for found in ranks:
        assert found[case][:2] == [True, True] and found[case][2] > 3


def test_ranks_refuse_what_they_can_t_share(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert (
            found["other prompt"][0] == "InputError"
            and "different on the two ranks (prompt)" in found["other prompt"][1]
        )
        assert found["other settings"][0] == "InputError"
        assert "(do_sample: 0 on rank 0, 1 on rank 1)" in found["other settings"][1]
        assert found["other vocabulary"][0] == "InputError" and "97 tokens" in found["other vocabulary"][1]
    assert ranks[0]["refused"][0] == "InputError" and "no cache" in ranks[0]["refused"][1]
    assert ranks[1]["refused"][:2] == ["TrialError", "rank 0 (draft model) refused its input, and says why itself"]


def test_a_rank_that_fails_hangs_or_dies_ends_both(ranks: list[dict[str, Any]]) -> None:
    """Within 10 seconds, and no process is left."""
    names = ("rank 0 (draft model)", "rank 1 (target)")
    for who in (0, 1):
        failed, hung = f"rank {who} fails", f"rank {who} hangs"
        assert ranks[who][failed][:2] == ["ValueError", "out of memory"]
        assert ranks[1 - who][failed][0] == "TrialError" and f"{names[who]} is gone" in ranks[1 - who][failed][1]
        assert ranks[who][hung][0] == "TrialError" and f"{names[who]} took longer than 1 s" in ranks[who][hung][1]
        assert ranks[1 - who][hung][0] == "TrialError" and names[who] in ranks[1 - who][hung][1]
        assert all(found[case][2] < 10 for found in ranks for case in (failed, hung))
    assert ranks[0]["late failure"][:2] == ["OSError", "pipe closed"]
    assert ranks[1]["late failure"][0] == "TrialError" and f"{names[0]} is gone" in ranks[1]["late failure"][1]
    assert "killed" not in ranks[0]
    assert ranks[1]["killed"][0] == "TrialError" and ranks[1]["killed"][2] < 10
    assert "rank 0 (draft model) is gone" in ranks[1]["killed"][1]
    for found in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(found["pid"], 0)


def test_the_card_s_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On saved folders, which come back as they were."""
    monkeypatch.chdir(tmp_path)
    words = {"<pad>": 0, "<eos>": 1} | {word: i for i, word in enumerate(["The", "file", "object", "that", "is"], 2)}
    tokenizer = Tokenizer(WordLevel(words | {f"w{i}": i for i in range(7, VOCABULARY)}, unk_token="w7"))
    tokenizer.pre_tokenizer = Whitespace()
    for folder, seed in (("my-language-model", 1), ("my-smaller-model", 2)):
        tiny("llama", seed).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
            folder
        )
    found: dict[str, Any] = {}
    exec(catalog.card("pearl").text.partition("## Use\n")[2].partition("```python\n")[2].partition("```")[0], found)
    expected = generate(tiny("llama", 1), found["inputs"]["input_ids"], 64)
    assert torch.equal(found["ids"], expected)
    assert "tokens by target call, blocks of" in capsys.readouterr().out
