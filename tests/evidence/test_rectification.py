"""Rectification's evidence: its studies can be asked for, its claims ask what they say, and fits are shared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steersman.benches.control import ControlBench
from steersman.engine.compare import compare
from steersman.evidence import rectification as evidence


class Rows:
    """A comparison's answers, made up: figure -> contender -> values by fit."""

    def __init__(self, **figures: dict[str, list[float]]) -> None:
        self.figures = figures

    def paired(self, figure: str, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
        values = self.figures[figure]
        return np.array(values[a]), np.array(values[b])

    def paired_items(self, figure: str, a: str, b: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        left, right = self.paired(figure, a, b)
        return left, right, np.zeros(len(left))


def test_effects_are_in_the_claims_direction() -> None:
    mine, base = evidence.ours(0), evidence.BASE
    rows: Any = Rows(
        bad={mine: [0.1, 0.2], base: [0.3, 0.3]},
        validity={mine: [0.9, 0.9], base: [0.95, 0.9]},
        bad_valid={mine: [0.05, 0.1], base: [0.2, 0.2]},
        valid={mine: [0.5, 0.5], base: [0.8, 1.0]},
        prompt_risk={mine: [0.32, 0.4], evidence.MOST: [0.6, 0.5]},
        base_risk={mine: [0.2, 0.2]},
        risk={mine: [0.1, 0.25]},
    )
    assert evidence.less("bad", mine, base)(rows).values == pytest.approx([0.2, 0.1])
    assert evidence.more("validity", mine, base)(rows).values == pytest.approx([-0.05, 0.0])
    assert evidence.bad_among_valid(mine, base)(rows).values == pytest.approx([0.15, 0.0])
    assert evidence.less("bad", mine, base)(rows).clusters is None
    assert evidence.units(np.ones(6), np.array([0, 1, 2, 3, 4, 4])).clusters is not None
    assert evidence.calibrated(rows).values == pytest.approx([0.03, -0.05])
    assert evidence.overstated(rows).values == pytest.approx([0.28, 0.1])
    assert evidence.risk_falls(rows).values == pytest.approx([0.1, -0.05])


def test_gedi_s_weight_is_chosen_on_the_other_fits() -> None:
    mine, base = evidence.ours(0.1), evidence.BASE
    weights = [evidence.gedi(w) for w in evidence.OMEGAS]
    bad = {mine: [0.1] * 3, base: [0.3] * 3} | dict(
        zip(weights, ([0.3] * 3, [0.2] * 3, [0.2] * 3, [0.2] * 3, [0.1] * 3, [0.05] * 3, [0.0] * 3), strict=True)
    )
    fluency = {mine: [-1.0] * 3, base: [-0.9] * 3}
    fluency |= dict(zip(weights, ([w] * 3 for w in (-0.9, -0.9, -1.0, -1.0, -1.2, -1.4, -1.6)), strict=True))
    rows: Any = Rows(bad=bad, fluency=fluency)
    assert evidence.fluency_at_equal_badness(rows).values == pytest.approx([0.2] * 3)
    never: Any = Rows(bad=bad | {mine: [-0.1] * 3}, fluency=fluency)
    assert not len(evidence.fluency_at_equal_badness(never).values)  # nothing to compare at equal rudeness


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_claims_are_about_contenders_that_run(scale: str) -> None:
    studies = evidence.studies(scale, 0)

    class Asked:
        def __init__(self, contenders: Any) -> None:
            self.contenders = contenders

        def paired(self, figure: str, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
            assert figure in ControlBench.figures and a in self.contenders and b in self.contenders, (figure, a, b)
            return np.ones(5), np.ones(5)

        def paired_items(self, figure: str, a: str, b: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return *self.paired(figure, a, b), np.arange(5)

    for claim in evidence.CLAIMS:
        if scale in claim.scales:
            asked: Any = Asked(studies[claim.study].contenders)
            assert len(claim.effects(asked).values) == 5


def test_contenders_of_one_training_share_its_fit(tmp_path: Any) -> None:
    fit = "prompts=24:continuations=3:new_tokens=16:layers=1:epochs=1"
    contenders = ["sample", *(f"rectification:{fit}:{knob}" for knob in ("eps=0", "eps=0.2", "projection=bayes"))]
    grid = {"attribute": "rudeness=polite", "count": 2, "samples": 2, "new_tokens": 8, "marked": 1}
    c = compare("control", "reviews/base", contenders, grid, seeds=[0], out=tmp_path)
    assert not c.failed and len(list((tmp_path / "fits").iterdir())) == 1
    figures = [row.figures for row in c.rows]
    assert all(0 <= f["risk"] <= 1 and f["lift"] >= 1 for f in figures[1:]) and "risk" not in figures[0]
    assert len({round(f["prompt_risk"], 6) for f in figures[1:]}) == 1  # the same values behind the same prompts
    assert figures[1]["forward_tokens"] > figures[0]["forward_tokens"]  # the value model's tokens are counted
