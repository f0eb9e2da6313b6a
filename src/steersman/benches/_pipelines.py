"""What benches over diffusers pipelines share: subjects, real images, contenders on a pipeline, and runs.

A contender is a pipeline with another scheduler, with an artefact's network, with methods installed on it, or with
several of these. A run starts from noise and prompts (or labels) that all contenders share.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from steersman import catalog
from steersman.diffusion import DDIMScheduler, EulerScheduler, HeunScheduler, RK4Scheduler, autoencoder
from steersman.diffusion.asked import read_prompts
from steersman.diffusion.guidance import Guidance
from steersman.diffusion.images import load_pipeline, read_images
from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.engine import artefacts, subjects
from steersman.engine.bench import Knob, PartInfo
from steersman.engine.contenders import Contender, Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError, TrialError
from steersman.reference import gaussians, image_metrics
from steersman.reference.gaussians import Mixture
from steersman.reference.image_metrics import PixelPCA

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog

SHOWN = 12
"""Samples in a report's pictures."""


@dataclass(frozen=True)
class Data:
    """Real images and what judges samples.

    Args:
        images: real, in [-1, 1], (N, C, H, W).
        labels: of the images (labels, or captions), or None.
        judge: images in [-1, 1] -> features of the figures.
        features: of the real images.
        score: images, and what was asked for -> shares of the images that show it.
        stand_ins: what was asked for -> other real images of it, for the part ``real``.
        matched: samples are asked for what the first of the images show, and compared with those.
    """

    images: Tensor
    labels: Any
    judge: Callable[[Tensor], Tensor]
    features: Tensor
    score: Callable[[Tensor, Any], dict[str, float]] | None = None
    stand_ins: Callable[[Any, torch.Generator], Tensor] | None = None
    matched: bool = False


@dataclass
class Subject:
    """A pipeline that contenders give their scheduler to.

    Args:
        spec: as the user wrote it.
        pipe: its own scheduler is what contenders take their settings from.
        kind: points, pixels (with or without classes), or text (prompts to latents to images).
        law: of ``gaussians``.
        data: by the knobs ``data`` and ``judge``, read once.
        traces: fine trajectories, by seed and settings.
    """

    spec: str
    pipe: Any
    kind: Literal["points", "pixels", "text"]
    law: Mixture | None = None
    data: dict[tuple[str | None, str | None], Data | None] = field(default_factory=dict)
    traces: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def network(self) -> Any:
        return self.pipe.unet

    @property
    def classes(self) -> int | None:
        """Classes that can be asked for (the null label is none)."""
        labels = getattr(self.network.config, "num_class_embeds", None)
        null = self.pipe.config.get("null_label")
        return None if self.kind == "text" or labels is None else labels - (null is not None)


@dataclass
class Host:
    """A pipeline to be run once, and what contenders put on it.

    Args:
        subject, setting: of the trial.
        pipe: that is run.
        parts: mounted so far.
        scheduler: of the contender; None is the pipeline's own.
        real: real images take the samples' place.
        recipe: makes its artefact before the trial.
        installs: methods that are put on the pipeline for the run, in this order.
        guidance: the pipeline's ``guidance_scale``; None is its default.
        scale: of the pipeline's own guidance, where a part set it.
        steps: of the sampler, where a part set it.
        evaluated: rows of the network that the run took.
    """

    subject: Subject
    setting: Setting
    pipe: Any
    parts: list[Part] = field(default_factory=list)
    scheduler: Any = None
    real: bool = False
    recipe: Part | None = None
    installs: list[Any] = field(default_factory=list)
    guidance: float | None = None
    scale: float | None = None
    steps: int | None = None
    evaluated: int = 0

    def stack(self, method: Any) -> None:
        """Put a method on top of those that are there."""
        if isinstance(method, Guidance) and any(isinstance(other, Guidance) for other in self.installs):
            raise InputError("methods", self.label, "a contender with one guidance")
        self.installs.append(method)

    @property
    def label(self) -> str:
        return Contender(tuple(self.parts)).label


class Real:
    """Real images, or exact samples, in the place of samples: the floor of every distance."""


class PipelineBench:
    """A bench whose subject is a pipeline; a subclass has knobs, figures, parts and the trial."""

    default_subject = "digits"
    knobs: Mapping[str, Knob] = {
        "samples": Knob(int, 256, "samples of a trial", low=2, high=100_000, sweep=False),
        "guidance": Knob(float, None, "classifier-free guidance scale (default: the pipeline's)", low=1, sweep=False),
        "spacing": Knob(
            str,
            "own",
            "spacing of all contenders' timesteps; own: as the pipeline's scheduler says",
            choices=("own", "leading", "trailing", "linspace"),
            sweep=False,
        ),
        "prompts": Knob(
            str, None, "a text file, one prompt a line, for text-to-image pipelines (scenes has its own)", sweep=False
        ),
        "labels": Knob(
            str, None, "labels to ask for in turn, like 3,5,8 (default: as in the data, or at random)", sweep=False
        ),
        "data": Knob(str, None, "real images for a pipeline of yours: a folder, .npz or .npy", sweep=False),
        "judge": Knob(str, None, "file.py:name, images in [0, 1] to features (n, d) for the figures", sweep=False),
        "batch": Knob(int, None, "samples of one network call (default: by their size, 4 to 250)", low=1, sweep=False),
    }
    """Those of every such bench."""

    def parts(self) -> Mapping[str, PartInfo]:
        """The samplers and the floor that every such bench has."""
        line = "pipe.scheduler = {}.from_config(pipe.scheduler.config{{, knobs}})"
        return {
            "ddim": PartInfo(DDIMScheduler, "DDIM; eta=1 is ancestral sampling", line.format("DDIMScheduler")),
            "euler": PartInfo(EulerScheduler, "Euler's method (equal to DDIM)", line.format("EulerScheduler")),
            "heun": PartInfo(HeunScheduler, "Heun's method, two calls a step", line.format("HeunScheduler")),
            "rk4": PartInfo(
                RK4Scheduler, "classical Runge-Kutta in time, four calls a step", line.format("RK4Scheduler")
            ),
            "real": PartInfo(Real, "real images or exact samples in place of samples: the floor of every distance"),
        }

    # ---------------------------------------------------------------- subject

    def subject(self, spec: str) -> Subject:
        found = subjects.resolve(spec)
        diffusers.utils.logging.disable_progress_bar()  # the engine shows what goes on
        if spec.partition(":")[0] == "gaussians" and found.kind == "reference":
            from steersman.reference import gaussians_model

            return _quiet(Subject(spec, gaussians_model.pipeline(spec), "points", gaussians.mixture(spec)))
        if found.kind == "factory":
            try:
                pipe = subjects.load_callable(spec, "subject")()
            except InputError:
                raise
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise InputError("subject", spec, f"a factory that returns a pipeline ({reason})") from error
        elif found.kind == "endpoint":
            raise InputError("subject", spec, "gaussians, digits, a diffusers pipeline, or file.py:factory of one")
        else:
            pipe = load_pipeline(spec if found.path is None else found.path)
        unet: Any = getattr(pipe, "unet", None)
        scheduler: Any = getattr(pipe, "scheduler", None)
        if unet is None or not isinstance(scheduler, SchedulerMixin):
            raise InputError("subject", spec, "a diffusers pipeline with a unet and a scheduler")
        if isinstance(unet, diffusers.UNet2DModel):
            if not isinstance(pipe, ClassConditionalPipeline):
                pipe = ClassConditionalPipeline(pipe.unet, scheduler, pipe.config.get("null_label"))
            return _quiet(Subject(spec, pipe, "pixels"))
        if getattr(pipe, "vae", None) is None or getattr(pipe, "tokenizer", None) is None:
            raise InputError("subject", spec, "an unconditional, class-conditional or text-to-image pipeline")
        return _quiet(Subject(spec, pipe, "text"))

    def check(self, s: Subject, setting: Setting) -> None:
        if setting["prompts"] is not None:
            prompts = read_prompts(setting["prompts"])
            if s.spec == "scenes":
                from steersman.reference import scenes

                scenes.parse(prompts)
            if s.kind != "text":
                raise InputError("prompts", setting["prompts"], f"left out: {s.spec} takes no prompts")
        elif s.kind == "text" and s.spec != "scenes":
            raise InputError("prompts", None, "a text file, one prompt a line, for this text-to-image pipeline")
        guidable = s.kind == "text" or (s.classes and s.pipe.config.get("null_label") is not None)
        if (setting["guidance"] or 1) > 1 and not guidable:
            raise InputError("guidance", setting["guidance"], f"1 or left out: {s.spec} takes no guidance")
        if setting["labels"] is not None:
            _asked(s, setting["labels"])
        data = self.data(s, setting)
        if data is not None and data.matched and setting["samples"] > len(data.images):
            raise InputError(
                "samples", setting["samples"], f"at most the number of held-out images, {len(data.images)}"
            )

    def data(self, s: Subject, setting: Setting) -> Data | None:
        key = setting["data"], setting["judge"]
        if key not in s.data:
            s.data[key] = data_of(s, *key)
        return s.data[key]

    # ---------------------------------------------------------------- contenders

    def accepts(self, name: str) -> PartInfo | None:
        """Any scheduler class of diffusers."""
        return of_diffusers(name)

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(s, setting, s.pipe, guidance=setting["guidance"])

    def mount(self, h: Host, part: Part) -> None:
        h.parts.append(part)
        if (Path(part.id) / "artefact.json").is_file():
            if len(h.parts) > 1:
                raise InputError("methods", h.label, "an artefact first, and only one")
            self.artefact(h, part)
            return
        info = self.parts().get(part.id) or of_diffusers(part.id)
        build = catalog.card(part.id).load() if info is None else info.build
        if build is Real:
            checked_knobs(build, part)
            h.real = True
        elif isinstance(build, type) and issubclass(build, SchedulerMixin):
            if h.scheduler is not None:
                raise InputError("methods", h.label, "a contender with one sampler")
            h.scheduler = _scheduler(build, part, h)
        elif _made_first(build, part):
            if len(h.parts) > 1:
                raise InputError("methods", h.label, f"{part.id} first, and only one method that makes an artefact")
            settings, knobs = _split_knobs(part)
            if hasattr(build, "check_settings"):  # what can be said before anything is made
                build.check_settings(**settings, **knobs)
            if subjects.resolve(h.subject.spec).kind != "reference" or h.subject.law is not None:
                made = f"steersman apply {part.id} --subject {h.subject.spec} --out FOLDER"
                raise InputError(
                    "methods", str(part), f"the folder that {made} made (a comparison makes none of yours)"
                )
            h.recipe = part
        elif hasattr(build, "install") and hasattr(build, "uninstall"):
            h.stack(build(**checked_knobs(build, part)))
        else:
            raise InputError("methods", part.id, "a sampler, or a method that installs itself on a pipeline")
        if h.real and len(h.parts) > 1:
            raise InputError("methods", h.label, "the part real alone")

    def fit(self, h: Host, rng: Streams, log: TrialLog) -> None:
        """Make what the contender's first part makes, on a reference subject, and mount it."""
        if h.recipe is None:
            return
        part, h.recipe = h.recipe, None
        card = catalog.card(part.id)
        settings, knobs = _split_knobs(part)
        found = subjects.resolve(h.subject.spec)

        def make(folder: Path) -> None:
            with tempfile.TemporaryDirectory() as temporary:
                images = subjects.write_images(found, Path(temporary))

                def say(line: str) -> None:
                    log.progress(0, 1, line)

                seed = rng.seed("fit") % 2**31
                artefacts.function_of(card, "apply")(found.path, images, folder, seed=seed, log=say, **settings)

        folder = log.fits.get({"method": part.id, "settings": settings, "seed": rng.base}, make)
        self._mounted(h, card.load(), folder, knobs)

    def artefact(self, h: Host, part: Part) -> None:
        """Mount the artefact in a folder: a pipeline, or what makes one of the subject's."""
        method = catalog.card(json.loads((Path(part.id) / "artefact.json").read_text())["method"]).load()
        mounting = _mounting(method)
        if mounting is not None:
            self._mounted(h, method, Path(part.id), checked_knobs(mounting, part, skip=_given(mounting)))
        elif part.knobs:
            raise InputError("methods", str(part), "an artefact folder without knobs")
        else:
            h.pipe = self.subject(part.id).pipe

    def _mounted(self, h: Host, method: Any, folder: Path, knobs: Mapping[str, Any]) -> None:
        if hasattr(method, "mount"):
            h.pipe = method.mount(h.subject.pipe, folder, **knobs)
        else:
            h.installs.insert(0, method.from_pretrained(folder, **knobs))


# -------------------------------------------------------------------- pieces


def _quiet(s: Subject) -> Subject:
    s.pipe.set_progress_bar_config(disable=True)
    if s.kind != "points" and torch.cuda.is_available():
        s.pipe.to("cuda")
    return s


def of_diffusers(name: str) -> PartInfo | None:
    """The scheduler class of diffusers of that name; None for anything else."""
    if not name.endswith("Scheduler") or not name.isidentifier():
        return None
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
        return None
    line = f"pipe.scheduler = diffusers.{name}.from_config(pipe.scheduler.config{{, knobs}})"
    return PartInfo(kind, f"{name} of diffusers", line)


def _scheduler(kind: Any, part: Part, h: Host) -> Any:
    """A scheduler with the settings of the pipeline's own, the bench's spacing, and the part's knobs."""
    knobs = checked_knobs(kind, part)
    spacing = h.setting["spacing"]
    if spacing != "own" and "timestep_spacing" in getattr(kind, "_get_init_keys", lambda _: ())(kind):
        knobs = {"timestep_spacing": spacing} | knobs
    try:
        return kind.from_config(h.pipe.scheduler.config, **knobs)
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError("methods", str(part), f"settings that {kind.__name__} takes ({reason})") from error


def _mounting(method: Any) -> Any:
    """How a method's artefact gets on a pipeline: its ``mount(pipe, folder, **knobs)``, or ``from_pretrained(folder,
    **knobs)`` and then ``install``; None where the artefact is a pipeline."""
    if hasattr(method, "mount"):
        return method.mount
    return method.from_pretrained if hasattr(method, "install") and hasattr(method, "from_pretrained") else None


def _given(mounting: Any) -> list[str]:
    """The parameters of ``mounting`` that are no knobs."""
    names = [*inspect.signature(mounting).parameters]
    return names[:2] if mounting.__name__ == "mount" else names[:1]


def _made_first(build: Any, part: Part) -> bool:
    """Whether a part makes an artefact first; guidance does so only where it is told with settings of ``apply``."""
    if part.id not in catalog.cards() or not catalog.card(part.id).apply or _mounting(build) is None:
        return False
    if not (isinstance(build, type) and issubclass(build, Guidance)):
        return True
    own = inspect.signature(build).parameters
    return any(name not in own for name in part.knobs)


def _split_knobs(part: Part) -> tuple[dict[str, Any], dict[str, Any]]:
    """A part's knobs for its method's ``apply``, and for mounting what that made."""
    card = catalog.card(part.id)
    mounting = _mounting(card.load())
    given = _given(mounting)
    names = [name for name in inspect.signature(mounting).parameters if name not in given]
    knobs = {name: value for name, value in part.knobs.items() if name in names}
    rest = {name: value for name, value in part.knobs.items() if name not in names}
    return artefacts.check_settings(card, artefacts.function_of(card, "apply"), rest), knobs


def noise_kind(scheduler: Any) -> str:
    """How noise is parametrised: a network trained with one kind is nonsense under another's scheduler."""
    # Its own settings: from_config also keeps those of the scheduler before it.
    if "sigma_data" in inspect.signature(type(scheduler).__init__).parameters:
        return "edm"
    return "flow" if type(scheduler).__name__.startswith("FlowMatch") else "diffusion"


def most_steps(scheduler: Any, calls: int) -> int:
    """The most steps of a sampler that fit into a number of network calls.

    Raises:
        Inapplicable: not one does.
    """
    name, reason, foreign, least = type(scheduler).__name__, "", "", None
    for steps in range(calls, 0, -1):
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            text = " ".join(str(error).split())
            if isinstance(error, InputError):
                reason = text
            elif not foreign:  # of the most steps
                library = type(scheduler).__module__.partition(".")[0]
                foreign = f"{name} of {library} fails with {steps} steps ({type(error).__name__}: {text})"
            continue
        if len(scheduler.timesteps) <= calls:
            return steps
        least = len(scheduler.timesteps)
    if foreign and least is None:
        raise Inapplicable(foreign)
    why = f"it needs at least {least}" if least is not None else reason
    raise Inapplicable(f"{name} has no plan for {calls} network calls ({why})")


def asked_for(s: Subject, data: Data | None, setting: Setting, rng: Streams) -> Any:
    """What each sample is asked to be: prompts, or labels (n,), the same for all contenders."""
    n = setting["samples"]
    if s.kind == "text" and setting["prompts"] is not None:
        prompts = read_prompts(setting["prompts"])
        return [prompts[i % len(prompts)] for i in range(n)]
    if s.kind == "text":
        from steersman.reference import scenes

        return scenes.captions("held-out")[:n]
    if s.classes is None or (s.kind == "points" and (setting["guidance"] or 1) <= 1 and setting["labels"] is None):
        return None
    if setting["labels"] is not None:
        asked = _asked(s, setting["labels"])
        return asked.repeat(-(-n // len(asked)))[:n]
    if data is not None and data.labels is not None:
        if data.matched:
            return data.labels[:n]
        return data.labels[torch.randint(len(data.labels), (n,), generator=rng.torch("labels"))]
    return torch.randint(s.classes, (n,), generator=rng.torch("labels"))


def _asked(s: Subject, text: str) -> Tensor:
    if not s.classes:
        raise InputError("labels", text, f"left out: {s.spec} has no classes")
    pieces = [piece.strip() for piece in str(text).split(",")]
    if not all(piece.isdecimal() and int(piece) < s.classes for piece in pieces):
        raise InputError("labels", text, f"numbers from 0 to {s.classes - 1}, like 0,{s.classes - 1}")
    return torch.tensor([int(piece) for piece in pieces])


def data_of(s: Subject, source: str | None, judge: str | None) -> Data | None:
    if s.kind == "points":
        for name, value in (("data", source), ("judge", judge)):
            if value is not None:
                raise InputError(name, value, "left out: the law of gaussians is known exactly")
        return None
    if source is not None:
        found = _own(s, source)
    elif s.spec in REFERENCES:
        found = REFERENCES[s.spec]()
    elif judge is not None:
        raise InputError("judge", judge, "given together with data")
    else:
        return None
    if judge is None:
        return found
    function = subjects.load_callable(judge, "judge")

    def features(x: Tensor) -> Tensor:
        return function((x + 1) / 2)

    return replace(found, judge=features, features=image_metrics.features(features, found.images), score=None)


def compared_with(data: Data, labels: Any, setting: Setting) -> Tensor:
    """Features of the real images that samples asked for ``labels`` are compared with."""
    if setting["labels"] is not None and isinstance(data.labels, Tensor):
        real = data.features[torch.isin(data.labels, labels)]
        if len(real) < 16:
            raise TrialError(f"there are {len(real)} real images with labels {setting['labels']}, and 16 are needed")
        return real
    if data.matched and setting["prompts"] is None:
        return data.features[: setting["samples"]]
    return data.features


def _own(s: Subject, source: str) -> Data:
    """Images of the user's, judged by their principal components."""
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError("data", source, "a folder, .npz or .npy that exists")
    channels = 3 if s.kind == "text" else s.network.config.in_channels
    images, labels = read_images(path, channels, bool(s.classes))
    if len(images) < 16:
        raise InputError("data", f"{len(images)} images", "at least 16 images")
    images = 2 * images - 1
    features = PixelPCA(images, min(32, len(images) - 2, images[0].numel()))
    return Data(images, labels, features, image_metrics.features(features, images))


def _digits() -> Data:
    from steersman.reference import digits

    images, labels = digits.images("held-out")
    b = digits.classifier("b")
    return Data(
        images,
        labels,
        b.features,
        image_metrics.features(b.features, images),
        lambda x, asked: {"accuracy": image_metrics.class_accuracy(b, x, torch.as_tensor(asked))},
        digits.matched,
        matched=True,
    )


def _scenes() -> Data:
    from steersman.reference import scenes

    def score(x: Tensor, asked: Any) -> dict[str, float]:
        shares = scenes.accuracy(x, asked)
        overall = shares.pop("overall")
        return {"accuracy": overall, "attribute_accuracy": float(np.mean(list(shares.values())))}

    images = scenes.images("held-out")
    return Data(
        images,
        scenes.captions("held-out"),
        scenes.features,
        image_metrics.features(scenes.features, images),
        score,
        lambda asked, generator: scenes.render(scenes.parse(asked), generator),
        matched=True,
    )


REFERENCES = {"digits": _digits, "scenes": _scenes}
"""Reference subjects that bring real images."""


def stand_ins(s: Subject, data: Data | None, labels: Any, setting: Setting, rng: Streams) -> Tensor:
    n = setting["samples"]
    if s.law is not None:
        if labels is not None:
            raise Inapplicable("the law of what is asked for is not known exactly")
        return s.law.sample(n, rng.torch("real"), torch.float64)[0][:, :, None, None]
    if data is None:
        raise Inapplicable("there are no real images (give data)")
    if data.stand_ins is not None:
        return data.stand_ins(labels, rng.torch("real"))
    if len(data.images) < n:
        raise Inapplicable(f"there are only {len(data.images)} real images for {n} samples")
    return data.images[torch.randperm(len(data.images), generator=rng.torch("real"))[:n]]


def _shape(s: Subject) -> torch.Size:
    """Of one sample's latent."""
    config = s.network.config
    size = config.sample_size
    return torch.Size([config.in_channels, *((size, size) if isinstance(size, int) else size)])


def shared_noise(s: Subject, n: int, rng: Streams) -> Tensor:
    return torch.randn((n, *_shape(s)), generator=rng.torch("noise"))


def batch_size(s: Subject, setting: Setting) -> int:
    """Samples of one network call; by default as many as keep a batch of latents about 65,000 numbers large."""
    return setting["batch"] or min(250, max(4, 2**16 // _shape(s).numel()))


def run(h: Host, noise: Tensor, labels: Any, generator: Any, **plan: Any) -> Tensor:
    """One batch through the stock pipeline: from noise to what its scheduler returned last."""
    s, arguments = h.subject, dict(plan)
    if s.kind == "text":
        arguments["prompt"] = list(labels)
    elif labels is not None:
        arguments["labels"] = labels
    scale = h.guidance
    for method in h.installs:
        # What installs itself has a scale of its own, and only needs the branches.
        if getattr(method, "branches", None) is not None:
            scale = 2.0 if method.branches == 2 else 1.0
    if scale is not None:
        arguments["guidance_scale"] = scale
    noise = noise.to(s.network.device, s.network.dtype)
    result = h.pipe(latents=noise, generator=generator, output_type="latent", **arguments)
    return result.images.detach().float().cpu()


@torch.no_grad()
def sample(h: Host, scheduler: Any, steps: int, labels: Any, rng: Streams, log: TrialLog, clamp: bool = True) -> Tensor:
    """What the contender makes of the shared noise: latents, or pixels (clipped to [-1, 1])."""
    s, setting = h.subject, h.setting
    noise = shared_noise(s, setting["samples"], rng)
    batch = batch_size(s, setting)
    parts = []
    with prepared(h, scheduler), watched(h, log, -(-len(noise) // batch)) as watch:
        for start in range(0, len(noise), batch):
            part = slice(start, start + batch)
            generator = rng.torch("sampler", start)
            wanted = None if labels is None else labels[part]
            watch.begin()
            parts.append(run(h, noise[part], wanted, generator, num_inference_steps=steps))
            watch.verify()
    samples = torch.cat(parts)
    if not bool(samples.isfinite().all()):
        raise TrialError(f"the samples of {h.label} are not finite, though the network's outputs are")
    h.evaluated = watch.rows
    return samples.clamp(-1, 1) if s.kind == "pixels" and clamp else samples


@contextmanager
def prepared(h: Host, scheduler: Any) -> Iterator[None]:
    """The pipeline with a scheduler and what installs itself; afterwards as it was."""
    installed = []
    with scheduled(h.pipe, scheduler):
        try:
            for method in h.installs:
                method.install(h.pipe)
                installed.append(method)
            yield
        finally:
            for method in reversed(installed):
                method.uninstall()


@contextmanager
def scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


class Watch:
    """Looks at each of the network's outputs; waits for the device only once a batch."""

    def __init__(self, h: Host, log: TrialLog, batches: int) -> None:
        self.h, self.log, self.batches, self.done = h, log, batches, 0
        self.finite: list[Tensor] = []
        self.rows = 0

    def count(self, module: Any, arguments: Any, keywords: Any) -> None:
        self.rows += len(arguments[0] if arguments else keywords["sample"])

    def begin(self) -> None:
        self.finite = []

    def __call__(self, module: Any, arguments: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output.sample
        self.finite.append(x.isfinite().all())
        plan = max(len(self.h.pipe.scheduler.timesteps), 1)
        self.log.progress(self.done + min(len(self.finite) / plan, 1.0), self.batches, "sampling")

    def verify(self) -> None:
        self.done += 1
        if not self.finite:
            return
        for i, good in enumerate(torch.stack(self.finite).tolist()):
            if not good:
                times = self.h.pipe.scheduler.timesteps
                at = f" (timestep {float(times[i]):g})" if i < len(times) else ""
                where = f"call {i + 1} of {len(self.finite)}{at}, under {self.h.label}"
                raise TrialError(f"the network returned NaN or infinity at {where}")


@contextmanager
def watched(h: Host, log: TrialLog, batches: int) -> Iterator[Watch]:
    watch = Watch(h, log, batches)
    hooks = [
        h.pipe.unet.register_forward_pre_hook(watch.count, with_kwargs=True),
        h.pipe.unet.register_forward_hook(watch),
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def decode(s: Subject, samples: Tensor, batch: int, clamp: bool = True) -> Tensor:
    """Images in [-1, 1] (with ``clamp``)."""
    if s.kind == "pixels":
        return samples
    with autoencoder.upcast(s.pipe.vae):
        images = torch.cat([autoencoder.decode(s.pipe.vae, part).float().cpu() for part in samples.split(batch)])
    return images.clamp(-1, 1) if clamp else images
