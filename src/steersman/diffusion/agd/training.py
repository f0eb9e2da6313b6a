r"""Adapter guidance distillation: the loop.

With theta frozen and psi the adapters, over points (x_t, t, omega, c, target) of guided trajectories, drawn uniformly,

    L(psi) = E mean (out_{theta, psi}(x_t, t, c, omega) - target)².

Variants of the mean: l1; ``cos`` weighs a point by (1 - cos(out_c, target)) / 2, more where guidance turns the output
more; ``noise`` weighs it by the noise level sigma_t. The rate rises linearly over a tenth of the steps and falls as a
cosine.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from steersman.diffusion.agd.injection import AGDAdapters, AGDConfig, Anatomy, resolved
from steersman.diffusion.agd.installing import AGD
from steersman.diffusion.agd.trajectories import Points, Trajectories, read_parts
from steersman.diffusion.guidance import network_of
from steersman.errors import InputError, TrialError

Loss = Literal["l2", "l1", "cos", "noise"]
LOSSES: tuple[str, ...] = get_args(Loss)
FLOOR = 1e-4
"""Of the rate, at the start of the warm-up and at the end, as a share of the largest."""


@dataclass
class AGDTrainingConfig:
    """Arguments of :func:`train_agd`, named as in transformers' ``TrainingArguments`` where it has them.

    Args:
        max_steps: optimizer steps, from 1.
        batch_size: points of a (micro-)batch and process.
        gradient_accumulation_steps: micro-batches of a step.
        learning_rate: the largest, of AdamW.
        weight_decay: of AdamW.
        warmup: share of the steps, from 0 to below 1.
        loss: l2, l1, cos or noise.
        max_grad_norm: gradients are scaled to at most this norm; inf never.
        mixed_precision: of the network calls: no, bf16 or fp16.
        gradient_checkpointing: keep fewer activations of the frozen network, for a third more time.
        output_dir: where checkpoints go; None keeps none.
        save_steps: a checkpoint every so many steps.
        seed: of weights and batches.

    Raises:
        InputError: a value outside these.
    """

    max_steps: int = 5000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: float = 0.1
    loss: Loss = "l2"
    max_grad_norm: float = math.inf
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    output_dir: str | Path | None = None
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"max_steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 1, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(name, value, f"a whole number from {least}")
        if not (isinstance(self.learning_rate, (int, float)) and 0 < self.learning_rate < math.inf):
            raise InputError("learning_rate", self.learning_rate, "a finite number above 0")
        for name, high in (("weight_decay", math.inf), ("warmup", 1.0)):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < high):
                raise InputError(name, value, f"a number from 0 to below {high:g}")
        if not (isinstance(self.max_grad_norm, (int, float)) and self.max_grad_norm > 0):
            raise InputError("max_grad_norm", self.max_grad_norm, "a number above 0 (inf never scales)")
        if self.loss not in LOSSES:
            raise InputError("loss", self.loss, f"one of {', '.join(LOSSES)}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise InputError("mixed_precision", self.mixed_precision, "no, bf16 or fp16")


@dataclass
class AGDResult:
    """What a training did.

    Args:
        steps: optimizer steps in all.
        losses: of each step (of this call, after a resume).
        share: trainable numbers, as a share of the network's.
        seconds: of this call.
    """

    steps: int
    losses: list[float] = field(default_factory=list)
    share: float = 0.0
    seconds: float = 0.0

    def mean(self, part: slice) -> float:
        return float(np.mean(self.losses[part])) if self.losses[part] else math.nan


class Student(nn.Module):
    """The network with its adapters as one function of points: what distributed training wraps.

    The frozen network is not a part of it, so that checkpoints hold adapters only (but with ``full`` it is).
    """

    def __init__(self, adapters: AGDAdapters) -> None:
        super().__init__()
        assert adapters.network is not None
        self.adapters = adapters
        self._network = [adapters.network]
        if adapters.config.arch == "full":
            self.network = adapters.network

    def forward(self, points: Points, alone: bool = False) -> Tensor:
        """The student's output; with ``alone`` the frozen network's."""
        network = self._network[0]
        dtype = next(network.parameters()).dtype
        self.adapters.set_agd(points.omegas)
        t = points.timesteps
        t = t.long() if bool((t == t.round()).all()) else t.float()

        def cast(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: cast(item) for name, item in value.items()}
            return value.to(dtype) if value.is_floating_point() else value

        given = cast(points.condition)
        x = points.inputs.to(dtype)
        # The first argument has different names in different networks.
        if alone:
            with self.adapters.disabled(), torch.no_grad():
                return network(x, timestep=t, **given, return_dict=False)[0].to(points.targets.dtype)
        return network(x, timestep=t, **given, return_dict=False)[0].to(points.targets.dtype)


def loss_of(kind: Loss, out: Tensor, points: Points, cond: Tensor | None = None) -> Tensor:
    """The module's L, over a batch.

    Args:
        kind: l2, l1, cos or noise.
        out: the student's, of the targets' shape.
        points: with targets and noise levels.
        cond: the conditional output, for cos.
    """
    error = out - points.targets
    if kind == "l1":
        return error.abs().mean()
    each = error.square().flatten(1).mean(1)
    if kind == "noise":
        each = each * points.sigmas.to(each.dtype)
    elif kind == "cos":
        assert cond is not None
        cosine = torch.cosine_similarity(cond.flatten(1), points.targets.flatten(1))
        each = each * (0.5 * (1 - cosine).abs())
    return each.mean()


def train_agd(
    pipe: Any,
    data: Trajectories | str | Path | Iterable[Trajectories],
    config: AGDConfig | None = None,
    training: AGDTrainingConfig | None = None,
    *,
    resume_from_checkpoint: str | Path | bool = False,
    callback: Callable[[int, float], None] | None = None,
) -> AGD:
    """Distil guidance into adapters.

    Args:
        pipe: the pipeline (or its network), which is frozen meanwhile and afterwards as it was.
        data: trajectories; a folder of them, which is read part by part; or parts without end, each used for as many
            batches as it has points for (:func:`~steersman.diffusion.agd.trajectories.stream_cfg_trajectories`).
        config: of the adapters.
        training: of the loop.
        resume_from_checkpoint: a checkpoint's folder, or True for the newest in ``output_dir``.
        callback: gets (step, loss) of each step.

    Returns:
        AGD: the trained adapters, to be saved or installed; its ``result`` says how training went.

    Raises:
        InputError: a setting, or data of another network.
        TrialError: the loss is no longer finite.
    """
    network = pipe if isinstance(pipe, nn.Module) else network_of(pipe)
    training = AGDTrainingConfig() if training is None else training
    config = resolved(network, config)
    adapters = AGDAdapters(config, Anatomy.of(network, config), training.seed)
    started = time.perf_counter()
    accelerator = _accelerator(training)
    facts: dict[str, Any] = {}
    losses: list[float] = []
    full = config.arch == "full"
    if full and not isinstance(data, (Trajectories, str, Path)):
        raise InputError("data", type(data).__name__, "Trajectories or a folder: a stream needs its network unchanged")
    with _frozen(network, trained=full):
        network.to(accelerator.device)
        adapters.to(accelerator.device).train()
        adapters.attach(network)
        original = {n: p.detach().clone() for n, p in network.named_parameters()} if full else {}
        if training.gradient_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        try:
            student = Student(adapters)
            ours = [p for p in student.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(ours, lr=training.learning_rate, weight_decay=training.weight_decay)
            student, optimizer = accelerator.prepare(student, optimizer)
            first = _resume(accelerator, training, resume_from_checkpoint)
            batches = _batches(data, training, first, accelerator.process_index, facts)
            for step in range(first, training.max_steps):
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * _rate(step, training)
                total = 0.0
                for _ in range(training.gradient_accumulation_steps):
                    with adapters.disabled():  # a stream samples with the frozen network
                        points = next(batches).to(accelerator.device)
                    with accelerator.accumulate(student), accelerator.autocast():
                        cond = student(points, alone=True) if training.loss == "cos" else None
                        loss = loss_of(training.loss, student(points), points, cond)
                        accelerator.backward(loss)
                        if accelerator.sync_gradients and training.max_grad_norm < math.inf:
                            accelerator.clip_grad_norm_(ours, training.max_grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
                    total += float(loss.detach()) / training.gradient_accumulation_steps
                if not math.isfinite(total):
                    raise TrialError(f"the loss at step {step + 1} is {total}: lower learning_rate")
                losses.append(total)
                if callback is not None:
                    callback(step + 1, total)
                if training.output_dir is not None and (step + 1) % training.save_steps == 0:
                    _save(accelerator, training, step + 1)
            share = adapters.share(network)
            if full:
                adapters.weights = {n: p.detach().clone() for n, p in network.named_parameters()}
        finally:
            if training.gradient_checkpointing:
                network.disable_gradient_checkpointing()  # type: ignore[operator]
            if full:
                with torch.no_grad():
                    for n, p in network.named_parameters():
                        p.copy_(original[n])
            adapters.remove()
    facts = {"prediction_type": _prediction_type(pipe), **facts, "training": _plain(asdict(training))}
    method = AGD(adapters.eval().requires_grad_(False), facts=facts)
    method.result = AGDResult(training.max_steps, losses, share, time.perf_counter() - started)
    return method


def _accelerator(training: AGDTrainingConfig) -> Accelerator:
    plugin = GradientAccumulationPlugin(num_steps=training.gradient_accumulation_steps, sync_with_dataloader=False)
    try:
        return Accelerator(mixed_precision=training.mixed_precision, gradient_accumulation_plugin=plugin)
    except ValueError as error:  # one process has one precision
        wanted = f"what this process's accelerator has been made with ({error})"
        raise InputError("mixed_precision", training.mixed_precision, wanted) from None


@contextmanager
def _frozen(network: nn.Module, trained: bool) -> Iterator[None]:
    """The network in evaluation mode and without gradients (or with, if it is trained); afterwards as it was."""
    flags = [(p, p.requires_grad) for p in network.parameters()]
    modes = [(m, m.training) for m in network.modules()]
    try:
        network.eval().requires_grad_(trained)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None
        for m, mode in modes:
            m.training = mode


def _rate(step: int, training: AGDTrainingConfig) -> float:
    """Share of the largest rate at a step from 0 on."""
    rise = int(training.warmup * training.max_steps)
    if step < rise:
        return FLOOR + (1 - FLOOR) * (step + 1) / rise
    at = (step - rise) / max(training.max_steps - rise - 1, 1)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(at, 1.0)))


def _batches(data: Any, training: AGDTrainingConfig, first: int, rank: int, facts: dict[str, Any]) -> Iterator[Points]:
    """Batches without end; the draw is a function of (seed, position, process), so that a run can resume."""
    position = first * training.gradient_accumulation_steps

    def drawn(part: Trajectories) -> Points:
        nonlocal position
        entropy = [training.seed, position, rank]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        position += 1
        return part.batch(
            torch.randint(len(part), (training.batch_size,), generator=torch.Generator().manual_seed(seed))
        )

    if isinstance(data, Trajectories):
        facts.update(data.facts, trajectories=len(data.omegas))
        while True:
            yield drawn(data)
    while True:
        seen = 0
        for part in read_parts(data) if isinstance(data, (str, Path)) else data:
            if not isinstance(part, Trajectories) or not len(part):
                raise InputError("data", type(part).__name__, "Trajectories, a folder, or an iterable of Trajectories")
            facts.update(part.facts)
            seen += 1
            for _ in range(-(-len(part) // training.batch_size)):
                yield drawn(part)
        if not seen:
            raise InputError("data", type(data).__name__, "an iterable with at least one part")


def _save(accelerator: Accelerator, training: AGDTrainingConfig, step: int) -> None:
    root = Path(str(training.output_dir))
    folder, partial = root / f"checkpoint-{step}", root / f"checkpoint-{step}.partial"
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        (partial / "state.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, training: AGDTrainingConfig, resume: str | Path | bool) -> int:
    """The step to go on from."""
    if resume is False:
        return 0
    if resume is True:
        root = Path(str(training.output_dir))
        found = [p for p in root.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
        if training.output_dir is None or not found:
            raise InputError("resume_from_checkpoint", True, "used with an output_dir that holds a checkpoint")
        resume = max(found, key=lambda p: int(p.name.partition("-")[2]))
    state = Path(resume) / "state.json"
    if not state.is_file():
        raise InputError("resume_from_checkpoint", str(resume), "a checkpoint folder of this loop")
    accelerator.load_state(str(resume))
    return int(json.loads(state.read_text())["step"])


def _prediction_type(pipe: Any) -> str | None:
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    return config.get("prediction_type")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has no infinity."""
    return {k: (None if v == math.inf else str(v) if isinstance(v, Path) else v) for k, v in values.items()}
