"""What each of the two models does in a round, on its own device, with its own key-value cache and random numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steersman.language.speculation import Chain, Law


@dataclass
class Work:
    """What came of a round's forwards: z, the probability that each was drawn with, and seconds (0: not measured)."""

    written: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    t_draft: float = 0.0
    t_target: float = 0.0


class Side:
    """A model, its cache, and the text in a buffer of its own.

    Args:
        model: a causal language model.
        law: the law of its next token.
        prompt: the row of ids, padding in front of it included, (T,).
        start: columns of padding, which the model doesn't see.
        longest: tokens that the buffer must hold.
        seed: of this side's random numbers.
    """

    keeps_rest = False  # whether the cache goes on over unverified tokens from round to round

    def __init__(self, model: Any, law: Law, prompt: Tensor, start: int, longest: int, seed: int) -> None:
        self.law, self.start = law, start
        self.chain = Chain(model)
        self.device = model.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.text = torch.zeros(max(longest, len(prompt)) + 1, dtype=torch.long, device=self.device)
        self.text[: len(prompt)] = prompt.to(self.device)

    def logits(self, length: int, places: int) -> Tensor:
        """The logits behind the last ``places`` of the first ``length`` tokens, (places, V)."""
        return self.chain.logits(self.text[self.start : length], places)

    def put(self, at: int, tokens: Sequence[int]) -> None:
        """Write tokens into the text from column ``at`` on, as far as the buffer reaches."""
        tokens = tokens[: len(self.text) - at]
        self.text[at : at + len(tokens)] = torch.tensor(tokens, dtype=torch.long, device=self.device)

    def commit(self, length: int, verified: Sequence[int], rest: Sequence[int]) -> None:
        """Put verified tokens behind the first ``length``, and rest behind them; cut the cache to what stays.

        The last token that a model works behind hasn't passed through it yet: its cache may lag, never lead.
        """
        self.put(length, [*verified, *rest])
        self.chain.crop(length + len(verified) + (len(rest) if self.keeps_rest else 0) - 1 - self.start)

    def draw(self, law: Tensor) -> int:
        """A token of a law (V,) or of anything proportional to one."""
        return int(torch.multinomial(law, 1, generator=self.generator))


class Draft(Side):
    """The draft model: writes blocks, and tells the laws that their tokens were drawn from.

    Args:
        home: the device of the processors' own tensors (that of the model whose ``generate`` runs), where the law is
            computed.
    """

    keeps_rest = True

    def __init__(
        self, model: Any, law: Law, prompt: Tensor, start: int, longest: int, seed: int, home: torch.device
    ) -> None:
        super().__init__(model, law, prompt, start, longest, seed)
        self.home = home

    def write(self, length: int, count: int) -> tuple[list[int], list[float], list[Tensor], float]:
        """Write ``count`` tokens behind the first ``length``: the tokens, the probability that each was drawn with,
        their laws (V,), and seconds a token."""
        tokens: list[int] = []
        chances: list[float] = []
        laws: list[Tensor] = []
        begin = time.perf_counter()
        for column in range(length, length + count):
            logits = self.logits(column, 1)
            law = self.law(self.text[None, :column].to(self.home), logits.to(self.home))[0].to(self.device)
            tokens.append(self.draw(law))
            self.text[column] = tokens[-1]
            chances.append(float(law[tokens[-1]]))
            laws.append(law)
        return tokens, chances, laws, (time.perf_counter() - begin) / max(count, 1)


class Target(Side):
    """The target: gives its laws at several places of the text from one forward, and owns all that is decided."""

    def score(self, length: int, places: int) -> float:
        """Run the model over the first ``length`` tokens for the last ``places``; gives the seconds."""
        begin = time.perf_counter()
        self.first = length - places + 1
        self.scores = self.logits(length, places)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter() - begin

    def law_at(self, place: int) -> Tensor:
        """The law behind all but the last ``places - 1 - place`` tokens that were scored, (V,)."""
        return self.law(self.text[None, : self.first + place], self.scores[place : place + 1])[0]

    def uniforms(self, count: int) -> list[float]:
        """Fresh draws from [0, 1)."""
        return torch.rand(count, dtype=torch.float64, generator=self.generator, device=self.device).tolist()

    def residual(self, p: Tensor, q: Tensor) -> int:
        """A token of norm((p - q)_+), or of p where rounding leaves nothing of it."""
        left = (p - q).clamp_min(0)
        return self.draw(left if float(left.sum()) > 0 else p)
