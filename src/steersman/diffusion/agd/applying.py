"""``steersman apply agd``: trajectories of a pipeline's own guidance, and adapters trained on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steersman.diffusion import autoencoder
from steersman.diffusion.agd.injection import AGDConfig
from steersman.diffusion.agd.training import AGDTrainingConfig, train_agd
from steersman.diffusion.agd.trajectories import collect_cfg_trajectories, latent_shape, noised_pairs
from steersman.diffusion.asked import asked_of
from steersman.diffusion.guidance import network_of
from steersman.diffusion.images import load_pipeline
from steersman.errors import InputError


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    arch: Literal["auto", "attention", "additive", "mlp_gate", "learned_pos_emb", "lora", "full"] = "auto",
    hidden_dim: int | None = None,
    placement: Literal["all", "official"] = "all",
    timestep: bool = True,
    condition: bool = True,
    cfg_mult: float = 1.0,
    dropout: float = 0.0,
    data: Literal["trajectory", "diffusion"] = "trajectory",
    trajectories: int = 200,
    sampling_steps: int = 50,
    low: float = 1.0,
    high: float = 6.0,
    negative_prompt: str | None = None,
    storage: Literal["float16", "float32"] = "float16",
    steps: int = 2000,
    batch_size: int = 64,
    accumulate: int = 1,
    learning_rate: float = 1e-4,
    loss: Literal["l2", "l1", "cos", "noise"] = "l2",
    precision: Literal["no", "bf16", "fp16"] = "no",
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Distil the guidance of the pipeline ``subject`` into adapters.

    Args:
        subject: a diffusers pipeline folder with prompts or classes and an unconditional branch, or hub id.
        input: prompts or labels, see :func:`~steersman.diffusion.asked.read_asked`; not needed for classes. With
            data=diffusion an .npz with ``images`` in [0, 1], too.
        out: where the adapters go.
        seed: of noise, scales, weights and batches.
        log: gets a line now and then.
        arch: attention, additive, mlp_gate, learned_pos_emb; auto is attention with prompts, else additive. lora and
            full train low-rank weights, or all weights, with a scale embedding (baselines).
        hidden_dim: width of the adapters, or rank of lora; None is about 2% of the network's weights.
        placement: all blocks, or those of the authors' code (official).
        timestep: tell adapters the time.
        condition: tell adapters prompt or label.
        cfg_mult: factor of the scale before its Fourier features.
        dropout: in the adapters.
        data: trajectory, or diffusion: the same number of pairs at noised images.
        trajectories: how many; the prompts or labels are used in turn.
        sampling_steps: steps of a trajectory.
        low: least scale.
        high: largest scale.
        negative_prompt: in place of the empty one; it becomes part of the adapters.
        storage: of the trajectories in memory.
        steps: optimizer steps.
        batch_size: points of a batch.
        accumulate: batches of a step.
        learning_rate: the largest.
        loss: l2, l1, cos or noise.
        precision: of the network calls.
        checkpointing: less memory, a third more time.

    Returns:
        dict: parameters and their share, loss at the start (the network alone) and at the end, seconds.

    Raises:
        InputError: a subject, input or settings that don't fit together.
    """
    pipe = load_pipeline(subject)
    pipe.set_progress_bar_config(disable=True)
    network = network_of(pipe)
    if torch.cuda.is_available():
        pipe.to("cuda")
    if isinstance(trajectories, bool) or trajectories < 1:
        raise InputError("trajectories", trajectories, "a whole number from 1")
    generator = torch.Generator().manual_seed(seed)
    asked, images = _asked(pipe, input, trajectories, data, generator)
    shared: dict[str, Any] = {
        "guidance_scale": (low, high),
        "num_inference_steps": sampling_steps,
        "batch_size": max(1, min(32, 2**15 // int(np.prod(latent_shape(pipe))))),
        "dtype": torch.float16 if storage == "float16" else torch.float32,
        "negative_prompt": negative_prompt,
        "generator": generator,
        "progress": log,
    }
    config = None
    if arch != "auto" or hidden_dim is not None or (placement, timestep, condition, cfg_mult, dropout) != (
        "all", True, True, 1.0, 0.0,
    ):  # fmt: skip
        prompts = "encoder_hidden_states" in _arguments(network)
        chosen = ("attention" if prompts else "additive") if arch == "auto" else arch
        config = AGDConfig(
            chosen, hidden_dim, placement=placement, timestep=timestep, condition=condition, cfg_mult=cfg_mult,
            dropout=dropout,
        )  # fmt: skip
    training = AGDTrainingConfig(
        max_steps=steps, batch_size=batch_size, gradient_accumulation_steps=accumulate, learning_rate=learning_rate,
        loss=loss, mixed_precision=precision, gradient_checkpointing=checkpointing, seed=seed,
    )  # fmt: skip
    if data == "trajectory":
        pairs = collect_cfg_trajectories(pipe, asked, **shared)
    else:
        pairs = noised_pairs(pipe, images, asked, **shared)
    assert not isinstance(pairs, Path)

    def report(step: int, value: float) -> None:
        if step % max(steps // 10, 1) == 0:
            log(f"step {step}/{steps}: loss {value:.4g}")

    agd = train_agd(pipe, pairs, config, training, callback=report)
    agd.save_pretrained(out)
    assert agd.result is not None
    tail = max(steps // 20, 1)
    own = sum(p.numel() for p in agd.adapters.parameters())
    return {
        "arch": agd.adapters.config.arch,
        "hidden_dim": agd.adapters.config.hidden_dim,
        "blocks": len(agd.adapters.anatomy.targets),
        "parameters": own,
        "share": agd.result.share,
        "loss_first": agd.result.mean(slice(0, tail)),
        "loss_last": agd.result.mean(slice(-tail, None)),
        "steps": steps,
        "trajectories": trajectories,
        "points": len(pairs),
        "training_seconds": agd.result.seconds,
    }


def _arguments(network: Any) -> Any:
    return inspect.signature(type(network).forward).parameters


def _asked(pipe: Any, source: Path | None, count: int, data: str, generator: torch.Generator) -> tuple[Any, Tensor]:
    """``count`` prompts or labels, and with data=diffusion as many clean latents."""
    found: Any = asked_of(pipe, source)
    images = torch.empty(0)
    if data == "diffusion" and source is not None and source.suffix.lower() == ".npz":
        with np.load(source, allow_pickle=False) as arrays:
            if "images" in arrays:
                images = torch.from_numpy(np.asarray(arrays["images"], dtype=np.float32)).permute(0, 3, 1, 2) * 2 - 1
    if data == "diffusion":
        if len(images) != len(found):
            raise InputError("data", "diffusion", "used with an .npz of images in [0, 1] and their labels or captions")
        rows = torch.randperm(len(found), generator=generator)
        rows = rows.repeat(-(-count // len(rows)))[:count]
        return [found[i] for i in rows.tolist()], _encoded(pipe, images[rows])
    if source is not None:  # in another order for each seed
        found = [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
    return [found[i % len(found)] for i in range(count)], images


@torch.no_grad()
def _encoded(pipe: Any, images: Tensor) -> Tensor:
    """Clean latents of images in [-1, 1]."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return images
    with autoencoder.upcast(vae):
        return torch.cat([autoencoder.encode(vae, part).float().cpu() for part in images.split(16)])
