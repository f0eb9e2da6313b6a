r"""The two schedules of a residual denoising diffusion, and the paths through them.

From a clean image I_0 to a degraded one I_in, with I_res = I_in - I_0 and ε ~ N(0, I),

    I_u = I_{u-1} + α_u I_res + β_u ε,    u = 1, ..., T
    I_u = I_0 + ᾱ_u I_res + β̄_u ε,    ᾱ_u = sum_{i<=u} α_i (to 1),    β̄_u² = sum_{i<=u} β_i² (to s).

A *level* is a pair (ᾱ, β̄): how much of the residual and how much noise there is. The clean image is at (0, 0), the
degraded one with noise on it at (1, √s). Timestep t = u - 1 is what a network is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from steersman.errors import InputError, nearest

ScheduleName = Literal["decreasing", "increasing", "average", "power", "power_decreasing", "normal", "ddim"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
PathName = Literal["simultaneous", "residual_first", "noise_first"]


class Level(NamedTuple):
    """ᾱ and β̄."""

    alpha: float
    beta: float


CLEAN = Level(0.0, 0.0)


def increments(schedule: str, T: int = 1000, power: float = 1.0) -> np.ndarray:
    """T numbers from 0 that sum to 1, float64: the α_u, or the β_u² of s = 1.

        decreasing         ∝ T + 1 - u             (the published α)
        increasing         ∝ u                     (the published β²)
        average            1/T
        power              P(x, a) ∝ x^a           x = 0, ..., 1 in T equal steps, a = ``power``
        power_decreasing   P(1 - x, a) ∝ (1 - x)^a
        normal             ∝ exp(-z²/2)            z = -3, ..., 3 in T equal steps

    P(x, 1) is ``increasing`` of T - 1 steps behind one of 0, at which there is no noise yet.

    Raises:
        InputError: another schedule, T below 2, or a power that is not from 0.
    """
    if isinstance(T, bool) or not isinstance(T, int) or T < 2:
        raise InputError("num_train_timesteps", T, "a whole number of at least 2")
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power < math.inf:
        raise InputError("power", power, "a finite number from 0")
    u, x = np.arange(1, T + 1, dtype=np.float64), np.linspace(0.0, 1.0, T)
    shapes = {
        "decreasing": lambda: T + 1 - u,
        "increasing": lambda: u,
        "average": lambda: np.ones(T),
        "power": lambda: x**power,
        "power_decreasing": lambda: (1 - x) ** power,
        "normal": lambda: np.exp(-(np.linspace(-3.0, 3.0, T) ** 2) / 2),
    }
    if schedule not in shapes:
        raise InputError("schedule", schedule, nearest(str(schedule), shapes))
    y = shapes[schedule]()
    return y / y.sum()


@dataclass(frozen=True)
class Levels:
    """ᾱ and β̄ at the timesteps 0, ..., T - 1, in float64.

    Args:
        alpha, beta: (T,), neither falling; alpha from 0 to 1, beta from 0.
        end: the level at every negative timestep: clean, or the first one for networks that stop there.

    Raises:
        InputError: tables that fall, differ in length, or leave their range.
    """

    alpha: np.ndarray
    beta: np.ndarray
    end: Level = CLEAN

    def __post_init__(self) -> None:
        for name, table, most in (("alpha", self.alpha, 1.0), ("beta", self.beta, math.inf)):
            table = np.asarray(table, dtype=np.float64)
            grows = table.ndim == 1 and len(table) > 1 and bool((np.diff(table) >= 0).all())
            if not grows or not (table[0] >= 0 and table[-1] <= most + 1e-12 and np.isfinite(table).all()):
                allowed = "numbers from 0 that never fall" + (", to at most 1" if most == 1.0 else "")
                raise InputError(name, table, allowed)
            # Rounding of the sum must not lead past 1.
            object.__setattr__(self, name, np.minimum(table, most))
        if len(self.alpha) != len(self.beta):
            raise InputError("beta", f"{len(self.beta)} levels", f"{len(self.alpha)}, as alpha has")

    @classmethod
    def from_increments(cls, alpha: Sequence[float] | np.ndarray, beta_squared: Sequence[float] | np.ndarray) -> Levels:
        """From α_u and β_u², each of at least 0.

        Raises:
            InputError: a negative increment (a sum that falls), or α that sum to more than 1.
        """
        return cls(np.cumsum(alpha), np.sqrt(np.cumsum(np.asarray(beta_squared, dtype=np.float64))))

    @classmethod
    def from_alphas_cumprod(cls, abar: np.ndarray, end: float = 1.0) -> Levels:
        """Those of DDIM, whose x = √abar x_0 + √(1 - abar) ε is I_u of I_in = 0: ᾱ = 1 - √abar, β̄ = √(1 - abar).

        Args:
            abar: falling, (T,).
            end: abar at the clean end.
        """
        return cls(1 - np.sqrt(abar), np.sqrt(1 - abar), Level(1 - math.sqrt(end), math.sqrt(1 - end)))

    def __len__(self) -> int:
        return len(self.alpha)

    def at(self, t: int) -> Level:
        """The level at timestep ``t``; that of negative ones is the end's.

        Raises:
            InputError: ``t`` is not a whole number below T.
        """
        if t < 0:
            return self.end
        if int(t) != t or t >= len(self):
            raise InputError("timestep", t, f"a whole number up to {len(self) - 1}")
        return Level(float(self.alpha[int(t)]), float(self.beta[int(t)]))

    @property
    def start(self) -> Level:
        """Where sampling starts."""
        return self.at(len(self) - 1)


def grid(T: int, steps: int) -> list[int]:
    """The published grid: t = ⌊linspace(-1, T - 1, steps + 1)⌋ from T - 1 down, with -1 for the clean end.

    Raises:
        InputError: ``steps`` is not from 1 to T.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= T:
        raise InputError("num_inference_steps", steps, f"a whole number from 1 to {T} (num_train_timesteps)")
    # In whole numbers: in floating point, some of the whole values are truncated to the one below.
    return [-1 + i * T // steps for i in reversed(range(steps + 1))]


class Move(NamedTuple):
    """One network call and the step after it.

    Attributes:
        start, stop: levels.
        timestep: of the schedules, where there is one.
        told: ᾱ and β̄ that the networks are told, where they are told levels.
    """

    start: Level
    stop: Level
    timestep: int
    told: Level


def moves(levels: Levels, times: Sequence[int]) -> list[Move]:
    """Both levels fall together along ``times``, the published (simultaneous) way."""
    return [Move(levels.at(t), levels.at(s), t, levels.at(t)) for t, s in pairwise(times)]


def legs(levels: Levels, path: str, steps: int, loop_levels: bool = False) -> list[Move]:
    """First all of one kind is taken away and then all of the other, in ``steps`` calls altogether.

    Each leg has half of the calls (the first the odd one), on the published grid of so many.

    Args:
        levels: of the process.
        path: residual_first or noise_first.
        steps: at least 2.
        loop_levels: tell the networks the levels at the loop's timestep in both legs, as the authors' script does,
            though the other level has not fallen yet, or has fallen already.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InputError("num_inference_steps", steps, f"a whole number from 2, for the path {path}")
    top, T = levels.start, len(levels)
    found = []
    for leg, n in enumerate((steps - steps // 2, steps // 2)):
        for t, s in pairwise(grid(T, n)):
            a, b = levels.at(t), levels.at(s)
            if (path == "residual_first") == (leg == 0):
                rest = top.beta if leg == 0 else 0.0
                start, stop = Level(a.alpha, rest), Level(b.alpha, rest)
            else:
                rest = top.alpha if leg == 0 else 0.0
                start, stop = Level(rest, a.beta), Level(rest, b.beta)
            found.append(Move(start, stop, t, a if loop_levels else start))
    return found


def own_path(levels: Levels, path: Any) -> list[Move]:
    """A path of the user's: levels from the process's first to (0, 0), neither ever rising.

    Raises:
        InputError: another start or end, a level that rises, or a step that changes nothing.
    """
    try:
        points = [Level(float(a), float(b)) for a, b in path]
    except (TypeError, ValueError):
        raise InputError("path", path, "simultaneous, residual_first, noise_first, or pairs (ᾱ, β̄)") from None
    top = levels.start
    falls = all(s.alpha <= t.alpha and s.beta <= t.beta and s != t for t, s in pairwise(points))
    ends = len(points) > 1 and math.dist(points[0], top) < 1e-6 and points[-1] == CLEAN
    if not falls or not ends:
        allowed = f"pairs (ᾱ, β̄) from ({top.alpha:.6g}, {top.beta:.6g}) to (0, 0), neither of which ever rises"
        raise InputError("path", points, allowed)
    points[0] = top
    return [Move(t, s, -1, t) for t, s in pairwise(points)]
