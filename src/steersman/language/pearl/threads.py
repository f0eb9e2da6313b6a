"""PEARL in one process: the draft model in a thread of its own, on its own device or CUDA stream."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor

from steersman.language.pearl.rounds import Verdict
from steersman.language.pearl.sides import Draft, Target, Work


class Threads:
    """Both models in this process.

    On a GPU that both share, the draft model gets a stream of its own. CPU threads share the cores: let each model
    have its part of them by ``torch.set_num_threads``.

    Args:
        draft: makes the draft model's side.
        target: the target's side.
        device: where the draft model is.
        at_once: whether the models run at the same time; else both run in the calling thread.
    """

    verifies = True

    def __init__(self, draft: Callable[[], Draft], target: Target, device: torch.device, at_once: bool = True) -> None:
        self.target = target
        self._make_draft, self._device, self._at_once = draft, device, at_once
        self._pool: ThreadPoolExecutor | None = None
        self._laws: list[Tensor] = []

    def __enter__(self) -> Self:
        if self._at_once:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="pearl-draft")
            # The law is computed on the target's device, where the default stream has the target's forward.
            self._entered = inherited(self.target.device, self._device)
        # Made where it works, so that all its tensors belong to its stream.
        self.draft: Draft = self._there(self._make_draft).result()
        self._committed: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _there(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run ``function`` in the draft model's thread, if it has one."""
        if self._pool is None:
            done: Future[Any] = Future()
            done.set_result(function(*arguments))
            return done

        def call() -> Any:
            with self._entered():
                return function(*arguments)

        return self._pool.submit(call)

    def work(self, length: int, write: int, places: int) -> Work:
        """One round's forwards, at the same time: the draft model writes ``write`` tokens behind the first ``length``,
        and the target gives its laws at the last ``places``."""
        if self._committed is not None:
            self._committed.result()
        writing = self._there(self.draft.write, length, write) if write else None
        work = Work()
        if places:
            work.t_target = self.target.score(length, places)
        if writing is not None:
            work.written, work.chances, laws, work.t_draft = writing.result()
            self._laws += laws
        return work

    def law(self, i: int) -> Tensor:
        """The law that token i of (rest + z) was drawn from."""
        return self._laws[i].to(self.target.device)

    def agree(self, verdict: Verdict | None) -> Verdict:
        """The verdict, on both sides."""
        assert verdict is not None
        return verdict

    def commit(self, length: int, verified: list[int], rest: list[int]) -> None:
        """Put verified tokens behind the first ``length``, and rest behind them; cut the caches to what stays."""
        self._laws = self._laws[len(self._laws) - len(rest) :]
        self._committed = self._there(self.draft.commit, length, verified, rest)
        self.target.commit(length, verified, rest)


def inherited(*devices: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Torch's modes of this thread (no gradients, inference, autocast) and a stream of its own on each GPU, to be
    entered in another thread; the last device is the current one there."""
    inference = torch.is_inference_mode_enabled()
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)]
    streams = [torch.cuda.Stream(device) for device in dict.fromkeys(devices) if device.type == "cuda"]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(stream.device))

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as modes:
            modes.enter_context(torch.inference_mode() if inference else torch.no_grad())
            for kind, dtype in casts:
                modes.enter_context(torch.autocast(kind, dtype))
            for stream in streams:
                modes.enter_context(torch.cuda.stream(stream))
            yield

    return enter


def warn_of_shared_cores() -> None:
    """Say so if two models on the CPU have more threads than there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if 2 * torch.get_num_threads() > max(cores, 2):
        warnings.warn(
            f"draft and target share {cores} CPU cores with {torch.get_num_threads()} threads each: "
            f"torch.set_num_threads({max(cores // 2, 1)}) gives each its own",
            stacklevel=3,
        )
