"""Guiding a conditional model: what each guidance buys at each strength, and what it costs in network calls.

All contenders start from the same noise with the same prompts (or labels) and the same sampler. A guidance with two
branches evaluates two rows of the network a sample and step, so ``calls_used`` counts rows: what was evaluated, not
what a formula says. Contenders with fewer steps, ``cfg:scale=3:steps=10``, stand for equal calls.

Quality is measured against real images where there are any (``digits`` and ``scenes`` bring theirs), by whether
samples show what was asked for, and by the known harms of too strong guidance: values beyond the range, saturated
colours, less variety. ``fidelity`` compares with the images of classifier-free guidance from the same noise, which is
what methods that only make it cheaper are after.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from steersman.benches._pipelines import (
    SHOWN,
    Host,
    PipelineBench,
    Subject,
    asked_for,
    batch_size,
    compared_with,
    decode,
    most_steps,
    of_diffusers,
    sample,
    stand_ins,
)
from steersman.diffusion.guidance import Guidance, StockGuidance, is_distilled, of_two_branches, unannounced
from steersman.engine import subjects
from steersman.engine.bench import Figure, Knob, PartInfo, Shape
from steersman.engine.contenders import checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import InputError, TrialError
from steersman.reference import image_metrics
from steersman.report.blocks import Block, Curves, ImageGrid, Line, Note

if TYPE_CHECKING:
    from steersman.engine.bench import Row, Setting, TrialLog
    from steersman.engine.comparison import Comparison
    from steersman.engine.contenders import Part

STRENGTHS = ("scale", "guidance_scale")
"""Knobs that say how strong a guidance is."""


class Unguided:
    """The condition alone: one branch.

    Args:
        steps: of the sampler; None is the bench's.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.scale, self.steps = 1.0, _steps(steps)


class ClassifierFree:
    """Classifier-free guidance as the pipeline itself does it.

    Args:
        scale: w, above 1; None is the bench's ``guidance``.
        steps: of the sampler; None is the bench's.
    """

    def __init__(self, scale: float | None = None, steps: int | None = None) -> None:
        if scale is not None and not (isinstance(scale, (int, float)) and 1 < scale < math.inf):
            raise InputError("scale", scale, "a number above 1 (the part none is 1)")
        self.scale, self.steps = scale, _steps(steps)


class GuidanceBench(PipelineBench):
    """See the module's text."""

    id = "guidance"
    shape: Shape = "Sampler"
    headline: tuple[str, str] = ("frechet", "calls_used")
    knobs: Mapping[str, Knob] = {
        "steps": Knob(int, (20,), "calls of each branch; a sampler takes the most steps that fit", low=1, high=1000),
        **PipelineBench.knobs,
        "guidance": Knob(float, 3.0, "scale of contenders that name none, and of fidelity's reference", low=1.01),
        "fidelity": Knob(
            bool, True, "compare with classifier-free guidance from the same noise (one more run a seed)", sweep=False
        ),
        "score": Knob(
            str, None, "file.py:name, images (n, C, H, W) in [0, 1] and prompts or labels to scores (n,)", sweep=False
        ),
    }
    figures: Mapping[str, Figure] = {
        "frechet": Figure("", "lower", "quality", "Frechet distance to real images in the judge's features"),
        "accuracy": Figure("", "higher", "quality", "share of samples that show what was asked for"),
        "attribute_accuracy": Figure("", "higher", "quality", "share of the attributes asked for that samples show"),
        "score": Figure("", "higher", "quality", "mean of the scores of --score"),
        "precision": Figure("", "higher", "quality", "share of samples among the real images (3 neighbours)"),
        "recall": Figure("", "higher", "quality", "share of real images among the samples (3 neighbours)"),
        "kernel": Figure("", "lower", "quality", "unbiased cubic MMD² to real images in the judge's features"),
        "overshoot": Figure(
            "", "lower", "quality", "share of values beyond the range of images, before they are clipped"
        ),
        "saturation": Figure("", "neither", "info", "mean saturation of colours; of grey images mean contrast |x|"),
        "psnr": Figure("dB", "higher", "quality", "likeness to classifier-free guidance from the same noise"),
        "calls_used": Figure("calls", "lower", "cost", "rows of the network evaluated for a sample"),
        "seconds_per_sample": Figure("s", "lower", "cost", "seconds of sampling per sample"),
    }

    def headline_for(self, rows: Sequence[Row]) -> tuple[str, str]:
        """What reports of these rows lead with: the first of these figures that there is."""
        there = {name for row in rows for name in row.figures}
        found = [name for name in ("frechet", "score", "psnr", "overshoot") if name in there]
        return (found or ["frechet"])[0], "calls_used"

    # ---------------------------------------------------------------- contenders

    def baselines(self) -> list[str]:
        return ["none", "cfg:scale=1.5", "cfg:scale=3", "cfg:scale=7.5", "AdaptiveProjectedGuidance:guidance_scale=3"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "none": PartInfo(Unguided, "the condition alone", "pipe(..., guidance_scale=1.0)"),
            "cfg": PartInfo(
                ClassifierFree, "classifier-free guidance of the pipeline", "pipe(..., guidance_scale={scale=3.0})"
            ),
            **super().parts(),
        }

    def accepts(self, name: str) -> PartInfo | None:
        """Any scheduler class of diffusers, and its guiders of two branches."""
        return of_diffusers(name) or guider_of_diffusers(name)

    def check(self, s: Subject, setting: Setting) -> None:
        if s.kind == "points":
            raise InputError("subject", s.spec, "a pipeline of images with labels or prompts")
        if s.kind != "text" and (not s.classes or s.pipe.config.get("null_label") is None):
            wanted = "a pipeline with prompts, or with labels and a null label: this one has nothing to guide"
            raise InputError("subject", s.spec, wanted)
        if is_distilled(s.pipe.unet):
            wanted = "a pipeline with two branches: guidance is distilled into this one, there is nothing to guide"
            raise InputError("subject", s.spec, wanted)
        super().check(s, setting)
        if setting["score"] is not None:
            subjects.load_callable(setting["score"], "score")

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        h = super().host(s, setting, rng)
        h.guidance = 1.0
        return h

    def mount(self, h: Host, part: Part) -> None:
        info = self.parts().get(part.id)
        build = None if info is None else info.build
        guider = guider_of_diffusers(part.id)
        if build in (Unguided, ClassifierFree):
            h.parts.append(part)
            made = build(**checked_knobs(build, part))  # type: ignore[misc]
            if any(isinstance(m, Guidance) for m in h.installs) or h.scale is not None:
                raise InputError("methods", h.label, "a contender with one guidance")
            h.scale = h.guidance = h.setting["guidance"] if made.scale is None else made.scale
            h.steps = made.steps
        elif guider is not None:
            h.parts.append(part)
            try:
                with unannounced():
                    made = guider.build(**checked_knobs(guider.build, part))
            except (ValueError, TypeError, ImportError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError("methods", str(part), f"settings that {part.id} takes ({reason})") from error
            h.stack(StockGuidance(made))
        else:
            super().mount(h, part)
        if h.scale is not None and any(isinstance(m, Guidance) for m in h.installs):
            raise InputError("methods", h.label, "a contender with one guidance")

    # ---------------------------------------------------------------- trial

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, data = h.subject, self.data(h.subject, setting)
        asked = asked_for(s, data, setting, rng)
        figures: dict[str, float] = {}
        self.fit(h, rng, log)
        if h.real:
            images = stand_ins(s, data, asked, setting, rng)
        else:
            images, more = self.sampled(h, asked, rng, log)
            figures |= more
            if setting["fidelity"]:
                wanted = self.reference(h, setting["guidance"], asked, rng, log)
                values = psnr(images.clamp(-1, 1), wanted)
                log.per_item("psnr", values.tolist())
                figures["psnr"] = float(values.mean())
        figures["overshoot"] = float((images.abs() > 1).float().mean())
        images = images.clamp(-1, 1)
        figures["saturation"] = saturation(images)
        log.images("samples", ((images[:SHOWN] + 1) / 2).permute(0, 2, 3, 1).numpy())
        if setting["score"] is not None:
            figures["score"] = _scored(setting["score"], images, asked)
        if data is not None:
            figures |= image_metrics.feature_metrics(
                compared_with(data, asked, setting), image_metrics.features(data.judge, images)
            )
            if data.score is not None and asked is not None:
                figures |= data.score(images, asked)
        return figures

    def sampled(self, h: Host, asked: Any, rng: Streams, log: TrialLog) -> tuple[Tensor, dict[str, float]]:
        """Images of a contender, about in [-1, 1] (not clipped), and what they took."""
        scheduler = h.scheduler or type(h.pipe.scheduler).from_config(h.pipe.scheduler.config)
        steps = h.steps or h.setting["steps"]
        started = time.perf_counter()
        latents = sample(h, scheduler, most_steps(scheduler, steps), asked, rng, log, clamp=False)
        seconds = time.perf_counter() - started
        n = h.setting["samples"]
        figures = {"calls_used": h.evaluated / n, "seconds_per_sample": seconds / n}
        return decode(h.subject, latents, batch_size(h.subject, h.setting), clamp=False), figures

    def reference(self, h: Host, scale: float, asked: Any, rng: Streams, log: TrialLog) -> Tensor:
        """Images of classifier-free guidance with the contender's sampler, from the same noise."""
        s, setting = h.subject, h.setting
        scheduler = h.scheduler or h.pipe.scheduler
        key: tuple[Any, ...] = (
            "cfg",
            rng.base,
            scale,
            setting["steps"],
            setting["samples"],
            setting["prompts"],
            setting["labels"],
        )
        key = (*key, setting["batch"], type(scheduler).__name__, repr(sorted(dict(scheduler.config).items(), key=str)))
        if key not in s.traces:
            plain = Host(s, setting, s.pipe, scheduler=h.scheduler, guidance=scale)
            s.traces[key] = self.sampled(plain, asked, rng, log)[0].clamp(-1, 1)
        return s.traces[key]

    # ---------------------------------------------------------------- report

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = []
        for setting in comparison.settings:
            shown = {
                label: next(iter(arrays.values())) for label, arrays in comparison.saved("samples", **setting).items()
            }
            if shown:
                caption = "Each column starts from the same noise, with the same label or prompt."
                blocks.append(ImageGrid("Samples", shown, caption=caption, setting=setting))
        names = ("frechet", "accuracy", "attribute_accuracy", "score", "overshoot")
        for name in names:
            for setting in comparison.settings:
                lines = _strengths(comparison, setting, name)
                if lines:
                    blocks.append(
                        Curves(
                            f"{self.figures[name].help.capitalize()}, against the scale",
                            lines,
                            "scale",
                            name,
                            caption="One line for each kind of guidance; scales of different kinds differ in meaning.",
                            setting=setting,
                        )
                    )
        text = (
            "Calls are rows of the network: guidance with two branches takes two for each step and sample. Frechet "
            "distances between sets fall with the number of samples and never reach 0: compare with the part real."
        )
        return [*blocks, Note(text)]


# -------------------------------------------------------------------- pieces


def guider_of_diffusers(name: str) -> PartInfo | None:
    """The guider class of diffusers of that name that makes one of two branches; None for anything else."""
    if not name.endswith("Guidance") or not name.isidentifier():
        return None
    kind = getattr(diffusers, name, None)
    if not of_two_branches(kind):
        return None
    line = f"StockGuidance(diffusers.{name}({{knobs}})).install(pipe)"
    return PartInfo(kind, f"{name} of diffusers", line)


def psnr(images: Tensor, wanted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (N, C, H, W) in [-1, 1], in dB; at most 100."""
    error = (images - wanted).flatten(1).square().mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


def saturation(images: Tensor) -> float:
    """Mean saturation (max - min) / max of the colours of images (N, 3, H, W) in [-1, 1]; of grey ones mean |x|."""
    if images.shape[1] != 3:
        return float(images.abs().mean())
    values = (images + 1) / 2
    top, bottom = values.amax(1), values.amin(1)
    return float(((top - bottom) / top.clamp(min=1e-6)).mean())


def _scored(spec: str, images: Tensor, asked: Any) -> float:
    found = subjects.load_callable(spec, "score")((images + 1) / 2, asked)
    scores = torch.as_tensor(found).float()
    if scores.shape != (len(images),) or not bool(scores.isfinite().all()):
        raise TrialError(f"the scores of {spec} are {tuple(scores.shape)}, not {len(images)} finite numbers")
    return float(scores.mean())


def _strengths(comparison: Comparison, setting: Mapping[str, Any], name: str) -> dict[str, Line]:
    """A figure against the strength of the contenders that differ in nothing else."""
    families: dict[str, list[tuple[float, float]]] = {}
    for label in comparison.contenders:
        rows = [row for row in comparison.select(label, **setting) if name in row.figures]
        if not rows:
            continue
        strength, rest = None, []
        for part in rows[0].parts:
            own = dict(part["knobs"])
            for knob in STRENGTHS:
                strength = own.pop(knob, strength)
            rest.append(":".join([Path(part["id"]).name, *(f"{k}={v}" for k, v in own.items())]))
        if isinstance(strength, (int, float)):
            mean = float(np.mean([row.figures[name] for row in rows]))
            families.setdefault("+".join(rest), []).append((float(strength), mean))
    lines = {}
    for family, points in families.items():
        if len(points) > 1:
            x, y = zip(*sorted(points), strict=True)
            lines[family] = Line(x, y)
    return lines


def _steps(steps: int | None) -> int | None:
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError("steps", steps, "a whole number from 1")
    return steps
