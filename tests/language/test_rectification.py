"""Rectification against enumeration, linear systems, convex optimisation, and on transformers' own models."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TrainingArguments,
)

from steersman.errors import InputError
from steersman.language.momentum_decoding import MomentumDecoding
from steersman.language.rectification import (
    DeadEndTrainer,
    QModel,
    Rectification,
    apply,
    applying,
    calibration,
    exact_projection,
    official_projection,
    sarsa_loss,
    sarsa_targets,
)
from steersman.language.rectification.q_model import QOutput
from steersman.language.rectification.training import collate
from steersman.language.rectification.trajectories import Trajectory, cut_prompts, recorded, selected
from steersman.reference import loading, reviews

from .conftest import EOS, PAD, VOCABULARY, generate, left_padded, tiny
from .tabular import random_law, tabular

V, T = 4, 4
States = dict[tuple[int, ...], np.ndarray]


# ------------------------------------------------------------------ a tree of all texts


def random_tree(seed: int, share: float = 0.3, eighths: bool = False) -> tuple[States, dict[tuple[int, ...], bool]]:
    """A random law of the next token behind every beginning, and which of the V^T whole texts are bad."""
    rng = np.random.default_rng(seed)
    law: States = {}
    for t in range(T):
        for state in itertools.product(range(V), repeat=t):
            law[state] = 1.0 + rng.multinomial(4, [0.25] * V) if eighths else rng.dirichlet(np.ones(V))
            law[state] = law[state] / law[state].sum()
    return law, {text: bool(rng.random() < share) for text in itertools.product(range(V), repeat=T)}


def risks(law: States, bad: dict[tuple[int, ...], bool]) -> States:
    """P(bad | s, a) by enumeration, last states first."""
    found: States = {}
    for state in sorted(law, key=len, reverse=True):
        if len(state) == T - 1:
            found[state] = np.array([float(bad[(*state, a)]) for a in range(V)])
        else:
            found[state] = np.array([law[(*state, a)] @ found[(*state, a)] for a in range(V)])
    return found


def callable_risk(risk: States) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: torch.tensor(np.array([risk[tuple(row[1:])] for row in ids.tolist()]))


def steered_tree(law: States, processor: Any) -> States:
    """The law behind every beginning, as the processor changes it; texts stand behind a token 0."""
    found: States = {}
    for t in range(T):
        states = [s for s in law if len(s) == t]
        scores = torch.tensor(np.log(np.array([law[s] for s in states])), dtype=torch.float32)
        out = processor(torch.tensor([[0, *s] for s in states]), scores).double().exp().numpy()
        found |= dict(zip(states, out, strict=True))
    return found


def p_bad(law: States, bad: dict[tuple[int, ...], bool]) -> float:
    return math.fsum(math.prod(law[text[:t]][text[t]] for t in range(T)) for text, is_bad in bad.items() if is_bad)


# ------------------------------------------------------------------ exact checks: the value function


class Table(nn.Module):
    """Q by look-up of the beginning, with a target table; a stand-in for a QModel."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * V**T, V, dtype=torch.float64))
        self.slow = torch.zeros(2 * V**T, V, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any, actions: torch.Tensor) -> QOutput:
        code, codes = torch.ones(len(input_ids), dtype=torch.long), []
        for t in range(input_ids.shape[1]):  # the first column is the start
            code = code if t == 0 else code * V + input_ids[:, t]
            codes.append(code.clamp(max=len(self.table) - 1))
        place = torch.stack(codes, 1)
        return QOutput(values=self.table[place, actions], target_values=self.slow[place, actions])


def test_sarsa_with_a_table_converges_to_enumeration() -> None:
    """Each text as often as the law says, exactly; all of them at every step."""
    law, bad = random_tree(0, eighths=True)
    risk = risks(law, bad)
    counts = {text: round(math.prod(8 * law[text[:t]][text[t]] for t in range(T))) for text in bad}
    assert sum(counts.values()) == 8**T and min(counts.values()) >= 1
    texts = [text for text in bad for _ in range(counts[text])]
    ids = torch.tensor([[0, *text] for text in texts])
    mask, reward = torch.ones_like(ids), torch.tensor([-float(bad[text]) for text in texts])
    table = Table()
    optimizer = torch.optim.Adam(table.parameters(), lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        sarsa_loss(table, ids, mask, reward).backward()
        optimizer.step()
        table.slow.lerp_(table.table.detach(), 0.1)
    for state, expected in risk.items():
        code = 1
        for token in state:
            code = code * V + token
        assert np.abs(-table.table[code].detach().numpy() - expected).max() < 0.02, state


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.0), (0.9, 0.0), (1.0, 0.7), (0.9, 1.0)])
def test_fixed_point_of_the_targets_is_enumeration(gamma: float, lam: float) -> None:
    """Q = R + γ P Q as one linear system, and the expected targets at its solution are the solution."""
    law, bad = random_tree(1)
    pairs = [(state, a) for state in law for a in range(V)]
    index = {(*state, a): i for i, (state, a) in enumerate(pairs)}
    matrix, right = np.eye(len(pairs)), np.zeros(len(pairs))
    for i, (state, a) in enumerate(pairs):
        after = (*state, a)
        if len(after) == T:
            right[i] = -float(bad[after])
        else:
            for b in range(V):
                matrix[i, index[(*after, b)]] -= gamma * law[after][b]
    Q = np.linalg.solve(matrix, right)
    risk = risks(law, bad)
    for i, (state, a) in enumerate(pairs):
        assert abs(Q[i] + gamma ** (T - 1 - len(state)) * risk[state][a]) < 1e-10

    texts = list(bad)
    taken = torch.tensor([[Q[index[text[: t + 1]]] for t in range(T)] for text in texts])
    reward = torch.tensor([-float(bad[text]) for text in texts], dtype=torch.float64)
    target = sarsa_targets(taken, torch.ones(len(texts), T, dtype=torch.bool), reward, gamma, lam).numpy()
    weights = np.array([math.prod(law[text[:t]][text[t]] for t in range(T)) for text in texts])
    for t in range(T):
        for first in itertools.product(range(V), repeat=t + 1):
            rows = [i for i, text in enumerate(texts) if text[: t + 1] == first]
            mean = weights[rows] @ target[rows, t] / weights[rows].sum()
            assert abs(mean - Q[index[first]]) < 1e-10


def test_the_best_policy_s_values_would_see_no_risk() -> None:
    """With the maximum over next tokens in the target, Q is 0 wherever one good text is left."""
    law, bad = random_tree(2)
    best = risks({state: np.eye(V)[0] for state in law}, bad)
    for state in sorted(law, key=len, reverse=True):
        if len(state) < T - 1:
            best[state] = np.array([best[(*state, a)].min() for a in range(V)])
    assert best[()].max() == 0.0 and risks(law, bad)[()].min() > 0.1


# ------------------------------------------------------------------ exact checks: decoding


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_security_condition(seed: int, eps: float) -> None:
    law, bad = random_tree(seed)
    risk = risks(law, bad)
    steered = steered_tree(law, Rectification(callable_risk(risk), eps))
    held = 0
    for state, after in steered.items():
        cap = (1 - risk[state] - eps).clip(1e-7, 1)
        assert abs(after.sum() - 1) < 1e-6
        if cap.sum() >= 1:
            assert (after <= cap + 1e-6).all()
            held += 1
    assert held > 40


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("projection", ["exact", "official", "block", "bayes"])
def test_no_risk_changes_nothing(kind: str, projection: Any) -> None:
    scores = tiny(kind)(torch.randint(2, VOCABULARY, (5, 7))).logits[:, -1].detach()
    steer = Rectification(lambda ids: torch.zeros(len(ids), VOCABULARY), 0.0, projection)
    out = steer(torch.zeros(5, 7, dtype=torch.long), scores)
    assert (out.softmax(-1) - scores.softmax(-1)).abs().max() < 1e-7


@pytest.mark.parametrize("projection", ["exact", "official", "block", "bayes"])
def test_certain_risk_is_cut(projection: Any) -> None:
    risk = torch.zeros(3, 9)
    risk[:, 4] = 1
    scores = torch.randn(3, 9)
    scores[1, 4] = 20.0  # the model is all but sure of it
    # Two passes leave more than the cap: the published code's law is renormalised behind them.
    steer = Rectification(lambda ids: risk, 0.0, projection, n_iter=60)
    p = steer(torch.zeros(3, 2, dtype=torch.long), scores).double().softmax(-1)
    assert (p[:, 4] <= 1e-7 * (1 + 1e-5)).all()


laws = st.integers(2, 20).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 1), min_size=n, max_size=n).filter(lambda p: sum(p) > 1e-3),
        st.lists(st.floats(1e-7, 1), min_size=n, max_size=n),
    )
)


@settings(max_examples=300, deadline=None)
@given(laws)
def test_water_filling_is_optimal(problem: tuple[list[float], list[float]]) -> None:
    """Sum, caps and the Karush-Kuhn-Tucker conditions, tokens of probability 0 among them."""
    p, cap = (torch.tensor(x, dtype=torch.float64) for x in problem)
    p = p / p.sum()
    log_p, lift, infeasible = exact_projection(p.log()[None], cap[None])
    q, support = log_p[0].exp(), p > 0
    assert abs(float(q.sum()) - 1) < 1e-9 and (q[~support] == 0).all()
    if float(cap[support].sum()) < 1:
        assert bool(infeasible[0]) and torch.allclose(q[support], cap[support] / cap[support].sum(), atol=1e-12)
        return
    assert (q <= cap + 1e-9).all()
    free = support & (q < cap * (1 - 1e-6))
    if free.any():
        ratio = log_p[0] - p.log()
        c = float(ratio[free].max())
        assert c - float(ratio[free].min()) < 1e-6 and c >= -1e-9
        assert (ratio[support & ~free] <= c + 1e-6).all()  # the capped ones would be higher
        assert math.log(float(lift[0])) == pytest.approx(c, abs=1e-6) or c > 709


@pytest.mark.parametrize("seed", range(12))
def test_water_filling_against_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 21))
    p, cap = rng.dirichlet(np.ones(n)), rng.uniform(0.02, 1, n)
    cap *= max(1.0, 1.2 / cap.sum())
    cap = cap.clip(0, 1)

    def divergence(q: np.ndarray) -> float:
        return float((q * np.log(q / p)).sum())

    q = exact_projection(torch.tensor(np.log(p))[None], torch.tensor(cap)[None]).log_p[0].exp().numpy()
    found = optimize.minimize(
        divergence,
        np.minimum(cap, 1 / n) * 0.9 + 1e-6,
        jac=lambda q: np.log(q / p) + 1,
        bounds=[(1e-12, float(c)) for c in cap],
        constraints=[{"type": "eq", "fun": lambda q: q.sum() - 1, "jac": np.ones_like}],
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert found.success and abs(found.x.sum() - 1) < 1e-9
    assert divergence(q) <= divergence(found.x) + 1e-9
    assert np.abs(q - found.x).max() < 1e-4


def test_published_passes_reach_the_projection_on_mild_problems_only() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch._sample_dirichlet(torch.full((500, 10), 2.0, dtype=torch.float64), generator)
    cap = 0.2 + 0.8 * torch.rand(500, 10, dtype=torch.float64, generator=generator)
    exact = exact_projection(p.log(), cap).log_p.exp()
    assert (official_projection(p.log(), cap, 500).exp() - exact).abs().max() < 1e-6
    hard = torch._sample_dirichlet(torch.full((1000, 6), 0.3, dtype=torch.float64), generator).clamp(min=1e-12)
    caps = torch.where(torch.rand(1000, 6, generator=generator) < 0.5, 1e-3, torch.rand(1000, 6, generator=generator))
    exact = exact_projection(hard.log(), caps)
    held = ~exact.infeasible
    gaps = {n: (official_projection(hard.log(), caps, n).exp() - caps)[held].max().item() for n in (2, 50, 500)}
    assert gaps[2] > 0.5 and gaps[50] > 0.05 and gaps[500] > 1e-3
    assert (exact.log_p.exp() - caps)[held].max() < 1e-12


def test_two_passes_by_hand() -> None:
    z = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cap = torch.rand(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).clamp(min=1e-7)
    by_hand = z.clone()
    for _ in range(2):
        threshold = cap.log() + by_hand.exp().sum(-1, keepdim=True).log()
        by_hand = torch.where(by_hand > threshold, threshold, by_hand)
    expected = by_hand.softmax(-1)
    assert (official_projection(z, cap).exp() - expected).abs().max() < 1e-12
    steer = Rectification(lambda ids: 1 - cap, 0.0, "official")
    out = steer(torch.zeros(20, 3, dtype=torch.long), z.float()).double().exp()
    assert (out - expected).abs().max() < 1e-5


def test_the_last_token_decides() -> None:
    """Its risk is 0 or 1, so bad ones keep p_min."""
    law, bad = random_tree(3)
    risk = risks(law, bad)
    steered = steered_tree(law, Rectification(callable_risk(risk)))
    for state in law:
        if len(state) == T - 1 and 0 < risk[state].sum() < V:
            assert steered[state] @ risk[state] <= V * 1e-7


@pytest.mark.parametrize("seed", range(4))
def test_exact_values_at_every_step_leave_nothing_bad(seed: int) -> None:
    law, bad = random_tree(seed)
    assert risks(law, bad)[()].max() < 1
    before = p_bad(law, bad)
    after = p_bad(steered_tree(law, Rectification(callable_risk(risks(law, bad)))), bad)
    assert before > 0.15 and after <= T * V * 1e-6


def test_bayes_is_the_law_given_a_good_end() -> None:
    law, bad = random_tree(4)
    steered = steered_tree(law, Rectification(callable_risk(risks(law, bad)), projection="bayes"))
    whole = {text: math.prod(law[text[:t]][text[t]] for t in range(T)) * (not bad[text]) for text in bad}
    good = sum(whole.values())
    for text, p in whole.items():
        assert math.prod(steered[text[:t]][text[t]] for t in range(T)) == pytest.approx(p / good, abs=1e-6)


def test_a_step_s_mean_risk_can_rise() -> None:
    """The caps bound each token; they don't order tokens. Both means are recorded."""
    risk = torch.tensor([[0.1, 0.5]])
    steer = Rectification(lambda ids: risk)
    p = steer(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[0.95, 0.05]]).log()).exp()
    assert torch.allclose(p, torch.tensor([[0.9, 0.1]]), atol=1e-6)
    assert steer.record.base_risk == pytest.approx(0.12) and steer.record.risk == pytest.approx(0.14)
    assert steer.record.lift == pytest.approx(2.0) and steer.record.steps == 1


def test_block_removes_what_is_above_the_threshold() -> None:
    risk = torch.tensor([[0.2, 0.6, 0.4, 1.0]])
    p = torch.tensor([[0.1, 0.5, 0.3, 0.1]])
    ids = torch.zeros(1, 1, dtype=torch.long)
    out = Rectification(lambda ids: risk, projection="block", threshold=0.5)(ids, p.log()).exp()
    assert torch.allclose(out, torch.tensor([[0.25, 0.0, 0.75, 0.0]]), atol=1e-6)
    steer = Rectification(lambda ids: risk, projection="block", threshold=0.1)
    assert (
        torch.allclose(steer(ids, p.log()).exp(), torch.tensor([[1.0, 0, 0, 0]])) and steer.record.infeasible_steps == 1
    )


def test_infeasible_steps_are_counted() -> None:
    """Σ cap over the tokens that have mass: those that top-k left out don't count."""
    risk = torch.tensor([[0.7, 0.6, 0.0, 0.0]])
    steer = Rectification(lambda ids: risk, top_k=2)
    p = steer(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()).exp()
    assert torch.allclose(p, torch.tensor([[3 / 7, 4 / 7, 0, 0]]), atol=1e-6)
    assert steer.record.infeasible_steps == 1
    free = Rectification(lambda ids: risk)
    free(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log())
    assert free.record.infeasible_steps == 0
    free.record.clear()
    assert free.record.steps == 0


def test_eps_lowers_every_cap() -> None:
    scores = torch.tensor([[8.0, 0.0, 0.0]])
    out = Rectification(lambda ids: torch.zeros(1, 3), 0.3)(torch.zeros(1, 1, dtype=torch.long), scores).exp()
    assert torch.allclose(out, torch.tensor([[0.7, 0.15, 0.15]]), atol=1e-6)


def test_temperature_top_k_and_top_p_come_first() -> None:
    """The support is what the warpers left, and the caps hold at the end."""
    generator = torch.Generator().manual_seed(5)
    scores = 3 * torch.randn(40, 12, generator=generator)
    risk = torch.rand(40, 12, generator=generator)
    ids = torch.zeros(40, 2, dtype=torch.long)
    steer = Rectification(lambda ids: risk, temperature=0.7, top_k=6, top_p=0.9)
    out = steer(ids, scores).double().exp()
    warped = scores
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(6), TopPLogitsWarper(0.9)):
        warped = warper(ids, warped)
    p = warped.double().softmax(-1)
    cap = (1 - risk.double()).clamp(min=1e-7)
    total = cap.masked_fill(p == 0, 0).sum(-1)
    assert torch.allclose(out.sum(-1), torch.ones(40, dtype=torch.float64), atol=1e-5)
    assert (out[p == 0] == 0).all()
    assert (out <= cap + 1e-6)[total >= 1].all() and (total >= 1).sum() > 5


# ------------------------------------------------------------------ exact checks: training


def q_of(kind: str, seed: int = 0, **config: Any) -> QModel:
    """A value model with random values in and around [-1, 0]."""
    model = QModel.from_trunk(tiny(kind, seed), **config)
    torch.manual_seed(seed + 1)
    nn.init.normal_(model.head[-1].weight, std=0.08)
    nn.init.constant_(model.head[-1].bias, -0.3)
    return model


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def q_model(request: pytest.FixtureRequest) -> QModel:
    return q_of(request.param)


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, EOS], "reward": -1.0, "prompt_length": 2},
    {"input_ids": [3, EOS, 4], "reward": 0.0, "prompt_length": 1},
    {"input_ids": [9, 8, 7, 6], "reward": -0.5, "prompt_length": 3},
]


def loss_of(model: QModel, batch: dict[str, torch.Tensor], prompt: bool) -> float:
    length = None if prompt else batch["prompt_length"]
    return sarsa_loss(model, batch["input_ids"], batch["attention_mask"], batch["reward"], length, 0.9).item()


@pytest.mark.parametrize("prompt", [True, False])
def test_padding_and_its_content_change_no_loss(q_model: QModel, prompt: bool) -> None:
    """Against a loop over rows; ends inside a text are text, though they are the padding id."""
    model = copy.deepcopy(q_model)
    model.begin_target()
    model.follow(0.3)
    expected, count = 0.0, 0
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            Q = model(ids).logits[0]
        first = 1 if prompt else int(row["prompt_length"])
        for t in range(first, ids.shape[1]):
            last = t == ids.shape[1] - 1
            target = float(row["reward"]) if last else min(0.0, max(-1.0, 0.9 * float(Q[t, ids[0, t + 1]])))
            expected += (float(Q[t - 1, ids[0, t]]) - target) ** 2
            count += 1
    for side, filling in itertools.product(("left", "right"), (PAD, EOS, 7)):
        batch = collate(ROWS, filling, side)
        assert loss_of(model, batch, prompt) == pytest.approx(expected / count, abs=1e-6)
    batch = collate(ROWS, PAD, "left")
    reference = loss_of(model, batch, prompt)
    batch["input_ids"][batch["attention_mask"] == 0] = 33
    assert loss_of(model, batch, prompt) == pytest.approx(reference, abs=1e-7)
    batch["input_ids"][batch["attention_mask"] == 0] = -100
    assert loss_of(model, batch, prompt) == pytest.approx(reference, abs=1e-7)
    assert loss_of(model, batch, not prompt) != pytest.approx(reference, abs=1e-4)


def test_reward_lands_on_the_last_real_token() -> None:
    values = torch.tensor([[-0.2, -0.4, -0.6, 5.0], [9.0, -0.5, -0.1, -0.3]])
    counted = torch.tensor([[True, True, True, False], [False, True, True, True]])
    found = sarsa_targets(values, counted, torch.tensor([-1.0, -0.25]), 0.5)
    assert torch.allclose(found[0, :3], torch.tensor([-0.2, -0.3, -1.0]))
    assert torch.allclose(found[1, 1:], torch.tensor([-0.05, -0.15, -0.25]))
    reached = sarsa_targets(values, counted, torch.tensor([-1.0, -0.25]), 0.5, 1.0)
    assert torch.allclose(reached[0, :3], torch.tensor([-0.25, -0.5, -1.0]))
    clipped = sarsa_targets(torch.tensor([[0.0, -3.0, 0.7, 0.0]]), torch.ones(1, 4, dtype=torch.bool), torch.zeros(1))
    assert clipped.tolist() == [[-1.0, 0.0, 0.0, 0.0]]


def test_values_of_actions_are_the_logits(q_model: QModel) -> None:
    ids = torch.randint(2, VOCABULARY, (3, 8))
    actions = torch.randint(0, VOCABULARY, (3, 8))
    with torch.no_grad():
        whole, taken = q_model(ids).logits, q_model(ids, actions=actions).values
        last = q_model(ids, logits_to_keep=1).logits
    assert torch.allclose(whole.gather(2, actions[..., None]).squeeze(2), taken, atol=1e-5)
    assert torch.allclose(whole[:, -1:], last, atol=1e-6)


def arguments(tmp_path: Path, **given: Any) -> TrainingArguments:
    options = {"max_steps": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 3, "weight_decay": 0.0}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(output_dir=str(tmp_path), **(options | given))


def test_target_head_follows_after_every_optimizer_step(tmp_path: Path) -> None:
    model = q_of("gpt2")
    start = [p.detach().clone() for p in model.head.parameters()]
    slow, steps = [p.clone() for p in start], []

    class Watched(DeadEndTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if steps:  # what the last step left
                fast = [p.detach().clone() for p in model.head.parameters()]
                if any(not torch.equal(a, b) for a, b in zip(fast, steps[-1], strict=True)):
                    for s, f in zip(slow, fast, strict=True):
                        s.mul_(0.75).add_(0.25 * f)
                    steps.append(fast)
                    for mine, theirs in zip(slow, model.target_head.parameters(), strict=True):  # type: ignore[union-attr]
                        assert torch.allclose(mine, theirs, atol=1e-6)
            else:
                steps.append(start)
            return super().training_step(*args, **kwargs)

    options = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=6, per_device_train_batch_size=1)
    Watched(model, options, tau=0.25, train_dataset=ROWS * 4).train()
    assert len(steps) == 6  # five updates were seen, of two batches each
    assert all(not p.requires_grad for p in model.target_head.parameters())  # type: ignore[union-attr]


def test_trainer_learns_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    rows = [{"input_ids": [3, a, b], "reward": -float(b == 7)} for a in range(4, 10) for b in (7, 8)]
    model = q_of("llama")
    trainer = DeadEndTrainer(model, arguments(tmp_path / "a", max_steps=120), train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.25 * before
    with torch.no_grad():
        Q = model(torch.tensor([[3, 5]])).logits[0]
    assert float(Q[1, 7]) < -0.9 and float(Q[1, 8]) > -0.1  # the last token decides
    assert -0.75 < float(Q[0, 5]) < -0.25  # and one in two is bad behind 5

    shared = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "seed": 3}
    whole = DeadEndTrainer(q_of("gpt2"), arguments(tmp_path / "b", **shared), train_dataset=rows)
    whole.train()
    again = DeadEndTrainer(q_of("gpt2", 5), arguments(tmp_path / "b", **shared), train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, again.model.state_dict()[name], atol=1e-6), name


# ------------------------------------------------------------------ exact checks: the cached value model


@pytest.mark.parametrize("projection", ["exact", "official", "block", "bayes"])
def test_cached_values_are_the_uncached_ones(q_model: QModel, projection: Any) -> None:
    """Prefixes grow, swap rows, end and begin anew; the caps are those of a full forward."""
    generator = torch.Generator().manual_seed(2)
    used = Rectification(q_model, 0.1, projection)
    ids = torch.randint(2, VOCABULARY, (4, 3), generator=generator)
    for move in ("grow", "grow", "swap", "grow", "cut", "other", "grow"):
        if move == "grow":
            ids = torch.cat([ids, torch.randint(2, VOCABULARY, (len(ids), 1), generator=generator)], 1)
        elif move == "swap":
            ids = ids[torch.tensor([2, 2, 0, 1])]
        elif move == "cut":
            ids = ids[:3, :-2]
        else:
            ids = torch.randint(2, VOCABULARY, (2, 5), generator=generator)
        with torch.no_grad():
            whole = -q_model(ids).logits[:, -1].clamp(-1, 0)
        assert (used.risk(ids) - whole).abs().max() < 1e-5
        scores = torch.randn(len(ids), VOCABULARY, generator=generator)
        fresh = Rectification(q_model, 0.1, projection)(ids, scores)
        assert torch.allclose(used(ids, scores).exp(), fresh.exp(), atol=1e-5)


def test_left_padding_is_single_runs(q_model: QModel) -> None:
    rows = [torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([4, PAD, 9]), torch.tensor([11])]
    ids, _ = left_padded(rows)
    together = Rectification(q_model, pad_token_id=PAD, prompt_length=6).risk(ids)
    for i, row in enumerate(rows):
        assert torch.allclose(together[i], Rectification(q_model).risk(row[None])[0], atol=1e-5)


# ------------------------------------------------------------------ transformers


SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


def test_a_batch_with_left_padding_is_its_rows(model: Any, q_model: QModel) -> None:
    rows = [torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5, 2)]
    ids, mask = left_padded(rows)
    options = {"eos_token_id": None, "new_tokens": 15}
    steer = Rectification(q_model, 0.1, pad_token_id=PAD, prompt_length=ids.shape[1], sample=False)
    together = generate(model, ids, attention_mask=mask, logits_processor=[steer], **options)
    for i, row in enumerate(rows):
        alone = generate(model, row[None], logits_processor=[Rectification(q_model, 0.1)], **options)
        assert together[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


def test_beams_are_those_of_a_stateless_processor(model: Any, q_model: QModel, prompts: torch.Tensor) -> None:
    def stateless(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return Rectification(q_model, 0.05)(ids, scores)

    options = {"num_beams": 3, "num_return_sequences": 2}
    ours = generate(model, prompts, 15, logits_processor=[Rectification(q_model, 0.05)], **options)
    assert torch.equal(ours, generate(model, prompts, 15, logits_processor=[stateless], **options))
    assert not torch.equal(ours, generate(model, prompts, 15, **options))


def test_samples_have_the_rectified_law() -> None:
    """Chi-square of two drawn tokens against the product of the rectified laws."""
    law = random_law(V, seed=3)
    model = tabular(law)
    rng = np.random.default_rng(0)
    table = torch.tensor(rng.uniform(0, 0.9, (V, V)))
    risk = lambda ids: table[ids[:, -1]]  # noqa: E731
    count = 6000
    torch.manual_seed(0)
    out = model.generate(
        torch.zeros(count, 1, dtype=torch.long),
        attention_mask=torch.ones(count, 1, dtype=torch.long),
        max_new_tokens=2,
        logits_processor=[Rectification(risk, 0.05)],
        **SAMPLING,
    )
    p = exact_projection(law, (1 - table - 0.05).clamp(1e-7, 1)).log_p.exp().numpy()
    expected = p[0][:, None] * p
    seen = np.zeros((V, V))
    for a, b in out[:, 1:].tolist():
        seen[a, b] += 1
    keep = expected > 1e-4
    statistic = ((seen - count * expected) ** 2 / (count * expected))[keep].sum()
    assert statistic < 45  # chi-square with 15 degrees of freedom: 45 is beyond 0.9999
    plain = law.softmax(-1).numpy()
    assert (((seen - count * plain[0][:, None] * plain) ** 2) / (count * plain[0][:, None] * plain)).sum() > 200


def test_returned_sequences_and_seeds(model: Any, q_model: QModel, prompts: torch.Tensor) -> None:
    options = {"num_return_sequences": 4, "logits_processor": [Rectification(q_model, 0.1)], **SAMPLING}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(model, prompts, 12, **options))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert runs[0].shape == (12, 21)


def test_rows_that_ended_are_not_recorded(q_model: QModel) -> None:
    steer = Rectification(q_model, prompt_length=2)
    scores = torch.randn(2, VOCABULARY)
    steer(torch.tensor([[5, 6], [5, EOS]]), scores)
    assert steer.record.steps == 2  # a prompt may end so
    steer(torch.tensor([[5, 6, 7], [5, EOS, EOS]]), scores)
    steer(torch.tensor([[5, 6, 7, 8], [5, EOS, EOS, PAD]]), scores)
    assert steer.record.steps == 4
    first = Rectification(q_model)
    first(torch.tensor([[5, 6], [5, EOS]]), scores)
    assert steer.record.prompt_risk == pytest.approx(first.record.base_risk, abs=1e-6)
    assert set(steer.figures()) == {"base_risk", "risk", "lift", "infeasible", "prompt_risk"}


def test_figures_begin_anew_and_each_text_has_its_prompt(q_model: QModel) -> None:
    steer, scores = Rectification(q_model), torch.randn(2, VOCABULARY)

    def text(*first: int) -> float:
        """Writes two tokens behind a prompt; the risk behind the prompt alone."""
        ids = torch.tensor([first, first])
        for _ in range(3):
            steer(ids, scores)
            ids = torch.cat([ids, ids[:, -1:] + 1], 1)
        alone = Rectification(q_model)
        alone(torch.tensor([first, first]), scores)
        return alone.record.base_risk

    one, two = text(5, 6), text(9, 8, 7)  # the second is no continuation of the first, though it is longer
    assert steer.record.steps == 12 and one != pytest.approx(two, abs=1e-5)
    assert steer.figures()["prompt_risk"] == pytest.approx((one + two) / 2, abs=1e-6)
    assert steer.record.steps == 0 and steer.figures()["risk"] == 0.0
    again = text(5, 6)
    assert steer.figures()["prompt_risk"] == pytest.approx(again, abs=1e-6)


def test_a_half_precision_base_has_a_trunk_like_the_head(tmp_path: Path) -> None:
    base = tiny("llama").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    for source in (base, tmp_path / "base"):
        model = QModel.from_trunk(source)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model(torch.tensor([[5, 6]])).logits.dtype == torch.float32
        model.save_pretrained(tmp_path / "value")
        again = QModel.from_pretrained(tmp_path / "value")
        assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_save_and_load(q_model: QModel, tmp_path: Path) -> None:
    model = copy.deepcopy(q_model)
    model.begin_target()
    model.save_pretrained(tmp_path / "training")
    model.end_target()
    model.save_pretrained(tmp_path / "done")
    ids, scores = torch.randint(2, VOCABULARY, (2, 6)), torch.randn(2, VOCABULARY)
    expected = Rectification(q_model, 0.2)(ids, scores)
    for folder in ("training", "done"):
        assert torch.equal(Rectification.from_pretrained(tmp_path / folder, eps=0.2)(ids, scores), expected)
    for twin in (pickle.loads(pickle.dumps(Rectification(q_model, 0.2))), copy.deepcopy(Rectification(q_model, 0.2))):
        assert torch.equal(twin(ids, scores), expected)


def test_a_trunk_with_fewer_layers(tmp_path: Path) -> None:
    for kind in ("gpt2", "llama"):
        model = QModel.from_trunk(tiny(kind), layers=1)
        assert model.config.text_config.num_hidden_layers == 1
        model.save_pretrained(tmp_path / kind)
        ids = torch.randint(2, VOCABULARY, (2, 5))
        again = QModel.from_pretrained(tmp_path / kind)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, again.eval()(ids).logits) and (model(ids).logits == 0).all()


def test_with_other_processors(model: Any, q_model: QModel, prompts: torch.Tensor) -> None:
    """Forbidden tokens stay forbidden, and a token that rectification cut is not what momentum decoding takes."""
    steered = generate(model, prompts, 20, no_repeat_ngram_size=2, logits_processor=[Rectification(q_model, 0.1)])
    for row in steered.tolist():
        text = row[: row.index(EOS)] if EOS in row else row
        grams = list(itertools.pairwise(text))
        assert len(grams) == len(set(grams))
    risk = torch.zeros(1, VOCABULARY)
    risk[:, ::2] = 1
    both = [Rectification(lambda ids: risk.expand(len(ids), -1)), MomentumDecoding(0.3, pad_token_id=PAD)]
    out = generate(model, prompts, 20, logits_processor=both, eos_token_id=None)[:, prompts.shape[1] :]
    assert (out % 2 == 1).all()


def test_in_transformers_assisted_generation(model: Any, q_model: QModel, prompts: torch.Tensor) -> None:
    """Drafts are checked against the rectified law: greedy text is the same token for token."""
    draft = tiny("gpt2", 9)
    plain = generate(model, prompts[:1], 20, logits_processor=[Rectification(q_model, 0.1)])
    assisted = generate(model, prompts[:1], 20, logits_processor=[Rectification(q_model, 0.1)], assistant_model=draft)
    assert torch.equal(plain, assisted)


def test_padding_rows_of_the_value_model_are_cut(q_model: QModel) -> None:
    wide = QModel.from_trunk(tiny("gpt2", vocab_size=48))
    out = Rectification(wide)(torch.randint(2, VOCABULARY, (2, 4)), torch.randn(2, VOCABULARY))
    assert out.shape == (2, VOCABULARY)
    with pytest.raises(InputError, match=r"value_model=.*same vocabulary"):
        Rectification(wide)(torch.randint(2, VOCABULARY, (2, 4)), torch.randn(2, 49))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": 1.0}, "eps=1.0"),
        ({"eps": True}, "eps=True"),
        ({"projection": "exakt"}, "did you mean 'exact'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"n_iter": 0}, "n_iter=0"),
        ({"p_min": 0.0}, "p_min=0.0"),
        ({"value_model": 3}, "value_model='int'"),
    ],
)
def test_bad_arguments_are_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Rectification(**({"value_model": lambda ids: ids} | given_))


def test_bad_scores_and_risks_are_refused() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    steer = Rectification(lambda ids: torch.zeros(2, 5))
    for value in (math.nan, math.inf):
        scores = torch.zeros(2, 5)
        scores[1, 2] = value
        with pytest.raises(InputError, match="scores='rows"):
            steer(ids, scores)
    with pytest.raises(InputError, match="scores='rows"):
        steer(ids, torch.full((2, 5), -math.inf))
    with pytest.raises(InputError, match=r"value_model=.*2, 6"):
        steer(ids, torch.zeros(2, 6))


@pytest.mark.parametrize(("name", "value"), [("gamma", 0.0), ("gamma", 1.1), ("tau", 0.0), ("tau", 2), ("lam", 1.5)])
def test_bad_training_settings_are_refused(q_model: QModel, tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        DeadEndTrainer(copy.deepcopy(q_model), arguments(tmp_path), train_dataset=ROWS, **{name: value})


def test_bad_rewards_and_models_are_refused(q_model: QModel, tmp_path: Path) -> None:
    rows = [{"input_ids": [3, 4, 5], "reward": 0.5}]
    with pytest.raises(InputError, match=r"reward=0\.5"):
        DeadEndTrainer(copy.deepcopy(q_model), arguments(tmp_path), train_dataset=rows).train()
    with pytest.raises(InputError, match="model='GPT2LMHeadModel'"):
        DeadEndTrainer(tiny("gpt2"), arguments(tmp_path), train_dataset=rows)
    with pytest.raises(InputError, match="layers=9"):
        QModel.from_trunk(tiny("gpt2"), layers=9)
    with pytest.raises(InputError, match="folder="):
        Rectification.from_pretrained(tmp_path / "nothing")


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    QModel.from_trunk(tiny("gpt2")).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(loading.path("reviews/base"))
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(loading.path("docs/tiny"))
    with pytest.raises(InputError, match=r"same vocabulary \(at id"):
        Rectification.from_pretrained(tmp_path, tokenizer=other)
    assert Rectification.from_pretrained(tmp_path, tokenizer=tokenizer).eps == 0.0


# ------------------------------------------------------------------ apply


def texts_file(tmp_path: Path, n: int = 30) -> Path:
    rows = [*reviews.texts("train", n, 7), *reviews.texts("train", n, 8, rudeness="rude")]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))
    return file


def long(texts: list[str]) -> list[float]:
    """A scorer under which about half of all short texts are undesired: those with a full stop at an even place."""
    return [float(len(text.split()) % 2) for text in texts]


TINY = {"prompts": 20, "continuations": 3, "new_tokens": 8, "epochs": 1, "batch_size": 8, "layers": 1}


@pytest.mark.parametrize("data", ["all", "most", "sample"])
def test_apply_with_a_scorer(tmp_path: Path, data: Any) -> None:
    record = apply(
        loading.path("reviews/base"), texts_file(tmp_path), tmp_path / "out", seed=3, scorer=long,
        prompt_tokens=5, data=data, **TINY,
    )  # fmt: skip
    assert 0 < record["undesired"] < 1 and record["heldout_texts"] == 6 and record["brier"] >= 0
    assert record["texts"] == {"all": 54, "most": 36, "sample": 54}[data] or data != "all"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    steer = Rectification.from_pretrained(tmp_path / "out", tokenizer=tokenizer, eps=0.1)
    model, _ = reviews.language_model("base")
    inputs = tokenizer(["we went to"], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=5, logits_processor=[steer], **SAMPLING)
    assert out.shape[1] > inputs["input_ids"].shape[1] and steer.record.steps >= 1
    assert steer.networks == (steer.value_model,)


def test_held_out_texts_are_not_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are drawn with replacement, many more times than there are: still no text is on both sides."""
    drawn: list[set[str]] = []
    cut = applying.cut_prompts

    def watched(rows: Any, *args: Any, **given: Any) -> Any:
        drawn.append({row["text"] for row in rows})
        return cut(rows, *args, **given)

    monkeypatch.setattr(applying, "cut_prompts", watched)
    record = apply(
        loading.path("reviews/base"), texts_file(tmp_path), tmp_path / "out", scorer=long, prompt_tokens=5,
        **TINY | {"prompts": 200, "continuations": 1},
    )  # fmt: skip
    assert len(drawn) == 2 and not drawn[0] & drawn[1] and len(drawn[0] | drawn[1]) == 60
    assert record["heldout_texts"] == 20 and record["texts"] == 180


def test_apply_is_seeded_and_leaves_randomness_alone(tmp_path: Path) -> None:
    file = texts_file(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        apply(loading.path("reviews/base"), file, tmp_path / name, seed=seed, scorer=long, prompt_tokens=5, **TINY)
    assert torch.equal(torch.rand(1), expected)
    weights = [QModel.from_pretrained(tmp_path / name).head[-1].weight for name in "abc"]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_apply_with_labels_or_rewards_alone(tmp_path: Path) -> None:
    base = loading.path("reviews/base")
    record = apply(base, texts_file(tmp_path), tmp_path / "labels", attribute="rudeness=polite", **TINY)
    assert record["undesired"] == pytest.approx(0.5, abs=0.1)
    rows = [
        {"prompt": "we went to this", "text": f"bistro on {d}.", "score": s}
        for d, s in (("friday", 0.9), ("monday", 0.1))
    ]
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    assert apply(base, file, tmp_path / "scores", **TINY)["undesired"] == 0.5
    assert apply(base, file, tmp_path / "other", trunk=str(base), writer=str(base), **TINY)["undesired"] == 0.5


def test_apply_refuses(tmp_path: Path) -> None:
    base, file = loading.path("reviews/base"), texts_file(tmp_path, 5)
    out = tmp_path / "out"
    for given_, said in (
        ({"attribute": "polite"}, "attribute='polite'"),
        ({"input": None}, "input=None"),
        ({"attribute": "mood=good"}, "scorer=None"),
        ({"scorer": lambda texts: [2.0] * len(texts)}, "scorer="),
        ({"scorer": lambda texts: [1.0] * len(texts)}, "input='0%"),
        ({"scorer": long, "new_tokens": 500}, "new_tokens=500"),
        ({"drop_rate": 2.0}, "drop_rate=2.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"near": 0}, "near=0"),
        ({"data": "best"}, "data='best'"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"lam": 1.5}, "lam=1.5"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"scorer": long, "new_tokens": 60, "prompt_tokens": 500}, "new_tokens=60"),
        ({"trunk": str(loading.path("docs/tiny"))}, "trunk="),
    ):
        given_ = {"input": file, "prompts": 4, "continuations": 2, "new_tokens": 4} | given_
        source = given_.pop("input")
        with pytest.raises(InputError, match=said):
            apply(base, source, out, **given_)  # type: ignore[arg-type]
    bad = tmp_path / "bad.jsonl"
    for line, said in (
        ('{"text": "a b", "reward": 0.5}', "reward=0.5"),
        ('{"words": 1}', "row 1"),
        ("{", "line 1"),
    ):
        bad.write_text(line + "\n")
        with pytest.raises(InputError, match=said):
            apply(base, bad, out)


def test_prompts_end_shortly_before_their_text_turns() -> None:
    """A text that turns at its fifth token, among texts that don't; words are numbers and 9 is bad."""

    class Words:
        def __call__(self, text: str, **given: Any) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

        def batch_decode(self, rows: Any, **given: Any) -> list[str]:
            return [" ".join(map(str, row)) for row in rows]

    rows = [{"text": "1 2 3 4 9 5 6 7", "mood": "bad"}, {"text": "1 1 1 1 1 1 1 1", "mood": "good"}]
    score = lambda texts: [float("9" not in text) for text in texts]  # noqa: E731
    given_ = {"wanted": ("mood", "good"), "scorer": score}
    found = cut_prompts(rows, 200, Words(), [], 100, random.Random(0), near=2, **given_)
    lengths = [{len(ids) for ids in found if ids[1:2] == (second,)} for second in (2, 1)]
    assert lengths[0] == {3, 4} and max(lengths[1]) == 7
    assert sum(ids[1:2] == (2,) for ids in found) == 100
    anywhere = cut_prompts(rows, 200, Words(), [], 100, random.Random(0), **given_)
    assert {len(ids) for ids in anywhere if ids[1:2] == (2,)} == {2, 3, 4}


def test_prompts_that_are_undesired_already_are_left_out() -> None:
    tokenizer = reviews.tokenizer()
    rows = [vars(r) for r in reviews.texts("train", 40, 1, rudeness="rude")]
    polite = lambda texts: [float(reviews.attributes(t).rudeness == "polite") for t in texts]  # noqa: E731
    found = cut_prompts(rows, 60, tokenizer, [1], 100, random.Random(0), scorer=polite)
    assert len(found) == 60 and all(ids[0] == 1 for ids in found)
    assert all(polite(tokenizer.batch_decode([list(ids) for ids in found], skip_special_tokens=True)))


# ------------------------------------------------------------------ errata of the published code


def test_errata_two_passes_leave_tokens_above_their_caps() -> None:
    """A token that must not come comes nearly always, and two passes don't see it."""
    p = torch.tensor([[1 - 1e-6, 1e-6]], dtype=torch.float64)
    cap = torch.tensor([[0.02, 1.0]], dtype=torch.float64)
    assert float(official_projection(p.log(), cap)[0, 0].exp()) > 0.9
    assert float(exact_projection(p.log(), cap).log_p[0, 0].exp()) == pytest.approx(0.02)


def test_errata_top_k_after_the_caps_lifts_tokens_above_them() -> None:
    """``generate`` runs top_k=50 behind the processors unless it is switched off; inside it comes first."""
    assert GenerationConfig().top_k in (50, None)
    risk = torch.tensor([[0.6, 0.0, 0.0, 0.0]])
    p, ids = torch.tensor([[0.7, 0.15, 0.1, 0.05]]), torch.zeros(1, 1, dtype=torch.long)
    after = TopKLogitsWarper(2)(ids, Rectification(lambda ids: risk)(ids, p.log())).softmax(-1)
    assert float(after[0, 0]) > 0.55
    assert float(Rectification(lambda ids: risk, top_k=2)(ids, p.log()).exp()[0, 0]) == pytest.approx(0.4, abs=1e-6)
    assert Rectification(lambda ids: risk).generate_options == SAMPLING


def test_errata_the_end_of_text_is_no_padding() -> None:
    """The published mask is ``ids != pad`` with the end-of-text id as padding: an end inside a text vanishes."""
    model = q_of("gpt2")
    ids = torch.tensor([[5, 6, EOS, 7, 8]])
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        masked = model(ids, attention_mask=(ids != EOS).long()).logits[:, -1]
    ours = Rectification(model, pad_token_id=EOS).risk(ids)
    assert torch.allclose(ours, -whole.clamp(-1, 0), atol=1e-5)
    assert (masked - whole).abs().max() > 0.01


def test_errata_positions_begin_behind_left_padding() -> None:
    model = q_of("gpt2")
    row = torch.tensor([[5, 6, 7]])
    padded, mask = torch.tensor([[PAD, PAD, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        alone = model(row).logits[:, -1]
        ours = model(padded, attention_mask=mask).logits[:, -1]
        published = model(padded, attention_mask=mask, position_ids=torch.arange(5)[None]).logits[:, -1]
    assert torch.allclose(ours, alone, atol=1e-5) and (published - alone).abs().max() > 0.01


def test_errata_scores_are_left_as_they_were() -> None:
    scores = torch.randn(3, 6)
    before = scores.clone()
    for projection in ("exact", "official", "block", "bayes"):
        Rectification(lambda ids: torch.rand(3, 6), 0.1, projection)(torch.zeros(3, 2, dtype=torch.long), scores)  # type: ignore[arg-type]
        assert torch.equal(scores, before)


def test_errata_half_precision_keeps_the_least_cap() -> None:
    """log 1e-7 is -inf in float16: all tokens of a step whose caps are p_min would be lost."""
    assert float(torch.tensor(1e-7 / 4).half().log()) == -math.inf  # a cap of 1e-7 beside four tokens of its size
    for dtype in (torch.float16, torch.bfloat16):
        scores = torch.zeros(1, 3, dtype=dtype)
        risk = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
        out = Rectification(lambda ids, risk=risk: risk)(torch.zeros(1, 1, dtype=torch.long), scores)
        assert out.dtype == torch.float32 and float(out[0, 0]) == pytest.approx(math.log(1e-7), rel=1e-4)


def test_errata_the_most_extreme_texts_overstate_the_risk() -> None:
    """One text in ten is bad; of the most and the least undesired of 25, almost half."""
    rng = random.Random(0)
    texts = [[(1, 2, j) for j in range(25)] for _ in range(400)]
    scores = [[float(rng.random() >= 0.1) for _ in range(25)] for _ in range(400)]
    share = {}
    for data, rate in (("all", 0.0), ("most", 0.5), ("sample", 0.5)):
        kept = selected(texts, scores, [(1,)] * 400, data, rate, rng)  # type: ignore[arg-type]
        share[data] = sum(t.reward == -1 for t in kept) / len(kept)
    assert share["all"] == pytest.approx(0.1, abs=0.01) and share["most"] > 0.45
    assert share["sample"] == pytest.approx(0.1, abs=0.03)  # only the dropped prompts raise it


def test_calibration_of_known_values() -> None:
    """A constant risk of 0.25 against texts of which a quarter is undesired, and against none."""
    model = QModel.from_trunk(tiny("gpt2"))
    nn.init.constant_(model.head[-1].bias, -0.25)
    texts = [Trajectory((3, 4, 5, 6), 2, -float(i % 4 == 0), i) for i in range(8)]
    found = calibration(model, texts)
    assert found["excess_risk"] == pytest.approx(0, abs=1e-6) and found["brier"] == pytest.approx(0.1875, abs=1e-6)
    assert found["brier_constant"] == pytest.approx(0.1875) and calibration(model, []) == {"heldout_texts": 0}


def test_recorded_texts_keep_their_prompts() -> None:
    tokenizer = reviews.tokenizer()
    rows = [{"prompt": "we went to", "text": "this bistro", "reward": "-1"}, {"text": "a room", "reward": "0"}]
    one, two = recorded(rows, tokenizer, [1], 50)
    assert one.prompt_length == 4 and one.reward == -1 and one.ids[-1] == tokenizer.eos_token_id
    assert two.prompt_length == 1 and len(two.ids) == 4
