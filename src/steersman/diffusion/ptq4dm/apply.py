"""``steersman apply ptq4dm``: a folder with a pipeline's quantised network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.diffusion.asked import SUFFIXES, read_asked, takes_prompts
from steersman.diffusion.images import load_pipeline, read_images
from steersman.diffusion.ptq4dm.calibration import Calibration, Pairing, States, Times, network
from steersman.diffusion.ptq4dm.layers import Execution, Placement, Scheme
from steersman.diffusion.ptq4dm.method import check_quantisation, quantize_ptq4dm
from steersman.diffusion.ptq4dm.quantisers import Metric
from steersman.errors import InputError


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    bits: int = 8,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    states: States = "noise_backward_t",
    times: Times = "normal",
    size: int = 1024,
    mean: float = 0.4,
    std: float = 0.4,
    pairing: Pairing = "true",
    batch: int = 256,
    steps: int = 50,
    guidance: float | None = None,
    prompts: Path | None = None,
    activations: Placement = "input",
    metric: Metric = "l2.4",
    scheme: Scheme = "symmetric",
    by_timestep: bool = False,
    layers: str | None = None,
    adaround: int = 0,
    qdrop: float = 0.5,
    execution: Execution = "simulated",
) -> dict[str, Any]:
    """Quantise the network of the pipeline ``subject``.

    Args:
        subject: a diffusers pipeline folder, or hub id.
        input: what the pipeline is asked for, one a line (.txt), or in the column ``prompt`` or ``label`` (.csv,
            .jsonl); or images, for states of images: a folder, .zip, .npz (with ``labels`` or ``captions``) or .npy.
        out: where the quantised network goes.
        seed: of everything random.
        log: gets a line now and then.
        prompts: what the pipeline is asked for, where ``input`` holds images.
        layers: bits of single layers, like ``mid_block.*=32,conv_in=8``.
        bits: of weights and activations, 2 to 8.
        weight_bits, activation_bits: of one of them; 32 leaves it.
        states: noise_backward_t, states of the sampler; raw_forward_t, images with noise; raw, images; random, noise.
        times: normal (clipped), poisson, uniform, random, mean (T/2), tenth (T/10), one (1), last (T - 1).
        size: calibration items, at least 16.
        mean, std: of the times, in units of T; the mean from 0 to 1/2, std above 0.
        pairing: of sampled states and times, see :class:`Calibration`.
        batch: items of a calibration batch.
        steps, guidance: of the sampling run that visits the states: as the pipeline will be used.
        activations: input, what enters a layer is quantised; output, what leaves it, as published.
        metric: of the search for ranges.
        scheme: of activations.
        by_timestep: a range for each timestep of the sampler.
        adaround: iterations of learning which way weights are rounded; 0 rounds to nearest.
        qdrop: share of activations that are not quantised while rounding is learnt, 0 to 1.
        execution: simulated, or integer kernels: what is done by default when it is installed.

    Returns:
        dict: megabytes before and after, the layers' signal-to-noise ratios, and what stayed in floating point.

    Raises:
        InputError: a subject, input or settings that don't fit together.
    """
    calibration = Calibration(states, times, size, mean, std, pairing, batch)
    pipe = load_pipeline(subject)
    pipe.set_progress_bar_config(disable=True)
    net = network(pipe)
    labels: Any = None
    asked: Any = None
    images: Tensor | None = None
    for file in (input, prompts):
        if file is not None and file.suffix.lower() in SUFFIXES:
            found = read_asked(file, "input" if file is input else "prompts")
            asked, labels = (found.prompts, None) if takes_prompts(pipe) or not found.labels else (None, found.labels)
        elif file is not None and file is prompts:
            raise InputError("prompts", str(file), f"a file with one a line, or a table ({', '.join(SUFFIXES)})")
    if input is not None and input.suffix.lower() not in SUFFIXES:
        images, own_labels, captions = _images(pipe, input)
        labels = own_labels if labels is None and states in ("raw", "raw_forward_t") else labels
        asked = captions if asked is None else asked
        if len(images) > size:
            rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:size].tolist()
            images = images[rows]
            if own_labels is not None and labels is own_labels:
                labels = [own_labels[i] for i in rows]
            if captions is not None and asked is captions:
                asked = [captions[i] for i in rows]
    method = quantize_ptq4dm(
        pipe,
        bits,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        calibration=calibration,
        steps=steps,
        guidance=guidance,
        labels=labels,
        prompts=asked,
        images=images if states in ("raw", "raw_forward_t") else None,
        activations=activations,
        metric=metric,
        scheme=scheme,
        by_timestep=by_timestep,
        layers=_bits_of_layers(layers),
        adaround=adaround,
        qdrop=qdrop,
        execution=execution,
        generator=torch.Generator().manual_seed(seed),
        progress=log,
    )
    method.save_pretrained(out)
    before = sum(p.numel() * p.element_size() for p in net.parameters())
    after = method.footprint(net)
    return {"megabytes": after / 1e6, "megabytes_before": before / 1e6, "ratio": before / after, **method.report()}


def check(**settings: Any) -> None:
    """Refuse settings of :func:`apply` that no network can be quantised with."""
    own = {field.name for field in fields(Calibration)}
    Calibration(**{name: value for name, value in settings.items() if name in own})
    # What depends on the pipeline is checked with it.
    left = own | {"guidance", "prompts", "layers"}
    rest = {name: value for name, value in settings.items() if name not in left}
    check_quantisation(**rest, layers=_bits_of_layers(settings.get("layers")))


def _images(pipe: Any, source: Path) -> tuple[Tensor, list[int] | None, list[str] | None]:
    """Images in [-1, 1], and their labels or captions, where there are any."""
    channels = 3 if getattr(pipe, "vae", None) is not None else network(pipe).config.get("in_channels")  # type: ignore[union-attr,operator]
    pixels, labels = read_images(source, channels, None)
    captions = None
    if source.suffix.lower() == ".npz":
        with np.load(source, allow_pickle=False) as found:
            captions = [str(text) for text in found["captions"]] if "captions" in found else None
    return 2 * pixels - 1, None if labels is None else labels.tolist(), captions


def _bits_of_layers(text: str | None) -> dict[str, int]:
    """``pattern=bits,pattern=bits`` as a table."""
    found = {}
    for piece in (text or "").split(","):
        if piece.strip():
            pattern, _, bits = piece.strip().rpartition("=")
            if not pattern or not bits.isdecimal():
                raise InputError("layers", text, "like mid_block.*=32,conv_in=8")
            found[pattern] = int(bits)
    return found
