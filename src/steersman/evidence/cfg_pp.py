"""CFG++'s claims, beside the control that tells what it changes: ordinary guidance at the mean of its scales.

A first-order CFG++ step is one of ordinary guidance with a scale omega_i of its own, so three comparisons differ:

- with ordinary guidance at the *same mean* of omega_i, only the shape of the schedule of scales differs;
- with ordinary guidance of the *same accuracy*, whatever scale that takes;
- in the *paper's pairing* (lambda 0.2, 0.6 and 1 with scales 2, 7.5 and 12.5 at 50 steps) the strengths differ, too:
  on the schedule of ``digits`` lambda = 0.6 is a mean of 4.6 at 50 steps, 2.0 at 20 and 1.2 at 10.

The *full strength* is that of lambda 0.6 at 50 steps, taken at 20 steps (``reference_steps=50``).

Inversion starts from held-out images, a part of them for each seed, and takes them back; what is compared is the image
that comes back. Editing swaps the class, or a colour word; restoring sees an image through a mask or at half its
resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.benches import _pipelines
from steersman.benches._pipelines import Host, PipelineBench, Subject
from steersman.benches.guidance import GuidanceBench, psnr
from steersman.diffusion.cfg_pp import (
    AveragePool,
    DDIMCFGPPScheduler,
    DPMSolver2SAncestralCFGPPScheduler,
    LinearOperator,
    Mask,
    edit,
    invert,
    mean_equivalent_scale,
    restore,
    sample,
)
from steersman.engine import contenders
from steersman.engine.bench import Figure, Knob, PartInfo, Setting, Shape, TrialLog
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError
from steersman.evidence.study import Study

TASKS = ("inversion", "edit", "inpainting", "super-resolution")


class Way:
    """How an image is inverted, edited or restored.

    Args:
        scale: lambda of CFG++, or the scale of ordinary guidance.
    """

    mode = "cfg++"

    def __init__(self, scale: float | None = None) -> None:
        self.scale = scale


class Ordinary(Way):
    """With ordinary guidance."""

    mode = "cfg"


class NegativePrompt(Way):
    """With the condition in both places."""

    mode = "npi"

    def __init__(self) -> None:
        super().__init__(None)


class RealImages(PipelineBench):
    """What comes of real images: inverted and taken back, edited, or restored from a part of what they show."""

    id = "real-images"
    shape: Shape = "Sampler"
    headline: tuple[str, str] = ("psnr", "calls_used")
    knobs: Mapping[str, Knob] = {
        "steps": Knob(int, (50,), "steps of DDIM", low=1, high=1000),
        **PipelineBench.knobs,
        "task": Knob(str, "inversion", "what is done with the images", choices=TASKS, sweep=False),
        "eta": Knob(float, 1.0, "step size of restoring", low=0, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "psnr": Figure("dB", "higher", "quality", "likeness to the image"),
        "background": Figure(
            "dB", "higher", "quality", "likeness to the image where it shows background, after editing"
        ),
        "accuracy": Figure("", "higher", "quality", "share of images that show what was asked for"),
        "attribute_accuracy": Figure("", "higher", "quality", "share of the attributes asked for that images show"),
        "residual": Figure("", "lower", "quality", "root mean square misfit of the measurement"),
        "calls_used": Figure("calls", "lower", "cost", "rows of the network evaluated for an image"),
    }

    def baselines(self) -> list[str]:
        return ["cfg:scale=3"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "cfg-pp": PartInfo(Way, "CFG++"),
            "cfg": PartInfo(Ordinary, "ordinary guidance"),
            "npi": PartInfo(NegativePrompt, "negative-prompt inversion"),
        }

    def mount(self, h: Host, part: Part) -> None:
        info = self.parts().get(part.id)
        if info is None or h.parts:
            raise InputError("methods", str(part), f"one of {', '.join(self.parts())}")
        h.parts.append(part)
        h.installs.append(info.build(**checked_knobs(info.build, part)))

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, way, data = h.subject, h.installs[0], self.data(h.subject, setting)
        assert data is not None and data.score is not None
        rows = torch.randperm(len(data.images), generator=rng.torch("images"))[: setting["samples"]]
        images = data.images[rows]
        asked: Any
        if isinstance(data.labels, Tensor):
            inputs, asked = "labels", data.labels[rows]
        else:
            inputs, asked = "prompt", [data.labels[i] for i in rows.tolist()]
        shown: dict[str, Any] = {inputs: asked}
        ways: dict[str, Any] = {"mode": way.mode, "scale": way.scale, "num_inference_steps": setting["steps"]}
        task, figures = setting["task"], {}
        counter = _Rows(s)
        with counter:
            if task == "inversion":
                found = sample(s.pipe, invert(s.pipe, images, **ways, **shown), **ways, **shown)
            elif task == "edit":
                target = other(asked, rng)
                found = edit(s.pipe, images, shown, {inputs: target}, **ways)
                asked = target
            else:
                if way.mode == "npi":
                    raise Inapplicable("negative-prompt inversion restores nothing")
                A = _operator(task, images, rng)
                y, start = A(images), _pipelines.shared_noise(s, len(images), rng)
                found = restore(s.pipe, y, A, eta=setting["eta"], latents=start, **ways, **shown)
                figures["residual"] = float((A(found.float().cpu()) - y).square().mean().sqrt())
        figures["calls_used"] = counter.rows / len(images)
        found = found.float().cpu().clamp(-1, 1)
        if not bool(found.isfinite().all()):
            found = found.nan_to_num()
        values = psnr(found, images)
        log.per_item("psnr", values.tolist())
        log.images("images", ((found[:12] + 1) / 2).permute(0, 2, 3, 1).numpy())
        figures["psnr"] = float(values.mean())
        if task == "edit" and s.kind == "text":
            figures["background"] = float(_background(found, images).mean())
        return figures | data.score(found, asked)

    def exhibits(self, comparison: Comparison) -> list[Any]:
        return []


class _Rows:
    """Counts rows of the network's input."""

    def __init__(self, s: Subject) -> None:
        self.network, self.rows = s.network, 0

    def __enter__(self) -> None:
        def count(module: Any, args: Any, kwargs: Any) -> None:
            self.rows += len(args[0] if args else kwargs["sample"])

        self.hook = self.network.register_forward_pre_hook(count, with_kwargs=True)

    def __exit__(self, *failure: object) -> None:
        self.hook.remove()


def other(asked: Any, rng: Streams) -> Any:
    """Other classes, or captions with another colour word (neither the shape's nor the background's)."""
    draws = torch.randint(1, 10**6, (len(asked),), generator=rng.torch("targets"))
    if isinstance(asked, Tensor):
        return (asked + 1 + draws % 9) % 10
    from steersman.reference import scenes

    said = scenes.parse(asked)
    for row, draw in zip(said, draws.tolist(), strict=True):
        free = [k for k in range(len(scenes.COLOURS)) if k not in (int(row[1]), int(row[4]))]
        row[1] = free[draw % len(free)]
    return [scenes.caption(row) for row in said]


def _operator(task: str, images: Tensor, rng: Streams) -> LinearOperator:
    if task == "super-resolution":
        return AveragePool(2)
    H, W = images.shape[-2:]
    mask = torch.ones(H, W)
    mask[H // 4 : 3 * H // 4, W // 4 : 3 * W // 4] = 0.0  # a quarter, in the middle
    return Mask(mask)


def _background(found: Tensor, images: Tensor) -> Tensor:
    """PSNR of each image over the pixels near the median of its frame."""
    frame = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    back = frame.median(2).values[:, :, None, None]
    mask = ((images - back).abs().amax(1, keepdim=True) < 0.3).float()
    error = ((found - images).square() * mask).flatten(1).sum(1) / (3 * mask.flatten(1).sum(1)).clamp(min=1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


class Solvers(GuidanceBench):
    """The guidance bench with the one solver that no scheduler of another method stands for."""

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            **super().parts(),
            "dpm-2s": PartInfo(DPMSolver2SAncestralCFGPPScheduler, "DPM-Solver++(2S), ancestral"),
        }


# -------------------------------------------------------------------- studies


def named(text: str) -> str:
    """A contender's label, as rows have it."""
    return contenders.parse(text).label


def equal_mean(scale: float, steps: int) -> str:
    """Ordinary guidance at the mean of CFG++'s scales on ``digits``."""
    scheduler = DDIMCFGPPScheduler()
    scheduler.set_timesteps(steps)
    return named(f"cfg:scale={mean_equivalent_scale(scale, scheduler):.4g}")


PAIRS = {0.1: 1.5, 0.2: 2.0, 0.4: 5.0, 0.6: 7.5, 0.8: 9.0, 1.0: 12.5}
"""Lambda and the scale that the paper pairs with it; the first is ours."""
TWO, SIX, ONE, SEVEN = map(named, ("cfg-pp:scale=0.2", "cfg-pp:scale=0.6", "cfg-pp:scale=1.0", "cfg:scale=7.5"))
SIX_OF_FIFTY = named("cfg-pp:scale=0.6:reference_steps=50")
FRONTIER = ("none", *(f"cfg:scale={w:g}" for w in (1.5, 2, 3, 5, 7.5)))
MEAN_OF = {SIX: equal_mean(0.6, 20), ONE: equal_mean(1.0, 20), SIX_OF_FIFTY: equal_mean(0.6, 50)}
"""At 20 steps."""


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Quality against strength, inversion; at full scale 50 steps, editing, restoring, all solvers, and ``scenes``."""
    full = scale != "quick"
    n = 256 if full else 96
    guided = {"samples": n, "fidelity": False}
    bench, images = GuidanceBench(), RealImages()
    found = {
        "strength": Study(
            bench, (*FRONTIER, SIX, ONE, SIX_OF_FIFTY, *MEAN_OF.values()), "digits", guided | {"steps": [20]}
        )
    }
    count = {"samples": 100 if full else 24}
    for steps in (10, 50):
        lambdas = tuple(PAIRS) if full else (0.2, 0.6)
        means = [equal_mean(v, steps) for v in lambdas]
        # Where the mean is below 1 there is no ordinary guidance to compare with.
        means = [c for c in means if float(c.partition("=")[2]) > 1.01]
        contended = [f"cfg-pp:scale={v:g}" for v in lambdas] + [f"cfg:scale={PAIRS[v]:g}" for v in lambdas]
        found[f"inversion-{steps}"] = Study(
            images, tuple(dict.fromkeys((*contended, *means, "npi"))), "digits", count | {"steps": [steps]}
        )
    if not full:
        return found
    pairs = [f"cfg-pp:scale={v:g}" for v in PAIRS] + [f"cfg:scale={w:g}" for w in PAIRS.values()]
    means = [equal_mean(v, 50) for v in PAIRS if v > 0.1]
    found["strength-50"] = Study(
        bench, tuple(dict.fromkeys((*FRONTIER, *pairs, *means))), "digits", guided | {"steps": [50]}
    )
    M = "DPMSolverMultistepScheduler"
    solvers = ("ddim", "EulerAncestralDiscreteScheduler", "dpm-2s", M, f"{M}:solver_order=1")
    found["solvers"] = Study(
        Solvers(),
        (*(f"cfg-pp:scale=0.6+{s}" for s in solvers), f"cfg-pp:scale=0.6:history=mixed+{M}"),
        "digits",
        guided | {"steps": [10, 20]},
    )
    ways = (SIX, "cfg-pp:scale=0.2", "cfg:scale=1.5", "cfg:scale=3", "cfg:scale=7.5")
    for task in ("edit", "inpainting", "super-resolution"):
        found[f"digits-{task}"] = Study(images, ways, "digits", count | {"steps": [50], "task": task})
    scenes = {"samples": 24, "steps": [20]}
    for task in ("inversion", "edit", "inpainting"):
        found[f"scenes-{task}"] = Study(images, ways, "scenes", scenes | {"task": task})
    found["scenes-strength"] = Study(
        bench,
        ("none", "cfg:scale=2", "cfg:scale=4", SEVEN, SIX),
        "scenes",
        guided | {"samples": 120, "steps": [20]},
    )
    return found


# -------------------------------------------------------------------- claims


def less(figure: str, ours: str, theirs: str, steps: int) -> Callable[[Comparison], Effects]:
    """Their figure less ours."""

    def effects(c: Comparison) -> Effects:
        a, b = c.paired(figure, ours, theirs, steps=steps)
        return Effects(b - a)

    return effects


def more(figure: str, ours: str, theirs: str, steps: int) -> Callable[[Comparison], Effects]:
    """Our figure less theirs."""

    def effects(c: Comparison) -> Effects:
        a, b = c.paired(figure, ours, theirs, steps=steps)
        return Effects(a - b)

    return effects


def smaller(figure: str, ours: str, theirs: str, steps: int) -> Callable[[Comparison], Effects]:
    """log of their figure over ours."""

    def effects(c: Comparison) -> Effects:
        a, b = c.paired(figure, ours, theirs, steps=steps)
        return Effects(np.log(b / a))

    return effects


def frontier(ours: str, steps: int) -> Callable[[Comparison], Effects]:
    """log of the least Frechet distance of ordinary guidance that is as accurate (or the most accurate) over ours."""

    def effects(c: Comparison) -> Effects:
        rivals = [label for label in c.contenders if label == "none" or label.startswith("cfg:")]
        values: dict[str, list[dict[int, float]]] = {
            label: [c.values(figure, label, steps=steps) for figure in ("accuracy", "frechet")]
            for label in (ours, *rivals)
        }
        effects = []
        for seed in sorted(values[ours][0]):
            accuracy = {label: values[label][0][seed] for label in rivals}
            enough = min(values[ours][0][seed], max(accuracy.values()))
            best = min(values[label][1][seed] for label in rivals if accuracy[label] >= enough)
            effects.append(math.log(best / values[ours][1][seed]))
        return Effects(np.array(effects))

    return effects


TEXT, INVERSION = "experiments: text to image", "experiments: DDIM inversion"
SHAPE = "asked here: only the shape of the schedule of scales differs"
PAIRED = "the paper's pairing of lambda with a scale"
CLAIMS = [
    Claim(
        "frontier",
        "At lambda 0.6, 20 steps, no ordinary guidance that is as accurate has a Frechet distance more than 5% below.",
        TEXT,
        "strength",
        frontier(SIX, 20),
        -math.log(1.05),
    ),
    Claim(
        "frontier-full",
        "At full strength no ordinary guidance that is as accurate has a Frechet distance more than 5% below.",
        TEXT,
        "strength",
        frontier(SIX_OF_FIFTY, 20),
        -math.log(1.05),
    ),
    Claim(
        "shape-frechet",
        "At full strength its Frechet distance is below that of ordinary guidance at the mean of its scales.",
        SHAPE,
        "strength",
        smaller("frechet", SIX_OF_FIFTY, MEAN_OF[SIX_OF_FIFTY], 20),
    ),
    Claim(
        "shape-overshoot",
        "At full strength fewer values leave the images' range than under ordinary guidance at the mean of its scales.",
        SHAPE,
        "strength",
        less("overshoot", SIX_OF_FIFTY, MEAN_OF[SIX_OF_FIFTY], 20),
    ),
    Claim(
        "shape-saturation",
        "At full strength its images are less saturated than those of ordinary guidance at the mean of its scales.",
        "introduction: saturation",
        "strength",
        less("saturation", SIX_OF_FIFTY, MEAN_OF[SIX_OF_FIFTY], 20),
    ),
    Claim(
        "shape-accuracy",
        "At full strength it is at most 0.02 less accurate than ordinary guidance at the mean of its scales.",
        SHAPE,
        "strength",
        more("accuracy", SIX_OF_FIFTY, MEAN_OF[SIX_OF_FIFTY], 20),
        -0.02,
    ),
    Claim(
        "inversion-shape",
        "At 50 steps, lambda 0.6, images come back from inversion better than with ordinary guidance at the same mean.",
        SHAPE,
        "inversion-50",
        more("psnr", SIX, equal_mean(0.6, 50), 50),
    ),
    Claim(
        "inversion-shape-10",
        "At 10 steps, lambda 0.6, images come back from inversion better than with ordinary guidance at the same mean.",
        SHAPE,
        "inversion-10",
        more("psnr", SIX, equal_mean(0.6, 10), 10),
    ),
    Claim(
        "inversion-pair",
        "At 50 steps and lambda 0.6 images come back more than 1 dB better than with the paired scale 7.5.",
        f"{INVERSION}; {PAIRED}",
        "inversion-50",
        more("psnr", SIX, SEVEN, 50),
        1.0,
    ),
    Claim(
        "inversion-pair-10",
        "At 10 steps and lambda 0.6 images come back more than 1 dB better than with the paired scale 7.5.",
        f"{INVERSION}; {PAIRED}",
        "inversion-10",
        more("psnr", SIX, SEVEN, 10),
        1.0,
    ),
    Claim(
        "inversion-flat",
        "At 50 steps images come back at lambda 0.6 at most 3 dB worse than at 0.2.",
        f"{INVERSION}: its error does not grow with the scale",
        "inversion-50",
        more("psnr", SIX, TWO, 50),
        -3.0,
    ),
    Claim(
        "inversion-flat-10",
        "At 10 steps images come back at lambda 0.6 at most 3 dB worse than at 0.2.",
        f"{INVERSION}: its error does not grow with the scale",
        "inversion-10",
        more("psnr", SIX, TWO, 10),
        -3.0,
    ),
    Claim(
        "pair-50",
        "At 50 steps and lambda 0.6 its Frechet distance is below that of the paired scale 7.5.",
        f"{TEXT}; {PAIRED}",
        "strength-50",
        smaller("frechet", SIX, SEVEN, 50),
        scales=("full",),
    ),
    Claim(
        "edit-background",
        "Where a colour word is swapped the background stays over 1 dB nearer at lambda 0.6 than with scale 7.5.",
        "experiments: editing",
        "scenes-edit",
        more("background", SIX, SEVEN, 20),
        1.0,
        scales=("full",),
    ),
    Claim(
        "inpainting",
        "A digit whose middle is hidden is restored better, in dB, at lambda 0.6 than with scale 7.5.",
        "experiments: inverse problems",
        "digits-inpainting",
        more("psnr", SIX, SEVEN, 50),
        scales=("full",),
    ),
    Claim(
        "super-resolution",
        "A digit at half its resolution is restored better, in dB, at lambda 0.6 than with scale 7.5.",
        "experiments: inverse problems",
        "digits-super-resolution",
        more("psnr", SIX, SEVEN, 50),
        scales=("full",),
    ),
]
