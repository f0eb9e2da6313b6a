"""The evidence of magic words: its claims' effects on rows that are known, and the bench of bounds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steersman import catalog
from steersman.engine.claims import judge
from steersman.engine.compare import compare
from steersman.evidence import magic_word as evidence
from steersman.language.magic_word import MagicWord


class Rows:
    """Rows of ``magic-word`` and its rivals with given words."""

    def __init__(self, out: Path, words: dict[str, list[MagicWord]]) -> None:
        self.out, self.words = out, words
        self.rows = [
            SimpleNamespace(setting={"k": 6}, items_dir=lambda out, label=label: out / label) for label in words
        ]
        for label, found in words.items():
            (out / label).mkdir()
            (out / label / "words.json").write_text(json.dumps([w.to_json() for w in found]))

    def select(self, contender: str, **setting: Any) -> list[Any]:
        return [row for row, label in zip(self.rows, self.words, strict=True) if label == contender]


def word(x0: int, kind: str, k: int | None, loss: float = 1.0, rank: int = 0) -> MagicWord:
    return MagicWord((x0,), (2,), (3,), k, (3, x0), "", True, loss, rank, 1, kind)


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    ours = [
        word(1, "true-next", 1),
        word(1, "top-75", None, 2.0, 3),
        word(2, "true-next", 2),
        word(2, "top-75", 1, 1.0, 0),
    ]
    rival = [
        word(1, "true-next", None, 5.0),
        word(1, "top-75", None, 2.5),
        word(2, "true-next", 0),
        word(2, "top-75", 1),
    ]
    return Rows(tmp_path, {"magic-word": ours, "random": rival})


def test_effects(rows: Any) -> None:
    paired = evidence.reached_more("random")(rows)
    assert paired.kind == "difference" and paired.values.tolist() == [1, 0, 0, 0]
    assert paired.clusters.tolist() == [0, 0, 1, 1]  # two targets of each state are one unit
    lower = evidence.lower_loss("random")(rows)
    assert lower.values.tolist() == [0.5] and lower.clusters.tolist() == [0]  # the one pair that neither reached
    states = evidence.kind_over("true-next", "top-75")(rows)
    assert states.values.tolist() == [1, 1] and states.reference.tolist() == [0, 1]
    # Lengths 7 and 1, ranks 3 and 0: a correlation of 1.
    assert np.mean(0.3 - evidence.unrelated_to_rank("top-75", 0.3)(rows).values) == pytest.approx(1.0)
    with pytest.raises(LookupError):
        evidence.unrelated_to_rank("uniform", 0.3)(rows)
    with pytest.raises(LookupError):
        evidence.kind_over("top-75", "uniform")(rows)


def test_the_bench_of_bounds_and_its_claims() -> None:
    grid = {"heads": ("random", "model"), "k": (1, 8), "count": 60, "steps": 20}
    found = compare(evidence.HeadBench(), "docs/tiny", ["corrected", "printed"], grid, seeds=5)
    assert not found.failed, [row.error for row in found.failed]
    for row in found.select("corrected"):
        assert row.figures["ratio"] <= 1 + 1e-9 and row.figures["violated"] == 0
        assert 0 < row.figures["mean_ratio"] <= row.figures["ratio"] and 0 < row.figures["beta"] <= 1
    claims = [claim for claim in evidence.CLAIMS if claim.study == "bound"]
    assert [v.verdict for v in judge(claims, {"bound": found}, "quick")] == ["holds"] * 3
    assert found.bench.exhibits(found)


def test_studies_run_benches_that_are_there() -> None:
    for scale in ("quick", "full", "gpu"):
        for study in evidence.studies(scale, 0).values():
            knobs = (catalog.bench(study.bench) if isinstance(study.bench, str) else study.bench).knobs
            assert set(study.grid) <= set(knobs) and study.seeds >= 5
    assert {claim.study for claim in evidence.CLAIMS} <= set(evidence.studies("quick", 0))
