r"""Verifiers: which token to keep when n drafts are on offer, so that it has the target's law exactly.

A verifier is a Markov kernel K(y | d) from drafts to tokens with

.. math:: \sum_d P_{\mathrm{draft}}(d)\, K(y \mid d) = p(y).

:func:`output_law` gives the kernel's row for the drafts at hand, and :func:`verify` draws one token from it. So the
law that comes out can be summed exactly, and one uniform number decides, whatever the verifier.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize, sparse
from torch import Tensor

from steersman.errors import InputError
from steersman.language.multi_draft.laws import REST, VERIFIERS, checked, draw_tokens, fits, one_of, sampler_of, top_of

NOTHING = 1e-12  # a residual of less mass is rounding error
SUPPORT, TUPLE = 10, 4  # the largest support and number of drafts for the linear program


def verify(
    p: Tensor,
    q: Tensor,
    drafts: Tensor,
    verifier: str = "greedy",
    generator: torch.Generator | None = None,
    *,
    sampler: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of law p for every row, one of the drafts as often as ``verifier`` can.

    Args:
        p, q: laws of target and draft, (B, V), whose rows sum to 1.
        drafts: token ids in the order that :func:`~steersman.language.multi_draft.draft` gives them, (B, n).
        verifier: ``single`` (looks at the first draft), ``rrs`` and ``k-seq`` (drafts with replacement), ``rrsw``
            (without), ``spechub``, ``greedy`` (their own drafts) or ``ot-lp`` (with or without).
        generator: of torch, on p's device; one uniform number a row.
        sampler: for ``ot-lp``: who drew the drafts, ``without`` (the default) or ``with``.

    Returns:
        The tokens (B,), and whether each is one of its drafts (B,).

    Raises:
        InputError: laws, drafts or names that are refused.
    """
    law = output_law(p, q, drafts, verifier, sampler=sampler)
    token = draw_tokens(law, 1, generator)[:, 0]
    return token, (token[:, None] == drafts).any(1)


def output_law(p: Tensor, q: Tensor, drafts: Tensor, verifier: str = "greedy", *, sampler: str | None = None) -> Tensor:
    """K(. | d), the law of the token that ``verify`` gives for these drafts, (B, V) float64.

    Args and errors as in :func:`verify`.
    """
    one_of("verifier", verifier, tuple(VERIFIERS))
    if not isinstance(drafts, Tensor) or drafts.ndim != 2 or drafts.is_floating_point() or drafts.dtype is torch.bool:
        raise InputError("drafts", type(drafts).__name__, "a tensor (B, n) of token ids")
    p, q = checked(p, q, drafts.shape[1])
    n, size = drafts.shape[1], q.shape[1]
    if len(drafts) != len(p):
        raise InputError("drafts", tuple(drafts.shape), f"a row for each of the {len(p)} laws")
    by = sampler_of(verifier, sampler)
    fits(by, n, size)
    possible = (drafts >= 0) & (drafts < size)
    if by == "without":
        possible |= drafts == -1
    if by in ("with", "without"):
        possible &= (q.gather(1, drafts.clamp(0, size - 1)) > 0) | (drafts == -1)
    if not bool(possible.all()):
        row = int((~possible).any(1).nonzero()[0])
        raise InputError("drafts", f"row {row}: {drafts[row].tolist()}", f"tokens that the sampler {by!r} draws from q")
    return kernel(p, q, drafts, verifier, by)


def kernel(p: Tensor, q: Tensor, drafts: Tensor, verifier: str, sampler: str) -> Tensor:
    """:func:`output_law` on laws and drafts that were checked; with no drafts it is p."""
    if drafts.shape[1] == 0:
        return p
    if verifier == "greedy":
        return _greedy(p, q, drafts)
    if verifier == "spechub":
        return _spechub(p, q, drafts)
    if verifier == "ot-lp":
        return _linear_program(p, q, drafts, sampler)
    if verifier == "k-seq":
        return _k_seq(p, q, drafts)
    return _recursive(p, q, drafts[:, :1] if verifier == "single" else drafts, replaced=verifier != "rrsw")


def left_over(p: Tensor, q: Tensor) -> Tensor:
    """(p - q)_+ normalised; p itself where nothing is left, which happens with p = q only."""
    left = (p - q).clamp(min=0)
    mass = left.sum(1, keepdim=True)
    return torch.where(mass < NOTHING, p, left / mass.clamp(min=NOTHING))


def without(q: Tensor, tokens: Tensor) -> Tensor:
    """q without ``tokens`` (B, m), renormalised by the sum of what is left; zeros where nothing is."""
    left = q.scatter(1, tokens, 0.0)
    mass = left.sum(1, keepdim=True)
    return torch.where(mass > 0, left / mass.clamp(min=1e-300), left)


def _recursive(p: Tensor, q: Tensor, drafts: Tensor, replaced: bool) -> Tensor:
    r"""Recursive rejection: keep :math:`d_k` with min(1, r/q) at it, else :math:`r \leftarrow (r - q)_+` normalised.

    Without replacement q is what the earlier drafts left of it. A token that was rejected before has r = 0.
    """
    law, going, r = torch.zeros_like(p), torch.ones_like(p[:, :1]), p
    for k in range(drafts.shape[1]):
        there = drafts[:, k : k + 1] >= 0
        d = drafts[:, k : k + 1].clamp(min=0)
        keep = (r.gather(1, d) / q.gather(1, d)).clamp(max=1)
        keep = torch.where(there & (q.gather(1, d) > 0), keep, 0.0)
        law = law.scatter_add(1, d, going * keep)
        going = going * (1 - keep)
        r = torch.where(there, left_over(r, q), r)
        if not replaced:
            q = torch.where(there, without(q, d), q)
    return law + going * r


def k_seq_gamma(p: Tensor, q: Tensor, n: int) -> tuple[Tensor, Tensor]:
    r"""β and γ of K-SEQ, (B,): :math:`\beta = \sum \min(q, p/\gamma)`, γ in [1, n] the root of
    :math:`1 - (1 - \beta)^n = \gamma\beta`.

    γβ grows with γ and the left side falls, so there is one root, and bisection finds it to the last bits.
    """
    low, high = torch.ones_like(p[:, :1]), torch.full_like(p[:, :1], float(n))
    for _ in range(0 if n == 1 else 52):
        gamma = (low + high) / 2
        beta = torch.minimum(q, p / gamma).sum(1, keepdim=True)
        above = 1 - (1 - beta) ** n > gamma * beta
        low, high = torch.where(above, gamma, low), torch.where(above, high, gamma)
    gamma = (low + high) / 2
    return torch.minimum(q, p / gamma).sum(1), gamma[:, 0]


def _k_seq(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    r"""K-SEQ (SpecTr): each draft in turn with min(1, p/(γq)); then :math:`p - \min(q, p/\gamma)
    [1 - (1 - \beta)^n]/\beta`."""
    n = drafts.shape[1]
    beta, gamma = (x[:, None] for x in k_seq_gamma(p, q, n))
    passed = torch.minimum(q, p / gamma)
    # [1 - (1 - β)^n]/β as the sum of (1 - β)^k, which is n at β = 0.
    times = sum((1 - beta) ** k for k in range(n))
    residual = (p - passed * times).clamp(min=0)
    mass = residual.sum(1, keepdim=True)
    residual = torch.where(mass < NOTHING, p, residual / mass.clamp(min=NOTHING))
    keep = (p.gather(1, drafts) / (gamma * q.gather(1, drafts))).clamp(max=1)
    going = torch.cumprod(torch.nn.functional.pad(1 - keep, (1, 0), value=1.0), 1)
    return (going[:, -1:] * residual).scatter_add(1, drafts, going[:, :-1] * keep)


def _greedy(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    r"""Keep :math:`d_n` with min(1, p/q̃), else :math:`y \propto (p - \tilde q)_+`; q̃ = 0 on Top, so y is often there.

    That is speculative sampling of one draft with the proposal q̃.
    """
    top, last = drafts[:, :-1], drafts[:, -1:]
    left = q.scatter(1, top, 0.0)
    mass = left.sum(1, keepdim=True)
    point = torch.zeros_like(q).scatter_(1, last, 1.0)  # what the sampler drew from where next to nothing is left
    q_rest = torch.where(mass < REST, point, left / mass.clamp(min=REST))
    return _recursive(p, q_rest, last, replaced=True)


def _spechub(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    r"""SpecHub. Pairs (i, a) have mass :math:`M^1_i = (1 - q_a)\tilde q_i`, and (a, i) :math:`M^2_i = q_a \tilde q_i`.

    p is taken from them in turn: :math:`t^1 = \min(p, M^1)` at i, :math:`t^2 = \min(p - t^1, M^2)` at i, then what is
    left of the pairs (a, i), and of the pairs (i, a), for a; what then is left of p goes to whatever is left.
    """
    first_is_a = drafts[:, :1] == top_of(q, 2)
    a = torch.where(first_is_a, drafts[:, :1], drafts[:, 1:])
    i = torch.where(first_is_a, drafts[:, 1:], drafts[:, :1])
    left = q.scatter(1, a, 0.0)
    mass = left.sum(1, keepdim=True)
    q_rest = torch.where(mass < REST, torch.zeros_like(q).scatter_(1, i, 1.0), left / mass.clamp(min=REST))
    q_a = q.gather(1, a)
    M1, M2 = mass * q_rest, q_a * q_rest
    p_i = p.scatter(1, a, 0.0)
    t1 = torch.minimum(p_i, M1)
    t2 = torch.minimum(p_i - t1, M2)
    rest1, rest2 = (M1 - t1).sum(1, keepdim=True), (M2 - t2).sum(1, keepdim=True)
    s2 = torch.minimum(p.gather(1, a), rest2)
    s1 = torch.minimum(p.gather(1, a) - s2, rest1)
    residual = (p - t1 - t2).scatter_add(1, a, -(s1 + s2)).clamp(min=0)
    residual = left_over(residual, torch.zeros_like(residual))

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(whole > 0, part / whole.clamp(min=1e-300), 0.0).clamp(max=1)

    keep_i = torch.where(first_is_a, share(t2, M2).gather(1, i), share(t1, M1).gather(1, i))
    keep_a = torch.where(first_is_a, share(s2, rest2), share(s1, rest1))
    law = (1 - keep_i) * (1 - keep_a) * residual
    return law.scatter_add(1, i, keep_i).scatter_add(1, a, (1 - keep_i) * keep_a)


def _linear_program(p: Tensor, q: Tensor, drafts: Tensor, sampler: str) -> Tensor:
    """The best coupling, by linear programming over sets of drafts; rows that are equal are solved once."""
    rows, which = torch.unique(torch.cat([p, q], 1), dim=0, return_inverse=True)
    size = q.shape[1]
    solved = [_coupling(row[:size].cpu().numpy(), row[size:].cpu().numpy(), drafts.shape[1], sampler) for row in rows]
    law = np.stack([solved[i](frozenset(d) - {-1}) for i, d in zip(which.tolist(), drafts.tolist(), strict=True)])
    return torch.from_numpy(law).to(p)


def _coupling(p: np.ndarray, q: np.ndarray, n: int, sampler: str) -> Callable[[frozenset[int]], np.ndarray]:
    """The kernel's row for a set of drafts, from the transport plan x[D, y] of most mass with y in D."""
    sets = _draft_sets(q, n, sampler)
    pairs = [(k, y) for k, D in enumerate(sets) for y in sorted(D)]
    tokens = {y: j for j, y in enumerate(sorted({y for _, y in pairs}))}
    mass = np.array(list(sets.values()))
    columns = np.arange(len(pairs))
    ones = np.ones(len(pairs))
    of_set = sparse.csr_array((ones, ([k for k, _ in pairs], columns)), shape=(len(sets), len(pairs)))
    of_token = sparse.csr_array((ones, ([tokens[y] for _, y in pairs], columns)), shape=(len(tokens), len(pairs)))
    wanted = p[list(tokens)]
    found = optimize.linprog(
        -ones, A_ub=sparse.vstack([of_set, of_token]), b_ub=np.concatenate([mass, wanted]), method="highs"
    )
    x = np.maximum(found.x, 0)
    # The solver meets its constraints to 1e-7 only. Scaled down, the plan keeps them exactly, and so p.
    for matrix, limit in ((of_set, mass), (of_token, wanted)):
        total = matrix @ x
        x = x * (matrix.T @ np.minimum(1, np.divide(limit, total, out=np.ones_like(total), where=total > 0)))
    residual = p.copy()
    np.subtract.at(residual, [y for _, y in pairs], x)
    residual = np.maximum(residual, 0)
    residual = residual / residual.sum() if residual.sum() > NOTHING else p
    order = {D: k for k, D in enumerate(sets)}

    def row(D: frozenset[int]) -> np.ndarray:
        law = np.zeros_like(p)
        for column in np.flatnonzero(of_set[[order[D]]].toarray()[0]):
            law[pairs[column][1]] = x[column] / mass[order[D]]
        return law + max(0.0, 1 - law.sum()) * residual

    return row


def _draft_sets(q: np.ndarray, n: int, sampler: str) -> dict[frozenset[int], float]:
    """Every set of drafts that ``sampler`` gives, and its probability."""
    support = np.flatnonzero(q)
    if len(support) > SUPPORT or n > TUPLE:
        value = f"{n} drafts from {len(support)} tokens"
        allowed = f"at most {TUPLE} drafts from at most {SUPPORT} tokens (as top_k={SUPPORT} leaves) for ot-lp"
        raise InputError("drafts", value, allowed)
    sets: dict[frozenset[int], float] = defaultdict(float)
    for d in itertools.product(support.tolist(), repeat=n if sampler == "with" else min(n, len(support))):
        if sampler == "with":
            sets[frozenset(d)] += float(np.prod(q[list(d)]))
        elif len(set(d)) == len(d):
            left, chance = q.copy(), 1.0
            for i in d:
                chance *= left[i] / left.sum()
                left[i] = 0
            sets[frozenset(d)] += chance
    return dict(sets)
