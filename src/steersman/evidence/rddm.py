"""RDDM's claims: few steps suffice in restoration, and a network of DDIM is one of RDDM.

``restoration`` undoes damage to crops of photographs (rain in quick, everything in full), every contender with one
network of the same size, the same steps of training, crops and noise, at one learning rate. PSNR is best for the mean
of what fits the input, and a sampler that collapses to it wins there: so beside it stand a network that was trained
for that mean (the upper bound), conditional DDIM at the same calls, the mean of four of its samples, and the energy
score, which is best for draws from the true law. In so short a training a network that predicts noise, as DDPM's does,
has hardly begun to restore; the stronger rival is DDIM with a network that predicts the residual, as SM-Res's does.

``conversion`` compares the converted scheduler with diffusers' DDIM on the network of ``digits``, to the last digits,
and the quality of other α for the same network. ``selection`` reports what automatic selection chose, and how soon;
nothing is claimed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from steersman.benches._pipelines import Host, shared_noise
from steersman.benches.restoration import Restoration
from steersman.benches.sampling import Sampling
from steersman.diffusion.rddm import Pairs, RDDMScheduler, choose_objective
from steersman.diffusion.rddm.training import TrainingConfig
from steersman.engine.bench import Figure, Knob, PartInfo, Setting, Shape, TrialLog
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.evidence.study import Study

RES = "rddm"
COLD = "rddm:sum_scale=0.01"
BOTH = "rddm:prediction_type=res_noise:nets=2:condition=levels"
RESIDUAL_FIRST = f"{BOTH}:path=residual_first"
DDPM, REGRESSION = "ddpm", "regression"
SAME, MEAN = "ddpm:predicts=residual", "ddpm:predicts=residual:average=4"
READJUSTED = "rddm:residual_schedule=power_decreasing:residual_power=0.3:step_form=noise"


# ------------------------------------------------------------------ without training


class Conversion(Sampling):
    """The sampling bench, with the converted scheduler, and how far its samples are from those of diffusers' DDIM."""

    figures: Mapping[str, Figure] = {
        **Sampling.figures,
        "difference": Figure("", "lower", "quality", "from diffusers' DDIM of the same noise: relative 2-norm"),
    }

    def parts(self) -> Mapping[str, PartInfo]:
        return {**super().parts(), "rddm": PartInfo(RDDMScheduler, "the residual form of the network's process")}

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        figures = super().trial(h, setting, rng, log)
        if isinstance(h.scheduler, RDDMScheduler):
            noise = shared_noise(h.subject, min(setting["samples"], 32), rng)
            ends, own = [], h.pipe.scheduler
            try:
                for scheduler in (DDIMScheduler.from_config(own.config), h.scheduler):
                    h.pipe.scheduler = scheduler
                    labels = torch.arange(len(noise)) % (h.subject.classes or 1)
                    arguments = {"num_inference_steps": setting["calls"], "output_type": "latent"}
                    ends.append(h.pipe(latents=noise, labels=labels, **arguments).images)
            finally:
                h.pipe.scheduler = own
            figures["difference"] = float((ends[0] - ends[1]).norm() / ends[0].norm())
        return figures


class Selection:
    """What AOSA chooses for one network, on crops with and without an input."""

    id = "selection"
    shape: Shape = "Problem"
    default_subject = "photographs"
    headline = ("steps", "learning_rate")
    knobs: Mapping[str, Knob] = {
        "learning_rate": Knob(float, (2e-4,), "of the network and of λ", low=0),
        "task": Knob(str, "rain", "what befell the images", sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "residual": Figure("", "neither", "info", "1: the residual was chosen, 0: the noise"),
        "steps": Figure("", "neither", "info", "training steps until then"),
        "lambda": Figure("", "neither", "info", "λ then, from 0.5"),
    }

    def subject(self, spec: str) -> Any:
        return Restoration().subject(spec)

    def baselines(self) -> list[str]:
        return ["restoration", "generation"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "restoration": PartInfo(lambda: True, "I_in is the damaged image"),
            "generation": PartInfo(lambda: False, "I_in is 0"),
        }

    def check(self, s: Any, setting: Setting) -> None: ...

    def host(self, s: Any, setting: Setting, rng: Streams) -> dict[str, Any]:
        return {"subject": s}

    def mount(self, h: dict[str, Any], part: Part) -> None:
        build = self.parts()[part.id].build
        h["input"] = build(**checked_knobs(build, part))

    def trial(self, h: dict[str, Any], setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        shared = {"crop": 16, "pairs": 1000, "samples": 2, "task": setting["task"]}
        crops = Restoration().crops(h["subject"], shared, "train", rng)
        pairs = Pairs.of(crops.target, crops.input if h["input"] else None)
        seed, rate = rng.seed("fit") % 2**31, setting["learning_rate"]
        config = TrainingConfig(steps=1000, batch_size=8, learning_rate=rate, crop=16, seed=seed)
        loss = "l1" if h["input"] else "l2"
        found = choose_objective(pairs, sum_scale=1.0, see_input=True, loss=loss, width=16, config=config)
        log.arrays("lambda", path=np.array(found.lambdas))
        return {
            "residual": float(found.choice == "res"),
            "steps": len(found.lambdas) - 1,
            "lambda": found.lambdas[-1],
        }

    def exhibits(self, comparison: Comparison) -> list[Any]:
        return []


# ------------------------------------------------------------------ studies


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Restoration of photographs, conversion of a trained network, and automatic selection."""
    full = scale != "quick"
    learned = (
        (RES, COLD, BOTH, RESIDUAL_FIRST, DDPM, SAME, MEAN, REGRESSION) if full else (RES, DDPM, SAME, MEAN, REGRESSION)
    )
    classical = ("identity", "tv", "wiener", "biharmonic", "gamma") if full else ("identity", "tv")
    sampled: tuple[str, ...] = ("DDIMScheduler", READJUSTED)
    if full:
        sampled += ("rddm", READJUSTED.replace("0.3", "1.0"), READJUSTED + ":residual_from=path:clip_sample=true")
    return {
        "restoration": Study(
            "restoration",
            (*learned, *classical),
            "photographs",
            {
                "task": ["rain", "denoising", "deblurring", "inpainting", "low-light"] if full else ["rain"],
                "calls": [1, 2, 5, 10, 50] if full else [5, 20],
                "steps": 1000 if full else 240,
                "crop": 24 if full else 16,
                "learning_rate": RATE,
                "samples": 32 if full else 20,
                "draws": 4 if full else 3,
            },
            seeds=5,
        ),
        "equality": Study(Conversion(), ("rddm",), "digits", {"calls": [5, 10, 20, 50], "samples": 32}, seeds=2),
        "readjusted": Study(
            Conversion(),
            sampled,
            "digits",
            {"calls": [5, 10, 20, 50] if full else [10], "samples": 597 if full else 200},
            seeds=5,
        ),
        "selection": Study(
            Selection(),
            ("restoration", "generation"),
            "photographs",
            {"learning_rate": [8e-5, 2e-4, 1e-3] if full else [1e-3]},
            seeds=10 if full else 5,
        ),
    }


RATE = 3e-3
"""The better of 1e-3 and 3e-3 for each of four contenders, on seed 900."""


def above(
    figure: str, contender: str, rival: str, ours: int, theirs: int, sign: int = 1, task: str = "rain"
) -> Callable[[Comparison], Effects]:
    """The contender's figure at ``ours`` calls less the rival's at ``theirs`` (-1: reversed), fit by fit."""

    def effects(c: Comparison) -> Effects:
        a = c.values(figure, contender, calls=ours, task=task)
        b = c.values(figure, rival, calls=theirs, task=task)
        if not a or a.keys() != b.keys():
            raise LookupError(f"{contender} and {rival} lack a row with the same seed")
        return Effects(sign * np.array([a[s] - b[s] for s in sorted(a)]))

    return effects


def same_samples(c: Comparison) -> Effects:
    """1e-5 less each relative difference."""
    found = [c.values("difference", "rddm", calls=n) for n in (5, 10, 20, 50)]
    return Effects(1e-5 - np.array([d for one in found for d in one.values()]), kind="exact")


def as_good(c: Comparison) -> Effects:
    """log of DDIM's Frechet distance over that of the readjusted path, at 10 calls."""
    ours, theirs = c.paired("frechet", READJUSTED, "DDIMScheduler", calls=10)
    return Effects(np.log(theirs / ours))


SOURCE = "restoration: few sampling steps"
CLAIMS = [
    Claim(
        "few-steps",
        "In rain, SM-Res at 5 calls has a PSNR over 0.5 dB above conditional DDIM's at 5 calls.",
        SOURCE,
        "restoration",
        above("psnr", RES, DDPM, 5, 5),
        0.5,
        "fit",
    ),
    Claim(
        "few-steps-residual",
        "In rain, SM-Res at 5 calls has a PSNR above that of 5 calls of DDIM that predicts the residual.",
        "fair rival: the same network, from noise",
        "restoration",
        above("psnr", RES, SAME, 5, 5),
        0.0,
        "fit",
    ),
    Claim(
        "few-against-mean",
        "In rain, SM-Res at 5 calls has a PSNR above that of the mean of four DDIM samples of 5 calls each.",
        "fair rival: the mean of samples is what PSNR asks for",
        "restoration",
        above("psnr", RES, MEAN, 5, 5),
        0.0,
        "fit",
    ),
    Claim(
        "near-regression",
        "In rain, SM-Res at 5 calls has a PSNR at most 1 dB below a network that was trained for it alone.",
        "fair rival: the upper bound of PSNR",
        "restoration",
        above("psnr", RES, REGRESSION, 5, 5),
        -1.0,
        "fit",
    ),
    Claim(
        "steps-suffice",
        "In rain, SM-Res at 5 calls has a PSNR at most 0.2 dB below its own at 20.",
        SOURCE,
        "restoration",
        above("psnr", RES, RES, 5, 20),
        -0.2,
        "fit",
        ("quick",),
    ),
    Claim(
        "law-ddim",
        "In rain, the energy score of SM-Res at 20 calls is below that of DDIM that predicts the residual.",
        "fair rival: as a sampler of what fits the input",
        "restoration",
        above("energy_score", RES, SAME, 20, 20, -1),
        0.0,
        "fit",
        ("quick",),
    ),
    Claim(
        "law-regression",
        "In rain, the energy score of SM-Res at 20 calls is below that of the regression network.",
        "fair rival: what sampling adds to one answer",
        "restoration",
        above("energy_score", RES, REGRESSION, 20, 20, -1),
        0.0,
        "fit",
        ("quick",),
    ),
    Claim(
        "law-ddim-50",
        "In rain, the energy score of SM-Res at 50 calls is below that of DDIM that predicts the residual.",
        "fair rival: as a sampler of what fits the input",
        "restoration",
        above("energy_score", RES, SAME, 50, 50, -1),
        0.0,
        "fit",
        ("full", "gpu"),
    ),
    Claim(
        "both-in-holes",
        "In inpainting at 50 calls, the energy score of SM-Res-N of equal parameters is below that of SM-Res.",
        "selection of the prediction for a task",
        "restoration",
        above("energy_score", BOTH, RES, 50, 50, -1, "inpainting"),
        0.0,
        "fit",
        ("full", "gpu"),
    ),
    Claim(
        "path",
        "In rain at 10 calls, the residual first and then the noise has a PSNR at most 1 dB below both together.",
        "partially path-independent generation",
        "restoration",
        above("psnr", RESIDUAL_FIRST, BOTH, 10, 10),
        -1.0,
        "fit",
        ("full", "gpu"),
    ),
    Claim(
        "conversion",
        "On digits, samples of the converted scheduler differ from diffusers' DDIM by less than 1e-5 (relative).",
        "coefficient transformation: sampling coincides with DDIM",
        "equality",
        same_samples,
        0.0,
        "exact",
    ),
    Claim(
        "readjusted",
        "On digits at 10 calls, the path P(1-x, 0.3) has a Frechet distance at most 5% above DDIM's.",
        "analysis of readjusting coefficient schedules",
        "readjusted",
        as_good,
        -0.05,
        "seed",
    ),
]
