"""RDDM: the process and its posterior, the modes, DDIM's conversion, paths, training, files, hosts, and refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from steersman.diffusion import ClassConditionalPipeline, DDIMScheduler, RDDMRestorationPipeline, RDDMScheduler
from steersman.diffusion.adaptive_guidance import AdaptiveGuidance
from steersman.diffusion.images import load_pipeline
from steersman.diffusion.rddm import Levels, Pairs, apply, choose_objective, increments, read_pairs, train_rddm
from steersman.diffusion.rddm.levels import Level, grid
from steersman.diffusion.rddm.pipeline import Networks, as_images
from steersman.diffusion.rddm.predictions import estimate, noise_of_residual, residual_of_noise, targets
from steersman.diffusion.rddm.training import TrainingConfig, make_network
from steersman.engine.artefacts import run_verb
from steersman.errors import InputError, TrialError
from steersman.reference import loading
from tests.diffusion import tiny

T = 1000
NATIVE = ("res_noise", "res", "epsilon", "x0_noise", "res_add_noise", "x0_add_noise", "sample")


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=g(seed), dtype=dtype)


def exact(**settings) -> RDDMScheduler:
    """Of exact predictions, which nothing clips."""
    settings = {"prediction_type": "res_noise", "clip_sample": False, "residual_range": None} | settings
    return RDDMScheduler(**settings)


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.rand(12, 3, 16, 16, generator=g())
    return target, 0.5 * target


# ------------------------------------------------------------------ exact checks: the process


@pytest.mark.parametrize("schedule", ["decreasing", "increasing", "average", "power", "power_decreasing", "normal"])
@pytest.mark.parametrize("s", [0.01, 1.0, 2.5])
def test_schedules_sum_to_one_and_to_s_and_never_fall(schedule, s):
    scheduler = RDDMScheduler(residual_schedule=schedule, noise_schedule=schedule, sum_scale=s, residual_power=0.3)
    levels = scheduler.levels
    assert increments(schedule, T, 0.3).sum() == pytest.approx(1, abs=1e-12)
    assert levels.alpha[-1] == 1 and levels.beta[-1] ** 2 == pytest.approx(s, abs=1e-12)
    assert (np.diff(levels.alpha) >= 0).all() and (np.diff(levels.beta) >= 0).all()
    assert levels.at(-1) == (0, 0) and scheduler.init_noise_sigma == pytest.approx(math.sqrt(s))


def test_the_published_schedules_and_their_powers():
    u = np.arange(1, T + 1)
    assert increments("decreasing", T) == pytest.approx((T + 1 - u) / (T * (T + 1) / 2), abs=1e-15)
    assert increments("increasing", T) == pytest.approx(u / (T * (T + 1) / 2), abs=1e-15)
    # P(x, 1) has a zero end point, and is linear after it.
    assert increments("power", T, 1)[0] == 0
    assert increments("power", T, 1)[1:] == pytest.approx(increments("increasing", T - 1), abs=1e-15)
    assert increments("power_decreasing", T, 1) == pytest.approx(increments("power", T, 1)[::-1], abs=1e-15)
    assert increments("power", T, 0) == pytest.approx(increments("average", T), abs=1e-15)
    x = np.linspace(0, 1, T) ** 0.3
    assert increments("power", T, 0.3) == pytest.approx(x / x.sum(), abs=1e-15)
    bell = increments("normal", T)
    assert bell == pytest.approx(bell[::-1], abs=1e-15)
    assert bell[500] / bell[0] == pytest.approx(math.exp(4.5), rel=1e-4)


def test_iterating_the_forward_process_gives_the_closed_form():
    """To t = 600 of 1000: at T alone a wrong α would pass."""
    alpha, beta2 = increments("decreasing", T), 0.5 * increments("increasing", T)
    levels = RDDMScheduler(sum_scale=0.5).levels
    i0, res, n = 0.3, -0.8, 50_000
    x, still, noise = torch.full((n,), i0, dtype=torch.float64), i0, g()
    for u in range(600):
        x = x + alpha[u] * res + math.sqrt(beta2[u]) * torch.randn(n, generator=noise, dtype=torch.float64)
        still += alpha[u] * res
    a, b = levels.at(599)
    assert still == pytest.approx(i0 + a * res, abs=1e-12)
    assert abs(x.mean().item() - (i0 + a * res)) < 4 * b / math.sqrt(n)
    assert abs(x.var().item() - b**2) < 4 * b**2 * math.sqrt(2 / n)
    shape = (4, 1, 2, 2)
    target, eps = draw(*shape), draw(*shape, seed=1)
    made = RDDMScheduler(sum_scale=0.5).add_noise(target, eps, torch.tensor([599]), torch.full(shape, res).double())
    assert torch.allclose(made, target + a * res + b * eps, atol=1e-12)


@pytest.mark.parametrize("form", ["noise", "start", "closed"])
def test_deterministic_steps_with_exact_predictions_stay_on_the_closed_form(form):
    """From any t to any earlier one, so whatever the grid."""
    target, res, eps = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), draw(3, 2, 4, 4, seed=2)
    scheduler = exact(step_form=form)
    for times in ([999, 500, 3], [700, 699, 698, 20], [850, 0]):
        scheduler.set_timesteps(timesteps=times)
        x = scheduler.add_noise(target, eps, torch.tensor(times[:1]), res)
        for t, s in pairwise(times):
            x = scheduler.step((res, eps), t, x).prev_sample
            a, b = scheduler.levels.at(s)
            assert (x - (target + a * res + b * eps)).abs().max() < 1e-10
        assert (scheduler.step((res, eps), times[-1], x).prev_sample - target).abs().max() < 1e-10


def test_a_stochastic_step_draws_from_the_gaussian_posterior():
    """Condition the joint Gaussian of (I_s, I_t) given I_0 and I_res on I_t: nothing of the method's own algebra."""
    i0, res, n = 0.4, -1.1, 200_000
    for t, s in ((999, 998), (700, 300), (400, 5)):
        scheduler = exact(eta=1.0, sum_scale=0.7)
        (at, bt), (as_, bs) = scheduler.levels.at(t), scheduler.levels.at(s)
        mean = np.array([i0 + as_ * res, i0 + at * res])
        cov = np.array([[bs**2, bs**2], [bs**2, bt**2]])  # I_t is I_s and independent noise
        x = 0.9
        wanted = mean[0] + cov[0, 1] / cov[1, 1] * (x - mean[1])
        variance = cov[0, 0] - cov[0, 1] ** 2 / cov[1, 1]
        # ε̂ of the exact I_0 at this I_t.
        eps = (x - mean[1]) / bt
        scheduler.set_timesteps(timesteps=[t, s])
        state = torch.full((n, 1, 1, 1), x, dtype=torch.float64)
        like = torch.ones_like(state)
        out = scheduler.step((res * like, eps * like), t, state, generator=g()).prev_sample
        z = torch.randn(state.shape, generator=g(), dtype=torch.float64)
        assert (out - (wanted + math.sqrt(variance) * z)).abs().max() < 1e-10
        # The x_0 form of the mean, and its published coefficients.
        da, db2 = at - as_, bt**2 - bs**2
        form = bs**2 / bt**2 * x + (db2 * as_ - bs**2 * da) / bt**2 * res + db2 / bt**2 * i0
        assert form == pytest.approx(wanted, abs=1e-10)
        assert bt - math.sqrt(bs**2 - variance) == pytest.approx(db2 / bt, abs=1e-12)


def test_all_kinds_of_prediction_agree_when_they_are_consistent():
    target, x_in, eps = draw(2, 3, 4, 4).clamp(-1, 1), draw(2, 3, 4, 4, seed=1).clamp(-1, 1), draw(2, 3, 4, 4, seed=2)
    scheduler = RDDMScheduler()
    for t in (0, 1, 100, 600, 990):
        level = scheduler.levels.at(t)
        x = target + level.alpha * (x_in - target) + level.beta * eps
        for kind in NATIVE:
            found = estimate(kind, targets(kind, target, x_in - target, eps), x, x_in, level)
            assert (found.x0 - target).abs().max() < 1e-6, (kind, t)
            assert (found.res - (x_in - target)).abs().max() < 1e-6, (kind, t)
            assert (found.eps - eps).abs().max() < 1e-6, (kind, t)


@pytest.mark.parametrize("form", ["noise", "start", "closed"])
def test_the_forms_of_a_step_agree_on_consistent_predictions(form):
    target, res, eps = draw(2, 1, 2, 2).clamp(-1, 1), draw(2, 1, 2, 2, seed=1).clamp(-1, 1), draw(2, 1, 2, 2, seed=2)
    a, b = exact(eta=0.6), exact(eta=0.6, step_form=form)
    for scheduler in (a, b):
        scheduler.set_timesteps(timesteps=[800, 200])
    x = a.add_noise(target, eps, torch.tensor([800]), res)
    one, other = (s.step((res, eps), 800, x, generator=g()).prev_sample for s in (a, b))
    assert (one - other).abs().max() < 1e-12


# ------------------------------------------------------------------ exact checks: DDIM


def run(scheduler, network, x, steps, **extra):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **extra).prev_sample
    return x


def network(x, t):
    return torch.tanh(1.3 * x + float(t) / T)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_converted_scheduler_is_ddim(last, clip, kind):
    theirs = diffusers.DDIMScheduler(clip_sample=clip, set_alpha_to_one=last, prediction_type=kind)
    ours = RDDMScheduler.from_ddim(theirs)
    x = draw(2, 3, 4, 4)
    for n in (5, 10, 20, 50):
        a, b = run(theirs, network, x.float(), n), run(ours, network, x.float(), n)
        assert ((a - b).norm() / a.norm()) < 1e-5
        assert theirs.timesteps.tolist() == ours.timesteps.tolist()
    # In double precision, with the table that diffusers keeps in single precision.
    theirs.alphas_cumprod = torch.from_numpy((1 - ours.levels.alpha) ** 2)
    theirs.final_alpha_cumprod = torch.tensor(1.0).double() if last else theirs.alphas_cumprod[0]
    for n in (5, 10, 20, 50):
        a, b = run(theirs, network, x, n), run(ours, network, x, n)
        assert ((a - b).norm() / a.norm()) < 1e-12


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_with_noise_a_converted_scheduler_is_ddim_unless_it_has_its_own_variance(eta):
    theirs = diffusers.DDIMScheduler(clip_sample=False)
    ours = RDDMScheduler.from_ddim(theirs, eta=eta)
    x = draw(2, 3, 4, 4, dtype=torch.float32)
    a = run(theirs, network, x, 10, eta=eta, generator=g())
    b = run(ours, network, x, 10, generator=g())
    assert ((a - b).norm() / a.norm()) < 1e-5
    own = RDDMScheduler.from_ddim(theirs, eta=eta, variance="rddm")
    assert ((a - run(own, network, x, 10, generator=g())).norm() / a.norm()) > 1e-2
    # DDIM's variance is RDDM's divided by abar of the step's end, and its deviation (not its variance) times η.
    abar = (1 - ours.levels.alpha) ** 2
    t, s = 599, 399
    rddm = (abar[s] - abar[t]) * (1 - abar[s]) / (1 - abar[t])
    ddim = (1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])
    assert ddim == pytest.approx(rddm / abar[s], rel=1e-12)


def test_there_and_back_to_ddim():
    theirs = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    back = RDDMScheduler.from_ddim(theirs).to_ddim()
    for name in ("beta_schedule", "beta_start", "beta_end", "clip_sample", "steps_offset", "prediction_type"):
        assert back.config[name] == theirs.config[name]
    assert torch.equal(back.alphas_cumprod, theirs.alphas_cumprod)
    with pytest.raises(InputError, match="residual_schedule"):
        RDDMScheduler(prediction_type="epsilon").to_ddim()
    with pytest.raises(InputError, match="residual_schedule"):
        RDDMScheduler.from_ddim(theirs, residual_schedule="average", clip_sample=True).to_ddim()


def test_another_alpha_for_a_trained_network():
    """The authors' readjusted path finds the residual by the trained ᾱ, and moves along the new one."""
    theirs = diffusers.DDIMScheduler(clip_sample=False)
    ours = RDDMScheduler.from_ddim(theirs, residual_schedule="power_decreasing", residual_power=0.3, step_form="noise")
    ours.set_timesteps(10)
    old = 1 - torch.from_numpy(1 - RDDMScheduler.from_ddim(theirs).levels.alpha)
    new = np.cumsum(increments("power_decreasing", T, 0.3))
    x, eps = draw(1, 1, 2, 2), draw(1, 1, 2, 2, seed=1)
    t, s = ours.timesteps[3].item(), ours.timesteps[4].item()
    ours.set_begin_index(3)
    beta = ours.levels.beta
    res = (x - beta[t] * eps) / (old[t] - 1)
    wanted = x - (new[t] - new[s]) * res - (beta[t] - beta[s]) * eps
    assert (ours.step(eps, t, x).prev_sample - wanted).abs().max() < 1e-12
    by_path = RDDMScheduler.from_ddim(
        theirs, residual_schedule="power_decreasing", residual_power=0.3, residual_from="path", clip_sample=True
    )
    by_path.set_timesteps(timesteps=[t])
    x0 = ((x - beta[t] * eps) / (1 - new[t])).clamp(-1, 1)
    assert (by_path.step(eps, t, x).pred_original_sample - x0).abs().max() < 1e-12


# ------------------------------------------------------------------ exact checks: a law


@pytest.mark.parametrize(
    ("eta", "s", "n", "variance"),
    [
        (0, 1, 10, 0.0552),
        (0, 1, 50, 0.0817),
        (0, 1, 1000, 0.0896),
        (1, 1, 10, 0.0451),
        (1, 1, 50, 0.0752),
        (1, 1, 1000, 0.0891),
        (0, 0.01, 10, 0.0635),
        (0, 0.01, 50, 0.0840),
        (0, 0.01, 1000, 0.0897),
    ],
)
def test_few_steps_lose_variance_of_a_gaussian_posterior(eta, s, n, variance):
    """I_0 | I_in ~ N(0.4, 0.09), I_in = -0.2, and the exact E[I_res | I_t, I_in]: the mean is right at every n, and
    the variance comes from below. A third to two thirds of it are missing at 10 steps."""
    m, S, y, draws = 0.4, 0.09, -0.2, 20_000
    scheduler = exact(prediction_type="res", eta=float(eta), sum_scale=s)
    scheduler.set_timesteps(n)
    x_in = torch.full((draws, 1), y, dtype=torch.float64)
    x = x_in + math.sqrt(s) * draw(draws, 1)
    noise = g(1)
    for t, move in zip(scheduler.timesteps.tolist(), scheduler.moves, strict=True):
        a, b = move.start
        gain = (1 - a) * S / ((1 - a) ** 2 * S + b**2)
        res = x_in - (m + gain * (x - a * y - (1 - a) * m))
        x = scheduler.step(res, t, x, x_in, noise).prev_sample
    assert abs(x.mean().item() - m) < 4 * math.sqrt(variance / draws)
    assert abs(x.var().item() - variance) < 4 * variance * math.sqrt(2 / draws) + 1e-4


def test_without_noise_the_process_is_cold_diffusion():
    target, x_in = draw(2, 1, 4, 4).clamp(-1, 1), draw(2, 1, 4, 4, seed=1).clamp(-1, 1)
    scheduler = RDDMScheduler(sum_scale=0)
    scheduler.set_timesteps(7)
    x = x_in
    for t in scheduler.timesteps:
        x = scheduler.step(x_in - target, t, x, x_in).prev_sample
        assert torch.isfinite(x).all()
    assert (x - target).abs().max() < 1e-12
    with pytest.raises(InputError, match="sum_scale"):
        RDDMScheduler(sum_scale=0, prediction_type="res_noise")


# ------------------------------------------------------------------ exact checks: paths


def test_all_paths_end_in_the_same_image_for_one_residual_and_one_noise():
    target, x_in, eps = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2)
    scheduler = exact(condition="levels", sum_scale=0.6)
    top = scheduler.levels.start
    own = [top, (0.8, top.beta), (0.8, 0.3), (0.1, 0.3), (0.1, 0.0), (0.0, 0.0)]
    for path in ("simultaneous", "residual_first", "noise_first", own):
        scheduler.set_timesteps(**({"path": own} if path is own else {"path": path, "num_inference_steps": 9}))
        x = x_in + top.beta * eps
        for t in scheduler.timesteps:
            x = scheduler.step((x_in - target, eps), t, x, x_in).prev_sample
        assert (x - target).abs().max() < 1e-12, path
        assert len(scheduler.timesteps) == (5 if path is own else 9)


class Recorder(torch.nn.Module):
    """A network that answers zeros and remembers what it was told."""

    def __init__(self, channels: int):
        super().__init__()
        self.told: list[float] = []
        self.config = diffusers.configuration_utils.FrozenDict(
            in_channels=2 * channels, out_channels=channels, block_out_channels=(4, 4, 4), sample_size=8
        )
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, x, t):
        assert (t == t[0]).all()
        self.told.append(float(t[0]))
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=torch.zeros_like(x[:, : self.config.out_channels]))


@pytest.mark.parametrize("loop", [False, True])
def test_networks_are_told_the_levels_that_there_are(loop):
    """The sums telescope, whatever the networks are told: so look at that. The authors' script tells the loop's."""
    residual_net, noise_net = Recorder(1), Recorder(1)
    scheduler = RDDMScheduler(prediction_type="res_noise", condition="levels", loop_levels=loop)
    nets = Networks(residual_net, noise_net, "res_noise")
    top = scheduler.levels.start
    scheduler.set_timesteps(8, path="residual_first")
    x = torch.zeros(2, 1, 8, 8)
    for t, move in zip(scheduler.timesteps, scheduler.moves, strict=True):
        out = nets(x, Level(move.told.alpha * T, move.told.beta * T), x, None)
        x = scheduler.step(out, t, x, x).prev_sample
    times = grid(T, 4)[:-1]
    alpha, beta = ([T * float(v[t]) for t in times] for v in (scheduler.levels.alpha, scheduler.levels.beta))
    assert residual_net.told[:4] == pytest.approx(alpha) and noise_net.told[4:] == pytest.approx(beta)
    if loop:
        assert noise_net.told[:4] == pytest.approx(beta) and residual_net.told[4:] == pytest.approx(alpha)
    else:
        assert noise_net.told[:4] == pytest.approx([top.beta * T] * 4)  # the noise is all there still
        assert residual_net.told[4:] == [0.0] * 4  # the residual is gone


def test_the_published_grid():
    assert grid(1000, 5) == [999, 799, 599, 399, 199, -1]
    assert grid(1000, 1) == [999, -1] and grid(1000, 1000) == list(range(999, -2, -1))
    for n in (1, 2, 3, 7, 10, 26, 50, 999):
        exact_ = [math.floor(-1 + i * 1000 / n + 1e-9) for i in range(n + 1)]
        assert grid(1000, n)[::-1] == exact_
    # In single precision, as the authors lay it out, the middle of 26 steps is a timestep early.
    single = torch.linspace(-1, 999, steps=27).int().tolist()[::-1]
    assert single != grid(1000, 26) and max(abs(a - b) for a, b in zip(single, grid(1000, 26), strict=True)) == 1


# ------------------------------------------------------------------ errata


def test_erratum_clipping_the_residual_at_one_destroys_black_and_white_swaps():
    target, x_in = torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2)
    for by, error in ((2.0, 0.0), (1.0, 1.0)):
        scheduler = RDDMScheduler(prediction_type="res", residual_range=by)
        scheduler.set_timesteps(5)
        x = x_in + scheduler.init_noise_sigma * draw(1, 1, 2, 2, dtype=torch.float32)
        for t in scheduler.timesteps:
            x = scheduler.step(x_in - target, t, x, x_in).prev_sample
        assert (x - target).abs().max().item() == pytest.approx(error, abs=1e-5)


def test_erratum_sums_before_the_first_one_are_zero():
    """The authors pad the sums before index 0 with 1, and mend that for t = 0 by hand."""
    levels = RDDMScheduler().levels
    assert levels.at(-1) == (0.0, 0.0)
    padded = np.concatenate([[1.0], levels.beta[:-1] ** 2])
    variance = (levels.beta**2 - padded) * padded / levels.beta**2
    assert variance[0] < 0 < variance[1]
    scheduler = exact(eta=1.0)
    scheduler.set_timesteps(timesteps=[0])
    x, res, eps = draw(1, 1, 2, 2), draw(1, 1, 2, 2, seed=1), draw(1, 1, 2, 2, seed=2)
    a, b = levels.at(0)
    assert (scheduler.step((res, eps), 0, x).prev_sample - (x - a * res - b * eps)).abs().max() < 1e-12


def test_erratum_the_variance_of_the_noise_may_exceed_one():
    """The authors cut the sum of β² at 1, while they start from √s."""
    scheduler = RDDMScheduler(sum_scale=4.0)
    assert scheduler.init_noise_sigma == pytest.approx(2.0)
    assert scheduler.levels.beta[-1] == pytest.approx(2.0) and scheduler.levels.beta[499] ** 2 < 1.01


def test_erratum_noise_prediction_lives_by_its_clip():
    """β̄/(1 - ᾱ) is 4e5 one timestep below the start, and 9e3 ten below."""
    levels = RDDMScheduler(prediction_type="epsilon").levels
    gain = levels.beta / np.maximum(1 - levels.alpha, 1e-6)
    assert 3e5 < gain[998] < 6e5 and 7e3 < gain[989] < 1.1e4
    with pytest.raises(InputError, match="clip_sample"):
        RDDMScheduler(prediction_type="epsilon", clip_sample=False)
    RDDMScheduler.from_ddim(diffusers.DDIMScheduler(clip_sample=False))  # where ᾱ_T is below 1


def test_erratum_clipped_steps_of_a_converted_scheduler_are_ddims():
    """The authors' step subtracts a clipped residual from a state made of an unclipped one."""
    theirs = diffusers.DDIMScheduler(clip_sample=True)
    x = draw(2, 3, 4, 4, dtype=torch.float32)
    wanted = run(theirs, network, x, 10)
    assert (run(RDDMScheduler.from_ddim(theirs), network, x, 10) - wanted).abs().max() < 1e-5
    assert (run(RDDMScheduler.from_ddim(theirs, step_form="noise"), network, x, 10) - wanted).abs().max() > 1e-2


def test_erratum_the_residual_only_leg_leaves_the_noise_in_the_image():
    """The authors end it with an estimate clipped to [-1, 1], which cuts the noise that is still to be taken away."""
    scheduler = exact(condition="levels")
    target, eps = draw(1, 1, 8, 8).clamp(-1, 1), draw(1, 1, 8, 8, seed=1)
    x_in, top = 0.5 * target, scheduler.levels.start
    scheduler.set_timesteps(10, path="residual_first")
    x = x_in + top.beta * eps
    for t in scheduler.timesteps[:5]:
        x = scheduler.step((x_in - target, eps), t, x, x_in).prev_sample
    assert (x - (target + top.beta * eps)).abs().max() < 1e-12 and x.abs().max() > 1


# ------------------------------------------------------------------ AOSA


def test_aosa_mixes_two_readings_of_one_output():
    target, x_in, eps = draw(2, 1, 4, 4).clamp(-1, 1), draw(2, 1, 4, 4, seed=1).clamp(-1, 1), draw(2, 1, 4, 4, seed=2)
    a, b = RDDMScheduler().levels.at(500)
    x = target + a * (x_in - target) + b * eps
    assert (residual_of_noise(eps, x, x_in, a, b) - (x_in - target)).abs().max() < 1e-12
    assert (noise_of_residual(x_in - target, x, x_in, a, b) - eps).abs().max() < 1e-12
    # At the start 1 - ᾱ is 0, and the clip is all that keeps the residual finite.
    one = residual_of_noise(eps, x, x_in, 1.0, 1.0)
    assert one.abs().max() <= 2


def test_aosa_decides_within_its_band_and_trains_from_new_weights(pairs):
    target, x_in = pairs
    config = TrainingConfig(steps=30, batch_size=4, learning_rate=5e-3, seed=3)
    made = choose_objective(Pairs.of(target, x_in), sum_scale=1.0, see_input=True, loss="l1", width=4, config=config)
    assert made.lambdas[0] == 0.5 and abs(made.lambdas[-1] - 0.5) >= 0.01
    assert all(abs(v - 0.5) < 0.01 for v in made.lambdas[:-1])
    assert made.choice == ("res" if made.lambdas[-1] > 0.5 else "epsilon")
    auto = train_rddm(target, x_in, prediction_type="auto", width=4, steps=3, batch_size=4, seed=3)
    plain = train_rddm(target, x_in, prediction_type=auto.choice, width=4, steps=3, batch_size=4, seed=3)
    assert auto.losses == plain.losses and auto.pipeline.scheduler.config.prediction_type == auto.choice


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", NATIVE)
def test_every_kind_is_trained(pairs, kind):
    target, x_in = pairs
    made = train_rddm(target, x_in, prediction_type=kind, width=4, steps=2, batch_size=4)
    out = made.pipeline(x_in[:2], num_inference_steps=2, output_type="pt").images
    assert out.shape == (2, 3, 16, 16) and out.isfinite().all() and len(made.losses) == 2


def test_two_networks_and_levels_and_a_mask_and_no_input(pairs):
    target, x_in = pairs
    mask = torch.zeros(12, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    made = train_rddm(target, x_in, mask, prediction_type="res_noise", nets=2, condition="levels", width=4, steps=2)
    assert made.pipeline.unet.config.in_channels == 7 and made.pipeline.noise_unet.config.out_channels == 3
    one, two = (
        made.pipeline(x_in[:1], mask[:1], path=p, num_inference_steps=4, output_type="pt", generator=g()).images
        for p in ("residual_first", "noise_first")
    )
    assert one.shape == (1, 3, 16, 16) and not torch.equal(one, two)
    blind = train_rddm(target, x_in, prediction_type="res_noise", see_input=False, width=4, steps=1).pipeline
    assert blind.unet.config.in_channels == 3
    assert blind(x_in[:1], output_type="pt").images.shape == (1, 3, 16, 16)


def test_training_learns_a_constant_shift():
    target = torch.rand(32, 1, 8, 8, generator=g()) * 0.5
    made = train_rddm(target, target + 0.4, width=8, steps=150, batch_size=16, learning_rate=3e-3)
    assert np.mean(made.losses[-10:]) < 0.2 * np.mean(made.losses[:5])
    out = made.pipeline(target[:8] + 0.4, num_inference_steps=3, output_type="pt", generator=g()).images
    assert (out - target[:8]).abs().mean() < 0.1


def test_generation_has_a_zero_input():
    images = torch.rand(8, 1, 8, 8, generator=g())
    made = train_rddm(images, prediction_type="epsilon", width=4, steps=2, batch_size=4, crop=8)
    assert made.pipeline.unet.config.in_channels == 1
    assert len(made.pipeline(batch_size=3, num_inference_steps=2, output_type="np").images) == 3
    with pytest.raises(InputError, match=r"^height"):
        train_rddm(images, prediction_type="epsilon", width=4, steps=0).pipeline(batch_size=1)


def test_a_resumed_training_is_the_uninterrupted_one(pairs, tmp_path):
    target, x_in = pairs
    settings = {"width": 4, "batch_size": 4, "gradient_accumulation_steps": 2, "crop": 8, "flip": True}
    whole = train_rddm(target, x_in, steps=4, **settings)

    def stop(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_rddm(target, x_in, steps=4, output_dir=tmp_path / "c", save_steps=2, callback=stop, **settings)
    again = train_rddm(target, x_in, steps=4, output_dir=tmp_path / "c", save_steps=2, resume=True, **settings)
    assert again.losses == pytest.approx(whole.losses, abs=1e-6)
    for a, b in zip(whole.pipeline.unet.parameters(), again.pipeline.unet.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_gradient_accumulation_is_the_mean_of_its_micro_batches(pairs):
    target, x_in = pairs
    one = train_rddm(target, x_in, steps=1, batch_size=4, width=4, gradient_accumulation_steps=2, max_grad_norm=1e9)
    assert len(one.losses) == 1
    assert one.losses[0] != train_rddm(target, x_in, steps=1, batch_size=4, width=4).losses[0]


def test_a_loss_that_is_not_finite_stops_the_training(pairs):
    target, x_in = pairs
    with pytest.raises(TrialError, match="not finite at step"):
        train_rddm(target, x_in, width=4, steps=30, batch_size=4, learning_rate=1e30)


# ------------------------------------------------------------------ the pipeline


@pytest.fixture(scope="module")
def restorer() -> RDDMRestorationPipeline:
    pipe = RDDMRestorationPipeline(make_network(6, 3, 4, None, 0).eval(), RDDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_any_size_goes_in_and_comes_out(restorer):
    for h, w in ((16, 16), (17, 10), (3, 2), (1, 33)):
        assert restorer(torch.rand(1, 3, h, w), num_inference_steps=2, output_type="pt").images.shape == (1, 3, h, w)


def test_pil_arrays_lists_and_tensors_are_one(restorer):
    array = np.random.default_rng(0).integers(0, 256, (2, 12, 9, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    wanted = restorer(tensor, generator=g(), output_type="np").images
    given = [array, array.astype(np.float32) / 255, [Image.fromarray(a) for a in array], list(tensor)]
    for one in given:
        assert np.abs(restorer(one, generator=g(), output_type="np").images - wanted).max() < 1e-6
    assert restorer(Image.fromarray(array[0])).images[0].size == (9, 12)


def test_generators_of_their_own_make_rows_independent(restorer):
    x = torch.rand(3, 3, 8, 8, generator=g())
    many = restorer(x, generator=[g(i) for i in range(3)], output_type="pt").images
    one = restorer(x[1:2], generator=[g(1)], output_type="pt").images
    assert torch.allclose(many[1:2], one, atol=1e-5)


def test_what_was_saved_restores_alike(restorer, tmp_path, pairs):
    x = torch.rand(2, 3, 8, 8, generator=g())
    restorer.save_pretrained(tmp_path / "one")
    for load in (RDDMRestorationPipeline.from_pretrained, load_pipeline):
        again = load(tmp_path / "one")
        assert torch.equal(
            restorer(x, generator=g(), output_type="pt").images, again(x, generator=g(), output_type="pt").images
        )
    two = train_rddm(*pairs, prediction_type="res_noise", nets=2, condition="levels", width=4, steps=1).pipeline
    two.save_pretrained(tmp_path / "two")
    again = load_pipeline(tmp_path / "two")
    assert again.scheduler.config.condition == "levels" and again.noise_unet is not None
    scheduler = RDDMScheduler.from_pretrained(tmp_path / "two", subfolder="scheduler")
    assert scheduler.config.prediction_type == "res_noise"
    assert RDDMScheduler.from_config(scheduler.config, eta=0.5).config.condition == "levels"


def test_callbacks_see_and_change_the_state(restorer):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((i, int(t), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    restorer(torch.rand(1, 3, 8, 8), num_inference_steps=3, callback_on_step_end=callback)
    assert [s[0] for s in seen] == [0, 1, 2] and seen[0][1] == 999


# ------------------------------------------------------------------ hosts and other methods


def test_stock_pipelines_take_a_converted_scheduler():
    for pipe in (tiny.unconditional(), tiny.stable_diffusion()):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        arguments = {"num_inference_steps": 4, "output_type": "np"}
        if hasattr(pipe, "vae"):
            arguments |= tiny.EMBEDS | {"guidance_scale": 3.0, "height": 16, "width": 16}
        wanted = pipe(generator=g(), **arguments).images
        pipe.scheduler = RDDMScheduler.from_config(pipe.scheduler.config)
        assert np.abs(pipe(generator=g(), **arguments).images - wanted).max() < 1e-4


def test_a_stock_image_to_image_pipeline_starts_in_the_middle():
    base = tiny.stable_diffusion()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    arguments = tiny.EMBEDS | {
        "image": torch.rand(1, 3, 16, 16, generator=g()),
        "strength": 0.6,
        "num_inference_steps": 5,
        "output_type": "np",
    }
    pipe.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    wanted = pipe(generator=g(), **arguments).images
    pipe.scheduler = RDDMScheduler.from_config(base.scheduler.config)
    assert np.abs(pipe(generator=g(), **arguments).images - wanted).max() < 1e-4


def test_on_the_digits_network_converted_steps_are_ours():
    """Beside another method's part of the house: the class-conditional pipeline with guidance, and our DDIM."""
    pipe = load_pipeline(str(loading.path("digits")))
    assert isinstance(pipe, ClassConditionalPipeline)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"labels": [0, 3, 7], "guidance_scale": 2.0, "num_inference_steps": 8, "output_type": "latent"}
    start = torch.randn(3, 1, 8, 8, generator=g())
    config = pipe.scheduler.config
    pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing="trailing")
    wanted = pipe(latents=start, **arguments).images
    pipe.scheduler = RDDMScheduler.from_config(config, clip_sample=False, timestep_spacing="trailing")
    assert (pipe(latents=start, **arguments).images - wanted).abs().max() < 1e-4
    # Stacked on DPM-OT's start in the middle, which lays out timesteps of its own.
    from steersman.diffusion import DPMOTPipeline, TransportMap

    bank = torch.rand(40, 1, 8, 8, generator=g()) * 2 - 1
    made = TransportMap.from_images(pipe, bank, torch.arange(40) % 10, timestep=300, tolerance=0.3, generator=g(1))
    fast = DPMOTPipeline(pipe, made)
    outs = []
    for kind in (DDIMScheduler, RDDMScheduler):
        fast.scheduler = kind.from_config(config, clip_sample=False)
        outs.append(fast(latents=start, labels=[0, 3, 7], num_inference_steps=3, output_type="latent").images)
    assert (outs[0] - outs[1]).abs().max() < 1e-4


def test_guidance_reads_a_converted_scheduler():
    """Adaptive Guidance, which needs the scheduler's levels, does on it what it does on DDIM."""
    pipe = load_pipeline(str(loading.path("digits")))
    pipe.set_progress_bar_config(disable=True)
    config, outs, guided = pipe.scheduler.config, [], []
    start = torch.randn(3, 1, 8, 8, generator=g())
    for kind in (DDIMScheduler, RDDMScheduler):
        pipe.scheduler = kind.from_config(config, clip_sample=False)
        method = AdaptiveGuidance(scale=3.0, threshold=0.99, min_steps=4)
        with method.install(pipe):
            arguments = {"labels": [1, 2, 3], "guidance_scale": 2.0, "num_inference_steps": 10, "output_type": "latent"}
            outs.append(pipe(latents=start, **arguments).images)
        guided.append(method.guided_steps)
    assert (outs[0] - outs[1]).abs().max() < 1e-4
    assert torch.equal(guided[0], guided[1]) and guided[0].tolist() == [4, 4, 4]


# ------------------------------------------------------------------ files and apply


def write(folder: Path, name: str, images: np.ndarray) -> None:
    (folder / name).mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / name / f"{i:02d}.png")


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 256, (6, 16, 20, 3), dtype=np.uint8)
    write(tmp_path / "pairs", "target", target)
    write(tmp_path / "pairs", "input", target // 2)
    return tmp_path / "pairs"


def test_pairs_of_folders_lists_and_arrays_are_one(folder, tmp_path):
    write(folder, "mask", np.zeros((6, 16, 20), dtype=np.uint8))
    by_folder = read_pairs(folder)
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("target", "input", "mask"):
        files = sorted((folder / name).iterdir())
        (lists / f"{name}.flist").write_text("\n".join(f"../pairs/{name}/{p.name}" for p in files) + "\n")
    arrays = {
        name: np.stack([np.asarray(Image.open(p)) for p in sorted((folder / name).iterdir())])
        for name in ("target", "input", "mask")
    }
    np.savez(tmp_path / "pairs.npz", **arrays)
    for source in (lists, tmp_path / "pairs.npz"):
        other = read_pairs(source)
        for name in ("target", "input", "mask"):
            for a, b in zip(getattr(by_folder, name), getattr(other, name), strict=True):
                assert torch.allclose(a, b)
    assert len(by_folder) == 6 and by_folder.seen() == 7


def test_apply_makes_a_folder_that_restores(folder, tmp_path):
    settings = {"steps": "2", "width": "4", "batch-size": "2", "prediction_type": "res_noise"}
    record = run_verb("apply", "rddm", str(folder), tmp_path / "made", None, settings)
    assert record["metrics"]["pairs"] == 6 and (tmp_path / "made" / "artefact.json").is_file()
    pipe = RDDMRestorationPipeline.from_pretrained(tmp_path / "made")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(Image.open(folder / "input" / "00.png"), num_inference_steps=2).images[0].size == (20, 16)
    weights = load_file(tmp_path / "made" / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights["conv_out.weight"].shape[0] == 6
    with pytest.raises(InputError, match="prediction_type"):
        run_verb("apply", "rddm", str(folder), tmp_path / "no", None, {"prediction_type": "noises"})
    assert not (tmp_path / "no").exists()


def test_apply_reports_what_aosa_chose(folder, tmp_path):
    lines = []
    facts = apply(folder, None, tmp_path / "o", prediction_type="auto", steps=2, width=4, crop=8, log=lines.append)
    assert facts["chosen"] in ("res", "epsilon") and facts["undecided_steps"] <= 2 and lines


def test_pairs_that_do_not_fit_are_refused_in_one_sentence(folder, tmp_path):
    Image.new("RGB", (21, 16)).save(folder / "input" / "03.png")
    with pytest.raises(InputError, match=r"03\.png.*its target's size, 20x16 \(it has 21x16\)"):
        read_pairs(folder)
    (folder / "input" / "03.png").unlink()
    with pytest.raises(InputError, match=r"target/03\.png.*there is no input"):
        read_pairs(folder)
    Image.new("RGB", (20, 16)).save(folder / "input" / "03.png")
    Image.new("RGB", (20, 16)).save(folder / "input" / "99.png")
    with pytest.raises(InputError, match=r"input/99\.png.*there is no target"):
        read_pairs(folder)
    (folder / "input" / "99.png").write_text("no image")
    Image.new("RGB", (20, 16)).save(folder / "target" / "99.png")
    with pytest.raises(InputError, match=r"99\.png.*can be read"):
        read_pairs(folder)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "target.flist").write_text("a.png\nb.png\n")
    (lists / "input.flist").write_text("a.png\n")
    with pytest.raises(InputError, match=r"b\.png.*no input"):
        read_pairs(lists)
    for source in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match=r"^input"):
            read_pairs(source)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input": torch.zeros(12, 3, 16, 15)}, r"input\[0\].*15x16.*target's size, 16x16"),
        ({"input": torch.zeros(11, 3, 16, 16)}, "input='11 images'.*12"),
        ({"input": torch.zeros(12, 1, 16, 16)}, "3 channels"),
        ({"input": torch.full((12, 3, 16, 16), 1.2)}, r"in \[0, 1\]"),
        ({"target": torch.full((12, 3, 16, 16), -1.0)}, r"in \[0, 1\]"),
        ({"mask": torch.zeros(12, 2, 16, 16)}, "1 or 3 channels"),
        ({"input": None, "mask": torch.zeros(12, 1, 16, 16)}, "without an input"),
        ({"target": []}, "at least one"),
        ({"loss": "l3"}, "^loss"),
        ({"nets": 2}, "^nets"),
        ({"width": 10}, "^width"),
        ({"crop": 17}, "^crop"),
        ({"steps": -1}, "^steps"),
        ({"batch_size": 0}, "^batch_size"),
        ({"ema_decay": 1.0}, "^ema_decay"),
        ({"optimizer": "sgd"}, "^optimizer"),
        ({"learning_rates": 1}, "^argument"),
        ({"condition": "noise"}, "^condition"),
        ({"prediction_type": "noise"}, "^prediction_type"),
        ({"prediction_type": "res_noise", "condition": "levels"}, "^condition"),
        ({"prediction_type": "auto", "nets": 2}, "auto"),
        ({"sum_scale": -1.0}, "^sum_scale"),
    ],
)
def test_training_refuses_what_does_not_fit(pairs, change, text):
    given = {"target": pairs[0], "input": pairs[1], "width": 4, "steps": 0} | change
    with pytest.raises(InputError, match=text):
        train_rddm(given.pop("target"), given.pop("input"), given.pop("mask", None), **given)


def test_images_of_several_sizes_need_a_crop():
    target = [torch.rand(3, 16, 16), torch.rand(3, 12, 20)]
    with pytest.raises(InputError, match=r"^crop.*differ in size"):
        train_rddm(target, target, width=4, steps=1)
    assert len(train_rddm(target, target, width=4, steps=1, batch_size=2, crop=12).losses) == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"residual_schedule": "linear"}, "^residual_schedule"),
        ({"noise_schedule": "cosine"}, "^noise_schedule"),
        ({"residual_power": -1.0, "residual_schedule": "power"}, "^power"),
        ({"residual_schedule": "ddim"}, "^noise_schedule"),
        ({"noise_schedule": "ddim", "sum_scale": 0.5}, "^sum_scale"),
        ({"sum_scale": -0.1}, "^sum_scale"),
        ({"sum_scale": 0, "prediction_type": "epsilon"}, "^sum_scale"),
        ({"eta": 1.1}, "^eta"),
        ({"eta": -0.1}, "^eta"),
        ({"prediction_type": "residual"}, "^prediction_type"),
        ({"prediction_type": "v_prediction"}, "^prediction_type"),
        ({"residual_range": 0}, "^residual_range"),
        ({"clip_sample_range": 0}, "^clip_sample_range"),
        ({"variance": "ddpm"}, "^variance"),
        ({"variance": "ddim", "sum_scale": 2.0}, "^variance"),
        ({"step_form": "x0"}, "^step_form"),
        ({"condition": "sigma"}, "^condition"),
        ({"timestep_spacing": "middle"}, "^timestep_spacing"),
        ({"num_train_timesteps": 1}, "^num_train_timesteps"),
    ],
)
def test_settings_out_of_range_are_refused(settings, text):
    with pytest.raises(InputError, match=text):
        RDDMScheduler(**settings)


def test_levels_must_not_fall():
    with pytest.raises(InputError, match="never fall"):
        Levels.from_increments([0.5, -0.1, 0.6], [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="never fall"):
        Levels(np.array([0.2, 0.9, 1.2]), np.array([0.1, 0.2, 0.3]))
    with pytest.raises(InputError, match="levels"):
        Levels(np.array([0.2, 1.0]), np.array([0.1, 0.2, 0.3]))


def test_plans_and_steps_that_do_not_fit_are_refused():
    s = RDDMScheduler()
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match="set_timesteps"):
        s.step(x, 1, x)
    for given, text in (
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({}, "given"),
        ({"num_inference_steps": 3, "timesteps": [1]}, "given"),
        ({"timesteps": [3, 5]}, "timesteps"),
        ({"timesteps": [1000]}, "timesteps"),
        ({"num_inference_steps": 4, "path": "residual_first"}, "path.*condition"),
    ):
        with pytest.raises(InputError, match=text):
            s.set_timesteps(**given)
    free = RDDMScheduler(condition="levels")
    for path, text in (
        ([(1.0, 1.0), (0.5, 1.1), (0, 0)], "ever rises"),
        ([(0.9, 1.0), (0, 0)], "from"),
        ([(1.0, 1.0), (0.1, 0.1)], r"to \(0, 0\)"),
        ([(1.0, 1.0), (1.0, 1.0), (0, 0)], "rises"),
        ("noise first", "path"),
    ):
        with pytest.raises(InputError, match=text):
            free.set_timesteps(**({"path": path} | ({"num_inference_steps": 4} if isinstance(path, str) else {})))
    with pytest.raises(InputError, match="num_inference_steps"):
        free.set_timesteps(1, path="noise_first")
    s.set_timesteps(4)
    for arguments, text in (
        ((x, 5, x), "timestep"),
        ((torch.zeros(1, 2, 2, 2), 999, x), "model_output"),
        (((x, x), 999, x), "model_output"),
        ((x, 999, x, torch.zeros(1, 1, 2, 3)), "x_in"),
    ):
        with pytest.raises(InputError, match=text):
            s.step(*arguments)
    with pytest.raises(InputError, match=r"^eta"):
        s.step(x, 999, x, eta=0.5)
    with pytest.raises(InputError, match="left out"):
        s.step(x, 999, x, sigma=1)
    with pytest.raises(InputError, match="residual and noise"):
        s.add_noise(x, torch.zeros(1), torch.tensor([3]))


def test_schedulers_of_other_processes_are_not_converted():
    with pytest.raises(InputError, match="betas"):
        RDDMScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(InputError, match="thresholding"):
        RDDMScheduler.from_ddim(diffusers.DDIMScheduler(thresholding=True))
    with pytest.raises(InputError, match=r"did you mean 'eta'|one of"):
        RDDMScheduler.from_ddim(diffusers.DDIMScheduler(), etta=0.1)
    with pytest.raises(InputError, match=r"^scheduler"):
        RDDMScheduler.from_ddim({"beta_start": 1})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"image": torch.zeros(1, 1, 8, 8)}, "channels"),
        ({"image": torch.full((1, 3, 8, 8), 2.0)}, r"in \[0, 1\]"),
        ({"image": torch.zeros(8, 8)}, "^image"),
        ({"image": [torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)]}, "one size"),
        ({"mask": torch.zeros(1, 1, 8, 8)}, "^mask"),
        ({"output_type": "latent"}, "^output_type"),
        ({"generator": [torch.Generator()] * 3}, "^generator"),
        ({"latents": torch.zeros(1, 3, 8, 7)}, "^latents"),
        ({"num_inference_steps": 0}, "^num_inference_steps"),
        ({"path": "noise_first"}, "^path"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "^callback"),
    ],
)
def test_the_pipeline_refuses_what_does_not_fit(restorer, given, text):
    with pytest.raises(InputError, match=text):
        restorer(**({"image": torch.zeros(1, 3, 8, 8)} | given))


def test_networks_that_do_not_fit_the_scheduler_are_refused():
    net = make_network(6, 3, 4, None, 0)
    for arguments, text in (
        ((net, RDDMScheduler(prediction_type="res_noise")), "output channels"),
        ((net, RDDMScheduler(), net), "noise_unet"),
        ((net, diffusers.DDIMScheduler()), "scheduler"),
        ((make_network(5, 3, 4, None, 0), RDDMScheduler()), "input channels"),
        ((make_network(6, 6, 4, None, 0), RDDMScheduler(prediction_type="res_noise", condition="levels")), "condition"),
    ):
        with pytest.raises(InputError, match=text):
            RDDMRestorationPipeline(*arguments)
    masked = RDDMRestorationPipeline(make_network(7, 3, 4, None, 0), RDDMScheduler())
    masked.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match=r"mask.*network sees it"):
        masked(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="image's size"):
        masked(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 9))


def test_images_of_sixteen_bits_keep_their_values(tmp_path):
    values = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    for name in ("input", "target"):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "a.png")
    wanted = torch.from_numpy(values.astype(np.float32) / 65535)
    torch.testing.assert_close(read_pairs(tmp_path).target[0][0], wanted)
    torch.testing.assert_close(as_images("image", Image.open(tmp_path / "input" / "a.png"))[0, 0], wanted)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "input" / "a.tiff")
    with pytest.raises(InputError, match=r"image='image of mode F' .* 8 or 16 bits"):
        as_images("image", Image.open(tmp_path / "input" / "a.tiff"))
