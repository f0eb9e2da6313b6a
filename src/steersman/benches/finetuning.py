r"""Fine-tuning for few network calls: sample quality after a fit, in features that the fit never saw.

A contender is a recipe, fitted once for each seed on the training images and kept, then sampled at every
number of calls of the grid from the same noise and labels; a sampler may be stacked on it
(``mmd-ddm:calls=5+pndm``). Its samples and as many held-out images are compared in the features f of a
judge, standardised over real images, which neither the loss nor the choice of the checkpoint used:

    Frechet d² = |m_s - m_r|² + tr(S_s + S_r - 2 (S_s S_r)^{1/2}),     kernel d² = unbiased MMD², cubic,

with improved precision and recall, and the share of samples that the judge takes for their label. The part
``real`` puts training images in the samples' place: what a sampler without any fault would score from as
many images.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from steersman import catalog
from steersman.benches._pipelines import most_steps, of_diffusers
from steersman.diffusion import mmd_ddm
from steersman.diffusion.images import load_pipeline, read_images
from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.engine import artefacts, subjects
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.fits import Fits
from steersman.engine.rows import plain
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError, TrialError
from steersman.reference import digits, image_metrics
from steersman.reference.image_metrics import PixelPCA
from steersman.report.blocks import Block, ImageGrid, Note

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

BATCH = 256
DROPPED_LABELS = 0.1
SHOWN = 12


@dataclass(frozen=True)
class Data:
    """Real images in [-1, 1] and what judges samples.

    Args:
        train, held_out: images and labels (None for a network without classes).
        judge: images in [-1, 1] -> features of the figures.
        pixels: principal components of the pixels.
        classify: images -> logits, where there is a classifier.
        loss_features: images in [0, 1] -> features that recipes train on; None leaves them their own.
        fingerprint: changes when the training images do.
    """

    train: tuple[Tensor, Tensor | None]
    held_out: tuple[Tensor, Tensor | None]
    judge: Callable[[Tensor], Tensor]
    pixels: PixelPCA
    fingerprint: str
    classify: Callable[[Tensor], Tensor] | None = None
    loss_features: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Subject:
    """The given pipeline's folder; real images come with ``digits``, or with the knob ``data``.

    Args:
        spec: as the user wrote it.
        folder: a diffusers pipeline.
        channels: of its images.
        classes: whether its network takes labels.
        data: by the knobs ``data`` and ``judge``, read once.
        temporary: keeps the folder of a factory's pipeline.
    """

    spec: str
    folder: Path
    channels: int
    classes: bool
    data: dict[tuple[str | None, str | None], Data] = field(default_factory=dict)
    temporary: Any = None


@dataclass
class Host:
    """A recipe and a sampler that are to be used; the fit happens in the trial."""

    subject: Subject
    data: Data
    rng: Streams
    recipe: Part | None = None
    make: Callable[[Path, TrialLog], None] | None = None
    folder: Path | None = None
    real: bool = False
    scheduler: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Continue:
    """Goes on with the training that the network had, for as many passes as an unrolled recipe takes.

        L = E |target - network(sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε, t, y)|²,    t uniform

    An unrolled step of N calls with gradient checkpointing runs the network N times forwards, N times again,
    and N times backwards; a step here runs it once forwards and once backwards. A backward pass counts as two
    forward ones, so that ``steps`` unrolled steps are (4/3) N ``steps`` of these.

    Args:
        steps, calls, batch_size: of the unrolled recipe whose passes are matched.
        learning_rate: of Adam, falling to 0 linearly.
    """

    steps: int = 400
    calls: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("calls", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InputError(name, value, f"a whole number from {low}")
        if not 0 <= self.learning_rate < math.inf:
            raise InputError("learning_rate", self.learning_rate, "a finite number from 0")

    def fit(self, subject: Path, data: Data, folder: Path, rng: Streams, log: TrialLog) -> None:
        """Trains the pipeline in ``subject`` and saves it in ``folder``."""
        pipe = load_pipeline(subject)
        unet, config = pipe.unet, pipe.scheduler.config
        images, labels = data.train
        abar = pipe.scheduler.alphas_cumprod.double()
        null = pipe.config.get("null_label")
        optimizer = torch.optim.Adam(unet.parameters(), lr=self.learning_rate)
        total = round(4 / 3 * self.calls * self.steps)
        g, b = rng.torch("continue"), self.batch_size
        unet.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.seed("continue dropout"))
            for step in range(total):
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / total)
                index = torch.randint(len(images), (b,), generator=g)
                t = torch.randint(len(abar), (b,), generator=g)
                x0 = images[index]
                eps = torch.randn(x0.shape, generator=g)
                alpha, sigma = (x.sqrt().float().view(-1, 1, 1, 1) for x in (abar[t], 1 - abar[t]))
                targets = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
                y = {}
                if labels is not None:
                    dropped = torch.rand(b, generator=g) < DROPPED_LABELS
                    y["class_labels"] = labels[index] if null is None else labels[index].masked_fill(dropped, null)
                loss = (unet(alpha * x0 + sigma * eps, t, **y).sample - targets[config.prediction_type]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                if step % 50 == 0:
                    log.progress(step, total, f"training on, loss {loss.item():.3f}")
        unet.eval()
        pipe.save_pretrained(folder)


@dataclass(frozen=True)
class Given:
    """The network as it is given, under DDIM.

    Args:
        spacing: of DDIM's times: own (as the pipeline's scheduler says), leading or trailing.
        clip: whether x̂0 is clipped to [-1, 1]; None is as the pipeline's scheduler says.
    """

    spacing: Literal["own", "leading", "trailing"] = "own"
    clip: bool | None = None

    def __post_init__(self) -> None:
        if self.spacing not in ("own", "leading", "trailing"):
            raise InputError("spacing", self.spacing, "own, leading or trailing")
        if self.clip not in (None, True, False):
            raise InputError("clip", self.clip, "true, false or null")

    def scheduler(self, config: Any) -> DDIMScheduler:
        changed = {} if self.spacing == "own" else {"timestep_spacing": self.spacing}
        return DDIMScheduler.from_config(config, **changed, **({} if self.clip is None else {"clip_sample": self.clip}))


class Real:
    """Training images in the place of samples: the floor of every distance, at equal counts."""


class Finetuning:
    """See the module's text."""

    id = "finetuning"
    shape: Literal["Recipe"] = "Recipe"
    default_subject = "digits"
    headline = ("frechet", "calls")
    knobs: Mapping[str, Knob] = {
        "calls": Knob(int, (5,), "network calls of a sample", low=1, high=1000),
        "samples": Knob(int, 597, "samples of a trial, at most as many as held-out images", low=8, sweep=False),
        "data": Knob(str, None, "real images for a pipeline of yours: a folder, .npz or .npy", sweep=False),
        "judge": Knob(str, None, "file.py:name, images in [0, 1] to features (n, d) for the figures", sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "frechet": Figure("", "lower", "quality", "Frechet distance to held-out images in the judge's features"),
        "kernel": Figure("", "lower", "quality", "unbiased cubic MMD² to held-out images in the judge's features"),
        "frechet_pixels": Figure("", "lower", "quality", "Frechet distance in principal components of the pixels"),
        "precision": Figure("", "higher", "quality", "share of samples among the held-out images (3 neighbours)"),
        "recall": Figure("", "higher", "quality", "share of held-out images among the samples (3 neighbours)"),
        "accuracy": Figure("", "higher", "quality", "share of samples that the judge takes for their label"),
        "frechet_loss": Figure("", "lower", "info", "Frechet distance in the features that recipes train on"),
        "fit_s": Figure("s", "lower", "cost", "seconds of the fit"),
        "sample_s": Figure("s", "lower", "cost", "seconds of sampling"),
    }

    # ---------------------------------------------------------------- subject

    def subject(self, spec: str) -> Subject:
        found = subjects.resolve(spec)
        temporary, folder = None, found.path
        if found.kind == "reference" and spec != "digits":
            raise InputError("subject", spec, "digits, or a pixel-space diffusion pipeline of yours")
        if found.kind == "factory":
            temporary = tempfile.TemporaryDirectory(prefix="steersman-finetuning-")
            folder = Path(temporary.name)
            subjects.load_callable(spec, "subject")().save_pretrained(folder)
        if folder is None:
            raise InputError("subject", spec, "digits, a diffusers pipeline folder, or file.py:factory of a pipeline")
        unet = getattr(load_pipeline(folder), "unet", None)
        if unet is None:
            raise InputError("subject", spec, "a diffusers pipeline with a unet")
        config = unet.config
        return Subject(spec, folder, config.in_channels, config.num_class_embeds is not None, temporary=temporary)

    def _data(self, s: Subject, setting: Setting) -> Data:
        key = setting["data"], setting["judge"]
        if key not in s.data:
            s.data[key] = (
                digits_data() if s.spec == "digits" and key[0] is None else own_data(key[0], s.channels, s.classes)
            )
            if key[1] is not None:
                function = subjects.load_callable(key[1], "judge")
                s.data[key] = replace(s.data[key], judge=lambda x: function((x + 1) / 2), classify=None)
        return s.data[key]

    def check(self, s: Subject, setting: Setting) -> None:
        most = len(self._data(s, setting).held_out[0])
        if setting["samples"] > most:
            raise InputError("samples", setting["samples"], f"at most the number of held-out images, {most}")

    # ---------------------------------------------------------------- contenders

    def baselines(self) -> list[str]:
        return ["none", "none:spacing=trailing", "none+DPMSolverMultistepScheduler", "real"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "none": PartInfo(Given, "the given network under DDIM", "pipe.scheduler = DDIMScheduler.from_config(...)"),
            "continue": PartInfo(Continue, "the network's own training goes on, for as many network passes"),
            "real": PartInfo(Real, "training images in place of samples: the floor of every distance"),
        }

    def accepts(self, name: str) -> PartInfo | None:
        """Samplers: this package's scheduler classes by method, and diffusers' by class name."""
        kind = scheduler_class(name)
        if kind is None or name not in catalog.cards():
            return of_diffusers(name)
        card = catalog.cards()[name]
        return PartInfo(kind, card.summary, card.line)

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(s, self._data(s, setting), rng)

    def mount(self, h: Host, part: Part) -> None:
        kind = scheduler_class(part.id)
        if kind is not None:
            if h.recipe is None or h.real:
                raise InputError("methods", part.id, f"stacked on a recipe, as none+{part.id}")
            knobs = checked_knobs(kind, part)
            h.scheduler = lambda config: kind.from_config(config, **knobs)
            return
        if h.recipe is not None:
            raise InputError("methods", f"{h.recipe.id}+{part.id}", "one recipe, with at most a sampler stacked on it")
        h.recipe = part
        record = Path(part.id) / artefacts.RECORD
        if record.is_file():
            h.folder = Path(part.id)
        elif part.id in self.parts():
            build = self.parts()[part.id].build
            made = build(**checked_knobs(build, part))
            if isinstance(made, Continue):
                h.make = lambda folder, log: made.fit(h.subject.folder, h.data, folder, h.rng, log)
            elif isinstance(made, Given):
                h.folder, h.scheduler = h.subject.folder, made.scheduler
            else:
                h.real = True
        else:
            card = catalog.card(part.id)
            function = artefacts.function_of(card, "apply")
            settings = artefacts.check_settings(card, function, part.knobs)
            if "features" in inspect.signature(function).parameters and h.data.loss_features is not None:
                settings.setdefault("features", h.data.loss_features)
            h.make = lambda folder, log: apply_method(function, settings, h, folder, log)

    # ---------------------------------------------------------------- trial

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        if h.recipe is None:
            raise TrialError("no recipe: a contender is a recipe such as none, with a sampler stacked on it or not")
        n, data = setting["samples"], h.data
        figures: dict[str, float] = {}
        real, labels = data.held_out[0][:n], None if data.held_out[1] is None else data.held_out[1][:n]
        if h.real:
            samples = stand_ins(data, labels, n, rng)
        else:
            folder = h.folder
            if folder is None:
                assert h.make is not None
                key = {"recipe": h.recipe.to_json(), "seed": rng.base, "data": data.fingerprint}
                folder = log.fits.get(key, lambda out: h.make(out, log))  # type: ignore[misc]
                figures["fit_s"] = Fits.seconds(folder)
            pipe = load_pipeline(folder)
            if h.scheduler is not None:
                pipe.scheduler = h.scheduler(pipe.scheduler.config)
            start = time.perf_counter()
            samples = sample(pipe, labels, (n, *real.shape[1:]), setting["calls"], rng)
            figures["sample_s"] = time.perf_counter() - start
        log.images("samples", ((samples[:SHOWN] + 1) / 2).permute(0, 2, 3, 1).numpy())
        return figures | image_figures(data, real, labels, samples)

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = []
        for setting in comparison.settings:
            grid = {
                label: next(iter(arrays.values())) for label, arrays in comparison.saved("samples", **setting).items()
            }
            if grid:
                caption = "Each column starts from the same noise and label; the row real shows training images."
                blocks.append(ImageGrid("Samples", grid, caption=caption, setting=setting))
        blocks.append(
            Note(
                "Distances are to held-out images that no fit saw, in features that no fit used. They depend on the "
                "number of samples: compare them with the row real, which puts as many training images in the "
                "samples' place, and not with numbers from elsewhere."
            )
        )
        return blocks


def image_figures(data: Data, real: Tensor, labels: Tensor | None, samples: Tensor) -> dict[str, float]:
    """The figures of ``samples`` against as many held-out images ``real``, which have the same labels."""
    figures: dict[str, float] = {}
    for name, extractor in (("", data.judge), ("_pixels", data.pixels), ("_loss", data.loss_features)):
        if extractor is not None:
            scale = (lambda x: (x + 1) / 2) if name == "_loss" else (lambda x: x)
            held_out, sampled = (image_metrics.features(extractor, scale(x)) for x in (real, samples))
            found = image_metrics.feature_metrics(held_out, sampled)
            figures |= found if not name else {f"frechet{name}": found["frechet"]}
            if not name and labels is not None:
                # Sample i has the label of held-out image i: such pairs are not independent.
                pairs = torch.arange(len(samples))
                figures["kernel"] = mmd_ddm.distance(sampled, held_out, "cubic", (pairs, pairs)).item()
    if data.classify is not None and labels is not None:
        figures["accuracy"] = image_metrics.class_accuracy(data.classify, samples, labels)
    return figures


def digits_data() -> Data:
    """``digits``, judged in the features of classifier b; recipes may train on those of a."""
    a, b = digits.classifier("a"), digits.classifier("b")
    train = digits.images("train")
    return Data(
        train=train,
        held_out=digits.images("held-out"),
        judge=b.features,
        pixels=PixelPCA(train[0]),
        classify=b,
        loss_features=_unit(a.features),
        fingerprint=digits.data_fingerprint(),
    )


def _unit(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Features of images in [-1, 1] as features of images in [0, 1]."""

    def classifier_features(x: Tensor) -> Tensor:
        return features(2 * x - 1)

    return classifier_features


def own_data(source: str | None, channels: int | None, classes: bool | None) -> Data:
    """A user's images: two thirds to train on, one third held out, split the same way each time."""
    if source is None:
        raise InputError("data", source, "real images for this subject: a folder, .npz or .npy")
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError("data", source, "a folder, .npz or .npy that exists")
    images, labels = read_images(path, channels, classes)
    if len(images) < 48:
        raise InputError("data", f"{len(images)} images", "at least 48 images")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    cut = len(images) - len(images) // 3
    parts = [(2 * images[i] - 1, None if labels is None else labels[i]) for i in (order[:cut], order[cut:])]
    pixels = PixelPCA(parts[0][0], min(32, cut - 1, images[0].numel()))
    return Data(parts[0], parts[1], pixels, pixels, fingerprint=subjects.tree_hash(path))


def apply_method(
    function: Callable[..., Any], settings: Mapping[str, Any], h: Host, folder: Path, log: TrialLog
) -> None:
    """A method's ``apply`` on the given pipeline and the training images."""
    images, labels = h.data.train
    arrays: dict[str, Any] = {"images": ((images + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()

    def progress(line: str) -> None:
        step = re.search(r"step (\d+)/(\d+)", line)
        done, total = step.groups() if step else (0, 1)
        log.progress(float(done), float(total), line)

    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "train.npz"
        np.savez(source, **arrays)
        seed = h.rng.seed("fit") % 2**31
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "only .* real images")
            metrics = function(h.subject.folder, source, folder, seed=seed, log=progress, **settings)
    (folder / "metrics.json").write_text(json.dumps(plain(dict(metrics)), indent=1) + "\n")


def stand_ins(data: Data, labels: Tensor | None, n: int, rng: Streams) -> Tensor:
    """Training images, none twice, with the labels that samples have (class shares weigh in every distance)."""
    images, classes = data.train
    order = torch.randperm(len(images), generator=rng.torch("real"))
    if labels is None or classes is None:
        chosen = order[:n]
    else:
        queues = {c: iter(order[classes[order] == c].tolist()) for c in classes.unique().tolist()}
        found = [next(queues.get(c, iter(())), None) for c in labels.tolist()]
        chosen = torch.tensor([i for i in found if i is not None], dtype=torch.long)
    if len(chosen) < n:
        raise Inapplicable(f"there are only {len(chosen)} training images of the labels of the {n} samples")
    return images[chosen]


@torch.no_grad()
def sample(pipe: Any, labels: Tensor | None, shape: tuple[int, ...], calls: int, rng: Streams) -> Tensor:
    """Samples in [-1, 1], clipped as a pipeline's images are."""
    if not isinstance(pipe, ClassConditionalPipeline):
        pipe = ClassConditionalPipeline(pipe.unet, pipe.scheduler, pipe.config.get("null_label"))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(shape, generator=rng.torch("noise"))
    steps = most_steps(pipe.scheduler, calls)
    parts = []
    for start in range(0, shape[0], BATCH):
        part = slice(start, start + BATCH)
        arguments = {} if labels is None else {"labels": labels[part]}
        generator = rng.torch("sampler", start)
        x = pipe(latents=noise[part], num_inference_steps=steps, generator=generator, output_type="latent", **arguments)
        parts.append(x.images.float())
    samples = torch.cat(parts)
    if not bool(samples.isfinite().all()):
        raise TrialError("the samples are not finite")
    return samples.clamp(-1, 1)


def scheduler_class(name: str) -> Any:
    """The scheduler class of a method, or of diffusers; None for anything else."""
    if name in catalog.cards():
        card = catalog.cards()[name]
        kind = card.load() if card.family == "sampler" else None
        return kind if isinstance(kind, type) and issubclass(kind, SchedulerMixin) else None
    found = of_diffusers(name)
    return None if found is None else found.build
