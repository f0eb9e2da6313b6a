"""GeDi against full forward passes, brute force, exact Bayes' rule on tables, and autograd."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from steersman.errors import InputError
from steersman.language import MomentumDecoding
from steersman.language.endpoint import EndpointSampler
from steersman.language.gedi import (
    BestOf,
    ClassConditional,
    ControlCodes,
    GeDi,
    GeDiTrainer,
    GenerativeClassifier,
    ShiftLogits,
    apply,
    class_log_posterior,
    hybrid_loss,
    read_labelled,
    remove_unlikely,
    tokenized,
)

from .conftest import EOS, PAD, VOCABULARY, generate, left_padded, tiny
from .tabular import Tabular, TabularConfig, random_law

OFF = {"rho": 1.0}  # no filter


def full_posterior(guide: Any, codes: list[list[int]], text: list[int], alpha: float, bias: list[float]) -> np.ndarray:
    """log P(c | text) for every class by one full forward each; all but the first token of a code are scored."""
    logits = []
    for code, b in zip(codes, bias, strict=True):
        ids = torch.tensor([[*code, *text]])
        with torch.no_grad():
            law = guide(ids).logits[0, :-1].double().log_softmax(-1)
        said = law.gather(1, ids[0, 1:, None]).squeeze(1)
        logits.append(alpha / len(said) * float(said.sum()) + b)
    return torch.tensor(logits, dtype=torch.float64).log_softmax(0).numpy()


class TwoClasses(Tabular):
    """p(x_t | x_{t-1}, code) from ``table`` (V, V, V): the code is the first column of the cache."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        keys = torch.stack([input_ids, input_ids], -1)[:, None].float()
        if past_key_values is not None:
            keys, _ = past_key_values.update(keys, keys.clone(), 0)
        code = keys[:, 0, 0, 0].long()
        return CausalLMOutputWithPast(logits=self.table[code[:, None], input_ids], past_key_values=past_key_values)


def two_classes(table: torch.Tensor) -> TwoClasses:
    special = {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None}
    model = TwoClasses(TabularConfig(vocab_size=len(table), order=2, **special))
    model.table.data = table.clone()
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def guide(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param, seed=5)


# ------------------------------------------------------------------ exact checks: the law


def test_without_weight_and_filter_it_is_the_base(guide: Any, prompts: torch.Tensor) -> None:
    scores = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    moved = GeDi(guide, 3, 4, omega=0.0, **OFF)(prompts, scores) - scores
    assert float((moved - moved[:, :1]).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("codes", [[[3], [4]], [[3, 8, 9], [4, 8, 9]], [[3], [4], [5]]])
def test_posterior_is_that_of_full_forwards(kind: str, codes: list[list[int]]) -> None:
    """Step by step, for every prefix and candidate, with a random scale and random biases."""
    guide = tiny(kind, seed=2, vocab_size=50)
    rng = torch.Generator().manual_seed(1)
    alpha = 3 * float(torch.rand((), generator=rng)) + 0.2
    bias = torch.randn(len(codes), generator=rng).tolist()
    steer = GeDi(guide, codes[0], codes[1:], alpha=alpha, bias=bias)
    text = torch.randint(0, 50, (12,), generator=rng).tolist()
    for t in (1, 2, 5, 12):
        found = steer.next_log_posterior(torch.tensor([text[:t]]), 50)[0].double().numpy()
        for v in range(0, 50, 1 if t == 5 else 7):
            expected = full_posterior(guide, codes, [*text[:t], v], alpha, bias)[0]
            assert abs(found[v] - expected) < 1e-5
        whole = float(steer.posterior(torch.tensor([text[:t]])))
        assert abs(math.log(whole) - full_posterior(guide, codes, text[:t], alpha, bias)[0]) < 1e-5


def test_an_empty_text_has_the_prior(guide: Any) -> None:
    empty = torch.empty(2, 0, dtype=torch.long)
    assert GeDi(guide, 3, 4).posterior(empty).tolist() == [0.5, 0.5]
    biased = GeDi(guide, 3, 4, bias=[1.0, 0.0], class_bias=0.5).posterior(empty)
    torch.testing.assert_close(biased, torch.full((2,), 1 / (1 + math.exp(-1.5))))
    first = GeDi(guide, 3, 4).next_log_posterior(empty, VOCABULARY)[1]
    for v in (0, 7, 40):
        assert abs(float(first[v]) - full_posterior(guide, [[3], [4]], [v], 1.0, [0, 0])[0]) < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.2, 0.6]), st.sampled_from([0.55, 0.8, 0.95]))
def test_a_guide_that_sees_no_difference_changes_nothing(seed: int, rho: float, tau: float) -> None:
    """Posterior one half for all, no reordering; the filter keeps the most probable tokens that hold rho."""
    rng = torch.Generator().manual_seed(seed)
    law = random_law(9, 1, seed=seed % 1000)
    guide = two_classes(law.expand(9, 9, 9))  # the code makes no difference, but for the token behind it
    guide.table.data[4, 4] = guide.table.data[3, 3]
    steer = GeDi(guide, 3, 4, rho=rho, tau=tau)
    ids, scores = torch.randint(0, 3, (4, 5), generator=rng), 3 * torch.randn(4, 9, generator=rng)
    torch.testing.assert_close(steer.next_log_posterior(ids, 9).exp(), torch.full((4, 9), 0.5))
    p, out = scores.softmax(-1), steer(ids, scores)
    for row, moved in zip(p, out, strict=True):
        order = row.argsort(descending=True)
        kept = (moved > moved.max() - 5000)[order]
        count = int(kept.sum())
        assert bool(kept[:count].all()) and bool(kept[0])
        assert float(row[order[:count]].sum()) >= rho - 1e-6
        assert float(row[order[: count - 1]].sum()) <= rho + 1e-6
        assert torch.equal(moved.argsort(descending=True)[:count], order[:count])


def test_swapped_codes_swap_the_odds(guide: Any, prompts: torch.Tensor) -> None:
    one = GeDi(guide, 3, 4, alpha=2.0).next_log_posterior(prompts, VOCABULARY).double()
    other = GeDi(guide, 4, 3, alpha=2.0).next_log_posterior(prompts, VOCABULARY).double()
    torch.testing.assert_close(one.exp() + other.exp(), torch.ones_like(one), atol=1e-6, rtol=0)
    odds = torch.logit(one.exp())
    torch.testing.assert_close(odds, -torch.logit(other.exp()), atol=1e-5, rtol=1e-5)


def test_bayes_rule_on_a_table_gives_the_conditional_law() -> None:
    """With exponent 1, omega 1 and no filter, on the mixture of the classes: P_w is P(x_t | x_<t, c)."""
    law = random_law(6, 2, seed=3).double()
    guide = two_classes(law.float())
    steer = GeDi(guide, 4, 5, omega=1.0, normalise=False, **OFF)
    rng = torch.Generator().manual_seed(0)
    for length in range(1, 9):
        text = torch.randint(0, 6, (length,), generator=rng).tolist()
        joint = {c: law[c, c].exp()[text[0]] for c in (4, 5)}
        for a, b in itertools.pairwise(text):
            joint = {c: joint[c] * law[c, a].exp()[b] for c in joint}
        conditional = {c: law[c, text[-1]].exp() for c in joint}
        mixture = sum(joint[c] * conditional[c] for c in joint) / sum(joint.values())
        found = steer(torch.tensor([text]), mixture.log()[None].float())[0].double().softmax(-1)
        assert float((found - conditional[4]).abs().max()) < 1e-6


def test_early_evidence_fades_with_the_length() -> None:
    """Kept as published: the exponent alpha / t is that of the whole running sum."""
    odds = torch.tensor([[0.0], [-5.0]])
    at = [float(class_log_posterior(odds, torch.tensor(t))[0].exp()) for t in (1, 10, 100)]
    assert at == pytest.approx([1 / (1 + math.exp(-5 / t)) for t in (1, 10, 100)], abs=1e-6)


def test_what_no_class_can_say_has_the_prior() -> None:
    impossible = torch.tensor([[-math.inf, -1.0, -math.inf], [-math.inf, -math.inf, -1.0]])
    found = class_log_posterior(impossible, torch.tensor(3), 1.0, torch.tensor([[1.0], [0.0]])).exp()
    assert found[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1.0, 0.0])
    law = random_law(6, 2, seed=1)
    law[4, :, 2] = law[5, :, 2] = law[4, :, 1] = -math.inf
    out = GeDi(two_classes(law), 4, 5)(torch.tensor([[0, 3], [2, 1]]), torch.zeros(2, 6))
    assert bool(out.isfinite().all())


# ------------------------------------------------------------------ exact checks: the filter


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_filter_is_its_definition(data: st.DataObject) -> None:
    """Ascending posterior, then score; removed: inclusive mass below 1 - rho and posterior below tau."""
    size, rows = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rho, tau = data.draw(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0])), data.draw(st.sampled_from([0.1, 0.5, 0.8]))
    scores = (4 * torch.randn(rows, size, generator=rng)).round(decimals=data.draw(st.sampled_from([0, 5])))
    steps = data.draw(st.sampled_from([4, 1000]))
    posterior = torch.randint(1, steps, (rows, size), generator=rng) / steps
    if data.draw(st.booleans()):
        scores = scores.masked_fill(torch.rand(rows, size, generator=rng) < 0.4, -math.inf)
        scores[:, 0] = 1.0
    out = remove_unlikely(scores, posterior.log(), rho, tau)
    for score, post, moved in zip(scores, posterior, out, strict=True):
        p = score.softmax(-1)
        allowed = score > -math.inf
        order = sorted(range(size), key=lambda v: (bool(allowed[v]), round(float(post[v]), 6), float(score[v]), v))
        mass, expected = 0.0, set()
        for v in order[:-1]:
            mass += float(p[v])
            # float32 sums differ in the last bits: a mass at the limit is not asked about
            if abs(mass - (1 - rho)) < 1e-5:
                return
            if mass < 1 - rho and float(post[v]) < tau:
                expected.add(v)
        removed = {v for v in range(size) if bool(allowed[v]) and float(moved[v]) < float(score[v]) - 5000}
        assert removed == {v for v in expected if bool(allowed[v])}
        kept = [v for v in range(size) if v not in removed and bool(allowed[v])]
        assert kept and sum(float(p[v]) for v in kept) >= rho - 1e-5
        assert all(v in kept for v in range(size) if bool(allowed[v]) and float(post[v]) > tau)
        assert torch.equal(moved[kept], score[kept])
    assert torch.equal(out.isneginf(), scores.isneginf())


def test_filter_sorts_all_floats() -> None:
    """Its keys are bits of floats: tiny, huge, negative and equal ones, against numpy's own sort by two keys."""
    rng = np.random.default_rng(0)
    scores = (rng.standard_normal(4000) * 10.0 ** rng.integers(-30, 5, 4000)).astype(np.float32)
    scores[:100] = scores[100:200]
    posterior = (rng.integers(1, 40, 4000) / 40).astype(np.float32)
    order = np.lexsort((scores, posterior.round(6)))
    mass = np.cumsum(torch.tensor(scores).double().softmax(-1).numpy()[order])
    for rho in (0.25, 0.5, 0.75):
        out = remove_unlikely(torch.tensor(scores)[None], torch.tensor(posterior).log()[None], rho, 0.5)[0].numpy()
        expected = np.zeros(4000, dtype=bool)
        expected[order] = (mass < 1 - rho) & (posterior[order] < 0.5)
        assert (out < scores - 5000).tolist() == expected.tolist()


def test_a_bias_of_the_class_moves_tau() -> None:
    law = random_law(6, 2, seed=2)
    steer = GeDi(two_classes(law), 4, 5, tau=0.8, class_bias=2.0)
    assert steer._threshold == pytest.approx(1 / (1 + math.exp(-(math.log(4) + 2))))
    plain, moved = (GeDi(two_classes(law), 4, 5, class_bias=b).posterior(torch.tensor([[0, 1]])) for b in (0.0, 2.0))
    torch.testing.assert_close(torch.logit(moved) - torch.logit(plain), torch.tensor([2.0]))


# ------------------------------------------------------------------ exact checks: the loss


def test_lambda_one_is_the_language_model_under_the_true_code() -> None:
    model = tiny("gpt2", seed=1)
    rows = torch.randint(2, VOCABULARY, (4, 2, 7), generator=torch.Generator().manual_seed(0))
    rows[:, 1, 1:] = rows[:, 0, 1:]
    labels = torch.tensor([0, 1, 1, 0])
    classifier = GenerativeClassifier(model, 2, 1.0, learn_scale=True, learn_bias=True)
    classifier(rows, torch.ones_like(rows), labels)["loss"].backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert classifier.logit_scale.grad is None or float(classifier.logit_scale.grad) == 0
    model.zero_grad()
    true = rows[torch.arange(4), labels]
    model(true, labels=true).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-4)


def test_lambda_zero_is_silent_where_the_class_is_certain() -> None:
    nll = torch.tensor([[1.0, 4.0], [5.0, 0.5]], requires_grad=True)
    certain, _ = hybrid_loss(nll, torch.tensor([0, 1]), 0.0, logit_scale=200.0)
    certain.backward()
    assert float(nll.grad.abs().max()) == 0.0
    nll.grad = None
    wrong, logits = hybrid_loss(nll, torch.tensor([1, 0]), 0.0, logit_scale=200.0)
    wrong.backward()
    assert float(nll.grad.abs().min()) > 10
    both, _ = hybrid_loss(nll, torch.tensor([1, 0]), 0.3, logit_scale=200.0)
    generative = (4.0 + 5.0) / 2
    assert both.item() == pytest.approx(0.3 * generative + 0.7 * wrong.item())
    torch.testing.assert_close(logits, -200 * nll)


def test_means_leave_padding_and_code_out(guide: Any) -> None:
    classifier = GenerativeClassifier(guide, 2, 0.5, False, False)
    short, long = [5, 6, 7], [8, 9, 10, 11, 12, EOS]
    ids, mask = torch.full((2, 2, 8), PAD), torch.zeros(2, 2, 8, dtype=torch.long)
    for i, text in enumerate((short, long)):
        for k, code in enumerate((3, 4)):
            ids[i, k, : len(text) + 1] = torch.tensor([code, *text])
            mask[i, k, : len(text) + 1] = 1
    with torch.no_grad():
        found = classifier.nll(ids, mask)
    for i, text in enumerate((short, long)):
        for k, code in enumerate((3, 4)):
            row = torch.tensor([[code, *text]])
            with torch.no_grad():
                assert float(found[i, k]) == pytest.approx(float(guide(row, labels=row).loss), abs=1e-5)


def test_classes_by_bayes_rule_are_those_of_least_loss(guide: Any) -> None:
    """P(c | x) is largest where the mean negative log-likelihood is smallest."""
    steer = GeDi(guide, 3, 4, alpha=0.7)
    rows = torch.randint(2, VOCABULARY, (40, 8), generator=torch.Generator().manual_seed(3))
    coded = torch.stack([torch.cat([torch.full((40, 1), c), rows], 1) for c in (3, 4)], 1)
    with torch.no_grad():
        nll = GenerativeClassifier(guide, 2, 0.5, False, False).nll(coded, torch.ones_like(coded))
    assert torch.equal(steer.posterior(rows) > 0.5, nll.argmin(1) == 0)


# ------------------------------------------------------------------ a pure function of the prefix


def test_left_padding_changes_nothing(guide: Any, model: Any) -> None:
    rows = [torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 9, 6)]
    ids, mask = left_padded(rows)
    knobs = {"omega": 20.0, "alpha": 5.0}
    steer = GeDi(guide, 3, 4, pad_token_id=PAD, prompt_length=9, **knobs)
    batch = generate(model, ids, 12, attention_mask=mask, logits_processor=[steer])[:, 9:]
    for row, out in zip(rows, batch, strict=True):
        alone = generate(model, row[None], 12, logits_processor=[GeDi(guide, 3, 4, **knobs)])[0, len(row) :]
        assert torch.equal(out[: len(alone)], alone) and set(out[len(alone) :].tolist()) <= {PAD}


def test_answers_do_not_depend_on_earlier_calls(guide: Any) -> None:
    """Grown, cut, permuted, repeated and foreign prefixes: what a fresh processor says, to 1e-5."""
    rng = torch.Generator().manual_seed(0)
    used, ids = GeDi(guide, 3, 4, alpha=4.0), torch.randint(0, VOCABULARY, (3, 4), generator=rng)
    for move in ("grow", "grow", "swap", "grow", "cut", "grow", "same", "double", "other", "grow"):
        if move in ("grow", "swap"):
            ids = ids[[2, 0, 1]] if move == "swap" else ids
            ids = torch.cat([ids, torch.randint(0, VOCABULARY, (len(ids), 1), generator=rng)], 1)
        elif move == "cut":
            ids = ids[:, :3]
        elif move == "double":
            ids = ids.repeat(2, 1)
        elif move == "other":
            ids = torch.randint(0, VOCABULARY, (2, 7), generator=rng)
        for call in ("next_log_posterior", "posterior"):
            arguments = (ids, VOCABULARY) if call == "next_log_posterior" else (ids,)
            fresh = GeDi(guide, 3, 4, alpha=4.0)
            torch.testing.assert_close(
                getattr(used, call)(*arguments), getattr(fresh, call)(*arguments), atol=1e-5, rtol=1e-5
            )


def test_beams_and_return_sequences(guide: Any, model: Any, prompts: torch.Tensor) -> None:
    class Fresh(GeDi):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.prefixes.forget()
            return super().__call__(input_ids, scores)

    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True}
    beams = [generate(model, prompts, 12, logits_processor=[kind(guide, 3, 4)], **options) for kind in (GeDi, Fresh)]
    assert torch.equal(*beams)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    drawn = []
    for kind in (GeDi, Fresh):
        torch.manual_seed(0)
        drawn.append(generate(model, prompts, 12, logits_processor=[kind(guide, 3, 4, alpha=3.0)], **options))
    assert torch.equal(*drawn) and len(drawn[0]) == 9


def test_a_copy_says_the_same(guide: Any, prompts: torch.Tensor) -> None:
    steer, scores = GeDi(guide, 3, 4), torch.randn(3, VOCABULARY)
    steer(prompts, scores)
    assert torch.equal(copy.deepcopy(steer)(prompts, scores), steer(prompts, scores))


# ------------------------------------------------------------------ other processors, endpoints


def test_only_the_most_probable_tokens_are_known(guide: Any, prompts: torch.Tensor) -> None:
    """Endpoints give the top log-probabilities; what they leave out (-inf, or the authors' -50000) stays out."""
    scores = 3 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(2))
    known = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(10).indices, True)
    steer = GeDi(guide, 3, 4, alpha=5.0)
    out = [steer(prompts, scores.log_softmax(-1).masked_fill(~known, rest)) for rest in (-math.inf, -50_000.0)]
    torch.testing.assert_close(out[0].softmax(-1), out[1].softmax(-1))
    assert bool((out[0].softmax(-1)[~known] == 0).all()) and bool((out[0].isneginf() == ~known).all())
    alone = GeDi(guide, 3, 4, alpha=5.0, **OFF)(prompts, scores)
    unfiltered = GeDi(guide, 3, 4, alpha=5.0, **OFF)(prompts, scores.masked_fill(~known, -math.inf))
    torch.testing.assert_close(unfiltered.softmax(-1), alone.masked_fill(~known, -math.inf).softmax(-1))


def test_forbidden_tokens_stay_forbidden(guide: Any, prompts: torch.Tensor) -> None:
    """Even where the one token that the guide likes most is forbidden; and kept ones may be forbidden later."""
    best = GeDi(guide, 3, 4).next_log_posterior(prompts, VOCABULARY).argmax(1)
    scores = torch.zeros(3, VOCABULARY).scatter_(1, best[:, None], -math.inf)
    for rho in (0.0, 0.2):
        out = GeDi(guide, 3, 4, alpha=9.0, rho=rho, tau=0.999)(prompts, scores)
        assert bool(out.gather(1, best[:, None]).isneginf().all())
        assert bool((out.max(1).values > -5000).all())  # not all are removed
    last = MinLengthLogitsProcessor(99, eos_token_id=int(out[0].argmax()))
    assert float(last(prompts, out)[0].max()) > -math.inf


def test_with_momentum_decoding_behind_it(guide: Any, model: Any, prompts: torch.Tensor) -> None:
    chain = [GeDi(guide, 3, 4, omega=5.0), MomentumDecoding(0.2)]
    steered = generate(model, prompts, 20, logits_processor=chain)
    alone = generate(model, prompts, 20, logits_processor=chain[:1])
    assert not torch.equal(steered, alone)
    none = [GeDi(guide, 3, 4, omega=0.0, **OFF), MomentumDecoding(0.2)]
    plain = generate(model, prompts, 20, logits_processor=[MomentumDecoding(0.2)])
    assert torch.equal(generate(model, prompts, 20, logits_processor=none), plain)


def test_padding_of_vocabularies(guide: Any, prompts: torch.Tensor) -> None:
    """Rows behind the base's vocabulary that the guide lacks get the prior, and rows that only the guide has none."""
    steer, size = GeDi(guide, 3, 4), VOCABULARY
    longer = steer.next_log_posterior(prompts, size + 7)
    torch.testing.assert_close(longer[:, size:].exp(), torch.full((3, 7), 0.5))
    torch.testing.assert_close(longer[:, :size], steer.next_log_posterior(prompts, size))
    assert steer.next_log_posterior(prompts, size - 3).shape == (3, size - 3)


def test_published_order_of_the_repetition_penalty(guide: Any, prompts: torch.Tensor) -> None:
    chain = LogitsProcessorList([GeDi(guide, 3, 4), ShiftLogits(10.0), RepetitionPenaltyLogitsProcessor(1.2)])
    scores = torch.randn(3, VOCABULARY)
    steered = GeDi(guide, 3, 4)(prompts, scores)
    shifted = steered - steered.amax(1, keepdim=True) + 10
    assert float(shifted.max()) == 10.0
    out = chain(prompts, scores)
    for row, said, moved in zip(shifted, prompts, out, strict=True):
        for v in range(VOCABULARY):
            factor = 1.0 if v not in said.tolist() else 1 / 1.2 if row[v] > 0 else 1.2
            assert float(moved[v]) == pytest.approx(float(row[v]) * factor, rel=1e-5)


def test_through_an_endpoint_it_writes_the_same(base: Path, fitted: tuple[Path, dict[str, Any]]) -> None:
    """With log-probabilities of all tokens an endpoint gives what ``generate`` gives; with few, none but those."""
    model, tokenizer = ControlCodes.guide(base)
    steer = GeDi.from_pretrained(fitted[0], omega=10.0)

    class Completions:
        @staticmethod
        def create(prompt: str, logprobs: int, **_: Any) -> Any:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                top = model(ids).logits[0, -1].log_softmax(-1).topk(min(logprobs, len(tokenizer)))
            asked.append(set(top.indices.tolist()))
            rows = {tokenizer.decode([int(i)]): float(v) for v, i in zip(*top, strict=True)}
            choice = SimpleNamespace(logprobs=SimpleNamespace(top_logprobs=[rows]), finish_reason="length")
            return SimpleNamespace(choices=[choice])

    asked: list[set[int]] = []
    client = SimpleNamespace(completions=Completions)
    ids = tokenizer("the film was", return_tensors="pt")["input_ids"]
    local = generate(model, ids, 8, logits_processor=[steer])[0, 3:].tolist()
    all_ = EndpointSampler(client, "mine", tokenizer, [steer], top_logprobs=len(tokenizer))
    assert all_("the film was", 8, do_sample=False).ids == local
    few = EndpointSampler(client, "mine", tokenizer, [steer], top_logprobs=3)
    asked.clear()
    found = few("the film was", 8, generator=torch.Generator().manual_seed(0))
    assert all(token in known for token, known in zip(found.ids, asked, strict=True))


# ------------------------------------------------------------------ errata of the published code


def test_errata_the_last_token_is_never_removed() -> None:
    """The published guard against removing all sets the last flag to the value that it has."""
    scores, posterior = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.3, 0.2, 0.1]])
    flags = torch.tensor([True, True, True])
    if flags[-1]:
        flags[-1] = True  # as published
    assert bool(flags.all())
    out = remove_unlikely(scores, posterior.log(), 0.0, 0.8)
    assert (out > -5000).tolist() == [[True, False, False]]


def test_errata_ties_in_any_order_lose_the_most_probable_token() -> None:
    """A sort by the posterior alone removes the most probable token of many rows where all posteriors are equal."""
    rng = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(200, 50, generator=rng)
    posterior = torch.full((200, 50), 0.5)
    top = scores.argmax(1, keepdim=True)
    by_one_key = posterior.argsort(dim=1, stable=True)
    drop = scores.softmax(-1).gather(1, by_one_key).cumsum(1) < 0.8
    published = torch.zeros_like(drop).scatter(1, by_one_key, drop).gather(1, top)
    assert float(published.float().mean()) > 0.4
    ours = remove_unlikely(scores, posterior.log(), 0.2, 0.8).gather(1, top)
    assert torch.equal(ours, scores.gather(1, top))


def test_errata_the_learned_bias_follows_its_code() -> None:
    """Published: learned in the order of the codes, added in the order (wanted, other)."""
    codes = ControlCodes("sentiment", ("negative", "positive"), "positive", (8, 9), bias=(0.5, -2.0))
    assert codes.contrast("sentiment=negative", None, None) == ([8], [[9]], [0.5, -2.0])
    assert codes.contrast("sentiment=positive", None, None) == ([9], [[8]], [-2.0, 0.5])
    guide = two_classes(random_law(10, 2, seed=4))
    text, found = torch.tensor([[1]]), []
    for value in codes.values:
        wanted, others, bias = codes.contrast(f"sentiment={value}", None, None)
        found.append(GeDi(guide, wanted, others, bias=bias).posterior(text))
    torch.testing.assert_close(found[0] + found[1], torch.ones(1))


def test_errata_a_penalty_lowers_what_is_far_below_too() -> None:
    """Published: shifted scores below zero are divided as well, which raises them."""
    scores = torch.tensor([[0.0, -5.0, -30.0]])
    shifted = ShiftLogits(10.0)(torch.tensor([[0, 1, 2]]), scores)
    assert shifted.tolist() == [[10.0, 5.0, -20.0]]
    published = shifted / 1.2
    assert float(published[0, 2]) > float(shifted[0, 2])
    ours = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([[0, 1, 2]]), shifted)
    assert bool((ours < shifted).all())


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("codes", "options", "names"),
    [
        ((3, 4), {"omega": -1.0}, "omega=-1.0"),
        ((3, 4), {"omega": math.inf}, "omega=inf"),
        ((3, 4), {"rho": 1.1}, "rho=1.1"),
        ((3, 4), {"rho": -0.1}, "rho=-0.1"),
        ((3, 4), {"tau": 0.0}, "tau=0.0"),
        ((3, 4), {"tau": 1}, "tau=1"),
        ((3, 4), {"tau": "high"}, "tau='high'"),
        ((3, 4), {"alpha": -1}, "alpha=-1"),
        ((3, 4), {"class_bias": math.nan}, "class_bias=nan"),
        ((3, 4), {"bias": [1.0]}, "2 numbers, the wanted class first"),
        ((3, 99), {}, "undesired_ids=99"),
        ((-1, 4), {}, "desired_ids=-1"),
        (([], 4), {}, "desired_ids"),
        ((3, 3), {}, "codes other than"),
        ((3, []), {}, "undesired_ids"),
    ],
)
def test_bad_arguments_are_named(codes: tuple[Any, Any], options: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        GeDi(tiny("llama"), *codes, **options)


def test_a_guide_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"guide\.eval"):
        GeDi(tiny("gpt2").train(), 3, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_scores_are_refused(guide: Any, prompts: torch.Tensor, value: float) -> None:
    scores = torch.randn(3, VOCABULARY)
    scores[1, 2] = value
    with pytest.raises(InputError, match=r"rows \[1\].*free of NaN and \+inf"):
        GeDi(guide, 3, 4)(prompts, scores)
    with pytest.raises(InputError, match="a finite value in every row"):
        GeDi(guide, 3, 4)(prompts, torch.full((3, VOCABULARY), -math.inf))


def test_a_text_longer_than_the_guide_takes_is_refused() -> None:
    short = tiny("llama")
    short.config.max_position_embeddings = 16
    with pytest.raises(InputError, match="at most 16"):
        GeDi(short, 3, 4)(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, VOCABULARY))


# ------------------------------------------------------------------ training, saving and loading

GOOD, BAD = ["good", "great", "tasty"], ["bad", "awful", "dull"]
WORDS = ["the", "film", "food", "was", *GOOD, *BAD, "plain", "and", "so", "it", "is", "happy", "sad", "noise"]


def word_tokenizer(extra: tuple[str, ...] = ()) -> Any:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "<true>", "<false>", *WORDS, *extra])}
    level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<true>", "<false>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=level,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special,
    )


def labelled_rows(n: int = 240) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        good = i % 4 != 0  # three times as many as bad ones
        words = GOOD if good else BAD
        text = f"the {rng.choice(['film', 'food'])} was {rng.choice(words)} and so it is {rng.choice(words)}"
        rows.append({"text": text, "mood": "happy" if good else "sad"})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model with a tokenizer of words, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = word_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    model.config.initializer_range = 0.02
    model = type(model)(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A guide of two codes, trained for a moment."""
    folder = tmp_path_factory.mktemp("guide")
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows()))
    out = folder / "out"
    out.mkdir()
    told: list[str] = []
    metrics = apply(
        base, file, out, seed=3, log=told.append, attribute="mood=happy", steps=60, batch_size=8, learning_rate=0.01,
        layers=2, learn_bias=True,
    )  # fmt: skip
    assert len(told) == 11 and "step 60/60: loss" in told[-1]
    return out, metrics


def test_apply_learns_the_classes(fitted: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = fitted
    assert metrics["accuracy"] > 0.9 and metrics["codes"] == "values" and metrics["values"] == ["happy", "sad"]
    assert metrics["logit_scale"] != 1.0 and len(metrics["bias"]) == 2
    codes, tokenizer = ControlCodes.load(folder), word_tokenizer()
    known = tokenizer.get_vocab()
    assert codes.ids == (known["happy"], known["sad"]) and codes.logit_scale == pytest.approx(metrics["logit_scale"])
    texts = ["the film was good and so it is great", "the food was awful and so it is dull"]
    rows = torch.tensor([tokenizer(t)["input_ids"] for t in texts])
    happy = GeDi.from_pretrained(folder, tokenizer=tokenizer).posterior(rows)
    sad = GeDi.from_pretrained(folder, attribute="mood=sad").posterior(rows)
    assert happy[0] > 0.5 > happy[1]
    torch.testing.assert_close(happy + sad, torch.ones(2))


def test_a_guide_steers_what_a_model_writes(base: Path, fitted: tuple[Path, dict[str, Any]]) -> None:
    model, tokenizer = ControlCodes.guide(base)
    ids = tokenizer(["the film was"], return_tensors="pt")["input_ids"]
    known = [tokenizer.get_vocab()[w] for w in (*GOOD, *BAD)]
    options = {
        "do_sample": True,
        "top_k": 0,
        "num_return_sequences": 60,
        "prefix_allowed_tokens_fn": lambda b, i: known,
    }
    for value, words in (("happy", GOOD), ("sad", BAD)):
        steer = GeDi.from_pretrained(fitted[0], attribute=f"mood={value}")
        torch.manual_seed(0)
        plain, out = (generate(model, ids, 1, logits_processor=list_, **options) for list_ in ([], [steer]))
        shares = [np.mean([tokenizer.decode(row[-1:]) in words for row in rows]) for rows in (plain, out)]
        assert shares[0] < 0.7 and shares[1] > 0.95


def test_the_same_guide_without_guiding(fitted: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = fitted
    tokenizer = word_tokenizer()
    cclm = GeDi.from_pretrained(folder, mode="conditional", attribute="mood=sad")
    assert isinstance(cclm, ClassConditional) and cclm.opening == (tokenizer.get_vocab()["sad"],)
    assert ClassConditional.from_pretrained(folder, attribute="mood=sad").opening == cclm.opening
    ids = torch.tensor([[*cclm.opening, *tokenizer("the film was")["input_ids"]]])
    out = generate(cclm.writer, ids, 1, do_sample=True, top_k=0, num_return_sequences=40)
    assert np.mean([tokenizer.decode(row[-1:]) in BAD for row in out]) > 0.6
    best = GeDi.from_pretrained(folder, mode="best-of-4")
    assert isinstance(best, BestOf) and best.n == 4
    score = best.score(["the film was good", "the film was bad", "the food was so bad"])
    assert score.shape == (3,) and score[0] > score[1]
    with pytest.raises(InputError, match="mode='best-of-1'"):
        GeDi.from_pretrained(folder, mode="best-of-1")


def test_keywords_tell_a_word_from_its_absence(base: Path, tmp_path: Path) -> None:
    """true and false with the values' words: scored words, a held-out value, and a word never trained."""
    rows = [
        {"text": f"the {thing} was {word}", "label": value}
        for value, words in {"good": ["tasty", "great"], "bad": ["awful", "sad"], "plain": ["dull", "noise"]}.items()
        for word in words
        for thing in ("film", "food")
    ] * 8
    file = tmp_path / "topics.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, ["label", "text"])
        writer.writeheader()
        writer.writerows(rows)
    folder = tmp_path / "guide"
    folder.mkdir()
    metrics = apply(
        base, file, folder, attribute="label=plain", codes="keyword", held_out="plain", gen_weight=0.8, steps=3,
        batch_size=4, layers=1,
    )  # fmt: skip
    assert metrics["codes"] == "keyword" and metrics["values"] == ["bad", "good"]
    known = word_tokenizer().get_vocab()
    codes = ControlCodes.load(folder)
    assert codes.ids == (known["<true>"], known["<false>"]) and codes.wanted == "plain"
    steer = GeDi.from_pretrained(folder)
    assert steer.codes == [(known["<true>"], known["plain"]), (known["<false>"], known["plain"])]
    other = GeDi.from_pretrained(folder, attribute="label=happy sad")
    assert other.codes[0] == (known["<true>"], known["happy"], known["sad"])
    text = word_tokenizer()("the film was")["input_ids"]
    expected = full_posterior(other.guide, [list(c) for c in other.codes], text, codes.logit_scale, [0, 0])[0]
    assert math.log(float(other.posterior(torch.tensor([text])))) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="of words that the tokenizer knows"):
        GeDi.from_pretrained(folder, attribute="label=zebra")
    with pytest.raises(InputError, match="tells a keyword from its absence"):
        GeDi.from_pretrained(folder, undesired="bad")


def test_batches_of_keywords(base: Path) -> None:
    """Every text stands under true and false with its own word, and with another's."""
    from steersman.language.gedi.training import Coded

    tokenizer = word_tokenizer()
    codes = ControlCodes.choose(tokenizer, "label", ["bad", "good", "plain"], "good", keywords=True)
    batch = Coded(codes, tokenizer)([{"input_ids": [7, 8, 9], "label": 1}, {"input_ids": [7], "label": 0}] * 20)
    assert batch["input_ids"].shape == (80, 2, 5) and batch["labels"].tolist() == [0, 1] * 40
    known = tokenizer.get_vocab()
    ids = batch["input_ids"]
    assert bool((ids[:, 0, 0] == known["<true>"]).all()) and bool((ids[:, 1, 0] == known["<false>"]).all())
    words = [[tokenizer.convert_ids_to_tokens(int(row[k, 1])) for k in (0, 1)] for row in ids]
    assert all(a == b for a, b in words)
    own = ["good", "bad"] * 20
    assert [w[0] for w in words[0::2]] == own
    for mine, (theirs, _) in zip(own, words[1::2], strict=True):
        assert theirs != mine
    assert {w[0] for w in words[1::2]} == {"bad", "good", "plain"}
    assert batch["attention_mask"].sum(-1)[:, 0].tolist() == [5, 5, 3, 3] * 20


def test_trainer_draws_classes_evenly_and_resumes(base: Path, tmp_path: Path) -> None:
    model, tokenizer = ControlCodes.guide(base)
    rows = labelled_rows(200)
    codes = ControlCodes.choose(tokenizer, "mood", ["happy", "sad"], "happy", keywords=False)
    data = tokenized(tokenizer, [r["text"] for r in rows], [int(r["mood"] == "sad") for r in rows], 2)
    assert data[0]["input_ids"][-1] == tokenizer.eos_token_id
    options: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "learning_rate": 0.01, "logging_strategy": "no",
    }  # fmt: skip
    trainer = GeDiTrainer(model, TrainingArguments(**options), codes, data, processing_class=tokenizer, learn_bias=True)
    drawn = [data[i]["label"] for i in trainer._get_train_sampler()]
    assert 0.4 < np.mean(drawn) < 0.6
    trainer.train()
    whole = trainer.classifier
    folder = tmp_path / "checkpoint-2"
    assert ControlCodes.load(folder).logit_scale != 1.0
    again = GeDiTrainer(
        ControlCodes.guide(base)[0],
        TrainingArguments(**options),
        codes,
        data,
        processing_class=tokenizer,
        learn_bias=True,
    )
    again.train(resume_from_checkpoint=str(folder))
    for (name, a), (_, b) in zip(whole.named_parameters(), again.classifier.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_files_of_labelled_texts(tmp_path: Path) -> None:
    """The shapes of SST-2, AG News and Jigsaw, and lines of JSON."""
    files = {
        "sst2.tsv": ("sentence\tlabel\nfine film\t1\nbad film\t0\n", "label", (["fine film", "bad film"], ["1", "0"])),
        "ag.csv": (
            'Class Index,Title,Description\n3,Oil,"prices, up"\n1,War,goes on\n',
            "class index",
            (["Oil prices, up", "War goes on"], ["3", "1"]),
        ),
        "jigsaw.csv": (
            "id,comment_text,toxic\n7,so nice,0\n8,so bad,1\n9,,1\n",
            "toxic",
            (["so nice", "so bad"], ["0", "1"]),
        ),
        "mine.jsonl": (
            '{"text": "a", "ok": true}\n\n{"text": "b", "ok": false}\n',
            "ok",
            (["a", "b"], ["true", "false"]),
        ),
    }
    for name, (content, column, expected) in files.items():
        (tmp_path / name).write_text(content)
        assert read_labelled(tmp_path / name, column) == expected


@pytest.mark.parametrize(
    ("content", "column", "names"),
    [
        ("text,label\na,1\nb,1\n", "label", "at least two values"),
        ("text,label\na,1\nb,\n", "label", "row 2 has none"),
        ("words,label\na,1\nb,2\n", "label", "text_column=None"),
        ("text,label\na,1\nb,2\n", "mood", "a column of"),
        ("text,label\n", "label", "at least one row"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, column: str, names: str) -> None:
    file = tmp_path / "texts.csv"
    file.write_text(content)
    with pytest.raises(InputError, match=names):
        read_labelled(file, column)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"attribute": "mood"}, "column=value"),
        ({"attribute": "mood=angry"}, "mood= one of happy, sad"),
        ({"attribute": "colour=red"}, "attribute='colour'"),
        ({"attribute": "mood=happy", "held_out": "sad"}, "held_out"),
        ({"attribute": "mood=happy", "code_tokens": "good"}, "2 tokens, for happy, sad"),
        ({"attribute": "mood=happy", "code_tokens": "good,so bad"}, "one token of the tokenizer"),
        ({"attribute": "mood=happy", "code_tokens": "good,good"}, "all differ"),
        ({"attribute": "mood=happy", "layers": 3}, "at most the 2"),
        ({"attribute": "mood=happy", "batch_size": 0}, "batch_size=0"),
        ({"attribute": "mood=happy", "gen_weight": 1.5}, "gen_weight=1.5"),
        ({"attribute": "mood=happy", "learning_rate": 0}, "learning_rate=0"),
    ],
)
def test_bad_settings_are_refused(base: Path, tmp_path: Path, settings: dict[str, Any], names: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(20)))
    with pytest.raises(InputError, match=names):
        apply(base, file, tmp_path, **settings)


def test_no_texts_and_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="input=None"):
        apply(tmp_path, None, tmp_path, attribute="mood=happy")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(20)))
    with pytest.raises(InputError, match="a model with tokenizer that transformers loads"):
        apply(tmp_path, file, tmp_path, attribute="mood=happy")


def test_what_a_guide_was_not_trained_on_is_refused(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = fitted
    for attribute in ("mood=angry", "topic=film", "happy"):
        with pytest.raises(InputError, match="attribute="):
            GeDi.from_pretrained(folder, attribute=attribute)
    with pytest.raises(InputError, match="undesired='happy'"):
        GeDi.from_pretrained(folder, undesired="happy")
    with pytest.raises(InputError, match="the same vocabulary"):
        GeDi.from_pretrained(folder, tokenizer=word_tokenizer(("more",)))
    with pytest.raises(InputError, match=r"gedi\.json"):
        GeDi.from_pretrained(tmp_path)


def test_labels_and_texts_are_checked(base: Path) -> None:
    tokenizer = word_tokenizer()
    for label in (2, -1, True, "happy"):
        with pytest.raises(InputError, match="labels="):
            tokenized(tokenizer, ["good"], [label], 2)  # type: ignore[list-item]
    with pytest.raises(InputError, match="texts="):
        tokenized(tokenizer, [" "], [0], 2)
    codes = ControlCodes.choose(tokenizer, "mood", ["happy", "sad"], "happy", keywords=False)
    data = tokenized(tokenizer, ["good"], [0], 2)
    with pytest.raises(InputError, match="none with mood=sad"):
        GeDiTrainer(
            ControlCodes.guide(base)[0], TrainingArguments(use_cpu=True), codes, data, processing_class=tokenizer
        )


def test_a_keyword_of_several_tokens_warns() -> None:
    with pytest.warns(UserWarning, match="'happy sad' is 2 tokens"):
        ControlCodes.choose(word_tokenizer(), "label", ["good", "happy sad"], "good", keywords=True)


def test_codes_of_a_byte_level_vocabulary() -> None:
    """A word of one token, as it is or behind a space; one in pieces is no code, and others can be named."""
    level = Tokenizer(models.BPE())
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    level.train_from_iterator(["it is good and bad and so is this"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level)
    known = tokenizer.get_vocab()
    assert "Ġgood" in known and "good" not in known
    codes = ControlCodes.choose(tokenizer, "mood", ["bad", "good"], "good", keywords=False)
    assert codes.ids == (known["bad"], known["Ġgood"])
    with pytest.raises(InputError, match=r"control code='angry'.*name others with code_tokens"):
        ControlCodes.choose(tokenizer, "mood", ["angry", "good"], "good", keywords=False)
    named = ControlCodes.choose(tokenizer, "mood", ["angry", "good"], "good", keywords=False, names=["Ġbad", " good"])
    assert named.ids == (known["Ġbad"], known["Ġgood"])
    assert codes.words("good", tokenizer) == [known["Ġgood"]]
