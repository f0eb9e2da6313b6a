"""PFGM++: the kernel's law, the field, the flow, EDM as its limit; training; and where the authors' code errs."""

from __future__ import annotations

import json
import math
import zipfile
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from steersman.diffusion import ClassConditionalPipeline, PFGMPPKernel, PFGMPPPipeline, PFGMPPScheduler
from steersman.diffusion.classical import Euler, Heun
from steersman.diffusion.dpm_solver_pp import DPMSolverPP
from steersman.diffusion.images import load_pipeline, read_images
from steersman.diffusion.pfgm_pp import (
    DDPMFormulation,
    EDMFormulation,
    VEFormulation,
    apply,
    denoise,
    formulation_of,
    ideal_denoiser,
    loss,
    posterior_mean,
    train_pfgmpp,
)
from steersman.diffusion.solver import VE, integrate
from steersman.errors import InputError, TrialError
from steersman.math.transport import sliced_wasserstein
from tests.diffusion import tiny

INF = math.inf


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def karras(n: int, high: float = 80.0, low: float = 0.002, rho: float = 7.0) -> list[float]:
    i = np.linspace(0, 1, n + 1)
    return ((high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho).tolist()


def ring(points: int = 6, radius: float = 0.8) -> Tensor:
    angles = torch.arange(points, dtype=torch.float64) * 2 * math.pi / points
    return radius * torch.stack([angles.cos(), angles.sin()], 1)


def beta_noise(count: int, N: int, D: float, seed: int = 0, clip: bool = False) -> np.ndarray:
    """The paper's form at σ = 1: radius r √(B/(1 - B)) in a uniform direction; ``clip`` as the official training."""
    g = np.random.default_rng(seed)
    b = g.beta(N / 2, D / 2, count)
    if clip:
        b = np.clip(b, 1e-3, 1 - 1e-3)
        odds = b / (1 - b + 1e-8) + 1e-8
    else:
        odds = b / (1 - b)
    u = g.standard_normal((count, N))
    return u / np.linalg.norm(u, axis=1, keepdims=True) * np.sqrt(D * odds)[:, None]


def radii(noise: Tensor) -> np.ndarray:
    return noise.flatten(1).double().norm(dim=1).numpy()


# ------------------------------------------------------------------ the kernel


@pytest.mark.parametrize(("N", "D"), [(64, 64), (2, 2048), (16, 4), (3, 0.7)])
def test_the_radius_has_an_f_law_and_agrees_with_the_papers_beta_form(N, D):
    """R²/N ~ F(N, D) for σ = 1, and for the Beta form too."""
    noise = PFGMPPKernel(D).noise(torch.empty(20_000, N, dtype=torch.float64), rng())
    R2 = radii(noise) ** 2 / N
    assert stats.kstest(R2, stats.f(N, D).cdf).pvalue > 1e-3
    beta = np.linalg.norm(beta_noise(20_000, N, D), axis=1) ** 2 / N
    assert stats.kstest(beta, stats.f(N, D).cdf).pvalue > 1e-3
    assert stats.ks_2samp(R2, beta).pvalue > 1e-3
    # One coordinate is Student-t with D degrees of freedom.
    assert stats.kstest(noise[:, 0].numpy(), stats.t(D).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("N", "D"), [(64, 64), (16, 4)])
def test_one_w_for_a_sample_not_one_for_a_pixel(N, D):
    per_pixel = PFGMPPKernel(D).noise(torch.empty(20_000 * N, 1, dtype=torch.float64), rng()).reshape(-1, N)
    assert stats.kstest(radii(per_pixel) ** 2 / N, stats.f(N, D).cdf).pvalue < 1e-10
    # The halves of a true sample are uncorrelated, but their norms are not.
    noise = PFGMPPKernel(D).noise(torch.empty(20_000, N, dtype=torch.float64), rng())
    assert np.corrcoef(noise[:, 0], noise[:, 1])[0, 1] == pytest.approx(0, abs=0.05)
    halves = [part.norm(dim=1).log() for part in noise.chunk(2, 1)]
    assert np.corrcoef(*halves)[0, 1] > 0.2


def test_large_D_is_gaussian_noise_draw_by_draw():
    z = torch.randn(1000, 64, generator=rng(), dtype=torch.float64)
    near = PFGMPPKernel(1e8).spread(z, rng(1))
    assert ((near - z).norm(dim=1) / z.norm(dim=1)).max() < 1e-3
    assert PFGMPPKernel(INF).spread(z, rng(1)) is z
    # And the noise of one seed moves with D continuously: the quantile of w is shared.
    a, b = (PFGMPPKernel(D).spread(z, rng(1)) for D in (64.0, 64.1))
    assert ((a - b).norm(dim=1) / z.norm(dim=1)).max() < 1e-2


@pytest.mark.parametrize("D", [16.0, 64.0, 2048.0])
def test_the_covariance_is_D_over_D_minus_2(D):
    n, N = 40_000, 4
    noise = PFGMPPKernel(D).noise(torch.empty(n, N, dtype=torch.float64), rng(3))
    products = (noise[:, :, None] * noise[:, None, :]).flatten(1)
    error = products.mean(0) - D / (D - 2) * torch.eye(N, dtype=torch.float64).flatten()
    assert (error.abs() < 4 * products.std(0) / math.sqrt(n)).all()


def test_each_sample_has_its_own_generator():
    kernel, like = PFGMPPKernel(3), torch.empty(3, 1, 2, 2)
    whole = kernel.noise(like, [rng(1), rng(2), rng(3)])
    alone = torch.cat([kernel.noise(like[:1], [rng(i)]) for i in (1, 2, 3)])
    assert torch.equal(whole, alone)
    with pytest.raises(InputError, match="generator"):
        kernel.spread(like, [rng(1)])


def test_half_precision_is_shrunk_to_fit_and_never_infinite():
    made = PFGMPPScheduler(D=0.3).prior((4000, 1, 2, 2), rng(), dtype=torch.float16)
    z = torch.randn(4000, 1, 2, 2, generator=rng(), dtype=torch.float16)
    assert made.isfinite().all() and made.abs().max() == torch.finfo(torch.float16).max
    shrunk = made.flatten(1).abs().amax(1) == torch.finfo(torch.float16).max
    assert shrunk.sum() > 100
    # A row that was shrunk keeps its direction.
    directions = [nn.functional.normalize(v.flatten(1).double()) for v in (made, z)]
    assert ((directions[0] - directions[1]).norm(dim=1) < 2e-3).all()
    assert PFGMPPScheduler(D=0.3).prior((4000, 1, 2, 2), rng()).abs().max() > 1e6


def test_a_radius_and_a_noise_level_are_the_same_thing():
    kernel = PFGMPPKernel(128)
    assert kernel.radius(0.5) == 0.5 * math.sqrt(128) and kernel.sigma(kernel.radius(80.0)) == pytest.approx(80)
    with pytest.raises(InputError, match="finite"):
        PFGMPPKernel().sigma(3.0)


# ------------------------------------------------------------------ the ideal denoiser


@pytest.mark.parametrize("D", [1, 4, 64, 2048, INF])
def test_one_datum_is_the_answer_and_two_are_halved_on_the_bisector(D):
    x = torch.randn(50, 3, generator=rng(), dtype=torch.float64)
    y = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64)
    assert torch.equal(ideal_denoiser(y, D)(x, 0.7).x0, y.expand(50, 3))
    pair = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    x[:, 0] = 0
    for sigma in (1e-3, 0.5, 80.0):
        assert ideal_denoiser(pair, D)(x, sigma).x0.abs().max() < 1e-12


@given(st.floats(1.0, 200.0), st.floats(0.05, 50.0), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_field_is_the_gradient_of_the_potential(D, sigma, N, seed):
    """(x - D*)/r E_r = E_x for E = -∇ of sum_i (‖x - y_i‖² + r²)^{-(N+D-2)/2}, by autograd, scaled not to overflow."""
    data = torch.randn(5, N, generator=rng(seed), dtype=torch.float64)
    x = (torch.randn(3, N, generator=rng(seed + 1), dtype=torch.float64) * sigma).requires_grad_()
    r = torch.full((3, 1), sigma * math.sqrt(D), dtype=torch.float64, requires_grad=True)
    square = (x[:, None] - data).square().sum(2) + r**2
    power = (N + D - 2) / 2
    if power < 0.05:
        return  # N + D = 2: the potential is a logarithm
    log_potential = torch.logsumexp(-power * square.log(), 1).sum()
    ex, er = torch.autograd.grad(log_potential, (x, r))
    star = ideal_denoiser(data, D)(x.detach(), sigma).x0
    left = (x.detach() - star) / r.detach() * er
    assert (left - ex).norm() <= 1e-6 * ex.norm() + 1e-12


def test_weights_are_exact_where_the_power_overflows_and_in_the_gaussian_limit():
    data, x = torch.randn(2, 20, 3072, generator=rng(), dtype=torch.float64)
    for sigma in (0.002, 80.0):
        gauss = posterior_mean(PFGMPPKernel(INF), x, sigma, data)
        assert (posterior_mean(PFGMPPKernel(1e12), x, sigma, data) - gauss).abs().max() < 1e-4
        assert posterior_mean(PFGMPPKernel(2048), x, sigma, data).isfinite().all()
    with pytest.raises(InputError, match="of the shape of x"):
        posterior_mean(PFGMPPKernel(4), x[:, :5], 1.0, data)


# ------------------------------------------------------------------ the flow


@pytest.mark.parametrize("D", [1, 4, 64, INF])
def test_with_one_datum_every_step_is_exact(D):
    y = torch.randn(1, 5, generator=rng(1), dtype=torch.float64)
    x0 = PFGMPPKernel(D).noise(torch.empty(20, 5, dtype=torch.float64), rng()) * 80
    for times in ([80.0, 0.5], [80.0, 10.0, 3.0, 0.5]):
        end = integrate(Heun(VE()), ideal_denoiser(y, D), x0, times).x
        assert (end - (y + 0.5 / 80 * (x0 - y))).abs().max() < 1e-9 * x0.abs().max()
    end = integrate(Heun(VE()), ideal_denoiser(y, D), x0, [80.0, 0.002, 0.0]).x
    assert torch.equal(end, y.expand(20, 5))


def gap(a: Tensor, b: Tensor) -> float:
    return sliced_wasserstein(a, b, 1.0, count=16).item()  # of order 1: the square has no fourth moment at D = 4


@pytest.mark.parametrize("D", [4.0, 64.0])
def test_the_flow_carries_the_prior_to_the_noised_data(D):
    data, n, kernel, grid = ring(), 20_000, PFGMPPKernel(D), karras(60, 80.0, 0.5)
    like = torch.empty(n, 2, dtype=torch.float64)

    def direct(seed: int) -> Tensor:
        index = torch.randint(len(data), (n,), generator=rng(seed))
        return data[index] + 0.5 * kernel.noise(like, rng(seed + 1))

    bound = 1.5 * np.quantile([gap(direct(10 * i), direct(10 * i + 5)) for i in range(20)], 0.95)
    prior, target = 80 * kernel.noise(like, rng(1000)), direct(1001)
    flown = integrate(Heun(VE()), ideal_denoiser(data, D), prior, grid).x
    assert gap(flown, target) < bound
    if D == 4:
        # What a Gaussian prior, or a Gaussian model's weights, would give.
        gaussian = 80 * torch.randn(n, 2, generator=rng(1000), dtype=torch.float64)
        assert gap(integrate(Heun(VE()), ideal_denoiser(data, D), gaussian, grid).x, target) > bound
        assert gap(integrate(Heun(VE()), ideal_denoiser(data, INF), prior, grid).x, target) > bound


@pytest.mark.parametrize("D", [4, 64, INF])
def test_heun_is_of_second_order(D):
    data = ring()
    x = 10 * PFGMPPKernel(D).noise(torch.empty(200, 2, dtype=torch.float64), rng())

    def end(n: int) -> Tensor:
        return integrate(Heun(VE()), ideal_denoiser(data, D), x, karras(n, 10.0, 0.5)).x

    exact = end(1280)
    errors = [(end(n) - exact).norm(dim=1).mean().item() for n in (20, 40, 80, 160)]
    assert math.log2(errors[0] / errors[-1]) / 3 == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("D", [4, INF])
def test_dpm_solver_pp_follows_the_same_flow_in_fewer_calls(D):
    """Another method's solver on this one's process and denoiser, against a fine Heun run."""
    data, x = ring(), 10 * PFGMPPKernel(D).noise(torch.empty(200, 2, dtype=torch.float64), rng())
    exact = integrate(Heun(VE()), ideal_denoiser(data, D), x, karras(640, 10.0, 0.1)).x
    times, errors = karras(20, 10.0, 0.1), {}
    for name, solver in {"2": DPMSolverPP(VE(), order=2), "euler": Euler(VE())}.items():
        end = integrate(solver, ideal_denoiser(data, D), x, times)
        assert end.calls == 20
        errors[name] = (end.x - exact).norm(dim=1).mean().item()
    assert errors["2"] < 0.5 * errors["euler"]


# ------------------------------------------------------------------ the scheduler


def network(x: Tensor, t: Tensor | float) -> Tensor:
    return torch.sin(2 * x) + 0.1 * torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1))


def run(scheduler, x: Tensor, n: int) -> Tensor:
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_euler_is_diffusers_edm_scheduler(kind, grid):
    """Up to rounding: theirs divides by σ in single precision where ours multiplies."""
    setting = {"prediction_type": kind, "sigma_schedule": grid, "sigma_max": 60.0, "sigma_data": 0.7}
    x = 60 * torch.randn(4, 1, 8, 8, generator=rng())
    theirs = run(diffusers.EDMEulerScheduler(**setting), x, 18)
    ours = run(PFGMPPScheduler(solver="euler", **setting), x, 18)
    assert (ours - theirs).abs().max() < 3e-6 * theirs.abs().max()


def test_heun_is_edms_algorithm_1_written_out():
    scheduler, n = PFGMPPScheduler(D=16), 18
    x = scheduler.prior((4, 1, 8, 8), rng(), dtype=torch.float64)
    got = run(scheduler, x, n)
    assert len(scheduler.timesteps) == 2 * n - 1 == 35

    def D(x: Tensor, s: float) -> Tensor:
        total = s**2 + 0.25
        return 0.25 / total * x + s * 0.5 / total**0.5 * network(x / total**0.5, math.log(s) / 4)

    sigmas = [*karras(n - 1), 0.0]
    for i, (t, s) in enumerate(pairwise(sigmas)):
        d = (x - D(x, t)) / t
        euler = x + (s - t) * d
        if i < n - 1:
            d2 = (euler - D(euler, s)) / s
            euler = x + (s - t) * (d + d2) / 2
        x = euler
    assert (got - x).abs().max() < 1e-6


def test_without_D_it_is_edm_to_the_bit():
    edm, limit = PFGMPPScheduler(), PFGMPPScheduler(D=INF)
    z = torch.randn(3, 1, 4, 4, generator=rng())
    assert torch.equal(limit.prior((3, 1, 4, 4), rng()), 80.0 * z)
    assert torch.equal(limit.sample_noise((3, 1, 4, 4), rng()), z)
    edm.set_timesteps(5)
    limit.set_timesteps(5)
    y, t = torch.rand(3, 1, 4, 4, generator=rng(1)), edm.timesteps[[0, 3, 5]]
    assert torch.equal(limit.add_noise(y, limit.sample_noise((3, 1, 4, 4), rng()), t), edm.add_noise(y, z, t))
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(5)
    for i in range(5):
        wanted = theirs.add_noise(y, z, theirs.timesteps[[i] * 3])
        assert torch.allclose(edm.add_noise(y, z, theirs.timesteps[[i] * 3]), wanted, rtol=1e-5, atol=1e-6)


def test_large_D_samples_what_edm_samples():
    ends = []
    for D in (1e8, INF):
        scheduler = PFGMPPScheduler(D=D)
        ends.append(run(scheduler, scheduler.start(torch.randn(50, 1, 4, 4, generator=rng()), rng(1)), 18))
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[1].norm()


@pytest.mark.parametrize("n", [1, 2, 3, 18])
def test_the_last_step_is_the_denoiser(n):
    for solver in ("heun", "euler"):
        scheduler = PFGMPPScheduler(D=4, solver=solver)
        scheduler.set_timesteps(n)
        x = scheduler.prior((2, 1, 4, 4), rng())
        for t in scheduler.timesteps:
            out = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x)
            x = out.prev_sample
        assert torch.equal(x, out.pred_original_sample)
        calls = 2 * n - 1 if solver == "heun" else n
        assert len(scheduler.timesteps) == calls


@pytest.mark.parametrize("name", ["edm", "ve", "ddpm"])
def test_a_formulation_reads_the_network_as_it_was_trained(name):
    """The scheduler's denoiser is training's, and a network that knows the answer is understood as such."""
    form, scheduler = formulation_of(name), PFGMPPScheduler(formulation=name, sigma_min=0.05, sigma_max=50.0)
    x = torch.randn(4, 1, 3, 3, generator=rng(), dtype=torch.float64)
    scheduler.set_timesteps(7)
    t = scheduler.timesteps[4]
    output = network(scheduler.scale_model_input(x, t), t)
    sigma = torch.full((4,), scheduler._slots[4].sigma, dtype=torch.float64)
    scheduler.set_begin_index(4)
    mine = denoise(form, network, x, sigma)
    assert torch.allclose(scheduler.step(output, t, x).pred_original_sample, mine, atol=1e-5)
    told = form.told(sigma)
    assert torch.allclose(form.sigma(told), sigma, rtol=1e-6)
    y = torch.rand(4, 1, 3, 3, generator=rng(2), dtype=torch.float64)
    c = form.coefficients(sigma[:, None, None, None])
    perfect = lambda inward, t: (y - c.skip * inward / c.inward) / c.out  # noqa: E731
    assert torch.allclose(denoise(form, perfect, x, sigma), y)


def test_the_laws_of_the_noise_levels():
    u = torch.rand(20_000, generator=rng(), dtype=torch.float64)
    log = EDMFormulation().levels(u).log().numpy()
    assert stats.kstest(log, stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3
    log = VEFormulation().levels(u).log().numpy()
    assert stats.kstest(log, stats.uniform(math.log(0.02), math.log(5000)).cdf).pvalue > 1e-3
    form, ddpm = DDPMFormulation(), diffusers.DDPMScheduler()
    sigma = form.levels((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    abar = ddpm.alphas_cumprod.double()
    assert torch.allclose(sigma, ((1 - abar) / abar).sqrt(), rtol=1e-4)
    assert torch.equal(form.told(sigma), torch.arange(1000, dtype=torch.float64))
    # λ makes the initial loss of EDM's output 1, and the loss of DDPM's that of the noise.
    s = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    edm = EDMFormulation()
    assert torch.allclose(edm.weight(s) * edm.coefficients(s).out ** 2, torch.ones(3, dtype=torch.float64))
    assert torch.allclose(form.weight(s) * form.coefficients(s).out ** 2, torch.ones(3, dtype=torch.float64))


def test_add_noise_is_the_kernels():
    scheduler = PFGMPPScheduler(D=4)
    scheduler.set_timesteps(18)
    y = torch.zeros(20_000, 1, 1, 3, dtype=torch.float64)
    x = scheduler.add_noise(y, scheduler.sample_noise(y.shape, rng(), dtype=torch.float64), scheduler.timesteps[9:10])
    sigma = scheduler._slots[9].sigma
    assert stats.kstest((radii(x) / sigma) ** 2 / 3, stats.f(3, 4).cdf).pvalue > 1e-3


# ------------------------------------------------------------------ the pipeline


def conditional(D=64.0, **setting) -> PFGMPPPipeline:
    pipe = PFGMPPPipeline(tiny.unconditional(num_class_embeds=4).unet.eval(), PFGMPPScheduler(D=D, **setting), 3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_starts_from_its_prior():
    pipe = conditional()
    z = torch.randn(2, 1, 8, 8, generator=rng())
    got = pipe([0, 1], num_inference_steps=4, generator=rng(5), latents=z, output_type="latent").images
    x = pipe.scheduler.start(z, rng(5))
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            inward = pipe.scheduler.scale_model_input(x, t)
            out = pipe.unet(inward, t, class_labels=torch.tensor([0, 1])).sample
            x = pipe.scheduler.step(out, t, x).prev_sample
    assert torch.equal(got, x)
    # A plain pipeline starts there too, and the same seed gives the same images.
    plain = ClassConditionalPipeline(pipe.unet, pipe.scheduler, 3)
    plain.set_progress_bar_config(disable=True)
    again = plain([0, 1], num_inference_steps=4, generator=rng(5), latents=z, output_type="latent").images
    assert torch.equal(got, again)
    guided = pipe([0, 1], num_inference_steps=4, guidance_scale=2.0, generator=rng(5), latents=z, output_type="latent")
    assert guided.images.shape == got.shape and not torch.equal(guided.images, got)
    times = pipe([0, 1], timesteps=[1.0, 0.2, -1.0], generator=rng(5), output_type="pt").images
    assert times.shape == (2, 1, 8, 8)


def test_it_is_saved_and_loaded_with_its_D(tmp_path):
    pipe = conditional(solver="euler")
    pipe.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["D"] == 64 and index["scheduler"] == ["steersman.diffusion", "PFGMPPScheduler"]
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    a = pipe([0, 1], generator=rng(), **arguments).images
    for loaded in (PFGMPPPipeline.from_pretrained(tmp_path / "p"), load_pipeline(tmp_path / "p")):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is PFGMPPPipeline and loaded.scheduler.config.solver == "euler"
        assert torch.equal(a, loaded([0, 1], generator=rng(), **arguments).images)
    conditional(INF).save_pretrained(tmp_path / "inf")
    text = (tmp_path / "inf" / "model_index.json").read_text()
    assert '"D": "inf"' in text and "Infinity" not in (tmp_path / "inf/scheduler/scheduler_config.json").read_text()
    assert PFGMPPPipeline.from_pretrained(tmp_path / "inf").scheduler.kernel.D == INF


def test_another_D_than_in_training_is_refused():
    pipe = conditional()
    with pytest.raises(InputError, match=r"D of the scheduler=2048.0 .* must be 64, that of the noise"):
        PFGMPPPipeline(pipe.unet, PFGMPPScheduler(D=2048.0), 3, D=64)
    pipe.scheduler = PFGMPPScheduler()  # a Gaussian prior
    with pytest.raises(InputError, match="must be 64"):
        pipe([0], num_inference_steps=2)
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(InputError, match="formulation edm"):
        pipe([0], num_inference_steps=2)
    with pytest.raises(InputError, match="formulation ve"):
        PFGMPPPipeline(pipe.unet, diffusers.EDMEulerScheduler(), 3, D=64, formulation="ve")


def test_diffusers_samplers_work_from_its_prior():
    """EDMDPMSolverMultistepScheduler on our prior, against its own loop from the same start."""
    pipe = conditional(D=4)
    pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    z = torch.randn(2, 1, 8, 8, generator=rng())
    got = pipe([0, 1], num_inference_steps=6, generator=rng(5), latents=z, output_type="latent").images
    theirs = diffusers.EDMDPMSolverMultistepScheduler()
    theirs.set_timesteps(6)
    x = PFGMPPScheduler(D=4).start(z, rng(5))
    with torch.no_grad():
        for t in theirs.timesteps:
            out = pipe.unet(theirs.scale_model_input(x, t), t, class_labels=torch.tensor([0, 1])).sample
            x = theirs.step(out, t, x).prev_sample
    assert torch.allclose(got, x, atol=1e-6)
    assert pipe._kernel() == PFGMPPKernel(4)


def test_a_scheduler_in_other_hands():
    scheduler = PFGMPPScheduler.from_config(diffusers.EDMEulerScheduler(sigma_max=60.0, rho=5.0).config, D=8)
    assert (scheduler.config.sigma_max, scheduler.config.rho, scheduler.config.D) == (60.0, 5.0, 8.0)
    with pytest.raises(InputError, match="of an EDM scheduler"):
        PFGMPPScheduler.from_config(diffusers.DDIMScheduler().config)
    # Latents for a pipeline that multiplies them itself.
    multiplied = scheduler.sample_noise((2, 1, 4, 4), rng()) * scheduler.init_noise_sigma
    assert torch.allclose(multiplied, scheduler.prior((2, 1, 4, 4), rng()))
    assert len(scheduler) == 1000 == len(scheduler.timesteps)


# ------------------------------------------------------------------ training


class Perceptron(ModelMixin, ConfigMixin):
    """Two numbers in a row as an image of 1x2 pixels; the interface of ``UNet2DModel``."""

    @register_to_config
    def __init__(self, in_channels=1, out_channels=1, sample_size=(1, 2), num_class_embeds=None, width=128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(18, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, 2)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        t = torch.as_tensor(timestep).reshape(-1, 1).expand(len(sample), 1).to(sample)
        waves = t * torch.arange(1, 9)
        h = self.body(torch.cat([sample.flatten(1), waves.sin(), waves.cos()], 1))
        return UNet2DOutput(sample=self.last(h).reshape(sample.shape))


def points(n: int = 24) -> Tensor:
    """Data of the plane as images of 1x2 pixels in [0, 1]."""
    from steersman.reference import gaussians

    x, _ = gaussians.mixture("gaussians:ring").sample(n, rng(7))
    return (x / 4 + 0.5).clamp(0, 1)[:, None, None, :]


def test_training_finds_the_ideal_denoiser():
    """The excess over the smallest possible error is below 2% of the data's variance, over the training's levels."""
    torch.manual_seed(0)
    D = 4.0
    made = train_pfgmpp(points(), D=D, unet=Perceptron(), steps=1500, batch_size=512, learning_rate=4e-3, seed=1)
    assert np.mean(made.losses[-50:]) < 0.8 * np.mean(made.losses[:50])
    data, form, kernel = 2 * points() - 1, formulation_of("edm"), PFGMPPKernel(D)
    index = torch.randint(len(data), (4000,), generator=rng(2))
    sigma = form.levels(torch.rand(4000, generator=rng(3), dtype=torch.float64))
    x = data[index] + (sigma[:, None, None, None] * kernel.noise(data[index], rng(4))).float()
    with torch.no_grad():
        error = denoise(form, made.pipeline.unet, x, sigma) - posterior_mean(kernel, x, sigma, data)
    assert error.square().mean() < 0.02 * data.var(0).mean()


def test_the_loss_is_least_at_the_posterior_mean_and_the_stable_target_has_the_same_gradient():
    data = torch.rand(6, 1, 1, 3, generator=rng(), dtype=torch.float64)
    kernel, form, n = PFGMPPKernel(4), formulation_of("edm"), 40_000
    index = torch.randint(6, (n,), generator=rng(1))
    sigma = torch.full((n,), 0.4, dtype=torch.float64)
    noise = kernel.noise(torch.empty(n, 1, 1, 3, dtype=torch.float64), rng(2))
    shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def ideal(inward: Tensor, told: Tensor) -> Tensor:
        c = form.coefficients(0.4)
        x = inward / c.inward
        return (posterior_mean(kernel, x, sigma, data) + shift - c.skip * x) / c.out

    plain = loss(kernel, form, ideal, data[index], sigma, noise)
    stable = loss(kernel, form, ideal, data[index], sigma, noise, (data, None))
    assert stable.abs().max() < 1e-20 < plain.min()  # over all data the target is exact
    scores = torch.autograd.grad(plain.mean(), shift, retain_graph=True)[0]
    spread = plain.detach().sqrt().std() / math.sqrt(n) * 2 * form.weight(sigma[:1]).sqrt()
    assert scores.abs() < 4 * spread


def test_the_stable_target_of_a_label_is_over_its_own_images():
    """With all targets from all images the network would learn to ignore its labels."""
    images = torch.tensor([0.1, 0.2, 0.9])[:, None, None, None].expand(3, 1, 4, 4).contiguous()
    data, kernel = 2 * images - 1, PFGMPPKernel(64)
    x, sigma = torch.zeros(3, 1, 4, 4), torch.full((3,), 5.0, dtype=torch.float64)
    allowed = torch.tensor([[True, True, False], [False, False, True], [True, True, True]])
    target = posterior_mean(kernel, x, sigma, data, allowed)
    assert torch.allclose(target[1], data[2]) and (target[0] < -0.55).all()
    assert torch.allclose(target[2], posterior_mean(kernel, x, sigma, data)[2])
    labels = torch.tensor([0, 0, 1])
    made = train_pfgmpp(images, labels, D=64, stf=True, reference=8, batch_size=3, steps=2, width=8)
    assert made.pipeline.config.null_label == 2 and np.isfinite(made.losses).all()


SHORT = {"steps": 3, "batch_size": 8, "width": 8, "learning_rate": 1e-3}


def some_images(n: int = 20, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, size, size, generator=rng()), torch.arange(n) % 3


def weights(made) -> Tensor:
    return torch.cat([p.flatten() for p in made.pipeline.unet.parameters()])


def test_training_is_repeatable_and_shares_its_draws_over_D():
    images, labels = some_images()
    before = torch.get_rng_state()
    a, b = (train_pfgmpp(images, labels, D=64, seed=3, **SHORT) for _ in range(2))
    assert torch.equal(weights(a), weights(b)) and a.losses == b.losses
    assert torch.equal(before, torch.get_rng_state())
    near, edm = (
        train_pfgmpp(images, labels, D=1e9, seed=3, **SHORT),
        train_pfgmpp(images, labels, D="inf", seed=3, **SHORT),
    )
    assert near.losses == pytest.approx(edm.losses, rel=1e-3)
    assert train_pfgmpp(images, labels, D=64, seed=4, **SHORT).losses != a.losses
    assert (a.images, a.cut) == (24, 0.0)


def test_the_average_follows_edms_half_life():
    """θ_ema <- θ + 2^{-b/h} (θ_ema - θ), h = min(half life, 5% of the images so far), written out."""
    seen = []

    class Recorder(Perceptron):
        def forward(self, sample, timestep, class_labels=None):
            if self.training:
                seen.append(torch.cat([p.detach().flatten() for p in self.parameters()]).clone())
            return super().forward(sample, timestep)

    made = train_pfgmpp(points(), D=4, unet=Recorder(), steps=30, batch_size=24, half_life=20, seed=0, ramp_up=1)
    averaged = seen[0]
    for step, after in enumerate(seen[1:]):
        h = min(20, 0.05 * step * 24)
        averaged = after + (0.5 ** (24 / h) if h else 0.0) * (averaged - after)
    # ``seen`` holds the weights before each step: the last step's are only in the result.
    h = min(20, 0.05 * 29 * 24)
    last = (weights(made) - 0.5 ** (24 / h) * averaged) / (1 - 0.5 ** (24 / h))
    assert (last - seen[-1]).abs().max() < 0.02 and not torch.equal(weights(made), seen[-1])


def test_a_loss_that_is_not_finite_stops_the_training():
    """The official loop sets such gradients to 0 or 1e5 and goes on."""

    class Fails(Perceptron):
        def forward(self, sample, timestep, class_labels=None):
            out = super().forward(sample, timestep).sample
            self.calls = getattr(self, "calls", 0) + 1
            return UNet2DOutput(sample=out * math.nan if self.calls == 3 else out)

    with pytest.raises(TrialError, match="not finite at step 3"):
        train_pfgmpp(points(), D=4, unet=Fails(), steps=5, batch_size=4)


@pytest.mark.parametrize("formulation", ["edm", "ve", "ddpm"])
@pytest.mark.parametrize("D", [0.5, 128, INF])
def test_every_variant_trains_and_samples(formulation, D):
    images, labels = some_images()
    made = train_pfgmpp(images, labels, D=D, formulation=formulation, **SHORT)
    pipe = made.pipeline
    pipe.set_progress_bar_config(disable=True)
    x = pipe([0, 2], num_inference_steps=3, generator=rng(), output_type="pt").images
    assert x.shape == (2, 1, 8, 8) and x.isfinite().all() and np.isfinite(made.losses).all()
    assert pipe.scheduler.config.formulation == pipe.config.formulation == formulation


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 12), (3, 5, 5), (1, 32, 32)])
def test_unlabelled_images_of_any_shape(shape):
    made = train_pfgmpp(torch.rand(4, *shape, generator=rng()), D=64, steps=1, batch_size=2, width=8)
    pipe = made.pipeline
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.null_label is None
    assert pipe(num_inference_steps=2, generator=rng(), output_type="pt").images.shape == (1, *shape)


# ------------------------------------------------------------------ users' data


def save_images(folder: Path, archive: Path, nested: bool) -> tuple[np.ndarray, list[int]]:
    """EDM's layout: 00000/img00000000.png, ... and dataset.json, as a zip; or folders of classes."""
    g = np.random.default_rng(0)
    arrays, labels = g.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), [2, 0, 1, 1, 0, 2]
    with zipfile.ZipFile(archive, "w") as file:
        listed = []
        for i, (array, label) in enumerate(zip(arrays, labels, strict=True)):
            name = f"00000/img{i:08d}.png"
            path = folder / (f"class{label}/{i}.png" if nested else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
            file.write(path, name)
            listed.append([name, label])
        file.writestr("dataset.json", json.dumps({"labels": listed}))
    return arrays, labels


def test_edms_zip_and_folders_of_classes_are_read(tmp_path):
    arrays, labels = save_images(tmp_path / "classes", tmp_path / "data.zip", nested=True)
    images, found = read_images(tmp_path / "data.zip", channels=None, labelled=None)
    assert torch.equal(images, torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255)
    assert found is not None and found.tolist() == labels
    images, found = read_images(tmp_path / "classes", channels=None, labelled=None)
    assert found is not None and found.tolist() == sorted(labels) and images.shape == (6, 3, 8, 8)
    assert read_images(tmp_path / "classes/class0", channels=None, labelled=None)[1] is None
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as file:
        file.write(tmp_path / "classes/class0/1.png", "00000/a.png")
        file.writestr("dataset.json", '{"labels": null}')
    assert read_images(tmp_path / "none.zip", channels=None, labelled=None)[1] is None
    for text, message in (('{"labels": [["00000/b.png", 1]]}', "label None of"), ("[]", "dataset.json")):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
            file.write(tmp_path / "classes/class0/1.png", "00000/a.png")
            file.writestr("dataset.json", text)
        with pytest.raises(InputError, match=message):
            read_images(tmp_path / "bad.zip", channels=None, labelled=None)
    (tmp_path / "no.zip").write_text("no zip")
    with pytest.raises(InputError, match="a zip file that can be read"):
        read_images(tmp_path / "no.zip")


def test_apply_makes_a_pipeline_folder(tmp_path):
    save_images(tmp_path / "classes", tmp_path / "data.zip", nested=True)
    lines: list[str] = []
    settings = {"steps": 2, "batch_size": 4, "width": 8, "D": 64.0}
    record = apply(tmp_path / "data.zip", None, tmp_path / "out", log=lines.append, **settings)
    assert record["classes"] == 3 and record["D"] == 64 and lines[-1].startswith("step 2/2")
    pipe = load_pipeline(tmp_path / "out")
    assert type(pipe) is PFGMPPPipeline and pipe.config.null_label == 3 and pipe.unet.config.in_channels == 3
    again = apply("anything", tmp_path / "data.zip", tmp_path / "again", **settings)
    assert again["loss"] == record["loss"]


def test_apply_takes_a_reference_subjects_own_images(tmp_path):
    from steersman.engine.artefacts import run_verb

    record = run_verb("apply", "pfgm++", "digits", tmp_path / "a", None, {"steps": 1, "batch_size": 2, "width": 8})
    assert record["method"] == "pfgm-pp" and record["metrics"]["classes"] == 10
    assert load_pipeline(tmp_path / "a").unet.config.sample_size == 8


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("D", [0, -1.0, math.nan, True, None, "many", torch.ones(1, 8, 8), np.ones(3), 10**400])
def test_a_D_that_is_no_D(D):
    for make in (PFGMPPKernel, lambda D: PFGMPPScheduler(D=D), lambda D: train_pfgmpp(some_images()[0], D=D, steps=1)):
        with pytest.raises(InputError, match=r"^D=.*one real number above 0"):
            make(D)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"sigma_min": 0.0}, "sigma_min=0.0"),
        ({"sigma_min": -1.0}, "sigma_min=-1.0"),
        ({"sigma_min": 90.0}, "below sigma_max=80"),
        ({"sigma_max": math.inf}, "sigma_max=inf"),
        ({"sigma_data": 0.0}, "sigma_data"),
        ({"rho": 0}, "rho"),
        ({"solver": "rk4"}, "heun, euler"),
        ({"sigma_schedule": "linear"}, "karras, exponential"),
        ({"prediction_type": "sample"}, "epsilon, v_prediction"),
        ({"formulation": "ve", "prediction_type": "v_prediction"}, "one of epsilon"),
        ({"formulation": "vp"}, "edm, ve, ddpm"),
        ({"d": 4}, "did you mean 'D'|one of"),
    ],
)
def test_bad_settings_are_refused(setting, text):
    with pytest.raises(InputError, match=text):
        PFGMPPScheduler(**setting)


def test_churn_is_refused():
    scheduler = PFGMPPScheduler(D=64)
    scheduler.set_timesteps(3)
    x = scheduler.prior((1, 1, 4, 4), rng())
    with pytest.raises(InputError, match=r"s_churn=40 .* leaves the noise law"):
        scheduler.step(x, scheduler.timesteps[0], x, s_churn=40)
    scheduler.step(x, scheduler.timesteps[0], x, s_churn=0, s_noise=1.0)
    for n in (0, 1.5, True):
        with pytest.raises(InputError, match="num_inference_steps"):
            scheduler.set_timesteps(n)
    with pytest.raises(InputError, match="times"):
        scheduler.set_timesteps(timesteps=[0.1, 0.9])


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"steps": -1}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"width": 12}, "multiple of 8"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"stf": True, "reference": 4}, "reference"),
        ({"labels": torch.ones(20)}, "labels"),
        ({"labels": torch.arange(3)}, "labels"),
        ({"images": torch.rand(4, 8, 8)}, "images"),
        ({"images": 2 * torch.rand(4, 1, 8, 8)}, "images"),
        ({"formulation": "vp"}, "formulation"),
        ({"unet": Perceptron()}, "of 4 labels, the null label last"),
        ({"unet": Perceptron(num_class_embeds=4), "labels": None}, "without labels"),
        ({"unet": Perceptron(in_channels=3)}, "of 1 channels"),
    ],
)
def test_bad_trainings_are_refused(changed, text):
    images, labels = some_images()
    arguments = {"images": images, "labels": labels} | SHORT | changed
    with pytest.raises(InputError, match=text):
        train_pfgmpp(**arguments)


# ------------------------------------------------------------------ where the official code errs


def test_clipped_beta_draws_are_another_law():
    """Official training clips B to [1e-3, 1 - 1e-3]: harmless at N = 3072, D = 128, but not elsewhere."""
    count = 20_000

    def compare(N: int, D: float) -> tuple[float, float, float]:
        g = np.random.default_rng(0)
        b = g.beta(N / 2, D / 2, count)
        kept = np.clip(b, 1e-3, 1 - 1e-3)
        official = np.sqrt(D * (kept / (1 - kept + 1e-8) + 1e-8))
        exact = radii(PFGMPPKernel(D).noise(torch.empty(4000, N), rng()))
        return (b != kept).mean(), official.mean() / exact.mean(), np.median(official) / np.median(exact)

    clipped, mean, _ = compare(2, 2048)
    assert clipped == pytest.approx(0.64, abs=0.02) and mean == pytest.approx(1.30, abs=0.02)
    clipped, _, median = compare(3072, 1)
    assert clipped == pytest.approx(0.92, abs=0.02) and 1 / median == pytest.approx(2.6, abs=0.15)
    clipped, mean, median = compare(3072, 128)
    assert clipped == 0 and mean == pytest.approx(1, abs=0.01) and median == pytest.approx(1, abs=0.01)


def test_the_callers_sigma_max_is_where_sampling_starts():
    """The official sampler starts from σ = 80 for every image below 256x256x3, whatever it is told."""
    for sigma_max in (40.0, 80.0, 380.0):
        scheduler = PFGMPPScheduler(D=128, sigma_max=sigma_max)
        x = scheduler.prior((500, 3, 8, 8), rng())
        assert (radii(x) ** 2).mean() / 192 == pytest.approx(sigma_max**2 * 128 / 126, rel=0.05)
        scheduler.set_timesteps(3)
        assert scheduler._slots[0].sigma == sigma_max


def test_stable_targets_are_a_mean_at_every_distance():
    """The official weights are powers of (least distance)/(distance + 1e-7), with 1e-7 added to their sum."""
    data = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    for x, sigma in ((data, 1e-9), (1e9 * data, 1e9), (torch.full((1, 1), 1e5, dtype=torch.float64), 1e-3)):
        mean = posterior_mean(PFGMPPKernel(1e4), x, sigma, data)
        assert mean.isfinite().all() and mean.abs().max() <= 1
    at_a_datum = posterior_mean(PFGMPPKernel(1e4), data, 1e-9, data)
    assert torch.equal(at_a_datum, data)
    # Theirs at the same place: all weights vanish, and the target is pulled to 0.
    distance = (data - data.T).abs().square().add(1e-18 * 1e4).sqrt()
    power = (distance.min(1, keepdim=True).values / (distance + 1e-7)) ** (1 + 1e4)
    theirs = (power / (power.sum(1, keepdim=True) + 1e-7)) @ data
    assert theirs.abs().max() < 1e-3
