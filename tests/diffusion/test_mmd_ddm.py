"""MMD-DDM: the estimator, the unrolled chain and its gradient, the trainer, and what it saves."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from steersman.diffusion import mmd_ddm
from steersman.diffusion.classical import DDIM, Heun
from steersman.diffusion.features import RandomFeatures
from steersman.diffusion.images import read_images
from steersman.diffusion.mmd_ddm import MMDConfig, MMDFinetuner, UnrolledSampler, apply, ddim_times
from steersman.diffusion.pndm import PNDMScheduler
from steersman.errors import InputError, TrialError


def tiny_unet(classes: int | None = None, dropout: float = 0.0) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
        dropout=dropout,
    )


class Linear(nn.Module):
    """ε(x, t) = w x + c t/1000 + b, on images of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.c, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.4, -0.3, 0.2))
        self.detached: int | None = None
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.w * x + self.c * t.view(-1, 1, 1, 1) / 1000 + self.b
        self.calls += 1
        return out.detach() if self.calls - 1 == self.detached else out


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def images(n: int = 64, seed: int = 0, channels: int = 1) -> Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def distance(kernel: str, u: Tensor, v: Tensor, groups=None) -> Tensor:
    return mmd_ddm.distance(u, v, kernel, groups)


def finetuner(model=None, features=None, data=None, **arguments) -> MMDFinetuner:
    defaults = {"num_inference_steps": 2, "max_steps": 2, "batch_size": 8, "eval_steps": 2, "eval_samples": 16}
    model = DDPMPipeline(tiny_unet(), DDPMScheduler()) if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MMDFinetuner(
            model, features or RandomFeatures(1), images() if data is None else data, **(defaults | arguments)
        )


# ------------------------------------------------------------------ oracles


@pytest.mark.parametrize("kernel", ["cubic", "linear", "rbf"])
def test_the_estimate_is_unbiased_under_one_law(kernel):
    g = torch.Generator().manual_seed(1)
    draws = np.array(
        [float(distance(kernel, *torch.randn(2, 16, 3, generator=g, dtype=torch.float64))) for _ in range(2000)]
    )
    assert abs(draws.mean()) < 4 * draws.std(ddof=1) / math.sqrt(len(draws))
    assert 0.4 < (draws < 0).mean() < 0.75


@pytest.mark.parametrize("kernel", ["cubic", "linear", "rbf"])
def test_pairs_that_share_a_label_are_left_out(kernel):
    """Equal laws, each generated image with the label of a real one: unbiased only without those pairs."""
    g = torch.Generator().manual_seed(3)
    m, repeats = 8, 1500
    centre = 2 * torch.randn(5, 2, generator=g, dtype=torch.float64)
    draws = []
    for _ in range(repeats):
        labels = torch.randint(5, (m,), generator=g)
        z = torch.randn(2, 2 * m, 2, generator=g, dtype=torch.float64)
        u = centre[labels.repeat(2)] + z[0]  # two for each label
        v = centre[labels] + z[1, :m]
        pairs = torch.arange(m)
        both = distance(kernel, u, v, (pairs.repeat(2), pairs))
        draws.append(
            (float(distance(kernel, u[:m], v, (pairs, pairs))), float(both), float(distance(kernel, u[:m], v)))
        )
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=1) / math.sqrt(repeats)
    assert abs(mean[0]) < 4 * error[0] and abs(mean[1]) < 4 * error[1]
    assert mean[2] < -4 * error[2]


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 9), m=st.integers(2, 9), d=st.integers(1, 5), degree=st.sampled_from([1, 3]))
def test_the_diagonals_are_all_that_the_v_statistic_adds(n, m, d, degree):
    u, v = normal(n, d, 0), normal(m, d, 1, 1.5, 0.3)
    unbiased = mmd_ddm.mmd2(u, v, degree=degree)
    biased = mmd_ddm.mmd2(u, v, degree=degree, unbiased=False)

    def excess(x: Tensor) -> Tensor:
        gram = (x @ x.T / d + 1) ** degree
        n = len(x)
        return (gram.diagonal().mean() - (gram.sum() - gram.trace()) / (n * (n - 1))) / n

    assert float(biased - unbiased) == pytest.approx(float(excess(u) + excess(v)), abs=1e-10)


def test_the_linear_kernel_compares_means_only():
    m, d = 12, 4
    u, v = normal(m, d, 0), normal(m, d, 1, 2.0, 0.5)
    traces = float(torch.cov(u.T).trace() + torch.cov(v.T).trace())
    expected = float((u.mean(0) - v.mean(0)).square().sum()) / d - traces / (m * d)
    assert float(distance("linear", u, v)) == pytest.approx(expected, abs=1e-10)


def test_the_cubic_kernel_is_its_feature_expansion():
    def phi(x: Tensor) -> Tensor:  # (⟨a, b⟩/2 + 1)³ = ⟨phi(a), phi(b)⟩, multinomially
        columns = []
        for i in range(4):
            for j in range(4 - i):
                weight = math.factorial(3) / (math.factorial(i) * math.factorial(j) * math.factorial(3 - i - j))
                columns.append(math.sqrt(weight * 0.5 ** (i + j)) * x[:, 0] ** i * x[:, 1] ** j)
        return torch.stack(columns, 1)

    u, v = normal(7, 2, 0), normal(5, 2, 1, 1.3)
    a, b = phi(u), phi(v)
    within = sum((x.sum(0).square().sum() - x.square().sum()) / (len(x) * (len(x) - 1)) for x in (a, b))
    assert float(distance("cubic", u, v)) == pytest.approx(float(within - 2 * a.mean(0) @ b.mean(0)), abs=1e-10)


def test_rbf_has_its_closed_form_between_gaussians():
    d, gamma, s1, s2, shift = 3, 1 / 3, 0.8, 1.4, 0.6

    def mean_kernel(va: float, vb: float, delta2: float) -> float:
        c = 1 + 2 * gamma * (va + vb)
        return c ** (-d / 2) * math.exp(-gamma * delta2 / c)

    expected = mean_kernel(s1**2, s1**2, 0) + mean_kernel(s2**2, s2**2, 0) - 2 * mean_kernel(s1**2, s2**2, d * shift**2)
    g = torch.Generator().manual_seed(2)
    z = torch.randn(1000, 2, 24, d, generator=g, dtype=torch.float64)
    draws = np.array([float(distance("rbf", s1 * u, s2 * v + shift)) for u, v in z])
    assert abs(draws.mean() - expected) < 4 * draws.std(ddof=1) / math.sqrt(len(draws))


def _gradients(network: Linear, detached: int | None = None, checkpointing: bool = False) -> list[float]:
    chain = UnrolledSampler(network, DDPMScheduler(), 3, gradient_checkpointing=checkpointing)
    network.detached, network.calls = detached, 0
    noise, real = normal(6, 1, 0).view(-1, 1, 1, 1), normal(5, 1, 1, 0.5, 0.4)
    network.zero_grad()
    distance("cubic", flat(chain(noise)), real).backward()
    network.detached = None
    return [float(p.grad) for p in network.parameters()]


def _finite_differences(network: Linear, h: float = 1e-5) -> list[float]:
    chain = UnrolledSampler(network, DDPMScheduler(), 3)
    noise, real = normal(6, 1, 0).view(-1, 1, 1, 1), normal(5, 1, 1, 0.5, 0.4)
    slopes = []
    with torch.no_grad():
        for p in network.parameters():
            values = []
            for sign in (1, -1):
                p += sign * h
                values.append(float(distance("cubic", flat(chain(noise)), real)))
                p -= sign * h
            slopes.append((values[0] - values[1]) / (2 * h))
    return slopes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_whole_chain(checkpointing):
    network = Linear()
    assert _gradients(network, checkpointing=checkpointing) == pytest.approx(_finite_differences(network), rel=1e-6)


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_detach_at_any_call_would_be_seen(call):
    network = Linear()
    exact, cut = _finite_differences(network), _gradients(network, detached=call)
    assert max(abs(a - b) / abs(a) for a, b in zip(exact, cut, strict=True)) > 1e-3


@pytest.mark.parametrize("classes", [None, 4])
def test_checkpointing_keeps_the_gradient(classes):
    unet = tiny_unet(classes).double()
    noise = normal(4, 64, 0).view(4, 1, 8, 8)
    labels = None if classes is None else torch.arange(4)
    found = []
    for checkpointing in (False, True):
        unet.zero_grad()
        chain = UnrolledSampler(unet, DDPMScheduler(), 3, gradient_checkpointing=checkpointing)
        chain(noise, labels).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-6


class LiveBytes(TorchDispatchMode):
    """The peak of bytes held by storages that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _peak_bytes(unet: UNet2DModel, n: int, checkpointing: bool) -> int:
    chain = UnrolledSampler(unet, DDPMScheduler(), n, gradient_checkpointing=checkpointing)
    noise = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for p in unet.parameters():  # gradients that are there already don't count
        p.grad = torch.zeros_like(p)
    with LiveBytes() as live:
        chain(noise).square().mean().backward()
    return live.peak


def test_memory_is_flat_in_the_number_of_calls_with_checkpointing():
    unet = tiny_unet().eval()
    plain = [_peak_bytes(unet, n, False) for n in (2, 10)]
    flat_ = [_peak_bytes(unet, n, True) for n in (2, 10)]
    assert plain[1] / plain[0] > 4
    assert flat_[1] / flat_[0] < 1.1


def test_what_is_saved_for_the_backward_pass_is_a_few_images_a_call():
    unet = tiny_unet().eval()
    image_bytes = 8 * 64 * 4
    saved = {}
    for checkpointing in (False, True):
        for n in (2, 10):
            sizes: dict[int, int] = {}

            def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            chain = UnrolledSampler(unet, DDPMScheduler(), n, gradient_checkpointing=checkpointing)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                chain(torch.randn(8, 1, 8, 8))
            saved[checkpointing, n] = sum(sizes.values())
    assert saved[True, 10] - saved[True, 2] <= 8 * 3 * image_bytes
    assert saved[False, 10] - saved[False, 2] > 8 * 50 * image_bytes


def _recorded(monkeypatch, trainer: MMDFinetuner) -> list[list[Tensor]]:
    """The gradients at each call of the trainer's clipping."""
    seen: list[list[Tensor]] = []

    def clip(parameters, max_norm):
        parameters = list(parameters)
        seen.append([p.grad.clone() for p in parameters])
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", clip)
    return seen


def test_the_gradient_of_a_step_is_the_mean_over_its_batches_and_clipped_once(monkeypatch):
    unet = tiny_unet().double()
    trainer = finetuner(unet, scheduler=DDPMScheduler(), max_steps=1, gradient_accumulation_steps=2, learning_rate=0.0)
    seen, batches = _recorded(monkeypatch, trainer), []
    loss = MMDFinetuner._loss

    def spy(self, chain, noise, real, labels, key=()):
        batches.append((noise, real))
        return loss(self, chain, noise, real, labels, key)

    monkeypatch.setattr(MMDFinetuner, "_loss", spy)
    trainer.train()
    assert len(seen) == 1 and len(batches) == 2
    unet.eval().requires_grad_(True)

    def gradient(noise: Tensor, real: Tensor) -> Tensor:
        found = torch.autograd.grad(trainer.loss(noise, real), list(unet.parameters()))
        return torch.cat([g.flatten() for g in found])

    total = torch.cat([g.flatten() for g in seen[0]])
    mean = (gradient(*batches[0]) + gradient(*batches[1])) / 2
    union = gradient(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert float((total - mean).norm() / mean.norm()) < 1e-10
    assert float((total - union).norm() / mean.norm()) > 1e-3


@pytest.mark.parametrize("n", [3, 5, 15])
def test_the_chain_is_diffusers_ddim(n):
    unet = tiny_unet().eval()
    scheduler = mmd_ddm.pinned_scheduler(DDPMScheduler(), n)
    pipe = DDIMPipeline(unet, scheduler)
    seen: list[int] = []
    unet.register_forward_pre_hook(lambda _, args: seen.append(int(torch.as_tensor(args[1]).flatten()[0])))
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = UnrolledSampler(unet, DDPMScheduler(), n)(noise)
    assert len(seen) == n and seen[0] == (1000 // n) * (n - 1)
    x = noise
    pipe.scheduler.set_timesteps(n)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(unet(x, t).sample, t, x).prev_sample
    assert seen[n:] == seen[:n]
    with torch.no_grad():
        assert float((ours - x).abs().max()) <= 1e-5 * max(1.0, float(x.abs().max()))


def test_trailing_times_are_diffusers_too():
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for n in (1, 5, 8, 20):
        scheduler.set_timesteps(n)
        assert ddim_times(1000, n, "trailing") == [*scheduler.timesteps.tolist(), -1]


def test_no_step_is_no_change():
    pipe = DDPMPipeline(tiny_unet(), DDPMScheduler())
    noise = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        before = UnrolledSampler(pipe.unet, pipe.scheduler, 3)(noise)
    finetuner(pipe, learning_rate=0.0).train()
    with torch.no_grad():
        assert torch.equal(before, UnrolledSampler(pipe.unet, pipe.scheduler, 3)(noise))


class Affine(nn.Module):
    """x̂0 = a z + b."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a).double()), nn.Parameter(torch.tensor(b).double())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a * x + self.b


def _fit_affine(kernel: str, standardised: bool, steps: int = 1500) -> tuple[float, float]:
    """|a| and b of x̂0 = a z + b, fitted to N(1.5, 0.6²) from a start within one of its deviations."""
    network, mu, s = Affine(1.0, 1.0), 1.5, 0.6
    chain = UnrolledSampler(network, DDPMScheduler(prediction_type="sample"), 1, gradient_checkpointing=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(0)
    trace = []
    for i in range(steps):
        if i == steps // 2:
            optimizer.param_groups[0]["lr"] = 1e-3
        z = torch.randn(2, 128, 1, 1, 1, generator=g, dtype=torch.float64)
        u, v = flat(chain(z[0])), mu + s * flat(z[1])
        if standardised:
            u, v = (u - mu) / s, (v - mu) / s
        optimizer.zero_grad()
        distance(kernel, u, v).backward()
        optimizer.step()
        trace.append((abs(network.a.item()), network.b.item()))
    a, b = np.mean(trace[-steps // 5 :], axis=0)
    return float(a), float(b)


def test_the_cubic_kernel_finds_mean_and_scale_of_a_gaussian():
    a, b = _fit_affine("cubic", True)
    assert a == pytest.approx(0.6, abs=0.03 * 0.6)
    assert b == pytest.approx(1.5, abs=0.03 * 0.6)


def test_the_linear_kernel_finds_the_mean_only():
    a, b = _fit_affine("linear", True, steps=600)
    assert b == pytest.approx(1.5, abs=0.03 * 0.6)
    assert abs(a - 0.6) > 0.06 * 0.6


def test_without_standardising_the_cubic_kernel_leaves_the_scale_open():
    a, _ = _fit_affine("cubic", False)
    assert abs(a - 0.6) > 0.09 * 0.6


def test_real_images_and_extractor_get_no_gradient_but_its_input_does():
    unet = tiny_unet().eval()
    extractor = RandomFeatures(1)
    trainer = finetuner(unet, extractor, scheduler=DDPMScheduler())
    seen = []

    def spy(module, args, output):
        if args[0].requires_grad:
            args[0].register_hook(lambda g: seen.append(float(g.abs().sum())))
            assert not any(p.requires_grad for p in module.parameters())

    handle = extractor.register_forward_hook(spy)
    trainer.train()
    handle.remove()
    assert len(seen) == 2 and min(seen) > 0
    assert all(p.grad is None and p.requires_grad for p in extractor.parameters())

    noise, real = torch.randn(6, 1, 8, 8), images(6, 3)
    unet.requires_grad_(True)
    whole = torch.autograd.grad(trainer.loss(noise, real), list(unet.parameters()))
    u, v = trainer.embed(trainer._chain(noise)), trainer.embed(2 * real - 1)
    gram_u, gram_uv = (u @ u.T / u.shape[1] + 1) ** 3, (u @ v.T / u.shape[1] + 1) ** 3
    without_real = (gram_u.sum() - gram_u.trace()) / 30 - 2 * gram_uv.mean()
    for a, b in zip(whole, torch.autograd.grad(without_real, list(unet.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1e-12))


# ------------------------------------------------------------------ errata


def test_fifteen_steps_are_fifteen():
    """``range(0, 1000, 1000 // 15)`` has 16 times; a budget of N calls has N."""
    assert len(range(0, 1000, 1000 // 15)) == 16
    assert len(ddim_times(1000, 15)) == 15 + 1  # and the image's own


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 1200), data=st.data(), spacing=st.sampled_from(["leading", "trailing"]))
def test_n_steps_are_n_for_every_t(T, data, spacing):
    n = data.draw(st.integers(1, T))
    times = ddim_times(T, n, spacing)
    assert len(times) == n + 1 and times[-1] == -1 and times[-2] >= 0 and times[0] < T
    assert all(a > b for a, b in itertools.pairwise(times))


def test_dropout_is_off_while_training_as_it_is_in_sampling():
    unet = tiny_unet(dropout=0.5).train()
    modes = []
    unet.mid_block.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    finetuner(unet, scheduler=DDPMScheduler()).train()
    assert modes and not any(modes) and unet.training


def test_the_final_estimate_is_not_clipped_so_that_its_gradient_lives():
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(5.0))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, 1.0) * self.a

    network = Loud()
    x = UnrolledSampler(network, DDPMScheduler(prediction_type="sample"), 1)(torch.randn(4, 1, 2, 2))
    (live,) = torch.autograd.grad(x.sum(), network.a, retain_graph=True)
    (dead,) = torch.autograd.grad(x.clamp(-1, 1).sum(), network.a)
    assert float(live) == 16 and float(dead) == 0


def test_validation_does_not_move_the_optimizer_steps(monkeypatch):
    """However often it validates, the batches of a step stay together."""
    runs = []
    for every in (1, 3):
        trainer = finetuner(max_steps=3, eval_steps=every, gradient_accumulation_steps=2, learning_rate=1e-4)
        seen = _recorded(monkeypatch, trainer)
        trainer.train()
        runs.append(seen)
    assert len(runs[0]) == len(runs[1]) == 3
    assert all(torch.equal(a, b) for x, y in zip(*runs, strict=True) for a, b in zip(x, y, strict=True))


def test_the_held_out_images_are_never_trained_on(monkeypatch):
    data = images(40)
    trained = []
    loss = MMDFinetuner._loss
    monkeypatch.setattr(
        MMDFinetuner, "_loss", lambda self, c, n, real, *a: (trained.append(real), loss(self, c, n, real, *a))[1]
    )
    trainer = finetuner(data=data, max_steps=8, holdout=0.25)
    trainer.train()
    held_out = {bytes(x.numpy()) for x in trainer._eval[0]}
    assert len(held_out) == 10
    assert not held_out & {bytes(x.numpy()) for batch in trained for x in batch}


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 65}, "batch_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"max_steps": -1}, "max_steps"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"kernel": "quartic"}, "kernel"),
        ({"spacing": "linspace"}, "spacing"),
        ({"eta": 1.5}, "eta"),
        ({"mixed_precision": "int8"}, "mixed_precision"),
        ({"lora": 0}, "lora"),
        ({"holdout": 1.0}, "holdout"),
        ({"seed": -1}, "seed"),
        ({"learning_rat": 1e-3}, "argument"),
    ],
)
def test_a_bad_setting_is_named(arguments, parameter):
    with pytest.raises(InputError, match=rf"^{parameter}=") as error:
        finetuner(**arguments)
    assert "must be" in str(error.value)


@pytest.mark.parametrize(
    ("data", "parameter"),
    [
        (images(channels=3), "images"),
        (torch.rand(40, 1, 16, 16), "images"),
        (images() * 2 - 1, "images"),
        (images() * math.nan, "images"),
        (images()[:, 0], "images"),
        (images(2), "images"),
        ((images(), torch.zeros(3).long()), "labels"),
        ("folder", "images"),
        (DataLoader(TensorDataset(images()), batch_size=8), "eval_images"),
    ],
)
def test_bad_images_are_refused(data, parameter):
    with pytest.raises(InputError, match=rf"^{parameter}="):
        finetuner(data=data)


def test_a_class_conditional_network_needs_labels_it_knows():
    unet = tiny_unet(4)
    with pytest.raises(InputError, match="class-conditional"):
        finetuner(unet, scheduler=DDPMScheduler())
    with pytest.raises(InputError, match="from 0 to 3"):
        finetuner(unet, data=(images(), torch.full((64,), 4)), scheduler=DDPMScheduler())


def test_a_bad_extractor_is_refused():
    def nan(x: Tensor) -> Tensor:
        return flat(x) * math.nan

    def frozen(x: Tensor) -> Tensor:
        return flat(x.detach())

    class Growing:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            self.calls += 1
            return flat(x)[:, : 20 + self.calls]

    for features, error, text in (
        (nan, TrialError, "not finite"),
        (frozen, InputError, "differentiable"),
        (Growing(), InputError, "number of features"),
        (lambda x: x, InputError, "shape"),
    ):
        with pytest.raises(error, match=text):
            finetuner(features=features).train()
    with pytest.raises(InputError, match=r"^features="):
        finetuner(features="inception")


def test_models_that_it_can_not_train_are_refused():
    class Latent:
        unet, scheduler, vae = tiny_unet(), DDPMScheduler(), nn.Identity()

    with pytest.raises(InputError, match="pixel space"):
        finetuner(Latent())
    with pytest.raises(InputError, match=r"^scheduler="):
        finetuner(tiny_unet())
    with pytest.raises(InputError, match="alphas_cumprod"):
        finetuner(tiny_unet(), scheduler=object())
    with pytest.raises(InputError, match=r"^solver="):
        finetuner(solver=lambda process: "ddim")


def test_few_real_images_are_said():
    with pytest.warns(UserWarning, match="only 58 real images"):
        MMDFinetuner(DDPMPipeline(tiny_unet(), DDPMScheduler()), RandomFeatures(1), images(), batch_size=8)


def test_a_network_that_diverges_keeps_its_best_weights():
    pipe = DDPMPipeline(tiny_unet(), DDPMScheduler())
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(TrialError, match="not finite"):
        finetuner(pipe, learning_rate=1e30, max_steps=5, max_grad_norm=math.inf).train()
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_collapse_stops_the_training():
    class Shrinking(nn.Module):
        """All outputs become alike when a falls, which a kernel that rewards likeness asks for."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.a * x

    network = Shrinking()
    trainer = finetuner(
        network,
        flat,
        scheduler=DDPMScheduler(prediction_type="sample"),
        num_inference_steps=1,
        kernel=lambda u, v: u.square().sum(),
        learning_rate=0.1,
        max_steps=40,
        eval_steps=40,
    )
    with pytest.warns(UserWarning, match="collapsed"):
        result = trainer.train()
    assert result.collapsed_at is not None and result.steps == result.collapsed_at < 40
    assert float(network.a) == 1.0


# ------------------------------------------------------------------ in its host


def test_training_lowers_the_held_out_distance():
    network, data = Affine(1.0, 0.0).float(), images(120) * 0.5 + 0.5  # x = 2 image - 1 has mean 0.5
    trainer = finetuner(
        network,
        flat,
        data=data,
        scheduler=DDPMScheduler(prediction_type="sample"),
        num_inference_steps=1,
        learning_rate=0.05,
        max_steps=30,
        eval_steps=10,
    )
    result = trainer.train()
    assert result.best_distance < 0.1 * result.initial_distance
    assert result.best_distance == min(e["distance"] for e in result.history if "distance" in e)
    assert trainer.distance() == pytest.approx(result.best_distance, rel=1e-6)


def test_the_saved_pipeline_is_a_stock_one_pinned_to_n(tmp_path):
    pipe = DDPMPipeline(tiny_unet(), DDPMScheduler(clip_sample=True, beta_schedule="squaredcos_cap_v2"))
    trainer = finetuner(pipe, learning_rate=1e-3, num_inference_steps=3)
    trainer.train()
    trainer.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    config = loaded.scheduler.config
    assert isinstance(loaded.scheduler, DDIMScheduler)
    assert config.beta_schedule == "squaredcos_cap_v2" and not config.clip_sample and config.set_alpha_to_one
    assert config.steps_offset == 0 and config.timestep_spacing == "leading" and config._num_inference_steps == 3
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded.scheduler.set_timesteps(3)
    x = noise
    with torch.no_grad():
        for t in loaded.scheduler.timesteps:
            x = loaded.scheduler.step(loaded.unet(x, t).sample, t, x).prev_sample
        ours = UnrolledSampler(pipe.unet, pipe.scheduler, 3)(noise)
    assert torch.allclose(x, ours, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def test_resuming_ends_where_an_uninterrupted_run_ends(tmp_path):
    weights = []
    for stops in ((4,), (2, 4)):
        pipe = DDPMPipeline(tiny_unet(), DDPMScheduler())
        for turn, stop in enumerate(stops):
            trainer = finetuner(
                pipe, learning_rate=1e-3, max_steps=stop, output_dir=tmp_path / str(len(stops)), eval_steps=2
            )
            result = trainer.train(resume_from_checkpoint=turn > 0)
        assert result.steps == 4 and [e["step"] for e in result.history] == [1, 2, 3, 4]
        weights.append(torch.cat([p.flatten() for p in pipe.unet.parameters()]))
    assert torch.equal(*weights)


def test_old_checkpoints_go_and_a_missing_one_is_said(tmp_path):
    trainer = finetuner(output_dir=tmp_path, max_steps=3, eval_steps=1, save_total_limit=1)
    with pytest.raises(InputError, match="holds a checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="checkpoint folder"):
        trainer.train(resume_from_checkpoint=tmp_path)
    trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_lora_trains_an_adapter_and_leaves_a_plain_network(tmp_path):
    pipe = DDPMPipeline(tiny_unet(), DDPMScheduler())
    keys, before = list(pipe.unet.state_dict()), pipe.unet.conv_in.weight.clone()
    block = pipe.unet.mid_block.resnets[0].conv1.weight.clone()
    trainer = finetuner(pipe, lora=2, learning_rate=1e-2, max_steps=4, eval_steps=1, output_dir=tmp_path)
    result = trainer.train()
    assert list(pipe.unet.state_dict()) == keys and torch.equal(before, pipe.unet.conv_in.weight)
    assert result.best_step > 0 and not torch.equal(block, pipe.unet.mid_block.resnets[0].conv1.weight)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_labels_of_the_real_batch_go_to_the_network(monkeypatch):
    unet = tiny_unet(4)
    labels = torch.arange(64) % 4
    marked = images() * 0 + labels.view(-1, 1, 1, 1) / 4
    seen = []
    unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True)
    trainer = finetuner(unet, flat, data=(marked, labels), scheduler=DDPMScheduler(), standardise=False)
    loss = MMDFinetuner._loss

    def spy(self, chain, noise, real, y, key=()):
        assert torch.equal(real[:, 0, 0, 0] * 4, y.float())
        seen.clear()
        found = loss(self, chain, noise, real, y, key)
        assert len(seen) == 2 and all(torch.equal(s, y) for s in seen)
        return found

    monkeypatch.setattr(MMDFinetuner, "_loss", spy)
    trainer.train()


def test_data_may_come_as_loader_dicts_bytes_and_unequal_batches():
    raw = (images() * 255).to(torch.uint8)
    items = [{"pixel_values": x, "label": 0} for x in raw]
    loader = DataLoader(items, batch_size=7)  # the last batch holds one image, which has no distance
    trainer = finetuner(data=loader, eval_images=items[:9], max_steps=12, gradient_accumulation_steps=2)
    assert trainer.train().steps == 12


def test_any_precision_and_dtype():
    AcceleratorState._reset_state(True)
    try:
        pipe = DDPMPipeline(tiny_unet().to(torch.bfloat16), DDPMScheduler())
        kinds = set()

        def features(x: Tensor) -> Tensor:
            kinds.add((x.dtype, torch.is_autocast_enabled("cpu")))
            return flat(x)

        trainer = finetuner(pipe, features, mixed_precision="bf16", learning_rate=1e-2)
        assert math.isfinite(trainer.train().best_distance)
        assert kinds == {(torch.float32, False)}
        assert pipe.unet.dtype == torch.bfloat16
        with pytest.raises(InputError, match=r"^mixed_precision="):
            finetuner(mixed_precision="fp16")
    finally:
        AcceleratorState._reset_state(True)


def test_the_users_accelerator_callback_and_solver_are_used():
    entries = []
    trainer = finetuner(
        accelerator=Accelerator(),
        callback=entries.append,
        solver=Heun,
        num_inference_steps=3,
        learning_rate=1e-4,
    )
    assert isinstance(trainer._chain.solver, Heun)
    trainer.train()
    assert [int(e["step"]) for e in entries] == [1, 2]
    assert {"loss", "grad_norm", "variance_ratio"} <= set(entries[0])
    with pytest.raises(InputError, match=r"^gradient_accumulation_steps="):
        finetuner(accelerator=Accelerator(), gradient_accumulation_steps=3)


def test_a_stochastic_chain_repeats_with_its_generator():
    chain = UnrolledSampler(tiny_unet().eval(), DDPMScheduler(), 3, eta=1.0)
    noise = torch.randn(2, 1, 8, 8)
    a, b, c = (chain(noise, None, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetuner(DDPMPipeline(UNET, DDPMScheduler())).train()
    assert torch.equal(torch.rand(3), expected)


UNET = tiny_unet()


def test_other_schedulers_sample_the_tuned_network():
    pipe = DDPMPipeline(tiny_unet(), DDPMScheduler())
    finetuner(pipe).train()
    pipe.set_progress_bar_config(disable=True)
    for scheduler in (PNDMScheduler, DPMSolverMultistepScheduler, DDIMScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        out = pipe(batch_size=2, num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0))
        assert np.isfinite(out.images).all()


# ------------------------------------------------------------------ apply


@pytest.fixture
def subject(tmp_path) -> Path:
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "subject")
    return tmp_path / "subject"


TINY = {"calls": 2, "steps": 2, "batch_size": 32, "validate_every": 1}


def test_apply_saves_a_plain_pipeline(subject, tmp_path):
    np.savez(tmp_path / "real.npz", images=images().squeeze(1).numpy())
    lines: list[str] = []
    with pytest.warns(UserWarning, match="only"):
        metrics = apply(subject, tmp_path / "real.npz", tmp_path / "out", log=lines.append, learning_rate=1e-3, **TINY)
    assert metrics["steps"] == 2 and metrics["held_out_distance_after"] <= metrics["held_out_distance_before"]
    assert len(lines) == 2 and "held-out distance" in lines[0]
    loaded = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.scheduler, DDIMScheduler)


@pytest.mark.filterwarnings("ignore:only")
def test_apply_takes_features_by_name_and_as_callables(subject, tmp_path):
    np.save(tmp_path / "real.npy", (images().squeeze(1).numpy() * 255).astype(np.uint8))
    for i, features in enumerate(("pixels", flat, nn.Flatten)):
        metrics = apply(subject, tmp_path / "real.npy", tmp_path / f"out{i}", features=features, **TINY)
        assert metrics["steps"] == 2
    with pytest.raises(InputError, match=r"^features="):
        apply(subject, tmp_path / "real.npy", tmp_path / "no", features="clip", **TINY)


def test_every_setting_of_apply_is_typed_and_keyword_only():
    parameters = list(inspect.signature(apply).parameters.values())
    assert [p.name for p in parameters[:3]] == ["subject", "input", "out"]
    for p in parameters[3:]:
        assert p.kind is p.KEYWORD_ONLY and p.default is not p.empty and p.annotation is not p.empty


def test_images_come_from_folders_with_a_folder_a_class(tmp_path):
    from PIL import Image

    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        for i in range(3):
            pixels = np.full((8, 8), 60 * i + (label == "dogs"), np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    found, labels = read_images(tmp_path, channels=3, labelled=True)
    assert found.shape == (6, 3, 8, 8) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert float(found[3, 0, 0, 0]) == pytest.approx(1 / 255)
    assert read_images(tmp_path, channels=1)[1] is None

    Image.fromarray(np.zeros((8, 6), np.uint8)).save(tmp_path / "dogs" / "z.png")
    with pytest.raises(InputError, match=r"of one size with the others \(0.png has 8x8, this one 6x8\)"):
        read_images(tmp_path)
    (tmp_path / "dogs" / "z.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"z\.png.*image file that can be read"):
        read_images(tmp_path)


def test_images_of_sixteen_bits_keep_their_values(tmp_path):
    from PIL import Image

    values = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray((values // 257).astype(np.uint8)).save(tmp_path / "b.png")
    wanted = torch.from_numpy(values.astype(np.float32) / 65535)
    for channels in (None, 1, 3, 4):
        found, _ = read_images(tmp_path, channels=channels)
        assert found.shape == (2, channels or 1, 8, 12)
        assert all(torch.equal(c, wanted) for c in found[0, :3])
        torch.testing.assert_close(found[1, 0], wanted, atol=1 / 255, rtol=0)
        assert channels != 4 or bool((found[:, 3] == 1).all())
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "c.tiff")
    (tmp_path / "c.tiff").rename(tmp_path / "c.png")
    with pytest.raises(InputError, match=r"c\.png of mode F.* 8 or 16 bits"):
        read_images(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"pixels": np.zeros((4, 8, 8))}, "holds 'images'"),
        ({"images": np.zeros((4, 8))}, "of shape"),
        ({"images": np.full((4, 8, 8), 2.0)}, r"in \[0, 1\]"),
        ({"images": np.full((4, 8, 8), np.nan)}, "finite"),
        ({"images": np.zeros((4, 8, 8), np.int64)}, "uint8"),
        ({"images": np.zeros((4, 8, 8, 3))}, "channels"),
        ({"images": np.zeros((4, 8, 8))}, "'labels'"),
        ({"images": np.zeros((4, 8, 8)), "labels": np.zeros(3, int)}, "each of 4 images"),
        ({"images": np.zeros((4, 8, 8)), "labels": np.zeros(4)}, "whole number"),
    ],
)
def test_unreadable_arrays_are_refused(tmp_path, content, text):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(InputError, match=text):
        read_images(tmp_path / "a.npz", channels=1, labelled="label" in text or "labels" in content)


def test_missing_or_broken_input_and_subject_are_refused(subject, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"half a file")
    (tmp_path / "empty").mkdir()
    for source, text in (
        (None, "real images"),
        (tmp_path / "bad.npz", "can be read"),
        (tmp_path / "empty", "image files"),
    ):
        with pytest.raises(InputError, match=text):
            apply(subject, source, tmp_path / "out", **TINY)
    (subject / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    np.save(tmp_path / "real.npy", images().squeeze(1).numpy())
    for broken in (subject, tmp_path / "empty"):
        with pytest.raises(InputError, match=r"^subject="):
            apply(broken, tmp_path / "real.npy", tmp_path / "out", **TINY)


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 4),
    spacing=st.sampled_from(["leading", "trailing"]),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    kernel=st.sampled_from(["cubic", "linear", "rbf"]),
)
def test_every_valid_configuration_takes_a_step(n, spacing, eta, prediction, kernel):
    trainer = finetuner(
        UNET,
        scheduler=DDPMScheduler(prediction_type=prediction, beta_end=0.005),
        num_inference_steps=n,
        eval_samples=4,
        batch_size=4,
        spacing=spacing,
        eta=eta,
        kernel=kernel,
        max_steps=1,
        learning_rate=0.0,
    )
    entry = trainer.train().history[0]
    assert math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])
    # exp(-gamma d**2) is 0 in float32 for samples far from the data, and then so is its gradient.
    assert entry["grad_norm"] > 0 or kernel == "rbf"
    assert isinstance(trainer._chain.solver, DDIM)


def test_the_config_may_be_given_whole_but_not_twice():
    config = MMDConfig(batch_size=8, max_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = MMDFinetuner(DDPMPipeline(UNET, DDPMScheduler()), RandomFeatures(1), images(), config)
        assert trainer.train().steps == 0
        with pytest.raises(InputError, match=r"^config="):
            MMDFinetuner(DDPMPipeline(UNET, DDPMScheduler()), RandomFeatures(1), images(), config, seed=1)
