"""Token-level DPO on a tree in float64 where everything can be solved, then on transformers' and TRL's classes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steersman.errors import InputError
from steersman.language.q_star import (
    ImplicitReward,
    ImplicitRewardSearch,
    LikelihoodSearch,
    Pair,
    RewardDriftCallback,
    apply,
    fingerprint,
    joint_logratio,
    page,
    pieces,
    preference_training,
    probe,
    sampled_pairs,
    spans,
    terminal,
    token_rewards,
)
from steersman.language.q_star.monitoring import sampled
from steersman.language.q_star.rewards import of_tokens

from .conftest import EOS, PAD, VOCABULARY, left_padded, tiny

# ------------------------------------------------------------------ a tree where everything can be solved

TOKENS, DEPTH, END = 5, 4, 0  # token 0 ends an answer; at depth 4 an answer ends with any token


class Tree:
    """A token decision process with random rewards r(s, a) and reference, and its soft Bellman solution in float64.

    Attributes:
        states: answers so far that go on.
        r, log_ref, log_policy: (5,) of each state.
        value: V*(s), 0 at the ends.
        answers: finished answers.
    """

    def __init__(self, beta: float, seed: int = 0, sparse: tuple[int, ...] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.beta = beta
        self.states = [s for n in range(DEPTH) for s in itertools.product(range(1, TOKENS), repeat=n)]
        self.answers = [(*s, a) for s in self.states for a in range(TOKENS) if self.ended((*s, a))]
        draw = {s: torch.randn(2, TOKENS, generator=generator, dtype=torch.float64) for s in self.states}
        self.log_ref = {s: draw[s][1].log_softmax(0) for s in self.states}
        self.r = {s: draw[s][0] for s in self.states}
        if sparse is not None:  # a reward at the end of one subtree alone
            self.r = {s: torch.zeros(TOKENS, dtype=torch.float64) for s in self.states}
            for answer in self.answers:
                if answer[: len(sparse)] == sparse:
                    self.r[answer[:-1]][answer[-1]] = -1.0
        self.value: dict[tuple[int, ...], Tensor] = {}
        self.log_policy: dict[tuple[int, ...], Tensor] = {}
        for s in reversed(self.states):
            q = self.q(s)
            self.value[s] = beta * (q / beta).logsumexp(0)
            self.log_policy[s] = (q - self.value[s]) / beta

    def ended(self, s: tuple[int, ...]) -> bool:
        return len(s) == DEPTH or s[-1:] == (END,)

    def v(self, s: tuple[int, ...]) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if self.ended(s) else self.value[s]

    def q(self, s: tuple[int, ...]) -> Tensor:
        return torch.stack([self.r[s][a] + self.beta * self.log_ref[s][a] + self.v((*s, a)) for a in range(TOKENS)])

    def along(self, table: dict[tuple[int, ...], Tensor], answer: tuple[int, ...]) -> Tensor:
        """Sum of a table's values over the edges of an answer or a part of one."""
        zero = torch.zeros((), dtype=torch.float64)
        return sum((table[answer[:t]][a] for t, a in enumerate(answer)), zero)

    def r_hat(self, s: tuple[int, ...]) -> Tensor:
        return self.beta * (self.log_policy[s] - self.log_ref[s])

    def model(self, table: dict[tuple[int, ...], Tensor]) -> Any:
        """A language model of this table (logits). Token 5 begins an answer."""

        def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, TOKENS + 1, dtype=torch.float64)
            logits[..., TOKENS] = -math.inf
            for b, row in enumerate(input_ids.tolist()):
                for t in range(len(row)):
                    s = tuple(row[1 : t + 1])
                    if s in table:
                        logits[b, t, :TOKENS] = table[s]
            return SimpleNamespace(logits=logits)

        model = torch.nn.Module()
        model.forward = forward  # type: ignore[method-assign]
        text = SimpleNamespace(vocab_size=TOKENS + 1, max_position_embeddings=None)
        model.config = SimpleNamespace(get_text_config=lambda: text)  # type: ignore[assignment]
        model.device = torch.device("cpu")  # type: ignore[assignment]
        return model


BETAS = [0.1, 1.0]
START = TOKENS


@pytest.mark.parametrize("beta", BETAS)
def test_the_policy_of_the_recursion_is_the_tilted_reference(beta: float) -> None:
    tree = Tree(beta)
    scores = torch.stack([tree.along(tree.log_ref, y) + tree.along(tree.r, y) / beta for y in tree.answers])
    by_answer = torch.stack([tree.along(tree.log_policy, y) for y in tree.answers])
    assert torch.allclose(scores.logsumexp(0), tree.value[()] / beta, atol=1e-10, rtol=0)
    assert torch.allclose(by_answer, scores.log_softmax(0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_token_rewards_are_reward_and_potential_on_every_edge(beta: float) -> None:
    tree = Tree(beta)
    policy, reference = tree.model(tree.log_policy), tree.model(tree.log_ref)
    found = token_rewards(policy, reference, [[START]] * len(tree.answers), tree.answers, beta)
    for answer, row, cumulative in zip(tree.answers, found.rewards, found.cumulative, strict=True):
        assert row.dtype == torch.float64
        for t, a in enumerate(answer):
            s = answer[:t]
            assert abs(float(row[t] - (tree.r[s][a] + tree.v((*s, a)) - tree.value[s]))) < 1e-10
            through = tree.along(tree.r, answer[: t + 1]) + tree.v(answer[: t + 1]) - tree.value[()]
            assert abs(float(cumulative[t] - through)) < 1e-10
    expected = torch.stack([tree.along(tree.r, y) - tree.value[()] for y in tree.answers])
    assert torch.allclose(found.totals, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_likelihood_is_reward_so_far_and_value(beta: float) -> None:
    tree = Tree(beta)
    for s in [*tree.states, *tree.answers]:
        reward = tree.along(tree.r, s) + beta * tree.along(tree.log_ref, s) + tree.v(s)
        assert abs(float(reward - tree.value[()] - beta * tree.along(tree.log_policy, s))) < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_an_exhaustive_beam_is_value_guided_search(seed: int) -> None:
    tree = Tree(0.5, seed)

    def beam(score: Any) -> tuple[int, ...]:
        running, done = [()], []
        while running:
            ahead = [(*s, a) for s in running for a in range(TOKENS)]
            done += [s for s in ahead if tree.ended(s)]
            running = [s for s in ahead if not tree.ended(s)]
        return max(done, key=score)

    by_value = beam(lambda s: float(tree.along(tree.r, s) + tree.beta * tree.along(tree.log_ref, s) + tree.v(s)))
    by_likelihood = beam(lambda s: float(tree.along(tree.log_policy, s)))
    assert by_value == by_likelihood == max(tree.answers, key=lambda y: float(tree.along(tree.log_policy, y)))
    for depth in range(1, DEPTH):  # and so is every order of partial answers
        level = [s for s in tree.states if len(s) == depth]
        value = [float(tree.along(tree.r, s) + tree.beta * tree.along(tree.log_ref, s) + tree.v(s)) for s in level]
        likely = [float(tree.along(tree.log_policy, s)) for s in level]
        assert sorted(range(len(level)), key=value.__getitem__) == sorted(range(len(level)), key=likely.__getitem__)


@pytest.mark.parametrize("beta", BETAS)
def test_shaping_changes_neither_policy_nor_preferences(beta: float) -> None:
    tree, shaped = Tree(beta), Tree(beta)
    generator = torch.Generator().manual_seed(9)
    phi = {s: torch.randn((), generator=generator, dtype=torch.float64) for s in tree.states}
    zero = torch.zeros((), dtype=torch.float64)
    for s in reversed(tree.states):
        shaped.r[s] = torch.stack([tree.r[s][a] + phi.get((*s, a), zero) - phi[s] for a in range(TOKENS)])
        q = shaped.q(s)
        shaped.value[s] = beta * (q / beta).logsumexp(0)
        shaped.log_policy[s] = (q - shaped.value[s]) / beta
        assert torch.allclose(shaped.log_policy[s], tree.log_policy[s], atol=1e-10, rtol=0)
        assert abs(float(shaped.value[s] - tree.value[s] + phi[s])) < 1e-10
    totals = torch.stack([tree.along(tree.r, y) for y in tree.answers])
    others = torch.stack([shaped.along(shaped.r, y) for y in tree.answers])
    preference = torch.sigmoid(totals[:, None] - totals[None])
    assert torch.allclose(preference, torch.sigmoid(others[:, None] - others[None]), atol=1e-10, rtol=0)
    assert torch.allclose(preference, torch.sigmoid((totals + 3)[:, None] - (totals + 3)[None]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_the_reference_expects_minus_the_divergence(beta: float) -> None:
    """At every state, for any policy: the left side from our rewards, the right from probabilities themselves."""
    tree, other = Tree(beta), Tree(beta, 5)
    policy, reference = tree.model(other.log_ref), tree.model(tree.log_ref)
    for s in tree.states:
        edges = token_rewards(policy, reference, [[START, *s]] * TOKENS, [[a] for a in range(TOKENS)], beta)
        p, q = tree.log_ref[s].exp(), other.log_ref[s].exp()
        expected = float((p * edges.totals).sum())
        kl = float((p * (p / q).log()).sum())
        assert abs(expected + beta * kl) < 1e-12 and expected < 0
    same = token_rewards(reference, reference, [[START]] * TOKENS, [[a] for a in range(TOKENS)], beta)
    assert float(same.totals.abs().max()) == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("beta", [0.1, 10.0])
def test_the_reference_expects_minus_the_divergence_on_float32_models(kind: str, beta: float) -> None:
    policy, reference = tiny(kind, 0), tiny(kind, 1)
    prompt = [5, 9, 3]
    found = token_rewards(policy, reference, [prompt] * VOCABULARY, [[a] for a in range(VOCABULARY)], beta)
    ids = torch.tensor([prompt])
    p, q = (m(ids).logits[0, -1].detach().double().softmax(-1) for m in (reference, policy))
    expected = float((p * found.totals.double()).sum())
    assert expected == pytest.approx(-beta * float((p * (p / q).log()).sum()), abs=1e-6 * max(1, beta))
    assert expected < 0


def test_the_divergence_by_monte_carlo() -> None:
    """Sums of token rewards of answers that the reference samples: -beta KL, within 4 standard errors."""
    tree, other = Tree(0.3), Tree(0.3, 5)
    log_p = torch.stack([tree.along(tree.log_ref, y) for y in tree.answers])
    log_q = torch.stack([other.along(other.log_ref, y) for y in tree.answers])
    kl = float((log_p.exp() * (log_p - log_q)).sum())
    drawn = torch.multinomial(log_p.exp(), 2000, replacement=True, generator=torch.Generator().manual_seed(1)).tolist()
    answers = [tree.answers[i] for i in sorted(set(drawn))]
    found = token_rewards(tree.model(other.log_ref), tree.model(tree.log_ref), [[START]] * len(answers), answers, 0.3)
    totals = dict(zip(sorted(set(drawn)), found.totals.tolist(), strict=True))
    values = torch.tensor([totals[i] for i in drawn], dtype=torch.float64)
    assert abs(float(values.mean()) + 0.3 * kl) < 4 * float(values.std()) / math.sqrt(len(drawn))


def dpo_on_the_population(tree: Tree, weights: Tensor | None = None) -> dict[tuple[int, ...], Tensor]:
    """The implicit rewards of a tabular policy trained by DPO on all pairs with their Bradley-Terry probabilities."""
    table = torch.zeros(len(tree.states), TOKENS, dtype=torch.float64, requires_grad=True)
    index = {s: i for i, s in enumerate(tree.states)}
    counts = torch.zeros(len(tree.answers), len(tree.states), TOKENS, dtype=torch.float64)
    for row, answer in enumerate(tree.answers):
        for t, a in enumerate(answer):
            counts[row, index[answer[:t]], a] = 1
    counts = counts.flatten(1)
    log_ref = torch.stack([tree.log_ref[s] for s in tree.states])
    totals = torch.stack([tree.along(tree.r, y) for y in tree.answers])
    wins = torch.sigmoid(totals[:, None] - totals[None])
    pairs = torch.ones_like(wins) if weights is None else weights[:, None] * weights[None]
    pairs = pairs / pairs.sum()
    optimizer = torch.optim.LBFGS(
        [table], max_iter=600, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        ratio = counts @ (table.log_softmax(1) - log_ref).flatten()
        margin = tree.beta * (ratio[:, None] - ratio[None])
        value = -(pairs * wins * torch.nn.functional.logsigmoid(margin)).sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    found = tree.beta * (table.log_softmax(1) - log_ref).detach()
    return {s: found[i] for s, i in index.items()}


def test_dpo_on_the_population_recovers_every_token_reward() -> None:
    tree = Tree(1.0)
    found = dpo_on_the_population(tree)
    assert max(float((found[s] - tree.r_hat(s)).abs().max()) for s in tree.states) < 1e-3


def test_errata_pairs_that_are_drawn_as_the_reference_answers_leave_rare_tokens_unlearnt() -> None:
    """The same loss at its numerical optimum, with pairs weighted by the reference: what is never seen stays off."""
    tree = Tree(1.0, 1)
    weights = torch.stack([tree.along(tree.log_ref, y).exp() for y in tree.answers])
    found = dpo_on_the_population(tree, weights)
    off = torch.cat([(found[s] - tree.r_hat(s)).abs() for s in tree.states])
    assert float(off.max()) > 1e-2 and float(off.median()) < 1e-3


def test_a_reward_at_the_end_is_credited_to_the_token_that_caused_it() -> None:
    """Only whole answers are compared, and all that pass through one edge lose 1."""
    planted = (2, 3)
    tree = Tree(1.0, 3, sparse=planted)
    found = dpo_on_the_population(tree)
    edges = {(*s, a): float(found[s][a]) for s in tree.states for a in range(TOKENS)}
    assert max(edges, key=lambda edge: abs(edges[edge])) == planted
    assert edges[planted] < 0
    below = [v for edge, v in edges.items() if edge[:2] == planted and len(edge) > 2]
    assert max(map(abs, below)) < 1e-3  # what comes after has nothing left to lose


# ------------------------------------------------------------------ search


def every_answer(model: Any, prompt: list[int], longest: int, score: Any) -> list[int]:
    """The best of all answers of at most ``longest`` tokens, by enumeration."""
    best, value = [], -math.inf
    running = {(): 0.0}
    for length in range(1, longest + 1):
        ids = torch.tensor([[*prompt, *s] for s in running])
        with torch.no_grad():
            steps = score(ids)
        following = {}
        for (s, total), row in zip(running.items(), steps.tolist(), strict=True):
            for a, gain in enumerate(row):
                if a == EOS or length == longest:
                    if total + gain > value:
                        best, value = [*s, a], total + gain
                else:
                    following[(*s, a)] = total + gain
        running = following
    return best


def cut(row: list[int]) -> list[int]:
    return row[: row.index(EOS) + 1] if EOS in row else row


@pytest.mark.parametrize("seed", range(6))
def test_likelihood_search_finds_the_most_likely_answer(seed: int) -> None:
    model = tiny("gpt2", seed, vocab_size=6)
    prompt = [3, 4]
    best = every_answer(model, prompt, 4, lambda ids: model(ids).logits[:, -1].log_softmax(-1))
    search = LikelihoodSearch(model, num_beams=125)
    ids = torch.tensor([prompt])
    out = search.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=PAD)
    assert cut(out[0, 2:].tolist()) == best


def test_errata_the_default_length_penalty_misses_the_most_likely_answer() -> None:
    """transformers ranks by the average log-probability unless it is told to sum."""
    missed = 0
    for seed in range(12):
        model = tiny("gpt2", seed, vocab_size=6)
        best = every_answer(model, [3, 4], 4, lambda ids, m=model: m(ids).logits[:, -1].log_softmax(-1))
        ids = torch.tensor([[3, 4]])
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": PAD}
        averaged = model.generate(ids, num_beams=125, do_sample=False, **options)
        summed = LikelihoodSearch(model, 125).generate(ids, **options)
        assert cut(summed[0, 2:].tolist()) == best
        missed += cut(averaged[0, 2:].tolist()) != best
    assert missed > 0


@pytest.mark.parametrize("seed", range(4))
def test_implicit_reward_search_maximises_the_log_ratio(seed: int) -> None:
    """Fixed length (no end): then no search stops early, and a full beam is enumeration."""
    policy, reference = tiny("gpt2", seed, vocab_size=6), tiny("llama", seed + 50, vocab_size=6)

    def ratio(ids: Tensor) -> Tensor:
        found = policy(ids).logits[:, -1].log_softmax(-1) - reference(ids).logits[:, -1].log_softmax(-1)
        found[:, EOS] = -math.inf
        return found

    best = every_answer(policy, [3, 4], 3, ratio)
    search = ImplicitRewardSearch(reference, num_beams=36)
    ids = torch.tensor([[3, 4]])
    out = policy.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=3,
        min_new_tokens=3,
        pad_token_id=PAD,
        logits_processor=[search],
        **search.generate_options,
    )
    assert out[0, 2:].tolist() == best


def test_implicit_reward_search_respects_padding_and_forbidden_tokens() -> None:
    policy, reference = tiny("llama", 1), tiny("llama", 2)
    rows = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10, 11])]
    ids, mask = left_padded(rows)
    options: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": PAD, "suppress_tokens": [7, EOS]}
    search = ImplicitRewardSearch(reference, 3, pad_token_id=PAD, prompt_length=5)
    together = policy.generate(
        ids, attention_mask=mask, logits_processor=[search], **search.generate_options, **options
    )
    for i, row in enumerate(rows):
        alone = ImplicitRewardSearch(reference, 3)
        out = policy.generate(
            row[None],
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            logits_processor=[alone],
            **alone.generate_options,
            **options,
        )
        assert together[i, 5:].tolist() == out[0, len(row) :].tolist()
        assert 7 not in out[0, len(row) :].tolist()


def test_implicit_reward_search_follows_the_device_and_size_of_scores() -> None:
    ids, search = torch.tensor([[3, 4]]), ImplicitRewardSearch(tiny("gpt2"))
    assert search(ids, torch.zeros(1, VOCABULARY, device="meta")).device.type == "meta"  # as where models are apart
    assert search(ids, torch.zeros(1, VOCABULARY + 7)).shape == (1, VOCABULARY + 7)  # 48: rows of padding
    with pytest.raises(InputError, match=r"reference=.*policy's vocabulary \(43 tokens\)"):
        search(ids, torch.zeros(1, 43))


def test_implicit_reward_of_the_reference_itself_is_nothing() -> None:
    model = tiny("gpt2")
    ids = torch.tensor([[4, 5], [6, 7]])
    scores = model(ids).logits[:, -1].log_softmax(-1).detach()
    assert float(ImplicitRewardSearch(model)(ids, scores).abs().max()) < 1e-5


# ------------------------------------------------------------------ transformers' models


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_batches_of_any_size_give_one_answer(kind: str) -> None:
    policy, reference = tiny(kind, 0), tiny(kind, 1)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 7, 3, 4)]
    answers = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 1, 4, 2)]
    found = token_rewards(policy, reference, prompts, answers, 0.2, batch_size=4)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *answer]])
            step = policy(ids).logits[0].log_softmax(-1) - reference(ids).logits[0].log_softmax(-1)
        expected = [0.2 * float(step[len(prompt) - 1 + t, a]) for t, a in enumerate(answer)]
        assert found.rewards[i].tolist() == pytest.approx(expected, abs=2e-6)
        alone = token_rewards(policy, reference, [prompt], [answer], 0.2, batch_size=1)
        assert torch.allclose(alone.rewards[0], found.rewards[i], atol=2e-6)
    assert torch.allclose(found.totals, torch.stack([row.sum() for row in found.rewards]))


def test_a_policy_that_is_its_reference_earns_exactly_nothing() -> None:
    model = tiny("llama")
    found = token_rewards(model, copy.deepcopy(model), [[5, 6], [7]], [[8, 9, 10], [11]], 0.1)
    assert all(float(row.abs().max()) == 0 for row in found.rewards)
    assert all(float(row.abs().max()) == 0 for row in found.scaled)


def test_logged_log_probabilities_and_adapters_are_references(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny("llama")
    prompts, answers = [[5, 6], [7]], [[8, 9, 10], [11]]
    policy = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    by_model = token_rewards(policy, base, prompts, answers, 0.3)
    by_adapter = token_rewards(policy, None, prompts, answers, 0.3)
    by_log = token_rewards(policy, by_model.reference, prompts, answers, 0.3)
    assert float(by_model.totals.abs().max()) > 1e-3
    for one, two, three in zip(by_model.rewards, by_adapter.rewards, by_log.rewards, strict=True):
        assert torch.allclose(one, two, atol=1e-6) and torch.equal(one, three)
    with pytest.raises(InputError, match="no adapter"):
        token_rewards(base, None, prompts, answers)
    with pytest.raises(InputError, match="for every token of every answer"):
        token_rewards(base, [[-1.0], [-1.0]], prompts, answers)
    with pytest.raises(InputError, match="at most 0"):
        token_rewards(base, [[-1.0, 0.5, -1.0], [-1.0]], prompts, answers)


def test_impossible_tokens_earn_nothing_and_are_marked() -> None:
    """Suppressed tokens have log-probability -inf under both, and -inf less -inf is NaN."""
    tree = Tree(1.0)
    table = {s: row.clone() for s, row in tree.log_ref.items()}
    table[()][2] = -math.inf
    model = tree.model(table)
    found = token_rewards(model, model, [[START]] * 2, [(2, 1, 1, 1), (1, 0)], 1.0)
    assert found.defined[0].tolist() == [False, True, True, True] and found.defined[1].all()
    assert found.totals.tolist() == [0.0, 0.0]


def test_bfloat16_models_are_read_in_float32() -> None:
    """Log-softmax in bfloat16 has steps of 2^-5 at magnitude 4, and would round rewards to them."""
    policy, reference = tiny("llama", 0).bfloat16(), tiny("llama", 1).bfloat16()
    answer = torch.randint(2, VOCABULARY, (30,), generator=torch.Generator().manual_seed(0))
    found = token_rewards(policy, reference, [[5]], [answer.tolist()], 0.1)
    ids = torch.cat([torch.tensor([5]), answer])[None]
    logits = [m(ids).logits[0, :-1].detach().double() for m in (policy, reference)]
    exact = 0.1 * (of_tokens(logits[0], answer) - of_tokens(logits[1], answer))
    assert found.rewards[0].dtype == torch.float32
    assert float((found.rewards[0] - exact).abs().max()) < 1e-5


# ------------------------------------------------------------------ TRL


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A word tokenizer with an end and a beginning, built without a network."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["a", "b", "c", "d", "e", "f", "g", "good", "bad", "fine", "awful", "the", "was", "soup", "film", ".", "!"]
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<s>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


PAIRS = [
    Pair("the soup was", " good .", " bad ."),
    Pair("the film was", " fine . the soup was good !", " awful !"),
    Pair("the film", " was good", " was bad . the film was awful ."),
    Pair("the soup", " was fine", " was awful"),
]


@pytest.fixture
def trainer(tokenizer: Any, tmp_path: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, learning_rate=1e-2, max_steps=4, logging_steps=2, beta=0.3,
        per_device_train_batch_size=4, report_to="none", save_strategy="no", disable_tqdm=True, max_length=None,
        gradient_checkpointing=False,
    )  # fmt: skip
    return DPOTrainer(
        tiny("llama", 0),
        tiny("llama", 1),
        arguments,
        train_dataset=Dataset.from_list([p.to_json() for p in PAIRS]),
        processing_class=tokenizer,
    )


def test_sums_are_the_rewards_of_trl(trainer: Any, tokenizer: Any) -> None:
    rows = [trainer.train_dataset[i] for i in range(len(PAIRS))]
    chosen, rejected = (
        token_rewards(
            trainer.model,
            trainer.ref_model,
            [p.prompt for p in PAIRS],
            [getattr(p, side) for p in PAIRS],
            trainer.beta,
            tokenizer=tokenizer,
            end=True,
        )
        for side in ("chosen", "rejected")
    )
    for i, row in enumerate(rows):  # the trainer logs means over a batch: batches of one pair
        assert chosen.completions[i] == row["chosen_ids"] and rejected.completions[i] == row["rejected_ids"]
        trainer._metrics["train"].clear()
        trainer.model.train()
        trainer._compute_loss(trainer.model, trainer.data_collator([row]), return_outputs=False)
        logged = trainer._metrics["train"]
        assert logged["rewards/chosen"][-1] == pytest.approx(float(chosen.totals[i]), abs=1e-4)
        assert logged["rewards/rejected"][-1] == pytest.approx(float(rejected.totals[i]), abs=1e-4)


def test_drift_is_what_token_rewards_say(trainer: Any, tokenizer: Any) -> None:
    watch = RewardDriftCallback(trainer, pairs=4, new_tokens=8)
    trainer.add_callback(watch)
    trainer.train()
    assert [drift.step for drift in watch.history] == [0, 2, 4]
    start, last = watch.history[0], watch.history[-1]
    policy, reference = trainer.model, trainer.ref_model
    prompts = [p.prompt for p in PAIRS]

    def mean(answers: Any, asked: Any = prompts) -> float:
        found = token_rewards(policy, reference, asked, answers, 0.3, tokenizer=tokenizer, end=asked is prompts)
        return float(found.totals.mean())

    assert last.chosen == pytest.approx(mean([p.chosen for p in PAIRS]), abs=1e-4)
    assert last.rejected == pytest.approx(mean([p.rejected for p in PAIRS]), abs=1e-4)
    assert last.sampled == pytest.approx(mean(watch._samples, watch.prompts), abs=1e-4)
    logged = [entry for entry in trainer.state.log_history if "drift/chosen" in entry]
    assert logged[-1]["drift/minus_beta_kl"] == pytest.approx(last.minus_beta_kl)
    # The divergence by another route: float64 probabilities of every next token along the reference's answers.
    kl = 0.0
    for prompt, answer in zip(watch.prompts, watch._samples, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        p, q = (m(ids).logits[0, len(prompt) - 1 : -1].detach().double().softmax(-1) for m in (reference, policy))
        kl += float((p * (p / q).log()).sum()) / len(prompts)
    assert last.minus_beta_kl == pytest.approx(-0.3 * kl, abs=1e-4) and last.minus_beta_kl < 0
    assert start.chosen != 0  # here the policy was not made from its reference
    assert last.chosen - last.rejected > start.chosen - start.rejected


class Largest(TorchDispatchMode):
    """Numbers in the largest float32 tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_logits_become_float32_one_answer_at_a_time(trainer: Any) -> None:
    """Of a large vocabulary, those of a batch are gigabytes."""
    size, longest = 2000, 8
    policy, reference = (tiny("llama", seed, size).bfloat16() for seed in (0, 1))
    rows = [[3] * 30] * 8, [[5] * n for n in range(1, longest + 1)]
    with Largest() as seen:
        token_rewards(policy, reference, *rows, 0.1)
    assert 0 < seen.numbers <= longest * size
    watch = RewardDriftCallback(trainer)
    watch.prompts, watch._samples = rows
    trainer.ref_model = reference
    with Largest() as seen, torch.no_grad():
        kl, _ = watch._divergence(policy)
    assert len(kl) == 8 and 0 < seen.numbers <= longest * size


def test_the_references_answers_keep_to_its_positions(tokenizer: Any) -> None:
    model = tiny("gpt2", n_positions=12, vocab_size=len(tokenizer))
    short, long = [3, 4, 5], list(range(2, 11))
    found = sampled(model, [short, long], 40, tokenizer, seed=0)
    assert all(0 < len(answer) <= 12 - len(long) for answer in found)
    with pytest.raises(InputError, match=r"a prompt of 12 tokens.*12 positions"):
        sampled(model, [[3] * 12], 4, tokenizer, seed=0)
    with pytest.raises(InputError, match="at most the model's 4 positions"):
        preference_training(tiny("gpt2", n_positions=4, vocab_size=len(tokenizer)), tokenizer, PAIRS)


def test_drift_of_adapters(tokenizer: Any) -> None:
    """The reference of an adapter is the model without it: no reward before the first step."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        "unused", use_cpu=True, bf16=False, learning_rate=1e-1, max_steps=2, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        tiny("llama", 0),
        None,
        arguments,
        train_dataset=Dataset.from_list([p.to_json() for p in PAIRS]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    watch = RewardDriftCallback(trainer, pairs=2, new_tokens=4)
    trainer.add_callback(watch)
    trainer.train()
    first, last = watch.history[0], watch.history[-1]
    assert (first.chosen, first.rejected, first.minus_beta_kl) == pytest.approx((0, 0, 0), abs=1e-6)
    assert last.minus_beta_kl < 0 and last.chosen != 0


def test_reward_function_of_trl(tokenizer: Any) -> None:
    policy, reference = tiny("llama", 0), tiny("llama", 1)
    reward = ImplicitReward(policy, reference, tokenizer, 0.5)
    prompts, answers = [p.prompt for p in PAIRS], [p.chosen for p in PAIRS]
    expected = token_rewards(policy, reference, prompts, answers, 0.5, tokenizer=tokenizer)
    assert reward(prompts=prompts, completions=answers) == pytest.approx(expected.totals.tolist())
    ids = [[*row, EOS] for row in expected.completions]
    ended = token_rewards(policy, reference, prompts, answers, 0.5, tokenizer=tokenizer, end=True)
    given = reward(prompts=prompts, completions=answers, completion_ids=ids, trainer_state=None)
    assert given == pytest.approx(ended.totals.tolist())
    assert reward.__name__ == "implicit_reward"


def test_grpo_takes_the_reward_function(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    reward = ImplicitReward(tiny("llama", 0), tiny("llama", 1), tokenizer, 0.5)
    arguments = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=4, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": p.prompt} for p in PAIRS])
    trainer = GRPOTrainer(tiny("llama", 2), reward, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert any("rewards/implicit_reward/mean" in entry for entry in trainer.state.log_history)


# ------------------------------------------------------------------ chained models


def chain(seed: int) -> tuple[Any, Any, dict[str, Tensor]]:
    ids = torch.randint(2, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(seed))
    answered = torch.zeros_like(ids)
    answered[:, 3:] = 1
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answered}
    return tiny("gpt2", seed), tiny("gpt2", seed + 10), tokens


def test_joint_logratio_is_the_sum_and_so_is_its_gradient() -> None:
    """The DPO gradient of a chain: each part's gradient under the weight sigma(-margin) of the whole."""
    one, two, beta = chain(0), chain(1), 0.2
    joint = joint_logratio([one, two])
    parts = [joint_logratio([part]) for part in (one, two)]
    assert torch.allclose(joint, parts[0] + parts[1], atol=1e-6)
    rewards = token_rewards(one[0], one[1], one[2]["input_ids"][:, :3].tolist(), one[2]["input_ids"][:, 3:].tolist(), 1)
    assert torch.allclose(parts[0].detach(), rewards.totals, atol=1e-4)

    margin = beta * (joint[:2] - joint[2:])
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    weights = [(name, p) for name, p in one[0].named_parameters()] + [*two[0].named_parameters()]
    whole = torch.autograd.grad(loss, [p for _, p in weights], retain_graph=True)
    common = torch.sigmoid(-margin).detach()
    by_part: list[Tensor] = []
    for part, (policy, _, _) in zip(parts, (one, two), strict=True):
        surrogate = -(common * beta * (part[:2] - part[2:])).mean()
        by_part += torch.autograd.grad(surrogate, list(policy.parameters()))
    for a, b in zip(whole, by_part, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(InputError, match="completion_mask"):
        joint_logratio([(one[0], one[1], {"input_ids": one[2]["input_ids"], "attention_mask": None})])
    with pytest.raises(InputError, match="as many rows"):
        joint_logratio([one, (two[0], two[1], {k: v[:2] for k, v in two[2].items()})])


# ------------------------------------------------------------------ training


def scored(texts: list[str]) -> list[float]:
    """Praise less blame."""
    return [
        sum(w in ("good", "fine") for w in t.split()) - sum(w in ("bad", "awful") for w in t.split()) for t in texts
    ]


def prompts_of(tokenizer: Any) -> Any:
    return itertools.cycle([tokenizer("the soup was")["input_ids"], tokenizer("the film")["input_ids"]])


def test_pairs_are_answers_that_the_scorer_tells_apart(tokenizer: Any) -> None:
    model = tiny("llama", 3, vocab_size=len(tokenizer))
    pairs = sampled_pairs(model, tokenizer, prompts_of(tokenizer), scored, 20, new_tokens=6, seed=1)
    assert len(pairs) == 20
    for pair in pairs:
        assert pair.prompt in ("the soup was", "the film")
        better, worse = scored([pair.prompt + pair.chosen, pair.prompt + pair.rejected])
        assert better > worse
    again = sampled_pairs(model, tokenizer, prompts_of(tokenizer), scored, 20, new_tokens=6, seed=1)
    assert again == pairs
    with pytest.raises(InputError, match="answers to one prompt differ"):
        sampled_pairs(model, tokenizer, prompts_of(tokenizer), lambda texts: [1.0] * len(texts), 20, new_tokens=4)


@pytest.fixture(scope="module")
def subject(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    tiny("llama", 3, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SMALL: dict[str, Any] = {"pairs": 24, "held_out": 4, "batch_size": 8, "learning_rate": 1e-2, "new_tokens": 16}


@pytest.fixture(scope="module")
def policy(subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("policy")
    texts = out.parent / "texts.jsonl"
    texts.write_text('{"text": "the soup was good . the film was bad ."}\n{"text": "the film was fine !"}\n')
    metrics = apply(subject, texts, out, seed=1, scorer=scored, prompt_tokens=2, **SMALL)
    assert metrics["pairs"] == 24 and metrics["steps"] == 3 and metrics["minus_beta_kl"] < 0
    return out


def test_apply_makes_a_policy_that_knows_its_reference(subject: Path, policy: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((policy / "q_star.json").read_text())
    reference = AutoModelForCausalLM.from_pretrained(subject)
    assert record["fingerprint"] == fingerprint(reference) and record["reference"] == str(subject)
    assert record["beta"] == 0.1 and record["drift"][0]["chosen"] == 0
    tuned, tokens = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    assert fingerprint(tuned) != record["fingerprint"]
    assert tuned.config.use_cache == reference.config.use_cache
    search = LikelihoodSearch.from_pretrained(policy, num_beams=3, tokenizer=tokens)
    out = search.generate(**tokens("the soup was", return_tensors="pt"), max_new_tokens=5)
    assert out.shape[0] == 1 and search.writer is search.model
    lines = [json.loads(line) for line in (policy / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 28 and set(lines[0]) == {"prompt", "chosen", "rejected"}


def test_the_same_seed_makes_the_same_policy_and_leaves_the_global_one_alone(subject: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(p.to_json()) + "\n" for p in PAIRS * 3))
    prints = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(5)
        apply(subject, pairs, tmp_path / name, seed=2, **SMALL)
        assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(5)))
        from transformers import AutoModelForCausalLM

        prints.append(fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / name)))
    assert prints[0] == prints[1]


def test_supervision_first_makes_the_reference(subject: Path, tokenizer: Any, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    rows = "\n".join(f'"{p.prompt}","{p.chosen}","{p.rejected}"' for p in PAIRS * 3)
    pairs.write_text(f"prompt,chosen,rejected\n{rows}\n")
    out = tmp_path / "out"
    out.mkdir()
    apply(subject, pairs, out, sft_epochs=2, lora_rank=4, **SMALL)
    from transformers import AutoModelForCausalLM

    record = json.loads((out / "q_star.json").read_text())
    reference = AutoModelForCausalLM.from_pretrained(out / "reference")
    assert record["reference"] == "reference" and record["fingerprint"] == fingerprint(reference)
    before = AutoModelForCausalLM.from_pretrained(subject)
    gained = token_rewards(
        reference, before, [p.prompt for p in PAIRS], [p.chosen for p in PAIRS], tokenizer=tokenizer, end=True
    )
    assert float(gained.totals.mean()) > 0
    assert not list(out.glob("adapter*"))  # adapters are merged
    measured = tmp_path / "measured"
    measured.mkdir()
    probe(out, pairs, measured)


def test_a_single_step_trains(tokenizer: Any) -> None:
    """The first step of a warm-up has rate 0: short trainings have none."""
    model = tiny("gpt2", 4, vocab_size=len(tokenizer))
    trained = preference_training(model, tokenizer, PAIRS, batch_size=4, learning_rate=1e-2)
    assert trained.steps == 1 and fingerprint(trained.policy) != fingerprint(model)


def test_preference_training_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    model = tiny("gpt2", 4, vocab_size=len(tokenizer))
    before = fingerprint(model)
    trained = preference_training(model, tokenizer, PAIRS, batch_size=4, epochs=3, learning_rate=1e-2)
    assert fingerprint(model) == before and fingerprint(trained.reference) == before
    assert fingerprint(trained.policy) != before and trained.steps == 3


# ------------------------------------------------------------------ probe and views


def test_probe_writes_credit_of_a_users_texts(policy: Path, subject: Path, tmp_path: Path, tokenizer: Any) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = [
        {"prompt": "the soup was", "chosen": " good .", "rejected": " bad ."},
        {"prompt": "the film", "completion": " was <b> & awful"},
        {"text": "the film was fine . the soup was bad !"},
    ]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = probe(policy, texts, tmp_path)
    assert metrics["answers"] == 4 and metrics["beta"] == 0.1 and metrics["accuracy"] in (0.0, 1.0)
    rows = [json.loads(line) for line in (tmp_path / "credit.jsonl").read_text().splitlines()]
    assert [row["role"] for row in rows] == ["chosen", "rejected", "answer", "text"]
    # The sums of pairs are DPO's rewards, which count the end of the text; the user's own texts may go on.
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (policy, subject)]
    given = [[lines[0]["prompt"]] * 2, [lines[0]["chosen"], lines[0]["rejected"]]]
    trained = token_rewards(*models, *given, 0.1, tokenizer=tokenizer, end=True)
    assert [row["total"] for row in rows[:2]] == pytest.approx(trained.totals.tolist(), abs=1e-5)
    assert [row["tokens"][-1].strip() == "</s>" for row in rows] == [True, True, False, False]
    assert [word["text"] for word in rows[0]["words"]] == ["good", ".", "</s>"]
    last = rows[-1]
    assert "".join(last["tokens"]).split() == lines[2]["text"].split()
    assert sum(last["rewards"]) == pytest.approx(last["total"], abs=1e-5)
    assert last["cumulative"][-1] == pytest.approx(last["total"], abs=1e-5)
    assert [word["text"] for word in last["words"]] == lines[2]["text"].split()
    shown = (tmp_path / "credit.html").read_text()
    assert "<script" not in shown and "http" not in shown
    assert not re.search(r"<b>", shown)  # escaped
    with pytest.raises(InputError, match="tuned from"):  # named, but its weights are others
        other = tmp_path / "other"
        tiny("llama", 9, vocab_size=len(tokenizer)).save_pretrained(other)
        tokenizer.save_pretrained(other)
        probe(policy, texts, tmp_path, reference=str(other))


def test_spans_are_means_over_their_tokens(tokenizer: Any) -> None:
    policy, reference = tiny("llama", 0), tiny("llama", 1)
    text = " was good . the soup was bad !"
    found = token_rewards(policy, reference, ["the film"], [text], 1.0, tokenizer=tokenizer)
    words, sentences = spans(found, tokenizer)[0], spans(found, tokenizer, "sentence")[0]
    assert [w.text for w in words] == text.split()
    assert [w.mean for w in words] == pytest.approx(found.rewards[0].tolist())
    assert [(s.text, s.start, s.stop) for s in sentences] == [("was good .", 0, 3), ("the soup was bad !", 3, 8)]
    assert sentences[1].mean == pytest.approx(float(found.rewards[0][3:].mean()), abs=1e-6)
    assert sentences[1].total == pytest.approx(float(found.rewards[0][3:].sum()), abs=1e-5)
    with pytest.raises(InputError, match="word or sentence"):
        spans(found, tokenizer, "line")  # type: ignore[arg-type]


def byte_tokenizer() -> Any:
    """A tokenizer of bytes, in which é is two tokens, a space goes with nothing, and 'ab' is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i + 1 for i, c in enumerate(alphabet)} | {"</s>": 0, "ab": len(alphabet) + 1}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_pieces_join_to_the_text_where_characters_are_several_tokens() -> None:
    tokens = byte_tokenizer()
    policy, reference = tiny("gpt2", 0, vocab_size=300), tiny("gpt2", 1, vocab_size=300)
    found = token_rewards(policy, reference, ["x"], [" caf\u00e9 ab\u20ac. no"], 1.0, tokenizer=tokens)
    shown = pieces(tokens, found.prompts[0], found.completions[0])
    assert "".join(shown) == " caf\u00e9 ab\u20ac. no" and len(shown) == len(found.completions[0])
    words = spans(found, tokens)[0]
    assert [w.text for w in words] == ["caf\u00e9", "ab", "\u20ac.", "no"]
    assert sum(w.total for w in words) == pytest.approx(float(found.totals[0]), abs=1e-4)
    assert [w.stop for w in words[:-1]] == [w.start for w in words[1:]]


def test_a_token_that_spans_prompt_and_answer_is_refused() -> None:
    tokens = byte_tokenizer()
    policy, reference = tiny("gpt2", 0, vocab_size=300), tiny("gpt2", 1, vocab_size=300)
    with pytest.raises(InputError, match="spans the end of the prompt"):
        token_rewards(policy, reference, ["xa"], ["b"], tokenizer=tokens)
    token_rewards(policy, reference, ["x"], ["ab"], tokenizer=tokens)


def test_colours_follow_signs(tokenizer: Any) -> None:
    policy, reference = tiny("llama", 0), tiny("llama", 1)
    found = token_rewards(policy, reference, ["the film"], [" was good . bad"], 1.0, tokenizer=tokenizer)
    line = terminal(found, tokenizer)[0]
    assert re.sub(r"\x1b\[[0-9;]*m", "", line) == " was good . bad"
    largest = int(found.rewards[0].abs().argmax())
    value = float(found.rewards[0][largest])
    word = ["was", "good", ".", "bad"][largest]
    assert f"\x1b[30;48;5;{16 + 36 * 5 if value < 0 else 16 + 6 * 5}m {word}\x1b[0m" in line
    marks = re.findall(r'rgba\((\d+),\d+,\d+,([\d.]+)\)" title="reward ([+-][\d.]+)', page(found, tokenizer))
    assert [(red == "200", float(depth)) for red, depth, _ in marks] == [
        (v < 0, pytest.approx(abs(v), abs=0.005)) for v in found.scaled[0].tolist()
    ]


def test_terminals_are_not_steered_by_answers() -> None:
    policy, reference, tokens = tiny("llama", 0, vocab_size=300), tiny("llama", 1, vocab_size=300), byte_tokenizer()
    said = "a\x1b[2Jb\rc\x07d\n"
    found = token_rewards(policy, reference, ["x"], [said], 1.0, tokenizer=tokens)
    line = re.sub(r"\x1b\[(30;48;5;\d+|0)m", "", terminal(found, tokens)[0])
    assert line == "a\ufffd[2Jb\ufffdc\ufffdd\n"


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("beta", [0, -0.1, math.inf, math.nan, True, "0.1"])
def test_beta_must_be_positive(beta: Any) -> None:
    with pytest.raises(InputError, match="above 0"):
        token_rewards(tiny("gpt2"), tiny("gpt2"), [[2]], [[3]], beta)


def test_rows_that_do_not_fit_are_refused(tokenizer: Any) -> None:
    model = tiny("gpt2")
    for prompts, answers, match in (
        ([], [], "at least one prompt"),
        ([[2]], [[3], [4]], "as many answers"),
        ("ab", "cd", "as many answers"),
        ([[2]], [[]], "at least one token"),
        ([[]], [[3]], "prompt of at least one token"),
        ([[2]], [[99]], "token ids from 0 to 40"),
        ([[2] * 250], [[3] * 10], "at most 256 tokens long"),
        (["a"], ["b"], "tokenizer"),
        (["a"], [[3]], "a text where the prompt is one"),
    ):
        with pytest.raises(InputError, match=match):
            token_rewards(model, model, prompts, answers)
    with pytest.raises(InputError, match="end="):
        token_rewards(model, model, [[2]], [[3]], end=True)
    with pytest.raises(InputError, match="batch_size"):
        token_rewards(model, model, [[2]], [[3]], batch_size=0)


def test_other_vocabularies_are_refused(tokenizer: Any, subject: Path, tmp_path: Path) -> None:
    policy, reference = tiny("gpt2"), tiny("gpt2", vocab_size=300)
    with pytest.raises(InputError, match="same vocabulary"):
        token_rewards(policy, reference, [[2]], [[3]])
    with pytest.raises(InputError, match="at id"):
        token_rewards(policy, policy, ["a"], [" b"], tokenizer=tokenizer, reference_tokenizer=byte_tokenizer())
    with pytest.raises(InputError, match="at id"):
        LikelihoodSearch.from_pretrained(subject, tokenizer=byte_tokenizer())
    ids = torch.tensor([[2, 3]])
    with pytest.raises(InputError, match="300 tokens"):
        ImplicitRewardSearch(reference)(ids, torch.zeros(1, VOCABULARY))
    with pytest.raises(InputError, match="a model with tokenizer that transformers loads"):
        LikelihoodSearch.from_pretrained(tmp_path / "nothing")


def test_likelihood_search_refuses_what_is_another_search() -> None:
    model = tiny("gpt2")
    ids = torch.tensor([[2, 3]])
    for options in ({"do_sample": True}, {"length_penalty": 1.0}, {"num_beams": 2}, {"early_stopping": True}):
        with pytest.raises(InputError, match="likelihood search is beam search on the sum"):
            LikelihoodSearch(model, 3).generate(ids, **options)
    for width in (0, 1001, 2.5, True):
        with pytest.raises(InputError, match="num_beams"):
            LikelihoodSearch(model, width)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="num_beams"):
            ImplicitRewardSearch(model, width)  # type: ignore[arg-type]
    greedy = LikelihoodSearch(model, 1).generate(ids, max_new_tokens=5, attention_mask=torch.ones_like(ids))
    assert torch.equal(
        greedy, model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_likelihood_search_in_batches_with_left_padding(kind: str) -> None:
    model = tiny(kind)
    rows = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10, 11])]
    ids, mask = left_padded(rows)
    search = LikelihoodSearch(model, 4)
    together = search.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=PAD)
    for i, row in enumerate(rows):
        whole = torch.ones(1, len(row), dtype=torch.long)
        alone = search.generate(row[None], attention_mask=whole, max_new_tokens=8, pad_token_id=PAD)
        assert cut(together[i, 5:].tolist()) == cut(alone[0, len(row) :].tolist())


def test_apply_and_probe_say_what_they_lack(subject: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the soup was good ."}\n')
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": \n')
    half = tmp_path / "half.jsonl"
    half.write_text('{"prompt": "a", "chosen": "b"}\n')
    out = tmp_path / "out"
    for source, settings, match in (
        (None, {}, "a file with prompt"),
        (texts, {}, "scorer"),
        (texts, {"beta": 0}, "beta"),
        (texts, {"epochs": -1}, "epochs"),
        (texts, {"pairs": 0}, "pairs"),
        (texts, {"sft_epochs": -1}, "sft_epochs"),
        (bad, {}, "line 1"),
        (half, {}, "row 1"),
        (tmp_path / "none.jsonl", {}, "can be read"),
    ):
        with pytest.raises(InputError, match=match):
            apply(subject, source, out, **settings)
    with pytest.raises(InputError, match="doesn't name what it came from"):
        probe(subject, texts, out)
    with pytest.raises(InputError, match="input"):
        probe(subject, None, out)
    with pytest.raises(InputError, match="row 1"):
        probe(subject, half, out, reference=str(subject))


def test_drift_needs_pairs() -> None:
    with pytest.raises(InputError, match="pairs"):
        RewardDriftCallback(SimpleNamespace(eval_dataset=None, train_dataset=[]), pairs=0)
    with pytest.raises(InputError, match="with pairs in memory"):
        RewardDriftCallback(SimpleNamespace(eval_dataset=None, train_dataset=[]))


# ------------------------------------------------------------------ composition


def test_momentum_decoding_goes_with_the_policy(policy: Path) -> None:
    """Another processor joins the search: with resistance above 1 no beam says a token twice."""
    from transformers import AutoTokenizer

    from steersman.language.momentum_decoding import MomentumDecoding

    tokens = AutoTokenizer.from_pretrained(policy)
    search = LikelihoodSearch.from_pretrained(policy, 4)
    inputs = tokens("the soup was", return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 8, "suppress_tokens": [EOS]}
    steered = search.generate(**inputs, **options, logits_processor=[MomentumDecoding(1.1, len(tokens))])
    assert len(set(steered[0].tolist())) == steered.shape[1] == inputs["input_ids"].shape[1] + 8
    plain = search.generate(**inputs, **options)
    assert len(set(plain[0].tolist())) < plain.shape[1]


def test_errata_chosen_rewards_may_rise() -> None:
    """The population optimum on pairs that the reference wrote: chosen answers are a tilted law, and gain with beta 2.

    beta E_c[log pi / ref] = beta [KL(c || ref) - KL(c || pi)] holds for any law c of chosen answers.
    """
    signs = []
    for beta in (0.1, 2.0):
        tree = Tree(beta, 2)
        log_ref = torch.stack([tree.along(tree.log_ref, y) for y in tree.answers])
        log_policy = torch.stack([tree.along(tree.log_policy, y) for y in tree.answers])
        totals = torch.stack([tree.along(tree.r, y) for y in tree.answers])
        wins = torch.sigmoid(totals[:, None] - totals[None])
        chosen = 2 * log_ref.exp() * (wins @ log_ref.exp())  # the law of the preferred of two answers
        assert abs(float(chosen.sum()) - 1) < 1e-12
        mean = beta * float((chosen * (log_policy - log_ref)).sum())
        against_ref = float((chosen * (chosen.log() - log_ref)).sum())
        against_policy = float((chosen * (chosen.log() - log_policy)).sum())
        assert mean == pytest.approx(beta * (against_ref - against_policy), abs=1e-12)
        assert 0 < against_ref <= math.log(2)
        signs.append(mean > 0)
    assert signs == [False, True]


def test_the_card_s_code_runs(policy: Path, subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steersman import catalog

    monkeypatch.chdir(tmp_path)
    Path("my-policy").symlink_to(policy)
    Path("my-model").symlink_to(subject)
    text = catalog.card("q-star").text.partition("## Use\n")[2]
    found: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], found)
    assert found["ids"].shape[0] == 1 and "<span" in Path("credit.html").read_text()
