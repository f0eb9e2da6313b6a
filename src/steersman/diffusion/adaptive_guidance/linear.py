r"""LinearAG: the unconditional prediction from past predictions, by a regression fitted once.

At a step t without an unconditional call,

    eps~_u(x_t) = sum_{j>=t} beta^c_{t,j} eps_c(x_j) + sum_{j>t} beta^u_{t,j} eps_u(x_j)   (+ an intercept)

with scalars shared by all pixels, and where eps_u(x_j) was skipped, its estimate in its place. The beta of each t solve
a least-squares problem over stored trajectories in which every pixel is a sample. All of them come from one matrix of
inner products, (F F^T)_{jk} over the features F = (eps_c(x_1..N), eps_u(x_1..N)): one pass in float64, and a ridge
of ``ridge`` times its mean diagonal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from steersman.diffusion.adaptive_guidance.guidance import (
    AdaptiveGuidance,
    _rows,
    check_scale,
    checked_steps,
    guided,
)
from steersman.diffusion.adaptive_guidance.trajectories import Asked, Runs
from steersman.diffusion.dpm_ot import probe, same_network
from steersman.diffusion.guidance import Guidance, Moment, network_of
from steersman.errors import InputError, nearest

Pattern = Literal["alternate_then_linear", "alternate_then_cond", "linear_after_first", "alternate"]
PATTERNS: tuple[str, ...] = get_args(Pattern)
MODES = ("cfg", "linear", "cond")
RECORD, TENSORS = "coefficients.json", "coefficients.safetensors"


def pattern_modes(pattern: str | Sequence[str], steps: int) -> list[str]:
    """What each of ``steps`` steps is: cfg (two calls), linear (an estimate takes the second's place), or cond.

    ``alternate_then_linear``: cfg and linear in turn in the first half, linear in the second.
    ``alternate_then_cond``: the same, with cond in the second half. ``alternate``: in turn to the end.
    ``linear_after_first``: cfg once. Or the modes themselves, as a list or with commas.

    Raises:
        InputError: another name, another number of modes, or a first step that is not cfg.
    """
    half = -(-steps // 2)
    turns = ["linear" if i % 2 else "cfg" for i in range(steps)]
    named = {
        "alternate_then_linear": turns[:half] + ["linear"] * (steps - half),
        "alternate_then_cond": turns[:half] + ["cond"] * (steps - half),
        "alternate": turns,
        "linear_after_first": ["cfg"] + ["linear"] * (steps - 1),
    }
    if isinstance(pattern, str) and "," not in pattern and pattern not in MODES:
        if pattern not in named:
            raise InputError("pattern", pattern, f"{nearest(pattern, PATTERNS)}, or a list of {', '.join(MODES)}")
        return named[pattern]
    modes = [mode.strip() for mode in (pattern.split(",") if isinstance(pattern, str) else pattern)]
    if len(modes) != steps or not set(modes) <= set(MODES):
        raise InputError("pattern", pattern, f"{steps} modes, each {', '.join(MODES)}")
    if modes[0] != "cfg":
        raise InputError("pattern", pattern, "one that begins with cfg: at the first step there is nothing to go by")
    return modes


# -------------------------------------------------------------------- regression


@dataclass(frozen=True)
class Coefficients:
    """beta of N steps, in float64; row i belongs to step i, the noisiest first.

    Attributes:
        cond: beta^c (N, N), lower triangular.
        uncond: beta^u (N, N), strictly lower triangular.
        intercept: (N,).
        residual: |eps_u - eps~_u|^2 / |eps_u|^2 on the trajectories of the fit, (N,).
        copied: the same of taking eps_c for eps_u, (N,).
    """

    cond: Tensor
    uncond: Tensor
    intercept: Tensor
    residual: Tensor
    copied: Tensor

    @property
    def steps(self) -> int:
        return len(self.cond)

    def estimate(self, i: int, cond: Mapping[int, Tensor], uncond: Mapping[int, Tensor]) -> Tensor:
        """eps~_u at step ``i`` from predictions by step; those whose beta is 0 needn't be there."""
        made = None
        for weights, known in ((self.cond[i], cond), (self.uncond[i], uncond)):
            for j, weight in enumerate(weights.tolist()):
                if weight:
                    made = known[j] * weight if made is None else torch.add(made, known[j], alpha=weight)
        if made is None:
            made = torch.zeros_like(cond[i])
        return made + float(self.intercept[i]) if float(self.intercept[i]) else made

    def last_use(self, modes: Sequence[str]) -> list[int]:
        """For each step, the last step whose estimate goes by one of its predictions; itself where none does.

        A skipped eps_u that a later estimate goes by is estimated too, so needs of such steps count as well.
        """
        last = list(range(self.steps))
        needed = {i for i, mode in enumerate(modes) if mode == "linear"}
        for i in reversed(range(self.steps)):
            if i not in needed:
                continue
            for j in range(i):
                if self.uncond[i, j] or self.cond[i, j]:
                    last[j] = max(last[j], i)
                if self.uncond[i, j] and modes[j] != "cfg":
                    needed.add(j)
        return last


class Regression:
    """The least-squares problems of all steps, from inner products that trajectories add to.

    Args:
        steps: N.
    """

    def __init__(self, steps: int) -> None:
        N = self.steps = steps
        # cond, uncond as they are at sampling, the unconditional predictions to be estimated, and ones.
        self.products = torch.zeros(3 * N + 1, 3 * N + 1, dtype=torch.float64)

    def add(self, cond: Sequence[Tensor], used: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Add trajectories.

        Args:
            cond: eps_c of each step, N tensors of equal shape.
            used: eps_u as later steps get to see it.
            target: eps_u.
        """
        rows = [x.detach().flatten().double() for x in (*cond, *used, *target)]
        F = torch.stack([*rows, torch.ones_like(rows[0])])
        self.products += (F @ F.T).cpu()

    def solve(self, ridge: float = 1e-10, intercept: bool = False, window: int | None = None) -> Coefficients:
        """beta of all steps.

        Args:
            ridge: added to the diagonal, as a share of its mean.
            intercept: estimate one.
            window: go by this step and so many steps before it; None: by all.
        """
        N, G = self.steps, self.products
        if not bool(G.isfinite().all()) or not float(G[-1, -1]):
            raise InputError("trajectories", "predictions", "finite, and at least one")
        cond, uncond = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, N, dtype=torch.float64)
        constant, residual, copied = (torch.zeros(N, dtype=torch.float64) for _ in range(3))
        for i in range(N):
            first = 0 if window is None else max(0, i - window)
            known = [*range(first, i + 1), *(N + j for j in range(first, i)), *([3 * N] if intercept else [])]
            A, b, square = G[known][:, known], G[known, 2 * N + i], G[2 * N + i, 2 * N + i]
            A = A + torch.eye(len(known), dtype=torch.float64) * (ridge * A.diagonal().mean())
            beta = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
            k = i + 1 - first
            cond[i, first : i + 1], uncond[i, first:i] = beta[:k], beta[k : 2 * k - 1]
            if intercept:
                constant[i] = beta[-1]
            A = G[known][:, known]
            scale = square.clamp(min=torch.finfo(torch.float64).tiny)
            residual[i] = ((square - 2 * beta @ b + beta @ A @ beta) / scale).clamp(min=0)
            copied[i] = ((square - 2 * G[i, 2 * N + i] + G[i, i]) / scale).clamp(min=0)
        return Coefficients(cond, uncond, constant, residual, copied)


# -------------------------------------------------------------------- guidance


class LinearAdaptiveGuidance(AdaptiveGuidance):
    r"""LinearAG (Castillo et al., AAAI 2025, arXiv 2312.12487): some unconditional predictions by regression.

        eps_t = eps~_u + s (eps_c - eps~_u)        at steps whose mode is linear

        guidance = LinearAdaptiveGuidance.fit(pipe, prompts, scale=7.5, steps=20)
        guidance.save_pretrained("my-guidance")

    The coefficients belong to the network, scheduler, number of steps and scale of the fit, and are refused elsewhere.
    Between the estimates' steps ``threshold`` may cut samples as :class:`AdaptiveGuidance` does, by true pairs only.

    Args:
        scale: s of the fit.
        pattern: see :func:`pattern_modes`.
        threshold: as in :class:`AdaptiveGuidance`; 1, the default, cuts nothing.
        min_steps: as there.

    Attributes:
        coefficients: of the fit.

    Raises:
        InputError: no coefficients, or a network, scheduler or number of steps that they don't belong to.
    """

    coefficients: Coefficients | None
    made_for: dict[str, Any]
    modes: list[str]

    @register_to_config
    def __init__(
        self,
        scale: float = 7.5,
        pattern: str | Sequence[str] = "alternate_then_linear",
        threshold: float | str = 1.0,
        min_steps: int = 1,
    ) -> None:
        Guidance.__init__(self)  # the parent's constructor would record its own knobs
        self._set(scale, threshold, min_steps)
        self.pattern = pattern if isinstance(pattern, str) else list(pattern)
        if isinstance(pattern, str) and pattern not in PATTERNS and "," not in pattern:
            raise InputError("pattern", pattern, f"{nearest(pattern, PATTERNS)}, or a list of {', '.join(MODES)}")
        self.coefficients, self.made_for, self.modes = None, {}, []
        self._probe: tuple[str, Tensor] | None = None
        self._checked: Any = None

    # ---------------------------------------------------------------- fit

    @classmethod
    def fit(
        cls,
        pipe: Any,
        asked: Asked,
        *,
        scale: float = 7.5,
        steps: int = 20,
        pattern: str | Sequence[str] = "alternate_then_linear",
        ridge: float = 1e-10,
        intercept: bool = False,
        window: int | None = None,
        rounds: int = 1,
        seed: int = 0,
        batch: int = 16,
        log: Callable[[str], None] | None = None,
        **arguments: Any,
    ) -> Self:
        """Fit beta on guided trajectories of a pipeline, with its present scheduler.

        Args:
            pipe: a classic pipeline.
            asked: prompts or labels; the paper has about 200.
            scale, steps, pattern: of the runs it is for.
            ridge: of the least squares, as a share of the mean diagonal of the normal equations.
            intercept: with a constant (the paper's "affine").
            window: go by so many steps before the present one; None: by all. Fewer take less memory.
            rounds: from the second on trajectories are those of the pattern itself, with what the first gave: the
                regression then sees the inputs that sampling has.
            seed: of the noise.
            batch: prompts of one run.
            log: gets a line now and then.
            arguments: more of the pipeline's call.

        Raises:
            InputError: an argument out of range, or a pipeline without two branches.
        """
        check_scale(scale)
        checked_steps("rounds", rounds)
        if window is not None:
            checked_steps("window", window)
        if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < 1:
            raise InputError("ridge", ridge, "a number from 0, below 1")
        cls(scale, pattern)  # a wrong name is refused before anything is run
        runs = Runs(pipe, asked, 2.0, steps, seed, batch, arguments)
        made: Self | None = None
        for round_ in range(1, rounds + 1):
            recorder = _Recorder(scale, made)
            regression: Regression | None = None
            for i, rows in enumerate(runs):
                runs(rows, recorder)
                if regression is None:
                    pattern_modes(pattern, len(recorder.cond))
                    regression = Regression(len(recorder.cond))
                regression.add(recorder.cond, recorder.used, recorder.target)
                if log is not None:
                    log(f"round {round_}, batch {i + 1}/{len(runs)}")
            assert regression is not None
            made = cls(scale, pattern)
            made._take(
                regression.solve(ridge, intercept, window),
                {"steps": steps, "timesteps": recorder.timesteps, "scale": scale, **_scheduler_of(pipe.scheduler)},
                probe(network_of(pipe)),
            )
        assert made is not None
        return made

    def _take(self, coefficients: Coefficients, made_for: dict[str, Any], network: tuple[str, Tensor]) -> None:
        self.modes = pattern_modes(self.pattern, coefficients.steps)
        self.coefficients, self.made_for, self._probe = coefficients, made_for, network
        self._last_use, self._checked = coefficients.last_use(self.modes), None

    @property
    def cost(self) -> int:
        """Rows of the network for a sample that ``threshold`` does not cut."""
        return len(self.modes) + self.modes.count("cfg")

    # ---------------------------------------------------------------- a run

    def attach(self, pipe: Any) -> None:
        self._check(pipe.scheduler, network_of(pipe))
        super().attach(pipe)

    def bind(self, scheduler: Any) -> LinearAdaptiveGuidance:
        self._check(scheduler)
        super().bind(scheduler)
        return self

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        if self._checked is not denoiser:
            self._check(self._scheduler, denoiser)
            self._checked = denoiser
        super().prepare_models(denoiser)

    def new(self, **kwargs: Any) -> Any:
        made = super().new(**kwargs)
        if self.coefficients is not None and self._probe is not None:
            made._take(self.coefficients, self.made_for, self._probe)
        return made

    def _check(self, scheduler: Any, network: torch.nn.Module | None = None) -> None:
        if self.coefficients is None or self._probe is None:
            raise InputError("coefficients", None, "fitted first: LinearAdaptiveGuidance.fit(pipe, prompts)")
        if network is not None and not same_network(probe(network), self._probe):
            allowed = "the network that the coefficients were fitted to (fit anew for another)"
            raise InputError("network", type(network).__name__, allowed)
        found = _scheduler_of(scheduler)
        if found["scheduler"] != self.made_for["scheduler"]:
            allowed = f"{self.made_for['scheduler']}, which the coefficients were fitted with"
            raise InputError("scheduler", found["scheduler"], allowed)
        names = sorted(found["settings"].keys() | self.made_for["settings"].keys())
        for name in names:
            here, there = (of.get(name) for of in (found["settings"], self.made_for["settings"]))
            if here != there:
                raise InputError(f"{name} of the scheduler", here, f"{there}, which the coefficients were fitted with")

    def begin(self, moment: Moment) -> None:
        super().begin(moment)
        if self.scale != self.made_for["scale"]:
            raise InputError("scale", self.scale, f"{self.made_for['scale']:g}, which the coefficients were fitted for")
        n = len(self.made_for["timesteps"])
        if moment.n != n:
            raise InputError("calls of the run", moment.n, f"{n}, which the coefficients were fitted for")
        self._cond: dict[int, Tensor] = {}
        self._uncond: dict[int, Tensor] = {}

    def needs_uncond(self, moment: Moment) -> bool | Tensor:
        return super().needs_uncond(moment) if self.modes[moment.i] == "cfg" else False

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        i = moment.i
        due = self.made_for["timesteps"][i]
        if abs(moment.timestep - due) > 1e-3:
            raise InputError("timestep", moment.timestep, f"{due:g}, which the coefficients were fitted for")
        assert self.coefficients is not None
        made = super().guide(cond, uncond, moment)
        wanted = self._last_use[i] > i
        linear = self.modes[i] == "linear" and (self._live is None or bool(self._live.any()))
        if not (wanted or linear):
            self._drop(i)
            return made
        self._cond[i] = moment.eps(cond)
        if self.modes[i] == "cfg":
            self._uncond[i] = self._cond[i] if uncond is None else moment.eps(uncond)
        elif linear or any(float(row[i]) for row in self.coefficients.uncond[i + 1 :]):
            self._uncond[i] = self.coefficients.estimate(i, self._cond, self._uncond)
        if linear:
            made = moment.output(guided(self._cond[i], self._uncond[i], self.scale)).to(cond.dtype)
            if self._live is not None:
                made = torch.where(_rows(self._live, made), made, cond)
        self._drop(i)
        return made

    def take(self, index: Tensor) -> None:
        super().take(index)
        for known in (self._cond, self._uncond):
            for j, kept in known.items():
                known[j] = kept[index.to(kept.device)]

    def _drop(self, i: int) -> None:
        """Forget predictions that no later estimate goes by."""
        for known in (self._cond, self._uncond):
            for j in [j for j in known if self._last_use[j] <= i]:
                del known[j]

    # ---------------------------------------------------------------- files

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the settings, and the coefficients with what they belong to."""
        if self.coefficients is None or self._probe is None:
            raise InputError("coefficients", None, "fitted first: LinearAdaptiveGuidance.fit(pipe, prompts)")
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        folder = Path(save_directory)
        tensors = {name: value.contiguous() for name, value in vars(self.coefficients).items()}
        save_file({**tensors, "probe": self._probe[1].contiguous()}, folder / TENSORS)
        record = {**self.made_for, "network": self._probe[0]}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _read(self, folder: Path) -> None:
        try:
            record = json.loads((folder / RECORD).read_text())
            tensors = load_file(folder / TENSORS)
            network = record.pop("network"), tensors.pop("probe")
            coefficients = Coefficients(**tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError("folder", str(folder), f"one with coefficients that can be read ({reason})") from None
        self._take(coefficients, record, network)


class _Recorder(Guidance):
    """Classifier-free guidance, or another's, that keeps both branches of each step."""

    def __init__(self, scale: float, inner: LinearAdaptiveGuidance | None) -> None:
        super().__init__()
        self.scale, self.inner = scale, inner

    def begin(self, moment: Moment) -> None:
        self.cond: list[Tensor] = []
        self.used: list[Tensor] = []
        self.target: list[Tensor] = []
        self.timesteps: list[float] = []
        if self.inner is not None:
            self.inner.begin(moment)

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        assert uncond is not None
        inner, i = self.inner, moment.i
        self.timesteps.append(moment.timestep)
        self.cond.append(moment.eps(cond).cpu())
        self.target.append(moment.eps(uncond).cpu())
        if inner is None:
            self.used.append(self.target[-1])
            return guided(cond, uncond, self.scale)
        made = inner.guide(cond, uncond if inner.modes[i] == "cfg" else None, moment)
        estimate = inner._uncond.get(i)
        self.used.append(self.target[-1] if estimate is None else estimate.cpu())
        return made


def _scheduler_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's class and settings, as JSON has them."""
    settings = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    plain = json.loads(json.dumps(settings, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)))
    return {"scheduler": type(scheduler).__name__, "settings": plain}
