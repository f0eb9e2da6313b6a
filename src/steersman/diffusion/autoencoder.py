r"""Latents z and images (B, C, H, W), about in [-1, 1], by a pipeline's VAE, as diffusers' pipelines do it.

    z = (enc - shift) scale,    images = Dec(z / scale + shift),

with a mean and a deviation of each channel, where the VAE has them. Differentiable. Some VAEs (SDXL's) overflow in
float16 and say so (``force_upcast``): those run in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def upcast(vae: Any) -> Iterator[None]:
    """A VAE that overflows in half precision in float32 meanwhile; put it around the backward pass, too."""
    half = vae is not None and vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if half:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if half:
            vae.to(torch.float16)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images of latents, not clipped, in the VAE's precision."""
    mean, deviation = _of_channels(vae, latents)
    x = latents / vae.config.scaling_factor * deviation + mean
    with upcast(vae):
        return vae.decode(x.to(vae.device, vae.dtype)).sample


def encode(vae: Any, images: Tensor) -> Tensor:
    """The most likely latents of images, in the VAE's precision."""
    with upcast(vae):
        z = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    mean, deviation = _of_channels(vae, z)
    return (z - mean) / deviation * vae.config.scaling_factor


def _of_channels(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Mean (or shift) and deviation of the latents."""
    config = vae.config
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return config.get("shift_factor") or 0.0, 1.0
    shape = (1, -1, *[1] * (like.ndim - 2))
    mean, deviation = (
        torch.tensor(config[name], device=like.device, dtype=like.dtype).view(shape)
        for name in ("latents_mean", "latents_std")
    )
    return mean, deviation
