"""The mixtures' closed forms, against automatic differentiation, quadrature and samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.diffusion.classical import DDIM
from steersman.diffusion.solver import LinearVP, integrate
from steersman.errors import InputError
from steersman.reference import gaussians, loading
from steersman.reference.gaussians import Mixture, mixture

VARIANTS = sorted(gaussians.VARIANTS)


def points(law: Mixture, n: int, seed: int = 0) -> torch.Tensor:
    return law.sample(n, torch.Generator().manual_seed(seed), torch.float64)[0]


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.9, 0.3), (0.3, 0.95), (0.0, 1.0)])
def test_score_is_the_gradient_of_the_log_density(name, alpha, sigma):
    law = mixture(name)
    x = (alpha * points(law, 200) + max(sigma, 0.02) * torch.randn(200, 2, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(x, alpha, sigma).sum(), x)
    scale = gradient.abs().max()
    assert (law.score(x, alpha, sigma) - gradient).abs().max() < 1e-12 * scale
    assert (law.eps(x, alpha, sigma) + sigma * gradient).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("name", VARIANTS)
def test_predictions_fit_together(name):
    """x = alpha x_0 + sigma eps and v = alpha eps - sigma x_0, row by row at its own noise level."""
    law, x = mixture(name), points(mixture(name), 100)
    alpha = torch.linspace(0.05, 1, 100, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    eps, x0, v = (f(x, alpha, sigma) for f in (law.eps, law.x0, law.velocity))
    a, s = alpha[:, None], sigma[:, None]
    torch.testing.assert_close(a * x0 + s * eps, x, rtol=0, atol=1e-13)
    torch.testing.assert_close(v, a * eps - s * x0, rtol=0, atol=1e-13)
    one = law.eps(x[7:8], alpha[7].item(), sigma[7].item())
    torch.testing.assert_close(one, eps[7:8], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", VARIANTS)
def test_density_integrates_to_one_and_has_the_stated_moments(name):
    law = mixture(name)
    h = law.std.min().item() / 2  # the rectangle rule's error is of order exp(-2 (pi s / h)²)
    side = torch.arange(-3.2, 3.2, h, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    mass = law.log_prob(grid).exp() * h * h
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)
    mean = (mass[:, None] * grid).sum(0)
    torch.testing.assert_close(mean, law.mean(), rtol=0, atol=1e-8)
    centred = grid - mean
    torch.testing.assert_close((mass[:, None] * centred).T @ centred, law.covariance(), rtol=0, atol=1e-7)
    torch.testing.assert_close((mass[:, None] * law.responsibilities(grid)).sum(0), law.weights, rtol=0, atol=1e-9)


def test_denoiser_is_the_posterior_mean():
    """E[x_0 | x_t] by quadrature over x_0."""
    law, alpha, sigma, h = mixture("nested"), 0.7, math.sqrt(1 - 0.49), 0.015
    side = torch.arange(-2.5, 2.5, h, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    for x in torch.tensor([[0.2, 0.1], [0.0, 1.0], [-0.5, -0.7]], dtype=torch.float64):
        weight = (law.log_prob(grid) - (x - alpha * grid).square().sum(1) / (2 * sigma**2)).softmax(0)
        expected = (weight[:, None] * grid).sum(0)
        torch.testing.assert_close(law.x0(x[None], alpha, sigma)[0], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", VARIANTS)
def test_samples_have_the_stated_law(name):
    law = mixture(name)
    n = 40_000
    x, modes = law.sample(n, torch.Generator().manual_seed(1), torch.float64)
    share = torch.bincount(modes, minlength=law.modes) / n
    assert ((share - law.weights).abs() < 5 * (law.weights / n).sqrt()).all()
    assert ((x.mean(0) - law.mean()).abs() < 5 * law.covariance().diagonal().sqrt() / math.sqrt(n)).all()
    radius = ((x - law.means[modes]) / law.std[modes, None]).square().sum(1)  # chi-square of 2: mean 2, variance 4
    assert abs(radius.mean().item() - 2) < 5 * 2 / math.sqrt(n)


def test_labels_pick_a_mode_and_the_last_one_is_the_mixture():
    law, x = mixture("ring-unequal"), points(mixture("ring-unequal"), 9)
    label = torch.arange(9)
    whole, own = law.eps(x, 0.6, 0.8), law.eps(x, 0.6, 0.8, label)
    for k in range(8):
        single = Mixture(law.means[k : k + 1], law.std[k].item())
        torch.testing.assert_close(own[k], single.eps(x[k : k + 1], 0.6, 0.8)[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(own[8], whole[8], rtol=0, atol=1e-14)
    mixed = sum(
        law.responsibilities(x, 0.6, 0.8)[:, k : k + 1] * law.score(x, 0.6, 0.8, torch.full((9,), k)) for k in range(8)
    )
    torch.testing.assert_close(mixed, law.score(x, 0.6, 0.8), rtol=0, atol=1e-12)


def test_default_rings_are_as_documented():
    assert mixture("gaussians").to_json() == mixture("gaussians:ring").to_json()
    for name, std in (("ring", 0.2), ("ring-sharp", 0.05)):
        law = mixture(name)
        assert law.modes == 8 and set(law.std.tolist()) == {std}
        torch.testing.assert_close(law.means.norm(dim=1), torch.ones(8, dtype=torch.float64))
        torch.testing.assert_close(law.weights, torch.full((8,), 1 / 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_in_is_the_dtype_out(dtype):
    law = mixture("ring-sharp")
    x = points(law, 50)
    for f in (law.eps, law.x0, law.score, law.velocity):
        got, exact = f(x.to(dtype), 0.6, 0.8), f(x.to(dtype).double(), 0.6, 0.8)
        assert got.dtype == dtype
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 0}[dtype]
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ composition


def test_ideal_denoiser_carries_noise_to_the_law():
    law, process = mixture("ring"), LinearVP()
    start = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    times = torch.linspace(1, 1e-3, 81).tolist()
    x = integrate(DDIM(process), law.denoiser(process), start, times).x
    assert (law.responsibilities(x).mean(0) - law.weights).abs().max() < 4 * math.sqrt(1 / 8 / 2000) + 0.005
    torch.testing.assert_close(x.T.cov(), law.covariance(), rtol=0, atol=0.04)


def test_the_analytic_subject_needs_no_files():
    assert "gaussians" in loading.names()
    assert loading.path("gaussians") is None
    assert loading.fingerprint("gaussians") == gaussians.fingerprint()
    assert len(gaussians.fingerprint()) == 64


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Mixture([[0.0]], 0.0), "std"),
        (lambda: Mixture([[0.0], [1.0]], 1.0, [1.0, 0.0]), "weights"),
        (lambda: Mixture([[math.nan]], 1.0), "means"),
        (lambda: Mixture([0.0], 1.0), "means"),  # type: ignore[list-item]
        (lambda: mixture("gaussians:rings"), "subject"),
        (lambda: mixture("ring").eps(torch.zeros(3, 3), 0.5, 0.5), "x"),
        (lambda: mixture("ring").eps(torch.zeros(3, 2), torch.ones(2), 0.5), "alpha"),
        (lambda: mixture("ring").eps(torch.zeros(3, 2), 0.5, 0.5, torch.tensor([0, 9, 1])), "label"),
        (lambda: mixture("ring").sample(0), "count"),
    ],
)
def test_refuses(call, named):
    with pytest.raises(InputError, match=rf"^{named}="):
        call()


def test_a_wrong_name_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean 'gaussians:ring-sharp'"):
        mixture("gaussians:ringsharp")


@settings(max_examples=40, deadline=None)
@given(
    modes=st.integers(1, 6),
    d=st.integers(1, 4),
    std=st.floats(1e-3, 10),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_any_mixture_is_finite_at_any_noise_level(modes, d, std, alpha, seed):
    rng = torch.Generator().manual_seed(seed)
    law = Mixture(torch.randn(modes, d, generator=rng, dtype=torch.float64), std)
    sigma = math.sqrt(1 - alpha**2)
    x = 50 * torch.randn(20, d, generator=rng, dtype=torch.float64)  # far outside, where densities underflow
    eps, x0 = law.eps(x, alpha, sigma), law.x0(x, alpha, sigma)
    assert eps.isfinite().all() and x0.isfinite().all() and law.log_prob(x, alpha, sigma).isfinite().all()
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-9, atol=1e-9)
