r"""A law under caps: the nearest law whose probabilities stay below them.

Given a law p over V tokens and caps 0 <= cap(a) <= 1, the law that is nearest to p among those below the caps is

.. math::
    p' = \arg\min_{q \le \mathrm{cap}} \mathrm{KL}(q \,\|\, p)
       = \min(c\, p, \mathrm{cap}), \qquad c \ge 1 \text{ such that } \textstyle\sum_a p'(a) = 1 .

It is found as water is filled into a vessel. In the order of cap/p, let C_k be the sum of the first k caps and P_k
the mass of the tokens behind them. If the first k tokens are capped, the others are lifted by

.. math:: c_k = (1 - C_k) / P_k ,

and the right k is the first with :math:`c_k\, p_k \le \mathrm{cap}_k` for the next token. Tokens with p = 0 take no
part: neither their caps nor they can hold any mass. If the caps of the others add up to less than one, no law is
below them, and p' = cap / Σ cap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """A law that was moved under its caps.

    Args:
        log_p: log p', (B, V) float64; -inf where p is 0.
        lift: c, the factor by which tokens below their caps grew, (B,); NaN where no law is below the caps.
        infeasible: whether no law is below the caps, (B,).
    """

    log_p: Tensor
    lift: Tensor
    infeasible: Tensor


def exact_projection(log_p: Tensor, cap: Tensor) -> Projection:
    r"""The law nearest to p under the caps, p' = min(c p, cap).

    Args:
        log_p: log-probabilities, (B, V); -inf is probability 0. Rows need not be normalised.
        cap: the caps, (B, V), each in [0, 1].
    """
    log_p = log_p.to(_wide(log_p)).log_softmax(-1)
    p, cap = log_p.exp(), cap.to(log_p)
    lift, infeasible = p.new_ones(len(p)), p.new_zeros(len(p), dtype=torch.bool)
    bound = (p > cap).any(-1)
    if not bool(bound.any()):
        return Projection(log_p, lift, infeasible)
    out = log_p.clone()
    out[bound], lift[bound], infeasible[bound] = _filled(log_p[bound], cap[bound])
    return Projection(out, lift, infeasible)


def _filled(log_p: Tensor, cap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Water-filling of rows in which a cap binds; in logarithms, for a tail of 1e-300 may have to be lifted."""
    support = log_p > -math.inf
    cap = cap.masked_fill(~support, 0.0)
    log_cap = cap.log()
    order = (log_cap - log_p).masked_fill(~support, math.inf).argsort(-1)  # those that are capped first stand first
    log_p_sorted, cap_sorted = log_p.gather(1, order), cap.gather(1, order)
    C = cap_sorted.cumsum(-1) - cap_sorted
    log_P = log_p_sorted.flip(-1).logcumsumexp(-1).flip(-1)
    log_c = (1 - C).clamp(min=0).log() - log_P
    fits = (log_c + log_p_sorted <= cap_sorted.log()) & (log_p_sorted > -math.inf)
    k = fits.long().argmax(-1, keepdim=True)
    log_c = log_c.gather(1, k)

    total = cap.sum(-1, keepdim=True)
    infeasible = total < 1
    lowest = (total <= 1) | ~fits.any(-1, keepdim=True)  # none by rounding, where the caps add up to one
    shares = torch.where(total > 0, log_cap - total.log(), log_p)
    out = torch.where(lowest, shares, torch.minimum(log_p + log_c, log_cap)).masked_fill(~support, -math.inf)
    return out, torch.where(lowest, math.nan, log_c.exp()).squeeze(1), infeasible.squeeze(1)


def official_projection(log_p: Tensor, cap: Tensor, n_iter: int = 2) -> Tensor:
    r"""The published code's passes, which approach p' = min(c p, cap) and don't reach it, (B, V) log-probabilities.

    ``n_iter`` times: z <- min(z, log cap + logsumexp z). Cutting one token lifts all others when z is normalised, above
    their caps too: after two passes the worst excess over a cap was 0.98 on random problems.
    """
    z = log_p.to(_wide(log_p))
    log_cap = cap.to(z).log()
    for _ in range(n_iter):
        z = torch.minimum(z, log_cap + z.logsumexp(-1, keepdim=True))
    return z.log_softmax(-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # there is no float64 on Apple's GPUs
