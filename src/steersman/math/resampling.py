r"""Resampling of weighted particles, many groups at once.

k particles of weights w_i (sum 1) are replaced by k copies of equal weight, N_i of particle i, such that

    E[N_i] = k w_i                                                                       (unbiased, all four methods)

With the cumulative weights c_i = w_1 + ... + w_i a point u in [0, 1) chooses the i with c_{i-1} <= u < c_i. The
methods differ in their points (Douc, Cappé & Moulines 2005, arXiv cs/0507025):

    multinomial     u_j independent and uniform
    stratified      u_j = (j + U_j) / k,    U_j independent and uniform: one point in each k-th
    systematic      u_j = (j + U) / k,      one U: N_i is k w_i rounded down or up, always
    residual        floor(k w_i) copies of each, the remaining ones multinomial in what is left of the weights

With equal weights the last three return 0, ..., k - 1: nothing is lost where there is nothing to choose. The effective
sample size 1 / sum_i w_i² (Kong, Liu & Wong 1994) falls from k for equal weights to 1 for one that has all.

Weights come as logarithms of any scale, (..., k) with a row per group; sums are in float64, after the largest was taken
off. -inf is weight zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from steersman.errors import InputError, nearest

Resampler = Callable[[Tensor, torch.Generator | None], Tensor]
BELOW_ONE = 1.0 - 2.0**-30
"""Caps uniform numbers, so that j + U stays below j + 1 in float64 for every j that fits into memory."""


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """ESS = (sum_i w_i)² / sum_i w_i², (...), from 1 to k; 0 where every weight is zero.

    Args:
        log_weights: (..., k), of any scale.
    """
    w = _weights(log_weights)
    return w.sum(-1).square() / w.square().sum(-1).clamp_min(1e-300)


def multinomial(log_weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """k independent draws with probabilities w_i, see :func:`resample`."""
    w = _positive(log_weights)
    return _chosen(w, w.shape[-1] * _uniform(w, generator))


def stratified(log_weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw in each k-th of the cumulative weights, see :func:`resample`."""
    w = _positive(log_weights)
    return _chosen(w, _ranks(w) + _uniform(w, generator))


def systematic(log_weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Points at equal distances behind one uniform draw: |N_i - k w_i| < 1, see :func:`resample`."""
    w = _positive(log_weights)
    return _chosen(w, _ranks(w) + _uniform(w[..., :1], generator))


def residual(log_weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """floor(k w_i) copies of each particle, and multinomial draws for the rest, see :func:`resample`."""
    w = _positive(log_weights)
    k = w.shape[-1]
    copies = w * k / w.sum(-1, keepdim=True)
    whole = copies.floor()
    left = copies - whole
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, torch.ones_like(left))  # no draw of it is used then
    ends = whole.cumsum(-1)
    ranks = _ranks(w).expand_as(w).contiguous()
    fixed = torch.searchsorted(ends, ranks, right=True).clamp_max(k - 1)
    return torch.where(ranks < ends[..., -1:], fixed, _chosen(left, k * _uniform(w, generator)))


RESAMPLERS: Mapping[str, Resampler] = {
    "multinomial": multinomial,
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
}


def resample(log_weights: Tensor, method: str = "systematic", generator: torch.Generator | None = None) -> Tensor:
    """For each new particle the index of the old one that it is a copy of.

    Args:
        log_weights: (..., k), of any scale; each row is a group.
        method: a key of ``RESAMPLERS``.
        generator: draws on its own device, so that a CPU generator gives the same indices everywhere.

    Returns:
        Tensor: (..., k), int64, indices from 0 to k - 1 within the group.

    Raises:
        InputError: another method, weights that are NaN or +inf, or a group whose weights are all zero.
    """
    if method not in RESAMPLERS:
        raise InputError("resampler", method, nearest(str(method), RESAMPLERS))
    return RESAMPLERS[method](log_weights, generator)


def _weights(log_weights: Tensor) -> Tensor:
    """Weights of largest 1 in each group; zero in a group without any."""
    if not log_weights.ndim or not log_weights.shape[-1] or not log_weights.is_floating_point():
        raise InputError("log_weights", tuple(log_weights.shape), "floating-point logarithms of shape (..., k)")
    if bool((log_weights.isnan() | (log_weights == torch.inf)).any()):
        raise InputError("log_weights", "NaN or +inf", "finite numbers, or -inf for weight zero")
    logs = log_weights.double()
    top = logs.amax(-1, keepdim=True)
    return torch.where(top == -torch.inf, 0.0, (logs - top.clamp_min(-1e300)).exp())


def _positive(log_weights: Tensor) -> Tensor:
    w = _weights(log_weights)
    if bool((w.sum(-1) == 0).any()):
        raise InputError("log_weights", "a group of -inf", "above -inf for at least one particle of each group")
    return w


def _ranks(w: Tensor) -> Tensor:
    return torch.arange(w.shape[-1], dtype=w.dtype, device=w.device)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    u = torch.rand(like.shape, generator=generator, dtype=torch.float64, device=device)
    return u.clamp_max(BELOW_ONE).to(like.device)


def _chosen(w: Tensor, points: Tensor) -> Tensor:
    """Where ``points`` in [0, k) fall among the cumulative weights, in k-ths of their sum."""
    k, ends = w.shape[-1], w.cumsum(-1)
    # The sum over k first: it is exactly 1 where all weights are equal, and then j + U falls to j.
    at = points * (ends[..., -1:] / k)
    return torch.searchsorted(ends, at.contiguous(), right=True).clamp_max(k - 1)
