r"""A pixel-space pipeline with class labels and classifier-free guidance.

With the null label ∅ in place of the class, one network gives both terms of

    eps_w(x, t, y) = eps(x, t, ∅) + w (eps(x, t, y) - eps(x, t, ∅))                       (w = 1: no guidance)

(Ho & Salimans, "Classifier-free diffusion guidance", 2022; w is diffusers' ``guidance_scale``.) Both are
evaluated in one batch of 2B rows, the unconditional rows first, as Stable Diffusion does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from steersman.errors import InputError

OUTPUTS = ("pil", "np", "pt", "latent")


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples images from a ``UNet2DModel``, with class labels where it has them.

    Works with any diffusers scheduler, and with folders of unconditional models (``DDPMPipeline``) too.

    Args:
        unet: a ``UNet2DModel``, or a network with its interface and configuration; it predicts what the
            scheduler's ``prediction_type`` says, from (B, C, H, W), time and labels.
        scheduler: any diffusers scheduler.
        null_label: the label that stands for "no class", for guidance and unconditional samples; None if
            the network was trained without one.
    """

    config: Any  # diffusers' FrozenDict, whose keys are attributes too
    scheduler: Any
    unet: Any
    model_cpu_offload_seq = "unet"  # type: ignore[assignment]
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, null_label: int | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_label=null_label)
        classes = self.unet.config.num_class_embeds
        if null_label is not None and (classes is None or not 0 <= null_label < classes):
            raise InputError("null_label", null_label, f"a label that the network embeds ({classes or 0} labels)")

    @property
    def guidance_scale(self) -> float:
        """w of the run in progress."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the run in progress."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        labels: int | Sequence[int] | Tensor | None = None,
        *,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one image per label.

        Args:
            labels: one label, or one per image; None for unconditional samples.
            batch_size: number of images; by default as many as labels or latents, else 1.
            num_inference_steps: steps of the scheduler, from 1.
            timesteps: times of the network instead of ``num_inference_steps``, falling, for schedulers
                that take them.
            guidance_scale: w, from 1 (no guidance, and one network row per image).
            generator: one for the batch, or one per image.
            latents: standard normal start (B, C, H, W); scaled by the scheduler's ``init_noise_sigma``.
            eta: of DDIM, passed on only if given.
            output_type: ``pil``; ``np`` (B, H, W, C) or ``pt`` (B, C, H, W) in [0, 1]; ``latent``, what
                the scheduler returned, not clipped.
            return_dict: an ``ImagePipelineOutput``, else a tuple.
            callback_on_step_end: called as ``(pipe, step, timestep, tensors)``; may return new ``latents``.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.

        Raises:
            InputError: an argument is not allowed, or does not fit the network or the scheduler.
        """
        self._check(num_inference_steps, timesteps, guidance_scale, output_type, batch_size, eta)
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise InputError("callback_on_step_end_tensor_inputs", name, "latents")
        device, config = self._execution_device, self.unet.config
        y = self._labels(labels, batch_size, latents)
        batch = len(y) if y is not None else batch_size or (len(latents) if latents is not None else 1)
        guided = guidance_scale > 1
        if guided and (y is None or self.config.null_label is None):
            raise InputError("guidance_scale", guidance_scale, "1 (this network has no labels, or no null label)")
        if isinstance(generator, list) and len(generator) != batch:
            raise InputError("generator", f"a list of {len(generator)}", f"one generator, or {batch} of them")

        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise InputError("latents", tuple(latents.shape), f"of shape {shape}")

        rows = None
        if y is not None:
            y = y.to(device)
            rows = torch.cat([torch.full_like(y, self.config.null_label), y]) if guided else y
        self._guidance_scale = float(guidance_scale)
        times = self._times(num_inference_steps, timesteps, device)
        self._num_timesteps = len(times)
        latents = self._start(latents.to(device, self.unet.dtype), generator)
        extra = self._step_arguments(generator, eta)

        with self.progress_bar(total=len(times)) as bar:
            for i, t in enumerate(times):
                x = torch.cat([latents, latents]) if guided else latents
                x = self.scheduler.scale_model_input(x, t)
                out = self.unet(x, t, class_labels=rows).sample
                if out.shape[1] == 2 * config.in_channels:  # a learned variance, which no solver here reads
                    out = out[:, : config.in_channels]
                if guided:
                    uncond, cond = out.chunk(2)
                    out = uncond + guidance_scale * (cond - uncond)
                latents = self.scheduler.step(out, t, latents, **extra).prev_sample
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                bar.update()

        assert latents is not None
        images = self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _start(self, latents: Tensor, generator: Any) -> Tensor:
        """Where sampling starts, from standard normal ``latents``; a scheduler whose noise is another says itself."""
        start = getattr(self.scheduler, "start", None)
        return latents * self.scheduler.init_noise_sigma if start is None else start(latents, generator)

    def _check(
        self,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        guidance_scale: float,
        output_type: str,
        batch_size: int | None,
        eta: float | None,
    ) -> None:
        for name, value in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
            if value is None and name == "batch_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(name, value, "a whole number from 1")
        if timesteps is not None and not len(timesteps):
            raise InputError("timesteps", timesteps, "at least one time")
        if not 1 <= guidance_scale < math.inf:
            raise InputError("guidance_scale", guidance_scale, "a finite number from 1 (no guidance)")
        if eta is not None and not 0 <= eta <= 1:
            raise InputError("eta", eta, "a number from 0 to 1, or None")
        if output_type not in OUTPUTS:
            raise InputError("output_type", output_type, f"one of {', '.join(OUTPUTS)}")

    def _labels(self, labels: Any, batch_size: int | None, latents: Tensor | None) -> Tensor | None:
        """Labels (B,), the null label where none is given; None for a network without labels."""
        classes, null = self.unet.config.num_class_embeds, self.config.null_label
        if classes is None:
            if labels is not None:
                raise InputError("labels", labels, "None (this network has no labels)")
            return None
        count = batch_size or (len(latents) if latents is not None else None)
        if labels is None:
            if null is None:
                raise InputError("labels", labels, f"labels from 0 to {classes - 1} (there is no null label)")
            labels = null
        y = torch.as_tensor(labels)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.ndim > 1 or y.numel() == 0:
            raise InputError("labels", labels, f"one whole number from 0 to {classes - 1}, or one per image")
        if int(y.min()) < 0 or int(y.max()) >= classes:
            raise InputError("labels", labels, f"whole numbers from 0 to {classes - 1}")
        if y.ndim == 0:
            y = y.expand(count or 1)
        elif count is not None and len(y) != count:
            raise InputError("labels", f"{len(y)} labels", f"one label, or one for each of the {count} images")
        return y.long()

    def _times(self, steps: int, timesteps: Sequence[float] | None, device: torch.device) -> Tensor:
        if timesteps is None:
            self.scheduler.set_timesteps(steps, device=device)
        elif "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(timesteps=list(timesteps), device=device)
        else:
            name = type(self.scheduler).__name__
            raise InputError("timesteps", timesteps, f"None ({name} lays out its own times)")
        return self.scheduler.timesteps

    def _step_arguments(self, generator: Any, eta: float | None) -> dict[str, Any]:
        parameters = inspect.signature(self.scheduler.step).parameters
        extra = {}
        if "generator" in parameters:
            extra["generator"] = generator
        if eta is not None:
            if "eta" not in parameters:
                raise InputError("eta", eta, f"None ({type(self.scheduler).__name__} has no eta)")
            extra["eta"] = eta
        return extra

    def _images(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)


# Recorded and pickled under the room's name, where it is exported, not under this file's.
ClassConditionalPipeline.__module__ = "steersman.diffusion"
