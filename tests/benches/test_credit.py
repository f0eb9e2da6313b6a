"""The credit bench: faults that surprise can't find, pairs that don't show where, and a user's own of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steersman.benches._faults import Case, Planter, load_cases, load_pairs
from steersman.benches._language import load
from steersman.benches.credit import CreditBench
from steersman.engine.compare import compare
from steersman.engine.comparison import Comparison
from steersman.errors import InputError
from steersman.language.q_star import apply, log_probabilities
from steersman.reference import reviews

SMALL: dict[str, Any] = {"preferences": 24, "count": 4, "held_out": 8, "new_tokens": 40}


def test_auroc_counts_ties_half() -> None:
    case = Case([1], [5, 6, 7, 8], faults=[2], controls=[0, 3])
    assert case.auroc(np.array([0.0, 9.0, 1.0, 1.0])) == 0.75
    assert case.auroc(np.array([0.0, 9.0, 1.0, 1.0]), everywhere=True) == pytest.approx(0.5)
    assert case.rank(np.array([0.0, 9.0, 1.0, 1.0])) == 2
    assert case.rank(np.array([0.0, 0.0, 1.0, 1.0])) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("credit") / "run"
    methods = ["surprise", "unigram", "random", "sft-ratio", "gradient", "gradient:form=product:epochs=1", "q-star"]
    return compare(CreditBench(), "reviews", methods, SMALL, seeds=[3], out=out)


def test_every_contender_blames(run: Comparison) -> None:
    assert [row.status for row in run.rows] == ["ok"] * 7, [row.error for row in run.rows]
    figures = {row.contender: row.figures for row in run.rows}
    assert figures["surprise"]["auroc"] == 0.5  # by construction
    assert all(0 <= found["auroc"] <= 1 and 0 <= found["top"] <= 1 for found in figures.values())
    assert figures["q-star"]["fit_s"] == figures["gradient"]["fit_s"] > 0  # one policy
    assert figures["gradient:form=product:epochs=1"]["fit_s"] == figures["gradient"]["fit_s"]
    assert {"chosen", "rejected", "accuracy"} <= figures["q-star"].keys()
    blocks = CreditBench().exhibits(run)
    assert any("fault" in getattr(block, "title", "") for block in blocks)


def folder(run: Comparison) -> Path:
    return next(path.parent for path in run.out.rglob("cases.jsonl"))


def test_faults_flip_the_verdict_and_are_as_rare_as_their_controls(run: Comparison) -> None:
    s = load("reviews")
    cases = load_cases(folder(run))
    assert len(cases) == 4 and sum(case.unseen for case in cases) == 2
    for case in cases:
        (fault,) = case.faults
        spoilt = s.tokenizer.decode([*case.prompt, *case.completion], skip_special_tokens=True)
        restored = [*case.completion]
        restored[fault] = s.tokenizer.convert_tokens_to_ids(case.was.strip())
        sound = s.tokenizer.decode([*case.prompt, *restored], skip_special_tokens=True)
        assert reviews.attributes(sound).sentiment == "positive" != reviews.attributes(spoilt).sentiment
        assert reviews.attributes(spoilt).validity == 1
        known = log_probabilities(s.model, [case.prompt], [case.completion])[0]
        above = int((known[case.controls] > known[fault]).sum())
        assert 2 * above == len(case.controls) > 0


def test_pairs_differ_by_the_score_and_lack_the_hidden_words(run: Comparison) -> None:
    s = load("reviews")
    pairs, watched = load_pairs(folder(run)), load_pairs(folder(run), "held_out")
    assert len(pairs) == 24 and len(watched) == 8
    hidden = {case.completion[case.faults[0]] for case in load_cases(folder(run)) if case.unseen}
    assert hidden
    for pair in [*pairs, *watched]:
        assert reviews.attributes(pair.prompt + pair.chosen).sentiment == "positive"
        assert reviews.attributes(pair.prompt + pair.rejected).sentiment != "positive"
        for answer in (pair.chosen, pair.rejected):
            assert not hidden & set(s.tokenizer(pair.prompt + answer)["input_ids"])


def test_a_planted_fault_behind_its_prompt() -> None:
    s = load("reviews")
    wanted = reviews.texts("heldout", 8, 5, sentiment="positive")
    planter = Planter(
        s,
        lambda texts: [float(reviews.attributes(t).sentiment == "positive") for t in texts],
        lambda text: True,
        prompt_tokens=3,
        matched=2,
        rng=np.random.default_rng(0),
    )
    found = [case for case in (planter.plant(review.text) for review in wanted) if case is not None]
    assert found
    for case, token in found:
        assert 2 <= len(case.prompt) <= 4 and case.completion[case.faults[0]] == token
    assert planter.plant("the soup was cold.") is None  # not approved of to begin with


ADJECTIVES = ["good", "great", "fine", "bad", "awful", "poor"]
WORDS = [*ADJECTIVES, "the", "soup", "film", "room", "was", "is", "and", ".", "very", "we", "went", "there"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, a scorer, texts, pairs and faults."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("own")
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "judge.py").write_text(
        "def score(texts):\n    return [float(not {'bad', 'awful', 'poor'} & set(t.split())) for t in texts]\n"
    )
    texts = [f"the {a} was {b} and the {c} was {d} . we went there ." for a in ("soup", "film") for b in WORDS[:3]
             for c in ("room", "film") for d in WORDS[:3]]  # fmt: skip
    (root / "texts.txt").write_text("\n".join(texts) + "\n")
    pairs = [{"prompt": f"the {a} was", "chosen": f" {b} .", "rejected": f" {c} ."} for a in ("soup", "film", "room")
             for b in WORDS[:3] for c in WORDS[3:6]]  # fmt: skip
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    faults = [{"prompt": "the soup", "completion": f" was very {w} and the film was fine .", "fault": [10, 10 + len(w)]}
              for w in WORDS[3:6]]  # fmt: skip
    (root / "faults.jsonl").write_text("".join(json.dumps(fault) + "\n" for fault in faults))
    return root


def test_a_users_scorer_and_texts(own: Path, tmp_path: Path) -> None:
    grid = {"scorer": f"{own / 'judge.py'}:score", "texts": str(own / "texts.txt"), **SMALL, "unseen": 0.0}
    found = compare(CreditBench(), str(own / "model"), ["q-star", "unigram"], grid, seeds=1, out=tmp_path / "run")
    assert [row.status for row in found.rows] == ["ok", "ok"], [row.error for row in found.rows]
    assert all("auroc_unseen" not in row.figures for row in found.rows)


def test_a_users_pairs_faults_and_policy(own: Path, tmp_path: Path) -> None:
    from steersman.engine.artefacts import run_verb

    policy = tmp_path / "policy"
    run_verb("apply", "q-star", str(own / "model"), policy, own / "pairs.jsonl", {"epochs": 3, "learning_rate": 0.01})
    grid = {"pairs": str(own / "pairs.jsonl"), "faults": str(own / "faults.jsonl"), **SMALL}
    methods = [str(policy), "q-star:learning_rate=0.01:epochs=3", "surprise"]
    found = compare(CreditBench(), str(own / "model"), methods, grid, seeds=1, out=tmp_path / "run")
    assert [row.status for row in found.rows] == ["ok"] * 3, [row.error for row in found.rows]
    assert "fit_s" not in found.rows[0].figures
    from transformers import AutoModelForCausalLM

    # Weights that unpickling would load run code: such a folder is refused.
    model = AutoModelForCausalLM.from_pretrained(policy)
    (policy / "model.safetensors").unlink()
    torch.save(model.state_dict(), policy / "pytorch_model.bin")
    (row,) = compare(CreditBench(), str(own / "model"), [str(policy)], grid, seeds=1, out=tmp_path / "again").rows
    assert row.status != "ok" and "safetensors" in str(row.error)


@pytest.mark.parametrize(
    ("grid", "match"),
    [
        ({}, "prompt, chosen and rejected"),
        ({"pairs": "pairs.jsonl"}, "completion and fault"),
        ({"scorer": "judge.py:nothing", "texts": "texts.txt"}, "a name that judge.py defines"),
    ],
)
def test_a_users_model_needs_a_scorer_or_pairs(own: Path, tmp_path: Path, grid: dict[str, str], match: str) -> None:
    grid = {name: str(own / value) for name, value in grid.items()}
    with pytest.raises(InputError, match=match):
        compare(CreditBench(), str(own / "model"), ["surprise"], grid, seeds=1, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("q-star+surprise", "one part alone"),
        ("q-star:pairs=5", "a setting of the bench"),
        ("q-star:nothing=5", "setting of q-star"),
        ("gradient:form=square", "norm or product"),
        ("unigram:prior=0", "above 0"),
        ("greedy", "one of"),
    ],
)
def test_bad_contenders(tmp_path: Path, method: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        compare(CreditBench(), "reviews", [method], SMALL, seeds=1, out=tmp_path / "run")


def test_bad_faults_and_attributes(own: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "the soup", "completion": " was bad", "fault": [5, 99]}\n')
    grid = {"pairs": str(own / "pairs.jsonl"), "faults": str(bad), **SMALL}
    found = compare(CreditBench(), str(own / "model"), ["surprise"], grid, seeds=1, out=tmp_path / "run")
    assert found.rows[0].status == "failed" and "row 1" in str(found.rows[0].error)
    with pytest.raises(InputError, match="sentiment"):
        compare(CreditBench(), "reviews", ["surprise"], {"attribute": "mood=good"}, seeds=1, out=tmp_path / "other")


def test_apply_is_what_the_bench_trains(run: Comparison, tmp_path: Path) -> None:
    """The policy of the run is the one that ``apply`` makes of its pairs."""
    from steersman.engine.streams import Streams
    from steersman.engine.subjects import resolve

    made = next(path.parent for path in run.out.rglob("q_star.json"))
    again = tmp_path / "again"
    again.mkdir()
    path = resolve("reviews").path
    assert path is not None
    apply(path, folder(run) / "pairs.jsonl", again, seed=Streams(3).seed("fit") % 2**31, pairs=24, held_out=0)
    one, two = (json.loads((f / "q_star.json").read_text())["fingerprint"] for f in (made, again))
    assert one == two
    weights = [(f / "model.safetensors").read_bytes() for f in (made, again)]
    assert weights[0] == weights[1]
