"""The corpus: deterministic, clean, without overlap between its sides; and the models trained on it."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.errors import InputError
from steersman.reference import docs, loading, text_metrics

MODELS = ("tiny", "small", "base")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(loading.path("docs/tiny"), local_files_only=True)


# --- the corpus -------------------------------------------------------------------------------------------


def test_no_passage_is_on_both_sides_or_twice() -> None:
    heading = re.compile(r"^[\w.]+(\(.*\))?$")
    seen: set[str] = set()
    for split in ("heldout", "train"):
        for document in docs.documents(split):
            lines = [line for line in document.text.splitlines() if not heading.match(line)]
            marks = [mark for mark in map(docs.key, lines) if mark]
            assert len(set(marks)) == len(marks), document.name
            assert not seen.intersection(marks), document.name
            seen.update(marks)


def test_the_split_is_by_name_and_about_a_tenth() -> None:
    train, held_out = docs.documents("train"), docs.documents("heldout")
    names = [d.name for d in (*train, *held_out)]
    assert len(set(names)) == len(names)
    assert all(docs.is_held_out(d.name) for d in held_out) and not any(docs.is_held_out(d.name) for d in train)
    assert all(int(hashlib.sha256(n.encode()).hexdigest(), 16) % 10 == 0 for n in (d.name for d in held_out))
    assert 0.05 < len(held_out) / len(names) < 0.15
    assert [d.name for d in train] == sorted(d.name for d in train)
    assert sum(len(d.text) for d in train) > 1_000_000 and sum(len(d.text) for d in held_out) > 80_000


def test_the_corpus_is_the_same_in_another_process_and_imports_nothing() -> None:
    code = (
        "import sys; from steersman.reference import docs; before = set(sys.modules);"
        "print(docs.fingerprint('heldout'), docs.fingerprint('train'));"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    prints, modules = out.splitlines()
    assert prints.split() == [docs.fingerprint("heldout"), docs.fingerprint("train")]
    # What `sysconfig` reads, and the encoding of a source file, are the interpreter's own business.
    assert {m for m in modules.split() if not m.startswith(("_sysconfigdata", "encodings"))} == {"pydoc_data"}


def test_docstrings_are_found_in_source_order_without_annotations(tmp_path: Path) -> None:
    source = '''
"""Says what the module does."""
import nonexistent_module_with_side_effects
if True:
    def f(a: int, *, b: str = "x") -> None:
        """Does f."""
        def inner(): "Inner one."
class C:
    """A class."""
    async def g(self, *args: int, **kw): """Does g."""
    def silent(self): pass
'''
    (tmp_path / "m.py").write_text(source)
    assert list(docs._docstrings(tmp_path / "m.py")) == [
        ("", "Says what the module does."),
        ("f(a, *, b='x')", "Does f."),
        ("f.inner()", "Inner one."),
        ("C", "A class."),
        ("C.g(self, *args, **kw)", "Does g."),
    ]
    (tmp_path / "bad.py").write_text("print 'two'")
    assert list(docs._docstrings(tmp_path / "bad.py")) == []


def test_paragraphs_keep_prose_and_drop_the_rest() -> None:
    raw = """Heading
*******

A paragraph over
two  lines, with “quotes”.

>>> code()
3

- the first item
  goes on
- the second item

   +----+----+
   | a  | b  |
   +----+----+

   stmt ::= "with" item

   x[0] = {1: (2, 3)}; y |= x
"""
    assert docs.paragraphs(raw) == [
        "Heading",
        'A paragraph over two lines, with "quotes".',
        "- the first item goes on",
        "- the second item",
    ]


def test_the_text_is_mostly_words() -> None:
    for document in docs.documents("train")[::25]:
        assert not re.search(r"^>>>|::=", document.text, re.MULTILINE)
        assert not re.search(r"[ \t]{2,}|\n\n\n", document.text)


# --- prompts ----------------------------------------------------------------------------------------------


def test_prompts_are_passages_of_held_out_documents(tokenizer) -> None:
    texts = {d.name: d.text for d in docs.documents("heldout")}
    found = docs.prompts(40, 32, seed=3, continuation=64, tokenizer=tokenizer)
    assert len(found) == 40
    for prompt in found:
        assert prompt.text + prompt.continuation in texts[prompt.document]
        assert len(prompt.ids) == 32 and len(prompt.continuation_ids) == 64
        assert tokenizer.decode(prompt.ids) == prompt.text
        assert tokenizer.decode(prompt.continuation_ids) == prompt.continuation
    spans = sorted((p.document, texts[p.document].index(p.text + p.continuation), len(p.text)) for p in found)
    for (d, a, n), (other, b, _) in pairwise(spans):
        assert d != other or a + n <= b


def test_prompts_are_drawn_by_the_seed(tokenizer) -> None:
    few, many = docs.prompts(5, seed=1, tokenizer=tokenizer), docs.prompts(20, seed=1, tokenizer=tokenizer)
    assert few == many[:5] and few == docs.prompts(5, seed=1)
    assert few != docs.prompts(5, seed=2, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": 1, "tokens": 0}, "tokens"),
        ({"n": 1, "tokens": 2.0}, "tokens"),
        ({"n": 1, "seed": -1}, "seed"),
        ({"n": 1, "continuation": -1}, "continuation"),
    ],
)
def test_prompts_refuse_bad_numbers(arguments: dict, name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}="):
        docs.prompts(**arguments)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match=r"^split="):
        docs.documents("test")  # type: ignore[arg-type]


def test_an_interpreter_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match=r"^interpreter="):
        list(docs._sources(held_out=True))


# --- the models -------------------------------------------------------------------------------------------


def test_the_shipped_files_are_the_recorded_ones() -> None:
    loading.verify("docs")
    record = loading.provenance("docs")
    assert set(record["models"]) == set(MODELS)
    assert sum(p.stat().st_size for p in loading.folder("docs").rglob("*") if p.is_file()) < 20_000_000


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_an_ordinary_folder_that_predicts_held_out_text(name: str) -> None:
    folder = loading.path(f"docs/{name}")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    record = loading.provenance("docs")["models"][name]
    assert model.dtype == torch.float32 and model.num_parameters() == record["parameters"]
    passages = docs.prompts(16, 32, seed=0, continuation=64, tokenizer=tokenizer)
    found = text_metrics.log_likelihood(
        model, [p.continuation_ids for p in passages], [p.ids for p in passages], batch_size=16
    )
    # The recorded loss is over all held-out text; 16 x 64 tokens of it scatter by about a fifth of a nat.
    assert math.log(found.perplexity) == pytest.approx(record["heldout_loss"], abs=0.8)


def test_larger_models_predict_better() -> None:
    losses = [loading.provenance("docs")["models"][n]["heldout_loss"] for n in MODELS]
    assert losses[0] > losses[1] > losses[2]


def test_the_tokenizer_loses_nothing_and_adds_nothing(tokenizer) -> None:
    text = "Return a new\n\nlist of “items” — naïve 日本, if *key* isn't None:\n    x[0] += 1  # two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}.intersection(ids)
    assert tokenizer(["a", "a b c d"], padding=True)["attention_mask"][0][0] == 0  # pads on the left
    files = {n: (loading.path(f"docs/{n}") / "tokenizer.json").read_bytes() for n in MODELS}
    assert len(set(files.values())) == 1
