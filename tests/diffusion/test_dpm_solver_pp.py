"""DPM-Solver++: closed forms, orders, the law of its noise, diffusers' schedulers, and where they err."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm

from steersman.diffusion import DDIMScheduler
from steersman.diffusion.classical import DDIM
from steersman.diffusion.dpm_solver_pp import (
    ALGORITHMS,
    GRIDS,
    METHODS,
    SOLVER_TYPES,
    AdaptiveDPMSolverPP,
    DPMSolverPP,
    DPMSolverPPScheduler,
    phi,
    singlestep_orders,
    update,
)
from steersman.diffusion.mmd_ddm import UnrolledSampler
from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.diffusion.scheduler import alphas_cumprod
from steersman.diffusion.solver import (
    VE,
    DiscreteVP,
    LinearVP,
    Prediction,
    Process,
    Solver,
    denoiser,
    integrate,
    plan,
    take,
)
from steersman.diffusion.time_grids import TIME_GRIDS, laid_out, levels, spaced_past
from steersman.errors import InputError
from steersman.reference import gaussians_model
from tests.diffusion import tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers: dpmsolver is deprecated

TABLE = alphas_cumprod()
DISCRETE = DiscreteVP(TABLE)
ODE = ("dpmsolver++", "dpmsolver")
SDE = ("sde-dpmsolver++", "sde-dpmsolver")


class LogSNRTime(Process):
    """A variance-preserving process whose time is -lambda, so that equal steps are equal in lambda."""

    start, earliest = 50.0, -50.0

    def alpha_bar(self, t: float) -> float:
        return 1.0 / (1.0 + math.exp(2.0 * t))

    def sigma(self, t: float) -> float:
        return 1.0 / math.sqrt(1.0 + math.exp(-2.0 * t))

    def log_snr(self, t: float) -> float:
        return -t

    def time_at(self, log_snr: float) -> float:
        return -log_snr

    def slope(self, t: float) -> tuple[float, float]:
        raise NotImplementedError


P = LogSNRTime()
MEANS = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64) ** 2
WEIGHTS = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
STARTS = torch.from_numpy(norm.ppf((np.arange(64) + 0.5) / 64))


def mixture_eps(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The ideal network for the one-dimensional mixture of three Gaussians."""
    offset, v = x[..., None] - alpha * MEANS, alpha**2 * VARIANCES + sigma**2
    r = torch.softmax(WEIGHTS.log() - 0.5 * v.log() - 0.5 * offset**2 / v, dim=-1)
    return sigma * (r * offset / v).sum(-1)


def ideal(process: Process):
    return denoiser(process, lambda x, t: mixture_eps(x, process.alpha(t), process.sigma(t)))


def even(n: int) -> list[float]:
    """From lambda = -2 to 3 in n equal steps."""
    return np.linspace(2.0, -3.0, n + 1).tolist()


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    """Where the mixture's probability flow takes STARTS from lambda = -2 to 3, by d(x / alpha) / dr = eps."""

    def rhs(r, y):
        alpha = 1.0 / math.sqrt(1.0 + r * r)
        return mixture_eps(torch.from_numpy(y * alpha), alpha, r * alpha).numpy()

    ends = (math.exp(2.0), math.exp(-3.0))
    y = STARTS.numpy() * math.sqrt(1.0 + ends[0] ** 2)
    solution = solve_ivp(rhs, ends, y, method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.from_numpy(solution.y[:, -1]) / math.sqrt(1.0 + ends[1] ** 2)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def slopes(values) -> list[float]:
    return [math.log2(a / b) for a, b in pairwise(values)]


def network(x: torch.Tensor, t) -> torch.Tensor:
    """Any smooth function will do as a network."""
    return torch.tanh(0.3 * x + float(t) / 1000) + 0.1 * x.flip(-1)


def run(scheduler, steps=None, dtype=torch.float64, net=network, seed: int = 0, shape=(2, 3, 4, 4), **more):
    if steps is not None:
        scheduler.set_timesteps(steps)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, **more).prev_sample
    return x


# ------------------------------------------------------------------ exact checks


def test_phi_is_its_series_and_its_recurrence():
    for z in (-40.0, -3.0, -1.0, -0.999, -0.3, -1e-4, 1e-9, 0.02, 0.999, 1.0, 5.0):
        for k, value in enumerate(phi(z)):  # phi_{k+1}(z) = int_0^1 e^{(1-u)z} u^k / k! du
            integral = quad(lambda u, k=k, z=z: math.exp((1 - u) * z) * u**k / math.factorial(k), 0, 1, epsrel=1e-13)[0]
            assert value == pytest.approx(integral, rel=1e-12)
    assert phi(0.0) == (1.0, 0.5, pytest.approx(1 / 6))


@pytest.mark.parametrize("algorithm", ODE)
@pytest.mark.parametrize("method", METHODS)
def test_order_one_is_ddim(algorithm, method):
    grid = np.linspace(0.9, 0.01, 21).tolist()
    process = LinearVP()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x = STARTS.to(dtype)
        net = denoiser(process, lambda x, t: mixture_eps(x.double(), process.alpha(t), process.sigma(t)).to(x.dtype))
        ours = integrate(DPMSolverPP(process, 1, method, algorithm), net, x, grid).x
        assert relative(ours, integrate(DDIM(process), net, x, grid).x) < tolerance


def test_order_one_as_a_scheduler_is_ddim_to_the_clean_end():
    for spacing, steps in itertools.product(("leading", "trailing", "linspace"), (1, 7, 20)):
        ddim = DDIMScheduler(timestep_spacing=spacing)
        theirs = run(ddim, steps)
        ours = DPMSolverPPScheduler(order=1)
        ours.set_timesteps(timesteps=ddim.timesteps.tolist())
        assert relative(run(ours), theirs) < 1e-12


ORDERS = {
    "1": (1, lambda **k: DPMSolverPP(P, 1, **k)),
    "2M": (2, lambda **k: DPMSolverPP(P, 2, **k)),
    "2S": (2, lambda **k: DPMSolverPP(P, 2, "singlestep", lower_order_final=False, **k)),
    "3S": (3, lambda **k: DPMSolverPP(P, 3, "singlestep", lower_order_final=False, compat=False, **k)),
    "3S as published": (3, lambda **k: DPMSolverPP(P, 3, "singlestep", lower_order_final=False, **k)),
    "3M": (3, lambda **k: DPMSolverPP(P, 3, compat=False, **k)),
    "3M as published": (2, lambda **k: DPMSolverPP(P, 3, **k)),
}


@pytest.mark.parametrize("algorithm", ODE)
@pytest.mark.parametrize("solver_type", SOLVER_TYPES)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, solver_type, algorithm, exact):
    """Global error halves by 2**order: the published third-order multistep is of second order."""
    order, make = ORDERS[name]
    solver = make(solver_type=solver_type, algorithm_type=algorithm)
    errors = [(integrate(solver, ideal(P), STARTS, even(n)).x - exact).abs().mean() for n in (480, 960)]
    assert slopes(errors) == pytest.approx([order], abs=0.05 if order == 1 else 0.1)


def test_a_third_order_multistep_that_starts_with_order_one_is_of_order_two(exact):
    class SelfStarted(DPMSolverPP):
        steps = Solver.steps  # one interval a step, the first of order 1

    errors = [
        (integrate(SelfStarted(P, 3, compat=False), ideal(P), STARTS, even(n)).x - exact).abs().mean()
        for n in (480, 960)
    ]
    assert slopes(errors) == pytest.approx([2.0], abs=0.1)


@pytest.mark.parametrize(
    ("method", "order"), [("multistep", 2), ("singlestep", 2), ("singlestep", 3), ("multistep", 3)]
)
def test_gaussian_data_in_closed_form(method, order):
    """x_s = alpha_s mu + sqrt((alpha_s**2 S + sigma_s**2) / (alpha_t**2 S + sigma_t**2)) (x_t - alpha_t mu)."""
    process = LinearVP()
    mu, S = torch.tensor([1.0, -0.5, 0.0]).double(), torch.tensor([0.3, 1.0, 0.01]).double()

    def level(t):
        return process.alpha(t), process.alpha(t) ** 2 * S + process.sigma(t) ** 2

    def net(x, t):
        alpha, v = level(t)
        return process.sigma(t) * (x - alpha * mu) / v

    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (a_t, v_t), (a_s, v_s) = level(1.0), level(1e-3)
    closed = a_s * mu + (v_s / v_t).sqrt() * (x - a_t * mu)
    solver = DPMSolverPP(process, order, method, solver_type="heun", compat=False, lower_order_final=False)
    errors = [
        relative(integrate(solver, denoiser(process, net), x, levels("logsnr", process, n + 1, 1.0)).x, closed)
        for n in (240, 480, 960)
    ]
    assert min(slopes(errors)) > order - 0.1
    assert errors[-1] < {2: 2e-5, 3: 1e-7}[order]


@pytest.mark.parametrize("grid", [even(7), [2.0, 1.9, 0.3, 0.2, -1.5, -2.0, -3.0]])
@pytest.mark.parametrize("compat", [True, False])
def test_a_constant_prediction_is_solved_exactly_by_every_variant(grid, compat):
    D = torch.tensor([[0.7, -0.3]], dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    t, s = grid[0], grid[-1]
    a = P.alpha
    at_end = {
        "dpmsolver++": P.sigma(s) / P.sigma(t) * (x - a(t) * D) + a(s) * D,
        "dpmsolver": a(s) / a(t) * (x - P.sigma(t) * D) + P.sigma(s) * D,
    }
    for algorithm, order, method, kind in itertools.product(ODE, (1, 2, 3), METHODS, SOLVER_TYPES):
        solver = DPMSolverPP(P, order, method, algorithm, kind, compat)
        if solver.of_data:
            net = lambda x, t: Prediction(x, a(t), P.sigma(t), x0=D)  # noqa: E731
        else:
            net = lambda x, t: Prediction(x, a(t), P.sigma(t), eps=D)  # noqa: E731
        assert relative(integrate(solver, net, x, grid).x, at_end[algorithm]) < 1e-12


def increments(solver: DPMSolverPP, polynomial, grid) -> list[tuple[int, int, float]]:
    """(i, calls so far, error) of each step whose D is ``polynomial`` of lambda: against the exact integral."""
    x, state, calls, found = torch.ones(1, 1, dtype=torch.float64), None, 0, []
    state = solver.init(x)
    for step in plan(solver, grid):
        start = x
        for k, t in enumerate(step.stages):
            D = torch.full_like(x, polynomial(-t))
            pred = Prediction(x, P.alpha(t), P.sigma(t), **({"x0": D} if solver.of_data else {"eps": D}))
            x, state = solver.stage(k, x, pred, step, state, torch.zeros_like)
            calls += 1
        h = step.t - step.s
        a = update(P, solver.algorithm_type, step.t, step.s).a
        rate = {"dpmsolver++": -1.0, "sde-dpmsolver++": -2.0}.get(solver.algorithm_type, 1.0)
        weight = (P.alpha(step.s) if solver.of_data else -P.sigma(step.s)) * (2.0 if solver.stochastic else 1.0)

        def integrand(u, t=step.t, h=h, rate=rate):
            return math.exp(rate * (h - u)) * polynomial(u - t)

        integral = quad(integrand, 0, h, epsrel=1e-13)[0]
        found.append((step.i, calls, abs((x - a * start).item() - weight * integral)))
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [2, 3])
def test_a_polynomial_prediction_is_solved_exactly(order, method, algorithm):
    """Taylor's type of order k + 1 is exact for degree k in lambda, the sde types in their deterministic part."""
    solver = DPMSolverPP(P, order, method, algorithm, "heun", compat=False, lower_order_final=False)
    polynomial = np.polynomial.Polynomial([0.4, -0.7, 0.3][:order])
    grid = [2.0, 1.7, 1.1, 0.4, -1.5, -2.2, -3.0]
    checked = [error for i, calls, error in increments(solver, polynomial, grid) if calls >= order]
    assert len(checked) >= 2
    assert max(checked) < 1e-12


@pytest.mark.parametrize("algorithm", ODE)
def test_erratum_half_of_the_second_derivative(algorithm):
    """With a prediction quadratic in lambda the whole D_2 is exact; the published half is off by 1e-3 and more."""
    polynomial = np.polynomial.Polynomial([0.4, -0.7, 0.3])
    for compat in (False, True):
        solver = DPMSolverPP(P, 3, algorithm_type=algorithm, compat=compat, lower_order_final=False)
        later = [error for i, calls, error in increments(solver, polynomial, even(10)) if calls > 3]
        assert (max(later) > 1e-3 and min(later) > 1e-4) if compat else max(later) < 1e-12


def test_midpoint_and_heun_differ_by_the_third_power_of_the_step():
    def difference(h: float) -> float:
        ends = []
        for kind in SOLVER_TYPES:
            solver = DPMSolverPP(P, 2, solver_type=kind, lower_order_final=False)
            ends.append(integrate(solver, ideal(P), STARTS, [0.5 + h, 0.5, 0.5 - h]).x)
        return (ends[0] - ends[1]).abs().max().item()

    assert slopes([difference(h) for h in (0.04, 0.02, 0.01)]) == pytest.approx([3.0, 3.0], abs=0.1)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compat", [True, False])
def test_sde_with_a_single_data_point_has_the_exact_law(order, method, compat):
    """x_s ~ N(alpha_s c, sigma_s**2) whatever the steps are."""
    c, n, grid = 0.8, 200_000, [2.0, 1.9, -0.5, -1.0, -1.1, -2.6]
    generator = torch.Generator().manual_seed(0)
    x = P.alpha(2.0) * c + P.sigma(2.0) * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    solver = DPMSolverPP(P, order, method, "sde-dpmsolver++", compat=compat)
    x = integrate(
        solver, lambda x, t: Prediction(x, P.alpha(t), P.sigma(t), x0=torch.full_like(x, c)), x, grid, generator
    ).x
    sigma = P.sigma(grid[-1])
    assert abs(x.mean().item() - P.alpha(grid[-1]) * c) < 4 * sigma / math.sqrt(n)
    assert abs(x.var().item() - sigma**2) < 4 * sigma**2 * math.sqrt(2 / n)


def law_at_the_end(solver: DPMSolverPP, grid, mu: float = 0.7, S: float = 0.16) -> float:
    """The variance error at the end of a run on N(mu, S): all is affine, so noise can be followed draw by draw."""

    def net(x, t):
        alpha, sigma = P.alpha(t), P.sigma(t)
        return Prediction(x, alpha, sigma, x0=mu + alpha * S / (alpha**2 * S + sigma**2) * (x - alpha * mu))

    draws = len(grid) - 1
    x = torch.zeros(draws + 2, 1, dtype=torch.float64)
    x[1] = 1.0  # row 0: what is added; row 1: and the start; row 2 + j: and draw j
    count = itertools.count(2)

    def noise(like):
        z = torch.zeros_like(like)
        z[next(count)] = 1.0
        return z

    state = solver.init(x)
    for step in plan(solver, grid):
        for k, t in enumerate(step.stages):
            x, state = solver.stage(k, x, net(x, t), step, state, noise)
    gains = x[1:, 0] - x[0, 0]
    (a_t, s_t), (a_s, s_s) = ((P.alpha(t), P.sigma(t)) for t in (grid[0], grid[-1]))
    variance = gains[0] ** 2 * (a_t**2 * S + s_t**2) + gains[1:].square().sum()
    return abs(variance.item() - a_s**2 * S - s_s**2)


@pytest.mark.parametrize("algorithm", SDE)
@pytest.mark.parametrize("solver_type", SOLVER_TYPES)
@pytest.mark.parametrize(
    ("method", "order"), [("multistep", 2), ("multistep", 3), ("singlestep", 2), ("singlestep", 3)]
)
def test_sde_weak_order_is_at_least_two(method, order, solver_type, algorithm):
    """The variance on Gaussian data, followed exactly; the strong order of all is bounded by the noise."""
    solver = DPMSolverPP(P, order, method, algorithm, solver_type, compat=False, lower_order_final=False)
    errors = [law_at_the_end(solver, even(n)) for n in (120, 240, 480)]
    assert min(slopes(errors)) > (1.7 if order == 3 else 1.9) or errors[-1] < 1e-7


def test_erratum_independent_noise_within_a_singlestep_step():
    """Its stages and its end draw noise of their own: the variance is then right to first order only."""
    grids = [even(n) for n in (120, 240, 480)]
    for algorithm, order in itertools.product(SDE, (2, 3)):
        published, path = (
            [
                law_at_the_end(DPMSolverPP(P, order, "singlestep", algorithm, compat=c, lower_order_final=False), g)
                for g in grids
            ]
            for c in (True, False)
        )
        assert max(slopes(published)) < 1.3
        assert published[-1] > 20 * path[-1]


def test_sde_coefficient_of_the_second_derivative():
    """h / 3 as h -> 0, per alpha_s D_2; the published one tends to -1 (halved in multistep)."""

    def coefficient(h: float, compat: bool, multistep: bool) -> float:
        # D is 0 at the start, and u**2 / 2 at the nodes: D_1 = 0 and D_2 = 1.
        nodes = (0.5 + h / 3, 0.5 + h / 2) if multistep else (0.5 - h / 3, 0.5 - h / 2)
        move = update(P, "sde-dpmsolver++", 0.5, 0.5 - h, nodes, "heun", compat, multistep)
        return sum(w * u * u / 2 for w, u in zip(move.weights[1:], (1 / 3, 1 / 2), strict=True)) / P.alpha(0.5 - h)

    for multistep in (True, False):
        assert coefficient(0.01, False, multistep) == pytest.approx(0.01 / 3, rel=0.01)
    assert coefficient(0.01, True, False) == pytest.approx(-1.0, abs=0.01)
    assert coefficient(0.1, False, True) == pytest.approx(0.0317, abs=1e-4)
    assert coefficient(0.1, True, True) == pytest.approx(-0.968 / 2, abs=1e-3)


def test_thresholding_is_per_sample_and_leaves_small_predictions_alone():
    scheduler = DPMSolverPPScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, prediction_type="sample")
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    small, large = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    t, x0 = scheduler.timesteps[0], torch.stack([small, 5 * large])
    seen = scheduler.step(x0, t, torch.randn(2, 3, 8, 8, generator=generator)).pred_original_sample
    assert torch.equal(seen[0], small)
    limit = (5 * large).abs().flatten().quantile(0.9)
    torch.testing.assert_close(seen[1], (5 * large).clamp(-limit, limit) / limit)
    assert seen.abs().max() <= 1.0


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("algorithm", ODE)
def test_adaptive_steps_go_to_the_end_and_as_near_as_they_are_told(order, algorithm, exact):
    x = STARTS[:, None]
    errors = []
    for tighter in (1.0, 0.1, 0.01):
        solver = AdaptiveDPMSolverPP(P, order, algorithm, rtol=0.05 * tighter, atol=0.0078 * tighter)
        found = integrate(solver, ideal(P), x, [2.0, -3.0])
        assert found.accepted[0][0] == 2.0
        assert found.accepted[-1][1] == -3.0
        assert all(before[1] == after[0] for before, after in pairwise(found.accepted))
        assert all(E <= 1.0 for _, _, E in found.accepted)
        assert found.calls == order * len(found.accepted) + (order - 1) * found.rejected
        errors.append((found.x[:, 0] - exact).abs().max().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 1e-3


def test_adaptive_without_any_error_grows_by_the_cap():
    """D constant: E = 0 (up to rounding), and the first steps are h, 10 h, 100 h, what is left."""
    calls = []

    def net(x, t):
        calls.append(t)
        return Prediction(x, P.alpha(t), P.sigma(t), x0=torch.full_like(x, 0.3))

    found = integrate(AdaptiveDPMSolverPP(P, 2, h=0.01), net, torch.ones(4, 1, dtype=torch.float64), [2.0, -3.0])
    ends = [s for _, s, _ in found.accepted]
    assert ends == pytest.approx([1.99, 1.89, 0.89, -3.0])
    assert found.calls == len(calls) == 8
    assert found.rejected == 0


def test_adaptive_shares_its_steps_over_the_batch():
    x = STARTS[:, None]
    together = integrate(AdaptiveDPMSolverPP(P), ideal(P), x, [2.0, -3.0])
    alone = integrate(AdaptiveDPMSolverPP(P), ideal(P), x[:1], [2.0, -3.0])
    assert together.accepted != alone.accepted


def test_adaptive_over_other_processes():
    for process, end in ((LinearVP(), 1e-3), (DISCRETE, 0.0), (VE(80.0, 0.01), 0.01)):
        x = process.prior((32, 1), torch.Generator().manual_seed(0), dtype=torch.float64)
        net = denoiser(process, lambda x, t, p=process: p.sigma(t) * x / (p.alpha(t) ** 2 * 0.25 + p.sigma(t) ** 2))
        found = integrate(AdaptiveDPMSolverPP(process, 2, rtol=1e-4, atol=1e-5), net, x, [process.start, end])
        a, s = process.alpha(process.start), process.sigma(process.start)
        b, r = process.alpha(end), process.sigma(end)
        closed = x * math.sqrt((b * b * 0.25 + r * r) / (a * a * 0.25 + s * s))
        assert relative(found.x, closed) < 1e-2
        assert found.accepted[-1][1] == end


# ------------------------------------------------------------------ diffusers' schedulers

PEERS = [
    (diffusers.DPMSolverMultistepScheduler, algorithm, order, kind)
    for algorithm, order, kind in itertools.product(ALGORITHMS, (1, 2, 3), SOLVER_TYPES)
    if (algorithm, order) != ("sde-dpmsolver", 3)
] + [
    (diffusers.DPMSolverSinglestepScheduler, algorithm, order, kind)
    for algorithm, order, kind in itertools.product(ALGORITHMS[:3], (1, 2, 3), SOLVER_TYPES)
]


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize(("peer", "algorithm", "order", "kind"), PEERS)
def test_compat_is_diffusers(peer, algorithm, order, kind, steps):
    """All that both have, from the peer's configuration, with the same generator."""
    final = {} if algorithm.endswith("++") else {"final_sigmas_type": "sigma_min"}
    theirs = peer(solver_order=order, algorithm_type=algorithm, solver_type=kind, lower_order_final=True, **final)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    ends = [run(s, steps, torch.float32, generator=torch.Generator().manual_seed(1)) for s in (ours, theirs)]
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert relative(*ends) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_settings_of_diffusers_carry_over(spacing, prediction, schedule):
    settings = {"timestep_spacing": spacing, "prediction_type": prediction, "beta_schedule": schedule}
    clip = -5.1 if schedule == "squaredcos_cap_v2" else -float("inf")
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=3, steps_offset=1, lambda_min_clipped=clip, **settings)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    for steps in (5, 16):
        a, b = run(ours, steps, torch.float32), run(theirs, steps, torch.float32)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert relative(a, b) < 2e-5
    assert DPMSolverPPScheduler.from_config(theirs.config, order=1).config["order"] == 1


@pytest.mark.parametrize(
    "other",
    [
        diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=False),
        diffusers.PNDMScheduler(timestep_spacing="leading", steps_offset=1, beta_schedule="scaled_linear"),
        diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
        diffusers.UniPCMultistepScheduler(timestep_spacing="linspace", solver_order=3),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("steps", [8, 20])
def test_in_the_place_of_another_scheduler_it_does_what_diffusers_does_there(other, steps):
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(other.config)
    ours = DPMSolverPPScheduler.from_config(other.config)
    a, b = run(ours, steps, torch.float32), run(theirs, steps, torch.float32)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert relative(a, b) < 1e-5


def test_names_of_diffusers_carry_over_where_they_mean_the_same():
    make, ours = diffusers.DPMSolverMultistepScheduler, DPMSolverPPScheduler.from_config
    config = ours(make(use_karras_sigmas=True, final_sigmas_type="sigma_min", euler_at_final=True).config).config
    assert (config["grid"], config["set_alpha_to_one"], config["euler_at_final"]) == ("karras", False, True)
    for name, grid in (("exponential_sigmas", "exponential"), ("beta_sigmas", "beta"), ("lu_lambdas", "logsnr")):
        assert ours(make(**{f"use_{name}": True}).config).config["grid"] == grid
    unipc = ours(diffusers.UniPCMultistepScheduler(solver_order=3).config).config
    assert (unipc["order"], unipc["solver_type"], unipc["grid"]) == (3, "midpoint", "spacing")
    deis = ours(diffusers.DEISMultistepScheduler().config).config  # which diffusers' own DPM-Solver refuses
    assert (deis["order"], deis["algorithm_type"], deis["solver_type"]) == (2, "dpmsolver++", "midpoint")
    assert ours(diffusers.DPMSolverSinglestepScheduler().config).config["method"] == "singlestep"
    # A second hop, and a changed setting on the way, are what they say.
    again = ours(ours(make(solver_order=3).config, set_alpha_to_one=False, order=1).config).config
    assert (again["order"], again["set_alpha_to_one"], again["timestep_spacing"]) == (1, False, "linspace")
    with pytest.raises(InputError, match="use_flow_sigmas"):
        ours(make(use_flow_sigmas=True, prediction_type="flow_prediction").config)


@pytest.mark.parametrize("lower_order_final", [True, False])
def test_thresholds_of_lower_order_final(lower_order_final):
    for steps, below in ((14, 15), (15, 15), (8, 5), (8, 9)):
        scheduler = DPMSolverPPScheduler(
            order=3,
            lower_order_final=lower_order_final,
            lower_order_below=below,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        scheduler.set_timesteps(steps)
        solver = scheduler._solver
        orders = [solver._order(slot.step, 3) for slot in scheduler._slots]
        lowered = lower_order_final and steps < below
        assert orders == [3] * (steps - 2) + ([2, 1] if lowered else [3, 3])
    last = DPMSolverPP(P, 3, euler_at_final=True)
    assert [last._order(step, 3) for step in plan(last, even(20))] == [3] * 19 + [1]


def test_orders_of_singlestep_for_a_budget():
    assert singlestep_orders(3, 9) == [3, 3, 2, 1]
    assert singlestep_orders(3, 10) == [3, 3, 3, 1]
    assert singlestep_orders(3, 8) == [3, 3, 2]
    assert singlestep_orders(3, 8, last_is_first=True) == [3, 3, 1, 1]
    assert singlestep_orders(3, 9, lower_order_final=False) == [3, 3, 3]
    assert singlestep_orders(2, 8) == [2, 2, 2, 1, 1]
    assert singlestep_orders(2, 8, lower_order_final=False) == [2, 2, 2, 2]
    assert singlestep_orders(2, 9) == [2, 2, 2, 2, 1]
    assert singlestep_orders(1, 3) == [1, 1, 1]
    for order, calls, lower, first in itertools.product((1, 2, 3), range(3, 40), (True, False), (True, False)):
        orders = singlestep_orders(order, calls, lower, first)
        assert sum(orders) == calls
        assert orders[-1] == 1 or not first


@pytest.mark.parametrize("calls", [4, 5, 9, 20, 31])
def test_network_calls_are_the_steps_asked_for(calls):
    for order, method, compat in itertools.product((1, 2, 3), METHODS, (True, False)):
        scheduler = DPMSolverPPScheduler(order=order, method=method, compat=compat)
        scheduler.set_timesteps(calls)
        assert len(scheduler.timesteps) == calls == scheduler.num_inference_steps
        assert int(scheduler.order) == 1
        solver = DPMSolverPP(P, order, method, compat=compat)
        assert integrate(solver, ideal(P), STARTS, even(calls)).calls == calls


# ------------------------------------------------------------------ errata of diffusers' schedulers


def theirs_on(polynomial, algorithm: str, steps: int) -> float:
    """The largest error of diffusers' third-order increments when x_0 is ``polynomial`` of lambda, without noise."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=3,
        algorithm_type=algorithm,
        use_lu_lambdas=True,
        final_sigmas_type="sigma_min",
        prediction_type="sample",
        lower_order_final=False,
    )
    scheduler.set_timesteps(steps)
    times = scheduler.sigmas.double().log().tolist()  # -lambda
    x, errors = torch.ones(1, 1, 1, 1), []
    k = 2.0 if algorithm.startswith("sde") else 1.0
    more = {"variance_noise": torch.zeros_like(x)} if k == 2.0 else {}
    for i, (t, s) in enumerate(pairwise(times[:-1])):
        after = scheduler.step(torch.full_like(x, polynomial(-t)), scheduler.timesteps[i], x, **more).prev_sample
        integral = quad(lambda u, s=s: k * math.exp(-k * (u - s)) * polynomial(-u), s, t)[0]
        errors.append(abs((after - update(P, algorithm, t, s).a * x).item() - P.alpha(s) * integral))
        x = after
    return max(errors[2:])


def test_erratum_diffusers_third_order_is_not_exact_for_a_parabola():
    """Its misses fall with the third power of the step instead of being 0, the sde type's with the second."""
    parabola = np.polynomial.Polynomial([0.4, -0.2, 0.1])
    for algorithm, power in (("dpmsolver++", 3.0), ("sde-dpmsolver++", 2.0)):
        errors = [theirs_on(parabola, algorithm, steps) for steps in (41, 81)]
        assert errors[0] > 1e-4
        assert slopes(errors) == pytest.approx([power], abs=0.15)


def test_erratum_diffusers_sde_third_order_does_not_converge():
    """The variance on Gaussian data: singlestep's is off by more than it is, multistep's falls to first order."""
    variance = P.alpha(-3.0) ** 2 * 0.16 + P.sigma(-3.0) ** 2
    for n in (60, 240):
        solver = DPMSolverPP(P, 3, "singlestep", "sde-dpmsolver++", "heun", lower_order_final=False)
        assert law_at_the_end(solver, even(n)) > variance
    errors = [law_at_the_end(DPMSolverPP(P, 3, "multistep", "sde-dpmsolver++"), even(n)) for n in (120, 240, 480)]
    assert max(slopes(errors)) < 1.1
    right = DPMSolverPP(P, 3, "multistep", "sde-dpmsolver++", compat=False)
    assert errors[-1] > 20 * law_at_the_end(right, even(480))


def test_erratum_diffusers_has_no_third_order_of_sde_dpmsolver():
    theirs = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"
    )
    with pytest.raises(UnboundLocalError):
        run(theirs, 20, torch.float32)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    assert run(ours, 20, torch.float32, generator=torch.Generator().manual_seed(0)).isfinite().all()


def test_erratum_thresholding_of_diffusers_is_clipping():
    """Its cap of 1 leaves nothing of the quantile."""
    x0 = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.DPMSolverMultistepScheduler(thresholding=True)
    assert torch.equal(theirs._threshold_sample(x0), x0.clamp(-1, 1))
    ours = DPMSolverPPScheduler.from_config(theirs.config, prediction_type="sample")
    ours.set_timesteps(10)
    seen = ours.step(x0, ours.timesteps[0], x0).pred_original_sample
    limit = x0.abs().flatten(1).quantile(0.995, 1)[:, None, None, None]
    torch.testing.assert_close(seen, x0.clamp(-limit, limit) / limit)


@pytest.mark.parametrize(
    ("name", "grid"), [("karras_sigmas", "karras"), ("lu_lambdas", "logsnr"), ("exponential_sigmas", "exponential")]
)
def test_erratum_whole_timesteps_under_grids_of_sigma(name, grid):
    """It tells the network a whole timestep and computes with another sigma; ours agree."""
    theirs = diffusers.DPMSolverMultistepScheduler(**{f"use_{name}": True})
    theirs.set_timesteps(20)
    told = np.sqrt((1 - TABLE) / TABLE)[theirs.timesteps.numpy()]
    assert np.abs(np.log(told / theirs.sigmas[:-1].numpy())).max() > 0.01
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    ours.set_timesteps(20)
    assert not ours.timesteps.equal(ours.timesteps.round())
    sigmas = [slot.sigma / slot.alpha for slot in ours._slots]
    np.testing.assert_allclose(sigmas, theirs.sigmas[:-1].numpy(), rtol=1e-3)
    for t, sigma in zip(ours.timesteps.tolist(), sigmas, strict=True):
        assert DISCRETE.sigma(t) / DISCRETE.alpha(t) == pytest.approx(sigma, rel=1e-4)
    assert grid == ours.config["grid"]


def test_erratum_wasted_call_of_karras_with_sigma_min():
    """Its last step goes from sigma_min to sigma_min; ours spends that call on the way."""
    theirs = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min")
    theirs.set_timesteps(10)
    assert theirs.sigmas[-1] == pytest.approx(theirs.sigmas[-2].item(), rel=1e-6)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    ours.set_timesteps(10)
    assert ours._slots[-1].t > 5.0


def test_erratum_second_stage_of_diffusers_singlestep():
    """The authors' second stage is Taylor's for both types; diffusers' follows the solver type."""
    t, s1, s2, s = even(3)
    x, D = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[[0.2]], [[0.9]], [[0.1]]], dtype=torch.float64)
    ends = {}
    for compat, kind in itertools.product((True, False), SOLVER_TYPES):
        solver = DPMSolverPP(P, 3, "singlestep", solver_type=kind, compat=compat, lower_order_final=False)
        (step,), state, y = plan(solver, [t, s1, s2, s]), solver.init(x), x
        for k in range(2):
            pred = Prediction(y, P.alpha(step.stages[k]), P.sigma(step.stages[k]), x0=D[k])
            y, state = solver.stage(k, y, pred, step, state, torch.zeros_like)
        ends[compat, kind] = y.item()
    r, h = 2.0, t - s2  # r_2 / r_1, and r_2 h
    phi_1 = math.expm1(-h)
    taylor = P.sigma(s2) / P.sigma(t) - P.alpha(s2) * phi_1 * 0.2 + r * P.alpha(s2) * (phi_1 / h + 1) * 0.7
    for key in ((True, "heun"), (False, "heun"), (False, "midpoint")):
        assert ends[key] == pytest.approx(taylor, rel=1e-12)
    assert abs(ends[True, "midpoint"] - taylor) > 0.05


# ------------------------------------------------------------------ time grids


@pytest.mark.parametrize("grid", TIME_GRIDS)
@pytest.mark.parametrize("process", [DISCRETE, DiscreteVP(TABLE, TABLE[0])])
def test_grids_fall_from_start_to_the_clean_end(grid, process):
    for steps in (1, 2, 7, 50):
        times = laid_out(grid, process, steps, 999.0)
        assert len(times) == steps + 1
        assert times[0] == 999.0
        assert times[-1] == -1.0
        assert all(s < t for t, s in pairwise(times))
        if steps > 1 and process.final == 1.0:
            assert times[-2] == 0.0  # the last call is at the network's earliest timestep
        if process.final < 1.0:
            assert times[-2] > 0.0  # and none is spent at the level where the run ends


def test_grids_are_even_in_what_they_say():
    def lam(t):
        return DISCRETE.log_snr(t)

    for grid in ("logsnr", "exponential"):
        assert np.diff([lam(t) for t in levels(grid, DISCRETE, 12, 999.0)]) == pytest.approx((lam(0) - lam(999)) / 11)
    karras = [math.exp(-lam(t) / 7) for t in levels("karras", DISCRETE, 12, 999.0)]
    assert np.diff(karras) == pytest.approx(karras[1] - karras[0])
    roots = np.sqrt(levels("quadratic", DISCRETE, 12, 999.0))
    assert np.diff(roots) == pytest.approx(-math.sqrt(999) / 11)
    theirs = diffusers.DPMSolverMultistepScheduler(use_beta_sigmas=True)
    theirs.set_timesteps(12)
    sigmas = [math.exp(-lam(t)) for t in levels("beta", DISCRETE, 12, 999.0)]
    np.testing.assert_allclose(sigmas, theirs.sigmas[:-1], rtol=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 333])
def test_the_dpm_grid_is_diffusers(spacing, steps):
    theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    grid = spaced_past(spacing, steps, 1000, 1000)
    assert grid[:-1] == theirs.timesteps.tolist()
    assert grid[-1] == -1.0


def test_the_cosine_schedule_is_clipped_as_the_authors_do():
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    table = alphas_cumprod(**cosine)
    first = int((0.5 * np.log(table / (1 - table)) >= -5.1).sum()) - 1
    assert first < 999
    for grid in GRIDS:
        ours = DPMSolverPPScheduler(grid=grid, timestep_spacing="linspace", **cosine)
        ours.set_timesteps(10)
        assert ours.timesteps[0] == pytest.approx(first)
        free = DPMSolverPPScheduler(grid=grid, timestep_spacing="linspace", lambda_min_clipped=-math.inf, **cosine)
        free.set_timesteps(10)
        assert free.timesteps[0] == pytest.approx(999)
    linear = DPMSolverPPScheduler(grid="logsnr", lambda_min_clipped=-3.0)
    linear.set_timesteps(10)
    assert DISCRETE.log_snr(float(linear.timesteps[0])) == pytest.approx(-3.0, abs=0.02)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"order": 0}, "order"),
        ({"order": 4}, "order"),
        ({"order": 2.5}, "order"),
        ({"order": True}, "order"),
        ({"method": "multi"}, "method"),
        ({"algorithm_type": "dpm"}, "algorithm_type"),
        ({"solver_type": "taylor"}, "solver_type"),
        ({"grid": "lu"}, "grid"),
        ({"lower_order_below": -1}, "lower_order_below"),
        ({"lambda_min_clipped": 9.0}, "lambda_min_clipped"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, parameter):
    with pytest.raises(InputError) as refused:
        DPMSolverPPScheduler(**settings)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_cannot_be_is_refused(method):
    for order in (2, 3):
        with pytest.raises(InputError, match=f"num_inference_steps={order - 1} .*at least {order} for order={order}"):
            DPMSolverPPScheduler(order=order, method=method).set_timesteps(order - 1)
    for algorithm in ("dpmsolver", "sde-dpmsolver"):
        scheduler = DPMSolverPPScheduler(algorithm_type=algorithm, method=method)
        with pytest.raises(InputError, match=rf"algorithm_type='{algorithm}'.*dpmsolver\+\+.*set_alpha_to_one=False"):
            scheduler.set_timesteps(10)
        dark = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": False}
        scheduler = DPMSolverPPScheduler(algorithm_type=algorithm, method=method, prediction_type="sample", **dark)
        with pytest.raises(InputError, match="no signal"):
            scheduler.set_timesteps(10)
    with pytest.raises(InputError, match=r"prediction_type='epsilon'.*v_prediction or sample"):
        DPMSolverPPScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", method=method).set_timesteps(10)
    with pytest.raises(InputError, match=r"grid='karras'.*no signal"):
        DPMSolverPPScheduler(rescale_betas_zero_snr=True, grid="karras", prediction_type="sample").set_timesteps(10)
    for grid in GRIDS:
        with pytest.raises(InputError, match="num_inference_steps=1001"):
            DPMSolverPPScheduler(grid=grid).set_timesteps(1001)
    for times in ([2.0, 2.0, 1.0], [1.0, 2.0, 3.0], [60.0, 1.0, 0.0]):
        with pytest.raises(InputError, match="times"):
            integrate(DPMSolverPP(P, 2, method), ideal(P), STARTS, times)
    with pytest.raises(InputError, match=r"solver_order.*order"):
        DPMSolverPPScheduler.from_config(diffusers.DDPMScheduler().config, solver_order=3)


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"order": 1}, "order"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ({"solver_type": "taylor"}, "solver_type"),
        ({"rtol": 0.0}, "rtol"),
        ({"atol": -1.0}, "atol"),
        ({"h": math.inf}, "h"),
        ({"theta": 1.5}, "theta"),
        ({"growth": 1.0}, "growth"),
    ],
)
def test_adaptive_refuses_a_wrong_setting(settings, parameter):
    with pytest.raises(InputError) as refused:
        AdaptiveDPMSolverPP(P, **settings)
    assert refused.value.parameter == parameter


def test_adaptive_refuses_what_it_cannot_do():
    x = STARTS[:, None]
    adaptive = AdaptiveDPMSolverPP(DISCRETE)
    with pytest.raises(InputError, match=r"times=-1\.0 .*sigma > 0"):
        integrate(adaptive, ideal(DISCRETE), x, [999.0, -1.0])
    dark = DiscreteVP(alphas_cumprod(rescale_betas_zero_snr=True))
    with pytest.raises(InputError, match="some signal"):
        integrate(AdaptiveDPMSolverPP(dark), ideal(dark), x, [999.0, 0.0])
    with pytest.raises(InputError, match="denoiser=nan"):
        integrate(adaptive, denoiser(DISCRETE, lambda x, t: x * math.nan), x, [999.0, 0.0])
    rough = denoiser(DISCRETE, lambda x, t: torch.randn_like(x))
    with pytest.raises(InputError, match="rtol=1e-12"):
        integrate(AdaptiveDPMSolverPP(DISCRETE, rtol=1e-12, atol=1e-14), rough, x, [999.0, 0.0])


@settings(max_examples=60, deadline=None)
@given(
    order=st.sampled_from([0, 1, 2, 3, 4]),
    method=st.sampled_from(METHODS),
    algorithm=st.sampled_from(ALGORITHMS),
    grid=st.sampled_from(GRIDS),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    steps=st.integers(-1, 30),
    train=st.integers(1, 25),
    compat=st.booleans(),
    clean=st.booleans(),
)
def test_any_valid_setting_runs_and_any_other_names_its_parameter(
    order, method, algorithm, grid, spacing, kind, steps, train, compat, clean
):
    named = {"order", "num_inference_steps", "algorithm_type", "timesteps", "times"}
    try:
        scheduler = DPMSolverPPScheduler(
            num_train_timesteps=train,
            order=order,
            method=method,
            algorithm_type=algorithm,
            grid=grid,
            timestep_spacing=spacing,
            prediction_type=kind,
            compat=compat,
            set_alpha_to_one=clean,
        )
        x = run(scheduler, steps, generator=torch.Generator().manual_seed(0))
    except InputError as error:
        assert error.parameter in named
    else:
        assert order in (1, 2, 3)
        assert order <= steps <= train
        assert x.isfinite().all()


# ------------------------------------------------------------------ in pipelines, and with other methods

SCHEDULERS = {
    "2M": {},
    "3M": {"order": 3, "compat": False},
    "2S": {"order": 2, "method": "singlestep"},
    "3S": {"order": 3, "method": "singlestep", "compat": False, "grid": "karras"},
    "sde 2M": {"algorithm_type": "sde-dpmsolver++"},
    "sde 3S": {"algorithm_type": "sde-dpmsolver++", "order": 3, "method": "singlestep", "compat": False},
    "noise 2M": {"algorithm_type": "dpmsolver", "set_alpha_to_one": False, "steps_offset": 1},
}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def twins(count: int):
    return [torch.Generator().manual_seed(0) for _ in range(count)]


@every_scheduler
def test_the_adapter_is_integrate(name):
    scheduler = DPMSolverPPScheduler(**SCHEDULERS[name])
    ours = run(scheduler, 9, generator=torch.Generator().manual_seed(1))
    grid = [*(slot.t for slot in scheduler._slots), -1.0]
    process = scheduler._solver.process
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direct = integrate(scheduler._solver, denoiser(process, network), x, grid, torch.Generator().manual_seed(1))
    assert relative(ours, direct.x) < 1e-6  # timesteps are told in float32
    assert direct.calls == 9


@every_scheduler
def test_prediction_kinds_agree(name):
    def net(kind, scheduler):
        def output(x, t):
            alpha, sigma = DISCRETE.alpha(float(t)), DISCRETE.sigma(float(t))
            p = Prediction(x, alpha, sigma, eps=network(x, t))
            return {"epsilon": p.eps, "sample": p.x0, "v_prediction": alpha * p.eps - sigma * p.x0}[kind]

        return output

    ends = []
    for kind in ("epsilon", "sample", "v_prediction"):
        scheduler = DPMSolverPPScheduler(prediction_type=kind, **SCHEDULERS[name])
        ends.append(run(scheduler, 10, net=net(kind, scheduler), generator=torch.Generator().manual_seed(0)))
    assert relative(ends[1], ends[0]) < 1e-5
    assert relative(ends[2], ends[0]) < 1e-5


@every_scheduler
def test_a_zero_signal_start(name):
    if name == "noise 2M":
        return  # refused, see above
    arguments = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    settings = {k: v for k, v in SCHEDULERS[name].items() if k != "grid"}
    scheduler = DPMSolverPPScheduler(**arguments, **settings)
    x = run(scheduler, 10, generator=torch.Generator().manual_seed(0))
    assert scheduler.timesteps[0] == 999
    assert x.isfinite().all()
    assert x.abs().max() < 20


@every_scheduler
def test_particles_can_be_reindexed_at_every_call(name):
    index = torch.tensor([2, 2, 0])

    def sample(at):
        scheduler = DPMSolverPPScheduler(**SCHEDULERS[name])
        scheduler.set_timesteps(9)
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        generators = twins(3)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(network(x, t), t, x, generator=generators).prev_sample
            if i == at:
                scheduler.take(index)
                x = x[index]
        return x

    whole = sample(None)[index]
    for at in range(9):
        assert relative(sample(at), whole) < 1e-12


@every_scheduler
def test_states_hold_no_more_than_they_need(name):
    scheduler = DPMSolverPPScheduler(**SCHEDULERS[name])
    scheduler.set_timesteps(9)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for slot, t in zip(scheduler._slots[:-1], scheduler.timesteps, strict=False):
        x = scheduler.step(network(x, t), t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        state = scheduler._state
        if slot.k + 1 == len(slot.step.stages):
            most = scheduler.config["order"] - 1 if scheduler.config["method"] == "multistep" else 0
            assert len(state.D) <= most
            assert state.noise is None
            assert state.x is x
        again = take(state, torch.arange(3))
        assert all(torch.equal(a, b) for a, b in zip(again.D, state.D, strict=True))


def test_from_the_middle_of_a_plan_the_order_grows_with_the_history():
    scheduler = DPMSolverPPScheduler(order=3)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(12)
    x = start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps[12:]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    fresh = DPMSolverPPScheduler(order=3, lower_order_final=False)
    fresh.set_timesteps(timesteps=scheduler.timesteps[12:].tolist())
    y = start
    for t in fresh.timesteps:
        y = fresh.step(network(y, t), t, y).prev_sample
    assert torch.equal(x, y)


@every_scheduler
def test_each_sample_of_a_list_of_generators_is_alone(name):
    scheduler = DPMSolverPPScheduler(**SCHEDULERS[name])

    def sample(seeds):
        x = torch.cat([torch.randn(1, 3, generator=torch.Generator().manual_seed(s)).double() for s in seeds])
        scheduler.set_timesteps(8)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generators).prev_sample
        return x

    assert relative(sample([3, 4, 5])[1:2], sample([4])) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_get_float32_states(dtype):
    scheduler = DPMSolverPPScheduler(order=3)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(network(x, t), t, x).prev_sample
        assert x.dtype == dtype
        assert all(D.dtype == torch.float32 for D in scheduler._state.D)


@every_scheduler
def test_stable_diffusion_and_image_to_image(name):
    pipe = tiny.stable_diffusion()
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config, **SCHEDULERS[name])

    def sample(pipe, **more):
        generator = torch.Generator().manual_seed(0)
        return pipe(**tiny.EMBEDS, guidance_scale=3.0, generator=generator, output_type="latent", **more).images

    base = sample(pipe, num_inference_steps=6)
    assert base.isfinite().all()
    assert torch.equal(base, sample(pipe, num_inference_steps=6))
    second = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    picture = torch.zeros(1, 3, 16, 16)
    for strength in (0.3, 0.5, 1.0):
        assert sample(second, image=picture, strength=strength, num_inference_steps=9).isfinite().all()


def test_saved_and_loaded_it_samples_the_same(tmp_path):
    pipe = tiny.unconditional()
    pipe.scheduler = DPMSolverPPScheduler.from_config(
        pipe.scheduler.config, order=3, method="singlestep", grid="karras", lambda_min_clipped=-4.0
    )

    def sample(pipe):
        return pipe(
            batch_size=2, num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images

    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is DPMSolverPPScheduler
    assert dict(again.scheduler.config).items() >= {"order": 3, "grid": "karras", "lambda_min_clipped": -4.0}.items()
    np.testing.assert_array_equal(sample(again), sample(pipe))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guided_classes_come_out_right(guidance):
    """With an exact network: 20 calls of order 2 put samples onto the mode that they were asked for."""
    pipe = gaussians_model.pipeline("gaussians:ring-sharp")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, ClassConditionalPipeline)
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config, grid="logsnr")
    labels = torch.arange(64) % 8
    out = pipe(
        labels,
        guidance_scale=guidance,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    points = out.images[:, :, 0, 0]
    angle = torch.atan2(points[:, 1], points[:, 0])
    assert torch.equal((angle / (math.pi / 4)).round().long() % 8, labels)


def test_mmd_ddm_tunes_a_network_through_it():
    """Unrolled and differentiated; the derivative along the gradient is that of finite differences."""
    torch.manual_seed(0)
    unet = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = unet

        def forward(self, x, t):
            return self.inner(x) + t[:, None] / 1000

    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for order, method in itertools.product((1, 2, 3), METHODS):
        chain = UnrolledSampler(
            Network(), diffusers.DDPMScheduler(), 6, solver=lambda p, o=order, m=method: DPMSolverPP(p, o, m)
        )
        weight = unet[0].weight
        (gradient,) = torch.autograd.grad(chain(noise).square().mean(), [weight])
        with torch.no_grad():
            h = 1e-6 / gradient.norm()
            ends = []
            for sign in (1, -1):
                weight += sign * h * gradient
                ends.append(chain(noise).square().mean().item())
                weight -= sign * h * gradient
        assert (ends[0] - ends[1]) / (2 * h.item()) == pytest.approx(gradient.square().sum().item(), rel=1e-5)
