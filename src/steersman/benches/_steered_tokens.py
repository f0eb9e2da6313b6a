r"""Where steering changed what a language model would have said.

Along a text that was written, behind each prefix :math:`x_{<t}`, stand the subject's own law p and the law p' that
the contender drew from (before temperature and cuts of the tail). A token is marked as steered where

.. math:: \mathrm{KL}(p' \| p) \ge \texttt{STEERED} .

Another most probable token alone is no sign of steering: the first two can be next to equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

STEERED = 0.2  # nats


@dataclass(frozen=True)
class Change:
    """What steering did to the law of one token.

    Args:
        kl: KL(p' | p) in nats.
        before, after: the most probable token under p and under p'.
    """

    kl: float
    before: int
    after: int

    @property
    def steered(self) -> bool:
        return self.kl >= STEERED


@torch.no_grad()
def changes(
    model: Any,
    prompt: Sequence[int],
    written: Sequence[int],
    processors: Sequence[LogitsProcessor] = (),
    writer: Any = None,
    opened: Sequence[int] | None = None,
) -> list[Change]:
    """The change of the law at each written token.

    Args:
        model: the subject's.
        prompt, written: token ids.
        processors: made for this one prompt without padding; called with each prefix in turn.
        writer: the model that wrote, where it isn't the subject's.
        opened: the prompt as the writer saw it, where that differs.
    """
    opened = prompt if opened is None else opened
    base = _logits(model, prompt, written)
    if writer is None and list(opened) == list(prompt):
        scores = base
    else:
        scores = _logits(model if writer is None else writer, opened, written)
    ids = torch.tensor([[*opened, *written]], device=scores.device)
    found = []
    for t in range(len(written)):
        row = scores[t : t + 1].clone()
        for processor in processors:
            row = processor(ids[:, : len(opened) + t], row)
        law, own = row[0].double().log_softmax(-1), base[t].double().log_softmax(-1).to(row.device)
        kept = law > -torch.inf
        kl = float((law[kept].exp() * (law[kept] - own[kept])).sum().clamp(min=0))
        found.append(Change(kl, int(own.argmax()), int(law.argmax())))
    return found


def _logits(model: Any, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
    """Logits of each written token, (n, V) float32."""
    ids = torch.tensor([[*prompt, *written]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
