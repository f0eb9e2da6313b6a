r"""How many drafts could be accepted at best, and how many each verifier accepts.

A verifier is a coupling of the drafts d with the token y that is emitted, y of the target's law p; y is *accepted*
where it is one of the drafts. The best coupling is an optimal transport problem, and its dual chooses a set of tokens:

.. math:: \alpha^* = 1 + \min_{H \subseteq \Sigma} \big[ p(H) - Q(H) \big], \qquad Q(H) = \Pr(d_1, \dots, d_n \in H).

For drafts with and without replacement a minimiser is among the V + 1 prefixes of the tokens sorted by p/q. Q is
:math:`q(H)^n` with replacement. Without, it is an exponential race: the tokens outside of H, of rate
:math:`\lambda = 1 - q(H)`, start to end at a time T, and n tokens of H must have ended by then,

.. math:: Q(H) = \int_0^\infty \lambda e^{-\lambda T} \Pr(N_H(T) \ge n)\, dT, \qquad
          N_H(T) = \sum_{i \in H} \mathrm{Bernoulli}(1 - e^{-q_i T}).

The trapezoid rule in log T converges geometrically, and its nodes are shared by all prefixes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steersman.language.multi_draft.laws import SAMPLERS, VERIFIERS, checked, fits, one_of, order_of, rest, top_of
from steersman.language.multi_draft.verification import NOTHING, k_seq_gamma, left_over, without

EARLIEST = -18.0  # log T: n >= 2 tokens have ended by then with probability below e^-36
LATEST = 40.0  # times 1 / lambda: the race goes on with probability e^-40
SPACING = 0.28
BLOCK = 1 << 16  # numbers that the count's recursion works on at once: they stay in the processor's cache
PATHS = 16  # sequences of rejected drafts that are drawn for RRSw's acceptance, where they can't be summed over
WIDE = 1 << 21  # numbers up to which they can, and that are worked on at once


def optimal_acceptance(
    p: Tensor, q: Tensor, n: int, sampler: str = "without", *, ranking: Tensor | None = None
) -> Tensor:
    r"""α*, the probability that the best verifier keeps one of n drafts.

    .. math:: \alpha^* = 1 + \min_k \big[ p(H_k) - Q(H_k) \big], \quad H_k = \text{the k tokens of least } p/q

    and :math:`p(\mathrm{Top}) + \sum_{i \notin \mathrm{Top}} \min(p_i, \tilde q_i)` for ``greedy`` and ``spechub``
    (whose unordered pair of drafts has the greedy law at n = 2).

    Args:
        p, q: laws of target and draft, (B, V), whose rows sum to 1.
        n: drafts, from 1 to 64. Where ``without`` finds fewer tokens in the support of q, all of them are drafts.
        sampler: ``with`` or ``without`` replacement, ``greedy`` or ``spechub``.
        ranking: see :func:`~steersman.language.multi_draft.laws.order_of`.

    Returns:
        (B,) float64.

    Raises:
        InputError: a law or number that is refused, or no such sampler.

    References:
        Hu et al., Towards Optimal Multi-draft Speculative Decoding, ICLR 2025, arXiv:2502.18779.
    """
    one_of("sampler", sampler, SAMPLERS)
    p, q = checked(p, q, n)
    fits(sampler, n, q.shape[1])
    if sampler in ("greedy", "spechub"):
        return _greedy(p, q, n, order_of(q, ranking, n))
    order = torch.where(q > 0, p / q, math.inf).argsort(1)
    p, q = p.gather(1, order), q.gather(1, order)
    if sampler == "with" or n == 1:
        least = (p.cumsum(1) - q.cumsum(1) ** n).amin(1)
    else:
        least = _least_without(p, q, n)
    return (1 + least.clamp(max=0)).clamp(0, 1)


def acceptance(
    p: Tensor,
    q: Tensor,
    n: int,
    verifier: str = "greedy",
    *,
    ranking: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""α, the probability that ``verifier`` keeps one of n drafts of its sampler, (B,) float64.

    ===========  ==========================================================================================
    ``single``   :math:`\sum \min(p, q)`, whatever n is
    ``rrs``      :math:`1 - \prod_k (1 - \sum \min(p^k, q))` with :math:`p^{k+1} \propto (p^k - q)_+`
    ``rrsw``     the same with :math:`q^k`, which depends on what was rejected: the expectation over that
    ``k-seq``    :math:`1 - (1 - \beta)^n` with :math:`\beta = \sum \min(q, p/\gamma)`
    ``spechub``  as ``greedy`` with n = 2
    ``greedy``   :math:`p(\mathrm{Top}) + \sum_{i \notin \mathrm{Top}} \min(p_i, \tilde q_i)`
    ``ot-lp``    :math:`\alpha^*` without replacement
    ===========  ==========================================================================================

    The last two drafts of ``rrsw`` are integrated out in closed form. The drafts before them are summed over in small
    vocabularies; in large ones 16 sequences of them are drawn, without bias (n <= 2 is always exact).

    Args:
        p, q, n, ranking: as in :func:`optimal_acceptance`.
        verifier: a key of ``VERIFIERS``.
        generator: for the draws of ``rrsw``.

    Raises:
        InputError: a law or number that is refused, or no such verifier.
    """
    one_of("verifier", verifier, tuple(VERIFIERS))
    p, q = checked(p, q, n)
    fits(VERIFIERS[verifier], n, q.shape[1])
    rates = _rates(p, q, n, verifier, ranking, generator)
    return rates.clamp(0, 1)  # sums of many numbers may pass 1 by a rounding error


def _rates(
    p: Tensor, q: Tensor, n: int, verifier: str, ranking: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    if verifier == "single":
        return torch.minimum(p, q).sum(1)
    if verifier in ("greedy", "spechub"):
        return _greedy(p, q, n, order_of(q, ranking, n))
    if verifier == "k-seq":
        beta, _ = k_seq_gamma(p, q, n)
        return 1 - (1 - beta) ** n
    if verifier == "rrsw":
        return 1 - _rrsw(p, q, n, generator)
    if verifier == "ot-lp":
        return optimal_acceptance(p, q, n, "without")
    rejected = torch.ones_like(p[:, 0])
    for _ in range(n):
        rejected = rejected * (1 - torch.minimum(p, q).sum(1))
        p = left_over(p, q)
    return 1 - rejected


def _greedy(p: Tensor, q: Tensor, n: int, order: Tensor) -> Tensor:
    top = top_of(order, n)
    return p.gather(1, top).sum(1) + torch.minimum(p, rest(q, top, order)).scatter(1, top, 0.0).sum(1)


def _rrsw(p: Tensor, q: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Probability that all n drafts are rejected, (B,)."""
    group = max(1, WIDE // (PATHS * q.shape[1]))
    if len(p) > group:
        parts = zip(p.split(group), q.split(group), strict=True)
        return torch.cat([_rrsw(*part, n, generator) for part in parts])
    rows, size = q.shape
    owner = torch.arange(rows, device=q.device)  # the row of each sequence of rejected drafts
    chance = torch.ones_like(p[:, 0])
    for k in range(n):
        there = q.sum(1) > 0  # else the drafts before were all of q's support
        miss = torch.where(there, (1 - torch.minimum(p, q).sum(1)).clamp(min=0), 1.0)
        if k == n - 1:
            return torch.zeros(rows, dtype=q.dtype, device=q.device).index_add(0, owner, chance * miss)
        left = (q - p).clamp(min=0)  # the law of a rejected draft, up to its mass
        # Where nothing is rejected, or nothing was drafted, any token will do: its weight is 0, or it changes nothing.
        rejects = torch.where(left.sum(1, keepdim=True) > NOTHING, left, torch.ones_like(left) / size)
        rejects = rejects / rejects.sum(1, keepdim=True)
        p = torch.where(there[:, None], left_over(p, q), p)
        chance = chance * miss
        if k == n - 2:
            last = torch.where(there, _last_rejected(p, q, rejects), 1.0)
            return torch.zeros(rows, dtype=q.dtype, device=q.device).index_add(0, owner, chance * last)
        if len(q) * size * size <= WIDE:
            parent, token = rejects.nonzero(as_tuple=True)
            weight = rejects[parent, token]
        else:
            times = PATHS if len(q) == rows else 1
            # Systematic draws: without bias, and of less variance than independent ones.
            u = torch.rand(len(q), 1, generator=generator, device=q.device, dtype=q.dtype)
            u = (u + torch.arange(times, device=q.device)) / times
            F = rejects.cumsum(1)
            token = torch.searchsorted(F, u * F[:, -1:], right=True).clamp(max=size - 1).flatten()
            parent = torch.arange(len(q), device=q.device).repeat_interleave(times)
            weight = torch.full_like(chance[parent], 1 / times)
        p, q = p[parent], without(q[parent], token[:, None])
        owner, chance = owner[parent], chance[parent] * weight
    raise AssertionError


def _last_rejected(r: Tensor, s: Tensor, rejects: Tensor) -> Tensor:
    r"""E over d of :math:`1 - \sum_i \min(r_i, s_i / (1 - s_d))`: the last draft is rejected after d was.

    The sum is piecewise linear in :math:`c = 1/(1 - s_d)`, with a kink at every :math:`r_i / s_i`: sorted by that
    ratio, the tokens up to c give r and the others c s. (r is 0 at d itself.)
    """
    ratio = torch.where(s > 0, r / s, math.inf)
    ratio, order = ratio.sort(1)
    r_below = torch.nn.functional.pad(r.gather(1, order).cumsum(1), (1, 0))
    s_above = torch.nn.functional.pad(s.gather(1, order).flip(1).cumsum(1).flip(1), (0, 1))
    likely = s.argmax(1, keepdim=True)
    others = (1 - s).scatter(1, likely, s.scatter(1, likely, 0.0).sum(1, keepdim=True))
    c = 1 / others.clamp(min=1e-300)
    at = torch.searchsorted(ratio.contiguous(), c.contiguous(), right=True)
    # Where s has one token, nothing is left to draft after it.
    accepted = torch.where(others > 0, r_below.gather(1, at) + c * s_above.gather(1, at), 0.0)
    return (rejects * (1 - accepted)).sum(1)


def _least_without(p: Tensor, q: Tensor, n: int) -> Tensor:
    """Least p(H) - Q(H) over the prefixes H of tokens that are sorted by p/q, for n >= 2, (B,).

    The law of the count N_H(T) below n is carried from token to token, for all nodes T. Three passes share the work:
    the tokens are cut into chunks; the count of each chunk alone (all chunks side by side), then the count before each
    chunk (from chunk to chunk), and then that at every prefix, but only inside of chunks in which the minimum may be:
    p(H) and Q(H) grow with H, so inside of a chunk p(H) - Q(H) is at least p(its start) - Q(its end).
    """
    rows, size = q.shape
    chunk = math.ceil(math.sqrt(size))
    chunks = math.ceil(size / chunk)
    group = max(1, BLOCK // (chunks * 160))
    if rows > group:
        parts = zip(p.split(group), q.split(group), strict=True)
        return torch.cat([_least_without(*part, n) for part in parts])
    pad = chunks * chunk - size
    p, q = torch.nn.functional.pad(p, (0, pad)), torch.nn.functional.pad(q, (0, pad))
    # λ behind each prefix, summed from what is left of q.
    left = torch.nn.functional.pad(q.flip(1).cumsum(1).flip(1)[:, 1:], (0, 1))
    start, stop = EARLIEST, math.log(LATEST) - torch.where(left > 0, left, 1.0).amin(1).log()  # (B,)
    count = math.ceil(float(stop.max() - start) / SPACING) + 1
    log_T = start + (stop - start)[:, None] * torch.linspace(0, 1, count, dtype=q.dtype, device=q.device)
    T_BJ = log_T.exp()
    step_B = (stop - start) / (count - 1)
    q_BRC, left_BRC = q.view(rows, chunks, chunk), left.view(rows, chunks, chunk)

    def mass(below: Tensor, left: Tensor, T: Tensor, step: Tensor) -> Tensor:
        """Q from the probability that the count is below n (.., J), λ and the nodes."""
        hazard = left[..., None] * T
        integrand = hazard * (-hazard).exp() * (1 - below)
        return torch.where(left > 0, integrand.sum(-1) * step, 1.0)

    def advance(counts: list[Tensor], q: Tensor, T: Tensor) -> None:
        """One token more: P(N = k) <- e^(-qT) P(N = k) + (1 - e^(-qT)) P(N = k - 1)."""
        minus_ended = torch.expm1(-q[..., None] * T)
        stays = 1 + minus_ended
        for k in range(n - 1, 0, -1):
            counts[k].mul_(stays).addcmul_(counts[k - 1], minus_ended, value=-1)
        counts[0].mul_(stays)

    T = T_BJ[:, None]
    alone = [torch.zeros(rows, chunks, count, dtype=q.dtype, device=q.device) for _ in range(n)]
    alone[0].fill_(1)
    for t in range(chunk):
        advance(alone, q_BRC[:, :, t], T)
    before = [torch.zeros_like(alone[0]) for _ in range(n)]
    state = [torch.ones_like(alone[0][:, 0]), *(torch.zeros_like(alone[0][:, 0]) for _ in range(n - 1))]
    for at in range(chunks):
        for k in range(n):
            before[k][:, at] = state[k]
        state = [torch.stack([state[j] * alone[k - j][:, at] for j in range(k + 1)]).sum(0) for k in range(n)]
    # Q, λ and p at the ends of the chunks; the end of one is the start of the next.
    ends = left_BRC[:, :, -1]
    behind = torch.stack(before).sum(0)[:, 1:]
    Q_ends = torch.cat([mass(behind, ends[:, :-1], T, step_B[:, None]), torch.ones_like(ends[:, :1])], 1)
    p_ends = p.cumsum(1).view(rows, chunks, chunk)
    least = (p_ends[:, :, -1] - Q_ends).amin(1).clamp(max=0)
    p_starts = torch.nn.functional.pad(p_ends[:, :-1, -1], (1, 0))
    b, r = (p_starts - Q_ends < least[:, None] - 1e-13).nonzero(as_tuple=True)
    counts = [before[k][b, r] for k in range(n)]  # (M, J)
    q_MC, left_MC, p_MC, T_MJ, step_M = q_BRC[b, r], left_BRC[b, r], p_ends[b, r], T_BJ[b], step_B[b]
    inside = torch.full_like(step_M, math.inf)
    for t in range(chunk - 1):
        advance(counts, q_MC[:, t], T_MJ)
        below = torch.stack(counts).sum(0)
        inside = torch.minimum(inside, p_MC[:, t] - mass(below, left_MC[:, t], T_MJ, step_M))
    return least.scatter_reduce(0, b, inside, "amin")
