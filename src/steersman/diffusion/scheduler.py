"""The one adapter between solvers and diffusers: it makes any solver a stock scheduler.

A pipeline asks a scheduler for a list of timesteps and then, for each, evaluates the network and calls
``step``. So the solver's plan is laid out as *slots*, one network evaluation each; a step that evaluates
the network four times fills four slots, and the sample handed back in between is the point where the
next evaluation is wanted. Coefficients are float64; the state is float32 (float64 for float64 samples)
whatever the network's precision; nothing in ``step`` waits for the device.

To make a solver a scheduler, subclass :class:`SolverScheduler` and write ``make_solver``; its
keyword-only parameters become the scheduler's own settings, saved and loaded with the rest:

    class MyScheduler(SolverScheduler):
        def make_solver(self, process, *, order: int = 2):
            return MySolver(process, order)

A scheduler over another kind of process subclasses :class:`SlotScheduler`, which knows slots and steps only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines import pipeline_loading_utils
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from steersman.diffusion.solver import (
    PREDICTION_TYPES,
    DiscreteVP,
    Generators,
    Prediction,
    Solver,
    Step,
    gaussian,
    plan,
    take,
)
from steersman.errors import InputError, nearest

ROOM = "steersman.diffusion"
# Lets diffusers reload saved pipelines by the classes' public path.
pipeline_loading_utils.LOADABLE_CLASSES.setdefault(ROOM, {})["SchedulerMixin"] = [
    "save_pretrained",
    "from_pretrained",
]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"]
Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


# ------------------------------------------------------------------ schedules and grids


def alphas_cumprod(
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: Sequence[float] | np.ndarray | None = None,
    rescale_betas_zero_snr: bool = False,
) -> np.ndarray:
    """abar_0, ..., abar_{T-1} in float64 for diffusers' schedules of beta: abar_t = prod_{u <= t} (1 - beta_u).

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: ends of the schedules linear, scaled_linear (linear in sqrt(beta)), sigmoid.
        beta_schedule: linear, scaled_linear, sigmoid, or given by abar(t): squaredcos_cap_v2, laplace, exp.
        trained_betas: the betas themselves, instead.
        rescale_betas_zero_snr: shift and scale sqrt(abar) so that abar_{T-1} = 0 (Lin et al. 2024,
            arXiv 2305.08891, algorithm 1).

    Raises:
        InputError: an argument out of range.
    """
    T = num_train_timesteps
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise InputError("num_train_timesteps", T, "a whole number of at least 1")
    if trained_betas is not None:
        betas = np.asarray(trained_betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) != T or not ((betas > 0) & (betas <= 1)).all():
            raise InputError("trained_betas", trained_betas, f"{T} numbers (num_train_timesteps) in (0, 1]")
    elif beta_schedule in ("linear", "scaled_linear", "sigmoid"):
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not isinstance(value, (int, float)) or not 0 < value < 1:
                raise InputError(name, value, "a number between 0 and 1")
        if beta_schedule == "linear":
            betas = np.linspace(beta_start, beta_end, T)
        elif beta_schedule == "scaled_linear":
            betas = np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
        else:
            betas = beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, T)))
    elif beta_schedule in ("squaredcos_cap_v2", "laplace", "exp"):
        abar = _alpha_bar(beta_schedule, np.arange(T + 1) / T)
        betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    else:
        raise InputError("beta_schedule", beta_schedule, nearest(str(beta_schedule), get_args(BetaSchedule)))
    table = np.cumprod(1.0 - betas)
    if rescale_betas_zero_snr:
        root = np.sqrt(table)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1])) if T > 1 else root
        table = root**2
    return table


def _alpha_bar(schedule: str, t: np.ndarray) -> np.ndarray:
    if schedule == "squaredcos_cap_v2":
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    if schedule == "exp":
        return np.exp(-12.0 * t)
    snr = np.exp(-0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6))
    return np.sqrt(snr / (1 + snr))


def spaced(spacing: str, steps: int, num_train_timesteps: int, steps_offset: int = 0) -> list[float]:
    """The falling grid of ``steps`` timesteps, and then the time of the clean end (below 0).

    ``leading``: multiples of T // N, plus ``steps_offset``; ``trailing``: from T - 1 down in steps of T / N;
    ``linspace``: from T - 1 to 0. The end lies one full step below the last timestep, and below 0.

    Raises:
        InputError: ``steps`` is not from 1 to T, an unknown spacing, or an offset that leaves the schedule.
    """
    N, T = steps, num_train_timesteps
    if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or not 1 <= N <= T:
        raise InputError("num_inference_steps", N, f"a whole number from 1 to {T} (num_train_timesteps)")
    if spacing == "leading":
        grid: np.ndarray = np.arange(N)[::-1] * (T // N) + steps_offset
        if grid[0] > T - 1:
            raise InputError(
                "num_inference_steps",
                N,
                f"fewer: with steps_offset={steps_offset} the first timestep is {grid[0]}, past {T - 1}",
            )
    elif spacing == "trailing":
        grid = np.round(np.arange(T, 0, -T / N))[:N] - 1
    elif spacing == "linspace":
        grid = np.linspace(0, T - 1, N).round()[::-1]
    else:
        raise InputError("timestep_spacing", spacing, nearest(str(spacing), SPACINGS))
    return with_end(grid.tolist(), T // N)


def with_end(grid: Sequence[float], only: float = 1.0) -> list[float]:
    """``grid`` and the clean end: one full step (the last gap; ``only`` if there is none) down, and below 0."""
    times = [float(t) for t in grid]
    gap = times[-2] - times[-1] if len(times) > 1 else only
    return [*times, min(times[-1] - gap, -1.0)]


# ------------------------------------------------------------------ the adapter


class PerStep(int):
    """Evaluations per step, which is what pipelines take ``order`` for when they index ``timesteps``.

    SDXL's refiner also begins one slot early if ``order == 2``. Our slots need no such correction (the
    latent it is given belongs to the slot it would skip), so this number equals nothing but itself.
    """

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = int.__hash__


class Slot(NamedTuple):
    """One network evaluation: stage ``k`` of ``step``, at time ``t``.

    Attributes:
        next: the next slot's time.
        timestep: what the network is told.
        alpha, sigma: of the process at ``t``.
    """

    step: Step
    k: int
    t: float
    next: float
    timestep: float
    alpha: float
    sigma: float


@dataclass
class SolverOutput(BaseOutput):
    """What ``step`` returns.

    Args:
        prev_sample: where the network is to be evaluated next; after the last slot, the result.
    """

    prev_sample: Tensor
    _prediction: ClassVar[Prediction]

    @property
    def pred_original_sample(self) -> Tensor:
        """The estimate of x_0 at this evaluation."""
        return self._prediction.x0.to(self.prev_sample.dtype)


class SlotScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A solver's plan behind diffusers' interface, one network evaluation a slot.

    A subclass says which settings it shares with its own subclasses (the signature of ``shared``), sets its
    process up, lays out grids and reads the network's output; a subclass of that gives the solver.
    """

    order = 1
    init_noise_sigma = 1.0
    shared: ClassVar[Callable[..., None]]
    resolution: ClassVar[float] = 0.5
    """How far what ``step`` is told may be from the next of ``timesteps``."""
    _solver_settings: ClassVar[set[str]] = set()  # of all subclasses

    def make_solver(self, process: Any) -> Solver[Any]:
        """The solver over ``process``; a subclass's keyword-only parameters become settings."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Check the shared settings and set the process up."""
        raise NotImplementedError

    def _make_solver(self) -> Solver[Any]:
        """The solver with this scheduler's settings."""
        raise NotImplementedError

    def _grid(self, solver: Solver[Any], steps: int) -> list[float]:
        """The falling grid of ``steps`` times of the process, and the time where the last step ends."""
        raise NotImplementedError

    def _own_grid(self, solver: Solver[Any], timesteps: Sequence[float]) -> list[float]:
        """The same, of times that the user gave."""
        raise NotImplementedError

    def _timestep(self, t: float) -> float:
        """What the network is told at time ``t``."""
        return t

    def _predict(self, output: Tensor, x: Tensor, slot: Slot) -> Prediction:
        """What the network's ``output`` says at ``x``."""
        raise NotImplementedError

    def _predict_uncond(self, output: Tensor, x: Tensor, slot: Slot) -> Prediction:
        """The same without the condition: as it is, where ``_predict`` may clip."""
        return self._predict(output, x, slot)

    def _levels_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at ``timesteps``, to be multiplied with ``like``."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(ROOM + "."):
            cls.__module__ = ROOM  # the stable path that saved pipelines record
        if cls.make_solver is SlotScheduler.make_solver:
            return  # a kind of scheduler, which has no solver yet
        own = [p for p in inspect.signature(cls.make_solver).parameters.values() if p.kind is p.KEYWORD_ONLY]
        shared = [*inspect.signature(cls.shared).parameters.values()]
        settings = [*shared, *own]

        def __init__(self: SlotScheduler, *args: Any, **kwargs: Any) -> None:
            for name in kwargs:
                if name not in known:
                    raise InputError(f"setting of {type(self).__name__}", name, nearest(name, known))
            self._setup()

        known = [p.name for p in settings[1:]]
        __init__.__signature__ = inspect.Signature(settings)  # type: ignore[attr-defined]
        __init__.__doc__ = cls.__doc__
        cls._own_settings = tuple(p.name for p in own)  # type: ignore[attr-defined]
        SlotScheduler._solver_settings.update(p.name for p in own)
        cls.__init__ = register_to_config(__init__)  # type: ignore[method-assign]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler with the settings of another one's ``config``, changed by ``kwargs``.

        Raises:
            InputError: a keyword that is not a setting of this scheduler (diffusers would ignore it).
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in kwargs:
            if not return_unused_kwargs and name not in (*known, "dtype", "torch_dtype"):
                raise InputError(f"setting of {cls.__name__}", name, nearest(name, known))
        if isinstance(config, dict):
            foreign = SlotScheduler._solver_settings.difference(known)
            config = {name: value for name, value in config.items() if name not in foreign}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _setup(self) -> None:
        self._prepare()
        self._make_solver()  # so that a wrong setting is refused here, not at the first run
        self.num_inference_steps: int | None = None
        self._slots: list[Slot] = []
        self._reset()

    # -------------------------------------------------------------- the plan

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lay out a run, and forget the one before.

        ``scheduler.timesteps`` then has one entry per network evaluation: more than
        ``num_inference_steps`` where a step takes several. Halfway times make it floating point.

        Args:
            num_inference_steps: N, steps (not evaluations), from 1 to T.
            device: where ``scheduler.timesteps`` goes.
            timesteps: a falling grid of N timesteps instead of N.

        Raises:
            InputError: neither or both given, out of range, or a grid that the solver can't run over.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise InputError("num_inference_steps", num_inference_steps, "given, or else timesteps, not both")
        solver = self._make_solver()
        process = solver.process
        if timesteps is not None:
            grid = self._own_grid(solver, timesteps)
        else:
            assert num_inference_steps is not None
            grid = self._grid(solver, num_inference_steps)
        steps = plan(solver, grid)
        calls = [(step, k, t) for step in steps for k, t in enumerate(step.stages)]
        following = [*(t for _, _, t in calls[1:]), grid[-1]]
        self._slots = [
            Slot(step, k, t, after, self._timestep(t), process.alpha(t), process.sigma(t))
            for (step, k, t), after in zip(calls, following, strict=True)
        ]
        self._solver = solver
        self.num_inference_steps = len(grid) - 1
        # What img2img multiplies its first step by to find the slot: right where all steps (but the step
        # to the clean end) have equally many evaluations. With a longer start no number is right. Where steps
        # span several intervals of the grid, each interval is one evaluation.
        each = len(steps) == self.num_inference_steps
        counts = {len(step.stages) if each else 1 for step in steps[:-1]} or {1}
        self.order = PerStep(counts.pop() if len(counts) == 1 else 1)
        whole = all(slot.timestep.is_integer() for slot in self._slots)
        dtype = torch.int64 if whole else torch.float32
        self.timesteps = torch.tensor([slot.timestep for slot in self._slots], dtype=dtype, device=device)
        self._reset()

    def _reset(self) -> None:
        self._begin_index: int | None = None
        self._finish()

    def _finish(self) -> None:
        self._step_index: int | None = None
        self._state: Any = None
        self._inside = False
        self.uncond_output: Tensor | None = None
        """The unconditional output of the call that ``step`` comes after, from guidance, for solvers that use both."""
        self._returned: tuple[Tensor, int] | None = None

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The plan of the run: one slot a network evaluation."""
        return tuple(self._slots)

    @property
    def step_index(self) -> int | None:
        """The slot of the next ``step``; None before the first and after the last."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The slot where the run begins, if a pipeline set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at slot ``begin_index`` (img2img, inpainting).

        Raises:
            InputError: there is no such slot.
        """
        if not 0 <= begin_index < max(len(self._slots), 1):
            raise InputError("begin_index", begin_index, f"from 0 to {len(self._slots) - 1}")
        self._begin_index = int(begin_index)
        self._finish()

    # -------------------------------------------------------------- a step

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        **extra: Any,
    ) -> SolverOutput | tuple[Tensor]:
        """After one network evaluation: where the network is to be evaluated next.

        Args:
            model_output: the network's output, shape of ``sample``.
            timestep: the time of the evaluation, the next of ``scheduler.timesteps``.
            sample: where the network was evaluated, (B, ...).
            generator: for stochastic solvers; a list holds one per sample.
            return_dict: a :class:`SolverOutput`; otherwise the tuple ``(prev_sample,)``.

        Raises:
            InputError: no ``set_timesteps`` yet, a timestep that is not the next one, an output whose shape
                is not the sample's, or an argument that a solver sets elsewhere (``eta``).
        """
        if extra:
            self._refuse(extra)
        if model_output.shape != sample.shape:
            self._refuse_shape(model_output, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype)
        i = self._step_index
        if i is None:
            i = self._step_index = self._begin(timestep)
            self._state = self._solver.init(x)
        slot = self._slots[i]
        self._check_time(timestep, slot.timestep)

        pred = self._predict(model_output.to(dtype), x, slot)
        if self.uncond_output is not None:
            uncond = self.uncond_output.to(dtype)
            # DiTPipeline keeps its rows doubled here, too.
            uncond = uncond if len(uncond) == len(x) else torch.cat([uncond] * (len(x) // len(uncond)))
            pred.uncond = self._predict_uncond(uncond, x, slot)
            self.uncond_output = None
        if slot.k == 0:
            self._inside = True
        elif self._inside and self._edited(sample):
            self._inside = False
        if self._inside:
            after, self._state = self._solver.stage(
                slot.k, x, pred, slot.step, self._state, lambda like: gaussian(like, generator)
            )
        elif slot.next < slot.t:
            after = self._solver.first_order_step(x, pred, slot.t, slot.next)
        else:
            after = x
        after = after.to(sample.dtype)

        if i + 1 == len(self._slots):
            self._finish()
        else:
            self._step_index = i + 1
            self._returned = (after, _version(after)) if self._slots[i + 1].k else None
        if not return_dict:
            return (after,)
        output = SolverOutput(prev_sample=after)
        object.__setattr__(output, "_prediction", pred)
        return output

    def _begin(self, timestep: float | Tensor) -> int:
        if not self._slots:
            raise InputError("scheduler", type(self).__name__, "given its steps first: call set_timesteps")
        if self._begin_index is not None:
            return self._begin_index
        # The one wait for the device in a run.
        t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        for i, slot in enumerate(self._slots):
            if abs(slot.timestep - t) < 1e-3 * self.resolution:
                return i
        raise InputError("timestep", t, "one of scheduler.timesteps (not an index into them)")

    def _check_time(self, timestep: float | Tensor, due: float) -> None:
        if isinstance(timestep, Tensor):
            if timestep.device.type != "cpu" or timestep.ndim:
                return  # reading it would wait for the device
            timestep = timestep.item()
        if abs(timestep - due) > self.resolution:
            raise InputError("timestep", timestep, f"{due:g}, the next of scheduler.timesteps")

    def _edited(self, sample: Tensor) -> bool:
        assert self._returned is not None
        returned, version = self._returned
        if sample is returned:
            return _version(sample) != version
        return sample.shape != returned.shape or not torch.equal(sample, returned)

    def _refuse(self, extra: dict[str, Any]) -> None:
        for name, value in extra.items():
            if name not in ("eta", "use_clipped_model_output"):
                raise InputError(f"argument of {type(self).__name__}.step", name, "left out")
            if name == "eta" and value and value != self.config.get("eta", 0.0):
                raise InputError("eta", value, "set on the scheduler (DDIMScheduler.from_config(config, eta=...))")

    def _refuse_shape(self, output: Tensor, sample: Tensor) -> None:
        wanted = f"of the sample's shape {tuple(sample.shape)}"
        if output.ndim == sample.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
            wanted += "; a learned variance must be split off: output.chunk(2, dim=1)[0]"
        raise InputError("model_output", tuple(output.shape), wanted)

    def take(self, index: Any) -> None:
        """Re-index the samples of a run in progress (particles: pass ``sample[index]`` on as well)."""
        if self._state is not None:
            self._state = take(self._state, index)
        if self._returned is not None:
            returned = self._returned[0][index]
            self._returned = (returned, _version(returned))

    # -------------------------------------------------------------- the forward process

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input at ``sample``: here the sample itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t x_0 + sigma_t noise, with one time per sample (or one for all)."""
        alpha, sigma = self._levels_at(timesteps, original_samples)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha_t noise - sigma_t x_0, the target of v-prediction."""
        alpha, sigma = self._levels_at(timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


def _settings(
    self: Any,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: BetaSchedule = "linear",
    trained_betas: Sequence[float] | np.ndarray | None = None,
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
    timestep_spacing: Spacing = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    rescale_betas_zero_snr: bool = False,
    clip_sample: bool = False,
    clip_sample_range: float = 1.0,
    thresholding: bool = False,
    dynamic_thresholding_ratio: float = 0.995,
    sample_max_value: float = 1.0,
) -> None:
    """Only the signature matters: the settings that every :class:`SolverScheduler` has."""


class SolverScheduler(SlotScheduler):
    """Any solver as a diffusers scheduler: ``pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)``.

    Works in unmodified pipelines (unconditional, Stable Diffusion, img2img, inpainting, SDXL base and
    refiner). A run may start at any slot, as img2img's does: a start inside a step goes on with one
    first-order step per slot until the next step begins, and so does a step whose inner sample was
    edited by the pipeline or a callback. (``DDIMPipeline``'s constructor turns every scheduler into
    diffusers' own DDIM; assign ``pipe.scheduler`` after it, or use ``DDPMPipeline``.)

    Args:
        num_train_timesteps: T, the timesteps that the network was trained on.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see :func:`alphas_cumprod`.
        prediction_type: what the network predicts: epsilon, v_prediction or sample (x_0).
        timestep_spacing, steps_offset: see :func:`spaced`.
        set_alpha_to_one: end at abar = 1; otherwise at abar_0.
        clip_sample: clip x_0 to +-``clip_sample_range``; eps is made consistent with it.
        thresholding: dynamic thresholding instead (Saharia et al. 2022): clip x_0 to +-s and divide by s, with
            s the quantile ``dynamic_thresholding_ratio`` of a sample's entries, and at least 1.
        sample_max_value: caps s where it is above 1. At 1, diffusers' default, s could only be 1: that would be
            ``clip_sample``, so there is no cap.

    Raises:
        InputError: a setting out of range; the sentence names it.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    shared = staticmethod(_settings)

    def make_grid(self, process: DiscreteVP, steps: int) -> list[float]:
        """The falling grid of ``steps`` times, and the time of the clean end; a subclass may offer others."""
        c: Any = self.config
        return spaced(c.timestep_spacing, steps, c.num_train_timesteps, c.steps_offset)

    def _prepare(self) -> None:
        c: Any = self.config
        self._abar = alphas_cumprod(
            c.num_train_timesteps,
            c.beta_start,
            c.beta_end,
            c.beta_schedule,
            c.trained_betas,
            c.rescale_betas_zero_snr,
        )
        if c.prediction_type not in PREDICTION_TYPES:
            raise InputError("prediction_type", c.prediction_type, f"one of {', '.join(PREDICTION_TYPES)}")
        if c.timestep_spacing not in SPACINGS:
            raise InputError("timestep_spacing", c.timestep_spacing, nearest(str(c.timestep_spacing), SPACINGS))
        if isinstance(c.steps_offset, bool) or not isinstance(c.steps_offset, int) or c.steps_offset < 0:
            raise InputError("steps_offset", c.steps_offset, "a whole number of at least 0")
        for name in ("clip_sample_range", "sample_max_value"):
            if not isinstance(c[name], (int, float)) or not c[name] > 0:
                raise InputError(name, c[name], "a number above 0")
        if not 0 < c.dynamic_thresholding_ratio <= 1:
            raise InputError("dynamic_thresholding_ratio", c.dynamic_thresholding_ratio, "a number above 0, at most 1")
        self._processes: dict[float, DiscreteVP] = {}
        self._kind = c.prediction_type
        self._bounded = bool(c.thresholding or c.clip_sample)
        # What training code and other libraries read; the solver's own table is float64.
        self.alphas_cumprod = torch.from_numpy(self._abar.astype(np.float32))
        self.betas = 1.0 - torch.from_numpy((self._abar / np.append(1.0, self._abar[:-1])).astype(np.float32))
        self.timesteps = torch.arange(c.num_train_timesteps - 1, -1, -1)
        self._levels: dict[tuple[Any, Any], tuple[Tensor, Tensor]] = {}

    def _make_solver(self) -> Solver[Any]:
        c: Any = self.config
        final = 1.0 if c.set_alpha_to_one else float(self._abar[0])
        if final not in self._processes:
            self._processes[final] = DiscreteVP(self._abar, final)
        return self.make_solver(self._processes[final], **{name: c[name] for name in self._own_settings})  # type: ignore[attr-defined]

    def _grid(self, solver: Solver[Any], steps: int) -> list[float]:
        return self._checked(self.make_grid(solver.process, steps))  # type: ignore[arg-type]

    def _own_grid(self, solver: Solver[Any], timesteps: Sequence[float]) -> list[float]:
        grid = [float(t) for t in timesteps]
        last = self.config["num_train_timesteps"] - 1
        falling = all(s < t for t, s in pairwise(grid))
        if not grid or not falling or not (grid[-1] >= 0 and grid[0] <= last):
            raise InputError("timesteps", timesteps, f"falling numbers from {last} to 0")
        return self._checked(with_end(grid))

    def _checked(self, grid: list[float]) -> list[float]:
        process = next(iter(self._processes.values()))  # all agree where the network is evaluated
        if self._kind == "epsilon" and process.alpha_bar(grid[0]) == 0.0:
            raise InputError(
                "prediction_type",
                self._kind,
                f"v_prediction or sample: at the first timestep ({grid[0]:g}) abar = 0, and eps says nothing of x_0",
            )
        return grid

    def _predict(self, output: Tensor, x: Tensor, slot: Slot) -> Prediction:
        pred = Prediction.read(self._kind, output, x, slot.alpha, slot.sigma)
        if not self._bounded:
            return pred
        c: Any = self.config
        if c["thresholding"]:
            flat = pred.x0.flatten(1)
            limit = torch.quantile(flat.abs(), c["dynamic_thresholding_ratio"], dim=1, keepdim=True)
            cap = c["sample_max_value"]
            limit = limit.clamp(min=1.0, max=cap if cap > 1.0 else None)
            x0 = (flat.clamp(-limit, limit) / limit).reshape(x.shape)
        else:
            x0 = pred.x0.clamp(-c["clip_sample_range"], c["clip_sample_range"])
        return Prediction(x, slot.alpha, slot.sigma, x0=x0)

    def _predict_uncond(self, output: Tensor, x: Tensor, slot: Slot) -> Prediction:
        return Prediction.read(self._kind, output, x, slot.alpha, slot.sigma)

    def _levels_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype)
        if key not in self._levels:
            tables = np.sqrt(self._abar), np.sqrt(1.0 - self._abar)
            self._levels[key] = tuple(torch.from_numpy(a).to(dtype).to(like.device) for a in tables)  # type: ignore[assignment]
        alpha, sigma = self._levels[key]
        if timesteps.is_floating_point():
            process = next(iter(self._processes.values()))  # at these times all are the same
            times = [float(t) for t in timesteps.flatten().tolist()]
            alpha, sigma = (
                torch.tensor([f(t) for t in times], dtype=dtype, device=like.device)
                for f in (process.alpha, process.sigma)
            )
        else:
            index = timesteps.flatten().to(like.device)
            alpha, sigma = alpha[index], sigma[index]
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.reshape(shape), sigma.reshape(shape)


def _version(x: Tensor) -> int:
    # Inference tensors count no versions.
    return 0 if x.is_inference() else x._version
