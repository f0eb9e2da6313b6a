"""AGD's claims, beside what costs the same: classifier-free guidance with half the steps, and other distillations.

Contenders start from the same noise. ``cfg`` with all steps is what adapters imitate, at twice the calls; with half the
steps it takes as many calls as they do, and needs no training. ``data=diffusion`` trains the same adapters on as many
pairs with the same law of the scale, at noised training images in place of guided trajectories. At full scale ``lora``
and ``full`` train low-rank weights and all weights on the same data, both with the scale in the time embedding.

``missed`` is the share of guidance's correction that adapters miss along their *own* trajectories; on those of the
teacher, training on trajectories would win by construction. A unit is a fit: noise, scales, weights and batches are new
in each. On ``digits`` the network obeys its labels without guidance, so accuracy says nothing there: the claim about
accuracy is made on ``scenes``. Nor does its Frechet distance fall with guidance: it rises with the scale, so that
guidance which is too weak passes for good. Read ``frechet`` beside ``missed``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from steersman.benches._pipelines import Host
from steersman.benches.guidance import GuidanceBench
from steersman.diffusion.agd import AGD, missed_guidance
from steersman.engine import contenders
from steersman.engine.bench import Figure, TrialLog
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.engine.streams import Streams
from steersman.evidence.study import Study

MEASURED = 32
"""Samples of ``missed``."""


class Distillation(GuidanceBench):
    """The guidance bench, and what adapters miss."""

    figures: Mapping[str, Figure] = {
        **GuidanceBench.figures,
        "missed": Figure("", "lower", "quality", "share of guidance's correction missed along own trajectories"),
        "trainable": Figure("", "lower", "cost", "trained numbers, as a share of the network's"),
    }

    def sampled(self, h: Host, asked: Any, rng: Streams, log: TrialLog) -> tuple[Tensor, dict[str, float]]:
        images, figures = super().sampled(h, asked, rng, log)
        for method in h.installs:
            if isinstance(method, AGD):
                figures["missed"] = missed_guidance(
                    h.pipe,
                    method,
                    asked[:MEASURED],
                    num_inference_steps=h.setting["steps"],
                    generator=rng.torch("missed"),
                )
                figures["trainable"] = method.adapters.share(h.subject.network)
        return images, figures


def named(text: str) -> str:
    """A contender's label, as rows have it."""
    return contenders.parse(text).label


DIGITS = "hidden_dim=8:trajectories=120:sampling_steps=20:steps=200:batch_size=32:learning_rate=0.01"
LONGER = DIGITS.replace("steps=200:b", "steps=1500:b").replace("trajectories=120", "trajectories=400")
SCENES = "hidden_dim=16:trajectories=240:sampling_steps=20:steps=800:batch_size=32:learning_rate=0.003"


def fitted(scale: float, arch: str = "attention", settings: str = DIGITS, data: str = "trajectory") -> str:
    """Adapters at a scale; those of one seed that differ in the scale alone are one fit."""
    if arch == "full":  # at the adapters' rate all weights together miss more than nothing does
        settings = settings.replace("learning_rate=0.01", "learning_rate=0.0003")
    return named(f"agd:arch={arch}:{settings}:data={data}:guidance_scale={scale:g}")


def cfg(scale: float, steps: int | None = None) -> str:
    return named(f"cfg:scale={scale:g}" + (f":steps={steps}" if steps else ""))


STEPS = 20
UNSEEN = 8.0


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Five fits on ``digits``; at full scale other forms, baselines and scales, and five fits on ``scenes``."""
    full = scale != "quick"
    settings = {"steps": [STEPS], "samples": 256 if full else 96}
    scales = (1.5, 3.0, 5.0, UNSEEN) if full else (3.0, 5.0)
    compared = ["none"]
    for w in scales:
        compared += [cfg(w), fitted(w), fitted(w, data="diffusion")]
        if full or w == 3.0:
            compared += [cfg(w, STEPS // 2)]
        if full:
            compared += [fitted(w, arch) for arch in ("additive", "mlp_gate", "learned_pos_emb", "lora", "full")]
    if full:
        compared += [fitted(3.0, settings=LONGER), fitted(5.0, settings=LONGER)]
    bench = Distillation()
    found = {"digits": Study(bench, tuple(compared), "digits", settings)}
    if full:
        compared = ["none"]
        for w in (1.5, 3.0, 5.0, UNSEEN):
            compared += [cfg(w), cfg(w, STEPS // 2), fitted(w, settings=SCENES)]
        found["scenes"] = Study(bench, tuple(compared), "scenes", settings | {"samples": 240})
    return found


# -------------------------------------------------------------------- claims


def more(figure: str, ours: str, theirs: str) -> Callable[[Comparison], Effects]:
    """Our figure less theirs."""

    def effects(c: Comparison) -> Effects:
        a, b = c.paired(figure, ours, theirs, steps=STEPS)
        return Effects(a - b)

    return effects


def less(figure: str, ours: str, theirs: str) -> Callable[[Comparison], Effects]:
    """Their figure less ours."""
    return more(figure, theirs, ours)


def smaller(figure: str, ours: str, theirs: str) -> Callable[[Comparison], Effects]:
    """log of their figure over ours."""

    def effects(c: Comparison) -> Effects:
        a, b = c.paired(figure, ours, theirs, steps=STEPS)
        return Effects(np.log(b / a))

    return effects


def below(figure: str, ours: str, limit: float, theirs: str | None = None) -> Callable[[Comparison], Effects]:
    """By how much our figure (as a share of theirs) is below a limit."""

    def effects(c: Comparison) -> Effects:
        if theirs is None:
            values = c.values(figure, ours, steps=STEPS)
            return Effects(np.array([limit - values[s] for s in sorted(values)]))
        a, b = c.paired(figure, ours, theirs, steps=STEPS)
        return Effects(limit - a / b)

    return effects


def gained(ours: str, theirs: str, share: float) -> Callable[[Comparison], Effects]:
    """Our gain of accuracy over the condition alone, less a share of theirs."""

    def effects(c: Comparison) -> Effects:
        a, none = c.paired("accuracy", ours, "none", steps=STEPS)
        b, _ = c.paired("accuracy", theirs, "none", steps=STEPS)
        return Effects((a - none) - share * (b - none))

    return effects


ABSTRACT = "abstract: as good as CFG with half the calls"
RIVAL = "asked here, not by the paper: the same calls without training"
DATA = "section 4: guided trajectories in place of noised images"
CLAIMS = [
    Claim(
        "imitates",
        "At scale 3 its samples are more than 2 dB nearer to guidance's than those of the condition alone.",
        ABSTRACT,
        "digits",
        more("psnr", fitted(3), "none"),
        2.0,
        "fit",
    ),
    Claim(
        "misses",
        "At scale 3 it misses less than half of guidance's correction along its own trajectories.",
        ABSTRACT,
        "digits",
        below("missed", fitted(3), 0.5),
        0.0,
        "fit",
    ),
    Claim(
        "frechet",
        "At scale 3 its Frechet distance is at most 10% above that of guidance at twice the calls.",
        ABSTRACT,
        "digits",
        smaller("frechet", fitted(3), cfg(3)),
        -float(np.log(1.1)),
        "fit",
    ),
    Claim(
        "frechet-strong",
        "At scale 5 its Frechet distance is at most 10% above that of guidance at twice the calls.",
        ABSTRACT,
        "digits",
        smaller("frechet", fitted(5), cfg(5)),
        -float(np.log(1.1)),
        "fit",
    ),
    Claim(
        "half-frechet",
        "At scale 3 its Frechet distance is below that of guidance with half the steps.",
        RIVAL,
        "digits",
        smaller("frechet", fitted(3), cfg(3, STEPS // 2)),
        0.0,
        "fit",
    ),
    Claim(
        "half-psnr",
        "At scale 3 its samples are nearer to guidance's than those of guidance with half the steps.",
        RIVAL,
        "digits",
        more("psnr", fitted(3), cfg(3, STEPS // 2)),
        0.0,
        "fit",
    ),
    Claim(
        "trajectories",
        "At scale 3, trained on guided trajectories it misses less than trained on noised images.",
        DATA,
        "digits",
        less("missed", fitted(3), fitted(3, data="diffusion")),
        0.0,
        "fit",
    ),
    Claim(
        "trajectories-strong",
        "At scale 5, trained on guided trajectories it misses less than trained on noised images.",
        DATA,
        "digits",
        less("missed", fitted(5), fitted(5, data="diffusion")),
        0.0,
        "fit",
    ),
    Claim(
        "time",
        "At scale 3 it takes less than 0.65 of the time of guidance.",
        "abstract: half the calls",
        "digits",
        below("seconds_per_sample", fitted(3), 0.65, cfg(3)),
        0.0,
        "fit",
    ),
    Claim(
        "size",
        "Less than 5% of the network's weights are trained.",
        "abstract: about 2%",
        "digits",
        below("trainable", fitted(3), 0.05),
        0.0,
        "exact",
    ),
    Claim(
        "lora",
        "At scale 3 it misses less than low-rank weights of about as many numbers on the same data.",
        "asked here, not by the paper",
        "digits",
        less("missed", fitted(3), fitted(3, "lora")),
        0.0,
        "fit",
        scales=("full",),
    ),
    Claim(
        "misses-longer",
        "At scale 3, trained 7 times the steps on 3 times the data it misses less than "
        "half of guidance's correction along its own path.",
        ABSTRACT,
        "digits",
        below("missed", fitted(3, settings=LONGER), 0.5),
        0.0,
        "fit",
        scales=("full",),
    ),
    Claim(
        "unseen",
        "At scale 8, beyond the trained range, it is nearer to guidance than the condition alone is.",
        "asked here, not by the paper",
        "digits",
        below("missed", fitted(UNSEEN), 1.0),
        0.0,
        "fit",
        scales=("full",),
    ),
    Claim(
        "accuracy",
        "On scenes, at scale 3, it has at least 95% of the accuracy that guidance gains over the condition alone.",
        ABSTRACT,
        "scenes",
        gained(fitted(3, settings=SCENES), cfg(3), 0.95),
        0.0,
        "fit",
        scales=("full",),
    ),
    Claim(
        "accuracy-strong",
        "On scenes, at scale 5, it has at least 95% of the accuracy that guidance gains over the condition alone.",
        ABSTRACT,
        "scenes",
        gained(fitted(5, settings=SCENES), cfg(5), 0.95),
        0.0,
        "fit",
        scales=("full",),
    ),
    Claim(
        "scenes-frechet",
        "On scenes, at scale 3, its Frechet distance is at most 10% above that of guidance at twice the calls.",
        ABSTRACT,
        "scenes",
        smaller("frechet", fitted(3, settings=SCENES), cfg(3)),
        -float(np.log(1.1)),
        "fit",
        scales=("full",),
    ),
    Claim(
        "scenes-half",
        "On scenes, at scale 3, its Frechet distance is below that of guidance with half the steps.",
        RIVAL,
        "scenes",
        smaller("frechet", fitted(3, settings=SCENES), cfg(3, STEPS // 2)),
        0.0,
        "fit",
        scales=("full",),
    ),
]
