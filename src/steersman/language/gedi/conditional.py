"""What a guide does besides guiding: it writes by itself, and it ranks finished texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.language.gedi.codes import ControlCodes
from steersman.language.texts import opening_of
from steersman.language.vocabularies import same_vocabulary


@dataclass(frozen=True)
class ClassConditional:
    """Plain class-conditional sampling: the guide writes instead of the base model, behind its control code. ::

        cclm = ClassConditional.from_pretrained("my-guide", attribute="sentiment=positive")
        ids = torch.tensor([[*cclm.opening, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        cclm.writer.generate(ids, do_sample=True)

    Args:
        writer: the class-conditional language model.
        opening: code, keyword, and what the tokenizer puts in front of a text.
    """

    writer: Any
    opening: tuple[int, ...]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, attribute: str | None = None, tokenizer: Any = None
    ) -> ClassConditional:
        """Args as those of :meth:`GeDi.from_pretrained`."""
        codes = ControlCodes.load(folder)
        guide, own = codes.guide(folder)
        if tokenizer is not None:
            same_vocabulary(tokenizer, own, "guide", str(folder))
        wanted, _, _ = codes.contrast(attribute, None, own)
        return cls(guide, (*wanted, *opening_of(own)))


class PosteriorScorer:
    """P(c | text) of finished texts, by the guide.

    Args:
        steer: a :class:`GeDi`.
        tokenizer: of the guide.
    """

    def __init__(self, steer: Any, tokenizer: Any) -> None:
        self.steer, self.tokenizer = steer, tokenizer
        self.tokens = 0
        """Tokens that passed through the guide so far."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The posterior of each text, (B,)."""
        rows = [list(self.tokenizer(text, verbose=False)["input_ids"]) for text in texts]
        found = np.zeros(len(rows))
        for length in {len(row) for row in rows}:
            same = [i for i, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[i] for i in same], dtype=torch.long).view(len(same), length)
            found[same] = self.steer.posterior(ids).double().cpu().numpy()
            self.tokens += sum(length + len(code) for code in self.steer.codes) * len(same)
        return found


@dataclass(frozen=True)
class BestOf:
    """Best-of-n: of n texts that the base model samples, the one that the guide takes to be most of the wanted class.

    Args:
        n: texts to choose from.
        score: texts to numbers from 0 to 1.
    """

    n: int
    score: PosteriorScorer
