"""Making adaptive guidance for a pipeline: a calibrated threshold, LinearAG's coefficients, or a searched policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import diffusers
import torch

from steersman.diffusion.adaptive_guidance.calibration import calibrate
from steersman.diffusion.adaptive_guidance.linear import LinearAdaptiveGuidance
from steersman.diffusion.adaptive_guidance.search import Gradient, search_policy
from steersman.diffusion.adaptive_guidance.trajectories import Asked
from steersman.diffusion.asked import asked_of
from steersman.diffusion.images import load_pipeline
from steersman.errors import InputError

Mode = Literal["calibrate", "linear", "search"]
COUNTS = {"calibrate": 64, "linear": 200, "search": 64}


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    mode: Mode = "calibrate",
    scale: float = 7.5,
    steps: int = 20,
    scheduler: str | None = None,
    count: int | None = None,
    batch: int = 32,
    saving: float = 0.25,
    psnr: float | None = None,
    ssim: float | None = None,
    pattern: str = "alternate_then_linear",
    ridge: float = 1e-10,
    intercept: bool = False,
    window: int | None = None,
    rounds: int = 1,
    budget: float | None = None,
    iterations: int = 300,
    gradient: Gradient = "network",
) -> dict[str, Any]:
    """Make a guidance for the pipeline ``subject``, which ``AdaptiveGuidance.from_pretrained(out)`` reads.

    Args:
        subject: a diffusers pipeline folder, or hub id.
        input: prompts or labels, see :func:`~steersman.diffusion.asked.read_asked`. Not needed for pipelines with
            labels.
        out: where the guidance goes.
        seed: of the noise, and of which prompts are taken.
        log: gets a line now and then.
        mode: calibrate (threshold and min_steps), linear (LinearAG's regression) or search (a policy).
        scale, steps: of the runs it is for.
        scheduler: class of steersman's or diffusers' schedulers, in place of the pipeline's own.
        count: prompts or labels; by default 64, and 200 for linear.
        batch: prompts of one run.
        saving, psnr, ssim: of calibrate, see :func:`calibrate`.
        pattern, ridge, intercept, window, rounds: of linear, see :meth:`LinearAdaptiveGuidance.fit`.
        budget, iterations, gradient: of search, see :func:`search_policy`.

    Returns:
        dict: what was chosen, and how like plain guidance it is.

    Raises:
        InputError: a subject, prompts or settings that don't fit together.
    """
    if mode not in get_args(Mode):
        raise InputError("mode", mode, f"one of {', '.join(get_args(Mode))}")
    pipe = load_pipeline(subject)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = _scheduler(scheduler, pipe.scheduler)
    if torch.cuda.is_available():
        pipe.to("cuda")
    count = COUNTS[mode] if count is None else count
    if count < 1:
        raise InputError("count", count, "a whole number from 1")
    asked = in_random_order(asked_of(pipe, input), count, seed)
    shared: dict[str, Any] = {"scale": scale, "steps": steps, "seed": seed, "batch": batch, "log": log}
    if mode == "calibrate":
        found = calibrate(pipe, asked, saving=saving, psnr=psnr, ssim=ssim, **shared)
        found.guidance().save_pretrained(out)
        _record(out, {"scale": scale, "steps": steps, "curves": found.curves.T.tolist(), **found.report()})
        return {"scale": scale, **found.report()}
    if mode == "linear":
        settings: dict[str, Any] = {
            "pattern": pattern,
            "ridge": ridge,
            "intercept": intercept,
            "window": window,
            "rounds": rounds,
        }
        made = LinearAdaptiveGuidance.fit(pipe, asked, **settings, **shared)
        made.save_pretrained(out)
        assert made.coefficients is not None
        linear = [i for i, m in enumerate(made.modes) if m == "linear"]
        return {
            "scale": scale,
            "pattern": " ".join(made.modes),
            "calls": made.cost,
            "residual": float(made.coefficients.residual[linear].mean()),
            "residual_of_copying": float(made.coefficients.copied[linear].mean()),
        }
    searched = search_policy(pipe, asked, budget=budget, iterations=iterations, gradient=gradient, **shared)
    policy = searched.guidance()
    policy.save_pretrained(out)
    facts = {
        "policy": " ".join(policy.names),
        "calls": searched.cost,
        "loss": searched.loss,
        "loss_of_condition_alone": searched.conditional_loss,
    }
    more = {
        "options": searched.options,
        "probabilities": searched.probabilities.tolist(),
        "restarts": searched.restarts,
    }
    _record(out, {"scale": scale, "steps": steps, **facts, **more})
    return facts


def in_random_order(known: Asked, count: int, seed: int) -> Asked:
    """``count`` of what is asked for, in random order, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order = [
        i for _ in range(-(-count // len(known))) for i in torch.randperm(len(known), generator=generator).tolist()
    ]
    return cast(Asked, [known[i] for i in order[:count]])


def _scheduler(name: str, own: Any) -> Any:
    from steersman import diffusion

    kind = getattr(diffusion, name, None) if name in diffusion.__all__ else getattr(diffusers, name, None)
    if not name.endswith("Scheduler") or not isinstance(kind, type):
        raise InputError("scheduler", name, "a scheduler class of steersman.diffusion or diffusers")
    return kind.from_config(own.config)  # type: ignore[attr-defined]


def _record(folder: Path, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made.json").write_text(json.dumps(facts, indent=1) + "\n")
