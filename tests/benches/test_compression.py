"""The compression bench: costs that are counted, drift from the original network, contenders of all kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steersman import catalog
from steersman.benches.compression import Compression, footprint
from steersman.diffusion.ptq4dm import kernels
from steersman.engine import subjects
from steersman.engine.artefacts import run_verb
from steersman.engine.compare import compare
from steersman.errors import InputError
from steersman.reference import digits
from steersman.report.blocks import Curves, ImageGrid, Note, TableBlock
from steersman.report.summary import picks
from tests.benches.test_sampling import FACTORIES

integer = pytest.mark.skipif(not kernels(), reason="this machine's processor has no exact int8 kernels")


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FACTORIES)
    Path("prompts.txt").write_text("a photo of a cat\n\na dog\n")
    rng = np.random.default_rng(0)
    np.savez("real.npz", images=rng.random((40, 8, 8), dtype=np.float32), labels=rng.integers(0, 2, 40))
    return tmp_path


def run(contenders, subject="mine.py:classes", **grid):
    seeds = grid.pop("seeds", 1)
    return compare(Compression(), subject, contenders, {"steps": [3], "samples": 6} | grid, seeds=seeds)


def products(net: nn.Module, call) -> int:
    """Multiply-adds of a call, by hand: of layers, and of attention's two products."""
    count = 0

    def conv(module, inputs, output):
        nonlocal count
        count += output.numel() * module.in_channels // module.groups * module.kernel_size[0] ** 2

    def linear(module, inputs, output):
        nonlocal count
        count += output.numel() * module.in_features

    def attention(module, inputs, output):
        nonlocal count
        x = inputs[0]
        count += 2 * x.shape[0] * x.shape[1] * (x.shape[2] * x.shape[3]) ** 2

    hooks = []
    for module in net.modules():
        kind = {"Conv2d": conv, "Linear": linear, "Attention": attention}.get(type(module).__name__)
        if kind is not None:
            hooks.append(module.register_forward_hook(kind))
    call()
    for hook in hooks:
        hook.remove()
    return count


def test_costs_and_drift_of_the_baselines(world):
    c = run(["float", "half", "dynamic", "half+heun"], steps=[4])
    assert not c.failed, [r.error for r in c.failed]
    rows = {r.contender: r.figures for r in c.rows}
    pipe = Compression().subject("mine.py:classes").pipe
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        each = products(pipe.unet, lambda: pipe.unet(x, 10, class_labels=torch.tensor([0, 1]))) / 2
    for label in ("float", "half", "dynamic"):
        assert rows[label]["multiply_adds"] == pytest.approx(4 * each / 1e9)
    assert rows["half+heun"]["multiply_adds"] == pytest.approx(3 * each / 1e9)  # two steps, the last one of one call
    size = sum(p.numel() for p in pipe.unet.parameters())
    linear = sum(m.weight.numel() for m in pipe.unet.modules() if isinstance(m, nn.Linear))
    assert rows["float"]["megabytes"] == pytest.approx(4 * size / 1e6)
    assert rows["half"]["megabytes"] == pytest.approx(2 * size / 1e6)
    assert rows["dynamic"]["megabytes"] == pytest.approx((4 * size - 3 * linear) / 1e6, rel=0.01)
    assert rows["float"]["drift"] == 0 and "psnr" not in rows["float"]
    assert 0 < rows["dynamic"]["drift"] < 0.1 and 0 < rows["half"]["drift"] < 0.1
    # The other sampler's images are compared with the original's under that sampler.
    assert rows["half+heun"]["drift"] < 0.1
    assert footprint(pipe) == 4 * size  # contenders left the subject as it was


@integer
def test_quantised_contenders_on_digits(world):
    made = run_verb("apply", "ptq4dm", "digits", "made", settings={"size": 16, "steps": 4}, seed=0)
    contenders = ["made", "made:execution=int8", "made+dpm-solver-pp", "ptq4dm:bits=4:size=16:steps=4", "float", "real"]
    c = run(contenders, "digits", samples=16, steps=[4])
    assert [r.status for r in c.rows] == ["ok"] * 6, [r.error for r in c.rows]
    rows = {r.contender: r.figures for r in c.rows}
    simulated, integers = rows["made"], rows["made:execution=int8"]
    assert simulated["megabytes"] == integers["megabytes"] == pytest.approx(made["metrics"]["megabytes"])
    assert simulated["megabytes"] < 0.3 * rows["float"]["megabytes"]
    assert simulated["multiply_adds"] == pytest.approx(integers["multiply_adds"]) == rows["float"]["multiply_adds"]
    assert 0 < simulated["drift"] < 0.1 < rows["ptq4dm:bits=4:size=16:steps=4"]["drift"]
    assert 0 < integers["drift"] < 0.1
    assert "drift" not in rows["real"] and "megabytes" not in rows["real"]
    assert rows["float"]["accuracy"] > 0.8
    blocks = c.bench.exhibits(c)
    assert {ImageGrid, TableBlock, Curves, Note} == set(map(type, blocks))
    table = next(b for b in blocks if isinstance(b, TableBlock))
    assert [row[0] for row in table.rows] == contenders[:5] and table.rows[4][2] == "1.00"
    curves = next(b for b in blocks if isinstance(b, Curves))
    assert len(curves.lines) == 6 and max(max(line.y) for line in curves.lines.values()) == 1.0
    labels = list(c.rows[0].per_item["drift"])
    assert len(labels) == 16


@integer
def test_a_text_to_image_pipeline_of_the_user(world):
    subjects.load_callable("mine.py:stable_diffusion")().save_pretrained("mine")
    settings = {"size": 16, "steps": 2, "guidance": 2.0}
    run_verb("apply", "ptq4dm", "./mine", "made", Path("prompts.txt"), settings)
    names = ["float", "half", "made:execution=int8", "ddim"]
    c = run(names, "./mine", prompts="prompts.txt", guidance=2.0, samples=4)
    assert [r.status for r in c.rows] == ["ok"] * 4, [r.error for r in c.rows]
    rows = {r.contender: r.figures for r in c.rows}
    assert rows["half"]["drift"] < 0.1 and 0 < rows["made:execution=int8"]["drift"] < 0.1
    assert rows["float"]["multiply_adds"] == pytest.approx(rows["half"]["multiply_adds"])


def test_the_original_and_one_other_are_compared(world):
    c = run(["float", "half"], seeds=5)
    assert c.bench.headline == ("drift", "seconds_per_sample")
    (found,) = picks(c)
    assert found.figure == "drift" and found.best == "float" and [d.b for d in found.rivals] == ["half"]
    assert found.verdict == "clear"


def test_calls_that_guidance_leaves_out_are_not_counted(world):
    subjects.load_callable("mine.py:stable_diffusion")().save_pretrained("mine")
    # Threshold -1 is passed at the first call: from then on half of the rows.
    names = ["ddim", "ddim+adaptive-guidance:threshold=-1", "ddim+adaptive-guidance:threshold=1"]
    c = run(names, "./mine", prompts="prompts.txt", guidance=2.0, samples=4, steps=[4])
    assert [r.status for r in c.rows] == ["ok"] * 3, [r.error for r in c.rows]
    both, early, never = (r.figures["multiply_adds"] for r in c.rows)
    assert never == pytest.approx(both)
    assert early == pytest.approx(both * 5 / 8)


def test_real_images_of_the_user_judge_quality(world):
    c = run(["float", "real"], data="real.npz", samples=16)
    assert {"frechet", "kernel", "precision", "recall"} <= set(c.rows[0].figures) & set(c.rows[1].figures)


@pytest.mark.parametrize(
    ("contender", "subject", "sentence"),
    [
        ("float", "gaussians", "a pipeline of images"),
        ("ddim+float", "mine.py:classes", "float first"),
        ("half:dtype=int8", "mine.py:classes", "bfloat16 or float16"),
        ("ptq4dm:bits=8", "mine.py:classes", "steersman apply ptq4dm"),
        ("ptq4dm:bots=8", "digits", "did you mean 'bits'"),
        ("ptq4dm:bits=99", "digits", "bits=99 is not allowed: it must be a whole number from 2 to 8"),
        ("ptq4dm:execution=int4", "digits", "simulated or int8"),
        ("ptq4dm:bits=6:execution=int8", "digits", "simulated at W6A6"),
        ("ptq4dm:activation_bits=32:execution=int8", "digits", "no layer has 8 bits for both"),
        ("ptq4dm:states=noise", "digits", "states='noise' is not allowed"),
        ("ptq4dm:size=4", "digits", "from 16"),
        ("ptq4dm:steps=0", "digits", "from 1"),
        ("ptq4dm:layers=conv_in", "digits", "conv_in=8"),
        ("aptp:budget=2", "scenes", "budget=2"),
        ("aptp:finetune=-1", "scenes", "finetune=-1"),
        ("aptp:experts=40", "scenes", "at most the batch size"),
        ("aptp:routing=best", "scenes", "routing='best'"),
        ("momentum-decoding", "digits", "it runs in: decoding"),
    ],
)
def test_contenders_that_can_t_run_are_refused(world, contender, subject, sentence):
    with pytest.raises(InputError, match=sentence):
        run([contender], subject)


@integer
def test_an_artefact_of_another_network_fails_with_a_sentence(world):
    run_verb("apply", "ptq4dm", "digits", "made", settings={"size": 16, "steps": 2})
    with pytest.raises(InputError, match="this one is another"):
        run(["made"], "mine.py:classes")
    c = run(["ptq4dm:layers=conv_out=6:size=16:steps=2:execution=int8", "float"], "digits", samples=8)
    assert [r.status for r in c.rows] == ["failed", "ok"]
    assert "W6A6" in str(c.rows[0].error)


def test_the_bench_is_in_the_catalogue():
    assert catalog.bench("compression").id == "compression"
    assert digits.pipeline().unet.config.in_channels == 1
