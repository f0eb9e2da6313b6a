"""Adaptive guidance: the rule on closed forms, rows left out one by one, LinearAG's regression, policies and search."""

from __future__ import annotations

import warnings
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from steersman.diffusion import ClassConditionalPipeline, DDIMScheduler
from steersman.diffusion.adaptive_guidance import (
    AdaptiveGuidance,
    GuidancePolicy,
    LinearAdaptiveGuidance,
    Regression,
    pattern_modes,
    similarity,
)
from steersman.diffusion.adaptive_guidance.linear import _Recorder
from steersman.diffusion.adaptive_guidance.trajectories import Runs
from steersman.diffusion.guidance import both_branches
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
    pipe = ClassConditionalPipeline(net, scheduler(prediction_type=kind, **SD), null_label=1)
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
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["sample"])), with_kwargs=True
    )
    return rows


def quiet(threshold=0.991, **more) -> AdaptiveGuidance:
    return AdaptiveGuidance(3.0, threshold, **more)


@pytest.fixture(scope="module")
def trained():
    pipe = digits.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def curves(pipe, latents, labels, scale=3.0, steps=8) -> torch.Tensor:
    """gamma (n, B) along plain guidance, by the definition."""
    found = []

    def take(cond, uncond, moment):
        a, b = (moment.eps(out).flatten(1).double() for out in (cond, uncond))
        found.append((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))

    with both_branches(pipe, take):
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
    labels, steps = torch.arange(8), 10
    x = noise(trained, 8)
    gamma = curves(trained, x, labels, steps=steps)
    for threshold in np.random.default_rng(0).uniform(float(gamma.min()), float(gamma.max()), 5):
        with AdaptiveGuidance(3.0, float(threshold), min_steps).install(trained) as method:
            rows = counted(trained)
            draw(trained, x, labels, steps=steps)
        wanted = cuts(gamma, threshold, min_steps)
        assert method.guided_steps.tolist() == wanted and min(wanted) >= min_steps
        assert sum(rows) == 8 * steps + sum(wanted)
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

    with both_branches(pipe, take):
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
    settings = {"scale": 5.0, "steps": 8, "batch": 20}
    one, two = (
        LinearAdaptiveGuidance.fit(trained, torch.arange(20) % 10, rounds=rounds, **settings) for rounds in (1, 2)
    )
    recorder = _Recorder(5.0, one)
    Runs(trained, torch.arange(20) % 10, 2.0, 8, batch=20)(range(20), recorder)
    errors = [
        [
            relative(e, t)
            for e, t in zip(estimates(made.coefficients, recorder.cond, recorder.used), recorder.target, strict=True)
        ]
        for made in (one, two)
    ]
    assert errors[0][1] == pytest.approx(errors[1][1])  # both have seen the same until the first estimate
    assert bool((np.array(errors[1][2:]) < np.array(errors[0][2:])).all())
