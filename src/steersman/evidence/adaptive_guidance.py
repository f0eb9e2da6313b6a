"""Adaptive guidance's claims, beside the cuts that don't look: what does the similarity test itself add?

Likeness to the images of plain guidance from the same noise flatters every method that only leaves calls out late in
the same run: it shares the grid of times, which guidance with fewer steps does not. So beside the adaptive cut stand

- a *static* cut at the same mean number of calls, to the row (one step for all samples; where the mean lies between two
  steps, as many samples drawn at random take the later one as it needs), and
- a *shuffled* cut: the adaptive cut's own numbers of guided steps, dealt out to other samples.

A mean of decibels is ruled by images that come out equal, which count as 100 dB. So two of the claims are put to
``likeness`` as well, the decibels of the mean squared error of all samples.

Threshold and ``min_steps`` are calibrated anew for each seed, with other noise (and on ``scenes`` other captions) than
they are measured on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steersman.benches._pipelines import Host, asked_for
from steersman.benches.guidance import GuidanceBench
from steersman.diffusion.adaptive_guidance import AdaptiveGuidance, GuidancePolicy, apply
from steersman.diffusion.adaptive_guidance.calibration import likeness, structural_similarity
from steersman.diffusion.adaptive_guidance.guidance import guided
from steersman.diffusion.guidance import Guidance, Moment
from steersman.engine import subjects
from steersman.engine.bench import Figure, PartInfo, Setting, TrialLog
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.contenders import parse as parse_contender
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.evidence.study import Study


class Calibrated:
    """The part ``adaptive-guidance``: a threshold that each seed calibrates, or a cut of the same cost.

    Args:
        scale: of the guidance.
        saving: share of the calls that is asked for.
        cut: adaptive, or static or shuffled at the same mean number of calls.
    """

    def __init__(
        self, scale: float = 3.0, saving: float = 0.25, cut: Literal["adaptive", "static", "shuffled"] = "adaptive"
    ) -> None:
        self.scale, self.saving, self.cut = scale, saving, cut


class Policy:
    """The part ``policy``: guidance in some steps, whatever the sample.

    Args:
        scale: of the guidance.
        guided: steps with guidance.
        kind: the first, the last, or a part drawn at random by each seed.
    """

    def __init__(
        self, scale: float = 3.0, guided: int = 10, kind: Literal["early", "late", "random"] = "early"
    ) -> None:
        self.scale, self.guided, self.kind = scale, guided, kind

    def made(self, steps: int, rng: Streams) -> GuidancePolicy:
        if self.kind == "random":
            return GuidancePolicy.random(self.scale, steps, self.guided, rng.torch("policy"))
        start = 0 if self.kind == "early" else steps - self.guided
        return GuidancePolicy.interval(self.scale, steps, start, start + self.guided)


class Noted(AdaptiveGuidance):
    """Adaptive guidance that keeps the guided steps of all its runs."""

    def begin(self, moment: Moment) -> None:
        super().begin(moment)
        self.counts = getattr(self, "counts", [])
        self.counts.append(torch.zeros(0))

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        made = super().guide(cond, uncond, moment)
        assert self.guided_steps is not None
        self.counts[-1] = self.guided_steps.cpu()
        return made


class Cuts(Guidance):
    """Guidance for a given number of steps of each sample, over the batches of a trial.

    Args:
        scale: of the guidance.
        counts: guided steps, (n,), in the samples' order.
    """

    rowwise = True

    def __init__(self, scale: float, counts: Tensor) -> None:
        super().__init__()
        self.scale, self.counts, self.next = scale, counts, 0

    def begin(self, moment: Moment) -> None:
        assert moment.x is not None
        self.rows = self.counts[self.next : self.next + len(moment.x)]
        self.next += len(moment.x)

    def needs_uncond(self, moment: Moment) -> Tensor:
        return self.rows > moment.i

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        if uncond is None:
            return cond
        live = (self.rows > moment.i).to(cond.device).reshape(-1, *[1] * (cond.ndim - 1))
        return torch.where(live, guided(cond, uncond, self.scale), cond)


class CutsBench(GuidanceBench):
    """The guidance bench, with cuts that each seed calibrates and cuts of the same cost that don't look."""

    own: Host | None = None
    figures: Mapping[str, Figure] = {
        **GuidanceBench.figures,
        "ssim": Figure("", "higher", "quality", "structural similarity to plain guidance from the same noise"),
        "likeness": Figure("dB", "higher", "quality", "likeness to plain guidance by all samples' mean squared error"),
        "threshold": Figure("", "neither", "info", "threshold that was calibrated"),
        "min_steps": Figure("steps", "neither", "info", "guided steps before the test, as calibrated"),
        "similarity_first": Figure("", "neither", "info", "median similarity at the first step of the calibration"),
        "similarity_lowest": Figure("", "neither", "info", "lowest median similarity of a step of the calibration"),
        "similarity_last": Figure("", "neither", "info", "median similarity at the last step of the calibration"),
        "guided_spread": Figure("steps", "neither", "info", "standard deviation of the samples' guided steps"),
        "guided_early": Figure("", "neither", "info", "share of a policy's guided steps that lie in its first half"),
    }

    def parts(self) -> Mapping[str, PartInfo]:
        return {**super().parts(), "policy": PartInfo(Policy, "guidance in some steps, for all samples alike")}

    def mount(self, h: Host, part: Part) -> None:
        own = part.id == "adaptive-guidance" and "mode" not in part.knobs
        if not own and part.id != "policy":
            super().mount(h, part)
            return
        h.parts.append(part)
        kind: Any = Calibrated if own else Policy
        h.installs.append(kind(**checked_knobs(kind, part)))

    def fit(self, h: Host, rng: Streams, log: TrialLog) -> None:
        holder = next((m for m in h.installs if isinstance(m, (Calibrated, Policy))), None)
        if holder is None:
            super().fit(h, rng, log)
        elif isinstance(holder, Policy):
            h.installs[h.installs.index(holder)] = holder.made(h.setting["steps"], rng)
        else:
            h.installs[h.installs.index(holder)] = self.calibrated(h, holder, rng, log)

    def calibrated(self, h: Host, holder: Calibrated, rng: Streams, log: TrialLog) -> Guidance:
        guidance = _noted(self.folder(h, holder, rng, log))
        if holder.cut == "adaptive":
            return guidance
        counts = self.counts(h, holder, rng, log)
        if holder.cut == "shuffled":
            return Cuts(guidance.scale, counts[torch.randperm(len(counts), generator=rng.torch("shuffle"))])
        low = int(counts.sum()) // len(counts)
        later = torch.randperm(len(counts), generator=rng.torch("static"))[: int(counts.sum()) - low * len(counts)]
        static = torch.full_like(counts, low)
        static[later] += 1
        return Cuts(guidance.scale, static)

    def folder(self, h: Host, holder: Calibrated, rng: Streams, log: TrialLog) -> Path:
        """What calibration made, once a seed."""
        found = subjects.resolve(h.subject.spec)
        settings: dict[str, Any] = {"scale": holder.scale, "saving": holder.saving, "steps": h.setting["steps"]}
        if found.kind != "reference" or found.path is None:
            raise InputError("subject", h.subject.spec, "a reference subject")

        path = found.path

        def make(folder: Path) -> None:
            with TemporaryDirectory() as temporary:
                images = subjects.write_images(found, Path(temporary))
                apply(path, images, folder, seed=rng.seed("fit") % 2**31, **settings)

        return log.fits.get({"method": "adaptive-guidance", "settings": settings, "seed": rng.base}, make)

    def counts(self, h: Host, holder: Calibrated, rng: Streams, log: TrialLog) -> Tensor:
        """Guided steps of each sample under the adaptive cut, (n,), int64."""
        key = _key(holder, h.setting, rng)
        if key not in h.subject.traces:
            guidance = _noted(self.folder(h, holder, rng, log))
            alone = Host(h.subject, h.setting, h.subject.pipe, scheduler=h.scheduler, installs=[guidance])
            asked = asked_for(h.subject, self.data(h.subject, h.setting), h.setting, rng)
            super().sampled(alone, asked, rng, log)
            h.subject.traces[key] = torch.cat(guidance.counts)
        return h.subject.traces[key]

    def sampled(self, h: Host, asked: Any, rng: Streams, log: TrialLog) -> tuple[Tensor, dict[str, float]]:
        images, figures = super().sampled(h, asked, rng, log)
        if h is self.own:  # neither the reference nor a run for its counts
            wanted = self.reference(h, h.setting["guidance"], asked, rng, log)
            figures |= alike(images, wanted)
        return images, figures

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        holder = next((m for m in h.installs if isinstance(m, Calibrated)), None)
        self.own = h
        figures = super().trial(h, setting, rng, log)
        method = h.installs[0] if h.installs else None
        if isinstance(method, GuidancePolicy):
            dear = [s not in (0.0, 1.0) for s in method.scales]
            figures["guided_early"] = sum(dear[: len(dear) // 2]) / max(sum(dear), 1)
        if holder is not None and isinstance(method, Noted):
            counts = h.subject.traces[_key(holder, setting, rng)] = torch.cat(method.counts)
            figures["guided_spread"] = float(counts.double().std())
            made = json.loads((self.folder(h, holder, rng, log) / "made.json").read_text())
            figures |= {"threshold": made["threshold"], "min_steps": made["min_steps"]}
            for name in ("first", "lowest", "last"):
                figures[f"similarity_{name}"] = made[f"median_similarity_{name}"]
        return figures


def alike(images: Tensor, wanted: Tensor) -> dict[str, float]:
    """How like images in [-1, 1] are to others."""
    pair = [(x.clamp(-1, 1) + 1) / 2 for x in (images, wanted)]
    return {"ssim": structural_similarity(*pair), "likeness": likeness(*pair)}


def _key(holder: Calibrated, setting: Setting, rng: Streams) -> tuple[Any, ...]:
    """Of the samples' guided steps among a subject's traces."""
    return ("guided", rng.base, holder.scale, holder.saving, *(setting[k] for k in ("steps", "samples", "batch")))


def _noted(folder: Path) -> Noted:
    made = AdaptiveGuidance.from_pretrained(folder)
    return Noted(made.scale, made.threshold, made.min_steps)


# -------------------------------------------------------------------- studies


def named(text: str) -> str:
    """A contender's label, as rows have it."""
    return parse_contender(text).label


def contenders(scale: float) -> dict[str, str]:
    """The contenders of one scale, by what they are called here; 20 steps, so plain guidance takes 40 rows."""
    s = f":scale={scale:g}"
    return {
        "cfg": f"cfg{s}",
        "adaptive": f"adaptive-guidance{s}",
        "static": f"adaptive-guidance{s}:cut=static",
        "shuffled": f"adaptive-guidance{s}:cut=shuffled",
        "fewer": f"cfg{s}:steps=15",
        "linear": f"adaptive-guidance{s}:mode=linear",
        "linear-static": f"policy{s}:guided=5",
        "linear-fewer": f"cfg{s}:steps=13",
    }


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Digits at scale 3; at full scale scenes, more scales, the sweep of savings, and searched and random policies."""
    bench, full = CutsBench(), scale != "quick"
    digits = {"steps": [20], "samples": 500 if full else 200, "guidance": 3.0}
    found = {"digits": Study(bench, tuple(contenders(3.0).values()), "digits", digits)}
    if full:
        for s in (3.0, 7.5):
            grid = {"steps": [20], "samples": 120, "guidance": s}
            found[f"scenes-w{s:g}"] = Study(bench, tuple(contenders(s).values()), "scenes", grid)
        for s in (5.0, 7.5):
            found[f"digits-w{s:g}"] = Study(bench, tuple(contenders(s).values()), "digits", digits | {"guidance": s})
        sweep = tuple(
            f"adaptive-guidance:scale=3:saving={share:g}{cut}"
            for share in (0.1, 0.2, 0.3, 0.4)
            for cut in ("", ":cut=static")
        )
        fewer = tuple(f"cfg:scale=3:steps={n}" for n in (18, 16, 14, 12))
        found["savings"] = Study(bench, (*sweep, *fewer), "digits", digits)
        found["search"] = Study(bench, SEARCH, "digits", digits)
    return found


SEARCHED = "adaptive-guidance:mode=search:scale=3:count=32:batch=8"
SEARCH = (SEARCHED, "policy:guided=10", "policy:guided=10:kind=late", "policy:guided=10:kind=random")


# -------------------------------------------------------------------- claims


def more(figure: str, a: str, b: str, scale: float = 3.0) -> Callable[[Comparison], Effects]:
    """a's figure less b's, seed by seed."""

    def effects(c: Comparison) -> Effects:
        names = contenders(scale)
        ours, theirs = c.paired(figure, named(names[a]), named(names[b]), steps=20)
        return Effects(ours - theirs)

    return effects


def frechet_kept(c: Comparison) -> Effects:
    """log of plain guidance's Frechet distance over the adaptive cut's."""
    names = contenders(3.0)
    ours, theirs = c.paired("frechet", named(names["adaptive"]), named(names["cfg"]), steps=20)
    return Effects(np.log(theirs / ours))


def saved(c: Comparison) -> Effects:
    """The share of plain guidance's calls that the adaptive cut saves."""
    names = contenders(3.0)
    ours, theirs = c.paired("calls_used", named(names["adaptive"]), named(names["cfg"]), steps=20)
    return Effects(1 - ours / theirs)


def of_policies(figure: str, a: str, b: str | None = None) -> Callable[[Comparison], Effects]:
    def effects(c: Comparison) -> Effects:
        if b is None:
            values = c.values(figure, named(a), steps=20)
            return Effects(np.array([values[seed] for seed in sorted(values)]))
        ours, theirs = c.paired(figure, named(a), named(b), steps=20)
        return Effects(ours - theirs)

    return effects


PAPER, HERE, LARGE = "abstract", "asked here, not by the paper", ("full", "gpu")


def of_scenes(scale: float) -> list[Claim]:
    study, w = f"scenes-w{scale:g}", f"scenes, scale {scale:g}"
    return [
        Claim(
            f"{study}-fewer-steps",
            f"Saving a quarter, its images are 5 dB nearer to guidance than those of 15 steps ({w}).",
            PAPER,
            study,
            more("psnr", "adaptive", "fewer", scale),
            5.0,
            scales=LARGE,
        ),
        Claim(
            f"{study}-static",
            f"Saving a quarter, its images are nearer to guidance than those of a static cut of equal calls ({w}).",
            HERE,
            study,
            more("psnr", "adaptive", "static", scale),
            scales=LARGE,
        ),
        Claim(
            f"{study}-fewer-steps-pooled",
            f"The same by the squared error of all samples: 5 dB nearer than 15 steps ({w}).",
            PAPER,
            study,
            more("likeness", "adaptive", "fewer", scale),
            5.0,
            scales=LARGE,
        ),
        Claim(
            f"{study}-static-pooled",
            f"The same by the squared error of all samples: nearer than a static cut of equal calls ({w}).",
            HERE,
            study,
            more("likeness", "adaptive", "static", scale),
            scales=LARGE,
        ),
        Claim(
            f"{study}-accuracy",
            f"Saving a quarter, it shows what was asked for as often as guidance, within a point ({w}).",
            PAPER,
            study,
            more("accuracy", "adaptive", "cfg", scale),
            -0.01,
            scales=LARGE,
        ),
        Claim(
            f"{study}-linear-fewer-steps",
            f"LinearAG's images, of 25 calls, are nearer to guidance than those of 13 steps, of 26 ({w}).",
            PAPER,
            study,
            more("psnr", "linear", "linear-fewer", scale),
            scales=LARGE,
        ),
    ]


CLAIMS = [
    Claim(
        "saving",
        "A threshold calibrated for a quarter on other noise saves more than a fifth of the calls.",
        PAPER,
        "digits",
        saved,
        0.2,
    ),
    Claim(
        "fewer-steps",
        "Saving a quarter, its images are 5 dB nearer to guidance of 20 steps than those of guidance of 15 steps.",
        PAPER,
        "digits",
        more("psnr", "adaptive", "fewer"),
        5.0,
    ),
    Claim(
        "static",
        "Saving a quarter, its images are nearer to guidance than those of a static cut of equal calls.",
        HERE,
        "digits",
        more("psnr", "adaptive", "static"),
    ),
    Claim(
        "shuffled",
        "Its images are nearer to guidance than with its own cuts dealt out to other samples.",
        HERE,
        "digits",
        more("psnr", "adaptive", "shuffled"),
    ),
    Claim(
        "fewer-steps-pooled",
        "The same by the squared error of all samples: 5 dB nearer than 15 steps.",
        PAPER,
        "digits",
        more("likeness", "adaptive", "fewer"),
        5.0,
    ),
    Claim(
        "static-pooled",
        "The same by the squared error of all samples: nearer than a static cut of equal calls.",
        HERE,
        "digits",
        more("likeness", "adaptive", "static"),
    ),
    Claim(
        "accuracy",
        "Saving a quarter, it shows the class that was asked for as often as guidance, within a point.",
        PAPER,
        "digits",
        more("accuracy", "adaptive", "cfg"),
        -0.01,
    ),
    Claim(
        "frechet",
        "Saving a quarter, its Frechet distance is at most 5% above that of guidance.",
        PAPER,
        "digits",
        frechet_kept,
        -0.05,
    ),
    Claim(
        "linear-fidelity",
        "LinearAG, which takes fewer calls, is less like guidance than the adaptive cut.",
        "abstract (visible deviation)",
        "digits",
        more("psnr", "adaptive", "linear"),
    ),
    Claim(
        "linear-fewer-steps",
        "LinearAG's images, of 25 calls, are nearer to guidance than those of 13 steps, of 26.",
        PAPER,
        "digits",
        more("psnr", "linear", "linear-fewer"),
    ),
    Claim(
        "linear-static",
        "LinearAG's images are nearer to guidance than those of a static cut of equal calls.",
        HERE,
        "digits",
        more("psnr", "linear", "linear-static"),
    ),
    *of_scenes(3.0),
    *of_scenes(7.5),
    Claim(
        "search-random",
        "The searched policy's images are nearer to guidance than those of random policies of equal cost.",
        "section on the policy search",
        "search",
        of_policies("psnr", SEARCHED, SEARCH[3]),
        scales=LARGE,
    ),
    Claim(
        "search-early",
        "The searched policy has most of its guided steps in the first half.",
        "section on the policy search",
        "search",
        of_policies("guided_early", SEARCHED),
        0.5,
        scales=LARGE,
    ),
    Claim(
        "early-late",
        "Guidance in the first half of the steps is nearer to guidance throughout than guidance in the last half.",
        "section on the policy search",
        "search",
        of_policies("psnr", SEARCH[1], SEARCH[2]),
        scales=LARGE,
    ),
]
