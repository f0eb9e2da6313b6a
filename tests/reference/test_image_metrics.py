"""Figures of images, against closed forms, scikit-learn and diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from sklearn.decomposition import PCA

from steersman.errors import InputError
from steersman.reference import digits, gaussians_model
from steersman.reference import image_metrics as im


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return shift + torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------ features


def test_pixel_components_are_those_of_scikit_learn():
    x, _ = digits.images("train")
    ours = im.PixelPCA(x, 20)(x).numpy()
    peer = PCA(20, whiten=True, svd_solver="full").fit_transform(x.flatten(1).double().numpy())
    np.testing.assert_allclose(np.abs(ours), np.abs(peer), atol=1e-8)  # a component's sign is free
    np.testing.assert_allclose(np.cov(ours.T), np.eye(20), atol=1e-10)


def test_features_come_in_batches_in_order():
    x, _ = digits.images("held-out")
    pca = im.PixelPCA(x, 5)
    torch.testing.assert_close(im.features(pca, x, batch=100), pca(x), rtol=0, atol=1e-12)


# ------------------------------------------------------------------ distances


def test_figures_of_a_known_shift():
    """Normal laws c apart in each of d features: Frechet d c², kernel by the moments of g = <a, b>/d."""
    d, c, n, draws = 4, 0.5, 250, 60

    def expected_kernel(p: float, q: float) -> float:
        """E(1 + <a + p, b + q>/d)³ for a, b standard normal; a term (a_i + p)(b_i + q) has mean pq, variance
        1 + p² + q² and third central moment 6pq."""
        mean, variance, third = p * q, (1 + p**2 + q**2) / d, 6 * p * q / d**2
        return (1 + mean) ** 3 + 3 * (1 + mean) * variance + third

    rows = [im.feature_metrics(normal(n, d, 2 * i), normal(n, d, 2 * i + 1, c)) for i in range(draws)]
    kernel = torch.tensor([row["kernel"] for row in rows])
    exact = expected_kernel(0, 0) + expected_kernel(c, c) - 2 * expected_kernel(0, c)
    assert abs(kernel.mean() - exact) < 4 * kernel.std() / math.sqrt(draws)
    frechet = torch.tensor([row["frechet"] for row in rows])
    # The plug-in estimate lies above: the means alone add 2d/n, the covariances about d(d+1)/(4n).
    bias = 2 * d / n + d * (d + 1) / (4 * n)
    assert abs(frechet.mean() - d * c**2 - bias) < 4 * frechet.std() / math.sqrt(draws)


def test_same_law_scores_at_the_floor():
    x = normal(900, 6, 2)
    floor = im.floor(x, 300, generator=torch.Generator().manual_seed(0))
    figures = im.feature_metrics(normal(300, 6, 3), normal(300, 6, 4))
    assert figures["frechet"] == pytest.approx(floor["frechet"], rel=0.5)
    assert abs(figures["kernel"]) < 0.05 and abs(floor["kernel"]) < 0.05
    assert floor["precision"] > 0.85 and floor["recall"] > 0.85
    assert im.feature_metrics(x, x)["frechet"] == pytest.approx(0, abs=1e-10)


def test_frechet_floor_of_real_digits():
    """Real against real is the floor: small, and far below what noise or a dropped class scores."""
    real = im.features(digits.classifier("b").features, digits.images("held-out")[0])
    other, labels = digits.images("train")
    train = im.features(digits.classifier("b").features, other)
    # Features are standardised over the training images.
    torch.testing.assert_close(train.mean(0), torch.zeros(48, dtype=torch.float64), rtol=0, atol=0.02)
    torch.testing.assert_close(train.var(0), torch.ones(48, dtype=torch.float64), rtol=0, atol=0.03)
    n = len(real)
    floor = im.feature_metrics(real, train[:n])
    dropped = im.feature_metrics(real, train[labels != 3][:n])
    noise = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    worst = im.feature_metrics(real, im.features(digits.classifier("b").features, noise))
    assert floor["frechet"] < 1.5 < dropped["frechet"] < worst["frechet"]
    assert floor["precision"] > 0.8 and floor["recall"] > 0.8
    assert dropped["recall"] < floor["recall"] and worst["precision"] < floor["precision"] / 2


def test_class_accuracy_counts():
    logits = torch.eye(4)
    assert im.class_accuracy(lambda x: logits, torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])) == 0.75


# ------------------------------------------------------------------ the model's own trajectory


def ring():
    """The exact network on 200 training times, with five times the usual betas."""
    pipe = gaussians_model.pipeline("gaussians:ring", num_train_timesteps=200, beta_start=5e-4, beta_end=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_trajectory_is_ddim_at_every_training_time():
    pipe = ring()
    start = torch.randn(20, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    own = pipe.scheduler
    end = im.trajectory(pipe, start)
    assert pipe.scheduler is own and isinstance(own, DDIMScheduler)
    stock = pipe(latents=start, num_inference_steps=200, output_type="latent").images
    assert im.endpoint_error(end, stock) < 1e-4
    coarse = [
        im.endpoint_error(pipe(latents=start, num_inference_steps=n, output_type="latent").images, end)
        for n in (10, 40)
    ]
    assert coarse[1] < coarse[0] / 2


def test_trajectory_from_a_lower_start_is_another_one():
    pipe = ring()
    start = torch.randn(20, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    low = im.trajectory(pipe, start, start=160, stride=2)
    five = pipe(latents=start, num_inference_steps=5, output_type="latent").images  # leading spacing: from 160
    same, other = im.endpoint_error(five, low), im.endpoint_error(five, im.trajectory(pipe, start))
    assert 0 < same < other


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: im.PixelPCA(torch.zeros(5, 4)), "images"),
        (lambda: im.PixelPCA(torch.zeros(5, 1, 2, 2)), "components"),
        (lambda: im.PixelPCA(torch.randn(9, 1, 2, 2), 5), "components"),
        (lambda: im.PixelPCA(torch.randn(9, 1, 2, 2), 2)(torch.zeros(3, 1, 4, 4)), "images"),
        (lambda: im.features(lambda x: x.flatten(1), torch.full((2, 1, 2, 2), math.nan)), "images"),
        (lambda: im.floor(torch.randn(10, 2), 6), "count"),
        (lambda: im.feature_metrics(torch.randn(9, 2), torch.randn(3, 2)), "fake"),
        (lambda: im.class_accuracy(lambda x: x, torch.zeros(2, 3), torch.zeros(3)), "labels"),
        (lambda: im.endpoint_error(torch.zeros(2, 3), torch.zeros(2, 2)), "x"),
        (lambda: im.trajectory(gaussians_model.pipeline(), torch.zeros(1, 2, 1, 1), start=1000), "start"),
        (lambda: im.trajectory(gaussians_model.pipeline(), torch.zeros(1, 2, 1, 1), stride=0), "stride"),
    ],
)
def test_refuses(call, named):
    with pytest.raises(InputError, match=rf"^{named}="):
        call()


def test_mixture_ratio_counts_images_with_two_likely_classes():
    p = torch.tensor([[0.98, 0.01, 0.01], [0.5, 0.3, 0.2], [0.78, 0.21, 0.01], [0.81, 0.19, 0.0]])
    images = torch.arange(4.0)[:, None, None, None]
    assert im.mixture_ratio(lambda x: p[x.flatten().long()].log(), images) == 0.5
    with pytest.raises(InputError, match=r"threshold=0\.6"):
        im.mixture_ratio(lambda x: x.flatten(1), images, 0.6)


def test_novelty_tells_copies_repeats_and_new_points():
    bank = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    samples = torch.tensor([[0.0, 0.0], [0.0, 0.1], [4.0, 1.0], [2.0, 2.0]])
    found = im.novelty(samples, bank)
    assert found["nearest"] == pytest.approx((0 + 0.1 + 1 + 8**0.5) / 4 / 4)
    assert found["near_copies"] == 0.75 and found["repeats"] == 0.5
    with pytest.raises(InputError, match="samples"):
        im.novelty(samples, torch.zeros(3, 5))
