"""The solver protocol: a sampler is written once, against the process's alpha and sigma.

A Gaussian diffusion process has the marginals

    x_t = alpha_t x_0 + sigma_t eps,    eps ~ N(0, I),

with alpha_t**2 = abar_t and sigma_t**2 = 1 - abar_t where it preserves variance, and alpha_t = 1 where its
variance explodes. A network's output at (x_t, t) is an estimate of x_0 and of eps, each fixing the other. A *solver*
moves x from a time t to an earlier time s. It says where it evaluates the network between the two
(``stages``) and what it does with each evaluation (``stage``). All that it carries from one evaluation
to the next is in its *state*: named tuples of batch-first tensors and plain numbers, never changed in
place. So particles can be re-indexed (:func:`take`) and states kept (a reference is a copy) at every
stage of every solver. :func:`integrate` drives a solver with any callable;
:class:`~steersman.diffusion.scheduler.SolverScheduler` drives the same code behind diffusers' interface.

To add a solver: subclass :class:`Solver`, write ``stages``, ``init`` and ``stage``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor

from steersman.errors import InputError

State = TypeVar("State")
Generators = torch.Generator | Sequence[torch.Generator] | None
Noise = Callable[[Tensor], Tensor]
"""Draws standard normal noise like its argument."""

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


# ------------------------------------------------------------------ processes


class Process(ABC):
    """A Gaussian process with marginals alpha_t x_0 + sigma_t eps, as functions of time in float64.

    Variance-preserving unless a subclass says otherwise.

    Attributes:
        start: the latest time, where x is drawn from the prior.
        earliest: the smallest time at which the network may be evaluated; a step may end before it.
    """

    start: float
    earliest: float

    @abstractmethod
    def alpha_bar(self, t: float) -> float:
        """abar_t, the share of x_0 at time ``t``: alpha_t**2 / (alpha_t**2 + sigma_t**2)."""

    @abstractmethod
    def slope(self, t: float) -> tuple[float, float]:
        """(d alpha / dt, d sigma / dt) at ``t``: the probability-flow ODE is dx/dt = alpha' x_0 + sigma' eps."""

    def alpha(self, t: float) -> float:
        return math.sqrt(self.alpha_bar(t))

    def sigma(self, t: float) -> float:
        return math.sqrt(1.0 - self.alpha_bar(t))

    def log_snr(self, t: float) -> float:
        """lambda_t = log(alpha_t / sigma_t), half the logarithm of the signal-to-noise ratio; it falls with ``t``."""
        abar = self.alpha_bar(t)
        if abar in (0.0, 1.0):
            return math.inf if abar else -math.inf
        return 0.5 * (math.log(abar) - math.log1p(-abar))

    def time_at(self, log_snr: float) -> float:
        """The time of a given lambda, from ``earliest`` to ``start``: the inverse of :meth:`log_snr`.

        Raises:
            InputError: the process doesn't reach it in between.
        """
        low, high = self.log_snr(self.start), self.log_snr(self.earliest)
        slack = 1e-9 * max(1.0, abs(high))
        if not low - slack <= log_snr <= high + slack:
            raise InputError("log_snr", log_snr, f"from {low:g} to {high:g}, as this process has")
        if log_snr >= high or log_snr <= low:
            return self.earliest if log_snr >= high else self.start
        from scipy.optimize import brentq

        # By the angle of (alpha, sigma), which is finite at both ends, where lambda may not be.
        angle = math.atan(math.exp(-log_snr))
        return float(
            brentq(lambda t: math.atan2(self.sigma(t), self.alpha(t)) - angle, self.earliest, self.start, xtol=1e-12)
        )

    def transfer(self, t: float, s: float) -> tuple[float, float]:
        """The exact transfer for a constant eps, phi(x, eps, t, s) = a x - b eps, as (a, b).

        a = sqrt(abar_s / abar_t), b = (abar_s - abar_t) / [alpha_t (sigma_s alpha_t + sigma_t alpha_s)]:
        DDIM's step, in the form that does not subtract two nearly equal numbers
        (Liu et al. 2022, arXiv 2202.09778, eq. 9). Undefined where abar_t = 0.
        """
        at, as_ = self.alpha_bar(t), self.alpha_bar(s)
        if at == as_:
            return 1.0, 0.0
        denominator = math.sqrt(at) * (math.sqrt((1.0 - as_) * at) + math.sqrt((1.0 - at) * as_))
        return math.sqrt(as_ / at), (as_ - at) / denominator

    def prior(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """x at ``start``: standard normal noise (``generator`` may hold one generator per sample)."""
        return gaussian(torch.empty(tuple(shape), device=device, dtype=dtype), generator)


class DiscreteVP(Process):
    """The process that a network was trained on at T whole timesteps 0, ..., T - 1.

    abar is read from the table at whole times and interpolated in between (a monotone cubic through
    alpha, so abar = 0 at the last timestep is no special case). Every negative time is the clean end.

    Args:
        alphas_cumprod: abar_0, ..., abar_{T-1}: falling, in [0, 1].
        final: abar at the clean end: 1, or abar_0 to stop at the first noise level.

    Raises:
        InputError: the table is not one-dimensional, not finite, not falling, or leaves [0, 1].
    """

    earliest = 0.0

    def __init__(self, alphas_cumprod: Sequence[float] | np.ndarray | Tensor, final: float = 1.0) -> None:
        table = np.asarray(alphas_cumprod, dtype=np.float64)
        falling = table.ndim == 1 and len(table) > 0 and bool((np.diff(table) < 0).all())
        if not falling or not (np.isfinite(table).all() and table[0] <= 1 and table[-1] >= 0):
            raise InputError("alphas_cumprod", alphas_cumprod, "a falling sequence of numbers from 1 to 0")
        if not table[0] <= final <= 1:
            raise InputError("final", final, f"a number from abar_0={table[0]:g} to 1")
        self.final = float(final)
        self.start = float(len(table) - 1)
        self.table = table
        self._abar: list[float] = table.tolist()
        self._spline: Any = None

    def alpha_bar(self, t: float) -> float:
        if t < 0:
            return self.final
        if t > self.start:
            raise InputError("time", t, f"at most {self.start:g}, the last training timestep")
        index = int(t)
        if index == t:
            return self._abar[index]
        return float(self._interpolant(t)) ** 2

    def slope(self, t: float) -> tuple[float, float]:
        alpha, slope = self.alpha(t), float(self._interpolant(t, 1))
        return slope, -alpha * slope / self.sigma(t)

    @property
    def _interpolant(self) -> Any:
        if self._spline is None:
            from scipy.interpolate import PchipInterpolator

            # A one-entry table has nothing to interpolate; repeat it so that slopes are zero.
            nodes = np.arange(max(len(self.table), 2))
            self._spline = PchipInterpolator(nodes, np.sqrt(np.resize(self.table, len(nodes))))
        return self._spline


@dataclass(frozen=True)
class LinearVP(Process):
    """The continuous process with beta(t) rising linearly over t in [0, 1] (Song et al. 2021).

    log abar_t = -beta_min t - (beta_max - beta_min) t**2 / 2.

    Args:
        beta_min, beta_max: the rate of noising at t = 0 and t = 1.
        earliest: the smallest time at which the network may be evaluated.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    earliest: float = 1e-3
    start: float = 1.0

    def _log_alpha_bar(self, t: float) -> float:
        return -self.beta_min * t - 0.5 * (self.beta_max - self.beta_min) * t * t

    def alpha_bar(self, t: float) -> float:
        return math.exp(self._log_alpha_bar(t))

    def sigma(self, t: float) -> float:
        return math.sqrt(-math.expm1(self._log_alpha_bar(t)))

    def log_snr(self, t: float) -> float:
        log_abar = self._log_alpha_bar(t)
        return 0.5 * (log_abar - math.log(-math.expm1(log_abar))) if t > 0 else math.inf

    def slope(self, t: float) -> tuple[float, float]:
        rate = -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t)  # d log alpha / dt
        alpha = self.alpha(t)
        return rate * alpha, -rate * alpha * alpha / self.sigma(t)


@dataclass(frozen=True)
class VE(Process):
    """The variance-exploding process in its own noise level: alpha = 1 and sigma_t = t (Karras et al. 2022).

    Args:
        sigma_max: where x is drawn from the prior, N(0, sigma_max**2 I).
        sigma_min: the smallest noise level at which the network may be evaluated.

    Raises:
        InputError: not 0 < sigma_min < sigma_max < infinity.
    """

    sigma_max: float = 80.0
    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        if not 0 < self.sigma_max < math.inf:
            raise InputError("sigma_max", self.sigma_max, "a number above 0")
        if not 0 < self.sigma_min < self.sigma_max:
            raise InputError("sigma_min", self.sigma_min, f"a number above 0, below sigma_max={self.sigma_max:g}")

    @property
    def start(self) -> float:  # type: ignore[override]
        return self.sigma_max

    @property
    def earliest(self) -> float:  # type: ignore[override]
        return self.sigma_min

    def alpha_bar(self, t: float) -> float:
        return 1.0 / (1.0 + t * t)

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        return t

    def log_snr(self, t: float) -> float:
        return -math.log(t) if t > 0 else math.inf

    def time_at(self, log_snr: float) -> float:
        return math.exp(-log_snr)

    def slope(self, t: float) -> tuple[float, float]:
        return 0.0, 1.0

    def transfer(self, t: float, s: float) -> tuple[float, float]:
        return 1.0, t - s

    def prior(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return self.sigma_max * super().prior(shape, generator, device, dtype)


# ------------------------------------------------------------------ predictions


class Prediction:
    """What the network says at (x, t): an estimate of x_0 and of eps, with x = alpha x_0 + sigma eps.

    Give one of ``x0``, ``eps`` and ``v`` = alpha eps - sigma x_0 (Salimans & Ho 2022); what a solver reads
    is computed when it is first read.

    Args:
        x: the point at which the network was evaluated.
        alpha, sigma: of the process at that time.
        uncond: the prediction without the condition, for solvers that use both.
    """

    __slots__ = ("_eps", "_v", "_x0", "alpha", "sigma", "uncond", "x")

    def __init__(
        self,
        x: Tensor,
        alpha: float,
        sigma: float,
        *,
        x0: Tensor | None = None,
        eps: Tensor | None = None,
        v: Tensor | None = None,
        uncond: Prediction | None = None,
    ) -> None:
        self.x, self.alpha, self.sigma, self.uncond = x, alpha, sigma, uncond
        self._x0, self._eps, self._v = x0, eps, v

    @classmethod
    def read(
        cls,
        kind: str,
        output: Tensor,
        x: Tensor,
        alpha: float,
        sigma: float,
        uncond: Prediction | None = None,
    ) -> Prediction:
        """The prediction in a network's ``output`` of a given ``kind``: epsilon, sample or v_prediction.

        Raises:
            InputError: another kind.
        """
        if kind == "epsilon":
            return cls(x, alpha, sigma, eps=output, uncond=uncond)
        if kind == "sample":
            return cls(x, alpha, sigma, x0=output, uncond=uncond)
        if kind == "v_prediction":
            return cls(x, alpha, sigma, v=output, uncond=uncond)
        raise InputError("prediction_type", kind, f"one of {', '.join(PREDICTION_TYPES)}")

    @property
    def x0(self) -> Tensor:
        if self._x0 is None:
            if self._v is not None:
                self._x0 = torch.add(self.x * self.alpha, self._v, alpha=-self.sigma)
            else:
                assert self._eps is not None
                self._x0 = torch.add(self.x, self._eps, alpha=-self.sigma) * (1.0 / self.alpha)
        return self._x0

    @property
    def eps(self) -> Tensor:
        if self._eps is None:
            if self._v is not None:
                self._eps = torch.add(self._v * self.alpha, self.x, alpha=self.sigma)
            else:
                assert self._x0 is not None
                self._eps = torch.add(self.x, self._x0, alpha=-self.alpha) * (1.0 / self.sigma)
        return self._eps

    @property
    def x0_uncond(self) -> Tensor | None:
        return None if self.uncond is None else self.uncond.x0

    @property
    def eps_uncond(self) -> Tensor | None:
        return None if self.uncond is None else self.uncond.eps


Denoiser = Callable[[Tensor, float], Prediction]


def denoiser(process: Process, network: Callable[[Tensor, float], Tensor], kind: str = "epsilon") -> Denoiser:
    """``network(x, t)``, whose output is of the given ``kind``, as a denoiser for :func:`integrate`."""
    if kind not in PREDICTION_TYPES:
        raise InputError("prediction_type", kind, f"one of {', '.join(PREDICTION_TYPES)}")

    def predict(x: Tensor, t: float) -> Prediction:
        return Prediction.read(kind, network(x, t), x, process.alpha(t), process.sigma(t))

    return predict


# ------------------------------------------------------------------ solvers


class Step(NamedTuple):
    """Step ``i`` of the ``n`` of a plan: from time ``t`` to ``s``, with network evaluations at ``stages``."""

    i: int
    n: int
    t: float
    s: float
    stages: tuple[float, ...]


class Solver(ABC, Generic[State]):
    """Moves x backwards in time.

    Attributes:
        process: whose alpha and sigma the coefficients come from.
    """

    process: Process

    @abstractmethod
    def stages(self, t: float, s: float, i: int, n: int) -> tuple[float, ...]:
        """Where step ``i`` of ``n``, from ``t`` to ``s``, evaluates the network; the first is ``t``."""

    @abstractmethod
    def init(self, x: Tensor) -> State:
        """The state before the first step."""

    @abstractmethod
    def stage(
        self, k: int, x: Tensor, pred: Prediction, step: Step, state: State, noise: Noise
    ) -> tuple[Tensor, State]:
        """After the evaluation ``pred`` at ``x`` and ``step.stages[k]``: the next point and state.

        The next point is where stage k + 1 evaluates the network; after the last stage it is x at
        ``step.s``. At stage 0 ``x`` is the step's start (whoever drives the solver may have changed it).
        """

    def first_order_step(self, x: Tensor, pred: Prediction, t: float, s: float) -> Tensor:
        """From ``t`` to ``s`` by ``pred`` alone: what takes the place of a step that can't be followed to its end."""
        return first_order(self.process, x, pred, t, s)

    def steps(self, times: Sequence[float]) -> list[Step]:
        """The steps over the falling grid ``times``: one an interval, unless a solver's step spans several."""
        n = len(times) - 1
        return [Step(i, n, t, s, self.stages(t, s, i, n)) for i, (t, s) in enumerate(pairwise(times))]

    def check(self, times: Sequence[float]) -> None:
        """Refuse a whole plan.

        Raises:
            InputError: the solver can't run over ``times``.
        """


class Integral(NamedTuple):
    """Where the integration ended, and how many network calls it took."""

    x: Tensor
    calls: int


class AdaptiveSolver(ABC):
    """A solver that chooses its steps as it goes; :func:`integrate` runs it, a timetable can't.

    Attributes:
        process: whose alpha and sigma the coefficients come from.
    """

    process: Process

    @abstractmethod
    def integrate(self, denoiser: Denoiser, x: Tensor, t: float, s: float, noise: Noise) -> Integral:
        """From ``x`` at time ``t`` to time ``s``."""


def plan(solver: Solver[Any], times: Sequence[float]) -> list[Step]:
    """The steps of ``solver`` over the falling grid ``times``.

    Raises:
        InputError: fewer than two times, not falling, not finite, later than the process's start; or the
            solver refuses the grid.
    """
    grid = falling(solver.process, times)
    if grid[-2] < solver.process.earliest:
        raise InputError("times", times, f"at least {solver.process.earliest:g} wherever the network is evaluated")
    solver.check(grid)
    return solver.steps(grid)


def falling(process: Process, times: Sequence[float]) -> list[float]:
    """``times`` as a grid over ``process``.

    Raises:
        InputError: fewer than two times, not falling, not finite, or later than the process's start.
    """
    grid = [float(t) for t in times]
    if len(grid) < 2 or not all(s < t for t, s in pairwise(grid)) or not all(map(math.isfinite, grid)):
        raise InputError("times", times, "at least two finite numbers, each less than the one before")
    if grid[0] > process.start:
        raise InputError("times", times, f"at most {process.start:g}, where the process starts")
    return grid


def integrate(
    solver: Solver[Any] | AdaptiveSolver,
    denoiser: Denoiser,
    x: Tensor,
    times: Sequence[float],
    generator: Generators = None,
) -> Integral:
    """Drive ``solver`` from ``x`` at ``times[0]`` to ``times[-1]``.

    Args:
        solver: any solver.
        denoiser: ``denoiser(x, t)`` gives a :class:`Prediction` (see :func:`denoiser`).
        x: batch-first start point.
        times: falling grid of times; an adaptive solver goes by its ends.
        generator: for stochastic solvers; a list holds one generator per sample.

    Raises:
        InputError: a grid that :func:`plan` refuses.
    """

    def noise(like: Tensor) -> Tensor:
        return gaussian(like, generator)

    if isinstance(solver, AdaptiveSolver):
        grid = falling(solver.process, times)
        return solver.integrate(denoiser, x, grid[0], grid[-1], noise)
    steps = plan(solver, times)
    state = solver.init(x)
    calls = 0
    for step in steps:
        for k, t in enumerate(step.stages):
            x, state = solver.stage(k, x, denoiser(x, t), step, state, noise)
            calls += 1
    return Integral(x, calls)


def first_order(process: Process, x: Tensor, pred: Prediction, t: float, s: float) -> Tensor:
    """phi(x, eps, t, s), or alpha_s x_0 + sigma_s eps where abar_t = 0 leaves no other way.

    Nothing is done between equal abar: at abar = 1 eps is not even defined.
    """
    abar = process.alpha_bar(t)
    if abar == process.alpha_bar(s):
        return x
    if process.sigma(s) == 0.0:
        return pred.x0 * process.alpha(s)
    if abar == 0.0:
        return torch.add(pred.x0 * process.alpha(s), pred.eps, alpha=process.sigma(s))
    return transfer(process, x, pred.eps, t, s)


def transfer(process: Process, x: Tensor, eps: Tensor, t: float, s: float) -> Tensor:
    """phi(x, eps, t, s) = a x - b eps, see :meth:`Process.transfer`; x itself between equal abar, whatever eps is."""
    a, b = process.transfer(t, s)
    if a == 1.0 and b == 0.0:
        return x
    return torch.add(x * a, eps, alpha=-b)


def take(state: State, index: Any) -> State:
    """``state`` with its samples re-indexed: ``index`` is applied to the first axis of every tensor.

    Raises:
        TypeError: the state holds something other than tensors, tuples, numbers, text and None.
    """
    if isinstance(state, Tensor):
        return cast(State, state[index])
    if isinstance(state, tuple):
        parts = [take(part, index) for part in state]
        return cast(State, type(state)(*parts) if hasattr(state, "_fields") else tuple(parts))
    if state is None or isinstance(state, (int, float, str)):
        return state
    raise TypeError(f"a solver's state can't hold a {type(state).__name__}")


def gaussian(like: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise with the shape, device and dtype of ``like``.

    With a list of generators each sample is drawn from its own, so a sample doesn't depend on the batch.
    Noise is drawn on the generator's device, so that a CPU generator gives the same noise everywhere.

    Raises:
        InputError: a list of generators whose length is not the batch size.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
    if len(generator) != len(like):
        raise InputError("generator", generator, f"one generator, or a list of {len(like)}, one per sample")
    rows = [gaussian(like[i], one) for i, one in enumerate(generator)]
    return torch.stack(rows)
