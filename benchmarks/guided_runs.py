"""Seconds of whole runs of the `scenes` pipeline: what guidance and steering cost beside the network, what is saved.

Runs of all configurations alternate (A B C ... A B C ...), from the same noise with the same prompts, and medians over
rounds are compared. Two tables:

- overhead: methods that take as many network calls as classifier-free guidance, against diffusers' own guider
  ClassifierFreeGuidance on the same pipeline (by our hooks: a classic pipeline has no guiders) and against the
  pipeline's own guidance (FK steering against its stochastic sampler alone);
- gain: methods that save calls or make them cheaper, against the pipeline's own classifier-free guidance. Artefacts
  are made by `steersman apply` with the settings shown, unless folders are given.

    python benchmarks/guided_runs.py [--rounds 9] [--artefact agd=FOLDER ...] [--only overhead|gain] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from steersman import catalog
from steersman.diffusion import (
    AdaptiveGuidance,
    CFGPlusPlus,
    DDIMScheduler,
    FKSteering,
    StockGuidance,
)
from steersman.engine.artefacts import run_verb
from steersman.reference import scenes

STEPS, PROMPTS, SCALE, PARTICLES = 20, 16, 3.0, 4
ARTEFACTS: dict[str, dict[str, Any]] = {
    "agd": {"steps": 20, "trajectories": 16, "sampling_steps": 5},
    "ptq4dm": {"execution": "int8", "size": 64, "steps": 10},
    "aptp": {"budget": 0.7, "steps": 100, "finetune": 0},
}
"""Settings of `apply` that make the artefacts here: speed does not depend on how long they were trained."""


class Runs:
    """One pipeline and what is put on it for a run."""

    def __init__(self) -> None:
        self.pipe = scenes.pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.ancestral = DDIMScheduler.from_config(self.pipe.scheduler.config, eta=1.0)
        self.prompts = scenes.prompts(PROMPTS)
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(PROMPTS, 4, 16, 16, generator=generator)

    def seconds(self, method: Any = None, pipe: Any = None, scale: float = SCALE, scheduler: Any = None) -> float:
        pipe = pipe or self.pipe
        own, pipe.scheduler = pipe.scheduler, scheduler or pipe.scheduler
        if method is not None:
            method.install(pipe)
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
        start = time.perf_counter()
        pipe(self.prompts, latents=self.latents, guidance_scale=scale, **arguments)
        taken = time.perf_counter() - start
        if method is not None:
            method.uninstall()
        pipe.scheduler = own
        return taken

    def steered(self, method: Any = None) -> float:
        """A run of k particles for each of a few prompts."""
        pipe, own = self.pipe, self.pipe.scheduler
        pipe.scheduler = self.ancestral
        if method is not None:
            method.install(pipe)
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
        start = time.perf_counter()
        pipe(
            self.prompts[: PROMPTS // PARTICLES],
            num_images_per_prompt=PARTICLES,
            latents=self.latents,
            guidance_scale=SCALE,
            **arguments,
        )
        taken = time.perf_counter() - start
        if method is not None:
            method.uninstall()
        pipe.scheduler = own
        return taken


def overhead(runs: Runs) -> dict[str, Callable[[], float]]:
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=SCALE)

    def brightness(latents: torch.Tensor) -> torch.Tensor:
        return latents.flatten(1).mean(1)

    return {
        "pipeline": runs.seconds,
        "ClassifierFreeGuidance": lambda: runs.seconds(StockGuidance(guider), scale=2.0),
        "cfg-pp": lambda: runs.seconds(CFGPlusPlus(scale=0.6), scale=2.0),
        "adaptive-guidance, off": lambda: runs.seconds(AdaptiveGuidance(scale=SCALE, threshold=1.0), scale=2.0),
        "ddim of eta 1": runs.steered,
        "fk-steering": lambda: runs.steered(FKSteering(brightness, particles=PARTICLES, space="latent")),
    }


def gain(runs: Runs, folders: dict[str, Path]) -> dict[str, Callable[[], float]]:
    found: dict[str, Callable[[], float]] = {
        "pipeline": runs.seconds,
        "none": lambda: runs.seconds(scale=1.0),
        "adaptive-guidance": lambda: runs.seconds(AdaptiveGuidance(scale=SCALE), scale=2.0),
    }
    for name, folder in folders.items():
        method = catalog.card(name).load()
        if hasattr(method, "mount"):
            pipe = method.mount(runs.pipe, folder)
            pipe.set_progress_bar_config(disable=True)
            found[name] = lambda pipe=pipe: runs.seconds(pipe=pipe)  # type: ignore[misc]
        else:
            scale = 1.0 if method.branches == 1 else SCALE
            found[name] = lambda m=method, f=folder, s=scale: runs.seconds(m.from_pretrained(f), scale=s)  # type: ignore[misc]
    return found


def measured(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    for run in cases.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            taken[name].append(run())
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--artefact", action="append", default=[], help="name=folder of an artefact made before")
    parser.add_argument("--only", choices=("overhead", "gain"))
    parser.add_argument("--out", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    runs = Runs()
    report: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "steps": STEPS,
        "batch": PROMPTS,
    }
    if arguments.only != "gain":
        seconds = measured(overhead(runs), arguments.rounds)
        plain = {"fk-steering": "ddim of eta 1"}
        ours = [name for name in seconds if name not in ("pipeline", "ClassifierFreeGuidance", "ddim of eta 1")]
        ratios = {
            "to ClassifierFreeGuidance": {
                n: seconds[n] / seconds["ClassifierFreeGuidance"] for n in ours if n not in plain
            },
            "to the pipeline alone": {n: seconds[n] / seconds[plain.get(n, "pipeline")] for n in ours},
        }
        report["overhead"] = {"seconds": seconds, "ratio": ratios}
    if arguments.only != "overhead":
        given = dict(text.split("=", 1) for text in arguments.artefact)
        with tempfile.TemporaryDirectory() as temporary:
            folders = {}
            for name, settings in ARTEFACTS.items():
                folders[name] = Path(given.get(name) or Path(temporary) / name)
                if name not in given:
                    run_verb("apply", name, "scenes", folders[name], settings=settings)
            seconds = measured(gain(runs, folders), arguments.rounds)
        report["gain"] = {"seconds": seconds, "ratio": {name: seconds[name] / seconds["pipeline"] for name in seconds}}
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
