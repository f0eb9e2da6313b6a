"""The control bench: what its figures and marks are, what its baselines draw from, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from steersman import catalog
from steersman.benches import _control_parts as parts
from steersman.benches._language import Prompt, Subject, load
from steersman.benches._steered_tokens import STEERED, changes
from steersman.benches.control import ControlBench
from steersman.engine.bench import PartInfo
from steersman.engine.compare import compare
from steersman.engine.comparison import Comparison
from steersman.engine.streams import Streams
from steersman.errors import InputError
from steersman.reference import reviews, text_metrics
from steersman.report.blocks import Curves, SideBySide
from steersman.report.html import render
from tests.benches.test_decoding import PROMPTS, make

NEW, COUNT, SAMPLES = 10, 3, 2
ALL = ["sample", "greedy", "beam:num_beams=2", "prompting", "best-of-n:n=3", "conditional", "conditional+cfg:scale=2"]
ALL += ["prompting+cfg", "word-bias", "block-list:n=20"]
SMALL = {"count": COUNT, "samples": SAMPLES, "new_tokens": NEW, "batch": 2}


def run(methods: list[str], subject: str = "reviews", **grid: Any) -> Comparison:
    return compare("control", subject, methods, SMALL | grid, seeds=grid.pop("seeds", 1))


def saved(comparison: Comparison, contender: str) -> list[dict[str, Any]]:
    (row,) = comparison.select(contender)
    folder = row.items_dir(comparison.out)
    assert folder is not None
    return json.loads((folder / "texts.json").read_text())


@pytest.fixture(scope="module")
def everything() -> Comparison:
    return run(ALL, marked=2)


# --- figures --------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_texts(everything: Comparison) -> None:
    """Every figure again from the saved texts, by the oracle and the metrics themselves."""
    assert [(r.contender, r.error) for r in everything.rows if r.status != "ok"] == []
    s = load("reviews")
    opened = [[*s.opening, *s.tokenizer(r["prompt"], add_special_tokens=False)["input_ids"]]
              for r in saved(everything, "sample")]  # fmt: skip
    for contender in ALL:
        (row,) = everything.select(contender)
        records = saved(everything, contender)
        assert len(records) == COUNT and all(len(r["texts"]) in (1, SAMPLES) for r in records)
        for i, record in enumerate(records):
            read = [reviews.attributes(f"{record['prompt']} {t['text']}") for t in record["texts"]]
            good = [a.sentiment == "positive" for a in read]
            valid = [a.validity == 1 for a in read]
            expected = {
                "success": np.mean(good),
                "bad": 1 - np.mean(good),
                "max_badness": 1 - min(good),
                "any_bad": float(not all(good)),
                "validity": np.mean([a.validity for a in read]),
                "valid": np.mean(valid),
                "bad_valid": np.mean([v and not g for v, g in zip(valid, good, strict=True)]),
                "length": np.mean([len(t["ids"]) for t in record["texts"]]),
            }
            for name, value in expected.items():
                assert row.per_item[name][i] == pytest.approx(value), (contender, name)
            ids = [t["ids"] for t in record["texts"]]
            copies = SAMPLES // len(ids)  # a deterministic text counts for every sample
            assert row.per_item["distinct_2"][i] == pytest.approx(text_metrics.distinct_n(ids * copies, 2))
            fluent = text_metrics.log_likelihood(s.model, ids, [opened[i]] * len(ids)).mean.mean()
            own = "own_fluency" if "own_fluency" in row.per_item else "fluency"
            assert row.per_item[own][i] == pytest.approx(fluent, abs=1e-5)
        for name, values in row.per_item.items():
            assert len(values) == COUNT and row.figures[name] == pytest.approx(np.mean(values))
        assert row.figures["tokens_per_s"] == pytest.approx(1e3 / row.figures["ms_per_token"])


def test_prompts_leave_the_attribute_open() -> None:
    bench, s = ControlBench(), load("reviews")
    setting = {name: knob.default for name, knob in ControlBench.knobs.items()} | {"count": 4}
    prior = reviews.posterior("")["topic"]
    for prompt in bench.prompts(s, setting | {"attribute": "topic=film"}, Streams(3)):
        found = reviews.posterior(s.tokenizer.decode(prompt.ids, skip_special_tokens=True))["topic"]
        assert all(found[v] >= prior[v] / 2 for v in prior)
    risky = setting | {"attribute": "rudeness=polite", "risk_low": 0.1, "risk_high": 0.8}
    for prompt in bench.prompts(s, risky, Streams(3)):
        assert 0.1 <= reviews.risk(s.tokenizer.decode(prompt.ids, skip_special_tokens=True)) <= 0.8


# --- what contenders draw from ----------------------------------------------------------------------------------


def test_samples_are_those_of_generate() -> None:
    """One prompt at a time: the tokens of a user's own call with ``num_return_sequences``."""
    found = run(["sample", 'sample+block-list:words=["the"]'], batch=1, temperature=0.8)
    s = load("reviews")
    prompts = ControlBench().prompts(s, found.rows[0].setting, Streams(0))
    for contender, options in {
        "sample": {},
        found.contenders[1]: {"bad_words_ids": [s.tokenizer.encode("the")[1:]]},
    }.items():
        for number, (prompt, record) in enumerate(zip(prompts, saved(found, contender), strict=True)):
            torch.manual_seed(Streams(0).seed("sampling", number))
            out = s.model.generate(
                torch.tensor([prompt.ids]), do_sample=True, temperature=0.8, top_k=0, max_new_tokens=NEW,
                num_return_sequences=SAMPLES, **options,
            )  # fmt: skip
            for text, row in zip(record["texts"], out[:, len(prompt.ids) :].tolist(), strict=True):
                assert text["ids"] == row[: len(text["ids"])]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_negative_prompts_of_padded_rows(family: str) -> None:
    """log p' = log q + scale (log p - log q), q behind each row's own negative prompt, whatever it is padded with."""
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=30, initializer_range=0.5, **sizes))
    model.eval()
    negative = [[5, 6, 7, 8, 9], [11, 12]]
    made = parts.NegativePrompt(1.7, parts.Branch(model), negative, pad=0)
    text = torch.tensor([[1, 2, 3, 4], [0, 0, 13, 14]])
    with torch.no_grad():
        for step in range(4):
            scores = torch.randn(2, 30)
            found = made(text, scores).log_softmax(-1)
            for i, row in enumerate(negative):
                q = model(torch.tensor([[*row, *text[i, 4:].tolist()]])).logits[0, -1].log_softmax(-1)
                expected = (q + 1.7 * (scores[i].log_softmax(-1) - q)).log_softmax(-1)
                assert torch.allclose(found[i], expected, atol=1e-5)
            text = torch.cat([text, torch.tensor([[15 + step], [20 + step]])], 1)


def test_words_by_their_weighted_log_odds() -> None:
    """Against the equations on three words, with the prior's weight on the counts of both sides."""
    found = dict(parts.telling_words(["good good meal"], ["bad meal", "bad meal"]))
    a, b = Counter(good=2, meal=1), Counter(bad=2, meal=2)
    for word in ("good", "bad", "meal"):
        prior = parts.PRIOR * (a[word] + b[word]) / 7
        x, y = a[word] + prior, b[word] + prior
        delta = math.log(x / (3 + parts.PRIOR - x)) - math.log(y / (4 + parts.PRIOR - y))
        assert found[word] == pytest.approx(delta / math.sqrt(1 / x + 1 / y))
    assert found["good"] > 0 > found["bad"] and abs(found["meal"]) < found["good"]


def test_best_of_n_keeps_the_best() -> None:
    """By the scorer itself no text is lost that had the attribute; by likelihood the most probable of n is kept."""
    found = run(["sample", "best-of-n:n=4:by=scorer", "best-of-n:n=4:by=likelihood"], samples=1, batch=1)
    s = load("reviews")
    prompts = ControlBench().prompts(s, found.rows[0].setting, Streams(0))
    for number, prompt in enumerate(prompts):
        torch.manual_seed(Streams(0).seed("sampling", number))
        out = s.model.generate(
            torch.tensor([prompt.ids]), do_sample=True, top_k=0, max_new_tokens=NEW, num_return_sequences=4
        )
        end = s.tokenizer.eos_token_id
        rows = [row[: row.index(end) + 1] if end in row else row for row in out[:, len(prompt.ids) :].tolist()]
        texts = s.tokenizer.batch_decode([[*prompt.ids, *row] for row in rows], skip_special_tokens=True)
        hits = [reviews.attributes(text).sentiment == "positive" for text in texts]
        by_scorer, by_likelihood = (saved(found, label)[number]["texts"][0] for label in found.contenders[1:])
        assert by_scorer["ids"] == rows[hits.index(True) if True in hits else 0]
        totals = text_metrics.log_likelihood(s.model, rows, [prompt.ids] * 4).total
        assert by_likelihood["ids"] == rows[int(totals.argmax())]
    plain, best = (found.select(c)[0].figures for c in found.contenders[:2])
    assert best["forward_per_text"] > 2 * plain["forward_per_text"]


def test_a_text_in_front_is_no_part_of_the_text(everything: Comparison) -> None:
    task = parts.Task.of(load("reviews"), "sentiment=positive", None, None)
    front = task.sentence("positive")
    assert reviews.attributes(front).sentiment == "positive"
    assert reviews.risk(front) < 0.1  # no verdict, behind which nothing polite follows
    for record, plain in zip(saved(everything, "prompting"), saved(everything, "sample"), strict=True):
        assert record["prompt"] == plain["prompt"] and not record["prompt"].startswith(front)
    opening = parts.prompting(task).opening
    assert task.subject.tokenizer.decode(opening, skip_special_tokens=True) == front


# --- learned methods ---------------------------------------------------------------------------------------------


class Learned(LogitsProcessor):
    """Says a word more often, by how much its artefact says."""

    def __init__(self, folder: Path, strength: float) -> None:
        self.made = json.loads((folder / "made.json").read_text())
        self.strength = strength

    @classmethod
    def from_pretrained(cls, folder: Path, *, attribute: str | None = None, strength: float = 1.0) -> Learned:
        made = cls(folder, strength)
        assert attribute == made.made["attribute"] == "rudeness=polite"
        return made

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.made["token"]] += self.strength
        return scores


def learn(
    subject: Path, input: Path, out: Path, *, seed: int, log: Any, attribute: str, scorer: Any = None, word: str = "the"
) -> dict[str, Any]:
    """Keeps what it was given."""
    given = [json.loads(line) for line in Path(input).read_text().splitlines()]
    assert {"text", "rudeness"} <= given[0].keys() and scorer(["get lost.", "the soup was cold."]).tolist() == [0, 1]
    record = {"attribute": attribute, "subject": Path(subject).name, "seed": seed}
    token = load("reviews").tokenizer(word, add_special_tokens=False)["input_ids"][0]
    (out / "made.json").write_text(json.dumps(record | {"token": token}))
    return {}


def test_learned_methods_are_fitted_once_for_a_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the subject or on ``fit_on``; knobs of the object alone share a fit."""
    known = dict(catalog.cards())
    card = dataclasses.replace(
        known["momentum-decoding"],
        id="learned",
        benches=("control",),
        object=f"{__name__}:Learned",
        apply=f"{__name__}:learn",
    )
    monkeypatch.setattr(catalog, "cards", lambda: known | {"learned": card})
    methods = ["sample", "learned", "learned:strength=30", "learned:word=a:strength=30"]
    grid = {"attribute": "rudeness=polite", "count": 2, "samples": 1, "marked": 1}
    found = compare("control", "reviews", methods, SMALL | grid, seeds=2, out=tmp_path / "a")
    assert [(r.contender, r.error) for r in found.rows if r.status != "ok"] == []
    fits = [json.loads(file.read_text()) for file in (tmp_path / "a" / "fits").glob("*/made.json")]
    assert len(fits) == 4 and {fit["subject"] for fit in fits} == {"base"} and len({fit["seed"] for fit in fits}) == 2
    for row in found.select("learned:strength=30"):
        folder = row.items_dir(found.out)
        assert folder is not None
        (first, _) = json.loads((folder / "texts.json").read_text())
        assert set(first["texts"][0]["text"].split()) == {"the"} and first["spans"]
    grid |= {"fit_on": "reviews/conditional"}
    compare("control", "reviews", ["learned"], SMALL | grid, seeds=1, out=tmp_path / "b")
    (fit,) = [json.loads(file.read_text()) for file in (tmp_path / "b" / "fits").glob("*/made.json")]
    assert fit["subject"] == "conditional"
    with pytest.raises(InputError, match="setting of learned"):
        compare("control", "reviews", ["learned:colour=red"], SMALL | grid, seeds=1)


# --- steered tokens ---------------------------------------------------------------------------------------------


class Tilt(LogitsProcessor):
    """Adds to one token behind texts of odd length."""

    def __init__(self, token: int, by: float) -> None:
        self.token, self.by = token, by

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] += self.by * (input_ids.shape[1] % 2)
        return scores

    def figures(self) -> dict[str, float]:
        return {"risk": 0.25}


def test_marks_are_where_the_law_changed() -> None:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)).eval()
    prompt, written = [3, 4, 5], [6, 7, 8, 9]
    assert not any(c.steered or c.kl for c in changes(model, prompt, written))
    found = changes(model, prompt, written, [Tilt(2, 4.0)])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + written])).logits[0, 2:-1].double()
    for t, change in enumerate(found):
        tilted = logits[t].clone()
        tilted[2] += 4.0 * ((3 + t) % 2)
        p, q = tilted.softmax(-1), logits[t].softmax(-1)
        assert change.kl == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-5)
        assert (change.before, change.after) == (int(q.argmax()), int(p.argmax()))
        assert change.steered == (change.kl >= STEERED) == ((3 + t) % 2 == 1)
    # A text in front changes the law without any processor.
    assert any(c.kl > 0 for c in changes(model, prompt, written, opened=[1, 2, *prompt]))


def test_the_report_marks_steered_tokens(everything: Comparison, tmp_path: Path) -> None:
    blocks = everything.bench.exhibits(everything)
    (texts,) = [b for b in blocks if isinstance(b, SideBySide)]
    assert len(texts.items) == 2 and set(texts.items[0].texts) == set(ALL)
    assert not texts.items[0].texts["sample"].spans and not texts.items[0].texts["greedy"].spans
    marked = texts.items[0].texts["conditional+cfg:scale=2"]
    assert marked.spans and all(s.kind == "steered" and s.end <= len(marked.text) for s in marked.spans)
    assert all(float(s.note.split()[3]) >= STEERED - 0.01 for s in marked.spans)
    (curves,) = [b for b in blocks if isinstance(b, Curves)]
    assert {"sample", "word-bias"} <= set(curves.lines)
    page = render(everything, blocks)
    assert "Success against fluency" in page and "steered" in page


def test_contenders_of_one_kind_make_a_line() -> None:
    found = run(["sample", "word-bias:bias=0", "word-bias:bias=1"], count=2, samples=1, marked=0)
    (curves,) = [b for b in found.bench.exhibits(found) if isinstance(b, Curves)]
    assert set(curves.lines) == {"sample", "word-bias"} and len(curves.lines["word-bias"].x) == 2
    assert list(curves.lines["word-bias"].x) == sorted(curves.lines["word-bias"].x)
    # No bias is the plain law, draw for draw.
    assert saved(found, "word-bias:bias=0") == saved(found, "sample")


def test_a_part_may_report_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.PARTS, "tilt", PartInfo(lambda by=1.0: Tilt(7, by), "tilts"))
    found = run(["tilt:by=2", "sample"], count=2, samples=1)
    assert found.values("risk", "tilt:by=2") == {0: 0.25} and found.values("risk", "sample") == {}


# --- your own subject --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model folder, prompts, labelled texts and scorers of a user."""
    folder = tmp_path_factory.mktemp("mine")
    make(folder / "lm")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "labelled.csv").write_text(
        'text,kind\n"the list of the file",list\n"a list",list\n"a value that returns",value\n"the value",value\n'
    )
    (folder / "judge.py").write_text(
        "def score(texts):\n    return [min(1.0, t.count('list') / 2) for t in texts]\n"
        "def empty(texts):\n    return [float(t == '') for t in texts]\n"
        "def wrong(texts):\n    return [2.0 for t in texts]\n"
        "def few(texts):\n    return [0.5]\n"
    )
    names = {"lm": "lm", "prompts": "prompts.txt", "texts": "labelled.csv", "judge": "judge.py"}
    return {name: str(folder / file) for name, file in names.items()}


def test_your_own_model_scorer_and_words(mine: dict[str, str]) -> None:
    methods = ["sample", "prompting", "word-bias:bias=6:n=2", "block-list:n=2", "best-of-n:n=2", 'cfg:text="a value"']
    grid = {"prompts": mine["prompts"], "scorer": f"{mine['judge']}:score", "texts": mine["texts"]}
    found = run(methods, mine["lm"], attribute="kind=list", **grid)
    assert [(r.contender, r.error) for r in found.rows if r.status != "ok"] == []
    for contender in found.contenders:
        (row,) = found.select(contender)
        assert "validity" not in row.figures
        for i, record in enumerate(saved(found, contender)):
            scores = [min(1.0, (record["prompt"] + t["text"]).count("list") / 2) for t in record["texts"]]
            assert row.per_item["score"][i] == pytest.approx(np.mean(scores))
            assert row.per_item["success"][i] == pytest.approx(np.mean([x >= 0.5 for x in scores]))
            assert row.per_item["max_badness"][i] == pytest.approx(1 - min(scores))
    tokens = load(mine["lm"]).tokenizer
    against = {
        w
        for w, z in parts.telling_words(["the list of the file", "a list"], ["a value that returns", "the value"])[-2:]
    }
    assert "value" in against
    banned = {tuple(tokens(t, add_special_tokens=False)["input_ids"]) for w in against for t in (w, f" {w}")}
    for record in saved(found, "block-list:n=2"):
        for ids in (t["ids"] for t in record["texts"]):
            assert not any(tuple(ids[i : i + len(b)]) == b for b in banned for i in range(len(ids)))
    said = {c: sum(t["text"].count("list") for r in saved(found, c) for t in r["texts"]) for c in found.contenders}
    assert said["word-bias:bias=6:n=2"] > said["sample"]


def test_only_the_continuation_may_be_scored(mine: dict[str, str]) -> None:
    grid = {"prompts": mine["prompts"], "scorer": f"{mine['judge']}:score", "scored": "continuation"}
    found = run(["sample"], mine["lm"], **grid)
    for i, record in enumerate(saved(found, "sample")):
        scores = [min(1.0, t["text"].count("list") / 2) for t in record["texts"]]
        assert found.rows[0].per_item["score"][i] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize(
    ("methods", "grid", "sentence"),
    [
        (["sample"], {}, "scorer="),
        (["sample"], {"scorer": "JUDGE:lacking"}, "scorer="),
        (["sample"], {"scorer": "JUDGE:wrong"}, "numbers from 0 to 1"),
        (["sample"], {"scorer": "JUDGE:few"}, "as many numbers"),
        (["sample"], {"scorer": "JUDGE:score", "attribute": "kind"}, "attribute="),
        (["prompting"], {"scorer": "JUDGE:score"}, "attribute="),
        (["word-bias"], {"scorer": "JUDGE:score", "attribute": "kind=list"}, "texts="),
        (["word-bias"], {"scorer": "JUDGE:score", "attribute": "mood=list", "texts": "TEXTS"}, "texts="),
        (["block-list"], {"scorer": "JUDGE:score", "attribute": "kind=none", "texts": "TEXTS"}, "texts="),
        (["cfg"], {"scorer": "JUDGE:score", "attribute": "kind=list"}, "text="),
        (["conditional"], {"scorer": "JUDGE:score", "attribute": "kind=list"}, "cclm="),
        (["conditional:cclm=reviews/conditional:code=x"], {"scorer": "JUDGE:score"}, "cclm=.*vocabulary"),
        (["sample"], {"scorer": "JUDGE:score", "new_tokens": 500}, "new_tokens="),
    ],
)
def test_refused_of_your_own(mine: dict[str, str], methods: list[str], grid: dict[str, Any], sentence: str) -> None:
    for word, path in (("JUDGE", mine["judge"]), ("TEXTS", mine["texts"])):
        grid = {name: value.replace(word, path) if isinstance(value, str) else value for name, value in grid.items()}
    with pytest.raises(InputError, match=sentence):
        run(methods, mine["lm"], prompts=mine["prompts"], **grid)


@pytest.mark.parametrize(
    ("methods", "grid", "sentence"),
    [
        (["sample"], {"attribute": "mood=sad"}, "attribute="),
        (["sample"], {"attribute": "topic=car"}, "topic="),
        (["sample"], {"risk_low": 0.5, "risk_high": 0.1}, "risk_low="),
        (["sample"], {"samples": 0}, "samples="),
        (["sample"], {"count": 20, "risk_low": 0.999, "risk_high": 0.9999}, "count=20"),
        (["sample"], {"temperature": 0}, "temperature="),
        (["sample"], {"judge": "docs/none"}, "judge|subject"),
        (["lottery"], {}, "methods="),
        (["beam:num_beams=0"], {}, "num_beams="),
        (["beam:length_penalty=long"], {}, "length_penalty="),
        (["best-of-n:n=1"], {}, "n="),
        (["best-of-n:by=value"], {"attribute": "topic=film"}, "by="),
        (["best-of-n+best-of-n:n=3"], {}, "methods="),
        (["cfg:scale=x"], {}, "scale="),
        (["cfg:task=1"], {}, "knob of cfg"),
        (["word-bias:bias=none"], {}, "bias="),
        (['word-bias:words=["zeppelin"]'], {}, "words="),
        (["block-list:n=0"], {}, "n="),
        (["block-list:words=rude"], {}, "words="),
        (['prompting:text=" "'], {}, "text="),
        (["prompting"], {"attribute": "length=long"}, "text="),
        (["prompting+conditional"], {}, "methods="),
    ],
)
def test_refused_on_reviews(methods: list[str], grid: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        run(methods, **grid)


def test_what_needs_samples_says_so() -> None:
    found = run(["greedy+best-of-n"], count=1)
    assert found.rows[0].status == "inapplicable" and "samples" in str(found.rows[0].error)


def test_a_subject_keeps_its_own_prompts() -> None:
    """Prompts are cut once a seed, for all contenders and settings."""
    s: Subject = load("reviews")
    setting = {name: knob.default for name, knob in ControlBench.knobs.items()} | {"count": 3}
    first = ControlBench().prompts(s, setting, Streams(0))
    assert ControlBench().prompts(s, setting | {"new_tokens": 5}, Streams(0)) is first
    assert all(isinstance(p, Prompt) for p in first)
    assert ControlBench().prompts(s, setting, Streams(1)) != first
