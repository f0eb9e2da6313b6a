r"""What activation ranges are calibrated on: states that the sampler itself visits, at times drawn from a skewed law.

A network's activations change with the time t that it is told, and so do the ranges that fit them. The calibration set
is one state for each of n items,

    k_i = int(clip(T (m + s z_i), 0, T - 1)),  z_i ~ N(0, 1),        x_i = the sampler's state, k_i calls from the end,

where T is the sampler's number of network calls, and k = 0 its last, at the clean end (Shang et al. 2023, section 4.3:
normally distributed time-step calibration, m <= 1/2). A state is kept with everything that the network was told
with it: its true timestep, and the condition (label or prompt, or none in the unconditional branch of guidance).

The authors' code pairs states and times otherwise: its loop counts up while time runs down, and the state is kept
*after* the step, so an item of time k has the state of T - 2 - k (``pairing="mirrored"``). On top of this the
network is told the call's number in place of its timestep (``pairing="published"``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from steersman.errors import InputError, nearest

States = Literal["noise_backward_t", "raw_forward_t", "raw", "random"]
Times = Literal["normal", "poisson", "uniform", "random", "mean", "tenth", "one", "last"]
Pairing = Literal["true", "mirrored", "published"]
LEAST = 16
"""States that ranges may be calibrated on."""
CHUNK = 2**16
"""Numbers of a state that are sampled at once."""


@dataclass(frozen=True)
class Calibration:
    """What is calibrated on; the defaults are the method (NDTC), all else is what it was compared with.

    Args:
        states: ``noise_backward_t``, states of the sampler; ``raw_forward_t``, images with noise of time t on them;
            ``raw``, images as they are; ``random``, Gaussian noise.
        times: ``normal`` (clipped), ``poisson`` (of mean m T); ``uniform``, an even grid; ``random``, from the
            first 0.8 T at random; ``mean`` (T/2), ``tenth`` (T/10), ``one`` (1), ``last`` (T - 1) for all items.
        size: n, items, from 16.
        mean, std: m and s, in units of T; m from 0 to 1/2, s above 0.
        pairing: of sampled states and times; see the module's text.
        batch: items of a calibration batch, from 1; the last ones are never dropped.

    Raises:
        InputError: a value that is not allowed.
    """

    states: States = "noise_backward_t"
    times: Times = "normal"
    size: int = 1024
    mean: float = 0.4
    std: float = 0.4
    pairing: Pairing = "true"
    batch: int = 256

    def __post_init__(self) -> None:
        for name, value, known in (
            ("states", self.states, get_args(States)),
            ("times", self.times, get_args(Times)),
            ("pairing", self.pairing, get_args(Pairing)),
        ):
            if value not in known:
                raise InputError(name, value, nearest(str(value), known))
        for name, count, least in (("size", self.size, LEAST), ("batch", self.batch, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                what = " (states to calibrate on)" if name == "size" else ""
                raise InputError(name, count, f"a whole number from {least}{what}")
        if not 0 <= self.mean <= 0.5:
            raise InputError("mean", self.mean, "a number from 0 (the clean end) to 0.5, in units of the calls")
        if not 0 < self.std < math.inf:
            raise InputError("std", self.std, "a number above 0, in units of the calls")
        if self.pairing != "true" and self.states != "noise_backward_t":
            raise InputError("pairing", self.pairing, "true, for states that are not sampled")

    def draw(self, T: int, generator: torch.Generator) -> Tensor:
        """k (n,), calls from the clean end, each from 0 to ``T`` - 1."""
        n = self.size
        if self.times == "normal":
            k = T * (self.mean + self.std * torch.randn(n, generator=generator, dtype=torch.float64))
        elif self.times == "poisson":
            k = torch.poisson(torch.full((n,), self.mean * T, dtype=torch.float64), generator=generator)
        elif self.times == "uniform":
            k = torch.arange(n, dtype=torch.float64) * T / n
        elif self.times == "random":
            k = torch.rand(n, generator=generator, dtype=torch.float64) * 0.8 * T
        else:
            fixed = {"mean": T / 2, "tenth": T / 10, "one": 1.0, "last": T - 1.0}[self.times]
            k = torch.full((n,), fixed, dtype=torch.float64)
        return k.clamp(0, T - 1).long()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class CalibrationSet:
    """States, each with what the network was told with it.

    Attributes:
        items: arguments of the network's forward, by name, one row each; on the CPU.
        k: (n,) calls from the clean end.
        timesteps: (n,) as the network is told them.
        T: network calls of the sampler.
        sampler: name of the scheduler that drew them.
        schedule: its timesteps, falling.
    """

    items: list[dict[str, Any]]
    k: Tensor
    timesteps: Tensor
    T: int
    sampler: str
    schedule: list[float]

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, index: Sequence[int], device: Any = None) -> dict[str, Any]:
        """The network's arguments for some items, as one batch."""
        first, *others = [self.items[i] for i in index]

        def joined(*values: Any) -> Any:
            first = values[0]
            if not isinstance(first, Tensor):
                return first
            own = first.ndim > 0 and len(first) == 1  # else it is what all rows share
            return (torch.cat(values) if own else first).to(device)

        found = tree_map(joined, first, *others)
        return {**found, "timestep": self.timesteps[list(index)].to(device)}

    def batches(self, size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """All items in random order, in batches of nearly equal sizes of at most ``size``.

        Shuffled, because in a running mean over batches the last ones weigh most.
        """
        order = torch.randperm(len(self), generator=generator)
        for part in order.tensor_split(-(-len(self) // size)):
            yield part.tolist()


def network(pipe: Any) -> nn.Module:
    """The network of a pipeline: its ``unet`` or ``transformer``.

    Raises:
        InputError: it has neither.
    """
    for name in ("unet", "transformer"):
        found = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return found
    raise InputError("pipe", type(pipe).__name__, "a diffusers pipeline with a unet or a transformer")


@torch.no_grad()
def collect(
    pipe: Any,
    calibration: Calibration,
    *,
    steps: int = 50,
    guidance: float | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    latents: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[str], None] | None = None,
) -> CalibrationSet:
    """Run the pipeline in full precision from noise, and keep each item's state at its time.

    Conditions are taken in turn (the null label too, if no guidance is given); under guidance, items alternate
    between the conditional and the unconditional branch. Items of images have the condition of their image, if there
    are as many conditions as images.

    Args:
        pipe: a diffusers pipeline, with the scheduler that it is to be used with.
        calibration: which states.
        steps: of the scheduler.
        guidance: scale; None is the pipeline's own.
        labels: classes (by default all of them in turn); ``prompts``: texts, which a text-to-image pipeline needs.
        latents: clean images in the network's space, (M, C, H, W), for the states ``raw`` and ``raw_forward_t``.
        generator: of everything random, on the CPU.
        progress: gets a line now and then.

    Raises:
        InputError: no prompts, or no images, where they are needed.
    """
    net, n = network(pipe), calibration.size
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    chosen = None
    if calibration.states in ("raw", "raw_forward_t"):
        if latents is None or not len(latents):
            raise InputError("images", None, f"given, for states={calibration.states}")
        chosen = torch.randint(len(latents), (n,), generator=generator)
    conditions = _conditions(pipe, n, labels, prompts, chosen, 0 if latents is None else len(latents), guidance)
    sampled = calibration.states == "noise_backward_t"

    def begin(own: Sequence[int], see: Callable[[int, dict[str, Any]], bool]) -> Tensor | None:
        """A run of the pipeline for some of the items."""
        asked: dict[str, Any] = {name: [values[i] for i in own] for name, values in conditions.items()}
        seed = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        return _run(pipe, net, see, steps, guidance, seed, asked or {"batch_size": len(own)})

    begin([0], lambda j, told: False)  # lays the schedule out
    schedule = [float(t) for t in pipe.scheduler.timesteps]
    T = len(schedule)
    k = calibration.draw(T, generator)
    wanted = torch.tensor([_call(int(own), T, calibration.pairing) if sampled else 0 for own in k])

    items: list[Any] = [None] * n
    chunk = min(n, max(4, CHUNK // _numbers(net)))
    # Items of like times together: a run ends with the last call that any of its items waits for.
    for done, rows in enumerate(wanted.argsort(stable=True).split(chunk), 1):
        own = rows.tolist()
        last = int(wanted[rows].max())

        def see(j: int, told: dict[str, Any], own: list[int] = own, last: int = last) -> bool:
            """Keep what is to be kept of call ``j``; whether the run is to go on."""
            count = len(next(iter(told.values())))
            for local, i in enumerate(own):
                if j == min(int(wanted[i]), T - 1):
                    branch = i % (count // len(own))
                    items[i] = _row(told, branch * len(own) + local, count)
                    items[i].pop("timestep", None)
            return j < last

        sample = begin(own, see)
        for local, i in enumerate(own):
            if int(wanted[i]) == T and sample is not None:
                items[i][next(iter(items[i]))] = sample[local : local + 1].cpu()
        if progress is not None:
            progress(f"calibration states: {min(done * chunk, n)} of {n}")

    timesteps = torch.tensor(schedule)[len(schedule) - 1 - k]
    found = CalibrationSet(items, k, timesteps, len(schedule), type(pipe.scheduler).__name__, schedule)
    if calibration.pairing == "published":
        found.timesteps = k.to(timesteps.dtype)
    if not sampled:
        images = None if chosen is None or latents is None else latents[chosen]
        _put(found, calibration.states, images, pipe.scheduler, generator)
    return found


def _call(k: int, T: int, pairing: Pairing) -> int:
    """The call whose input an item of time ``k`` is given; T is the sample after the last one."""
    return T - 1 - k if pairing == "true" else k + 1


class _Enough(Exception):
    """Ends a run of the pipeline of which no more is wanted."""


def _run(
    pipe: Any,
    net: nn.Module,
    see: Callable[[int, dict[str, Any]], bool],
    steps: int,
    guidance: float | None,
    generator: torch.Generator,
    asked: dict[str, Any],
) -> Tensor | None:
    """A run of the pipeline, with ``see(j, arguments)`` before call j of the network; the latents that come out."""
    signature = inspect.signature(net.forward)
    taken = inspect.signature(type(pipe).__call__).parameters
    calls = 0

    def watch(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal calls
        if not see(calls, dict(signature.bind(*positional, **named).arguments)):
            raise _Enough
        calls += 1

    arguments = {"num_inference_steps": steps, "generator": generator, **asked}
    if "output_type" in taken:
        arguments["output_type"] = "latent"
    if guidance is not None:
        if "guidance_scale" not in taken:
            raise InputError("guidance", guidance, f"left out: {type(pipe).__name__} has none")
        arguments["guidance_scale"] = guidance
    hook = net.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        images = pipe(**arguments).images
    except _Enough:
        return None
    finally:
        hook.remove()
    return images if isinstance(images, Tensor) else None


def _conditions(
    pipe: Any,
    n: int,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    chosen: Tensor | None,
    images: int,
    guidance: float | None,
) -> dict[str, list[Any]]:
    """What each item is asked to be, by the name of the pipeline's argument."""
    taken = inspect.signature(type(pipe).__call__).parameters
    values: Sequence[Any]
    if "prompt" in taken:
        if not prompts:
            raise InputError("prompts", prompts, "one text or more, of the kind that the pipeline will be asked for")
        name, values = "prompt", prompts
    elif "labels" in taken or "class_labels" in taken:
        name = "labels" if "labels" in taken else "class_labels"
        config: Any = network(pipe).config
        classes = config.get("num_class_embeds" if name == "labels" else "num_embeds_ada_norm")
        if not classes:
            return {}
        # Without guidance the null label is one of the classes, so that its branch isn't new to the ranges.
        left_out = pipe.config.get("null_label") if guidance is not None else None
        values = labels if labels is not None else [y for y in range(classes) if y != left_out]
    else:
        return {}
    if chosen is not None and len(values) == images:
        return {name: [values[i] for i in chosen.tolist()]}
    return {name: [values[i % len(values)] for i in range(n)]}


def _row(told: dict[str, Any], row: int, rows: int) -> dict[str, Any]:
    """One row of a call's arguments, on the CPU; what all rows share as it is."""

    def taken(value: Any) -> Any:
        own = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        return value[row : row + 1].detach().cpu().clone() if own else value

    return tree_map(taken, told)


def _put(
    found: CalibrationSet, states: States, images: Tensor | None, scheduler: Any, generator: torch.Generator
) -> None:
    """Replace the states by images, noisy images, or noise."""
    name = next(iter(found.items[0]))
    for i, item in enumerate(found.items):
        noise = torch.randn(item[name].shape, generator=generator, dtype=torch.float32)
        if images is None:
            x = noise
        elif images[i].shape != item[name].shape[1:]:
            raise InputError("images", tuple(images[i].shape), f"of the network's size {tuple(item[name].shape[1:])}")
        elif states == "raw":
            x = images[i : i + 1]
        else:
            table = getattr(scheduler, "alphas_cumprod", None)
            if not isinstance(table, Tensor) or float(scheduler.init_noise_sigma) != 1.0:
                kind = type(scheduler).__name__
                raise InputError("scheduler", kind, "one for x = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1")
            abar = float(table[int(found.timesteps[i])])
            x = math.sqrt(abar) * images[i : i + 1] + math.sqrt(1 - abar) * noise
        item[name] = x.to(item[name].dtype)


def _numbers(net: Any) -> int:
    """How many numbers a state has, as the network's configuration says; 2^14 where it doesn't."""
    channels, side = net.config.get("in_channels"), net.config.get("sample_size")
    if not channels or not side:
        return 2**14
    height, width = (side, side) if isinstance(side, int) else side
    return int(channels * height * width)
