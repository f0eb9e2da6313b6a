r"""Laws of target and draft at contexts that the target itself wrote, to measure acceptance at.

Acceptance is :math:`\mathbb{E}_x[\alpha(p(\cdot \mid x), q(\cdot \mid x))]` over the contexts x that lossless decoding
visits. Those are the target's own texts at the temperature at hand: held-out texts, or the draft's, are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from steersman.errors import InputError
from steersman.language.multi_draft.laws import draw_tokens
from steersman.language.speculation import Law
from steersman.language.vocabularies import fitted, same_size


@dataclass(frozen=True)
class Contexts:
    """Laws at N contexts.

    Args:
        p, q: laws of target and draft behind temperature and top-p, (N, V) float32.
        ranking: the draft's logits, (N, V) float32, which rank the tokens that q gives nothing to.
        prompt: which prompt each context goes on from, (N,).
    """

    p: Tensor
    q: Tensor
    ranking: Tensor
    prompt: Tensor


@torch.no_grad()
def contexts(
    target: Any,
    draft: Any,
    prompts: Sequence[Tensor],
    *,
    count: int = 500,
    temperature: float = 1.0,
    top_p: float = 1.0,
    new_tokens: int = 32,
    suppress: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Contexts:
    """Have ``target`` go on from the prompts, and take both models' laws at ``count`` places of its texts.

    Args:
        target, draft: causal language models of transformers with one vocabulary.
        prompts: token ids, each (T,) with T >= 1; prompts of one length run as a batch.
        count: contexts, evenly spread over the ``len(prompts) * new_tokens`` there are. A text that ends with the
            target's end-of-sequence token has fewer.
        temperature: from 0 (greedy: the laws have one token) to 100.
        top_p: of nucleus sampling, above 0 and at most 1.
        new_tokens: tokens behind each prompt.
        suppress: ids that neither model may draw, as the end-of-sequence token.
        generator: of torch, on the target's device.

    Raises:
        InputError: a number out of range, no prompt or an empty one, or another vocabulary.
    """
    same_size(target, draft, "draft")
    if not prompts or any(prompt.ndim != 1 or len(prompt) == 0 for prompt in prompts):
        raise InputError("prompts", f"{len(prompts)} prompts", "at least one prompt, each of at least one token")
    if not 0 <= temperature <= 100:
        raise InputError("temperature", temperature, "a number from 0 to 100")
    if not 0 < top_p <= 1:
        raise InputError("top_p", top_p, "a number above 0 and at most 1")
    total = len(prompts) * new_tokens
    if not 1 <= count <= total:
        raise InputError("count", count, f"a whole number from 1 to {total} ({len(prompts)} x {new_tokens} places)")
    chosen = set(np.linspace(0, total - 1, count).round().astype(int).tolist())

    processors = LogitsProcessorList()
    if suppress:
        processors.append(SuppressTokensLogitsProcessor(list(suppress), device=str(target.device)))
    if temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    law = Law(processors, temperature > 0, target.config.get_text_config().vocab_size)
    end = target.config.get_text_config().eos_token_id
    ends = torch.tensor([end] if isinstance(end, int) else end or [], device=target.device)

    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        which = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.stack([prompts[i] for i in which]).to(target.device)
        cache = DynamicCache()
        going = torch.ones(len(which), dtype=torch.bool, device=ids.device)
        laws, places = [], []
        for k in range(new_tokens):
            fed = ids if k == 0 else ids[:, -1:]
            logits = target(fed, past_key_values=cache, use_cache=True, return_dict=True).logits[:, -1]
            p = law(ids, logits)
            at = [b for b, i in enumerate(which) if bool(going[b]) and i * new_tokens + k in chosen]
            laws.append(p[at])
            places.append(at)
            token = draw_tokens(p.double(), 1, generator)
            going &= ~torch.isin(token[:, 0], ends)
            ids = torch.cat([ids, token], 1)
        theirs = fitted(draft(ids[:, :-1].to(draft.device), return_dict=True).logits, law.size)
        theirs = theirs[:, length - 1 :].float().to(ids.device)
        for k, (p, at) in enumerate(zip(laws, places, strict=True)):
            if not at:
                continue
            q = law(ids[at, : length + k], theirs[at, k])
            for j, b in enumerate(at):
                found[which[b] * new_tokens + k] = (p[j], q[j], theirs[b, k])
    order = sorted(found)
    p, q, ranking = (torch.stack([found[place][part] for place in order]) for part in range(3))
    return Contexts(p, q, ranking, torch.tensor([place // new_tokens for place in order]))
