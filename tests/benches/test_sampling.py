"""The sampling bench: points, pixels and prompts, any sampler by its name, budgets in calls, failures named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steersman.benches.sampling import Sampling
from steersman.diffusion.asked import read_prompts
from steersman.engine.compare import compare
from steersman.engine.comparison import Comparison
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.report.blocks import ImageGrid, Note, Scatter
from steersman.report.summary import recipe

FACTORIES = """
import json
import torch
from diffusers import (AutoencoderKL, DDPMPipeline, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline,
                       UNet2DConditionModel, UNet2DModel)
from steersman.diffusion import ClassConditionalPipeline

def unet(labels=None):
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
                       norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=labels)

def unconditional():
    return DDPMPipeline(unet(), DDPMScheduler())

def classes():
    return ClassConditionalPipeline(unet(3), DDPMScheduler(clip_sample=False), null_label=2)

def broken():
    pipe = unconditional()
    def poison(module, arguments, output):
        x, t = arguments
        output.sample = output.sample if t > 500 else output.sample * float("nan")
    pipe.unet.register_forward_hook(poison)
    return pipe

def nothing():
    return object()

def intensity(images):
    return images.flatten(1)[:, :5].double()

def stable_diffusion():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    words = ["a", "cat", "dog", "photo", "of"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters]
    pieces += [w + "</w>" for w in words] + [c + "</w>" for c in letters[1:]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    with open("vocab.json", "w") as f:
        json.dump(vocab, f)
    with open("merges.txt", "w") as f:
        f.write("#version: 0.2\\n")
    tokenizer = CLIPTokenizer(vocab="vocab.json", merges="merges.txt", model_max_length=16)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=16, bos_token_id=0,
                                        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
                                        eos_token_id=1))
    vae = AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    net = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
                               block_out_channels=(8, 16), cross_attention_dim=16, attention_head_dim=4,
                               down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                               up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    return StableDiffusionPipeline(vae, text, tokenizer, net, PNDMScheduler(steps_offset=1, skip_prk_steps=True),
                                   None, None, requires_safety_checker=False)
"""


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FACTORIES)
    Path("prompts.txt").write_text("a photo of a cat\n\na dog\n")
    rng = np.random.default_rng(0)
    np.savez("real.npz", images=rng.random((40, 8, 8), dtype=np.float32), labels=rng.integers(0, 2, 40))
    return tmp_path


@pytest.fixture
def short_trajectories(monkeypatch) -> None:
    monkeypatch.setattr("steersman.benches.sampling.FINE_STEPS", 30)


def run(contenders, subject, **grid) -> Comparison:
    seeds = grid.pop("seeds", 1)
    return compare(Sampling(), subject, contenders, {"calls": [6], "samples": 8} | grid, seeds=seeds)


def statuses(comparison: Comparison) -> dict[str, str]:
    return {row.contender: row.status for row in comparison.rows}


# ------------------------------------------------------------------ budgets and pairing


def test_each_contender_takes_the_most_steps_that_fit_into_the_calls(world, short_trajectories):
    names = ["ddim", "heun", "rk4", "pndm", "pndm:variant=prk", "pndm:variant=f-pndm", "DPMSolverMultistepScheduler"]
    comparison = run(names, "gaussians", calls=[14, 12])
    used = {name: comparison.values("calls_used", name, calls=14) for name in names}
    assert {name: int(found[0]) for name, found in used.items()} == {
        "ddim": 14,  # 14 steps
        "heun": 13,  # 7 steps, the last of one call
        "rk4": 13,  # 4 steps, the last of one call
        "pndm": 14,  # 13 steps
        "pndm:variant=prk": 13,
        "pndm:variant=f-pndm": 14,  # 5 steps
        "DPMSolverMultistepScheduler": 14,
    }
    (row,) = comparison.select("pndm:variant=f-pndm", status="inapplicable", calls=12)
    assert row.error is not None
    assert "needs at least 13" in row.error


def test_a_sampler_of_diffusers_that_fails_is_said_to(world):
    found = run(["PNDMScheduler"], "gaussians", calls=[2])
    row = found.rows[0]
    assert row.status == "inapplicable"
    assert row.error.startswith("PNDMScheduler of diffusers fails with 2 steps (ValueError: ")


def test_all_start_from_the_same_noise_and_the_first_order_ones_agree(world, short_trajectories):
    comparison = run(["ddim", "euler", "ddim:eta=1"], "gaussians", calls=[6], seeds=2)
    for figure in ("trajectory_error", "wasserstein", "mode_weight_error"):
        ddim, euler = comparison.paired(figure, "ddim", "euler")
        np.testing.assert_allclose(ddim, euler, rtol=1e-4)
    ancestral = comparison.paired("trajectory_error", "ddim", "ddim:eta=1")
    assert (ancestral[1] > 2 * ancestral[0]).all()


def test_the_fine_trajectory_is_where_fine_steps_lead(monkeypatch):
    """At many calls every good sampler ends there; the error falls with the calls."""
    monkeypatch.setattr("steersman.benches.sampling.FINE_STEPS", 400)
    comparison = run(["ddim", "pndm"], "gaussians:ring", calls=[8, 25, 100], samples=32, spacing="trailing")
    for name, last in (("ddim", 0.02), ("pndm", 0.005)):
        errors = [comparison.values("trajectory_error", name, calls=n)[0] for n in (8, 25, 100)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < last


def test_real_stands_at_the_floor(world, short_trajectories):
    comparison = run(["ddim", "real"], "gaussians", samples=64, calls=[4])
    ddim, real = comparison.paired("sliced_wasserstein", "ddim", "real")
    assert real[0] < ddim[0]
    assert "calls_used" not in comparison.select("real")[0].figures


# ------------------------------------------------------------------ subjects


def test_points_make_a_scatter(world, short_trajectories):
    comparison = run(["ddim", "pndm"], "gaussians:ring-sharp")
    assert comparison.bench.headline == ("sliced_wasserstein", "calls")
    blocks = comparison.bench.exhibits(comparison)
    scatter = blocks[0]
    assert isinstance(scatter, Scatter)
    assert scatter.points["pndm"].shape == (8, 2)
    assert sum(isinstance(block, Note) for block in blocks) == 2


@pytest.mark.parametrize("subject", ["mine.py:unconditional", "mine.py:classes"])
def test_a_users_pipeline_without_data_follows_its_own_trajectory(world, short_trajectories, subject):
    comparison = run(["ddim", "pndm", "UniPCMultistepScheduler"], subject)
    assert set(statuses(comparison).values()) == {"ok"}
    assert comparison.bench.headline == ("trajectory_error", "calls")
    assert {"trajectory_error", "calls_used", "seconds_per_sample"} == set(comparison.rows[0].figures)
    grid = comparison.bench.exhibits(comparison)[0]
    assert isinstance(grid, ImageGrid)
    assert grid.images["pndm"].shape == (8, 8, 8, 1)
    assert Comparison.load(comparison.out).bench.headline == ("trajectory_error", "calls")


def test_a_saved_pipeline_with_data_and_a_judge(world):
    from steersman.engine.subjects import load_callable

    load_callable("mine.py:classes")().save_pretrained("pipe")
    comparison = run(["pndm", "real"], "pipe", data="real.npz", samples=16, guidance=2.0, trajectory=False)
    assert set(statuses(comparison).values()) == {"ok"}
    assert {"frechet", "kernel", "precision", "recall"} <= set(comparison.rows[0].figures)
    assert "trajectory_error" not in comparison.rows[0].figures
    judged = run(["pndm"], "pipe", data="real.npz", judge="mine.py:intensity", samples=16, trajectory=False)
    plain = run(["pndm"], "pipe", data="real.npz", samples=16, trajectory=False)
    assert judged.rows[0].figures["frechet"] != plain.rows[0].figures["frechet"]


def test_text_to_image(world, short_trajectories):
    comparison = run(["ddim", "pndm"], "mine.py:stable_diffusion", prompts="prompts.txt", samples=3, guidance=3.0)
    assert set(statuses(comparison).values()) == {"ok"}, [row.error for row in comparison.rows]
    assert comparison.rows[0].figures["trajectory_error"] > 0
    grid = comparison.bench.exhibits(comparison)[0]
    assert grid.images["pndm"].shape == (3, 16, 16, 3)


def test_digits_quick():
    comparison = run(["ddim:timestep_spacing=trailing"], "digits", calls=[4], samples=24)
    figures = comparison.rows[0].figures
    assert comparison.rows[0].status == "ok"
    assert comparison.bench.headline == ("frechet", "calls")
    assert figures["accuracy"] > 0.3
    assert "trajectory_error" not in figures


# ------------------------------------------------------------------ failures and bad input


def test_nan_names_the_call_and_the_contender_and_the_others_go_on(world, short_trajectories):
    comparison = run(["ddim", "real"], "mine.py:broken", data="real.npz", trajectory=False)
    (failed,) = comparison.failed
    assert failed.error is not None
    assert "NaN or infinity at call 3 of 6 (timestep 498), under ddim" in failed.error
    assert statuses(comparison)["real"] == "ok"


def test_the_pipeline_is_left_as_it_was(world, short_trajectories):
    bench = Sampling()
    subject = bench.subject("mine.py:unconditional")
    own = subject.pipe.scheduler
    compare_once(bench, subject, "pndm")
    assert subject.pipe.scheduler is own
    assert not subject.pipe.unet._forward_hooks


def compare_once(bench: Sampling, subject, name: str) -> dict[str, float]:
    from steersman.engine.compare import expand
    from steersman.engine.contenders import parse

    class Log:
        def progress(self, *_):
            pass

        images = arrays = progress

    (setting,), _ = expand(bench.knobs, {"calls": [3], "samples": 2})
    host = bench.host(subject, setting, Streams(0))
    for part in parse(name).parts:
        bench.mount(host, part)
    return bench.trial(host, setting, Streams(0), Log())


@pytest.mark.parametrize(
    ("contenders", "subject", "grid", "sentence"),
    [
        (["ddimm"], "gaussians", {}, "did you mean 'ddim'"),
        (["DPMScheduler"], "gaussians", {}, "DPMScheduler"),
        (["ddim+heun"], "gaussians", {}, "one sampler"),
        (["pndm+real"], "gaussians", {}, "real alone"),
        (["pndm:variant=x"], "gaussians", {}, "variant"),
        (["pndm:varient=plms"], "gaussians", {}, "did you mean 'variant'"),
        (["DPMSolverMultistepScheduler:algorithm_type=x"], "gaussians", {}, "settings that DPMSolver"),
        (["ddim"], "gaussians", {"calls": [0]}, "calls"),
        (["ddim"], "gaussians", {"calls": [1001]}, "calls"),
        (["ddim"], "gaussians", {"data": "real.npz"}, "data"),
        (["ddim"], "digits", {"labels": "3,10"}, "labels"),
        (["ddim"], "digits", {"labels": "three"}, "labels"),
        (["ddim"], "mine.py:unconditional", {"labels": "1"}, "labels"),
        (["ddim"], "gaussians", {"prompts": "prompts.txt"}, "prompts"),
        (["ddim"], "gaussians:square", {}, "subject"),
        (["ddim"], "digits", {"samples": 598}, "597"),
        (["ddim"], "mine.py:nothing", {}, "unet"),
        (["ddim"], "mine.py:unconditional", {"guidance": 2.0}, "guidance"),
        (["ddim"], "mine.py:unconditional", {"judge": "mine.py:intensity"}, "judge"),
        (["ddim"], "mine.py:unconditional", {"data": "nowhere.npz"}, "data"),
        (["ddim"], "mine.py:unconditional", {"spacing": "karras"}, "spacing"),
        (["ddim"], "docs", {}, "subject"),
        (["ddim"], "prompts.txt", {}, "subject"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(world, contenders, subject, grid, sentence):
    with pytest.raises(InputError, match=sentence):
        run(contenders, subject, **grid)


def test_prompts_that_cannot_be_read(world):
    for path in ("nowhere.txt", "empty.txt"):
        Path("empty.txt").write_text("\n \n")
        with pytest.raises(InputError, match="prompts"):
            read_prompts(path)
    with pytest.raises(InputError, match="prompts"):
        run(["ddim"], "mine.py:stable_diffusion")


def test_guided_points_are_judged_by_their_trajectory(world):
    run = compare(
        "sampling",
        "gaussians",
        ["ddim", "heun", "real"],
        {"calls": 20, "samples": 40, "guidance": 3.0},
        [0],
        world / "run",
    )
    ddim, heun, real = run.rows
    assert real.status == "inapplicable" and "not known" in str(real.error)
    assert set(ddim.figures) == {"trajectory_error", "calls_used", "seconds_per_sample"}
    assert 0 < heun.figures["trajectory_error"] < ddim.figures["trajectory_error"]


def test_a_sampler_for_another_kind_of_noise_is_inapplicable(world):
    run = compare(
        "sampling",
        "gaussians",
        ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"],
        {"calls": 5, "samples": 4},
        [0],
        world / "run",
    )
    for row in run.rows:
        assert row.status == "inapplicable" and "another kind of noise" in str(row.error)


def test_labels_that_are_asked_for(world):
    run = compare(
        "sampling", "digits", ["ddim", "real"], {"calls": 10, "samples": 40, "labels": "3,5"}, [0], world / "run"
    )
    ddim, real = run.rows
    assert ddim.figures["accuracy"] > 0.6 and real.figures["accuracy"] > 0.9
    assert real.figures["frechet"] < ddim.figures["frechet"]


def test_a_foreign_scheduler_has_its_code_line(world):
    run = compare(
        "sampling",
        "gaussians",
        ["EulerDiscreteScheduler:use_karras_sigmas=true"],
        {"calls": 5, "samples": 4},
        [0],
        world / "run",
    )
    (line,) = recipe(run, run.contenders[0]).lines
    call = "EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)"
    assert line == f"pipe.scheduler = diffusers.{call}"
    assert next(iter(run.rows[0].figures)) == "sliced_wasserstein"  # what counts, not what it cost


def test_a_method_that_makes_an_artefact_first(world):
    from steersman.engine.artefacts import run_verb

    settings = {"size": 200, "maps": "class", "tolerance": 0.3}
    run_verb("apply", "dpm-ot", "digits", "map", settings=settings, seed=0)
    stacked = ["map", "map:coupling=random+heun", "map:lookup_only=true"]
    made = ["dpm-ot:size=200:maps=class:tolerance=0.3:renoise=true+pndm"]
    run = compare("sampling", "digits", [*stacked, *made], {"calls": [6, 500], "samples": 32}, [0], world / "run")
    for row in run.rows:
        if row.setting["calls"] == 500 and "lookup" not in row.contender:
            assert row.status == "inapplicable" and "timestep" in str(row.error)  # the map is at 300
        else:
            assert row.status == "ok", row.error
            assert row.figures["calls_used"] == (
                0 if "lookup" in row.contender else 5 if "heun" in row.contender else 6
            )
    assert recipe(run, stacked[1]).lines[0].startswith("pipe = DPMOTPipeline(pipe, 'map', coupling='random')")
    assert len(list((world / "run").rglob("fit.json"))) == 1


@pytest.mark.parametrize(
    ("contender", "subject", "sentence"),
    [
        ("dpm-ot", "mine.py:unconditional", "steersman apply dpm-ot"),
        ("dpm-ot:sise=3", "digits", "did you mean 'size'"),
        ("ddim+dpm-ot", "digits", "first"),
    ],
)
def test_a_method_that_can_t_make_its_artefact_is_refused(world, contender, subject, sentence):
    with pytest.raises(InputError, match=sentence):
        compare("sampling", subject, [contender], {"calls": 5, "samples": 4}, [0], world / "run")


def test_scenes_bring_their_prompts_and_their_reader(world):
    grid = {"calls": 6, "samples": 24, "guidance": 3.0}
    run = compare("sampling", "scenes", ["dpm-solver-pp", "DDIMScheduler", "real"], grid, [0], world / "run")
    ours, theirs, real = run.rows
    assert [row.status for row in run.rows] == ["ok"] * 3, [row.error for row in run.rows]
    assert real.figures["accuracy"] >= 0.95
    for row in (ours, theirs):
        assert row.figures["attribute_accuracy"] > 0.5  # chance is 0.27
        assert row.figures["calls_used"] == 6


def test_prompts_for_scenes_follow_its_grammar(world):
    Path("own.txt").write_text("a large red circle\na blue square on the left\n")
    run = compare("sampling", "scenes", ["ddim"], {"calls": 3, "samples": 4, "prompts": "own.txt"}, [0], world / "run")
    assert run.rows[0].figures["accuracy"] >= 0
    Path("own.txt").write_text("a photograph of a cat\n")
    with pytest.raises(InputError, match="a large red circle"):
        compare("sampling", "scenes", ["ddim"], {"calls": 3, "samples": 4, "prompts": "own.txt"}, [0], world / "no")
