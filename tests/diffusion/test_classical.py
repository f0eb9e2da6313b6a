"""DDIM, Euler, Heun and Runge-Kutta: their orders, their laws, and diffusers' schedulers of the same name."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from steersman.diffusion import DDIMScheduler, EulerScheduler, HeunScheduler, RK4Scheduler
from steersman.diffusion.classical import DDIM, RK4, Euler, Heun
from steersman.diffusion.scheduler import alphas_cumprod
from steersman.diffusion.solver import DiscreteVP, LinearVP, denoiser, integrate
from steersman.errors import InputError

TABLE = alphas_cumprod()
DISCRETE = DiscreteVP(TABLE)


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.3 * x + float(t) / 1000) + 0.1 * x.flip(-1)


def start(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def run(scheduler, steps: int, **arguments) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **arguments).prev_sample
    return x


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ------------------------------------------------------------------ exact checks


@pytest.mark.parametrize(("solver", "order"), [(DDIM, 1), (Euler, 1), (Heun, 2), (RK4, 4)])
def test_convergence_order(solver, order):
    """Towards the closed form for Gaussian data of mean m and standard deviation c."""
    process, m, c = LinearVP(), 1.5, 0.3

    def eps(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return sigma * (x - alpha * m) / (alpha**2 * c**2 + sigma**2)

    def spread(t):
        return math.sqrt(process.alpha(t) ** 2 * c**2 + process.sigma(t) ** 2)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = process.alpha(0.05) * m + spread(0.05) / spread(0.9) * (x - process.alpha(0.9) * m)
    gaps = [
        (integrate(solver(process), denoiser(process, eps), x, np.linspace(0.9, 0.05, n + 1)).x - exact).abs().max()
        for n in (80, 160, 320)
    ]
    assert [math.log2(a / b) for a, b in pairwise(gaps)] == pytest.approx([order] * 2, abs=0.1)


def test_euler_in_the_noise_ratio_is_ddim():
    grid = [999, 870, 500, 400, 123, 5, -1]
    predict = denoiser(DISCRETE, network)
    assert (
        relative(
            integrate(Euler(DISCRETE), predict, start(), grid).x, integrate(DDIM(DISCRETE), predict, start(), grid).x
        )
        < 1e-12
    )


def test_one_textbook_step_of_each():
    t, s = 600.0, 500.0
    p, x = DISCRETE, start()
    h = p.sigma(s) / p.alpha(s) - p.sigma(t) / p.alpha(t)
    k1 = network(x, t)
    k2 = network(p.alpha(s) * (x / p.alpha(t) + h * k1), s)
    heun = p.alpha(s) * (x / p.alpha(t) + h * (k1 + k2) / 2)
    assert relative(integrate(Heun(p), denoiser(p, network), x, [t, s]).x, heun) < 1e-12

    def f(y, u):
        e = network(y, u)
        dalpha, dsigma = p.slope(u)
        return dalpha * (y - p.sigma(u) * e) / p.alpha(u) + dsigma * e

    k1 = f(x, t)
    k2 = f(x - 50 * k1, 550.0)
    k3 = f(x - 50 * k2, 550.0)
    k4 = f(x - 100 * k3, s)
    rk4 = x - 100 * (k1 + 2 * k2 + 2 * k3 + k4) / 6
    assert relative(integrate(RK4(p), denoiser(p, network), x, [t, s]).x, rk4) < 1e-12


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # with linspace diffusers' DDIM steps by T // N
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("bounds", [{}, {"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.5}])
def test_ddim_agrees_with_diffusers(spacing, kind, bounds):
    theirs = diffusers.DDIMScheduler(
        timestep_spacing=spacing, prediction_type=kind, **({"clip_sample": False} | bounds)
    )
    ours = DDIMScheduler.from_config(theirs.config)
    theirs.alphas_cumprod = torch.from_numpy(TABLE)
    theirs.final_alpha_cumprod = torch.tensor(1.0)
    assert (
        relative(run(ours, 20), run(theirs, 20, use_clipped_model_output=bool(bounds))) < 1e-6
    )  # thresholds in float32


def test_heun_agrees_with_diffusers():
    theirs = diffusers.HeunDiscreteScheduler(beta_start=0.0001, beta_end=0.02, timestep_spacing="trailing")
    ours = HeunScheduler(timestep_spacing="trailing")
    expected_calls = 39
    theirs.set_timesteps(20)
    ours.set_timesteps(20)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert len(ours.timesteps) == expected_calls
    x = start(torch.float32)
    # diffusers' state is x / alpha, ours x.
    y = x / DISCRETE.alpha(float(theirs.timesteps[0]))
    for t in theirs.timesteps:
        y = theirs.step(network(theirs.scale_model_input(y, t), t), t, y).prev_sample
    for t in ours.timesteps:
        x = ours.step(network(x, t), t, x).prev_sample
    assert relative(x, y) < 1e-4


def test_eta_one_is_ancestral_sampling():
    """One step from t: the mean and the variance of DDPM's posterior (Ho et al. 2020, eq. 7)."""
    t, s = 500.0, 480.0
    at, as_ = TABLE[500], TABLE[480]
    x = torch.full((40000, 1), 0.7, dtype=torch.float64)
    predict = denoiser(DISCRETE, lambda x, t: torch.full_like(x, 0.4))
    y = integrate(DDIM(DISCRETE, eta=1.0), predict, x, [t, s], torch.Generator().manual_seed(0)).x
    x0 = (0.7 - math.sqrt(1 - at) * 0.4) / math.sqrt(at)
    beta = 1 - at / as_
    mean = math.sqrt(as_) * beta / (1 - at) * x0 + math.sqrt(1 - beta) * (1 - as_) / (1 - at) * 0.7
    variance = (1 - as_) / (1 - at) * beta
    assert y.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / len(y)))
    assert y.var().item() == pytest.approx(variance, rel=0.03)


def test_eta_keeps_the_marginal_law():
    """For standard normal data the ideal eps is sigma x, and x stays standard normal at every eta."""
    predict = denoiser(DISCRETE, lambda x, t: DISCRETE.sigma(t) * x)
    x = torch.randn(20000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0):
        y = integrate(DDIM(DISCRETE, eta), predict, x, [*range(999, -1, -3), -1], torch.Generator().manual_seed(3)).x
        assert y.std().item() == pytest.approx(1.0, abs=0.02)


# ------------------------------------------------------------------ bad input, composition


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(InputError, match="eta"):
        DDIMScheduler(eta=eta)


def test_eta_is_the_schedulers_and_no_call_silences_it():
    scheduler = DDIMScheduler(eta=1.0)
    scheduler.set_timesteps(5)
    t, x = scheduler.timesteps[0], start()

    def step(**arguments):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        return scheduler.step(network(x, t), t, x, generator=generator, **arguments).prev_sample

    assert torch.equal(step(), step(eta=0.0, use_clipped_model_output=None))
    with pytest.raises(InputError, match=r"eta=0\.5 .*set on the scheduler"):
        step(eta=0.5)
    with pytest.raises(InputError, match="variance_noise"):
        step(variance_noise=x)


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerScheduler, HeunScheduler, RK4Scheduler])
def test_the_step_to_the_clean_end_is_a_transfer(cls):
    scheduler = cls()
    scheduler.set_timesteps(1)
    assert len(scheduler.timesteps) == 1
    x = start()
    x0 = (x - DISCRETE.sigma(0) * network(x, 0)) / DISCRETE.alpha(0)
    assert relative(scheduler.step(network(x, 0), 0, x).prev_sample, x0) < 1e-12
