r"""What a pair of models is like, whoever speculates with it: acceptance at the target's contexts, and forward times.

At a context x the target has the law p and the draft the law q, both behind temperature and nucleus. A verifier that
gets n drafts accepts with a probability that depends on (p, q, n) alone, at most that of the optimal transport. Both
are averaged over contexts that the target itself wrote at that temperature. With the times of forwards of several
tokens on this machine, they tell which tree of drafts ought to be fastest: an estimate, which a comparison checks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from steersman.language.multi_draft import (
    VERIFIERS,
    Contexts,
    acceptance,
    contexts,
    optimal_acceptance,
    recommend,
)
from steersman.language.pearl import expected_tokens

RUN = 32  # tokens of a text that gives contexts
ROWS = 16  # laws at once
SIZES = (1, 2, 4, 8, 16, 32, 64)  # tokens of the forwards that are timed
TURNS = 5  # forwards of each size
PLANNED = ("single", "rrs", "rrsw", "k-seq", "greedy")  # verifiers that are planned with
MOST_DRAFTS = 4
MOST_GAMMA = 16
PLACES = 16  # contexts that plans look at


def laws(
    target: Any,
    draft: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    temperature: float,
    top_p: float,
    end: int | None,
    positions: float,
    seed: int,
) -> Contexts:
    """Laws of both models at ``count`` places of texts that the target writes behind the prompts.

    A prompt gives a text of 32 tokens (several, if more places are wanted and tokens are drawn), or fewer where
    positions end. At temperature 0 there may be fewer places than asked for.

    Args:
        end: the end-of-sequence token, which is not allowed, or None.
        positions: the longest text of both models.
    """
    new = int(min(RUN, positions - max(map(len, prompts))))
    rows = [torch.tensor(prompt) for prompt in prompts]
    if temperature > 0:
        rows *= math.ceil(count / (len(rows) * new))
    return contexts(
        target,
        draft,
        rows,
        count=min(count, len(rows) * new),
        temperature=temperature,
        top_p=top_p,
        new_tokens=new,
        suppress=() if end is None else (end,),
        generator=torch.Generator(target.device).manual_seed(seed),
    )


def accepted(found: Contexts, n: int, verifier: str) -> np.ndarray:
    """Acceptance of ``verifier`` with n drafts at each context, (N,)."""
    generator = torch.Generator(found.p.device).manual_seed(0)
    parts = [acceptance(p, q, n, verifier, ranking=ranking, generator=generator) for p, q, ranking in _in_parts(found)]
    return torch.cat(parts).clamp(0, 1).cpu().numpy()


def bound(found: Contexts, n: int, sampler: str) -> np.ndarray:
    """The most that any verifier accepts of n drafts of ``sampler`` at each context, (N,)."""
    parts = [optimal_acceptance(p, q, n, sampler, ranking=ranking) for p, q, ranking in _in_parts(found)]
    return torch.cat(parts).cpu().numpy()


def _in_parts(found: Contexts) -> Any:
    return zip(found.p.split(ROWS), found.q.split(ROWS), found.ranking.split(ROWS), strict=True)


def table(found: Contexts, n: int) -> list[dict[str, Any]]:
    """Every verifier that takes n drafts of these laws: its sampler, mean acceptance and mean bound."""
    records = []
    bounds: dict[str, float] = {}
    for verifier, sampler in VERIFIERS.items():
        if (verifier == "single") != (n == 1) or verifier == "ot-lp" or (verifier == "spechub" and n != 2):
            continue
        if sampler not in bounds:
            bounds[sampler] = float(bound(found, n, sampler).mean())
        mean = float(accepted(found, n, verifier).mean())
        records.append({"n": n, "sampler": sampler, "verifier": verifier, "acceptance": mean, "bound": bounds[sampler]})
    return records


@torch.no_grad()
def forward_ms(model: Any, prompt: Sequence[int], positions: float) -> dict[int, float]:
    """Median milliseconds of a forward of 1, 2, 4, ... tokens behind the prompt."""
    ids = torch.tensor([list(prompt)], device=model.device)
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True)
    times: dict[int, float] = {}
    for size in SIZES:
        if ids.shape[1] + size > positions:
            break
        new = ids[:, -1:].expand(1, size)
        spent = []
        for _ in range(TURNS):
            start = time.perf_counter()
            logits = model(new, past_key_values=cache, use_cache=True).logits
            float(logits[0, -1, 0])  # waits for the device
            spent.append(1e3 * (time.perf_counter() - start))
            cache.crop(-size)
        times[size] = statistics.median(spent)
    return times


Times = Mapping[int, float]


def plans(found: Contexts, target_ms: Times, draft_ms: Times, *, parallel: bool) -> list[dict[str, Any]]:
    r"""Settings and what their forwards ought to take: plain generation, trees of drafts, and PEARL.

    For PEARL with blocks of g tokens that is :math:`\max(g\, t_{draft}, t_{target}(g)) / R(a, g)`, with a the
    acceptance of one draft and R the expected tokens of a round.

    Args:
        target_ms, draft_ms: milliseconds of a forward by its tokens.
        parallel: whether the models are on devices of their own, so that PEARL is planned, too.

    Returns:
        list: of ``line`` (of code), ``method`` (an id), ``tokens_per_round`` and ``ms_per_token``.
    """
    step = max(1, len(found.p) // PLACES)
    thin = Contexts(*(x[::step] for x in (found.p, found.q, found.ranking, found.prompt)))
    most = min(MOST_DRAFTS, found.p.shape[1])
    rates = {
        verifier: [float(accepted(thin, n, verifier).mean()) for n in range(1, 2 if verifier == "single" else most + 1)]
        for verifier in PLANNED
    }
    records = [
        {
            "line": plan.line,
            "method": "multi-draft" if plan.n_drafts else "autoregressive",
            "tokens_per_round": plan.tokens_per_call,
            "ms_per_token": plan.ms_per_token,
        }
        for plan in recommend(rates, target_ms, draft_ms)
        if plan.n_drafts != 1 or plan.verifier == "single"
    ]
    sizes = sorted(target_ms)
    for gamma in range(1, MOST_GAMMA + 1) if parallel else ():
        checked = float(np.interp(gamma, sizes, [target_ms[size] for size in sizes]))
        added = expected_tokens(rates["single"][0], gamma)
        records.append(
            {
                "line": f"model.generate(**inputs, custom_generate=PEARL(draft_model, gamma={gamma}))",
                "method": "pearl",
                "tokens_per_round": added,
                "ms_per_token": max(gamma * draft_ms[1], checked) / added,
            }
        )
    return records
