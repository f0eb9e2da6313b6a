"""APTP's claims on ``scenes``: experts for prompts that say more or less.

A prompt's difficulty is planted: its caption says from none to all five attributes of a scene, each left out with
probability 0.4, and a picture is right if all that is said is in it. Each seed draws its own pictures and captions of
the training combinations, trains its own router and its own experts. Prompts of the figures are of held-out
combinations; they are routed as in use, without transport.

All contenders have the same budget, met by the hard, cut networks weighted by how many training prompts go to each
(what held-out prompts take is a figure), and see as many images in fine-tuning, up to rounding: a single network takes
as many steps as all experts together. What a trial reports beside the oracle's matches is the *error*, the squared
distance of an expert's output from the whole network's on noised held-out pictures, relative to the latter's square:
it can be seen before images are good.

- ``aptp:experts=1``: one learned architecture for all prompts. ``random``, ``magnitude``: one that is not learned.
- ``aptp:transport=false``: codes by the largest cosine in training, too.
- ``aptp:routing=random``: the same experts, each used as often, by prompts at random.
- ``aptp:balanced=true``: codes' similarities offset so that training prompts spread equally (not in the paper).

At scale quick the router's training and the fine-tuning are so short that pictures of pruned networks are poor. The
router's rate was chosen from five values on one fit of another seed, by the errors of ``aptp`` and of one learned
architecture, which the same value was best for.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from steersman.benches._pipelines import Host, PipelineBench, Subject, decode, run, shared_noise
from steersman.diffusion.aptp import PromptRoutedPruner
from steersman.diffusion.aptp.training import encoded
from steersman.engine.bench import Figure, Knob, PartInfo, Setting, Shape, TrialLog
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.evidence.study import Study
from steersman.reference import image_metrics, scenes

UNSAID, RATE = 0.4, 0.4
LEVELS = (100, 400, 700)
"""Timesteps of the error."""
EASY, HARD = (0, 1, 2), (4, 5)
"""Attributes that easy and hard captions say."""
PERMUTATIONS = 999


@dataclass
class FreshExperts:
    """The part ``aptp``: experts that each seed makes anew.

    Args:
        experts, architecture, transport, balanced: of :class:`PromptRoutedPruner`.
        routing: learned or random, of the pipeline.
    """

    experts: int = 4
    architecture: str = "learned"
    transport: bool = True
    balanced: bool = False
    routing: str = "learned"


@dataclass
class Prompts:
    """Captions with a known difficulty, and pictures of them."""

    images: Tensor
    captions: list[str]
    said: np.ndarray = field(default_factory=lambda: np.zeros(0))


class PromptExperts(PipelineBench):
    """Experts at one budget of multiply-adds, made for the seed, on prompts of planted difficulty."""

    id = "prompt-experts"
    shape: Shape = "Recipe"
    headline: tuple[str, str] = ("error", "multiply_adds")
    default_subject = "scenes"
    knobs: Mapping[str, Knob] = {
        **PipelineBench.knobs,
        "budget": Knob(float, (0.8,), "share of the multiply-adds that is left", low=0.1, high=1),
        "pictures": Knob(int, 256, "that a seed trains on", low=16, sweep=False),
        "steps": Knob(int, 40, "of the router's training", low=0, sweep=False),
        "finetune": Knob(int, 8, "steps of fine-tuning, of all experts together", low=0, sweep=False),
        "drawn": Knob(int, 24, "samples that are drawn", low=0, sweep=False),
        "samples": Knob(int, 384, "held-out prompts", low=16, sweep=False),
        "calls": Knob(int, 8, "steps of DDIM for a sample", low=1, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "error": Figure("", "lower", "quality", "squared distance from the whole network's output, relative"),
        "error_hard": Figure("", "lower", "quality", "of captions that say at least four attributes"),
        "match": Figure("", "higher", "quality", "share of samples that show all that was said"),
        "match_easy": Figure("", "higher", "quality", "of captions that say at most two attributes"),
        "match_hard": Figure("", "higher", "quality", "of captions that say at least four attributes"),
        "frechet": Figure("", "lower", "quality", "Frechet distance to pictures of the same captions"),
        "multiply_adds": Figure("", "lower", "cost", "share of the whole network's, by held-out prompts' use"),
        "multiply_adds_training": Figure("", "lower", "cost", "share of the whole network's, by training prompts' use"),
        "seconds_per_sample": Figure("s", "lower", "cost", "seconds of sampling"),
        "entropy": Figure("", "higher", "quality", "of the experts' use by held-out prompts, over log K"),
        "alive": Figure("", "neither", "info", "experts with training prompts"),
        "correlation": Figure("", "higher", "quality", "Spearman's, of a prompt's multiply-adds and difficulty"),
        "chance": Figure("", "lower", "info", "permutations of prompts with a correlation as large"),
        "range": Figure("", "neither", "info", "multiply-adds of the largest expert less those of the smallest"),
        "predictor_gradient": Figure("", "neither", "info", "norm of the predictor's gradient in the last steps"),
    }

    def __init__(self) -> None:
        self._routers: dict[tuple[Any, ...], PromptRoutedPruner] = {}
        self._wanted: dict[int, tuple[Any, ...]] = {}

    def baselines(self) -> list[str]:
        return ["whole"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "aptp": PartInfo(FreshExperts, "experts of the seed's own"),
            "whole": PartInfo(Whole, "the network as it is"),
        }

    def accepts(self, name: str) -> PartInfo | None:
        return None

    def check(self, s: Subject, setting: Setting) -> None:
        if s.spec != "scenes":
            raise InputError("subject", s.spec, "scenes, whose captions have a known difficulty")

    def mount(self, h: Host, part: Part) -> None:
        h.parts.append(part)
        if part.id not in self.parts() or len(h.parts) > 1:
            raise InputError("methods", h.label, "aptp or whole, alone")
        h.installs.append(self.parts()[part.id].build(**checked_knobs(self.parts()[part.id].build, part)))

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # empty experts are a figure here
            return self._trial(h, setting, rng, log)

    def _trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, made = h.subject, h.installs.pop()
        prompts = captioned(setting["samples"], "held-out", rng.torch("prompts"))
        figures: dict[str, float] = {}
        if isinstance(made, Whole):
            networks, where, pipe = {0: s.pipe.unet}, np.zeros(len(prompts.captions), int), s.pipe
            macs = {0: 1.0}
        else:
            pruner = self.pruned(s, made, setting, rng, log)
            pipe = pruner.pipeline(routing=made.routing)
            networks, where, macs = pruner.experts, np.array(pipe.route(prompts.captions)), pruner.macs
            report = pruner.report()
            figures["multiply_adds_training"] = report["multiply_adds"]
            figures["alive"] = report["experts"]
            if pruner.history:
                last = [entry["predictor_gradient"] for entry in pruner.history[-10:]]
                figures["predictor_gradient"] = float(np.mean(last))
            if pruner.config.experts > 1:
                figures |= use(where, np.array([macs[k] for k in where]), prompts.said, made.experts, rng)
                figures["range"] = max(macs.values()) - min(macs.values())
        figures["multiply_adds"] = float(np.mean([macs[int(k)] for k in where]))
        error = self.error(s, networks, where, prompts, rng)
        log.per_item("error", error.tolist())
        figures["error"] = float(error.mean())
        figures["error_hard"] = float(error[np.isin(prompts.said[: len(error)], HARD)].mean())
        if setting["drawn"]:
            figures |= self.drawn(h, pipe, prompts, rng, log)
        return figures

    def pruned(
        self, s: Subject, made: FreshExperts, setting: Setting, rng: Streams, log: TrialLog
    ) -> PromptRoutedPruner:
        """Router, experts, fine-tuning; contenders that differ only after the router's training share it."""
        import copy

        settings = {
            "budget": setting["budget"],
            "experts": made.experts if made.architecture == "learned" else 1,
            "architecture": made.architecture,
            "transport": made.transport,
            "steps": setting["steps"],
        }
        key = (rng.base, *settings.values())
        of_experts = (*key, made.balanced, setting["finetune"])
        if of_experts in self._routers:
            return self._routers[of_experts]
        if key not in self._routers:
            data = captioned(setting["pictures"], "train", rng.torch("training"))
            pruner = PromptRoutedPruner(
                s.pipe,
                batch_size=16,
                shrink=2,
                warm_start=setting["steps"] // 3,
                warmup=5,
                learning_rate=RATE,
                scale_learning_rate=False,
                finetune_batch_size=16,
                finetune_learning_rate=3e-4,
                finetune_warmup=0,  # or few steps for each of several experts would be smaller ones, too
                seed=rng.seed("fit") % 2**31,
                progress=lambda line: log.progress(0, 1, line),
                **settings,
            )
            self._routers[key] = pruner.fit(data.images, data.captions)
        pruner = copy.copy(self._routers[key])
        pruner.router, pruner.config = copy.deepcopy(pruner.router), copy.copy(pruner.config)
        pruner.config.balanced, pruner.finetuning = made.balanced, {}
        pruner.prune()
        if setting["finetune"]:
            pruner.finetune(max(1, round(setting["finetune"] / len(pruner.experts))))
        self._routers[of_experts] = pruner
        return pruner

    @torch.no_grad()
    def error(
        self, s: Subject, networks: Mapping[int, Any], where: np.ndarray, prompts: Prompts, rng: Streams
    ) -> np.ndarray:
        """‖s - t‖²/‖t‖² of each held-out prompt, over three noise levels; t is the whole network's output."""
        n = min(len(where), 48)
        if rng.base not in self._wanted:
            x = encoded(s.pipe, prompts.images[:n])
            noise = torch.randn(x.shape, generator=rng.torch("error"))
            tokens = s.pipe.tokenizer(
                prompts.captions[:n],
                padding="max_length",
                max_length=s.pipe.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            states = s.pipe.text_encoder(tokens.to(s.pipe.text_encoder.device))[0]
            inputs, outputs = [], []
            for t in LEVELS:
                abar = float(s.pipe.scheduler.alphas_cumprod[t])
                noised = (math.sqrt(abar) * x + math.sqrt(1 - abar) * noise).to(states.device)
                inputs.append(noised)
                outputs.append(s.pipe.unet(noised, t, encoder_hidden_states=states).sample)
            self._wanted = {rng.base: (states, inputs, outputs)}
        states, inputs, outputs = self._wanted[rng.base]
        found = np.zeros(n)
        for k in sorted(set(where[:n].tolist())):
            rows = torch.from_numpy(np.flatnonzero(where[:n] == k))
            for t, x, wanted in zip(LEVELS, inputs, outputs, strict=True):
                out = networks[k](x[rows], t, encoder_hidden_states=states[rows]).sample
                gap = (out - wanted[rows]).square().flatten(1).mean(1) / wanted[rows].square().flatten(1).mean(1)
                found[rows.numpy()] += gap.double().cpu().numpy() / len(LEVELS)
        return found

    def drawn(self, h: Host, pipe: Any, prompts: Prompts, rng: Streams, log: TrialLog) -> dict[str, float]:
        """Samples of the first prompts, and what is in them."""
        n = min(h.setting["drawn"], len(prompts.captions))
        captions, noise = prompts.captions[:n], shared_noise(h.subject, n, rng)
        h.pipe, h.guidance = pipe, h.setting["guidance"] or 3.0
        started, parts = time.perf_counter(), []
        for start in range(0, n, 48):
            part = slice(start, start + 48)
            asked = {"num_inference_steps": h.setting["calls"]}
            parts.append(run(h, noise[part], captions[part], rng.torch("sampler", start), **asked))
        seconds = time.perf_counter() - started
        images = decode(h.subject, torch.cat(parts), 48)
        seen, wanted = scenes.attributes(images), scenes.parse(captions)
        right = ((seen == wanted) | (wanted == scenes.NONE)).all(1).numpy()
        said = prompts.said[:n]
        log.per_item("match", right.astype(float).tolist())
        log.images("samples", ((images[:12] + 1) / 2).permute(0, 2, 3, 1).numpy())
        figures = {"match": float(right.mean()), "seconds_per_sample": seconds / n}
        for name, levels in (("match_easy", EASY), ("match_hard", HARD)):
            if np.isin(said, levels).any():
                figures[name] = float(right[np.isin(said, levels)].mean())
        if n > 64:
            theirs, ours = (image_metrics.features(scenes.features, x) for x in (prompts.images[:n], images))
            figures["frechet"] = image_metrics.feature_metrics(theirs, ours)["frechet"]
        return figures

    def exhibits(self, comparison: Comparison) -> list[Any]:
        return []


class Whole:
    """The network as it is."""


def captioned(n: int, split: Any, generator: torch.Generator) -> Prompts:
    """New pictures of a split's combinations, with captions that leave attributes out."""
    images, rows = scenes.fresh(n, split, generator)
    unsaid = torch.rand(rows.shape, generator=generator) < UNSAID
    captions = [scenes.caption(row) for row in rows.masked_fill(unsaid, scenes.NONE)]
    return Prompts(images, captions, (~unsaid).sum(1).numpy())


def use(where: np.ndarray, macs: np.ndarray, said: np.ndarray, experts: int, rng: Streams) -> dict[str, float]:
    """How evenly experts are used, and whether the larger ones are by harder prompts."""
    shares = np.bincount(where, minlength=experts) / len(where)
    found = {"entropy": float(stats.entropy(shares) / math.log(experts))}
    if len(set(macs.tolist())) == 1:  # one capacity for all: it goes with nothing
        return found | {"correlation": 0.0, "chance": 1.0}
    a, b = stats.rankdata(macs), stats.rankdata(said)
    correlation = float(np.corrcoef(a, b)[0, 1])
    draws, numbers = rng.numpy("permutations"), 0
    for _ in range(PERMUTATIONS):
        numbers += np.corrcoef(a, draws.permutation(b))[0, 1] >= correlation
    return found | {"correlation": correlation, "chance": (1 + numbers) / (1 + PERMUTATIONS)}


# -------------------------------------------------------------------- studies

APTP, SINGLE, NO_TRANSPORT = "aptp", "aptp:experts=1", "aptp:transport=false"
RANDOM, MAGNITUDE = "aptp:architecture=random", "aptp:architecture=magnitude"
BY_CHANCE, BALANCED = "aptp:routing=random", "aptp:balanced=true"
PRUNED = (APTP, SINGLE, NO_TRANSPORT, RANDOM, MAGNITUDE, BY_CHANCE, BALANCED)


def studies(scale: str, seed: int) -> dict[str, Study]:
    """Five fits at 0.8 of the multiply-adds; from scale full on longer trainings, 0.6 too, and more samples."""
    bench = PromptExperts()
    if scale == "quick":
        return {"experts": Study(bench, (*PRUNED, "whole"), "scenes", {"budget": [0.8]})}
    long = {"steps": 150, "finetune": 320} if scale == "full" else {"steps": 600, "finetune": 2000}
    grid = {"budget": [0.8, 0.6], "drawn": 192, "calls": 10, "pictures": 2048, **long}
    return {"experts": Study(bench, (*PRUNED, "whole"), "scenes", grid)}


# -------------------------------------------------------------------- claims


def at_budget(contender: str, tolerance: float) -> Callable[[Comparison], Effects]:
    """How far within the tolerance the multiply-adds by held-out use are, relative to the budget 0.8."""

    def effects(c: Comparison) -> Effects:
        values = c.values("multiply_adds", contender, budget=0.8)
        return Effects(np.array([tolerance - abs(values[s] / 0.8 - 1) for s in sorted(values)]))

    return effects


def above(figure: str, contender: str, limit: float = 0.0) -> Callable[[Comparison], Effects]:
    """By how much a figure is above a limit."""

    def effects(c: Comparison) -> Effects:
        values = c.values(figure, contender, budget=0.8)
        return Effects(np.array([values[s] - limit for s in sorted(values)]))

    return effects


def more(figure: str, a: str, b: str) -> Callable[[Comparison], Effects]:
    """a's figure less b's, fit by fit."""

    def effects(c: Comparison) -> Effects:
        ours, theirs = c.paired(figure, a, b, budget=0.8)
        return Effects(ours - theirs)

    return effects


def smaller(figure: str, a: str, b: str) -> Callable[[Comparison], Effects]:
    """log of b's figure over a's, fit by fit."""

    def effects(c: Comparison) -> Effects:
        ours, theirs = c.paired(figure, a, b, budget=0.8)
        return Effects(np.log(theirs / ours))

    return effects


def half(c: Comparison) -> Effects:
    """Half of the usage entropy with transport, less that without."""
    ours, theirs = c.paired("entropy", APTP, NO_TRANSPORT, budget=0.8)
    return Effects(ours / 2 - theirs)


ABSTRACT, SECTION, HERE = "abstract: better than single-model pruning", "section 3.3", "asked here, not by the paper"
CLAIMS = [
    Claim(
        "budget",
        "The multiply-adds of the cut experts, by held-out prompts' use of them, are within 2% of the budget.",
        "section 3: budget control",
        "experts",
        at_budget(APTP, 0.02),
        unit="fit",
    ),
    Claim(
        "single-match",
        "Its samples match prompts no less often than those of one learned architecture (by more than 0.02).",
        ABSTRACT,
        "experts",
        more("match", APTP, SINGLE),
        -0.02,
        "fit",
    ),
    Claim(
        "single-error",
        "Its outputs are nearer to the whole network's than those of one learned architecture.",
        ABSTRACT,
        "experts",
        smaller("error", APTP, SINGLE),
        unit="fit",
    ),
    Claim(
        "magnitude-error",
        "Its outputs are nearer to the whole network's than those of magnitude pruning.",
        ABSTRACT,
        "experts",
        smaller("error", APTP, MAGNITUDE),
        unit="fit",
    ),
    Claim(
        "random-error",
        "Its outputs are nearer to the whole network's than those of a random architecture.",
        ABSTRACT,
        "experts",
        smaller("error", APTP, RANDOM),
        unit="fit",
    ),
    Claim(
        "routing-error",
        "Its outputs are nearer to the whole network's than those of the same experts with prompts at random.",
        HERE,
        "experts",
        smaller("error", APTP, BY_CHANCE),
        unit="fit",
    ),
    Claim(
        "collapse",
        "Without transport in training the entropy of the experts' use is less than half.",
        "ablation: optimal transport",
        "experts",
        half,
        unit="fit",
    ),
    Claim(
        "entropy",
        "Held-out prompts use the experts with an entropy of more than 0.8 log K.",
        SECTION,
        "experts",
        above("entropy", APTP, 0.8),
        unit="fit",
    ),
    Claim(
        "balanced-entropy",
        "With offsets fitted to the training prompts the entropy is more than 0.8 log K.",
        HERE,
        "experts",
        above("entropy", BALANCED, 0.8),
        unit="fit",
    ),
    Claim(
        "capacity",
        "Prompts that say more go to larger experts (Spearman's correlation above 0).",
        "section 4: difficult prompts go to large experts",
        "experts",
        above("correlation", APTP),
        unit="fit",
    ),
    Claim(
        "balanced-capacity",
        "With offsets, too, prompts that say more go to larger experts.",
        HERE,
        "experts",
        above("correlation", BALANCED),
        unit="fit",
    ),
]
