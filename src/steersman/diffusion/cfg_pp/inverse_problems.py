r"""Linear inverse problems, y = A x + noise, with CFG++ and a text or class condition.

At each step of DDIM-CFG++ the guided estimate z_0 is compared with the measurement, and the gradient goes through the
network into z_t (PSLD: Rout et al. 2023, arXiv 2307.00619; DPS: Chung et al. 2023, arXiv 2209.14687):

    z' = alpha_s z_0 + sigma_s eps_u                                                                       (CFG++)
    z_s = z' - eta grad ||y - A Dec(z_0)|| - gamma grad ||z_0 - Enc(A^T y + (I - A^T A) Dec(z_0))||

Pixel-space models have no encoder: there the second term is left out, and the rest is DPS. With eta = gamma = 0 this is
sampling. The chain ends at an image that fits the measurement and the condition; it is not a draw from the posterior
(in a correlated Gaussian with one coordinate seen, the other's mean is off).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.diffusion.autoencoder import upcast
from steersman.diffusion.cfg_pp.inversion import Mode, decode, encode, latent_shape, scale_of
from steersman.diffusion.cfg_pp.solvers import DDIMCFGPPScheduler, guided
from steersman.diffusion.classical import DDIMScheduler
from steersman.diffusion.guidance import COND_FIRST, network_of
from steersman.diffusion.installing import installed
from steersman.diffusion.solver import Generators, gaussian
from steersman.errors import InputError

# ------------------------------------------------------------------ operators


class LinearOperator(ABC):
    """A of y = A x + noise: images (B, C, H, W) to measurements. A subclass writes :meth:`forward`, linear in x."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A x."""

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 4:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError("x", found, "images of shape (B, C, H, W)")
        return self.forward(x)

    def transpose(self, y: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A^T y for images of ``shape``: the vector-Jacobian product of A, which is exact as A is linear."""
        return torch.func.vjp(self.forward, torch.zeros(shape, dtype=y.dtype, device=y.device))[1](y)[0]


class AveragePool(LinearOperator):
    """Super-resolution: the mean of each square of ``factor`` x ``factor`` pixels.

    Raises:
        InputError: a factor below 2; later, images whose sides it does not divide.
    """

    def __init__(self, factor: int = 2) -> None:
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
            raise InputError("factor", factor, "a whole number from 2")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise InputError("x", tuple(x.shape), f"images whose sides are multiples of factor={self.factor}")
        return F.avg_pool2d(x, self.factor)


class Blur(LinearOperator):
    """Correlation of each channel with a kernel (k, k), k odd; the border is reflected.

    Raises:
        InputError: a kernel of another shape; later, images that are smaller than it.
    """

    def __init__(self, kernel: Tensor) -> None:
        square = isinstance(kernel, Tensor) and kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1]
        if not square or not kernel.shape[0] % 2:
            found = tuple(kernel.shape) if isinstance(kernel, Tensor) else type(kernel).__name__
            raise InputError("kernel", found, "square, with an odd side")
        self.kernel = kernel.double()

    @classmethod
    def gaussian(cls, size: int = 5, sigma: float = 1.0) -> Blur:
        """A Gaussian of standard deviation ``sigma`` pixels, cut off at ``size`` and normalised."""
        half = _half(size)
        if not 0 < sigma < math.inf:
            raise InputError("sigma", sigma, "a number above 0")
        u = torch.arange(-half, half + 1, dtype=torch.float64)
        bell = torch.exp(-0.5 * (u / sigma) ** 2)
        kernel = bell[:, None] * bell
        return cls(kernel / kernel.sum())

    @classmethod
    def motion(cls, size: int = 5, angle: float = 0.0) -> Blur:
        """A straight motion over ``size`` pixels, at ``angle`` degrees to the rows, by 16 points a pixel."""
        half = _half(size)
        if not math.isfinite(angle):
            raise InputError("angle", angle, "a number of degrees")
        u = torch.linspace(-half, half, 32 * half + 1, dtype=torch.float64)
        points = torch.stack([-u * math.sin(math.radians(angle)), u * math.cos(math.radians(angle))], 1) + half
        # Each point is shared by the four pixels around it.
        near = torch.arange(size, dtype=torch.float64)
        weight = (1 - (points[:, :, None] - near).abs()).clamp(min=0)
        kernel = torch.einsum("pi,pj->ij", weight[:, 0], weight[:, 1])
        return cls(kernel / kernel.sum())

    def forward(self, x: Tensor) -> Tensor:
        half = len(self.kernel) // 2
        if min(x.shape[-2:]) <= half:
            raise InputError("x", tuple(x.shape), f"images with sides above {half}, half of the kernel's")
        channels = x.shape[1]
        kernel = self.kernel.to(x.device, x.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(F.pad(x, (half,) * 4, mode="reflect"), kernel, groups=channels)


class Mask(LinearOperator):
    """Inpainting: pixels are kept where ``mask`` is 1 and blackened to 0 where it is 0.

    Args:
        mask: (H, W), or what broadcasts with (B, C, H, W), of zeros and ones.

    Raises:
        InputError: other values; later, images of another size.
    """

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError("mask", getattr(mask, "shape", mask), "a tensor of zeros (lost) and ones (kept)")
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        try:
            return x * self.mask.to(x.device, x.dtype).expand(x.shape)
        except RuntimeError:
            raise InputError("x", tuple(x.shape), f"images that the mask {tuple(self.mask.shape)} fits") from None


def _half(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 3 or not size % 2:
        raise InputError("size", size, "an odd whole number from 3")
    return size // 2


# ------------------------------------------------------------------ the network with a gradient


class Branches:
    """The two outputs of a pipeline's network at any (x, t), as the pipeline would ask for them.

    The pipeline runs one step, and what it passes to the network besides (x, t) (embedded prompts, labels, sizes) is
    noted. Pipelines run without gradients; this does not.

    Args:
        pipe: a classic pipeline that evaluates both branches in one batch.
        count: images B.
        inputs: of the pipeline.
    """

    def __init__(self, pipe: Any, count: int, **inputs: Any) -> None:
        self.network = network_of(pipe)
        self.cond_first = type(pipe).__name__ in COND_FIRST
        noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            noted.append((args, kwargs))

        for name in ("prompt", "negative_prompt"):
            if isinstance(inputs.get(name), str):
                inputs[name] = [inputs[name]] * count
        latents = torch.zeros((count, *latent_shape(pipe)), device=pipe.unet.device, dtype=pipe.unet.dtype)
        hook = self.network.register_forward_pre_hook(note, with_kwargs=True)
        try:
            pipe(latents=latents, num_inference_steps=1, guidance_scale=2.0, output_type="latent", **inputs)
        finally:
            hook.remove()
        args, self.kwargs = noted[0]
        self.kwargs = {**self.kwargs, "return_dict": False}
        self.args = args[2:]
        if len(args) < 2 or len(args[0]) != 2 * count:
            raise InputError("pipe", type(pipe).__name__, "one that evaluates both branches in one batch")

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(cond, uncond) at x (B, C, h, w)."""
        first, second = self.network(torch.cat([x, x]), t, *self.args, **self.kwargs)[0].chunk(2)
        return (first, second) if self.cond_first else (second, first)


# ------------------------------------------------------------------ restoring


def restore(
    pipe: Any,
    y: Tensor,
    operator: LinearOperator,
    *,
    mode: Mode = "cfg++",
    scale: float | None = None,
    eta: float = 1.0,
    gamma: float = 0.1,
    num_inference_steps: int = 50,
    latents: Tensor | None = None,
    generator: Generators = None,
    **inputs: Any,
) -> Tensor:
    """Images x with A x near y, by the module's equations. One call of both branches and one gradient a step.

    Args:
        pipe: as in :func:`~steersman.diffusion.cfg_pp.inversion.invert`; with a ``vae`` the latent form is taken.
        y: the measurement, what ``operator`` makes of images (B, C, H, W) in [-1, 1].
        operator: A.
        mode: ``cfg++``, or ``cfg``, ordinary guidance, to compare with.
        scale: lambda of ``cfg++`` (0.6), or the scale of ``cfg`` (7.5).
        eta: step size of the measurement's term, at least 0. In units of the latent: PSLD's own script has 0.1 for 1000
            steps of 512x512 images, few steps and small images want more.
        gamma: step size of the latent's own term, at least 0; not used without a ``vae``.
        num_inference_steps: N, of DDIM.
        latents: start, standard normal, (B, C, h, w).
        generator: of the start, where ``latents`` is None.
        inputs: of the pipeline: ``prompt`` and ``negative_prompt``, or ``labels``; one for each image.

    Returns:
        Tensor: images (B, C, H, W), about in [-1, 1] and not clipped.

    Raises:
        InputError: a step size below 0, or a measurement that is not of the operator's shape.
    """
    if mode == "npi":
        raise InputError("mode", mode, "cfg++ or cfg")
    found = scale_of(mode, scale)
    for name, value in (("eta", eta), ("gamma", gamma)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise InputError(name, value, "a number from 0")
    if installed(pipe):
        raise InputError(
            "pipe", type(pipe).__name__, "one without installed methods: restoring brings its own guidance"
        )
    latent_shape(pipe)
    count, latent = len(y), getattr(pipe, "vae", None) is not None
    network = Branches(pipe, count, **inputs)
    z = torch.zeros((count, *latent_shape(pipe)), device=pipe.unet.device, dtype=pipe.unet.dtype)
    z = gaussian(z, generator) if latents is None else latents.to(z.device, z.dtype)
    y = y.to(z.device, z.dtype)
    with torch.no_grad():
        wanted = operator(decode(pipe, z)).shape
    if y.shape != wanted:
        raise InputError("y", tuple(y.shape), f"of the shape that the operator makes of images: {tuple(wanted)}")

    kind: Any = DDIMCFGPPScheduler if mode == "cfg++" else DDIMScheduler
    scheduler = kind.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    scheduler.set_timesteps(num_inference_steps, device=z.device)
    weighted = eta > 0 or (latent and gamma > 0)
    for t, slot in zip(scheduler.timesteps, scheduler.slots, strict=True):
        with torch.set_grad_enabled(weighted):
            z = z.detach().requires_grad_(weighted)
            cond, uncond = network(scheduler.scale_model_input(z, t), t)
            output = guided(cond, uncond, found)
            move: Tensor | float = 0.0
            if weighted:
                z_0 = scheduler._predict(output, z, slot).x0
                with upcast(getattr(pipe, "vae", None)):
                    move = torch.autograd.grad(_misfit(pipe, z_0, y, operator, eta, gamma if latent else 0.0), z)[0]
        if mode == "cfg++":
            scheduler.uncond_output = uncond.detach()
        after = scheduler.step(output.detach(), t, z.detach()).prev_sample
        z = after - move if weighted else after
    with torch.no_grad():
        return decode(pipe, z.detach())


def _misfit(pipe: Any, z_0: Tensor, y: Tensor, operator: LinearOperator, eta: float, gamma: float) -> Tensor:
    """eta ||y - A Dec(z_0)|| + gamma ||z_0 - Enc(A^T y + (I - A^T A) Dec(z_0))||, over the batch added up."""
    x_0 = decode(pipe, z_0)
    residual = y - operator(x_0)
    total = eta * _norms(residual)
    if gamma:
        # A^T y + x - A^T A x = x + A^T (y - A x)
        glued = x_0 + operator.transpose(residual, x_0.shape)
        total = total + gamma * _norms(z_0 - encode(pipe, glued))
    return total


def _norms(x: Tensor) -> Tensor:
    """The sum of the norms of the rows; a row of zeros has the gradient zero."""
    return x.flatten(1).norm(dim=1).sum()
