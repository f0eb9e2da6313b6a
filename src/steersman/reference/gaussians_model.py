"""The mixtures of ``gaussians`` as a network that diffusers pipelines can drive.

A point of the plane is an image of 2 channels and 1x1 pixel. Label k restricts the law to mode k, and the
label K (one past the last mode) is the null label, so that guidance too has an exact network:

    pipe = pipeline("gaussians:ring-sharp")
    points = pipe(batch_size=500, num_inference_steps=50, output_type="latent").images[:, :, 0, 0]
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.diffusion.solver import PREDICTION_TYPES, DiscreteVP
from steersman.errors import InputError
from steersman.reference import gaussians


class MixtureModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The ideal network of a mixture, with the interface of ``UNet2DModel``.

    Args:
        mixture: a name that :func:`steersman.reference.gaussians.mixture` takes.
        beta_schedule, beta_start, beta_end, num_train_timesteps: of the noise that it was "trained" on, as in
            diffusers' schedulers.
        prediction_type: epsilon, v_prediction or sample.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        mixture: str = "gaussians",
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        in_channels: int = 2,
        out_channels: int = 2,
        sample_size: int = 1,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise InputError("prediction_type", prediction_type, f"one of {', '.join(PREDICTION_TYPES)}")
        self.law = gaussians.mixture(mixture)
        self.register_to_config(num_class_embeds=self.law.modes + 1)
        noise = DDIMScheduler(num_train_timesteps, beta_start, beta_end, beta_schedule)
        self.process = DiscreteVP(noise.alphas_cumprod)
        # Carries the dtype and device that a pipeline asks a network for; the mixture has no weights.
        self.register_buffer("anchor", torch.zeros(1))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The prediction at ``sample`` (B, 2, 1, 1) and ``timestep`` (a number, or one per row).

        ``class_labels`` (B,): a mode, or K for the whole mixture, as without labels.
        """
        x = sample.flatten(1).double()
        times = torch.as_tensor(timestep, dtype=torch.float64).flatten().tolist()
        alpha: Any = [self.process.alpha(t) for t in times]
        sigma: Any = [self.process.sigma(t) for t in times]
        alpha, sigma = (v[0] if len(v) == 1 else torch.tensor(v, dtype=torch.float64) for v in (alpha, sigma))
        kind = self.config.prediction_type
        predict = {"epsilon": self.law.eps, "v_prediction": self.law.velocity, "sample": self.law.x0}[kind]
        out = predict(x, alpha, sigma, class_labels).to(sample.dtype).reshape(sample.shape)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def pipeline(name: str = "gaussians", **settings: Any) -> ClassConditionalPipeline:
    """A pipeline whose network is exact, with DDIM as its scheduler.

    Args:
        name: a mixture's name.
        settings: of :class:`MixtureModel` (``beta_schedule``, ``prediction_type``, ...).
    """
    # By keyword: diffusers records a positional argument as a default, which from_config then drops.
    model = MixtureModel(mixture=name, **settings)
    c = model.config
    scheduler = DDIMScheduler(
        num_train_timesteps=c.num_train_timesteps,
        beta_start=c.beta_start,
        beta_end=c.beta_end,
        beta_schedule=c.beta_schedule,
        clip_sample=False,
        prediction_type=c.prediction_type,
    )
    return ClassConditionalPipeline(model, scheduler, null_label=model.law.modes)
