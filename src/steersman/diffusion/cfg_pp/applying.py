"""``steersman apply cfg-pp``: invert, edit or restore a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from steersman.diffusion.asked import SUFFIXES, read_prompts
from steersman.diffusion.cfg_pp.guidance import CFGPlusPlus
from steersman.diffusion.cfg_pp.inverse_problems import AveragePool, Blur, LinearOperator, Mask, restore
from steersman.diffusion.cfg_pp.inversion import edit, encode, invert, sample
from steersman.diffusion.images import load_pipeline, read_images
from steersman.errors import InputError

Task = Literal["edit", "restore", "invert"]
Operators = Literal["super-resolution", "gaussian-blur", "motion-blur", "inpainting"]
BATCH = 16


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    mode: Task = "edit",
    source: str | None = None,
    target: str | None = None,
    scale: float = 0.6,
    steps: int = 50,
    operator: Operators = "super-resolution",
    factor: int = 2,
    kernel: int = 5,
    sigma: float = 1.0,
    angle: float = 0.0,
    mask: Path | None = None,
    eta: float = 1.0,
    gamma: float = 0.1,
    degrade: bool = False,
    size: int | None = None,
) -> dict[str, Any]:
    """Invert, edit or restore images with CFG++.

    Args:
        subject: a diffusers pipeline folder, or hub id, with a ``unet`` and two branches.
        input: images: a folder, .zip, .npz or .npy; to be restored, they are the measurements.
        out: where images (and, inverted, ``latents.safetensors``) go.
        seed: of the noise that restoring starts from.
        log: gets a line for each batch.
        mode: what is done.
        source: what the images show: a prompt, a class's number, or a text file with one of them a line, one line an
            image. Networks with classes may take it from the input's labels.
        target: what edited images shall show, likewise.
        scale: lambda.
        steps: of DDIM.
        operator: of restoring: what was done to the images.
        factor: of super-resolution.
        kernel: side of a blur's kernel.
        sigma: of the Gaussian blur, in pixels.
        angle: of the motion blur, in degrees to the rows.
        mask: of inpainting: an image, white where pixels are kept.
        eta, gamma: step sizes of restoring.
        degrade: the input shows whole images, which are degraded first; the result is compared with them.
        size: the first so many images only.

    Returns:
        dict: how many images, and the PSNR of what came back or was restored.

    Raises:
        InputError: a subject, images or settings that don't fit together.
    """
    pipe = load_pipeline(subject)
    if getattr(pipe, "unet", None) is None:
        raise InputError("subject", str(subject), "a diffusers pipeline with a unet")
    pipe.set_progress_bar_config(disable=True)
    channels = 3 if getattr(pipe, "vae", None) is not None else pipe.unet.config.in_channels
    classes = pipe.unet.config.get("num_class_embeds") if channels != 3 or not hasattr(pipe, "tokenizer") else None
    if classes:
        classes -= pipe.config.get("null_label") is not None  # no class
    x, labels = read_images(input, channels, None if classes else False)
    if size is not None:
        if size < 1:
            raise InputError("size", size, "a whole number from 1")
        x, labels = x[:size], None if labels is None else labels[:size]
    x = 2 * x - 1
    shown = _asked("source", source, len(x), classes, labels)
    wanted = _asked("target", target, len(x), classes, None) if mode == "edit" else shown
    A = _operator(operator, factor, kernel, sigma, angle, mask) if mode == "restore" else None
    generator, made, latents, measured = torch.Generator().manual_seed(seed), [], [], []
    for start in range(0, len(x), BATCH):
        rows = slice(start, start + BATCH)
        given, asked = x[rows], _rows(shown, rows)
        settings: dict[str, Any] = {"scale": scale, "num_inference_steps": steps}
        if mode == "edit":
            made.append(edit(pipe, given, asked, _rows(wanted, rows), **settings))
        elif A is None:
            latents.append(invert(pipe, given, **settings, **asked))
            made.append(sample(pipe, latents[-1], **settings, **asked))
        else:
            measured.append(A(given) if degrade else given)
            made.append(restore(pipe, measured[-1], A, eta=eta, gamma=gamma, generator=generator, **settings, **asked))
        log(f"{min(start + BATCH, len(x))} of {len(x)} images")
    result = torch.cat(made).detach().float().cpu().clamp(-1, 1)
    _write(out / "images", result)
    facts: dict[str, Any] = {"images": len(x)}
    if latents:
        save_file({"latents": torch.cat(latents).contiguous()}, out / "latents.safetensors")
    if measured and degrade:
        _write(out / "measurements", torch.cat(measured).clamp(-1, 1))
    if mode == "invert" or (mode == "restore" and degrade):
        with torch.no_grad():
            encode(pipe, x[:1])  # of the size that came back
        error = (result - x).square().flatten(1).mean(1).clamp(min=4e-10)
        facts["psnr"] = float((10 * torch.log10(4 / error)).mean())
    # What was used, so that the folder can stand for it in a comparison.
    CFGPlusPlus(scale).save_pretrained(out)
    return facts


def _asked(name: str, text: str | None, count: int, classes: int | None, labels: Tensor | None) -> dict[str, Any]:
    """The pipeline's input for what is asked for, one an image."""
    if text is None:
        if labels is None:
            kind = "a class's number" if classes else "a prompt"
            what = "what the images show" if name == "source" else "what they shall show"
            raise InputError(name, None, f"{kind}, or a text file with one a line: {what}")
        return {"labels": labels}
    lines = [text] * count
    if Path(text).suffix.lower() in SUFFIXES:
        lines = read_prompts(text, name)
        if len(lines) != count:
            raise InputError(name, f"{len(lines)} lines in {text}", f"one line for each of the {count} images")
    if not classes:
        return {"prompt": lines}
    if not all(line.isdecimal() and int(line) < classes for line in lines):
        raise InputError(name, text, f"a class from 0 to {classes - 1}, or a text file of them")
    return {"labels": torch.tensor([int(line) for line in lines])}


def _rows(asked: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] for name, value in asked.items()}


def _operator(
    operator: Operators, factor: int, kernel: int, sigma: float, angle: float, mask: Path | None
) -> LinearOperator:
    if operator == "super-resolution":
        return AveragePool(factor)
    if operator == "gaussian-blur":
        return Blur.gaussian(kernel, sigma)
    if operator == "motion-blur":
        return Blur.motion(kernel, angle)
    from PIL import Image, UnidentifiedImageError

    if mask is None:
        raise InputError("mask", None, "an image, white where pixels are kept, for inpainting")
    try:
        with Image.open(mask) as image:
            grey = torch.tensor(list(image.convert("L").getdata())).reshape(image.height, image.width)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError("mask", str(mask), f"an image file that can be read ({error})") from None
    return Mask((grey > 127).float())


def _write(folder: Path, images: Tensor) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{i:05d}.png")
