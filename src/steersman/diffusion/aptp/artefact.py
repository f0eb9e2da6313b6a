"""``steersman apply aptp``: experts and a router from a pipeline and images with captions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from steersman.diffusion.aptp.captions import Embedding, read_captioned
from steersman.diffusion.aptp.training import APTPConfig, PromptRoutedPruner
from steersman.diffusion.images import load_pipeline
from steersman.errors import InputError


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    budget: float = 0.7,
    experts: int = 4,
    steps: int = 200,
    batch_size: int = 16,
    shrink: int = 1,
    learning_rate: float = 0.1,
    warm_start: int = 20,
    finetune: int = 200,
    finetune_batch_size: int = 16,
    finetune_learning_rate: float = 1e-4,
    architecture: Literal["learned", "random", "magnitude", "whole"] = "learned",
    transport: bool = True,
    balanced: bool = False,
    by_macs: bool = False,
    embedding: Embedding | None = None,
) -> dict[str, Any]:
    """Prune the pipeline ``subject`` into experts and a router.

    The defaults are for small networks and minutes; for Stable Diffusion take those of :class:`APTPConfig`.

    Args:
        subject: a text-to-image pipeline's folder, or hub id.
        input: images with captions: a folder with a .jsonl of {file, text}, or an .npz with images and captions.
        out: where experts and router go.
        seed: of everything random.
        log: gets a line now and then.
        budget: share of the multiply-adds that is left, on average over prompts.
        experts: K; 1 is one network for all prompts.
        steps, batch_size, shrink, learning_rate, warm_start: of the router's training; the rate is used as it is, and
            a gate takes some 3.4/rate steps to be put off.
        finetune, finetune_batch_size, finetune_learning_rate: steps and so on of each expert; 0 steps leave it out.
        architecture: learned; or random, magnitude, whole (one network each), for comparison.
        transport, balanced, by_macs: see :class:`APTPConfig`.
        embedding: file.py:name, texts -> (B, d); by default the pipeline's text encoder.

    Returns:
        dict: multiply-adds, use and size of the experts.

    Raises:
        InputError: a subject, images or settings that don't fit together.
    """
    pipe = load_pipeline(subject)
    pipe.set_progress_bar_config(disable=True)
    images, captions = read_captioned(input)
    config = _config(
        steps,
        finetune,
        architecture,
        experts,
        budget=budget,
        transport=transport,
        balanced=balanced,
        by_macs=by_macs,
        batch_size=batch_size,
        shrink=shrink,
        learning_rate=learning_rate,
        warm_start=warm_start,
        finetune_batch_size=finetune_batch_size,
        finetune_learning_rate=finetune_learning_rate,
        seed=seed,
    )
    pruner = PromptRoutedPruner(pipe, config, embedding=embedding, progress=log)
    pruner.fit(images, captions)
    pruner.prune()
    if finetune:
        pruner.finetune()
    pruner.save(out)
    return pruner.report()


def check(**settings: Any) -> None:
    """Refuse settings of :func:`apply` that can't be, whatever the pipeline."""
    known = inspect.signature(apply).parameters.values()
    asked = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY and p.name not in ("log", "embedding")}
    _config(**asked | {name: value for name, value in settings.items() if name in asked})


def _config(steps: int, finetune: int, architecture: Any, experts: int, **others: Any) -> APTPConfig:
    if isinstance(finetune, bool) or finetune < 0:
        raise InputError("finetune", finetune, "a whole number from 0")
    return APTPConfig(
        experts=experts if architecture == "learned" else 1,
        architecture=architecture,
        steps=steps,
        scale_learning_rate=False,
        warmup=min(10, steps),
        finetune_steps=finetune,
        finetune_warmup=min(10, finetune),
        **others,
    )
