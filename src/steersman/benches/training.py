r"""Training with several workers: loss against steps, seconds and bytes, in real processes over gloo.

N workers minimise one loss. At step t each worker draws its own b examples of a global batch of N b, and has
the gradient :math:`g_t^{(k)} = \nabla \ell(\theta_t^{(k)}; B_t^{(k)})`.

=============  =====================================================================================
single         one process on the whole batch: :math:`\theta_{t+1} = \mathrm{step}(\theta_t, \bar g_t)`
ddp            all-reduce of the gradients in each step: the same law, :math:`\bar g_t = \frac1N \sum_k g_t^{(k)}`
local-sgd      :math:`\theta^{(k)}_{t+1} = \mathrm{step}(\theta^{(k)}_t, g^{(k)}_t)`, weights averaged every H steps
=============  =====================================================================================

Every contender starts from the same weights and sees the same examples in the same order. The held-out loss is
that of the average of the workers' weights; averaging for a measurement is not counted.

The workers share this machine and talk over its loopback interface, which nothing throttles: bytes carry over
to other networks, seconds do not.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from steersman import catalog
from steersman.cluster.counters import Counters
from steersman.cluster.launch import launch, report
from steersman.engine import subjects
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import InputError, TrialError, nearest
from steersman.report.blocks import Activity, Block, Curves, Line, Note, Timeline

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

Batch = Sequence[Tensor] | Mapping[str, Tensor]
Apply = Callable[[nn.Module, Optimizer], tuple[nn.Module, Optimizer]]

CONTEXT = 128  # tokens of a window of `docs`
HELD_OUT_WINDOWS = 96
TIMELINE_STEPS = 16
FACTORY_KNOBS = ("batch", "lr", "optimizer")
MB = 1e6
LOOPBACK = (
    "Workers are processes on this machine that talk gloo over its loopback interface, which nothing throttles: "
    "the bytes carry over to other networks, the seconds do not. Each worker computes on one thread, and workers "
    "share the machine's cores. Payload is what a bandwidth-optimal collective must send; interface bytes are "
    "all that left the loopback interface meanwhile, other programs included."
)


# --- what is trained -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a rank needs to rebuild the subject, as plain JSON, and the folder that holds its data.

    Args:
        kind: digits, docs or factory.
        source: of docs the folder with the model's configuration, of a factory ``file.py:name``.
        data: ``data.npz``, made once for all ranks.
        batch, optimizer: where the user sets none; a factory has its own.
        most: number of training examples (the global batch can't be larger), None where unknown.
    """

    kind: str
    source: str
    data: str
    batch: int = 0
    optimizer: str = ""
    most: int | None = None


# Learning rates where the user sets none.
RATES = {("digits", "sgd"): 0.05, ("digits", "adamw"): 2e-3, ("docs", "sgd"): 0.1, ("docs", "adamw"): 4e-3}


@dataclass
class Subject:
    """A task and the temporary folder that its data live in."""

    task: Task
    folder: tempfile.TemporaryDirectory[str] | None = None


class DigitClassifier(nn.Module):
    """Three 3x3 convolutions and two linear layers; called with images and labels it gives the mean loss.

    It has no normalisation over the batch and no dropout, so that the loss of a union of batches is the mean of
    their losses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(1024, 128),
            nn.SiLU(),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x), labels)


@dataclass
class Build:
    """One worker's copy of what is trained."""

    model: nn.Module
    optimizer: Optimizer
    batches: Callable[[int, int, torch.Generator], Iterable[Batch]]
    held_out: Sequence[Batch] = field(default_factory=list)


def shards(count: int, batch: int) -> Callable[[int, int, torch.Generator], Iterator[Tensor]]:
    """Indices of each worker's examples: epochs in a new order, cut into global batches, one slice a worker.

    All workers draw the same order from equal generators, so that no example goes to two of them.
    """

    def indices(rank: int, world: int, generator: torch.Generator) -> Iterator[Tensor]:
        whole = batch * world
        while True:
            order = torch.randperm(count, generator=generator)
            for start in range(0, count - whole + 1, whole):
                yield order[start + rank * batch : start + (rank + 1) * batch]

    return indices


def build(task: Task, setting: Setting, seed: int) -> Build:
    """The subject with fresh weights, the same for every rank and contender of a seed.

    Raises:
        TrialError: a user's factory returned something else than what is asked for.
    """
    torch.manual_seed(seed)
    if task.kind == "factory":
        return _user_build(task, setting)
    batch: int = setting["batch"] or task.batch
    optimizer: str = setting["optimizer"] or task.optimizer
    rate: float = setting["lr"] or RATES[task.kind, optimizer]
    data = np.load(task.data)
    model: nn.Module
    if task.kind == "digits":
        model = DigitClassifier()
        x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
        take = shards(len(x), batch)

        def batches(rank: int, world: int, generator: torch.Generator) -> Iterator[Batch]:
            return ((x[i], y[i]) for i in take(rank, world, generator))

        held_x, held_y = torch.from_numpy(data["held_x"]), torch.from_numpy(data["held_y"])
        held_out: list[Batch] = list(zip(held_x.chunk(6), held_y.chunk(6), strict=True))
        return Build(model, _optimizer(model, optimizer, rate), batches, held_out)

    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(task.source), dtype=torch.float32)
    windows = torch.from_numpy(data["train"].astype(np.int64))
    take = shards(len(windows), batch)

    def text_batches(rank: int, world: int, generator: torch.Generator) -> Iterator[Batch]:
        return ({"input_ids": windows[i], "labels": windows[i]} for i in take(rank, world, generator))

    held = torch.from_numpy(data["held"].astype(np.int64)).chunk(6)
    held_out = [{"input_ids": piece, "labels": piece} for piece in held]
    return Build(model, _optimizer(model, optimizer, rate), text_batches, held_out)


def _user_build(task: Task, setting: Setting) -> Build:
    factory = subjects.load_callable(task.source, "subject")
    accepted = inspect.signature(factory).parameters
    knobs = {name: setting[name] for name in FACTORY_KNOBS if setting[name] is not None}
    made = factory(**{name: value for name, value in knobs.items() if name in accepted})
    wanted = "(model, optimizer, batches) or (model, optimizer, batches, held_out)"
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        raise TrialError(f"{task.source} must return {wanted}, not {type(made).__name__}")
    model, optimizer, batches, *held_out = made
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer) or not callable(batches):
        raise TrialError(f"{task.source} must return {wanted}: a Module, an Optimizer and a function")
    return Build(model, optimizer, batches, list(held_out[0]) if held_out else [])


def _optimizer(model: nn.Module, name: str, rate: float) -> Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=rate)


# --- how workers agree ------------------------------------------------------------------------------------


def single() -> Apply:
    """One process on the whole batch."""
    return lambda model, optimizer: (model, optimizer)


def ddp(bucket_mb: float = 25.0) -> Apply:
    """torch's DistributedDataParallel: gradients are averaged in buckets while the backward pass goes on.

    Args:
        bucket_mb: size of a bucket in MiB.
    """
    if isinstance(bucket_mb, bool) or not isinstance(bucket_mb, (int, float)) or not 0 < bucket_mb < math.inf:
        raise InputError("bucket_mb", bucket_mb, "a positive number of MiB")

    def apply(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket_mb), optimizer

    return apply


def local_sgd(every: int = 8, warmup: int = 0) -> Apply:
    """torch's PostLocalSGDOptimizer (Lin et al., 2018): local steps, weights averaged periodically.

    torch's averager also averages after the very first local step (steps 1, 1 + H, 1 + 2 H, ...).

    Args:
        every: local steps H from one averaging to the next.
        warmup: steps at the start in which gradients are averaged instead, as DDP does.
    """
    for name, value, low in (("every", every, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(name, value, f"a whole number of at least {low}")

    def apply(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        import warnings

        from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as hooks
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
        from torch.distributed.optim import PostLocalSGDOptimizer

        if warmup:
            alone = dist.new_subgroups(group_size=1)[0]
            model = nn.parallel.DistributedDataParallel(model)
            state = hooks.PostLocalSGDState(process_group=None, subgroup=alone, start_localSGD_iter=warmup)
            model.register_comm_hook(state, hooks.post_localSGD_hook)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that averaging in every step costs as much as DDP is known
            averager = PeriodicModelAverager(period=every, warmup_steps=warmup)
        return model, PostLocalSGDOptimizer(optim=optimizer, averager=averager)

    return apply


PARTS: dict[str, PartInfo] = {
    "single": PartInfo(single, "One process on the whole batch, no communication."),
    "ddp": PartInfo(
        ddp,
        "DistributedDataParallel of torch: gradients averaged in every step.",
        "model = torch.nn.parallel.DistributedDataParallel(model)",
    ),
    "local-sgd": PartInfo(
        local_sgd,
        "PostLocalSGDOptimizer of torch: weights averaged every few steps.",
        "optimizer = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager({every=8}, {warmup=0}))",
    ),
}


def applied(parts: Sequence[Mapping[str, Any]], model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any, list[Any]]:
    """Mount ``parts`` on a worker's model and optimizer.

    A method's object is called ``(model, optimizer, **knobs)``. A Module that it returns is called in the model's
    place, an Optimizer is stepped in the optimizer's place, a pair is both; anything else only stays alive (a
    method that hooks the user's optimizer).

    Returns:
        The model to call, the optimizer to step, and what must stay alive.
    """
    alive = []
    for part in parts:
        if part["id"] in PARTS:
            made: Any = PARTS[part["id"]].build(**part["knobs"])(model, optimizer)
        else:
            made = catalog.card(part["id"]).load()(model, optimizer, **part["knobs"])
        for value in made if isinstance(made, tuple) else (made,):
            if isinstance(value, nn.Module):
                model = value
            elif isinstance(value, Optimizer):
                optimizer = value
        alive.append(made)
    return model, optimizer, alive


# --- one worker --------------------------------------------------------------------------------------------


def train(task: dict[str, Any], setting: dict[str, Any], parts: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """One rank of a trial; all ranks call it together.

    Returns:
        Loss curves, what the counters counted, and the times of the last steps.

    Raises:
        TrialError: the loss is not finite, or the batches end early.
    """
    rng = Streams(seed)
    made = build(Task(**task), setting, rng.seed("weights"))
    plain, measured = made.model, copy.deepcopy(made.model)
    model, optimizer, _alive = applied(parts, made.model, made.optimizer)
    model.train()
    rank, world, steps = dist.get_rank(), dist.get_world_size(), setting["steps"]
    # A single process takes the examples of all the workers that it stands for.
    mine = range(setting["workers"]) if world == 1 else [rank]
    sources = [iter(made.batches(k, setting["workers"], rng.torch("batches"))) for k in mine]
    marks = sorted({round(steps * k / setting["points"]) for k in range(1, setting["points"] + 1)} - {0})
    counters = Counters(os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    curve: dict[str, list[float]] = {"step": [], "held_out": [], "train": [], "payload_mb": [], "seconds": []}
    losses: list[float] = []
    times: list[tuple[float, float]] = []
    items: list[float] = []

    def measure(step: int) -> None:
        nonlocal items
        items = held_out_losses(plain, measured, made.held_out)
        curve["step"].append(step)
        curve["held_out"].append(float(np.mean(items)) if items else math.nan)
        curve["train"].append(float(np.mean(losses[-max(1, steps // 10) :])) if losses else math.nan)
        curve["payload_mb"].append(counters.usage.payload_bytes / MB)
        curve["seconds"].append(counters.usage.seconds)

    measure(0)
    done = 0
    for mark in marks:
        with counters:
            assert counters.origin is not None
            for step in range(done, mark):
                start = time.perf_counter() - counters.origin
                try:
                    batch = joined([next(source) for source in sources])
                except StopIteration:
                    raise TrialError(f"the batches ended after {step} of {steps} steps") from None
                loss = loss_of(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise TrialError(f"the training loss became {losses[-1]} at step {step + 1}")
                times.append((start, time.perf_counter() - counters.origin))
                report(step + 1, steps, f"loss {losses[-1]:.3f}")
        done = mark
        measure(mark)
    first = times[max(0, steps - TIMELINE_STEPS)][0]
    usage = asdict(counters.usage)
    usage["spans"] = [span for span in usage["spans"] if span[2] >= first]
    return {
        "curve": curve,
        "losses": losses,
        "items": items,
        "steps": [t for t in times if t[0] >= first],
        "usage": usage,
        "parameters": sum(p.numel() for p in plain.parameters()),
    }


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch: what the model returns, or its ``loss``."""
    out = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    loss = out if isinstance(out, Tensor) else getattr(out, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TrialError("the model must return its loss (one number, or an object with .loss) when called on a batch")
    return loss


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    if isinstance(first, Mapping):
        return {name: torch.cat([b[name] for b in batches]) for name in first}  # type: ignore[call-overload]
    return [torch.cat([b[i] for b in batches]) for i in range(len(first))]  # type: ignore[index]


@torch.no_grad()
def held_out_losses(model: nn.Module, measured: nn.Module, held_out: Sequence[Batch]) -> list[float]:
    """The loss of each held-out batch under the mean of all ranks' weights, which ``measured`` holds then."""
    world, rank = dist.get_world_size(), dist.get_rank()
    pairs = zip(
        itertools.chain(model.parameters(), model.buffers()),
        itertools.chain(measured.parameters(), measured.buffers()),
        strict=True,
    )
    for own, mean in pairs:
        mean.copy_(own)
        if world > 1 and mean.is_floating_point():
            dist.all_reduce(mean.data)
            mean /= world
    measured.eval()
    losses = torch.zeros(len(held_out), dtype=torch.float64)
    for i in range(rank, len(held_out), world):
        losses[i] = float(loss_of(measured, held_out[i]))
    if world > 1 and len(held_out):
        dist.all_reduce(losses)
    return losses.tolist()


# --- the bench ------------------------------------------------------------------------------------------


@dataclass
class Host:
    """A trial's subject and setting, and the parts that its ranks will mount."""

    task: Task
    setting: dict[str, Any]
    parts: list[dict[str, Any]] = field(default_factory=list)


class TrainingBench:
    """Ranks: the same model, examples and number of steps for every contender, in spawned gloo processes.

    Subjects: ``digits`` (a small classifier), ``docs/tiny``, ``docs/small``, ``docs/base`` (a Llama language
    model from scratch; ``docs`` is the tiny one), or ``file.py:factory``. A factory is called in each rank with
    those of ``batch``, ``lr`` and ``optimizer`` that it names, and returns ``(model, optimizer, batches)`` or
    ``(model, optimizer, batches, held_out)``: ``batches(rank, world, generator)`` gives that rank's batches (the
    generators of all ranks are equal), a batch is a sequence or mapping of tensors, the model called on it returns
    its mean loss, and ``held_out`` is a list of batches.
    """

    id = "training"
    shape = "Ranks"
    default_subject = "digits"
    headline = ("held_out_loss", "payload_mb")
    knobs: Mapping[str, Knob] = {
        "workers": Knob(int, (2,), "number of workers", low=1, high=64),
        "steps": Knob(int, (100,), "optimizer steps", low=1, high=1_000_000),
        "batch": Knob(int, None, "examples a worker and step (default: digits 32, docs 8)", low=1, high=65536),
        "lr": Knob(float, None, "learning rate (default: by subject and optimizer)", low=1e-9, high=1e3),
        "optimizer": Knob(str, None, "local optimizer (default: adamw, a factory's own)", choices=("sgd", "adamw")),
        "points": Knob(int, 10, "held-out measurements along the way", low=1, high=1000, sweep=False),
        "timeout": Knob(float, 1800.0, "seconds after which a trial is stopped", low=1, high=1e6, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "held_out_loss": Figure("nats", "lower", "quality", "held-out loss of the workers' mean weights at the end"),
        "train_loss": Figure("nats", "lower", "info", "training loss over the last tenth of the steps"),
        "payload_mb": Figure("MB", "lower", "cost", "sent by each worker, counted at the collectives"),
        "socket_mb": Figure("MB", "lower", "info", "sent on each worker's TCP connections, as the kernel counts"),
        "interface_mb": Figure(
            "MB", "lower", "info", "left the loopback interface, other programs' included, by worker"
        ),
        "seconds": Figure("s", "lower", "cost", "training on an unthrottled loopback, measurements left out"),
        "step_ms": Figure("ms", "lower", "info", "median time of a step"),
        "communicating": Figure("", "lower", "info", "share of the time with a collective on its way"),
        "cpu": Figure("cores", "neither", "info", "processor time by wall time, each worker"),
    }

    def subject(self, spec: str) -> Subject:
        found = subjects.resolve(spec)
        if found.kind == "factory":
            subjects.load_callable(spec, "subject")  # a file that can't be imported is said here, once
            code = subjects.CODE.match(spec)
            assert code is not None and found.path is not None
            return Subject(Task("factory", f"{found.path.resolve()}:{code['name']}", ""))
        name, _, inside = spec.partition("/")
        if found.kind != "reference" or name not in ("digits", "docs") or (name == "digits" and inside):
            raise InputError("subject", spec, "digits, docs/tiny, docs/small, docs/base or file.py:factory")
        folder = tempfile.TemporaryDirectory(prefix="steersman-training-")
        data = Path(folder.name) / "data.npz"
        if name == "digits":
            count = _digits(data)
            return Subject(Task("digits", "", str(data), 32, "adamw", count), folder)
        from steersman.reference import loading

        source = loading.path(spec if inside else "docs/tiny")
        count = _docs(data, str(source))
        return Subject(Task("docs", str(source), str(data), 8, "adamw", count), folder)

    def baselines(self) -> list[str]:
        return ["single", "ddp", "local-sgd:every=8"]

    def parts(self) -> Mapping[str, PartInfo]:
        return PARTS

    def check(self, s: Subject, setting: Setting) -> None:
        batch = setting["batch"] or s.task.batch
        if s.task.most is not None and batch * setting["workers"] > s.task.most:
            allowed = f"at most {s.task.most // setting['workers']} with {setting['workers']} workers"
            raise InputError("batch", batch, f"{allowed} (there are {s.task.most} examples)")
        if s.task.kind == "factory":
            accepted = inspect.signature(subjects.load_callable(s.task.source, "subject")).parameters
            for name in FACTORY_KNOBS:
                if setting[name] is not None and name not in accepted:
                    raise InputError(name, setting[name], f"left out, or an argument of {s.task.source}")

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(s.task, dict(setting))

    def mount(self, h: Host, part: Part) -> None:
        if part.id in PARTS:
            taken = [p["id"] for p in h.parts if p["id"] in PARTS]
            if taken:
                raise InputError(
                    "methods", part.id, f"the only one of {', '.join(PARTS)} ({taken[0]} is there already)"
                )
            PARTS[part.id].build(**checked_knobs(PARTS[part.id].build, part))
        else:
            method = catalog.card(part.id) if part.id in catalog.cards() else None
            if method is None or self.id not in method.benches:
                raise InputError("methods", part.id, nearest(part.id, PARTS))
            checked_knobs(method.load(), part, skip=("model", "optimizer"))
        if len(h.parts) and "single" in (part.id, h.parts[0]["id"]):
            raise InputError("methods", part.id, "left out: single trains without other workers")
        h.parts.append(part.to_json())

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        workers = 1 if h.parts[0]["id"] == "single" else setting["workers"]
        results = launch(
            "steersman.benches.training:train",
            {"task": asdict(h.task), "setting": h.setting, "parts": h.parts, "seed": rng.base},
            workers,
            timeout=setting["timeout"],
            progress=log.progress,
        )
        lead, usages = results[0], [r["usage"] for r in results]
        log.arrays("curve", **{name: np.array(values) for name, values in lead["curve"].items()})
        log.arrays("losses", losses=np.array([r["losses"] for r in results]))
        log.arrays("timeline", **_timeline_arrays(results))
        if lead["items"]:
            log.per_item("held_out_loss", lead["items"])

        def mean(name: str) -> float:
            return float(np.mean([u[name] for u in usages]))

        figures = {
            "train_loss": float(np.mean([r["losses"][-max(1, setting["steps"] // 10) :] for r in results])),
            "payload_mb": mean("payload_bytes") / MB,
            "seconds": max(u["seconds"] for u in usages),
            "step_ms": 1e3 * float(np.median([end - start for r in results for start, end in r["steps"]])),
            "communicating": mean("communicating_s") / mean("seconds"),
            "cpu": mean("cpu_s") / mean("seconds"),
        }
        if lead["items"]:
            figures["held_out_loss"] = lead["curve"]["held_out"][-1]
        for figure, name in (("socket_mb", "socket_bytes"), ("interface_mb", "interface_bytes")):
            if all(u[name] is not None for u in usages):
                figures[figure] = mean(name) / MB
        return figures

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = [Note(LOOPBACK, title="What the seconds mean")]
        settings = comparison.settings
        swept = [name for name in settings[0] if len({setting[name] for setting in settings}) > 1] if settings else []
        axes = (("step", "Loss against steps", "steps"), ("payload_mb", "Loss against bytes", "payload, MB a worker"))
        for axis, title, label in axes:
            for setting in settings:
                lines = {}
                for contender in comparison.contenders:
                    line = _line(comparison, contender, setting, axis)
                    if line is not None:
                        lines[contender] = line
                if lines:
                    curves = Curves(
                        title,
                        lines,
                        label,
                        "held-out loss, nats",
                        band="range over seeds",
                        caption="Held-out loss of the workers' mean weights, mean over the seeds.",
                        setting={name: setting[name] for name in swept},
                    )
                    blocks.append(curves)
        for setting in settings:
            lanes = {c: found for c in comparison.contenders if (found := _lanes(comparison, c, setting))}
            if lanes:
                caption = f"The last {TIMELINE_STEPS} steps of the first seed, and the collectives on their way."
                shown = {name: setting[name] for name in swept}
                blocks.append(Timeline("Who did what when", lanes, caption=caption, setting=shown))
        return blocks


def _digits(data: Path) -> int:
    """Write the digits' training and held-out images; returns the number of the former."""
    from steersman.reference import digits

    (x, y), (held_x, held_y) = digits.images("train"), digits.images("held-out")
    np.savez(data, x=x.numpy(), y=y.numpy(), held_x=held_x.numpy(), held_y=held_y.numpy())
    return len(x)


def _docs(data: Path, source: str) -> int:
    """Write windows of the training and held-out documents as tokens; returns the number of the former."""
    from transformers import AutoTokenizer

    from steersman.reference import docs

    tokenizer = AutoTokenizer.from_pretrained(source)
    windows: dict[str, Any] = {}
    for name, split in (("train", "train"), ("held", "heldout")):
        texts = [document.text for document in docs.documents(split)]  # type: ignore[arg-type]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = np.concatenate([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encoded])
        windows[name] = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT).astype(np.int32)
    windows["held"] = windows["held"][np.linspace(0, len(windows["held"]) - 1, HELD_OUT_WINDOWS).astype(int)]
    np.savez(data, **windows)
    return len(windows["train"])


def _timeline_arrays(results: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Start and end of each worker's last steps and collectives, from its first shown step on."""
    arrays = {}
    for rank, result in enumerate(results):
        start = result["steps"][0][0]
        arrays[f"steps_{rank}"] = np.array(result["steps"]) - start
        arrays[f"spans_{rank}"] = np.array([s[1:] for s in result["usage"]["spans"]]).reshape(-1, 2) - start
    return arrays


def _line(comparison: Comparison, contender: str, setting: Mapping[str, Any], axis: str) -> Line | None:
    """Mean held-out loss over seeds with its range; None where there is no such curve."""
    xs, ys = [], []
    for row in comparison.select(contender, **setting):
        folder = row.items_dir(comparison.out)
        if folder is not None and (folder / "curve.npz").is_file():
            with np.load(folder / "curve.npz") as curve:
                xs.append(curve[axis])
                ys.append(curve["held_out"])
    if not xs or not np.isfinite(ys).all() or (axis != "step" and not np.any(xs)):
        return None
    x, y = np.mean(xs, axis=0), np.array(ys)
    band = {} if len(y) == 1 else {"low": y.min(0).tolist(), "high": y.max(0).tolist()}
    return Line(x.tolist(), y.mean(0).tolist(), **band)


def _lanes(comparison: Comparison, contender: str, setting: Mapping[str, Any]) -> dict[str, list[Activity]]:
    """Each worker's last steps and collectives in the first seed."""
    for row in comparison.select(contender, **setting):
        folder = row.items_dir(comparison.out)
        if folder is None or not (folder / "timeline.npz").is_file():
            continue
        with np.load(folder / "timeline.npz") as arrays:
            ranks = sum(name.startswith("steps_") for name in arrays)
            return {
                f"rank {k}": [
                    *(Activity(float(a), float(b), "compute") for a, b in arrays[f"steps_{k}"]),
                    *(Activity(max(float(a), 0.0), float(b), "communicate") for a, b in arrays[f"spans_{k}"]),
                ]
                for k in range(ranks)
            }
    return {}
