"""What runs of the steering bench are asked for: rewards, judges apart from them, and exact tilted laws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steersman.callables import load_callable
from steersman.errors import InputError, TrialError
from steersman.math.transport import sliced_wasserstein, wasserstein
from steersman.reference import point_metrics
from steersman.reference.gaussians import Mixture

if TYPE_CHECKING:
    from steersman.engine.bench import Setting
    from steersman.engine.streams import Streams

UNSAID = ("position", "background")
"""Attributes of ``scenes`` that captions leave out and the reward asks for."""
CENTRE = torch.tensor([1.0, 0.0], dtype=torch.float64)


@dataclass(frozen=True)
class Task:
    """What runs are asked for.

    Args:
        given: what the pipeline is told of each run: prompts, labels (n,), or None.
        wanted: what is wanted of each run, for the report; may be ``given``.
        reward: samples and the run of each -> rewards; or the text of a user's, which gets its own context.
        judge: images in [-1, 1] and the run of each -> scores (n,), or None.
        scale: default λ.
        tilt: λ -> the exact law of what is wanted, or None.
    """

    given: Any
    wanted: Sequence[Any] | None
    reward: Callable[[Tensor, Tensor], Tensor] | str
    judge: Callable[[Tensor, Tensor], Tensor] | None
    scale: float
    tilt: Callable[[float], Mixture] | None = None


def tilted(law: Mixture, reward: str, scale: float) -> Mixture:
    r"""The mixture p(x) exp(λ r(x)) / Z of r(x) = x_1 (``linear``) or -|x - c|² / 2 with c = (1, 0) (``quadratic``).

    linear:      N(m, s² I) becomes N(m + λ s² e, s² I), its weight times exp(λ m_1 + λ² s² / 2)
    quadratic:   N(m, s² I) becomes N((m + λ s² c) / (1 + λ s²), s² / (1 + λ s²) I), its weight times
                 (1 + λ s²)^{-d/2} exp(-λ |m - c|² / (2 (1 + λ s²)))
    """
    m, v = law.means, law.std**2
    if reward == "linear":
        means = m + scale * v[:, None] * CENTRE
        logs = scale * m[:, 0] + 0.5 * scale**2 * v
        std = law.std
    else:
        shrink = 1 + scale * v
        means = (m + scale * v[:, None] * CENTRE) / shrink[:, None]
        logs = -0.5 * law.dimensions * shrink.log() - 0.5 * scale * (m - CENTRE).square().sum(1) / shrink
        std = (v / shrink).sqrt()
    weights = torch.softmax(law.weights.log() + logs, 0).clamp_min(1e-300)
    return Mixture(means, std.tolist(), weights.tolist())


def tilt_distance(law: Mixture, points: Tensor, rng: Streams) -> dict[str, float]:
    """Distances of points (n, 2) to as many exact samples of the tilted law."""
    exact, _ = law.sample(len(points), rng.torch("exact"), torch.float64)
    found = {
        "sliced_wasserstein": sliced_wasserstein(points, exact).item(),
        "mode_weight_error": point_metrics.mode_weight_error(law, points),
    }
    if len(points) <= 600:
        found["wasserstein"] = wasserstein(points, exact)
    return found


def points_tilted(law: Mixture, spec: str | None, setting: Setting, judge: Any) -> Task:
    if judge is not None:
        raise InputError("judge", setting["judge"], "left out: the tilted law of gaussians is known exactly")
    if setting["labels"] is not None:
        raise InputError("labels", setting["labels"], "left out: on gaussians nothing but the reward is asked for")
    if spec in (None, "linear"):
        return Task(None, None, lambda x, _: x.flatten(1)[:, 0], None, 4.0, lambda λ: tilted(law, "linear", λ))
    if spec == "quadratic":

        def quadratic(x: Tensor, _: Tensor) -> Tensor:
            return -0.5 * (x.flatten(1).double() - CENTRE).square().sum(1)

        return Task(None, None, quadratic, None, 4.0, lambda λ: tilted(law, "quadratic", λ))
    load_callable(spec, "reward")  # type: ignore[arg-type]
    return Task(None, None, spec, None, 10.0)  # type: ignore[arg-type]


def digits_wanted(n: int, labels: Tensor | None, rng: Streams | None) -> Task:
    from steersman.reference import digits

    a, b = digits.classifier("a"), digits.classifier("b")
    if labels is None:
        labels = torch.zeros(1, dtype=torch.long)
        if rng is not None:
            labels = torch.randint(10, (n,), generator=rng.torch("labels"))
    wanted = labels.repeat(-(-n // len(labels)))[:n]

    def reward(images: Tensor, runs: Tensor) -> Tensor:
        return a(2 * images - 1).log_softmax(1).gather(1, wanted[runs][:, None])[:, 0]

    def judge(images: Tensor, runs: Tensor) -> Tensor:
        with torch.no_grad():
            return b(images).argmax(1) == wanted[runs]

    return Task(None, wanted.tolist(), reward, judge, 1.0)


def scenes_wanted(n: int, prompts: list[str] | None, rng: Streams | None) -> Task:
    from steersman.reference import scenes

    columns = [scenes.ATTRIBUTES.index(name) for name in UNSAID]
    lines = prompts or scenes.prompts(n, seed=0 if rng is None else rng.seed("prompts") % 2**31)
    wanted = scenes.parse([lines[i % len(lines)] for i in range(n)])
    for line, row in zip(lines, wanted.tolist(), strict=False):
        if scenes.NONE in [row[j] for j in columns]:
            raise InputError("prompts", line, f"captions that say {' and '.join(UNSAID)}, which are steered to")
    said = wanted.clone()
    said[:, columns] = scenes.NONE
    scorer = scenes_scorer()

    def reward(images: Tensor, runs: Tensor) -> Tensor:
        logs = scorer(2 * images - 1)
        rows = torch.stack([log.gather(1, wanted[runs][:, [j]])[:, 0] for log, j in zip(logs, columns, strict=True)])
        return rows.sum(0)

    def judge(images: Tensor, runs: Tensor) -> Tensor:
        target = wanted[runs]
        return ((scenes.attributes(images) == target) | (target == scenes.NONE)).all(1)

    given = [scenes.caption(row) for row in said]
    return Task(given, [scenes.caption(row) for row in wanted], reward, judge, 1.0)


@cache
def scenes_scorer(steps: int = 250) -> Callable[[Tensor], list[Tensor]]:
    """Log-probabilities of what captions leave unsaid, of pictures in [-1, 1]: a small convolutional network.

    It is trained on the spot (some seconds, always the same) on noisy drawings of training combinations, so that it is
    neither the reader that judges pictures, nor free of error. Smoothed labels keep it from being surer than it can be.
    """
    from steersman.reference import scenes

    sizes = [len(scenes.VALUES[name]) for name in UNSAID]
    columns = [scenes.ATTRIBUTES.index(name) for name in UNSAID]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 5, 2, 2),
            nn.SiLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(16, 16, 3, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.SiLU(),
            nn.Linear(64, sum(sizes)),
        )
    generator, optimiser = torch.Generator().manual_seed(0), torch.optim.Adam(network.parameters(), 3e-3)
    with torch.enable_grad():
        for _ in range(steps):
            x, scene = scenes.fresh(64, "train", generator)
            x = x + 0.2 * torch.randn(x.shape, generator=generator)
            out = network(x).split(sizes, 1)
            loss = torch.stack(
                [F.cross_entropy(o, scene[:, j], label_smoothing=0.05) for o, j in zip(out, columns, strict=True)]
            ).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    network.requires_grad_(False)

    def score(images: Tensor) -> list[Tensor]:
        network.to(images.device)
        return [o.log_softmax(1) for o in network(images).split(sizes, 1)]

    return score


def judged_by(judge: Callable[..., Any], given: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A user's judge on images in [-1, 1]; it gets what was asked for if it takes two arguments."""
    two = len(inspect.signature(judge).parameters) > 1

    def score(images: Tensor, runs: Tensor) -> Tensor:
        pixels = (images + 1) / 2
        asked = (
            given[runs] if isinstance(given, Tensor) else None if given is None else [given[i] for i in runs.tolist()]
        )
        found = torch.as_tensor(judge(pixels, asked) if two else judge(pixels)).float()
        if found.shape != (len(images),) or not bool(found.isfinite().all()):
            raise TrialError(f"the judge's scores are {tuple(found.shape)}, not {len(images)} finite numbers")
        return found

    return score


def labels_in(text: str | None, classes: int) -> Tensor | None:
    if text is None:
        return None
    pieces = [piece.strip() for piece in str(text).split(",")]
    if not all(piece.isdecimal() and int(piece) < classes for piece in pieces):
        raise InputError("labels", text, f"numbers from 0 to {classes - 1}, like 0,{classes - 1}")
    return torch.tensor([int(piece) for piece in pieces])
