r"""Steering towards a reward with k particles for each prompt: how much of it, at what diversity, how near to the tilt.

A *run* is k particles of one prompt (or label, or of nothing), from noise that all contenders share; each takes
``calls`` network calls a particle, so that all contenders take equally many. Rewards are compared like with like:

- ``reward``, ``accuracy``: mean over the particles that a run returns (of ``base`` all, of the others resampled ones);
- ``best_reward``, ``best_accuracy``: of the one sample that a run ends with, its best (of ``base`` any).

The unit of repetition is the run: its particles share ancestors. Copies among them are what resampling makes; see
``ancestors``. What samples are asked for, and who judges them (never the reward itself):

- ``gaussians``: reward x_1 (or ``--reward quadratic``); the tilted law is known exactly, and the distance of the
  samples to it is measured, one particle of each run. Few particles are far from it;
- ``digits``: no label is given, and the reward is the log-probability of one under classifier a; judged by b;
- ``scenes``: captions leave position and background unsaid, and the reward is the log-probability of those wanted
  under a small network that is trained on the spot; judged by the reader of pictures;
- a pipeline of yours with ``--reward``, and ``--judge``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steersman import catalog
from steersman.benches._pipelines import (
    SHOWN,
    Host,
    PipelineBench,
    Subject,
    decode,
    most_steps,
    noise_kind,
    prepared,
    run,
    shared_noise,
    watched,
)
from steersman.benches._steering_tasks import (
    Task,
    digits_wanted,
    judged_by,
    labels_in,
    points_tilted,
    scenes_wanted,
    tilt_distance,
    tilted,
)
from steersman.callables import load_callable
from steersman.diffusion import DDIMScheduler
from steersman.diffusion.asked import read_prompts
from steersman.diffusion.fk_steering import FeynmanKac, FKSteering
from steersman.diffusion.fk_steering.rewards import load_reward
from steersman.engine.bench import Figure, Knob, PartInfo, Shape
from steersman.engine.contenders import checked_knobs
from steersman.errors import Inapplicable, InputError, TrialError
from steersman.reference import gaussians
from steersman.report.blocks import Block, Curves, ImageGrid, Line, Note, Scatter

if TYPE_CHECKING:
    from steersman.engine.bench import Row, Setting, TrialLog
    from steersman.engine.comparison import Comparison
    from steersman.engine.contenders import Part
    from steersman.engine.streams import Streams

OWN = ("reward", "particles", "returns", "space", "intermediate", "seed")
"""Settings of FKSteering that are the bench's."""
KEPT = 8
"""Sets of unsteered runs that are kept for contenders that only choose among them."""


class Untouched:
    """k independent samples: the base sampler."""


class BestOfN:
    """k independent samples, of which the one of largest reward is taken."""


class Importance:
    """k independent samples, resampled once at the end with weights exp(λ r).

    Args:
        scale: λ; None is the bench's.
        resampler: see FKSteering.
    """

    def __init__(self, scale: float | None = None, resampler: str = "systematic") -> None:
        self.scale, self.resampler = scale, resampler


@dataclass
class Outcome:
    """What a contender's runs ended with, R runs of k particles (best-of-n: of one).

    Args:
        samples: as the scheduler returned them, (R, m, ...).
        rewards: (R, m).
        ancestors: distinct ones of each run, (R,).
        ess: effective sample size at the first scored step that mattered, (R,).
        reward_calls, network_calls: of all runs.
        seconds: of sampling.
    """

    samples: Tensor
    rewards: Tensor
    ancestors: Tensor
    ess: Tensor
    reward_calls: int
    network_calls: int
    seconds: float


class Steering(PipelineBench):
    """See the module's text."""

    id = "steering"
    shape: Shape = "Sampler"
    default_subject = "digits"
    headline: tuple[str, str] = ("best_accuracy", "calls_used")
    knobs: Mapping[str, Knob] = {
        "calls": Knob(int, (50,), "network calls of a particle", low=1, high=1000),
        "particles": Knob(int, (4,), "particles of a run, k", low=2, high=100_000),
        "scale": Knob(
            float, None, "λ of the tilt exp(λ r) (default: gaussians 4, digits and scenes 1, yours 10)", low=0
        ),
        "runs": Knob(int, 16, "runs of a trial", low=1, high=100_000, sweep=False),
        "reward": Knob(
            str,
            None,
            "file.py:name or http://..., images (n, C, H, W) in [0, 1] to n numbers; gaussians: linear or quadratic",
            sweep=False,
        ),
        "judge": Knob(
            str,
            None,
            "file.py:name, images in [0, 1] (and prompts or labels) to n scores, another than the reward",
            sweep=False,
        ),
        **{name: knob for name, knob in PipelineBench.knobs.items() if name not in ("samples", "data", "judge")},
    }
    figures: Mapping[str, Figure] = {
        "best_accuracy": Figure("", "higher", "quality", "share of runs whose one sample shows what was wanted"),
        "accuracy": Figure("", "higher", "quality", "share of particles that show what was wanted"),
        "best_reward": Figure("", "higher", "quality", "reward of the one sample that a run ends with"),
        "reward": Figure("", "higher", "quality", "mean reward of a run's particles"),
        "best_judge": Figure("", "higher", "quality", "the judge's score of the one sample that a run ends with"),
        "judge": Figure("", "higher", "quality", "the judge's mean score of a run's particles"),
        "sliced_wasserstein": Figure("", "lower", "quality", "sliced Wasserstein-2 distance to the exact tilted law"),
        "wasserstein": Figure("", "lower", "quality", "exact Wasserstein-2 distance to the exact tilted law"),
        "mode_weight_error": Figure("", "lower", "quality", "total variation of the modes' weights in the tilted law"),
        "ancestors": Figure("", "higher", "quality", "distinct ancestors of a run's particles, as a share of k"),
        "diversity": Figure("", "higher", "quality", "root mean square distance of two particles of a run, per number"),
        "ess": Figure("", "neither", "info", "effective sample size at the first scored step, as a share of k"),
        "reward_calls": Figure("calls", "lower", "cost", "rewards that a run took"),
        "calls_used": Figure("calls", "lower", "cost", "rows of the network that a run took"),
        "seconds_per_run": Figure("s", "lower", "cost", "seconds of a run"),
    }

    steering = ("base", "best-of-n", "importance", "fk-steering")
    """Ways of steering; a contender has one (a sampler alone is ``base`` with it)."""

    def __init__(self) -> None:
        self.shared: dict[tuple[Any, ...], Outcome] = {}

    def headline_for(self, rows: Sequence[Row]) -> tuple[str, str]:
        """What reports of these rows lead with: the first of these figures that there is."""
        there = {name for row in rows for name in row.figures}
        found = [name for name in ("best_accuracy", "best_judge", "sliced_wasserstein", "best_reward") if name in there]
        return (found or ["best_reward"])[0], "calls_used"

    # ---------------------------------------------------------------- subject

    def check(self, s: Subject, setting: Setting) -> None:
        if s.kind == "text" and setting["prompts"] is None and s.spec != "scenes":
            raise InputError("prompts", None, "a text file, one prompt a line, for this text-to-image pipeline")
        if setting["prompts"] is not None:
            read_prompts(setting["prompts"])
            if s.kind != "text":
                raise InputError("prompts", setting["prompts"], f"left out: {s.spec} takes no prompts")
        if setting["reward"] is None and s.spec not in ("digits", "scenes") and s.law is None:
            raise InputError("reward", None, "file.py:name or the address of a scorer, for a pipeline of yours")
        guidable = s.kind == "text" or (s.classes and s.pipe.config.get("null_label") is not None)
        if (setting["guidance"] or 1) > 1 and (not guidable or (s.spec == "digits" and setting["reward"] is None)):
            raise InputError("guidance", setting["guidance"], "1 or left out: nothing is asked of this pipeline itself")
        self.task(s, setting, None)

    def task(self, s: Subject, setting: Setting, rng: Streams | None) -> Task:
        """What the setting's runs are asked for; without ``rng`` it is only checked that there is such a task."""
        n, spec = setting["runs"], setting["reward"]
        judge = None if setting["judge"] is None else load_callable(setting["judge"], "judge")
        if s.law is not None:
            return points_tilted(s.law, spec, setting, judge)
        if spec is None and s.spec == "digits":
            labels = labels_in(setting["labels"], 10)
            return digits_wanted(n, labels, rng)
        if spec is None:
            prompts = None if setting["prompts"] is None else read_prompts(setting["prompts"])
            return scenes_wanted(n, prompts, rng)
        if not spec.startswith(("http://", "https://")):
            load_reward(spec)
        given: Any = None
        if s.kind == "text":
            from steersman.reference import scenes

            lines = scenes.captions("held-out") if setting["prompts"] is None else read_prompts(setting["prompts"])
            given = [lines[i % len(lines)] for i in range(n)]
        elif s.classes:
            labels = labels_in(setting["labels"], s.classes)
            if labels is None:
                labels = (
                    torch.zeros(1, dtype=torch.long)
                    if rng is None
                    else torch.randint(s.classes, (n,), generator=rng.torch("labels"))
                )
            given = labels.repeat(-(-n // len(labels)))[:n]
        return Task(given, given, spec, None if judge is None else judged_by(judge, given), 10.0)

    # ---------------------------------------------------------------- contenders

    def baselines(self) -> list[str]:
        return ["base", "best-of-n", "importance", "fk-steering"]

    def parts(self) -> Mapping[str, PartInfo]:
        line = 'FKSteering(reward, potential="{}"{{, knobs}}).install(pipe)'
        own = {
            "base": PartInfo(Untouched, "k independent samples"),
            "best-of-n": PartInfo(BestOfN, "the best of k independent samples", line.format("best-of-n")),
            "importance": PartInfo(Importance, "k samples, resampled at the end", line.format("importance")),
        }
        return own | {name: info for name, info in super().parts().items() if name != "heun" and name != "rk4"}

    def accepts(self, name: str) -> PartInfo | None:
        """Any scheduler class of diffusers, and every sampler and guidance of the catalogue."""
        found = catalog.cards().get(name)
        if found is not None and found.room == "diffusion" and {"sampling", "guidance"} & set(found.benches):
            return PartInfo(found.load(), found.summary, found.line)
        return super().accepts(name)

    def mount(self, h: Host, part: Part) -> None:
        info = self.parts().get(part.id)
        build = info.build if info is not None else FKSteering if part.id == "fk-steering" else None
        if build not in (Untouched, BestOfN, Importance, FKSteering):
            super().mount(h, part)
            if h.real and h.subject.law is None:
                raise InputError("methods", h.label, "another part: real is for gaussians, whose tilted law is known")
            return
        if any(isinstance(m, _Steered) for m in h.installs):
            raise InputError("methods", h.label, "a contender with one way of steering")
        h.parts.append(part)
        knobs = checked_knobs(build, part)
        if build is FKSteering:
            for name in OWN:
                if name in knobs:
                    raise InputError(f"knob of {part.id}", name, "left out: the bench sets it")
            FKSteering(_nothing, **knobs)  # wrong values are refused here
        elif build is Importance:
            FeynmanKac(2, "importance", 1.0, **{k: v for k, v in knobs.items() if k != "scale"})
        h.installs.append(_Steered(part.id, knobs))

    # ---------------------------------------------------------------- trial

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, k = h.subject, setting["particles"]
        task = self.task(s, setting, rng)
        self.fit(h, rng, log)
        method = next((m for m in h.installs if isinstance(m, _Steered)), _Steered("base", {}))
        h.installs = [m for m in h.installs if not isinstance(m, _Steered)]
        scale = task.scale if setting["scale"] is None else setting["scale"]
        if h.real:
            assert s.law is not None
            if task.tilt is None:
                raise Inapplicable("the tilted law of this reward is not known")
            x = task.tilt(scale).sample(setting["runs"] * k, rng.torch("real"), torch.float64)[0][:, :, None, None]
            samples = x.unflatten(0, (-1, k))
            rewards = _scored(task, x, torch.arange(setting["runs"]).repeat_interleave(k)).reshape(-1, k)
            full = torch.full((len(samples),), float(k))
            outcome = Outcome(samples, rewards, full, full, 0, 0, 0.0)
            return self._figures(h, "real", outcome, task, scale, rng, log)
        outcome = self._sampled(h, method, task, scale, rng, log)
        figures = self._figures(h, method.id, outcome, task, method.knobs.get("scale") or scale, rng, log)
        runs = setting["runs"]
        figures["reward_calls"] = outcome.reward_calls / runs
        figures["calls_used"] = outcome.network_calls / runs
        figures["seconds_per_run"] = outcome.seconds / runs
        return figures

    def _sampled(self, h: Host, method: _Steered, task: Task, scale: float, rng: Streams, log: TrialLog) -> Outcome:
        """The contender's runs. Those that only choose at the end share their samples."""
        if method.id == "fk-steering" and method.knobs.get("potential") not in ("importance", "best-of-n"):
            knobs = {"scale": scale} | dict(method.knobs)
            return self._runs(h, knobs, task, rng, log)
        setting = h.setting
        below = repr([part for part in h.parts if part.id not in self.steering])
        key = (id(h.subject), rng.base, repr(sorted(setting.items(), key=str)), below)
        if key not in self.shared:
            while len(self.shared) >= KEPT:
                self.shared.pop(next(iter(self.shared)))
            self.shared[key] = self._runs(h, {"potential": "best-of-n"}, task, rng, log)
        plain = self.shared[key]
        if method.id == "base":
            return plain
        potential = method.knobs.get("potential", method.id)
        if potential == "best-of-n":
            return replace(plain, samples=plain.samples[:, :1], rewards=plain.rewards[:, :1])
        # Back to the order in which they were drawn: they come sorted by reward.
        own = method.knobs.get("scale")
        fk = FeynmanKac(
            setting["particles"],
            "importance",
            scale if own is None else own,
            method.knobs.get("resampler", "systematic"),
        )
        order = torch.rand(plain.rewards.shape, generator=rng.torch("order")).argsort(1)
        samples, rewards = _taken(plain.samples, order), plain.rewards.gather(1, order)
        state, scored = fk.step(fk.init(len(rewards)), rewards, True, generator=rng.torch("resampling"))
        return replace(
            plain,
            samples=_taken(samples, scored.index),
            rewards=rewards.gather(1, scored.index),
            ancestors=state.distinct.double(),
            ess=scored.ess,
        )

    @torch.no_grad()
    def _runs(self, h: Host, knobs: Mapping[str, Any], task: Task, rng: Streams, log: TrialLog) -> Outcome:
        s, setting = h.subject, h.setting
        k, R = setting["particles"], setting["runs"]
        scheduler = h.scheduler
        if scheduler is None:
            if noise_kind(h.pipe.scheduler) != "diffusion":
                raise Inapplicable("name a sampler that draws noise: the default is ddim:eta=1 for diffusion")
            scheduler = DDIMScheduler.from_config(h.pipe.scheduler.config, eta=1.0)
        if noise_kind(scheduler) != noise_kind(h.pipe.scheduler):
            theirs, ours = type(h.pipe.scheduler).__name__, type(scheduler).__name__
            raise Inapplicable(f"{ours} is for another kind of noise than the pipeline's {theirs}")
        steps = most_steps(scheduler, setting["calls"])
        noise = shared_noise(s, R * k, rng)
        each = max(1, _rows_at_once(setting, noise) // k)
        now: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
        reward: Any = task.reward
        if not isinstance(reward, str):
            function = task.reward

            def reward(samples: Tensor) -> Tensor:
                return function(samples, now[0])  # type: ignore[operator]

        elif s.law is not None:
            points = load_callable(task.reward, "reward")  # type: ignore[arg-type]

            def reward(samples: Tensor) -> Tensor:
                return points(samples.flatten(1))

        steering = FKSteering(
            reward,
            particles=k,
            space="latent" if s.law is not None else "image",
            seed=rng.seed("resampling") % 2**31,
            **knobs,
        )
        steered = replace(h, scheduler=scheduler, installs=[*h.installs, steering])
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        calls, started = 0, time.perf_counter()
        extra = {"eta": 1.0} if _takes_eta(s, scheduler) else {}
        with prepared(steered, scheduler), watched(steered, log, -(-R // each)) as watch:
            for start in range(0, R, each):
                count = min(each, R - start)
                now[0] = torch.arange(start, start + count).repeat_interleave(k)
                given = task.given
                if given is not None:
                    given = given[now[0]] if isinstance(given, Tensor) else [given[i] for i in now[0].tolist()]
                watch.begin()
                x = run(
                    steered,
                    noise[start * k : (start + count) * k],
                    given,
                    rng.torch("sampler", start),
                    num_inference_steps=steps,
                    **extra,
                )
                watch.verify()
                report = steering.report
                calls += report.reward_calls
                rewards = report.rewards.reshape(count, k)
                ancestors = report.ancestors.reshape(count, k)
                distinct = torch.tensor([len(set(row)) for row in ancestors.tolist()], dtype=torch.float64)
                parts.append((x.unflatten(0, (count, k)), rewards, distinct, report.steps[0].ess))
        samples, rewards, ancestors, ess = (torch.cat(column) for column in zip(*parts, strict=True))
        if not bool(samples.isfinite().all()):
            raise TrialError(f"the samples of {h.label} are not finite, though the network's outputs are")
        if not bool(rewards.isfinite().all()):
            lost = int((~rewards.isfinite()).any(1).nonzero()[0])
            raise TrialError(f"run {lost} of {h.label} has particles without a reward, so that its mean is not known")
        return Outcome(samples, rewards, ancestors, ess, calls, watch.rows, time.perf_counter() - started)

    def _figures(
        self, h: Host, kind: str, o: Outcome, task: Task, scale: float, rng: Streams, log: TrialLog
    ) -> dict[str, float]:
        s, k = h.subject, h.setting["particles"]
        R, m = o.rewards.shape
        runs = torch.arange(R)
        best = o.rewards.argmax(1, keepdim=True)
        figures: dict[str, float] = {}

        def note(name: str, values: Tensor) -> None:
            log.per_item(name, values.double().tolist())
            figures[name] = float(values.double().mean())

        plain = kind in ("base", "real")
        note("best_reward", o.rewards.mean(1) if plain else o.rewards.gather(1, best)[:, 0])
        if m > 1:
            note("reward", o.rewards.mean(1))
            figures["ancestors"] = float(o.ancestors.mean()) / k
            figures["ess"] = float(o.ess.mean()) / k
            flat = o.samples.flatten(2).double()
            spread = (flat - flat.mean(1, keepdim=True)).square().mean(2).sum(1) * 2 / (m - 1)
            figures["diversity"] = float(spread.mean().sqrt())
        if s.law is not None:
            # One particle of each run, so that all points are independent.
            pick = torch.randint(m, (R, 1), generator=rng.torch("pick"))
            points = _taken(o.samples, pick).reshape(R, -1).double()
            log.arrays("points", points=points.numpy())
            if task.tilt is not None:
                figures |= tilt_distance(task.tilt(scale), points, rng)
            return figures
        images = decode(s, o.samples.flatten(0, 1), 256).clamp(-1, 1)
        shown = _taken(images.unflatten(0, (R, m)), best if not plain else torch.zeros_like(best))[:SHOWN, 0]
        log.images("samples", ((shown + 1) / 2).permute(0, 2, 3, 1).numpy())
        if task.wanted is not None:
            log.texts("wanted", [{"wanted": str(w)} for w in list(task.wanted)[:SHOWN]])
        if task.judge is not None:
            scores = task.judge(images, runs.repeat_interleave(m)).double().reshape(R, m)
            name = "accuracy" if s.spec in ("digits", "scenes") and h.setting["judge"] is None else "judge"
            note(f"best_{name}", scores.mean(1) if plain else scores.gather(1, best)[:, 0])
            if m > 1:
                note(name, scores.mean(1))
        return figures

    # ---------------------------------------------------------------- report

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = []
        points = str(comparison.config["subject"]).partition(":")[0] == "gaussians"
        for setting in comparison.settings:
            kind = "points" if points else "samples"
            shown = {label: next(iter(arrays.values())) for label, arrays in comparison.saved(kind, **setting).items()}
            if shown and points:
                law = gaussians.mixture(comparison.config["subject"])
                row = comparison.select(**setting)[0]
                target = None
                if row.setting["reward"] in (None, "linear", "quadratic"):
                    scale = 4.0 if row.setting["scale"] is None else row.setting["scale"]
                    exact = tilted(law, row.setting["reward"] or "linear", scale)
                    target = exact.sample(500, torch.Generator().manual_seed(0))[0].numpy()
                caption = "One particle of each run; behind them is the exact tilted law."
                blocks.append(Scatter("Samples", shown, target, caption=caption, setting=setting))
            elif shown:
                caption = "The one sample that each run ends with; each column is a run, from the same noise."
                blocks.append(ImageGrid("Samples", shown, caption=caption, setting=setting))
        blocks += _against_particles(comparison)
        text = (
            "A run's particles share ancestors, so they are no independent samples: intervals are over runs or seeds. "
            "With few particles steering is far from the tilted law; copies among the particles are expected."
        )
        return [*blocks, Note(text)]


class _Steered:
    """What a contender steers with: a part's id and its knobs; the steering itself is made for each trial."""

    def __init__(self, id: str, knobs: Mapping[str, Any]) -> None:
        self.id, self.knobs = id, knobs


# -------------------------------------------------------------------- pieces


def _nothing(images: Tensor) -> Tensor:
    return torch.zeros(len(images))


def _scored(task: Task, samples: Tensor, runs: Tensor) -> Tensor:
    if isinstance(task.reward, str):
        return torch.as_tensor(load_callable(task.reward, "reward")(samples.flatten(1))).double()
    return task.reward(samples, runs).double()


def _taken(samples: Tensor, index: Tensor) -> Tensor:
    """``samples`` (R, k, ...) at indices (R, m) of each run."""
    return samples[torch.arange(len(samples))[:, None], index]


def _rows_at_once(setting: Setting, noise: Tensor) -> int:
    """Rows of one network call: by default as many as keep a batch of latents about 65,000 numbers large."""
    return setting["batch"] or min(4096, max(4, 2**16 // noise[0].numel()))


def _takes_eta(s: Subject, scheduler: Any) -> bool:
    """Whether the pipeline must be told to draw noise: diffusers' DDIM is deterministic unless the call has eta."""
    import inspect

    return "eta" in inspect.signature(type(scheduler).step).parameters


def _against_particles(comparison: Comparison) -> list[Block]:
    """Figures against the number of particles, where it varies."""
    if "particles" not in comparison.config["grid"]:
        return []
    blocks: list[Block] = []
    others = {k: v for k, v in comparison.config["grid"].items() if k != "particles"}
    settings: list[dict[str, Any]] = [{}]
    for name, values in others.items():
        settings = [{**setting, name: value} for setting in settings for value in values]
    for figure in ("best_accuracy", "best_reward", "reward", "sliced_wasserstein", "ancestors"):
        for setting in settings:
            lines: dict[str, Line] = {}
            for label in comparison.contenders:
                rows = [row for row in comparison.select(label, **setting) if figure in row.figures]
                counts = sorted({row.setting["particles"] for row in rows})
                if len(counts) > 1:
                    means = [
                        float(np.mean([row.figures[figure] for row in rows if row.setting["particles"] == count]))
                        for count in counts
                    ]
                    lines[label] = Line(counts, means)
            if lines:
                title = f"{Steering.figures[figure].help.capitalize()}, against the particles"
                blocks.append(Curves(title, lines, "particles", figure, log_x=True, setting=setting))
    return blocks
