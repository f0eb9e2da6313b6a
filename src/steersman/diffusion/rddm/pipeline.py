r"""Image in, image out: from I_in + β̄_T ε down to I_0, or from noise alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from steersman.diffusion.images import pixels
from steersman.diffusion.rddm.levels import Level, PathName
from steersman.diffusion.rddm.predictions import heads
from steersman.diffusion.rddm.scheduler import RDDMScheduler
from steersman.diffusion.scheduler import ROOM
from steersman.errors import InputError

OUTPUTS = ("pil", "np", "pt")


class Networks(nn.Module):
    """The one or two networks of a kind of prediction, as one function from I_t to its heads.

    Two networks give one head each, one network gives all. What they see beside I_t (the input, the mask) is joined
    to its channels. Those that are told levels are told ᾱ T for the residual or the image, and β̄ T for the noise.

    Args:
        unet: a ``UNet2DModel``, or a network with its interface and configuration.
        noise_unet: the second network, of the second head.
        kind: of prediction.

    Raises:
        InputError: a second network for a kind of one head, or channels that don't fit.
    """

    def __init__(self, unet: nn.Module, noise_unet: nn.Module | None, kind: str) -> None:
        super().__init__()
        self.unet, self.noise_unet, self.kind = unet, noise_unet, kind
        n = heads(kind)
        if noise_unet is not None and n == 1:
            raise InputError("noise_unet", type(noise_unet).__name__, f"left out: {kind} is one head")
        config: Any = unet.config
        self.channels, odd = divmod(config.out_channels, n if noise_unet is None else 1)
        if odd or (noise_unet is not None and noise_unet.config.out_channels != self.channels):  # type: ignore[union-attr]
            raise InputError("unet", f"{config.out_channels} output channels", f"as many for each of {n} heads")
        if noise_unet is not None and noise_unet.config.in_channels != config.in_channels:  # type: ignore[union-attr]
            raise InputError("noise_unet", f"{noise_unet.config.in_channels} channels", f"of {config.in_channels}")  # type: ignore[union-attr]
        self.conditional = config.in_channels >= 2 * self.channels
        self.mask_channels = config.in_channels - (2 if self.conditional else 1) * self.channels
        if self.mask_channels not in (0, 1, self.channels):
            allowed = f"of {self.channels} (the state), {2 * self.channels} (and the input), or a mask's more"
            raise InputError("unet", f"{config.in_channels} input channels", allowed)

    def forward(self, x: Tensor, t: Tensor | Level, x_in: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        """The heads at I_t.

        Args:
            x: I_t, (B, C, H, W).
            t: timesteps (B,), or what is told of the levels as a pair of (B,) or of numbers.
            x_in: I_in; not looked at by unconditional networks.
            mask: (B, 1 or C, H, W) in [0, 1]; not looked at by networks without one.
        """
        parts = [x]
        if self.conditional:
            parts.append(torch.zeros_like(x) if x_in is None else x_in)
        if self.mask_channels:
            if mask is None:
                raise InputError("mask", None, "given, as the network sees it")
            parts.append(mask.expand(-1, self.mask_channels, -1, -1))
        seen = torch.cat(parts, 1)
        first: Any = t
        second: Any = t
        if isinstance(t, tuple):
            first, second = t
            if self.kind == "epsilon":
                first = second
        out = self.unet(seen, _rows(first, x)).sample
        if self.noise_unet is not None:
            return [out, self.noise_unet(seen, _rows(second, x)).sample]
        return list(out.chunk(heads(self.kind), 1))


def _rows(t: Tensor | float, x: Tensor) -> Tensor:
    if isinstance(t, Tensor):  # on the device, without a wait for it
        return t.to(x.device).expand(len(x))
    return torch.full((len(x),), float(t), device=x.device)


class RDDMRestorationPipeline(DiffusionPipeline):
    """Restores degraded images (or draws new ones) by a residual denoising diffusion.

        I_T = I_in + β̄_T ε, and then n steps of the scheduler to Î_0; without an image I_in = 0

    Images of any size: they are continued by reflection to what the network can halve, and cut back.

    Args:
        unet: a ``UNet2DModel``: C, 2C (with the input) or more (with a mask) channels to C, or 2C for two heads.
        scheduler: an :class:`RDDMScheduler`.
        noise_unet: a second network, for the noise.

    Raises:
        InputError: networks that don't fit the scheduler's ``prediction_type`` or ``condition``.
    """

    config: Any  # diffusers' FrozenDict, whose keys are attributes too
    unet: Any
    noise_unet: Any
    scheduler: Any
    model_cpu_offload_seq = "unet->noise_unet"  # type: ignore[assignment]
    _optional_components = ["noise_unet"]
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: ModelMixin, scheduler: Any, noise_unet: ModelMixin | None = None) -> None:
        super().__init__()
        if not isinstance(scheduler, RDDMScheduler):
            raise InputError("scheduler", type(scheduler).__name__, "an RDDMScheduler")
        self.register_modules(unet=unet, scheduler=scheduler, noise_unet=noise_unet)
        self.networks()

    def networks(self) -> Networks:
        """The networks as one function, checked against the scheduler."""
        c: Any = self.scheduler.config
        if c.condition == "levels" and heads(c.prediction_type) == 2 and self.noise_unet is None:
            raise InputError("condition", "levels", "time, where one network of two heads is told one number")
        return Networks(self.unet, self.noise_unet, c.prediction_type)

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        mask: Any = None,
        *,
        num_inference_steps: int = 5,
        path: PathName | Sequence[tuple[float, float]] = "simultaneous",
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Restores ``image``, or draws ``batch_size`` images where there is none.

        Args:
            image: a PIL image, (B, H, W, C) or a tensor (B, C, H, W), in [0, 1], or a list of one size.
            mask: alike, of one channel or C, for networks that see one.
            num_inference_steps: n, network calls (of each network).
            path: see :meth:`RDDMScheduler.set_timesteps`; with levels of your own, n is what they make it.
            batch_size, height, width: of images that are drawn, not restored.
            generator: one for the batch, or one per image.
            latents: standard normal noise ε of the start, (B, C, H, W).
            output_type: ``pil``; ``np`` (B, H, W, C) or ``pt`` (B, C, H, W) in [0, 1].
            return_dict: an ``ImagePipelineOutput``, else a tuple.
            callback_on_step_end: called as ``(pipe, step, timestep, tensors)``; may return new ``latents``.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.

        Raises:
            InputError: an argument is not allowed, or does not fit the network.
        """
        if output_type not in OUTPUTS:
            raise InputError("output_type", output_type, f"one of {', '.join(OUTPUTS)}")
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise InputError("callback_on_step_end_tensor_inputs", name, "latents")
        nets, device = self.networks(), self._execution_device
        dtype = self.unet.dtype
        x_in, size = self._input(image, nets, batch_size, height, width)
        m = None
        if mask is not None:
            if not nets.mask_channels:
                raise InputError("mask", "an image", "left out: the network sees none")
            m = as_images("mask", mask)
            if m.shape[-2:] != size or len(m) not in (1, len(x_in)) or m.shape[1] not in (1, nets.mask_channels):
                allowed = f"of the image's size {size[1]}x{size[0]}, one for each of {len(x_in)}"
                raise InputError("mask", f"{m.shape[-1]}x{m.shape[-2]}, {len(m)} of them", allowed)
            m = _pad(m, x_in.shape[-2:]).expand(len(x_in), -1, -1, -1).to(device, dtype)
        if isinstance(generator, list) and len(generator) != len(x_in):
            raise InputError("generator", f"a list of {len(generator)}", f"one generator, or {len(x_in)} of them")
        x_in = x_in.to(device, dtype)
        noise = latents
        if noise is None:
            noise = randn_tensor(x_in.shape, generator=generator, device=device, dtype=dtype)
        elif tuple(noise.shape) != (len(x_in), nets.channels, *size):
            raise InputError("latents", tuple(noise.shape), f"of shape {(len(x_in), nets.channels, *size)}")
        else:
            noise = _pad(noise.to(device, dtype), x_in.shape[-2:])
        x: Tensor = x_in + self.scheduler.init_noise_sigma * noise

        named = isinstance(path, str)
        self.scheduler.set_timesteps(num_inference_steps if named else None, device=device, path=path)
        levels, T = self.scheduler.config.condition == "levels", len(self.scheduler)
        given = None if image is None else x_in
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                told = self.scheduler.moves[i].told
                at = Level(told.alpha * T, told.beta * T) if levels else t
                out = nets(x, at, x_in, m)
                x = self.scheduler.step(out, t, x, given, generator).prev_sample
                if callback_on_step_end is not None:
                    tensors = {name: x for name in callback_on_step_end_tensor_inputs}
                    x = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", x)
                bar.update()
        images = self._images(x[..., : size[0], : size[1]], output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _input(
        self, image: Any, nets: Networks, batch_size: int, height: int | None, width: int | None
    ) -> tuple[Tensor, tuple[int, int]]:
        """I_in in [-1, 1], continued to a size that can be halved, and its own size."""
        levels = len(self.unet.config.block_out_channels) - 1
        if image is not None:
            x = 2 * as_images("image", image) - 1
            if x.shape[1] != nets.channels:
                raise InputError("image", f"{x.shape[1]} channels", f"of {nets.channels} channels, as the network")
        else:
            if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
                raise InputError("batch_size", batch_size, "a whole number from 1")
            own = self.unet.config.sample_size
            own = (own, own) if own is None or isinstance(own, int) else own
            wanted = [a if a is not None else b for a, b in zip((height, width), own, strict=True)]
            for name, value in zip(("height", "width"), wanted, strict=True):
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise InputError(name, value, "a whole number from 1 (the network has no size of its own)")
            x = torch.zeros(batch_size, nets.channels, *wanted)
        h, w = x.shape[-2:]
        multiple = 2**levels
        return _pad(x, (-(-h // multiple) * multiple, -(-w // multiple) * multiple)), (h, w)

    def _images(self, x: Tensor, output_type: str) -> Any:
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)


RDDMRestorationPipeline.__module__ = ROOM


def as_images(name: str, given: Any) -> Tensor:
    """Images in [0, 1], float (B, C, H, W), of what pipelines are given.

    Raises:
        InputError: something else, images of different sizes, or values outside of [0, 1].
    """
    if isinstance(given, (list, tuple)) and given:
        parts = [as_images(name, one) for one in given]
        if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            sizes = sorted({"x".join(map(str, part.shape[1:])) for part in parts})
            raise InputError(name, ", ".join(sizes), "of one size and number of channels")
        return torch.cat(parts)
    if isinstance(given, Image.Image):
        given = pixels(name, given)
        given = given[None, ..., None] if given.ndim == 2 else given[None]
    if isinstance(given, np.ndarray):
        array = given.astype(np.float32) / (255 if given.dtype == np.uint8 else 1)
        array = array[None] if array.ndim == 3 else array
        given = torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2) if array.ndim == 4 else given
    if isinstance(given, Tensor) and given.ndim == 3:
        given = given[None]
    if not isinstance(given, Tensor) or given.ndim != 4 or not given.is_floating_point():
        shape = tuple(given.shape) if isinstance(given, (Tensor, np.ndarray)) else type(given).__name__
        raise InputError(name, shape, "a PIL image, an array (B, H, W, C) or a tensor (B, C, H, W) in [0, 1]")
    low, high = float(given.min()), float(given.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InputError(name, f"values from {low:.3g} to {high:.3g}", "in [0, 1]")
    return given.float()


def _pad(x: Tensor, size: Sequence[int]) -> Tensor:
    """Continued to ``size`` at the bottom and the right: by reflection, or by the edge where there is too little."""
    down, right = size[0] - x.shape[-2], size[1] - x.shape[-1]
    if not (down or right):
        return x
    mode = "reflect" if down < x.shape[-2] and right < x.shape[-1] else "replicate"
    return nn.functional.pad(x, (0, right, 0, down), mode=mode)
