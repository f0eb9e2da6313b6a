"""Subjects and callables: what a text names, and one sentence when it names nothing."""

from __future__ import annotations

import json

import pytest

from steersman.engine import subjects
from steersman.errors import InputError


def test_kinds(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    code = tmp_path / "mine.py"
    code.write_text("def make(): return 3\nvalue = 4\n")
    assert subjects.resolve("digits").kind == "reference"
    assert subjects.resolve(str(folder)).kind == "path"
    assert subjects.resolve(f"{code}:make").kind == "factory"
    assert subjects.resolve("openai:gpt").kind == "endpoint"
    assert subjects.resolve("owner/name").kind == "hub"


def test_a_fingerprint_follows_the_content(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.txt").write_text("1")
    one = subjects.tree_hash(folder)
    (folder / "a.txt").write_text("2")
    two = subjects.tree_hash(folder)
    (folder / "a.txt").rename(folder / "b.txt")
    assert len({one, two, subjects.tree_hash(folder)}) == 3


def test_large_files_are_told_apart_by_their_ends(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    content = bytearray(9 << 20)
    (path / "w.bin").write_bytes(content)
    one = subjects.tree_hash(path)
    content[-1] = 1
    (path / "w.bin").write_bytes(content)
    assert subjects.tree_hash(path) != one


@pytest.mark.parametrize("spec", ["", "  ", "dgits", "./nowhere", "none.py:f", "/no/such/folder"])
def test_what_names_nothing_is_refused(spec):
    with pytest.raises(InputError, match="subject") as caught:
        subjects.resolve(spec)
    assert "\n" not in str(caught.value)


def test_the_nearest_reference_is_suggested():
    with pytest.raises(InputError, match="did you mean 'digits'"):
        subjects.resolve("dgits")


def test_callables(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def score(x): return 2 * x\nnumber = 3\n")
    assert subjects.load_callable(f"{path}:score")(4) == 8
    assert subjects.load_callable(f"{path}:score") is subjects.load_callable(f"{path}:score")
    with pytest.raises(InputError, match="score"):
        subjects.load_callable(f"{path}:scor")
    with pytest.raises(InputError, match="callable"):
        subjects.load_callable(f"{path}:number")
    with pytest.raises(InputError, match=r"file\.py:name"):
        subjects.load_callable("os.system")
    with pytest.raises(InputError, match="no file"):
        subjects.load_callable(str(tmp_path / "none.py") + ":f")


def test_a_file_that_fails_to_import_says_how(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_like_this\n")
    with pytest.raises(InputError, match="ModuleNotFoundError: No module named 'nothing_like_this'"):
        subjects.load_callable(f"{path}:f", "reward")
    path.write_text("def f(:\n")
    with pytest.raises(InputError, match=r"reward=.*SyntaxError"):
        subjects.load_callable(f"{path}:f", "reward")


def test_a_changed_file_is_loaded_anew(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def f(): return 1\n")
    assert subjects.load_callable(f"{path}:f")() == 1
    path.write_text("def f(): return 2\n")
    assert subjects.load_callable(f"{path}:f")() == 2


def test_a_reference_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert subjects.resolve("digits").kind == "reference"
    assert subjects.resolve("./digits").kind == "path"


def test_a_setting_names_a_file_before_a_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert subjects.path_of("docs/small") == subjects.resolve("docs/small").path
    with pytest.raises(InputError, match=r"docs/mine\.csv"):
        subjects.path_of("docs/mine.csv")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "mine.csv").write_text("text\n")
    assert subjects.path_of("docs/mine.csv").read_text() == "text\n"


def test_reference_texts_and_their_scorer(tmp_path):
    found = subjects.resolve("reviews")
    file = subjects.write_input(found, tmp_path)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == subjects.TEXTS
    assert set(records[0]) == {"text", "topic", "sentiment", "rudeness", "length"}
    for attribute in ("sentiment=positive", "rudeness=polite", "topic=film"):
        name, value = attribute.split("=")
        score = subjects.scorer(found, attribute)
        assert score([r["text"] for r in records[:200]]) == [float(r[name] == value) for r in records[:200]]
    assert subjects.scorer(found, None) is None
    assert subjects.scorer(subjects.resolve("docs"), "sentiment=positive") is None
    with pytest.raises(InputError, match="did you mean 'sentiment'"):
        subjects.scorer(found, "sentimet=positive")
    with pytest.raises(InputError, match="positive'"):
        subjects.scorer(found, "sentiment=postive")
    balanced = subjects.write_input(found, tmp_path, "rudeness=polite").read_text().splitlines()
    assert sum(json.loads(line)["rudeness"] == "rude" for line in balanced) == len(balanced) / 2 == subjects.TEXTS / 2
    assert json.loads(subjects.write_input(subjects.resolve("docs"), tmp_path).read_text().splitlines()[0])["text"]
