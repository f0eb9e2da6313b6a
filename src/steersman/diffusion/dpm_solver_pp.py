r"""DPM-Solver++ (Lu, Zhou, Bao, Chen, Li & Zhu 2022, arXiv 2211.01095) and its noise-prediction sibling.

With lambda = log(alpha / sigma), which grows as t falls, and h = lambda_s - lambda_t > 0, the reverse process
from t to s is solved exactly in its linear part:

    x_s = (sigma_s / sigma_t) x_t + alpha_s int_0^h e^{-(h - u)} D(lambda_t + u) du              D = x_0(x, t)
    x_s = (alpha_s / alpha_t) x_t - sigma_s int_0^h e^{h - u} D(lambda_t + u) du                 D = eps(x, t)

A method replaces D by a polynomial in u. With phi_1(z) = (e^z - 1) / z, phi_2(z) = (phi_1(z) - 1) / z,
phi_3(z) = (phi_2(z) - 1/2) / z and D_0, D_1 = h D', D_2 = h**2 D'' at the step's start, all of them are

    x_s = a x_t + c [phi_1(z) D_0 + phi_2(z) D_1 + phi_3(z) D_2] + d noise                       ("heun", Taylor)
    x_s = a x_t + c  phi_1(z) [D_0 + D_1 / 2]                    + d noise                       ("midpoint")

    ================  =====  ===========================  ==============  ====  ================================
    algorithm         D      a                            c               z     d
    ================  =====  ===========================  ==============  ====  ================================
    dpmsolver++       x_0    sigma_s / sigma_t            alpha_s h       -h    0
    sde-dpmsolver++   x_0    e^{-h} sigma_s / sigma_t     2 alpha_s h     -2h   sigma_s sqrt(1 - e^{-2h})
    dpmsolver         eps    alpha_s / alpha_t            -sigma_s h      h     0
    sde-dpmsolver     eps    alpha_s / alpha_t            -2 sigma_s h    h     sigma_s sqrt(e^{2h} - 1)
    ================  =====  ===========================  ==============  ====  ================================

The derivatives are those of the polynomial through D at nodes u_j h from the start. *Multistep* takes the
nodes of the steps before (u_j < 0), one call a step; *singlestep* makes new ones within the step (0 < u_j < 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steersman.diffusion.scheduler import SolverScheduler
from steersman.diffusion.solver import (
    AdaptiveSolver,
    Denoiser,
    DiscreteVP,
    Integral,
    Noise,
    Prediction,
    Process,
    Solver,
    Step,
)
from steersman.diffusion.time_grids import TIME_GRIDS, laid_out, spaced_past
from steersman.errors import InputError, nearest

Method = Literal["multistep", "singlestep"]
Algorithm = Literal["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]
SolverType = Literal["midpoint", "heun"]
Grid = Literal["spacing", "logsnr", "exponential", "karras", "quadratic", "beta"]

METHODS: tuple[str, ...] = get_args(Method)
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
SOLVER_TYPES: tuple[str, ...] = get_args(SolverType)
GRIDS: tuple[str, ...] = get_args(Grid)


# ------------------------------------------------------------------ coefficients


def phi(z: float) -> tuple[float, float, float]:
    """phi_1, phi_2, phi_3 at ``z``, to about 1e-15 relative.

    Within |z| < 1 by their series sum_n z**n / (n + k)!: there the recurrence loses a digit of phi_3 for each
    factor of 3 that z falls by.
    """
    if abs(z) < 1.0:
        terms = [sum(z**n / math.factorial(n + k) for n in range(18)) for k in (1, 2, 3)]
        return terms[0], terms[1], terms[2]
    one = math.expm1(z) / z
    two = (one - 1.0) / z
    return one, two, (two - 0.5) / z


class Update(NamedTuple):
    """x_s = a x_t + sum_j weights_j D_j + d noise."""

    a: float
    weights: tuple[float, ...]
    d: float


@lru_cache(maxsize=8192)
def update(
    process: Process,
    algorithm: str,
    t: float,
    s: float,
    nodes: tuple[float, ...] = (),
    solver_type: str = "heun",
    compat: bool = False,
    multistep: bool = False,
) -> Update:
    """The coefficients of one move from ``t`` to ``s``, with D known at ``t`` and at further ``nodes``.

    Args:
        process: whose alpha, sigma and lambda.
        algorithm: a row of the module's table.
        t, s: start and end of the move.
        nodes: times of up to two further evaluations; the weights are for D at (t, *nodes).
        solver_type: how a move with one further node is taken; with two it is always Taylor's.
        compat: the third-order terms as published code has them: half of D_2 where ``multistep``, and for
            sde-dpmsolver++ phi_3 less its own 1/2, which tends to -1 alpha_s where 0 is right.
        multistep: see ``compat``.
    """
    alpha_t, sigma_t, lambda_t = process.alpha(t), process.sigma(t), process.log_snr(t)
    alpha_s, sigma_s, h = process.alpha(s), process.sigma(s), process.log_snr(s) - lambda_t
    if h == 0.0:
        return Update(1.0, (0.0,) * (1 + len(nodes)), 0.0)

    stochastic, of_data = algorithm.startswith("sde"), algorithm.endswith("++")
    if of_data:
        k = 2.0 if stochastic else 1.0
        a = sigma_s / sigma_t * (math.exp(-h) if stochastic else 1.0)
        d = sigma_s * math.sqrt(-math.expm1(-2.0 * h)) if stochastic else 0.0
        c, z, first = k * alpha_s * h, -k * h, -alpha_s * math.expm1(-k * h)
    else:
        k = 2.0 if stochastic else 1.0
        a = alpha_s / alpha_t
        d = sigma_s * math.sqrt(math.expm1(2.0 * h)) if stochastic else 0.0
        c, z, first = -k * sigma_s * h, h, -k * sigma_s * math.expm1(h)
    if not nodes:
        return Update(a, (first,), d)  # finite where h is not: x = D at sigma_s = 0

    _, phi_2, phi_3 = phi(z)
    u = [(process.log_snr(node) - lambda_t) / h for node in nodes]
    if len(u) == 1:
        w = (0.5 * first if solver_type == "midpoint" else c * phi_2) / u[0]
        return Update(a, (first - w, w), d)
    u1, u2 = u
    third = c * phi_3
    if compat and algorithm == "sde-dpmsolver++":
        third -= alpha_s
    if compat and multistep:
        third *= 0.5
    w1 = (c * phi_2 * u2 - 2.0 * third) / (u1 * (u2 - u1))
    w2 = (2.0 * third - c * phi_2 * u1) / (u2 * (u2 - u1))
    return Update(a, (first - w1 - w2, w1, w2), d)


def applied(move: Update, x: Tensor, D: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
    """a x + sum_j weights_j D_j + d noise."""
    if move.a == 0.0:  # the clean end, which forgets x
        y = D[0] * move.weights[0]
    else:
        y = (x * move.a).add_(D[0], alpha=move.weights[0])
    for weight, D_j in zip(move.weights[1:], D[1:], strict=True):
        y.add_(D_j, alpha=weight)
    return y if noise is None else y.add_(noise, alpha=move.d)


def singlestep_orders(order: int, calls: int, lower_order_final: bool = True, last_is_first: bool = False) -> list[int]:
    """The orders of singlestep's steps, which add up to ``calls``.

    As many steps of the full order as fit, and one of what is left: 3, 3, 2 for 8 calls. Where nothing is left
    and ``lower_order_final``, or where the last step must be of order 1 (``last_is_first``: it ends at
    sigma = 0), the last step of order k becomes two, of orders k - 1 and 1: 3, 3, 2, 1 for 9.
    """
    whole, left = divmod(calls, order)
    orders = [order] * whole + [left] * (left > 0)
    if (lower_order_final and not left) or last_is_first:
        last = orders.pop()
        orders += [last - 1, 1] if last > 1 else [1]
    return orders


# ------------------------------------------------------------------ the solver


class DPMState(NamedTuple):
    """What a step and the steps after it need.

    Attributes:
        x: the start of the step in progress.
        D: the predictions, latest first.
        times: where they were made.
        noise: d noise of the step in progress, up to its latest stage.
    """

    x: Tensor
    D: tuple[Tensor, ...]
    times: tuple[float, ...]
    noise: Tensor | None


@dataclass(frozen=True)
class DPMSolverPP(Solver[DPMState]):
    """DPM-Solver++ of orders 1 to 3, see the module's equations. N calls on a grid of N intervals, always.

    Order 1 is DDIM. From order 2 on ``multistep`` begins with a step of order 1 and grows with its history;
    a ``singlestep`` step of order k spans k intervals of the grid, with its inner calls at the grid's nodes
    (:func:`singlestep_orders`). A step that ends at sigma = 0 is of order 1: its limit is x = D.

    With ``compat`` third-order moves are those of the published code (diffusers, k-diffusion, the authors'):
    multistep's D_2 is half of the polynomial's, so that global order 2 is all there is; sde-dpmsolver++ has a
    wrong constant in the D_2 term; singlestep's second stage follows ``solver_type``, and stages and end of a
    stochastic step draw independent noise. ``compat=False`` is what the equations say: the whole D_2, begun
    with a second-order step over two intervals instead of a first-order one, so that global order 3 is
    reached; and one Brownian path through all stages of a step. In few calls the published form is the
    safer one: the whole D_2 extrapolates twice as hard.

    Args:
        process: the process.
        order: 1, 2 or 3.
        method: multistep or singlestep.
        algorithm_type: a row of the module's table; the sde ones draw noise in each step.
        solver_type: midpoint or heun, for second-order moves (and singlestep's third-order ones); the paper's
            names are dpmsolver and taylor.
        compat: see above.
        lower_order_final: multistep takes its last step but one with order 2 at most and its last with order
            1, where there are fewer than ``lower_order_below`` steps; singlestep see :func:`singlestep_orders`.
        lower_order_below: see ``lower_order_final``.
        euler_at_final: the last step is of order 1, however many there are.

    Raises:
        InputError: a setting that is not one of these; later, fewer steps than ``order``, or a noise
            prediction's run from alpha = 0 or to sigma = 0.
    """

    process: Process
    order: int = 2
    method: Method = "multistep"
    algorithm_type: Algorithm = "dpmsolver++"
    solver_type: SolverType = "midpoint"
    compat: bool = True
    lower_order_final: bool = True
    lower_order_below: int = 15
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in (1, 2, 3):
            raise InputError("order", self.order, "1, 2 or 3")
        _among("method", self.method, METHODS)
        _among("algorithm_type", self.algorithm_type, ALGORITHMS)
        _among("solver_type", self.solver_type, SOLVER_TYPES)
        below = self.lower_order_below
        if isinstance(below, bool) or not isinstance(below, int) or below < 0:
            raise InputError("lower_order_below", below, "a whole number from 0")

    @property
    def of_data(self) -> bool:
        """Whether D is x_0; otherwise it is eps."""
        return self.algorithm_type.endswith("++")

    @property
    def stochastic(self) -> bool:
        return self.algorithm_type.startswith("sde")

    def check(self, times: Sequence[float]) -> None:
        p = self.process
        if not self.of_data and math.isinf(p.log_snr(times[-1])):
            raise InputError(
                "algorithm_type",
                self.algorithm_type,
                "dpmsolver++ or sde-dpmsolver++ for a run that ends at sigma = 0 (or let it end at the first noise "
                "level: set_alpha_to_one=False)",
            )
        if not self.of_data and math.isinf(p.log_snr(times[0])):
            raise InputError(
                "algorithm_type",
                self.algorithm_type,
                f"dpmsolver++ or sde-dpmsolver++ for a run from t={times[0]:g}, where there is no signal (alpha = 0)",
            )
        if len(times) - 1 < self.order:
            raise InputError("num_inference_steps", len(times) - 1, f"at least {self.order} for order={self.order}")

    def steps(self, times: Sequence[float]) -> list[Step]:
        n = len(times) - 1
        levels = [self.process.log_snr(t) for t in (times[0], times[-2], times[-1])]
        signal = math.isfinite(levels[0])
        if self.method == "singlestep":
            first = [] if signal or n == 1 else [1]
            last = math.isinf(levels[-1]) or self.euler_at_final
            orders = first + singlestep_orders(self.order, n - len(first), self.lower_order_final, last)
        elif self.order == 3 and not self.compat and signal:
            orders = [2] + [1] * (n - 2)
        else:
            orders = [1] * n
        ends = [0, *accumulate(orders)]
        return [
            Step(i, len(orders), times[ends[i]], times[ends[i + 1]], tuple(times[ends[i] : ends[i + 1]]))
            for i in range(len(orders))
        ]

    def stages(self, t: float, s: float, i: int, n: int) -> tuple[float, ...]:
        return (t,)

    def init(self, x: Tensor) -> DPMState:
        return DPMState(x, (), (), None)

    def stage(
        self, k: int, x: Tensor, pred: Prediction, step: Step, state: DPMState, noise: Noise
    ) -> tuple[Tensor, DPMState]:
        within = len(step.stages) > 1 or self.method == "singlestep"
        D_k = pred.x0 if self.of_data else pred.eps
        D, times, start, path = state.D, state.times, state.x, state.noise
        if k == 0:
            start, path = x, None
            if within:
                D, times = (), ()
        D, times = (D_k, *D), (step.stages[k], *times)

        s = step.s if k + 1 == len(step.stages) else step.stages[k + 1]
        order = k + 1 if within else self._order(step, len(D))
        move, used = self._move(step, s, times, order)
        if self.stochastic and move.d:
            drawn = noise(x)
            if self.compat or not within:
                after = applied(move, start, [D[j] for j in used], drawn)
            else:
                path = self._path(path, times[0], s, drawn)
                after = applied(move, start, [D[j] for j in used]).add_(path)
        else:
            after = applied(move, start, [D[j] for j in used])
        if k + 1 < len(step.stages):
            return after, DPMState(start, D, times, path)
        keep = self.order - 1 if self.method == "multistep" else 0
        return after, DPMState(after, D[:keep], times[:keep], None)

    def _order(self, step: Step, known: int) -> int:
        """Of a multistep step with ``known`` predictions, its own included."""
        p, left = self.process, step.n - step.i
        order = min(self.order, known)
        if left == 1 and (self.euler_at_final or math.isinf(p.log_snr(step.s))):
            return 1
        return min(order, left) if self.lower_order_final and step.n < self.lower_order_below else order

    def _move(self, step: Step, s: float, times: tuple[float, ...], order: int) -> tuple[Update, list[int]]:
        """The coefficients from the step's start to ``s``, and which predictions they weigh, the start's first."""
        p, last = self.process, s == step.s
        start = times.index(step.t)
        others = [j for j in range(len(times)) if j != start and math.isfinite(p.log_snr(times[j]))]
        used = others[: order - 1]
        kind: str = self.solver_type
        if len(step.stages) == 3:
            if last and kind == "midpoint":
                used, kind = others[:1], "heun"  # the paper's DPM-Solver-3 goes by the last stage alone
            elif not last and not self.compat:
                kind = "heun"
        nodes = tuple(times[j] for j in used)
        multistep = self.method == "multistep"
        return update(p, self.algorithm_type, step.t, s, nodes, kind, self.compat, multistep), [start, *used]

    def _path(self, path: Tensor | None, t: float, s: float, drawn: Tensor) -> Tensor:
        """d noise at ``s``, grown from what it was at ``t``: one Brownian path through a step's stages."""
        part = update(self.process, self.algorithm_type, t, s)
        return drawn * part.d if path is None else (path * part.a).add_(drawn, alpha=part.d)


# ------------------------------------------------------------------ adaptive steps


class AdaptiveIntegral(Integral):
    """An :class:`Integral` of a solver that chose its own steps.

    Attributes:
        accepted: the steps taken, each (from, to, error estimate E <= 1).
        rejected: how many attempts were not taken.
    """

    accepted: tuple[tuple[float, float, float], ...] = ()
    rejected: int = 0


@dataclass(frozen=True)
class AdaptiveDPMSolverPP(AdaptiveSolver):
    """DPM-Solver-12 and -23 with data prediction: steps as long as an error estimate allows (Lu et al. 2022).

    Two solutions come from the same stages, x_low of order ``order`` - 1 and x_high of ``order``:

        order 2: order 1 and singlestep order 2, stage at h / 2
        order 3: singlestep orders 2 and 3, stages at h / 3 and 2 h / 3 (in lambda)
        delta = max(atol, rtol max(|x_low|, |x_prev|)),    x_prev the x_low of the step before (at first x)
        E = max over the batch of sqrt(mean(((x_high - x_low) / delta)**2))

    x_high is taken if E <= 1. Taken or not, the next h is h min(theta E**(-1/order), growth), at most what
    is left. All samples share h, so a sample's result depends on its batch. A refused attempt costs
    ``order`` - 1 calls (its first is kept), any other ``order``.

    Args:
        process: the process.
        order: 2 or 3.
        algorithm_type: dpmsolver++ or dpmsolver.
        solver_type: midpoint or heun.
        rtol, atol: tolerances, relative and absolute.
        h: the first step, in lambda.
        theta: how much of the step that the error allows is taken.
        growth: most that a step is longer than the one before (E = 0 would allow any).

    Raises:
        InputError: a setting out of range; later, an end beyond the network's earliest time, a start without
            signal, a network output that is not finite, or tolerances that no step satisfies.
    """

    process: Process
    order: int = 3
    algorithm_type: Algorithm = "dpmsolver++"
    solver_type: SolverType = "midpoint"
    rtol: float = 0.05
    atol: float = 0.0078
    h: float = 0.05
    theta: float = 0.9
    growth: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in (2, 3):
            raise InputError("order", self.order, "2 or 3 for adaptive steps")
        _among("algorithm_type", self.algorithm_type, ("dpmsolver++", "dpmsolver"))
        _among("solver_type", self.solver_type, SOLVER_TYPES)
        for name, value in (("rtol", self.rtol), ("atol", self.atol), ("h", self.h)):
            if not 0 < value < math.inf:
                raise InputError(name, value, "a number above 0")
        if not 0 < self.theta <= 1:
            raise InputError("theta", self.theta, "a number above 0, at most 1")
        if not self.growth > 1:
            raise InputError("growth", self.growth, "a number above 1")

    def integrate(self, denoiser: Denoiser, x: Tensor, t: float, s: float, noise: Noise) -> AdaptiveIntegral:
        p, end = self.process, self.process.log_snr(s)
        if s < p.earliest or math.isinf(end):
            raise InputError("times", s, f"an end at {p.earliest:g} or later: adaptive steps end where sigma > 0")
        if math.isinf(p.log_snr(t)):
            raise InputError("times", t, "a start with some signal (alpha > 0)")
        inner = (1 / 2,) if self.order == 2 else (1 / 3, 2 / 3)

        def predicted(x: Tensor, t: float) -> Tensor:
            pred = denoiser(x, t)
            return pred.x0 if self.algorithm_type == "dpmsolver++" else pred.eps

        previous, h, calls, rejected = x, self.h, 0, 0
        accepted: list[tuple[float, float, float]] = []
        first: Tensor | None = None
        while t > s:
            left = end - p.log_snr(t)
            # A step that would leave (almost) nothing goes to the end.
            final = h >= left * (1.0 - 1e-9)
            h = min(h, left)
            after = s if final else p.time_at(p.log_snr(t) + h)
            stages = [p.time_at(min(p.log_snr(t) + r * h, end)) for r in inner]
            if not all(v < u for u, v in pairwise([t, *stages, after])):
                raise InputError(
                    "rtol", self.rtol, f"larger, or atol (={self.atol:g}): no step from t={t:g} satisfies them"
                )
            if first is None:
                first, calls = predicted(x, t), calls + 1
            D = [first]
            for k, stage in enumerate(stages):
                D.append(predicted(self._moved(x, D, t, stage, stages[:k], "heun"), stage))
                calls += 1
            low = self._moved(x, D[:-1], t, after, stages[:-1], self.solver_type)
            if self.order == 3 and self.solver_type == "midpoint":
                high = self._moved(x, [first, D[-1]], t, after, stages[-1:], "heun")
            else:
                high = self._moved(x, D, t, after, stages, self.solver_type)
            delta = (torch.maximum(low.abs(), previous.abs()) * self.rtol).clamp(min=self.atol)
            E = float(((high - low) / delta).flatten(1).square().mean(1).sqrt().max())
            if not math.isfinite(E):
                raise InputError("denoiser", E, f"finite in what it predicts (between t={t:g} and {after:g})")
            if E <= 1.0:
                accepted.append((t, after, E))
                x, previous, t, first = high, low, after, None
            else:
                rejected += 1
            h *= self.growth if E == 0.0 else min(self.theta * E ** (-1.0 / self.order), self.growth)
        found = AdaptiveIntegral(x, calls)
        found.accepted, found.rejected = tuple(accepted), rejected
        return found

    def _moved(self, x: Tensor, D: list[Tensor], t: float, s: float, nodes: list[float], kind: str) -> Tensor:
        return applied(update(self.process, self.algorithm_type, t, s, tuple(nodes), kind), x, D)


# ------------------------------------------------------------------ the scheduler

SIGMA_GRIDS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "logsnr",
}
OTHER_FAMILIES = {"algorithm_type": ("deis",), "solver_type": ("logrho", "bh1", "bh2")}
"""Settings of diffusers' DEIS and UniPC; its DPM-Solver too takes its defaults in their place."""


def from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of another scheduler in this one's names, as diffusers' DPM-Solver schedulers would read it.

    Raises:
        InputError: a setting of flow matching, which has no variance-preserving process.
    """
    c = dict(config)
    if "lower_order_below" in c:
        return c  # this scheduler's own
    c.pop("set_alpha_to_one", None)  # of DDIM and PNDM; theirs end at sigma = 0 all the same
    if "solver_order" not in c:
        return c
    if c.pop("use_flow_sigmas", False):
        raise InputError("use_flow_sigmas", True, "false: this scheduler is for variance-preserving processes")
    for name, grid in SIGMA_GRIDS.items():
        if c.pop(name, False):
            c["grid"] = grid
    c["order"] = c.pop("solver_order")
    c["set_alpha_to_one"] = c.pop("final_sigmas_type", "zero") == "zero"
    for name, values in OTHER_FAMILIES.items():
        if c.get(name) in values:
            del c[name]
    # Of their two schedulers only the multistep one has a spacing.
    c.setdefault("method", "multistep" if "timestep_spacing" in c else "singlestep")
    c.setdefault("timestep_spacing", "linspace")
    c["_use_default_values"] = []  # or diffusers would put this scheduler's defaults for theirs
    return c


class DPMSolverPPScheduler(SolverScheduler):
    """:class:`DPMSolverPP` as a diffusers scheduler, N calls for ``num_inference_steps=N``.

    ``from_config`` also understands the settings of diffusers' ``DPMSolverMultistepScheduler`` and
    ``DPMSolverSinglestepScheduler`` (``solver_order``, ``use_karras_sigmas``, ``final_sigmas_type``, ...), and
    reads those of any other scheduler as these do: time is laid out in their way
    (:func:`~steersman.diffusion.time_grids.spaced_past`), and ends at sigma = 0 unless ``set_alpha_to_one``
    is set to false here.

    Args:
        order: 1, 2 (for guided sampling) or 3 (unconditional).
        method, algorithm_type, solver_type, compat, lower_order_final, lower_order_below, euler_at_final: see
            :class:`DPMSolverPP`.
        grid: ``spacing``: the pipeline's ``timestep_spacing``; or, over the whole schedule, ``logsnr``
            (= ``exponential``), ``karras``, ``quadratic``, ``beta``
            (:mod:`~steersman.diffusion.time_grids`), whose times need not be whole.
        lambda_min_clipped: timesteps of less log(alpha / sigma) are left out; None is -5.1 for the cosine
            schedule squaredcos_cap_v2, as in the authors' code, and no limit for others.
    """

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if isinstance(config, dict):
            config = from_diffusers(config)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def make_solver(
        self,
        process: DiscreteVP,
        *,
        order: int = 2,
        method: Method = "multistep",
        algorithm_type: Algorithm = "dpmsolver++",
        solver_type: SolverType = "midpoint",
        compat: bool = True,
        grid: Grid = "spacing",
        lower_order_final: bool = True,
        lower_order_below: int = 15,
        euler_at_final: bool = False,
        lambda_min_clipped: float | None = None,
    ) -> DPMSolverPP:
        _among("grid", grid, GRIDS)
        if lambda_min_clipped is not None and not lambda_min_clipped < process.log_snr(0.0):
            raise InputError(
                "lambda_min_clipped", lambda_min_clipped, f"None, or a number below {process.log_snr(0.0):.3g}"
            )
        return DPMSolverPP(
            process,
            order,
            method,
            algorithm_type,
            solver_type,
            compat,
            lower_order_final,
            lower_order_below,
            euler_at_final,
        )

    def make_grid(self, process: DiscreteVP, steps: int) -> list[float]:
        c: Any = self.config
        least = c.lambda_min_clipped
        if least is None:
            cosine = c.beta_schedule == "squaredcos_cap_v2" and c.trained_betas is None
            least = -5.1 if cosine and not c.rescale_betas_zero_snr else -math.inf
        # The rest of a schedule is a schedule: its first `last` timesteps.
        last = c.num_train_timesteps
        while least > -math.inf and process.log_snr(float(last - 1)) < least:
            last -= 1
        if c.grid in TIME_GRIDS:
            return [*laid_out(c.grid, process, steps, float(last - 1))]
        return spaced_past(c.timestep_spacing, steps, last, c.num_train_timesteps, c.steps_offset)


def _among(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(name, value, nearest(str(value), allowed))
