"""Rows that users bring, and what stands in front of a text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from steersman.errors import InputError
from steersman.language.texts import opening_of, read_rows, texts_of


def test_rows_of_every_form(tmp_path) -> None:
    expected = [{"text": 'one, "two"', "label": "a"}, {"text": "three\nfour", "label": "b"}]
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one, \\"two\\"", "label": "a"}\n\n{"text": "three\\nfour", "label": "b"}'
    )
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""",a\n"three\nfour",b\n')
    (tmp_path / "a.tsv").write_text('\ufefftext\tlabel\n"one, ""two"""\ta\n"three\nfour"\tb\n')
    for name in ("a.jsonl", "a.csv", "a.tsv"):
        rows = read_rows(tmp_path / name)
        assert rows == expected
        assert texts_of(rows, "label", name) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "x", r"a \.jsonl, \.csv or \.tsv file"),
        ("none.csv", None, "can be read"),
        ("a.jsonl", '{"text": 1}\n{', r"line 2"),
        ("a.jsonl", "[1]", "line 1 is none"),
        ("a.jsonl", "\n", "at least one row"),
        ("a.csv", "text,label\n", "at least one row"),
        ("a.csv", 'text\n"open', "a table that can be read"),
        ("a.csv", b"\xff\xfe\xff", "can be read"),
    ],
)
def test_what_is_no_file_of_rows(tmp_path, name, content, sentence) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"texts=.*{sentence}") as caught:
        read_rows(tmp_path / name, "texts")
    assert "\n" not in str(caught.value)


def test_a_row_without_text_is_named() -> None:
    with pytest.raises(InputError, match=r"row 2 has none"):
        texts_of([{"text": "a"}, {"text": " "}], "text", "file")


def test_opening() -> None:
    model = Tokenizer(WordLevel({"<s>": 0, "a": 1, "<e>": 2}, unk_token="a"))
    assert opening_of(PreTrainedTokenizerFast(tokenizer_object=model)) == []
    model.post_processor = TemplateProcessing(single="<s> <s> $A <e>", special_tokens=[("<s>", 0), ("<e>", 2)])
    assert opening_of(PreTrainedTokenizerFast(tokenizer_object=model)) == [0, 0]
