"""The decoding bench on a tiny model with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from steersman import catalog
from steersman.benches._language import Host, Mounted, Prompt, load, read_prompts
from steersman.benches.decoding import PARTS, DecodingBench
from steersman.engine.bench import PartInfo
from steersman.engine.compare import compare
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import Part
from steersman.errors import InputError
from steersman.language import ContrastiveSearch, MomentumDecoding
from steersman.reference import text_metrics
from steersman.report.blocks import Note, SideBySide
from steersman.report.html import render

CORPUS = "the list is a value of the name and a file that the call returns is the value of the list"
PROMPTS = ["the list is a value of", "a file that", "the call returns the name of the file", "is the value", "and"]
NEW = 20


def make(folder: Path, vocab_size: int = 300, seed: int = 5, **config: Any) -> Path:
    """A model folder: a byte-level tokenizer and a Llama of two layers."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([CORPUS] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 128, "initializer_range": 0.3, "vocab_size": len(tokenizer)} | config
    model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    # A model folder with settings of its own, which the bench must not use.
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)


def run(folder: Path, prompts: str, methods: list[str], out: Path | None = None, **grid: Any) -> Comparison:
    grid = {"new_tokens": NEW, "batch": 3, "prompts": prompts} | grid
    seeds = grid.pop("seeds", 1)
    return compare("decoding", str(folder), methods, grid, seeds=seeds, out=out)


def texts(comparison: Comparison, contender: str, seed: int = 0) -> list[dict[str, Any]]:
    (row,) = [r for r in comparison.select(contender) if r.seed == seed]
    found = row.items_dir(comparison.out)
    assert found is not None
    return json.loads((found / "texts.json").read_text())


ALL = [*PARTS, "momentum-decoding", "momentum-decoding:sample=true", "momentum-decoding+beam", "no-repeat-ngram+beam"]


@pytest.fixture(scope="module")
def everything(folder: Path, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return run(folder, prompts, ALL, tmp_path_factory.mktemp("runs") / "a")


# ------------------------------------------------------------------ figures


def test_every_contender_runs(everything: Comparison) -> None:
    assert [(r.contender, r.error) for r in everything.rows if r.status != "ok"] == []
    for row in everything.rows:
        assert all(math.isfinite(v) for v in row.figures.values())
        assert row.figures["length"] == NEW
        assert {name: len(v) for name, v in row.per_item.items()} == dict.fromkeys(row.per_item, 5)
        assert set(row.per_item) == {"rep_2", "rep_3", "rep_4", "diversity", "coherence", "greedy_ratio"}
        for name, values in row.per_item.items():
            assert row.figures[name] == pytest.approx(sum(values) / 5)
        assert row.figures["tokens_per_s"] == pytest.approx(1e3 / row.figures["ms_per_token"])
        assert "divergence" not in row.figures  # how these prompts go on is not known


def test_forward_tokens_are_counts(everything: Comparison) -> None:
    """The prompt aside, a token costs one forward token, except the first; k look-ahead; one a beam."""
    counted = {r.contender: r.figures["forward_tokens"] for r in everything.rows}
    once = (NEW - 1) / NEW
    for name in ("greedy", "no-repeat-ngram", "repetition-penalty", "nucleus", "momentum-decoding"):
        assert counted[name] == pytest.approx(once)
    assert counted["beam"] == counted["momentum-decoding+beam"] == pytest.approx(4 * once)
    # The first look at a model compares the tree of candidates with rows: outside the figures.
    assert counted["contrastive"] == pytest.approx(5)


class Guided(LogitsProcessor):
    """Runs a model beside: first on two codes by themselves, then on the text, then a token each step."""

    def __init__(self, guide: Any) -> None:
        self.networks, self.fed = (guide,), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for code in ([[5]], [[6]]) if not self.fed else ():
            self.networks[0](torch.tensor(code))
        self.networks[0](input_ids[:, self.fed :])
        self.fed = input_ids.shape[1]
        return scores


def test_codes_that_are_read_first_are_no_tokens_of_the_text(folder: Path) -> None:
    s, guide = load(str(folder)), load(str(folder)).model
    prompts = [Prompt((1, 9, 10, 11)), Prompt((1, 12, 13, 14))]
    h = Host(s, prompts, {}, [Mounted(Part("guided"), lambda: Guided(guide), {})])
    written = DecodingBench().generate(h, prompts, NEW, False, 0)
    assert written.forwards == 2 * 2 * (NEW - 1)  # two rows, two models


def test_texts_are_those_of_generate(everything: Comparison, folder: Path) -> None:
    """Padded batches of three give what a user's own calls on single prompts give."""
    s = load(str(folder))
    s.model.generation_config.repetition_penalty = 1.0
    for contender, options in {
        "greedy": {},
        "no-repeat-ngram": {"no_repeat_ngram_size": 4},
        "momentum-decoding": {"logits_processor": [MomentumDecoding()]},
        "contrastive": {"custom_generate": ContrastiveSearch()},
        "beam": {"num_beams": 4},
    }.items():
        for prompt, record in zip(PROMPTS, texts(everything, contender), strict=True):
            inputs = s.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            ids = s.model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)
            assert record["ids"] == ids[0, inputs["input_ids"].shape[1] :].tolist(), contender
            assert record["prompt"] == prompt


def test_items_match_the_metrics(everything: Comparison, folder: Path) -> None:
    s = load(str(folder))
    for contender in ALL:
        records = texts(everything, contender)
        (row,) = everything.select(contender)
        ids = [r["ids"] for r in records]
        assert row.per_item["diversity"] == pytest.approx(text_metrics.diversity(ids))
        likelihood = text_metrics.log_likelihood(s.model, ids, [s.tokenizer(p)["input_ids"] for p in PROMPTS])
        assert row.per_item["coherence"] == pytest.approx(likelihood.mean, abs=1e-5)
        for record in records:
            assert "".join(text for text, _ in record["pieces"]) == s.tokenizer.decode(record["ids"])
            assert record["loops"] == [[x.start, x.stop, x.source] for x in text_metrics.find_loops(record["ids"], 4)]


def test_greedy_ratio_is_one_for_greedy_search(everything: Comparison) -> None:
    assert everything.values("greedy_ratio", "greedy") == {0: 1.0}
    assert everything.values("greedy_ratio", "momentum-decoding")[0] < 1


def test_loops_go_away(everything: Comparison) -> None:
    greedy = everything.values("diversity", "greedy")[0]
    assert greedy < 0.7 < 0.9 < everything.values("diversity", "momentum-decoding")[0]


def test_contenders_share_prompts_and_draws(folder: Path, prompts: str) -> None:
    """Neither the company nor the order of contenders changes what one of them writes."""
    one = run(folder, prompts, ["nucleus", "min-p", "greedy"], seeds=2, count=3)
    two = run(folder, prompts, ["greedy", "nucleus"], seeds=2, count=3)
    for seed in (0, 1):
        assert texts(one, "nucleus", seed) == texts(two, "nucleus", seed)
        asked = [r["prompt"] for r in texts(one, "greedy", seed)]
        assert asked == [r["prompt"] for r in texts(one, "min-p", seed)] and len(asked) == 3
    assert texts(one, "nucleus", 0) != texts(one, "nucleus", 1)
    assert [r["prompt"] for r in texts(one, "greedy", 0)] != [r["prompt"] for r in texts(one, "greedy", 1)]


def test_texts_may_stop(everything: Comparison, folder: Path, prompts: str, tmp_path: Path) -> None:
    """With the fourth token of a text as the end of sequence: cut behind it, or never said at all."""
    free = [record["ids"] for record in texts(everything, "greedy")]
    end = free[0][3]
    file = tmp_path / "mine.py"
    file.write_text(
        "from steersman.benches._language import load\n"
        "def lm():\n"
        f"    s = load({str(folder)!r})\n"
        f"    s.tokenizer.eos_token = s.tokenizer.convert_ids_to_tokens({end})\n"
        "    return s.model, s.tokenizer\n"
    )
    grid = {"new_tokens": NEW, "prompts": prompts}
    stopped = compare("decoding", f"{file}:lm", ["greedy"], {**grid, "stop": True}, seeds=1)
    rows = [record["ids"] for record in texts(stopped, "greedy")]
    assert rows == [row[: row.index(end) + 1] if end in row else row for row in free] and len(rows[0]) == 4
    assert stopped.values("length", "greedy")[0] == pytest.approx(sum(map(len, rows)) / 5)
    never = compare("decoding", f"{file}:lm", ["greedy", "nucleus"], grid, seeds=1)
    for contender in ("greedy", "nucleus"):
        assert all(end not in record["ids"] and len(record["ids"]) == NEW for record in texts(never, contender))
    assert never.values("greedy_ratio", "greedy") == {0: 1.0}


def test_held_out_text_and_likeness(folder: Path) -> None:
    """Without a file the prompts come from the documentation corpus, and how they went on is known."""
    found = compare(
        "decoding",
        str(folder),
        ["greedy", "nucleus"],
        {"new_tokens": 8, "count": 20, "prompt_tokens": 10, "batch": 20},
        seeds=1,
    )
    for row in found.rows:
        assert row.status == "ok", row.error
        assert 0 <= row.figures["divergence"] <= 1 and 1 / 253 <= row.figures["likeness"] <= 1
        assert row.figures["held_out_diversity"] == found.rows[0].figures["held_out_diversity"] > 0
        assert row.figures["held_out_coherence"] < 0
    note = DecodingBench().exhibits(found)[0]
    assert "held-out text itself" in note.text


# ------------------------------------------------------------------ subjects, judges, prompts


def test_factory_subject_and_another_judge(folder: Path, prompts: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from steersman.benches._language import load\n"
        f"def lm():\n    s = load({str(folder)!r})\n    return s.model, s.tokenizer\n"
    )
    other = make(tmp_path / "other", vocab_size=280, seed=3)
    plain = run(folder, prompts, ["greedy"])
    own = compare(
        "decoding", f"{file}:lm", ["greedy"], {"new_tokens": NEW, "prompts": prompts, "judge": str(folder)}, seeds=1
    )
    assert texts(plain, "greedy") == texts(own, "greedy")
    assert own.values("coherence", "greedy") == pytest.approx(plain.values("coherence", "greedy"))
    judged = run(folder, prompts, ["greedy"], judge=str(other))
    s, by = load(str(folder)), load(str(other))
    record = texts(judged, "greedy")[0]
    prompt = by.tokenizer(record["prompt"])["input_ids"]
    text = s.tokenizer.decode(record["ids"], skip_special_tokens=True)
    follows = by.tokenizer(text)["input_ids"]
    expected = text_metrics.log_likelihood(by.model, [follows], [prompt]).mean[0]
    (row,) = judged.rows
    assert row.per_item["coherence"][0] == pytest.approx(expected, abs=1e-5)
    assert str(other) in DecodingBench().exhibits(judged)[0].text


def test_prompt_files(folder: Path, tmp_path: Path) -> None:
    s = load(str(folder))
    lines = [{"prompt": "the list", "continuation": " is a value"}, {"text": "the call returns the name of the file"}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    one, two = read_prompts(str(path), s, 3)
    assert s.tokenizer.decode(list(one.ids)) == "the list" and s.tokenizer.decode(list(one.follows)) == " is a value"
    assert len(two.ids) == 3 and s.tokenizer.decode([*two.ids, *two.follows]) == lines[1]["text"]
    found = run(folder, str(path), ["greedy"], new_tokens=3, prompt_tokens=3)
    assert 0 <= found.values("divergence", "greedy")[0] <= 1


def test_line_separators_inside_of_a_text(folder: Path, tmp_path: Path) -> None:
    """JSON may hold U+2028 as it is; a line ends with a line feed alone."""
    s = load(str(folder))
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "p.txt").write_text("a\u2028b\n", encoding="utf-8")
    for name in ("p.jsonl", "p.txt"):
        (prompt,) = read_prompts(str(tmp_path / name), s, 3)
        assert s.tokenizer.decode(list(prompt.ids), skip_special_tokens=True) == "a\u2028b"


def test_openings_of_two_tokens(folder: Path, tmp_path: Path) -> None:
    s = load(str(folder))
    assert s.opening == []
    s.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <pad> $A", special_tokens=[("<s>", 1), ("<pad>", 0)]
    )
    assert s.opening == [1, 0]
    (tmp_path / "p.txt").write_text("the list\n")
    (prompt,) = read_prompts(str(tmp_path / "p.txt"), s, 3)
    assert list(prompt.ids) == s.tokenizer("the list")["input_ids"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.jsonl", "{broken", "line 1"),
        ("p.jsonl", '{"question": "x"}', "row 1 has neither"),
        ("p.jsonl", '{"prompt": ""}', "row 1 has no text in it"),
        ("p.jsonl", '"text"', "line 1 is none"),
        ("p.txt", "the " * 500, "fewer than the .* positions"),
        ("p.txt", "\n\n", "at least one prompt"),
        ("p.txt", None, "can be read"),
    ],
)
def test_bad_prompt_files(folder: Path, tmp_path: Path, name: str, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"prompts=.*{sentence}"):
        run(folder, str(tmp_path / name), ["greedy"])


def test_broken_model_folders(folder: Path, prompts: str, tmp_path: Path) -> None:
    import shutil

    half = shutil.copytree(folder, tmp_path / "half")
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "config.json").unlink()
    lacking = shutil.copytree(folder, tmp_path / "lacking")
    config = json.loads((lacking / "config.json").read_text()) | {"num_hidden_layers": 3}
    (lacking / "config.json").write_text(json.dumps(config))
    for broken, sentence in ((half, "transformers loads"), (bare, "transformers loads"), (lacking, "all its weights")):
        with pytest.raises(InputError, match=f"subject=.*{sentence}"):
            run(broken, prompts, ["greedy"])


@pytest.mark.parametrize(
    ("methods", "grid", "sentence"),
    [
        (["greedy"], {"new_tokens": 500}, "new_tokens=500.*the model's positions"),
        (["greedy"], {"judge": "no-such-judge"}, "no-such-judge"),
        (["momentum"], {"judge": "digits"}, "judge='digits'"),
        (["beam:width=3"], {}, "knob of beam='width'"),
        (["beam:num_beams=1"], {}, "num_beams=1.*from 2 to 64"),
        (["nucleus:top_p=0"], {}, "top_p=0"),
        (["min-p:min_p=-1"], {}, "min_p=-1"),
        (["typical:typical_p=1"], {}, "typical_p=1"),
        (["no-repeat-ngram:no_repeat_ngram_size=0"], {}, "no_repeat_ngram_size=0"),
        (["repetition-penalty:repetition_penalty=0"], {}, "repetition_penalty=0"),
        (["contrastive:alpha=2"], {}, "alpha=2"),
        (["momentum-decoding:resistance=hours"], {}, "did you mean 'ours'"),
        (["momentum-decodin"], {}, "did you mean 'momentum-decoding'"),
        (["contrastive+beam"], {}, "disagree on num_beams"),
        (["contrastive+nucleus"], {}, "disagree on do_sample"),
        (["momentum-decoding+nucleus"], {}, "disagree on do_sample"),
        (["nucleus:temperature=0.5+min-p"], {}, "disagree on temperature"),
        (["greedy+typical"], {}, "disagree on do_sample"),
        (["greedy+greedy"], {}, "there once"),
    ],
)
def test_bad_contenders_and_knobs(
    folder: Path, prompts: str, methods: list[str], grid: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        run(folder, prompts, methods, **grid)


def test_two_loops_are_refused(folder: Path, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "other-loop", PartInfo(lambda: ContrastiveSearch(3), "Another loop."))
    with pytest.raises(InputError, match=r"contrastive\+other-loop.*both are the decoding loop"):
        run(folder, prompts, ["contrastive+other-loop"])


def test_other_subjects_are_refused() -> None:
    for spec in ("digits", "openai:gpt-2"):
        with pytest.raises(InputError, match="a model folder or a hub id"):
            load(spec)


def test_nan_fails_the_row_and_says_where(folder: Path, prompts: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "import torch\nfrom steersman.benches._language import load\n"
        "def lm():\n"
        f"    s = load({str(folder)!r})\n"
        "    inner = s.model.forward\n"
        "    def forward(*args, **kwargs):\n"
        "        out = inner(*args, **kwargs)\n"
        "        cache = kwargs.get('past_key_values')\n"
        "        if cache is not None and cache.get_seq_length() >= 14:\n"
        "            out.logits[0] = float('nan')\n"
        "        return out\n"
        "    s.model.forward = forward\n"
        "    return s.model, s.tokenizer\n"
    )
    grid = {"new_tokens": NEW, "prompts": prompts, "count": 5, "batch": 5}
    found = compare("decoding", f"{file}:lm", ["greedy", "momentum-decoding"], grid, seeds=1)
    width = max(len(load(str(folder)).tokenizer(p)["input_ids"]) for p in PROMPTS)
    assert [r.status for r in found.rows] == ["failed", "failed"]
    assert all(r.error == f"TrialError: the model gave NaN at new token {14 - width + 1}" for r in found.rows)


# ------------------------------------------------------------------ report


def test_exhibits_show_loops(everything: Comparison) -> None:
    blocks = DecodingBench().exhibits(everything)
    note, texts_block = blocks
    assert isinstance(note, Note) and "judged by the subject itself" in note.text
    assert isinstance(texts_block, SideBySide) and len(texts_block.items) == 4
    for item, prompt in zip(texts_block.items, PROMPTS, strict=False):
        assert item.prompt == prompt and list(item.texts) == ALL
    greedy = [item.texts["greedy"] for item in texts_block.items]
    assert any(text.spans for text in greedy)
    page = render(everything, blocks)
    assert "The same prompts" in page and "custom_generate=" in page


def test_catalogue_knows_the_bench() -> None:
    entry = catalog.benches()["decoding"]
    assert entry.summary.startswith("Decoding: what a language model writes")
    assert isinstance(entry.load(), DecodingBench)
    assert "decoding" in catalog.card("momentum-decoding").benches
