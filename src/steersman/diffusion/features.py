"""Image features that need no trained network: principal components of pixels, random convolutions.

A feature function maps images in [0, 1], (n, C, H, W), to (n, d), and is differentiable in the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steersman.errors import InputError


class PixelPCA(nn.Module):
    """Raw pixels in the whitened principal components of real images.

    Args:
        images: real images in [0, 1], (n, C, H, W).
        components: how many, at most; never more than n/5 nor the pixels, so that each scale is estimated.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, images: Tensor, components: int = 64) -> None:
        super().__init__()
        x = images.flatten(1).double()
        mean = x.mean(0)
        _, scale, basis = torch.linalg.svd(x - mean, full_matrices=False)
        scale = scale / math.sqrt(max(len(x) - 1, 1))
        d = max(1, min(components, len(x) // 5, int((scale > 1e-3 * scale[0]).sum())))
        self.register_buffer("mean", mean.float())
        self.register_buffer("basis", (basis[:d] / scale[:d, None]).T.float())

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - self.mean.to(images)) @ self.basis.to(images)


class RandomFeatures(nn.Module):
    """Pooled activations of a convolutional network whose weights are random and fixed.

    Means over each quarter of the image of three layers of rectified random filters: textures and their
    place, with nothing trained. A classifier's features, where there is one, see more of the content.

    Args:
        channels: of the images.
        width: filters of each layer.
        seed: of the weights.
    """

    def __init__(self, channels: int, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.convolutions = nn.ModuleList()
        for inputs, outputs in ((channels, width), (width, width), (width, width)):
            layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, padding=1)
            for parameter in layer.parameters():
                bound = 1 / math.sqrt(inputs * 9)
                parameter.data.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * 3 * bound)
            self.convolutions.append(layer)

    def forward(self, images: Tensor) -> Tensor:
        x, pooled = images, []
        for i, layer in enumerate(self.convolutions):
            x = nn.functional.leaky_relu(layer(x), 0.2)
            pooled.append(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
            if i < len(self.convolutions) - 1 and min(x.shape[2:]) >= 4:
                x = nn.functional.avg_pool2d(x, 2)
        return torch.cat(pooled, dim=1)


def built_in_features(features: Any, images: Tensor, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """``random`` or ``pixels`` as a module; a module's class as its instance; anything callable as it is."""
    if features == "random":
        return RandomFeatures(images.shape[1], seed=seed)
    if features == "pixels":
        return PixelPCA(images)
    if isinstance(features, type):
        features = features()
    if not callable(features):
        raise InputError("features", features, "random, pixels or file.py:name")
    return features
