r"""CFG++ on a pipeline: a guidance that brings the scheduler it needs, or a scale for each step.

A step of CFG++ uses the guided estimate D_lambda and the unconditional noise eps_u. There are two ways to it:

- a scheduler that takes both outputs (:class:`~steersman.diffusion.cfg_pp.solvers.CFGPPScheduler`); the guidance
  gives it D_lambda and, beside it, the unconditional output;
- a deterministic scheduler of first order as it is, with ordinary guidance of scale
  omega_i = lambda r_i / (r_i - r_{i+1}) at step i, r = sigma / alpha.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple, cast

import diffusers
import numpy as np
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from steersman.diffusion.cfg_pp.solvers import (
    HISTORIES,
    CFGPPScheduler,
    DDIMCFGPPScheduler,
    DPMSolverPPCFGPPScheduler,
    EulerAncestralCFGPPScheduler,
    EulerCFGPPScheduler,
    History,
    equivalent_scales,
    guided,
)
from steersman.diffusion.classical import DDIMScheduler, EulerScheduler
from steersman.diffusion.dpm_solver_pp import DPMSolverPPScheduler, from_diffusers
from steersman.diffusion.guidance import Guidance, Moment, is_flow
from steersman.diffusion.scheduler import SlotScheduler
from steersman.errors import InputError, nearest

RULES = (
    "one with a CFG++ rule: DDIM, Euler, Euler ancestral, DPM-Solver++ multistep of order 1 or 2 (midpoint), "
    "flow-matching Euler, or DPMSolver2SAncestralCFGPPScheduler"
)


class CFGPlusPlus(Guidance):
    r"""CFG++ (Chung, Kim, Park, Nam & Ye, ICLR 2025, arXiv 2406.08070), for classic and modular pipelines.

        x_s = alpha_s D_lambda + sigma_s eps_u,    D_lambda = D_u + lambda (D_c - D_u)

    ``install(pipe)`` looks at the pipeline's scheduler and puts its CFG++ twin in its place, with the same grid of
    times, until ``uninstall()``; under flow matching the scheduler stays and each step has its own scale. In a modular
    pipeline ``bind(scheduler)`` it to a CFG++ scheduler, or to a deterministic one of first order. Both branches are
    evaluated at every step, also at lambda = 1, which is the setting for distilled few-step models.

    Args:
        scale: lambda, from 0 (no condition) to 1 (the conditional estimate). At 50 steps the paper pairs 0.2, 0.4, 0.6,
            0.8 and 1 with ordinary scales 2, 5, 7.5, 9 and 12.5.
        reference_steps: take lambda for so many steps (50 in the paper), and rescale it to the steps of the run so that
            the mean of omega_i stays the same; None: lambda as it is.
        allow_extrapolation: allow a ``scale`` above 1 or below 0.
        history: of DPM-Solver++(2M), see :class:`~steersman.diffusion.cfg_pp.solvers.CFGPP`.

    Raises:
        InputError: a scale outside [0, 1]; a pipeline without two branches, or a scheduler without a rule.
    """

    pairs = True

    @register_to_config
    def __init__(
        self,
        scale: float = 0.6,
        reference_steps: int | None = None,
        allow_extrapolation: bool = False,
        history: History = "uncond",
    ) -> None:
        check_scale(scale, allow_extrapolation)
        if reference_steps is not None and (
            isinstance(reference_steps, bool) or not isinstance(reference_steps, int) or reference_steps < 1
        ):
            raise InputError("reference_steps", reference_steps, "a whole number from 1, or None")
        if history not in HISTORIES:
            raise InputError("history", history, nearest(str(history), HISTORIES))
        super().__init__()
        self.scale, self.reference_steps, self.history = float(scale), reference_steps, history
        self._own: Any = None
        self._twin: Any = None
        self._effective = self.scale
        self._scales: dict[float, float] | None = None

    def begin(self, moment: Moment) -> None:
        """Take the scale, or the scales, of this run."""
        scheduler = moment.scheduler
        if scheduler is None:
            raise InputError("scheduler", None, "known to the guider: guider.bind(pipe.scheduler)")
        _check_rule(scheduler)
        self._effective = self.scale
        if self.reference_steps is not None:
            reference = _laid_out(scheduler, self.reference_steps)
            self._effective *= mean_equivalent_scale(1.0, reference) / mean_equivalent_scale(1.0, scheduler)
        self._scales = None
        if not isinstance(scheduler, CFGPPScheduler):
            plan = moves(scheduler)
            self._scales = {m.timestep: equivalent_scales(self._effective, (m.start, m.end))[0] for m in plan}

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        assert uncond is not None  # both branches are always evaluated
        scale = self._effective if self._scales is None else self._scales[moment.timestep]
        return guided(cond, uncond, scale)

    def bind(self, scheduler: Any) -> CFGPlusPlus:
        _check_rule(scheduler)
        super().bind(scheduler)
        return self

    def attach(self, pipe: Any) -> None:
        own = pipe.scheduler
        scheduler = own if is_flow(own) else twin(own, self.history)
        _check_rule(scheduler)
        if self.reference_steps is not None and own.config.get("use_dynamic_shifting"):
            allowed = "None: this scheduler shifts its times by the image's size"
            raise InputError("reference_steps", self.reference_steps, allowed)
        super().attach(pipe)
        self._own, self._twin = own, scheduler
        pipe.scheduler = scheduler

    def detach(self, pipe: Any) -> None:
        super().detach(pipe)
        if pipe.scheduler is self._twin:  # unless another one was assigned since
            pipe.scheduler = self._own
        self._own = self._twin = None


def check_scale(scale: Any, allow_extrapolation: bool = False) -> None:
    """Refuse a lambda outside [0, 1].

    Raises:
        InputError: it is, and extrapolation is not allowed.
    """
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    if number and (allow_extrapolation or 0 <= scale <= 1):
        return
    allowed = "a number from 0 to 1"
    if number:
        typed = "is this a CFG scale? 7.5 there is about 0.6 here; " if scale > 1 else ""
        allowed += f" ({typed}allow_extrapolation=True lets any number pass)"
    raise InputError("scale", scale, allowed)


# ------------------------------------------------------------------ schedulers


def twin(scheduler: Any, history: History = "uncond") -> CFGPPScheduler:
    """The CFG++ scheduler over the solver and with the times of another scheduler, which ends at abar = 1.

    Args:
        scheduler: of steersman or of diffusers.
        history: of DPM-Solver++(2M).

    Raises:
        InputError: there is no rule for its solver, or for one of its settings.
    """
    c = scheduler.config
    if isinstance(scheduler, CFGPPScheduler):
        return scheduler
    if type(scheduler) in (DDIMScheduler, EulerScheduler, diffusers.DDIMScheduler):
        return cast(CFGPPScheduler, DDIMCFGPPScheduler.from_config(c))
    for kind, made in (
        (diffusers.EulerDiscreteScheduler, EulerCFGPPScheduler),
        (diffusers.EulerAncestralDiscreteScheduler, EulerAncestralCFGPPScheduler),
    ):
        if type(scheduler) is kind:
            for name, usual in (("sigma_min", None), ("sigma_max", None), ("timestep_type", "discrete")):
                if c.get(name, usual) != usual:
                    raise InputError(name, c[name], f"{usual}: CFG++ runs over the whole range of noise levels")
            return cast(CFGPPScheduler, made.from_config(c))
    if type(scheduler) in (DPMSolverPPScheduler, diffusers.DPMSolverMultistepScheduler):
        _check_multistep(scheduler)
        return cast(CFGPPScheduler, DPMSolverPPCFGPPScheduler.from_config(c, history=history))
    raise InputError("scheduler", type(scheduler).__name__, RULES)


def _check_multistep(scheduler: Any) -> None:
    c = from_diffusers(dict(scheduler.config))
    order, name = c.get("order", 2), type(scheduler).__name__
    settings: dict[str, tuple[str, ...]] = {
        "method": ("multistep",),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
    }
    if order == 1:
        settings = {"algorithm_type": ("dpmsolver++", "dpmsolver")}  # all of order 1 is DDIM
    if order not in (1, 2):
        raise InputError("scheduler", f"{name}(order={order})", RULES)
    for setting, allowed in settings.items():
        if c.get(setting, allowed[0]) not in allowed:
            raise InputError("scheduler", f"{name}({setting}={c[setting]})", RULES)


def _check_rule(scheduler: Any) -> None:
    """Refuse a scheduler that neither takes both outputs nor is deterministic and of first order."""
    kind, c = type(scheduler), getattr(scheduler, "config", {})
    if kind is diffusers.FlowMatchEulerDiscreteScheduler:
        first = not c.get("stochastic_sampling")
    elif kind in (DPMSolverPPScheduler, diffusers.DPMSolverMultistepScheduler):
        order = c["order"] if kind is DPMSolverPPScheduler else c["solver_order"]
        first = order == 1 and not str(c["algorithm_type"]).startswith("sde")
    elif kind is DDIMScheduler:
        first = c["eta"] == 0.0
    else:
        first = kind in (EulerScheduler, diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler)
    if not first and not isinstance(scheduler, CFGPPScheduler):
        raise InputError("scheduler", kind.__name__, RULES)


class Move(NamedTuple):
    """A step of a scheduler's plan, in r = sigma / alpha."""

    timestep: float
    start: float
    end: float


def moves(scheduler: Any) -> list[Move]:
    """The steps that a scheduler is laid out for; the last ends at r = 0, whatever the scheduler says.

    Raises:
        InputError: ``set_timesteps`` was not called, or a scheduler whose noise levels are not known.
    """
    kind: type = type(scheduler)
    if isinstance(scheduler, SlotScheduler):
        plan = zip(scheduler.timesteps.tolist(), scheduler.slots, strict=True)
        steps = [(float(t), slot.step) for t, slot in plan if slot.k == 0]
        process = scheduler._solver.process if steps else None
        found = [Move(t, *(_ratio(process, u) for u in (step.t, step.s))) for t, step in steps]
    elif isinstance(getattr(scheduler, "sigmas", None), Tensor) and len(scheduler.sigmas) > len(scheduler.timesteps):
        levels = scheduler.sigmas.double().tolist()
        if is_flow(scheduler):
            levels = [sigma / (1.0 - sigma) if sigma < 1.0 else math.inf for sigma in levels]
        found = [Move(t, *ends) for t, ends in zip(scheduler.timesteps.tolist(), pairwise(levels), strict=True)]
    elif kind is diffusers.DDIMScheduler and scheduler.num_inference_steps:
        abar = scheduler.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore"):
            r = np.sqrt((1.0 - abar) / abar)  # infinite where there is no signal
        gap = scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps
        times = scheduler.timesteps.tolist()
        found = [Move(float(t), float(r[t]), float(r[t - gap]) if t >= gap else 0.0) for t in times]
    else:
        found = []
    if not found:
        raise InputError("scheduler", type(scheduler).__name__, "given its steps first: call set_timesteps")
    return [*found[:-1], found[-1]._replace(end=0.0)]


def mean_equivalent_scale(scale: float, scheduler: Any) -> float:
    """The mean over a scheduler's steps of omega_i: the constant CFG scale that CFG++ is to be compared with."""
    return float(np.mean([equivalent_scales(scale, (m.start, m.end))[0] for m in moves(scheduler)]))


def _laid_out(scheduler: Any, steps: int) -> Any:
    other = type(scheduler).from_config(scheduler.config)
    other.set_timesteps(steps)
    return other


def _ratio(process: Any, t: float) -> float:
    return process.sigma(t) / process.alpha(t) if process.alpha(t) else math.inf
