"""The recipe of the page "Stacking methods", as a script that a test runs.

python docs/stack.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from steersman.reference import digits


def stacked(folder: Path, steps: int = 10, size: int = 256) -> tuple[Any, Any, Any]:
    """Images of the stack, of the same stack from its folder, and the report of the steering."""
    pipe = digits.pipeline()
    pipe.set_progress_bar_config(disable=True)

    # --8<-- [start:recipe]
    from steersman.diffusion import (
        Calibration,
        CFGPlusPlus,
        DPMSolver2SAncestralCFGPPScheduler,
        FKSteering,
        load_steered,
        quantize_ptq4dm,
        save_steered,
    )

    def ink(images):  # your reward: images (n, C, H, W) in [0, 1] to (n,)
        return images.flatten(1).mean(1)

    pipe.scheduler = DPMSolver2SAncestralCFGPPScheduler.from_config(pipe.scheduler.config)  # DPM-Solver++, with noise
    CFGPlusPlus(scale=0.6).install(pipe)
    # Quantised last but one, so that it is calibrated on the states of this very sampler and guidance.
    quantize_ptq4dm(pipe, bits=8, guidance=2.0, steps=steps, calibration=Calibration(size=size)).install(pipe)
    steering = FKSteering(ink, scale=20.0, particles=4).install(pipe)

    labels = [3] * 4 + [5] * 4  # 4 particles of each
    run = {"labels": labels, "num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "pt"}
    images = pipe(**run, generator=seeded()).images

    save_steered(pipe, folder)
    again = load_steered(folder, FKSteering={"reward": ink})
    # --8<-- [end:recipe]
    again.set_progress_bar_config(disable=True)
    more = again(**run, generator=seeded()).images
    return images, more, steering.report


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        images, more, report = stacked(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
    print("rewards", report.rewards.tolist(), "the same from the folder:", torch.equal(images, more))
