"""FK steering's core: exact tilts, normaliser, telescoping, finite chains by enumeration, errata, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from steersman.diffusion.fk_steering.smc import (
    POTENTIALS,
    FeynmanKac,
    every,
    many_sample,
    scale_for,
    scored_steps,
)
from steersman.errors import InputError
from steersman.math.resampling import RESAMPLERS

STEERING = [p for p in POTENTIALS if p != "best-of-n"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ Gaussians

STEPS = 200
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.1, STEPS, dtype=torch.float64), 0)
SCORED = (40, 80, 120, 160)


def gaussian(fk: FeynmanKac, reward, groups: int, seed: int = 0, drift: float = 0.0, drop: bool = False):
    """x_0 of N(0, 1) under the exact reverse kernel x_s = ρ x_t + sqrt(1 - ρ²) n, steered.

    With ``drift`` the proposal adds drift α_t (1 - ρ²) to the mean, and the kernels' ratio goes into the weights.
    With ``drop`` weights are lost where no resampling has used them.
    """
    generator, k = rng(seed), fk.particles
    x = torch.randn(groups, k, generator=generator, dtype=torch.float64)
    state = fk.init(groups)
    for i in range(STEPS):
        t = STEPS - 1 - i
        alpha = float(ABAR[t].sqrt())
        rho = float((ABAR[t] / (ABAR[t - 1] if t else 1.0)).sqrt())
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        width, x0 = math.sqrt(1 - rho**2), alpha * x
        shift = drift * alpha * width**2
        x = rho * x + shift + width * noise
        ratio = -(shift * noise / width + 0.5 * (shift / width) ** 2) if drift else None
        last = t == 0
        if i in SCORED or last:
            state, scored = fk.step(state, reward(x if last else x0), last, ratio, generator)
            x = x.gather(1, scored.index)
            if drop:
                state = state._replace(log_weights=torch.zeros_like(state.log_weights))
        elif ratio is not None:
            state = fk.weigh(state, None, log_ratio=ratio)
    return x, state


def linear(x):
    return x


def averaged(fk: FeynmanKac, reward=linear, **more):
    x, state = gaussian(fk, reward, 5, **more)
    return float(x.mean(1).mean()), float(x.var(1).mean()), state


CASES = [
    *((p, scale, {}) for p in ("difference", "max", "importance") for scale in (0.5, 1.0)),
    ("immediate", 0.5, {}),
    *(("difference", 1.0, {"resampler": name}) for name in RESAMPLERS if name != "systematic"),
    *((p, 1.0, {"ess_threshold": 0.5}) for p in ("difference", "max", "importance")),
    ("max", 1.0, {"ess_threshold": 0.9, "resampler": "residual"}),
]


@pytest.mark.parametrize(("potential", "scale", "settings"), CASES)
def test_a_linear_reward_shifts_a_gaussian(potential, scale, settings):
    fk = FeynmanKac(4096, potential, scale, **settings)
    mean, variance, _ = averaged(fk)
    assert abs(mean - scale) <= 0.08
    assert abs(variance - 1) <= 0.12


@pytest.mark.parametrize("potential", ["difference", "max", "importance"])
def test_a_quadratic_reward_narrows_a_gaussian(potential):
    scale = 2.0
    mean, variance, state = averaged(FeynmanKac(4096, potential, scale), lambda x: -0.5 * x.square())
    assert abs(mean) <= 0.08
    assert variance == pytest.approx(1 / (1 + scale), rel=0.12)
    assert float(state.log_z.exp().mean()) == pytest.approx((1 + scale) ** -0.5, rel=0.05)


def test_erratum_the_last_potential_is_of_the_sample_not_of_the_statistic():
    """With the published rule max and sum end in the tilt by the largest reward on the way, or by their sum."""
    found = {}
    for potential, official in itertools.product(("max", "sum"), (False, True)):
        fk = FeynmanKac(4096, potential, 1.0, official_terminal=official)
        mean, _, state = averaged(fk)
        found[potential, official] = mean, float(state.log_z.exp().mean())
    z = math.exp(0.5)
    assert found["max", False] == pytest.approx((1.0, z), abs=0.1)
    assert found["max", True][0] < 0.85 and found["max", True][1] > z + 0.3
    assert found["sum", False] == pytest.approx((1.0, z), abs=0.3)
    # The sum of the rewards on the way is Gaussian: with corr(x_t, x_s) = sqrt(abar_t / abar_s) its law is exact.
    abar = torch.stack([*(ABAR[STEPS - 1 - i] for i in SCORED), torch.tensor(1.0, dtype=torch.float64)])
    later = torch.minimum(abar[:, None] / abar, abar / abar[:, None]).sqrt()
    variance = float(abar.sqrt() @ later @ abar.sqrt())
    assert variance > 2.5
    assert found["sum", True][0] == pytest.approx(float(abar.sum()), abs=0.25)
    assert math.log(found["sum", True][1]) == pytest.approx(variance / 2, abs=0.3)


def test_erratum_weights_that_a_skipped_resampling_drops_are_lost():
    """The published code overwrites what it didn't resample by: most of the tilt is gone. Carried, it's all there."""
    fk = FeynmanKac(4096, "difference", 0.5, ess_threshold=0.5)
    assert averaged(fk)[0] == pytest.approx(0.5, abs=0.08)
    assert averaged(fk, drop=True)[0] < 0.3


def test_erratum_a_floor_of_zero_makes_max_blind_to_negative_rewards():
    """Log-probabilities are below 0: with the published floor every particle weighs the same until the end."""
    r = torch.tensor([[-9.0, -1.0, -4.0]], dtype=torch.float64)
    official, ours = (FeynmanKac(3, "max", 1.0, r_min=floor) for floor in (0.0, None))
    assert official.weigh(official.init(1), r).log_weights.tolist() == [[0.0, 0.0, 0.0]]
    assert ours.weigh(ours.init(1), r).log_weights.tolist() == r.tolist()


def test_erratum_weights_are_not_cut():
    """exp(λ r) cut to [0, 1e10] ties every reward above 2.3 at λ = 10, and in half precision from 1.1 on."""
    r = torch.tensor([[3.0, 5.0, 90.0, 90.1]], dtype=torch.float64)
    cut = (10.0 * r.float()).exp().nan_to_num(0.0).clamp(0, 1e10)
    assert bool((cut == cut[0, 0]).all())
    fk = FeynmanKac(4, "difference", 10.0)
    weights = fk.weigh(fk.init(1), r).weights
    assert torch.allclose(weights, torch.softmax(10 * r, 1), rtol=1e-12) and float(weights[0, 3]) > 0.7


@pytest.mark.parametrize("potential", ["difference", "importance"])
def test_the_normaliser_is_unbiased(potential):
    """E exp(λ x) = exp(λ² / 2), with as few as 16 particles."""
    _, state = gaussian(FeynmanKac(16, potential, 1.0), linear, 400, seed=1)
    z = state.log_z.exp()
    assert abs(float(z.mean()) - math.exp(0.5)) <= 4 * float(z.std()) / math.sqrt(400)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_proposal_is_corrected_by_its_ratio(threshold):
    """A drift towards the reward keeps the target, and spares the weights (more distinct ancestors)."""
    fk = FeynmanKac(4096, "difference", 1.0, ess_threshold=threshold)
    mean, variance, driven = averaged(fk, drift=1.0)
    assert abs(mean - 1) <= 0.08 and abs(variance - 1) <= 0.12
    assert float(driven.log_z.exp().mean()) == pytest.approx(math.exp(0.5), rel=0.05)
    plain = averaged(fk)[2]
    assert float(driven.distinct.double().mean()) > 1.5 * float(plain.distinct.double().mean())


# ------------------------------------------------------------------ products of potentials


@pytest.mark.parametrize("potential", STEERING)
@pytest.mark.parametrize("threshold", [None, 0.5, 0.05])
def test_the_potentials_of_a_lineage_multiply_to_the_tilt(potential, threshold):
    """Whatever is resampled or carried: Π G = exp(λ r(x_0)) along every surviving lineage (difference: less r_min)."""
    groups, k, steps, scale, r_min = 50, 6, 5, 1.7, -0.4
    floor = r_min if potential in ("difference", "max") else None
    fk = FeynmanKac(k, potential, scale, "multinomial", threshold, floor)
    generator, state = rng(3), fk.init(groups)
    skipped = 0
    for step in range(steps):
        r = torch.randn(groups, k, generator=generator, dtype=torch.float64)
        last = step == steps - 1
        state = fk.weigh(state, r, last)
        if last:
            wanted = scale * (r - (r_min if potential == "difference" else 0.0))
            assert torch.allclose(state.log_potentials, wanted, rtol=0, atol=1e-10)
        state, scored = fk.resample(state, last, generator)
        skipped += int((~scored.resampled).sum())
    assert (skipped > 0) == (threshold is not None or potential == "importance")


@pytest.mark.parametrize("potential", STEERING)
def test_carried_weights_are_those_of_no_resampling_at_all(potential):
    """Skipping every resampling but the last is importance sampling: the weights are exp(λ r(x_0)), at once."""
    fk, r = FeynmanKac(8, potential, 2.0), torch.randn(4, 3, 8, generator=rng(), dtype=torch.float64)
    state = fk.init(3)
    for step in range(4):
        state = fk.weigh(state, r[step], step == 3)
    assert torch.allclose(state.weights, torch.softmax(2.0 * r[3], 1), rtol=1e-10)
    assert torch.allclose(state.log_z, torch.logsumexp(2.0 * r[3], 1) - math.log(8), rtol=0, atol=1e-10)


@pytest.mark.parametrize("potential", STEERING)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_no_tilt_changes_nothing(potential, threshold):
    fk, generator = FeynmanKac(7, potential, 0.0, ess_threshold=threshold), rng()
    state = fk.init(20)
    for step in range(4):
        r = torch.randn(20, 7, generator=generator, dtype=torch.float64)
        state, scored = fk.step(state, r, step == 3, generator=generator)
        assert torch.equal(scored.index, torch.arange(7).expand(20, -1))
    assert torch.equal(state.log_z, torch.zeros(20, dtype=torch.float64)) and state.distinct.tolist() == [7] * 20
    same = FeynmanKac(7, potential, 3.0)
    state = same.init(20)
    for step in range(4):
        state, scored = same.step(state, torch.full((20, 7), 0.3), step == 3, generator=generator)
        assert torch.equal(scored.index, torch.arange(7).expand(20, -1))
    assert torch.allclose(state.log_z, torch.full((20,), 0.9, dtype=torch.float64))


def test_particles_of_another_order_have_their_weights_in_that_order():
    order, r = torch.tensor([2, 0, 3, 1]), torch.randn(3, 5, 4, generator=rng(), dtype=torch.float64)
    for potential in STEERING:
        fk = FeynmanKac(4, potential, 1.3)
        one = other = fk.init(5)
        for step in range(3):
            one = fk.weigh(one, r[step], step == 2)
            other = fk.weigh(other, r[step][:, order], step == 2)
        assert torch.allclose(one.log_weights[:, order], other.log_weights, rtol=0, atol=1e-12)
        assert torch.allclose(one.log_z, other.log_z, rtol=0, atol=1e-12)


def test_importance_sampling_resamples_once():
    """Resampling equal weights on the way would only lose particles: E is that of self-normalised weights."""
    fk, generator = FeynmanKac(4, "importance", 1.0, "multinomial"), rng(1)
    state, x = fk.init(20_000), torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    for step in range(3):
        state, scored = fk.step(state, x, step == 2, generator=generator)
        assert bool(scored.resampled.all()) == (step == 2)
    wanted = (torch.softmax(x, 1) * x).sum(1)
    error = x.gather(1, scored.index).mean(1) - wanted
    assert abs(float(error.mean())) <= 4 * float(error.std()) / math.sqrt(20_000)
    assert float(wanted.mean()) == pytest.approx(0.609, abs=0.015)


def test_a_particle_without_a_reward():
    """On the way its potential is 1; at the end its weight is 0. A group without any reward stays as it is."""
    nan = math.nan
    for potential in STEERING:
        fk = FeynmanKac(3, potential, 2.0)
        state = fk.weigh(fk.init(1), torch.tensor([[0.5, nan, -0.2]]))
        assert float(state.log_weights[0, 1]) == 0.0
        state = fk.weigh(state, torch.tensor([[nan, 0.1, 0.3]]), last=True)
        wanted = torch.tensor([-math.inf, 0.2, 0.6], dtype=torch.float64)
        assert torch.allclose(state.log_weights[0], wanted), potential
        _, scored = fk.resample(state, True, rng())
        assert 0 not in scored.index.tolist()[0]
        lost, scored = fk.step(fk.init(1), torch.full((1, 3), nan), True, generator=rng())
        assert scored.index.tolist() == [[0, 1, 2]] and float(lost.log_z) == -math.inf


def test_ancestors_are_those_of_the_first_particles():
    fk, generator = FeynmanKac(5, "difference", 2.0, "multinomial"), rng(1)
    state, names = fk.init(30), torch.arange(5).expand(30, -1)
    for step in range(6):
        state, scored = fk.step(
            state, torch.randn(30, 5, generator=generator, dtype=torch.float64), step == 5, generator=generator
        )
        names = names.gather(1, scored.index)
    assert torch.equal(state.ancestors, names)
    assert state.distinct.tolist() == [len(set(row)) for row in names.tolist()]


# ------------------------------------------------------------------ a chain of four states

STATES = 4
PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
KERNELS = torch.softmax(2 * torch.randn(2, STATES, STATES, generator=rng(5), dtype=torch.float64), 2)
TABLE = torch.tensor([[1.2, 0.2, 0.6, -0.5], [-0.5, 0.9, -0.3, 0.6], [0.3, -0.4, 0.8, 0.1]], dtype=torch.float64)
"""Rewards of the states at the three scored steps; the last row is r(x_0)."""
SCALE = 1.2
PATHS = torch.cartesian_prod(*[torch.arange(STATES)] * 3)
P_PATHS = PRIOR[PATHS[:, 0]] * KERNELS[0][PATHS[:, 0], PATHS[:, 1]] * KERNELS[1][PATHS[:, 1], PATHS[:, 2]]


def tilt() -> torch.Tensor:
    base = torch.zeros(STATES, dtype=torch.float64).index_add(0, PATHS[:, 2], P_PATHS)
    p = base * (SCALE * TABLE[2]).exp()
    return p / p.sum()


def law_of_paths(fk: FeynmanKac) -> torch.Tensor:
    """Σ over all paths of P(path) Π G, by the last state, of sum 1."""
    state = fk.init(1)
    for step in range(3):
        state = fk.weigh(state, TABLE[step][PATHS[:, step]][None], step == 2)
    p = torch.zeros(STATES, dtype=torch.float64).index_add(0, PATHS[:, 2], P_PATHS * state.log_potentials[0].exp())
    return p / p.sum()


@pytest.mark.parametrize("potential", STEERING)
def test_all_paths_of_a_chain_sum_to_the_target(potential):
    right = law_of_paths(FeynmanKac(len(PATHS), potential, SCALE))
    assert float((right - tilt()).abs().max()) < 1e-12
    official = law_of_paths(FeynmanKac(len(PATHS), potential, SCALE, official_terminal=True))
    distance = 0.5 * float((official - tilt()).abs().sum())
    if potential in ("max", "sum"):
        assert distance >= 0.05
    else:
        assert distance < 1e-12


def indices_of_two(w: float, method: str) -> dict[tuple[int, int], float]:
    """The law of the resampled pair, where the first particle has weight ``w`` of 1, by hand."""
    if method == "multinomial":
        chosen = {(i, j): (w, 1 - w)[i] * (w, 1 - w)[j] for i in (0, 1) for j in (0, 1)}
    elif method == "residual":
        if w >= 0.5:  # one copy of the first, the other drawn in what is left
            chosen = {(0, 0): 2 * w - 1, (0, 1): 2 - 2 * w}
        else:
            chosen = {(1, 0): 2 * w, (1, 1): 1 - 2 * w}
    else:  # a point in each half; both lie on the same side of w unless it falls between them
        chosen = {(0, 0): max(2 * w - 1, 0.0), (1, 1): max(1 - 2 * w, 0.0), (0, 1): 1 - abs(2 * w - 1)}
    return {pair: p for pair, p in chosen.items() if p > 0}


def log_potential(potential: str, rewards: list[float], before: float, last: bool) -> float:
    """log G_t of a lineage with these rewards so far and this log Π G before, from the table of potentials."""
    if potential == "difference":
        return SCALE * (rewards[-1] - (rewards[-2] if len(rewards) > 1 else 0.0))
    if last:
        return SCALE * rewards[-1] - before
    statistic = {"max": max(rewards), "sum": sum(rewards), "immediate": rewards[-1], "importance": 0.0}[potential]
    return SCALE * statistic


def exact_law_of_two(potential: str, method: str, threshold: float | None) -> torch.Tensor:
    """The mean empirical law of two particles at the end, by enumerating ordered pairs of lineages."""
    prior, kernels = PRIOR.tolist(), KERNELS.tolist()
    empty: tuple = ((), 0.0, 0.0)  # states, log Π G, log weight carried
    pairs = {(empty, empty): 1.0}
    for step in range(3):
        weighed: dict = {}
        for (a, b), p in pairs.items():
            for i, j in itertools.product(range(STATES), repeat=2):
                moved, q = [], p
                for (path, product, carried), state in ((a, i), (b, j)):
                    q *= kernels[step - 1][path[-1]][state] if path else prior[state]
                    new = (*path, state)
                    g = log_potential(potential, [float(TABLE[s][n]) for s, n in enumerate(new)], product, step == 2)
                    moved.append((new, round(product + g, 12), round(carried + g, 12)))
                key = tuple(moved)
                weighed[key] = weighed.get(key, 0.0) + q
        pairs = {}
        for pair, p in weighed.items():
            first, second = (math.exp(lineage[2]) for lineage in pair)
            w = first / (first + second)
            ess = 1 / (w * w + (1 - w) ** 2)
            waits = potential == "importance" or (threshold is not None and ess >= threshold * 2)
            if step < 2 and waits:
                pairs[pair] = pairs.get(pair, 0.0) + p
                continue
            for index, q in indices_of_two(w, method).items():
                chosen = tuple((*pair[i][:2], 0.0) for i in index)
                pairs[chosen] = pairs.get(chosen, 0.0) + p * q
    law = torch.zeros(STATES, dtype=torch.float64)
    for pair, p in pairs.items():
        for lineage in pair:
            law[lineage[0][-1]] += 0.5 * p
    return law


def walked(fk: FeynmanKac, groups: int, seed: int = 0):
    """Runs of the chain: the last states (groups, k)."""
    generator, k = rng(seed), fk.particles
    x = torch.multinomial(PRIOR, groups * k, replacement=True, generator=generator).reshape(groups, k)
    state = fk.init(groups)
    for step in range(3):
        if step:
            moved = torch.multinomial(KERNELS[step - 1][x.flatten()], 1, generator=generator)
            x = moved.reshape(groups, k)
        state, scored = fk.step(state, TABLE[step][x], step == 2, generator=generator)
        x = x.gather(1, scored.index)
    return x


EXACT = [
    *((p, "multinomial", None) for p in STEERING),
    *((p, "multinomial", 0.85) for p in STEERING),
    *(("difference", method, None) for method in ("systematic", "stratified", "residual")),
    *(("max", method, 0.85) for method in ("systematic", "stratified", "residual")),
]


@pytest.mark.parametrize(("potential", "method", "threshold"), EXACT)
def test_two_particles_have_exactly_the_enumerated_law(potential, method, threshold):
    runs = 20_000
    law = exact_law_of_two(potential, method, threshold)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-9)
    x = walked(FeynmanKac(2, potential, SCALE, method, threshold), runs)
    shares = torch.nn.functional.one_hot(x, STATES).double().mean(1)
    error = (shares.mean(0) - law).abs()
    assert bool((error <= 4 * shares.std(0) / math.sqrt(runs)).all())


@pytest.mark.parametrize("potential", STEERING)
def test_many_particles_of_a_chain_reach_the_target(potential):
    x = walked(FeynmanKac(200_000, potential, SCALE), 1)
    law = torch.bincount(x[0], minlength=STATES).double() / x.numel()
    assert 0.5 * float((law - tilt()).abs().sum()) < 0.02


# ------------------------------------------------------------------ rewards of many samples, scales, schedules


def test_many_categorical_samples_promise_the_tilt():
    """E exp(λ r_t) over draws x_0 ~ p(x_0 | x_t) is E[exp(λ r) | x_t] in the consistent form, for every N."""
    p = KERNELS[1]
    reward, scale = TABLE[2], 2.5
    draws = torch.multinomial(p, 4 * 50_000, replacement=True, generator=rng()).reshape(STATES, 50_000, 4)
    exact = (p * (scale * reward).exp()).sum(1)
    promised = (scale * many_sample(reward[draws], scale)).exp()
    error = (promised.mean(1) - exact).abs()
    assert bool((error <= 4.5 * promised.std(1) / math.sqrt(50_000)).all())
    assert torch.allclose(many_sample(reward[draws]), reward[draws].exp().mean(2).log())
    assert float((many_sample(reward[draws]) - many_sample(reward[draws], scale)).abs().max()) > 0.1
    assert torch.allclose(many_sample(reward[draws][..., :1]), reward[draws][..., 0])


def test_a_chain_steered_by_many_samples_reaches_the_target():
    """The rewards on the way are of categorical draws at the end of the chain, as with masked diffusion."""
    fk, generator, k = FeynmanKac(100_000, "difference", SCALE), rng(2), 100_000
    x = torch.multinomial(PRIOR, k, replacement=True, generator=generator)[None]
    state = fk.init(1)
    ahead = [KERNELS[0] @ KERNELS[1], KERNELS[1]]
    for step in range(3):
        if step:
            x = torch.multinomial(KERNELS[step - 1][x.flatten()], 1, generator=generator).T
        if step < 2:
            draws = torch.multinomial(ahead[step][x.flatten()], 4, replacement=True, generator=generator)
            r = many_sample(TABLE[2][draws], SCALE)[None]
        else:
            r = TABLE[2][x]
        state, scored = fk.step(state, r, step == 2, generator=generator)
        x = x.gather(1, scored.index)
    law = torch.bincount(x[0], minlength=STATES).double() / k
    assert 0.5 * float((law - tilt()).abs().sum()) < 0.02


def test_a_scale_for_an_effective_sample_size():
    r = torch.randn(40, 8, generator=rng(), dtype=torch.float64)
    scale = scale_for(r, 0.5)
    w = torch.softmax(scale * r, 1)
    assert float((1 / w.square().sum(1)).mean()) == pytest.approx(4.0, rel=1e-6)
    assert scale_for(100 * r, 0.5) == pytest.approx(scale / 100, rel=1e-6)
    assert scale_for(torch.ones(2, 4), 0.5) == 1e4
    r[0, 0] = math.nan
    assert scale_for(r, 0.5) > 0


def test_schedules():
    assert every(20, 20, 80, steps=100) == (20, 40, 60, 80)
    assert scored_steps(every(20, 20, 80, steps=100), 100) == (20, 40, 60, 80, 99)
    assert scored_steps((0.2, 0.4, 0.6, 0.8), 100) == (20, 40, 60, 80, 99)
    assert every(20, 19, steps=100) == (19, 39, 59, 79, 99)
    assert scored_steps((0.29,), 100) == (29, 99)
    assert scored_steps((), 7) == (6,)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"particles": 1}, "particles=1"),
        ({"particles": 2.0}, "particles"),
        ({"potential": "maximum"}, "did you mean 'max'"),
        ({"scale": -1}, "scale=-1"),
        ({"scale": math.nan}, "scale=nan"),
        ({"resampler": "multinomal"}, "did you mean 'multinomial'"),
        ({"ess_threshold": 1.5}, "ess_threshold=1.5"),
        ({"r_min": -math.inf}, "for difference a finite one"),
        ({"r_min": math.nan, "potential": "max"}, "r_min=nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        FeynmanKac(**({"particles": 4} | settings))


def test_one_particle_is_for_best_of_n_only():
    assert FeynmanKac(1, "best-of-n").init(3).weights.tolist() == [[1.0]] * 3


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="adaptive_resampling_at_end"):
        FeynmanKac(4, adaptive_resampling_at_end=True)


def test_bad_rewards_and_schedules_are_refused():
    fk = FeynmanKac(3)
    with pytest.raises(InputError, match=r"reward=\(2, 4\)"):
        fk.weigh(fk.init(2), torch.zeros(2, 4))
    with pytest.raises(InputError, match="infinity"):
        fk.weigh(fk.init(1), torch.tensor([[0.0, math.inf, 0.0]]))
    with pytest.raises(InputError, match="log_ratio"):
        fk.weigh(fk.init(1), None, log_ratio=torch.tensor([[0.0, math.nan, 0.0]]))
    for schedule in ((100,), (-1,), (1.0,), (True,), ("a",)):
        with pytest.raises(InputError, match="schedule"):
            scored_steps(schedule, 100)
    with pytest.raises(InputError, match="end=100"):
        every(20, 20, 100, steps=100)
    with pytest.raises(InputError, match="frequency=0"):
        every(0, steps=10)
