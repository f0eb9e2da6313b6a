"""Random streams key on (seed, purpose, item) and on nothing else."""

from __future__ import annotations

import pytest
import torch

from steersman.engine.streams import Streams
from steersman.errors import InputError


def test_streams_repeat_and_differ():
    first, again = Streams(3), Streams(3)
    assert torch.equal(torch.randn(5, generator=first.torch("noise")), torch.randn(5, generator=again.torch("noise")))
    draws = {Streams(s).seed(p, i) for s in (0, 1, 31) for p in ("noise", "tune", "1") for i in (0, 1, "1x")}
    assert len(draws) == 27


def test_a_seed_does_not_change_with_the_platform():
    assert Streams(0).seed("noise") == Streams(0).seed("noise", 0) == 2380761526797966722


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1"])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(InputError, match="seed"):
        Streams(seed)
