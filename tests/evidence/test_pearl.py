"""What PEARL's claims are judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steersman.benches._schedule import Schedule
from steersman.engine.bench import Row
from steersman.engine.comparison import Comparison
from steersman.errors import TrialError
from steersman.evidence import pearl


def comparison(values: dict[str, list[float]], figures: dict[str, float] | None = None, seed: int = 0) -> Comparison:
    """One row a contender, with a time for each prompt."""
    rows = [
        Row(
            key=label,
            bench="speculation",
            contender=label,
            parts=[],
            setting=dict(pearl.JUDGED),
            seed=seed,
            status="ok",
            figures=figures or {"equal_text": 1.0},
            timing={},
            per_item={pearl.SIMULATED: times},
        )
        for label, times in values.items()
    ]
    config = {"bench": "speculation", "contenders": list(values), "grid": {}}
    return Comparison(Schedule(), rows, config, Path())


def test_a_prompt_is_judged_at_the_length_that_was_best_on_the_others() -> None:
    found = comparison({"a": [1.0, 9.0, 9.0, 2.0], "b": [5.0, 5.0, 5.0, 5.0]})
    # Without the first prompt b is better on the mean, and without the second a is.
    assert pearl.own_best(found, pearl.SIMULATED, ("a", "b")).tolist() == [5.0, 9.0, 9.0, 5.0]
    effects = pearl.times_faster(("b",), ("a",))(found)
    assert np.allclose(effects.values, [0.2, 1.8, 1.8, 0.4])


def test_a_lacking_or_lossy_contender_is_no_equal_text() -> None:
    assert pearl.equal_texts(comparison({"pearl": [1.0]})).values.tolist() == [0.0]
    assert pearl.equal_texts(comparison({"pearl": [1.0]}, {"equal_text": 0.75})).values.tolist() == [-0.25]
    with pytest.raises(TrialError, match="no texts of pearl"):
        pearl.equal_texts(comparison({"pearl": [1.0]}, {"gamma": 2.0}))


@pytest.mark.parametrize("scale", ["quick", "full", "gpu"])
def test_every_claim_has_its_study_and_its_contenders(scale: str) -> None:
    studies = pearl.studies(scale, 0)
    assert {claim.study for claim in pearl.CLAIMS} <= studies.keys()
    wanted: Any = {*pearl.FULL, *pearl.SD, *pearl.NO_PRE, *pearl.NO_POST, *pearl.ASSISTED, pearl.LONGER, pearl.AUTO}
    assert wanted | {pearl.ALONE} == set(studies["devices"].contenders)
    assert {pearl.RANKS, *pearl.SD_HERE} <= set(studies["a thread each"].contenders)
