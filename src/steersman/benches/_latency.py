r"""Simulated devices: forwards that take a given time, and pairs of models whose tokens are accepted at a given rate.

Speculation is about models that wait for each other, which small models on few cores can't show. Here a forward
takes a given time whatever it computes: what is left of that time after the computation is slept away, and sleeping
threads and processes overlap perfectly. So a figure taken under :class:`Latency` shows a schedule, not a machine, and
must be labelled *simulated*. As on a device whose time goes into reading the weights, the time of a forward doesn't
depend on the number of its tokens.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any, Self

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from steersman.errors import InputError


class Latency:
    """While entered, each forward of ``model`` takes at least ``seconds`` of wall time (simulated).

    Whoever calls the model sees its own outputs: ``generate``, assisted generation and custom loops work as without.

    Args:
        model: a torch module.
        seconds: the least time of a forward, at least 0.

    Attributes:
        calls: number of forwards so far.
        late: how many of them took longer than ``seconds`` by themselves, so that the simulation was not true to it.

    Raises:
        InputError: ``seconds`` is no number of at least 0.

    Example:
        >>> with Latency(target, 0.04), Latency(draft, 0.01):
        ...     target.generate(**inputs, assistant_model=draft)
    """

    def __init__(self, model: Any, seconds: float) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise InputError("seconds", seconds, "a number of at least 0")
        self.model, self.seconds = model, float(seconds)
        self.calls = self.late = 0

    def __enter__(self) -> Self:
        started: list[float] = []

        def begin(*_: Any) -> None:
            started.append(time.perf_counter())

        def end(*_: Any) -> None:
            left = started.pop() + self.seconds - time.perf_counter()
            self.calls += 1
            self.late += left < 0
            if left > 0:
                time.sleep(left)

        self._hooks = contextlib.ExitStack()
        # The last to begin and the first to end: other hooks' time is not slept away twice.
        self._hooks.callback(self.model.register_forward_pre_hook(begin).remove)
        self._hooks.callback(self.model.register_forward_hook(end).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()


def independent_pair(acceptance: float, vocabulary: int = 16, positions: int = 4096) -> tuple[Any, Any]:
    r"""(target, draft) whose drafted tokens are accepted independently of each other, each with one probability a.

    Both are one-layer GPT-2 models with a real key-value cache, whose next token doesn't depend on the context:

    .. math:: p = \mathrm{uniform}(\text{first half}), \qquad
              q = a\,p + (1-a)\,\mathrm{uniform}(\text{second half}), \qquad \sum_v \min(p_v, q_v) = a

    so at temperature 1 without truncation a token of q passes the ratio test with probability a, whatever came
    before. For schedules whose yield has a closed form.

    Args:
        acceptance: a, from 0 to 1.
        vocabulary: an even number of tokens, at least 2.
        positions: the longest text.

    Raises:
        InputError: an argument out of range.
    """
    if isinstance(acceptance, bool) or not isinstance(acceptance, (int, float)) or not 0 <= acceptance <= 1:
        raise InputError("acceptance", acceptance, "a number from 0 to 1")
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int) or vocabulary < 2 or vocabulary % 2:
        raise InputError("vocabulary", vocabulary, "an even number of at least 2")
    half = vocabulary // 2
    p = torch.zeros(vocabulary)
    p[:half] = 1 / half
    q = acceptance * p + (1 - acceptance) * (1 / half - p)
    return _without_context(p, positions), _without_context(q, positions)


def _without_context(law: torch.Tensor, positions: int) -> Any:
    """A GPT-2 whose last layer norm gives the first basis vector: its logits are one column of the embedding."""
    special: dict[str, Any] = {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(law), n_positions=positions, n_embd=4, n_layer=1, n_head=1, **special)
    )
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.transformer.wte.weight[:, 0] = law.log().clamp_min(-1e4)
    return model.eval()
