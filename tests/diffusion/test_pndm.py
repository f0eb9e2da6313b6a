"""PNDM: the paper's identities and orders, the authors' code, diffusers' scheduler, and where they err."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.stats import norm

from steersman.diffusion import DDIMScheduler, PNDMScheduler
from steersman.diffusion.classical import DDIM
from steersman.diffusion.pndm import (
    ADAMS_BASHFORTH,
    VARIANTS,
    OfficialIndexVP,
    PNDMSolver,
    adams_bashforth,
)
from steersman.diffusion.scheduler import alphas_cumprod
from steersman.diffusion.solver import (
    DiscreteVP,
    LinearVP,
    Prediction,
    Process,
    denoiser,
    integrate,
    transfer,
)
from steersman.errors import InputError

TABLE = alphas_cumprod()
DISCRETE = DiscreteVP(TABLE)


class NoiseRatioTime(Process):
    """The same marginals with time r = sigma / alpha, in which the transfer is exactly linear."""

    earliest, start = 0.0, 1e4

    def alpha_bar(self, r: float) -> float:
        return 1.0 / (1.0 + r * r)

    def slope(self, r: float) -> tuple[float, float]:
        raise NotImplementedError


MEANS = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64) ** 2
WEIGHTS = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
STARTS = torch.from_numpy(norm.ppf((np.arange(64) + 0.5) / 64))


def mixture_eps(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The ideal network for the one-dimensional mixture of three Gaussians."""
    offset, v = x[:, None] - alpha * MEANS, alpha**2 * VARIANCES + sigma**2
    r = torch.softmax(WEIGHTS.log() - 0.5 * v.log() - 0.5 * offset**2 / v, dim=1)
    return sigma * (r * offset / v).sum(1)


def ideal(process: Process):
    return denoiser(process, lambda x, t: mixture_eps(x, process.alpha(t), process.sigma(t)))


def errors(process: Process, solver, grid_ends, steps, exact) -> list[float]:
    return [
        (integrate(solver, ideal(process), STARTS, np.linspace(*grid_ends, n + 1)).x - exact).abs().mean().item()
        for n in steps
    ]


def slopes(values: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in pairwise(values)]


@pytest.fixture(scope="module")
def exact_in_time() -> torch.Tensor:
    process = LinearVP()

    def rhs(t, y):
        eps = mixture_eps(torch.from_numpy(y), process.alpha(t), process.sigma(t)).numpy()
        dalpha, dsigma = process.slope(t)
        return dalpha * (y - process.sigma(t) * eps) / process.alpha(t) + dsigma * eps

    solution = solve_ivp(rhs, (0.9, 0.05), STARTS.numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1])


def random_case(seed: int):
    g = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, 16, generator=g, dtype=torch.float64)
    t, s = sorted(torch.randperm(1000, generator=g)[:2].tolist(), reverse=True)
    return x, eps, t, s


# ------------------------------------------------------------------ exact checks


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("seed", range(20))
def test_the_transfer_is_ddims_formula(seed):
    x, eps, t, s = random_case(seed)
    at, as_ = TABLE[t], TABLE[s]
    ddim = math.sqrt(as_) * (x - math.sqrt(1 - at) * eps) / math.sqrt(at) + math.sqrt(1 - as_) * eps
    assert relative(transfer(DISCRETE, x, eps, t, s), ddim) < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_the_transfer_stays_on_the_manifold_and_composes(seed):
    x0, eps, t, s = random_case(seed)
    a, b = DISCRETE.alpha, DISCRETE.sigma
    noisy = a(t) * x0 + b(t) * eps
    assert relative(transfer(DISCRETE, noisy, eps, t, s), a(s) * x0 + b(s) * eps) < 1e-12
    middle = (t + s) // 2
    twice = transfer(DISCRETE, transfer(DISCRETE, noisy, eps, t, middle), eps, middle, s)
    assert relative(twice, transfer(DISCRETE, noisy, eps, t, s)) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", [range(990, -1, -99), [900, 640, 300, 280, 100, 7]])
def test_with_a_constant_eps_every_variant_is_ddim(variant, grid):
    x, eps, _, _ = random_case(0)
    constant = denoiser(DISCRETE, lambda x, t: eps)
    ours = integrate(PNDMSolver(DISCRETE, variant), constant, x, grid).x
    assert relative(ours, integrate(DDIM(DISCRETE), constant, x, grid).x) < 1e-12


@pytest.mark.parametrize(
    ("variant", "order", "at_20"),
    [
        ("ddim", 1.0, 0.05601),
        ("s-pndm", 2.0, 0.00597),
        ("plms", 2.0, 0.00467),
        ("f-pndm", 2.0, 0.00469),
        ("prk", 2.0, 0.00193),
    ],
)
def test_convergence_order_in_time_and_error_at_20_steps(variant, order, at_20, exact_in_time):
    process = LinearVP()
    solver = DDIM(process) if variant == "ddim" else PNDMSolver(process, variant)
    first, *rest = errors(process, solver, (0.9, 0.05), (20, 160, 320, 640, 1280), exact_in_time)
    assert first == pytest.approx(at_20, rel=0.01)  # the variants do differ
    assert slopes(rest) == pytest.approx([order] * 3, abs=0.1)


def test_order_four_where_time_is_the_noise_ratio():
    process, continuous = NoiseRatioTime(), LinearVP()
    ends = [continuous.sigma(t) / continuous.alpha(t) for t in (0.9, 0.05)]

    def rhs(r, y):
        alpha = process.alpha(r)
        return mixture_eps(torch.from_numpy(y * alpha), alpha, process.sigma(r)).numpy()

    y = STARTS.numpy() / process.alpha(ends[0])
    solution = solve_ivp(rhs, ends, y, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1] * process.alpha(ends[1])
    exact = torch.from_numpy(solution)
    assert slopes(errors(process, PNDMSolver(process, "f-pndm"), ends, (1280, 2560), exact))[0] >= 3.5
    assert min(slopes(errors(process, PNDMSolver(process, "prk"), ends, (160, 320, 640), exact))) >= 3.7


@pytest.mark.parametrize("steps", [4, 10, 25])
def test_network_calls(steps):
    grid = np.linspace(0.9, 0.05, steps + 1)
    process = LinearVP()
    calls = {v: integrate(PNDMSolver(process, v), ideal(process), STARTS, grid).calls for v in VARIANTS}
    calls["ddim"] = integrate(DDIM(process), ideal(process), STARTS, grid).calls
    assert calls == {"ddim": steps, "s-pndm": steps + 1, "plms": steps + 1, "f-pndm": steps + 9, "prk": 4 * steps}
    for variant in ("s-pndm", "plms", "f-pndm"):
        scheduler = PNDMScheduler(variant=variant)
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == calls[variant]


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    """Any smooth function will do as a network."""
    return torch.tanh(0.3 * x + float(t) / 1000) + 0.1 * x.flip(-1)


def run(scheduler, steps: int, dtype=torch.float64, seed: int = 0, net=network) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
    return x


def peer(skip_prk_steps: bool, set_alpha_to_one: bool = False, double: bool = True, **more):
    """diffusers' scheduler, and ours of the same settings."""
    theirs = diffusers.PNDMScheduler(skip_prk_steps=skip_prk_steps, set_alpha_to_one=set_alpha_to_one, **more)
    ours = PNDMScheduler.from_config(theirs.config, variant="plms" if skip_prk_steps else "f-pndm")
    if double:
        theirs.alphas_cumprod = torch.from_numpy(TABLE)
        theirs.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else theirs.alphas_cumprod[0]
    return ours, theirs


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize(
    ("skip_prk_steps", "steps"), [(True, 20), (True, 50), (True, 30), (True, 40), (False, 20), (False, 50)]
)
def test_agrees_with_diffusers(skip_prk_steps, steps, set_alpha_to_one):
    ours, theirs = peer(skip_prk_steps, set_alpha_to_one)
    assert relative(run(ours, steps), run(theirs, steps)) < 1e-12
    ours, theirs = peer(skip_prk_steps, set_alpha_to_one, double=False)
    assert relative(run(ours, steps, torch.float32), run(theirs, steps, torch.float32)) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_runs_are_bit_equal(variant):
    scheduler = PNDMScheduler(variant=variant)
    first = run(scheduler, 12)
    scheduler.set_timesteps(9)
    for t in scheduler.timesteps[:5]:  # a run that is given up leaves nothing behind
        scheduler.step(torch.ones(2, 3, 4, 4), t, torch.ones(2, 3, 4, 4))
    assert torch.equal(run(scheduler, 12), first)


# ------------------------------------------------------------------ weights on unequal steps


def test_adams_bashforth_tables_and_polynomials():
    for n, table in ADAMS_BASHFORTH.items():
        assert sum(table) == pytest.approx(1.0, abs=1e-15)
        assert adams_bashforth(tuple(100.0 + 10 * j for j in range(n)), 90.0) == table
    times, s = (50.0, 61.0, 75.0, 100.0), 43.0
    weights = adams_bashforth(times, s)
    for degree in range(4):
        mean = (50.0 ** (degree + 1) - s ** (degree + 1)) / ((degree + 1) * (50.0 - s))
        assert sum(w * u**degree for w, u in zip(weights, times, strict=True)) == pytest.approx(mean, rel=1e-9)


def test_unequal_steps_keep_the_order(exact_in_time):
    process = LinearVP()
    solver = PNDMSolver(process, "plms")

    def error(n: int) -> float:
        u = np.linspace(0, 1, n + 1)
        grid = 0.9 + (0.05 - 0.9) * (u + 0.3 * np.sin(2 * np.pi * u) / (2 * np.pi))
        return (integrate(solver, ideal(process), STARTS, grid).x - exact_in_time).abs().mean().item()

    assert slopes([error(n) for n in (160, 320, 640)]) == pytest.approx([2.0, 2.0], abs=0.1)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_erratum_step_length_of_other_spacings(spacing):
    """It moves by T // N whatever the spacing, and evaluates next somewhere else."""

    def net(x, t):
        return mixture_eps(x.flatten(), DISCRETE.alpha(float(t)), DISCRETE.sigma(float(t))).reshape(x.shape)

    ours = PNDMScheduler(timestep_spacing=spacing)
    theirs = diffusers.PNDMScheduler(timestep_spacing=spacing, skip_prk_steps=True, set_alpha_to_one=True)
    theirs.alphas_cumprod = torch.from_numpy(TABLE)
    reference = run(PNDMScheduler(timestep_spacing=spacing), 1000, net=net)
    ours_error = (run(ours, 60, net=net) - reference).abs().mean()
    theirs_error = (run(theirs, 60, net=net) - reference).abs().mean()
    assert ours_error < theirs_error


# ------------------------------------------------------------------ the authors' indexing


def authors_f_pndm(net, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Algorithm 2 with the index shift of the authors' code: abar is read at int(t) + 1, the end is t = -1."""
    skip = 1000 // steps
    sequence = list(range(0, 1000, skip))

    def phi(x, e, t, s):
        at, as_ = TABLE[int(t) + 1], TABLE[int(s) + 1]
        root = math.sqrt((1 - as_) * at) + math.sqrt((1 - at) * as_)
        return x + (as_ - at) * (x / (math.sqrt(at) * (math.sqrt(at) + math.sqrt(as_))) - e / (math.sqrt(at) * root))

    history: list[torch.Tensor] = []
    for t, s in zip(reversed(sequence), [*reversed(sequence[:-1]), -1], strict=True):
        e1 = net(x, t)
        history = [e1, *history]
        if len(history) <= 3:
            m = (t + s) / 2
            e2 = net(phi(x, e1, t, m), m)
            e3 = net(phi(x, e2, t, m), m)
            e = (e1 + 2 * e2 + 2 * e3 + net(phi(x, e3, t, s), s)) / 6
        else:
            e = (55 * history[0] - 59 * history[1] + 37 * history[2] - 9 * history[3]) / 24
        x = phi(x, e, t, s)
    return x


@pytest.mark.parametrize("steps", [8, 20, 40])  # 1000 / 8 and 1000 / 40 are odd: half-integer times
def test_official_index_is_the_authors_code(steps):
    scheduler = PNDMScheduler(variant="f-pndm", official_index=True)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative(run(scheduler, steps), authors_f_pndm(network, x, steps)) < 1e-13


def test_official_index_refuses_the_read_past_the_table():
    with pytest.raises(InputError, match="official_index"):
        PNDMScheduler(official_index=True).set_timesteps(1000)
    assert OfficialIndexVP(DISCRETE).alpha_bar(-1) == TABLE[0]


# ------------------------------------------------------------------ errata of diffusers' scheduler


def test_erratum_half_step_of_an_odd_step():
    """Its Runge-Kutta stages move to one time and evaluate at another where T // N is odd."""
    theirs = diffusers.PNDMScheduler(skip_prk_steps=False)
    theirs.set_timesteps(40)  # T // N = 25: from 975, it moves to 963 but evaluates at 962
    moved_to = []
    original = theirs._get_prev_sample
    theirs._get_prev_sample = lambda x, t, s, e: moved_to.append(int(s)) or original(x, t, s, e)
    x = torch.ones(1, 1, 2, 2)
    theirs.step(x, theirs.timesteps[0], x)
    assert moved_to == [963]
    assert theirs.timesteps[1] == 962
    ours, theirs = peer(skip_prk_steps=False)
    ours.set_timesteps(40)
    assert ours.timesteps[:4].tolist() == [975.0, 962.5, 962.5, 950.0]
    assert 1e-6 < relative(run(ours, 40), run(theirs, 40)) < 1e-2


def test_erratum_history_of_v():
    """Its history holds raw outputs; with v-prediction these are not noise estimates."""

    def v_network(x, t):  # v of the constant noise estimate 0.3
        alpha, sigma = DISCRETE.alpha(float(t)), DISCRETE.sigma(float(t))
        return (0.3 - sigma * x) / alpha

    ours, theirs = peer(skip_prk_steps=True, prediction_type="v_prediction", set_alpha_to_one=True)
    exact = run(DDIMScheduler(), 20, net=lambda x, t: torch.full_like(x, 0.3))
    assert relative(run(ours, 20, net=v_network), exact) < 1e-12
    assert relative(run(theirs, 20, net=v_network), exact) > 1e-3


def test_erratum_wasted_last_call():
    """With its defaults the last step goes from abar_0 to abar_0: the network's last output does nothing."""

    def runs(scheduler):
        outcomes = []
        for last in (0.0, 100.0):

            def net(x, t, last=last):
                return network(x, t) + (last if int(t) == 0 else 0.0)

            outcomes.append(run(scheduler, 20, net=net))
        return outcomes

    theirs = runs(peer(skip_prk_steps=True)[1])
    assert torch.equal(*theirs)
    ours = runs(PNDMScheduler())  # our default goes on to abar = 1
    assert not torch.equal(*ours)


# ------------------------------------------------------------------ bad input, and everything else works


def test_refusals():
    with pytest.raises(InputError, match=r"variant='pndm'.*plms, f-pndm, s-pndm, prk"):
        PNDMScheduler(variant="pndm")
    with pytest.raises(InputError, match=r"num_inference_steps=3 .*at least 4"):
        PNDMScheduler(variant="f-pndm").set_timesteps(3)
    with pytest.raises(InputError, match=r"num_inference_steps=1001"):
        PNDMScheduler().set_timesteps(1001)
    with pytest.raises(InputError, match="variantt"):
        PNDMScheduler.from_config(diffusers.DDPMScheduler().config, variantt="plms")


def test_from_the_middle_of_a_plan_the_order_grows_with_the_history():
    scheduler = PNDMScheduler(variant="f-pndm")
    scheduler.set_timesteps(20)
    begin = 12 + 5  # slots: three Runge-Kutta steps, then one each
    scheduler.set_begin_index(begin)
    x = start = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    times = [*(float(t) for t in scheduler.timesteps[begin:]), -50.0]
    history: list[torch.Tensor] = []
    y = start
    for t, s in pairwise(times):
        history = [network(y, t), *history][:4]
        weights = ADAMS_BASHFORTH[len(history)]
        y = transfer(DISCRETE, y, sum(w * e for w, e in zip(weights, history, strict=True)), t, s)
    assert relative(x, y) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from([*VARIANTS, "euler", ""]),
    steps=st.integers(-1, 30),
    train=st.integers(1, 25),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    official=st.booleans(),
)
def test_any_valid_setting_runs_and_any_other_names_its_parameter(variant, steps, train, spacing, kind, official):
    valid = variant in VARIANTS and 1 <= steps <= train and not (variant == "f-pndm" and steps < 4)
    try:
        scheduler = PNDMScheduler(
            num_train_timesteps=train,
            variant=variant,
            timestep_spacing=spacing,
            prediction_type=kind,
            official_index=official,
        )
        x = run(scheduler, steps)
    except InputError as error:
        named = {"variant", "num_inference_steps"} | ({"official_index"} if official else set())
        assert error.parameter in named
        assert not valid or error.parameter == "official_index"
    else:
        assert valid
        assert x.isfinite().all()


def test_prediction_kinds_agree():
    """The same x_0 told as eps, v or x_0 gives the same run."""

    def net(kind):
        def output(x, t):
            alpha, sigma = DISCRETE.alpha(float(t)), DISCRETE.sigma(float(t))
            p = Prediction(x, alpha, sigma, eps=network(x, t))
            return {"epsilon": p.eps, "sample": p.x0, "v_prediction": alpha * p.eps - sigma * p.x0}[kind]

        return output

    for variant in VARIANTS:
        results = [
            run(PNDMScheduler(variant=variant, prediction_type=k), 10, net=net(k))
            for k in ("epsilon", "sample", "v_prediction")
        ]
        assert relative(results[1], results[0]) < 1e-9
        assert relative(results[2], results[0]) < 1e-9
