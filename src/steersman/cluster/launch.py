"""Ranks as real processes on this machine, with the environment that torchrun gives them.

:func:`launch` starts N processes that run one function, collects what each returns, and leaves none behind:
not when a rank fails, not at a timeout or Ctrl-C, and not when the launching process itself is killed (each
rank ends when the pipe from its launcher closes).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steersman.errors import Inapplicable, InputError, TrialError

FUNCTION = re.compile(r"^(?P<module>[A-Za-z_][\w.]*|.+\.py):(?P<name>[A-Za-z_]\w*)$")
MOST_WORKERS = 64
POLL_S = 0.02


def launch(
    function: str,
    arguments: Mapping[str, Any],
    workers: int,
    *,
    timeout: float = 600.0,
    progress: Callable[[float, float, str], None] | None = None,
) -> list[Any]:
    """Run ``function(**arguments)`` in ``workers`` ranks of one gloo process group.

    Args:
        function: ``package.module:function`` or ``file.py:function``. In each rank it finds the default process
            group initialised; what it returns must be JSON.
        arguments: its keyword arguments, JSON.
        workers: number of ranks, 1 to 64.
        timeout: seconds after which the ranks are stopped; also the process group's timeout.
        progress: called with what rank 0 passes to :func:`report`.

    Returns:
        list: each rank's result, in the order of the ranks.

    Raises:
        InputError: a bad argument; nothing was started.
        TrialError: a rank failed or the time was up; the sentence gives the first failing rank's last line and
            the exception's notes all that it wrote.
        Inapplicable: a rank's function raised it.
    """
    if not isinstance(function, str) or not FUNCTION.match(function):
        raise InputError("function", function, "package.module:function or file.py:function")
    if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= MOST_WORKERS:
        raise InputError("workers", workers, f"a whole number from 1 to {MOST_WORKERS}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise InputError("timeout", timeout, "a positive number of seconds")
    try:
        text = json.dumps(dict(arguments))
    except (TypeError, ValueError) as error:
        raise InputError("arguments", arguments, f"JSON ({error})") from None

    from torch.distributed import TCPStore

    # The launcher holds the ranks' store, as torchrun's agent does: its port is taken before it is told.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="steersman-ranks-") as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(text)
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(workers):
                ranks.append(_start(function, folder, rank, workers, store.port, timeout))
            _wait(ranks, folder, timeout, progress)
        finally:
            _stop(ranks)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(workers)]


def report(done: float, total: float, text: str = "") -> None:
    """Tell the launcher how far this rank is; only rank 0 is heard, and nobody outside :func:`launch`."""
    folder = os.environ.get("STEERSMAN_RANKS")
    if folder and os.environ.get("RANK") == "0":
        write_json(Path(folder) / "progress.json", [done, total, text])


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or nothing.

    Raises:
        TypeError: ``value`` isn't JSON.
    """
    text = json.dumps(value)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def environment(rank: int, workers: int, port: int) -> dict[str, str]:
    """torchrun's environment of one rank on one machine, over the loopback interface, one thread each."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC_", "PET_", "GROUP_", "ROLE_"))}
    return kept | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
        # The ranks import what the launcher can import.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _start(function: str, folder: Path, rank: int, workers: int, port: int, timeout: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "steersman.cluster.worker", function, str(folder / "arguments.json"), str(folder)]
    extra = {"STEERSMAN_RANKS": str(folder), "STEERSMAN_TIMEOUT": str(timeout)}
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=environment(rank, workers, port) | extra,
            stdin=subprocess.PIPE,  # never written to: it closes when the launcher ends, however it ends
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops the group
        )


def _wait(
    ranks: list[subprocess.Popen[bytes]],
    folder: Path,
    timeout: float,
    progress: Callable[[float, float, str], None] | None,
) -> None:
    """Return when all ranks have ended well; raise at the first that has not."""
    deadline, told = time.monotonic() + timeout, None
    while True:
        codes = [_ended(rank) for rank in ranks]
        if any(code not in (None, 0) for code in codes):
            raise _failure(ranks, folder)
        if all(code == 0 for code in codes):
            lacking = [i for i in range(len(ranks)) if not (folder / f"rank{i}.json").is_file()]
            if lacking:
                raise TrialError(f"rank {lacking[0]} of {len(ranks)} ended without a result")
            return
        if progress is not None:
            with contextlib.suppress(OSError, ValueError):
                news = json.loads((folder / "progress.json").read_text())
                if news != told:
                    told = news
                    progress(*news)
        if time.monotonic() > deadline:
            slow = ", ".join(str(i) for i, code in enumerate(codes) if code is None)
            error = TrialError(f"rank {slow} of {len(ranks)} did not finish within {timeout:g} s")
            raise _with_logs(error, folder, len(ranks))
        time.sleep(POLL_S)


def _failure(ranks: list[subprocess.Popen[bytes]], folder: Path) -> TrialError:
    """The error of the rank that failed first; the others only lost their connection to it."""
    time.sleep(POLL_S)  # a rank that died of the same cause may just be writing why
    records = {}
    for i in range(len(ranks)):
        with contextlib.suppress(OSError, ValueError):
            records[i] = json.loads((folder / f"rank{i}.error").read_text())
    silent = [i for i, rank in enumerate(ranks) if _ended(rank) not in (None, 0) and i not in records]
    error: TrialError
    if silent:
        # It was killed before it could say anything, so that what the others say came after.
        code = _ended(ranks[silent[0]])
        assert code is not None
        last = _last_line(folder / f"rank{silent[0]}.log")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        how += f": {last}" if last else ""
        error = TrialError(f"rank {silent[0]} of {len(ranks)} {how}")
    else:
        first = min(records, key=lambda i: records[i]["time"])
        record = records[first]
        kind = Inapplicable if record["type"] == "Inapplicable" else TrialError
        error = kind(record["message"] if kind is Inapplicable else f"rank {first} of {len(ranks)}: {record['line']}")
    return _with_logs(error, folder, len(ranks))


def _with_logs(error: TrialError, folder: Path, workers: int) -> TrialError:
    for rank in range(workers):
        with contextlib.suppress(OSError):
            log = (folder / f"rank{rank}.log").read_text(errors="replace").strip()
            if log:
                error.add_note(f"--- rank {rank} wrote ---\n{log[-20_000:]}")
    return error


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].strip() if lines else ""


def _ended(rank: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a rank that has ended; its process id stays taken until :func:`_stop` reaps it."""
    if rank.returncode is not None:
        return rank.returncode
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return rank.poll()
    found = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End every rank and whatever it started (each leads a process group of its own)."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()
        assert rank.stdin is not None
        with contextlib.suppress(OSError):
            rank.stdin.close()
