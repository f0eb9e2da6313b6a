"""The reference subject ``digits``: its data, its model and classifiers, and that it is what was recorded."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from sklearn.datasets import load_digits

from steersman.errors import InputError, MissingExtra
from steersman.reference import digits, image_metrics, loading

PACKAGE = Path(__file__).parents[2] / "packages" / "steersman-reference"


@pytest.fixture(scope="module")
def pipe():
    pipeline = digits.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sampled(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    """200 images of DDIM 50, 20 of each class."""
    labels = torch.arange(10).repeat_interleave(20)
    rng = torch.Generator().manual_seed(7)
    return pipe(labels, num_inference_steps=50, generator=rng, output_type="latent").images, labels


# ------------------------------------------------------------------ the data


def test_splits_are_scikit_learns_images_once_each():
    x, y = digits.images("all")
    bunch = load_digits()
    ours = sorted((tuple(row), label) for row, label in zip(x.flatten(1).tolist(), y.tolist(), strict=True))
    theirs = sorted(
        (tuple(row), label) for row, label in zip((bunch.data / 8 - 1).tolist(), bunch.target.tolist(), strict=True)
    )
    assert ours == theirs
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    train, held_out = digits.images("train"), digits.images("held-out")
    assert len(train[0]) == 1200 and len(held_out[0]) == 597
    torch.testing.assert_close(torch.cat([train[0], held_out[0]]), x)


def test_split_is_the_recorded_one():
    assert digits.data_fingerprint() == loading.provenance("digits")["data"]["fingerprint"]


def test_every_class_is_in_both_splits():
    for split, low in (("train", 90), ("held-out", 40)):
        assert digits.images(split)[1].bincount(minlength=10).min() >= low


def test_matched_images_are_training_images_of_those_labels():
    x, y = digits.images("train")
    labels = digits.images("held-out")[1]
    drawn = digits.matched(labels, torch.Generator().manual_seed(0))
    gaps, found = torch.cdist(drawn.flatten(1), x.flatten(1)).min(1)
    assert torch.equal(y[found], labels) and len(found.unique()) == len(labels) and not gaps.any()
    assert not torch.equal(drawn, digits.matched(labels, torch.Generator().manual_seed(1)))


# ------------------------------------------------------------------ the model


def test_samples_are_of_their_class(sampled):
    """Accuracy by both classifiers, within sampling error of the recorded one (and that above 95%)."""
    x, labels = sampled
    recorded = loading.provenance("digits")["quality"]["ddim 50"]
    for which in digits.CLASSIFIERS:
        p = recorded[f"accuracy_{which}"]
        assert p > 0.95
        accuracy = image_metrics.class_accuracy(digits.classifier(which), x, labels)
        assert accuracy > p - 4 * math.sqrt(p * (1 - p) / len(x)) - 1 / len(x)


def test_samples_are_close_to_real_images(sampled):
    """In both feature spaces nearer to the held-out images than half of the classes is."""
    x, _ = sampled
    held_out, y = digits.images("held-out")
    for which in digits.CLASSIFIERS:
        features = digits.classifier(which).features
        real = image_metrics.features(features, held_out)
        figures = image_metrics.feature_metrics(real, image_metrics.features(features, x))
        partial = image_metrics.feature_metrics(real, real[y < 5][:200])
        assert figures["frechet"] < partial["frechet"] / 2
        assert figures["precision"] > 0.6 and figures["recall"] > 0.6


def test_samples_are_not_copies(sampled):
    """A sample is about as far from its nearest training image as a held-out image is."""
    train = digits.images("train")[0].flatten(1)

    def nearest(x: torch.Tensor) -> float:
        return torch.cdist(x.flatten(1), train).min(1).values.median().item()

    assert nearest(sampled[0]) > 0.7 * nearest(digits.images("held-out")[0])


def test_epsilon_is_learned_on_images_it_has_not_seen(pipe):
    """Held-out loss near the training loss, and both near what was recorded."""
    noise = DDIMScheduler.from_config(pipe.scheduler.config)
    recorded = loading.provenance("digits")["training"]["unet"]["epsilon_loss"][-1]
    rng = torch.Generator().manual_seed(0)
    for split, name in (("train", "train"), ("held-out", "held_out")):
        x0, y = (t[:400] for t in digits.images(split))
        t = (torch.arange(400) * 2.5).long()[torch.randperm(400, generator=rng)]
        eps = torch.randn(x0.shape, generator=rng)
        with torch.no_grad():
            out = pipe.unet(noise.add_noise(x0, eps, t), t, class_labels=y).sample
        assert (out - eps).square().mean().item() == pytest.approx(recorded[name], rel=0.25)


def test_the_folder_is_an_ordinary_diffusers_one(pipe):
    folder = loading.path("digits")
    assert folder == loading.path("digits/pipeline") == loading.folder("digits") / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["null_label"] == digits.NULL_LABEL
    assert pipe.unet.dtype == torch.float32 and not pipe.unet.training
    c = pipe.scheduler.config
    assert (c.beta_schedule, c.num_train_timesteps, c.prediction_type) == ("linear", 1000, "epsilon")
    assert not c.clip_sample and c.set_alpha_to_one and c.timestep_spacing == "leading"


# ------------------------------------------------------------------ the classifiers


def test_classifiers_differ_and_recognise_unseen_images():
    x, y = digits.images("held-out")
    a, b = digits.classifier("a"), digits.classifier("b")
    assert a.settings["kind"] != b.settings["kind"]
    assert image_metrics.class_accuracy(a, x, y) > 0.98
    assert image_metrics.class_accuracy(b, x, y) > 0.97
    assert a.features(x).shape == (597, 64) and b.features(x).shape == (597, 48)


@pytest.mark.parametrize("which", ["a", "b"])
def test_features_are_standardised_frozen_and_differentiable(which):
    model = digits.classifier(which)
    x = digits.images("train")[0]
    features = model.features(x)
    torch.testing.assert_close(features.mean(0), torch.zeros(features.shape[1]), rtol=0, atol=0.02)
    torch.testing.assert_close(features.var(0), torch.ones(features.shape[1]), rtol=0, atol=0.03)
    image = x[:2].clone().requires_grad_()
    model.features(image).sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.head(features), model(x))


@pytest.mark.parametrize("which", ["a", "b"])
def test_features_see_more_than_the_class(which):
    """At least 30% of their variance over unseen images lies within classes."""
    x, y = digits.images("held-out")
    features = digits.classifier(which).features(x)
    means = torch.stack([features[y == k].mean(0) for k in range(10)])
    assert (features - means[y]).square().mean() > 0.3 * features.var(0).mean()


@pytest.mark.parametrize("kind", ["convolutional", "perceptron"])
def test_a_classifier_survives_saving(tmp_path, kind):
    model = digits.Classifier(kind, width=4, features=5).eval()
    model.save(tmp_path / "c")
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(digits.Classifier.load(tmp_path / "c")(x), model(x), rtol=0, atol=2e-2)


# ------------------------------------------------------------------ provenance


def test_files_are_the_recorded_ones():
    loading.verify("digits")
    record = loading.provenance("digits")
    on_disk = {
        p.relative_to(loading.folder("digits")).as_posix()
        for p in loading.folder("digits").rglob("*")
        if p.is_file() and p.name != "provenance.json"
    }
    assert set(record["files"]) == on_disk
    assert sum((loading.folder("digits") / f).stat().st_size for f in on_disk) < 20e6
    assert {"script", "data", "seeds", "versions", "training", "quality"} <= set(record)


def test_script_is_the_recorded_one():
    record = loading.provenance("digits")["script"]
    assert hashlib.sha256((PACKAGE / record["file"]).read_bytes()).hexdigest() == record["sha256"]


def test_a_changed_or_missing_file_is_noticed(tmp_path, monkeypatch):
    shutil.copytree(loading.folder("digits"), tmp_path / "digits")
    monkeypatch.setattr(loading, "_root", lambda: tmp_path)
    loading.verify("digits")
    file = tmp_path / "digits" / "classifier-a" / "config.json"
    file.write_text(file.read_text().replace("0.2", "0.1"))
    with pytest.raises(InputError, match=r"classifier-a/config.json"):
        loading.verify("digits")
    file.unlink()
    with pytest.raises(InputError, match="install steersman-reference again"):
        loading.verify("digits")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(loading, "_root", lambda: None)
    assert loading.names() == ["digits", "docs", "gaussians", "leaf-spine", "photographs", "reviews", "scenes"]
    with pytest.raises(MissingExtra, match=r"pip install 'steersman\[reference\]'"):
        digits.pipeline()
    assert loading.path("gaussians") is None


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: digits.images("test"), "split"),
        (lambda: digits.classifier("c"), "which"),
        (lambda: digits.matched(torch.zeros(200, dtype=torch.long)), "labels"),
        (lambda: digits.matched(torch.tensor([10])), "labels"),
        (lambda: digits.Classifier("linear", 4, 4), "kind"),
        (lambda: digits.classifier("a").features(torch.zeros(2, 64)), "x"),
        (lambda: loading.path("digit"), "subject"),
        (lambda: loading.path("digits/nothing"), "subject"),
        (lambda: loading.path("digits/../docs"), "subject"),
        (lambda: loading.path("gaussians/ring"), "subject"),
        (lambda: loading.folder("gaussians"), "subject"),
    ],
)
def test_refuses(call, named):
    with pytest.raises(InputError, match=rf"^{named}="):
        call()
