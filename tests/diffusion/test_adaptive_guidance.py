"""Adaptive guidance: the rule on closed forms, rows left out one by one, LinearAG's regression, policies and search."""

from __future__ import annotations

import inspect
import math
import warnings
from itertools import pairwise, product

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from steersman.diffusion import ClassConditionalPipeline, DDIMScheduler, DPMSolverPPScheduler
from steersman.diffusion.adaptive_guidance import (
    AdaptiveGuidance,
    Chain,
    Coefficients,
    GuidancePolicy,
    LinearAdaptiveGuidance,
    Regression,
    apply,
    best_within,
    calibrate,
    candidates,
    cut_steps,
    excess,
    pattern_modes,
    search_policy,
    similarity,
    soft_loss,
)
from steersman.diffusion.adaptive_guidance.linear import _Recorder, _scheduler_of
from steersman.diffusion.adaptive_guidance.trajectories import Runs
from steersman.diffusion.dpm_ot import probe
from steersman.diffusion.fk_steering import FKSteering
from steersman.diffusion.guidance import Guidance, Moment
from steersman.errors import InputError
from steersman.reference import digits
from tests.diffusion import tiny

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
STD = 0.5


def means(size: int) -> torch.Tensor:
    """mu_c and mu_u, (2, size, size)."""
    return torch.randn(2, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Gaussian(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The exact network of N(mu_c, s^2 I) for label 0 and N(mu_u, s^2 I) for label 1."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, out_channels=1, num_class_embeds=2, prediction_type="epsilon"):
        super().__init__()
        self.abar = diffusers.DDIMScheduler(**SD).alphas_cumprod.double()
        self.register_buffer("anchor", torch.zeros(1))
        self.means, self.scale = means(sample_size)[:, None], 1.0

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        abar = self.abar[int(torch.as_tensor(timestep).flatten()[0])]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        mu = self.means[class_labels]
        x = sample.double()
        eps = sigma * (x - alpha * mu) / (alpha**2 * STD**2 + sigma**2)
        x0 = (x - sigma * eps) / alpha
        kind = self.config.prediction_type
        out = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]
        return UNet2DOutput(sample=(self.scale * out).to(sample.dtype))


def toy(size: int = 4, kind: str = "epsilon", scheduler=DDIMScheduler) -> ClassConditionalPipeline:
    net = Gaussian(sample_size=size, prediction_type=kind)
    settings = {"prediction_type": kind, **SD}
    known = inspect.signature(scheduler).parameters
    made = scheduler(**{name: value for name, value in settings.items() if name in known})
    pipe = ClassConditionalPipeline(net, made, null_label=1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def classes(rows: int = 8) -> ClassConditionalPipeline:
    net = tiny.unconditional(num_class_embeds=4).unet
    pipe = ClassConditionalPipeline(net, diffusers.DDIMScheduler(clip_sample=False), null_label=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(pipe, rows: int, seed: int = 1) -> torch.Tensor:
    c = pipe.unet.config
    return torch.randn(rows, c.in_channels, c.sample_size, c.sample_size, generator=torch.Generator().manual_seed(seed))


def draw(pipe, latents, labels=0, scale=3.0, steps=8, **more) -> torch.Tensor:
    if isinstance(labels, int):
        labels = [labels] * len(latents)
    return pipe(
        labels, latents=latents, guidance_scale=scale, num_inference_steps=steps, output_type="latent", **more
    ).images


def counted(pipe) -> list[int]:
    rows: list[int] = []
    forward = pipe.unet.forward

    def spied(*args, **kwargs):
        rows.append(len(args[0] if args else kwargs["sample"]))
        return forward(*args, **kwargs)

    pipe.unet.forward = spied  # behind all hooks
    return rows


def quiet(threshold=0.991, **more) -> AdaptiveGuidance:
    return AdaptiveGuidance(3.0, threshold, **more)


@pytest.fixture(scope="module")
def trained():
    pipe = digits.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Watched(Guidance):
    """Plain guidance; ``take(cond, uncond, moment)`` sees each call."""

    def __init__(self, scale, take) -> None:
        super().__init__()
        self.scale, self.take_both = scale, take

    def guide(self, cond, uncond, moment):
        self.take_both(cond, uncond, moment)
        return uncond + self.scale * (cond - uncond)


def curves(pipe, latents, labels, scale=3.0, steps=8) -> torch.Tensor:
    """gamma (n, B) along plain guidance, by the definition."""
    found = []

    def take(cond, uncond, moment):
        a, b = (moment.eps(out).flatten(1).double() for out in (cond, uncond))
        found.append((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))

    with Watched(scale, take).install(pipe):
        draw(pipe, latents, labels, scale, steps)
    return torch.stack(found)


def cuts(gamma: torch.Tensor, threshold: float, min_steps: int = 1) -> list[int]:
    """Guided steps of each sample by the rule, read off curves (n, B)."""
    n = len(gamma)
    return [next((i + 1 for i in range(min_steps - 1, n) if gamma[i, b] > threshold), n) for b in range(gamma.shape[1])]


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize("threshold", [1, 1.0, "off"])
def test_switched_off_it_is_classifier_free_guidance_bitwise(threshold):
    pipe = classes()
    x = noise(pipe, 3)
    own = draw(pipe, x, [0, 1, 2])
    with quiet(threshold).install(pipe):
        rows = counted(pipe)
        assert torch.equal(draw(pipe, x, [0, 1, 2], scale=9.0), own)
    assert rows == [6] * 8


@pytest.mark.filterwarnings("ignore:.*were cut after the first step")
def test_a_threshold_that_always_passes_guides_one_step():
    pipe = toy()
    x = noise(pipe, 3)
    with quiet(-1).install(pipe) as method:
        rows = counted(pipe)
        found = draw(pipe, x)
    assert rows == [6] + [3] * 7 and method.guided_steps.tolist() == [1, 1, 1]
    with GuidancePolicy.static_cut(3.0, 8, 1).install(pipe):
        assert torch.equal(draw(pipe, x), found)


@pytest.mark.filterwarnings("ignore:.*were cut after the first step")
@pytest.mark.parametrize("min_steps", [1, 3])
def test_calls_are_steps_plus_guided_steps_and_a_cut_stays(trained, min_steps):
    labels, steps = torch.arange(6), 8
    x = noise(trained, 6)
    gamma = curves(trained, x, labels, steps=steps)
    for threshold in np.random.default_rng(0).uniform(float(gamma.min()), float(gamma.max()), 3):
        with AdaptiveGuidance(3.0, float(threshold), min_steps).install(trained) as method:
            rows = counted(trained)
            draw(trained, x, labels, steps=steps)
        wanted = cuts(gamma, threshold, min_steps)
        assert method.guided_steps.tolist() == wanted and min(wanted) >= min_steps
        assert sum(rows) == 6 * steps + sum(wanted)
        assert all(a >= b for a, b in pairwise(rows))  # no row comes back


def test_a_sample_is_as_if_alone(trained):
    labels = torch.arange(8)
    x = noise(trained, 8)
    method = quiet(0.999, min_steps=4)
    with method.install(trained):
        whole, together = draw(trained, x, labels), method.guided_steps.tolist()
        alone = [(draw(trained, x[i : i + 1], labels[i : i + 1]), int(method.guided_steps)) for i in range(8)]
    assert together == [n for _, n in alone] and len(set(together)) > 1
    torch.testing.assert_close(whole, torch.cat([image for image, _ in alone]), rtol=1e-5, atol=1e-5)


def test_a_batch_is_cut_as_a_whole_where_asked(trained):
    labels = torch.arange(8)
    x = noise(trained, 8)
    gamma = curves(trained, x, labels)
    with quiet(0.9985, min_steps=4, per_sample=False).install(trained) as method:
        rows = counted(trained)
        draw(trained, x, labels)
    wanted = cuts(gamma, 0.9985, 4)
    last = max(wanted)
    assert (
        min(wanted) < last < 8
        and rows == [16] * last + [8] * (8 - last)
        and set(method.guided_steps.tolist()) == {last}
    )


@pytest.mark.filterwarnings("ignore:.*were cut after the first step")
def test_without_a_condition_it_is_unconditional_sampling(trained):
    x = noise(trained, 2)
    with quiet(0.999).install(trained) as method:
        found = draw(trained, x, [10, 10])
    assert method.guided_steps.tolist() == [1, 1]
    torch.testing.assert_close(method.similarities[0], torch.ones(2))
    torch.testing.assert_close(found, draw(trained, x, [10, 10], scale=1.0), rtol=1e-5, atol=1e-5)


def test_similarity_is_the_cosine_of_whole_predictions():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 2, 3, 3, generator=g), torch.randn(5, 2, 3, 3, generator=g)
    wanted = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))
    torch.testing.assert_close(similarity(a, b), wanted, rtol=0, atol=1e-6)
    for scale in (1e-12, 0.01, 1e12):
        torch.testing.assert_close(similarity(scale * a, b), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(similarity(a, scale * b), wanted, rtol=0, atol=1e-6)
    assert similarity(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_a_prediction_of_zeros_has_not_passed():
    pipe = toy()
    pipe.unet.scale = 0.0
    with quiet(-1).install(pipe) as method:
        draw(pipe, noise(pipe, 2))
    assert method.guided_steps.tolist() == [8, 8]


def test_similarity_under_flow_matching_is_of_the_noise_that_the_velocity_says():
    g = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(3, 4, 4, 4, generator=g) for _ in range(3))
    method, moment = quiet(0.9), Moment(0, 4, 300.0, x, diffusers.FlowMatchEulerDiscreteScheduler())
    method.begin(moment)
    assert torch.equal(method.guide(cond, uncond, moment), uncond + 3.0 * (cond - uncond))
    torch.testing.assert_close(method.similarities[0], similarity(x + 0.7 * cond, x + 0.7 * uncond))


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_similarity_is_of_the_noise_whatever_the_network_predicts(kind):
    found = {}
    for k in ("epsilon", kind):
        pipe = toy(kind=k)
        with quiet(0.9999, min_steps=8).install(pipe) as method:
            draw(pipe, noise(pipe, 4))
        with quiet(0.996, min_steps=2).install(pipe) as method:
            draw(pipe, noise(pipe, 4))
        found[k] = method.guided_steps.tolist(), torch.stack(method.similarities)
    assert found[kind][0] == found["epsilon"][0]
    torch.testing.assert_close(found[kind][1], found["epsilon"][1], rtol=0, atol=1e-4)


# ------------------------------------------------------------------ Gaussians in closed form


def path(x: torch.Tensor, steps: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma (n, B) along guided DDIM, and its end, for the two Gaussians, in float64 by their formulas."""
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(steps)
    abar = diffusers.DDIMScheduler(**SD).alphas_cumprod.double()
    times = scheduler.timesteps.tolist()
    mu_c, mu_u = means(x.shape[-1]).flatten(1)
    x, gamma = x.double().flatten(1), []
    for t, after in zip(times, [*times[1:], None], strict=True):
        a, s = abar[t].sqrt(), (1 - abar[t]).sqrt()
        cond, uncond = (s * (x - a * mu) / (a**2 * STD**2 + s**2) for mu in (mu_c, mu_u))
        difference = -s * a * (mu_c - mu_u) / (a**2 * STD**2 + s**2)
        torch.testing.assert_close(cond - uncond, difference.expand_as(x))
        gamma.append(torch.nn.functional.cosine_similarity(cond, uncond))
        eps = uncond + scale * (cond - uncond)
        x0 = (x - s * eps) / a
        later = abar[after] if after is not None else torch.tensor(1.0, dtype=torch.float64)
        x = later.sqrt() * x0 + (1 - later).sqrt() * eps
    return torch.stack(gamma), x


def test_the_two_branches_of_gaussians_become_parallel():
    gamma, _ = path(torch.zeros(1, 1, 4, 4), 10, 3.0)
    assert bool((gamma[1:] > gamma[:-1]).all()) and gamma[0] < 0.5 and gamma[-1] > 0.999
    gamma, _ = path(noise(toy(), 16), 10, 3.0)
    assert bool((gamma[0] > 0.98).all())  # at high noise both are nearly x
    assert not bool((gamma[1:] > gamma[:-1]).all(0).any())


@pytest.mark.filterwarnings("ignore:.*were cut after the first step")
@pytest.mark.parametrize("min_steps", [1, 2, 4])
def test_the_cut_is_where_the_closed_form_says(min_steps):
    pipe, x = toy(), noise(toy(), 16)
    gamma, _ = path(x, 10, 3.0)
    for threshold in (0.98, 0.993, 0.997, 0.9995):
        with quiet(threshold, min_steps=min_steps).install(pipe) as method:
            draw(pipe, x, steps=10)
        assert method.guided_steps.tolist() == cuts(gamma, threshold, min_steps)


def test_erratum_the_plain_rule_never_guides_where_similarity_starts_high():
    pipe, x = toy(), noise(toy(), 8)
    with quiet(0.982).install(pipe) as method, pytest.warns(UserWarning, match="8 of 8 samples were cut after the"):
        early = draw(pipe, x, steps=10)
    assert method.guided_steps.tolist() == [1] * 8
    with quiet(0.982, min_steps=5).install(pipe) as method, warnings.catch_warnings():
        warnings.simplefilter("error")
        late = draw(pipe, x, steps=10)
    own = draw(pipe, x, steps=10)
    assert bool(((late - own).flatten(1).norm(dim=1) < (early - own).flatten(1).norm(dim=1)).all())


# ------------------------------------------------------------------ LinearAG


def trajectories(pipe, latents, labels, scale=3.0, steps=8):
    cond, uncond = [], []

    def take(c, u, moment):
        cond.append(moment.eps(c).double())
        uncond.append(moment.eps(u).double())

    with Watched(scale, take).install(pipe):
        end = draw(pipe, latents, labels, scale, steps)
    return cond, uncond, end


def relative(estimate: torch.Tensor, target: torch.Tensor) -> float:
    return float((estimate - target).square().sum() / target.square().sum())


def estimates(made, cond, uncond):
    return [made.estimate(i, dict(enumerate(cond)), dict(enumerate(uncond))) for i in range(made.steps)]


@pytest.mark.parametrize("size", [1, 4])
def test_gaussians_are_regressed_exactly_from_the_second_step_on(size):
    pipe = toy(size)
    pipe.unet.to(torch.float64)
    cond, uncond, _ = trajectories(pipe, noise(pipe, 32).double(), 0)
    regression = Regression(8)
    regression.add(cond, uncond, uncond)
    plain, shifted = (estimates(regression.solve(intercept=on), cond, uncond) for on in (False, True))
    for i in range(1, 8):
        assert relative(plain[i], uncond[i]) < 1e-15
    # At the first step there is no pair; a constant is all that is missing where all pixels share their mean.
    assert relative(plain[0], uncond[0]) > 1e-4
    assert (relative(shifted[0], uncond[0]) < 1e-12) == (size == 1)


def test_linear_ag_on_a_gaussian_is_classifier_free_guidance():
    pipe = toy(1)
    pipe.unet.to(torch.float64)
    x = noise(pipe, 16, seed=3).double()
    own = draw(pipe, x)
    made = LinearAdaptiveGuidance.fit(pipe, [0] * 32, scale=3.0, steps=8, pattern="linear_after_first")
    with made.install(pipe):
        rows = counted(pipe)
        found = draw(pipe, x)
    assert rows == [32] + [16] * 7 and made.cost == 9
    torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-6)


def test_least_squares_leaves_nothing_that_regressors_explain(trained):
    cond, uncond, _ = trajectories(trained, noise(trained, 20), torch.arange(20) % 10)
    regression = Regression(8)
    for part in (slice(0, 10), slice(10, 20)):  # in one pass over batches
        c, u = [v[part] for v in cond], [v[part] for v in uncond]
        regression.add(c, u, u)
    made = regression.solve(ridge=1e-13)
    for i, estimate in enumerate(estimates(made, cond, uncond)):
        rest = (uncond[i] - estimate).flatten()
        for regressor in (*cond[: i + 1], *uncond[:i]):
            assert abs(float(rest @ regressor.flatten())) < 1e-8 * float(uncond[i].norm() * regressor.norm())
        assert relative(estimate, uncond[i]) == pytest.approx(float(made.residual[i]), rel=1e-3, abs=1e-10)
        assert relative(cond[i], uncond[i]) == pytest.approx(float(made.copied[i]), rel=1e-6)
        assert made.residual[i] <= made.copied[i]


def test_a_window_and_an_intercept():
    g = torch.Generator().manual_seed(0)
    cond = [torch.randn(50, generator=g) for _ in range(4)]
    uncond = [0.5 * c + 2.0 for c in cond]
    regression = Regression(4)
    regression.add(cond, uncond, uncond)
    made = regression.solve(intercept=True, window=1)
    assert made.intercept[0] == pytest.approx(2.0) and made.cond[0, 0] == pytest.approx(0.5)
    assert not bool(made.cond.tril(-2).any()) and not bool(made.uncond.tril(-2).any())
    assert made.residual.max() < 1e-15 and not bool(made.cond.triu(1).any()) and not bool(made.uncond.triu().any())


def test_patterns():
    assert pattern_modes("alternate_then_linear", 6) == ["cfg", "linear", "cfg", "linear", "linear", "linear"]
    assert pattern_modes("alternate_then_cond", 5) == ["cfg", "linear", "cfg", "cond", "cond"]
    assert pattern_modes("alternate", 4) == ["cfg", "linear", "cfg", "linear"]
    assert pattern_modes("cfg,cond, linear", 3) == ["cfg", "cond", "linear"]
    for bad, allowed in (
        ("alternat", "alternate"),
        (["linear", "cfg"], "begins with cfg"),
        ("cfg,cond", "3 modes"),
        (["cfg", "both", "cfg"], "3 modes"),
    ):
        with pytest.raises(InputError, match=allowed):
            pattern_modes(bad, 2 if allowed == "begins with cfg" else 3)


def by_hand(pipe, method, latents, labels, scale, steps) -> torch.Tensor:
    """LinearAG's chain by its equations, on DDIM."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    null, c, u, x = pipe.config.null_label, {}, {}, latents
    weights = method.coefficients
    for i, t in enumerate(scheduler.timesteps):
        c[i] = pipe.unet(x, t, class_labels=labels).sample
        if method.modes[i] == "cfg":
            u[i] = pipe.unet(x, t, class_labels=torch.full_like(labels, null)).sample
        else:
            u[i] = sum(weights.cond[i, j] * c[j] for j in range(i + 1)) + sum(
                weights.uncond[i, j] * u[j] for j in range(i)
            )
        eps = c[i] if method.modes[i] == "cond" else u[i] + scale * (c[i] - u[i])
        x = scheduler.step(eps.float(), t, x).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["alternate_then_linear", "cfg,cond,linear,cfg,cond,cond,linear,cond"])
def test_linear_ag_follows_its_equations(trained, pattern):
    made = LinearAdaptiveGuidance.fit(trained, torch.arange(10), scale=3.0, steps=8, pattern=pattern, batch=4)
    labels, x = torch.arange(3), noise(trained, 3)
    with made.install(trained):
        rows = counted(trained)
        found = draw(trained, x, labels)
    assert sum(rows) == 3 * made.cost and not made._cond  # what no later step needs is not kept
    torch.testing.assert_close(found, by_hand(trained, made, x, labels, 3.0, 8), rtol=1e-4, atol=1e-4)


def test_feedback_regresses_on_the_patterns_own_trajectories(trained):
    settings = {"scale": 5.0, "steps": 8, "batch": 10}
    one, two = (LinearAdaptiveGuidance.fit(trained, torch.arange(10), rounds=rounds, **settings) for rounds in (1, 2))
    recorder = _Recorder(5.0, one)
    Runs(trained, torch.arange(10), 2.0, 8)(range(10), recorder)
    errors = [
        [
            relative(e, t)
            for e, t in zip(estimates(made.coefficients, recorder.cond, recorder.used), recorder.target, strict=True)
        ]
        for made in (one, two)
    ]
    assert errors[0][1] == pytest.approx(errors[1][1])  # both have seen the same until the first estimate
    assert bool((np.array(errors[1][2:]) < np.array(errors[0][2:])).all())


# ------------------------------------------------------------------ policies and their search


def test_a_policy_evaluates_what_it_says():
    pipe = classes()
    x, labels = noise(pipe, 3), [0, 1, 2]
    rows = counted(pipe)
    policy = GuidancePolicy([3.0, 1.0, 0.0, 6.0, 1.0, 0.0, 3.0, 1.0])
    with policy.install(pipe):
        found = draw(pipe, x, labels)
    assert rows == [6, 3, 3, 6, 3, 3, 6, 3] and policy.cost == 11
    assert policy.names == ["cfg(3)", "cond", "uncond", "cfg(6)", "cond", "uncond", "cfg(3)", "cond"]
    wanted = x
    with torch.no_grad():
        pipe.scheduler.set_timesteps(8)
        for scale, t in zip(policy.scales, pipe.scheduler.timesteps, strict=True):
            cond, uncond = (
                pipe.unet(wanted, t, class_labels=y).sample for y in (torch.tensor(labels), torch.full((3,), 3))
            )
            wanted = pipe.scheduler.step(uncond + scale * (cond - uncond), t, wanted).prev_sample
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with GuidancePolicy([0.0] * 8).install(pipe):
        found = draw(pipe, x, labels)
    torch.testing.assert_close(found, draw(pipe, x, [3, 3, 3], scale=1.0), rtol=1e-5, atol=1e-5)


def test_policies_of_fixed_cost():
    assert GuidancePolicy.static_cut(3.0, 4, 2).scales == [3.0, 3.0, 1.0, 1.0]
    assert GuidancePolicy.interval(3.0, 4, 1, 3).scales == [1.0, 3.0, 3.0, 1.0]
    drawn = [GuidancePolicy.random(3.0, 10, 4, torch.Generator().manual_seed(i)) for i in range(3)]
    assert {policy.cost for policy in drawn} == {14} and drawn[0].scales != drawn[1].scales


def test_a_chain_with_plain_weights_is_the_pipelines_own_run():
    pipe = toy()
    pipe.unet.to(torch.float64)
    chain = Chain(Runs(pipe, [0] * 3, 3.0, 6), range(3))
    weights = torch.zeros(6, 4)
    weights[:, 2] = 1.0
    assert torch.equal(chain(torch.full((6,), 3.0)), chain.end)
    assert float(soft_loss(chain, weights, [0.0, 1.0, 3.0, 6.0])) == 0.0
    for policy in ([3.0, 1.0, 0.0, 3.0, 1.0, 1.0], [1.5] * 6):
        with GuidancePolicy(policy).install(pipe):
            wanted = Runs(pipe, [0] * 3, 2.0, 6)(range(3))
        torch.testing.assert_close(chain(torch.tensor(policy)), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_through_the_chain_are_finite_differences():
    pipe = toy()
    pipe.unet.to(torch.float64)
    chain, options = Chain(Runs(pipe, [0] * 2, 3.0, 5), range(2)), [0.0, 1.0, 1.5, 3.0]
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(a):
        p = a.softmax(1)
        return soft_loss(chain, p, options) + 0.3 * excess(p, options, 6.0)

    loss(logits).backward()
    flat = logits.detach().flatten()
    for k in range(flat.numel()):
        up, down = flat.clone(), flat.clone()
        up[k], down[k] = up[k] + 1e-4, down[k] - 1e-4
        with torch.no_grad():
            wanted = float(loss(up.view(5, 4)) - loss(down.view(5, 4))) / 2e-4
        assert float(logits.grad.flatten()[k]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    # Through the scheduler alone it is another gradient.
    chain.gradient, exact = "schedule", logits.grad.clone()
    logits.grad = None
    loss(logits).backward()
    assert not torch.allclose(logits.grad, exact, rtol=0.05)


def test_the_cost_term_is_the_calls_of_the_policy():
    options = [0.0, 1.0, 3.0, 6.0]
    chosen = torch.tensor([3, 1, 0, 2])
    one_hot = torch.nn.functional.one_hot(chosen, 4).double()
    policy = GuidancePolicy([options[i] for i in chosen])
    assert float(excess(one_hot, options, 0.0)) == policy.cost == 6
    assert float(excess(one_hot, options, 5.0)) == 1 and float(excess(one_hot, options, 7.0)) == 0


def test_the_best_policy_within_a_budget_is_that_of_brute_force():
    options, g = [0.0, 1.0, 3.0, 6.0], torch.Generator().manual_seed(0)
    for budget in (4, 5, 6, 8):
        logits = torch.randn(4, 4, generator=g, dtype=torch.float64)
        policies = [p for p in product(range(4), repeat=4) if sum(1 + (o > 1) for o in p) <= budget]
        best = max(policies, key=lambda p: sum(float(logits[i, o]) for i, o in enumerate(p)))
        assert best_within(logits, options, budget) == [options[o] for o in best]


def test_a_search_finds_a_policy_better_than_chance():
    pipe = toy()
    found = search_policy(
        pipe, [0] * 8, scale=3.0, steps=5, budget=7, iterations=80, learning_rate=0.05, weights=(1.0,)
    )
    with found.guidance().install(pipe):
        rows = counted(pipe)
        draw(pipe, noise(pipe, 2), steps=5)
    assert sum(rows) == 2 * found.cost <= 2 * 7
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(5))
    chain = Chain(Runs(pipe, [0] * 8, 3.0, 5, seed=7), range(8))
    chance = [GuidancePolicy.random(3.0, 5, 2, torch.Generator().manual_seed(i)).scales for i in range(10)]
    with torch.no_grad():
        losses = [float((chain(torch.tensor(p)) - chain.end).square().mean()) for p in [found.scales, *chance]]
    assert losses[0] < np.median(losses[1:]) and found.loss < found.conditional_loss


def test_a_search_on_a_text_to_image_pipeline():
    from steersman.reference import scenes

    pipe = scenes.pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = {"scale": 3.0, "steps": 3, "iterations": 1, "weights": (1.0,), "gradient": "schedule"}
    found = search_policy(pipe, ["a small red circle"], negative_prompt="a large blue cross", **settings)
    assert found.cost <= 4 and found.loss > 0 and found.conditional_loss > 0
    assert pipe.unet.conv_in.weight.requires_grad and "step" not in vars(pipe.scheduler)


# ------------------------------------------------------------------ calibration


def test_curves_say_what_a_threshold_costs(trained):
    made = calibrate(trained, torch.arange(6), scale=3.0, steps=8, saving=0.2, batch=3)
    assert made.curves.shape == (8, 6) and made.chosen.saving >= 0.2
    assert made.chosen.psnr == max(candidate.psnr for candidate in made.tried)
    guidance = made.guidance()
    runs = Runs(trained, torch.arange(6), 2.0, 8, batch=3)
    rows = counted(trained)
    for part in runs:
        runs(part, guidance)
    assert 1 - sum(rows) / (2 * 8 * 6) == pytest.approx(made.chosen.saving)
    assert {"threshold", "min_steps", "passed_first", "median_similarity_first"} <= made.report().keys()


def test_candidates_are_the_largest_thresholds_that_save_enough():
    curves = torch.rand(10, 30, generator=torch.Generator().manual_seed(0)).sqrt()
    for saving in (0.1, 0.25, 0.4):
        pairs = candidates(curves, saving)
        assert len({m for _, m in pairs}) == len(pairs) > 1
        for threshold, min_steps in pairs:
            mean = cut_steps(curves, threshold, min_steps).double().mean()
            above = curves[curves > threshold].min()  # the next threshold that cuts otherwise
            assert mean <= 10 * (1 - 2 * saving) + 1e-9
            assert cut_steps(curves, float(above), min_steps).double().mean() > 10 * (1 - 2 * saving) or min_steps > 1
    assert cut_steps(torch.tensor([[1.0], [0.5], [0.9], [0.2]]), 0.8, 2).tolist() == [3]
    assert cut_steps(torch.tensor([[0.1], [0.5], [0.2], [0.2]]), 0.8).tolist() == [4]


def test_a_floor_of_likeness(trained):
    made = calibrate(trained, torch.arange(6), scale=3.0, steps=6, psnr=22.0)
    assert made.chosen.psnr >= 22 and all(c.psnr < 22 for c in made.tried if c.saving > made.chosen.saving + 0.1)
    made = calibrate(toy(), [0], scale=3.0, steps=6, psnr=99.0)
    assert made.chosen is None and made.guidance().off


# ------------------------------------------------------------------ schedulers, hosts, files


@pytest.mark.parametrize("kind", [DPMSolverPPScheduler, diffusers.DPMSolverMultistepScheduler])
def test_a_first_order_step_after_the_cut(kind):
    pipe = toy(scheduler=kind)
    x = noise(pipe, 4)
    seen: list = []
    with GuidancePolicy.static_cut(3.0, 8, 4).install(pipe):
        jump = draw(pipe, x, callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"]) or {})
    # -1 passes at once: all four are cut at step 4.
    method = AdaptiveGuidance(3.0, -1, 4, first_order_after_cut=True)
    states: list = []
    with method.install(pipe):
        smooth = draw(pipe, x, callback_on_step_end=lambda p, i, t, k: states.append(k["latents"]) or {})
    for i in range(4):
        torch.testing.assert_close(states[i], seen[i])
    t, s = pipe.scheduler.timesteps[4:6]
    first = DDIMScheduler(**SD)
    first.set_timesteps(timesteps=[int(t), int(s)])
    cond = pipe.unet(states[3], t, class_labels=torch.zeros(4, dtype=torch.long)).sample
    torch.testing.assert_close(states[4], first.step(cond, t, states[3]).prev_sample, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[4], states[4], atol=1e-3) and not torch.allclose(jump, smooth, atol=1e-3)


def test_solvers_whose_history_is_unknown_are_refused():
    pipe = toy(scheduler=diffusers.UniPCMultistepScheduler)
    refused = pytest.raises(InputError, match=r"scheduler='UniPCMultistepScheduler' .* first_order_after_cut")
    with AdaptiveGuidance(3.0, 0.9, first_order_after_cut=True).install(pipe), refused:
        draw(pipe, noise(pipe, 2))


def test_with_our_multistep_solver_and_a_list_of_generators(trained):
    """A sample depends on its own generator and label alone, also where its neighbours are cut at other steps."""
    pipe = ClassConditionalPipeline(trained.unet, DPMSolverPPScheduler.from_config(trained.scheduler.config), 10)
    pipe.set_progress_bar_config(disable=True)
    method, more = quiet(0.999, min_steps=4), {"guidance_scale": 2.0, "num_inference_steps": 8, "output_type": "latent"}

    def run(rows):
        return pipe(rows, generator=[torch.Generator().manual_seed(i) for i in rows], **more).images

    with method.install(pipe):
        whole, together = run(list(range(6))), method.guided_steps.tolist()
        alone = [(run([i]), int(method.guided_steps)) for i in range(6)]
    assert together == [n for _, n in alone] and len(set(together)) > 1
    torch.testing.assert_close(whole, torch.cat([image for image, _ in alone]), rtol=1e-5, atol=1e-5)


def test_image_to_image_of_stable_diffusion():
    pipe = tiny.stable_diffusion()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def run(scale, method=None):
        more = {"strength": 0.5, "num_inference_steps": 8, "output_type": "latent", **tiny.EMBEDS}
        generator = torch.Generator().manual_seed(0)
        return pipe(image=image, guidance_scale=scale, generator=generator, **more).images

    own = run(3.0)
    with AdaptiveGuidance(3.0, "off").install(pipe):
        assert torch.equal(run(7.5), own)
    with AdaptiveGuidance(3.0, -1, min_steps=2).install(pipe) as method:
        rows = counted(pipe)
        assert not torch.equal(run(7.5), own)
    assert rows == [2, 2, 1, 1] and method.guided_steps.tolist() == [2]


@pytest.fixture(scope="module")
def modular():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from steersman.reference import scenes

    tokenizer = scenes.pipeline().tokenizer
    torch.manual_seed(0)
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    source = tiny.sdxl()
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(
        unet=source.unet, vae=source.vae, scheduler=DDIMScheduler(**SD), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=text, text_encoder_2=text,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular_draw(pipe, guider, rows=2, steps=6) -> torch.Tensor:
    pipe.update_components(guider=guider)
    latents = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["a cat", "a small red circle", "x"][:rows]
    return pipe(prompt=prompts, latents=latents, num_inference_steps=steps, output="images", output_type="latent")


@pytest.mark.filterwarnings("ignore:.*were cut after the first step")
def test_it_is_a_guider_of_modular_pipelines(modular, tmp_path):
    own = modular_draw(modular, diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(modular_draw(modular, AdaptiveGuidance(3.0, "off")), own)
    method = AdaptiveGuidance(3.0, -1, min_steps=2).bind(modular.scheduler)
    rows = counted(modular)
    cut = modular_draw(modular, method)
    assert rows == [2] * 8  # two calls in each of two steps, then one
    assert torch.equal(modular_draw(modular, method), cut)  # one guider, used again
    torch.testing.assert_close(modular_draw(modular, GuidancePolicy.static_cut(3.0, 6, 2)), cut)
    method.save_pretrained(tmp_path)
    copy = method.new(threshold=0.5)
    assert (copy.scale, copy.threshold, copy.min_steps) == (3.0, 0.5, 2)
    again = AdaptiveGuidance.from_pretrained(tmp_path).bind(modular.scheduler)
    assert torch.equal(modular_draw(modular, again), cut)
    rows.clear()
    modular_draw(modular, GuidancePolicy([3.0, 0.0, 1.0, 3.0, 0.0, 1.0]))
    assert rows == [2] * 8


def test_linear_ag_is_a_guider_of_modular_pipelines(modular):
    """With the present conditional prediction as the estimate, a linear step is the condition alone."""
    zeros = torch.zeros(6, 6, dtype=torch.float64)
    copying = Coefficients(zeros + torch.eye(6), zeros, zeros[0], zeros[0], zeros[0])
    scheduler = modular.scheduler
    scheduler.set_timesteps(6)
    made_for = {"timesteps": scheduler.timesteps.tolist(), "scale": 3.0, **_scheduler_of(scheduler)}
    method = LinearAdaptiveGuidance(3.0)
    method._take(copying, made_for, probe(modular.unet))
    rows = counted(modular)
    found = modular_draw(modular, method.bind(scheduler))
    assert len(rows) == method.cost == 8
    wanted = modular_draw(modular, GuidancePolicy([3.0, 1.0, 3.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(modular_draw(modular, method.new().bind(scheduler)), found)
    method._take(copying, made_for, probe(tiny.unconditional().unet))
    with pytest.raises(InputError, match=r"network='UNet2DConditionModel' .* were fitted to"):
        modular_draw(modular, method)


def test_rows_of_a_modular_batch_are_cut_one_by_one(modular):
    """The unconditional call is made until the last row is cut, but each row's result is its own."""
    gamma = AdaptiveGuidance(3.0, 0.999999999, min_steps=1).bind(modular.scheduler)
    modular_draw(modular, gamma, rows=3)
    curves = torch.stack(gamma.similarities)
    threshold = float(curves[1].sort().values[:2].mean())  # two of the three rows pass at the second step
    method = AdaptiveGuidance(3.0, threshold, min_steps=2).bind(modular.scheduler)
    calls = counted(modular)
    whole, cut = modular_draw(modular, method, rows=3), method.guided_steps.tolist()
    assert sorted(cut)[:2] == [2, 2] and max(cut) > 2 and calls == [3] * (6 + max(cut))
    for row in (0, 1, 2):
        modular.update_components(guider=method)
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))[row : row + 1]
        prompt = ["a cat", "a small red circle", "x"][row]
        more = {"num_inference_steps": 6, "output": "images", "output_type": "latent"}
        alone = modular(prompt=prompt, latents=latents, **more)
        assert int(method.guided_steps) == cut[row]
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-4)


def test_linear_ag_is_saved_with_what_it_belongs_to(tmp_path):
    pipe = toy()
    made = LinearAdaptiveGuidance.fit(pipe, [0] * 4, scale=3.0, steps=6, batch=4)
    made.save_pretrained(tmp_path)
    again = AdaptiveGuidance.from_pretrained(tmp_path)
    assert isinstance(again, LinearAdaptiveGuidance) and again.modes == made.modes
    x = noise(pipe, 2)
    with made.install(pipe):
        found = draw(pipe, x, steps=6)
    with again.install(pipe):
        assert torch.equal(draw(pipe, x, steps=6), found)
        with pytest.raises(InputError, match=r"calls of the run=8 .* 6, which the coefficients"):
            draw(pipe, x, steps=8)
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match=r"scheduler='DPMSolverPPScheduler' .* DDIMScheduler"):
        again.install(pipe)
    pipe.scheduler = DDIMScheduler(**SD | {"beta_end": 0.02})
    with pytest.raises(InputError, match=r"beta_end of the scheduler=0.02 .* 0.012"):
        again.install(pipe)
    other = classes()
    other.scheduler = DDIMScheduler(**SD)
    with pytest.raises(InputError, match=r"network='UNet2DModel' .* were fitted to"):
        again.install(other)
    again.scale = 4.0
    with again.install(toy()) as method, pytest.raises(InputError, match=r"scale=4.0 .* 3, which"):
        draw(method._pipe, x, steps=6)
    with pytest.raises(InputError, match=r"coefficients=None .* fitted first"):
        LinearAdaptiveGuidance(3.0).install(toy())
    (tmp_path / "coefficients.safetensors").unlink()
    with pytest.raises(InputError, match="coefficients that can be read"):
        AdaptiveGuidance.from_pretrained(tmp_path)


def test_linear_ag_with_a_threshold_cuts_as_well(trained):
    made = LinearAdaptiveGuidance.fit(trained, torch.arange(10), scale=3.0, steps=8, pattern="alternate", batch=10)
    labels, x = torch.arange(6), noise(trained, 6)
    made.threshold, made.min_steps = 0.9985, 4
    with made.install(trained):
        rows = counted(trained)
        whole, together = draw(trained, x, labels), made.guided_steps.tolist()
        calls = sum(rows)
        alone = [(draw(trained, x[i : i + 1], labels[i : i + 1]), int(made.guided_steps)) for i in range(6)]
    assert together == [n for _, n in alone] and len(set(together)) > 1
    assert calls == 6 * 8 + sum(together)
    torch.testing.assert_close(whole, torch.cat([image for image, _ in alone]), rtol=1e-5, atol=1e-5)


def test_linear_ag_for_other_outputs_than_noise():
    found = []
    for kind in ("epsilon", "v_prediction", "sample"):
        pipe = toy(kind=kind)
        pipe.unet.to(torch.float64)
        made = LinearAdaptiveGuidance.fit(pipe, [0] * 4, scale=3.0, steps=6, batch=4)
        with made.install(pipe):
            found.append(draw(pipe, noise(pipe, 2).double(), steps=6))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)


def test_saved_with_its_pipeline(tmp_path):
    from steersman.diffusion import load_steered, save_steered

    pipe = classes()
    x = noise(pipe, 2)
    fitted = LinearAdaptiveGuidance.fit(pipe, [0, 1], scale=3.0, steps=8)
    for i, method in enumerate((AdaptiveGuidance(3.0, -1, 3), GuidancePolicy.static_cut(3.0, 8, 2), fitted)):
        with method.install(pipe):
            found = draw(pipe, x)
            save_steered(pipe, tmp_path / str(i))
        torch.testing.assert_close(draw(load_steered(tmp_path / str(i)), x), found)


# ------------------------------------------------------------------ apply


@pytest.mark.parametrize("mode", ["calibrate", "linear", "search"])
def test_apply_makes_a_folder_that_installs(tmp_path, mode):
    pipe = classes()
    pipe.save_pretrained(tmp_path / "pipe")
    settings = {"scale": 3.0, "steps": 4, "count": 4, "iterations": 1}
    facts = apply(tmp_path / "pipe", None, tmp_path / "made", seed=1, mode=mode, **settings)
    assert facts
    made = AdaptiveGuidance.from_pretrained(tmp_path / "made")
    with made.install(pipe):
        draw(pipe, noise(pipe, 2), steps=4)
    if mode != "search":
        assert AdaptiveGuidance.from_pretrained(tmp_path / "made", threshold=0.5, min_steps=2).min_steps == 2
    else:
        with pytest.raises(InputError, match=r"threshold=0.5 .* a policy has no test"):
            AdaptiveGuidance.from_pretrained(tmp_path / "made", threshold=0.5)


def test_apply_takes_what_is_asked_for_in_random_order():
    from steersman.diffusion.adaptive_guidance.recipe import in_random_order

    asked = in_random_order(["a small red circle", "a large cross"], 5, 0)
    assert len(asked) == 5 and set(asked[:2]) == {"a small red circle", "a large cross"}
    assert in_random_order([3], 2, 0) == [3, 3]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"scale": 1.0}, "scale=1.0 .* nothing|scale=1.0 .* above 1"),
        ({"scale": "3"}, "scale='3'"),
        ({"threshold": 1.5}, "threshold=1.5 .* from -1 to 1, or off"),
        ({"threshold": 99.1}, "threshold=99.1"),
        ({"threshold": "on"}, "threshold='on'"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"min_steps": 0}, "min_steps=0 .* from 1"),
        ({"min_steps": 2.0}, "min_steps=2.0"),
    ],
)
def test_bad_knobs(knobs, sentence):
    with pytest.raises(InputError, match=sentence):
        AdaptiveGuidance(**knobs)


def test_bad_arguments(trained):
    for call, sentence in (
        (lambda: GuidancePolicy([]), "scales=.* one for each call"),
        (lambda: GuidancePolicy([math.inf]), "scales="),
        (lambda: GuidancePolicy.interval(3.0, 4, 3, 2), "start and stop"),
        (lambda: GuidancePolicy.random(3.0, 4, 5), "guided_steps=5"),
        (lambda: calibrate(trained, [0], saving=0.5), "saving=0.5"),
        (lambda: calibrate(trained, [0], psnr=-1), "psnr=-1"),
        (lambda: calibrate(trained, []), "at least one prompt or label"),
        (lambda: search_policy(trained, [0], steps=4, budget=9), "budget=9 .* from 4 to 8"),
        (lambda: search_policy(trained, [0], options=[3.0, 5.0]), "options="),
        (lambda: search_policy(trained, [0], gradient="none"), "gradient='none'"),
        (lambda: LinearAdaptiveGuidance(3.0, "alternating"), "did you mean 'alternate'"),
        (lambda: LinearAdaptiveGuidance.fit(trained, [0], ridge=-1), "ridge=-1"),
        (lambda: LinearAdaptiveGuidance.fit(trained, [0], window=0), "window=0"),
        (lambda: Runs(tiny.unconditional(), [0], 2.0, 4), "called with a prompt or labels"),
        (lambda: AdaptiveGuidance.from_pretrained("/nonexistent"), "guider_config.json"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()


def test_pipelines_without_two_branches_are_refused():
    pipe = classes()
    with quiet().install(pipe), pytest.raises(InputError, match=r"guidance_scale=1.0 .* above 1"):
        draw(pipe, noise(pipe, 2), scale=1.0)
    with GuidancePolicy([3.0] * 4).install(pipe), pytest.raises(InputError, match=r"calls of the run=8 .* 4, as many"):
        draw(pipe, noise(pipe, 2))
    pipe = toy(scheduler=diffusers.DDPMScheduler)
    with pytest.raises(InputError, match=r"scheduler='DDPMScheduler' .* a deterministic one"):
        search_policy(pipe, [0], scale=3.0, steps=4)


def test_erratum_cosines_of_equal_vectors_exceed_one():
    x = torch.randn(200, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert bool((similarity(x, x) > 1).any())  # so a threshold of 1 would cut
    pipe = toy()
    pipe.unet.means = pipe.unet.means[1:].expand(2, -1, -1, -1)  # both branches say the same
    with quiet(1.0).install(pipe) as method:
        draw(pipe, noise(pipe, 50))
    assert set(method.guided_steps.tolist()) == {8}


@pytest.mark.filterwarnings("ignore:FKSteering")
@pytest.mark.parametrize("linear", [False, True])
def test_below_reward_steering_a_cut_goes_with_its_particle(trained, linear):
    """All particles become copies of row 2 in the midst of the run, whose cut and history they must have, too."""
    scheduler = DPMSolverPPScheduler.from_config(trained.scheduler.config, algorithm_type="sde-dpmsolver++")
    pipe = ClassConditionalPipeline(trained.unet, scheduler, 10)
    pipe.set_progress_bar_config(disable=True)
    first = True

    def prefer(images):
        nonlocal first
        scores = 60.0 * (torch.arange(len(images)) == 2) * first
        first = False
        return scores.double()

    def run():
        more = {"guidance_scale": 2.0, "num_inference_steps": 8, "output_type": "latent", "latents": noise(pipe, 4)}
        generators = [torch.Generator().manual_seed(7) for _ in range(4)]
        return pipe([3] * 4, generator=generators, **more).images

    if linear:
        method = LinearAdaptiveGuidance.fit(pipe, torch.arange(10), scale=3.0, steps=8, batch=10)
    else:
        method = quiet(0.99999999, min_steps=3)
        with method.install(pipe):
            run()
        # The third step cuts two of the four, before they are copied.
        method.threshold = float(method.similarities[0].sort().values[1:3].mean())
    with method.install(pipe):
        with FKSteering(prefer, scale=1.0, schedule=(0.42,)).install(pipe):
            first = False
            plain = run()
            cut = method.guided_steps.tolist()
            first = True
            steered = run()
        found = method.guided_steps.tolist()
    assert found == [cut[2]] * 4 and (linear or sorted(cut)[:2] == [3, 3] != sorted(cut)[2:])
    torch.testing.assert_close(steered, plain[2:3].expand_as(steered), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[0], steered[0], atol=1e-2)
