"""Guidance in classic and modular pipelines: what reaches the scheduler, which rows are evaluated, what is refused."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.configuration_utils import register_to_config

from steersman.diffusion import (
    ClassConditionalPipeline,
    DPMSolverPPScheduler,
    Guidance,
    StockGuidance,
    installed,
    load_steered,
    save_steered,
)
from steersman.diffusion.guidance import Moment, _own_channels, alpha_bar
from steersman.errors import InputError
from tests.diffusion import tiny


class CFG(Guidance):
    """Classifier-free guidance that leaves the unconditional branch out from a call on, of all rows or of some."""

    rowwise = True

    @register_to_config
    def __init__(self, scale: float = 3.0, stop: int = 1000, rows: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.scale, self.stop, self.rows, self.seen = scale, stop, rows, []

    def begin(self, moment):
        self.seen = []

    def needs_uncond(self, moment):
        self.seen.append((moment.i, moment.n, moment.timestep))
        if moment.i < self.stop:
            return True
        return False if self.rows is None else torch.tensor([i in self.rows for i in range(len(moment.x))])

    def guide(self, cond, uncond, moment):
        return cond if uncond is None else uncond + self.scale * (cond - uncond)


def classes() -> ClassConditionalPipeline:
    net = tiny.unconditional(num_class_embeds=4).unet
    pipe = ClassConditionalPipeline(net, DDIMScheduler(clip_sample=False), null_label=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, scale: float, rows: int = 2, **more) -> torch.Tensor:
    asked: dict
    if isinstance(pipe, ClassConditionalPipeline):
        asked, shape = {"labels": [0, 1, 2][:rows]}, (rows, 1, 8, 8)
    else:
        g = torch.Generator().manual_seed(2)
        asked, shape = {"height": 16, "width": 16}, (rows, 4, 8, 8)
        asked |= {name: torch.randn(rows, 3, 16, generator=g) for name in ("prompt_embeds", "negative_prompt_embeds")}
        if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
            names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            asked |= {name: torch.randn(rows, 16, generator=g) for name in names}
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    asked |= {"num_inference_steps": 5} | more
    return pipe(latents=latents, guidance_scale=scale, output_type="latent", **asked).images


@pytest.fixture(params=["stable diffusion", "classes", "sdxl"])
def pipe(request):
    made = {"stable diffusion": tiny.stable_diffusion, "classes": classes, "sdxl": tiny.sdxl}[request.param]()
    made.set_progress_bar_config(disable=True)
    return made


def counted(pipe) -> list[int]:
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["sample"])), with_kwargs=True
    )
    return rows


# ------------------------------------------------------------------ what reaches the scheduler


def test_classifier_free_guidance_by_the_hook_is_the_pipelines_own_bitwise(pipe):
    own = draw(pipe, 3.0)
    with CFG(3.0).install(pipe):
        assert torch.equal(draw(pipe, 9.0), own)  # whatever scale the pipeline is called with
        assert torch.equal(draw(pipe, 1.5), own)
    assert torch.equal(draw(pipe, 3.0), own)


def test_in_half_precision_too():
    pipe = classes()
    pipe.unet.to(torch.bfloat16)
    own = draw(pipe, 3.0)
    with CFG(3.0).install(pipe):
        assert torch.equal(draw(pipe, 9.0), own)


def test_rows_that_are_not_needed_are_not_evaluated(pipe):
    with CFG(3.0, stop=2).install(pipe) as method:
        rows = counted(pipe)
        draw(pipe, 9.0)
        last = method.seen[-1][0]
    assert rows == [4, 4] + [2] * (last - 1)


def test_a_row_without_its_other_branch_is_as_if_alone(pipe):
    whole = draw(pipe, 3.0)
    with CFG(3.0, stop=2).install(pipe):
        cut = draw(pipe, 9.0)
    with CFG(3.0, stop=2, rows=(1,)).install(pipe):
        rows = counted(pipe)
        mixed = draw(pipe, 9.0)
    assert set(rows[2:]) == {3}
    torch.testing.assert_close(mixed[1], whole[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[0], cut[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(cut[0], whole[0], atol=1e-3)


def test_a_method_knows_where_in_the_run_it_is():
    pipe = classes()
    with CFG().install(pipe) as method:
        draw(pipe, 2.0)
        assert [i for i, _, _ in method.seen] == [0, 1, 2, 3, 4]
        assert [t for _, _, t in method.seen] == pipe.scheduler.timesteps.tolist()
        draw(pipe, 2.0, num_inference_steps=3)  # begins anew
        assert [(i, n) for i, n, _ in method.seen] == [(0, 3), (1, 3), (2, 3)]


def test_image_to_image_begins_in_the_middle():
    pipe = tiny.stable_diffusion()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def run(scale):
        generator = torch.Generator().manual_seed(0)
        more = {"strength": 0.5, "num_inference_steps": 8, "output_type": "latent"}
        return pipe(image=image, guidance_scale=scale, generator=generator, **tiny.EMBEDS, **more).images

    own = run(3.0)
    with CFG(3.0).install(pipe) as method:
        assert torch.equal(run(9.0), own)
    assert [(i, n) for i, n, _ in method.seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_dit_has_its_rows_the_other_way_round():
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipe = diffusers.DiTPipeline(net, tiny.stable_diffusion().vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)

    def run(scale):
        generator = torch.Generator().manual_seed(0)
        made = pipe([1, 2], guidance_scale=scale, generator=generator, num_inference_steps=3, output_type="np")
        return torch.from_numpy(made.images)

    own = run(3.0)
    with CFG(3.0).install(pipe):
        assert torch.equal(run(9.0), own)


def test_the_networks_noise_is_the_same_whatever_it_predicts():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 4, 4, generator=g), torch.randn(2, 1, 4, 4, generator=g)
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = DDIMScheduler(prediction_type=kind)
        moment = Moment(0, 10, 300.0, None, scheduler)
        alpha, sigma = moment.levels
        assert alpha**2 == pytest.approx(float(scheduler.alphas_cumprod[300]), rel=1e-6)
        moment.x = alpha * x0 + sigma * eps
        output = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]
        torch.testing.assert_close(moment.eps(output), eps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moment.x0(output), x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moment.output(eps), output, rtol=1e-5, atol=1e-5)
    moment = Moment(0, 10, 300.0, 0.7 * x0 + 0.3 * eps, FlowMatchEulerDiscreteScheduler())
    torch.testing.assert_close(moment.eps(eps - x0), eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moment.x0(eps - x0), x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moment.output(eps), eps - x0, rtol=1e-5, atol=1e-5)


def test_levels_between_timesteps_are_those_of_eulers_sigmas():
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(7)
    for t, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        assert (1 / alpha_bar(scheduler, t) - 1) ** 0.5 == pytest.approx(sigma, rel=2e-3)


def test_our_schedulers_get_the_unconditional_output_where_a_method_pairs():
    class Paired(CFG):
        pairs = True

    pipe = classes()
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    seen, kept = [], []
    inner = pipe.scheduler._predict_uncond

    def spy(output, x, slot):
        seen.append(output)
        return inner(output, x, slot)

    pipe.scheduler._predict_uncond = spy
    # A hook from before the guidance's own runs first, and sees what the network says; uncond comes first here.
    watch = pipe.unet.register_forward_hook(lambda module, args, output: kept.append(output[0].chunk(2)[0]))
    with Paired().install(pipe):
        draw(pipe, 2.0)
    watch.remove()
    assert len(seen) == 5 and pipe.scheduler.uncond_output is None
    assert all(torch.equal(a, b) for a, b in zip(seen, kept, strict=True))


def test_only_guidances_that_say_so_answer_row_by_row():
    class Whole(CFG):
        rowwise = False

    class Numbers(CFG):
        def needs_uncond(self, moment):
            return torch.zeros(len(moment.x) + 1, dtype=torch.bool)

    pipe = classes()
    with Whole(stop=1, rows=(0,)).install(pipe), pytest.raises(InputError, match="Whole is not rowwise"):
        draw(pipe, 2.0)
    with Numbers().install(pipe), pytest.raises(InputError, match=r"shape \(3,\).*bool tensor of shape \(2,\)"):
        draw(pipe, 2.0)
    with Whole(stop=1).install(pipe):
        draw(pipe, 2.0)


# ------------------------------------------------------------------ diffusers' guiders


def test_stock_guiders_act_in_classic_pipelines(pipe):
    own = draw(pipe, 3.0)
    with StockGuidance(ClassifierFreeGuidance(guidance_scale=3.0)).install(pipe):
        assert torch.equal(draw(pipe, 9.0), own)
    with StockGuidance(ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5)).install(pipe):
        rows = counted(pipe)
        draw(pipe, 9.0)
    assert sorted(set(rows)) == [2, 4]
    with StockGuidance(AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.0)).install(pipe):
        assert not torch.allclose(draw(pipe, 9.0), own, atol=1e-4)


def test_stock_guiders_with_momentum_have_it_in_each_run_anew():
    pipe, seen = classes(), []
    guider = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.75)
    same = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.75)

    class Beside(StockGuidance):
        def guide(self, cond, uncond, moment):
            same.set_state(moment.i, moment.n, torch.tensor(moment.timestep))
            same.prepare_inputs({})  # as modular pipelines do it
            seen.append((super().guide(cond, uncond, moment), same.forward(cond, uncond).pred))
            return seen[-1][0]

    with Beside(guider).install(pipe):
        first = draw(pipe, 2.0)
        assert torch.equal(draw(pipe, 2.0), first)
    assert all(torch.equal(a, b) for a, b in seen)
    with StockGuidance(AdaptiveProjectedGuidance(guidance_scale=3.0)).install(pipe):
        assert not torch.allclose(draw(pipe, 2.0), first, atol=1e-4)


def test_stock_guiders_are_saved_with_their_pipeline(tmp_path):
    pipe = classes()
    StockGuidance(ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5)).install(pipe)
    own = draw(pipe, 2.0)
    save_steered(pipe, tmp_path)
    again = load_steered(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, 2.0), own)
    (tmp_path / "steering" / "0" / "guider_config.json").write_text('{"_class_name": "AutoGuidance"}')
    with pytest.raises(InputError, match="guiders of two branches"):
        load_steered(tmp_path)


@pytest.fixture(scope="module")
def modular():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from steersman.reference import scenes

    tokenizer = scenes.pipeline().tokenizer
    torch.manual_seed(0)
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    source = tiny.sdxl()
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(
        unet=source.unet, vae=source.vae, scheduler=source.scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=text, text_encoder_2=text,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular_draw(pipe) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipe(prompt="a cat", latents=latents, num_inference_steps=4, output="images", output_type="latent")


def test_it_is_a_guider_of_modular_pipelines(modular, tmp_path):
    modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    own = modular_draw(modular)
    method = CFG(3.0)
    modular.update_components(guider=method)
    assert torch.equal(modular_draw(modular), own)
    rows = counted(modular)
    modular.update_components(guider=CFG(3.0, stop=2))
    modular_draw(modular)
    assert len(rows) == 6  # two calls in each of two steps, then one
    method.save_pretrained(tmp_path)
    again = CFG.from_pretrained(tmp_path)
    assert again.config["scale"] == 3.0
    modular.update_components(guider=again)
    assert torch.equal(modular_draw(modular), own)


def test_a_guider_that_must_know_the_process_says_so(modular):
    class Noisy(CFG):
        def guide(self, cond, uncond, moment):
            moment.eps(cond)
            return super().guide(cond, uncond, moment)

    modular.update_components(guider=Noisy(3.0))
    with pytest.raises(InputError, match=r"scheduler=None .* guider.bind"):
        modular_draw(modular)
    guider = Noisy(3.0)
    guider.bind(modular.scheduler)
    modular.update_components(guider=guider)
    modular_draw(modular)


# ------------------------------------------------------------------ bad input


def test_one_branch_is_refused():
    pipe = classes()
    with CFG().install(pipe), pytest.raises(InputError, match=r"guidance_scale=1.0 .* above 1 while CFG is installed"):
        draw(pipe, 1.0)
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    with CFG().install(pipe), pytest.raises(InputError, match=r"guidance_scale=1\.0"):
        draw(pipe, 1.0, rows=1)


def test_a_guidance_distilled_network_is_refused():
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = tiny._unet(time_cond_proj_dim=8)
    with CFG().install(pipe), pytest.raises(InputError, match="distilled into this network"):
        draw(pipe, 3.0)


def test_batches_that_are_not_two_branches_are_refused():
    """Three branches of two prompts are six rows: an even number, which says nothing."""
    plain = tiny.stable_diffusion()
    plain.unet = tiny._unet(in_channels=8)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**plain.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    embeds = {name: value.expand(2, -1, -1) for name, value in tiny.EMBEDS.items() if value.ndim == 3}
    arguments = {"image": torch.rand(2, 3, 16, 16), "num_inference_steps": 2, "output_type": "latent"} | embeds
    pipe(image_guidance_scale=1.5, guidance_scale=3.0, **arguments)
    with CFG().install(pipe), pytest.raises(InputError, match=r"InstructPix2PixPipeline.* both in one batch"):
        pipe(image_guidance_scale=1.5, guidance_scale=3.0, **arguments)


def test_another_pipeline_with_the_same_network_is_refused():
    """``from_pipe`` and ``Pipeline(**pipe.components)`` share networks, and so their hooks."""
    pipe = tiny.stable_diffusion()
    with CFG().install(pipe):
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        parts = pipe.components | {"scheduler": scheduler}
        other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        with pytest.raises(InputError, match="the one that CFG is installed on"):
            draw(other, 3.0)
        draw(pipe, 3.0)
        with pytest.raises(InputError, match="in the pipeline that it is installed on"):
            draw(other, 3.0)


def test_the_sample_is_found_among_the_channels():
    network = tiny._unet(in_channels=9)  # of 4 output channels
    assert _own_channels(network, torch.zeros(2, 9, 8, 8)).shape == (2, 4, 8, 8)  # inpainting
    assert _own_channels(network, torch.zeros(2, 14, 9, 8, 8)).shape == (2, 14, 4, 8, 8)  # a video, frames first
    assert _own_channels(network, torch.zeros(2, 64, 9)).shape == (2, 64, 9)  # tokens


def test_levels_are_read_once_and_only_inside_the_schedule():
    scheduler = DDIMScheduler()
    first = alpha_bar(scheduler, 500)
    table = scheduler.alphas_cumprod
    assert first == float(table[500].double())
    with pytest.raises(InputError, match="from 0 to 999"):
        alpha_bar(scheduler, -0.4)
    continuous = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", sigma_max=700.0)
    with pytest.raises(InputError, match="with timesteps"):
        alpha_bar(continuous, 1.6)


def test_hooks_are_not_traced_in_a_network_compiled_in_place():
    pipe, graphs = classes(), []
    own = draw(pipe, 3.0, num_inference_steps=12)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe.unet.compile(backend=backend)
    with CFG(3.0).install(pipe):
        torch.testing.assert_close(draw(pipe, 2.0, num_inference_steps=12), own)
        many = len(graphs)
        draw(pipe, 2.0, num_inference_steps=12)
    assert len(graphs) == many


def test_two_guidances_and_wrong_objects_are_refused():
    pipe = classes()
    first = CFG().install(pipe)
    with pytest.raises(InputError, match="only one on the pipeline"):
        CFG().install(pipe)
    with pytest.raises(InputError, match="on no pipeline"):
        first.install(pipe)
    assert installed(pipe) == (first,)
    first.uninstall()
    assert installed(pipe) == () and not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks
    with pytest.raises(InputError, match="installed on a pipeline"):
        first.uninstall()
    with pytest.raises(InputError, match="a unet or a transformer"):
        CFG().install(object())
    with pytest.raises(InputError, match="guiders of pred_cond and pred_uncond"):
        StockGuidance(object())  # type: ignore[arg-type]
