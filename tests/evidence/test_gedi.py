"""GeDi's evidence: weights are chosen on other fits, and its studies have what its claims ask for."""

from __future__ import annotations

import numpy as np
import pytest

from steersman import catalog
from steersman.evidence import gedi
from steersman.evidence.gedi import HYBRID, PLAIN, UNFILTERED, guided, own_best, unweighted


class Rows:
    """A comparison's answers, made up: figure -> contender -> values of five seeds."""

    def __init__(self, **figures):
        self.figures = figures
        self.contenders = list(figures["success"])

    def values(self, figure, contender):
        return dict(enumerate(self.figures[figure][contender]))


def test_weights_are_chosen_on_other_fits_where_texts_stay_valid():
    a, b, c = guided(10), guided(30), guided(60)
    rows = Rows(
        success={"sample": [0.4] * 5, a: [0.7] * 5, b: [0.6, 0.9, 0.9, 0.9, 0.9], c: [1.0] * 5},
        validity={"sample": [0.95] * 5, a: [0.95] * 5, b: [0.91] * 5, c: [0.5] * 5},
    )
    # The largest weight breaks texts. The first fit's own answer would have been 0.7: the others said 30.
    assert own_best(rows, guided(30)).tolist() == [0.6, 0.9, 0.9, 0.9, 0.9]
    assert own_best(rows, guided(30), "validity").tolist() == [0.91] * 5
    assert own_best(rows, "sample").tolist() == [0.4] * 5
    assert gedi.above(0.89)(rows).values == pytest.approx([-0.29, 0.01, 0.01, 0.01, 0.01])
    assert gedi.above(0.5)(rows).values == pytest.approx([0.01] * 5)  # 0.04 of the allowed 0.05 are lost
    rows.figures["validity"] = {label: [0.95 if label == "sample" else 0.1 * i] * 5 for i, label in enumerate([
        "sample", a, b, c])}  # fmt: skip
    assert own_best(rows, guided(30)).tolist() == [1.0] * 5  # none is allowed: the least harmful
    assert gedi.above(0.5)(rows).values == pytest.approx([0.05 - 0.65] * 5)  # so many successes are none


def test_only_weights_are_left_out_of_a_label():
    assert unweighted(guided(10)) == unweighted(guided(60))
    assert unweighted(gedi.words(1)) == unweighted(gedi.words(4)) == unweighted("word-bias")
    forms = [guided(10), guided(10, PLAIN), guided(10, HYBRID + UNFILTERED), gedi.alone("conditional"), gedi.cfg(2)]
    assert len({unweighted(form) for form in forms}) == len(forms)


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_claims_find_their_contenders(scale):
    studies = gedi.studies(scale, 0)
    rng = np.random.default_rng(0)
    for claim in gedi.CLAIMS:
        if scale not in claim.scales:
            continue
        study = studies[claim.study]
        assert study.seeds >= 5
        rows = Rows(
            **{f: {c: rng.random(5).tolist() for c in study.contenders} for f in ("success", "validity", "fluency")}
        )
        effects = claim.effects(rows)
        assert len(effects.values) == 5 and np.isfinite(effects.values).all()


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_rivals_are_swept_as_finely(scale):
    contenders = gedi.studies(scale, 0)["sentiment"].contenders
    sizes = [
        sum(unweighted(c) == unweighted(like) for c in contenders) for like in (guided(30), gedi.cfg(2), "word-bias")
    ]
    assert len(set(sizes)) == 1 and sizes[0] >= 3


def test_its_contenders_can_be_mounted():
    card = catalog.card("gedi")
    assert list(card.benches) == ["control"]
    assert card.load().from_pretrained and catalog.bench("control").id == "control"
