"""APTP: gates, cut networks, multiply-adds, transport, losses, the three stages, and the routed pipeline."""

from __future__ import annotations

import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from steersman import catalog
from steersman.diffusion import PNDMScheduler, StockGuidance
from steersman.diffusion.aptp import (
    APTPConfig,
    GateLayout,
    MultiplyAdds,
    PooledText,
    PromptRoutedPipeline,
    PromptRoutedPruner,
    Router,
    apply,
    cut,
    gated,
    load_pruned,
    read_captioned,
    save_pruned,
    sinkhorn,
    within_budget,
)
from steersman.diffusion.aptp.costs import example_inputs
from steersman.diffusion.aptp.gates import MEDIAN, gumbel, hard, ordered
from steersman.diffusion.aptp.losses import contrastive_loss, resource_loss, snr_weights
from steersman.diffusion.aptp.routing import magnitudes, potentials
from steersman.errors import InputError, TrialError
from steersman.reference import scenes
from tests.diffusion import tiny

TEXT = 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(**more) -> UNet2DConditionModel:
    """Small, with random weights, for the text encoder and the VAE of scenes."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
    }
    unet = UNet2DConditionModel(**settings | more).eval()
    with torch.no_grad():  # not zero anywhere, as in a trained network
        for p in unet.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(p.numel())))
    return unet


@pytest.fixture(scope="module")
def pipe():
    made = scenes.pipeline()
    made.unet = network()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def unet():
    return network()


@pytest.fixture(scope="module")
def layout(unet):
    return GateLayout(unet)


@pytest.fixture(scope="module")
def costs(unet, layout):
    return MultiplyAdds(unet, layout, TEXT)


def captioned(n: int = 24):
    """Some scenes with captions that say more or less of them."""
    images, rows = scenes.fresh(n, "train", generator(3))
    left_out = torch.rand(rows.shape, generator=generator(4)) < 0.4
    return images, [scenes.caption(row) for row in rows.masked_fill(left_out, -1)]


SHORT = {
    "budget": 0.7,
    "experts": 3,
    "steps": 4,
    "batch_size": 12,
    "warm_start": 1,
    "warmup": 1,
    "learning_rate": 0.1,
    "scale_learning_rate": False,
    "finetune_steps": 2,
    "finetune_batch_size": 4,
    "finetune_warmup": 1,
    "finetune_learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def pruner(pipe):
    made = PromptRoutedPruner(pipe, **SHORT).fit(*captioned())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.prune()
    return made


@pytest.fixture(scope="module")
def three(pipe, layout):
    """Three experts and a router that sends prompts to each of them."""
    router = Router(layout, 64, 3, generator=generator(5))
    with torch.no_grad():
        router.predictor.weight.mul_(6)
        router.codebook.mul_(20)
    gates = random_gates(layout, 3, generator(6))
    router.architectures.copy_(gates)
    return router, {k: cut(pipe.unet, layout, gates[k]) for k in range(3)}


def random_gates(layout, count, rng, keep: float = 0.6) -> torch.Tensor:
    g = (torch.rand(count, layout.size, generator=rng) < keep).float()
    return (layout.legal(g) >= 0.5).float()


def batch(n: int, seed: int = 1):
    rng = generator(seed)
    return (
        torch.randn(n, 4, 8, 8, generator=rng),
        torch.randint(1000, (n,), generator=rng),
        torch.randn(n, 8, 64, generator=rng),
    )


# ------------------------------------------------------------------ exact checks: gates and cut


def test_all_gates_on_is_the_network(unet, layout):
    x, t, c = batch(3)
    with torch.no_grad():
        plain = unet(x, t, c).sample
        with gated(unet, layout, layout.ones(3)):
            torch.testing.assert_close(unet(x, t, c).sample, plain, rtol=0, atol=1e-6)
        assert torch.equal(unet(x, t, c).sample, plain)  # and nothing of the gates is left


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift"},
        {"use_linear_projection": True, "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 8)},
    ],
    ids=["sd1", "scale-shift", "sdxl-like"],
)
def test_masked_is_cut(more):
    net = network(**more)
    layout = GateLayout(net)
    rng = generator(11)
    gates = random_gates(layout, 50 if not more else 8, rng)
    some = len(gates) // 3
    gates[:some, layout.n_width + torch.randint(len(layout.depths), (some,), generator=rng)] = 0
    for i, part in enumerate(layout.slices * 2):  # groups with a single element left
        if i < some + 3:
            gates[-1 - i % len(gates), part] = 0
            gates[-1 - i % len(gates), part.start + i % (part.stop - part.start)] = 1
    assert (gates[:, layout.n_width :] == 0).any(1).sum() >= min(10, some)
    single = torch.stack([gates[:, part].sum(1) == 1 for part in layout.slices], 1).any(1)
    assert single.sum() >= min(10, some)
    x, t, c = batch(2)
    with torch.no_grad():
        for g in gates:
            with gated(net, layout, g):
                masked = net(x, t, c).sample
            torch.testing.assert_close(cut(net, layout, g)(x, t, c).sample, masked, rtol=1e-5, atol=1e-5)


def test_two_architectures_in_a_batch_under_guidance(unet, layout):
    """Rows are uncond, uncond, cond, cond: prompt i's gates are on rows i and 2 + i."""
    g = random_gates(layout, 2, generator(2))
    x, t, c = batch(4)
    with torch.no_grad():
        with gated(unet, layout, g):
            both = unet(x, t, c).sample
        for i in range(2):
            rows = [i, 2 + i]
            torch.testing.assert_close(cut(unet, layout, g[i])(x[rows], t[rows], c[rows]).sample, both[rows])
        with gated(unet, layout, g), pytest.raises(InputError, match="divide the batch of 3"):
            unet(x[:3], t[:3], c[:3])


def test_erratum_gates_before_the_normalisation_are_not_the_cut_network(unet, layout):
    """A GroupNorm turns a group of zeros into its bias: gates in front of it don't prune the channels behind it."""
    g = layout.ones()
    group, part = next((w, s) for w, s in zip(layout.widths, layout.slices, strict=True) if w.kind == "norm")
    g[0, part.start + 1] = 0
    each = group.channels // group.width
    x, t, c = batch(1)

    def before(module, arguments):
        h = arguments[0].clone()
        h[:, each : 2 * each] = 0
        return (h,)

    hook = unet.get_submodule(group.path.replace("conv2", "norm2")).register_forward_pre_hook(before)
    with torch.no_grad():
        early = unet(x, t, c).sample
        hook.remove()
        exact = cut(unet, layout, g[0])(x, t, c).sample
    assert (early - exact).abs().max() > 1e-3


def test_erratum_soft_gates_before_the_normalisation_have_no_effect(unet, layout):
    """A GroupNorm undoes a factor on a whole group: there, neither output nor gradient tells of a gate of 0.3."""
    group, part = next((w, s) for w, s in zip(layout.widths, layout.slices, strict=True) if w.kind == "norm")
    x, t, c = batch(1)
    each = group.channels // group.width
    u = torch.full((1, group.width), 0.3, requires_grad=True)

    def before(module, arguments):
        return (arguments[0] * u.repeat_interleave(each, 1)[:, :, None, None],)

    hook = unet.get_submodule(group.path.replace("conv2", "norm2")).register_forward_pre_hook(before)
    early = unet(x, t, c).sample
    slope = torch.autograd.grad(early.square().mean(), u)[0].abs().max()
    hook.remove()
    g = layout.ones()
    g[0, part] = 0.3
    g.requires_grad_(True)
    with gated(unet, layout, g):
        behind = unet(x, t, c).sample
    ours = torch.autograd.grad(behind.square().mean(), g)[0][0, part].abs().max()
    with torch.no_grad():
        plain = unet(x, t, c).sample
    assert (early - plain).abs().max() < 0.05 * (behind - plain).abs().max()
    assert slope < 0.05 * ours


def test_multiply_adds_are_those_that_torch_counts(unet, layout, costs):
    inputs = example_inputs(unet, TEXT)
    for g in [layout.ones()[0], *random_gates(layout, 6, generator(3))]:
        net = cut(unet, layout, g)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net(**inputs)
        assert float(costs(g[None])) == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
    least = torch.zeros(1, layout.size)
    least[0, [part.start for part in layout.slices]] = 1
    assert float(costs(least)) == pytest.approx(costs.least)


def test_the_share_of_the_multiply_adds_grows_with_every_gate(layout, costs):
    assert float(costs.ratio(layout.ones())) == pytest.approx(1)
    g = torch.rand(4, layout.size, generator=generator(), dtype=torch.float64)
    g[0, layout.n_width :] = 0
    g.requires_grad_(True)
    slope = torch.autograd.grad(costs.ratio(g).sum(), g)[0]
    assert (slope >= 0).all()
    width = slope[:, : layout.n_width]
    inside = layout.depth >= 0
    assert (width[1:] > 0).all() and (width[0, ~inside] > 0).all() and (width[0, inside] == 0).all()
    assert float(costs.shares()[layout.n_width :].sum() + costs.shares()[: layout.n_width][~inside].sum()) == (
        pytest.approx(1)
    )


def test_the_target_of_a_budget(costs):
    """R = p' where the total is p, and the loss is 0 there, and the same at c p' and p'/c."""
    for p in (0.5, 0.75, 1.0):
        target = costs.target(p)
        assert (costs.fixed + costs.prunable * target) / costs.total == pytest.approx(p, abs=1e-9)
        R = torch.tensor(target, dtype=torch.float64)
        assert float(resource_loss(R, target)) < 1e-12
        assert float(resource_loss(R * 1.3, target)) == pytest.approx(float(resource_loss(R / 1.3, target)))
        assert float(resource_loss(R + 0.1, target, "mae")) == pytest.approx(0.1)
        assert float(resource_loss(R + 0.1, target, "mse")) == pytest.approx(0.01)
    low = costs.least / costs.total
    for p in (0.0, low - 1e-3, 1.01):
        with pytest.raises(InputError, match=f"from {low:.3f}"):
            costs.target(p)


def test_depth_gates_are_ordered_and_straight_through(layout):
    n = len(layout.depths)
    logits = 3 * torch.randn(20, layout.size, generator=generator(), dtype=torch.float64)
    c = ordered(logits[:, layout.n_width :])
    assert (c.diff(dim=1) <= 0).all()
    p = logits[:, layout.n_width :].softmax(1)
    torch.testing.assert_close(torch.sigmoid(c)[:, -1], p[:, 0], rtol=1e-4, atol=2e-6)
    v = layout.soft(logits, noise=0.0)[:, layout.n_width :][:, layout.order]
    assert (v.diff(dim=1) <= 1e-12).all()
    assert layout.order[:4] == [n - 1, n - 2, 0, 1] and sorted(layout.order) == list(range(n))
    u = torch.rand(50, generator=generator(), dtype=torch.float64).requires_grad_(True)
    h = hard(u)
    assert set(h.detach().unique().tolist()) <= {0.0, 1.0} and torch.equal(h.detach() == 1, u >= 0.5)
    assert torch.equal(torch.autograd.grad((h * torch.arange(50)).sum(), u)[0], torch.arange(50.0).double())


def test_without_a_draw_a_gate_is_on_where_half_of_the_draws_are(layout):
    logits = torch.full((4000, layout.size), -3.0 - MEDIAN)
    logits[:, ::2] += 0.3
    logits[:, 1::2] -= 0.3
    on = layout.margins(logits, gumbel(logits.shape, generator()))[:, : layout.n_width] >= 0
    median = layout.margins(logits[:1])[0, : layout.n_width] >= 0
    assert torch.equal(on.double().mean(0) > 0.5, median) and median.any() and not median.all()
    assert gumbel((100_000,), generator(1)).isfinite().all()


def test_every_width_group_keeps_an_element(layout):
    off = layout.soft(torch.full((2, layout.size), -50.0))
    for part in layout.slices:
        assert ((off[:, part] >= 0.5).sum(1) == 1).all() and (off[:, part.start] >= 0.5).all()
    layout.check(hard(off))


# ------------------------------------------------------------------ exact checks: transport, losses


def worst(c: float, iterations: int) -> float:
    rng, found = generator(0), 0.0
    for _ in range(200):
        S = (2 * torch.rand(64, 8, generator=rng, dtype=torch.float64) - 1) * c
        Q = sinkhorn(S, 0.05, iterations)
        assert (Q.sum(1) - 1).abs().max() < 1e-12
        found = max(found, float((Q.sum(0) / 8 - 1).abs().max()))
    return found


def test_transport_balances_the_experts():
    assert worst(0.1, 3) < 0.01 and worst(0.3, 3) < 0.25 and worst(0.3, 200) < 1e-3
    assert worst(1.0, 3) > 0.3  # three scalings are not enough for similarities that far apart
    torch.testing.assert_close(sinkhorn(torch.full((6, 3), 0.4)), torch.full((6, 3), 1 / 3))
    assert sinkhorn(torch.eye(4).half()).isfinite().all()  # exp(1/ε) is above what half precision holds
    assert sinkhorn(torch.eye(4), epsilon=1e-3).isfinite().all()


def test_transport_spreads_collapsed_prompts():
    for seed in range(20):
        S = 0.05 * torch.rand(64, 8, generator=generator(seed))
        S[:, 2] += 0.3
        assert (S.argmax(1) == 2).all()
        assert sinkhorn(S).argmax(1).bincount().max() <= 20


def test_potentials_balance_single_prompts():
    """What transport does for a batch, for one prompt at a time."""
    S = 0.1 * torch.rand(400, 4, generator=generator())
    S[:, 1] += 0.08
    assert S.argmax(1).bincount(minlength=4).max() > 300
    offsets = potentials(S)
    counts = (S + offsets).argmax(1).bincount(minlength=4)
    assert counts.min() >= 90 and float(offsets.mean()) == pytest.approx(0, abs=1e-6)
    fresh = 0.1 * torch.rand(400, 4, generator=generator(1))
    fresh[:, 1] += 0.08
    assert (fresh + offsets).argmax(1).bincount(minlength=4).min() > 60


def test_the_contrastive_loss_is_flat_where_similarities_coincide():
    z = torch.randn(12, 10, generator=generator(), dtype=torch.float64)
    w = z.clone().requires_grad_(True)
    assert torch.autograd.grad(contrastive_loss(z, w, 0.3), w)[0].abs().max() < 1e-12
    moved = (z + 0.5 * torch.randn(z.shape, generator=generator(1), dtype=torch.float64)).requires_grad_(True)
    assert torch.autograd.grad(contrastive_loss(z, moved, 0.3), moved)[0].abs().max() > 5e-4
    # with τ = 0.03 the same change is all but invisible once there are many dimensions
    z = torch.randn(64, 100, generator=generator(), dtype=torch.float64)
    moved = (z + 0.5 * torch.randn(z.shape, generator=generator(1), dtype=torch.float64)).requires_grad_(True)
    assert torch.autograd.grad(contrastive_loss(z, moved, 0.03), moved)[0].abs().max() < 1e-6


def test_min_snr_weights():
    snr = torch.tensor([0.1, 5.0, 50.0])
    torch.testing.assert_close(snr_weights(snr, "epsilon"), torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(snr_weights(snr, "v_prediction"), torch.tensor([1.0, 5 / 6, 5 / 51]))
    torch.testing.assert_close(snr_weights(snr, "sample"), torch.tensor([0.1, 5.0, 5.0]))
    assert torch.equal(snr_weights(snr, "epsilon", None), torch.ones(3))


def test_architectures_within_a_budget(unet, layout, costs):
    margins = torch.randn(3, layout.size, generator=generator(1))
    usage = torch.tensor([0.5, 0.4, 0.1])
    for budget in (0.9, 0.7, 0.5):
        g = within_budget(margins, costs, budget, usage)
        layout.check(g, hard_only=True)
        assert float(usage.double() @ costs(g.double())) / costs.total == pytest.approx(budget, abs=0.01)
    one = within_budget(magnitudes(unet, layout)[None], costs, 0.7)
    assert float(costs(one)) / costs.total == pytest.approx(0.7, abs=0.01)
    assert (one[:, layout.n_width :] == 1).all()
    # the smallest weights went first
    for part in layout.slices:
        sizes = magnitudes(unet, layout)[part]
        off, on = sizes[one[0, part] == 0], sizes[one[0, part] == 1]
        assert not len(off) or off.mean() < on.mean()


# ------------------------------------------------------------------ exact checks: routing


def test_equal_prompts_go_to_equal_experts_whatever_their_row(three):
    router, _ = three
    z = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator()), dim=1)
    where = router.route(z)
    assert len(where.unique()) > 1
    order = torch.randperm(40, generator=generator(1))
    assert torch.equal(router.route(z[order]), where[order])
    assert torch.equal(torch.cat([router.route(part) for part in z.split(7)]), where)
    assert len(router.route(z[:1].repeat(40, 1)).unique()) == 1


def test_erratum_routing_with_noise_depends_on_the_row(three):
    """The negative control of the test above: what the authors' code does at evaluation."""
    router, _ = three
    z = torch.nn.functional.normalize(torch.randn(1, 64, generator=generator()), dim=1).repeat(64, 1)
    S = router.similarity(z, official_noise=True)
    assert (S - S[0]).abs().max() > 1e-3
    again = router.similarity(z, official_noise=True)
    assert torch.equal(S, again)  # not random: it is the place in the batch


def test_comparisons_weigh_each_group_alike(layout, costs):
    router = Router(layout, 8, 2)
    w = router.comparable(layout.ones())[0]
    shares = [float(w[part].square().sum()) for part in layout.slices]
    shares += w[layout.n_width :].square().tolist()
    assert shares == pytest.approx([1 / len(shares)] * len(shares))
    by_macs = Router(layout, 8, 2, by_macs=True, costs=costs).comparable(layout.ones())[0]
    assert not torch.allclose(w, by_macs) and float(by_macs.norm()) == pytest.approx(1)
    soft = layout.ones()
    soft[0, layout.n_width :] = 0.4  # widths of skippable blocks count by their block's gate, which is then hard
    inside = torch.cat([layout.depth >= 0, torch.zeros(len(layout.depths), dtype=torch.bool)])
    x = router.comparable(soft)[0]
    assert (x[layout.n_width :] == 0).all() and (x[inside] > 0).all() and x[inside].max() < x[~inside].max()


def test_the_predictor_learns_from_the_contrastive_loss_alone(pipe):
    for contrastive, warm in ((0.0, 0), (100.0, 0), (0.0, 1)):
        made = PromptRoutedPruner(pipe, **SHORT | {"contrastive": contrastive, "warm_start": warm, "steps": 1})
        made.fit(*captioned())
        found = made.history[0]["predictor_gradient"]
        assert (found == 0) == (contrastive == 0 and warm == 0)


def test_one_expert_is_static_pruning(pipe, layout):
    single = PromptRoutedPruner(pipe, **SHORT | {"experts": 1, "steps": 2}).fit(*captioned())
    expert = single.prune()[0]
    assert single.report()["multiply_adds"] == pytest.approx(0.7, abs=0.01)
    static = cut(pipe.unet, layout, single.router.architectures[0])
    x, t, c = batch(2)
    with torch.no_grad():
        assert torch.equal(expert(x, t, c).sample, static(x, t, c).sample)
    assert set(single.pipeline().route(captioned()[1])) == {0}


# ------------------------------------------------------------------ the three stages


LEARNING = {"steps": 12, "warm_start": 0, "contrastive": 0.0, "budget": 0.5, "shrink": 2, "learning_rate": 0.5}


def test_the_router_learns_and_the_network_stays(pipe):
    before = {n: v.clone() for n, v in pipe.unet.state_dict().items()}
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    made = PromptRoutedPruner(pipe, **SHORT | LEARNING)
    made.fit(*captioned())
    ratios = [entry["ratio"] for entry in made.history]
    assert abs(ratios[-1] - made.target) < 0.5 * abs(ratios[0] - made.target)
    assert all(torch.equal(v, before[n]) for n, v in pipe.unet.state_dict().items())
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags


def test_the_same_seed_gives_the_same_router(pipe):
    one, two = (PromptRoutedPruner(pipe, **SHORT | {"steps": 2}).fit(*captioned()) for _ in range(2))
    assert torch.equal(one.router.codebook, two.router.codebook)


def test_pruning_meets_the_budget_by_use(pruner):
    report = pruner.report()
    assert report["multiply_adds"] == pytest.approx(0.7, abs=0.01)
    assert sum(report["usage"].values()) == pytest.approx(1)
    for k, expert in pruner.experts.items():
        smaller = sum(p.numel() for p in expert.parameters()) < sum(p.numel() for p in pruner.unet.parameters())
        assert smaller == (pruner.macs[k] < 1)


def test_erratum_gates_of_the_last_draw_miss_the_budget(pipe):
    made = PromptRoutedPruner(pipe, **SHORT | {"last_draw": True}).fit(*captioned())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.prune()
    assert abs(made.report()["multiply_adds"] - 0.7) > 0.05
    assert torch.equal(made.router.architectures, (made.router.drawn >= 0.5).float())


def test_experts_with_equal_shares_of_the_prompts(pipe):
    images, captions = captioned()
    made = PromptRoutedPruner(pipe, **SHORT | {"balanced": True}).fit(images, captions)
    made.prune()
    shares = np.bincount(made.pipeline().route(captions), minlength=3) / len(captions)
    np.testing.assert_allclose(shares, made.router.usage.numpy(), atol=1e-6)
    assert shares.min() > 0.2


@pytest.mark.parametrize("architecture", ["random", "magnitude", "whole"])
def test_other_architectures(pipe, architecture):
    made = PromptRoutedPruner(pipe, **SHORT | {"experts": 1, "architecture": architecture}).fit(*captioned())
    made.prune()
    assert made.history == [] and made.macs[0] == pytest.approx(1 if architecture == "whole" else 0.7, abs=0.01)


def test_finetuning_brings_an_expert_nearer_to_the_whole_network(pipe):
    settings = {"experts": 1, "architecture": "magnitude", "finetune_denoising": 0.0, "finetune_blocks": 0.0}
    made = PromptRoutedPruner(pipe, **SHORT | settings | {"budget": 0.5, "finetune_learning_rate": 3e-3})
    images, captions = captioned()
    made.fit(images, captions).prune()
    before = made.finetune(1)[0]  # of the network before its first step
    assert made.finetune(20)[0] < 0.8 * before
    assert not any(p.requires_grad for p in made.experts[0].parameters())


def test_smaller_images_train_the_router(pipe):
    images, captions = captioned()
    made = PromptRoutedPruner(pipe, **SHORT | {"shrink": 2, "steps": 1}).fit(images, captions)
    assert made.history and made._latents.shape[-1] == 16
    with pytest.raises(InputError, match="shrink=3"):
        PromptRoutedPruner(pipe, **SHORT | {"shrink": 3}).fit(images, captions)


def test_experts_without_prompts_are_left_out(pipe, layout):
    made = PromptRoutedPruner(pipe, **SHORT | {"steps": 0}).fit(*captioned())
    with torch.no_grad():  # the third code is far from every prompt
        made.router.codebook[2] = -50
    with pytest.warns(UserWarning, match="no training prompt goes to experts"):
        made.prune()
    assert 2 not in made.experts
    made.router.alive.copy_(torch.tensor([False, True, False]))
    texts = captioned()[1]
    z = PooledText(pipe)(texts)
    if bool((made.router.similarity(z).argmax(1) != 1).any()):
        with pytest.warns(UserWarning, match="they go to the nearest other expert"):
            assert set(made.router.route(z).tolist()) == {1}


# ------------------------------------------------------------------ the pipeline


def test_images_are_of_the_prompt_not_of_its_row(pipe, three):
    router, experts = three
    routed = PromptRoutedPipeline(pipe, experts, router)
    texts = [*dict.fromkeys(captioned()[1])][:7]
    assert len(set(routed.route(texts))) > 1

    def run(prompts, **more):
        plan = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0} | more
        return routed(prompts, generator=generator(9), **plan).images

    whole = run(texts)
    torch.testing.assert_close(run(texts[::-1]).flip(0), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([run(texts[:3]), run(texts[3:])]), whole, rtol=1e-5, atol=1e-5)
    twice = run([texts[0], texts[0]])
    assert not torch.allclose(twice[0], twice[1])  # a second image of a prompt is another one
    torch.testing.assert_close(run(texts[:1], num_images_per_prompt=2), twice, rtol=1e-5, atol=1e-5)


def test_each_expert_is_called_once_through_the_ordinary_pipeline(pipe, three):
    router, experts = three
    routed = PromptRoutedPipeline(pipe, experts, router)
    texts = captioned()[1][:8]
    where = routed.route(texts)
    calls = []
    hook = routed.unet.register_forward_pre_hook(lambda m, a, k: calls.append((m.in_use, len(a[0]))), with_kwargs=True)
    noise = torch.randn(8, 4, 16, 16, generator=generator())
    plan = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 2.0}
    out = routed(texts, latents=noise, negative_prompt=["a shape"] * 8, **plan)
    hook.remove()
    assert len(calls) == 3 * len(set(where))
    assert {(k, n) for k, n in calls} == {(str(k), 2 * where.count(k)) for k in set(where)}
    for k in set(where):  # the same as the expert alone in the plain pipeline
        rows = [i for i, found in enumerate(where) if found == k]
        own, pipe.unet = pipe.unet, experts[k]
        alone = pipe([texts[i] for i in rows], latents=noise[rows], negative_prompt=["a shape"] * len(rows), **plan)
        pipe.unet = own
        torch.testing.assert_close(out.images[rows], alone.images, rtol=1e-5, atol=1e-5)
    assert routed.pipe is not pipe and not isinstance(pipe.unet, type(routed.unet))


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_images_come_back_as_asked(pipe, three, kind):
    router, experts = three
    routed = PromptRoutedPipeline(pipe, experts, router)
    images, unsafe = routed(captioned()[1][:3], num_inference_steps=1, output_type=kind, return_dict=False)
    assert unsafe is None and len(images) == 3
    if kind == "pil":
        assert all(isinstance(image, Image.Image) for image in images)
    elif kind == "np":
        assert isinstance(images, np.ndarray) and images.shape == (3, 32, 32, 3)
    else:
        assert images.shape == (3, 3, 32, 32)


@pytest.mark.parametrize(
    "sampler",
    [
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
        PNDMScheduler,
    ],
)
def test_samplers(pipe, three, sampler):
    router, experts = three
    routed = PromptRoutedPipeline(pipe, experts, router)
    own = pipe.scheduler
    routed.scheduler = sampler.from_config(pipe.scheduler.config)
    out = routed(captioned()[1][:4], num_inference_steps=3, output_type="latent", generator=generator())
    assert out.images.isfinite().all() and pipe.scheduler is own


def test_guidance_is_installed_on_all_experts(pipe, three):
    """Composition: a guidance on the routed pipeline is the guidance on each expert's own."""
    router, experts = three
    routed = PromptRoutedPipeline(pipe, experts, router)
    texts = captioned()[1][:6]
    noise = torch.randn(6, 4, 16, 16, generator=generator())
    plan = {"latents": noise, "num_inference_steps": 3, "output_type": "latent"}
    wanted = routed(texts, guidance_scale=3.0, **plan).images
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    with StockGuidance(guider).install(routed):
        found = routed(texts, guidance_scale=7.0, **plan).images
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(routed(texts, guidance_scale=7.0, **plan).images, wanted)


def test_random_routing_is_a_control(pipe, three):
    router, experts = three
    router.usage.copy_(torch.tensor([0.5, 0.3, 0.2]))
    texts = scenes.prompts(200)
    by_chance = PromptRoutedPipeline(pipe, experts, router, routing="random")
    where = by_chance.route(texts)
    assert where == by_chance.route(texts) and where[::-1] == by_chance.route(texts[::-1])
    np.testing.assert_allclose(np.bincount(where) / 200, [0.5, 0.3, 0.2], atol=0.1)
    router.usage.copy_(torch.full((3,), 1 / 3))


def test_an_own_embedding(pipe):
    def lengths(texts):
        return torch.tensor([[len(text.split()) / 10, 1.0] for text in texts])

    made = PromptRoutedPruner(pipe, embedding=lengths, **SHORT).fit(*captioned())
    assert made.router.predictor.in_features == 2
    with pytest.raises(InputError, match="embeddings"):
        PromptRoutedPruner(pipe, embedding=lambda texts: torch.zeros(3), **SHORT).fit(*captioned())


# ------------------------------------------------------------------ files


def test_a_pruned_network_is_saved_and_loaded(tmp_path, unet, layout):
    g = random_gates(layout, 1, generator(8))[0]
    g[layout.n_width + 1] = 0
    small = cut(unet, layout, g)
    save_pruned(small, layout, g, tmp_path / "expert")
    loaded, gates = load_pruned(tmp_path / "expert")
    x, t, c = batch(2)
    with torch.no_grad():
        assert torch.equal(loaded(x, t, c).sample, small(x, t, c).sample) and torch.equal(gates, g)
    (tmp_path / "expert" / "kept.json").write_text("{}")
    with pytest.raises(InputError, match="a pruned network that can be read"):
        load_pruned(tmp_path / "expert")


def test_experts_are_saved_and_mounted(tmp_path, pipe, pruner):
    pruner.save(tmp_path / "made")
    assert {p.name for p in (tmp_path / "made").iterdir()} == {
        "router.safetensors",
        "aptp.json",
        *(f"expert_{k}" for k in pruner.experts),
    }
    routed = PromptRoutedPipeline.mount(pipe, tmp_path / "made")
    texts = captioned()[1][:5]
    noise = torch.randn(5, 4, 16, 16, generator=generator())
    plan = {"latents": noise, "num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(routed(texts, **plan).images, pruner.pipeline()(texts, **plan).images)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "made").rglob("*.safetensors"))
    assert routed.footprint() == pytest.approx(on_disk, rel=0.25)  # headers are much of files this small
    assert 0 < routed.multiply_adds(texts) <= 1
    with pytest.raises(InputError, match="experts of this pipeline"):
        other = scenes.pipeline()
        PromptRoutedPipeline.mount(other, tmp_path / "made")
    with pytest.raises(InputError, match="one that pruned experts were saved to"):
        PromptRoutedPipeline.mount(pipe, tmp_path)
    with pytest.raises(InputError, match="routing='best'"):
        PromptRoutedPipeline.mount(pipe, tmp_path / "made", routing="best")


def test_apply_to_a_folder_of_images_with_captions(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "subject")
    images, captions = captioned()
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        array = ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        Image.fromarray(array).save(data / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "text": text}))
    (data / "captions.jsonl").write_text("\n".join(lines))
    read, texts = read_captioned(data)
    torch.testing.assert_close(read, images, atol=1 / 127, rtol=0)
    assert texts == captions
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"budget": 0.75, "experts": 2, "steps": 2, "batch_size": 8, "finetune": 1, "finetune_batch_size": 4}
        facts = apply(tmp_path / "subject", data, tmp_path / "out", log=said.append, **settings)
    assert facts["multiply_adds"] == pytest.approx(0.75, abs=0.01) and said
    routed = PromptRoutedPipeline.mount(pipe, tmp_path / "out")
    assert routed(captions[:2], num_inference_steps=1, output_type="latent").images.shape == (2, 4, 16, 16)
    npz = tmp_path / "data.npz"
    np.savez(npz, images=((images + 1) / 2).permute(0, 2, 3, 1).numpy(), captions=np.array(captions))
    torch.testing.assert_close(read_captioned(npz)[0], images, atol=1e-5, rtol=0)


def test_the_card_s_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = catalog.card("aptp").text.partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "cards/aptp.md", "exec"), names)
    assert len(names["images"]) == 2 and (tmp_path / "my-experts" / "router.safetensors").is_file()


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"budget": 0.05}, r"budget=0.05 .* from 0\.\d+ \(the least\) to 1"),
        ({"budget": 1.2}, "budget=1.2"),
        ({"experts": 16, "batch_size": 8}, "experts=16 .* at most the batch size, 8"),
        ({"experts": 2, "architecture": "random"}, "one network for all prompts"),
        ({"experts": 0}, "experts=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"temperature": 0}, "temperature=0"),
        ({"architecture": "tiny"}, "architecture='tiny'"),
        ({"resource_form": "l1"}, "resource_form='l1'"),
        ({"sinks": 3}, "fields of APTPConfig"),
    ],
)
def test_bad_settings(pipe, settings, named):
    with pytest.raises(InputError, match=named):
        PromptRoutedPruner(pipe, **settings)


def test_bad_input(pipe, three, layout, tmp_path):
    router, experts = three
    routed = PromptRoutedPipeline(pipe, experts, router)
    images, captions = captioned()
    made = PromptRoutedPruner(pipe, **SHORT)
    with pytest.raises(InputError, match="texts that are not empty"):
        made.fit(images, ["", *captions[1:]])
    with pytest.raises(InputError, match="one for each of the 24 images"):
        made.fit(images, captions[:-1])
    with pytest.raises(InputError, match="at least a batch, 12"):
        made.fit(images[:5], captions[:5])
    with pytest.raises(InputError, match=r"of shape \(n, 3, 32, 32\)"):
        made.fit(images[..., :16], captions)
    with pytest.raises(InputError, match="fitted first"):
        made.prune()
    with pytest.raises(InputError, match="made first"):
        made.fit(images, captions).finetune()
    with pytest.raises(InputError, match="given as text"):
        routed(prompt_embeds=torch.zeros(1, 8, 64))
    for prompt in ("", ["a shape", " "]):
        with pytest.raises(InputError, match="texts that are not empty"):
            routed(prompt)
    with pytest.raises(InputError, match="of 1 rows"):
        routed("a shape", latents=torch.zeros(2, 4, 16, 16))
    with pytest.raises(InputError, match="generator"):
        routed("a shape", generator=[generator(), generator()])
    with pytest.raises(InputError, match="at least one on in every width group"):
        cut(pipe.unet, layout, torch.zeros(layout.size))
    with pytest.raises(InputError, match="0 or 1"):
        cut(pipe.unet, layout, torch.full((layout.size,), 0.5))
    with pytest.raises(InputError, match="a UNet2DConditionModel"):
        GateLayout(tiny.unconditional().unet)
    with pytest.raises(InputError, match="SimpleCrossAttnDownBlock2D"):
        GateLayout(network(down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D")))
    with pytest.raises(InputError, match="with tokenizer"):
        PromptRoutedPruner(tiny.stable_diffusion())
    with pytest.raises(InputError, match="given whole"):
        PromptRoutedPruner(pipe, APTPConfig(), experts=3)
    with pytest.raises(InputError, match=r"\.jsonl"):
        read_captioned(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"file": "none.png"}\n')
    with pytest.raises(InputError, match="line 1"):
        read_captioned(tmp_path)
    with pytest.raises(InputError, match="images with captions"):
        read_captioned(None)


def test_few_prompts_for_each_expert_are_warned_of(pipe):
    with pytest.warns(UserWarning, match="fewer than 4 prompts an expert"):
        PromptRoutedPruner(pipe, **SHORT | {"experts": 4, "steps": 1}).fit(*captioned())


def test_a_loss_that_is_not_finite_ends_the_training(pipe):
    made = PromptRoutedPruner(pipe, **SHORT | {"steps": 0}).fit(*captioned())
    optimizer = torch.optim.SGD(made.router.parameters(), lr=0.1)
    with pytest.raises(TrialError, match="not finite at step 3"):
        made._router_step(made.router, optimizer, 2, torch.full((24, 4, 8, 8), torch.nan), generator())
