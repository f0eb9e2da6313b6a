"""PFGM++'s evidence: its studies can run, and its claims ask what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steersman.diffusion.classical import Heun
from steersman.diffusion.pfgm_pp import PFGMPPKernel, ideal_denoiser
from steersman.diffusion.solver import VE, integrate
from steersman.engine import contenders
from steersman.engine.claims import judge
from steersman.engine.compare import compare
from steersman.engine.streams import Streams
from steersman.evidence import pfgm_pp
from steersman.math.transport import sliced_wasserstein
from tests.diffusion.test_pfgm_pp import karras


class Rows:
    """A comparison's answers, made up: contender -> error -> value of seed 0 (more with the seed)."""

    def __init__(self, figures):
        self.figures = figures

    def values(self, figure, contender, error, **setting):
        return {seed: self.figures[contender][error] + 0.01 * seed for seed in range(6)}

    def paired(self, figure, a, b, **setting):
        return tuple(np.array(list(self.values(figure, name, **setting).values())) for name in (a, b))


def test_effects_are_in_the_claims_direction():
    rows = Rows({"edm": {0.0: 0.1, 0.4: 0.3}, pfgm_pp.SOME: {0.0: 0.12, 0.4: 0.22}})
    effects = pfgm_pp.less_rise("x", pfgm_pp.SOME, {"error": 0.0}, {"error": 0.4})(rows)
    assert effects.values == pytest.approx([0.1] * 6)
    effects = pfgm_pp.less_rise("x", pfgm_pp.SOME, {"error": 0.0}, {"error": 0.4}, share=0.5)(rows)
    assert effects.values == pytest.approx([0.0] * 6)
    assert (pfgm_pp.not_above("x", pfgm_pp.SOME, {"error": 0.0})(rows).values < 0).all()
    assert (pfgm_pp.not_above("x", pfgm_pp.SOME, {"error": 0.4})(rows).values > 0).all()


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_studies_name_contenders_and_settings_that_exist(scale):
    studies = pfgm_pp.studies(scale, 0)
    assert {claim.study for claim in pfgm_pp.CLAIMS} <= set(studies)
    for study in studies.values():
        assert all(stack.parts for stack in contenders.parse_list(list(study.contenders)))
        assert study.seeds >= 5


def test_a_study_runs_and_its_claims_are_judged():
    study = pfgm_pp.studies("quick", 0)["plane-noise"]
    comparison = compare(study.bench, study.subject, study.contenders, {**study.grid, "samples": 300}, seeds=5)
    assert not comparison.failed, comparison.failed[0].error
    verdicts = {v.id: v for v in judge(pfgm_pp.CLAIMS, {"plane-noise": comparison}, "quick")}
    assert verdicts["plane-noise"].n == 5
    assert verdicts["digits-bits"].verdict == "not shown"
    # The probe of the whole run, without errors, is one run of the sampler from the same prior.
    rng, data = Streams(0), pfgm_pp.IdealDenoiser().subject(pfgm_pp.PLANE)
    prior = PFGMPPKernel(4).noise(torch.empty(300, 2, dtype=torch.float64), rng.torch("prior"))
    x = integrate(Heun(VE()), ideal_denoiser(data, 4), 80 * prior, [*karras(17)[:-1], 0.002, 0.0]).x
    found = comparison.values("sliced_wasserstein", "pfgm-pp:D=4", error=0.0)[0]
    assert found == pytest.approx(sliced_wasserstein(x, data, 1.0).item(), rel=1e-6)


def test_a_relative_error_is_relative_to_the_denoisers_norm():
    bench = pfgm_pp.IdealDenoiser()
    c = compare(bench, "digits", ("edm", "pfgm-pp:D=64"), {"relative": [0.0, 0.01, 0.3], "samples": 60}, seeds=1)
    for name in c.contenders:
        a, b, d = (c.values("sliced_wasserstein", name, relative=r)[0] for r in (0.0, 0.01, 0.3))
        assert abs(a - b) < 0.01 < d - a
