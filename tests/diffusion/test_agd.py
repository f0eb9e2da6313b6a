"""AGD: adapters, the trajectories that they learn from, the loop, and both kinds of pipelines."""

from __future__ import annotations

import hashlib
import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import ClassifierFreeGuidance, DDIMScheduler, DiTTransformer2DModel, SD3Transformer2DModel, UNet2DModel
from torch.nn import functional as F

from steersman import catalog
from steersman.diffusion import (
    AGD,
    AGDAdapters,
    AGDConfig,
    AGDGuidance,
    AGDTrainingConfig,
    CFGPlusPlus,
    ClassConditionalPipeline,
    DPMSolverPPScheduler,
    collect_cfg_trajectories,
    inject_agd,
    load_steered,
    save_steered,
    train_agd,
)
from steersman.diffusion.agd import (
    Conditions,
    ScalarEncoder,
    Trajectories,
    apply,
    missed_guidance,
    noised_pairs,
    read_parts,
    stream_cfg_trajectories,
)
from steersman.diffusion.agd.adapters import AdditiveAdapter, AttentionAdapter, MLPGateAdapter, PositionAdapter
from steersman.diffusion.agd.training import Student, loss_of
from steersman.errors import InputError, TrialError
from tests.diffusion import tiny

FORMS = ("attention", "additive", "mlp_gate", "learned_pos_emb")
T = torch.tensor(500)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def class_unet() -> UNet2DModel:
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=4,
    )  # fmt: skip
    return net.eval()


def classes() -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(class_unet(), DDIMScheduler(clip_sample=False), null_label=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit(out_channels: int = 4) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=out_channels, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for p in net.parameters():  # so that its zero gates let the blocks act
        p.data += 0.1 * torch.randn(p.shape)
    return net.eval()


def dit_pipeline() -> diffusers.DiTPipeline:
    net = dit(8)
    pipe = diffusers.DiTPipeline(net, tiny._vae(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def networks():
    x = torch.randn(2, 4, 8, 8, generator=seeded(1))
    prompt = torch.randn(2, 5, 16, generator=seeded(2))
    yield class_unet(), (x[:, :1],), {"timestep": T, "class_labels": torch.tensor([0, 2])}
    yield tiny._unet().eval(), (x,), {"timestep": T, "encoder_hidden_states": prompt}
    yield dit(), (x,), {"timestep": T[None].expand(2), "class_labels": torch.tensor([0, 2])}
    torch.manual_seed(0)
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    given = {"timestep": T[None].expand(2), "encoder_hidden_states": prompt, "pooled_projections": torch.randn(2, 8)}
    yield sd3.eval(), (x,), given


@torch.no_grad()
def out(net, args, given) -> torch.Tensor:
    return net(*args, **given, return_dict=False)[0]


def stirred(adapters: AGDAdapters, scale: float = 0.3, seed: int = 0) -> AGDAdapters:
    """Adapters that do something."""
    g = seeded(seed)
    for p in adapters.parameters():
        p.data += scale * torch.randn(p.shape, generator=g)
    adapters.set_agd(float(adapters.guidance_scale[0]))
    return adapters


def trained(pipe, steps: int = 3, scale: float = 3.0, **config) -> AGD:
    asked = [0, 1, 2, 0] if isinstance(pipe, ClassConditionalPipeline) else ["a"] * 4
    data = collect_cfg_trajectories(pipe, asked, num_inference_steps=4, batch_size=4, generator=seeded(3))
    assert isinstance(data, Trajectories)
    settings = AGDTrainingConfig(max_steps=steps, batch_size=8, learning_rate=0.01, warmup=0.0)
    agd = train_agd(pipe, data, AGDConfig(hidden_dim=8, **config), settings)
    agd.guidance_scale = scale
    return agd


def digest(net) -> str:
    sha = hashlib.sha256()
    for name, value in net.state_dict().items():
        sha.update(name.encode() + value.numpy().tobytes())
    return sha.hexdigest()


# ------------------------------------------------------------------ the adapters


@pytest.mark.parametrize("arch", FORMS)
def test_fresh_adapters_change_nothing(arch):
    for net, args, given in networks():
        own = out(net, args, given)
        adapters = inject_agd(net, AGDConfig(arch=arch, hidden_dim=8))
        adapters.set_agd(5.0)
        assert torch.equal(out(net, args, given), own), type(net).__name__
        assert len(adapters.anatomy.targets) >= 2
        stirred(adapters)
        assert not torch.allclose(out(net, args, given), own, atol=1e-3), type(net).__name__
        adapters.remove()
        assert torch.equal(out(net, args, given), own)


def test_every_condition_reaches_every_form():
    for arch in FORMS:
        for net, args, given in networks():
            adapters = stirred(inject_agd(net, AGDConfig(arch=arch, hidden_dim=8)))
            # Only the adapters see what changes: the network's own embedders give what they gave.
            adapters.set_agd(2.0)
            two = out(net, args, given)
            adapters.set_agd(2.5)
            assert not torch.equal(out(net, args, given), two), (arch, type(net).__name__)
            for part in ("time", "label", "prompt"):
                if getattr(adapters.anatomy, part) is None:
                    continue
                adapters.set_agd(2.0)
                for adapter in adapters.adapters:
                    getattr(adapter, part).weight.data.mul_(2)
                assert not torch.equal(out(net, args, given), two), (arch, part, type(net).__name__)
                for adapter in adapters.adapters:
                    getattr(adapter, part).weight.data.div_(2)
            adapters.remove()


def rows_alone(net, adapters, args, given):
    parts = []
    for i in range(2):
        one = {n: (v[i : i + 1] if v.ndim and len(v) == 2 else v) for n, v in given.items()}
        parts.append(out(net, (args[0][i : i + 1],), one))
    return torch.cat(parts)


@pytest.mark.parametrize("arch", [*FORMS, "lora"])
def test_rows_do_not_see_each_other_and_what_is_kept_is_never_stale(arch):
    for net, args, given in networks():
        adapters = stirred(inject_agd(net, AGDConfig(arch=arch, hidden_dim=4)))
        adapters.set_agd(3.0)
        whole = out(net, args, given)
        torch.testing.assert_close(whole, rows_alone(net, adapters, args, given), rtol=1e-4, atol=1e-4)
        # A scale for each row, other times, and then the first again.
        adapters.set_agd(torch.tensor([3.0, 4.0]))
        mixed = out(net, args, given)
        torch.testing.assert_close(mixed[0], whole[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(mixed[1], whole[1], atol=1e-4)
        adapters.set_agd(3.0)
        other = {n: v.flip(0) if n in ("class_labels", "encoder_hidden_states") else v for n, v in given.items()}
        assert not torch.allclose(out(net, args, other), whole, atol=1e-4)
        assert torch.equal(out(net, args, given), whole)
        with torch.enable_grad():  # nothing is kept where gradients are wanted
            slow = net(*args, **given, return_dict=False)[0]
        torch.testing.assert_close(slow.detach(), whole, rtol=1e-5, atol=1e-5)
        times = given["timestep"].clone() if given["timestep"].ndim else given["timestep"].repeat(2)
        torch.testing.assert_close(out(net, args, given | {"timestep": times}), whole, rtol=1e-4, atol=1e-4)
        adapters.remove()


def reference(adapter, x, omega, tau, label, prompt):
    """The four forms in numpy, from their equations."""
    w = {name: value.numpy() for name, value in adapter.state_dict().items()}

    def dense(name, v):
        return v @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def normed(name, v):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        return v * w[f"{name}.weight"] + w[f"{name}.bias"]

    def s(name, a):
        h = np.cos(2 * np.pi * (a[:, None] * w[f"{name}.frequencies"] + w[f"{name}.phases"]))
        h = np.maximum(dense(f"{name}.mlp.0", h), 0)
        if f"{name}.mlp.2.weight" in w:
            h = normed(f"{name}.mlp.2", h)
        return normed(f"{name}.norm", dense(f"{name}.mlp.3", h))

    d = adapter.d
    code = s("scale", adapter.factor * omega)
    if isinstance(adapter, AttentionAdapter):
        tokens = [code[:, None], dense("time", tau)[:, None], dense("label", label)[:, None], dense("prompt", prompt)]
        E = np.concatenate(tokens, axis=1)
        theta = 1e4 ** (-np.arange(0, d, 2) / d)
        p = np.arange(E.shape[1])[:, None] * theta
        E = E + np.concatenate([np.sin(p), np.cos(p)], axis=1)
        q, k, v = dense("q", x), dense("k", E), dense("v", E)
        logits = q @ k.transpose(0, 2, 1) / math.sqrt(d)
        soft = np.exp(logits - logits.max(-1, keepdims=True))
        return dense("out", soft / soft.sum(-1, keepdims=True) @ v)
    e = code + dense("time", tau) + dense("label", label) + dense("prompt", prompt.mean(1))
    if isinstance(adapter, AdditiveAdapter):
        h = normed("hidden.3", np.maximum(dense("hidden.0", e), 0))
        return np.broadcast_to(dense("out", h)[:, None], (*x.shape[:2], x.shape[2] + 1))
    tokens = np.broadcast_to(e[:, None], (*x.shape[:2], d))
    if isinstance(adapter, MLPGateAdapter):
        h = np.concatenate([dense("inner", x), tokens], axis=2)
        gate = 1 / (1 + np.exp(-dense("gate", h)))
        return gate * dense("out", dense("mlp.2", np.maximum(dense("mlp.0", h), 0)))
    index = np.broadcast_to(s("index", np.arange(x.shape[1], dtype=float))[None], tokens.shape)
    return dense("out", np.concatenate([tokens, index], axis=2))


@pytest.mark.parametrize("form", [AttentionAdapter, AdditiveAdapter, MLPGateAdapter, PositionAdapter])
def test_forms_equal_their_equations(form):
    torch.manual_seed(0)
    adapter = form(AGDConfig(hidden_dim=6, cfg_mult=1.5), 4, 5, 7, 3, 8).double().eval()
    for p in adapter.parameters():
        p.data += torch.randn_like(p)
    if form is AttentionAdapter:
        theta = 1e4 ** (-torch.arange(0, 6, 2).double() / 6)
        angle = torch.arange(250).double()[:, None] * theta
        torch.testing.assert_close(adapter.positions, torch.cat([angle.sin(), angle.cos()], 1), rtol=0, atol=1e-6)
        adapter.positions = torch.cat([angle.sin(), angle.cos()], 1)
    shapes = ((3, 9, 4), (3,), (3, 7), (3, 3), (3, 2, 8))
    x, omega, tau, label, prompt = (torch.randn(s, dtype=torch.float64) for s in shapes)
    A = adapter(x, Conditions(omega, tau, label, prompt)).detach().expand(3, 9, 5)
    wanted = reference(adapter, *(v.numpy() for v in (x, omega, tau, label, prompt)))
    np.testing.assert_allclose(A.numpy(), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale_by", ["hidden_dim", "head_dim"])
def test_heads(scale_by):
    torch.manual_seed(0)
    adapter = AttentionAdapter(AGDConfig(hidden_dim=8, num_heads=2, scale_by=scale_by), 4, 4, 7, None, None)
    torch.nn.init.normal_(adapter.out.weight)
    x, omega, tau = torch.randn(2, 5, 4), torch.rand(2), torch.randn(2, 7)
    E = torch.stack([adapter.scale(omega), adapter.time(tau)], 1) + adapter.positions[:2]
    q, k, v = (f(z).unflatten(2, (2, 4)).transpose(1, 2) for f, z in ((adapter.q, x), (adapter.k, E), (adapter.v, E)))
    softness = {"hidden_dim": 8**-0.5, "head_dim": None}[scale_by]  # None is torch's own, of the head's width
    wanted = adapter.out(F.scaled_dot_product_attention(q, k, v, scale=softness).transpose(1, 2).flatten(2))
    torch.testing.assert_close(adapter(x, Conditions(omega, tau)), wanted, rtol=1e-5, atol=1e-5)


def test_one_token_is_refused():
    with pytest.raises(InputError, match=r"timestep=False .* softmax is 1"):
        AGDConfig(timestep=False, condition=False)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    with pytest.raises(InputError, match="neither labels nor prompts"):
        inject_agd(net, AGDConfig(timestep=False))
    # Why: with one key the output does not depend on the query.
    adapter = AttentionAdapter(AGDConfig(hidden_dim=4), 4, 4, None, None, None)
    torch.nn.init.normal_(adapter.out.weight)
    A = adapter(torch.randn(1, 6, 4), Conditions(torch.ones(1)))
    torch.testing.assert_close(A, A[:, :1].expand_as(A))


def toy(equal: bool, steps: int, mult: float = 1.0) -> tuple[float, float]:
    """Training loss and held-out error where both branches are exact Gaussians (2 numbers, 2 classes, any time)."""
    g = seeded(0)
    mu = torch.randn(2, 2, generator=g)
    torch.manual_seed(0)
    adapter = AdditiveAdapter(AGDConfig(arch="additive", hidden_dim=64, cfg_mult=mult), 2, 2, 16, 2, None)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bands = torch.arange(8) * math.pi / 4

    def problem(omega, t, c, x):
        alpha, sigma = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        var = 0.5 * alpha**2 + sigma**2
        own = var if equal else (0.1 + 0.9 * c) * alpha**2 + sigma**2
        eps_c = sigma[:, None] * (x - alpha[:, None] * mu[c]) / own[:, None]
        eps_u = sigma[:, None] * (x - alpha[:, None] * mu.mean(0)) / var[:, None]
        return (omega - 1)[:, None] * (eps_c - eps_u)

    def draw(n, low, high):
        omega, t = low + (high - low) * torch.rand(n, generator=g), torch.rand(n, generator=g)
        c, z = torch.randint(2, (n,), generator=g), torch.randn(n, 2, generator=g)
        x = torch.cos(t * math.pi / 2)[:, None] * mu[c] + z
        tau = torch.cat([torch.sin(t[:, None] * bands), torch.cos(t[:, None] * bands)], 1)
        return Conditions(omega, tau, torch.eye(2)[c]), problem(omega, t, c, x)

    scale = draw(4096, 1, 6)[1].std()
    losses = []
    drawn, targets = draw(256 * steps, 1, 6)
    for i in range(steps):
        rows = slice(256 * i, 256 * (i + 1))
        assert drawn.tau is not None and drawn.label is not None
        c, target = Conditions(drawn.omega[rows], drawn.tau[rows], drawn.label[rows]), targets[rows]
        loss = (adapter(target[:, None], c)[:, 0] - target / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        c, target = draw(4096, 1.5, 5.5)
        error = (adapter(target[:, None], c)[:, 0] - target / scale).square().mean().sqrt()
    return float(np.mean(losses[-50:])), float(error)


def test_what_does_not_depend_on_x_is_learned():
    loss, error = toy(True, 2500)
    assert loss < 2e-4
    assert error < 2e-2


def test_a_large_factor_of_the_scale_does_not_learn():
    assert toy(True, 800, mult=1000.0)[0] > 0.05
    # Its codes of neighbouring scales are unrelated.
    torch.manual_seed(0)
    s = ScalarEncoder(64)
    a = torch.tensor([3.0, 3.01])
    near, far = (F.cosine_similarity(*s(m * a)[:, None]).item() for m in (1.0, 1000.0))
    assert near > 0.99 and far < 0.8


def test_what_depends_on_x_is_not_learned_by_the_additive_form():
    assert toy(False, 800)[0] > 0.1


# ------------------------------------------------------------------ where they sit


def test_placement_of_stable_diffusion():
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel(cross_attention_dim=768, layers_per_block=2)  # its blocks are the default
    every, theirs = (
        AGDAdapters(AGDConfig(hidden_dim=8), _anatomy(net, placement)).anatomy.targets
        for placement in ("all", "official")
    )
    assert len(every) == 16 and len(theirs) == 13
    missing = sorted(set(every) - set(theirs))
    assert missing == [f"up_blocks.{i}.attentions.2.transformer_blocks.0.attn2" for i in (1, 2, 3)]


def _anatomy(net, placement):
    from steersman.diffusion.agd.injection import Anatomy

    return Anatomy.of(net, AGDConfig(hidden_dim=8, placement=placement))


def test_the_width_that_is_not_given_takes_about_two_percent():
    from steersman.reference import digits, scenes

    for pipe, arch in ((digits.pipeline(), "additive"), (scenes.pipeline(), "attention")):
        adapters = inject_agd(pipe.unet)
        assert adapters.config.arch == arch
        assert 0.01 < adapters.share(pipe.unet) <= 0.02
        adapters.remove()


def test_the_network_stays_as_it_was():
    pipe = classes()
    net = pipe.unet
    names, own = list(net.state_dict()), digest(net)
    net.conv_in.weight.requires_grad_(False)
    trained(pipe, arch="additive")
    assert digest(net) == own and list(net.state_dict()) == names
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["conv_in.weight"]
    assert not net.training and not net._forward_hooks and not net._forward_pre_hooks
    adapters = inject_agd(net, AGDConfig(hidden_dim=8))
    assert list(net.state_dict()) == names
    assert not any(p.requires_grad for p in net.parameters()) and all(p.requires_grad for p in adapters.parameters())
    adapters.remove()


# ------------------------------------------------------------------ trajectories


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_targets_are_guidance_at_the_stored_points(dtype, tolerance):
    pipe = classes()
    data = collect_cfg_trajectories(
        pipe, [0, 1, 2], guidance_scale=(1, 12), num_inference_steps=5, batch_size=2, dtype=dtype, generator=seeded(1)
    )
    assert isinstance(data, Trajectories) and data.inputs.shape == (3, 5, 1, 8, 8) and data.inputs.dtype == dtype
    assert data.omegas.min() >= 1 and data.omegas.max() <= 12 and len(set(data.omegas.tolist())) == 3
    points = data.batch(torch.arange(len(data)))
    assert torch.equal(points.condition["class_labels"], torch.tensor([0, 1, 2]).repeat_interleave(5))
    t, y = points.timesteps.long(), points.condition["class_labels"]
    with torch.no_grad():
        cond = pipe.unet(points.inputs, t, class_labels=y).sample
        uncond = pipe.unet(points.inputs, t, class_labels=torch.full_like(y, 3)).sample
    wanted = uncond + points.omegas[:, None, None, None] * (cond - uncond)
    assert (wanted - points.targets).abs().max() <= tolerance * wanted.abs().max()
    # Each point is the scheduler's step from the one before.
    pipe.scheduler.set_timesteps(5)
    x = data.inputs.float()
    for i in range(4):
        step = pipe.scheduler.step(data.targets[:, i].float(), int(data.timesteps[0, i]), x[:, i]).prev_sample
        assert (step - x[:, i + 1]).abs().max() <= tolerance * x.abs().max()
    sigma = (1 - pipe.scheduler.alphas_cumprod[data.timesteps[0].long()]).sqrt()
    torch.testing.assert_close(data.sigmas[0].float(), sigma)


def test_trajectories_of_text_pipelines_keep_what_the_network_was_told():
    pipe = tiny.sdxl()
    embeds = {name: value.expand(2, *value.shape[1:]) for name, value in tiny.XL_EMBEDS.items()}
    # Prompts as embeddings: the texts are placeholders, and left out of the call.
    data = next(_with_embeds(pipe, embeds, 2))
    assert torch.equal(data.condition["encoder_hidden_states"], embeds["prompt_embeds"])
    assert torch.equal(data.condition["added_cond_kwargs.text_embeds"], embeds["pooled_prompt_embeds"])
    points = data.batch(torch.tensor([0, 5]))
    assert set(points.condition["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    # Euler's samples start at 14 times the unit noise; what is kept is the network's input.
    assert data.inputs[:, 0].std() < 1.5 and data.timesteps[0, 0] > data.timesteps[0, -1]
    agd = train_agd(pipe, data, AGDConfig(hidden_dim=8), AGDTrainingConfig(max_steps=2, batch_size=4))
    assert agd.result is not None and agd.result.losses[0] > 0


def _with_embeds(pipe, embeds, n):
    import steersman.diffusion.agd.trajectories as module

    original = module.call

    def call(pipe, asked, noise, steps, negative_prompt=None, generator=None, guidance_scale=2.0, **arguments):
        height = {"height": 16, "width": 16, "output_type": "latent"}
        return pipe(**embeds, latents=noise, num_inference_steps=steps, guidance_scale=guidance_scale, **height)

    module.call = call
    try:
        yield from stream_cfg_trajectories(pipe, ["x"] * n, num_inference_steps=3, batch_size=n, endless=False)
    finally:
        module.call = original


def test_a_learned_variance_is_the_conditional_one():
    pipe = dit_pipeline()
    data = collect_cfg_trajectories(pipe, [0, 2], num_inference_steps=3, dtype=torch.float32)
    assert isinstance(data, Trajectories) and data.targets.shape == (2, 3, 8, 8, 8)
    points = data.batch(torch.arange(6))
    y = points.condition["class_labels"]
    assert y.tolist() == [0, 0, 0, 2, 2, 2]
    cond, uncond = (out(pipe.transformer, (points.inputs,), {"timestep": points.timesteps.long(), "class_labels": c})
                    for c in (y, torch.full_like(y, 1000)))  # fmt: skip
    guided = uncond + points.omegas[:, None, None, None] * (cond - uncond)
    torch.testing.assert_close(points.targets, torch.cat([guided[:, :4], cond[:, 4:]], 1), rtol=1e-4, atol=1e-4)


def test_trajectories_on_disk_and_on_the_fly(tmp_path):
    pipe = classes()
    shared = {"num_inference_steps": 3, "batch_size": 2}
    whole = collect_cfg_trajectories(pipe, [0, 1, 2], generator=seeded(4), **shared)
    folder = collect_cfg_trajectories(pipe, [0, 1, 2], generator=seeded(4), out=tmp_path / "t", **shared)
    parts = list(read_parts(folder))
    assert isinstance(whole, Trajectories) and [len(p) for p in parts] == [6, 3]
    again = Trajectories.load(folder)
    for name in ("inputs", "targets", "timesteps", "sigmas", "omegas"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert again.facts == whole.facts == parts[0].facts
    stream = stream_cfg_trajectories(pipe, [0, 1, 2], generator=seeded(4), dtype=torch.float16, **shared)
    assert torch.equal(next(stream).targets, parts[0].targets)
    for data in (folder, stream):
        agd = train_agd(pipe, data, AGDConfig("additive", 8), AGDTrainingConfig(max_steps=5, batch_size=4))
        assert agd.facts["guidance_scale_range"] == [1.0, 6.0] and len(agd.result.losses) == 5


def test_noised_pairs_are_the_forward_process():
    pipe = classes()
    x0 = torch.randn(40, 1, 8, 8, generator=seeded(5)).clamp(-1, 1)
    labels = [i % 3 for i in range(40)]
    data = noised_pairs(pipe, x0, labels, num_inference_steps=4, batch_size=20, dtype=torch.float32)
    assert data.inputs.shape == (40, 4, 1, 8, 8) and data.facts["data"] == "diffusion"
    sigma = data.sigmas[:, :, None, None, None]
    noise = (data.inputs - (1 - sigma**2).sqrt() * x0[:, None]) / sigma
    assert abs(float(noise[:, :3].mean())) < 0.03 and abs(float(noise[:, :3].std()) - 1) < 0.03
    assert not torch.allclose(noise[:, 0], noise[:, 1], atol=0.1)
    points = data.batch(torch.arange(len(data)))
    t, y = points.timesteps.long(), points.condition["class_labels"]
    with torch.no_grad():
        cond, uncond = (pipe.unet(points.inputs, t, class_labels=c).sample for c in (y, torch.full_like(y, 3)))
    wanted = uncond + points.omegas[:, None, None, None] * (cond - uncond)
    torch.testing.assert_close(points.targets, wanted, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ training


def test_at_scale_one_there_is_nothing_to_learn():
    pipe = classes()
    data = collect_cfg_trajectories(pipe, [0, 1], guidance_scale=(1, 1), num_inference_steps=3, dtype=torch.float32)
    agd = train_agd(pipe, data, AGDConfig(hidden_dim=8), AGDTrainingConfig(max_steps=1, batch_size=6))
    assert agd.result is not None and agd.result.losses[0] < 1e-10


@pytest.mark.parametrize("arch", [*FORMS, "lora", "full"])
def test_training_lowers_the_loss_and_what_is_missed(arch):
    pipe = classes()
    net = pipe.unet
    # A network of random weights hardly hears its label.
    net.class_embedding.weight.data.mul_(30)
    own = digest(net)
    data = collect_cfg_trajectories(pipe, [0, 1, 2] * 4, num_inference_steps=4, batch_size=12)
    settings = AGDTrainingConfig(max_steps=30, batch_size=24, learning_rate=0.003 if arch == "full" else 0.02)
    agd = train_agd(pipe, data, AGDConfig(arch, 8), settings)
    assert digest(net) == own
    assert isinstance(data, Trajectories)
    points = data.batch(torch.arange(len(data)))
    agd.adapters.attach(net)
    student = Student(agd.adapters)
    with torch.no_grad():
        loss = float(loss_of("l2", student(points), points))
    agd.adapters.remove()
    alone = out(net, (points.inputs,), {"timestep": points.timesteps.long(), **points.condition})
    assert loss < 0.8 * float(loss_of("l2", alone, points))
    agd.guidance_scale = 4.0
    assert missed_guidance(pipe, agd, [0, 1, 2], num_inference_steps=4) < 0.9
    assert digest(net) == own


def test_fresh_adapters_miss_all_of_it():
    pipe = classes()
    net = pipe.unet
    adapters = inject_agd(net, AGDConfig(hidden_dim=8))
    adapters.remove()
    agd = AGD(adapters, 3.0)
    assert missed_guidance(pipe, agd, [0, 1], num_inference_steps=3) == pytest.approx(1.0, abs=1e-6)
    agd.guidance_scale = 1.0
    with pytest.raises(InputError, match="nothing to miss"):
        missed_guidance(pipe, agd, [0, 1])


def test_losses():
    pipe = classes()
    data = collect_cfg_trajectories(pipe, [0, 1], num_inference_steps=3, dtype=torch.float32)
    assert isinstance(data, Trajectories)
    points = data.batch(torch.arange(6))
    adapters = stirred(inject_agd(pipe.unet, AGDConfig(hidden_dim=8)))
    student = Student(adapters)
    y, cond = student(points).detach(), student(points, alone=True)
    adapters.remove()
    assert torch.equal(cond, out(pipe.unet, (points.inputs,), {
        "timestep": points.timesteps.long(), "class_labels": points.condition["class_labels"]}))  # fmt: skip
    error = (y - points.targets).double()
    cosine = F.cosine_similarity(cond.flatten(1).double(), points.targets.flatten(1).double())
    each = error.square().mean((1, 2, 3))
    wanted = {
        "l2": error.square().mean(),
        "l1": error.abs().mean(),
        "cos": (each * (1 - cosine).abs() / 2).mean(),
        "noise": (each * points.sigmas).mean(),
    }
    for kind, value in wanted.items():
        assert float(loss_of(kind, y, points, cond)) == pytest.approx(float(value), rel=1e-4)
        settings = AGDTrainingConfig(max_steps=1, batch_size=4, loss=kind)
        assert train_agd(pipe, data, AGDConfig(hidden_dim=8), settings).result.losses[0] > 0


def test_training_resumes_and_accumulates(tmp_path):
    pipe = classes()
    data = collect_cfg_trajectories(pipe, [0, 1, 2], num_inference_steps=3)
    config = AGDConfig("additive", 8)

    def run(resume=False, **more):
        settings = AGDTrainingConfig(
            **({"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_steps": 3} | more)
        )
        return train_agd(pipe, data, config, settings, resume_from_checkpoint=resume)

    whole = run(output_dir=tmp_path)
    resumed = run(tmp_path / "checkpoint-3", output_dir=tmp_path)
    assert len(resumed.result.losses) == 3 and resumed.result.losses == whole.result.losses[3:]
    for a, b in zip(whole.adapters.parameters(), resumed.adapters.parameters(), strict=True):
        assert torch.equal(a, b)
    again = run(True, output_dir=tmp_path, max_steps=6)
    assert again.result.losses == []  # the newest checkpoint is of the last step
    # The gradient of a step is the mean over its batches.
    first = run(max_steps=1, batch_size=4, gradient_accumulation_steps=2).result.losses[0]
    two = [run(max_steps=2, batch_size=4, learning_rate=1e-12).result.losses]
    assert first == pytest.approx(np.mean(two), rel=1e-4)
    exact = run(max_steps=2).result.losses
    AcceleratorState._reset_state(True)
    try:
        half = run(max_steps=2, mixed_precision="bf16", gradient_checkpointing=True).result.losses
        assert half == pytest.approx(exact, rel=0.1)
        with pytest.raises(InputError, match="mixed_precision"):
            run(mixed_precision="fp16")
    finally:
        AcceleratorState._reset_state(True)
    with pytest.raises(InputError, match="resume_from_checkpoint"):
        run(tmp_path / "nowhere")
    with pytest.raises(TrialError, match="lower learning_rate"):
        run(max_steps=12, learning_rate=1e30)


# ------------------------------------------------------------------ pipelines


def test_one_row_of_the_network_a_step():
    pipe = classes()
    rows: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    pipe([0, 1, 2], num_inference_steps=5, guidance_scale=3.0, output_type="latent")
    assert rows == [6] * 5
    rows.clear()
    adapters = inject_agd(pipe.unet, AGDConfig(hidden_dim=8))
    adapters.remove()
    with AGD(adapters, 3.0).install(pipe):
        pipe([0, 1, 2], num_inference_steps=5, output_type="latent")
    assert rows == [3] * 5
    hook.remove()


def test_saved_adapters_come_back_bitwise_and_fit_the_same_shapes_only(tmp_path):
    pipe = classes()
    for arch in (*FORMS, "lora", "full"):
        agd = trained(pipe, arch=arch)
        net, args = pipe.unet, (torch.randn(2, 1, 8, 8), T)
        given = {"class_labels": torch.tensor([0, 1])}
        with agd.install(pipe):
            own = out(net, args, given)
        agd.save_pretrained(tmp_path / arch)
        back = AGD.from_pretrained(tmp_path / arch)
        assert back.guidance_scale == 3.0 and back.facts["guidance_scale_range"] == [1.0, 6.0]
        for name, value in agd.adapters.named().items():
            assert torch.equal(back.adapters.named()[name], value), name
        assert any("frequencies" in name for name in back.adapters.named())
        with back.install(pipe):
            assert torch.equal(out(net, args, given), own)
    other = classes()
    for p in other.unet.parameters():
        p.data += 0.01 * torch.randn_like(p)
    plain = out(other.unet, args, given)
    with AGD.from_pretrained(tmp_path / "attention").install(other):
        assert not torch.equal(out(other.unet, args, given), plain)
    wrong = tiny.unconditional(num_class_embeds=4).unet
    with pytest.raises(InputError, match=r"like the one it was made with|one with"):
        AGD.from_pretrained(tmp_path / "attention").install(ClassConditionalPipeline(wrong, DDIMScheduler(), 3))
    with pytest.raises(InputError, match="network"):
        AGDAdapters.from_pretrained(tmp_path / "attention").attach(tiny._unet())
    (tmp_path / "additive" / "agd.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="adapters were saved to"):
        AGD.from_pretrained(tmp_path / "additive")


def text_draw(pipe, **more):
    given = {"prompt_embeds": tiny.EMBEDS["prompt_embeds"], "height": 16, "width": 16, "num_inference_steps": 3}
    latents = torch.randn(1, 4, 8, 8, generator=seeded(1))
    return pipe(**(given | {"latents": latents, "output_type": "latent", "guidance_scale": 1.0} | more)).images


def _two_branches(pipe):
    """A guided run of prompts without a negative one; the text encoder is replaced by embeddings."""
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: (tiny.EMBEDS["prompt_embeds"], tiny.EMBEDS["negative_prompt_embeds"])
    try:
        text_draw(pipe, guidance_scale=5.0, negative_prompt_embeds=tiny.EMBEDS["negative_prompt_embeds"])
    finally:
        pipe.encode_prompt = encode


def test_a_classic_pipeline_guides_once():
    pipe = tiny.stable_diffusion()
    plain = text_draw(pipe)
    adapters = stirred(inject_agd(pipe.unet, AGDConfig(hidden_dim=8)))
    adapters.remove()
    agd = AGD(adapters, 4.0)
    with agd.install(pipe):
        four = text_draw(pipe)
        assert not torch.allclose(four, plain, atol=1e-3)
        agd.guidance_scale = 2.0
        assert not torch.allclose(text_draw(pipe), four, atol=1e-3)
        negative = tiny.EMBEDS["negative_prompt_embeds"]
        with pytest.raises(InputError, match=r"guidance_scale=5.0 .* 1 while AGD is installed"):
            _two_branches(pipe)
        with pytest.raises(InputError, match=r"negative_prompt_embeds='a tensor' .* left out"):
            text_draw(pipe, negative_prompt_embeds=negative)
        with pytest.raises(InputError, match=r"negative_prompt='ugly' .* left out"):
            text_draw(pipe, negative_prompt="ugly")
    assert torch.equal(text_draw(pipe), plain) and "encode_prompt" not in vars(pipe)
    agd = AGD(adapters, 4.0, facts={"negative_prompt": "ugly"})
    with agd.install(pipe):
        text_draw(pipe, negative_prompt="ugly")  # what they were trained with
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with CFGPlusPlus(0.5).install(pipe), pytest.raises(InputError, match="one without guidance"):
        agd.install(pipe)
    with agd.install(pipe), CFGPlusPlus(0.5).install(pipe), pytest.raises(InputError, match="guide twice"):
        _two_branches(pipe)


def test_a_diffusion_transformer_guides_once():
    pipe = dit_pipeline()
    adapters = stirred(inject_agd(pipe.transformer, AGDConfig("additive", 8)))
    adapters.remove()
    draw = {"class_labels": [0, 1], "num_inference_steps": 2, "output_type": "np"}
    with AGD(adapters, 2.0).install(pipe):
        found = pipe(**draw, guidance_scale=1.0, generator=seeded(0)).images
        with pytest.raises(InputError, match="AGD is installed"):
            pipe(**draw, guidance_scale=4.0, generator=seeded(0))
    plain = pipe(**draw, guidance_scale=1.0, generator=seeded(0)).images
    assert not np.allclose(found, plain, atol=1e-4)


def test_it_is_a_guider_of_modular_pipelines(tmp_path):
    from tests.diffusion.test_guidance import modular as fixture
    from tests.diffusion.test_guidance import modular_draw

    pipe = fixture.__wrapped__()
    adapters = stirred(inject_agd(pipe.unet, AGDConfig(hidden_dim=8)))
    adapters.remove()
    AGD(adapters, 4.0).save_pretrained(tmp_path / "agd")
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0, enabled=False))
    plain = modular_draw(pipe)
    rows: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: rows.append(1), with_kwargs=True)
    guider = AGDGuidance(str(tmp_path / "agd"))
    pipe.update_components(guider=guider)
    found = modular_draw(pipe)
    assert len(rows) == 4 and guider.guidance_scale == 4.0
    hook.remove()
    assert not torch.allclose(found, plain, atol=1e-3)
    # The same as with the adapters on the network all the time.
    adapters.attach(pipe.unet)
    adapters.set_agd(4.0)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0, enabled=False))
    torch.testing.assert_close(modular_draw(pipe), found)
    adapters.remove()
    guider.save_pretrained(tmp_path / "guider")
    again = AGDGuidance.from_pretrained(tmp_path / "guider")
    pipe.update_components(guider=again)
    assert torch.equal(modular_draw(pipe), found)
    # Switched off it leaves the network alone (diffusers' loops switch their guider on again at each step).
    again.disable()
    again.prepare_models(pipe.unet)
    assert not pipe.unet._forward_pre_hooks


def test_it_is_saved_with_a_pipeline(tmp_path):
    pipe = classes()
    agd = trained(pipe, arch="additive").install(pipe)
    draw = {"labels": [0, 1], "num_inference_steps": 3, "output_type": "latent"}
    own = pipe(**draw, generator=seeded(1)).images
    save_steered(pipe, tmp_path)
    back = load_steered(tmp_path)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(back(**draw, generator=seeded(1)).images, own)
    other = load_steered(tmp_path, AGD={"guidance_scale": 5.0})
    other.set_progress_bar_config(disable=True)
    assert not torch.equal(other(**draw, generator=seeded(1)).images, own)
    agd.uninstall()


def test_with_dpm_solver_pp_on_scenes():
    from steersman.reference import scenes

    pipe = scenes.pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = scenes.prompts(2)
    adapters = stirred(inject_agd(pipe.unet, AGDConfig(hidden_dim=8)), 0.1)
    adapters.remove()
    noise = torch.randn(2, 4, 16, 16, generator=seeded(1))
    scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler
    agd = AGD(adapters, 3.0)
    given = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 1.0, "latents": noise}
    with agd.install(pipe):
        found = pipe(prompts, **given).images
    assert not torch.allclose(found, pipe(prompts, **given).images, atol=1e-3)
    # By hand: the scheduler's steps on a network whose adapters see time, scale and prompt.
    embeds = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    adapters.attach(pipe.unet)
    adapters.set_agd(3.0)
    scheduler.set_timesteps(4)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t, embeds).sample, t, x).prev_sample
    torch.testing.assert_close(x, found, rtol=1e-4, atol=1e-4)


def test_with_lora_on_the_same_network():
    from peft import LoraConfig

    pipe = tiny.stable_diffusion()
    adapters = stirred(inject_agd(pipe.unet, AGDConfig(hidden_dim=8)))
    adapters.remove()
    plain = text_draw(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    tuned = text_draw(pipe)
    with AGD(adapters, 4.0).install(pipe):
        both = text_draw(pipe)
        pipe.unet.disable_adapters()
        alone = text_draw(pipe)
        pipe.unet.enable_adapters()
    for a, b in ((both, tuned), (both, alone), (tuned, plain)):
        assert not torch.allclose(a, b, atol=1e-4)
    assert torch.equal(text_draw(pipe), tuned)


# ------------------------------------------------------------------ apply


def test_apply_makes_adapters_of_digits(tmp_path):
    from steersman.engine.artefacts import run_verb

    settings = {"trajectories": "4", "sampling_steps": "3", "steps": "3", "batch_size": "4"}
    record = run_verb("apply", "agd", "digits", tmp_path / "a", settings=settings)
    metrics = record["metrics"]
    assert metrics["arch"] == "additive" and metrics["points"] == 12 and 0.01 < metrics["share"] < 0.03
    noised = run_verb("apply", "agd", "digits", tmp_path / "b", settings=settings | {"data": "diffusion"})
    assert noised["metrics"]["loss_first"] != metrics["loss_first"]
    from steersman.reference import digits

    pipe = digits.pipeline()
    pipe.set_progress_bar_config(disable=True)
    with AGD.from_pretrained(tmp_path / "a", guidance_scale=3.0).install(pipe):
        pipe([1, 2], num_inference_steps=2)


def test_apply_reads_prompts_and_class_numbers(tmp_path):
    classes().save_pretrained(str(tmp_path / "pipe"))
    (tmp_path / "classes.txt").write_text("0\n2\n")
    tiny_fit = {"trajectories": 3, "sampling_steps": 2, "steps": 2, "batch_size": 2}
    facts = apply(tmp_path / "pipe", tmp_path / "classes.txt", tmp_path / "out", **tiny_fit)
    assert facts["trajectories"] == 3 and facts["blocks"] == 4
    (tmp_path / "classes.txt").write_text("0\ncat\n")
    with pytest.raises(InputError, match="class numbers"):
        apply(tmp_path / "pipe", tmp_path / "classes.txt", tmp_path / "more", **tiny_fit)
    with pytest.raises(InputError, match="npz of images"):
        apply(tmp_path / "pipe", None, tmp_path / "more", data="diffusion", **tiny_fit)
    tiny.unconditional().save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(InputError, match="prompts or labels"):
        apply(tmp_path / "plain", None, tmp_path / "more", **tiny_fit)


def test_the_cards_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = catalog.card("agd").text.partition("## Use\n")[2]
    found: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0], found)
    assert len(found["images"]) == 2 and found["agd"].guidance_scale == 2.0
    assert (tmp_path / "my-agd" / "agd.safetensors").is_file()


# ------------------------------------------------------------------ bad input


def test_bad_settings_are_refused():
    bad_config = {
        "arch": "magic", "hidden_dim": 7, "placement": "some", "cfg_mult": 0.0, "dropout": 1.0, "num_heads": 0,
        "scale_by": "root",
    }  # fmt: skip
    for name, value in bad_config.items():
        with pytest.raises(InputError, match=name):
            AGDConfig(**{name: value})
    bad_training = {
        "max_steps": 0, "batch_size": 0, "gradient_accumulation_steps": 0, "learning_rate": -1.0, "weight_decay": -1.0,
        "warmup": 1.0, "loss": "l3", "max_grad_norm": 0.0, "mixed_precision": "fp8", "save_steps": 0, "seed": -1,
    }  # fmt: skip
    for name, value in bad_training.items():
        with pytest.raises(InputError, match=name):
            AGDTrainingConfig(**{name: value})
    with pytest.raises(InputError, match=r"target_modules='attn9'.*attentions"):
        inject_agd(class_unet(), AGDConfig(target_modules=("attn9",)))
    with pytest.raises(InputError, match=r"target_modules=.*attention, residual blocks or linear"):
        inject_agd(class_unet(), AGDConfig(target_modules=("conv_in",)))


def test_bad_trajectories_are_refused(tmp_path):
    pipe = classes()
    for name, value in {
        "guidance_scale": (0.5, 6), "num_inference_steps": 0, "batch_size": 0, "dtype": torch.int8,
        "negative_prompt": "ugly",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=name):
            collect_cfg_trajectories(pipe, [0], **({"num_inference_steps": 2} | {name: value}))
    with pytest.raises(InputError, match="conditions"):
        collect_cfg_trajectories(pipe, [])
    with pytest.raises(InputError, match="trajectories"):
        list(read_parts(tmp_path))
    with pytest.raises(InputError, match="latents"):
        noised_pairs(pipe, torch.zeros(2, 3, 8, 8), [0, 1])
    # No unconditional branch: no null label; or guidance is distilled into the network.
    bare = ClassConditionalPipeline(class_unet(), DDIMScheduler())
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match="null label"):
        collect_cfg_trajectories(bare, [0], num_inference_steps=2)
    with pytest.raises(InputError, match="data"):
        train_agd(pipe, [], AGDConfig(hidden_dim=8))


def test_a_distilled_network_is_refused():
    pipe = tiny.stable_diffusion()
    pipe.unet = tiny._unet(time_cond_proj_dim=8)
    with pytest.raises(InputError, match="distilled"):
        next(_with_embeds(pipe, tiny.EMBEDS, 1))


def test_scales_outside_what_was_trained():
    adapters = inject_agd(class_unet(), AGDConfig(hidden_dim=8))
    facts = {"guidance_scale_range": [1.0, 6.0]}
    assert AGD(adapters, facts=facts).guidance_scale == 3.5
    with pytest.warns(UserWarning, match="guidance_scale 8 is outside the range .* 1 to 6"):
        assert AGD(adapters, 8.0, facts=facts).guidance_scale == 8.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AGD(adapters, 8.0, clamp=True, facts=facts).guidance_scale == 6.0
    for value in (0.5, math.inf, "3", True):
        with pytest.raises(InputError, match="guidance_scale"):
            AGD(adapters, value, facts=facts)


def test_scales_for_other_rows_are_refused():
    net = class_unet()
    adapters = inject_agd(net, AGDConfig(hidden_dim=8))
    adapters.set_agd(torch.tensor([2.0, 3.0]))
    with pytest.raises(InputError, match=r"2 scales.* call has 4 rows, as both branches"):
        net(torch.zeros(4, 1, 8, 8), T, class_labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(InputError, match="guidance_scale"):
        adapters.set_agd(math.nan)
    with pytest.raises(InputError, match="on none"):
        adapters.attach(net)
