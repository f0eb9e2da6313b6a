"""The solver protocol: processes, predictions, explicit state at every stage of every solver, ``integrate``."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steersman.diffusion.classical import DDIM, RK4, Euler, Heun
from steersman.diffusion.pndm import VARIANTS, PNDMSolver
from steersman.diffusion.scheduler import alphas_cumprod
from steersman.diffusion.solver import (
    VE,
    AdaptiveSolver,
    DiscreteVP,
    Integral,
    LinearVP,
    Prediction,
    denoiser,
    first_order,
    gaussian,
    integrate,
    plan,
    take,
)
from steersman.errors import InputError

TABLE = alphas_cumprod()
DISCRETE, CONTINUOUS = DiscreteVP(TABLE), LinearVP()

SOLVERS = {
    "ddim": DDIM,
    "ddim:eta=0.7": lambda p: DDIM(p, 0.7),
    "euler": Euler,
    "heun": Heun,
    "rk4": RK4,
    **{f"pndm:{v}": lambda p, v=v: PNDMSolver(p, v) for v in VARIANTS},
}
GRIDS = {DISCRETE: [999, 875, 610, 480, 333, 201, 90, 7, -20], CONTINUOUS: np.linspace(1.0, 0.01, 9).tolist()}


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.5 * x + t / 700)


def particle_noise():
    """A noise source that knows its particles: row i's draws depend on ``rows[i]`` and on the call."""
    rows, calls = list(range(6)), [0]

    def noise(like: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        draws = [torch.Generator().manual_seed(1000 * calls[0] + row) for row in rows[: len(like)]]
        return torch.stack([torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in draws])

    return noise, rows


# ------------------------------------------------------------------ exact checks


@pytest.mark.parametrize("process", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("name", SOLVERS)
def test_state_can_be_reindexed_and_copied_at_every_stage(name, process):
    solver = SOLVERS[name](process)
    steps = plan(solver, GRIDS[process])
    index = torch.tensor([4, 4, 0, 2])
    start = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    predict = denoiser(process, network)
    evaluations = sum(len(step.stages) for step in steps)

    def run(at: int | None) -> torch.Tensor:
        """The run, re-indexed after evaluation ``at``; a deep copy of everything goes on from there."""
        noise, rows = particle_noise()
        x, state, done = start, solver.init(start), 0
        for step in steps:
            for k, t in enumerate(step.stages):
                x, state = solver.stage(k, x, predict(x, t), step, state, noise)
                done += 1
                if done == at:
                    x, state = x[index], copy.deepcopy(take(state, index))
                    rows[:] = [rows[i] for i in index.tolist()]
        return x

    whole = run(None)
    for at in range(1, evaluations + 1):
        assert torch.equal(run(at), whole[index]), f"after evaluation {at}"


@pytest.mark.parametrize("name", SOLVERS)
def test_stages_leave_the_state_before_as_it_was(name):
    solver = SOLVERS[name](DISCRETE)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, predict = solver.init(x), denoiser(DISCRETE, network)
    for step in plan(solver, GRIDS[DISCRETE]):
        for k, t in enumerate(step.stages):
            kept, copied, x_copied = state, copy.deepcopy(state), x.clone()
            x_before = x
            x, state = solver.stage(k, x, predict(x, t), step, state, torch.zeros_like)
            assert repr(kept) == repr(copied)
            assert torch.equal(x_before, x_copied)


def test_continuous_process_against_its_integral():
    for t in (0.01, 0.3, 1.0):
        u = np.linspace(0, t, 20001)
        beta = 0.1 + 19.9 * u
        integral = float(((beta[1:] + beta[:-1]) / 2).sum() * (u[1] - u[0]))
        assert CONTINUOUS.alpha_bar(t) == pytest.approx(math.exp(-integral), rel=1e-7)
        assert CONTINUOUS.alpha(t) ** 2 + CONTINUOUS.sigma(t) ** 2 == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("process", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_slopes_are_derivatives(process):
    h = 1e-5 * process.start
    for t in (0.2037, 0.51003, 0.8):
        t *= process.start
        dalpha, dsigma = process.slope(t)
        assert dalpha == pytest.approx((process.alpha(t + h) - process.alpha(t - h)) / (2 * h), rel=1e-5)
        assert dsigma == pytest.approx((process.sigma(t + h) - process.sigma(t - h)) / (2 * h), rel=1e-5)


def test_discrete_process_interpolates_between_training_times():
    reference = LinearVP(beta_min=0.1, beta_max=20.0)
    times = (np.arange(1000) + 1) / 1000
    process = DiscreteVP([reference.alpha_bar(t) for t in times])
    for t in (0.5, 12.25, 500.5, 997.75):
        assert process.alpha(t) == pytest.approx(reference.alpha((t + 1) / 1000), rel=1e-6)
    assert process.alpha_bar(3) == reference.alpha_bar(0.004)
    assert process.alpha_bar(-0.5) == process.alpha_bar(-300) == 1.0
    assert DiscreteVP(TABLE, final=TABLE[0]).alpha_bar(-1) == TABLE[0]


def test_zero_terminal_snr_interpolates_and_leaves_by_x0():
    process = DiscreteVP(alphas_cumprod(rescale_betas_zero_snr=True))
    assert process.alpha_bar(999) == 0.0
    assert 0.0 < process.alpha(998.5) < process.alpha(998)
    x, x0 = torch.randn(2, 4, 3, dtype=torch.float64)
    moved = first_order(process, x, Prediction(x, 0.0, 1.0, v=-x0), 999, 700)
    torch.testing.assert_close(moved, process.alpha(700) * x0 + process.sigma(700) * x)


def test_predictions_agree_whatever_they_are_read_from():
    x0, eps = torch.randn(2, 5, dtype=torch.float64)
    alpha, sigma = 0.6, 0.8
    x = alpha * x0 + sigma * eps
    for kind, output in (("epsilon", eps), ("sample", x0), ("v_prediction", alpha * eps - sigma * x0)):
        p = Prediction.read(kind, output, x, alpha, sigma)
        torch.testing.assert_close(p.x0, x0)
        torch.testing.assert_close(p.eps, eps)
        assert p.x0_uncond is None
        assert p.eps_uncond is None
    both = Prediction.read("epsilon", eps, x, alpha, sigma, uncond=Prediction(x, alpha, sigma, x0=x0))
    torch.testing.assert_close(both.eps_uncond, eps)
    torch.testing.assert_close(both.x0_uncond, x0)


def test_a_list_of_generators_makes_samples_independent_of_their_batch():
    like = torch.empty(3, 2, 2)
    together = gaussian(like, [torch.Generator().manual_seed(i) for i in (5, 6, 7)])
    alone = gaussian(like[:1], [torch.Generator().manual_seed(6)])
    assert torch.equal(together[1:2], alone)
    assert torch.equal(
        gaussian(like, torch.Generator().manual_seed(1)), gaussian(like, torch.Generator().manual_seed(1))
    )


def test_the_prior_is_standard_normal():
    x = CONTINUOUS.prior((20000,), torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(0, abs=0.03)
    assert x.std().item() == pytest.approx(1, abs=0.03)


def test_integrate_counts_calls_and_passes_the_stage_times():
    seen = []

    def predict(x, t):
        seen.append(t)
        return Prediction(x, DISCRETE.alpha(t), DISCRETE.sigma(t), eps=torch.zeros_like(x))

    result = integrate(PNDMSolver(DISCRETE, "f-pndm"), predict, torch.ones(1, 2), [500, 401, 300, 200, 100])
    assert seen == [500, 450.5, 450.5, 401, 401, 350.5, 350.5, 300, 300, 250, 250, 200, 200]
    assert result.calls == len(seen)


def test_solvers_are_differentiable():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for name in ("heun", "pndm:plms", "pndm:f-pndm"):
        out = integrate(SOLVERS[name](DISCRETE), denoiser(DISCRETE, network), x, GRIDS[DISCRETE]).x
        (gradient,) = torch.autograd.grad(out.sum(), x)
        nudged = torch.zeros_like(x)
        nudged[0, 0] = 1e-6
        with torch.no_grad():
            ends = [
                integrate(SOLVERS[name](DISCRETE), denoiser(DISCRETE, network), x + sign * nudged, GRIDS[DISCRETE]).x
                for sign in (1, -1)
            ]
        assert gradient[0, 0].item() == pytest.approx(((ends[0] - ends[1]).sum() / 2e-6).item(), rel=1e-5)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("table", [[], [0.9, 0.9], [0.5, 0.8], [1.1, 0.5], [0.5, -0.1], [[0.9, 0.5]], [0.9, math.nan]])
def test_a_table_that_is_no_process_is_refused(table):
    with pytest.raises(InputError, match="alphas_cumprod"):
        DiscreteVP(table)


@pytest.mark.parametrize("final", [0.0, 1.5, math.nan])
def test_a_final_level_off_the_schedule_is_refused(final):
    with pytest.raises(InputError, match="final"):
        DiscreteVP([0.9, 0.5], final=final)


@pytest.mark.parametrize("times", [[], [5], [5, 5], [5, 7], [math.inf, 3], [1000, 2], [30, -1, -2]])
def test_a_grid_that_cannot_be_run_is_refused(times):
    with pytest.raises(InputError, match="times"):
        plan(DDIM(DISCRETE), times)


@pytest.mark.parametrize("process", [DISCRETE, CONTINUOUS, VE(80.0, 0.002)], ids=["discrete", "linear", "ve"])
def test_log_snr_and_its_inverse(process):
    times = np.linspace(process.earliest, process.start, 13)[1:]
    log_snr = [process.log_snr(t) for t in times]
    assert all(b < a for a, b in pairwise(log_snr))
    for t, value in zip(times, log_snr, strict=True):
        assert value == pytest.approx(math.log(process.alpha(t) / process.sigma(t)), abs=1e-9)
        assert process.time_at(value) == pytest.approx(t, rel=1e-8)


def test_log_snr_at_the_ends():
    rescaled = DiscreteVP(alphas_cumprod(rescale_betas_zero_snr=True))
    assert rescaled.log_snr(999) == -math.inf and rescaled.log_snr(-1) == math.inf
    assert VE().log_snr(0.0) == math.inf
    assert rescaled.time_at(rescaled.log_snr(0)) == 0 and 998 < rescaled.time_at(-12.0) < 999
    with pytest.raises(InputError, match="log_snr=9"):
        DISCRETE.time_at(9.0)


def test_heun_over_ve_is_karras_sampler():
    # Algorithm 1 of Karras et al. (2022) without churn, on data N(m, 0.25 I), whose denoiser is exact.
    sigmas = [80.0, 20.0, 5.0, 1.0, 0.2, 0.01, 0.0]
    process, mean = VE(80.0, 0.002), torch.tensor([0.3, -0.2], dtype=torch.float64)

    def d(x, sigma):
        return (0.25 * x + sigma**2 * mean) / (0.25 + sigma**2)

    start = process.prior((5, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start
    for t, s in pairwise(sigmas):
        slope = (x - d(x, t)) / t
        y = x + (s - t) * slope
        x = y if s == 0 else x + (s - t) * (slope + (y - d(y, s)) / s) / 2
    found = integrate(Heun(process), denoiser(process, d, "sample"), start, sigmas)
    torch.testing.assert_close(found.x, x, rtol=1e-12, atol=1e-12)
    assert found.calls == 11
    assert start.std() == pytest.approx(80, rel=0.5)


def test_an_adaptive_solver_goes_by_the_ends_of_the_grid():
    class Halves(AdaptiveSolver):
        process = CONTINUOUS

        def integrate(self, denoiser, x, t, s, noise):
            m = (t + s) / 2
            x = first_order(self.process, x, denoiser(x, t), t, m)
            return Integral(first_order(self.process, x, denoiser(x, m), m, s), 2)

    x = torch.ones(3, 2, dtype=torch.float64)
    d = denoiser(CONTINUOUS, network)
    expected = integrate(DDIM(CONTINUOUS), d, x, [1.0, 0.55, 0.1])
    found = integrate(Halves(), d, x, [1.0, 0.9, 0.1])
    torch.testing.assert_close(found.x, expected.x)
    assert found.calls == 2
    with pytest.raises(InputError, match="times"):
        integrate(Halves(), d, x, [0.1, 1.0])


@pytest.mark.parametrize("bounds", [(1.0, 2.0), (0.0, 0.0), (float("inf"), 0.1), (1.0, 0.0)])
def test_ve_refuses(bounds):
    with pytest.raises(InputError, match="sigma_m"):
        VE(*bounds)


def test_other_refusals():
    with pytest.raises(InputError, match="prediction_type"):
        denoiser(DISCRETE, network, "score")
    with pytest.raises(InputError, match="prediction_type"):
        Prediction.read("score", torch.ones(1), torch.ones(1), 1.0, 0.0)
    with pytest.raises(InputError, match=r"generator.*list of 3"):
        gaussian(torch.empty(3, 2), [torch.Generator()])
    with pytest.raises(InputError, match="time"):
        DISCRETE.alpha_bar(1000.5)
    with pytest.raises(TypeError, match="dict"):
        take({"x": torch.ones(2)}, [0])


@settings(max_examples=60, deadline=None)
@given(
    times=st.one_of(
        st.lists(st.floats(), max_size=4),
        st.lists(st.floats(-5, 1100), max_size=8, unique=True).map(lambda times: sorted(times, reverse=True)),
        st.lists(st.integers(0, 999), min_size=2, max_size=9, unique=True).map(lambda ts: sorted(ts, reverse=True)),
    ),
    name=st.sampled_from(sorted(SOLVERS)),
)
@example(times=[2.0, 1.0, 0.0, -9.5e-265], name="pndm:plms")  # a step so short that weights of a history overflow
def test_any_grid_either_runs_or_is_refused_by_name(times, name):
    solver = SOLVERS[name](DISCRETE)
    falling = all(s < t for t, s in pairwise(times)) and all(map(math.isfinite, times))
    valid = len(times) >= 2 and falling and times[0] <= 999 and times[-2] >= 0
    if name == "pndm:f-pndm" and len(times) < 5:
        valid = False
    try:
        x = integrate(solver, denoiser(DISCRETE, network), torch.ones(2, 2, dtype=torch.float64), times).x
    except InputError as error:
        assert error.parameter in ("times", "num_inference_steps")
        assert not valid
    else:
        assert valid
        assert x.isfinite().all()
