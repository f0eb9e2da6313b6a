r"""Training from pairs of images, and which of residual and noise one network is to predict.

    t ~ U{0, ..., T - 1},  ε ~ N(0, I),  I_t = I_0 + ᾱ_t I_res + β̄_t ε
    L(θ) = sum over heads of ‖head - its target‖ (L1, or squared for L2), mean over pixels
    θ <- Adam(θ, clip(∇L)),    θ_ema <- θ_ema + (1 - decay) (θ - θ_ema)

Automatic selection (AOSA): while a learned λ, from 0.5, is within 0.01 of it, one network f stands for both,

    Î_res = λ f + (1 - λ) res(f),   ε̂ = λ noise(f) + (1 - λ) f,   L = λ L_res + (1 - λ) L_ε,

and after that for the residual (λ above 0.5) or the noise alone, from new weights.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from steersman.diffusion.rddm.levels import Level
from steersman.diffusion.rddm.pairs import Pairs
from steersman.diffusion.rddm.pipeline import Networks, RDDMRestorationPipeline
from steersman.diffusion.rddm.predictions import heads, noise_of_residual, residual_of_noise, targets
from steersman.diffusion.rddm.scheduler import RDDMScheduler
from steersman.errors import InputError, TrialError

Loss = Callable[[Tensor, Tensor | None, Tensor | None, torch.Generator], Tensor]
BAND = 0.01
"""AOSA decides when λ is this far from 0.5."""
NOISE_FLOOR = 0.01
"""β̄_t is at least this where AOSA divides by it: at the first timesteps nothing else would count in L."""


# ------------------------------------------------------------------ the loop


@dataclass
class TrainingConfig:
    """Arguments of the loop, named as in transformers' ``TrainingArguments`` where it has them.

    Args:
        steps: of the optimizer.
        batch_size: pairs of a (micro-)batch and process.
        gradient_accumulation_steps: micro-batches of a step.
        learning_rate: of the optimizer.
        optimizer: adam or radam.
        max_grad_norm: the gradient is scaled to at most this norm.
        ema_decay: of the averaged weights, that are kept in the end; less in the first steps, (1 + k)/(10 + k).
        crop: side of the random square that is cut out of a pair; None takes whole images, which must be of one size.
        flip: mirror half of the pairs.
        mixed_precision: no, bf16 or fp16.
        output_dir: where checkpoints go; None keeps none.
        save_steps: a checkpoint every so many steps.
        seed: of weights, batches, times and noise.
    """

    steps: int = 2000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    optimizer: Literal["adam", "radam"] = "adam"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    crop: int | None = None
    flip: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    output_dir: str | Path | None = None
    save_steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"steps": 0, "batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 1, "seed": 0}
        whole |= {} if self.crop is None else {"crop": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(name, value, f"a whole number from {least}")
        for name, high in (("learning_rate", math.inf), ("ema_decay", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < high:
                raise InputError(name, value, f"a number from 0 to below {high:g}")
        if not isinstance(self.max_grad_norm, (int, float)) or not self.max_grad_norm > 0:
            raise InputError("max_grad_norm", self.max_grad_norm, "a number above 0 (inf never clips)")
        for name, allowed in (("optimizer", ("adam", "radam")), ("mixed_precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in allowed:
                raise InputError(name, getattr(self, name), f"one of {', '.join(allowed)}")


def fit(
    network: nn.Module,
    pairs: Pairs,
    loss: Callable[[nn.Module], Loss],
    config: TrainingConfig,
    *,
    resume: bool = False,
    callback: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Train ``network`` in place on batches of ``pairs``; in the end it has the averaged weights.

    Batches, crops and what ``loss`` draws depend on the seed and the step alone: two trainings with one seed see the
    same, and a run that was resumed goes on as if it had not been interrupted.

    Args:
        network: what is trained.
        pairs: see :class:`~steersman.diffusion.rddm.pairs.Pairs`.
        loss: of the network (as accelerate wrapped it), a function of I_0, I_in, the mask and a generator.
        config: see there.
        resume: go on from the newest checkpoint in ``config.output_dir``, if there is one.
        callback: called with the step and its loss; training stops where it returns True.

    Returns:
        list: the loss of each step.

    Raises:
        TrialError: a loss that is not finite.
    """
    c = config
    pairs.check_crop(c.crop)
    plugin = GradientAccumulationPlugin(num_steps=c.gradient_accumulation_steps, sync_with_dataloader=False)
    try:
        accelerator = Accelerator(mixed_precision=c.mixed_precision, gradient_accumulation_plugin=plugin)
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        allowed = "what this process already told accelerate to use (one precision a process)"
        raise InputError("mixed_precision", c.mixed_precision, allowed) from error
    network.to(accelerator.device).train().requires_grad_(True)
    kind = torch.optim.RAdam if c.optimizer == "radam" else torch.optim.Adam
    optimizer = kind(network.parameters(), lr=c.learning_rate)
    ema = EMAModel(network.parameters(), decay=c.ema_decay)
    ema.to(accelerator.device)
    wrapped, prepared = accelerator.prepare(network, optimizer)
    accelerator.register_for_checkpointing(ema)
    value_of = loss(wrapped)
    losses: list[float] = []
    if resume and (found := _checkpoints(c.output_dir)):
        accelerator.load_state(str(found[-1]))
        losses = json.loads((found[-1] / "losses.json").read_text())
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for step in range(len(losses), c.steps):
            torch.manual_seed(int(_entropy(c.seed, "network", step)))  # dropout
            values = []
            for micro in range(c.gradient_accumulation_steps):
                key = (step, micro, accelerator.process_index)
                batch = pairs.batch(c.batch_size, c.crop, c.flip, stream(c.seed, "batch", *key))
                target, x_in, mask = (None if x is None else x.to(accelerator.device) for x in batch)
                assert target is not None
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast():
                        value = value_of(target, x_in, mask, stream(c.seed, "noise", *key))
                    number = float(value.detach())
                    if not math.isfinite(number):
                        raise TrialError(f"the loss is not finite at step {step + 1}: lower learning_rate")
                    accelerator.backward(value)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), c.max_grad_norm)
                    prepared.step()
                    prepared.zero_grad()
                values.append(number)
            ema.step(network.parameters())
            losses.append(float(np.mean(values)))
            if c.output_dir is not None and ((step + 1) % c.save_steps == 0 or step + 1 == c.steps):
                _save(accelerator, Path(c.output_dir), losses)
            if callback is not None and callback(step + 1, losses[-1]) is True:
                break
    if losses:
        ema.copy_to(network.parameters())
    network.eval()
    return losses


def stream(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator keyed on what it is for: the same draws on every device, and after a resume."""
    return torch.Generator().manual_seed(int(_entropy(seed, purpose, *key)))


def _entropy(seed: int, purpose: str, *key: int) -> int:
    return int(np.random.SeedSequence([seed, *purpose.encode(), 0, *key]).generate_state(1, np.uint64)[0] >> 1)


def _checkpoints(root: str | Path | None) -> list[Path]:
    found = [p for p in Path(root).glob("checkpoint-*") if p.name.partition("-")[2].isdigit()] if root else []
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def _save(accelerator: Accelerator, root: Path, losses: Sequence[float]) -> None:
    """``checkpoint-<step>``, whole or not at all; the two newest are kept."""
    folder = root / f"checkpoint-{len(losses)}"
    partial = folder.with_name(f"{folder.name}.partial")
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        (partial / "losses.json").write_text(json.dumps(list(losses)))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in _checkpoints(root)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


# ------------------------------------------------------------------ networks


def make_network(
    in_channels: int, out_channels: int, width: int, sample_size: int | None, seed: int, dropout: float = 0.0
) -> UNet2DModel:
    """A U-Net of three sizes, with ``width``, 2 and 2 times ``width`` channels.

    Raises:
        InputError: ``width`` is not a multiple of 4.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 4 or width % 4:
        raise InputError("width", width, "a multiple of 4")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            layers_per_block=1,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            norm_num_groups=4,
            attention_head_dim=8,
            dropout=dropout,
        )


# ------------------------------------------------------------------ training


@dataclass(frozen=True)
class RDDMTraining:
    """What :func:`train_rddm` made.

    Args:
        pipeline: with the averaged weights.
        losses: of each step.
        seconds: that it took.
        choice: what AOSA chose, res or epsilon; None without it.
        lambdas: the path of λ.
    """

    pipeline: RDDMRestorationPipeline
    losses: list[float] = field(repr=False)
    seconds: float
    choice: str | None = None
    lambdas: list[float] = field(default_factory=list, repr=False)


def train_rddm(
    target: Pairs | Tensor | Sequence[Tensor],
    input: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | Sequence[Tensor] | None = None,
    *,
    prediction_type: str = "res",
    scheduler: RDDMScheduler | None = None,
    sum_scale: float = 1.0,
    condition: Literal["time", "levels"] = "time",
    nets: Literal[1, 2] = 1,
    see_input: bool = True,
    loss: Literal["l1", "l2"] | None = None,
    width: int = 32,
    unet: Any = None,
    noise_unet: Any = None,
    resume: bool = False,
    callback: Callable[[int, float], Any] | None = None,
    **training: Any,
) -> RDDMTraining:
    """Train a restorer from pairs of images, or a generator from images alone; see the module's equations.

    Args:
        target: I_0 in [0, 1], (n, C, H, W) or a list of (C, H, W); or ``Pairs``.
        input: I_in, one for each target and of its size; None trains generation (I_in = 0).
        mask: in [0, 1], alike, of 1 or C channels, which the network sees too.
        prediction_type: res (SM-Res), epsilon (SM-N), res_noise (SM-Res-N), x0_noise, res_add_noise, x0_add_noise,
            sample; or ``auto``, which tries and chooses res or epsilon.
        scheduler: an :class:`RDDMScheduler`; None makes one of the arguments above and below.
        sum_scale: s, the variance of the noise at the start.
        condition: tell the networks the ``time``, or ``levels``, for paths that part residual and noise.
        nets: 2 gives the two heads a network each.
        see_input: whether networks see I_in beside I_t.
        loss: l1 or l2; None is l1 for restoration and l2 for generation.
        width: channels of the networks that are made, a multiple of 4.
        unet, noise_unet: yours, in place of those that are made.
        resume: go on from the newest checkpoint in ``output_dir``.
        callback: called with the step and its loss.
        training: see :class:`TrainingConfig`.

    Raises:
        InputError: an argument that is not allowed, or that does not fit the images.
        TrialError: a loss that is not finite.
    """
    started = time.perf_counter()
    config = _config(training)
    pairs = target if isinstance(target, Pairs) else Pairs.of(target, input, mask)
    if loss not in (None, "l1", "l2"):
        raise InputError("loss", loss, "l1 or l2")
    if condition not in ("time", "levels"):
        raise InputError("condition", condition, "time or levels")
    form = loss or ("l2" if pairs.input is None else "l1")
    lambdas: list[float] = []
    chosen: str | None = None
    if prediction_type == "auto":
        if nets == 2 or unet is not None or scheduler is not None:
            raise InputError("prediction_type", "auto", "given with one network that is made, and no scheduler")
        found = choose_objective(pairs, sum_scale=sum_scale, see_input=see_input, loss=form, width=width, config=config)
        prediction_type, lambdas, chosen = found.choice, found.lambdas, found.choice
    if scheduler is None:
        settings: dict[str, Any] = {"prediction_type": prediction_type, "sum_scale": sum_scale, "condition": condition}
        scheduler = RDDMScheduler(**settings)
    kind = str(scheduler.config["prediction_type"])  # type: ignore[attr-defined]
    both = nets == 2
    if nets not in (1, 2) or (both and heads(kind) == 1):
        raise InputError("nets", nets, "1, or 2 for kinds of two heads (as res_noise)")
    C, seen = pairs.channels, pairs.seen(see_input)
    if unet is None:
        out = C if both else C * heads(kind)
        unet = make_network(seen, out, width, config.crop, _entropy(config.seed, "unet") % 2**32)
        if both:
            noise_unet = make_network(seen, out, width, config.crop, _entropy(config.seed, "noise unet") % 2**32)
    pipeline = RDDMRestorationPipeline(unet, scheduler, noise_unet)
    networks = pipeline.networks()
    if unet.config.in_channels != seen or networks.channels != C:
        allowed = f"of {seen} to {C} channels a head, as the images"
        raise InputError("unet", f"{unet.config.in_channels} to {networks.channels} channels", allowed)
    losses = fit(networks, pairs, lambda net: objective(net, scheduler, form), config, resume=resume, callback=callback)
    return RDDMTraining(pipeline, losses, time.perf_counter() - started, chosen, lambdas)


def objective(networks: nn.Module, scheduler: RDDMScheduler, form: str) -> Loss:
    """L(θ) of one batch, of the networks of a scheduler."""
    c: Any = scheduler.config
    T, kind = c.num_train_timesteps, c.prediction_type

    def value(target: Tensor, x_in: Tensor | None, mask: Tensor | None, g: torch.Generator) -> Tensor:
        t = torch.randint(T, (len(target),), generator=g)
        eps = torch.randn(target.shape, generator=g).to(target)
        residual = -target if x_in is None else x_in - target
        x = scheduler.add_noise(target, eps, t, residual)
        told: Any = t
        if c.condition == "levels":
            told = Level(*((level.flatten() * T) for level in scheduler.levels_at(t, target)))  # type: ignore[arg-type]
        found = networks(x, told, x_in, mask)
        errors = (distance(a, b, form) for a, b in zip(found, targets(kind, target, residual, eps), strict=True))
        return torch.stack(list(errors)).sum()

    return value


def distance(a: Tensor, b: Tensor, form: str) -> Tensor:
    """Mean absolute (l1) or squared (l2) difference."""
    return (a - b).abs().mean() if form == "l1" else (a - b).square().mean()


@dataclass(frozen=True)
class Choice:
    """What AOSA chose, and the path of λ."""

    choice: Literal["res", "epsilon"]
    lambdas: list[float]


class _Mixed(nn.Module):
    """One network and λ."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks, self.share = networks, nn.Parameter(torch.tensor(0.5))

    def forward(self, *given: Any) -> tuple[Tensor, Tensor]:
        return self.networks(*given)[0], self.share


def choose_objective(
    pairs: Pairs, *, sum_scale: float, see_input: bool, loss: str, width: int, config: TrainingConfig
) -> Choice:
    """AOSA: whether one network is to predict the residual or the noise, see the module's equations.

    λ is trained with the network, at its learning rate. Within the steps given, an undecided λ goes to its side of 0.5.
    """
    scheduler = RDDMScheduler(prediction_type="res", sum_scale=sum_scale)
    seed = _entropy(config.seed, "aosa") % 2**32
    unet = make_network(pairs.seen(see_input), pairs.channels, width, config.crop, seed)
    mixed = _Mixed(Networks(unet, None, "res"))
    lambdas = [0.5]

    def objective_of(net: nn.Module) -> Loss:
        def value(target: Tensor, x_in: Tensor | None, mask: Tensor | None, g: torch.Generator) -> Tensor:
            t = torch.randint(len(scheduler), (len(target),), generator=g)
            eps = torch.randn(target.shape, generator=g).to(target)
            y = torch.zeros_like(target) if x_in is None else x_in
            alpha, beta = scheduler.levels_at(t, target)
            x = scheduler.add_noise(target, eps, t, y - target)
            f, share = net(x, t, x_in, mask)
            res = share * f + (1 - share) * residual_of_noise(f, x, y, alpha, beta)
            noise = share * noise_of_residual(f, x, y, alpha, beta.clamp_min(NOISE_FLOOR)) + (1 - share) * f
            return share * distance(res, y - target, loss) + (1 - share) * distance(noise, eps, loss)

        return value

    def decided(step: int, _: float) -> bool:
        lambdas.append(float(mixed.share.detach()))
        return abs(lambdas[-1] - 0.5) >= BAND

    # Checkpoints are the training's that follows.
    fit(mixed, pairs, objective_of, TrainingConfig(**{**vars(config), "output_dir": None}), callback=decided)
    return Choice("res" if lambdas[-1] > 0.5 else "epsilon", lambdas)


def _config(arguments: dict[str, Any]) -> TrainingConfig:
    known = list(TrainingConfig.__dataclass_fields__)
    for name in arguments:
        if name not in known:
            raise InputError("argument", name, f"one of {', '.join(known)}")
    return TrainingConfig(**arguments)
