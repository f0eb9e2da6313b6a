"""The fine-tuning bench, tiny: a network of random weights, random images, fits of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from steersman.benches.finetuning import Continue, Finetuning
from steersman.diffusion import mmd_ddm
from steersman.engine.compare import compare
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.report.blocks import ImageGrid

FACTORY = """
import torch
from diffusers import DDPMScheduler, UNet2DModel
from steersman.diffusion import ClassConditionalPipeline

def pipeline():
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
                       norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=3)
    return ClassConditionalPipeline(unet, DDPMScheduler(beta_end=0.005), null_label=2)

def first_pixels(images):
    return images.flatten(1)[:, :6].double()
"""

MMD = "mmd-ddm:calls=2:steps=2:batch_size=8:validate_every=1:learning_rate=0.001"


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FACTORY)
    rng = np.random.default_rng(0)
    np.savez("real.npz", images=rng.random((90, 8, 8), dtype=np.float32), labels=rng.integers(0, 2, 90))
    return tmp_path


def run(contenders, **arguments):
    defaults = {
        "subject": "mine.py:pipeline",
        "grid": {"calls": [2], "samples": 24, "data": "real.npz"} | arguments.pop("grid", {}),
        "seeds": 1,
    }
    return compare(Finetuning(), contenders=contenders, **(defaults | arguments))


def test_recipes_are_fitted_once_and_sampled_at_every_number_of_calls(world, monkeypatch):
    fits = []
    train = mmd_ddm.MMDFinetuner.train
    monkeypatch.setattr(mmd_ddm.MMDFinetuner, "train", lambda self: (fits.append(self.config.seed), train(self))[1])
    contenders = ["none", MMD, "continue:steps=2:calls=2:batch_size=8", MMD + "+pndm:variant=s-pndm", "real"]
    c = run(contenders, grid={"calls": [2, 3]}, seeds=2, out=world / "run")
    assert not c.failed, [r.error for r in c.failed]
    # The stacked contender has the same recipe: it shares the fit.
    assert len(fits) == 2 and len(set(fits)) == 2
    for row in c.rows:
        assert {"frechet", "kernel", "frechet_pixels", "precision", "recall"} <= set(row.figures)
        assert all(np.isfinite(v) for v in row.figures.values())
    rows = c.select(MMD, seed=None) or [r for r in c.rows if r.contender == MMD]
    assert all(r.figures["fit_s"] > 0 for r in rows)
    # A sampler only changes the sampling, a fit changes the network.
    one = {r.contender: r.figures["frechet"] for r in c.rows if r.seed == 0 and r.setting["calls"] == 3}
    assert len(set(one.values())) == len(contenders)
    blocks = c.bench.exhibits(c)
    grids = [b for b in blocks if isinstance(b, ImageGrid)]
    assert len(grids) == 2 and set(grids[0].images) == set(c.contenders)


def test_contenders_share_noise_and_an_untouched_fit_is_the_given_network(world):
    still = MMD.replace("learning_rate=0.001", "learning_rate=0.0")
    c = run(["none:clip=false", still])
    a, b = (r.figures for r in c.rows)
    assert a["frechet"] == pytest.approx(b["frechet"], rel=1e-4)


def test_a_judge_of_the_users_is_used(world):
    c = run(["none"], grid={"judge": "mine.py:first_pixels"})
    d = run(["none"])
    assert c.rows[0].figures["frechet"] != d.rows[0].figures["frechet"]
    assert c.rows[0].figures["frechet_pixels"] == d.rows[0].figures["frechet_pixels"]


def test_an_artefact_is_a_contender(world):
    from steersman.engine.artefacts import run_verb

    settings = {"calls": 2, "steps": 1, "batch_size": 8, "features": "mine.py:first_pixels"}
    subject = Finetuning().subject("mine.py:pipeline")  # its folder goes when it does
    record = run_verb("apply", "mmd-ddm", str(subject.folder), "tuned", "real.npz", settings)
    assert json.loads(Path("tuned/artefact.json").read_text())["metrics"]["calls"] == 2 == record["metrics"]["calls"]
    assert record["settings"]["features"] == "mine.py:first_pixels"
    c = run(["./tuned", "none"])
    assert [r.status for r in c.rows] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("contenders", "grid", "text"),
    [
        ([f"none+{MMD}"], {}, "one recipe"),
        (["pndm"], {}, "stacked on a recipe"),
        (["real+pndm"], {}, "stacked on a recipe"),
        (["nne"], {}, "did you mean 'none'"),
        (["none:spacing=odd"], {}, "own, leading or trailing"),
        (["continue:steps=0"], {}, "whole number"),
        (["mmd-ddm:cals=3"], {}, "did you mean 'calls'"),
        (["none"], {"samples": 500}, "held-out images, 30"),
        (["none"], {"data": "nowhere"}, "that exists"),
        (["none"], {"data": None}, "real images for this subject"),
    ],
)
def test_what_can_not_be_run_is_refused_first(world, contenders, grid, text):
    with pytest.raises(InputError, match=text):
        run(contenders, grid=grid)


def test_subjects_that_are_no_pipelines_are_refused(world):
    for subject in ("docs", "openai:x", "real.npz"):
        with pytest.raises(InputError, match=r"^subject="):
            Finetuning().subject(subject)


def test_a_sampler_gets_the_most_steps_that_fit_into_the_calls(world):
    c = run(["none+HeunDiscreteScheduler"], grid={"calls": [1, 4]})
    assert [r.status for r in c.rows] == ["ok", "ok"]


def test_training_on_is_repeatable_and_lowers_its_loss(world, tmp_path):
    bench = Finetuning()
    subject = bench.subject("mine.py:pipeline")
    setting = {"data": "real.npz", "judge": None}

    class Log:
        lines: list[str] = []

        def progress(self, done, total, text=""):
            self.lines.append(text)

    weights = []
    for turn in range(2):
        folder = tmp_path / str(turn)
        Continue(steps=40, calls=1, batch_size=8, learning_rate=3e-3).fit(
            subject.folder, bench._data(subject, setting), folder, Streams(0), Log()
        )
        from steersman.diffusion.images import load_pipeline

        weights.append(torch.cat([p.flatten() for p in load_pipeline(folder).unet.parameters()]))
    assert torch.equal(*weights)
    losses = [float(line.rsplit(" ", 1)[1]) for line in Log.lines]
    assert losses[1] < losses[0] - 0.05
