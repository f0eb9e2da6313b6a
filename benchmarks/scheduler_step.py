"""Time per scheduler step without a network: ours against diffusers' scheduler of the same method.

Runs of both schedulers alternate (A B A B), on the same tensors, and the medians' ratio is what counts.
A run takes every step of a plan, as a pipeline does; its start-up (``set_timesteps``) is timed apart.

    python benchmarks/scheduler_step.py [--out scheduler_step.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from steersman.diffusion import DPMSolverPPScheduler, PNDMScheduler


def multistep(**settings: Any) -> tuple[Any, Any]:
    """Ours with the configuration of diffusers' DPMSolverMultistepScheduler, and that scheduler."""
    theirs = diffusers.DPMSolverMultistepScheduler(**settings)
    return DPMSolverPPScheduler.from_config(theirs.config), theirs


CASES = {
    "plms": (PNDMScheduler(variant="plms"), diffusers.PNDMScheduler(skip_prk_steps=True)),
    "f-pndm": (PNDMScheduler(variant="f-pndm"), diffusers.PNDMScheduler(skip_prk_steps=False)),
    "dpm-solver++ of order 2": multistep(solver_order=2),
    "dpm-solver++ of order 3": multistep(solver_order=3),
    "sde-dpm-solver++ of order 2": multistep(solver_order=2, algorithm_type="sde-dpmsolver++"),
}


def seconds(scheduler: Any, output: torch.Tensor, sample: torch.Tensor, steps: int) -> tuple[float, float]:
    """(per step, for ``set_timesteps``) of one run."""
    start = time.perf_counter()
    scheduler.set_timesteps(steps)
    planned = time.perf_counter()
    x = sample
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return (time.perf_counter() - planned) / len(scheduler.timesteps), planned - start


def measure(batch: int, dtype: torch.dtype, steps: int = 50, rounds: int = 30) -> list[dict[str, Any]]:
    """Each case's medians at one batch size of Stable Diffusion's latents, (batch, 4, 64, 64)."""
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(batch, 4, 64, 64, generator=generator).to(dtype) for _ in range(2))
    results = []
    for case, pair in CASES.items():
        times: list[list[tuple[float, float]]] = [[], []]
        for _ in range(rounds):
            for side, scheduler in zip(times, pair, strict=True):
                side.append(seconds(scheduler, output, sample, steps))
        ours, theirs = ([statistics.median(column) for column in zip(*side, strict=True)] for side in times)
        results.append(
            {
                "case": case,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "microseconds_per_step": {"steersman": ours[0] * 1e6, "diffusers": theirs[0] * 1e6},
                "ratio": ours[0] / theirs[0],
                "set_timesteps_ratio": ours[1] / theirs[1],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here, too")
    parser.add_argument("--rounds", type=int, default=30, help="alternating runs of each scheduler")
    arguments = parser.parse_args()
    report = {
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "results": [
            row
            for batch, rounds in ((1, arguments.rounds), (64, max(3, arguments.rounds // 3)))
            for row in measure(batch, torch.float32, rounds=rounds)
        ],
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
