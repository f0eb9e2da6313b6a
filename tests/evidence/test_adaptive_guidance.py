"""Adaptive guidance's evidence: cuts of equal cost, calibrated contenders, and claims that ask what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steersman.engine import contenders
from steersman.engine.compare import compare
from steersman.evidence import adaptive_guidance as evidence


class Rows:
    """A comparison's answers, made up: figure -> contender -> value of seed 0 (more with the seed)."""

    def __init__(self, **figures):
        self.figures = figures

    def values(self, figure, contender, steps):
        return {seed: self.figures[figure][contender] * (1 + 0.01 * seed) for seed in range(5)}

    def paired(self, figure, a, b, steps):
        return tuple(np.array(list(self.values(figure, label, steps).values())) for label in (a, b))


def test_effects_are_in_the_claims_direction():
    names = {key: evidence.named(text) for key, text in evidence.contenders(3.0).items()}
    rows = Rows(
        psnr={names["adaptive"]: 30.0, names["fewer"]: 20.0},
        frechet={names["adaptive"]: 5.0, names["cfg"]: 10.0},
        calls_used={names["adaptive"]: 30.0, names["cfg"]: 40.0},
        guided_early={evidence.named(evidence.SEARCHED): 0.7},
    )
    assert (evidence.more("psnr", "adaptive", "fewer")(rows).values >= 10).all()
    assert evidence.frechet_kept(rows).values == pytest.approx([np.log(2)] * 5)
    assert evidence.saved(rows).values == pytest.approx([0.25] * 5)
    assert (evidence.of_policies("guided_early", evidence.SEARCHED)(rows).values >= 0.7).all()


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_studies_name_contenders_and_settings_that_exist(scale):
    studies = evidence.studies(scale, 0)
    assert {claim.study for claim in evidence.CLAIMS if scale in claim.scales} <= set(studies)
    assert len({claim.id for claim in evidence.CLAIMS}) == len(evidence.CLAIMS)
    for study in studies.values():
        labels = [stack.label for stack in contenders.parse_list(list(study.contenders))]
        assert len(set(labels)) == len(labels) and study.seeds >= 5


@pytest.mark.filterwarnings("ignore:.*were cut after the first step")
def test_cuts_of_equal_cost_and_recipes_run_in_the_bench(monkeypatch):
    monkeypatch.setitem(evidence.apply.__kwdefaults__, "count", 4)
    names = evidence.contenders(3.0)
    wanted = [names[key] for key in ("adaptive", "static", "shuffled")]
    wanted += ["adaptive-guidance:scale=3:mode=linear:steps=6:count=4", "policy:scale=3:guided=2:kind=random"]
    wanted.append("adaptive-guidance:scale=3:mode=search:steps=6:count=2:iterations=1")
    found = compare(evidence.CutsBench(), "digits", wanted, {"steps": [6], "samples": 7}, seeds=1)
    assert {row.status for row in found.rows} == {"ok"}, [row.error for row in found.rows]
    adaptive, static, shuffled, linear, policy, searched = (row.figures for row in found.rows)
    assert adaptive["calls_used"] == static["calls_used"] == shuffled["calls_used"] < 12
    assert static["likeness"] < 100 and -1 <= adaptive["threshold"] <= 1 and adaptive["min_steps"] >= 1
    assert linear["calls_used"] == pytest.approx(8) and policy["calls_used"] == 8
    assert searched["calls_used"] <= 9 and 0 <= searched["guided_early"] <= 1


def test_given_cuts_go_to_their_own_samples():
    from tests.diffusion.test_adaptive_guidance import classes, draw, noise

    pipe, counts = classes(), torch.tensor([3, 0, 5, 8])
    x, labels = noise(pipe, 4), [0, 1, 2, 0]
    guidance = evidence.Cuts(3.0, counts)
    with guidance.install(pipe):
        found = torch.cat([draw(pipe, x[i : i + 2], labels[i : i + 2]) for i in (0, 2)])
    for i, n in enumerate(counts.tolist()):
        with evidence.GuidancePolicy([3.0] * n + [1.0] * (8 - n)).install(pipe):
            torch.testing.assert_close(found[i : i + 1], draw(pipe, x[i : i + 1], labels[i]), rtol=1e-5, atol=1e-5)
