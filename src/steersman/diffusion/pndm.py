"""PNDM: pseudo numerical methods for diffusion models (Liu, Ren, Lin & Zhao, ICLR 2022, arXiv 2202.09778).

A classical method for dx/dt = f splits into a *gradient part*, which combines evaluations of f, and a
*transfer part*, which moves x along the result. PNDM keeps the weights of the gradient part, applies
them to the network's noise estimates, and transfers along DDIM's exact step for a constant noise
(eq. 9), which stays on the manifold of noisy data:

    phi(x, eps, t, s) = sqrt(abar_s / abar_t) x
                        - (abar_s - abar_t) eps / [sqrt(abar_t) (sqrt((1 - abar_s) abar_t) + sqrt((1 - abar_t) abar_s))]

With e_t = eps(x_t, t), e_{t+d} of the step before, and so on:

    pseudo linear multistep    e = (55 e_t - 59 e_{t+d} + 37 e_{t+2d} - 9 e_{t+3d}) / 24         (eq. 12)
                               e = (23 e_t - 16 e_{t+d} + 5 e_{t+2d}) / 12,   e = (3 e_t - e_{t+d}) / 2
    pseudo Runge-Kutta         e_1 = eps(x, t)                      x_1 = phi(x, e_1, t, m),   m = (t + s) / 2
                               e_2 = eps(x_1, m)                    x_2 = phi(x, e_2, t, m)
                               e_3 = eps(x_2, m)                    x_3 = phi(x, e_3, t, s)
                               e_4 = eps(x_3, s)                    e = (e_1 + 2 e_2 + 2 e_3 + e_4) / 6   (eq. 13)
    pseudo improved Euler      e_1 = eps(x, t)                      x_1 = phi(x, e_1, t, s)
                               e_2 = eps(x_1, s)                    e = (e_1 + e_2) / 2
    then                       x_s = phi(x, e, t, s)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from steersman.diffusion.scheduler import SolverScheduler
from steersman.diffusion.solver import (
    DiscreteVP,
    Noise,
    Prediction,
    Process,
    Solver,
    Step,
    first_order,
    transfer,
)
from steersman.errors import InputError

Variant = Literal["plms", "f-pndm", "s-pndm", "prk"]
VARIANTS: tuple[str, ...] = get_args(Variant)

RUNGE_KUTTA_STEPS = {"plms": 0, "f-pndm": 3, "s-pndm": 0}
ORDER = {"plms": 4, "f-pndm": 4, "s-pndm": 2, "prk": 1}
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
IMPROVED_EULER = (1 / 2, 1 / 2)
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PNDMState(NamedTuple):
    """What a step and the steps after it need.

    Attributes:
        x: the start of the step in progress.
        g: the weighted sum of its evaluations so far.
        e: e_t, e_{t+d}, ...: the history, latest first.
        times: where the history was evaluated.
    """

    x: Tensor
    g: Tensor | None
    e: tuple[Tensor, ...]
    times: tuple[float, ...]


@dataclass(frozen=True)
class PNDMSolver(Solver[PNDMState]):
    """Pseudo numerical methods, see the module's equations.

    ===========  ===========================================  =====================
    variant      steps                                        network calls for N
    ===========  ===========================================  =====================
    ``plms``     improved Euler, then order 2, 3, 4, 4, ...   N + 1
    ``f-pndm``   3 Runge-Kutta, then order 4                  N + 9
    ``s-pndm``   improved Euler, then order 2                 N + 1
    ``prk``      Runge-Kutta throughout                       4 N
    ===========  ===========================================  =====================

    On a grid of unequal steps the multistep weights are those of variable-step Adams-Bashforth in t
    (:func:`adams_bashforth`). A Runge-Kutta or Euler step that would evaluate the network beyond its
    earliest time, or that starts at abar = 0, is one transfer along e_t (and takes one call). Run from
    the middle of a plan, the order grows with the history: 1, 2, 3, 4.

    Second order in t for every variant: the weights integrate in t, the transfer in sigma/alpha.

    Args:
        process: the process.
        variant: see the table.

    Raises:
        InputError: an unknown variant; later, ``f-pndm`` over fewer than 4 steps.
    """

    process: Process
    variant: Variant = "plms"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError("variant", self.variant, f"one of {', '.join(VARIANTS)}")

    def check(self, times: Sequence[float]) -> None:
        if self.variant == "f-pndm" and len(times) < 5:
            raise InputError(
                "num_inference_steps",
                len(times) - 1,
                "at least 4 for variant='f-pndm' (3 Runge-Kutta steps first)",
            )

    def stages(self, t: float, s: float, i: int, n: int) -> tuple[float, ...]:
        if s < self.process.earliest or self.process.alpha_bar(t) == 0.0:
            return (t,)
        if self.variant == "prk" or i < RUNGE_KUTTA_STEPS[self.variant]:
            m = (t + s) / 2
            return (t, m, m, s)
        if i == 0:
            return (t, s)
        return (t,)

    def init(self, x: Tensor) -> PNDMState:
        return PNDMState(x, None, (), ())

    def stage(
        self, k: int, x: Tensor, pred: Prediction, step: Step, state: PNDMState, noise: Noise
    ) -> tuple[Tensor, PNDMState]:
        p, t, s = self.process, step.t, step.s
        e_k = pred.eps
        if k == 0:
            n = ORDER[self.variant]
            state = PNDMState(x, None, (e_k, *state.e)[:n], (t, *state.times)[:n])
        if len(step.stages) == 1:
            if len(state.e) == 1:
                return first_order(p, x, pred, t, s), state
            weights = adams_bashforth(state.times, s)
            return transfer(p, x, combine(weights, state.e), t, s), state

        # Runge-Kutta (4 stages) or improved Euler (2 stages): x_k starts at the step's start again.
        weights = RUNGE_KUTTA if len(step.stages) == 4 else IMPROVED_EULER
        g = e_k * weights[k] if state.g is None else torch.add(state.g, e_k, alpha=weights[k])
        if k + 1 < len(weights):
            return transfer(p, state.x, e_k, t, step.stages[k + 1]), state._replace(g=g)
        return transfer(p, state.x, g, t, s), state._replace(g=None)


def combine(weights: Sequence[float], e: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j e_j."""
    total = e[0] * weights[0]
    for weight, e_j in zip(weights[1:], e[1:], strict=True):
        total = total.add_(e_j, alpha=weight)
    return total


@lru_cache(maxsize=4096)
def adams_bashforth(times: tuple[float, ...], s: float) -> tuple[float, ...]:
    """Weights w_j of the mean over [s, times[0]] of the polynomial through e at ``times``, latest first.

    They solve sum_j w_j u_j**m = 1 / (m + 1), m = 0, 1, ..., with u_j = (times_j - t) / (s - t). Equal
    steps give the tables of the module's equations.
    """
    t = times[0]
    h = t - s
    if all(abs(u - t - j * h) <= 1e-9 * h for j, u in enumerate(times)):
        return ADAMS_BASHFORTH[len(times)]
    if h < 1e-9 * (times[-1] - t):
        return (1.0, *[0.0] * (len(times) - 1))  # the limit of a step that is nothing beside its history
    u = (np.array(times) - t) / (s - t)
    powers = np.arange(len(times))
    return tuple(np.linalg.solve(u[None, :] ** powers[:, None], 1.0 / (powers + 1)).tolist())


class OfficialIndexVP(DiscreteVP):
    """The process as the authors' code reads it: abar one index late, abar_{t+1} at time t.

    Half-integer times read the truncated index, and the clean end is abar_0. The network was trained
    with abar_t at time t; this is for reproducing the authors' numbers.
    """

    def __init__(self, process: DiscreteVP) -> None:
        super().__init__(process.table, process.table[0])

    def alpha_bar(self, t: float) -> float:
        if t < 0:
            return self.final
        if int(t) + 1 > self.start:
            raise InputError("official_index", True, f"used with timesteps below {self.start:g}, fewer steps")
        return self._abar[int(t) + 1]


class PNDMScheduler(SolverScheduler):
    """:class:`PNDMSolver` as a diffusers scheduler.

    Args:
        variant: ``plms`` (one extra call over the run), ``s-pndm`` (the same, order 2), ``f-pndm`` (nine extra
            calls) or ``prk`` (four calls a step).
        official_index: read abar one index late, as the authors' code does (:class:`OfficialIndexVP`).
    """

    def make_solver(
        self, process: DiscreteVP, *, variant: Variant = "plms", official_index: bool = False
    ) -> PNDMSolver:
        return PNDMSolver(OfficialIndexVP(process) if official_index else process, variant)
