r"""Guidance with two branches, written once for classic and for modular pipelines.

A network that was trained with and without its condition c gives two outputs at x_t, ``cond`` and ``uncond``, and
guidance makes one of them. Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) is

    uncond + w (cond - uncond).

A :class:`Guidance` says what it makes of the two (``guide``) and whether it wants the second at all
(``needs_uncond``). In diffusers' modular pipelines it is a guider. In a classic pipeline, which evaluates both
branches in one batch of 2B rows and mixes them itself, ``install(pipe)`` hooks the network: rows that are not wanted
are cut from its input, and both halves of its output are replaced by the guided one. The pipeline's own mix
g + w (g - g) is then g exactly, whatever its ``guidance_scale`` above 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeGuard, cast

import diffusers
import numpy as np
import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from steersman.diffusion.installing import Installable, installed
from steersman.diffusion.scheduler import SlotScheduler
from steersman.errors import InputError

Kind = Literal["epsilon", "v_prediction", "sample", "flow"]
COND_FIRST = ("DiTPipeline",)
"""Classic pipelines whose rows with the condition come first."""


class Moment:
    """A call of the network: where in the run it is, and what its output means.

    x = alpha x_0 + sigma eps is the network's *input*. Schedulers in other units (Euler's) scale their sample to it,
    so alpha and sigma belong to the network and its timestep, not to the scheduler's sample.

    Attributes:
        i, n: call ``i`` of the ``n`` of this run.
        timestep: what the network is told.
        x: its input (B, C, ...), without the doubling; None before a modular pipeline's call.
        scheduler: of the pipeline, or the one a guider was bound to.
    """

    def __init__(self, i: int, n: int, timestep: float, x: Tensor | None, scheduler: Any) -> None:
        self.i, self.n, self.timestep, self.x, self.scheduler = i, n, timestep, x, scheduler

    @property
    def kind(self) -> Kind:
        """What the network predicts.

        Raises:
            InputError: the guider knows no scheduler, or it is not one of these.
        """
        scheduler = self.scheduler
        if scheduler is None:
            raise InputError("scheduler", None, "known to the guider: guider.bind(pipe.scheduler)")
        if is_flow(scheduler):
            return "flow"
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction", "sample") or "sigma_data" in scheduler.config:
            raise InputError("prediction_type", kind, "epsilon, v_prediction or sample (and no EDM preconditioning)")
        return cast(Kind, kind)

    @property
    def levels(self) -> tuple[float, float]:
        """(alpha, sigma) of the network's process at ``timestep``, in float64."""
        if self.kind == "flow":
            sigma = self.timestep / self.scheduler.config.num_train_timesteps
            return 1.0 - sigma, sigma
        abar = alpha_bar(self.scheduler, self.timestep)
        return math.sqrt(abar), math.sqrt(1.0 - abar)

    @property
    def alpha(self) -> float:
        return self.levels[0]

    @property
    def sigma(self) -> float:
        return self.levels[1]

    def eps(self, output: Tensor) -> Tensor:
        """The noise that a network output says, in float32 or better."""
        kind = self.kind
        output = _wide(output)
        if kind == "epsilon":
            return output
        alpha, sigma = self.levels
        if kind == "flow":  # v = eps - x_0, x = alpha x_0 + sigma eps with alpha + sigma = 1
            return self._x(output) + alpha * output
        if kind == "v_prediction":
            return alpha * output + sigma * self._x(output)
        if sigma == 0.0:
            raise InputError("timestep", self.timestep, "one with noise: eps is not defined at sigma = 0")
        return (self._x(output) - alpha * output) / sigma

    def x0(self, output: Tensor) -> Tensor:
        """The clean sample that a network output says, in float32 or better."""
        kind = self.kind
        output = _wide(output)
        if kind == "sample":
            return output
        alpha, sigma = self.levels
        if kind == "flow":
            return self._x(output) - sigma * output
        if kind == "v_prediction":
            return alpha * self._x(output) - sigma * output
        if alpha == 0.0:
            raise InputError("timestep", self.timestep, "one with signal: eps says nothing of x_0 at alpha = 0")
        return (self._x(output) - sigma * output) / alpha

    def output(self, eps: Tensor) -> Tensor:
        """The network output that says ``eps``: the inverse of :meth:`eps`."""
        kind = self.kind
        if kind == "epsilon":
            return eps
        alpha, sigma = self.levels
        if kind == "flow":
            if alpha == 0.0:
                raise InputError("timestep", self.timestep, "one with signal: eps says nothing of v at alpha = 0")
            return (eps - self._x(eps)) / alpha
        if alpha == 0.0:
            raise InputError("timestep", self.timestep, "one with signal: eps says nothing of x_0 at alpha = 0")
        if kind == "v_prediction":
            return (eps - sigma * self._x(eps)) / alpha
        return (self._x(eps) - sigma * eps) / alpha

    def _x(self, like: Tensor) -> Tensor:
        if self.x is None:
            raise InputError("x", None, "known: this is read before the network's call")
        return self.x.to(like.dtype)


class Guidance(Installable, BaseGuidance):
    """What is made of a network's two outputs; a guider, and installable on classic pipelines.

    A subclass writes :meth:`guide`, and where they matter :meth:`needs_uncond` and :meth:`begin`. Its constructor is
    decorated with diffusers' ``register_to_config``: that is what ``save_pretrained`` writes.

        modular:  pipe.update_components(guider=method); method.bind(pipe.scheduler)
        classic:  method.install(pipe)

    A modular pipeline's ``save_pretrained`` leaves a guider of another library out: save and load it by itself.
    """

    _input_predictions: Any = ["pred_cond", "pred_uncond"]
    branches = 2
    pairs: ClassVar[bool] = False
    """Whether our schedulers get the unconditional output beside the guided one (for solvers that use both)."""
    rowwise: ClassVar[bool] = False
    """Whether ``needs_uncond`` may answer row by row."""

    def __init__(self) -> None:
        with unannounced():
            super().__init__()
        self._scheduler: Any = None
        self._values: list[float] = []
        self._hooks: list[Any] = []
        self._x: Tensor | None = None
        self._moment: Moment | None = None
        self._needed: Any = True
        self._alone = False

    # -------------------------------------------------------------- what a subclass says

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        """The output that goes to the scheduler.

        Args:
            cond: the network's output with the condition, (B, C, ...).
            uncond: without it, or with the negative prompt; None where :meth:`needs_uncond` said False. Where it
                said so for single rows, theirs are those of ``cond``.
            moment: the call.

        Returns:
            Tensor: of the shape, dtype and meaning of ``cond``.
        """
        raise NotImplementedError

    def needs_uncond(self, moment: Moment) -> bool | Tensor:
        """Whether the network is to be evaluated without the condition: before the call, so ``x`` may be None.

        With ``rowwise`` a classic pipeline takes a bool tensor (B,), too: which rows.
        """
        return True

    def needs_cond(self, moment: Moment) -> bool:
        """Whether the network is to be evaluated with the condition; where not, ``guide`` gets the output without it
        as both of its arguments."""
        return True

    def begin(self, moment: Moment) -> None:
        """A run begins: forget the one before."""

    def take(self, index: Tensor) -> None:
        """Re-index the samples of the run in progress (particles): whatever is kept of them between calls."""

    # -------------------------------------------------------------- modular pipelines

    def bind(self, scheduler: Any) -> Guidance:
        """Let the guider know the scheduler of its modular pipeline (classic pipelines tell it themselves)."""
        self._scheduler = scheduler
        return self

    def new(self, **kwargs: Any) -> Any:
        """A guider of the same settings, but for ``kwargs``."""
        # By keyword: diffusers' own takes what was given by position for a default, and drops it.
        settings = {name: value for name, value in self.config.items() if not name.startswith("_")}
        return type(self)(**(settings | kwargs))

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self._x = None
        if step == 0:
            self._values = [] if self._scheduler is None else remaining(self._scheduler, timestep)
        told = self._values[step] if step < len(self._values) else float(timestep)
        self._moment = Moment(step, num_inference_steps, told, None, self._scheduler)
        if step == 0:
            self.begin(self._moment)
        needed = self.needs_uncond(self._moment) if self._enabled else False
        if isinstance(needed, Tensor):
            raise InputError(
                "needs_uncond", "a tensor", "True or False in a modular pipeline, which calls whole batches"
            )
        self._needed = bool(needed)
        self._alone = self._needed and not self.needs_cond(self._moment)

    @property
    def num_conditions(self) -> int:
        return 2 if self._needed and not self._alone else 1

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1 and not self._alone

    @property
    def _inputs(self) -> list[tuple[int, str]]:
        """Which of a field's two inputs are evaluated, and what their outputs are called."""
        both = list(enumerate(self._input_predictions))
        return both[1:] if self._alone else both[: self.num_conditions]

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, i, name) for i, name in self._inputs]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in self._inputs]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._x = _own_channels(module, _sample(args, kwargs))

        self._hooks.append(denoiser.register_forward_pre_hook(note, with_kwargs=True))

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        moment = self._moment
        pred_cond = pred_uncond if pred_cond is None else pred_cond
        assert pred_cond is not None
        if moment is None:
            raise InputError("guider", type(self).__name__, "told the step first: set_state(step, steps, timestep)")
        moment.x = self._x
        pred = self.guide(pred_cond, pred_uncond, moment) if self._enabled else pred_cond
        if self.pairs and pred_uncond is not None and isinstance(self._scheduler, SlotScheduler):
            self._scheduler.uncond_output = pred_uncond
        # Between runs pipelines ask for the number of conditions, to know whether to prepare a negative prompt.
        self._needed, self._alone = True, False
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    # -------------------------------------------------------------- classic pipelines

    def attach(self, pipe: Any) -> None:
        others = [type(m).__name__ for m in installed(pipe) if isinstance(m, Guidance)]
        if others:
            raise InputError("guidance", type(self).__name__, f"the only one on the pipeline ({others[0]} is on it)")
        network = network_of(pipe)
        self._run = _Run(self, pipe)
        self._hooks = [
            network.register_forward_pre_hook(self._run.before, with_kwargs=True),
            network.register_forward_hook(self._run.after, with_kwargs=True),
        ]

    def detach(self, pipe: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        if isinstance(pipe.scheduler, SlotScheduler):
            pipe.scheduler.uncond_output = None


class StockGuidance(Guidance):
    """One of diffusers' own guiders with two branches, for a classic pipeline.

        StockGuidance(AdaptiveProjectedGuidance(guidance_scale=5.0)).install(pipe)

    Args:
        guider: it; its ``start``, ``stop`` and other settings act as in modular pipelines.

    Raises:
        InputError: a guider of another kind (with further predictions, or hooks inside the network).
    """

    def __init__(self, guider: BaseGuidance) -> None:
        if not isinstance(guider, BaseGuidance) or not of_two_branches(type(guider)):
            raise InputError("guider", type(guider).__name__, "one of diffusers' guiders of pred_cond and pred_uncond")
        super().__init__()
        self.guider: Any = guider

    def needs_uncond(self, moment: Moment) -> bool:
        self.guider.set_state(step=moment.i, num_inference_steps=moment.n, timestep=torch.tensor(moment.timestep))
        self.guider.prepare_inputs({})  # where guiders with a momentum forget the run before
        return self.guider.num_conditions > 1

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        return cast(Tensor, self.guider.forward(cond, uncond)[0])

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        self.guider.save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: Any) -> StockGuidance:  # type: ignore[override]
        """What ``save_pretrained`` wrote: a folder that diffusers can read, too.

        Raises:
            InputError: there is none, or not of a guider with two branches.
        """
        try:
            config: Any = BaseGuidance.load_config(folder)
            name = config["_class_name"]
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError("folder", str(folder), f"one that a guider's save_pretrained wrote ({reason})") from None
        kind: Any = getattr(diffusers, str(name), None)
        if not of_two_branches(kind):
            raise InputError("folder", f"{folder} of {name}", "of one of diffusers' guiders of two branches")
        with unannounced():
            return cls(kind.from_pretrained(folder))


class _Run:
    """The hooks of a guidance on a classic pipeline's network, and where in a run they are."""

    def __init__(self, guidance: Guidance, pipe: Any) -> None:
        self.guidance, self.pipe = guidance, pipe
        self.cond_first = type(pipe).__name__ in COND_FIRST
        self.times: Tensor | None = None  # the scheduler's tensor, a new one in each run
        self.values: list[float] = []
        self.i = self.n = 0
        self.moment: Moment | None = None
        self.rows: Tensor | None = None
        self.full, self.alone = True, False

    # In a network that is compiled in place its hooks are traced, and would be again at each call: they count calls.
    @torch.compiler.disable
    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _sample(args, kwargs)
        if self.times is None or self.pipe.scheduler.timesteps is not self.times:
            self._begin(module, x, args[1] if len(args) > 1 else kwargs["timestep"])
        if len(x) % 2:
            self._refuse_single()
        if self.i >= self.n:
            each = "one of both branches for each timestep, in the pipeline that it is installed on"
            wanted = f"at most the {self.n} calls of the scheduler's plan ({each})"
            raise InputError("call of the network", self.i + 1, wanted)
        half = _own_channels(module, x[: len(x) // 2])
        self.moment = Moment(self.i, self.n, self.values[self.i], half, self.pipe.scheduler)
        if self.i == 0:
            self.guidance.begin(self.moment)
        needed = self.guidance.needs_uncond(self.moment)
        if isinstance(needed, Tensor):
            self._check_rows(needed, len(x) // 2)
        self.alone = needed is True and not self.guidance.needs_cond(self.moment)
        self.i += 1
        self.full, self.rows = True, None
        if self.alone:
            B = len(x) // 2
            keep = torch.arange(B, device=x.device) + (B if self.cond_first else 0)
            return _taken(args, 2 * B, keep), _taken(kwargs, 2 * B, keep)
        if needed is True or (isinstance(needed, Tensor) and bool(needed.all())):
            return None
        B = len(x) // 2
        if not isinstance(needed, Tensor):
            needed = torch.zeros(B, dtype=torch.bool)
        self.full = False
        self.rows = needed.to("cpu").nonzero().flatten().to(x.device)
        cond = torch.arange(B, device=x.device)
        keep = torch.cat([cond, self.rows + B] if self.cond_first else [self.rows, cond + B])
        return _taken(args, 2 * B, keep), _taken(kwargs, 2 * B, keep)

    @torch.compiler.disable
    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output.sample
        moment = self.moment
        assert moment is not None and moment.x is not None
        rest, axis = None, _channel_axis(module, moment.x)
        C = moment.x.shape[axis]
        if out.ndim > 3 and out.shape[axis] == 2 * C:
            out, rest = out.split(C, axis)
        uncond: Tensor | None
        if self.alone:
            cond = uncond = out
            rest = None if rest is None else torch.cat([rest, rest])
        elif self.full:
            first, second = out.chunk(2)
            cond, uncond = (first, second) if self.cond_first else (second, first)
        else:
            assert self.rows is not None
            k = len(self.rows)
            cond, some = (out[:-k] if k else out, out[len(out) - k :]) if self.cond_first else (out[k:], out[:k])
            uncond = cond.index_copy(0, self.rows, some) if k else None
            if rest is not None:
                order = torch.arange(len(cond), device=out.device)
                rest = rest[: len(cond)] if self.cond_first else rest[k:]
                rest = rest[torch.cat([order, order])]
        guided = self.guidance.guide(cond, uncond, moment)
        if self.guidance.pairs and isinstance(self.pipe.scheduler, SlotScheduler):
            self.pipe.scheduler.uncond_output = uncond
        both = torch.cat([guided, guided])
        if rest is not None:
            both = torch.cat([both, rest], dim=axis)
        if isinstance(output, tuple):
            return (both, *output[1:])
        return type(output)(sample=both)

    def _begin(self, module: Any, x: Tensor, timestep: Any) -> None:
        pipe, scheduler = self.pipe, self.pipe.scheduler
        if getattr(scheduler, "num_inference_steps", 1) is None and not getattr(scheduler, "custom_timesteps", False):
            name = type(self.guidance).__name__
            wanted = f"the one that {name} is installed on (another one, with the same network, was called)"
            raise InputError("pipe", "another", wanted)
        doubled = getattr(pipe, "do_classifier_free_guidance", None)
        if doubled is None:
            scale = getattr(pipe, "guidance_scale", None)
            doubled = scale is None or scale > 1
        # The device is waited for here, once a run; from here on all values are known.
        if not doubled or not _twice(module, x):
            self._refuse_single()
        self.values = remaining(scheduler, timestep)
        if not self.values:
            t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
            raise InputError("timestep", t, "one of the scheduler's timesteps")
        self.i, self.n, self.times = 0, len(self.values), scheduler.timesteps

    def _check_rows(self, needed: Tensor, rows: int) -> None:
        name = type(self.guidance).__name__
        if not self.guidance.rowwise:
            raise InputError("needs_uncond", "a tensor", f"True or False: {name} is not rowwise")
        if needed.dtype != torch.bool or needed.shape != (rows,):
            shown = f"{needed.dtype} of shape {tuple(needed.shape)}"
            raise InputError(
                "needs_uncond", shown, f"True, False or a bool tensor of shape ({rows},), one for each row"
            )

    def _refuse_single(self) -> None:
        name, pipe = type(self.guidance).__name__, type(self.pipe).__name__
        if is_distilled(network_of(self.pipe)):
            wanted = f"one with two branches: guidance is distilled into this network, {name} has nothing to guide"
            raise InputError("pipe", pipe, wanted)
        scale = getattr(self.pipe, "guidance_scale", 1)
        if isinstance(scale, (int, float)) and scale > 1:
            wanted = f"one that evaluates two branches, and both in one batch, where {name} can guide them"
            raise InputError("pipe", pipe, wanted)
        wanted = f"above 1 while {name} is installed (any such value: the pipeline then evaluates both branches)"
        raise InputError("guidance_scale", scale, wanted)


# -------------------------------------------------------------------- pieces


@contextmanager
def unannounced() -> Iterator[None]:
    """Without diffusers' announcement, at each guider that is made, that guiders are experimental."""
    announcer = logging.getLogger("diffusers.guiders.guider_utils")
    level = announcer.level
    announcer.setLevel(logging.ERROR)
    try:
        yield
    finally:
        announcer.setLevel(level)


def of_two_branches(kind: Any) -> TypeGuard[type[BaseGuidance]]:
    """Whether a class is a guider that only makes one of two outputs (AutoGuidance cuts layers for its second)."""
    if not isinstance(kind, type) or not issubclass(kind, BaseGuidance):
        return False
    own = kind.prepare_models is BaseGuidance.prepare_models or issubclass(kind, Guidance)
    return own and kind._input_predictions == Guidance._input_predictions


def network_of(pipe: Any) -> torch.nn.Module:
    """The denoising network of a pipeline.

    Raises:
        InputError: there is none.
    """
    for name in ("unet", "transformer"):
        network = getattr(pipe, name, None)
        if isinstance(network, torch.nn.Module):
            return network
    raise InputError("pipe", type(pipe).__name__, "a pipeline with a unet or a transformer")


def is_distilled(network: Any) -> bool:
    """Whether guidance was distilled into a network, which is told the scale and has one branch."""
    config = network.config
    return bool(getattr(config, "time_cond_proj_dim", None) or getattr(config, "guidance_embeds", False))


def remaining(scheduler: Any, timestep: Any) -> list[float]:
    """The timesteps of the run that begins at ``timestep``, known without the device; none if it is not one of them."""
    values = [float(t) for t in scheduler.timesteps.tolist()]
    t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
    found = [i for i, value in enumerate(values) if abs(value - t) < 1e-3]
    begin = getattr(scheduler, "begin_index", None)
    return values[begin if begin in found else found[0] :] if found else []


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is of flow matching: x = (1 - sigma) x_0 + sigma eps."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas", False))


def alpha_bar(scheduler: Any, timestep: float) -> float:
    """abar of the network's variance-preserving process at a timestep, which may be between two trained ones.

    Raises:
        InputError: the scheduler has no table of it, or not at this timestep.
    """
    table = getattr(scheduler, "_abar", None)  # ours is in float64
    if table is None:
        table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or scheduler.config.get("timestep_type", "discrete") != "discrete":
        wanted = "one of a diffusion process with timesteps (alphas_cumprod)"
        raise InputError("scheduler", type(scheduler).__name__, wanted)
    values = _on_host(table) if isinstance(table, Tensor) else np.asarray(table, dtype=np.float64)
    if not 0 <= timestep <= len(values) - 1:
        raise InputError("timestep", timestep, f"from 0 to {len(values) - 1}")
    if float(timestep).is_integer():
        return float(values[int(timestep)])
    # As diffusers' Euler does it: log sigma is linear between timesteps.
    logs = 0.5 * (np.log1p(-values) - np.log(values))
    level = float(np.interp(timestep, np.arange(len(values)), logs))
    return 1.0 / (1.0 + math.exp(2.0 * level))


_ON_HOST: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _on_host(table: Tensor) -> np.ndarray:
    """In float64; read once, since diffusers' ``add_noise`` moves the table to the device."""
    if table not in _ON_HOST:
        _ON_HOST[table] = table.double().cpu().numpy()
    return _ON_HOST[table]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sample(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The network's input among its arguments."""
    if args:
        return cast(Tensor, args[0])
    return cast(Tensor, kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"])


def _twice(network: Any, x: Tensor) -> bool:
    """Whether a batch has the same samples twice: three branches, or other rows, would be taken for two of these."""
    if len(x) % 2:
        return False
    first, second = (_own_channels(network, half) for half in x.chunk(2))
    return bool(((first == second) | first.isnan()).all())


def _own_channels(network: Any, x: Tensor) -> Tensor:
    """The sample in a network's input: an inpainting network sees mask and masked image behind it."""
    if x.ndim <= 3:
        return x
    axis = _channel_axis(network, x)
    # Another network predicts variances, too: it has more channels for the output than for the input.
    return x.narrow(axis, 0, min(getattr(network.config, "out_channels", None) or x.shape[axis], x.shape[axis]))


def _channel_axis(network: Any, x: Tensor) -> int:
    """1; 2 for videos (B, frames, C, H, W)."""
    channels = getattr(network.config, "in_channels", None)
    return 2 if x.ndim == 5 and x.shape[1] != channels and x.shape[2] == channels else 1


def _taken(value: Any, rows: int, keep: Tensor) -> Any:
    """``value`` with every tensor of so many rows cut to those to keep."""
    if isinstance(value, Tensor):
        return value[keep] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {name: _taken(item, rows, keep) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_taken(item, rows, keep) for item in value)
    return value
