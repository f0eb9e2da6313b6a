"""PNDM's evidence: its studies can run, and its claims ask what they say."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.engine import contenders
from steersman.engine.claims import judge
from steersman.engine.compare import compare
from steersman.evidence import pndm


class Rows:
    """A comparison's answers, made up: figure -> contender -> calls -> value of seed 0 (more with the seed)."""

    def __init__(self, **figures):
        self.figures = figures

    def values(self, figure, contender, calls):
        return {seed: self.figures[figure][contender][calls] * (1 + 0.01 * seed) for seed in range(6)}

    def paired(self, figure, a, b, calls):
        left, right = self.values(figure, a, calls), self.values(figure, b, calls)
        return np.array(list(left.values())), np.array([v * (1 + 0.001 * s) for s, v in right.items()])


def test_effects_are_in_the_claims_direction():
    errors = Rows(trajectory_error={"ddim": {100: 0.08}, pndm.F: {50: 0.08, 100: 0.01}})
    assert pndm.log_ratio("ddim", pndm.F, 100)(errors).values == pytest.approx([np.log(8)] * 6, abs=0.01)
    assert pndm.order(pndm.F)(errors).values == pytest.approx([3.0] * 6)
    distances = Rows(sliced_wasserstein={"ddim": {1000: 0.1}, pndm.F: {50: 0.2}})
    assert pndm.as_good_as_a_thousand(distances).values == pytest.approx([-np.log(2)] * 6)
    frechet = Rows(frechet={"ddim": {20: 5.0}, pndm.S: {20: 4.0}})
    assert (pndm.less_frechet(pndm.S, 20)(frechet).values > 0.9).all()


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_studies_name_contenders_and_settings_that_exist(scale):
    studies = pndm.studies(scale, 0)
    assert {claim.study for claim in pndm.CLAIMS} <= set(studies)
    for study in studies.values():
        for stack in contenders.parse_list(list(study.contenders)):
            assert all(part.id for part in stack.parts)
        assert study.seeds >= 5


def test_a_study_runs_and_its_claims_are_judged(monkeypatch):
    monkeypatch.setattr("steersman.benches.sampling.FINE_STEPS", 40)
    study = pndm.studies("quick", 0)["ring"]
    comparison = compare(study.bench, study.subject, ("ddim", pndm.F), {"calls": [50, 100], "samples": 16}, seeds=5)
    verdicts = {v.id: v for v in judge(pndm.CLAIMS, {"ring": comparison}, "quick")}
    assert verdicts["ring-half"].n == 5
    assert verdicts["digits-f"].verdict == "not shown"
    assert "missing" in verdicts["digits-f"].reason


def test_other_schedules_bring_their_own_network():
    subject = pndm.OtherNoise("squaredcos_cap_v2").subject("gaussians:ring")
    assert subject.pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert subject.pipe.unet.config["beta_schedule"] == "squaredcos_cap_v2"
