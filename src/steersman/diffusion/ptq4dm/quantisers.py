r"""Uniform affine quantisers, and the search for their range.

A range [l, h] that holds 0 is divided into 2^b levels,

    Δ = (h - l) / (2^b - 1),    z = clip(-round(l / Δ), 0, 2^b - 1),
    q = clip(round(x / Δ) + z, 0, 2^b - 1),    x̂ = (q - z) Δ,

so 0 stays 0, and |x - x̂| <= Δ/2 within the range. A symmetric range [-r, r] has z = 2^(b-1): levels from
-2^(b-1) Δ to (2^(b-1) - 1) Δ. There -l/Δ is a half-integer, whose rounding would depend on the last bit of Δ:
z is set, never computed. A one-sided range has z = 0 ([0, r]) or z = 2^b - 1 ([-r, 0]).

Which range: the one whose quantised values are nearest to the values, among r = k/100 max|x|, k = 1..100. Clipping
a few large values buys finer levels for all others.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from steersman.errors import InputError, nearest

Metric = Literal["l2.4", "mse", "l1", "cosine", "kl"]
METRICS: tuple[str, ...] = get_args(Metric)
Side = Literal["both", "positive", "negative"]

AT_ONCE = 2**18
"""Values that are quantised at once."""
GRID = 100
"""Ranges that are tried: multiples of a hundredth of the largest value."""
BINS = 2048
"""Of the histogram of the Kullback-Leibler metric."""
ORDER_STATISTICS = 2048
"""Values that stand for a tensor in the search over ranges and zero points."""


def check_bits(name: str, bits: int, *, unquantised: bool = True) -> None:
    """Refuse a number of bits that is none of 2 to 8, or 32 for what stays as it is."""
    allowed = "a whole number from 2 to 8" + (", or 32 to leave it as it is" if unquantised else "")
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if not whole or not (2 <= bits <= 8 or (unquantised and bits == 32)):
        raise InputError(name, bits, allowed)


def affine(low: float, high: float, bits: int) -> tuple[float, int]:
    """(Δ, z) of the range [low, high]; an empty range has Δ = 1, and everything becomes 0."""
    width, top = high - low, 2**bits - 1
    if width == 0:
        return 1.0, 0
    delta = width / top
    if low == -high:
        return delta, 2 ** (bits - 1)
    return delta, min(max(-round(low / delta), 0), top)


def codes(x: Tensor, delta: Tensor | float, zero: Tensor | int, bits: int) -> Tensor:
    """q = clip(round(x / Δ) + z, 0, 2^b - 1), in floating point."""
    return (torch.round(x / delta) + zero).clamp(0, 2**bits - 1)


def quantise(x: Tensor, delta: Tensor | float, zero: Tensor | int, bits: int) -> Tensor:
    """x̂ = (q - z) Δ."""
    return (codes(x, delta, zero, bits) - zero) * delta


def _levels(r: Tensor | float, bits: int, side: Side) -> tuple[Tensor | float, int]:
    """(Δ, z) of the ranges [-r, r], [0, r] or [-r, 0]."""
    top = 2**bits - 1
    if side == "both":
        return 2 * r / top, 2 ** (bits - 1)
    return r / top, 0 if side == "positive" else top


def search(x: Tensor, bits: int, metric: Metric = "l2.4", side: Side = "both") -> Tensor:
    r"""The best symmetric (or one-sided) range of each row.

    .. math:: r = \tfrac{k}{100} \max |x|, \qquad k = \arg\min_{1 \le k \le 100} d(x, \hat x_k), \quad \text{the first}

    Args:
        x: one tensor a row, (rows, n).
        bits: b, from 2 to 8.
        metric: d: mean \|x - x̂\|^p with p = 2.4 (as published), 2 or 1; 1 - cos(x, x̂); or the divergence of the
            histogram of \|x̂\| from that of \|x\| (Migacz, "8-bit inference with TensorRT", 2017).
        side: which signs the range covers.

    Returns:
        Tensor: r (rows,), 0 for a row of zeros.
    """
    check_bits("bits", bits, unquantised=False)
    if metric not in METRICS:
        raise InputError("metric", metric, nearest(str(metric), METRICS))
    peak = x.abs().amax(1)
    # Relative to the peak, so that a row times 2^m finds exactly the same k.
    u = x / torch.where(peak > 0, peak, 1.0)[:, None]
    if metric == "kl":
        losses = _kl(u, bits, side)
    else:
        each = max(AT_ONCE // max(u.numel(), 1), 1)
        grid = torch.arange(1, GRID + 1, device=u.device) / GRID
        losses = torch.cat([_distances(u, r, bits, metric, side) for r in grid.split(each)])
    return peak * ((losses.argmin(0) + 1) / GRID)


def _distances(u: Tensor, r: Tensor, bits: int, metric: Metric, side: Side) -> Tensor:
    """d(u, û) for each range and row, (ranges, rows)."""
    delta, zero = _levels(r[:, None, None], bits, side)
    v = quantise(u, delta, zero, bits)
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(u.expand_as(v), v, dim=2)
    error = (u - v).abs_()
    if metric == "l2.4":
        error.pow_(2.4)
    elif metric == "mse":
        error.square_()
    return error.mean(2)


def _kl(u: Tensor, bits: int, side: Side) -> Tensor:
    """KL(P || Q) for each range and row, (ranges, rows).

    P is the histogram of |u| up to r, with what lies beyond in its last bin. Q has the mass of each level spread
    evenly over those of its bins that are not empty, without what lies beyond.
    """
    place = (u.abs() * BINS).long().clamp(max=BINS - 1)
    h = torch.zeros(len(u), BINS, dtype=torch.float64).scatter_add_(1, place, torch.ones_like(u, dtype=torch.float64))
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS

    def divergence(r: float) -> Tensor:
        last = max(round(r * BINS), 1)
        inside = h[:, :last]
        p = inside.clone()
        p[:, -1] += h[:, last:].sum(1)
        delta, zero = _levels(r, bits, side)
        level = codes(-centres[:last] if side == "negative" else centres[:last], delta, zero, bits).long()
        level = level.expand(len(h), -1)
        mass = torch.zeros(len(h), 2**bits, dtype=torch.float64).scatter_add_(1, level, inside)
        filled = torch.zeros_like(mass).scatter_add_(1, level, (inside > 0).double())
        q = torch.where(inside > 0, (mass / filled.clamp(min=1)).gather(1, level), 0.0)
        p = p / p.sum(1, keepdim=True)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-12)
        return torch.where(p > 0, p * (p.clamp(min=1e-12) / q.clamp(min=1e-12)).log(), 0.0).sum(1)

    return torch.stack([divergence(k / GRID) for k in range(1, GRID + 1)])


def search_affine(x: Tensor, bits: int, power: float = 2.4) -> tuple[float, float]:
    r"""The best range of a tensor over widths and zero points.

    .. math:: (k, z) = \arg\min \textstyle\sum |x - \hat x|^{p}, \qquad
              \Delta = \tfrac{k}{100} (\max x^+ - \min x^-) / (2^b - 1), \quad 0 \le z < 2^b

    100 · 2^b evaluations: of at most 2048 order statistics of the tensor, with its ends.

    Args:
        x: any shape.
        bits: b, from 2 to 8.
        power: p.

    Returns:
        (low, high) = (-z Δ, (2^b - 1 - z) Δ).
    """
    check_bits("bits", bits, unquantised=False)
    values = x.flatten().float()
    if len(values) > ORDER_STATISTICS:
        at = torch.linspace(0, len(values) - 1, ORDER_STATISTICS, dtype=torch.float64).round().long()
        values = values.sort().values[at]
    width = max(float(values.max()), 0.0) - min(float(values.min()), 0.0)
    top = 2**bits - 1
    zero = torch.arange(2**bits, dtype=torch.float32, device=values.device)[:, None]
    best, found = float("inf"), (1.0, 0)
    for k in range(1, GRID + 1):
        delta = k / GRID * width / top if width else 1.0
        losses = (values - quantise(values, delta, zero, bits)).abs().pow(power).mean(1)
        z = int(losses.argmin())
        if float(losses[z]) < best:
            best, found = float(losses[z]), (delta, z)
    delta, z = found
    return -z * delta, (top - z) * delta
