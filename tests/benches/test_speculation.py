"""The speculation bench on a tiny pair of models with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from steersman import catalog
from steersman.benches import _pearl_ranks, _speculation_exhibits, _speculation_pair, speculation
from steersman.benches._language import load
from steersman.benches.speculation import PARTS, SpeculationBench, latencies
from steersman.engine.bench import PartInfo, Row
from steersman.engine.compare import compare
from steersman.engine.comparison import Comparison
from steersman.errors import InputError
from steersman.language.multi_draft import acceptance, optimal_acceptance
from steersman.report.blocks import Curves, Note, TableBlock
from steersman.report.html import render
from tests.benches.test_decoding import PROMPTS, make

NEW = 12
ALL = [
    "autoregressive",
    "assisted",
    "assisted:schedule=heuristic:num_assistant_tokens=3:confidence=0",
    "multi-draft:n_drafts=1:depth=3",
    "multi-draft:n_drafts=3:depth=2",
    "multi-draft:n_drafts=3:depth=3",
    "multi-draft:n_drafts=2:depth=2:verifier=rrsw",
    "pearl:gamma=2",
    "pearl",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a draft with the same words: its first layer."""
    target = make(tmp_path_factory.mktemp("target"))
    draft = make(tmp_path_factory.mktemp("draft"), num_hidden_layers=1)
    return target, draft


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)


def run(
    pair: tuple[Path, Path], prompts: str, methods: list[str], out: Path | None = None, seeds: int = 1, **grid: Any
) -> Comparison:
    basic = {"new_tokens": NEW, "prompts": prompts, "draft": str(pair[1]), "threads": 2, "count": 2, "contexts": 8}
    return compare("speculation", str(pair[0]), methods, {**basic, "temperature": 0, **grid}, seeds=seeds, out=out)


@pytest.fixture(scope="module")
def everything(pair: tuple[Path, Path], prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return run(pair, prompts, ALL, tmp_path_factory.mktemp("runs") / "a", temperature=[0, 0.7])


def items(comparison: Comparison, row: Row, name: str) -> list[dict[str, Any]]:
    folder = row.items_dir(comparison.out)
    assert folder is not None
    return json.loads((folder / f"{name}.json").read_text())


# ------------------------------------------------------------------ figures


def test_every_contender_runs_and_greedy_text_is_plain_generations(everything: Comparison, pair: Any) -> None:
    assert [(r.contender, r.error) for r in everything.rows if r.status != "ok"] == []
    s = load(str(pair[0]))
    s.model.generation_config = GenerationConfig()
    for row in everything.rows:
        assert all(math.isfinite(value) for value in row.figures.values()), row.contender
        records = items(everything, row, "texts")
        assert [len(record["ids"]) for record in records] == [NEW] * 2
        assert [sum(record["rounds"]) for record in records] == [NEW] * 2
        if row.setting["temperature"] > 0:
            assert "equal_text" not in row.figures
            continue
        assert row.figures["equal_text"] == 1
        for record in records:
            inputs = s.tokenizer(record["prompt"], return_tensors="pt", return_token_type_ids=False)
            options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": 2, "pad_token_id": 0}
            out = s.model.generate(**inputs, do_sample=False, **options)
            assert out[0, inputs["input_ids"].shape[1] :].tolist() == record["ids"]


def test_equal_text_sees_another_text(pair: Any, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that writes something else is caught."""

    class Other:
        def __call__(self, model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            model(input_ids)
            new = torch.full((1, kwargs["generation_config"].max_new_tokens), 7)
            return torch.cat([input_ids, new], 1)

    monkeypatch.setitem(PARTS, "other", PartInfo(Other, "Writes sevens."))
    (row,) = run(pair, prompts, ["other"], contexts=0).rows
    assert row.figures["equal_text"] == 0


def test_calls_are_counts(everything: Comparison) -> None:
    for row in everything.rows:
        f = row.figures
        assert f["target_calls"] == pytest.approx(1 / f["tokens_per_target_call"])
        assert f["tokens_per_s"] == pytest.approx(1e3 / f["ms_per_token"])
        if row.contender == "autoregressive":
            assert (f["tokens_per_target_call"], f["tokens_per_round"], f["draft_calls"]) == (1, 1, 0)
            assert f["target_tokens"] == pytest.approx((NEW - 1) / NEW)
        elif not row.contender.startswith("pearl"):
            # A round is one forward of the target, the prompt's among them.
            assert f["tokens_per_round"] == pytest.approx(f["tokens_per_target_call"])
            assert f["draft_calls"] > 0
        assert f.get("overhead_ms", 0) <= f["ms_per_token"]
    (tree,) = everything.select("multi-draft:n_drafts=3:depth=2", temperature=0)
    (chain,) = everything.select("multi-draft:n_drafts=1:depth=3", temperature=0)
    assert tree.figures["target_tokens"] > chain.figures["target_tokens"]


def test_assisted_is_transformers_own(everything: Comparison, pair: Any) -> None:
    """Rounds are those of a user's own calls: with transformers' defaults, and with settings that a text changes."""
    s, d = load(str(pair[0])), load(str(pair[1]))
    s.model.generation_config = GenerationConfig()
    heuristic = {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 3}
    for contender, settings in (("assisted", {}), (ALL[2], {**heuristic, "assistant_confidence_threshold": 0.0})):
        (row,) = everything.select(contender, temperature=0)
        records = items(everything, row, "texts")
        d.model.generation_config = GenerationConfig(pad_token_id=0, **settings)
        # The first prompt warms up; the heuristic schedule carries the chain's length from text to text.
        for record, new in [(records[0], speculation.WARM_UP), *((record, NEW) for record in records)]:
            inputs = s.tokenizer(record["prompt"], return_tensors="pt", return_token_type_ids=False)
            options = {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": 2, "pad_token_id": 0}
            rounds = speculation.Rounds()
            s.model.generate(**inputs, do_sample=False, assistant_model=d.model, streamer=rounds, **options)
            if new == NEW:
                assert rounds.sizes == record["rounds"]


def test_contenders_share_prompts_and_draws(pair: Any, prompts: str) -> None:
    """Neither the company nor the order of contenders changes what one of them writes."""
    name = "multi-draft:n_drafts=2:depth=2"
    one = run(pair, prompts, ["autoregressive", name], seeds=2, temperature=0.9, contexts=0)
    two = run(pair, prompts, [name], seeds=2, temperature=0.9, contexts=0)
    for a, b in zip(one.select(name), two.select(name), strict=True):
        assert [r["ids"] for r in items(one, a, "texts")] == [r["ids"] for r in items(two, b, "texts")]
    first, second = ([r["ids"] for r in items(one, row, "texts")] for row in one.select(name))
    assert first != second


def test_acceptance_is_that_of_the_pairs_laws(everything: Comparison, pair: Any) -> None:
    s, d = load(str(pair[0])), load(str(pair[1]))
    for contender, n, sampler, verifier in (
        ("assisted", 1, "with", "single"),
        ("pearl", 1, "with", "single"),
        ("multi-draft:n_drafts=3:depth=2", 3, "greedy", "greedy"),
        ("multi-draft:n_drafts=2:depth=2:verifier=rrsw", 2, "without", "rrsw"),
    ):
        (row,) = everything.select(contender, temperature=0.7)
        h = SpeculationBench().host(s, {**row.setting}, speculation.Streams(0))
        h.draft = d
        laws = SpeculationBench().laws(h, speculation.Streams(0))
        assert len(laws.p) == 8 and torch.allclose(laws.p.sum(1), torch.ones(8)) and not bool(laws.p[:, 2].any())
        own = acceptance(laws.p, laws.q, n, verifier, ranking=laws.ranking).numpy()
        bound = optimal_acceptance(laws.p, laws.q, n, sampler, ranking=laws.ranking).numpy()
        assert row.per_item["acceptance"] == pytest.approx(own)
        assert row.per_item["acceptance_bound"] == pytest.approx(bound)
        assert row.figures["acceptance_gap"] == pytest.approx((bound - own).mean(), abs=1e-9)
        table = {r["verifier"]: r for r in items(everything, row, "acceptance")}
        assert table[verifier]["acceptance"] == pytest.approx(own.mean())
        assert all(r["acceptance"] <= r["bound"] + 1e-9 for r in table.values())
    assert "acceptance" not in everything.select("autoregressive")[0].figures


def test_a_draft_that_is_the_target_is_accepted_always(pair: Any, prompts: str) -> None:
    twin = (pair[0], pair[0])
    found = run(twin, prompts, ["multi-draft:n_drafts=1:depth=3", "pearl:gamma=3"], temperature=[0, 1.0])
    for row in found.rows:
        assert row.figures["acceptance"] == pytest.approx(1)
    # Three drafts and the token behind them, in every round of 12 tokens.
    for temperature in (0, 1):
        assert found.values("tokens_per_round", "multi-draft:n_drafts=1:depth=3", temperature=temperature) == {0: 4.0}


def test_laws_keep_to_the_models_positions(pair: Any) -> None:
    """Places behind a long prompt, and no more of them than a greedy text has."""
    s, d = load(str(pair[0])), load(str(pair[1]))
    prompt = [5] * 120
    found = _speculation_pair.laws(s.model, d.model, [prompt], 100, 0.0, 1.0, 2, 128, 0)
    assert len(found.p) == 8 and bool(((found.p == 0) | (found.p == 1)).all())
    assert len(_speculation_pair.laws(s.model, d.model, [prompt], 20, 1.0, 0.9, 2, 128, 0).p) == 20


# ------------------------------------------------------------------ threads and simulated times


def test_threads_are_the_same_in_total(pair: Any, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, int] = {}

    def loop(models: int) -> Callable[[], Any]:
        class Loop:
            models_at_once = models

            def __call__(self, model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                model(input_ids)
                seen[models] = torch.get_num_threads()
                return torch.cat([input_ids, torch.full((1, kwargs["generation_config"].max_new_tokens), 7)], 1)

        return Loop

    monkeypatch.setitem(PARTS, "one", PartInfo(loop(1), "One model at a time."))
    monkeypatch.setitem(PARTS, "two", PartInfo(loop(2), "Both at once."))
    before = torch.get_num_threads()
    run(pair, prompts, ["one", "two"], threads=4, contexts=0)
    assert seen == {1: 4, 2: 2} and torch.get_num_threads() == before
    (row,) = run(pair, prompts, ["two"], threads=1, contexts=0).rows
    assert row.status == "inapplicable" and "2 models at once need 2 threads" in row.error and seen[2] == 2
    (row,) = run(pair, prompts, ["pearl:engine=distributed"], threads=1, contexts=0).rows
    assert row.status == "inapplicable" and "2 models at once need 2 threads" in row.error
    run(pair, prompts, ["two"], threads=1, contexts=0, latency="1:1")  # devices that don't compute
    assert seen.pop(2) == 1
    grid = {"prompts": prompts, "draft": str(pair[1]), "new_tokens": NEW, "threads": 1, "contexts": 0, "temperature": 0}
    (row,) = compare(SpeculationBench(thread_each=True), str(pair[0]), ["two"], grid, seeds=1).rows
    assert row.status == "ok" and seen[2] == 1
    assert catalog.card("pearl").load()(object()).models_at_once == 2


def test_simulated_times(pair: Any, prompts: str) -> None:
    methods = ["autoregressive", "multi-draft:n_drafts=2:depth=2", "pearl:gamma=2"]
    found = run(pair, prompts, methods, latency="10:20", count=1, new_tokens=6, threads=1)
    assert found.bench.headline == ("simulated_tokens_per_s", "target_calls")
    for row in found.rows:
        f = row.figures
        assert "tokens_per_s" not in f and "ms_per_token" not in f and 0 <= f["late"] <= 1
        assert f["simulated_ms_per_token"] >= 20 * f["target_calls"]
    tree = found.select(methods[1])[0].figures
    assert tree["simulated_ms_per_token"] >= 20 * tree["target_calls"] + 10 * tree["draft_calls"]
    plain = found.select(methods[0])[0].figures  # on a busy machine forwards are late
    assert plain["late"] > 0 or plain["simulated_ms_per_token"] < 100
    blocks = SpeculationBench().exhibits(found)
    assert isinstance(blocks[0], Note) and blocks[0].level == "warning" and "simulated" in blocks[0].text
    table = next(block for block in blocks if isinstance(block, TableBlock) and block.title == "Recommendation")
    assert table.columns[3] == "simulated tokens/s"
    note = next(block for block in blocks if isinstance(block, Note) and block.title == "Recommendation")
    assert "simulated ms a token" in note.text
    # Simulated devices are two: PEARL is planned for.
    plans = items(found, found.select(methods[1])[0], "plans")
    assert {plan["method"] for plan in plans} == {"autoregressive", "multi-draft", "pearl"}


def test_pearl_on_ranks(pair: Any, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes get the same prompts, seeds and law, and half of the threads each."""
    asked: dict[str, Any] = {}

    def write(*args: Any, progress: Any) -> list[dict[str, Any]]:
        names = ("target", "draft", "prompts", "seeds", "new", "temperature", "top_p", "threads", "latency", "knobs")
        asked.update(zip(names, args, strict=True))
        text = {"ids": [3] * NEW, "seconds": 1.0, "target": [4, 2], "draft": [1], "rounds": [6, 6], "gammas": [2, 2]}
        return [{**text, "calls": 10, "late": 1} for _ in asked["prompts"]]

    monkeypatch.setattr(_pearl_ranks, "write", write)
    contender = "pearl:gamma=2:engine=distributed"
    found = run(pair, prompts, [contender], temperature=0.5, latency="5:10", threads=2, contexts=0)
    (row,) = found.rows
    assert row.status == "ok", row.error
    assert (asked["target"], asked["draft"]) == (str(pair[0]), str(pair[1]))
    assert (asked["threads"], asked["latency"], asked["knobs"]) == (1, (0.005, 0.01), {"gamma": 2})
    assert (asked["temperature"], asked["new"]) == (0.5, NEW)
    assert len(asked["prompts"]) == len(set(asked["seeds"])) == 2
    assert row.figures["late"] == pytest.approx(0.1) and row.figures["gamma"] == 2
    assert row.figures["tokens_per_target_call"] == NEW / 2 and row.figures["simulated_tokens_per_s"] == NEW


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("methods", "grid", "sentence"),
    [
        (["autoregressive"], {"draft": "no-such-draft"}, "no-such-draft"),
        (["autoregressive"], {"draft": "digits"}, "draft='digits'"),
        (["autoregressive"], {"draft": "docs/tiny"}, "draft='docs/tiny'.*same vocabulary.*at id"),
        (["autoregressive"], {"new_tokens": 500}, "new_tokens=500.*behind a prompt"),
        (["autoregressive"], {"temperature": 0.001}, "temperature=0.001.*greedy"),
        (["autoregressive"], {"temperature": -1}, "temperature=-1"),
        (["autoregressive"], {"latency": "5"}, "latency='5'.*DRAFT:TARGET"),
        (["autoregressive"], {"latency": "5:-1"}, "latency='5:-1'"),
        (["autoregressive"], {"latency": "5:nan"}, "latency='5:nan'"),
        (["autoregressive"], {"threads": 0}, "threads=0"),
        (["assisted:schedule=rising"], {}, "schedule='rising'.*heuristic"),
        (["assisted:num_assistant_tokens=0"], {}, "num_assistant_tokens=0"),
        (["assisted:confidence=2"], {}, "confidence=2"),
        (["assisted:depth=3"], {}, "knob of assisted='depth'"),
        (["multi-draft:n_drafts=0"], {}, "n_drafts=0"),
        (["multi-draft:depth=0"], {}, "depth=0"),
        (["multi-draft:verifier=best"], {}, "best"),
        (["multi-draft:n_drafts=3:verifier=spechub"], {}, "2 for SpecHub"),
        (["pearl:gamma=0"], {}, "gamma=0"),
        (["pearl+multi-draft"], {}, "both are the decoding loop"),
        (["pearls"], {}, "did you mean 'pearl'"),
    ],
)
def test_bad_input(pair: Any, prompts: str, methods: list[str], grid: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        run(pair, prompts, methods, **grid)


def test_a_long_prompt_of_a_later_seed_fails_its_row(everything: Comparison, pair: Any) -> None:
    """What the first look at the prompts did not see is refused in the trial, with the same sentence."""
    bench, setting = SpeculationBench(), everything.rows[0].setting
    h = bench.host(load(str(pair[0])), setting, speculation.Streams(0))
    h.prompts = [speculation.Prompt((5,) * 125)]
    with pytest.raises(InputError, match=r"new_tokens=12.*at most 3 behind a prompt of 125 tokens"):
        bench.trial(h, setting, speculation.Streams(0), None)


def test_a_users_subject_needs_a_draft(pair: Any, prompts: str) -> None:
    with pytest.raises(InputError, match=r"draft=None.*smaller model with the subject's vocabulary"):
        compare("speculation", str(pair[0]), ["autoregressive"], {"prompts": prompts}, seeds=1)


def test_windows_are_refused(pair: Any, prompts: str, tmp_path: Path) -> None:
    """A model whose cache forgets can't be cut back to where a draft was refused."""
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MistralForCausalLM(MistralConfig(**config, num_key_value_heads=2, vocab_size=300, sliding_window=8))
    tokenizer = load(str(pair[0])).tokenizer
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"draft_model='MistralForCausalLM'.*whole text"):
        run((pair[0], tmp_path), prompts, ["autoregressive"])


def test_one_model_can_not_draft_for_itself(pair: Any, prompts: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"from steersman.benches._language import load\ns = load({str(pair[0])!r})\n"
        "def lm():\n    return s.model, s.tokenizer\n"
    )
    spec = f"{file}:lm"
    grid = {"prompts": prompts, "draft": spec, "temperature": 0}
    with pytest.raises(InputError, match=r"draft=.*a model of its own"):
        compare("speculation", spec, ["autoregressive"], grid, seeds=1)


def test_finished_rows_are_kept(pair: Any, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that breaks fails its rows, with a sentence; the others stay, and a resumed run goes on from them."""

    class Short:
        broken = True

        def __call__(self, model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            model(input_ids)
            new = kwargs["generation_config"].max_new_tokens - Short.broken
            return torch.cat([input_ids, torch.full((1, new), 7)], 1)

    monkeypatch.setitem(PARTS, "short", PartInfo(Short, "Stops early."))
    grid = {"prompts": prompts, "draft": str(pair[1]), "new_tokens": 5, "temperature": 0, "threads": 1, "contexts": 0}
    methods = ["autoregressive", "short"]
    found = compare("speculation", str(pair[0]), methods, grid, seeds=1, out=tmp_path / "run")
    assert [r.status for r in found.rows] == ["ok", "failed"]
    assert found.rows[1].error == "TrialError: a text has 4 tokens where 5 were asked for"
    Short.broken = False
    again = compare("speculation", str(pair[0]), methods, grid, seeds=1, out=tmp_path / "run", resume=True)
    assert [r.status for r in again.rows] == ["ok", "ok"]
    assert again.rows[0].timing == found.rows[0].timing


def test_latencies() -> None:
    assert latencies(None) is None and latencies("none") is None
    assert latencies("5:20.5") == (0.005, 0.0205)


# ------------------------------------------------------------------ report


def test_exhibits(everything: Comparison) -> None:
    blocks = SpeculationBench().exhibits(everything)
    titles = [block.title for block in blocks]
    assert titles.count("Yield against depth") == titles.count("Accepted runs") == 2
    (depth,) = [b for b in blocks if isinstance(b, Curves) and b.title == "Yield against depth"][:1]
    line = depth.lines["n = 3, greedy"]
    names = [f"multi-draft:n_drafts=3:depth={depth}" for depth in (2, 3)]
    expected = [everything.values("tokens_per_target_call", name, temperature=0)[0] for name in names]
    assert line.x == [2, 3] and line.y == pytest.approx(expected)
    runs = next(b for b in blocks if isinstance(b, Curves) and b.title == "Accepted runs")
    assert "autoregressive" not in runs.lines and set(ALL[1:]) == set(runs.lines)
    for curve in runs.lines.values():
        assert sum(curve.y) == pytest.approx(1)
    bounds = [b for b in blocks if isinstance(b, TableBlock) and b.title.startswith("Acceptance")]
    assert [b.setting["temperature"] for b in bounds] == [0, 0.7]
    for n, _, verifier, bound, own, gap in bounds[1].rows:
        assert gap == pytest.approx(bound - own, abs=1e-9) and (verifier != "greedy" or gap < 1e-9) and n in (1, 2, 3)
    assert {row[0] for row in bounds[1].rows} == {1, 2, 3}


def test_recommendation_is_the_fastest_as_a_code_line(everything: Comparison) -> None:
    blocks = SpeculationBench().exhibits(everything)
    table = next(b for b in blocks if isinstance(b, TableBlock) and b.title == "Recommendation")
    notes = [b for b in blocks if isinstance(b, Note) and b.title == "Recommendation"]
    assert blocks[-1] is notes[-1] and len(table.rows) == len(notes) == 2
    for row, note, temperature in zip(table.rows, notes, (0, 0.7), strict=True):
        speeds = {c: everything.values("tokens_per_s", c, temperature=temperature)[0] for c in ALL}
        best = max(speeds, key=lambda c: speeds[c])
        assert row[1] == best and row[3] == pytest.approx(speeds[best])
        assert note.text.startswith(f"temperature {temperature:g}: ") and "generate(**inputs" in note.text
        assert "ms a token" in note.text
    setting = everything.settings[1]
    chosen = _speculation_exhibits.choices(everything, ALL[6], setting)
    code = _speculation_exhibits.code(everything, ALL[6], chosen)
    for piece in ("MultiDraft(", "n_drafts=2", "depth=2", "verifier='rrsw'"):
        assert piece in code
    chosen = _speculation_exhibits.choices(everything, "pearl", setting)
    assert chosen["gamma"] == round(everything.values("gamma", "pearl", temperature=0.7)[0])
    assert "Recommendation" in render(everything, blocks)
    closing = SpeculationBench().closing(everything)
    assert len(closing) == 2
    for line, row, note in zip(closing, table.rows, notes, strict=True):
        assert line.startswith(f"recommended ({row[0]}): ") and line.partition("): ")[2] in note.text


def test_catalogue_knows_the_bench() -> None:
    entry = catalog.benches()["speculation"]
    assert entry.summary.startswith("Speculation: how fast a model writes")
    assert isinstance(entry.load(), SpeculationBench)
    for method in ("multi-draft", "pearl"):
        assert "speculation" in catalog.card(method).benches
    assert "multi-draft:n_drafts=3:depth=4" in SpeculationBench().baselines()


def test_the_reference_pair_runs() -> None:
    found = compare(
        "speculation",
        "docs",
        ["autoregressive", "multi-draft:n_drafts=2:depth=2"],
        {"new_tokens": 4, "count": 1, "temperature": 0, "threads": 1, "contexts": 4},
        seeds=1,
    )
    assert [r.figures["equal_text"] for r in found.rows] == [1, 1]
    assert np.isclose(found.rows[1].figures["acceptance_gap"], 0)
