r"""The solvers of CFG++: any data-prediction solver on the unconditional branch, moved by what guidance changes.

With D = x_0 the network's estimate of the clean sample, D_u without and D_c with the condition, and
D_lambda = D_u + lambda (D_c - D_u), CFG++ replaces the estimate by the guided one and keeps the *unconditional* noise:

    x_s = alpha_s D_lambda + sigma_s eps_u                                     (DDIM; Chung et al. 2025, algorithm 2)
        = [alpha_s D_u + sigma_s eps_u] + alpha_s (D_lambda - D_u)

The bracket is the solver's own step without guidance. Euler, Euler ancestral, DPM-Solver++(2M) and (2S) of the paper
all have this form, so :class:`CFGPP` is written once: a step of the solver on D_u alone (its inner points and its
history are unconditional), and the shift alpha_s (D_lambda - D_u) of the last evaluation at its end.

For solvers of first order the same step is one of ordinary guidance with a scale for each step (r = sigma / alpha):

    omega_i = lambda r_i / (r_i - r_{i+1})

so lambda means more the more steps there are: the mean of omega_i grows in proportion to N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from steersman.diffusion.classical import DDIM
from steersman.diffusion.dpm_solver_pp import SIGMA_GRIDS, DPMSolverPP, DPMSolverPPScheduler, DPMState, update
from steersman.diffusion.scheduler import Slot, SolverScheduler, spaced, with_end
from steersman.diffusion.solver import (
    DiscreteVP,
    Noise,
    Prediction,
    Process,
    Solver,
    State,
    Step,
    first_order,
    transfer,
)
from steersman.diffusion.time_grids import TIME_GRIDS, TimeGrid, laid_out
from steersman.errors import InputError, nearest

History = Literal["uncond", "mixed"]
HISTORIES: tuple[str, ...] = get_args(History)
EulerGrid = Literal["spacing"] | TimeGrid


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond), in float32 or better, exact at 0 and 1; in the dtype of ``cond``."""
    dtype = torch.promote_types(cond.dtype, torch.float32)
    return torch.lerp(uncond.to(dtype), cond.to(dtype), scale).to(cond.dtype)


def equivalent_scales(scale: float, ratios: Sequence[float]) -> list[float]:
    """omega_i: the scales with which ordinary guidance takes the steps of first-order CFG++ with ``scale``.

    omega_i = lambda r_i / (r_i - r_{i+1}). For flow matching, with r = sigma / (1 - sigma), that is
    lambda sigma_i (1 - sigma_{i+1}) / (sigma_i - sigma_{i+1}).

    Args:
        scale: lambda.
        ratios: r = sigma / alpha at the N calls and where the last step ends: falling, from infinity to 0.

    Raises:
        InputError: ratios that do not fall: no scale takes a step of no length.
    """
    if len(ratios) < 2 or not all(0 <= s < r for r, s in pairwise(ratios)):
        raise InputError("ratios", list(ratios), "falling numbers of at least 0: where two are equal no scale is")
    return [scale / (1.0 - s / r) for r, s in pairwise(ratios)]


# ------------------------------------------------------------------ solvers


@dataclass(frozen=True)
class CFGPP(Solver[State]):
    """CFG++ over a solver (Chung et al. 2025, arXiv 2406.08070): see the module's equations.

    Args:
        host: the solver of the unconditional step. Rules were published for :class:`DDIM` (eta=0: DDIM and Euler;
            eta=1: Euler ancestral), :class:`DPMSolver2SAncestral` and :class:`DPMSolverPP` (multistep, order 2, data
            prediction, midpoint).
        history: what the second-order term of DPM-Solver++(2M) is a difference of. ``uncond``: D_u - D_u,old; it
            shrinks with the step. ``mixed``: D_lambda - D_u,old, the other form in the authors' code, in which
            lambda (D_c - D_u) never vanishes: the shift grows from alpha_s by -alpha_s expm1(-h) / (2 r).

    Raises:
        InputError: an unknown or useless history; later, a prediction without its unconditional one.
    """

    host: Solver[State]
    history: History = "uncond"

    def __post_init__(self) -> None:
        if self.history not in HISTORIES:
            raise InputError("history", self.history, nearest(str(self.history), HISTORIES))
        if self.history == "mixed" and not isinstance(self.host, DPMSolverPP):
            raise InputError("history", self.history, "uncond: only DPM-Solver++(2M) has a history")

    @property
    def process(self) -> Process:  # type: ignore[override]
        return self.host.process

    def stages(self, t: float, s: float, i: int, n: int) -> tuple[float, ...]:
        return self.host.stages(t, s, i, n)

    def steps(self, times: Sequence[float]) -> list[Step]:
        return self.host.steps(times)

    def check(self, times: Sequence[float]) -> None:
        self.host.check(times)

    def init(self, x: Tensor) -> State:
        return self.host.init(x)

    def stage(
        self, k: int, x: Tensor, pred: Prediction, step: Step, state: State, noise: Noise
    ) -> tuple[Tensor, State]:
        more = self._more(step, state) if self.history == "mixed" else 0.0
        after, following = self.host.stage(k, x, _uncond(pred), step, state, noise)
        if k + 1 == len(step.stages):
            after = self._shifted(after, pred, step.s, more)
        return after, following

    def first_order_step(self, x: Tensor, pred: Prediction, t: float, s: float) -> Tensor:
        return self._shifted(first_order(self.process, x, _uncond(pred), t, s), pred, s)

    def _shifted(self, after: Tensor, pred: Prediction, s: float, more: float = 0.0) -> Tensor:
        """``after`` + (alpha_s + more) (D_lambda - D_u)."""
        p = self.process
        if p.sigma(s) == 0.0:
            return pred.x0 * p.alpha(s)
        return torch.add(after, pred.x0 - _uncond(pred).x0, alpha=p.alpha(s) + more)

    def _more(self, step: Step, state: Any) -> float:
        """-w, with w < 0 the weight of D_u,old in this step: what ``mixed`` adds to the shift."""
        host, past = self.host, state
        assert isinstance(host, DPMSolverPP) and isinstance(past, DPMState)
        if not past.times or host._order(step, 2) < 2 or math.isinf(self.process.log_snr(past.times[0])):
            return 0.0
        return -update(self.process, host.algorithm_type, step.t, step.s, past.times[:1], "midpoint").weights[1]


def _uncond(pred: Prediction) -> Prediction:
    if pred.uncond is None:
        raise InputError(
            "uncond", None, "the network's output without the condition: install CFGPlusPlus() on the pipeline first"
        )
    return pred.uncond


class Started(NamedTuple):
    """Where the step in progress began."""

    x: Tensor


@dataclass(frozen=True)
class DPMSolver2SAncestral(Solver[Started]):
    """DPM-Solver++(2S) with ancestral noise (k-diffusion's; Lu et al. 2022), two calls a step.

    With y = x / alpha, r = sigma / alpha, r_up**2 = eta**2 r_s**2 (r_t**2 - r_s**2) / r_t**2,
    r_down**2 = r_s**2 - r_up**2 and h = log(r_t / r_down):

        y_m = (r_m / r_t) y - expm1(-h / 2) D(y, r_t),    log r_m = (log r_t + log r_down) / 2
        y_s = (r_down / r_t) y - expm1(-h) D(y_m, r_m) + r_up n

    With eta = 1 the point in the middle is at the time where the step ends. A step to sigma = 0, or from a start
    without signal, is one of :class:`DDIM`, with one call.

    Args:
        process: the process.
        eta: of the noise; 0 is deterministic.

    Raises:
        InputError: ``eta`` is not in [0, 1].
    """

    process: Process
    eta: float = 1.0

    def __post_init__(self) -> None:
        DDIM(self.process, self.eta)

    def _levels(self, t: float, s: float) -> tuple[float, float, float]:
        """(r_t, r_down, r_up)."""
        p = self.process
        r_t, r_s = p.sigma(t) / p.alpha(t), p.sigma(s) / p.alpha(s)
        r_up = self.eta * r_s / r_t * math.sqrt(r_t * r_t - r_s * r_s)
        return r_t, math.sqrt(max(r_s * r_s - r_up * r_up, 0.0)), r_up

    def stages(self, t: float, s: float, i: int, n: int) -> tuple[float, ...]:
        p = self.process
        if s < p.earliest or p.alpha_bar(t) == 0.0:
            return (t,)
        if self.eta == 1.0:
            return (t, s)
        r_t, r_down, _ = self._levels(t, s)
        return (t, p.time_at(-0.5 * math.log(r_t * r_down)))

    def init(self, x: Tensor) -> Started:
        return Started(x)

    def stage(
        self, k: int, x: Tensor, pred: Prediction, step: Step, state: Started, noise: Noise
    ) -> tuple[Tensor, Started]:
        p, t, s = self.process, step.t, step.s
        if len(step.stages) == 1:
            after, _ = DDIM(p, self.eta).stage(k, x, pred, step, (), noise)
            return after, Started(after)
        r_t, r_down, r_up = self._levels(t, s)
        h = math.log(r_t / r_down)
        if k == 0:
            alpha = p.alpha(step.stages[1])
            y_m = torch.add(x * (math.exp(-h / 2) / p.alpha(t)), pred.x0, alpha=-math.expm1(-h / 2))
            return y_m * alpha, Started(x)
        y_s = torch.add(state.x * (r_down / r_t / p.alpha(t)), pred.x0, alpha=-math.expm1(-h))
        if r_up > 0.0:
            y_s = torch.add(y_s, noise(x), alpha=r_up)
        after = y_s * p.alpha(s)
        return after, Started(after)


@dataclass(frozen=True)
class DDIMInversion(Solver[tuple[()]]):
    """From x at a time s up to the noisier time t, with both branches evaluated at (x, t).

        x_0 = (x - sigma_s eps_u) / alpha_s,    x_t = alpha_t x_0 + sigma_t eps_lambda            (CFG++)

    Where there is only one prediction it stands in both places: plain DDIM inversion. The steps are those of sampling,
    taken backwards: ``step.t`` is the noisier end here, too.

    Args:
        process: the process.
    """

    process: Process

    def stages(self, t: float, s: float, i: int, n: int) -> tuple[float, ...]:
        return (t,)

    def init(self, x: Tensor) -> tuple[()]:
        return ()

    def stage(
        self, k: int, x: Tensor, pred: Prediction, step: Step, state: tuple[()], noise: Noise
    ) -> tuple[Tensor, tuple[()]]:
        p = self.process
        if pred.uncond is None:
            return transfer(p, x, pred.eps, step.s, step.t), state
        after = transfer(p, x, pred.uncond.eps, step.s, step.t)
        return torch.add(after, pred.eps - pred.uncond.eps, alpha=p.sigma(step.t)), state


# ------------------------------------------------------------------ schedulers


class CFGPPScheduler(SolverScheduler):
    """A scheduler of CFG++: it needs the network's two outputs, which an installed ``CFGPlusPlus`` hands to it.

    ``from_config`` takes over another scheduler's settings, those that it left at their defaults too, but
    ``set_alpha_to_one`` has to be given: the last step ends at abar = 1, so that the result is the guided estimate,
    without unconditional noise on it.
    """

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if isinstance(config, dict) and config.get("_class_name") != cls.__name__:
            kwargs.setdefault("set_alpha_to_one", True)
            config = {**config, "_use_default_values": []}
        return super().from_config(config, return_unused_kwargs, **kwargs)


class DDIMCFGPPScheduler(CFGPPScheduler):
    """CFG++ over :class:`DDIM` as a diffusers scheduler.

    x_s = alpha_s D_lambda + sqrt(sigma_s**2 - w**2) eps_u + w z, w as in :class:`DDIM`; eta = 1 is Euler ancestral.

    Args:
        eta: from 0 (deterministic) to 1.
    """

    def make_solver(self, process: Process, *, eta: float = 0.0) -> CFGPP[Any]:
        return CFGPP(DDIM(process, eta))


class _EulerGrid(CFGPPScheduler):
    """Time laid out as diffusers' Euler schedulers do: ``linspace`` is not rounded, and there are grids of sigma."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if isinstance(config, dict):
            config = dict(config)
            for name, grid in SIGMA_GRIDS.items():
                if config.pop(name, False):
                    config["grid"] = grid
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def make_grid(self, process: DiscreteVP, steps: int) -> list[float]:
        c: Any = self.config
        T = c.num_train_timesteps
        if c.grid in TIME_GRIDS:
            return [*laid_out(c.grid, process, steps, process.start)]
        grid = spaced(c.timestep_spacing, steps, T, c.steps_offset)
        return with_end(np.linspace(T - 1, 0, steps).tolist(), T) if c.timestep_spacing == "linspace" else grid


class EulerCFGPPScheduler(_EulerGrid):
    """CFG++ over Euler's method in r = sigma / alpha: y_s = D_lambda + r_s eps_u, with y = x / alpha. Equal to DDIM.

    Args:
        grid: ``spacing``: the pipeline's ``timestep_spacing``; or, over the whole schedule, one of
            :mod:`~steersman.diffusion.time_grids`, as ``karras``.
    """

    def make_solver(self, process: Process, *, grid: EulerGrid = "spacing") -> CFGPP[Any]:
        _check_grid(grid)
        return CFGPP(DDIM(process))


class EulerAncestralCFGPPScheduler(_EulerGrid):
    """CFG++ over Euler ancestral sampling: y_s = D_lambda + r_down eps_u + r_up n.

    r_up and r_down are those of :class:`DPMSolver2SAncestral`; the same map as DDIM's with its eta.

    Args:
        eta: of the noise, from 0 to 1.
        grid: see :class:`EulerCFGPPScheduler`.
    """

    def make_solver(self, process: Process, *, eta: float = 1.0, grid: EulerGrid = "spacing") -> CFGPP[Any]:
        _check_grid(grid)
        return CFGPP(DDIM(process, eta))


class DPMSolver2SAncestralCFGPPScheduler(_EulerGrid):
    """CFG++ over :class:`DPMSolver2SAncestral`, two calls a step but the last: 2N - 1 for N steps.

    y_s = D_lambda' - e^{-h} D_u' + (r_down / r_t) y + r_up n, with D' at the unconditional point in the middle.

    Args:
        eta: of the noise, from 0 to 1.
        grid: see :class:`EulerCFGPPScheduler`.
    """

    def make_solver(self, process: Process, *, eta: float = 1.0, grid: EulerGrid = "spacing") -> CFGPP[Any]:
        _check_grid(grid)
        return CFGPP(DPMSolver2SAncestral(process, eta))


class DPMSolverPPCFGPPScheduler(CFGPPScheduler, DPMSolverPPScheduler):  # type: ignore[misc]
    """CFG++ over multistep DPM-Solver++ of order 1 or 2 (2M), one call a step.

    y_s = D_lambda - e^{-h} D_u - expm1(-h) (D_u - D_u,old) / (2 r) + e^{-h} y, with y = x / alpha, h the step in
    log(alpha / sigma) and r the step before over h. ``from_config`` reads diffusers' names as
    ``DPMSolverPPScheduler`` does.

    Args:
        order: 1 or 2.
        history: see :class:`CFGPP`.
        grid, lower_order_final, lower_order_below, euler_at_final, lambda_min_clipped: see ``DPMSolverPPScheduler``.
    """

    def make_solver(  # type: ignore[override]
        self,
        process: DiscreteVP,
        *,
        order: int = 2,
        history: History = "uncond",
        grid: Literal["spacing", "logsnr", "exponential", "karras", "quadratic", "beta"] = "spacing",
        lower_order_final: bool = True,
        lower_order_below: int = 15,
        euler_at_final: bool = False,
        lambda_min_clipped: float | None = None,
    ) -> CFGPP[Any]:
        if isinstance(order, bool) or order not in (1, 2):
            raise InputError("order", order, "1 or 2: there is no CFG++ rule for higher orders")
        host = super().make_solver(
            process,
            order=order,
            grid=grid,
            lower_order_final=lower_order_final,
            lower_order_below=lower_order_below,
            euler_at_final=euler_at_final,
            lambda_min_clipped=lambda_min_clipped,
        )
        return CFGPP(host, history)


class DDIMCFGPPInverseScheduler(CFGPPScheduler):
    """:class:`DDIMInversion` as a diffusers scheduler: from an image up to noise, at the times of DDIM's sampling.

    The pipeline's ``latents`` are the image's. With ``CFGPlusPlus`` installed it is CFG++ inversion, without it plain
    DDIM inversion of whatever guidance the pipeline does.
    """

    def make_solver(self, process: Process) -> DDIMInversion:
        return DDIMInversion(process)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lay out sampling's run (see the base class), and turn it round: ``timesteps`` rise."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        self._slots = self._slots[::-1]
        self.timesteps = self.timesteps.flip(0)

    def _predict(self, output: Tensor, x: Tensor, slot: Slot) -> Prediction:
        return self._predict_uncond(output, x, slot)  # nothing is clipped on the way up


def _check_grid(grid: str) -> None:
    if grid not in (*TIME_GRIDS, "spacing"):
        raise InputError("grid", grid, nearest(str(grid), ("spacing", *TIME_GRIDS)))
