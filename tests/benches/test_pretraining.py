"""The pretraining bench, tiny: networks of a few channels, trained for a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from steersman import catalog
from steersman.benches import pretraining
from steersman.benches.pretraining import Pretraining, disturbed, round_weights
from steersman.diffusion import DDIMScheduler, PFGMPPPipeline, PFGMPPScheduler, pfgm_pp
from steersman.diffusion.images import load_pipeline
from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.engine.compare import compare
from steersman.errors import Inapplicable, InputError
from steersman.report.blocks import ImageGrid, Note, Scatter
from tests.diffusion import tiny

BUDGET = {"steps": 2, "batch_size": 8, "width": 8}


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("real.npz", images=rng.random((90, 8, 8), dtype=np.float32), labels=rng.integers(0, 2, 90))
    Path("mine.py").write_text("def first(images):\n    return images.flatten(1)[:, :6].double()\n")
    return tmp_path


def run(contenders, subject="real.npz", **arguments):
    grid = {"calls": [3], "samples": 24, **BUDGET} | arguments.pop("grid", {})
    return compare(Pretraining(), contenders=contenders, subject=subject, grid=grid, **({"seeds": 1} | arguments))


def test_recipes_are_trained_once_and_sampled_at_every_setting(world, monkeypatch):
    fits = []
    train = pfgm_pp.train_pfgmpp
    monkeypatch.setattr(pfgm_pp, "train_pfgmpp", lambda *a, **k: (fits.append((k["D"], k["seed"])), train(*a, **k))[1])
    contenders = ["edm", "ddpm", "pfgm-pp:D=64", "pfgm-pp:D=64+EDMEulerScheduler", "ddpm+heun", "real"]
    c = run(contenders, grid={"calls": [3, 5], "bits": [4, 32]}, out=world / "run")
    assert not c.failed, [r.error for r in c.failed]
    # What is stacked on a recipe shares its training.
    assert len(fits) == 3 and len({seed for _, seed in fits}) == 1
    for row in c.rows:
        assert {"frechet", "kernel", "frechet_pixels", "precision", "recall"} <= set(row.figures)
        assert all(np.isfinite(v) for v in row.figures.values())
    one = {r.contender: r.figures["frechet"] for r in c.select(calls=5, bits=32)}
    assert len(set(one.values())) == len(contenders)
    rounded = c.select("edm", calls=5, bits=4)[0]
    assert rounded.figures["frechet"] != one["edm"]
    blocks = c.bench.exhibits(c)
    assert isinstance(blocks[0], Note) and "steps 2" in blocks[0].text and "width 8" in blocks[0].text
    assert set(next(b for b in blocks if isinstance(b, ImageGrid)).images) == set(contenders)


def test_edm_is_pfgmpp_without_D(world):
    c = run(["edm", "pfgm-pp:D=inf", "pfgm-pp:D=1e9"])
    a, b, near = (r.figures["frechet"] for r in c.rows)
    assert a == b and near == pytest.approx(a, rel=1e-2)


def test_points_are_judged_by_exact_ones(world):
    c = run(["edm", "pfgm-pp:D=4", "real"], "gaussians:ring-sharp", grid={"samples": 200})
    assert not c.failed, [r.error for r in c.failed]
    errors = {r.contender: r.figures["sliced_wasserstein"] for r in c.rows}
    assert errors["real"] < 0.2 < errors["edm"]  # training points against an untrained network
    assert c.bench.headline == ("sliced_wasserstein", "calls")
    assert any(isinstance(b, Scatter) for b in c.bench.exhibits(c))
    with pytest.raises(InputError, match="judge"):
        run(["edm"], "gaussians", grid={"judge": "mine.py:first"})


def test_an_artefact_is_a_contender_and_a_judge_of_the_users_is_used(world):
    from steersman.engine.artefacts import run_verb

    run_verb("apply", "pfgm-pp", "real.npz", "made", None, {"D": 16, "steps": 1, "batch_size": 4, "width": 8})
    c = run(["./made", "real"], grid={"judge": "mine.py:first"})
    d = run(["./made", "real"])
    assert [r.status for r in c.rows] == ["ok", "ok"]
    assert c.rows[1].figures["frechet"] != d.rows[1].figures["frechet"]


def test_another_recipe_needs_only_its_card(world, monkeypatch):
    """A card whose apply takes the budget by name is a contender."""
    calls = []

    def apply(subject, input, out, *, seed=0, log=None, steps=1, batch_size=1, width=8, learning_rate=1e-3, shade=0.5):
        calls.append((steps, batch_size, width, learning_rate, shade))
        return pfgm_pp.apply(subject, input, out, seed=seed, steps=1, batch_size=batch_size, width=width)

    def lacking(subject, input, out, *, seed=0, log=None, steps=1):
        raise AssertionError

    monkeypatch.setattr(pretraining.artefacts, "function_of", lambda card, verb: apply)
    c = run(["pfgm-pp:shade=0.2"])
    assert [r.status for r in c.rows] == ["ok"] and calls == [(2, 8, 8, 2e-3, 0.2)]
    monkeypatch.setattr(pretraining.artefacts, "function_of", lambda card, verb: lacking)
    with pytest.raises(InputError, match="takes batch_size, width, learning_rate"):
        run(["pfgm-pp"])


@pytest.mark.parametrize(
    ("contenders", "grid", "text"),
    [
        (["edm+pfgm-pp"], {}, "one recipe"),
        (["heun"], {}, "stacked on a recipe"),
        (["edn"], {}, "did you mean 'edm'"),
        (["pfgm-pp:steps=5"], {}, "the same for all contenders"),
        (["pfgm-pp:d=5"], {}, "did you mean 'D'|one of"),
        (["edm:formulation=vp"], {}, "formulation"),
        (["edm"], {"samples": 31}, "held-out images, 30"),
        (["edm"], {"width": 12}, "multiple of 8"),
        (["edm"], {"bits": 1}, "bits"),
        (["edm"], {"error": -0.1}, "error"),
    ],
)
def test_what_can_not_be_run_is_refused_first(world, contenders, grid, text):
    with pytest.raises(InputError, match=text):
        run(contenders, grid=grid)


def test_subjects_that_are_no_images_are_refused(world):
    for subject in ("docs", "openai:x", "mine.py:first"):
        with pytest.raises(InputError, match=r"^subject="):
            Pretraining().subject(subject)


def test_a_sampler_for_other_noise_or_without_a_plan_is_inapplicable(world):
    c = run(["edm+DDIMScheduler", "ddpm+EDMEulerScheduler"])
    assert all(r.status == "inapplicable" and "another kind of noise" in str(r.error) for r in c.rows)
    c = run(["edm+EDMEulerScheduler"], grid={"error": 0.1})
    assert c.rows[0].status == "inapplicable" and "its steps start" in str(c.rows[0].error)


# ------------------------------------------------------------------ the probes


def test_weights_are_rounded_to_equal_levels():
    network = tiny.unconditional().unet
    before = {name: p.clone() for name, p in network.named_parameters()}
    round_weights(network, 32)
    assert all(torch.equal(before[name], p) for name, p in network.named_parameters())
    round_weights(network, 5)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, before[name])
            continue
        step = (before[name].max() - before[name].min()) / 31
        assert len(p.unique()) <= 32 and (p - before[name]).abs().max() <= 0.5001 * step
        assert torch.equal(p.min(), before[name].min())


@pytest.mark.parametrize("kind", ["edm", "ddim"])
def test_the_noise_before_each_step_is_its_formula(kind):
    """x += error σ_i ε before step i, by a loop written out; afterwards the pipeline is as it was."""
    unet: UNet2DModel = tiny.unconditional().unet.eval()
    scheduler = PFGMPPScheduler() if kind == "edm" else DDIMScheduler(timestep_spacing="trailing")
    pipe = PFGMPPPipeline(unet, scheduler) if kind == "edm" else ClassConditionalPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def sample(error: float) -> torch.Tensor:
        with disturbed(pipe, error, torch.Generator().manual_seed(1)):
            return pipe(latents=z, num_inference_steps=3, output_type="latent").images

    clean, got = sample(0.0), sample(0.3)
    g = torch.Generator().manual_seed(1)
    x = z * scheduler.init_noise_sigma
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            slot = scheduler.slots[i]
            if slot.k == 0:
                x = x + 0.3 * slot.sigma * torch.randn(x.shape, generator=g)
            x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert torch.allclose(got, x, atol=1e-6) and not torch.allclose(got, clean)
    assert torch.equal(sample(0.0), clean)
    pipe.scheduler = tiny.unconditional().scheduler
    with pytest.raises(Inapplicable):
        sample(0.1)


def test_ddpm_is_noise_prediction(world):
    """The recipe's loss is diffusers' training objective on the same draws, and its folder a DDIM pipeline."""
    images, labels = torch.rand(12, 1, 8, 8), None
    form = pfgm_pp.formulation_of("ddpm")
    unet = tiny.unconditional().unet.eval()
    y, z = 2 * images - 1, torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.arange(12) * 83
    abar = torch.from_numpy(pfgm_pp.alphas_cumprod())[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        ours = pfgm_pp.loss(pfgm_pp.PFGMPPKernel(), form, unet, y, form.table[t], z)
        noisy = (abar.sqrt() * y + (1 - abar).sqrt() * z).float()
        theirs = (unet(noisy, t).sample - z).square().flatten(1).mean(1)
    assert torch.allclose(ours.float(), theirs, rtol=1e-3)
    pretraining.DDPM().apply("x", Path("real.npz"), Path("made"), seed=0, log=lambda line: None, **BUDGET)
    pipe = load_pipeline(Path("made"))
    assert type(pipe.scheduler) is DDIMScheduler and pipe.config.null_label == 2 and labels is None


def test_the_bench_is_in_the_catalogue():
    assert isinstance(catalog.bench("pretraining"), Pretraining)
    assert "pretraining" in catalog.card("pfgm-pp").benches
