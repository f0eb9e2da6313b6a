"""PEARL in two processes of this machine, as the speculation bench wants it: rank 0 drafts, rank 1 verifies."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from steersman.cluster.launch import launch, report

TIMEOUT_S = 60.0  # of one step of a rank: a machine in use may be slow
WARM_UP = 8  # tokens before the clock runs


def write(
    target: str,
    draft: str,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    new_tokens: int,
    temperature: float,
    top_p: float,
    threads: int,
    latency: Sequence[float] | None,
    knobs: Mapping[str, Any],
    progress: Callable[[float, float, str], None] | None = None,
    timeout: float = 3600.0,
) -> list[dict[str, Any]]:
    """Texts behind prompts, one at a time, each of exactly ``new_tokens`` tokens.

    Args:
        target, draft: specs of the two models.
        prompts, seeds: ids of each prompt, and the seed of each text.
        temperature, top_p: of sampling; temperature 0 is greedy.
        threads: of each rank.
        latency: seconds of a forward of the draft model and of the target (simulated), or None.
        knobs: of ``PEARL`` (without its engine).
        progress: called with prompts done, prompts in all, and a text.
        timeout: seconds for everything.

    Returns:
        list: for each prompt ``ids`` (of the new tokens), ``seconds``, ``target`` and ``draft`` (tokens in each
        forward), ``rounds`` (tokens that each round added), ``gammas``, and ``calls`` and ``late`` of both models'
        simulated forwards.

    Raises:
        TrialError: a rank failed, or the time was up.
    """
    arguments = {
        "specs": [draft, target],
        "prompts": [list(map(int, prompt)) for prompt in prompts],
        "seeds": [int(seed) for seed in seeds],
        "setting": {"temperature": temperature, "top_p": top_p},
        "new_tokens": new_tokens,
        "threads": threads,
        "latency": None if latency is None else list(latency),
        "knobs": dict(knobs),
    }
    drafted, checked = launch(f"{__name__}:on_rank", arguments, 2, timeout=timeout, progress=progress)
    return [
        {
            **theirs,
            "target": theirs["forwards"],
            "draft": ours["forwards"],
            "calls": ours["calls"] + theirs["calls"],
            "late": ours["late"] + theirs["late"],
        }
        for ours, theirs in zip(drafted, checked, strict=True)
    ]


def on_rank(
    specs: Sequence[str],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    setting: Mapping[str, Any],
    new_tokens: int,
    threads: int,
    latency: Sequence[float] | None,
    knobs: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One rank's part of :func:`write`."""
    # Only here: the launching process needs none of it.
    from transformers import GenerationConfig

    from steersman.benches._language import load
    from steersman.benches._latency import Latency
    from steersman.benches.speculation import generation
    from steersman.language.pearl import PEARL

    torch.set_num_threads(threads)
    rank = dist.get_rank()
    s = load(specs[rank], ("draft", "subject")[rank])
    s.model.generation_config = GenerationConfig()
    loop = PEARL(engine="distributed", timeout=TIMEOUT_S, **knobs)
    forwards: list[int] = []
    s.model.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True
    )

    def text(prompt: Sequence[int], seed: int, new: int) -> tuple[list[int], float]:
        ids = torch.tensor([prompt], device=s.model.device)
        torch.manual_seed(seed)
        dist.barrier()
        start = time.perf_counter()
        out = s.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=generation(s, setting, new),
            custom_generate=loop,
        )
        return out[0, len(prompt) :].tolist(), time.perf_counter() - start

    found = []
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(Latency(s.model, latency[rank])) if latency is not None else None
        text(prompts[0], 0, min(WARM_UP, new_tokens))
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            report(number, len(prompts), f"{number} of {len(prompts)} prompts")
            forwards.clear()
            calls, late = (device.calls, device.late) if device is not None else (0, 0)
            ids, seconds = text(prompt, seed, new_tokens)
            found.append(
                {
                    "ids": ids,
                    "seconds": seconds,
                    "forwards": list(forwards),
                    "rounds": loop.record.accepted,
                    "gammas": loop.record.gammas,
                    "calls": device.calls - calls if device is not None else 0,
                    "late": device.late - late if device is not None else 0,
                }
            )
    return found
