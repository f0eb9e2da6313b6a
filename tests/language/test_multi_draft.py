"""Acceptance and verification of several drafts, against enumeration, linear programs and many draws."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from steersman.errors import InputError
from steersman.language.multi_draft import (
    SAMPLERS,
    VERIFIERS,
    acceptance,
    draft,
    optimal_acceptance,
    output_law,
    recommend,
    verify,
)
from steersman.language.multi_draft import verification as module
from steersman.language.multi_draft.verification import k_seq_gamma

CASES = [(v, n) for v in VERIFIERS for n in (1, 2, 3) if (v == "spechub") <= (n == 2)]


def laws(count: int, seed: int = 0, concentrations: tuple[float, ...] = (0.5, 1, 5)) -> list[tuple[Tensor, Tensor]]:
    """Pairs (1, V) of Dirichlet laws with V from 3 to 6; every fifth p has a zero."""
    rng = np.random.default_rng(seed)
    out = []
    for trial in range(count):
        size = int(rng.integers(3, 7))
        p, q = (rng.dirichlet([concentrations[trial % len(concentrations)]] * size) for _ in range(2))
        if trial % 5 == 0:
            p[int(rng.integers(size))] = 0
            p /= p.sum()
        out.append((torch.tensor(p)[None], torch.tensor(q)[None]))
    return out


def sequences(q: Tensor, n: int, sampler: str) -> dict[tuple[int, ...], float]:
    """Every sequence of drafts and its probability, by the definition of the sampler."""
    mass = q[0].numpy()
    size = len(mass)
    law: dict[tuple[int, ...], float] = {}
    if sampler == "with":
        law = {d: float(np.prod(mass[list(d)])) for d in itertools.product(range(size), repeat=n)}
    elif sampler == "without":
        support = np.flatnonzero(mass).tolist()
        for d in itertools.permutations(support, min(n, len(support))):
            left, chance = mass.copy(), 1.0
            for i in d:
                chance *= left[i] / left.sum()
                left[i] = 0
            law[d + (-1,) * (n - len(d))] = chance
    else:
        order = np.argsort(-mass, kind="stable").tolist()
        top, others = order[: n - 1], order[n - 1 :]
        rest = mass[others].sum()
        for i in others:
            chance = mass[i] / rest if rest >= 1e-6 else float(i == others[0])
            if sampler == "greedy":
                law[(*top, i)] = chance
            else:
                law[(i, top[0])], law[(top[0], i)] = (1 - mass[top[0]]) * chance, mass[top[0]] * chance
    return {d: chance for d, chance in law.items() if chance > 0}


def kernel_of(p: Tensor, q: Tensor, n: int, verifier: str) -> tuple[Tensor, Tensor, Tensor]:
    """All sequences of drafts (M, n), their probabilities (M,), and the law of the output behind each (M, V)."""
    law = sequences(q, n, VERIFIERS[verifier])
    drafts, chance = torch.tensor(list(law)), torch.tensor(list(law.values()), dtype=torch.float64)
    rows = len(drafts)
    return drafts, chance / chance.sum(), output_law(p.expand(rows, -1), q.expand(rows, -1), drafts, verifier)


# --- the bound -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_bound_is_the_best_of_all_subsets_and_the_linear_program(sampler: str, n: int) -> None:
    if sampler == "spechub" and n == 3:
        with pytest.raises(InputError, match="2 for SpecHub"):
            optimal_acceptance(*laws(1)[0], n, sampler)
        return
    for p, q in laws(12, concentrations=(0.05, 0.5, 1, 5)):
        law = sequences(q, n, sampler)
        tokens = range(p.shape[1])
        subsets = itertools.chain.from_iterable(itertools.combinations(tokens, k) for k in range(len(tokens) + 1))
        dual = min(
            float(p[0, list(H)].sum()) - sum(chance for d, chance in law.items() if set(d) <= set(H)) for H in subsets
        )
        # Primal: mass x[d, y] of drafts d and accepted token y in d.
        pairs = [(k, y) for k, d in enumerate(law) for y in set(d)]
        rows = np.zeros((len(law) + len(tokens), len(pairs)))
        for column, (k, y) in enumerate(pairs):
            rows[k, column] = rows[len(law) + y, column] = 1
        limits = np.concatenate([np.array(list(law.values())), p[0].numpy()])
        primal = -optimize.linprog(-np.ones(len(pairs)), A_ub=rows, b_ub=limits).fun
        found = float(optimal_acceptance(p, q, n, sampler))
        assert found == pytest.approx(1 + dual, abs=1e-11)
        assert found == pytest.approx(primal, abs=1e-6)


def test_the_race_is_the_closed_form_of_two_drafts_in_large_vocabularies() -> None:
    """Q(H) = sum over i in H of q_i (q(H) - q_i)/(1 - q_i), for peaked laws too."""
    generator = torch.Generator().manual_seed(0)
    for spread in (1.0, 5.0, 25.0):
        p, q = ((spread * torch.randn(1, 2000, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(2))
        order = (p / q).argsort(1)
        p_k, q_k = p.gather(1, order)[0], q.gather(1, order)[0]
        others = q_k.sum() - q_k
        likely = int(q_k.argmax())
        others[likely] = torch.cat([q_k[:likely], q_k[likely + 1 :]]).sum()
        odds = q_k / others
        Q = odds.cumsum(0) * q_k.cumsum(0) - (odds * q_k).cumsum(0)
        wanted = 1 + min(0.0, float((p_k.cumsum(0) - Q).amin()))
        assert float(optimal_acceptance(p, q, 2, "without")) == pytest.approx(wanted, abs=1e-11)


def test_the_race_is_the_enumeration_of_three_and_four_drafts_of_peaked_laws() -> None:
    rng = np.random.default_rng(3)
    for trial in range(8):
        q = torch.tensor(rng.dirichlet([0.05] * 7))[None]
        q = q.clamp(min=1e-12 if trial % 2 else 1e-40)
        q = q / q.sum()
        p = torch.tensor(rng.dirichlet([0.3] * 7))[None]
        for n in (3, 4):
            law = sequences(q, n, "without")
            order = (p / q).argsort(1)[0].tolist()
            least = min(
                float(p[0, order[:k]].sum()) - sum(c for d, c in law.items() if set(d) <= set(order[:k]))
                for k in range(8)
            )
            assert float(optimal_acceptance(p, q, n, "without")) == pytest.approx(1 + least, abs=1e-9)


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = ((3 * torch.randn(40, 900, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(2))
    for sampler in ("with", "without", "greedy"):
        together = optimal_acceptance(p, q, 3, sampler)
        alone = torch.cat([optimal_acceptance(p[i : i + 1], q[i : i + 1], 3, sampler) for i in range(40)])
        assert torch.allclose(together, alone, rtol=0, atol=1e-12)


def test_bounds_grow_with_the_drafts_and_are_ordered() -> None:
    for p, q in laws(30, seed=1):
        for sampler in ("with", "without", "greedy"):
            values = [float(optimal_acceptance(p, q, n, sampler)) for n in range(1, p.shape[1] + 1)]
            assert all(later >= earlier - 1e-10 for earlier, later in itertools.pairwise(values))
        for n in (2, 3):
            best, other = (float(optimal_acceptance(p, q, n, s)) for s in ("without", "with"))
            assert best >= other - 1e-10 and other >= float(acceptance(p, q, n, "rrs")) - 1e-10


def test_all_of_a_small_support_are_drafts_without_replacement() -> None:
    q = torch.tensor([[0.7, 0.3, 0, 0, 0]], dtype=torch.float64)
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0]], dtype=torch.float64)
    assert float(optimal_acceptance(p, q, 4, "without")) == pytest.approx(0.3, abs=1e-12)
    assert float(acceptance(p, q, 4, "rrsw")) == pytest.approx(0.3, abs=1e-12)
    drafts = draft(q.expand(50, -1), 4, "without", torch.Generator().manual_seed(0))
    assert set(drafts[:, :2].flatten().tolist()) == {0, 1} and bool((drafts[:, 2:] == -1).all())
    law = output_law(p.expand(50, -1), q.expand(50, -1), drafts, "rrsw")
    assert torch.allclose(law.sum(1), torch.ones(50, dtype=torch.float64))


# --- verifiers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verifier", "n"), CASES)
def test_a_verifier_is_lossless_and_accepts_what_its_formula_says(verifier: str, n: int) -> None:
    if verifier == "single" and n > 1:
        n = 1
    for p, q in laws(8 if verifier == "ot-lp" else 25, seed=n):
        drafts, chance, kernel = kernel_of(p, q, n, verifier)
        assert float(kernel.min()) >= 0
        assert torch.allclose(kernel.sum(1), torch.ones(len(drafts), dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.allclose(chance @ kernel, p[0], rtol=0, atol=1e-12)
        among = torch.zeros_like(kernel).scatter_(1, drafts, 1.0)
        accepted = float(chance @ (kernel * among).sum(1))
        tolerance = 1e-7 if verifier == "ot-lp" else 1e-10  # the linear program's own
        assert accepted == pytest.approx(float(acceptance(p, q, n, verifier)), abs=tolerance)
        assert accepted <= float(optimal_acceptance(p, q, n, VERIFIERS[verifier])) + 1e-9


@pytest.mark.parametrize(("verifier", "n"), CASES)
def test_a_verifier_is_lossless_on_peaked_laws(verifier: str, n: int) -> None:
    for p, q in laws(6 if verifier == "ot-lp" else 15, seed=10 + n, concentrations=(0.02, 0.1)):
        _, chance, kernel = kernel_of(p, q, n, verifier)
        assert torch.allclose(chance @ kernel, p[0], rtol=0, atol=1e-8)


def test_recursive_rejection_of_drafts_without_replacement_needs_what_is_left_of_q() -> None:
    """The power of the test above: with the whole q in place of what earlier drafts left, the law is another."""
    worst = 0.0
    for p, q in laws(10, seed=2):
        law = sequences(q, 2, "without")
        drafts, chance = torch.tensor(list(law)), torch.tensor(list(law.values()), dtype=torch.float64)
        rows = len(drafts)
        kernel = module._recursive(p.expand(rows, -1), q.expand(rows, -1), drafts, replaced=True)
        worst = max(worst, float((chance @ kernel - p[0]).abs().max()))
    assert worst > 0.01


@pytest.mark.parametrize(
    ("verifier", "n"), [("single", 1), ("rrs", 3), ("rrsw", 3), ("k-seq", 3), ("spechub", 2), ("greedy", 3)]
)
def test_many_draws_have_the_target_s_law(verifier: str, n: int) -> None:
    """Drafting and verifying 100000 times, through the tensors that decoding uses."""
    generator = torch.Generator().manual_seed(5)
    p = torch.tensor([[0.3, 0.0, 0.25, 0.25, 0.15, 0.05]])
    q = torch.tensor([[0.1, 0.3, 0.05, 0.35, 0.15, 0.05]])
    count = 100_000
    rows_p, rows_q = p.expand(count, -1), q.expand(count, -1)
    drafts = draft(rows_q, n, VERIFIERS[verifier], generator)
    tokens, accepted = verify(rows_p, rows_q, drafts, verifier, generator)
    counts = torch.bincount(tokens, minlength=6).numpy()
    assert counts[1] == 0
    seen = p[0].double().numpy() > 0
    wanted = p[0].double().numpy()[seen]
    assert stats.chisquare(counts[seen], count * wanted / wanted.sum()).pvalue > 1e-4
    rate = float(acceptance(p, q, n, verifier))
    assert abs(float(accepted.double().mean()) - rate) < 5 * (rate * (1 - rate) / count) ** 0.5


def test_drafts_have_their_sampler_s_law() -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.tensor([[0.4, 0.05, 0.3, 0.25]], dtype=torch.float64)
    count = 60_000
    for sampler, n in (("with", 2), ("without", 3), ("greedy", 3), ("spechub", 2)):
        law = sequences(q, n, sampler)
        drafts = draft(q.expand(count, -1), n, sampler, generator)
        found, times = torch.unique(drafts, dim=0, return_counts=True)
        counts = dict(zip(map(tuple, found.tolist()), times.tolist(), strict=True))
        assert set(counts) <= set(law)
        observed = [counts.get(d, 0) for d in law]
        assert stats.chisquare(observed, [count * chance for chance in law.values()]).pvalue > 1e-4


def test_u_of_zero_gives_no_token_without_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison with <= instead of < would emit token 0, which p forbids."""
    p = torch.tensor([[0.0, 0.0, 0.6, 0.4]])
    q = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    for value in (0.0, 1 - 2**-53):
        monkeypatch.setattr(
            torch, "rand", lambda *a, value=value, dtype=None, **k: torch.full(a[0], value, dtype=dtype)
        )
        for verifier in ("single", "rrs", "rrsw", "k-seq", "greedy", "spechub"):
            drafts = torch.tensor([[0, 1]])
            token, _ = verify(p, q, drafts, verifier)
            assert float(p[0, token]) > 0


def test_spechub_is_exact_where_one_token_is_almost_certain() -> None:
    """Accepting the top token outright above 0.999 would lose what p gives to the others."""
    p = torch.tensor([[0.9995, 0.0003, 0.0002]], dtype=torch.float64)
    q = torch.tensor([[0.9, 0.05, 0.05]], dtype=torch.float64)
    _, chance, kernel = kernel_of(p, q, 2, "spechub")
    assert torch.allclose(chance @ kernel, p[0], rtol=0, atol=1e-12)
    outright = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert float((outright - p[0]).abs().max()) > 1e-4


# --- identities --------------------------------------------------------------------------------------------------


def test_spechub_accepts_what_greedy_does_with_two_drafts() -> None:
    for p, q in laws(40, seed=3):
        assert float(acceptance(p, q, 2, "spechub")) == pytest.approx(float(acceptance(p, q, 2)), abs=1e-12)
        drafts, chance, kernel = kernel_of(p, q, 2, "spechub")
        among = torch.zeros_like(kernel).scatter_(1, drafts, 1.0)
        enumerated = float(chance @ (kernel * among).sum(1))
        assert enumerated == pytest.approx(float(optimal_acceptance(p, q, 2, "greedy")), abs=1e-12)


@pytest.mark.parametrize("verifier", [v for v in VERIFIERS if v != "spechub"])
def test_one_draft_is_speculative_sampling(verifier: str) -> None:
    for p, q in laws(10, seed=4):
        assert float(acceptance(p, q, 1, verifier)) == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-9)
        for sampler in ("with", "without", "greedy"):
            assert float(optimal_acceptance(p, q, 1, sampler)) == pytest.approx(
                float(torch.minimum(p, q).sum()), abs=1e-12
            )


@pytest.mark.parametrize(("verifier", "n"), [case for case in CASES if case[1] > 1 and case[0] != "ot-lp"])
def test_equal_laws_accept_everything(verifier: str, n: int) -> None:
    for _, q in laws(6, seed=5):
        assert float(acceptance(q, q, n, verifier)) == pytest.approx(1, abs=1e-10)
        assert float(optimal_acceptance(q, q, n, VERIFIERS[verifier])) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(("verifier", "n"), CASES)
def test_disjoint_supports_accept_nothing_and_lose_nothing(verifier: str, n: int) -> None:
    p = torch.tensor([[0.5, 0.2, 0.3, 0, 0, 0, 0]], dtype=torch.float64)
    q = torch.tensor([[0, 0, 0, 0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    assert float(acceptance(p, q, n, verifier)) == pytest.approx(0, abs=1e-12)
    for sampler in ("with", "without", "greedy"):
        assert float(optimal_acceptance(p, q, n, sampler)) == pytest.approx(0, abs=1e-12)
    _, chance, kernel = kernel_of(p, q, n, verifier)
    assert torch.allclose(chance @ kernel, p[0], rtol=0, atol=1e-12)


def test_the_residual_of_k_seq() -> None:
    for p, q in laws(30, seed=6, concentrations=(0.1, 0.5, 1, 5)):
        for n in (1, 2, 3, 5):
            beta, gamma = (float(x) for x in k_seq_gamma(p, q, n))
            assert 1 - (1 - beta) ** n == pytest.approx(gamma * beta, abs=1e-12) and 1 <= gamma <= n
            times = (1 - (1 - beta) ** n) / beta
            residual = p - torch.minimum(q, p / gamma) * times
            assert float(residual.min()) >= -1e-12
            assert float(residual.sum()) == pytest.approx((1 - beta) ** n, abs=1e-12)


def test_expected_acceptance_without_replacement_is_drawn_without_bias() -> None:
    """In vocabularies where the rejected drafts can't be summed over, RRSw's rate is that of many verifications."""
    generator = torch.Generator().manual_seed(7)
    p, q = ((2 * torch.randn(1, 1500, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(2))
    count = 4000
    rows_p, rows_q = p.expand(count, -1), q.expand(count, -1)
    drafts = draft(rows_q, 4, "without", generator)
    law = output_law(rows_p, rows_q, drafts, "rrsw")
    measured = torch.zeros_like(law).scatter_(1, drafts, 1.0).mul(law).sum(1)
    found = acceptance(p.expand(30, -1), q.expand(30, -1), 4, "rrsw", generator=generator)
    error = float(measured.std()) / count**0.5 + float(found.std()) / 30**0.5
    assert abs(float(measured.mean()) - float(found.mean())) < 4 * error


def test_top_is_ranked_by_the_draft_s_logits_where_the_law_has_too_few_tokens() -> None:
    q = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]])
    ranking = torch.tensor([[3.0, 5.0, 1.0, 4.0, 2.0]])
    assert draft(q, 3, "greedy", ranking=ranking).tolist() == [[1, 3, 0]]
    p = torch.tensor([[0.2, 0.1, 0.3, 0.4, 0.0]])
    assert float(acceptance(p, q, 3, ranking=ranking)) == pytest.approx(0.7, abs=1e-6)
    law = output_law(p, q, torch.tensor([[1, 3, 0]]))
    assert torch.allclose(law[0], p[0].double() / p.double().sum(), atol=1e-12)


# --- the recommendation ------------------------------------------------------------------------------------------


def test_a_chain_is_expected_to_give_the_geometric_sum() -> None:
    plans = recommend({"single": [0.7]}, {1: 10.0}, {1: 1.0}, depths=range(1, 6))
    for plan in plans:
        if plan.n_drafts:
            tokens = sum(0.7**k for k in range(plan.depth + 1))
            assert plan.tokens_per_call == pytest.approx(tokens)
            assert plan.ms_per_token == pytest.approx((10 + plan.depth) / tokens)
    assert plans[0].n_drafts == 1 and plans[0].speedup == max(plan.speedup for plan in plans)


def test_a_tree_is_expected_to_give_what_its_drafts_are_kept_with() -> None:
    plans = recommend({"greedy": [0.5, 0.8]}, {1: 10.0, 64: 10.0}, {1: 1.0}, depths=[2])
    (tree,) = (plan for plan in plans if plan.n_drafts == 2)
    assert tree.tokens_per_call == pytest.approx(1 + 0.8 + 0.8**2)
    assert tree.line == (
        "model.generate(**inputs, custom_generate=MultiDraft(draft_model, n_drafts=2, depth=2, verifier='greedy'))"
    )


def test_nothing_is_recommended_where_it_does_not_pay() -> None:
    plans = recommend({"greedy": [0.1, 0.15]}, {1: 10.0, 65: 600.0}, {1: 8.0})
    assert plans[0].n_drafts == 0 and plans[0].line == "model.generate(**inputs)"


# --- bad input ---------------------------------------------------------------------------------------------------


UNIFORM = torch.full((1, 4), 0.25)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: optimal_acceptance(UNIFORM * 1.01, UNIFORM, 2), "p=.*sum to 1"),
        (lambda: optimal_acceptance(UNIFORM, UNIFORM * float("nan"), 2), "q=.*free of NaN"),
        (lambda: optimal_acceptance(torch.tensor([[1.5, -0.5]]), torch.tensor([[0.5, 0.5]]), 2), "p=.*at least 0"),
        (lambda: optimal_acceptance(UNIFORM, torch.full((1, 5), 0.2), 2), "q=.*same vocabulary"),
        (lambda: optimal_acceptance(UNIFORM[0], UNIFORM[0], 2), r"p=.*\(B, V\)"),
        (lambda: optimal_acceptance(UNIFORM, UNIFORM, 0), "n=0.*from 1 to 64"),
        (lambda: optimal_acceptance(UNIFORM, UNIFORM, True), "n=True"),
        (lambda: optimal_acceptance(UNIFORM, UNIFORM, 5), "n=5.*at most the vocabulary"),
        (lambda: optimal_acceptance(UNIFORM, UNIFORM, 2, "wiht"), "did you mean 'with'"),
        (lambda: acceptance(UNIFORM, UNIFORM, 3, "spechub"), "n=3.*2 for SpecHub"),
        (lambda: acceptance(UNIFORM, UNIFORM, 3, "rrsv"), "did you mean"),
        (lambda: draft(UNIFORM, 3, "spechub"), "n=3.*2 for SpecHub"),
        (lambda: verify(UNIFORM, UNIFORM, torch.tensor([[0.5]])), "drafts=.*token ids"),
        (lambda: verify(UNIFORM, UNIFORM, torch.tensor([[0], [1]])), "drafts=.*a row for each"),
        (lambda: verify(UNIFORM, UNIFORM, torch.tensor([[7]])), "drafts=.*'greedy' draws"),
        (lambda: verify(UNIFORM, torch.tensor([[0.5, 0.5, 0, 0]]), torch.tensor([[2]]), "rrs"), "'with' draws from q"),
        (lambda: verify(UNIFORM, UNIFORM, torch.tensor([[0]]), "rrs", sampler="without"), "sampler of rrs"),
        (
            lambda: verify(torch.full((1, 16), 1 / 16), torch.full((1, 16), 1 / 16), torch.tensor([[0]]), "ot-lp"),
            "at most 10 tokens",
        ),
        (lambda: recommend({"greedy": [0.5]}, {2: 1.0}, {1: 1.0}), "target_ms=.*1 among them"),
        (lambda: recommend({"greedy": [1.5]}, {1: 1.0}, {1: 1.0}), "rates=.*from 0 to 1"),
    ],
)
def test_bad_input_is_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call()
