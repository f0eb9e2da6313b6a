"""PTQ4DM's evidence: its studies can run, and its claims ask what they say."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.engine import contenders
from steersman.engine.claims import judge
from steersman.engine.compare import compare
from steersman.evidence import ptq4dm


class Rows:
    """A comparison's answers, made up: contender -> value of seed 0 (more with the seed)."""

    def __init__(self, values):
        self.values = values

    def paired(self, figure, a, b):
        return tuple(np.array([self.values[name] * (1 + 0.01 * seed) for seed in range(6)]) for name in (a, b))


def test_effects_are_in_the_claims_direction():
    ours, theirs = ptq4dm.contender("ndtc", "6"), ptq4dm.contender("raw", "6")
    effects = ptq4dm.less("drift", "raw")(Rows({ours: 0.1, theirs: 0.3}))
    assert effects.values == pytest.approx([np.log(3)] * 6)
    eight = ptq4dm.contender("ndtc", "8")
    assert (ptq4dm.near_float("frechet", -1)(Rows({"float": 5.0, eight: 5.5})).values < -0.05).all()
    assert (ptq4dm.near_float("accuracy", 1)(Rows({"float": 0.9, eight: 0.85})).values < -0.02).all()
    assert (ptq4dm.faster("float")(Rows({"float": 2.0, ptq4dm.INT8: 1.0})).values > 0).all()
    assert ptq4dm.smaller(0.3)(Rows({"float": 4.0, ptq4dm.INT8: 1.0})).values == pytest.approx([0.05] * 6)


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_studies_name_contenders_and_settings_that_exist(scale):
    studies = ptq4dm.studies(scale, 0)
    assert {claim.study for claim in ptq4dm.CLAIMS if scale in claim.scales} == set(studies)
    for study in studies.values():
        stacks = contenders.parse_list(list(study.contenders))
        assert study.seeds >= 5
        sizes = {p.knobs["size"] for stack in stacks for p in stack.parts if p.id == "ptq4dm"}
        assert len(sizes) == 1  # equal budgets


def test_a_study_runs_and_its_claims_are_judged(monkeypatch):
    monkeypatch.setattr(ptq4dm, "SIZE", 16)
    monkeypatch.setattr(ptq4dm, "STEPS", 5)
    study = ptq4dm.studies("quick", 0)["w8a8"]
    names = study.contenders[:3]
    comparison = compare(study.bench, study.subject, names, {"steps": 5, "samples": 8}, seeds=1)
    assert not comparison.failed, comparison.failed[0].error
    float_, ours, raw = (row.figures for row in comparison.rows)
    assert "call_error" not in float_
    assert 0 < ours["call_error"] < raw["call_error"] < 1
    mean = np.mean([ours[f"call_error_{i}"] ** 2 for i in range(5)])
    assert ours["call_error"] == pytest.approx(np.sqrt(mean))
    verdicts = {v.id: v for v in judge(ptq4dm.CLAIMS, {"w8a8": comparison}, "quick")}
    assert verdicts["w8-raw"].verdict == "not shown" and verdicts["w8-raw"].n == 1  # one fit decides nothing
    assert verdicts["w6-raw"].n == 0
