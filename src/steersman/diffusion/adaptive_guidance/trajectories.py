"""Running a guided pipeline for a list of prompts or labels, and looking at both branches as it goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from steersman.diffusion.guidance import Guidance
from steersman.errors import InputError

Asked = Sequence[str] | Sequence[int] | Tensor
"""Prompts, or labels."""
ASKED = ("labels", "class_labels", "prompt")


class Runs:
    """Guided runs of one pipeline, the same noise for a prompt in each of them.

    Args:
        pipe: a classic pipeline.
        asked: prompts, or labels.
        scale: its ``guidance_scale``.
        steps: of its scheduler.
        seed: prompt i has a generator of its own, of this seed and i.
        batch: prompts of one run.
        arguments: more of the pipeline's call (``negative_prompt``, ``height``, ...).

    Raises:
        InputError: nothing is asked for.
    """

    def __init__(
        self,
        pipe: Any,
        asked: Asked,
        scale: float,
        steps: int,
        seed: int = 0,
        batch: int = 16,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.scale, self.steps, self.seed, self.batch = pipe, scale, steps, seed, batch
        self.asked = asked.tolist() if isinstance(asked, Tensor) else list(asked)
        if not self.asked:
            raise InputError("asked", asked, "at least one prompt or label")
        for name, value in (("batch", batch), ("steps", steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(name, value, "a whole number from 1")
        known = inspect.signature(type(pipe).__call__).parameters
        names = [name for name in ASKED if name in known]
        if not names:
            raise InputError("pipe", type(pipe).__name__, "one that is called with a prompt or labels")
        self.name, self.arguments = names[0], dict(arguments or {})

    def __len__(self) -> int:
        return -(-len(self.asked) // self.batch)

    def __iter__(self) -> Iterator[range]:
        for start in range(0, len(self.asked), self.batch):
            yield range(start, min(start + self.batch, len(self.asked)))

    def __call__(
        self, rows: range, guidance: Guidance | None = None, output_type: str = "latent", **more: Any
    ) -> Tensor:
        """What the pipeline makes of the prompts ``rows``, under a guidance or its own; on the CPU, in float32
        or better."""
        asked = [self.asked[i] for i in rows]
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + i) for i in rows]
        given: Any = torch.tensor(asked) if self.name == "labels" else asked
        # Beside a list of prompts pipelines want a list of negative ones.
        extra = {
            name: [value] * len(rows) if name.startswith("negative_prompt") and isinstance(value, str) else value
            for name, value in (self.arguments | more).items()
        }
        with nullcontext() if guidance is None else guidance.install(self.pipe):
            result = self.pipe(
                **{self.name: given},
                num_inference_steps=self.steps,
                guidance_scale=self.scale,
                generator=generators,
                output_type=output_type,
                **extra,
            )
        images = torch.as_tensor(result.images).detach().cpu()
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def images(self, guidance: Guidance | None = None, log: Callable[[str], None] | None = None) -> Tensor:
        """All of them, decoded, in [0, 1]."""
        parts = []
        for i, rows in enumerate(self):
            made = self(rows, guidance, "np")
            parts.append(made.movedim(-1, 1))
            if log is not None:
                log(f"batch {i + 1}/{len(self)}")
        return torch.cat(parts)
