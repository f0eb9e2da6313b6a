"""Trained adapters on a pipeline: classic ones with one branch, and a guider for modular ones."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from steersman.diffusion.agd.injection import AGDAdapters, read
from steersman.diffusion.guidance import Guidance, network_of, unannounced
from steersman.diffusion.installing import Installable, installed
from steersman.errors import InputError

if TYPE_CHECKING:
    from steersman.diffusion.agd.training import AGDResult


class AGD(Installable):
    """Guidance in one pass: adapters that imitate out_u + omega (out_c - out_u) from the conditional branch alone.

        agd = AGD.from_pretrained("my-agd", guidance_scale=4.0).install(pipe)
        pipe("a small red circle", guidance_scale=1.0)          # the pipeline's own guidance stays off

    C. Perez Jensen, S. Sadat, arXiv:2503.07274.

    Args:
        adapters: on no network.
        guidance_scale: omega, from 1; None is the middle of the range that was trained.
        clamp: whether omega is brought into the trained range; else one outside it is warned of.
        facts: of the training: ``guidance_scale_range``, ``negative_prompt``.

    Raises:
        InputError: a scale below 1.
    """

    branches = 1
    result: AGDResult | None = None

    def __init__(
        self,
        adapters: AGDAdapters,
        guidance_scale: float | None = None,
        clamp: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.adapters, self.clamp, self.facts = adapters, clamp, dict(facts or {})
        low, high = self.facts.get("guidance_scale_range", (1.0, math.inf))
        if guidance_scale is None:
            guidance_scale = self.facts.get("guidance_scale") or ((low + high) / 2 if high < math.inf else 3.0)
        self.guidance_scale = guidance_scale

    @property
    def guidance_scale(self) -> float:
        """omega; may be set between runs."""
        return self._scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        self._scale = checked_scale(value, self.facts, self.clamp)
        self.adapters.set_agd(self._scale)

    def attach(self, pipe: Any) -> None:
        network = network_of(pipe)
        two = [type(m).__name__ for m in installed(pipe) if isinstance(m, Guidance)]
        if two:
            raise InputError("pipe", f"with {two[0]}", "one without guidance: AGD guides by itself")
        self.adapters.attach(network)
        self.adapters.to(next(network.parameters()).device)
        self.adapters.set_agd(self._scale)

        def guard(x: Tensor, given: Mapping[str, Any]) -> None:
            if _doubled(pipe, x, given):
                scale = getattr(pipe, "guidance_scale", None)
                wanted = "1 while AGD is installed (guidance is in the adapters already: this would guide twice)"
                raise InputError("guidance_scale", scale if scale is not None else "above 1", wanted)

        self.adapters.guard = guard
        if callable(getattr(pipe, "encode_prompt", None)):
            self._watch(pipe)

    def _watch(self, pipe: Any) -> None:
        """Refuse negative prompts: with one branch a pipeline would drop them without a word."""
        encode, allowed = pipe.encode_prompt, self.facts.get("negative_prompt")
        signature = inspect.signature(encode)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            for name, value in given.items():
                if not name.startswith("negative_") or not isinstance(value, (str, list, tuple, Tensor)):
                    continue
                texts = [value] if isinstance(value, str) else list(value) if not isinstance(value, Tensor) else [None]
                if any(text != (allowed or "") for text in texts):
                    wanted = f"left out: the adapters were trained with {allowed!r} (train them with yours)"
                    shown = "a tensor" if isinstance(value, Tensor) else value
                    raise InputError(name, shown, wanted)
            return encode(*args, **kwargs)

        pipe.encode_prompt = encode_prompt

    def detach(self, pipe: Any) -> None:
        self.adapters.guard = None
        self.adapters.remove()
        pipe.__dict__.pop("encode_prompt", None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapters and scale; the folder is what ``from_pretrained`` reads."""
        self.adapters.save_pretrained(folder, **(self.facts | {"guidance_scale": self._scale}))

    @classmethod
    def from_pretrained(cls, folder: str | Path, guidance_scale: float | None = None, clamp: bool = False) -> Self:
        """The adapters in a folder, for any network of the shapes that they were trained on.

        Raises:
            InputError: it can't be read.
        """
        adapters, facts = read(folder)
        return cls(adapters.requires_grad_(False), guidance_scale, clamp, facts)


class AGDGuidance(BaseGuidance):
    """The same as a guider of modular pipelines: one condition, and adapters that are told omega.

        pipe.update_components(guider=AGDGuidance("my-agd", guidance_scale=4.0))

    The adapters are on the denoiser only while it is called. What the guider's configuration saves is the folder's
    name, not the adapters.

    Args:
        adapters: the folder, as :meth:`AGD.from_pretrained` reads it.
        guidance_scale, clamp: as of :class:`AGD`.
    """

    _input_predictions: Any = ["pred_cond"]

    @register_to_config
    def __init__(self, adapters: str, guidance_scale: float | None = None, clamp: bool = False) -> None:
        with unannounced():
            super().__init__()
        self._agd = AGD.from_pretrained(adapters, guidance_scale, clamp)

    @property
    def guidance_scale(self) -> float:
        return self._agd.guidance_scale

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        if self._enabled:
            self._agd.adapters.attach(denoiser)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        self._agd.adapters.remove()

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def forward(self, pred_cond: Tensor) -> GuiderOutput:
        return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)

    @property
    def is_conditional(self) -> bool:
        return True

    @property
    def num_conditions(self) -> int:
        return 1


def checked_scale(value: Any, facts: Mapping[str, Any], clamp: bool) -> float:
    """omega, in the trained range if it is to be clamped."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < math.inf:
        raise InputError("guidance_scale", value, "a finite number from 1")
    low, high = facts.get("guidance_scale_range", (1.0, math.inf))
    if low <= value <= high:
        return float(value)
    if clamp:
        return float(min(max(value, low), high))
    warnings.warn(
        f"guidance_scale {value:g} is outside the range that the adapters were trained on, {low:g} to {high:g}",
        stacklevel=3,
    )
    return float(value)


def _doubled(pipe: Any, x: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether this call of a pipeline evaluates both branches: its settings say so, and the rows come twice."""
    doubled = getattr(pipe, "do_classifier_free_guidance", None)
    scale = getattr(pipe, "guidance_scale", None)
    if doubled is None and scale is not None:
        doubled = scale > 1
    if doubled is None:  # DiT: its null class, in the second half
        null, labels = getattr(network_of(pipe).config, "num_embeds_ada_norm", None), given.get("class_labels")
        doubled = null is not None and labels is not None and bool((labels[len(labels) // 2 :] == null).all())
    # What a pipeline says is of its last run, and the network may be called without it.
    return bool(doubled) and len(x) % 2 == 0 and torch.equal(*x.chunk(2))
