r"""Training from scratch at an equal budget: sample quality, and what is left of it when the network errs.

A contender is a recipe that trains a network on the subject's images. The budget (steps, batch, network and
learning rate) is the bench's, and the same for all; draws with one seed are shared where recipes draw the same
things. A recipe is trained once for each seed and kept, then sampled at every setting of the grid:

- ``calls``: network calls of a sample;
- ``bits``: weights rounded after training, each tensor to 2^bits equal levels from its least to its largest;
- ``error``: before each step x += error · σ ε, with σ the noise's standard deviation there and ε ~ N(0, I).

Images are judged as in the bench ``finetuning``: in the features of a judge, against held-out images, beside ``real``,
which puts training images in the samples' place. ``gaussians`` trains on 1000 points of the plane (as images of two
pixels), and is judged by exact ones.
"""

from __future__ import annotations

import functools
import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from steersman import catalog
from steersman.benches import finetuning
from steersman.benches._pipelines import noise_kind
from steersman.benches.finetuning import Data, Finetuning, digits_data, image_figures, own_data
from steersman.diffusion import DDIMScheduler, HeunScheduler, pfgm_pp
from steersman.diffusion.images import load_pipeline
from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.diffusion.scheduler import SlotScheduler
from steersman.engine import artefacts, subjects
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.fits import Fits
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError, TrialError
from steersman.reference import gaussians, point_metrics
from steersman.reference.gaussians import Mixture
from steersman.reference.image_metrics import PixelPCA
from steersman.report.blocks import Block, Note, Scatter

if TYPE_CHECKING:
    from steersman.engine.bench import Row, Setting, TrialLog
    from steersman.engine.comparison import Comparison

BUDGET = ("steps", "batch_size", "width", "learning_rate")
"""Knobs of the bench that a recipe's ``apply`` takes by these names."""
POINTS = 1000
REACH = 2.0
"""Points of the plane within [-2, 2]² become pixels within [-1, 1]."""


@dataclass
class Subject:
    """What is trained on.

    Args:
        spec: as the user wrote it.
        folder: what recipes are told that the subject is.
        law: of ``gaussians``.
        data: by the knob ``judge``, read once.
    """

    spec: str
    folder: Any
    law: Mixture | None = None
    data: dict[str | None, Data] = field(default_factory=dict)


@dataclass
class Host:
    """A recipe and a sampler that are to be used; the training happens in the trial."""

    subject: Subject
    setting: Setting
    data: Data
    rng: Streams
    recipe: Part | None = None
    make: Callable[[Path, TrialLog], None] | None = None
    folder: Path | None = None
    real: bool = False
    scheduler: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class EDM:
    """EDM (Karras et al. 2022): PFGM++'s own training and sampler with Gaussian noise, its limit of D = ∞.

    Args:
        formulation: edm, ve or ddpm.
        stf: train on the stable target.
        dropout: of the network.
    """

    formulation: Literal["edm", "ve", "ddpm"] = "edm"
    stf: bool = False
    dropout: float = 0.13

    def __post_init__(self) -> None:
        pfgm_pp.formulation_of(self.formulation)
        if not isinstance(self.stf, bool):
            raise InputError("stf", self.stf, "true or false")

    def apply(self, subject: Any, input: Path, out: Path, *, seed: int, log: Any, **budget: Any) -> Mapping[str, Any]:
        chosen: dict[str, Any] = {"formulation": self.formulation, "stf": self.stf, "dropout": self.dropout}
        return pfgm_pp.apply(subject, input, out, seed=seed, log=log, D=float("inf"), **chosen, **budget)


@dataclass(frozen=True)
class DDPM:
    """DDPM (Ho et al. 2020): noise prediction with linear betas and T = 1000, sampled by DDIM.

    Args:
        dropout: of the network.
    """

    dropout: float = 0.13

    def apply(self, subject: Any, input: Path, out: Path, *, seed: int, log: Any, **budget: Any) -> Mapping[str, Any]:
        # DDPM's loss is the formulation ddpm's under Gaussian noise.
        metrics = EDM("ddpm", False, self.dropout).apply(subject, input, out, seed=seed, log=log, **budget)
        made = load_pipeline(out)
        scheduler: Any = DDIMScheduler.from_config({"timestep_spacing": "trailing"})
        ClassConditionalPipeline(made.unet, scheduler, made.config.null_label).save_pretrained(out)
        return metrics


class Real:
    """Training images, or exact points, in the place of samples: the floor of every distance."""


class Pretraining:
    """See the module's text."""

    id = "pretraining"
    shape: Literal["Recipe"] = "Recipe"
    default_subject = "digits"
    headline: tuple[str, str] = ("frechet", "calls")
    knobs: Mapping[str, Knob] = {
        "calls": Knob(int, (19, 35), "network calls of a sample", low=1, high=1000),
        "bits": Knob(int, (32,), "bits of the weights after training (32: as they are)", low=2, high=32),
        "error": Knob(float, (0.0,), "noise added before each step, in units of the noise there", low=0, high=10),
        "steps": Knob(int, 400, "training steps of every recipe", low=1, sweep=False),
        "batch_size": Knob(int, 64, "images of a training step", low=1, sweep=False),
        "width": Knob(int, 16, "channels of the network, a multiple of 8", low=8, sweep=False),
        "learning_rate": Knob(float, 2e-3, "of every recipe", low=0, sweep=False),
        "samples": Knob(int, 597, "samples of a trial, at most as many as held-out images", low=8, sweep=False),
        "judge": Knob(str, None, "file.py:name, images in [0, 1] to features (n, d) for the figures", sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "frechet": Figure("", "lower", "quality", "Frechet distance to held-out images in the judge's features"),
        "kernel": Figure("", "lower", "quality", "unbiased cubic MMD² to held-out images in the judge's features"),
        "frechet_pixels": Figure("", "lower", "quality", "Frechet distance in principal components of the pixels"),
        "precision": Figure("", "higher", "quality", "share of samples among the held-out images (3 neighbours)"),
        "recall": Figure("", "higher", "quality", "share of held-out images among the samples (3 neighbours)"),
        "accuracy": Figure("", "higher", "quality", "share of samples that the judge takes for their label"),
        "sliced_wasserstein": Figure("", "lower", "quality", "sliced Wasserstein-2 distance to exact points"),
        "wasserstein": Figure("", "lower", "quality", "exact Wasserstein-2 distance to exact points"),
        "mode_weight_error": Figure("", "lower", "quality", "total variation of the modes' weights"),
        "mode_coverage": Figure("", "higher", "quality", "share of modes with at least a fifth of their mass"),
        "on_manifold": Figure("", "higher", "quality", "share of points within 3 deviations of a mode"),
        "cross_entropy": Figure("nats", "neither", "info", "-mean log p of the points under the exact law"),
        "fit_s": Figure("s", "lower", "cost", "seconds of the training"),
        "sample_s": Figure("s", "lower", "cost", "seconds of sampling"),
    }

    def headline_for(self, rows: Sequence[Row]) -> tuple[str, str]:
        """What reports of these rows lead with: points have no Frechet distance."""
        there = {name for row in rows for name in row.figures}
        points = "sliced_wasserstein" in there and "frechet" not in there
        return "sliced_wasserstein" if points else "frechet", "calls"

    # ---------------------------------------------------------------- subject

    def subject(self, spec: str) -> Subject:
        found = subjects.resolve(spec)
        if found.kind == "reference" and spec.partition(":")[0] == "gaussians":
            return Subject(spec, spec, gaussians.mixture(spec))
        if spec == "digits":
            return Subject(spec, found.path)
        if found.kind == "path":
            return Subject(spec, found.path)
        raise InputError("subject", spec, "digits, gaussians, or images: a folder, .zip, .npz or .npy")

    def _data(self, s: Subject, setting: Setting) -> Data:
        judge = setting["judge"]
        if judge not in s.data:
            if s.law is not None:
                if judge is not None:
                    raise InputError("judge", judge, "left out: the law of gaussians is known exactly")
                s.data[judge] = _points(s.law)
            else:
                data = digits_data() if s.spec == "digits" else own_data(s.spec, None, None)
                if judge is not None:
                    function = subjects.load_callable(judge, "judge")
                    data = replace(data, judge=lambda x: function((x + 1) / 2), classify=None)
                # Nothing here trains on features.
                s.data[judge] = replace(data, loss_features=None)
        return s.data[judge]

    def check(self, s: Subject, setting: Setting) -> None:
        most = len(self._data(s, setting).held_out[0])
        if setting["samples"] > most:
            raise InputError("samples", setting["samples"], f"at most the number of held-out images, {most}")
        if setting["width"] % 8:
            raise InputError("width", setting["width"], "a multiple of 8")

    # ---------------------------------------------------------------- contenders

    def baselines(self) -> list[str]:
        return ["edm", "ddpm", "real"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "edm": PartInfo(EDM, "EDM: Gaussian noise and Heun's sampler", 'train_pfgmpp(images, labels, D="inf")'),
            "ddpm": PartInfo(DDPM, "DDPM: noise prediction, linear betas, sampled by DDIM"),
            "heun": PartInfo(HeunScheduler, "Heun's method in place of DDIM, stacked as ddpm+heun"),
            "real": PartInfo(Real, "training images or exact points in place of samples: the floor of every distance"),
        }

    def accepts(self, name: str) -> PartInfo | None:
        """Samplers: this package's scheduler classes by method, and diffusers' by class name."""
        return Finetuning().accepts(name)

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(s, setting, self._data(s, setting), rng)

    def mount(self, h: Host, part: Part) -> None:
        kind = _sampler(part.id)
        if kind is not None:
            if h.recipe is None or h.real:
                raise InputError("methods", part.id, f"stacked on a recipe, as ddpm+{part.id}")
            knobs = checked_knobs(kind, part)
            h.scheduler = lambda config: kind.from_config(config, **knobs)
            return
        if h.recipe is not None:
            raise InputError("methods", f"{h.recipe.id}+{part.id}", "one recipe, with at most a sampler stacked on it")
        for name in BUDGET:
            if name in part.knobs:
                raise InputError(f"knob of {part.id}", name, f"left out: it is the same for all contenders (--{name})")
        h.recipe = part
        budget = {name: h.setting[name] for name in BUDGET}
        if (Path(part.id) / artefacts.RECORD).is_file():
            if part.knobs:
                raise InputError("methods", str(part), "an artefact folder without knobs")
            h.folder = Path(part.id)
        elif part.id in self.parts():
            build = self.parts()[part.id].build
            made = build(**checked_knobs(build, part))
            if isinstance(made, Real):
                h.real = True
            else:
                h.make = lambda folder, log: _train(made.apply, budget, h, folder, log)
        else:
            card = catalog.card(part.id)
            function = artefacts.function_of(card, "apply")
            settings = artefacts.check_settings(card, function, part.knobs)
            known = inspect.signature(function).parameters
            lacking = [name for name in BUDGET if name not in known]
            if lacking:
                raise InputError("methods", part.id, f"a recipe whose apply takes {', '.join(lacking)}")
            h.make = lambda folder, log: _train(function, {**settings, **budget}, h, folder, log)

    # ---------------------------------------------------------------- trial

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        if h.recipe is None:
            raise TrialError("no recipe: a contender is a recipe such as edm, with a sampler stacked on it or not")
        n, data = setting["samples"], h.data
        figures: dict[str, float] = {}
        real, labels = data.held_out[0][:n], None if data.held_out[1] is None else data.held_out[1][:n]
        if h.real:
            samples = finetuning.stand_ins(data, labels, n, rng)
        else:
            folder = h.folder
            if folder is None:
                assert h.make is not None
                budget = {name: setting[name] for name in BUDGET}
                key = {"recipe": h.recipe.to_json(), "budget": budget, "seed": rng.base, "data": data.fingerprint}
                folder = log.fits.get(key, lambda out: h.make(out, log))  # type: ignore[misc]
                figures["fit_s"] = Fits.seconds(folder)
            pipe = load_pipeline(folder)
            if not isinstance(pipe, ClassConditionalPipeline):
                pipe = ClassConditionalPipeline(pipe.unet, pipe.scheduler, pipe.config.get("null_label"))
            if h.scheduler is not None:
                scheduler = h.scheduler(pipe.scheduler.config)
                if noise_kind(scheduler) != noise_kind(pipe.scheduler):
                    theirs, ours = type(pipe.scheduler).__name__, type(scheduler).__name__
                    raise Inapplicable(f"{ours} is for another kind of noise than the recipe's {theirs}")
                pipe.scheduler = scheduler
            round_weights(pipe.unet, setting["bits"])
            started = time.perf_counter()
            with disturbed(pipe, setting["error"], rng.torch("error")):
                samples = finetuning.sample(pipe, labels, (n, *real.shape[1:]), setting["calls"], rng)
            figures["sample_s"] = time.perf_counter() - started
        if h.subject.law is not None:
            found = point_metrics.point_metrics(h.subject.law, REACH * samples.flatten(1), REACH * real.flatten(1))
            log.arrays("points", points=REACH * samples.flatten(1).numpy())
            return figures | found
        log.images("samples", ((samples[: finetuning.SHOWN] + 1) / 2).permute(0, 2, 3, 1).numpy())
        return figures | image_figures(data, real, labels, samples)

    # ---------------------------------------------------------------- report

    def exhibits(self, comparison: Comparison) -> list[Block]:
        budget = {name: comparison.rows[0].setting[name] for name in BUDGET} if comparison.rows else {}
        words = ", ".join(f"{name} {value:g}" for name, value in budget.items())
        note = Note(f"Every recipe was trained from scratch with {words}, in single precision.")
        if str(comparison.config["subject"]).partition(":")[0] != "gaussians":
            return [note, *Finetuning().exhibits(comparison)]
        law = gaussians.mixture(comparison.config["subject"])
        target, _ = law.sample(500, Streams(0).torch("target"))
        blocks: list[Block] = [note]
        for setting in comparison.settings:
            shown = {label: arrays["points"] for label, arrays in comparison.saved("points", **setting).items()}
            if shown:
                caption = "Behind the samples is the exact law."
                blocks.append(Scatter("Samples", shown, target.numpy(), caption=caption, setting=setting))
        return blocks


# -------------------------------------------------------------------- pieces


def _train(function: Callable[..., Any], settings: Mapping[str, Any], h: Host, folder: Path, log: TrialLog) -> None:
    finetuning.apply_method(function, settings, h, folder, log)  # type: ignore[arg-type]


def _points(law: Mixture) -> Data:
    """Points as images of 1x2 pixels: always the same, as real data are."""

    def draw(purpose: str) -> Tensor:
        x, _ = law.sample(POINTS, Streams(0).torch(purpose))
        return (x / REACH).clamp(-1, 1)[:, None, None, :]

    train = draw("train")
    components = PixelPCA(train, 2)
    print_of = json.dumps(law.to_json(), sort_keys=True)
    return Data((train, None), (draw("held-out"), None), components, components, fingerprint=print_of)


def _sampler(name: str) -> Any:
    """The scheduler class of a method, of diffusers, or ``heun``; None for anything else."""
    return HeunScheduler if name == "heun" else finetuning.scheduler_class(name)


@torch.no_grad()
def round_weights(network: nn.Module, bits: int) -> None:
    """Each weight tensor to 2^bits equal levels from its least to its largest entry; 32 leaves them as they are.

    Biases and norms' scales (vectors) stay, as in the usual post-training quantisation.
    """
    if bits == 32:
        return
    for weight in network.parameters():
        if weight.ndim > 1:
            low, high = weight.min(), weight.max()
            step = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
            weight.copy_(low + ((weight - low) / step).round() * step)


@contextmanager
def disturbed(pipe: Any, error: float, generator: torch.Generator) -> Iterator[None]:
    """x += error · σ ε at the start of each step, with σ the noise's standard deviation there.

    Raises:
        Inapplicable: a scheduler that does not say where its steps start.
    """
    if error == 0:
        yield
        return
    if not isinstance(pipe.scheduler, SlotScheduler):  # diffusers' own
        raise Inapplicable(f"{type(pipe.scheduler).__name__} does not say at which noise its steps start")
    scheduler: Any = pipe.scheduler
    start, step = pipe._start, scheduler.step

    def add(x: Tensor, sigma: float) -> Tensor:
        return x + error * sigma * torch.randn(x.shape, generator=generator).to(x)

    def noisy_start(latents: Tensor, own: Any) -> Tensor:
        x = start(latents, own)
        return add(x, scheduler.slots[0].sigma)

    @functools.wraps(step)
    def noisy_step(*arguments: Any, **given: Any) -> Any:
        output: Any = step(*arguments, **given)
        i = scheduler.step_index
        if i is not None and scheduler.slots[i].k == 0:
            output.prev_sample = add(output.prev_sample, scheduler.slots[i].sigma)
        return output

    pipe._start, scheduler.step = noisy_start, noisy_step
    try:
        yield
    finally:
        del pipe._start, scheduler.step
