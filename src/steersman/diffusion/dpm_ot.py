r"""DPM-OT: most of the reverse chain replaced by one optimal-transport lookup.

Let y_1, ..., y_M be latents of M known images at a timestep k of the process,

    y_i = α_k x_i + σ_k ε_i,        ε_i ~ N(0, I),                            (or states of the model's own sampling)

and T the semi-discrete optimal map from noise μ onto them, each with mass 1/M (:mod:`steersman.math.semidiscrete`):

    T(x) = y_i,    i = argmax_i (<x, y_i> + h_i).

A sample is drawn as x ~ μ, y = T(x), and then the last steps of any sampler from y at k down: as few network calls
as the noise that is left needs. Near a fold of the Brenier potential T jumps between far latents; such x can be
drawn anew (``topk``, ``threshold``). With ``renoise`` the latent is α_k x_i + σ_k ε for a fresh ε: then outputs are not
a fixed set of M, which is ours and not in the paper.

Under uniform weights T(x) for x ~ μ is uniform over the bank, whatever the coupling: a *random* index has the same law.
What transport adds is which noise goes with which image.

Z. Li, S. Li, Z. Wang, N. Lei, Z. Luo, X. Gu, "DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport",
ICCV 2023, arXiv:2307.11308.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from steersman.diffusion import autoencoder
from steersman.diffusion.classical import DDIMScheduler
from steersman.diffusion.images import load_pipeline, read_images
from steersman.diffusion.solver import Generators
from steersman.errors import InputError
from steersman.math.semidiscrete import SOURCES, SemiDiscreteMap, Source, duplicates, fit

Coupling = Literal["ot", "random"]
COUPLINGS: tuple[str, ...] = get_args(Coupling)
Maps = Literal["auto", "joint", "class", "both"]
MAPS: tuple[str, ...] = get_args(Maps)

TENSORS, RECORD = "map.safetensors", "map.json"
PROBED = 4096
"""Numbers of the network that tell it from another."""
BATCH = 250
NOTICE = """# A DPM-OT map

This folder holds the images that it was made from: `map.safetensors` has each of them, clean (`clean`) and with noise
on it (`bank`). Whoever has the folder has the data, and samples drawn with few network calls are close to single
images of it. Treat it as you treat the data: its licence, its privacy, its deletion.
"""


# ------------------------------------------------------------------ the map


@dataclass(frozen=True)
class TransportMap:
    """A bank of latents at one noise level, and the optimal maps from noise onto it.

    Make one with :meth:`from_images` or :meth:`from_states`.

    Args:
        bank: y, (M, C, H, W), as the network sees them at ``timestep``.
        clean: x, (M, C, H, W): the latents without noise.
        labels: (M,), of networks with classes; None for a bank without.
        joint: the map onto the whole bank, if it was fitted.
        classes: by label, the map onto that label's items.
        timestep: k.
        alpha: α_k of the schedule that the noise is of.
        kind: images, or states.
        network: tells the model that the map was made with, see :func:`probe`.
        scheduler: the configuration of its scheduler.
    """

    bank: Tensor
    clean: Tensor
    labels: Tensor | None
    joint: SemiDiscreteMap | None
    classes: Mapping[int, SemiDiscreteMap]
    timestep: int
    alpha: float
    kind: str
    network: tuple[str, Tensor]
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sigma(self) -> float:
        return math.sqrt(1 - self.alpha**2)

    @property
    def source(self) -> str:
        """The law of the noise that the maps were fitted for: gaussian or uniform."""
        return self._maps()[0].source

    def _maps(self) -> list[SemiDiscreteMap]:
        return [*([] if self.joint is None else [self.joint]), *self.classes.values()]

    # -------------------------------------------------------------- making one

    @classmethod
    def from_images(
        cls,
        pipe: Any,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        timestep: int | None = None,
        source: Source = "gaussian",
        maps: Maps = "auto",
        generator: torch.Generator | None = None,
        progress: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> TransportMap:
        """A map onto real images, brought to the noise level of ``timestep`` by the forward process.

        Args:
            pipe: a diffusers pipeline with a unet (and a VAE, whose latents are then the bank's).
            images: (M, C, H, W) in [-1, 1], or latents of the network's own shape.
            labels: (M,), for networks with classes.
            timestep: k, from 1 to T - 1; None is 3/10 of T.
            source: the law of the noise that the map is fitted for: gaussian, or uniform on the unit cube.
            maps: ``joint`` (one over the whole bank), ``class`` (one a label), ``both``, or ``auto``: both where
                there are labels.
            generator: for ε and for the fit, on the CPU.
            progress: gets a line now and then.
            settings: of :func:`steersman.math.semidiscrete.fit`.

        Raises:
            InputError: an empty bank, NaN, images that don't fit the network, a timestep outside the schedule.
        """
        alpha, k = _level(pipe, timestep)
        clean = _encoded(pipe, images)
        noise = torch.randn(clean.shape, generator=generator)
        bank = alpha * clean + math.sqrt(1 - alpha**2) * noise
        return cls._fitted(pipe, bank, clean, labels, k, alpha, "images", source, maps, generator, progress, settings)

    @classmethod
    def from_states(
        cls,
        pipe: Any,
        count: int,
        labels: Tensor | None = None,
        *,
        timestep: int | None = None,
        steps: int = 50,
        source: Source = "gaussian",
        maps: Maps = "auto",
        generator: torch.Generator | None = None,
        progress: Callable[[str], None] | None = None,
        arguments: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> TransportMap:
        """A map onto states that the model's own sampling (DDIM, ``steps`` calls) passes at ``timestep``.

        No data is needed, and none is kept: the bank holds samples.

        Args:
            pipe, timestep, source, maps, generator, progress, settings: as in :meth:`from_images`.
            count: M.
            labels: (count,) to ask for; None for networks without classes, or for the null label.
            steps: network calls of a state, from 2.
            arguments: further ones of the pipeline (prompt, guidance_scale, ...).
        """
        alpha, k = _level(pipe, timestep)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError("count", count, "a whole number from 1")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise InputError("steps", steps, "a whole number from 2")
        T = int(pipe.scheduler.config.num_train_timesteps)
        below = min(max(1, round(steps * k / T)), k, steps - 1)
        above = np.linspace(T - 1, k, min(steps - below, T - 1 - k) + 1).round()
        times = [*above.tolist(), *(k * np.arange(below - 1, 0, -1) / below).round().tolist()]
        states, ends = [], []

        def keep(_: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if i + 1 == len(above) - 1:
                states.append(tensors["latents"].detach().float().cpu())
            return {}

        own = pipe.scheduler
        try:
            pipe.scheduler = DDIMScheduler.from_config(own.config)
            for start in range(0, count, BATCH):
                part = slice(start, min(start + BATCH, count))
                x = torch.randn((part.stop - start, *_shape(pipe)), generator=generator)
                extra: dict[str, Any] = dict(arguments or {})
                if labels is not None:
                    extra["labels"] = labels[part]
                if "prompt" in extra and isinstance(extra["prompt"], str):
                    extra["prompt"] = [extra["prompt"]] * len(x)
                with _laid_out(pipe.scheduler, times):
                    out = pipe(latents=x.to(pipe.unet.dtype), output_type="latent", callback_on_step_end=keep, **extra)
                ends.append(out.images.detach().float().cpu())
                if len(above) == 1:
                    states.append(x)
                if progress is not None:
                    progress(f"{part.stop}/{count} states")
        finally:
            pipe.scheduler = own
        bank, clean = torch.cat(states), torch.cat(ends)
        return cls._fitted(pipe, bank, clean, labels, k, alpha, "states", source, maps, generator, progress, settings)

    @classmethod
    def _fitted(
        cls,
        pipe: Any,
        bank: Tensor,
        clean: Tensor,
        labels: Tensor | None,
        k: int,
        alpha: float,
        kind: str,
        source: Source,
        maps: Maps,
        generator: torch.Generator | None,
        progress: Callable[[str], None] | None,
        settings: Mapping[str, Any],
    ) -> TransportMap:
        if maps not in MAPS:
            raise InputError("maps", maps, f"one of {', '.join(MAPS)}")
        if source not in SOURCES:
            raise InputError("source", source, f"one of {', '.join(SOURCES)}")
        labels, device = _checked_labels(pipe, labels, len(bank)), getattr(pipe.unet, "device", "cpu")
        if labels is None and maps in ("class", "both"):
            raise InputError("maps", maps, "auto or joint (the bank has no labels)")

        def one(rows: Tensor, name: str) -> SemiDiscreteMap:
            points = bank[rows].flatten(1).to(device)
            found = _moved(fit(points, source=source, generator=generator, **settings), "cpu")
            if progress is not None:
                progress(
                    f"{name}: {len(rows)} items, residual {found.residual:.3g}, worst cell off by {found.worst:.0%}, "
                    f"{found.iterations} iterations"
                )
            return found

        joint = None if maps == "class" else one(torch.arange(len(bank)), "joint")
        classes = {}
        if labels is not None and maps != "joint":
            for label in labels.unique().tolist():
                classes[label] = one((labels == label).nonzero()[:, 0], f"class {label}")
        config = {name: value for name, value in dict(pipe.scheduler.config).items() if not name.startswith("_")}
        return cls(bank, clean, labels, joint, classes, k, alpha, kind, probe(pipe.unet), config)

    # -------------------------------------------------------------- lookup

    def look_up(
        self,
        noise: Tensor,
        labels: Tensor | None = None,
        *,
        coupling: Coupling = "ot",
        topk: int = 1,
        threshold: float = 0.7,
        generator: Generators = None,
    ) -> Tensor:
        """Index (B,) of the bank's item for each of ``noise`` (B, C, H, W), standard normal.

        For a map of uniform noise, Φ of the noise is used, which is uniform.

        Args:
            labels: (B,) restricts row b to items of that label; None is the joint map.
            coupling: ``ot``; or ``random``, an index that has nothing to do with the noise.
            topk, threshold: see :meth:`~steersman.math.semidiscrete.SemiDiscreteMap.singular`.
            generator: for the random coupling and for redraws; a list holds one per sample.
        """
        if coupling not in COUPLINGS:
            raise InputError("coupling", coupling, f"one of {', '.join(COUPLINGS)}")
        if isinstance(generator, Sequence):
            rows = [
                self.look_up(
                    noise[i : i + 1],
                    None if labels is None else labels[i : i + 1],
                    coupling=coupling,
                    topk=topk,
                    threshold=threshold,
                    generator=one,
                )
                for i, one in enumerate(generator)
            ]
            return torch.cat(rows)
        x = noise.detach().flatten(1).to(self.bank.device).double()
        if self.source == "uniform":
            x = torch.special.ndtr(x)
        index = torch.empty(len(x), dtype=torch.long, device=x.device)
        for rows_of_x, rows_of_bank, found in self._groups(labels, len(x)):
            rows_of_x, rows_of_bank = rows_of_x.to(x.device), rows_of_bank.to(x.device)
            if coupling == "random":
                where = x.device if generator is None else generator.device
                i = torch.randint(len(rows_of_bank), (len(rows_of_x),), generator=generator, device=where).to(x.device)
            else:
                i = found.sample(x[rows_of_x], generator, topk, threshold)[1]
            index[rows_of_x] = rows_of_bank[i]
        return index

    def _groups(self, labels: Tensor | None, count: int) -> Iterator[tuple[Tensor, Tensor, SemiDiscreteMap]]:
        """(rows of the noise, rows of the bank, map) for each label that is asked for."""
        if labels is None:
            if self.joint is None:
                raise InputError("labels", None, "given (the map was made with maps=class)")
            yield torch.arange(count), torch.arange(len(self.bank)), self.joint
            return
        if self.labels is None:
            raise InputError("labels", labels.unique().tolist(), "left out: the bank has no labels")
        if not self.classes:
            raise InputError("labels", labels.unique().tolist(), "left out: the map was made with maps=joint")
        for label in labels.unique().tolist():
            if label not in self.classes:
                allowed = f"among the bank's labels: {', '.join(map(str, self.classes))}"
                raise InputError("labels", label, allowed)
            yield (labels == label).nonzero()[:, 0], (self.labels == label).nonzero()[:, 0], self.classes[label]

    def latents(self, index: Tensor, renoise: bool = False, generator: Generators = None) -> Tensor:
        """y of the items, (B, C, H, W); with ``renoise`` α_k x_i + σ_k ε for fresh ε."""
        if not renoise:
            return self.bank[index]
        x = self.clean[index]
        ε = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)  # type: ignore[arg-type]
        return self.alpha * x + self.sigma * ε

    def to(self, device: torch.device | str) -> TransportMap:
        """The same map with the bank on another device, where lookups are then computed."""
        return TransportMap(
            **{
                **vars(self),
                "bank": self.bank.to(device),
                "clean": self.clean.to(device),
                "labels": None if self.labels is None else self.labels.to(device),
                "joint": None if self.joint is None else _moved(self.joint, device),
                "classes": {label: _moved(m, device) for label, m in self.classes.items()},
            }
        )

    # -------------------------------------------------------------- figures, files

    def report(self) -> dict[str, Any]:
        """Bank size, duplicates, and how well the cells are balanced."""
        maps = self._maps()
        return {
            "bank": len(self.bank),
            "duplicates": duplicates(self.clean),
            "timestep": self.timestep,
            "alpha": self.alpha,
            "kind": self.kind,
            "source": self.source,
            "maps": len(maps),
            "residual": max(m.residual for m in maps),
            "worst_cell": max(m.worst for m in maps),
            "empty_cells": sum(m.empty for m in maps),
            "iterations": sum(m.iterations for m in maps),
            "draws": sum(m.draws for m in maps),
            "converged": all(m.converged for m in maps),
        }

    def save(self, folder: str | Path) -> None:
        """Writes ``map.safetensors``, ``map.json`` and a ``README.md`` that says what the folder holds."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"bank": self.bank, "clean": self.clean, "probe": self.network[1]}
        if self.labels is not None:
            tensors["labels"] = self.labels
        groups: dict[str, Any] = {}
        named = ({} if self.joint is None else {"joint": self.joint}) | {
            f"class.{k}": m for k, m in self.classes.items()
        }
        for name, m in named.items():
            tensors |= {f"{name}.h": m.h, f"{name}.masses": m.masses, f"{name}.angles": m.angles}
            groups[name] = {n: getattr(m, n) for n in ("checked", "residual", "iterations", "draws", "converged")}
        save_file({n: v.detach().cpu().contiguous() for n, v in tensors.items()}, folder / TENSORS)
        record = {
            "format": 1,
            "timestep": self.timestep,
            "alpha": self.alpha,
            "kind": self.kind,
            "source": self.source,
            "network": self.network[0],
            "scheduler": _plain(self.scheduler),
            "groups": groups,
            "holds_data": self.kind == "images",
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        text = NOTICE if self.kind == "images" else NOTICE.replace("the data", "the model's samples")
        (folder / "README.md").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> TransportMap:
        """The map of a folder that :meth:`save` (or ``steersman apply dpm-ot``) wrote.

        Raises:
            InputError: no such folder, or files that don't belong together.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            t = load_file(folder / TENSORS)
            labels = t.get("labels")
            maps: dict[str, SemiDiscreteMap] = {}
            for name, facts in record["groups"].items():
                rows = slice(None) if name == "joint" else labels == int(name.partition(".")[2])
                points = t["bank"][rows].flatten(1)
                maps[name] = SemiDiscreteMap(
                    bank=points,
                    h=t[f"{name}.h"],
                    weights=torch.full((len(points),), 1 / len(points), dtype=torch.float64),
                    source=record["source"],
                    angles=t[f"{name}.angles"],
                    masses=t[f"{name}.masses"],
                    **facts,
                )
                if maps[name].h.shape != (len(points),):
                    raise ValueError(f"{name} has {len(maps[name].h)} heights for {len(points)} items")
            return cls(
                bank=t["bank"],
                clean=t["clean"],
                labels=labels,
                joint=maps.pop("joint", None),
                classes={int(name.partition(".")[2]): m for name, m in maps.items()},
                timestep=record["timestep"],
                alpha=record["alpha"],
                kind=record["kind"],
                network=(record["network"], t["probe"]),
                scheduler=record["scheduler"],
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError("map", str(folder), f"a folder that DPM-OT's map was saved to ({error})") from error


# ------------------------------------------------------------------ the pipeline


class DPMOTPipeline:
    """A diffusers pipeline that starts from a bank's latents: noise -> T(noise) -> the last steps of its sampler.

    Called as the wrapped pipeline is (``ClassConditionalPipeline``, ``StableDiffusionPipeline``, or any that takes
    ``latents``, ``num_inference_steps`` and ``generator``), with its scheduler: ours, or one of diffusers' for
    variance-preserving processes that takes a list of timesteps (``DPMSolverMultistepScheduler``, ``DDPMScheduler``;
    in ``DDIMScheduler``'s place ours runs, with its settings).

    - ``latents`` are standard normal, and are looked up;
    - ``num_inference_steps`` is the number of network calls after the lookup; 0 returns the bank's clean items;
    - ``labels`` restrict the lookup to items of that label; without them the items bring their own.

    Args:
        pipe: the pipeline that the map was made with.
        map: a :class:`TransportMap`, or its folder.
        coupling: ``ot``; or ``random``, which ignores the noise: the control.
        renoise: fresh noise on the clean item, in place of the bank's.
        topk: redraw noise where the map jumps between its best ``topk`` items; 1 never does.
        threshold: of the angle between their facets, scaled to [0, 1] (0.7 in the authors' code).
        lookup_only: return the bank's clean items, whatever number of calls is asked for: the other control.

    Raises:
        InputError: a setting out of range; a map of another model, another shape or another noise level.
    """

    def __init__(
        self,
        pipe: Any,
        map: TransportMap | str | Path,
        *,
        coupling: Coupling = "ot",
        renoise: bool = False,
        topk: int = 1,
        threshold: float = 0.7,
        lookup_only: bool = False,
    ) -> None:
        if getattr(pipe, "unet", None) is None or getattr(pipe, "scheduler", None) is None:
            raise InputError("pipe", type(pipe).__name__, "a diffusers pipeline with a unet and a scheduler")
        if coupling not in COUPLINGS:
            raise InputError("coupling", coupling, f"one of {', '.join(COUPLINGS)}")
        for name, value in (("renoise", renoise), ("lookup_only", lookup_only)):
            if not isinstance(value, bool):
                raise InputError(name, value, "true or false")
        self.map = map if isinstance(map, TransportMap) else TransportMap.load(map)
        self.pipe, self.coupling, self.renoise = pipe, coupling, renoise
        self.topk, self.threshold, self.lookup_only = topk, threshold, lookup_only
        most = min(len(m.angles) for m in self.map._maps()) + 1
        if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= most:
            raise InputError("topk", topk, f"a whole number from 1 to {most}")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise InputError("threshold", threshold, "a number from 0 to 1")
        if tuple(self.map.bank.shape[1:]) != _shape(pipe):
            raise InputError("map", tuple(self.map.bank.shape[1:]), f"of the pipeline's latents, {_shape(pipe)}")
        if not same_network(self.map.network, probe(pipe.unet)):
            raise InputError("map", f"made with {self.map.network[0][:12]}", "made with this model (make it anew)")
        self._check_scheduler()
        if not isinstance(map, TransportMap) and (Path(map) / "unet").is_dir():
            self.pipe = copy.copy(pipe)  # whose network was tuned for these last steps, see finetune_last_steps
            tuned = type(pipe.unet).from_pretrained(Path(map) / "unet")
            self.pipe.unet = tuned.to(pipe.unet.device, pipe.unet.dtype).eval()

    @classmethod
    def mount(
        cls,
        pipe: Any,
        folder: str | Path,
        *,
        coupling: Coupling = "ot",
        renoise: bool = False,
        topk: int = 1,
        threshold: float = 0.7,
        lookup_only: bool = False,
    ) -> DPMOTPipeline:
        """``pipe`` with the map in ``folder``; the settings are the constructor's."""
        return cls(
            pipe,
            folder,
            coupling=coupling,
            renoise=renoise,
            topk=topk,
            threshold=threshold,
            lookup_only=lookup_only,
        )

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not yet set
            raise AttributeError(name)
        return getattr(self.pipe, name)

    @property
    def scheduler(self) -> Any:
        """The wrapped pipeline's."""
        return self.pipe.scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self.pipe.scheduler = value

    def to(self, *arguments: Any, **keywords: Any) -> DPMOTPipeline:
        """Moves the wrapped pipeline; the bank moves with :meth:`TransportMap.to`."""
        self.pipe.to(*arguments, **keywords)
        return self

    def plan(self, calls: int) -> Tensor:
        """The scheduler's timesteps from the map's level down: one for each of at most ``calls`` network calls.

        Raises:
            InputError: no plan of so few or so many calls.
        """
        self._check_scheduler()
        if calls == 0:
            return torch.zeros(0)
        sampler = self._sampler()
        _lay_out(sampler, self.map.timestep, calls)
        return sampler.timesteps

    @torch.no_grad()
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """See the class; arguments are those of the wrapped pipeline."""
        signature = inspect.signature(type(self.pipe).__call__)
        try:
            given = signature.bind_partial(self.pipe, *arguments, **keywords).arguments
        except TypeError as error:
            raise InputError("arguments", sorted(keywords), f"those of {type(self.pipe).__name__} ({error})") from None
        given = dict(list(given.items())[1:])
        given |= given.pop("kwargs", {})
        for name in ("timesteps", "sigmas"):
            if given.pop(name, None) is not None:
                raise InputError(name, "given", "left out: the map's noise level and the number of calls lay it out")
        calls = given.pop("num_inference_steps", 10)
        if isinstance(calls, bool) or not isinstance(calls, int) or not 0 <= calls <= self.map.timestep:
            raise InputError("num_inference_steps", calls, f"a whole number from 0 to {self.map.timestep}")
        calls = 0 if self.lookup_only else calls
        generator = given.get("generator")
        labels, count = self._asked(given)
        noise = given.pop("latents", None)
        shape = (count, *self.map.bank.shape[1:])
        if noise is None:
            device = self.pipe._execution_device
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(noise.shape) != shape:
            raise InputError("latents", tuple(noise.shape), f"of shape {shape}")
        if isinstance(generator, list) and len(generator) != count:
            raise InputError("generator", f"a list of {len(generator)}", f"one generator, or {count} of them")
        index = self.map.look_up(
            noise,
            labels,
            coupling=self.coupling,
            topk=self.topk,
            threshold=self.threshold,
            generator=generator,
        )
        if calls == 0:
            return self._clean(self.map.clean[index], given)
        # Nobody asked for a label: the network is told the items' own.
        if "labels" in signature.parameters and labels is None and self.map.labels is not None:
            given["labels"] = self.map.labels[index]
        given.pop("batch_size", None)
        latents = self.map.latents(index, self.renoise, generator).to(noise.device, self.pipe.unet.dtype)
        self._check_scheduler()
        own, sampler = self.pipe.scheduler, self._sampler()
        times = _lay_out(sampler, self.map.timestep, calls)
        try:
            self.pipe.scheduler = sampler
            with _laid_out(sampler, times):
                return self.pipe(**given, latents=latents, num_inference_steps=len(times))
        finally:
            self.pipe.scheduler = own

    # -------------------------------------------------------------- pieces

    def _sampler(self) -> Any:
        """The scheduler; for diffusers' DDIM, which takes no list of timesteps, ours of the same settings."""
        own = self.pipe.scheduler
        config: Any = own.config
        return DDIMScheduler.from_config(config) if type(own) is diffusers.DDIMScheduler else own

    def _asked(self, given: dict[str, Any]) -> tuple[Tensor | None, int]:
        """Labels (B,) that are asked for, if any, and B."""
        latents = given.get("latents")
        labels = given.get("labels")
        if labels is not None:
            y = torch.as_tensor(labels)
            if y.is_floating_point() or y.dtype == torch.bool or y.ndim > 1 or not y.numel():
                raise InputError("labels", labels, "one whole number, or one per image")
            count = given.get("batch_size") or (len(latents) if latents is not None else max(y.numel(), 1))
            y = y.cpu().long()
            if y.ndim == 0 or (len(y) == 1 and count > 1):
                y = y.reshape(1).expand(count)
            if len(y) != count:
                raise InputError("labels", f"{len(y)} labels", f"one label, or one for each of the {count} images")
            return y, count
        if latents is not None:
            return None, len(latents)
        prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
        rows = given.get("batch_size") or 1
        if embeds is not None:
            rows = len(embeds)
        elif isinstance(prompt, (list, tuple)):
            rows = len(prompt)
        return None, rows * (given.get("num_images_per_prompt") or 1)

    def _check_scheduler(self) -> None:
        """Refuses a scheduler in whose parametrisation the bank's latents are something else."""
        scheduler, k = self.scheduler, self.map.timestep
        name, table = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor) or float(scheduler.init_noise_sigma) != 1.0:
            raise InputError("scheduler", name, "one for x = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1")
        if k >= len(table):
            raise InputError("map", f"timestep {k}", f"at most {len(table) - 1}, the schedule's last timestep")
        alpha = math.sqrt(float(table[k]))
        if abs(alpha - self.map.alpha) > 1e-4:
            allowed = f"of the schedule's noise level at timestep {k} (alpha={alpha:.4f})"
            raise InputError("map", f"alpha={self.map.alpha:.4f}", allowed)

    def _clean(self, x: Tensor, given: Mapping[str, Any]) -> Any:
        """The bank's items as the wrapped pipeline would return them."""
        output_type = given.get("output_type", "pil")
        if hasattr(self.pipe, "_images"):
            images = self.pipe._images(x, output_type)
        elif output_type == "latent" or getattr(self.pipe, "vae", None) is None:
            images = x
        else:
            decoded = autoencoder.decode(self.pipe.vae, x)
            images = self.pipe.image_processor.postprocess(decoded, output_type=output_type)
        return ImagePipelineOutput(images=images) if given.get("return_dict", True) else (images,)


# Recorded under the room's name, where it is exported, not under this file's.
DPMOTPipeline.__module__ = "steersman.diffusion"


# ------------------------------------------------------------------ the last steps


def finetune_last_steps(
    pipe: Any,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    timestep: int | None = None,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 1e-5,
    label_dropout: float = 0.1,
    generator: torch.Generator | None = None,
    progress: Callable[[str], None] | None = None,
) -> float:
    """Train the network on, in place, at the noise levels that are left below the map's, with its encoder frozen.

    The usual loss |target - network(α_t x + σ_t ε, t)|², t uniform from 0 to ``timestep``; the first half of the
    network (input, embeddings, down and middle blocks) stays as it is. A tenth of the rate of training is usual.

    Args:
        pipe: with a ``UNet2DModel``.
        images, labels, timestep: as in :meth:`TransportMap.from_images`.
        steps, batch_size, learning_rate: of Adam.
        label_dropout: share of labels replaced by the null label, where there is one.
        generator: for batches, times and noise, on the CPU.
        progress: gets a line now and then.

    Returns:
        the mean loss of the last tenth of the steps.
    """
    if not isinstance(getattr(pipe, "unet", None), diffusers.UNet2DModel):
        raise InputError("pipe", type(pipe).__name__, "a pipeline whose unet is a UNet2DModel")
    unet: Any = pipe.unet
    scheduler: Any = pipe.scheduler
    for name, count in (("steps", steps), ("batch_size", batch_size)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(name, count, "a whole number from 1")
    if not 0 < learning_rate < math.inf:
        raise InputError("learning_rate", learning_rate, "a finite number above 0")
    _, k = _level(pipe, timestep)
    x, y = _encoded(pipe, images), _checked_labels(pipe, labels, len(images))
    if unet.config.num_class_embeds is not None and y is None:
        raise InputError("labels", None, "given, as the network is class-conditional")
    parameters = [
        p for name, p in unet.named_parameters() if name.startswith(("up_blocks", "conv_norm_out", "conv_out"))
    ]
    flags, training, null = (
        [(p, p.requires_grad) for p in unet.parameters()],
        unet.training,
        pipe.config.get("null_label"),
    )
    kind = scheduler.config.get("prediction_type", "epsilon")
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []
    try:
        unet.eval().requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        for step in range(1, steps + 1):
            rows = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator)
            t = torch.randint(k + 1, (len(rows),), generator=generator)
            ε = torch.randn(x[rows].shape, generator=generator)
            abar = scheduler.alphas_cumprod[t].double()[:, None, None, None]
            α, σ = abar.sqrt().float(), (1 - abar).sqrt().float()
            target = {"epsilon": ε, "sample": x[rows], "v_prediction": α * ε - σ * x[rows]}[kind]
            asked = {}
            if y is not None:
                dropped = torch.rand(len(rows), generator=generator) < (label_dropout if null is not None else 0.0)
                asked["class_labels"] = torch.where(dropped, null or 0, y[rows]).to(unet.device)
            noisy = (α * x[rows] + σ * ε).to(unet.device, unet.dtype)
            out = unet(noisy, t.to(unet.device), **asked).sample
            loss = (out.float() - target.to(unet.device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if progress is not None and step % max(steps // 5, 1) == 0:
                progress(f"step {step}/{steps}: loss {np.mean(losses[-max(steps // 5, 1) :]):.4g}")
    finally:
        unet.train(training)
        for p, flag in flags:
            p.requires_grad_(flag)
    return float(np.mean(losses[-max(steps // 10, 1) :]))


# ------------------------------------------------------------------ timetables


def _lay_out(scheduler: Any, k: int, calls: int) -> list[float]:
    """Timesteps of as many steps as fit ``calls`` network calls, evenly from ``k`` down.

    Raises:
        InputError: the scheduler has no such plan.
    """
    if isinstance(calls, bool) or not isinstance(calls, int) or not 1 <= calls <= k:
        raise InputError("num_inference_steps", calls, f"a whole number from 1 to {k}, the map's timestep")
    if _takes_times(scheduler):
        error: Exception | None = None
        for n in range(calls, 0, -1):
            times = [float(round(k * (n - i) / n)) for i in range(n)]
            try:
                _set(scheduler, times)
            except (ValueError, IndexError) as found:
                error = found
                continue
            if len(scheduler.timesteps) <= calls:
                return times
        reason = f" ({' '.join(str(error).split())})" if error is not None else ""
        name = type(scheduler).__name__
        raise InputError("num_inference_steps", calls, f"more, for {name} from timestep {k}{reason}")
    allowed = "one that takes a list of timesteps (all of steersman's; diffusers' DDIM, DDPM, DPMSolverMultistep)"
    raise InputError("scheduler", type(scheduler).__name__, allowed)


def _takes_times(scheduler: Any) -> bool:
    return "timesteps" in inspect.signature(type(scheduler).set_timesteps).parameters


def _set(scheduler: Any, times: Sequence[float], device: Any = None) -> None:
    """The scheduler laid out over ``times``."""
    whole = [int(t) if t == int(t) else t for t in times]
    type(scheduler).set_timesteps(scheduler, timesteps=whole, device=device)


@contextmanager
def _laid_out(scheduler: Any, times: Sequence[float]) -> Iterator[None]:
    """Within, whoever asks the scheduler for any number of steps gets ``times``.

    Pipelines differ in whether they take a list of timesteps; all of them ask their scheduler.
    """

    def set_timesteps(num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:
        _set(scheduler, times, device)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


# ------------------------------------------------------------------ the network and its data


def probe(network: Any) -> tuple[str, Tensor]:
    """What tells a network from others: a hash of its configuration and shapes, and some of its numbers."""
    config = {n: v for n, v in dict(getattr(network, "config", {})).items() if not n.startswith("_")}
    state = {n: v for n, v in network.state_dict().items() if v.is_floating_point()}
    shapes = {n: list(v.shape) for n, v in state.items()}
    text = json.dumps([_plain(config), shapes], sort_keys=True, default=str)
    each = max(1, PROBED // max(len(state), 1))
    parts = []
    for v in state.values():
        flat = v.detach().flatten()
        parts.append(flat[:: max(1, -(-len(flat) // each))].float().cpu())
    return hashlib.sha256(text.encode()).hexdigest(), torch.cat(parts) if parts else torch.zeros(0)


def same_network(a: tuple[str, Tensor], b: tuple[str, Tensor]) -> bool:
    """Equal up to what casting to half precision does."""
    return a[0] == b[0] and a[1].shape == b[1].shape and torch.allclose(a[1], b[1], rtol=1e-2, atol=1e-6)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config), default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)))


def _shape(pipe: Any) -> tuple[int, int, int]:
    config = pipe.unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def _moved(m: SemiDiscreteMap, device: torch.device | str) -> SemiDiscreteMap:
    tensors = {name: v.to(device) for name, v in vars(m).items() if isinstance(v, Tensor) and name != "angles"}
    return SemiDiscreteMap(**{**vars(m), **tensors})


def _level(pipe: Any, timestep: int | None) -> tuple[float, int]:
    """(α_k, k)."""
    table = getattr(getattr(pipe, "scheduler", None), "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        name = type(getattr(pipe, "scheduler", None)).__name__
        raise InputError("scheduler", name, "one that has alphas_cumprod, as DDIMScheduler")
    k = round(0.3 * len(table)) if timestep is None else timestep
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < len(table):
        raise InputError("timestep", timestep, f"a whole number from 1 to {len(table) - 1}, in the schedule")
    return math.sqrt(float(table[k])), k


@torch.no_grad()
def _encoded(pipe: Any, images: Tensor) -> Tensor:
    """Clean latents (M, C, H, W), float32, of images in [-1, 1], or of latents as they are."""
    wanted, vae = _shape(pipe), getattr(pipe, "vae", None)
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError("images", shape, f"of shape (M, {', '.join(map(str, wanted))}), at least one")
    if not bool(images.isfinite().all()):
        raise InputError("images", "pixels", "finite (there are NaN or infinities)")
    x = images.float().cpu()
    if vae is not None and tuple(x.shape[1:]) != wanted:
        with autoencoder.upcast(vae):
            x = torch.cat([autoencoder.encode(vae, part) for part in x.split(16)]).float().cpu()
    if tuple(x.shape[1:]) != wanted:
        raise InputError("images", tuple(images.shape[1:]), f"of the network's size (latents of {wanted})")
    return x


def _checked_labels(pipe: Any, labels: Tensor | None, count: int) -> Tensor | None:
    if labels is None:
        return None
    y = torch.as_tensor(labels).cpu()
    classes = pipe.unet.config.get("num_class_embeds")
    if classes is None:
        raise InputError("labels", "given", "left out: this network has no classes")
    if y.shape != (count,) or y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= classes:
        raise InputError("labels", tuple(y.shape), f"{count} whole numbers from 0 to {classes - 1}, one an item")
    return y.long()


# ------------------------------------------------------------------ apply


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    timestep: int | None = None,
    kind: Literal["images", "states"] = "images",
    size: int | None = None,
    source: Literal["gaussian", "uniform"] = "gaussian",
    maps: Literal["auto", "joint", "class", "both"] = "auto",
    method: Literal["newton", "adam"] = "newton",
    tolerance: float = 0.05,
    steps: int = 50,
    finetune: int = 0,
) -> dict[str, Any]:
    """Make the map from noise onto a bank of latents of the pipeline ``subject``.

    Args:
        subject: a diffusers pipeline folder, or hub id.
        input: real images: a folder (one folder a class, where the network has classes), .zip, .npz or .npy; or
            latents (n, C, H, W) as .pt, or as .safetensors with ``latents`` (and ``labels``). Not needed for states.
        out: where the map goes.
        seed: of everything random.
        log: gets a line now and then.
        timestep: the noise level of the bank, from 1; by default 3/10 of the training timesteps.
        kind: images with noise on them, or states of the model's own sampling.
        size: items of the bank: a random part of the images, or the number of states (1024 by default).
        source: law of the noise that is looked up: gaussian or uniform.
        maps: joint, class (one a label), both, or auto (both where there are labels).
        method: of the fit: newton or adam.
        tolerance: relative error of the cells' masses that is asked for.
        steps: network calls of a state.
        finetune: train the network on for so many steps at the noise levels below the map's, with its encoder
            frozen; it is saved beside the map, and used with it.

    Returns:
        dict: bank size, duplicates, the fit's residual and worst cell.

    Raises:
        InputError: a subject, images or settings that don't fit together.
    """
    pipe = load_pipeline(subject)
    if getattr(pipe, "unet", None) is None:
        raise InputError("subject", str(subject), "a diffusers pipeline with a unet")
    pipe.set_progress_bar_config(disable=True)
    if size is not None and size < 1:
        raise InputError("size", size, "a whole number from 1")
    generator = torch.Generator().manual_seed(seed)
    shared: dict[str, Any] = {
        "timestep": timestep,
        "source": source,
        "maps": maps,
        "generator": generator,
        "progress": log,
        "method": method,
        "tolerance": tolerance,
    }
    if kind == "states":
        count = 1024 if size is None else size
        labels = None
        classes, null = pipe.unet.config.get("num_class_embeds"), pipe.config.get("null_label")
        if classes is not None:
            labels = torch.arange(count) % (classes - (null is not None))
        made = TransportMap.from_states(pipe, count, labels, steps=steps, **shared)
    else:
        images, labels = _read_bank(pipe, input)
        if size is not None and size < len(images):
            rows = torch.randperm(len(images), generator=generator)[:size]
            images, labels = images[rows], None if labels is None else labels[rows]
        made = TransportMap.from_images(pipe, images, labels, **shared)
    made.save(out)
    facts = made.report()
    if finetune:
        # The bank's clean items are what there is to train on, of states as well.
        facts["finetuning_loss"] = finetune_last_steps(
            pipe,
            made.clean,
            made.labels,
            timestep=made.timestep,
            steps=finetune,
            generator=generator,
            progress=log,
        )
        pipe.unet.save_pretrained(out / "unet")
    return facts


def _read_bank(pipe: Any, source: Path | None) -> tuple[Tensor, Tensor | None]:
    """Images in [-1, 1] or latents, and labels of networks with classes."""
    classes = pipe.unet.config.get("num_class_embeds")
    suffix = "" if source is None else source.suffix.lower()
    if source is None or suffix not in (".pt", ".pth", ".safetensors"):
        channels = 3 if getattr(pipe, "vae", None) is not None else pipe.unet.config.in_channels
        needed = classes is not None and pipe.config.get("null_label") is None
        images, labels = read_images(source, channels, True if needed else (None if classes is not None else False))
        return 2 * images - 1, labels
    try:
        if suffix == ".safetensors":
            with safe_open(source, framework="pt") as file:
                found: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            found = torch.load(source, map_location="cpu", weights_only=True)
        if isinstance(found, Tensor):
            found = {"latents": found}
        latents, labels = found["latents"], found.get("labels")
    except Exception as error:  # torch.load has many
        reason = " ".join(str(error).split())[:150]
        allowed = f"a tensor (n, C, H, W), or a dict with 'latents' and 'labels' ({reason})"
        raise InputError("input", str(source), allowed) from None
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or tuple(latents.shape[1:]) != _shape(pipe):
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError("input", shape, f"floating-point latents of shape (n, {', '.join(map(str, _shape(pipe)))})")
    return latents, labels if classes is not None else None
