"""Folders of ``apply`` and ``probe``: one run at a time, and nothing that was kept is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steersman.engine import artefacts
from steersman.engine.artefacts import REQUEST, run_verb
from steersman.engine.locks import alone
from steersman.errors import InputError

STEPS = ("first", "second")


def plain_probe(subject: Any, input: Any, out: Path, *, seed: int, log: Callable[[str], None]) -> dict[str, Any]:
    """A probe that keeps nothing unfinished."""
    log("working")
    (out / "found.txt").write_text(f"{seed}")
    return {"found": seed}


def kept_probe(
    subject: Any,
    input: Any,
    out: Path,
    *,
    seed: int,
    log: Callable[[str], None],
    resume: bool = False,
    words: Path | None = None,
    judge: Callable[[str], float] | None = None,
) -> dict[str, Any]:
    """A probe that writes a file a step and keeps those that are there."""
    made = 0
    for step in STEPS:
        if not (resume and (out / step).is_file()):
            (out / step).write_text(step)
            made += 1
        log(step)
    return {"made": made}


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``run(function, **arguments)``: that function as the probe of a method, into ``tmp_path / "a"``."""

    def run(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr(artefacts, "function_of", lambda card, verb: function)
        return run_verb("probe", "magic-word", "digits", arguments.pop("out", tmp_path / "a"), **arguments)

    return run


def stop_at(step: str) -> Callable[[str], None]:
    def log(line: str) -> None:
        if line == step:
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize("function", [plain_probe, kept_probe])
def test_a_second_run_leaves_the_first_alone(
    probes: Callable[..., Any], tmp_path: Path, function: Callable[..., Any]
) -> None:
    refused = []

    def again(line: str) -> None:
        if not refused:  # in the middle of the first run, another process's
            other = threading.Thread(target=lambda: refused.append(second()))
            other.start()
            other.join()

    def second() -> str:
        with pytest.raises(InputError, match="no other run is using") as caught:
            probes(function)
        return str(caught.value)

    record = probes(function, log=again)
    assert len(refused) == 1 and record["metrics"]
    names = {"plain_probe": {"found.txt"}, "kept_probe": {*STEPS}}[function.__name__]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"probe.json", *names}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_another_process_is_refused(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from steersman.engine.locks import alone\nwith alone(Path('a')): pass"
    with alone(tmp_path / "a"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "no other run is using" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_a_lock_that_was_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends between another's open and its lock: that one must not run beside a third."""
    path, real = tmp_path / "a.partial.lock", os.fstat

    def late(number: int) -> os.stat_result:
        path.unlink()
        path.touch()  # a third process's
        return real(number)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", late)
        with pytest.raises(InputError, match="no other run is using"), alone(tmp_path / "a"):
            pass
    assert path.exists()  # the third's is left to it


@pytest.mark.parametrize(("function", "way"), [(plain_probe, "remove it"), (kept_probe, "add --resume, or remove it")])
def test_no_verb_removes_what_an_interrupted_run_kept(
    probes: Callable[..., Any], tmp_path: Path, function: Callable[..., Any], way: str
) -> None:
    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        probes(kept_probe, log=stop_at("first"))
    with pytest.raises(InputError, match=f"partial: {way}"):
        probes(function)
    assert {p.name for p in (tmp_path / "a.partial").iterdir()} == {REQUEST, "first"}
    assert probes(kept_probe, resume=True)["metrics"] == {"made": 1}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"probe.json", *STEPS}


def test_files_of_settings_are_compared_by_content(
    probes: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("one")
    Path("judge.py").write_text("def judge(text): return 1.0\n")
    settings = {"words": "words.txt", "judge": "judge.py:judge"}
    with pytest.raises(KeyboardInterrupt):
        probes(kept_probe, settings=settings, log=stop_at("first"))
    Path("words.txt").write_text("two")
    with pytest.raises(InputError, match="the settings of the run"):
        probes(kept_probe, settings=settings, resume=True)
    Path("words.txt").write_text("one")
    Path("judge.py").write_text("def judge(text): return 0.0\n")
    with pytest.raises(InputError, match="the settings of the run"):
        probes(kept_probe, settings=settings, resume=True)
    Path("judge.py").write_text("def judge(text): return 1.0\n")
    with pytest.raises(InputError, match="the settings of the run"):
        probes(kept_probe, settings={"judge": "judge.py:judge"}, resume=True)
    elsewhere = {"words": str(tmp_path / "words.txt"), "judge": f"{tmp_path}/judge.py:judge"}
    assert probes(kept_probe, settings=elsewhere, resume=True)["metrics"] == {"made": 1}


@pytest.mark.parametrize("out", [".", "..", "b/.."])
def test_a_folder_without_a_name_is_refused(
    probes: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="a new folder, by its name"):
        probes(plain_probe, out=out)
