r"""Sampling with a given number of network calls: which sampler makes the most of them.

All contenders start from the same noise and labels (or prompts), with the settings of the pipeline's own
scheduler (its spacing of timesteps too); each takes the most steps that fit into the calls. What is
measured depends on the subject:

- ``gaussians`` (points in the plane): sliced and exact Wasserstein distance to exact samples, mode weights
  (of a mode that is asked for, with guidance, whose law nobody knows, only the distance of the last line);
- pipelines with real images (``digits`` and ``scenes`` bring their own): Frechet and kernel distance in the
  features of a judge, precision and recall, and the share of samples that show what was asked for;
- any model, without data: how far each sample ends from where the model's own probability flow takes the
  same noise, from the sampler's first timestep down by all training times (:math:`\sqrt{\mathrm{mean}\,(x - x^*)^2}`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steersman.benches._pipelines import (
    SHOWN,
    Host,
    PipelineBench,
    asked_for,
    batch_size,
    compared_with,
    decode,
    most_steps,
    noise_kind,
    prepared,
    run,
    sample,
    scheduled,
    shared_noise,
    stand_ins,
)
from steersman.diffusion import HeunScheduler
from steersman.engine.bench import Figure, Knob, Shape
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError
from steersman.reference import gaussians, image_metrics, point_metrics
from steersman.report.blocks import Block, ImageGrid, Note, Scatter

if TYPE_CHECKING:
    from steersman.engine.bench import Row, Setting, TrialLog
    from steersman.engine.comparison import Comparison
TRACED = 16
"""Samples of a network whose fine trajectory is computed (it takes 1999 calls)."""
FINE_STEPS = 1000


class Sampling(PipelineBench):
    """See the module's text."""

    id = "sampling"
    shape: Shape = "Sampler"
    headline: tuple[str, str] = ("frechet", "calls")
    knobs: Mapping[str, Knob] = {
        "calls": Knob(int, (10, 20, 50), "network calls of a sample", low=1, high=1000),
        **PipelineBench.knobs,
        "trajectory": Knob(
            bool, None, "compare with the fine trajectory (default: for points and where there is no data)", sweep=False
        ),
    }
    figures: Mapping[str, Figure] = {
        "frechet": Figure("", "lower", "quality", "Frechet distance to real images in the judge's features"),
        "kernel": Figure("", "lower", "quality", "unbiased cubic MMD² to real images in the judge's features"),
        "precision": Figure("", "higher", "quality", "share of samples among the real images (3 neighbours)"),
        "recall": Figure("", "higher", "quality", "share of real images among the samples (3 neighbours)"),
        "accuracy": Figure(
            "", "higher", "quality", "share of samples that show what was asked for, as the judge sees it"
        ),
        "attribute_accuracy": Figure("", "higher", "quality", "share of the attributes asked for that samples show"),
        "sliced_wasserstein": Figure("", "lower", "quality", "sliced Wasserstein-2 distance to exact samples"),
        "wasserstein": Figure("", "lower", "quality", "exact Wasserstein-2 distance to exact samples"),
        "mode_weight_error": Figure("", "lower", "quality", "total variation of the modes' weights"),
        "mode_coverage": Figure("", "higher", "quality", "share of modes with at least a fifth of their mass"),
        "on_manifold": Figure("", "higher", "quality", "share of points within 3 deviations of a mode"),
        "cross_entropy": Figure("nats", "neither", "info", "-mean log p of the samples under the exact law"),
        "trajectory_error": Figure(
            "", "lower", "quality", "root mean square distance from the model's own 1000-step trajectory"
        ),
        "calls_used": Figure("calls", "lower", "cost", "network calls that the contender's steps took"),
        "seconds_per_sample": Figure("s", "lower", "cost", "seconds of sampling per sample"),
    }

    def headline_for(self, rows: Sequence[Row]) -> tuple[str, str]:
        """What reports of these rows lead with: the first of these figures that there is."""
        there = {name for row in rows for name in row.figures}
        found = [name for name in ("frechet", "sliced_wasserstein", "trajectory_error") if name in there]
        return (found or ["frechet"])[0], "calls"

    # ---------------------------------------------------------------- contenders

    def baselines(self) -> list[str]:
        return ["ddim", "euler", "heun", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]

    # ---------------------------------------------------------------- trial

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, n, data = h.subject, setting["samples"], self.data(h.subject, setting)
        labels = asked_for(s, data, setting, rng)
        figures: dict[str, float] = {}
        self.fit(h, rng, log)
        if h.real:
            samples = stand_ins(s, data, labels, setting, rng)
        else:
            scheduler = h.scheduler or type(h.pipe.scheduler).from_config(h.pipe.scheduler.config)
            if noise_kind(scheduler) != noise_kind(h.pipe.scheduler):
                theirs, ours = type(h.pipe.scheduler).__name__, type(scheduler).__name__
                raise Inapplicable(f"{ours} is for another kind of noise than the pipeline's {theirs}")
            # What starts elsewhere than in the noise plans by calls, and has no trajectory from the noise.
            whole = not hasattr(h.pipe, "plan")
            if whole:
                steps = most_steps(scheduler, setting["calls"])
            else:
                steps = 0 if h.pipe.lookup_only else setting["calls"]
            figures["calls_used"] = _calls(h.pipe, scheduler, steps)
            started = time.perf_counter()
            samples = sample(h, scheduler, steps, labels, rng, log)
            figures["seconds_per_sample"] = (time.perf_counter() - started) / n
            wanted = setting["trajectory"]
            if whole and (wanted or (wanted is None and (s.kind == "points" or data is None))):
                fine = _fine_trajectory(h, float(scheduler.timesteps[0]), labels, rng, log)
                figures["trajectory_error"] = image_metrics.endpoint_error(samples[: len(fine)], fine)
        if s.law is not None:
            log.arrays("points", points=samples.flatten(1).numpy())
            if labels is not None:
                return figures
            exact, _ = s.law.sample(n, rng.torch("exact"), torch.float64)
            return figures | point_metrics.point_metrics(s.law, samples.flatten(1), exact)
        shown = samples if data is not None else samples[:SHOWN]
        images = samples if h.real else decode(s, shown, batch_size(s, setting))
        log.images("samples", ((images[:SHOWN] + 1) / 2).permute(0, 2, 3, 1).numpy())
        if data is not None:
            real = compared_with(data, labels, setting)
            figures |= image_metrics.feature_metrics(real, image_metrics.features(data.judge, images))
            if data.score is not None and labels is not None:
                figures |= data.score(images, labels)
        return figures

    # ---------------------------------------------------------------- report

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = []
        law = None
        if str(comparison.config["subject"]).partition(":")[0] == "gaussians":
            law = gaussians.mixture(comparison.config["subject"])
        for setting in comparison.settings:
            kind = "samples" if law is None else "points"
            shown = {label: next(iter(arrays.values())) for label, arrays in comparison.saved(kind, **setting).items()}
            if shown and law is not None:
                target, _ = law.sample(500, Streams(0).torch("target"))
                caption = "All panels start from the same noise; behind them is the exact law."
                blocks.append(Scatter("Samples", shown, target.numpy(), caption=caption, setting=setting))
            elif shown:
                caption = "Each column starts from the same noise, with the same label or prompt."
                blocks.append(ImageGrid("Samples", shown, caption=caption, setting=setting))
        there = {name for row in comparison.rows for name in row.figures}
        if "frechet" in there or "wasserstein" in there:
            blocks.append(
                Note(
                    "Distances between sets of samples fall with the number of samples and never reach 0: compare "
                    "them with the contender real (real images or exact samples in the samples' place), and not with "
                    "numbers from elsewhere."
                )
            )
        if "trajectory_error" in there:
            blocks.append(
                Note(
                    "The trajectory error tells how well a sampler solves the model's own equation from the same "
                    "noise, not how good the samples look; stochastic samplers don't follow it by design."
                )
            )
        return blocks


def _calls(pipe: Any, scheduler: Any, steps: int) -> int:
    """Network calls of a run."""
    if hasattr(pipe, "plan"):
        with scheduled(pipe, scheduler):
            try:
                return len(pipe.plan(steps))
            except InputError as error:
                raise Inapplicable(str(error)) from error
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


@torch.no_grad()
def _fine_trajectory(h: Host, start: float, labels: Any, rng: Streams, log: TrialLog) -> Tensor:
    """Where the first samples' noise goes under Heun's method over all training times from ``start`` down.

    Heun's method because it is no contender's special case; DDIM at 1000 steps is itself about 0.001 off.
    """
    s, setting = h.subject, h.setting
    count = setting["samples"] if s.kind == "points" else min(TRACED, setting["samples"])
    key = (rng.base, start, count, setting["guidance"], setting["prompts"], id(h.pipe.unet))
    if key not in s.traces:
        log.progress(0, 1, "fine trajectory")
        own = h.pipe.scheduler
        plan: dict[str, Any]
        if noise_kind(own) == "diffusion":
            last = own.config.num_train_timesteps - 1
            plan = {"timesteps": np.unique(np.linspace(0, min(start, last), FINE_STEPS).round())[::-1].tolist()}
            scheduler = HeunScheduler.from_config(own.config)
        else:
            plan, scheduler = {"num_inference_steps": FINE_STEPS}, type(own).from_config(own.config)
        noise = shared_noise(s, setting["samples"], rng)[:count]
        batch = batch_size(s, setting)
        parts = []
        fine = Host(s, setting, h.pipe, guidance=h.guidance)
        with prepared(fine, scheduler):
            for begin in range(0, count, batch):
                part = slice(begin, min(begin + batch, count))
                wanted = None if labels is None else labels[part]
                parts.append(run(fine, noise[part], wanted, rng.torch("sampler", begin), **plan))
        s.traces[key] = torch.cat(parts)
    end = s.traces[key]
    return end.clamp(-1, 1) if s.kind == "pixels" else end
