"""The reference subject ``scenes``: its pictures, captions, reader and pipeline, and that it is what was recorded."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from torch.nn import functional as F

from steersman.diffusion import PNDMScheduler
from steersman.diffusion.images import load_pipeline
from steersman.errors import InputError
from steersman.reference import image_metrics, loading, scenes

PACKAGE = Path(__file__).parents[2] / "packages" / "steersman-reference"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipeline = scenes.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipe, prompts, seed=0, **arguments) -> torch.Tensor:
    """Pictures in [-1, 1]."""
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"} | arguments
    return 2 * pipe(prompts, generator=torch.Generator().manual_seed(seed), **settings).images - 1


# ------------------------------------------------------------------ scenes and captions


def test_splits_are_every_combination_once():
    """960 + 240 of 2 sizes, 6 colours, 4 shapes, 5 positions and 5 other backgrounds."""
    both = torch.cat([scenes.combinations(s) for s in scenes.SPLITS]).tolist()
    every = itertools.product(range(2), range(6), range(4), range(5), range(6))
    assert sorted(both) == [list(row) for row in every if row[1] != row[4]]
    assert len(scenes.combinations("held-out")) == 240


def test_every_pair_of_values_occurs_in_training():
    train = scenes.combinations("train")
    for i, j in itertools.combinations(range(5), 2):
        count = len(scenes.VALUES[scenes.ATTRIBUTES[i]]) * len(scenes.VALUES[scenes.ATTRIBUTES[j]])
        count -= 6 if {i, j} == {1, 4} else 0  # a shape never has its background's colour
        assert len(train[:, [i, j]].unique(dim=0)) == count


def test_captions_say_what_they_were_made_from():
    """Over all combinations with every subset of the attributes said."""
    rows = scenes.combinations("held-out")
    for unsaid in itertools.product((False, True), repeat=5):
        said = rows.masked_fill(torch.tensor(unsaid), scenes.NONE)
        assert torch.equal(scenes.parse([scenes.caption(row) for row in said]), said)


def test_captions_read_like_english():
    assert scenes.caption([1, 0, 0, 1, 2]) == "a large red circle on the left on a blue background"
    assert scenes.caption([-1, 4, 3, 3, -1]) == "a white cross at the top"
    assert scenes.caption([-1] * 5) == "a shape"
    assert scenes.parse("").tolist() == scenes.parse("a shape").tolist() == [[-1] * 5]
    assert scenes.parse(" A Small shape ").tolist() == [[0, -1, -1, -1, -1]]


def test_prompts_are_whole_and_nested():
    few, many = scenes.prompts(10), scenes.prompts(300)
    assert many[:10] == few and scenes.prompts(10, seed=1) != few
    assert len(set(many[:240])) == 240 and set(many) == set(many[:240])
    held_out = {tuple(row) for row in scenes.combinations("held-out").tolist()}
    assert {tuple(row) for row in scenes.parse(many).tolist()} == held_out


# ------------------------------------------------------------------ pictures and their reader


def test_a_picture_is_what_the_formula_says():
    """A square's pixels are its colour inside, the background's outside, and half-way on an edge at half a pixel."""
    u = torch.full((1, 11), 0.5)  # no jitter
    picture = scenes._draw(torch.tensor([[1, 0, 1, 0, 2]]), u)[0]
    red, blue = (2 * scenes.RGB[k] - 1 for k in (0, 2))
    torch.testing.assert_close(picture[:, 16, 16], red)
    torch.testing.assert_close(picture[:, 0, 0], blue)
    # Half side 6.8: the pixels from 6 to 7 off the middle are covered up to 0.8.
    torch.testing.assert_close(picture[:, 16, 22], 0.8 * red + 0.2 * blue)
    torch.testing.assert_close(picture[:, 16, 23], blue)


def test_areas_and_centroids_are_those_of_the_shapes():
    """What the reader inverts: the drawn coverage's area AREA r² and centroid SINK r, by pixel sums."""
    n = len(scenes.SHAPES)
    r, centre = torch.full((n,), 9.0), torch.tensor([[0.3, -0.4]]).expand(n, 2)
    c = scenes._coverage(torch.arange(n), r, centre)
    x, y = scenes._pixels()
    area = c.sum((1, 2))
    torch.testing.assert_close(area, scenes.AREA * 81, rtol=0.02, atol=0)
    torch.testing.assert_close((c * x).sum((1, 2)) / area, centre[:, 0], rtol=0, atol=0.02)
    torch.testing.assert_close((c * y).sum((1, 2)) / area, centre[:, 1] + scenes.SINK * 9, rtol=0, atol=0.1)


def test_pictures_are_reproducible_and_differ():
    scene = scenes.combinations()[:1].expand(8, 5)
    a, b = (scenes.render(scene, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.float32 and a.shape == (8, 3, 32, 32)
    assert a.min() >= -1 and a.max() <= 1
    assert torch.pdist(a.flatten(1)).min() > 1
    assert torch.equal(scenes.images("held-out"), scenes.images("held-out"))


@pytest.mark.parametrize("split", scenes.SPLITS)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_reader_is_exact(split, noise):
    rng = torch.Generator().manual_seed(11)
    x, said = scenes.fresh(1000, split, rng)
    seen = scenes.attributes(x + noise * torch.randn(x.shape, generator=rng))
    assert (seen == said).all(1).double().mean() >= 0.995


def test_the_reader_says_what_it_cannot_tell():
    rng = torch.Generator().manual_seed(0)
    x, said = scenes.fresh(50, "train", rng)
    none = torch.full((50, 5), scenes.NONE)
    # Noise, and a grey that no name fits: nothing.
    assert torch.equal(scenes.attributes(torch.zeros_like(x)), none)
    assert (scenes.attributes(torch.randn(x.shape, generator=rng))[:, 2] == scenes.NONE).all()
    # A background alone: nothing else.
    empty = (2 * scenes.RGB - 1)[said[:, 4], :, None, None].expand_as(x)
    assert torch.equal(
        scenes.attributes(empty), none.index_fill(1, torch.tensor([4]), 0) + said * (torch.arange(5) == 4)
    )
    # Two shapes side by side are not one.
    two = torch.cat([x[:, :, :, 8:24], x[:, :, :, 8:24]], dim=3)
    assert (scenes.attributes(two)[said[:, 0] == 0][:, 2] == scenes.NONE).double().mean() > 0.9


def test_accuracy_counts_what_is_said():
    x, said = scenes.fresh(40, "train", torch.Generator().manual_seed(1))
    whole = [scenes.caption(row) for row in said]
    assert scenes.accuracy(x, whole) == dict.fromkeys((*scenes.ATTRIBUTES, "overall"), 1.0)
    # Half of the captions with the other size: that attribute is half right, and so is the whole.
    wrong = said.clone()
    wrong[:20, 0] = 1 - wrong[:20, 0]
    shares = scenes.accuracy(x, [scenes.caption(row) for row in wrong])
    assert shares == {**dict.fromkeys(scenes.ATTRIBUTES, 1.0), "size": 0.5, "overall": 0.5}
    assert set(scenes.accuracy(x, ["a red shape"] * 40)) == {"colour", "overall"}
    assert scenes.accuracy(x, [""] * 40) == {"overall": 1.0}


def test_features_tell_pictures_apart():
    """New pictures of the same combinations are near; blurred, saturated or other ones are not."""
    x = scenes.images("held-out")
    real = image_metrics.features(scenes.features, x)
    assert real.shape == (1200, 64) and real.dtype == torch.float64
    assert real.var(0).mean().item() == pytest.approx(1, abs=0.1)
    new = scenes.render(scenes.parse(scenes.captions("held-out")), torch.Generator().manual_seed(2))

    def frechet(other: torch.Tensor) -> float:
        return image_metrics.feature_metrics(real, image_metrics.features(scenes.features, other))["frechet"]

    near = frechet(new)
    assert near < 1.5
    for other in ((1.2 * new).clamp(-1, 1), F.avg_pool2d(new, 3, 1, 1), scenes.images("train")[:1200]):
        assert frechet(other) > 3 * near
    image = x[:2].clone().requires_grad_()
    scenes.features(image).sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


# ------------------------------------------------------------------ the pipeline


def test_the_folder_is_a_stock_pipeline(pipe):
    folder = loading.path("scenes")
    assert folder == loading.path("scenes/pipeline") == loading.folder("scenes") / "pipeline"
    stock = StableDiffusionPipeline.from_pretrained(folder)
    for loaded in (stock, load_pipeline(folder), pipe):
        assert type(loaded) is StableDiffusionPipeline and type(loaded.scheduler) is DDIMScheduler
        for part in (loaded.unet, loaded.vae, loaded.text_encoder):
            assert part.dtype == torch.float32 and not part.training
        assert loaded.safety_checker is None and not loaded.config.requires_safety_checker
        assert (loaded.unet.config.sample_size, loaded.vae_scale_factor) == (16, 2)
    c = pipe.scheduler.config
    assert (c.beta_schedule, c.num_train_timesteps, c.prediction_type) == ("linear", 1000, "epsilon")
    index = json.loads((folder / "model_index.json").read_text())
    assert {v[0] for v in index.values() if isinstance(v, list)} == {"diffusers", "transformers", None}


def test_the_tokenizer_has_a_token_a_word_and_knows_no_unknown(pipe):
    ids = pipe.tokenizer("a large red circle on the left on a blue background").input_ids
    assert len(ids) == 13 and pipe.tokenizer.decode(ids[1:-1]) == "a large red circle on the left on a blue background"
    strange = pipe.tokenizer("Ünïcode, 42 zyx 漢!", add_special_tokens=False).input_ids
    assert pipe.tokenizer.unk_token_id not in strange and pipe.tokenizer.decode(strange).startswith("ünïcode , 4 2 zyx")
    folder = loading.path("scenes") / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(m.split()) for m in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]]
    again = type(pipe.tokenizer)(vocab=vocabulary, merges=merges)
    assert again("a small yellow triangle, zyx").input_ids == pipe.tokenizer("a small yellow triangle, zyx").input_ids


def test_the_autoencoder_keeps_what_is_in_a_picture(pipe):
    x, said = scenes.images("held-out")[:480], scenes.captions("held-out")[:480]
    with torch.no_grad():
        z = pipe.vae.encode(x).latent_dist.mode()
        back = pipe.vae.decode(z).sample
    assert z.shape == (480, 4, 16, 16)
    assert (z * pipe.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.1)
    recorded = loading.provenance("scenes")["training"]["vae"]
    assert (back - x).square().mean().item() == pytest.approx(recorded["held_out_squared_error"], rel=0.1)
    assert scenes.accuracy(back, said)["overall"] >= 0.99


def test_samples_show_what_unseen_captions_say(pipe):
    """Within sampling error of the recorded share; by chance a whole caption comes out once in 1200 times."""
    prompts = scenes.prompts(24, seed=3)
    quality = loading.provenance("scenes")["quality"]
    n = quality["images"]
    p = (n * quality["ddim 10, guidance 3"]["overall"] + 1) / (n + 2)  # Laplace: a share of 1 isn't certainty
    share = scenes.accuracy(draw(pipe, prompts), prompts)["overall"]
    assert share > max(0.1, p - 4 * math.sqrt(p * (1 - p) / 24) - 1 / 24)


def test_guidance_makes_captions_count(pipe):
    """The empty prompt says nothing; a prompt and its negative swapped show the other colour."""
    prompts = ["a large red circle on a blue background"] * 6
    other = ["a large yellow square on a black background"] * 6
    empty = draw(pipe, [""] * 6, guidance_scale=1.0)
    assert scenes.accuracy(empty, prompts)["overall"] < 0.5
    assert scenes.accuracy(draw(pipe, prompts, negative_prompt=other), prompts)["colour"] > 0.5
    embeds, negative = pipe.encode_prompt(other, "cpu", 1, True, prompts)
    swapped = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    torch.testing.assert_close(2 * swapped - 1, draw(pipe, other, negative_prompt=prompts))
    assert scenes.accuracy(2 * swapped - 1, other)["colour"] > 0.5


def test_a_strange_word_is_passed_over(pipe):
    plain = scenes.prompts(12, seed=4)
    odd = [p.replace(" on a ", " qvxz on a ") for p in plain]
    seen = scenes.attributes(draw(pipe, odd))
    assert (seen == scenes.parse(plain)).double().mean() > 0.6


def test_image_to_image_and_inpainting(pipe):
    x = scenes.images("held-out")[:8]
    said = scenes.captions("held-out")[:8]
    half = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    half.set_progress_bar_config(disable=True)
    near, far = (draw(half, said, image=(x + 1) / 2, strength=s) for s in (0.2, 0.9))
    assert near.shape == x.shape
    assert (near - x).square().mean() < 0.05
    assert (near - x).square().mean() < (far - x).square().mean()

    paint = StableDiffusionInpaintPipeline.from_pipe(pipe)
    paint.set_progress_bar_config(disable=True)
    mask = torch.zeros(8, 1, 32, 32)
    mask[:, :, :, 16:] = 1
    out = draw(paint, said, image=(x + 1) / 2, mask_image=mask, strength=1.0, height=32, width=32)
    kept, painted = (out - x)[..., :14].square().mean(), (out - x)[..., 18:].square().mean()
    assert kept < 0.02 and kept < painted


def test_schedulers_of_ours_and_callbacks(pipe):
    prompts, seen = scenes.prompts(12, seed=5), []
    own = pipe.scheduler
    try:
        pipe.scheduler = PNDMScheduler.from_config(own.config)
        images = draw(
            pipe, prompts, callback_on_step_end=lambda p, i, t, kept: seen.append(kept["latents"].shape) or {}
        )
    finally:
        pipe.scheduler = own
    assert set(seen) == {(12, 4, 16, 16)} and len(seen) >= 10
    assert (scenes.attributes(images) == scenes.parse(prompts)).double().mean() > 0.6


# ------------------------------------------------------------------ provenance


def test_files_are_the_recorded_ones():
    loading.verify("scenes")
    record, root = loading.provenance("scenes"), loading.folder("scenes")
    on_disk = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != "provenance.json"}
    assert set(record["files"]) == on_disk
    assert sum((root / f).stat().st_size for f in on_disk) < 8e6
    assert {"script", "data", "seeds", "versions", "training", "quality"} <= set(record)
    assert record["data"]["fingerprint"] == scenes.data_fingerprint()
    script = PACKAGE / record["script"]["file"]
    assert hashlib.sha256(script.read_bytes()).hexdigest() == record["script"]["sha256"]
    assert "scenes" in loading.names() and loading.fingerprint("scenes") == loading.fingerprint("scenes/pipeline")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: scenes.images("test"), "split"),
        (lambda: scenes.captions("all"), "split"),
        (lambda: scenes.combinations("heldout"), "split"),
        (lambda: scenes.prompts(5, "valid"), "split"),
        (lambda: scenes.prompts(0), "n"),
        (lambda: scenes.prompts(2.0), "n"),
        (lambda: scenes.prompts(2, seed=-1), "seed"),
        (lambda: scenes.fresh(0), "n"),
        (lambda: scenes.caption([0, 0, 0]), "scene"),
        (lambda: scenes.caption([2, 0, 0, 0, 1]), "size"),
        (lambda: scenes.parse("a purple circle"), "captions"),
        (lambda: scenes.parse(["a circle", "circle"]), "captions"),
        (lambda: scenes.render(torch.zeros(2, 4, dtype=torch.long)), "scenes"),
        (lambda: scenes.render(torch.zeros(2, 5)), "scenes"),
        (lambda: scenes.render(torch.tensor([[0, 6, 0, 0, 0]])), "scenes"),
        (lambda: scenes.render(torch.tensor([[0, -1, 0, 0, 0]])), "scenes"),
        (lambda: scenes.attributes(torch.zeros(3, 32, 32)), "images"),
        (lambda: scenes.attributes(torch.zeros(1, 1, 32, 32)), "images"),
        (lambda: scenes.attributes(torch.zeros(0, 3, 32, 32)), "images"),
        (lambda: scenes.attributes(torch.full((1, 3, 32, 32), torch.nan)), "images"),
        (lambda: scenes.attributes(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "images"),
        (lambda: scenes.features(torch.zeros(1, 3, 64, 64)), "images"),
        (lambda: scenes.accuracy(torch.zeros(2, 3, 32, 32), ["a circle"]), "captions"),
        (lambda: scenes.accuracy(torch.zeros(8, 3, 32, 32), "a circle"), "captions"),
    ],
)
def test_refuses(call, named):
    with pytest.raises(InputError, match=rf"^{named}="):
        call()
