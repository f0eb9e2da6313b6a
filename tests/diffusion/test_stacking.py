"""The documented recipe: a quantised network under CFG++, DPM-Solver++ and FK steering, saved and loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from steersman.diffusion import CFGPlusPlus, ClassConditionalPipeline, FKSteering, installed, load_steered
from steersman.errors import InputError
from steersman.reference import digits

SCRIPT = Path(__file__).parents[2] / "docs" / "stack.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("stack", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("stack") / "saved"
    return folder, *module.stacked(folder, steps=6, size=32)


def ink(images):
    return images.flatten(1).mean(1)


def test_the_stack_comes_back_as_it_was(recipe):
    folder, images, more, _ = recipe
    assert torch.equal(images, more)
    names = [type(method).__name__ for method in installed(load_steered(folder, FKSteering={"reward": ink}))]
    assert names == ["CFGPlusPlus", "PTQ4DM", "FKSteering"]


def test_each_layer_of_it_acts(recipe):
    folder, images, _, report = recipe
    torch.testing.assert_close(report.rewards.float(), ink(images).float(), rtol=1e-4, atol=1e-5)
    assert set(report.prompts.tolist()) == {0, 1}

    def run(pipe):
        pipe.set_progress_bar_config(disable=True)
        arguments = {"labels": [3] * 4 + [5] * 4, "num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "pt"}
        return pipe(**arguments, generator=torch.Generator().manual_seed(1)).images

    pipe = load_steered(folder, FKSteering={"reward": ink})
    seen = [images]
    for method in reversed(installed(pipe)):  # the steering, the quantisation, the guidance
        method.uninstall()
        seen.append(run(pipe) if installed(pipe) else images)
    # Without steering other particles go on, and without quantisation the network is another.
    assert not torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])
    # Four particles that were never resampled are less inky in the mean.
    assert ink(images).mean() > ink(seen[1]).mean()
    # What is left is the plain pipeline, whose sampler needs its guidance.
    with pytest.raises(InputError):
        run(pipe)


def test_the_plain_pipeline_is_stock(recipe):
    folder = recipe[0]
    plain = ClassConditionalPipeline.from_pretrained(str(folder))
    own = digits.pipeline()
    assert installed(plain) == ()
    for (name, a), (_, b) in zip(plain.unet.named_parameters(), own.unet.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_cannot_go_together_is_refused():
    pipe = digits.pipeline()
    with CFGPlusPlus(0.5).install(pipe), pytest.raises(InputError, match="only one on the pipeline"):
        CFGPlusPlus(0.6).install(pipe)
    pipe.set_progress_bar_config(disable=True)
    with FKSteering(ink, particles=2).install(pipe), pytest.raises(InputError):
        pipe(labels=[1, 1], num_inference_steps=3)  # DDIM of eta 0 has no noise to choose from
