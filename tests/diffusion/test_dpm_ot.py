"""DPM-OT's map and pipeline: laws, controls, files, hosts, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import save_file

from steersman.diffusion import ClassConditionalPipeline, DDIMScheduler, HeunScheduler, PNDMScheduler
from steersman.diffusion.dpm_ot import (
    DPMOTPipeline,
    TransportMap,
    apply,
    finetune_last_steps,
    probe,
    same_network,
)
from steersman.errors import InputError
from steersman.math.semidiscrete import draw, fit
from steersman.reference import digits, gaussians_model
from tests.diffusion import tiny


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ring():
    pipe = quiet(gaussians_model.pipeline("gaussians:ring-sharp"))
    points = pipe.unet.law.sample(64, generator())[0][:, :, None, None]
    return pipe, TransportMap.from_images(pipe, points, timestep=300, tolerance=0.1, generator=generator(1))


@pytest.fixture(scope="module")
def small():
    """A class-conditional network with random weights, and a map with three labels."""
    torch.manual_seed(0)
    unet = tiny.unconditional(num_class_embeds=4).unet.eval()
    pipe = quiet(ClassConditionalPipeline(unet, diffusers.DDIMScheduler(clip_sample=False), null_label=3))
    images = torch.rand(24, 1, 8, 8, generator=generator()) * 2 - 1
    labels = torch.arange(24) % 3
    return pipe, TransportMap.from_images(pipe, images, labels, timestep=400, tolerance=0.2, generator=generator(1))


def noise(pipe, count: int = 6, seed: int = 0) -> torch.Tensor:
    config = pipe.unet.config
    return torch.randn(count, config.in_channels, config.sample_size, config.sample_size, generator=generator(seed))


# ------------------------------------------------------------------ exact checks


def test_the_bank_is_at_its_noise_level(small):
    pipe, made = small
    abar = float(pipe.scheduler.alphas_cumprod[400])
    assert made.alpha == pytest.approx(math.sqrt(abar)) and made.timestep == 400
    eps = (made.bank - made.alpha * made.clean) / made.sigma
    assert eps.mean().abs() < 0.1 and eps.std() == pytest.approx(1, abs=0.05)


def test_a_sample_is_the_looked_up_latent_taken_down_by_the_sampler(ring):
    pipe, made = ring
    x = noise(pipe)
    index = made.joint.transport(x.flatten(1))
    assert torch.equal(made.look_up(x), index)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(timesteps=[300, 200, 100])
    y = made.bank[index]
    for t in scheduler.timesteps:
        y = scheduler.step(pipe.unet(y, t).sample, t, y).prev_sample
    wrapped = DPMOTPipeline(pipe, made)
    own, wrapped.scheduler = wrapped.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        assert wrapped.plan(3).tolist() == [300, 200, 100]
        out = wrapped(latents=x, num_inference_steps=3, output_type="latent").images
    finally:
        wrapped.scheduler = own
    torch.testing.assert_close(out, y)


def test_transport_and_a_random_index_have_one_law(ring):
    pipe, made = ring
    x = noise(pipe, 20 * 64, 3)
    hits = [np.bincount(made.look_up(x, coupling=c, generator=generator(5)), minlength=64) for c in ("ot", "random")]
    for counts in hits:  # each chi-square with 63 degrees of freedom
        assert ((counts - 20) ** 2 / 20).sum() < 110
    a, b = (made.look_up(x[:500], coupling="random", generator=generator(s)) for s in (5, 5))
    assert torch.equal(a, b)
    near = made.look_up(x[:500] + 1e-4)
    assert (near == made.look_up(x[:500])).double().mean() > 0.98  # transport goes with the noise,
    other = made.look_up(x[:500], coupling="random", generator=generator(6))
    assert (other == a).double().mean() < 0.1  # a random index does not


def test_from_pure_noise_the_law_is_the_plain_samplers():
    """At k = T - 1 the bank of states is noise, and the rest is the whole chain: an energy test of the outputs."""
    pipe = quiet(gaussians_model.pipeline("gaussians:ring"))
    made = TransportMap.from_states(pipe, 400, timestep=999, steps=10, tolerance=0.2, generator=generator())
    assert made.kind == "states" and made.bank.std() == pytest.approx(1, abs=0.05)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    u = DPMOTPipeline(pipe, made)(latents=noise(pipe, 100, 1), num_inference_steps=10, output_type="latent").images
    pipe.scheduler.set_timesteps(timesteps=DPMOTPipeline(pipe, made).plan(10).tolist())
    times = pipe.scheduler.timesteps.tolist()
    v = pipe(latents=noise(pipe, 100, 2), timesteps=times, output_type="latent").images
    both = torch.cat([u, v]).flatten(1).double()
    apart = torch.cdist(both, both)

    def energy_distance(first: torch.Tensor) -> float:
        second = torch.ones(200, dtype=torch.bool)
        second[first] = False
        return float(
            2 * apart[first][:, second].mean() - apart[first][:, first].mean() - apart[second][:, second].mean()
        )

    observed = energy_distance(torch.arange(100))
    drawn = [energy_distance(torch.randperm(200, generator=generator(s))[:100]) for s in range(199)]
    assert (1 + sum(value >= observed for value in drawn)) / 200 > 0.01


def test_states_are_what_the_models_own_sampling_passes(ring):
    pipe, _ = ring
    made = TransportMap.from_states(pipe, 8, timestep=400, steps=5, tolerance=0.5, generator=generator(3))
    x = torch.randn(8, 2, 1, 1, generator=generator(3))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(timesteps=[999, 799, 600, 400, 200])
    states = {}
    for t in scheduler.timesteps:
        states[int(t)] = x
        x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(made.bank, states[400])
    torch.testing.assert_close(made.clean, x)


def test_uniform_noise_is_the_normal_noise_through_its_distribution_function(ring):
    pipe, _ = ring
    points = pipe.unet.law.sample(16, generator())[0][:, :, None, None]
    made = TransportMap.from_images(pipe, points, source="uniform", tolerance=0.1, generator=generator(1))
    x = noise(pipe, 400, 2)
    assert torch.equal(made.look_up(x), made.joint.transport(torch.special.ndtr(x.flatten(1).double())))
    hits = np.bincount(made.look_up(noise(pipe, 3200, 4)), minlength=16)
    assert ((hits - 200) ** 2 / 200).sum() < 45


def test_fresh_noise_and_no_calls(small):
    pipe, made = small
    x, y = noise(pipe), torch.tensor([0, 1, 2, 0, 1, 2])
    index = made.look_up(x, y)
    again = made.latents(index, renoise=True, generator=generator(9))
    eps = torch.randn(again.shape, generator=generator(9))
    torch.testing.assert_close(again, made.alpha * made.clean[index] + made.sigma * eps)
    for how in ({"num_inference_steps": 0}, {"num_inference_steps": 3}):
        wrapped = DPMOTPipeline(pipe, made, lookup_only=how["num_inference_steps"] > 0)
        assert torch.equal(wrapped(y, latents=x, output_type="latent", **how).images, made.clean[index])
    shown = DPMOTPipeline(pipe, made)(y, latents=x, num_inference_steps=0, output_type="np").images
    assert shown.shape == (6, 8, 8, 1) and 0 <= shown.min() <= shown.max() <= 1


def test_labels_restrict_the_bank_and_items_bring_theirs(small):
    pipe, made = small
    x = noise(pipe, 30)
    asked = torch.arange(30) % 3
    index = made.look_up(x, asked)
    assert torch.equal(made.labels[index], asked)
    rows = (made.labels == 1).nonzero()[:, 0]
    assert torch.equal(index[asked == 1], rows[made.classes[1].transport(x[asked == 1].flatten(1))])
    heard = []
    hook = pipe.unet.register_forward_pre_hook(lambda _m, _a, k: heard.append(k["class_labels"]), with_kwargs=True)
    try:
        DPMOTPipeline(pipe, made)(latents=x, num_inference_steps=2, output_type="latent")
        DPMOTPipeline(pipe, made)(2, batch_size=4, num_inference_steps=2, generator=generator(), output_type="latent")
    finally:
        hook.remove()
    assert all(torch.equal(labels, made.labels[made.look_up(x)]) for labels in heard if len(labels) == 30)
    assert heard[-1].tolist() == [2] * 4


# ------------------------------------------------------------------ the authors' code


def test_erratum_topk_drops_and_misaligns():
    """Dropping singular draws, and each kept pair's lower index, changes the number and order of outputs."""
    y = torch.randn(40, 3, generator=generator(), dtype=torch.float64)
    found = fit(y, topk=2, tolerance=0.1, generator=generator(1))
    x = draw("gaussian", (300, 3), generator(2))
    best = (x @ y.T + found.h).topk(2).indices
    n = torch.cat([y, -torch.ones(40, 1)], 1)
    n = n / n.norm(dim=1, keepdim=True)
    theta = (n[best[:, 0]] * n[best[:, 1]]).sum(1).clamp(max=1).arccos()
    theta = (theta - theta.min()) / (theta.max() - theta.min())
    authors = best[theta <= 0.7].min(1).values.unique()
    assert len(authors) <= 40 < 300  # theirs: at most one output an item
    _, index = found.sample(x, generator(3), topk=2, threshold=0.7)
    fine = ~found.singular(x, 2, 0.7)
    assert len(index) == 300 and torch.equal(index[fine], best[fine, 0])


def test_erratum_the_kept_heights_are_those_that_were_measured():
    """Saving h after the update keeps heights whose masses nobody measured."""
    y = torch.randn(32, 2, generator=generator(), dtype=torch.float64)
    x = draw("gaussian", (20_000, 2), generator(1))
    ν = 1 / 32

    def norm(h: torch.Tensor) -> float:
        hits = torch.bincount((x @ y.T + h).argmax(1), minlength=32)
        return float((hits / len(x) - ν).norm())

    h, m, v = (torch.zeros(32, dtype=torch.float64) for _ in range(3))
    least, measured, updated = math.inf, h, h
    for _ in range(120):
        g = torch.bincount((x @ y.T + h).argmax(1), minlength=32) / len(x) - ν
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        after = h - 0.1 * m / (v.sqrt() + 1e-8)
        if float(g.norm()) < least:
            least, measured, updated = float(g.norm()), h, after
        h = after - after.mean()
    assert norm(measured) == pytest.approx(least)
    assert norm(updated) > 1.05 * least


def test_erratum_levels_of_bank_and_chain(ring):
    """232 levels, 10 steps back, 5 steps a level: the bank's level is 222, the chain starts at 230. Here both are k."""
    sigmas = np.geomspace(50, 0.01, 232)
    bank, start = sigmas[232 - 10], sigmas[232 - 10 // 5]
    assert bank / start == pytest.approx(1.34, abs=0.01)
    pipe, made = ring
    wrapped = DPMOTPipeline(pipe, made)
    own, wrapped.scheduler = wrapped.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        for calls in (1, 5, 10, 300):
            assert int(wrapped.plan(calls)[0]) == made.timestep
    finally:
        wrapped.scheduler = own


# ------------------------------------------------------------------ hosts


@pytest.mark.parametrize(
    ("kind", "calls", "times"),
    [
        (PNDMScheduler, 5, [400, 300, 300, 200, 100]),
        (DDIMScheduler, 4, [400, 300, 200, 100]),
        (HeunScheduler, 5, None),
        (DPMSolverMultistepScheduler, 4, [400, 300, 200, 100]),
        (diffusers.DDPMScheduler, 4, [400, 300, 200, 100]),
        (diffusers.DDIMScheduler, 5, [400, 320, 240, 160, 80]),
    ],
)
def test_any_sampler_starts_at_the_maps_level(small, kind, calls, times):
    pipe, made = small
    wrapped, evaluated = DPMOTPipeline(pipe, made), []
    own, wrapped.scheduler = wrapped.scheduler, kind.from_config(pipe.scheduler.config)
    hook = pipe.unet.register_forward_pre_hook(lambda _m, a, _k: evaluated.append(float(a[1])), with_kwargs=True)
    try:
        plan = wrapped.plan(calls).tolist()
        out = wrapped(1, batch_size=3, num_inference_steps=calls, generator=generator(), output_type="latent").images
        wrapped.scheduler.set_timesteps(10)
        assert len(wrapped.scheduler.timesteps) >= 10  # the scheduler is its own again
    finally:
        hook.remove()
        wrapped.scheduler = own
    assert evaluated == plan and plan[0] == 400 and len(plan) <= calls and out.isfinite().all()
    assert times is None or plan == times


def test_with_dpm_solver_pp(small):
    from steersman.diffusion import DPMSolverPPScheduler

    pipe, made = small
    wrapped = DPMOTPipeline(pipe, made)
    own, wrapped.scheduler = wrapped.scheduler, DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    try:
        ours = wrapped(0, latents=noise(pipe, 2), num_inference_steps=5, output_type="latent").images
        wrapped.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        theirs = wrapped(0, latents=noise(pipe, 2), num_inference_steps=5, output_type="latent").images
    finally:
        wrapped.scheduler = own
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_stable_diffusion():
    pipe = tiny.stable_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    images = torch.rand(6, 3, 16, 16, generator=generator()) * 2 - 1
    made = TransportMap.from_images(pipe, images, timestep=300, tolerance=0.3, generator=generator(1))
    latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(made.clean, latents)
    wrapped = DPMOTPipeline(pipe, made, topk=2, threshold=0.95)
    out = wrapped(
        **tiny.EMBEDS, num_images_per_prompt=2, num_inference_steps=4, generator=generator(), output_type="np"
    )
    assert out.images.shape == (2, 16, 16, 3)
    alone = [
        wrapped(**tiny.EMBEDS, num_inference_steps=4, generator=[generator(s)], output_type="latent").images
        for s in (4, 5)
    ]
    pair = wrapped(
        **tiny.EMBEDS,
        num_images_per_prompt=2,
        num_inference_steps=4,
        generator=[generator(4), generator(5)],
        output_type="latent",
    )
    torch.testing.assert_close(pair.images, torch.cat(alone), rtol=1e-3, atol=1e-4)
    clean = wrapped(**tiny.EMBEDS, num_inference_steps=0, generator=generator(), output_type="pil").images
    assert len(clean) == 1 and clean[0].size == (16, 16)


def test_half_precision(small):
    pipe, made = small
    half = tiny.unconditional(num_class_embeds=4).unet.eval()
    half.load_state_dict(pipe.unet.state_dict())
    cast = quiet(ClassConditionalPipeline(half.bfloat16(), pipe.scheduler, null_label=3))
    out = DPMOTPipeline(cast, made)(1, latents=noise(pipe, 2), num_inference_steps=4, output_type="latent").images
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


# ------------------------------------------------------------------ files


def test_save_and_load(small, tmp_path):
    pipe, made = small
    made.save(tmp_path / "map")
    loaded = TransportMap.load(tmp_path / "map")
    x, y = noise(pipe, 40), torch.arange(40) % 3
    assert torch.equal(loaded.look_up(x), made.look_up(x)) and torch.equal(loaded.look_up(x, y), made.look_up(x, y))
    assert loaded.report() == made.report()
    for folder in (tmp_path / "map", str(tmp_path / "map")):
        wrapped = DPMOTPipeline.mount(pipe, folder, coupling="random", renoise=True)
        out = wrapped(1, batch_size=2, num_inference_steps=4, generator=generator(), output_type="latent").images
        assert out.isfinite().all()
    assert "samples drawn with few network calls are close to" in (tmp_path / "map/README.md").read_text()
    assert json.loads((tmp_path / "map/map.json").read_text())["holds_data"] is True
    assert made.to("cpu").look_up(x).tolist() == made.look_up(x).tolist()
    (tmp_path / "map/map.json").write_text("{}")
    with pytest.raises(InputError, match="map="):
        TransportMap.load(tmp_path / "map")
    with pytest.raises(InputError, match="map="):
        DPMOTPipeline(pipe, tmp_path / "nowhere")


def pictures(folder: Path, sizes) -> Path:
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        (folder / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class-{i % 2}" / f"{i}.png")
    return folder


def test_apply(small, tmp_path):
    pipe, _ = small
    pipe.save_pretrained(tmp_path / "pipe")
    lines: list[str] = []
    pictures(tmp_path / "images", [8] * 12)
    facts = apply(tmp_path / "pipe", tmp_path / "images", tmp_path / "a", log=lines.append, tolerance=0.2)
    assert facts["bank"] == 12 and facts["duplicates"] == 0 and facts["maps"] == 3 and facts["timestep"] == 300
    assert facts["residual"] < 0.3 and facts["empty_cells"] == 0 and any(line.startswith("joint: 12") for line in lines)
    made = TransportMap.load(tmp_path / "a")
    assert made.labels.bincount().tolist() == [6, 6]
    assert DPMOTPipeline.mount(pipe, tmp_path / "a")(0, num_inference_steps=3, generator=generator()).images[
        0
    ].size == (8, 8)
    again = apply(tmp_path / "pipe", tmp_path / "images", tmp_path / "b", tolerance=0.2)
    assert torch.equal(TransportMap.load(tmp_path / "b").joint.h, made.joint.h) and again == facts
    states = apply(tmp_path / "pipe", None, tmp_path / "c", kind="states", size=8, steps=5, maps="joint", tolerance=0.3)
    assert states["bank"] == 8 and states["kind"] == "states"
    assert "holds the images" in (tmp_path / "a/README.md").read_text()
    latents = torch.randn(10, 1, 8, 8, generator=generator())
    save_file({"latents": latents, "labels": torch.arange(10) % 3}, tmp_path / "l.safetensors")
    torch.save({"latents": latents, "labels": torch.arange(10) % 3}, tmp_path / "l.pt")
    for file in ("l.safetensors", "l.pt"):
        apply(tmp_path / "pipe", tmp_path / file, tmp_path / file[2:], size=6, maps="joint", tolerance=0.3)
        assert len(TransportMap.load(tmp_path / file[2:]).bank) == 6


def test_finetuning_the_last_steps(small, tmp_path):
    """Only the decoder moves, the loss falls, and the tuned network goes with the map."""
    pipe, _ = small
    pipe.save_pretrained(tmp_path / "pipe")
    before = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    np.savez(tmp_path / "i.npz", images=np.random.default_rng(0).random((12, 8, 8)), labels=np.arange(12) % 3)
    facts = apply(tmp_path / "pipe", tmp_path / "i.npz", tmp_path / "a", finetune=3, maps="joint", tolerance=0.3)
    assert facts["finetuning_loss"] > 0
    tuned = DPMOTPipeline.mount(pipe, tmp_path / "a")
    moved = {name.split(".")[0] for name, p in tuned.unet.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {"up_blocks", "conv_norm_out", "conv_out"}
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.state_dict().items())
    out = tuned(num_inference_steps=2, batch_size=2, generator=generator(), output_type="latent").images
    plain = DPMOTPipeline(pipe, tuned.map)(
        num_inference_steps=2, batch_size=2, generator=generator(), output_type="latent"
    ).images
    assert not torch.equal(out, plain)
    images, labels = torch.rand(32, 1, 8, 8, generator=generator()) * 2 - 1, torch.arange(32) % 3
    own = ClassConditionalPipeline(type(pipe.unet).from_pretrained(tmp_path / "pipe/unet"), pipe.scheduler, 3)
    first, last = (
        finetune_last_steps(own, images, labels, steps=n, learning_rate=3e-3, generator=generator()) for n in (1, 40)
    )
    assert last < 0.9 * first and all(p.requires_grad for p in own.unet.parameters())
    for settings, named in (({"steps": 0}, "steps=0"), ({"learning_rate": 0.0}, "learning_rate"), ({}, "labels")):
        with pytest.raises(InputError, match=named):
            finetune_last_steps(own, images, None if not settings else labels, **settings)
    with pytest.raises(InputError, match="UNet2DModel"):
        finetune_last_steps(tiny.stable_diffusion(), images)


def test_apply_refuses(small, tmp_path):
    pipe, _ = small
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    (tmp_path / "bad.pt").write_bytes(b"no tensors")
    torch.save(torch.zeros(4, 3, 8, 8), tmp_path / "colours.pt")
    np.savez(tmp_path / "same.npz", images=np.full((5, 8, 8), 0.5), labels=np.zeros(5, int))
    for source, named in (
        (None, "input"),
        (tmp_path / "bad", "an image file that can be read"),
        (tmp_path / "bad.pt", "input"),
        (tmp_path / "colours.pt", "of shape"),
        (pictures(tmp_path / "mixed", [8, 8, 9]), "of one size with the others"),
        (pictures(tmp_path / "large", [16, 16]), "of the network's size"),
    ):
        with pytest.raises(InputError, match=named):
            apply(tmp_path / "pipe", source, tmp_path / "out")
    for settings, named in (
        ({"timestep": 1000}, "timestep=1000.*from 1 to 999"),
        ({"timestep": 0}, "timestep=0"),
        ({"size": 0}, "size=0"),
        ({"kind": "states", "steps": 1}, "steps=1"),
    ):
        with pytest.raises(InputError, match=named):
            apply(tmp_path / "pipe", tmp_path / "same.npz", tmp_path / "out", **settings)
    # Equal images get different noise, so they are distinct latents; the report counts them.
    facts = apply(tmp_path / "pipe", tmp_path / "same.npz", tmp_path / "out", maps="joint", tolerance=0.3)
    assert facts["duplicates"] == 4


# ------------------------------------------------------------------ refusals


def test_refusals_of_banks(ring, small):
    pipe, made = ring
    for images, more, named in (
        (torch.zeros(0, 2, 1, 1), {}, "at least one"),
        (torch.full((3, 2, 1, 1), float("nan")), {}, "finite"),
        (torch.zeros(3, 2, 2, 2), {}, "of the network's size"),
        (torch.zeros(3, 2, 1, 1), {"timestep": 1000}, "timestep=1000"),
        (torch.zeros(3, 2, 1, 1), {"source": "cauchy"}, "source='cauchy'"),
        (torch.zeros(3, 2, 1, 1), {"maps": "class"}, "maps='class'"),
        (torch.zeros(3, 2, 1, 1), {"maps": "all"}, "maps='all'"),
        (torch.zeros(3, 2, 1, 1), {"labels": torch.tensor([0, 1, 9])}, "labels"),
    ):
        with pytest.raises(InputError, match=named):
            TransportMap.from_images(pipe, images, **more)
    with pytest.raises(InputError, match="duplicates"):  # without noise equal items are ties
        TransportMap._fitted(
            pipe, *[torch.zeros(3, 2, 1, 1)] * 2, None, 300, made.alpha, "images", "gaussian", "joint", None, None, {}
        )
    with pytest.raises(InputError, match="count=0"):
        TransportMap.from_states(pipe, 0)


def test_refusals_of_the_pipeline(ring, small):
    pipe, made = small
    for settings, named in (
        ({"coupling": "sinkhorn"}, "coupling='sinkhorn'"),
        ({"topk": 0}, "topk=0"),
        ({"topk": 99}, "topk=99.*from 1 to"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"renoise": 1}, "renoise=1"),
    ):
        with pytest.raises(InputError, match=named):
            DPMOTPipeline(pipe, made, **settings)
    wrapped = DPMOTPipeline(pipe, made)
    for call, named in (
        ({"num_inference_steps": 401}, "num_inference_steps=401.*from 0 to 400"),
        ({"timesteps": [400, 200]}, "timesteps"),
        ({"labels": 3, "num_inference_steps": 2}, "among the bank's labels: 0, 1, 2"),
        ({"labels": 0.5}, "labels"),
        ({"labels": [0, 1], "latents": torch.zeros(3, 1, 8, 8)}, "2 labels"),
        ({"latents": torch.zeros(2, 1, 4, 4)}, "of shape"),
        ({"strength": 0.5}, "those of ClassConditionalPipeline"),
        ({"batch_size": 2, "generator": [generator()]}, "a list of 1"),
    ):
        with pytest.raises(InputError, match=named):
            wrapped(**call)
    with pytest.raises(InputError, match="maps=class"):
        only = TransportMap(**{**vars(made), "joint": None})
        DPMOTPipeline(pipe, only)(num_inference_steps=2)
    with pytest.raises(InputError, match="maps=joint"):
        DPMOTPipeline(pipe, TransportMap(**{**vars(made), "classes": {}}))(1, num_inference_steps=2)
    with pytest.raises(InputError, match="the bank has no labels"):
        DPMOTPipeline(*ring)(1, num_inference_steps=2)


def test_refuses_another_model_noise_level_or_parametrisation(ring, small):
    pipe, made = small
    torch.manual_seed(7)
    other = ClassConditionalPipeline(diffusers.UNet2DModel.from_config(pipe.unet.config), pipe.scheduler, null_label=3)
    torch.nn.init.normal_(other.unet.conv_in.weight)
    assert not same_network(probe(other.unet), probe(pipe.unet))
    with pytest.raises(InputError, match="made with this model"):
        DPMOTPipeline(other, made)
    with pytest.raises(InputError, match="of the pipeline's latents"):
        DPMOTPipeline(ring[0], made)
    wrapped, own = DPMOTPipeline(pipe, made), pipe.scheduler
    try:
        for scheduler, named in (
            (diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "noise level at timestep 400"),
            (diffusers.DDIMScheduler(num_train_timesteps=300), "timestep 400"),
            (diffusers.EulerDiscreteScheduler(), "alpha x_0"),
            (diffusers.UniPCMultistepScheduler(), "takes a list of timesteps"),
        ):
            wrapped.scheduler = scheduler
            with pytest.raises(InputError, match=named):
                wrapped.plan(4)
            with pytest.raises(InputError, match=named):
                wrapped(1, num_inference_steps=4)
        wrapped.scheduler = PNDMScheduler.from_config(own.config, variant="f-pndm")
        with pytest.raises(InputError, match=r"num_inference_steps=5.*at least 4"):
            wrapped.plan(5)
    finally:
        pipe.scheduler = own


# ------------------------------------------------------------------ on the reference model


def test_digits_are_of_their_class_after_few_calls():
    pipe = quiet(digits.pipeline())
    x, y = digits.images("train")
    rows = torch.arange(150)
    made = TransportMap.from_images(pipe, x[rows], y[rows], maps="class", tolerance=0.3, generator=generator())
    asked = torch.arange(40) % 10
    out = DPMOTPipeline(pipe, made)(asked, num_inference_steps=5, generator=generator(1), output_type="pt").images
    assert (digits.classifier("a")(2 * out - 1).argmax(1) == asked).double().mean() > 0.9
