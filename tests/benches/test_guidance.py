"""The guidance bench: strengths, calls that were evaluated, likeness to plain guidance, a user's own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steersman.benches.guidance import GuidanceBench, guider_of_diffusers, psnr, saturation
from steersman.engine.compare import compare
from steersman.engine.comparison import Comparison
from steersman.errors import InputError
from steersman.report.blocks import Curves, ImageGrid
from steersman.report.summary import recipe
from tests.benches.test_sampling import FACTORIES


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        FACTORIES + "\ndef mean(images, asked):\n    return images.flatten(1).mean(1)\n"
        "\ndef distilled():\n    pipe = stable_diffusion()\n    pipe.unet.register_to_config(time_cond_proj_dim=8)\n"
        "    return pipe\n"
        "\ndef bad(images, asked):\n    return images.flatten(1).mean(1)[1:]\n"
    )
    Path("prompts.txt").write_text("a photo of a cat\n\na dog\n")
    return tmp_path


def run(contenders, subject="digits", **grid) -> Comparison:
    seeds = grid.pop("seeds", 1)
    return compare(GuidanceBench(), subject, contenders, {"steps": [6], "samples": 16} | grid, seeds=seeds)


# ------------------------------------------------------------------ what is measured


def test_calls_are_rows_that_were_evaluated():
    names = [
        "none",
        "cfg",
        "cfg:steps=3",
        "heun+cfg:scale=2",
        "ClassifierFreeGuidance:guidance_scale=3:stop=0.5",
        "real",
    ]
    found = run(names)
    assert {row.status for row in found.rows} == {"ok"}
    used = {row.contender: row.figures.get("calls_used") for row in found.rows}
    assert used == {names[0]: 6, names[1]: 12, names[2]: 6, names[3]: 10, names[4]: 9, "real": None}


def test_plain_guidance_is_like_itself_to_the_bit():
    found = run(["cfg:scale=3", "ClassifierFreeGuidance:guidance_scale=3", "cfg:scale=3:steps=3", "none"], guidance=3)
    like = {row.contender: row.figures["psnr"] for row in found.rows}
    assert like["cfg:scale=3"] == like["ClassifierFreeGuidance:guidance_scale=3"] == 100
    assert like["none"] < 40 and like["cfg:scale=3:steps=3"] < 40
    assert len(found.rows[0].per_item["psnr"]) == 16


def test_strength_harms_and_is_drawn_as_a_line():
    found = run(["none", "cfg:scale=2", "cfg:scale=8"], fidelity=False)
    over = {row.contender: row.figures["overshoot"] for row in found.rows}
    assert over["none"] < over["cfg:scale=8"] and "psnr" not in found.rows[0].figures
    blocks = GuidanceBench().exhibits(found)
    curves = [block for block in blocks if isinstance(block, Curves)]
    assert {block.y_label for block in curves} == {"frechet", "accuracy", "overshoot"}
    assert list(curves[0].lines["cfg"].x) == [2.0, 8.0] and "none" not in curves[0].lines
    assert any(isinstance(block, ImageGrid) for block in blocks)


def test_measures_of_images():
    white = torch.ones(2, 3, 4, 4)
    red = torch.stack([torch.ones(4, 4), -torch.ones(4, 4), -torch.ones(4, 4)])[None]
    assert saturation(white) == 0 and saturation(red) == 1
    assert saturation(-0.5 * torch.ones(1, 1, 4, 4)) == 0.5
    assert psnr(white, white).tolist() == [100, 100]
    assert psnr(white, 0.8 * white).tolist() == pytest.approx([20, 20])


# ------------------------------------------------------------------ subjects


def test_a_users_pipelines(world):
    found = run(["none", "cfg:scale=2"], "mine.py:classes", score="mine.py:mean")
    assert {row.status for row in found.rows} == {"ok"} and "score" in found.rows[0].figures
    found = run(["none", "cfg:scale=2"], "mine.py:stable_diffusion", prompts="prompts.txt", samples=4)
    assert {row.status for row in found.rows} == {"ok"}
    found = run(["none"], "mine.py:classes", score="mine.py:bad")
    assert found.rows[0].status == "failed" and "16 finite numbers" in str(found.rows[0].error)


def test_scenes_bring_prompts():
    found = run(["cfg:scale=3"], "scenes", samples=4, steps=[3])
    assert found.rows[0].figures["calls_used"] == 6 and "attribute_accuracy" in found.rows[0].figures


def test_code_lines():
    found = run(["cfg:scale=2", "ClassifierFreeGuidance:guidance_scale=3"], seeds=1, fidelity=False)
    lines = [recipe(found, label) for label in found.contenders]
    assert "guidance_scale=2" in str(lines[0])
    assert "StockGuidance(diffusers.ClassifierFreeGuidance(guidance_scale=3)).install(pipe)" in str(lines[1])


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("contenders", "grid", "message"),
    [
        (["cfg+cfg:scale=2"], {}, "one guidance"),
        (["cfg+ClassifierFreeGuidance"], {}, "one guidance"),
        (["cfg:scale=0.5"], {}, "scale=0.5"),
        (["cfg:steps=0"], {}, "steps=0"),
        (["ClassifierFreeGuidance:start=2"], {}, "settings that ClassifierFreeGuidance takes"),
        (["ClassifierFreeGuidance:strength=2"], {}, "strength"),
        (["SkipLayerGuidance"], {}, "SkipLayerGuidance"),
        (["none"], {"guidance": 1}, "guidance"),
        (["none"], {"score": "nowhere.py:f"}, "score"),
        (["none"], {"subject": "gaussians"}, "images with labels or prompts"),
    ],
)
def test_bad_input_is_one_sentence(contenders, grid, message):
    subject = grid.pop("subject", "digits")
    with pytest.raises(InputError, match=message):
        run(contenders, subject, **grid)


def test_unconditional_pipelines_are_refused(world):
    with pytest.raises(InputError, match=r"subject='mine.py:unconditional' .* nothing to guide"):
        run(["cfg"], "mine.py:unconditional")


@pytest.mark.parametrize("methods", [["none", "cfg"], ["ClassifierFreeGuidance"]])
def test_pipelines_with_distilled_guidance_are_refused(world, methods):
    with pytest.raises(InputError, match=r"subject='mine.py:distilled' .* guidance is distilled"):
        run(methods, "mine.py:distilled", prompts="prompts.txt")


def test_a_factory_that_fails_is_said(world):
    Path("failing.py").write_text("def pipe():\n    raise RuntimeError('no weights\\nhere')\n")
    with pytest.raises(InputError, match=r"subject='failing.py:pipe' .* \(RuntimeError: no weights here\)"):
        run(["cfg"], "failing.py:pipe")


def test_only_guiders_of_two_branches_are_accepted():
    assert guider_of_diffusers("AdaptiveProjectedGuidance") is not None
    assert guider_of_diffusers("AutoGuidance") is None  # its second output is of a network without some layers
    assert guider_of_diffusers("SkipLayerGuidance") is None and guider_of_diffusers("Guidance") is None
