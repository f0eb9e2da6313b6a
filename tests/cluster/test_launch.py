"""Ranks as real processes: what they get, what comes back, and that none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steersman.cluster.launch import launch
from steersman.errors import Inapplicable, InputError, TrialError

RANKS = f"{Path(__file__).parent / 'ranks.py'}"


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process has ended (a zombie that nobody has reaped counts as ended)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def pids(folder: Path) -> list[int]:
    found = [int(pid) for file in folder.iterdir() for pid in file.read_text().split()]
    assert len(found) == 4  # two ranks and a child of each
    return found


def test_every_rank_answers_in_torchruns_environment():
    told = []
    results = launch(f"{RANKS}:everyone", {"value": 1.5}, 2, timeout=60, progress=lambda *news: told.append(news))
    assert [r["sum"] for r in results] == [4.5, 4.5]
    assert [r["RANK"] for r in results] == ["0", "1"] == [r["LOCAL_RANK"] for r in results]
    for r in results:
        assert (r["WORLD_SIZE"], r["MASTER_ADDR"], r["OMP_NUM_THREADS"]) == ("2", "127.0.0.1", "1")
        assert r["GLOO_SOCKET_IFNAME"].startswith("lo") and r["threads"] == 1
    assert told and told[-1] == (3, 3, "adding")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("raise", "rank 1 of 2: ValueError: the loss is NaN"),
        ("kill", "rank 1 of 2 was killed by SIGKILL"),
        ("exit", "rank 1 of 2 ended with exit code 7: out of luck"),
        ("inapplicable", "needs three workers"),
    ],
)
def test_a_failing_rank_ends_all_of_them(tmp_path, kind, sentence):
    start = time.monotonic()
    with pytest.raises(TrialError) as caught:
        launch(f"{RANKS}:mishap", {"kind": kind, "who": 1, "pids": str(tmp_path)}, 2, timeout=90)
    assert str(caught.value) == sentence
    assert isinstance(caught.value, Inapplicable) == (kind == "inapplicable")
    assert time.monotonic() - start < 45
    if kind == "raise":
        assert "at step 3" in caught.value.__notes__[1]  # the whole of what it wrote
    assert all(gone(pid) for pid in pids(tmp_path))


def test_ranks_that_hang_are_stopped_when_the_time_is_up(tmp_path):
    (tmp_path / "f.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name(os.environ['RANK'] + '.pid').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(TrialError, match=r"^rank 0, 1 of 2 did not finish within 5 s$"):
        launch(f"{tmp_path / 'f.py'}:f", {}, 2, timeout=5)
    hanging = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    assert len(hanging) == 2
    assert all(gone(pid) for pid in hanging)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_their_launcher(tmp_path, how):
    code = (
        "from steersman.cluster.launch import launch\n"
        f"launch({RANKS + ':mishap'!r}, {{'kind': 'hang', 'who': 1, 'pids': {str(tmp_path)!r}}}, 2, timeout=100)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while time.monotonic() < end and len([p for p in tmp_path.iterdir() if p.read_text().count(" ")]) < 2:
        time.sleep(0.05)
    found = pids(tmp_path)
    os.kill(launcher.pid, how)
    _, said = launcher.communicate(timeout=20)
    assert launcher.returncode != 0
    assert ("KeyboardInterrupt" in said) == (how == signal.SIGINT)
    ranks_gone = [gone(pid) for pid in found]
    assert all(ranks_gone)


def test_torchrun_runs_the_same_worker(tmp_path):
    (tmp_path / "arguments.json").write_text(json.dumps({"value": 2.0}))
    worker = ["-m", "steersman.cluster.worker", f"{RANKS}:everyone", str(tmp_path / "arguments.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *worker]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command.append(str(tmp_path / "out"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / "out" / f"rank{r}.json").read_text()) for r in range(2)]
    assert [r["sum"] for r in results] == [6.0, 6.0]
    assert [r["RANK"] for r in results] == ["0", "1"]


@pytest.mark.parametrize(
    ("changed", "parameter"),
    [
        ({"function": "nothing"}, "function"),
        ({"workers": 0}, "workers"),
        ({"workers": 65}, "workers"),
        ({"workers": True}, "workers"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"arguments": {"a": object()}}, "arguments"),
    ],
)
def test_bad_input_starts_nothing(changed, parameter, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(InputError) as caught:
        launch(**({"function": f"{RANKS}:everyone", "arguments": {}, "workers": 2} | changed))
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (f"{RANKS}:nobody", "a function that"),
        ("/nowhere/train.py:main", "no file /nowhere/train.py"),
        ("steersman.nowhere:main", "a module that can be imported"),
    ],
)
def test_a_function_that_isn_t_there_is_named(function, sentence):
    with pytest.raises(TrialError, match=sentence):
        launch(function, {}, 1, timeout=60)


def test_a_result_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "f.py").write_text("def f():\n    return {1, 2}\n")
    with pytest.raises(TrialError, match="set is not JSON"):
        launch(f"{tmp_path / 'f.py'}:f", {}, 1, timeout=60)
