r"""Smaller and faster networks: what compression saves, and how far samples move from the original's.

All contenders start from the same noise with the same prompts (or labels), the same sampler and as many steps.
*Drift* is the distance to what the original network makes of the same noise with the same sampler, which tells what
compression did where a distance between sets of images no longer can; quality is measured against real images where
there are any (``digits`` and ``scenes`` bring theirs). Costs are those of the network alone:

- ``megabytes``: its weights as the method stores them;
- ``multiply_adds``: products in a run of the pipeline, whichever precision they are taken in, counted at PyTorch's
  operators while it runs (so experts and gates count as they are used), for one sample;
- ``seconds_per_sample``: measured, contenders in turn. Simulated quantisation is slower than the original by design.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from steersman import catalog
from steersman.benches._pipelines import (
    SHOWN,
    Host,
    PipelineBench,
    Subject,
    asked_for,
    batch_size,
    compared_with,
    decode,
    most_steps,
    of_diffusers,
    prepared,
    run,
    sample,
    shared_noise,
    stand_ins,
)
from steersman.diffusion import DDIMScheduler, installed
from steersman.engine.bench import Figure, Knob, PartInfo, Shape
from steersman.engine.contenders import checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.reference import image_metrics
from steersman.report.blocks import Block, Curves, ImageGrid, Line, Note, TableBlock

if TYPE_CHECKING:
    from steersman.engine.bench import Row, Setting, TrialLog
    from steersman.engine.comparison import Comparison
    from steersman.engine.contenders import Part

COUNTED = 32
"""Samples whose multiply-adds are counted."""
MOVING = 6
"""Layers whose activation ranges are drawn against time."""


class Original:
    """The network as it is."""

    def __call__(self, pipe: Any) -> Any:
        return pipe


class Half:
    """The network in 16 bits, ``pipe.unet.to(torch.bfloat16)``; text encoder, sampler and decoder as they were.

    Args:
        dtype: bfloat16 or float16.
    """

    def __init__(self, dtype: str = "bfloat16") -> None:
        if dtype not in ("bfloat16", "float16"):
            raise InputError("dtype", dtype, "bfloat16 or float16")
        self.dtype = getattr(torch, dtype)

    def __call__(self, pipe: Any) -> Any:
        found = twin(pipe)
        net = nn.Module.to(found.unet, self.dtype)

        def cast(value: Any, dtype: torch.dtype) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype) if value.is_floating_point() else value
            return {name: cast(v, dtype) for name, v in value.items()} if isinstance(value, dict) else value

        def enter(module: nn.Module, positional: Any, named: Any) -> Any:
            module._entered = positional[0].dtype if positional else named["sample"].dtype  # type: ignore[assignment]
            return tuple(cast(v, self.dtype) for v in positional), cast(named, self.dtype)

        def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
            entered: Any = module._entered
            if isinstance(output, tuple):
                return tuple(cast(v, entered) for v in output)
            output.sample = output.sample.to(entered)
            return output

        net.register_forward_pre_hook(enter, with_kwargs=True)
        net.register_forward_hook(leave)
        return found


class Dynamic:
    """PyTorch's own quantisation without calibration: linear layers with int8 weights, their inputs' ranges found at
    each call. Convolutions stay in floating point."""

    def __call__(self, pipe: Any) -> Any:
        found = twin(pipe)
        if next(found.unet.parameters()).device.type != "cpu":
            raise InputError("methods", "dynamic", "left out: PyTorch's dynamic quantisation runs on the CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.ao.quantization.quantize_dynamic(found.unet, {nn.Linear}, torch.qint8, inplace=True)
        return found


def twin(pipe: Any) -> Any:
    """A pipeline like ``pipe`` with a network of its own."""
    found = copy.copy(pipe)
    found.__dict__ = {**vars(pipe), "unet": copy.deepcopy(pipe.unet)}
    return found


class Compression(PipelineBench):
    """See the module's text."""

    id = "compression"
    shape: Shape = "Sampler"
    headline: tuple[str, str] = ("drift", "seconds_per_sample")
    knobs: Mapping[str, Knob] = {
        "steps": Knob(int, (20,), "steps of the sampler, the same for all contenders", low=1, high=1000),
        **PipelineBench.knobs,
        "samples": Knob(int, 64, "samples of a trial", low=2, high=100_000, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "psnr": Figure("dB", "higher", "quality", "likeness to the original network's images from the same noise"),
        "drift": Figure(
            "", "lower", "quality", "root mean square distance from the original network's images, in [-1, 1]"
        ),
        "frechet": Figure("", "lower", "quality", "Frechet distance to real images in the judge's features"),
        "accuracy": Figure("", "higher", "quality", "share of samples that show what was asked for"),
        "attribute_accuracy": Figure("", "higher", "quality", "share of the attributes asked for that samples show"),
        "kernel": Figure("", "lower", "quality", "unbiased cubic MMD² to real images in the judge's features"),
        "precision": Figure("", "higher", "quality", "share of samples among the real images (3 neighbours)"),
        "recall": Figure("", "higher", "quality", "share of real images among the samples (3 neighbours)"),
        "megabytes": Figure("MB", "lower", "cost", "the network's weights, as stored"),
        "multiply_adds": Figure("G", "lower", "cost", "billions of multiply-adds of the network for a sample"),
        "seconds_per_sample": Figure("s", "lower", "cost", "seconds of sampling per sample"),
    }

    def headline_for(self, rows: Sequence[Row]) -> tuple[str, str]:
        """What reports of these rows lead with: drift, unless real images took the samples' place alone.

        Not likeness, which the original, being like itself without limit, has none of.
        """
        there = {name for row in rows for name in row.figures}
        return "frechet" if "frechet" in there and "drift" not in there else "drift", "seconds_per_sample"

    # ---------------------------------------------------------------- contenders

    def baselines(self) -> list[str]:
        return ["float", "half", "dynamic"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "float": PartInfo(Original, "the network as it is", "pipe"),
            "half": PartInfo(Half, "the network in 16 bits", "pipe.unet.to(torch.{dtype=bfloat16})"),
            "dynamic": PartInfo(
                Dynamic,
                "int8 linear layers, by PyTorch's dynamic quantisation",
                "torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear}, inplace=True)",
            ),
            **super().parts(),
        }

    def accepts(self, name: str) -> PartInfo | None:
        """Any scheduler class of diffusers, and the methods that samplers and guidances of pipelines are."""
        known = catalog.cards().get(name)
        if known is not None and {"sampling", "guidance"} & set(known.benches):
            return PartInfo(known.load, known.summary, known.line)
        return of_diffusers(name)

    def check(self, s: Subject, setting: Setting) -> None:
        if s.kind == "points":
            raise InputError("subject", s.spec, "a pipeline of images, unconditional or with labels or prompts")
        super().check(s, setting)

    def mount(self, h: Host, part: Part) -> None:
        info = self.parts().get(part.id)
        if info is None or info.build not in (Original, Half, Dynamic):
            super().mount(h, part)
            return
        h.parts.append(part)
        if len(h.parts) > 1:
            raise InputError("methods", h.label, f"{part.id} first")
        h.pipe = info.build(**checked_knobs(info.build, part))(h.subject.pipe)

    # ---------------------------------------------------------------- trial

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, data = h.subject, self.data(h.subject, setting)
        asked = asked_for(s, data, setting, rng)
        figures: dict[str, float] = {}
        self.fit(h, rng, log)
        if h.real:
            images = stand_ins(s, data, asked, setting, rng)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # other samplers than the calibrated one, on purpose
                figures["megabytes"] = footprint(h.pipe) / 1e6
                log.progress(0, 1, "counting")
                figures["multiply_adds"] = multiply_adds(h, asked, rng)  # warms up, too
                images, figures["seconds_per_sample"] = self.sampled(h, asked, rng, log)
                wanted = self.reference(h, asked, rng, log)
            error = (images - wanted).double().flatten(1).square().mean(1)
            log.per_item("drift", error.sqrt().tolist())
            figures["drift"] = math.sqrt(float(error.mean()))
            if figures["drift"] > 0:  # the original is not like itself by any number of decibels
                figures["psnr"] = 20 * math.log10(2 / figures["drift"])
            self._keep_ranges(h, log)
        log.images("samples", ((images[:SHOWN] + 1) / 2).permute(0, 2, 3, 1).numpy())
        if data is not None:
            figures |= image_metrics.feature_metrics(
                compared_with(data, asked, setting), image_metrics.features(data.judge, images)
            )
            if data.score is not None and asked is not None:
                figures |= data.score(images, asked)
        return figures

    def sampled(self, h: Host, asked: Any, rng: Streams, log: TrialLog) -> tuple[Tensor, float]:
        """Images of a contender in [-1, 1], and seconds for each."""
        scheduler = h.scheduler or type(h.pipe.scheduler).from_config(h.pipe.scheduler.config)
        steps = most_steps(scheduler, h.setting["steps"])
        started = time.perf_counter()
        latents = sample(h, scheduler, steps, asked, rng, log)
        seconds = (time.perf_counter() - started) / h.setting["samples"]
        return decode(h.subject, latents, batch_size(h.subject, h.setting)), seconds

    def reference(self, h: Host, asked: Any, rng: Streams, log: TrialLog) -> Tensor:
        """Images of the original network with the contender's sampler, from the same noise."""
        s, setting = h.subject, h.setting
        scheduler = h.scheduler or h.pipe.scheduler
        names = ("steps", "samples", "guidance", "prompts", "labels", "batch")
        own = repr(sorted(dict(scheduler.config).items(), key=str))
        key = ("original", rng.base, *(setting[name] for name in names), type(scheduler).__name__, own)
        if key not in s.traces:
            plain = Host(s, setting, s.pipe, scheduler=h.scheduler, guidance=h.guidance)
            s.traces[key] = self.sampled(plain, asked, rng, log)[0]
        return s.traces[key]

    def _keep_ranges(self, h: Host, log: TrialLog) -> None:
        """The largest activations by part of the run, where a method measured them."""
        for method in installed(h.pipe):
            found = getattr(method, "peaks", None)
            if found is not None:
                log.arrays("peaks", **{name: np.array(values) for name, values in found(MOVING).items()})

    # ---------------------------------------------------------------- report

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = []
        peaks: dict[str, dict[str, np.ndarray]] = {}
        for setting in comparison.settings:
            shown = {
                label: next(iter(arrays.values())) for label, arrays in comparison.saved("samples", **setting).items()
            }
            peaks = comparison.saved("peaks", **setting) | peaks
            if shown:
                caption = "Each column starts from the same noise, with the same label or prompt."
                blocks.append(ImageGrid("Samples", shown, caption=caption, setting=setting))
            table = _costs(comparison, setting)
            if table is not None:
                blocks.append(table)
        for label, layers in list(peaks.items())[:1]:
            lines = {
                name: Line(((np.arange(len(y)) + 0.5) / len(y)).tolist(), (y / max(y.max(), 1e-12)).tolist())
                for name, y in layers.items()
            }
            blocks.append(
                Curves(
                    "How activation ranges move with time",
                    lines,
                    "time, from the clean end (0) to noise (1)",
                    "largest activation, of its largest",
                    caption=f"The {len(lines)} layers of {label} whose largest activations change most.",
                )
            )
        text = (
            "Likeness is to the original network's own images: it says what compression changed, not whether images "
            "got worse. Simulated quantisation rounds values and multiplies them in floating point, so it costs "
            "time; int8 execution is what integer kernels take on this machine."
        )
        return [*blocks, Note(text)]


# -------------------------------------------------------------------- pieces


def footprint(pipe: Any) -> int:
    """Bytes of a pipeline's network: what its method says that it stores, or its weights."""
    if hasattr(pipe, "footprint"):
        return int(pipe.footprint())
    count = 0
    for module in pipe.unet.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if hasattr(module, "_weight_bias") and not module._modules:  # PyTorch's packed weights
            weight, bias = module._weight_bias()
            tensors += [weight, bias]
            if weight.is_quantized and weight.qscheme() != torch.per_tensor_affine:
                tensors.append(weight.q_per_channel_scales())
        count += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return count


@torch.no_grad()
def multiply_adds(h: Host, asked: Any, rng: Streams) -> float:
    """Billions of multiply-adds of the network for a sample: those of a step, times the calls of a run.

    A step's are the difference of two runs, of one step and of two, so that what runs once (a text encoder) is left
    out. Methods installed for the run may leave out calls or rows, and which ones depends on the samples: with these,
    the network's calls are counted through a whole run of the first batch.
    """
    if h.installs:
        return _of_a_whole_run(h, asked, rng)
    n = min(h.setting["samples"], COUNTED, batch_size(h.subject, h.setting))
    noise = shared_noise(h.subject, h.setting["samples"], rng)[:n]
    wanted = None if asked is None else asked[:n]
    scheduler = h.scheduler or type(h.pipe.scheduler).from_config(h.pipe.scheduler.config)
    scheduler.set_timesteps(most_steps(scheduler, h.setting["steps"]))
    calls = len(scheduler.timesteps)
    simple = _simple(h, scheduler)
    counts = []
    with prepared(h, simple), sdpa_kernel(SDPBackend.MATH):
        for steps in (1, 2):
            with FlopCounterMode(display=False, custom_mapping=_integer_products()) as counter:
                run(h, noise, wanted, rng.torch("sampler"), num_inference_steps=steps)
            counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / 2 / n * calls / 1e9


def _of_a_whole_run(h: Host, asked: Any, rng: Streams) -> float:
    """Billions of multiply-adds for a sample within all calls of the network, of the first batch as it is sampled."""
    n = min(h.setting["samples"], batch_size(h.subject, h.setting))
    noise = shared_noise(h.subject, h.setting["samples"], rng)[:n]
    wanted = None if asked is None else asked[:n]
    scheduler = h.scheduler or type(h.pipe.scheduler).from_config(h.pipe.scheduler.config)
    steps = most_steps(scheduler, h.setting["steps"])
    entered: list[int] = []
    total = 0

    with (
        prepared(h, scheduler),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=_integer_products()) as counter,
    ):

        def enter(module: nn.Module, inputs: Any) -> None:
            entered.append(counter.get_total_flops())

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal total
            started = entered.pop()
            if not entered:  # a call within a call is part of it
                total += counter.get_total_flops() - started

        hooks = [h.pipe.unet.register_forward_pre_hook(enter), h.pipe.unet.register_forward_hook(leave)]
        try:
            run(h, noise, wanted, rng.torch("sampler", 0), num_inference_steps=steps)
        finally:
            for hook in hooks:
                hook.remove()
    return total / 2 / n / 1e9


def _simple(h: Host, scheduler: Any) -> Any:
    """A sampler of one call a step over the pipeline's noise: DDIM, or else the contender's own."""
    own = h.pipe.scheduler
    try:
        return DDIMScheduler.from_config(own.config)
    except (ValueError, TypeError):
        return scheduler


def _integer_products() -> dict[Any, Any]:
    """Formulas of the integer operators, which the counter doesn't know."""

    def convolution(x: Any, a: Any, b: Any, w: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
        return int(2 * math.prod(out_shape) * math.prod(w) // out_shape[1])

    def linear(x: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
        return int(2 * math.prod(out_shape) * x[-1])

    onednn, quantized = torch.ops.onednn, torch.ops.quantized
    found = {}
    for space, name, formula in (
        (onednn, "qconv_pointwise", convolution),
        (onednn, "qlinear_pointwise", linear),
        (quantized, "linear_dynamic", linear),
    ):
        if hasattr(space, name):
            packet = getattr(space, name)
            found[packet] = formula
    return found


def _costs(comparison: Comparison, setting: Mapping[str, Any]) -> TableBlock | None:
    """Costs and drift, each also as a multiple of the original's."""
    rows = []
    base = comparison.select("float", **setting)
    for label in comparison.contenders:
        found = [row for row in comparison.select(label, **setting) if "megabytes" in row.figures]
        if not found:
            continue
        cells: list[Any] = [label]
        for name in ("megabytes", "multiply_adds", "seconds_per_sample"):
            value = float(np.median([row.figures[name] for row in found]))
            cells.append(value)
            if base:
                cells.append(f"{value / float(np.median([row.figures[name] for row in base])):.2f}")
        rows.append([*cells, float(np.mean([row.figures["drift"] for row in found]))])
    if not rows:
        return None
    columns = ["contender"]
    for name in ("MB", "G multiply-adds", "s a sample"):
        columns += [name, "of float"] if base else [name]
    caption = "Medians over the seeds; drift is the distance from the original's images."
    return TableBlock("Costs", [*columns, "drift"], rows, caption=caption, setting=setting)
