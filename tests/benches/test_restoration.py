"""The restoration bench, tiny: networks of a few channels, trained for a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from steersman.benches import restoration
from steersman.benches._classical_restorers import biharmonic, tv, wiener
from steersman.benches.restoration import Restoration, law_figures, psnr, ssim
from steersman.diffusion.rddm import Pairs
from steersman.diffusion.rddm import artefact as rddm_artefact
from steersman.engine.artefacts import run_verb
from steersman.engine.compare import compare
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.reference import loading, photographs
from steersman.report.blocks import ImageGrid, Note

BUDGET = {"steps": 2, "batch_size": 2, "width": 4, "crop": 12, "pairs": 8, "samples": 3, "draws": 2}


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(6):
        for name in ("target", "input"):
            Path("pairs", name).mkdir(parents=True, exist_ok=True)
            size = (20, 16) if i % 2 else (16, 28)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"pairs/{name}/{i}.png")
    np.savez("images.npz", images=rng.random((9, 16, 16, 3), dtype=np.float32))
    return tmp_path


def run(contenders, subject="photographs", **arguments):
    grid = {"calls": [2], **BUDGET} | arguments.pop("grid", {})
    return compare(Restoration(), contenders=contenders, subject=subject, grid=grid, **({"seeds": 1} | arguments))


# ------------------------------------------------------------------ the photographs


def test_held_out_pixels_are_not_in_the_training_part():
    train, held_out = photographs.region("train"), photographs.region("held-out")
    assert [x.shape[-1] for x in held_out] == [104, 104] and [x.shape[-1] for x in train] == [120, 80, 120, 80]
    whole = photographs.photographs()[0]
    assert torch.equal(whole[..., 128:232], held_out[0]) and torch.equal(whole[..., :120], train[0])
    assert len(photographs.fingerprint()) == 64 == len(loading.fingerprint("photographs"))


@pytest.mark.parametrize("task", photographs.TASKS)
def test_every_damage_is_what_it_says(task):
    images = photographs.region("train")
    places = photographs.random_places(images, 24, 40, torch.Generator().manual_seed(0), 0.05)
    g = torch.Generator().manual_seed(1)
    target, x, mask = photographs.degraded(task, images, places, 24, g)
    assert target.shape == x.shape == (40, 3, 24, 24) and x.min() >= 0 and x.max() <= 1
    assert (target - target.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt().min() >= 0.05 - 1e-6
    inside = (target > 0.3) & (target < 0.7)
    if task == "denoising":
        noise = (x - target)[inside & (x > 0) & (x < 1)]
        assert 0.15 < noise.std() < 0.21
    elif task == "deblurring":
        i, r, c = places[0]
        sharp = torch.nn.functional.conv2d(
            torch.nn.functional.pad(images[i][:, None], (5, 5, 5, 5), mode="reflect"),
            photographs.blur_kernel()[None, None],
        )[:, 0, r : r + 24, c : c + 24]
        assert photographs.blur_kernel().sum() == pytest.approx(1) and (x[0] - sharp).abs().max() < 0.06
    elif task == "inpainting":
        assert mask is not None and mask.mean() == 0.25 and (x[..., 6:18, 6:18] == 0.5).all()
        assert torch.equal(x * (1 - mask), target * (1 - mask))
    elif task == "low-light":
        dark = (x - 0.25 * target**1.5)[target > 0.5]
        assert abs(dark.mean()) < 0.002 and 0.018 < dark.std() < 0.022
    else:
        assert (x >= target - 1e-6).all() and 0.05 < ((x - target) > 0.01).float().mean() < 0.3


def test_crops_do_not_overlap_and_are_the_same_for_all(world):
    bench, streams = Restoration(), Streams(3)
    s = bench.subject("photographs")
    tiles = photographs.tiled_places(s.held_out, 24, s.least)
    assert len(set(tiles)) == len(tiles) >= 32 and all(y % 24 == 0 == x % 24 for _, y, x in tiles)
    setting = {"crop": 24, "pairs": 5, "samples": 6, "task": "denoising"}
    a, b = (bench.crops(s, setting, "held-out", streams) for _ in range(2))
    assert torch.equal(a.input, b.input) and len(a.target) == 6
    with pytest.raises(InputError, match="images"):
        photographs.random_places([torch.zeros(3, 20, 20)], 8, 1, torch.Generator(), 0.05)


# ------------------------------------------------------------------ the figures


def test_the_figures_of_a_known_law():
    """Truth N(c, 1) given the input: draws of it, its mean, and draws twice as wide."""
    g = torch.Generator().manual_seed(0)
    n, k, d = 400, 8, 4

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    center = normal(n, 1, 1, d)
    y, where = center + normal(n, 1, 1, d), torch.ones(1, 1, d, dtype=torch.bool)
    found = {
        name: law_figures(x, y, where)
        for name, x in {
            "law": center + normal(k, n, 1, 1, d),
            "mean": center.expand(k, n, 1, 1, d),
            "wide": center + 2 * normal(k, n, 1, 1, d),
        }.items()
    }
    assert found["law"]["variance_share"] == pytest.approx(1, abs=0.1) and found["mean"]["variance_share"] == 0
    assert found["law"]["energy_score"] < min(found["mean"]["energy_score"], found["wide"]["energy_score"])
    # The energy score of N(0, I_4): E|X - y| - E|X - X'|/2 = E|X - X'|/2 = Γ(5/2)/Γ(2), per square root of 4.
    assert found["law"]["energy_score"] == pytest.approx(1.3293 / 2, rel=0.05)
    assert abs(found["law"]["energy_distance"]) < 0.01 < found["mean"]["energy_distance"]


def test_psnr_and_ssim_are_the_usual_ones():
    g = torch.Generator().manual_seed(0)
    y = torch.rand(2, 3, 16, 16, generator=g)
    x = (y + 0.1).clamp(0, 1)
    wanted = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0) for a, b in zip(x, y, strict=True)]
    assert psnr(x[None], y).tolist() == pytest.approx(wanted, rel=1e-5)
    assert psnr(torch.stack([x, y]), y)[0] == pytest.approx((wanted[0] + 100) / 2, rel=1e-5)
    assert ssim(y[None], y) == 1.0 and ssim(x[None], y) < 1


def test_classical_restorers_help_where_they_fit():
    images = photographs.region("held-out")
    places = photographs.tiled_places(images, 24, 0.05)[:12]
    for task, part in (("denoising", tv()), ("deblurring", wiener()), ("inpainting", biharmonic())):
        crops = restoration.Crops(*photographs.degraded(task, images, places, 24, torch.Generator().manual_seed(0)))
        out = part.on(crops.input, crops.mask, part.chosen(crops.target, crops.input, crops.mask))
        assert psnr(out[None], crops.target).mean() > psnr(crops.input[None], crops.target).mean() + 0.5, task
    assert tv(0.07).chosen(crops.target, crops.input, crops.mask) == 0.07


# ------------------------------------------------------------------ trials


def test_recipes_are_trained_once_for_all_settings(world, monkeypatch):
    fits = []
    train = rddm_artefact.train_rddm
    monkeypatch.setattr(
        rddm_artefact, "train_rddm", lambda p, **k: (fits.append((k["prediction_type"], k["seed"])), train(p, **k))[1]
    )
    contenders = [
        "identity",
        "biharmonic",
        "regression",
        "ddpm",
        "ddpm:average=2:eta=1:predicts=residual",
        "rddm",
        "rddm:eta=1",
    ]
    contenders += ["rddm:prediction_type=res_noise:nets=2"]
    c = run(contenders, grid={"calls": [1, 3], "task": ["inpainting"]}, out=world / "run")
    assert not c.failed, [r.error for r in c.failed]
    # Settings of the sampler share a training.
    assert len(fits) == 2 and len({seed for _, seed in fits}) == 1
    for row in c.rows:
        assert {"psnr", "ssim", "energy_score", "variance_share", "network_calls"} <= set(row.figures)
        assert all(np.isfinite(v) for v in row.figures.values()) and len(row.per_item["psnr"]) == 3
    calls = {r.contender: r.figures["network_calls"] for r in c.select(calls=3)}
    assert [calls[name] for name in contenders] == [0, 0, 1, 3, 6, 3, 3, 3]
    sizes = {r.contender: r.figures["parameters"] for r in c.select(calls=3)}
    assert sizes["ddpm"] == sizes["rddm"] == pytest.approx(sizes["regression"], rel=0.05)
    assert all(r.figures["variance_share"] == 0 for r in c.select("regression") + c.select("identity"))
    blocks = c.bench.exhibits(c)
    assert isinstance(blocks[0], Note) and "steps 2" in blocks[0].text
    grids = [b for b in blocks if isinstance(b, ImageGrid)]
    assert len(grids) == 2 and set(grids[0].images) == {"truth", *contenders}


def test_two_networks_have_together_about_the_parameters_of_one():
    for width in (16, 32):
        narrow = restoration._shared_width(width, 2)
        assert narrow % 4 == 0 and 0.6 * width <= narrow <= 0.8 * width


def test_pairs_and_images_of_the_users_and_what_was_made_of_them(world):
    run_verb("apply", "rddm", "pairs", "made", None, {"steps": 1, "width": 4, "crop": 8, "batch_size": 2})
    c = run(["identity", "./made", "./made:eta=1", "regression"], "pairs", grid={"samples": 2})
    assert [r.status for r in c.rows] == ["ok"] * 4, [r.error for r in c.rows]
    s = Restoration().subject("pairs")
    assert isinstance(s.train, Pairs) and (len(s.train), len(s.held_out)) == (4, 2)
    c = run(["identity", "tv", "rddm"], "images.npz", grid={"task": ["rain"]})
    assert [r.status for r in c.rows] == ["ok"] * 3, [r.error for r in c.rows]


def test_paths_of_networks_that_are_told_levels(world):
    both = "rddm:prediction_type=res_noise:nets=2:condition=levels"
    c = run([both, f"{both}:path=residual_first", f"{both}:path=noise_first"], grid={"calls": [1, 4]})
    assert not c.failed, [r.error for r in c.failed]
    assert len({r.figures["psnr"] for r in c.select(calls=4)}) == 3
    assert [r.status for r in c.select(calls=1, status=None)] == ["ok", "inapplicable", "inapplicable"]


def test_a_contender_that_does_not_fit_the_task_is_inapplicable(world):
    c = run(["wiener", "gamma", "biharmonic", "rddm:path=residual_first"])
    assert [r.status for r in c.rows] == ["inapplicable"] * 3 + ["failed"]
    assert "is for deblurring" in str(c.rows[0].error) and "no mask" in str(c.rows[2].error)
    assert "condition" in str(c.rows[3].error)


@pytest.mark.parametrize(
    ("contenders", "grid", "text"),
    [
        (["identity+rddm"], {}, "one restorer"),
        (["rdm"], {}, "did you mean 'rddm'"),
        (["rddm:steps=5"], {}, "the same for all contenders"),
        (["rddm:predictiontype=res"], {}, "one of"),
        (["rddm:eta=2"], {}, "eta"),
        (["rddm:path=straight"], {}, "path"),
        (["tv:weight=0"], {}, "weight"),
        (["wiener:balance=-1"], {}, "balance"),
        (["ddpm:average=0"], {}, "average"),
        (["regression:residual=2"], {}, "residual"),
        (["ddpm:predicts=noise"], {}, "predicts"),
        (["ddpm:eta=-1"], {}, "eta"),
        (["regression:loss=l3"], {}, "loss"),
        (["pfgm-pp"], {}, "a method of the bench restoration"),
        (["identity"], {"samples": 10_000}, "held-out crops"),
        (["identity"], {"crop": 200}, "shortest side"),
        (["identity"], {"width": 6}, "multiple of 4"),
        (["identity"], {"task": ["fog"]}, "task"),
        (["identity"], {"draws": 1}, "draws"),
    ],
)
def test_what_can_not_be_run_is_refused_first(world, contenders, grid, text):
    with pytest.raises(InputError, match=text):
        run(contenders, grid=grid)


def test_subjects_that_are_no_images_are_refused(world):
    Path("few/target").mkdir(parents=True)
    Path("few/input").mkdir()
    for name in ("few/target/a.png", "few/input/a.png"):
        Image.new("RGB", (16, 16)).save(name)
    for subject in ("docs", "openai:x", "digits", "few"):
        with pytest.raises(InputError, match=r"^subject="):
            Restoration().subject(subject)


def test_the_photographs_are_a_subject_of_apply(world):
    record = run_verb("apply", "rddm", "photographs:rain", "made", None, {"steps": 1, "width": 4, "batch_size": 1})
    assert record["metrics"]["pairs"] == 2000
