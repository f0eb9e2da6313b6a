r"""``gaussians``: mixtures in the plane whose score is known in closed form.

    p(x) = sum_k w_k N(x; m_k, s_k² I)

At a noise level x_t = alpha x_0 + sigma eps the law is the mixture of N(alpha m_k, v_k I) with
v_k = alpha² s_k² + sigma². With the responsibilities r_k(x_t) = P(mode k | x_t), the ideal network says

    eps(x_t) = sigma sum_k r_k (x_t - alpha m_k) / v_k                               = -sigma score(x_t)
    x_0(x_t) = sum_k r_k [m_k + (alpha s_k² / v_k) (x_t - alpha m_k)]                = E[x_0 | x_t]

so whatever separates a sampler's output from p is the sampler's own error. Under p the mean of r_k is
w_k exactly, which makes mode weights measurable without bias even where modes overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from steersman.diffusion.solver import Denoiser, Prediction, Process
from steersman.errors import InputError, nearest

Level = float | Tensor
"""alpha or sigma: a number, or one per row (B,)."""


class Mixture:
    """A mixture of isotropic Gaussians, and of its noised marginals.

    All methods are vectorised over rows, differentiable in ``x``, and compute in the dtype of ``x`` (half
    precision: in float32). ``alpha`` and ``sigma`` are numbers or hold one per row; the defaults 1 and 0
    are the data's own law. ``label`` restricts row b to mode ``label[b]``; the label K, one past the last
    mode, is the whole mixture.

    Args:
        means: m_k, (K, d).
        std: s_k above 0; one for all, or K.
        weights: w_k above 0; they are scaled to sum to 1. None for equal ones.

    Raises:
        InputError: shapes that don't fit, or a number that is not allowed.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]] | Tensor,
        std: float | Sequence[float],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2 or 0 in self.means.shape or not bool(self.means.isfinite().all()):
            raise InputError("means", means, "finite numbers of shape (modes, dimensions)")
        k = len(self.means)
        self.std = torch.as_tensor(std, dtype=torch.float64).expand(k).clone()
        self.weights = torch.as_tensor([1.0] * k if weights is None else weights, dtype=torch.float64)
        for name, value in (("std", self.std), ("weights", self.weights)):
            if value.shape != (k,) or not bool((value.isfinite() & (value > 0)).all()):
                raise InputError(name, value.tolist(), f"{k} finite numbers above 0")
        self.weights = self.weights / self.weights.sum()

    @property
    def modes(self) -> int:
        """K."""
        return len(self.means)

    @property
    def dimensions(self) -> int:
        """d."""
        return self.means.shape[1]

    # -------------------------------------------------------------- laws

    def log_prob(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0, label: Tensor | None = None) -> Tensor:
        """log p_t(x), (B,)."""
        return torch.logsumexp(self._parts(x, alpha, sigma, label).log_joint, 1).to(x.dtype)

    def score(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0, label: Tensor | None = None) -> Tensor:
        """grad log p_t(x) = sum_k r_k (alpha m_k - x) / v_k, (B, d)."""
        p = self._parts(x, alpha, sigma, label)
        return -(p.r / p.v)[:, :, None].mul(p.offset).sum(1).to(x.dtype)

    def eps(self, x: Tensor, alpha: Level, sigma: Level, label: Tensor | None = None) -> Tensor:
        """E[eps | x_t = x] = sigma sum_k r_k (x - alpha m_k) / v_k, (B, d)."""
        p = self._parts(x, alpha, sigma, label)
        return (p.sigma * p.r / p.v)[:, :, None].mul(p.offset).sum(1).to(x.dtype)

    def x0(self, x: Tensor, alpha: Level, sigma: Level, label: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t = x] = sum_k r_k [m_k + (alpha s_k² / v_k) (x - alpha m_k)], (B, d)."""
        p = self._parts(x, alpha, sigma, label)
        gain = p.alpha * p.std**2 / p.v
        return p.r[:, :, None].mul(p.means + gain[:, :, None] * p.offset).sum(1).to(x.dtype)

    def velocity(self, x: Tensor, alpha: Level, sigma: Level, label: Tensor | None = None) -> Tensor:
        """v = alpha eps - sigma x_0, (B, d)."""
        a, s = self._level("alpha", alpha, x), self._level("sigma", sigma, x)
        return (a * self.eps(x, alpha, sigma, label) - s * self.x0(x, alpha, sigma, label)).to(x.dtype)

    def responsibilities(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """r_k(x) = P(mode k | x_t = x), (B, K)."""
        return self._parts(x, alpha, sigma, None).r.to(x.dtype)

    def denoiser(self, process: Process) -> Denoiser:
        """The ideal network as a denoiser for :func:`steersman.diffusion.solver.integrate`."""

        def predict(x: Tensor, t: float) -> Prediction:
            alpha, sigma = process.alpha(t), process.sigma(t)
            return Prediction(x, alpha, sigma, x0=self.x0(x, alpha, sigma), eps=self.eps(x, alpha, sigma))

        return predict

    # -------------------------------------------------------------- samples and moments

    def sample(
        self, count: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Exact samples (count, d), and the mode of each (count,)."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError("count", count, "a whole number from 1")
        modes = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dimensions, generator=generator, dtype=torch.float64)
        return (self.means[modes] + self.std[modes, None] * noise).to(dtype), modes

    def mean(self) -> Tensor:
        """E x, (d,), float64."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Cov x, (d, d), float64."""
        centred = self.means - self.mean()
        within = (self.weights * self.std**2).sum() * torch.eye(self.dimensions, dtype=torch.float64)
        return within + (self.weights[:, None] * centred).T @ centred

    def to_json(self) -> dict[str, object]:
        """The mixture's numbers."""
        return {"means": self.means.tolist(), "std": self.std.tolist(), "weights": self.weights.tolist()}

    # -------------------------------------------------------------- inside

    def _level(self, name: str, value: Level, x: Tensor) -> Tensor:
        level = torch.as_tensor(value, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        if level.ndim > 1 or (level.ndim == 1 and len(level) != len(x)):
            raise InputError(name, tuple(level.shape), f"a number, or one for each of the {len(x)} rows")
        return level.reshape(-1, 1)

    def _parts(self, x: Tensor, alpha: Level, sigma: Level, label: Tensor | None) -> _Parts:
        if x.ndim != 2 or x.shape[1] != self.dimensions or not x.is_floating_point():
            raise InputError("x", tuple(x.shape), f"floating point, of shape (B, {self.dimensions})")
        return _Parts(self, x, self._level("alpha", alpha, x), self._level("sigma", sigma, x), label)


class _Parts:
    """What the formulas share, for rows of x: offsets (B, K, d); r, v and log joint (B, K)."""

    def __init__(self, law: Mixture, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> None:
        self.alpha, self.sigma = alpha, sigma
        self.means, self.std = law.means.to(alpha), law.std.to(alpha)
        self.v = (alpha * self.std) ** 2 + sigma**2
        self.offset = x.to(alpha)[:, None, :] - alpha[:, :, None] * self.means
        log_weights = law.weights.log().to(alpha).expand(len(x), -1)
        if label is not None:
            if label.shape != (len(x),) or bool(((label < 0) | (label > law.modes)).any()):
                raise InputError("label", label.tolist(), f"one of 0 to {law.modes} for each of the {len(x)} rows")
            one = torch.full_like(log_weights, -math.inf)
            chosen = label[:, None].to(x.device) == torch.arange(law.modes, device=x.device)
            log_weights = torch.where((label == law.modes).to(x.device)[:, None], log_weights, one)
            log_weights = log_weights.masked_fill(chosen, 0.0)
        square = self.offset.square().sum(2)
        normal = -0.5 * (square / self.v + law.dimensions * (2 * math.pi * self.v).log())
        self.log_joint = log_weights + normal
        self.r = torch.softmax(self.log_joint, 1)


# ------------------------------------------------------------------ the mixtures


def ring(std: float, modes: int = 8, weights: Sequence[float] | None = None) -> Mixture:
    """Modes at equal angles on the unit circle, the first at (1, 0)."""
    angles = [2 * math.pi * k / modes for k in range(modes)]
    return Mixture([[math.cos(a), math.sin(a)] for a in angles], std, weights)


def _grid() -> Mixture:
    side = [-1.0, -0.5, 0.0, 0.5, 1.0]
    return Mixture([[a, b] for a in side for b in side], 0.05)


def _nested() -> Mixture:
    """One broad mode, and four narrow ones of which two lie within it."""
    return Mixture(
        [[0.0, 0.0], [0.3, 0.0], [-0.3, 0.0], [0.0, 1.2], [0.0, -1.2]],
        [0.4, 0.03, 0.03, 0.1, 0.1],
        [0.4, 0.15, 0.15, 0.15, 0.15],
    )


VARIANTS = {
    "ring": lambda: ring(0.2),
    "ring-sharp": lambda: ring(0.05),
    "ring-unequal": lambda: ring(0.1, weights=[2.0**-k for k in range(8)]),
    "grid": _grid,
    "nested": _nested,
}
"""``ring``: overlapping modes; ``ring-sharp``: apart; ``ring-unequal``: each half as likely as the one
before; ``grid``: 25 sharp modes; ``nested``: scales from .03 to .4, two narrow modes within a broad one."""


@cache
def mixture(name: str = "gaussians") -> Mixture:
    """A mixture by name.

    Args:
        name: ``gaussians`` (its ``ring``) or ``gaussians:VARIANT`` with a key of ``VARIANTS``; the variant
            alone will do.

    Raises:
        InputError: no such mixture.
    """
    variant = "ring" if name == "gaussians" else name.removeprefix("gaussians:")
    if variant not in VARIANTS:
        raise InputError("subject", name, nearest(name, [f"gaussians:{v}" for v in VARIANTS]))
    return VARIANTS[variant]()


def names() -> list[str]:
    """All names that :func:`mixture` takes, the default first."""
    return ["gaussians", *(f"gaussians:{v}" for v in VARIANTS)]


def fingerprint() -> str:
    """Changes when any of the mixtures' numbers does."""
    numbers = {name: mixture(name).to_json() for name in VARIANTS}
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
