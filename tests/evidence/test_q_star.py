"""The evidence of token-level DPO: claims are about contenders that run, and ask what they say."""

from __future__ import annotations

import numpy as np
import pytest

from steersman import catalog
from steersman.evidence import q_star


class Rows:
    """A comparison's answers, made up: figure -> contender -> value of seed 0 (more with the seed)."""

    def __init__(self, contenders, figures):
        self.contenders, self.figures = contenders, figures

    def values(self, figure, contender):
        assert contender in self.contenders, contender
        return {seed: self.figures[figure].get(contender, 0.0) + 0.01 * seed for seed in range(5)}

    def paired(self, figure, a, b):
        return tuple(np.array([*self.values(figure, label).values()]) for label in (a, b))


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_claims_are_about_contenders_and_figures_that_there_are(scale):
    studies = q_star.studies(scale, 0)
    for claim in q_star.CLAIMS:
        if scale in claim.scales:
            study = studies[claim.study]
            figures = {name: {} for name in catalog.bench(study.bench).figures}
            assert len(claim.effects(Rows(study.contenders, figures)).values) == 5


def test_effects_are_in_the_claims_direction():
    narrow, wide = q_star.searched(1, "quick"), q_star.searched(5, "quick")
    known = {narrow: 0.5, wide: 0.9, q_star.beam(1): 0.1, q_star.beam(5): 0.2}
    rows = Rows(list(known), {"success": known})
    assert q_star.widened("success", 1, 5)(rows).values == pytest.approx([0.4] * 5)
    assert q_star.widened("success", 1, 5, -1.0)(rows).values == pytest.approx([-0.4] * 5)
    assert q_star.gains("success", 1, 5)(rows).values == pytest.approx([0.3] * 5)
    rows = Rows(["a", "b", "c"], {"auroc": {"a": 0.9, "b": 0.6, "c": 0.7}})
    assert q_star.ahead("auroc", "a", "b", "c")(rows).values == pytest.approx([0.2] * 5)
    assert q_star.above("auroc", "a")(rows).values == pytest.approx([0.9, 0.91, 0.92, 0.93, 0.94])


def test_contenders_of_one_seed_share_their_fit():
    """Widths are knobs of the search alone, and gradients are those of the very policy."""
    assert q_star.searched(5, "full").replace("num_beams=5", "num_beams=1") == q_star.searched(1, "full")
    assert all(q_star.TUNING in label for label in (q_star.OURS, *q_star.RIVALS) if "gradient" in label)
