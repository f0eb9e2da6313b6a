"""The probe of magic words: what it writes, and that an interrupted run ends like an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steersman.cli import build
from steersman.engine.artefacts import run_verb
from steersman.errors import InputError
from steersman.language.magic_word.finding import Controllability, MagicWord
from steersman.language.magic_word.page import page, plot
from steersman.language.magic_word.system import System

from .conftest import tiny
from .test_magic_word import WORDS, tokenizer

SETTINGS = {"greedy": "1", "lengths": "2", "iterations": "2", "candidates": "12", "layers": "0"}
PAIRS = [("hello", "q"), ("hello", "a"), ("abc", "z"), ("zz top", "b"), ("the list", "t"), ("and <b>", "c")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    tiny("llama", 3, len(WORDS)).save_pretrained(out)
    tokenizer(bos=True).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps({"x0": x0, "y": y}) + "\n" for x0, y in PAIRS))
    return file


@pytest.fixture(scope="module")
def whole(folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_verb("probe", "magic-word", str(folder), out, pairs, SETTINGS)
    return out


def states(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "states.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def metrics(out: Path) -> dict[str, Any]:
    record = json.loads((out / "probe.json").read_text())["metrics"]
    return {k: v for k, v in record.items() if k != "forward_passes_a_second"}


def test_what_it_writes(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {"states.jsonl", "reachable.png", "report.html", "probe.json"}
    found = states(whole)
    assert [line["state"] for line in found] == [0, 1, 2, 3, 4]  # "hello" has two targets
    assert [len(line["words"]) for line in found] == [2, 1, 1, 1, 1]
    assert all("adversarial" in line["notice"] for line in found)
    record = metrics(whole)
    assert record["all"]["pairs"] == 6 and len(record["all"]["reached_by_k"]) == 3
    assert record["forward_passes"] == sum(line["forwards"] for line in found)
    assert {row["k"] for row in record["attention"]} == {1, 2, 4, 8} and "adversarial" in record["notice"]
    assert (whole / "reachable.png").read_bytes().startswith(b"\x89PNG")
    text = (whole / "report.html").read_text()
    assert "adversarial strings" in text and "<svg" in text and "Wilson" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "<script" not in text and "<b>" not in text


def test_an_interrupted_run_ends_like_a_whole_one(whole: Path, folder: Path, pairs: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "a", []

    def stop(line: str) -> None:
        seen.append(line)
        if line.startswith("state 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        run_verb("probe", "magic-word", str(folder), out, pairs, SETTINGS, log=stop)
    partial = tmp_path / "a.partial"
    assert not out.exists() and len(states(partial)) == 2
    with pytest.raises(InputError, match="add --resume, or remove it"):
        run_verb("probe", "magic-word", str(folder), out, pairs, SETTINGS)
    with pytest.raises(InputError, match="the seed of the run"):
        run_verb("probe", "magic-word", str(folder), out, pairs, SETTINGS, seed=1, resume=True)
    with pytest.raises(InputError, match="the settings of the run"):
        run_verb("probe", "magic-word", str(folder), out, pairs, SETTINGS | {"candidates": "13"}, resume=True)
    assert len(states(partial)) == 2  # refusals left it alone
    with (partial / "states.jsonl").open("ab") as file:
        file.write(b'{"state": 2, "x0": [1')  # a kill in the middle of a line
    lines: list[str] = []
    run_verb("probe", "magic-word", str(folder), out, pairs, SETTINGS, log=lines.append, resume=True)
    assert "2 states are kept" in lines[0] and [line[:7] for line in lines[1:]] == ["state 3", "state 4", "state 5"]
    assert states(out) == states(whole) and metrics(out) == metrics(whole) and not partial.exists()
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    # A whole run has nothing left to do, and says what it found.
    again = run_verb("probe", "magic-word", str(folder), out, pairs, SETTINGS, resume=True)
    assert again == json.loads((out / "probe.json").read_text())
    with pytest.raises(InputError, match="the seed of the run"):
        run_verb("probe", "magic-word", str(folder), out, pairs, SETTINGS, seed=1, resume=True)


def test_a_killed_run_goes_on(
    whole: Path, folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [piece for name, value in SETTINGS.items() for piece in (f"--{name}", value)]
    arguments = ["probe", "magic-word", "-s", str(folder), "-i", str(pairs), *chosen, "--out", "a"]
    child = subprocess.Popen(
        [sys.executable, "-m", "steersman", *arguments], cwd=tmp_path, stderr=subprocess.DEVNULL, env={**os.environ}
    )
    file, deadline = tmp_path / "a.partial" / "states.jsonl", time.time() + 120
    while time.time() < deadline and not (file.exists() and file.stat().st_size) and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "a").exists() and file.exists()  # killed in the middle
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(build(arguments), [*arguments, "--resume"])
    assert done.exit_code == 0, done.output
    assert states(tmp_path / "a") == states(whole) and metrics(tmp_path / "a") == metrics(whole)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lengths": "2;3"}, "commas between"),
        ({"lengths": "1"}, "longer than greedy=1"),
        ({"layers": "7"}, "from 0 to 1"),
        ({"budget": "0"}, "at least 1"),
        ({"success": "some"}, "one of any, argmin"),
        ({"alphabet": "x"}, "of type int"),
    ],
)
def test_bad_settings_leave_nothing(
    folder: Path, pairs: Path, tmp_path: Path, settings: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InputError) as refused:
        run_verb("probe", "magic-word", str(folder), tmp_path / "a", pairs, SETTINGS | settings)
    assert sentence in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_subjects_and_inputs(folder: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a \.jsonl file of 'x0' and 'y', or a text file"):
        run_verb("probe", "magic-word", str(folder), tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="that transformers loads"):
        run_verb("probe", "magic-word", str(tmp_path / "empty"), tmp_path / "a", pairs)
    with pytest.raises(InputError, match="keeps nothing unfinished"):
        run_verb("apply", "agd", "digits", tmp_path / "a", resume=True)


def test_a_factory_and_a_raw_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"def make():\n    return AutoModelForCausalLM.from_pretrained({str(folder)!r}), "
        f"AutoTokenizer.from_pretrained({str(folder)!r})\n"
    )
    (tmp_path / "corpus.txt").write_text("the list is a value of the name and a file that the call returns " * 5)
    chosen = SETTINGS | {"states": "2", "shortest": "3", "longest": "6", "budget": "40"}
    lines: list[str] = []
    record = run_verb(
        "probe", "magic-word", f"{tmp_path / 'mine.py'}:make", tmp_path / "a", tmp_path / "corpus.txt", chosen,
        log=lines.append,
    )  # fmt: skip
    assert record["metrics"]["all"]["pairs"] == 6
    assert all(word["passes"] <= 40 for line in states(tmp_path / "a") for word in line["words"])


def test_other_attention_is_no_reason_to_refuse(pairs: Path, tmp_path: Path) -> None:
    """Qwen3 has norms on its queries: the prompts are searched, and no head is bounded."""
    (tmp_path / "mine.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "from tests.language.test_magic_word import WORDS, tokenizer\n"
        "def make():\n"
        "    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "    config = Qwen3Config(vocab_size=len(WORDS), num_key_value_heads=1, head_dim=8, **sizes)\n"
        "    return Qwen3ForCausalLM(config), tokenizer()\n"
    )
    lines: list[str] = []
    record = run_verb(
        "probe", "magic-word", f"{tmp_path / 'mine.py'}:make", tmp_path / "a", pairs, SETTINGS, log=lines.append
    )
    assert record["metrics"]["attention"] == [] and record["metrics"]["all"]["pairs"] == 6
    assert any("norms" in line or "q_norm" in line for line in lines)


def test_the_page_escapes_what_it_shows() -> None:
    model = tiny("gpt2", 1, 4)
    word = MagicWord((1,), (2,), (3,), 1, (3, 1), "<script>x</script>", True, 1.0, 3, 1, "<i>kind</i>")
    found = Controllability((word,), 2, 1.0, 10)
    text = page(found, [], plot(found), System(model), "<u>me</u>", 5)
    for tag in ("<script", "<i>", "<u>"):
        assert tag not in text
