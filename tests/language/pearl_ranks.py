"""What the two ranks of PEARL's tests run, one thing after the other in one process group."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabular import random_law, tabular
from transformers.generation.streamers import BaseStreamer

from conftest import generate, tiny
from steersman.language.pearl import PEARL


def both_engines(target: Any, draft: Any, prompt: torch.Tensor, gamma: int, variant: str, **options: Any) -> list[Any]:
    """Whether the ranks write what threads write, and by the same rounds."""
    mine = (draft, target)[dist.get_rank()]
    ours, theirs = (
        PEARL(model, gamma, variant, engine, generator=torch.Generator().manual_seed(5), timeout=30)
        for model, engine in ((None, "distributed"), (draft, "threads"))
    )
    together = generate(mine, prompt, 20, custom_generate=ours, **options)
    alone = generate(target, prompt, 20, custom_generate=theirs, **options)
    return [torch.equal(together, alone), ours.record.accepted == theirs.record.accepted, together.shape[1]]


def outcome(call: Callable[[], Any]) -> list[Any]:
    """The error's kind and sentence, and seconds until it came."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), time.monotonic() - start]
    return ["none", "", time.monotonic() - start]


def everything(folder: str) -> None:
    rank, found = dist.get_rank(), {}
    target, draft = tiny("gpt2", 3), tiny("gpt2", 9)
    mine = (draft, target)[rank]
    prompt = torch.tensor([[5, 9, 2]])
    for variant in ("full", "no-pre", "no-post", "sd", "target", "draft"):
        found[variant] = both_engines(target, draft, prompt, 3, variant, do_sample=True, top_k=0)
    found["same model"] = both_engines(target, target, prompt, 3, "full", eos_token_id=None)
    large = [tiny("llama", seed, vocab_size=1000) for seed in (0, 1)]
    found["large ids"] = both_engines(*large, prompt, 2, "full", do_sample=True, eos_token_id=None)
    small = [tabular(random_law(3, seed=seed)) for seed in (0, 1)]
    found["small vocabulary"] = both_engines(*small, torch.tensor([[1]]), 4, "full", do_sample=True, top_k=0)

    def write(model: Any = mine, ids: torch.Tensor = prompt, timeout: float = 30, **options: Any) -> list[Any]:
        loop = PEARL(engine="distributed", gamma=2, timeout=timeout)
        return outcome(lambda: generate(model, ids, 20, custom_generate=loop, eos_token_id=None, **options))

    found["other prompt"] = write(ids=prompt + rank)
    found["other settings"] = write(do_sample=bool(rank))
    found["other vocabulary"] = write(tiny("gpt2", rank, vocab_size=(97, 41)[rank]))
    found["refused"] = write(**({"num_beams": 1} if rank else {"past_key_values": None, "use_cache": False}))

    def mishap(who: int, what: Callable[[], Any]) -> Any:
        model, calls = tiny("gpt2", rank), []

        def step(*_: Any) -> None:
            calls.append(0)
            if rank == who and len(calls) == 3:
                what()

        model.register_forward_pre_hook(step)
        return model

    def fail() -> None:
        raise ValueError("out of memory")

    for who in (0, 1):
        found[f"rank {who} fails"] = write(mishap(who, fail))

    class Closed(BaseStreamer):
        """A reader that is gone when the text ends, behind the last verdict."""

        def put(self, value: torch.Tensor) -> None: ...

        def end(self) -> None:
            raise OSError("pipe closed")

    dist.barrier()
    streamer = Closed() if rank == 0 else None
    loop = PEARL(engine="distributed", gamma=2, timeout=30, streamer=streamer)
    found["late failure"] = outcome(lambda: generate(mine, prompt, 20, custom_generate=loop, eos_token_id=None))
    for who in (0, 1):
        dist.barrier()
        found[f"rank {who} hangs"] = write(mishap(who, lambda: time.sleep(600)), timeout=1.0)
    found["afterwards"] = both_engines(target, draft, prompt, 3, "full")
    Path(folder, f"{rank}.json").write_text(json.dumps(found | {"pid": os.getpid()}))

    dist.barrier()
    last = write(mishap(0, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    Path(folder, f"{rank}.json").write_text(json.dumps(found | {"pid": os.getpid(), "killed": last}))
    raise RuntimeError(last[1])
