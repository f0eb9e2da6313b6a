"""The class-conditional pipeline, against diffusers' own pipelines and a loop written out."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

import steersman.diffusion
from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.errors import InputError
from steersman.reference import gaussians_model
from tests.diffusion import tiny


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditional(null_label: int | None = 3, **scheduler) -> ClassConditionalPipeline:
    unet = tiny.unconditional(num_class_embeds=4).unet.eval()
    return quiet(ClassConditionalPipeline(unet, DDIMScheduler(clip_sample=False, **scheduler), null_label))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ oracles


def test_unconditional_is_what_diffusers_draws():
    """The same noise through DDIMPipeline, stochastic steps too."""
    unet = tiny.unconditional().unet.eval()
    theirs = quiet(DDIMPipeline(unet, DDIMScheduler()))
    ours = quiet(ClassConditionalPipeline(unet, DDIMScheduler()))
    for eta in (0.0, 1.0):
        a = theirs(batch_size=3, generator=rng(), eta=eta, num_inference_steps=7, output_type="np").images
        b = ours(batch_size=3, generator=rng(), eta=eta, num_inference_steps=7, output_type="np").images
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_guidance_is_its_formula():
    """eps_w = eps(∅) + w (eps(y) - eps(∅)), with every network call made apart."""
    pipe, w = conditional(), 2.5
    y, null = torch.tensor([0, 2]), torch.full((2,), 3)
    start = torch.randn(2, 1, 8, 8, generator=rng())
    got = pipe(y, latents=start, guidance_scale=w, num_inference_steps=5, output_type="latent").images
    x, scheduler = start, DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            with_label = pipe.unet(x, t, class_labels=y).sample
            without = pipe.unet(x, t, class_labels=null).sample
            x = scheduler.step(without + w * (with_label - without), t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_one_forward_a_step_with_unconditional_rows_first():
    pipe, seen = conditional(), []
    pipe.unet.register_forward_hook(lambda m, a, k, out: seen.append(k["class_labels"].tolist()), with_kwargs=True)
    pipe([0, 2], guidance_scale=3.0, num_inference_steps=4)
    assert seen == [[3, 3, 0, 2]] * 4
    seen.clear()
    pipe([0, 2], num_inference_steps=4)
    assert seen == [[0, 2]] * 4
    seen.clear()
    pipe(batch_size=2, num_inference_steps=1)  # no label: the null label, unconditional samples
    assert seen == [[3, 3]]


def test_labels_of_an_exact_network_reach_their_mode():
    pipe = quiet(gaussians_model.pipeline("gaussians:ring-sharp"))
    labels = torch.arange(8).repeat_interleave(25)
    x = pipe(labels, generator=rng(), num_inference_steps=40, output_type="latent").images[:, :, 0, 0]
    law = pipe.unet.law
    assert torch.equal(law.responsibilities(x).argmax(1), labels)
    assert (x.double() - law.means[labels]).norm(dim=1).median() < 3 * 0.05


def test_timesteps_replace_the_number_of_steps():
    unet = tiny.unconditional().unet.eval()
    pipe = quiet(ClassConditionalPipeline(unet, DDPMScheduler()))
    seen = []
    pipe(timesteps=[900, 500, 3], callback_on_step_end=lambda p, i, t, kw: seen.append((i, int(t))) or {})
    assert seen == [(0, 900), (1, 500), (2, 3)] and pipe.num_timesteps == 3
    own = pipe.scheduler
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match=r"^timesteps="):
        pipe(timesteps=[900, 500, 3])
    pipe.scheduler = own


# ------------------------------------------------------------------ host integration


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_any_diffusers_scheduler_samples_the_mixture(name):
    """With an exact network every scheduler ends near the ring, from the start that it prescribes."""
    pipe = quiet(gaussians_model.pipeline("gaussians:ring"))
    kwargs = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    config = dict(pipe.scheduler.config) | {"clip_sample": False}
    pipe.scheduler = getattr(diffusers, name).from_config(config, **kwargs)
    x = pipe(batch_size=400, generator=rng(), num_inference_steps=30, output_type="latent").images[:, :, 0, 0]
    assert x.isfinite().all()
    law = pipe.unet.law
    assert (law.responsibilities(x).mean(0) - 1 / 8).abs().max() < 4 * math.sqrt(1 / 8 / 400) + 0.02
    assert (x.norm(dim=1).mean() - law.sample(20_000, rng())[0].norm(dim=1).mean()).abs() < 0.06


def test_our_schedulers_drive_it():
    pipe = conditional()
    a = pipe([0, 1], generator=rng(), num_inference_steps=6, output_type="latent").images
    pipe.scheduler = steersman.diffusion.DDIMScheduler.from_config(pipe.scheduler.config)
    b = pipe([0, 1], generator=rng(), num_inference_steps=6, output_type="latent").images
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # both compute in float32


def test_start_is_scaled_as_the_scheduler_asks():
    pipe = conditional()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    start = torch.randn(2, 1, 8, 8, generator=rng())
    a = pipe([0, 1], latents=start, num_inference_steps=4, output_type="latent").images
    b = pipe([0, 1], generator=rng(), num_inference_steps=4, output_type="latent").images
    torch.testing.assert_close(a, b)


def test_a_generator_per_image_makes_images_independent_of_the_batch():
    pipe = conditional()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    both = pipe([0, 1], generator=[rng(5), rng(6)], num_inference_steps=5, output_type="pt").images
    for i, seed in enumerate((5, 6)):
        alone = pipe([i], generator=[rng(seed)], num_inference_steps=5, output_type="pt").images
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)


def test_outputs_and_callbacks():
    pipe = conditional()
    images = pipe([0, 1, 2], generator=rng(), num_inference_steps=2).images
    assert [im.size for im in images] == [(8, 8)] * 3 and images[0].mode == "L"
    array = pipe([0, 1, 2], generator=rng(), num_inference_steps=2, output_type="np").images
    tensor = pipe([0, 1, 2], generator=rng(), num_inference_steps=2, output_type="pt", return_dict=False)[0]
    assert array.shape == (3, 8, 8, 1) and array.min() >= 0 and array.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal((array[0, :, :, 0] * 255).round().astype(np.uint8), np.asarray(images[0]))
    zeros = pipe(
        0,
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=lambda p, i, t, kw: {"latents": torch.zeros_like(kw["latents"])},
    ).images
    assert not zeros.any()


def test_learned_variance_is_left_out():
    unet = tiny.unconditional(out_channels=2).unet.eval()
    pipe = quiet(ClassConditionalPipeline(unet, DDIMScheduler()))
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_save_and_load(tmp_path):
    pipe = conditional()
    pipe.save_pretrained(tmp_path / "own")
    back = quiet(steersman.diffusion.ClassConditionalPipeline.from_pretrained(tmp_path / "own"))
    assert back.config.null_label == 3
    a, b = (p([0, 1], generator=rng(), num_inference_steps=3, output_type="np").images for p in (pipe, back))
    np.testing.assert_array_equal(a, b)
    half = ClassConditionalPipeline.from_pretrained(tmp_path / "own", torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16

    tiny.unconditional().save_pretrained(tmp_path / "ddpm")  # a stock unconditional folder
    plain = quiet(ClassConditionalPipeline.from_pretrained(tmp_path / "ddpm"))
    assert plain(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


def test_keeps_its_place_when_our_scheduler_is_saved_with_it(tmp_path):
    pipe = conditional()
    pipe.scheduler = steersman.diffusion.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    back = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert type(back.scheduler) is steersman.diffusion.DDIMScheduler


def test_analytic_network_saves_and_loads(tmp_path):
    pipe = quiet(gaussians_model.pipeline("gaussians:nested", prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path)
    back = quiet(ClassConditionalPipeline.from_pretrained(tmp_path))
    a, b = (p(batch_size=9, generator=rng(), num_inference_steps=9, output_type="latent").images for p in (pipe, back))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_prediction_types_of_the_analytic_network_agree(kind):
    start = torch.randn(50, 2, 1, 1, generator=rng())
    a, b = (
        quiet(gaussians_model.pipeline("gaussians:ring", prediction_type=k))(
            latents=start, num_inference_steps=20, output_type="latent"
        ).images
        for k in ("epsilon", kind)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"labels": [0, 4]}, "labels"),
        ({"labels": -1}, "labels"),
        ({"labels": [0.5]}, "labels"),
        ({"labels": []}, "labels"),
        ({"labels": [0, 1], "batch_size": 3}, "labels"),
        ({"labels": 0, "batch_size": 0}, "batch_size"),
        ({"labels": 0, "num_inference_steps": 0}, "num_inference_steps"),
        ({"labels": 0, "num_inference_steps": 2.0}, "num_inference_steps"),
        ({"labels": 0, "timesteps": []}, "timesteps"),
        ({"labels": 0, "guidance_scale": 0.5}, "guidance_scale"),
        ({"labels": 0, "guidance_scale": math.nan}, "guidance_scale"),
        ({"labels": [0, 1], "generator": [torch.Generator()]}, "generator"),
        ({"labels": 0, "latents": torch.zeros(1, 1, 4, 4)}, "latents"),
        ({"labels": 0, "eta": 2.0}, "eta"),
        ({"labels": 0, "output_type": "jpg"}, "output_type"),
        ({"labels": 0, "callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_refuses(arguments, named):
    with pytest.raises(InputError, match=rf"^{named}="):
        conditional()(**arguments)


def test_refuses_what_the_network_lacks():
    plain = quiet(ClassConditionalPipeline(tiny.unconditional().unet, DDIMScheduler()))
    with pytest.raises(InputError, match=r"^labels="):
        plain(0)
    with pytest.raises(InputError, match=r"^guidance_scale="):
        plain(guidance_scale=2.0)
    unnulled = conditional(null_label=None)
    with pytest.raises(InputError, match=r"^guidance_scale="):
        unnulled(0, guidance_scale=2.0)
    with pytest.raises(InputError, match=r"^labels="):
        unnulled()
    with pytest.raises(InputError, match=r"^null_label="):
        ClassConditionalPipeline(UNet2DModel(**dict(plain.unet.config)), DDIMScheduler(), null_label=10)
    unnulled.scheduler = EulerDiscreteScheduler()
    with pytest.raises(InputError, match=r"^eta="):
        unnulled(0, eta=0.5)


@settings(max_examples=25, deadline=None)
@given(
    labels=st.one_of(st.none(), st.integers(-1, 5), st.lists(st.integers(0, 4), max_size=3)),
    batch=st.one_of(st.none(), st.integers(-1, 3)),
    steps=st.integers(-1, 3),
    w=st.sampled_from([-1.0, 0.0, 1.0, 1.5, 7.0]),
)
def test_a_run_gives_images_or_names_its_argument(labels, batch, steps, w):
    pipe = conditional()
    try:
        images = pipe(
            labels, batch_size=batch, num_inference_steps=steps, guidance_scale=w, output_type="np", generator=rng()
        ).images
    except InputError as error:
        assert error.parameter in ("labels", "batch_size", "num_inference_steps", "guidance_scale")
        return
    expected = len(labels) if isinstance(labels, list) else batch or 1
    assert images.shape == (expected, 8, 8, 1) and np.isfinite(images).all()
