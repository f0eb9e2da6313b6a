r"""The law of the drafts: who draws n tokens from q, and how probable it is that all of them lie in a set H.

.. math:: Q(H) = \Pr(d_1, \dots, d_n \in H)

================  ==========================================================================================
``with``          independent draws: :math:`Q(H) = q(H)^n`
``without``       each draw from what the earlier ones left of q, renormalised. That is a race: token i ends at
                  an exponential time of rate :math:`q_i`, and the drafts are the first n to end
``greedy``        the n - 1 most probable tokens Top, and one token of :math:`\tilde q`, which is q on the rest
``spechub``       n = 2: (i, a) with probability :math:`q_i`, (a, i) with :math:`q_a \tilde q_i`, where a is the
                  most probable token
================  ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from steersman.errors import InputError, nearest

SAMPLERS = ("with", "without", "greedy", "spechub")
VERIFIERS: Mapping[str, str] = MappingProxyType(
    {
        "single": "with",
        "rrs": "with",
        "k-seq": "with",
        "rrsw": "without",
        "spechub": "spechub",
        "greedy": "greedy",
        "ot-lp": "without",
    }
)
"""Every verifier, and the sampler whose drafts it is for (``ot-lp`` also takes drafts with replacement)."""

MOST_DRAFTS = 64
REST = 1e-6  # below this mass behind Top the last draft is the next token in order instead of one drawn


def checked(p: Tensor, q: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """p and q as laws in float64.

    Raises:
        InputError: n out of range, no matrices of one shape, NaN, negative numbers, or rows that don't sum to 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_DRAFTS:
        raise InputError("n", n, f"a whole number from 1 to {MOST_DRAFTS}")
    for name, law in (("p", p), ("q", q)):
        if not isinstance(law, Tensor) or law.ndim != 2 or not law.is_floating_point() or 0 in law.shape:
            shown = f"{tuple(law.shape)} of {law.dtype}" if isinstance(law, Tensor) else type(law).__name__
            raise InputError(name, shown, "a tensor (B, V) of probabilities, with B and V at least 1")
    if p.shape != q.shape:
        raise InputError("q", tuple(q.shape), f"of p's shape {tuple(p.shape)}: the same vocabulary")
    laws = []
    for name, law in (("p", p), ("q", q)):
        law = law.double()
        total = law.sum(1, keepdim=True)
        # NaN fails the first comparison.
        bad = ~((total - 1).abs() <= 1e-4) | (law < 0).any(1, keepdim=True)
        if bool(bad.any()):
            row = int(bad[:, 0].nonzero()[0])
            value = f"row {row}, which sums to {float(total[row]):.6g}"
            raise InputError(name, value, "rows of numbers of at least 0 that sum to 1 within 1e-4, free of NaN")
        laws.append(law / total)
    return laws[0], laws[1]


def one_of(name: str, value: Any, names: tuple[str, ...]) -> str:
    """``value``, if it is one of ``names``."""
    if not isinstance(value, str) or value not in names:
        raise InputError(name, value, nearest(str(value), names))
    return value


def sampler_of(verifier: str, sampler: str | None) -> str:
    """The sampler that goes with ``verifier``: ``sampler``, if the verifier can take its drafts."""
    own = VERIFIERS[one_of("verifier", verifier, tuple(VERIFIERS))]
    able = ("without", "with") if verifier == "ot-lp" else (own,)
    return own if sampler is None else one_of(f"sampler of {verifier}", sampler, able)


def order_of(q: Tensor, ranking: Tensor | None, n: int) -> Tensor:
    """What Top is ranked by: q where q is above 0, and ``ranking`` (logits) among the rest, (B, V).

    With top-p or at temperature 0 the law has fewer tokens than drafts are wanted; the next ones in the order of the
    draft's own logits are as good a guess as there is, and any order that doesn't depend on what is drawn is lossless.
    """
    if ranking is None:
        return q
    if ranking.shape != q.shape or not ranking.is_floating_point():
        raise InputError("ranking", f"{tuple(ranking.shape)} of {ranking.dtype}", f"numbers of shape {tuple(q.shape)}")
    if bool(((q > 0).sum(1) >= n).all()):
        return q  # the n first tokens are among these
    return torch.where(q > 0, q.double(), ranking.double().softmax(-1) - 1)


def top_of(order: Tensor, n: int) -> Tensor:
    """Top, the first n - 1 tokens in order, (B, n - 1)."""
    # Of equals argmax takes the first, which topk does not promise, and SpecHub's verifier has to find it again.
    return order.argmax(1, keepdim=True) if n == 2 else order.topk(n - 1, dim=1).indices


def rest(q: Tensor, top: Tensor, order: Tensor) -> Tensor:
    r"""q̃, the law of the greedy sampler's last draft: q without the tokens ``top`` (B, n - 1), renormalised.

    Where next to nothing is left of q, q̃ is the next token in order: every proposal is lossless, and one that is
    divided by rounding errors is not the one that was drawn from.
    """
    left = q.scatter(1, top, 0.0)
    # Summed from what is left: 1 - q(Top) would be rounding error where q is peaked.
    mass = left.sum(1, keepdim=True)
    if bool((mass >= REST).all()):
        return left / mass
    point = torch.zeros_like(left).scatter_(1, order.scatter(1, top, -math.inf).argmax(1, keepdim=True), 1.0)
    return torch.where(mass < REST, point, left / mass.clamp(min=REST))


def draft(
    q: Tensor, n: int, sampler: str, generator: torch.Generator | None = None, *, ranking: Tensor | None = None
) -> Tensor:
    """n drafts for every row of q, in the order that the verifiers take, (B, n).

    Args:
        q: the draft's laws, (B, V).
        n: drafts a row.
        sampler: with, without, greedy or spechub.
        generator: of torch, on q's device.
        ranking: the order of the tokens that q gives nothing to, for ``greedy`` and ``spechub``; see :func:`order_of`.

    Returns:
        Token ids; -1 where ``without`` finds no further token in the support of q.

    Raises:
        InputError: q or n is refused, or there is no such sampler.
    """
    one_of("sampler", sampler, SAMPLERS)
    _, q = checked(q, q, n)
    fits(sampler, n, q.shape[1])
    return draw(q, n, sampler, generator, q if ranking is None else order_of(q, ranking, n))


def fits(sampler: str, n: int, size: int) -> None:
    """Refuse a number of drafts that ``sampler`` can't draw."""
    if sampler == "spechub" and n != 2:
        raise InputError("n", n, "2 for SpecHub")
    if sampler != "with" and n > size:
        raise InputError("n", n, f"at most the vocabulary's {size} tokens: no token is drafted twice")


def draw(q: Tensor, n: int, sampler: str, generator: torch.Generator | None, order: Tensor) -> Tensor:
    """:func:`draft` on laws in float64 that were checked."""
    if sampler == "with":
        return draw_tokens(q, n, generator)
    if sampler == "without":
        first = (q / torch.empty_like(q).exponential_(generator=generator)).topk(n, dim=1)
        return first.indices.masked_fill(first.values <= 0, -1)
    if sampler == "greedy":
        top = top_of(order, n)
        return torch.cat([top, draw_tokens(rest(q, top, order), 1, generator)], 1)
    a = top_of(q, 2)
    i = draw_tokens(rest(q, a, order), 1, generator)
    a_first = torch.rand(a.shape, generator=generator, device=q.device, dtype=q.dtype) < q.gather(1, a)
    return torch.where(a_first, torch.cat([a, i], 1), torch.cat([i, a], 1))


def draw_tokens(law: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """n independent tokens of each row of ``law`` (B, V), (B, n): the first whose distribution function exceeds u.

    Exceeds, not reaches: u = 0 must not give a token without probability, of which top-p leaves many.
    """
    F = law.cumsum(1)
    total = F[:, -1:].expand(-1, n).contiguous()
    u = torch.rand(total.shape, generator=generator, device=law.device, dtype=law.dtype)
    tokens = torch.searchsorted(F, u * total, right=True)
    return torch.minimum(tokens, torch.searchsorted(F, total))  # u * total may round up to total
