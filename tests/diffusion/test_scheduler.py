"""The adapter: any solver in stock, unmodified diffusers pipelines; schedules, spacings, precision, reload."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.diffusion import DDIMScheduler, EulerScheduler, HeunScheduler, PNDMScheduler, RK4Scheduler
from steersman.diffusion.scheduler import SolverScheduler, alphas_cumprod, spaced
from steersman.diffusion.solver import DiscreteVP, denoiser, integrate
from steersman.errors import InputError
from tests.diffusion import tiny

SCHEDULERS = {
    "plms": lambda **k: PNDMScheduler(**k),
    "f-pndm": lambda **k: PNDMScheduler(variant="f-pndm", **k),
    "s-pndm": lambda **k: PNDMScheduler(variant="s-pndm", **k),
    "prk": lambda **k: PNDMScheduler(variant="prk", **k),
    "ddim": lambda **k: DDIMScheduler(**k),
    "ddim:eta=1": lambda **k: DDIMScheduler(eta=1.0, **k),
    "euler": lambda **k: EulerScheduler(**k),
    "heun": lambda **k: HeunScheduler(**k),
    "rk4": lambda **k: RK4Scheduler(**k),
}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def network(x: torch.Tensor, t) -> torch.Tensor:
    return torch.tanh(0.3 * x + float(t) / 1000) + 0.1 * x.flip(-1)


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(scheduler, x, start: int = 0, edit=None, **arguments) -> torch.Tensor:
    for i, t in enumerate(scheduler.timesteps[start:]):
        x = scheduler.step(network(x, t), t, x, **arguments).prev_sample
        if edit is not None:
            x = edit(i + start, x)
    return x


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ------------------------------------------------------------------ exact checks


@every_scheduler
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_adapter_is_integrate(name, spacing):
    """The scheduler's run is the solver's, driven by hand over the same grid."""
    scheduler = SCHEDULERS[name](timestep_spacing=spacing)
    scheduler.set_timesteps(7)
    ours = run(scheduler, noise(2, 3), generator=torch.Generator().manual_seed(1))
    process = DiscreteVP(alphas_cumprod())
    solver = scheduler.make_solver(process, **{k: scheduler.config[k] for k in scheduler._own_settings})
    grid = spaced(spacing, 7, 1000)
    direct = integrate(solver, denoiser(process, network), noise(2, 3), grid, torch.Generator().manual_seed(1))
    assert torch.equal(ours, direct.x)
    assert len(scheduler.timesteps) == direct.calls


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_beta_schedule_of_diffusers(schedule, zero_snr):
    # diffusers computes these in float32.
    theirs = diffusers.DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr).alphas_cumprod.double()
    ours = alphas_cumprod(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)
    assert ours.dtype == np.float64
    assert (ours[-1] == 0.0) == zero_snr


def test_exp_schedule_and_trained_betas():
    betas = diffusers.schedulers.scheduling_ddpm.betas_for_alpha_bar(50, alpha_transform_type="exp").double()
    np.testing.assert_allclose(alphas_cumprod(50, beta_schedule="exp"), torch.cumprod(1 - betas, 0), rtol=1e-5)
    given = np.linspace(0.01, 0.3, 12)
    np.testing.assert_allclose(alphas_cumprod(12, trained_betas=given), np.cumprod(1 - given), rtol=1e-14)
    scheduler = PNDMScheduler(num_train_timesteps=12, trained_betas=given)
    again = PNDMScheduler.from_config(json.loads(scheduler.to_json_string()))
    np.testing.assert_array_equal(again.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 999, 1000])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_spacing_of_diffusers(spacing, steps, offset):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(steps)
    if theirs.timesteps[0] > 999:  # with which diffusers fails later
        with pytest.raises(InputError, match="num_inference_steps"):
            spaced(spacing, steps, 1000, offset)
        return
    grid = spaced(spacing, steps, 1000, offset)
    assert grid[:-1] == theirs.timesteps.tolist()
    assert grid[-1] < 0
    ours = DDIMScheduler.from_config(theirs.config)
    ours.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)


def test_custom_timesteps():
    scheduler = PNDMScheduler(variant="s-pndm")
    scheduler.set_timesteps(timesteps=[900, 600, 250.5, 30])
    assert scheduler.timesteps.tolist() == [900, 600, 600, 250.5, 30]
    assert scheduler.num_inference_steps == 4
    assert run(scheduler, noise(2, 3)).isfinite().all()
    scheduler.set_timesteps(timesteps=np.array([900, 600]))
    assert scheduler.timesteps.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_scheduler
def test_the_state_is_float32_whatever_the_network(name, dtype):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(10)
    x = noise(2, 3, dtype=dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        assert x.dtype == dtype
        for part in scheduler._state or ():
            for tensor in part if isinstance(part, tuple) else (part,):
                assert not isinstance(tensor, torch.Tensor) or tensor.dtype == torch.float32
    exact = SCHEDULERS[name]()
    exact.set_timesteps(10)
    y = run(exact, noise(2, 3, dtype=dtype).double(), generator=torch.Generator().manual_seed(0))
    if "eta" not in name:  # whose noise depends on the precision
        assert relative(x.double(), y) < (0.02 if dtype == torch.float16 else 0.15)


@every_scheduler
def test_each_sample_of_a_list_of_generators_is_alone(name):
    scheduler = SCHEDULERS[name]()

    def sample(seeds):
        x = torch.cat([noise(1, 3, seed=s) for s in seeds])
        scheduler.set_timesteps(8)
        return run(scheduler, x, generator=[torch.Generator().manual_seed(s) for s in seeds])

    together = sample([3, 4, 5])
    assert relative(together[1:2], sample([4])) < 1e-12


@every_scheduler
def test_add_noise_at_any_timestep(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(8)
    x0, eps = noise(2, 3, 2), noise(2, 3, 2, seed=1)
    table = alphas_cumprod()
    for t in (0, 17, 999):
        noisy = scheduler.add_noise(x0, eps, torch.tensor([t, t]))
        torch.testing.assert_close(noisy, table[t] ** 0.5 * x0 + (1 - table[t]) ** 0.5 * eps)
        torch.testing.assert_close(scheduler.add_noise(x0, eps, torch.tensor([float(t)])), noisy)
        v = scheduler.get_velocity(x0, eps, torch.tensor([t, t]))
        torch.testing.assert_close(v, table[t] ** 0.5 * eps - (1 - table[t]) ** 0.5 * x0)
    half = scheduler.add_noise(x0.half(), eps.half(), torch.tensor([12.5]))
    assert half.dtype == torch.float16
    assert scheduler.scale_model_input(x0, 5) is x0
    assert scheduler.init_noise_sigma == 1.0
    assert len(scheduler) == 1000


def test_clipping_keeps_x0_and_eps_consistent():
    scheduler = PNDMScheduler(clip_sample=True, clip_sample_range=0.5)
    scheduler.set_timesteps(5)
    x, t = noise(4, 3), scheduler.timesteps[0]
    output = scheduler.step(network(x, t), t, x)
    assert output.pred_original_sample.abs().max() <= 0.5
    process = DiscreteVP(alphas_cumprod())
    eps = (x - process.alpha(800) * output.pred_original_sample) / process.sigma(800)
    torch.testing.assert_close(
        output.prev_sample, process.alpha(600) * output.pred_original_sample + process.sigma(600) * eps
    )


def test_thresholding_scales_by_the_quantile():
    scheduler = PNDMScheduler(thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=3.0)
    scheduler.set_timesteps(5)
    x, t = noise(4, 9), scheduler.timesteps[-1]
    scheduler.set_begin_index(5)
    output = scheduler.step(torch.zeros_like(x), t, 4 * x)
    raw = 4 * x / DiscreteVP(alphas_cumprod()).alpha(0)
    limit = raw.abs().quantile(0.5, dim=1, keepdim=True).clamp(1, 3)
    torch.testing.assert_close(output.pred_original_sample, raw.clamp(-limit, limit) / limit)


@pytest.mark.parametrize("cap", [1.0, 0.5])
def test_thresholding_has_no_cap_at_diffusers_default(cap):
    # With a cap of 1 the limit could only be 1, which is what clip_sample is for.
    scheduler = PNDMScheduler(thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=cap)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(5)
    x = noise(4, 9)
    x0 = scheduler.step(torch.zeros_like(x), scheduler.timesteps[-1], 4 * x).pred_original_sample
    torch.testing.assert_close(x0, x / x.abs().amax(dim=1, keepdim=True))


@every_scheduler
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr(name, kind):
    arguments = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = SCHEDULERS[name](prediction_type=kind, **arguments)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    assert run(scheduler, noise(2, 3), generator=torch.Generator().manual_seed(0)).isfinite().all()
    with pytest.raises(InputError, match=r"prediction_type='epsilon'.*v_prediction or sample"):
        SCHEDULERS[name](**arguments).set_timesteps(10)
    # Leading spacing starts lower, where abar > 0.
    SCHEDULERS[name](rescale_betas_zero_snr=True).set_timesteps(10)


# ------------------------------------------------------------------ runs that begin, end and are edited anywhere


@every_scheduler
def test_a_run_may_begin_at_any_slot(name):
    """With the constant eps of clean data x_0 each start must arrive at x_0."""
    scheduler = SCHEDULERS[name]()
    if "eta" in name:
        scheduler = DDIMScheduler(eta=0.5)
    scheduler.set_timesteps(8)
    x0, eps = noise(2, 3), noise(2, 3, seed=1)
    for begin in range(len(scheduler.timesteps)):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)
        x = scheduler.add_noise(x0, eps, scheduler.timesteps[begin : begin + 1])
        for t in scheduler.timesteps[begin:]:
            exact = (x - scheduler.add_noise(x0, 0 * eps, t[None])) / scheduler.add_noise(0 * eps, eps / eps, t[None])
            x = scheduler.step(exact, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        assert relative(x, x0) < 1e-9, f"from slot {begin}"


@every_scheduler
def test_what_is_handed_back_belongs_to_the_next_timestep(name):
    """Cut anywhere (denoising_end), the sample is one at the next slot's noise level."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(8)
    x0, eps = noise(2, 3), noise(2, 3, seed=1)
    x = scheduler.add_noise(x0, eps, scheduler.timesteps[:1])
    for t, after in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        scale = scheduler.add_noise(0 * eps, torch.ones_like(eps), t[None])
        current = (x - scheduler.add_noise(x0, 0 * eps, t[None])) / scale
        x = scheduler.step(current, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        if "eta" not in name and name != "rk4":  # Runge-Kutta in t reaches the level only to its order
            assert relative(x, scheduler.add_noise(x0, eps, after[None])) < 1e-9


@pytest.mark.parametrize("name", ["heun", "plms", "f-pndm", "rk4"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_edit_at_an_inner_stage_is_not_lost(name, in_place):
    """The step goes on from the edited sample; without the edit it would have started at its own."""
    scheduler = SCHEDULERS[name]()
    x0, eps = noise(2, 3), noise(2, 3, seed=1)

    def edit(i, x):
        if i != 0:
            return x
        known = scheduler.add_noise(x0, eps, scheduler.timesteps[1:2])
        return x.copy_(known) if in_place else known

    scheduler.set_timesteps(6)
    edited = run(scheduler, noise(2, 3, seed=5), edit=edit)
    scheduler.set_timesteps(6)
    assert relative(edited, run(scheduler, noise(2, 3, seed=5))) > 1e-3
    # From slot 1 on this is a run that began there, but for what the first evaluation left in the history.
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(1)
    begun = run(scheduler, scheduler.add_noise(x0, eps, scheduler.timesteps[1:2]), start=1)
    if name in ("heun", "rk4"):
        assert torch.equal(edited, begun)
    else:
        assert relative(edited, begun) < 0.3
    # Equal values in another tensor are no edit.
    scheduler.set_timesteps(6)
    cloned = run(scheduler, noise(2, 3, seed=5), edit=lambda i, x: x.clone())
    scheduler.set_timesteps(6)
    assert torch.equal(cloned, run(scheduler, noise(2, 3, seed=5)))


@every_scheduler
def test_reindexing_particles_in_the_middle_of_a_run(name):
    index = torch.tensor([2, 2, 0])

    def with_take(at):
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(6)

        def edit(i, x):
            if i != at:
                return x
            scheduler.take(index)
            return x[index]

        # One generator per sample, all alike, so that noise does not tell the particles apart.
        return run(scheduler, noise(3, 4), edit=edit, generator=None if "eta" not in name else generators())

    def generators():
        return [torch.Generator().manual_seed(0) for _ in range(3)]

    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(6)
    slots = len(scheduler.timesteps)
    whole = run(scheduler, noise(3, 4), generator=None if "eta" not in name else generators())
    for at in range(slots):
        assert relative(with_take(at), whole[index]) < 1e-12


@every_scheduler
def test_a_copy_in_the_middle_of_a_run_goes_its_own_way(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(6)
    x = noise(2, 3)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(network(x, t), t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    other, y = copy.deepcopy(scheduler), x.clone()
    for t in scheduler.timesteps[3:]:
        x = scheduler.step(network(x, t), t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    for t in other.timesteps[3:]:
        y = other.step(network(y, t), t, y, generator=torch.Generator().manual_seed(0)).prev_sample
    assert torch.equal(x, y)


def test_a_second_run_without_set_timesteps_starts_afresh():
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(6)
    assert torch.equal(run(scheduler, noise(2, 3)), run(scheduler, noise(2, 3)))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 1.5),
        ("beta_start", 0.0),
        ("beta_end", 1.0),
        ("beta_schedule", "cosine"),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", [0.0] * 1000),
        ("prediction_type", "score"),
        ("timestep_spacing", "karras"),
        ("steps_offset", -1),
        ("clip_sample_range", 0.0),
        ("sample_max_value", -1.0),
        ("dynamic_thresholding_ratio", 0.0),
    ],
)
def test_a_wrong_setting_is_refused_by_name(parameter, value):
    with pytest.raises(InputError) as refused:
        DDIMScheduler(**{parameter: value})
    assert refused.value.parameter == parameter


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None])
def test_a_wrong_number_of_steps_is_refused(steps):
    with pytest.raises(InputError, match="num_inference_steps"):
        PNDMScheduler().set_timesteps(steps)


@pytest.mark.parametrize("timesteps", [[], [10, 10], [1, 2], [1000, 5], [5, -1], [float("nan")]])
def test_wrong_timesteps_are_refused(timesteps):
    with pytest.raises(InputError, match="timesteps"):
        PNDMScheduler().set_timesteps(timesteps=timesteps)


def test_wrong_use_is_refused():
    scheduler, x = PNDMScheduler(), noise(2, 3, 4, 4)
    with pytest.raises(InputError, match="set_timesteps"):
        scheduler.step(x, 1, x)
    scheduler.set_timesteps(10)
    with pytest.raises(InputError, match="timestep=3"):
        scheduler.step(x, 3, x)
    scheduler.step(x, 900, x)
    with pytest.raises(InputError, match=r"timestep=700 .*800"):
        scheduler.step(x, 700, x)
    with pytest.raises(InputError, match=r"model_output.*learned variance must be split off"):
        scheduler.step(torch.cat([x, x], 1), 800, x)
    with pytest.raises(InputError, match="model_output"):
        scheduler.step(x[:1], 800, x)
    with pytest.raises(InputError, match="begin_index"):
        scheduler.set_begin_index(11)
    with pytest.raises(InputError, match=r"steps_offset=1"):
        PNDMScheduler(steps_offset=1).set_timesteps(1000)
    with pytest.raises(InputError, match=r"betastart.*did you mean 'beta_start'"):
        PNDMScheduler(betastart=0.1)
    with pytest.raises(InputError, match="list of 2"):
        ddim = DDIMScheduler(eta=1.0)
        ddim.set_timesteps(4)
        ddim.step(x, 750, x, generator=[torch.Generator()])


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULERS)),
    train=st.integers(1, 40),
    steps=st.integers(1, 45),
    offset=st.integers(0, 2),
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    one=st.booleans(),
    zero=st.booleans(),
    clip=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_valid_setting_runs(name, train, steps, offset, schedule, spacing, kind, one, zero, clip, dtype):
    try:
        scheduler = SCHEDULERS[name](
            num_train_timesteps=train,
            steps_offset=offset,
            beta_schedule=schedule,
            timestep_spacing=spacing,
            prediction_type=kind,
            set_alpha_to_one=one,
            rescale_betas_zero_snr=zero,
            clip_sample=clip,
        )
        scheduler.set_timesteps(steps)
    except InputError as error:
        if error.parameter == "num_inference_steps":
            assert steps > train or (name == "f-pndm" and steps < 4) or (spacing == "leading" and offset)
        else:
            assert error.parameter == "prediction_type"
            assert zero
            assert kind == "epsilon"
        return
    x = run(scheduler, noise(2, 3, dtype=dtype), generator=torch.Generator().manual_seed(0))
    assert x.dtype == dtype
    assert x.isfinite().all()


# ------------------------------------------------------------------ stock pipelines


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@every_scheduler
def test_unconditional_pipeline(name):
    pipe = tiny.unconditional()
    kind = type(SCHEDULERS[name]())
    own = {k: SCHEDULERS[name]().config[k] for k in kind._own_settings}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **own)
    images = [pipe(batch_size=2, num_inference_steps=6, generator=seeded(), output_type="np").images for _ in "ab"]
    assert images[0].shape == (2, 8, 8, 1)
    assert np.isfinite(images[0]).all()
    np.testing.assert_array_equal(*images)
    each = [torch.Generator().manual_seed(i) for i in range(2)]
    assert pipe(batch_size=2, num_inference_steps=6, generator=each, output_type="np").images.shape == (2, 8, 8, 1)


def test_unconditional_pipeline_against_integrate():
    pipe = tiny.unconditional()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    image = pipe(num_inference_steps=6, generator=seeded(), output_type="np").images
    solver = pipe.scheduler._solver
    with torch.no_grad():
        net = denoiser(solver.process, lambda x, t: pipe.unet(x, t).sample)
        x = integrate(solver, net, torch.randn(1, 1, 8, 8, generator=seeded()), spaced("leading", 6, 1000)).x
    np.testing.assert_allclose(image[0, :, :, 0], (x / 2 + 0.5).clamp(0, 1)[0, 0], atol=1e-5)


def test_stable_diffusion_with_its_shipped_scheduler_is_unchanged_by_ours():
    """Stable Diffusion 1's own settings: PLMS, leading, offset 1, ending at abar_0."""
    pipe = tiny.stable_diffusion()
    arguments = tiny.EMBEDS | {"height": 16, "width": 16, "num_inference_steps": 12, "output_type": "latent"}
    stock = pipe(**arguments, generator=seeded()).images
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    assert relative(pipe(**arguments, generator=seeded()).images, stock) < 1e-4


@every_scheduler
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_stable_diffusion_img2img_and_inpainting(name, spacing):
    pipe = tiny.stable_diffusion()
    kind = type(SCHEDULERS[name]())
    own = {k: SCHEDULERS[name]().config[k] for k in kind._own_settings}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing=spacing, **own)
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    common = tiny.EMBEDS | {"num_inference_steps": 6, "output_type": "latent"}
    size = {"height": 16, "width": 16}
    jobs = [
        (pipe, size),
        (diffusers.StableDiffusionImg2ImgPipeline, {"image": image, "strength": 0.6}),
        (diffusers.StableDiffusionInpaintPipeline, {"image": image, "mask_image": mask, "strength": 0.7} | size),
    ]
    for job, arguments in jobs:
        if job is not pipe:
            job = job(**pipe.components, requires_safety_checker=False)
            job.set_progress_bar_config(disable=True)
        result = [job(**common, **arguments, generator=seeded()).images for _ in "ab"]
        assert result[0].isfinite().all()
        assert torch.equal(*result)


@pytest.mark.parametrize(("name", "evaluations"), [("ddim", 5), ("heun", 9), ("prk", 17)])
def test_img2img_begins_at_the_asked_strength(name, evaluations):
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**tiny.stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    scheduler = SCHEDULERS[name](steps_offset=1)
    pipe.scheduler = scheduler
    seen = []
    pipe.unet.register_forward_hook(lambda module, args, kwargs, out: seen.append(float(args[1])), with_kwargs=True)
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    pipe(**tiny.EMBEDS, image=image, strength=0.5, num_inference_steps=10, generator=seeded(), output_type="latent")
    assert seen[0] == 401
    assert len(seen) == evaluations


def test_inpainting_keeps_what_is_known():
    """The classic loop overwrites the known half at every slot, inner stages included."""
    pipe = diffusers.StableDiffusionInpaintPipeline(**tiny.stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    results = []
    for name in ("ddim", "heun", "f-pndm"):
        pipe.scheduler = SCHEDULERS[name](steps_offset=1, beta_schedule="scaled_linear")
        out = pipe(
            **tiny.EMBEDS, image=image, mask_image=mask, height=16, width=16, num_inference_steps=8,
            generator=seeded(), output_type="latent",
        ).images  # fmt: skip
        results.append(out[..., :4])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize(("name", "gap"), [("ddim", 1e-6), ("plms", 5e-3), ("f-pndm", 5e-3), ("heun", 5e-3)])
def test_sdxl_base_and_refiner_share_a_run(name, gap):
    """denoising_end, then denoising_start at the same fraction: as one run, but for the lost history."""
    pipe = tiny.sdxl()
    config = pipe.scheduler.config
    kind = type(SCHEDULERS[name]())
    pipe.scheduler = kind.from_config(config, **{k: SCHEDULERS[name]().config[k] for k in kind._own_settings})
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    common = tiny.XL_EMBEDS | {"num_inference_steps": 10, "output_type": "latent"}
    size = {"height": 16, "width": 16}
    whole = pipe(**common, **size, generator=seeded()).images
    half = pipe(**common, **size, denoising_end=0.7, generator=seeded()).images
    both = refiner(**common, image=half, denoising_start=0.7, generator=seeded()).images
    assert relative(both, whole) < gap


def test_callbacks_and_a_compiled_network():
    pipe = tiny.stable_diffusion()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, variant="f-pndm")
    arguments = tiny.EMBEDS | {"height": 16, "width": 16, "num_inference_steps": 5, "output_type": "latent"}
    plain = pipe(**arguments, generator=seeded()).images
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append(float(t))
        return {"latents": tensors["latents"]}

    assert torch.equal(pipe(**arguments, generator=seeded(), callback_on_step_end=callback).images, plain)
    assert len(seen) == 14
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert relative(pipe(**arguments, generator=seeded()).images, plain) < 1e-5


def test_an_interrupted_pipeline_starts_afresh():
    pipe = tiny.stable_diffusion()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    arguments = tiny.EMBEDS | {"height": 16, "width": 16, "num_inference_steps": 6, "output_type": "latent"}
    plain = pipe(**arguments, generator=seeded()).images

    def stop(pipe, i, t, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**arguments, generator=seeded(), callback_on_step_end=stop)
    assert torch.equal(pipe(**arguments, generator=seeded()).images, plain)


def test_learned_variance_is_refused_in_a_sentence():
    pipe = tiny.unconditional(out_channels=2)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="learned variance"):
        pipe(num_inference_steps=4, generator=seeded())


# ------------------------------------------------------------------ configuration and reload


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=True),
        diffusers.DDIMScheduler(set_alpha_to_one=False, steps_offset=1, thresholding=True),
        diffusers.PNDMScheduler(skip_prk_steps=True, prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", beta_end=0.015),
        diffusers.DPMSolverMultistepScheduler(rescale_betas_zero_snr=True, beta_schedule="scaled_linear"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_settings_come_over_from_other_schedulers(scheduler, caplog):
    ours = PNDMScheduler.from_config(scheduler.config, variant="s-pndm")
    shared = [n for n in ours.config if n in scheduler.config and not n.startswith("_")]
    changed = {n for n in shared if n not in scheduler.config["_use_default_values"]}
    assert changed
    assert all(ours.config[n] == scheduler.config[n] for n in changed)
    assert ours.config.variant == "s-pndm"
    assert not caplog.records
    # And back, and between ours.
    type(scheduler).from_config(ours.config)
    assert "variant" not in HeunScheduler.from_config(ours.config).config


def test_a_saved_pipeline_reloads_in_a_fresh_process(tmp_path: Path):
    pipe = tiny.unconditional()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, variant="f-pndm", timestep_spacing="trailing")
    pipe.save_pretrained(tmp_path / "pipe")
    expected = pipe(num_inference_steps=5, generator=seeded(), output_type="np").images
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["steersman.diffusion", "PNDMScheduler"]
    code = f"""
import sys
import steersman.diffusion
assert not {{"torch", "diffusers"}} & set(sys.modules)
import numpy as np, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "pipe")!r})
pipe.set_progress_bar_config(disable=True)
assert type(pipe.scheduler).__module__ == "steersman.diffusion" and pipe.scheduler.config.variant == "f-pndm"
generator = torch.Generator().manual_seed(0)
images = pipe(num_inference_steps=5, generator=generator, output_type="np").images
np.save({str(tmp_path / "again.npy")!r}, images)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "again.npy"), expected)


def test_hub_downloads_may_name_the_room():
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    assert LOADABLE_CLASSES["steersman.diffusion"]["SchedulerMixin"] == ["save_pretrained", "from_pretrained"]


def test_a_subclass_outside_the_package_needs_only_make_solver():
    class Mine(SolverScheduler):
        """A scheduler of one's own."""

        def make_solver(self, process, *, strength: float = 0.25):
            from steersman.diffusion.classical import DDIM

            return DDIM(process, eta=strength)

    scheduler = Mine.from_config(diffusers.DDPMScheduler().config, strength=0.5)
    assert scheduler.config.strength == 0.5
    assert Mine.__module__ == __name__
    scheduler.set_timesteps(4)
    assert run(scheduler, noise(2, 3)).isfinite().all()
    with pytest.raises(InputError, match=r"strenth.*did you mean 'strength'"):
        Mine(strenth=1)
