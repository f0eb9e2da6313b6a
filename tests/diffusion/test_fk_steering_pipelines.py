"""FK steering on diffusers' pipelines: copies with all they carry, the exact tilt, rewards of all kinds, refusals."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AdaptiveProjectedGuidance
from PIL import Image

from steersman.diffusion import (
    CFGPlusPlus,
    ClassConditionalPipeline,
    DDIMCFGPPScheduler,
    DDIMScheduler,
    DPMSolver2SAncestralCFGPPScheduler,
    DPMSolverPPScheduler,
    EulerAncestralCFGPPScheduler,
)
from steersman.diffusion.fk_steering import FKSteering, LearnedReward, Reward
from steersman.diffusion.guidance import StockGuidance
from steersman.diffusion.installing import load_steered, save_steered
from steersman.diffusion.solver import LinearVP
from steersman.errors import InputError, TrialError
from steersman.reference import gaussians_model
from tests.diffusion import tiny
from tests.diffusion.test_guidance import modular  # noqa: F401

K = 4


def brightness(images):
    return images.mean((1, 2, 3))


def favourite(row: int):
    """A reward that always prefers one particle of four, whatever it shows."""
    return lambda images: 60.0 * (torch.arange(len(images)) % K == row).double()


class Once:
    """A reward that prefers one particle of four when it is first asked, and none afterwards.

    So that all become copies of it in the midst of a run, and no later resampling hides what comes of them.
    """

    def __init__(self, row: int) -> None:
        self.first, self.row = True, row

    def __call__(self, images):
        if images.requires_grad:
            return images.mean((1, 2, 3))
        scores = favourite(self.row)(images) if self.first else torch.zeros(len(images))
        self.first = False
        return scores


@pytest.fixture
def sd():
    return tiny.stable_diffusion()


def classes(scheduler=None) -> ClassConditionalPipeline:
    torch.manual_seed(0)
    pipe = ClassConditionalPipeline(
        tiny.unconditional(num_class_embeds=3).unet, diffusers.DDPMScheduler(), null_label=2
    )
    pipe.scheduler = scheduler or DDIMScheduler.from_config(pipe.scheduler.config, eta=1.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, seed=1, steps=10, **more):
    generator = more.pop("generator", torch.Generator().manual_seed(seed))
    given = {"num_inference_steps": steps, "output_type": "latent", "generator": generator} | more
    if isinstance(pipe, ClassConditionalPipeline):
        return pipe(**({"labels": [0] * K} | given)).images
    return pipe(**(tiny.EMBEDS | {"num_images_per_prompt": K, "guidance_scale": 2.0} | given)).images


SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}, {"eta": 1.0}),
    "ddpm": (diffusers.DDPMScheduler, {}, {}),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, {}),
    "kdpm2-ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}, {}),
    "dpm-multistep": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        {},
    ),
    "dpm-singlestep": (diffusers.DPMSolverSinglestepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "sa": (diffusers.SASolverScheduler, {}, {}),
    "ours": (DDIMScheduler, {"eta": 1.0}, {}),
    "ours-multistep": (DPMSolverPPScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "ours-singlestep": (
        DPMSolverPPScheduler,
        {"algorithm_type": "sde-dpmsolver++", "method": "singlestep", "compat": False},
        {},
    ),
}


def on(pipe, name):
    kind, settings, more = SCHEDULERS[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    return more


# ------------------------------------------------------------------ exact checks


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.filterwarnings("ignore:FKSteering")
def test_a_copy_goes_on_as_its_original(sd, name):
    """All rows draw the same noise and become copies of row 2: then all end where row 2 ends without steering.

    That is so only if whatever the scheduler carries was re-indexed with the rows.
    """
    more = on(sd, name)
    latents = torch.randn(K, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def run():
        return call(sd, generator=[torch.Generator().manual_seed(7) for _ in range(K)], latents=latents, **more)

    plain = run()
    assert not torch.allclose(plain[0], plain[2], atol=1e-2)
    inside = 6 if name == "kdpm2-ancestral" else 4  # in the midst of a step, where steps have two calls
    with FKSteering(Once(2), scale=1.0, schedule=(inside,)).install(sd) as steering:
        steered = run()
    assert steering.report.ancestors.tolist() == [2] * K and not bool(steered.isnan().any())
    assert torch.allclose(steered, plain[2].expand_as(steered), atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "euler-ancestral", "dpm-multistep", "ours-multistep", "ours-singlestep"])
def test_no_tilt_is_the_base_sampler_bitwise(sd, name):
    more = on(sd, name) | {"steps": 5}
    plain = call(sd, **more)
    with FKSteering(brightness, scale=0.0).install(sd) as steering:
        assert torch.equal(call(sd, **more), plain)
    assert steering.report.ancestors.tolist() == [0, 1, 2, 3]
    assert torch.equal(call(sd, **more), plain)


def tilted(law, scale):
    """Means and logarithms of the weights of the modes of p(x) exp(λ x_1), not normalised: their sum is Z."""
    means = law.means + scale * law.std[:, None] ** 2 * torch.tensor([1.0, 0.0], dtype=torch.float64)
    return means, law.weights.log() + scale * law.means[:, 0] + 0.5 * (scale * law.std) ** 2


@pytest.mark.parametrize("name", ["ours", "ours-multistep", "dpm-multistep"])
def test_the_mixture_s_exact_tilt(name):
    """r(x) = x_1 on a mixture: modes are reweighted and moved by λ s². Sampled through a stock pipeline."""
    pipe, k, scale = gaussians_model.pipeline("gaussians:ring"), 3000, 2.0
    pipe.set_progress_bar_config(disable=True)
    more = on(pipe, name)
    steering = FKSteering(lambda x: x[:, 0, 0, 0], scale=scale, particles=k, space="latent").install(pipe)
    x = call(pipe, steps=60, labels=None, batch_size=k, seed=0, **more)[:, :, 0, 0].double()
    law = pipe.unet.law
    means, logs = tilted(law, scale)
    weights = torch.softmax(logs, 0)
    wanted = weights @ means
    assert float((x.mean(0) - wanted).norm()) < 0.08
    assert float(steering.report.log_z[0]) == pytest.approx(float(torch.logsumexp(logs, 0)), abs=0.1)
    shares = law.responsibilities(x - scale * law.std[0] ** 2 * torch.tensor([1.0, 0.0])).mean(0)
    assert 0.5 * float((shares - weights).abs().sum()) < 0.07


@pytest.mark.parametrize("name", ["ours", "ours-multistep", "ddim"])
def test_gradient_proposals_keep_the_tilt_and_more_ancestors(name):
    pipe, k, scale = gaussians_model.pipeline("gaussians:ring"), 3000, 2.0
    pipe.set_progress_bar_config(disable=True)
    more, found = on(pipe, name), {}
    for gradient in (0.0, 0.5):
        method = FKSteering(lambda x: x[:, 0, 0, 0], scale=scale, particles=k, space="latent", gradient=gradient)
        with method.install(pipe) as steering:
            x = call(pipe, steps=60, labels=None, batch_size=k, seed=0, **more)[:, :, 0, 0].double()
        found[gradient] = x.mean(0), float(steering.report.log_z[0]), int(steering.report.steps[-1].distinct)
    assert float((found[0.5][0] - found[0.0][0]).norm()) < 0.1
    assert found[0.5][1] == pytest.approx(found[0.0][1], abs=0.1)
    assert found[0.5][1] == pytest.approx(float(torch.logsumexp(tilted(pipe.unet.law, scale)[1], 0)), abs=0.15)
    assert found[0.5][2] > 1.3 * found[0.0][2]


def test_the_returned_sample_is_what_is_scored_last():
    """Where the last step ends at a noise level its x_0 is not the sample that is returned."""
    seen = []
    pipe = classes(diffusers.DDPMScheduler(clip_sample=False))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, eta=1.0, set_alpha_to_one=False)
    with FKSteering(lambda x: seen.append(x) or x.mean((1, 2, 3)), scale=0.0, space="latent").install(pipe):
        out = call(pipe)
    assert torch.equal(seen[-1], out)
    assert len(seen) == 5


def test_erratum_the_best_is_of_the_final_reward():
    """Not of the largest reward on the way: a particle that looked best in between isn't it."""
    promised = iter([torch.tensor([0.0, 9.0, 0.0, 0.0]), torch.tensor([0.1, 0.2, 0.4, 0.3])])
    pipe = classes()
    plain = call(pipe)
    steering = FKSteering(
        lambda x: next(promised), potential="max", scale=0.0, schedule=(0.5,), returns="best"
    ).install(pipe)
    assert torch.equal(call(pipe), plain[2:3])
    assert steering.report.rewards.tolist() == pytest.approx([0.4]) and steering.report.ancestors.tolist() == [2]


# ------------------------------------------------------------------ groups, what is returned


@pytest.mark.filterwarnings("ignore:FKSteering")
def test_prompts_are_groups_of_their_own():
    pipe = classes()
    labels = [0] * K + [1] * K

    prefer = Once(1)

    def score(images, labels):
        assert labels == [0] * K + [1] * K
        return prefer(images)

    start = torch.randn(2 * K, 1, 8, 8)

    def run():
        generators = [torch.Generator().manual_seed(5) for _ in range(2 * K)]
        return call(pipe, generator=generators, labels=labels, latents=start)

    plain = run()
    with FKSteering(score, scale=1.0, schedule=(0.42,)).install(pipe) as steering:
        out = run()
    assert torch.allclose(out[:K], plain[1].expand(K, -1, -1, -1), atol=1e-6)
    assert torch.allclose(out[K:], plain[K + 1].expand(K, -1, -1, -1), atol=1e-6)
    assert steering.report.prompts.tolist() == [0] * K + [1] * K
    assert steering.report.ancestors.tolist() == [1] * (2 * K)


def test_what_is_returned():
    pipe = classes()
    plain = call(pipe)
    table = torch.tensor([0.1, 0.9, 0.3, 0.9])
    with FKSteering(lambda x: table, potential="best-of-n").install(pipe) as steering:
        assert torch.equal(call(pipe), plain[[1, 3, 2, 0]])
    assert steering.report.reward_calls == K and steering.report.best == [0]
    assert steering.report.rewards.tolist() == pytest.approx([0.9, 0.9, 0.3, 0.1])
    with FKSteering(lambda x: table, potential="best-of-n", returns="best").install(pipe):
        assert torch.equal(call(pipe), plain[1:2])
    for returns, rows in (("all", [0, 2, 2, 3]), ("unique", [0, 2, 3])):
        weights = torch.tensor([1.0, 0.0, 2.0, 1.0]).log().nan_to_num(neginf=-50.0)
        method = FKSteering(lambda x, w=weights: w, potential="importance", scale=1.0, returns=returns)
        with method.install(pipe) as steering:
            assert torch.equal(call(pipe), plain[rows])
        assert steering.report.ancestors.tolist() == rows
    one = FKSteering(brightness, potential="best-of-n", particles=1)
    with one.install(pipe):
        assert torch.equal(call(pipe), plain)


def test_a_shrunk_batch_in_stable_diffusion(sd):
    more = on(sd, "ddim")
    with FKSteering(brightness, scale=50.0, returns="best", micro_batch=3).install(sd) as steering:
        images = call(sd, output_type="pt", **more)
    assert images.shape == (1, 3, 16, 16) and steering.report.rewards.shape == (1,)
    assert float(brightness(images)) == pytest.approx(float(steering.report.rewards), abs=1e-5)


def test_a_run_is_reproducible_and_runs_differ():
    pipe = classes()
    with FKSteering(brightness, scale=200.0, resampler="multinomial").install(pipe) as steering:
        one, first = call(pipe, seed=3), steering.report.ancestors.tolist()
        two = call(pipe, seed=3)
        found = [tuple(first)]
        for seed in range(4, 9):
            call(pipe, seed=seed)
            found.append(tuple(steering.report.ancestors.tolist()))
    assert torch.equal(one, two)
    assert len(set(found)) > 1


# ------------------------------------------------------------------ rewards


def test_prompts_reach_the_reward(sd, monkeypatch):
    more = on(sd, "ddim")
    asked = []

    def score(images, prompts):
        asked.append(list(prompts))
        return torch.zeros(len(images))

    def encode(prompt, device, images, guided, *rest, **more):
        two = tiny.EMBEDS["prompt_embeds"].repeat_interleave(len(prompt) * images, 0)
        return two, two * 0.5

    monkeypatch.setattr(sd, "encode_prompt", encode)
    monkeypatch.setattr(sd, "check_inputs", lambda *a, **k: None)
    with FKSteering(score, particles=2, micro_batch=3).install(sd):
        sd(["a cat", "a dog"], num_images_per_prompt=2, num_inference_steps=2, output_type="latent", **more)
    assert asked[:2] == [["a cat", "a cat", "a dog"], ["a dog"]]
    assert sd.encode_prompt is encode
    monkeypatch.undo()
    with FKSteering(score).install(sd), pytest.raises(InputError, match="one without prompts"):
        call(sd, **more)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda x: torch.tensor([0.0, 0.0, math.nan, 0.0]), "particle 2 of prompt 0, step 3 of 10"),
        (lambda x: torch.zeros(len(x), 2), "one number per image"),
        (lambda x: 0.5, "one number per image"),
        (lambda x: [0.0, math.inf, 0.0, 0.0], "particle 1 of prompt 0"),
    ],
)
def test_bad_rewards_are_refused(bad, said):
    pipe = classes()
    with FKSteering(bad).install(pipe), pytest.raises(InputError, match=said):
        call(pipe)


def test_a_reward_that_fails_names_the_particle():
    images = torch.zeros(4, 1, 8, 8)
    images[2] = 1.0

    def picky(x):
        if bool((x == 1).any()):
            raise RuntimeError("it is too bright")
        return x.mean((1, 2, 3))

    names = [f"particle {i}" for i in range(4)]
    with pytest.raises(
        TrialError, match="the reward of particle 2 could not be computed: RuntimeError: it is too bright"
    ):
        Reward(picky)(images, names)
    found = Reward(picky, on_error="skip")(images, names)
    assert found[:2].tolist() == [0, 0] and math.isnan(found[2]) and found[3] == 0
    found = Reward(lambda x: x.mean((1, 2, 3)) * math.nan, on_error="skip", micro_batch=3)(images, names)
    assert bool(found.isnan().all())

    def slow(x):
        time.sleep(1.5 if bool((x == 1).any()) else 0)
        return x.mean((1, 2, 3))

    with pytest.raises(TrialError, match=r"particle 2 could not be computed: it took longer than 0.5 s"):
        Reward(slow, timeout=0.5)(images, names)


def test_a_particle_without_a_reward_is_not_returned():
    pipe = classes()
    plain = call(pipe)
    method = FKSteering(lambda x: [0.1, math.nan, 0.1, 0.1], schedule=(), on_error="skip")
    with method.install(pipe) as steering:
        out = call(pipe)
    assert 1 not in steering.report.ancestors.tolist() and bool(steering.report.rewards.isfinite().all())
    assert torch.equal(out, plain[steering.report.ancestors])
    nothing = FKSteering(lambda x: [math.nan] * len(x), on_error="skip").install(pipe)
    with nothing, pytest.warns(UserWarning, match="no particle with a reward"):
        out = call(pipe)
    assert torch.equal(out, plain)


class Scorer(BaseHTTPRequestHandler):
    asked: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Scorer.asked.append(body)
        if self.path == "/slow":
            time.sleep(0.5)
        pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in body["images"]]
        answer = {"rewards": [float(p.mean()) / 255 for p in pixels]} if self.path == "/" else {"error": 1}
        if self.path == "/null":
            answer = {"rewards": [None] + [0.5] * (len(pixels) - 1)}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    http = HTTPServer(("127.0.0.1", 0), Scorer)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


def test_an_http_scorer(server):
    pipe = classes()
    with FKSteering(server + "/", scale=5.0).install(pipe) as steering:
        images = call(pipe, output_type="pt")
    assert Scorer.asked[-1]["labels"] == [0] * K and Scorer.asked[-1]["prompts"] is None
    error = (brightness(images).double() - steering.report.rewards).abs()
    assert float(error.max()) < 1 / 255
    some, names = torch.rand(2, 3, 8, 8), ["particle 0", "particle 1"]
    with pytest.raises(TrialError, match=r"particle 0 could not be computed: .* did not answer with"):
        Reward(server + "/error")(some, names)
    with pytest.raises(TrialError, match=r"did not answer within 0\.1 s"):
        Reward(server + "/slow", timeout=0.1)(some[:1], names)
    with pytest.raises(InputError, match="particle 0"):
        Reward(server + "/null")(some, names)
    assert Reward(server + "/null", on_error="skip")(some, names)[1] == 0.5
    with pytest.raises(TrialError, match="could not be asked"):
        Reward("http://127.0.0.1:1/")(some[:1], names)


def test_a_learned_reward_finds_the_conditional_expectation():
    """x_0 ~ N(0, 1), r = x_0: E[r | x_t] = α x_t and E[exp(λ r) | x_t] = exp(λ α x_t + λ² σ² / 2)."""

    class Rows(torch.nn.Module):
        """Linear in features of x and the noise level, in which both expectations are nearly linear."""

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)

        def forward(self, x, t):
            a = scheduler.alphas_cumprod[t][:, None].sqrt()
            y = a * x
            return self.linear(torch.cat([y, y**2, a**2, torch.ones_like(y)], 1))

    scheduler = diffusers.DDPMScheduler()
    x0 = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    x, t = torch.linspace(-1, 1, 9)[:, None], torch.full((9,), 300)
    alpha = float(scheduler.alphas_cumprod[300].sqrt())
    torch.manual_seed(0)
    for of, wanted in (
        ("reward", alpha * x[:, 0]),
        ("exponential", alpha * x[:, 0] + 0.5 * 0.5 * (1 - alpha**2)),
    ):
        phi = LearnedReward(Rows(), of=of, scale=0.5)
        losses = phi.fit(
            x0, x0[:, 0], scheduler, steps=300, learning_rate=0.02, generator=torch.Generator().manual_seed(1)
        )
        assert np.mean(losses[-50:]) < np.mean(losses[:20])
        assert float((phi(x, t).float() - wanted).abs().max()) < 0.12, of


def test_a_learned_reward_steers():
    """With the exact r_φ(x_t) of a mixture the end is the same tilt."""
    pipe, k, scale = gaussians_model.pipeline("gaussians:ring"), 2000, 2.0
    pipe.set_progress_bar_config(disable=True)
    on(pipe, "ours")
    law, process = pipe.unet.law, pipe.unet.process

    def promised(x, t):
        level = float(t[0])
        return law.x0(x.flatten(1).double(), process.alpha(level), process.sigma(level))[:, 0]

    steering = FKSteering(
        lambda x: x[:, 0, 0, 0], scale=scale, particles=k, space="latent", intermediate=promised
    ).install(pipe)
    call(pipe, steps=40, labels=None, batch_size=k, seed=0)
    log_z = float(torch.logsumexp(tilted(law, scale)[1], 0))
    assert float(steering.report.log_z[0]) == pytest.approx(log_z, abs=0.1)
    assert steering.report.reward_calls == k


def test_a_scale_of_its_own():
    pipe = classes()
    with FKSteering(brightness, scale="auto").install(pipe) as steering:
        call(pipe)
    assert steering.report.scale > 1
    assert float(steering.report.steps[0].ess) == pytest.approx(2.0, rel=1e-4)
    strong = FKSteering(lambda x: 100 * favourite(1)(x), scale=10.0).install(pipe)
    with strong, pytest.warns(UserWarning, match=r"effective sample size 1\.00 of 4"):
        call(pipe)


# ------------------------------------------------------------------ installing, saving, other methods


def test_installed_and_taken_off(sd):
    more = on(sd, "dpm-multistep")
    plain, step = call(sd, **more), sd.scheduler.step
    steering = FKSteering(lambda x: torch.arange(len(x)), scale=1.0).install(sd)
    with pytest.raises(InputError, match="without another FKSteering"):
        FKSteering(brightness).install(sd)
    assert not torch.equal(call(sd, **more), plain)
    steering.uninstall()
    assert "step" not in vars(sd.scheduler) and sd.scheduler.step == step
    assert "encode_prompt" not in vars(sd) and not sd.unet._forward_pre_hooks
    assert torch.equal(call(sd, **more), plain)


def test_another_scheduler_needs_another_installation():
    pipe = classes()
    steering = FKSteering(brightness).install(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="install it again"):
        call(pipe)
    steering.uninstall()
    call(pipe)


def test_saved_and_loaded(tmp_path):
    (tmp_path / "score.py").write_text("def bright(images):\n    return images.mean((1, 2, 3))\n")
    text = f"{tmp_path / 'score.py'}:bright"
    pipe = classes()
    FKSteering(text, "max", 300.0, schedule=(2, 0.5), r_min=-math.inf, ess_threshold=0.5, seed=4).install(pipe)
    wanted = call(pipe)
    save_steered(pipe, tmp_path / "pipe")
    with pytest.raises(InputError, match=r"given again \(it was .*score\.py:bright"):  # a folder names no code to run
        load_steered(tmp_path / "pipe")
    loaded = load_steered(tmp_path / "pipe", FKSteering={"reward": text})
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded), wanted)
    plain = ClassConditionalPipeline.from_pretrained(tmp_path / "pipe")
    plain.set_progress_bar_config(disable=True)
    assert not torch.equal(call(plain), wanted)
    FKSteering(brightness, "max", 300.0).save_pretrained(tmp_path / "function")
    with pytest.raises(InputError, match="given again"):
        FKSteering.from_pretrained(tmp_path / "function")
    again = FKSteering.from_pretrained(tmp_path / "function", reward=brightness, scale=3.0)
    assert again.core.scale == 3.0 and again.core.potential == "max"
    with pytest.raises(InputError, match="did you mean 'resampler'"):
        FKSteering.from_pretrained(tmp_path / "function", reward=brightness, resample="residual")
    with pytest.raises(InputError, match=r"that FKSteering\.save_pretrained wrote"):
        FKSteering.from_pretrained(tmp_path / "nothing")


@pytest.mark.filterwarnings("ignore:FKSteering")
@pytest.mark.parametrize("name", ["ours-multistep", "dpm-multistep"])
def test_on_top_of_guidance_and_a_multistep_solver(sd, name):
    """A guidance that is installed below acts on each particle: copies of row 2 end where it does, guided."""
    on(sd, name)
    StockGuidance(AdaptiveProjectedGuidance(guidance_scale=4.0)).install(sd)
    latents = torch.randn(K, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def run():
        return call(sd, generator=[torch.Generator().manual_seed(7) for _ in range(K)], latents=latents)

    plain = run()
    with FKSteering(Once(2), scale=1.0, schedule=(0.42,)).install(sd):
        steered = run()
    assert torch.allclose(steered, plain[2].expand_as(steered), atol=1e-5)


@pytest.mark.filterwarnings("ignore:FKSteering")
@pytest.mark.parametrize("gradient", [0.0, 1e-9])
@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (DDIMCFGPPScheduler, {"eta": 1.0}),
        (EulerAncestralCFGPPScheduler, {}),
        (DPMSolver2SAncestralCFGPPScheduler, {}),
    ],
)
def test_on_top_of_cfg_plus_plus(sd, scheduler, settings, gradient):
    """Its solvers renoise with the unconditional branch: that, too, goes with the rows."""
    sd.scheduler = scheduler.from_config(sd.scheduler.config, **settings)
    CFGPlusPlus(scale=0.6).install(sd)
    latents = torch.randn(K, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def run():
        return call(sd, generator=[torch.Generator().manual_seed(7) for _ in range(K)], latents=latents)

    plain = run()
    with FKSteering(Once(2), scale=1.0, schedule=(0.42,), gradient=gradient).install(sd):
        if gradient and scheduler is DPMSolver2SAncestralCFGPPScheduler:
            with pytest.raises(InputError, match="one network call a step"):
                run()
            return
        steered = run()
    assert torch.allclose(steered, plain[2].expand_as(steered), atol=1e-5)


def test_unconditional_pipelines():
    pipe = tiny.unconditional()
    with FKSteering(brightness, scale=50.0).install(pipe) as steering:
        out = pipe(
            batch_size=2 * K, num_inference_steps=5, output_type="np", generator=torch.Generator().manual_seed(0)
        )
    assert out.images.shape == (2 * K, 8, 8, 1)
    assert steering.report.log_z.shape == (2,)


@pytest.mark.filterwarnings("ignore:FKSteering")
def test_modular_pipelines(modular):  # noqa: F811
    own = modular.scheduler
    modular.update_components(scheduler=diffusers.EulerAncestralDiscreteScheduler.from_config(own.config))
    run = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": K, "num_inference_steps": 4, "output": "images"}
    with FKSteering(brightness, scale=300.0, returns="best").install(modular) as steering:
        images = modular(**run, output_type="pt", generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 3, 16, 16)
    assert torch.allclose(brightness(images).double(), steering.report.rewards, atol=1e-5)
    modular.update_components(scheduler=own)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (DDIMScheduler, "draws noise"),
        (DPMSolverPPScheduler, "draws noise"),
        (diffusers.DDIMScheduler, r"eta=1.0 in the pipeline's call"),
        (diffusers.UniPCMultistepScheduler, "draws noise"),
        (diffusers.HeunDiscreteScheduler, "draws noise"),
    ],
)
def test_deterministic_samplers_are_refused(sd, scheduler, said):
    sd.scheduler = scheduler.from_config(sd.scheduler.config)
    with FKSteering(brightness).install(sd), pytest.raises(InputError, match=said):
        call(sd)


def test_a_deterministic_sampler_may_be_chosen_from_at_the_end(sd):
    sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    for potential in ("importance", "best-of-n"):
        with FKSteering(brightness, potential).install(sd):
            assert len(call(sd)) == K


def test_a_learned_reward_of_another_shape_is_refused():
    pipe = classes()
    for bad in (lambda x, t: x.mean((2, 3)), lambda x, t: torch.full((len(x),), math.nan)):
        with (
            FKSteering(brightness, intermediate=bad).install(pipe),
            pytest.raises(InputError, match="one for each x_t"),
        ):
            call(pipe)


def test_rows_that_are_no_groups_are_refused():
    pipe = classes()
    with FKSteering(brightness).install(pipe):
        with pytest.raises(InputError, match="a multiple of the 4 particles"):
            call(pipe, labels=[0] * 6)
        with pytest.raises(InputError, match="a group shares its conditioning"):
            call(pipe, labels=[0, 1] * K)
        with pytest.raises(InputError, match="steps from 0 to 9"):
            pipe2 = classes()
            FKSteering(brightness, schedule=(10,)).install(pipe2)
            call(pipe2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": 3}, "a function, file.py:name, or the http"),
        ({"reward": "ftp://x"}, r"file.py:name, or the http\(s\) address"),
        ({"reward": "nothing.py:f"}, "no file nothing.py"),
        ({"scale": "automatic"}, "or auto"),
        ({"particles": 1}, "particles=1"),
        ({"schedule": 0.2}, "a list of shares"),
        ({"schedule": (1.5,)}, "shares of the run"),
        ({"returns": "first"}, "all, best, unique"),
        ({"space": "pixels"}, "image or latent"),
        ({"gradient": -1}, "gradient=-1"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"on_error": "ignore"}, "stop or skip"),
        ({"timeout": 0}, "timeout=0"),
        ({"intermediate": 3}, "a function of x_t"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_are_not_allowed(settings, said):
    with pytest.raises(InputError, match=said):
        FKSteering(**({"reward": brightness} | settings))


def test_unknown_settings_and_gradients_that_cannot_be():
    with pytest.raises(TypeError, match="adaptive_resampling_at_end"):
        FKSteering(brightness, adaptive_resampling_at_end=True)
    pipe = classes(diffusers.DDPMScheduler(clip_sample=False))
    with FKSteering(brightness, gradient=1.0).install(pipe), pytest.raises(InputError, match="variance_noise"):
        call(pipe)
    pipe = classes()
    blind = FKSteering(lambda x: x.detach().mean((1, 2, 3)), gradient=1.0).install(pipe)
    with pytest.raises(InputError, match="differentiable"):
        call(pipe)
    blind.uninstall()
    assert LinearVP().sigma(0.5) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pipe)
