"""Contrastive search: look one token ahead, and avoid tokens that resemble the context.

Every one of the k most probable tokens is run through the model, and the next token is

    x_t = argmax over v in C of  (1 - alpha) p(v | x_<t) - alpha max_{j < t} cos(h_v, h_j)

with h_j the last hidden state at context token j and h_v the one that v would get. It is here as the
baseline that deterministic decoding methods are measured against, so it is made to cost as little as it can:
the candidates go through the model side by side, as a tree of depth one over a single copy of the key-value
cache (each sees the context and itself), and the cache is copied once a step, as in greedy search.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import numbers
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput

from steersman.errors import InputError


class ContrastiveSearch:
    r"""Contrastive search (Su et al., 2022), as a loop for ``model.generate``.

        x_t = argmax_{v in C} (1 - alpha) p(v | x_<t) - alpha max_{j<t} cos(h_v, h_j)

    ::

        model.generate(**inputs, custom_generate=ContrastiveSearch(top_k=5, alpha=0.6))

    Works on decoder-only models, batches and left padding included; logits processors and stopping
    criteria apply, p is the softmax of the processed scores, and forbidden tokens (-inf) stay forbidden.
    Every emitted token costs k forward tokens.

    The first call on each model compares the tree of candidates with k separate rows. A model that does not
    take a tree (ALiBi, sliding windows, recurrent layers) runs the rows, which copy a cache of k times the
    size.

    Args:
        top_k: k, candidates a step, at least 1 (1 is greedy search at the same cost).
        alpha: weight of the resemblance, from 0 (greedy search) to 1.
        streamer: a transformers streamer; ``generate`` gives none to a custom loop.

    Raises:
        InputError: an argument outside its range. On call: beams, sampling, an encoder-decoder, a cache
            that already holds tokens or no cache at all, NaN from the model.

    References:
        Yixuan Su, Tian Lan, Yan Wang, Dani Yogatama, Lingpeng Kong, Nigel Collier. A Contrastive Framework
        for Neural Text Generation. NeurIPS 2022, arXiv:2202.06417, eq. 5.
    """

    top_k: int
    alpha: float
    streamer: Any
    _takes_tree: MutableMapping[Any, bool] = WeakKeyDictionary()  # what was found out about each model
    generate_options: Mapping[str, Any] = MappingProxyType({"do_sample": False, "num_beams": 1})

    def __init__(self, top_k: int = 5, alpha: float = 0.6, streamer: Any = None) -> None:
        if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 1:
            raise InputError("top_k", top_k, "a whole number of at least 1")
        if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not 0 <= alpha <= 1:
            raise InputError("alpha", alpha, "a number from 0 to 1")
        self.top_k = int(top_k)
        self.alpha = float(alpha)
        self.streamer = streamer

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The loop; ``generate`` calls it. Returns what greedy search would: ids, or an output with them."""
        cache = self._check(model, generation_config, model_kwargs)
        batch, length = input_ids.shape
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        output = model(**inputs, output_hidden_states=True, return_dict=True)
        logits = output.logits[:, -1]
        context = F.normalize(output.hidden_states[-1].float(), dim=-1)  # (B, T, D), unit length

        mask = model_kwargs.get("attention_mask")
        seen = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        position = seen.sum(1, keepdim=True)
        ends = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        pad = getattr(generation_config, "_pad_token_tensor", None)
        running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        rows = torch.arange(batch, device=input_ids.device)
        tree: bool | None = self._takes_tree.get(model)
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            tree = False
        if tree is False:
            cache.batch_repeat_interleave(min(self.top_k, logits.shape[1]))

        while bool(running.any()):
            scores = logits_processor(input_ids, logits.float())
            p, candidates = scores.softmax(-1).topk(min(self.top_k, scores.shape[1]))
            if tree is None:
                tree = self._takes_tree[model] = _tree_agrees(model, candidates, cache, seen, position)
                if not tree:
                    cache.batch_repeat_interleave(candidates.shape[1])
            forward = _tree if tree else _rows
            ahead, hidden = forward(model, candidates, cache, seen, position)  # (B, k, V), (B, k, D)

            hidden = F.normalize(hidden.float(), dim=-1)
            likeness = hidden @ context.mT
            likeness = likeness.masked_fill(~seen[:, None], -math.inf).amax(-1)
            value = (1 - self.alpha) * p - self.alpha * likeness
            if bool(value.isnan().any()):
                raise InputError("scores", f"NaN at token {input_ids.shape[1] - length}", "free of NaN")
            value = value.masked_fill(scores.gather(1, candidates) == -math.inf, -math.inf)
            chosen = value.argmax(1)
            if tree:
                _keep(cache, seen.shape[1], chosen)
            else:
                k = candidates.shape[1]
                cache.reorder_cache((rows * k + chosen).repeat_interleave(k))

            logits = ahead[rows, chosen]
            context = torch.cat([context, hidden[rows, chosen][:, None]], 1)
            token = candidates[rows, chosen]
            if ends and pad is not None:
                token = torch.where(running, token, pad.to(token.device))
            input_ids = torch.cat([input_ids, token[:, None]], 1)
            seen, position = F.pad(seen, (0, 1), value=True), position + 1
            running = running & ~stopping_criteria(input_ids, None)
            if self.streamer is not None:
                self.streamer.put(token.cpu())

        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        if not tree:
            cache.batch_select_indices(rows * min(self.top_k, logits.shape[1]))
        sequences: Any = input_ids
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)

    def _check(self, model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> DynamicCache:
        if model.config.is_encoder_decoder:
            raise InputError("model", type(model).__name__, "a decoder-only model for contrastive search")
        if generation_config.num_beams != 1:
            raise InputError("num_beams", generation_config.num_beams, "1 for contrastive search")
        if generation_config.do_sample:
            raise InputError("do_sample", True, "False for contrastive search, which is deterministic")
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, DynamicCache):
            kind = "no cache" if cache is None else type(cache).__name__
            raise InputError("past_key_values", kind, "a DynamicCache for contrastive search (use_cache=True)")
        if cache.get_seq_length() > 0:
            raise InputError("past_key_values", f"{cache.get_seq_length()} tokens", "empty for contrastive search")
        return cache


def _tree(model: Any, candidates: Tensor, cache: DynamicCache, seen: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states behind each candidate: k columns that see the context and themselves."""
    batch, k = candidates.shape
    itself = torch.eye(k, dtype=torch.bool, device=seen.device)
    sees = torch.cat([seen[:, None].expand(-1, k, -1), itself.expand(batch, -1, -1)], 2)[:, None]
    # Additive: eager attention would add a boolean mask to the scores.
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=seen.device)
    mask.masked_fill_(~sees, torch.finfo(model.dtype).min)
    return _forward(model, candidates, cache, mask, position.expand(-1, k))


def _keep(cache: DynamicCache, first: int, chosen: Tensor) -> None:
    """Of the k columns that ``_tree`` added at column ``first``, keep the chosen one of each row."""
    rows = torch.arange(len(chosen), device=chosen.device)
    layers: Any = cache.layers
    for layer in layers:
        for states in (layer.keys, layer.values):
            states[:, :, first] = states[rows, :, first + chosen]
        layer.keys, layer.values = layer.keys[:, :, : first + 1], layer.values[:, :, : first + 1]


def _rows(model: Any, candidates: Tensor, cache: DynamicCache, seen: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The same from B k rows, on a cache that holds every row k times."""
    batch, k = candidates.shape
    mask = F.pad(seen, (0, 1), value=True).long().repeat_interleave(k, 0)
    logits, hidden = _forward(model, candidates.reshape(-1, 1), cache, mask, position.repeat_interleave(k, 0))
    return logits.view(batch, k, -1), hidden.view(batch, k, -1)


def _forward(model: Any, ids: Tensor, cache: DynamicCache, mask: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    places = {"position_ids": position} if _takes_positions(model.__class__) else {}
    output = model(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
        return_dict=True,
        **places,
    )
    return output.logits, output.hidden_states[-1]


@functools.cache
def _takes_positions(kind: Any) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def _tree_agrees(model: Any, candidates: Tensor, cache: DynamicCache, seen: Tensor, position: Tensor) -> bool:
    """Whether the model gives the candidates the same logits as a tree and as rows."""
    try:
        tree, _ = _tree(model, candidates, copy.deepcopy(cache), seen, position)
    except (TypeError, ValueError, RuntimeError):
        return False
    wide = copy.deepcopy(cache)
    wide.batch_repeat_interleave(candidates.shape[1])
    rows, _ = _rows(model, candidates, wide, seen, position)
    rounding = 1e-4 if torch.finfo(model.dtype).bits >= 32 else 3e-2
    difference, spread = (tree - rows).float(), (rows - rows.mean(-1, keepdim=True)).float()
    return bool(difference.norm() <= rounding * spread.norm())
