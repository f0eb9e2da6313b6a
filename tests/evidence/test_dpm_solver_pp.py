"""DPM-Solver++'s evidence: its studies can run, and its claims ask what they say."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.engine import contenders
from steersman.engine.claims import judge
from steersman.engine.compare import compare
from steersman.evidence import dpm_solver_pp as evidence


class Rows:
    """A comparison's answers, made up: contender -> calls -> value of seed 0 (more with the seed)."""

    def __init__(self, table):
        self.table = table

    def values(self, figure, contender, calls):
        return {seed: self.table[contender][calls] * (1 + 0.01 * seed) for seed in range(6)}

    def paired(self, figure, a, b, calls):
        return tuple(np.array([*self.values(figure, name, calls).values()]) for name in (a, b))


def test_effects_are_in_the_claims_direction():
    rows = Rows({"ddim": {10: 4.0, 50: 3.0}, "dpm-solver-pp": {10: 1.0}})
    assert evidence.log_ratio("ddim", "dpm-solver-pp", 10)(rows).values == pytest.approx([np.log(4)] * 6)
    assert (evidence.less("frechet", "ddim", "dpm-solver-pp", 10)(rows).values >= 3.0).all()
    assert evidence.fewer_for_more(10, 50)(rows).values == pytest.approx([np.log(3)] * 6)


def test_calls_saved_are_those_from_which_all_budgets_stay_at_the_goal():
    ddim = {5: 11.0, 10: 3.0, 20: 2.5, 50: 1.5, 100: 1.0}  # the goal is 2
    rows = Rows({"ddim": ddim, "dpm-solver-pp": {5: 1.5, 10: 2.1, 20: 1.9, 50: 1.0, 100: 0.9}})
    assert evidence.calls_saved((5, 10, 20, 50, 100))(rows).values == pytest.approx([np.log(50 / 20)] * 6)
    rows.table["dpm-solver-pp"] |= {10: 1.9}
    assert evidence.calls_saved((5, 10, 20, 50, 100))(rows).values == pytest.approx([np.log(50 / 5)] * 6)
    rows.table["dpm-solver-pp"] |= {100: 3.0}
    with pytest.raises(LookupError, match="does not reach"):
        evidence.calls_saved((5, 10, 20, 50, 100))(rows)


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_studies_name_contenders_and_budgets_that_the_claims_ask_for(scale):
    studies = evidence.studies(scale, 0)
    for claim in evidence.CLAIMS:
        if scale in claim.scales:
            assert claim.study in studies
    for study in studies.values():
        assert study.seeds >= 5
        for text in study.contenders:
            assert contenders.parse(text).label == text  # what rows are looked up by


def test_claims_are_judged_on_rows_of_their_studies(monkeypatch):
    monkeypatch.setattr("steersman.benches.sampling.FINE_STEPS", 20)
    found = {}
    for name, study in evidence.studies("quick", 0).items():
        if name in ("ring-w8", "ring-noise"):
            grid = dict(study.grid) | {"samples": 4, "calls": [10, 15, 20]}
            found[name] = compare(study.bench, study.subject, study.contenders, grid, seeds=5)
            assert not found[name].failed
    verdicts = {v.id: v for v in judge(evidence.CLAIMS, found, "quick")}
    judged = [claim for claim in evidence.CLAIMS if claim.study in found]
    assert len(judged) == 5
    for claim in judged:
        assert verdicts[claim.id].n == 5, verdicts[claim.id].reason


def test_noise_prediction_meets_equals():
    subject = evidence.ToTheFirstLevel().subject("gaussians:ring")
    assert subject.pipe.scheduler.config.set_alpha_to_one is False
