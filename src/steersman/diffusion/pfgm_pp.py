r"""PFGM++: diffusion with Student-t noise, from Poisson flow (D = 1) to Gaussian diffusion (D = ∞).

Data y in N dimensions are the charges of a field in N + D dimensions; by symmetry only the norm r of the D
added dimensions matters, and a field line through (x, r) obeys dx/dr = E_x / E_r. Noising y at r means to draw

    p_r(x | y) ∝ (‖x - y‖² + r²)^{-(N+D)/2}.

With r = σ√D this is a multivariate Student-t law with D degrees of freedom, location y and scale σ² I,

    x = y + σ z √(D/w),    z ~ N(0, I_N),    w ~ χ²_D,  one w for the whole sample,

which tends to x = y + σ z as D → ∞. The denoiser that minimises E λ(σ) ‖D_θ(x, σ) - y‖² is the posterior mean,
and on finitely many data y_i it is known:

    D*(x, σ) = sum_i w_i y_i,    w_i ∝ (‖x - y_i‖² + r²)^{-(N+D)/2},    (x - D*)/r = E_x / E_r.

Because dr/dσ = √D cancels, the field lines are those of diffusion in σ,

    dx/dσ = (x - D_θ(x, σ)) / σ,

so that every network, solver and setting of EDM stays as it is: D changes the noise in training, and where
sampling starts, x = σ_max z √(D/w).

Y. Xu, Z. Liu, Y. Tian, S. Tong, M. Tegmark, T. Jaakkola, "PFGM++: Unlocking the Potential of Physics-Inspired
Generative Models", ICML 2023, arXiv:2302.04265. EDM: T. Karras, M. Aittala, T. Aila, S. Laine, "Elucidating the
Design Space of Diffusion-Based Generative Models", NeurIPS 2022, arXiv:2206.00364.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from scipy.special import gammaincinv
from torch import Tensor, nn

from steersman.diffusion.classical import DDIM, Heun
from steersman.diffusion.images import read_images
from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.diffusion.scheduler import Slot, SlotScheduler, alphas_cumprod
from steersman.diffusion.solver import VE, Denoiser, Generators, Prediction, Solver, gaussian
from steersman.errors import InputError, TrialError

FormulationName = Literal["edm", "ve", "ddpm"]
SolverName = Literal["heun", "euler"]
SigmaSchedule = Literal["karras", "exponential"]
LARGEST_SCALE = 1e6
"""√(D/w) is cut off here: w below 1e-12 D, which at D = 1 happens once in 1.3 million draws."""


# ------------------------------------------------------------------ the kernel


def dimension(D: Any) -> float:
    """D as a float: a real number above 0, or infinity (also written "inf").

    Raises:
        InputError: anything else; a tensor too, as all of a sample's pixels share one D.
    """
    allowed = "one real number above 0, or inf"
    if isinstance(D, (Tensor, np.ndarray)):
        raise InputError("D", f"{type(D).__name__} of shape {tuple(D.shape)}", allowed)
    if isinstance(D, bool) or not isinstance(D, (int, float, str, np.number)):
        raise InputError("D", D, allowed)
    try:
        value = float(D)
    except (ValueError, OverflowError):
        raise InputError("D", D, f"{allowed}, that a double can hold") from None
    if not value > 0:
        raise InputError("D", D, allowed)
    return value


@dataclass(frozen=True)
class PFGMPPKernel:
    """The noise of PFGM++: Student-t with D degrees of freedom, in the module's chi-square form.

    The law of R = ‖x - y‖ is that of r √(B/(1 - B)) with B ~ Beta(N/2, D/2) (appendix B), as the authors draw it; the
    chi-square form has the same law for every real D, and nothing to clip. All noise of one seed is coupled over
    D: z and the quantile of w are shared.

    Args:
        D: a real number above 0, or inf for Gaussian noise. Up to 2 the noise has no variance, up to 1 no mean.

    Raises:
        InputError: D is no such number.
    """

    D: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "D", dimension(self.D))

    def radius(self, sigma: float) -> float:
        """r = σ√D, by which every setting of EDM carries over (infinite for D = inf)."""
        return sigma * math.sqrt(self.D)

    def sigma(self, radius: float) -> float:
        """σ = r/√D.

        Raises:
            InputError: D is infinite, where r says nothing of σ.
        """
        if math.isinf(self.D):
            raise InputError("D", self.D, "finite, for a radius to have a noise level")
        return radius / math.sqrt(self.D)

    def scales(self, u: Tensor) -> Tensor:
        """√(D/w) at the quantiles ``u`` of w ~ χ²_D, (B,) in [0, 1], float64; at most :data:`LARGEST_SCALE`."""
        if math.isinf(self.D):
            return torch.ones_like(u, dtype=torch.float64)
        w = 2.0 * gammaincinv(self.D / 2.0, u.double().cpu().numpy())
        scale = np.sqrt(self.D / np.maximum(w, self.D / LARGEST_SCALE**2))
        return torch.from_numpy(np.atleast_1d(scale)).to(u.device)

    def spread(self, z: Tensor, generator: Generators = None) -> Tensor:
        """z √(D/w): standard normal ``z`` (B, ...) as noise of the kernel at σ = 1, with w from ``generator``."""
        if math.isinf(self.D):
            return z
        return times(z, self.scales(uniform(z, generator)))

    def noise(self, like: Tensor, generator: Generators = None) -> Tensor:
        """Noise of the kernel at σ = 1, of the shape, dtype and device of ``like``; a list has one generator a row."""
        return self.spread(gaussian(like, generator), generator)

    def log_weights(self, x: Tensor, sigma: Tensor | float, data: Tensor) -> Tensor:
        """log p_r(x_b | y_i) up to a constant of each row, float64 (B, n).

            -(N + D)/2 log(1 + ‖x - y‖²/(σ² D)),    D = ∞:  -‖x - y‖²/(2σ²)

        The power itself overflows where N + D is above some hundreds; the logarithm is exact for any D.

        Args:
            x: (B, N).
            sigma: one for all, or (B,).
            data: (n, N).
        """
        exact = "donot_use_mm_for_euclid_dist"  # the difference of squares loses what small σ needs
        square = torch.cdist(x.double(), data.double(), compute_mode=exact).square()
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1)
        if math.isinf(self.D):
            return -0.5 * square / sigma**2
        return -0.5 * (x.shape[1] + self.D) * torch.log1p(square / sigma**2 / self.D)


def uniform(like: Tensor, generator: Generators = None) -> Tensor:
    """One uniform number for each row of ``like``, float64 where the generator is."""
    if generator is None or isinstance(generator, torch.Generator):
        device = torch.device("cpu") if generator is None else generator.device
        return torch.rand(len(like), generator=generator, device=device, dtype=torch.float64)
    if len(generator) != len(like):
        raise InputError("generator", f"a list of {len(generator)}", f"one generator, or {len(like)}, one per sample")
    return torch.cat([uniform(like[:1], one).cpu() for one in generator])


def times(x: Tensor, factors: Tensor) -> Tensor:
    """``x`` (B, ...) times one factor a row, in float64, back in its dtype: a row too large for it is shrunk to fit."""
    shape = (-1, *[1] * (x.ndim - 1))
    made = x.double() * factors.to(x.device).reshape(shape)
    if x.dtype == torch.float16:
        peak = made.flatten(1).abs().amax(1).reshape(shape)
        made = made * (torch.finfo(x.dtype).max / peak.clamp_min(1.0)).clamp_max(1.0)
    return made.to(x.dtype)


# ------------------------------------------------------------------ the ideal denoiser


def posterior_mean(
    kernel: PFGMPPKernel, x: Tensor, sigma: Tensor | float, data: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """E[y | x] for y uniform on ``data``: sum_i w_i y_i, with w the softmax of the kernel's log weights.

    Args:
        kernel: of the noise.
        x: (B, ...).
        sigma: above 0; one for all, or (B,).
        data: (n, ...).
        allowed: which data a row may come from, (B, n), True for some of each row; None for all.

    Returns:
        Tensor: of the shape and dtype of ``x``.
    """
    flat, y = x.flatten(1).double(), data.flatten(1).double()
    if flat.shape[1] != y.shape[1]:
        raise InputError("data", tuple(data.shape), f"of the shape of x, {tuple(x.shape[1:])}")
    rows = max(1, 2**24 // len(y))
    levels = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
    means = []
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        log_w = kernel.log_weights(flat[part], levels[part], y)
        if allowed is not None:
            log_w = log_w.masked_fill(~allowed[part], -math.inf)
        means.append(torch.softmax(log_w, 1) @ y)
    return torch.cat(means).reshape(x.shape).to(x.dtype)


def ideal_denoiser(data: Tensor, D: float = math.inf) -> Denoiser:
    """The denoiser D*(x, σ) of finitely many ``data`` (n, ...), for ``integrate`` over the process ``VE``.

    At D = ∞ it is that of Gaussian diffusion, at D = 1 that of PFGM.
    """
    kernel = PFGMPPKernel(D)

    def predict(x: Tensor, sigma: float) -> Prediction:
        return Prediction(x, 1.0, sigma, x0=posterior_mean(kernel, x, sigma, data))

    return predict


# ------------------------------------------------------------------ formulations


class Coefficients(NamedTuple):
    """D(x, σ) = skip x + out F(inward x, told(σ)), with F the network."""

    skip: Any
    out: Any
    inward: Any


class Formulation(ABC):
    """Which noise levels a network is trained on, with which weight, and what it sees and says (EDM's Table 1).

    Attributes:
        sigma_min, sigma_max: the noise levels between which it is sampled.
    """

    sigma_min: float
    sigma_max: float

    @abstractmethod
    def levels(self, u: Tensor) -> Tensor:
        """The training levels' quantiles at ``u`` in [0, 1), float64."""

    @abstractmethod
    def weight(self, sigma: Tensor) -> Tensor:
        """λ(σ) of the squared error of D."""

    @abstractmethod
    def coefficients(self, sigma: Any) -> Coefficients:
        """At a number or a tensor of levels."""

    @abstractmethod
    def told(self, sigma: Tensor) -> Tensor:
        """What the network is told at σ."""

    @abstractmethod
    def sigma(self, told: Tensor) -> Tensor:
        """The inverse of :meth:`told`."""


@dataclass(frozen=True)
class EDMFormulation(Formulation):
    """EDM's: σ = exp(P_mean + P_std n), n ~ N(0, 1), λ = (σ² + σ_d²)/(σ σ_d)², and σ_d the data's deviation.

        skip = σ_d²/(σ² + σ_d²),  out = σ σ_d/√(σ² + σ_d²),  inward = 1/√(σ² + σ_d²),  told = ln(σ)/4

    For 256x256 images the authors train on 380/80 of these levels (P_mean + 1.558) up to σ_max = 380.

    Args:
        sigma_data: σ_d.
        P_mean, P_std: of ln σ.
        sign: -1 where the network's output is read with the other sign (diffusers' ``v_prediction``).
    """

    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2
    sign: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def levels(self, u: Tensor) -> Tensor:
        n = torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12))
        return (self.P_mean + self.P_std * n).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def coefficients(self, sigma: Any) -> Coefficients:
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            self.sigma_data**2 / total, self.sign * sigma * self.sigma_data / total**0.5, 1.0 / total**0.5
        )

    def told(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def sigma(self, told: Tensor) -> Tensor:
        return (4 * told).exp()


@dataclass(frozen=True)
class VEFormulation(Formulation):
    """Of variance-exploding networks: σ log-uniform in [.02, 100], λ = 1/σ².

    skip = 1,  out = σ,  inward = 1,  told = ln(σ/2)
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def levels(self, u: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u.double()

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2

    def coefficients(self, sigma: Any) -> Coefficients:
        return Coefficients(1.0, sigma, 1.0)

    def told(self, sigma: Tensor) -> Tensor:
        return (sigma / 2).log()

    def sigma(self, told: Tensor) -> Tensor:
        return 2 * told.exp()


class DDPMFormulation(Formulation):
    """Of DDPM's networks, which predict the noise at whole times t: σ_t = √((1 - ᾱ_t)/ᾱ_t), t uniform, λ = 1/σ².

        skip = 1,  out = -σ,  inward = 1/√(σ² + 1),  told = t

    so that the network sees √ᾱ_t (y + σ_t z) and the loss is that of z; betas are linear from 1e-4 to 0.02, T = 1000.
    Between whole times t is interpolated in ln σ.
    """

    def __init__(self) -> None:
        abar = alphas_cumprod()
        self.table = torch.from_numpy(np.sqrt((1 - abar) / abar))
        self.sigma_min, self.sigma_max = self.table[0].item(), self.table[-1].item()

    def levels(self, u: Tensor) -> Tensor:
        return self.table[(u.double() * len(self.table)).long().cpu()].to(u.device)

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2

    def coefficients(self, sigma: Any) -> Coefficients:
        return Coefficients(1.0, -sigma, 1.0 / (sigma**2 + 1) ** 0.5)

    def told(self, sigma: Tensor) -> Tensor:
        known = self.table.log().numpy()
        t = np.interp(sigma.double().log().cpu().numpy(), known, np.arange(len(known), dtype=np.float64))
        return torch.as_tensor(t, device=sigma.device)

    def sigma(self, told: Tensor) -> Tensor:
        known = self.table.log().numpy()
        return torch.as_tensor(np.interp(told.double().cpu().numpy(), np.arange(len(known)), known)).exp().to(told)


def formulation_of(name: str, sigma_data: float = 0.5, sign: float = 1.0) -> Formulation:
    """The formulation ``edm``, ``ve`` or ``ddpm``; ``sigma_data`` and ``sign`` are EDM's.

    Raises:
        InputError: another name, or a deviation that is not above 0.
    """
    if name not in get_args(FormulationName):
        raise InputError("formulation", name, f"one of {', '.join(get_args(FormulationName))}")
    if isinstance(sigma_data, bool) or not isinstance(sigma_data, (int, float)) or not 0 < sigma_data < math.inf:
        raise InputError("sigma_data", sigma_data, "a finite number above 0")
    if name == "edm":
        return EDMFormulation(sigma_data, sign=sign)
    return VEFormulation() if name == "ve" else DDPMFormulation()


def denoise(formulation: Formulation, network: Callable[..., Any], x: Tensor, sigma: Tensor, **given: Any) -> Tensor:
    """D(x, σ) of a ``network`` in a formulation; ``sigma`` (B,), float64; ``given`` goes to the network."""
    c = formulation.coefficients(sigma.reshape(-1, *[1] * (x.ndim - 1)))
    skip, out, inward = (torch.as_tensor(v).to(x) for v in c)
    output = network(inward * x, formulation.told(sigma).to(x), **given)
    return skip * x + out * getattr(output, "sample", output)


def loss(
    kernel: PFGMPPKernel,
    formulation: Formulation,
    network: Callable[..., Any],
    y: Tensor,
    sigma: Tensor,
    noise: Tensor,
    reference: tuple[Tensor, Tensor | None] | None = None,
    **given: Any,
) -> Tensor:
    """λ(σ) ‖D(y + σ noise, σ) - target‖²/N of each row, (B,).

    The target is y; or, with a ``reference``, the posterior mean over it (the stable target of Xu, Tong &
    Jaakkola, "Stable Target Field for Reduced Variance Score Estimation", ICLR 2023): the same minimiser with less
    variance, and a bias that falls with the size of the reference, which y must be part of.

    Args:
        kernel: of the noise; it matters for the stable target only.
        formulation: of the network.
        network: called as ``network(x, told, **given)``; returns a tensor or an output with ``.sample``.
        y: data (B, ...).
        sigma: levels (B,), float64.
        noise: of the kernel at σ = 1, (B, ...).
        reference: data (n, ...) and which of them a row may come from (B, n), or None for all.
    """
    x = (y + sigma.reshape(-1, *[1] * (y.ndim - 1)).to(y.device) * noise.double()).to(y.dtype)
    target = y if reference is None else posterior_mean(kernel, x, sigma, *reference)
    error = denoise(formulation, network, x, sigma, **given) - target
    return formulation.weight(sigma).to(error) * error.flatten(1).square().mean(1)


# ------------------------------------------------------------------ the scheduler


def _settings(
    self: Any,
    D: float | Literal["inf"] = "inf",
    formulation: FormulationName = "edm",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    sigma_schedule: SigmaSchedule = "karras",
    num_train_timesteps: int = 1000,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    rho: float = 7.0,
) -> None:
    """Only the signature matters: the settings that every scheduler in noise levels has."""


class SigmaScheduler(SlotScheduler):
    """Any solver over the noise level σ, for networks of a :class:`Formulation`; a subclass gives the solver.

    The grid of n steps is EDM's, and its end 0:

        karras:       σ_i = (σ_max^{1/ρ} + i/(n-1) (σ_min^{1/ρ} - σ_max^{1/ρ}))^ρ,  i = 0, ..., n-1
        exponential:  σ_i = σ_max (σ_min/σ_max)^{i/(n-1)}

    The settings are those of diffusers' ``EDMEulerScheduler`` (whose configuration it takes and gives), and D.

    Args:
        D: of the noise that the network was trained on; "inf" is Gaussian.
        formulation: edm, ve or ddpm: what the network sees and says.
        sigma_min, sigma_max: 0 < sigma_min < sigma_max, of the grid. Where sampling starts, the noise has scale
            sigma_max.
        sigma_data: of the formulation edm.
        sigma_schedule: karras or exponential.
        num_train_timesteps: noise levels in ``timesteps`` before a run is laid out.
        prediction_type: epsilon, or v_prediction where the network's output has the other sign (edm only).
        rho: ρ of the karras grid, above 0.

    Raises:
        InputError: a setting out of range; the sentence names it.
    """

    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    shared = staticmethod(_settings)
    resolution = 0.1

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler with the settings of another EDM scheduler's ``config``, changed by ``kwargs``.

        Raises:
            InputError: a keyword that is not a setting, or a configuration of another kind of scheduler.
        """
        if isinstance(config, dict) and "sigma_data" not in config and "beta_start" in config:
            name = config.get("_class_name", "a scheduler with betas")
            raise InputError("config", name, f"of an EDM scheduler (make a {cls.__name__}(formulation='ddpm') instead)")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _prepare(self) -> None:
        c: Any = self.config
        self.kernel = PFGMPPKernel(c.D)
        # As text, because JSON has no infinity.
        self.register_to_config(D="inf" if math.isinf(self.kernel.D) else self.kernel.D)
        for name in ("sigma_min", "sigma_max", "rho"):
            if isinstance(c[name], bool) or not isinstance(c[name], (int, float)) or not 0 < c[name] < math.inf:
                raise InputError(name, c[name], "a finite number above 0")
        if c.sigma_schedule not in get_args(SigmaSchedule):
            raise InputError("sigma_schedule", c.sigma_schedule, f"one of {', '.join(get_args(SigmaSchedule))}")
        kinds = ("epsilon", "v_prediction") if c.formulation == "edm" else ("epsilon",)
        if c.prediction_type not in kinds:
            raise InputError("prediction_type", c.prediction_type, f"one of {', '.join(kinds)}")
        self.formulation = formulation_of(c.formulation, c.sigma_data, -1.0 if c.prediction_type != "epsilon" else 1.0)
        self._process = VE(c.sigma_max, c.sigma_min)
        levels = torch.tensor(self._levels(c.num_train_timesteps), dtype=torch.float64)
        self.timesteps = self.formulation.told(levels).float()

    def _make_solver(self) -> Solver[Any]:
        return self.make_solver(self._process, **{name: self.config[name] for name in self._own_settings})  # type: ignore[attr-defined]

    def _levels(self, steps: int) -> list[float]:
        c: Any = self.config
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= 10_000:
            raise InputError("num_inference_steps", steps, "a whole number from 1 to 10000")
        i = np.linspace(0, 1, steps)
        if c.sigma_schedule == "karras":
            a, b = c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho)
            sigmas = (a + i * (b - a)) ** c.rho
        else:
            sigmas = c.sigma_max * (c.sigma_min / c.sigma_max) ** i
        ends = [c.sigma_max, c.sigma_min][:steps]  # which rounding must not miss
        return [*ends[:1], *sigmas[1:-1].tolist(), *ends[1:]]

    def _grid(self, solver: Solver[Any], steps: int) -> list[float]:
        return [*self._levels(steps), 0.0]

    def _own_grid(self, solver: Solver[Any], timesteps: Sequence[float]) -> list[float]:
        sigmas = self.formulation.sigma(torch.tensor([float(t) for t in timesteps], dtype=torch.float64)).tolist()
        # Single precision of the times must not lead beyond the ends.
        ends = (self._process.sigma_max, self._process.sigma_min)
        return [*(next((e for e in ends if math.isclose(s, e, rel_tol=1e-5)), s) for s in sigmas), 0.0]

    def _timestep(self, t: float) -> float:
        return self.formulation.told(torch.tensor(t, dtype=torch.float64)).item()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input: ``sample`` times the formulation's ``inward`` at the next of ``timesteps``.

        Raises:
            InputError: no run is laid out, or ``timestep`` is none of ``scheduler.timesteps``.
        """
        i = self._step_index
        if i is None:
            if timestep is None:
                raise InputError("timestep", None, "the next of scheduler.timesteps")
            i = self._begin(timestep)
        return sample * self.formulation.coefficients(self._slots[i].sigma).inward

    def _predict(self, output: Tensor, x: Tensor, slot: Slot) -> Prediction:
        c = self.formulation.coefficients(slot.sigma)
        return Prediction(x, 1.0, slot.sigma, x0=torch.add(x * c.skip, output, alpha=c.out))

    def _refuse(self, extra: dict[str, Any]) -> None:
        churn = ("s_churn", "s_tmin", "s_tmax", "s_noise")
        if extra.get("s_churn"):
            raise InputError("s_churn", extra["s_churn"], "0: added Gaussian noise leaves the noise law of finite D")
        super()._refuse({name: value for name, value in extra.items() if name not in churn})

    # -------------------------------------------------------------- the noise

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        """σ_max: what pipelines multiply their latents with.

        Multiplied with Gaussian latents it is where sampling starts only for D = inf. :class:`ClassConditionalPipeline`
        asks for :meth:`start` instead; give other pipelines ``latents=scheduler.sample_noise(shape, generator)``.
        """
        return float(self.config["sigma_max"])

    def sample_noise(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Noise of the kernel at σ = 1: for :meth:`add_noise`, or as the latents of another pipeline."""
        return self.kernel.noise(torch.empty(tuple(shape), device=device, dtype=dtype), generator)

    def prior(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """x at σ_max, where sampling starts: σ_max z √(D/w)."""
        return self.start(gaussian(torch.empty(tuple(shape), device=device, dtype=dtype), generator), generator)

    def start(self, latents: Tensor, generator: Generators = None) -> Tensor:
        """x at σ_max from standard normal ``latents`` (B, ...), with w from ``generator``."""
        return start(self.kernel, latents, self.init_noise_sigma, generator)

    def _levels_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        sigma = self.formulation.sigma(timesteps.flatten().double().cpu()).to(like.device, dtype)
        sigma = sigma.reshape(-1, *[1] * (like.ndim - 1))
        return torch.ones_like(sigma), sigma


class PFGMPPScheduler(SigmaScheduler):
    """EDM's deterministic sampler for networks that were trained on noise of any D.

    ``heun``: Heun's method in σ (EDM, algorithm 1), two calls a step and one in the last: 2n - 1 for n steps;
    ``euler``: Euler's, one call a step. The last step, to σ = 0, is x = D(x, σ_min).

        scheduler = PFGMPPScheduler.from_config(edm_pipe.scheduler.config, D=128)

    Args:
        solver: heun or euler.
    """

    def make_solver(self, process: VE, *, solver: SolverName = "heun") -> Solver[Any]:
        if solver not in get_args(SolverName):
            raise InputError("solver", solver, f"one of {', '.join(get_args(SolverName))}")
        # DDIM is Euler's method where alpha = 1, and its last step is D itself, not D up to rounding.
        return Heun(process) if solver == "heun" else DDIM(process)


def start(kernel: PFGMPPKernel, latents: Tensor, sigma_max: float, generator: Generators = None) -> Tensor:
    """x = σ_max z √(D/w) from standard normal ``latents``; at D = ∞ exactly ``latents`` times σ_max."""
    if math.isinf(kernel.D):
        return latents * sigma_max
    return times(latents, sigma_max * kernel.scales(uniform(latents, generator)))


# ------------------------------------------------------------------ the pipeline


class PFGMPPPipeline(ClassConditionalPipeline):
    """Samples a network that was trained on noise of one D, and starts there: x = σ_max z √(D/w).

    ``latents`` are standard normal as in any pipeline; w comes from the generator. Any scheduler in EDM's
    parametrisation samples it: :class:`PFGMPPScheduler`, diffusers' ``EDMEulerScheduler`` and
    ``EDMDPMSolverMultistepScheduler``.

    Args:
        unet, scheduler, null_label: as in :class:`ClassConditionalPipeline`.
        D: of the noise in training; None is the scheduler's.
        formulation: of the network; None is the scheduler's.

    Raises:
        InputError: a scheduler of another D, or in another parametrisation.
    """

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        null_label: int | None = None,
        D: float | str | None = None,
        formulation: str | None = None,
    ) -> None:
        super().__init__(unet, scheduler, null_label)
        config: Any = scheduler.config  # type: ignore[attr-defined]
        kernel = PFGMPPKernel(dimension(config.get("D", "inf") if D is None else D))
        formulation = formulation or config.get("formulation", "edm")
        self.register_to_config(D="inf" if math.isinf(kernel.D) else kernel.D, formulation=formulation)
        self._kernel()

    def _kernel(self) -> PFGMPPKernel:
        """The kernel of the training, if the scheduler can sample for it."""
        kernel, config = PFGMPPKernel(self.config.D), self.scheduler.config
        # Its own settings: from_config also keeps those of the scheduler before it.
        own = inspect.signature(type(self.scheduler).__init__).parameters
        name, formulation = type(self.scheduler).__name__, self.config.formulation
        if "sigma_data" not in own or (config["formulation"] if "formulation" in own else "edm") != formulation:
            allowed = "PFGMPPScheduler, or EDM's of diffusers" if formulation == "edm" else "PFGMPPScheduler"
            raise InputError("scheduler", name, f"one for a network of the formulation {formulation}: {allowed}")
        if "D" in own and PFGMPPKernel(config["D"]) != kernel:
            allowed = f"{kernel.D:g}, that of the noise which the network was trained on"
            raise InputError("D of the scheduler", config["D"], allowed)
        return kernel

    def _start(self, latents: Tensor, generator: Generators) -> Tensor:
        return start(self._kernel(), latents, float(self.scheduler.config["sigma_max"]), generator)


PFGMPPPipeline.__module__ = "steersman.diffusion"


# ------------------------------------------------------------------ training


@dataclass(frozen=True)
class PFGMPPTraining:
    """What :func:`train_pfgmpp` made.

    Args:
        pipeline: with the averaged weights.
        losses: the mean loss of each step's batch.
        cut: the share of noise draws whose scale was cut off at :data:`LARGEST_SCALE`.
        images: seen in training, with repetition.
        seconds: that it took.
    """

    pipeline: PFGMPPPipeline
    losses: list[float] = field(repr=False)
    cut: float
    images: int
    seconds: float


def train_pfgmpp(
    images: Tensor,
    labels: Tensor | None = None,
    *,
    D: float | Literal["inf"] = 128.0,
    formulation: FormulationName = "edm",
    unet: ModelMixin | None = None,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    ramp_up: int | None = None,
    half_life: int = 500_000,
    label_dropout: float = 0.1,
    max_grad_norm: float = 1.0,
    sigma_data: float = 0.5,
    stf: bool = False,
    reference: int = 4096,
    width: int = 32,
    dropout: float = 0.13,
    seed: int = 0,
    device: torch.device | str | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> PFGMPPTraining:
    """Train a network from scratch on the noise of D.

        θ <- Adam(θ, clip ∇_θ mean λ(σ) ‖D_θ(y + σ z √(D/w), σ, label) - y‖²),    β = (0.9, 0.999)
        θ_ema <- θ + 2^{-batch/h} (θ_ema - θ),    h = min(half_life, 0.05 images seen so far)

    The draws of a seed (batches, labels dropped, levels, z and the quantiles of w) are the same for every D and
    formulation, so that trainings can be compared pair by pair.

    Args:
        images: in [0, 1], (n, C, H, W); the network sees them in [-1, 1].
        labels: whole numbers from 0, (n,); the label after the last one becomes the null label.
        D: a number above 0, or inf (EDM itself). The authors tried 64 to 2048 on images.
        formulation: edm, ve or ddpm.
        unet: a ``UNet2DModel`` to be trained (its weights as they are); None makes one.
        steps: of the optimizer.
        batch_size: images of a step.
        learning_rate: of Adam, from 0 up linearly over the first ``ramp_up`` images.
        ramp_up: images; None is a tenth of all, at most 10 million.
        half_life: of the averaged weights, in images.
        label_dropout: the share of labels replaced by the null label.
        max_grad_norm: the gradient is scaled to at most this norm: at D up to 2 single draws are enormous.
        sigma_data: of the formulation edm.
        stf: train on the stable target (see :func:`loss`), over a reference batch. With labels, a row's target is
            the mean over images of its own label (the null label: over all).
        reference: images of the reference batch, at least ``batch_size``.
        width, dropout: of the network that is made: channels (a multiple of 8) and dropout.
        seed: of everything random.
        device: None is the first GPU where there is one.
        callback: called with the step and its loss.

    Raises:
        InputError: an argument that is not allowed.
        TrialError: a loss that is not finite.
    """
    started = time.perf_counter()
    kernel, form = PFGMPPKernel(dimension(D)), formulation_of(formulation, sigma_data)
    whole = {"steps": (steps, 0), "batch_size": (batch_size, 1), "half_life": (half_life, 1), "width": (width, 8)}
    whole |= {"seed": (seed, 0), "ramp_up": (0 if ramp_up is None else ramp_up, 0), "reference": (reference, 1)}
    for name, (number, least) in whole.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(name, number, f"a whole number from {least}")
    for name, share, low, high in (
        ("learning_rate", learning_rate, 0.0, math.inf),
        ("label_dropout", label_dropout, 0.0, 1.0),
        ("dropout", dropout, 0.0, 1.0),
    ):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not low <= share < high:
            raise InputError(name, share, f"a number from {low:g} to below {high:g}")
    if not isinstance(max_grad_norm, (int, float)) or not max_grad_norm > 0:
        raise InputError("max_grad_norm", max_grad_norm, "a number above 0 (inf never clips)")
    if stf and reference < batch_size:
        raise InputError("reference", reference, f"at least batch_size={batch_size}, which the reference holds")
    classes = _check_data(images, labels)
    null = None if classes is None else classes
    if unet is None:
        unet = _network(images.shape[1:], None if classes is None else classes + 1, width, dropout, seed)
    _check_network(unet, images, classes)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net: Any = unet
    net.to(where).train().requires_grad_(True)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, betas=(0.9, 0.999))
    y, total, cut = 2 * images.float() - 1, steps * batch_size, 0
    ramp = min(total // 10, 10_000_000) if ramp_up is None else ramp_up
    # One stream for each purpose: what one of them takes does not move the others.
    draws = {name: _stream(seed, name) for name in ("batch", "label", "level", "z", "w", "reference")}
    order, losses = torch.empty(0, dtype=torch.long), []
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout
        for step in range(steps):
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(y), generator=draws["batch"])])
            index, order = order[:batch_size], order[batch_size:]
            sigma = form.levels(torch.rand(batch_size, generator=draws["level"], dtype=torch.float64))
            z, u = torch.randn(y[index].shape, generator=draws["z"]), uniform(index, draws["w"])
            scale = kernel.scales(u)
            cut += int((scale >= LARGEST_SCALE).sum())
            chosen, given = None, {}
            if labels is not None and null is not None:
                dropped = torch.rand(batch_size, generator=draws["label"]) < label_dropout
                chosen = labels[index].masked_fill(dropped, null)
                given["class_labels"] = chosen.to(where)
            rows = _reference(y, labels, index, chosen, null, reference, draws["reference"]) if stf else None
            noise = (z.double() * scale.reshape(-1, *[1] * (z.ndim - 1))).to(where)
            target = None if rows is None else (rows[0].to(where), None if rows[1] is None else rows[1].to(where))
            value = loss(kernel, form, net, y[index].to(where), sigma.to(where), noise, target, **given).mean()
            if not bool(value.isfinite()):
                raise TrialError(f"the loss is not finite at step {step + 1}: lower learning_rate")
            optimizer.param_groups[0]["lr"] = learning_rate * min(step * batch_size / max(ramp, 1e-8), 1.0)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(net.parameters(), max_grad_norm)
            optimizer.step()
            life = min(half_life, 0.05 * step * batch_size)
            keep = 0.5 ** (batch_size / max(life, 1e-8))
            with torch.no_grad():
                for averaged, parameter in zip(ema.parameters(), net.parameters(), strict=True):
                    averaged.lerp_(parameter, 1 - keep)
            losses.append(value.item())
            if callback is not None:
                callback(step + 1, losses[-1])
    ends = {"sigma_min": form.sigma_min, "sigma_max": form.sigma_max, "sigma_data": float(sigma_data)}
    scheduler = PFGMPPScheduler.from_config({"D": kernel.D, "formulation": formulation, **ends})
    pipeline = PFGMPPPipeline(ema, scheduler, null)
    return PFGMPPTraining(pipeline, losses, cut / max(total, 1), total, time.perf_counter() - started)


def _check_data(images: Tensor, labels: Tensor | None) -> int | None:
    """The number of classes, None without labels."""
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) < 1 or not images.is_floating_point():
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError("images", shape, "a floating-point tensor of shape (n, channels, height, width)")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InputError("images", f"values from {low:.3g} to {high:.3g}", "in [0, 1]")
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError("labels", shape, f"whole numbers of shape ({len(images)},), one for each image")
    if int(labels.min()) < 0:
        raise InputError("labels", int(labels.min()), "whole numbers from 0")
    return int(labels.max()) + 1


def _check_network(unet: Any, images: Tensor, classes: int | None) -> None:
    """Refuse a network that has other channels, or other labels, than the data."""
    config = unet.config
    if config.in_channels != images.shape[1] or config.out_channels != images.shape[1]:
        allowed = f"of {images.shape[1]} channels, as the images"
        raise InputError("unet", f"{config.in_channels} to {config.out_channels} channels", allowed)
    embeds = config.num_class_embeds
    if (classes is None) != (embeds is None) or (classes is not None and embeds < classes + 1):
        allowed = (
            "without labels, as the images" if classes is None else f"of {classes + 1} labels, the null label last"
        )
        raise InputError("unet", f"{embeds or 'no'} labels", allowed)


def _network(shape: Sequence[int], embeds: int | None, width: int, dropout: float, seed: int) -> UNet2DModel:
    """A U-Net for images of ``shape`` (C, H, W): halved down to about 4 pixels, attention at the lowest two sizes."""
    if width % 8:
        raise InputError("width", width, "a multiple of 8")
    channels, height, breadth = shape
    depth = 1
    while depth < 4 and height % 2**depth == breadth % 2**depth == 0 and min(height, breadth) >= 8 * 2 ** (depth - 1):
        depth += 1
    attention = [False, *[depth - i <= 2 for i in range(1, depth)]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=(height, breadth) if height != breadth else height,  # type: ignore[arg-type]
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=tuple(width * min(2**i, 4) for i in range(depth)),
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            attention_head_dim=8,
            norm_num_groups=8,
            dropout=dropout,
            num_class_embeds=embeds,
        )


def _reference(
    y: Tensor,
    labels: Tensor | None,
    index: Tensor,
    chosen: Tensor | None,
    null: int | None,
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """The batch and further data, ``count`` of them or all, and which of them each row's target is taken over."""
    others = torch.randperm(len(y), generator=generator)
    rows = torch.cat([index, others[~torch.isin(others, index)]])[: max(count, len(index))]
    if labels is None or chosen is None:
        return y[rows], None
    same = labels[rows][None, :].eq(chosen[:, None])
    return y[rows], same | chosen.eq(-1 if null is None else null)[:, None]


def _stream(seed: int, purpose: str) -> torch.Generator:
    entropy = [seed, *purpose.encode()]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    D: float = 128.0,
    formulation: FormulationName = "edm",
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    half_life: int = 500_000,
    label_dropout: float = 0.1,
    stf: bool = False,
    reference: int = 4096,
    width: int = 32,
    dropout: float = 0.13,
) -> dict[str, Any]:
    """Train a network from scratch and save it as a pipeline folder.

    Args:
        subject: images to train on (a folder, .zip, .npz or .npy), or the name of a reference subject whose images
            ``input`` holds.
        input: images to train on, in place of the subject's; labels of class folders, a ``dataset.json`` or an
            .npz make the network class-conditional.
        out: where the pipeline folder goes.
        seed: of everything random.
        log: gets a line now and then.
        D: a number above 0, or inf (EDM).
        formulation: edm, ve or ddpm.
        steps: of the optimizer.
        batch_size: images of a step.
        learning_rate: of Adam.
        half_life: of the averaged weights, in images.
        label_dropout: the share of labels replaced by the null label.
        stf: train on the stable target.
        reference: images of its reference batch.
        width: channels of the network, a multiple of 8.
        dropout: of the network.

    Returns:
        dict: the last loss, the share of noise draws that were cut off, and what was done.

    Raises:
        InputError: images or settings that don't fit together.
    """
    images, labels = read_images(Path(subject) if input is None else input, channels=None, labelled=None)
    recent: list[float] = []

    def report(step: int, value: float) -> None:
        recent.append(value)
        if step % max(steps // 20, 1) == 0 or step == steps:
            log(f"step {step}/{steps}: loss {np.mean(recent):.4g}")
            recent.clear()

    made = train_pfgmpp(
        images,
        labels,
        D=D,
        formulation=formulation,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        half_life=half_life,
        label_dropout=label_dropout,
        stf=stf,
        reference=reference,
        width=width,
        dropout=dropout,
        seed=seed,
        callback=report,
    )
    made.pipeline.save_pretrained(out)
    return {
        "D": dimension(D),
        "formulation": formulation,
        "steps": steps,
        "images_seen": made.images,
        "loss": float(np.mean(made.losses[-max(steps // 20, 1) :])) if made.losses else None,
        "noise_cut_off": made.cut,
        "classes": None if labels is None else int(labels.max()) + 1,
        "parameters": sum(p.numel() for p in made.pipeline.unet.parameters()),
        "seconds": made.seconds,
    }
