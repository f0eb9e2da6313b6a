"""Classical solvers of the reverse process: DDIM, Euler, Heun, fourth-order Runge-Kutta.

With x = alpha x_0 + sigma eps the deterministic reverse process is the ordinary differential equation

    dx/dt = alpha'(t) x_0(x, t) + sigma'(t) eps(x, t)                    in the time t,
    d(x/alpha)/dr = eps(x, t),    r = sigma/alpha                        in the noise ratio r.

In r the right-hand side is the network itself, without the stiff linear part; Euler's step in r is
DDIM's. Textbook methods in t are the baseline that pseudo numerical methods were measured against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from steersman.diffusion.scheduler import SolverScheduler
from steersman.diffusion.solver import Noise, Prediction, Process, Solver, Step, first_order
from steersman.errors import InputError


@dataclass(frozen=True)
class DDIM(Solver[tuple[()]]):
    """Denoising diffusion implicit models (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

    x_s = alpha_s x_0 + sqrt(sigma_s**2 - w**2) eps + w z,    z ~ N(0, I),
    w = eta (sigma_s / sigma_t) sqrt(1 - abar_t / abar_s)

    Args:
        process: the process.
        eta: 0 is deterministic, 1 is ancestral sampling (DDPM with its posterior's variance).

    Raises:
        InputError: ``eta`` is not in [0, 1].
    """

    process: Process
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise InputError("eta", self.eta, "a number from 0 to 1")

    def stages(self, t: float, s: float, i: int, n: int) -> tuple[float, ...]:
        return (t,)

    def init(self, x: Tensor) -> tuple[()]:
        return ()

    def stage(
        self, k: int, x: Tensor, pred: Prediction, step: Step, state: tuple[()], noise: Noise
    ) -> tuple[Tensor, tuple[()]]:
        p, t, s = self.process, step.t, step.s
        if self.eta == 0.0:
            return first_order(p, x, pred, t, s), state
        w = self.eta * p.sigma(s) / p.sigma(t) * math.sqrt(1.0 - p.alpha_bar(t) / p.alpha_bar(s))
        mean = torch.add(pred.x0 * p.alpha(s), pred.eps, alpha=math.sqrt(max(p.sigma(s) ** 2 - w * w, 0.0)))
        return (torch.add(mean, noise(x), alpha=w) if w > 0.0 else mean), state


class Slopes(NamedTuple):
    """The step's start and the slopes found so far."""

    x: Tensor
    k: tuple[Tensor, ...]


@dataclass(frozen=True)
class RungeKutta(Solver[Slopes]):
    """An explicit Runge-Kutta method on dy/du = f, with nodes c, matrix A and weights b.

    k_j = f(y_j, u + c_j h),    y_j = y + h sum_l A_jl k_l,    y(u + h) = y + h sum_j b_j k_j

    A subclass gives the tableau, and whether u is the time t (y = x) or the noise ratio r (y = x/alpha).
    A step that ends before the network's earliest time, or starts at abar = 0, is one transfer (DDIM).

    Args:
        process: the process.
    """

    process: Process

    c: ClassVar[tuple[float, ...]] = (0.0,)
    A: ClassVar[tuple[tuple[float, ...], ...]] = ((),)
    b: ClassVar[tuple[float, ...]] = (1.0,)
    in_time: ClassVar[bool] = False

    def stages(self, t: float, s: float, i: int, n: int) -> tuple[float, ...]:
        if s < self.process.earliest or self.process.alpha_bar(t) == 0.0:
            return (t,)
        return tuple(t + c * (s - t) for c in self.c)

    def init(self, x: Tensor) -> Slopes:
        return Slopes(x, ())

    def stage(
        self, k: int, x: Tensor, pred: Prediction, step: Step, state: Slopes, noise: Noise
    ) -> tuple[Tensor, Slopes]:
        p, t, s = self.process, step.t, step.s
        if len(step.stages) < len(self.c) or p.alpha_bar(t) == 0.0:
            return first_order(p, x, pred, t, s), state
        start, slopes = (x, ()) if k == 0 else state
        last = k + 1 == len(self.c)
        weights = self.b if last else self.A[k + 1]
        if self.in_time:
            dalpha, dsigma = p.slope(step.stages[k])
            slopes = (*slopes, torch.add(pred.x0 * dalpha, pred.eps, alpha=dsigma))
            scale, h = 1.0, s - t
        else:
            u = s if last else step.stages[k + 1]
            slopes = (*slopes, pred.eps)
            scale = p.alpha(u) / p.alpha(t)
            h = p.alpha(u) * (p.sigma(s) / p.alpha(s) - p.sigma(t) / p.alpha(t))
        y = start * scale
        for weight, slope in zip(weights, slopes, strict=True):
            if weight:
                y = torch.add(y, slope, alpha=weight * h)
        return y, Slopes(start, slopes)


class Euler(RungeKutta):
    """Euler's method in the noise ratio: x_s/alpha_s = x/alpha_t + (r_s - r_t) eps. Equal to DDIM."""


class Heun(RungeKutta):
    """Heun's method in the noise ratio (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    Two calls a step: the mean of the slopes at both ends. Second order. The step to the clean end is Euler's.
    """

    c = (0.0, 1.0)
    A = ((), (1.0,))
    b = (0.5, 0.5)


class RK4(RungeKutta):
    """The classical fourth-order Runge-Kutta method in the time t, four calls a step.

    The "fourth-order numerical" baseline of Liu et al. (2022), as in textbooks.
    """

    c = (0.0, 0.5, 0.5, 1.0)
    A = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    b = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    in_time = True


class DDIMScheduler(SolverScheduler):
    """:class:`DDIM` as a diffusers scheduler; ``eta`` is set here, not at each call."""

    def make_solver(self, process: Process, *, eta: float = 0.0) -> DDIM:
        return DDIM(process, eta)


class EulerScheduler(SolverScheduler):
    """:class:`Euler` as a diffusers scheduler."""

    def make_solver(self, process: Process) -> Euler:
        return Euler(process)


class HeunScheduler(SolverScheduler):
    """:class:`Heun` as a diffusers scheduler."""

    def make_solver(self, process: Process) -> Heun:
        return Heun(process)


class RK4Scheduler(SolverScheduler):
    """:class:`RK4` as a diffusers scheduler."""

    def make_solver(self, process: Process) -> RK4:
        return RK4(process)
