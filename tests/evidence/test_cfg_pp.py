"""CFG++'s evidence: its studies can run, its claims ask what they say, and its tasks do what they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steersman.engine import contenders
from steersman.engine.claims import judge
from steersman.engine.compare import compare
from steersman.engine.streams import Streams
from steersman.evidence import cfg_pp
from steersman.reference import scenes


class Rows:
    """A comparison's answers, made up: figure -> contender -> value of seed 0 (more with the seed)."""

    def __init__(self, **figures):
        self.figures = figures
        self.contenders = list(next(iter(figures.values())))

    def values(self, figure, contender, steps):
        return {seed: self.figures[figure][contender] * (1 + 0.01 * seed) for seed in range(5)}

    def paired(self, figure, a, b, steps):
        return tuple(np.array(list(self.values(figure, label, steps).values())) for label in (a, b))


def test_effects_are_in_the_claims_direction():
    rows = Rows(psnr={"a": 30.0, "b": 20.0}, frechet={"a": 5.0, "b": 10.0})
    assert (cfg_pp.more("psnr", "a", "b", 50)(rows).values >= 10.0).all()
    assert (cfg_pp.less("frechet", "a", "b", 50)(rows).values >= 5.0).all()
    assert cfg_pp.smaller("frechet", "a", "b", 50)(rows).values == pytest.approx([np.log(2)] * 5)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.7, 6.0), (0.85, 9.0), (0.95, 9.0)])
def test_the_frontier_is_the_best_of_those_that_are_as_accurate(accuracy, expected):
    rows = Rows(
        accuracy={cfg_pp.SIX: accuracy, "none": 0.7, "cfg:scale=3": 0.9, "cfg:scale=7.5": 0.9},
        frechet={cfg_pp.SIX: 5.0, "none": 6.0, "cfg:scale=3": 9.0, "cfg:scale=7.5": 12.0},
    )
    assert cfg_pp.frontier(cfg_pp.SIX, 20)(rows).values == pytest.approx([np.log(expected / 5)] * 5)


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_studies_name_contenders_and_settings_that_exist(scale):
    studies = cfg_pp.studies(scale, 0)
    assert {claim.study for claim in cfg_pp.CLAIMS if scale in claim.scales} <= set(studies)
    for study in studies.values():
        labels = [stack.label for stack in contenders.parse_list(list(study.contenders))]
        assert len(set(labels)) == len(labels) and study.seeds >= 5


def test_inversions_are_compared_and_judged():
    study = cfg_pp.studies("quick", 0)["inversion-10"]
    names = (cfg_pp.SIX, cfg_pp.SEVEN)
    comparison = compare(study.bench, study.subject, names, {"steps": [10], "samples": 2}, seeds=5)
    verdicts = {v.id: v for v in judge(cfg_pp.CLAIMS, {"inversion-10": comparison}, "quick")}
    assert verdicts["inversion-pair-10"].verdict == "holds"
    assert "missing" in verdicts["frontier"].reason
    assert {row.figures["calls_used"] for row in comparison.rows} == {40.0}


@pytest.mark.parametrize("task", ["edit", "inpainting", "super-resolution"])
def test_the_other_tasks_run(task):
    bench = cfg_pp.RealImages()
    grid = {"steps": [5], "samples": 4, "task": task}
    comparison = compare(bench, "digits", (cfg_pp.SIX, "cfg:scale=3", "npi"), grid, seeds=1)
    status = {row.contender: row.status for row in comparison.rows}
    assert status[cfg_pp.SIX] == status["cfg:scale=3"] == "ok"
    assert status["npi"] == ("ok" if task == "edit" else "inapplicable")


def test_targets_differ_in_the_class_or_in_one_word():
    labels = torch.arange(10).repeat(20)
    assert bool((cfg_pp.other(labels, Streams(0)) != labels).all())
    captions = scenes.captions("held-out")[:40]
    before, after = scenes.parse(captions), scenes.parse(cfg_pp.other(captions, Streams(0)))
    changed = before != after
    assert bool(changed[:, 1].all()) and not bool(changed[:, [0, 2, 3, 4]].any())
    assert bool((after[:, 1] != after[:, 4]).all())


def test_the_background_is_judged_where_there_is_background():
    images = scenes.images("held-out")[:2]
    shape = images.clone()
    frame = images[:, :, :1, :1]
    middle = (images - frame).abs().amax(1, keepdim=True) > 0.6
    shape = torch.where(middle, -images, images)
    assert bool((cfg_pp._background(shape, images) > 90).all())
    assert float(cfg_pp._background(images + 0.2, images).mean()) == pytest.approx(10 * np.log10(4 / 0.04), abs=0.01)
