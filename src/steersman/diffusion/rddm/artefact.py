"""``steersman apply rddm``: a restorer from a user's pairs, or a generator from images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steersman.diffusion.rddm.pairs import read_pairs
from steersman.diffusion.rddm.training import train_rddm


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    prediction_type: Literal[
        "res", "epsilon", "res_noise", "x0_noise", "res_add_noise", "x0_add_noise", "sample", "auto"
    ] = "res",
    sum_scale: float = 1.0,
    condition: Literal["time", "levels"] = "time",
    nets: int = 1,
    see_input: bool = True,
    loss: Literal["l1", "l2"] | None = None,
    steps: int = 2000,
    batch_size: int = 16,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 2e-4,
    optimizer: Literal["adam", "radam"] = "adam",
    ema_decay: float = 0.995,
    width: int = 32,
    crop: int | None = None,
    flip: bool = False,
    checkpoints: str | None = None,
) -> dict[str, Any]:
    """Train on pairs of images and save the pipeline's folder.

    Args:
        subject: pairs: a folder with ``input`` and ``target`` (and ``mask``), folders or .flist files, or an .npz of
            such arrays; or images alone, for generation.
        input: the same, in place of the subject's.
        out: where the pipeline folder goes.
        seed: of everything random.
        log: gets a line now and then.
        prediction_type: what the network gives: res, epsilon, res_noise, x0_noise, res_add_noise, x0_add_noise, sample,
            or auto (res or epsilon, whichever AOSA chooses).
        sum_scale: variance of the noise at the start.
        condition: what networks are told: time or levels.
        nets: 2 gives the two heads of res_noise and the like a network each.
        see_input: whether the network sees the input beside the state.
        loss: l1 or l2; by default l1 for pairs, l2 for generation.
        steps, batch_size, gradient_accumulation_steps, learning_rate, optimizer, ema_decay: of the training.
        width: channels of the network, a multiple of 4.
        crop: side of the random squares that are trained on; by default whole images.
        flip: mirror half of the pairs.
        checkpoints: a folder for checkpoints, from which an interrupted training goes on.

    Returns:
        dict: the last loss, AOSA's choice and path, and what was done.

    Raises:
        InputError: pairs or settings that don't fit together.
    """
    pairs = read_pairs(subject if input is None else input)
    recent: list[float] = []

    def report(step: int, value: float) -> None:
        recent.append(value)
        if step % max(steps // 20, 1) == 0 or step == steps:
            log(f"step {step}/{steps}: loss {np.mean(recent):.4g}")
            recent.clear()

    made = train_rddm(
        pairs,
        prediction_type=prediction_type,
        sum_scale=sum_scale,
        condition=condition,
        nets=nets,  # type: ignore[arg-type]
        see_input=see_input,
        loss=loss,
        width=width,
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        optimizer=optimizer,
        ema_decay=ema_decay,
        crop=crop,
        flip=flip,
        seed=seed,
        output_dir=checkpoints,
        resume=checkpoints is not None,
        callback=report,
    )
    made.pipeline.save_pretrained(out)
    networks = [made.pipeline.unet, made.pipeline.noise_unet]
    facts: dict[str, Any] = {
        "prediction_type": made.pipeline.scheduler.config.prediction_type,
        "pairs": len(pairs),
        "steps": len(made.losses),
        "loss": float(np.mean(made.losses[-max(steps // 20, 1) :])) if made.losses else None,
        "parameters": sum(p.numel() for net in networks if net is not None for p in net.parameters()),
        "seconds": made.seconds,
    }
    if made.choice is not None:
        facts |= {"chosen": made.choice, "lambda": made.lambdas[-1], "undecided_steps": len(made.lambdas) - 1}
    return facts
