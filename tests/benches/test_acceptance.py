"""The bench of acceptance: bounds above verifiers, the same contexts for all, refusals, exhibits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steersman.engine.artefacts import run_verb
from steersman.engine.compare import compare
from steersman.errors import InputError
from steersman.report.blocks import Note, TableBlock

VERIFIERS = ["single", "rrs", "k-seq", "rrsw", "spechub", "multi-draft"]
SMALL = {"count": 2, "contexts": 6, "prompt_tokens": 8}


@pytest.fixture(scope="module")
def small():
    grid = {**SMALL, "temperature": [0.0, 1.0], "n_drafts": [2, 3]}
    comparison = compare("acceptance", "docs/small", [*VERIFIERS, "multi-draft:verifier=rrsw"], grid, seeds=2)
    assert not comparison.failed, [row.error for row in comparison.failed]
    return comparison


def test_no_verifier_keeps_more_than_its_bound(small):
    assert len(small.select()) == 2 * 2 * 2 * 7 - 4
    for row in small.select():
        items = {name: np.array(values) for name, values in row.per_item.items()}
        assert len(items["gap"]) == 6 and items["gap"].min() >= -1e-9 and items["shortfall"].min() >= -1e-9
        assert (items["bound_without"] >= items["bound_with"] - 1e-9).all()
        assert row.figures["acceptance"] == pytest.approx(items["acceptance"].mean())


def test_greedy_verification_reaches_its_bound_and_spechub_is_as_good(small):
    for row in small.select("multi-draft"):
        assert row.figures["gap"] == pytest.approx(0, abs=1e-9)
        assert row.figures["acceptance"] == pytest.approx(row.figures["bound_greedy"])
    for temperature in (0.0, 1.0):
        ours, theirs = small.paired("acceptance", "multi-draft", "spechub", n_drafts=2, temperature=temperature)
        assert np.allclose(ours, theirs, atol=1e-9)
    rows = small.select("spechub", status=None, n_drafts=3)
    assert {row.status for row in rows} == {"inapplicable"} and "two drafts" in (rows[0].error or "")


def test_contenders_of_a_seed_share_their_contexts(small):
    for setting in small.settings:
        bounds = {(row.seed, tuple(row.per_item["bound_without"])) for row in small.select(**setting)}
        assert len(bounds) == 2
        same, named = small.paired_items("acceptance", "rrsw", "multi-draft:verifier=rrsw", **setting)[:2]
        assert np.array_equal(same, named)


def test_at_temperature_0_further_drafts_without_choice_are_worth_nothing(small):
    """Drafts of a one-token law are all the same, and the greedy sampler takes the next tokens in order."""
    for row in small.select("rrsw", temperature=0.0):
        assert set(np.round(row.per_item["acceptance"], 9)) <= {0.0, 1.0}
        assert row.figures["bound_with"] == pytest.approx(row.figures["bound_without"])
    for n in (2, 3):
        alone, greedy = small.paired("acceptance", "single", "multi-draft", temperature=0.0, n_drafts=n)
        assert (greedy >= alone).all()


def test_exhibits(small):
    blocks = small.bench.exhibits(small)
    tables = [block for block in blocks if isinstance(block, TableBlock)]
    assert [table.setting for table in tables] == [{"temperature": 0.0}, {"temperature": 1.0}]
    assert [row[0] for row in tables[0].rows][-3:] == [f"bound of drafts: {s}" for s in ("with", "without", "greedy")]
    assert isinstance(blocks[-1], Note)


def test_prompts_of_the_user(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The list is"}\n{"prompt": "Return the first"}\n')
    grid = SMALL | {"prompts": str(file), "temperature": 1.0, "n_drafts": 2}
    found = compare("acceptance", "docs/small", ["single"], grid, seeds=1)
    assert 0 < found.select()[0].figures["acceptance"] <= 1


@pytest.mark.parametrize(
    ("contenders", "grid", "sentence"),
    [
        (["momentum-decoding"], {}, "a method of the bench acceptance"),
        (["single+rrs"], {}, "one verifier"),
        (["multi-draft:verifier=rrz"], {}, "did you mean 'rrs'"),
        (["single"], {"temperature": 0.001}, r"0 \(greedy\)"),
        (["single"], {"draft": "reviews/base"}, "same vocabulary"),
        (["single"], {"n_drafts": 65}, "n_drafts=65"),
    ],
)
def test_bad_input(contenders, grid, sentence):
    with pytest.raises(InputError, match=sentence):
        compare("acceptance", "docs/small", contenders, SMALL | grid, seeds=1)


def test_a_linear_program_takes_few_tokens_only():
    found = compare("acceptance", "docs/small", ["ot-lp"], SMALL | {"temperature": 1.0, "n_drafts": 2}, seeds=1)
    assert found.rows[0].status == "ok" or "at most 10 tokens" in (found.rows[0].error or "")


def test_the_probe_takes_reference_models_by_name(tmp_path: Path):
    settings = {"draft": "docs/tiny", "places": "8", "temperatures": "1.0", "n_drafts": "2"}
    record = run_verb("probe", "multi-draft", "docs/small", tmp_path / "out", settings=settings)
    assert record["metrics"]["greedy"] == pytest.approx(record["metrics"]["bound_greedy"])
    assert record["settings"]["places"] == 8 and (tmp_path / "out" / "acceptance.csv").is_file()
