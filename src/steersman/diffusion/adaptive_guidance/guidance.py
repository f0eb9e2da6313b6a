r"""Adaptive guidance: the unconditional branch is evaluated only while it says something of its own.

With eps_c and eps_u the noise that the network says with and without the condition, classifier-free guidance is
eps_u + s (eps_c - eps_u): two evaluations a step. Late in a run the two become parallel. Their cosine similarity

    gamma_t = <eps_c, eps_u> / (|eps_c| |eps_u|)

over all but the batch's dimension says when: after the first step with gamma_t above a threshold the conditional
branch is evaluated alone. A sample that is cut after n guided steps costs N + n evaluations in place of 2 N.

A run that is cut for all samples at a step named beforehand is a *policy*, a list of N scales: s is guidance, 1 the
conditional branch alone, 0 the unconditional branch alone.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from steersman.diffusion.classical import DDIMScheduler, EulerScheduler
from steersman.diffusion.dpm_solver_pp import DPMSolverPP, DPMSolverPPScheduler
from steersman.diffusion.guidance import Guidance, Moment
from steersman.errors import InputError

CONFIG = "guider_config.json"
OFF = "off"
MULTISTEP = (DPMSolverPPScheduler, diffusers.DPMSolverMultistepScheduler)
"""Schedulers whose history ``first_order_after_cut`` can make consistent."""
NO_HISTORY = (
    DDIMScheduler,
    EulerScheduler,
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.FlowMatchEulerDiscreteScheduler,
)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """gamma of each row of two predictions (B, ...), (B,), in float32; NaN where one of them is zero."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    a = a / torch.linalg.vector_norm(a, dim=1, keepdim=True)
    b = b / torch.linalg.vector_norm(b, dim=1, keepdim=True)
    return (a * b).sum(1)


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """eps_u + s (eps_c - eps_u), in the pipelines' own order of operations."""
    return uncond + scale * (cond - uncond)


class AdaptiveGuidance(Guidance):
    r"""Adaptive guidance (Castillo et al., AAAI 2025, arXiv 2312.12487): guidance until gamma_t > threshold.

        eps_t = eps_u + s (eps_c - eps_u)   up to and with the first step t, not before ``min_steps``, with
                                            gamma_t > threshold;          eps_t = eps_c   afterwards

    Works in classic pipelines by ``install(pipe)``, where rows that are cut are left out of the network's batch one by
    one, and in modular ones as a guider (``bind`` it to the scheduler), where the unconditional call is left out once
    all rows are cut; each row's result is the same in both. gamma is of the *noise* that the outputs say, whatever
    the network predicts. Once cut, a sample stays cut for the run.

    At high noise both predictions are nearly x_t, so gamma may start above the threshold, fall, and rise again; then
    the plain rule (``min_steps=1``) cuts at the first step. :func:`calibrate` chooses both knobs.

    A multistep solver's history holds guided predictions when the conditional ones begin, and its derivative sees the
    jump. ``first_order_after_cut`` takes the step after the cut by the conditional prediction alone.

    Args:
        scale: s, above 1.
        threshold: from -1 to 1; 1 or "off" never cuts, and is classifier-free guidance to the bit.
        min_steps: guided steps of every sample, from 1: the test is made from this step on.
        per_sample: cut each sample by itself; otherwise all when the last of them has passed.
        first_order_after_cut: see above; for DPM-Solver++ of steersman and diffusers, and solvers without history.

    Attributes:
        guided_steps: guided steps of each sample of the last run, (B,), or None before a run.
        similarities: gamma (B,) of each guided step of the last run at which the test was made; where a sample was
            cut before, 1.

    Raises:
        InputError: a knob out of range; a pipeline without two branches.
    """

    rowwise: ClassVar[bool] = True

    @register_to_config
    def __init__(
        self,
        scale: float = 7.5,
        threshold: float | str = 0.991,
        min_steps: int = 1,
        per_sample: bool = True,
        first_order_after_cut: bool = False,
    ) -> None:
        super().__init__()
        self._set(scale, threshold, min_steps, per_sample, first_order_after_cut)

    def _set(
        self,
        scale: float,
        threshold: float | str,
        min_steps: int,
        per_sample: bool = True,
        first_order_after_cut: bool = False,
    ) -> None:
        check_scale(scale)
        self.scale = float(scale)
        self.threshold = checked_threshold(threshold)
        self.min_steps = checked_steps("min_steps", min_steps)
        self.per_sample, self.first_order_after_cut = per_sample, first_order_after_cut
        self._forget()

    @property
    def off(self) -> bool:
        """Whether nothing is ever cut."""
        return self.threshold >= 1.0

    def _forget(self) -> None:
        self._live: Tensor | None = None  # rows that are still guided; None: all
        self._passed: Tensor | None = None  # without per_sample: rows that passed
        self._cut_now: Tensor | None = None  # rows that were cut by the last call
        self.guided_steps: Tensor | None = None
        self.similarities: list[Tensor] = []

    def begin(self, moment: Moment) -> None:
        """Nothing is cut."""
        self._forget()
        if self.first_order_after_cut and not isinstance(moment.scheduler, (*MULTISTEP, *NO_HISTORY)):
            wanted = "DPM-Solver++ or one without history, for first_order_after_cut"
            raise InputError("scheduler", type(moment.scheduler).__name__, wanted)

    def needs_uncond(self, moment: Moment) -> bool | Tensor:
        live = self._live
        if live is None:
            return True
        rows = live.cpu()
        if moment.i == 1 and 2 * int((~rows).sum()) >= len(rows):
            warnings.warn(
                f"{int((~rows).sum())} of {len(rows)} samples were cut after the first step (gamma starts above "
                f"{self.threshold:g}): they are hardly guided. Set min_steps, or let calibrate choose it",
                stacklevel=2,
            )
        return rows if moment.x is not None else bool(rows.any())

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        if self._cut_now is not None and self.first_order_after_cut:
            _repeat_into_history(moment, cond, self._cut_now)
        self._cut_now = None
        if uncond is None:
            return cond
        made = guided(cond, uncond, self.scale)
        live = self._live
        if live is not None:
            made = torch.where(_rows(live, made), made, cond)
        if self.guided_steps is None:
            self.guided_steps = torch.zeros(len(cond), dtype=torch.long, device=cond.device)
        self.guided_steps = self.guided_steps + (1 if live is None else live.long())
        if not self.off and moment.i + 1 >= self.min_steps:
            gamma = similarity(moment.eps(cond), moment.eps(uncond))
            self.similarities.append(gamma if live is None else torch.where(live, gamma, 1.0))
            self._cut(gamma > self.threshold)  # NaN is not
        return made

    def _cut(self, passed: Tensor) -> None:
        before = torch.ones_like(passed) if self._live is None else self._live
        if self.per_sample:
            live = before & ~passed
        else:
            self._passed = passed if self._passed is None else self._passed | passed
            live = (~self._passed.all()).expand(len(passed))
        self._live, self._cut_now = live, before & ~live

    def take(self, index: Tensor) -> None:
        for name in ("_live", "_passed", "_cut_now", "guided_steps"):
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, kept[index.to(kept.device)])
        self.similarities = [gamma[index.to(gamma.device)] for gamma in self.similarities]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *, threshold: float | str | None = None, min_steps: int | None = None
    ) -> Any:
        """What ``save_pretrained`` or ``steersman apply adaptive-guidance`` wrote: of this class, or one of its kin.

        Args:
            folder: where it is.
            threshold, min_steps: in place of the saved ones.

        Raises:
            InputError: it can't be read, or holds something else.
        """
        from steersman.diffusion.adaptive_guidance.linear import LinearAdaptiveGuidance

        config = _read_config(folder)
        name = config.get("_class_name")
        kinds: dict[str, Any] = {
            kind.__name__: kind for kind in (AdaptiveGuidance, LinearAdaptiveGuidance, GuidancePolicy)
        }
        if name not in kinds:
            raise InputError("folder", str(folder), f"one that holds {', '.join(kinds)} (it holds {name})")
        kind, knobs = kinds[name], {"threshold": threshold, "min_steps": min_steps}
        given = {key: value for key, value in knobs.items() if value is not None}
        if kind is GuidancePolicy and given:
            raise InputError(next(iter(given)), next(iter(given.values())), "left out: a policy has no test")
        made = kind.from_config({**config, **given})
        if kind is LinearAdaptiveGuidance:
            made._read(Path(folder))
        return made


class GuidancePolicy(Guidance):
    """A scale for each step: eps_t = eps_u + s_t (eps_c - eps_u), with one evaluation where s_t is 1 or 0.

    The policies of fixed cost are its constructors: :meth:`static_cut` (guidance for the first steps; Zhang et al.
    2025, arXiv 2506.08351), :meth:`interval` (Kynkaanniemi et al. 2024, arXiv 2404.07724), :meth:`random`. A searched
    one comes from :func:`search_policy`.

    Args:
        scales: s_t of each call of the network, the noisiest first; finite numbers.

    Raises:
        InputError: no scales; a run with another number of calls.
    """

    @register_to_config
    def __init__(self, scales: Sequence[float] = (7.5,)) -> None:
        found = [float(s) for s in scales] if not isinstance(scales, str) else []
        if not found or not all(map(math.isfinite, found)):
            raise InputError("scales", scales, "a list of finite numbers, one for each call of the network")
        super().__init__()
        self.scales = found

    @classmethod
    def static_cut(cls, scale: float, steps: int, guided_steps: int) -> Self:
        """Guidance in the first ``guided_steps`` of ``steps``, the condition alone afterwards."""
        return cls.interval(scale, steps, 0, guided_steps)

    @classmethod
    def interval(cls, scale: float, steps: int, start: int, stop: int) -> Self:
        """Guidance in the steps from ``start`` up to but without ``stop``, counted from 0."""
        check_scale(scale)
        checked_steps("steps", steps)
        if not 0 <= start <= stop <= steps:
            raise InputError("start and stop", (start, stop), f"0 <= start <= stop <= {steps}")
        return cls([scale if start <= i < stop else 1.0 for i in range(steps)])

    @classmethod
    def random(cls, scale: float, steps: int, guided_steps: int, generator: torch.Generator | None = None) -> Self:
        """Guidance in ``guided_steps`` of ``steps``, drawn at random."""
        check_scale(scale)
        if not 0 <= guided_steps <= checked_steps("steps", steps):
            raise InputError("guided_steps", guided_steps, f"a whole number from 0 to {steps}")
        chosen = set(torch.randperm(steps, generator=generator)[:guided_steps].tolist())
        return cls([scale if i in chosen else 1.0 for i in range(steps)])

    @property
    def cost(self) -> int:
        """Rows of the network for a sample."""
        return sum(map(cost_of, self.scales))

    @property
    def names(self) -> list[str]:
        """The policy as text: cfg(s), cond or uncond for each step."""
        return [{0.0: "uncond", 1.0: "cond"}.get(s, f"cfg({s:g})") for s in self.scales]

    def begin(self, moment: Moment) -> None:
        if moment.n != len(self.scales):
            raise InputError("calls of the run", moment.n, f"{len(self.scales)}, as many as this policy has scales")

    def needs_uncond(self, moment: Moment) -> bool:
        return self.scales[moment.i] != 1.0

    def needs_cond(self, moment: Moment) -> bool:
        return self.scales[moment.i] != 0.0

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        scale = self.scales[moment.i]
        return cond if uncond is None else uncond if scale == 0.0 else guided(cond, uncond, scale)

    from_pretrained = AdaptiveGuidance.from_pretrained  # type: ignore[assignment]


# -------------------------------------------------------------------- pieces


def cost_of(scale: float) -> int:
    """Rows of the network for a step of that scale."""
    return 1 if scale in (0.0, 1.0) else 2


def check_scale(scale: Any) -> None:
    """Refuse a scale that skips nothing."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1 < scale < math.inf:
        raise InputError("scale", scale, "a number above 1 (up to 1 there is no second branch to leave out)")


def checked_threshold(threshold: Any) -> float:
    """A threshold as a number, "off" as 1."""
    if threshold == OFF:
        return 1.0
    try:
        value = math.nan if isinstance(threshold, bool) else float(threshold)
    except (TypeError, ValueError):
        value = math.nan
    if not -1 <= value <= 1:
        raise InputError("threshold", threshold, "a number from -1 to 1, or off (which 1 is, too)")
    return value


def checked_steps(name: str, value: Any) -> int:
    """A whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(name, value, "a whole number from 1")
    return value


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _read_config(folder: str | Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads((Path(folder) / CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise InputError("folder", str(folder), f"one with {CONFIG} ({type(error).__name__}: {error})") from None


def _repeat_into_history(moment: Moment, output: Tensor, rows: Tensor) -> None:
    """Put the prediction of this call in the place of earlier ones, for some rows.

    The weights of a multistep formula add up to its first-order weight, so these rows take a first-order step.
    """
    scheduler: Any = moment.scheduler
    x = moment.x
    assert x is not None

    def replaced(history: Iterable[Any], now: Tensor) -> list[Any]:
        found = []
        for old in history:
            if old is not None:
                mask = rows.repeat(len(old) // len(rows))  # DiT's pipeline keeps its rows doubled
                old = torch.where(_rows(mask, old), now.repeat(len(old) // len(now), *[1] * (now.ndim - 1)), old)
            found.append(old)
        return found

    if isinstance(scheduler, DPMSolverPPScheduler):
        state, slot, solver = scheduler._state, scheduler.slots[scheduler.step_index or 0], scheduler._solver
        if state is None or not state.D:
            return
        dtype = state.D[0].dtype
        pred = scheduler._predict(output.to(dtype), x.to(dtype), slot)
        now = pred.x0 if cast(DPMSolverPP, solver).of_data else pred.eps
        scheduler._state = state._replace(D=tuple(replaced(state.D, now)))
    elif hasattr(scheduler, "model_outputs"):
        now = scheduler.convert_model_output(output, sample=x)
        scheduler.model_outputs = replaced(scheduler.model_outputs, now)
