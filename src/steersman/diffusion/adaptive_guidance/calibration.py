"""Choosing a threshold and the steps before it from the similarities of a pipeline's own runs.

A sample is guided as ever up to its cut, so the curves gamma_t of plain runs say exactly where each would be cut,
and how many calls a threshold leaves: no run is needed for that. What a cut does to the images is measured by runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.diffusion.adaptive_guidance.guidance import AdaptiveGuidance, check_scale, guided, similarity
from steersman.diffusion.adaptive_guidance.trajectories import Asked, Runs
from steersman.diffusion.guidance import Guidance, Moment
from steersman.errors import InputError, MissingExtra

SAVINGS = (0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
"""Shares of calls that are tried, in this order, where a likeness is asked for."""


@dataclass(frozen=True)
class Candidate:
    """A threshold with its ``min_steps``, and what it does on the calibration's prompts.

    Attributes:
        threshold, min_steps: of :class:`AdaptiveGuidance`.
        saving: share of guidance's 2N rows of the network that is saved, on average.
        passed_first: share of the samples that pass at the first step at which the test is made.
        psnr: likeness to the images of plain guidance, in dB, of the squared error's mean over all images. A mean of
            decibels would reward a threshold that leaves some samples alone and spoils the others.
        ssim: structural similarity to them, where it was asked for.
    """

    threshold: float
    min_steps: int
    saving: float
    passed_first: float
    psnr: float
    ssim: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` chose, and what it saw.

    Attributes:
        chosen: the candidate; None where none was like enough (then ``guidance`` cuts nothing).
        tried: all of them.
        curves: gamma of each sample at each call of plain runs, (n, samples).
        scale: of the guidance.
    """

    chosen: Candidate | None
    tried: list[Candidate]
    curves: Tensor
    scale: float

    def guidance(self) -> AdaptiveGuidance:
        """The guidance that was chosen."""
        if self.chosen is None:
            return AdaptiveGuidance(self.scale, 1.0)
        return AdaptiveGuidance(self.scale, self.chosen.threshold, self.chosen.min_steps)

    def report(self) -> dict[str, Any]:
        """The choice, and where the curves start, turn and end."""
        middle = self.curves.median(1).values
        facts: dict[str, Any] = {
            "median_similarity_first": float(middle[0]),
            "median_similarity_lowest": float(middle.min()),
            "step_of_lowest": int(middle.argmin()) + 1,
            "median_similarity_last": float(middle[-1]),
        }
        return facts | ({"threshold": 1.0, "saving": 0.0} if self.chosen is None else asdict(self.chosen))


def calibrate(
    pipe: Any,
    asked: Asked,
    *,
    scale: float = 7.5,
    steps: int = 20,
    saving: float = 0.25,
    psnr: float | None = None,
    ssim: float | None = None,
    seed: int = 0,
    batch: int = 16,
    log: Callable[[str], None] | None = None,
    **arguments: Any,
) -> Calibration:
    """Choose ``threshold`` and ``min_steps`` of :class:`AdaptiveGuidance` for a pipeline and its scheduler.

    For each of some ``min_steps`` (the step at which the median curve is lowest, and six from 1 to the most that the
    saving allows) the threshold is the largest that saves enough; the pair whose images have the smallest mean squared
    distance to those of plain guidance is chosen.

    Args:
        pipe: a classic pipeline.
        asked: prompts or labels; some dozens. Measure on others.
        scale, steps: of the runs it is for.
        saving: share of guidance's rows of the network to save, above 0 and below 0.5.
        psnr, ssim: the largest saving whose images have on average at least this likeness, instead (ssim needs
            scikit-image).
        seed: of the noise.
        batch: prompts of one run.
        log: gets a line now and then.
        arguments: more of the pipeline's call.

    Raises:
        InputError: an argument out of range, or a pipeline without two branches.
        MissingExtra: scikit-image is not installed.
    """
    check_scale(scale)
    if not isinstance(saving, (int, float)) or not 0 < saving < 0.5:
        raise InputError("saving", saving, "a number above 0 and below 0.5 (half is to never guide)")
    if psnr is not None and not 0 < psnr < 100:
        raise InputError("psnr", psnr, "a number of dB above 0, below 100")
    if ssim is not None and not 0 < ssim < 1:
        raise InputError("ssim", ssim, "a number above 0, below 1")
    runs = Runs(pipe, asked, 2.0, steps, seed, batch, arguments)
    recorder = _Curves(scale)
    wanted = runs.images(recorder)
    curves = torch.cat(recorder.batches, 1)
    tried: list[Candidate] = []
    chosen = None
    for share in (saving,) if psnr is None and ssim is None else SAVINGS:
        found = []
        for threshold, min_steps in candidates(curves, share):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*were cut after the first step")
                images = runs.images(AdaptiveGuidance(scale, threshold, min_steps))
            alike = likeness(images, wanted)
            guided_steps = cut_steps(curves, threshold, min_steps)
            first = float((curves[min_steps - 1] > threshold).double().mean())
            saved = 0.5 - float(guided_steps.double().mean()) / (2 * len(curves))
            structure = None if ssim is None else structural_similarity(images, wanted)
            found.append(Candidate(threshold, min_steps, saved, first, alike, structure))
            if log is not None:
                log(f"threshold {threshold:.6g} from step {min_steps} on: saves {saved:.1%}, PSNR {alike:.2f} dB")
        tried += found
        good = [c for c in found if (psnr is None or c.psnr >= psnr) and (ssim is None or (c.ssim or 0.0) >= ssim)]
        if good:
            chosen = max(good, key=lambda c: c.psnr)
            break
    if chosen is None and log is not None:
        log("no saving leaves images that are like enough: nothing is cut")
    return Calibration(chosen, tried, curves, scale)


def cut_steps(curves: Tensor, threshold: float, min_steps: int = 1) -> Tensor:
    """Guided steps of each sample by the rule, from its curve: (n, B) to (B,)."""
    n = len(curves)
    passed = curves > threshold
    passed[: min_steps - 1] = False
    passed[n - 1] = True  # guided to the end
    return passed.double().argmax(0) + 1


def candidates(curves: Tensor, saving: float) -> list[tuple[float, int]]:
    """Pairs of threshold and ``min_steps`` that save at least that share of 2N rows, the thresholds as large as can be.

    Args:
        curves: gamma (n, B).
        saving: above 0, below 0.5.
    """
    n = len(curves)
    most = n * (1 - 2 * saving) + 1e-9  # guided steps of a sample, on average
    trough = int(curves[: max(int(most), 1)].median(1).values.argmin()) + 1
    starts = {trough, *np.linspace(1, max(int(most), 1), 6).round().astype(int).tolist()}
    pairs = []
    for start in sorted(m for m in starts if 1 <= m <= most):
        levels = curves[start - 1 :].clamp(max=1.0).unique().double()
        # Between two values of gamma all thresholds cut alike: try the middles, from below all to above all.
        middles = [-1.0, *((levels[1:] + levels[:-1]) / 2).tolist(), 1.0]
        low, high = 0, len(middles) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if float(cut_steps(curves, middles[middle], start).double().mean()) <= most:
                low = middle
            else:
                high = middle
        pairs.append((middles[low], start))
    return pairs


def likeness(images: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of images in [0, 1] by the mean squared error of all; at most 100."""
    return -10 * math.log10(max(float((images - wanted).double().square().mean()), 1e-10))


def structural_similarity(images: Tensor, wanted: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of images (N, C, H, W) in [0, 1], 7x7 windows."""
    try:
        from skimage.metrics import structural_similarity as ssim
    except ModuleNotFoundError as error:
        raise MissingExtra("structural similarity (scikit-image)", "reference") from error

    pairs: Sequence[tuple[np.ndarray, np.ndarray]] = list(zip(images.numpy(), wanted.numpy(), strict=True))
    return float(np.mean([ssim(a, b, win_size=7, channel_axis=0, data_range=1.0) for a, b in pairs]))


class _Curves(Guidance):
    """Classifier-free guidance that notes gamma of each call."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.batches: list[Tensor] = []

    def begin(self, moment: Moment) -> None:
        self.batches.append(torch.full((moment.n, 0), math.nan))

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        assert uncond is not None
        gamma = similarity(moment.eps(cond), moment.eps(uncond)).cpu()[None]
        rows = self.batches[-1] if moment.i else torch.zeros(0, len(cond))
        self.batches[-1] = torch.cat([rows, gamma])
        return guided(cond, uncond, self.scale)
