r"""Which tree and verifier to take for a pair of models, from its measured acceptance and times.

If with m drafts the verifier keeps one with probability :math:`\alpha_m`, the k-th child of a node is kept with about
:math:`\alpha_k - \alpha_{k-1}`, independently of what came before. Then a round gives

.. math:: \mathbb{E}[\text{tokens}] = 1 + \sum_{\text{nodes}} \prod_{\text{children } k \text{ on the path}}
          (\alpha_k - \alpha_{k-1}), \qquad
          \mathbb{E}[\text{time}] = t_{\text{target}}(1 + N) + \sum_{\text{levels}} t_{\text{draft}}(\text{width}),

with t(m) the time of a forward of m tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steersman.errors import InputError
from steersman.language.multi_draft.laws import VERIFIERS, one_of
from steersman.language.multi_draft.tree import families


@dataclass(frozen=True)
class Plan:
    """A setting of multi-draft decoding, and what it is expected to give.

    Args:
        verifier, n_drafts, depth: of ``MultiDraft``; n_drafts = 0 is plain ``generate``.
        tokens_per_call: expected tokens for each forward of the target.
        ms_per_token: expected time of a token.
        speedup: against plain ``generate``.
    """

    verifier: str
    n_drafts: int
    depth: int
    tokens_per_call: float
    ms_per_token: float
    speedup: float

    @property
    def line(self) -> str:
        """The code line."""
        if self.n_drafts == 0:
            return "model.generate(**inputs)"
        loop = f"MultiDraft(draft_model, n_drafts={self.n_drafts}, depth={self.depth}, verifier={self.verifier!r})"
        return f"model.generate(**inputs, custom_generate={loop})"


def recommend(
    rates: Mapping[str, Sequence[float]],
    target_ms: Mapping[int, float],
    draft_ms: Mapping[int, float],
    *,
    depths: Sequence[int] = tuple(range(1, 9)),
    max_nodes: int = 64,
) -> list[Plan]:
    """Every setting, best first; plain ``generate`` is among them.

    Args:
        rates: of each verifier, its mean acceptance with 1, 2, ... drafts.
        target_ms, draft_ms: milliseconds of a forward by the number of tokens fed (at least for 1). Between the
            numbers that were measured time is taken to be linear, and constant outside of them.
        depths: of trees to look at.
        max_nodes: as in ``MultiDraft``.

    Raises:
        InputError: no time for one token, a time of 0 or less, or a rate outside of 0 to 1.
    """
    for name, times in (("target_ms", target_ms), ("draft_ms", draft_ms)):
        if 1 not in times or not all(t > 0 for t in times.values()):
            raise InputError(name, dict(times), "times above 0 by number of tokens, 1 among them")
    for verifier, values in rates.items():
        one_of("rates", verifier, tuple(VERIFIERS))
        if not all(0 <= value <= 1 for value in values):
            raise InputError("rates", list(values), "numbers from 0 to 1")

    def time(times: Mapping[int, float], tokens: int) -> float:
        sizes = sorted(times)
        return float(np.interp(tokens, sizes, [times[m] for m in sizes]))

    alone = time(target_ms, 1)
    plans = [Plan("", 0, 0, 1.0, alone, 1.0)]
    for verifier, values in rates.items():
        for n in range(1, len(values) + 1):
            if (verifier == "spechub" and n != 2) or (verifier == "single" and n != 1) or n > max_nodes:
                continue
            steps = np.maximum(np.diff([0.0, *values[:n]]), 0)
            steps = steps * values[n - 1] / max(steps.sum(), 1e-12)
            for depth in depths:
                children = families(n, depth, max_nodes)
                expected, reach, level, widths, nodes = 1.0, {0: 1.0}, [0], [], 0
                while level := [place for place in level if children[place]]:
                    widths.append(len(level))
                    following = []
                    for place in level:
                        for k, child in enumerate(children[place]):
                            reach[child] = reach[place] * float(steps[k])
                            expected += reach[child]
                            following.append(child)
                    nodes += len(following)
                    level = following
                if len(widths) < depth:
                    continue  # the cap made it the tree of a smaller depth
                spent = time(target_ms, 1 + nodes) + sum(time(draft_ms, width) for width in widths)
                plans.append(Plan(verifier, n, depth, expected, spent / expected, alone * expected / spent))
    return sorted(plans, key=lambda plan: (plan.ms_per_token, plan.n_drafts, plan.depth))
