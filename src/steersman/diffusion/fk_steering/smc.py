r"""The pure core of FK steering: sequential Monte Carlo in log space, for any sampling loop.

The target is p_tar(x_0) ∝ p(x_0) exp(λ r(x_0)), with p what the sampler draws. Any *potentials* G with

    Π_t G_t(x_T, ..., x_t) = exp(λ r(x_0))

make it the end of a Feynman-Kac model, whatever the G_t are on the way (Singhal et al. 2025, arXiv 2501.06848,
section 3). k particles are moved by the sampler; at a *scored* step each is weighted by its G_t, and the particles are
resampled. With r_t the reward that a particle's state promises at a scored step, and s over the scored steps so far
of its *lineage* (the particles that it is a copy of),

    ==================  =====================================  =============================================
    potential           G_t at a scored step                   the last one, with the sample's own r(x_0)
    ==================  =====================================  =============================================
    difference          exp(λ (r_t - r_s of the step before))  the same: the product telescopes by itself
    max                 exp(λ max_s r_s)                       exp(λ r(x_0)) / Π_t G_t
    sum                 exp(λ Σ_s r_s)                         exp(λ r(x_0)) / Π_t G_t
    immediate           exp(λ r_t)                             exp(λ r(x_0)) / Π_t G_t
    importance          1 (and nothing is resampled)           exp(λ r(x_0))
    best-of-n           1                                      1 (nothing is resampled: pick the largest r)
    ==================  =====================================  =============================================

The difference begins at r_min = 0, so that its product is exp(λ (r(x_0) - r_min)). Resampling may be skipped at a
scored step (``ess_threshold``): the weights are then carried on, and multiply what comes. With W the weights of the
particles, each resampling multiplies the estimate of the normaliser Z = E_p exp(λ r(x_0)) by the mean of W; the
estimate is unbiased for every k.

A proposal τ other than the sampler's kernel p puts the ratio p(x_s | x_t) / τ(x_s | x_t) into the weights
(``log_ratio``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from scipy.optimize import brentq
from torch import Tensor

from steersman.errors import InputError, nearest
from steersman.math.resampling import RESAMPLERS, effective_sample_size, resample

Potential = Literal["difference", "max", "sum", "immediate", "importance", "best-of-n"]
POTENTIALS: tuple[str, ...] = get_args(Potential)
ResamplerName = Literal["multinomial", "systematic", "stratified", "residual"]


class Particles(NamedTuple):
    """What the weights need to know of G groups of k particles; on the CPU, in float64.

    Attributes:
        log_weights: since the last resampling, (G, k).
        statistic: of the lineage's rewards: the latest (difference), the largest (max), the sum; (G, k).
        log_potentials: log Π G_t of the lineage, (G, k).
        ancestors: the first particle of the lineage, (G, k), from 0 to k - 1.
        log_normaliser: of the resamplings so far, (G,).
    """

    log_weights: Tensor
    statistic: Tensor
    log_potentials: Tensor
    ancestors: Tensor
    log_normaliser: Tensor

    def take(self, index: Tensor) -> Particles:
        """The particles ``index`` (G, k) of each group."""
        w, s, g, a = (part.gather(1, index) for part in self[:4])
        return Particles(w, s, g, a, self.log_normaliser)

    @property
    def log_z(self) -> Tensor:
        """log of the unbiased estimate of Z, (G,): the weights that are carried count."""
        return self.log_normaliser + torch.logsumexp(self.log_weights, 1) - math.log(self.log_weights.shape[1])

    @property
    def weights(self) -> Tensor:
        """Of sum 1 in each group, (G, k)."""
        return torch.softmax(self.log_weights, 1)

    @property
    def distinct(self) -> Tensor:
        """Distinct ancestors of each group, (G,): with a sampler without noise, distinct samples."""
        order = self.ancestors.sort(1).values
        return 1 + (order[:, 1:] != order[:, :-1]).sum(1)


@dataclass(frozen=True)
class Scored:
    """What happened at a scored step.

    Attributes:
        ess: effective sample size before the resampling, (G,).
        resampled: which groups were, (G,).
        index: the old particle of each new one, (G, k); 0, ..., k - 1 where a group was not resampled.
    """

    ess: Tensor
    resampled: Tensor
    index: Tensor


@dataclass(frozen=True)
class FeynmanKac:
    """Weights and resampling of FK steering, for any loop that moves particles.

        state = fk.init(groups)
        x, r = move(x), promised(x)                          # a scored step of your loop; r is (groups, k)
        state, scored = fk.step(state, r, last=...)
        x = x.gather(1, scored.index)                        # with whatever else belongs to a particle

    Args:
        particles: k of a group, from 2; from 1 with ``best-of-n``.
        potential: see the module's table.
        scale: λ, at least 0.
        resampler: a key of :data:`steersman.math.resampling.RESAMPLERS`; the paper's is ``multinomial``.
        ess_threshold: resample a group only where its effective sample size is below this share of k, in (0, 1]; None
            resamples at every scored step. The last step always resamples.
        r_min: what ``difference`` starts from, and the floor of ``max``. None is 0 and -inf. The published code has 0
            for both, which makes ``max`` constant for rewards below 0, like log-probabilities.
        official_terminal: end ``max`` and ``sum`` as the published code does, with the statistic in r(x_0)'s place.
            Their target is then exp(λ max_t r_t) or exp(λ Σ_t r_t).

    Raises:
        InputError: an argument out of range.
    """

    particles: int
    potential: Potential = "difference"
    scale: float = 10.0
    resampler: ResamplerName = "systematic"
    ess_threshold: float | None = None
    r_min: float | None = None
    official_terminal: bool = False

    def __post_init__(self) -> None:
        if self.potential not in POTENTIALS:
            raise InputError("potential", self.potential, nearest(str(self.potential), POTENTIALS))
        least = 1 if self.potential == "best-of-n" else 2
        if isinstance(self.particles, bool) or not isinstance(self.particles, int) or self.particles < least:
            one = "" if least == 1 else " (from 1 with potential='best-of-n')"
            raise InputError("particles", self.particles, f"a whole number from {least}{one}")
        if not _number(self.scale) or not 0 <= self.scale < math.inf:
            raise InputError("scale", self.scale, "a finite number from 0")
        if self.resampler not in RESAMPLERS:
            raise InputError("resampler", self.resampler, nearest(str(self.resampler), RESAMPLERS))
        if self.ess_threshold is not None and not (_number(self.ess_threshold) and 0 < self.ess_threshold <= 1):
            raise InputError("ess_threshold", self.ess_threshold, "a share of the particles in (0, 1], or None")
        allowed = "a number below infinity (for difference a finite one), or None"
        if self.r_min is not None and not (_number(self.r_min) and self.r_min < math.inf):
            raise InputError("r_min", self.r_min, allowed)
        if self.potential == "difference" and not math.isfinite(self.floor):
            raise InputError("r_min", self.r_min, allowed)

    @property
    def floor(self) -> float:
        """What the statistic starts from."""
        if self.potential == "difference":
            return 0.0 if self.r_min is None else self.r_min
        if self.potential == "max":
            return -math.inf if self.r_min is None else self.r_min
        return 0.0

    def init(self, groups: int) -> Particles:
        """The particles before the first step: of equal weight, each its own ancestor."""
        zero = torch.zeros(groups, self.particles, dtype=torch.float64)
        first = torch.arange(self.particles).expand(groups, -1).clone()
        return Particles(zero, torch.full_like(zero, self.floor), zero, first, zero[:, 0])

    def weigh(
        self, state: Particles, reward: Tensor | None, last: bool = False, log_ratio: Tensor | None = None
    ) -> Particles:
        """The particles with the weights of a step, before any resampling.

        Args:
            state: the particles.
            reward: r_t of each particle (r(x_0) at the last step), (G, k); NaN for one that nobody could score: its
                G_t is 1 and its statistic stays; at the last step its weight is zero. None: the step is not scored.
            last: whether ``reward`` is of the finished samples.
            log_ratio: log p(x_s | x_t) / τ(x_s | x_t) of a proposal τ, (G, k).

        Raises:
            InputError: another shape, or infinite numbers.
        """
        log_w = state.log_weights
        if log_ratio is not None:
            log_w = log_w + self._checked("log_ratio", log_ratio, log_w)
        if reward is None:
            return state._replace(log_weights=log_w)
        r = self._checked("reward", reward, log_w)
        statistic, log_g = self._potential(state, r, last)
        known = ~r.isnan()
        log_g = torch.where(known, log_g, -torch.inf if last else 0.0)
        return state._replace(
            log_weights=log_w + log_g,
            statistic=torch.where(known, statistic, state.statistic),
            log_potentials=state.log_potentials + log_g,
        )

    def _potential(self, state: Particles, r: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """The statistic with ``r``, and log G_t."""
        λ, s = self.scale, state.statistic
        if self.potential == "best-of-n":
            return r, torch.zeros_like(r)
        if self.potential == "difference":
            return r, λ * (r - s)
        if self.potential == "max":
            s = torch.maximum(s, r)
        else:
            s = s + r if self.potential == "sum" else r
        if last:
            official = self.official_terminal and self.potential in ("max", "sum")
            return s, λ * (s if official else r) - state.log_potentials
        return s, torch.zeros_like(r) if self.potential == "importance" else λ * s

    def resample(
        self, state: Particles, last: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Particles, Scored]:
        """Resample the groups whose turn it is.

        A group whose weights are all zero (nobody could be scored) stays as it is, with a normaliser of 0.
        """
        ess = effective_sample_size(state.log_weights)
        due = ess > 0
        if self.potential == "best-of-n" or (self.potential == "importance" and not last):
            due = torch.zeros_like(due)
        elif self.ess_threshold is not None and not last:
            due = due & (ess < self.ess_threshold * self.particles)
        flat = torch.where(due[:, None], state.log_weights, 0.0)
        index = resample(flat, self.resampler, generator)
        index = torch.where(due[:, None], index, torch.arange(self.particles))
        taken = state.take(index)
        new = taken._replace(
            log_weights=torch.where(due[:, None], 0.0, taken.log_weights),
            log_normaliser=torch.where(due, state.log_z, state.log_normaliser),
        )
        return new, Scored(ess, due, index)

    def step(
        self,
        state: Particles,
        reward: Tensor,
        last: bool = False,
        log_ratio: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Particles, Scored]:
        """A scored step: :meth:`weigh`, then :meth:`resample`."""
        return self.resample(self.weigh(state, reward, last, log_ratio), last, generator)

    def _checked(self, name: str, values: Tensor, like: Tensor) -> Tensor:
        if values.shape != like.shape:
            raise InputError(name, tuple(values.shape), f"of shape {tuple(like.shape)}, a row per group")
        values = values.detach().double().cpu()
        if bool(values.isinf().any()) or (name == "log_ratio" and bool(values.isnan().any())):
            raise InputError(
                name, "infinity or NaN", "finite numbers" + (" (NaN for none)" if name == "reward" else "")
            )
        return values


# ------------------------------------------------------------------ schedules


def every(frequency: int, start: int = 0, end: int | None = None, *, steps: int) -> tuple[int, ...]:
    """The scored steps start, start + frequency, ... up to and with ``end`` (of a run of ``steps``).

    The published image sampler has ``every(20, 20, 80, steps=100)``, the text sampler ``every(20, 19, steps=n)``.

    Raises:
        InputError: not 1 <= frequency, or not 0 <= start <= end < steps.
    """
    end = steps - 1 if end is None else end
    if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
        raise InputError("frequency", frequency, "a whole number from 1")
    for name, value, low, high in (("start", start, 0, steps - 1), ("end", end, start, steps - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(name, value, f"a whole number from {low} to {high}")
    return tuple(range(start, end + 1, frequency))


def scored_steps(schedule: Sequence[float], steps: int) -> tuple[int, ...]:
    """The steps of a run that are scored: those of ``schedule``, and the last always.

    Args:
        schedule: whole numbers (int) are steps; numbers (float) in [0, 1) are shares of the run.
        steps: of the run.

    Raises:
        InputError: a step outside of [0, steps), or a share outside of [0, 1).
    """
    found = {steps - 1}
    for at in schedule:
        if isinstance(at, int) and not isinstance(at, bool):
            if not 0 <= at < steps:
                raise InputError("schedule", at, f"steps from 0 to {steps - 1} (or shares of the run, like 0.2)")
            found.add(at)
        elif isinstance(at, float) and 0 <= at < 1:
            found.add(int(at * steps + 1e-9))
        else:
            raise InputError("schedule", at, "whole numbers (steps), or shares of the run in [0, 1)")
    return tuple(sorted(found))


def scale_for(reward: Tensor, ess: float, most: float = 1e4) -> float:
    """The λ for which weights exp(λ r) have a given effective sample size, a share of k on average of the groups.

    Args:
        reward: (G, k); NaN is left out.
        ess: the share, in (0, 1).
        most: what is returned where even this leaves more (rewards that hardly differ).
    """
    if not 0 < ess < 1:
        raise InputError("ess", ess, "a share of the particles in (0, 1)")
    r = reward.detach().double().cpu()
    r = torch.where(r.isfinite(), r, torch.nan)

    def excess(scale: float) -> float:
        logs = torch.where(r.isnan(), -torch.inf, scale * r)
        return float(effective_sample_size(logs).mean()) / r.shape[1] - ess

    if excess(0.0) <= 0:
        return 0.0
    return most if excess(most) >= 0 else float(brentq(excess, 0.0, most, xtol=1e-12))


def many_sample(rewards: Tensor, scale: float | None = None) -> Tensor:
    r"""The reward that a state promises by N clean samples x_0^j ~ p(x_0 | x_t) of it (arXiv 2501.06848, section 4.1).

        r_t = log (1/N) Σ_j exp(r(x_0^j))               as published: the exponent is r, whatever λ
        r_t = (1/λ) log (1/N) Σ_j exp(λ r(x_0^j))       with ``scale``: exp(λ r_t) is E[exp(λ r(x_0)) | x_t] on average

    For masked diffusion the x_0^j are categorical draws of the model at x_t.

    Args:
        rewards: r(x_0^j), (..., N).
        scale: λ above 0 for the second form.
    """
    if scale is not None and not 0 < scale < math.inf:
        raise InputError("scale", scale, "a finite number above 0, or None")
    λ = 1.0 if scale is None else scale
    r = rewards.double()
    return (torch.logsumexp(λ * r, -1) - math.log(r.shape[-1])) / λ


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
