"""Restoring degraded images: how near to the truth, how sharp, and how honest about what can't be known.

On ``photographs`` or a folder of your own images a crop is degraded (knob ``task``) and each contender is to undo it; a
folder of pairs (``input`` and ``target``, and ``mask``) is taken as it is, whatever the task. Recipes are trained once
for each seed, on the same crops in the same order, with networks of one size and as many steps, and then used at
every number of network calls. What is judged was not trained on.

Per image and draw: peak signal-to-noise ratio (PSNR) and structural similarity (SSIM). Both are best for the
*mean* of all images that fit the input, which is blurred. So each input is restored ``draws`` times, and over the
masked part (everything, where there is no mask)

    energy score    E|X - y| - E|X - X'|/2,  X, X' draws for one input, y the truth: proper, least for the true law
    variance share  (1 + 1/k) times the draws' variance over the squared error of their mean: 1 where they vary as much
                    as the truth does around what the input tells, 0 for a method with one answer
    energy distance between restored and true parts of all inputs, as laws of patches
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import diffusers
import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from steersman import catalog
from steersman.benches._classical_restorers import Classical, biharmonic, gamma, identity, tv, wiener
from steersman.diffusion.images import load_pipeline, read_images
from steersman.diffusion.rddm import Pairs, RDDMRestorationPipeline, RDDMScheduler, read_pairs
from steersman.diffusion.rddm.levels import PathName
from steersman.diffusion.rddm.pairs import is_pairs
from steersman.diffusion.rddm.pipeline import Networks
from steersman.diffusion.rddm.training import TrainingConfig, distance, fit, make_network
from steersman.engine import artefacts, subjects
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.fits import Fits
from steersman.engine.rows import plain
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError, MissingExtra, TrialError
from steersman.reference import photographs
from steersman.report.blocks import Block, ImageGrid, Note

if TYPE_CHECKING:
    from steersman.engine.bench import Row, Setting, TrialLog
    from steersman.engine.comparison import Comparison

BUDGET = ("steps", "batch_size", "width", "learning_rate", "crop")
"""Knobs of the bench that a recipe's ``apply`` takes by these names."""
SHOWN = 8
Restore = Callable[[Tensor, Tensor | None, int, torch.Generator], Tensor]
"""Input and mask in [0, 1], network calls and a generator to restored images in [0, 1]."""


# ------------------------------------------------------------------ data


@dataclass
class Subject:
    """Images to degrade, or pairs.

    Args:
        spec: as the user wrote it.
        fingerprint: changes when the images do.
        train, held_out: images in [0, 1], (C, H, W), of any sizes; or pairs.
        least: crops whose pixels deviate by less are left out.
    """

    spec: str
    fingerprint: str
    train: list[Tensor] | Pairs
    held_out: list[Tensor] | Pairs
    least: float = 0.0


@dataclass(frozen=True)
class Crops:
    """I_0 and I_in in [0, 1], (n, C, size, size), and the mask (n, 1 or C, size, size)."""

    target: Tensor
    input: Tensor
    mask: Tensor | None

    def where(self) -> Tensor:
        """The pixels that are judged as a whole, (C, size, size): the masked ones where all crops have the same mask,
        else all."""
        if self.mask is None or not bool((self.mask == self.mask[:1]).all()):
            return torch.ones_like(self.target[0], dtype=torch.bool)
        return (self.mask[0] > 0.5).expand_as(self.target[0])


@dataclass
class Host:
    """What restores, once it was made."""

    subject: Subject
    setting: Setting
    rng: Streams
    part: Part | None = None
    classical: Classical | None = None
    make: Callable[[Crops, Path, TrialLog], None] | None = None
    load: Callable[[Path], Restore] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    average: int = 1


# ------------------------------------------------------------------ recipes of the bench


@dataclass(frozen=True)
class Regression:
    """One network from I_in to I_0, in one call.

        L = E |I_in - f(I_in) - I_0|

    Args:
        residual: predict the residual, as above, or I_0 itself.
        loss: l1 or l2.
    """

    residual: bool = True
    loss: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, ("l1", "l2"))
        if not isinstance(self.residual, bool):
            raise InputError("residual", self.residual, "true or false")

    def restored(self, network: Any, x_in: Tensor, mask: Tensor | None) -> Tensor:
        out = network(_joined(x_in, mask), _zeros(x_in)).sample
        return x_in - out if self.residual else out

    def train(self, crops: Crops, folder: Path, budget: Mapping[str, Any], seed: int, log: TrialLog) -> None:
        pairs = _pairs(crops)
        net = make_network(pairs.seen() - pairs.channels, pairs.channels, budget["width"], budget["crop"], seed)

        def objective(network: nn.Module) -> Any:
            def value(target: Tensor, x_in: Tensor | None, mask: Tensor | None, g: torch.Generator) -> Tensor:
                assert x_in is not None
                return distance(self.restored(network, x_in, mask), target, self.loss)

            return value

        fit(net, pairs, objective, _config(budget, seed), callback=_progress(budget, log))
        net.save_pretrained(folder / "unet")

    def load(self, folder: Path) -> Restore:
        net: Any = UNet2DModel.from_pretrained(folder / "unet").eval()

        def restore(x: Tensor, mask: Tensor | None, calls: int, g: torch.Generator) -> Tensor:
            return (self.restored(net, 2 * x - 1, mask) + 1) / 2

        return restore


@dataclass(frozen=True)
class DDPM:
    """Conditional DDPM (Ho et al. 2020, as Saharia et al. 2022 condition it), from pure noise by diffusers' DDIM.

        L = E |f_θ(√abar_t I_0 + √(1 - abar_t) ε, I_in, t) - ε|²,    betas linear, T = 1000

    Args:
        predicts: epsilon; or, in the place of ε, sample (I_0), residual (I_in - I_0) or v_prediction.
        loss: l1 or l2.
        eta: of DDIM.
        average: restore with the mean of so many samples, each of the calls asked for.
    """

    predicts: Literal["epsilon", "sample", "residual", "v_prediction"] = "epsilon"
    loss: Literal["l1", "l2"] = "l2"
    eta: float = 0.0
    average: int = 1

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, ("l1", "l2"))
        _one_of("predicts", self.predicts, ("epsilon", "sample", "residual", "v_prediction"))
        if isinstance(self.eta, bool) or not isinstance(self.eta, (int, float)) or not 0 <= self.eta <= 1:
            raise InputError("eta", self.eta, "a number from 0 to 1")
        if isinstance(self.average, bool) or not isinstance(self.average, int) or not 1 <= self.average <= 100:
            raise InputError("average", self.average, "a whole number from 1 to 100")

    def output(self, networks: Any, x: Tensor, t: Tensor, x_in: Tensor | None, mask: Tensor | None) -> Tensor:
        out = networks(x, t, x_in, mask)[0]
        return x_in - out if self.predicts == "residual" else out

    def train(self, crops: Crops, folder: Path, budget: Mapping[str, Any], seed: int, log: TrialLog) -> None:
        pairs = _pairs(crops)
        scheduler: Any = diffusers.DDIMScheduler(
            timestep_spacing="trailing",
            prediction_type="sample" if self.predicts == "residual" else self.predicts,
        )
        net = make_network(pairs.seen(), pairs.channels, budget["width"], budget["crop"], seed)

        def objective(network: nn.Module) -> Any:
            def value(target: Tensor, x_in: Tensor | None, mask: Tensor | None, g: torch.Generator) -> Tensor:
                t = torch.randint(1000, (len(target),), generator=g)
                eps = torch.randn(target.shape, generator=g).to(target)
                x = scheduler.add_noise(target, eps, t)
                if self.predicts == "v_prediction":
                    wanted = scheduler.get_velocity(target, eps, t)
                else:
                    wanted = eps if self.predicts == "epsilon" else target
                return distance(self.output(network, x, t, x_in, mask), wanted, self.loss)

            return value

        networks = Networks(net, None, "epsilon")
        fit(networks, pairs, objective, _config(budget, seed), callback=_progress(budget, log))
        net.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")

    def load(self, folder: Path) -> Restore:
        net: Any = UNet2DModel.from_pretrained(folder / "unet").eval()
        networks = Networks(net, None, "epsilon")
        scheduler: Any = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")

        def restore(x: Tensor, mask: Tensor | None, calls: int, g: torch.Generator) -> Tensor:
            x_in, state = 2 * x - 1, torch.randn(x.shape, generator=g)
            scheduler.set_timesteps(calls)
            for t in scheduler.timesteps:
                out = self.output(networks, state, t, x_in, mask)
                state = scheduler.step(out, t, state, eta=self.eta, generator=g).prev_sample
            return (state + 1) / 2

        return restore


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(name, value, " or ".join(allowed))


def _pairs(crops: Crops) -> Pairs:
    return Pairs.of(crops.target, crops.input, crops.mask)


def _joined(x_in: Tensor, mask: Tensor | None) -> Tensor:
    return x_in if mask is None else torch.cat([x_in, mask], 1)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def _config(budget: Mapping[str, Any], seed: int) -> TrainingConfig:
    return TrainingConfig(**{name: budget[name] for name in BUDGET if name != "width"}, seed=seed)


def _progress(budget: Mapping[str, Any], log: TrialLog) -> Callable[[int, float], None]:
    def report(step: int, loss: float) -> None:
        if step % 25 == 0:
            log.progress(step, budget["steps"], f"training, loss {loss:.3f}")

    return report


# ------------------------------------------------------------------ the bench


class Restoration:
    """See the module's text."""

    id = "restoration"
    shape: Literal["Recipe"] = "Recipe"
    default_subject = "photographs"
    headline = ("psnr", "calls")
    knobs: Mapping[str, Knob] = {
        "calls": Knob(int, (2, 5, 20), "network calls of a restoration", low=1, high=1000),
        "task": Knob(str, ("denoising",), "what befell the images (pairs have their own)", choices=photographs.TASKS),
        "steps": Knob(int, 300, "training steps of every recipe", low=1, sweep=False),
        "batch_size": Knob(int, 8, "crops of a training step", low=1, sweep=False),
        "width": Knob(int, 16, "channels of the network, a multiple of 4", low=4, sweep=False),
        "learning_rate": Knob(float, 3e-3, "of every recipe", low=0, sweep=False),
        "crop": Knob(int, 24, "side of the crops, in pixels", low=8, high=512, sweep=False),
        "pairs": Knob(int, 2000, "training crops", low=1, sweep=False),
        "samples": Knob(int, 32, "held-out crops that are restored, at most as many as there are", low=2, sweep=False),
        "draws": Knob(int, 4, "restorations of each", low=2, high=100, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "psnr": Figure("dB", "higher", "quality", "peak signal-to-noise ratio of a restoration, mean over images"),
        "ssim": Figure("", "higher", "quality", "structural similarity to the truth, 7x7 windows"),
        "energy_score": Figure(
            "", "lower", "quality", "energy score of the draws for each input: least for the true law"
        ),
        "energy_distance": Figure("", "lower", "quality", "energy distance between restored and true patches as laws"),
        "variance_share": Figure(
            "", "neither", "info", "variance of draws over what the truth has: 0 is one answer, 1 right"
        ),
        "network_calls": Figure("calls", "lower", "cost", "network calls of one restoration"),
        "parameters": Figure("", "lower", "cost", "of all networks"),
        "fit_s": Figure("s", "lower", "cost", "seconds of the training"),
        "sample_s": Figure("s", "lower", "cost", "seconds of all restorations"),
    }

    # ---------------------------------------------------------------- subject

    def subject(self, spec: str) -> Subject:
        found = subjects.resolve(spec)
        if spec == "photographs":
            parts = photographs.region("train"), photographs.region("held-out")
            return Subject(spec, found.fingerprint, *parts, photographs.LEAST_DEVIATION)
        if found.kind != "path" or found.path is None:
            raise InputError("subject", spec, "photographs, a folder of images, or a folder (.npz) of pairs")
        if is_pairs(found.path):
            pairs = read_pairs(found.path)
            if pairs.input is None:
                raise InputError("subject", spec, "pairs with input as well as target")
            train, held_out = (_members(pairs, rows) for rows in _split(len(pairs)))
            return Subject(spec, found.fingerprint, train, held_out)
        images, _ = read_images(found.path, channels=None)
        a, b = _split(len(images))
        return Subject(spec, found.fingerprint, [images[i] for i in a], [images[i] for i in b])

    def check(self, s: Subject, setting: Setting) -> None:
        least = min(min(x.shape[-2:]) for part in (s.train, s.held_out) for x in _images(part))
        if setting["crop"] > least:
            raise InputError("crop", setting["crop"], f"at most the shortest side of the images, {least}")
        most = len(photographs.tiled_places(_images(s.held_out), setting["crop"], s.least))
        if setting["samples"] > most:
            raise InputError("samples", setting["samples"], f"at most the number of held-out crops, {most}")
        if setting["width"] % 4:
            raise InputError("width", setting["width"], "a multiple of 4")

    def crops(self, s: Subject, setting: Setting, split: str, rng: Streams) -> Crops:
        """``pairs`` random training crops of a seed, or ``samples`` held-out ones that don't overlap."""
        part, size, n = getattr(s, split.replace("-", "_")), setting["crop"], setting["pairs"]
        images, g = _images(part), rng.torch(f"{split} crops")
        if split == "train":
            places = photographs.random_places(images, size, n, g, s.least)
        else:
            tiles = photographs.tiled_places(images, size, s.least)
            order = torch.randperm(len(tiles), generator=g).tolist()
            places = [tiles[i] for i in order[: setting["samples"]]]
        if isinstance(part, Pairs):
            cuts = [
                None if v is None else photographs.cut(v, places, size) for v in (part.target, part.input, part.mask)
            ]
            return Crops(*cuts)  # type: ignore[arg-type]
        return Crops(*photographs.degraded(setting["task"], images, places, size, rng.torch(f"{split} damage")))

    # ---------------------------------------------------------------- contenders

    def baselines(self) -> list[str]:
        return ["identity", "tv", "regression", "ddpm:predicts=residual"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "identity": PartInfo(identity, "the input itself"),
            "tv": PartInfo(
                tv, "total variation, its weight tuned on training crops", "denoise_tv_chambolle(x{, knobs})"
            ),
            "wiener": PartInfo(wiener, "Wiener's filter, told the true blur (deblurring)", "wiener(x, psf{, knobs})"),
            "biharmonic": PartInfo(biharmonic, "biharmonic inpainting of the mask", "inpaint_biharmonic(x, mask)"),
            "gamma": PartInfo(gamma, "brightening by a power, tuned on training crops (low light)"),
            "regression": PartInfo(Regression, "one U-Net from input to target, in one call"),
            "ddpm": PartInfo(DDPM, "conditional DDPM, from pure noise by diffusers' DDIM; average=k is the mean of k"),
        }

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(s, setting, rng)

    def mount(self, h: Host, part: Part) -> None:
        if h.part is not None:
            raise InputError("methods", f"{h.part.id}+{part.id}", "one restorer")
        for name in BUDGET:
            if name in part.knobs:
                raise InputError(f"knob of {part.id}", name, f"left out: it is the same for all contenders (--{name})")
        h.part = part
        if (Path(part.id) / artefacts.RECORD).is_file():
            settings = dict(part.knobs)
            _check_sampling(part.id, settings)
            h.recipe, h.load = {"artefact": part.id}, lambda folder: _pipeline(Path(part.id), settings)
        elif part.id in self.parts():
            build = self.parts()[part.id].build
            made = build(**checked_knobs(build, part))
            if isinstance(made, Classical):
                h.classical = made
                return
            budget = {name: h.setting[name] for name in BUDGET}
            h.recipe = {"id": part.id, **{k: v for k, v in vars(made).items() if k not in ("eta", "average")}}
            h.load = made.load
            h.average = getattr(made, "average", 1)
            h.make = lambda crops, folder, log: made.train(crops, folder, budget, _seed(h), log)
        else:
            self._mount_method(h, part)

    def _mount_method(self, h: Host, part: Part) -> None:
        """A method whose ``apply`` trains on pairs; the rest of its knobs are its scheduler's, at sampling time."""
        card = catalog.card(part.id)
        function = artefacts.function_of(card, "apply")
        known = inspect.signature(function).parameters
        lacking = [name for name in BUDGET if name not in known]
        if lacking:
            raise InputError("methods", part.id, f"a recipe whose apply takes {', '.join(lacking)}")
        at_sampling = {k: v for k, v in part.knobs.items() if k in SAMPLING}
        settings = artefacts.check_settings(card, function, {k: v for k, v in part.knobs.items() if k not in SAMPLING})
        _check_sampling(part.id, at_sampling)
        budget = {name: h.setting[name] for name in BUDGET}
        if settings.get("nets", 1) > 1:
            budget["width"] = _shared_width(budget["width"], settings["nets"])
        h.recipe = {"id": part.id, **settings}
        h.load = lambda folder: _pipeline(folder, at_sampling)

        def make(crops: Crops, folder: Path, log: TrialLog) -> None:
            arrays = {"target": crops.target, "input": crops.input} | (
                {} if crops.mask is None else {"mask": crops.mask}
            )

            def progress(line: str) -> None:
                step = re.search(r"step (\d+)/(\d+)", line)
                done, total = step.groups() if step else (0, 1)
                log.progress(float(done), float(total), line)

            with tempfile.TemporaryDirectory() as temporary:
                source = Path(temporary) / "pairs.npz"
                saved: dict[str, Any] = {name: v.permute(0, 2, 3, 1).numpy() for name, v in arrays.items()}
                np.savez(source, **saved)
                metrics = function(source, None, folder, seed=_seed(h), log=progress, **settings, **budget)
            (folder / "metrics.json").write_text(json.dumps(plain(dict(metrics)), indent=1) + "\n")

        h.make = make

    # ---------------------------------------------------------------- trial

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        if h.part is None:
            raise TrialError("no restorer: a contender is one such as rddm")
        crops, draws = self.crops(h.subject, setting, "held-out", rng), setting["draws"]
        figures: dict[str, float] = {}
        if h.classical is not None:
            _need_skimage()
            if h.classical.tasks and (isinstance(h.subject.train, Pairs) or setting["task"] not in h.classical.tasks):
                raise Inapplicable(f"{h.part.id} is for {', '.join(h.classical.tasks)}")
            train = self.crops(h.subject, setting, "train", rng)
            parameter = h.classical.chosen(train.target, train.input, train.mask)
            one = h.classical.on(crops.input, crops.mask, parameter)
            restored = one.expand(draws, *one.shape)
            figures |= {"network_calls": 0, "parameters": 0}
        else:
            assert h.load is not None
            folder = Path(h.part.id)
            if h.make is not None:
                make, names = h.make, (*BUDGET, "pairs", "task")
                key = {"recipe": h.recipe, "seed": rng.base, "data": h.subject.fingerprint}
                key |= {name: setting[name] for name in names}
                folder = log.fits.get(key, lambda out: make(self.crops(h.subject, setting, "train", rng), out, log))
                figures["fit_s"] = Fits.seconds(folder)
            restore, started = h.load(folder), time.perf_counter()
            with torch.no_grad():
                found = []
                for draw in range(draws):
                    parts = [
                        restore(crops.input, crops.mask, setting["calls"], rng.torch("noise", draw * h.average + k))
                        for k in range(h.average)
                    ]
                    found.append(torch.stack(parts).mean(0))
            restored = torch.stack(found).clamp(0, 1)
            figures["sample_s"] = time.perf_counter() - started
            figures["network_calls"] = (1 if h.part.id == "regression" else setting["calls"]) * h.average
            figures["parameters"] = _parameters(folder)
        if not bool(restored.isfinite().all()):
            raise TrialError("the restored images are not finite")
        per_image = psnr(restored, crops.target)
        log.per_item("psnr", per_image.tolist())
        log.images("restored", restored[0, :SHOWN].permute(0, 2, 3, 1).numpy())
        log.images("truth", crops.target[:SHOWN].permute(0, 2, 3, 1).numpy())
        figures["psnr"] = float(per_image.mean())
        figures["ssim"] = ssim(restored, crops.target)
        return figures | law_figures(restored, crops.target, crops.where())

    # ---------------------------------------------------------------- report

    def exhibits(self, comparison: Comparison) -> list[Block]:
        budget = {name: comparison.rows[0].setting[name] for name in BUDGET} if comparison.rows else {}
        words = ", ".join(f"{name} {value:g}" for name, value in budget.items())
        blocks: list[Block] = [
            Note(
                f"Every recipe was trained from scratch with {words}, on the same crops in the same order. PSNR and "
                "SSIM are best for a blurred mean of all that fits the input: read them beside the energy score."
            )
        ]
        for setting in comparison.settings:
            rows: dict[str, np.ndarray] = {}
            for label in comparison.contenders:
                for row in comparison.select(label, **setting)[:1]:
                    rows |= {"truth": _saved(row, comparison.out, "truth")} if "truth" not in rows else {}
                    rows[label] = _saved(row, comparison.out, "restored")
            if rows:
                caption = "Held-out crops; networks start from the same noise."
                blocks.append(ImageGrid("Restorations", rows, caption=caption, setting=setting))
        return blocks


SAMPLING = ("eta", "residual_range", "clip_sample", "step_form", "path")
"""Knobs of the use of a method that was trained (of its scheduler, and the path): they share its fit."""


def _check_sampling(name: str, settings: Mapping[str, Any]) -> None:
    for knob in settings:
        if knob not in SAMPLING:
            raise InputError(f"knob of {name}", knob, f"one of {', '.join(SAMPLING)}")
    path = settings.get("path", "simultaneous")
    if path not in get_args(PathName):
        raise InputError("path", path, f"one of {', '.join(get_args(PathName))}")
    RDDMScheduler(**{name: value for name, value in settings.items() if name != "path"})


def _pipeline(folder: Path, settings: Mapping[str, Any]) -> Restore:
    """A pipeline that was saved, called as ``pipe(image, mask, num_inference_steps=...)``."""
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    extra = {"path": settings["path"]} if "path" in settings else {}
    changed = {name: value for name, value in settings.items() if name != "path"}
    if changed:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changed)
    sees_mask = isinstance(pipe, RDDMRestorationPipeline) and pipe.networks().mask_channels > 0

    def restore(x: Tensor, mask: Tensor | None, calls: int, g: torch.Generator) -> Tensor:
        if calls < 2 and extra.get("path", "simultaneous") != "simultaneous":
            raise Inapplicable(f"a path of two legs takes at least 2 calls, not {calls}")
        given = extra | ({"mask": mask} if sees_mask else {})
        return pipe(x, num_inference_steps=calls, generator=g, output_type="pt", **given).images.cpu()

    return restore


def _shared_width(width: int, nets: int) -> int:
    """The width at which ``nets`` networks have together most nearly the parameters of one of ``width``."""

    def size(w: int) -> int:
        return sum(p.numel() for p in make_network(6, 3, w, None, 0).parameters())

    return min(range(4, width + 1, 4), key=lambda w: abs(nets * size(w) - size(width)))


def _parameters(folder: Path) -> int:
    return int(artefacts.describe(str(folder)).get("parameters", 0))


def _seed(h: Host) -> int:
    return h.rng.seed("fit") % 2**31


def _members(pairs: Pairs, rows: Sequence[int]) -> Pairs:
    found = {name: None if v is None else [v[i] for i in rows] for name, v in vars(pairs).items()}
    return Pairs(**found)  # type: ignore[arg-type]


def _images(part: list[Tensor] | Pairs) -> Sequence[Tensor]:
    return part.target if isinstance(part, Pairs) else part


def _split(n: int) -> tuple[list[int], list[int]]:
    """Two thirds to train on, one third held out, the same way each time."""
    if n < 3:
        raise InputError("subject", f"{n} images", "at least 3 images or pairs, a third of which is held out")
    order = np.random.default_rng(0).permutation(n).tolist()
    return order[: n - n // 3], order[n - n // 3 :]


def _saved(row: Row, out: Path, name: str) -> np.ndarray:
    folder = row.items_dir(out)
    assert folder is not None
    with np.load(folder / f"{name}.npz") as saved:
        return saved[saved.files[0]]


def _need_skimage() -> None:
    try:
        import skimage  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("the bench restoration (scikit-image)", "reference") from error


# ------------------------------------------------------------------ figures


def psnr(restored: Tensor, target: Tensor) -> Tensor:
    """-10 log10 of the mean squared error of images in [0, 1], mean over draws: (k, n, ...) and (n, ...) to (n,)."""
    error = (restored - target).square().flatten(2).mean(2).clamp_min(1e-10)
    return (-10 * error.log10()).mean(0)


def ssim(restored: Tensor, target: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), mean over draws and images."""
    _need_skimage()
    from skimage.metrics import structural_similarity

    truth = target.numpy()
    found = [
        structural_similarity(x, y, win_size=7, channel_axis=0, data_range=1.0)
        for draw in (restored if not _alike(restored) else restored[:1]).numpy()
        for x, y in zip(draw, truth, strict=True)
    ]
    return float(np.mean(found))


def _alike(restored: Tensor) -> bool:
    return bool((restored == restored[:1]).all())


def law_figures(restored: Tensor, target: Tensor, where: Tensor) -> dict[str, float]:
    """How the draws (k, n, C, H, W) are spread beside the truths (n, C, H, W), over the pixels ``where``.

    Distances are per square root of the number of pixels. In the energy distance, the restoration of an input is not
    compared with that input's own truth, on which it depends.
    """
    x, y = restored[:, :, where].double(), target[:, where].double()
    k, n, scale = len(x), len(y), x.shape[-1] ** 0.5
    near = (x - y).norm(dim=2).mean() / scale
    among = torch.stack([torch.cdist(x[:, i], x[:, i]).sum() for i in range(n)]).mean() / (k * (k - 1)) / scale
    mean = x.mean(0)
    variance = (x - mean).square().sum() / (k - 1) / n
    error = (mean - y).square().sum() / n
    off = ~torch.eye(n, dtype=torch.bool)
    cross = torch.stack([torch.cdist(draw, y)[off].mean() for draw in x]).mean()
    same = torch.stack([torch.cdist(draw, draw)[off].mean() for draw in x]).mean()
    return {
        "energy_score": float(near - among / 2),
        "variance_share": float((1 + 1 / k) * variance / error.clamp_min(1e-12)),
        "energy_distance": float((2 * cross - same - torch.cdist(y, y)[off].mean()) / scale),
    }
