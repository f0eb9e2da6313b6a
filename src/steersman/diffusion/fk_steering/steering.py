r"""FK steering of a diffusers pipeline, around whatever stochastic scheduler it has.

The pipeline runs k images of each prompt. Around the scheduler's ``step`` at a scored timestep t the clean sample that
the network sees in x_t is scored and x_{t-1} is resampled (the potential is one of the pair, and costs no further
network call); after the last step the returned x_0 itself is scored. Rows of one prompt are a group: they are
re-indexed together with what the scheduler carries, and share their conditioning.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steersman.diffusion.autoencoder import decode, upcast
from steersman.diffusion.fk_steering.rewards import OnError, Reward
from steersman.diffusion.fk_steering.smc import (
    FeynmanKac,
    Potential,
    ResamplerName,
    scale_for,
    scored_steps,
)
from steersman.diffusion.guidance import Guidance, Moment, network_of
from steersman.diffusion.installing import Installable, installed
from steersman.diffusion.scheduler import SlotScheduler
from steersman.errors import InputError, nearest

Returns = Literal["all", "best", "unique"]
CONFIG = "fk_steering.json"
AUTO_ESS = 0.5
"""Share of the particles that ``scale="auto"`` leaves effective at the first scored step."""


@dataclass(frozen=True)
class ScoredStep:
    """What happened at a scored step, for each of the G groups.

    Attributes:
        step: of the run, from 0.
        rewards: r_t of the particles before they were resampled, (G, k); NaN where nobody could score.
        ess: effective sample size before the resampling, (G,).
        resampled: which groups were, (G,).
        distinct: distinct ancestors after it, (G,).
    """

    step: int
    rewards: Tensor
    ess: Tensor
    resampled: Tensor
    distinct: Tensor


@dataclass
class Report:
    """A run.

    Attributes:
        scale: λ.
        steps: the scored ones.
        rewards: r(x_0) of each returned row, (rows,).
        prompts: the group (prompt) that each returned row belongs to, (rows,).
        ancestors: the first particle of each returned row's lineage, (rows,), from 0 to k - 1.
        log_z: log of the unbiased estimate of E exp(λ r(x_0)) under the sampler, (G,).
        reward_calls: images that were scored.
    """

    scale: float
    steps: list[ScoredStep] = field(default_factory=list)
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0))
    prompts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    ancestors: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    log_z: Tensor = field(default_factory=lambda: torch.zeros(0))
    reward_calls: int = 0

    @property
    def best(self) -> list[int]:
        """The row of largest reward for each prompt, among the returned ones."""
        found = []
        for group in self.prompts.unique():
            rows = (self.prompts == group).nonzero().flatten()
            found.append(int(rows[self.rewards[rows].nan_to_num(-torch.inf).argmax()]))
        return found


class FKSteering(Installable):
    r"""Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848) of a stock pipeline.

        p_tar(x_0 | c) ∝ p(x_0 | c) exp(λ r(x_0, c)),    by k particles for each prompt, see :class:`FeynmanKac`

        steering = FKSteering(score, scale=10.0, particles=4).install(pipe)
        images = pipe(prompt, num_images_per_prompt=4, eta=1.0).images            # a stochastic sampler
        steering.report.rewards, steering.report.best

    Reward calls: one for each particle and scored step. The pipeline's own batch must be k images for each prompt,
    those of a prompt after one another. Copies among the returned images are what resampling makes: see ``returns``.

    Args:
        reward: a function of images (n, C, H, W) in [0, 1], and of ``prompts`` or ``labels`` if it has such
            parameters, that returns n numbers; ``file.py:name``; or the address of an HTTP scorer
            (:mod:`steersman.diffusion.fk_steering.rewards`).
        potential: difference, max, sum, immediate, importance (one resampling at the end) or best-of-n (none: the
            particles come sorted by reward).
        scale: λ, from 0; ``auto`` is the one that leaves half of the particles effective at the first scored step.
        particles: k of each prompt, from 2 (1 with ``best-of-n``).
        schedule: scored steps beside the last: shares of the run in [0, 1), or steps (whole numbers).
        resampler: systematic, multinomial (the paper's), stratified or residual.
        ess_threshold: resample only where the effective sample size is below this share of k; weights are carried on.
        r_min, official_terminal: see :class:`FeynmanKac`.
        intermediate: r_t on the way: None is the reward of the clean sample that the network sees in x_t; otherwise a
            function of x_t (B, ...) and timesteps (B,), like :class:`LearnedReward`.
        gradient: γ; above 0 each step's mean is shifted by γ w² α_t ∇ λ r at the clean sample that the network sees,
            with w the step's standard deviation (α_t stands for the network's derivative, which it is for standard
            normal data), and the weights are corrected for it. The reward must be differentiable; the scheduler must
            be ours, or one with ``variance_noise``.
        space: ``image`` decodes what is scored to [0, 1]; ``latent`` leaves it as the scheduler has it.
        returns: ``all`` k after the last resampling; the ``best`` of each prompt; ``unique``: without copies.
        micro_batch: images that are decoded and scored at once; None is all.
        on_error: where a reward fails, takes too long or is not finite: ``stop``, or ``skip``. A particle without a
            reward keeps its weight at a step on the way, and has none at the last one (it is then not among the
            returned ones, unless its prompt has no scored particle at all).
        timeout: seconds for a call of the reward.
        seed: of the resampling; its draws depend on the pipeline's generator, too, and don't disturb it.

    Raises:
        InputError: a setting out of range. While the pipeline runs: a deterministic sampler, rows that are not k for
            each prompt or whose conditioning differs within a prompt, rewards of a wrong shape or not finite.
        TrialError: a reward that failed or took too long.
    """

    def __init__(
        self,
        reward: Callable[..., Any] | str,
        potential: Potential = "difference",
        scale: float | Literal["auto"] = 10.0,
        particles: int = 4,
        *,
        schedule: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
        resampler: ResamplerName = "systematic",
        ess_threshold: float | None = None,
        r_min: float | None = None,
        official_terminal: bool = False,
        intermediate: Callable[[Tensor, Tensor], Tensor] | None = None,
        gradient: float = 0.0,
        space: Literal["image", "latent"] = "image",
        returns: Returns = "all",
        micro_batch: int | None = None,
        on_error: OnError = "stop",
        timeout: float | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(scale, str) and scale != "auto":
            raise InputError("scale", scale, "a finite number from 0, or auto")
        self.core = FeynmanKac(
            particles, potential, 1.0 if scale == "auto" else scale, resampler, ess_threshold, r_min, official_terminal
        )
        if isinstance(schedule, (str, int, float)):
            raise InputError("schedule", schedule, "a list of shares of the run in [0, 1), or of steps")
        shares = [at for at in schedule if not isinstance(at, int) or isinstance(at, bool)]
        scored_steps(shares, 1)  # steps are checked when a run begins and its length is known
        if returns not in get_args(Returns):
            raise InputError("returns", returns, nearest(str(returns), get_args(Returns)))
        if space not in ("image", "latent"):
            raise InputError("space", space, "image or latent")
        if isinstance(gradient, bool) or not isinstance(gradient, (int, float)) or not 0 <= gradient < float("inf"):
            raise InputError("gradient", gradient, "a finite number from 0")
        if intermediate is not None and not callable(intermediate):
            raise InputError("intermediate", intermediate, "a function of x_t and timesteps, or None")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError("seed", seed, "a whole number from 0")
        self.reward = Reward(reward, micro_batch, on_error, timeout)
        self.scale, self.schedule, self.intermediate = scale, tuple(schedule), intermediate
        self.gradient, self.space, self.returns = float(gradient), space, returns
        self.micro_batch, self.on_error, self.timeout, self.seed = micro_batch, on_error, timeout, seed
        self.report = Report(self.core.scale)
        self._undo: list[Callable[[], Any]] = []

    # -------------------------------------------------------------- on a pipeline

    def attach(self, pipe: Any) -> None:
        scheduler = getattr(pipe, "scheduler", None)
        if not callable(getattr(scheduler, "step", None)):
            raise InputError("pipe", type(pipe).__name__, "a pipeline with a scheduler")
        if any(isinstance(other, FKSteering) for other in installed(pipe)):
            raise InputError("pipe", type(pipe).__name__, "one without another FKSteering")
        network = network_of(pipe)
        run = _Run(self, pipe, scheduler)
        hook = network.register_forward_pre_hook(run.before, with_kwargs=True)
        self._undo = [hook.remove, _shadow(scheduler, "step", run.step)]
        if callable(getattr(pipe, "encode_prompt", None)):
            self._undo.append(_shadow(pipe, "encode_prompt", run.encode_prompt))

    def detach(self, pipe: Any) -> None:
        while self._undo:
            self._undo.pop()()

    # -------------------------------------------------------------- saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings; the reward is to be given again when loading (its text is there as a reminder).

        Raises:
            InputError: with a learned ``intermediate`` that can't be written as text it has to be given again, too.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        core = self.core
        settings = {
            "reward": self.reward.text,
            "potential": core.potential,
            "scale": self.scale,
            "particles": core.particles,
            "schedule": list(self.schedule),
            "resampler": core.resampler,
            "ess_threshold": core.ess_threshold,
            "r_min": None if core.r_min is None else str(core.r_min),
            "official_terminal": core.official_terminal,
            "intermediate": self.intermediate is not None,
            "gradient": self.gradient,
            "space": self.space,
            "returns": self.returns,
            "micro_batch": self.micro_batch,
            "on_error": self.on_error,
            "timeout": self.timeout,
            "seed": self.seed,
        }
        (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> FKSteering:
        """What :meth:`save_pretrained` wrote.

        Args:
            folder: where.
            overrides: settings that replace those of the folder, and always ``reward`` (and ``intermediate`` where
                there was one): a folder does not say which code is run, nor which server images are sent to.

        Raises:
            InputError: no such folder, an unknown setting, or a reward that was not given again.
        """
        try:
            settings: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise InputError("folder", str(folder), f"one that FKSteering.save_pretrained wrote ({error})") from None
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in (*settings, *overrides):
            if name not in known:
                raise InputError("setting of FKSteering", name, nearest(name, known))
        if settings.get("r_min") is not None:
            settings["r_min"] = float(settings["r_min"])
        learned = settings.pop("intermediate", False)
        text = settings.pop("reward", None)
        settings |= overrides
        if settings.get("reward") is None:
            was = "a function" if text is None else repr(text)
            raise InputError("reward", None, f"given again (it was {was}): from_pretrained(folder, reward=...)")
        if learned and "intermediate" not in settings:
            wanted = "given again (it was a function): from_pretrained(folder, intermediate=...)"
            raise InputError("intermediate", None, wanted)
        return cls(**settings)


class _Run:
    """What wraps a pipeline's scheduler and watches its network, and where in a run they are."""

    def __init__(self, steering: FKSteering, pipe: Any, scheduler: Any) -> None:
        self.steering, self.pipe, self.scheduler = steering, pipe, scheduler
        self.signature = inspect.signature(scheduler.step)
        self.times: Any = None  # the scheduler's tensor, a new one in each run
        self.i = self.n = 0
        self.scored: frozenset[int] = frozenset()
        self.core, self.state = steering.core, steering.core.init(0)
        self.generator = torch.Generator()
        self.noisy = False
        self.prompts: Sequence[str] | None = None
        self.conditioning: dict[str, Tensor] = {}

    # -------------------------------------------------------------- what the pipeline tells

    def encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prompt = args[0] if args else kwargs.get("prompt")
        self.prompts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
        return original(*args, **kwargs)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.pipe.scheduler is not self.scheduler:
            name = type(self.pipe.scheduler).__name__
            raise InputError("pipe.scheduler", name, "the one that FKSteering was installed on: install it again")
        if self.scheduler.timesteps is self.times and self.i:
            return
        # Network calls before the first step of a run: what belongs to its rows.
        self.conditioning = {}
        for name in ("class_labels", "encoder_hidden_states"):
            value = kwargs.get(name)
            if value is None and name == "encoder_hidden_states" and len(args) > 2:
                value = args[2]
            if isinstance(value, Tensor):
                self.conditioning[name] = value
        for name, value in (kwargs.get("added_cond_kwargs") or {}).items():
            if isinstance(value, Tensor):
                self.conditioning[name] = value

    def _begin(self, given: dict[str, Any]) -> None:
        steering, times, B = self.steering, self.scheduler.timesteps, len(given["sample"])
        k = steering.core.particles
        if B % k:
            wanted = f"a multiple of the {k} particles (num_images_per_prompt={k}, or {k} labels of each kind)"
            raise InputError("batch", B, wanted)
        values = [float(t) for t in times.tolist()] if isinstance(times, Tensor) else [float(t) for t in times]
        t = float(torch.as_tensor(given["timestep"]).flatten()[0])
        found = [i for i, value in enumerate(values) if abs(value - t) < 1e-3]
        begin = getattr(self.scheduler, "begin_index", None)
        offset = begin if begin in found else found[0] if found else 0
        self.times, self.i, self.n = times, 0, len(values) - offset
        self.scored = frozenset(scored_steps(steering.schedule, self.n))
        if steering.core.potential in ("importance", "best-of-n"):
            self.scored = frozenset({self.n - 1})
        self.core = steering.core
        self.state = self.core.init(B // k)
        self.generator.manual_seed((_drawn_seed(given.get("generator"), given["sample"]) + steering.seed) % 2**63)
        self.noisy = False
        steering.report, steering.reward.calls = Report(self.core.scale), 0
        self._check_conditioning(B, k)

    def _check_conditioning(self, B: int, k: int) -> None:
        for value in self.conditioning.values():
            if len(value) in (B, 2 * B):
                grouped = value.unflatten(0, (-1, k))
                if not bool((grouped == grouped[:, :1]).all()):
                    wanted = (
                        f"{k} images of each prompt or label, one after the other (a group shares its conditioning)"
                    )
                    raise InputError("batch", "rows of a group that differ in their prompt or label", wanted)

    # -------------------------------------------------------------- a step

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs).arguments
        wants = kwargs.pop("return_dict", True)
        if self.scheduler.timesteps is not self.times or self.i >= self.n:
            self._begin(given)
        steering, i, last = self.steering, self.i, self.i + 1 == self.n
        before = None if self.noisy else _noise_state(given.get("generator"), given["sample"])
        kernel = None
        if steering.gradient and not last:
            self._check_whole_step()
            kernel = self._kernel(original, args, kwargs)
        out = original(*args, return_dict=True, **kwargs)
        if before is not None:
            self._look_for_noise(before, given, i)
        after, log_ratio = out.prev_sample, None
        if kernel is not None:
            after, log_ratio = self._shifted(after, kernel, out, given)
        self.i += 1
        if i in self.scored:
            after = self._score(after, out, given, i, last, log_ratio)
        elif log_ratio is not None:
            self.state = self.core.weigh(self.state, None, log_ratio=log_ratio)
        if not wants:
            return (after,)
        out.prev_sample = after
        return out

    def _look_for_noise(self, before: list[Tensor], given: dict[str, Any], i: int) -> None:
        """Refuse a sampler that has drawn nothing when its first step is done."""
        state = _noise_state(given.get("generator"), given["sample"])
        changed = not state or any(not torch.equal(a, b) for a, b in zip(before, state, strict=True))
        self.noisy = changed or getattr(self.scheduler, "noise_sampler", None) is not None
        done = i + 1 >= max(int(getattr(self.scheduler, "order", 1)), 1) and not self._inside_next()
        chosen_at_the_end = self.steering.core.potential in ("importance", "best-of-n")
        if self.noisy or not done or self.n == 1 or chosen_at_the_end:
            return
        name = type(self.scheduler).__name__
        hint = "eta=1.0 in the pipeline's call" if "eta" in given else "for example DDIMScheduler with eta=1.0"
        raise InputError("scheduler", name, f"a sampler that draws noise, or copies stay copies for ever ({hint})")

    def _inside_next(self) -> bool:
        """Whether the next call is inside a step of one of our solvers (its index has gone on already)."""
        if not isinstance(self.scheduler, SlotScheduler) or self.scheduler.step_index is None:
            return False
        return self.scheduler.slots[self.scheduler.step_index].k > 0

    def _score(
        self, after: Tensor, out: Any, given: dict[str, Any], i: int, last: bool, log_ratio: Tensor | None
    ) -> Tensor:
        steering, k = self.steering, self.core.particles
        if last or steering.intermediate is None:
            clean = after if last else _clean_sample(self.scheduler, out, given, i, self.n)
            r = self._rewards(clean, i).reshape(-1, k)
        else:
            times = torch.as_tensor(given["timestep"], device=after.device).flatten()[:1].expand(len(after))
            found = torch.as_tensor(steering.intermediate(given["sample"], times)).detach().double().cpu()
            if found.shape != (len(after),) or not bool(found.isfinite().all()):
                wanted = f"{len(after)} finite numbers, one for each x_t"
                raise InputError("intermediate", f"of shape {tuple(found.shape)}", wanted)
            r = found.reshape(-1, k)
        if steering.scale == "auto" and not steering.report.steps and self.core.potential != "best-of-n":
            self.core = replace(self.core, scale=scale_for(r, AUTO_ESS))
            steering.report.scale = self.core.scale
        weighed = self.core.weigh(self.state, r, last, log_ratio)
        self.state, scored = self.core.resample(weighed, last, self.generator)
        self._warn(scored.ess, r, last)
        steering.report.steps.append(ScoredStep(i, r, scored.ess, scored.resampled, self.state.distinct))
        if last:
            return self._finish(after, r, scored.index)
        if bool(scored.resampled.any()) and not torch.equal(scored.index, torch.arange(k).expand_as(scored.index)):
            rows = _rows(scored.index).to(after.device)
            _permute(self.scheduler, rows, given["sample"].shape)
            for method in installed(self.pipe):
                if isinstance(method, Guidance):
                    method.take(rows)
            after = after[rows]
        return after

    def _finish(self, after: Tensor, r: Tensor, index: Tensor) -> Tensor:
        """What is returned, and the report of it."""
        steering, state = self.steering, self.state
        G, k = r.shape
        ancestors = state.ancestors
        if self.core.potential == "best-of-n":
            index = r.nan_to_num(-torch.inf).sort(dim=1, descending=True, stable=True).indices
            ancestors = index
        if steering.returns == "best":
            best = r.nan_to_num(-torch.inf).argmax(1, keepdim=True)
            where = (index == best).double().argmax(1, keepdim=True)
            # The best of all that were scored, resampled or not.
            ancestors = torch.where((index == best).any(1, keepdim=True), ancestors.gather(1, where), best)
            index = best
        keep = torch.ones_like(index, dtype=torch.bool)
        if steering.returns == "unique":
            same = index[:, :, None] == index[:, None, :]
            keep = ~torch.tril(same, diagonal=-1).any(2)
        rows = _rows(index, k).reshape(G, -1)[keep]
        report = steering.report
        report.rewards = r.gather(1, index)[keep]
        report.prompts = torch.arange(G)[:, None].expand_as(index)[keep]
        report.ancestors = ancestors[keep]
        report.log_z = state.log_z
        report.reward_calls = steering.reward.calls
        return after[rows.to(after.device)]

    def _warn(self, ess: Tensor, r: Tensor, last: bool) -> None:
        if bool(r.isnan().all(1).any()):
            warnings.warn(
                "FKSteering: a prompt has no particle with a reward; its particles stay as they are", stacklevel=4
            )
        first = not self.steering.report.steps
        if first and not last and self.core.particles > 2 and float(ess.mean()) < 1.1:
            warnings.warn(
                f"FKSteering: at the first scored step one particle has all the weight (effective sample size "
                f"{float(ess.mean()):.2f} of {self.core.particles}); lower scale={self.core.scale:g}, or scale='auto'",
                stacklevel=4,
            )

    # -------------------------------------------------------------- rewards

    def _rewards(self, clean: Tensor, i: int) -> Tensor:
        steering, k = self.steering, self.core.particles
        B = len(clean)
        names = [f"particle {row % k} of prompt {row // k}, step {i + 1} of {self.n}" for row in range(B)]
        context = self._context(B)
        size = steering.micro_batch or B
        found = []
        for start in range(0, B, size):
            part = slice(start, start + size)
            images = clean[part] if steering.space == "latent" else decoded(self.pipe, clean[part])
            own = {name: None if value is None else value[part] for name, value in context.items()}
            found.append(steering.reward(images, names[part], **own))
        return torch.cat(found)

    def _context(self, rows: int) -> dict[str, Sequence[Any] | None]:
        """What is known of the rows: with guidance the labelled ones come last."""
        labels = self.conditioning.get("class_labels")
        known = None if labels is None or len(labels) < rows else labels[-rows:].tolist()
        return {"prompts": _spread(self.prompts, rows), "labels": known}

    # -------------------------------------------------------------- gradient proposals

    def _check_whole_step(self) -> None:
        """A shift belongs to the end of a step, so a call of the network must be one."""
        scheduler = self.scheduler
        if isinstance(scheduler, SlotScheduler):
            i = scheduler.step_index
            slot = scheduler.slots[(scheduler.begin_index or 0) if i is None else i]
            whole = len(slot.step.stages) == 1
        else:
            whole = int(getattr(scheduler, "order", 1)) == 1
        if not whole:
            raise InputError(
                "scheduler", type(scheduler).__name__, "one of one network call a step, for gradient above 0"
            )

    def _kernel(self, original: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor, float]:
        """Mean and standard deviation of the step's Gaussian, by twins of the scheduler whose noise is 0 and 1."""
        twins = [self._twin(level, args, kwargs) for level in (0.0, 1.0)]
        mean = twins[0]
        return mean, float((twins[1] - mean).double().mean())

    def _twin(self, level: float, args: Any, kwargs: Any) -> Tensor:
        scheduler, own = self.scheduler, dict(kwargs)
        kind = type(scheduler)
        if isinstance(scheduler, SlotScheduler):
            twin: Any = copy.copy(scheduler)
            twin._begin_index = scheduler._begin_index
            if twin._solver is not None:
                twin._solver = _Constant(twin._solver, level)
        elif "variance_noise" in inspect.signature(kind.step).parameters:
            twin = copy.deepcopy({k: v for k, v in vars(scheduler).items() if k != "step"})
            state, twin = twin, copy.copy(scheduler)
            vars(twin).update(state)
            bound = inspect.signature(kind.step).bind(twin, *args, **kwargs).arguments
            own["variance_noise"] = torch.full_like(bound["sample"], level)
            own.pop("generator", None)
        else:
            wanted = "one of ours, or one whose step has variance_noise, for gradient above 0"
            raise InputError("scheduler", kind.__name__, wanted)
        return kind.step(twin, *args, **(own | {"return_dict": True})).prev_sample

    def _shifted(
        self, after: Tensor, kernel: tuple[Tensor, float], out: Any, given: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """x + δ with δ = γ w² α ∇ λ r, and log N(x + δ; m, w²) - log N(x + δ; m + δ, w²)."""
        mean, w = kernel
        if w <= 1e-12:
            return after, None
        steering, k = self.steering, self.core.particles
        clean = _clean_sample(self.scheduler, out, given, self.i, self.n)
        with torch.enable_grad(), upcast(getattr(self.pipe, "vae", None)):
            x0 = clean.detach().float().requires_grad_()
            images = x0 if steering.space == "latent" else decoded(self.pipe, x0)
            context = self._context(len(x0))
            asked = {name: context[name] for name in steering.reward.wants if context[name] is not None}
            r = steering.reward.function(images, **asked)
            steering.reward.calls += len(images)
            if not isinstance(r, Tensor) or not r.requires_grad:
                raise InputError("reward", steering.reward.text, "differentiable in the images, for gradient above 0")
            (slope,) = torch.autograd.grad(r.sum(), x0)
        t = float(torch.as_tensor(given["timestep"]).flatten()[0])
        alpha = Moment(self.i, self.n, t, None, self.scheduler).alpha
        shift = steering.gradient * w**2 * alpha * self.core.scale * slope.to(after)
        noise = (after - mean).double()
        log_ratio = -((noise * shift.double() + 0.5 * shift.double().square()).flatten(1).sum(1)) / w**2
        return after + shift, log_ratio.reshape(-1, k).cpu()


class _Constant:
    """A solver whose noise is a constant."""

    def __init__(self, solver: Any, level: float) -> None:
        self.solver, self.level, self.process = solver, level, solver.process

    def init(self, x: Tensor) -> Any:
        return self.solver.init(x)

    def stage(self, k: int, x: Tensor, pred: Any, step: Any, state: Any, noise: Any) -> Any:
        return self.solver.stage(k, x, pred, step, state, lambda like: torch.full_like(like, self.level))


# -------------------------------------------------------------------- pieces


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of latents, or of pixels in [-1, 1] where the pipeline has no VAE."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return (latents.float() / 2 + 0.5).clamp(0, 1)
    return (decode(vae, latents).float() / 2 + 0.5).clamp(0, 1)


def _clean_sample(scheduler: Any, out: Any, given: dict[str, Any], i: int, n: int) -> Tensor:
    """The clean sample that the network sees in x_t."""
    for name in ("pred_original_sample", "denoised"):
        found = getattr(out, name, None)
        if found is not None:
            return found
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    if getattr(scheduler, "model_outputs", None) and (algorithm.endswith("++") or scheduler.config.get("predict_x0")):
        return scheduler.model_outputs[-1]
    t = float(torch.as_tensor(given["timestep"]).flatten()[0])
    x = scheduler.scale_model_input(given["sample"], given["timestep"])
    return Moment(i, n, t, x, scheduler).x0(given["model_output"])


def _permute(scheduler: Any, rows: Tensor, shape: torch.Size) -> None:
    """Re-index what a scheduler carries of the samples: its tensors of their shape, alone or in lists."""
    if isinstance(scheduler, SlotScheduler):
        scheduler.take(rows)
        return

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows.to(value.device)] if value.shape == shape else value
        if isinstance(value, (list, tuple)):
            return type(value)(taken(item) for item in value)
        return value

    for name, value in list(vars(scheduler).items()):
        if isinstance(value, (Tensor, list, tuple)):
            vars(scheduler)[name] = taken(value)


def _rows(index: Tensor, k: int | None = None) -> Tensor:
    """Rows of the batch for indices (G, k) within groups."""
    k = index.shape[1] if k is None else k
    return (index + k * torch.arange(len(index))[:, None]).flatten()


def _spread(prompts: Sequence[str] | None, rows: int) -> list[str] | None:
    """The prompt of each row; each prompt has as many."""
    if not prompts or rows % len(prompts):
        return None
    return [prompt for prompt in prompts for _ in range(rows // len(prompts))]


def _generators(generator: Any, like: Tensor) -> Iterator[torch.Generator]:
    """Where a step draws its noise from; nothing where that can't be looked at (other devices' own generators)."""
    if generator is None:
        if like.is_cuda:
            yield torch.cuda.default_generators[like.device.index or 0]
        elif like.device.type == "cpu":
            yield torch.default_generator
    else:
        yield from [generator] if isinstance(generator, torch.Generator) else generator


def _noise_state(generator: Any, like: Tensor) -> list[Tensor]:
    return [one.get_state() for one in _generators(generator, like)]


def _drawn_seed(generator: Any, like: Tensor) -> int:
    """A seed that depends on where the generator is, without moving it."""
    one = next(_generators(generator, like), torch.default_generator)
    twin = torch.Generator(one.device)
    twin.set_state(one.get_state())
    return int(torch.randint(2**62, (1,), generator=twin, device=one.device))


def _shadow(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Put ``wrapper(original, ...)`` in front of a method of one object; returns what takes it away again."""
    before, original = vars(owner).get(name), getattr(owner, name)

    @functools.wraps(original)
    def shadow(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    vars(owner)[name] = shadow

    def undo() -> None:
        if before is None:
            vars(owner).pop(name, None)
        else:
            vars(owner)[name] = before

    return undo
