r"""DDIM inversion and editing with CFG++.

Inversion takes an image back to the noise that a deterministic sampler would have made it from:

    x_0 = (x - sigma_s eps_u) / alpha_s,    x_t = alpha_t x_0 + sigma_t eps_lambda,    s < t, both noises at (x, t).

The approximation is that the noise at (x_s, t) stands for the one at (x_t, t): the error grows with the scale of the
guidance, since a wrong noise is amplified by it. Sampling from the result with another prompt and the same lambda edits
the image (word swap).

In the terms of ordinary guidance this is inversion with the scale omega_i = lambda r_i / (r_i - r_{i+1}) at step i:
it differs from a constant scale in the schedule of scales only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steersman.diffusion import autoencoder
from steersman.diffusion.cfg_pp.guidance import CFGPlusPlus, check_scale
from steersman.diffusion.cfg_pp.solvers import DDIMCFGPPInverseScheduler, DDIMCFGPPScheduler
from steersman.diffusion.classical import DDIMScheduler
from steersman.diffusion.installing import installed
from steersman.errors import InputError, nearest

Mode = Literal["cfg++", "cfg", "npi"]
MODES: tuple[str, ...] = get_args(Mode)


def invert(
    pipe: Any,
    images: Tensor,
    *,
    mode: Mode = "cfg++",
    scale: float | None = None,
    num_inference_steps: int = 50,
    **inputs: Any,
) -> Tensor:
    """The noise of images: latents that :func:`sample` with the same arguments takes back to them.

    Args:
        pipe: a classic pipeline with a ``unet``: Stable Diffusion's, or ``ClassConditionalPipeline``.
        images: (B, 3, H, W) in [-1, 1], or latents of the network's shape.
        mode: ``cfg++``; ``cfg``: the guided noise in both places; ``npi``: the condition alone, at scale 1
            (negative-prompt inversion, Miyake et al. 2023).
        scale: lambda of ``cfg++`` (0.6), or the scale of ``cfg`` (7.5).
        num_inference_steps: N, of DDIM.
        inputs: of the pipeline: ``prompt`` and ``negative_prompt``, or ``labels``; one for each image.

    Returns:
        Tensor: latents (B, C, h, w).

    Raises:
        InputError: an unknown mode, a scale that it does not take, or images of another size.
    """
    with _prepared(pipe, mode, scale, inverse=True) as guidance_scale, torch.no_grad():
        return _run(pipe, encode(pipe, images), num_inference_steps, guidance_scale, inputs)


def sample(
    pipe: Any,
    latents: Tensor,
    *,
    mode: Mode = "cfg++",
    scale: float | None = None,
    num_inference_steps: int = 50,
    **inputs: Any,
) -> Tensor:
    """Images (B, C, H, W), about in [-1, 1] and not clipped, from ``latents``; arguments as in :func:`invert`.

    DDIM, to abar = 1. With the prompt of the inversion the image comes back, as well as it was inverted.
    """
    with _prepared(pipe, mode, scale, inverse=False) as guidance_scale, torch.no_grad():
        return decode(pipe, _run(pipe, latents, num_inference_steps, guidance_scale, inputs))


def edit(
    pipe: Any,
    images: Tensor,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    mode: Mode = "cfg++",
    scale: float | None = None,
    num_inference_steps: int = 50,
) -> Tensor:
    """Word swap: invert with ``source``, sample with ``target``, at one lambda.

        edit(pipe, images, {"prompt": "a small red circle"}, {"prompt": "a small blue circle"})
        edit(digits, images, {"labels": 3}, {"labels": 8})

    Args:
        pipe, images, mode, scale, num_inference_steps: see :func:`invert`.
        source, target: inputs of the pipeline: what the images show, and what they shall show.

    Returns:
        Tensor: images (B, C, H, W), about in [-1, 1].
    """
    settings: dict[str, Any] = {"mode": mode, "scale": scale, "num_inference_steps": num_inference_steps}
    return sample(pipe, invert(pipe, images, **settings, **source), **settings, **target)


# ------------------------------------------------------------------ pieces


def _run(pipe: Any, latents: Tensor, steps: int, guidance_scale: float, inputs: Mapping[str, Any]) -> Tensor:
    prompt = inputs.get("prompt")
    if isinstance(prompt, str):
        inputs = {**inputs, "prompt": [prompt] * len(latents)}
    negative = inputs.get("negative_prompt")
    if isinstance(negative, str):
        inputs = {**inputs, "negative_prompt": [negative] * len(latents)}
    result = pipe(
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
        **inputs,
    )
    return result.images.detach()


def scale_of(mode: str, scale: float | None) -> float:
    """The scale of a mode, or its default.

    Raises:
        InputError: an unknown mode, or a scale that it does not take.
    """
    if mode not in MODES:
        raise InputError("mode", mode, nearest(str(mode), MODES))
    if mode == "cfg++":
        found = 0.6 if scale is None else scale
        check_scale(found)
        return found
    if mode == "npi":
        if scale not in (None, 1):
            raise InputError("scale", scale, "left out: npi is the condition alone, at scale 1")
        return 1.0
    found = 7.5 if scale is None else scale
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 1 <= found < float("inf"):
        raise InputError("scale", scale, "a number from 1 for plain classifier-free guidance")
    return float(found)


@contextmanager
def _prepared(pipe: Any, mode: str, scale: float | None, inverse: bool) -> Iterator[float]:
    """The pipeline with the mode's scheduler and guidance; gives the ``guidance_scale`` to call it with."""
    found = scale_of(mode, scale)
    if installed(pipe):
        names = ", ".join(type(method).__name__ for method in installed(pipe))
        raise InputError("pipe", f"with {names}", "one without installed methods: inversion brings its own guidance")
    own = pipe.scheduler
    kind = DDIMCFGPPInverseScheduler if inverse else DDIMCFGPPScheduler if mode == "cfg++" else DDIMScheduler
    pipe.scheduler = kind.from_config(own.config, set_alpha_to_one=True)
    try:
        with ExitStack() as stack:
            if mode == "cfg++":
                stack.enter_context(CFGPlusPlus(found).install(pipe))
            # The pipeline only has to evaluate both branches where CFG++ mixes them.
            yield 2.0 if mode == "cfg++" else found
    finally:
        pipe.scheduler = own


def latent_shape(pipe: Any) -> tuple[int, int, int]:
    """(C, h, w) of the network's input.

    Raises:
        InputError: a pipeline without a unet.
    """
    if getattr(pipe, "unet", None) is None:
        raise InputError("pipe", type(pipe).__name__, "a pipeline with a unet (flow matching has no DDIM)")
    config = pipe.unet.config
    size = config.sample_size
    return (config.out_channels, *((size, size) if isinstance(size, int) else tuple(size)))


def encode(pipe: Any, images: Tensor) -> Tensor:
    """Latents of images (B, 3, H, W) in [-1, 1]; what has the network's shape is passed on; differentiable.

    Raises:
        InputError: images of another shape, or not finite.
    """
    shape, vae = latent_shape(pipe), getattr(pipe, "vae", None)
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError("images", found, "numbers of shape (B, C, H, W)")
    if not bool(images.isfinite().all()):
        raise InputError("images", "pixels", "finite (there are NaN or infinities)")
    x = images
    if vae is not None and tuple(x.shape[1:]) != shape:
        if x.shape[1] != vae.config.in_channels:
            raise InputError("images", tuple(images.shape), f"of {vae.config.in_channels} channels")
        x = autoencoder.encode(vae, x)
    if tuple(x.shape[1:]) != shape:
        times = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        wanted = f"{shape[2] * times}x{shape[1] * times}"
        given = f"{images.shape[-1]}x{images.shape[-2]} of {images.shape[1]} channels"
        raise InputError("images", given, f"{wanted}, of the network's size (or latents of shape {shape})")
    return x.to(pipe.unet.device, pipe.unet.dtype)


def decode(pipe: Any, z: Tensor) -> Tensor:
    """Images of latents, about in [-1, 1], not clipped; differentiable."""
    vae = getattr(pipe, "vae", None)
    return z if vae is None else autoencoder.decode(vae, z).to(z.dtype)
