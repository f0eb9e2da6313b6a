r"""What adapters are trained on: points of guided sampling trajectories, with the guided output there.

A trajectory starts from noise and a condition c with its own scale omega ~ U(omega_min, omega_max), and is sampled by
the pipeline itself with classifier-free guidance. At each call of the network it keeps

    x_t,        target = out_u + omega (out_c - out_u),        t, omega, c

where out is what the network puts out (noise, velocity or image: guidance is linear, so one formula serves all). A
learned variance is the conditional one. x_t is the network's *input*, which has unit scale in every process, so that
half precision holds it in variance-exploding ones, too.

Earlier guidance distillation takes x_t from noised images instead (:func:`noised_pairs`). A guided sampler does not
visit those points: at inference its student is out of its training distribution.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steersman.diffusion.agd.injection import _bound
from steersman.diffusion.guidance import Guidance, Moment, network_of
from steersman.errors import InputError

INDEX = "trajectories.json"
_INPUTS = ("sample", "hidden_states", "timestep", "return_dict")
Progress = Callable[[str], None]


@dataclass
class Trajectories:
    """Points of ``n`` trajectories at ``S`` calls each; point p is call p % S of trajectory p // S.

    Args:
        inputs: x_t, (n, S, C, ...), as the network sees it.
        targets: guided outputs, (n, S, C', ...).
        timesteps: (n, S), float64.
        sigmas: (n, S), noise levels of the network's process (of the loss ``noise``).
        omegas: (n,).
        condition: by argument of the network (``added_cond_kwargs.text_embeds`` for nested ones), (n, ...).
        facts: steps, range of omega, negative prompt.
    """

    inputs: Tensor
    targets: Tensor
    timesteps: Tensor
    sigmas: Tensor
    omegas: Tensor
    condition: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.inputs.shape[0] * self.inputs.shape[1]

    def batch(self, points: Tensor) -> Points:
        """Points (b,) in single precision (or the double that was stored)."""
        rows, calls = points // self.inputs.shape[1], points % self.inputs.shape[1]
        wide = torch.promote_types(self.inputs.dtype, torch.float32)
        return Points(
            self.inputs[rows, calls].to(wide),
            self.targets[rows, calls].to(wide),
            self.timesteps[rows, calls],
            self.sigmas[rows, calls],
            self.omegas[rows],
            _nested({name: value[rows] for name, value in self.condition.items()}),
        )

    def save(self, folder: str | Path, part: int = 0) -> None:
        """Write ``part-00000.safetensors`` and ``trajectories.json`` (parts of one folder are read as one)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "inputs": self.inputs,
            "targets": self.targets,
            "timesteps": self.timesteps,
            "sigmas": self.sigmas,
            "omegas": self.omegas,
            **{f"condition.{name}": value for name, value in self.condition.items()},
        }
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / f"part-{part:05d}.safetensors")
        (folder / INDEX).write_text(json.dumps(dict(self.facts), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Trajectories:
        """All parts of a folder, in memory.

        Raises:
            InputError: there are none, or they can't be read.
        """
        return cls.joined(list(read_parts(folder)))

    @classmethod
    def joined(cls, parts: Sequence[Trajectories]) -> Trajectories:
        """One set of several."""
        names = ("inputs", "targets", "timesteps", "sigmas", "omegas")
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        condition = {name: torch.cat([part.condition[name] for part in parts]) for name in parts[0].condition}
        return cls(**tensors, condition=condition, facts=parts[0].facts)


@dataclass
class Points:
    """A batch of points; the fields are those of :class:`Trajectories`, with the condition nested as it is passed."""

    inputs: Tensor
    targets: Tensor
    timesteps: Tensor
    sigmas: Tensor
    omegas: Tensor
    condition: dict[str, Any]

    def to(self, device: Any) -> Points:
        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(item) for name, item in value.items()}
            if device is not None and torch.device(device).type == "mps" and value.dtype == torch.float64:
                value = value.float()
            return value.to(device)

        return Points(*(moved(getattr(self, name)) for name in self.__dataclass_fields__))


def read_parts(folder: str | Path) -> Iterator[Trajectories]:
    """The parts of a folder, one at a time: for sets that memory does not hold."""
    folder = Path(folder)
    files = sorted(folder.glob("part-*.safetensors"))
    if not files:
        raise InputError("trajectories", str(folder), "a folder that collect_cfg_trajectories(out=...) wrote")
    try:
        facts = json.loads((folder / INDEX).read_text())
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            condition = {k.removeprefix("condition."): found.pop(k) for k in list(found) if k.startswith("condition.")}
            yield Trajectories(**found, condition=condition, facts=facts)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError("trajectories", str(folder), f"one that can be read ({reason})") from None


class _Teacher(Guidance):
    """Classifier-free guidance with a scale for each row, which keeps what it sees."""

    def __init__(self, omegas: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.omegas, self.dtype = omegas, dtype
        self.points: list[tuple[Tensor, Tensor, float, float]] = []
        self.condition: dict[str, Tensor] = {}
        self.raw: Tensor | None = None

    def guide(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        assert uncond is not None and moment.x is not None and self.raw is not None
        w = self.omegas.to(cond.device, cond.dtype).reshape(-1, *[1] * (cond.ndim - 1))
        guided = uncond + w * (cond - uncond)
        target = guided
        if self.raw.ndim == cond.ndim and self.raw.shape[1] > cond.shape[1]:  # a learned variance
            rest = self.raw[:, cond.shape[1] :].chunk(2)[0 if self.cond_first else 1]
            target = torch.cat([guided, rest], dim=1)
        levels = moment.levels
        self.points.append((self._stored(moment.x), self._stored(target), moment.timestep, levels[1]))
        return guided

    cond_first = False

    def _stored(self, x: Tensor) -> Tensor:
        found = x.detach().to("cpu", self.dtype)
        if not bool(found.isfinite().all()):
            raise InputError("dtype", str(self.dtype), "torch.float32: a value of this trajectory overflows")
        return found

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        network = network_of(pipe)
        self.cond_first = type(pipe).__name__ in ("DiTPipeline",)

        def given(module: Any, args: Any, kwargs: Any) -> None:
            if not self.condition:
                rows = 2 * len(self.omegas)
                half = slice(0, rows // 2) if self.cond_first else slice(rows // 2, rows)
                self.condition = dict(_flat(_bound(module, args, kwargs), rows, half))

        def seen(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.raw = output[0] if isinstance(output, tuple) else output.sample

        hooks = [
            network.register_forward_pre_hook(given, with_kwargs=True),
            network.register_forward_hook(seen, with_kwargs=True),
        ]
        try:
            with self.install(pipe):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def trajectories(self, facts: Mapping[str, Any]) -> Trajectories:
        B, S = len(self.omegas), len(self.points)
        xs, targets, times, sigmas = zip(*self.points, strict=True)
        return Trajectories(
            torch.stack(xs, dim=1),
            torch.stack(targets, dim=1),
            torch.tensor(times, dtype=torch.float64).expand(B, S).clone(),
            torch.tensor(sigmas, dtype=torch.float64).expand(B, S).clone(),
            self.omegas.float(),
            self.condition,
            facts,
        )


def collect_cfg_trajectories(
    pipe: Any,
    conditions: Sequence[str] | Sequence[int] | Tensor,
    *,
    guidance_scale: tuple[float, float] = (1.0, 6.0),
    num_inference_steps: int = 50,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float16,
    negative_prompt: str | None = None,
    generator: torch.Generator | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> Trajectories | Path:
    """Sample guided trajectories, one for each prompt or label.

    Memory is 2 S numbers of a latent for each trajectory: 50 steps of a 4x64x64 latent are 3.3 MB in half precision.

    Args:
        pipe: a classic pipeline with an unconditional branch, with any of its schedulers; its output type must allow
            "latent".
        conditions: prompts, or labels of a class-conditional pipeline.
        guidance_scale: range of omega.
        num_inference_steps: of the sampler.
        batch_size: trajectories at once.
        dtype: of what is kept: float16 (an error of 1e-3, relative to the largest value) or float32.
        negative_prompt: in place of the empty one; it is then part of what is learned.
        generator: of noise and scales.
        out: a folder for one file a batch; then memory holds one batch only, and the folder is returned, for
            :func:`read_parts`.
        progress: gets a line now and then.
        arguments: of the pipeline's call (height, width).

    Raises:
        InputError: an argument, or a pipeline without an unconditional branch.
    """
    parts: list[Trajectories] = []
    for count, part in enumerate(
        stream_cfg_trajectories(
            pipe,
            conditions,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            batch_size=batch_size,
            dtype=dtype,
            negative_prompt=negative_prompt,
            generator=generator,
            endless=False,
            **arguments,
        )
    ):
        if out is None:
            parts.append(part)
        else:
            part.save(out, count)
        if progress is not None:
            progress(f"trajectories: {min((count + 1) * batch_size, len(conditions))} of {len(conditions)}")
    return Path(out) if out is not None else Trajectories.joined(parts)


def stream_cfg_trajectories(
    pipe: Any,
    conditions: Sequence[str] | Sequence[int] | Tensor,
    *,
    guidance_scale: tuple[float, float] = (1.0, 6.0),
    num_inference_steps: int = 50,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    negative_prompt: str | None = None,
    generator: torch.Generator | None = None,
    endless: bool = True,
    **arguments: Any,
) -> Iterator[Trajectories]:
    """Batches of trajectories, made as they are asked for: nothing is kept.

    The arguments are those of :func:`collect_cfg_trajectories`; ``endless`` starts over when all conditions were used.
    """
    low, high = checked_range(guidance_scale)
    for name, value in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(name, value, "a whole number from 1")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError("dtype", dtype, "torch.float16, torch.bfloat16, torch.float32 or torch.float64")
    if not len(conditions):
        raise InputError("conditions", "none", "at least one prompt or label")
    shape = latent_shape(pipe)
    facts = {
        "steps": num_inference_steps,
        "guidance_scale_range": [low, high],
        "negative_prompt": negative_prompt,
        "data": "trajectory",
    }
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    while True:
        for start in range(0, len(conditions), batch_size):
            asked = conditions[start : start + batch_size]
            omegas = low + (high - low) * torch.rand(len(asked), generator=generator)
            noise = torch.randn(len(asked), *shape, generator=generator)
            teacher = _Teacher(omegas, dtype)
            with teacher.on(pipe), torch.no_grad():
                call(pipe, asked, noise, num_inference_steps, negative_prompt, generator, **arguments)
            yield teacher.trajectories(facts)
        if not endless:
            return


def call(
    pipe: Any,
    asked: Any,
    noise: Tensor | None,
    steps: int,
    negative_prompt: str | None = None,
    generator: torch.Generator | None = None,
    guidance_scale: float = 2.0,
    **arguments: Any,
) -> Any:
    """One guided run of a classic pipeline, from noise to latents."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    if "output_type" in accepted:
        given["output_type"] = "latent" if "callback_on_step_end" in accepted else "pt"
    for name in ("labels", "class_labels", "prompt"):
        if name in accepted:
            given[name] = list(asked) if name == "prompt" else [int(v) for v in asked]
            break
    if negative_prompt is not None:
        if "negative_prompt" not in accepted:
            raise InputError("negative_prompt", negative_prompt, f"left out: {type(pipe).__name__} takes none")
        given["negative_prompt"] = [negative_prompt] * len(asked)
    network = network_of(pipe)
    if noise is not None and "latents" in accepted:
        given["latents"] = noise.to(next(network.parameters()).device, next(network.parameters()).dtype)
    if generator is not None and "generator" in accepted:
        given["generator"] = generator
    return pipe(**given, **arguments)


def noised_pairs(
    pipe: Any,
    latents: Tensor,
    conditions: Sequence[str] | Sequence[int] | Tensor,
    *,
    guidance_scale: tuple[float, float] = (1.0, 6.0),
    num_inference_steps: int = 50,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float16,
    negative_prompt: str | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Trajectories:
    """The same number of pairs with the same law of omega, at noised images: how guidance was distilled before.

        x_t = alpha_t x_0 + sigma_t eps,        t of the sampler's own timesteps, a fresh eps for each

    Args:
        latents: x_0, (n, C, ...), real images (or their latents) in the network's space, one for each condition.
        pipe, conditions, guidance_scale, num_inference_steps, batch_size, dtype, negative_prompt, generator, progress:
            as of :func:`collect_cfg_trajectories`.

    Raises:
        InputError: an argument, a pipeline without an unconditional branch, or images of other shapes.
    """
    if not isinstance(latents, Tensor) or tuple(latents.shape) != (len(conditions), *latent_shape(pipe)):
        shape = (len(conditions), *latent_shape(pipe))
        found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError("latents", found, f"of shape {shape}, one for each condition")
    low, high = checked_range(guidance_scale)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parts = []
    for start in range(0, len(conditions), batch_size):
        asked, x0 = conditions[start : start + batch_size], latents[start : start + batch_size]
        omegas = low + (high - low) * torch.rand(len(asked), generator=generator)
        teacher = _Teacher(omegas, dtype)
        noise = torch.randn(x0.shape, generator=generator)
        with teacher.on(pipe), _replaced(pipe, teacher, x0, generator), torch.no_grad():
            call(pipe, asked, noise, num_inference_steps, negative_prompt, generator)
        facts = {
            "steps": num_inference_steps,
            "guidance_scale_range": [low, high],
            "negative_prompt": negative_prompt,
            "data": "diffusion",
        }
        parts.append(teacher.trajectories(facts))
        if progress is not None:
            progress(f"pairs: {min(start + batch_size, len(conditions))} of {len(conditions)} images")
    return Trajectories.joined(parts)


@contextmanager
def _replaced(pipe: Any, teacher: _Teacher, x0: Tensor, generator: torch.Generator) -> Iterator[None]:
    """While the pipeline runs, its network sees noised images, whatever the sampler makes of them."""
    network = network_of(pipe)

    def noised(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _bound(module, args, kwargs)
        t = given["timestep"]
        t = float(t.flatten()[0]) if isinstance(t, Tensor) else float(t)
        x = given["sample"] if "sample" in given else given["hidden_states"]
        alpha, sigma = Moment(0, 1, t, None, pipe.scheduler).levels
        z = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        z = torch.cat([z, z]).to(x.device, x.dtype)
        if args:
            return (z, *args[1:]), kwargs
        name = "sample" if "sample" in kwargs else "hidden_states"
        return args, kwargs | {name: z}

    # First of all hooks: the teacher's see what it puts in.
    hook = network.register_forward_pre_hook(noised, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def checked_range(guidance_scale: Any) -> tuple[float, float]:
    """omega_min and omega_max."""
    try:
        low, high = (float(v) for v in guidance_scale)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not 1 <= low <= high < math.inf:
        raise InputError("guidance_scale", guidance_scale, "a range from 1 on, like (1.0, 6.0)")
    return low, high


def latent_shape(pipe: Any) -> tuple[int, int, int]:
    config: Any = network_of(pipe).config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.in_channels), height, width


def _flat(given: Mapping[str, Any], rows: int, half: slice, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors with a row for each of both branches, cut to the conditional ones."""
    for name, value in given.items():
        if not prefix and name in _INPUTS:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, rows, half, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and value.ndim and len(value) == rows:
            yield f"{prefix}{name}", value[half].detach().cpu()


def _nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in flat.items():
        inner = found
        *above, last = name.split(".")
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return found
