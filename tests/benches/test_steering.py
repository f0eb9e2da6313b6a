"""The steering bench: equal calls and shared samples, exact tilts, judges apart from rewards, a user's pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steersman.benches._steering_tasks import scenes_scorer, tilted
from steersman.benches.steering import Steering
from steersman.diffusion.fk_steering import FeynmanKac
from steersman.engine.compare import compare
from steersman.engine.comparison import Comparison
from steersman.errors import InputError
from steersman.reference import gaussians, scenes
from steersman.report.blocks import Curves, ImageGrid, Note, Scatter
from tests.benches.test_sampling import FACTORIES

MINE = (
    FACTORIES
    + """
def bright(images):
    return images.mean((1, 2, 3))

def right_label(images, labels):
    return images.mean((1, 2, 3)) + torch.tensor(labels)

def named(images, prompts):
    return torch.tensor([float(len(p)) for p in prompts]) + images.mean((1, 2, 3))

def contrast(images, asked):
    return images.flatten(1).std(1)

def nothing_finite(images):
    return images.mean((1, 2, 3)) * float("nan")

def upper(points):
    return points[:, 1]
"""
)


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    Path("prompts.txt").write_text("a photo of a cat\na dog\n")
    return tmp_path


def run(contenders, subject, bench=None, **grid) -> Comparison:
    seeds = grid.pop("seeds", 1)
    return compare(bench or Steering(), subject, contenders, {"calls": [6], "runs": 4, "particles": [3]} | grid, seeds)


ALL = ["base", "best-of-n", "importance", "fk-steering"]


# ------------------------------------------------------------------ exact checks


@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_the_tilted_mixture_is_the_mixture_tilted(reward):
    """log q(x) = log p(x) + λ r(x) - log Z at every x, with one Z."""
    law, scale = gaussians.mixture("gaussians:nested"), 2.5
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = x[:, 0] if reward == "linear" else -0.5 * (x - torch.tensor([1.0, 0.0])).square().sum(1)
    log_z = law.log_prob(x) + scale * r - tilted(law, reward, scale).log_prob(x)
    assert float(log_z.std()) < 1e-9
    draws, _ = law.sample(200_000, torch.Generator().manual_seed(1), torch.float64)
    values = draws[:, 0] if reward == "linear" else -0.5 * (draws - torch.tensor([1.0, 0.0])).square().sum(1)
    assert float((scale * values).exp().mean().log()) == pytest.approx(float(log_z[0]), abs=0.02)


def test_all_contenders_take_equally_many_calls_and_share_their_samples():
    bench = Steering()
    comparison = run([*ALL, "fk-steering:scale=0", "real"], "gaussians", bench, scale=2.0, runs=64)
    assert {row.status for row in comparison.rows} == {"ok"}
    values = {name: comparison.select(name)[0].figures for name in comparison.contenders}
    assert {values[name]["calls_used"] for name in [*ALL, "fk-steering:scale=0"]} == {18.0}
    assert [values[name]["reward_calls"] for name in ALL] == [3.0, 3.0, 3.0, 15.0]
    # Without a tilt steering is the base sampler, particle by particle.
    assert values["fk-steering:scale=0"]["reward"] == pytest.approx(values["base"]["reward"], abs=1e-6)
    assert values["base"]["ancestors"] == values["fk-steering:scale=0"]["ancestors"] == 1.0
    assert values["best-of-n"]["best_reward"] > values["base"]["reward"]
    # Those that choose at the end choose among the same.
    (plain,) = bench.shared.values()
    best = plain.rewards.max(1).values
    assert comparison.select("best-of-n")[0].per_item["best_reward"] == pytest.approx(best.tolist())
    assert "reward" not in values["best-of-n"] and "ancestors" not in values["best-of-n"]


def test_importance_sampling_is_what_its_weights_say():
    """The mean reward of the resampled particles is the weighted mean, on average."""
    bench = Steering()
    comparison = run(["importance"], "gaussians", bench, scale=2.0, runs=2000)
    (plain,) = bench.shared.values()
    wanted = (torch.softmax(2.0 * plain.rewards, 1) * plain.rewards).sum(1)
    found = torch.tensor(comparison.select("importance")[0].per_item["reward"], dtype=torch.float64)
    assert abs(float((found - wanted).mean())) < 4 * float((found - wanted).std()) / 2000**0.5
    assert FeynmanKac(3, "importance").floor == 0.0


def test_exact_samples_are_the_floor_and_steering_is_between_it_and_the_base():
    comparison = run(["base", "fk-steering", "real"], "gaussians", calls=[40], particles=[16], runs=256, scale=3.0)
    distance = {name: comparison.values("sliced_wasserstein", name)[0] for name in comparison.contenders}
    assert distance["real"] < distance["fk-steering"] < 0.3 * distance["base"]
    blocks = Steering().exhibits(comparison)
    assert isinstance(blocks[0], Scatter) and blocks[0].target is not None and isinstance(blocks[-1], Note)


# ------------------------------------------------------------------ subjects


def test_digits_are_judged_by_another_classifier():
    comparison = run(ALL, "digits", calls=[10], particles=[2, 4], labels="3,5", runs=6)
    assert {row.status for row in comparison.rows} == {"ok"}
    figures = comparison.select("fk-steering", particles=4)[0].figures
    assert figures["reward"] > comparison.select("base", particles=4)[0].figures["reward"] + 2
    assert set(comparison.select("fk-steering", particles=4)[0].per_item["best_accuracy"]) <= {0.0, 1.0}
    assert Steering().headline_for(comparison.rows) == ("best_accuracy", "calls_used")
    blocks = Steering().exhibits(comparison)
    assert [type(block) for block in blocks[:2]] == [ImageGrid, ImageGrid]
    assert any(isinstance(block, Curves) for block in blocks)


def test_scenes_are_scored_by_a_network_of_their_own():
    scorer = scenes_scorer(100)
    x = scenes.images("held-out")[:240]
    wanted = scenes.parse(scenes.captions("held-out")[:240])
    for logs, name in zip(scorer(x), ("position", "background"), strict=True):
        right = logs.argmax(1) == wanted[:, scenes.ATTRIBUTES.index(name)]
        assert float(right.float().mean()) > 0.6


def test_scenes(monkeypatch):
    trained = scenes_scorer(100)
    monkeypatch.setattr("steersman.benches._steering_tasks.scenes_scorer", lambda: trained)
    comparison = run(["best-of-n", "fk-steering"], "scenes", calls=[3], runs=2, particles=[2], guidance=1.0)
    assert {row.status for row in comparison.rows} == {"ok"}
    assert {"best_accuracy", "accuracy", "reward", "diversity"} <= set(comparison.select("fk-steering")[0].figures)


def test_a_user_s_pipelines(world):
    comparison = run(ALL, "mine.py:classes", reward="mine.py:right_label", judge="mine.py:contrast", labels="0,1")
    assert {row.status for row in comparison.rows} == {"ok"}
    assert "best_judge" in comparison.select("fk-steering")[0].figures
    items = comparison.select("fk-steering")[0].per_item["reward"]
    assert items[1] - items[0] > 0.5  # the second run's label is 1
    comparison = run(
        ["best-of-n", "fk-steering:potential=max+DDPMScheduler"],
        "mine.py:stable_diffusion",
        reward="mine.py:named",
        prompts="prompts.txt",
        guidance=2.0,
        runs=2,
    )
    assert {row.status for row in comparison.rows} == {"ok"}
    items = comparison.select("best-of-n")[0].per_item["best_reward"]
    assert items[0] - items[1] == pytest.approx(11, abs=1)
    Path("prompts.jsonl").write_text('{"prompt": "a dog", "tag": "one"}\n')
    given = {"reward": "mine.py:named", "prompts": "prompts.jsonl", "guidance": 2.0, "runs": 2}
    items = run(["base"], "mine.py:stable_diffusion", **given).rows[0].per_item["reward"]
    assert items == pytest.approx([5.5, 5.5], abs=0.5)
    Path("prompts.jsonl").write_text('["a dog"]')
    with pytest.raises(InputError, match="jsonl"):
        run(["base"], "mine.py:stable_diffusion", **given)
    comparison = run(["base", "fk-steering"], "gaussians", reward="mine.py:upper", scale=3.0)
    assert {row.status for row in comparison.rows} == {"ok"}
    assert "sliced_wasserstein" not in comparison.select("base")[0].figures


def test_samplers_and_guidance_below(world):
    names = [
        'fk-steering+dpm-solver-pp:algorithm_type="sde-dpmsolver++"',
        "fk-steering+EulerAncestralDiscreteScheduler",
        "fk-steering+DDIMScheduler",
        "best-of-n+ddim",
    ]
    comparison = run([*names, "fk-steering+ddim"], "mine.py:classes", reward="mine.py:bright")
    assert [comparison.select(name, status=None)[0].status for name in names] == ["ok"] * 4
    (row,) = comparison.select("fk-steering+ddim", status="failed")
    assert "draws noise" in str(row.error)


def test_a_reward_that_fails_fails_its_row(world):
    comparison = run(["fk-steering"], "mine.py:classes", reward="mine.py:nothing_finite")
    (row,) = comparison.rows
    assert row.status == "failed" and "particle 0 of prompt 0" in str(row.error)
    comparison = run(["fk-steering:on_error=skip"], "mine.py:classes", reward="mine.py:nothing_finite")
    assert comparison.rows[0].status == "failed" and "without a reward" in str(comparison.rows[0].error)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("contenders", "subject", "grid", "said"),
    [
        ("fk-steering", "mine.py:classes", {}, "reward=None"),
        ("fk-steering", "mine.py:classes", {"reward": "mine.py:brght"}, "did you mean 'bright'"),
        ("fk-steering", "mine.py:classes", {"reward": "ftp://x"}, r"file.py:name, or the http\(s\) address"),
        ("fk-steering", "mine.py:stable_diffusion", {"reward": "mine.py:bright"}, "one prompt a line"),
        ("fk-steering", "digits", {"prompts": "prompts.txt"}, "takes no prompts"),
        ("fk-steering", "digits", {"labels": "10"}, "numbers from 0 to 9"),
        ("fk-steering", "digits", {"guidance": 3.0}, "guidance=3.0"),
        ("fk-steering", "gaussians", {"judge": "mine.py:bright"}, "judge"),
        ("fk-steering", "gaussians", {"labels": "1"}, "labels"),
        ("fk-steering:particles=3", "digits", {}, "the bench sets it"),
        ("fk-steering:potential=maximum", "digits", {}, "did you mean 'max'"),
        ("fk-steering:lam=3", "digits", {}, "knob of fk-steering"),
        ("importance:resampler=some", "digits", {}, "resampler='some'"),
        ("fk-steering+base", "digits", {}, "one way of steering"),
        ("real", "digits", {}, "real is for gaussians"),
        ("fk-steering", "scenes", {"prompts": "prompts.txt"}, "captions"),
        ("fk-steering", "digits", {"particles": [1]}, "particles"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(world, contenders, subject, grid, said):
    with pytest.raises(InputError, match=said):
        run([contenders], subject, **grid)


def test_a_sampler_alone_is_the_base_with_it(world):
    comparison = run(["ddim:eta=1", "base"], "mine.py:classes", reward="mine.py:bright")
    one, other = (comparison.select(name)[0] for name in comparison.contenders)
    assert one.figures["reward"] == other.figures["reward"]
