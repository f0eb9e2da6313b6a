r"""Wasserstein distances between samples.

On the line the optimal coupling joins equal quantiles, so that for laws with quantile functions F⁻¹, G⁻¹

    W_p(F, G)^p = ∫_0^1 |F⁻¹(q) - G⁻¹(q)|^p dq,

for n and m samples a finite sum over the breakpoints i/n and j/m. The sliced distance averages this over
directions (Rabin et al. 2011; Bonneel et al. 2015); the exact one in d dimensions is an assignment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steersman.errors import InputError, MissingExtra


def wasserstein_1d(u: Tensor, v: Tensor, p: float = 2.0) -> Tensor:
    """W_p^p of samples on the line, for each column.

    Args:
        u: (n,) or (n, k), floating point.
        v: (m,) or (m, k); n and m may differ.
        p: the power, a finite number from 1.

    Returns:
        the p-th power of the distance, a scalar or (k,), differentiable.
    """
    _check_power(p)
    if u.ndim not in (1, 2) or u.shape[1:] != v.shape[1:] or 0 in u.shape or 0 in v.shape:
        raise InputError("v", tuple(v.shape), f"samples of the columns of u, of shape {tuple(u.shape)}")
    u, v = u.sort(0).values, v.sort(0).values
    n, m = len(u), len(v)
    if n == m:
        return (u - v).abs().pow(p).mean(0)
    # Quantile breakpoints i/n and j/m as whole multiples of 1/(nm): exact, whatever n and m.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).to(u) / (n * m)
    gaps = (u[((ends - 1) // m).to(u.device)] - v[((ends - 1) // n).to(u.device)]).abs().pow(p)
    return (widths if u.ndim == 1 else widths[:, None]).mul(gaps).sum(0)


def directions(count: int, dimensions: int, generator: torch.Generator | None = None) -> Tensor:
    """Unit vectors (dimensions, count), float64: in the plane at equal angles over the half circle (a
    quadrature that needs no randomness), otherwise uniform on the sphere."""
    for name, value in (("count", count), ("dimensions", dimensions)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(name, value, "a whole number from 1")
    if dimensions == 2:
        angles = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
        return torch.stack([angles.cos(), angles.sin()])
    z = torch.randn(dimensions, count, generator=generator, dtype=torch.float64)
    return z / z.norm(dim=0)


def sliced_wasserstein(
    u: Tensor, v: Tensor, p: float = 2.0, *, count: int = 128, generator: torch.Generator | None = None
) -> Tensor:
    """SW_p(u, v) = (mean over directions of W_p(<θ, u>, <θ, v>)^p)^{1/p}.

    Args:
        u, v: samples (n, d) and (m, d), floating point; n and m may differ.
        p: the power, a finite number from 1.
        count: number of directions; in the plane they are at equal angles.
        generator: for the directions in other dimensions than two.

    Returns:
        a scalar, differentiable in ``u`` and ``v`` where it is not 0.
    """
    _check_points(u, v)
    theta = directions(count, u.shape[1], generator).to(u)
    return wasserstein_1d(u @ theta, v @ theta, p).mean().pow(1 / p)


def wasserstein(u: Tensor, v: Tensor, p: float = 2.0) -> float:
    """The exact W_p(u, v) with Euclidean ground distance, in float64.

    Equally many samples are matched by SciPy's ``linear_sum_assignment``; else POT's network simplex
    splits their mass. Cubic time: 1000 samples take about 0.1 s, 4000 some seconds.

    Args:
        u, v: samples (n, d) and (m, d).
        p: the power, a finite number from 1.

    Raises:
        MissingExtra: n and m differ, and POT is not installed.
    """
    _check_points(u, v)
    _check_power(p)
    exact = "donot_use_mm_for_euclid_dist"
    cost = torch.cdist(u.detach().double(), v.detach().double(), compute_mode=exact).pow(p).cpu().numpy()
    if len(u) == len(v):
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(cost)
        return float(cost[rows, columns].mean() ** (1 / p))
    try:
        import ot
    except ModuleNotFoundError as error:
        raise MissingExtra("exact transport between sets of different sizes (POT)", "reference") from error
    # POT's default of 1e5 pivots is too few from about 1000 points on, and then it only warns.
    return float(ot.emd2([], [], cost, numItermax=100 * (len(u) + len(v)) ** 2) ** (1 / p))


def _check_power(p: float) -> None:
    if not 1 <= p < math.inf:
        raise InputError("p", p, "a finite number from 1")


def _check_points(u: Tensor, v: Tensor) -> None:
    for name, x in (("u", u), ("v", v)):
        if x.ndim != 2 or 0 in x.shape or not x.is_floating_point():
            raise InputError(name, tuple(x.shape), "floating-point samples of shape (samples, dimensions)")
    if u.shape[1] != v.shape[1]:
        raise InputError("v", tuple(v.shape), f"of {u.shape[1]} dimensions, as u")
