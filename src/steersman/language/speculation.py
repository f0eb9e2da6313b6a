r"""What loops that write with a draft model and check with a target share.

Both models' next-token laws are those that ``generate`` would sample from: the logits behind the same processors and
warpers. A draft's tokens are then kept or replaced so that what comes out has the target's law exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steersman.errors import InputError
from steersman.language.vocabularies import fitted, same_size


class Law:
    """The law of the next token behind all processors, as ``generate`` would draw from it.

    Args:
        processors: a ``LogitsProcessorList`` (with sampling, the warpers are in it), or nothing.
        sample: whether tokens are drawn; else all probability is on the most probable one.
        size: V, the target's vocabulary; other models' logits are cut or padded to it.
    """

    def __init__(self, processors: Any, sample: bool, size: int) -> None:
        self.processors, self.sample, self.size = processors, sample, size

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Probabilities (N, V), float32.

        Args:
            ids: the texts so far, (N, T).
            logits: behind each text, (N, V').

        Raises:
            InputError: logits with NaN or +inf, or processors that leave no token.
        """
        scores = fitted(logits, self.size).float()
        if self.processors:
            scores = self.processors(ids, scores)
        p = scores.softmax(-1)
        if bool(p[:, 0].isnan().any()):
            raise InputError("logits", f"NaN behind {ids.shape[1]} tokens", "free of NaN and +inf, one token allowed")
        if self.sample:
            return p
        return torch.zeros_like(p).scatter_(1, scores.argmax(-1, keepdim=True), 1.0)


@dataclass
class SpeculationRecord:
    """What a run of a speculative loop did, all rows together.

    Args:
        rounds: times that the target checked something.
        target_calls, draft_calls: forward passes of each model, the prompt's among them.
        accepted: tokens that each round added to the text.
    """

    rounds: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that were written."""
        return sum(self.accepted)

    @property
    def tokens_per_target_call(self) -> float:
        """Written tokens by forward pass of the target."""
        return self.tokens / self.target_calls if self.target_calls else math.nan


TAKEN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def check_pair(loop: str, target: Any, draft: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse what no draft-and-check loop can run.

    Args:
        loop: its name, for the sentences.

    Raises:
        InputError: an encoder-decoder, another vocabulary, beams, scores or hidden states asked for, inputs besides ids
            and their mask (the draft model would not see them), no cache or one of a kind that can't be cut, or more
            tokens than one of the models takes.
    """
    for parameter, model in (("model", target), ("draft_model", draft)):
        name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError(parameter, name, f"a decoder-only model for {loop}")
        if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
            raise InputError(parameter, name, f"a model whose every layer attends to the whole text for {loop}")
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        if generation_config.max_length and generation_config.max_length > limit:
            value = f"{generation_config.max_length} tokens with the prompt"
            raise InputError("max_new_tokens", value, f"at most {limit} with the prompt ({name})")
    same_size(target, draft, "draft_model")
    if generation_config.num_beams not in (None, 1):
        raise InputError("num_beams", generation_config.num_beams, f"1 for {loop}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False):
            raise InputError(name, True, f"False for {loop}")
    other = [name for name, value in model_kwargs.items() if name not in TAKEN and value is not None]
    if other:
        raise InputError("inputs", ", ".join(other), f"input_ids and their attention mask for {loop}")
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, DynamicCache):
        kind = "no cache" if cache is None else type(cache).__name__
        raise InputError("past_key_values", kind, f"a DynamicCache for {loop} (use_cache=True)")
    if cache.get_seq_length() > 0:
        raise InputError("past_key_values", f"{cache.get_seq_length()} tokens", f"empty for {loop}")


class Chain:
    """A model and its key-value cache over one text.

    Args:
        model: a decoder-only model with full attention.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, DynamicCache()
        self._device, self._keeps_some = model.device, model._supports_logits_to_keep()  # looked up once: both are slow

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())

    @torch.no_grad()
    def logits(self, ids: Tensor, places: int | None = None) -> Tensor:
        """Feed what the cache lacks of ``ids`` (T,), and give the logits behind each token fed, (new, V) float32.

        The tokens in the cache must be the first of ``ids``, and at least one must be new.

        Args:
            places: how many logits are wanted, from the end (a long prompt's would fill the memory).
        """
        new = ids[self.length :].to(self._device)[None]
        fewer = {"logits_to_keep": places} if places is not None and self._keeps_some else {}
        output = self.model(new, past_key_values=self.cache, use_cache=True, return_dict=True, **fewer)
        return output.logits[0, 0 if places is None else -places :].float()

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length <= 0:
            self.cache = DynamicCache()
        elif length < self.length:
            self.cache.crop(length - self.length)


def unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The rows of a batch that was padded on the left, without padding."""
    if attention_mask is None:
        return list(input_ids)
    return [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
