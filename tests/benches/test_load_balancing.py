"""The load-balancing bench on a small fabric: figures, pairing, refusals, exhibits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from steersman import catalog
from steersman.benches.load_balancing import COLLECTIVES, LoadBalancing
from steersman.engine.compare import compare
from steersman.engine.contenders import Part
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.evidence import packet_spraying as evidence
from steersman.report.blocks import LoadMap, Note

SMALL = "leaf-spine:leaves=4,spines=4,hosts=4"
PLANS = ["packet-spraying", "packet-spraying:policy=plan-cut", "packet-spraying:policy=plan-equal:bundle=leaf"]


def run(contenders, subject=SMALL, seeds=2, **grid):
    comparison = compare("load-balancing", subject, contenders, grid, seeds=seeds)
    assert not comparison.failed, [row.error for row in comparison.failed]
    return comparison


@pytest.fixture(scope="module")
def small():
    return run(["ecmp", "ecmp-k:k=4", "single", "spray", *PLANS], collective=list(COLLECTIVES), fair=True)


def test_plans_are_as_good_as_spraying_and_nothing_is_better(small):
    for row in small.select():
        if row.setting["collective"] == "moe":
            continue  # unequal flows: spraying is no lower bound of a single link's rounding
        assert row.figures["bound_ratio"] >= 1 - 1e-9
        assert row.figures["bound_ms"] >= row.figures["host_bound_ms"]
        if row.contender in (*PLANS, "spray"):
            assert row.figures["bound_ratio"] == pytest.approx(1), row
        if row.contender == "spray":
            assert row.figures["fair_ratio"] == row.figures["congestion"] == 1


def test_equal_pieces_of_unequal_flows_are_inapplicable(small):
    rows = small.select("packet-spraying:policy=plan-equal:bundle=leaf", status=None, collective="moe")
    assert {row.status for row in rows} == {"inapplicable"} and "differ in size" in (rows[0].error or "")
    assert all(r.status == "ok" for r in small.select("packet-spraying:policy=plan-cut", status=None))


def test_hashing_is_worse_and_depends_on_the_seed(small):
    values = small.values("congestion", "ecmp", collective="all-to-all-permutation")
    assert all(v > 1.2 for v in values.values()) and len(set(values.values())) == 2
    assert len(set(small.values("congestion", "single", collective="all-to-all-permutation").values())) == 1
    fewer = small.values("congestion", "ecmp-k:k=4", collective="all-to-all-permutation")
    assert np.mean(list(fewer.values())) < np.mean(list(values.values()))
    assert small.select("ecmp-k:k=4")[0].figures["pieces"] == 4


def test_steps_and_links_are_kept(small):
    (row, *_) = small.select("ecmp", collective="all-to-all-permutation")
    with np.load(row.items_dir(small.out) / "links.npz") as links:
        assert links["steps"].shape == (15,) and links["up"].shape == links["down"].shape == (4, 4)
        assert links["steps"].mean() == pytest.approx(row.figures["step_congestion"])
        # The step that is shown is the one where hashing is furthest from spraying.
        assert max(links["up"].max(), links["down"].max()) == pytest.approx(links["steps"].max())


def test_exhibits_are_load_maps(small):
    blocks = small.bench.exhibits(small)
    maps = [block for block in blocks if isinstance(block, LoadMap)]
    assert len(maps) == len(COLLECTIVES) and set(maps[0].up) <= set(small.contenders)
    assert isinstance(blocks[-1], Note) and "flow model" in blocks[-1].text


def test_failed_links_are_drawn_by_seed_and_shared_by_contenders():
    comparison = run(["ecmp", "spray", "packet-spraying:policy=plan-cut"], failed_links=[0, 2], seeds=3)
    dead = {}
    for row in comparison.select(failed_links=2):
        with np.load(row.items_dir(comparison.out) / "links.npz") as links:
            dead.setdefault(row.seed, set()).add(np.isnan(links["up"]).tobytes())
            assert np.isnan(links["up"]).sum() == 2
    assert all(len(patterns) == 1 for patterns in dead.values()) and len(set.union(*dead.values())) > 1
    for row in comparison.select("packet-spraying:policy=plan-cut"):
        assert row.figures["congestion"] == pytest.approx(1, abs=1e-4)


def test_oversubscription_scales_the_uplinks():
    comparison = run(["spray"], oversubscription=[1.0, 4.0], collective="halving-doubling", seeds=1)
    one, four = (comparison.select("spray", oversubscription=o)[0].figures for o in (1.0, 4.0))
    assert four["bound_ms"] > 2 * one["bound_ms"] and four["host_bound_ms"] == one["host_bound_ms"]


def test_unequal_flows_and_placements_are_paired():
    comparison = run(["spray", "packet-spraying:policy=plan-cut"], unequal=0.5, placement="random", seeds=2)
    spray, cut = comparison.paired("bound_ms", "spray", "packet-spraying:policy=plan-cut")
    np.testing.assert_allclose(cut, spray, rtol=1e-4)
    assert spray[0] != spray[1]


def test_a_job_file_takes_the_place_of_the_collective(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("collectives: [{op: all_to_all, bytes: 1MB}, {op: ring, bytes: 1MB}]")
    comparison = run(["ecmp", "packet-spraying"], job=str(path), seeds=1)
    row = comparison.select("ecmp")[0]
    with np.load(row.items_dir(comparison.out) / "links.npz") as links:
        assert links["steps"].size == 2


@pytest.mark.parametrize(
    ("contenders", "subject", "grid", "words"),
    [
        (["ecmp+spray"], SMALL, {}, "one policy for all flows"),
        (["ecmp-k:k=0"], SMALL, {}, "k=0"),
        (["ecmp:k=2"], SMALL, {}, "knob of ecmp='k'"),
        (["packet-spraying:policy=plan-lasy"], SMALL, {}, "did you mean 'plan-lazy'"),
        (["spray"], "leaf-spine:leaves=4,spines=0", {}, "spines=0"),
        (["spray"], SMALL, {"size": "many"}, "bytes='many'"),
        (["spray"], SMALL, {"ranks": 17}, "from 2 to the number of hosts (16)"),
        (["spray"], SMALL, {"ranks": 6}, "a power of two"),
        (["spray"], SMALL, {"failed_links": 16}, "fewer than the fabric's 16 working links"),
        (["spray"], SMALL, {"collective": "rings"}, "one of ring"),
        (["spray"], SMALL, {"oversubscription": 0.0}, "a number of at least 0.1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_runs(contenders, subject, grid, words, tmp_path):
    with pytest.raises(InputError) as caught:
        compare("load-balancing", subject, contenders, grid, seeds=1, out=tmp_path / "run")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_method_that_chooses_no_paths_is_refused(monkeypatch):
    bench = LoadBalancing()
    setting = {name: knob.default for name, knob in bench.knobs.items()} | {"collective": "ring"}
    host = bench.host(bench.subject(SMALL), setting, Streams(0))
    monkeypatch.setattr(catalog, "card", lambda name: SimpleNamespace(load=lambda: lambda: object()))
    with pytest.raises(InputError, match=r"a method with assign\(fabric, step, seed\)"):
        bench.mount(host, Part("pndm", {}))


def test_claims_are_judged_on_their_studies():
    studies = evidence.studies("full", 0)
    for claim in evidence.CLAIMS:
        assert claim.study in studies or claim.study in evidence.studies("quick", 0)
        assert math.isfinite(claim.margin)
    quick = {claim.study for claim in evidence.CLAIMS if "quick" in claim.scales}
    assert quick <= set(evidence.studies("quick", 0))
    for study in studies.values():
        bench = LoadBalancing()
        assert set(study.grid) <= set(bench.knobs)
