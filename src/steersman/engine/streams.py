"""Random streams keyed on (seed, purpose, item), never on the contender.

Contenders of one comparison therefore share noise, prompts and batches: differences between them are
paired. Purposes are independent of each other, so that tuning ("tune") never sees the trials' draws.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from steersman.errors import InputError

if TYPE_CHECKING:
    import torch


class Streams:
    """All the randomness of one seed.

    Args:
        seed: a whole number from 0 to 2**63 - 1.

    Raises:
        InputError: ``seed`` is out of range.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InputError("seed", seed, "a whole number from 0 to 2**63 - 1")
        self.base = seed

    def seed(self, purpose: str, item: int | str = 0) -> int:
        """A 63-bit seed for ``purpose`` and ``item``."""
        text = f"{self.base}\x1f{purpose}\x1f{item}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    def numpy(self, purpose: str, item: int | str = 0) -> np.random.Generator:
        """A NumPy generator for ``purpose`` and ``item``."""
        return np.random.default_rng(self.seed(purpose, item))

    def torch(self, purpose: str, item: int | str = 0, device: str = "cpu") -> torch.Generator:
        """A torch generator on ``device`` for ``purpose`` and ``item``."""
        import torch

        return torch.Generator(device=device).manual_seed(self.seed(purpose, item))
