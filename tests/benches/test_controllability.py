"""The controllability bench on a tiny model: figures, equal budgets, what contenders share, refusals, exhibits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from steersman import catalog
from steersman.benches.controllability import ControllabilityBench, load, passes, words_of
from steersman.engine.compare import compare
from steersman.engine.comparison import Comparison
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.language.magic_word import System
from steersman.report.blocks import Curves, Note, SideBySide, TableBlock
from steersman.report.html import render

from .test_decoding import make

TEXT = "the list is a value of the name and a file that the call returns is the value of the list, " * 40
SMALL = {
    "states": 3,
    "shortest": 3,
    "longest": 6,
    "k": 3,
    "iterations": 2,
    "candidates": 16,
    "k_sub": 8,
    "alphabet": 40,
}
SEARCHES = ["magic-word", "magic-word:success=argmin:accept=always", "greedy", "gcg", "random"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def all_of_them(folder: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    grid = SMALL | {"input": text, "k": 4}
    return compare("controllability", str(folder), SEARCHES, grid, seeds=2, out=tmp_path_factory.mktemp("run") / "a")


def test_every_search_runs_within_the_same_budget(all_of_them: Comparison, folder: Path) -> None:
    assert [row.error for row in all_of_them.rows if row.status != "ok"] == []
    system = System(load(str(folder)).model, alphabet=40)
    row = all_of_them.rows[0]
    budget = passes(system, row.setting)
    assert budget == 1 + 3 * 40 + 1 + 2 * (16 + 3)  # k = 1, 2, 3 by scans, k = 4 by GCG
    for row in all_of_them.rows:
        assert {n: len(v) for n, v in row.per_item.items() if "_" not in n} == dict.fromkeys(
            ("reached", "loss", "passes", "length"), 9
        )
        assert max(row.per_item["passes"]) <= budget
        stopped = [p for p, r in zip(row.per_item["passes"], row.per_item["reached"], strict=True) if not r]
        assert min(stopped, default=budget) >= budget - 45  # the next step did not fit
        assert row.figures["reached"] == pytest.approx(np.mean(row.per_item["reached"]))
        by_kind = [row.figures[f"reached_{kind}"] for kind in ("true_next", "top_75", "uniform")]
        assert row.figures["reached"] == pytest.approx(np.mean(by_kind))
        if row.figures["reached"]:
            assert row.figures["verified"] == 1.0


def test_contenders_share_pairs_and_seeds_differ(all_of_them: Comparison) -> None:
    pairs = {
        (label, seed): [
            (tuple(w["x0"]), tuple(w["y"]), w["kind"])
            for w in json.loads((row.items_dir(all_of_them.out) / "words.json").read_text())  # type: ignore[operator]
        ]
        for label in SEARCHES
        for row in all_of_them.select(label)
        for seed in [row.seed]
    }
    for seed in (0, 1):
        assert all(pairs[label, seed] == pairs["greedy", seed] for label in SEARCHES)
    assert pairs["greedy", 0] != pairs["greedy", 1]


def test_greedy_and_back_off_agree_on_short_prompts(all_of_them: Comparison) -> None:
    """Up to three tokens they are the same search."""
    for ours, theirs in zip(words_of(all_of_them, "magic-word", {}), words_of(all_of_them, "greedy", {}), strict=True):
        if min(ours.k or 9, theirs.k or 9) <= 3:
            assert (ours.k, ours.prompt) == (theirs.k, theirs.prompt)


def test_reported_words_are_reached(all_of_them: Comparison, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    reached = [word for label in SEARCHES for word in words_of(all_of_them, label, {}) if word.reached]
    assert any(word.k for word in reached)
    with torch.no_grad():
        for word in reached:
            assert int(model(torch.tensor([word.input_ids])).logits[0, -1].argmax()) == word.y[0]


def test_exhibits(all_of_them: Comparison) -> None:
    blocks = all_of_them.bench.exhibits(all_of_them)
    assert isinstance(blocks[0], Note) and "adversarial" in blocks[0].text
    curves = [b for b in blocks if isinstance(b, Curves)]
    assert len(curves) == 3 and all(set(c.lines) == set(SEARCHES) for c in curves)
    for line in (line for c in curves for line in c.lines.values()):
        assert list(line.x) == [0, 1, 2, 3, 4] and line.low is not None and line.high is not None
        assert all(lo <= y <= hi for lo, y, hi in zip(line.low, line.y, line.high, strict=True))
    assert [len(b.rows) for b in blocks if isinstance(b, TableBlock)] == [15]
    (shown,) = [b for b in blocks if isinstance(b, SideBySide)]
    spans = [span for item in shown.items for text in item.texts.values() for span in text.spans]
    assert spans and all("adversarial" in span.note for span in spans)
    assert "adversarial" in render(all_of_them, blocks)


def test_a_user_s_pairs_of_several_tokens(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"x0": "the list", "y": " of the"}\n{"x0": "a file", "y": " call"}\n')
    grid = SMALL | {"input": str(tmp_path / "pairs.jsonl"), "passes": 90, "multi_token": True}
    found = compare("controllability", str(folder), ["magic-word", "random"], grid, seeds=1)
    assert [row.error for row in found.rows if row.status != "ok"] == []
    assert all(max(row.per_item["passes"]) <= 90 and len(row.per_item["loss"]) == 2 for row in found.rows)
    with pytest.raises(InputError, match="multi_token=True"):
        compare("controllability", str(folder), ["random"], grid | {"multi_token": False}, seeds=1)


@pytest.mark.parametrize(
    ("contenders", "grid", "sentence"),
    [
        (["random"], {"input": None}, "the subject is no reference model"),
        (["random"], {"kinds": "top-9"}, "one of true-next, top-75, uniform"),
        (["random"], {"longest": 2}, "at least shortest=3"),
        (["random"], {"longest": 200}, "at most"),
        (["random"], {"states": 5000}, "at most"),
        (["random+gcg"], {}, "one or the other"),
        (["magic-word:lengths=[4,9]"], {}, "at most k=3"),
        (["magic-word:size=3"], {}, "knob of magic-word"),
        (["momentum-decoding"], {}, "a method of the bench controllability"),
    ],
)
def test_refusals(folder: Path, text: str, contenders: list[str], grid: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        compare("controllability", str(folder), contenders, SMALL | {"input": text} | grid, seeds=1)
    assert sentence in str(refused.value)


def test_reference_models_bring_held_out_text() -> None:
    bench = ControllabilityBench()
    subject = bench.subject("docs/tiny")
    setting = {
        name: knob.default[0] if isinstance(knob.default, tuple) else knob.default for name, knob in bench.knobs.items()
    }
    host = bench.host(subject, setting | {"states": 2, "longest": 12}, Streams(0))
    assert len(host.grouped) == 2 and all(len(answers) == 3 for _, answers in host.grouped)
    assert "controllability" in catalog.benches()
