r"""MMD-DDM: fine-tune a diffusion model for N steps by the kernel distance of its outputs to real images.

With ᾱ_t the cumulative product of a diffusion model's alphas, the N-step DDIM chain starts from noise
x_{t_1} ~ N(0, I) and repeats, for its times t_1 > t_2 > ... > t_N = 0 and t' the time after t (ᾱ = 1 after
the last),

    x̂0    = (x_t - sqrt(1 - ᾱ_t) ε_θ(x_t, t)) / sqrt(ᾱ_t)
    x_{t'} = sqrt(ᾱ_{t'}) x̂0 + c1 z + c2 ε_θ(x_t, t),     z ~ N(0, I)
    c1     = η sqrt((1 - ᾱ_t/ᾱ_{t'}) (1 - ᾱ_{t'}) / (1 - ᾱ_t)),     c2 = sqrt(1 - ᾱ_{t'} - c1²).

It is one differentiable function of θ. With u_i the features of m images that it makes and v_j those of m
real ones, θ follows the gradient of the unbiased estimate

    L = [sum_{i≠j} k(u_i, u_j) + sum_{i≠j} k(v_i, v_j)] / (m (m - 1)) - (2/m²) sum_{ij} k(u_i, v_j)

through all N network calls, with k(a, b) = (⟨a, b⟩/d + 1)³. A few hundred steps suffice, and what comes out
is the same network.

A class-conditional network is given the labels of the real batch. Then u_i and v_i are not independent (they
share a label), and the cross term leaves the pairs i = j out, as the other two do (the U-statistic of the pairs
(u_i, v_i): Gretton et al., JMLR 2012, eq. 4). With them in, equal laws have a negative mean L.

E. Aiello, D. Valsesia, E. Magli, "Fast Inference in Denoising Diffusion Models via MMD Finetuning",
arXiv:2301.07969.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Sampler, Subset

from steersman.diffusion.classical import DDIM
from steersman.diffusion.features import built_in_features
from steersman.diffusion.images import as_dataset, gather, load_pipeline, read_batch, read_images
from steersman.diffusion.solver import DiscreteVP, Solver, denoiser, integrate
from steersman.errors import InputError, TrialError
from steersman.math.divergences import kernel_matrix, mmd2

KernelName = Literal["cubic", "linear", "rbf"]
Spacing = Literal["leading", "trailing", "quadratic"]
KERNELS: dict[str, dict[str, Any]] = {
    "cubic": {"kernel": "polynomial", "degree": 3},
    "linear": {"kernel": "polynomial", "degree": 1},
    "rbf": {"kernel": "rbf"},
}
SPACINGS = ("leading", "trailing", "quadratic")


# ------------------------------------------------------------------ the chain


def ddim_times(num_train_timesteps: int, num_inference_steps: int, spacing: Spacing = "leading") -> list[int]:
    """t_1 > ... > t_N and the image's own time -1: exactly N steps, also where N does not divide T.

        leading:    t_i = (N - i) ⌊T/N⌋              (T = 1000: N = 5 starts at 800, N = 3 at 666)
        trailing:   t_i = round(T - (i - 1) T/N) - 1
        quadratic:  t_i = ⌊(sqrt(0.8 T) (N - i)/(N - 1))²⌋

    The first two are diffusers' ``timestep_spacing`` of these names with ``steps_offset=0``.

    Args:
        num_train_timesteps: T.
        num_inference_steps: N, from 1 to T.
        spacing: leading, trailing or quadratic.
    """
    T, N = num_train_timesteps, num_inference_steps
    if isinstance(N, bool) or not isinstance(N, int) or not 1 <= N <= T:
        raise InputError("num_inference_steps", N, f"a whole number from 1 to {T}")
    if spacing == "leading":
        times = [i * (T // N) for i in reversed(range(N))]
    elif spacing == "trailing":
        times = [round(T - i * T / N) - 1 for i in range(N)]
    elif spacing == "quadratic":
        times = [int(0.8 * T * (i / max(N - 1, 1)) ** 2) for i in reversed(range(N))]
        if len(set(times)) < N:
            raise InputError("num_inference_steps", N, f"fewer, for quadratic spacing of {T} times")
    else:
        raise InputError("spacing", spacing, f"one of {', '.join(SPACINGS)}")
    return [*times, -1]


class UnrolledSampler(nn.Module):
    """N steps of a solver (DDIM) as one differentiable map from noise to images: the module's equations.

    It is a module of its own so that data-parallel training sees one forward pass for one backward pass,
    not N.

    Args:
        unet: called as ``unet(x, t)``, with ``class_labels=`` where labels are given; returns a tensor or
            an output with ``.sample``, of x's shape.
        scheduler: any diffusers scheduler with ``alphas_cumprod``; its prediction type (epsilon,
            v_prediction, sample) says what the network returns.
        num_inference_steps: N.
        spacing: of the times, see :func:`ddim_times`.
        eta: η of DDIM, 0 (deterministic) to 1.
        gradient_checkpointing: keep only each call's x for the backward pass and run the network again
            there: memory for activations is that of one call, whatever N, for a third more time.
        solver: another solver in place of DDIM, made from the process: a class such as
            :class:`~steersman.diffusion.classical.Heun`, or any function of it that returns a solver.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        num_inference_steps: int,
        *,
        spacing: Spacing = "leading",
        eta: float = 0.0,
        gradient_checkpointing: bool = True,
        solver: Callable[[DiscreteVP], Solver[Any]] | None = None,
    ) -> None:
        super().__init__()
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas, Tensor):
            raise InputError("scheduler", type(scheduler).__name__, "one that has alphas_cumprod, as DDIMScheduler")
        process = DiscreteVP(alphas.double().cpu())
        self.unet = unet
        self.times = ddim_times(len(alphas), num_inference_steps, spacing)
        self.solver = DDIM(process, eta) if solver is None else solver(process)
        if not isinstance(self.solver, Solver):
            raise InputError("solver", type(self.solver).__name__, "a function of the process that returns a Solver")
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        denoiser(process, self._network, self.prediction_type)  # refuses unknown prediction types
        self.gradient_checkpointing = gradient_checkpointing

    def forward(
        self, x: Tensor, class_labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images in about [-1, 1], not clipped (clipping would zero the gradient where it acts).

        Args:
            x: N(0, I) noise, (m, C, H, W).
            class_labels: (m,) for class-conditional networks.
            generator: for z, where the solver is stochastic.
        """

        def network(x: Tensor, t: float) -> Tensor:
            if not self.gradient_checkpointing or not torch.is_grad_enabled():
                return self._network(x, t, class_labels)
            # The network is in evaluation mode and draws nothing: no random state to restore.
            return checkpoint(self._network, x, t, class_labels, use_reentrant=False, preserve_rng_state=False)

        predict = denoiser(self.solver.process, network, self.prediction_type)
        return integrate(self.solver, predict, x, self.times, generator).x

    def _network(self, x: Tensor, t: float, class_labels: Tensor | None = None) -> Tensor:
        times = torch.full((len(x),), int(t) if t == int(t) else t, device=x.device)
        labels = {} if class_labels is None else {"class_labels": class_labels}
        output = self.unet(x, times, **labels)
        output = getattr(output, "sample", output).to(x.dtype)
        if output.shape != x.shape:
            raise InputError(
                "unet", tuple(output.shape), f"a network whose output has its input's shape, {tuple(x.shape)}"
            )
        return output


def pinned_scheduler(scheduler: Any, num_inference_steps: int, spacing: Spacing = "leading") -> DDIMScheduler:
    """The DDIM scheduler that samples as the chain does, from any scheduler of the same network.

    ``scheduler.config["_num_inference_steps"]`` says for how many steps the network was tuned.
    """
    pinned = DDIMScheduler.from_config(
        scheduler.config,
        # diffusers' DDIM takes no list of times: with quadratic spacing, pass them to a sampler that does.
        timestep_spacing="leading" if spacing == "quadratic" else spacing,
        steps_offset=0,
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
    )
    pinned.register_to_config(_num_inference_steps=num_inference_steps, _spacing=spacing)
    return pinned


# ------------------------------------------------------------------ the loss


def distance(u: Tensor, v: Tensor, kernel: KernelName = "cubic", groups: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The unbiased MMD² between the laws of u and v: each of its three means is over independent pairs.

    Args:
        u: features of generated images, (n, d), n >= 2.
        v: features of real images, (m, d), m >= 2; n and m may differ.
        kernel: cubic (⟨a, b⟩/d + 1)³, linear ⟨a, b⟩/d + 1, or rbf exp(-|a - b|²/d).
        groups: of u (n,) and v (m,): pairs of one group share a label, and are left out. None: all independent.
    """
    if groups is None:
        return mmd2(u, v, **KERNELS[kernel])
    k: Callable[[Tensor, Tensor], Tensor] = partial(kernel_matrix, **KERNELS[kernel])

    def mean(a: Tensor, b: Tensor, group_a: Tensor, group_b: Tensor) -> Tensor:
        apart = (group_a[:, None] != group_b[None, :]).to(a)
        return (k(a, b) * apart).sum() / apart.sum()

    g, h = groups
    return mean(u, u, g, g) + mean(v, v, h, h) - 2 * mean(u, v, g, h)


# ------------------------------------------------------------------ the trainer


@dataclass
class MMDConfig:
    """Arguments of :class:`MMDFinetuner`, named as in transformers' ``TrainingArguments`` where it has them.

    Args:
        num_inference_steps: N, the number of network calls that the result is for.
        output_dir: where checkpoints go; None keeps none.
        max_steps: optimizer steps.
        batch_size: m, generated and real images of a (micro-)batch and process, from 2. The loss of a step
            is the mean over its micro-batches, which is not the loss of their union: prefer a large m.
        gradient_accumulation_steps: micro-batches of a step.
        learning_rate: of Adam. Too large a rate collapses the diversity within tens of steps.
        adam_beta1, adam_beta2, adam_epsilon, weight_decay: of Adam.
        max_grad_norm: the gradient of a whole step (not of each micro-batch) is scaled to at most this norm.
        eval_steps: held-out distance (and, with an ``output_dir``, a checkpoint) every so many steps.
        eval_samples: generated images of the held-out distance.
        save_total_limit: checkpoints that are kept, the newest.
        kernel: cubic, linear (matches means only), rbf (γ = 1/d), or a function (u, v) -> L.
        standardise: features to the real images' mean and scale. The cubic kernel grows as |f|⁶/d³ and
            is flat in directions of small scale: without it, expect to tune by hand.
        spacing, eta, gradient_checkpointing: of :class:`UnrolledSampler`.
        mixed_precision: of the network calls: no, bf16 or fp16. The features and the kernel never use half.
        lora: rank of a PEFT adapter on all convolutions and linear layers (or a ``LoraConfig``) to be
            trained instead of all weights; it is merged at the end. None trains all weights.
        holdout: share of the images held out for choosing the checkpoint, where none are given.
        collapse_ratio: stop where the variance of the generated features falls below this share of the
            real images' (or of its own start, if that was lower); 0 never stops.
        seed: of noise, batches and the held-out split.
        report_to: an accelerate tracker ("tensorboard", "wandb"); its files go to ``output_dir``.
    """

    num_inference_steps: int = 5
    output_dir: str | Path | None = None
    max_steps: int = 400
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    eval_steps: int = 50
    eval_samples: int = 256
    save_total_limit: int = 2
    kernel: KernelName | Callable[[Tensor, Tensor], Tensor] = "cubic"
    standardise: bool = True
    spacing: Spacing = "leading"
    eta: float = 0.0
    gradient_checkpointing: bool = True
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    lora: Any = None
    holdout: float = 0.1
    collapse_ratio: float = 0.1
    seed: int = 0
    report_to: str | None = None

    def __post_init__(self) -> None:
        whole = {
            "max_steps": 0,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "eval_steps": 1,
            "eval_samples": 2,
            "save_total_limit": 1,
            "seed": 0,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(name, value, f"a whole number of at least {least}")
        for name, low, high in (
            ("learning_rate", 0.0, math.inf),
            ("adam_beta1", 0.0, 1.0),
            ("adam_beta2", 0.0, 1.0),
            ("adam_epsilon", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("holdout", 0.0, 1.0),
            ("collapse_ratio", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                raise InputError(name, value, f"a number from {low:g} to below {high:g}")
        if not isinstance(self.max_grad_norm, (int, float)) or not self.max_grad_norm > 0:
            raise InputError("max_grad_norm", self.max_grad_norm, "a number above 0 (inf never clips)")
        if not callable(self.kernel) and self.kernel not in KERNELS:
            raise InputError("kernel", self.kernel, f"one of {', '.join(KERNELS)}, or a function of (u, v)")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise InputError("mixed_precision", self.mixed_precision, "no, bf16 or fp16")
        if isinstance(self.lora, (bool, float)) or (isinstance(self.lora, int) and self.lora < 1):
            raise InputError("lora", self.lora, "a rank from 1, a peft.LoraConfig or None")


@dataclass
class MMDResult:
    """What :meth:`MMDFinetuner.train` did.

    Args:
        steps: optimizer steps taken.
        best_step: the step whose weights were kept; 0 is the given network.
        initial_distance, best_distance: held-out MMD² of the given network and of the one kept.
        collapsed_at: the step at which the collapse guard stopped, or None.
        seconds: of this call of ``train``.
        history: one entry per step: step, loss, grad_norm, variance_ratio, and distance where evaluated.
    """

    steps: int
    best_step: int
    initial_distance: float
    best_distance: float
    collapsed_at: int | None
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


class MMDFinetuner:
    """Fine-tune a diffusion network for N steps of DDIM (or another sampler), see the module's equations.

        u = f(DDIM_N(θ, noise)),  L = MMD²(u, f(real)),  θ <- Adam(θ, clip(∇_θ L, 0.5))

    The network is trained in place, in evaluation mode (dropout off, as it will be sampled); labels of
    class-conditional networks are those of the real batch.

    Args:
        model: a diffusers pipeline with a ``unet``, or the network itself (then give ``scheduler``).
        features: f, images in [0, 1] (m, C, H, W) -> (m, d); a module is kept frozen in evaluation mode,
            and the gradient flows through it to its input.
        images: real images in [0, 1]: a tensor (n, C, H, W) (float, or uint8 from 0 to 255), a tuple
            (images, labels), a ``Dataset`` or a ``DataLoader``; a dataset's items are an image, an (image,
            label) pair or a mapping with "images"/"pixel_values" and "labels"/"label".
        config: an :class:`MMDConfig`; its fields may also be given as keyword arguments.
        scheduler: the network's scheduler, where ``model`` is no pipeline.
        eval_images: held-out real images (needed with a ``DataLoader``); else ``config.holdout`` of ``images``.
        solver: another solver than DDIM, see :class:`UnrolledSampler`.
        accelerator: an ``accelerate.Accelerator`` that holds nothing else; None makes one.
        callback: called with each step's entry of the history.

    Raises:
        InputError: a bad argument, or real images that don't fit the network.
    """

    def __init__(
        self,
        model: Any,
        features: Callable[[Tensor], Tensor],
        images: Any,
        config: MMDConfig | None = None,
        *,
        scheduler: Any = None,
        eval_images: Any = None,
        solver: Callable[[DiscreteVP], Solver[Any]] | None = None,
        accelerator: Accelerator | None = None,
        callback: Callable[[dict[str, float]], None] | None = None,
        **arguments: Any,
    ) -> None:
        if config is not None and arguments:
            raise InputError("config", sorted(arguments), "given whole, or as keyword arguments, not both")
        self.config = config or _config(arguments)
        self.pipeline = model if hasattr(model, "unet") else None
        self.unet: nn.Module = model.unet if self.pipeline is not None else model
        if not isinstance(self.unet, nn.Module):
            raise InputError("model", type(model).__name__, "a diffusers pipeline with a unet, or a network")
        if any(getattr(model, name, None) is not None for name in ("vae", "vqvae", "text_encoder")):
            raise InputError("model", type(model).__name__, "a pipeline in pixel space, without a VAE or text encoder")
        self.scheduler = scheduler if scheduler is not None else getattr(model, "scheduler", None)
        if self.scheduler is None:
            raise InputError("scheduler", None, "the network's scheduler, as model is no pipeline")
        if not callable(features):
            raise InputError("features", type(features).__name__, "a function or module from images to features")
        self.features = features
        weights = features.parameters() if isinstance(features, nn.Module) else ()
        self._feature_dtype = next((p.dtype for p in weights if p.is_floating_point()), None)
        self.callback = callback
        self._own_accelerator = accelerator is None
        self.accelerator = accelerator or self._accelerator()
        if self.accelerator.gradient_accumulation_steps != self.config.gradient_accumulation_steps:
            steps = self.accelerator.gradient_accumulation_steps
            raise InputError(
                "gradient_accumulation_steps", self.config.gradient_accumulation_steps, f"the accelerator's, {steps}"
            )
        self.device = self.accelerator.device
        self.dtype = next(self.unet.parameters()).dtype
        self._shape = _image_shape(self.unet)
        self._classes = _num_classes(self.unet)
        self.solver = solver
        # Adam's steps are far below what half precision can add to a weight: train in float32.
        self._compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._train_images, self._eval_images = self._split(images, eval_images)
        self._chain = self._make_chain(self.unet)
        self._mean: Tensor | None = None
        self._scale: Tensor | None = None

    # -------------------------------------------------------------- the loss

    def loss(self, noise: Tensor, real: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """L for images made from ``noise`` against ``real`` images in [0, 1]; differentiable in θ.

        Args:
            noise: (n, C, H, W), n >= 2.
            real: (m, C, H, W), m >= 2.
            class_labels: (n,) for class-conditional networks, those of ``real`` (n = m).
        """
        return self._loss(self._chain, noise, real, class_labels)[0]

    def _loss(
        self, chain: nn.Module, noise: Tensor, real: Tensor, labels: Tensor | None, key: tuple[int, ...] = ()
    ) -> tuple[Tensor, float]:
        z = _generator(self.config.seed, "z", *key) if self.config.eta > 0 else None
        u = self.embed(chain(noise, labels, z))
        with torch.no_grad():  # the real-real term is constant in θ, and f's weights are fixed
            v = self.embed(2 * real - 1)
        if torch.is_grad_enabled() and not u.requires_grad:
            raise InputError(
                "features", _name(self.features), "differentiable (its output has no gradient: is it under no_grad?)"
            )
        ratio = float(u.detach().var(0).sum() / v.var(0).sum().clamp_min(1e-30))
        pairs = None if labels is None else torch.arange(len(v), device=v.device)
        return self._score(u, v, None if pairs is None else (pairs, pairs)), ratio

    def _score(self, u: Tensor, v: Tensor, groups: tuple[Tensor, Tensor] | None) -> Tensor:
        kernel = self.config.kernel
        return kernel(u, v) if callable(kernel) else distance(u, v, kernel, groups)

    def embed(self, x: Tensor) -> Tensor:
        """f of images in [-1, 1], standardised if so configured; in float64 where the device has it.

        Raises:
            InputError: features of a wrong shape, type or number.
            TrialError: features that are not finite.
        """
        f = self.features(((x + 1) / 2).to(self._feature_dtype or x.dtype))
        if not isinstance(f, Tensor) or f.ndim != 2 or len(f) != len(x) or not f.is_floating_point():
            shape = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise InputError("features", shape, f"a floating-point tensor of shape ({len(x)}, d) for {len(x)} images")
        if self._mean is not None and f.shape[1] != len(self._mean):
            raise InputError("features", f.shape[1], f"of one number of features ({len(self._mean)} at first)")
        if not bool(torch.isfinite(f).all()):
            raise TrialError("the features are not finite: the network diverged, or the extractor fails on its images")
        f = f.to(torch.float32 if f.device.type == "mps" else torch.float64)
        return f if self._mean is None or self._scale is None else (f - self._mean) / self._scale

    @torch.no_grad()
    def distance(self) -> float:
        """The held-out MMD² of the network as it is: same noise and same images each time."""
        real, labels = self._eval
        n = self.config.eval_samples
        made = []
        for start in range(0, n, self.config.batch_size):
            count = min(self.config.batch_size, n - start)
            index = torch.arange(start, start + count) % len(real)
            noise = _noise((count, *real.shape[1:]), self.config.seed, "eval", start).to(self.device, self._compute)
            label = None if labels is None else labels[index].to(self.device)
            z = _generator(self.config.seed, "eval z", start)
            with self.accelerator.autocast():
                x = self._chain(noise, label, z)
            made.append(self.embed(x.to(self._compute)))
        groups = None
        if labels is not None:
            h = torch.arange(len(real), device=self.device)
            groups = torch.arange(n, device=self.device) % len(real), h
        return float(self._score(torch.cat(made), self._eval_features, groups))

    # -------------------------------------------------------------- the loop

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> MMDResult:
        """Train, and leave the network with the weights of the lowest held-out distance.

        Args:
            resume_from_checkpoint: a ``checkpoint-*`` folder, or True for the newest in ``output_dir``.

        Raises:
            TrialError: a loss or features that are not finite, with the step; checkpoints stay.
        """
        config, accelerator = self.config, self.accelerator
        checkpoint_dir = self._checkpoint(resume_from_checkpoint)
        start = time.perf_counter()
        with _frozen(self.features, self.device), self._trainable() as (network, parameters):
            self._chain = self._make_chain(network).to(self.device)
            self._prepare_features()
            optimizer = torch.optim.Adam(
                parameters,
                lr=config.learning_rate,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
            )
            chain, optimizer = accelerator.prepare(self._chain, optimizer)
            if config.report_to:
                accelerator.init_trackers("mmd-ddm", config={k: str(v) for k, v in asdict(config).items()})
            state = _State()
            best = [p.detach().cpu().clone() for p in parameters]
            if checkpoint_dir is not None:
                accelerator.load_state(str(checkpoint_dir))
                state = _State(**json.loads((checkpoint_dir / "state.json").read_text()))
                saved = load_file(checkpoint_dir / "best.safetensors")
                best = [saved[str(i)] for i in range(len(parameters))]
            else:
                state.initial_distance = state.best_distance = self.distance()
            batches = self._batches(state.step * config.gradient_accumulation_steps)
            ratios: deque[float] = deque(maxlen=5)
            try:
                while state.step < config.max_steps and state.collapsed_at is None:
                    entry = self._optimizer_step(chain, optimizer, parameters, batches, state.step)
                    state.step += 1
                    state.history.append(entry)
                    ratios.append(entry["variance_ratio"])
                    state.first_ratio = state.first_ratio or entry["variance_ratio"]
                    if len(ratios) == 5 and np.mean(ratios) < config.collapse_ratio * min(1.0, state.first_ratio):
                        state.collapsed_at = state.step
                    elif state.step % config.eval_steps == 0 or state.step == config.max_steps:
                        entry["distance"] = self.distance()
                        if entry["distance"] < state.best_distance:
                            state.best_distance, state.best_step = entry["distance"], state.step
                            best = [p.detach().cpu().clone() for p in parameters]
                        self._save(state, best)
                    if config.report_to:
                        accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=state.step)
                    if self.callback is not None:
                        self.callback(entry)
            finally:  # also after an error or an interrupt, the network is the best one so far
                with torch.no_grad():
                    for parameter, value in zip(parameters, best, strict=True):
                        parameter.copy_(value)
                if config.report_to:
                    accelerator.end_training()
                if self._own_accelerator:  # which holds this run's objects; the next run starts anew
                    self.accelerator = self._accelerator()
        self._chain = self._make_chain(self.unet)
        if state.collapsed_at is not None:
            warnings.warn(
                f"stopped at step {state.collapsed_at}: the generated features' variance collapsed; the weights of "
                f"step {state.best_step} were kept (lower learning_rate)",
                stacklevel=2,
            )
        return MMDResult(
            steps=state.step,
            best_step=state.best_step,
            initial_distance=state.initial_distance,
            best_distance=state.best_distance,
            collapsed_at=state.collapsed_at,
            seconds=time.perf_counter() - start,
            history=state.history,
        )

    def _optimizer_step(
        self, chain: nn.Module, optimizer: Any, parameters: list[nn.Parameter], batches: Iterator[Any], step: int
    ) -> dict[str, float]:
        """One step of Adam on the mean gradient of the micro-batches, clipped once."""
        config, accelerator = self.config, self.accelerator
        losses, ratios, norm = [], [], 0.0
        for micro in range(config.gradient_accumulation_steps):
            real, labels = self._on_device(*next(batches))
            key = (step, micro, accelerator.process_index)
            noise = _noise(real.shape, config.seed, "noise", *key).to(self.device, self._compute)
            with accelerator.accumulate(chain):
                loss, ratio = self._loss(chain, noise, real, labels, key)
                if not bool(torch.isfinite(loss)):
                    raise TrialError(f"the loss is not finite at step {step + 1}: lower learning_rate")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
                    if not math.isfinite(norm) and config.mixed_precision != "fp16":
                        raise TrialError(f"the gradient is not finite at step {step + 1}")
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            ratios.append(ratio)
        return {
            "step": step + 1,
            "loss": float(np.mean(losses)),
            "grad_norm": norm,
            "variance_ratio": float(np.mean(ratios)),
        }

    # -------------------------------------------------------------- what comes out

    def save_pretrained(self, folder: str | Path) -> None:
        """The pipeline (or, without one, ``unet`` and ``scheduler`` folders), scheduler pinned to N steps."""
        scheduler = pinned_scheduler(self.scheduler, self.config.num_inference_steps, self.config.spacing)
        if self.pipeline is not None:
            self.pipeline.scheduler = scheduler
            self.pipeline.save_pretrained(folder)
        else:
            self.unet.save_pretrained(Path(folder) / "unet")  # type: ignore[operator]
            scheduler.save_pretrained(Path(folder) / "scheduler")

    # -------------------------------------------------------------- parts of the loop

    def _accelerator(self) -> Accelerator:
        config = self.config
        try:
            return Accelerator(
                mixed_precision=config.mixed_precision,
                # A user's loader may end between two micro-batches of a step; the step goes on.
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
                ),
                log_with=config.report_to,
                project_dir=None if config.output_dir is None else str(config.output_dir),
            )
        except ValueError as error:
            if "already been initialized" not in str(error):
                raise
            allowed = "what this process already told accelerate to use (one precision a process)"
            raise InputError("mixed_precision", config.mixed_precision, allowed) from error

    def _make_chain(self, network: nn.Module) -> UnrolledSampler:
        c = self.config
        return UnrolledSampler(
            network,
            self.scheduler,
            c.num_inference_steps,
            spacing=c.spacing,
            eta=c.eta,
            gradient_checkpointing=c.gradient_checkpointing,
            solver=self.solver,
        )

    @contextmanager
    def _trainable(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The network in evaluation mode and float32 with what is to be trained; as it was, afterwards."""
        unet, flags = self.unet, [(p, p.requires_grad) for p in self.unet.parameters()]
        training, device = unet.training, next(unet.parameters()).device
        network: nn.Module = unet
        try:
            if self.dtype != self._compute:
                unet.to(self._compute)
            if self.config.lora is None:
                unet.requires_grad_(True)
            else:
                network = _add_lora(unet, self.config.lora, self.config.seed)
            network.eval()
            yield network, [p for p in network.parameters() if p.requires_grad]
        finally:
            if network is not unet:
                if self.config.output_dir is not None:
                    network.save_pretrained(Path(self.config.output_dir) / "lora")  # type: ignore[operator]
                network.merge_and_unload()  # type: ignore[operator]
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            unet.train(training).to(device)
            if self.dtype != self._compute:
                unet.to(self.dtype)

    def _prepare_features(self) -> None:
        """The features' mean and scale over real images, and the held-out images' features."""
        self._mean = self._scale = None
        images, labels = gather(self._eval_images, 1024)
        self._check_batch(images, labels)
        self._eval = images, labels if self._classes is not None else None
        with torch.no_grad():
            # As many images as the estimate needs; a stream of batches gives what its first batches hold.
            real, _ = gather(self._train_images, 4096)
            f = torch.cat([self.embed(2 * part.to(self.device, self._compute) - 1) for part in real.split(256)])
            if self.config.standardise:
                scale = f.std(0)
                # A feature that is all but constant on real images must not become the loudest of all.
                self._mean = f.mean(0)
                self._scale = scale.clamp_min(0.1 * float(scale.square().mean().sqrt())).clamp_min(1e-12)
            else:
                self._mean, self._scale = torch.zeros_like(f[0]), torch.ones_like(f[0])
            parts = images.split(256)
            self._eval_features = torch.cat([self.embed(2 * p.to(self.device, self._compute) - 1) for p in parts])

    def _split(self, images: Any, eval_images: Any) -> tuple[Any, Any]:
        """Training and held-out images as a Dataset or DataLoader each."""
        train = as_dataset("images", images)
        if eval_images is not None:
            held_out = as_dataset("eval_images", eval_images)
        elif isinstance(train, DataLoader):
            raise InputError("eval_images", None, "held-out real images, as images is a DataLoader")
        else:
            n = len(train)  # type: ignore[arg-type]
            count = max(2, round(self.config.holdout * n))
            order = torch.randperm(n, generator=_generator(self.config.seed, "split")).tolist()
            train, held_out = Subset(train, order[count:]), Subset(train, order[:count])
        if not isinstance(train, DataLoader):
            n, m = len(train), self.config.batch_size
            if n < m:
                raise InputError("batch_size", m, f"at most the number of training images, {n}")
            if n < 10 * m:
                warnings.warn(
                    f"only {n} real images for batches of {m}: the network may learn them by heart", stacklevel=3
                )
        self._check_batch(*read_batch(next(iter(held_out)) if isinstance(held_out, DataLoader) else held_out[0]))
        return train, held_out

    def _batches(self, start: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches without end, from micro-batch ``start`` on, a process's share of each."""
        if isinstance(self._train_images, DataLoader):
            loader = self.accelerator.prepare_data_loader(self._train_images, device_placement=False)
            skip = start % max(len(loader), 1)
            while True:
                part = self.accelerator.skip_first_batches(loader, skip) if skip else loader
                count = 0
                for batch in part:
                    images, labels = read_batch(batch)
                    self._check_batch(images, labels)
                    if len(images) >= 2:
                        count += 1
                        yield images, labels
                if count == 0 and skip == 0:
                    raise InputError("images", type(self._train_images).__name__, "batches of at least 2 images")
                skip = 0
        order = _Batches(
            len(self._train_images),
            self.config.batch_size,
            self.config.seed,
            start,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        for batch in DataLoader(self._train_images, batch_sampler=order, generator=torch.Generator()):
            images, labels = read_batch(batch)
            self._check_batch(images, labels)
            yield images, labels

    def _check_batch(self, images: Tensor, labels: Tensor | None) -> None:
        shape = tuple(images.shape[-3:])
        if self._shape is not None and any(a is not None and a != b for a, b in zip(self._shape, shape, strict=True)):
            wanted = "x".join("any" if a is None else str(a) for a in self._shape)
            raise InputError(
                "images", "x".join(map(str, shape)), f"of the network's channels x height x width, {wanted}"
            )
        if self._classes is None:
            return
        if labels is None:
            raise InputError("images", "without labels", "given with labels, as the network is class-conditional")
        if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= self._classes:
            raise InputError("labels", labels.unique().tolist()[:10], f"whole numbers from 0 to {self._classes - 1}")

    def _on_device(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        labels = None if self._classes is None or labels is None else labels.to(self.device)
        return images.to(self.device, self._compute), labels

    def _save(self, state: _State, best: list[Tensor]) -> None:
        """``checkpoint-<step>``: accelerate's state, the best weights so far and the loop's own state."""
        if self.config.output_dir is None:
            return
        root = Path(self.config.output_dir)
        folder = root / f"checkpoint-{state.step}"
        partial_folder = root / f"checkpoint-{state.step}.partial"
        self.accelerator.save_state(str(partial_folder))
        if self.accelerator.is_main_process:
            save_file({str(i): p.contiguous() for i, p in enumerate(best)}, partial_folder / "best.safetensors")
            (partial_folder / "state.json").write_text(json.dumps(asdict(state)))
            shutil.rmtree(folder, ignore_errors=True)
            partial_folder.rename(folder)
            for old in _checkpoints(root)[: -self.config.save_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _checkpoint(self, resume: str | Path | bool | None) -> Path | None:
        if resume is None or resume is False:
            return None
        if resume is True:
            found = _checkpoints(Path(self.config.output_dir)) if self.config.output_dir is not None else []
            if not found:
                raise InputError("resume_from_checkpoint", True, "used with an output_dir that holds a checkpoint")
            return found[-1]
        if not (Path(resume) / "state.json").is_file():
            raise InputError("resume_from_checkpoint", str(resume), "a checkpoint folder of this trainer")
        return Path(resume)


@dataclass
class _State:
    """What the loop carries from step to step beside weights and the optimizer."""

    step: int = 0
    best_step: int = 0
    initial_distance: float = math.nan
    best_distance: float = math.inf
    first_ratio: float | None = None
    collapsed_at: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)


class _Batches(Sampler[list[int]]):
    """Batches of indices without end, a function of (seed, position) alone, so that a run can resume."""

    def __init__(self, n: int, batch_size: int, seed: int, start: int, rank: int, ranks: int) -> None:
        self.n, self.size, self.seed, self.start, self.rank, self.ranks = n, batch_size, seed, start, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        whole = self.n // self.size
        position, epoch, order = self.start * self.ranks + self.rank, -1, []
        while True:
            if position // whole != epoch:
                epoch = position // whole
                order = torch.randperm(self.n, generator=_generator(self.seed, "epoch", epoch)).tolist()
            first = position % whole * self.size
            yield order[first : first + self.size]
            position += self.ranks


def _config(arguments: Mapping[str, Any]) -> MMDConfig:
    known = list(MMDConfig.__dataclass_fields__)
    for name in arguments:
        if name not in known:
            raise InputError("argument", name, f"one of {', '.join(known)}")
    return MMDConfig(**arguments)


def _checkpoints(root: Path) -> list[Path]:
    found = [p for p in root.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def _generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator keyed on what it is for: the same draws on every device, and after a resume."""
    entropy = [seed, *purpose.encode(), 0, *key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))


def _noise(shape: Sequence[int], seed: int, purpose: str, *key: int) -> Tensor:
    return torch.randn(tuple(shape), generator=_generator(seed, purpose, *key))


@contextmanager
def _frozen(features: Any, device: torch.device) -> Iterator[None]:
    """A feature module in evaluation mode, without gradients for its weights; as it was, afterwards."""
    if not isinstance(features, nn.Module):
        yield
        return
    modes = [(m, m.training) for m in features.modules()]
    flags = [(p, p.requires_grad) for p in features.parameters()]
    try:
        features.eval().requires_grad_(False).to(device)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _add_lora(unet: nn.Module, lora: Any, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if isinstance(lora, int):
        targets = [
            name for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and "." in name
        ]  # all but the first and last convolution, which hold few weights
        lora = LoraConfig(r=lora, lora_alpha=lora, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(unet, lora)  # type: ignore[arg-type]


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def _image_shape(unet: Any) -> tuple[int | None, int | None, int | None] | None:
    config = getattr(unet, "config", None)
    if config is None or "in_channels" not in config:
        return None
    size = config.get("sample_size")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return config["in_channels"], height, width


def _num_classes(unet: Any) -> int | None:
    config = getattr(unet, "config", None) or {}
    if config.get("class_embed_type") not in (None, "timestep"):
        raise InputError("class_embed_type", config["class_embed_type"], "a network with a table of classes, or none")
    return config.get("num_class_embeds")


# ------------------------------------------------------------------ apply


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    calls: int = 5,
    steps: int = 400,
    batch_size: int = 64,
    accumulate: int = 1,
    learning_rate: float = 5e-6,
    kernel: Literal["cubic", "linear", "rbf"] = "cubic",
    features: Callable[..., Any] | str = "random",
    standardise: bool = True,
    spacing: Literal["leading", "trailing"] = "leading",
    eta: float = 0.0,
    checkpointing: bool = True,
    precision: Literal["no", "bf16", "fp16"] = "no",
    lora: int | None = None,
    holdout: float = 0.1,
    validate_every: int = 50,
) -> dict[str, Any]:
    """Fine-tune the pipeline folder ``subject`` for few network calls and save it as a pipeline folder.

    Args:
        subject: a diffusers pipeline folder (in pixel space, unconditional or class-conditional), or hub id.
        input: real images: a folder of image files (one folder a class, where the network has classes), or
            .npz with ``images`` (and ``labels``) or .npy: (n, H, W) or (n, H, W, C), uint8 or in [0, 1].
        out: where the pipeline folder goes.
        seed: of noise, batches and the held-out split.
        log: gets a line now and then.
        calls: network calls that the result is for.
        steps: optimizer steps.
        batch_size: generated and real images of a batch.
        accumulate: batches of a step.
        learning_rate: of Adam.
        kernel: cubic, linear or rbf.
        features: ``random`` (a fixed random convolutional network), ``pixels`` (principal components), or
            file.py:name, a module, a module's class, or a function: images in [0, 1] -> (m, d).
        standardise: features to the real images' mean and scale.
        spacing: of the sampler's times, leading or trailing.
        eta: noise of the sampler, 0 to 1.
        checkpointing: memory independent of the calls, for a third more time.
        precision: of the network calls.
        lora: train an adapter of this rank instead of all weights (merged at the end).
        holdout: share of the images that chooses the checkpoint and isn't trained on.
        validate_every: steps between two held-out distances.

    Returns:
        dict: held-out distances before and after, the step kept, and what was done.

    Raises:
        InputError: a subject, images or settings that don't fit together.
    """
    pipe = load_pipeline(subject)
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise InputError("subject", str(subject), "a diffusers pipeline with a unet")
    images, labels = read_images(input, channels=unet.config.in_channels, labelled=_num_classes(unet) is not None)
    extractor = built_in_features(features, images, seed)

    def report(entry: dict[str, float]) -> None:
        if "distance" in entry:
            step, distance = int(entry["step"]), entry["distance"]
            log(f"step {step}/{steps}: loss {entry['loss']:.4g}, held-out distance {distance:.4g}")

    finetuner = MMDFinetuner(
        pipe,
        extractor,
        images if labels is None else (images, labels),
        callback=report,
        num_inference_steps=calls,
        max_steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        kernel=kernel,
        standardise=standardise,
        spacing=spacing,
        eta=eta,
        gradient_checkpointing=checkpointing,
        mixed_precision=precision,
        lora=lora,
        holdout=holdout,
        eval_steps=min(validate_every, steps) or validate_every,
        seed=seed,
    )
    result = finetuner.train()
    finetuner.save_pretrained(out)
    return {
        "calls": calls,
        "steps": result.steps,
        "best_step": result.best_step,
        "held_out_distance_before": result.initial_distance,
        "held_out_distance_after": result.best_distance,
        "collapsed_at": result.collapsed_at,
        "seconds": result.seconds,
        "images": len(images),
        "features": _name(extractor),
    }
