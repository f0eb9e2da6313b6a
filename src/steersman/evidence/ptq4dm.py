"""PTQ4DM's claims: what its calibration set buys over others, what 8 bits cost, and what integers gain.

Every calibrator gets the same number of states, the same shuffled batches, the same search for ranges and the same
conditions (the scripts that the paper's numbers come from give their own method 1024 states and the others 128). Each
seed calibrates anew. *Drift* is the distance from the original network's images from the same noise: where quantisation
does little, distances between sets of images don't tell calibrators apart.

The method is compared with clean images at the first timestep (``raw``), the sampler's own states at one timestep only
(``one`` and ``last``), forward-noised images at evenly spread times, and the published pairing of states and times.
Errors of single calls are given by fifths of the run, evenly weighted and weighted by the method's own law of time,
which favours it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy import stats

from steersman.benches.compression import Compression
from steersman.diffusion.ptq4dm.calibration import Calibration, collect
from steersman.engine.bench import Figure, Setting, TrialLog
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.engine.streams import Streams
from steersman.evidence.study import Study

PARTS = 5
"""Parts of the run that errors of single calls are given for."""
STATES = 100
"""States that they are taken over."""


class Calls(Compression):
    """The bench, with the error of single calls along the original's trajectory."""

    figures: Mapping[str, Figure] = {
        **Compression.figures,
        "call_error": Figure("", "lower", "quality", "relative error of a call's output, evenly weighted over the run"),
        "call_error_weighted": Figure(
            "", "lower", "quality", "the same, weighted by the law of the method's calibration times"
        ),
        **{
            f"call_error_{i}": Figure(
                "", "lower", "quality", f"the same, in fifth {i + 1} of the run from its clean end"
            )
            for i in range(PARTS)
        },
    }

    def trial(self, h: Any, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        figures = super().trial(h, setting, rng, log)
        if h.real or h.pipe is h.subject.pipe:
            return figures
        found = collect(
            h.subject.pipe,
            Calibration(times="uniform", size=STATES),
            steps=setting["steps"],
            generator=rng.torch("calls"),
        )
        rows = found.rows(range(STATES))
        with torch.no_grad():
            wanted, got = (pipe.unet(**rows)[0].double() for pipe in (h.subject.pipe, h.pipe))
        error = (got - wanted).flatten(1).square().mean(1)
        scale = float(wanted.square().mean())
        part = found.k * PARTS // found.T
        mean = np.array([float(error[part == i].mean()) / scale for i in range(PARTS)])
        edges = np.arange(PARTS + 1) / PARTS
        edges[0], edges[-1] = -math.inf, math.inf
        weights = np.diff(stats.norm(0.4, 0.4).cdf(edges))
        figures |= {f"call_error_{i}": math.sqrt(m) for i, m in enumerate(mean)}
        figures["call_error"] = math.sqrt(float(mean.mean()))
        figures["call_error_weighted"] = math.sqrt(float(weights @ mean))
        return figures


def calibrated(bits: str, size: int, steps: int, **knobs: Any) -> str:
    """A contender: PTQ4DM with ``bits`` like 6, or 4,8 for weights and activations."""
    w, _, a = bits.partition(",")
    own = {"weight_bits": w, "activation_bits": a} if a else {"bits": w}
    shared = {**own, "size": size, "batch": size // 4, "steps": steps, **knobs}
    return ":".join(["ptq4dm", *(f"{name}={value}" for name, value in shared.items())])


KINDS: Mapping[str, Mapping[str, str]] = {
    "ndtc": {},
    "raw": {"states": "raw", "times": "one"},
    "one": {"times": "one"},
    "last": {"times": "last"},
    "forward": {"states": "raw_forward_t", "times": "uniform"},
    "mirrored": {"pairing": "mirrored"},
}
"""Calibrators of equal budgets, by short names."""
MORE: Mapping[str, Mapping[str, str]] = {
    "mean-0.3": {"mean": "0.3"},
    "mean-0.5": {"mean": "0.5"},
    "noise-one": {"states": "random", "times": "one"},
    "noise-last": {"states": "random", "times": "last"},
    "raw-uniform": {"states": "raw", "times": "uniform"},
    "published": {"pairing": "published"},
    "by-timestep": {"by_timestep": "true"},
    "outputs": {"activations": "output"},
}
SIZE, STEPS = 128, 15
INT8 = "ptq4dm:size=32:steps=5:guidance=3:execution=int8"


def contender(kind: str, bits: str) -> str:
    return calibrated(bits, SIZE, STEPS, **{**KINDS, **MORE}[kind])


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Calibrators at 6 and 8 bits on digits, and integers on scenes; fully also other bits, laws and scenes."""
    full = scale != "quick"
    grid = {"steps": STEPS, "samples": 256 if full else 64}
    kinds = (*KINDS, *MORE) if full else tuple(KINDS)
    found = {
        "w6a6": Study(Calls(), tuple(contender(kind, "6") for kind in kinds), "digits", grid),
        "w8a8": Study(Calls(), ("float", *(contender(kind, "8") for kind in ("ndtc", "raw", "one"))), "digits", grid),
        "int8": Study("compression", ("float", "half", INT8), "scenes", {"steps": 8, "samples": 16, "guidance": 3.0}),
    }
    if full:
        for bits in ("4,8", "8,4"):
            name = f"w{bits.replace(',', 'a')}"
            found[name] = Study(Calls(), tuple(contender(kind, bits) for kind in KINDS), "digits", grid)
        text = ("float", *(calibrated("8", 64, 10, guidance=3, **KINDS[kind]) for kind in ("ndtc", "raw", "one")))
        found["scenes"] = Study("compression", text, "scenes", {"steps": 10, "samples": 64, "guidance": 3.0})
    return found


# -------------------------------------------------------------------- claims


def less(figure: str, kind: str, bits: str = "6", than: str | None = None) -> Callable[[Comparison], Effects]:
    """log of another calibrator's figure over the method's, seed by seed."""

    def effects(c: Comparison) -> Effects:
        theirs, ours = c.paired(figure, contender(kind, bits), contender(than or "ndtc", bits))
        return Effects(np.log(theirs / ours))

    return effects


def near_float(figure: str, sign: float) -> Callable[[Comparison], Effects]:
    """How much better the 8-bit network's figure is than the original's; distances in logarithms."""

    def effects(c: Comparison) -> Effects:
        original, ours = c.paired(figure, "float", contender("ndtc", "8"))
        return Effects(np.log(original / ours) if sign < 0 else ours - original)

    return effects


def faster(than: str) -> Callable[[Comparison], Effects]:
    """log of another execution's seconds over those of integers."""

    def effects(c: Comparison) -> Effects:
        theirs, ours = c.paired("seconds_per_sample", than, INT8)
        return Effects(np.log(theirs / ours))

    return effects


def smaller(share: float) -> Callable[[Comparison], Effects]:
    """By how much the weights' size is under a share of the original's."""

    def effects(c: Comparison) -> Effects:
        original, ours = c.paired("megabytes", "float", INT8)
        return Effects(share - ours / original, kind="exact")

    return effects


def on_scenes(kind: str) -> Callable[[Comparison], Effects]:
    """log of another calibrator's drift over the method's, on scenes."""

    def effects(c: Comparison) -> Effects:
        names = [calibrated("8", 64, 10, guidance=3, **KINDS[k]) for k in (kind, "ndtc")]
        theirs, ours = c.paired("drift", *names)
        return Effects(np.log(theirs / ours))

    return effects


CLEARLY = math.log(1.25)
ABSTRACT, LAW, CODE = (
    "abstract",
    "section 4.3 and Table 2 (law of the time steps)",
    "the authors' code, which Table 1 used",
)
HERE = "asked here, not by the paper"
FULL = ("full", "gpu")
CLAIMS = [
    Claim(
        "w6-raw",
        "At 6 bits its samples drift from the original's by less than 4/5 of what calibration on clean images leaves.",
        LAW,
        "w6a6",
        less("drift", "raw"),
        CLEARLY,
        "fit",
    ),
    Claim(
        "w6-one",
        "At 6 bits they drift by less than 4/5 of what calibration at the first timestep alone leaves.",
        LAW,
        "w6a6",
        less("drift", "one"),
        CLEARLY,
        "fit",
    ),
    Claim(
        "w6-last",
        "At 6 bits they drift less than with calibration at the last timestep alone.",
        LAW,
        "w6a6",
        less("drift", "last"),
        0.0,
        "fit",
    ),
    Claim(
        "w6-forward",
        "At 6 bits they drift less than with forward-noised images at evenly spread times.",
        LAW,
        "w6a6",
        less("drift", "forward"),
        0.0,
        "fit",
    ),
    Claim(
        "w6-mirrored",
        "At 6 bits they drift less than with the published pairing of states and times.",
        CODE,
        "w6a6",
        less("drift", "mirrored"),
        0.0,
        "fit",
    ),
    Claim(
        "w6-call-forward",
        "At 6 bits the error of a call, evenly weighted, is less than with forward-noised images at even times.",
        LAW,
        "w6a6",
        less("call_error", "forward"),
        0.0,
        "fit",
    ),
    Claim(
        "w8-raw",
        "At 8 bits its samples drift by less than 4/5 of what calibration on clean images leaves.",
        LAW,
        "w8a8",
        less("drift", "raw", "8"),
        CLEARLY,
        "fit",
    ),
    Claim(
        "w8-one",
        "At 8 bits they drift by less than 4/5 of what calibration at the first timestep alone leaves.",
        LAW,
        "w8a8",
        less("drift", "one", "8"),
        CLEARLY,
        "fit",
    ),
    Claim(
        "w8-frechet",
        "At 8 bits the Frechet distance is at most 5% above the original network's, from the same noise.",
        ABSTRACT,
        "w8a8",
        near_float("frechet", -1),
        -0.05,
        "fit",
    ),
    Claim(
        "w8-accuracy",
        "At 8 bits the share of samples that show what was asked for falls by less than 0.02.",
        ABSTRACT,
        "w8a8",
        near_float("accuracy", 1),
        -0.02,
        "fit",
    ),
    Claim(
        "size",
        "The weights of the 8-bit network take less than 0.3 of the original's.",
        ABSTRACT,
        "int8",
        smaller(0.3),
        0.0,
        "exact",
    ),
    Claim(
        "int8-float32",
        "On scenes integer execution takes less time than float32.",
        HERE,
        "int8",
        faster("float"),
        0.0,
        "seed",
    ),
    Claim(
        "int8-bfloat16",
        "On scenes integer execution takes less time than bfloat16.",
        HERE,
        "int8",
        faster("half"),
        0.0,
        "seed",
    ),
    Claim(
        "w6-by-timestep",
        "At 6 bits a range for each timestep leaves less drift than one for all.",
        HERE,
        "w6a6",
        lambda c: -less("drift", "by-timestep")(c),
        0.0,
        "fit",
        FULL,
    ),
    Claim(
        "w4a8-raw",
        "With weights of 4 bits it leaves less than 4/5 of the drift of calibration on clean images.",
        LAW,
        "w4a8",
        less("drift", "raw", "4,8"),
        CLEARLY,
        "fit",
        FULL,
    ),
    Claim(
        "w8a4-raw",
        "With activations of 4 bits it leaves less than 4/5 of the drift of calibration on clean images.",
        LAW,
        "w8a4",
        less("drift", "raw", "8,4"),
        CLEARLY,
        "fit",
        FULL,
    ),
    Claim(
        "scenes-raw",
        "On scenes, at 8 bits, it leaves less than 4/5 of the drift of calibration on clean images.",
        LAW,
        "scenes",
        on_scenes("raw"),
        CLEARLY,
        "fit",
        FULL,
    ),
    Claim(
        "scenes-one",
        "On scenes, at 8 bits, it leaves less than 4/5 of the drift of calibration at the first timestep alone.",
        LAW,
        "scenes",
        on_scenes("one"),
        CLEARLY,
        "fit",
        FULL,
    ),
]
