"""DPM-OT's claims, each against the two controls that tell what transport is good for.

The bank *is* data, so few mixtures and a small distance after a few calls prove nothing about transport. Beside
every figure stand a **random** index of the bank with the same calls (``coupling=random``) and the bank's clean items
without any call (``lookup_only=true``). Under equal weights transport and a random index draw from one law: where
the paper's claim is about quality, the claim here is that transport is better than the random index, and two
further claims say how nearly they are equal. What transport can change is which noise goes with which image; that is
measured along paths through the noise.

Every seed makes its own bank (points: 1024 exact samples; ``digits``: the training images) with its own noise, and
fits its own maps; figures on ``digits`` are against held-out images, with their labels. Plain samplers are context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.benches import _pipelines
from steersman.benches._pipelines import Subject
from steersman.benches.sampling import Sampling
from steersman.diffusion.dpm_ot import DPMOTPipeline, TransportMap
from steersman.engine.bench import Figure, Knob, PartInfo, Setting, TrialLog
from steersman.engine.claims import Claim, Effects, equivalence
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.evidence.study import Study
from steersman.reference import digits, image_metrics, point_metrics

BANK = 1024
POINTS_OF_A_PATH = 16


class FreshMap:
    """The part ``dpm-ot``: a map that each seed makes anew.

    Args:
        timestep: k of the bank.
        size: items of the bank; None is 1024 points, or all training images.
        source: law of the noise.
        coupling, renoise, lookup_only: of the pipeline.
    """

    def __init__(
        self,
        timestep: int = 300,
        size: int | None = None,
        source: str = "gaussian",
        coupling: str = "ot",
        renoise: bool = False,
        lookup_only: bool = False,
    ) -> None:
        self.fitted: dict[str, Any] = {"timestep": timestep, "size": size, "source": source}
        self.used: dict[str, Any] = {"coupling": coupling, "renoise": renoise, "lookup_only": lookup_only}


class LatentBanks(Sampling):
    """The sampling bench, where a contender may start from a bank that was made for the seed."""

    knobs: Mapping[str, Knob] = {
        **Sampling.knobs,
        "paths": Knob(int, 0, "paths through the noise that outputs are followed along", low=0, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        **Sampling.figures,
        "mixture": Figure(
            "", "lower", "quality", "share beyond 3 deviations of every mode; images: of two likely classes"
        ),
        "nearest": Figure(
            "", "neither", "info", "mean distance to the bank's nearest item, in mean distances between items"
        ),
        "near_copies": Figure(
            "", "lower", "quality", "share nearer to an item than half its distance to the next item"
        ),
        "repeats": Figure(
            "", "lower", "quality", "share with another sample within a tenth of the items' mean distance"
        ),
        "roughness": Figure(
            "",
            "lower",
            "quality",
            "squared jump of the output from point to point of a path of noise, over that of any two",
        ),
        "residual": Figure("", "lower", "info", "root mean square relative error of the cells' masses"),
    }

    def parts(self) -> Mapping[str, PartInfo]:
        return {**super().parts(), "dpm-ot": PartInfo(FreshMap, "DPM-OT with a bank of the seed's own")}

    def mount(self, h: Any, part: Part) -> None:
        if part.id != "dpm-ot":
            super().mount(h, part)
            return
        h.parts.append(part)
        h.installs.append(FreshMap(**checked_knobs(FreshMap, part)))

    def trial(self, h: Any, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, n = h.subject, setting["samples"]
        data = self.data(s, setting)
        labels = _pipelines.asked_for(s, data, setting, rng)
        bank = _images(s, None, rng)[0]
        figures: dict[str, float] = {}
        if h.real:
            samples = _pipelines.stand_ins(s, data, labels, setting, rng)
        else:
            noise = _pipelines.shared_noise(s, n, rng)
            fresh = h.installs[0] if h.installs else None
            pipe = s.pipe if fresh is None else _pipeline(s, fresh, rng, log)
            if fresh is not None:
                figures["residual"] = max(m.residual for m in pipe.map._maps())
                bank = pipe.map.clean
            run = _Run(
                pipe, h.scheduler or type(s.pipe.scheduler).from_config(s.pipe.scheduler.config), setting["calls"]
            )
            started = time.perf_counter()
            samples = run(noise, labels, rng.torch("sampler"))
            figures["seconds_per_sample"] = (time.perf_counter() - started) / n
            figures["calls_used"] = run.calls
            if setting["paths"]:
                figures["roughness"] = _roughness(run, noise, labels, setting["paths"], rng)
        if s.law is not None:
            exact, _ = s.law.sample(n, rng.torch("exact"), torch.float64)
            figures |= point_metrics.point_metrics(s.law, samples.flatten(1), exact)
            figures["mixture"] = 1 - figures["on_manifold"]
            log.arrays("points", points=samples.flatten(1).numpy())
        else:
            assert data is not None and data.score is not None
            log.images("samples", ((samples[:12] + 1) / 2).permute(0, 2, 3, 1).numpy())
            figures |= image_metrics.feature_metrics(data.features[:n], image_metrics.features(data.judge, samples))
            figures |= data.score(samples, labels)
            figures["mixture"] = image_metrics.mixture_ratio(digits.classifier("b"), samples)
        return figures | image_metrics.novelty(samples, bank)


class _Run:
    """Noise to samples with a pipeline, a scheduler and as many calls as fit."""

    def __init__(self, pipe: Any, scheduler: Any, calls: int) -> None:
        self.pipe, self.scheduler = pipe, scheduler
        if isinstance(pipe, DPMOTPipeline):
            own, pipe.scheduler = pipe.scheduler, scheduler
            self.steps, self.calls = calls, 0 if pipe.lookup_only else len(pipe.plan(calls))
            pipe.scheduler = own
        else:
            self.steps = _pipelines.most_steps(scheduler, calls)
            scheduler.set_timesteps(self.steps)
            self.calls = len(scheduler.timesteps)

    @torch.no_grad()
    def __call__(self, noise: Tensor, labels: Any, generator: torch.Generator) -> Tensor:
        own, parts = self.pipe.scheduler, []
        extra = {} if labels is None else {"labels": labels}
        try:
            self.pipe.scheduler = self.scheduler
            for start in range(0, len(noise), 250):
                part = slice(start, start + 250)
                asked = {name: value[part] for name, value in extra.items()}
                out = self.pipe(
                    latents=noise[part],
                    num_inference_steps=self.steps,
                    generator=generator,
                    output_type="latent",
                    **asked,
                )
                parts.append(out.images.float())
        finally:
            self.pipe.scheduler = own
        x = torch.cat(parts)
        return x.clamp(-1, 1) if labels is not None else x


def _images(s: Subject, size: int | None, rng: Streams) -> tuple[Tensor, Tensor | None]:
    """What a bank is made of: exact points, or training images and labels."""
    if s.law is not None:
        return s.law.sample(size or BANK, rng.torch("bank"))[0][:, :, None, None], None
    x, y = digits.images("train")
    if size is not None:
        rows = torch.randperm(len(x), generator=rng.torch("bank"))[:size]
        x, y = x[rows], y[rows]
    return x, y


def _pipeline(s: Subject, fresh: FreshMap, rng: Streams, log: TrialLog) -> DPMOTPipeline:
    def make(folder: Path) -> None:
        x, y = _images(s, fresh.fitted["size"], rng)
        made = TransportMap.from_images(
            s.pipe,
            x,
            y,
            timestep=fresh.fitted["timestep"],
            source=fresh.fitted["source"],
            maps="joint" if y is None else "class",
            generator=rng.torch("map"),
        )
        made.save(folder)

    folder = log.fits.get({"method": "dpm-ot", **fresh.fitted, "seed": rng.base}, make)
    return DPMOTPipeline.mount(s.pipe, folder, **fresh.used)


def _roughness(run: _Run, noise: Tensor, labels: Any, paths: int, rng: Streams) -> float:
    """Mean squared distance of outputs at neighbours on an arc of noise, over that of two arcs' outputs."""
    a, b = noise[:paths, None], torch.randn(noise[:paths, None].shape, generator=rng.torch("paths"))
    angle = torch.linspace(0, math.pi / 2, POINTS_OF_A_PATH)[None, :, None, None, None]
    x = (angle.cos() * a + angle.sin() * b).flatten(0, 1)
    asked = None if labels is None else torch.as_tensor(labels)[:1].expand(len(x))
    out = run(x, asked, rng.torch("path-sampler")).reshape(paths, POINTS_OF_A_PATH, -1)
    jumps = (out[:, 1:] - out[:, :-1]).square().sum(2).mean()
    return float(jumps / (out - out.roll(1, 0)).square().sum(2).mean())


# -------------------------------------------------------------------- studies

OT = "dpm-ot+ddim"
RANDOM = "dpm-ot:coupling=random+ddim"
FRESH = "dpm-ot:renoise=true+ddim"
FRESH_RANDOM = "dpm-ot:coupling=random:renoise=true+ddim"
CLEAN = "dpm-ot:lookup_only=true+ddim"
LOW, HIGH = "dpm-ot:timestep=100+ddim", "dpm-ot:timestep=600+ddim"
FAST = "DPMSolverMultistepScheduler"


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Quality against calls on points and digits, with the controls; novelty against the noise level; paths."""
    full = scale != "quick"
    bench = LatentBanks()
    both = (OT, RANDOM, FRESH, FRESH_RANDOM, CLEAN, "ddim", FAST, "real")
    ring, n = "gaussians:ring-sharp", 512 if full else 256
    found = {
        "ring": Study(bench, both, ring, {"calls": [5, 10, 20], "samples": 500, "paths": 32}),
        "chain": Study(bench, ("ddim", FAST), ring, {"calls": [200], "samples": 500}),
        "digits": Study(bench, both, "digits", {"calls": [2, 5, 10, 20, 50] if full else [5], "samples": n}),
        "levels": Study(bench, (LOW, HIGH), "digits", {"calls": [5], "samples": n}),
        "digits-paths": Study(bench, (OT, RANDOM, "ddim"), "digits", {"calls": [5], "samples": 32, "paths": 8}),
    }
    if full:
        sizes = tuple(f"dpm-ot:size={size}+ddim" for size in (256, 600, 1200))
        laws = ("dpm-ot:source=uniform+ddim", OT)
        found["sizes"] = Study(bench, (*sizes, *laws), "digits", {"calls": [5], "samples": n})
    return found


# -------------------------------------------------------------------- claims


def less(figure: str, a: str, b: str) -> Callable[[Comparison], Effects]:
    """b's figure less a's at 5 calls."""

    def effects(c: Comparison) -> Effects:
        ours, theirs = c.paired(figure, a, b, calls=5)
        return Effects(theirs - ours)

    return effects


def smaller(figure: str, a: str, b: str) -> Callable[[Comparison], Effects]:
    """log of b's figure over a's at 5 calls."""

    def effects(c: Comparison) -> Effects:
        ours, theirs = c.paired(figure, a, b, calls=5)
        return Effects(np.log(theirs / ours))

    return effects


def below(figure: str, contender: str, limit: float) -> Callable[[Comparison], Effects]:
    """How far the figure is under a limit at 5 calls."""

    def effects(c: Comparison) -> Effects:
        values = c.values(figure, contender, calls=5)
        return Effects(np.array([limit - values[seed] for seed in sorted(values)]))

    return effects


PAPER, HERE, LAW = "abstract: mode mixture at few calls", "asked here, not by the paper", "follows from equal weights"
CLAIMS = [
    Claim(
        "ring-mixture",
        "At 5 calls fewer points lie between the modes than with DDIM.",
        PAPER,
        "ring",
        less("mixture", OT, "ddim"),
    ),
    Claim(
        "ring-transport",
        "At 5 calls the share of points between the modes is more than 0.02 below that of a random index.",
        PAPER,
        "ring",
        less("mixture", OT, RANDOM),
        0.02,
    ),
    *equivalence(
        "ring-law",
        "At 5 calls transport and a random index leave equally many points between the modes.",
        LAW,
        "ring",
        less("mixture", OT, RANDOM),
        0.02,
    ),
    Claim(
        "digits-mixture",
        "At 5 calls fewer images have two likely classes than with DDIM.",
        PAPER,
        "digits",
        less("mixture", OT, "ddim"),
    ),
    Claim(
        "digits-frechet",
        "At 5 calls its Frechet distance is below that of DPM-Solver++(2M).",
        "abstract: quality at few calls",
        "digits",
        smaller("frechet", OT, FAST),
    ),
    Claim(
        "digits-transport",
        "At 5 calls its Frechet distance is more than 5% below that of a random index.",
        "abstract: quality at few calls",
        "digits",
        smaller("frechet", OT, RANDOM),
        0.05,
    ),
    *equivalence(
        "digits-law",
        "At 5 calls transport and a random index have the same Frechet distance, in logarithms.",
        LAW,
        "digits",
        smaller("frechet", OT, RANDOM),
        0.15,
    ),
    Claim(
        "digits-bank",
        "At 5 calls its Frechet distance is below that of the bank's own images, which take no call.",
        HERE,
        "digits",
        smaller("frechet", OT, CLEAN),
    ),
    Claim(
        "ring-paths",
        "Along a path through the noise outputs are less than half as rough as with a random index, on points.",
        HERE,
        "ring",
        smaller("roughness", OT, RANDOM),
        math.log(2),
    ),
    Claim(
        "digits-paths",
        "Along a path through the noise outputs are less than half as rough as with a random index, on digits.",
        HERE,
        "digits-paths",
        smaller("roughness", OT, RANDOM),
        math.log(2),
    ),
    Claim(
        "digits-smooth",
        "Along a path through the noise outputs are no rougher than the plain sampler's, on digits.",
        HERE,
        "digits-paths",
        smaller("roughness", OT, "ddim"),
    ),
    Claim(
        "copies",
        "From timestep 300 fewer than 5% of the samples are near copies of a bank's image.",
        HERE,
        "digits",
        below("near_copies", OT, 0.05),
    ),
    Claim(
        "low-copies",
        "From timestep 100 more than half of the samples are near copies of a bank's image.",
        HERE,
        "levels",
        lambda c: -below("near_copies", LOW, 0.5)(c),
    ),
    Claim(
        "renoise-repeats",
        "Fresh noise leaves at least 0.1 fewer samples that repeat another one.",
        HERE,
        "digits",
        less("repeats", FRESH, OT),
        0.1,
    ),
    *equivalence(
        "renoise-frechet",
        "Fresh noise leaves the Frechet distance as it is, in logarithms.",
        HERE,
        "digits",
        smaller("frechet", FRESH, OT),
        0.15,
    ),
]
