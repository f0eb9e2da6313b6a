"""Quantising a pipeline's network: which layers, the calibration pass, the method on a pipeline, saving, ``apply``."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steersman.diffusion import autoencoder
from steersman.diffusion.dpm_ot import probe, same_network
from steersman.diffusion.installing import Installable, taken_off
from steersman.diffusion.ptq4dm.calibration import (
    Calibration,
    CalibrationSet,
    collect,
    network,
)
from steersman.diffusion.ptq4dm.layers import (
    Activation,
    Call,
    Execution,
    Placement,
    QuantisedLayer,
    Scheme,
    check_int8,
    pack,
    unpack,
)
from steersman.diffusion.ptq4dm.quantisers import METRICS, Metric, check_bits
from steersman.diffusion.ptq4dm.reconstruction import reconstruct
from steersman.errors import InputError, nearest

RECORD, WEIGHTS = "ptq4dm.json", "ptq4dm.safetensors"
ENDS = 8
"""Bits, at least, of the network's first and last layers."""
TRACED = 256
"""States that the report's figures are taken over."""
ALWAYS_KEPT = ("GroupNorm", "LayerNorm", "RMSNorm", "Embedding")
PARTS_OF_TIME = 10
"""Parts of the run that ranges are reported for."""


# ------------------------------------------------------------------ which layers


def quantisable(net: nn.Module) -> tuple[dict[str, list[tuple[nn.Module, str]]], dict[str, str]]:
    """The Conv2d and Linear layers by name, with all places that each is in, and why others stay in floating point.

    Raises:
        InputError: attention projections that were fused.
    """
    for name, module in net.named_modules():
        if getattr(module, "fused_projections", False):
            allowed = "with separate attention projections (call unet.unfuse_qkv_projections() first)"
            raise InputError("pipe", f"fused projections in {name}", allowed)
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    kept: dict[str, str] = {}
    names = {id(module): name for name, module in net.named_modules()}
    for parent in list(net.modules()):
        for attribute, module in parent._modules.items():
            if module is None:
                continue
            name, kind = names[id(module)], type(module).__name__
            if isinstance(module, QuantisedLayer):
                raise InputError("pipe", name, "with a network that isn't quantised yet")
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if isinstance(module, nn.Conv2d) and (
                    module.padding_mode != "zeros" or isinstance(module.padding, str)
                ):
                    kept[name] = f"Conv2d with padding {module.padding}, {module.padding_mode}"
                else:
                    places.setdefault(name, []).append((parent, attribute))
            elif any(True for _ in module.parameters(recurse=False)):
                kept[name] = kind
    return places, kept


def _swap(places: Mapping[str, list[tuple[nn.Module, str]]], modules: Mapping[str, nn.Module]) -> None:
    """Put ``modules`` in the places of their names."""
    for name, module in modules.items():
        for parent, attribute in places[name]:
            parent._modules[attribute] = module


def _layer(places: Mapping[str, list[tuple[nn.Module, str]]], name: str) -> Any:
    parent, attribute = places[name][0]
    return parent._modules[attribute]


def _ends(net: nn.Module, order: Sequence[str], layers: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Names of the layers that take the network's sample and give its output: by their role, not their place in a
    list (a UNet's first registered layer is the time embedding's)."""
    first = "conv_in" if "conv_in" in order else next((n for n in order if isinstance(layers[n], nn.Conv2d)), order[0])
    return first, "conv_out" if "conv_out" in order else order[-1]


# ------------------------------------------------------------------ calibration


def quantize_ptq4dm(
    pipe: Any,
    bits: int = 8,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    calibration: Calibration | None = None,
    steps: int = 50,
    guidance: float | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    images: Tensor | None = None,
    activations: Placement = "input",
    metric: Metric = "l2.4",
    scheme: Scheme = "symmetric",
    by_timestep: bool = False,
    layers: Mapping[str, int] | None = None,
    adaround: int = 0,
    qdrop: float = 0.5,
    execution: Execution = "simulated",
    generator: torch.Generator | None = None,
    progress: Callable[[str], None] | None = None,
) -> PTQ4DM:
    """Quantise the network of a pipeline after training, without data; the pipeline itself is left as it is.

    Weights get the best range for each output channel. Activations get theirs in one pass over the calibration set,
    in shuffled batches, with all quantisers on: later layers see what earlier ones make of it.

    Args:
        pipe: a diffusers pipeline with the scheduler that it is to be sampled with.
        bits: of weights and activations, 2 to 8.
        weight_bits, activation_bits: of one of them; 32 leaves it.
        calibration: which states; by default those of the method.
        steps, guidance, labels, prompts: of the sampling run that visits them, see :func:`collect`. ``steps`` and
            ``guidance`` as the pipeline will be used.
        images: in [-1, 1], (M, C, H, W), or latents, for calibrations on images.
        activations: ``input``: what enters a layer is quantised, as integer kernels need. ``output``: what leaves
            it, as published; normalisation and SiLU come in between, so that no product is one of integers.
        metric: of the search for ranges.
        scheme: of activations.
        by_timestep: a range for each timestep of the sampler.
        layers: bits of layers by their names, or by patterns like ``mid_block.*``; 32 leaves a layer.
        adaround: iterations of learning, block by block, which way weights are rounded; 0 rounds to nearest.
        qdrop: share of activations that are not quantised while rounding is learnt, from 0 to 1.
        execution: what :meth:`PTQ4DM.install` does by default.
        generator: of everything random, on the CPU.
        progress: gets a line now and then.

    Returns:
        PTQ4DM: to be installed, or saved.

    Raises:
        InputError: a value that is not allowed, or a network that can't be quantised.
    """
    wanted = {"weights": bits if weight_bits is None else weight_bits}
    wanted["activations"] = bits if activation_bits is None else activation_bits
    check_quantisation(
        bits,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        steps=steps,
        activations=activations,
        metric=metric,
        scheme=scheme,
        layers=layers,
        by_timestep=by_timestep,
        adaround=adaround,
        qdrop=qdrop,
        execution=execution,
    )
    calibration = calibration or Calibration()
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    say = progress or (lambda line: None)
    net = network(pipe)
    _place_of_time(net)
    places, kept = quantisable(net)
    kinds = {str(p.dtype)[6:] for p in net.parameters() if p.is_floating_point()} - {"float32"}
    if adaround and kinds:
        allowed = f"0 for a network in {', '.join(sorted(kinds))}: rounding is learnt in float32"
        raise InputError("adaround", adaround, allowed)
    if not places:
        raise InputError("pipe", type(net).__name__, "with a network that has Conv2d or Linear layers")

    latents = None if images is None else _encoded(pipe, images)
    found = collect(
        pipe,
        calibration,
        steps=steps,
        guidance=guidance,
        labels=labels,
        prompts=prompts,
        latents=latents,
        generator=generator,
        progress=progress,
    )
    if by_timestep and len(found) < found.T:
        raise InputError("size", len(found), f"at least {found.T}, one state a call, for ranges by timestep")
    call = Call()
    originals = {name: _layer(places, name) for name in places}
    training = net.training
    net.eval()
    plain = ExitStack()
    plain.enter_context(taken_off(pipe))  # states are those of the pipeline with its methods; ranges the network's
    try:
        order, spread = _trace(net, found, originals, activations, generator)
        for name in set(places) - set(order):
            kept[name] = f"{type(originals[name]).__name__} that no calibration state reaches"
        for name in [n for n in order if not max(spread[n])]:
            warnings.warn(f"{name} stays in floating point: its activations are all zero", stacklevel=2)
            kept[name] = f"{type(originals[name]).__name__} with activations that are all zero"
            order.remove(name)
        chosen = _bits(net, order, originals, wanted, activations, layers or {})
        built = {}
        for name in order:
            own_w, own_a = chosen[name]
            if own_w == own_a == 32:
                kept[name] = f"{type(originals[name]).__name__}, as asked"
                continue
            act = None if own_a == 32 else Activation(own_a, metric, scheme, by_timestep)
            built[name] = QuantisedLayer(originals[name], own_w, act, activations, call, metric=metric)
        say(f"{len(built)} layers quantised, {len(kept)} modules kept in floating point")
        _swap(places, built)
        with _tell_time(net, call):
            _calibrate(net, found, built, call, calibration.batch, by_timestep, generator)
            if adaround:
                reconstruct(net, found, built, call, adaround, qdrop, generator, say)
            sqnr = _sqnr(net, found, built, call, generator)
    finally:
        _swap(places, originals)
        net.train(training)
        plain.close()

    facts, tensors = {}, {}
    for name, layer in built.items():
        facts[name] = {
            "weight_bits": layer.weight_bits,
            "activation_bits": 32 if layer.activation is None else layer.activation.bits,
            "ranges": [] if layer.activation is None else [[t, *r] for t, r in layer.activation.ranges.items()],
            "sqnr_db": sqnr[name],
            "peak_by_time": spread[name],
        }
        if layer.integers is not None and layer.scale is not None:
            tensors[f"{name}.integers"] = pack(layer.integers, layer.weight_bits)
            tensors[f"{name}.scale"] = layer.scale.cpu()
    text, numbers = probe(net)
    tensors["network"] = numbers
    record = {
        "network": text,
        "sampler": found.sampler,
        "calls": found.T,
        "calibration": calibration.to_json(),
        "activations": activations,
        "metric": metric,
        "scheme": scheme,
        "by_timestep": by_timestep,
        "adaround": adaround,
        "layers": facts,
        "kept": dict(sorted(kept.items())),
    }
    return PTQ4DM(record, tensors, execution=execution)


def check_quantisation(
    bits: int = 8,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    steps: int = 50,
    activations: str = "input",
    metric: str = "l2.4",
    scheme: str = "symmetric",
    layers: Mapping[str, int] | None = None,
    by_timestep: bool = False,
    adaround: int = 0,
    qdrop: float = 0.5,
    execution: str | None = None,
) -> None:
    """Refuse settings of :func:`quantize_ptq4dm` that no network can be quantised with.

    Raises:
        InputError: a value that is not allowed.
    """
    both = bits if weight_bits is None else weight_bits, bits if activation_bits is None else activation_bits
    check_bits("bits", bits)
    check_bits("weight_bits", both[0])
    check_bits("activation_bits", both[1])
    for name, value, known in (
        ("activations", activations, ("input", "output")),
        ("metric", metric, METRICS),
        ("scheme", scheme, ("symmetric", "asymmetric")),
    ):
        if value not in known:
            raise InputError(name, value, nearest(str(value), known))
    if scheme == "asymmetric" and metric not in ("l2.4", "mse", "l1"):
        raise InputError("metric", metric, "l2.4, mse or l1 where zero points are searched for, too")
    for name, count, least, what in (("adaround", adaround, 0, " of iterations"), ("steps", steps, 1, "")):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise InputError(name, count, f"a whole number{what}, from {least}")
    if adaround and by_timestep:
        raise InputError("by_timestep", True, "false with adaround, which learns against one range a layer")
    if not 0 <= qdrop <= 1:
        raise InputError("qdrop", qdrop, "a share from 0 to 1")
    for pattern, own in (layers or {}).items():
        check_bits(f"bits of {pattern}", own)
    _check_execution(execution, activations)
    if execution == "int8" and not layers and both != (8, 8):
        if 32 in both:
            raise InputError("execution", "int8", "simulated, as no layer has 8 bits for both factors")
        raise InputError("execution", "int8", f"simulated at W{both[0]}A{both[1]} (integer kernels have 8 bits)")


def _check_execution(execution: str | None, activations: str) -> None:
    if execution not in (None, "simulated", "int8"):
        raise InputError("execution", execution, "simulated or int8")
    if execution == "int8" and activations != "input":
        raise InputError("execution", "int8", "simulated, as the quantised outputs are no integers at the next layer")


def _bits(
    net: nn.Module,
    order: Sequence[str],
    layers: Mapping[str, nn.Module],
    wanted: Mapping[str, int],
    placement: Placement,
    own: Mapping[str, int],
) -> dict[str, tuple[int, int]]:
    """Bits of each layer's weights and activations.

    What enters the network stays as it is, as under the published quantisation of outputs: a state beyond its range
    would be clipped, the network would not see what to take away, and from step to step it would grow.
    """
    first, last = _ends(net, order, layers)
    for pattern in own:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in order):
            raise InputError("layers", pattern, nearest(pattern, order))
    found = {}
    for i, name in enumerate(order):
        w, a = wanted["weights"], wanted["activations"]
        if name in (first, last):
            w = max(w, ENDS)
        # Outputs: the network's own stays as it is, and what is computed last before it has 8 bits.
        if name == (last if placement == "input" else order[max(len(order) - 2, 0)]):
            a = max(a, ENDS)
        if name == (first if placement == "input" else last):
            a = 32
        for pattern, b in own.items():
            if fnmatch.fnmatchcase(name, pattern):
                w, a = b, b
        found[order[i]] = w, a
    return found


def _place_of_time(net: nn.Module) -> int:
    """Where the timestep is among the arguments of a network."""
    names = list(inspect.signature(net.forward).parameters)
    if "timestep" not in names:
        raise InputError("pipe", type(net).__name__, "with a network that takes a timestep, under that name")
    return names.index("timestep")


def _tell_time(net: nn.Module, call: Call, each: Callable[[], None] = lambda: None) -> RemovableHandle:
    """Let the layers know the timestep of each of the network's calls, until the handle is removed."""
    place = _place_of_time(net)

    def watch(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        call.timestep = positional[place] if len(positional) > place else named.get("timestep")
        each()

    return net.register_forward_pre_hook(watch, with_kwargs=True)


@torch.no_grad()
def _trace(
    net: nn.Module,
    found: CalibrationSet,
    layers: Mapping[str, nn.Module],
    placement: Placement,
    generator: torch.Generator,
) -> tuple[list[str], dict[str, list[float]]]:
    """The layers in the order in which the network calls them, and by tenth of the run (from the clean end) the
    largest values of what is to be quantised of each: how ranges move with time.

    Raises:
        InputError: activations that are not finite.
    """
    order: dict[str, None] = {}
    peaks = {name: [0.0] * PARTS_OF_TIME for name in layers}
    part = torch.zeros(0, dtype=torch.long)

    def hook(name: str) -> Any:
        def watch(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            order.setdefault(name)
            x = inputs[0] if placement == "input" else output
            if not bool(x.isfinite().all()):
                raise InputError("pipe", f"NaN or infinity in {name}", "with a network whose activations are finite")
            # A layer may have several rows, or one, for each of the network's.
            rows = x.detach().abs().flatten(1).amax(1).float().cpu()
            rows = rows.reshape(len(part), -1).amax(1) if len(rows) % len(part) == 0 else rows.amax().expand(len(part))
            for p in part.unique().tolist():
                peaks[name][p] = max(peaks[name][p], float(rows[part == p].max()))

        return watch

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        index = torch.randperm(len(found), generator=generator)[:TRACED]
        for rows in index.split(64):
            part = found.k[rows] * PARTS_OF_TIME // found.T
            net(**found.rows(rows.tolist(), _device(net)))
    finally:
        for handle in hooks:
            handle.remove()
    return list(order), peaks


@torch.no_grad()
def _calibrate(
    net: nn.Module,
    found: CalibrationSet,
    layers: Mapping[str, QuantisedLayer],
    call: Call,
    batch: int,
    by_timestep: bool,
    generator: torch.Generator,
) -> None:
    """One pass over the set, in which each activation quantiser sets its range and is on."""
    call.mode = "observe"
    if by_timestep:
        for t in found.timesteps.unique().tolist():
            own = (found.timesteps == t).nonzero().flatten()
            own = own[torch.randperm(len(own), generator=generator)]
            for rows in own.tensor_split(-(-len(own) // batch)):
                net(**found.rows(rows.tolist(), _device(net)))
    else:
        for index in found.batches(batch, generator):
            net(**found.rows(index, _device(net)))
    call.mode = "quantise"


@torch.no_grad()
def _sqnr(
    net: nn.Module, found: CalibrationSet, layers: Mapping[str, QuantisedLayer], call: Call, generator: torch.Generator
) -> dict[str, float]:
    """Signal-to-noise ratio of each layer's output in the quantised network, in decibels:
    10 log10 (sum of y^2 / sum of (y - y_q)^2), with all earlier layers quantised."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    ratio: dict[str, list[float]] = {}

    def hook(name: str) -> Any:
        seen = 0

        def watch(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
            nonlocal seen
            if call.mode == "float":
                kept[name].append(y.double())
                return
            if seen < len(kept[name]):
                reference = kept[name][seen]
                noise = float((reference - y.double()).square().sum())
                ratio.setdefault(name, [0.0, 0.0])
                ratio[name][0] += float(reference.square().sum())
                ratio[name][1] += noise
            seen += 1

        return watch

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        rows = torch.randperm(len(found), generator=generator)[:64].tolist()
        for mode in ("float", "quantise"):
            call.mode = mode  # type: ignore[assignment]
            net(**found.rows(rows, _device(net)))
    finally:
        call.mode = "quantise"
        for handle in hooks:
            handle.remove()
    return {n: 10 * math.log10(max(s, 1e-300) / noise) if noise else math.inf for n, (s, noise) in ratio.items()}


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


@torch.no_grad()
def _encoded(pipe: Any, images: Tensor) -> Tensor:
    """Images in [-1, 1] in the network's space: as the pipeline's VAE encodes them, where it has one."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not bool(images.isfinite().all()):
        kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError("images", kind, "finite numbers of shape (M, C, H, W)")
    vae: Any = getattr(pipe, "vae", None)
    if vae is None or images.shape[1] == network(pipe).config.get("in_channels"):  # type: ignore[union-attr,operator]
        return images.float().cpu()
    with autoencoder.upcast(vae):
        return torch.cat([autoencoder.encode(vae, part) for part in images.split(16)]).float().cpu()


# ------------------------------------------------------------------ the method on a pipeline


class PTQ4DM(Installable):
    """A quantised network on a pipeline (Shang et al., "Post-training Quantization on Diffusion Models", CVPR 2023).

    ``quantize_ptq4dm(pipe).install(pipe)`` puts quantised layers in the places of the network's own and ``uninstall``
    puts those back; the pipeline, its schedulers and whatever else works on it go on as before.

    Args:
        record, tensors: what :func:`quantize_ptq4dm` found.
        execution: ``simulated``: rounded values, multiplied in floating point, on any device. ``int8``: oneDNN's
            integer kernels on the CPU, for 8 bits and quantised inputs.

    Raises:
        InputError: an execution that these bits, or this machine, don't have.
    """

    def __init__(
        self, record: Mapping[str, Any], tensors: Mapping[str, Tensor], execution: Execution = "simulated"
    ) -> None:
        _check_execution(execution, record["activations"])
        self.record, self.tensors, self.execution = record, dict(tensors), execution
        if execution == "int8":
            for name, facts in self.layers.items():
                # A layer with either in floating point is a product of that kind.
                bits = facts["weight_bits"], facts["activation_bits"]
                if 32 not in bits and bits != (8, 8):
                    asked = f"W{bits[0]}A{bits[1]}"
                    raise InputError(
                        "execution", "int8", f"simulated, as {name} is {asked} (integer kernels have 8 bits)"
                    )
            if not self.in_integers:
                raise InputError("execution", "int8", "simulated, as no layer has 8 bits for both factors")

    @property
    def layers(self) -> Mapping[str, dict[str, Any]]:
        """Of each quantised layer: bits, ranges, SQNR in decibels, and its peaks by tenth of the run."""
        return self.record["layers"]

    @property
    def in_integers(self) -> list[str]:
        """The layers whose products int8 execution takes in integers; the first layer is never one of them."""
        return [n for n, facts in self.layers.items() if (facts["weight_bits"], facts["activation_bits"]) == (8, 8)]

    @property
    def kept(self) -> Mapping[str, str]:
        """What stayed in floating point, by name, and why."""
        return self.record["kept"]

    @staticmethod
    def check_settings(**settings: Any) -> None:
        """Refuse settings of ``apply`` and :meth:`mount` that can't be, before anything is made.

        Raises:
            InputError: a value that is not allowed.
        """
        from steersman.diffusion.ptq4dm.apply import check

        check(**settings)

    # -------------------------------------------------------------- on and off

    def attach(self, pipe: Any) -> None:
        net = network(pipe)
        places, _ = quantisable(net)
        if not same_network(probe(net), (self.record["network"], self.tensors["network"])):
            raise InputError("pipe", type(pipe).__name__, "with the network that was quantised (this one is another)")
        if self.execution == "int8":
            check_int8(net)
        call = Call()
        self._places, self._originals, built = places, {}, {}
        for name, facts in self.layers.items():
            original = self._originals[name] = _layer(places, name)
            act = None
            if facts["activation_bits"] != 32:
                act = Activation(facts["activation_bits"], by_timestep=self.record["by_timestep"])
                act.ranges = {t: (low, high) for t, low, high in facts["ranges"]}
            found = None
            if f"{name}.integers" in self.tensors:
                shape, b = tuple(original.weight.shape), facts["weight_bits"]
                found = unpack(self.tensors[f"{name}.integers"], b, shape), self.tensors[f"{name}.scale"]
            built[name] = QuantisedLayer(original, facts["weight_bits"], act, self.record["activations"], call, found)
            built[name].execution = self.execution
            built[name].train(original.training)
        _swap(places, built)
        warned = False

        def compare() -> None:
            nonlocal warned
            sampler = getattr(pipe, "scheduler", None)
            now = type(sampler).__name__, len(getattr(sampler, "timesteps", ()))
            if not warned and now[1] and now != (self.record["sampler"], self.record["calls"]):
                warned = True
                warnings.warn(
                    f"activation ranges were calibrated along {self.record['sampler']} with {self.record['calls']} "
                    f"calls, and this run is of {now[0]} with {now[1]}",
                    stacklevel=2,
                )

        self._hook = _tell_time(net, call, compare)

    def detach(self, pipe: Any) -> None:
        self._hook.remove()
        for name, original in self._originals.items():
            # The originals were out of the network, whose device and precision may have changed meanwhile.
            now = _layer(self._places, name).weight
            original.to(now.device, now.dtype)
        _swap(self._places, self._originals)
        self._places, self._originals = {}, {}

    @classmethod
    def mount(cls, pipe: Any, folder: str | Path, execution: Execution | None = None) -> Any:
        """A pipeline like ``pipe`` whose network is quantised as in ``folder``; ``pipe`` stays as it is.

        ``execution`` is the folder's unless given.
        """
        twin = copy.copy(pipe)
        twin.__dict__ = {name: value for name, value in vars(pipe).items() if name != "_steersman_installed"}
        for name in ("unet", "transformer"):
            if isinstance(getattr(pipe, name, None), nn.Module):
                twin.__dict__[name] = copy.deepcopy(getattr(pipe, name))
        method = cls.from_pretrained(folder, execution).install(twin)
        twin.__dict__["footprint"] = lambda: method.footprint(network(twin))
        return twin

    # -------------------------------------------------------------- on disk

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``ptq4dm.json`` and ``ptq4dm.safetensors``, whose integers take as many bits as they have."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps({**self.record, "execution": self.execution}, indent=1) + "\n")
        save_file({name: t.contiguous() for name, t in self.tensors.items()}, folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: str | Path, execution: Execution | None = None) -> PTQ4DM:
        """What :meth:`save_pretrained` wrote.

        Raises:
            InputError: it can't be read.
        """
        try:
            record = json.loads((Path(folder) / RECORD).read_text())
            tensors = load_file(Path(folder) / WEIGHTS)
            saved = record.pop("execution")
            _ = record["layers"], record["calls"], tensors["network"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError("folder", str(folder), f"one that PTQ4DM.save_pretrained wrote ({reason})") from None
        return cls(record, tensors, execution or saved)

    # -------------------------------------------------------------- figures

    def footprint(self, net: nn.Module) -> int:
        """Bytes of the weights of ``net`` once quantised: integers, steps, and what stays as it is."""
        own = {f"{name}.weight" for name in self.layers if f"{name}.integers" in self.tensors}
        places = {id(p) for name, p in net.named_parameters() if name not in own}
        rest = sum(p.numel() * p.element_size() for p in net.parameters() if id(p) in places)
        return rest + sum(t.numel() * t.element_size() for name, t in self.tensors.items() if name != "network")

    def peaks(self, count: int) -> dict[str, list[float]]:
        """By tenth of the run, from the clean end, the largest activations of the layers whose move most."""
        found = {name: facts["peak_by_time"] for name, facts in self.layers.items()}
        seen = {name: [p for p in peaks if p > 0] for name, peaks in found.items()}
        order = sorted(seen, key=lambda name: -max(seen[name], default=1.0) / min(seen[name], default=1.0))
        return {name: found[name] for name in order[:count]}

    def report(self) -> dict[str, Any]:
        """How many layers, the signal-to-noise ratios (worst five by name), and which layers stayed in floating point,
        of the norms and embeddings, which all do, the number."""
        ratios = {name: facts["sqnr_db"] for name, facts in self.layers.items()}
        ordered = sorted(ratios, key=lambda name: ratios[name])
        return {
            "quantised": len(ratios),
            "norms_and_embeddings": sum(why in ALWAYS_KEPT for why in self.kept.values()),
            "kept": {name: why for name, why in self.kept.items() if why not in ALWAYS_KEPT},
            "sqnr_db": {
                "worst": ratios[ordered[0]] if ordered else math.inf,
                "median": float(np.median(list(ratios.values()))) if ordered else math.inf,
                "network": ratios.get("conv_out", math.inf),
            },
            "worst_layers": ordered[:5],
        }
