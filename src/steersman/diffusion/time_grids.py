"""Time grids: where a sampler evaluates the network.

A grid of N calls falls from the process's start to its clean end. Its nodes are equal steps in some
function of time:

    logsnr        lambda_t = log(alpha_t / sigma_t)      (Lu et al. 2022, arXiv 2206.00927); the same as equal
    exponential                                          steps of log r, r = sigma_t / alpha_t
    karras        r**(1 / 7)                             (Karras et al. 2022, arXiv 2206.00364, eq. 5)
    quadratic     sqrt(t)                                (Song et al. 2021, arXiv 2010.02502, appendix D.2)
    beta          r = r_min + (r_max - r_min) F(u), F the quantile function of Beta(0.6, 0.6), u falling in equal
                  steps                                  (as diffusers has it; dense at both ends)

Nodes are times of the process, whole or not: sigma and the time that the network is told always agree.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from scipy.stats import beta

from steersman.diffusion.solver import DiscreteVP, Process
from steersman.errors import InputError, nearest

TimeGrid = Literal["logsnr", "exponential", "karras", "quadratic", "beta"]
TIME_GRIDS: tuple[str, ...] = get_args(TimeGrid)
RHO = 7.0


def levels(grid: str, process: Process, count: int, start: float) -> list[float]:
    """``count`` times from ``start`` down to the process's earliest.

    Args:
        grid: see the module's table.
        process: the process; at ``start`` it must have some signal (except for ``quadratic``).
        count: of times, from 1.
        start: the first.

    Raises:
        InputError: an unknown grid, or a start without signal.
    """
    if grid not in TIME_GRIDS:
        raise InputError("grid", grid, nearest(str(grid), TIME_GRIDS))
    first, last = start, process.earliest
    u = np.linspace(0.0, 1.0, count)
    if grid == "quadratic":
        times = (math.sqrt(first) + u * (math.sqrt(last) - math.sqrt(first))) ** 2
        return _with_ends(times.tolist(), first, last)
    high, low = -process.log_snr(first), -process.log_snr(last)  # of log r
    if not math.isfinite(high):
        raise InputError(
            "grid", grid, f"quadratic or a spacing of timesteps: at the start t={first:g} there is no signal"
        )
    if grid in ("logsnr", "exponential"):
        log_r = high + u * (low - high)
    elif grid == "karras":
        log_r = RHO * np.log(np.exp(high / RHO) + u * (np.exp(low / RHO) - np.exp(high / RHO)))
    else:
        log_r = np.log(np.exp(low) + beta.ppf(1.0 - u, 0.6, 0.6) * (np.exp(high) - np.exp(low)))
    return _with_ends([process.time_at(-value) for value in log_r.tolist()], first, last)


def _with_ends(times: list[float], first: float, last: float) -> list[float]:
    # Both ends exactly, which rounding would miss.
    return [first, *times[1:-1], last] if len(times) > 1 else [first]


@lru_cache(maxsize=256)
def laid_out(grid: str, process: DiscreteVP, steps: int, start: float) -> tuple[float, ...]:
    """``steps`` times of a discrete process and -1, its clean end.

    Where the process ends at sigma = 0 the last call is at timestep 0. Where it ends at abar_0, the level of
    timestep 0, that level is the end of the last step, and no call is spent on it.

    Raises:
        InputError: as :func:`levels`; ``steps`` not from 1 to T.
    """
    T = len(process.table)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= T:
        raise InputError("num_inference_steps", steps, f"a whole number from 1 to {T} (num_train_timesteps)")
    if process.final == 1.0:
        return (*levels(grid, process, steps, start), -1.0)
    return (*levels(grid, process, steps + 1, start)[:-1], -1.0)


def spaced_past(spacing: str, steps: int, last: int, num_train_timesteps: int, steps_offset: int = 0) -> list[float]:
    """The grid of diffusers' DPM-Solver schedulers: N + 1 nodes whose last is no call, but where the end begins.

    Their reading of ``timestep_spacing`` differs from other schedulers': the last step leaves the node before
    timestep 0, for the clean end.

    Args:
        spacing: leading, trailing or linspace.
        steps: N.
        last: timesteps that are used: 0, ..., last - 1.
        num_train_timesteps: T.
        steps_offset: added to ``leading``.

    Raises:
        InputError: ``steps`` is not from 1 to T - 1 (trailing: T), or the offset leaves the schedule.
    """
    N, T = steps, num_train_timesteps
    most = T if spacing == "trailing" else last - 1
    if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or not 1 <= N <= most:
        raise InputError("num_inference_steps", N, f"a whole number from 1 to {most} with timestep_spacing={spacing}")
    nodes: np.ndarray
    if spacing == "linspace":
        nodes = np.linspace(0, last - 1, N + 1).round()[:0:-1]
    elif spacing == "leading":
        nodes = np.arange(N, 0, -1) * (last // (N + 1)) + steps_offset
        if nodes[0] > T - 1:
            raise InputError("steps_offset", steps_offset, f"less: the first of {N} timesteps is past {T - 1}")
    else:
        nodes = np.arange(last, 0, -T / N).round() - 1
    return [*nodes.astype(float).tolist(), -1.0]
