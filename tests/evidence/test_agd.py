"""AGD's evidence: its studies can be asked for, its claims ask what they say, and a fit is judged on its own path."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.engine.compare import compare
from steersman.evidence import agd


class Rows:
    """A comparison's answers, made up: figure -> contender -> value of seed 0 (more with the seed)."""

    def __init__(self, **figures):
        self.figures = figures

    def values(self, figure, contender, steps):
        return {seed: self.figures[figure][contender] * (1 + 0.01 * seed) for seed in range(5)}

    def paired(self, figure, a, b, steps):
        return tuple(np.array(list(self.values(figure, label, steps).values())) for label in (a, b))


def test_effects_are_in_the_claims_direction():
    rows = Rows(
        psnr={"a": 30.0, "b": 20.0},
        frechet={"a": 5.0, "b": 10.0},
        missed={"a": 0.2, "b": 0.4},
        accuracy={"a": 0.5, "b": 0.6, "none": 0.4},
    )
    assert (agd.more("psnr", "a", "b")(rows).values >= 10.0).all()
    assert (agd.less("missed", "a", "b")(rows).values >= 0.2).all()
    assert agd.smaller("frechet", "a", "b")(rows).values == pytest.approx([np.log(2)] * 5)
    assert agd.below("missed", "a", 0.5)(rows).values[0] == pytest.approx(0.3)
    assert agd.below("frechet", "a", 0.65, "b")(rows).values == pytest.approx([0.15] * 5)
    # Half of the gain is less than 95% of it.
    assert (agd.gained("a", "b", 0.95)(rows).values < 0).all()
    assert (agd.gained("a", "b", 0.4)(rows).values > 0).all()


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_claims_are_about_contenders_that_run(scale):
    studies = agd.studies(scale, 0)

    class Asked:
        def __init__(self, contenders):
            self.contenders = contenders

        def values(self, figure, contender, steps):
            assert contender in self.contenders, contender
            assert steps in (20,) and figure in agd.Distillation.figures
            return dict.fromkeys(range(5), 1.0)

        def paired(self, figure, a, b, steps):
            return tuple(np.array([*self.values(figure, label, steps).values()]) for label in (a, b))

    for claim in agd.CLAIMS:
        if scale in claim.scales:
            assert len(claim.effects(Asked(studies[claim.study].contenders)).values) == 5


def test_a_comparison_fits_once_and_measures_what_is_missed(tmp_path):
    fit = "hidden_dim=8:trajectories=4:sampling_steps=2:steps=2:batch_size=4"
    contenders = ["none", *(agd.fitted(w, settings=fit) for w in (3.0, 5.0)), agd.cfg(3.0), agd.cfg(3.0, 2)]
    c = compare(agd.Distillation(), "digits", contenders, {"steps": 4, "samples": 16}, seeds=[0], out=tmp_path)
    figures = {label: c.select(label)[0].figures for label in contenders}
    three, five = figures[contenders[1]], figures[contenders[2]]
    assert len(list((tmp_path / "fits").iterdir())) == 1
    assert 0 < three["missed"] < 1.5 and three["missed"] != five["missed"]
    assert three["trainable"] == five["trainable"] < 0.05
    calls = [figures[label]["calls_used"] for label in contenders]
    assert calls == [4, 4, 4, 8, 4]
    assert "missed" not in figures["none"]
