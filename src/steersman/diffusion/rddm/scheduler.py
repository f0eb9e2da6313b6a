r"""The reverse process as a diffusers scheduler.

From a level (ᾱ_t, β̄_t) to any earlier one (ᾱ_s, β̄_s), with Δα = ᾱ_t - ᾱ_s and Δβ² = β̄_t² - β̄_s²,

    I_s = I_t - Δα Î_res - (β̄_t - √(β̄_s² - σ²)) ε̂ + σ z,    z ~ N(0, I),    σ² = η Δβ² β̄_s² / β̄_t².

η = 0 is deterministic; η = 1 draws from the posterior of I_s. The last step gives Î_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from steersman.diffusion.rddm.levels import (
    CLEAN,
    SCHEDULES,
    Levels,
    Move,
    PathName,
    ScheduleName,
    grid,
    increments,
    legs,
    moves,
    own_path,
)
from steersman.diffusion.rddm.predictions import Estimate, PredictionKind, estimate, heads
from steersman.diffusion.scheduler import ROOM, PerStep, alphas_cumprod, spaced
from steersman.diffusion.solver import Generators, gaussian
from steersman.errors import InputError, nearest

CONVERTED = ("epsilon", "v_prediction", "sample")
"""Kinds of prediction of DDIM's networks, which keep their names."""


@dataclass
class RDDMSchedulerOutput(BaseOutput):
    """What ``step`` returns.

    Args:
        prev_sample: where the network is to be evaluated next; after the last step, the result.
        pred_original_sample: Î_0.
        pred_residual: Î_res.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor
    pred_residual: Tensor


class RDDMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Residual denoising diffusion (Liu et al. 2024, arXiv 2308.13712), see the module's equations.

    A new one is for a network trained by :func:`~steersman.diffusion.rddm.train_rddm`; one for a network of DDIM (or
    DDPM, PNDM, ...) is ``RDDMScheduler.from_ddim(pipe.scheduler)``, or ``from_config`` of its configuration.

    Args:
        num_train_timesteps: T.
        residual_schedule, residual_power: of α, see :func:`~steersman.diffusion.rddm.levels.increments`; ``ddim``
            is 1 - √abar of the betas below.
        noise_schedule, noise_power: of β²; ``ddim`` is 1 - abar.
        sum_scale: s, the variance of the noise at the start; 0 is a process without noise, for ``res`` and ``sample``.
        prediction_type: what the network gives: res_noise (SM-Res-N), res (SM-Res), epsilon (SM-N),
            x0_noise, res_add_noise, x0_add_noise, sample; v_prediction for converted networks.
        eta: η, from 0 to 1.
        variance: ``rddm`` is the module's σ²; ``ddim`` is DDIM's, with the *deviation* multiplied by η:
            σ² = η² Δβ² β̄_s² / (β̄_t² (1 - β̄_s²)).
        step_form: how the step is written: ``noise`` as above; ``start`` with ε̂ eliminated,
            k I_t + (1 - k) Î_0 + (ᾱ_s - k ᾱ_t) Î_res + σ z, k = √(β̄_s² - σ²) / β̄_t; ``closed``
            Î_0 + ᾱ_s Î_res + √(β̄_s² - σ²) ε̂ + σ z, which is DDIM's. They agree where nothing is clipped.
        clip_sample, clip_sample_range: clip Î_0 to ± the range.
        residual_range: clip Î_res to ± this; None leaves it. 1 is what the authors' code does, which destroys
            residuals from black to white.
        condition: what the networks are told: ``time`` t, or ``levels`` ᾱ T (residual) and β̄ T (noise), which lets
            the two be taken away in any order.
        loop_levels: tell them the loop's levels in paths of two legs, as the authors' script does.
        residual_from: where ``residual_schedule`` is not the one that a network of DDIM was trained on: Î_res is
            found by the ``trained`` ᾱ, as in the authors' code, or by that of the ``path``.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: of the schedules ``ddim``.
        timestep_spacing, steps_offset: of the grid: ``floor`` is the published ⌊linspace(-1, T - 1, n + 1)⌋;
            leading, trailing and linspace are DDIM's.
        set_alpha_to_one: with the schedules ``ddim``, end at the clean image, otherwise at the first noise level.

    Raises:
        InputError: a setting out of range, or two that exclude each other.
    """

    order: int = 1
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        residual_schedule: ScheduleName = "decreasing",
        residual_power: float = 1.0,
        noise_schedule: ScheduleName = "increasing",
        noise_power: float = 1.0,
        sum_scale: float = 1.0,
        prediction_type: PredictionKind = "res",
        eta: float = 0.0,
        variance: Literal["rddm", "ddim"] = "rddm",
        step_form: Literal["noise", "start", "closed"] = "noise",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        residual_range: float | None = 2.0,
        condition: Literal["time", "levels"] = "time",
        loop_levels: bool = False,
        residual_from: Literal["trained", "path"] = "trained",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | np.ndarray | None = None,
        rescale_betas_zero_snr: bool = False,
        timestep_spacing: Literal["floor", "leading", "trailing", "linspace"] = "floor",
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
    ) -> None:
        self.levels = self._levels()
        self._check()
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor = torch.arange(num_train_timesteps - 1, -1, -1)
        self._moves: list[Move] = []
        self._reset()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler of another one's ``config``, changed by ``kwargs``; that of a DDIM-like one is converted.

        Raises:
            InputError: a configuration of another kind of process, or a keyword that is no setting.
        """
        if isinstance(config, dict) and "residual_schedule" not in config and config:
            name = config.get("_class_name", "another scheduler")
            if "beta_start" not in config:
                raise InputError("config", name, "of an RDDMScheduler, or of a scheduler with betas, as DDIMScheduler")
            kind = str(config.get("prediction_type", "epsilon"))
            if kind not in CONVERTED:
                raise InputError("prediction_type", kind, nearest(kind, CONVERTED))
            if config.get("thresholding"):
                raise InputError("thresholding", True, "false: residuals have no dynamic threshold")
            same: tuple[str, ...] = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
            same += ("rescale_betas_zero_snr", "set_alpha_to_one", "steps_offset", "clip_sample", "clip_sample_range")
            converted = {name: config[name] for name in same if name in config}
            converted |= {"residual_schedule": "ddim", "noise_schedule": "ddim", "prediction_type": kind}
            converted |= {"variance": "ddim", "step_form": "closed", "residual_range": None}
            converted["timestep_spacing"] = config.get("timestep_spacing", "leading")
            converted.setdefault("clip_sample", False)
            config = converted
        if not return_unused_kwargs:
            known = cls._get_init_keys(cls) - {"self", "kwargs"}  # type: ignore[attr-defined]
            for name in kwargs:
                if name not in (*known, "dtype", "torch_dtype"):
                    raise InputError("setting of RDDMScheduler", name, nearest(name, known))
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_ddim(cls, scheduler: Any, **settings: Any) -> RDDMScheduler:
        """The scheduler of the same network: ᾱ = 1 - √abar, β̄ = √(1 - abar), I_in = 0.

        With η = 0 its steps are DDIM's; with η > 0 too, unless ``variance="rddm"``. Another ᾱ for a trained network
        is ``residual_schedule="power_decreasing", residual_power=0.3``.

        Args:
            scheduler: diffusers' (DDIM, DDPM, PNDM, ...) or this package's.
            settings: of the new scheduler.
        """
        if not isinstance(scheduler, SchedulerMixin):
            raise InputError("scheduler", type(scheduler).__name__, "a diffusers scheduler")
        return cls.from_config(scheduler.config, **settings)  # type: ignore[attr-defined]

    def to_ddim(self, **settings: Any) -> DDIMScheduler:
        """diffusers' DDIM of the same network, of one that was converted: abar = (1 - ᾱ)² = 1 - β̄².

        Raises:
            InputError: other levels, or a network that gives what DDIM can't read.
        """
        c: Any = self.config
        if c.residual_schedule != "ddim":
            allowed = "ddim, where (1 - alpha)^2 + beta^2 = 1 (networks of other levels see other inputs)"
            raise InputError("residual_schedule", c.residual_schedule, allowed)
        if c.prediction_type not in CONVERTED:
            raise InputError("prediction_type", c.prediction_type, nearest(c.prediction_type, CONVERTED))
        made = {
            "num_train_timesteps": c.num_train_timesteps,
            "prediction_type": c.prediction_type,
            "clip_sample": c.clip_sample,
            "clip_sample_range": c.clip_sample_range,
            "set_alpha_to_one": c.set_alpha_to_one,
            "steps_offset": c.steps_offset,
            "timestep_spacing": "trailing" if c.timestep_spacing == "floor" else c.timestep_spacing,
        }
        names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
        made |= {name: c[name] for name in names}
        return DDIMScheduler(**(made | settings))

    # -------------------------------------------------------------- settings

    def _levels(self) -> Levels:
        c: Any = self.config
        T, s = c.num_train_timesteps, c.sum_scale
        for name in ("residual_schedule", "noise_schedule"):
            if c[name] not in SCHEDULES:
                raise InputError(name, c[name], nearest(str(c[name]), SCHEDULES))
        if isinstance(s, bool) or not isinstance(s, (int, float)) or not 0 <= s < math.inf:
            raise InputError("sum_scale", s, "a finite number from 0")
        end = CLEAN
        trained: Levels | None = None
        if c.noise_schedule == "ddim":
            table = (c.num_train_timesteps, c.beta_start, c.beta_end, c.beta_schedule, c.trained_betas)
            abar = alphas_cumprod(*table, c.rescale_betas_zero_snr)
            trained = Levels.from_alphas_cumprod(abar, 1.0 if c.set_alpha_to_one else float(abar[0]))
            end = trained.end
            # What training code and other methods read.
            self.alphas_cumprod = torch.from_numpy(abar.astype(np.float32))
            beta = trained.beta
            if s != 1.0:
                raise InputError("sum_scale", s, "1 with noise_schedule='ddim', whose noise is that of the betas")
        else:
            beta = np.sqrt(s * np.cumsum(increments(c.noise_schedule, T, c.noise_power)))
        if c.residual_schedule == "ddim":
            if trained is None:
                raise InputError("noise_schedule", c.noise_schedule, "ddim, as residual_schedule is")
            self._trained_rest: np.ndarray | None = None
            return trained
        alpha = np.cumsum(increments(c.residual_schedule, T, c.residual_power))
        alpha[-1] = 1.0
        readjusted = trained is not None and c.residual_from == "trained"
        self._trained_rest = 1 - trained.alpha if readjusted and trained is not None else None
        return Levels(np.minimum(alpha, 1.0), beta, CLEAN if end == CLEAN else end)

    def _check(self) -> None:
        c: Any = self.config
        heads(c.prediction_type)
        choices: dict[str, tuple[str, ...]] = {
            "variance": ("rddm", "ddim"),
            "step_form": ("noise", "start", "closed"),
            "condition": ("time", "levels"),
            "residual_from": ("trained", "path"),
            "timestep_spacing": ("floor", "leading", "trailing", "linspace"),
        }
        for name, options in choices.items():
            if c[name] not in options:
                raise InputError(name, c[name], nearest(str(c[name]), options))
        if isinstance(c.eta, bool) or not isinstance(c.eta, (int, float)) or not 0 <= c.eta <= 1:
            raise InputError("eta", c.eta, "a number from 0 to 1 (above it, sigma^2 could exceed the noise left)")
        for name in ("clip_sample_range", "residual_range"):
            if name == "residual_range" and c[name] is None:
                continue
            if isinstance(c[name], bool) or not isinstance(c[name], (int, float)) or not c[name] > 0:
                raise InputError(name, c[name], "a number above 0")
        converted = c.residual_schedule == "ddim"
        if c.sum_scale == 0 and c.prediction_type not in ("res", "sample"):
            raise InputError("sum_scale", c.sum_scale, "above 0 for networks that predict noise")
        if c.prediction_type == "epsilon" and not c.clip_sample and not converted and self._trained_rest is None:
            allowed = "true for SM-N: 1 - alpha falls to 0, and only clipping keeps the estimate of the image finite"
            raise InputError("clip_sample", c.clip_sample, allowed)
        if c.prediction_type == "v_prediction" and not converted:
            raise InputError("prediction_type", "v_prediction", "of a converted network on its own levels (from_ddim)")
        if c.variance == "ddim" and float(self.levels.beta[-1]) > 1:
            raise InputError("variance", "ddim", "rddm where the noise has a variance above 1 (sum_scale)")

    # -------------------------------------------------------------- the plan

    @property
    def init_noise_sigma(self) -> float:
        """β̄_T, what standard normal noise is multiplied with at the start; 1 as in DDIM for converted networks."""
        return 1.0 if self.config["noise_schedule"] == "ddim" else self.levels.start.beta

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        path: PathName | Sequence[tuple[float, float]] = "simultaneous",
    ) -> None:
        """Lay out a run; one network call each.

        Args:
            num_inference_steps: n, from 1 to T.
            device: where ``scheduler.timesteps`` goes.
            timesteps: falling timesteps instead of n.
            path: both levels together; residual_first or noise_first, half of the calls each; or pairs (ᾱ, β̄) of
                your own (then n is left out). All but the first need a network that was trained on levels.

        Raises:
            InputError: not just one of the three given, or out of range.
        """
        named = isinstance(path, str)
        if (num_inference_steps is not None) + (timesteps is not None) + (not named) != 1:
            raise InputError("num_inference_steps", num_inference_steps, "given, or timesteps, or a path of levels")
        if path != "simultaneous" and self.config["condition"] != "levels":
            allowed = "simultaneous, unless networks are told the levels (condition='levels')"
            raise InputError("path", path, allowed)
        if not named:
            self._moves = own_path(self.levels, path)
        elif path not in get_args(PathName):
            raise InputError("path", path, f"{nearest(str(path), get_args(PathName))}, or pairs of levels")
        elif path != "simultaneous":
            if num_inference_steps is None:
                raise InputError("timesteps", timesteps, f"left out with path={path!r}")
            self._moves = legs(self.levels, str(path), num_inference_steps, self.config["loop_levels"])
        else:
            self._moves = moves(self.levels, self._times(num_inference_steps, timesteps))
        self.num_inference_steps = len(self._moves)
        times = [move.timestep if move.timestep >= 0 else i for i, move in enumerate(self._moves)]
        self.timesteps = torch.tensor(times, dtype=torch.int64, device=device)
        self.order = PerStep(1)
        self._reset()

    def _times(self, steps: int | None, timesteps: Sequence[int] | None) -> list[int]:
        c: Any = self.config
        if timesteps is not None:
            own = [int(t) for t in timesteps]
            falls = all(s < t for t, s in pairwise(own))
            if not own or not falls or own[-1] < 0 or own[0] >= len(self.levels) or own != list(timesteps):
                raise InputError("timesteps", timesteps, f"falling whole numbers from {len(self.levels) - 1} to 0")
            return [*own, -1]
        assert steps is not None
        if c.timestep_spacing == "floor":
            return grid(len(self.levels), steps)
        return [int(t) for t in spaced(c.timestep_spacing, steps, c.num_train_timesteps, c.steps_offset)]

    def _reset(self) -> None:
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @property
    def moves(self) -> tuple[Move, ...]:
        """The plan of the run: levels before and after each network call."""
        return tuple(self._moves)

    @property
    def step_index(self) -> int | None:
        """The next step's place in the plan; None before the first and after the last."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the run begins, if a pipeline set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at step ``begin_index`` (img2img).

        Raises:
            InputError: there is no such step.
        """
        if not 0 <= begin_index < max(len(self._moves), 1):
            raise InputError("begin_index", begin_index, f"from 0 to {len(self._moves) - 1}")
        self._reset()
        self._begin_index = int(begin_index)

    # -------------------------------------------------------------- a step

    def step(
        self,
        model_output: Tensor | Sequence[Tensor],
        timestep: float | Tensor,
        sample: Tensor,
        x_in: Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
        **extra: Any,
    ) -> RDDMSchedulerOutput | tuple[Tensor]:
        """I_s from I_t and what the network gave there.

        Args:
            model_output: one tensor a head, or all heads in the channels of one.
            timestep: the next of ``scheduler.timesteps``.
            sample: I_t, (B, C, ...).
            x_in: I_in in [-1, 1], the shape of ``sample``; None (0) for generation.
            generator: for z, where η > 0; a list holds one per sample.
            return_dict: an :class:`RDDMSchedulerOutput`; otherwise the tuple ``(prev_sample,)``.

        Raises:
            InputError: no ``set_timesteps`` yet, a timestep that is not the next one, or shapes that don't fit.
        """
        c: Any = self.config
        for name, value in extra.items():
            if name not in ("eta", "use_clipped_model_output"):
                raise InputError("argument of RDDMScheduler.step", name, "left out")
            if name == "eta" and value and value != c.eta:
                raise InputError("eta", value, "set on the scheduler (RDDMScheduler.from_config(config, eta=...))")
        dtype = torch.promote_types(sample.dtype, torch.float32)
        outputs = [o.to(dtype) for o in self._heads(model_output, sample)]
        if x_in is not None and x_in.shape != sample.shape:
            raise InputError("x_in", tuple(x_in.shape), f"of the sample's shape {tuple(sample.shape)}")
        i = self._step_index
        if i is None:
            i = self._begin(timestep)
        move, x = self._moves[i], sample.to(dtype)
        self._check_time(timestep, int(self.timesteps[i]) if self.timesteps.device.type == "cpu" else None)
        found = self._estimate(outputs, x, 0.0 if x_in is None else x_in.to(dtype), move)
        after = found.x0 if move.stop == CLEAN else self._move(x, found, move, generator)
        after = after.to(sample.dtype)
        self._step_index = None if i + 1 == len(self._moves) else i + 1
        if not return_dict:
            return (after,)
        return RDDMSchedulerOutput(after, found.x0.to(sample.dtype), found.res.to(sample.dtype))

    def _estimate(self, outputs: Sequence[Tensor], x: Tensor, x_in: Tensor | float, move: Move) -> Estimate:
        c: Any = self.config
        rest = None if self._trained_rest is None else float(self._trained_rest[move.timestep])
        clip = c.clip_sample_range if c.clip_sample else None
        kind = c.prediction_type
        return estimate(kind, outputs, x, x_in, move.start, clip=clip, clip_residual=c.residual_range, rest=rest)

    def _move(self, x: Tensor, found: Estimate, move: Move, generator: Generators) -> Tensor:
        c: Any = self.config
        (a_t, b_t), (a_s, b_s) = move.start, move.stop
        variance = 0.0
        if c.eta > 0 and b_t > 0:
            variance = c.eta * (b_t**2 - b_s**2) * b_s**2 / b_t**2
            if c.variance == "ddim":
                variance *= c.eta / (1 - b_s**2) if b_s < 1 else 0.0
        left = math.sqrt(max(b_s**2 - variance, 0.0))
        if c.step_form == "closed":
            after = torch.add(found.x0, found.res, alpha=a_s)
            if left and found.eps is not None:
                after = torch.add(after, found.eps, alpha=left)
        elif c.step_form == "start" and b_t > 0:
            k = left / b_t
            after = torch.add(k * x + (1 - k) * found.x0, found.res, alpha=a_s - k * a_t)
        else:
            after = torch.add(x, found.res, alpha=a_s - a_t) if a_s != a_t else x
            if left != b_t and found.eps is not None:
                after = torch.add(after, found.eps, alpha=left - b_t)
        if variance > 0:
            after = torch.add(after, gaussian(x, generator), alpha=math.sqrt(variance))
        return after

    def _heads(self, model_output: Tensor | Sequence[Tensor], sample: Tensor) -> list[Tensor]:
        n = heads(self.config["prediction_type"])
        given = list(model_output) if not isinstance(model_output, Tensor) else [model_output]
        if len(given) == 1 and n == 2 and given[0].ndim > 1 and given[0].shape[1] == 2 * sample.shape[1]:
            given = list(given[0].chunk(2, dim=1))
        if len(given) != n or any(o.shape != sample.shape for o in given):
            shapes = [tuple(o.shape) for o in given]
            allowed = f"{n} of the sample's shape {tuple(sample.shape)} ({self.config['prediction_type']})"
            raise InputError("model_output", shapes, allowed)
        return given

    def _begin(self, timestep: float | Tensor) -> int:
        if not self._moves:
            raise InputError("scheduler", "RDDMScheduler", "given its steps first: call set_timesteps")
        if self._begin_index is not None:
            return self._begin_index
        t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        for i, own in enumerate(self.timesteps.tolist()):
            if own == t:
                return i
        raise InputError("timestep", t, "one of scheduler.timesteps (not an index into them)")

    def _check_time(self, timestep: float | Tensor, due: int | None) -> None:
        if isinstance(timestep, Tensor):
            if timestep.device.type != "cpu" or timestep.ndim:
                return  # reading it would wait for the device
            timestep = timestep.item()
        if due is not None and timestep != due:
            raise InputError("timestep", timestep, f"{due}, the next of scheduler.timesteps")

    def take(self, index: Any) -> None:
        """Re-index the samples of a run in progress: nothing is carried from step to step but the sample itself."""

    # -------------------------------------------------------------- the forward process

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input at ``sample``: the sample itself."""
        return sample

    def levels_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ and β̄ at ``timesteps`` (B,), to be multiplied with ``like`` (B, ...)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        index, shape = timesteps.flatten().long().cpu(), (-1, *[1] * (like.ndim - 1))
        alpha, beta = (torch.from_numpy(table)[index] for table in (self.levels.alpha, self.levels.beta))
        return alpha.to(like.device, dtype).reshape(shape), beta.to(like.device, dtype).reshape(shape)

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """I_t = I_0 + ᾱ_t I_res + β̄_t ε.

        Args:
            original_samples: I_0, (B, ...).
            noise: ε, alike.
            timesteps: one a sample, or one for all.
            residual: I_res = I_in - I_0; None is that of I_in = 0.
        """
        if residual is None:
            residual = -original_samples
        if residual.shape != original_samples.shape or noise.shape != original_samples.shape:
            shapes = f"{tuple(residual.shape)} and {tuple(noise.shape)}"
            raise InputError("residual and noise", shapes, f"of the target's shape {tuple(original_samples.shape)}")
        alpha, beta = self.levels_at(timesteps, original_samples)
        return (original_samples + alpha * residual + beta * noise).to(original_samples.dtype)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


# The stable path that saved pipelines record.
RDDMScheduler.__module__ = ROOM
